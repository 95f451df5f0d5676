package sequencer

import "sync"

// events is the queue of the writer's goroutine. Adding to it never waits, since
// the writer's goroutine itself adds to it.
type events struct {
	mu     sync.Mutex
	queue  []func()
	closed bool
	ready  chan struct{} // holds one when the queue is not empty
}

func newEvents() *events { return &events{ready: make(chan struct{}, 1)} }

// add reports false when the queue has been closed, or holds limit already; 0 is
// no limit.
func (e *events) add(f func(), limit int) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed || limit > 0 && len(e.queue) >= limit {
		return false
	}
	e.queue = append(e.queue, f)
	select {
	case e.ready <- struct{}{}:
	default:
	}
	return true
}

// all takes what is queued.
func (e *events) all() []func() {
	e.mu.Lock()
	defer e.mu.Unlock()
	q := e.queue
	e.queue = nil
	return q
}

func (e *events) close() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.closed, e.queue = true, nil
}
