package a2aguard

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"time"

	"github.com/a2aproject/a2a-go/v2/a2a"
	"github.com/a2aproject/a2a-go/v2/a2asrv"

	"github.com/interlock-fabric/interlock/pkg/denial"
	"github.com/interlock-fabric/interlock/pkg/guard"
	"github.com/interlock-fabric/interlock/pkg/session"
	"github.com/interlock-fabric/interlock/pkg/trail"
)

// Enforcer decides; an *enforce.Enforcer is one.
type Enforcer = guard.Enforcer

// Verifier finds out who is calling; a *credential.Verifier is one. Over gRPC it
// is given a request that has the call's metadata as its headers, its :authority
// as the host, the full method as the path, and the connection's TLS state.
type Verifier = guard.Verifier

// Options configures a Guard. The zero value is useful.
type Options struct {
	// Resource is the URI of this agent, the audience of every call.
	Resource string
	// ResourceMetadata is the URL of the protected resource metadata (RFC
	// 9728), named in every challenge.
	ResourceMetadata string
	// Scopes are those that a caller must hold to use this agent at all. They
	// are looked for among the identity's capabilities and named in challenges.
	Scopes []string
	// Skill says which skill of the agent a message asks for, by its id in the
	// agent card; empty where that cannot be said. A decision on a tool of that
	// name denies it, and cuts the tasks that run under it. Nil knows none: A2A
	// has no field for it, and what a client writes into the metadata binds
	// nobody.
	Skill func(*a2a.SendMessageRequest) string
	// Classify says of an operation whether it is low-risk, how fresh the state
	// must be, and whether it is strict. operation is the A2A method; skill is
	// empty where there is none. Tool and Audience of the result are ignored.
	// Nil leaves sending messages and asking for push notifications as
	// high-risk. The rest is low-risk, also when Classify is set.
	Classify func(operation, skill string) session.Call
	// RetryAfter is what a suspended caller is told to wait when the suspension
	// has no end; zero is 30 s.
	RetryAfter time.Duration
	// FlushTimeout bounds how long the end of work that was cut may take to be
	// stored and to reach its client; zero is 1 s.
	FlushTimeout time.Duration
	// CloseTimeout bounds how long Close waits for agents that ignore their
	// context; zero is 5 s.
	CloseTimeout time.Duration
	// Trail records every operation that is denied, every agent that is cut, and
	// a share of the operations that are allowed. Nil records nothing. The guard
	// does not close it.
	Trail *trail.Recorder
	// Logger hears of what the guard could not do, and of what the SDK logs.
	// Nil is silent. Denials are not logged: the enforcer counts them.
	Logger *slog.Logger
}

// Guard guards A2A agents. It is made by New and is safe for concurrent use. The
// zero Guard denies everything.
type Guard struct {
	enforcer Enforcer
	verifier Verifier
	opts     Options
	resource denial.Resource
	logger   *slog.Logger
	work     *guard.Work
}

// New makes a guard. Errors wrap session.ErrInvalid.
func New(enforcer Enforcer, verifier Verifier, opts *Options) (*Guard, error) {
	g := &Guard{enforcer: enforcer, verifier: verifier, work: guard.NewWork()}
	if opts != nil {
		g.opts = *opts
	}
	bad := func(format string, a ...any) error {
		return fmt.Errorf("%w: a2aguard: %s", session.ErrInvalid, fmt.Sprintf(format, a...))
	}
	if enforcer == nil {
		return nil, bad("no enforcer")
	}
	if verifier == nil {
		return nil, bad("no verifier: nobody could ever call")
	}
	if g.opts.Resource != "" {
		if _, err := session.Canonical(session.KindAudience, g.opts.Resource); err != nil {
			return nil, bad("resource: %v", err)
		}
	}
	g.resource = denial.Resource{Metadata: g.opts.ResourceMetadata, Scopes: g.opts.Scopes, RetryAfter: g.opts.RetryAfter}
	if err := g.resource.Validate(); err != nil {
		return nil, fmt.Errorf("a2aguard: %w", err)
	}
	g.opts.FlushTimeout = cmp.Or(max(g.opts.FlushTimeout, 0), time.Second)
	g.opts.CloseTimeout = cmp.Or(max(g.opts.CloseTimeout, 0), 5*time.Second)
	g.logger = g.opts.Logger
	if g.logger == nil {
		g.logger = slog.New(slog.DiscardHandler)
	}
	return g, nil
}

// Close denies everything from now on, cuts what runs, since nobody would guard
// it, and joins every goroutine. It waits for agents that ignore their context,
// at most Options.CloseTimeout, and its error says how many were left behind. It
// is idempotent.
func (g *Guard) Close() error {
	g.work.Stop()
	if left := g.work.Wait(g.opts.CloseTimeout); left > 0 {
		return fmt.Errorf("a2aguard: %d agents or calls have not ended", left)
	}
	return nil
}

// admit finds out who sent a request and whether they may make the call.
func (g *Guard) admit(r *http.Request, call session.Call) (p *session.Prepared, known bool, err error) {
	if err := g.work.Err(); err != nil {
		return nil, false, err
	}
	return guard.Admit(g.enforcer, g.verifier, r, call, g.opts.Scopes)
}

// IdentityOf returns the verified identity on whose behalf an agent works, from
// the context of its Execute or of a call interceptor. Its slices must not be
// changed.
func IdentityOf(ctx context.Context) (session.Identity, bool) {
	if p := guard.FromContext(ctx); p.Valid() {
		return p.Identity(), true
	}
	return session.Identity{}, false
}

// ownerOf names who a task belongs to. A task outlives the login that it was
// begun in, so the session counts only where it is all there is.
func ownerOf(p *session.Prepared) string {
	id := p.Identity()
	if id.User != "" || id.Client != "" || len(id.Actors) > 0 {
		id.Session = session.SessionRef{}
	}
	return id.Caller()
}

// The operations, by the names of A2A 1.0 §9.4. Sending a message is one
// operation, whether or not the answer is streamed.
const (
	opSend         = "SendMessage"
	opStream       = "SendStreamingMessage"
	opGet          = "GetTask"
	opList         = "ListTasks"
	opCancel       = "CancelTask"
	opSubscribe    = "SubscribeToTask"
	opPushCreate   = "CreateTaskPushNotificationConfig"
	opPushGet      = "GetTaskPushNotificationConfig"
	opPushList     = "ListTaskPushNotificationConfigs"
	opPushDelete   = "DeleteTaskPushNotificationConfig"
	opExtendedCard = "GetExtendedAgentCard"
)

// lowRisk are the operations that make the agent do nothing: a caller with
// reduced rights may look on, and stop what it began.
var lowRisk = map[string]bool{
	opGet: true, opList: true, opCancel: true, opSubscribe: true,
	opPushGet: true, opPushList: true, opPushDelete: true, opExtendedCard: true,
}

// LowRisk reports whether an operation of A2A makes the agent do nothing: it is
// permitted to a caller with reduced rights.
func LowRisk(operation string) bool { return lowRisk[operation] }

// connect is what every request asks for: to talk at all. What is asked for in
// particular is judged where that is known.
func (g *Guard) connect() session.Call {
	return session.Call{Audience: g.opts.Resource, LowRisk: true}
}

// call says what an operation asks for.
func (g *Guard) call(operation, skill string) session.Call {
	if operation == opStream {
		operation = opSend
	}
	var c session.Call
	if g.opts.Classify != nil {
		c = g.opts.Classify(operation, skill)
	}
	c.Tool, c.Audience, c.LowRisk = operation, g.opts.Resource, c.LowRisk || lowRisk[operation]
	return c
}

// traceparent returns the W3C trace context of the operation that a context is
// of, or "".
func traceparent(ctx context.Context) string {
	c, ok := a2asrv.CallContextFrom(ctx)
	if !ok || c.ServiceParams() == nil {
		return ""
	}
	if v, ok := c.ServiceParams().Get("traceparent"); ok && len(v) == 1 {
		return v[0]
	}
	return ""
}

// bind ties work to its caller, by the operation and, where there is one, by the
// skill too.
func (g *Guard) bind(ctx context.Context, p *session.Prepared, operation, skill string) (context.Context, context.CancelFunc, error) {
	if err := g.work.Err(); err != nil {
		return nil, nil, err
	}
	call := g.call(operation, skill)
	ctx, first, err := g.enforcer.Bind(ctx, p, call)
	if err != nil {
		return nil, nil, err
	}
	if skill == "" {
		return ctx, first, nil
	}
	call.Tool = skill
	ctx, second, err := g.enforcer.Bind(ctx, p, call)
	if err != nil {
		first()
		return nil, nil, err
	}
	return ctx, func() { second(); first() }, nil
}

func (g *Guard) skill(req *a2a.SendMessageRequest) string {
	if g.opts.Skill == nil || req == nil {
		return ""
	}
	return g.opts.Skill(req)
}

// whyCut says why work must stop, or nil when it need not.
func (g *Guard) whyCut(bound context.Context) error {
	if d := guard.Cut(bound); d != nil {
		return d
	}
	return g.work.Err()
}

// flush returns a channel that brings the end of the time in which the end of
// what was cut is waited for: half of what there is, and the rest is for its way
// to the client.
func (g *Guard) flush() (<-chan time.Time, func() bool) {
	t := time.NewTimer(g.opts.FlushTimeout / 2)
	return t.C, t.Stop
}
