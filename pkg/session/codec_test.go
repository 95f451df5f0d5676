package session

import (
	"bytes"
	"encoding/binary"
	"errors"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// codec is one body of the wire: again parses it and marshals what it found.
type codec struct {
	name  string
	typ   FrameType
	valid [][]byte
	again func([]byte) ([]byte, error)
}

func (c *codec) roundTrip(t interface{ Fatalf(string, ...any) }, body []byte) error {
	out, err := c.again(body)
	if err != nil {
		if !errors.Is(err, ErrMalformed) && !errors.Is(err, ErrCritical) {
			t.Fatalf("%s: %v is neither malformed nor critical", c.name, err)
		}
		return err
	}
	if !bytes.Equal(out, body) {
		t.Fatalf("%s: %x parses, and marshals to %x", c.name, body, out)
	}
	return nil
}

func must(b []byte, err error) []byte {
	if err != nil {
		panic(err)
	}
	return b
}

// again makes a codec's function of a pair.
func again[T any](parse func([]byte) (T, error), marshal func(T) ([]byte, error)) func([]byte) ([]byte, error) {
	return func(b []byte) ([]byte, error) {
		v, err := parse(b)
		if err != nil {
			return nil, err
		}
		return marshal(v)
	}
}

func codecs() []codec {
	batch, keySet, receipt := fullBatch(), fullKeySet(), fullReceipt()
	beat, clock, rejection := fullHeartbeat(), fullClock(), fullRejection()
	return []codec{
		{"key set", TypeKeySet, [][]byte{must(keySet.MarshalBody()), must((&KeySet{Version: 1, Epoch: 1, NotAfter: 1}).MarshalBody()), must(emergencyKeySet().MarshalBody())},
			again(UnmarshalKeySet, (*KeySet).MarshalBody)},
		{"batch", TypeBatch, [][]byte{must(batch.MarshalBody()), must((&Batch{Epoch: 1, Number: 1}).MarshalBody())},
			again(UnmarshalBatch, (*Batch).MarshalBody)},
		{"heartbeat", TypeHeartbeat, [][]byte{beat.MarshalBody(), (&Heartbeat{}).MarshalBody(), (&Heartbeat{Agents: AgentsRef{7, Hash{8}}}).MarshalBody()},
			again(UnmarshalHeartbeat, func(h Heartbeat) ([]byte, error) { return h.MarshalBody(), nil })},
		{"clock", TypeClock, [][]byte{clock.MarshalBody(), (&Clock{}).MarshalBody()},
			again(UnmarshalClock, func(c Clock) ([]byte, error) { return c.MarshalBody(), nil })},
		{"rejection", TypeRejection, [][]byte{rejection.MarshalBody(), (&Rejection{}).MarshalBody()},
			again(UnmarshalRejection, func(x Rejection) ([]byte, error) { return x.MarshalBody(), nil })},
		{"receipt", TypeReceipt, [][]byte{must(receipt.MarshalBody()), must((&Receipt{Enforcer: "e"}).MarshalBody()),
			must((&Receipt{Enforcer: "e", Orders: [][]byte{[]byte("one"), []byte("another")}}).MarshalBody())},
			again(UnmarshalReceipt, (*Receipt).MarshalBody)},
		{"report", TypeReport, [][]byte{must(fullReport().MarshalBody()), must((&Report{Enforcer: "e", Count: 1}).MarshalBody())},
			again(UnmarshalReport, (*Report).MarshalBody)},
		{"order", TypeOrder, [][]byte{must(fullOrder().MarshalBody()), must((&Order{Number: 1, Time: 1, Incident: "i", Reason: "r"}).MarshalBody())},
			again(UnmarshalOrder, (*Order).MarshalBody)},
		{"agents", TypeAgents, [][]byte{testIndex().MarshalBody(), (&AgentIndex{Epoch: 1, Version: 1}).MarshalBody()},
			again(UnmarshalAgentIndex, func(x *AgentIndex) ([]byte, error) { return x.MarshalBody(), nil })},
		// Not a frame's body: it is sealed in that of a report.
		{"trail content", 0, [][]byte{must(fullContent().Marshal()), must((&TrailContent{}).Marshal())},
			again(UnmarshalTrailContent, (*TrailContent).Marshal)},
	}
}

func fullBatch() *Batch {
	return &Batch{
		Epoch: 2, Number: 48213, Prev: Hash{1, 2, 3}, Time: 1793610000000, Deadline: 1793610060000, Horizon: 1793609990000,
		Decisions: []DecisionRef{{DecisionID{1}, 2}, {DecisionID{2}, 0}, {DecisionID{3}, 2}},
		Entries: []Entry{
			{Op: OpSet, Effect: EffectRevoked, Reason: ReasonStolenToken, Key: testKeyOf(Shape(KindSession)), Expires: 1793613600000, Incident: "INC-142"},
			{Op: OpSet, Effect: EffectSuspended, Reason: ReasonKill, Key: GlobalKey(), Except: []Key{testKeyOf(Shape(KindUser)), testKeyOf(Shape(KindRole))}, Drill: true},
			{Op: OpSet, Effect: EffectStepUp, Reason: 99, Key: testKeyOf(ShapeUserAgent), IssuedBefore: 1793609000000, ACR: "mfa", Unknown: []Field{{Tag: 0, Value: []byte{}}, {Tag: 9, Value: []byte("later")}}},
			{Op: OpLift, Effect: EffectSuspended, Reason: ReasonRestored, Key: TenantKey(7), Share: 2500},
			{Op: OpLift, Effect: EffectRevoked, Key: testKeyOf(Shape(KindAgent)), IssuedBefore: 1793609000000},
		},
		Unknown: []Field{{Tag: 3, Value: []byte{1}}},
	}
}

func fullKeySet() *KeySet {
	return &KeySet{
		Version: 12, Epoch: 2, Salt: [16]byte{9}, Issued: 1793600000000, NotAfter: 1801000000000,
		Tenants: []Tenant{{1, "acme"}, {7, "globex.eu"}},
		Keys: []SigningKey{
			{Public: testPublic(1), Use: UseWriter},
			{Public: testPublic(2), Use: UseWriter, Tenants: []TenantID{1, 7}},
			{Public: testPublic(3), Use: UseWriter, Withdrawn: true, LastEpoch: 2, LastNumber: 100},
			{Public: testPublic(4), Use: UseEmergency, Tenants: []TenantID{}, Withdrawn: true},
		},
		Unknown: []Field{{Tag: 1, Value: []byte("x")}},
	}
}

func fullHeartbeat() *Heartbeat {
	return &Heartbeat{
		Epoch: 2, Number: 48213, Head: Hash{4}, State: StateDigest{5}, Writer: WriterID{6}, Mono: time.Hour, Proven: 3 * time.Millisecond,
		Time: 1793610000000, KeySet: 12, Unknown: []Field{{Tag: 0x7f, Value: []byte{}}},
	}
}

func fullClock() *Clock {
	return &Clock{Nonce: [32]byte{1}, Writer: WriterID{2}, Mono: time.Minute, Time: 1793610000000, Unknown: []Field{{Tag: 2, Value: []byte{2}}}}
}

func fullRejection() *Rejection {
	return &Rejection{Epoch: 2, Number: 48213, Batch: Hash{7}, Unknown: []Field{{Tag: 2, Value: []byte{2}}}}
}

func fullReceipt() *Receipt {
	return &Receipt{
		Enforcer: "mcp-eu-1", Boot: WriterID{1}, Count: 3, Epoch: 2, Number: 48213, Head: Hash{4}, Confirmed: 48212,
		At: 1793610000000000123, Error: time.Millisecond, Batches: []Applied{{48212, -5, 1}, {48213, 1793610000000000000, 3}},
		Mode: ModeShadow, MaxStale: 15 * time.Second, Age: 600 * time.Millisecond, Denying: true,
		Cut: 1, Running: 2, Denied: 3, Refused: 4, Foreign: 5, Repairs: 6, Diverged: 7,
		Divergence: &Divergence{Epoch: 2, Number: 48200, Compared: true, Ranges: 3, First: 0xc5},
		Canary:     &Canary{Number: 48201, At: 1793610000000000000, Denied: true},
		Unknown:    []Field{{Tag: 3, Value: []byte("y")}},
	}
}

func TestEveryMessageComesBack(t *testing.T) {
	check := func(name string, want, got any, err error) {
		t.Helper()
		if err != nil || !reflect.DeepEqual(want, got) {
			t.Errorf("%s: %+v, %v; want %+v", name, got, err, want)
		}
	}
	b, err := UnmarshalBatch(must(fullBatch().MarshalBody()))
	check("batch", fullBatch(), b, err)
	ks, err := UnmarshalKeySet(must(fullKeySet().MarshalBody()))
	check("key set", fullKeySet(), ks, err)
	c, err := UnmarshalReceipt(must(fullReceipt().MarshalBody()))
	check("receipt", fullReceipt(), c, err)
	h, err := UnmarshalHeartbeat(fullHeartbeat().MarshalBody())
	check("heartbeat", *fullHeartbeat(), h, err)
	k, err := UnmarshalClock(fullClock().MarshalBody())
	check("clock", *fullClock(), k, err)
	x, err := UnmarshalRejection(fullRejection().MarshalBody())
	check("rejection", *fullRejection(), x, err)
	o, err := UnmarshalOrder(must(fullOrder().MarshalBody()))
	check("order", fullOrder(), o, err)
	eks, err := UnmarshalKeySet(must(emergencyKeySet().MarshalBody()))
	check("key set with emergency keys", emergencyKeySet(), eks, err)
	rep, err := UnmarshalReport(must(fullReport().MarshalBody()))
	check("report", fullReport(), rep, err)
	content, err := UnmarshalTrailContent(must(fullContent().Marshal()))
	check("trail content", fullContent(), content, err)
}

func TestBodiesAreStrict(t *testing.T) {
	for _, c := range codecs() {
		t.Run(c.name, func(t *testing.T) {
			for _, body := range c.valid {
				if err := c.roundTrip(t, body); err != nil {
					t.Fatal(err)
				}
				for n := range body {
					if err := c.roundTrip(t, body[:n]); !errors.Is(err, ErrMalformed) {
						t.Fatalf("cut to %d of %d bytes: %v", n, len(body), err)
					}
				}
				if err := c.roundTrip(t, append(bytes.Clone(body), 0)); !errors.Is(err, ErrMalformed) {
					t.Errorf("with a byte more: %v", err)
				}
				// Whatever a flipped bit makes of it, it is refused or it is a
				// body of its own, never another spelling of the same.
				for i := range len(body) * 8 {
					flipped := bytes.Clone(body)
					flipped[i/8] ^= 1 << (i % 8)
					_ = c.roundTrip(t, flipped)
				}
			}
		})
	}
}

func TestUnknownFieldsOfABody(t *testing.T) {
	for _, c := range codecs() {
		t.Run(c.name, func(t *testing.T) {
			// The second sample of each ends in an empty list of fields. These tags
			// are nobody's.
			body := c.valid[1]
			with := func(fields ...byte) []byte {
				out := bytes.Clone(body[:len(body)-2])
				out = binary.BigEndian.AppendUint16(out, uint16(len(fields)))
				return append(out, fields...)
			}
			many := make([]byte, 0, 3*(maxUnknown+1))
			for i := range maxUnknown + 1 {
				many = append(many, byte(0x20+i), 0, 0)
			}
			long := append([]byte{0x21, 0x10, 0x00}, make([]byte, 0x1000)...)
			for _, tt := range []struct {
				name string
				body []byte
				want error
			}{
				{"one that is not critical is kept", with(0x21, 0, 2, 'h', 'i'), nil},
				{"as many as are kept", with(many[:3*maxUnknown]...), nil},
				{"a critical one is refused", with(0xa1, 0, 2, 'h', 'i'), ErrCritical},
				{"a critical one after another is refused", with(0x21, 0, 0, 0xa2, 0, 0), ErrCritical},
				{"out of order", with(0x22, 0, 0, 0x21, 0, 0), ErrMalformed},
				{"twice", with(0x22, 0, 0, 0x22, 0, 0), ErrMalformed},
				{"twice, once critical", with(0x22, 0, 0, 0xa2, 0, 0), ErrMalformed},
				{"too many", with(many...), ErrMalformed},
				{"too long", with(long...), ErrMalformed},
				{"cut in its header", with(0x21, 0), ErrMalformed},
				{"cut in its value", with(0x21, 0, 3, 'h', 'i'), ErrMalformed},
			} {
				if err := c.roundTrip(t, tt.body); !errors.Is(err, tt.want) {
					t.Errorf("%s: %v", tt.name, err)
				}
			}
		})
	}
}

// An exemption that is read as unknown would be ignored, and a share that is
// ignored would free everybody at once.
func TestAnEntrysFieldsAreStrict(t *testing.T) {
	body := must((&Batch{Epoch: 1, Number: 1, Entries: []Entry{{Op: OpSet, Effect: EffectStepUp, Key: testKeyOf(Shape(KindUser))}}}).MarshalBody())
	// The entry's fields and then the batch's are the last four bytes.
	with := func(fields ...byte) []byte {
		out := bytes.Clone(body[:len(body)-4])
		out = binary.BigEndian.AppendUint16(out, uint16(len(fields)))
		return append(append(out, fields...), 0, 0)
	}
	c := codecs()[1]
	if err := c.roundTrip(t, with(tagIncident, 0, 1, 'x', tagACR, 0, 1, 'y', 9, 0, 0)); err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		fields []byte
		want   error
	}{
		"an unknown critical one":     {[]byte{0x89, 0, 0}, ErrCritical},
		"a critical incident":         {[]byte{0x81, 0, 1, 'x'}, ErrMalformed},
		"an exemption, not critical":  {[]byte{3, 0, 0}, ErrMalformed},
		"a share, not critical":       {[]byte{4, 0, 2, 0, 1}, ErrMalformed},
		"a drill, not critical":       {[]byte{5, 0, 0}, ErrMalformed},
		"an empty incident":           {[]byte{1, 0, 0}, ErrMalformed},
		"an empty acr":                {[]byte{2, 0, 0}, ErrMalformed},
		"a long incident":             {append([]byte{1, 0, 65}, strings.Repeat("x", 65)...), ErrMalformed},
		"no exemptions":               {[]byte{0x83, 0, 0}, ErrMalformed},
		"half an exemption":           {append([]byte{0x83, 0, 20}, make([]byte, 20)...), ErrMalformed},
		"a share of nothing":          {[]byte{0x84, 0, 2, 0, 0}, ErrMalformed},
		"a short share":               {[]byte{0x84, 0, 1, 1}, ErrMalformed},
		"a drill that says something": {[]byte{0x85, 0, 1, 1}, ErrMalformed},
	} {
		if err := c.roundTrip(t, with(tt.fields...)); !errors.Is(err, tt.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// What cannot be parsed cannot be made either.
func TestMarshalRefusesWhatParsingWould(t *testing.T) {
	batch := func(change func(*Batch)) error {
		b := fullBatch()
		change(b)
		return second(b.MarshalBody())
	}
	receipt := func(change func(*Receipt)) error {
		c := fullReceipt()
		change(c)
		return second(c.MarshalBody())
	}
	keySet := func(change func(*KeySet)) error {
		ks := fullKeySet()
		change(ks)
		return second(ks.MarshalBody())
	}
	order := func(change func(*Order)) error {
		o := fullOrder()
		change(o)
		return second(o.MarshalBody())
	}
	badField := []Field{{Tag: 0x81}}
	for name, err := range map[string]error{
		"a batch without epoch":              batch(func(b *Batch) { b.Epoch = 0 }),
		"a batch without number":             batch(func(b *Batch) { b.Number = 0 }),
		"a batch of too many entries":        batch(func(b *Batch) { b.Entries = make([]Entry, MaxBatchEntries+1) }),
		"a batch of too many decisions":      batch(func(b *Batch) { b.Decisions = make([]DecisionRef, 65536) }),
		"decisions of more than the entries": batch(func(b *Batch) { b.Decisions[0].Count = 4 }),
		"a batch from before 1970":           batch(func(b *Batch) { b.Time = -1 }),
		"a negative horizon":                 batch(func(b *Batch) { b.Horizon = -1 }),
		"a negative deadline":                batch(func(b *Batch) { b.Deadline = -1 }),
		"an invalid entry":                   batch(func(b *Batch) { b.Entries[3].Op = 0 }),
		"a batch with a critical field":      batch(func(b *Batch) { b.Unknown = badField }),
		"a receipt without name":             receipt(func(c *Receipt) { c.Enforcer = "" }),
		"a receipt with a subject for name":  receipt(func(c *Receipt) { c.Enforcer = "a.b" }),
		"a receipt with a long name":         receipt(func(c *Receipt) { c.Enforcer = strings.Repeat("a", 65) }),
		"a receipt of too many batches":      receipt(func(c *Receipt) { c.Batches = make([]Applied, MaxApplied+1) }),
		"a receipt of an unknown mode":       receipt(func(c *Receipt) { c.Mode = 3 }),
		"a divergence with too many ranges":  receipt(func(c *Receipt) { c.Divergence.First = 254 }),
		"a divergence nowhere":               receipt(func(c *Receipt) { c.Divergence.Ranges = 0 }),
		"a divergence not compared":          receipt(func(c *Receipt) { c.Divergence.Compared = false }),
		"a receipt with a negative age":      receipt(func(c *Receipt) { c.Age = -1 }),
		"a receipt with a negative error":    receipt(func(c *Receipt) { c.Error = -1 }),
		"a receipt with a critical field":    receipt(func(c *Receipt) { c.Unknown = badField }),
		"a receipt of too many orders":       receipt(func(c *Receipt) { c.Orders = slices.Repeat([][]byte{{1}}, MaxReceiptOrders+1) }),
		"a receipt of a long order":          receipt(func(c *Receipt) { c.Orders = [][]byte{make([]byte, MaxOrderLen+1)} }),
		"a receipt of an empty order":        receipt(func(c *Receipt) { c.Orders = [][]byte{{}} }),
		"a key set without version":          keySet(func(k *KeySet) { k.Version = 0 }),
		"a key set without epoch":            keySet(func(k *KeySet) { k.Epoch = 0 }),
		"a key set that never began":         keySet(func(k *KeySet) { k.Issued = -1 }),
		"a key set that has ended":           keySet(func(k *KeySet) { k.NotAfter = k.Issued }),
		"a bad tenant name":                  keySet(func(k *KeySet) { k.Tenants[0].Name = "A" }),
		"tenant zero":                        keySet(func(k *KeySet) { k.Tenants[0].ID = 0 }),
		"a tenant's number twice":            keySet(func(k *KeySet) { k.Tenants[1].ID = 1 }),
		"a tenant's name twice":              keySet(func(k *KeySet) { k.Tenants[1].Name = "acme" }),
		"too many tenants":                   keySet(func(k *KeySet) { k.Tenants = make([]Tenant, MaxTenants+1) }),
		"too many keys":                      keySet(func(k *KeySet) { k.Keys = make([]SigningKey, MaxKeys+1) }),
		"a short public key":                 keySet(func(k *KeySet) { k.Keys[0].Public = k.Keys[0].Public[1:] }),
		"a key twice":                        keySet(func(k *KeySet) { k.Keys[1].Public = k.Keys[0].Public }),
		"a key's tenants out of order":       keySet(func(k *KeySet) { k.Keys[1].Tenants = []TenantID{7, 1} }),
		"a key's tenant twice":               keySet(func(k *KeySet) { k.Keys[1].Tenants = []TenantID{7, 7} }),
		"a key for the fabric's own":         keySet(func(k *KeySet) { k.Keys[1].Tenants = []TenantID{0, 7} }),
		"a last number without withdrawal":   keySet(func(k *KeySet) { k.Keys[0].LastNumber = 1 }),
		"a key set with a critical field":    keySet(func(k *KeySet) { k.Unknown = badField }),
		"orders of a writer":                 keySet(func(k *KeySet) { k.Keys[0].Orders = 1 }),
		"too many orders of a key":           keySet(func(k *KeySet) { k.Keys[3].Orders = MaxOrders + 1 }),
		"a bus key without orders":           keySet(func(k *KeySet) { k.Keys[3].Bus = testPublic(8) }),
		"a short bus key":                    keySet(func(k *KeySet) { k.Keys[3].Orders, k.Keys[3].Bus = 1, testPublic(8)[1:] }),
		"too many orders in all": keySet(func(k *KeySet) {
			for i := range MaxKeySetOrders/MaxOrders + 1 {
				k.Keys = append(k.Keys, SigningKey{Public: testPublic(byte(100 + i)), Use: UseEmergency, Orders: MaxOrders})
			}
		}),
		"an order without number":    order(func(o *Order) { o.Number = 0 }),
		"an order beyond every key":  order(func(o *Order) { o.Number = MaxOrders + 1 }),
		"an order of the books":      order(func(o *Order) { o.Tenant = FabricTenant }),
		"an order of no time":        order(func(o *Order) { o.Time = 0 }),
		"an order without incident":  order(func(o *Order) { o.Incident = "" }),
		"an order without reason":    order(func(o *Order) { o.Reason = "" }),
		"an order of a long reason":  order(func(o *Order) { o.Reason = strings.Repeat("r", MaxOrderReasonLen+1) }),
		"an order of two lines":      order(func(o *Order) { o.Reason = "a\nb" }),
		"an order of critical field": order(func(o *Order) { o.Unknown = badField }),
	} {
		if !errors.Is(err, ErrFrame) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestTheLargestBatchFitsAFrame(t *testing.T) {
	b := &Batch{Epoch: 1, Number: 1}
	for i := range MaxBatchEntries {
		e := Entry{Op: OpSet, Effect: EffectStepUp, Key: testKeyOf(ShapeUserAgentTool), Incident: strings.Repeat("i", MaxIncidentLen), ACR: strings.Repeat("a", 64), Drill: true}
		for j := range MaxExcept {
			e.Except = append(e.Except, Key{7, Shape(KindUser), Digest{1, byte(j)}})
		}
		b.Entries = append(b.Entries, e)
		b.Decisions = append(b.Decisions, DecisionRef{DecisionID{byte(i), byte(i >> 8)}, 1})
	}
	frame, err := Seal(TypeBatch, must(b.MarshalBody()), testKey(1))
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d bytes of %d", len(frame), MaxFrameLen)
	if _, err := UnmarshalBatch(frame[frameHeader : len(frame)-64]); err != nil {
		t.Error(err)
	}
}

// A claimed count costs nothing: a body of a few bytes makes parsing allocate
// no more than a few bytes.
func TestAClaimedCountAllocatesNothing(t *testing.T) {
	at := func(body []byte, offset int, count uint16) []byte {
		out := bytes.Clone(body[:offset])
		return binary.BigEndian.AppendUint16(out, count)
	}
	for _, c := range codecs() {
		// The counts follow 72 bytes of a batch (and no decisions), 48 of a key set
		// (and no tenants), and 99 of the shortest receipt.
		offsets := map[FrameType][]int{TypeBatch: {72, 74}, TypeKeySet: {48, 50}, TypeReceipt: {99}, 0: {48, 50}}[c.typ]
		for _, offset := range offsets {
			for _, count := range []uint16{1, 256, MaxBatchEntries, MaxTenants, 65535} {
				body := at(c.valid[1], offset, count)
				var before, after runtime.MemStats
				runtime.ReadMemStats(&before)
				_, err := c.again(body)
				runtime.ReadMemStats(&after)
				if !errors.Is(err, ErrMalformed) || !strings.Contains(err.Error(), "count") {
					t.Fatalf("%s: count %d at %d: %v", c.name, count, offset, err)
				}
				if n := after.TotalAlloc - before.TotalAlloc; n > 4096 {
					t.Errorf("%s: count %d at %d: %d bytes allocated for %d", c.name, count, offset, n, len(body))
				}
			}
		}
	}
}

func drawBatch(t *rapid.T) *Batch {
	b := &Batch{
		Epoch: rapid.Uint64Min(1).Draw(t, "epoch"), Number: rapid.Uint64Min(1).Draw(t, "number"),
		Time: Instant(rapid.Int64Min(0).Draw(t, "time")), Deadline: Instant(rapid.Int64Min(0).Draw(t, "deadline")), Horizon: Instant(rapid.Int64Min(0).Draw(t, "horizon")),
	}
	shapes := Conjunctions()
	for _, k := range Kinds() {
		shapes = append(shapes, Shape(k))
	}
	text := rapid.StringMatching(`[a-zA-Z0-9 é-]{0,20}`)
	for range rapid.IntRange(0, 8).Draw(t, "entries") {
		e := Entry{
			Op: rapid.SampledFrom([]Op{OpSet, OpLift}).Draw(t, "op"), Effect: Effect(rapid.IntRange(1, 4).Draw(t, "effect")),
			Reason: Reason(rapid.Byte().Draw(t, "reason")), Key: testKeyOf(rapid.SampledFrom(shapes).Draw(t, "shape")),
			IssuedBefore: Instant(rapid.Int64Range(0, 3).Draw(t, "before")), Expires: Instant(rapid.Int64Range(0, 3).Draw(t, "expires")),
			Incident: text.Draw(t, "incident"), ACR: text.Draw(t, "acr"), Share: rapid.Uint16Range(0, 3).Draw(t, "share"), Drill: rapid.Bool().Draw(t, "drill"),
		}
		for range rapid.IntRange(0, 2).Draw(t, "exempt") {
			e.Except = append(e.Except, testKeyOf(rapid.SampledFrom(shapes).Draw(t, "except")))
		}
		e.Except = SortKeys(e.Except)
		b.Entries = append(b.Entries, e)
	}
	return b
}

// Validate, MarshalBody and UnmarshalBatch agree on what a batch may be.
func TestBatchesMarshalExactlyWhenValid(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		b := drawBatch(t)
		var invalid error
		for i := range b.Entries {
			invalid = errors.Join(invalid, b.Entries[i].Validate())
		}
		body, err := b.MarshalBody()
		if (err == nil) != (invalid == nil) {
			t.Fatalf("Validate says %v, MarshalBody %v", invalid, err)
		}
		if err != nil {
			return
		}
		got, err := UnmarshalBatch(body)
		if err != nil {
			t.Fatal(err)
		}
		if out, err := got.MarshalBody(); err != nil || !bytes.Equal(out, body) || len(got.Entries) != len(b.Entries) {
			t.Fatalf("%+v came back as %+v, %v", b, got, err)
		}
	})
}

func TestFrames(t *testing.T) {
	key, body := testKey(1), []byte("body")
	frame, err := Seal(TypeBatch, body, key)
	if err != nil {
		t.Fatal(err)
	}
	f, err := ParseFrame(frame)
	if err != nil || f.Type != TypeBatch || f.Key != KeyIDOf(testPublic(1)) || !bytes.Equal(f.Body, body) {
		t.Fatalf("%+v, %v", f, err)
	}
	if err := f.Verify(testPublic(1)); err != nil {
		t.Fatal(err)
	}
	if err := f.Verify(testPublic(2)); !errors.Is(err, ErrSignature) {
		t.Errorf("another key: %v", err)
	}
	if err := f.Verify(nil); !errors.Is(err, ErrSignature) {
		t.Errorf("no key: %v", err)
	}
	t.Run("every bit counts", func(t *testing.T) {
		for i := range len(frame) * 8 {
			flipped := bytes.Clone(frame)
			flipped[i/8] ^= 1 << (i % 8)
			f, err := ParseFrame(flipped)
			if err == nil {
				err = f.Verify(testPublic(1))
			}
			if !errors.Is(err, ErrFrame) {
				t.Fatalf("bit %d can be flipped", i)
			}
		}
	})
	t.Run("the hash is of the content, not of the signature", func(t *testing.T) {
		resigned := bytes.Clone(frame)
		resigned[len(resigned)-1] ^= 1
		g, err := ParseFrame(resigned)
		if err != nil || g.Hash() != f.Hash() {
			t.Errorf("hash %x, %v; want %x", g.Hash(), err, f.Hash())
		}
		other, _ := Seal(TypeHeartbeat, body, key)
		if g, err = ParseFrame(other); err != nil || g.Hash() == f.Hash() {
			t.Error("the type is not in the hash")
		}
	})
	for name, tt := range map[string]struct {
		frame []byte
		want  error
	}{
		"nothing":           {nil, ErrMalformed},
		"something else":    {[]byte("HTTP/1.1 200 OK"), ErrMalformed},
		"a later version":   {append([]byte("ILK\x02"), frame[4:]...), ErrVersion},
		"version zero":      {append([]byte("ILK\x00"), frame[4:]...), ErrVersion},
		"a version alone":   {[]byte("ILK\x02"), ErrVersion},
		"a header alone":    {frame[:frameHeader], ErrMalformed},
		"cut":               {frame[:len(frame)-1], ErrMalformed},
		"with a byte more":  {append(bytes.Clone(frame), 0), ErrMalformed},
		"a huge claim":      {append(append(bytes.Clone(frame[:13]), 0xff, 0xff, 0xff, 0xff), frame[17:]...), ErrMalformed},
		"longer than bound": {append(bytes.Clone(frame), make([]byte, MaxFrameLen)...), ErrMalformed},
	} {
		if _, err := ParseFrame(tt.frame); !errors.Is(err, tt.want) || !errors.Is(err, ErrFrame) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := Seal(TypeBatch, make([]byte, MaxFrameLen), key); !errors.Is(err, ErrMalformed) {
		t.Errorf("a frame beyond the bound: %v", err)
	}
	if _, err := Seal(TypeBatch, make([]byte, MaxFrameLen-frameHeader-64), key); err != nil {
		t.Errorf("a frame at the bound: %v", err)
	}
	for _, short := range [][]byte{nil, key[:32]} {
		if _, err := Seal(TypeBatch, body, short); !errors.Is(err, ErrInvalid) {
			t.Errorf("a key of %d bytes: %v", len(short), err)
		}
	}
}

// A signature made for something else, with the same key, is none here.
func TestASignatureIsBoundToItsContext(t *testing.T) {
	frame, _ := Seal(TypeBatch, []byte("body"), testKey(1))
	content := frame[:len(frame)-64]
	bare := append(bytes.Clone(content), must(testKey(1).Sign(nil, content, noHash))...)
	f, err := ParseFrame(bare)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Verify(testPublic(1)); !errors.Is(err, ErrSignature) {
		t.Errorf("a signature without the context is accepted: %v", err)
	}

	named := bytes.Clone(content)
	other := KeyIDOf(testPublic(2))
	copy(named[5:], other[:])
	named = append(named, must(testKey(1).Sign(nil, append([]byte(signContext), named...), noHash))...)
	if f, err = ParseFrame(named); err != nil {
		t.Fatal(err)
	}
	if err := f.Verify(testPublic(1)); !errors.Is(err, ErrSignature) {
		t.Errorf("a frame that names another signer is accepted: %v", err)
	}
}

func fuzzCodec(f *testing.F, typ FrameType) {
	for _, c := range codecs() {
		if c.typ != typ {
			continue
		}
		for _, body := range c.valid {
			f.Add(body)
		}
		f.Fuzz(func(t *testing.T, body []byte) { _ = c.roundTrip(t, body) })
	}
}

func FuzzUnmarshalKeySet(f *testing.F)    { fuzzCodec(f, TypeKeySet) }
func FuzzUnmarshalBatch(f *testing.F)     { fuzzCodec(f, TypeBatch) }
func FuzzUnmarshalHeartbeat(f *testing.F) { fuzzCodec(f, TypeHeartbeat) }
func FuzzUnmarshalClock(f *testing.F)     { fuzzCodec(f, TypeClock) }
func FuzzUnmarshalRejection(f *testing.F) { fuzzCodec(f, TypeRejection) }
func FuzzUnmarshalReceipt(f *testing.F)   { fuzzCodec(f, TypeReceipt) }
func FuzzUnmarshalReport(f *testing.F)    { fuzzCodec(f, TypeReport) }
func FuzzUnmarshalOrder(f *testing.F)     { fuzzCodec(f, TypeOrder) }
func FuzzUnmarshalAgents(f *testing.F)    { fuzzCodec(f, TypeAgents) }
func FuzzUnmarshalTrail(f *testing.F)     { fuzzCodec(f, 0) }

func FuzzParseFrame(f *testing.F) {
	for _, c := range codecs() {
		frame, err := Seal(c.typ, c.valid[0], testKey(1))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(frame)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		frame, err := ParseFrame(b)
		if err != nil {
			if !errors.Is(err, ErrFrame) {
				t.Fatalf("%v does not wrap ErrFrame", err)
			}
			return
		}
		if got := append(bytes.Clone(frame.content), frame.signature...); !bytes.Equal(got, b) {
			t.Fatalf("%x has the content and signature %x", b, got)
		}
		// With the key at hand, the same content is the same frame.
		if err := frame.Verify(testPublic(1)); err == nil {
			if again, err := Seal(frame.Type, frame.Body, testKey(1)); err != nil || !bytes.Equal(again, b) {
				t.Fatalf("%x seals to %x, %v", b, again, err)
			}
		}
	})
}

func TestPeekBatchReadsWhatTheBatchSays(t *testing.T) {
	body := must(fullBatch().MarshalBody())
	if epoch, number, err := PeekBatch(body); epoch != 2 || number != 48213 || err != nil {
		t.Errorf("%d, %d, %v", epoch, number, err)
	}
	if _, _, err := PeekBatch(body[:15]); !errors.Is(err, ErrMalformed) {
		t.Errorf("cut short: %v", err)
	}
}

// TestADivergenceIsStrict: what an enforcer says of a divergence has one spelling.
func TestADivergenceIsStrict(t *testing.T) {
	body := must((&Receipt{Enforcer: "e"}).MarshalBody())
	with := func(value ...byte) []byte {
		out := bytes.Clone(body[:len(body)-2])
		out = binary.BigEndian.AppendUint16(out, uint16(len(value)+3))
		out = append(out, tagDivergence, 0, byte(len(value)))
		return append(out, value...)
	}
	at := make([]byte, 16)
	for name, tt := range map[string]struct {
		value []byte
		ok    bool
	}{
		"not compared":              {append(at, 0, 0, 0, 0), true},
		"the authority's":           {append(at, 1, 0, 0, 0), true},
		"all of them":               {append(at, 1, 1, 0, 0), true},
		"the last":                  {append(at, 1, 0, 1, 255), true},
		"more than there are":       {append(at, 1, 1, 1, 0), false},
		"beyond the last":           {append(at, 1, 0, 2, 255), false},
		"a first of none":           {append(at, 1, 0, 0, 7), false},
		"ranges without comparison": {append(at, 0, 0, 1, 0), false},
		"another flag":              {append(at, 2, 0, 1, 0), false},
		"cut short":                 {append(at, 1, 0, 1), false},
		"a byte too many":           {append(at, 1, 0, 1, 0, 0), false},
	} {
		r, err := UnmarshalReceipt(with(tt.value...))
		if tt.ok != (err == nil) || err != nil && !errors.Is(err, ErrMalformed) || err == nil && (r.Divergence == nil || len(r.Unknown) > 0) {
			t.Errorf("%s: %+v, %v", name, r, err)
		}
	}
}
