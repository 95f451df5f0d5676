package mcpguard_test

import (
	"context"
	"errors"
	"net/http"
	"testing"

	"github.com/modelcontextprotocol/go-sdk/mcp"

	mcpguard "github.com/interlock-fabric/interlock/adapters/mcp"
	"github.com/interlock-fabric/interlock/internal/guardtest"
	"github.com/interlock-fabric/interlock/pkg/guard"
	"github.com/interlock-fabric/interlock/pkg/session"
)

func forEachEra(t *testing.T, test func(t *testing.T, era string)) {
	for name, era := range eras {
		t.Run(name, func(t *testing.T) { test(t, era) })
	}
}

func TestAllowedCallerCallsTools(t *testing.T) {
	forEachEra(t, func(t *testing.T, era string) {
		w := newWorld(t, nil)
		c := w.mustDial(t, era, w.token(t, "ann"))
		mustAllow(t, c, "echo")
		if _, ever := w.enforcer.bindings(); ever == 0 {
			t.Fatal("the call was not bound")
		}
	})
}

func TestToolSeesWhoCalls(t *testing.T) {
	forEachEra(t, func(t *testing.T, era string) {
		w := newWorld(t, nil)
		for _, user := range []string{"ann", "bob"} {
			res, err := w.mustDial(t, era, w.token(t, user)).call("whoami")
			if err != nil || res.IsError {
				t.Fatalf("%+v, %v", res, err)
			}
			if text, ok := res.Content[0].(*mcp.TextContent); !ok || text.Text != user {
				t.Errorf("%s is %+v to the tool", user, res.Content[0])
			}
		}
	})
}

// The context of a tool carries the caller, for the calls that it makes itself
// (guard.Transport).
func TestToolMakesItsCallsForItsCaller(t *testing.T) {
	forEachEra(t, func(t *testing.T, era string) {
		w := newWorld(t, nil)
		callers := make(chan string, 1)
		mcp.AddTool(w.server, &mcp.Tool{Name: "delegate"}, func(ctx context.Context, _ *mcp.CallToolRequest, _ struct{}) (*mcp.CallToolResult, any, error) {
			if p := guard.FromContext(ctx); p != nil {
				callers <- p.Identity().User
			}
			return &mcp.CallToolResult{}, nil, nil
		})
		mustAllow(t, w.mustDial(t, era, w.token(t, "ann")), "delegate")
		select {
		case user := <-callers:
			if user != "ann" {
				t.Fatalf("the tool works for %q", user)
			}
		default:
			t.Fatal("the tool works for nobody")
		}
	})
}

// The mechanism is Handler's check of every HTTP request.
func TestRevokedCallerCannotConnect(t *testing.T) {
	forEachEra(t, func(t *testing.T, era string) {
		w := newWorld(t, nil)
		w.enforcer.deny(stolen, user("ann"))
		_, err := w.dial(t, era, w.token(t, "ann"))
		mustDeny(t, err, stolenAnswer)
		mustAllow(t, w.mustDial(t, era, w.token(t, "bob")), "echo")
	})
}

func TestCallerRevokedBetweenCallsIsDenied(t *testing.T) {
	forEachEra(t, func(t *testing.T, era string) {
		w := newWorld(t, nil)
		c, bystander := w.mustDial(t, era, w.token(t, "ann")), w.mustDial(t, era, w.token(t, "bob"))
		mustAllow(t, c, "echo")
		w.enforcer.deny(stolen, user("ann"))
		_, err := c.call("echo")
		mustDeny(t, err, stolenAnswer)
		mustAllow(t, bystander, "echo")
	})
}

// A token is verified and its identity prepared once; what may have changed
// since is asked at every request.
func TestSeenTokenIsCheckedButNotVerifiedAgain(t *testing.T) {
	forEachEra(t, func(t *testing.T, era string) {
		w := newWorld(t, nil)
		c := w.mustDial(t, era, w.token(t, "ann"))
		guardtest.Eventually(t, "the token is kept", func() bool {
			mustAllow(t, c, "echo")
			return w.verifier.CacheStats().Hits > 0
		})
		before, prepared := w.verifier.CacheStats(), w.enforcer.prepared()
		for range 3 {
			mustAllow(t, c, "echo")
		}
		after := w.verifier.CacheStats()
		if after.Misses != before.Misses || after.Hits < before.Hits+3 || w.enforcer.prepared() != prepared {
			t.Fatalf("%+v, then %+v; prepared %d times, then %d", before, after, prepared, w.enforcer.prepared())
		}
		w.enforcer.deny(stolen, user("ann"))
		_, err := c.call("echo")
		mustDeny(t, err, stolenAnswer)
	})
}

// The mechanism is the middleware's binding: without it the call never ends.
func TestRunningCallIsCut(t *testing.T) {
	forEachEra(t, func(t *testing.T, era string) {
		w := newWorld(t, nil)
		c, bystander := w.mustDial(t, era, w.token(t, "ann")), w.mustDial(t, era, w.token(t, "bob"))
		done := w.goCall(t, c, "wait")
		other := w.goCall(t, bystander, "stubborn")
		w.enforcer.deny(stolen, user("ann"))
		mustDeny(t, guardtest.Within(t, "the call ends", done), stolenAnswer)
		w.await(t, w.ended, "wait")
		if cause := guardtest.Within(t, "the tool's context ends", w.causes); !errors.Is(cause, session.ErrRevoked) {
			t.Fatalf("the tool was told %v", cause)
		}
		close(w.let)
		if err := guardtest.Within(t, "the call ends", other); err != nil {
			t.Fatalf("bystander: %v", err)
		}
	})
}

// The mechanism is that the tool runs in a goroutine of its own.
func TestToolThatIgnoresItsContextDoesNotHoldTheCutBack(t *testing.T) {
	forEachEra(t, func(t *testing.T, era string) {
		w := newWorld(t, nil)
		c := w.mustDial(t, era, w.token(t, "ann"))
		done := w.goCall(t, c, "stubborn")
		w.enforcer.deny(stolen, user("ann"))
		mustDeny(t, guardtest.Within(t, "the call ends", done), stolenAnswer)
		select {
		case <-w.ended:
			t.Fatal("the tool has ended: it was to ignore the cut")
		default:
		}
		close(w.let)
		w.await(t, w.ended, "stubborn")
	})
}

// The mechanism is the call that the middleware describes.
func TestRevokedToolIsDeniedAloneAndCut(t *testing.T) {
	forEachEra(t, func(t *testing.T, era string) {
		w := newWorld(t, nil)
		c := w.mustDial(t, era, w.token(t, "ann"))
		done := w.goCall(t, c, "wait")
		d := session.Denial{Effect: session.EffectRevoked, Reason: session.ReasonUnsafeBehaviour, Shape: session.Shape(session.KindTool), Seq: 7}
		w.enforcer.deny(d, func(_ *session.Identity, call *session.Call) bool {
			return call.Tool == "wait" && call.Audience == resource
		})
		want := mcpguard.Denied{Error: "revoked", Reason: "unsafe-behaviour", Seq: 7}
		mustDeny(t, guardtest.Within(t, "the call ends", done), want)
		_, err := c.call("wait")
		mustDeny(t, err, want)
		mustAllow(t, c, "echo")
	})
}

// A token that is bound to a key is good with a proof for each request (RFC
// 9449), and the SDK, which knows the scheme Bearer alone, does not notice.
func TestTokenBoundToAKeyNeedsAProof(t *testing.T) {
	forEachEra(t, func(t *testing.T, era string) {
		w := newWorld(t, nil)
		ann := guardtest.NewHolder(t)
		token := w.token(t, "ann", ann.Bind)
		prove := func(r *http.Request, token string) {
			r.Header.Set("Authorization", "DPoP "+token)
			r.Header.Set("DPoP", ann.Proof(r.Method, r.URL.String(), token, nil))
		}
		if _, err := w.dial(t, era, token); err == nil {
			t.Fatal("good without a proof")
		}
		c, err := w.dialBy(t, era, &bearer{token: token, base: &http.Transport{}, prove: prove})
		if err != nil {
			t.Fatal(err)
		}
		mustAllow(t, c, "echo")
		mustAllow(t, c, "echo")
		w.enforcer.deny(stolen, user("ann"))
		_, err = c.call("echo")
		mustDeny(t, err, stolenAnswer)
	})
}
