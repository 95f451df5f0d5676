// Package trailprom shows a recorder's totals to Prometheus.
package trailprom

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/interlock-fabric/interlock/pkg/internal/snapshotprom"
	"github.com/interlock-fabric/interlock/pkg/trail"
)

// Source is what is shown; *trail.Recorder is one. Stats must be safe for
// concurrent use.
type Source interface{ Stats() trail.Stats }

// New returns a collector of the source's totals. The metrics carry the constant
// label "enforcer".
func New(enforcer string, s Source) prometheus.Collector {
	c := snapshotprom.New("interlock_trail_", enforcer, s.Stats)
	c.Total("calls", "Decisions that were noted.", func(s *trail.Stats) uint64 { return s.Calls })
	c.Total("denied", "Calls denied or cut.", func(s *trail.Stats) uint64 { return s.Denied })
	c.Total("sampled", "Allowed calls chosen to be recorded.", func(s *trail.Stats) uint64 { return s.Sampled })
	c.Total("dropped", "Samples dropped again for want of room.", func(s *trail.Stats) uint64 { return s.Dropped })
	c.Total("folded", "Denials of which only the cause was kept.", func(s *trail.Stats) uint64 { return s.Folded })
	c.Total("untracked", "Sightings that gave way before they were reported.", func(s *trail.Stats) uint64 { return s.Untracked })
	c.Total("reports", "Reports that the bus took.", func(s *trail.Stats) uint64 { return s.Reports })
	c.Total("failures", "Attempts to publish that came to nothing.", func(s *trail.Stats) uint64 { return s.Failures })
	c.Gauge("denials_held", "Distinct denials held.", func(s *trail.Stats) float64 { return float64(s.Denials) })
	c.Gauge("samples_waiting", "Samples that wait to be sent.", func(s *trail.Stats) float64 { return float64(s.Samples) })
	return c
}
