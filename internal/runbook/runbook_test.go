// Package runbook holds the test that runs the runbooks in docs/runbooks: each
// command in them, in order, in a shell, against the real programs.
package runbook

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"go.uber.org/goleak"
)

const runbooks = "../../docs/runbooks"

func TestMain(m *testing.M) {
	switch name := filepath.Base(os.Args[0]); name {
	case "systemctl", "world": // for the shell: see fabric.serve
		os.Exit(ask(name, os.Args[1:]))
	}
	goleak.VerifyTestMain(m)
}

// TestRunbooks runs every page on a fabric of its own. It fails when a command
// does not do what the page says, prints something else, or would not be run.
func TestRunbooks(t *testing.T) {
	paths, err := filepath.Glob(filepath.Join(runbooks, "*.md"))
	must(t, err)
	pages, texts, run := map[string]*page{}, map[string]string{}, ""
	for _, path := range paths {
		text, err := os.ReadFile(path)
		must(t, err)
		name := filepath.Base(path)
		p, err := parse(string(text))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		pages[name], texts[name] = p, string(text)
		for _, s := range p.steps {
			if !s.world {
				run += s.script + "\n"
			}
		}
	}
	for name, text := range texts {
		for _, c := range commands(text) {
			if !strings.Contains(run, c) {
				t.Errorf("%s: `%s` is in no block that is run", name, c)
			}
		}
	}
	for _, name := range []string{"incident.md", "drill.md", "lost-key.md", "key-rotation.md", "offline-kill.md", "restore.md", "two-commanders.md", "upgrade.md"} {
		if pages[name] == nil {
			t.Errorf("there is no runbook %s", name)
		}
	}
	if t.Failed() {
		return
	}
	bin := build(t)
	for name, p := range pages {
		if !slices.ContainsFunc(p.steps, func(s *step) bool { return !s.world }) {
			continue
		}
		t.Run(strings.TrimSuffix(name, ".md"), func(t *testing.T) {
			t.Parallel()
			f := newFabric(t, bin, p)
			for _, s := range p.steps {
				code, got := f.shell(s)
				t.Logf("%s:%d\n%s\n%s", name, s.line, s.script, got)
				switch {
				case code != s.exit:
					t.Fatalf("%s:%d: exit code %d, want %d", name, s.line, code, s.exit)
				case !s.world && !matches(s.want, got):
					t.Fatalf("%s:%d: what it prints is not what stands in line %d:\n%s", name, s.line, s.line2, s.want)
				}
			}
		})
	}
}

// build builds the programs.
func build(t *testing.T) (dir string) {
	t.Helper()
	// go test answers from its cache if nothing has changed that the test looked
	// at; it does not see what go build reads.
	must(t, filepath.WalkDir("../..", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() && (d.Name() == "node_modules" || d.Name() == ".git") {
			return cmp.Or(err, fs.SkipDir)
		}
		if filepath.Ext(path) == ".go" {
			_, err = os.Stat(path)
		}
		return err
	}))
	dir = t.TempDir()
	// Without symbols: half as much to write, and to read at each start.
	cmd := exec.CommandContext(t.Context(), "go", "build", "-ldflags=-s -w", "-o", dir+"/", "./cmd/session-authority", "./cmd/enforcer")
	cmd.Dir = "../.."
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	self, err := os.Executable()
	must(t, err)
	for _, name := range []string{"systemctl", "world"} {
		must(t, os.Symlink(self, filepath.Join(dir, name)))
	}
	return dir
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// shell runs a step as the reader would in the shell of that host, where the
// variables of earlier steps are still set, and returns its exit code and all
// that it printed.
func (f *fabric) shell(s *step) (int, string) {
	f.t.Helper()
	ctx, cancel := context.WithTimeout(f.t.Context(), stepTimeout)
	defer cancel()
	var script bytes.Buffer
	state := f.path("shell-" + s.host)
	fmt.Fprintf(&script, "set -eu; [ ! -f %[1]s ] || . %[1]s\n", state)
	for _, kv := range f.hostEnv(s.host) {
		name, value, _ := strings.Cut(kv, "=")
		fmt.Fprintf(&script, "export %s='%s'\n", name, value)
	}
	fmt.Fprintf(&script, "set -a; trap 'export -p > %s' EXIT\n%s", state, s.script)
	var out limited
	cmd := exec.CommandContext(ctx, "sh", "-c", script.String())
	cmd.Env, cmd.Dir, cmd.Stdout, cmd.Stderr = f.env, f.path("home"), &out, &out
	group(cmd)
	if err := cmd.Run(); err != nil && cmd.ProcessState == nil {
		f.t.Fatal(err)
	}
	if ctx.Err() != nil {
		f.t.Fatalf("line %d: not done after %s\n%s\n--- printed\n%s", s.line, stepTimeout, s.script, out.Bytes())
	}
	return cmd.ProcessState.ExitCode(), out.String()
}

// limited keeps the first MiB.
type limited struct{ bytes.Buffer }

func (l *limited) Write(b []byte) (int, error) {
	if left := 1<<20 - l.Len(); left > 0 {
		l.Buffer.Write(b[:min(left, len(b))])
	}
	return len(b), nil
}
