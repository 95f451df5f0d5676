// Package snapshotprom shows Prometheus the numbers of one snapshot, so that those
// of one scrape agree with each other.
package snapshotprom

import "github.com/prometheus/client_golang/prometheus"

// Collector collects the metrics that have been added from a snapshot of type S.
// It is made by New, and safe for concurrent use once nothing more is added.
type Collector[S any] struct {
	prefix  string
	labels  prometheus.Labels
	take    func() S
	metrics []metric[S]
}

type metric[S any] struct {
	desc *prometheus.Desc
	kind prometheus.ValueType
	read func(*S) float64
}

// New returns a collector without metrics. take makes a snapshot, and is called
// concurrently. The names of all metrics begin with prefix, and all carry the
// constant label "enforcer".
func New[S any](prefix, enforcer string, take func() S) *Collector[S] {
	return &Collector[S]{prefix: prefix, labels: prometheus.Labels{"enforcer": enforcer}, take: take}
}

// Gauge adds a number that goes up and down.
func (c *Collector[S]) Gauge(name, help string, read func(*S) float64) {
	c.add(prometheus.GaugeValue, name, help, read)
}

// Total adds a number that only grows, under a name that ends in _total.
func (c *Collector[S]) Total(name, help string, read func(*S) uint64) {
	c.add(prometheus.CounterValue, name+"_total", help, func(s *S) float64 { return float64(read(s)) })
}

func (c *Collector[S]) add(kind prometheus.ValueType, name, help string, read func(*S) float64) {
	c.metrics = append(c.metrics, metric[S]{prometheus.NewDesc(c.prefix+name, help, nil, c.labels), kind, read})
}

// Describe implements prometheus.Collector.
func (c *Collector[S]) Describe(out chan<- *prometheus.Desc) {
	for _, m := range c.metrics {
		out <- m.desc
	}
}

// Collect implements prometheus.Collector.
func (c *Collector[S]) Collect(out chan<- prometheus.Metric) {
	s := c.take()
	for _, m := range c.metrics {
		out <- prometheus.MustNewConstMetric(m.desc, m.kind, m.read(&s))
	}
}
