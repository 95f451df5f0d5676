package sequencer

import (
	"context"
	"sync/atomic"
	"testing"
	"time"

	"github.com/interlock-fabric/interlock/pkg/natsfeed"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// A writer that loses its lease while the store's answers are lost does not know
// whether its last batch was stored. When it was, it is in the chain, and a
// rejection would lift at every enforcer what is in force. Without the look at the
// chain in sayFallen this fails.
func TestStoredIsNotRejected(t *testing.T) {
	s := newStore(t)
	var deaf atomic.Bool
	held := s.keys(t, s.key, s.set)
	a := s.open(func(o *Options) {
		o.Keys, o.AckWait, o.Lease = held, 20*time.Millisecond, 500*time.Millisecond
		o.Hooks.DropAcks = deaf.Load
	})
	eventually(t, "it writes", a.IsWriter)
	must(t, decideDurable(a, 0))
	beats := s.listen(natsfeed.BeatSubject)

	deaf.Store(true)
	res, err := a.Decide(context.Background(), revoke(1))
	must(t, err)
	if res.Durable {
		t.Fatal("durable without an acknowledgement")
	}
	held.use(nil) // without a key it gives the lease away
	b := s.open(func(o *Options) { o.Lease = 500 * time.Millisecond })
	eventually(t, "the other writes", b.IsWriter)
	if _, n, _ := b.Head(); n <= res.Number {
		t.Fatalf("the other's head is %d: the batch %d was not stored", n, res.Number)
	}
	held.use(s.key)
	eventually(t, "the decision has ended", func() bool {
		known := make(chan bool)
		a.post(func() { _, ok := a.w.ids[id(1)]; known <- ok || a.w.redoing > 0 })
		return !<-known
	})
	// Whatever it has to say of its batch is said once it can read the log.
	deaf.Store(false)
	must(t, decideDurable(a, 2))
	eventually(t, "it has read the log", func() bool { _, n, _ := a.Head(); _, m, _ := b.Head(); return n >= m })
	must(t, a.nc.Flush())
	must(t, decideDurable(b, 3))
	chain := readLog(t, s.conn(), a.trust)
	for _, f := range beats.all() {
		if f.Type != session.TypeRejection {
			continue
		}
		x, err := session.UnmarshalRejection(f.Body)
		must(t, err)
		if chain.hashes[x.Number] == x.Batch {
			t.Fatalf("batch %d, which is in the chain, was rejected", x.Number)
		}
	}
}
