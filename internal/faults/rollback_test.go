package faults

import (
	"context"
	"errors"
	"path/filepath"
	"strings"
	"testing"

	"github.com/interlock-fabric/interlock/pkg/authority"
	"github.com/interlock-fabric/interlock/pkg/session"
)

func onUser(op authority.Operation, user string) authority.Request {
	return authority.Request{
		Operation: op, Targets: []authority.Target{authority.One("", "user", issuer, user)}, Reason: "anomaly", Incident: "INC-2", Commit: true,
	}
}

// TestRolledBackStore restores an old backup of the authority while two
// enforcers run and a third is down. It fails when an enforcer takes a log that
// ends before what it had in force, when one that keeps a StateDir forgets that
// over a restart, when the authority goes on writing in a log of which enforcers
// have seen more, or when a new epoch lets go what was in force before it.
func TestRolledBackStore(t *testing.T) {
	t.Parallel()
	f := newFabric(t)
	f.open()
	c := newCrowd(8, 1000)
	lost := c.callers[len(c.callers)-1] // suspended by its user, not its session
	guards := f.guards("running", 2, c, guardOptions{maxStale: bound, exempt: []*caller{lost}})
	stateDir := filepath.Join(t.TempDir(), "state")
	kept := f.enrol("restarted", "")
	down := open(t, kept, c, guardOptions{maxStale: bound, stateDir: stateDir, exempt: []*caller{lost}})
	all := []*guard{guards[0], guards[1], down}
	revoke := func(n int) (out []*caller) {
		t.Helper()
		for range n {
			v := c.victim(t)
			if _, err := v.insist(f.ctx, f.client); err != nil {
				t.Fatal(err)
			}
			out = append(out, v)
		}
		return out
	}
	// What is in the backup, and what comes after it.
	inBackup := revoke(5)
	f.allAgree(all)
	f.close()
	backup := filepath.Join(t.TempDir(), "backup")
	copyTree(t, f.dir, backup)
	f.open()
	afterIt := revoke(5)
	if _, err := f.client.Decide(f.ctx, onUser(authority.Suspend, "u-"+lost.sid)); err != nil {
		t.Fatal(err)
	}
	suspended := func(g *guard) bool {
		err := g.enf.Check(g.prepared[len(c.callers)-1], session.Call{Tool: "echo"})
		return errors.Is(err, session.ErrSuspended)
	}
	for _, g := range all {
		eventually(t, patience, "the suspension", func() bool { return suspended(g) })
	}
	f.allAgree(all)
	down.close()
	f.close()
	restore(t, backup, f.dir)
	f.open()

	// The running ones notice, deny at the bound, and tell the authority, which
	// refuses to decide and says what mends it.
	for _, g := range guards {
		eventually(t, patience, g, func() bool {
			s := g.enf.Status()
			return !s.Fresh && s.RolledBack > 0 && strings.Contains(s.Why, "new epoch")
		})
	}
	// What it took before it was told is acknowledged, and stays so.
	var refused *caller
	eventually(t, patience, "decisions are refused", func() bool {
		refused = c.victim(t)
		_, err := refused.revoke(f.ctx, f.client)
		var p *authority.Problem
		return errors.As(err, &p) && p.Type == authority.ProblemUnavailable && strings.Contains(p.Mend, "epoch open")
	})
	st, err := f.client.Status(f.ctx)
	must(t, err)
	if !strings.Contains(strings.Join(st.Warnings, "\n"), "epoch open") {
		t.Errorf("the status does not say so: %q", st.Warnings)
	}
	// The one that was down is not taken in, either.
	// Its StateDir holds the head that was in force there, and not the entries:
	// what was lost with the log is lost to it.
	up := start(t, kept, c, guardOptions{maxStale: bound, stateDir: stateDir, exempt: append(afterIt, lost)})
	eventually(t, patience, up, func() bool { return up.enf.Status().RolledBack > 0 })
	ctx, cancel := context.WithTimeout(f.ctx, bound)
	defer cancel()
	if err := up.enf.WaitReady(ctx); err == nil {
		t.Fatal("the restarted enforcer is ready on a log that ends before what it had in force")
	}

	// The mend, as the command does it.
	f.newEpoch()
	for _, g := range append(guards, up) {
		eventually(t, patience, g, func() bool { s := g.enf.Status(); return s.Fresh && s.Epoch == 2 })
	}
	for i, g := range append(guards, up) {
		for _, v := range inBackup {
			eventually(t, patience, "what the backup had is restated", func() bool { return g.denies(v, session.ErrRevoked) })
		}
		if i < len(guards) && !suspended(g) {
			t.Errorf("%s let go what was lost with the log", g.name)
		}
	}
	if d, err := refused.insist(f.ctx, f.client); err != nil {
		t.Errorf("%+v, %v", d, err)
	}
	// Lifted by name it is gone.
	d, err := f.client.Decide(f.ctx, onUser(authority.Resume, "u-"+lost.sid))
	must(t, err)
	if len(d.Warnings) == 0 {
		t.Error("no warning that the authority does not know of what is lifted")
	}
	for _, g := range append(guards, up) {
		eventually(t, patience, g, func() bool { return !suspended(g) })
	}
	f.allAgree(append(guards, up))
}

// denies reports whether a caller is denied so.
func (g *guard) denies(v *caller, want error) bool {
	for i, have := range g.crowd.callers {
		if have == v {
			return errors.Is(g.judge(i), want)
		}
	}
	return false
}
