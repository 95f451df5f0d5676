package mcpguard_test

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/modelcontextprotocol/go-sdk/mcp"

	mcpguard "github.com/interlock-fabric/interlock/adapters/mcp"
	"github.com/interlock-fabric/interlock/internal/guardtest"
	"github.com/interlock-fabric/interlock/pkg/session"
)

func (w *world) sessions() int { return len(slices.Collect(w.server.Sessions())) }

// The mechanism is the session's own binding: nothing else is running.
func TestIdleLegacySessionOfARevokedCallerIsClosed(t *testing.T) {
	w := newWorld(t, nil)
	w.mustDial(t, legacy, w.token(t, "ann"))
	bystander := w.mustDial(t, legacy, w.token(t, "bob"))
	if n := w.sessions(); n != 2 {
		t.Fatalf("%d sessions", n)
	}
	w.enforcer.deny(stolen, user("ann"))
	guardtest.Eventually(t, "ann's session is closed", func() bool { return w.sessions() == 1 })
	mustAllow(t, bystander, "echo")
}

// The order is the mechanism: to close first loses the error of the call.
func TestSessionIsClosedOnlyOnceTheErrorIsOut(t *testing.T) {
	w := newWorld(t, nil)
	for range 20 {
		c := w.mustDial(t, legacy, w.token(t, "ann"))
		done := w.goCall(t, c, "wait")
		lift := w.enforcer.deny(stolen, user("ann"))
		mustDeny(t, guardtest.Within(t, "the call ends", done), stolenAnswer)
		w.await(t, w.ended, "wait")
		guardtest.Eventually(t, "the session is closed", func() bool { return w.sessions() == 0 })
		lift()
	}
}

// A tool that does not end keeps neither the session nor the next one open.
func TestSessionWithAToolThatIgnoresItsContextIsClosed(t *testing.T) {
	w := newWorld(t, nil)
	c := w.mustDial(t, legacy, w.token(t, "ann"))
	done := w.goCall(t, c, "stubborn")
	w.enforcer.deny(stolen, user("ann"))
	mustDeny(t, guardtest.Within(t, "the call ends", done), stolenAnswer)
	guardtest.Eventually(t, "the session is closed", func() bool { return w.sessions() == 0 })
}

func TestSuspendedCallerKeepsItsSession(t *testing.T) {
	forEachEra(t, func(t *testing.T, era string) {
		w := newWorld(t, nil)
		c := w.mustDial(t, era, w.token(t, "ann"))
		done := w.goCall(t, c, "wait")
		lift := w.enforcer.deny(session.Denial{Effect: session.EffectSuspended, Reason: session.ReasonAnomaly, Seq: 3}, user("ann"))
		want := mcpguard.Denied{Error: "suspended", Reason: "anomaly", Seq: 3}
		mustDeny(t, guardtest.Within(t, "the call ends", done), want)
		_, err := c.call("echo")
		mustDeny(t, err, want)
		lift()
		mustAllow(t, c, "echo")
		// Bound anew: the next decision closes it.
		if era == legacy {
			w.enforcer.deny(stolen, user("ann"))
			guardtest.Eventually(t, "the session is closed", func() bool { return w.sessions() == 0 })
		}
	})
}

// A binding that has ended is replaced by the next request, even one that comes
// before the guard has looked at why.
func TestSessionIsBoundAnewAtOnce(t *testing.T) {
	w := newWorld(t, nil)
	for range 50 {
		c := w.mustDial(t, legacy, w.token(t, "ann"))
		w.enforcer.deny(session.Denial{Effect: session.EffectSuspended, Seq: 3}, user("ann"))()
		mustAllow(t, c, "echo")
		w.await(t, w.started, "echo")
		w.await(t, w.ended, "echo")
		lift := w.enforcer.deny(stolen, user("ann"))
		guardtest.Eventually(t, "the session is closed", func() bool { return w.sessions() == 0 })
		lift()
	}
}

// The mechanism is that the cause of the context is examined, and not only the
// result: a call that was cut is not answered, even when its tool made it.
func TestResultOfACallThatWasCutIsNotDelivered(t *testing.T) {
	forEachEra(t, func(t *testing.T, era string) {
		w := newWorld(t, nil)
		lifts := make(chan func(), 1)
		mcp.AddTool(w.server, &mcp.Tool{Name: "racer"}, func(context.Context, *mcp.CallToolRequest, struct{}) (*mcp.CallToolResult, any, error) {
			// Cut and finished at once.
			lifts <- w.enforcer.deny(session.Denial{Effect: session.EffectSuspended, Seq: 3}, func(_ *session.Identity, call *session.Call) bool { return call.Tool == "racer" })
			return &mcp.CallToolResult{}, nil, nil
		})
		c := w.mustDial(t, era, w.token(t, "ann"))
		for range 30 {
			_, err := c.call("racer")
			mustDeny(t, err, mcpguard.Denied{Error: "suspended", Reason: "unspecified", Seq: 3})
			(<-lifts)()
		}
	})
}

// The mechanism is that the binding outlives the client's own cancellation.
func TestCancelledCallDoesNotKeepTheSessionOpen(t *testing.T) {
	w := newWorld(t, nil)
	c := w.mustDial(t, legacy, w.token(t, "ann"))
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { _, err := c.CallTool(ctx, &mcp.CallToolParams{Name: "stubborn"}); done <- err }()
	w.await(t, w.started, "stubborn")
	cancel()
	if err := guardtest.Within(t, "the call ends", done); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	if cause := guardtest.Within(t, "the tool's context ends", w.causes); errors.Is(cause, session.ErrDenied) {
		t.Fatal(cause) // it was the client's doing
	}
	w.enforcer.deny(stolen, user("ann"))
	guardtest.Eventually(t, "the session is closed", func() bool { return w.sessions() == 0 })
}

// The mechanism is PropagateRequestCancellation: a stateless call has nobody
// else to be cancelled by.
func TestStatelessCallEndsWithItsRequest(t *testing.T) {
	w := newWorld(t, nil)
	c := w.mustDial(t, modern, w.token(t, "ann"))
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { _, err := c.CallTool(ctx, &mcp.CallToolParams{Name: "wait"}); done <- err }()
	w.await(t, w.started, "wait")
	cancel()
	w.await(t, w.ended, "wait")
	if err := guardtest.Within(t, "the call ends", done); err == nil {
		t.Fatal("answered")
	}
}

// The mechanism is TokenInfo.UserID, which names the caller and not the token.
func TestSessionBelongsToItsCaller(t *testing.T) {
	w := newWorld(t, nil)
	agent := func(c map[string]any) { c["act"] = map[string]any{"sub": "agent-0"} }
	c := w.mustDial(t, legacy, w.token(t, "ann", agent))
	mustAllow(t, c, "echo")
	c.bearer.set(w.token(t, "ann", agent)) // renewed
	mustAllow(t, c, "echo")

	for name, change := range map[string]func(map[string]any){
		"user":    func(c map[string]any) { c["sub"] = "bob" },
		"session": func(c map[string]any) { c["sid"] = "s-2" },
		"client":  func(c map[string]any) { c["client_id"] = "other" },
		"actor":   func(c map[string]any) { c["act"] = map[string]any{"sub": "agent-1"} },
	} {
		t.Run(name, func(t *testing.T) {
			req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, w.http.URL, strings.NewReader(callBody(legacy, "echo")))
			if err != nil {
				t.Fatal(err)
			}
			req.Header.Set("Authorization", "Bearer "+w.token(t, "ann", agent, change))
			req.Header.Set("Content-Type", "application/json")
			req.Header.Set("Accept", "application/json, text/event-stream")
			req.Header.Set("Mcp-Session-Id", c.ID())
			req.Header.Set("Mcp-Protocol-Version", legacy)
			resp, err := http.DefaultTransport.RoundTrip(req)
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			if resp.StatusCode != http.StatusForbidden {
				t.Fatal(resp.Status)
			}
		})
	}
	mustAllow(t, c, "echo")
}

// The session follows the newest token of its caller: revoking the token that
// is in use now closes it.
func TestSessionIsBoundToTheRenewedToken(t *testing.T) {
	w := newWorld(t, nil)
	c := w.mustDial(t, legacy, w.token(t, "ann", func(c map[string]any) { c["jti"] = "first" }))
	mustAllow(t, c, "echo")
	c.bearer.set(w.token(t, "ann", func(c map[string]any) { c["jti"] = "second" }))
	mustAllow(t, c, "echo")
	w.enforcer.deny(stolen, func(id *session.Identity, _ *session.Call) bool { return id.Token == "second" })
	guardtest.Eventually(t, "the session is closed", func() bool { return w.sessions() == 0 })
}

// The mechanism is the handler's binding of the GET request.
func TestLegacyEventStreamIsCutWithAReason(t *testing.T) {
	w := newWorld(t, nil)
	c := w.mustDial(t, legacy, w.token(t, "ann"))
	mustAllow(t, c, "echo")
	// The session and the stream are bound; the stream opens by itself.
	guardtest.Eventually(t, "the stream is open", func() bool { now, _ := w.enforcer.bindings(); return now == 2 })
	w.enforcer.deny(stolen, user("ann"))
	select {
	case got := <-c.logs:
		m, _ := got.(map[string]any)
		if m["error"] != "revoked" || m["reason"] != "stolen-token" || m["incident"] != "INC-142" {
			t.Fatalf("%v", got)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("the client never learned why")
	}
}

func TestReducedCallerUsesLowRiskToolsOnly(t *testing.T) {
	forEachEra(t, func(t *testing.T, era string) {
		w := newWorld(t, &mcpguard.Options{Classify: func(method, name string) session.Call {
			return session.Call{LowRisk: method == "tools/call" && name == "echo", Tool: "ignored"}
		}})
		w.enforcer.deny(session.Denial{Effect: session.EffectReduced, Reason: session.ReasonAnomaly, Seq: 4},
			func(_ *session.Identity, call *session.Call) bool { return !call.LowRisk })
		c := w.mustDial(t, era, w.token(t, "ann"))
		if _, err := c.ListTools(t.Context(), nil); err != nil {
			t.Fatal(err)
		}
		mustAllow(t, c, "echo")
		_, err := c.call("other")
		mustDeny(t, err, mcpguard.Denied{Error: "reduced", Reason: "anomaly", Seq: 4})
	})
}

// stdio connects a client and a guarded server through pipes, as stdio does.
func stdio(t *testing.T, g *mcpguard.Guard, server *mcp.Server, era string) (*mcp.ClientSession, <-chan error, error) {
	t.Helper()
	server.AddReceivingMiddleware(g.Middleware)
	fromClient, toServer := io.Pipe()
	fromServer, toClient := io.Pipe()
	ran := make(chan error, 1)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		ran <- server.Run(ctx, &mcp.IOTransport{Reader: fromClient, Writer: toClient})
		toClient.Close()
	}()
	t.Cleanup(func() { cancel(); toServer.Close(); fromServer.Close(); <-ended })
	cs, err := mcp.NewClient(&mcp.Implementation{Name: "client", Version: "1"}, nil).
		Connect(t.Context(), &mcp.IOTransport{Reader: fromServer, Writer: toServer}, &mcp.ClientSessionOptions{ProtocolVersion: era})
	if err == nil {
		t.Cleanup(func() { _ = cs.Close() })
	}
	return cs, ran, err
}

func TestStdioServerActsForItsConfiguredIdentity(t *testing.T) {
	forEachEra(t, func(t *testing.T, era string) {
		w := newWorld(t, nil) // for its tools
		g, err := mcpguard.New(w.enforcer, nil, &mcpguard.Options{
			Identity:     &session.Identity{Tenant: "acme", Issuer: issuerURL, User: "ann", Session: session.SessionRef{ID: "s-ann"}},
			FlushTimeout: 50 * time.Millisecond,
		})
		if err != nil {
			t.Fatal(err)
		}
		defer func() {
			if err := g.Close(); err != nil {
				t.Error(err)
			}
		}()
		cs, ran, err := stdio(t, g, w.newServer(), era)
		if err != nil {
			t.Fatal(err)
		}
		c := &client{ClientSession: cs}
		mustAllow(t, c, "echo")
		w.await(t, w.started, "echo")
		done := w.goCall(t, c, "wait")
		w.enforcer.deny(stolen, user("ann"))
		mustDeny(t, guardtest.Within(t, "the call ends", done), stolenAnswer)
		// And the server hangs up.
		select {
		case <-ran: //nolint:errcheck // that it ended is what counts
		case <-time.After(20 * time.Second):
			t.Fatal("the session was not closed")
		}
	})
}

// The mechanism is the middleware's check of methods that it does not bind.
func TestListingIsCheckedToo(t *testing.T) {
	forEachEra(t, func(t *testing.T, era string) {
		w := newWorld(t, nil)
		g, err := mcpguard.New(w.enforcer, nil, &mcpguard.Options{Identity: &session.Identity{Tenant: "acme", Issuer: issuerURL, User: "ann"}})
		if err != nil {
			t.Fatal(err)
		}
		defer g.Close()
		cs, _, err := stdio(t, g, w.newServer(), era)
		if err != nil {
			t.Fatal(err)
		}
		w.enforcer.deny(session.Denial{Effect: session.EffectSuspended, Seq: 3}, func(_ *session.Identity, call *session.Call) bool { return call.LowRisk })
		_, err = cs.ListTools(t.Context(), nil)
		mustDeny(t, err, mcpguard.Denied{Error: "suspended", Reason: "unspecified", Seq: 3})
	})
}

func TestWithoutAnIdentityNothingIsAllowed(t *testing.T) {
	w := newWorld(t, nil)
	if _, _, err := stdio(t, w.guard, w.newServer(), legacy); err == nil {
		t.Fatal("a connection without credentials was let in")
	} else {
		mustDeny(t, err, mcpguard.Denied{Error: "no_identity"})
	}
	// A configured identity is for transports without credentials only.
	g, err := mcpguard.New(w.enforcer, nil, &mcpguard.Options{Identity: &session.Identity{Tenant: "acme", Issuer: issuerURL, User: "ann"}})
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	server := w.newServer()
	server.AddReceivingMiddleware(g.Middleware)
	bare := httptest.NewServer(mcp.NewStreamableHTTPHandler(func(*http.Request) *mcp.Server { return server }, nil))
	defer bare.Close()
	ask := func(url string) error {
		hc := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
		cs, err := mcp.NewClient(&mcp.Implementation{Name: "client", Version: "1"}, nil).
			Connect(t.Context(), &mcp.StreamableClientTransport{Endpoint: url, HTTPClient: hc}, nil)
		if err == nil {
			_ = cs.Close()
		}
		return err
	}
	mustDeny(t, ask(bare.URL), mcpguard.Denied{Error: "no_identity"})
	front := httptest.NewServer(g.Handler(http.NotFoundHandler()))
	defer front.Close()
	if err := ask(front.URL); err == nil {
		t.Fatal("a guard without a verifier let an HTTP request in")
	}
}

func TestConstructorRefusesWhatCouldNotGuard(t *testing.T) {
	e := newEnforcer(t)
	id := &session.Identity{Tenant: "acme", Issuer: issuerURL, User: "ann"}
	for name, c := range map[string]struct {
		enforcer mcpguard.Enforcer
		opts     *mcpguard.Options
	}{
		"no enforcer":          {nil, &mcpguard.Options{Identity: id}},
		"nobody could call":    {e, nil},
		"identity of a tenant": {e, &mcpguard.Options{Identity: &session.Identity{Tenant: "other", User: "ann"}}},
		"resource":             {e, &mcpguard.Options{Identity: id, Resource: "https://user@host/"}},
		"scope":                {e, &mcpguard.Options{Identity: id, Scopes: []string{"a b"}}},
		"metadata":             {e, &mcpguard.Options{Identity: id, ResourceMetadata: "\"\r\n"}},
	} {
		t.Run(name, func(t *testing.T) {
			g, err := mcpguard.New(c.enforcer, nil, c.opts)
			if err == nil || g != nil {
				t.Fatal("accepted")
			}
			if !errors.Is(err, session.ErrInvalid) && !errors.Is(err, session.ErrDenied) {
				t.Fatal(err)
			}
		})
	}
}

func TestZeroGuardDenies(t *testing.T) {
	var g mcpguard.Guard
	next := func(context.Context, string, mcp.Request) (mcp.Result, error) {
		t.Error("called")
		return nil, nil
	}
	_, err := g.Middleware(next)(t.Context(), "tools/call", &mcp.CallToolRequest{Params: &mcp.CallToolParamsRaw{Name: "echo"}})
	mustDeny(t, err, mcpguard.Denied{Error: "closed"})
	rec := httptest.NewRecorder()
	g.Handler(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { t.Error("called") })).
		ServeHTTP(rec, httptest.NewRequest(http.MethodPost, "/", nil))
	if rec.Code != http.StatusServiceUnavailable {
		t.Fatal(rec.Code)
	}
	if err := g.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestClosedGuardDeniesAndClosesItsSessions(t *testing.T) {
	forEachEra(t, func(t *testing.T, era string) {
		w := newWorld(t, nil)
		c := w.mustDial(t, era, w.token(t, "ann"))
		mustAllow(t, c, "echo")
		w.await(t, w.started, "echo")
		w.await(t, w.ended, "echo")
		done := w.goCall(t, c, "wait")
		if err := w.guard.Close(); err != nil {
			t.Fatal(err)
		}
		w.await(t, w.ended, "wait")
		if err := guardtest.Within(t, "the call ends", done); err == nil {
			t.Fatal("a running call outlived its guard")
		}
		if _, err := c.call("echo"); err == nil {
			t.Fatal("allowed")
		}
		guardtest.Eventually(t, "every session is closed", func() bool { return w.sessions() == 0 })
		_, err := w.dial(t, era, w.token(t, "ann"))
		if err == nil {
			t.Fatal("allowed")
		}
	})
}

func TestCloseSaysWhichToolsItLeftBehind(t *testing.T) {
	w := newWorld(t, &mcpguard.Options{CloseTimeout: 20 * time.Millisecond})
	c := w.mustDial(t, modern, w.token(t, "ann"))
	done := w.goCall(t, c, "stubborn")
	w.enforcer.deny(stolen, user("ann"))
	mustDeny(t, guardtest.Within(t, "the call ends", done), stolenAnswer)
	if err := w.guard.Close(); err == nil || !strings.Contains(err.Error(), "1 tools or sessions") {
		t.Fatal(err)
	}
	close(w.let)
	w.await(t, w.ended, "stubborn")
	guardtest.Eventually(t, "Close joins", func() bool { return w.guard.Close() == nil })
}

// The mechanism is the read deadline: without it the answer waits for a body
// that never ends.
func TestDeniedCallerThatNeverEndsItsRequestIsAnswered(t *testing.T) {
	w := newWorld(t, nil)
	w.enforcer.deny(stolen, user("ann"))
	for name, token := range map[string]string{"stranger": "garbage", "revoked": w.token(t, "ann")} {
		t.Run(name, func(t *testing.T) {
			body, feed := io.Pipe()
			defer feed.Close()
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			req, err := http.NewRequestWithContext(ctx, http.MethodPost, w.http.URL, body)
			if err != nil {
				t.Fatal(err)
			}
			req.Header.Set("Authorization", "Bearer "+token)
			resp, err := http.DefaultTransport.RoundTrip(req)
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			if resp.StatusCode != http.StatusUnauthorized {
				t.Fatal(resp.Status)
			}
		})
	}
}
