package sequencer

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/interlock-fabric/interlock/pkg/filter"
	"github.com/interlock-fabric/interlock/pkg/natsfeed"
	"github.com/interlock-fabric/interlock/pkg/session"
	"github.com/nats-io/nats.go"
)

// ear hears a subject and keeps what it heard.
type ear struct {
	mu     sync.Mutex
	frames []session.Frame
	at     []time.Time
}

func (s *store) listen(subject string) *ear {
	s.tb.Helper()
	return listenOn(s.tb, s.conn(), subject)
}

func listenOn(tb testing.TB, nc *nats.Conn, subject string) *ear {
	tb.Helper()
	e := &ear{}
	_, err := nc.Subscribe(subject, func(m *nats.Msg) {
		f, err := session.ParseFrame(m.Data)
		if err != nil {
			return
		}
		e.mu.Lock()
		defer e.mu.Unlock()
		e.frames, e.at = append(e.frames, f), append(e.at, time.Now())
	})
	must(tb, err)
	must(tb, nc.Flush())
	return e
}

func (e *ear) all() []session.Frame {
	e.mu.Lock()
	defer e.mu.Unlock()
	return append([]session.Frame(nil), e.frames...)
}

// beats returns the verified heartbeats.
func (e *ear) beats(t *testing.T, tr *session.Trust) (out []session.Heartbeat) {
	t.Helper()
	for _, f := range e.all() {
		if f.Type != session.TypeHeartbeat {
			continue
		}
		if _, err := tr.Writer(&f, 0, true, session.InstantOf(time.Now())); err != nil {
			t.Fatalf("heartbeat: %v", err)
		}
		h, err := session.UnmarshalHeartbeat(f.Body)
		must(t, err)
		out = append(out, h)
	}
	return out
}

// noteDecisions keeps which decisions a frame holds.
func noteDecisions(into *sync.Map, data []byte) {
	f, err := session.ParseFrame(data)
	if err != nil || f.Type != session.TypeBatch {
		return
	}
	if b, err := session.UnmarshalBatch(f.Body); err == nil {
		for _, d := range b.Decisions {
			into.Store(d.ID, true)
		}
	}
}

// decisions returns in which batches each decision was heard.
func (e *ear) decisions() map[session.DecisionID]bool {
	out := map[session.DecisionID]bool{}
	for _, f := range e.all() {
		if b, err := session.UnmarshalBatch(f.Body); err == nil && f.Type == session.TypeBatch {
			for _, d := range b.Decisions {
				out[d.ID] = true
			}
		}
	}
	return out
}

// While the store does not answer, decisions go on being heard; they are said to
// be not durable, and become so when it answers again. With a wait for each
// acknowledgement instead of the list of batches in flight this fails.
func TestStoreDoesNotAnswer(t *testing.T) {
	s := newStore(t)
	var deaf atomic.Bool
	q := s.open(func(o *Options) {
		o.AckWait = 5 * time.Millisecond
		o.Hooks.DropAcks = deaf.Load
	})
	ctx := context.Background()
	eventually(t, "it writes", q.IsWriter)
	must(t, decideDurable(q, 0))
	_, before, _ := q.Head()
	log, beats := s.listen(natsfeed.LogSubject), s.listen(natsfeed.BeatSubject)

	deaf.Store(true)
	const n = 60
	var last Result
	var worst time.Duration
	for i := 1; i <= n; i++ {
		sent := time.Now()
		res, err := q.Decide(ctx, revoke(i))
		must(t, err)
		if res.Durable || res.Number <= before {
			t.Fatalf("%+v", res)
		}
		last = res
		eventually(t, "the decision is heard", func() bool { return log.decisions()[id(i)] })
		worst = max(worst, time.Since(sent))
	}
	if _, number, _ := q.Head(); number != before {
		t.Fatalf("head %d: something is counted as stored", number)
	}
	again, err := q.Decide(ctx, revoke(n))
	must(t, err)
	if again.Durable || !again.Duplicate || again.Number != last.Number {
		t.Fatalf("sent twice while in flight: %+v, first %+v", again, last)
	}
	if st := q.Status(); st.InFlight < 2 {
		t.Fatalf("%d batches in flight", st.InFlight)
	}
	eventually(t, "a heartbeat meanwhile", func() bool { return len(beats.beats(t, q.trust)) > 0 })
	for _, h := range beats.beats(t, q.trust) {
		if h.Number != before {
			t.Fatalf("a heartbeat speaks of batch %d, which is not known to be stored", h.Number)
		}
	}
	short, cancel := context.WithTimeout(ctx, 20*time.Millisecond)
	defer cancel()
	if err := q.AwaitDurable(short, last.Number); err == nil {
		t.Fatal("durable without an acknowledgement")
	}

	deaf.Store(false)
	must(t, q.AwaitDurable(ctx, last.Number))
	l := readLog(t, s.conn(), q.trust)
	for i := range n + 1 {
		if l.at[id(i)] != 1 {
			t.Fatalf("decision %d is in the chain %d times", i, l.at[id(i)])
		}
	}
	if l.set.Digest() != q.State().Digest() {
		t.Fatal("another state than the log's")
	}
	t.Logf("heard after %v at worst", worst)
}

func decideDurable(q *Sequencer, n int) error {
	for {
		res, err := q.Decide(context.Background(), revoke(n))
		if err != nil || res.Durable {
			return err
		}
	}
}

// An acknowledgement counts only right behind what has been examined: what is
// stored between may be another writer's, whom the chain goes through.
func TestCountsOnlyBehindWhatIsKnown(t *testing.T) {
	s := newStore(t)
	var deaf atomic.Bool
	q := s.open(func(o *Options) {
		o.AckWait = time.Millisecond
		o.Hooks.DropAcks = deaf.Load
	})
	must(t, decideDurable(q, 0))
	deaf.Store(true)
	res, err := q.Decide(context.Background(), revoke(1))
	must(t, err)
	counted := make(chan uint64)
	for _, beyond := range []uint64{2, 3} {
		q.post(func() {
			w := q.w
			w.acknowledged(w.flight[0].token, ack{seq: w.pos + beyond}, time.Now())
			counted <- w.number
		})
		if n := <-counted; n >= res.Number {
			t.Fatalf("counted with something unknown before it")
		}
	}
	q.post(func() {
		w := q.w
		w.acknowledged(w.flight[0].token, ack{seq: w.pos + 1}, time.Now())
		counted <- w.number
	})
	if n := <-counted; n != res.Number {
		t.Fatal("not counted right behind what is known")
	}
	deaf.Store(false)
}

// What a deposed writer had published is taken by the new writer under its ID
// and only then rejected, by a signed statement. That is so without the fence,
// too, which a flood can make useless: the append then succeeds, behind another
// writer's batch, and must not count.
func TestDeposed(t *testing.T) {
	for _, fenced := range []bool{true, false} {
		t.Run(fmt.Sprint("fenced=", fenced), func(t *testing.T) { testDeposed(t, fenced) })
	}
}

func testDeposed(t *testing.T, fenced bool) {
	p := newPair(t)
	w := p.writer()
	if !fenced {
		q := p.at(w)
		q.post(func() { q.w.flooded = time.Now().Add(time.Hour) })
	}
	log, beats := p.listen(natsfeed.LogSubject), p.listen(natsfeed.BeatSubject)
	c := make(chan struct{})
	p.pause[w].Store(&c)
	type answer struct {
		res Result
		err error
	}
	got := make(chan answer, 1)
	go func() {
		res, err := p.at(w).Decide(context.Background(), revoke(1))
		got <- answer{res, err}
	}()
	<-p.paused
	eventually(t, "the other has taken over", func() bool { return p.at(1 - w).IsWriter() })
	must(t, decideDurable(p.at(1-w), 2))
	p.pause[w].Store(nil)
	close(c)
	a := <-got
	must(t, a.err)

	rejected := func() map[session.Hash]int {
		out := map[session.Hash]int{}
		for i, f := range beats.all() {
			if f.Type != session.TypeRejection {
				continue
			}
			if _, err := p.at(0).trust.Writer(&f, 0, true, session.InstantOf(time.Now())); err != nil {
				t.Fatalf("rejection: %v", err)
			}
			x, err := session.UnmarshalRejection(f.Body)
			must(t, err)
			out[x.Batch] = i + 1
		}
		return out
	}
	eventually(t, "a rejection", func() bool { return len(rejected()) > 0 })
	must(t, decideDurable(p.at(w), 1))
	l := readLog(t, p.conn(), p.at(0).trust)
	if l.at[id(1)] != 1 || l.at[id(2)] != 1 {
		t.Fatalf("in the chain: %v", l.at)
	}
	chain := map[session.Hash]bool{}
	for _, h := range l.hashes {
		chain[h] = true
	}
	for h := range rejected() {
		if chain[h] {
			t.Fatal("a batch of the chain was rejected")
		}
	}
	for _, f := range log.all() {
		if !chain[f.Hash()] && rejected()[f.Hash()] == 0 {
			t.Fatal("a batch that was heard is neither in the chain nor rejected")
		}
	}
	if p.at(w).Status().Deposed == 0 {
		t.Fatal("nobody was deposed")
	}
}

// What a heartbeat says, and that only the writer says it.
func TestHeartbeat(t *testing.T) {
	s := newStore(t)
	ear := s.listen(natsfeed.BeatSubject)
	a, b := s.open(), s.open()
	eventually(t, "somebody writes", func() bool { return a.IsWriter() || b.IsWriter() })
	if b.IsWriter() {
		a, b = b, a
	}
	for i := range 10 {
		must(t, decideDurable(a, i))
	}
	_, number, head := a.Head()
	find := func(n uint64) (h session.Heartbeat, ok bool) {
		for _, h = range ear.beats(t, a.trust) {
			if h.Number == n {
				return h, true
			}
		}
		return h, false
	}
	start := time.Now()
	eventually(t, "the head is said", func() bool { _, ok := find(number); return ok })
	if d := time.Since(start); d > 400*time.Millisecond {
		t.Errorf("said after %v, not right after the acknowledgement", d)
	}
	h, _ := find(number)
	if h.Epoch != 1 || h.Head != head || h.State != a.State().Digest() || h.KeySet != a.trust.KeySet().Version {
		t.Fatalf("%+v", h)
	}
	count := len(ear.beats(t, a.trust))
	eventually(t, "heartbeats go on without decisions", func() bool { return len(ear.beats(t, a.trust)) >= count+4 })
	all := ear.beats(t, a.trust)
	for i, x := range all {
		if x.Writer != all[0].Writer {
			t.Fatal("two speak as the writer")
		}
		if x.Proven <= 0 || x.Proven > 2*time.Second {
			t.Fatalf("proven %v ago", x.Proven)
		}
		if time.Until(x.Time.Time()).Abs() > time.Minute {
			t.Fatalf("time %v", x.Time)
		}
		if i > 0 && (x.Mono <= all[i-1].Mono || x.Number < all[i-1].Number) {
			t.Fatalf("%v after %v, number %d after %d", x.Mono, all[i-1].Mono, x.Number, all[i-1].Number)
		}
	}
	l := readLog(t, s.conn(), a.trust)
	states := map[uint64]session.StateDigest{}
	var set *filter.Set
	for _, batch := range l.batches {
		set = set.Apply(batch, nil)
		states[batch.Number] = set.Digest()
	}
	for _, x := range all {
		if x.State != states[x.Number] || x.Head != l.hashes[x.Number] {
			t.Fatalf("heartbeat of %d has another state or head than the log there", x.Number)
		}
	}

	// The next writer has a name of its own.
	a.Close()
	eventually(t, "the next writer's heartbeat", func() bool {
		x := ear.beats(t, b.trust)
		return x[len(x)-1].Writer != all[0].Writer
	})
}

// The clock is answered for a nonce, at a bounded rate, and never to a subject
// that is not an inbox.
func TestClock(t *testing.T) {
	s := newStore(t)
	beats := s.listen(natsfeed.BeatSubject)
	q := s.open()
	eventually(t, "it writes", q.IsWriter)
	nc := s.conn()
	subject := natsfeed.ClockSubject("eu-1")
	var nonce [32]byte
	_, _ = rand.Read(nonce[:])
	ask := func(nonce []byte) (*nats.Msg, error) { return nc.Request(subject, nonce, 5*time.Second) }
	var m *nats.Msg
	eventually(t, "the clock is answered", func() (ok bool) {
		var err error
		m, err = ask(nonce[:])
		return err == nil
	})
	f, err := session.ParseFrame(m.Data)
	must(t, err)
	_, err = q.trust.Writer(&f, 0, true, session.InstantOf(time.Now()))
	must(t, err)
	c, err := session.UnmarshalClock(f.Body)
	must(t, err)
	if f.Type != session.TypeClock || c.Nonce != nonce || time.Until(c.Time.Time()).Abs() > time.Minute {
		t.Fatalf("%+v", c)
	}
	eventually(t, "a heartbeat after it", func() bool {
		x := beats.beats(t, q.trust)
		return len(x) > 0 && x[len(x)-1].Mono > c.Mono
	})
	if x := beats.beats(t, q.trust); x[len(x)-1].Writer != c.Writer {
		t.Fatal("clock and heartbeat of different writers")
	}

	// Malformed ones and a flood, then a well-formed one of another enforcer,
	// which is answered behind all of them.
	inbox := nc.NewInbox()
	var answers atomic.Int64
	_, err = nc.Subscribe(inbox+".*", func(*nats.Msg) { answers.Add(1) })
	must(t, err)
	before := q.Status().Position
	for i := range 500 {
		must(t, nc.PublishRequest(subject, fmt.Sprint(inbox, ".a", i), nonce[:]))
		must(t, nc.PublishRequest(subject, fmt.Sprint(inbox, ".b", i), []byte("short")))
		must(t, nc.PublishRequest(natsfeed.ClockSubject("eu-2"), natsfeed.LogSubject, nonce[:]))
	}
	_, err = nc.Request(natsfeed.ClockSubject("eu-3"), nonce[:], 5*time.Second)
	must(t, err)
	if n := answers.Load(); n > 3*clockRate {
		t.Fatalf("%d answers to a flood", n)
	}
	must(t, decideDurable(q, 1))
	if l := readLog(t, s.conn(), q.trust); l.seqs != uint64(len(l.batches)) || l.seqs != before+1 {
		t.Fatalf("%d messages stored, %d batches: an answer went into the log", l.seqs, len(l.batches))
	}
}

// Garbage on the log's subject shifts the stream, and nothing else, even when it
// is too much for any fence to hold.
func TestGarbage(t *testing.T) {
	s := newStore(t)
	q, f := s.open(), s.open()
	eventually(t, "somebody writes", func() bool { return q.IsWriter() || f.IsWriter() })
	other := newKey(t)
	nc := s.conn()
	const n = 40
	stop := make(chan struct{})
	var junk atomic.Int64
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				epoch, number, head := q.Head()
				b := &session.Batch{
					Epoch: epoch, Number: number + 1, Prev: head, Time: session.InstantOf(time.Now()),
					Decisions: []session.DecisionRef{{ID: id(1 << 20), Count: 1}}, Entries: revoke(1 << 20).Entries,
				}
				body, err := b.MarshalBody()
				if err != nil {
					t.Error(err)
					return
				}
				forged, err := session.Seal(session.TypeBatch, body, other)
				if err != nil {
					t.Error(err)
					return
				}
				for _, data := range [][]byte{forged, []byte("junk"), nil, forged[:len(forged)-1]} {
					if _, err := nc.Request(natsfeed.LogSubject, data, time.Second); err == nil {
						junk.Add(1)
					}
				}
			}
		})
	}
	var deciders sync.WaitGroup
	for g, x := range []*Sequencer{q, f} {
		deciders.Go(func() {
			for i := g; i < n; i += 2 {
				if err := decideDurable(x, i); err != nil {
					t.Error(err)
				}
			}
		})
	}
	deciders.Wait()
	close(stop)
	wg.Wait()
	l := readLog(t, s.conn(), q.trust)
	for i := range n {
		if l.at[id(i)] != 1 {
			t.Fatalf("decision %d is in the chain %d times", i, l.at[id(i)])
		}
	}
	if l.at[id(1<<20)] != 0 || junk.Load() == 0 || l.seqs <= uint64(len(l.batches)) {
		t.Fatalf("%d pieces of junk, %d stored, %d batches", junk.Load(), l.seqs, len(l.batches))
	}
	for _, x := range []*Sequencer{q, f, s.open()} {
		eventually(t, "all have the log's state", func() bool { return x.State().Digest() == l.set.Digest() })
		st := x.Status()
		if st.Garbage+st.Strays == 0 {
			t.Fatalf("nothing was counted: %+v", st)
		}
	}
}

// Whoever holds the bus but no key can neither have a decision taken nor have a
// caller believe in one.
func TestForgedForward(t *testing.T) {
	s := newStore(t)
	a := s.open()
	eventually(t, "it writes", a.IsWriter)
	nc := s.conn()
	forge := func(key ed25519.PrivateKey, at time.Time) []byte {
		d := revoke(9)
		b := &session.Batch{
			Epoch: 1, Number: 1, Time: session.InstantOf(at),
			Decisions: []session.DecisionRef{{ID: d.ID, Count: 1}}, Entries: d.Entries,
		}
		body, err := b.MarshalBody()
		must(t, err)
		f, err := session.Seal(session.TypeForward, append([]byte{forwardVersion, forwardRequest}, body...), key)
		must(t, err)
		return f
	}
	good := forge(s.key, time.Now())
	flipped := append([]byte(nil), good...)
	flipped[len(flipped)-80] ^= 1
	for name, data := range map[string][]byte{
		"another key": forge(newKey(t), time.Now()), "too old": forge(s.key, time.Now().Add(-time.Minute)),
		"changed": flipped, "cut short": good[:len(good)-3], "empty": nil,
	} {
		if m, err := nc.Request(natsfeed.ForwardSubject, data, 50*time.Millisecond); err == nil {
			t.Fatalf("%s: answered with %d bytes", name, len(m.Data))
		}
	}
	must(t, decideDurable(a, 1))
	if l := readLog(t, s.conn(), a.trust); l.at[id(9)] != 0 {
		t.Fatal("a forged forward was taken")
	}

	// One that is played again does no harm.
	for range 2 {
		_, err := nc.Request(natsfeed.ForwardSubject, good, 5*time.Second)
		must(t, err)
	}
	if l := readLog(t, s.conn(), a.trust); l.at[id(9)] != 1 {
		t.Fatalf("taken %d times", l.at[id(9)])
	}

	// Answers: the caller believes only one that a writer signed for this very
	// forward.
	b := s.open()
	sent, err := session.ParseFrame(good)
	must(t, err)
	m, err := nc.Request(natsfeed.ForwardSubject, good, 5*time.Second)
	must(t, err)
	if _, err := b.readResponse(m.Data, sent.Hash()); err != nil {
		t.Fatalf("the true answer: %v", err)
	}
	if res, err := b.readResponse(m.Data, session.Hash{1}); err == nil {
		t.Fatalf("an answer to another forward: %+v", res)
	}
	resealed, err := session.ParseFrame(m.Data)
	must(t, err)
	fake, err := session.Seal(session.TypeForward, resealed.Body, newKey(t))
	must(t, err)
	if res, err := b.readResponse(fake, sent.Hash()); err == nil {
		t.Fatalf("another key's answer: %+v", res)
	}
	if res, err := b.readResponse(good, sent.Hash()); err == nil {
		t.Fatalf("the forward itself as its answer: %+v", res)
	}
}
