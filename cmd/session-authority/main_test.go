package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/interlock-fabric/interlock/internal/clitest"
	"github.com/interlock-fabric/interlock/pkg/enforce"
	"github.com/interlock-fabric/interlock/pkg/natsfeed"
	"github.com/interlock-fabric/interlock/pkg/session"
)

func TestMain(m *testing.M) {
	clitest.Main(m, map[string]func(){
		"session-authority": main,
		"enforcer-host":     enforcerHost,
	})
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
	clitest.Run(t, func(e *testscript.Env) { e.Setenv("INTERLOCK_DATA_DIR", e.WorkDir+"/d") }, nil)
}
