package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
)

// result is one line of the table.
type result struct {
	Scenario string  `json:"scenario"`
	Name     string  `json:"name"`
	N        int     `json:"entries"`
	Value    float64 `json:"value"`
	Unit     string  `json:"unit"`
	Goal     string  `json:"goal,omitempty"`
	// Reached says whether the goal was; absent where there is none.
	Reached *bool `json:"reached,omitempty"`
}

// part is one scenario at one size, and how much of the machine others used
// meanwhile.
type part struct {
	Scenario string  `json:"scenario"`
	N        int     `json:"entries"`
	Seconds  float64 `json:"seconds"`
	Others   float64 `json:"others_cpu_percent"`
}

// report is what is written: the machine, so that figures are not compared
// across two, and the results.
type report struct {
	machine
	Busy    string   `json:"busy,omitempty"`  // why the figures are not to be trusted
	Smoke   bool     `json:"smoke,omitempty"` // too small to judge by
	Parts   []part   `json:"parts"`
	Results []result `json:"results"`

	out      io.Writer
	began    time.Time
	scenario string
}

func newReport(progress io.Writer) *report {
	return &report{machine: thisMachine(), out: progress, began: time.Now()}
}

// add takes a figure. A goal is "≤ 450 ns", "≥ 1.8 ×": a bound in a unit of the
// same kind.
func (r *report) add(name string, n int, v float64, unit, goal string) {
	x := result{Scenario: r.scenario, Name: name, N: n, Value: v, Unit: unit, Goal: goal}
	if goal != "" {
		// In a smoke, too: a goal that cannot be compared is found there.
		if ok := reached(v, unit, goal); !r.Smoke {
			x.Reached = &ok
		}
	}
	r.Results = append(r.Results, x)
	say(r.out, "%7.1f s  %10d  %-64s %10.4g %-4s %s\n", time.Since(r.began).Seconds(), n, name, v, unit, x.verdict())
}

// begin starts a scenario; done ends it.
func (r *report) begin(scenario string, n int) (done func()) {
	r.scenario = scenario
	say(r.out, "%7.1f s  --- %s, %d entries\n", time.Since(r.began).Seconds(), scenario, n)
	at, before := time.Now(), cpuNow()
	return func() {
		p := part{Scenario: scenario, N: n, Seconds: time.Since(at).Seconds(), Others: before.others(cpuNow())}
		r.Parts = append(r.Parts, p)
		say(r.out, "%7.1f s  --- %s took %.1f s; others used %.1f %% of the machine\n", time.Since(r.began).Seconds(), scenario, p.Seconds, p.Others)
	}
}

func (r *report) end() { r.LoadAfter, r.Seconds = loadAverage(), time.Since(r.began).Seconds() }

func (x *result) verdict() string {
	switch {
	case x.Reached == nil:
		return ""
	case *x.Reached:
		return "reached"
	}
	return "NOT REACHED"
}

// print writes the table.
func (r *report) print(w io.Writer) {
	say(w, "%s, %d cores, %d MiB; %s, Linux %s; %s %s\n", r.CPU, r.Cores, r.MemoryMiB, r.Go, r.Kernel, r.Revision, r.When.Format(time.RFC3339))
	say(w, "load average before %s, after %s; %.0f s\n", r.Load, r.LoadAfter, r.Seconds)
	if r.Busy != "" {
		say(w, "THE MACHINE WAS BUSY: %s\n", r.Busy)
	}
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	scenario, goals, met := "", 0, 0
	for i := range r.Results {
		x := &r.Results[i]
		if x.Scenario != scenario {
			scenario = x.Scenario
			say(tw, "\n%s\tentries\t\tgoal\t\n", scenario)
		}
		if x.Reached != nil {
			goals++
			if *x.Reached {
				met++
			}
		}
		say(tw, "  %s\t%d\t%s %s\t%s\t%s\n", x.Name, x.N, figure(x.Value), x.Unit, x.Goal, x.verdict())
	}
	_ = tw.Flush() // to w
	if r.Smoke {
		say(w, "\na smoke: nothing was judged\n")
		return
	}
	say(w, "\n%d of %d goals reached\n", met, goals)
}

// write writes the JSON.
func (r *report) write(path string) error {
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(b, '\n'), 0o600)
}

// figure shows four digits and no exponent.
func figure(v float64) string {
	if v >= 1000 || v <= -1000 {
		return strconv.FormatFloat(v, 'f', 0, 64)
	}
	return strconv.FormatFloat(v, 'g', 4, 64)
}

// scale are the units that goals and figures come in; those of a kind compare.
var scale = map[string]struct {
	kind string
	per  float64
}{
	"ns": {"time", 1}, "µs": {"time", 1e3}, "ms": {"time", 1e6}, "s": {"time", 1e9},
	"B": {"bytes", 1}, "MiB": {"bytes", 1 << 20},
	"k/s": {"rate", 1e3}, "M/s": {"rate", 1e6},
	"×": {"ratio", 1}, "%": {"percent", 1}, "": {"number", 1},
}

// reached compares a figure with its goal.
func reached(v float64, unit, goal string) bool {
	ok, err := compare(v, unit, goal)
	if err != nil {
		panic(err) // a goal is a literal of this program, and the smoke compares them all
	}
	return ok
}

func compare(v float64, unit, goal string) (bool, error) {
	f := strings.Fields(goal)
	if len(f) == 2 {
		f = append(f, "")
	}
	if len(f) != 3 {
		return false, fmt.Errorf("goal %q: want a sign, a number and a unit", goal)
	}
	bound, err := strconv.ParseFloat(f[1], 64)
	have, ok := scale[unit]
	want, ok2 := scale[f[2]]
	if err != nil || !ok || !ok2 || have.kind != want.kind {
		return false, fmt.Errorf("goal %q does not fit a figure in %q", goal, unit)
	}
	v, bound = v*have.per, bound*want.per
	switch f[0] {
	case "≤":
		return v <= bound, nil
	case "≥":
		return v >= bound, nil
	}
	return false, fmt.Errorf("goal %q: want ≤ or ≥", goal)
}
