package authority

import (
	"context"
	"errors"
	"io"
	"net/http"
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
	f := start(t, Options{Tenants: []string{"acme", "globex"}, CanaryEvery: 100 * time.Millisecond, MetricsListen: "127.0.0.1:0", RevokeTarget: time.Nanosecond})
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
	for _, want := range []string{
		"enforcer shadow is not armed: the canary at seq", "1 of 1 armed enforcers deny later than the target of 1e-06 ms: the slowest is strict with ",
	} {
		if w := strings.Join(s.Warnings, "\n"); !strings.Contains(w, want) {
			t.Errorf("%s is not in the warnings: %s", want, w)
		}
	}
	if r := s.TimeToRevoke; r == nil || r.Slowest != "strict" || r.SlowestMillis <= 0 || r.SlowestMillis > 5000 || r.Over != 1 {
		t.Errorf("%+v", r)
	}
	text := f.scrape()
	for _, want := range []string{
		`interlock_authority_writer 1`, `interlock_authority_enforcers{condition="fresh"} 2`, `interlock_authority_enforcers{condition="absent"} 1`,
		`interlock_enforcer_armed{enforcer="strict"} 1`, `interlock_enforcer_armed{enforcer="shadow"} 0`,
		`interlock_enforcer_time_to_revoke_seconds_bucket{enforcer="strict",le="5"} `,
	} {
		if !strings.Contains(text, "\n"+want) {
			t.Errorf("the metrics do not have %s", want)
		}
	}
	if strings.Contains(text, `time_to_revoke_seconds_count{enforcer="shadow"}`) {
		t.Error("a canary that was let through has a time to revoke")
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

func (f *fixture) scrape() string {
	f.Helper()
	r, err := http.NewRequestWithContext(f.ctx, http.MethodGet, "http://"+f.a.MetricsAddr()+"/metrics", nil)
	if err != nil {
		f.Fatal(err)
	}
	answer, err := http.DefaultClient.Do(r)
	if err != nil {
		f.Fatal(err)
	}
	text, err := io.ReadAll(answer.Body)
	if err = errors.Join(err, answer.Body.Close()); err != nil || answer.StatusCode != http.StatusOK {
		f.Fatal(answer.Status, err)
	}
	http.DefaultClient.CloseIdleConnections()
	return string(text)
}
