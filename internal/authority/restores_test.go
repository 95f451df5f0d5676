package authority

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/interlock-fabric/interlock/internal/access"
	"github.com/interlock-fabric/interlock/internal/sequencer"
	"github.com/interlock-fabric/interlock/pkg/authority"
	"github.com/interlock-fabric/interlock/pkg/enforce"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// patient is how long a store may take on a busy machine.
const patient = 10 * time.Second

// crowd are callers of many sessions, of each tenant as many.
func (f *fixture) crowd(e *enforce.Enforcer, tenants ...string) map[string][]*session.Prepared {
	f.Helper()
	out := map[string][]*session.Prepared{}
	for _, t := range tenants {
		for i := range 200 {
			out[t] = append(out[t], f.as(e, t, fmt.Sprint("u", i), "spiffe://corp/bot"))
		}
	}
	return out
}

// free says which of them are allowed.
func free(e *enforce.Enforcer, list []*session.Prepared) (out []int) {
	for i, p := range list {
		if e.Check(p, session.Call{Tool: "t"}) == nil {
			out = append(out, i)
		}
	}
	return out
}

func (f *fixture) restore(id string) restore {
	f.Helper()
	all, err := f.a.restores()
	i := slices.IndexFunc(all, func(x restore) bool { return x.ID == id })
	if err != nil || i < 0 {
		f.Fatalf("restore %s: %v", id, err)
	}
	return all[i]
}

// due lets a restore's next stage be due now, and returns it when that is taken, or
// it has ended.
func (f *fixture) due(id string) restore {
	f.Helper()
	before := f.restore(id)
	x := before
	x.Next = time.Now()
	if err := f.a.putRestore(f.ctx, &x, time.Now()); err != nil {
		f.Fatal(err)
	}
	f.until(func() bool {
		x = f.restore(id)
		return x.Taken > before.Taken || x.State != authority.RestoreRunning
	})
	return x
}

func stagedRequest(targets []authority.Target, stages ...string) authority.Request {
	return authority.Request{Operation: authority.Restore, Targets: targets, Stages: stages, Hold: authority.Duration(time.Hour), Incident: "INC-1", Commit: true}
}

func (f *fixture) kill(targets []authority.Target) {
	f.Helper()
	f.settle(f.decide(authority.Request{Operation: authority.Kill, Targets: targets, Reason: "anomaly", Incident: "INC-1"}))
}

// A kill is lifted share by share, by the authority, which may be started anew in
// between: at each stage an enforcer lets through as many sessions as it says, those
// of the stage before among them, and nothing beyond.
func TestAKillIsRestoredByShares(t *testing.T) {
	dir := t.TempDir()
	f := start(t, Options{DataDir: dir, AckWait: patient})
	addr := f.a.NATSAddr()
	e := f.enforcer("e", enforce.Options{})
	crowd := f.crowd(e, "default")["default"]
	f.kill(everything())
	if n := len(free(e, crowd)); n != 0 {
		t.Fatalf("%d free", n)
	}
	preview := stagedRequest(everything(), "10%", "60%", "100%")
	preview.Commit = false
	if d, err := f.c.Decide(f.ctx, preview); err != nil || d.Committed || !strings.Contains(d.Preview.Would[0], "in 3 stages: 10%, 60%, 100%, each held for 1h0m0s") {
		t.Fatalf("%+v, %v", d, err)
	}
	d, err := f.c.DecideOnce(f.ctx, "k", stagedRequest(everything(), "10%", "60%", "100%"))
	if err != nil || d.Restore == nil || d.Restore.Taken != 1 || !d.Durable || d.Restore.Next.Before(time.Now()) {
		t.Fatalf("%+v, %v", d, err)
	}
	id := d.Restore.ID
	if again, err := f.c.DecideOnce(f.ctx, "k", stagedRequest(everything(), "10%", "60%", "100%")); err != nil || !again.Duplicate || again.Number != d.Number || again.Restore.ID != id {
		t.Errorf("asked for again: %+v, %v", again, err)
	}
	var problem *authority.Problem
	if _, err := f.c.Decide(f.ctx, stagedRequest(everything(), "100%")); !errors.As(err, &problem) || problem.Type != authority.ProblemConflict || !strings.Contains(err.Error(), id) {
		t.Errorf("a second one: %v", err)
	}
	f.settle(d)
	f.until(func() bool { return len(free(e, crowd)) > 0 })
	first := free(e, crowd)
	if n := len(first); n < 2 || n > 60 {
		t.Errorf("%d of 200 at 10%%", n)
	}
	st, err := f.c.Status(f.ctx)
	if err != nil || len(st.Restores) != 1 || st.Restores[0].Figures == nil || st.Restores[0].Figures.Enforcers != 1 || len(st.Kills) != 1 || st.KillsInForce[0].Share != 10 {
		t.Errorf("%+v, %v", st, err)
	}
	// Denials show in the figures.
	f.until(func() bool {
		free(e, crowd)
		l, err := f.c.Restores(f.ctx)
		return err == nil && len(l) == 1 && l[0].Figures.Denied > 0 && l[0].Figures.InEffect == 1
	})

	// It outlasts the authority, and nothing is lifted by its absence.
	if err := f.a.Close(); err != nil {
		t.Fatal(err)
	}
	if now := free(e, crowd); !slices.Equal(now, first) {
		t.Errorf("while the authority is away: %d, and then %d", len(first), len(now))
	}
	f = start(t, Options{DataDir: dir, NATSListen: addr, AckWait: patient})
	if x := f.due(id); x.Taken != 2 || x.State != authority.RestoreRunning {
		t.Fatalf("%+v", x)
	}
	f.until(func() bool { return len(free(e, crowd)) > len(first) })
	second := free(e, crowd)
	if n := len(second); n < 85 || n > 155 || slices.ContainsFunc(first, func(i int) bool { return !slices.Contains(second, i) }) {
		t.Errorf("%d of 200 at 60%%; those of before %v", n, first)
	}
	if x := f.due(id); x.Taken != 3 || x.State != authority.RestoreDone || !x.Next.IsZero() {
		t.Fatalf("%+v", x)
	}
	f.until(func() bool { return len(free(e, crowd)) == len(crowd) })
	if st, err := f.c.Status(f.ctx); err != nil || len(st.Restores) != 0 || len(st.Kills) != 0 {
		t.Errorf("%+v, %v", st, err)
	}
	f.until(func() bool { // the authority does not wait for its own records to be stored
		return slices.ContainsFunc(f.audited(authority.AuditQuery{Kind: authority.AuditDecision}), func(r authority.AuditEntry) bool {
			return r.Action == "restore" && r.Principal.Means == "authority" && r.Incident == "INC-1" && strings.Contains(r.Detail, "restore "+id) && strings.Contains(r.Detail, "3 of 3 stages")
		})
	})
	if _, err := f.c.AbortRestore(f.ctx, id); !errors.As(err, &problem) || problem.Type != authority.ProblemConflict {
		t.Errorf("aborting what is done: %v", err)
	}
	if again, err := f.c.DecideOnce(f.ctx, "k", stagedRequest(everything(), "10%", "60%", "100%")); err != nil || !again.Duplicate || again.Restore.State != authority.RestoreDone {
		t.Errorf("asked for again when it is done: %+v, %v", again, err)
	}
	if _, err := f.c.DecideOnce(f.ctx, "k2", stagedRequest(everything(), "10%", "100%")); !errors.As(err, &problem) || !strings.Contains(err.Error(), "global is not killed") {
		t.Errorf("what is not killed: %v", err)
	}
}

// A global kill is lifted tenant by tenant, and by share of the others. One that is
// killed by itself stays so; who is exempt goes on; abort kills everything again.
func TestAGlobalKillIsRestoredByTenant(t *testing.T) {
	f := start(t, Options{AckWait: patient, Tenants: []string{"acme", "beta", "gamma", "delta"}, Issuers: []string{issuer}})
	e := f.enforcer("e", enforce.Options{})
	crowd := f.crowd(e, "acme", "beta", "gamma", "delta")
	valve := f.as(e, "beta", "u0", "spiffe://corp/valve")
	if _, err := f.c.DeclareExemption(f.ctx, authority.ExemptionRequest{
		Target: authority.One("beta", "agent", "", "spiffe://corp/valve"), Global: true, Owner: "ops", Reason: "halts by itself",
	}); err != nil {
		t.Fatal(err)
	}
	counts := func() string {
		n := make([]string, 0, 4)
		for _, tenant := range []string{"acme", "beta", "gamma", "delta"} {
			switch k := len(free(e, crowd[tenant])); {
			case k == 0:
				n = append(n, "none")
			case k == 200:
				n = append(n, "all")
			case k > 60 && k < 140:
				n = append(n, "half")
			default:
				n = append(n, fmt.Sprint(k))
			}
		}
		if e.Check(valve, session.Call{Tool: "t"}) != nil {
			n = append(n, "and the exempt one is denied")
		}
		return strings.Join(n, " ")
	}
	becomes := func(want string) {
		t.Helper()
		f.until(func() bool { return counts() == want })
	}
	f.kill(tenantTarget("delta"))
	f.kill(everything())
	becomes("none none none none")
	// A stage after which anything is free that should not be is seen at once: what
	// is lifted and what takes its place is one batch.
	d, err := f.c.Decide(f.ctx, stagedRequest(everything(), "acme", "50%", "100%"))
	if err != nil || !strings.Contains(strings.Join(d.Warnings, ";"), "tenant delta is killed by itself") {
		t.Fatalf("%+v, %v", d, err)
	}
	id := d.Restore.ID
	becomes("all none none none")
	f.due(id)
	becomes("all half half none")
	if st, err := f.c.Status(f.ctx); err != nil || !slices.Equal(st.Kills, []string{"tenant beta", "tenant gamma", "tenant delta"}) || st.KillsInForce[0].Exempt != 1 || st.KillsInForce[1].Exempt != 0 {
		t.Errorf("%+v, %v", st.KillsInForce, err)
	}
	d, err = f.c.AbortRestore(f.ctx, id)
	if err != nil || d.Restore.State != authority.RestoreAborted {
		t.Fatalf("%+v, %v", d, err)
	}
	becomes("none none none none")
	if again, err := f.c.AbortRestore(f.ctx, id); err != nil || !again.Duplicate || again.Number != d.Number {
		t.Errorf("%+v, %v", again, err)
	}
	if st, err := f.c.Status(f.ctx); err != nil || !slices.Equal(st.Kills, []string{"global", "tenant delta"}) || len(st.Restores) != 0 {
		t.Errorf("%+v, %v", st.KillsInForce, err)
	}

	// Another goes on from there; a kill in between ends it, and is left alone.
	d = f.decide(stagedRequest(everything(), "acme", "beta", "100%"))
	becomes("all none none none")
	id = d.Restore.ID
	if x := f.due(id); x.Taken != 2 {
		t.Fatalf("%+v", x)
	}
	becomes("all all none none")
	f.kill(tenantTarget("gamma"))
	f.until(func() bool { return f.restore(id).State == authority.RestoreStopped })
	if x := f.restore(id); !strings.Contains(x.Why, "tenant gamma was killed anew at seq") {
		t.Errorf("%+v", x)
	}
	becomes("all all none none")
	if _, err := f.c.AbortRestore(f.ctx, id); err == nil {
		t.Error("what has stopped is aborted")
	}
}

// A stage that was taken by an authority that died before it could say so is taken
// once, and the restore goes on.
func TestAStageIsTakenOnce(t *testing.T) {
	for name, stages := range map[string][]string{"shares": {"10%", "50%", "100%"}, "tenants": {"acme", "beta", "50%", "100%"}, "all at once": {"100%"}} {
		t.Run(name, func(t *testing.T) {
			f := start(t, Options{AckWait: patient, Tenants: []string{"acme", "beta", "gamma"}, Issuers: []string{issuer}})
			f.kill(everything())
			d := f.decide(stagedRequest(everything(), stages...))
			id := d.Restore.ID
			for n := 1; ; n++ {
				x := f.restore(id)
				if x.Taken != n {
					t.Fatalf("%+v", x)
				}
				// As it was before the stage was marked.
				back := x
				back.Taken--
				back.State, back.Next, back.Begun = authority.RestoreRunning, time.Now().Add(time.Hour), time.Now()
				if back.Taken == 0 {
					back.SplitAt = 0
				}
				number := x.Number
				if err := f.a.putRestore(f.ctx, &back, time.Now()); err != nil {
					t.Fatal(err)
				}
				d, err := f.a.takeStage(f.ctx, &back)
				if err != nil || !d.Duplicate || d.Number != number || back.Taken != n {
					t.Fatalf("stage %d: %+v, %v", n, d, err)
				}
				if back.State == authority.RestoreDone {
					break
				}
				f.due(id)
			}
			if st, err := f.c.Status(f.ctx); err != nil || len(st.Kills) != 0 {
				t.Errorf("%+v, %v", st.Kills, err)
			}
		})
	}
}

// Two persons decide on the restore as a whole; one ends it. Who has one tenant
// sees and ends no other's.
func TestAStagedRestoreTakesTwoOnce(t *testing.T) {
	f := start(t, Options{AckWait: patient, Tenants: []string{"acme", "beta"}, Issuers: []string{issuer}, Access: &access.Config{ProposalFor: time.Minute, Local: access.On, TwoPerson: access.On}})
	f.kill(tenantTarget("acme"))
	alice, bob, other := f.commander("alice"), f.commander("bob", "acme"), f.commander("dora", "beta")
	r := stagedRequest(tenantTarget("acme"), "1%", "2%", "100%")
	var problem *authority.Problem
	if _, err := f.a.Decide(alice, "k", r); !errors.As(err, &problem) || problem.Type != authority.ProblemTwoPersons {
		t.Fatal(err)
	}
	p, err := f.a.Propose(alice, r)
	if err != nil || !strings.Contains(p.Would[0], "in 3 stages") {
		t.Fatalf("%+v, %v", p, err)
	}
	d, err := f.a.Approve(bob, p.ID)
	if err != nil || d.Restore == nil || d.Restore.Taken != 1 {
		t.Fatalf("%+v, %v", d, err)
	}
	if x := f.due(d.Restore.ID); x.Taken != 2 { // nobody is asked again
		t.Errorf("%+v", x)
	}
	if l, err := f.a.Restores(other); err != nil || len(l) != 0 {
		t.Errorf("%+v, %v", l, err)
	}
	if _, err := f.a.AbortRestore(other, d.Restore.ID); !errors.As(err, &problem) || problem.Type != authority.ProblemNotFound {
		t.Error(err)
	}
	if _, err := f.a.AbortRestore(bob, d.Restore.ID); err != nil {
		t.Error(err)
	}
	if k := f.a.kills(access.Everything()); len(k) != 1 || k[0].Share != 0 {
		t.Errorf("%+v", k)
	}
}

func TestStagesThatAreRefused(t *testing.T) {
	p := newPlanner(t, session.Entry{Op: session.OpSet, Effect: session.EffectSuspended, Reason: session.ReasonKill, Key: session.GlobalKey()},
		session.Entry{Op: session.OpSet, Effect: session.EffectRevoked, Reason: session.ReasonKill, Key: session.TenantKey(1)})
	p.all = []session.Tenant{{ID: 1, Name: "acme"}, {ID: 2, Name: "beta"}}
	minute := authority.Duration(time.Minute)
	for _, c := range []struct {
		stages string
		change func(*authority.Request)
		want   string
	}{
		{"1%,1%,100%", nil, "not a stage after 1%"},
		{"10%,1%,100%", nil, "not a stage after 10%"},
		{"0%,100%", nil, "not a stage"},
		{"101%", nil, "not a stage"},
		{"NaN%", nil, "not a stage"},
		{"1%,50%", nil, "end with 100%"},
		{"100%,beta", nil, "name tenants first"},
		{"10%,beta,100%", nil, "name tenants first"},
		{"beta,beta,100%", nil, "not a stage"},
		{"nobody,100%", nil, "not a stage"},
		{strings.Repeat("1%,", 32) + "100%", nil, "at most 32"},
		{"1%,100%", func(r *authority.Request) { r.Hold = 0 }, "1s to 24h"},
		{"1%,100%", func(r *authority.Request) { r.Hold = authority.Duration(25 * time.Hour) }, "1s to 24h"},
		{"1%,100%", func(r *authority.Request) { r.Share = 5 }, "the stages say"},
		{"1%,100%", func(r *authority.Request) { r.Targets = one("user", "u") }, "only a kill"},
		{"1%,100%", func(r *authority.Request) { r.Targets = tenantTarget("acme") }, "killed with its credentials"},
		{"1%,100%", func(r *authority.Request) { r.Operation = authority.Resume }, "only a kill"},
		{"", func(r *authority.Request) {}, "there are none"},
	} {
		r := authority.Request{Operation: authority.Restore, Targets: everything(), Hold: minute}
		if c.stages != "" {
			r.Stages = strings.Split(c.stages, ",")
		}
		if c.change != nil {
			c.change(&r)
		}
		var problem *authority.Problem
		if _, err := p.plan(&r); !errors.As(err, &problem) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", c.stages, err)
		}
	}
	pl, err := newPlanner(t).plan(&authority.Request{Operation: authority.Restore, Targets: everything(), Stages: []string{"100%"}, Hold: minute})
	if err != nil || !strings.Contains(strings.Join(pl.warnings, ";"), "global is not killed") || pl.restore.nothing == nil {
		t.Errorf("%+v, %v", pl, err)
	}
}

// Whoever kills while a stage is on its way has killed.
func TestAStageDoesNotLiftALaterKill(t *testing.T) {
	var f *fixture
	again := false
	f = start(t, Options{AckWait: patient, beforeStage: func() {
		if again {
			again = false
			f.decide(authority.Request{Operation: authority.Kill, Targets: everything(), Reason: "compromised", Incident: "INC-2"})
		}
	}})
	e := f.enforcer("e", enforce.Options{})
	crowd := f.crowd(e, "default")["default"]
	for _, stages := range [][]string{{"50%", "100%"}, {"20%", "50%", "100%"}} {
		f.kill(everything())
		d := f.decide(stagedRequest(everything(), stages...))
		f.until(func() bool { return len(free(e, crowd)) > 0 })
		f.a.staging.Lock()
		again = true
		f.a.staging.Unlock()
		if x := f.due(d.Restore.ID); x.State != authority.RestoreStopped || !strings.Contains(x.Why, "killed anew at seq") {
			t.Errorf("%+v", x)
		}
		f.until(func() bool { return len(free(e, crowd)) == 0 })
		if k := f.a.kills(access.Everything()); len(k) != 1 || k[0].Share != 0 || k[0].Incident != "INC-2" {
			t.Errorf("%+v", k)
		}
		f.settle(f.decide(authority.Request{Operation: authority.Restore, Targets: everything(), Incident: "INC-2"}))
		f.until(func() bool { return len(free(e, crowd)) == len(crowd) })
	}
}

// between are what a test does before a stage is taken, once, and whether the
// authority dies after that, once.
type between struct {
	then atomic.Pointer[func()]
	dies atomic.Bool
}

func (b *between) options(o Options) Options {
	o.AckWait = patient
	o.beforeStage = func() {
		if f := b.then.Swap(nil); f != nil {
			(*f)()
		}
	}
	o.afterStage = func() error {
		if b.dies.Swap(false) {
			return errors.New("died")
		}
		return nil
	}
	return o
}

// suspended is the suspension of a tenant, or of everything.
func (f *fixture) suspended(tenant string) (session.Record, bool) {
	f.Helper()
	p := f.a.planner(nil)
	k := session.GlobalKey()
	if tenant != "" {
		i := slices.IndexFunc(p.all, func(t session.Tenant) bool { return t.Name == tenant })
		k = session.TenantKey(p.all[i].ID)
	}
	return p.suspension(k)
}

// stands fails unless a decision on a tenant, or everything, is in force as it was
// taken.
func (f *fixture) stands(tenant string, d *authority.Decision, reason session.Reason) {
	f.Helper()
	if r, ok := f.suspended(tenant); !ok || r.Seq != d.Number || r.Reason != reason || r.Share != 0 {
		f.Errorf("%q: %+v, %t; decided at %d", tenant, r, ok, d.Number)
	}
}

func (f *fixture) stopped(id, why string) {
	f.Helper()
	f.until(func() bool { return f.restore(id).State != authority.RestoreRunning })
	if x := f.restore(id); x.State != authority.RestoreStopped || !strings.Contains(x.Why, why) {
		f.Errorf("%+v", x)
	}
}

// free lifts what a test has left.
func (f *fixture) free() {
	f.Helper()
	for tenant, t := range map[string][]authority.Target{"": everything(), "acme": tenantTarget("acme"), "beta": tenantTarget("beta")} {
		if _, ok := f.suspended(tenant); ok {
			f.settle(f.decide(authority.Request{Operation: authority.Restore, Targets: t, Incident: "INC-1"}))
		}
	}
}

func suspendRequest(tenant string) authority.Request {
	return authority.Request{Operation: authority.Suspend, Targets: tenantTarget(tenant), Reason: "maintenance", Incident: "INC-3"}
}

func killRequest(targets []authority.Target) authority.Request {
	return authority.Request{Operation: authority.Kill, Targets: targets, Reason: "compromised", Incident: "INC-2"}
}

// What somebody else has decided on a tenant, or on everything, stands, whenever it
// was decided: also where the authority's clock stands still.
func TestARestoreLiftsNothingOfOthers(t *testing.T) {
	var b between
	frozen := time.Now()
	f := start(t, b.options(Options{
		Tenants: []string{"acme", "beta"}, Issuers: []string{issuer}, Hooks: sequencer.Hooks{Now: func() time.Time { return frozen }},
	}))
	var other *authority.Decision
	decides := func(r authority.Request) {
		then := func() {
			other = f.decide(r)
			f.settle(other)
		}
		b.then.Store(&then)
	}
	refused := func(r authority.Request, why string) {
		t.Helper()
		var problem *authority.Problem
		if _, err := f.c.Decide(f.ctx, r); !errors.As(err, &problem) || problem.Type != authority.ProblemConflict || !strings.Contains(err.Error(), why) {
			t.Error(err)
		}
	}

	// A tenant was suspended before everything was killed.
	d := f.decide(suspendRequest("acme"))
	f.kill(everything())
	r := f.decide(stagedRequest(everything(), "acme", "100%"))
	if !strings.Contains(strings.Join(r.Warnings, ";"), "tenant acme is suspended by itself, and stays so") {
		t.Errorf("%q", r.Warnings)
	}
	f.stands("acme", d, session.ReasonMaintenance)
	if x := f.due(r.Restore.ID); x.State != authority.RestoreDone {
		t.Errorf("%+v", x)
	}
	f.stands("acme", d, session.ReasonMaintenance)
	if _, ok := f.suspended("beta"); ok {
		t.Error("beta is not restored")
	}
	f.free()

	// It is suspended while a stage is held.
	f.kill(tenantTarget("acme"))
	r = f.decide(stagedRequest(tenantTarget("acme"), "50%", "100%"))
	d = f.decide(suspendRequest("acme"))
	f.stopped(r.Restore.ID, "tenant acme was suspended at seq")
	f.stands("acme", d, session.ReasonMaintenance)
	f.free()

	// Or while the stage is on its way.
	for _, dies := range []bool{false, true} {
		for _, stages := range [][]string{{"50%", "100%"}, {"20%", "50%", "100%"}} {
			for _, request := range []authority.Request{suspendRequest("acme"), killRequest(tenantTarget("acme"))} {
				f.kill(tenantTarget("acme"))
				r = f.decide(stagedRequest(tenantTarget("acme"), stages...))
				decides(request)
				b.dies.Store(dies)
				f.due(r.Restore.ID)
				f.stopped(r.Restore.ID, "tenant acme was")
				reason := session.ReasonMaintenance
				if request.Operation == authority.Kill {
					reason = session.ReasonKill
				}
				f.stands("acme", other, reason)
				f.free()
			}
		}
	}

	// A tenant that the first stage frees, or holds, or everything, is killed or
	// suspended between its plan and itself.
	for _, c := range []struct {
		r      authority.Request
		tenant string
		reason session.Reason
	}{
		{killRequest(tenantTarget("acme")), "acme", session.ReasonKill},
		{suspendRequest("acme"), "acme", session.ReasonMaintenance},
		{suspendRequest("beta"), "beta", session.ReasonMaintenance},
		{killRequest(tenantTarget("beta")), "beta", session.ReasonKill},
		{killRequest(everything()), "", session.ReasonKill},
	} {
		f.kill(everything())
		decides(c.r)
		refused(stagedRequest(everything(), "acme", "100%"), "the restore stopped")
		f.stands(c.tenant, other, c.reason)
		if _, ok := f.suspended("beta"); !ok { // what is left is as it was
			t.Error("beta is free")
		}
		f.free()
	}
}

// What is decided on a tenant between the request and its first stage ends the
// restore before that is taken.
func TestAPartThatIsKilledByItself(t *testing.T) {
	kill := session.Entry{Op: session.OpSet, Effect: session.EffectSuspended, Reason: session.ReasonKill, Key: session.GlobalKey()}
	p := newPlanner(t, kill)
	p.all = []session.Tenant{{ID: 1, Name: "acme"}, {ID: 2, Name: "beta"}}
	pl, err := p.plan(&authority.Request{Operation: authority.Restore, Targets: everything(), Stages: []string{"acme", "100%"}, Hold: authority.Duration(time.Minute)})
	if err != nil {
		t.Fatal(err)
	}
	x := pl.restore
	if why := p.undone(x); why != "" {
		t.Error(why)
	}
	// Where both were of one millisecond, the reason tells.
	other := kill
	other.Reason = session.ReasonMaintenance
	q := *p
	q.state = p.state.Apply(&session.Batch{Epoch: 1, Number: 2, Time: x.Whole.Since, Entries: []session.Entry{other}}, nil)
	if why := q.undone(x); why != "global was suspended at seq 2" {
		t.Errorf("%q", why)
	}
	for _, tenant := range []session.TenantID{1, 2} {
		for _, reason := range []session.Reason{session.ReasonKill, session.ReasonMaintenance} {
			own := kill
			own.Key, own.Reason = session.TenantKey(tenant), reason
			q := *p
			q.state = p.state.Apply(&session.Batch{Epoch: 1, Number: 2, Time: session.InstantOf(now), Entries: []session.Entry{own}}, nil)
			if why := q.undone(x); !strings.Contains(why, "at seq 2") {
				t.Errorf("tenant %d, %s: %q", tenant, reason, why)
			}
		}
	}
}

// The kills of single tenants can take neither another's share nor, beside all that
// it spares, the mark.
func TestPartsThatCannotBe(t *testing.T) {
	kill := session.Entry{Op: session.OpSet, Effect: session.EffectSuspended, Reason: session.ReasonKill, Key: session.GlobalKey()}
	share := liftKill(&heldKill{Key: session.GlobalKey(), Since: session.InstantOf(now)}, 1000, "")
	spares := kill
	for i := range session.MaxExcept {
		spares.Except = append(spares.Except, session.Key{Tenant: 1, Shape: session.Shape(session.KindAgent), Digest: session.Digest{byte(i + 1)}})
	}
	for want, entries := range map[string][]session.Entry{"by shares alone": {kill, share}, "spares 8 callers of tenant acme": {spares}} {
		p := newPlanner(t, entries...)
		p.all = []session.Tenant{{ID: 1, Name: "acme"}, {ID: 2, Name: "beta"}}
		r := &authority.Request{Operation: authority.Restore, Targets: everything(), Stages: []string{"beta", "100%"}, Hold: authority.Duration(time.Minute)}
		if _, err := p.plan(r); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", want, err)
		}
		r.Stages = []string{"50%", "100%"}
		if _, err := p.plan(r); err != nil {
			t.Error(err)
		}
	}
}

// An abort is decided once, and is not a kill that one person takes anew.
func TestAnAbortIsNotRepeated(t *testing.T) {
	f := start(t, Options{AckWait: patient})
	f.kill(everything())
	id := f.decide(stagedRequest(everything(), "50%", "100%")).Restore.ID
	if len(id) != len("r-5f0c1a2290d3be71") {
		t.Errorf("%q can be met by chance", id)
	}
	d, err := f.c.AbortRestore(f.ctx, id)
	if err != nil || d.Duplicate {
		t.Fatalf("%+v, %v", d, err)
	}
	f.settle(d)
	f.settle(f.decide(authority.Request{Operation: authority.Restore, Targets: everything(), Incident: "INC-1"}))
	again, err := f.c.AbortRestore(f.ctx, id)
	if err != nil || !again.Duplicate || again.ID != d.ID || again.Number != d.Number || !again.At.Equal(d.At) || !strings.Contains(strings.Join(again.Warnings, ";"), "it was aborted then") {
		t.Errorf("%+v, %v", again, err)
	}
	x := f.restore(id)
	x.At = x.At.Add(-keepRestore)
	if err := f.a.putRestore(f.ctx, &x, time.Now()); err != nil {
		t.Fatal(err)
	}
	var problem *authority.Problem
	if _, err := f.c.AbortRestore(f.ctx, id); !errors.As(err, &problem) || problem.Type != authority.ProblemConflict || !strings.Contains(err.Error(), "kill anew") {
		t.Error(err)
	}
	if r, ok := f.suspended(""); ok {
		t.Errorf("%+v", r)
	}
}
