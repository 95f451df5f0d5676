package faults

import (
	"path/filepath"
	"testing"
	"time"

	"github.com/interlock-fabric/interlock/pkg/session"
)

// TestAwayAcrossATrim has enforcers away while the authority trims the log past
// where they were: one that comes back with its state directory, one that starts
// for the first time, and one that runs on throughout. It fails when a segment
// that the authority publishes is not what an enforcer takes, or when the
// authority's own start from it ends in another state than theirs.
func TestAwayAcrossATrim(t *testing.T) {
	t.Parallel()
	f := newFabric(t)
	f.segments = 50 * time.Millisecond
	f.open()
	c := newCrowd(100, 4000)
	running := f.guard("running", "", c, guardOptions{})
	stateDir := filepath.Join(t.TempDir(), "state")
	kept := f.enrol("kept", "")
	away := open(t, kept, c, guardOptions{stateDir: stateDir})
	var gone []*caller
	revoke := func() {
		t.Helper()
		v := c.victim(t)
		if d, err := v.insist(f.ctx, f.client); err != nil || !d.Durable {
			t.Fatalf("%+v, %v", d, err)
		}
		gone = append(gone, v)
	}
	revoke()
	f.allAgree([]*guard{running, away})
	reached := away.enf.Status().Confirmed
	away.close()
	eventually(t, 2*patience, "the log is trimmed past where it was", func() bool {
		revoke()
		st, err := f.client.Status(f.ctx)
		must(t, err)
		return st.LogFrom > reached+1 && st.Segment > st.LogFrom
	})
	back := open(t, kept, c, guardOptions{stateDir: stateDir})
	cold := f.guard("cold", "", c, guardOptions{})
	all := []*guard{running, back, cold}
	f.allAgree(all)
	f.close()
	f.open()
	for range 3 {
		revoke()
	}
	f.allAgree(all)
	for _, g := range all {
		for _, v := range gone {
			if !g.denies(v, session.ErrRevoked) {
				t.Fatalf("%s allows a caller that was revoked", g.name)
			}
		}
		if s := g.enf.Status(); s.RolledBack > 0 || s.Diverged > 0 || s.Epoch != 1 {
			t.Errorf("%s: %+v", g.name, s)
		}
	}
}
