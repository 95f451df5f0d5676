package a2aguard_test

import (
	"testing"

	"github.com/a2aproject/a2a-go/v2/a2a"

	a2aguard "github.com/interlock-fabric/interlock/adapters/a2a"
	"github.com/interlock-fabric/interlock/internal/guardtest"
	"github.com/interlock-fabric/interlock/pkg/authority"
)

// TestTrail: what the guard denies, cuts and allows is on record, on every
// transport.
func TestTrail(t *testing.T) {
	forEachTransport(t, func(t *testing.T, tr a2a.TransportProtocol) {
		tape := guardtest.NewTape(t)
		w := newWorld(t, &a2aguard.Options{Trail: tape.Recorder}, a2aguard.HandlerOptions{}, 0)
		c, sid := w.user(t, tr, "ann")
		c.mustComplete(t, "echo", "")
		r := c.stream(t, "wait", "")
		w.On(t, authority.Revoke, "session", sid)
		r.mustEnd(t, a2a.TaskStateCanceled, "revoked")
		if _, err := c.send(t, "echo", ""); err == nil {
			t.Error("the caller is not denied")
		}
		got := map[string]uint64{}
		for _, x := range tape.Records(t) {
			if x.Caller.User != "ann" || x.Caller.Session != sid || x.Method == "" || x.Checked != guardtest.Position {
				t.Errorf("%+v", x)
			}
			got[x.Decision.String()+" "+x.Cause.String()] += x.Count
		}
		if got["allowed "] < 2 || got["cut revoked"] != 1 || got["denied revoked"] != 1 {
			t.Errorf("%v", got)
		}
	})
}
