package sequencer

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/interlock-fabric/interlock/pkg/session"
)

// pair is two authorities on one store, each of which can be closed, stopped in
// its tracks, or made to believe that it is the writer.
type pair struct {
	*store
	mu     sync.RWMutex
	q      [2]*Sequencer
	usurp  [2]atomic.Bool
	pause  [2]atomic.Pointer[chan struct{}]
	paused chan int
	mod    []func(*Options)
}

func newPair(t *testing.T, mod ...func(*Options)) *pair {
	p := &pair{store: newStore(t), paused: make(chan int, 1), mod: mod}
	for i := range p.q {
		p.reopen(i)
	}
	t.Cleanup(func() {
		for i := range p.pause {
			if c := p.pause[i].Swap(nil); c != nil {
				close(*c)
			}
		}
	})
	return p
}

func (p *pair) reopen(i int) {
	q := p.open(func(o *Options) {
		for _, m := range p.mod {
			m(o)
		}
		o.Lease = 500 * time.Millisecond
		o.Hooks.Usurp = p.usurp[i].Load
		o.Hooks.BeforeAppend = func(uint64) {
			if c := p.pause[i].Load(); c != nil {
				select {
				case p.paused <- i:
				default:
				}
				<-*c
			}
		}
	})
	p.mu.Lock()
	p.q[i] = q
	p.mu.Unlock()
}

func (p *pair) at(i int) *Sequencer {
	p.mu.RLock()
	defer p.mu.RUnlock()
	return p.q[i]
}

// writer returns the index of the one that writes.
func (p *pair) writer() int {
	w := -1
	eventually(p.tb, "somebody writes", func() bool {
		for i := range p.q {
			if p.at(i).IsWriter() {
				w = i
				return true
			}
		}
		return false
	})
	return w
}

// outcome of one decision, as its caller saw it.
type outcome struct {
	durable bool
	number  uint64
}

// decide sends a decision until it is durable, to one authority after another.
func (p *pair) decide(t *testing.T, n int) outcome {
	for try := 0; ; try++ {
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		res, err := p.at((n+try)%2).Decide(ctx, revoke(n))
		cancel()
		switch {
		case err == nil && res.Durable:
			return outcome{true, res.Number}
		case err == nil:
		case errors.Is(err, ErrClosed), errors.Is(err, ErrNoWriter), errors.Is(err, ErrBusy):
		default:
			t.Errorf("decision %d: %v", n, err)
			return outcome{}
		}
		if try > 1000 {
			t.Errorf("decision %d: given up", n)
			return outcome{}
		}
	}
}

// The chain does not fork and every acknowledged decision is in it once, however
// often the writer changes under load: by closing, by a pause that outlasts the
// lease, and by two that both believe to write. Taking out the examination of
// what is stored on a wrong last sequence, or the rule that a batch counts only
// behind what is known, makes this fail.
func TestTwoAuthorities(t *testing.T) {
	p := newPair(t)
	const n, callers = 10_000, 64
	outcomes := make([]outcome, n)
	var done atomic.Int64
	var wg sync.WaitGroup
	for g := range callers {
		wg.Go(func() {
			for i := g; i < n; i += callers {
				outcomes[i] = p.decide(t, i)
				done.Add(1)
			}
		})
	}
	reached := func(at int64) { eventually(t, "progress", func() bool { return done.Load() >= at || t.Failed() }) }

	reached(n / 10) // the writer is closed
	w := p.writer()
	p.at(w).Close()
	p.reopen(w)

	reached(2 * n / 10) // the writer stands still for longer than its lease
	pause(t, p)

	reached(4 * n / 10) // both believe to write
	p.usurp[0].Store(true)
	p.usurp[1].Store(true)
	reached(6 * n / 10)
	p.usurp[0].Store(false)
	p.usurp[1].Store(false)

	reached(7 * n / 10)
	pause(t, p)
	w = p.writer()
	p.at(w).Close()
	p.reopen(w)
	wg.Wait()
	if t.Failed() {
		return
	}

	l := readLog(t, p.conn(), p.at(0).trust)
	for i := range n {
		if l.at[id(i)] != 1 {
			t.Fatalf("decision %d is in the chain %d times", i, l.at[id(i)])
		}
		if !outcomes[i].durable || outcomes[i].number != l.where[id(i)] {
			t.Fatalf("decision %d: the caller was told %+v, the chain has it at %d", i, outcomes[i], l.where[id(i)])
		}
	}
	for i := range p.q {
		eventually(t, "both agree with the log", func() bool {
			_, number, head := p.at(i).Head()
			return number >= uint64(len(l.batches)) && head == readLog(t, p.conn(), p.at(0).trust).hashes[number]
		})
		if got := p.at(i).State().Digest(); got != l.set.Digest() {
			t.Fatalf("authority %d has another state than the log", i)
		}
	}
	deposed := p.at(0).Status().Deposed + p.at(1).Status().Deposed
	if deposed == 0 {
		t.Fatal("nobody was ever deposed: the test tests nothing")
	}
	t.Logf("%d batches, %d messages stored, deposed %d times", len(l.batches), l.seqs, deposed)
}

func pause(t *testing.T, p *pair) {
	t.Helper()
	w := p.writer()
	c := make(chan struct{})
	p.pause[w].Store(&c)
	eventually(t, "the other has taken over", func() bool { return p.at(1 - w).IsWriter() })
	p.pause[w].Store(nil)
	close(c)
}

// Decisions of one and the same ID, at once and at both authorities, are one.
func TestSameIDEverywhere(t *testing.T) {
	p := newPair(t)
	p.writer()
	var wg sync.WaitGroup
	var firsts atomic.Int64
	for range 20 {
		n := rand.IntN(1 << 30)
		var numbers sync.Map
		firsts.Store(0)
		for g := range 8 {
			wg.Go(func() {
				res, err := p.at(g%2).Decide(context.Background(), revoke(n))
				if err != nil || !res.Durable {
					t.Errorf("%+v, %v", res, err)
				}
				if !res.Duplicate {
					firsts.Add(1)
				}
				numbers.Store(res.Number, true)
			})
		}
		wg.Wait()
		count := 0
		numbers.Range(func(any, any) bool { count++; return true })
		if count != 1 || firsts.Load() != 1 {
			t.Fatalf("one decision at %d numbers, first %d times", count, firsts.Load())
		}
	}
}

// A clean Close hands over at once, not after the lease has run out.
func TestCloseHandsOver(t *testing.T) {
	s := newStore(t)
	long := func(o *Options) { o.Lease = time.Minute }
	a := s.open(long)
	eventually(t, "the first writes", a.IsWriter)
	b := s.open(long)
	if b.IsWriter() {
		t.Fatal("two writers")
	}
	res, err := b.Decide(context.Background(), revoke(1)) // forwarded
	must(t, err)
	if !res.Durable {
		t.Fatalf("%+v", res)
	}
	eventually(t, "the second follows", func() bool { return b.State().Len() == 1 })
	a.Close()
	eventually(t, "the second writes", b.IsWriter)
	res, err = b.Decide(context.Background(), revoke(1))
	must(t, err)
	if !res.Duplicate {
		t.Fatalf("%+v", res)
	}
}

// Errors that only the writer knows reach the caller of another authority.
func TestForwardedRefusal(t *testing.T) {
	s := newStore(t)
	mod := func(o *Options) { o.Quota = func(session.TenantID) int { return 2 } }
	a := s.open(mod)
	eventually(t, "the first writes", a.IsWriter)
	b := s.open(mod)
	for n := range 2 {
		_, err := b.Decide(context.Background(), revoke(n))
		must(t, err)
	}
	if _, err := b.Decide(context.Background(), revoke(2)); !errors.Is(err, ErrQuota) {
		t.Fatalf("over quota: %v", err)
	}
}
