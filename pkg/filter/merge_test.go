package filter

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/interlock-fabric/interlock/pkg/session"
)

// TestAMergeBesideChecksRests: three quarters of the time are the checks', unless
// the delta grows faster than that lets the merge finish.
func TestAMergeBesideChecksRests(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		set := filled(2000)
		ctx, cancel := context.WithCancel(t.Context())
		p := newPacer(ctx, set)
		rested := func() time.Duration {
			t.Helper()
			began := time.Now()
			if err := p.rest(); err != nil {
				t.Fatal(err)
			}
			return time.Since(began)
		}
		if d := rested(); d != 0 {
			t.Errorf("rested %v before it had worked", d)
		}
		for range 2 {
			time.Sleep(workFor)
			if d := rested(); d != restFor {
				t.Errorf("rested %v", d)
			}
		}
		next := set
		for n := uint64(100); next.Delta() <= int(p.limit); n++ {
			b := batch(n)
			for i := range session.MaxBatchEntries {
				b.Entries = append(b.Entries, put(session.EffectRevoked, sessionKey(int(n)*session.MaxBatchEntries+i)))
			}
			next = next.Apply(b, nil)
		}
		time.Sleep(workFor)
		if d := rested(); d != 0 {
			t.Errorf("rested %v with %d changes waiting, the limit being %d", d, next.Delta(), p.limit)
		}
		p = newPacer(ctx, set)
		p.limit = 1 << 40
		time.Sleep(workFor)
		time.AfterFunc(workFor, cancel)
		began := time.Now()
		if err := p.rest(); !errors.Is(err, context.Canceled) || time.Since(began) != workFor {
			t.Errorf("%v after %v", err, time.Since(began))
		}
	})
}

// TestTheLimitOfRestIsBeforeApplyMerges: a merge that rests must be done before
// Apply makes one itself.
func TestTheLimitOfRestIsBeforeApplyMerges(t *testing.T) {
	t.Parallel()
	var set *Set
	few := 0
	for _, n := range []int{1, 1000, mergeFloor, mergeLast - 3000} {
		set, few = grown(set, few, n), n
		if p := newPacer(t.Context(), set); int(p.limit) < set.Delta() || int(p.limit) >= mergeAt(nil) {
			t.Errorf("%d changes: rest until %d, Apply merges at %d", set.Delta(), p.limit, mergeAt(nil))
		}
	}
}

// TestAMergeIsDue: beyond a floor, and beyond a higher one in a burst; both of them
// an eighth of a segment that is larger.
func TestAMergeIsDue(t *testing.T) {
	t.Parallel()
	beforeFloor := filled(mergeFloor - 1000)
	floor := grown(beforeFloor, mergeFloor-1000, mergeFloor+1)
	burst := grown(floor, mergeFloor+1, mergeBurst-1000)
	beyond := grown(burst, mergeBurst-1000, mergeBurst+1)
	within := func(rows int) *Set {
		s := *beyond
		s.seg = &Segment{rows: rows}
		return &s
	}
	for name, x := range map[string]struct {
		set          *Set
		due, overdue bool
	}{
		"nothing":          {nil, false, false},
		"the floor":        {beforeFloor, false, false},
		"beyond the floor": {floor, true, false},
		"a burst":          {burst, true, false},
		"beyond a burst":   {beyond, true, true},
		"an eighth":        {within(4 * mergeBurst), true, true},
		"a large segment":  {within(16 * mergeBurst), false, false},
	} {
		if due, overdue := x.set.Due(), x.set.Overdue(); due != x.due || overdue != x.overdue {
			t.Errorf("%s, %d changes: due %t, overdue %t", name, x.set.Delta(), due, overdue)
		}
	}
}

// TestAMergeBesideChecksEnds: with its context, leaving nothing behind.
func TestAMergeBesideChecksEnds(t *testing.T) {
	dir := t.TempDir()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	g, err := filled(100_000).SealBeside(ctx, filepath.Join(dir, "segment"), Mark{})
	if g != nil || !errors.Is(err, context.Canceled) {
		t.Fatal(g, err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Fatal(left, err)
	}
}

// TestSealingNeedsNoMoreThanTwiceWhatItMakes watches the heap while a state is
// sealed.
func TestSealingNeedsNoMoreThanTwiceWhatItMakes(t *testing.T) {
	const n = 200_000
	set := filled(n)
	g, err := set.Seal("", Mark{})
	if err != nil {
		t.Fatal(err)
	}
	set = set.onto(g).Apply(batch(1000, put(session.EffectRevoked, userKey)), nil)
	for name, path := range map[string]string{"on the heap": "", "in a file": filepath.Join(t.TempDir(), "segment")} {
		live := func() uint64 {
			var m runtime.MemStats
			runtime.GC()
			runtime.ReadMemStats(&m)
			return m.HeapAlloc
		}
		before := live()
		var peak, stop atomic.Uint64
		watched := make(chan struct{})
		go func() {
			defer close(watched)
			for stop.Load() == 0 {
				peak.Store(max(peak.Load(), live()))
			}
		}()
		g, err := set.Seal(path, Mark{})
		stop.Store(1)
		<-watched
		if err != nil {
			t.Fatal(err)
		}
		used, size := peak.Load()-min(peak.Load(), before), uint64(g.Size())
		t.Logf("%s: %.2f times the sealed size", name, float64(used)/float64(size))
		if used > 2*size {
			t.Errorf("%s: %d bytes for a segment of %d", name, used, size)
		}
	}
}
