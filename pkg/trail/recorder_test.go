package trail

import (
	"bytes"
	"context"
	"crypto/ecdh"
	"crypto/ed25519"
	"errors"
	"fmt"
	"reflect"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/interlock-fabric/interlock/pkg/session"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// bus is a publisher that can be away, and keeps what it took.
type bus struct {
	mu     sync.Mutex
	away   error
	hangs  chan struct{} // when set, Report waits for it or its context
	frames [][]byte
	tried  [][]byte
}

func (b *bus) Report(ctx context.Context, frame []byte) error {
	b.mu.Lock()
	away, hangs := b.away, b.hangs
	b.tried = append(b.tried, frame)
	b.mu.Unlock()
	if hangs != nil {
		select {
		case <-hangs:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	if away != nil {
		return away
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.frames = append(b.frames, bytes.Clone(frame))
	return nil
}

func (b *bus) set(away error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.away = away
}

func (b *bus) taken() [][]byte {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.frames
}

// enforcer is where the enforcer is, and whom it seals to.
type enforcer struct {
	mu sync.Mutex
	ks *session.KeySet
}

func (e *enforcer) KeySet() *session.KeySet {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.ks
}

func (e *enforcer) set(keys ...*ecdh.PrivateKey) {
	ks := &session.KeySet{Version: 1}
	for _, k := range keys {
		ks.Keys = append(ks.Keys, session.SigningKey{Public: k.PublicKey().Bytes(), Use: session.UseAudit})
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.ks = ks
}

func (e *enforcer) Position() (uint64, uint64) { return 2, 7 }

type fixture struct {
	*Recorder
	t      testing.TB
	bus    bus
	enf    enforcer
	key    *ecdh.PrivateKey
	signer ed25519.PrivateKey
	secret *session.TenantSecret
}

func newFixture(t testing.TB, o Options) *fixture {
	t.Helper()
	key, err := ecdh.X25519().NewPrivateKey(bytes.Repeat([]byte{1}, 32))
	must(t, err)
	secret, err := session.NewTenantSecret(1, "acme", bytes.Repeat([]byte{1}, 32))
	must(t, err)
	f := &fixture{t: t, key: key, signer: ed25519.NewKeyFromSeed(bytes.Repeat([]byte{2}, 32)), secret: secret}
	f.enf.set(key)
	o.Enrollment = &session.Enrollment{Enforcer: "eu-1", ReceiptKey: f.signer}
	o.Enforcer, o.Publisher = &f.enf, &f.bus
	f.Recorder, err = New(o)
	must(t, err)
	t.Cleanup(func() { f.Close() })
	return f
}

func (f *fixture) caller(user string) *session.Prepared {
	f.t.Helper()
	p, err := f.secret.Prepare(session.Identity{
		Tenant: "acme", Issuer: "https://id.example", User: user, Session: session.SessionRef{ID: "s-" + user}, Token: "t-" + user,
		Actors: []session.Actor{{ID: "spiffe://corp/bot"}}, Client: "cli", Transaction: "txn-1",
	})
	must(f.t, err)
	return p
}

func revoked(seq uint64) error {
	return &session.DeniedError{Err: session.ErrRevoked, Denial: session.Denial{
		Effect: session.EffectRevoked, Reason: session.ReasonStolenToken, Incident: "INC-142", Seq: seq,
	}}
}

func (f *fixture) event(p *session.Prepared, tool string, err error) *Event {
	return &Event{
		Mark: f.Start(), Caller: p, Method: "tools/call", Call: session.Call{Tool: tool, Audience: "https://tools.example/mcp"},
		Arguments: []byte(`{"repo":"x"}`), Err: err,
		Traceparent: "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
	}
}

// open verifies, chains and unseals what the bus took.
func (f *fixture) open(keys ...*ecdh.PrivateKey) []*session.TrailContent {
	f.t.Helper()
	if len(keys) == 0 {
		keys = []*ecdh.PrivateKey{f.key}
	}
	var out []*session.TrailContent
	var prev session.Hash
	for i, b := range f.bus.taken() {
		if len(b) > session.MaxReportLen {
			f.t.Fatalf("report of %d bytes", len(b))
		}
		fr, err := session.ParseFrame(b)
		must(f.t, err)
		must(f.t, fr.Verify(f.signer.Public().(ed25519.PublicKey)))
		r, err := session.UnmarshalReport(fr.Body)
		must(f.t, err)
		if fr.Type != session.TypeReport || r.Enforcer != "eu-1" || r.Count != uint64(i+1) || r.Prev != prev {
			f.t.Fatalf("report %d: %d after %x", i, r.Count, r.Prev)
		}
		prev = fr.Hash()
		var c *session.TrailContent
		for _, k := range keys {
			if session.KeyIDOf(k.PublicKey().Bytes()) == r.Key {
				c, err = r.Unseal(k)
				must(f.t, err)
			}
		}
		if c == nil {
			f.t.Fatal("sealed to another key")
		}
		out = append(out, c)
	}
	return out
}

func (f *fixture) records() (out []session.TrailRecord) {
	f.t.Helper()
	for _, c := range f.open() {
		out = append(out, c.Records...)
	}
	return out
}

// TestRecordSaysWhatWasDecided holds a record to all that it shall say, and the
// wire to saying none of it.
func TestRecordSaysWhatWasDecided(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t, Options{Sample: 1})
		p := f.caller("alice")
		e := f.event(p, "delete_repo", revoked(6))
		time.Sleep(3 * time.Millisecond)
		f.Record(e)
		f.Record(f.event(p, "read_repo", nil))
		f.Record(&Event{Err: &session.DeniedError{Err: session.ErrNoIdentity}})
		f.Record(&Event{Err: errors.New("an error of somebody's, with a secret")})
		f.Record(&Event{Err: &session.DeniedError{Err: session.ErrExpired}, Method: "a\n" + strings.Repeat("m", 1000), Call: session.Call{Tool: "\xff"}})
		must(t, f.Close())
		got := f.records()
		if len(got) != 5 {
			t.Fatalf("%d records", len(got))
		}
		by := map[string]session.TrailRecord{}
		for _, r := range got {
			by[r.Decision.String()+" "+r.Cause.String()] = r
		}
		r := by["denied revoked"]
		want := session.TrailRecord{
			Decision: session.DecisionDenied, Cause: session.CauseRevoked, Effect: session.EffectRevoked, Reason: session.ReasonStolenToken,
			Count: 1, First: r.First, Last: r.First, Latency: 3 * time.Millisecond, Epoch: 2, Checked: 7, Sequence: 6,
			Caller: session.Caller{
				Tenant: "acme", Issuer: "https://id.example", User: "alice", Session: "s-alice", Client: "cli",
				Actors: []session.Actor{{ID: "spiffe://corp/bot"}},
			},
			Token: "t-alice", Method: "tools/call", Tool: "delete_repo", Audience: "https://tools.example/mcp",
			Arguments: f.secret.ArgumentDigest([]byte(`{"repo":"x"}`)), Transaction: "txn-1", Incident: "INC-142",
			Trace: session.TraceContext{
				TraceID: [16]byte{0x0a, 0xf7, 0x65, 0x19, 0x16, 0xcd, 0x43, 0xdd, 0x84, 0x48, 0xeb, 0x21, 0x1c, 0x80, 0x31, 0x9c},
				Parent:  [8]byte{0xb7, 0xad, 0x6b, 0x71, 0x69, 0x20, 0x33, 0x31},
			},
		}
		if !reflect.DeepEqual(r, want) {
			t.Errorf("got  %+v\nwant %+v", r, want)
		}
		if r := by["allowed "]; r.Tool != "read_repo" || r.Count != 1 {
			t.Errorf("allowed: %+v", r)
		}
		if r := by["denied no_identity"]; r.Caller.Tenant != "" || r.Epoch != 0 {
			t.Errorf("nobody: %+v", r)
		}
		if r := by["denied expired"]; len(r.Method) > session.MaxReportText || !strings.HasPrefix(r.Method, "a\uFFFDmmm") || r.Tool != "\uFFFD" {
			t.Errorf("a long method: %+v", r)
		}
		if r := by["denied denied"]; r.Detail != "" {
			t.Errorf("an unknown error's text is kept: %+v", r)
		}
		for _, frame := range f.bus.taken() {
			for _, s := range []string{"alice", "delete_repo", "corp/bot", "INC-142", "acme", "t-alice", "repo\":", "secret"} {
				if bytes.Contains(frame, []byte(s)) {
					t.Errorf("%q can be read on the bus", s)
				}
			}
		}
		sum := f.Stats()
		if sum.Calls != 5 || sum.Denied != 4 || sum.Sampled != 1 || sum.Dropped != 0 || sum.Folded != 0 {
			t.Errorf("%+v", sum)
		}
		if c := f.open(); c[len(c)-1].Totals != sum.TrailTotals {
			t.Errorf("reported %+v, %+v", c[len(c)-1].Totals, sum)
		}
	})
}

// TestIdenticalDenialsAreOne: a caller that tries again and again makes one
// record with a count, at once, and then one each half minute.
func TestIdenticalDenialsAreOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t, Options{})
		p, q := f.caller("alice"), f.caller("bob")
		began := session.InstantOf(time.Now())
		f.Record(f.event(p, "x", revoked(6)))
		time.Sleep(tick + time.Millisecond)
		synctest.Wait()
		if got := f.records(); len(got) != 1 || got[0].Count != 1 {
			t.Fatalf("the first: %+v", got)
		}
		// A renewed token is the same caller; another tool, decision or caller
		// is not the same denial.
		id := p.Identity()
		id.Token = "renewed"
		renewed, err := f.secret.Prepare(id)
		must(t, err)
		for i := range 1000 {
			time.Sleep(20 * time.Millisecond)
			f.Record(f.event([]*session.Prepared{p, renewed}[i%2], "x", revoked(6)))
		}
		last := session.InstantOf(time.Now())
		f.Record(f.event(p, "y", revoked(6)))
		f.Record(f.event(p, "x", revoked(7)))
		f.Record(f.event(q, "x", revoked(6)))
		cut := f.event(q, "x", revoked(6))
		cut.Cut = true
		f.Record(cut)
		f.Record(f.event(q, "x", &session.DeniedError{Err: session.ErrStale}))
		time.Sleep(time.Minute)
		synctest.Wait()
		got := f.records()
		if len(got) != 7 {
			t.Fatalf("%d records: %+v", len(got), got)
		}
		var sum uint64
		repeated := 0
		for _, r := range got {
			sum += r.Count
			if r.Count == 1000 {
				repeated++
				if r.First <= began || r.Last != last {
					t.Errorf("from %s to %s, want to %s", r.First, r.Last, last)
				}
			}
		}
		if sum != 1006 || repeated != 1 {
			t.Errorf("%d denials in all, %d times a thousand", sum, repeated)
		}
	})
}

// TestSamplesGiveWayFirst: while the bus is away, the oldest samples give way and
// are counted; of the denials none is missing afterwards.
func TestSamplesGiveWayFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t, Options{Sample: 1, MaxSamples: 64, MaxDenials: 256, SightEvery: -1})
		f.bus.set(errors.New("away"))
		p := f.caller("alice")
		f.Record(f.event(p, "first", nil)) // gets into the report that cannot be sent
		time.Sleep(time.Second)
		const calls, denials = 1000, 100
		for i := range calls {
			f.Record(f.event(p, fmt.Sprint("tool-", i), nil))
			if i < denials {
				f.Record(f.event(f.caller(fmt.Sprint("user-", i)), "x", revoked(6)))
			}
		}
		time.Sleep(time.Minute)
		if s := f.Stats(); s.Samples != 64 || s.Dropped != calls-64 || s.Denials != denials || s.Failures == 0 || s.Reports != 0 {
			t.Fatalf("%+v", s)
		}
		// Whatever was tried was the same report, again and again.
		f.bus.mu.Lock()
		for _, b := range f.bus.tried {
			if !bytes.Equal(b, f.bus.tried[0]) {
				t.Error("another report was begun before the first was taken")
			}
		}
		f.bus.mu.Unlock()
		f.bus.set(nil)
		time.Sleep(time.Minute)
		synctest.Wait()
		users, tools := map[string]uint64{}, map[string]bool{}
		for _, r := range f.records() {
			if r.Decision == session.DecisionDenied {
				users[r.Caller.User] += r.Count
			} else {
				tools[r.Tool] = true
			}
		}
		if len(users) != denials {
			t.Errorf("%d of %d denials", len(users), denials)
		}
		for i := range 64 {
			if tool := fmt.Sprint("tool-", calls-64+i); !tools[tool] {
				t.Errorf("%s, one of the newest, is missing", tool)
			}
		}
		if len(tools) != 65 || !tools["first"] {
			t.Errorf("%d samples", len(tools))
		}
		c := f.open()
		if last := c[len(c)-1].Totals; last.Dropped != calls-64 || last.Sampled != calls+1 || last.Folded != 0 {
			t.Errorf("reported %+v", last)
		}
	})
}

// TestOneCallerCannotDisplaceOthers: a caller that asks for ever new tools has a
// few records, then a count; the denials of others stay whole, and all are
// counted.
func TestOneCallerCannotDisplaceOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t, Options{MaxDenials: 160, SightEvery: -1})
		f.bus.set(errors.New("away"))
		hostile := f.caller("mallory")
		const flood, others = 5000, 50
		for i := range flood {
			f.Record(f.event(hostile, fmt.Sprint("tool-", i), revoked(6)))
			if i%100 == 0 {
				f.Record(f.event(f.caller(fmt.Sprint("user-", i/100)), "x", revoked(6)))
			}
		}
		if s := f.Stats(); s.Denials != 10+others+1 || s.Folded != flood-10 {
			t.Errorf("%+v", s)
		}
		f.bus.set(nil)
		time.Sleep(time.Minute)
		synctest.Wait()
		by := map[string]uint64{}
		for _, r := range f.records() {
			by[r.Caller.User] += r.Count
		}
		if by["mallory"] != 10 || by[""] != flood-10 || len(by) != others+2 {
			t.Errorf("%v", by)
		}
		// What was reported gives way to what is new.
		for i := range 1000 {
			f.Record(f.event(f.caller(fmt.Sprint("late-", i)), "x", revoked(6)))
			time.Sleep(tick / 4)
		}
		synctest.Wait()
		if s := f.Stats(); s.Folded != flood-10 {
			t.Errorf("%d denials were folded while there was room to make", s.Folded-(flood-10))
		}
	})
}

// TestMemoryIsBounded: with the bus dead, and everything as long and as different
// as can be, the recorder holds no more than its options say.
func TestMemoryIsBounded(t *testing.T) {
	const bound = 128
	f := newFixture(t, Options{Sample: 1, MaxSamples: bound, MaxDenials: bound, MaxCallers: bound})
	f.bus.set(errors.New("away"))
	heap := func() uint64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	long := func(i int) string { return fmt.Sprint(i, strings.Repeat("x", 900)) }
	before := heap()
	for i := range 20 * bound {
		id := session.Identity{
			Tenant: "acme", Issuer: long(i), User: long(i), Client: long(i), Token: long(i), Session: session.SessionRef{ID: long(i)},
			Actors: []session.Actor{{ID: long(i)}, {ID: long(-i)}}, Roles: []string{long(i)},
		}
		p, err := f.secret.Prepare(id)
		must(t, err)
		f.Record(f.event(p, strings.Repeat("t", 200)+fmt.Sprint(i), nil))
		e := f.event(p, "x", revoked(uint64(i)))
		e.Method, e.Arguments = long(i), make([]byte, 1<<16)
		f.Record(e)
	}
	grown := int64(heap()) - int64(before)
	if limit := int64(3*bound+1) * session.MaxReportItemLen / 2; grown > limit {
		t.Errorf("%d bytes more, at most %d", grown, limit)
	}
	s := f.Stats()
	t.Logf("%d bytes for %d samples, %d denials, %d callers at most", grown, s.Samples, s.Denials, bound)
	if s.Samples > bound || s.Denials > bound+1 || s.Dropped == 0 || s.Folded == 0 || s.Untracked == 0 {
		t.Errorf("%+v", s)
	}
}

// TestAllowPathWaitsForNobody: an allowed call, sampled or not, goes on while
// somebody holds the lock of the denials, and the bus hangs.
func TestAllowPathWaitsForNobody(t *testing.T) {
	for _, share := range []float64{0, 1} {
		f := newFixture(t, Options{Sample: share})
		f.bus.hangs = make(chan struct{})
		p := f.caller("alice")
		f.denials.mu.Lock()
		done := make(chan struct{})
		go func() {
			defer close(done)
			for range 10000 {
				f.Record(f.event(p, "x", nil))
			}
		}()
		select {
		case <-done:
		case <-time.After(10 * time.Second):
			t.Error("Record waits for a lock")
		}
		f.denials.mu.Unlock()
		<-done
		close(f.bus.hangs)
	}
}

func TestUnsampledCallAllocatesNothing(t *testing.T) {
	f := newFixture(t, Options{Sample: 0})
	p := f.caller("alice")
	args := []byte(`{"repo":"x"}`)
	run := func() {
		f.Record(&Event{
			Mark: f.Start(), Caller: p, Method: "tools/call", Call: session.Call{Tool: "x"}, Arguments: args,
			Traceparent: "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
		})
	}
	if n := testing.AllocsPerRun(1000, run); n != 0 {
		t.Errorf("%v allocations", n)
	}
	var none *Recorder
	if n := testing.AllocsPerRun(1000, func() { none.Record(&Event{Mark: none.Start(), Caller: p}) }); n != 0 {
		t.Errorf("%v allocations without a recorder", n)
	}
}

// TestBusThatHangs: a publisher that does not return holds up nobody but the
// recorder, which tries the same report again.
func TestBusThatHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t, Options{})
		f.bus.hangs = make(chan struct{})
		f.Record(f.event(f.caller("alice"), "x", revoked(1)))
		time.Sleep(10 * time.Second)
		synctest.Wait()
		f.bus.mu.Lock()
		tried := len(f.bus.tried)
		f.bus.mu.Unlock()
		if tried < 3 || len(f.bus.taken()) != 0 {
			t.Fatalf("tried %d times", tried)
		}
		close(f.bus.hangs)
		time.Sleep(time.Second)
		synctest.Wait()
		if got := f.records(); len(got) != 1 {
			t.Errorf("%d records", len(got))
		}
	})
}

// TestSealedToTheNewestKey: without a key nothing is sent and nothing lost; with
// a new one, it is that which counts.
func TestSealedToTheNewestKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t, Options{})
		f.enf.set()
		p := f.caller("alice")
		f.Record(f.event(p, "x", revoked(1)))
		time.Sleep(time.Minute)
		synctest.Wait()
		if len(f.bus.taken()) != 0 {
			t.Fatal("sealed to nobody")
		}
		f.enf.set(f.key)
		time.Sleep(time.Minute)
		other, err := ecdh.X25519().NewPrivateKey(bytes.Repeat([]byte{7}, 32))
		must(t, err)
		f.enf.set(f.key, other)
		f.Record(f.event(p, "y", revoked(1)))
		time.Sleep(time.Minute)
		synctest.Wait()
		c := f.open(f.key, other)
		if len(c) < 2 || c[0].Records[0].Tool != "x" {
			t.Fatalf("%d reports", len(c))
		}
		fr, err := session.ParseFrame(f.bus.taken()[len(c)-1])
		must(t, err)
		r, err := session.UnmarshalReport(fr.Body)
		must(t, err)
		if r.Key != session.KeyIDOf(other.PublicKey().Bytes()) {
			t.Error("sealed to the old key")
		}
	})
}

// TestSightings: everybody who was seen is reported, allowed and unsampled calls
// included; those for whom there was no room are counted.
func TestSightings(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t, Options{})
		alice, bob := f.caller("alice"), f.caller("bob")
		first := session.InstantOf(time.Now())
		for range 10 {
			f.Record(f.event(alice, "x", nil))
			time.Sleep(time.Second)
		}
		last := session.InstantOf(time.Now())
		f.Record(f.event(alice, "x", revoked(1)))
		f.Record(f.event(bob, "x", nil))
		time.Sleep(5 * time.Minute)
		synctest.Wait()
		seen := map[string]session.Sighting{}
		n := 0
		for _, c := range f.open() {
			for _, s := range c.Sightings {
				seen[s.Caller.User] = s
				n++
			}
		}
		a := seen["alice"]
		if n != 2 || a.First != first || a.Last != last || a.Calls != 11 || a.Denied != 1 || seen["bob"].Calls != 1 {
			t.Errorf("%d sightings: %+v", n, seen)
		}
		if a.Caller.Session != "s-alice" || a.Caller.Actors[0].ID != "spiffe://corp/bot" || a.Caller.Issuer != "https://id.example" || a.Caller.Client != "cli" {
			t.Errorf("%+v", a.Caller)
		}
		// Seen again: the totals go on.
		f.Record(f.event(bob, "x", nil))
		must(t, f.Close())
		c := f.open()
		if s := c[len(c)-1].Sightings; len(s) != 1 || s[0].Calls != 2 || s[0].First != seen["bob"].First {
			t.Errorf("again: %+v", s)
		}
	})
}

func TestMoreCallersThanPlaces(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t, Options{MaxCallers: 64})
		for i := range 1000 {
			f.Record(f.event(f.caller(fmt.Sprint("user-", i)), "x", nil))
			time.Sleep(time.Millisecond)
		}
		must(t, f.Close())
		reported := map[string]bool{}
		for _, c := range f.open() {
			for _, s := range c.Sightings {
				reported[s.Caller.User] = true
			}
		}
		if s := f.Stats(); len(reported) == 0 || len(reported) > 64 || uint64(len(reported))+s.Untracked != 1000 {
			t.Errorf("%d reported, %d counted as not tracked", len(reported), s.Untracked)
		}
		if !reported["user-999"] {
			t.Error("the newest is missing")
		}
	})
}

func TestShareOfSamples(t *testing.T) {
	for _, share := range []float64{0, 0.1, 1} {
		f := newFixture(t, Options{Sample: share})
		p := f.caller("alice")
		const n = 20000
		for range n {
			f.Record(f.event(p, "x", nil))
		}
		if got := float64(f.Stats().Sampled) / n; got < share*0.85 || got > share*1.15 {
			t.Errorf("%v of them, want %v", got, share)
		}
	}
}

// TestRecordFromEverywhere is for the race detector: all is counted.
func TestRecordFromEverywhere(t *testing.T) {
	f := newFixture(t, Options{Sample: 0.5, MaxSamples: 32, MaxDenials: 32, MaxCallers: 16, SightEvery: time.Millisecond, Interval: time.Millisecond})
	const workers, each = 8, 500
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			for i := range each {
				p := f.caller(fmt.Sprint("user-", i%40))
				var err error
				if i%3 == 0 {
					err = revoked(uint64(i % 7))
				}
				f.Record(f.event(p, fmt.Sprint("tool-", w), err))
			}
		})
	}
	wg.Wait()
	must(t, f.Close())
	var denied, sampled uint64
	for _, r := range f.records() {
		if r.Decision == session.DecisionDenied {
			denied += r.Count
		} else {
			sampled += r.Count
		}
	}
	s := f.Stats()
	if s.Calls != workers*each || denied != s.Denied || sampled+s.Dropped != s.Sampled {
		t.Errorf("%d denied, %d sampled in the reports; %+v", denied, sampled, s)
	}
}

func TestNewRefuses(t *testing.T) {
	good := Options{Enrollment: &session.Enrollment{Enforcer: "e", ReceiptKey: make([]byte, ed25519.PrivateKeySize)}, Enforcer: &enforcer{}, Publisher: &bus{}}
	for name, change := range map[string]func(*Options){
		"no enrolment":       func(o *Options) { o.Enrollment = nil },
		"no receipt key":     func(o *Options) { o.Enrollment = &session.Enrollment{Enforcer: "e"} },
		"no enforcer":        func(o *Options) { o.Enforcer = nil },
		"no publisher":       func(o *Options) { o.Publisher = nil },
		"a negative share":   func(o *Options) { o.Sample = -0.1 },
		"more than all":      func(o *Options) { o.Sample = 1.1 },
		"no number":          func(o *Options) { var zero float64; o.Sample = zero / zero },
		"a negative bound":   func(o *Options) { o.MaxDenials = -1 },
		"a boundless bound":  func(o *Options) { o.MaxSamples = maxItems + 1 },
		"a negative intervl": func(o *Options) { o.Interval = -1 },
	} {
		o := good
		change(&o)
		if r, err := New(o); !errors.Is(err, session.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
			r.Close()
		}
	}
	r, err := New(good)
	must(t, err)
	must(t, r.Close())
	must(t, r.Close())
	r.Record(&Event{})
	var none *Recorder
	must(t, none.Close())
	must(t, new(Recorder).Close())
	new(Recorder).Record(&Event{Mark: new(Recorder).Start()})
	if none.Stats() != (Stats{}) {
		t.Error("stats of nothing")
	}
}

func TestTraceparent(t *testing.T) {
	const good = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
	for s, ok := range map[string]bool{
		good: true, "": false, good[:54]: false, good + "-x": false, "01" + good[2:] + "-x": true, "01" + good[2:] + "x": false,
		"ff" + good[2:]: false, strings.ToUpper(good): false, "00-" + strings.Repeat("0", 32) + good[35:]: false,
		good[:36] + strings.Repeat("0", 16) + good[52:]: false, strings.Replace(good, "0af", "0ag", 1): false,
		strings.Replace(good, "-", "_", 1): false, good[:53] + "zz": false,
	} {
		if got := session.ParseTraceparent(s); (got != session.TraceContext{}) != ok {
			t.Errorf("%q: %+v", s, got)
		}
	}
}
