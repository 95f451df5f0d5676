package mcpguard_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/modelcontextprotocol/go-sdk/mcp"
	"go.uber.org/goleak"

	mcpguard "github.com/interlock-fabric/interlock/adapters/mcp"
	"github.com/interlock-fabric/interlock/pkg/credential"
	"github.com/interlock-fabric/interlock/pkg/session"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	issuerURL = "https://id.example"
	resource  = "https://tools.example/mcp"
	legacy    = "2025-11-25"
	modern    = "2026-07-28"
)

// The eras of the protocol; each test of a mechanism runs in both.
var eras = map[string]string{"legacy": legacy, "stateless": modern}

// enforcer is a small one with the contract of the real: rules instead of a
// revocation set, and Bind that checks again after registering.
type enforcer struct {
	secret *session.TenantSecret

	mu       sync.Mutex
	rules    []rule
	bound    map[*binding]struct{}
	ever     int // bindings ever made
	prepares int
}

type rule struct {
	match func(*session.Identity, *session.Call) bool
	err   *session.DeniedError
}

type binding struct {
	id     session.Identity
	call   session.Call
	cancel context.CancelCauseFunc
}

func newEnforcer(t testing.TB) *enforcer {
	secret, err := session.NewTenantSecret(1, "acme", make([]byte, 32))
	if err != nil {
		t.Fatal(err)
	}
	return &enforcer{secret: secret, bound: make(map[*binding]struct{})}
}

func (e *enforcer) Prepare(id session.Identity) (*session.Prepared, error) {
	e.mu.Lock()
	e.prepares++
	e.mu.Unlock()
	return e.secret.Prepare(id)
}

func (e *enforcer) prepared() int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.prepares
}

func (e *enforcer) Check(p *session.Prepared, call session.Call) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	id := p.Identity()
	return e.checkLocked(&id, &call)
}

func (e *enforcer) checkLocked(id *session.Identity, call *session.Call) error {
	for _, r := range e.rules {
		if r.match(id, call) {
			return r.err
		}
	}
	return nil
}

func (e *enforcer) Bind(ctx context.Context, p *session.Prepared, call session.Call) (context.Context, context.CancelFunc, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	b := &binding{id: p.Identity(), call: call, cancel: cancel}
	e.mu.Lock()
	defer e.mu.Unlock()
	if err := e.checkLocked(&b.id, &b.call); err != nil {
		cancel(err)
		return nil, nil, err
	}
	e.bound[b] = struct{}{}
	e.ever++
	return ctx, func() {
		e.mu.Lock()
		delete(e.bound, b)
		e.mu.Unlock()
		cancel(nil)
	}, nil
}

// deny adds a rule and cuts what is bound under it. The returned function lifts
// it.
func (e *enforcer) deny(d session.Denial, match func(*session.Identity, *session.Call) bool) (lift func()) {
	return e.denyErr(&session.DeniedError{Denial: d, Err: d.Effect.Sentinel()}, match)
}

func (e *enforcer) denyErr(err *session.DeniedError, match func(*session.Identity, *session.Call) bool) (lift func()) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.rules = append(e.rules, rule{match, err})
	for b := range e.bound {
		if match(&b.id, &b.call) {
			b.cancel(err)
		}
	}
	n := len(e.rules) - 1
	return func() {
		e.mu.Lock()
		defer e.mu.Unlock()
		e.rules[n].match = func(*session.Identity, *session.Call) bool { return false }
	}
}

func (e *enforcer) bindings() (now, ever int) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return len(e.bound), e.ever
}

// user matches every call of a user.
func user(name string) func(*session.Identity, *session.Call) bool {
	return func(id *session.Identity, _ *session.Call) bool { return id.User == name }
}

var stolen = session.Denial{
	Effect: session.EffectRevoked, Reason: session.ReasonStolenToken,
	Incident: "INC-142", Shape: session.Shape(session.KindSession), Seq: 48213,
}

// world is a guarded server on a real socket, with real tokens.
type world struct {
	enforcer *enforcer
	verifier *credential.Verifier
	guard    *mcpguard.Guard
	server   *mcp.Server
	http     *httptest.Server
	key      *ecdsa.PrivateKey

	started chan string   // a tool has begun
	ended   chan string   // a tool has returned
	let     chan struct{} // closed to let "stubborn" go
	causes  chan error    // why the contexts of tools ended
}

func newWorld(t *testing.T, opts *mcpguard.Options) *world {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	w := &world{
		enforcer: newEnforcer(t), key: key,
		started: make(chan string, 16), ended: make(chan string, 16), let: make(chan struct{}), causes: make(chan error, 256),
	}
	proofs, err := credential.NewProofChecker(credential.ProofOptions{OriginOf: func(r *http.Request) string { return "http://" + r.Host }})
	if err != nil {
		t.Fatal(err)
	}
	verifier, err := credential.New(credential.Options{
		Audiences: []string{resource}, Possession: proofs.Check,
		Issuers: []credential.Issuer{{
			URL: issuerURL, Tenant: "acme",
			Keys: jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: key.Public(), KeyID: "k1", Algorithm: "ES256", Use: "sig"}}},
		}},
	})
	if err != nil {
		t.Fatal(err)
	}
	if opts == nil {
		opts = &mcpguard.Options{}
	}
	w.verifier = verifier
	opts.Resource = resource
	opts.ResourceMetadata = "https://tools.example/.well-known/oauth-protected-resource"
	w.guard, err = mcpguard.New(w.enforcer, verifier, opts)
	if err != nil {
		t.Fatal(err)
	}
	w.server = w.newServer()
	w.http = httptest.NewServer(w.guard.Serve(w.server, nil))
	t.Cleanup(func() {
		select {
		case <-w.let:
		default:
			close(w.let)
		}
		if err := w.guard.Close(); err != nil {
			t.Error(err)
		}
		w.http.CloseClientConnections()
		w.http.Close()
		verifier.Close()
		if now, _ := w.enforcer.bindings(); now != 0 {
			t.Errorf("%d bindings were never released", now)
		}
	})
	return w
}

func (w *world) newServer() *mcp.Server {
	s := mcp.NewServer(&mcp.Implementation{Name: "tools", Version: "1"}, nil)
	tool := func(name string, run func(context.Context) (string, error)) {
		mcp.AddTool(s, &mcp.Tool{Name: name}, func(ctx context.Context, _ *mcp.CallToolRequest, _ struct{}) (*mcp.CallToolResult, any, error) {
			context.AfterFunc(ctx, func() { w.causes <- context.Cause(ctx) })
			w.started <- name
			defer func() { w.ended <- name }()
			text, err := run(ctx)
			if err != nil {
				return nil, nil, err
			}
			return &mcp.CallToolResult{Content: []mcp.Content{&mcp.TextContent{Text: text}}}, nil, nil
		})
	}
	tool("echo", func(context.Context) (string, error) { return "hello", nil })
	tool("other", func(context.Context) (string, error) { return "other", nil })
	tool("wait", func(ctx context.Context) (string, error) {
		<-ctx.Done()
		return "", ctx.Err()
	})
	tool("stubborn", func(context.Context) (string, error) {
		<-w.let
		return "too late", nil
	})
	mcp.AddTool(s, &mcp.Tool{Name: "whoami"}, func(_ context.Context, req *mcp.CallToolRequest, _ struct{}) (*mcp.CallToolResult, any, error) {
		id, ok := mcpguard.IdentityOf(req)
		return &mcp.CallToolResult{Content: []mcp.Content{&mcp.TextContent{Text: id.User}}, IsError: !ok}, nil, nil
	})
	return s
}

// token signs claims for a user, with whatever is to be different.
func (w *world) token(t testing.TB, sub string, change ...func(map[string]any)) string {
	t.Helper()
	now := time.Now()
	claims := map[string]any{
		"iss": issuerURL, "sub": sub, "aud": resource, "sid": "s-" + sub, "jti": rand.Text(),
		"client_id": "cli", "scope": "tools.use", "iat": now.Unix(), "exp": now.Add(time.Hour).Unix(),
	}
	for _, c := range change {
		c(claims)
	}
	return sign(t, jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: w.key, KeyID: "k1"}}, claims)
}

func sign(t testing.TB, key jose.SigningKey, claims any) string {
	t.Helper()
	signer, err := jose.NewSigner(key, (&jose.SignerOptions{}).WithType("at+jwt"))
	if err != nil {
		t.Fatal(err)
	}
	token, err := jwt.Signed(signer).Claims(claims).Serialize()
	if err != nil {
		t.Fatal(err)
	}
	return token
}

// bearer adds a token, which may change, to every request.
type bearer struct {
	mu    sync.Mutex
	token string
	base  *http.Transport
	prove func(r *http.Request, token string) // instead of the scheme Bearer
}

func (b *bearer) set(token string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.token = token
}

func (b *bearer) RoundTrip(r *http.Request) (*http.Response, error) {
	b.mu.Lock()
	token := b.token
	b.mu.Unlock()
	r = r.Clone(r.Context())
	r.Header.Set("Authorization", "Bearer "+token)
	if b.prove != nil {
		b.prove(r, token)
	}
	return b.base.RoundTrip(r)
}

type client struct {
	*mcp.ClientSession
	bearer *bearer
	logs   chan any
}

// dial connects a real client of one era.
func (w *world) dial(t *testing.T, era, token string) (*client, error) {
	t.Helper()
	return w.dialBy(t, era, &bearer{token: token, base: &http.Transport{}})
}

// dialBy is dial with credentials of the caller's making.
func (w *world) dialBy(t *testing.T, era string, b *bearer) (*client, error) {
	t.Helper()
	c := &client{bearer: b, logs: make(chan any, 4)}
	t.Cleanup(c.bearer.base.CloseIdleConnections)
	opts := &mcp.ClientOptions{
		//lint:ignore SA1019 the revisions with GET streams have it
		LoggingMessageHandler: func(_ context.Context, r *mcp.LoggingMessageRequest) { c.logs <- r.Params.Data }, //nolint:staticcheck // as above
	}
	transport := &mcp.StreamableClientTransport{
		Endpoint: w.http.URL, HTTPClient: &http.Client{Transport: c.bearer},
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	cs, err := mcp.NewClient(&mcp.Implementation{Name: "client", Version: "1"}, opts).
		Connect(ctx, transport, &mcp.ClientSessionOptions{ProtocolVersion: era})
	if err != nil {
		return nil, err
	}
	c.ClientSession = cs
	t.Cleanup(func() { _ = cs.Close() })
	return c, nil
}

func (w *world) mustDial(t *testing.T, era, token string) *client {
	t.Helper()
	c, err := w.dial(t, era, token)
	if err != nil {
		t.Fatal(err)
	}
	if got := c.InitializeResult().ProtocolVersion; got != era {
		t.Fatalf("negotiated %s, want %s", got, era)
	}
	return c
}

func (c *client) call(tool string) (*mcp.CallToolResult, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	return c.CallTool(ctx, &mcp.CallToolParams{Name: tool})
}

// goCall calls a tool and returns once it runs.
func (w *world) goCall(t *testing.T, c *client, tool string) <-chan error {
	t.Helper()
	done := make(chan error, 1)
	go func() {
		res, err := c.call(tool)
		if err == nil && res.IsError {
			err = errors.New("result with IsError")
		}
		done <- err
	}()
	w.await(t, w.started, tool)
	return done
}

func (w *world) await(t *testing.T, ch chan string, tool string) {
	t.Helper()
	select {
	case got := <-ch:
		if got != tool {
			t.Fatalf("tool %s, want %s", got, tool)
		}
	case <-time.After(20 * time.Second):
		t.Fatalf("nothing of tool %s", tool)
	}
}

func mustAllow(t *testing.T, c *client, tool string) {
	t.Helper()
	res, err := c.call(tool)
	if err != nil || res.IsError {
		t.Fatalf("%s: %v, %+v", tool, err, res)
	}
}

func mustDeny(t *testing.T, err error, want mcpguard.Denied) {
	t.Helper()
	got, ok := mcpguard.DeniedOf(err)
	if !ok || got != want {
		t.Fatalf("got %+v (%v), want %+v", got, err, want)
	}
}

var stolenAnswer = mcpguard.Denied{Error: "revoked", Reason: "stolen-token", Incident: "INC-142", Seq: 48213}
