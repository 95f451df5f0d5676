package sequencer

import (
	"context"
	"slices"
	"testing"
	"time"

	"github.com/interlock-fabric/interlock/pkg/session"
)

// BenchmarkDecideWhilePublishing measures how long decisions take, one at a time,
// while a state of a million entries is sealed to a file, published, read back and
// the log trimmed, against before. It prints percentiles, since a mean hides the
// one decision that would have waited.
func BenchmarkDecideWhilePublishing(b *testing.B) {
	const entries = 1_000_000
	s := newStore(b)
	q := s.open(byHand, func(o *Options) {
		o.StateDir, o.AckWait = b.TempDir(), time.Minute
		o.Quota = func(session.TenantID) int { return 2 * entries }
	})
	ctx := context.Background()
	for n := 0; n < entries; n += session.MaxBatchEntries {
		d := Decision{ID: id(n)}
		for i := range session.MaxBatchEntries {
			d.Entries = append(d.Entries, revoke(n+i).Entries...)
		}
		_, err := q.Decide(ctx, d)
		must(b, err)
	}
	must(b, q.publishSegment()) // the state is in a file now, as it is in production
	next := entries
	decide := func() time.Duration {
		next++
		start := time.Now()
		_, err := q.Decide(ctx, revoke(next))
		must(b, err)
		return time.Since(start)
	}
	report := func(when string, took []time.Duration) {
		slices.Sort(took)
		at := func(p float64) float64 { return float64(took[int(p*float64(len(took)-1))].Microseconds()) }
		b.ReportMetric(at(0.5), when+"-p50-µs")
		b.ReportMetric(at(0.99), when+"-p99-µs")
		b.ReportMetric(at(1), when+"-max-µs")
		b.ReportMetric(float64(len(took)), when+"-decisions")
	}
	var idle, busy []time.Duration
	var publishing time.Duration
	rounds := 0
	for b.Loop() {
		rounds++
		for range 500 {
			idle = append(idle, decide())
		}
		done := make(chan error, 1)
		start := time.Now()
		go func() { done <- q.publishSegment() }()
		for ended := false; !ended; {
			busy = append(busy, decide())
			select {
			case err := <-done:
				must(b, err)
				publishing += time.Since(start)
				ended = true
			default:
			}
		}
	}
	report("idle", idle)
	report("publishing", busy)
	b.ReportMetric(publishing.Seconds()/float64(rounds), "s/publication")
}
