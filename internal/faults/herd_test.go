package faults

import (
	"context"
	"errors"
	"fmt"
	"os"
	"regexp"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/interlock-fabric/interlock/pkg/authority"
	"github.com/interlock-fabric/interlock/pkg/enforce"
	"github.com/interlock-fabric/interlock/pkg/natsfeed"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// herdWithin is how long 100 enforcers may take until all of them have a state of
// 10,000 entries, on two cores that the enforcers, the authority and its bus have
// to themselves; more where the detector of races runs beside them.
const herdWithin = 10 * time.Second

// herd is smaller under the race detector, which makes each of them several times
// as costly.
const herd = 100 / slack

// residentMiB is what a process holds in memory now, or 0 where that cannot be told.
func residentMiB(pid int) int {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0
	}
	m := regexp.MustCompile(`VmRSS:\s+(\d+) kB`).FindSubmatch(raw)
	if m == nil {
		return 0
	}
	kb, err := strconv.Atoi(string(m[1]))
	if err != nil {
		return 0
	}
	return kb >> 10
}

// TestHerd starts 100 enforcers at once, on empty disks, while decisions are made;
// then the bus restarts under all of them. None allows anything before it is
// ready, each is ready within herdWithin and again after the restart, what is
// decided meanwhile is in force on all of them, nobody is cut for being slow, and
// what the bus holds in memory for them stays small: at most one answer each is
// on its way, and less while it is slow to send (natsfeed's pace).
func TestHerd(t *testing.T) {
	const entries = 10_000
	f := newFabric(t)
	config := childConfig{DataDir: f.dir, NATSListen: f.listen}
	p := spawn(t, config)
	f.dial()
	for i := 0; i < entries; i += authority.MaxTargets {
		r := authority.Request{Operation: authority.Revoke, Reason: "stolen-token", Commit: true}
		for j := range authority.MaxTargets {
			r.Targets = append(r.Targets, authority.One("", "session", issuer, fmt.Sprintf("old-%d", i+j)))
		}
		_, err := f.client.DecideOnce(f.ctx, fmt.Sprint("old ", i), r)
		must(t, err)
	}
	enrolled := make([]*session.Enrollment, herd)
	var enrolling sync.WaitGroup
	for i := range enrolled {
		enrolling.Go(func() { enrolled[i] = f.enrol(fmt.Sprintf("herd-%d", i), "") })
	}
	enrolling.Wait()
	if t.Failed() {
		return
	}

	c := newCrowd(1, 4000)
	decided := 0
	decide := func() func() {
		stop := f.steadily(c, 50*time.Millisecond, func(ctx context.Context, v *caller) error {
			_, err := v.insist(ctx, f.client)
			return err
		})
		return func() { decided += stop() }
	}
	before, most := residentMiB(p.cmd.Process.Pid), 0
	stop := decide()
	ctx, cancel := context.WithTimeout(f.ctx, slack*patience)
	defer cancel()
	type member struct {
		feed *natsfeed.Feed
		enf  *enforce.Enforcer
	}
	members := make([]member, herd)
	took := make([]time.Duration, herd)
	began := time.Now()
	var starting sync.WaitGroup
	for i, e := range enrolled {
		feed, err := natsfeed.Dial(e, nil)
		must(t, err)
		enf, err := enforce.Start(feed, &enforce.Options{Enrollment: e})
		must(t, err)
		t.Cleanup(func() {
			if err := enf.Close(); err != nil {
				t.Error(err)
			}
		})
		members[i] = member{feed, enf}
		starting.Go(func() {
			innocent, err := enf.Prepare(c.callers[0].identity())
			if err != nil {
				t.Error(err)
				return
			}
			ready := make(chan error, 1)
			go func() { ready <- enf.WaitReady(ctx) }()
			tick := time.NewTicker(10 * time.Millisecond)
			defer tick.Stop()
			for {
				allowed := enf.Check(innocent, session.Call{}) == nil
				// A state is in force a little before it is told to be ready, so
				// it is the state itself that counts.
				if s := enf.Status(); allowed && s.Entries < entries {
					t.Errorf("%s allowed with %d entries", s.Enforcer, s.Entries)
				}
				select {
				case err := <-ready:
					if took[i] = time.Since(began); err != nil {
						t.Error(err)
					}
					return
				case <-tick.C:
				}
			}
		})
	}
	measured := make(chan struct{})
	go func() {
		defer close(measured)
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
				most = max(most, residentMiB(p.cmd.Process.Pid))
			}
		}
	}()
	starting.Wait()
	cancel()
	<-measured
	last := time.Duration(0)
	for _, d := range took {
		last = max(last, d)
	}
	limit := slack * herdWithin
	t.Logf("%d enforcers with %d entries: the last was ready after %v; the authority and its bus held %d MiB before, at most %d meanwhile",
		herd, entries, last.Round(time.Millisecond), before, most)
	if last > limit {
		t.Errorf("the last was ready after %v, want %v", last, limit)
	}
	// A megabyte each, the log's cache, and what the collector has not taken yet.
	if most-before > 256 {
		t.Errorf("the authority and its bus took %d MiB more for them", most-before)
	}
	agree := func() {
		t.Helper()
		epoch, number := f.head()
		for i, m := range members {
			var victims []*session.Prepared
			for _, v := range c.callers {
				if v.denied.Load() != nil {
					p, err := m.enf.Prepare(v.identity())
					must(t, err)
					victims = append(victims, p)
				}
			}
			innocent, err := m.enf.Prepare(c.callers[0].identity())
			must(t, err)
			eventually(t, patience, fmt.Sprintf("herd-%d: %+v", i, m.enf.Status()), func() bool {
				s := m.enf.Status()
				if !s.Fresh || s.Epoch != epoch || s.Confirmed < number || m.enf.Check(innocent, session.Call{}) != nil {
					return false
				}
				for _, p := range victims {
					if !errors.Is(m.enf.Check(p, session.Call{}), session.ErrRevoked) {
						return false
					}
				}
				return true
			})
			if st, s := m.feed.Stats(), m.enf.Status(); st.Overflowed > 0 || s.Lost > 0 || s.Refused > 0 || s.Diverged > 0 {
				t.Errorf("herd-%d: %+v, %+v", i, st, s)
			}
		}
	}
	stop()
	agree()
	for i, m := range members {
		if n := m.feed.Stats().Reconnects; n > 0 {
			t.Errorf("herd-%d was cut off %d times", i, n)
		}
	}

	p.stop()
	again := time.Now()
	spawn(t, config)
	stop = decide()
	for i, m := range members {
		eventually(t, patience, fmt.Sprintf("herd-%d is back", i), func() bool { return m.feed.Stats().Reconnects > 0 })
	}
	stop()
	agree()
	t.Logf("all of them agree %v after the bus was stopped; %d decisions", time.Since(again).Round(time.Millisecond), decided)
	if decided == 0 {
		t.Error("nothing was decided meanwhile")
	}
	// A restart is one repair or two, not a storm of them.
	for i, m := range members {
		if n := m.feed.Stats().Requests; n > 200 {
			t.Errorf("herd-%d read %d times", i, n)
		}
	}
}
