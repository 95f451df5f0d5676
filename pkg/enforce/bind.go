package enforce

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/interlock-fabric/interlock/pkg/session"
)

// registry is the running work, found by any key that could end it.
type registry struct {
	mu     sync.Mutex
	all    map[*work]struct{}
	byKey  map[session.Key]map[*work]struct{}
	closed error
	// demand is the least MaxStale that any call has asked for.
	demand time.Duration
}

// work is one bound piece of running work.
type work struct {
	p      *session.Prepared
	call   session.Call
	keys   []session.Key
	cancel context.CancelCauseFunc

	mu     sync.Mutex
	expiry *time.Timer
	ended  bool
}

// add registers w, unless there is no room or the enforcer is closed.
func (r *registry) add(w *work, limit int) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed != nil {
		return r.closed
	}
	if len(r.all) >= limit {
		return &session.DeniedError{Err: session.ErrOverloaded, Detail: "too much work is running"}
	}
	if r.all == nil {
		r.all = map[*work]struct{}{}
		r.byKey = map[session.Key]map[*work]struct{}{}
	}
	r.all[w] = struct{}{}
	if w.call.MaxStale > 0 && (r.demand == 0 || w.call.MaxStale < r.demand) {
		r.demand = w.call.MaxStale
	}
	for _, k := range w.keys {
		if r.byKey[k] == nil {
			r.byKey[k] = map[*work]struct{}{}
		}
		r.byKey[k][w] = struct{}{}
	}
	return nil
}

// remove reports whether w was still registered: whoever removes it is the one
// that ends it.
func (r *registry) remove(w *work) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, ok := r.all[w]; !ok {
		return false
	}
	delete(r.all, w)
	for _, k := range w.keys {
		delete(r.byKey[k], w)
		if len(r.byKey[k]) == 0 {
			delete(r.byKey, k)
		}
	}
	return true
}

func (r *registry) has(w *work) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	_, ok := r.all[w]
	return ok
}

// touched adds to into the work that an entry under k may end.
func (r *registry) touched(k session.Key, into map[*work]struct{}) {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch session.Kind(k.Shape) {
	case session.KindGlobal:
		for w := range r.all {
			into[w] = struct{}{}
		}
	case session.KindTenant:
		for w := range r.all {
			if w.p.Tenant() == k.Tenant {
				into[w] = struct{}{}
			}
		}
	default:
		for w := range r.byKey[k] {
			into[w] = struct{}{}
		}
	}
}

func (r *registry) strictest() time.Duration {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.demand
}

func (r *registry) len() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.all)
}

func (r *registry) snapshot() []*work {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := make([]*work, 0, len(r.all))
	for w := range r.all {
		out = append(out, w)
	}
	return out
}

func (r *registry) close(cause error) {
	r.mu.Lock()
	r.closed = cause
	r.mu.Unlock()
	for _, w := range r.snapshot() {
		if r.remove(w) {
			w.end(cause)
		}
	}
}

func (w *work) end(cause error) {
	w.mu.Lock()
	w.ended = true
	if w.expiry != nil {
		w.expiry.Stop()
	}
	w.mu.Unlock()
	w.cancel(cause)
}

// Bind ties running work to its caller. The returned context ends, with a
// *session.DeniedError as its cause (context.Cause), when an entry that matches
// comes into force, when the credential expires, or when the state has been
// stale for longer than MaxStaleRunning or than the call permits. Bind checks
// first, and again after registering, so that nothing slips between a check and
// the start of the work. If it denies, the error is a *session.DeniedError and
// the context has ended already. Call the CancelFunc when the work is done.
func (e *Enforcer) Bind(ctx context.Context, p *session.Prepared, call session.Call) (context.Context, context.CancelFunc, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	refuse := func(err error) (context.Context, context.CancelFunc, error) {
		cancel(err)
		return ctx, func() {}, err
	}
	if err := e.Check(p, call); err != nil {
		return refuse(err)
	}
	if e.opts.Mode == session.ModeShadow && (!p.Valid() || !e.serves(p)) {
		// Nothing to register it by.
		return ctx, func() { cancel(context.Canceled) }, nil
	}
	w := &work{p: p, call: call, cancel: cancel}
	w.keys = append(w.keys, p.Keys()...)
	keys, err := p.CallKeys(w.keys, &call, session.PerCallShapes)
	if err != nil && e.opts.Mode != session.ModeShadow {
		return refuse(e.denied(asDenied(err)))
	}
	w.keys = keys
	if err := e.bound.add(w, e.opts.MaxBound); err != nil {
		if e.opts.Mode == session.ModeShadow && !errors.Is(err, session.ErrClosed) {
			e.count.wouldDeny.Add(1)
			return ctx, func() { cancel(context.Canceled) }, nil
		}
		e.count.denied.Add(1)
		return refuse(err)
	}
	e.watchExpiry(w)
	release := func() {
		e.bound.remove(w)
		w.end(context.Canceled)
	}
	if err := e.Check(p, call); err != nil {
		e.bound.remove(w)
		w.end(err)
		return refuse(err)
	}
	return ctx, release, nil
}

func asDenied(err error) *session.DeniedError {
	var d *session.DeniedError
	if errors.As(err, &d) {
		return d
	}
	return &session.DeniedError{Err: err}
}

// cut ends the given work if the view denies it, and returns how much it ended.
func (e *Enforcer) cut(v *view, works map[*work]struct{}) (n int) {
	now := e.opts.clock()
	for w := range works {
		n += e.reconsider(v, w, now)
	}
	return n
}

// sweep does the same for all running work, if the state has become too old for
// any of it.
func (e *Enforcer) sweep(v *view) (n int) {
	now := e.opts.clock()
	strictest := session.Call{Strict: true, MaxStale: e.bound.strictest()}
	if e.stale(v, &strictest, now, e.opts.MaxStaleRunning) == nil {
		return 0
	}
	for _, w := range e.bound.snapshot() {
		n += e.reconsider(v, w, now)
	}
	return n
}

func (e *Enforcer) reconsider(v *view, w *work, now reading) int {
	d := e.judge(v, w.p, &w.call, now, e.opts.MaxStaleRunning)
	if d == nil || e.opts.Mode == session.ModeShadow || !e.bound.remove(w) {
		return 0
	}
	e.count.cut.Add(1)
	w.end(d)
	return 1
}

// watchExpiry ends w when its credential expires. The timer runs on the
// monotonic clock, which may lag the two that decide, so it looks again until
// they agree.
func (e *Enforcer) watchExpiry(w *work) {
	exp := w.p.Expires()
	if exp == 0 {
		return
	}
	left := exp.Add(w.p.Skew()).Time().Sub(time.Unix(0, e.opts.clock().wall))
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.ended {
		return
	}
	w.expiry = time.AfterFunc(max(left, 10*time.Millisecond), func() {
		if e.reconsider(e.view.Load(), w, e.opts.clock()) == 0 && e.bound.has(w) {
			e.watchExpiry(w)
		}
	})
}
