package enforceprom_test

import (
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"github.com/interlock-fabric/interlock/pkg/enforce"
	"github.com/interlock-fabric/interlock/pkg/enforce/enforceprom"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type fixed enforce.Status

func (f fixed) Status() enforce.Status { return enforce.Status(f) }

var _ enforceprom.Source = (*enforce.Enforcer)(nil)

// gather returns every series as name{labels} = value.
func gather(t *testing.T, collectors ...prometheus.Collector) map[string]float64 {
	t.Helper()
	r := prometheus.NewPedanticRegistry()
	for _, c := range collectors {
		if err := r.Register(c); err != nil {
			t.Fatal(err)
		}
	}
	families, err := r.Gather()
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]float64{}
	for _, f := range families {
		if !strings.HasPrefix(f.GetName(), "interlock_") || f.GetHelp() == "" {
			t.Errorf("metric %s: %q", f.GetName(), f.GetHelp())
		}
		for _, m := range f.GetMetric() {
			if n := len(m.GetLabel()); n != 1 || m.GetLabel()[0].GetName() != "enforcer" {
				t.Errorf("metric %s has the labels %v", f.GetName(), m.GetLabel())
			}
			v := m.GetGauge().GetValue()
			if m.GetCounter() != nil {
				if v = m.GetCounter().GetValue(); !strings.HasSuffix(f.GetName(), "_total") {
					t.Errorf("counter %s", f.GetName())
				}
			}
			out[f.GetName()+"{"+m.GetLabel()[0].GetValue()+"}"] = v
		}
	}
	return out
}

// TestEveryNumberIsShown gives each number of the status a value of its own and
// looks for it, so that a field that is added is not forgotten.
func TestEveryNumberIsShown(t *testing.T) {
	s := enforce.Status{Enforcer: "e1", Mode: "strict", Ready: true, Fresh: true}
	want := map[float64]string{}
	s.Agents = &enforce.AgentsStatus{}
	fill := func(v reflect.Value, n int) {
		for i := range v.NumField() {
			f, name := v.Field(i), v.Type().Field(i).Name
			n := n + i
			switch {
			case f.Type() == reflect.TypeFor[time.Duration]():
				f.SetInt(int64(time.Duration(n) * time.Second))
			case f.CanUint():
				f.SetUint(uint64(n))
			case f.CanInt():
				f.SetInt(int64(n))
			default:
				continue
			}
			want[float64(n)] = name
		}
	}
	fill(reflect.ValueOf(&s).Elem(), 1000)
	fill(reflect.ValueOf(s.Agents).Elem(), 2000)
	got := gather(t, enforceprom.New(fixed(s)))
	for _, v := range got {
		delete(want, v)
	}
	for _, name := range want {
		t.Errorf("%s is not shown", name)
	}
	if got["interlock_fail_open{e1}"] != 0 || got["interlock_ready{e1}"] != 1 || got["interlock_fresh{e1}"] != 1 {
		t.Errorf("flags of a healthy enforcer: %v", got)
	}
}

// TestExposureIsShown: failing open can be told from health, and two enforcers of
// one process from each other.
func TestExposureIsShown(t *testing.T) {
	got := gather(t,
		enforceprom.New(fixed{Enforcer: "e1", Mode: "best-effort", Ready: true}),
		enforceprom.New(fixed{Enforcer: "e2", Mode: "strict"}))
	if got["interlock_fail_open{e1}"] != 1 || got["interlock_fail_open{e2}"] != 0 || got["interlock_fresh{e1}"] != 0 {
		t.Errorf("%v", got)
	}
	// An enforcer that was never opened is not healthy either.
	if got := gather(t, enforceprom.New((*enforce.Enforcer)(nil))); got["interlock_fresh{}"] != 0 || got["interlock_ready{}"] != 0 {
		t.Errorf("%v", got)
	}
}
