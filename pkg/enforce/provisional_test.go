package enforce

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/interlock-fabric/interlock/pkg/session"
)

// mustDenyAs also looks at whether the denial is provisional.
func mustDenyAs(t testing.TB, e *Enforcer, p *session.Prepared, want error, provisional bool) {
	t.Helper()
	var d *session.DeniedError
	err := e.Check(p, session.Call{})
	if !errors.Is(err, want) || !errors.As(err, &d) || d.Provisional != provisional {
		t.Fatalf("got %v (%+v), want %v, provisional %t (status %+v)", err, d, want, provisional, e.Status())
	}
}

// TestProvisional guards "denies at once, lifts late": a batch that was only heard
// denies and cuts before anything confirms it, and what it lifts stays in force
// until the heartbeat. Without chain.deny the first half fails, and with the batch
// applied to the confirmed set the second.
func TestProvisional(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		e, _ := b.open(nil)
		defer e.Close()
		p, q := prepare(t, e, caller("s1")), prepare(t, e, caller("s2"))
		b.decide(set(session.EffectSuspended, b.session("s2")))
		settle()
		ctx := mustBind(t, e, p, session.Call{})
		frame, _ := b.batch(revoke(b.session("s1")), lift(session.EffectSuspended, b.session("s2")))
		b.say(frame)
		settle()
		mustDenyAs(t, e, p, session.ErrRevoked, true)
		mustBeCut(ctx, t, session.ErrRevoked)
		mustDenyAs(t, e, q, session.ErrSuspended, false)
		if s := e.Status(); s.Applied != 2 || s.Confirmed != 1 {
			t.Fatalf("status %+v", s)
		}
		b.accept(frame)
		b.beat()
		settle()
		mustDenyAs(t, e, p, session.ErrRevoked, false)
		mustAllow(t, e, q, session.Call{})
	})
}

// TestRejected: a signed rejection lifts what a batch that lost denied, whatever
// came first, and the batch does nothing when it is heard or read again. One that
// another batch was chained to takes nothing but itself along.
func TestRejected(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		e, f := b.open(nil)
		defer e.Close()
		p, q := prepare(t, e, caller("s1")), prepare(t, e, caller("s2"))
		lost, x := b.batch(revoke(b.session("s1")))
		b.say(lost)
		after, _ := b.make(headOf(t, lost), b.signer, revoke(b.session("s2")))
		b.say(after)
		settle()
		mustDenyAs(t, e, p, session.ErrRevoked, true)
		mustDenyAs(t, e, q, session.ErrRevoked, true)

		forged := session.Rejection{Epoch: 1, Number: x.Number, Batch: headOf(t, lost).hash}
		b.sayBeat(b.seal(session.TypeRejection, forged.MarshalBody(), key(t)))
		settle()
		mustDenyAs(t, e, p, session.ErrRevoked, true)

		b.reject(lost)
		settle()
		mustAllow(t, e, p, session.Call{})
		mustDenyAs(t, e, q, session.ErrRevoked, true)
		b.reject(after)
		settle()
		mustAllow(t, e, q, session.Call{})
		b.say(lost)
		b.store([][]byte{lost}) // a hostile log has it
		f.to().Connected(true)
		settle()
		mustAllow(t, e, p, session.Call{})
		b.decide(set(session.EffectSuspended, b.session("s3")))
		time.Sleep(time.Second)
		mustAllow(t, e, p, session.Call{})
		if s := e.Status(); s.Orphans != 2 || s.Confirmed != 1 || !s.Fresh {
			t.Fatalf("status %+v", s)
		}

		// The rejection comes before what it rejects.
		early, _ := b.batch(revoke(b.session("s1")))
		b.reject(early)
		b.say(early)
		settle()
		mustAllow(t, e, p, session.Call{})
		// A writer that was wrong: the heartbeat has the last word.
		b.accept(early)
		b.beat()
		time.Sleep(time.Second)
		mustDenyAs(t, e, p, session.ErrRevoked, false)
		mustAllow(t, e, q, session.Call{})
	})
}

// TestProvisionalDeadline: what nobody confirms or rejects falls away once its
// deadline has passed in a log that is fresh, and cannot be played back in.
func TestProvisionalDeadline(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		e, _ := b.open(nil)
		defer e.Close()
		p := prepare(t, e, caller("s1"))
		time.Sleep(3 * time.Second)
		lost, _ := b.batch(revoke(b.session("s1")))
		b.say(lost)
		time.Sleep(session.BatchTTL - time.Second)
		mustDenyAs(t, e, p, session.ErrRevoked, true)
		time.Sleep(4 * time.Second)
		mustAllow(t, e, p, session.Call{})
		for range 20 {
			b.say(lost)
			settle()
			mustAllow(t, e, p, session.Call{})
			time.Sleep(3 * time.Second)
		}
		if s := e.Status(); s.Orphans != 1 || s.Replayed != 20 {
			t.Fatalf("status %+v", s)
		}
	})
}

// TestAnOutageNeverLiftsAKill: the store cannot acknowledge for much longer than
// the deadline, whether the writer goes on talking or not, and with a MaxStale that
// is longer still. The order stands throughout; when the store is back it is in the
// log. It fails when the deadline is held against the heartbeat's time and not
// against its proof.
func TestAnOutageNeverLiftsAKill(t *testing.T) {
	for _, talks := range []bool{true, false} {
		within(t, func(t *testing.T, b *bus) {
			e, _ := b.open(func(o *Options) { o.MaxStale = time.Hour })
			defer e.Close()
			p := prepare(t, e, caller("s1"))
			time.Sleep(3 * time.Second)
			frame, _ := b.batch(revoke(session.GlobalKey()))
			b.say(frame)
			outage := time.Now()
			b.as(func(b *bus) { b.silent = true })
			for range 300 {
				time.Sleep(time.Second)
				if talks {
					b.as(func(b *bus) { b.proven = time.Since(outage); b.beatLocked() })
				}
				mustDeny(t, e, p, session.Call{}, session.ErrRevoked)
			}
			b.accept(frame)
			b.as(func(b *bus) { b.silent, b.proven = false, 0 })
			time.Sleep(2 * time.Second)
			mustDenyAs(t, e, p, session.ErrRevoked, false)
		})
	}
}

// TestFork: a split brain publishes two batches under one number, each the start of
// a branch. Both deny, whichever is heard first; the heartbeat picks the winner; the
// loser's denials stay until its rejection or its deadline.
func TestFork(t *testing.T) {
	for _, winnerFirst := range []bool{true, false} {
		for _, rejected := range []bool{true, false} {
			t.Run(fmt.Sprintf("winner first %t, rejected %t", winnerFirst, rejected), func(t *testing.T) {
				within(t, func(t *testing.T, b *bus) {
					b.newKeySet(func(ks *session.KeySet) {
						ks.Keys = append(ks.Keys, session.SigningKey{Public: b.pub("b"), Use: session.UseWriter})
					})
					e, f := b.open(nil)
					defer e.Close()
					time.Sleep(3 * time.Second)
					b.decide(set(session.EffectSuspended, b.session("s0")))
					at := head{b.number, b.head}
					branch := func(name, who string) (out [][]byte) {
						prev := at
						for i := range 3 {
							frame, _ := b.make(prev, b.keys[name], revoke(b.session(fmt.Sprint(who, i))))
							out, prev = append(out, frame), headOf(t, frame)
						}
						return out
					}
					win, lose := branch("a", "w"), branch("b", "l")
					order := append(append([][]byte{}, lose...), win...)
					if winnerFirst {
						order = append(append([][]byte{}, win...), lose...)
					}
					for _, frame := range order {
						b.say(frame)
					}
					settle()
					check := func(who string, want error, provisional bool) {
						t.Helper()
						for i := range 3 {
							p := prepare(t, e, caller(fmt.Sprint(who, i)))
							if want == nil {
								mustAllow(t, e, p, session.Call{})
							} else {
								mustDenyAs(t, e, p, want, provisional)
							}
						}
					}
					check("w", session.ErrRevoked, true)
					check("l", session.ErrRevoked, true)
					for _, frame := range win {
						b.accept(frame)
					}
					b.beat()
					settle()
					check("w", session.ErrRevoked, false)
					check("l", session.ErrRevoked, true)
					if s := e.Status(); s.Confirmed != 4 || s.RolledBack != 0 || s.Diverged != 0 {
						t.Fatalf("status %+v", s)
					}
					if rejected {
						for _, frame := range lose {
							b.reject(frame)
						}
						settle()
					} else {
						time.Sleep(session.BatchTTL - 2*time.Second)
						check("l", session.ErrRevoked, true)
						time.Sleep(5 * time.Second)
					}
					check("l", nil, false)
					check("w", session.ErrRevoked, false)
					// Each receipt is true of the chain that ends in its head.
					time.Sleep(3 * time.Second)
					said := f.said()
					if last := said[len(said)-1]; last.Number != 4 || last.Head != b.head {
						t.Fatalf("%+v", last.Receipt)
					}
				})
			})
		}
	}
}

// TestForkInTheLog: the log holds a stray batch beside the chain, as a deposed
// writer's append can leave it. The first one stored counts, and reading on is not
// held up, however long the chain behind it. Were a later stray to displace what
// is stored, everything behind would be parked until memory is full.
func TestForkInTheLog(t *testing.T) {
	for _, strayFirst := range []bool{false, true} {
		within(t, func(t *testing.T, b *bus) {
			b.decide(set(session.EffectSuspended, b.session("s0")))
			at := head{b.number, b.head}
			stray, _ := b.make(at, b.signer, revoke(b.session("stray")))
			if strayFirst {
				b.with(func(b *bus) { b.log = append(b.log, stray) })
			}
			b.decide(revoke(b.session("s1")))
			if !strayFirst {
				b.with(func(b *bus) { b.log = append(b.log, stray) })
			}
			n := maxLinks + 500
			if strayFirst {
				n = 10 // here the heartbeat must choose, among what is held
			}
			for i := range n {
				b.accept(first(b.batch(revoke(b.session(fmt.Sprint("x", i))))))
			}
			time.Sleep(2 * session.BatchTTL) // its decisions have long been taken again
			e, _ := b.open(nil)
			defer e.Close()
			mustAllow(t, e, prepare(t, e, caller("stray")), session.Call{})
			mustDeny(t, e, prepare(t, e, caller(fmt.Sprint("x", n-1))), session.Call{}, session.ErrRevoked)
			if s := e.Status(); s.Confirmed != uint64(n+2) || b.readings() > 20 {
				t.Fatalf("status %+v, %d reads", s, b.readings())
			}
		})
	}
}

// TestPipelinedOverAnOutage: for minutes nothing is confirmed while decisions go on
// arriving. Each is in effect at once; afterwards all are confirmed, without a gap.
func TestPipelinedOverAnOutage(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		e, _ := b.open(func(o *Options) { o.Mode = session.ModeBestEffort })
		defer e.Close()
		b.as(func(b *bus) { b.silent = true })
		const n = 1000
		for i := range n {
			frame, _ := b.batch(revoke(b.session(fmt.Sprint(i))))
			b.say(frame)
			b.accept(frame)
			time.Sleep(200 * time.Millisecond)
			mustDenyAs(t, e, prepare(t, e, caller(fmt.Sprint(i))), session.ErrRevoked, true)
		}
		reads := b.readings()
		b.as(func(b *bus) { b.silent = false })
		time.Sleep(time.Second)
		settle()
		mustDenyAs(t, e, prepare(t, e, caller("0")), session.ErrRevoked, false)
		if s := e.Status(); s.Confirmed != n || !s.Fresh || b.readings() != reads {
			t.Fatalf("status %+v, %d reads", s, b.readings()-reads)
		}
	})
}

// TestMemoryIsBounded: far more is heard than may be held, none of it confirmed.
// What is held stays within maxLinks and maxHeld, and the log, read afterwards,
// still gets in: without chain.restart the enforcer would stay stale for ever.
func TestMemoryIsBounded(t *testing.T) {
	for _, x := range []struct {
		name    string
		stuffed int // entries in each batch
		n       int
	}{{"many", 1, maxLinks + 500}, {"large", 120, 170}} {
		t.Run(x.name, func(t *testing.T) {
			within(t, func(t *testing.T, b *bus) {
				e, f := b.open(nil)
				defer e.Close()
				fw := f.to().(sink).f
				b.as(func(b *bus) { b.silent = true })
				entries := make([]session.Entry, x.stuffed)
				for i := range entries {
					entries[i] = set(session.EffectSuspended, b.session(fmt.Sprint(i)))
					if x.stuffed > 1 {
						entries[i].Unknown = []session.Field{{Tag: 9, Value: make([]byte, 4000)}}
					}
				}
				at := head{b.number, b.head}
				for i := range x.n { // a branch that will never be
					entries[0].Incident = fmt.Sprint(i)
					frame, _ := b.make(at, b.signer, entries...)
					b.say(frame)
					at = headOf(t, frame)
					if i%50 == 0 {
						settle()
					}
				}
				settle()
				b.with(func(b *bus) { b.mute = true })
				for i := range 100 {
					b.decide(revoke(b.session(fmt.Sprint("real", i))))
				}
				held := func() {
					t.Helper()
					c := fw.chain
					size := 0
					for _, l := range c.links {
						size += l.size
					}
					for _, l := range c.loose {
						size += l.size
					}
					if size != c.size || size > maxHeld || len(c.links)+len(c.loose) > maxLinks {
						t.Fatalf("%d bytes (counted %d) in %d links and %d loose ones", size, c.size, len(c.links), len(c.loose))
					}
				}
				held()
				if e.Status().Lost == 0 {
					t.Fatal("all of it was held")
				}
				b.with(func(b *bus) { b.mute = false })
				b.as(func(b *bus) { b.silent = false })
				// Until the log is read anew, and the longest back-off twice.
				time.Sleep(rereadMin + time.Second + 2*backMax + time.Second)
				settle()
				held()
				mustDenyAs(t, e, prepare(t, e, caller("real99")), session.ErrRevoked, false)
				if s := e.Status(); s.Confirmed != 100 || !s.Fresh {
					t.Fatalf("status %+v", s)
				}
			})
		})
	}
}

// TestWithdrawal: a key is withdrawn that had signed what is provisional, or what
// is confirmed. The first falls away at once; for the second the log is read anew,
// without it, and running work of callers that were never revoked goes on being
// judged by what is true. It may happen while the enforcer is down: then the floor
// that it remembers is no longer one.
func TestWithdrawal(t *testing.T) {
	for _, when := range []string{"provisional", "confirmed", "confirmed, and down"} {
		confirmed, down := when != "provisional", when == "confirmed, and down"
		within(t, func(t *testing.T, b *bus) {
			dir := t.TempDir()
			b.newKeySet(func(ks *session.KeySet) {
				ks.Keys = append(ks.Keys, session.SigningKey{Public: b.pub("b"), Use: session.UseWriter})
			})
			e, _ := b.open(func(o *Options) { o.StateDir = dir })
			p := prepare(t, e, caller("s1"))
			b.decide(revoke(b.session("s0")))
			good := b.chainNow()
			b.as(func(b *bus) { b.signer = b.keys["b"] }) // stolen
			if confirmed {
				b.decide(revoke(b.session("s1")))
			} else {
				b.say(first(b.batch(revoke(b.session("s1")))))
			}
			settle()
			mustDenyAs(t, e, p, session.ErrRevoked, !confirmed)
			time.Sleep(1500 * time.Millisecond) // the floor is saved
			if down {
				e.Close()
			}
			b.as(func(b *bus) { b.signer = b.keys["a"] })
			log := b.log
			b.restore(good)
			b.with(func(b *bus) { b.log = log }) // it is still stored
			b.newKeySet(func(ks *session.KeySet) {
				ks.Keys[1].Withdrawn, ks.Keys[1].LastEpoch, ks.Keys[1].LastNumber = true, 1, 1
			})
			b.decide(revoke(b.session("s2")))
			if down {
				e, _ = b.open(func(o *Options) { o.StateDir = dir })
			}
			time.Sleep(3 * time.Second)
			settle()
			for range 2 {
				mustAllow(t, e, prepare(t, e, caller("s1")), session.Call{})
				mustDenyAs(t, e, prepare(t, e, caller("s0")), session.ErrRevoked, false)
				mustDenyAs(t, e, prepare(t, e, caller("s2")), session.ErrRevoked, false)
				if s := e.Status(); s.Confirmed != 2 || s.RolledBack != 0 || s.Diverged != 0 {
					t.Fatalf("status %+v", s)
				}
				e.Close()
				e, _ = b.open(func(o *Options) { o.StateDir = dir })
			}
			e.Close()
		})
	}
}

// TestDivergence: an authentic heartbeat has another digest at the same batch. It
// is counted, everything is denied and cut, the log is read anew and, once the
// digests agree, all goes on. A fault that lasts does not have the log read over
// and over.
func TestDivergence(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		e, _ := b.open(nil)
		defer e.Close()
		b.decide(revoke(b.session("s1")))
		settle()
		p, q := prepare(t, e, caller("s1")), prepare(t, e, caller("s2"))
		ctx := mustBind(t, e, q, session.Call{})
		truth := b.state
		b.as(func(b *bus) {
			b.state = b.state.Apply(&session.Batch{Number: 9, Entries: []session.Entry{revoke(b.session("s9"))}}, nil)
			b.beatLocked()
		})
		settle()
		mustDeny(t, e, q, session.Call{}, session.ErrStale)
		// A state in doubt says nothing about anybody.
		mustDeny(t, e, p, session.Call{}, session.ErrStale)
		time.Sleep(tickEvery)
		settle()
		mustBeCut(ctx, t, session.ErrStale)
		reads := b.readings()
		time.Sleep(5 * time.Minute)
		if n := b.readings() - reads; n > 400 {
			t.Fatalf("the log was read %d times", n)
		}
		if s := e.Status(); s.Diverged < 3 || s.Diverged > 20 || s.Fresh {
			t.Fatalf("status %+v", s)
		}
		b.as(func(b *bus) { b.state = truth })
		time.Sleep(rereadMax + 2*time.Second)
		settle()
		mustAllow(t, e, q, session.Call{})
		mustDeny(t, e, p, session.Call{}, session.ErrRevoked)
	})
}

// TestDivergenceOfAnAwaitedHead: the heartbeat that shows the divergence came before
// the batch that it speaks of. The rebuild begins in the middle of trying what
// waits; it must not trip over it.
func TestDivergenceOfAnAwaitedHead(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		e, _ := b.open(nil)
		defer e.Close()
		frame, _ := b.batch(revoke(b.session("s1")))
		b.with(func(b *bus) { b.noLog = true })
		b.accept(frame)
		truth := b.state
		b.as(func(b *bus) { b.state = nil; b.beatLocked(); b.beatLocked(); b.state = truth })
		b.say(frame)
		settle()
		mustDeny(t, e, prepare(t, e, caller("s2")), session.Call{}, session.ErrStale)
		b.with(func(b *bus) { b.noLog = false })
		time.Sleep(5 * time.Second)
		mustAllow(t, e, prepare(t, e, caller("s2")), session.Call{})
		if n := e.Status().Diverged; n == 0 {
			t.Fatal("not counted")
		}
	})
}

// TestRolledBackDuringARebuild: the log is rolled back just when it is read anew. A
// rebuild forgets the state, not how far it had come.
func TestRolledBackDuringARebuild(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		e, _ := b.open(nil)
		defer e.Close()
		b.decide(set(session.EffectReduced, b.session("s0")))
		old := b.chainNow()
		b.decide(revoke(b.session("s1")))
		settle()
		truth := old.state
		b.as(func(b *bus) { b.state = nil; b.beatLocked() })
		b.restore(old)
		b.as(func(b *bus) { b.state = truth })
		time.Sleep(time.Minute)
		mustDeny(t, e, prepare(t, e, caller("s1")), session.Call{}, session.ErrStale)
		if s := e.Status(); s.RolledBack == 0 || s.Fresh {
			t.Fatalf("status %+v", s)
		}
	})
}

// TestLogThatLeadsAstray: at first the bus hands out a long branch of a deposed
// writer, so long that it is folded into base. When the log is the right one, the
// enforcer finds back. Without chain.restart it never would.
func TestLogThatLeadsAstray(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		b.newKeySet(func(ks *session.KeySet) {
			ks.Keys = append(ks.Keys, session.SigningKey{Public: b.pub("b"), Use: session.UseWriter})
		})
		at := head{b.number, b.head}
		var stray [][]byte
		for range 2*keepLinks + 200 {
			frame, _ := b.make(at, b.keys["b"], revoke(b.session("stray")))
			stray, at = append(stray, frame), headOf(t, frame)
		}
		for range 5 {
			b.decide(revoke(b.session("s1")))
		}
		right := b.log
		b.with(func(b *bus) { b.log = stray })
		e, _ := b.start(nil)
		defer e.Close()
		time.Sleep(time.Minute)
		mustDeny(t, e, prepare(t, e, caller("ok")), session.Call{}, session.ErrStale)
		b.with(func(b *bus) { b.log = right })
		time.Sleep(rereadMax + 2*time.Second)
		mustAllow(t, e, prepare(t, e, caller("ok")), session.Call{})
		mustAllow(t, e, prepare(t, e, caller("stray")), session.Call{})
		mustDeny(t, e, prepare(t, e, caller("s1")), session.Call{}, session.ErrRevoked)
	})
}

// TestRebuildCuts: in best effort, running work goes on over a rebuild. What came
// into force meanwhile cuts it when the rebuild is done.
func TestRebuildCuts(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		e, _ := b.open(func(o *Options) { o.Mode = session.ModeBestEffort })
		defer e.Close()
		p, q := prepare(t, e, caller("s1")), prepare(t, e, caller("s2"))
		cut, stays := mustBind(t, e, p, session.Call{}), mustBind(t, e, q, session.Call{})
		b.decide(set(session.EffectReduced, b.session("s0")))
		settle()
		truth := b.state
		b.with(func(b *bus) { b.noLog = true })
		b.as(func(b *bus) { b.state = nil; b.beatLocked(); b.state = truth })
		settle()
		mustRun(cut, t)
		b.decide(revoke(b.session("s1")))
		time.Sleep(time.Second)
		b.with(func(b *bus) { b.noLog = false })
		time.Sleep(5 * time.Second)
		mustBeCut(cut, t, session.ErrRevoked)
		mustRun(stays, t)
	})
}

// TestEpoch: a new epoch begins with an empty chain. What was in force stays so
// until lifted by name, freshness goes on without a pause, and nothing is allowed
// in between that was not before. An enforcer that starts later sees the new epoch
// alone. Without inherited, the suspended would be free from the first heartbeat of
// the new epoch.
func TestEpoch(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		e, _ := b.open(nil)
		defer e.Close()
		half := lift(session.EffectSuspended, session.TenantKey(2))
		half.Share = session.ShareUnit / 2
		b.decide(set(session.EffectSuspended, b.session("s1")), set(session.EffectSuspended, b.session("s2")), revoke(b.user("mallory")),
			set(session.EffectSuspended, session.TenantKey(2)), half)
		b.say(first(b.batch(revoke(b.session("heard"))))) // and never stored
		settle()
		mallory := caller("m")
		mallory.User = "mallory"
		ok := prepare(t, e, caller("ok"))
		ctx := mustBind(t, e, ok, session.Call{})
		freed := func() (n int) {
			for i := range 100 {
				id := caller(fmt.Sprint(i))
				id.Tenant = "globex"
				if e.Check(prepare(t, e, id), session.Call{}) == nil {
					n++
				}
			}
			return n
		}
		before := freed()
		inForce := func() {
			t.Helper()
			mustDeny(t, e, prepare(t, e, caller("s1")), session.Call{}, session.ErrSuspended)
			mustDeny(t, e, prepare(t, e, caller("s2")), session.Call{}, session.ErrSuspended)
			mustDeny(t, e, prepare(t, e, caller("heard")), session.Call{}, session.ErrRevoked)
			mustDeny(t, e, prepare(t, e, mallory), session.Call{}, session.ErrRevoked)
			mustAllow(t, e, ok, session.Call{})
			if n := freed(); n != before {
				t.Fatalf("%d of 100 freed by half a restore, before the epoch %d", n, before)
			}
		}
		inForce()
		b.newEpoch()
		settle()
		inForce()
		for range 20 {
			time.Sleep(time.Second)
			inForce()
		}
		// Restated, as the authority does, and one of them is lifted.
		b.decide(set(session.EffectSuspended, b.session("s1")), set(session.EffectSuspended, b.session("s2")), revoke(b.user("mallory")))
		time.Sleep(time.Second)
		inForce()
		b.decide(lift(session.EffectSuspended, b.session("s1")))
		settle()
		mustAllow(t, e, prepare(t, e, caller("s1")), session.Call{})
		mustDeny(t, e, prepare(t, e, caller("s2")), session.Call{}, session.ErrSuspended)
		if s := e.Status(); s.Epoch != 2 || s.Confirmed != 2 || s.Inherited != 4 || !s.Fresh || s.Diverged != 0 {
			t.Fatalf("status %+v", s)
		}
		mustRun(ctx, t)

		later, _ := b.open(nil)
		defer later.Close()
		mustAllow(t, later, prepare(t, later, caller("s1")), session.Call{})
		mustAllow(t, later, prepare(t, later, caller("heard")), session.Call{})
		mustDeny(t, later, prepare(t, later, caller("s2")), session.Call{}, session.ErrSuspended)
		if s := later.Status(); s.Inherited != 0 || s.Entries != 2 {
			t.Fatalf("status %+v", s)
		}
	})
}

// TestInheritedExpires: what an earlier epoch left leaves through the new epoch's
// horizon like everything else.
func TestInheritedExpires(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		e, _ := b.open(nil)
		defer e.Close()
		x := revoke(b.session("s1"))
		x.Expires = session.InstantOf(time.Now().Add(time.Minute))
		b.decide(x)
		settle()
		b.newEpoch()
		time.Sleep(2 * time.Minute)
		mustDeny(t, e, prepare(t, e, caller("s1")), session.Call{}, session.ErrRevoked)
		b.as(func(b *bus) {
			_, y := b.make(head{b.number, b.head}, b.signer)
			y.Horizon = x.Expires
			frame := b.encode(y, b.signer)
			b.say(frame)
			b.acceptLocked(frame)
			b.beatLocked()
		})
		settle()
		mustAllow(t, e, prepare(t, e, caller("s1")), session.Call{})
		if n := e.Status().Inherited; n != 0 {
			t.Fatalf("%d inherited", n)
		}
	})
}

// TestFailure17LiftSurvivesReconnection: a resume is as durable as the suspension,
// over a lost link and over a restart.
func TestFailure17LiftSurvivesReconnection(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		dir := t.TempDir()
		e, f := b.open(func(o *Options) { o.StateDir = dir })
		p := prepare(t, e, caller("s1"))
		b.decide(set(session.EffectSuspended, b.session("s1")))
		settle()
		b.with(func(b *bus) { b.mute = true })
		f.to().Connected(false)
		b.decide(lift(session.EffectSuspended, b.session("s1")))
		settle()
		mustDeny(t, e, p, session.Call{}, session.ErrSuspended)
		b.with(func(b *bus) { b.mute = false })
		f.to().Connected(true)
		time.Sleep(time.Second)
		mustAllow(t, e, p, session.Call{})
		e.Close()
		e, _ = b.open(func(o *Options) { o.StateDir = dir })
		defer e.Close()
		mustAllow(t, e, prepare(t, e, caller("s1")), session.Call{})
	})
}

// TestWriterChange: another authority takes over, with a clock and a writer id of
// its own. Nothing goes stale, and the heartbeats of the one before count for
// nothing that they do not prove.
func TestWriterChange(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		e, _ := b.open(nil)
		defer e.Close()
		p := prepare(t, e, caller("s1"))
		for i := range 10 {
			old := b.beat()
			b.as(func(b *bus) {
				b.writer[0]++
				b.born, b.beatAt = time.Now().Add(-time.Duration(i)*time.Hour), 0
				b.wall = time.Duration(i) * time.Minute
			})
			for range 30 {
				time.Sleep(100 * time.Millisecond)
				b.sayBeat(old)
				mustAllow(t, e, p, session.Call{MaxStale: 2 * time.Second})
			}
			b.decide(revoke(b.session(fmt.Sprint("x", i))))
		}
		settle()
		if s := e.Status(); s.Confirmed != 10 || s.RolledBack != 0 {
			t.Fatalf("status %+v", s)
		}
	})
}

// TestColdStartReadsLargeBatches: the log holds more bytes than may be held, in
// fewer batches than are kept apart from base. Without the second trim in add it
// could never be read.
func TestColdStartReadsLargeBatches(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		entries := make([]session.Entry, 120)
		for i := range entries {
			entries[i] = revoke(b.session(fmt.Sprint(i)))
			entries[i].Unknown = []session.Field{{Tag: 9, Value: make([]byte, 4000)}}
		}
		for range 150 {
			b.accept(first(b.batch(entries...)))
		}
		e, _ := b.open(nil)
		defer e.Close()
		if s := e.Status(); s.Confirmed != 150 || s.Lost != 0 {
			t.Fatalf("status %+v", s)
		}
	})
}

// TestColdStartReadsALongLog: more batches than are ever held, some of which lift
// what others set, and what arrives while the log is read is not lost (failure 2).
func TestColdStartReadsALongLog(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		n := 2*maxLinks + 77
		for i := range n {
			k := b.session(fmt.Sprint(i % 100))
			x := set(session.EffectSuspended, k)
			if i/100%2 == 1 {
				x = lift(session.EffectSuspended, k)
			}
			b.accept(first(b.batch(x)))
		}
		e, _ := b.start(nil)
		defer e.Close()
		b.decide(revoke(b.session("late")))
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := e.WaitReady(ctx); err != nil {
			t.Fatal(err)
		}
		mustDeny(t, e, prepare(t, e, caller("late")), session.Call{}, session.ErrRevoked)
		if s := e.Status(); s.Confirmed != uint64(n+1) || s.Lost != 0 {
			t.Fatalf("status %+v", s)
		}
	})
}

// TestConfirmedPartlyThenLifted: of what was heard, little is confirmed, so that
// it stays where unconfirmed denials are; later it is lifted, or its end comes,
// behind or before others that are not confirmed. It is free with the
// confirmation, and what is unconfirmed is denied throughout. Without chain.spent
// the lifted stay denied by what is out of date.
func TestConfirmedPartlyThenLifted(t *testing.T) {
	for _, how := range []string{"lift", "stage", "horizon"} {
		t.Run(how, func(t *testing.T) {
			within(t, func(t *testing.T, b *bus) {
				e, f := b.open(nil)
				defer e.Close()
				c := func() *chain { return f.to().(sink).f.chain }
				p := prepare(t, e, caller("s1"))
				at := head{b.number, b.head}
				say := func(x *session.Batch) []byte {
					frame := b.encode(x, b.signer)
					b.say(frame)
					at = headOf(t, frame)
					settle()
					return frame
				}
				made := func(entries ...session.Entry) *session.Batch {
					_, x := b.make(at, b.signer, entries...)
					return x
				}
				many := func(name string) (out []session.Entry) {
					for i := range 10 {
						out = append(out, revoke(b.session(fmt.Sprint(name, i))))
					}
					return out
				}
				unconfirmed := func(name string) {
					t.Helper()
					for i := range 10 {
						mustDenyAs(t, e, prepare(t, e, caller(fmt.Sprint(name, i))), session.ErrRevoked, true)
					}
				}
				confirm := func(frames ...[]byte) {
					for _, frame := range frames {
						b.accept(frame)
					}
					b.beat()
					settle()
				}
				x := set(session.EffectSuspended, b.session("s1"))
				if how == "horizon" {
					// An end does not end it: its horizon does.
					x = revoke(b.session("s1"))
					x.Expires = session.InstantOf(time.Now().Add(time.Minute))
				}
				first := say(made(x))
				second := say(made(many("a")...))
				before := c().overlay
				confirm(first)
				if c().overlay != before || before == nil {
					t.Error("the overlay was made anew for one entry in eleven")
				}
				mustDenyAs(t, e, p, x.Effect.Sentinel(), false)
				unconfirmed("a")

				var y *session.Batch
				switch how {
				case "lift":
					y = made(lift(session.EffectSuspended, b.session("s1")))
				case "stage":
					half := lift(session.EffectSuspended, b.session("s1"))
					half.Share = session.ShareUnit - 1
					y = made(half)
				case "horizon":
					y = made()
					y.Horizon = x.Expires
				}
				third := say(y)
				mustDenyAs(t, e, p, x.Effect.Sentinel(), false)
				say(made(slices.Concat(many("c"), many("d"))...))
				confirm(second, third)
				unconfirmed("c")
				unconfirmed("d")
				mustAllow(t, e, p, session.Call{})
			})
		})
	}
}

// chained makes batches that follow one another, for a chain without a bus.
type chained struct {
	head
	key session.Key
	n   uint32
}

// next makes a batch of entries about keys of their own.
func (x *chained) next(entries int) *link {
	if x.key.Tenant == 0 {
		x.key = session.Key{Tenant: 1, Shape: session.Shape(session.KindSession)}
	}
	b := &session.Batch{Number: x.number + 1, Prev: x.hash, Deadline: 1000}
	for range entries {
		x.n++
		binary.BigEndian.PutUint32(x.key.Digest[:], x.n)
		b.Entries = append(b.Entries, revoke(x.key))
	}
	x.number++
	binary.BigEndian.PutUint64(x.hash[:], x.number)
	return &link{batch: b, hash: x.hash, key: &session.SigningKey{Tenants: []session.TenantID{1}}}
}

// TestOverlayIsSweptAfterALongLog: what falls away while a long log is read, and
// the overlay cannot be made anew, is gone with the next confirmation.
func TestOverlayIsSweptAfterALongLog(t *testing.T) {
	var x chained
	c := newChain(session.Hash{}, head{})
	c.confirm(head{})
	for range 2*keepLinks + 1 {
		l := x.next(1)
		l.stored = true
		c.add(l)
	}
	if c.base.number == 0 || !c.live {
		t.Fatal("nothing was folded")
	}
	c.add(x.next(100))
	x.number += 5
	lost := x.next(1)
	c.add(lost)
	if c.reject(head{lost.batch.Number, lost.hash}, 1000); c.confirm(c.base.head) != newHead {
		t.Fatal("not confirmed")
	}
	if n := c.denies(t, lost); n != keepLinks+100 {
		t.Errorf("%d denied of the %d unconfirmed", n, keepLinks+100)
	}
}

// denies counts what the overlay has, which must be nothing of a batch.
func (c *chain) denies(t *testing.T, not *link) (n int) {
	t.Helper()
	c.overlay.Range(func(_ session.Key, r *session.Record) bool {
		if n++; r.Seq == not.batch.Number {
			t.Errorf("batch %d is still denied", r.Seq)
		}
		return true
	})
	return n
}

// TestOverlayIsSweptAfterARestart: what led nowhere is gone with the next
// confirmation, even when that is of a batch which had been rejected.
func TestOverlayIsSweptAfterARestart(t *testing.T) {
	var x chained
	c := newChain(session.Hash{}, head{})
	c.confirm(head{})
	at := x.head
	astray := x.next(10)
	c.add(astray)
	c.restart()
	x.head = at
	l := x.next(1)
	l.hash[31]++
	x.hash = l.hash
	c.reject(x.head, 1000)
	c.add(l)
	c.add(x.next(100))
	if c.confirm(head{l.batch.Number, l.hash}) != newHead {
		t.Fatal("not confirmed")
	}
	if n := c.denies(t, astray); n != 100 {
		t.Errorf("%d denied of the 100 unconfirmed", n)
	}
}

// TestOverlayStaysSmall: where something is always unconfirmed, the overlay takes
// no more than twice what is.
func TestOverlayStaysSmall(t *testing.T) {
	var x chained
	c := newChain(session.Hash{}, head{})
	c.confirm(head{})
	c.add(x.next(10))
	for range 50 {
		last := x.head
		l := x.next(10)
		c.add(l)
		if c.confirm(last) != newHead {
			t.Fatal("not confirmed")
		}
		n := 0
		c.overlay.Range(func(session.Key, *session.Record) bool { n++; return true })
		if n < 10 || n > 20 {
			t.Fatalf("%d denied, 10 unconfirmed", n)
		}
	}
}

// TestOverlayHasTheOrderOfTheChain: of two that ask for different authentications
// the later counts, whichever was heard first.
func TestOverlayHasTheOrderOfTheChain(t *testing.T) {
	var x chained
	c := newChain(session.Hash{}, head{})
	c.confirm(head{})
	one, two := x.next(1), x.next(1)
	k := x.key
	for acr, l := range map[string]*link{"one": one, "two": two} {
		l.batch.Entries[0] = session.Entry{Op: session.OpSet, Effect: session.EffectStepUp, Key: k, ACR: acr}
	}
	c.add(two)
	c.add(one)
	c.add(x.next(100))
	if c.confirm(head{two.batch.Number, two.hash}) != newHead {
		t.Fatal("not confirmed")
	}
	if got := c.confirmed.set.Lookup(k); len(got) != 1 || got[0].ACR != "two" {
		t.Fatalf("confirmed: %+v", got)
	}
	c.overlay.Range(func(_ session.Key, r *session.Record) bool {
		if r.ACR == "one" {
			t.Errorf("still asked for: %+v", r)
		}
		return true
	})
}
