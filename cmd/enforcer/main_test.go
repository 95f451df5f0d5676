package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	testscript.Main(checked{m}, map[string]func(){"enforcer": main, "fabric": fabric, "revoke": revoke, "fetch": fetch})
}

// checked is the tests, which must leave no goroutine behind.
type checked struct{ m *testing.M }

func (c checked) Run() int {
	code := c.m.Run()
	if err := goleak.Find(); err != nil && code == 0 {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return code
}

// The transcripts run the real program.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata",
		Setup: func(e *testscript.Env) error {
			e.Setenv("HOME", e.WorkDir)
			// Under the race detector every process otherwise stays for a second.
			e.Setenv("GORACE", "atexit_sleep_ms=50")
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"exits":    exits,
			"waitfor":  waitFor,
			"freeport": freePort,
			"signal":   signalEnforcer,
		},
	})
}

// exits CODE COMMAND... demands an exit code, and of a refusal that it is one
// line.
func exits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits CODE COMMAND ARGS...")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	got := 0
	if err := ts.Exec(args[1], args[2:]...); err != nil {
		var e *exec.ExitError
		if !errors.As(err, &e) {
			ts.Fatalf("%v", err)
		}
		got = e.ExitCode()
	}
	if got != want {
		ts.Fatalf("exit code %d, want %d", got, want)
	}
	if want == exitUsage || want == exitUnreachable {
		line := ts.ReadFile("stderr")
		if !strings.HasPrefix(line, "enforcer: ") || strings.Count(line, "\n") != 1 || ts.ReadFile("stdout") != "" {
			ts.Fatalf("a refusal is one line on stderr, and nothing on stdout")
		}
	}
}

// waitFor REGEXP COMMAND... runs the command until it prints what is wanted.
func waitFor(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: waitfor REGEXP COMMAND ARGS...")
	}
	want, err := regexp.Compile("(?m)" + args[0])
	ts.Check(err)
	deadline := time.Now().Add(30 * time.Second)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		// How it exits is not of interest: it may not be up yet.
		_ = ts.Exec(args[1], args[2:]...)
		if want.MatchString(ts.ReadFile("stdout")) {
			return
		}
		if time.Now().After(deadline) {
			ts.Fatalf("did not print %s in time", args[0])
		}
		<-tick.C
	}
}

// signalEnforcer NAME sends a signal to the enforcer that runs.
func signalEnforcer(ts *testscript.TestScript, _ bool, args []string) {
	sig := map[string]os.Signal{"HUP": syscall.SIGHUP, "TERM": syscall.SIGTERM}[args[0]]
	for _, c := range ts.BackgroundCmds() {
		if filepath.Base(c.Args[0]) == "enforcer" {
			ts.Check(c.Process.Signal(sig))
			return
		}
	}
	ts.Fatalf("no enforcer runs")
}

// freePort NAME sets an environment variable to an address that nothing listens
// on.
func freePort(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: freeport NAME")
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	ts.Check(err)
	ts.Setenv(args[0], l.Addr().String())
	ts.Check(l.Close())
}

func TestEveryCommandHelpsItself(t *testing.T) {
	var out strings.Builder
	for _, name := range []string{"proxy", "authz", "config", "check", "status", "version", "completion"} {
		out.Reset()
		if code := run([]string{name, "--help"}, strings.NewReader(""), &out, &out); code != exitOK || !strings.Contains(out.String(), "Usage:") {
			t.Errorf("%s --help: exit code %d\n%s", name, code, out.String())
		}
	}
}

// What others wrote must not take over the terminal.
func TestForeignTextIsOneLine(t *testing.T) {
	if s := oneLine("a\nb\x1b[2J\u2028c"); strings.ContainsAny(s, "\n\x1b\u2028") {
		t.Errorf("%q", s)
	}
}
