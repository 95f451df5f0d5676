// Command enforcer puts an enforcer in front of hosts in any language: as a
// reverse proxy for MCP and A2A servers, or as the authorization service of a
// proxy that is there already.
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
	"runtime/debug"
	"strings"
	"syscall"

	"github.com/rs/zerolog"
	"github.com/spf13/cobra"

	"github.com/interlock-fabric/interlock/internal/gateway/config"
)

// The exit codes. They are stable; see helpExitCodes.
const (
	exitOK          = 0
	exitDenied      = 1
	exitUsage       = 2
	exitFailed      = 3
	exitUnreachable = 4
)

const helpExitCodes = `Exit codes:
  0  done; check: allowed; status: everything that may be allowed is
  1  check: denied; status: everything is denied
  2  the command line or the configuration is not valid
  3  failed
  4  no enforcer can be reached`

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

func main() { os.Exit(run(os.Args[1:], os.Stdin, os.Stdout, os.Stderr)) }

// run is the program.
func run(args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	// The first signal ends things in order; a second one ends them at once.
	context.AfterFunc(ctx, stop)
	root := newRoot()
	root.SetArgs(args)
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
	_, _ = fmt.Fprintf(stderr, "enforcer: %s\n", strings.Join(strings.Fields(oneLine(err.Error())), " "))
	return code
}

// globals are the flags of every command.
type globals struct {
	config string
	set    []string
	json   bool
}

func newRoot() *cobra.Command {
	g := &globals{}
	root := &cobra.Command{
		Use:   "enforcer",
		Short: "Enforce the decisions of a session authority in front of any host",
		Long: `An enforcer checks every request against the decisions of a session authority,
and cuts what is running when its caller must stop.

  enforcer proxy     a reverse proxy in front of MCP and A2A servers
  enforcer authz     ext_authz for Envoy; forward-auth for nginx, Caddy, Traefik
  enforcer check     say whether a token would be allowed
  enforcer status    say how the running enforcer is

` + helpExitCodes,
		SilenceErrors: true, SilenceUsage: true,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	// A suggestion would be a second line.
	root.DisableSuggestions = true
	f := root.PersistentFlags()
	f.StringVar(&g.config, "config", env("INTERLOCK_CONFIG", "/etc/interlock/enforcer.yaml"), "the configuration file (INTERLOCK_CONFIG)")
	f.StringArrayVar(&g.set, "set", nil, "override a key of the file, as in admin.listen=127.0.0.1:9464; may be repeated")
	f.BoolVar(&g.json, "json", false, "print JSON")
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return usagef("%w: see %s --help", err, cmd.CommandPath())
	})
	root.AddGroup(&cobra.Group{ID: "run", Title: "Run:"}, &cobra.Group{ID: "look", Title: "Look:"})
	add := func(group string, cmds ...*cobra.Command) {
		for _, c := range cmds {
			c.GroupID = group
			root.AddCommand(c)
		}
	}
	add("run", newProxyCommand(g), newAuthzCommand(g), newConfigCommand(g))
	add("look", newCheckCommand(g), newStatusCommand(g))
	root.AddCommand(newVersionCommand(g), &cobra.Command{Use: "exit-codes", Short: "What the exit codes mean", Long: helpExitCodes})
	classify(root)
	return root
}

// classify gives the errors of every command their exit codes.
func classify(cmd *cobra.Command) {
	if inner := cmd.RunE; inner != nil {
		cmd.RunE = func(cmd *cobra.Command, args []string) error { return withCode(inner(cmd, args)) }
	}
	for _, c := range cmd.Commands() {
		classify(c)
	}
}

func withCode(err error) error {
	var e *exitError
	switch {
	case err == nil || errors.As(err, &e):
		return err
	case errors.Is(err, config.ErrInvalid):
		return &exitError{exitUsage, err}
	}
	return &exitError{exitFailed, err}
}

// load reads the configuration with its overrides.
func (g *globals) load() (*config.Config, error) {
	c, err := config.Load(g.config, os.Environ(), g.set)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, usagef("%w: give --config", err)
	case errors.Is(err, fs.ErrPermission):
		return nil, usagef("%w: give a --config that this user can read", err)
	}
	return c, err
}

func env(name, otherwise string) string {
	if v := os.Getenv(name); v != "" {
		return v
	}
	return otherwise
}

// logger returns a logger for the command's stderr, with zerolog as the handler.
func logger(w io.Writer, c config.Log) (*slog.Logger, error) {
	l, err := zerolog.ParseLevel(c.Level)
	if err != nil {
		return nil, usagef("log.level: %w", err)
	}
	if c.Format == "text" {
		w = zerolog.ConsoleWriter{Out: w, NoColor: true, TimeFormat: "2006-01-02T15:04:05.000Z07:00"}
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
			_, err := fmt.Fprintln(cmd.OutOrStdout(), "enforcer", version())
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

// subcommands is the RunE of a command that only has others.
func subcommands(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usagef("unknown command %q: see %s --help", args[0], cmd.CommandPath())
	}
	return cmd.Help()
}
