package sequencer

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/interlock-fabric/interlock/pkg/session"
)

func TestRefusals(t *testing.T) {
	s := newStore(t)
	limited := writerKey(s.key)
	limited.Tenants = []session.TenantID{tenant}
	s.set = s.keySet(t, 1, limited)
	q := s.open(func(o *Options) { o.Quota = func(session.TenantID) int { return 1000 } })
	many := Decision{ID: id(1)}
	for i := range session.MaxBatchEntries + 1 {
		many.Entries = append(many.Entries, revoke(i).Entries...)
	}
	foreign := revoke(2)
	foreign.Entries[0].Key = key(tenant+1, session.KindSession, 2)
	invalid := revoke(3)
	invalid.Entries[0].Key.Tenant = 0
	mixed := revoke(4)
	mixed.Entries = append(mixed.Entries, foreign.Entries...)
	for _, c := range []struct {
		name string
		d    Decision
		want error
	}{
		{"too many entries", many, ErrTooLarge},
		{"no entries", Decision{ID: id(5)}, session.ErrInvalid},
		{"an invalid entry", invalid, session.ErrMalformed},
		{"a tenant that the key has no right to", foreign, ErrUntrusted},
		{"one of several entries so", mixed, ErrUntrusted},
	} {
		if res, err := q.Decide(context.Background(), c.d); !errors.Is(err, c.want) {
			t.Errorf("%s: %+v, %v; want %v", c.name, res, err, c.want)
		}
	}
	if l := readLog(t, s.conn(), q.trust); l.set.Len() != 0 {
		t.Fatalf("%d entries in the log", l.set.Len())
	}
	// A refusal leaves nothing behind: the same ID can be decided after all.
	must(t, decideDurable(q, 4))
}

// The quota is kept to exactly, under concurrency, before anything is
// acknowledged; lifting and the kill of a whole tenant are always possible.
func TestQuota(t *testing.T) {
	s := newStore(t)
	const quota, callers = 50, 200
	q := s.open(func(o *Options) { o.Quota = func(session.TenantID) int { return quota } })
	ctx := context.Background()
	var taken, refused atomic.Int64
	var wg sync.WaitGroup
	for n := range callers {
		wg.Go(func() {
			switch _, err := q.Decide(ctx, revoke(n)); {
			case err == nil:
				taken.Add(1)
			case errors.Is(err, ErrQuota):
				refused.Add(1)
			default:
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if taken.Load() != quota || refused.Load() != callers-quota || q.State().TenantLen(tenant) != quota {
		t.Fatalf("%d taken, %d refused, %d in force", taken.Load(), refused.Load(), q.State().TenantLen(tenant))
	}
	kill := Decision{ID: id(1000), Entries: []session.Entry{{
		Op: session.OpSet, Effect: session.EffectSuspended, Reason: session.ReasonStolenToken, Key: session.TenantKey(tenant),
	}}}
	if _, err := q.Decide(ctx, kill); err != nil {
		t.Fatalf("a kill of the tenant: %v", err)
	}
	var stricter Decision
	for k := range callers {
		if r := revoke(k); len(q.State().Lookup(r.Entries[0].Key)) > 0 {
			stricter = Decision{Entries: r.Entries}
			break
		}
	}
	if _, err := q.Decide(ctx, stricter); err != nil {
		t.Fatalf("what is in force already adds nothing: %v", err)
	}
}

func TestMaxState(t *testing.T) {
	s := newStore(t)
	q := s.open(func(o *Options) { o.MaxState = 3 })
	for n := range 3 {
		must(t, decideDurable(q, n))
	}
	if _, err := q.Decide(context.Background(), revoke(3)); !errors.Is(err, ErrQuota) {
		t.Fatalf("over the bound of the whole state: %v", err)
	}
}

// Entries leave the state by the horizon in the log, and a wall clock that jumps
// a year ahead takes none out before its time.
func TestHorizon(t *testing.T) {
	s := newStore(t)
	var jump atomic.Int64
	q := s.open(func(o *Options) {
		o.Hooks.HorizonEvery = 20 * time.Millisecond
		o.Hooks.Now = func() time.Time { return time.Now().Add(time.Duration(jump.Load())) }
	})
	ctx := context.Background()
	past, future := revoke(1), revoke(2)
	past.Entries[0].Expires = session.InstantOf(time.Now().Add(-2 * horizonMargin))
	future.Entries[0].Expires = session.InstantOf(time.Now().Add(time.Hour))
	for _, d := range []Decision{past, future, revoke(3)} {
		_, err := q.Decide(ctx, d)
		must(t, err)
	}
	gone := func(d Decision) bool { return len(q.State().Lookup(d.Entries[0].Key)) == 0 }
	eventually(t, "what ended leaves the state without another decision", func() bool { return gone(past) })

	jump.Store(int64(12 * time.Hour)) // the key set is good for a day
	_, number, _ := q.Head()
	for n := range 50 {
		must(t, decideDurable(q, 10+n))
	}
	eventually(t, "more of the log", func() bool { _, n, _ := q.Head(); return n >= number+50 })
	if gone(future) || gone(revoke(3)) {
		t.Fatal("a clock that jumped ahead has freed somebody")
	}
	l := readLog(t, s.conn(), q.trust)
	var last session.Batch
	for _, b := range l.batches {
		if b.Horizon < last.Horizon || b.Time < last.Time {
			t.Fatal("the horizon or the time goes back")
		}
		if d := b.Deadline - b.Time; d != session.Instant(session.BatchTTL.Milliseconds()) {
			t.Fatalf("a deadline after %d ms", d)
		}
		last = *b
	}
	if l.set.Digest() != q.State().Digest() {
		t.Fatal("another state than the log's")
	}

	// A clock that goes back does not take the log's time with it.
	jump.Store(int64(-time.Hour))
	must(t, decideDurable(q, 100))
	l = readLog(t, s.conn(), q.trust)
	if b := l.batches[len(l.batches)-1]; b.Time < last.Time {
		t.Fatal("the log's time went back")
	}
}

// The larger the state, the seldomer the horizon moves: what that costs whoever
// applies it grows with the state.
func TestHorizonInterval(t *testing.T) {
	for n, want := range map[int]time.Duration{0: horizonEvery, 999_999: horizonEvery, 10_000_000: 11 * horizonEvery} {
		if got := horizonInterval(n); got != want {
			t.Errorf("%d entries: every %v, want %v", n, got, want)
		}
	}
}

// How far the horizon goes is bounded by the log's time and the monotonic clock.
func TestHorizonBound(t *testing.T) {
	const minute = session.Instant(60_000)
	var h horizon
	start := time.Now()
	h.anchor(100*minute, 500*minute, start)
	for _, c := range []struct {
		wall    session.Instant
		elapsed time.Duration
		want    session.Instant
	}{
		{100 * minute, 0, 99 * minute},
		{101 * minute, 0, 100 * minute},
		{500 * minute, 0, 100 * minute},
		{500 * minute, 10 * time.Minute, 110 * minute},
		{90 * minute, 10 * time.Minute, 89 * minute},
	} {
		if got := h.bound(c.wall, start.Add(c.elapsed)); got != c.want {
			t.Errorf("wall %d after %v: %d, want %d", c.wall/minute, c.elapsed, got/minute, c.want/minute)
		}
	}
}

// Decisions per second, each acknowledged as durable, with every write synced.
func BenchmarkDecide(b *testing.B) {
	for _, callers := range []int{1, 64, 1024} {
		b.Run(fmt.Sprint("callers=", callers), func(b *testing.B) {
			s := newStore(b)
			q := s.open()
			if err := decideDurable(q, 0); err != nil {
				b.Fatal(err)
			}
			_, before, _ := q.Head()
			var next atomic.Int64
			var wg sync.WaitGroup
			b.ResetTimer()
			for range callers {
				wg.Go(func() {
					for n := next.Add(1); n <= int64(b.N); n = next.Add(1) {
						if res, err := q.Decide(context.Background(), revoke(int(n))); err != nil || !res.Durable {
							b.Errorf("%+v, %v", res, err)
							return
						}
					}
				})
			}
			wg.Wait()
			b.StopTimer()
			_, after, _ := q.Head()
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "decisions/s")
			b.ReportMetric(float64(b.N)/float64(max(1, after-before)), "decisions/batch")
		})
	}
}

// TestAFullBatchWaitsForNobody: a decision that fills a batch gains nothing by
// waiting for others while one is in flight.
func TestAFullBatchWaitsForNobody(t *testing.T) {
	now := time.Now()
	for _, x := range []struct {
		decisions []int // entries of each
		size      int   // of each
		full      bool
	}{
		{[]int{1}, 64, false},
		{[]int{session.MaxBatchEntries - 1}, 64, false},
		{[]int{session.MaxBatchEntries}, 64, true},
		{[]int{600, 600}, 64, true},
		{[]int{1, 1}, maxBatchSize / 2, true},
		{[]int{1, 1}, maxBatchSize / 3, false},
	} {
		w := &writer{flight: []*inflight{{first: now}}, pendingAt: now}
		for _, n := range x.decisions {
			w.pending = append(w.pending, &request{d: Decision{Entries: make([]session.Entry, n)}, size: x.size, arrived: now})
		}
		if at := w.flushAt(now); at.Equal(now) != x.full {
			t.Errorf("%d entries of %d bytes: sent after %v", x.decisions, x.size, at.Sub(now))
		}
	}
}
