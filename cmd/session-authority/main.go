// Command session-authority decides who may no longer act: it serves the Session
// Authority, and gives responders its verbs.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/rs/zerolog"
	"github.com/spf13/cobra"

	"github.com/interlock-fabric/interlock/internal/api"
	"github.com/interlock-fabric/interlock/pkg/authority"
)

// The exit codes. They are stable; see helpExitCodes.
const (
	exitOK          = 0
	exitFailed      = 1
	exitUsage       = 2
	exitNotDurable  = 3
	exitUnreachable = 4
	exitCommit      = 5
)

const helpExitCodes = `Exit codes:
  0  done
  1  denied, failed, or not in effect everywhere
  2  the command line or a value in it is not valid
  3  in effect, but not durable yet
  4  the authority cannot be reached, or the command was interrupted; what was
     asked for may have happened
  5  previewed only: add --commit to do it`

const helpTargets = `A target is KIND VALUE; two or three are joined by "and":

  session s_9f2c                       a session, and what descends from it
  token JTI                            one token
  user alice                           everything done on behalf of a user
  agent spiffe://corp/agent/billing    an agent anywhere in the chain
  client CLIENT-ID, issuer URL, owner URI, role NAME, capability NAME,
  credential URI, blueprint NAME, tool NAME, audience URI
  key jkt:THUMBPRINT, key apikey:SHA256-HEX
  digest code:sha256:HEX               or model:, image:
  tenant NAME                          everything in a tenant
  global                               everything

  user alice and agent billing-bot     only together

These go together: user+agent, user+client, user+tool, agent+client, agent+tool,
agent+audience, session+tool, user+agent+tool.

What an issuer mints (user, client, session, token, and an agent that is not a
URI) is unique only with its issuer: --issuer, or INTERLOCK_ISSUER, or the only
one that the authority serves. The tenant may be left out where there is one.`

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

func usagef(format string, a ...any) error {
	return &exitError{exitUsage, fmt.Errorf(format, a...)}
}

func exit(code int) error { return &exitError{code: code} }

func main() { os.Exit(run(os.Args[1:], os.Stdin, os.Stdout, os.Stderr)) }

// run is the program.
func run(args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	// The first signal ends things in order; a second one ends them at once.
	context.AfterFunc(ctx, stop)
	root := newRoot()
	root.SetArgs(joinWait(args))
	root.SetIn(stdin)
	root.SetOut(stdout)
	root.SetErr(stderr)
	cmd, err := root.ExecuteContextC(ctx)
	if err == nil {
		return exitOK
	}
	code := exitUsage // what cobra itself refuses
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
	_, _ = fmt.Fprintf(stderr, "session-authority: %s\n", strings.Join(strings.Fields(oneLine(err.Error())), " "))
	return code
}

// joinWait makes "--wait 10s" mean "--wait=10s". The flag may stand alone, and so
// would not take the word behind it.
func joinWait(args []string) []string {
	for i := 0; i+1 < len(args) && args[i] != "--"; i++ {
		if args[i] != "--wait" {
			continue
		}
		if _, err := time.ParseDuration(args[i+1]); err == nil {
			return slices.Concat(args[:i], []string{"--wait=" + args[i+1]}, args[i+2:])
		}
	}
	return args
}

// globals are the flags of every command.
type globals struct {
	socket, url, apiToken, dataDir string
	json                           bool
}

func newRoot() *cobra.Command {
	g := &globals{}
	root := &cobra.Command{
		Use:   "session-authority",
		Short: "Decide which agent may no longer act, everywhere at once",
		Long: `A Session Authority decides who may no longer act; the enforcers in MCP servers
and gateways act on it within milliseconds, on new requests and on work already
running.

  session-authority demo       see all of it on this machine
  session-authority serve      run an authority
  session-authority revoke session s_9f2c --reason stolen-token

` + helpExitCodes,
		SilenceErrors: true, SilenceUsage: true,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	// A suggestion would be a second line.
	root.DisableSuggestions = true
	f := root.PersistentFlags()
	f.StringVar(&g.dataDir, "data-dir", env("INTERLOCK_DATA_DIR", defaultDataDir()), "the authority's directory (INTERLOCK_DATA_DIR)")
	f.StringVar(&g.socket, "socket", os.Getenv("INTERLOCK_SOCKET"), "the API's unix socket; default api.sock in the data directory (INTERLOCK_SOCKET)")
	f.StringVar(&g.url, "url", os.Getenv("INTERLOCK_URL"), "the API's URL, instead of the socket (INTERLOCK_URL)")
	f.StringVar(&g.apiToken, "api-token-file", os.Getenv("INTERLOCK_API_TOKEN_FILE"), "the bearer token's file for --url; default api.token in the data directory (INTERLOCK_API_TOKEN_FILE)")
	f.BoolVar(&g.json, "json", false, "print JSON")
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return usagef("%w: see %s --help", err, cmd.CommandPath())
	})
	root.AddGroup(&cobra.Group{ID: "respond", Title: "Respond:"}, &cobra.Group{ID: "look", Title: "Look:"}, &cobra.Group{ID: "run", Title: "Run:"})
	add := func(group string, cmds ...*cobra.Command) {
		for _, c := range cmds {
			c.GroupID = group
			root.AddCommand(c)
		}
	}
	add("respond", newDecisionCommands(g)...)
	add("look", newStatusCommand(g), newWatchCommand(g), newExplainCommand(g), newTrailCommand(g), newAgentsCommand(g), newEnforcersCommand(g))
	add("run", newDemoCommand(), newServeCommand(g), newInitCommand(g), newKeysCommand(g), newEpochCommand(g), newEnrollCommand(g), newRetireCommand(g), newVersionCommand(g))
	root.AddCommand(
		&cobra.Command{Use: "targets", Short: "What a decision can name", Long: helpTargets},
		&cobra.Command{Use: "exit-codes", Short: "What the exit codes mean", Long: helpExitCodes},
	)
	classify(root)
	return root
}

// classify gives the errors of every command their exit codes.
func classify(cmd *cobra.Command) {
	if inner := cmd.RunE; inner != nil {
		cmd.RunE = func(cmd *cobra.Command, args []string) error { return withCode(cmd.Context(), inner(cmd, args)) }
	}
	for _, c := range cmd.Commands() {
		classify(c)
	}
}

func withCode(ctx context.Context, err error) error {
	var e *exitError
	var p *authority.Problem
	switch {
	case err == nil || errors.As(err, &e):
		return err
	case ctx.Err() != nil: // interrupted, with what was asked for on its way
		return &exitError{exitUnreachable, err}
	case errors.Is(err, authority.ErrUnreachable):
		mend := "is session-authority serve running? give --data-dir, --socket or --url"
		if errors.Is(err, fs.ErrPermission) {
			mend = "run it as the user who runs session-authority serve"
		}
		return &exitError{exitUnreachable, fmt.Errorf("%w: %s", err, mend)}
	case errors.As(err, &p):
		switch p.Type {
		case authority.ProblemInvalid, authority.ProblemTenant, authority.ProblemIssuer, authority.ProblemTerminal, authority.ProblemTooLarge:
			return &exitError{exitUsage, err}
		}
	}
	return &exitError{exitFailed, err}
}

func env(name, otherwise string) string {
	if v := os.Getenv(name); v != "" {
		return v
	}
	return otherwise
}

func defaultDataDir() string {
	if os.Geteuid() == 0 {
		return "/var/lib/interlock"
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return "interlock"
	}
	return filepath.Join(home, ".local", "state", "interlock")
}

// client returns a client of the authority that the flags name.
func (g *globals) client() (*authority.Client, error) {
	o := authority.Options{Socket: g.socket}
	if g.url != "" {
		if g.socket != "" && g.socket != os.Getenv("INTERLOCK_SOCKET") {
			return nil, usagef("both --socket and --url: give one of them")
		}
		path := g.apiToken
		if path == "" {
			path = filepath.Join(g.dataDir, "api.token")
		}
		token, err := api.ReadToken(path)
		if err != nil {
			return nil, usagef("%w: give --api-token-file", err)
		}
		o = authority.Options{URL: g.url, Token: token}
	} else if o.Socket == "" {
		o.Socket = filepath.Join(g.dataDir, "api.sock")
	}
	c, err := authority.New(o)
	if err != nil {
		return nil, usagef("%w", err)
	}
	return c, nil
}

// logger returns a logger for the command's stderr, with zerolog as the handler.
func logger(w io.Writer, level, format string) (*slog.Logger, error) {
	l, err := zerolog.ParseLevel(level)
	if err != nil || level == "" {
		return nil, usagef("unknown log level %q: use debug, info, warn or error", level)
	}
	switch format {
	case "text":
		w = zerolog.ConsoleWriter{Out: w, NoColor: true, TimeFormat: "2006-01-02T15:04:05.000Z07:00"}
	case "json":
	default:
		return nil, usagef("unknown log format %q: use text or json", format)
	}
	return slog.New(zerolog.NewSlogHandler(zerolog.New(w).Level(l).With().Timestamp().Logger())), nil
}

// version is what the build says of itself.
func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok || info.Main.Version == "" {
		return "(devel)"
	}
	return info.Main.Version
}

func newVersionCommand(g *globals) *cobra.Command {
	return &cobra.Command{
		Use: "version", Short: "Print the version", Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if g.json {
				return printJSON(cmd.OutOrStdout(), map[string]string{"version": version()})
			}
			_, err := fmt.Fprintln(cmd.OutOrStdout(), "session-authority", version())
			return err
		},
	}
}

func noArgs(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usagef("%s takes no argument, but got %q: see %s --help", cmd.Name(), args[0], cmd.CommandPath())
	}
	return nil
}

// oneArg demands one argument, which it names.
func oneArg(what string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) != 1 {
			return usagef("%s takes one argument, %s: see %s --help", cmd.Name(), what, cmd.CommandPath())
		}
		return nil
	}
}

// subcommands is the RunE of a command that only has others.
func subcommands(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usagef("unknown command %q: see %s --help", args[0], cmd.CommandPath())
	}
	return cmd.Help()
}
