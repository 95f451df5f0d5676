package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// sampleReport is of a run that never was.
func sampleReport() *report {
	r := newReport(&bytes.Buffer{})
	done := r.begin("check", 1000)
	r.add("p50", 1000, 300, "ns", "≤ 450 ns")
	r.add("p99.9", 1000, 7000, "ns", "≤ 5 µs")
	r.add("control", 1000, 12, "ns", "")
	done()
	r.end()
	return r
}

func TestTableHasAVerdictForEachGoal(t *testing.T) {
	var out bytes.Buffer
	r := sampleReport()
	r.Busy = "others use 60 % of it"
	r.print(&out)
	for _, want := range []string{
		`(?m)^  p50 +1000 +300 ns +≤ 450 ns +reached`, `  p99.9 +1000 +7000 ns +≤ 5 µs +NOT REACHED`, `  control +1000 +12 ns`,
		`1 of 2 goals reached`, `THE MACHINE WAS BUSY: others use 60 % of it`, `cores`, `load average before \S+`,
	} {
		if !matches(t, want, out.String()) {
			t.Errorf("no %s in\n%s", want, out.String())
		}
	}
}

func TestSmokeIsNotJudged(t *testing.T) {
	r := newReport(&bytes.Buffer{})
	r.Smoke = true
	r.add("p50", 1000, 300, "ns", "≤ 450 ns")
	var out bytes.Buffer
	r.print(&out)
	if r.Results[0].Reached != nil || !strings.Contains(out.String(), "nothing was judged") || strings.Contains(out.String(), "reached") {
		t.Errorf("a smoke has a verdict:\n%s", out.String())
	}
}

func TestJSONHasTheMachineAndTheVerdicts(t *testing.T) {
	path := filepath.Join(t.TempDir(), "r.json")
	if err := sampleReport().write(path); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var got map[string]any
	if err := json.Unmarshal(b, &got); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"when", "revision", "cpu", "cores", "memory_mib", "kernel", "go", "load_before", "load_after", "parts"} {
		if v, ok := got[name]; !ok || v == "" || v == "unknown" {
			t.Errorf("%s: %v", name, v)
		}
	}
	var verdicts []any
	for _, x := range got["results"].([]any) {
		verdicts = append(verdicts, x.(map[string]any)["reached"])
	}
	if len(verdicts) != 3 || verdicts[0] != true || verdicts[1] != false || verdicts[2] != nil {
		t.Errorf("verdicts: %v", verdicts)
	}
}

func TestFlags(t *testing.T) {
	for _, x := range []struct {
		args []string
		code int
		say  string // on either
	}{
		{[]string{"-h"}, 0, "Exit codes"},
		{[]string{"-list"}, 0, "storm"},
		{[]string{"-list", "-run", "check, start"}, 0, "cold and warm"},
		{[]string{"-run", "nothing"}, exitUsage, `no scenario "nothing"`},
		{[]string{"-n", "ten"}, exitUsage, "want numbers"},
		{[]string{"-n", "10"}, exitUsage, "1000 or more"},
		{[]string{"check"}, exitUsage, "named with -run"},
		{[]string{"-nonsense"}, exitUsage, "not defined"},
	} {
		var out bytes.Buffer
		if code := run(x.args, &out, &out); code != x.code || !strings.Contains(out.String(), x.say) {
			t.Errorf("%v: code %d, want %d and %q in:\n%s", x.args, code, x.code, x.say, out.String())
		}
	}
}

func TestWhatOthersUseIsWhatThisProcessDoesNot(t *testing.T) {
	before := cpuTimes{all: 100, idle: 40, own: 10}
	if got := before.others(cpuTimes{all: 110, idle: 44, own: 13}); got != 30 {
		t.Errorf("of 10 s, 4 idle and 3 its own: %v %%, want 30", got)
	}
	if got := before.others(before); got != 0 {
		t.Errorf("of no time: %v %%", got)
	}
	// Its own work is counted.
	before = cpuNow()
	for end := time.Now().Add(20 * time.Second); cpuNow().own < before.own+0.05; {
		if time.Now().After(end) {
			t.Fatalf("20 s of work: %+v, then %+v", before, cpuNow())
		}
		for range 10_000 {
			spin(1)
		}
	}
	if after := cpuNow(); after.all < before.all+0.04 {
		t.Errorf("the machine did less than this process: %+v, then %+v", before, after)
	}
}

func matches(t *testing.T, pattern, s string) bool {
	t.Helper()
	ok, err := regexp.MatchString(pattern, s)
	if err != nil {
		t.Fatal(err)
	}
	return ok
}
