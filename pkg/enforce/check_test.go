package enforce

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/interlock-fabric/interlock/pkg/session"
)

// TestCheckWaitsForNobody guards the first half of G8: with every mutex of the
// enforcer held and the follower blocked, Check still answers. It would hang if it
// took any of them.
func TestCheckWaitsForNobody(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		e, f := b.open(nil)
		defer e.Close()
		p, q := prepare(t, e, caller("s1")), prepare(t, e, caller("s2"))
		b.decide(revoke(b.session("s2")))
		settle()
		busy, stop := make(chan struct{}), make(chan struct{})
		f.to().(sink).push(func() { close(busy); <-stop })
		<-busy
		e.bound.mu.Lock()
		mustAllow(t, e, p, session.Call{Tool: "read"})
		mustDeny(t, e, q, session.Call{Tool: "read"}, session.ErrRevoked)
		e.Status()
		e.bound.mu.Unlock()
		close(stop)
	})
}

// TestCheckAllocatesNothing guards the second half of G8, for each kind of allow.
func TestCheckAllocatesNothing(t *testing.T) {
	for _, x := range []struct {
		name  string
		mode  session.Mode
		entry func(b *bus) session.Entry
		stale bool
	}{
		{"nothing in force", session.ModeStrict, nil, false},
		{"others revoked", session.ModeStrict, func(b *bus) session.Entry { return revoke(b.session("s2")) }, false},
		{"tools in force", session.ModeStrict, func(b *bus) session.Entry {
			return revoke(b.target("acme", session.Term{Kind: session.KindUser, Issuer: iss, Value: "alice"}, session.Term{Kind: session.KindTool, Value: "drop"}))
		}, false},
		{"stale, best effort", session.ModeBestEffort, func(b *bus) session.Entry { return revoke(b.session("s2")) }, true},
	} {
		t.Run(x.name, func(t *testing.T) {
			within(t, func(t *testing.T, b *bus) {
				var log bytes.Buffer
				e, _ := b.open(func(o *Options) { o.Mode = x.mode; o.Logger = slog.New(slog.NewTextHandler(&log, nil)) })
				defer e.Close()
				p := prepare(t, e, caller("s1"))
				if x.entry != nil {
					b.decide(x.entry(b))
				}
				// Unconfirmed and inherited entries are looked at, too.
				b.newEpoch()
				b.say(first(b.batch(revoke(b.session("s3")))))
				settle()
				if x.stale {
					b.with(func(b *bus) { b.dead = true })
					time.Sleep(time.Minute)
				}
				settle()
				before := log.Len()
				call := session.Call{Tool: "read", Audience: "https://api.example/a"}
				if n := testing.AllocsPerRun(100, func() { mustAllow(t, e, p, call) }); n != 0 {
					t.Errorf("%v allocations", n)
				}
				if log.Len() != before {
					t.Errorf("logged: %s", log.String()[before:])
				}
			})
		})
	}
}

func first[A, B any](a A, _ B) A { return a }

// TestFailure01NotReadyWhileEmpty and its like: elsewhere, a filter that had
// loaded nothing answered "not revoked". Here nothing is allowed before a
// heartbeat has vouched for the state, however much of the log was read.
func TestFailure01NotReadyWhileEmpty(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBus(t)
		b.accept(first(b.batch(revoke(b.session("s1")))))
		e, _ := b.start(nil)
		defer e.Close()
		p, q := prepare(t, e, caller("s1")), prepare(t, e, caller("s2"))
		time.Sleep(5 * time.Second)
		if s := e.Status(); s.Ready || s.Applied != 1 {
			t.Fatalf("status %+v", s) // the log has been read, the head is hearsay
		}
		mustDeny(t, e, q, session.Call{}, session.ErrStale)
		mustDeny(t, e, p, session.Call{}, session.ErrStale)
		b.beat()
		settle()
		mustAllow(t, e, q, session.Call{})
		mustDeny(t, e, p, session.Call{}, session.ErrRevoked)
	})
}

// TestFailure04DeadBusAtBoot guards G7: an empty disk and a dead bus. The first
// request is denied and so is every other; Open says what is missing; when the bus
// comes up the enforcer does.
func TestFailure04DeadBusAtBoot(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		b.with(func(b *bus) { b.dead = true })
		b.decide(revoke(b.session("s1")))
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		if _, err := Open(ctx, b.feed(), &Options{Enrollment: b.enrol("e2"), StateDir: t.TempDir()}); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "cannot subscribe to the bus") {
			t.Fatalf("%v", err)
		}
		e, _ := b.start(func(o *Options) { o.StateDir = t.TempDir() })
		defer e.Close()
		p, q := prepare(t, e, caller("s1")), prepare(t, e, caller("s2"))
		for range 20 {
			mustDeny(t, e, q, session.Call{}, session.ErrStale)
			time.Sleep(time.Second)
			// What the bus said is for operators; a caller learns fixed words.
			if err := e.Check(q, session.Call{}); strings.Contains(err.Error(), errDead.Error()) || !strings.Contains(e.Status().Why, errDead.Error()) {
				t.Fatalf("%v; %s", err, e.Status().Why)
			}
		}
		b.with(func(b *bus) { b.dead = false })
		time.Sleep(4 * time.Second)
		settle()
		mustAllow(t, e, q, session.Call{})
		mustDeny(t, e, p, session.Call{}, session.ErrRevoked)
	})
}

// TestOpenSaysWhatIsMissing: the error of an Open that gave up names the step.
func TestOpenSaysWhatIsMissing(t *testing.T) {
	for _, x := range []struct {
		name string
		mod  func(b *bus)
		want string
	}{
		{"no key set", func(b *bus) { b.keySets = nil }, "no key set yet"},
		{"no clock", func(b *bus) { b.delay = time.Hour }, "no authority answers"},
		{"no heartbeat", func(b *bus) { b.silent = true }, "no heartbeat from the authority yet"},
		{"no log", func(b *bus) { b.noLog = true }, "the log cannot be read: the bus is dead"},
		{"another root", func(b *bus) { b.root = key(b.t) }, "the key set on the bus is not trusted"},
	} {
		t.Run(x.name, func(t *testing.T) {
			within(t, func(t *testing.T, b *bus) {
				b.decide(revoke(b.session("s1")))
				b.writing.Lock()
				b.with(x.mod)
				b.writing.Unlock()
				ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
				defer cancel()
				_, err := Open(ctx, b.feed(), &Options{Enrollment: b.enrol("e1")})
				if err == nil || !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), x.want) || !strings.Contains(err.Error(), "e1") {
					t.Fatalf("%v, want %q", err, x.want)
				}
			})
		})
	}
}

// TestFailure05ARefusedFirstFetchIsNotTheEnd: elsewhere, an error on the first
// fetch meant no list, ever. Here each step is tried again.
func TestFailure05ARefusedFirstFetchIsNotTheEnd(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		b.decide(revoke(b.session("s1")))
		b.with(func(b *bus) { b.noLog, b.delay = true, time.Hour })
		var hidden [][]byte
		b.with(func(b *bus) { hidden, b.keySets = b.keySets, nil })
		e, _ := b.start(nil)
		defer e.Close()
		p := prepare(t, e, caller("s1"))
		time.Sleep(time.Minute)
		b.with(func(b *bus) { b.keySets = hidden })
		time.Sleep(time.Minute)
		b.with(func(b *bus) { b.delay = 0 })
		time.Sleep(time.Minute)
		mustDeny(t, e, p, session.Call{}, session.ErrStale)
		b.with(func(b *bus) { b.noLog = false })
		time.Sleep(3 * time.Second)
		settle()
		mustDeny(t, e, p, session.Call{}, session.ErrRevoked)
		mustAllow(t, e, prepare(t, e, caller("s2")), session.Call{})
	})
}

// TestFailure06SilenceIsNotHealth: a link that is up and silent looks like one that
// is down (see TestStaleBound for the bound): no error is needed to notice.
func TestFailure06SilenceIsNotHealth(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		e, f := b.open(nil)
		defer e.Close()
		p := prepare(t, e, caller("s1"))
		b.as(func(b *bus) { b.silent = true })
		for range 20 {
			f.to().Connected(true) // the link insists
			time.Sleep(time.Second)
		}
		mustDeny(t, e, p, session.Call{}, session.ErrStale)
	})
}

// TestFailure07ALostSubscriptionIsSeen: batches no longer arrive while heartbeats
// do. The heartbeat's head shows the gap and the log repairs it; without a log to
// read, the state goes stale.
func TestFailure07ALostSubscriptionIsSeen(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		e, _ := b.open(nil)
		defer e.Close()
		p, q := prepare(t, e, caller("s1")), prepare(t, e, caller("s2"))
		ctx := mustBind(t, e, p, session.Call{})
		b.accept(first(b.batch(revoke(b.session("s1"))))) // stored, and never heard
		time.Sleep(time.Second)
		settle()
		mustDeny(t, e, p, session.Call{}, session.ErrRevoked)
		mustBeCut(ctx, t, session.ErrRevoked)
		mustAllow(t, e, q, session.Call{})
		if s := e.Status(); s.Confirmed != 1 || s.Repairs == 0 {
			t.Fatalf("status %+v", s)
		}
		b.with(func(b *bus) { b.noLog = true })
		b.accept(first(b.batch(revoke(b.session("s2")))))
		time.Sleep(DefaultMaxStale + time.Second)
		mustDeny(t, e, q, session.Call{}, session.ErrStale)
	})
}

// TestEffects: what each effect denies, which outranks which, and what undoes it.
func TestEffects(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		e, _ := b.open(nil)
		defer e.Close()
		id := caller("s1")
		id.AuthTime, id.ACR = time.Now().Add(-time.Hour), "pwd"
		p := prepare(t, e, id)
		low := session.Call{Tool: "read", LowRisk: true}
		decide := func(entries ...session.Entry) { t.Helper(); b.decide(entries...); settle() }

		decide(set(session.EffectReduced, b.user("alice")))
		mustAllow(t, e, p, low)
		mustDeny(t, e, p, session.Call{}, session.ErrReduced)

		step := set(session.EffectStepUp, b.user("alice"))
		step.ACR = "mfa"
		decide(step)
		mustDeny(t, e, p, low, session.ErrStepUp)
		var d *session.DeniedError
		if err := e.Check(p, low); !errors.As(err, &d) || d.ACR != "mfa" || d.Provisional || d.Seq != 2 {
			t.Fatalf("%+v", d)
		}
		decide(set(session.EffectSuspended, b.session("s1")))
		mustDeny(t, e, p, low, session.ErrSuspended)
		decide(revoke(b.user("alice")))
		mustDeny(t, e, p, low, session.ErrRevoked)

		// Lifted from the strongest down: each uncovers the next.
		restore := lift(session.EffectRevoked, b.user("alice"))
		restore.IssuedBefore = session.InstantOf(time.Now())
		decide(restore)
		mustDeny(t, e, p, low, session.ErrRevoked) // from before: it stays dead
		time.Sleep(time.Second)
		id.AuthTime = time.Now()
		p = prepare(t, e, id)
		mustDeny(t, e, p, low, session.ErrSuspended)
		decide(lift(session.EffectSuspended, b.session("s1")))
		mustDeny(t, e, p, low, session.ErrStepUp) // later, but only by password
		id.ACR = "mfa"
		p = prepare(t, e, id)
		mustAllow(t, e, p, low)
		mustDeny(t, e, p, session.Call{}, session.ErrReduced)
		decide(lift(session.EffectReduced, b.user("alice")))
		mustAllow(t, e, p, session.Call{})
	})
}

// TestFailure15ALateSuspendNeverUndoesARevoke, nor does a late resume, in
// whatever order the three come.
func TestFailure15ALateSuspendNeverUndoesARevoke(t *testing.T) {
	type op func(session.Key) session.Entry
	suspend := func(k session.Key) session.Entry {
		e := set(session.EffectSuspended, k)
		e.Expires = session.InstantOf(time.Now().Add(time.Second))
		return e
	}
	resume := func(k session.Key) session.Entry { return lift(session.EffectSuspended, k) }
	for _, order := range [][]op{
		{revoke, suspend, resume}, {revoke, resume, suspend}, {suspend, revoke, resume},
		{suspend, resume, revoke}, {resume, revoke, suspend}, {resume, suspend, revoke},
	} {
		within(t, func(t *testing.T, b *bus) {
			e, _ := b.open(nil)
			defer e.Close()
			p := prepare(t, e, caller("s1"))
			for _, op := range order {
				b.decide(op(b.session("s1")))
			}
			settle()
			mustDeny(t, e, p, session.Call{}, session.ErrRevoked)
			time.Sleep(3 * time.Second)
			mustDeny(t, e, p, session.Call{}, session.ErrRevoked)
		})
	}
}

// TestSuspensionEnds by the authority's clock alone: a host whose clock is ahead
// frees nobody early.
func TestSuspensionEnds(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		h := newHost()
		h.set(time.Hour)
		e, _ := b.open(func(o *Options) { o.clock = h.read })
		defer e.Close()
		p := prepare(t, e, caller("s1"))
		x := set(session.EffectSuspended, b.session("s1"))
		x.Expires = session.InstantOf(time.Now().Add(10 * time.Second))
		b.decide(x)
		settle()
		time.Sleep(9900 * time.Millisecond)
		mustDeny(t, e, p, session.Call{}, session.ErrSuspended)
		time.Sleep(200 * time.Millisecond)
		mustAllow(t, e, p, session.Call{})
	})
}
