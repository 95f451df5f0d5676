package authority

import (
	"context"
	"fmt"
	"slices"
	"strings"
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

// What is proposed at one authority is approved at another, and neither's death
// takes it away: the proposer's after the proposal, the approver's between its
// approval and the decision. The audit has who proposed and who approved, once.
func TestAProposalOutlivesItsAuthorities(t *testing.T) {
	f := start(t, Options{})
	as := func(name string) context.Context {
		return access.With(f.ctx, access.NewPrincipal(name, access.MeansToken, access.Grant{Role: access.Commander, Tenants: []string{access.Everywhere}}))
	}
	other := f.second()
	kill := func(incident string) authority.Request {
		return authority.Request{Operation: authority.Kill, Reason: "anomaly", Incident: incident, Targets: everything()}
	}
	proposed, err := other.a.Propose(as("alice"), kill("INC-0"))
	if err != nil {
		t.Fatal(err)
	}
	approved, err := f.a.Propose(as("alice"), kill("INC-0"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := other.a.Approve(as("alice"), approved.ID); err == nil {
		t.Error("the proposer approved, at another authority")
	}
	rec, err := other.a.find(f.ctx, access.From(as("bob")), access.Approve, approved.ID)
	if err != nil {
		t.Fatal(err)
	}
	rec.State, rec.EndedBy = authority.ProposalApproved, "bob"
	if err := other.a.proposals.Change(f.ctx, rec); err != nil {
		t.Fatal(err)
	}
	// As a kill does: nothing of it is said or stored any more.
	other.a.own.Close()
	other.a.nc.Close()
	for id, state := range map[string]authority.ProposalState{proposed.ID: authority.ProposalOpen, approved.ID: authority.ProposalApproved} {
		rec, err := f.a.proposals.Find(f.ctx, id)
		if err != nil || rec.By != "alice" || rec.State != state {
			t.Fatalf("%+v, %v", rec, err)
		}
		d, err := f.a.Approve(as("carol"), id)
		if err != nil || !d.Durable || d.Duplicate {
			t.Fatalf("%+v, %v", d, err)
		}
	}
	var of []string
	for _, e := range f.audited(authority.AuditQuery{}) {
		if e.Kind == authority.AuditDecision || e.Kind == authority.AuditProposal {
			of = append(of, fmt.Sprintf("%s %s %s by %s: %t", e.Kind, e.Action, e.Outcome, e.Principal.Name, strings.Contains(e.Detail, proposed.ID) || strings.Contains(e.Detail, approved.ID)))
		}
	}
	slices.Sort(of)
	if got := strings.Join(of, "; "); got != "decision kill done by carol: true; decision kill done by carol: true; "+
		"proposal approve refused by alice: true; proposal propose kill done by alice: true; proposal propose kill done by alice: true" {
		t.Errorf("%s", got)
	}
}
