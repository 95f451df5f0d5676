package authority

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/interlock-fabric/interlock/internal/access"
	"github.com/interlock-fabric/interlock/pkg/authority"
)

// TestDecisionsAreListed: each decision of the log is on one page, once, however
// many share a batch and whatever is decided meanwhile; of others' tenants nothing
// is shown.
func TestDecisionsAreListed(t *testing.T) {
	f := start(t, Options{Issuers: []string{issuer}, Tenants: []string{"acme", "beta"}, CanaryEvery: 50 * time.Millisecond})
	suspend := func(tenant, id, incident string) authority.Request {
		return authority.Request{
			Operation: authority.Suspend, Targets: []authority.Target{authority.One(tenant, "session", issuer, id)}, Reason: "anomaly", Incident: incident, Commit: true,
		}
	}
	const n = 60
	took := make([]*authority.Decision, n)
	var g errgroup.Group
	for i := range n {
		g.Go(func() (err error) {
			tenant := []string{"acme", "beta"}[i%2]
			took[i], err = f.c.Decide(f.ctx, suspend(tenant, fmt.Sprint("s-", i), fmt.Sprint("INC-", i)))
			return err
		})
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	if numbers := map[uint64]int{}; true {
		for _, d := range took {
			numbers[d.Number]++
		}
		if len(numbers) == n {
			t.Log("no two decisions shared a batch")
		}
	}
	walk := func(q authority.DecisionsQuery, between func()) (out []authority.LoggedDecision) {
		t.Helper()
		for {
			p, err := f.c.Decisions(f.ctx, q)
			if err != nil {
				t.Fatal(err)
			}
			if len(p.Decisions) > q.Limit {
				t.Errorf("%d on a page of %d", len(p.Decisions), q.Limit)
			}
			out = append(out, p.Decisions...)
			if q.Page = p.Next; q.Page == "" {
				return out
			}
			between()
		}
	}
	nothing := func() {}
	all := walk(authority.DecisionsQuery{Limit: 7}, func() { f.decide(suspend("acme", "later", "INC-LATER")) })
	var incidents []string
	for i, d := range all {
		if i > 0 && (d.Number > all[i-1].Number || d.ID == all[i-1].ID) {
			t.Errorf("%+v behind %+v", d, all[i-1])
		}
		if len(d.Lines) != 1 || d.Lines[0].Reason != "anomaly" || d.Lines[0].Count != 1 || d.Lines[0].On != "session" || d.At.IsZero() || d.Key == "" {
			t.Errorf("%+v", d)
		}
		incidents = append(incidents, d.Lines[0].Incident)
	}
	var want []string
	for i := range n {
		want = append(want, fmt.Sprint("INC-", i))
	}
	slices.Sort(want)
	if slices.Sort(incidents); !slices.Equal(incidents, want) {
		t.Errorf("listed %q", incidents)
	}
	if list := walk(authority.DecisionsQuery{Incident: "INC-8", Limit: 10}, nothing); len(list) != 1 || list[0].Number != took[8].Number {
		t.Errorf("of an incident: %+v", list)
	}
	if list := walk(authority.DecisionsQuery{Tenant: "beta", Limit: 7}, nothing); len(list) != n/2 {
		t.Errorf("of a tenant: %d", len(list))
	}
	f.decide(authority.Request{Operation: authority.Kill, Targets: everything(), Reason: "compromised", Incident: "INC-K", Commit: true})
	if list := walk(authority.DecisionsQuery{Tenant: "beta", Limit: 1000}, nothing); len(list) != n/2+1 || list[0].Lines[0].On != "global" {
		t.Errorf("with a global one: %d", len(list))
	}
	if list := walk(authority.DecisionsQuery{Since: time.Now().Add(time.Hour), Limit: 7}, nothing); len(list) != 0 {
		t.Errorf("of the time to come: %+v", list)
	}
	if list := walk(authority.DecisionsQuery{Since: time.Now().Add(-time.Hour), Limit: 1000}, nothing); len(list) <= n {
		t.Errorf("of the last hour: %d", len(list))
	}
	// A page belongs to its query.
	p, err := f.c.Decisions(f.ctx, authority.DecisionsQuery{Limit: 1})
	if err != nil || p.Next == "" {
		t.Fatalf("%+v, %v", p, err)
	}
	for what, q := range map[string]authority.DecisionsQuery{
		"of another query": {Page: p.Next, Tenant: "acme"}, "made up": {Page: "abc"}, "of too many": {Limit: authority.MaxPage + 1},
	} {
		if _, err := f.c.Decisions(f.ctx, q); problemOf(err) != "invalid-request" {
			t.Errorf("a page %s: %v", what, err)
		}
	}
	// Of another tenant there is nothing to see, and nothing to name.
	ctx := access.With(f.ctx, access.NewPrincipal("bob", access.MeansToken, access.Grant{Role: access.Responder, Tenants: []string{"acme"}}))
	own, err := f.a.Decisions(ctx, authority.DecisionsQuery{Limit: 1000})
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range own.Decisions {
		if d.Lines[0].Tenant != "acme" && d.Lines[0].On != "global" {
			t.Errorf("bob sees %+v", d)
		}
	}
	if len(own.Decisions) <= n/2 {
		t.Errorf("bob sees %d", len(own.Decisions))
	}
	if _, err := f.a.Decisions(ctx, authority.DecisionsQuery{Tenant: "beta"}); problemOf(err) != "tenant" {
		t.Errorf("bob asks for another tenant: %v", err)
	}
}
