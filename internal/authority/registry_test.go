package authority

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/interlock-fabric/interlock/internal/access"
	"github.com/interlock-fabric/interlock/internal/registry"
	"github.com/interlock-fabric/interlock/pkg/authority"
	"github.com/interlock-fabric/interlock/pkg/enforce"
	"github.com/interlock-fabric/interlock/pkg/session"
)

const billing = "spiffe://corp/agent/billing"

func aSession(id, user, agent string) authority.Session {
	return authority.Session{ID: id, User: user, Agent: authority.TrailLink{ID: agent}, Expires: time.Now().Add(time.Hour).Truncate(time.Second)}
}

func (f *fixture) register(list ...authority.Session) {
	f.Helper()
	if _, err := f.c.RegisterSessions(f.ctx, list); err != nil {
		f.Fatal(err)
	}
}

func (f *fixture) agent(a authority.Agent) *authority.AgentRecord {
	f.Helper()
	rec, err := f.c.RegisterAgent(f.ctx, authority.AgentRequest{Agent: a})
	if err != nil {
		f.Fatal(err)
	}
	return rec
}

func (f *fixture) change(op authority.Lifecycle, id string) *authority.LifecycleAnswer {
	f.Helper()
	a, err := f.c.ChangeAgent(f.ctx, authority.LifecycleRequest{ID: id, Operation: op})
	if err != nil {
		f.Fatal(err)
	}
	return a
}

func problemOf(err error) string {
	var p *authority.Problem
	if errors.As(err, &p) {
		return strings.TrimPrefix(p.Type, "urn:interlock:problem:")
	}
	return fmt.Sprint(err)
}

// TestRegistryOverTheAPI: what is registered is found by all that it has, page by
// page, and counted in a preview, tenant by tenant.
func TestRegistryOverTheAPI(t *testing.T) {
	f := start(t, Options{Issuers: []string{issuer}, Tenants: []string{"acme", "umbrella"}})
	f.enroll("eu-1")
	f.agent(authority.Agent{Tenant: "acme", ID: billing, Blueprint: "b1", Owner: "mailto:o@corp.example", Capabilities: []string{"pay"}})
	f.agent(authority.Agent{Tenant: "umbrella", ID: billing, Blueprint: "b1"})
	var list []authority.Session
	for i := range 25 {
		s := aSession(fmt.Sprint("s-", i), fmt.Sprint("u-", i%2), billing)
		s.Tenant = "acme"
		if i > 0 {
			s.Parent.ID = "s-0"
		}
		list = append(list, s)
	}
	f.register(list...)
	again, err := f.c.RegisterSessions(f.ctx, list[:3])
	if err != nil || again.Registered != 0 || again.Known != 3 {
		t.Errorf("%+v, %v", again, err)
	}
	other := aSession("s-0", "u-0", billing)
	other.Tenant = "umbrella"
	f.register(other)

	walk := func(q authority.RegistryQuery) (ids []string) {
		for {
			p, err := f.c.Sessions(f.ctx, q)
			if err != nil {
				t.Fatal(err)
			}
			for _, s := range p.Sessions {
				ids = append(ids, s.ID)
			}
			if q.Page = p.Next; q.Page == "" {
				return ids
			}
		}
	}
	by := func(kind, value string) []authority.Term {
		return []authority.Term{{Kind: kind, Value: value}}
	}
	for what, c := range map[string]struct {
		q    authority.RegistryQuery
		want int
	}{
		"all":         {authority.RegistryQuery{}, 25},
		"a user":      {authority.RegistryQuery{Terms: by("user", "u-1")}, 12},
		"an agent":    {authority.RegistryQuery{Terms: by("agent", "SPIFFE://corp/agent/billing")}, 25},
		"a blueprint": {authority.RegistryQuery{Terms: by("blueprint", "b1")}, 25},
		"an owner":    {authority.RegistryQuery{Terms: by("owner", "mailto:o@corp.example")}, 25},
		"a tree":      {authority.RegistryQuery{Terms: by("session", "s-0")}, 25},
		"a leaf":      {authority.RegistryQuery{Terms: by("session", "s-3")}, 1},
		"both":        {authority.RegistryQuery{Terms: append(by("user", "u-0"), by("capability", "pay")...)}, 13},
		"neither":     {authority.RegistryQuery{Terms: append(by("user", "u-0"), by("capability", "x")...)}, 0},
	} {
		c.q.Tenant, c.q.Issuer, c.q.Limit = "acme", issuer, 7
		ids := walk(c.q)
		if slices.Sort(ids); len(ids) != c.want || len(slices.Compact(ids)) != c.want {
			t.Errorf("%s: %d sessions", what, len(ids))
		}
	}
	p, err := f.c.Sessions(f.ctx, authority.RegistryQuery{Tenant: "acme", Issuer: issuer, Limit: 5, Terms: by("user", "u-0")})
	if err != nil || p.Next == "" {
		t.Fatal(err)
	}
	for what, q := range map[string]authority.RegistryQuery{
		"a page of another query":  {Tenant: "acme", Issuer: issuer, Page: p.Next, Terms: by("user", "u-1")},
		"a page of another tenant": {Tenant: "umbrella", Issuer: issuer, Page: p.Next, Terms: by("user", "u-0")},
		"no page":                  {Tenant: "acme", Page: "abc"},
		"a tool":                   {Tenant: "acme", Terms: by("tool", "rm")},
		"a state":                  {Tenant: "acme", State: "active"},
		"a limit":                  {Tenant: "acme", Limit: authority.MaxPage + 1},
	} {
		if _, err := f.c.Sessions(f.ctx, q); problemOf(err) != "invalid-request" {
			t.Errorf("%s: %v", what, err)
		}
	}
	if _, err := f.c.Sessions(f.ctx, authority.RegistryQuery{}); problemOf(err) != "tenant" {
		t.Errorf("without a tenant: %v", err)
	}

	preview := func(targets ...authority.Target) *authority.Preview {
		d, err := f.c.Decide(f.ctx, authority.Request{Operation: authority.Suspend, Reason: "anomaly", Targets: targets})
		if err != nil || d.Preview == nil {
			t.Fatal(err)
		}
		return d.Preview
	}
	v := preview(authority.One("acme", "user", issuer, "u-1"), authority.One("acme", "blueprint", "", "b1"))
	if want := []authority.TenantPreview{{Tenant: "acme", Agents: 1, Sessions: 25, Enforcers: 1}}; v.Sessions != 25 || v.Agents != 1 || !slices.Equal(v.Tenants, want) {
		t.Errorf("%+v", v)
	}
	d, err := f.c.Decide(f.ctx, authority.Request{Operation: authority.Kill, Reason: "anomaly", Incident: "INC-0", Targets: everything(), Except: []authority.Target{authority.One("acme", "user", issuer, "u-0")}})
	if err != nil || d.Preview.Sessions != 13 || len(d.Preview.Tenants) != 2 || d.Preview.Tenants[0].Sessions != 12 {
		t.Errorf("%+v, %v", d.Preview, err)
	}
	if d, err := f.c.Decide(f.ctx, authority.Request{Operation: authority.Revoke, Reason: "anomaly", Incident: "INC-0", Targets: []authority.Target{authority.One("acme", "role", "", "admin")}}); err != nil || d.Preview.Sessions != 0 || len(d.Warnings) != 1 {
		t.Errorf("%+v, %v", d, err)
	}
	st, err := f.c.Status(f.ctx)
	if err != nil || st.Registry == nil || st.Registry.Sessions != 26 || st.Registry.Agents != 2 || st.Registry.Bytes == 0 {
		t.Errorf("%+v, %v", st.Registry, err)
	}
}

// TestBadRegistrations: each is one problem, and nothing half-done.
func TestBadRegistrations(t *testing.T) {
	f := start(t, Options{Issuers: []string{issuer}})
	f.agent(authority.Agent{ID: billing})
	hc := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", f.a.Socket())
	}}}
	defer hc.CloseIdleConnections()
	end := time.Now().Add(time.Hour).UTC().Format(time.RFC3339)
	good := `{"id":"s-1","expires":"` + end + `"}`
	for what, c := range map[string]struct {
		path, body string
		status     int
	}{
		"unknown member":   {"/v1/sessions", `{"sessions":[{"id":"s-1","token":"x","expires":"` + end + `"}]}`, 400},
		"a member twice":   {"/v1/sessions", `{"sessions":[{"id":"s-1","id":"s-2","expires":"` + end + `"}]}`, 400},
		"one bad of two":   {"/v1/sessions", `{"sessions":[` + good + `,{"id":"","expires":"` + end + `"}]}`, 400},
		"none":             {"/v1/sessions", `{"sessions":[]}`, 400},
		"the same twice":   {"/v1/sessions", `{"sessions":[` + good + `,` + good + `]}`, 400},
		"unknown tenant":   {"/v1/sessions", `{"sessions":[{"tenant":"x","id":"s-1","expires":"` + end + `"}]}`, 400},
		"cut off":          {"/v1/sessions", `{"sessions":[` + good, 400},
		"too long":         {"/v1/sessions", `{"sessions":[` + strings.Repeat(good+",", 30_000) + good + `]}`, 413},
		"agent, no id":     {"/v1/agents", `{"owner":"x"}`, 400},
		"agent, twice":     {"/v1/agents", `{"id":"a","Id":"b"}`, 400},
		"agent, conflict":  {"/v1/agents", `{"id":"` + billing + `","owner":"x"}`, 409},
		"unknown way":      {"/v1/agents/lifecycle", `{"id":"` + billing + `","operation":"resurrect"}`, 400},
		"unknown agent":    {"/v1/agents/lifecycle", `{"id":"nobody","operation":"suspend"}`, 404},
		"a bad reason":     {"/v1/agents/lifecycle", `{"id":"` + billing + `","operation":"suspend","reason":"because"}`, 400},
		"a reason, lifted": {"/v1/agents/lifecycle", `{"id":"` + billing + `","operation":"activate","reason":"because"}`, 400},
	} {
		resp, err := hc.Post("http://a"+c.path, "application/json", strings.NewReader(c.body))
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		if err != nil || resp.StatusCode != c.status || resp.Header.Get("Content-Type") != "application/problem+json" {
			t.Errorf("%s: %d %s, %v", what, resp.StatusCode, b, err)
		}
	}
	if st := f.a.registry.Status(); st.Sessions != 0 || st.Number != 1 {
		t.Errorf("%+v", st)
	}
}

// TestAnAgentsLifeIsDecided: suspending and decommissioning deny at a real
// enforcer, activating lifts; a crash between the decision and the state leaves
// the agent denied, and asking again completes it.
func TestAnAgentsLifeIsDecided(t *testing.T) {
	crash := errors.New("crash")
	var fail atomic.Bool
	f := start(t, Options{Issuers: []string{issuer}, beforeState: func() error {
		if fail.Load() {
			return crash
		}
		return nil
	}})
	e := f.enforcer("eu-1", enforce.Options{})
	f.agent(authority.Agent{ID: billing})
	id := f.prepare(e, session.Identity{User: "alice", Actors: []session.Actor{{ID: billing}}})
	allowed := func() bool { return e.Check(id, session.Call{Tool: "t"}) == nil }
	state := func() string {
		p, err := f.c.Agents(f.ctx, authority.RegistryQuery{ID: billing})
		if err != nil || len(p.Agents) != 1 {
			t.Fatal(p, err)
		}
		return p.Agents[0].State
	}
	f.until(allowed)
	if a := f.change(authority.ActivateAgent, billing); a.Agent.State != authority.AgentActive || a.Decision != nil {
		t.Errorf("%+v", a)
	}
	// The crash is between the two.
	fail.Store(true)
	if _, err := f.c.ChangeAgent(f.ctx, authority.LifecycleRequest{ID: billing, Operation: authority.SuspendAgent}); err == nil {
		t.Fatal("no crash")
	}
	if state() != authority.AgentActive {
		t.Errorf("state %s", state())
	}
	f.until(func() bool { return !allowed() })
	fail.Store(false)
	f.settle(f.change(authority.SuspendAgent, billing).Decision)
	if allowed() || state() != authority.AgentSuspended {
		t.Errorf("suspended: allowed %v, state %s", allowed(), state())
	}
	// When lifting, the state comes first: what fails leaves the agent denied.
	fail.Store(true)
	if _, err := f.c.ChangeAgent(f.ctx, authority.LifecycleRequest{ID: billing, Operation: authority.ActivateAgent}); err == nil {
		t.Fatal("no crash")
	}
	if allowed() || state() != authority.AgentSuspended {
		t.Errorf("allowed %v, state %s", allowed(), state())
	}
	fail.Store(false)
	// As after a crash behind the state: it is active, and still denied.
	if _, err := f.a.setState(f.ctx, "default", registry.Ref{ID: billing}, "active", nil); err != nil {
		t.Fatal(err)
	}
	if a := f.change(authority.ActivateAgent, billing); a.Decision == nil {
		t.Error("what a crash left suspended was not lifted")
	}
	f.until(allowed)
	a := f.change(authority.DecommissionAgent, billing)
	f.settle(a.Decision)
	if allowed() || state() != authority.AgentDecommissioned {
		t.Errorf("allowed %v, state %s", allowed(), state())
	}
	f.change(authority.DecommissionAgent, billing)
	for what, err := range map[string]error{
		"activated": func() error {
			_, err := f.c.ChangeAgent(f.ctx, authority.LifecycleRequest{ID: billing, Operation: authority.ActivateAgent})
			return err
		}(),
		"registered": func() error {
			_, err := f.c.RegisterAgent(f.ctx, authority.AgentRequest{Agent: authority.Agent{ID: billing}})
			return err
		}(),
		"restored": func() error {
			_, err := f.c.Decide(f.ctx, authority.Request{Operation: authority.Restore, Incident: "INC-0", Targets: one("agent", billing), Commit: true})
			return err
		}(),
	} {
		if problemOf(err) != "terminal" {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// TestActivatingLiftsOnlyWhatSuspendingSet: a responder's suspension of an agent
// outlasts its activation, whichever of the two came first, and is named.
func TestActivatingLiftsOnlyWhatSuspendingSet(t *testing.T) {
	var fail atomic.Bool
	f := start(t, Options{Issuers: []string{issuer}, beforeState: func() error {
		if fail.Load() {
			return errors.New("crash")
		}
		return nil
	}})
	f.agent(authority.Agent{ID: billing})
	held := func() bool {
		pl, err := f.a.planner(access.NewPrincipal("test", access.MeansSocket, access.Grant{Role: access.Commander, Tenants: []string{access.Everywhere}})).plan(&authority.Request{Operation: authority.Suspend, Targets: one("agent", billing), Reason: "anomaly", Incident: "INC-9"})
		if err != nil {
			t.Fatal(err)
		}
		return f.a.suspension(pl.entries[0].Key) != nil
	}
	suspend := authority.Request{Operation: authority.Suspend, Targets: one("agent", billing), Incident: "INC-9", Reason: "anomaly"}
	resume := authority.Request{Operation: authority.Resume, Targets: one("agent", billing), Incident: "INC-9"}
	kept := func(what string, by uint64) {
		t.Helper()
		a := f.change(authority.ActivateAgent, billing)
		if a.Decision != nil || len(a.Warnings) != 1 || !strings.Contains(a.Warnings[0], fmt.Sprintf("decision %d", by)) || !held() {
			t.Errorf("%s: %+v", what, a)
		}
		f.decide(resume)
		if held() {
			t.Errorf("%s: not resumed", what)
		}
	}
	kept("a responder's alone", f.decide(suspend).Number)
	f.change(authority.SuspendAgent, billing)
	kept("a responder's after", f.decide(suspend).Number)
	// Both are in force as one, however often the agent is suspended over it.
	d := f.decide(suspend)
	for range 2 {
		if a := f.change(authority.SuspendAgent, billing); a.Decision.Number <= d.Number {
			t.Fatalf("%+v", a)
		}
	}
	kept("a responder's before", d.Number)
	// What had an end and came to it is no reason any more.
	suspend.For = authority.Duration(50 * time.Millisecond)
	f.decide(suspend)
	f.change(authority.SuspendAgent, billing)
	f.until(func() bool { return len(f.change(authority.ActivateAgent, billing).Warnings) == 0 })
	if held() {
		t.Error("the end of the other suspension did not come")
	}
	// One that a crash left, and that was lifted meanwhile, is decided anew.
	fail.Store(true)
	if _, err := f.c.ChangeAgent(f.ctx, authority.LifecycleRequest{ID: billing, Operation: authority.SuspendAgent}); err == nil || !held() {
		t.Fatal("no crash", err)
	}
	fail.Store(false)
	f.decide(resume)
	if f.change(authority.SuspendAgent, billing); !held() {
		t.Error("suspended, and not denied")
	}
	if a := f.change(authority.ActivateAgent, billing); a.Decision == nil || len(a.Warnings) != 0 || held() {
		t.Errorf("its own: %+v", a)
	}
}

// TestARegistryOfOthersIsNotSeen: who has a role in one tenant sees, registers and
// changes nothing in another.
func TestARegistryOfOthersIsNotSeen(t *testing.T) {
	f := start(t, Options{Issuers: []string{issuer}, Tenants: []string{"acme", "umbrella"}})
	f.agent(authority.Agent{Tenant: "umbrella", ID: billing})
	for _, role := range access.Roles() {
		p := access.NewPrincipal(string(role), access.MeansToken, access.Grant{Role: role, Tenants: []string{"acme"}})
		ctx := access.With(f.ctx, p)
		may := func(op access.Operation) bool { return p.Check(op) == nil }
		s := aSession("s", "u", billing)
		for _, c := range []struct {
			op  access.Operation
			ask func(tenant string) error
		}{
			{access.ReadRegistry, func(t string) error { _, err := f.a.Sessions(ctx, authority.RegistryQuery{Tenant: t}); return err }},
			{access.ReadRegistry, func(t string) error {
				_, err := f.a.Agents(ctx, authority.RegistryQuery{Tenant: t, ID: billing})
				return err
			}},
			{access.RegisterSessions, func(t string) error {
				s.Tenant = t
				_, err := f.a.RegisterSessions(ctx, authority.SessionsRequest{Sessions: []authority.Session{s}})
				return err
			}},
			{access.RegisterAgents, func(t string) error {
				_, _, err := f.a.RegisterAgent(ctx, authority.AgentRequest{Agent: authority.Agent{Tenant: t, ID: "spiffe://corp/other"}})
				return err
			}},
			{access.ChangeAgents, func(t string) error {
				_, err := f.a.ChangeAgent(ctx, authority.LifecycleRequest{Tenant: t, ID: billing, Operation: authority.SuspendAgent})
				return err
			}},
		} {
			want := "forbidden"
			if may(c.op) {
				want = "<nil>"
				if c.op == access.ChangeAgents {
					want = "not-found" // it is the other tenant's
				}
			}
			if got := problemOf(c.ask("acme")); got != want {
				t.Errorf("%s, %s: %s, want %s", role, c.op, got, want)
			}
			// The other tenant does not exist for it.
			if got := problemOf(c.ask("umbrella")); got != "tenant" {
				t.Errorf("%s, %s of another tenant: %s", role, c.op, got)
			}
		}
	}
	if st := f.a.registry.Status(); st.Agents != 2 {
		t.Errorf("%d agents", st.Agents)
	}
}
