package authority

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/interlock-fabric/interlock/internal/access"
	"github.com/interlock-fabric/interlock/pkg/authority"
	"github.com/interlock-fabric/interlock/pkg/enforce"
	"github.com/interlock-fabric/interlock/pkg/session"
)

func tenantTarget(name string) []authority.Target {
	return []authority.Target{authority.One("", "tenant", "", name)}
}

// commander is a commander of the tenants, who is not on this machine.
func (f *fixture) commander(name string, tenants ...string) context.Context {
	if len(tenants) == 0 {
		tenants = []string{access.Everywhere}
	}
	return access.With(f.ctx, access.NewPrincipal(name, access.MeansToken, access.Grant{Role: access.Commander, Tenants: tenants}))
}

// as prepares a caller at an enforcer.
func (f *fixture) as(e *enforce.Enforcer, tenant, user, agent string) *session.Prepared {
	f.Helper()
	p, err := e.Prepare(session.Identity{
		Tenant: tenant, Issuer: issuer, User: user, Session: session.SessionRef{ID: "s-" + user}, Actors: []session.Actor{{ID: agent}},
	})
	if err != nil {
		f.Fatal(err)
	}
	return p
}

// What is declared is spared by a kill, by a tenant's where it is not declared for
// everything, and counted; the enforcer, which is a real one, goes on serving it and
// nobody else. Work that runs goes on too.
func TestAKillSparesWhatIsDeclared(t *testing.T) {
	dir := t.TempDir()
	f := start(t, Options{DataDir: dir, Tenants: []string{"acme", "beta"}, Issuers: []string{issuer}})
	e := f.enforcer("e", enforce.Options{})
	const valve = "spiffe://corp/valve"
	declare := func(r authority.ExemptionRequest) *authority.Exemption {
		t.Helper()
		r.Owner, r.Reason = "ops", "closes the valve by itself"
		x, err := f.c.DeclareExemption(f.ctx, r)
		if err != nil || x.State != authority.ExemptionInForce {
			t.Fatalf("%+v, %v", x, err)
		}
		return x
	}
	tool := declare(authority.ExemptionRequest{Target: authority.One("acme", "agent", "", valve), Global: true})
	own := declare(authority.ExemptionRequest{Target: authority.One("acme", "user", "", "operator")})
	if _, err := f.c.RegisterSessions(f.ctx, []authority.Session{
		{Tenant: "acme", ID: "s-1", Agent: authority.TrailLink{ID: valve}, User: "u", Expires: time.Now().Add(time.Hour)},
		{Tenant: "acme", ID: "s-2", Agent: authority.TrailLink{ID: valve}, User: "operator", Expires: time.Now().Add(time.Hour)},
		{Tenant: "acme", ID: "s-3", Agent: authority.TrailLink{ID: "spiffe://corp/bot"}, User: "u", Expires: time.Now().Add(time.Hour)},
	}); err != nil {
		t.Fatal(err)
	}
	callers := map[string]*session.Prepared{
		"valve": f.as(e, "acme", "u", valve), "operator": f.as(e, "acme", "operator", "spiffe://corp/bot"), "bot": f.as(e, "acme", "u", "spiffe://corp/bot"),
		"elsewhere": f.as(e, "beta", "operator", valve),
	}
	work, release, err := e.Bind(f.ctx, callers["valve"], session.Call{Tool: "t"})
	if err != nil {
		t.Fatal(err)
	}
	defer release()
	allowed := func(want ...string) {
		t.Helper()
		for name, p := range callers {
			err := e.Check(p, session.Call{Tool: "t"})
			if in := slices.Contains(want, name); in != (err == nil) || !in && !errors.Is(err, session.ErrSuspended) {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
	why := func(r authority.Request) authority.Request {
		if !r.Operation.Lifts() {
			r.Reason = "anomaly"
		}
		r.Incident = "INC-1"
		return r
	}

	d, err := f.c.Decide(f.ctx, why(authority.Request{Operation: authority.Kill, Targets: tenantTarget("acme")}))
	if err != nil {
		t.Fatal(err)
	}
	if p := d.Preview; len(p.Spared) != 2 || p.SparedSessions != 2 || p.Sessions != 1 || p.Spared[0].Exemption == "" || p.Spared[0].Owner != "ops" || len(d.Exempted) != 2 ||
		p.Spared[0].Sessions+p.Spared[1].Sessions != 3 || !strings.Contains(p.Would[0], "2 exempted") {
		t.Errorf("preview %+v", p)
	}
	f.settle(f.decide(why(authority.Request{Operation: authority.Kill, Targets: tenantTarget("acme")})))
	allowed("valve", "operator", "elsewhere")
	f.settle(f.decide(why(authority.Request{Operation: authority.Restore, Targets: tenantTarget("acme")})))
	f.until(func() bool { return e.Check(callers["bot"], session.Call{Tool: "t"}) == nil })

	d = f.decide(why(authority.Request{Operation: authority.Kill, Targets: everything()}))
	f.settle(d)
	allowed("valve")
	if err := work.Err(); err != nil || len(d.Exempted) != 1 || !strings.Contains(d.Exempted[0], tool.ID) {
		t.Errorf("work of one that is exempt: %v; %q", err, d.Exempted)
	}
	st, err := f.c.Status(f.ctx)
	if err != nil || len(st.KillsInForce) != 1 || st.KillsInForce[0].Exempt != 1 || len(st.KillsInForce[0].Spared) != 1 || st.KillsInForce[0].Spared[0].Sessions != 2 {
		t.Errorf("status %+v, %v", st.KillsInForce, err)
	}
	explain := func(agent string) *authority.Explanation {
		t.Helper()
		x, err := f.c.Explain(f.ctx, authority.ExplainRequest{Identity: &authority.Identity{Tenant: "acme", Issuer: issuer, User: "u", Actors: []string{agent}}})
		if err != nil {
			t.Fatal(err)
		}
		return x
	}
	if x := explain(valve); x.Denied || len(x.Nearby) != 1 || !x.Nearby[0].Exempted || x.Nearby[0].Exempt != 1 {
		t.Errorf("%+v", x)
	}
	if x := explain("spiffe://corp/bot"); !x.Denied || x.Matches[0].Exempted || x.Matches[0].Exempt != 1 {
		t.Errorf("%+v", x)
	}

	// What becomes of an exemption does not change a kill that is in force, but for
	// one that is decided anew.
	if err := f.c.RemoveExemption(f.ctx, tool.ID); err != nil {
		t.Fatal(err)
	}
	allowed("valve")
	f.settle(f.decide(why(authority.Request{Operation: authority.Kill, Targets: everything()})))
	allowed()
	<-work.Done()
	again := declare(authority.ExemptionRequest{Target: authority.One("acme", "agent", "", valve), Global: true})
	d = f.decide(why(authority.Request{Operation: authority.Kill, Targets: everything()}))
	if f.settle(d); !strings.Contains(strings.Join(d.Warnings, ";"), "never weakened") {
		t.Errorf("warnings %q", d.Warnings)
	}
	allowed()
	f.settle(f.decide(why(authority.Request{Operation: authority.Restore, Targets: everything()})))

	// A decision can do without, and is loud about it.
	d = f.decide(why(authority.Request{Operation: authority.Kill, Targets: everything(), NoExemptions: true}))
	f.settle(d)
	allowed()
	if !strings.Contains(strings.Join(d.Warnings, ";"), "NO EXEMPTIONS: global spares none of the 1 ") || len(d.Exempted) != 0 {
		t.Errorf("%+v", d)
	}
	if l := f.audited(authority.AuditQuery{Kind: authority.AuditDecision}); !slices.ContainsFunc(l, func(e authority.AuditEntry) bool { return strings.Contains(e.Detail, "NO EXEMPTIONS") }) ||
		!slices.ContainsFunc(l, func(e authority.AuditEntry) bool {
			return strings.Contains(e.Detail, "exempted: agent "+valve+" of tenant acme ("+tool.ID+")")
		}) {
		t.Errorf("%+v", l)
	}
	if l := f.audited(authority.AuditQuery{Kind: authority.AuditExemption}); len(l) != 4 || l[1].Action != "remove" || !strings.Contains(l[3].Detail, "ops: closes the valve") {
		t.Errorf("%+v", l)
	}

	// They outlast the authority.
	if err := f.a.Close(); err != nil {
		t.Fatal(err)
	}
	g := start(t, Options{DataDir: dir, Issuers: []string{issuer}})
	list, err := g.c.Exemptions(g.ctx)
	if err != nil || len(list) != 2 || !slices.ContainsFunc(list, func(x authority.Exemption) bool { return x.ID == again.ID && x.Global }) ||
		!slices.ContainsFunc(list, func(x authority.Exemption) bool { return x.ID == own.ID && !x.Global && x.Owner == "ops" }) {
		t.Errorf("%+v, %v", list, err)
	}
}

// An exemption takes two commanders of its tenant, of all tenants where it is for
// everything, and is one of as many as an entry holds. A proposal has those that
// there were when it was made.
func TestExemptionsTakeTwoAndAreBounded(t *testing.T) {
	f := start(t, Options{Tenants: []string{"acme", "beta"}, Issuers: []string{issuer}, Access: &access.Config{ProposalFor: time.Minute, Local: access.On, TwoPerson: access.On}})
	alice, bob, carol := f.commander("alice"), f.commander("bob"), f.commander("carol", "acme")
	of := func(tenant, user string, global bool) authority.ExemptionRequest {
		return authority.ExemptionRequest{Target: authority.One(tenant, "user", "", user), Global: global, Owner: "ops", Reason: "tooling"}
	}
	refused := func(err error, typ, what string) {
		t.Helper()
		var p *authority.Problem
		if !errors.As(err, &p) || p.Type != typ || !strings.Contains(err.Error(), what) {
			t.Errorf("%s: %v", what, err)
		}
	}
	x, err := f.a.DeclareExemption(carol, of("acme", "u", false))
	if err != nil || x.State != authority.ExemptionDeclared {
		t.Fatalf("%+v, %v", x, err)
	}
	_, err = f.a.ApproveExemption(carol, x.ID)
	refused(err, authority.ProblemForbidden, "their own")
	_, err = f.a.ApproveExemption(f.commander("dora", "beta"), x.ID)
	refused(err, authority.ProblemNotFound, "no exemption")
	_, err = f.a.DeclareExemption(carol, of("acme", "g", true))
	refused(err, authority.ProblemForbidden, "all tenants")
	_, err = f.a.DeclareExemption(carol, of("beta", "u", false))
	refused(err, authority.ProblemTenant, "no tenant")
	_, err = f.a.DeclareExemption(alice, of("acme", "u", false))
	refused(err, authority.ProblemConflict, x.ID)
	for what, r := range map[string]authority.ExemptionRequest{
		"owner":               {Target: of("acme", "z", false).Target, Reason: "r"},
		"reason":              {Target: of("acme", "z", false).Target, Owner: "o"},
		"would have expired":  {Target: of("acme", "z", false).Target, Owner: "o", Reason: "r", Expires: time.Now()},
		"cannot be exempted":  {Target: authority.One("", "tenant", "", "acme"), Owner: "o", Reason: "r"},
		"tool t of tenant ac": {Target: authority.One("acme", "tool", "", "t"), Owner: "o", Reason: "r"},
	} {
		_, err := f.a.DeclareExemption(alice, r)
		refused(err, authority.ProblemInvalid, what)
	}
	spares := func(n int) {
		t.Helper()
		d, err := f.a.Decide(alice, "k", authority.Request{Operation: authority.Kill, Targets: tenantTarget("acme")})
		if err != nil || len(d.Exempted) != n {
			t.Errorf("%d expected: %q, %v", n, d.Exempted, err)
		}
	}
	spares(0) // one commander's word does not count
	// A proposal is made, and then the exemption approved: it is not what was
	// proposed.
	kill := authority.Request{Operation: authority.Kill, Targets: tenantTarget("acme"), Reason: "anomaly", Incident: "INC-1"}
	p, err := f.a.Propose(alice, kill)
	if err != nil {
		t.Fatal(err)
	}
	if y, err := f.a.ApproveExemption(bob, x.ID); err != nil || y.State != authority.ExemptionInForce || y.ApprovedBy != "bob" || y.By != "carol" {
		t.Fatalf("%+v, %v", y, err)
	}
	_, err = f.a.ApproveExemption(alice, x.ID)
	refused(err, authority.ProblemConflict, "in force")
	spares(1)
	if d, err := f.a.Approve(bob, p.ID); err != nil || len(d.Exempted) != 0 {
		t.Errorf("%+v, %v", d, err)
	}

	// Eight of a tenant, and eight for everything, of all tenants together.
	local := access.With(f.ctx, access.NewPrincipal("uid:0@localhost", access.MeansSocket, access.Grant{Role: access.Commander, Tenants: []string{access.Everywhere}}))
	for i := range 7 {
		if x, err := f.a.DeclareExemption(local, of("acme", fmt.Sprint("u", i), true)); err != nil || x.State != authority.ExemptionInForce {
			t.Fatalf("%d: %+v, %v", i, x, err)
		}
	}
	_, err = f.a.DeclareExemption(local, of("acme", "u8", false))
	refused(err, authority.ProblemQuota, "8 exemptions of tenant acme")
	if _, err := f.a.DeclareExemption(local, of("beta", "u0", true)); err != nil {
		t.Fatal(err)
	}
	_, err = f.a.DeclareExemption(local, of("beta", "u1", true))
	refused(err, authority.ProblemQuota, "on everything")
	if _, err := f.a.DeclareExemption(local, of("beta", "u1", false)); err != nil {
		t.Fatal(err)
	}
	spares(8)
	kill.Except = one("user", "another")
	kill.Except[0].Tenant = "acme"
	_, err = f.a.Decide(local, "k9", kill)
	refused(err, authority.ProblemInvalid, "would spare 9 callers, at most 8")
	// One who sees a tenant sees its exemptions, and no others.
	if l, err := f.a.Exemptions(carol); err != nil || len(l) != 8 {
		t.Errorf("%d, %v", len(l), err)
	}
}

// While it is not known who is exempt, a kill is refused unless it says that it
// spares nobody. One that has expired, or waits, spares nobody.
func TestKillsWithoutTheRegistry(t *testing.T) {
	p := newPlanner(t)
	p.exemptions = func() ([]declared, error) { return nil, errors.New("away") }
	p.declaredBy = now
	r := authority.Request{Operation: authority.Kill, Targets: everything()}
	var problem *authority.Problem
	if _, err := p.plan(&r); !errors.As(err, &problem) || problem.Type != authority.ProblemUnavailable || !strings.Contains(problem.Mend, "--no-exemptions") {
		t.Error(err)
	}
	r.NoExemptions = true
	if pl, err := p.plan(&r); err != nil || len(pl.entries[0].Except) != 0 {
		t.Error(err)
	}
	if _, err := p.plan(&authority.Request{Operation: authority.Revoke, Targets: one("user", "u"), NoExemptions: true}); err == nil || !strings.Contains(err.Error(), "leave it out") {
		t.Error(err)
	}
	if _, err := p.plan(&authority.Request{Operation: authority.Revoke, Targets: one("user", "u")}); err != nil {
		t.Errorf("what spares nobody waits for the registry: %v", err)
	}
	for state, want := range map[authority.ExemptionState]int{authority.ExemptionInForce: 1, authority.ExemptionDeclared: 0, authority.ExemptionExpired: 0} {
		for _, at := range []time.Duration{-time.Second, 0} {
			p.exemptions = func() ([]declared, error) {
				return []declared{{Exemption: authority.Exemption{State: state, ApprovedAt: now, ExemptionRequest: authority.ExemptionRequest{Target: authority.One("acme", "user", issuer, "u")}}}}, nil
			}
			p.declaredBy = now.Add(at)
			pl, err := p.plan(&authority.Request{Operation: authority.Suspend, Targets: tenantTarget("acme")})
			if n := want; err != nil || len(pl.entries[0].Except) != n && at == 0 || len(pl.entries[0].Except) != 0 && at < 0 {
				t.Errorf("%s at %s: %v, %v", state, at, pl, err)
			}
		}
	}
}
