package faults

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"testing"
	"time"

	service "github.com/interlock-fabric/interlock/internal/authority"
	"github.com/interlock-fabric/interlock/internal/broker"
	"github.com/interlock-fabric/interlock/internal/trust"
	"github.com/interlock-fabric/interlock/pkg/authority"
	"github.com/interlock-fabric/interlock/pkg/natsfeed"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// storedLog is the log as it rests in the store.
type storedLog struct {
	epoch, number uint64
	head          session.Hash
	// at is where each decision is, and taken how often.
	at    map[session.DecisionID]uint64
	taken map[session.DecisionID]int
}

// readLog reads the log through an enforcer's own feed and checks that every
// stored batch is the next one of the chain.
func readLog(t *testing.T, e *session.Enrollment) storedLog {
	t.Helper()
	feed, err := natsfeed.Dial(e, nil)
	must(t, err)
	defer feed.Close()
	l := storedLog{at: map[session.DecisionID]uint64{}, taken: map[session.DecisionID]int{}}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	read := func() error {
		_, err := feed.Log(ctx, 0, func(pos uint64, frame []byte) error {
			f, err := session.ParseFrame(frame)
			if err != nil {
				return err
			}
			b, err := session.UnmarshalBatch(f.Body)
			if err != nil {
				return err
			}
			if b.Number != l.number+1 || l.number > 0 && b.Prev != l.head {
				return fmt.Errorf("at position %d of the stream, batch %d does not follow batch %d", pos, b.Number, l.number)
			}
			l.epoch, l.number, l.head = b.Epoch, b.Number, f.Hash()
			for i := range b.Decisions {
				l.at[b.Decisions[i].ID] = b.Number
				l.taken[b.Decisions[i].ID]++
			}
			return nil
		})
		return err
	}
	for err = read(); errors.Is(err, natsfeed.ErrDisconnected) && ctx.Err() == nil; err = read() {
		select { // the connection is still being made
		case <-ctx.Done():
		case <-time.After(10 * time.Millisecond):
		}
	}
	must(t, err)
	return l
}

// once checks that each decision is in the log one time.
func (l *storedLog) once(t *testing.T) {
	t.Helper()
	for id, n := range l.taken {
		if n != 1 {
			t.Errorf("decision %x was taken %d times", id, n)
		}
	}
}

// TestKillTheAuthority kills the authority, with its bus, at each step of an
// append and at none in particular, under load, while enforcers follow. It fails
// when a decision is acknowledged before it is stored, when the log is not
// replayed, when the ids of decisions are not in it, or when an enforcer does
// not come back by itself.
func TestKillTheAuthority(t *testing.T) {
	t.Parallel()
	f := newFabric(t)
	config := childConfig{DataDir: f.dir, NATSListen: f.listen}
	p := spawn(t, config)
	f.dial()
	c := newCrowd(8, 8000)
	auditor := f.enrol("auditor", "")
	guards := f.guards("follower", 3, c, guardOptions{maxStale: bound})

	// Eight callers decide all the time. What is not acknowledged as durable is
	// asked for again, beside what comes next.
	ctx, cancel := context.WithCancel(f.ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	decided := make(chan struct{}, 1<<16)
	for range 8 {
		wg.Go(func() {
			for ctx.Err() == nil {
				v := c.victim(t)
				if d, err := v.revoke(f.ctx, f.client); err == nil && d.Durable {
					decided <- struct{}{}
					continue
				}
				wg.Go(func() {
					try, stop := context.WithTimeout(f.ctx, patience)
					defer stop()
					if _, err := v.insist(try, f.client); err != nil {
						t.Errorf("a decision could not be taken: %v", err)
					}
				})
				select { // an authority that is gone refuses at once
				case <-ctx.Done():
				case <-time.After(50 * time.Millisecond):
				}
			}
		})
	}
	some := func(n int) {
		t.Helper()
		for range n {
			select {
			case <-decided:
			case <-time.After(patience):
				t.Fatal("no decisions any more")
			}
		}
	}
	some(20)
	p.kill()
	for _, s := range []step{beforeAppend, beforeAnswer, inFlight} {
		config.Step, config.KillAt = s, 12
		spawn(t, config).gone()
	}
	config.KillAt = 0
	spawn(t, config)
	for len(decided) > 0 {
		<-decided
	}
	some(20)
	cancel()
	wg.Wait()
	f.allAgree(guards)

	// Whatever is asked for again was taken before, and is where it was said to
	// be.
	n := 0
	for _, v := range c.callers {
		had := v.denied.Load()
		if had == nil {
			continue
		}
		n++
		if n%10 > 0 { // a tenth will do
			continue
		}
		d, err := v.revoke(f.ctx, f.client)
		if err != nil || !d.Durable || !d.Duplicate || d.Number != had.number {
			t.Errorf("%s was acknowledged at %d, and now %+v, %v", v.sid, had.number, d, err)
		}
	}
	l := readLog(t, auditor)
	l.once(t)
	if epoch, number := f.head(); l.epoch != epoch || l.number != number {
		t.Errorf("the log ends at %d, the authority at %d", l.number, number)
	}
	if len(l.at) < n {
		t.Errorf("%d decisions were acknowledged, and %d are in the log", n, len(l.at))
	}
	t.Logf("%d decisions over 4 kills, in %d batches", n, l.number)
}

// shared is a bus that outlives the authorities on it, and their common keys.
type shared struct {
	f    *fabric
	bus  *broker.Broker
	keys *trust.Store
	list []broker.Enforcer
}

func newShared(t *testing.T) *shared {
	t.Helper()
	f := &fabric{t: t, ctx: t.Context(), dir: t.TempDir(), listen: freeAddr(t)}
	keys := initKeys(t, f.dir)
	nkey, err := keys.AuthorityNKey()
	must(t, err)
	bus, err := broker.Start(broker.Options{Dir: filepath.Join(f.dir, "bus"), Listen: f.listen, Authority: nkey})
	must(t, err)
	t.Cleanup(func() { must(t, bus.Close()) })
	return &shared{f: f, bus: bus, keys: keys}
}

func initKeys(t *testing.T, dir string) *trust.Store {
	t.Helper()
	_, err := trust.Init(trust.InitOptions{Dir: filepath.Join(dir, service.KeysDir)}, session.InstantOf(time.Now()))
	must(t, err)
	keys, err := trust.Open(filepath.Join(dir, service.KeysDir))
	must(t, err)
	return keys
}

// admit lets an enforcer onto the bus, which is the operator's to do here.
func (s *shared) admit(e *session.Enrollment) {
	s.f.t.Helper()
	s.list = append(s.list, broker.Enforcer{Name: e.Enforcer, PublicNKey: publicNKey(s.f.t, e.NATS.NKeySeed)})
	must(s.f.t, s.bus.SetEnforcers(s.list))
}

// TestKillTheWriter: of two authorities on one store the one that writes is
// killed between the store's acknowledgement and its answer. The other takes
// over, and what was asked for on both sides, under the same keys, is taken
// once. It fails when idempotency keys are not in the log, or when a lease that
// is not renewed is never taken.
func TestKillTheWriter(t *testing.T) {
	t.Parallel()
	s := newShared(t)
	f := s.f
	var clients [2]*authority.Client
	var procs [2]*process
	for i := range clients {
		dir := filepath.Join(f.dir, fmt.Sprint("a", i))
		copyTree(t, filepath.Join(f.dir, service.KeysDir), filepath.Join(dir, service.KeysDir))
		config := childConfig{DataDir: dir, NATSURL: "nats://" + f.listen}
		if i == 0 {
			config.Step, config.KillAt = beforeAnswer, 30
		}
		procs[i] = spawn(t, config)
		clients[i] = dialAPI(t, dir)
		// The first one is to be the writer.
		if i == 0 {
			eventually(t, patience, "a writer", func() bool {
				st, err := clients[0].Status(f.ctx)
				return err == nil && st.Writer
			})
		}
	}
	f.client = clients[1]
	c := newCrowd(8, 1000)
	auditor := f.enrol("auditor", "")
	s.admit(auditor)
	var guards []*guard
	for i := range 3 {
		e := f.enrol(fmt.Sprint("follower-", i), "")
		s.admit(e)
		guards = append(guards, start(t, e, c, guardOptions{maxStale: bound}))
	}
	for _, g := range guards {
		g.ready(false)
	}
	// Each decision is asked for at both authorities at once, under one key.
	var wg sync.WaitGroup
	ctx, cancel := context.WithTimeout(f.ctx, 4*patience)
	defer cancel()
	var slowest time.Duration
	for range 200 {
		v := c.victim(t)
		began := time.Now()
		wg.Go(func() {
			_, err := v.revoke(ctx, clients[0]) // it may be gone
			if err != nil && !errors.Is(err, authority.ErrUnreachable) {
				var p *authority.Problem
				if !errors.As(err, &p) || p.Type != authority.ProblemUnavailable {
					t.Errorf("%s: %v", v.sid, err)
				}
			}
		})
		if _, err := v.insist(ctx, clients[1]); err != nil {
			t.Fatalf("%s: %v", v.sid, err)
		}
		slowest = max(slowest, time.Since(began))
	}
	wg.Wait()
	procs[0].gone()
	f.allAgree(guards)
	l := readLog(t, auditor)
	l.once(t)
	if len(l.at) < 200 {
		t.Errorf("%d decisions are in the log", len(l.at))
	}
	t.Logf("200 decisions, %d batches; the takeover took %v", l.number, slowest)
}
