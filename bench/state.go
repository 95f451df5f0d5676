package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/interlock-fabric/interlock/pkg/filter"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// kinds are those of an identity of eight keys: token, session with two
// ancestors, user, two agents, client.
var kinds = []session.Kind{session.KindToken, session.KindSession, session.KindUser, session.KindAgent, session.KindClient}

func randomKey(rnd *rand.Rand, kinds []session.Kind) session.Key {
	k := session.Key{Tenant: 1, Shape: session.Shape(kinds[rnd.IntN(len(kinds))])}
	binary.LittleEndian.PutUint64(k.Digest[:], rnd.Uint64())
	binary.LittleEndian.PutUint64(k.Digest[8:], rnd.Uint64())
	return k
}

// batches calls fn with batches of 1,000 that revoke n random keys.
func batches(n int, seed uint64, kinds []session.Kind, fn func(*session.Batch)) {
	rnd := rand.New(rand.NewPCG(seed, seed))
	for number := uint64(1); n > 0; number++ {
		b := &session.Batch{Epoch: 1, Number: number, Time: 1.7e12 + session.Instant(number), Entries: make([]session.Entry, min(n, session.MaxBatchEntries))}
		for i := range b.Entries {
			b.Entries[i] = session.Entry{
				Op: session.OpSet, Effect: session.EffectRevoked, Reason: session.ReasonStolenToken, Incident: "INC-142",
				Key: randomKey(rnd, kinds),
			}
		}
		n -= len(b.Entries)
		fn(b)
	}
}

// build makes a state of n entries on a segment, in a file or on the heap, as an
// enforcer that follows the log does: batches, and a merge when one is due.
func build(n int, kinds []session.Kind, dir string) (*filter.Set, error) {
	var s *filter.Set
	var err error
	i := 0
	merge := func() {
		path := ""
		if dir != "" {
			path = filepath.Join(dir, fmt.Sprint("segment-", i%2))
		}
		var g *filter.Segment
		if g, err = s.Seal(path, filter.Mark{Epoch: 1}); err == nil {
			s, _ = s.Onto(s, g)
		}
	}
	batches(n, 1, kinds, func(b *session.Batch) {
		if i++; err == nil {
			if s = s.Apply(b, nil); s.Due() {
				merge()
			}
		}
	})
	if err == nil {
		merge()
	}
	return s, err
}

func callers(n int) ([]*session.Prepared, error) {
	secret, err := session.NewTenantSecret(1, "acme", make([]byte, 32))
	if err != nil {
		return nil, err
	}
	out := make([]*session.Prepared, n)
	for i := range out {
		x := fmt.Sprint(i)
		const issuer = "https://idp.example"
		if out[i], err = secret.Prepare(session.Identity{
			Tenant: "acme", Issuer: issuer, Token: "t" + x, Session: session.SessionRef{ID: "s" + x},
			Ancestors: []session.SessionRef{{ID: "p" + x}, {ID: "q" + x}}, User: "u" + x,
			Actors: []session.Actor{{ID: "a" + x}, {ID: "b" + x}}, Client: "c" + x,
		}); err != nil {
			return nil, err
		}
	}
	return out, nil
}

func heap() float64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return float64(m.HeapAlloc)
}

// latencies are of single operations, the clock's own cost taken off.
type latencies []time.Duration

func (l latencies) at(q float64) float64 {
	return float64(l[min(len(l)-1, int(q*float64(len(l))))].Nanoseconds())
}

var clock = func() time.Duration {
	l := make(latencies, 100_000)
	for i := range l {
		t := time.Now()
		l[i] = time.Since(t)
	}
	slices.Sort(l)
	return l[len(l)/2]
}()

// sample times fn for each i until it has n, or stop is closed, with at least
// some.
func sample(n int, stop <-chan struct{}, fn func(i int)) latencies {
	l := make(latencies, 0, n)
	for i := 0; i < n; i++ {
		t := time.Now()
		fn(i)
		l = append(l, max(0, time.Since(t)-clock))
		if i%1024 == 1023 {
			select {
			case <-stop:
				n = 0
			default:
			}
		}
	}
	slices.Sort(l)
	return l
}

// perOp is the mean over many, for what is too short to be timed singly.
func perOp(n int, fn func(i int)) float64 {
	best := time.Duration(1 << 62)
	for range 5 {
		t := time.Now()
		for i := range n {
			fn(i)
		}
		best = min(best, time.Since(t))
	}
	return float64(best.Nanoseconds()) / float64(n)
}

var errDenied = errors.New("a caller who is not revoked was denied")

func measure(rep *report, n int) (err error) {
	dir, err := os.MkdirTemp("", "bench-*")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	ps, err := callers(1 << 14)
	if err != nil {
		return err
	}
	p50goal, p999goal := "≤ 450 ns", "≤ 5 µs"
	if n > 1_000_000 {
		p50goal, p999goal = "≤ 1.2 µs", "≤ 10 µs"
	}

	// Without a state directory first, so that the two do not share a heap.
	before := heap()
	s, err := build(n, kinds, "")
	if err != nil {
		return err
	}
	rep.add("heap per entry, no state directory", n, (heap()-before)/float64(n), "B", "≤ 40 B")
	runtime.KeepAlive(s) // and no longer
	before = heap()
	t := time.Now()
	if s, err = build(n, kinds, dir); err != nil {
		return err
	}
	rep.add("entries from the log into a state directory, merges included", n, float64(n)/time.Since(t).Seconds()/1e6, "M/s", "")
	rep.add("heap per entry, state directory", n, (heap()-before)/float64(n), "B", "≤ 4.5 B")
	rep.add("sealed size per entry", n, float64(s.Segment().Size())/float64(n), "B", "")

	path := filepath.Join(dir, "again")
	var m0, m1 runtime.MemStats
	runtime.ReadMemStats(&m0)
	t = time.Now()
	if _, err := s.Seal(path, filter.Mark{}); err != nil {
		return err
	}
	rep.add("seal", n, time.Since(t).Seconds(), "s", "")
	runtime.ReadMemStats(&m1)
	rep.add("all that sealing allocates, per sealed byte", n, float64(m1.TotalAlloc-m0.TotalAlloc)/float64(s.Segment().Size()), "B", "≤ 2 B")
	t = time.Now()
	g, err := filter.OpenSegment(path)
	if err != nil {
		return err
	}
	rep.add("open and verify (warm start)", n, time.Since(t).Seconds(), "s", "≤ 0.5 s")
	t = time.Now()
	if err := g.Verify(); err != nil {
		return err
	}
	rep.add("one scrub pass, at full speed", n, time.Since(t).Seconds(), "s", "")

	call := session.Call{}
	now := session.Moment{Authority: 1}
	denied := 0
	check := func(s *filter.Set) func(i int) {
		return func(i int) {
			if m, err := s.Decide(ps[i&(len(ps)-1)], &call, now); err != nil || m.Record != nil {
				denied++
			}
		}
	}
	rep.add("check, mean", n, perOp(1<<20, check(s)), "ns", "")
	idle := sample(1<<21, nil, check(s))
	rep.add("check, p50", n, idle.at(.5), "ns", p50goal)
	rep.add("check, p99", n, idle.at(.99), "ns", "")
	rep.add("check, p99.9", n, idle.at(.999), "ns", p999goal)
	if denied > 0 {
		return errDenied
	}
	rep.parallel(n, s, ps)

	// Kinds that the identity lacks.
	other, err := build(min(n, 1_000_000), []session.Kind{session.KindDigest, session.KindBlueprint}, "")
	if err != nil {
		return err
	}
	rep.add("check, entries of other kinds only", n, perOp(1<<22, check(other)), "ns", "≤ 25 ns")

	// Revoked: a session of each caller, merged into the file.
	rev := s
	for at := 0; at < len(ps); at += 1000 {
		b := &session.Batch{Number: uint64(n + at)}
		for _, p := range ps[at:min(at+1000, len(ps))] {
			b.Entries = append(b.Entries, session.Entry{Op: session.OpSet, Effect: session.EffectRevoked, Reason: session.ReasonCompromised, Incident: "INC-7", Key: p.Keys()[2]})
		}
		rev = rev.Apply(b, nil)
	}
	if g, err = rev.Seal(filepath.Join(dir, "revoked"), filter.Mark{}); err != nil {
		return err
	}
	missed, sealed := 0, g.Set()
	l := sample(1<<19, nil, func(i int) {
		if m, err := sealed.Decide(ps[i&(len(ps)-1)], &call, now); err != nil || m.Record == nil || m.Record.Incident != "INC-7" {
			missed++
		}
	})
	if missed > 0 {
		return errors.New("a revoked caller was allowed")
	}
	rep.add("check of a revoked caller, p50", n, l.at(.5), "ns", "≤ 2 µs")

	rep.applying(n, s)
	return rep.meanwhile(n, s, dir, ps, idle, check)
}

// parallel compares one core with two.
func (r *report) parallel(n int, s *filter.Set, ps []*session.Prepared) {
	rate := cores(time.Second, func(i int) {
		call := session.Call{}
		_, _ = s.Decide(ps[i&(len(ps)-1)], &call, session.Moment{}) // timed only
	})
	r.add("throughput of two cores to one", n, rate, "×", "≥ 1.8 ×")
}

// applying measures the apply rate on one core, the merges left to others.
func (r *report) applying(n int, s *filter.Set) {
	var bs []*session.Batch
	batches(100_000, 77, kinds, func(b *session.Batch) { bs = append(bs, b) })
	best := time.Duration(1 << 62)
	for range 5 {
		runtime.GC()
		x := s
		t := time.Now()
		for _, b := range bs {
			x = x.Apply(b, nil)
		}
		best = min(best, time.Since(t))
	}
	r.add("apply, batches of 1,000, one core", n, 0.1/best.Seconds(), "M/s", "≥ 3 M/s")
}

// meanwhile measures checks while 50,000 entries a second come in, and during a
// merge.
func (r *report) meanwhile(n int, s *filter.Set, dir string, ps []*session.Prepared, idle latencies, check func(*filter.Set) func(int)) error {
	var now atomic.Pointer[filter.Set]
	now.Store(s)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		rnd := rand.New(rand.NewPCG(3, 3))
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		for number := uint64(1 << 30); ; number++ {
			b := &session.Batch{Number: number, Time: 1.7e12 + session.Instant(number)}
			for range 1000 {
				b.Entries = append(b.Entries, session.Entry{Op: session.OpSet, Effect: session.EffectRevoked, Key: randomKey(rnd, kinds)})
			}
			select {
			case <-stop:
				return
			case <-tick.C:
				now.Store(now.Load().Apply(b, nil))
			}
		}
	})
	call, at := session.Call{}, session.Moment{Authority: 1}
	l := sample(1<<21, nil, func(i int) {
		_, _ = now.Load().Decide(ps[i&(len(ps)-1)], &call, at) // timed only
	})
	close(stop)
	wg.Wait()
	r.add("check while 50,000 entries/s are applied, p50 to idle", n, l.at(.5)/idle.at(.5), "×", "≤ 1.3 ×")
	r.add("check while 50,000 entries/s are applied, p99.9 to idle", n, l.at(.999)/idle.at(.999), "×", "≤ 3 ×")

	merged := make(chan struct{})
	var err error
	wg.Go(func() {
		defer close(merged)
		_, err = now.Load().SealBeside(context.Background(), filepath.Join(dir, "merged"), filter.Mark{})
	})
	l = sample(1<<25, merged, check(now.Load()))
	wg.Wait()
	r.add("check during a merge, p50 to idle", n, l.at(.5)/idle.at(.5), "×", "≤ 1.3 ×")
	r.add("check during a merge, p99.9 to idle", n, l.at(.999)/idle.at(.999), "×", "≤ 3 ×")
	return err
}
