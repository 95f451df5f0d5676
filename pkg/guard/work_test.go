package guard_test

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/interlock-fabric/interlock/pkg/guard"
	"github.com/interlock-fabric/interlock/pkg/session"
)

func TestWorkIsJoined(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, gate := guard.NewWork(), make(chan struct{})
		for range 3 {
			if err := w.Go(func() { <-gate }); err != nil {
				t.Fatal(err)
			}
		}
		if err := w.Go(func() {}); err != nil || w.Err() != nil {
			t.Fatal(err, w.Err())
		}
		select {
		case <-w.Stopped():
			t.Fatal("stopped before Stop")
		default:
		}
		w.Stop()
		w.Stop()
		<-w.Stopped()
		if err := w.Go(func() { t.Error("begun after Stop") }); !errors.Is(err, session.ErrClosed) || !errors.Is(w.Err(), session.ErrClosed) {
			t.Errorf("got %v and %v", err, w.Err())
		}
		begin := time.Now()
		if left, took := w.Wait(time.Minute), time.Since(begin); left != 3 || took != time.Minute {
			t.Errorf("%d are left after %s", left, took)
		}
		go func() {
			time.Sleep(time.Second) // of the bubble's clock
			close(gate)
		}()
		begin = time.Now()
		if left, took := w.Wait(time.Minute), time.Since(begin); left != 0 || took != time.Second {
			t.Errorf("%d are left after %s", left, took)
		}
	})
}

// The zero guard of an adapter has no work, and denies.
func TestNoWorkIsStopped(t *testing.T) {
	var w *guard.Work
	w.Stop()
	if err := w.Go(func() { t.Error("begun") }); !errors.Is(err, session.ErrDenied) || !errors.Is(w.Err(), session.ErrDenied) || w.Wait(time.Minute) != 0 {
		t.Error(err, w.Err())
	}
}

func TestOpenWorkCostsNothingToAskFor(t *testing.T) {
	w := guard.NewWork()
	if n := testing.AllocsPerRun(100, func() {
		if w.Err() != nil {
			t.Fatal("stopped")
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
