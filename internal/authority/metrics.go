package authority

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/interlock-fabric/interlock/internal/access"
	"github.com/interlock-fabric/interlock/internal/roster"
	"github.com/interlock-fabric/interlock/pkg/authority"
)

// metricsTimeout bounds each step of a scrape.
const metricsTimeout = 10 * time.Second

// metrics serves Prometheus what Status tells people. Labels are the names of
// enrolled enforcers and fixed words.
type metrics struct {
	server *http.Server
	addr   string
	ended  chan struct{}
}

func (a *Authority) serveMetrics(listen string) (*metrics, error) {
	l, err := new(net.ListenConfig).Listen(context.Background(), "tcp", listen)
	if err != nil {
		return nil, fmt.Errorf("authority: metrics: %w", err)
	}
	r := prometheus.NewRegistry()
	r.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}), (*collector)(a))
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(r, promhttp.HandlerOpts{Timeout: metricsTimeout, MaxRequestsInFlight: 4}))
	m := &metrics{addr: l.Addr().String(), ended: make(chan struct{}), server: &http.Server{
		Handler: mux, ReadHeaderTimeout: metricsTimeout, ReadTimeout: metricsTimeout, WriteTimeout: 2 * metricsTimeout,
		IdleTimeout: time.Minute, MaxHeaderBytes: 16 << 10, ErrorLog: slog.NewLogLogger(a.log.Handler(), slog.LevelDebug),
	}}
	go func() {
		defer close(m.ended)
		if err := m.server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			a.log.Error("the metrics stopped listening", "error", err)
		}
	}()
	return m, nil
}

func (m *metrics) close() error {
	if m == nil {
		return nil
	}
	err := m.server.Close() // a scrape is asked for again
	<-m.ended
	return err
}

// MetricsAddr returns the address of the metrics, or "".
func (a *Authority) MetricsAddr() string {
	if a.metrics == nil {
		return ""
	}
	return a.metrics.addr
}

var (
	descWriter   = prometheus.NewDesc("interlock_authority_writer", "Whether this authority writes the log.", nil, nil)
	descEpoch    = prometheus.NewDesc("interlock_authority_epoch", "Epoch of the log.", nil, nil)
	descBatch    = prometheus.NewDesc("interlock_authority_batch", "Newest batch of the log.", nil, nil)
	descEntries  = prometheus.NewDesc("interlock_authority_entries", "Entries in force.", nil, nil)
	descWarnings = prometheus.NewDesc("interlock_authority_warnings", "Warnings in the status.", nil, nil)
	descKeySet   = prometheus.NewDesc("interlock_authority_key_set_expiry_timestamp_seconds", "When the key set ends, and with it all that is allowed.", nil, nil)
	descSessions = prometheus.NewDesc("interlock_registry_sessions", "Sessions that are registered.", nil, nil)
	descAgents   = prometheus.NewDesc("interlock_registry_agents", "Agents that are registered.", nil, nil)
	descMemory   = prometheus.NewDesc("interlock_registry_bytes", "About what the registry takes in memory.", nil, nil)
	descRecords  = prometheus.NewDesc("interlock_registry_records_total", "Records that this authority has written to the registry.", nil, nil)
	descCount    = prometheus.NewDesc("interlock_authority_enforcers", "Enrolled enforcers, by condition.", []string{"condition"}, nil)
	descArmed    = prometheus.NewDesc("interlock_enforcer_armed", "Whether the enforcer denied the newest canary that it had time for.", []string{"enforcer"}, nil)
	descCanary   = prometheus.NewDesc("interlock_enforcer_time_to_revoke_seconds", "From the decision on a canary to its denial at the enforcer.", []string{"enforcer"}, nil)
)

// collector collects an authority's metrics. What is told together in the status
// is collected from one status.
type collector Authority

// Describe implements prometheus.Collector.
func (c *collector) Describe(out chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{descWriter, descEpoch, descBatch, descEntries, descWarnings, descKeySet, descSessions, descAgents, descMemory, descRecords, descCount, descArmed, descCanary} {
		out <- d
	}
}

// Collect implements prometheus.Collector.
func (c *collector) Collect(out chan<- prometheus.Metric) {
	a := (*Authority)(c)
	s := a.status(access.Everything())
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		out <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	flag := func(b bool) float64 {
		if b {
			return 1
		}
		return 0
	}
	gauge(descWriter, flag(s.Writer))
	gauge(descEpoch, float64(s.Epoch))
	gauge(descBatch, float64(s.Number))
	gauge(descEntries, float64(s.Entries))
	gauge(descWarnings, float64(len(s.Warnings)))
	gauge(descKeySet, float64(s.KeySet.NotAfter.Unix()))
	for condition, n := range map[string]int{
		authority.ConditionFresh: s.Enforcers.Fresh, authority.ConditionDenying: s.Enforcers.Denying,
		authority.ConditionSilent: s.Enforcers.Silent, authority.ConditionAbsent: s.Enforcers.Absent,
	} {
		gauge(descCount, float64(n), condition)
	}
	r := a.registry.Status()
	gauge(descSessions, float64(r.Sessions))
	gauge(descAgents, float64(r.Agents))
	gauge(descMemory, float64(r.Bytes))
	out <- prometheus.MustNewConstMetric(descRecords, prometheus.CounterValue, float64(r.Records))
	took := a.tracker.Canaries()
	for _, e := range a.enforcers() {
		if e.Canary != nil {
			gauge(descArmed, flag(e.Canary.Armed), e.Name)
		}
		if h := took[e.Name]; h.Total() > 0 {
			out <- histogram(h, e.Name)
		}
	}
}

func histogram(h roster.Histogram, enforcer string) prometheus.Metric {
	below, n := make(map[float64]uint64, len(roster.Buckets)), uint64(0)
	for i, limit := range roster.Buckets {
		n += h.Counts[i]
		below[limit/1000] = n
	}
	return prometheus.MustNewConstHistogram(descCanary, h.Total(), h.Sum.Seconds(), below, enforcer)
}
