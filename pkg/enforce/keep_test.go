package enforce

import (
	"bytes"
	"encoding/binary"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/interlock-fabric/interlock/pkg/filter"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// many revokes n sessions of nobody, so that the state takes several blocks.
func (b *bus) many(n int) {
	k := b.session("template")
	for i := 0; i < n; i += session.MaxBatchEntries {
		var entries []session.Entry
		for j := i; j < min(n, i+session.MaxBatchEntries); j++ {
			binary.BigEndian.PutUint64(k.Digest[:], uint64(j+1)*0x9e3779b97f4a7c15)
			entries = append(entries, revoke(k))
		}
		b.decide(entries...)
	}
}

// TestWarmStart: a restart goes on from the sealed state, and reads of the log
// what came since.
func TestWarmStart(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		dir := t.TempDir()
		keep := func(o *Options) { o.StateDir = dir }
		e, _ := b.open(keep)
		b.many(5000)
		b.decide(revoke(b.session("s1")))
		settle()
		e.Close()
		b.decide(revoke(b.session("s2")))
		// All that the last run had confirmed is gone from the log.
		b.with(func(b *bus) {
			for i := range b.log[:len(b.log)-1] {
				b.log[i] = []byte("trimmed")
			}
		})
		e, _ = b.open(keep)
		defer e.Close()
		s := e.Status()
		if s.Entries != 5002 || s.Applied != b.number || s.Damaged != 0 {
			t.Fatalf("%+v", s)
		}
		mustDeny(t, e, prepare(t, e, caller("s1")), session.Call{}, session.ErrRevoked)
		mustDeny(t, e, prepare(t, e, caller("s2")), session.Call{}, session.ErrRevoked)
		mustAllow(t, e, prepare(t, e, caller("ok")), session.Call{})
		if g := e.view.Load().set.Segment(); g == nil || g.Len() < 5001 {
			t.Error("the state is not the sealed one")
		}
	})
}

// TestWarmStartIsNotBelievedByItself: the sealed state denies until a heartbeat
// has vouched for it, however fresh the file is.
func TestWarmStartIsNotBelievedByItself(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		dir := t.TempDir()
		keep := func(o *Options) { o.StateDir = dir }
		e, _ := b.open(keep)
		b.decide(revoke(b.session("s1")))
		settle()
		e.Close()
		b.as(func(b *bus) { b.silent = true })
		e, _ = b.start(keep)
		defer e.Close()
		p := prepare(t, e, caller("ok"))
		time.Sleep(5 * time.Second)
		mustDeny(t, e, p, session.Call{}, session.ErrStale)
		b.as(func(b *bus) { b.silent = false })
		recovers(t, e, p)
	})
}

// TestWarmStartAfterWithdrawal: a key that signed some of the sealed state has
// been withdrawn since.
func TestWarmStartAfterWithdrawal(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		dir := t.TempDir()
		keep := func(o *Options) { o.StateDir = dir }
		b.newKeySet(func(ks *session.KeySet) {
			ks.Keys = append(ks.Keys, session.SigningKey{Public: b.pub("b"), Use: session.UseWriter})
		})
		e, _ := b.open(keep)
		b.decide(revoke(b.session("s1")))
		settle()
		kept := b.chainNow()
		b.as(func(b *bus) { b.signer = b.keys["b"] })
		b.decide(revoke(b.session("s2"))) // by the thief of key b
		settle()
		e.Close()
		b.restore(kept)
		b.as(func(b *bus) { b.signer = b.keys["a"] })
		b.newKeySet(func(ks *session.KeySet) {
			ks.Keys[1].Withdrawn, ks.Keys[1].LastEpoch, ks.Keys[1].LastNumber = true, ks.Epoch, kept.number
		})
		e, _ = b.open(keep)
		defer e.Close()
		mustDeny(t, e, prepare(t, e, caller("s1")), session.Call{}, session.ErrRevoked)
		mustAllow(t, e, prepare(t, e, caller("s2")), session.Call{})
	})
}

// TestDamagedSegmentIsRefused: a torn, altered or newer file costs the time of
// reading the log, is said, and is never believed.
func TestDamagedSegmentIsRefused(t *testing.T) {
	for name, damage := range map[string]func([]byte) []byte{
		"torn":  func(b []byte) []byte { return b[:len(b)/2] },
		"empty": func([]byte) []byte { return nil },
		"bit":   func(b []byte) []byte { b[len(b)-9] ^= 1; return b },
		"newer": func(b []byte) []byte { b[11] = 9; return b },
	} {
		t.Run(name, func(t *testing.T) {
			within(t, func(t *testing.T, b *bus) {
				dir := t.TempDir()
				keep := func(o *Options) { o.StateDir = dir }
				e, _ := b.open(keep)
				b.many(2000)
				b.decide(revoke(b.session("s1")))
				settle()
				e.Close()
				path := filepath.Join(dir, "e1.segment")
				whole, err := os.ReadFile(path)
				if err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(path, damage(whole), 0o600); err != nil {
					t.Fatal(err)
				}
				e, _ = b.open(keep)
				defer e.Close()
				if s := e.Status(); s.Damaged != 1 || s.Entries != 2001 {
					t.Errorf("%+v", s)
				}
				mustDeny(t, e, prepare(t, e, caller("s1")), session.Call{}, session.ErrRevoked)
			})
		})
	}
}

// TestDamageUnderARunningEnforcer: a check that meets it is denied, nothing else
// is believed either, and the state is rebuilt from the log.
func TestDamageUnderARunningEnforcer(t *testing.T) {
	for _, name := range []string{"met by a check", "found by the scrub"} {
		t.Run(name, func(t *testing.T) {
			within(t, func(t *testing.T, b *bus) {
				dir := t.TempDir()
				keep := func(o *Options) { o.StateDir = dir }
				e, _ := b.open(keep)
				b.many(2000)
				b.decide(revoke(b.session("s1")))
				settle()
				e.Close()
				e, _ = b.open(keep)
				defer e.Close()
				bad, ok := prepare(t, e, caller("s1")), prepare(t, e, caller("ok"))
				mustAllow(t, e, ok, session.Call{})
				path := filepath.Join(dir, "e1.segment")
				whole, err := os.ReadFile(path)
				if err != nil {
					t.Fatal(err)
				}
				k := b.session("s1")
				whole[bytes.Index(whole, k.Digest[:])] ^= 1
				f, err := os.OpenFile(path, os.O_WRONLY, 0)
				if err != nil {
					t.Fatal(err)
				}
				if _, err := f.WriteAt(whole, 0); err != nil {
					t.Fatal(err)
				}
				f.Close()
				if name == "met by a check" {
					mustDeny(t, e, bad, session.Call{}, session.ErrStale)
					mustDeny(t, e, ok, session.Call{}, session.ErrStale)
				} else {
					time.Sleep(scrubPass + time.Second)
				}
				time.Sleep(5 * time.Second)
				if n := e.Status().Damaged; n != 1 {
					t.Errorf("damage was found %d times", n)
				}
				mustDeny(t, e, bad, session.Call{}, session.ErrRevoked)
				mustAllow(t, e, ok, session.Call{})
			})
		})
	}
}

// TestSealedWhileRunning: the state is sealed in the background, and what comes in
// meanwhile is kept.
func TestSealedWhileRunning(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		dir := t.TempDir()
		e, _ := b.open(func(o *Options) { o.StateDir = dir })
		defer e.Close()
		b.many(1000)
		time.Sleep(sealEvery + time.Second)
		for i := range 20 {
			b.decide(revoke(b.session(strings.Repeat("x", i+1))))
			time.Sleep(sealEvery / 4)
		}
		settle()
		set := e.view.Load().set
		if set.Segment() == nil || set.Segment().Len() < 1000 || e.Status().Entries != 1020 || e.Status().Diverged != 0 {
			t.Errorf("%+v", e.Status())
		}
		sums, n, err := set.Recount()
		if err != nil || n != 1020 || sums.Total() != b.state.Digest() {
			t.Errorf("%d records, %v", n, err)
		}
		if _, err := filter.OpenSegment(filepath.Join(dir, "e1.segment")); err != nil {
			t.Error(err)
		}
	})
}

// TestFailure10TooMuchIsDeniedNotForgotten: beyond its bound an enforcer denies
// everything and says so, and goes on once there is room.
func TestFailure10TooMuchIsDeniedNotForgotten(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		e, _ := b.open(func(o *Options) { o.MaxEntries = 3 })
		defer e.Close()
		ok := prepare(t, e, caller("ok"))
		user := b.target("acme", session.Term{Kind: session.KindRole, Value: "temp"})
		b.decide(revoke(b.session("s1")), revoke(b.session("s2")), revoke(b.session("s3")))
		settle()
		mustAllow(t, e, ok, session.Call{})
		suspend := session.Entry{Op: session.OpSet, Effect: session.EffectSuspended, Key: user}
		b.decide(suspend)
		settle()
		mustDeny(t, e, ok, session.Call{}, session.ErrStale)
		if s := e.Status(); !strings.Contains(s.Why, "more entries") || s.Entries != 4 {
			t.Errorf("%+v", s)
		}
		mustDeny(t, e, prepare(t, e, caller("s3")), session.Call{}, session.ErrDenied)
		suspend.Op = session.OpLift
		b.decide(suspend)
		settle()
		mustAllow(t, e, ok, session.Call{})
	})
}
