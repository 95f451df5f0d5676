package sequencer

import (
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/interlock-fabric/interlock/pkg/natsfeed"
	"github.com/interlock-fabric/interlock/pkg/session"
	"github.com/nats-io/nats.go"
)

const (
	beatEvery  = 500 * time.Millisecond
	beatAtMost = 20 * time.Millisecond
	// beatAsked is how soon after the last one a heartbeat follows the answer to
	// a nonce: whoever has just anchored the clock waits for nothing else. It is
	// slower than after an acknowledgement, since anybody enrolled can ask.
	beatAsked   = 100 * time.Millisecond
	clockRate   = 20 // answers a second to one subject
	maxClockers = 16384
)

// beat sends the heartbeats of one run as the writer.
type beat struct {
	on     bool
	id     session.WriterID
	last   time.Time // sent
	want   bool      // one is due after an acknowledgement
	asked  bool      // one is due after an answer to a nonce
	proven time.Time // when the last quorum operation was sent
	subs   []*nats.Subscription
	clock  *clock
}

// begin starts a run as the writer: heartbeats, clock answers, and taking
// forwarded decisions.
func (b *beat) begin(s *Sequencer) {
	b.on, b.id, b.want, b.last = true, newWriterID(), true, time.Time{}
	b.clock = &clock{s: s, id: b.id, seen: map[string]int{}}
	b.clock.live.Store(true)
	for subject, fn := range map[string]nats.MsgHandler{
		natsfeed.ClockSubjects: b.clock.answer, natsfeed.ForwardSubject: s.onForward,
	} {
		sub, err := s.nc.Subscribe(subject, fn)
		if err != nil {
			s.log.Error("sequencer: cannot listen", "subject", subject, "err", err)
			continue
		}
		b.subs = append(b.subs, sub)
	}
}

// stop ends the run: from here on nothing is said as the writer.
func (b *beat) stop() {
	b.on = false
	for _, sub := range b.subs {
		_ = sub.Unsubscribe() // the connection may be gone, and with it the subscription
	}
	b.subs = nil
	if b.clock != nil {
		b.clock.live.Store(false)
	}
	b.unprove()
}

// prove notes a quorum operation, by when it was sent: what it proves is older
// than its answer.
func (b *beat) prove(sent time.Time) {
	if sent.After(b.proven) {
		b.proven = sent
	}
}

// unprove forgets the proof, because the head is not what it was thought to be.
func (b *beat) unprove() { b.proven = time.Time{} }

// BeatSoon has the writer's next heartbeat sent without waiting for its turn: there
// is something else to name.
func (s *Sequencer) BeatSoon() {
	s.events.add(func() { s.w.beat.asked = true }, eventBacklog)
}

// soon has the next one sent as soon as the rate allows.
func (b *beat) soon() { b.want = true }

func (w *writer) tickBeat(now time.Time, due func(time.Time) bool) {
	b := &w.beat
	if !b.on {
		return
	}
	at := b.last.Add(beatEvery)
	if b.asked {
		at = b.last.Add(beatAsked)
	}
	if b.want {
		at = b.last.Add(beatAtMost)
	}
	if !due(at) {
		return
	}
	b.last, b.want, b.asked = now, false, false
	due(now.Add(beatEvery))
	if b.proven.IsZero() {
		return
	}
	// A heartbeat makes the log fresh, and in a fresh log a batch that is not
	// there falls away at its deadline: those in flight are still to come.
	if len(w.flight) > 0 && w.wall() >= w.flight[0].batch.Deadline {
		return
	}
	key, _, err := w.s.signer()
	if err != nil {
		return
	}
	h := session.Heartbeat{
		Epoch: w.epoch, Number: w.number, Head: w.head, State: w.set.Digest(), Writer: b.id,
		Mono: now.Sub(w.s.base), Proven: max(0, now.Sub(b.proven)), Time: w.wall(), KeySet: w.s.trust.KeySet().Version,
	}
	if agents := w.s.o.Agents; agents != nil {
		h.Agents = agents()
	}
	frame, err := session.Seal(session.TypeHeartbeat, h.MarshalBody(), key)
	if err != nil {
		return
	}
	_ = w.s.nc.Publish(natsfeed.BeatSubject, frame) // a lost heartbeat is what staleness is for
}

// clock answers nonces during one run as the writer.
type clock struct {
	s    *Sequencer
	id   session.WriterID
	live atomic.Bool

	mu   sync.Mutex
	from time.Time // start of the current second
	seen map[string]int
}

// answer signs the writer's clock for an enforcer.
func (c *clock) answer(m *nats.Msg) {
	name, ok := strings.CutPrefix(m.Subject, natsfeed.ClockSubject(""))
	if !ok || !session.ValidEnforcerName(name) || len(m.Data) != 32 || !c.allow(name) ||
		!ownReply(m.Reply) || !c.live.Load() {
		return
	}
	key, _, err := c.s.signer()
	if err != nil {
		return
	}
	x := session.Clock{
		Nonce: [32]byte(m.Data), Writer: c.id, Mono: time.Since(c.s.base),
		Time: session.InstantOf(c.s.o.Hooks.Now()),
	}
	if frame, err := session.Seal(session.TypeClock, x.MarshalBody(), key); err == nil {
		_ = c.s.nc.Publish(m.Reply, frame) // the enforcer asks again
		c.s.events.add(func() { c.s.w.beat.asked = true }, eventBacklog)
	}
}

func (c *clock) allow(name string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if now := time.Now(); now.Sub(c.from) >= time.Second {
		c.from = now
		clear(c.seen)
	}
	if n, ok := c.seen[name]; n >= clockRate || !ok && len(c.seen) >= maxClockers {
		return false
	}
	c.seen[name]++
	return true
}
