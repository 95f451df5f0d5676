package proxy

import (
	"log/slog"
	"sync"
	"time"
)

// summaryEvery is how often the same warning about the same route is written at
// most.
const summaryEvery = 10 * time.Second

// repeats writes warnings that may come once for each request: the first at once,
// and then, every summaryEvery and at the end, how many more there were, with the
// latest error. Nothing is written of a while in which there were none. It is safe
// for concurrent use.
type repeats struct {
	log *slog.Logger
	wg  sync.WaitGroup // timers that have not run

	mu     sync.Mutex
	closed bool
	all    map[repeatedKey]*repeated
}

type repeatedKey struct{ message, route string }

// repeated is what has not been written of a warning.
type repeated struct {
	times int
	last  error
	timer *time.Timer
}

func newRepeats(log *slog.Logger) *repeats {
	return &repeats{log: log, all: make(map[repeatedKey]*repeated)}
}

// warn warns. message must be one of few, and hold nothing of a request.
func (r *repeats) warn(message, route string, err error) {
	k := repeatedKey{message, route}
	r.mu.Lock()
	x := r.all[k]
	if x != nil {
		x.times++
		x.last = err
		r.mu.Unlock()
		return
	}
	if !r.closed {
		x = &repeated{}
		r.all[k] = x
		r.wg.Add(1)
		x.timer = time.AfterFunc(summaryEvery, func() { r.summarize(k, x) })
	}
	r.mu.Unlock()
	r.log.Warn(message, "route", route, "error", err)
}

// summarize writes what has come since the last time, and forgets the warning when
// that is nothing.
func (r *repeats) summarize(k repeatedKey, x *repeated) {
	r.mu.Lock()
	times, last := x.times, x.last
	x.times, x.last = 0, nil
	again := times > 0 && !r.closed
	if again {
		x.timer.Reset(summaryEvery)
	} else {
		delete(r.all, k)
	}
	r.mu.Unlock()
	if times > 0 {
		r.log.Warn(k.message, "route", k.route, "error", last, "times", times)
	}
	if !again {
		r.wg.Done()
	}
}

// close writes what is left, and joins. What comes after it is written at once. It
// is idempotent.
func (r *repeats) close() {
	r.mu.Lock()
	r.closed = true
	var left []func()
	for k, x := range r.all {
		if x.timer.Stop() {
			left = append(left, func() { r.summarize(k, x) })
		}
	}
	r.mu.Unlock()
	for _, f := range left {
		f()
	}
	r.wg.Wait()
}
