package gateway

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	mcpguard "github.com/interlock-fabric/interlock/adapters/mcp"
	"github.com/interlock-fabric/interlock/internal/gateway/config"
	"github.com/interlock-fabric/interlock/pkg/authority"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// Whoever is not in the file is denied, and whoever is in it again is not. The
// mechanism is the enforcer's registry, which is replaced with the configuration.
func TestUnregisteredCallersAreDenied(t *testing.T) {
	w := newWorld(t)
	up := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	t.Cleanup(up.Close)
	const deny = "unregistered: deny\nregistered_file: registered.yaml\n"
	file := w.write("registered.yaml", `
- {tenant: default, issuer: "`+issuerURL+`", agents: ["SPIFFE://Corp/agent/a", local], clients: [ci], sessions: [s-known]}
- {tenant: default, agents: ["spiffe://corp/agent/b"]}
`)
	c := w.load(deny + routeTo("http", "/", up.URL, ""))
	g := w.start(c, Proxy)
	reload := func(more string) error {
		next := w.load(more + routeTo("http", "/", up.URL, ""))
		next.Admin = c.Admin
		return g.Reload(next)
	}
	act := func(chain ...string) func(map[string]any) {
		return func(c map[string]any) {
			for _, id := range slices.Backward(chain) {
				next := map[string]any{"sub": id}
				if c["act"] != nil {
					next["act"] = c["act"]
				}
				c["act"] = next
			}
		}
	}
	client := func(id string) func(map[string]any) { return func(c map[string]any) { c["client_id"] = id } }
	ask := func(change ...func(map[string]any)) int {
		t.Helper()
		res := post(t, g.url()+"/", w.token("ann", "s-ann", change...), "{}")
		if b, _ := io.ReadAll(res.Body); res.StatusCode == http.StatusUnauthorized && !strings.Contains(string(b), "unregistered") {
			t.Errorf("%s", b)
		}
		return res.StatusCode
	}
	const ok, no = http.StatusOK, http.StatusUnauthorized
	sid := func(id string) func(map[string]any) { return func(c map[string]any) { c["sid"] = id } }
	for name, tt := range map[string]struct {
		status int
		change []func(map[string]any)
	}{
		"nobody":                {no, nil},
		"a client":              {ok, []func(map[string]any){client("ci")}},
		"an agent":              {ok, []func(map[string]any){act("spiffe://corp/agent/a")}},
		"one that is no URI":    {ok, []func(map[string]any){act("local")}},
		"a chain":               {ok, []func(map[string]any){act("spiffe://corp/agent/a", "spiffe://corp/agent/b")}},
		"a stranger in a chain": {no, []func(map[string]any){act("spiffe://corp/agent/a", "spiffe://corp/agent/x")}},
		"a stranger's client":   {no, []func(map[string]any){act("spiffe://corp/agent/x"), client("ci")}},
		"a session":             {ok, []func(map[string]any){sid("s-known"), act("spiffe://corp/agent/x")}},
		"a session below":       {ok, []func(map[string]any){func(c map[string]any) { c["session_ancestors"] = []string{"s-known"} }}},
	} {
		if got := ask(tt.change...); got != tt.status {
			t.Errorf("%s: %d", name, got)
		}
	}
	p, err := g.enforcer.Prepare(session.Identity{Tenant: "default", Issuer: issuerURL, Actors: []session.Actor{{ID: "local"}}})
	must(t, err)
	if n := testing.AllocsPerRun(100, func() { g.registry.Registered(p) }); n != 0 {
		t.Errorf("%v allocations", n)
	}

	w.write("registered.yaml", "- {tenant: default, issuer: \""+issuerURL+"\", clients: [cli]}")
	must(t, reload(deny))
	if got := []int{ask(), ask(client("ci"))}; got[0] != ok || got[1] != no {
		t.Errorf("after the file has changed: %v", got)
	}
	for text, want := range map[string]string{
		"- {tenant: other, agents: [x]}":         "no tenant",
		"- {tenant: default, clients: [ci]}":     "clients",
		"- {tenant: default, agent: x}":          "unknown key",
		"- {tenant: default, agents: [\"\\0\"]}": "agents",
	} {
		w.write("registered.yaml", text)
		if err := reload(deny); !errors.Is(err, config.ErrInvalid) || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", text, err)
		}
	}
	must(t, os.Remove(file))
	if err := reload(deny); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("without the file: %v", err)
	}
	if got := ask(client("ci")); got != no {
		t.Errorf("after a file that cannot be used: %d", got)
	}
	must(t, reload(""))
	if got := ask(client("ci")); got != ok {
		t.Errorf("when everybody is welcome: %d", got)
	}
	for text, key := range map[string]string{
		"unregistered: report\n": "unregistered", "registered_file: f\n": "registered_file", "digests: demanded\n": "digests",
		"max_stale_registry: 10s\n": "max_stale_registry", "digests: required\nmax_stale_registry: 1s\n": "max_stale_registry",
	} {
		if _, err := config.Parse([]byte("enrollment: e\n"+text), nil, nil); !errors.Is(err, config.ErrInvalid) || !strings.Contains(err.Error(), key+":") {
			t.Errorf("%s: %v", text, err)
		}
	}
}

// The mechanism is that a runtime is swapped whole, and the old one kept for as
// long as it is in use.
func TestReloadDropsNothing(t *testing.T) {
	w, x := newWorld(t), newTools(t)
	c := w.load(routeTo("mcp", "/mcp", x.URL, ""))
	g := w.start(c, Proxy)
	url := g.url() + "/mcp"
	ann, err := dial(t, url, modern, w.token("ann", "s-ann"))
	must(t, err)
	defer x.release()
	running := ann.start(t.Context(), "ann")
	within(t, "a call runs", x.started)

	stop, failed := make(chan struct{}), make(chan error, 1)
	go func() {
		defer close(failed)
		for {
			select {
			case <-stop:
				return
			default:
			}
			if err := ann.call(context.Background(), "echo", ""); err != nil {
				failed <- err
				return
			}
		}
	}()
	for i := range 20 {
		next := *c
		more := ""
		if i%2 == 0 {
			more = "scopes: [],"
		}
		next.Routes = w.load(routeTo("mcp", "/mcp", x.URL, more)).Routes
		must(t, g.Reload(&next))
	}
	close(stop)
	if err := <-failed; err != nil {
		t.Fatalf("a request failed: %v", err)
	}
	select {
	case err := <-running:
		t.Fatalf("the running call ended: %v", err)
	default:
	}
	// What was admitted before is still cut.
	w.decide(authority.Revoke, "session", "s-ann")
	if d, ok := mcpguard.DeniedOf(within(t, "the call is cut", running)); !ok || d.Error != "revoked" {
		t.Fatal(d)
	}
	if s := g.Status().Config; s.Reloads != 20 || s.Error != "" {
		t.Errorf("%+v", s)
	}
}

// A configuration that is not good changes nothing.
func TestReloadRefusesAsAWhole(t *testing.T) {
	w := newWorld(t)
	up, _ := plainUpstream(t)
	c := w.load(routeTo("mcp", "/mcp", up.URL, ""))
	g := w.start(c, Proxy)
	for name, change := range map[string]func(*testing.T){
		"mode": func(t *testing.T) {
			next := *c
			next.Mode = "shadow"
			if err := g.Reload(&next); err == nil || !strings.Contains(err.Error(), "mode cannot change") {
				t.Error(err)
			}
		},
		"keys": func(t *testing.T) {
			next := *c
			next.Issuers = append(next.Issuers[:0:0], c.Issuers...)
			next.Issuers[0].JWKSFile = "none"
			if err := g.Reload(&next); err == nil {
				t.Error("taken")
			}
		},
		"listener": func(t *testing.T) {
			taken := httptest.NewServer(http.NotFoundHandler())
			defer taken.Close()
			next := *c
			next.Proxy.Listeners = append(next.Proxy.Listeners[:0:0], c.Proxy.Listeners...)
			l := next.Proxy.Listeners[0]
			l.Listen = taken.Listener.Addr().String()
			next.Proxy.Listeners = append(next.Proxy.Listeners, l)
			if err := g.Reload(&next); err == nil {
				t.Error("taken")
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			change(t)
			if resp := post(t, g.url()+"/mcp", w.token("ann", "s-ann"), toolCall("echo")); resp.StatusCode != http.StatusOK {
				t.Error(resp.Status)
			}
			if g.Status().Config.Error == "" {
				t.Error("the status says nothing of it")
			}
		})
	}
}

// A listener that is taken out ends when its requests have; one that is put in
// serves at once.
func TestReloadMovesListeners(t *testing.T) {
	w := newWorld(t)
	up, _ := plainUpstream(t)
	c := w.load(routeTo("mcp", "/mcp", up.URL, ""))
	g := w.start(c, Proxy)
	old := g.url()
	next := *c
	next.Proxy.Listeners = append(next.Proxy.Listeners[:0:0], c.Proxy.Listeners...)
	next.Proxy.Listeners[0].Listen = "localhost:0"
	must(t, g.Reload(&next))
	if resp := post(t, g.url()+"/mcp", w.token("ann", "s-ann"), toolCall("echo")); g.url() == old || resp.StatusCode != http.StatusOK {
		t.Error(resp.Status)
	}
	eventually(t, "the old one is closed", func() bool {
		tr := &http.Transport{DisableKeepAlives: true}
		resp, err := tr.RoundTrip(httptest.NewRequest(http.MethodGet, old, nil))
		if err == nil {
			resp.Body.Close()
		}
		return err != nil
	})
}

// Requests end in their time; what outlives it is told why.
func TestShutdownDrains(t *testing.T) {
	w := newWorld(t)
	begun, let := make(chan struct{}, 2), make(chan struct{})
	up := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/events" {
			w.Header().Set("Content-Type", "text/event-stream")
			_, _ = io.WriteString(w, ": begun\n\n")
			_ = http.NewResponseController(w).Flush()
			begun <- struct{}{}
			<-r.Context().Done()
			return
		}
		begun <- struct{}{}
		<-let
		_, _ = io.WriteString(w, "done")
	}))
	defer up.Close()
	g, err := Start(Options{Config: w.load(routeTo("http", "/", up.URL, "")), Kind: Proxy})
	must(t, err)
	eventually(t, "ready", func() bool { return g.unready() == "" })
	url, admin, token := g.url(), g.AdminAddr(), w.token("ann", "s-ann")
	ended := map[string]chan string{"/call": make(chan string, 1), "/events": make(chan string, 1)}
	for path, c := range ended {
		go func() {
			resp := post(t, url+path, token, "")
			b, _ := io.ReadAll(resp.Body)
			c <- string(b)
		}()
	}
	within(t, "one runs", begun)
	within(t, "the other runs", begun)
	gone := make(chan struct{})
	began := time.Now()
	go func() {
		g.Shutdown(context.Background())
		close(gone)
	}()
	eventually(t, "not ready any more", func() bool { return get(t, "http://"+admin+"/readyz").StatusCode == http.StatusServiceUnavailable })
	close(let)
	if got := within(t, "the call ends", ended["/call"]); got != "done" {
		t.Errorf("a call that had time ended with %q", got)
	}
	if got := within(t, "the stream ends", ended["/events"]); !strings.Contains(got, `"error":"closed"`) {
		t.Errorf("the stream ended with %q", got)
	}
	within(t, "nothing runs", gone)
	// The trail has the end of what was cut, and has told the bus.
	if s := g.trail.Stats(); s.Denied == 0 || s.Reports == 0 || s.Failures != 0 {
		t.Errorf("the trail ends with %+v", s)
	}
	if took := time.Since(began); took < 500*time.Millisecond {
		t.Errorf("the stream was given %v", took)
	}
}
