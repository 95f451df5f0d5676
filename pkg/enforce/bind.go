package enforce

import (
	"context"
	"errors"
	"iter"
	"sync"
	"sync/atomic"
	"time"

	"github.com/interlock-fabric/interlock/pkg/session"
)

// registry is the running work, found by any key that could end it.
type registry struct {
	mu     sync.Mutex
	all    map[*work]struct{}
	byKey  map[session.Key]*place // the first of a list
	closed error
	// demand is the least MaxStale that any call has asked for, and soonest is
	// not after the first end of a credential; both may be too early.
	demand  time.Duration
	soonest session.Instant
	n       atomic.Int64 // len(all)
}

// place is a work's place in the list of one of its keys. Lists, and not maps of
// their own, because most keys have one work and every request binds.
type place struct {
	w          *work
	prev, next *place
}

// work is one bound piece of running work.
type work struct {
	p      *session.Prepared
	call   session.Call
	keys   []session.Key
	places []place         // by keys
	ends   session.Instant // of the credential, zero when it has none
	cancel context.CancelCauseFunc
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
		r.byKey = map[session.Key]*place{}
	}
	r.all[w] = struct{}{}
	r.n.Add(1)
	if w.call.MaxStale > 0 && (r.demand == 0 || w.call.MaxStale < r.demand) {
		r.demand = w.call.MaxStale
	}
	if w.ends != 0 && (r.soonest == 0 || w.ends < r.soonest) {
		r.soonest = w.ends
	}
	w.places = make([]place, len(w.keys))
	for i, k := range w.keys {
		at, first := &w.places[i], r.byKey[k]
		at.w, at.next = w, first
		if first != nil {
			first.prev = at
		}
		r.byKey[k] = at
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
	r.n.Add(-1)
	for i, k := range w.keys {
		at := &w.places[i]
		if at.next != nil {
			at.next.prev = at.prev
		}
		switch {
		case at.prev != nil:
			at.prev.next = at.next
		case at.next != nil:
			r.byKey[k] = at.next
		default:
			delete(r.byKey, k)
		}
	}
	if len(r.all) == 0 {
		r.demand, r.soonest = 0, 0
	}
	return true
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
			if w.p.Valid() && w.p.Tenant() == k.Tenant {
				into[w] = struct{}{}
			}
		}
	default:
		for at := r.byKey[k]; at != nil; at = at.next {
			into[at.w] = struct{}{}
		}
	}
}

// due returns the work whose credential has ended by now.
func (r *registry) due(now session.Instant) (out []*work) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.soonest == 0 || now < r.soonest {
		return nil
	}
	r.soonest = 0
	for w := range r.all {
		switch {
		case w.ends == 0:
		case w.ends <= now:
			out = append(out, w)
		case r.soonest == 0 || w.ends < r.soonest:
			r.soonest = w.ends
		}
	}
	return out
}

func (r *registry) strictest() time.Duration {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.demand
}

func (r *registry) len() int { return int(r.n.Load()) }

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
			w.cancel(cause)
		}
	}
}

// Bind ties running work to its caller. The returned context ends, with a
// *session.DeniedError as its cause (context.Cause), when an entry that matches
// comes into force, when the credential expires, when the state has been stale
// for longer than MaxStaleRunning or than the call permits, or when the enforcer
// is closed. Entries cut at once; expiry and staleness are noticed within 50 ms.
//
// Bind checks first, and again after registering, so that nothing slips between
// a check and the start of the work. If it denies, the error is a
// *session.DeniedError and the context has ended already. Call the CancelFunc
// when the work is done; it may be called more than once. In shadow mode nothing
// is denied and nothing is cut.
func (e *Enforcer) Bind(ctx context.Context, p *session.Prepared, call session.Call) (context.Context, context.CancelFunc, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	refuse := func(err error) (context.Context, context.CancelFunc, error) {
		cancel(err)
		return ctx, func() {}, err
	}
	if err := e.Check(p, call); err != nil {
		return refuse(err)
	}
	if e.opts.checked != nil {
		e.opts.checked()
	}
	w := &work{p: p, call: call, cancel: cancel}
	if p.Valid() { // always, but in shadow mode
		keys, err := p.CallKeys(append(w.keys, p.Keys()...), &call, session.PerCallShapes)
		if err != nil {
			if err := e.denied(asDenied(err)); err != nil {
				return refuse(err)
			}
		}
		w.keys = keys
		if exp := p.Expires(); exp != 0 {
			w.ends = exp.Add(p.Skew())
		}
	}
	if err := e.bound.add(w, e.opts.MaxBound); err != nil {
		if err := e.denied(asDenied(err)); err != nil {
			return refuse(err)
		}
	}
	if e.opts.Mode != session.ModeShadow {
		if err := e.Check(p, call); err != nil {
			e.bound.remove(w)
			return refuse(err)
		}
	}
	return ctx, func() {
		e.bound.remove(w)
		cancel(context.Canceled)
	}, nil
}

func asDenied(err error) *session.DeniedError {
	var d *session.DeniedError
	if errors.As(err, &d) {
		return d
	}
	return &session.DeniedError{Err: err}
}

// watch ends running work whose credential has expired or whose state has become
// too old. It shares no lock and no queue with what could hold the follower up.
func (e *Enforcer) watch(ctx context.Context) {
	tick := time.NewTicker(tickEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if e.bound.len() == 0 {
			continue
		}
		v, now := e.view.Load(), e.opts.clock()
		strictest := session.Call{Strict: true, MaxStale: e.bound.strictest()}
		works := e.bound.due(v.latest(now))
		if v.stale(&strictest, now, e.opts.MaxStaleRunning) != "" || e.opts.Agents != nil && v.agentsStale(&strictest, now, e.opts.Agents.MaxAge) != "" {
			works = e.bound.snapshot()
		}
		for _, w := range works {
			e.reconsider(v, w, now)
		}
	}
}

// cut ends those of the given works that the view denies, and returns how many.
func (e *Enforcer) cut(v *view, works iter.Seq[*work]) (n int) {
	now := e.opts.clock()
	for w := range works {
		n += e.reconsider(v, w, now)
	}
	return n
}

func (e *Enforcer) reconsider(v *view, w *work, now reading) int {
	if e.opts.Mode == session.ModeShadow {
		return 0
	}
	d := e.judge(v, w.p, &w.call, now, e.opts.MaxStaleRunning).denied
	if d == nil || !e.bound.remove(w) {
		return 0
	}
	e.count.cut.Add(1)
	w.cancel(d)
	return 1
}
