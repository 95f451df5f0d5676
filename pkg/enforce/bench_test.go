package enforce

import (
	"context"
	"encoding/binary"
	"fmt"
	"testing"
	"time"

	"github.com/interlock-fabric/interlock/pkg/session"
)

// Run with: go test -run '^$' -bench . ./pkg/enforce

// opened is an enforcer on a bus of its own, with n sessions revoked, in real
// time.
func opened(tb testing.TB, n int) (*bus, *Enforcer) {
	b := newBus(tb)
	k := b.session("template")
	for i := 0; i < n; i += session.MaxBatchEntries {
		var entries []session.Entry
		for j := i; j < min(n, i+session.MaxBatchEntries); j++ {
			binary.BigEndian.PutUint64(k.Digest[:], uint64(j+1))
			entries = append(entries, revoke(k))
		}
		frame, _ := b.batch(entries...)
		b.accept(frame)
	}
	stop := b.run()
	tb.Cleanup(stop)
	e, _ := b.open(func(o *Options) { o.MaxStale = time.Hour })
	tb.Cleanup(func() { e.Close() })
	return b, e
}

func BenchmarkCheck(b *testing.B) {
	for _, n := range []int{0, 1000, 100_000} {
		bus, e := opened(b, n)
		p := prepare(b, e, caller("s1"))
		run := func(name string, call session.Call) {
			b.Run(fmt.Sprintf("%d/%s", n, name), func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					if err := e.Check(p, call); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
		run("plain", session.Call{Tool: "read"})
		b.Run(fmt.Sprintf("%d/parallel", n), func(b *testing.B) {
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					if err := e.Check(p, session.Call{Tool: "read"}); err != nil {
						b.Error(err)
						return
					}
				}
			})
		})
		bus.decide(revoke(bus.target("acme", session.Term{Kind: session.KindTool, Value: "drop"})))
		await(b, e, bus.number)
		run("tools in force", session.Call{Tool: "read"})
		bus.decide(revoke(bus.session("gone")))
		await(b, e, bus.number)
		gone := prepare(b, e, caller("gone"))
		b.Run(fmt.Sprintf("%d/denied", n), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if e.Check(gone, session.Call{Tool: "read"}) == nil {
					b.Fatal("allowed")
				}
			}
		})
	}
}

// await spins until a batch is in force.
func await(b *testing.B, e *Enforcer, number uint64) {
	for limit := time.Now().Add(time.Minute); e.view.Load().tip.number < number; {
		if time.Now().After(limit) {
			b.Fatalf("batch %d did not come into force: %+v", number, e.Status())
		}
	}
}

func BenchmarkBind(b *testing.B) {
	for _, running := range []int{0, 10_000} {
		b.Run(fmt.Sprintf("%d running", running), func(b *testing.B) {
			_, e := opened(b, 1000)
			p := prepare(b, e, caller("s1"))
			for range running {
				mustBind(b, e, p, session.Call{Tool: "read"})
			}
			b.ReportAllocs()
			for b.Loop() {
				_, release, err := e.Bind(context.Background(), p, session.Call{Tool: "read"})
				if err != nil {
					b.Fatal(err)
				}
				release()
			}
		})
	}
}

// BenchmarkApply is how fast batches that are heard come into force, verified and
// confirmed by a heartbeat now and then, with and without running work to cut.
func BenchmarkApply(b *testing.B) {
	for _, x := range []struct{ inForce, entries int }{{0, 1}, {100_000, 1}, {0, session.MaxBatchEntries}} {
		b.Run(fmt.Sprintf("%d in force/%d each", x.inForce, x.entries), func(b *testing.B) {
			bus, e := opened(b, x.inForce)
			k := bus.session("template")
			frames := make([][]byte, b.N)
			at, n := head{bus.number, bus.head}, uint64(1)<<40
			for i := range frames {
				entries := make([]session.Entry, x.entries)
				for j := range entries {
					n++
					binary.BigEndian.PutUint64(k.Digest[:], n)
					entries[j] = revoke(k)
				}
				frames[i], _ = bus.make(at, bus.signer, entries...)
				at = headOf(b, frames[i])
			}
			bus.store(frames)
			start := bus.number
			b.ResetTimer()
			for i, f := range frames {
				bus.say(f)
				if i%500 == 499 {
					await(b, e, start+uint64(i)-400)
				}
			}
			await(b, e, at.number)
			b.ReportMetric(float64(b.N*x.entries)/b.Elapsed().Seconds(), "entries/s")
		})
	}
}

// BenchmarkCut is from the moment that a batch is on the bus to the end of the
// running call that it revokes, without a network between.
func BenchmarkCut(b *testing.B) {
	bus, e := opened(b, 1000)
	var slowest time.Duration
	for i := 0; b.Loop(); i++ {
		id := fmt.Sprint("c", i)
		ctx := mustBind(b, e, prepare(b, e, caller(id)), session.Call{})
		frame, _ := bus.batch(revoke(bus.session(id)))
		start := time.Now()
		bus.say(frame)
		<-ctx.Done()
		slowest = max(slowest, time.Since(start))
		bus.accept(frame)
	}
	b.ReportMetric(float64(slowest)/1e3, "µs-slowest")
}

// BenchmarkWarmStart is from Start to the first allowed request, with the state of
// the last run in the state directory and a heartbeat every 10 ms.
func BenchmarkWarmStart(b *testing.B) {
	const n = 1_000_000
	bus, e := opened(b, n)
	set := e.view.Load().set
	quit := make(chan struct{})
	defer close(quit)
	bus.done.Go(func() {
		tick := time.NewTicker(10 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-quit:
				return
			case <-tick.C:
				bus.beat()
			}
		}
	})
	dir := b.TempDir()
	keep := func(o *Options) { o.StateDir = dir }
	first, _ := bus.open(keep)
	if err := first.Close(); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		e, _ := bus.open(keep)
		p := prepare(b, e, caller("ok"))
		if err := e.Check(p, session.Call{}); err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		if s := e.Status(); s.Entries != set.Len() || e.view.Load().set.Segment() == nil {
			b.Fatalf("%+v", s)
		}
		if err := e.Close(); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
}
