package enforce

import (
	"bytes"
	"encoding/binary"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
	"unsafe"

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

// TestLeftoversOfACrashAreSwept: what was being written when the last run ended is
// removed; what it had written, and what is another's, stays.
func TestLeftoversOfACrashAreSwept(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		dir := t.TempDir()
		keep := func(o *Options) { o.StateDir = dir }
		e, _ := b.open(keep)
		b.decide(revoke(b.session("s1")))
		settle()
		e.Close()
		want := []string{"e1.floor.json", "e1.segment", "e11.segment.1.tmp"}
		for _, name := range []string{"e1.segment.1.tmp", "e1.inherited.2.tmp", "e1.floor.json.3", "e11.segment.1.tmp"} {
			if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		e, _ = b.open(keep)
		defer e.Close()
		settle()
		files, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		var have []string
		for _, f := range files {
			have = append(have, f.Name())
		}
		if !slices.Equal(have, want) {
			t.Fatalf("%v, want %v", have, want)
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

// TestDamageUnderARunningEnforcer: what a check reads is never wrong. A bit that
// flips in the file, in the filter or in the delta, and a file that is cut short:
// a check that meets it is denied, the rest is found within one pass, nothing is
// believed from then on, and the state is rebuilt from the log. Nothing crashes.
func TestDamageUnderARunningEnforcer(t *testing.T) {
	flip := func(t *testing.T, b *bus, _ *Enforcer, path string) {
		whole, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		k := b.session("s1")
		f, err := os.OpenFile(path, os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		at := bytes.Index(whole, k.Digest[:])
		if _, err := f.WriteAt([]byte{whole[at] ^ 1}, int64(at)); err != nil {
			t.Fatal(err)
		}
		f.Close()
	}
	for _, x := range []struct {
		name   string
		met    bool // by a check, which is denied
		damage func(t *testing.T, b *bus, e *Enforcer, path string)
	}{
		{"a bit of the file, met by a check", true, flip},
		{"a bit of the file, found by the scrub", false, flip},
		{"the file cut short, met by a check", true, func(t *testing.T, _ *bus, _ *Enforcer, path string) {
			if err := os.Truncate(path, 5000); err != nil {
				t.Fatal(err)
			}
		}},
		{"the file cut short, found by the scrub", false, func(t *testing.T, _ *bus, _ *Enforcer, path string) {
			if err := os.Truncate(path, 0); err != nil {
				t.Fatal(err)
			}
		}},
		{"bits of the filter, found by the scrub", false, func(_ *testing.T, _ *bus, e *Enforcer, _ string) {
			words := reflect.ValueOf(e.view.Load().set.Segment()).Elem().FieldByName("filter").Elem().FieldByName("words")
			for _, w := range unsafe.Slice((*uint64)(words.UnsafePointer()), words.Len()) {
				if w != 0 {
					*(*uint64)(words.UnsafePointer()) ^= 1
					break
				}
			}
		}},
		{"a bit of the delta, found by counting", false, func(_ *testing.T, b *bus, e *Enforcer, _ string) {
			newer := b.session("newer")
			// By the follower itself, so that it does not race with what it starts.
			b.each(func(s Sink) {
				s.(sink).push(func() { e.view.Load().set.Lookup(newer)[0].Except[0].Digest[0] ^= 1 }) // it shares the array
			})
		}},
	} {
		t.Run(x.name, func(t *testing.T) {
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
				newer := revoke(b.session("newer"))
				newer.Except = []session.Key{b.user("somebody")}
				b.decide(newer)
				settle()
				bad, ok := prepare(t, e, caller("s1")), prepare(t, e, caller("ok"))
				mustAllow(t, e, ok, session.Call{})
				x.damage(t, b, e, filepath.Join(dir, "e1.segment"))
				if x.met {
					mustDeny(t, e, bad, session.Call{}, session.ErrStale)
					mustDeny(t, e, ok, session.Call{}, session.ErrStale)
				}
				for range 10 * (scrubPass/time.Second + 1) {
					if e.Status().Damaged > 0 {
						break
					}
					time.Sleep(time.Second / 10)
				}
				time.Sleep(5 * time.Second)
				if s := e.Status(); s.Damaged != 1 || s.Diverged != 0 || s.Entries != 2002 {
					t.Errorf("%+v", s)
				}
				mustDeny(t, e, bad, session.Call{}, session.ErrRevoked)
				mustDeny(t, e, prepare(t, e, caller("newer")), session.Call{}, session.ErrRevoked)
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

// TestABurstIsMergedWhenItIsOver: while decisions go on arriving, a delta that is
// worth a merge waits, and is merged when they stop. Without calm it is merged at
// once, and the last look fails when it is never.
func TestABurstIsMergedWhenItIsOver(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		e, _ := b.open(nil)
		defer e.Close()
		b.many(132_000)
		merged := func() bool { return e.view.Load().set.Segment() != nil }
		for i := range 20 {
			b.decide(revoke(b.session(strings.Repeat("x", i+1))))
			time.Sleep(calm / 2)
			if merged() {
				t.Fatal("merged in the burst")
			}
		}
		time.Sleep(calm)
		if s := e.Status(); !merged() || s.Entries != 132_020 {
			t.Errorf("%+v, merged: %t", s, merged())
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
