// Package route decides on the requests of one route: who calls, what is asked
// for, and what the enforcer says. The proxy and the authorization servers share
// it.
package route

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"unicode/utf8"

	a2aguard "github.com/interlock-fabric/interlock/adapters/a2a"
	mcpguard "github.com/interlock-fabric/interlock/adapters/mcp"
	"github.com/interlock-fabric/interlock/internal/gateway/config"
	"github.com/interlock-fabric/interlock/internal/gateway/operation"
	"github.com/interlock-fabric/interlock/pkg/denial"
	"github.com/interlock-fabric/interlock/pkg/guard"
	"github.com/interlock-fabric/interlock/pkg/session"
	"github.com/interlock-fabric/interlock/pkg/trail"
)

// Decision is one decision.
type Decision struct {
	Route string
	// Event is what the trail is to say of it. Its slices are valid only until
	// the observer returns.
	trail.Event
}

// Observer hears of every decision, on the goroutine of the request: it must be
// quick, wait for nothing, and be safe for concurrent use.
type Observer func(*Decision)

// Guard decides for one route. It is immutable.
type Guard struct {
	Route    *config.Route
	Resource denial.Resource
	// Origin is the scheme and authority of the route's resource, by which its
	// clients know this server; empty where that is no URL with a host.
	Origin   string
	Enforcer guard.Enforcer
	Verifier guard.Verifier
	// Observe may be nil, and so may Trail, which only marks beginnings here.
	Observe Observer
	Trail   *trail.Recorder

	calls map[string]session.Call
}

// New makes the guard of a route.
func New(r *config.Route, e guard.Enforcer, v guard.Verifier, o Observer, t *trail.Recorder) *Guard {
	g := &Guard{
		Route: r, Enforcer: e, Verifier: v, Observe: o, Trail: t,
		Resource: denial.Resource{Metadata: r.ResourceMetadata, Scopes: r.Scopes},
		calls:    make(map[string]session.Call),
	}
	if u, err := url.Parse(r.Resource); err == nil && u.Host != "" && (u.Scheme == "https" || u.Scheme == "http") {
		g.Origin = u.Scheme + "://" + u.Host
	}
	for _, name := range r.LowRisk {
		g.calls[name] = session.Call{LowRisk: true}
	}
	for name, op := range r.Operations {
		g.calls[name] = session.Call{LowRisk: op.LowRisk || g.calls[name].LowRisk, MaxStale: op.MaxStale, Strict: op.Strict}
	}
	return g
}

// Call is what an operation asks of the enforcer. nil is to talk at all.
func (g *Guard) Call(o *operation.Operation) session.Call {
	if o == nil || o.Method == "" {
		return session.Call{Audience: g.Route.Resource, LowRisk: true}
	}
	call := g.calls[o.Label(g.Route.Protocol)]
	call.Audience, call.Tool = g.Route.Resource, o.Tool(g.Route.Protocol)
	if _, err := session.Canonical(session.KindTool, call.Tool); err != nil {
		call.Tool = "" // too long a path, as a rule: no decision can name it
	}
	switch g.Route.Protocol {
	case config.MCP:
		call.LowRisk = call.LowRisk || mcpguard.LowRisk(o.Method)
	case config.A2A:
		call.LowRisk = call.LowRisk || a2aguard.LowRisk(o.Method)
	}
	return call
}

// Identify finds out who calls and whether it may talk at all, before anything of
// its request is read; see guard.Admit.
func (g *Guard) Identify(r *http.Request) (p *session.Prepared, known bool, err error) {
	return guard.Admit(g.Enforcer, g.Verifier, r, g.Call(nil), g.Route.Scopes)
}

// Note tells the observer of an event with an operation.
func (g *Guard) Note(o *operation.Operation, e trail.Event) {
	if g.Observe != nil {
		e.Method, e.Arguments = o.Method, o.Arguments
		g.Observe(&Decision{g.Route.Name, e})
	}
}

// Denied returns the denial that a bound context was cut with, or nil when it
// ended for another reason, or not at all.
func Denied(ctx context.Context) *session.DeniedError {
	return guard.Cut(ctx)
}

// Table finds the guard of a request.
type Table struct{ guards []*Guard }

// NewTable makes a table. Of the routes that match, the one with the longest path
// counts, and then one that names the host.
func NewTable(guards []*Guard) *Table {
	t := &Table{guards: slices.Clone(guards)}
	slices.SortStableFunc(t.guards, func(a, b *Guard) int {
		if n := len(prefix(b)) - len(prefix(a)); n != 0 {
			return n
		}
		return min(1, len(b.Route.Hosts)) - min(1, len(a.Route.Hosts))
	})
	return t
}

// All returns the guards.
func (t *Table) All() []*Guard { return t.guards }

func prefix(g *Guard) string { return strings.TrimSuffix(g.Route.Path, "/") }

// Find returns the guard of a host, whose port does not count, and of a decoded
// path, and what of the path is below the route's; nil when there is none.
func (t *Table) Find(host, path string) (g *Guard, below string) {
	if i := strings.LastIndexByte(host, ':'); i >= 0 && !strings.HasSuffix(host, "]") {
		host = host[:i]
	}
	for _, g := range t.guards {
		if len(g.Route.Hosts) > 0 && !slices.ContainsFunc(g.Route.Hosts, func(h string) bool { return strings.EqualFold(h, host) }) {
			continue
		}
		if below, ok := strings.CutPrefix(path, prefix(g)); ok && (below == "" || below[0] == '/') {
			return g, below
		}
	}
	return nil, ""
}

// ErrPath is the refusal of a path that two servers could read differently.
var ErrPath = &operation.Refusal{Status: http.StatusBadRequest, Code: -32600, Why: "the path is ambiguous: no dot or empty segments, backslashes, parameters, encoded slashes, and nothing but UTF-8"}

// CheckPath refuses a path that two servers could read differently: one of them
// would see another route or operation.
func CheckPath(u *url.URL) error {
	// Some servers take what follows a semicolon out of a segment, and see dots
	// there, or the path of another route.
	if !config.CleanPath(u.Path) || !utf8.ValidString(u.Path) || strings.Contains(u.EscapedPath(), ";") {
		return ErrPath
	}
	if raw := u.RawPath; raw != "" {
		for i := 0; i+2 < len(raw); i++ {
			if raw[i] == '%' && (strings.EqualFold(raw[i:i+3], "%2f") || strings.EqualFold(raw[i:i+3], "%5c")) {
				return ErrPath
			}
		}
	}
	return nil
}

// ByPath is the operation of a request whose body is not read: for A2A over REST
// or gRPC its method, and else the HTTP method and the path, decoded, so that it has
// one spelling.
func (g *Guard) ByPath(method string, u *url.URL, below string, h http.Header) operation.Operation {
	if g.Route.Protocol == config.A2A {
		// Whatever the type: no method of gRPC has such a path, and an agent may
		// go by the path alone.
		if name, ok := operation.REST(method, below); ok {
			return operation.Operation{Method: name}
		}
		if method == http.MethodPost && operation.GRPC(h) {
			if name := u.Path[strings.LastIndexByte(u.Path, '/')+1:]; name != "" {
				return operation.Operation{Method: operation.Renamed(name)}
			}
		}
	}
	if method == http.MethodHead {
		method = http.MethodGet // it does the same, and is answered with less
	}
	return operation.Operation{Method: method + " " + u.Path}
}

// Identity headers name the caller to an upstream. Requests that carry any lose
// them first.
const headerPrefix = "Interlock-"

// IdentityHeaders are those that SetIdentity may set.
var identityHeaders = []string{"Interlock-Tenant", "Interlock-Issuer", "Interlock-Subject", "Interlock-Session", "Interlock-Client", "Interlock-Actors"}

// IdentityHeaders returns the names of the headers that name a caller.
func IdentityHeaders() []string {
	return slices.Clone(identityHeaders)
}

// Spoofed reports whether a header could be taken for one that names the caller:
// by its name, or by one that is the same to a server that does not tell - from _.
func Spoofed(name string) bool {
	return len(name) >= len(headerPrefix) && strings.EqualFold(strings.ReplaceAll(name[:len(headerPrefix)], "_", "-"), headerPrefix)
}

// Overrides reports whether by a header an upstream could take another method or
// path for that of the request.
func Overrides(name string) bool {
	switch http.CanonicalHeaderKey(strings.ReplaceAll(name, "_", "-")) {
	case "X-Http-Method-Override", "X-Http-Method", "X-Method-Override", "X-Original-Url", "X-Original-Uri", "X-Rewrite-Url":
		return true
	}
	return false
}

// Identity returns the headers that name a caller, as name and value. Whatever is
// not visible ASCII in a value is percent-encoded, and so are "%" and ",".
func Identity(p *session.Prepared) [][2]string {
	id := p.Identity()
	var chain []string
	for _, a := range id.Actors {
		chain = append(chain, encode(a.ID))
	}
	out := make([][2]string, 0, len(identityHeaders))
	for i, v := range []string{encode(id.Tenant), encode(id.Issuer), encode(id.User), encode(id.Session.ID), encode(id.Client), strings.Join(chain, ", ")} {
		if v != "" {
			out = append(out, [2]string{identityHeaders[i], v})
		}
	}
	return out
}

func encode(s string) string {
	if !strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r > '~' || r == '%' || r == ',' }) {
		return s
	}
	var b strings.Builder
	for i := range len(s) {
		if c := s[i]; c <= ' ' || c > '~' || c == '%' || c == ',' {
			fmt.Fprintf(&b, "%%%02X", c)
		} else {
			b.WriteByte(c)
		}
	}
	return b.String()
}
