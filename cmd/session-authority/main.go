// Command session-authority decides who may no longer act: it serves the Session
// Authority, and gives responders its verbs.
package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"github.com/interlock-fabric/interlock/internal/api"
	"github.com/interlock-fabric/interlock/internal/cli"
	"github.com/interlock-fabric/interlock/pkg/authority"
)

// The exit codes beside those of every program. They are stable; see
// helpExitCodes.
const (
	exitFailed     = 1
	exitNotDurable = 3
	exitCommit     = 5
	exitProposed   = 6
)

const helpExitCodes = `Exit codes:
  0  done
  1  denied, failed, or not in effect everywhere
  2  the command line or a value in it is not valid
  3  in effect, but not durable yet
  4  the authority cannot be reached, or the command was interrupted; what was
     asked for may have happened
  5  previewed only: add --commit to do it
  6  proposed: another commander must approve it`

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

func main() { os.Exit(run(os.Args[1:], os.Stdin, os.Stdout, os.Stderr)) }

// run is the program.
func run(args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	return cli.Run(newRoot(), joinWait(args), stdin, stdout, stderr, withCode)
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
	apiCA, clientCert, clientKey   string
	json                           bool
}

func newRoot() *cobra.Command {
	g := &globals{}
	root := cli.NewRoot("session-authority", "Decide which agent may no longer act, everywhere at once",
		`A Session Authority decides who may no longer act; the enforcers in MCP servers
and gateways act on it within milliseconds, on new requests and on work already
running.

  session-authority demo       see all of it on this machine
  session-authority serve      run an authority
  session-authority revoke session s_9f2c --reason stolen-token`, helpExitCodes)
	f := root.PersistentFlags()
	f.StringVar(&g.dataDir, "data-dir", cli.Env("INTERLOCK_DATA_DIR", defaultDataDir()), "the authority's directory (INTERLOCK_DATA_DIR)")
	f.StringVar(&g.socket, "socket", os.Getenv("INTERLOCK_SOCKET"), "the API's unix socket; default api.sock in the data directory (INTERLOCK_SOCKET)")
	f.StringVar(&g.url, "url", os.Getenv("INTERLOCK_URL"), "the API's URL, instead of the socket (INTERLOCK_URL)")
	f.StringVar(&g.apiToken, "api-token-file", os.Getenv("INTERLOCK_API_TOKEN_FILE"), "file of the bearer token, mode 0600; default for --url is api.token in the data directory (INTERLOCK_API_TOKEN_FILE)")
	f.StringVar(&g.apiCA, "api-ca", os.Getenv("INTERLOCK_API_CA"), "PEM that verifies --url; default is the system's (INTERLOCK_API_CA)")
	f.StringVar(&g.clientCert, "client-cert", os.Getenv("INTERLOCK_CLIENT_CERT"), "client certificate for --url, PEM, in place of a token (INTERLOCK_CLIENT_CERT)")
	f.StringVar(&g.clientKey, "client-key", os.Getenv("INTERLOCK_CLIENT_KEY"), "its key, PEM (INTERLOCK_CLIENT_KEY)")
	f.BoolVar(&g.json, "json", false, "print JSON")
	cli.AddGroup(root, "Respond", append(newDecisionCommands(g), newProposalsCommand(g), newExemptionsCommand(g), newRestoresCommand(g))...)
	cli.AddGroup(root, "Look", newStatusCommand(g), newWatchCommand(g), newExplainCommand(g), newDecisionsCommand(g), newTrailCommand(g), newAuditCommand(g), newReceiptsCommand(g), newIncidentCommand(g), newAgentsCommand(g), newSessionsCommand(g), newEnforcersCommand(g))
	cli.AddGroup(root, "Run", newDemoCommand(), newServeCommand(g), newInitCommand(g), newKeysCommand(g), newEpochCommand(g), newEnrollCommand(g), newRetireCommand(g), cli.NewVersionCommand(&g.json))
	root.AddCommand(&cobra.Command{Use: "targets", Short: "What a decision can name", Long: helpTargets})
	return root
}

// withCode gives the error of a command its exit code, and the mend where the
// error does not say it.
func withCode(ctx context.Context, err error) error {
	var p *authority.Problem
	switch {
	case ctx.Err() != nil: // interrupted, with what was asked for on its way
		return cli.Exit(cli.ExitUnreachable, err)
	case errors.Is(err, authority.ErrUnreachable):
		mend := "is session-authority serve running? give --data-dir, --socket or --url"
		if errors.Is(err, fs.ErrPermission) {
			mend = "run it as the user who runs session-authority serve"
		}
		return cli.Exit(cli.ExitUnreachable, fmt.Errorf("%w: %s", err, mend))
	case errors.As(err, &p):
		switch p.Type {
		case authority.ProblemInvalid, authority.ProblemUnaccounted, authority.ProblemTenant, authority.ProblemIssuer, authority.ProblemTerminal, authority.ProblemTooLarge:
			return cli.Exit(cli.ExitUsage, err)
		}
	}
	return cli.Exit(exitFailed, err)
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
	var err error
	if g.url != "" {
		if g.socket != "" && g.socket != os.Getenv("INTERLOCK_SOCKET") {
			return nil, cli.Usagef("both --socket and --url: give one of them")
		}
		if o, err = g.remote(); err != nil {
			return nil, err
		}
	} else if o.Socket == "" {
		o.Socket = filepath.Join(g.dataDir, "api.sock")
	}
	if path := g.apiToken; path != "" || g.url != "" && g.clientCert == "" {
		if path == "" {
			path = filepath.Join(g.dataDir, "api.token")
		}
		if o.Token, err = api.ReadToken(path); err != nil {
			return nil, cli.Usagef("%w: give --api-token-file", err)
		}
	}
	c, err := authority.New(o)
	if err != nil {
		return nil, cli.Usagef("%w", err)
	}
	return c, nil
}

// remote is how to reach the API at --url.
func (g *globals) remote() (authority.Options, error) {
	o := authority.Options{URL: g.url}
	if g.apiCA == "" && g.clientCert == "" && g.clientKey == "" {
		return o, nil
	}
	o.TLS = &tls.Config{MinVersion: tls.VersionTLS12}
	if g.apiCA != "" {
		ca, err := verifyBy("api-ca", g.apiCA)
		if err != nil {
			return o, err
		}
		o.TLS = ca
	}
	own, err := keyPair("client-cert", "client-key", g.clientCert, g.clientKey)
	if own != nil {
		o.TLS.Certificates = own.Certificates
	}
	return o, err
}
