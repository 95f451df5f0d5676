package filter

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/interlock-fabric/interlock/pkg/session"
)

// plain is the state as one would write it down: a map, changed in place.
type plain struct {
	m       map[session.Key][]session.Record
	horizon session.Instant
}

func newPlain() *plain { return &plain{m: map[session.Key][]session.Record{}} }

func (m *plain) clone() *plain {
	out := &plain{m: map[session.Key][]session.Record{}, horizon: m.horizon}
	for k, r := range m.m {
		out.m[k] = slices.Clone(r)
	}
	return out
}

func (m *plain) apply(b *session.Batch) {
	for i := range b.Entries {
		e := &b.Entries[i]
		old := m.m[e.Key]
		at := slices.IndexFunc(old, func(r session.Record) bool { return r.Effect == e.Effect && r.Drill == e.Drill })
		var have *session.Record
		if at >= 0 {
			have = &old[at]
		}
		next, keep := Step(have, e, b)
		old = slices.Clone(old)
		if at >= 0 {
			old = slices.Delete(old, at, at+1)
		}
		if keep {
			old = append(old, next)
		}
		m.m[e.Key] = old
		m.drop(e.Key)
	}
	if m.horizon = max(m.horizon, b.Horizon); b.Horizon != 0 {
		for k := range m.m {
			m.drop(k)
		}
	}
}

func (m *plain) drop(k session.Key) {
	m.m[k] = slices.DeleteFunc(m.m[k], func(r session.Record) bool { return r.Expires != 0 && r.Expires <= m.horizon })
	if len(m.m[k]) == 0 {
		delete(m.m, k)
	}
}

// decide looks at every record there is.
func (m *plain) decide(p *session.Prepared, call *session.Call, now session.Moment) (effect session.Effect, drill bool) {
	keys := append([]session.Key{session.GlobalKey(), session.TenantKey(p.Tenant())}, p.Keys()...)
	keys, err := p.CallKeys(keys, call, ^session.ShapeSet(0))
	if err != nil {
		panic(err)
	}
	for k, records := range m.m {
		for i := range records {
			if r := &records[i]; slices.Contains(keys, k) && r.Matches(p, call, now) {
				if r.Drill {
					drill = true
				} else {
					effect = max(effect, r.Effect)
				}
			}
		}
	}
	return effect, drill
}

// compare reports the first way in which a set and the plain differ.
func (m *plain) compare(s *Set) error {
	if err := s.Err(); err != nil {
		return err
	}
	var digest session.StateDigest
	total, per, shapes := 0, map[session.TenantID]int{}, session.ShapeSet(0)
	for k, records := range m.m {
		if got := s.Lookup(k); !sameRecords(got, records) {
			return fmt.Errorf("under %s: %v, want %v", k, got, records)
		}
		for i := range records {
			digest.Plus(records[i].Sum(k))
			total++
			per[k.Tenant]++
			shapes = shapes.With(k.Shape)
		}
	}
	switch {
	case s.Len() != total:
		return fmt.Errorf("%d records, want %d", s.Len(), total)
	case s.Digest() != digest:
		return errors.New("the digest differs")
	case s.Shapes() != shapes:
		return fmt.Errorf("shapes %b, want %b", s.Shapes(), shapes)
	}
	if sound, err := s.CheckDelta(); !sound || err != nil {
		return fmt.Errorf("the delta counted anew: sound %v, %v", sound, err)
	}
	for id := range session.TenantID(4) {
		if s.TenantLen(id) != per[id] {
			return fmt.Errorf("tenant %d has %d records, want %d", id, s.TenantLen(id), per[id])
		}
	}
	seen := map[session.Key][]session.Record{}
	s.Range(func(k session.Key, r *session.Record) bool {
		seen[k] = append(seen[k], *r)
		return true
	})
	if !maps.EqualFunc(seen, m.m, sameRecords) {
		return fmt.Errorf("Range gave %v, want %v", seen, m.m)
	}
	return nil
}

func sameRecords(a, b []session.Record) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if !slices.ContainsFunc(b, func(r session.Record) bool { return equal(&a[i], &r) }) {
			return false
		}
	}
	return true
}

func equal(a, b *session.Record) bool { return same(a, b) && a.Expires == b.Expires }

// people is who can call and what can be decided about them.
type people struct {
	callers []*session.Prepared
	calls   []session.Call
	keys    []session.Key
	theirs  int // the first so many of them are callers' keys
}

func newPeople(tb testing.TB) *people {
	w := &people{calls: []session.Call{{}, {Tool: "read", LowRisk: true}, {Tool: "pay", Audience: "https://bank.example/"}, {Audience: "https://bank.example/", LowRisk: true}}}
	seen := map[session.Key]bool{}
	add := func(keys ...session.Key) {
		for _, k := range keys {
			if !seen[k] {
				seen[k] = true
				w.keys = append(w.keys, k)
			}
		}
	}
	add(session.GlobalKey())
	for t := 1; t <= 3; t++ {
		secret, err := session.NewTenantSecret(session.TenantID(t), fmt.Sprintf("t%d", t), bytes.Repeat([]byte{byte(t)}, 32))
		if err != nil {
			tb.Fatal(err)
		}
		add(session.TenantKey(session.TenantID(t)))
		for c := range 3 {
			n := fmt.Sprint(c)
			p, err := secret.Prepare(session.Identity{
				Tenant: secret.Name(), Issuer: "https://issuer.example", Token: "t" + n, Session: session.SessionRef{ID: "s" + n},
				Ancestors: []session.SessionRef{{ID: "root"}}, User: "u" + n, Actors: []session.Actor{{ID: "a" + n}, {ID: "boss"}},
				Client: "c", Roles: []string{"r" + n}, ACR: "acr" + n,
				AuthTime: time.UnixMilli(int64(1000 * c)), IssuedAt: time.UnixMilli(int64(1000 * c)),
			})
			if err != nil {
				tb.Fatal(err)
			}
			w.callers = append(w.callers, p)
			add(p.Keys()...)
			for i := range w.calls {
				keys, err := p.CallKeys(nil, &w.calls[i], ^session.ShapeSet(0))
				if err != nil {
					tb.Fatal(err)
				}
				add(keys...)
			}
		}
	}
	w.theirs = len(w.keys)
	// The keys of nobody are most of what a real state holds.
	for i := range 400 {
		k := session.Key{Tenant: 1 + session.TenantID(i%3), Shape: session.Shape(session.KindToken)}
		k.Digest[0], k.Digest[1], k.Digest[8] = byte(i), byte(i>>8), 1
		add(k)
	}
	return w
}

// entry makes an entry that an authority could publish.
func (w *people) entry(draw func(n int) int, horizon session.Instant) session.Entry {
	for {
		e := session.Entry{
			Op: session.OpSet, Effect: session.Effect(1 + draw(4)), Reason: session.Reason(draw(4)),
			// Most often one that was decided about before, or soon will be again.
			Key: w.keys[draw([]int{24, 24, w.theirs, len(w.keys)}[draw(4)])],
		}
		if draw(3) == 0 {
			e.Op = session.OpLift
		}
		if draw(3) == 0 {
			e.Expires = max(1, horizon+session.Instant(draw(60))-5)
		}
		if draw(3) == 0 {
			e.IssuedBefore = session.Instant(1 + 500*draw(6))
		}
		if draw(2) == 0 {
			e.Incident = []string{"INC-1", "INC-2", "a longer incident id, as some have them"}[draw(3)]
		}
		if draw(4) == 0 {
			e.ACR = []string{"acr0", "acr1"}[draw(2)]
		}
		if draw(4) == 0 {
			for range 1 + draw(3) {
				e.Except = append(e.Except, w.callers[draw(len(w.callers))].Keys()[draw(6)])
			}
			e.Except = session.SortKeys(e.Except)
		}
		if draw(3) == 0 {
			e.Share = uint16(1 + draw(session.ShareUnit))
		}
		e.Drill = draw(8) == 0
		if e.Validate() == nil {
			return e
		}
	}
}

func (w *people) batch(draw func(n int) int, number uint64, horizon session.Instant) *session.Batch {
	b := &session.Batch{Epoch: 1, Number: number, Time: session.Instant(number), Horizon: horizon}
	if draw(2) == 0 {
		b.Time += 1.7e12 // else it is long ago, and does not fit a row
	}
	if draw(6) == 0 {
		b.Horizon += session.Instant(draw(20))
	}
	for range draw(12) {
		b.Entries = append(b.Entries, w.entry(draw, horizon))
	}
	return b
}

func (w *people) verdicts(m *plain, s *Set, now session.Instant) error {
	for _, p := range w.callers {
		for i := range w.calls {
			at := session.Moment{Authority: now}
			effect, drill := m.decide(p, &w.calls[i], at)
			got, err := s.Decide(p, &w.calls[i], at)
			var have session.Effect
			if got.Record != nil {
				have = got.Record.Effect
			}
			if err != nil || have != effect || got.Drill != drill {
				return fmt.Errorf("%s calls %+v: %v, drill %v (%v); want %v, drill %v", p.Identity().User, w.calls[i], have, got.Drill, err, effect, drill)
			}
			if got.Record == nil {
				continue
			}
			// And it is a record of that key, told in full.
			found := false
			for k, records := range m.m {
				found = found || k.Shape == got.Shape && slices.ContainsFunc(records, func(r session.Record) bool { return equal(&r, got.Record) })
			}
			if !found {
				return fmt.Errorf("the verdict names %+v, which is not in force", *got.Record)
			}
		}
	}
	return nil
}

// operations counts what TestStates has done, all checks together.
var operations atomic.Int64

// TestStates drives random operations of every kind against a plain map and
// finds no difference in any verdict, count or digest. The long form, with
// more than a million operations:
//
//	go test ./pkg/filter -run 'TestStates$' -rapid.checks=7000 -timeout 2h -v
func TestStates(t *testing.T) {
	t.Parallel()
	w := newPeople(t)
	dir := t.TempDir()
	rapid.Check(t, func(rt *rapid.T) {
		number, set, ref := uint64(0), (*Set)(nil), newPlain()
		small := rapid.IntRange(0, 1<<20)
		draw := func(n int) int { return small.Draw(rt, "n") % n }
		step := func() {
			number++
			b := w.batch(draw, number, ref.horizon)
			operations.Add(int64(1 + len(b.Entries)))
			set = set.Apply(b, nil)
			ref.apply(b)
		}
		check := func(s *Set, m *plain) {
			if err := m.compare(s); err != nil {
				rt.Fatal(err)
			}
			if err := w.verdicts(m, s, m.horizon+session.Instant(draw(60))); err != nil {
				rt.Fatal(err)
			}
		}
		seal := func() *Segment {
			path := ""
			if draw(2) == 0 {
				path = filepath.Join(dir, "segment")
			}
			mark := Mark{Epoch: 1, Number: number, Time: session.Instant(number)}
			g, err := set.Seal(path, mark)
			if draw(3) == 0 {
				g, err = set.SealBeside(t.Context(), path, mark)
			}
			if err != nil {
				rt.Fatal(err)
			}
			return g
		}
		if draw(2) == 0 {
			// Ends that fit a row, beside those that do not.
			b := &session.Batch{Epoch: 1, Horizon: 1.7e12}
			set = set.Apply(b, nil)
			ref.apply(b)
		}
		rt.Repeat(map[string]func(*rapid.T){
			"apply": func(*rapid.T) { step() },
			"more":  func(*rapid.T) { step() },
			"merge, with batches meanwhile": func(*rapid.T) {
				operations.Add(1)
				g, from := seal(), set
				for range draw(4) {
					step()
				}
				onto, ok := set.Onto(from, g)
				if !ok {
					rt.Fatal("a state that descends from the sealed one cannot be put onto the segment")
				}
				if g.Sum() != again(rt, g).Sum() {
					rt.Fatal("a segment differs when it has been written and read")
				}
				set = onto
			},
			"restart": func(*rapid.T) {
				operations.Add(1)
				path := filepath.Join(dir, "restart")
				if _, err := set.Seal(path, Mark{Number: number}); err != nil {
					rt.Fatal(err)
				}
				g, err := OpenSegment(path)
				if err != nil {
					rt.Fatal(err)
				}
				set = g.Set()
			},
			"cold start": func(*rapid.T) {
				operations.Add(1)
				set = again(rt, seal()).Set()
			},
			"branch": func(*rapid.T) {
				operations.Add(1)
				old, was := set, ref.clone()
				step()
				if draw(2) == 0 {
					set, ref, old, was = old, was, set, ref
					step()
				}
				check(old, was)
			},
			"": func(*rapid.T) { check(set, ref) },
		})
	})
	t.Logf("%d operations", operations.Load())
}

func again(t interface{ Fatal(...any) }, g *Segment) *Segment {
	var buf bytes.Buffer
	n, err := g.WriteTo(&buf)
	if err != nil || n != g.Size() {
		t.Fatal(n, g.Size(), err)
	}
	out, err := ReadSegment(&buf, n)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// TestStatesConcurrently has readers at work on every state that there is while
// batches come in and merges run beside them, and finds each state to be what
// the plain was at its number.
func TestStatesConcurrently(t *testing.T) {
	type state struct {
		set    *Set
		number uint64
	}
	w := newPeople(t)
	dir := t.TempDir()
	rnd := rand.New(rand.NewPCG(1, 2))
	var now atomic.Pointer[state]
	var models sync.Map
	now.Store(&state{})
	models.Store(uint64(0), newPlain())
	stop := make(chan struct{})
	var readers sync.WaitGroup
	for range 3 {
		readers.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				s := now.Load()
				m, _ := models.Load(s.number)
				ref := m.(*plain)
				if err := errors.Join(ref.compare(s.set), w.verdicts(ref, s.set, ref.horizon)); err != nil {
					t.Errorf("at %d: %v", s.number, err)
					return
				}
			}
		})
	}
	type merged struct {
		from *Set
		g    *Segment
		err  error
	}
	done := make(chan merged, 1)
	merging, merges, ref := false, 0, newPlain()
	set := (*Set)(nil)
	for number := uint64(1); (number < 300 || merges < 10) && !t.Failed(); number++ {
		select {
		case x := <-done:
			if x.err != nil {
				t.Fatal(x.err)
			}
			var ok bool
			if set, ok = set.Onto(x.from, x.g); !ok {
				t.Fatal("the merge was lost")
			}
			merging = false
			merges++
		default:
		}
		b := w.batch(rnd.IntN, number, ref.horizon)
		set = set.Apply(b, nil)
		ref = ref.clone()
		ref.apply(b)
		models.Store(number, ref)
		now.Store(&state{set, number})
		if !merging {
			merging = true
			from := set
			path := filepath.Join(dir, fmt.Sprint(number))
			readers.Go(func() {
				g, err := from.SealBeside(t.Context(), path, Mark{Number: number})
				done <- merged{from, g, errors.Join(err, os.Remove(path))}
			})
		}
	}
	close(stop)
	readers.Wait()
}
