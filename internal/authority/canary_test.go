package authority

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/interlock-fabric/interlock/pkg/authority"
	"github.com/interlock-fabric/interlock/pkg/enforce"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// TestCanary: the authority's own status says who denies what it revokes, as the
// enforcers found by trying.
func TestCanary(t *testing.T) {
	f := start(t, Options{Tenants: []string{"acme", "globex"}, CanaryEvery: 100 * time.Millisecond})
	f.enforcer("strict", enforce.Options{})
	f.enforcer("shadow", enforce.Options{Mode: session.ModeShadow})
	f.enroll("absent")
	watch, stop := context.WithCancel(f.ctx)
	defer stop()
	reasons := make(chan string, 100)
	go func() {
		defer close(reasons)
		for e, err := range f.c.Watch(watch) {
			if err != nil {
				return
			}
			if e.Type == authority.EventDecision {
				reasons <- e.Decision.Lines[0].Reason
			}
		}
	}()
	var s *authority.Status
	f.until(func() bool { // one is, and one is not
		var err error
		if s, err = f.c.Status(f.ctx); err != nil {
			t.Fatal(err)
		}
		return s.Enforcers.Armed == 1 && s.Enforcers.Unarmed == 1
	})
	list, err := f.c.Enforcers(f.ctx)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range list {
		switch c := e.Canary; e.Name {
		case "strict":
			if c == nil || !c.Armed || c.LatencyMillis <= 0 || c.LatencyMillis > 5000 || c.Number == 0 {
				t.Errorf("%s: %+v", e.Name, c)
			}
		case "shadow":
			if c == nil || c.Armed || !strings.Contains(c.Why, "was allowed") {
				t.Errorf("%s: %+v", e.Name, c)
			}
		default:
			if c != nil {
				t.Errorf("%s: %+v", e.Name, c)
			}
		}
	}
	if w := strings.Join(s.Warnings, "\n"); !strings.Contains(w, "enforcer shadow is not armed: the canary at seq") {
		t.Errorf("warnings: %s", w)
	}
	total := uint64(0)
	for _, n := range f.a.tracker.Canaries()["strict"].Counts {
		total += n
	}
	if total == 0 {
		t.Error("no time to revoke was counted")
	}
	// Some thirty canaries have gone by, and this is the first that is told.
	f.decide(authority.Request{Operation: authority.Revoke, Targets: []authority.Target{authority.One("acme", "session", issuer, "s1")}, Reason: "anomaly"})
	if r := <-reasons; r != "anomaly" {
		t.Errorf("a watcher was told of a decision for %q", r)
	}
	stop()
	for range reasons { // until the watcher has gone
	}
}
