package natsfeed

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"net/url"
	"strings"
	"time"

	"github.com/interlock-fabric/interlock/pkg/session"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nkeys"
)

// Options changes what Dial does. Nil and the zero value are good.
type Options struct {
	// Logger receives changes of the link and errors of the bus; nil is silence.
	Logger *slog.Logger
	// NATS are applied last.
	NATS []nats.Option
}

// Dial returns a feed with a connection of its own to the bus of the enrolment.
// A bus that is not there is no error: the feed goes on trying. TLS is demanded
// when the enrolment has CAs and when any server is outside loopback. Errors are
// those of the enrolment, wrap session.ErrInvalid, and show no secret.
func Dial(e *session.Enrollment, o *Options) (*Feed, error) {
	if e == nil || !session.ValidEnforcerName(e.Enforcer) {
		return nil, fmt.Errorf("%w: no enrolment, or one without a name", session.ErrInvalid)
	}
	if o == nil {
		o = &Options{}
	}
	key, err := nkeys.FromSeed([]byte(e.NATS.NKeySeed))
	if err != nil {
		return nil, fmt.Errorf("%w: enrolment: malformed NKey seed", session.ErrInvalid)
	}
	pub, err := key.PublicKey()
	if err != nil {
		return nil, fmt.Errorf("%w: enrolment: malformed NKey seed", session.ErrInvalid)
	}
	secure, err := transport(e.NATS)
	if err != nil {
		return nil, err
	}
	log := o.Logger
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	// nats.go runs its handlers one at a time. A reason is told once, not
	// twenty times a second.
	last := ""
	complain := func(what string, err error) {
		if err != nil && err.Error() != last {
			last = err.Error()
			log.Warn(what, "enforcer", e.Enforcer, "error", err)
		}
	}
	opts := []nats.Option{
		nats.Name("interlock enforcer " + e.Enforcer),
		nats.Nkey(pub, key.Sign),
		nats.CustomInboxPrefix(InboxPrefix(e.Enforcer)),
		nats.Timeout(2 * time.Second),
		nats.RetryOnFailedConnect(true),
		nats.MaxReconnects(-1),
		nats.CustomReconnectDelay(reconnectDelay),
		// A refusal may be the server's list lagging behind the roster.
		nats.IgnoreAuthErrorAbort(),
		// A frozen server is noticed after 1.5 s, not 4 minutes.
		nats.PingInterval(500 * time.Millisecond), nats.MaxPingsOutstanding(2),
		// nats.go writes with its lock held: everything, Close included, would wait
		// for a link that takes no more bytes.
		nats.FlusherTimeout(2 * time.Second),
		// Nothing waits for a connection: a request would be out of time and a
		// receipt out of date.
		nats.ReconnectBufSize(-1),
		// The enrolment says where the bus is; a server does not.
		nats.IgnoreDiscoveredServers(),
		nats.NoCallbacksAfterClientClose(),
		nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) {
			complain("bus error", err)
		}),
		nats.DisconnectErrHandler(func(_ *nats.Conn, err error) {
			log.Info("bus link down", "enforcer", e.Enforcer, "error", err)
		}),
		nats.ReconnectErrHandler(func(_ *nats.Conn, err error) {
			complain("bus cannot be reached", err)
		}),
		nats.ReconnectHandler(func(nc *nats.Conn) {
			last = ""
			log.Info("bus link up", "enforcer", e.Enforcer, "server", nc.ConnectedUrlRedacted())
		}),
	}
	if secure != nil {
		opts = append(opts, nats.Secure(secure))
	}
	nc, err := nats.Connect(strings.Join(e.NATS.URLs, ","), append(opts, o.NATS...)...)
	if err != nil {
		return nil, fmt.Errorf("natsfeed: %w", err)
	}
	f := New(nc, e.Enforcer)
	f.owned = true
	return f, nil
}

// reconnectDelay is short for as long as a restart takes, and then easier on a
// bus that is really down. The jitter keeps a fleet from coming back as one.
func reconnectDelay(attempt int) time.Duration {
	d := 50 * time.Millisecond
	if attempt > 40 {
		d = 500 * time.Millisecond
	}
	return d + rand.N(d) //nolint:gosec // jitter is no secret
}

// transport returns the TLS configuration for the servers, or nil when plain TCP
// is permitted.
func transport(n session.NATSAccess) (*tls.Config, error) {
	if len(n.URLs) == 0 {
		return nil, fmt.Errorf("%w: enrolment names no server of the bus", session.ErrInvalid)
	}
	plain := n.CAs == ""
	for _, s := range n.URLs {
		u, err := url.Parse(s)
		// The text of a parse error would show a password in the URL.
		if err != nil || u.Hostname() == "" || strings.Contains(s, ",") || u.Scheme != "nats" && u.Scheme != "tls" {
			return nil, fmt.Errorf("%w: enrolment: a server of the bus is nats://host:port or tls://host:port", session.ErrInvalid)
		}
		plain = plain && u.Scheme == "nats" && loopback(u.Hostname())
	}
	if plain {
		return nil, nil
	}
	c := &tls.Config{MinVersion: tls.VersionTLS12}
	if n.CAs != "" {
		c.RootCAs = x509.NewCertPool()
		if !c.RootCAs.AppendCertsFromPEM([]byte(n.CAs)) {
			return nil, fmt.Errorf("%w: enrolment: no certificate among the CAs", session.ErrInvalid)
		}
	}
	return c, nil
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
