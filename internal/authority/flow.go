package authority

import (
	"slices"
	"sync"
	"time"

	"github.com/interlock-fabric/interlock/internal/access"
	"github.com/interlock-fabric/interlock/pkg/authority"
)

// maxFlow bounds the enforcers that are counted.
const maxFlow = 1 << 16

// flow counts the calls that enforcers allowed and denied, over their restarts, and
// what there was when each stage of a restore began. The zero value has counted
// nothing. It is safe for concurrent use.
type flow struct {
	mu   sync.Mutex
	of   map[string]*calls    // by enforcer
	from map[string]stageMark // by restore
}

type calls struct{ denied, allowed counter }

// counter sums a total that begins anew with each boot. What there was when it was
// first heard of does not count.
type counter struct {
	known     bool
	boot      [16]byte
	last, sum uint64
}

func (c *counter) add(boot [16]byte, n uint64) {
	switch {
	case c.known && c.boot == boot && n >= c.last:
		c.sum += n - c.last
	case c.known && c.boot != boot:
		c.sum += n
	}
	c.known, c.boot, c.last = true, boot, n
}

type totals struct{ denied, allowed uint64 }

type stageMark struct {
	taken int
	since time.Time
	at    map[string]totals
}

// denied takes an enforcer's total of denied checks, and allowed one of allowed
// calls, of a boot.
func (f *flow) denied(name string, boot [16]byte, n uint64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if c := f.calls(name); c != nil {
		c.denied.add(boot, n)
	}
}

func (f *flow) allowed(name string, boot [16]byte, n uint64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if c := f.calls(name); c != nil {
		c.allowed.add(boot, n)
	}
}

// calls returns an enforcer's counts; nil when there are too many. f.mu is held.
func (f *flow) calls(name string) *calls {
	c := f.of[name]
	if c == nil && len(f.of) < maxFlow {
		if f.of == nil {
			f.of = map[string]*calls{}
		}
		c = &calls{}
		f.of[name] = c
	}
	return c
}

// sums returns what has been counted. f.mu is held.
func (f *flow) sums() map[string]totals {
	out := make(map[string]totals, len(f.of))
	for name, c := range f.of {
		out[name] = totals{c.denied.sum, c.allowed.sum}
	}
	return out
}

// keep marks the stages that have begun, and forgets the restores that have ended.
func (f *flow) keep(all []restore) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.from == nil {
		f.from = map[string]stageMark{}
	}
	for i := range all {
		x := &all[i]
		if m, ok := f.from[x.ID]; x.State == authority.RestoreRunning && (!ok || m.taken != x.Taken) {
			f.from[x.ID] = stageMark{x.Taken, time.Now().UTC(), f.sums()}
		} else if x.State != authority.RestoreRunning {
			delete(f.from, x.ID)
		}
	}
}

// figures are what to watch of a restore, as a scope shows it.
func (a *Authority) figures(x *restore, scope access.Scope) *authority.RestoreFigures {
	a.flow.keep([]restore{*x})
	a.flow.mu.Lock()
	m, sums := a.flow.from[x.ID], a.flow.sums()
	a.flow.mu.Unlock()
	out := &authority.RestoreFigures{Since: m.since}
	view := a.view(scope)
	for _, e := range a.enforcersIn(scope) {
		if x.Tenant != "" && !slices.Contains(e.Tenants, x.Tenant) {
			continue
		}
		out.Enforcers++
		if e.Epoch == x.Epoch && e.Applied >= x.Number {
			out.InEffect++
		}
		switch {
		case e.Canary == nil || e.Condition == authority.ConditionSilent:
		case e.Canary.Armed:
			out.Armed++
		default:
			out.Unarmed++
		}
		out.Running += e.Running
		if view != nil {
			known, _ := a.roster.Find(e.Name)
			if _, whole := view(known.Tenants); !whole {
				continue
			}
		}
		out.Denied += sums[e.Name].denied - m.at[e.Name].denied
		out.Allowed += sums[e.Name].allowed - m.at[e.Name].allowed
	}
	return out
}
