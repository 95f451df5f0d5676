package enforce

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/interlock-fabric/interlock/pkg/filter"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// TestInheritedSurvivesARestart: what earlier epochs left in force stays so over
// restarts, in whichever order epochs and restarts come, until it is lifted by
// name; and what was lifted does not come back. Without the file, or with the
// sealed state of an epoch that is past dropped at the start, the suspended would
// be free; without its epoch, what was lifted would be in force again.
func TestInheritedSurvivesARestart(t *testing.T) {
	type step func(b *bus, restart func(kill bool))
	epoch := func(b *bus, _ func(bool)) { b.newEpoch(); b.decide(revoke(b.session("news"))) }
	restart := func(_ *bus, restart func(bool)) { restart(false) }
	kill := func(_ *bus, restart func(bool)) { restart(true) }
	away := func(b *bus, restart func(bool)) {
		b.with(func(b *bus) { b.mute = true })
		epoch(b, restart)
		restart(false)
	}
	wait := func(*bus, func(bool)) { time.Sleep(sealEvery + time.Second) }
	liftOne := func(b *bus, _ func(bool)) {
		b.decide(lift(session.EffectSuspended, b.session("s1")), revoke(b.session("more news")))
	}
	again := func(b *bus, _ func(bool)) { b.decide(set(session.EffectSuspended, b.session("s3"))) }
	for name, steps := range map[string][]step{
		"running, then restarted":                 {epoch, restart},
		"restarted twice":                         {epoch, restart, restart},
		"sealed in the new epoch":                 {epoch, wait, restart},
		"the epoch opens while it is down":        {away},
		"and again":                               {away, restart},
		"two epochs running":                      {epoch, epoch, restart},
		"two epochs, a restart between":           {epoch, restart, epoch, restart},
		"two epochs while it is down":             {func(b *bus, r func(bool)) { b.with(func(b *bus) { b.mute = true }); epoch(b, r); away(b, r) }},
		"one running and one while it is down":    {epoch, away},
		"one while it is down, and one running":   {away, epoch, restart},
		"lifted before the restart":               {epoch, liftOne, restart},
		"lifted before the restart, sealed":       {epoch, wait, liftOne, wait, restart},
		"lifted after the restart":                {epoch, restart, liftOne},
		"lifted after the restart, and restarted": {epoch, restart, liftOne, restart},
		"lifted, and another epoch":               {epoch, liftOne, away},
		"lifted, sealed, and another epoch":       {epoch, liftOne, wait, epoch, restart},
		"running, then killed":                    {epoch, func(*bus, func(bool)) { time.Sleep(time.Second) }, kill},
		"lifted, sealed, and killed":              {epoch, wait, liftOne, wait, kill},
		"lifted and killed":                       {epoch, wait, liftOne, kill},
		"more in the second epoch":                {epoch, again, restart, epoch, restart},
		"more in the second epoch, down":          {away, again, away},
	} {
		t.Run(name, func(t *testing.T) {
			within(t, func(t *testing.T, b *bus) {
				dir := t.TempDir()
				keep := func(o *Options) { o.StateDir = dir } // as it is then
				e, _ := b.open(keep)
				defer func() { e.Close() }()
				b.many(1000)
				b.decide(set(session.EffectSuspended, b.session("s1")), set(session.EffectSuspended, b.session("s2")))
				settle()
				lifted, more := false, false
				for _, s := range steps {
					s(b, func(kill bool) {
						settle()
						if kill { // what is on the disk at this moment is what there is
							at := t.TempDir()
							if err := os.CopyFS(at, os.DirFS(dir)); err != nil {
								t.Fatal(err)
							}
							dir = at
						}
						e.Close()
						b.with(func(b *bus) { b.mute = false })
						e, _ = b.open(keep)
					})
					settle()
				}
				for _, s := range strings.Split(name, " ") {
					lifted, more = lifted || strings.HasPrefix(s, "lifted"), more || s == "more"
				}
				time.Sleep(2 * time.Second)
				s1 := prepare(t, e, caller("s1"))
				if lifted {
					mustAllow(t, e, s1, session.Call{})
				} else {
					mustDeny(t, e, s1, session.Call{}, session.ErrSuspended)
				}
				if more {
					mustDeny(t, e, prepare(t, e, caller("s3")), session.Call{}, session.ErrSuspended)
				}
				s2 := prepare(t, e, caller("s2"))
				mustDeny(t, e, s2, session.Call{}, session.ErrSuspended)
				mustAllow(t, e, prepare(t, e, caller("ok")), session.Call{})
				b.decide(lift(session.EffectSuspended, b.session("s1")), lift(session.EffectSuspended, b.session("s2")))
				settle()
				mustAllow(t, e, s1, session.Call{})
				mustAllow(t, e, s2, session.Call{})
				if s := e.Status(); s.Inherited < 1000 || s.Diverged != 0 {
					t.Fatalf("%+v", s)
				}
			})
		})
	}
}

// TestInheritedFile: it is nowhere else, so an enforcer does not start without it
// when it is damaged; and damage under a running one denies.
func TestInheritedFile(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		dir := t.TempDir()
		keep := func(o *Options) { o.StateDir = dir }
		e, _ := b.open(keep)
		b.many(2000)
		b.decide(set(session.EffectSuspended, b.session("s1")))
		b.newEpoch()
		time.Sleep(time.Second)
		path := filepath.Join(dir, "e1.inherited")
		info, err := os.Stat(path)
		if err != nil || info.Mode().Perm() != 0o600 {
			t.Fatal(info, err)
		}
		whole, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		ok := prepare(t, e, caller("ok"))
		mustAllow(t, e, ok, session.Call{})
		if err := os.Truncate(path, int64(len(whole)/4)); err != nil {
			t.Fatal(err)
		}
		time.Sleep(scrubPass + 2*time.Second)
		mustDeny(t, e, ok, session.Call{}, session.ErrStale)
		e.Close()
		if err := os.Truncate(path, int64(len(whole)/4)); err != nil {
			t.Fatal(err)
		}
		if _, err := Start(b.feed(), &Options{Enrollment: b.enrol("e1"), StateDir: dir}); !errors.Is(err, ErrFloor) || !strings.Contains(err.Error(), path) {
			t.Fatalf("%v", err)
		}
		if err := os.WriteFile(path, whole, 0o600); err != nil {
			t.Fatal(err)
		}
		e, _ = b.open(keep)
		defer e.Close()
		mustDeny(t, e, prepare(t, e, caller("s1")), session.Call{}, session.ErrSuspended)
		mustAllow(t, e, prepare(t, e, caller("ok")), session.Call{})
	})
}

// TestInheritedWithoutAStateDirectory: a restart sees the new epoch alone, as the
// documentation says.
func TestInheritedWithoutAStateDirectory(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		e, _ := b.open(nil)
		b.decide(set(session.EffectSuspended, b.session("s1")))
		b.newEpoch()
		settle()
		mustDeny(t, e, prepare(t, e, caller("s1")), session.Call{}, session.ErrSuspended)
		e.Close()
		e, _ = b.open(nil)
		defer e.Close()
		mustAllow(t, e, prepare(t, e, caller("s1")), session.Call{})
	})
}

// TestCrashBetweenTheTwoFiles: what was inherited had been written, lifts and all,
// and the state of the new epoch had not, when the enforcer was killed; then
// another epoch began. The old state is inherited already: to inherit it again
// would bring back what was lifted.
func TestCrashBetweenTheTwoFiles(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		dir := t.TempDir()
		keep := func(o *Options) { o.StateDir = dir }
		e, _ := b.open(keep)
		b.decide(set(session.EffectSuspended, b.session("s1")), set(session.EffectSuspended, b.session("s2")))
		settle()
		e.Close()
		path := filepath.Join(dir, "e1.segment")
		old, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		e, _ = b.open(keep)
		b.newEpoch()
		b.decide(lift(session.EffectSuspended, b.session("s1")))
		settle()
		e.Close()
		if err := os.WriteFile(path, old, 0o600); err != nil {
			t.Fatal(err)
		}
		b.newEpoch()
		e, _ = b.open(keep)
		defer e.Close()
		mustAllow(t, e, prepare(t, e, caller("s1")), session.Call{})
		mustDeny(t, e, prepare(t, e, caller("s2")), session.Call{}, session.ErrSuspended)
	})
}

// TestDamagedInheritanceIsNotLifted: of what earlier epochs left nothing could be
// read, so that it has no entries. That is not the same as all of it lifted.
func TestDamagedInheritanceIsNotLifted(t *testing.T) {
	path := filepath.Join(t.TempDir(), "segment")
	k := session.Key{Tenant: 1, Shape: session.Shape(session.KindUser)}
	g, err := (*filter.Set)(nil).Apply(&session.Batch{Number: 1, Entries: []session.Entry{revoke(k)}}, nil).Seal(path, filter.Mark{})
	if err == nil {
		err = os.Truncate(path, 4096)
	}
	if err != nil {
		t.Fatal(err)
	}
	f := &follower{chain: newChain(session.Hash{}, head{}), inherited: filter.Merge(g.Set())}
	if f.liftInherited(); !errors.Is(f.inherited.Err(), filter.ErrDamaged) {
		t.Fatal("taken for lifted")
	}
}
