package main

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/interlock-fabric/interlock/internal/cli"
	"github.com/interlock-fabric/interlock/internal/clitest"
)

func TestMain(m *testing.M) {
	clitest.Main(m, map[string]func(){"enforcer": main, "fabric": fabric, "revoke": revoke, "fetch": fetch})
}

// The transcripts run the real program.
func TestScripts(t *testing.T) {
	clitest.Run(t, nil, map[string]clitest.Command{"signal": signalEnforcer})
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

func TestEveryCommandHelpsItself(t *testing.T) {
	var out strings.Builder
	for _, name := range []string{"proxy", "authz", "config", "check", "status", "version", "completion"} {
		out.Reset()
		if code := run([]string{name, "--help"}, strings.NewReader(""), &out, &out); code != cli.ExitOK || !strings.Contains(out.String(), "Usage:") {
			t.Errorf("%s --help: exit code %d\n%s", name, code, out.String())
		}
	}
}
