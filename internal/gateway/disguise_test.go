package gateway

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"

	auth "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/interlock-fabric/interlock/internal/gateway/config"
	"github.com/interlock-fabric/interlock/internal/gateway/route"
	"github.com/interlock-fabric/interlock/pkg/authority"
)

// send sends a request whose path is sent as it is.
func send(t testing.TB, tr http.RoundTripper, method, url, token, body string, header ...string) *http.Response {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, url, strings.NewReader(body))
	must(t, err)
	req.Header.Set("Authorization", "Bearer "+token)
	for i := 0; i < len(header); i += 2 {
		req.Header.Add(header[i], header[i+1])
	}
	resp, err := tr.RoundTrip(req)
	must(t, err)
	t.Cleanup(func() { resp.Body.Close() })
	return resp
}

// A decision on an operation holds however its path is spelled.
func TestPathsHaveOneSpelling(t *testing.T) {
	w := newWorld(t)
	up, reached := plainUpstream(t)
	g := w.start(w.load(routeTo("http", "/files", up.URL, "")), Proxy)
	w.decide(authority.Suspend, "tool", "GET /files/b")
	w.decide(authority.Suspend, "tool", "POST /files/a-b/ü")
	ann, tr := w.token("ann", "s-ann"), h2c()
	eventually(t, "the operation is denied", func() bool {
		return send(t, tr, "POST", g.url()+"/files/a-b/%C3%BC", ann, "").StatusCode == http.StatusForbidden
	})
	for len(reached) > 0 {
		<-reached
	}
	for _, path := range []string{"/files/%61-b/%C3%BC", "/files/a%2Db/%c3%bc", "/%66iles/a-b/%C3%BC"} {
		if resp := send(t, tr, "POST", g.url()+path, ann, ""); resp.StatusCode < 400 || len(reached) > 0 {
			t.Errorf("%s: %s", path, resp.Status)
		}
	}
	if resp := send(t, tr, "HEAD", g.url()+"/files/b", ann, ""); resp.StatusCode != http.StatusForbidden || len(reached) > 0 {
		t.Error("HEAD for GET:", resp.Status)
	}
	// What else is allowed reaches the upstream as it was sent.
	if resp := send(t, tr, "POST", g.url()+"/files/%61", ann, ""); resp.StatusCode != http.StatusOK {
		t.Fatal(resp.Status)
	}
	if got := (<-reached).RequestURI; got != "/%61" {
		t.Errorf("the upstream sees %s", got)
	}
}

// An agent that does not look at the content type goes by the path.
func TestRESTIsNotTakenForGRPC(t *testing.T) {
	w := newWorld(t)
	up, reached := plainUpstream(t)
	g := w.start(w.load(routeTo("a2a", "/a2a", up.URL, "")), Proxy)
	w.decide(authority.Suspend, "tool", "CancelTask")
	w.decide(authority.Suspend, "tool", "GetTask")
	ann, tr := w.token("ann", "s-ann"), h2c()
	cancel := g.url() + "/a2a/tasks/t1:cancel"
	eventually(t, "both are denied", func() bool {
		return send(t, tr, "POST", cancel, ann, "").StatusCode == http.StatusForbidden &&
			send(t, tr, "GET", g.url()+"/a2a/tasks/t1", ann, "").StatusCode == http.StatusForbidden
	})
	for len(reached) > 0 {
		<-reached
	}
	if resp := send(t, tr, "POST", cancel, ann, "", "Content-Type", "application/grpc"); len(reached) > 0 {
		t.Error("as gRPC:", resp.Status)
	}
	if resp := send(t, tr, "HEAD", g.url()+"/a2a/tasks/t1", ann, ""); len(reached) > 0 {
		t.Error("by HEAD:", resp.Status)
	}
}

func TestTrailersAreNamed(t *testing.T) {
	w := newWorld(t)
	up, _ := plainUpstream(t)
	g := w.start(w.load(routeTo("http", "/files", up.URL, "")), Proxy)
	resp := send(t, h2c(), "POST", g.url()+"/files", w.token("ann", "s-ann"), "x", "Trailer", "a,,b")
	if b, err := io.ReadAll(resp.Body); err != nil || resp.StatusCode != http.StatusOK {
		t.Fatal(resp.Status, string(b), err)
	}
}

func TestConnectionHidesNoHeader(t *testing.T) {
	w := newWorld(t)
	up, reached := plainUpstream(t)
	g := w.start(w.load(routeTo("mcp", "/mcp", up.URL, "")), Proxy)
	for _, name := range []string{"Mcp-Session-Id", "mcp-method", "keep-alive, Mcp-Protocol-Version"} {
		resp := post(t, g.url()+"/mcp", w.token("ann", "s-ann"), toolCall("echo"), func(r *http.Request) {
			r.Header.Set("Connection", name)
			r.Header.Set("Mcp-Session-Id", "s")
		})
		if resp.StatusCode != http.StatusBadRequest || len(reached) > 0 {
			t.Errorf("%s: %s", name, resp.Status)
		}
	}
}

// What some servers take for the path of a request is the client's own word, but
// for the header by which the proxy in front tells it.
func TestForwardAuthIsNotOverridden(t *testing.T) {
	w := newWorld(t)
	for dialect, prefix := range map[string]string{"x-forwarded": "X-Forwarded-", "x-original": "X-Original-"} {
		t.Run(dialect, func(t *testing.T) {
			c := w.load(strings.Replace(authzBoth, "  grpc: {listen: \"127.0.0.1:0\"}\n  strip_token: true", "  http: {listen: \"127.0.0.1:0\"}\n  forward_headers: "+dialect, 1))
			g := w.start(c, Authz)
			defer g.Shutdown(t.Context())
			ann := w.token("ann", "s-ann")
			ask := func(header ...string) int {
				header = append(header, prefix+"Method", "GET", prefix+"Uri", "/files/a", prefix+"Host", "tools.example")
				return send(t, &http.Transport{DisableKeepAlives: true}, "GET", g.url()+"/", ann, "", header...).StatusCode
			}
			if got := ask(); got != http.StatusOK {
				t.Fatal(got)
			}
			for _, name := range []string{"X-Original-Url", "X-Original_Uri", "X-Rewrite-Url"} {
				if got := ask(name, "/admin"); got != http.StatusForbidden {
					t.Errorf("%s: %d", name, got)
				}
			}
			if got := ask("X-Original-Uri", "/admin"); got != http.StatusForbidden {
				t.Errorf("X-Original-Uri: %d", got)
			}
		})
	}
}

// Whatever a caller does, its sessions are closed where they were opened.
func TestSessionsAreClosedWhereTheyWereOpened(t *testing.T) {
	w := newWorld(t)
	opened, closed := 0, make(chan string, 8)
	up := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		switch {
		case r.URL.Path != "/v1/endpoint":
			http.NotFound(w, r)
		case r.Method == http.MethodDelete:
			closed <- r.Header.Get("Mcp-Session-Id")
		case strings.Contains(string(body), "initialize"):
			opened++
			w.Header().Set("Mcp-Session-Id", fmt.Sprint("session-", opened))
		}
	}))
	defer up.Close()
	g := w.start(w.load(routeTo("mcp", "/", up.URL+"/v1", "")), Proxy)
	ann, tr := w.token("ann", "s-ann"), &http.Transport{DisableKeepAlives: true}
	ask := func(path, method string, status int, header ...string) {
		t.Helper()
		header = append(header, "Content-Type", "application/json")
		if resp := send(t, tr, "POST", g.url()+path, ann, `{"jsonrpc":"2.0","id":1,"method":"`+method+`","params":{}}`, header...); resp.StatusCode != status {
			t.Fatal(resp.Status)
		}
	}
	ask("/endpoint", "initialize", 200)
	ask("/elsewhere", "ping", 404, "Mcp-Session-Id", "session-1")
	ask("/endpoint", "initialize", 200, "Mcp-Session-Id", "session-1")
	if n := g.sessions.Len(); n != 2 {
		t.Errorf("%d sessions are tracked", n)
	}
	w.decide(authority.Revoke, "session", "s-ann")
	got := []string{within(t, "a session is closed", closed), within(t, "the other is closed", closed)}
	if slices.Sort(got); got[0] != "session-1" || got[1] != "session-2" {
		t.Errorf("closed are %v", got)
	}
}

// A request that makes the gateway panic is denied, ends nothing else, and is in
// the log where an operator sees it.
func TestPanicsAreToldAndContained(t *testing.T) {
	w := newWorld(t)
	up, _ := plainUpstream(t)
	for kind, c := range map[Kind]*config.Config{
		Proxy: w.load(routeTo("http", "/files", up.URL, "")),
		Authz: w.load(authzBoth),
	} {
		var log syncBuffer
		g, err := Start(Options{
			Config: c, Kind: kind, Logger: slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelInfo})),
			Observe: func(d *route.Decision) {
				if d.Method == "GET /files/bad" {
					panic("on purpose")
				}
			},
		})
		must(t, err)
		defer g.Shutdown(context.Background())
		eventually(t, "ready", func() bool { return g.unready() == "" })
		ann := w.token("ann", "s-ann")
		ask := func(path string) bool {
			if kind == Proxy {
				req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, g.url()+path, nil)
				must(t, err)
				req.Header.Set("Authorization", "Bearer "+ann)
				resp, err := (&http.Transport{DisableKeepAlives: true}).RoundTrip(req)
				if err != nil {
					return false
				}
				defer resp.Body.Close()
				return resp.StatusCode == http.StatusOK
			}
			conn, err := grpc.NewClient(strings.TrimPrefix(g.url(), "http://"), grpc.WithTransportCredentials(insecure.NewCredentials()))
			must(t, err)
			defer conn.Close()
			res, err := auth.NewAuthorizationClient(conn).Check(t.Context(), &auth.CheckRequest{Attributes: &auth.AttributeContext{Request: &auth.AttributeContext_Request{
				Http: &auth.AttributeContext_HttpRequest{Method: "GET", Path: path, Host: "tools.example", Headers: map[string]string{"authorization": "Bearer " + ann}},
			}}})
			must(t, err)
			return res.Status.Code == int32(codes.OK)
		}
		if ask("/files/bad") {
			t.Error("allowed")
		}
		if !ask("/files/good") {
			t.Error("another request is denied")
		}
		if s := log.String(); !strings.Contains(s, "level=ERROR") || !strings.Contains(s, "on purpose") || strings.Contains(s, ann) {
			t.Errorf("the log: %s", s)
		}
	}
}

type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}
