// Package config is the configuration of the enforcer binary: one YAML file, with
// overrides from the environment and the command line, checked as a whole before
// anything of it is used.
package config

import (
	"errors"
	"fmt"
	"net/url"
	"path/filepath"
	"strings"
	"time"

	"github.com/interlock-fabric/interlock/internal/issuers"
	"github.com/interlock-fabric/interlock/internal/yamlfile"
	"github.com/interlock-fabric/interlock/pkg/enforce"
)

// ErrInvalid is the parent of every refusal of a configuration. The text names
// the key.
var ErrInvalid = errors.New("configuration")

// Bounds of a configuration file.
const (
	maxRoutes     = 256
	maxListeners  = 16
	maxOperations = 4096
	maxValues     = 64
)

// Config is the whole configuration. Load gives unset fields their defaults.
type Config struct {
	// Enrollment is the file that `session-authority enroll` wrote.
	Enrollment string `yaml:"enrollment"`
	// NATSURLs, when there are any, are used instead of the enrolment's.
	NATSURLs []string `yaml:"nats_urls"`
	// StateDir keeps what must survive a restart; see enforce.Options.
	StateDir string `yaml:"state_dir"`
	// OrdersDir is where emergency orders are put as files; see enforce.Options.
	OrdersDir string `yaml:"orders_dir"`
	// Mode is "strict", "best-effort" or "shadow".
	Mode            string        `yaml:"mode"`
	MaxStale        time.Duration `yaml:"max_stale"`
	MaxStaleRunning time.Duration `yaml:"max_stale_running"`
	MaxEntries      int           `yaml:"max_entries"`
	MaxBound        int           `yaml:"max_bound"`
	// Unregistered is what becomes of callers that nobody knows: Allow or Deny.
	Unregistered string `yaml:"unregistered"`
	// RegisteredFile says who is known; empty is the authority's registry.
	RegisteredFile string `yaml:"registered_file"`
	// Digests is what is asked of the digests that a caller shows, by the
	// authority's registry: Ignored, Presented or Required.
	Digests string `yaml:"digests"`
	// MaxStaleRegistry is how old what is known of the registry may be; 0 is
	// MaxStale.
	MaxStaleRegistry time.Duration `yaml:"max_stale_registry"`
	// DrainTimeout bounds how long requests may go on after SIGTERM.
	DrainTimeout time.Duration    `yaml:"drain_timeout"`
	Log          Log              `yaml:"log"`
	Admin        Admin            `yaml:"admin"`
	Trail        Trail            `yaml:"trail"`
	Proof        Proof            `yaml:"proof"`
	Issuers      []issuers.Issuer `yaml:"issuers"`
	Routes       []Route          `yaml:"routes"`
	Proxy        Proxy            `yaml:"proxy"`
	Authz        Authz            `yaml:"authz"`
}

// What becomes of callers that nobody knows.
const (
	Allow = "allow"
	Deny  = "deny"
)

// What is asked of digests; see enforce.DigestRule.
const (
	Ignored   = "ignored"
	Presented = "presented"
	Required  = "required"
)

// Agents is what is asked of the authority's registry; nil is nothing.
func (c *Config) Agents() *enforce.AgentPolicy {
	p := &enforce.AgentPolicy{
		AllowUnregistered: c.Unregistered != Deny || c.RegisteredFile != "",
		Digests:           map[string]enforce.DigestRule{Ignored: enforce.DigestsIgnored, Presented: enforce.DigestsPresented}[c.Digests],
		MaxAge:            c.MaxStaleRegistry,
	}
	if p.AllowUnregistered && p.Digests == enforce.DigestsIgnored {
		return nil
	}
	return p
}

// Log says what is written to stderr.
type Log struct {
	Level  string `yaml:"level"`  // debug, info, warn or error
	Format string `yaml:"format"` // text or json
}

// Admin is where the process answers about itself.
type Admin struct {
	// Listen serves /livez, /readyz and /metrics; empty serves none.
	Listen string `yaml:"listen"`
	// Socket serves `enforcer check` and `enforcer status`; empty is
	// enforcer.sock in StateDir, or none without one.
	Socket string `yaml:"socket"`
}

// Proof is how possession of the key that a token is bound to is proven; see
// credential.ProofOptions.
type Proof struct {
	// Origin is that of every route; empty is that of each route's Resource.
	Origin    string        `yaml:"origin"`
	MaxAge    time.Duration `yaml:"max_age"`
	MaxProofs int           `yaml:"max_proofs"`
	// NonceKeyFile holds the key of the nonces that proofs must have; empty asks
	// for none.
	NonceKeyFile string `yaml:"nonce_key_file"`
}

// Trail is what is recorded of decisions; see package trail.
type Trail struct {
	// Sample is the share of allowed calls that are recorded, from 0 to 1.
	// Denied ones all are.
	Sample   float64       `yaml:"sample"`
	Interval time.Duration `yaml:"interval"`
	Disabled bool          `yaml:"disabled"`
}

// Protocol is what a route's requests are read as.
type Protocol string

// The protocols.
const (
	// MCP: JSON-RPC over POST, both eras, and event streams.
	MCP Protocol = "mcp"
	// A2A: JSON-RPC, REST and gRPC.
	A2A Protocol = "a2a"
	// HTTP: the operation is the method and the path, and nothing of the body is
	// read.
	HTTP Protocol = "http"
)

// Route is one protected resource.
type Route struct {
	Name string `yaml:"name"`
	// Hosts are the host names of requests to it, without ports; none is every
	// host.
	Hosts []string `yaml:"hosts"`
	// Path is the path of the resource; what is below belongs to it.
	Path     string   `yaml:"path"`
	Protocol Protocol `yaml:"protocol"`
	// Resource is the URI of the resource: the audience of every call, and what
	// tokens must be for, unless Audience says otherwise.
	Resource string `yaml:"resource"`
	Audience string `yaml:"audience"`
	// ResourceMetadata is the URL in challenges (RFC 9728); empty is the
	// well-known one of Resource, where the proxy serves it.
	ResourceMetadata string `yaml:"resource_metadata"`
	// Scopes are those that every caller must hold.
	Scopes []string `yaml:"scopes"`
	// LowRisk are the operations that a caller with reduced rights may use.
	LowRisk []string `yaml:"low_risk"`
	// Operations says more about single operations, by name.
	Operations map[string]Operation `yaml:"operations"`
	// MaxBody bounds a JSON-RPC request, in bytes.
	MaxBody int `yaml:"max_body"`
	// AllowUpgrade lets WebSocket and other upgrades pass; what is said inside
	// is not read.
	AllowUpgrade bool      `yaml:"allow_upgrade"`
	AgentCard    AgentCard `yaml:"agent_card"`
	Upstream     Upstream  `yaml:"upstream"`
}

// AgentCard has the proxy serve an A2A agent's card, to anybody, with the route's
// Resource as its address, for as long as the agent may act. It is off without an
// Upstream.
type AgentCard struct {
	// Upstream is the URL of the agent's own card.
	Upstream string `yaml:"upstream"`
	// Agent is the agent's id, as decisions name it, and Tenant where it is known.
	Agent  string `yaml:"agent"`
	Tenant string `yaml:"tenant"`
	// Issuer is who minted the id, where it is not a URI.
	Issuer string `yaml:"issuer"`
}

// Operation is what an operation asks of the enforcer; see session.Call.
type Operation struct {
	LowRisk  bool          `yaml:"low_risk"`
	MaxStale time.Duration `yaml:"max_stale"`
	Strict   bool          `yaml:"strict"`
}

// Upstream is where the proxy sends what is allowed.
type Upstream struct {
	// URL takes the place of the route's Path.
	URL string `yaml:"url"`
	// HTTP2 speaks HTTP/2 without TLS to an http URL, as gRPC needs.
	HTTP2 bool `yaml:"http2"`
	// CA, in PEM, verifies an https URL; Cert and Key are shown to it.
	CA   string `yaml:"ca"`
	Cert string `yaml:"cert"`
	Key  string `yaml:"key"`
	// ForwardToken passes the caller's credentials on. MCP forbids that for
	// tokens that were not issued for the upstream.
	ForwardToken bool `yaml:"forward_token"`
	// NoIdentityHeaders leaves out the headers that name the caller.
	NoIdentityHeaders bool          `yaml:"no_identity_headers"`
	DialTimeout       time.Duration `yaml:"dial_timeout"`
	// HeaderTimeout bounds the wait for the beginning of an answer; zero is no
	// bound, since a tool may take its time.
	HeaderTimeout time.Duration `yaml:"header_timeout"`
}

// TLS is how a listener is secured.
type TLS struct {
	Cert string `yaml:"cert"`
	Key  string `yaml:"key"`
	// ClientCA, in PEM, verifies client certificates. They are asked for, and
	// demanded where RequireClientCert is set.
	ClientCA          string `yaml:"client_ca"`
	RequireClientCert bool   `yaml:"require_client_cert"`
}

// Listener is one address.
type Listener struct {
	Listen string `yaml:"listen"`
	TLS    TLS    `yaml:"tls"`
	// Plaintext permits an address outside loopback without TLS.
	Plaintext bool `yaml:"plaintext"`
}

// Proxy configures `enforcer proxy`.
type Proxy struct {
	Listeners []Listener `yaml:"listeners"`
	// ReadHeaderTimeout, BodyTimeout (of JSON-RPC requests) and IdleTimeout
	// bound slow clients.
	ReadHeaderTimeout time.Duration `yaml:"read_header_timeout"`
	BodyTimeout       time.Duration `yaml:"body_timeout"`
	IdleTimeout       time.Duration `yaml:"idle_timeout"`
	// FlushTimeout bounds how long the last words to a client that was cut may
	// take.
	FlushTimeout time.Duration `yaml:"flush_timeout"`
	// WriteStallTimeout bounds how long a client may take nothing of what is
	// written to it: a write is of 32 KiB at most.
	WriteStallTimeout time.Duration `yaml:"write_stall_timeout"`
	MaxHeaderBytes    int           `yaml:"max_header_bytes"`
	MaxConnections    int           `yaml:"max_connections"`
	// MaxSessions bounds the MCP sessions that are tracked, SessionTimeout how
	// long one is without requests.
	MaxSessions    int           `yaml:"max_sessions"`
	SessionTimeout time.Duration `yaml:"session_timeout"`
}

// Authz configures `enforcer authz`.
type Authz struct {
	// GRPC serves Envoy's ext_authz v3.
	GRPC Listener `yaml:"grpc"`
	// HTTP serves the forward-auth endpoint.
	HTTP Listener `yaml:"http"`
	// ForwardHeaders says which headers describe the request to the HTTP
	// endpoint: "x-forwarded" (Caddy, Traefik) or "x-original" (nginx).
	ForwardHeaders string `yaml:"forward_headers"`
	// StripToken tells Envoy to take the caller's credentials out.
	StripToken bool `yaml:"strip_token"`
}

// Defaults returns the configuration of an empty file.
func Defaults() *Config {
	return &Config{
		Mode: "strict", Unregistered: Allow, Digests: Ignored, DrainTimeout: 20 * time.Second,
		Log: Log{Level: "info", Format: "text"},
		Proxy: Proxy{
			ReadHeaderTimeout: 10 * time.Second, BodyTimeout: 30 * time.Second, IdleTimeout: 2 * time.Minute,
			FlushTimeout: time.Second, WriteStallTimeout: time.Minute, MaxHeaderBytes: 64 << 10, MaxConnections: 10_000,
			MaxSessions: 50_000, SessionTimeout: 30 * time.Minute,
		},
		Authz: Authz{ForwardHeaders: "x-forwarded"},
	}
}

// Load reads a file and applies the overrides, first those of the environment and
// then set, "key=value" each, where key is a path like admin.listen. The result
// is complete and has been validated; relative paths in it are taken from the
// file's directory. Errors wrap ErrInvalid, or are of the file system.
func Load(path string, environ []string, set []string) (*Config, error) {
	b, err := yamlfile.Read(path)
	if err != nil {
		return nil, err
	}
	c, err := Parse(b, environ, set)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	dir, err := filepath.Abs(filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	c.resolve(dir)
	return c, nil
}

// Parse is Load for a file's contents, and leaves relative paths as they are.
func Parse(b []byte, environ, set []string) (*Config, error) {
	c := Defaults()
	if err := yamlfile.Decode(b, c); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	if err := c.override(environ, set); err != nil {
		return nil, err
	}
	c.complete()
	if err := c.validate(); err != nil {
		return nil, err
	}
	return c, nil
}

// complete gives routes and issuers what follows from the rest.
func (c *Config) complete() {
	for i := range c.Routes {
		r := &c.Routes[i]
		if r.Path == "" {
			r.Path = "/"
		}
		if r.Protocol == "" {
			r.Protocol = MCP
		}
		if r.MaxBody == 0 {
			r.MaxBody = 4 << 20
		}
		if r.Audience == "" {
			r.Audience = r.Resource
		}
		if r.Upstream.DialTimeout == 0 {
			r.Upstream.DialTimeout = 10 * time.Second
		}
		if r.ResourceMetadata == "" {
			r.ResourceMetadata = wellKnown(r.Resource)
		}
	}
	if c.Admin.Socket == "" && c.StateDir != "" {
		c.Admin.Socket = filepath.Join(c.StateDir, "enforcer.sock")
	}
}

// MetadataPath is where protected resource metadata is, below which stands the
// resource's own path (RFC 9728 §3).
const MetadataPath = "/.well-known/oauth-protected-resource"

// wellKnown is the URL of a resource's metadata, empty where it has none.
func wellKnown(resource string) string {
	u, err := url.Parse(resource)
	if err != nil || u.Host == "" || u.Scheme != "https" && u.Scheme != "http" {
		return ""
	}
	path := strings.TrimSuffix(u.EscapedPath(), "/")
	return u.Scheme + "://" + u.Host + MetadataPath + path
}

// resolve takes relative paths from dir.
func (c *Config) resolve(dir string) {
	paths := []*string{&c.Enrollment, &c.StateDir, &c.OrdersDir, &c.Admin.Socket, &c.Proof.NonceKeyFile, &c.RegisteredFile}
	for i := range c.Issuers {
		paths = append(paths, c.Issuers[i].Files()...)
	}
	for i := range c.Routes {
		u := &c.Routes[i].Upstream
		paths = append(paths, &u.CA, &u.Cert, &u.Key)
	}
	for _, l := range c.listeners() {
		paths = append(paths, &l.TLS.Cert, &l.TLS.Key, &l.TLS.ClientCA)
	}
	for _, p := range paths {
		if *p != "" && !filepath.IsAbs(*p) {
			*p = filepath.Join(dir, *p)
		}
	}
}

func (c *Config) listeners() []*Listener {
	out := []*Listener{&c.Authz.GRPC, &c.Authz.HTTP}
	for i := range c.Proxy.Listeners {
		out = append(out, &c.Proxy.Listeners[i])
	}
	return out
}
