package mcpguard

import (
	"cmp"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/modelcontextprotocol/go-sdk/auth"
	"github.com/modelcontextprotocol/go-sdk/mcp"

	"github.com/interlock-fabric/interlock/pkg/denial"
	"github.com/interlock-fabric/interlock/pkg/guard"
	"github.com/interlock-fabric/interlock/pkg/session"
	"github.com/interlock-fabric/interlock/pkg/trail"
)

// Enforcer decides; an *enforce.Enforcer is one.
type Enforcer = guard.Enforcer

// Verifier finds out who is calling; a *credential.Verifier is one.
type Verifier = guard.Verifier

// Options configures a Guard. The zero value is useful over HTTP.
type Options struct {
	// Resource is the URI of this server, the audience of every call.
	Resource string
	// ResourceMetadata is the URL of the protected resource metadata (RFC
	// 9728), named in every challenge.
	ResourceMetadata string
	// Scopes are those that a caller must hold to use this server at all. They
	// are looked for among the identity's capabilities and named in challenges.
	Scopes []string
	// Identity is who calls over a transport that carries no credentials, such
	// as stdio. It is never used for a request that came over HTTP.
	Identity *session.Identity
	// Classify says of an operation whether it is low-risk, how fresh the state
	// must be, and whether it is strict. name is the tool, prompt or resource,
	// where there is one; Tool and Audience of the result are ignored. Nil
	// leaves what runs host code as high-risk, and holds connecting, listing
	// and pinging to be low-risk, as it is for methods without a name when
	// Classify is set too.
	Classify func(method, name string) session.Call
	// RetryAfter is what a suspended caller is told to wait when the suspension
	// has no end; zero is 30 s.
	RetryAfter time.Duration
	// FlushTimeout bounds how long the error of a cut call may take to reach
	// its client before the session is closed over it; zero is 1 s.
	FlushTimeout time.Duration
	// CloseTimeout bounds how long Close waits for tools that ignore their
	// context; zero is 5 s.
	CloseTimeout time.Duration
	// Trail records every denial, every call that is cut, and a share of those
	// that are allowed. Nil records nothing. The guard does not close it.
	Trail *trail.Recorder
	// Logger hears of what the guard could not do. Nil is silent. Denials are
	// not logged: the enforcer counts them.
	Logger *slog.Logger
}

// Guard guards MCP servers. It is made by New and is safe for concurrent use.
// The zero Guard denies everything.
type Guard struct {
	enforcer Enforcer
	verifier Verifier
	static   *caller
	opts     Options
	resource denial.Resource
	logger   *slog.Logger
	work     *guard.Work // stopped with mu held

	mu       sync.Mutex
	sessions map[any]*tracked // by sessionKey
}

// New makes a guard. verifier may be nil where Options.Identity is set, and
// then every HTTP request is denied. Errors wrap session.ErrInvalid, or
// session.ErrDenied when Identity cannot be prepared.
func New(enforcer Enforcer, verifier Verifier, opts *Options) (*Guard, error) {
	g := &Guard{enforcer: enforcer, verifier: verifier, sessions: make(map[any]*tracked), work: guard.NewWork()}
	if opts != nil {
		g.opts = *opts
	}
	bad := func(format string, a ...any) error {
		return fmt.Errorf("%w: mcpguard: %s", session.ErrInvalid, fmt.Sprintf(format, a...))
	}
	if enforcer == nil {
		return nil, bad("no enforcer")
	}
	if verifier == nil && g.opts.Identity == nil {
		return nil, bad("neither a verifier nor an identity: nobody could ever call")
	}
	if g.opts.Resource != "" {
		if _, err := session.Canonical(session.KindAudience, g.opts.Resource); err != nil {
			return nil, bad("resource: %v", err)
		}
	}
	g.resource = denial.Resource{Metadata: g.opts.ResourceMetadata, Scopes: g.opts.Scopes, RetryAfter: g.opts.RetryAfter}
	if err := g.resource.Validate(); err != nil {
		return nil, fmt.Errorf("mcpguard: %w", err)
	}
	g.opts.FlushTimeout = cmp.Or(max(g.opts.FlushTimeout, 0), time.Second)
	g.opts.CloseTimeout = cmp.Or(max(g.opts.CloseTimeout, 0), 5*time.Second)
	g.logger = g.opts.Logger
	if g.logger == nil {
		g.logger = slog.New(slog.DiscardHandler)
	}
	if id := g.opts.Identity; id != nil {
		p, err := enforcer.Prepare(*id)
		if err != nil {
			return nil, fmt.Errorf("mcpguard: identity: %w", err)
		}
		g.static = &caller{prepared: p}
	}
	return g, nil
}

// Close denies everything from now on, cuts what runs and closes the sessions
// that the guard knows, since nobody would guard them, and joins every
// goroutine. It waits for tools that ignore their context, at most
// Options.CloseTimeout, and its error says how many were left behind. It is
// idempotent.
func (g *Guard) Close() error {
	g.mu.Lock()
	for _, t := range g.sessions {
		t.closeLocked()
	}
	g.work.Stop()
	g.mu.Unlock()
	if left := g.work.Wait(g.opts.CloseTimeout); left > 0 {
		return fmt.Errorf("mcpguard: %d tools or sessions have not ended", left)
	}
	return nil
}

// caller is a verified identity on its way through the SDK.
type caller struct {
	prepared *session.Prepared
}

// callerKey is where auth.TokenInfo.Extra carries the caller. Only this process
// writes it: nothing of it comes from the token.
const callerKey = "interlock.caller"

// IdentityOf returns the verified identity behind a request, for the tools of a
// guarded server. Its slices must not be changed. There is none where the
// request carried no credentials, as over stdio: there the host has configured
// the identity itself.
func IdentityOf(req mcp.Request) (session.Identity, bool) {
	if c := callerOf(req); c != nil {
		return c.prepared.Identity(), true
	}
	return session.Identity{}, false
}

func callerOf(req mcp.Request) *caller {
	extra := req.GetExtra()
	if extra == nil || extra.TokenInfo == nil {
		return nil
	}
	c, _ := extra.TokenInfo.Extra[callerKey].(*caller)
	return c
}

// identify returns the caller of a request, from the credentials that the HTTP
// handler verified, or from the configuration where the transport has none.
func (g *Guard) identify(req mcp.Request) (*caller, error) {
	if g.enforcer == nil {
		return nil, g.work.Err()
	}
	if c := callerOf(req); c != nil {
		return c, nil
	}
	if extra := req.GetExtra(); g.static != nil && (extra == nil || extra.Header == nil && extra.TokenInfo == nil) {
		return g.static, nil
	}
	return nil, &session.DeniedError{Err: session.ErrNoIdentity}
}

// tokenInfo is what the SDK and the tools see of a caller. The SDK refuses a
// request to a session whose UserID is another, so it must name the caller and
// not the token, which is renewed.
func tokenInfo(c *caller) *auth.TokenInfo {
	id := c.prepared.Identity()
	return &auth.TokenInfo{
		Scopes: id.Capabilities, Expiration: id.Expires, UserID: id.Caller(),
		Extra: map[string]any{callerKey: c},
	}
}
