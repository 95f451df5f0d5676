package authority

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/interlock-fabric/interlock/pkg/authority"
	"github.com/interlock-fabric/interlock/pkg/session"
)

var now = time.Date(2026, 11, 22, 9, 0, 0, 0, time.UTC)

func secret(t *testing.T, id session.TenantID, name string) *session.TenantSecret {
	t.Helper()
	s, err := session.NewTenantSecret(id, name, make([]byte, 32))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func newPlanner(t *testing.T, inForce ...session.Entry) *planner {
	t.Helper()
	p := &planner{tenants: tenants{[]*session.TenantSecret{secret(t, 1, "acme")}}, issuers: []string{issuer}, now: now, own: true}
	for i, e := range inForce {
		b := &session.Batch{Epoch: 1, Number: uint64(i + 1), Time: session.InstantOf(now.Add(-time.Hour)), Entries: []session.Entry{e}}
		p.state = p.state.Apply(b, nil)
	}
	return p
}

func (p *planner) key(t *testing.T, kind, value string) session.Key {
	t.Helper()
	n, err := p.name(authority.One("", kind, "", value))
	if err != nil {
		t.Fatal(err)
	}
	return n.key
}

func set(e session.Effect, r session.Reason) func(session.Key) session.Entry {
	return func(k session.Key) session.Entry {
		return session.Entry{Op: session.OpSet, Effect: e, Reason: r, Key: k}
	}
}

// brief is what matters of an entry, in one line.
func brief(e session.Entry) string {
	op := "set"
	if e.Op == session.OpLift {
		op = "lift"
	}
	s := fmt.Sprintf("%s %s %s", op, e.Effect, e.Reason)
	if e.IssuedBefore != 0 {
		s += " before " + e.IssuedBefore.Time().Format(time.TimeOnly)
	}
	if e.Expires != 0 {
		s += " until " + e.Expires.Time().Format(time.TimeOnly)
	}
	if e.Share != 0 {
		s += fmt.Sprint(" share ", e.Share)
	}
	if len(e.Except) != 0 {
		s += fmt.Sprint(" except ", len(e.Except))
	}
	if e.ACR != "" {
		s += " acr " + e.ACR
	}
	if e.Drill {
		s += " drill"
	}
	return s
}

func TestOperationsBecomeEntries(t *testing.T) {
	suspended := set(session.EffectSuspended, session.ReasonAnomaly)
	reduced := set(session.EffectReduced, session.ReasonAnomaly)
	revoked := set(session.EffectRevoked, session.ReasonCompromised)
	killed := set(session.EffectSuspended, session.ReasonKill)
	killedCredentials := set(session.EffectRevoked, session.ReasonKill)
	type inForce = []func(session.Key) session.Entry
	for _, c := range []struct {
		name, kind, value string
		have              inForce
		r                 authority.Request
		want              []string
		wide              bool
		warn              string
	}{
		{"revoke", "session", "s", nil, authority.Request{Operation: "revoke", Reason: "stolen-token"}, []string{"set revoked stolen-token"}, false, ""},
		{"revoke a key", "key", "apikey:" + strings.Repeat("0", 64), nil, authority.Request{Operation: "revoke"}, []string{"set revoked unspecified"}, false, ""},
		{"revoke an expiring token outlives it by the skew", "token", "j", nil, authority.Request{Operation: "revoke", Expires: now.Add(time.Hour)},
			[]string{"set revoked unspecified until 10:05:00"}, false, ""},
		{"revoke a user", "user", "u", nil, authority.Request{Operation: "revoke", IssuedBefore: now.Add(-time.Hour)}, []string{"set revoked unspecified before 08:00:00"}, true, ""},
		{"revoke a user, ending", "user", "u", nil, authority.Request{Operation: "revoke", IssuedBefore: now, For: authority.Duration(time.Hour)},
			[]string{"set revoked unspecified before 09:00:00 until 10:05:00"}, true, ""},
		{"suspend ends on time", "user", "u", nil, authority.Request{Operation: "suspend", For: authority.Duration(30 * time.Minute)},
			[]string{"set suspended unspecified until 09:30:00"}, true, ""},
		{"step up", "user", "u", nil, authority.Request{Operation: "step_up", ACR: "phr"}, []string{"set step_up unspecified acr phr"}, true, ""},
		{"reduce", "agent", "a", nil, authority.Request{Operation: "reduce", Drill: true}, []string{"set reduced drill drill"}, true, ""},
		{"except", "user", "u", nil, authority.Request{Operation: "revoke", Except: []authority.Target{
			authority.One("", "session", "", "b"), authority.One("", "session", "", "a"), authority.One("", "session", "", "a")}},
			[]string{"set revoked unspecified except 2"}, true, ""},

		{"resume lifts what is in force", "user", "u", inForce{suspended, reduced}, authority.Request{Operation: "resume"},
			[]string{"lift suspended restored", "lift reduced restored"}, true, ""},
		{"resume one effect", "user", "u", inForce{suspended, reduced}, authority.Request{Operation: "resume", Effect: "reduced"}, []string{"lift reduced restored"}, true, ""},
		{"resume in stages", "user", "u", inForce{suspended}, authority.Request{Operation: "resume", Share: 12.5}, []string{"lift suspended restored share 1250"}, true, ""},
		{"resume all of it", "user", "u", inForce{suspended}, authority.Request{Operation: "resume", Share: 100}, []string{"lift suspended restored"}, true, ""},
		{"resume what is not in force here", "user", "u", nil, authority.Request{Operation: "resume"},
			[]string{"lift suspended restored", "lift step_up restored", "lift reduced restored"}, true, "is not suspended or step_up or reduced here"},
		{"resume leaves a revocation", "session", "s", inForce{suspended, revoked}, authority.Request{Operation: "resume"}, []string{"lift suspended restored"}, false, "is also revoked, and stays so"},
		{"resume does not see a drill", "user", "u", inForce{func(k session.Key) session.Entry { e := suspended(k); e.Drill = true; return e }},
			authority.Request{Operation: "resume", Effect: "suspended"}, []string{"lift suspended restored"}, true, "is not suspended here"},

		{"restore leaves what was issued before", "user", "u", inForce{revoked}, authority.Request{Operation: "restore"}, []string{"lift revoked restored before 09:00:00"}, true, ""},
		{"restore what is only suspended", "user", "u", inForce{suspended}, authority.Request{Operation: "restore"}, []string{"lift revoked restored before 09:00:00"}, true, "resume lifts that"},
		{"restore a drill on a session", "session", "s", nil, authority.Request{Operation: "restore", Drill: true}, []string{"lift revoked restored before 09:00:00 drill"}, false, "is not revoked here"},

		{"kill", "global", "", nil, authority.Request{Operation: "kill"}, []string{"set suspended kill"}, true, ""},
		{"a kill's reason is the audit's", "global", "", nil, authority.Request{Operation: "kill", Reason: "compromised"}, []string{"set suspended kill"}, true, ""},
		{"kill with credentials", "tenant", "acme", nil, authority.Request{Operation: "kill", Credentials: true}, []string{"set revoked kill"}, true, ""},
		{"restore a kill", "global", "", inForce{killed}, authority.Request{Operation: "restore"}, []string{"lift suspended restored"}, true, ""},
		{"restore a kill in stages", "tenant", "acme", inForce{killed}, authority.Request{Operation: "restore", Share: 25}, []string{"lift suspended restored share 2500"}, true, ""},
		{"restore a kill with credentials", "global", "", inForce{killedCredentials}, authority.Request{Operation: "restore"}, []string{"lift revoked restored before 08:00:00"}, true, ""},
		{"restore both kills", "global", "", inForce{killed, killedCredentials}, authority.Request{Operation: "restore"},
			[]string{"lift suspended restored", "lift revoked restored before 08:00:00"}, true, ""},
		{"restore no kill", "global", "", nil, authority.Request{Operation: "restore"},
			[]string{"lift suspended restored", "lift revoked restored before 09:00:00"}, true, "is not killed here"},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := newPlanner(t)
			var have []session.Entry
			for _, f := range c.have {
				have = append(have, f(p.key(t, c.kind, c.value)))
			}
			p = newPlanner(t, have...)
			c.r.Targets = []authority.Target{authority.One("", c.kind, "", c.value)}
			pl, err := p.plan(&c.r)
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, e := range pl.entries {
				got = append(got, brief(e))
				if e.Key != p.key(t, c.kind, c.value) {
					t.Error("the entry is about something else")
				}
			}
			if fmt.Sprint(got) != fmt.Sprint(c.want) || pl.wide != c.wide {
				t.Errorf("got %q, wide %v", got, pl.wide)
			}
			if w := strings.Join(pl.warnings, "\n"); (c.warn == "") != (w == "") || !strings.Contains(w, c.warn) {
				t.Errorf("warnings %q", w)
			}
		})
	}
}

func TestRequestsThatAreRefused(t *testing.T) {
	user, sess := authority.One("", "user", "", "u"), authority.One("", "session", "", "s")
	global := authority.Target{Terms: []authority.Term{{Kind: "global"}}}
	for _, c := range []struct {
		name string
		r    authority.Request
		typ  string
		want string
	}{
		{"no operation", authority.Request{Targets: []authority.Target{user}}, "", "use one of revoke"},
		{"no target", authority.Request{Operation: "revoke"}, "", "name 1 to 1000"},
		{"too many targets", authority.Request{Operation: "revoke", Targets: make([]authority.Target, 1001)}, "", "1001 targets"},
		{"too many entries", authority.Request{Operation: "resume", Targets: many(500)}, "", "1500 entries"},
		{"unknown kind", authority.Request{Operation: "revoke", Targets: []authority.Target{authority.One("", "usr", "", "u")}}, "", "use one of global"},
		{"empty value", authority.Request{Operation: "revoke", Targets: []authority.Target{authority.One("", "user", "", "")}}, "", "user is empty"},
		{"unknown tenant", authority.Request{Operation: "revoke", Targets: []authority.Target{authority.One("x", "user", "", "u")}}, authority.ProblemTenant, "name one of acme"},
		{"a tenant on global", authority.Request{Operation: "kill", Targets: []authority.Target{{Tenant: "acme", Terms: global.Terms}}}, "", "names no tenant"},
		{"restore a session", authority.Request{Operation: "restore", Targets: []authority.Target{sess}}, authority.ProblemTerminal, "never comes back"},
		{"restore in stages", authority.Request{Operation: "restore", Share: 50, Targets: []authority.Target{user}}, "", "leave share out"},
		{"revoke for a time", authority.Request{Operation: "revoke", For: 1e9, Targets: []authority.Target{user}}, "", "stands until it is restored"},
		{"both ends", authority.Request{Operation: "suspend", For: 1e9, Expires: now.Add(time.Hour), Targets: []authority.Target{user}}, "", "give one of them"},
		{"an end that has passed", authority.Request{Operation: "suspend", Expires: now, Targets: []authority.Target{user}}, "", "has passed"},
		{"a far end", authority.Request{Operation: "suspend", Expires: now.AddDate(9000, 0, 0), Targets: []authority.Target{user}}, "", "give a time to come"},
		{"issued before the future", authority.Request{Operation: "revoke", IssuedBefore: now.Add(time.Hour), Targets: []authority.Target{user}}, "", "give a time that has passed"},
		{"issued before on a suspension", authority.Request{Operation: "suspend", IssuedBefore: now, Targets: []authority.Target{user}}, "", "only revoke takes one"},
		{"an end on a lift", authority.Request{Operation: "resume", For: 1e9, Targets: []authority.Target{user}}, "", "leave the end out"},
		{"an end on a kill", authority.Request{Operation: "kill", For: 1e9, Targets: []authority.Target{global}}, "", "stands until it is restored"},
		{"acr on a revocation", authority.Request{Operation: "revoke", ACR: "x", Targets: []authority.Target{user}}, "", "only step_up takes one"},
		{"share on a set", authority.Request{Operation: "suspend", Share: 5, Targets: []authority.Target{user}}, "", "done in stages"},
		{"share out of range", authority.Request{Operation: "resume", Share: 100.5, Targets: []authority.Target{user}}, "", "0.01 to 100"},
		{"share of nearly nothing", authority.Request{Operation: "resume", Share: 0.001, Targets: []authority.Target{user}}, "", "0.01 to 100"},
		{"credentials on a suspension", authority.Request{Operation: "suspend", Credentials: true, Targets: []authority.Target{user}}, "", "only kill takes it"},
		{"effect on a restore", authority.Request{Operation: "restore", Effect: "reduced", Targets: []authority.Target{user}}, "", "only resume takes one"},
		{"resume a revocation", authority.Request{Operation: "resume", Effect: "revoked", Targets: []authority.Target{user}}, "", "restore lifts a revocation"},
		{"kill a user", authority.Request{Operation: "kill", Targets: []authority.Target{user}}, "", "kill global, or kill tenant NAME"},
		{"a kill for being one", authority.Request{Operation: "kill", Reason: "kill", Targets: []authority.Target{global}}, "", "use one of stolen-token"},
		{"a reason that is none", authority.Request{Operation: "revoke", Reason: "unspecified", Targets: []authority.Target{user}}, "", "use one of stolen-token"},
		{"unknown reason", authority.Request{Operation: "revoke", Reason: "because", Targets: []authority.Target{user}}, "", "use one of stolen-token"},
		{"a long incident", authority.Request{Operation: "revoke", Incident: strings.Repeat("x", 65), Targets: []authority.Target{user}}, "", "incident is 65 bytes"},
		{"too many exempted", authority.Request{Operation: "kill", Except: many(9), Targets: []authority.Target{global}}, "", "exempt at most 8"},
		{"a tenant exempted", authority.Request{Operation: "kill", Except: []authority.Target{authority.One("", "tenant", "", "acme")}, Targets: []authority.Target{global}}, "", "cannot be exempted"},
		{"exempted from a lift", authority.Request{Operation: "resume", Except: []authority.Target{sess}, Targets: []authority.Target{user}}, "", "a lift has none"},
	} {
		t.Run(c.name, func(t *testing.T) {
			pl, err := newPlanner(t).plan(&c.r)
			var p *authority.Problem
			if c.typ == "" {
				c.typ = authority.ProblemInvalid
			}
			if !errors.As(err, &p) || p.Type != c.typ || p.Mend == "" || !strings.Contains(p.Error(), c.want) {
				t.Errorf("got %v, %v", pl, err)
			}
			if err != nil && (strings.Contains(err.Error(), "invalid") || strings.Contains(err.Error(), "malformed")) {
				t.Errorf("a person is told of the error tree: %v", err)
			}
		})
	}
}

// What a person decides says why.
func TestADecisionSaysWhy(t *testing.T) {
	session, user := one("session", "s"), one("user", "u")
	for _, c := range []struct {
		name    string
		r       authority.Request
		missing string // when it is to be taken
	}{
		{"a single credential", authority.Request{Operation: "revoke", Targets: session}, "reason"},
		{"a single one, with a reason", authority.Request{Operation: "revoke", Targets: session, Reason: "logout"}, ""},
		{"many single ones", authority.Request{Operation: "revoke", Targets: many(3), Reason: "logout"}, ""},
		{"a single one, lifted", authority.Request{Operation: "resume", Targets: session}, ""},
		{"a single one, a drill", authority.Request{Operation: "revoke", Targets: session, Drill: true}, ""},
		{"a user", authority.Request{Operation: "suspend", Targets: user}, "reason incident"},
		{"a user, for an incident", authority.Request{Operation: "suspend", Targets: user, Incident: "i"}, "reason"},
		{"a user, with a reason", authority.Request{Operation: "suspend", Targets: user, Reason: "anomaly"}, "incident"},
		{"a user, with both", authority.Request{Operation: "suspend", Targets: user, Reason: "anomaly", Incident: "i"}, ""},
		{"a user, lifted", authority.Request{Operation: "restore", Targets: user}, "incident"},
		{"a user, in one decision with sessions", authority.Request{Operation: "revoke", Targets: append(many(3), user...), Reason: "anomaly"}, "incident"},
		{"a kill", authority.Request{Operation: "kill", Targets: everything()}, "reason incident"},
		{"a kill with both", authority.Request{Operation: "kill", Targets: everything(), Reason: "compromised", Incident: "i"}, ""},
		{"a kill, a drill", authority.Request{Operation: "kill", Targets: everything(), Drill: true}, ""},
		{"a kill, restored", authority.Request{Operation: "restore", Targets: everything()}, "incident"},
		{"a whole tenant", authority.Request{Operation: "suspend", Targets: []authority.Target{authority.One("", "tenant", "", "acme")}, Reason: "anomaly"}, "incident"},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := newPlanner(t)
			p.own = false
			single := strings.Contains(c.name, "single")
			for _, commit := range []bool{false, true} {
				c.r.Commit = commit
				pl, err := p.plan(&c.r)
				var problem *authority.Problem
				switch {
				case c.missing != "" && (commit || single):
					if !errors.As(err, &problem) || problem.Type != authority.ProblemUnaccounted || strings.Join(problem.Fields, " ") != c.missing || !strings.Contains(err.Error(), "--"+problem.Fields[0]) {
						t.Errorf("commit %v: %v", commit, err)
					}
				case err != nil:
					t.Errorf("commit %v: %v", commit, err)
				case (c.missing != "") != strings.Contains(strings.Join(pl.warnings, ";"), "with --commit it takes --"):
					t.Errorf("the preview does not say what it will take: %q", pl.warnings)
				}
			}
		})
	}
}

func many(n int) (out []authority.Target) {
	for i := range n {
		out = append(out, authority.One("", "session", "", fmt.Sprint(i)))
	}
	return out
}

func TestTenantAndIssuerDefaults(t *testing.T) {
	p := newPlanner(t)
	p.tenants.list = append(p.tenants.list, secret(t, 2, "globex"))
	revoke := func(target authority.Target) error {
		_, err := p.plan(&authority.Request{Operation: "revoke", Targets: []authority.Target{target}})
		return err
	}
	var problem *authority.Problem
	if err := revoke(authority.One("", "user", "", "u")); !errors.As(err, &problem) || problem.Type != authority.ProblemTenant {
		t.Errorf("no tenant, of two: %v", err)
	}
	if err := revoke(authority.One("globex", "user", "", "u")); err != nil {
		t.Error(err)
	}
	if err := revoke(authority.One("", "tenant", "", "globex")); err != nil {
		t.Errorf("a tenant names itself: %v", err)
	}
	for _, issuers := range [][]string{nil, {"https://a", "https://b"}} {
		p.issuers = issuers
		for _, kind := range []string{"user", "client", "session", "token", "agent"} {
			if err := revoke(authority.One("acme", kind, "", "x")); !errors.As(err, &problem) || problem.Type != authority.ProblemIssuer {
				t.Errorf("%s without an issuer, of %v: %v", kind, issuers, err)
			}
		}
		if err := revoke(authority.One("acme", "agent", "", "spiffe://corp/a")); err != nil {
			t.Errorf("a URI needs no issuer: %v", err)
		}
	}
	// A default never overrides what is named, and does not leak into what needs none.
	p.issuers = []string{"https://a"}
	a, err := p.name(authority.One("acme", "user", "https://b", "u"))
	if err != nil {
		t.Fatal(err)
	}
	b, err := p.name(authority.One("acme", "user", "", "u"))
	if err != nil || a.key == b.key {
		t.Errorf("%v, %v, %v", a, b, err)
	}
}

func TestManyTargetsAreWideAndTakenOnce(t *testing.T) {
	targets := many(3)
	pl, err := newPlanner(t).plan(&authority.Request{Operation: "revoke", Targets: append(targets, targets...)})
	if err != nil || len(pl.entries) != 3 || !pl.wide {
		t.Errorf("%+v, %v", pl, err)
	}
}

func TestDecisionID(t *testing.T) {
	id := func(key string, r authority.Request) session.DecisionID {
		got, _, err := decisionID(key, &r)
		if err != nil {
			t.Fatal(err)
		}
		return got
	}
	r := authority.Request{Operation: "revoke", Targets: many(1)}
	first := id("k", r)
	committed := r
	committed.Commit = true
	if id("k", committed) != first {
		t.Error("committing a preview is another decision")
	}
	other := r
	other.Targets = many(2)
	if id("k", other) == first || id("k2", r) == first {
		t.Error("another request, or key, has the same id")
	}
}

func TestExplainClaims(t *testing.T) {
	p := newPlanner(t)
	p.state = p.state.Apply(&session.Batch{Epoch: 1, Number: 5, Time: session.InstantOf(now), Entries: []session.Entry{
		{Op: session.OpSet, Effect: session.EffectRevoked, Reason: session.ReasonCompromised, Key: p.key(t, "agent", "spiffe://corp/deep")},
		{Op: session.OpSet, Effect: session.EffectSuspended, Reason: session.ReasonAnomaly, Key: p.key(t, "role", "admin")},
	}}, nil)
	jkt := base64.RawURLEncoding.EncodeToString(make([]byte, 32))
	for name, c := range map[string]struct {
		claims  string
		verdict string
		checked int
	}{
		"nothing of it":   {`{"iss":"https://issuer.example","sub":"u","extra":{"x":[1]}}`, "allowed", 5},
		"deep in act":     {`{"iss":"https://issuer.example","sub":"u","act":{"sub":"x","act":{"sub":"spiffe://corp/deep"}}}`, "revoked: compromised (seq 5)", 0},
		"a role":          {`{"iss":"https://issuer.example","sub":"u","roles":"reader admin"}`, "suspended: anomaly (seq 5)", 0},
		"every claim":     {`{"iss":"https://issuer.example","sub":"u","jti":"j","sid":"s","azp":"c","session_ancestors":["p",{"sid":"q","start":1}],"cnf":{"jkt":"` + jkt + `"},"scope":"a b","roles":["r"],"blueprint":"bp","owner":"o","credential_ids":["vc"],"digests":["code:sha256:` + strings.Repeat("0", 64) + `"],"auth_time":1.5,"iat":1,"exp":2,"acr":"x"}`, "allowed", 18},
		"the strongest":   {`{"iss":"https://issuer.example","sub":"u","roles":["admin"],"act":{"sub":"spiffe://corp/deep"}}`, "revoked: compromised (seq 5)", 0},
		"no jti, by hash": {`{"iss":"https://issuer.example"}`, "allowed", 4},
	} {
		t.Run(name, func(t *testing.T) {
			x, err := p.explain(&authority.ExplainRequest{Claims: json.RawMessage(c.claims), SigningInputHash: session.TokenValue("", []byte("x"))})
			if err != nil {
				t.Fatal(err)
			}
			if x.Verdict != c.verdict || x.Denied != (c.verdict != "allowed") || c.checked != 0 && x.Checked != c.checked {
				t.Errorf("%+v", x)
			}
		})
	}
	for _, bad := range []string{`[]`, `{"sub":1}`, `{"exp":"x"}`, `{"exp":-1}`} {
		var problem *authority.Problem
		if _, err := p.explain(&authority.ExplainRequest{Claims: json.RawMessage(bad)}); !errors.As(err, &problem) || problem.Type != authority.ProblemInvalid {
			t.Errorf("%s: %v", bad, err)
		}
	}
	for _, r := range []authority.ExplainRequest{
		{}, {Identity: &authority.Identity{User: "u"}, Claims: json.RawMessage(`{}`)}, {Identity: &authority.Identity{User: "u"}, Tenant: "acme"},
	} {
		if _, err := p.explain(&r); err == nil {
			t.Errorf("%+v was accepted", r)
		}
	}
}

// One enforcer's word does not stop the log.
func TestOneEnforcerCannotStopTheLog(t *testing.T) {
	var c claims
	log, newest := fakeLog{5: {5}}, uint64(5)
	say := func(name string, number uint64, head session.Hash) int {
		return len(c.weigh(&session.Receipt{Enforcer: name, Epoch: 1, Number: number, Confirmed: number, Head: head}, log, newest))
	}
	if n := say("a", 9, session.Hash{9}); n != 0 {
		t.Errorf("one: %d claims handed on", n)
	}
	if n := say("a", 9, session.Hash{9}); n != 0 {
		t.Errorf("the same one again: %d", n)
	}
	if n := say("b", 5, session.Hash{5}); n != 0 {
		t.Errorf("one that agrees with the log: %d", n)
	}
	if n := say("b", 8, session.Hash{8}); n != 2 {
		t.Errorf("two: %d", n)
	}
	if n := say("a", 5, session.Hash{5}); n != 0 {
		t.Errorf("one has come round: %d", n)
	}
	// b said 8 and then nothing more; the log comes to it. Without judging earlier
	// claims anew b is a witness for whatever anybody says.
	log[8], newest = session.Hash{8}, 8
	if n := say("a", 9, session.Hash{9}); n != 0 {
		t.Errorf("with one that was only ahead: %d", n)
	}
	if n := say("c", 3, session.Hash{3}); n != 0 {
		t.Errorf("with one whose batch is not known any more: %d", n)
	}
}

type fakeLog map[uint64]session.Hash

func (l fakeLog) HashAt(_, number uint64) (session.Hash, bool) { h, ok := l[number]; return h, ok }
func (l fakeLog) TimeAt(uint64, uint64) (time.Time, bool)      { return time.Time{}, false }
