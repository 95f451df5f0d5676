package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/spf13/cobra"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var errForeign = errors.New("foreign")

// program is one with a command for each way to end.
func program() *cobra.Command {
	asJSON := true
	root := NewRoot("prog", "Do it", "It does it.", "Exit codes: many")
	ends := func(use string, args cobra.PositionalArgs, err error) *cobra.Command {
		return &cobra.Command{Use: use, Short: use, Args: args, RunE: func(*cobra.Command, []string) error { return err }}
	}
	group := &cobra.Command{Use: "group", Short: "group", RunE: Subcommands}
	group.AddCommand(ends("deep", NoArgs, fmt.Errorf("deep: %w", errForeign)))
	AddGroup(root, "Run", group,
		ends("well", NoArgs, nil),
		ends("one", OneArg("a thing"), nil),
		ends("told", NoArgs, Exit(7, nil)),
		ends("coded", NoArgs, fmt.Errorf("late: %w", Exit(8, errForeign))),
		ends("usage", NoArgs, Usagef("not like that: %w", errForeign)),
		ends("hostile", NoArgs, errors.New("a\nb\x1b[2J\u2028  c")),
		NewVersionCommand(&asJSON))
	return root
}

func TestRun(t *testing.T) {
	tests := []struct {
		args, stderr string
		code         int
	}{
		{"well", "", ExitOK},
		{"one thing", "", ExitOK},
		{"told", "", 7},
		{"coded", "prog: late: foreign\n", 8},
		{"usage", "prog: not like that: foreign\n", ExitUsage},
		{"hostile", "prog: a b [2J c\n", 9},
		{"group deep", "prog: deep: foreign\n", 9},
		{"group", "", ExitOK},
		{"group nope", "prog: unknown command \"nope\": see prog group --help\n", ExitUsage},
		{"nope", "prog: unknown command \"nope\" for \"prog\": see prog --help\n", ExitUsage},
		{"well --nope", "prog: unknown flag: --nope: see prog well --help\n", ExitUsage},
		{"well now", "prog: well takes no argument, but got \"now\": see prog well --help\n", ExitUsage},
		{"one", "prog: one takes one argument, a thing: see prog one --help\n", ExitUsage},
	}
	for _, tt := range tests {
		t.Run(tt.args, func(t *testing.T) {
			var stderr strings.Builder
			code := Run(program(), strings.Fields(tt.args), strings.NewReader(""), io.Discard, &stderr,
				func(_ context.Context, err error) error { return Exit(9, err) })
			if code != tt.code || stderr.String() != tt.stderr {
				t.Errorf("exit code %d, %q", code, stderr.String())
			}
		})
	}
}

func TestOutput(t *testing.T) {
	tests := []struct {
		args string
		want []string
	}{
		{"--help", []string{"It does it.\n\nExit codes: many", "\nRun:\n", "  told"}},
		{"help exit-codes", []string{"Exit codes: many"}},
		{"version", []string{"{\n  \"version\": \"" + Version() + "\"\n}\n"}},
	}
	for _, tt := range tests {
		var out strings.Builder
		if code := Run(program(), strings.Fields(tt.args), nil, &out, io.Discard, nil); code != ExitOK {
			t.Errorf("%s: exit code %d", tt.args, code)
		}
		for _, want := range tt.want {
			if !strings.Contains(out.String(), want) {
				t.Errorf("%s has no %q:\n%s", tt.args, want, out.String())
			}
		}
	}
}

func TestASignalEndsTheContext(t *testing.T) {
	root := NewRoot("prog", "Do it", "It does it.", "")
	root.AddCommand(&cobra.Command{Use: "serve", RunE: func(cmd *cobra.Command, _ []string) error {
		if err := syscall.Kill(syscall.Getpid(), syscall.SIGTERM); err != nil {
			return err
		}
		<-cmd.Context().Done()
		return cmd.Context().Err()
	}})
	code := Run(root, []string{"serve"}, nil, io.Discard, io.Discard, func(ctx context.Context, err error) error {
		if ctx.Err() == nil {
			t.Error("classify is not told that the command was interrupted")
		}
		return Exit(9, err)
	})
	if code != 9 {
		t.Errorf("exit code %d", code)
	}
}

func TestLogger(t *testing.T) {
	for _, format := range []string{"text", "json"} {
		var b bytes.Buffer
		log, err := Logger(&b, "warn", format)
		if err != nil {
			t.Fatal(err)
		}
		log.Info("quiet")
		log.Warn("loud", "n", 1)
		if s := b.String(); strings.Contains(s, "quiet") || !strings.Contains(s, "loud") || strings.HasPrefix(s, "{") != (format == "json") {
			t.Errorf("%s: %s", format, s)
		}
	}
	for _, bad := range [][2]string{{"loud", "text"}, {"", "text"}, {"info", ""}, {"info", "xml"}} {
		var e *exitError
		if _, err := Logger(io.Discard, bad[0], bad[1]); !errors.As(err, &e) || e.code != ExitUsage {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

func TestReadToken(t *testing.T) {
	path := filepath.Join(t.TempDir(), "t")
	for in, want := range map[string]string{
		"a.b.c\n": "a.b.c", "  Bearer a.b.c\r\n": "a.b.c", strings.Repeat("x", MaxToken): strings.Repeat("x", MaxToken),
		"": "", "\n": "", "secret\nsecret": "", "secret\x00": "", strings.Repeat("secret", MaxToken/6+1): "",
	} {
		if err := os.WriteFile(path, []byte(in), 0o600); err != nil {
			t.Fatal(err)
		}
		for _, from := range []string{path, "-"} {
			got, err := ReadToken(strings.NewReader(in), from)
			if got != want || (err == nil) != (want != "") {
				t.Errorf("%.20q: %.20q, %v", in, got, err)
			}
			var e *exitError
			if err != nil && (!errors.As(err, &e) || e.code != ExitUsage || strings.Contains(err.Error(), "secret")) {
				t.Errorf("%.20q: %v", in, err)
			}
		}
	}
	if _, err := ReadToken(nil, path+"x"); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
}

func TestPrintLines(t *testing.T) {
	var b strings.Builder
	if err := PrintLines(&b, []map[string]string{{"a": "<1>"}, {"a": "2"}}); err != nil || b.String() != "{\"a\":\"<1>\"}\n{\"a\":\"2\"}\n" {
		t.Errorf("%q, %v", b.String(), err)
	}
}

// What others wrote must not take over the terminal.
func TestForeignTextIsOneLine(t *testing.T) {
	if s := OneLine("a\nb\x1b[2J\u2028c\u0085"); strings.ContainsAny(s, "\n\x1b\u2028\u0085") {
		t.Errorf("%q", s)
	}
}
