package enforce

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/interlock-fabric/interlock/pkg/session"
)

// host is the machine that an enforcer runs on, with clocks of its own.
type host struct {
	mu      sync.Mutex
	base    time.Time
	stopped time.Duration // how long it has been suspended
	wall    time.Duration // its wall clock against the test's
	frozen  *reading
}

func newHost() *host { return &host{base: time.Now()} }

func (h *host) read() reading {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.frozen != nil {
		return *h.frozen
	}
	now := time.Now()
	return reading{mono: now.Sub(h.base) - h.stopped, wall: now.Add(h.wall).UnixNano()}
}

// suspend puts the host to sleep: its monotonic clock stands still, and nothing
// that runs on it sees any time pass until it wakes.
func (h *host) suspend(d time.Duration) {
	r := h.read()
	h.mu.Lock()
	h.frozen = &r
	h.mu.Unlock()
	time.Sleep(d)
	h.mu.Lock()
	h.frozen, h.stopped = nil, h.stopped+d
	h.mu.Unlock()
}

func (h *host) set(wall time.Duration) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.wall = wall
}

// recovers fails unless the caller is allowed again within two seconds.
func recovers(t testing.TB, e *Enforcer, p *session.Prepared) {
	t.Helper()
	time.Sleep(2 * time.Second)
	settle()
	mustAllow(t, e, p, session.Call{})
}

// TestStaleBound guards G2: whatever is done to the bus, requests are denied once
// the newest proof that reached the enforcer is MaxStale old, not later and, but
// for the errors of the clocks, not earlier, and are allowed again afterwards.
// Without the age of the anchor's estimate (anchor.earliest) a delay or a replay
// would count as fresh; without Heartbeat.Proven a deposed writer's word would.
func TestStaleBound(t *testing.T) {
	faults := []struct {
		name string
		on   func(b *bus) (step func())
		off  func(b *bus)
	}{
		{"cut", func(b *bus) func() {
			b.with(func(b *bus) { b.dead = true })
			return func() { b.beat() }
		}, func(b *bus) { b.with(func(b *bus) { b.dead = false }) }},
		{"half open, the log can be read", func(b *bus) func() {
			b.with(func(b *bus) { b.mute = true })
			return func() { b.beat() }
		}, func(b *bus) { b.with(func(b *bus) { b.mute = false }) }},
		{"frozen, then all at once", func(b *bus) func() {
			b.with(func(b *bus) { b.hold = true })
			return func() { b.beat() }
		}, func(b *bus) { b.release() }},
		{"recorded heartbeats are played", func(b *bus) func() {
			b.with(func(b *bus) { b.mute = true })
			var tape [][]byte
			return func() {
				if len(tape) < 20 {
					tape = append(tape, b.beat())
				}
				b.deliver(func(s Sink) {
					for _, f := range tape[:len(tape)/20] { // one, once there are twenty
						s.Beat(f)
					}
				})
			}
		}, func(b *bus) { b.with(func(b *bus) { b.mute = false }) }},
		{"a deposed writer goes on talking", func(b *bus) func() {
			deposed := time.Now()
			return func() { b.as(func(b *bus) { b.proven = time.Since(deposed); b.beatLocked() }) }
		}, func(b *bus) { b.as(func(b *bus) { b.proven = 0 }) }},
		{"the writer is silent", func(*bus) func() { return func() {} }, func(*bus) {}},
		{"the log cannot be read and batches are lost", func(b *bus) func() {
			b.with(func(b *bus) { b.noLog, b.mute = true, true })
			b.decide(revoke(b.session("other")))
			b.with(func(b *bus) { b.mute = false })
			return func() { b.beat() }
		}, func(b *bus) { b.with(func(b *bus) { b.noLog = false }) }},
	}
	for _, f := range faults {
		for _, limit := range []time.Duration{MinMaxStale, DefaultMaxStale} {
			t.Run(f.name+"/"+limit.String(), func(t *testing.T) {
				within(t, func(t *testing.T, b *bus) {
					e, _ := b.open(func(o *Options) { o.MaxStale = limit })
					defer e.Close()
					p := prepare(t, e, caller("s1"))
					time.Sleep(3 * time.Second)
					b.as(func(b *bus) { b.silent = true; b.beatLocked() })
					settle()
					last := time.Now()
					step := f.on(b)
					denied := time.Duration(0)
					for at := time.Duration(0); at < limit+time.Second; at = time.Since(last) {
						if errors.Is(e.Check(p, session.Call{}), session.ErrStale) {
							denied = at
							break
						}
						if at%(100*time.Millisecond) == 0 {
							step()
						}
						time.Sleep(10 * time.Millisecond)
					}
					if denied == 0 || denied > limit+10*time.Millisecond || denied < limit-50*time.Millisecond {
						t.Fatalf("denied after %v, MaxStale is %v", denied, limit)
					}
					mustDeny(t, e, p, session.Call{}, session.ErrStale)
					if s := e.Status(); s.Fresh || s.Why == "" || s.Age < limit {
						t.Fatalf("status %+v", s)
					}
					f.off(b)
					b.as(func(b *bus) { b.silent = false })
					recovers(t, e, p)
				})
			})
		}
	}
}

// TestDelayedByAnHour: a bus that delays everything delivers signed heartbeats
// steadily, each an hour old. Nothing is ever fresh by them.
func TestDelayedByAnHour(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		e, _ := b.open(nil)
		defer e.Close()
		p := prepare(t, e, caller("s1"))
		b.with(func(b *bus) { b.hold, b.delay = true, time.Hour })
		b.as(func(b *bus) { b.silent = true })
		for range 60 {
			b.beat()
			time.Sleep(500 * time.Millisecond)
		}
		time.Sleep(time.Hour)
		held := b.held
		b.with(func(b *bus) { b.hold, b.held = false, nil })
		for _, fn := range held {
			b.deliver(fn)
			settle()
			mustDeny(t, e, p, session.Call{}, session.ErrStale)
			time.Sleep(500 * time.Millisecond)
		}
		b.with(func(b *bus) { b.delay = 0 })
		b.as(func(b *bus) { b.silent = false })
		recovers(t, e, p)
	})
}

// TestDelayedFromTheStart: the same bus from boot on. A clock answer that takes
// an hour anchors nothing, so Open never returns.
func TestDelayedFromTheStart(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		b.with(func(b *bus) { b.delay = time.Hour })
		e, _ := b.start(nil)
		defer e.Close()
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
		defer cancel()
		if err := e.WaitReady(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatal(err)
		}
		mustDeny(t, e, prepare(t, e, caller("s1")), session.Call{}, session.ErrStale)
	})
}

// TestFirstStateMustBeFresh: the first heartbeat is old already. Ready means that
// requests are allowed, not that something was heard.
func TestFirstStateMustBeFresh(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		b.as(func(b *bus) { b.proven = time.Hour })
		e, _ := b.start(nil)
		defer e.Close()
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := e.WaitReady(ctx); err == nil {
			t.Fatal("ready by a proof that is an hour old")
		}
		b.as(func(b *bus) { b.proven = 0 })
		recovers(t, e, prepare(t, e, caller("s1")))
	})
}

// TestSuspendedHost: the monotonic clock stands still while the host sleeps, so
// by it a state of an hour ago is seconds old. The wall clock tells. Without the
// comparison (jumped) the first request after waking would be allowed; without
// the wall clock's share of the age, one after a sleep just short of jumpLimit.
func TestSuspendedHost(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		h := newHost()
		e, _ := b.open(func(o *Options) { o.clock = h.read })
		defer e.Close()
		p := prepare(t, e, caller("s1"))
		ctx, release, err := e.Bind(context.Background(), p, session.Call{})
		if err != nil {
			t.Fatal(err)
		}
		defer release()
		b.with(func(b *bus) { b.hold = true })
		h.suspend(10 * time.Minute)
		// What was sent meanwhile is not read yet: the first request is here.
		mustDeny(t, e, p, session.Call{}, session.ErrStale)
		time.Sleep(tickEvery)
		settle()
		if !errors.Is(context.Cause(ctx), session.ErrStale) {
			t.Fatalf("running work: %v", context.Cause(ctx))
		}
		b.release()
		recovers(t, e, p)
		if n := e.Status().Jumps; n != 1 {
			t.Fatalf("%d jumps counted", n)
		}
	})
	within(t, func(t *testing.T, b *bus) {
		h := newHost()
		e, _ := b.open(func(o *Options) { o.clock = h.read; o.MaxStale = 2 * time.Second })
		defer e.Close()
		p := prepare(t, e, caller("s1"))
		b.as(func(b *bus) { b.silent = true; b.beatLocked() })
		settle()
		time.Sleep(1300 * time.Millisecond)
		mustAllow(t, e, p, session.Call{})
		h.suspend(900 * time.Millisecond)
		mustDeny(t, e, p, session.Call{}, session.ErrStale)
	})
}

// TestWallClockJumps: a clock that is set counts as stale until the authority's
// is anchored anew, whichever way it went, and then matters no more.
func TestWallClockJumps(t *testing.T) {
	for _, by := range []time.Duration{time.Hour, -time.Hour} {
		within(t, func(t *testing.T, b *bus) {
			h := newHost()
			e, _ := b.open(func(o *Options) { o.clock = h.read })
			defer e.Close()
			p := prepare(t, e, caller("s1"))
			h.set(by)
			mustDeny(t, e, p, session.Call{}, session.ErrStale)
			recovers(t, e, p)
			if s := e.Status(); s.Jumps != 1 {
				t.Fatalf("by %v: %d jumps", by, s.Jumps)
			}
		})
	}
}

// TestMaxStaleRunning: work that runs may outlast a staleness that denies new
// requests, up to its own bound; the call's own demand is the lesser.
func TestMaxStaleRunning(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		e, _ := b.open(func(o *Options) { o.MaxStale, o.MaxStaleRunning = 5*time.Second, 20*time.Second })
		defer e.Close()
		p := prepare(t, e, caller("s1"))
		bind := func(c session.Call) context.Context {
			ctx, _, err := e.Bind(context.Background(), p, c)
			if err != nil {
				t.Fatal(err)
			}
			return ctx
		}
		patient, demanding := bind(session.Call{}), bind(session.Call{MaxStale: 8 * time.Second})
		b.as(func(b *bus) { b.silent = true; b.beatLocked() })
		settle()
		for _, x := range []struct {
			after              time.Duration
			denies, cut8, cut0 bool
		}{
			{4900 * time.Millisecond, false, false, false},
			{5100 * time.Millisecond, true, false, false},
			{7900 * time.Millisecond, true, false, false},
			{8100 * time.Millisecond, true, true, false},
			{19900 * time.Millisecond, true, true, false},
			{20100 * time.Millisecond, true, true, true},
		} {
			time.Sleep(x.after - e.Status().Age.Truncate(100*time.Millisecond))
			settle()
			if denies := e.Check(p, session.Call{}) != nil; denies != x.denies || (demanding.Err() != nil) != x.cut8 || (patient.Err() != nil) != x.cut0 {
				t.Fatalf("after %v: denies %t, cut %t, %t", e.Status().Age, denies, demanding.Err() != nil, patient.Err() != nil)
			}
		}
		if !errors.Is(context.Cause(patient), session.ErrStale) || !errors.Is(context.Cause(demanding), session.ErrStale) {
			t.Fatal("cut for another cause")
		}
		if s := e.Status(); s.Cut != 2 || s.Running != 0 {
			t.Fatalf("%d cut, %d running", s.Cut, s.Running)
		}
	})
}

// TestCallMaxStale: an operation may demand fresher state than the enforcer's
// bound, never older.
func TestCallMaxStale(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		e, _ := b.open(func(o *Options) { o.MaxStale = 5 * time.Second })
		defer e.Close()
		p := prepare(t, e, caller("s1"))
		b.as(func(b *bus) { b.silent = true; b.beatLocked() })
		settle()
		time.Sleep(3 * time.Second)
		mustAllow(t, e, p, session.Call{})
		mustAllow(t, e, p, session.Call{MaxStale: time.Hour})
		mustDeny(t, e, p, session.Call{MaxStale: 2 * time.Second}, session.ErrStale)
		time.Sleep(3 * time.Second)
		mustDeny(t, e, p, session.Call{MaxStale: time.Hour}, session.ErrStale)
	})
}

// TestBestEffort: failing open is counted, spares strict operations, knows who
// was revoked, and does not begin before there was any state.
func TestBestEffort(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		b.with(func(b *bus) { b.dead = true })
		e, _ := b.start(func(o *Options) { o.Mode = session.ModeBestEffort })
		defer e.Close()
		p, q := prepare(t, e, caller("s1")), prepare(t, e, caller("s2"))
		time.Sleep(time.Second)
		mustDeny(t, e, p, session.Call{}, session.ErrStale) // G7
		b.with(func(b *bus) { b.dead = false })
		time.Sleep(5 * time.Second)
		b.decide(revoke(b.session("s2")))
		settle()
		ctx, release, err := e.Bind(context.Background(), p, session.Call{})
		if err != nil {
			t.Fatal(err)
		}
		defer release()
		strict, _, err := e.Bind(context.Background(), p, session.Call{Strict: true})
		if err != nil {
			t.Fatal(err)
		}
		b.with(func(b *bus) { b.dead = true })
		time.Sleep(time.Minute)
		mustAllow(t, e, p, session.Call{})
		mustDeny(t, e, p, session.Call{Strict: true}, session.ErrStale)
		mustDeny(t, e, q, session.Call{}, session.ErrRevoked)
		if s := e.Status(); s.Fresh || s.Exposed != 1 {
			t.Fatalf("status %+v", s)
		}
		if ctx.Err() != nil || !errors.Is(context.Cause(strict), session.ErrStale) {
			t.Fatalf("running: %v; strict: %v", context.Cause(ctx), context.Cause(strict))
		}
	})
}

// TestShadow decides and reports, and denies nobody, not even at boot; closing is
// no verdict and ends the work all the same.
func TestShadow(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		e, _ := b.open(func(o *Options) { o.Mode = session.ModeShadow })
		p := prepare(t, e, caller("s1"))
		ctx, release, err := e.Bind(context.Background(), p, session.Call{})
		if err != nil {
			t.Fatal(err)
		}
		defer release()
		nobody, release2, err := e.Bind(context.Background(), nil, session.Call{})
		if err != nil {
			t.Fatal(err)
		}
		defer release2()
		b.decide(revoke(b.session("s1")), revoke(session.TenantKey(1)), revoke(session.GlobalKey()))
		settle()
		before := e.Status().WouldDeny
		mustAllow(t, e, p, session.Call{})
		if s := e.Status(); s.WouldDeny != before+1 || s.Denied != 0 || s.Cut != 0 || ctx.Err() != nil || nobody.Err() != nil {
			t.Fatalf("status %+v, work %v", s, ctx.Err())
		}
		e.Close()
		mustDeny(t, e, p, session.Call{}, session.ErrClosed)
		if !errors.Is(context.Cause(ctx), session.ErrClosed) || !errors.Is(context.Cause(nobody), session.ErrClosed) {
			t.Fatal("work outlived the enforcer")
		}
	})
}

// TestOptions: what cannot be meant is refused, in words that help, and the feed
// is closed.
func TestOptions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBus(t)
		good := func() *Options { return &Options{Enrollment: b.enrol("e1")} }
		for _, x := range []struct {
			name string
			mod  func(*Options)
		}{
			{"no enrolment", func(o *Options) { o.Enrollment = nil }},
			{"no root", func(o *Options) { o.Enrollment.Root = nil }},
			{"no receipt key", func(o *Options) { o.Enrollment.ReceiptKey = nil }},
			{"no name", func(o *Options) { o.Enrollment.Enforcer = "" }},
			{"no tenants", func(o *Options) { o.Enrollment.Tenants = nil }},
			{"a mode that does not exist", func(o *Options) { o.Mode = 9 }},
			{"too small a MaxStale", func(o *Options) { o.MaxStale = MinMaxStale - 1 }},
			{"too small a MaxStaleRunning", func(o *Options) { o.MaxStaleRunning = time.Millisecond }},
			{"a negative MaxBound", func(o *Options) { o.MaxBound = -1 }},
		} {
			o, f := good(), b.feed()
			x.mod(o)
			e, err := Start(f, o)
			if !errors.Is(err, session.ErrInvalid) || e != nil || !f.closed {
				t.Errorf("%s: %v, closed %t", x.name, err, f.closed)
			}
		}
		if _, err := Start(b.feed(), nil); !errors.Is(err, session.ErrInvalid) {
			t.Error(err)
		}
		if _, err := Start(nil, good()); !errors.Is(err, session.ErrInvalid) {
			t.Error(err)
		}
		if o, err := (Options{Enrollment: b.enrol("e1"), MaxStale: MinMaxStale}).validate(); err != nil || o.MaxStaleRunning != MinMaxStale || o.MaxBound != DefaultMaxBound || o.Logger.Enabled(context.Background(), slog.LevelError) {
			t.Errorf("%+v, %v", o, err)
		}
	})
}

// TestHeartbeatBeforeItsAnchor: the heartbeat that an authority sends when it is
// asked for its clock can overtake the answer. It counts as soon as the answer is
// there, and by its age: one that was recorded counts for nothing.
func TestHeartbeatBeforeItsAnchor(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		b.as(func(b *bus) { b.silent = true })
		recorded := b.beat()
		time.Sleep(time.Minute)
		b.with(func(b *bus) { b.delay = 100 * time.Millisecond })
		for _, c := range []struct {
			name  string
			frame func() []byte
			want  error
		}{
			{"recorded", func() []byte { return recorded }, session.ErrStale},
			{"its own", b.beat, nil},
		} {
			e, f := b.start(nil)
			p := prepare(t, e, caller("s1"))
			time.Sleep(50 * time.Millisecond)
			frame := c.frame()
			f.to().Beat(frame)
			settle()
			mustDeny(t, e, p, session.Call{}, session.ErrStale)
			time.Sleep(100 * time.Millisecond)
			settle()
			if c.want != nil {
				mustDeny(t, e, p, session.Call{}, c.want)
			} else {
				mustAllow(t, e, p, session.Call{})
			}
			e.Close()
		}
	})
}
