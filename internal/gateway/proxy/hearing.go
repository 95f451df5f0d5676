package proxy

import (
	"context"
	"io"
	"time"

	"github.com/interlock-fabric/interlock/internal/gateway/route"
)

// Bounds of listening on, after a cut, for what a task is called.
const (
	listenTime   = 2 * time.Second
	maxListening = 1024
)

// hearing is a stream of events for as long as its task has no name: reading it
// ends with the caller's right to it, and not only with the next event. Whoever is
// cut before the first event would leave an agent at work that nobody can name. So
// the upstream's request is not given up at once then, but listened to for a
// moment longer, without the caller.
type hearing struct {
	io.ReadCloser // the upstream's
	x             *exchange
	find          *finder
	next          chan heard // of the read under way; nil when there is none
	left          []byte
	err           error
}

// heard is what a read has brought.
type heard struct {
	b   []byte
	err error
}

func (x *exchange) hear(body io.ReadCloser, f *finder) *hearing {
	x.exec.mu.Lock()
	defer x.exec.mu.Unlock()
	x.exec.hears = true
	return &hearing{ReadCloser: body, x: x, find: f}
}

func (h *hearing) begin() {
	next := make(chan heard, 1)
	h.next = next
	go func() {
		b := make([]byte, 4<<10)
		n, err := h.ReadCloser.Read(b)
		next <- heard{b[:n], err}
	}()
}

func (h *hearing) Read(p []byte) (int, error) {
	if len(h.left) == 0 && h.err == nil {
		if h.next == nil {
			if h.x.exec.known() {
				return h.ReadCloser.Read(p)
			}
			h.begin()
		}
		select {
		case r := <-h.next:
			h.left, h.err, h.next = r.b, r.err, nil
		case <-h.x.bound.Done():
			return 0, context.Cause(h.x.bound)
		}
	}
	n := copy(p, h.left)
	if h.left = h.left[n:]; len(h.left) > 0 {
		return n, nil
	}
	return n, h.err
}

// Close gives the upstream's request up, or has it listened to.
func (h *hearing) Close() error {
	if h.next != nil && h.x.unnamed() && h.x.p.opts.Tasks.listen(h) {
		return nil
	}
	return h.end()
}

func (h *hearing) end() error {
	h.x.exec.cancel()
	err := h.ReadCloser.Close()
	if h.next != nil {
		<-h.next
	}
	return err
}

// listen waits for the name of a task, and has it cancelled. It reports false when
// it does not.
func (t *Tasks) listen(h *hearing) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed || t.listening >= maxListening {
		return false
	}
	t.listening++
	t.wg.Go(func() {
		ctx, cancel := context.WithTimeout(t.ctx, listenTime)
		defer cancel()
		defer context.AfterFunc(ctx, h.x.exec.cancel)()
		for {
			r := <-h.next
			h.next = nil
			id, over := h.find.look(r.b)
			if id != "" {
				h.x.exec.named(id)
				h.x.cancelTask()
			}
			if over || r.err != nil {
				break
			}
			h.begin()
		}
		_ = h.end() // it is given up
		t.mu.Lock()
		defer t.mu.Unlock()
		t.listening--
	})
	return true
}

// known reports whether the task has a name, as far as it will get one.
func (e *execution) known() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.task != "" || e.silent
}

// unnamed reports whether the caller was cut before anybody could be told which
// task is to be cancelled.
func (x *exchange) unnamed() bool {
	if !ends(route.Denied(x.bound)) {
		return false
	}
	x.exec.mu.Lock()
	defer x.exec.mu.Unlock()
	return x.exec.task == "" && !x.exec.told
}

// mute says that the task will get no name.
func (e *execution) mute() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.silent = true
}
