// Package proxy is a reverse proxy that enforces: each request is checked before
// anything of it reaches the upstream, and what is running is cut when its caller
// must stop, with a cause that the client can read.
//
// What is allowed passes byte for byte, in both directions, but for hop-by-hop
// headers, the caller's credentials and the headers that name the caller.
package proxy

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httputil"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	a2aguard "github.com/interlock-fabric/interlock/adapters/a2a"
	"github.com/interlock-fabric/interlock/internal/gateway/config"
	"github.com/interlock-fabric/interlock/internal/gateway/operation"
	"github.com/interlock-fabric/interlock/internal/gateway/route"
	"github.com/interlock-fabric/interlock/pkg/denial"
	"github.com/interlock-fabric/interlock/pkg/guard"
	"github.com/interlock-fabric/interlock/pkg/session"
	"github.com/interlock-fabric/interlock/pkg/trail"
)

// Options configures a Proxy.
type Options struct {
	Table  *route.Table
	Config *config.Config
	// Sessions outlive the proxy when the configuration is read again.
	Sessions *Sessions
	// Tasks outlive it, too.
	Tasks *Tasks
	// Budget is what JSON-RPC requests that are being read may take together.
	Budget *Budget
	Logger *slog.Logger
}

// Proxy is the handler. It is made by New and is immutable.
type Proxy struct {
	opts      Options
	upstreams map[*route.Guard]*upstream
	metadata  map[string]*route.Guard
	cards     map[*route.Guard]*a2aguard.Cards
	reverse   *httputil.ReverseProxy
	warnings  *repeats
}

// New makes a proxy. It reads the files that the upstreams name.
func New(o Options) (*Proxy, error) {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	p := &Proxy{opts: o, upstreams: make(map[*route.Guard]*upstream), metadata: make(map[string]*route.Guard), cards: make(map[*route.Guard]*a2aguard.Cards), warnings: newRepeats(o.Logger)}
	for _, g := range o.Table.All() {
		u, err := newUpstream(g.Route)
		if err != nil {
			p.Close()
			return nil, err
		}
		p.upstreams[g] = u
		if path := metadataPath(g.Route); path != "" {
			p.metadata[path] = g
		}
		if g.Route.AgentCard.Upstream != "" {
			if p.cards[g], err = newCards(g); err != nil {
				p.Close()
				return nil, fmt.Errorf("route %s: %w", g.Route.Name, err)
			}
		}
	}
	p.reverse = &httputil.ReverseProxy{
		Rewrite:        p.rewrite,
		Transport:      router{},
		ModifyResponse: p.answered,
		ErrorHandler:   p.failed,
		BufferPool:     &buffers{},
		ErrorLog:       slog.NewLogLogger(o.Logger.Handler(), slog.LevelDebug),
		// Event streams, and answers whose length is not known, are flushed at
		// every write in any case.
	}
	return p, nil
}

// Close closes the connections to the upstreams that are idle, and ends what it
// logs. It is idempotent.
func (p *Proxy) Close() {
	p.warnings.close()
	for _, u := range p.upstreams {
		u.transport.CloseIdleConnections()
	}
}

// exchange is one request on its way through.
type exchange struct {
	p      *Proxy
	g      *route.Guard
	up     *upstream
	caller *session.Prepared
	op     operation.Operation
	call   session.Call
	below  string // of the path, escaped
	path   string // the same, decoded

	traceparent string
	session     *tracked
	// exec is what the request has an agent do, or has to do with a task of MCP;
	// nil for any other.
	exec *execution
	// cards rewrites the answer, when that is to be an extended card.
	cards *a2aguard.Cards
	taken int // of the budget, for the answer
	// bound ends when the caller must stop.
	bound context.Context
	cut   atomic.Bool // noted
	// upgraded is set once the connection is not one of HTTP any more.
	upgraded bool

	mu sync.Mutex
	// digest is that of the arguments, once the body is gone with them.
	digest session.Hash
}

type exchangeKey struct{}

func exchangeOf(ctx context.Context) *exchange {
	x, _ := ctx.Value(exchangeKey{}).(*exchange)
	return x
}

// ServeHTTP serves one request.
func (p *Proxy) ServeHTTP(client http.ResponseWriter, r *http.Request) {
	w := watch(client, p.opts.Config.Proxy.WriteStallTimeout)
	defer w.end()
	if r.Method == http.MethodConnect || r.Method == http.MethodTrace {
		refuse(w, r, &operation.Refusal{Status: http.StatusMethodNotAllowed, Code: codeInvalid, Why: "the method is not accepted"})
		return
	}
	if err := route.CheckPath(r.URL); err != nil {
		refuse(w, r, err)
		return
	}
	if g := p.metadata[r.URL.Path]; g != nil && r.Method == http.MethodGet {
		p.serveMetadata(w, g)
		return
	}
	g, below := p.opts.Table.Find(r.Host, r.URL.Path)
	if g == nil {
		refuse(w, r, &operation.Refusal{Status: http.StatusNotFound, Code: codeInvalid, Why: "no such resource"})
		return
	}
	x := &exchange{p: p, g: g, up: p.upstreams[g], path: below}
	var ok bool
	if x.below, ok = strings.CutPrefix(r.URL.EscapedPath(), strings.TrimSuffix(g.Route.Path, "/")); !ok {
		refuse(w, r, route.ErrPath)
		return
	}
	if cards := p.cards[g]; cards != nil && below == cardPath {
		cards.ServeHTTP(w, r)
		return
	}
	mark := g.Trail.Start()
	caller, known, err := g.Identify(r)
	x.caller = caller
	if err != nil {
		p.deny(w, r, x, err, known, mark)
		return
	}
	release, err := x.read(w, r)
	if err != nil {
		refuse(w, r, err)
		return
	}
	defer release()
	if g.Route.Protocol == config.MCP {
		defer x.leave()
		if x.session, err = p.opts.Sessions.use(x, r.Header.Get(headerSession)); err != nil {
			p.deny(w, r, x, err, true, mark)
			return
		}
	}
	if g.Route.Protocol == config.MCP {
		if x.exec, err = p.opts.Tasks.follow(x); err != nil {
			p.deny(w, r, x, err, true, mark)
			return
		}
		defer p.opts.Tasks.leave(x.exec)
	}
	if g.Route.Protocol == config.A2A && executes(&x.op) {
		x.exec = newExecution(&x.op, x.rest(r))
	}
	if x.op.Method == extendedCard && p.cards[g] != nil {
		x.cards = p.cards[g]
		defer func() { p.opts.Budget.give(x.taken) }()
	}
	x.call = g.Call(&x.op)
	watched, unwatch := guard.Watch(r.Context(), g.Verifier, r)
	defer unwatch()
	bound, unbind, err := g.Enforcer.Bind(watched, caller, x.call)
	if err != nil {
		p.deny(w, r, x, err, true, mark)
		return
	}
	defer unbind()
	x.bound = bound
	x.traceparent = r.Header.Get("Traceparent")
	g.Note(&x.op, trail.Event{Mark: mark, Caller: caller, Call: x.call, Traceparent: x.traceparent})

	// A client that does not read must not hold up the end of its stream.
	stop := context.AfterFunc(bound, func() {
		x.cancelTask()
		if route.Denied(bound) != nil {
			w.deadline(time.Now().Add(p.opts.Config.Proxy.FlushTimeout))
		}
	})
	defer func() {
		stop()
		x.cancelTask()
	}()
	if x.cards != nil {
		if err := x.discoverable(); err != nil {
			p.deny(w, r, x, err, true, mark)
			return
		}
	}
	p.reverse.ServeHTTP(w, r.WithContext(context.WithValue(bound, exchangeKey{}, x)))
	switch d := route.Denied(bound); {
	case d == nil:
	case x.upgraded:
		x.noteCut(d) // it has no words for why
	default:
		_ = w.FlushError() // while its deadline is in force
	}
}

// noteCut tells the observer once that the exchange was cut.
func (x *exchange) noteCut(d *session.DeniedError) {
	if x.cut.CompareAndSwap(false, true) {
		x.mu.Lock()
		op, digest := x.op, x.digest
		x.mu.Unlock()
		x.g.Note(&op, trail.Event{Mark: x.g.Trail.Start(), Caller: x.caller, Call: x.call, Digest: digest, Traceparent: x.traceparent, Err: d, Cut: true})
	}
}

// forget lets go of the body that the operation was read from. What the trail
// may have to say of it still is its digest.
func (x *exchange) forget() {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.op.Arguments != nil && x.g.Trail != nil {
		x.digest = x.caller.ArgumentDigest(x.op.Arguments)
	}
	x.op.Arguments = nil
}

// leave ends the exchange's part in its session. A legacy MCP server does not
// take the end of a request for its cancellation, so it is told.
func (x *exchange) leave() {
	t := x.session
	if x.bound != nil && x.op.ID != nil && route.Denied(x.bound) != nil {
		x.p.opts.Sessions.cancelled(t, x.op.ID)
		return
	}
	x.p.opts.Sessions.done(t)
}

// deny answers a denial that came before the upstream was asked.
func (p *Proxy) deny(w http.ResponseWriter, r *http.Request, x *exchange, err error, known bool, mark trail.Mark) {
	var refusal *operation.Refusal
	if errors.As(err, &refusal) {
		refuse(w, r, err)
		return
	}
	e := trail.Event{Mark: mark, Caller: x.caller, Traceparent: r.Header.Get("Traceparent"), Err: err, Took: mark.Took()}
	note := func() {
		if known && x.op.Method == "" && x.g.Route.Protocol != config.MCP {
			x.op = x.g.ByPath(r.Method, r.URL, x.path, r.Header)
		}
		e.Call = x.g.Call(&x.op)
		x.g.Note(&x.op, e)
	}
	a := x.g.Resource.Answer(err)
	if operation.GRPC(r.Header) {
		note()
		denyGRPC(w, r, &a)
		return
	}
	a.WriteBody(w, r, func(readable bool) []byte {
		if readable && x.op.Method == "" && known && r.Method == http.MethodPost && x.g.Route.Protocol != config.HTTP {
			// So that its client can tell which call the answer is to, and the
			// trail what was asked for.
			if release, err := x.readJSON(w, r, maxDeniedBody, 0); err == nil {
				defer release()
			}
		}
		note()
		return x.inWords(&a)
	})
}

// inWords is a denial in the form of the route's protocol.
func (x *exchange) inWords(a *denial.Answer) []byte {
	switch {
	case x.g.Route.Protocol != config.A2A:
		return a.Response(x.op.ID)
	case x.op.ID != nil:
		return a2aguard.JSONRPCError(a, x.op.ID)
	}
	return a2aguard.RESTError(a)
}

// maxDeniedBody bounds what is read of a request that is denied already.
const maxDeniedBody = 64 << 10

const codeInvalid = -32600

// refuse answers a request that nobody may send.
func refuse(w http.ResponseWriter, r *http.Request, err error) {
	x := &operation.Refusal{Status: http.StatusBadRequest, Code: codeInvalid, Why: "the request cannot be read"}
	_ = errors.As(err, &x)
	h := w.Header()
	h.Set("Content-Type", "application/json")
	h.Set("Cache-Control", "no-store")
	// What is left of its body is not waited for.
	_ = http.NewResponseController(w).SetReadDeadline(time.Now().Add(refusedReadTime))
	if r.ProtoMajor == 1 {
		h.Set("Connection", "close")
	}
	w.WriteHeader(x.Status)
	_, _ = w.Write(append(errorResponse(x.ID, x.Code, x.Why), '\n')) // a client that has gone needs no answer
}

const refusedReadTime = 500 * time.Millisecond

func errorResponse(id json.RawMessage, code int64, message string) []byte {
	type object struct {
		Code    int64  `json:"code"`
		Message string `json:"message"`
	}
	b, err := json.Marshal(struct {
		Version string          `json:"jsonrpc"`
		ID      json.RawMessage `json:"id,omitempty"`
		Error   object          `json:"error"`
	}{"2.0", id, object{code, message}})
	if err != nil {
		return errorResponse(nil, code, message)
	}
	return b
}

// failed answers a request to which the upstream did not.
func (p *Proxy) failed(w http.ResponseWriter, r *http.Request, err error) {
	x := exchangeOf(r.Context())
	if d := route.Denied(x.bound); d != nil {
		x.noteCut(d)
		a := x.g.Resource.Answer(d)
		if operation.GRPC(r.Header) {
			denyGRPC(w, r, &a)
			return
		}
		a.WriteBody(w, r, func(bool) []byte { return x.inWords(&a) })
		return
	}
	if r.Context().Err() != nil {
		// The client has gone.
		w.WriteHeader(http.StatusBadGateway)
		return
	}
	var refusal *operation.Refusal
	var denied *session.DeniedError
	switch {
	case errors.As(err, &refusal):
	case errors.As(err, &denied):
		a := x.g.Resource.Answer(denied)
		a.WriteBody(w, r, func(bool) []byte { return x.inWords(&a) })
		return
	default:
		// What the error says is not for the caller.
		p.warnings.warn("upstream", x.g.Route.Name, err)
		refusal = &operation.Refusal{Status: http.StatusBadGateway, Code: -31502, Why: "the upstream did not answer"}
		var timeout interface{ Timeout() bool }
		if errors.As(err, &timeout) && timeout.Timeout() {
			refusal = &operation.Refusal{Status: http.StatusGatewayTimeout, Code: -31504, Why: "the upstream did not answer in time"}
		}
	}
	own := *refusal // others may share it
	own.ID = x.op.ID
	refuse(w, r, &own)
}

// rewrite makes the upstream's request from the client's.
func (p *Proxy) rewrite(pr *httputil.ProxyRequest) {
	x := exchangeOf(pr.In.Context())
	out := pr.Out
	x.up.address(out.URL, x.below)
	out.URL.RawQuery = pr.In.URL.RawQuery
	out.Host = ""
	if pr.In.Trailer != nil {
		// It is filled in as the body is read.
		out.Trailer = pr.In.Trailer
		drop(out.Trailer)
		out.Body = &trailed{out.Body, out.Trailer}
	}
	h := out.Header
	drop(h)
	pr.SetXForwarded()
	if x.cards != nil {
		// What is rewritten is wanted whole, and as it is.
		for _, name := range [...]string{"Accept-Encoding", "Grpc-Accept-Encoding", "Range", "If-Range", "If-Match", "If-None-Match", "If-Modified-Since", "If-Unmodified-Since"} {
			delete(h, name)
		}
	}
	if x.exec != nil && x.exec.part != none {
		delete(h, "Accept-Encoding") // the answer is looked at
	}
	up := &x.g.Route.Upstream
	if !up.ForwardToken {
		delete(h, "Authorization")
		delete(h, "Dpop")
	}
	if !up.NoIdentityHeaders {
		for _, kv := range route.Identity(x.caller) {
			h[kv[0]] = []string{kv[1]}
		}
	}
}

// dropped reports whether a header of a client's does not pass: it names the
// caller, says something which only a proxy may say, would have an upstream do
// something else than was checked, or is one that was looked at, in a spelling
// that is the same to a server which does not tell - from _.
func dropped(name string) bool {
	if route.Spoofed(name) || route.Overrides(name) {
		return true
	}
	plain := !strings.Contains(name, "_")
	name = http.CanonicalHeaderKey(strings.ReplaceAll(name, "_", "-"))
	if strings.HasPrefix(name, "X-Forwarded-") || name == "X-Real-Ip" {
		return true
	}
	if plain {
		return false
	}
	for _, p := range [...]string{"Mcp-", "Content-", "Transfer-"} {
		if strings.HasPrefix(name, p) {
			return true
		}
	}
	return false
}

func drop(h http.Header) {
	for name := range h {
		if name == "" {
			delete(h, name) // a trailer that was announced between two commas
			continue
		}
		// Nearly all headers are neither: what is read of a request has its
		// names in canonical form.
		if c := name[0]; c != 'X' && c != 'I' && strings.IndexByte(name, '_') < 0 {
			continue
		}
		if dropped(name) {
			delete(h, name)
		}
	}
}

// trailed is a body behind which trailers come, less those that do not pass.
type trailed struct {
	io.ReadCloser
	trailer http.Header
}

func (t *trailed) Read(p []byte) (int, error) {
	n, err := t.ReadCloser.Read(p)
	if err != nil {
		drop(t.trailer)
	}
	return n, err
}

// router sends each request by the transport of its route.
type router struct{}

func (router) RoundTrip(r *http.Request) (*http.Response, error) {
	x := exchangeOf(r.Context())
	if x.exec == nil {
		return x.up.transport.RoundTrip(r)
	}
	r = x.sending(r)
	if x.exec.part == polls || x.exec.part == awaits {
		x.p.opts.Tasks.renew(x, r)
	}
	res, err := x.up.transport.RoundTrip(r)
	if err != nil {
		return nil, err
	}
	// The transport writes the trailers into its own at the end of the body, which
	// may be read when the caller is long gone.
	x.exec.answer = res
	own := *res
	own.Trailer = res.Trailer.Clone()
	return &own, nil
}

// buffers are for copying bodies.
type buffers struct{ pool sync.Pool }

const bufferLen = 32 << 10

func (b *buffers) Get() []byte {
	if v, ok := b.pool.Get().(*[bufferLen]byte); ok {
		return v[:]
	}
	return new([bufferLen]byte)[:]
}

func (b *buffers) Put(v []byte) { b.pool.Put((*[bufferLen]byte)(v)) }
