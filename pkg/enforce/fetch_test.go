package enforce

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/interlock-fabric/interlock/pkg/filter"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// publishing is a feed with published segments.
type publishing struct {
	*busFeed
	frames [][]byte
	chunks map[[32]byte][]byte
	reads  int
	// during, if set, is called in the middle of each fetch.
	during func()
}

func (p *publishing) Segments(context.Context) ([][]byte, error) {
	if err := p.up(); err != nil {
		return nil, err
	}
	p.b.mu.Lock()
	defer p.b.mu.Unlock()
	return p.frames, nil
}

func (p *publishing) Segment(_ context.Context, ref session.SegmentRef, w io.Writer) error {
	p.reads++
	if p.during != nil {
		p.during()
	}
	p.b.mu.Lock()
	b := p.chunks[ref.Sum]
	p.b.mu.Unlock()
	for len(b) > 0 {
		n := min(len(b), 1000)
		if _, err := w.Write(b[:n]); err != nil {
			return err
		}
		b = b[n:]
	}
	return nil
}

// publishState publishes the state as it is now; mod may change its bytes, or
// the description, before it is signed.
func (p *publishing) publishState(mod func(ref *session.SegmentRef, bytes []byte)) {
	b := p.b
	b.writing.Lock()
	defer b.writing.Unlock()
	g, err := b.state.Seal("", filter.Mark{Epoch: b.epoch, Number: b.number, Head: b.head, Time: b.now()})
	if err != nil {
		b.t.Fatal(err)
	}
	var buf bytes.Buffer
	if _, err := g.WriteTo(&buf); err != nil {
		b.t.Fatal(err)
	}
	ref := session.SegmentRef{
		Epoch: b.epoch, Number: b.number, Head: b.head, State: b.state.Digest(), Time: b.now(),
		Entries: uint64(g.Len()), Size: uint64(g.Size()), Sum: sha256.Sum256(buf.Bytes()),
	}
	if mod != nil {
		mod(&ref, buf.Bytes())
	}
	frame := b.seal(session.TypeSegment, ref.MarshalBody(), b.signer)
	b.with(func(*bus) {
		if p.chunks == nil {
			p.chunks = map[[32]byte][]byte{}
		}
		p.chunks[ref.Sum] = buf.Bytes()
		p.frames = append(p.frames, frame)
	})
}

func (p *publishing) open(t *testing.T, mod func(*Options)) *Enforcer {
	o := &Options{Enrollment: p.b.enrol("e1")}
	if mod != nil {
		mod(o)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	e, err := Open(ctx, p, o)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

// trim takes from the log what is before its newest n batches.
func (b *bus) trim(n int) {
	b.with(func(b *bus) {
		for i := range b.log[:len(b.log)-n] {
			b.log[i] = []byte("trimmed")
		}
	})
}

// TestColdStartFromASegment: with the log trimmed behind a published segment, an
// enforcer starts from that and the rest of the log, with a state directory or
// without.
func TestColdStartFromASegment(t *testing.T) {
	for _, dir := range []string{"", t.TempDir()} {
		within(t, func(t *testing.T, b *bus) {
			p := &publishing{busFeed: b.feed()}
			b.many(3000)
			b.decide(revoke(b.session("s1")))
			p.publishState(nil)
			b.decide(revoke(b.session("s2")))
			b.trim(1)
			e := p.open(t, func(o *Options) { o.StateDir = dir })
			defer e.Close()
			if s := e.Status(); s.Entries != 3002 || s.Applied != b.number {
				t.Fatalf("%+v", s)
			}
			mustDeny(t, e, prepare(t, e, caller("s1")), session.Call{}, session.ErrRevoked)
			mustDeny(t, e, prepare(t, e, caller("s2")), session.Call{}, session.ErrRevoked)
			mustAllow(t, e, prepare(t, e, caller("ok")), session.Call{})
		})
	}
}

// TestFailure02WhatArrivesDuringAFetchIsKept: elsewhere, what was heard while the
// new state was built was gone when it was put in place. Here batches come while a
// segment is fetched: one that is in the log when the log is read, one that the
// store has not acknowledged, and so is in no log. A cold start has both in force
// from the first request, and a running enforcer, which fetches because of a gap,
// at once. Without chain.carry the second is gone; without follower.interim it is
// in force only after the next heartbeat.
func TestFailure02WhatArrivesDuringAFetchIsKept(t *testing.T) {
	for _, running := range []bool{false, true} {
		t.Run(fmt.Sprintf("running %t", running), func(t *testing.T) {
			within(t, func(t *testing.T, b *bus) {
				p := &publishing{busFeed: b.feed()}
				b.decide(set(session.EffectSuspended, b.session("old")))
				var e *Enforcer
				var work, other context.Context
				if running {
					e = p.open(t, nil)
					work = mustBind(t, e, prepare(t, e, caller("unstored")), session.Call{})
					other = mustBind(t, e, prepare(t, e, caller("ok")), session.Call{})
					b.with(func(b *bus) { b.dead = true })
				}
				b.many(3000)
				b.decide(revoke(b.session("sealed")), lift(session.EffectSuspended, b.session("old")))
				p.publishState(nil)
				b.trim(0)
				p.during = func() {
					b.decide(revoke(b.session("stored")))
					unstored, _ := b.batch(revoke(b.session("unstored")))
					b.say(unstored)
					if !running {
						return
					}
					// The fetch goes on; the kill does not wait for it.
					time.Sleep(10 * time.Millisecond)
					mustDeny(t, e, prepare(t, e, caller("unstored")), session.Call{}, session.ErrRevoked)
					mustBeCut(work, t, session.ErrRevoked)
					mustRun(other, t)
					mustDeny(t, e, prepare(t, e, caller("old")), session.Call{}, session.ErrSuspended)
				}
				if running {
					b.with(func(b *bus) { b.dead = false })
					p.to().Connected(true)
					time.Sleep(6 * time.Second)
					mustRun(other, t)
				} else {
					e = p.open(t, nil)
				}
				defer e.Close()
				if p.reads != 1 {
					t.Fatalf("%d segments were fetched", p.reads)
				}
				mustDenyAs(t, e, prepare(t, e, caller("sealed")), session.ErrRevoked, false)
				mustDenyAs(t, e, prepare(t, e, caller("stored")), session.ErrRevoked, false)
				mustDenyAs(t, e, prepare(t, e, caller("unstored")), session.ErrRevoked, true)
				mustAllow(t, e, prepare(t, e, caller("ok")), session.Call{})
				mustAllow(t, e, prepare(t, e, caller("old")), session.Call{})
				if s := e.Status(); s.Entries != 3002 || s.Applied != b.number+1 || s.Confirmed != b.number {
					t.Fatalf("%+v", s)
				}
			})
		})
	}
}

// TestWhatIsReadIsNotYetApplied: between the segment that bridges a gap and the
// heartbeat that vouches for it, a running enforcer says no more than that it has
// applied what it had, and what it hears takes effect at once. Without
// follower.interim it would not, and with the new chain's tip in the view it would
// have said that the gap's revocation is applied while it allows the caller.
func TestWhatIsReadIsNotYetApplied(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		p := &publishing{busFeed: b.feed()}
		b.decide(revoke(b.session("s0")))
		e := p.open(t, nil)
		defer e.Close()
		gap, heard := prepare(t, e, caller("gap")), prepare(t, e, caller("heard"))
		ctx, work := mustBind(t, e, gap, session.Call{}), mustBind(t, e, heard, session.Call{})
		b.as(func(b *bus) { b.silent = true })
		b.with(func(b *bus) { b.dead = true })
		b.many(3000)
		b.decide(revoke(b.session("gap")))
		p.publishState(nil)
		b.decide(revoke(b.session("after")))
		b.trim(1)
		b.with(func(b *bus) { b.dead = false })
		p.to().Connected(true)
		time.Sleep(2 * time.Second)
		settle()
		if p.reads != 1 {
			t.Fatalf("%d segments were fetched", p.reads)
		}
		unstored, _ := b.batch(revoke(b.session("heard")))
		b.say(unstored)
		settle()
		mustDenyAs(t, e, heard, session.ErrRevoked, true)
		mustBeCut(work, t, session.ErrRevoked)
		mustAllow(t, e, gap, session.Call{})
		mustDeny(t, e, prepare(t, e, caller("s0")), session.Call{}, session.ErrRevoked)
		if s := e.Status(); s.Applied != 1 || s.Confirmed != 1 || !s.Fresh {
			t.Fatalf("%+v", s)
		}
		b.beat()
		settle()
		mustBeCut(ctx, t, session.ErrRevoked)
		mustDenyAs(t, e, heard, session.ErrRevoked, true)
		mustDenyAs(t, e, prepare(t, e, caller("after")), session.ErrRevoked, false)
		if s := e.Status(); s.Applied != b.number+1 || s.Confirmed != b.number {
			t.Fatalf("%+v", s)
		}
	})
}

// TestGapInTheLogIsMendedByASegment: the log was trimmed while a running enforcer
// was cut off.
func TestGapInTheLogIsMendedByASegment(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		p := &publishing{busFeed: b.feed()}
		b.decide(revoke(b.session("s0")))
		e := p.open(t, nil)
		defer e.Close()
		b.with(func(b *bus) { b.dead = true })
		b.many(5000)
		b.decide(revoke(b.session("s1")))
		p.publishState(nil)
		b.trim(0)
		time.Sleep(time.Minute)
		mustDeny(t, e, prepare(t, e, caller("ok")), session.Call{}, session.ErrStale)
		b.with(func(b *bus) { b.dead = false })
		time.Sleep(10 * time.Second) // the clock, the log and the segment are asked for in turn, each after a back-off
		mustAllow(t, e, prepare(t, e, caller("ok")), session.Call{})
		mustDeny(t, e, prepare(t, e, caller("s1")), session.Call{}, session.ErrRevoked)
		mustDeny(t, e, prepare(t, e, caller("s0")), session.Call{}, session.ErrRevoked)
	})
}

// TestGapIsMendedWhileFresh: a link that was down for a moment misses what is
// then trimmed. The state never gets stale, running work goes on, and what the
// gap decided on it is judged once it is known. The same with a restart in
// between, from a local segment that is too old.
func TestGapIsMendedWhileFresh(t *testing.T) {
	for _, restart := range []bool{false, true} {
		t.Run(fmt.Sprintf("restart %t", restart), func(t *testing.T) {
			within(t, func(t *testing.T, b *bus) {
				p := &publishing{busFeed: b.feed()}
				dir := t.TempDir()
				keep := func(o *Options) { o.StateDir = dir }
				b.decide(revoke(b.session("s0")))
				e := p.open(t, keep)
				defer func() { e.Close() }()
				ok := prepare(t, e, caller("ok"))
				work, other := mustBind(t, e, prepare(t, e, caller("s1")), session.Call{}), mustBind(t, e, ok, session.Call{})
				settle()
				if restart {
					e.Close()
				}
				b.with(func(b *bus) { b.mute = true })
				b.many(3000)
				b.decide(revoke(b.session("s1")))
				p.publishState(nil)
				b.decide(revoke(b.session("s2")))
				b.trim(1)
				b.with(func(b *bus) { b.mute = false })
				if restart {
					p.busFeed = b.feed()
					e = p.open(t, keep)
				} else {
					p.to().Connected(true)
					for range 100 {
						time.Sleep(20 * time.Millisecond)
						mustAllow(t, e, ok, session.Call{})
					}
					mustBeCut(work, t, session.ErrRevoked)
					mustRun(other, t)
				}
				for _, id := range []string{"s0", "s1", "s2"} {
					mustDeny(t, e, prepare(t, e, caller(id)), session.Call{}, session.ErrRevoked)
				}
				mustAllow(t, e, prepare(t, e, caller("ok")), session.Call{})
				if s := e.Status(); s.Entries != 3003 || s.Confirmed != b.number || p.reads != 1 {
					t.Fatalf("%d segments fetched, %+v", p.reads, s)
				}
			})
		})
	}
}

// TestGapWithoutASegment: nothing leads over the gap. The enforcer denies from its
// bound on, says why, does not read the log or look for segments over and over,
// and goes on once there is one. A hole is never passed over: the batches behind
// it are there to be read.
func TestGapWithoutASegment(t *testing.T) {
	for name, spoil := range map[string]func(p *publishing){
		"none":    func(*publishing) {},
		"altered": func(p *publishing) { p.publishState(func(_ *session.SegmentRef, b []byte) { b[len(b)/2] ^= 1 }) },
	} {
		t.Run(name, func(t *testing.T) {
			within(t, func(t *testing.T, b *bus) {
				p := &publishing{busFeed: b.feed()}
				b.decide(revoke(b.session("s0")))
				e := p.open(t, nil)
				defer e.Close()
				ok := prepare(t, e, caller("ok"))
				ctx := mustBind(t, e, ok, session.Call{})
				b.with(func(b *bus) { b.mute = true })
				b.decide(revoke(b.session("s1")))
				b.decide(revoke(b.session("s2")))
				spoil(p)
				b.trim(1)
				b.with(func(b *bus) { b.mute = false })
				time.Sleep(DefaultMaxStale - 5*time.Second)
				mustAllow(t, e, ok, session.Call{})
				time.Sleep(6 * time.Second)
				mustDeny(t, e, ok, session.Call{}, session.ErrStale)
				mustBeCut(ctx, t, session.ErrStale)
				reads := b.readings()
				time.Sleep(10 * time.Minute)
				s := e.Status()
				if s.Confirmed != 1 || !strings.Contains(s.Why, "begins after what is in force") {
					t.Fatalf("%+v", s)
				}
				if n := b.readings() - reads; n > 700 || p.reads > 30 {
					t.Fatalf("the log was read %d times, segments %d times", n, p.reads)
				}
				p.publishState(nil)
				time.Sleep(refetchMax + 5*time.Second)
				mustAllow(t, e, ok, session.Call{})
				mustDeny(t, e, prepare(t, e, caller("s1")), session.Call{}, session.ErrRevoked)
				mustDeny(t, e, prepare(t, e, caller("s2")), session.Call{}, session.ErrRevoked)
			})
		})
	}
}

// TestSegmentsThatAreNotBelieved: each of these is passed over for the log, which
// is whole.
func TestSegmentsThatAreNotBelieved(t *testing.T) {
	for name, publish := range map[string]func(t *testing.T, p *publishing){
		"altered": func(_ *testing.T, p *publishing) {
			p.publishState(func(_ *session.SegmentRef, b []byte) { b[len(b)/2] ^= 1 })
		},
		"another's signature": func(t *testing.T, p *publishing) {
			p.publishState(nil)
			p.frames[0] = p.b.seal(session.TypeSegment, frameBody(t, p.frames[0]), p.b.keys["b"])
		},
		"too large": func(_ *testing.T, p *publishing) {
			p.publishState(func(r *session.SegmentRef, _ []byte) { r.Size = session.MaxSegmentSize })
		},
		"of another batch than it says": func(_ *testing.T, p *publishing) {
			p.publishState(func(r *session.SegmentRef, _ []byte) { r.Number++ })
		},
		"of a tenant's key": func(_ *testing.T, p *publishing) {
			b := p.b
			b.newKeySet(func(ks *session.KeySet) {
				ks.Keys = append(ks.Keys, session.SigningKey{Public: b.pub("b"), Use: session.UseWriter, Tenants: []session.TenantID{1}})
			})
			b.as(func(b *bus) { b.signer = b.keys["b"] })
			p.publishState(nil)
			b.as(func(b *bus) { b.signer = b.keys["a"] })
		},
		"of a branch that was not stored": func(_ *testing.T, p *publishing) {
			b := p.b
			kept := b.chainNow()
			b.decide(revoke(b.session("ok")))
			p.publishState(nil)
			b.restore(kept)
			b.decide(revoke(b.session("s2")))
			b.decide(revoke(b.session("s3")))
		},
	} {
		t.Run(name, func(t *testing.T) {
			within(t, func(t *testing.T, b *bus) {
				p := &publishing{busFeed: b.feed()}
				b.decide(revoke(b.session("s1")))
				publish(t, p)
				e := p.open(t, func(o *Options) { o.MaxEntries = 1000 })
				defer e.Close()
				mustDeny(t, e, prepare(t, e, caller("s1")), session.Call{}, session.ErrRevoked)
				mustAllow(t, e, prepare(t, e, caller("ok")), session.Call{})
				if e.view.Load().set.Segment() != nil {
					t.Error("the segment was believed")
				}
			})
		})
	}
}

func frameBody(t *testing.T, b []byte) []byte {
	f, err := session.ParseFrame(b)
	if err != nil {
		t.Fatal(err)
	}
	return f.Body
}

// TestRolledBackBehindASegment: the store was rolled back, a new branch has grown
// beyond what was in force here, and its state is published. The log still shows
// that it is another branch, so the segment does not bring it in: not into an
// enforcer that runs, and not into one that starts with nothing but its floor.
func TestRolledBackBehindASegment(t *testing.T) {
	for _, restart := range []bool{false, true} {
		for _, strays := range []int{0, 3} {
			t.Run(fmt.Sprintf("restart %t, strays %d", restart, strays), func(t *testing.T) {
				within(t, func(t *testing.T, b *bus) {
					dir := t.TempDir()
					keep := func(o *Options) { o.StateDir = dir }
					p := &publishing{busFeed: b.feed()}
					b.decide(revoke(b.session("s0")))
					p.publishState(nil)
					// Strays put the old branch further on in the stream than the new.
					for range strays {
						b.store([][]byte{[]byte("stray")})
					}
					e := p.open(t, keep)
					old := b.chainNow()
					old.log -= strays
					b.decide(revoke(b.session("s1")))
					b.decide(revoke(b.session("s2")))
					time.Sleep(3 * time.Second)
					if restart {
						e.Close()
						if err := os.Remove(segmentPath(e.opts)); err != nil {
							t.Fatal(err)
						}
					}
					b.restore(old)
					for range 8 {
						b.decide(revoke(b.session("s3")))
					}
					p.publishState(nil)
					if restart {
						p.busFeed = b.feed()
						var err error
						if e, err = Start(p, &Options{Enrollment: e.opts.Enrollment, StateDir: dir}); err != nil {
							t.Fatal(err)
						}
					}
					defer e.Close()
					time.Sleep(DefaultMaxStale + 5*time.Minute)
					if s := e.Status(); s.Fresh || !strings.Contains(s.Why, "rolled back") {
						t.Fatalf("%+v", s)
					}
					mustDeny(t, e, prepare(t, e, caller("ok")), session.Call{}, session.ErrStale)
				})
			})
		}
	}
}

// signers is what a description says of who signed what is in the segment.
func (b *bus) signers(last map[string]uint64) (out []session.Signer) {
	for name, n := range last {
		out = append(out, session.Signer{Key: session.KeyIDOf(b.pub(name)), Last: n})
	}
	slices.SortFunc(out, func(a, b session.Signer) int { return bytes.Compare(a.Key[:], b.Key[:]) })
	return out
}

// withdrawB trusts key b up to batch 1 alone, in a key set that is newer than
// everything that was sealed so far.
func (b *bus) withdrawB() {
	b.newKeySet(func(ks *session.KeySet) {
		ks.Issued = b.now()
		ks.Keys[1].Withdrawn, ks.Keys[1].LastEpoch, ks.Keys[1].LastNumber = true, 1, 1
	})
}

// TestWithdrawalBehindAPublishedSegment: an enforcer begins at a published
// segment, which the writer's own key describes, and in which a stolen key has a
// batch. The key is withdrawn behind that, and the log grows anew: an enforcer
// that runs, and one that was down meanwhile, take nothing of the thief's and go
// on from what is published then. Without the description's signers both keep to
// a log that was rolled back, until the next epoch.
func TestWithdrawalBehindAPublishedSegment(t *testing.T) {
	for _, down := range []bool{false, true} {
		t.Run(fmt.Sprintf("down %t", down), func(t *testing.T) {
			within(t, func(t *testing.T, b *bus) {
				p := &publishing{busFeed: b.feed()}
				dir := t.TempDir()
				keep := func(o *Options) { o.StateDir = dir }
				b.newKeySet(func(ks *session.KeySet) {
					ks.Keys = append(ks.Keys, session.SigningKey{Public: b.pub("b"), Use: session.UseWriter})
				})
				b.decide(revoke(b.session("s0")))
				good := b.chainNow()
				b.as(func(b *bus) { b.signer = b.keys["b"] }) // stolen
				b.decide(revoke(b.session("s1")))
				b.as(func(b *bus) { b.signer = b.keys["a"] })
				b.decide(revoke(b.session("s2")))
				p.publishState(func(r *session.SegmentRef, _ []byte) { r.Signers = b.signers(map[string]uint64{"a": 3, "b": 2}) })
				b.trim(0)
				e := p.open(t, keep)
				defer func() { e.Close() }()
				mustDeny(t, e, prepare(t, e, caller("s1")), session.Call{}, session.ErrRevoked)
				if p.reads != 1 {
					t.Fatalf("%d segments were fetched", p.reads)
				}
				time.Sleep(1500 * time.Millisecond) // the floor is saved
				if down {
					e.Close()
				}
				log := b.log
				b.restore(good)
				b.with(func(b *bus) { b.log = log })
				b.withdrawB()
				b.decide(revoke(b.session("s3")))
				if !down {
					settle()
					mustDeny(t, e, prepare(t, e, caller("ok")), session.Call{}, session.ErrStale)
				}
				time.Sleep(time.Second)
				p.publishState(func(r *session.SegmentRef, _ []byte) { r.Signers = b.signers(map[string]uint64{"a": 2}) })
				if down {
					p.busFeed = b.feed()
					e = p.open(t, keep)
				}
				time.Sleep(5 * time.Second)
				for _, id := range []string{"s0", "s3"} {
					mustDeny(t, e, prepare(t, e, caller(id)), session.Call{}, session.ErrRevoked)
				}
				for _, id := range []string{"s1", "s2", "ok"} {
					mustAllow(t, e, prepare(t, e, caller(id)), session.Call{})
				}
				if s := e.Status(); s.Confirmed != 2 || s.RolledBack != 0 || s.Diverged != 0 || p.reads != 2 {
					t.Fatalf("%d segments fetched, %+v", p.reads, s)
				}
			})
		})
	}
}

// TestSegmentsAfterAWithdrawal: a segment that says who signed what is in it is
// judged by that, also when the withdrawal comes while it is fetched, and one that
// does not by when it was sealed. The log is whole.
func TestSegmentsAfterAWithdrawal(t *testing.T) {
	for name, tt := range map[string]struct {
		signers map[string]uint64
		// before and during: when the key is withdrawn; otherwise the segment is
		// sealed after that.
		before, during bool
		want           bool
	}{
		"taken back":                       {signers: map[string]uint64{"a": 3, "b": 2}},
		"taken back while it is fetched":   {signers: map[string]uint64{"a": 3, "b": 2}, during: true},
		"not taken back, sealed before":    {signers: map[string]uint64{"a": 3, "b": 1}, before: true, want: true},
		"signers not known":                {want: true},
		"signers not known, sealed before": {before: true},
	} {
		t.Run(name, func(t *testing.T) {
			within(t, func(t *testing.T, b *bus) {
				p := &publishing{busFeed: b.feed()}
				b.newKeySet(func(ks *session.KeySet) {
					ks.Keys = append(ks.Keys, session.SigningKey{Public: b.pub("b"), Use: session.UseWriter})
				})
				for _, id := range []string{"s0", "s1", "s2"} {
					b.decide(revoke(b.session(id)))
				}
				publish := func() {
					time.Sleep(time.Second)
					p.publishState(func(r *session.SegmentRef, _ []byte) { r.Signers = b.signers(tt.signers) })
				}
				switch {
				case tt.during:
					publish()
					p.during = func() { b.withdrawB(); settle() }
				case tt.before:
					publish()
					b.withdrawB()
				default:
					b.withdrawB()
					publish()
				}
				e := p.open(t, nil)
				defer e.Close()
				mustDeny(t, e, prepare(t, e, caller("s2")), session.Call{}, session.ErrRevoked)
				mustAllow(t, e, prepare(t, e, caller("ok")), session.Call{})
				if got := e.view.Load().set.Segment() != nil; got != tt.want {
					t.Errorf("believed: %t", got)
				}
				if fetched := p.reads > 0; fetched != (tt.want || tt.during) {
					t.Errorf("fetched: %t", fetched)
				}
			})
		})
	}
}
