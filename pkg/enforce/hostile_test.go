package enforce

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/interlock-fabric/interlock/pkg/filter"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// reseal signs content that the codec would not make: the body as it is.
func (b *bus) reseal(frame []byte, mod func(body []byte) []byte) []byte {
	f, err := session.ParseFrame(frame)
	if err != nil {
		b.t.Fatal(err)
	}
	return b.seal(f.Type, mod(bytes.Clone(f.Body)), b.signer)
}

// TestForgeries guards G5: nothing that a trusted key did not sign, for that
// tenant, has any effect; each is counted, and the chain goes on. Without
// Trust.Writer in heard and beat, and without link.may, these would be enforced.
func TestForgeries(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		withdrawn := key(t)
		b.newKeySet(func(ks *session.KeySet) {
			ks.Keys = append(ks.Keys,
				session.SigningKey{Public: b.pub("b"), Use: session.UseWriter, Tenants: []session.TenantID{2}},
				session.SigningKey{Public: pub(withdrawn), Use: session.UseWriter, Withdrawn: true, LastEpoch: 1})
		})
		e, _ := b.open(nil)
		defer e.Close()
		p := prepare(t, e, caller("s1"))
		ctx := mustBind(t, e, p, session.Call{})
		good, _ := b.batch(revoke(b.session("s1")))

		bad := bytes.Clone(good)
		bad[len(bad)-1] ^= 1
		stranger, emergency := b.by(key(t)), b.by(withdrawn)
		for name, frame := range map[string][]byte{
			"bad signature": bad, "unknown key": stranger(revoke(b.session("s1"))), "withdrawn key": emergency(revoke(b.session("s1"))),
			"truncated": good[:len(good)-7], "cut short": good[:9], "empty": {}, "garbage": []byte("ILK\x01 not a frame at all, not in the least"),
			"oversized": make([]byte, session.MaxFrameLen+1),
		} {
			before := e.Status().Refused
			b.say(frame)
			b.sayBeat(frame)
			b.each(func(s Sink) { s.KeySet(frame) })
			settle()
			if after := e.Status().Refused; after != before+3 {
				t.Errorf("%s: %d refused, want 3", name, after-before)
			}
			mustAllow(t, e, p, session.Call{})
		}
		// A frame of the wrong type on each subject.
		before := e.Status().Refused
		b.say(b.beat())
		b.sayBeat(good)
		settle()
		if n := e.Status().Refused - before; n != 2 {
			t.Errorf("%d refused", n)
		}
		mustAllow(t, e, p, session.Call{})

		// A key of tenant 2 that decides for tenant 1 and for all: authentic,
		// so it is in the chain, but those entries are nobody's.
		b.as(func(b *bus) { b.signer = b.keys["b"] })
		globex := b.target("globex", session.Term{Kind: session.KindUser, Issuer: iss, Value: "alice"})
		b.decide(revoke(b.session("s1")), revoke(session.TenantKey(1)), revoke(session.GlobalKey()), revoke(globex))
		settle()
		mustAllow(t, e, p, session.Call{})
		mustRun(ctx, t)
		id := caller("s1")
		id.Tenant = "globex"
		mustDeny(t, e, prepare(t, e, id), session.Call{}, session.ErrRevoked)
		if s := e.Status(); s.Foreign != 3 || s.Confirmed != 1 || s.Diverged != 0 || !s.Fresh {
			t.Fatalf("status %+v", s)
		}
		b.as(func(b *bus) { b.signer = b.keys["a"] })
		b.decide(revoke(b.session("s1")))
		settle()
		mustBeCut(ctx, t, session.ErrRevoked)
	})
}

// as2 returns what makes the next batch under another key.
func (b *bus) by(k ed25519.PrivateKey) func(...session.Entry) []byte {
	return func(entries ...session.Entry) []byte {
		b.writing.Lock()
		defer b.writing.Unlock()
		f, _ := b.make(head{b.number, b.head}, k, entries...)
		return f
	}
}

func pub(k ed25519.PrivateKey) ed25519.PublicKey { return k.Public().(ed25519.PublicKey) }

// TestGarbageHarmsNobody floods every subject with mutations of real frames: no
// panic, no denial, no lasting effect.
func TestGarbageHarmsNobody(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		e, _ := b.open(nil)
		defer e.Close()
		p := prepare(t, e, caller("s1"))
		batch, _ := b.batch(revoke(b.session("s1")), revoke(session.GlobalKey()))
		frames := [][]byte{batch, b.beat(), b.keySets[0]}
		rng := rand.New(rand.NewPCG(5, 6))
		for range 3000 {
			f := bytes.Clone(frames[rng.IntN(len(frames))])
			for range 1 + rng.IntN(4) {
				f[rng.IntN(len(f))] ^= byte(1 + rng.IntN(255))
			}
			if rng.IntN(3) == 0 {
				f = f[:rng.IntN(len(f))]
			}
			b.each(func(s Sink) { s.Batch(f); s.Beat(f); s.KeySet(f) })
			if rng.IntN(100) == 0 {
				settle()
			}
		}
		settle()
		mustAllow(t, e, p, session.Call{})
		b.say(batch)
		settle()
		mustDeny(t, e, p, session.Call{}, session.ErrRevoked)
		if s := e.Status(); s.Refused < 5000 {
			t.Fatalf("%d refused", s.Refused)
		}
	})
}

// TestReplays: every old frame is played again, at once, after a while and after a
// restart of the enforcer: nobody is denied anew for what was lifted, nobody freed.
// Without chain.settled and the deadline in late, the suspension would come back.
func TestReplays(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		e, _ := b.open(nil)
		defer func() { e.Close() }()
		s1, s2 := b.session("s1"), b.session("s2")
		var tape [][]byte
		decide := func(x session.Entry) { tape = append(tape, b.decide(x)); settle() }
		tape = append(tape, b.beat())
		decide(set(session.EffectSuspended, s1))
		decide(lift(session.EffectSuspended, s1))
		decide(set(session.EffectSuspended, s2))
		never := first(b.batch(revoke(s1))) // heard, rejected, and played again
		b.say(never)
		settle()
		mustDeny(t, e, prepare(t, e, caller("s1")), session.Call{}, session.ErrRevoked)
		b.reject(never)
		tape = append(tape, never)
		check := func() {
			t.Helper()
			for range 2 {
				for _, f := range tape {
					b.deliver(func(s Sink) { s.Batch(f); s.Beat(f); s.KeySet(b.keySets[0]) })
					settle()
					mustAllow(t, e, prepare(t, e, caller("s1")), session.Call{})
					mustDeny(t, e, prepare(t, e, caller("s2")), session.Call{}, session.ErrSuspended)
				}
			}
		}
		check()
		for range 15 { // over the deadline of 60 s and what is beyond
			time.Sleep(7 * time.Second)
			check()
		}
		if s := e.Status(); s.Replayed == 0 || s.Diverged != 0 || !s.Fresh {
			t.Fatalf("status %+v", s)
		}
		e.Close()
		tape = tape[:len(tape)-1]
		decide(set(session.EffectReduced, s2))
		decide(lift(session.EffectReduced, s2))
		e, _ = b.open(nil)
		check()
	})
}

// TestReordering: batches and heartbeats in any order lead to the same state.
func TestReordering(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		e, _ := b.open(nil)
		defer e.Close()
		b.as(func(b *bus) { b.silent = true })
		b.with(func(b *bus) { b.hold, b.noLog = true, true })
		for i := range 60 {
			b.decide(set(session.EffectSuspended, b.session(fmt.Sprint(i))))
			if i%2 == 0 {
				b.decide(lift(session.EffectSuspended, b.session(fmt.Sprint(i))))
			}
		}
		rng := rand.New(rand.NewPCG(7, 8))
		rng.Shuffle(len(b.held), func(i, j int) { b.held[i], b.held[j] = b.held[j], b.held[i] })
		b.release()
		b.as(func(b *bus) { b.silent = false })
		time.Sleep(time.Second)
		settle()
		for i := range 60 {
			p := prepare(t, e, caller(fmt.Sprint(i)))
			if i%2 == 0 {
				mustAllow(t, e, p, session.Call{})
			} else {
				mustDeny(t, e, p, session.Call{}, session.ErrSuspended)
			}
		}
		if s := e.Status(); s.Confirmed != 90 || s.Diverged != 0 || s.RolledBack != 0 || b.readings() > 50 {
			t.Fatalf("status %+v, %d reads", s, b.readings())
		}
	})
}

// TestGapIsRepaired: a batch that is lost on the way is read from the log; what
// came after it denies meanwhile.
func TestGapIsRepaired(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		e, _ := b.open(nil)
		defer e.Close()
		b.with(func(b *bus) { b.noLog, b.mute = true, true })
		b.decide(revoke(b.session("s1")))
		b.with(func(b *bus) { b.mute = false })
		b.decide(revoke(b.session("s2")))
		settle()
		mustAllow(t, e, prepare(t, e, caller("s1")), session.Call{})
		mustDeny(t, e, prepare(t, e, caller("s2")), session.Call{}, session.ErrRevoked)
		b.with(func(b *bus) { b.noLog = false })
		time.Sleep(2 * time.Second)
		settle()
		mustDeny(t, e, prepare(t, e, caller("s1")), session.Call{}, session.ErrRevoked)
		if s := e.Status(); s.Confirmed != 2 || s.Repairs == 0 {
			t.Fatalf("status %+v", s)
		}
	})
}

// TestNotUnderstoodIsNotSkipped: an authentic batch with an unknown critical field,
// or a frame of a later version, is never passed over: requests are denied once
// the state is stale, an operator is told why, and the log is not read over and
// over. Were the batch skipped, what follows would be applied without it.
func TestNotUnderstoodIsNotSkipped(t *testing.T) {
	for _, x := range []struct {
		name, want string
		mod        func(b *bus, frame []byte) []byte
	}{
		{"critical field", "cannot be understood", func(b *bus, frame []byte) []byte {
			return b.reseal(frame, func(body []byte) []byte {
				// The batch's own fields come last: a length of two bytes, here
				// none, becomes one critical field without a value.
				body = body[:len(body)-2]
				return append(binary.BigEndian.AppendUint16(body, 3), 0xff, 0, 0)
			})
		}},
		{"unknown effect", "cannot be understood", func(b *bus, frame []byte) []byte {
			return b.reseal(frame, func(body []byte) []byte {
				body[77] = 99 // the first entry's effect, behind 76 bytes of head and its operation
				return body
			})
		}},
		{"version", "too old", func(_ *bus, frame []byte) []byte {
			frame = bytes.Clone(frame)
			frame[3]++
			return frame
		}},
	} {
		t.Run(x.name, func(t *testing.T) {
			within(t, func(t *testing.T, b *bus) {
				var log bytes.Buffer
				e, _ := b.open(func(o *Options) { o.Logger = slog.New(slog.NewTextHandler(&log, nil)) })
				defer e.Close()
				p := prepare(t, e, caller("s1"))
				frame, _ := b.batch(set(session.EffectSuspended, b.session("s2")))
				odd := x.mod(b, frame)
				if bytes.Equal(odd, frame) {
					t.Fatal("nothing odd about it")
				}
				b.say(odd)
				b.as(func(b *bus) {
					b.log = append(b.log, odd)
					b.number++
					if f, err := session.ParseFrame(odd); err == nil {
						b.head = f.Hash()
					} else {
						b.head = session.Hash{1}
					}
				})
				b.decide(revoke(b.session("s1")))
				settle()
				mustDeny(t, e, p, session.Call{}, session.ErrRevoked) // heard, on no chain
				mustAllow(t, e, prepare(t, e, caller("s3")), session.Call{})
				time.Sleep(DefaultMaxStale)
				mustDeny(t, e, prepare(t, e, caller("s3")), session.Call{}, session.ErrStale)
				before := b.readings()
				time.Sleep(10 * time.Minute)
				s := e.Status()
				if s.Confirmed != 0 || s.Refused == 0 || s.Fresh || !strings.Contains(s.Why, x.want) || !strings.Contains(log.String(), x.want) {
					t.Fatalf("status %+v", s)
				}
				if n := strings.Count(log.String(), x.want); n > 12 {
					t.Fatalf("said %d times", n)
				}
				if n := b.readings() - before; n > 700 {
					t.Fatalf("the log was read %d times in ten minutes", n)
				}
			})
		})
	}
}

// TestRolledBackWhileRunning: the authority was restored from an old backup and
// writes on, validly signed, in the same epoch. What was revoked since stays
// revoked, nothing new is believed, the state goes stale, and it is reported; also
// when the log grows past the old head. A new epoch is the way out. Without
// chain.floor the enforcer would take the shorter log after a rebuild.
func TestRolledBackWhileRunning(t *testing.T) {
	for _, longer := range []bool{false, true} {
		within(t, func(t *testing.T, b *bus) {
			e, _ := b.open(nil)
			defer e.Close()
			b.decide(set(session.EffectSuspended, b.session("s0")))
			old := b.chainNow()
			b.decide(revoke(b.session("s1")))
			b.decide(revoke(b.session("s2")))
			time.Sleep(time.Second)
			b.restore(old)
			p := prepare(t, e, caller("s1"))
			if longer {
				for range 5 {
					b.decide(lift(session.EffectSuspended, b.session("s0")))
				}
			}
			time.Sleep(DefaultMaxStale + 2*time.Second)
			mustDeny(t, e, prepare(t, e, caller("ok")), session.Call{}, session.ErrStale)
			mustDeny(t, e, p, session.Call{}, session.ErrRevoked)
			mustDeny(t, e, prepare(t, e, caller("s0")), session.Call{}, session.ErrSuspended)
			s := e.Status()
			if s.Confirmed != 3 || !longer && s.RolledBack == 0 || !strings.Contains(s.Why, "rolled back") {
				t.Fatalf("status %+v", s)
			}
			b.newEpoch()
			time.Sleep(2 * time.Second)
			settle()
			mustAllow(t, e, prepare(t, e, caller("ok")), session.Call{})
			mustDeny(t, e, p, session.Call{}, session.ErrRevoked)
		})
	}
}

// TestFailure13RestartWithARolledBackLog: the log was rolled back while the
// enforcer was down. With a StateDir it denies and says so: without the floor it
// would open and allow who was revoked.
func TestFailure13RestartWithARolledBackLog(t *testing.T) {
	for _, longer := range []bool{false, true} {
		within(t, func(t *testing.T, b *bus) {
			dir := t.TempDir()
			keep := func(o *Options) { o.StateDir = dir }
			e, _ := b.open(keep)
			b.decide(revoke(b.session("s0")))
			settle()
			old := b.chainNow()
			b.decide(revoke(b.session("s1")))
			settle()
			e.Close()

			again, _ := b.open(keep) // an honest restart is no matter
			mustDeny(t, again, prepare(t, again, caller("s1")), session.Call{}, session.ErrRevoked)
			again.Close()

			b.restore(old)
			if longer {
				b.decide(revoke(b.session("s2")))
				b.decide(revoke(b.session("s3")))
			}
			late, _ := b.start(keep)
			defer late.Close()
			p := prepare(t, late, caller("s1"))
			ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
			defer cancel()
			err := late.WaitReady(ctx)
			if err == nil || !strings.Contains(err.Error(), "rolled back") || late.Status().RolledBack == 0 {
				t.Fatalf("longer %t: %v, %+v", longer, err, late.Status())
			}
			mustDeny(t, late, p, session.Call{}, session.ErrStale)
			b.newEpoch()
			b.decide(revoke(b.session("s1")))
			time.Sleep(2 * time.Second)
			mustDeny(t, late, p, session.Call{}, session.ErrRevoked)
			mustAllow(t, late, prepare(t, late, caller("ok")), session.Call{})
		})
	}
}

// backup is the authority at a moment.
type backup struct {
	number uint64
	head   session.Hash
	state  *filter.Set
	log    int
}

func (b *bus) chainNow() *backup {
	b.writing.Lock()
	defer b.writing.Unlock()
	return &backup{b.number, b.head, b.state, len(b.log)}
}

func (b *bus) restore(x *backup) {
	b.writing.Lock()
	defer b.writing.Unlock()
	b.number, b.head, b.state = x.number, x.head, x.state
	b.with(func(b *bus) { b.log = b.log[:x.log] })
}

// TestRecordedClock: an hour later, a bus that recorded a clock answer and the
// heartbeats after it plays both to an enforcer that has just started. Without the
// nonce they would fit together, and an hour's decisions would be missing.
func TestRecordedClock(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		var answer []byte
		b.with(func(b *bus) { b.clock = func(a []byte) []byte { answer = a; return a } })
		e, _ := b.open(nil)
		e.Close()
		b.as(func(b *bus) { b.silent = true })
		var tape [][]byte
		for range 20 {
			time.Sleep(500 * time.Millisecond)
			tape = append(tape, b.beat())
		}
		log := b.log
		b.decide(revoke(b.session("s1")))
		time.Sleep(time.Hour)
		b.with(func(b *bus) { b.log = log })
		wrong := b.beat()
		for name, clock := range map[string]func([]byte) []byte{
			"recorded":     func([]byte) []byte { return answer },
			"by a key":     func(a []byte) []byte { f, _ := session.ParseFrame(a); return b.seal(f.Type, f.Body, key(t)) },
			"not a clock":  func([]byte) []byte { return wrong },
			"not a frame":  func([]byte) []byte { return []byte("ILK") },
			"cut short":    func(a []byte) []byte { return a[:len(a)-1] },
			"of no length": func([]byte) []byte { return nil },
		} {
			b.with(func(b *bus) { b.clock = clock })
			e, f := b.start(nil)
			time.Sleep(time.Second) // as far behind the answer as the first was
			for _, frame := range tape {
				time.Sleep(500 * time.Millisecond)
				f.to().Beat(frame)
				settle()
				mustDeny(t, e, prepare(t, e, caller("s1")), session.Call{}, session.ErrStale)
			}
			if s := e.Status(); s.Ready || s.Refused == 0 {
				t.Fatalf("%s: status %+v", name, s)
			}
			e.Close()
		}
	})
}

// TestSuspendedWhileAsking: the host slept between the question for the clock and
// the answer, so that by its monotonic clock the round trip was short. What it would
// anchor is an hour off.
func TestSuspendedWhileAsking(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		e, f := b.open(nil)
		defer e.Close()
		fw := f.to().(sink).f
		var nonce [32]byte
		answer, err := f.Clock(context.Background(), nonce)
		if err != nil {
			t.Fatal(err)
		}
		var slept, awake error
		fw.events <- func() {
			now := e.opts.clock()
			before := reading{mono: now.mono - time.Millisecond, wall: now.wall - int64(time.Hour)}
			slept = fw.anchored(nonce, before, now, answer)
			before.wall = now.wall - int64(time.Millisecond)
			awake = fw.anchored(nonce, before, now, answer)
		}
		settle()
		if !errors.Is(slept, session.ErrStale) || awake != nil {
			t.Fatalf("%v, %v", slept, awake)
		}
	})
}

// TestFloorFile: what is wrong with the file is said, and nothing is opened.
func TestFloorFile(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		dir := filepath.Join(t.TempDir(), "made")
		e, _ := b.open(func(o *Options) { o.StateDir = dir })
		b.decide(revoke(b.session("s1")))
		settle()
		e.Close()
		path := filepath.Join(dir, "e1.floor.json")
		info, err := os.Stat(path)
		if err != nil || info.Mode().Perm() != 0o600 {
			t.Fatal(info, err)
		}
		if left, err := os.ReadDir(dir); err != nil || len(left) != 2 { // and the sealed state
			t.Fatal(left, err)
		}
		good, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		refused := func(what string) {
			t.Helper()
			f := b.feed()
			_, err := Start(f, &Options{Enrollment: b.enrol("e1"), StateDir: dir})
			if !errors.Is(err, ErrFloor) || !strings.Contains(err.Error(), what) || !strings.Contains(err.Error(), path) || !f.closed {
				t.Fatalf("%v, want %q", err, what)
			}
		}
		for _, bad := range [][]byte{{}, good[:len(good)/2], bytes.Replace(good, []byte(`"number":1`), []byte(`"number":0`), 1), []byte("null")} {
			if err := os.WriteFile(path, bad, 0o600); err != nil {
				t.Fatal(err)
			}
			refused("damaged")
		}
		if err := os.WriteFile(path, good, 0o600); err != nil {
			t.Fatal(err)
		}
		e, _ = b.open(func(o *Options) { o.StateDir = dir })
		e.Close()
		b.root = key(t)
		refused("another root key")
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		if err := os.Mkdir(path, 0o700); err != nil {
			t.Fatal(err)
		}
		refused(path)
	})
}

// TestOlderKeySetIsRefused: across a restart, the bus offers only the key set from
// before a withdrawal.
func TestOlderKeySetIsRefused(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		dir := t.TempDir()
		b.newKeySet(func(ks *session.KeySet) {
			ks.Keys = append(ks.Keys, session.SigningKey{Public: b.pub("b"), Use: session.UseWriter})
		})
		e, _ := b.open(func(o *Options) { o.StateDir = dir })
		time.Sleep(2 * time.Second)
		e.Close()
		newest := b.keySets
		e, _ = b.open(func(o *Options) { o.StateDir = dir })
		if n := e.Status().RolledBack; n != 0 {
			t.Fatalf("%d alarms for key sets that are merely old", n)
		}
		e.Close()
		b.with(func(b *bus) { b.keySets = newest[:1] })
		b.as(func(b *bus) { b.set.Version = 1 })
		e, _ = b.start(func(o *Options) { o.StateDir = dir })
		defer e.Close()
		time.Sleep(time.Minute)
		if s := e.Status(); s.Ready || s.RolledBack == 0 || !strings.Contains(s.Why, "older key set") {
			t.Fatalf("status %+v", s)
		}
		b.with(func(b *bus) { b.keySets = newest })
		b.as(func(b *bus) { b.set.Version = 2 })
		time.Sleep(5 * time.Second)
		mustAllow(t, e, prepare(t, e, caller("s1")), session.Call{})
	})
}

// TestKeySetWithheld: heartbeats name a newer key set than the bus hands out. It
// may withdraw what is trusted here, so nothing is fresh without it.
func TestKeySetWithheld(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		e, _ := b.open(nil)
		defer e.Close()
		p := prepare(t, e, caller("s1"))
		b.as(func(b *bus) { b.set.Version = 2 })
		time.Sleep(DefaultMaxStale + time.Second)
		mustDeny(t, e, p, session.Call{}, session.ErrStale)
		b.publishKeySet()
		recovers(t, e, p)
	})
}

// TestKeySetExpires: a key set that has ended vouches for nothing any more.
func TestKeySetExpires(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		b.newKeySet(func(ks *session.KeySet) { ks.NotAfter = session.InstantOf(time.Now().Add(time.Minute)) })
		e, _ := b.open(nil)
		defer e.Close()
		p := prepare(t, e, caller("s1"))
		time.Sleep(59 * time.Second)
		mustAllow(t, e, p, session.Call{})
		time.Sleep(DefaultMaxStale + time.Second)
		mustDeny(t, e, p, session.Call{}, session.ErrStale)
		b.newKeySet(func(ks *session.KeySet) { ks.NotAfter = session.InstantOf(time.Now().Add(time.Hour)) })
		recovers(t, e, p)
	})
}
