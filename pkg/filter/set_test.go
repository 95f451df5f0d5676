package filter

import (
	"bytes"
	"context"
	"encoding/binary"
	"math/rand/v2"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/interlock-fabric/interlock/pkg/session"
)

func sessionKey(n int) (k session.Key) {
	k = session.Key{Tenant: 1, Shape: session.Shape(session.KindSession)}
	binary.BigEndian.PutUint64(k.Digest[:], uint64(n)*0x9e3779b97f4a7c15)
	k.Digest[15] = 1
	return k
}

var userKey = session.Key{Tenant: 1, Shape: session.Shape(session.KindUser), Digest: session.Digest{1}}

func put(effect session.Effect, k session.Key) session.Entry {
	return session.Entry{Op: session.OpSet, Effect: effect, Key: k}
}

func lift(effect session.Effect, k session.Key) session.Entry {
	return session.Entry{Op: session.OpLift, Effect: effect, Key: k}
}

func batch(number uint64, entries ...session.Entry) *session.Batch {
	return &session.Batch{Number: number, Time: session.Instant(1000 * number), Entries: entries}
}

// TestStep holds the rule for one effect on one key case by case:
// a set never weakens, a revoke of what is terminal stays, a lift of any other
// leaves its issued-before behind.
func TestStep(t *testing.T) {
	a, b, c := sessionKey(1), sessionKey(2), sessionKey(3)
	terminal := sessionKey(9)
	b7 := batch(7)
	tests := []struct {
		name string
		have *session.Record
		e    session.Entry
		want *session.Record
	}{
		{"a set on nothing", nil,
			session.Entry{Op: session.OpSet, Effect: session.EffectSuspended, Reason: 4, Key: userKey, Expires: 9, Incident: "i", Except: []session.Key{a}},
			&session.Record{Effect: session.EffectSuspended, Reason: 4, Expires: 9, Incident: "i", Except: []session.Key{a}, Since: 7000, Seq: 7}},
		{"a lift of nothing", nil, lift(session.EffectSuspended, userKey), nil},
		{"a shorter suspension does not shorten", &session.Record{Effect: session.EffectSuspended, Expires: 50, Seq: 1, Since: 10, Incident: "first"},
			session.Entry{Op: session.OpSet, Effect: session.EffectSuspended, Key: userKey, Expires: 20, Incident: "second"},
			&session.Record{Effect: session.EffectSuspended, Expires: 50, Seq: 1, Since: 7000, Incident: "first"}},
		{"a longer suspension lengthens", &session.Record{Effect: session.EffectSuspended, Expires: 50, Seq: 1, Since: 10, Incident: "first"},
			session.Entry{Op: session.OpSet, Effect: session.EffectSuspended, Key: userKey, Expires: 70, Incident: "second"},
			&session.Record{Effect: session.EffectSuspended, Expires: 70, Seq: 7, Since: 7000, Incident: "second"}},
		{"without an end outlasts any", &session.Record{Effect: session.EffectSuspended, Seq: 1},
			session.Entry{Op: session.OpSet, Effect: session.EffectSuspended, Key: userKey, Expires: 70},
			&session.Record{Effect: session.EffectSuspended, Seq: 1, Since: 7000}},
		{"an issued-before does not narrow", &session.Record{Effect: session.EffectRevoked, Seq: 1},
			session.Entry{Op: session.OpSet, Effect: session.EffectRevoked, Key: userKey, IssuedBefore: 5},
			&session.Record{Effect: session.EffectRevoked, Seq: 1, Since: 7000}},
		{"a revoke after a restore is whole again", &session.Record{Effect: session.EffectRevoked, IssuedBefore: 5, Expires: 9, Seq: 1},
			put(session.EffectRevoked, userKey), &session.Record{Effect: session.EffectRevoked, Seq: 7, Since: 7000}},
		{"exemptions must be in both", &session.Record{Effect: session.EffectRevoked, Except: []session.Key{a, b}, Seq: 1},
			session.Entry{Op: session.OpSet, Effect: session.EffectRevoked, Key: userKey, Except: []session.Key{b, c}},
			&session.Record{Effect: session.EffectRevoked, Except: []session.Key{b}, Seq: 1, Since: 7000}},
		{"a set ends a staged restore", &session.Record{Effect: session.EffectSuspended, Share: 3000, Seq: 1},
			put(session.EffectSuspended, userKey), &session.Record{Effect: session.EffectSuspended, Seq: 7, Since: 7000}},
		{"a step-up keeps the acr that was asked for", &session.Record{Effect: session.EffectStepUp, ACR: "mfa", Since: 10, Seq: 1},
			put(session.EffectStepUp, userKey), &session.Record{Effect: session.EffectStepUp, ACR: "mfa", Since: 7000, Seq: 7}},
		{"a step-up from a clock that is behind", &session.Record{Effect: session.EffectStepUp, Since: 8000, Seq: 1},
			put(session.EffectStepUp, userKey), &session.Record{Effect: session.EffectStepUp, Since: 8000, Seq: 7}},
		{"a resume", &session.Record{Effect: session.EffectSuspended}, lift(session.EffectSuspended, userKey), nil},
		{"a terminal revoke stays, whatever the log says", &session.Record{Effect: session.EffectRevoked, Seq: 1},
			session.Entry{Op: session.OpLift, Effect: session.EffectRevoked, Key: terminal, IssuedBefore: 5}, &session.Record{Effect: session.EffectRevoked, Seq: 1}},
		{"a restore leaves its issued-before", &session.Record{Effect: session.EffectRevoked, Since: 300, Except: []session.Key{a}},
			session.Entry{Op: session.OpLift, Effect: session.EffectRevoked, Key: userKey, IssuedBefore: 500, Expires: 900},
			&session.Record{Effect: session.EffectRevoked, IssuedBefore: 500, Expires: 900, Since: 7000, Seq: 7, Except: []session.Key{a}}},
		{"which reaches at least to the decision", &session.Record{Effect: session.EffectRevoked, Since: 600},
			session.Entry{Op: session.OpLift, Effect: session.EffectRevoked, Key: userKey, IssuedBefore: 500},
			&session.Record{Effect: session.EffectRevoked, IssuedBefore: 600, Since: 7000, Seq: 7}},
		{"a second restore does not move it", &session.Record{Effect: session.EffectRevoked, IssuedBefore: 500, Since: 600},
			session.Entry{Op: session.OpLift, Effect: session.EffectRevoked, Key: userKey, IssuedBefore: 5000},
			&session.Record{Effect: session.EffectRevoked, IssuedBefore: 500, Since: 600}},
		{"a stage", &session.Record{Effect: session.EffectSuspended, Seq: 1},
			session.Entry{Op: session.OpLift, Effect: session.EffectSuspended, Key: userKey, Share: 1000}, &session.Record{Effect: session.EffectSuspended, Share: 1000, Seq: 1}},
		{"a lesser stage takes nothing back", &session.Record{Effect: session.EffectSuspended, Share: 3000},
			session.Entry{Op: session.OpLift, Effect: session.EffectSuspended, Key: userKey, Share: 1000}, &session.Record{Effect: session.EffectSuspended, Share: 3000}},
		{"the last stage", &session.Record{Effect: session.EffectSuspended, Share: 3000},
			session.Entry{Op: session.OpLift, Effect: session.EffectSuspended, Key: userKey, Share: session.ShareUnit}, nil},
		{"a lift of what was before leaves what was decided since", &session.Record{Effect: session.EffectSuspended, Since: 600, Seq: 1},
			session.Entry{Op: session.OpLift, Effect: session.EffectSuspended, Key: userKey, IssuedBefore: 599}, &session.Record{Effect: session.EffectSuspended, Since: 600, Seq: 1}},
		{"and so does a stage", &session.Record{Effect: session.EffectSuspended, Since: 600, Seq: 1},
			session.Entry{Op: session.OpLift, Effect: session.EffectSuspended, Key: userKey, IssuedBefore: 599, Share: 1000}, &session.Record{Effect: session.EffectSuspended, Since: 600, Seq: 1}},
		{"and lifts what was before", &session.Record{Effect: session.EffectSuspended, Since: 600, Seq: 1},
			session.Entry{Op: session.OpLift, Effect: session.EffectSuspended, Key: userKey, IssuedBefore: 600}, nil},
		{"a drill ends, whatever it is of", &session.Record{Effect: session.EffectRevoked, Drill: true},
			session.Entry{Op: session.OpLift, Effect: session.EffectRevoked, Key: terminal, Drill: true}, nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, keep := Step(tt.have, &tt.e, b7)
			if keep != (tt.want != nil) || keep && !reflect.DeepEqual(got, *tt.want) {
				t.Errorf("got %+v, %t; want %+v", got, keep, tt.want)
			}
		})
	}
}

// TestManyKeys takes the set through many merges of its delta, against a map. It
// fails when a merge loses what was removed, or writes to a base that an older
// snapshot reads.
func TestManyKeys(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	type snapshot struct {
		set  *Set
		want map[session.Key]bool
	}
	var set *Set
	want := map[session.Key]bool{}
	var old []snapshot
	for n := range 400 {
		b := batch(uint64(n + 1))
		for range 20 {
			k := sessionKey(rng.IntN(3000))
			if want[k] && rng.IntN(2) == 0 {
				b.Entries = append(b.Entries, lift(session.EffectSuspended, k))
				delete(want, k)
			} else {
				b.Entries = append(b.Entries, put(session.EffectSuspended, k))
				want[k] = true
			}
		}
		set = set.Apply(b, nil)
		if n%50 == 49 {
			copied := map[session.Key]bool{}
			for k := range want {
				copied[k] = true
			}
			old = append(old, snapshot{set, copied})
		}
	}
	for i, s := range old {
		if s.set.Len() != len(s.want) {
			t.Fatalf("snapshot %d has %d records, want %d", i, s.set.Len(), len(s.want))
		}
		for n := range 3000 {
			k := sessionKey(n)
			if (len(s.set.Lookup(k)) > 0) != s.want[k] {
				t.Fatalf("snapshot %d: key %d in force is %t", i, n, !s.want[k])
			}
		}
		var sum session.StateDigest
		s.set.Range(func(k session.Key, r *session.Record) bool { sum.Plus(r.Sum(k)); return true })
		if sum != s.set.Digest() {
			t.Fatalf("snapshot %d: the digest is not that of its records", i)
		}
	}
}

// TestHorizon: records leave through the horizon alone, those that end leave in
// any order of their ends, and what is past it never comes in.
func TestHorizon(t *testing.T) {
	ending := func(n int, at session.Instant) session.Entry {
		e := put(session.EffectRevoked, sessionKey(n))
		e.Expires = at
		return e
	}
	set := (*Set)(nil).Apply(batch(1, ending(1, 50), ending(2, 20), ending(3, 90), put(session.EffectRevoked, userKey)), nil)
	empty := session.StateDigest{}
	for _, step := range []struct {
		horizon session.Instant
		want    int
	}{{0, 4}, {19, 4}, {20, 3}, {10, 3}, {49, 3}, {60, 2}, {1 << 40, 1}} {
		set = set.Apply(&session.Batch{Number: 2, Horizon: step.horizon}, nil)
		if set.Len() != step.want {
			t.Fatalf("horizon %d leaves %d, want %d", step.horizon, set.Len(), step.want)
		}
	}
	before := set.Digest()
	if set = set.Apply(batch(3, ending(4, 70)), nil); set.Len() != 1 || set.Digest() != before || before == empty {
		t.Fatalf("what is past the horizon came in: %d records", set.Len())
	}
}

// TestHorizonHidesWhatIsStillInASegment: what ends at the horizon stands in the
// segment until the next merge, and denies nobody any more; what ends one
// millisecond later still does.
func TestHorizonHidesWhatIsStillInASegment(t *testing.T) {
	const end = session.Instant(1_900_000_000_000)
	w := newPeople(t)
	p := w.callers[4]
	e := put(session.EffectRevoked, p.Keys()[1])
	e.Expires = end
	other := put(session.EffectRevoked, e.Key) // so that keys of this shape are asked for
	other.Key.Digest[0] ^= 1
	g, err := (*Set)(nil).Apply(batch(1, e, other), nil).Seal("", Mark{})
	if err != nil {
		t.Fatal(err)
	}
	for horizon, want := range map[session.Instant]bool{end - 1: true, end: false, end + 1: false} {
		s := g.Set().Apply(&session.Batch{Number: 2, Horizon: horizon}, nil)
		if got := isDenied(s, p); got != want || len(s.Lookup(e.Key)) == 1 != want {
			t.Errorf("horizon %d behind the end: denied %t, %d records", horizon-end, got, len(s.Lookup(e.Key)))
		}
	}
}

// TestStepUpOfASegment: no claim of another authentication context than the one
// that is asked for, whatever it is, steps up.
func TestStepUpOfASegment(t *testing.T) {
	secret, err := session.NewTenantSecret(1, "t1", bytes.Repeat([]byte{1}, 32))
	if err != nil {
		t.Fatal(err)
	}
	for acr, want := range map[string]bool{"gold": false, "": true, "silver": true, "\x00": true, "\x01": true} {
		p, err := secret.Prepare(session.Identity{
			Tenant: "t1", Issuer: "https://issuer.example", User: "u", ACR: acr, AuthTime: time.UnixMilli(5000),
		})
		if err != nil {
			t.Fatal(err)
		}
		e := put(session.EffectStepUp, p.Keys()[0])
		e.ACR = "gold"
		g, err := (*Set)(nil).Apply(batch(1, e), nil).Seal("", Mark{})
		if err != nil {
			t.Fatal(err)
		}
		if got := isDenied(g.Set(), p); got != want {
			t.Errorf("acr %q: denied %t", acr, got)
		}
	}
}

// TestTake: entries that the signer has no right to change nothing.
func TestTake(t *testing.T) {
	set := (*Set)(nil).Apply(batch(1, put(session.EffectRevoked, userKey), put(session.EffectRevoked, session.GlobalKey())),
		func(e *session.Entry) bool { return e.Key.Tenant != 0 })
	if set.Len() != 1 || len(set.Lookup(session.GlobalKey())) != 0 || len(set.Lookup(userKey)) != 1 {
		t.Fatalf("%d records in force", set.Len())
	}
}

// TestMerge: the union matches whatever either matched, and no drill.
func TestMerge(t *testing.T) {
	share := func(n uint16) *Set {
		e := lift(session.EffectSuspended, userKey)
		e.Share = n
		return (*Set)(nil).Apply(batch(1, put(session.EffectSuspended, userKey), e), nil)
	}
	drill := put(session.EffectRevoked, sessionKey(1))
	drill.Drill = true
	other := (*Set)(nil).Apply(batch(2, put(session.EffectRevoked, sessionKey(2)), drill), nil)
	got := Merge(share(1000), nil, other, share(3000))
	if r := got.Lookup(userKey); got.Len() != 2 || len(r) != 1 || r[0].Share != 1000 || len(got.Lookup(sessionKey(1))) != 0 {
		t.Fatalf("%d records, %+v", got.Len(), r)
	}
	if r := Merge(share(3000)).Lookup(userKey); r[0].Share != 3000 {
		t.Fatalf("a restore that was half way is at %d", r[0].Share)
	}
	if Merge() != nil || Merge(nil, (*Set)(nil).Apply(batch(1, drill), nil)) != nil {
		t.Fatal("nothing merged is something")
	}
}

// TestZeroSet: the zero value and nil answer for the empty state.
func TestZeroSet(t *testing.T) {
	w := newWorld(t)
	p := w.prepare(t, w.callers[0])
	for _, s := range []*Set{nil, {}} {
		m, err := s.Decide(p, &session.Call{Tool: "t0"}, session.Moment{})
		if err != nil || m.Record != nil || s.Len() != 0 || s.TenantLen(1) != 0 || s.Shapes() != 0 || s.Digest() != (session.StateDigest{}) || s.Lookup(userKey) != nil {
			t.Fatal("the empty state is not empty")
		}
		s.Range(func(session.Key, *session.Record) bool { t.Fatal("a record"); return false })
	}
}

// TestConcurrentReaders lets readers use every snapshot while the writer derives
// the next: under -race it fails when Apply writes to anything that an older set
// shares.
func TestConcurrentReaders(t *testing.T) {
	w := newWorld(t)
	var current atomic.Pointer[Set]
	current.Store(&Set{})
	ctx, stop := context.WithCancel(context.Background())
	var readers sync.WaitGroup
	for i := range 4 {
		p := w.prepare(t, w.callers[i%len(w.callers)])
		readers.Go(func() {
			for ctx.Err() == nil {
				s := current.Load()
				var sum session.StateDigest
				s.Range(func(k session.Key, r *session.Record) bool { sum.Plus(r.Sum(k)); return true })
				if sum != s.Digest() {
					t.Error("a snapshot has changed under its reader")
					return
				}
				if _, err := s.Decide(p, &w.calls[0], session.Moment{}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	rng := rand.New(rand.NewPCG(3, 4))
	for n := range 600 {
		b := batch(uint64(n+1), put(session.EffectSuspended, userKey), put(session.EffectReduced, session.TenantKey(1)), put(session.EffectReduced, session.GlobalKey()))
		for range 3 {
			e := put(session.EffectRevoked, sessionKey(rng.IntN(900)))
			e.Expires = session.Instant(rng.IntN(1000 * (n + 1)))
			b.Entries = append(b.Entries, e, lift(session.EffectSuspended, sessionKey(rng.IntN(900))))
		}
		b.Horizon = session.Instant(500 * n)
		current.Store(current.Load().Apply(b, nil))
	}
	stop()
	readers.Wait()
}

// TestDecideAllocatesNothing guards G8 for every allowed call: with and without
// entries that name tools, with drills that match and records that are found and
// do not, in the delta and in a segment.
func TestDecideAllocatesNothing(t *testing.T) {
	w := newWorld(t)
	p := w.prepare(t, w.callers[2])
	tool := session.Key{Tenant: 1, Shape: session.ShapeUserAgentTool, Digest: session.Digest{1}}
	plain := (*Set)(nil).Apply(batch(1, put(session.EffectRevoked, userKey), put(session.EffectRevoked, session.TenantKey(2))), nil)
	found := batch(2)
	for i, k := range p.Keys()[1:] {
		drill := put(session.EffectRevoked, k)
		drill.Drill, drill.Incident = true, "drill"
		exempt := put(session.EffectStepUp, k)
		exempt.Except, exempt.ACR = p.Keys()[:1], "mfa"
		old := put(session.EffectRevoked, k)
		old.IssuedBefore = 1
		found.Entries = append(found.Entries, [...]session.Entry{drill, exempt, old}[i%3])
	}
	matching := plain.Apply(found, nil)
	sets := map[string]*Set{
		"plain": plain, "tools": plain.Apply(batch(2, put(session.EffectRevoked, tool)), nil), "drills": matching,
	}
	for name, path := range map[string]string{"drills on the heap": "", "drills in a file": filepath.Join(t.TempDir(), "segment")} {
		g, err := matching.Seal(path, Mark{})
		if err != nil {
			t.Fatal(err)
		}
		sets[name] = g.Set()
	}
	for name, set := range sets {
		call := session.Call{Tool: "t1", Audience: "https://api.example/a"}
		drill := strings.HasPrefix(name, "drills")
		if n := testing.AllocsPerRun(100, func() {
			if m, err := set.Decide(p, &call, session.Moment{}); err != nil || m.Record != nil || m.Drill != drill {
				t.Fatal(m, err)
			}
		}); n != 0 && (!raced || name != "drills in a file") {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
}

// TestTheDeltaHidesTheSegment: what was lifted, and what the horizon has ended, is
// not found again in the segment below; one who was revoked there still is.
func TestTheDeltaHidesTheSegment(t *testing.T) {
	w := newWorld(t)
	p := w.prepare(t, w.callers[2])
	user, sess, ended := p.Keys()[0], p.Keys()[2], p.Keys()[1]
	until := put(session.EffectRevoked, ended)
	until.Expires = 5000
	set := (*Set)(nil).Apply(batch(1, put(session.EffectSuspended, user), put(session.EffectReduced, sess), until), nil)
	for _, path := range []string{"", filepath.Join(t.TempDir(), "segment")} {
		g, err := set.Seal(path, Mark{})
		if err != nil {
			t.Fatal(err)
		}
		says := func(s *Set, want session.Effect) {
			t.Helper()
			m, err := s.Decide(p, &session.Call{}, session.Moment{})
			var got session.Effect
			if m.Record != nil {
				got = m.Record.Effect
			}
			if err != nil || got != want {
				t.Errorf("%v, want %v: %v", got, want, err)
			}
		}
		s := g.Set()
		says(s, session.EffectRevoked)
		b := batch(2)
		b.Horizon = 4999
		s = s.Apply(b, nil)
		says(s, session.EffectRevoked)
		b = batch(3)
		b.Horizon = 5000
		s = s.Apply(b, nil)
		says(s, session.EffectSuspended)
		s = s.Apply(batch(4, lift(session.EffectSuspended, user)), nil)
		says(s, session.EffectReduced)
		s = s.Apply(batch(5, lift(session.EffectReduced, sess)), nil)
		says(s, 0)
		if s.Len() != 0 || s.Digest() != (session.StateDigest{}) {
			t.Errorf("%d records left", s.Len())
		}
	}
}

// TestARevokedCallerCostsTheRecord: a denial from a file allocates what it tells,
// the record and its incident, and nothing else.
func TestARevokedCallerCostsTheRecord(t *testing.T) {
	w := newWorld(t)
	p := w.prepare(t, w.callers[2])
	e := put(session.EffectRevoked, p.Keys()[0])
	e.Incident = "INC-142"
	g, err := (*Set)(nil).Apply(batch(1, e), nil).Seal(filepath.Join(t.TempDir(), "segment"), Mark{})
	if err != nil {
		t.Fatal(err)
	}
	set, call := g.Set(), session.Call{}
	if n := testing.AllocsPerRun(100, func() {
		if m, err := set.Decide(p, &call, session.Moment{}); err != nil || m.Record.Incident != "INC-142" {
			t.Fatal(m, err)
		}
	}); n > 2 && !raced {
		t.Errorf("%v allocations", n)
	}
}

func filled(n int) *Set { return grown(nil, 0, n) }

// grown returns a set of n entries of which s has the first few.
func grown(s *Set, few, n int) *Set {
	for i := few; i < n; i += session.MaxBatchEntries {
		b := batch(uint64(i + 1))
		for j := i; j < min(n, i+session.MaxBatchEntries); j++ {
			b.Entries = append(b.Entries, put(session.EffectRevoked, sessionKey(j)))
		}
		s = s.Apply(b, nil)
	}
	return s
}

func BenchmarkApply(b *testing.B) {
	for _, size := range []struct {
		name string
		n    int
	}{{"empty", 0}, {"1k", 1000}, {"100k", 100_000}} {
		for _, entries := range []int{1, session.MaxBatchEntries} {
			start := filled(size.n)
			b.Run(size.name+"/"+map[bool]string{true: "single", false: "full"}[entries == 1], func(b *testing.B) {
				b.ReportAllocs()
				s, n := start, size.n
				for i := 0; b.Loop(); i++ {
					if i%1000 == 0 {
						s = start
					}
					x := batch(uint64(i + 1))
					for range entries {
						n++
						x.Entries = append(x.Entries, put(session.EffectRevoked, sessionKey(n)))
					}
					s = s.Apply(x, nil)
				}
				b.ReportMetric(float64(b.N*entries)/b.Elapsed().Seconds(), "entries/s")
			})
		}
	}
}

// TestACopyOfATableDoesNotGrow: it is filled in the order of the places, which
// takes forever where they are few. Growing shows as allocations, two each time.
func TestACopyOfATableDoesNotGrow(t *testing.T) {
	s := filled(20_000)
	top := &s.layers[len(s.layers)-1]
	for name, copied := range map[string]func(){
		"shed": func() { top.t.shed(top) },
		"copy": func() { copyLayers(s.layers) },
	} {
		if n := testing.AllocsPerRun(1, copied); n > 18 { // table, slots, fence, line, 11 chunks
			t.Errorf("%s: %.0f allocations", name, n)
		}
	}
}
