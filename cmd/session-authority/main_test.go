package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"go.uber.org/goleak"

	"github.com/interlock-fabric/interlock/pkg/enforce"
	"github.com/interlock-fabric/interlock/pkg/natsfeed"
	"github.com/interlock-fabric/interlock/pkg/session"
)

func TestMain(m *testing.M) {
	testscript.Main(checked{m}, map[string]func(){
		"session-authority": main,
		"enforcer-host":     enforcerHost,
	})
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

// enforcerHost is a host of an enforcer, for the scripts: enforcer-host FILE
// [MODE [MAX-STALE]], until it is interrupted. It has one call running, for
// session s_run.
func enforcerHost() {
	if err := host(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "enforcer-host:", err)
		os.Exit(1)
	}
}

func host(args []string) error {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	args = append(args, "", "")
	e, err := session.LoadEnrollment(args[0])
	if err != nil {
		return err
	}
	o := &enforce.Options{Enrollment: e}
	if o.Mode, err = session.ParseMode(args[1]); err != nil {
		return err
	}
	if args[2] != "" {
		if o.MaxStale, err = time.ParseDuration(args[2]); err != nil {
			return err
		}
	}
	feed, err := natsfeed.Dial(e, nil)
	if err != nil {
		return err
	}
	enf, err := enforce.Open(ctx, feed, o)
	if err != nil {
		return err
	}
	p, err := enf.Prepare(session.Identity{Tenant: e.Tenants[0].Name(), Issuer: "https://login.example", Session: session.SessionRef{ID: "s_run"}})
	if err != nil {
		return err
	}
	_, release, err := enf.Bind(ctx, p, session.Call{Tool: "slow"})
	if err != nil {
		return err
	}
	<-ctx.Done()
	release()
	return enf.Close()
}

// The transcripts run the real program, with a real authority on a directory of
// their own and real enforcers.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata",
		Setup: func(e *testscript.Env) error {
			e.Setenv("INTERLOCK_DATA_DIR", e.WorkDir+"/d")
			e.Setenv("HOME", e.WorkDir)
			// Under the race detector every process otherwise stays for a second.
			e.Setenv("GORACE", "atexit_sleep_ms=50")
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"exits":    exits,
			"waitfor":  waitFor,
			"freeport": freePort,
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
		if !strings.HasPrefix(line, "session-authority: ") || strings.Count(line, "\n") != 1 || ts.ReadFile("stdout") != "" {
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
