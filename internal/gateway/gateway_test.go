package gateway

import (
	"context"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	mcpguard "github.com/interlock-fabric/interlock/adapters/mcp"
	"github.com/interlock-fabric/interlock/pkg/authority"
)

// The mechanisms are the binding of each request, the last words of a stream, and,
// for a legacy session, what the upstream is told.
func TestRevokedInMidCall(t *testing.T) {
	for name, era := range eras {
		t.Run(name, func(t *testing.T) {
			w, x := newWorld(t), newTools(t)
			g := w.start(w.load(routeTo("mcp", "/mcp", x.URL, "")), Proxy)
			url := g.url() + "/mcp"
			ann, err := dial(t, url, era, w.token("ann", "s-ann"))
			must(t, err)
			bob, err := dial(t, url, era, w.token("bob", "s-bob"))
			must(t, err)
			defer x.release()
			must(t, ann.call(t.Context(), "echo", ""))
			cut, goesOn := ann.start(t.Context(), "ann"), bob.start(t.Context(), "bob")
			within(t, "a call runs", x.started)
			within(t, "the other runs", x.started)

			w.decide(authority.Revoke, "session", "s-ann")
			err = within(t, "the call is cut", cut)
			d, ok := mcpguard.DeniedOf(err)
			if !ok || d.Error != "revoked" || d.Incident != "INC-142" {
				t.Fatalf("the client learnt %v", err)
			}
			if who := within(t, "the upstream gives the call up", x.ended); who != "ann" {
				t.Fatalf("%s's call was given up", who)
			}
			if err := ann.call(t.Context(), "echo", ""); err == nil {
				t.Fatal("allowed after the cut")
			}
			if _, err := dial(t, url, era, w.token("ann", "s-ann")); err == nil {
				t.Fatal("let in again")
			}
			if era == legacy {
				eventually(t, "the session is closed upstream", func() bool { return x.sessions() == 1 })
			}
			must(t, bob.call(t.Context(), "echo", ""))
			select {
			case err := <-goesOn:
				t.Fatalf("the bystander's call ended: %v", err)
			default:
			}
		})
	}
}

// A legacy session with nothing but its event stream open.
func TestRevokedWithOnlyAStreamOpen(t *testing.T) {
	w, x := newWorld(t), newTools(t)
	g := w.start(w.load(routeTo("mcp", "/mcp", x.URL, "")), Proxy)
	ann, err := dial(t, g.url()+"/mcp", legacy, w.token("ann", "s-ann"))
	must(t, err)
	eventually(t, "the stream is open", func() bool { return g.Status().Enforcer.Running == 2 })
	w.decide(authority.Revoke, "user", "ann")
	note := within(t, "the stream says why", ann.notes)
	if data, ok := note.Params.Data.(map[string]any); !ok || data["error"] != "revoked" || data["incident"] != "INC-142" {
		t.Fatalf("the stream said %v", note.Params.Data)
	}
	eventually(t, "the session is closed upstream", func() bool { return x.sessions() == 0 })
	eventually(t, "nothing is tracked", func() bool { return g.sessions.Len() == 0 && g.Status().Enforcer.Running == 0 })
}

// G2 through the proxy: the mechanism is the enforcer's bound.
func TestBusIsCut(t *testing.T) {
	w, x := newWorld(t), newTools(t)
	g := w.start(w.load("max_stale: 2s\n"+routeTo("mcp", "/mcp", x.URL, "")), Proxy)
	ann, err := dial(t, g.url()+"/mcp", modern, w.token("ann", "s-ann"))
	must(t, err)
	defer x.release()
	cut := ann.start(t.Context(), "ann")
	within(t, "a call runs", x.started)
	w.stop()
	began := time.Now()
	// The SDK's client shows the status of a 503, and not its body.
	if err := within(t, "the call is cut", cut); err == nil || !strings.Contains(err.Error(), http.StatusText(http.StatusServiceUnavailable)) {
		t.Fatalf("the client learnt %v", err)
	}
	if took := time.Since(began); took > 2*time.Second+time.Second {
		t.Errorf("cut %v after the bus", took)
	}
	resp := post(t, g.url()+"/mcp", w.token("bob", "s-bob"), `{"jsonrpc":"2.0","id":1,"method":"tools/list"}`)
	if resp.StatusCode != http.StatusServiceUnavailable || resp.Header.Get("Retry-After") == "" {
		t.Fatal(resp.Status)
	}
	if g.unready() == "" {
		t.Error("still ready")
	}
	if resp := get(t, "http://"+g.AdminAddr()+"/readyz"); resp.StatusCode != http.StatusServiceUnavailable {
		t.Error(resp.Status)
	}
	if resp := get(t, "http://"+g.AdminAddr()+"/livez"); resp.StatusCode != http.StatusOK {
		t.Error(resp.Status)
	}
}

func get(t testing.TB, url string) *http.Response {
	t.Helper()
	req, err := http.NewRequestWithContext(context.Background(), http.MethodGet, url, nil)
	must(t, err)
	tr := &http.Transport{DisableKeepAlives: true}
	resp, err := tr.RoundTrip(req)
	must(t, err)
	t.Cleanup(func() { resp.Body.Close() })
	return resp
}

// Every denial is in the trail, and reaches the bus.
func TestDecisionsAreRecorded(t *testing.T) {
	w := newWorld(t)
	up, _ := plainUpstream(t)
	g := w.start(w.load("trail: {sample: 1, interval: 100ms}\n"+routeTo("mcp", "/mcp", up.URL, "")), Proxy)
	url := g.url() + "/mcp"
	ann := w.token("ann", "s-ann")
	if resp := post(t, url, ann, toolCall("echo")); resp.StatusCode != http.StatusOK {
		t.Fatal(resp.Status)
	}
	w.decide(authority.Revoke, "session", "s-ann")
	eventually(t, "denied", func() bool { return post(t, url, ann, toolCall("echo")).StatusCode == http.StatusUnauthorized })
	// All of it is counted once the caller has its answer.
	eventually(t, "a report is taken", func() bool {
		s := g.trail.Stats()
		return s.Denied > 0 && s.Sampled > 0 && s.Reports > 0
	})
	for _, want := range []string{
		`interlock_gateway_decisions_total{outcome="allowed",route="tools"}`,
		`interlock_gateway_decisions_total{outcome="revoked",route="tools"}`, `interlock_fresh{enforcer="gateway"} 1`,
	} {
		eventually(t, "metric "+want, func() bool {
			b, err := io.ReadAll(get(t, "http://"+g.AdminAddr()+"/metrics").Body)
			return err == nil && strings.Contains(string(b), want)
		})
	}
}

// A token that is bound to a key is not a bearer token.
func TestBoundTokensNeedProof(t *testing.T) {
	w := newWorld(t)
	up, reached := plainUpstream(t)
	g := w.start(w.load(routeTo("mcp", "/mcp", up.URL, "")), Proxy)
	bound := func(c map[string]any) {
		c["cnf"] = map[string]any{"jkt": "0ZcOCORZNYy-DWpqq30jZyJGHTN0d2HglBV3uiguA4I"}
	}
	resp := post(t, g.url()+"/mcp", w.token("ann", "s-ann", bound), toolCall("echo"))
	if resp.StatusCode != http.StatusUnauthorized || !strings.Contains(strings.Join(resp.Header.Values("Www-Authenticate"), " "), "DPoP") || len(reached) != 0 {
		t.Fatal(resp.Status, resp.Header)
	}
	v, err := g.Check(t.Context(), Question{Token: w.token("ann", "s-ann", bound)})
	if err != nil || v.Allowed {
		t.Error(v, err)
	}
}

// A session belongs to who opened it, whatever token they hold, and there is a
// bound to how many are kept.
func TestSessionsBelongToTheirOwners(t *testing.T) {
	w, x := newWorld(t), newTools(t)
	g := w.start(w.load(strings.Replace(routeTo("mcp", "/mcp", x.URL, ""), "flush_timeout", "max_sessions: 1, session_timeout: 1s, flush_timeout", 1)), Proxy)
	url := g.url() + "/mcp"
	open := func(token string) *http.Response {
		return post(t, url, token, `{"jsonrpc":"2.0","id":0,"method":"initialize","params":{"protocolVersion":"2025-11-25","capabilities":{},"clientInfo":{"name":"raw","version":"1"}}}`)
	}
	resp := open(w.token("ann", "s-ann"))
	id := resp.Header.Get("Mcp-Session-Id")
	if resp.StatusCode != http.StatusOK || id == "" {
		t.Fatal(resp.Status)
	}
	use := func(token string) int {
		return post(t, url, token, `{"jsonrpc":"2.0","id":1,"method":"ping"}`, func(r *http.Request) {
			r.Header.Set("Mcp-Session-Id", id)
			r.Header.Set("Mcp-Protocol-Version", legacy)
		}).StatusCode
	}
	if code := use(w.token("bob", "s-bob")); code != http.StatusForbidden {
		t.Errorf("another caller's session: %d", code)
	}
	if code := use(w.token("ann", "s-ann")); code != http.StatusOK {
		t.Errorf("a renewed token: %d", code)
	}
	if resp := open(w.token("bob", "s-bob")); resp.StatusCode != http.StatusServiceUnavailable || resp.Header.Get("Mcp-Session-Id") != "" {
		t.Errorf("a session too many: %s", resp.Status)
	}
	eventually(t, "the one too many is closed upstream", func() bool { return x.sessions() == 1 })
	eventually(t, "one that is not used is let go", func() bool { return g.sessions.Len() == 0 && g.Status().Enforcer.Running == 0 })
	if resp := open(w.token("bob", "s-bob")); resp.StatusCode != http.StatusOK {
		t.Errorf("after that: %s", resp.Status)
	}
}
