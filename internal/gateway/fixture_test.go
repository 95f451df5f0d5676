package gateway

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/modelcontextprotocol/go-sdk/mcp"
	"go.uber.org/goleak"

	service "github.com/interlock-fabric/interlock/internal/authority"
	"github.com/interlock-fabric/interlock/internal/gateway/config"
	"github.com/interlock-fabric/interlock/pkg/authority"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	issuerURL = "https://id.example"
	resource  = "https://tools.example/mcp"
	legacy    = "2025-11-25"
	modern    = "2026-07-28"
	// patience is for what must happen, however slow the machine.
	patience = 30 * time.Second
)

var eras = map[string]string{"legacy": legacy, "stateless": modern}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	limit, tick := time.After(patience), time.NewTicker(2*time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-limit:
			t.Fatalf("never: %s", what)
		case <-tick.C:
		}
	}
}

func within[T any](t testing.TB, what string, c <-chan T) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(patience):
		t.Fatalf("never: %s", what)
		panic("unreachable")
	}
}

// world is a real authority with its bus, and an issuer of tokens.
type world struct {
	t       testing.TB
	dir     string
	service *service.Authority
	client  *authority.Client
	signer  jose.Signer
	stop    func()
	// issuer is who mints the tokens, and issuers what the configuration says of
	// it; newIssuer replaces both.
	issuer, issuers string
}

func newWorld(t testing.TB) *world {
	t.Helper()
	w := &world{t: t, dir: t.TempDir(), issuer: issuerURL, issuers: "{url: https://id.example, tenant: default, jwks_file: jwks.json}"}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	var err error
	w.service, err = service.Open(ctx, service.Options{DataDir: filepath.Join(w.dir, "a"), NATSListen: "127.0.0.1:0", RelaxedSync: true})
	must(t, err)
	w.stop = sync.OnceFunc(func() { must(t, w.service.Close()) })
	t.Cleanup(func() { w.stop() })
	w.client, err = authority.New(authority.Options{Socket: w.service.Socket()})
	must(t, err)
	t.Cleanup(w.client.Close)
	raw, err := w.client.Enroll(ctx, authority.EnrollRequest{Name: "gateway"})
	must(t, err)
	w.write("enrollment.json", string(raw))
	var key jose.JSONWebKey
	w.signer, key = newSigner(t, "k1")
	jwks, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{key}})
	must(t, err)
	w.write("jwks.json", string(jwks))
	return w
}

// newSigner signs tokens by a new key, whose public half it returns.
func newSigner(t testing.TB, kid string) (jose.Signer, jose.JSONWebKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	s, err := jose.NewSigner(
		jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: key, KeyID: kid}}, (&jose.SignerOptions{}).WithType("at+jwt"))
	must(t, err)
	return s, jose.JSONWebKey{Key: key.Public(), KeyID: kid, Algorithm: "ES256", Use: "sig"}
}

func (w *world) write(name, text string) string {
	w.t.Helper()
	path := filepath.Join(w.dir, name)
	must(w.t, os.WriteFile(path, []byte(text), 0o600))
	return path
}

// token mints one for a session of a user.
func (w *world) token(user, sid string, change ...func(map[string]any)) string {
	w.t.Helper()
	claims := w.claims(user, sid)
	for _, c := range change {
		c(claims)
	}
	return sign(w.t, w.signer, claims)
}

// claims are those of a token for a session of a user.
func (w *world) claims(user, sid string) map[string]any {
	now := time.Now()
	return map[string]any{
		"iss": w.issuer, "sub": user, "aud": resource, "sid": sid, "jti": rand.Text(),
		"client_id": "cli", "iat": now.Unix(), "auth_time": now.Unix(), "exp": now.Add(time.Hour).Unix(),
	}
}

func sign(t testing.TB, by jose.Signer, claims map[string]any) string {
	t.Helper()
	payload, err := json.Marshal(claims)
	must(t, err)
	jws, err := by.Sign(payload)
	must(t, err)
	s, err := jws.CompactSerialize()
	must(t, err)
	return s
}

// decide decides on one target.
func (w *world) decide(op authority.Operation, kind, value string) {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	_, err := w.client.Decide(ctx, authority.Request{
		Operation: op, Targets: []authority.Target{authority.One("", kind, w.issuerFor(kind), value)},
		Reason: "stolen-token", Incident: "INC-142", Commit: true,
	})
	must(w.t, err)
}

func (w *world) issuerFor(kind string) string {
	switch kind {
	case "user", "session", "token", "client":
		return w.issuer
	}
	return ""
}

const base = `
enrollment: enrollment.json
issuers:
  - %s
admin: {listen: "127.0.0.1:0", socket: %s}
drain_timeout: 500ms
`

// load reads a configuration whose first part is the same for all.
func (w *world) load(rest string) *config.Config {
	w.t.Helper()
	// A path in a temporary folder may be too long for a socket.
	dir, err := os.MkdirTemp("", "gw")
	must(w.t, err)
	w.t.Cleanup(func() { _ = os.RemoveAll(dir) })
	path := w.write("enforcer.yaml", fmt.Sprintf(base, w.issuers, filepath.Join(dir, "s"))+rest)
	c, err := config.Load(path, nil, nil)
	must(w.t, err)
	return c
}

const listener = "proxy: {listeners: [{listen: \"127.0.0.1:0\"}], flush_timeout: 500ms}\n"

// routeTo is a route for one upstream.
func routeTo(protocol, path, url, more string) string {
	return fmt.Sprintf("routes:\n  - {name: tools, protocol: %s, path: %q, resource: %q, %s upstream: {url: %q}}\n%s", protocol, path, resource, more, url, listener)
}

// start starts a gateway and waits until it is ready.
func (w *world) start(c *config.Config, kind Kind) *Gateway {
	w.t.Helper()
	g, err := Start(Options{Config: c, Kind: kind})
	must(w.t, err)
	w.t.Cleanup(func() { g.Shutdown(context.Background()) })
	eventually(w.t, "the gateway is ready", func() bool { return g.unready() == "" })
	return g
}

func (g *Gateway) url() string {
	for _, addr := range g.Addrs() {
		return "http://" + addr
	}
	return ""
}

// tools is a real MCP server of both eras, which guards nothing itself.
type tools struct {
	*httptest.Server
	server   *mcp.Server
	started  chan string
	ended    chan string
	requests chan *http.Request
	let      chan struct{} // closed to let every call end
}

func newTools(t testing.TB) *tools {
	x := &tools{started: make(chan string, 64), ended: make(chan string, 64), requests: make(chan *http.Request, 1024), let: make(chan struct{})}
	x.server = mcp.NewServer(&mcp.Implementation{Name: "tools", Version: "1"}, nil)
	mcp.AddTool(x.server, &mcp.Tool{Name: "echo"}, func(context.Context, *mcp.CallToolRequest, struct{}) (*mcp.CallToolResult, any, error) {
		return &mcp.CallToolResult{Content: []mcp.Content{&mcp.TextContent{Text: "hello"}}}, nil, nil
	})
	mcp.AddTool(x.server, &mcp.Tool{Name: "wait"}, func(ctx context.Context, _ *mcp.CallToolRequest, in struct {
		Who string `json:"who"`
	}) (*mcp.CallToolResult, any, error) {
		x.started <- in.Who
		select {
		case <-ctx.Done():
			x.ended <- in.Who
		case <-x.let:
		}
		return nil, nil, ctx.Err()
	})
	get := func(*http.Request) *mcp.Server { return x.server }
	stateful := mcp.NewStreamableHTTPHandler(get, nil)
	stateless := mcp.NewStreamableHTTPHandler(get, &mcp.StreamableHTTPOptions{Stateless: true, PropagateRequestCancellation: true})
	x.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		select {
		case x.requests <- r:
		default:
		}
		if r.Header.Get("Mcp-Protocol-Version") >= modern || r.Header.Get("Mcp-Method") != "" {
			stateless.ServeHTTP(w, r)
			return
		}
		stateful.ServeHTTP(w, r)
	}))
	t.Cleanup(func() {
		x.release()
		x.CloseClientConnections()
		for s := range x.server.Sessions() {
			go s.Close()
		}
		x.Close()
	})
	return x
}

// release lets every call end, which the SDK waits for when a session is closed.
func (x *tools) release() {
	select {
	case <-x.let:
	default:
		close(x.let)
	}
}

func (x *tools) sessions() (n int) {
	for range x.server.Sessions() {
		n++
	}
	return n
}

type bearer struct {
	token string
	base  http.RoundTripper
}

func (b bearer) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.Header.Set("Authorization", "Bearer "+b.token)
	return b.base.RoundTrip(r)
}

// agent is a real MCP client.
type agent struct {
	*mcp.ClientSession
	notes chan *mcp.LoggingMessageRequest
}

func dial(t testing.TB, url, era, token string) (*agent, error) {
	t.Helper()
	a := &agent{notes: make(chan *mcp.LoggingMessageRequest, 16)}
	base := &http.Transport{}
	t.Cleanup(base.CloseIdleConnections)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	var err error
	a.ClientSession, err = mcp.NewClient(&mcp.Implementation{Name: "agent", Version: "1"}, &mcp.ClientOptions{
		//lint:ignore SA1019 the notification is how a legacy stream says why it ends
		LoggingMessageHandler: func(_ context.Context, r *mcp.LoggingMessageRequest) { a.notes <- r }, //nolint:staticcheck // as above
	}).Connect(ctx, &mcp.StreamableClientTransport{Endpoint: url, HTTPClient: &http.Client{Transport: bearer{token, base}}},
		&mcp.ClientSessionOptions{ProtocolVersion: era})
	if err != nil {
		return nil, err
	}
	t.Cleanup(func() { a.Close(); base.CloseIdleConnections() })
	if got := a.InitializeResult().ProtocolVersion; got != era {
		t.Fatalf("negotiated %s, want %s", got, era)
	}
	return a, nil
}

func (a *agent) call(ctx context.Context, tool, who string) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	args := map[string]any{}
	if who != "" {
		args["who"] = who
	}
	res, err := a.CallTool(ctx, &mcp.CallToolParams{Name: tool, Arguments: args})
	if err == nil && res.IsError {
		err = errors.New("the tool failed")
	}
	return err
}

func (a *agent) start(ctx context.Context, who string) <-chan error {
	done := make(chan error, 1)
	go func() { done <- a.call(ctx, "wait", who) }()
	return done
}

// rawCall posts a tool call of the legacy era and returns the response.
func post(t testing.TB, url, token, body string, change ...func(*http.Request)) *http.Response {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, url, strings.NewReader(body))
	must(t, err)
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Accept", "application/json, text/event-stream")
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	for _, c := range change {
		c(req)
	}
	tr := &http.Transport{DisableKeepAlives: true}
	resp, err := tr.RoundTrip(req)
	if errors.Is(err, io.EOF) {
		// A call that is cut when its answer has begun, and nothing of that is on
		// its way yet, has no answer: no status is what a test looks for.
		return &http.Response{Status: "cut before its answer", Body: http.NoBody}
	}
	must(t, err)
	t.Cleanup(func() { resp.Body.Close() })
	return resp
}
