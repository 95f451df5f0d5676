package registry

import (
	"cmp"
	"encoding/json"
	"fmt"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/interlock-fabric/interlock/pkg/session"
)

// model is the registry without any index: lists that are looked through.
type model struct {
	sessions []modelSession
	agents   []modelAgent
}

type modelSession struct {
	number uint64
	Session
}

type modelAgent struct {
	number uint64
	AgentRecord
}

func (m *model) put(number uint64, s Session) {
	m.sessions = slices.DeleteFunc(m.sessions, func(o modelSession) bool { return o.Tenant == s.Tenant && o.Ref == s.Ref })
	m.sessions = append(m.sessions, modelSession{number, s})
}

func (m *model) agent(tenant string, r Ref) *modelAgent {
	i := slices.IndexFunc(m.agents, func(a modelAgent) bool { return a.Tenant == tenant && a.Ref == r })
	if i < 0 {
		return nil
	}
	return &m.agents[i]
}

func (m *model) matches(s *modelSession, terms []session.Term) bool {
	for _, w := range terms {
		a := m.agent(s.Tenant, s.Agent)
		ok := false
		switch w.Kind {
		case session.KindGlobal, session.KindTenant:
			ok = true
		case session.KindIssuer:
			ok = s.Issuer == w.Value
		case session.KindUser:
			ok = s.User == w.Value && s.Issuer == w.Issuer
		case session.KindClient:
			ok = s.Client == w.Value && s.Issuer == w.Issuer
		case session.KindAgent:
			r := Ref{w.Issuer, w.Value}
			ok = s.Agent == r || slices.Contains(s.Chain, r)
		case session.KindKey:
			ok = slices.Contains(s.Keys, w.Value)
		case session.KindCredential:
			ok = slices.Contains(s.Credentials, w.Value)
		case session.KindDigest:
			ok = slices.Contains(s.Digests, w.Value) || a != nil && slices.Contains(a.Digests, w.Value)
		case session.KindBlueprint:
			ok = a != nil && a.Blueprint == w.Value
		case session.KindOwner:
			ok = a != nil && a.Owner == w.Value
		case session.KindCapability:
			ok = a != nil && slices.Contains(a.Capabilities, w.Value)
		case session.KindSession:
			// Up the tree, by what is registered of it.
			up := s.Ref
			for range len(m.sessions) + 1 {
				if up == (Ref{w.Issuer, w.Value}) {
					ok = true
					break
				}
				i := slices.IndexFunc(m.sessions, func(o modelSession) bool { return o.Tenant == s.Tenant && o.Ref == up })
				if i < 0 {
					break
				}
				up = m.sessions[i].Parent
			}
		}
		if !ok {
			return false
		}
	}
	return true
}

func termOf(kind session.Kind, issuer, value string) session.Term {
	return session.Term{Kind: kind, Issuer: issuer, Value: value}
}

// TestTheIndexIsThatOfAPlainList: whatever is registered, changed and let go of,
// each query answers as looking through a list does; a copy that was made from a
// snapshot in the middle, with the rest of the log after it, answers the same; and
// when everything has left, nothing is kept.
func TestTheIndexIsThatOfAPlainList(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		x, m := newIndex(), &model{}
		base := session.InstantOf(time.UnixMilli(1_800_000_000_000))
		now := base
		pick := func(name string, list ...string) string { return rapid.SampledFrom(list).Draw(t, name) }
		some := func(name string, list ...string) (out []string) {
			for _, v := range list {
				if rapid.Bool().Draw(t, name) {
					out = append(out, v)
				}
			}
			return out
		}
		agents := []string{"spiffe://a/1", "spiffe://a/2", "spiffe://a/3"}
		sids := []string{"s1", "s2", "s3", "s4", "s5", "s6", "s7"}
		number := uint64(1)
		var snapshot []op
		var later [][]op
		copying := false
		do := func(o op) {
			// Through the form of the log, as every authority gets it.
			b, err := json.Marshal(batch{Ops: []op{o}})
			if err != nil {
				t.Fatal(err)
			}
			var in batch
			if err := json.Unmarshal(b, &in); err != nil {
				t.Fatal(err)
			}
			x.apply(in.Ops)
			if copying {
				later = append(later, in.Ops)
			}
			number++
		}
		for range rapid.IntRange(1, 60).Draw(t, "steps") {
			tenant := pick("tenant", "t1", "t2")
			switch rapid.IntRange(0, 9).Draw(t, "what") {
			case 0, 1, 2, 3, 4, 5:
				s := Session{
					Tenant: tenant, Ref: Ref{pick("issuer", "i1", "i2"), pick("sid", sids...)}, User: pick("user", "", "u1", "u2"), Client: pick("client", "", "c1"),
					Keys: some("key", "k1", "k2"), Credentials: some("credential", "v1"), Digests: some("digest", "d1", "d2"),
					Expires: now.Add(time.Duration(rapid.IntRange(1, 200).Draw(t, "life")) * time.Minute),
				}
				if a := pick("agent", append(agents, "")...); a != "" {
					s.Agent = Ref{"", a}
					for _, c := range some("chain", agents...) {
						s.Chain = append(s.Chain, Ref{"", c})
					}
				}
				if p := pick("parent", append(sids, "")...); p != "" {
					if s.Parent = (Ref{"i1", p}); s.Parent == s.Ref {
						s.Parent = Ref{}
					}
				}
				m.put(number, s)
				do(op{Number: number, Session: &s})
			case 6, 7:
				rec := AgentRecord{State: State(pick("state", string(Registered), string(Active), string(Suspended), string(Decommissioned))), Revision: number,
					Agent: Agent{Tenant: tenant, Ref: Ref{"", pick("agent", agents...)}, Blueprint: pick("bp", "", "b1", "b2"), Owner: pick("owner", "", "o1"),
						Capabilities: some("cap", "p1", "p2"), Digests: some("digest", "d1", "d2")}}
				at := number
				if have := m.agent(tenant, rec.Ref); have != nil {
					at, have.AgentRecord = have.number, rec
				} else {
					m.agents = append(m.agents, modelAgent{number, rec})
				}
				do(op{Number: at, Agent: &rec})
			case 8:
				now = now.Add(time.Duration(rapid.IntRange(1, 90).Draw(t, "passes")) * time.Minute)
				for x.sweep(now, 3) {
				}
				m.sessions = slices.DeleteFunc(m.sessions, func(s modelSession) bool { return s.Expires.Add(Grace) <= now })
			case 9:
				if !copying {
					copying = true
					for _, tn := range x.tenants {
						for _, a := range tn.listed {
							rec := a.AgentRecord
							snapshot = append(snapshot, op{Number: a.number, Agent: &rec})
						}
						for _, s := range tn.all.items {
							if !s.gone {
								rec := s.session(tn)
								snapshot = append(snapshot, op{Number: s.number, Session: &rec})
							}
						}
					}
				}
			}
		}

		indexes := map[string]*index{"index": x}
		if copying {
			c := newIndex()
			// A snapshot may have some of what was written meanwhile.
			ahead := rapid.IntRange(0, len(later)).Draw(t, "ahead")
			c.apply(snapshot)
			for _, ops := range later[ahead:] {
				c.apply(ops)
			}
			for _, ops := range later {
				c.apply(ops)
			}
			for c.sweep(now, 1000) {
			}
			indexes["copy"] = c
		}
		for what, x := range indexes {
			compare(t, what, x, m, now)
		}
		if x.sessions != len(m.sessions) || x.agents != len(m.agents) {
			t.Fatalf("%d sessions and %d agents, want %d and %d", x.sessions, x.agents, len(m.sessions), len(m.agents))
		}
		for x.sweep(base.Add(1000*time.Hour), 5) {
		}
		for _, tn := range x.tenants {
			kept := map[*term]bool{}
			for _, a := range tn.listed {
				kept[a.self] = true
				for _, v := range a.terms {
					kept[v] = true
				}
			}
			for k, v := range tn.terms {
				if !kept[v] {
					t.Fatalf("%v is kept for nobody", k)
				}
			}
			if len(tn.sessions) > 0 || len(tn.all.items) > 0 {
				t.Fatal("sessions are kept")
			}
		}
		if len(m.agents) == 0 && x.bytes != 0 {
			t.Fatalf("%d bytes of nothing", x.bytes)
		}
	})
}

func compare(t *rapid.T, what string, x *index, m *model, now session.Instant) {
	single := []session.Term{
		termOf(session.KindTenant, "", ""), termOf(session.KindIssuer, "", "i1"), termOf(session.KindUser, "i1", "u1"), termOf(session.KindUser, "i2", "u2"),
		termOf(session.KindClient, "i1", "c1"), termOf(session.KindAgent, "", "spiffe://a/1"), termOf(session.KindAgent, "", "spiffe://a/2"),
		termOf(session.KindKey, "", "k1"), termOf(session.KindCredential, "", "v1"), termOf(session.KindDigest, "", "d1"),
		termOf(session.KindBlueprint, "", "b1"), termOf(session.KindOwner, "", "o1"), termOf(session.KindCapability, "", "p1"),
		termOf(session.KindSession, "i1", "s1"), termOf(session.KindSession, "i1", "s2"), termOf(session.KindSession, "i2", "s1"),
	}
	var queries [][]session.Term
	for _, a := range single {
		queries = append(queries, []session.Term{a})
	}
	for range 4 {
		queries = append(queries, []session.Term{rapid.SampledFrom(single).Draw(t, "a"), rapid.SampledFrom(single).Draw(t, "b")})
	}
	limit := rapid.IntRange(1, 4).Draw(t, "limit")
	for _, tenant := range []string{"t1", "t2"} {
		for _, terms := range queries {
			for _, expired := range []bool{false, true} {
				var want, got []string
				for _, s := range slices.Backward(m.sessions) {
					if s.Tenant == tenant && (expired || s.Expires > now) && m.matches(&s, terms) {
						want = append(want, fmt.Sprint(s.Session))
					}
				}
				q := SessionQuery{Tenant: tenant, Terms: terms, Expired: expired, Limit: limit}
				for {
					list, next := x.page(&q, now)
					for _, s := range list {
						got = append(got, fmt.Sprint(s))
					}
					if q.Before = next; next == 0 {
						break
					}
				}
				if !slices.Equal(got, want) {
					t.Fatalf("%s of %s: %v\n got %q\nwant %q", what, tenant, terms, got, want)
				}
			}
			targets := []session.Target{{Tenant: tenant, Terms: terms}}
			if rapid.Bool().Draw(t, "two") {
				targets = append(targets, session.Target{Tenant: tenant, Terms: []session.Term{rapid.SampledFrom(single).Draw(t, "second")}})
			}
			except := []session.Target{{Tenant: tenant, Terms: []session.Term{rapid.SampledFrom(single).Draw(t, "except")}}}
			if except[0].Terms[0].Kind == session.KindTenant {
				except = nil
			}
			want := Counts{}
			agents := map[Ref]bool{}
			for i := range m.sessions {
				s := &m.sessions[i]
				hit := func(l []session.Target) bool {
					return slices.ContainsFunc(l, func(g session.Target) bool { return m.matches(s, g.Terms) })
				}
				if s.Tenant == tenant && s.Expires > now && hit(targets) && !hit(except) {
					want.Sessions++
					if s.Agent != (Ref{}) {
						agents[s.Agent] = true
					}
				}
			}
			for i := range m.agents {
				a := &m.agents[i]
				for _, g := range targets {
					if a.Tenant != tenant || a.State == Decommissioned || len(g.Terms) > 1 {
						continue
					}
					w := g.Terms[0]
					if w.Kind == session.KindTenant || w.Kind == session.KindAgent && a.ID == w.Value || w.Kind == session.KindBlueprint && a.Blueprint == w.Value ||
						w.Kind == session.KindOwner && a.Owner == w.Value || w.Kind == session.KindCapability && slices.Contains(a.Capabilities, w.Value) ||
						w.Kind == session.KindDigest && slices.Contains(a.Digests, w.Value) {
						agents[a.Ref] = true
					}
				}
			}
			want.Agents = len(agents)
			if got := x.touched(targets, except, now); got[tenant] != want || len(got) > 1 {
				t.Fatalf("%s of %s: %v but %v: %+v, want %+v", what, tenant, targets, except, got, want)
			}
		}
		var want, got []string
		list := slices.Clone(m.agents)
		slices.SortFunc(list, func(a, b modelAgent) int { return cmp.Compare(b.number, a.number) })
		for _, a := range list {
			if a.Tenant == tenant && a.Blueprint == "b1" {
				want = append(want, fmt.Sprint(a.AgentRecord))
			}
		}
		q := AgentQuery{Tenant: tenant, Terms: []session.Term{termOf(session.KindBlueprint, "", "b1")}, Limit: limit}
		for {
			list, next := x.pageAgents(&q)
			for _, a := range list {
				got = append(got, fmt.Sprint(a))
			}
			if q.Before = next; next == 0 {
				break
			}
		}
		if !slices.Equal(got, want) {
			t.Fatalf("%s: agents %q, want %q", what, got, want)
		}
	}
}
