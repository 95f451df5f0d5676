package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/interlock-fabric/interlock/pkg/enforce"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// identities is how many callers take turns, so that neither their keys nor what
// they probe stays in the near cache.
const identities = 1 << 14

// check measures Enforcer.Check on an enforcer that is open on a world of n
// entries, with a state directory.
func check(b *bench, n int) (err error) {
	r := b.report
	w, gone, err := b.revokedWorld(n)
	if err != nil {
		return err
	}
	defer w.close()
	ps, err := w.callers("")
	if err != nil {
		return err
	}
	at50 := int(50_000 * pick(b, 2*time.Second, 500*time.Millisecond).Seconds())
	arriving, err := w.signMany(at50, 21)
	if err != nil {
		return err
	}
	merging, err := w.signMany(max(n/8, 1<<17)+10_000, 22)
	if err != nil {
		return err
	}
	w.state = nil // the files have it
	state := filepath.Join(b.dir, "enforcer")
	e, err := w.open(b.ctx, state)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, e.Close()) }()

	samples := pick(b, 1<<21, 1<<15)
	call := session.Call{}
	var wrong atomic.Int64
	allowed := func(i int) {
		if e.Check(ps[i&(identities-1)], call) != nil {
			wrong.Add(1)
		}
	}
	for i := range identities {
		allowed(i) // warm
	}
	if wrong.Load() > 0 {
		return errDenied
	}

	control := sample(samples, nil, func(int) {})
	r.add("control: an empty loop, p99.9", n, control.at(.999), "ns", "")
	probes := filterProbes(n, ps)
	floor := sample(samples, nil, probes)
	r.add("control: the filter's probes of the eight keys alone, p50", n, floor.at(.5), "ns", "")
	idle := sample(samples, nil, allowed)
	big := n > 1_000_000
	r.add("Check, p50", n, idle.at(.5), "ns", either(big, "≤ 1.2 µs", "≤ 450 ns"))
	r.add("Check, p50 to the filter's probes", n, idle.at(.5)/floor.at(.5), "×", "≤ 1.2 ×")
	r.add("Check, p99", n, idle.at(.99), "ns", "")
	r.add("Check, p99.9", n, idle.at(.999), "ns", either(big, "≤ 10 µs", "≤ 5 µs"))
	r.add("Check, allocations", n, testing.AllocsPerRun(pick(b, 1<<18, 1<<12), func() { allowed(1) }), "", "≤ 0")

	if err := otherKinds(b, w.keys, n, ps); err != nil {
		return err
	}

	revoked := func(i int) {
		var d *session.DeniedError
		if !errors.As(e.Check(gone[i&(identities-1)], call), &d) || !errors.Is(d, session.ErrRevoked) ||
			d.Reason != session.ReasonCompromised || d.Incident != incident {
			wrong.Add(1)
		}
	}
	l := sample(samples/4, nil, revoked)
	r.add("Check of a revoked caller, reason and incident read, p50", n, l.at(.5), "ns", "≤ 2 µs")
	r.add("Check of a revoked caller, p99.9", n, l.at(.999), "ns", "")

	second := pick(b, time.Second, 100*time.Millisecond)
	r.add("control: two cores to one, arithmetic alone", n, cores(second, spin), "×", "")
	r.add("Check, two cores to one", n, cores(second, allowed), "×", "≥ 1.8 ×")

	if l, err = b.underBatches(w, e, arriving, allowed); err != nil {
		return err
	}
	r.add("Check while 50,000 entries/s arrive, p50 to idle", n, l.at(.5)/idle.at(.5), "×", "≤ 1.3 ×")
	r.add("Check while 50,000 entries/s arrive, p99.9 to idle", n, l.at(.999)/idle.at(.999), "×", "≤ 3 ×")
	r.add("Check while 50,000 entries/s arrive, p99.9", n, l.at(.999), "ns", "")

	l, took, err := b.duringMerge(w, e, merging, state, allowed)
	if err != nil {
		return err
	}
	r.add("Check during a merge, p50 to idle", n, l.at(.5)/idle.at(.5), "×", "≤ 1.3 ×")
	r.add("Check during a merge, p99.9 to idle", n, l.at(.999)/idle.at(.999), "×", "≤ 3 ×")
	r.add("Check during a merge, p99.9", n, l.at(.999), "ns", "")
	r.add("merge, beside checks on one core", n, took.Seconds(), "s", "")
	if x := wrong.Load(); x > 0 {
		return fmt.Errorf("%d verdicts were wrong", x)
	}
	return nil
}

func either(cond bool, yes, no string) string {
	if cond {
		return yes
	}
	return no
}

// filterProbes asks a filter of n keys about each identity's eight keys: what a
// check costs at least.
func filterProbes(n int, ps []*session.Prepared) func(i int) {
	s := sieve{words: make([]uint64, 24*n/64+1)}
	s.m = uint64(64 * len(s.words))
	rnd := weak(1)
	for range n {
		k := randomKey(rnd, kinds)
		s.add(&k)
	}
	ask := make([][8]session.Key, len(ps))
	for i, p := range ps {
		j := 0
		for _, k := range p.Keys() {
			for _, kind := range kinds {
				if k.Shape == session.Shape(kind) && j < 8 {
					ask[i][j] = k
					j++
				}
			}
		}
	}
	hits := 0
	return func(i int) {
		if s.any8(&ask[i&(len(ask)-1)]) {
			hits++
		}
	}
}

// otherKinds measures a check when nothing in force is of a kind that the caller
// has: it costs the freshness comparison and one reading of the clock.
func otherKinds(b *bench, k *keys, n int, ps []*session.Prepared) (err error) {
	dir, err := os.MkdirTemp(b.dir, "other-*")
	if err != nil {
		return err
	}
	path, err := b.segment("other", min(n, 1_000_000), []session.Kind{session.KindDigest, session.KindBlueprint}, nil)
	if err != nil {
		return err
	}
	w, err := newWorld(k, path)
	if err != nil {
		return err
	}
	defer w.close()
	w.state = nil
	e, err := w.open(b.ctx, filepath.Join(dir, "enforcer"))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, e.Close()) }()
	wrong, call := 0, session.Call{}
	ops := pick(b, 1<<22, 1<<16)
	base := time.Now()
	sink := time.Duration(0)
	once := perOp(ops, func(int) {
		t := time.Now()
		sink += t.Sub(base) + time.Duration(t.UnixNano())
	})
	runtime.KeepAlive(sink)
	got := perOp(ops, func(i int) {
		if e.Check(ps[i&(identities-1)], call) != nil {
			wrong++
		}
	})
	if wrong > 0 {
		return errDenied
	}
	b.report.add("control: one reading of the clock, mean", n, once, "ns", "")
	b.report.add("Check, entries of other kinds only, less one reading of the clock", n, got-once, "ns", "≤ 25 ns")
	return nil
}

// cores is the throughput of fn on two cores to that on one, the best of two.
func cores(d time.Duration, fn func(i int)) float64 {
	rate := func(cores int) float64 {
		var total atomic.Int64
		var wg sync.WaitGroup
		ctx, cancel := context.WithTimeout(context.Background(), d)
		defer cancel()
		for c := range cores {
			wg.Go(func() {
				done := int64(0)
				for i := c * 1000; ctx.Err() == nil; {
					for range 256 {
						fn(i)
						i++
					}
					done += 256
				}
				total.Add(done)
			})
		}
		wg.Wait()
		return float64(total.Load())
	}
	one := max(rate(1), rate(1))
	return max(rate(2), rate(2)) / one
}

// spin is work that touches no memory: what a second core adds on this machine.
func spin(i int) {
	x := uint64(i)
	for range 200 {
		x = x*6364136223846793005 + 1442695040888963407
	}
	if x == 0 {
		runtime.Gosched()
	}
}

// underBatches samples checks while signed batches of 1,000 come in, 50 a second.
func (b *bench) underBatches(w *world, e *enforce.Enforcer, arriving []signed, fn func(int)) (latencies, error) {
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		defer close(stop)
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		for _, s := range arriving {
			<-tick.C
			w.say(s)
		}
	})
	l := sample(1<<24, stop, fn)
	wg.Wait()
	ctx, cancel := context.WithTimeout(b.ctx, 10*time.Second)
	defer cancel()
	last := arriving[len(arriving)-1].at.number
	return l, await(ctx, e, func(s enforce.Status) bool { return s.Applied >= last })
}

// duringMerge lets so much arrive that the enforcer merges, and samples checks
// while it does: from when it has a file in the making until that is in place.
func (b *bench) duringMerge(w *world, e *enforce.Enforcer, merging []signed, dir string, fn func(int)) (latencies, time.Duration, error) {
	ctx, cancel := context.WithTimeout(b.ctx, 2*time.Minute)
	defer cancel()
	if inTheMaking(dir) {
		return nil, 0, errors.New("a merge began too early")
	}
	begun, stop := make(chan time.Time, 1), make(chan struct{})
	var ended time.Time
	var wg sync.WaitGroup
	var err error
	wg.Go(func() {
		defer close(stop)
		tick := time.NewTicker(time.Millisecond)
		defer tick.Stop()
		// In parts, so that the enforcer's queue holds them.
		for i, s := range merging {
			if w.say(s); i%32 == 31 || i == len(merging)-1 {
				if err = await(ctx, e, func(x enforce.Status) bool { return x.Confirmed >= s.at.number }); err != nil {
					close(begun)
					return
				}
			}
		}
		for ctx.Err() == nil && !inTheMaking(dir) {
			<-tick.C
		}
		begun <- time.Now()
		for ctx.Err() == nil && inTheMaking(dir) {
			<-tick.C
		}
		ended, err = time.Now(), context.Cause(ctx)
	})
	var l latencies
	at, ok := <-begun
	if ok {
		l = sample(1<<25, stop, fn)
	}
	wg.Wait()
	return l, ended.Sub(at), err
}

// inTheMaking reports whether a segment is being written into dir.
func inTheMaking(dir string) bool {
	names, err := os.ReadDir(dir)
	if err != nil {
		return false
	}
	for _, x := range names {
		if strings.HasSuffix(x.Name(), ".tmp") {
			return true
		}
	}
	return false
}
