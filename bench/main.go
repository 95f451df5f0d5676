// Command bench measures the enforcer's state, the enforcer itself and the way of
// a decision to it: one run prints a table with a verdict for each goal, and
// writes the raw figures as JSON. See README.md for what is measured and how.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"runtime/pprof"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"
)

// Exit codes. A goal that is missed is a result, not a failure.
const (
	exitFailed = 1 // a measurement could not be made, or what it measured was wrong
	exitUsage  = 2
	exitBusy   = 3 // others use the machine
)

// scenario is one set of measurements, made for each size.
type scenario struct {
	name, about string
	once        bool // at the smallest size alone
	run         func(b *bench, n int) error
}

// scenarios in the order in which they run.
func scenarios() []scenario {
	return []scenario{
		{name: "state", about: "the state alone (pkg/filter): lookup, apply, merge, seal, memory",
			run: func(b *bench, n int) error { return measure(b.report, n) }},
		{name: "filters", about: "the filter against others on the same keys",
			run: func(b *bench, n int) error { filters(b.report, n); return nil }},
		{name: "check", about: "Enforcer.Check, idle, under 50,000 entries/s, during a merge", run: check},
		{name: "memory", about: "an open enforcer's heap, and the peak while it is sealed", run: memory},
		{name: "token", about: "requests with a cached token against verifying its signature", once: true, run: token},
		{name: "start", about: "cold and warm start over a real bus in another process", run: start},
		{name: "revoke", about: "one decision at the authority's API to cut and denied on 1 and on 100 enforcers", once: true, run: revoke},
		{name: "storm", about: "entries decided at the authority's API to in force on 10 enforcers", once: true, run: storm},
	}
}

// bench is one run.
type bench struct {
	ctx    context.Context
	dir    string // scratch
	shared string // the same for all scenarios
	quick  bool   // small sizes, for a smoke
	report *report
	// profiles, if not empty, is the directory for CPU profiles.
	profiles string
}

// pick returns quick in a quick run, else full.
func pick[T any](b *bench, full, quick T) T {
	if b.quick {
		return quick
	}
	return full
}

func main() {
	if len(os.Args) > 1 && os.Args[1] == nodeCommand {
		os.Exit(nodeMain(os.Args[2:]))
	}
	os.Exit(run(os.Args[1:], os.Stdout, os.Stderr))
}

type options struct {
	run, sizes, json, profiles string
	list, quick, busy          bool
	wait                       time.Duration
}

func run(args []string, stdout, stderr io.Writer) int {
	var o options
	fs := flag.NewFlagSet("bench", flag.ContinueOnError)
	fs.SetOutput(stderr)
	fs.StringVar(&o.run, "run", "", "`names` of the scenarios to run, by commas; all without")
	fs.StringVar(&o.sizes, "n", "1000000,10000000", "live `entries`, by commas; token and storm take the smallest alone, revoke none")
	fs.StringVar(&o.json, "json", "", "write the raw figures to this `file`")
	fs.StringVar(&o.profiles, "profile", "", "write a CPU profile of each scenario into this `directory`")
	fs.BoolVar(&o.list, "list", false, "list the scenarios")
	fs.BoolVar(&o.quick, "quick", false, "a smoke: small, in less than a minute; its figures mean little")
	fs.BoolVar(&o.busy, "busy", false, "measure even if others use the machine")
	fs.DurationVar(&o.wait, "wait", 2*time.Minute, "how `long` to wait for the machine to be quiet")
	fs.Usage = func() {
		say(stderr, "bench [flags]: print a table of what was measured and which goals were reached, progress on stderr.\n\n")
		fs.PrintDefaults()
		say(stderr, "\nExit codes: 0 measured, whether goals were reached or not; %d a measurement failed; %d usage; %d the machine is busy.\n", exitFailed, exitUsage, exitBusy)
	}
	switch err := fs.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		return 0
	case err != nil:
		return exitUsage
	}
	chosen, sizes, err := o.choose(fs.Args())
	if err != nil {
		say(stderr, "bench: %v\n", err)
		return exitUsage
	}
	if o.list {
		tw := tabwriter.NewWriter(stdout, 0, 0, 2, ' ', 0)
		for _, s := range chosen {
			say(tw, "%s\t%s\n", s.name, s.about)
		}
		_ = tw.Flush() // to stdout
		return 0
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	rep := newReport(stderr)
	rep.Smoke = o.quick
	if !o.quick {
		if rep.Busy = awaitQuiet(ctx, o.wait, o.busy, stderr); rep.Busy != "" {
			say(stderr, "\nbench: THE MACHINE IS BUSY: %s. What is measured now measures the neighbours.\n\n", rep.Busy)
			if !o.busy {
				say(stderr, "bench: wait until it is quiet, or give -busy to measure all the same.\n")
				return exitBusy
			}
		}
	}
	err = o.measure(ctx, rep, chosen, sizes)
	rep.end()
	rep.print(stdout)
	if o.json != "" {
		err = errors.Join(err, rep.write(o.json))
	}
	if err != nil {
		say(stderr, "bench: %v\n", err)
		return exitFailed
	}
	return 0
}

// choose resolves the flags.
func (o *options) choose(rest []string) (chosen []scenario, sizes []int, err error) {
	if len(rest) > 0 {
		return nil, nil, fmt.Errorf("%q: scenarios are named with -run", rest[0])
	}
	if o.quick {
		o.sizes = "20000"
	}
	for s := range strings.SplitSeq(o.sizes, ",") {
		n, err := strconv.Atoi(strings.TrimSpace(s))
		if err != nil || n < 1000 {
			return nil, nil, fmt.Errorf("-n %q: want numbers of 1000 or more", s)
		}
		sizes = append(sizes, n)
	}
	all := scenarios()
	if o.run == "" {
		return all, sizes, nil
	}
	for name := range strings.SplitSeq(o.run, ",") {
		i := slices.IndexFunc(all, func(s scenario) bool { return s.name == strings.TrimSpace(name) })
		if i < 0 {
			return nil, nil, fmt.Errorf("no scenario %q: -list lists them", name)
		}
		chosen = append(chosen, all[i])
	}
	return chosen, sizes, nil
}

// measure runs the scenarios.
func (o *options) measure(ctx context.Context, rep *report, chosen []scenario, sizes []int) (err error) {
	dir, err := os.MkdirTemp("", "interlock-bench-*")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	for _, s := range chosen {
		for _, n := range sizes {
			if s.once && n != slices.Min(sizes) {
				continue
			}
			if err := o.one(ctx, rep, dir, s, n); err != nil {
				return fmt.Errorf("%s, %d entries: %w", s.name, n, err)
			}
		}
	}
	return nil
}

func (o *options) one(ctx context.Context, rep *report, dir string, s scenario, n int) (err error) {
	b := &bench{ctx: ctx, shared: dir, quick: o.quick, report: rep}
	if b.dir, err = os.MkdirTemp(dir, s.name+"-*"); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(b.dir)) }()
	if o.profiles != "" {
		if err := os.MkdirAll(o.profiles, 0o700); err != nil {
			return err
		}
		b.profiles = filepath.Join(o.profiles, fmt.Sprintf("%s-%d", s.name, n))
		stop, err := profile(b.profiles + ".pprof")
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, stop()) }()
	}
	// No scenario pays for what the one before has left.
	runtime.GC()
	debug.FreeOSMemory()
	done := rep.begin(s.name, n)
	defer done()
	if err := s.run(b, n); err != nil {
		return err
	}
	return ctx.Err()
}

// profile writes a CPU profile until stop is called.
func profile(path string) (stop func() error, err error) {
	f, err := os.Create(path)
	if err != nil {
		return nil, err
	}
	if err := pprof.StartCPUProfile(f); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return func() error { pprof.StopCPUProfile(); return f.Close() }, nil
}

// say writes to a terminal or a tabwriter, whose failure nobody could be told of.
func say(w io.Writer, format string, a ...any) { _, _ = fmt.Fprintf(w, format, a...) }
