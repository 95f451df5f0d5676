package mcpguard_test

import (
	"testing"

	mcpguard "github.com/interlock-fabric/interlock/adapters/mcp"
	"github.com/interlock-fabric/interlock/internal/guardtest"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// TestTrail: what the guard denies, cuts and allows is on record, with the tool
// and the caller, whether it was denied before the request was read or after.
func TestTrail(t *testing.T) {
	forEachEra(t, func(t *testing.T, era string) {
		tape := guardtest.NewTape(t)
		w := newWorld(t, &mcpguard.Options{Resource: resource, Trail: tape.Recorder})
		ann := w.mustDial(t, era, w.token(t, "ann", func(c map[string]any) { c["txn"] = "txn-9" }))
		mustAllow(t, ann, "echo")
		w.await(t, w.started, "echo")
		// By tool: denied by the middleware.
		w.enforcer.deny(session.Denial{Effect: session.EffectRevoked, Seq: 5, Shape: session.Shape(session.KindTool)},
			func(_ *session.Identity, c *session.Call) bool { return c.Tool == "forbidden" })
		if _, err := ann.call("forbidden"); err == nil {
			t.Error("the tool is not denied")
		}
		// By caller: cut while it runs, then denied before it is read.
		done := w.goCall(t, ann, "wait")
		w.enforcer.deny(stolen, user("ann"))
		mustDeny(t, guardtest.Within(t, "the call ends", done), stolenAnswer)
		if _, err := ann.call("echo"); err == nil {
			t.Error("the caller is not denied")
		}
		if _, err := w.dial(t, era, "garbage"); err == nil {
			t.Error("garbage connects")
		}
		got := map[string]session.TrailRecord{}
		for _, r := range tape.Records(t) {
			if r.Method == "tools/call" || r.Caller.User == "" {
				got[r.Decision.String()+" "+r.Cause.String()+" "+r.Tool] = r
			}
		}
		for _, want := range []string{"allowed  echo", "denied revoked forbidden", "allowed  wait", "cut revoked wait", "denied revoked echo"} {
			r, ok := got[want]
			if !ok {
				t.Errorf("no record of %q among %d", want, len(got))
				continue
			}
			if r.Caller.User != "ann" || r.Transaction != "txn-9" || r.Audience != resource || r.Checked != guardtest.Position || r.Arguments == (session.Hash{}) {
				t.Errorf("%s: %+v", want, r)
			}
		}
		if r := got["denied no_identity "]; r.Count == 0 || r.Caller.Tenant != "" {
			t.Errorf("a stranger: %+v", r)
		}
		if r := got["cut revoked wait"]; r.Incident != stolen.Incident || r.Sequence != stolen.Seq || r.Latency == 0 {
			t.Errorf("cut: %+v", r)
		}
	})
}
