package authority

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nkeys"

	"github.com/interlock-fabric/interlock/internal/api"
	"github.com/interlock-fabric/interlock/internal/broker"
	"github.com/interlock-fabric/interlock/internal/enrolled"
	"github.com/interlock-fabric/interlock/internal/flock"
	"github.com/interlock-fabric/interlock/internal/sequencer"
	"github.com/interlock-fabric/interlock/pkg/authority"
	"github.com/interlock-fabric/interlock/pkg/enforce"
	"github.com/interlock-fabric/interlock/pkg/natsfeed"
	"github.com/interlock-fabric/interlock/pkg/session"
)

const issuer = "https://issuer.example"

// fixture is a whole authority on a temporary directory, and a client of its
// API.
type fixture struct {
	testing.TB
	ctx context.Context
	a   *Authority
	c   *authority.Client
}

func start(t testing.TB, o Options) *fixture {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	t.Cleanup(cancel)
	if o.DataDir == "" {
		o.DataDir = t.TempDir()
	}
	if o.NATSListen == "" && o.NATSURL == "" {
		o.NATSListen = "127.0.0.1:0"
	}
	o.RelaxedSync = true
	a, err := Open(ctx, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := a.Close(); err != nil {
			t.Error(err)
		}
	})
	c, err := authority.New(authority.Options{Socket: a.Socket()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return &fixture{t, ctx, a, c}
}

func (f *fixture) enroll(name string) *session.Enrollment {
	f.Helper()
	raw, err := f.c.Enroll(f.ctx, authority.EnrollRequest{Name: name})
	if err != nil {
		f.Fatal(err)
	}
	e, err := session.ParseEnrollment(raw)
	if err != nil {
		f.Fatal(err)
	}
	return e
}

func (f *fixture) enforcer(name string, o enforce.Options) *enforce.Enforcer {
	f.Helper()
	e, err := enrolled.Open(f.ctx, f.c, name, o)
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { _ = e.Close() }) // closed by some tests already
	f.heard(name)
	return e
}

// heard waits for the first receipt of an enforcer: before that, nobody waits for
// it.
func (f *fixture) heard(name string) {
	f.Helper()
	f.until(func() bool {
		for _, x := range f.a.enforcers() {
			if x.Name == name {
				return x.Condition != authority.ConditionAbsent
			}
		}
		return false
	})
}

func (f *fixture) decide(r authority.Request) *authority.Decision {
	f.Helper()
	r.Commit = true
	d, err := f.c.Decide(f.ctx, r)
	if err != nil {
		f.Fatal(err)
	}
	return d
}

// settle waits until a decision is covered.
func (f *fixture) settle(d *authority.Decision) *authority.Coverage {
	f.Helper()
	c, err := f.c.Coverage(f.ctx, d.Epoch, d.Number, authority.MaxWait)
	if err != nil {
		f.Fatal(err)
	}
	return c
}

func (f *fixture) prepare(e *enforce.Enforcer, id session.Identity) *session.Prepared {
	f.Helper()
	id.Tenant = "default"
	if id.Issuer == "" {
		id.Issuer = issuer
	}
	p, err := e.Prepare(id)
	if err != nil {
		f.Fatal(err)
	}
	return p
}

func one(kind, value string) []authority.Target {
	return []authority.Target{authority.One("", kind, issuer, value)}
}

func everything() []authority.Target {
	return []authority.Target{{Terms: []authority.Term{{Kind: "global"}}}}
}

// TestCoverageWaitsForWhoOpens: an enforcer that has connected and asked for the
// clock is not passed over as one that was never started.
func TestCoverageWaitsForWhoOpens(t *testing.T) {
	f := start(t, Options{})
	en := f.enroll("opening")
	kp, err := nkeys.FromSeed([]byte(en.NATS.NKeySeed))
	if err != nil {
		t.Fatal(err)
	}
	pub, err := kp.PublicKey()
	if err != nil {
		t.Fatal(err)
	}
	nc, err := nats.Connect(en.NATS.URLs[0], nats.Nkey(pub, kp.Sign), nats.CustomInboxPrefix(natsfeed.InboxPrefix("opening")))
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	if _, err := nc.RequestWithContext(f.ctx, natsfeed.ClockSubject("opening"), make([]byte, 32)); err != nil {
		t.Fatal(err)
	}
	f.until(func() bool {
		d := f.decide(authority.Request{Operation: authority.Revoke, Targets: one("session", "s"), Reason: "stolen-token"})
		c, err := f.c.Coverage(f.ctx, d.Epoch, d.Number, 0)
		if err != nil {
			t.Fatal(err)
		}
		return !c.Complete && c.Pending == 1 && c.Absent == 0
	})
}

func TestRevokeTakesEffectOnEveryEnforcerAndIsCounted(t *testing.T) {
	f := start(t, Options{})
	strict := f.enforcer("strict", enforce.Options{})
	shadow := f.enforcer("shadow", enforce.Options{Mode: session.ModeShadow})
	f.enroll("absent")
	p := f.prepare(strict, session.Identity{User: "alice", Session: session.SessionRef{ID: "s1"}})
	running, release, err := strict.Bind(f.ctx, p, session.Call{Tool: "t"})
	if err != nil {
		t.Fatal(err)
	}
	defer release()

	d := f.decide(authority.Request{Operation: authority.Revoke, Targets: one("session", "s1"), Reason: "stolen-token", Incident: "INC-1"})
	if !d.Committed || !d.Durable || d.Number == 0 {
		t.Fatalf("decision %+v", d)
	}
	c := f.settle(d)
	if !c.Complete || c.Effective || c.Enforcers != 3 || c.InEffect != 1 || c.Exposed != 1 || c.Absent != 1 || c.Shadow != 1 || c.Cut != 1 || !c.Durable {
		t.Fatalf("coverage %+v", c)
	}
	for _, e := range c.Detail {
		if e.Name == "strict" && (e.State != authority.StateApplied || e.AppliedAt.IsZero()) {
			t.Errorf("%+v", e)
		}
	}
	if err := strict.Check(p, session.Call{}); !errors.Is(err, session.ErrRevoked) {
		t.Errorf("check: %v", err)
	}
	if err := shadow.Check(f.prepare(shadow, session.Identity{Session: session.SessionRef{ID: "s1"}}), session.Call{}); err != nil {
		t.Errorf("shadow denies: %v", err)
	}
	<-running.Done()
}

// An enforcer that falls silent stops holding a wait up once its bound has
// passed, and is reported as denying by itself from then on.
func TestWaitEndsAtTheBoundOfASilentEnforcer(t *testing.T) {
	f := start(t, Options{})
	f.enforcer("live", enforce.Options{})
	gone := f.enforcer("gone", enforce.Options{MaxStale: 2 * time.Second})
	if err := gone.Close(); err != nil {
		t.Fatal(err)
	}
	begun := time.Now()
	d := f.decide(authority.Request{Operation: authority.Revoke, Reason: "anomaly", Targets: one("session", "s1")})
	c := f.settle(d)
	if took := time.Since(begun); took > 10*time.Second {
		t.Errorf("waited %s", took)
	}
	if !c.Complete || !c.Effective || c.InEffect != 1 || c.Denying != 1 {
		t.Fatalf("coverage %+v", c)
	}
}

func TestRetiredEnforcerIsOffTheBusAndOutOfTheRoster(t *testing.T) {
	f := start(t, Options{})
	e := f.enforcer("tools", enforce.Options{MaxStale: 2 * time.Second})
	if err := f.c.Retire(f.ctx, "tools"); err != nil {
		t.Fatal(err)
	}
	list, err := f.c.Enforcers(f.ctx)
	if err != nil || len(list) != 0 {
		t.Fatalf("roster %v, %v", list, err)
	}
	// Off the bus it hears no heartbeat, and fails closed.
	p := f.prepare(e, session.Identity{User: "alice"})
	f.until(func() bool { return errors.Is(e.Check(p, session.Call{}), session.ErrStale) })
	var problem *authority.Problem
	if err := f.c.Retire(f.ctx, "tools"); !errors.As(err, &problem) || problem.Type != authority.ProblemNotFound {
		t.Errorf("second retire: %v", err)
	}
	f.enroll("tools") // the name can be used again
	if _, err := f.c.Enroll(f.ctx, authority.EnrollRequest{Name: "tools"}); !errors.As(err, &problem) || problem.Type != authority.ProblemConflict {
		t.Errorf("second enrolment: %v", err)
	}
}

// until polls a condition of a real server, with the test's deadline.
func (f *fixture) until(ok func() bool) {
	f.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-f.ctx.Done():
			f.Fatal("not in time")
		case <-tick.C:
		}
	}
}

func TestIdempotencyKey(t *testing.T) {
	f := start(t, Options{})
	r := authority.Request{Operation: authority.Revoke, Reason: "anomaly", Targets: one("session", "s1")}
	first, err := f.c.DecideOnce(f.ctx, "key-1", r)
	if err != nil {
		t.Fatal(err)
	}
	again, err := f.c.DecideOnce(f.ctx, "key-1", r)
	if err != nil || !again.Duplicate || again.Number != first.Number {
		t.Fatalf("again %+v, %v; first %+v", again, err, first)
	}
	r.Targets = one("session", "s2")
	var p *authority.Problem
	if _, err := f.c.DecideOnce(f.ctx, "key-1", r); !errors.As(err, &p) || p.Type != authority.ProblemIdempotency {
		t.Fatalf("another request under the key: %v", err)
	}
}

// While the store does not acknowledge, enforcers deny already, and nobody is
// told that it is durable; once it does, the same request says so.
func TestNotDurableIsSaidSo(t *testing.T) {
	var outage atomic.Bool
	f := start(t, Options{AckWait: 50 * time.Millisecond, Hooks: sequencer.Hooks{DropAcks: outage.Load}})
	e := f.enforcer("tools", enforce.Options{})
	p := f.prepare(e, session.Identity{Session: session.SessionRef{ID: "s1"}})
	outage.Store(true)
	r := authority.Request{Operation: authority.Revoke, Reason: "anomaly", Targets: one("session", "s1")}
	d, err := f.c.DecideOnce(f.ctx, "key-1", r)
	if err != nil || !d.Committed || d.Durable {
		t.Fatalf("in an outage: %+v, %v", d, err)
	}
	f.until(func() bool { return errors.Is(e.Check(p, session.Call{}), session.ErrRevoked) })
	if c := f.settle(d); c.Durable || c.InEffect != 1 {
		t.Fatalf("coverage in an outage: %+v", c)
	}
	outage.Store(false)
	f.until(func() bool {
		d, err = f.c.DecideOnce(f.ctx, "key-1", r)
		return err == nil && d.Durable
	})
	if c := f.settle(d); !d.Duplicate || !c.Durable {
		t.Errorf("afterwards: %+v, %+v", d, c)
	}
}

func TestKillAndRestore(t *testing.T) {
	f := start(t, Options{})
	e := f.enforcer("tools", enforce.Options{})
	old := f.prepare(e, session.Identity{User: "alice", AuthTime: time.Now().Add(-time.Hour)})
	allowed := func(p *session.Prepared) bool { return e.Check(p, session.Call{}) == nil }

	// A kill suspends: after it is restored, everybody may go on.
	f.settle(f.decide(authority.Request{Operation: authority.Kill, Reason: "anomaly", Targets: everything(), Incident: "INC-7"}))
	var denied *session.DeniedError
	if err := e.Check(old, session.Call{}); !errors.As(err, &denied) || denied.Effect != session.EffectSuspended || denied.Reason != session.ReasonKill {
		t.Fatalf("under a kill: %v", err)
	}
	st, err := f.c.Status(f.ctx)
	if err != nil || len(st.Kills) != 1 || st.Kills[0] != "global" {
		t.Fatalf("status %+v, %v", st, err)
	}
	f.decide(authority.Request{Operation: authority.Restore, Incident: "INC-0", Targets: everything()})
	f.until(func() bool { return allowed(old) })

	// With its credentials it revokes: what was there before stays dead.
	f.settle(f.decide(authority.Request{Operation: authority.Kill, Reason: "anomaly", Incident: "INC-0", Targets: everything(), Credentials: true}))
	f.decide(authority.Request{Operation: authority.Restore, Incident: "INC-0", Targets: everything()})
	fresh := f.prepare(e, session.Identity{User: "alice", AuthTime: time.Now().Add(time.Hour)})
	f.until(func() bool { return allowed(fresh) })
	if allowed(old) {
		t.Error("a credential from before the kill came back to life")
	}
	if st, err := f.c.Status(f.ctx); err != nil || len(st.Kills) != 0 {
		t.Errorf("status %+v, %v", st, err)
	}
}

// What is in force, and who is enrolled, survives a restart; and the receipts
// that were stored say who is alive.
func TestRestart(t *testing.T) {
	dir := t.TempDir()
	f := start(t, Options{DataDir: dir})
	e := f.enforcer("tools", enforce.Options{})
	d := f.decide(authority.Request{Operation: authority.Revoke, Reason: "anomaly", Incident: "INC-0", Targets: one("user", "alice")})
	f.settle(d)
	addr := f.a.NATSAddr()
	if err := f.a.Close(); err != nil {
		t.Fatal(err)
	}
	g := start(t, Options{DataDir: dir, NATSListen: addr})
	list, err := g.c.Enforcers(g.ctx)
	if err != nil || len(list) != 1 || list[0].Condition == authority.ConditionAbsent {
		t.Fatalf("roster %+v, %v", list, err)
	}
	x, err := g.c.Explain(g.ctx, authority.ExplainRequest{Identity: &authority.Identity{Issuer: issuer, User: "alice"}})
	if err != nil || !x.Denied || len(x.Matches) != 1 {
		t.Fatalf("explain %+v, %v", x, err)
	}
	c := g.settle(g.decide(authority.Request{Operation: authority.Revoke, Reason: "anomaly", Targets: one("session", "s9")}))
	if c.InEffect != 1 {
		t.Fatalf("coverage %+v", c)
	}
	if err := e.Check(g.prepare(e, session.Identity{Session: session.SessionRef{ID: "s9"}}), session.Call{}); !errors.Is(err, session.ErrRevoked) {
		t.Errorf("check: %v", err)
	}
}

// second starts another authority, with the same keys, on the bus of f's.
func (f *fixture) second() *fixture {
	f.Helper()
	dir := filepath.Join(f.TempDir(), "second")
	if err := os.CopyFS(filepath.Join(dir, KeysDir), os.DirFS(filepath.Join(f.a.o.DataDir, KeysDir))); err != nil {
		f.Fatal(err)
	}
	// Copies are made with the umask; keys must be their owner's alone.
	if err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			err = os.Chmod(path, 0o600)
		}
		return err
	}); err != nil {
		f.Fatal(err)
	}
	return start(f.TB, Options{DataDir: dir, NATSURL: "nats://" + f.a.NATSAddr(), Issuers: f.a.o.Issuers, Access: f.a.o.Access})
}

// Two authorities on one store take decisions, share the roster, and each knows
// where the other's decisions are in force.
func TestTwoAuthoritiesOnOneStore(t *testing.T) {
	a := start(t, Options{})
	b := a.second()
	e := a.enforcer("tools", enforce.Options{})
	b.until(func() bool {
		list := b.a.enforcers()
		return len(list) == 1 && list[0].Condition == authority.ConditionFresh
	})
	for i, f := range []*fixture{a, b, a, b} {
		id := fmt.Sprint("s", i)
		d := f.decide(authority.Request{Operation: authority.Revoke, Reason: "anomaly", Targets: one("session", id)})
		for _, g := range []*fixture{a, b} {
			g.until(func() bool { _, n, _ := g.a.seq.Head(); return n >= d.Number })
			if c := g.settle(d); c.InEffect != 1 || !c.Durable {
				t.Errorf("decision %d: coverage %+v", d.Number, c)
			}
		}
		if err := e.Check(a.prepare(e, session.Identity{Session: session.SessionRef{ID: id}}), session.Call{}); !errors.Is(err, session.ErrRevoked) {
			t.Errorf("%s: %v", id, err)
		}
	}
	if err := b.c.Retire(b.ctx, "tools"); err != nil {
		t.Fatal(err)
	}
	a.until(func() bool { return len(a.a.enforcers()) == 0 })
	config, err := b.c.BusConfig(b.ctx)
	if err != nil || !strings.Contains(config, "accounts {") || strings.Contains(config, "tools") {
		t.Errorf("%s, %v", config, err)
	}
}

// A watcher that does not read is let go, and nobody waits for it.
func TestSlowWatcherIsLetGo(t *testing.T) {
	h := newHub(func(session.TenantID) string { return "" })
	ended := make(chan error, 1)
	entered, leave := make(chan struct{}), make(chan struct{})
	go func() {
		first := true
		ended <- h.watch(t.Context(), func() error { return nil }, func(authority.Event) error {
			if first {
				first = false
				close(entered)
				<-leave
			}
			return nil
		})
	}()
	entries := []session.Entry{{Op: session.OpSet, Effect: session.EffectRevoked, Key: session.GlobalKey()}}
	for n := uint64(1); ; n++ {
		h.heard(&session.Batch{Epoch: 1, Number: n, Entries: entries})
		select {
		case <-entered:
		default:
			continue
		}
		h.mu.Lock()
		gone := len(h.watchers) == 0
		h.mu.Unlock()
		if gone {
			break
		}
	}
	close(leave)
	if err := <-ended; !errors.Is(err, errLagged) {
		t.Errorf("ended with %v", err)
	}
}

func TestWatch(t *testing.T) {
	f := start(t, Options{})
	f.enforcer("tools", enforce.Options{})
	ctx, cancel := context.WithCancel(f.ctx)
	defer cancel()
	got := make(chan authority.Event, 64)
	ended := make(chan error, 1)
	go func() {
		var last error
		for e, err := range f.c.Watch(ctx) {
			if err != nil {
				last = err
				break
			}
			got <- e
		}
		ended <- last
	}()
	f.until(func() bool { f.a.hub.mu.Lock(); defer f.a.hub.mu.Unlock(); return len(f.a.hub.watchers) == 1 })
	d := f.decide(authority.Request{Operation: authority.Suspend, Targets: one("user", "alice"), Reason: "anomaly", Incident: "INC-3"})
	next := func(typ string) authority.Event {
		for {
			select {
			case e := <-got:
				if e.Type == typ {
					return e
				}
			case <-f.ctx.Done():
				t.Fatal("no event in time")
			}
		}
	}
	e := next(authority.EventDecision).Decision
	if e.Number != d.Number || len(e.Lines) != 1 || e.Lines[0] != (authority.EntryLine{
		Operation: "set", Effect: "suspended", On: "user", Tenant: "default", Reason: "anomaly", Incident: "INC-3", Count: 1}) {
		t.Errorf("decision %+v", e)
	}
	if c := next(authority.EventCoverage).Coverage; c.Number != d.Number || c.InEffect != 1 {
		t.Errorf("coverage %+v", c)
	}
	cancel()
	if err := <-ended; errors.Is(err, authority.ErrUnreachable) || !errors.Is(err, context.Canceled) {
		t.Errorf("the watch ended with %v", err)
	}
}

func TestOpenRefuses(t *testing.T) {
	f := start(t, Options{})
	for name, c := range map[string]struct {
		o    Options
		want error
	}{
		"a directory in use":          {Options{DataDir: f.a.o.DataDir}, flock.ErrHeld},
		"no keys, and not loopback":   {Options{DataDir: t.TempDir(), NATSListen: "0.0.0.0:0"}, ErrNoKeys},
		"no keys, and an open API":    {Options{DataDir: t.TempDir(), APIListen: "0.0.0.0:0"}, ErrNoKeys},
		"no keys, and an outside bus": {Options{DataDir: t.TempDir(), NATSURL: "nats://127.0.0.1:1"}, ErrNoKeys},
	} {
		t.Run(name, func(t *testing.T) {
			if a, err := Open(f.ctx, c.o); !errors.Is(err, c.want) {
				t.Errorf("got %v, %v", a, err)
			}
		})
	}
	if err := f.a.Close(); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		o    Options
		want error
	}{
		"the bus without TLS": {Options{DataDir: f.a.o.DataDir, NATSListen: "0.0.0.0:0"}, broker.ErrNoTLS},
		"the API without TLS": {Options{DataDir: f.a.o.DataDir, APIListen: "0.0.0.0:0"}, api.ErrNoTLS},
	} {
		t.Run(name, func(t *testing.T) {
			if a, err := Open(f.ctx, c.o); !errors.Is(err, c.want) {
				t.Errorf("got %v, %v", a, err)
			}
		})
	}
}
