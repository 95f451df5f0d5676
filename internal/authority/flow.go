package authority

import (
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/interlock-fabric/interlock/internal/access"
	"github.com/interlock-fabric/interlock/pkg/authority"
)

// maxFlow bounds the totals that are kept.
const maxFlow = 1 << 14

// flow counts the calls that enforcers allowed and denied, over their restarts, and
// what there was when each stage of a restore began. The zero value has counted
// nothing. It is safe for concurrent use.
type flow struct {
	mu sync.Mutex
	// of are the enforcers' newest totals, and sums what they come to.
	of   map[string]totals
	sums map[string]totals
	from map[string]stageMark // by restore
}

type totals struct {
	boot            [16]byte
	denied, allowed uint64
}

type stageMark struct {
	taken int
	since time.Time
	at    map[string]totals
}

// denied takes an enforcer's total of denied checks, and allowed one of allowed
// calls, of a boot.
func (f *flow) denied(name string, boot [16]byte, n uint64) {
	f.add("d "+name, boot, n, func(t *totals) *uint64 { return &t.denied }, name)
}

func (f *flow) allowed(name string, boot [16]byte, n uint64) {
	f.add("a "+name, boot, n, func(t *totals) *uint64 { return &t.allowed }, name)
}

func (f *flow) add(key string, boot [16]byte, n uint64, which func(*totals) *uint64, name string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.of == nil {
		f.of, f.sums, f.from = map[string]totals{}, map[string]totals{}, map[string]stageMark{}
	}
	have, known := f.of[key]
	now, sum := totals{boot: boot}, f.sums[name]
	*which(&now) = n
	switch before := *which(&have); {
	case known && have.boot == boot && n >= before:
		*which(&sum) += n - before
	case known && have.boot != boot:
		*which(&sum) += n
	}
	if len(f.of) >= maxFlow {
		clear(f.of)
	}
	f.of[key], f.sums[name] = now, sum
}

// keep marks the stages that have begun, and forgets the restores that have ended.
func (f *flow) keep(all []restore) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.from == nil {
		if len(all) == 0 {
			return
		}
		f.of, f.sums, f.from = map[string]totals{}, map[string]totals{}, map[string]stageMark{}
	}
	for i := range all {
		x := &all[i]
		if m, ok := f.from[x.ID]; x.State == authority.RestoreRunning && (!ok || m.taken != x.Taken) {
			f.from[x.ID] = stageMark{x.Taken, time.Now().UTC(), maps.Clone(f.sums)}
		} else if x.State != authority.RestoreRunning {
			delete(f.from, x.ID)
		}
	}
}

// figures are what to watch of a restore, as a scope shows it.
func (a *Authority) figures(x *restore, scope access.Scope) *authority.RestoreFigures {
	a.flow.keep([]restore{*x})
	a.flow.mu.Lock()
	m, sums := a.flow.from[x.ID], maps.Clone(a.flow.sums)
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
