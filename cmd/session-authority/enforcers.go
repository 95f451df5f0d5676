package main

import (
	"fmt"
	"os"
	"path/filepath"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/interlock-fabric/interlock/internal/cli"
	"github.com/interlock-fabric/interlock/internal/trust"
	"github.com/interlock-fabric/interlock/pkg/authority"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// authorityEnroll are the flags of enroll.
type authorityEnroll struct {
	tenants, urls []string
	out           string
}

func (r *authorityEnroll) run(cmd *cobra.Command, g *globals, name string) error {
	if !session.ValidEnforcerName(name) {
		return cli.Usagef("%.64q cannot name an enforcer: use 1 to 64 of a-z, 0-9, \"-\" and \"_\"", name)
	}
	if r.out != "" {
		// The identity is shown once: what would keep it from being written is
		// best found out before it is made.
		if _, err := os.Lstat(r.out); err == nil {
			return cli.Usagef("--out %s is there already: give a new file", r.out)
		}
		if _, err := os.Stat(filepath.Dir(r.out)); err != nil {
			return cli.Usagef("--out: %w: make the directory first", err)
		}
	}
	c, err := g.client()
	if err != nil {
		return err
	}
	defer c.Close()
	raw, err := c.Enroll(cmd.Context(), authority.EnrollRequest{Name: name, Tenants: r.tenants, URLs: r.urls})
	if err != nil {
		return err
	}
	e, err := session.ParseEnrollment(raw)
	if err != nil {
		return err
	}
	if r.out != "" {
		if err := trust.WriteEnrollment(r.out, e); err != nil {
			return fmt.Errorf("%w: the enrolment is lost: retire %s, and enrol it again into a new file", err, name)
		}
		if g.json {
			return cli.PrintJSON(cmd.OutOrStdout(), map[string]string{"enforcer": name, "file": r.out})
		}
		_, err = fmt.Fprintf(cmd.OutOrStdout(), "enrolled %s: %s\n", name, r.out)
		return err
	}
	secret, err := e.MarshalSecret()
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s\n", secret)
	return err
}

func newEnforcersCommand(g *globals) *cobra.Command {
	var busConfig bool
	cmd := &cobra.Command{
		Use: "enforcers", Short: "Show the roster", Args: cli.NoArgs,
		Example: `  session-authority enforcers
  session-authority enforcers --json | jq '.[] | select(.condition != "fresh")'`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := g.client()
			if err != nil {
				return err
			}
			defer c.Close()
			if busConfig {
				config, err := c.BusConfig(cmd.Context())
				if err != nil {
					return err
				}
				_, err = fmt.Fprint(cmd.OutOrStdout(), config)
				return err
			}
			list, err := c.Enforcers(cmd.Context())
			if err != nil {
				return err
			}
			if g.json {
				return cli.PrintJSON(cmd.OutOrStdout(), list)
			}
			if len(list) == 0 {
				_, err := fmt.Fprintln(cmd.OutOrStdout(), "no enforcers are enrolled")
				return err
			}
			w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 8, 2, ' ', 0)
			// Flush says what could not be written.
			_, _ = fmt.Fprintln(w, "NAME\tCONDITION\tMODE\tAPPLIED\tHEARD\tRUNNING\tDENIED\tARMED")
			now := time.Now()
			for _, e := range list {
				heard := "never"
				if !e.LastHeard.IsZero() {
					heard = ago(now, e.LastHeard) + " ago"
				}
				mode := e.Mode
				if mode == "" {
					mode = "-"
				}
				_, _ = fmt.Fprintf(w, "%s\t%s\t%s\t%d\t%s\t%d\t%d\t%s\n", e.Name, e.Condition, mode, e.Applied, heard, e.Running, e.Denied, armed(e.Canary))
			}
			return w.Flush()
		},
	}
	cmd.Flags().BoolVar(&busConfig, "bus-config", false, "print the accounts of a nats-server that runs apart; reload it whenever the roster changes")
	return cmd
}

// armed says what the canaries show.
func armed(c *authority.Canary) string {
	switch {
	case c == nil:
		return "-"
	case c.Armed:
		return fmt.Sprintf("%.1f ms", c.LatencyMillis)
	}
	return "NO"
}
