package guard

import (
	"sync"
	"time"

	"github.com/interlock-fabric/interlock/pkg/session"
)

// Work is what runs under a guard: goroutines that its Close joins. It is made by
// NewWork and is safe for concurrent use; nil is one that has been stopped. Hosts
// do not need it, adapters do.
type Work struct {
	stopped chan struct{}

	mu      sync.Mutex
	wg      sync.WaitGroup
	running int // in wg
}

// NewWork returns a Work that has nothing to do yet.
func NewWork() *Work { return &Work{stopped: make(chan struct{})} }

// Stopped returns a channel that is closed by Stop.
func (w *Work) Stopped() <-chan struct{} {
	if w == nil {
		return nil
	}
	return w.stopped
}

// Err returns a *session.DeniedError that wraps session.ErrClosed once the work
// has been stopped, and nil until then. It takes no lock.
func (w *Work) Err() error {
	if w != nil {
		select {
		case <-w.stopped:
		default:
			return nil
		}
	}
	return &session.DeniedError{Err: session.ErrClosed}
}

// Go runs f in a goroutine, unless the work has been stopped: then it returns what
// Err does.
func (w *Work) Go(f func()) error {
	if w == nil {
		return w.Err()
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.Err(); err != nil {
		return err
	}
	w.running++
	w.wg.Go(func() {
		defer func() {
			w.mu.Lock()
			w.running--
			w.mu.Unlock()
		}()
		f()
	})
	return nil
}

// Stop lets nothing more begin. It is idempotent.
func (w *Work) Stop() {
	if w == nil {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.Err() == nil {
		close(w.stopped)
	}
}

// Wait waits, at most as long as timeout, for what has begun to end, and returns
// how much of it has not. The work must have been stopped.
func (w *Work) Wait(timeout time.Duration) (left int) {
	if w == nil {
		return 0
	}
	done := make(chan struct{})
	go func() { // ends with the goroutines that it waits for
		w.wg.Wait()
		close(done)
	}()
	timer := time.NewTimer(timeout)
	defer timer.Stop()
	select {
	case <-done:
		return 0
	case <-timer.C:
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.running
}
