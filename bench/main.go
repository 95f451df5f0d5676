// Command bench measures the enforcer's revocation state: one run prints a table
// and writes the raw figures as JSON. See README.md for what is measured and how.
package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
)

// result is one line of the table.
type result struct {
	Name  string  `json:"name"`
	N     int     `json:"entries"`
	Value float64 `json:"value"`
	Unit  string  `json:"unit"`
	Goal  string  `json:"goal,omitempty"`
}

// report is what is written: the machine, so that figures are not compared
// across two, and the results.
type report struct {
	When    time.Time `json:"when"`
	CPU     string    `json:"cpu"`
	Cores   int       `json:"cores"`
	Load    string    `json:"load_average"`
	Go      string    `json:"go"`
	Results []result  `json:"results"`
}

func (r *report) add(name string, n int, v float64, unit, goal string) {
	r.Results = append(r.Results, result{name, n, v, unit, goal})
	fmt.Fprintf(os.Stderr, "%10d  %-58s %12.5g %s\n", n, name, v, unit)
}

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run() error {
	sizes := flag.String("n", "1000000,10000000", "live entries, by commas")
	out := flag.String("json", "", "write the raw figures to this file")
	flag.Parse()
	rep := &report{When: time.Now().UTC(), CPU: cpu(), Cores: runtime.NumCPU(), Load: line("/proc/loadavg"), Go: runtime.Version()}
	for _, s := range strings.Split(*sizes, ",") {
		n, err := strconv.Atoi(s)
		if err != nil || n < 1000 {
			return fmt.Errorf("-n %q: want numbers of 1000 or more", s)
		}
		if err := measure(rep, n); err != nil {
			return err
		}
		filters(rep, n)
	}
	fmt.Printf("%s, %d cores, load %s, %s, %s\n\n", rep.CPU, rep.Cores, rep.Load, rep.Go, rep.When.Format(time.RFC3339))
	tw := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(tw, "entries\twhat\t\tgoal\t")
	for _, r := range rep.Results {
		fmt.Fprintf(tw, "%d\t%s\t%.4g %s\t%s\t\n", r.N, r.Name, r.Value, r.Unit, r.Goal)
	}
	if err := tw.Flush(); err != nil {
		return err
	}
	if *out == "" {
		return nil
	}
	b, err := json.MarshalIndent(rep, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(*out, append(b, '\n'), 0o600)
}

func line(path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return "unknown"
	}
	return strings.TrimSpace(string(b))
}

func cpu() string {
	f, err := os.Open("/proc/cpuinfo")
	if err != nil {
		return runtime.GOARCH
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	for s := bufio.NewScanner(f); s.Scan(); {
		if name, ok := strings.CutPrefix(s.Text(), "model name"); ok {
			return strings.TrimLeft(name, "\t: ")
		}
	}
	return runtime.GOARCH
}
