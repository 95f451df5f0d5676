// Package clitest runs the transcripts of the programs in cmd/: the real program,
// as a process of its own.
package clitest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"github.com/spf13/cobra"
	"go.uber.org/goleak"

	"github.com/interlock-fabric/interlock/internal/cli"
)

// Main is what a TestMain does: it runs the tests, which must leave no goroutine
// behind. The programs are those that transcripts can run, by name. It does not
// return.
func Main(m *testing.M, programs map[string]func()) {
	testscript.Main(checked{m}, programs)
}

type checked struct{ m *testing.M }

func (c checked) Run() int {
	code := c.m.Run()
	if err := goleak.Find(); err != nil && code == 0 {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return code
}

// Command is what a transcript can do.
type Command = func(ts *testscript.TestScript, neg bool, args []string)

// Run runs the transcripts in testdata, with commands more than the three that all
// have. If setup is not nil, it may change the environment of each:
//
//	exits CODE PROGRAM ARGS...     demands an exit code, and of a refusal that it is one line
//	waitfor REGEXP PROGRAM ARGS... runs a program until it prints what is wanted
//	freeport NAME                  sets a variable to an address that nothing listens on
func Run(t *testing.T, setup func(*testscript.Env), commands map[string]Command) {
	all := map[string]Command{"exits": exits, "waitfor": waitFor, "freeport": freePort}
	maps.Copy(all, commands)
	testscript.Run(t, testscript.Params{
		Dir: "testdata",
		Setup: func(e *testscript.Env) error {
			e.Setenv("HOME", e.WorkDir)
			// Under the race detector every process otherwise stays for a second.
			e.Setenv("GORACE", "atexit_sleep_ms=50")
			if setup != nil {
				setup(e)
			}
			return nil
		},
		Cmds: all,
	})
}

func exits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits CODE PROGRAM ARGS...")
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
	if want == cli.ExitUsage || want == cli.ExitUnreachable {
		line := ts.ReadFile("stderr")
		if !strings.HasPrefix(line, args[1]+": ") || strings.Count(line, "\n") != 1 || ts.ReadFile("stdout") != "" {
			ts.Fatalf("a refusal is one line on stderr, and nothing on stdout")
		}
	}
}

func waitFor(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: waitfor REGEXP PROGRAM ARGS...")
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

func freePort(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: freeport NAME")
	}
	l, err := new(net.ListenConfig).Listen(context.Background(), "tcp", "127.0.0.1:0")
	ts.Check(err)
	ts.Setenv(args[0], l.Addr().String())
	ts.Check(l.Close())
}

// Help demands of every command of root, however deep, that run prints how it is
// used.
func Help(t *testing.T, root *cobra.Command, run func(args []string, stdin io.Reader, stdout, stderr io.Writer) int) {
	t.Helper()
	root.InitDefaultCompletionCmd()
	for _, c := range root.Commands() {
		help(t, c, nil, run)
	}
}

func help(t *testing.T, c *cobra.Command, above []string, run func([]string, io.Reader, io.Writer, io.Writer) int) {
	t.Helper()
	path := append(slices.Clone(above), c.Name())
	if c.Runnable() || c.HasSubCommands() { // what is neither is a topic
		var out strings.Builder
		if code := run(append(path, "--help"), strings.NewReader(""), &out, &out); code != cli.ExitOK || !strings.Contains(out.String(), "Usage:") {
			t.Errorf("%s --help: exit code %d\n%s", strings.Join(path, " "), code, out.String())
		}
	}
	for _, below := range c.Commands() {
		help(t, below, path, run)
	}
}
