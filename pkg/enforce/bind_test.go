package enforce

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/interlock-fabric/interlock/pkg/session"
)

func mustBind(t testing.TB, e *Enforcer, p *session.Prepared, call session.Call) context.Context {
	t.Helper()
	ctx, _, err := e.Bind(context.Background(), p, call)
	if err != nil {
		t.Fatalf("denied: %v", err)
	}
	return ctx
}

func mustBeCut(ctx context.Context, t testing.TB, want error) {
	t.Helper()
	var d *session.DeniedError
	if err := context.Cause(ctx); !errors.Is(err, want) || !errors.As(err, &d) {
		t.Fatalf("the cause is %v, want %v", err, want)
	}
}

func mustRun(ctx context.Context, t testing.TB) {
	t.Helper()
	if ctx.Err() != nil {
		t.Fatalf("cut: %v", context.Cause(ctx))
	}
}

// TestBindChecksAgain guards the second check of Bind: a revocation that is
// applied after the first check and before the work is registered finds no work
// to cut. Without the second check the work would run on, bound to nothing.
func TestBindChecksAgain(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		var e *Enforcer
		e, _ = b.open(func(o *Options) {
			o.checked = func() {
				b.decide(revoke(b.session("s1")))
				for e.view.Load().tip.number == 0 {
					// The follower applies it, and looks for work to cut.
				}
			}
		})
		defer e.Close()
		ctx, release, err := e.Bind(context.Background(), prepare(t, e, caller("s1")), session.Call{})
		defer release()
		if !errors.Is(err, session.ErrRevoked) {
			t.Fatalf("bound work that is revoked: %v", err)
		}
		mustBeCut(ctx, t, session.ErrRevoked)
		if n := e.Status().Running; n != 0 {
			t.Fatalf("%d running", n)
		}
	})
}

// TestSafetyUnderLoad guards G1: many goroutines check and bind while callers are
// revoked one after the other. Once the enforcer's own state has a batch, no check
// of its caller is allowed and no work of its caller runs. It fails when Bind does
// not check again, when cutBy runs before publish, or when a batch's denials wait
// for the heartbeat.
func TestSafetyUnderLoad(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		const callers, workers = 40, 8
		e, _ := b.open(nil)
		defer e.Close()
		var applied [callers]atomic.Bool
		var prepared [callers]*session.Prepared
		for i := range prepared {
			prepared[i] = prepare(t, e, caller(fmt.Sprint("s", i)))
		}
		type bound struct {
			i   int
			ctx context.Context
		}
		var mu sync.Mutex
		var running []bound
		var load sync.WaitGroup
		stop := make(chan struct{})
		for w := range workers {
			load.Go(func() {
				for n := w; ; n++ {
					select {
					case <-stop:
						return
					default:
					}
					i := n % callers
					was := applied[i].Load()
					err := e.Check(prepared[i], session.Call{Tool: "t"})
					ctx, release, berr := e.Bind(context.Background(), prepared[i], session.Call{Tool: "t"})
					if was && (err == nil || berr == nil) {
						t.Errorf("caller %d was allowed after the batch was applied: %v, %v", i, err, berr)
						return
					}
					if berr == nil && n%3 == 0 {
						mu.Lock()
						running = append(running, bound{i, ctx})
						mu.Unlock()
					} else {
						release()
					}
				}
			})
		}
		for i := range callers {
			frame, _ := b.batch(revoke(b.session(fmt.Sprint("s", i))))
			b.say(frame)
			for e.view.Load().tip.number <= uint64(i) {
				// The follower runs beside this; there is nothing to wait on
				// that the load would not disturb.
			}
			applied[i].Store(true)
			b.accept(frame)
			if i%5 == 0 {
				b.beat()
			}
		}
		close(stop)
		load.Wait()
		b.beat()
		settle()
		for _, r := range running {
			mustBeCut(r.ctx, t, session.ErrRevoked)
		}
		if s := e.Status(); s.Running != 0 || s.Cut != uint64(len(running)) && s.Cut < uint64(len(running)) {
			t.Fatalf("%d running, %d cut of %d", s.Running, s.Cut, len(running))
		}
	})
}

// TestBindExpiry: work ends with its credential, by the later of the local clock
// and the authority's, the issuer's skew allowed for.
func TestBindExpiry(t *testing.T) {
	for _, x := range []struct {
		name            string
		authority, host time.Duration // clocks against the test's
		skew            time.Duration
		want            time.Duration // from the moment of binding
	}{
		{"clocks agree", 0, 0, 0, 2 * time.Minute},
		{"with skew", 0, 0, 5 * time.Second, 2*time.Minute + 5*time.Second},
		{"the authority is ahead", time.Minute, 0, 0, time.Minute},
		{"the host is ahead", 0, time.Minute, 0, time.Minute},
		{"the host is behind", 0, -time.Hour, 0, 2 * time.Minute},
		{"the authority is behind", -time.Hour, 0, 0, 2 * time.Minute},
	} {
		t.Run(x.name, func(t *testing.T) {
			within(t, func(t *testing.T, b *bus) {
				h := newHost()
				h.set(x.host)
				b.as(func(b *bus) { b.wall = x.authority })
				e, _ := b.open(func(o *Options) { o.clock = h.read })
				defer e.Close()
				id := caller("s1")
				id.Expires, id.Skew = time.Now().Add(2*time.Minute), x.skew
				p := prepare(t, e, id)
				ctx := mustBind(t, e, p, session.Call{})
				forever := mustBind(t, e, prepare(t, e, caller("s2")), session.Call{})
				time.Sleep(x.want - 100*time.Millisecond)
				settle()
				mustRun(ctx, t)
				mustAllow(t, e, p, session.Call{})
				time.Sleep(300 * time.Millisecond)
				settle()
				mustBeCut(ctx, t, session.ErrExpired)
				mustDeny(t, e, p, session.Call{}, session.ErrExpired)
				mustRun(forever, t)
			})
		})
	}
}

// TestFailure03TokenNearExpiryIsStillChecked: elsewhere, tokens about to expire
// skipped the check. Here there is no such window.
func TestFailure03TokenNearExpiryIsStillChecked(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		e, _ := b.open(nil)
		defer e.Close()
		b.decide(revoke(b.session("s1")))
		settle()
		for _, left := range []time.Duration{time.Hour, time.Second, 10 * time.Millisecond, time.Millisecond} {
			id := caller("s1")
			id.Expires = time.Now().Add(left)
			mustDeny(t, e, prepare(t, e, id), session.Call{}, session.ErrRevoked)
		}
		id := caller("s2")
		id.Expires = time.Now()
		mustDeny(t, e, prepare(t, e, id), session.Call{}, session.ErrExpired)
	})
}

// TestBindBound: beyond MaxBound Bind denies, since it could not promise to end
// the work, and room is made by release, once however often it is called.
func TestBindBound(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		e, _ := b.open(func(o *Options) { o.MaxBound = 2 })
		defer e.Close()
		p := prepare(t, e, caller("s1"))
		ctx, release, err := e.Bind(context.Background(), p, session.Call{})
		if err != nil {
			t.Fatal(err)
		}
		second := mustBind(t, e, p, session.Call{})
		over, done, err := e.Bind(context.Background(), p, session.Call{})
		if !errors.Is(err, session.ErrOverloaded) || over.Err() == nil {
			t.Fatalf("%v", err)
		}
		done()
		for range 3 {
			release()
		}
		if ctx.Err() == nil || !errors.Is(context.Cause(ctx), context.Canceled) {
			t.Fatalf("released work has the cause %v", context.Cause(ctx))
		}
		if n := e.Status().Running; n != 1 {
			t.Fatalf("%d running", n)
		}
		mustBind(t, e, p, session.Call{})
		if _, _, err := e.Bind(context.Background(), p, session.Call{}); !errors.Is(err, session.ErrOverloaded) {
			t.Fatal(err)
		}
		mustRun(second, t)
	})
}

// TestCloseCutsAndJoins: Close ends the work and every goroutine (goleak and the
// bubble see to that), may be repeated and raced, and everything is denied since.
func TestCloseCutsAndJoins(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		e, f := b.open(nil)
		p := prepare(t, e, caller("s1"))
		ctx := mustBind(t, e, p, session.Call{})
		var closers sync.WaitGroup
		for range 4 {
			closers.Go(func() {
				if err := e.Close(); err != nil {
					t.Error(err)
				}
				mustDenyIn(t, e, p)
			})
		}
		closers.Wait()
		mustBeCut(ctx, t, session.ErrClosed)
		if !f.closed {
			t.Fatal("the feed is open")
		}
		if _, _, err := e.Bind(context.Background(), p, session.Call{}); !errors.Is(err, session.ErrClosed) {
			t.Fatal(err)
		}
		if err := e.WaitReady(context.Background()); !errors.Is(err, session.ErrClosed) {
			t.Fatal(err)
		}
		e2, _ := b.start(nil)
		e2.Close()
		if err := e2.WaitReady(context.Background()); !errors.Is(err, session.ErrClosed) {
			t.Fatal(err)
		}
	})
}

func mustDenyIn(t testing.TB, e *Enforcer, p *session.Prepared) {
	if err := e.Check(p, session.Call{}); !errors.Is(err, session.ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
}

// TestBindTools: an entry on a user and a tool cuts the work of that tool alone.
func TestBindTools(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		e, _ := b.open(nil)
		defer e.Close()
		p := prepare(t, e, caller("s1"))
		other := caller("s1")
		other.User = "bob"
		q := prepare(t, e, other)
		drop, read := mustBind(t, e, p, session.Call{Tool: "drop"}), mustBind(t, e, p, session.Call{Tool: "read"})
		bobs := mustBind(t, e, q, session.Call{Tool: "drop"})
		nameless := mustBind(t, e, p, session.Call{})
		b.decide(revoke(b.target("acme", session.Term{Kind: session.KindUser, Issuer: iss, Value: "alice"}, session.Term{Kind: session.KindTool, Value: "drop"})))
		settle()
		mustBeCut(drop, t, session.ErrRevoked)
		for _, ctx := range []context.Context{read, bobs, nameless} {
			mustRun(ctx, t)
		}
		mustDeny(t, e, p, session.Call{Tool: "drop"}, session.ErrRevoked)
		mustAllow(t, e, p, session.Call{Tool: "read"})
		// What has no canonical name can never be named in an entry.
		if _, _, err := e.Bind(context.Background(), p, session.Call{Tool: "a\x00b"}); !errors.Is(err, session.ErrNoIdentity) {
			t.Fatal(err)
		}
	})
}

// TestKills: one entry ends everything in a tenant, or everything; the exempt go
// on, a drill cuts nobody and is counted, and a staged restore frees its share.
func TestKills(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		e, _ := b.open(nil)
		defer e.Close()
		var ps []*session.Prepared
		var ctxs []context.Context
		for i := range 200 {
			id := caller(fmt.Sprint("s", i))
			if i == 0 {
				id.Roles = []string{"responder"}
			}
			ps = append(ps, prepare(t, e, id))
			ctxs = append(ctxs, mustBind(t, e, ps[i], session.Call{}))
		}
		foreign := caller("x")
		foreign.Tenant = "globex"
		elsewhere := mustBind(t, e, prepare(t, e, foreign), session.Call{})

		drill := revoke(session.TenantKey(1))
		drill.Drill, drill.Reason = true, session.ReasonDrill
		b.decide(drill)
		settle()
		for i := range ps {
			mustRun(ctxs[i], t)
			mustAllow(t, e, ps[i], session.Call{})
		}
		if n := e.Status().Drills; n != uint64(len(ps)) {
			t.Fatalf("%d drills", n)
		}

		kill := set(session.EffectSuspended, session.TenantKey(1))
		kill.Except = session.SortKeys([]session.Key{b.target("acme", session.Term{Kind: session.KindRole, Value: "responder"})})
		b.decide(kill)
		settle()
		mustRun(ctxs[0], t)
		mustAllow(t, e, ps[0], session.Call{})
		for i := 1; i < len(ps); i++ {
			mustBeCut(ctxs[i], t, session.ErrSuspended)
		}
		mustRun(elsewhere, t)

		stage := lift(session.EffectSuspended, session.TenantKey(1))
		stage.Share = session.ShareUnit / 4
		b.decide(stage)
		settle()
		free := 0
		for _, p := range ps[1:] {
			if e.Check(p, session.Call{}) == nil {
				free++
			}
		}
		if free < 25 || free > 80 {
			t.Fatalf("a quarter restored frees %d of %d", free, len(ps)-1)
		}
		stage.Share = session.ShareUnit
		b.decide(stage)
		settle()
		for _, p := range ps {
			mustAllow(t, e, p, session.Call{})
		}

		b.decide(revoke(session.GlobalKey()))
		settle()
		mustBeCut(elsewhere, t, session.ErrRevoked)
		mustBeCut(ctxs[0], t, session.ErrRevoked)
	})
}

// TestFailure16OneInstancesLockLeavesOthers: an entry on one session of an agent
// is not one on the agent.
func TestFailure16OneInstancesLockLeavesOthers(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		e, _ := b.open(nil)
		defer e.Close()
		one, two := caller("s1"), caller("s2")
		one.Actors, two.Actors = []session.Actor{{ID: "spiffe://acme/agent/bot"}}, []session.Actor{{ID: "spiffe://acme/agent/bot"}}
		p, q := prepare(t, e, one), prepare(t, e, two)
		c1, c2 := mustBind(t, e, p, session.Call{}), mustBind(t, e, q, session.Call{})
		b.decide(revoke(b.session("s1")))
		settle()
		mustBeCut(c1, t, session.ErrRevoked)
		mustRun(c2, t)
		mustAllow(t, e, q, session.Call{})
		b.decide(set(session.EffectSuspended, b.target("acme", session.Term{Kind: session.KindAgent, Value: "spiffe://acme/agent/bot"})))
		settle()
		mustBeCut(c2, t, session.ErrSuspended)
	})
}

// TestFailure09CascadeOverADeadIntermediate: the entry is on the grandparent; the
// parent has long ended and nobody enumerates children. A child minted after the
// entry is denied, too.
func TestFailure09CascadeOverADeadIntermediate(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		e, _ := b.open(nil)
		defer e.Close()
		child := caller("child")
		child.Ancestors = []session.SessionRef{{ID: "parent"}, {ID: "grandparent"}}
		child.Actors = []session.Actor{{ID: "spiffe://acme/agent/leaf"}, {ID: "spiffe://acme/agent/middle"}}
		p := prepare(t, e, child)
		ctx := mustBind(t, e, p, session.Call{})
		b.decide(revoke(b.session("grandparent")))
		settle()
		mustBeCut(ctx, t, session.ErrRevoked)
		later := child
		later.Session.ID, later.Token = "later", "later"
		mustDeny(t, e, prepare(t, e, later), session.Call{}, session.ErrRevoked)

		middle := caller("m")
		middle.Actors = child.Actors
		q := prepare(t, e, middle)
		mustAllow(t, e, q, session.Call{})
		b.decide(revoke(b.target("acme", session.Term{Kind: session.KindAgent, Value: "spiffe://acme/agent/middle"})))
		settle()
		mustDeny(t, e, q, session.Call{}, session.ErrRevoked)
	})
}

// TestZeroEnforcer guards the half of G7 that is about misuse: the zero value, nil
// and a missing identity deny.
func TestZeroEnforcer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBus(t)
		secret := b.enrol("x").Tenants[0]
		p, err := secret.Prepare(caller("s1"))
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range []*Enforcer{nil, {}} {
			mustDeny0 := func(err error, want error) {
				t.Helper()
				if !errors.Is(err, want) {
					t.Errorf("got %v, want %v", err, want)
				}
			}
			mustDeny0(e.Check(p, session.Call{}), session.ErrStale)
			ctx, release, err := e.Bind(context.Background(), p, session.Call{})
			release()
			mustDeny0(err, session.ErrStale)
			mustDeny0(context.Cause(ctx), session.ErrStale)
			_, err = e.Prepare(caller("s1"))
			mustDeny0(err, session.ErrNoIdentity)
			mustDeny0(e.WaitReady(context.Background()), session.ErrClosed)
			if s := e.Status(); s.Ready || s.Fresh || s.Why == "" {
				t.Errorf("status %+v", s)
			}
			if err := e.Close(); err != nil {
				t.Error(err)
			}
		}
	})
	within(t, func(t *testing.T, b *bus) {
		e, _ := b.open(nil)
		defer e.Close()
		mustDeny(t, e, nil, session.Call{}, session.ErrNoIdentity)
		mustDeny(t, e, &session.Prepared{}, session.Call{}, session.ErrNoIdentity)
		// Prepared under another enrolment's secret: its keys would match nothing.
		p, err := b.enrol("other").Tenants[0].Prepare(caller("s1"))
		if err != nil {
			t.Fatal(err)
		}
		mustDeny(t, e, p, session.Call{}, session.ErrNoIdentity)
		id := caller("s1")
		id.Tenant = "initech"
		if _, err := e.Prepare(id); !errors.Is(err, session.ErrNoIdentity) {
			t.Error(err)
		}
	})
}
