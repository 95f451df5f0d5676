package main

import (
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

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

func TestEveryCommandHelpsItself(t *testing.T) { clitest.Help(t, newRoot(), run) }
