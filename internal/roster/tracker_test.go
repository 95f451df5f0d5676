package roster

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/interlock-fabric/interlock/pkg/authority"
	"github.com/interlock-fabric/interlock/pkg/natsfeed"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// ledger is the log as a tracker sees it: hashes by number, of epoch 1.
type ledger struct {
	known map[uint64]session.Hash
	times map[uint64]time.Time
}

func (l *ledger) HashAt(epoch, number uint64) (session.Hash, bool) {
	h, ok := l.known[number]
	return h, ok && epoch == 1
}

func (l *ledger) TimeAt(epoch, number uint64) (time.Time, bool) {
	t, ok := l.times[number]
	return t, ok && epoch == 1
}

func (l *ledger) add(number uint64) {
	l.known[number] = hash(number)
	l.times[number] = time.Now()
}

func hash(n uint64) (h session.Hash) { h[0], h[1] = 0xaa, byte(n); return h }

// host is an enforcer as the tracker knows it: whoever holds its receipt key.
type host struct {
	*testing.T
	t   *Tracker
	key ed25519.PrivateKey
	r   session.Receipt
}

const bound = 15 * time.Second

func enrolled(t *testing.T, l *ledger, names ...string) (*Tracker, map[string]*host) {
	t.Helper()
	tr := NewTracker(l, nil)
	hosts := map[string]*host{}
	var list []Enforcer
	for _, name := range names {
		pub, key, err := ed25519.GenerateKey(rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, Enforcer{Name: name, ReceiptKey: pub})
		hosts[name] = &host{t, tr, key, session.Receipt{Enforcer: name, Boot: session.WriterID{1}, Epoch: 1, MaxStale: bound}}
	}
	tr.SetEnforcers(list)
	return tr, hosts
}

func (h *host) seal(r session.Receipt) []byte {
	h.Helper()
	body, err := r.MarshalBody()
	if err != nil {
		h.Fatal(err)
	}
	frame, err := session.Seal(session.TypeReceipt, body, h.key)
	if err != nil {
		h.Fatal(err)
	}
	return frame
}

func (h *host) try(edit func(*session.Receipt)) error {
	h.Helper()
	h.r.Count++
	h.r.At = time.Now().UnixNano()
	r := h.r
	if edit != nil {
		edit(&r)
	}
	return h.t.Receive(natsfeed.ReceiptSubject(h.r.Enforcer), h.seal(r))
}

// send sends a receipt for everything up to a number.
func (h *host) send(number uint64, batches ...session.Applied) {
	h.Helper()
	h.r.Number, h.r.Head, h.r.Confirmed = number, session.Hash{}, 0
	if number > 0 {
		h.r.Head, h.r.Confirmed = hash(number), number
	}
	h.r.Batches = batches
	if err := h.try(nil); err != nil {
		h.Fatal(err)
	}
}

func newLedger() *ledger {
	return &ledger{known: map[uint64]session.Hash{}, times: map[uint64]time.Time{}}
}

func TestCoverageStates(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLedger()
		tr, hosts := enrolled(t, l, "absent", "applied", "behind", "best", "shadow")
		hosts["best"].r.Mode = session.ModeBestEffort
		hosts["shadow"].r.Mode = session.ModeShadow
		for name, h := range hosts {
			if name != "absent" {
				h.send(0)
			}
		}
		l.add(1)
		decided := time.Now()
		time.Sleep(3 * time.Millisecond)
		for _, name := range []string{"applied", "shadow"} {
			hosts[name].send(1, session.Applied{Number: 1, At: decided.Add(2 * time.Millisecond).UnixNano(), Cut: 2})
		}
		want := func(name string, state authority.EnforcerState) {
			t.Helper()
			for _, e := range tr.Coverage(1, 1, true).Detail {
				if e.Name == name && e.State != state {
					t.Errorf("%s is %s, want %s", name, e.State, state)
				}
			}
		}
		want("absent", authority.StateAbsent)
		want("applied", authority.StateApplied)
		want("behind", authority.StatePending)
		want("best", authority.StatePending)
		want("shadow", authority.StateExposed)
		c := tr.Coverage(1, 1, false)
		if c.Complete || c.Effective || c.Enforcers != 5 || c.InEffect != 1 || c.Pending != 2 || c.Exposed != 1 || c.Absent != 1 ||
			c.Cut != 4 || c.SlowestMillis != 2 || c.BestEffort != 1 || c.Shadow != 1 || c.Detail != nil {
			t.Errorf("coverage %+v", c)
		}

		// By its own bound a strict one has it or denies, whatever is heard of it;
		// one that fails open is exposed.
		time.Sleep(bound / 2)
		hosts["behind"].send(0)
		hosts["best"].send(0)
		time.Sleep(bound / 2)
		want("behind", authority.StateDenying)
		want("best", authority.StateExposed)
		if c := tr.Coverage(1, 1, false); !c.Complete || c.Effective || c.Denying != 1 || c.Exposed != 2 {
			t.Errorf("coverage after the bound %+v", c)
		}
	})
}

// A wait ends when the last live enforcer has sent its receipt, and one that is
// silent holds it up to its bound and no longer.
func TestWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLedger()
		tr, hosts := enrolled(t, l, "a", "b")
		hosts["a"].send(0)
		hosts["b"].send(0)
		l.add(1)
		got := make(chan time.Duration, 1)
		begun := time.Now()
		wait := func() { tr.Wait(t.Context(), 1, 1, nil); got <- time.Since(begun) }
		go wait()
		time.Sleep(time.Millisecond)
		hosts["a"].send(1)
		time.Sleep(time.Millisecond)
		synctest.Wait()
		select {
		case d := <-got:
			t.Fatalf("ended after %s, with b missing", d)
		default:
		}
		hosts["b"].send(1)
		if d := <-got; d != 2*time.Millisecond {
			t.Errorf("took %s", d)
		}

		l.add(2)
		hosts["a"].send(2)
		begun = time.Now()
		go wait2(tr, 2, begun, got)
		if d := <-got; d != bound {
			t.Errorf("with b silent it took %s, want %s", d, bound)
		}

		// The caller's patience may be shorter.
		l.add(3)
		hosts["a"].send(2)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if c := tr.Wait(ctx, 1, 3, nil); c.Complete {
			t.Errorf("coverage %+v", c)
		}
	})
}

func wait2(tr *Tracker, number uint64, begun time.Time, got chan<- time.Duration) {
	tr.Wait(context.Background(), 1, number, nil)
	got <- time.Since(begun)
}

// An enforcer that was silent for longer than its bound when a decision is taken
// holds nobody up.
func TestSilentBeforehand(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLedger()
		tr, hosts := enrolled(t, l, "a")
		hosts["a"].send(0)
		time.Sleep(bound + time.Second)
		l.add(1)
		c := tr.Wait(t.Context(), 1, 1, nil)
		if !c.Complete || !c.Effective || c.Denying != 1 || c.Silent != 1 {
			t.Fatalf("coverage %+v", c)
		}
		if since := c.Detail[0].DenyingSince; !since.Equal(time.Now().Add(-time.Second)) {
			t.Errorf("denying since %s, it is %s", since, time.Now())
		}
	})
}

// What a receipt claims counts only on the log's own chain.
func TestClaimsAreHeldAgainstTheLog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLedger()
		tr, hosts := enrolled(t, l, "a")
		h := hosts["a"]
		l.add(1)
		l.add(2)
		inEffect := func(number uint64) bool { return tr.Coverage(1, number, false).InEffect == 1 }
		receipt := func(number, confirmed uint64, head session.Hash, batches ...session.Applied) {
			t.Helper()
			h.r.Number, h.r.Confirmed, h.r.Head, h.r.Batches = number, confirmed, head, batches
			if err := h.try(nil); err != nil {
				t.Fatal(err)
			}
		}
		receipt(2, 2, session.Hash{0xbb})
		if inEffect(2) || inEffect(1) {
			t.Error("a head that is not the log's counts")
		}
		if list, _ := tr.Enforcers(); !list[0].Diverged || list[0].Divergence != "" {
			t.Error("it is not reported")
		}
		h.r.Divergence = &session.Divergence{Epoch: 1, Number: 2, Compared: true, Ranges: 3, First: 0xc5}
		receipt(2, 1, session.Hash{0xbb})
		if list, _ := tr.Enforcers(); !strings.Contains(list[0].Divergence, "seq 2 of epoch 1, in 3 of 256 ranges, the first of them 0xc5") {
			t.Errorf("of the divergence it says %q", list[0].Divergence)
		}
		if inEffect(2) || !inEffect(1) {
			t.Error("what it has from the log itself does not count apart from what it has not")
		}
		receipt(3, 2, hash(3))
		if !inEffect(2) || inEffect(3) {
			t.Error("a head that is not known yet")
		}
		receipt(3, 2, hash(3), session.Applied{Number: 3, At: 1})
		if !inEffect(3) {
			t.Error("a batch that is listed by number does not count before the log has it")
		}
		l.known[3] = session.Hash{0xcc}
		if inEffect(3) {
			t.Error("the log went another way, and it still counts")
		}
		receipt(2, 2, hash(2))
		if !inEffect(2) || inEffect(3) {
			t.Error("what fell away still counts")
		}
		h.r.Epoch = 2
		receipt(9, 9, hash(9))
		if inEffect(2) {
			t.Error("a receipt of another epoch counts")
		}
	})
}

func TestReceiptsThatAreNotBelieved(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tr, hosts := enrolled(t, newLedger(), "a", "b")
		a, b := hosts["a"], hosts["b"]
		a.send(0)
		old := a.seal(a.r)
		subject := natsfeed.ReceiptSubject("a")
		time.Sleep(time.Second)
		refused := func(what string, err, want error) {
			t.Helper()
			if !errors.Is(err, want) {
				t.Errorf("%s: %v, want %v", what, err, want)
			}
		}
		refused("a replay", tr.Receive(subject, old), ErrReplayed)
		refused("another's key", tr.Receive(subject, b.seal(a.r)), ErrForged)
		refused("another's name", b.try(func(r *session.Receipt) { r.Enforcer = "a" }), ErrForged)
		refused("a stranger", tr.Receive(natsfeed.ReceiptSubject("c"), old), ErrNotEnrolled)
		refused("garbage", tr.Receive(subject, []byte("ILK")), session.ErrFrame)
		frame, err := session.Seal(session.TypeHeartbeat, (&session.Heartbeat{}).MarshalBody(), a.key)
		if err != nil {
			t.Fatal(err)
		}
		refused("another type of frame", tr.Receive(subject, frame), ErrForged)

		// After a restart of the enforcer, its earlier life is over.
		first := a.r.Boot
		a.r.Boot, a.r.Count = session.WriterID{2}, 0
		a.send(0)
		refused("the boot before", a.try(func(r *session.Receipt) { r.Boot, r.Count = first, 99 }), ErrReplayed)
		refused("a boot from before", a.try(func(r *session.Receipt) {
			r.Boot, r.At = session.WriterID{9}, r.At-int64(time.Hour)
		}), ErrReplayed)
		if err := tr.Recall(subject, old, time.Now().Add(-time.Hour)); !errors.Is(err, ErrReplayed) {
			t.Errorf("recalled: %v", err)
		}

		list, _ := tr.Enforcers()
		if list[0].ReceiptsRefused != 7 || list[1].ReceiptsRefused != 1 || tr.Strangers() != 1 {
			t.Errorf("counted %d, %d and %d", list[0].ReceiptsRefused, list[1].ReceiptsRefused, tr.Strangers())
		}
	})
}

// One that floods is cut to its rate, and no other suffers.
func TestFlood(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, hosts := enrolled(t, newLedger(), "a", "b")
		n := 0
		for range 1000 {
			if err := hosts["a"].try(nil); err == nil {
				n++
			} else if !errors.Is(err, ErrFlood) {
				t.Fatal(err)
			}
		}
		if n != receiptBurst {
			t.Errorf("%d of 1000 at once were taken, want %d", n, receiptBurst)
		}
		hosts["b"].send(0)
		time.Sleep(time.Second)
		hosts["a"].send(0)
	})
}

// What one enforcer makes the authority remember is bounded.
func TestMemoryIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tr, hosts := enrolled(t, newLedger(), "a")
		h := hosts["a"]
		for i := range uint64(40) {
			var list []session.Applied
			for j := range uint64(session.MaxApplied) {
				list = append(list, session.Applied{Number: 1 + i*session.MaxApplied + j, At: 1})
			}
			h.r.Batches = list
			h.r.Boot = session.WriterID{byte(i), 1}
			if err := h.try(nil); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Second)
		}
		for i := range 100 {
			h.r.Boot = session.WriterID{byte(i), 2}
			if err := h.try(nil); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Second)
		}
		m := tr.members["a"]
		if len(m.timed) > maxTimed || len(m.order) > maxTimed || len(m.boots) > maxBoots {
			t.Errorf("%d times, %d boots", len(m.timed), len(m.boots))
		}
	})
}

// What is known of an enforcer ends with its enrolment.
func TestEnrolledAnew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLedger()
		tr, hosts := enrolled(t, l, "a")
		hosts["a"].send(0)
		tr.SetEnforcers(nil)
		if err := hosts["a"].try(nil); !errors.Is(err, ErrNotEnrolled) {
			t.Errorf("retired: %v", err)
		}
		pub, _, err := ed25519.GenerateKey(rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		tr.SetEnforcers([]Enforcer{{Name: "a", ReceiptKey: hosts["a"].key.Public().(ed25519.PublicKey)}})
		hosts["a"].send(0)
		tr.SetEnforcers([]Enforcer{{Name: "a", ReceiptKey: pub}})
		if err := hosts["a"].try(nil); !errors.Is(err, ErrForged) {
			t.Errorf("with the keys of the enrolment before: %v", err)
		}
		if list, _ := tr.Enforcers(); list[0].Condition != authority.ConditionAbsent {
			t.Errorf("%+v", list[0])
		}
	})
}

// TestArmed: an enforcer is armed while it denies the newest canary that it has
// had time for, and what it does not say is not assumed.
func TestArmed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLedger()
		tr, hosts := enrolled(t, l, "e1")
		h := hosts["e1"]
		state := func() *authority.Canary {
			list, _ := tr.Enforcers()
			return list[0].Canary
		}
		decide := func(n uint64) {
			l.add(n)
			tr.Canary(1, n, time.Now())
		}
		report := func(n uint64, denied bool, edit func(*session.Receipt)) {
			t.Helper()
			h.r.Number, h.r.Head, h.r.Confirmed = n, hash(n), n
			if err := h.try(func(r *session.Receipt) {
				r.Canary = &session.Canary{Number: n, At: time.Now().UnixNano(), Denied: denied}
				if edit != nil {
					edit(r)
				}
			}); err != nil {
				t.Fatal(err)
			}
		}
		decide(1) // before it is there
		time.Sleep(time.Minute)
		h.send(1)
		if c := state(); c != nil {
			t.Errorf("of a canary from before its start: %+v", c)
		}
		time.Sleep(time.Second)
		decide(2)
		time.Sleep(7 * time.Millisecond)
		report(2, true, nil)
		time.Sleep(canaryGrace)
		if c := state(); c == nil || !c.Armed || c.LatencyMillis != 7 || c.Number != 2 {
			t.Errorf("denied: %+v", c)
		}
		decide(3)
		time.Sleep(canaryGrace - time.Nanosecond)
		if c := state(); c == nil || !c.Armed {
			t.Errorf("within its grace: %+v", c)
		}
		time.Sleep(time.Nanosecond)
		if c := state(); c == nil || c.Armed || c.Why != "no word of the canary at seq 3" {
			t.Errorf("silent: %+v", c)
		}
		report(3, false, nil)
		if c := state(); c == nil || c.Armed || c.Why != "the canary at seq 3 was allowed" {
			t.Errorf("allowed: %+v", c)
		}
		report(2, true, nil) // an old one takes nothing back
		if c := state(); c == nil || c.Armed {
			t.Errorf("an old one again: %+v", c)
		}
		decide(4)
		report(4, true, func(r *session.Receipt) { r.Error = 3 * time.Millisecond })
		time.Sleep(canaryGrace)
		if c := state(); c == nil || !c.Armed || c.LatencyMillis != 3 {
			t.Errorf("sooner than the clocks can tell: %+v", c)
		}
		tr.Canary(2, 1, time.Now()) // another epoch
		time.Sleep(canaryGrace)
		if c := state(); c == nil || c.Armed {
			t.Errorf("what it denied in the epoch before: %+v", c)
		}
		took := tr.Canaries()["e1"]
		if took.Counts[3] != 1 || took.Counts[2] != 1 || took.Sum != 10*time.Millisecond {
			t.Errorf("7 and 3 ms: %+v", took)
		}
		for n := uint64(2); n < 1000; n++ {
			tr.Canary(2, n, time.Now())
		}
		if n := len(tr.canaries.list); n > maxCanaries {
			t.Errorf("%d canaries are kept", n)
		}
	})
}

// TestWhoOpensIsExpected: from the moment in which an enforcer asks for the
// writer's clock, without which it allows nothing, a decision waits for what it has
// to say; not for ever, and not for one of which enough is heard.
func TestWhoOpensIsExpected(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLedger()
		tr, hosts := enrolled(t, l, "never", "new", "back", "live")
		hosts["back"].send(0)
		time.Sleep(2 * bound)
		hosts["live"].send(0)
		l.add(1)
		hosts["live"].send(1, session.Applied{Number: 1, At: time.Now().UnixNano()})
		if c := tr.Coverage(1, 1, false); !c.Complete || c.InEffect != 1 || c.Denying != 1 || c.Absent != 2 {
			t.Fatalf("%+v", c)
		}
		for _, name := range []string{"new", "back", "live", "stranger"} {
			tr.Asked(natsfeed.ClockSubject(name))
		}
		c, next := tr.coverage(1, 1, true, nil)
		if c.Complete || c.Pending != 2 || c.InEffect != 1 || c.Absent != 1 || !next.Equal(time.Now().Add(expectFor)) {
			t.Errorf("opening: %+v, next %s", c, next)
		}
		time.Sleep(time.Second)
		hosts["new"].send(1, session.Applied{Number: 1, At: time.Now().UnixNano()})
		if c := tr.Coverage(1, 1, false); c.Complete || c.Pending != 1 || c.InEffect != 2 {
			t.Errorf("one has reported: %+v", c)
		}
		time.Sleep(expectFor)
		if c := tr.Coverage(1, 1, false); !c.Complete || c.Denying != 1 || c.Absent != 1 {
			t.Errorf("one never did: %+v", c)
		}
	})
}
