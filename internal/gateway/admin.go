package gateway

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/interlock-fabric/interlock/internal/gateway/config"
	"github.com/interlock-fabric/interlock/internal/gateway/operation"
	"github.com/interlock-fabric/interlock/internal/gateway/proxy"
	"github.com/interlock-fabric/interlock/internal/gateway/route"
	"github.com/interlock-fabric/interlock/internal/socket"
	"github.com/interlock-fabric/interlock/pkg/denial"
	"github.com/interlock-fabric/interlock/pkg/enforce"
	"github.com/interlock-fabric/interlock/pkg/enforce/enforceprom"
)

// metrics are the gateway's own. Labels are names from the configuration and
// fixed words.
type metrics struct {
	registry  *prometheus.Registry
	decisions *prometheus.CounterVec
	cuts      *prometheus.CounterVec
	tasks     *prometheus.CounterVec
	reloads   *prometheus.CounterVec
}

func newMetrics(g *Gateway) *metrics {
	m := &metrics{
		registry: prometheus.NewRegistry(),
		decisions: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "interlock_gateway_decisions_total", Help: "Requests that were decided, by route and by what was said.",
		}, []string{"route", "outcome"}),
		cuts: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "interlock_gateway_cut_total", Help: "Requests and streams that were cut while they ran, by route and cause.",
		}, []string{"route", "cause"}),
		tasks: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "interlock_gateway_task_cancellations_total", Help: "Tasks of A2A and MCP whose callers were cut, by route and by what became of their cancellation at the upstream.",
		}, []string{"route", "outcome"}),
		reloads: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "interlock_gateway_config_reloads_total", Help: "Attempts to put another configuration in force.",
		}, []string{"result"}),
	}
	m.registry.MustRegister(
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
		enforceprom.New(g.enforcer), m.decisions, m.cuts, m.tasks, m.reloads,
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "interlock_gateway_mcp_sessions", Help: "MCP sessions that are tracked.",
		}, func() float64 { return float64(g.sessions.Len()) }),
	)
	return m
}

func (m *metrics) decided(d *route.Decision) {
	outcome := "allowed"
	if d.Err != nil {
		a := new(denial.Resource).Answer(d.Err)
		outcome = a.Data.Error
	}
	if d.Cut {
		m.cuts.WithLabelValues(d.Route, outcome).Inc()
		return
	}
	m.decisions.WithLabelValues(d.Route, outcome).Inc()
}

func (m *metrics) canceled(route string, o proxy.TaskOutcome) {
	m.tasks.WithLabelValues(route, string(o)).Inc()
}

func (m *metrics) reloaded(err error) {
	if m == nil {
		return
	}
	result := "ok"
	if err != nil {
		result = "failed"
	}
	m.reloads.WithLabelValues(result).Inc()
}

// Bounds of the admin endpoints.
const (
	adminTimeout = 10 * time.Second
	maxQuestion  = 64 << 10
)

// admin serves what operators and scripts ask.
type admin struct {
	addr    string
	servers []*http.Server
	wg      sync.WaitGroup
}

func startAdmin(g *Gateway, c *config.Config) (*admin, error) {
	a := &admin{}
	serve := func(l net.Listener, h http.Handler) {
		srv := &http.Server{
			Handler: h, ReadHeaderTimeout: adminTimeout, ReadTimeout: adminTimeout, WriteTimeout: adminTimeout,
			IdleTimeout: time.Minute, MaxHeaderBytes: 16 << 10, ErrorLog: slog.NewLogLogger(g.log.Handler(), slog.LevelDebug),
		}
		a.servers = append(a.servers, srv)
		a.wg.Go(func() {
			if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
				g.log.Error("the admin endpoint stopped listening", "error", err)
			}
		})
	}
	if c.Admin.Listen != "" {
		l, err := new(net.ListenConfig).Listen(context.Background(), "tcp", c.Admin.Listen)
		if err != nil {
			return nil, fmt.Errorf("admin.listen: %w", err)
		}
		a.addr = l.Addr().String()
		serve(l, g.health())
	}
	if c.Admin.Socket != "" {
		l, err := socket.Listen(c.Admin.Socket)
		if err != nil {
			a.close()
			return nil, fmt.Errorf("admin.socket: %w", err)
		}
		serve(l, g.questions())
	}
	return a, nil
}

func (a *admin) close() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	for _, s := range a.servers {
		if s.Shutdown(ctx) != nil {
			_ = s.Close() // whatever was slow is cut
		}
	}
	a.wg.Wait()
}

// health serves what anybody who reaches the address may know.
func (g *Gateway) health() http.Handler {
	m := http.NewServeMux()
	m.HandleFunc("GET /livez", func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "ok\n") })
	m.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if why := g.unready(); why != "" {
			http.Error(w, why, http.StatusServiceUnavailable)
			return
		}
		_, _ = io.WriteString(w, "ok\n")
	})
	m.Handle("GET /metrics", promhttp.HandlerFor(g.metrics.registry, promhttp.HandlerOpts{}))
	return m
}

// unready says why no requests should be sent here; empty when they should.
func (g *Gateway) unready() string {
	s := g.enforcer.Status()
	switch {
	case g.draining.Load():
		return "draining"
	case !s.Ready:
		return "no verified state yet: " + s.Why
	case !s.Fresh && s.Mode == "strict":
		return "denying everything: " + s.Why
	}
	return ""
}

// Status is what `enforcer status` shows.
type Status struct {
	Version  string         `json:"version"`
	Uptime   time.Duration  `json:"uptime_ns"`
	Draining bool           `json:"draining"`
	Sessions int            `json:"mcp_sessions"`
	Routes   []string       `json:"routes"`
	Config   loaded         `json:"config"`
	Enforcer enforce.Status `json:"enforcer"`
}

// Status reports the state of affairs.
func (g *Gateway) Status() Status {
	s := Status{
		Version: g.opts.Version, Uptime: time.Since(g.began), Draining: g.draining.Load(),
		Sessions: g.sessions.Len(), Enforcer: g.enforcer.Status(),
	}
	rt := g.current.Load()
	for i := range rt.cfg.Routes {
		s.Routes = append(s.Routes, rt.cfg.Routes[i].Name)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	s.Config = g.loaded
	return s
}

// Question is whether a token may be used for something.
type Question struct {
	Token string `json:"token"`
	// Route may be empty where there is one.
	Route string `json:"route,omitempty"`
	// Method and Tool say what for; empty is to talk at all.
	Method string `json:"method,omitempty"`
	Tool   string `json:"tool,omitempty"`
}

// Verdict is the answer.
type Verdict struct {
	Allowed bool `json:"allowed"`
	// Error, Reason, Incident and Seq are as in denial.Data, and Message says
	// the same in a line.
	Error    string `json:"error,omitempty"`
	Reason   string `json:"reason,omitempty"`
	Incident string `json:"incident,omitempty"`
	Seq      uint64 `json:"seq,omitempty"`
	Message  string `json:"message"`
	Route    string `json:"route"`
	Tenant   string `json:"tenant,omitempty"`
	Issuer   string `json:"issuer,omitempty"`
	User     string `json:"user,omitempty"`
	Session  string `json:"session,omitempty"`
	Client   string `json:"client,omitempty"`
}

var errQuestion = errors.New("question")

// Check answers a question. An error is one of the question.
func (g *Gateway) Check(ctx context.Context, q Question) (*Verdict, error) {
	rt := g.acquire()
	defer rt.release()
	var guard *route.Guard
	for _, x := range rt.table.All() {
		if x.Route.Name == q.Route || q.Route == "" && len(rt.cfg.Routes) == 1 {
			guard = x
		}
	}
	if guard == nil {
		return nil, fmt.Errorf("%w: no route %q: name one of the configuration", errQuestion, q.Route)
	}
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, guard.Route.Resource, nil)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errQuestion, err)
	}
	r.Header.Set("Authorization", "Bearer "+q.Token)
	op := operation.Operation{Method: q.Method, Name: q.Tool}
	if q.Tool != "" && q.Method == "" {
		op.Method = "tools/call"
		if guard.Route.Protocol != config.MCP {
			op = operation.Operation{Method: q.Tool}
		}
	}
	v := &Verdict{Route: guard.Route.Name}
	p, _, err := guard.Identify(r)
	if err == nil {
		id := p.Identity()
		v.Tenant, v.Issuer, v.User, v.Session, v.Client = id.Tenant, id.Issuer, id.User, id.Session.ID, id.Client
		err = guard.Enforcer.Check(p, guard.Call(&op))
	}
	if err != nil {
		a := guard.Resource.Answer(err)
		v.Error, v.Reason, v.Incident, v.Seq, v.Message = a.Data.Error, a.Data.Reason, a.Data.Incident, a.Data.Seq, a.Message
		return v, nil
	}
	v.Allowed, v.Message = true, "allowed"
	return v, nil
}

// questions serves the socket, which only the owner of the process can open.
func (g *Gateway) questions() http.Handler {
	m := http.NewServeMux()
	answer := func(w http.ResponseWriter, v any) {
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(v) // whoever asked has gone
	}
	m.HandleFunc("GET /v1/status", func(w http.ResponseWriter, _ *http.Request) { answer(w, g.Status()) })
	m.HandleFunc("POST /v1/check", func(w http.ResponseWriter, r *http.Request) {
		var q Question
		d := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxQuestion))
		d.DisallowUnknownFields()
		if err := d.Decode(&q); err != nil {
			http.Error(w, "not a question", http.StatusBadRequest)
			return
		}
		v, err := g.Check(r.Context(), q)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		answer(w, v)
	})
	return m
}
