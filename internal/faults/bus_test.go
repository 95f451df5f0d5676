package faults

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	mathrand "math/rand/v2"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/interlock-fabric/interlock/pkg/enforce"
	"github.com/interlock-fabric/interlock/pkg/natsfeed"
	"github.com/interlock-fabric/interlock/pkg/session"
)

func onLog(m *message) bool  { return m.subject == natsfeed.LogSubject }
func onBeat(m *message) bool { return m.subject == natsfeed.BeatSubject }

// onBus reports whether a message is a broadcast; the rest are answers.
func onBus(m *message) bool { return strings.HasPrefix(m.subject, "interlock.") }

// recorder keeps what it has seen, to play it again.
type recorder struct {
	mu          sync.Mutex
	logs, beats []*message
	key         session.KeyID // of the writer
	epoch, next uint64
	prev        session.Hash
}

func (r *recorder) tamper(_ *link, m *message) []*message {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case onLog(m):
		r.logs = append(r.logs, m.clone())
		if f, err := session.ParseFrame(m.data); err == nil {
			if b, err := session.UnmarshalBatch(f.Body); err == nil {
				r.key, r.epoch, r.next, r.prev = f.Key, b.Epoch, b.Number+1, f.Hash()
			}
		}
	case onBeat(m):
		r.beats = append(r.beats, m.clone())
	}
	return []*message{m}
}

func (r *recorder) pick(m *message) *message {
	r.mu.Lock()
	defer r.mu.Unlock()
	from := r.logs
	if onBeat(m) {
		from = r.beats
	}
	if len(from) == 0 {
		return nil
	}
	old := *from[mathrand.IntN(len(from))]
	old.sid = m.sid
	return &old
}

// forger makes frames that nobody should believe.
type forger struct {
	*recorder
	key ed25519.PrivateKey
}

func newForger(t *testing.T, r *recorder) *forger {
	_, key, err := ed25519.GenerateKey(rand.Reader)
	must(t, err)
	return &forger{r, key}
}

// seal signs with the forger's key, in the forger's name or in the writer's.
func (f *forger) seal(typ session.FrameType, body []byte, err error) []byte {
	if err != nil {
		panic(err)
	}
	frame, err := session.Seal(typ, body, f.key)
	if err != nil {
		panic(err)
	}
	if mathrand.IntN(2) == 0 {
		copy(frame[5:], f.recorder.key[:])
	}
	return frame
}

// tamper lets everything through and adds forgeries to each broadcast.
func (f *forger) tamper(l *link, m *message) []*message {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !onBus(m) {
		if fr, err := session.ParseFrame(m.data); err == nil && fr.Type == session.TypeClock {
			return append(l.answer(m, f.clock(m)), m) // the forgery comes first
		}
		return []*message{m}
	}
	now := session.InstantOf(time.Now())
	kill := &session.Batch{
		Epoch: f.epoch, Number: f.next, Prev: f.prev, Time: now, Deadline: now.Add(session.BatchTTL),
		Decisions: []session.DecisionRef{{ID: session.DecisionID{1}, Count: 1}},
		Entries:   []session.Entry{{Op: session.OpSet, Effect: session.EffectSuspended, Reason: session.ReasonKill, Key: session.GlobalKey()}},
	}
	body, err := kill.MarshalBody()
	batch := f.seal(session.TypeBatch, body, err)
	beat := session.Heartbeat{Epoch: f.epoch, Number: f.next + 1000, Mono: time.Hour, Time: now, KeySet: 1}
	rejection := session.Rejection{Epoch: f.epoch, Number: f.next - 1, Batch: f.prev}
	set := &session.KeySet{Version: 99, Epoch: 99, Issued: now, NotAfter: now.Add(time.Hour),
		Tenants: []session.Tenant{{ID: 1, Name: "default"}},
		Keys:    []session.SigningKey{{Public: f.key.Public().(ed25519.PublicKey), Use: session.UseWriter}}}
	keys, err := set.MarshalBody()
	out := []*message{m}
	out = append(out, l.to(natsfeed.LogSubject, batch)...)
	out = append(out, l.to(natsfeed.LogSubject, f.seal(session.TypeHeartbeat, beat.MarshalBody(), nil))...)
	out = append(out, l.to(natsfeed.BeatSubject, f.seal(session.TypeHeartbeat, beat.MarshalBody(), nil))...)
	out = append(out, l.to(natsfeed.BeatSubject, f.seal(session.TypeRejection, rejection.MarshalBody(), nil))...)
	out = append(out, l.to(natsfeed.TrustSubject, f.seal(session.TypeKeySet, keys, err))...)
	out = append(out, l.to(natsfeed.LogSubject, []byte("garbage"))...)
	// What is genuine, where it does not belong.
	if onLog(m) {
		out = append(out, l.to(natsfeed.BeatSubject, m.data)...)
		out = append(out, l.to(natsfeed.TrustSubject, m.data)...)
	} else {
		out = append(out, l.to(natsfeed.LogSubject, m.data)...)
	}
	return out
}

// clock answers as the writer would, an hour ahead.
func (f *forger) clock(m *message) []byte {
	fr, err := session.ParseFrame(m.data)
	if err != nil {
		return nil
	}
	c, err := session.UnmarshalClock(fr.Body)
	if err != nil {
		return nil
	}
	c.Mono += time.Hour
	c.Time = c.Time.Add(time.Hour)
	return f.seal(session.TypeClock, c.MarshalBody(), nil)
}

func (l *link) answer(m *message, data []byte) []*message {
	if data == nil {
		return nil
	}
	return []*message{{subject: m.subject, sid: m.sid, data: data}}
}

// attack is one way in which the bus turns against an enforcer.
type attack struct {
	name  string
	fault func(*testing.T, *recorder) fault
	// blind attacks keep the truth from the enforcer, so that it must deny at
	// its bound; through the others it must see.
	blind bool
	// noticed reports whether the status shows the attempt.
	noticed func(before, after enforce.Status) bool
}

var (
	refused  = func(a, b enforce.Status) bool { return b.Refused > a.Refused }
	replayed = func(a, b enforce.Status) bool { return b.Replayed > a.Replayed }
	repaired = func(a, b enforce.Status) bool { return b.Repairs > a.Repairs }
	silenced = func(_, b enforce.Status) bool { return !b.Fresh && b.Why != "" }
)

// lag stands for the hour: it is longer than any bound here.
const lag = 2 * bound

var attacks = []attack{
	{"drop-batches", tampering(func(_ *link, m *message) []*message {
		if onLog(m) {
			return nil
		}
		return []*message{m}
	}), false, repaired},
	{"drop-all", tampering(func(_ *link, m *message) []*message {
		if onBus(m) {
			return nil
		}
		return []*message{m}
	}), true, silenced},
	{"delay", tampering(func(l *link, m *message) []*message {
		if onBus(m) {
			l.later(lag, m)
			return nil
		}
		return []*message{m}
	}), true, silenced},
	{"replay", func(_ *testing.T, r *recorder) fault {
		return fault{tamper: func(_ *link, m *message) []*message {
			if !onBus(m) {
				return []*message{m}
			}
			if old := r.pick(m); old != nil {
				return []*message{old}
			}
			return nil
		}}
	}, true, replayed},
	{"duplicate", tampering(func(_ *link, m *message) []*message {
		if onBus(m) {
			return []*message{m, m, m}
		}
		return []*message{m}
	}), false, replayed},
	{"reorder", tampering(func(l *link, m *message) []*message {
		if !onBus(m) {
			return []*message{m}
		}
		if l.hold = append(l.hold, m); len(l.hold) < 5 {
			return nil
		}
		out := l.hold
		l.hold = nil
		mathrand.Shuffle(len(out), func(i, j int) { out[i], out[j] = out[j], out[i] })
		return out
	}), false, replayed},
	{"truncate", tampering(func(_ *link, m *message) []*message {
		if onBus(m) && len(m.data) > 0 {
			m.data = m.data[:mathrand.IntN(len(m.data))]
		}
		return []*message{m}
	}), true, refused},
	{"flip", tampering(func(_ *link, m *message) []*message {
		if onBus(m) && len(m.data) > 0 {
			m.data[mathrand.IntN(len(m.data))] ^= 1 << mathrand.IntN(8)
		}
		return []*message{m}
	}), true, refused},
	{"freeze", func(*testing.T, *recorder) fault { return fault{frozen: true} }, true, silenced},
	{"cut", func(*testing.T, *recorder) fault { return fault{cut: true} }, true, silenced},
	{"forge", func(t *testing.T, r *recorder) fault {
		// The link is cut once, so that clocks are asked for and answered.
		return fault{tamper: newForger(t, r).tamper, reset: true}
	}, false, refused},
	{"roll-back", func(_ *testing.T, r *recorder) fault {
		// The log as it was; what is newer does not exist, and the heartbeats
		// are those of then.
		r.mu.Lock()
		end := uint64(len(r.logs))
		r.mu.Unlock()
		return fault{reset: true, tamper: func(_ *link, m *message) []*message {
			if onBus(m) {
				if old := r.pick(m); old != nil && onBeat(m) {
					return []*message{old}
				}
				return nil
			}
			if seq, err := strconv.ParseUint(m.field("Nats-Sequence"), 10, 64); err == nil && seq > end && m.field("Nats-Stream") == natsfeed.LogStream {
				return nil
			}
			return []*message{m}
		}}
	}, true, silenced},
}

func tampering(f func(*link, *message) []*message) func(*testing.T, *recorder) fault {
	return func(*testing.T, *recorder) fault { return fault{tamper: f} }
}

// TestHostileBus puts a man in the middle of each of a dozen enforcers' links,
// each with an attack of its own, all at once, while decisions are taken and
// callers are checked. It fails when a batch's or heartbeat's signature is not
// verified (forge, flip), when heartbeats need not be newer than the last
// (replay, roll-back), when the age of a heartbeat is counted from its arrival
// (delay), when silence is health (freeze, drop-all), or when a gap is not
// repaired from the log (drop-batches).
func TestHostileBus(t *testing.T) {
	f := newFabric(t)
	f.open()
	c := newCrowd(24, 400)
	var attacked []*guard
	proxies := make([]*proxy, len(attacks))
	recorders := make([]*recorder, len(attacks))
	for i, a := range attacks {
		proxies[i], recorders[i] = newProxy(t, f.listen), &recorder{}
		proxies[i].set(fault{tamper: recorders[i].tamper})
		attacked = append(attacked, start(t, f.enrol(a.name, proxies[i].addr()), c, guardOptions{maxStale: bound}))
	}
	honest := f.guards("beside", 3, c, guardOptions{maxStale: 3 * bound, steady: true})
	for _, g := range attacked {
		g.ready(false)
	}
	stop := f.steadily(c, 50*time.Millisecond, func(ctx context.Context, v *caller) error {
		_, err := v.insist(ctx, f.client)
		return err
	})
	for i := range attacks {
		eventually(t, patience, "something to record", func() bool {
			recorders[i].mu.Lock()
			defer recorders[i].mu.Unlock()
			return len(recorders[i].logs) >= 5 && len(recorders[i].beats) >= 3
		})
	}
	type counts struct{ refused, replayed, lost, orphans, reconnects uint64 }
	count := func(g *guard) counts {
		s := g.enf.Status()
		return counts{s.Refused, s.Replayed, s.Lost, s.Orphans, g.feed.Stats().Reconnects}
	}
	var quiet []counts
	for _, g := range honest {
		quiet = append(quiet, count(g))
	}
	before := make([]enforce.Status, len(attacks))
	began := time.Now()
	for i, a := range attacks {
		before[i] = attacked[i].enf.Status()
		proxies[i].set(a.fault(t, recorders[i]))
	}
	var wg sync.WaitGroup
	for i, a := range attacks {
		g := attacked[i]
		wg.Go(func() {
			// Blind ones deny by the bound at the latest: that, to the moment,
			// is what the load holds against them.
			if a.blind {
				await(t, 3*bound, g, "denies because its state is old", func() bool { return !g.enf.Status().Fresh })
			}
			await(t, 3*bound, g, "shows the attempt in its status", func() bool { return a.noticed(before[i], g.enf.Status()) })
			if !a.blind {
				head := g.enf.Status().Confirmed
				await(t, 3*bound, g, "goes on through the attack", func() bool {
					s := g.enf.Status()
					return s.Fresh && s.Confirmed > head+5
				})
			}
		})
	}
	wg.Wait()
	// The bound has passed for what was decided under attack, too.
	eventually(t, patience, "the bound", func() bool { return time.Since(began) > 2*bound })
	for i, a := range attacks {
		if a.blind && attacked[i].enf.Status().Fresh {
			t.Errorf("%s is fresh under attack: %s", a.name, attacked[i])
		}
		proxies[i].set(fault{})
	}
	for i, g := range honest {
		if now := count(g); now != quiet[i] {
			t.Errorf("%s, beside the attacks, was disturbed: %+v, then %+v", g.name, quiet[i], now)
		}
	}
	n := stop()
	f.allAgree(append(attacked, honest...))
	for i, a := range attacks {
		if a.name == "delay" {
			// What was held back for the hour comes after what is newer.
			eventually(t, patience, "late messages are counted", func() bool { return replayed(before[i], attacked[i].enf.Status()) })
		}
	}
	t.Logf("%d decisions", n)
}

// await is eventually for several goroutines of a test at once.
func await(t *testing.T, within time.Duration, g *guard, what string, ok func() bool) {
	deadline := time.NewTimer(within)
	defer deadline.Stop()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline.C:
			t.Errorf("not within %v that it %s: %s", within, what, g)
			return
		}
	}
}
