package access

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/interlock-fabric/interlock/internal/issuers"
	"github.com/interlock-fabric/interlock/pkg/authority"
	"github.com/interlock-fabric/interlock/pkg/credential"
	"github.com/interlock-fabric/interlock/pkg/credential/discovery"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// anyTenant is what the verifier calls the tenant of every token: here tenants
// come from grants.
const anyTenant = "authority"

// Options configures an Authenticator.
type Options struct {
	// Config is who may use the API. Nil is the bearer of Bootstrap alone, and
	// users of this machine.
	Config *Config
	// Bootstrap is the bootstrap token; empty is none. With a Config it is
	// refused, and the refusal says so.
	Bootstrap string
	// Clock is the local clock; nil is time.Now.
	Clock func() time.Time
	// Before is the Authenticator that this one takes the place of; nil is none.
	// Where the issuers are the same, what it knows of their keys is kept.
	Before *Authenticator
}

// Authenticator finds out who sends a request. It is safe for concurrent use.
type Authenticator struct {
	config    *Config
	bootstrap [sha256.Size]byte // of the token
	hasToken  bool
	clock     func() time.Time
	verifier  *verifier // nil without issuers
	issuers   map[string]*IssuerConfig
	cas       *x509.CertPool // nil without a client CA
	clients   map[string]client
	uid       int
	closed    atomic.Bool
}

// verifier may be that of several Authenticators, of which each is the other's
// Before.
type verifier struct {
	*credential.Verifier
	options Config // those that it depends on
	users   atomic.Int64
}

// client is an OAuth client with a secret.
type client struct {
	secret [sha256.Size]byte // of it
	grant  Grant
}

// Bounds of a client's secret, in bytes: one that is shorter can be guessed.
const (
	minSecret = 32
	maxSecret = 4096
)

// New makes an Authenticator. It reads the files that the configuration names, and
// fetches nothing yet. Errors wrap ErrInvalid.
func New(o Options) (*Authenticator, error) {
	a := &Authenticator{
		config: o.Config, bootstrap: sha256.Sum256([]byte(o.Bootstrap)), hasToken: o.Bootstrap != "",
		clock: o.Clock, issuers: map[string]*IssuerConfig{}, uid: os.Geteuid(),
	}
	if a.clock == nil {
		a.clock = time.Now
	}
	if o.Config == nil {
		return a, nil
	}
	if path := o.Config.ClientCA; path != "" {
		pem, err := os.ReadFile(path)
		if err != nil {
			return nil, fmt.Errorf("%w: client_ca: %w", ErrInvalid, err)
		}
		a.cas = x509.NewCertPool()
		if !a.cas.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("%w: client_ca: %s has no certificate: give PEM", ErrInvalid, path)
		}
	}
	if err := a.readClients(); err != nil {
		return nil, err
	}
	if len(o.Config.Issuers) == 0 {
		return a, nil
	}
	if b := o.Before; b != nil && b.verifier != nil && b.verifier.serves(o.Config) {
		a.verifier, a.issuers = b.verifier, map[string]*IssuerConfig{}
		for n := range o.Config.Issuers {
			a.issuers[o.Config.Issuers[n].URL] = &o.Config.Issuers[n]
		}
		a.verifier.users.Add(1)
		return a, nil
	}
	proof, err := credential.NewProofChecker(credential.ProofOptions{Origin: o.Config.origin(), Clock: a.clock})
	if err != nil {
		return nil, fmt.Errorf("%w: origin: %w", ErrInvalid, err)
	}
	co := credential.Options{Audiences: []string{o.Config.Audience}, Clock: a.clock, Possession: proof.Check, CacheBytes: 4 << 20}
	for n := range o.Config.Issuers {
		i := &o.Config.Issuers[n]
		iss := credential.Issuer{
			URL: i.URL, Tenant: anyTenant, JWKS: i.JWKS, Types: i.Types, Skew: i.Skew,
			RefreshInterval: i.RefreshInterval, KeysMaxAge: i.KeysMaxAge,
		}
		for _, alg := range i.Algorithms {
			iss.Algorithms = append(iss.Algorithms, jose.SignatureAlgorithm(alg))
		}
		if i.Discovery {
			iss.Discover = discovery.OpenID
		}
		if i.JWKSFile != "" {
			b, err := os.ReadFile(i.JWKSFile)
			if err == nil {
				err = json.Unmarshal(b, &iss.Keys)
			}
			if err != nil {
				return nil, fmt.Errorf("%w: issuers[%d].jwks_file: %w", ErrInvalid, n, err)
			}
		}
		co.Issuers = append(co.Issuers, iss)
		a.issuers[i.URL] = i
	}
	v, err := credential.New(co)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	a.verifier = &verifier{Verifier: v, options: verified(o.Config)}
	a.verifier.users.Store(1)
	return a, nil
}

// verified is what of a configuration its verifier depends on.
func verified(c *Config) Config {
	out := Config{Audience: c.Audience, Origin: c.Origin, Issuers: slices.Clone(c.Issuers)}
	for n := range out.Issuers {
		out.Issuers[n].Clients, out.Issuers[n].Grants = nil, nil
	}
	return out
}

// serves reports whether tokens are verified for c alike. Keys in a file may have
// changed.
func (v *verifier) serves(c *Config) bool {
	return reflect.DeepEqual(v.options, verified(c)) && !slices.ContainsFunc(c.Issuers, func(i IssuerConfig) bool { return i.JWKSFile != "" })
}

func (a *Authenticator) readClients() error {
	a.clients = make(map[string]client, len(a.config.Clients))
	for n := range a.config.Clients {
		c := &a.config.Clients[n]
		b, err := issuers.Secret(c.SecretFile)
		if err != nil {
			return fmt.Errorf("%w: clients[%d].secret_file: %w", ErrInvalid, n, err)
		}
		if len(b) < minSecret || len(b) > maxSecret {
			return fmt.Errorf("%w: clients[%d].secret_file: a secret has %d to %d bytes", ErrInvalid, n, minSecret, maxSecret)
		}
		a.clients[c.ID] = client{sha256.Sum256(b), Grant{c.Role, c.Tenants}}
	}
	return nil
}

// Close ends fetches that are under way. It is idempotent.
func (a *Authenticator) Close() {
	if a.verifier != nil && !a.closed.Swap(true) && a.verifier.users.Add(-1) == 0 {
		a.verifier.Close()
	}
}

// ClientCAs verify client certificates; nil asks for none.
func (a *Authenticator) ClientCAs() *x509.CertPool { return a.cas }

// Configured reports whether principals are configured, so that the bootstrap token
// is refused.
func (a *Authenticator) Configured() bool { return a.config != nil }

// Socket returns who sends a request over the unix socket: its peer, by user id,
// where that is this process's own or root's and the configuration lets it; else
// whoever the request's token says. known is false where the system does not tell
// the peer, whom the socket's mode has let in. The error is a *authority.Problem.
func (a *Authenticator) Socket(r *http.Request, uid int, known bool) (*Principal, error) {
	if r.Header.Get("Authorization") != "" && a.config != nil {
		return a.Request(r) // to act as somebody in particular is always possible
	}
	if a.config != nil && a.config.Local == Off {
		if a.verifier == nil {
			return nil, authority.NewProblem(authority.ProblemUnauthorised, "the socket is closed to users of this machine", "use the API's URL, with a client certificate")
		}
		return a.Request(r)
	}
	switch {
	case !known:
		return operator("operator@localhost", MeansSocket), nil
	case uid == 0 || uid == a.uid:
		return operator("uid:"+strconv.Itoa(uid)+"@localhost", MeansSocket), nil
	}
	return nil, authority.NewProblem(authority.ProblemUnauthorised, "the socket is for the authority's own user and root", "run it as the user who runs session-authority serve")
}

// Request returns who sends a request over TCP, by its bearer token or else its
// client certificate. The error is a *authority.Problem; see Challenge.
func (a *Authenticator) Request(r *http.Request) (*Principal, error) {
	values := r.Header.Values("Authorization")
	switch {
	case len(values) > 0 && a.isBootstrap(values):
		if a.config != nil {
			return nil, authority.NewProblem(authority.ProblemUnauthorised, "the bootstrap token is refused since an issuer or a client CA is configured",
				"sign in with the issuer, or present a client certificate")
		}
		return operator("bootstrap", MeansBootstrap), nil
	case a.config == nil:
		return nil, authority.NewProblem(authority.ProblemUnauthorised, "no valid bearer token", "send the token from the authority's token file")
	case len(a.clients) > 0 && basic(r):
		return a.client(r)
	case len(values) > 0 && a.verifier != nil:
		return a.token(r)
	case len(values) > 0:
		return nil, authority.NewProblem(authority.ProblemUnauthorised, "no issuer of tokens is configured", "present a client certificate, or a client's id and secret, whichever is")
	case a.cas != nil && r.TLS != nil && len(r.TLS.VerifiedChains) > 0:
		return a.certificate(r.TLS.PeerCertificates)
	}
	var ways []string
	if len(a.clients) > 0 {
		ways = append(ways, "send a client's id and secret")
	}
	if a.verifier != nil {
		ways = append(ways, "send a token of a configured issuer")
	}
	if a.cas != nil {
		ways = append(ways, "present a client certificate")
	}
	return nil, authority.NewProblem(authority.ProblemUnauthorised, "nobody is signed in", strings.Join(ways, ", or "))
}

func (a *Authenticator) isBootstrap(values []string) bool {
	scheme, given, _ := strings.Cut(values[0], " ")
	got := sha256.Sum256([]byte(given))
	return a.hasToken && len(values) == 1 && strings.EqualFold(scheme, "Bearer") && subtle.ConstantTimeCompare(got[:], a.bootstrap[:]) == 1
}

// token is whoever a verified token names.
func (a *Authenticator) token(r *http.Request) (*Principal, error) {
	id, err := a.verifier.VerifyRequest(r)
	if errors.Is(err, session.ErrStale) {
		return nil, authority.NewProblem(authority.ProblemUnavailable, "the issuer's keys cannot be fetched, so the token cannot be verified", "try again in a moment, or use the socket on the authority's own machine")
	}
	if err != nil {
		// Its text has nothing of the token.
		return nil, authority.NewProblem(authority.ProblemUnauthorised, err.Error(), "sign in again for a token that is meant for this authority")
	}
	i := a.issuers[id.Issuer]
	name := id.User + "@" + id.Issuer
	if i == nil || id.User == "" || len(name) > 2*maxText || !printable(name) {
		return nil, authority.NewProblem(authority.ProblemUnauthorised, "the token names nobody", "use one with a sub of printable characters")
	}
	p := NewPrincipal(name, MeansToken)
	// Who acts for another, or is itself made from something, is an agent; so is
	// every client that nobody has named as a person's or a service's.
	p.Agent = len(id.Actors) > 0 || len(id.Ancestors) > 0 || id.Blueprint != "" || len(id.Digests) > 0 || !slices.Contains(i.Clients, id.Client)
	claims, err := payload(r)
	if err != nil {
		return nil, authority.NewProblem(authority.ProblemUnauthorised, "the token's claims cannot be read", "use a signed JWT")
	}
	if exp, ok := claims["exp"].(float64); ok {
		// The verifier lets the issuer's clock be off by as much.
		p.Expires = time.Unix(int64(exp), 0).Add(max(i.Skew, 30*time.Second))
	}
	for n := range i.Grants {
		if g := &i.Grants[n]; g.matches(claims) {
			p.grants = append(p.grants, Grant{g.Role, g.Tenants})
		}
	}
	return p, nil
}

func basic(r *http.Request) bool {
	scheme, _, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	return strings.EqualFold(scheme, "Basic")
}

// client is the OAuth client whose secret the request has. That there is no such
// client takes as long to find out as that the secret is another.
func (a *Authenticator) client(r *http.Request) (*Principal, error) {
	wrong := authority.NewProblem(authority.ProblemUnauthorised, "no such client, or the secret is not its own", "send the client's id and secret, each form-encoded (RFC 6749 section 2.3.1)")
	id, secret, ok := r.BasicAuth()
	if !ok || len(r.Header.Values("Authorization")) > 1 {
		return nil, wrong
	}
	id, err1 := url.QueryUnescape(id)
	secret, err2 := url.QueryUnescape(secret)
	if err1 != nil || err2 != nil || len(secret) > maxSecret {
		return nil, wrong
	}
	c, known := a.clients[id]
	got := sha256.Sum256([]byte(secret))
	if subtle.ConstantTimeCompare(got[:], c.secret[:]) != 1 || !known {
		return nil, wrong
	}
	return NewPrincipal("client:"+id, MeansClient, c.grant), nil
}

// payload reads the claims of a token that was verified.
func payload(r *http.Request) (map[string]any, error) {
	_, token, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	_, rest, _ := strings.Cut(strings.TrimLeft(token, " "), ".")
	part, _, _ := strings.Cut(rest, ".")
	b, err := base64.RawURLEncoding.DecodeString(part)
	if err != nil {
		return nil, err
	}
	var claims map[string]any
	return claims, json.Unmarshal(b, &claims)
}

func (g *ClaimsGrant) matches(claims map[string]any) bool {
	var v any = claims
	path := []string{g.Claim}
	if strings.HasPrefix(g.Claim, "/") {
		path = strings.Split(g.Claim[1:], "/")
		for i := range path {
			path[i] = strings.NewReplacer("~1", "/", "~0", "~").Replace(path[i])
		}
	}
	for _, part := range path {
		m, ok := v.(map[string]any)
		if !ok {
			return false
		}
		v = m[part]
	}
	switch v := v.(type) {
	case string:
		// Words are told apart only where the standard says so (RFC 6749 §3.3): a
		// group called "not a commander" is one name.
		return v == g.Value || (g.Claim == "scope" || g.Claim == "scp") && slices.Contains(strings.Fields(v), g.Value)
	case []any:
		return slices.ContainsFunc(v, func(item any) bool { return item == any(g.Value) })
	}
	return false
}

// certificate is whoever a certificate names, which comes first of those that the
// client has shown. The first of its names that the configuration knows is the
// principal's.
func (a *Authenticator) certificate(shown []*x509.Certificate) (*Principal, error) {
	// The chain was verified when the connection was made, which may be long ago:
	// before this configuration was.
	c, now := shown[0], a.clock()
	if now.After(c.NotAfter) || now.Before(c.NotBefore) {
		return nil, authority.NewProblem(authority.ProblemUnauthorised, "the client certificate has ended", "present a new one")
	}
	between := x509.NewCertPool()
	for _, x := range shown[1:] {
		between.AddCert(x)
	}
	if _, err := c.Verify(x509.VerifyOptions{Roots: a.cas, Intermediates: between, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); err != nil {
		return nil, authority.NewProblem(authority.ProblemUnauthorised, "the client certificate is of no CA that is configured", "present a new one, on a new connection")
	}
	var names []string
	for _, u := range c.URIs {
		names = append(names, "uri:"+u.String())
	}
	for _, n := range c.DNSNames {
		names = append(names, "dns:"+strings.ToLower(n))
	}
	for _, n := range c.EmailAddresses {
		names = append(names, "email:"+n)
	}
	p := &Principal{Means: MeansCert, Expires: c.NotAfter}
	for n := range a.config.Certificates {
		g := &a.config.Certificates[n]
		if slices.Contains(names, g.Name) {
			if p.Name == "" {
				p.Name = g.Name
			}
			p.grants = append(p.grants, Grant{g.Role, g.Tenants})
		}
	}
	if p.Name == "" && len(names) > 0 && len(names[0]) <= 2*maxText && printable(names[0]) {
		p.Name = names[0]
	}
	if p.Name == "" {
		return nil, authority.NewProblem(authority.ProblemUnauthorised, "the client certificate names nobody", "use one with a subject alternative name: URI, DNS or email")
	}
	return p, nil
}

func printable(s string) bool {
	return !strings.ContainsFunc(s, func(r rune) bool { return !strconv.IsPrint(r) })
}

// Challenge is the WWW-Authenticate of a request that was refused (RFC 6750 §3).
func (a *Authenticator) Challenge(r *http.Request) string {
	if basic(r) && len(a.clients) > 0 {
		return `Basic realm="session-authority", charset="UTF-8"`
	}
	s := `Bearer realm="session-authority"`
	if r.Header.Get("Authorization") != "" {
		s += `, error="invalid_token"`
	}
	return s
}

// Deadline bounds a request by the end of the credential that it was sent with.
func (p *Principal) Deadline(ctx context.Context) (context.Context, context.CancelFunc) {
	if p == nil || p.Expires.IsZero() {
		return ctx, func() {}
	}
	return context.WithDeadline(ctx, p.Expires)
}
