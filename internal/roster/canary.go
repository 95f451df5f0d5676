package roster

import (
	"fmt"
	"slices"
	"time"

	"github.com/interlock-fabric/interlock/pkg/authority"
	"github.com/interlock-fabric/interlock/pkg/session"
)

const (
	// canaryGrace is how long an enforcer has for a canary: to apply it, and
	// for the receipt to arrive.
	canaryGrace = 3 * time.Second
	// maxCanaries is how many canaries are remembered: more than there are in
	// the grace.
	maxCanaries = 64
)

// canaries are the canaries that the authorities decided, oldest first, all of
// one epoch.
type canaries struct {
	epoch uint64
	list  []canary
}

type canary struct {
	number uint64
	at     time.Time
}

// Canary takes note of a canary that was decided, at the authority's time at.
func (t *Tracker) Canary(epoch, number uint64, at time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	c := &t.canaries
	if epoch != c.epoch {
		c.epoch, c.list = epoch, nil
	}
	if n := len(c.list); n > 0 && number <= c.list[n-1].number {
		return // said again
	}
	if len(c.list) >= maxCanaries {
		c.list = slices.Delete(c.list, 0, 1)
	}
	c.list = append(c.list, canary{number, at})
}

// due returns the newest canary that everybody must have denied by now.
func (c *canaries) due(now time.Time) (canary, bool) {
	for _, x := range slices.Backward(c.list) {
		if now.Sub(x.at) >= canaryGrace {
			return x, true
		}
	}
	return canary{}, false
}

// memberCanary is what one enforcer said of canaries.
type memberCanary struct {
	epoch  uint64
	last   session.Canary
	millis float64 // of the last one that was denied
	took   Histogram
}

// take takes the canary of a receipt that is believed.
func (m *memberCanary) take(r *session.Receipt, log Log) {
	c := *r.Canary
	if m.epoch == r.Epoch && c.Number <= m.last.Number {
		return
	}
	m.epoch, m.last = r.Epoch, c
	decided, ok := log.TimeAt(r.Epoch, c.Number)
	if !ok || !c.Denied {
		return
	}
	took := time.Unix(0, c.At).Sub(decided)
	if took <= 0 {
		took = r.Error // sooner than the clocks can tell apart
	}
	m.millis = millis(took)
	m.took.add(took)
}

// armed says what the canaries show of an enforcer that has been heard of; nil
// while they show nothing. t.mu is held.
func (t *Tracker) armed(m *member, now time.Time) *authority.Canary {
	due, ok := t.canaries.due(now)
	if !ok || m.since.After(due.at) {
		return nil // it was not there, or not yet
	}
	out := &authority.Canary{Number: m.canary.last.Number, LatencyMillis: m.canary.millis}
	switch {
	case m.canary.epoch == t.canaries.epoch && m.canary.last.Number >= due.number && m.canary.last.Denied:
		out.Armed = true
	case m.canary.epoch == t.canaries.epoch && m.canary.last.Number >= due.number:
		out.Why = m.canary.last.String()
	default:
		out.Why = fmt.Sprintf("no word of the canary at seq %d", due.number)
	}
	return out
}

// Buckets are the upper bounds of a Histogram, in milliseconds; the last bucket
// has none.
var Buckets = [...]float64{1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000}

// Histogram counts durations. The zero value is empty.
type Histogram struct {
	// Counts has, for each of Buckets and for what is beyond, how many fell in.
	Counts [len(Buckets) + 1]uint64
	Sum    time.Duration
}

func (h *Histogram) add(d time.Duration) {
	i, _ := slices.BinarySearch(Buckets[:], millis(d))
	h.Counts[i]++
	h.Sum += d
}

// Total is how many durations were counted.
func (h *Histogram) Total() (n uint64) {
	for _, c := range h.Counts {
		n += c
	}
	return n
}

// Canaries returns each enforcer's times from a canary's decision to its denial,
// by name, since this authority started.
func (t *Tracker) Canaries() map[string]Histogram {
	t.mu.Lock()
	defer t.mu.Unlock()
	out := make(map[string]Histogram, len(t.members))
	for name, m := range t.members {
		out[name] = m.canary.took
	}
	return out
}
