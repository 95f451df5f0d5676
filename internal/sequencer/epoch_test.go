package sequencer

import (
	"context"
	"crypto/sha256"
	"errors"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/interlock-fabric/interlock/pkg/filter"
	"github.com/interlock-fabric/interlock/pkg/natsfeed"
	"github.com/interlock-fabric/interlock/pkg/session"
	"github.com/nats-io/nats.go/jetstream"
)

// variety puts one of everything that a restatement has to carry into force.
func variety() []Decision {
	entry := func(kind session.Kind, n int, f func(*session.Entry)) session.Entry {
		e := session.Entry{Op: session.OpSet, Effect: session.EffectRevoked, Reason: session.ReasonStolenToken, Key: key(tenant, kind, n), Incident: "INC-7"}
		f(&e)
		return e
	}
	hour := session.InstantOf(time.Now().Add(time.Hour))
	return []Decision{
		{ID: id(100), Entries: []session.Entry{
			entry(session.KindSession, 1, func(e *session.Entry) { e.Expires = hour }),
			entry(session.KindUser, 1, func(e *session.Entry) { e.IssuedBefore = hour }),
			entry(session.KindUser, 2, func(e *session.Entry) { e.Effect = session.EffectSuspended; e.Expires = hour }),
			entry(session.KindAgent, 1, func(e *session.Entry) { e.Effect = session.EffectStepUp; e.ACR = "high" }),
			entry(session.KindAgent, 2, func(e *session.Entry) { e.Drill = true }),
			entry(session.KindAgent, 3, func(e *session.Entry) { e.Effect = session.EffectSuspended }),
			{Op: session.OpSet, Effect: session.EffectSuspended, Reason: session.ReasonStolenToken, Key: session.TenantKey(tenant),
				Except: []session.Key{key(tenant, session.KindUser, 5)}},
		}},
		{ID: id(101), Entries: []session.Entry{{
			Op: session.OpLift, Effect: session.EffectSuspended, Reason: session.ReasonStolenToken, Key: key(tenant, session.KindAgent, 3), Share: 100,
		}}},
	}
}

// content is a state without what depends on when it was decided.
func content(set *filter.Set) (sum session.StateDigest) {
	set.Range(func(k session.Key, r *session.Record) bool {
		x := *r
		x.Since, x.Seq = 0, 0
		sum.Plus(x.Sum(k))
		return true
	})
	return sum
}

// A key set of a later epoch opens it: numbers start at 1 behind the origin,
// everything that was in force is restated before anything else, and a restart
// knows it all. Without the restatement the state is empty here.
func TestNewEpochRestates(t *testing.T) {
	s := newStore(t)
	q := s.open()
	f := s.open()
	ctx := context.Background()
	for _, d := range variety() {
		_, err := q.Decide(ctx, d)
		must(t, err)
	}
	// More than one batch of it, and decisions that go on meanwhile.
	for n := range 3 {
		d := Decision{ID: id(200 + n)}
		for i := range session.MaxBatchEntries {
			d.Entries = append(d.Entries, revoke(10_000+n*session.MaxBatchEntries+i).Entries...)
		}
		_, err := q.Decide(ctx, d)
		must(t, err)
	}
	// It may be the other one that writes.
	eventually(t, "all is in the state", func() bool { return q.State().Len() == 7+3*session.MaxBatchEntries })
	want := content(q.State())
	must(t, q.PublishKeySet(ctx, s.keySet(t, 2, writerKey(s.key))))
	eventually(t, "decisions in the new epoch", func() bool {
		res, err := q.Decide(ctx, revoke(5000))
		must(t, err)
		epoch, _, _ := q.Head()
		return epoch == 2 && res.Durable
	})
	eventually(t, "everything is restated", func() bool { return q.State().Len() == 7+3*session.MaxBatchEntries+1 })
	with := (&filter.Set{}).Apply(&session.Batch{Entries: revoke(5000).Entries}, nil)
	want.Plus(content(with))
	if content(q.State()) != want {
		t.Fatal("the new epoch has other entries in force")
	}
	l := readLog(t, s.conn(), q.trust)
	if len(l.batches) == 0 || l.batches[0].Number != 1 || l.batches[0].Prev != q.trust.Origin() {
		t.Fatal("the epoch does not begin behind its origin")
	}
	if l.set.Digest() != q.State().Digest() {
		t.Fatal("another state than the log's")
	}
	eventually(t, "the other authority follows", func() bool { return f.State().Digest() == q.State().Digest() })
	again := s.open(func(o *Options) { o.Keys = s.keys(t, s.key, s.set) })
	if again.State().Digest() != q.State().Digest() {
		t.Fatal("another state after a restart")
	}
	// What was decided before the epoch is still known by its ID.
	res, err := again.Decide(ctx, variety()[0])
	must(t, err)
	if !res.Duplicate || res.Epoch != 1 {
		t.Fatalf("%+v", res)
	}
}

// A restatement that ends in the middle is finished by the next writer.
func TestRestatementInterrupted(t *testing.T) {
	s := newStore(t)
	stop := make(chan struct{})
	var armed atomic.Bool
	q := s.open(func(o *Options) {
		o.Hooks.BeforeAppend = func(n uint64) {
			if armed.Load() && n == 3 { // the proof is 1, the first part 2
				<-stop
			}
		}
		o.Lease = 500 * time.Millisecond
	})
	ctx := context.Background()
	for n := range 3 {
		d := Decision{ID: id(n)}
		for i := range session.MaxBatchEntries {
			d.Entries = append(d.Entries, revoke(n*session.MaxBatchEntries+i).Entries...)
		}
		_, err := q.Decide(ctx, d)
		must(t, err)
	}
	armed.Store(true)
	must(t, q.PublishKeySet(ctx, s.keySet(t, 2, writerKey(s.key))))
	next := s.open(func(o *Options) { o.Lease = 500 * time.Millisecond })
	eventually(t, "the next writer", next.IsWriter)
	eventually(t, "everything is restated", func() bool { return next.State().Len() == 3*session.MaxBatchEntries })
	close(stop)
	must(t, decideDurable(q, 9000))
	l := readLog(t, s.conn(), next.trust)
	for d, n := range l.at {
		if n != 1 {
			t.Fatalf("decision %x is there %d times", d, n)
		}
	}
	if l.set.Len() != 3*session.MaxBatchEntries+1 {
		t.Fatalf("%d entries", l.set.Len())
	}
}

// Keys rotate while decisions are taken: with both in the key set, then the
// new one alone, then the old one withdrawn. No decision is lost or refused.
func TestRotation(t *testing.T) {
	s := newStore(t)
	k := s.keys(t, s.key, s.set)
	q := s.open(func(o *Options) { o.Keys = k })
	// On a busy machine the lease may pass to the other authority: it changes
	// its key as well, or a withdrawal would rightly cut what it wrote.
	kf := s.keys(t, s.key, s.set)
	f := s.open(func(o *Options) { o.Keys = kf })
	ctx := context.Background()
	stop, ended := make(chan struct{}), make(chan int)
	go func() {
		n := 0
		for ; ; n++ {
			select {
			case <-stop:
				ended <- n
				return
			default:
			}
			if err := decideDurable(q, n); err != nil {
				t.Error(err)
			}
		}
	}()
	progress := func() {
		_, from, _ := q.Head()
		eventually(t, "decisions go on", func() bool { _, n, _ := q.Head(); return n > from+5 || t.Failed() })
	}
	progress()
	second := newKey(t)
	must(t, q.PublishKeySet(ctx, s.keySet(t, 1, writerKey(s.key), writerKey(second))))
	eventually(t, "the other authority knows the second key", func() bool {
		return kf.trust.KeySet().Version == k.trust.KeySet().Version
	})
	k.use(second)
	kf.use(second)
	progress()
	_, last, _ := q.Head()
	old := writerKey(s.key)
	old.Withdrawn, old.LastEpoch, old.LastNumber = true, 1, last
	must(t, q.PublishKeySet(ctx, s.keySet(t, 1, old, writerKey(second))))
	progress()
	close(stop)
	n := <-ended
	l := readLog(t, s.conn(), q.trust)
	for i := range n {
		if l.at[id(i)] != 1 {
			t.Fatalf("decision %d is there %d times", i, l.at[id(i)])
		}
	}
	eventually(t, "the other authority follows", func() bool { return f.State().Digest() == l.set.Digest() })
	if r := s.open(func(o *Options) { o.Keys = s.keys(t, second, s.set) }); r.State().Digest() != l.set.Digest() {
		t.Fatal("another state after a restart")
	}
}

// A withdrawal that names a batch before the newest takes the rest of them out of
// the chain. What this authority had decided in them, it decides again: the key
// was stolen, the decisions were not.
func TestWithdrawalCutsTheChain(t *testing.T) {
	s := newStore(t)
	k := s.keys(t, s.key, s.set)
	q := s.open(func(o *Options) { o.Keys = k })
	ctx := context.Background()
	for n := range 20 {
		must(t, decideDurable(q, n))
	}
	second := newKey(t)
	old := writerKey(s.key)
	old.Withdrawn, old.LastEpoch, old.LastNumber = true, 1, 10
	k.use(second)
	must(t, q.PublishKeySet(ctx, s.keySet(t, 1, old, writerKey(second))))
	eventually(t, "all is decided again", func() bool { return q.State().Len() == 20 && q.IsWriter() })
	must(t, decideDurable(q, 20))
	l := readLog(t, s.conn(), q.trust)
	if l.set.Len() != 21 || l.set.Digest() != q.State().Digest() {
		t.Fatalf("%d entries in the log", l.set.Len())
	}
	for n := range 21 {
		if l.at[id(n)] != 1 {
			t.Fatalf("decision %d is there %d times", n, l.at[id(n)])
		}
	}
}

// An authority whose key is withdrawn gives up writing, and another takes over.
func TestWithoutKey(t *testing.T) {
	s := newStore(t)
	second := newKey(t)
	s.set = s.keySet(t, 1, writerKey(s.key), writerKey(second))
	a := s.open()
	eventually(t, "the first writes", a.IsWriter)
	b := s.open(func(o *Options) { o.Keys = s.keys(t, second, s.set) })
	must(t, decideDurable(b, 1))
	_, n, _ := a.Head()
	old := writerKey(s.key)
	old.Withdrawn, old.LastEpoch, old.LastNumber = true, 1, n+100
	must(t, a.PublishKeySet(context.Background(), s.keySet(t, 1, old, writerKey(second))))
	eventually(t, "the second writes", b.IsWriter)
	must(t, decideDurable(b, 2))
	if a.IsWriter() {
		t.Fatal("the first still writes")
	}
}

// A store that is given an old copy of its directory is noticed by what an
// enforcer says that it has; nothing is written until a new epoch, which then
// restates what is held.
func TestRolledBack(t *testing.T) {
	s := newStore(t)
	ctx := context.Background()
	q := s.open()
	must(t, decideDurable(q, 1))
	q.Close()
	must(t, s.b.Close())
	backup := filepath.Join(t.TempDir(), "backup")
	must(t, os.CopyFS(backup, os.DirFS(s.dir)))
	s.start()
	q = s.open()
	must(t, decideDurable(q, 2))
	must(t, decideDurable(q, 3))
	epoch, number, head := q.Head()
	q.Close()
	must(t, s.b.Close())
	s.dir = backup
	s.start()

	q = s.open()
	eventually(t, "it writes", q.IsWriter)
	if _, n, _ := q.Head(); n >= number+1 {
		t.Fatalf("the copy is not older: %d, was %d", n, number)
	}
	// True claims change nothing.
	_, n, h := q.Head()
	q.Heard(epoch, n, h)
	q.Heard(epoch, 0, session.Hash{})
	q.Heard(epoch+1, n+100, session.Hash{1})
	must(t, decideDurable(q, 4))

	q.Heard(epoch, number+10, head)
	eventually(t, "it is noticed", func() bool { return errors.Is(q.Status().Halted, ErrRolledBack) })
	if _, err := q.Decide(ctx, revoke(5)); !errors.Is(err, ErrRolledBack) {
		t.Fatalf("decided on a log that was rolled back: %v", err)
	}
	must(t, q.PublishKeySet(ctx, s.keySet(t, 2, writerKey(s.key))))
	eventually(t, "the new epoch", func() bool {
		_, err := q.Decide(ctx, revoke(5))
		return err == nil
	})
	eventually(t, "what was held is restated", func() bool { return q.State().Len() == 3 })
	if e, _, _ := q.Head(); e != 2 {
		t.Fatalf("epoch %d", e)
	}
}

// A writer that halts while a batch is on its way finds that batch in the log,
// and is deposed by it. It must come back all the same: an enforcer that starts
// now learns from its heartbeats alone that the log was rolled back.
func TestRolledBackWithABatchInFlight(t *testing.T) {
	s := newStore(t)
	var deaf atomic.Bool
	q := s.open(func(o *Options) {
		o.AckWait = time.Millisecond
		o.Hooks.DropAcks = deaf.Load
	})
	must(t, decideDurable(q, 0))
	deaf.Store(true)
	_, err := q.Decide(context.Background(), revoke(1))
	must(t, err)
	halted := make(chan int)
	q.post(func() {
		n := len(q.w.flight)
		q.w.rollback("an enforcer has more of the chain, or another")
		halted <- n
	})
	if n := <-halted; n != 1 {
		t.Fatalf("%d batches in flight", n)
	}
	beats := s.listen(natsfeed.BeatSubject)
	deaf.Store(false)
	eventually(t, "what was in flight is found in the log", func() bool { return q.State().Len() == 2 })
	_, found, _ := q.Head()
	eventually(t, "it writes again", q.IsWriter)
	nc := s.conn()
	eventually(t, "it answers for its clock", func() bool {
		m, err := nc.Request(natsfeed.ClockSubject("late"), make([]byte, 32), time.Second)
		return err == nil && len(m.Data) > 0
	})
	eventually(t, "it says what the log has", func() bool {
		for _, f := range beats.all() {
			h, err := session.UnmarshalHeartbeat(f.Body)
			must(t, err)
			if h.Number >= found {
				return true
			}
		}
		return false
	})
	if _, err := q.Decide(context.Background(), revoke(2)); !errors.Is(err, ErrRolledBack) {
		t.Fatalf("decided on a log that was rolled back: %v", err)
	}
}

// An enforcer with another batch of a number that is stored here has followed
// another chain.
func TestAnotherChain(t *testing.T) {
	s := newStore(t)
	q := s.open()
	must(t, decideDurable(q, 1))
	_, n, _ := q.Head()
	q.Heard(1, n, sha256.Sum256([]byte("another")))
	eventually(t, "it is noticed", func() bool { return errors.Is(q.Status().Halted, ErrRolledBack) })
}

// A stream that is made anew under a running writer is noticed by the writer
// itself.
func TestStreamMadeAnew(t *testing.T) {
	s := newStore(t)
	q := s.open()
	for n := range 5 {
		must(t, decideDurable(q, n))
	}
	nc := s.conn()
	js, err := jetstream.New(nc)
	must(t, err)
	st, err := js.Stream(context.Background(), natsfeed.LogStream)
	must(t, err)
	cfg := st.CachedInfo().Config
	must(t, js.DeleteStream(context.Background(), natsfeed.LogStream))
	_, err = js.CreateStream(context.Background(), cfg)
	must(t, err)
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	res, err := q.Decide(ctx, revoke(6))
	if err == nil && res.Durable {
		t.Fatalf("%+v", res)
	}
	eventually(t, "it is noticed", func() bool { return errors.Is(q.Status().Halted, ErrRolledBack) })
	must(t, q.PublishKeySet(context.Background(), s.keySet(t, 2, writerKey(s.key))))
	eventually(t, "the new epoch has what was held", func() bool {
		_, err := q.Decide(context.Background(), revoke(6))
		return err == nil && q.State().Len() == 6
	})
	if l := readLog(t, s.conn(), q.trust); l.set.Len() != 6 {
		t.Fatalf("%d entries in the log", l.set.Len())
	}
}
