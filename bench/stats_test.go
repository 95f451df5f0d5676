package main

import (
	"math"
	"slices"
	"testing"
	"time"
)

func TestQuantileIsOfTheNearestRank(t *testing.T) {
	d := make([]time.Duration, 1000)
	for i := range d {
		d[len(d)-1-i] = time.Duration(i) // in no order
	}
	given := slices.Clone(d)
	for q, want := range map[float64]time.Duration{0: 0, .5: 500, .99: 990, .999: 999, 1: 999} {
		if got := quantile(d, q); got != want {
			t.Errorf("quantile %v of 0 to 999: %d, want %d", q, got, want)
		}
	}
	if !slices.Equal(d, given) {
		t.Error("the durations were reordered")
	}
	if got := quantile([]time.Duration{7}, .999); got != 7 {
		t.Errorf("of a single one: %d", got)
	}
}

func TestLatenciesAtAgreesWithQuantile(t *testing.T) {
	l := make(latencies, 10_000)
	for i := range l {
		l[i] = time.Duration(i * i)
	}
	for _, q := range []float64{0, .5, .99, .999, 1} {
		if got, want := l.at(q), float64(quantile(l, q)); got != want {
			t.Errorf("at %v: %v, want %v", q, got, want)
		}
	}
}

func TestSampleTakesTheClocksOwnCostOff(t *testing.T) {
	calls := 0
	l := sample(5000, nil, func(i int) {
		if i != calls {
			t.Fatalf("call %d has number %d", calls, i)
		}
		calls++
	})
	if calls != 5000 || len(l) != 5000 || !slices.IsSorted(l) || l[0] < 0 {
		t.Fatalf("%d calls, %d samples, sorted %v, least %v", calls, len(l), slices.IsSorted(l), l[0])
	}
	// Of doing nothing, what is left is less than what the clock costs.
	if got := l.at(.5); got > max(2*float64(clock), 100) {
		t.Errorf("nothing takes %v ns, and the clock %v", got, clock)
	}
}

func TestSampleEndsWhenItIsStopped(t *testing.T) {
	stop := make(chan struct{})
	close(stop)
	if l := sample(1<<30, stop, func(int) {}); len(l) != 1024 {
		t.Fatalf("%d samples, want the first 1024", len(l))
	}
}

func TestGoalsAreComparedInTheirUnits(t *testing.T) {
	for _, x := range []struct {
		v          float64
		unit, goal string
		want       bool
	}{
		{450, "ns", "≤ 450 ns", true},
		{450.1, "ns", "≤ 450 ns", false},
		{1200, "ns", "≤ 1.2 µs", true},
		{1201, "ns", "≤ 1.2 µs", false},
		{0.5, "s", "≤ 500 ms", true},
		{1.8, "×", "≥ 1.8 ×", true},
		{1.79, "×", "≥ 1.8 ×", false},
		{0, "", "≤ 0", true},
		{1, "", "≤ 0", false},
		{2999, "k/s", "≥ 3 M/s", false},
		{3001, "k/s", "≥ 3 M/s", true},
		{math.NaN(), "ns", "≤ 450 ns", false},
		{math.NaN(), "×", "≥ 1.8 ×", false},
	} {
		got, err := compare(x.v, x.unit, x.goal)
		if err != nil || got != x.want {
			t.Errorf("%v %s, goal %s: %v %v, want %v", x.v, x.unit, x.goal, got, err, x.want)
		}
	}
	for _, x := range [][2]string{
		{"ns", "450 ns"}, {"ns", "≤ fast ns"}, {"ns", "≤ 4.5 B"}, {"ns", "≤ 1 parsec"}, {"parsec", "≤ 1 ns"}, {"ns", "< 1 ns"}, {"ns", "≤ 1 ns or so"},
	} {
		if _, err := compare(1, x[0], x[1]); err == nil {
			t.Errorf("goal %q for a figure in %q was taken", x[1], x[0])
		}
	}
}

func TestFigureShowsNoExponent(t *testing.T) {
	for v, want := range map[float64]string{0: "0", 0.54321: "0.5432", 123.456: "123.5", 999.96: "1000", 12345.6: "12346", 2.5e6: "2500000"} {
		if got := figure(v); got != want {
			t.Errorf("%v: %q, want %q", v, got, want)
		}
	}
}
