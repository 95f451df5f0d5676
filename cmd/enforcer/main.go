// Command enforcer puts an enforcer in front of hosts in any language: as a
// reverse proxy for MCP and A2A servers, or as the authorization service of a
// proxy that is there already.
package main

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"os"

	"github.com/spf13/cobra"

	"github.com/interlock-fabric/interlock/internal/cli"
	"github.com/interlock-fabric/interlock/internal/gateway/config"
)

// The exit codes beside those of every program. They are stable; see
// helpExitCodes.
const (
	exitDenied = 1
	exitFailed = 3
)

const helpExitCodes = `Exit codes:
  0  done; check: allowed; status: everything that may be allowed is
  1  check: denied; status: everything is denied
  2  the command line or the configuration is not valid
  3  failed
  4  no enforcer can be reached`

func main() { os.Exit(run(os.Args[1:], os.Stdin, os.Stdout, os.Stderr)) }

// run is the program.
func run(args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	return cli.Run(newRoot(), args, stdin, stdout, stderr, withCode)
}

// globals are the flags of every command.
type globals struct {
	config string
	set    []string
	json   bool
}

func newRoot() *cobra.Command {
	g := &globals{}
	root := cli.NewRoot("enforcer", "Enforce the decisions of a session authority in front of any host",
		`An enforcer checks every request against the decisions of a session authority,
and cuts what is running when its caller must stop.

  enforcer proxy     a reverse proxy in front of MCP and A2A servers
  enforcer authz     ext_authz for Envoy; forward-auth for nginx, Caddy, Traefik
  enforcer check     say whether a token would be allowed
  enforcer status    say how the running enforcer is`, helpExitCodes)
	f := root.PersistentFlags()
	f.StringVar(&g.config, "config", cli.Env("INTERLOCK_CONFIG", "/etc/interlock/enforcer.yaml"), "the configuration file (INTERLOCK_CONFIG)")
	f.StringArrayVar(&g.set, "set", nil, "override a key of the file, as in admin.listen=127.0.0.1:9464; may be repeated")
	f.BoolVar(&g.json, "json", false, "print JSON")
	cli.AddGroup(root, "Run", newProxyCommand(g), newAuthzCommand(g), newConfigCommand(g))
	cli.AddGroup(root, "Look", newCheckCommand(g), newStatusCommand(g))
	root.AddCommand(cli.NewVersionCommand(&g.json))
	return root
}

// withCode gives the error of a command its exit code.
func withCode(_ context.Context, err error) error {
	if errors.Is(err, config.ErrInvalid) {
		return cli.Exit(cli.ExitUsage, err)
	}
	return cli.Exit(exitFailed, err)
}

// load reads the configuration with its overrides.
func (g *globals) load() (*config.Config, error) {
	c, err := config.Load(g.config, os.Environ(), g.set)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, cli.Usagef("%w: give --config", err)
	case errors.Is(err, fs.ErrPermission):
		return nil, cli.Usagef("%w: give a --config that this user can read", err)
	}
	return c, err
}
