package snapshotprom

import (
	"fmt"
	"slices"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestAScrapeIsOfOneSnapshot(t *testing.T) {
	taken := 0
	c := New("x_", "eu-1", func() int { taken++; return taken })
	c.Gauge("now", "What it is.", func(n *int) float64 { return float64(*n) / 2 })
	c.Total("ever", "What it was.", func(n *int) uint64 { return uint64(*n) })
	r := prometheus.NewPedanticRegistry()
	if err := r.Register(c); err != nil {
		t.Fatal(err)
	}
	for _, want := range [][]string{
		{`x_ever_total What it was. enforcer="eu-1" 1`, `x_now What it is. enforcer="eu-1" 0.5`},
		{`x_ever_total What it was. enforcer="eu-1" 2`, `x_now What it is. enforcer="eu-1" 1`},
	} {
		families, err := r.Gather()
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, f := range families {
			m := f.GetMetric()[0]
			v := m.GetGauge().GetValue() + m.GetCounter().GetValue() // nil is 0
			got = append(got, fmt.Sprintf("%s %s %s=%q %v", f.GetName(), f.GetHelp(), m.GetLabel()[0].GetName(), m.GetLabel()[0].GetValue(), v))
		}
		if !slices.Equal(got, want) {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}
