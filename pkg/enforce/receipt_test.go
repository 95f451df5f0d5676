package enforce

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/interlock-fabric/interlock/pkg/session"
)

// TestReceipts: the first at once, news at once after a pause, never more than two
// in a second, cumulative, each batch timed once; verified with the receipt key.
func TestReceipts(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		enrolled := b.enrol("e1")
		e, f := b.open(func(o *Options) { o.Enrollment = enrolled })
		defer e.Close()
		settle()
		if said := f.said(); len(said) != 1 || said[0].Count != 1 || said[0].Number != 0 {
			t.Fatalf("after opening: %d receipts", len(said))
		}
		time.Sleep(10*time.Second + 70*time.Millisecond)
		if n := len(f.said()); n != 6 { // a sign of life every two seconds
			t.Fatalf("%d receipts when idle for ten seconds", n)
		}
		at := time.Now()
		b.decide(revoke(b.session("s0")))
		settle()
		if said := f.said(); said[len(said)-1].Number != 1 || said[len(said)-1].at != at {
			t.Fatalf("news came %v late, of %d", said[len(said)-1].at.Sub(at), said[len(said)-1].Number)
		}
		for i := range 100 {
			time.Sleep(37 * time.Millisecond)
			b.decide(revoke(b.session(fmt.Sprint("n", i))))
		}
		time.Sleep(1100 * time.Millisecond)
		timed := map[uint64]int{}
		said := f.said()
		for i, r := range said {
			if r.Count != uint64(i+1) || r.Boot != said[0].Boot || r.Epoch != 1 {
				t.Fatalf("receipt %d has count %d", i, r.Count)
			}
			if i >= 2 && r.at.Sub(said[i-2].at) < time.Second {
				t.Fatalf("three receipts within %v", r.at.Sub(said[i-2].at))
			}
			for _, x := range r.Batches {
				timed[x.Number]++
				if x.Number > r.Number {
					t.Fatalf("batch %d in a receipt up to %d", x.Number, r.Number)
				}
			}
			frame, err := session.ParseFrame(f.frames[i])
			if err == nil {
				err = frame.Verify(enrolled.ReceiptKey.Public().(ed25519.PublicKey))
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		last := said[len(said)-1]
		if len(timed) != 101 || last.Number != 101 || last.Confirmed != 101 || last.Head != b.head || last.Denying {
			t.Fatalf("%d batches timed, the last receipt %+v", len(timed), last.Receipt)
		}
		for n, times := range timed {
			if times != 1 {
				t.Fatalf("batch %d is timed %d times", n, times)
			}
		}
	})
}

// TestReceiptTime: the moment of application is in the authority's time, within
// the error that the receipt states, with clocks that are hours apart and a slow
// and lopsided way to the authority.
func TestReceiptTime(t *testing.T) {
	for _, x := range []struct{ authority, host, delay time.Duration }{
		{0, 0, 0}, {5 * time.Hour, 0, 0}, {0, 5 * time.Hour, 0}, {-3 * time.Hour, 4 * time.Hour, 800 * time.Millisecond},
	} {
		within(t, func(t *testing.T, b *bus) {
			b.as(func(b *bus) { b.wall = x.authority })
			b.with(func(b *bus) { b.delay = x.delay })
			h := newHost()
			h.set(x.host)
			e, f := b.open(func(o *Options) { o.clock = h.read })
			defer e.Close()
			want := map[uint64]int64{}
			for i := range 20 {
				time.Sleep(3*time.Second + 77*time.Millisecond)
				b.decide(revoke(b.session(fmt.Sprint(i))))
				want[uint64(i+1)] = time.Now().Add(x.authority).UnixNano()
			}
			time.Sleep(time.Second)
			seen := 0
			for _, r := range f.said() {
				if off := time.Duration(r.At - r.at.Add(x.authority).UnixNano()).Abs(); off > r.Error {
					t.Fatalf("the receipt's own time is off by %v, its error is %v", off, r.Error)
				}
				if r.Error > 50*time.Millisecond+x.delay/2 {
					t.Fatalf("error %v", r.Error)
				}
				for _, a := range r.Batches {
					seen++
					if off := time.Duration(a.At - want[a.Number]).Abs(); off > r.Error {
						t.Fatalf("batch %d is off by %v, the error is %v", a.Number, off, r.Error)
					}
				}
			}
			if seen != 20 {
				t.Fatalf("%d batches timed", seen)
			}
		})
	}
}

// TestReceiptsOverAnOutage: what could not be said is said later, and a feed that
// hangs in Receipt holds up no decision.
func TestReceiptsOverAnOutage(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		e, f := b.open(nil)
		defer e.Close()
		time.Sleep(time.Second)
		b.with(func(b *bus) { f.deaf = true })
		p := prepare(t, e, caller("s1"))
		b.decide(revoke(b.session("s0")))
		settle()
		b.decide(revoke(b.session("s1")))
		settle()
		mustDeny(t, e, p, session.Call{}, session.ErrRevoked)
		time.Sleep(5 * time.Second)
		b.with(func(b *bus) { f.deaf = false })
		time.Sleep(2500 * time.Millisecond)
		timed := map[uint64]bool{}
		for _, r := range f.said() {
			for _, a := range r.Batches {
				timed[a.Number] = true
			}
		}
		if !timed[1] || !timed[2] {
			t.Fatalf("timed: %v", timed)
		}
	})
}

// TestFailure14AKillIsReportedWhenTheWorkHasEnded: the first receipt that covers a
// kill is made after the work that it matches was cut, so that "in effect" never
// comes before the agent has stopped. It fails when receipts are made before the
// cut.
func TestFailure14AKillIsReportedWhenTheWorkHasEnded(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		e, f := b.open(nil)
		defer e.Close()
		const calls = 50
		var running []context.Context
		for i := range calls {
			ctx, release, err := e.Bind(t.Context(), prepare(t, e, caller(fmt.Sprint("s", i))), session.Call{Tool: "work"})
			if err != nil {
				t.Fatal(err)
			}
			defer release()
			running = append(running, ctx)
		}
		time.Sleep(time.Second)
		kill := set(session.EffectSuspended, session.GlobalKey())
		kill.Reason = session.ReasonKill
		b.decide(kill)
		n := b.number
		settle()
		for _, r := range f.said() {
			if r.Number < n {
				continue
			}
			if r.Running != 0 || r.Cut != calls || len(r.Batches) != 1 || r.Batches[0].Cut != calls {
				t.Fatalf("reported with %d running, %d cut: %+v", r.Running, r.Cut, r.Batches)
			}
			for _, ctx := range running {
				if !errors.Is(context.Cause(ctx), session.ErrSuspended) {
					t.Fatal("reported while a call was running")
				}
			}
			return
		}
		t.Fatal("the kill was not reported")
	})
}
