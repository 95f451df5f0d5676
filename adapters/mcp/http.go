package mcpguard

import (
	"context"
	"encoding/json"
	"fmt"
	"mime"
	"net/http"
	"strings"
	"time"

	"github.com/modelcontextprotocol/go-sdk/auth"
	"github.com/modelcontextprotocol/go-sdk/mcp"

	"github.com/interlock-fabric/interlock/pkg/guard"
	"github.com/interlock-fabric/interlock/pkg/session"
	"github.com/interlock-fabric/interlock/pkg/trail"
)

const (
	headerVersion = "Mcp-Protocol-Version"
	headerSession = "Mcp-Session-Id"
	headerMethod  = "Mcp-Method"
	headerTrace   = "Traceparent"

	// firstStateless is the first revision without sessions.
	firstStateless = "2026-07-28"
)

// Serve guards server and returns the handler of its one endpoint, for both
// eras of the protocol. It adds Middleware to the server, which must therefore
// have all its own by then; a server is served once. opts are the SDK's, and
// may be nil; Stateless in them serves the older revisions without sessions
// too. Idle sessions end after SessionTimeout, by default 30 minutes.
func (g *Guard) Serve(server *mcp.Server, opts *mcp.StreamableHTTPOptions) http.Handler {
	var o mcp.StreamableHTTPOptions
	if opts != nil {
		o = *opts
	}
	if o.SessionTimeout <= 0 {
		// A suspended caller's session is not closed, so something else must.
		o.SessionTimeout = 30 * time.Minute
	}
	server.AddReceivingMiddleware(g.Middleware)
	get := func(*http.Request) *mcp.Server { return server }
	stateless := o
	stateless.Stateless = true
	// Otherwise a client that hangs up leaves its call running.
	stateless.PropagateRequestCancellation = true
	newEra := mcp.NewStreamableHTTPHandler(get, &stateless)
	if o.Stateless {
		return g.Handler(newEra)
	}
	return g.Handler(Eras(mcp.NewStreamableHTTPHandler(get, &o), newEra))
}

// Eras serves both eras of the protocol at one endpoint: requests that speak
// revision 2026-07-28 or later go to stateless, which must have been made with
// StreamableHTTPOptions.Stateless, and all others to stateful. It guards
// nothing by itself.
func Eras(stateful, stateless http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		// Revisions are dates, so they sort as text. Mcp-Method is new with the
		// stateless era: a request that has it but forgot its version is told so
		// by the handler of that era.
		version := r.Header.Get(headerVersion)
		if version >= firstStateless || version == "" && r.Header.Get(headerMethod) != "" {
			stateless.ServeHTTP(w, r)
			return
		}
		stateful.ServeHTTP(w, r)
	})
}

// verifiedKey carries the caller to the SDK's bearer middleware, which alone
// can put a TokenInfo where the SDK looks for it.
type verifiedKey struct{}

// Handler checks every HTTP request before next sees it: POSTs of calls, of
// notifications and of the client's own answers, GET streams and DELETE. A
// denied request never reaches next. What does reaches it with an
// auth.TokenInfo, and GET streams are cut when their caller must stop.
//
// next must be, or lead to, the SDK's handler, and its servers must have
// Middleware: what runs inside a POST is cut there.
func (g *Guard) Handler(next http.Handler) http.Handler {
	// It only passes on what has been verified, and so must not refuse anything
	// by its own reading of the clock.
	next = auth.RequireBearerToken(func(ctx context.Context, _ string, _ *http.Request) (*auth.TokenInfo, error) {
		c, _ := ctx.Value(verifiedKey{}).(*caller)
		if c == nil {
			return nil, auth.ErrInvalidToken
		}
		return tokenInfo(c), nil
	}, &auth.RequireBearerTokenOptions{AllowMissingExpiration: true, ClockSkew: 100 * 365 * 24 * time.Hour})(next)

	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		e := trail.Event{Mark: g.opts.Trail.Start()}
		p, known, err := g.admit(r)
		if err != nil {
			e.Caller = p
			g.deny(w, r, err, known, &e)
			return
		}
		ctx := context.WithValue(r.Context(), verifiedKey{}, &caller{prepared: p})
		r = asBearer(r)
		if r.Method == http.MethodGet {
			e.Caller = p
			g.stream(w, r.WithContext(ctx), &e, next)
			return
		}
		if t := g.trackedByID(r.Header.Get(headerSession)); t != nil && r.Method == http.MethodPost {
			t.begin()
			defer t.end()
		}
		next.ServeHTTP(w, r.WithContext(ctx))
	})
}

// asBearer gives a token that came under another scheme, which is DPoP, the one
// that the SDK's middleware knows. Its proof has been checked, and is good once.
func asBearer(r *http.Request) *http.Request {
	scheme, token, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	if strings.EqualFold(scheme, "Bearer") {
		return r
	}
	r = r.WithContext(r.Context()) // a shallow copy
	r.Header = r.Header.Clone()
	r.Header.Set("Authorization", "Bearer "+token)
	return r
}

// connect is what every HTTP request asks for: to talk at all. What is asked
// for in particular is judged by the middleware, which knows it, so that a
// caller with reduced rights reaches its low-risk operations.
func (g *Guard) connect() session.Call {
	return session.Call{Audience: g.opts.Resource, LowRisk: true}
}

func (g *Guard) admit(r *http.Request) (p *session.Prepared, known bool, err error) {
	if err := g.work.Err(); err != nil {
		return nil, false, err
	}
	return guard.Admit(g.enforcer, g.verifier, r, g.connect(), g.opts.Scopes)
}

// stream serves a GET, which is a legacy event stream, for as long as its
// caller may listen.
func (g *Guard) stream(w http.ResponseWriter, r *http.Request, e *trail.Event, next http.Handler) {
	bound, release, err := g.enforcer.Bind(r.Context(), e.Caller, g.connect())
	if err != nil {
		g.deny(w, r, err, true, e)
		return
	}
	defer release()
	g.name(e, r)
	g.opts.Trail.Record(e)
	// A client that does not read must not hold its stream open.
	rc := http.NewResponseController(w)
	stop := context.AfterFunc(bound, func() { _ = rc.SetWriteDeadline(time.Now().Add(g.opts.FlushTimeout)) })
	defer stop()
	next.ServeHTTP(w, r.WithContext(bound))

	d := guard.Cut(bound)
	if d != nil {
		e.Err, e.Cut = d, true
		g.opts.Trail.Record(e)
	}
	if mt, _, _ := mime.ParseMediaType(w.Header().Get("Content-Type")); d == nil || mt != "text/event-stream" {
		return
	}
	// The stream is the client's only way to learn why: it has no call open
	// that could be answered.
	a := g.resource.Answer(d)
	event, err := json.Marshal(map[string]any{
		"jsonrpc": "2.0", "method": "notifications/message",
		"params": map[string]any{"level": "error", "logger": "interlock", "data": a.Data},
	})
	if err != nil {
		return
	}
	_, _ = fmt.Fprintf(w, "event: message\ndata: %s\n\n", event)
	_ = rc.Flush()
}
