// Package cli is the frame of the programs in cmd/: how they read a command line,
// stop on a signal, say what failed, and exit.
package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"runtime/debug"
	"strings"
	"syscall"

	"github.com/rs/zerolog"
	"github.com/spf13/cobra"
)

// The exit codes that mean the same in every program; the others are its own. All
// are stable.
const (
	ExitOK          = 0
	ExitUsage       = 2 // the command line or a value in it is not valid
	ExitUnreachable = 4 // what the program speaks to
)

// exitError is an error with the exit code that it leads to. One without an
// error has been told already.
type exitError struct {
	code int
	err  error
}

func (e *exitError) Error() string {
	if e.err == nil {
		return ""
	}
	return e.err.Error()
}

func (e *exitError) Unwrap() error { return e.err }

// Exit returns err with the code that the program is to exit with. A nil err is
// one that has been told already: the program exits without a word.
func Exit(code int, err error) error { return &exitError{code, err} }

// Usagef returns an error about the command line, which exits with [ExitUsage].
// It formats like [fmt.Errorf].
func Usagef(format string, a ...any) error { return Exit(ExitUsage, fmt.Errorf(format, a...)) }

// NewRoot returns the root of a program, which prints its help, with a topic that
// explains the exit codes.
func NewRoot(name, short, long, exitCodes string) *cobra.Command {
	root := &cobra.Command{
		Use: name, Short: short, Long: long + "\n\n" + exitCodes,
		SilenceErrors: true, SilenceUsage: true,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	// A suggestion would be a second line.
	root.DisableSuggestions = true
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return Usagef("%w: see %s --help", err, cmd.CommandPath())
	})
	root.AddCommand(&cobra.Command{Use: "exit-codes", Short: "What the exit codes mean", Long: exitCodes})
	return root
}

// AddGroup adds commands to root that stand together in its help.
func AddGroup(root *cobra.Command, title string, cmds ...*cobra.Command) {
	root.AddGroup(&cobra.Group{ID: title, Title: title + ":"})
	for _, c := range cmds {
		c.GroupID = title
		root.AddCommand(c)
	}
}

// Run is a program: it runs the command of root that args name, and returns the
// exit code. The first SIGINT or SIGTERM ends the command's context, a second one
// ends the process. An error is one line on stderr, whoever wrote what it says.
//
// What a command returns goes through classify, which gives it its code by [Exit],
// unless it has one. What cobra itself refuses is [ExitUsage].
func Run(root *cobra.Command, args []string, stdin io.Reader, stdout, stderr io.Writer, classify func(context.Context, error) error) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	// The first signal ends things in order; a second one ends them at once.
	context.AfterFunc(ctx, stop)
	classified(root, classify)
	root.SetArgs(args)
	root.SetIn(stdin)
	root.SetOut(stdout)
	root.SetErr(stderr)
	cmd, err := root.ExecuteContextC(ctx)
	if err == nil {
		return ExitOK
	}
	code := ExitUsage // what cobra itself refuses
	var e *exitError
	if errors.As(err, &e) {
		code = e.code
		if e.err == nil {
			return code
		}
	} else {
		err = fmt.Errorf("%w: see %s --help", err, cmd.CommandPath())
	}
	// Where stderr is closed, the exit code still tells.
	_, _ = fmt.Fprintf(stderr, "%s: %s\n", root.Name(), strings.Join(strings.Fields(OneLine(err.Error())), " "))
	return code
}

func classified(cmd *cobra.Command, classify func(context.Context, error) error) {
	if inner := cmd.RunE; inner != nil {
		cmd.RunE = func(cmd *cobra.Command, args []string) error {
			err := inner(cmd, args)
			var e *exitError
			if err == nil || errors.As(err, &e) {
				return err
			}
			return classify(cmd.Context(), err)
		}
	}
	for _, c := range cmd.Commands() {
		classified(c, classify)
	}
}

// NoArgs refuses arguments.
func NoArgs(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		return Usagef("%s takes no argument, but got %q: see %s --help", cmd.Name(), args[0], cmd.CommandPath())
	}
	return nil
}

// OneArg demands one argument, which it names.
func OneArg(what string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) != 1 {
			return Usagef("%s takes one argument, %s: see %s --help", cmd.Name(), what, cmd.CommandPath())
		}
		return nil
	}
}

// Subcommands is the RunE of a command that only has others.
func Subcommands(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		return Usagef("unknown command %q: see %s --help", args[0], cmd.CommandPath())
	}
	return cmd.Help()
}

// Version is what the build says of itself.
func Version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok || info.Main.Version == "" {
		return "(devel)"
	}
	return info.Main.Version
}

// NewVersionCommand returns the command that prints [Version], as JSON if *asJSON
// is set when it runs.
func NewVersionCommand(asJSON *bool) *cobra.Command {
	return &cobra.Command{
		Use: "version", Short: "Print the version", Args: NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if *asJSON {
				return PrintJSON(cmd.OutOrStdout(), map[string]string{"version": Version()})
			}
			_, err := fmt.Fprintln(cmd.OutOrStdout(), cmd.Root().Name(), Version())
			return err
		},
	}
}

// Logger returns a logger that writes to w, with zerolog as the handler, from a
// level on (debug, info, warn or error), as text or json.
func Logger(w io.Writer, level, format string) (*slog.Logger, error) {
	l, err := zerolog.ParseLevel(level)
	if err != nil || level == "" {
		return nil, Usagef("unknown log level %q: use debug, info, warn or error", level)
	}
	switch format {
	case "text":
		w = zerolog.ConsoleWriter{Out: w, NoColor: true, TimeFormat: "2006-01-02T15:04:05.000Z07:00"}
	case "json":
	default:
		return nil, Usagef("unknown log format %q: use text or json", format)
	}
	return slog.New(zerolog.NewSlogHandler(zerolog.New(w).Level(l).With().Timestamp().Logger())), nil
}

// Env returns an environment variable, or otherwise where it is not set or empty.
func Env(name, otherwise string) string {
	if v := os.Getenv(name); v != "" {
		return v
	}
	return otherwise
}

// MaxToken bounds what ReadToken reads, in bytes.
const MaxToken = 64 << 10

// ReadToken reads the file of --token-file, or stdin where path is "-": a token on
// one line, which may begin with "Bearer". An error is one of the command line, and
// holds nothing of the token.
func ReadToken(stdin io.Reader, path string) (string, error) {
	in := stdin
	if path != "-" {
		f, err := os.Open(path)
		if err != nil {
			return "", Usagef("--token-file: %w", err)
		}
		defer func() { _ = f.Close() }() // only read
		in = f
	}
	b, err := io.ReadAll(io.LimitReader(in, MaxToken+1))
	if err != nil {
		return "", Usagef("--token-file: %w", err)
	}
	token := strings.TrimPrefix(strings.TrimSpace(string(b)), "Bearer ")
	if len(b) > MaxToken || token == "" || strings.ContainsAny(token, "\r\n\x00") {
		return "", Usagef("--token-file %s holds no token of one line and at most %d bytes", path, MaxToken)
	}
	return token, nil
}

// PrintJSON writes v, indented.
func PrintJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

// PrintLines writes values as JSON, one a line.
func PrintLines[T any](w io.Writer, values []T) error {
	e := json.NewEncoder(w)
	e.SetEscapeHTML(false)
	for i := range values {
		if err := e.Encode(&values[i]); err != nil {
			return err
		}
	}
	return nil
}

// OneLine keeps what others wrote from taking over a terminal: control characters
// and line ends become spaces.
func OneLine(s string) string {
	return strings.Map(func(r rune) rune {
		if r < 0x20 || r >= 0x7f && r < 0xa0 || r == 0x2028 || r == 0x2029 {
			return ' '
		}
		return r
	}, s)
}
