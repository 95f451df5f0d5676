package broker

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"github.com/interlock-fabric/interlock/internal/flock"
	"github.com/interlock-fabric/interlock/pkg/session"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nkeys"
)

// Bounds of the server.
const (
	// DefaultMaxPayload is the largest message: a frame and its headers fit
	// twice over.
	DefaultMaxPayload = 1 << 20

	// maxPending is what may wait for one client before it is cut as a slow
	// consumer; it also bounds what one read of a stream can make the server
	// queue. nats-server's default is 64 MiB.
	maxPending    = 32 << 20
	writeDeadline = 5 * time.Second
	// pingInterval finds dead enforcers' connections; an enforcer finds a dead
	// server by pings of its own.
	pingInterval = 10 * time.Second
	maxSubs      = 1024
	startTimeout = 30 * time.Second
)

var (
	// ErrInUse: another broker runs on the directory.
	ErrInUse = errors.New("broker: directory is in use by another broker")
	// ErrNoTLS: the listen address is not a loopback one and no certificate
	// was given.
	ErrNoTLS = errors.New("broker: TLS is required outside loopback: give a certificate, or listen on 127.0.0.1")
	// ErrClosed: the broker has been closed.
	ErrClosed = errors.New("broker: closed")
)

// Enforcer is an enrolled enforcer, as the bus knows it.
type Enforcer struct {
	// Name is its name in the roster; see session.ValidEnforcerName.
	Name string
	// PublicNKey is the public half of its NKey ("U…").
	PublicNKey string
}

// Options configures a broker. Dir and Authority are required.
type Options struct {
	// Dir holds the streams. It is made if absent, with mode 0700, and belongs
	// to one broker at a time.
	Dir string
	// Listen is the host:port for enforcers and other authorities; port 0 takes
	// a free one. Empty serves in-process connections only. A host must be
	// named: a bare ":4222" is refused.
	Listen string
	// TLS serves the listener. It is required outside loopback. GetCertificate
	// allows the certificate to change while the broker runs.
	TLS *tls.Config
	// RelaxedSync leaves fsync to the background. An acknowledged decision can
	// then be lost on power failure; it is for tests and measurements.
	RelaxedSync bool
	// Authority is the public NKey of the authorities.
	Authority string
	// Enforcers, and the holders of the Emergency keys, may connect from the start.
	Enforcers []Enforcer
	Emergency []Emergency
	// Cluster makes this one server of a cluster, which needs Listen; nil is a
	// single server.
	Cluster *Cluster
	// MaxPayload is the largest message in bytes; 0 is DefaultMaxPayload.
	MaxPayload int
	// Logger receives what the server says; nil is silence.
	Logger *slog.Logger
}

// Cluster places a broker in a cluster of three or five.
type Cluster struct {
	// Name is the cluster's, the same on all its servers.
	Name string
	// ServerName is this server's own, and must stay the same over restarts.
	ServerName string
	// Listen is the host:port for the other servers.
	Listen string
	// Routes are the host:port of the other servers; its own is permitted.
	Routes []string
	// Secret is what the servers of the cluster show each other. Required: a
	// route carries every right there is.
	Secret string
	// TLS serves and dials routes, both sides verified. Required outside
	// loopback.
	TLS *tls.Config
}

func (o *Options) validate() error {
	bad := func(format string, a ...any) error { return fmt.Errorf("broker: "+format, a...) }
	switch {
	case o.Dir == "":
		return bad("no directory")
	case !nkeys.IsValidPublicUserKey(o.Authority):
		return bad("the authority's public NKey is missing or malformed")
	case o.MaxPayload < 0 || o.MaxPayload > 8<<20:
		return bad("a largest message of %d bytes is out of range", o.MaxPayload)
	case o.MaxPayload > 0 && o.MaxPayload < session.MaxFrameLen+maxHeader:
		return bad("a largest message of %d bytes does not hold a frame", o.MaxPayload)
	}
	if o.Listen != "" {
		host, _, err := splitListen(o.Listen)
		if err != nil {
			return err
		}
		if o.TLS == nil && !loopback(host) {
			return fmt.Errorf("%w (listen address %s)", ErrNoTLS, o.Listen)
		}
	}
	if c := o.Cluster; c != nil {
		host, _, err := splitListen(c.Listen)
		switch {
		case err != nil:
			return err
		case o.Listen == "":
			// nats-server starts its routes after its listener, and neither
			// starts nor stops without one.
			return bad("a server of a cluster needs a listen address")
		case c.Name == "" || c.ServerName == "":
			return bad("a server of a cluster needs the cluster's name and its own")
		case c.Secret == "":
			return bad("a cluster needs a secret for its routes")
		case c.TLS == nil && !loopback(host):
			return fmt.Errorf("%w (cluster address %s)", ErrNoTLS, c.Listen)
		}
		for _, r := range c.Routes {
			rhost, _, err := splitListen(r)
			if err != nil {
				return err
			}
			if c.TLS == nil && !loopback(rhost) {
				return fmt.Errorf("%w (route %s)", ErrNoTLS, r)
			}
		}
	}
	return validateUsers(o.Authority, o.Enforcers, o.Emergency)
}

func validateUsers(authority string, list []Enforcer, emergency []Emergency) error {
	names, keys := map[string]bool{}, map[string]bool{authority: true}
	for _, e := range list {
		switch {
		case !session.ValidEnforcerName(e.Name):
			return fmt.Errorf("broker: %q cannot name an enforcer", e.Name)
		case !nkeys.IsValidPublicUserKey(e.PublicNKey):
			return fmt.Errorf("broker: enforcer %s: malformed public NKey", e.Name)
		case names[e.Name]:
			return fmt.Errorf("broker: enforcer %s is listed twice", e.Name)
		case keys[e.PublicNKey]:
			return fmt.Errorf("broker: enforcer %s has another's NKey", e.Name)
		}
		names[e.Name], keys[e.PublicNKey] = true, true
	}
	for _, e := range emergency {
		switch {
		case !nkeys.IsValidPublicUserKey(e.PublicNKey):
			return fmt.Errorf("broker: emergency key %s: malformed public NKey", e.Key)
		case keys[e.PublicNKey]:
			return fmt.Errorf("broker: emergency key %s has another's NKey", e.Key)
		}
		keys[e.PublicNKey] = true
	}
	return nil
}

// Broker is a running server. Its methods may be called concurrently.
type Broker struct {
	opts Options
	srv  *server.Server
	lock *os.File
	gate gate

	mu        sync.Mutex // serialises SetEnforcers, SetEmergency and Close
	closed    bool
	enforcers []Enforcer
	emergency []Emergency
	done      chan struct{}
}

// Start starts a broker and returns when it accepts connections and its streams
// are recovered; in a cluster, a leader may still have to be elected. Errors
// wrap ErrInUse or ErrNoTLS where those are the reason.
func Start(o Options) (*Broker, error) {
	if err := o.validate(); err != nil {
		return nil, err
	}
	if o.MaxPayload == 0 {
		o.MaxPayload = DefaultMaxPayload
	}
	if err := os.MkdirAll(o.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("broker: %w", err)
	}
	// MkdirAll leaves a directory that exists as it is.
	if err := os.Chmod(o.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("broker: %w", err)
	}
	lock, err := flock.Acquire(filepath.Join(o.Dir, "lock"))
	if errors.Is(err, flock.ErrHeld) {
		return nil, fmt.Errorf("%w: %s", ErrInUse, o.Dir)
	}
	if err != nil {
		return nil, fmt.Errorf("broker: %w", err)
	}
	b := &Broker{opts: o, lock: lock, done: make(chan struct{}), enforcers: o.Enforcers, emergency: o.Emergency}
	if err := b.start(); err != nil {
		return nil, errors.Join(err, b.Close())
	}
	return b, nil
}

func (b *Broker) start() error {
	so, err := b.serverOptions()
	if err != nil {
		return err
	}
	// The server answers nobody before the gate knows who may come.
	so.CustomClientAuthentication, so.AlwaysEnableNonce = &b.gate, true
	srv, err := server.NewServer(so)
	if err != nil {
		return fmt.Errorf("broker: %w", err)
	}
	log := &serverLog{log: b.opts.Logger}
	srv.SetLoggerV2(log, false, false, false)
	b.srv = srv
	if err := b.gate.open(srv, b.opts.Authority); err != nil {
		return err
	}
	if err := b.gate.set(holders(b.enforcers, b.emergency)); err != nil {
		return err
	}
	srv.Start()
	for deadline := time.Now().Add(startTimeout); !srv.ReadyForConnections(100 * time.Millisecond); {
		if why := log.failure(); why != "" {
			return fmt.Errorf("broker: %s", why)
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("broker: not ready after %s", startTimeout)
		}
	}
	if !srv.JetStreamEnabled() {
		return fmt.Errorf("broker: JetStream did not start: %s", log.failure())
	}
	return nil
}

// serverOptions builds the configuration, the enforcers apart.
func (b *Broker) serverOptions() (*server.Options, error) {
	o := &b.opts
	so := &server.Options{
		NoSigs:                 true,
		DisableJetStreamBanner: true,
		MaxPayload:             int32(o.MaxPayload),
		MaxPending:             maxPending,
		WriteDeadline:          writeDeadline,
		PingInterval:           pingInterval,
		MaxSubs:                maxSubs,
		JetStream:              true,
		StoreDir:               o.Dir,
		SyncAlways:             !o.RelaxedSync,
	}
	if o.Listen == "" {
		so.DontListen = true
	} else {
		host, port, err := splitListen(o.Listen)
		if err != nil {
			return nil, err
		}
		so.Host, so.Port = host, port
		so.TLSConfig, so.TLS = o.TLS, o.TLS != nil
	}
	if c := o.Cluster; c != nil {
		host, port, err := splitListen(c.Listen)
		if err != nil {
			return nil, err
		}
		so.ServerName = c.ServerName
		so.Cluster = server.ClusterOpts{
			Name: c.Name, Host: host, Port: port,
			Username: "route", Password: c.Secret,
			TLSConfig: c.TLS,
			// The other servers are named; what they advertise is not needed.
			NoAdvertise: true,
			// A frozen peer must not hold messages back for the default 10 s
			// of a write.
			PingInterval: 2 * time.Second, MaxPingsOut: 2,
		}
		for _, r := range c.Routes {
			so.Routes = append(so.Routes, &url.URL{Scheme: "nats", Host: r, User: url.UserPassword("route", c.Secret)})
		}
	}
	if err := so.ProcessConfigString(accountsConfig(o.Authority, nil)); err != nil {
		return nil, fmt.Errorf("broker: accounts: %w", err)
	}
	return so, nil
}

// ClientURL returns the URL that clients dial, or "" when the broker serves
// in-process connections only.
func (b *Broker) ClientURL() string {
	if b.opts.Listen == "" {
		return ""
	}
	return b.srv.ClientURL()
}

// Conn returns a connection inside the process, authenticated by the NKey seed.
// It survives nothing: when the broker closes, so does the connection. The
// caller closes it. ctx bounds the connecting alone.
func (b *Broker) Conn(ctx context.Context, seed string, opts ...nats.Option) (*nats.Conn, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	select {
	case <-b.done:
		return nil, ErrClosed
	default:
	}
	kp, err := nkeys.FromSeed([]byte(seed))
	if err != nil {
		return nil, errors.New("broker: malformed NKey seed")
	}
	pub, err := kp.PublicKey()
	if err != nil {
		return nil, errors.New("broker: malformed NKey seed")
	}
	timeout := nats.DefaultTimeout
	if d, ok := ctx.Deadline(); ok {
		timeout = min(timeout, time.Until(d))
	}
	all := append([]nats.Option{
		nats.InProcessServer(b.srv), nats.Timeout(timeout),
		nats.Nkey(pub, kp.Sign),
		nats.MaxReconnects(-1), nats.ReconnectWait(50 * time.Millisecond),
	}, opts...)
	nc, err := nats.Connect("", all...)
	if err != nil {
		return nil, fmt.Errorf("broker: in-process connection: %w", err)
	}
	return nc, nil
}

// SetEnforcers replaces the list of enforcers that may connect. It takes effect
// before it returns: a removed enforcer is disconnected and cannot come back; the
// connections of those that stay are not touched. In a cluster it concerns this
// server alone.
func (b *Broker) SetEnforcers(list []Enforcer) error {
	return b.set(func() { b.enforcers = list })
}

// SetEmergency replaces the list of emergency keys whose holders may connect, in
// the same way.
func (b *Broker) SetEmergency(list []Emergency) error {
	return b.set(func() { b.emergency = list })
}

func (b *Broker) set(change func()) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return ErrClosed
	}
	enforcers, emergency := b.enforcers, b.emergency
	change()
	err := validateUsers(b.opts.Authority, b.enforcers, b.emergency)
	if err != nil {
		b.enforcers, b.emergency = enforcers, emergency
		return err
	}
	return b.gate.set(holders(b.enforcers, b.emergency))
}

// Sound reports whether the store takes writes, as far as it has tried. nats-server
// stops it when the disk is full, or holds the error against the stream that met
// it. In a cluster only the former shows: a stream moves to another server then.
func (b *Broker) Sound() bool {
	switch {
	case !b.srv.JetStreamEnabled():
		return false
	case b.opts.Cluster != nil:
		return true
	}
	return b.srv.Healthz(&server.HealthzOptions{}).Status == "ok"
}

// Revive starts the store anew after an error of the disk, which nats-server never
// does by itself, and returns when its streams are recovered. Connections stay, and
// what is published goes on being heard. While the disk still takes no writes it
// changes nothing and returns that error.
func (b *Broker) Revive() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return ErrClosed
	}
	if err := probe(b.opts.Dir); err != nil {
		return fmt.Errorf("broker: the disk: %w", err)
	}
	if err := b.srv.ShutdownJetStream(); err != nil {
		return fmt.Errorf("broker: %w", err)
	}
	if err := b.srv.EnableJetStream(&server.JetStreamConfig{StoreDir: b.opts.Dir}); err != nil {
		return fmt.Errorf("broker: %w", err)
	}
	return nil
}

// probe reports whether there is room in dir for the streams to grow a little.
func probe(dir string) error {
	f, err := os.CreateTemp(dir, "probe-*")
	if err != nil {
		return err
	}
	_, err = f.Write(make([]byte, 4<<20))
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close(), os.Remove(f.Name()))
}

// Close shuts the server down, waits until all of it has stopped, and frees the
// directory. Every call returns after that.
func (b *Broker) Close() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return nil
	}
	b.closed = true
	close(b.done)
	if b.srv != nil {
		b.srv.Shutdown()
		b.srv.WaitForShutdown()
	}
	return b.lock.Close()
}

// splitListen parses host:port. Port 0 becomes nats-server's "any".
func splitListen(s string) (string, int, error) {
	host, p, err := net.SplitHostPort(s)
	if err != nil {
		return "", 0, fmt.Errorf("broker: address %q: want host:port", s)
	}
	if host == "" {
		return "", 0, fmt.Errorf("broker: address %q names no host", s)
	}
	port, err := strconv.Atoi(p)
	if err != nil || port < 0 || port > 65535 {
		return "", 0, fmt.Errorf("broker: address %q: bad port", s)
	}
	if port == 0 {
		port = server.RANDOM_PORT
	}
	return host, port, nil
}

// loopback reports whether host is certain to be this machine. Names other than
// localhost are not resolved: what they resolve to can change.
func loopback(host string) bool {
	if host == "localhost" {
		return true
	}
	ip, err := netip.ParseAddr(host)
	return err == nil && ip.Unmap().IsLoopback()
}
