package trailprom_test

import (
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"github.com/interlock-fabric/interlock/pkg/session"
	"github.com/interlock-fabric/interlock/pkg/trail"
	"github.com/interlock-fabric/interlock/pkg/trail/trailprom"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type fixed trail.Stats

func (f fixed) Stats() trail.Stats { return trail.Stats(f) }

var _ trailprom.Source = (*trail.Recorder)(nil)

// TestEveryNumberIsShown: each total has a value of its own, and is found.
func TestEveryNumberIsShown(t *testing.T) {
	s := fixed{
		TrailTotals: session.TrailTotals{Calls: 1, Denied: 2, Sampled: 3, Dropped: 4, Folded: 5, Untracked: 6},
		Reports:     7, Failures: 8, Denials: 9, Samples: 10,
	}
	r := prometheus.NewPedanticRegistry()
	if err := r.Register(trailprom.New("eu-1", s)); err != nil {
		t.Fatal(err)
	}
	families, err := r.Gather()
	if err != nil {
		t.Fatal(err)
	}
	seen := map[float64]bool{}
	for _, f := range families {
		m := f.GetMetric()[0]
		v := m.GetGauge().GetValue()
		if m.GetCounter() != nil {
			v = m.GetCounter().GetValue()
		}
		if seen[v] || (m.GetCounter() != nil) != strings.HasSuffix(f.GetName(), "_total") || m.GetLabel()[0].GetValue() != "eu-1" {
			t.Errorf("%s: %v", f.GetName(), m)
		}
		seen[v] = true
	}
	for v := 1.0; v <= 10; v++ {
		if !seen[v] {
			t.Errorf("%v is not shown", v)
		}
	}
}
