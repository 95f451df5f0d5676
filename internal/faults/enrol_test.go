package faults

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/interlock-fabric/interlock/pkg/natsfeed"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// TestRosterChanges enrols many enforcers at once and retires one, while others
// work. It fails when a retired enforcer is not cut off, and when a change of
// the bus's accounts disturbs a connection or loses an answer on its way.
func TestRosterChanges(t *testing.T) {
	f := newFabric(t)
	f.open()
	c := newCrowd(16, 400)
	guards := f.guards("running", 3, c, guardOptions{maxStale: bound, steady: true})
	gone := f.guard("retired", "", c, guardOptions{maxStale: bound})
	stop := f.steadily(c, 10*time.Millisecond, func(ctx context.Context, v *caller) error {
		_, err := v.insist(ctx, f.client)
		return err
	})
	// One enforcer asks for the clock all the time: an answer that a change of
	// the accounts loses would show.
	asking := f.enrol("asking", "")
	nc := connect(t, f.listen, asking.NATS.NKeySeed, nats.CustomInboxPrefix(natsfeed.InboxPrefix("asking")))
	ctx, cancel := context.WithCancel(f.ctx)
	var wg sync.WaitGroup
	var asked, unanswered int
	wg.Go(func() {
		tick := time.NewTicker(60 * time.Millisecond) // below the writer's limit for one
		defer tick.Stop()
		for ctx.Err() == nil {
			asked++
			if _, err := nc.Request(natsfeed.ClockSubject("asking"), make([]byte, 32), time.Second); err != nil {
				unanswered++
				t.Logf("clock: %v", err)
			}
			select {
			case <-ctx.Done():
			case <-tick.C:
			}
		}
	})
	before := make([]natsfeed.Stats, len(guards))
	for i, g := range guards {
		before[i] = g.feed.Stats()
	}
	const many = 30
	began := time.Now()
	enrolments := make([]*session.Enrollment, many)
	var enrolling sync.WaitGroup
	for i := range many {
		enrolling.Go(func() { enrolments[i] = f.enrol(fmt.Sprintf("new-%d", i), "") })
	}
	enrolling.Wait()
	took := time.Since(began)
	var fresh []*guard
	for i := 0; i < many; i += 10 {
		fresh = append(fresh, start(t, enrolments[i], c, guardOptions{maxStale: bound}))
	}
	for _, g := range fresh {
		g.ready(false)
	}
	must(t, f.client.Retire(f.ctx, "retired"))
	eventually(t, patience, gone, func() bool { return !gone.enf.Status().Fresh })
	cancel()
	wg.Wait()
	n := stop()
	f.allAgree(append(guards, fresh...))
	for i, g := range guards {
		if s := g.feed.Stats(); s.Reconnects != before[i].Reconnects || s.Overflowed > 0 {
			t.Errorf("%s was disturbed: %+v, then %+v", g.name, before[i], s)
		}
		if s := g.enf.Status(); s.Refused > 0 || s.Lost > 0 {
			t.Errorf("%s was disturbed: %+v", g.name, s)
		}
	}
	if unanswered > 0 {
		t.Errorf("%d of %d questions for the clock went without an answer", unanswered, asked)
	}
	if _, err := nats.Connect("nats://"+f.listen, nkeyOption(t, gone.enrolled.NATS.NKeySeed)); !errors.Is(err, nats.ErrAuthorization) {
		t.Errorf("the retired one's NKey: %v", err)
	}
	t.Logf("%d enrolments at once took %v; %d decisions meanwhile; %d clocks", many, took, n, asked)
}
