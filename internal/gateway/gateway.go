// Package gateway runs the enforcer binary: an enforcer, the listeners that it
// guards, and what tells about them. It adds no decision of its own.
package gateway

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"reflect"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	auth "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"golang.org/x/net/netutil"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"

	"github.com/interlock-fabric/interlock/internal/gateway/authz"
	"github.com/interlock-fabric/interlock/internal/gateway/config"
	"github.com/interlock-fabric/interlock/internal/gateway/proxy"
	"github.com/interlock-fabric/interlock/internal/gateway/route"
	"github.com/interlock-fabric/interlock/internal/issuers"
	"github.com/interlock-fabric/interlock/pkg/credential"
	"github.com/interlock-fabric/interlock/pkg/enforce"
	"github.com/interlock-fabric/interlock/pkg/natsfeed"
	"github.com/interlock-fabric/interlock/pkg/session"
	"github.com/interlock-fabric/interlock/pkg/trail"
)

// Kind is what a gateway serves.
type Kind uint8

// The kinds.
const (
	Proxy Kind = iota + 1
	Authz
)

// bodyBudget bounds what JSON-RPC requests that are being read, or are on their
// way, take together.
const bodyBudget = 256 << 20

// Options configures a gateway. Config and Kind are required.
type Options struct {
	Config *config.Config
	Kind   Kind
	// Version is shown in the status.
	Version string
	// Logger hears of what an operator should know; nil is silent. Nothing is
	// logged per request.
	Logger *slog.Logger
	// Observe hears of every decision; nil is nobody.
	Observe route.Observer
}

// Gateway is a running gateway. It is safe for concurrent use.
type Gateway struct {
	opts     Options
	log      *slog.Logger
	feed     *natsfeed.Feed
	enforcer *enforce.Enforcer
	tenants  []*session.TenantSecret
	registry registry
	trail    *trail.Recorder
	proofs   *credential.ProofChecker
	sessions *proxy.Sessions
	tasks    *proxy.Tasks
	budget   *proxy.Budget
	metrics  *metrics
	admin    *admin
	began    time.Time
	draining atomic.Bool
	// current is what new requests are served by.
	current atomic.Pointer[runtime]

	mu      sync.Mutex // of reloading and shutting down
	servers map[string]*server
	loaded  loaded
	stopped bool
	wg      sync.WaitGroup
	failed  chan error
	// end, once closed, says that Shutdown has returned.
	end chan struct{}
}

// loaded is how reading the configuration went.
type loaded struct {
	At       time.Time `json:"at"`
	Reloads  int       `json:"reloads"`
	Failures int       `json:"failures"`
	Error    string    `json:"error,omitempty"`
}

// Start starts a gateway and returns once it listens. It denies everything until a
// verified state is in force, which readiness tells.
func Start(o Options) (_ *Gateway, err error) {
	g := &Gateway{
		opts: o, log: o.Logger, began: time.Now(), servers: make(map[string]*server),
		budget: proxy.NewBudget(bodyBudget), failed: make(chan error, 1), end: make(chan struct{}),
	}
	if g.log == nil {
		g.log = slog.New(slog.DiscardHandler)
	}
	defer func() {
		if err != nil {
			g.Shutdown(context.Background())
		}
	}()
	c := o.Config
	if g.proofs, err = g.newProofs(&c.Proof); err != nil {
		return nil, err
	}
	if err := g.openEnforcer(c); err != nil {
		return nil, err
	}
	g.sessions = proxy.NewSessions(sessionOptions(c, g.log))
	g.metrics = newMetrics(g)
	g.tasks = proxy.NewTasks(proxy.TaskOptions{Observe: g.metrics.canceled, Logger: g.log})
	rt, err := g.build(c)
	if err != nil {
		return nil, err
	}
	g.current.Store(rt)
	g.loaded.At = time.Now()
	// Whoever watches sees the start itself.
	if g.admin, err = startAdmin(g, c); err != nil {
		return nil, err
	}
	if err := g.listen(rt); err != nil {
		return nil, err
	}
	if m, _ := session.ParseMode(c.Mode); m.Exposed() {
		g.log.Warn("this mode can allow what should be denied", "mode", m)
	}
	g.wg.Go(func() {
		// It ends with the enforcer at the latest.
		if g.enforcer.WaitReady(context.Background()) == nil {
			g.log.Info("ready: a verified state is in force")
		}
	})
	return g, nil
}

// newProofs makes the checker of proofs. What a client says of the host would let
// it pass off a proof that it was sent for another server.
func (g *Gateway) newProofs(c *config.Proof) (*credential.ProofChecker, error) {
	o := credential.ProofOptions{Origin: c.Origin, MaxAge: c.MaxAge, MaxProofs: c.MaxProofs}
	if c.Origin == "" {
		o.OriginOf = func(r *http.Request) string {
			if guard, _ := g.current.Load().table.Find(r.Host, r.URL.Path); guard != nil {
				return guard.Origin
			}
			return ""
		}
	}
	if c.NonceKeyFile != "" {
		key, err := issuers.Secret(c.NonceKeyFile)
		if err != nil {
			return nil, fmt.Errorf("proof.nonce_key_file: %w", err)
		}
		o.NonceKey = key
	}
	return credential.NewProofChecker(o)
}

// secret reads a file that only its owner can read.
// lasting is a feed that outlives its enforcer: the trail of what is cut when that
// is closed goes the same way.
type lasting struct{ *natsfeed.Feed }

func (lasting) Close() error { return nil }

func (g *Gateway) openEnforcer(c *config.Config) error {
	e, err := session.LoadEnrollment(c.Enrollment)
	if err != nil {
		return fmt.Errorf("enrollment: %w", err)
	}
	if len(c.NATSURLs) > 0 {
		e.NATS.URLs = c.NATSURLs
	}
	mode, err := session.ParseMode(c.Mode)
	if err != nil {
		return err
	}
	if c.StateDir != "" {
		if err := os.MkdirAll(c.StateDir, 0o700); err != nil {
			return fmt.Errorf("state_dir: %w", err)
		}
	}
	feed, err := natsfeed.Dial(e, &natsfeed.Options{Logger: g.log})
	if err != nil {
		return err
	}
	g.feed, g.tenants = feed, e.Tenants
	known, err := readRegistry(c, g.tenants)
	if err != nil {
		return err
	}
	g.registry.known.Store(known)
	g.enforcer, err = enforce.Start(lasting{feed}, &enforce.Options{
		Enrollment: e, Mode: mode, MaxStale: c.MaxStale, MaxStaleRunning: c.MaxStaleRunning, StateDir: c.StateDir, OrdersDir: c.OrdersDir,
		MaxEntries: c.MaxEntries, MaxBound: c.MaxBound, Registry: &g.registry, Agents: c.Agents(), Logger: g.log,
	})
	if err != nil || c.Trail.Disabled {
		return err
	}
	g.trail, err = trail.New(trail.Options{
		Enrollment: e, Enforcer: g.enforcer, Publisher: feed, Sample: c.Trail.Sample, Interval: c.Trail.Interval, Logger: g.log,
	})
	return err
}

func sessionOptions(c *config.Config, log *slog.Logger) proxy.SessionOptions {
	return proxy.SessionOptions{Max: c.Proxy.MaxSessions, Timeout: c.Proxy.SessionTimeout, FlushTimeout: c.Proxy.FlushTimeout, Logger: log}
}

// runtime is what follows from one configuration. It is closed when nobody uses
// it any more.
type runtime struct {
	cfg       *config.Config
	verifiers *verifiers
	table     *route.Table
	proxy     *proxy.Proxy
	authz     *authz.Service
	tls       map[string]*tls.Config // by address

	refs atomic.Int64 // one is the gateway's own
	once sync.Once
	gone chan struct{}
}

// acquire returns the runtime of a new request. release ends its use.
func (g *Gateway) acquire() *runtime {
	for {
		rt := g.current.Load()
		rt.refs.Add(1)
		if g.current.Load() == rt {
			return rt
		}
		rt.release()
	}
}

func (rt *runtime) release() {
	if rt.refs.Add(-1) > 0 {
		return
	}
	rt.once.Do(func() {
		if rt.proxy != nil {
			rt.proxy.Close()
		}
		rt.verifiers.release()
		close(rt.gone)
	})
}

// verifiers are kept over a reload that does not change them, with the keys and
// tokens that they know.
type verifiers struct {
	issuers   []issuers.Issuer
	audiences []string
	all       *credential.Verifier
	refs      atomic.Int64
}

func (v *verifiers) release() {
	if v.refs.Add(-1) == 0 {
		v.all.Close()
	}
}

func (g *Gateway) newVerifiers(c *config.Config, have *verifiers) (*verifiers, error) {
	v := &verifiers{issuers: c.Issuers}
	for i := range c.Routes {
		if a := c.Routes[i].Audience; !slices.Contains(v.audiences, a) {
			v.audiences = append(v.audiences, a)
		}
	}
	slices.Sort(v.audiences)
	if have != nil && reflect.DeepEqual(have.issuers, v.issuers) && slices.Equal(have.audiences, v.audiences) && !issuers.ReadsFiles(c.Issuers) {
		have.refs.Add(1)
		return have, nil
	}
	v.refs.Store(1)
	o := credential.Options{Audiences: v.audiences, Possession: g.proofs.Check}
	for i := range c.Issuers {
		x, err := c.Issuers[i].Credential()
		if err != nil {
			return nil, err
		}
		o.Issuers = append(o.Issuers, x)
	}
	var err error
	if v.all, err = credential.New(o); err != nil {
		return nil, err
	}
	return v, nil
}

// build makes what a configuration asks for, with all the files that it names.
func (g *Gateway) build(c *config.Config) (_ *runtime, err error) {
	rt := &runtime{cfg: c, tls: make(map[string]*tls.Config), gone: make(chan struct{})}
	rt.refs.Store(1)
	var have *verifiers
	if old := g.current.Load(); old != nil {
		have = old.verifiers
	}
	if rt.verifiers, err = g.newVerifiers(c, have); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			rt.release()
		}
	}()
	var guards []*route.Guard
	for i := range c.Routes {
		r := &c.Routes[i]
		// A token for one resource is none for another.
		v, err := rt.verifiers.all.For(r.Audience)
		if err != nil {
			return nil, err
		}
		guards = append(guards, route.New(r, g.enforcer, v, g.observe, g.trail))
	}
	rt.table = route.NewTable(guards)
	if g.opts.Kind == Proxy {
		rt.proxy, err = proxy.New(proxy.Options{Table: rt.table, Config: c, Sessions: g.sessions, Tasks: g.tasks, Budget: g.budget, Logger: g.log})
		if err != nil {
			return nil, err
		}
	} else {
		rt.authz = &authz.Service{Table: rt.table, Config: c}
	}
	listeners := g.listeners(c)
	if len(listeners) == 0 {
		return nil, fmt.Errorf("%w: nothing to listen on", config.ErrInvalid)
	}
	for _, l := range listeners {
		if l.TLS.Cert == "" {
			continue
		}
		if rt.tls[l.Listen], err = serverTLS(&l.TLS); err != nil {
			return nil, fmt.Errorf("listener %s: %w", l.Listen, err)
		}
	}
	return rt, nil
}

// observe hears of every decision.
func (g *Gateway) observe(d *route.Decision) {
	g.metrics.decided(d)
	g.trail.Record(&d.Event)
	if g.opts.Observe != nil {
		g.opts.Observe(d)
	}
}

func serverTLS(t *config.TLS) (*tls.Config, error) {
	pair, err := tls.LoadX509KeyPair(t.Cert, t.Key)
	if err != nil {
		return nil, err
	}
	c := &tls.Config{Certificates: []tls.Certificate{pair}, MinVersion: tls.VersionTLS12, NextProtos: []string{"h2", "http/1.1"}}
	if t.ClientCA != "" {
		pem, err := os.ReadFile(t.ClientCA)
		if err != nil {
			return nil, err
		}
		c.ClientCAs = x509.NewCertPool()
		if !c.ClientCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("%s has no certificate in PEM", t.ClientCA)
		}
		c.ClientAuth = tls.VerifyClientCertIfGiven
		if t.RequireClientCert {
			c.ClientAuth = tls.RequireAndVerifyClientCert
		}
	}
	return c, nil
}

// server is one listener of the gateway.
type server struct {
	addr string // as it was asked for
	l    net.Listener
	// stop lets what is running end until ctx does; kill does not.
	stop func(ctx context.Context) error
	kill func()
}

func (g *Gateway) listeners(c *config.Config) []config.Listener {
	if g.opts.Kind == Proxy {
		return c.Proxy.Listeners
	}
	var out []config.Listener
	for _, l := range []config.Listener{c.Authz.GRPC, c.Authz.HTTP} {
		if l.Listen != "" {
			out = append(out, l)
		}
	}
	return out
}

// listen opens the listeners of a runtime that are not open yet.
func (g *Gateway) listen(rt *runtime) error {
	var opened []*server
	for _, l := range g.listeners(rt.cfg) {
		if g.servers[l.Listen] != nil {
			continue
		}
		s, err := g.open(rt, l)
		if err != nil {
			for _, s := range opened {
				delete(g.servers, s.addr)
				s.kill()
			}
			return err
		}
		g.servers[l.Listen] = s
		opened = append(opened, s)
		g.log.Info("listening", "address", s.l.Addr().String(), "tls", l.TLS.Cert != "")
	}
	return nil
}

func (g *Gateway) open(rt *runtime, c config.Listener) (*server, error) {
	l, err := new(net.ListenConfig).Listen(context.Background(), "tcp", c.Listen)
	if err != nil {
		return nil, err
	}
	p := &rt.cfg.Proxy
	limited := netutil.LimitListener(l, p.MaxConnections)
	secure := c.TLS.Cert != ""
	var secured *tls.Config
	if secure {
		secured = &tls.Config{MinVersion: tls.VersionTLS12, NextProtos: []string{"h2", "http/1.1"}, GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
			if now := g.current.Load().tls[c.Listen]; now != nil {
				return now, nil
			}
			return nil, errors.New("the listener is going away")
		}}
	}
	if g.opts.Kind == Authz && c.Listen == rt.cfg.Authz.GRPC.Listen {
		return g.serveGRPC(limited, c.Listen, secured), nil
	}
	handler := http.Handler(http.HandlerFunc(g.serveProxy))
	if g.opts.Kind == Authz {
		handler = &authz.HTTP{Service: g.service}
	}
	srv := &http.Server{
		Handler:           g.watched(handler),
		ReadHeaderTimeout: p.ReadHeaderTimeout, IdleTimeout: p.IdleTimeout, MaxHeaderBytes: p.MaxHeaderBytes,
		ErrorLog:  slog.NewLogLogger(g.log.Handler(), slog.LevelDebug),
		TLSConfig: secured,
		Protocols: new(http.Protocols),
		// Of all that is written, and of a connection of HTTP/2 that takes nothing.
		// The proxy lets its answers take longer, and sees to it that they move.
		WriteTimeout: p.WriteStallTimeout,
		HTTP2:        &http.HTTP2Config{MaxConcurrentStreams: 250, WriteByteTimeout: p.WriteStallTimeout},
	}
	srv.Protocols.SetHTTP1(true)
	srv.Protocols.SetHTTP2(true)
	srv.Protocols.SetUnencryptedHTTP2(true)
	g.wg.Go(func() {
		var err error
		if secure {
			err = srv.ServeTLS(limited, "", "")
		} else {
			err = srv.Serve(limited)
		}
		g.ended(c.Listen, err)
	})
	return &server{addr: c.Listen, l: l, stop: srv.Shutdown, kill: func() { _ = srv.Close() }}, nil
}

// watched says in the log that a handler has panicked. The server, which ends the
// connection then, says it among what no operator reads.
func (g *Gateway) watched(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		defer func() {
			v := recover()
			if v == nil {
				return
			}
			if v != http.ErrAbortHandler { //nolint:errorlint // it is that value, or another
				g.panicked(v)
			}
			panic(http.ErrAbortHandler) // the server is to be silent about it
		}()
		next.ServeHTTP(w, r)
	})
}

func (g *Gateway) panicked(v any) {
	g.log.Error("a request made the gateway panic", "panic", fmt.Sprint(v), "stack", string(debug.Stack()))
}

// service is the authorization service of a new request.
func (g *Gateway) service() (*authz.Service, func()) {
	rt := g.acquire()
	return rt.authz, rt.release
}

// Bounds of the authorization service.
const (
	maxCheckLen     = 5 << 20
	maxCheckStreams = 1000
)

// serveGRPC serves Envoy.
func (g *Gateway) serveGRPC(l net.Listener, addr string, secured *tls.Config) *server {
	opts := []grpc.ServerOption{
		grpc.MaxRecvMsgSize(maxCheckLen), grpc.MaxConcurrentStreams(maxCheckStreams), grpc.MaxHeaderListSize(64 << 10),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: time.Minute, Timeout: 20 * time.Second}),
	}
	if secured != nil {
		opts = append(opts, grpc.Creds(credentials.NewTLS(secured)))
	}
	srv := grpc.NewServer(opts...)
	auth.RegisterAuthorizationServer(srv, &authz.GRPC{Service: g.service, Panicked: g.panicked})
	g.wg.Go(func() {
		if err := srv.Serve(l); !errors.Is(err, grpc.ErrServerStopped) {
			g.ended(addr, err)
		}
	})
	return &server{addr: addr, l: l, kill: srv.Stop, stop: func(ctx context.Context) error {
		done := make(chan struct{})
		g.wg.Go(func() {
			srv.GracefulStop()
			close(done)
		})
		select {
		case <-done:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}}
}

// ended is told when a listener does not listen any more.
func (g *Gateway) ended(addr string, err error) {
	if err == nil || errors.Is(err, http.ErrServerClosed) {
		return
	}
	select {
	case g.failed <- fmt.Errorf("listener %s: %w", addr, err):
	default:
	}
}

// Failed receives an error when a listener fails.
func (g *Gateway) Failed() <-chan error { return g.failed }

func (g *Gateway) serveProxy(w http.ResponseWriter, r *http.Request) {
	rt := g.acquire()
	defer rt.release()
	rt.proxy.ServeHTTP(w, r)
}

// Addrs returns the addresses that are listened on, by those that were asked for.
func (g *Gateway) Addrs() map[string]string {
	g.mu.Lock()
	defer g.mu.Unlock()
	out := make(map[string]string, len(g.servers))
	for addr, s := range g.servers {
		out[addr] = s.l.Addr().String()
	}
	return out
}

// AdminAddr returns the address of the health and metrics endpoint, or "".
func (g *Gateway) AdminAddr() string { return g.admin.addr }

// Reload puts another configuration in force, without ending anything that is
// running. What cannot change in a running process is an error that names the
// key. After an error everything is as it was.
func (g *Gateway) Reload(c *config.Config) (err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	defer func() {
		g.metrics.reloaded(err)
		if err != nil {
			g.loaded.Failures++
			g.loaded.Error = err.Error()
		}
	}()
	if g.stopped {
		return session.ErrClosed
	}
	old := g.current.Load()
	if err := fixed(old.cfg, c); err != nil {
		return err
	}
	known, err := readRegistry(c, g.tenants)
	if err != nil {
		return err
	}
	rt, err := g.build(c)
	if err != nil {
		return err
	}
	if err := g.listen(rt); err != nil {
		rt.release()
		return err
	}
	g.sessions.Configure(sessionOptions(c, nil))
	g.registry.known.Store(known)
	g.current.Store(rt)
	old.release()
	g.loaded = loaded{At: time.Now(), Reloads: g.loaded.Reloads + 1, Failures: g.loaded.Failures}
	for addr, s := range g.servers {
		if !slices.ContainsFunc(g.listeners(c), func(l config.Listener) bool { return l.Listen == addr }) {
			delete(g.servers, addr)
			g.wg.Go(func() { g.drain(s, c.DrainTimeout) })
		}
	}
	return nil
}

// ReloadFailed notes that the file could not be read.
func (g *Gateway) ReloadFailed(err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.loaded.Failures++
	g.loaded.Error = err.Error()
	g.metrics.reloaded(err)
}

// drain lets a listener's requests end, as long as is allowed.
func (g *Gateway) drain(s *server, limit time.Duration) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	if s.stop(ctx) != nil {
		s.kill()
	}
}

// fixed refuses a change of what only a restart can change.
func fixed(a, b *config.Config) error {
	for _, x := range []struct {
		key  string
		a, b any
	}{
		{"enrollment", a.Enrollment, b.Enrollment}, {"nats_urls", a.NATSURLs, b.NATSURLs}, {"state_dir", a.StateDir, b.StateDir}, {"orders_dir", a.OrdersDir, b.OrdersDir},
		{"mode", a.Mode, b.Mode}, {"max_stale", a.MaxStale, b.MaxStale}, {"max_stale_running", a.MaxStaleRunning, b.MaxStaleRunning},
		{"what unregistered, digests and max_stale_registry ask of the authority's registry", a.Agents(), b.Agents()}, {"max_entries", a.MaxEntries, b.MaxEntries}, {"max_bound", a.MaxBound, b.MaxBound}, {"log", a.Log, b.Log}, {"admin", a.Admin, b.Admin}, {"trail", a.Trail, b.Trail}, {"proof", a.Proof, b.Proof},
		{"proxy.read_header_timeout", a.Proxy.ReadHeaderTimeout, b.Proxy.ReadHeaderTimeout}, {"proxy.idle_timeout", a.Proxy.IdleTimeout, b.Proxy.IdleTimeout},
		{"proxy.write_stall_timeout", a.Proxy.WriteStallTimeout, b.Proxy.WriteStallTimeout},
		{"proxy.max_header_bytes", a.Proxy.MaxHeaderBytes, b.Proxy.MaxHeaderBytes}, {"proxy.max_connections", a.Proxy.MaxConnections, b.Proxy.MaxConnections},
	} {
		if !reflect.DeepEqual(x.a, x.b) {
			return fmt.Errorf("%w: %s cannot change while the process runs: restart it", config.ErrInvalid, x.key)
		}
	}
	type place struct {
		kind string
		config.Listener
	}
	places := func(c *config.Config) []place {
		out := []place{{"authz.grpc", c.Authz.GRPC}, {"authz.http", c.Authz.HTTP}}
		for _, l := range c.Proxy.Listeners {
			out = append(out, place{"proxy", l})
		}
		return out
	}
	for _, l := range places(a) {
		for _, m := range places(b) {
			switch {
			case l.Listen == "" || l.Listen != m.Listen:
			case l.kind != m.kind:
				return fmt.Errorf("%w: listener %s cannot become one of %s while the process runs: restart it", config.ErrInvalid, l.Listen, m.kind)
			case (l.TLS.Cert == "") != (m.TLS.Cert == ""):
				return fmt.Errorf("%w: listener %s cannot turn TLS on or off while the process runs: restart it", config.ErrInvalid, l.Listen)
			}
		}
	}
	return nil
}

// Shutdown stops listening and lets requests end, until ctx does or the
// configured time has passed; what runs on is then cut, and told so. It returns
// when nothing of the gateway runs any more. It is idempotent.
func (g *Gateway) Shutdown(ctx context.Context) {
	g.draining.Store(true)
	g.mu.Lock()
	if g.stopped {
		g.mu.Unlock()
		<-g.end
		return
	}
	g.stopped = true
	servers := g.servers
	g.servers = nil
	g.mu.Unlock()

	ctx, cancel := context.WithTimeout(ctx, g.opts.Config.DrainTimeout)
	defer cancel()
	var draining sync.WaitGroup
	for _, s := range servers {
		draining.Go(func() {
			if s.stop(ctx) == nil {
				return
			}
			// Every caller is told that this is the end.
			_ = g.enforcer.Close() // it has no error of its own to add
			last, cancel := context.WithTimeout(context.Background(), 2*g.opts.Config.Proxy.FlushTimeout)
			defer cancel()
			_ = s.stop(last)
			s.kill()
		})
	}
	draining.Wait()
	if g.sessions != nil {
		g.sessions.Close()
	}
	if g.tasks != nil {
		g.tasks.Close()
	}
	if g.enforcer != nil {
		if err := g.enforcer.Close(); err != nil {
			g.log.Warn("close the enforcer", "error", err)
		}
	}
	if rt := g.current.Load(); rt != nil {
		rt.release()
		<-rt.gone // handlers end once their connections are closed
	}
	// What was cut is the last that it tells.
	if err := g.trail.Close(); err != nil {
		g.log.Warn("close the trail", "error", err)
	}
	if g.feed != nil {
		if err := g.feed.Close(); err != nil {
			g.log.Warn("close the connection to the bus", "error", err)
		}
	}
	if g.admin != nil {
		g.admin.close()
	}
	close(g.end)
	g.wg.Wait()
}
