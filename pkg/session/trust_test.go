package session

import (
	"bytes"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"sync"
	"testing"
)

const trustNow = Instant(1793610000000)

// sealKeySet makes a frame of the full key set, changed.
func sealKeySet(t testing.TB, root ed25519.PrivateKey, change func(*KeySet)) []byte {
	t.Helper()
	ks := fullKeySet()
	if change != nil {
		change(ks)
	}
	body, err := ks.MarshalBody()
	if err != nil {
		t.Fatal(err)
	}
	frame, err := Seal(TypeKeySet, body, root)
	if err != nil {
		t.Fatal(err)
	}
	return frame
}

func TestTrustUpdate(t *testing.T) {
	root, forger := testKey(9), testKey(8)
	type step struct {
		name  string
		frame []byte
		now   Instant
		took  bool
		want  error
	}
	full := sealKeySet(t, root, nil)
	forged := bytes.Clone(full)
	forged[20] ^= 1
	claims := bytes.Clone(sealKeySet(t, forger, nil))
	id := KeyIDOf(root.Public().(ed25519.PublicKey))
	copy(claims[5:], id[:])
	batch, _ := Seal(TypeBatch, must(fullKeySet().MarshalBody()), root)
	broken, _ := Seal(TypeKeySet, []byte("body"), root)
	version := func(v uint64, change func(*KeySet)) []byte {
		return sealKeySet(t, root, func(ks *KeySet) {
			ks.Version = v
			if change != nil {
				change(ks)
			}
		})
	}
	tests := []struct {
		name  string
		steps []step
		held  uint64 // version at the end
	}{
		{"the first", []step{{"", full, trustNow, true, nil}}, 12},
		{"the same again", []step{{"", full, trustNow, true, nil}, {"again", full, trustNow, false, nil}}, 12},
		{"a newer", []step{{"", full, trustNow, true, nil}, {"newer", version(13, nil), trustNow, true, nil}}, 13},
		{"an older is no error", []step{{"", full, trustNow, true, nil}, {"older", version(11, nil), trustNow, false, nil}}, 12},
		{"an older that has expired is no error either", []step{
			{"", full, trustNow, true, nil},
			{"older", version(11, func(ks *KeySet) { ks.NotAfter = ks.Issued + 1 }), trustNow, false, nil},
		}, 12},
		{"the same version with other content", []step{
			{"", full, trustNow, true, nil},
			{"other", version(12, func(ks *KeySet) { ks.NotAfter++ }), trustNow, false, ErrUntrusted},
		}, 12},
		{"expired", []step{{"", full, 1801000000000, false, ErrUntrusted}}, 0},
		{"about to expire", []step{{"", full, 1801000000000 - 1, true, nil}}, 12},
		{"a newer that has expired", []step{
			{"", full, trustNow, true, nil},
			{"newer", version(13, func(ks *KeySet) { ks.NotAfter = trustNow }), trustNow, false, ErrUntrusted},
		}, 12},
		{"an epoch on", []step{
			{"", full, trustNow, true, nil},
			{"epoch 3", version(13, func(ks *KeySet) { ks.Epoch, ks.Salt = 3, [16]byte{3} }), trustNow, true, nil},
		}, 13},
		{"an epoch back", []step{
			{"", full, trustNow, true, nil},
			{"epoch 1", version(13, func(ks *KeySet) { ks.Epoch = 1 }), trustNow, false, ErrUntrusted},
		}, 12},
		{"another salt for the same epoch", []step{
			{"", full, trustNow, true, nil},
			{"salt", version(13, func(ks *KeySet) { ks.Salt[0]++ }), trustNow, false, ErrUntrusted},
		}, 12},
		{"a key with other tenants", []step{
			{"", full, trustNow, true, nil},
			{"wider", version(13, func(ks *KeySet) {
				if ks.Keys[0].Tenants == nil {
					ks.Keys[0].Tenants = []TenantID{1}
				} else {
					ks.Keys[0].Tenants = nil
				}
			}), trustNow, false, ErrUntrusted},
		}, 12},
		{"a key with another use", []step{
			{"", full, trustNow, true, nil},
			{"other", version(13, func(ks *KeySet) { ks.Keys[0].Use++ }), trustNow, false, ErrUntrusted},
		}, 12},
		{"forged by another key", []step{{"", sealKeySet(t, forger, nil), trustNow, false, ErrSignature}}, 0},
		{"forged under the root's name", []step{{"", claims, trustNow, false, ErrSignature}}, 0},
		{"changed on the way", []step{{"", forged, trustNow, false, ErrSignature}}, 0},
		{"another type of frame", []step{{"", batch, trustNow, false, ErrMalformed}}, 0},
		{"not a key set inside", []step{{"", broken, trustNow, false, ErrMalformed}}, 0},
		{"not a frame", []step{{"", []byte("x"), trustNow, false, ErrMalformed}}, 0},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			trust, err := NewTrust(root.Public().(ed25519.PublicKey))
			if err != nil {
				t.Fatal(err)
			}
			for _, s := range tt.steps {
				took, err := trust.Update(s.frame, s.now)
				if took != s.took || !errors.Is(err, s.want) || (err == nil) != (s.want == nil) {
					t.Fatalf("%s: took %t, %v; want %t, %v", s.name, took, err, s.took, s.want)
				}
			}
			var held uint64
			if ks := trust.KeySet(); ks != nil {
				held = ks.Version
			}
			if held != tt.held {
				t.Errorf("holds version %d, want %d", held, tt.held)
			}
		})
	}
}

func TestTrustNeedsAPinnedRoot(t *testing.T) {
	for _, root := range []ed25519.PublicKey{nil, {}, testPublic(9)[1:]} {
		if _, err := NewTrust(root); !errors.Is(err, ErrInvalid) {
			t.Errorf("a root of %d bytes: %v", len(root), err)
		}
	}
	root := bytes.Clone(testPublic(9))
	trust, err := NewTrust(root)
	if err != nil {
		t.Fatal(err)
	}
	root[0]++ // the caller's slice is not the pin
	if !trust.Root().Equal(testPublic(9)) {
		t.Error("the pin can be changed from outside")
	}
}

func TestOriginIsBoundToRootEpochAndSalt(t *testing.T) {
	ks := fullKeySet()
	msg := append([]byte("interlock epoch 1\x00"), testPublic(9)...)
	msg = binary.BigEndian.AppendUint64(msg, 2)
	msg = append(msg, ks.Salt[:]...)
	if got := ks.Origin(testPublic(9)); got != sha256.Sum256(msg) {
		t.Errorf("origin %x", got)
	}
	trust, _ := NewTrust(testPublic(9))
	if trust.Origin() != (Hash{}) || trust.KeySet() != nil {
		t.Error("an origin before the first key set")
	}
	if _, err := trust.Update(sealKeySet(t, testKey(9), nil), trustNow); err != nil {
		t.Fatal(err)
	}
	if trust.Origin() != ks.Origin(testPublic(9)) {
		t.Error("the origin is not the key set's")
	}
	if ks.Origin(testPublic(8)) == ks.Origin(testPublic(9)) {
		t.Error("two deployments have one origin")
	}
	other := fullKeySet()
	other.Salt[15]++
	if other.Origin(testPublic(9)) == ks.Origin(testPublic(9)) {
		t.Error("the salt is not in the origin")
	}
}

func TestTrustWriter(t *testing.T) {
	// Key 1 writes, 2 writes for tenants 1 and 7, 3 was withdrawn after 2/100,
	// 5 is unknown; 6 was withdrawn in epoch 1, 7 in an epoch to come; 8 is an
	// emergency key, 10 is for something that this version does not know.
	trust, err := NewTrust(testPublic(9))
	if err != nil {
		t.Fatal(err)
	}
	seal := func(key byte) *Frame {
		frame, err := Seal(TypeBatch, []byte("body"), testKey(key))
		if err != nil {
			t.Fatal(err)
		}
		f, err := ParseFrame(frame)
		if err != nil {
			t.Fatal(err)
		}
		return &f
	}
	if _, err := trust.Writer(seal(1), 1, false, trustNow); !errors.Is(err, ErrUntrusted) {
		t.Errorf("before the first key set: %v", err)
	}
	if _, err := trust.Update(sealKeySet(t, testKey(9), func(ks *KeySet) {
		ks.Keys = append(ks.Keys,
			SigningKey{Public: testPublic(6), Use: UseWriter, Withdrawn: true, LastEpoch: 1, LastNumber: 1000},
			SigningKey{Public: testPublic(7), Use: UseWriter, Withdrawn: true, LastEpoch: 3, LastNumber: 5},
			SigningKey{Public: testPublic(8), Use: UseEmergency}, SigningKey{Public: testPublic(10), Use: 99})
	}), trustNow); err != nil {
		t.Fatal(err)
	}
	forged := seal(1)
	forged.signature = seal(2).signature
	claims := seal(5)
	claims.Key = KeyIDOf(testPublic(1))
	tests := []struct {
		name   string
		frame  *Frame
		number uint64
		live   bool
		now    Instant
		want   error
	}{
		{"a writer", seal(1), 1, false, trustNow, nil},
		{"a writer's heartbeat", seal(1), 1, true, trustNow, nil},
		{"a writer of some tenants", seal(2), 1, false, trustNow, nil},
		{"withdrawn, at the last number", seal(3), 100, false, trustNow, nil},
		{"withdrawn, after the last number", seal(3), 101, false, trustNow, ErrUntrusted},
		{"withdrawn, live", seal(3), 1, true, trustNow, ErrUntrusted},
		{"withdrawn an epoch ago", seal(6), 1, false, trustNow, ErrUntrusted},
		{"withdrawn from an epoch to come", seal(7), 9999, false, trustNow, nil},
		{"a key for a use to come", seal(10), 1, false, trustNow, ErrUntrusted},
		{"an emergency key", seal(8), 1, false, trustNow, ErrUntrusted},
		{"an unknown key", seal(5), 1, false, trustNow, ErrUntrusted},
		{"the root itself", seal(9), 1, false, trustNow, ErrUntrusted},
		{"another's signature", forged, 1, false, trustNow, ErrSignature},
		{"under another's name", claims, 1, false, trustNow, ErrSignature},
		{"when the key set has ended", seal(1), 1, false, 1801000000000, ErrUntrusted},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			k, err := trust.Writer(tt.frame, tt.number, tt.live, tt.now)
			if !errors.Is(err, tt.want) || (k == nil) != (tt.want != nil) {
				t.Errorf("%v, %v; want %v", k, err, tt.want)
			}
		})
	}
}

func TestAKeySignsForItsTenantsAlone(t *testing.T) {
	user := func(id TenantID) Key { return Key{id, Shape(KindUser), Digest{1}} }
	for name, tt := range map[string]struct {
		key  SigningKey
		may  []Key
		none []Key
	}{
		"unlimited":  {SigningKey{}, []Key{GlobalKey(), TenantKey(1), user(2)}, nil},
		"of two":     {SigningKey{Tenants: []TenantID{1, 7}}, []Key{TenantKey(1), user(1), user(7)}, []Key{GlobalKey(), TenantKey(2), user(2)}},
		"of none":    {SigningKey{Tenants: []TenantID{}}, nil, []Key{GlobalKey(), TenantKey(1), user(1)}},
		"of nothing": {SigningKey{Tenants: []TenantID{0}}, nil, []Key{GlobalKey(), user(1)}},
	} {
		for _, k := range tt.may {
			if !tt.key.May(k) {
				t.Errorf("a key %s may not sign for %s", name, k)
			}
		}
		for _, k := range tt.none {
			if tt.key.May(k) {
				t.Errorf("a key %s may sign for %s", name, k)
			}
		}
	}
}

func TestKeySetFindsTenants(t *testing.T) {
	ks := fullKeySet()
	if tn, ok := ks.Tenant("globex.eu"); !ok || tn.ID != 7 {
		t.Errorf("%v, %t", tn, ok)
	}
	if _, ok := ks.Tenant("nobody"); ok {
		t.Error("found a tenant that is not there")
	}
	if ks.TenantName(1) != "acme" || ks.TenantName(0) != "" || ks.TenantName(5) != "" {
		t.Error("names of tenants")
	}
}

// Run with -race: reads take no lock and see one key set whole.
func TestReadsRunBesideAnUpdate(t *testing.T) {
	root := testKey(9)
	trust, err := NewTrust(testPublic(9))
	if err != nil {
		t.Fatal(err)
	}
	frames := make([][]byte, 20)
	for i := range frames {
		frames[i] = sealKeySet(t, root, func(ks *KeySet) { ks.Version, ks.Epoch, ks.Salt = uint64(i+1), uint64(i+1), [16]byte{byte(i)} })
	}
	var wg sync.WaitGroup
	done := make(chan struct{})
	for range 2 {
		wg.Go(func() {
			for last := uint64(0); ; {
				if ks := trust.KeySet(); ks != nil {
					if ks.Version != ks.Epoch || ks.Version < last {
						t.Errorf("version %d after %d, epoch %d", ks.Version, last, ks.Epoch)
						return
					}
					last = ks.Version
				}
				select {
				case <-done:
					return
				default:
				}
			}
		})
	}
	for _, f := range frames {
		if took, err := trust.Update(f, trustNow); err != nil || !took {
			t.Errorf("took %t, %v", took, err)
		}
	}
	close(done)
	wg.Wait()
}
