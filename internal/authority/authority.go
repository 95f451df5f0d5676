// Package authority is the Session Authority: the bus, the keys, the sequencer,
// the roster, the registry, the audit and the API, put together.
//
// Open starts everything in the order of who needs whom, and Close stops it in
// the reverse one. What the authority decides is in this package too: how what is
// asked for becomes entries of the log, exemptions, proposals, staged restores, the
// adoption of emergency orders, what standard protocols ask for, and the record of
// each. How the log is written is the sequencer's.
package authority

import (
	"context"
	"crypto/ed25519"
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/nats-io/nkeys"

	"github.com/interlock-fabric/interlock/internal/access"
	"github.com/interlock-fabric/interlock/internal/api"
	"github.com/interlock-fabric/interlock/internal/audit"
	"github.com/interlock-fabric/interlock/internal/broker"
	"github.com/interlock-fabric/interlock/internal/flock"
	"github.com/interlock-fabric/interlock/internal/issuers"
	"github.com/interlock-fabric/interlock/internal/proposal"
	"github.com/interlock-fabric/interlock/internal/registry"
	"github.com/interlock-fabric/interlock/internal/report"
	"github.com/interlock-fabric/interlock/internal/roster"
	"github.com/interlock-fabric/interlock/internal/sequencer"
	"github.com/interlock-fabric/interlock/internal/trust"
	"github.com/interlock-fabric/interlock/pkg/authority"
	"github.com/interlock-fabric/interlock/pkg/natsfeed"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// The parts of a data directory.
const (
	// KeysDir has the keys; see package trust.
	KeysDir = "keys"
	// BusDir has the streams of the embedded bus.
	BusDir = "bus"
	// StateDir has the state, as the newest segment; it is a copy, and may be
	// removed while the authority is not running.
	StateDir = "state"
	// SocketFile is the API's socket, and TokenFile the token of its TCP
	// listener.
	SocketFile = "api.sock"
	TokenFile  = "api.token"
	lockFile   = "authority.lock"
	// AuditHeadFile has the number and the hash of the newest record of the audit.
	AuditHeadFile = "audit.head"
)

// DefaultRevokeTarget is the time to revoke that the status expects.
const DefaultRevokeTarget = 100 * time.Millisecond

// ErrNoKeys: the directory has no keys, and the authority makes them by itself
// only when it listens on nothing but loopback.
var ErrNoKeys = errors.New("authority: no keys: run session-authority init first")

// Options configures an authority. DataDir is required.
type Options struct {
	// DataDir has everything that is kept. It is made with mode 0700 and
	// belongs to one authority at a time.
	DataDir string

	// NATSListen is the host:port on which the embedded bus serves enforcers;
	// empty serves none. NATSTLS is required outside loopback.
	NATSListen string
	NATSTLS    *tls.Config
	// Cluster places the embedded bus in a cluster; nil is a single server.
	Cluster *broker.Cluster
	// RelaxedSync is for tests and measurements; see broker.Options.
	RelaxedSync bool

	// NATSURL, when set, uses a bus that runs elsewhere: URLs with commas
	// between. NATSCreds is a credentials file for it; without one the
	// authority's NKey is used. NATSClientTLS configures TLS to it, which is
	// demanded outside loopback.
	NATSURL       string
	NATSCreds     string
	NATSClientTLS *tls.Config
	// Replicas of the streams; 0 is 1, or 3 with Cluster.
	Replicas int

	// EnforcerURLs are what enrolments name as the bus; empty is NATSURL or the
	// embedded bus's address. EnforcerCAs is the PEM that verifies it.
	EnforcerURLs []string
	EnforcerCAs  string

	// Socket is the API's unix socket; empty is SocketFile in DataDir.
	Socket string
	// APIListen is a host:port for the API on TCP; empty listens on none. APITLS
	// is required outside loopback.
	APIListen string
	APITLS    *tls.Config
	// Access is who may use the API; nil is this machine's user, and whoever has
	// the token in TokenFile.
	Access *access.Config

	// Tokens is how callers' tokens are verified that are to be revoked or
	// introspected; nil verifies none.
	Tokens *issuers.Tokens

	// MetricsListen is a host:port that serves Prometheus /metrics to whoever can
	// reach it; empty is none.
	MetricsListen string

	// Tenants are the first tenants, when the authority makes its own keys.
	Tenants []string
	// Issuers are the token issuers in use; the only one is the default of
	// targets that need one.
	Issuers []string

	// AckWait is how long a decision waits for durability before the answer is
	// that it is in effect only; 0 is the sequencer's default.
	AckWait time.Duration
	// SegmentEvery is how often a state that has changed is published as a
	// segment, and SegmentBatches how many batches do not wait for that; 0 is the
	// sequencer's default. The log is trimmed behind the third newest segment.
	SegmentEvery   time.Duration
	SegmentBatches uint64
	// CanaryEvery is how often a canary session is revoked, to see that every
	// enforcer denies it; 0 is never.
	CanaryEvery time.Duration
	// RevokeTarget is how soon after a decision every enforcer shall deny; the
	// status holds the canaries against it. 0 is DefaultRevokeTarget.
	RevokeTarget time.Duration
	// AuditFor and AuditBytes are how long, and how much of, the audit is kept;
	// 0 is the audit's default.
	AuditFor   time.Duration
	AuditBytes uint64
	// Version is shown in the status.
	Version string
	// Notice is called with what a person should be told at start; nil tells
	// the log alone.
	Notice func(string)
	// Logger takes what an operator should know; nil is silence.
	Logger *slog.Logger

	// Hooks are for tests, and so is beforeState, which is called before an agent's
	// state is written.
	Hooks       sequencer.Hooks
	beforeState func() error
	// beforeStage is called before a planned stage of a restore is taken, afterStage
	// when it has been; an error is as if the authority had died there.
	beforeStage func()
	afterStage  func() error
	// recoverAfter replaces the constant, for tests.
	recoverAfter time.Duration
}

// Authority is a running authority. Its methods may be called concurrently.
type Authority struct {
	o          Options
	log        *slog.Logger
	lock       *os.File
	store      *trust.Store
	broker     *broker.Broker
	nc, own    *nats.Conn // own is the sequencer's
	seq        *sequencer.Sequencer
	roster     *roster.Roster
	tracker    *roster.Tracker
	reports    *report.Reader
	registry   *registry.Registry
	agents     atomic.Pointer[registry.Publisher]
	discovered discovered
	audit      *audit.Log
	watched    watched
	hub        *hub
	server     *api.Server
	metrics    *metrics
	cancel     context.CancelFunc
	done       sync.WaitGroup
	once       sync.Once
	err        error

	orders    orders
	proposals *proposal.Store
	wide      limits
	tokens    tokens
	access    atomic.Pointer[access.Config]
	reloading sync.Mutex

	once422 dedupe
	claims  claims
	flow    flow
	// staging is held by who takes a stage of a restore, or aborts it.
	staging sync.Mutex
	secrets secretCache
}

// Open starts an authority and returns when its API answers. ctx bounds the
// start alone. Errors wrap ErrNoKeys, flock.ErrHeld, broker.ErrNoTLS or
// api.ErrNoTLS where those are the reason.
func Open(ctx context.Context, o Options) (*Authority, error) {
	a := &Authority{o: o, log: o.Logger}
	if a.log == nil {
		a.log = slog.New(slog.DiscardHandler)
	}
	if err := a.open(ctx); err != nil {
		return nil, errors.Join(err, a.Close())
	}
	return a, nil
}

func (a *Authority) open(ctx context.Context) error {
	o := &a.o
	if o.DataDir == "" {
		return errors.New("authority: no data directory")
	}
	if o.NATSURL != "" && (o.NATSListen != "" || o.Cluster != nil) {
		return errors.New("authority: the bus is either embedded or elsewhere: give a NATS URL or a NATS listen address")
	}
	if o.Replicas == 0 {
		o.Replicas = 1
		if o.Cluster != nil {
			o.Replicas = 3
		}
	}
	if o.RevokeTarget == 0 {
		o.RevokeTarget = DefaultRevokeTarget
	}
	if o.Socket == "" {
		o.Socket = filepath.Join(o.DataDir, SocketFile)
	}
	if err := os.MkdirAll(o.DataDir, 0o700); err != nil {
		return fmt.Errorf("authority: %w", err)
	}
	var err error
	a.lock, err = flock.Acquire(filepath.Join(o.DataDir, lockFile))
	if err != nil && !errors.Is(err, flock.ErrHeld) {
		return fmt.Errorf("authority: %w", err)
	}
	if err != nil {
		return fmt.Errorf("authority: another authority runs on %s: %w", o.DataDir, err)
	}
	if err := a.openKeys(); err != nil {
		return err
	}
	a.warnOfTenants(o.Access)
	if err := a.openBus(ctx); err != nil {
		return err
	}
	run, cancel := context.WithCancel(context.Background())
	a.cancel = cancel
	a.hub = newHub(func(id session.TenantID) string { return a.store.KeySet().TenantName(id) })
	a.tracker = roster.NewTracker((*logView)(a), a.accepted)
	a.hub.tracker, a.hub.list = a.tracker, a.enforcers
	if _, err := a.nc.Subscribe(natsfeed.OrderSubjects, func(m *nats.Msg) { a.hearOrder(m.Data, "the bus", true) }); err != nil {
		return fmt.Errorf("authority: %w", err)
	}
	// The log is heard before anything can be decided.
	if _, err := a.nc.Subscribe(natsfeed.LogSubject, a.onBatch); err != nil {
		return fmt.Errorf("authority: %w", err)
	}
	if a.seq, err = sequencer.Open(ctx, sequencer.Options{
		NC: a.own, Keys: a.store, AckWait: o.AckWait, Logger: a.log, Hooks: o.Hooks,
		SegmentEvery: o.SegmentEvery, SegmentBatches: o.SegmentBatches, StateDir: filepath.Join(o.DataDir, StateDir),
		Agents: func() session.AgentsRef { return a.agents.Load().Ref() },
	}); err != nil {
		return fmt.Errorf("authority: %w", err)
	}
	if err := a.patiently(ctx, func(ctx context.Context) (err error) {
		a.roster, err = roster.Open(ctx, roster.Options{NC: a.nc, OnChange: a.onRoster, Logger: a.log})
		return err
	}); err != nil {
		return fmt.Errorf("authority: %w", err)
	}
	a.access.Store(o.Access)
	if err := a.patiently(ctx, a.openAudit); err != nil {
		return err
	}
	if err := a.patiently(ctx, func(ctx context.Context) (err error) {
		a.proposals, err = proposal.Open(ctx, a.nc, []byte(a.store.AuthoritySeed()))
		return err
	}); err != nil {
		return fmt.Errorf("authority: %w", err)
	}
	if o.Access != nil {
		a.wide.set(o.Access.WidePerMinute)
	}
	if err := a.patiently(ctx, a.openReceipts); err != nil {
		return err
	}
	js, err := jetstream.New(a.nc)
	if err != nil {
		return fmt.Errorf("authority: %w", err)
	}
	a.reports = report.NewReader(report.Options{
		JetStream: js, ReceiptKey: a.receiptKey, Sealing: a.store.Sealing, Serves: a.serves, Logger: a.log,
		Believed: func(seq uint64, r *session.Report, hash session.Hash) {
			a.discovered.hear(r)
			a.auditReport(seq, r, hash)
		},
	})
	if a.registry, err = registry.Open(ctx, registry.Options{NC: a.nc, Keys: a.store, Logger: a.log}); err != nil {
		return fmt.Errorf("authority: %w", err)
	}
	agents, err := registry.NewPublisher(registry.PublisherOptions{
		NC: a.nc, Registry: a.registry, Keys: a.store, Writer: a.seq.IsWriter, Published: a.seq.BeatSoon, Logger: a.log,
	})
	if err != nil {
		return fmt.Errorf("authority: %w", err)
	}
	a.agents.Store(agents)
	a.done.Go(func() { agents.Run(run) })
	a.done.Go(func() { a.tendAudit(run) })
	a.done.Go(func() { a.tendRecovery(run) })
	a.done.Go(func() { a.reports.Follow(run) })
	a.done.Go(func() { a.discovered.read(run, a.store.Sealing, a.serves) })
	a.done.Go(func() { a.hub.run(run) })
	a.done.Go(func() { a.tendRestores(run) })
	if o.CanaryEvery > 0 {
		a.done.Go(func() { a.sendCanaries(run, o.CanaryEvery) })
	}
	if a.broker != nil {
		a.done.Go(func() { a.tendStore(run) })
	}
	a.done.Go(func() { a.tendOrders(run, js) })
	if o.Tokens != nil {
		t, err := a.newTokens(o.Tokens)
		if err != nil {
			return err
		}
		_ = a.tokens.set(t) // there was none
	}
	a.server, err = api.Serve(a, api.Options{
		Socket: o.Socket, Listen: o.APIListen, TLS: o.APITLS, Access: o.Access,
		TokenFile: filepath.Join(o.DataDir, TokenFile), Refused: a.refused, Admitted: a.admitted, Logger: a.log,
	})
	if err != nil {
		return err
	}
	if o.MetricsListen != "" {
		if a.metrics, err = a.serveMetrics(o.MetricsListen); err != nil {
			return err
		}
	}
	a.log.Info("the authority is up", "socket", o.Socket, "api", a.server.Addr(), "bus", a.NATSAddr())
	return nil
}

// warnOfTenants logs what was most likely misspelt.
func (a *Authority) warnOfTenants(c *access.Config) {
	if c == nil {
		return
	}
	for _, t := range c.Tenants() {
		if _, ok := a.store.KeySet().Tenant(t); !ok {
			a.log.Warn("a role is granted in a tenant that there is not", "tenant", t)
		}
	}
}

// Close stops the API, then the sequencer, then the bus, and joins every
// goroutine. It is idempotent.
func (a *Authority) Close() error {
	a.once.Do(func() {
		errs := []error{a.metrics.close()}
		if a.server != nil {
			errs = append(errs, a.server.Close())
		}
		errs = append(errs, a.tokens.set(nil))
		if a.cancel != nil {
			a.cancel()
		}
		a.done.Wait()
		if a.registry != nil {
			errs = append(errs, a.registry.Close())
		}
		if a.roster != nil {
			errs = append(errs, a.roster.Close())
		}
		if a.audit != nil {
			a.note(authority.AuditRecord{Kind: authority.AuditAuthority, Action: "stop"})
			errs = append(errs, a.audit.Close())
		}
		if a.seq != nil {
			a.seq.Close()
		}
		for _, nc := range []*nats.Conn{a.nc, a.own} {
			if nc != nil {
				nc.Close()
			}
		}
		if a.broker != nil {
			errs = append(errs, a.broker.Close())
		}
		if a.lock != nil {
			errs = append(errs, a.lock.Close())
		}
		a.err = errors.Join(errs...)
	})
	return a.err
}

// Socket returns the path of the API's unix socket.
func (a *Authority) Socket() string { return a.o.Socket }

// APIAddr returns the address of the API's TCP listener, or "".
func (a *Authority) APIAddr() string { return a.server.Addr() }

// NATSAddr returns the host:port on which the embedded bus serves enforcers, or
// "".
func (a *Authority) NATSAddr() string {
	if a.broker == nil {
		return ""
	}
	u, err := url.Parse(a.broker.ClientURL())
	if err != nil {
		return ""
	}
	return u.Host
}

func (a *Authority) notice(format string, args ...any) {
	s := fmt.Sprintf(format, args...)
	a.log.Info(s)
	if a.o.Notice != nil {
		a.o.Notice(s)
	}
}

// openKeys loads the keys, and makes them on a first start that nobody else can
// reach.
func (a *Authority) openKeys() error {
	dir := filepath.Join(a.o.DataDir, KeysDir)
	var err error
	a.store, err = trust.Open(dir)
	if err == nil {
		return nil
	}
	if _, statErr := os.Stat(dir); !errors.Is(statErr, fs.ErrNotExist) {
		return err // something is there: it is broken, not absent
	}
	for _, addr := range []string{a.o.NATSListen, a.o.APIListen} {
		if host, _, err := net.SplitHostPort(addr); addr != "" && (err != nil || !loopback(host)) {
			return fmt.Errorf("%w (it would listen on %s)", ErrNoKeys, addr)
		}
	}
	if a.o.NATSURL != "" || a.o.Cluster != nil {
		return fmt.Errorf("%w (the bus is shared with other authorities: they need the same keys)", ErrNoKeys)
	}
	a.store, err = trust.Init(trust.InitOptions{Dir: dir, Tenants: a.o.Tenants}, session.InstantOf(time.Now()))
	if err != nil {
		return err
	}
	a.notice("first start: made the root key, a signing key and the key of tenant %s in %s; move %s to a safe place, off this machine",
		strings.Join(tenantNames(a.store.KeySet()), ", "), dir, filepath.Join(dir, trust.RootFile))
	return nil
}

func tenantNames(ks *session.KeySet) []string {
	var names []string
	for _, t := range ks.Tenants {
		names = append(names, t.Name)
	}
	return names
}

// openBus starts or reaches the bus and makes the streams.
func (a *Authority) openBus(ctx context.Context) error {
	seed := a.store.AuthoritySeed()
	connect := func(name string) (*nats.Conn, error) { return a.dial(ctx, seed, name) }
	if a.o.NATSURL == "" {
		nkey, err := a.store.AuthorityNKey()
		if err != nil {
			return err
		}
		ks := a.store.KeySet()
		emergency, err := broker.EmergencyOf(ks)
		if err != nil {
			return err
		}
		a.orders.admitted = ks.Version
		if a.broker, err = broker.Start(broker.Options{
			Emergency: emergency,
			Dir:       filepath.Join(a.o.DataDir, BusDir), Listen: a.o.NATSListen, TLS: a.o.NATSTLS, Authority: nkey,
			Cluster: a.o.Cluster, RelaxedSync: a.o.RelaxedSync, Logger: a.log,
		}); err != nil {
			return err
		}
		connect = func(name string) (*nats.Conn, error) { return a.broker.Conn(ctx, seed, nats.Name(name), a.busErrors()) }
	}
	var err error
	if a.nc, err = connect("interlock authority"); err != nil {
		return err
	}
	if a.own, err = connect("interlock sequencer"); err != nil {
		return err
	}
	js, err := jetstream.New(a.nc)
	if err != nil {
		return fmt.Errorf("authority: %w", err)
	}
	return a.patiently(ctx, func(ctx context.Context) error { return broker.EnsureStreams(ctx, js, a.o.Replicas) })
}

// patiently takes a step of the start that needs the store. A cluster that has
// just come up has no leaders yet, and one that just came up may lose them
// again.
func (a *Authority) patiently(ctx context.Context, step func(context.Context) error) error {
	for {
		try, cancel := context.WithTimeout(ctx, 5*time.Second)
		err := step(try)
		cancel()
		if err == nil || !transient(err) {
			return err
		}
		a.log.Info("waiting for the bus", "error", err)
		select {
		case <-ctx.Done():
			return fmt.Errorf("authority: %w: %w", ctx.Err(), err)
		case <-time.After(250 * time.Millisecond):
		}
	}
}

// transient reports whether an error of the store may pass by itself.
func transient(err error) bool {
	var api *jetstream.APIError
	return errors.Is(err, nats.ErrNoResponders) || errors.Is(err, nats.ErrTimeout) || errors.Is(err, context.DeadlineExceeded) ||
		errors.Is(err, jetstream.ErrNoStreamResponse) || errors.Is(err, jetstream.ErrJetStreamNotEnabled) ||
		errors.As(err, &api) && api.Code >= 500
}

// tendStore brings the store back once a disk that was full has room.
func (a *Authority) tendStore(ctx context.Context) {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	why := ""
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if a.broker.Sound() {
			continue
		}
		if err := a.broker.Revive(); err != nil {
			if why != err.Error() {
				why = err.Error()
				a.log.Error("the store does not take writes: decisions are in effect and not durable", "error", err)
			}
			continue
		}
		why = ""
		a.log.Warn("the store was started anew after an error of the disk")
	}
}

// busErrors logs what nats.go would otherwise print.
func (a *Authority) busErrors() nats.Option {
	return nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) { a.log.Warn("bus error", "error", err) })
}

func (a *Authority) dial(ctx context.Context, seed, name string) (*nats.Conn, error) {
	secure := a.o.NATSClientTLS
	for s := range strings.SplitSeq(a.o.NATSURL, ",") {
		u, err := url.Parse(strings.TrimSpace(s))
		if err != nil || u.Hostname() == "" || u.User != nil {
			return nil, errors.New("authority: the NATS URL must be nats://host:port or tls://host:port, without a password")
		}
		if secure == nil && !loopback(u.Hostname()) {
			secure = &tls.Config{MinVersion: tls.VersionTLS12}
		}
	}
	opts := []nats.Option{
		nats.Name(name), a.busErrors(), nats.MaxReconnects(-1), nats.ReconnectWait(50 * time.Millisecond),
		nats.PingInterval(500 * time.Millisecond), nats.MaxPingsOutstanding(2),
		// A server that starts or reloads may not know the accounts yet: two
		// refusals are no reason to give the bus up for good.
		nats.IgnoreAuthErrorAbort(),
	}
	if d, ok := ctx.Deadline(); ok {
		opts = append(opts, nats.Timeout(min(5*time.Second, time.Until(d))))
	}
	if secure != nil {
		opts = append(opts, nats.Secure(secure))
	}
	if a.o.NATSCreds != "" {
		opts = append(opts, nats.UserCredentials(a.o.NATSCreds))
	} else {
		kp, err := nkeys.FromSeed([]byte(seed))
		if err != nil {
			return nil, errors.New("authority: malformed NKey seed")
		}
		pub, err := kp.PublicKey()
		if err != nil {
			return nil, errors.New("authority: malformed NKey seed")
		}
		opts = append(opts, nats.Nkey(pub, kp.Sign))
	}
	nc, err := nats.Connect(a.o.NATSURL, opts...)
	if err != nil {
		return nil, fmt.Errorf("authority: the bus at %s: %w", a.o.NATSURL, err)
	}
	return nc, nil
}

// openReceipts hears receipts, and recalls the last stored one of each enforcer:
// an authority that was restarted knows who is alive, and believes no replay.
func (a *Authority) openReceipts(ctx context.Context) error {
	js, err := jetstream.New(a.nc)
	if err != nil {
		return fmt.Errorf("authority: %w", err)
	}
	s, err := js.Stream(ctx, natsfeed.ReceiptStream)
	if err != nil {
		return fmt.Errorf("authority: %w", err)
	}
	for _, e := range a.roster.Enforcers() {
		subject := natsfeed.ReceiptSubject(e.Name)
		m, err := s.GetLastMsgForSubject(ctx, subject)
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			continue
		}
		if err != nil {
			return fmt.Errorf("authority: receipts: %w", err)
		}
		if err := a.tracker.Recall(subject, m.Data, m.Time); err != nil {
			a.log.Debug("a stored receipt was refused", "enforcer", e.Name, "error", err)
		}
	}
	// Whoever opens asks for the clock first, and is expected from then on.
	if _, err := a.nc.Subscribe(natsfeed.ClockSubjects, func(m *nats.Msg) { a.tracker.Asked(m.Subject) }); err != nil {
		return fmt.Errorf("authority: %w", err)
	}
	if _, err := a.nc.Subscribe(natsfeed.ReceiptSubjects, func(m *nats.Msg) {
		if err := a.tracker.Receive(m.Subject, m.Data); err != nil {
			a.log.Debug("a receipt was refused", "subject", m.Subject, "error", err)
			return
		}
		if a.seq.IsWriter() {
			a.watched.receipt(m.Data)
		}
	}); err != nil {
		return fmt.Errorf("authority: %w", err)
	}
	return nil
}

// receiptKey finds the key of an enforcer that is enrolled, or was.
func (a *Authority) receiptKey(name string) (ed25519.PublicKey, bool) {
	e, ok := a.roster.Find(name)
	return e.ReceiptKey, ok
}

// serves reports whether an enforcer is, or was, enrolled for a tenant.
func (a *Authority) serves(enforcer, tenant string) bool {
	e, ok := a.roster.Find(enforcer)
	t, known := a.store.KeySet().Tenant(tenant)
	return ok && known && slices.Contains(e.Tenants, t.ID)
}

// onBatch hears the log's own subject. What no writer signed is none of its
// business.
func (a *Authority) onBatch(m *nats.Msg) {
	f, err := session.ParseFrame(m.Data)
	if err != nil || f.Type != session.TypeBatch {
		return
	}
	b, err := session.UnmarshalBatch(f.Body)
	if err != nil {
		return
	}
	if _, err := a.store.Trust().Writer(&f, b.Number, false, session.InstantOf(time.Now())); err != nil {
		return
	}
	if b.IsCanary() {
		a.tracker.Canary(b.Epoch, b.Number, b.Time.Time())
	}
	if !b.IsCanary() && len(b.Entries) > 0 {
		a.watched.heard(place{b.Epoch, b.Number})
	}
	a.hub.heard(b)
}

// onRoster brings the bus and the tracker in line with the roster.
func (a *Authority) onRoster(list []roster.Enforcer) error {
	// The tracker comes first: whoever is let in is expected.
	a.tracker.SetEnforcers(list)
	a.claims.keep(list)
	if a.broker == nil {
		return nil
	}
	return a.broker.SetEnforcers(busUsers(list))
}

func busUsers(list []roster.Enforcer) []broker.Enforcer {
	users := make([]broker.Enforcer, len(list))
	for i, e := range list {
		users[i] = broker.Enforcer{Name: e.Name, PublicNKey: e.NKey}
	}
	return users
}

// accepted takes what a believed receipt says of the log itself.
func (a *Authority) accepted(r *session.Receipt) {
	for _, frame := range r.Orders {
		a.hearOrder(frame, "enforcer "+r.Enforcer, true)
	}
	a.flow.denied(r.Enforcer, r.Boot, r.Denied)
	if r.Confirmed != r.Number || a.seq == nil {
		return // its head is not one that it knows to be in the log
	}
	epoch, number, _ := a.seq.Head() // read after the receipt: an honest one is not ahead of a writer
	if r.Epoch != epoch {
		return
	}
	for _, c := range a.claims.weigh(r, (*logView)(a), number) {
		a.seq.Heard(c.epoch, c.number, c.head)
	}
}

// claims holds what enforcers say of a log that is not the one known here. The
// sequencer stops writing when it must believe that it was given an old log, so
// the word of one is never enough, not even of the only one that lives: an
// enforcer that was turned must not be able to stop the log. The status shows a
// single claim, and whoever makes it in good faith denies by itself.
type claims struct {
	mu  sync.Mutex
	all map[string]claim
}

type claim struct {
	epoch, number uint64
	head          session.Hash
}

// corroborated is how many enforcers must say that there is another log.
const corroborated = 2

// keep forgets the claims of those who are not in the roster any more.
func (c *claims) keep(list []roster.Enforcer) {
	c.mu.Lock()
	defer c.mu.Unlock()
	maps.DeleteFunc(c.all, func(name string, _ claim) bool {
		return !slices.ContainsFunc(list, func(e roster.Enforcer) bool { return e.Name == name })
	})
}

// weigh takes an accepted receipt and returns the claims that the log, whose
// newest batch is number, gives the lie to, when there are enough of them. What
// was claimed earlier is judged anew: the log may have caught up with it, and
// whoever was merely ahead is no second witness.
func (c *claims) weigh(r *session.Receipt, log roster.Log, number uint64) []claim {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.all == nil {
		c.all = map[string]claim{}
	}
	c.all[r.Enforcer] = claim{r.Epoch, r.Number, r.Head}
	maps.DeleteFunc(c.all, func(_ string, o claim) bool {
		h, ok := log.HashAt(o.epoch, o.number)
		// A batch that is too long ago to be known says nothing either way.
		return o.epoch != r.Epoch || o.number == 0 || ok && h == o.head || !ok && o.number <= number
	})
	if _, ok := c.all[r.Enforcer]; !ok {
		return nil
	}
	same := slices.Collect(maps.Values(c.all))
	if len(same) < corroborated {
		return nil
	}
	return same
}

// logView is the log as the tracker sees it.
type logView Authority

// HashAt implements roster.Log.
func (v *logView) HashAt(epoch, number uint64) (session.Hash, bool) {
	if v.seq == nil {
		return session.Hash{}, false
	}
	if now, _, _ := v.seq.Head(); now != epoch {
		return session.Hash{}, false
	}
	return v.seq.HashAt(number)
}

// TimeAt implements roster.Log.
func (v *logView) TimeAt(epoch, number uint64) (time.Time, bool) { return v.hub.timeAt(epoch, number) }

// secretCache keeps the tenants' secrets of one key set: a secret is asked for
// with each decision.
type secretCache struct {
	mu      sync.Mutex
	version uint64
	list    []*session.TenantSecret
	missing []string
}

func (a *Authority) tenants() (t tenants, missing []string) {
	c := &a.secrets
	c.mu.Lock()
	defer c.mu.Unlock()
	// The version is read first: one that changes meanwhile is seen next time.
	if v := a.store.KeySet().Version; c.list == nil || c.version != v {
		c.list, c.missing = a.store.Secrets()
		c.version = v
	}
	return tenants{c.list}, c.missing
}

// dedupe remembers what idempotency keys were used for, for as long as there is
// room, to refuse one that is used again for something else.
type dedupe struct {
	mu    sync.Mutex
	seen  map[string][32]byte
	order []string
}

const maxSeen = 4096

// check reports whether key was used for another content.
func (d *dedupe) check(key string, content [32]byte) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	have, ok := d.seen[key]
	return ok && have != content
}

func (d *dedupe) add(key string, content [32]byte) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if _, ok := d.seen[key]; ok {
		return
	}
	if d.seen == nil {
		d.seen = map[string][32]byte{}
	}
	if len(d.order) >= maxSeen {
		delete(d.seen, d.order[0])
		d.order = slices.Delete(d.order, 0, 1)
	}
	d.seen[key] = content
	d.order = append(d.order, key)
}

// loopback reports whether host is certain to be this machine; other names than
// localhost are not resolved.
func loopback(host string) bool {
	if host == "localhost" {
		return true
	}
	ip, err := netip.ParseAddr(host)
	return err == nil && ip.Unmap().IsLoopback()
}
