// Package trailprom shows a recorder's totals to Prometheus.
package trailprom

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/interlock-fabric/interlock/pkg/trail"
)

// Source is what is shown; *trail.Recorder is one. Stats must be safe for
// concurrent use.
type Source interface{ Stats() trail.Stats }

// New returns a collector of the source's totals. The metrics carry the constant
// label "enforcer".
func New(enforcer string, s Source) prometheus.Collector {
	labels := prometheus.Labels{"enforcer": enforcer}
	c := &collector{source: s}
	add := func(kind prometheus.ValueType, name, help string, read func(*trail.Stats) uint64) {
		c.metrics = append(c.metrics, metric{prometheus.NewDesc("interlock_trail_"+name, help, nil, labels), kind, read})
	}
	total := func(name, help string, read func(*trail.Stats) uint64) {
		add(prometheus.CounterValue, name+"_total", help, read)
	}
	total("calls", "Decisions that were noted.", func(s *trail.Stats) uint64 { return s.Calls })
	total("denied", "Calls denied or cut.", func(s *trail.Stats) uint64 { return s.Denied })
	total("sampled", "Allowed calls chosen to be recorded.", func(s *trail.Stats) uint64 { return s.Sampled })
	total("dropped", "Samples dropped again for want of room.", func(s *trail.Stats) uint64 { return s.Dropped })
	total("folded", "Denials of which only the cause was kept.", func(s *trail.Stats) uint64 { return s.Folded })
	total("untracked", "Sightings that gave way before they were reported.", func(s *trail.Stats) uint64 { return s.Untracked })
	total("reports", "Reports that the bus took.", func(s *trail.Stats) uint64 { return s.Reports })
	total("failures", "Attempts to publish that came to nothing.", func(s *trail.Stats) uint64 { return s.Failures })
	add(prometheus.GaugeValue, "denials_held", "Distinct denials held.", func(s *trail.Stats) uint64 { return uint64(s.Denials) })
	add(prometheus.GaugeValue, "samples_waiting", "Samples that wait to be sent.", func(s *trail.Stats) uint64 { return uint64(s.Samples) })
	return c
}

type collector struct {
	source  Source
	metrics []metric
}

type metric struct {
	desc *prometheus.Desc
	kind prometheus.ValueType
	read func(*trail.Stats) uint64
}

// Describe implements prometheus.Collector.
func (c *collector) Describe(out chan<- *prometheus.Desc) {
	for _, m := range c.metrics {
		out <- m.desc
	}
}

// Collect implements prometheus.Collector.
func (c *collector) Collect(out chan<- prometheus.Metric) {
	s := c.source.Stats()
	for _, m := range c.metrics {
		out <- prometheus.MustNewConstMetric(m.desc, m.kind, float64(m.read(&s)))
	}
}
