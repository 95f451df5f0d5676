package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/interlock-fabric/interlock/internal/cli"
	"github.com/interlock-fabric/interlock/internal/gateway"
)

// Bounds of what is asked and answered.
const (
	maxAnswer  = 1 << 20
	askTimeout = 10 * time.Second
)

// ask asks the running enforcer over its socket.
func ask(ctx context.Context, g *globals, path, method, what string, in, out any) error {
	if path == "" {
		c, err := g.load()
		if err != nil {
			return err
		}
		if path = c.Admin.Socket; path == "" {
			return cli.Usagef("the configuration has neither admin.socket nor state_dir: give --socket")
		}
	}
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return err
		}
		body = bytes.NewReader(b)
	}
	t := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", path)
	}}
	defer t.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, method, "http://enforcer"+what, body)
	if err != nil {
		return err
	}
	resp, err := t.RoundTrip(req)
	if err != nil {
		mend := "is enforcer proxy or enforcer authz running? give --socket or --config"
		if errors.Is(err, fs.ErrPermission) {
			mend = "run it as the user who runs the enforcer"
		}
		return cli.Exit(cli.ExitUnreachable, fmt.Errorf("%w: %w: %s", errUnreachable, err, mend))
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return cli.Exit(cli.ExitUnreachable, err)
	}
	if resp.StatusCode != http.StatusOK {
		return cli.Usagef("%s", strings.TrimSpace(string(b)))
	}
	return json.Unmarshal(b, out)
}

func newCheckCommand(g *globals) *cobra.Command {
	var q gateway.Question
	var socket, tokenFile string
	cmd := &cobra.Command{
		Use: "check", Short: "Say whether a token would be allowed now", Args: cli.NoArgs,
		Long: `Asks the running enforcer whether a token would be allowed, verified as that of a
request would be, and prints why not. Without --tool or --method the question is
whether its bearer may talk to the resource at all.

` + helpExitCodes,
		Example: `  enforcer check --token-file t.jwt --tool delete_repo; echo $?`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if tokenFile == "" {
				return cli.Usagef("no token: give --token-file, or - for standard input")
			}
			var err error
			if q.Token, err = cli.ReadToken(cmd.InOrStdin(), tokenFile); err != nil {
				return err
			}
			var v gateway.Verdict
			if err := ask(cmd.Context(), g, socket, http.MethodPost, "/v1/check", q, &v); err != nil {
				return err
			}
			if g.json {
				err = cli.PrintJSON(cmd.OutOrStdout(), v)
			} else {
				_, err = fmt.Fprintln(cmd.OutOrStdout(), cli.OneLine(v.Message))
			}
			if err == nil && !v.Allowed {
				return cli.Exit(exitDenied, nil)
			}
			return err
		},
	}
	f := cmd.Flags()
	f.StringVar(&tokenFile, "token-file", "", "the token's file; - reads it from standard input")
	f.StringVar(&q.Route, "route", "", "the route, where there is more than one")
	f.StringVar(&q.Tool, "tool", "", "the tool or operation that is called")
	f.StringVar(&q.Method, "method", "", "the JSON-RPC method, where no tool is called")
	socketFlag(cmd, &socket)
	return cmd
}

func socketFlag(cmd *cobra.Command, socket *string) {
	cmd.Flags().StringVar(socket, "socket", os.Getenv("INTERLOCK_ADMIN_SOCKET"), "the enforcer's socket; default is that of the configuration (INTERLOCK_ADMIN_SOCKET)")
}

func newStatusCommand(g *globals) *cobra.Command {
	var socket string
	var wait time.Duration
	cmd := &cobra.Command{
		Use: "status", Short: "Say how the running enforcer is", Args: cli.NoArgs,
		Long:    "Says how the running enforcer is; with --wait, once it runs and is fresh, or when\nthat takes longer.\n\n" + helpExitCodes,
		Example: "  enforcer status --wait 30s\n  enforcer status --json | jq .enforcer.fresh",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if wait < 0 {
				return cli.Usagef("--wait %s is in the past: give how long to wait, or 0 not to wait", wait)
			}
			s, err := statusWithin(cmd.Context(), g, socket, wait)
			if err != nil {
				return err
			}
			if g.json {
				err = cli.PrintJSON(cmd.OutOrStdout(), s)
			} else {
				_, err = fmt.Fprint(cmd.OutOrStdout(), statusText(s))
			}
			if err == nil && !s.Enforcer.Fresh && s.Enforcer.Mode == "strict" {
				return cli.Exit(exitDenied, nil)
			}
			return err
		},
	}
	socketFlag(cmd, &socket)
	cmd.Flags().DurationVar(&wait, "wait", 0, "how long to wait until it is fresh; 0 does not wait")
	return cmd
}

// statusWithin asks again and again until the enforcer is fresh, for as long as
// wait. It returns the last answer.
func statusWithin(ctx context.Context, g *globals, socket string, wait time.Duration) (*gateway.Status, error) {
	end := time.After(wait)
	for {
		var s gateway.Status
		err := ask(ctx, g, socket, http.MethodGet, "/v1/status", nil, &s)
		if err == nil && s.Enforcer.Fresh || wait <= 0 || err != nil && !errors.Is(err, errUnreachable) {
			return &s, err
		}
		select {
		case <-ctx.Done():
			return &s, cmp.Or(err, ctx.Err())
		case <-end:
			return &s, err
		case <-time.After(statusPoll):
		}
	}
}

// statusPoll is how often a status that is waited for is asked for.
const statusPoll = 100 * time.Millisecond

// errUnreachable: no enforcer answers.
var errUnreachable = errors.New("unreachable")

func statusText(s *gateway.Status) string {
	e := &s.Enforcer
	var b strings.Builder
	switch {
	case e.Fresh:
		fmt.Fprintf(&b, "%s: fresh, %s old of %s\n", e.Enforcer, e.Age.Round(time.Millisecond), e.MaxStale)
	case e.Mode == "strict":
		fmt.Fprintf(&b, "%s: denying everything: %s\n", e.Enforcer, cli.OneLine(e.Why))
	default:
		fmt.Fprintf(&b, "%s: exposed (%s): %s\n", e.Enforcer, e.Mode, cli.OneLine(e.Why))
	}
	fmt.Fprintf(&b, "epoch %d, seq %d, confirmed %d; %s in force\n", e.Epoch, e.Applied, e.Confirmed, entries(e.Entries+e.Inherited))
	fmt.Fprintf(&b, "running %d, MCP sessions %d; denied %d, cut %d\n", e.Running, s.Sessions, e.Denied, e.Cut)
	if a := e.Agents; a != nil {
		fmt.Fprintf(&b, "registry: %d agents (table %d), %s old of %s; denied %d unregistered, %d altered\n",
			a.Agents, a.Version, a.Age.Round(time.Millisecond), a.MaxAge, e.Unregistered, e.Altered)
		if a.Why != "" {
			fmt.Fprintf(&b, "REGISTRY: denying whoever is held against it: %s\n", cli.OneLine(a.Why))
		}
	}
	fmt.Fprintf(&b, "routes: %s\n", strings.Join(s.Routes, ", "))
	for _, o := range e.Orders {
		fmt.Fprintf(&b, "EMERGENCY ORDER %s/%d: %s is killed until the authority has adopted it (%s, signed %s)\n",
			o.Key, o.Number, cli.OneLine(o.Kills), cli.OneLine(o.Incident), o.Signed.Format(time.RFC3339))
	}
	if e.OrderWhy != "" {
		fmt.Fprintf(&b, "EMERGENCY ORDERS: %d refused, the last: %s\n", e.OrdersRefused, cli.OneLine(e.OrderWhy))
	}
	if e.Mode != "strict" && e.Fresh {
		fmt.Fprintf(&b, "MODE: %s, %d would have been denied\n", e.Mode, e.WouldDeny+e.Exposed)
	}
	if s.Config.Error != "" {
		fmt.Fprintf(&b, "CONFIGURATION: the last one was refused: %s\n", cli.OneLine(s.Config.Error))
	}
	if s.Draining {
		b.WriteString("DRAINING\n")
	}
	return b.String()
}

func entries(n int) string {
	if n == 1 {
		return "1 entry"
	}
	return fmt.Sprintf("%d entries", n)
}

func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}
