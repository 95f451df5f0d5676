package authority

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/interlock-fabric/interlock/internal/roster"
	"github.com/interlock-fabric/interlock/pkg/authority"
	"github.com/interlock-fabric/interlock/pkg/session"
)

const (
	// maxTimes is how many batches' times are known.
	maxTimes = 1 << 16
	// backlog is how many events may wait for one watcher.
	backlog = 256
	// maxOpen is how many decisions' coverage is watched at once.
	maxOpen   = 64
	openFor   = 30 * time.Second
	watchTick = 100 * time.Millisecond
)

// errLagged ends a watch whose reader is too slow.
var errLagged = errors.New("authority: the watcher fell behind")

type place struct{ epoch, number uint64 }

// hub hears the log, so that what any authority decides is known here, and tells
// watchers of it.
type hub struct {
	tracker *roster.Tracker
	list    func() []authority.Enforcer
	tenant  func(session.TenantID) string

	mu       sync.Mutex
	times    map[place]noted
	order    []place
	watchers map[*watcher]struct{}
	open     []openDecision
	state    map[string]string
}

// noted is what is known of a batch: when it was decided, and the tenants that it
// touches, sorted. A global entry touches all.
type noted struct {
	at      time.Time
	tenants []session.TenantID
	global  bool
}

// touch adds what the entries touch.
func (n *noted) touch(entries []session.Entry) {
	for i := range entries {
		id := entries[i].Key.Tenant
		if entries[i].Key == session.GlobalKey() {
			n.global = true
		} else if at, ok := slices.BinarySearch(n.tenants, id); !ok {
			n.tenants = slices.Insert(n.tenants, at, id)
		}
	}
}

type openDecision struct {
	place
	since time.Time
}

type watcher struct {
	events chan authority.Event
	lagged chan struct{} // closed, once, by the hub
}

func newHub(tenant func(session.TenantID) string) *hub {
	return &hub{tenant: tenant, times: map[place]noted{}, watchers: map[*watcher]struct{}{}}
}

// note remembers when a batch was decided, and entries of it.
func (h *hub) note(epoch, number uint64, at time.Time, entries []session.Entry) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.remember(place{epoch, number}, at, entries)
}

func (h *hub) remember(p place, at time.Time, entries []session.Entry) {
	n, known := h.times[p]
	if !known {
		if len(h.order) >= maxTimes {
			// A quarter at once, so that forgetting is cheap.
			for _, old := range h.order[:maxTimes/4] {
				delete(h.times, old)
			}
			h.order = append(h.order[:0], h.order[maxTimes/4:]...)
		}
		h.order = append(h.order, p)
	}
	// A batch that was heard and never stored gives way to the one that was.
	n.at = at
	n.touch(entries)
	h.times[p] = n
}

// touches reports whether a batch has an entry of a tenant, by its name, or a
// global one. Of what was decided too long ago, or before the start, it is not
// known, and so it has none.
func (h *hub) touches(epoch, number uint64, has func(tenant string) bool) bool {
	h.mu.Lock()
	n := h.times[place{epoch, number}]
	n.tenants = slices.Clone(n.tenants)
	h.mu.Unlock()
	return n.global || slices.ContainsFunc(n.tenants, func(id session.TenantID) bool { return has(h.tenant(id)) })
}

// tenantsOf returns the names of the tenants that a batch touches, authority.AuditAny
// for a global entry; none of what is not known any more.
func (h *hub) tenantsOf(p place) (names []string) {
	h.mu.Lock()
	n := h.times[p]
	ids := slices.Clone(n.tenants)
	h.mu.Unlock()
	for _, id := range ids {
		names = append(names, h.tenant(id))
	}
	if n.global {
		names = append(names, authority.AuditAny)
	}
	return names
}

// timeAt returns when a batch was decided, if that is known.
func (h *hub) timeAt(epoch, number uint64) (time.Time, bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	n, ok := h.times[place{epoch, number}]
	return n.at, ok
}

// heard takes a batch that was verified.
func (h *hub) heard(b *session.Batch) {
	h.mu.Lock()
	defer h.mu.Unlock()
	p := place{b.Epoch, b.Number}
	h.remember(p, b.Time.Time(), b.Entries)
	if len(h.watchers) == 0 || len(b.Entries) == 0 || b.IsCanary() {
		return // canaries would be all that a watcher sees
	}
	e := authority.DecisionEvent{Epoch: b.Epoch, Number: b.Number, At: b.Time.Time(), Lines: linesOf(b.Entries, h.tenant)}
	h.tell(authority.Event{Type: authority.EventDecision, At: time.Now().UTC(), Decision: &e})
	if len(h.open) >= maxOpen {
		h.open = append(h.open[:0], h.open[1:]...)
	}
	h.open = append(h.open, openDecision{p, time.Now()})
}

// tell is called with mu held.
func (h *hub) tell(e authority.Event) {
	for w := range h.watchers {
		select {
		case w.events <- e:
		default:
			delete(h.watchers, w)
			close(w.lagged)
		}
	}
}

// run tells watchers of coverage and of enforcers that come and go, until ctx
// ends.
func (h *hub) run(ctx context.Context) {
	tick := time.NewTicker(watchTick)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			h.look()
		}
	}
}

func (h *hub) look() {
	h.mu.Lock()
	watched := len(h.watchers) > 0
	open := append([]openDecision(nil), h.open...)
	h.mu.Unlock()
	if !watched {
		h.mu.Lock()
		if len(h.watchers) == 0 { // whoever came meanwhile is to hear of what is open
			h.open, h.state = nil, nil
		}
		h.mu.Unlock()
		return
	}
	// The tracker asks the hub for times, so it is asked without the lock.
	done := map[place]authority.Coverage{}
	for _, o := range open {
		if c := h.tracker.Coverage(o.epoch, o.number, false); c.Complete || time.Since(o.since) > openFor {
			done[o.place] = c
		}
	}
	list := h.list()
	h.mu.Lock()
	defer h.mu.Unlock()
	now := time.Now().UTC()
	keep := h.open[:0]
	for _, o := range h.open {
		c, ok := done[o.place]
		if !ok {
			keep = append(keep, o)
			continue
		}
		h.tell(authority.Event{Type: authority.EventCoverage, At: now, Coverage: &c})
	}
	h.open = keep
	state := make(map[string]string, len(list))
	for i := range list {
		e := list[i]
		state[e.Name] = e.Condition
		if h.state != nil && h.state[e.Name] != e.Condition {
			h.tell(authority.Event{Type: authority.EventEnforcer, At: now, Enforcer: &e})
		}
	}
	h.state = state
}

// watch calls began, and fn with each event from before that on, until ctx ends,
// one of them fails or the reader falls behind.
func (h *hub) watch(ctx context.Context, began func() error, fn func(authority.Event) error) error {
	w := &watcher{events: make(chan authority.Event, backlog), lagged: make(chan struct{})}
	h.mu.Lock()
	h.watchers[w] = struct{}{}
	h.mu.Unlock()
	defer func() {
		h.mu.Lock()
		delete(h.watchers, w)
		h.mu.Unlock()
	}()
	if err := began(); err != nil {
		return err
	}
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-w.lagged:
			return errLagged
		case e := <-w.events:
			if err := fn(e); err != nil {
				return err
			}
		}
	}
}
