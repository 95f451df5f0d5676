package session

import (
	"bytes"
	"crypto/ed25519"
	"encoding/binary"
	"errors"
	"slices"
	"strings"
	"testing"
)

func fullOrder() *Order {
	return &Order{
		Fabric: FabricOf(testPublic(9)), Number: 2, Tenant: 7, Time: 1793610000000,
		Incident: "INC-142", Reason: "the authority is down and agents delete things", Unknown: []Field{{Tag: 1, Value: []byte("z")}},
	}
}

// emergencyKeySet has a key for tenant 7 and three orders, which may publish, one
// for everything, one that is withdrawn, and one from before there were orders.
func emergencyKeySet() *KeySet {
	ks := fullKeySet()
	ks.Keys = append(ks.Keys,
		SigningKey{Public: testPublic(20), Use: UseEmergency, Tenants: []TenantID{7}, Orders: 3, Bus: testPublic(30)},
		SigningKey{Public: testPublic(21), Use: UseEmergency, Orders: 1},
		SigningKey{Public: testPublic(22), Use: UseEmergency, Withdrawn: true, Orders: 3},
		SigningKey{Public: testPublic(23), Use: UseEmergency})
	return ks
}

func signOrder(t testing.TB, key ed25519.PrivateKey, change func(*Order)) *SignedOrder {
	t.Helper()
	o := fullOrder()
	if change != nil {
		change(o)
	}
	b, err := SealOrder(o, key)
	if err != nil {
		t.Fatal(err)
	}
	s, err := ParseOrder(b)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// TestTrustOrder: an order counts within what the key set fixes, and no further.
func TestTrustOrder(t *testing.T) {
	trust, err := NewTrust(testPublic(9))
	if err != nil {
		t.Fatal(err)
	}
	tenant, all := testKey(20), testKey(21)
	if err := trust.Order(signOrder(t, tenant, nil)); !errors.Is(err, ErrUntrusted) {
		t.Errorf("before the first key set: %v", err)
	}
	if _, err := trust.Update(sealKeySet(t, testKey(9), func(ks *KeySet) { ks.Keys = emergencyKeySet().Keys }), trustNow); err != nil {
		t.Fatal(err)
	}
	forged := signOrder(t, tenant, nil)
	other := signOrder(t, tenant, func(o *Order) { o.Number = 1 })
	forged.parsed.signature = other.parsed.signature
	for _, tt := range []struct {
		name  string
		order *SignedOrder
		want  error
	}{
		{"its tenant", signOrder(t, tenant, nil), nil},
		{"its last", signOrder(t, tenant, func(o *Order) { o.Number = 3 }), nil},
		{"one more than it may", signOrder(t, tenant, func(o *Order) { o.Number = 4 }), ErrUntrusted},
		{"another tenant", signOrder(t, tenant, func(o *Order) { o.Tenant = 1 }), ErrUntrusted},
		{"everything, by a tenant's key", signOrder(t, tenant, func(o *Order) { o.Tenant = 0 }), ErrUntrusted},
		{"everything", signOrder(t, all, func(o *Order) { o.Number, o.Tenant = 1, 0 }), nil},
		{"a tenant, by the key for everything", signOrder(t, all, func(o *Order) { o.Number = 1 }), nil},
		{"another deployment", signOrder(t, tenant, func(o *Order) { o.Fabric[0]++ }), ErrUntrusted},
		{"a withdrawn key", signOrder(t, testKey(22), nil), ErrUntrusted},
		{"a key without orders", signOrder(t, testKey(23), func(o *Order) { o.Number = 1 }), ErrUntrusted},
		{"a writer", signOrder(t, testKey(1), nil), ErrUntrusted},
		{"the root", signOrder(t, testKey(9), nil), ErrUntrusted},
		{"a stranger", signOrder(t, testKey(99), nil), ErrUntrusted},
		{"another order's signature", forged, ErrSignature},
	} {
		if err := trust.Order(tt.order); !errors.Is(err, tt.want) {
			t.Errorf("%s: %v, want %v", tt.name, err, tt.want)
		}
	}

	// Widened on the way: any byte of it.
	frame := signOrder(t, tenant, nil).Frame
	for i := range frame {
		b := bytes.Clone(frame)
		b[i] ^= 1
		if s, err := ParseOrder(b); err == nil && trust.Order(s) == nil {
			t.Errorf("byte %d can be changed", i)
		}
	}

	// A key's rights stand until it is withdrawn.
	for name, change := range map[string]func(*SigningKey){
		"more orders":    func(k *SigningKey) { k.Orders++ },
		"other bus key":  func(k *SigningKey) { k.Bus = testPublic(31) },
		"no bus key":     func(k *SigningKey) { k.Bus = nil },
		"another tenant": func(k *SigningKey) { k.Tenants = []TenantID{1, 7} },
	} {
		if _, err := trust.Update(sealKeySet(t, testKey(9), func(ks *KeySet) {
			ks.Version++
			ks.Keys = emergencyKeySet().Keys
			change(&ks.Keys[4])
		}), trustNow); !errors.Is(err, ErrUntrusted) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := trust.Update(sealKeySet(t, testKey(9), func(ks *KeySet) {
		ks.Version++
		ks.Keys = emergencyKeySet().Keys
		ks.Keys[4].Withdrawn = true
	}), trustNow); err != nil {
		t.Fatal(err)
	}
	if err := trust.Order(signOrder(t, tenant, nil)); !errors.Is(err, ErrUntrusted) {
		t.Errorf("a key that was withdrawn: %v", err)
	}
}

// TestOrdersAreOfTheirOwnDomain: no signature of anything else is an order's, even
// where one key is made to sign both, and no order is anything else.
func TestOrdersAreOfTheirOwnDomain(t *testing.T) {
	body := must(fullOrder().MarshalBody())
	for _, typ := range []FrameType{TypeBatch, TypeHeartbeat, TypeOrder} {
		frame := must(Seal(typ, body, testKey(1)))
		for _, as := range []FrameType{TypeBatch, TypeHeartbeat, TypeOrder} {
			b := bytes.Clone(frame)
			b[4] = byte(as)
			f, err := ParseFrame(b)
			if err != nil {
				t.Fatal(err)
			}
			if err := f.Verify(testPublic(1)); (err == nil) != (as == typ) {
				t.Errorf("%d as %d: %v", typ, as, err)
			}
		}
	}
	content := must(Seal(TypeOrder, body, testKey(1)))
	content = content[:len(content)-64]
	f, err := ParseFrame(append(bytes.Clone(content), must(testKey(1).Sign(nil, append([]byte(signContext), content...), noHash))...))
	if err != nil {
		t.Fatal(err)
	}
	if f.Verify(testPublic(1)) == nil {
		t.Error("a signature in the context of the other frames is an order's")
	}
}

func TestParseOrderRefuses(t *testing.T) {
	body := must(fullOrder().MarshalBody())
	for name, tt := range map[string]struct {
		frame []byte
		want  error
	}{
		"another frame":         {must(Seal(TypeBatch, body, testKey(1))), ErrMalformed},
		"a long one":            {must(Seal(TypeOrder, append(bytes.Clone(body[:len(body)-6]), long(MaxOrderLen)...), testKey(1))), ErrMalformed},
		"another operation":     {must(Seal(TypeOrder, func() []byte { b := bytes.Clone(body); b[32] = 2; return b }(), testKey(1))), ErrCritical},
		"nothing":               {nil, ErrMalformed},
		"an order in an order":  {must(Seal(TypeOrder, must(Seal(TypeOrder, body, testKey(1))), testKey(1))), ErrFrame},
		"a critical field more": {must(Seal(TypeOrder, append(bytes.Clone(body[:len(body)-6]), 0, 3, 0x81, 0, 0), testKey(1))), ErrCritical},
	} {
		if _, err := ParseOrder(tt.frame); !errors.Is(err, tt.want) {
			t.Errorf("%s: %v, want %v", name, err, tt.want)
		}
	}
	o := fullOrder()
	o.Unknown = []Field{{Tag: 1, Value: make([]byte, MaxOrderLen)}}
	if _, err := SealOrder(o, testKey(1)); !errors.Is(err, ErrMalformed) {
		t.Errorf("one that cannot be read is signed: %v", err)
	}
	o = fullOrder()
	o.Incident, o.Reason, o.Unknown = strings.Repeat("i", MaxIncidentLen), strings.Repeat("r", MaxOrderReasonLen), nil
	if _, err := SealOrder(o, testKey(1)); err != nil {
		t.Errorf("the longest texts: %v", err)
	}
}

// long is a list of one field that makes a body that long.
func long(n int) []byte {
	b := binary.BigEndian.AppendUint16(nil, uint16(n+3))
	b = append(b, 1)
	b = binary.BigEndian.AppendUint16(b, uint16(n))
	return append(b, make([]byte, n)...)
}

func TestAdoptingAnOrder(t *testing.T) {
	s := signOrder(t, testKey(20), nil)
	b := &Batch{Epoch: 1, Number: 1, Entries: s.Adopted()}
	if _, err := UnmarshalBatch(must(b.MarshalBody())); err != nil {
		t.Fatal(err)
	}
	if e := b.Entries[0]; e.Key != TenantKey(7) || e.Effect != EffectSuspended || e.Reason != ReasonKill || e.Incident != "INC-142" {
		t.Errorf("%+v", e)
	}
	if e := b.Entries[1]; e.Key != s.ID.Spent() || e.Expires != 0 {
		t.Errorf("%+v", e)
	}
	lift := Entry{Op: OpLift, Effect: EffectRevoked, Key: s.ID.Spent(), IssuedBefore: 1}
	if err := lift.Validate(); !errors.Is(err, ErrMalformed) {
		t.Errorf("what is spent can be made good again: %v", err)
	}
	ids := []OrderID{{s.ID.Key, 1}, {s.ID.Key, 2}, {KeyID{1}, 2}}
	for i, id := range ids {
		if slices.IndexFunc(ids, func(o OrderID) bool { return o.Spent() == id.Spent() }) != i {
			t.Errorf("%s is spent with another", id)
		}
	}
	global := signOrder(t, testKey(20), func(o *Order) { o.Tenant = 0 })
	if global.Entry().Key != GlobalKey() {
		t.Errorf("%s", global.Entry().Key)
	}
}

// TestOlderKeySetsStillRead: what a key set without the field says is what it said.
func TestOlderKeySetsStillRead(t *testing.T) {
	old := must(fullKeySet().MarshalBody())
	ks, err := UnmarshalKeySet(old)
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range ks.Keys {
		if k.Orders != 0 || k.Bus != nil {
			t.Errorf("%+v", k)
		}
	}
	with := must(emergencyKeySet().MarshalBody())
	none := emergencyKeySet()
	for i := range none.Keys {
		none.Keys[i].Orders, none.Keys[i].Bus = 0, nil
	}
	// To a reader that does not know the field it is an unknown one that is not
	// critical.
	field := must(emergencyKeySet().MarshalBody())[len(must(none.MarshalBody())):]
	if len(field) == 0 || len(with) <= len(old) {
		t.Fatal("the field is not there")
	}
	if tagOrders&critical != 0 {
		t.Error("older readers would refuse the key set")
	}
}

// FuzzParseOrder: whatever parses is an order that can be made again, byte for
// byte, and is believed only if it is the one that was signed.
func FuzzParseOrder(f *testing.F) {
	trust, err := NewTrust(testPublic(9))
	if err != nil {
		f.Fatal(err)
	}
	body := must(emergencyKeySet().MarshalBody())
	if _, err := trust.Update(must(Seal(TypeKeySet, body, testKey(9))), trustNow); err != nil {
		f.Fatal(err)
	}
	genuine := must(SealOrder(fullOrder(), testKey(20)))
	f.Add(genuine)
	f.Add(must(SealOrder(&Order{Number: 1, Time: 1, Incident: "i", Reason: "r"}, testKey(21))))
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := ParseOrder(b)
		if err != nil {
			if !errors.Is(err, ErrFrame) {
				t.Errorf("%v", err)
			}
			return
		}
		again, err := s.MarshalBody()
		if err != nil || !bytes.Equal(again, s.parsed.Body) {
			t.Errorf("another spelling of %x: %x, %v", s.parsed.Body, again, err)
		}
		if trust.Order(s) == nil && !bytes.Equal(b, genuine) {
			t.Errorf("believed: %x", b)
		}
	})
}
