package authority

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/interlock-fabric/interlock/internal/access"
	"github.com/interlock-fabric/interlock/internal/registry"
	"github.com/interlock-fabric/interlock/pkg/authority"
)

// BenchmarkRegistryAPI registers 100,000 sessions and 10,000 agents over the API,
// on a disk that is synced, and previews and lists over it.
func BenchmarkRegistryAPI(b *testing.B) {
	ctx := b.Context()
	a, err := Open(ctx, Options{DataDir: b.TempDir(), Issuers: []string{issuer}})
	if err != nil {
		b.Fatal(err)
	}
	defer func() {
		if err := a.Close(); err != nil {
			b.Error(err)
		}
	}()
	c, err := authority.New(authority.Options{Socket: a.Socket()})
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	var wg sync.WaitGroup
	for g := range 100 {
		wg.Go(func() {
			for i := g; i < 10_000; i += 100 {
				if _, _, err := a.registry.RegisterAgent(ctx, registry.Agent{
					Tenant: "default", Ref: registry.Ref{ID: fmt.Sprint("spiffe://corp/agent/", i)}, Blueprint: fmt.Sprint("bp-", i%100),
				}, 0); err != nil {
					b.Error(err)
				}
			}
		})
	}
	wg.Wait()
	end := time.Now().Add(time.Hour)
	began := time.Now()
	for i := 0; i < 100_000; i += 1000 {
		list := make([]authority.Session, 1000)
		for k := range list {
			n := i + k
			list[k] = authority.Session{ID: fmt.Sprint("s-", n), User: fmt.Sprint("user-", n%20_000), Agent: authority.TrailLink{ID: fmt.Sprint("spiffe://corp/agent/", n%10_000)}, Expires: end}
		}
		if _, err := c.RegisterSessions(ctx, list); err != nil {
			b.Fatal(err)
		}
	}
	b.Logf("100,000 sessions in %s", time.Since(began))
	preview := func(kind, value string) func() error {
		r := authority.Request{Operation: authority.Revoke, Reason: "anomaly", Targets: one(kind, value)}
		return func() error { _, err := c.Decide(ctx, r); return err }
	}
	for name, ask := range map[string]func() error{
		"preview user": preview("user", "user-17"), "preview blueprint": preview("blueprint", "bp-17"),
		"page": func() error { _, err := c.Sessions(ctx, authority.RegistryQuery{}); return err },
	} {
		b.Run(name, func(b *testing.B) {
			took := make([]time.Duration, b.N)
			for i := range b.N {
				at := time.Now()
				if err := ask(); err != nil {
					b.Fatal(err)
				}
				took[i] = time.Since(at)
			}
			slices.Sort(took)
			b.ReportMetric(float64(took[len(took)*99/100].Microseconds())/1000, "p99-ms")
		})
	}
}

// BenchmarkDecide measures how long a decision takes until it is durable, on a disk
// that is synced with every write: in the log alone, and in the log and the audit,
// as everybody waits for it.
func BenchmarkDecide(b *testing.B) {
	for _, at := range []int{1, 16} {
		for _, audited := range []bool{false, true} {
			b.Run(fmt.Sprintf("audit=%t/at once=%d", audited, at), func(b *testing.B) { benchmarkDecide(b, at, audited) })
		}
	}
}

func benchmarkDecide(b *testing.B, at int, audited bool) {
	a, err := Open(b.Context(), Options{DataDir: b.TempDir(), Issuers: []string{issuer}})
	if err != nil {
		b.Fatal(err)
	}
	defer func() {
		if err := a.Close(); err != nil {
			b.Error(err)
		}
	}()
	ctx := access.With(b.Context(), access.NewPrincipal("bench", access.MeansSocket, access.Grant{Role: access.Commander, Tenants: []string{access.Everywhere}}))
	decide := func(i int) error {
		r := authority.Request{Operation: authority.Revoke, Reason: "anomaly", Targets: one("session", fmt.Sprint("s-", i)), Commit: true}
		if audited {
			d, err := a.Decide(ctx, fmt.Sprint(i), r)
			if err == nil && !d.Durable {
				err = errors.New("not durable")
			}
			return err
		}
		d, err := a.decide(ctx, a.planner(access.From(ctx)), fmt.Sprint(i), r)
		if err == nil && !d.Durable {
			err = errors.New("not durable")
		}
		return err
	}
	took := make([]time.Duration, b.N)
	var next atomic.Int64
	var wg sync.WaitGroup
	b.ResetTimer()
	for range at {
		wg.Go(func() {
			for i := next.Add(1) - 1; i < int64(b.N); i = next.Add(1) - 1 {
				began := time.Now()
				if err := decide(int(i)); err != nil {
					b.Error(err)
					return
				}
				took[i] = time.Since(began)
			}
		})
	}
	wg.Wait()
	b.StopTimer()
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Microseconds())/1000, "p50-ms")
	b.ReportMetric(float64(took[len(took)*99/100].Microseconds())/1000, "p99-ms")
}
