package registry

import (
	"context"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/interlock-fabric/interlock/pkg/session"
)

// live is a session of a deployment of 100,000 sessions, 10,000 agents, 20,000
// users and 100 blueprints.
func live(i int) Session {
	s := ses(i)
	s.Agent = Ref{ID: fmt.Sprintf("spiffe://corp/agent/%d", i%10_000)}
	s.User, s.Client = fmt.Sprintf("user-%d@corp.example", i%20_000), fmt.Sprintf("client-%d", i%20)
	s.Keys = []string{fmt.Sprintf("apikey:%064x", i)}
	if i%3 == 0 && i > 0 {
		s.Parent = Ref{ID: fmt.Sprintf("s-%06d", i/3)}
		s.Chain = []Ref{{ID: fmt.Sprintf("spiffe://corp/agent/%d", i/3%10_000)}}
	}
	s.Issued = hour.Add(-2 * time.Hour)
	if err := s.canonical(time.Now()); err != nil {
		panic(err)
	}
	return s
}

func liveAgent(i int) Agent {
	return Agent{
		Tenant: "acme", Ref: Ref{ID: fmt.Sprintf("spiffe://corp/agent/%d", i)}, Owner: fmt.Sprintf("mailto:team-%d@corp.example", i%200),
		Purpose: "answers invoices", Environment: "production", Blueprint: fmt.Sprintf("bp-%d", i%100), Capabilities: []string{"read", "write"},
		Digests: []string{fmt.Sprintf("code:sha256:%064x", i%500), fmt.Sprintf("model:sha256:%064x", i%10)},
	}
}

// fill gives an index 100,000 sessions and 10,000 agents.
func fill(x *index) {
	for i := range 10_000 {
		rec := AgentRecord{Agent: liveAgent(i), State: Active, Revision: x.next}
		x.putAgent(x.next, &rec)
	}
	for i := range 100_000 {
		s := live(i)
		x.putSession(x.next, &s)
	}
}

func heapInUse() uint64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// TestMemoryIsReported: what the status says is about what the heap has.
func TestMemoryIsReported(t *testing.T) {
	before := heapInUse()
	x := newIndex()
	fill(x)
	used := int(heapInUse() - before)
	t.Logf("100,000 sessions and 10,000 agents: %.1f MiB of heap, %.1f MiB reported, %d bytes a session", float64(used)/(1<<20), float64(x.bytes)/(1<<20), x.bytes/x.sessions)
	if x.bytes < used*2/3 || x.bytes > used*3/2 {
		t.Errorf("%d bytes are reported, %d are used", x.bytes, used)
	}
	if used > 150<<20 {
		t.Errorf("%d bytes", used)
	}
	runtime.KeepAlive(x)
}

func quantile(d []time.Duration, q float64) time.Duration {
	slices.Sort(d)
	return d[min(len(d)-1, int(float64(len(d))*q))]
}

// BenchmarkRegister registers sessions, one a call from 256 callers, on a store
// that syncs the disk.
func BenchmarkRegister(b *testing.B) {
	for _, per := range []int{1, 100} {
		b.Run(fmt.Sprintf("%d a call", per), func(b *testing.B) {
			w := newWorld(b, false)
			r := w.open(Options{})
			var next atomic.Int64
			var wg sync.WaitGroup
			latency := make([]time.Duration, b.N)
			b.ResetTimer()
			for range 256 {
				wg.Go(func() {
					for {
						n := next.Add(1)
						if n > int64(b.N) {
							return
						}
						list := make([]Session, per)
						for i := range list {
							list[i] = live(int(n)*per + i)
						}
						at := time.Now()
						w.register(r, list...)
						latency[n-1] = time.Since(at)
					}
				})
			}
			wg.Wait()
			b.ReportMetric(float64(b.N*per)/b.Elapsed().Seconds(), "sessions/s")
			b.ReportMetric(float64(quantile(latency, 0.99).Microseconds())/1000, "p99-ms")
			b.ReportMetric(float64(b.N*per)/float64(max(1, r.Status().Batches)), "sessions/batch")
		})
	}
}

// BenchmarkAsk asks a registry of 100,000 live sessions and 10,000 agents, while
// others register.
func BenchmarkAsk(b *testing.B) {
	w := newWorld(b, false)
	r := w.open(Options{})
	r.mu.Lock()
	fill(r.x)
	r.mu.Unlock()
	ctx, stop := context.WithCancel(w.ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer stop()
	var n atomic.Int64
	pace := time.NewTicker(time.Millisecond) // 5,000 a second
	defer pace.Stop()
	wg.Go(func() {
		for ctx.Err() == nil {
			list := make([]Session, 5)
			for i := range list {
				list[i] = live(200_000 + int(n.Add(1)))
			}
			if _, err := r.RegisterSessions(ctx, list); err != nil && ctx.Err() == nil {
				b.Error(err)
			}
			<-pace.C
		}
	})
	one := func(k session.Kind, issuer, v string) []session.Target {
		return []session.Target{{Tenant: "acme", Terms: []session.Term{{Kind: k, Issuer: issuer, Value: v}}}}
	}
	touched := func(t []session.Target) func() { return func() { _, err := r.Touched(t, nil); must(b, err) } }
	page := func(q SessionQuery) func() {
		q.Tenant, q.Limit = "acme", 100
		return func() { _, _, err := r.Sessions(q); must(b, err) }
	}
	for _, c := range []struct {
		name string
		ask  func()
	}{
		{"preview user", touched(one(session.KindUser, issuer, "user-17@corp.example"))},
		{"preview agent", touched(one(session.KindAgent, "", "spiffe://corp/agent/17"))},
		{"preview blueprint", touched(one(session.KindBlueprint, "", "bp-17"))},
		{"preview model", touched(one(session.KindDigest, "", fmt.Sprintf("model:sha256:%064x", 7)))},
		{"preview session tree", touched(one(session.KindSession, issuer, "s-000001"))},
		{"preview tenant", touched(one(session.KindTenant, "", "acme"))},
		{"page", page(SessionQuery{})},
		{"page of user", page(SessionQuery{Terms: one(session.KindUser, issuer, "user-17@corp.example")[0].Terms})},
		{"page of blueprint", page(SessionQuery{Terms: one(session.KindBlueprint, "", "bp-17")[0].Terms})},
	} {
		b.Run(c.name, func(b *testing.B) {
			took := make([]time.Duration, b.N)
			for i := range b.N {
				at := time.Now()
				c.ask()
				took[i] = time.Since(at)
			}
			b.ReportMetric(float64(quantile(took, 0.5).Microseconds())/1000, "p50-ms")
			b.ReportMetric(float64(quantile(took, 0.99).Microseconds())/1000, "p99-ms")
		})
	}
	st := r.Status()
	b.Logf("%d sessions, %d agents, %.1f MiB; %d registered meanwhile", st.Sessions, st.Agents, float64(st.Bytes)/(1<<20), n.Load())
}

// BenchmarkOpen reads a registry of 100,000 sessions and 10,000 agents from its
// snapshot.
func BenchmarkOpen(b *testing.B) {
	w := newWorld(b, false)
	r := w.open(Options{})
	r.mu.Lock()
	fill(r.x)
	r.mu.Unlock()
	w.register(r, live(300_000))
	must(b, r.makeSnapshot(w.ctx))
	b.ResetTimer()
	for range b.N {
		o := w.open(Options{})
		if o.Status().Sessions != 100_001 {
			b.Fatalf("%+v", o.Status())
		}
		must(b, o.Close())
	}
}
