package authority

import (
	"context"
	"testing"

	"github.com/interlock-fabric/interlock/internal/access"
	"github.com/interlock-fabric/interlock/pkg/authority"
)

// An authority may die between any two steps of an approval. Whoever approves
// again goes on from there, and the decision is taken once.
func TestAnApprovalThatWasCutOffGoesOn(t *testing.T) {
	f := start(t, Options{})
	as := func(name string) context.Context {
		return access.With(f.ctx, access.NewPrincipal(name, access.MeansToken, access.Grant{Role: access.Commander, Tenants: []string{access.Everywhere}}))
	}
	p, err := f.a.Propose(as("alice"), authority.Request{Operation: authority.Kill, Reason: "anomaly", Incident: "INC-0", Targets: everything()})
	if err != nil {
		t.Fatal(err)
	}
	var first *authority.Decision
	for _, again := range []bool{false, true} {
		rec, err := f.a.proposals.Find(f.ctx, p.ID)
		if err != nil {
			t.Fatal(err)
		}
		rec.State, rec.EndedBy = authority.ProposalApproved, "bob"
		if err := f.a.proposals.Change(f.ctx, rec); err != nil {
			t.Fatal(err)
		}
		if _, err := f.a.Approve(as("alice"), p.ID); err == nil {
			t.Error("the proposer goes on with it")
		}
		d, err := f.a.Approve(as("carol"), p.ID)
		if err != nil || !d.Committed || d.Duplicate != again || again && d.Number != first.Number {
			t.Fatalf("again %v: %+v, %v", again, d, err)
		}
		first = d
	}
	if _, err := f.a.Approve(as("carol"), p.ID); err == nil {
		t.Error("what was carried out is approved again")
	}
}
