package demo

import (
	"fmt"
	"log/slog"
	"slices"
	"testing"
	"time"
)

// BenchmarkRevoke measures, from the moment at which a decision is sent to the
// authority's API, until the first and the last enforcer have cut the session's
// running call and denied its next one: durable log, signature, fan-out and
// verification included. Every enforcer has a connection of its own; all run in
// this process.
func BenchmarkRevoke(b *testing.B) {
	for _, n := range []int{1, 100} {
		b.Run(fmt.Sprintf("enforcers=%d", n), func(b *testing.B) {
			f, err := startFabric(b.Context(), b.TempDir(), slog.New(slog.DiscardHandler))
			if err != nil {
				b.Fatal(err)
			}
			defer f.close()
			fl, err := f.fleet(b.Context(), n)
			if err != nil {
				b.Fatal(err)
			}
			defer fl.close()
			var firsts, lasts []time.Duration
			for i := 0; b.Loop(); i++ {
				first, last, err := fl.revoke(b.Context(), f.client, fmt.Sprintf("s-%d", i))
				if err != nil {
					b.Fatal(err)
				}
				firsts, lasts = append(firsts, first), append(lasts, last)
			}
			for name, d := range map[string][]time.Duration{"first": firsts, "last": lasts} {
				slices.Sort(d)
				b.ReportMetric(float64(d[len(d)/2].Microseconds())/1000, "ms-p50-"+name)
				b.ReportMetric(float64(d[len(d)*99/100].Microseconds())/1000, "ms-p99-"+name)
			}
			b.ReportMetric(0, "ns/op")
		})
	}
}
