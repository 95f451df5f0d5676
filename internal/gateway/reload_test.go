package gateway

import (
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	mcpguard "github.com/interlock-fabric/interlock/adapters/mcp"
	"github.com/interlock-fabric/interlock/pkg/authority"
)

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
