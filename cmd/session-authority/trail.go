package main

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/interlock-fabric/interlock/internal/cli"
	"github.com/interlock-fabric/interlock/pkg/authority"
)

func newTrailCommand(g *globals) *cobra.Command {
	var q authority.TrailQuery
	var since string
	cmd := &cobra.Command{
		Use: "trail", Short: "Show what enforcers denied, cut and allowed", Args: cli.NoArgs,
		Long: `Prints the newest records of the enforcers' sealed reports as JSON, one a line,
oldest first: every denial and every call that was cut, with how often it came, and
the share of the allowed calls that the enforcer samples. They name callers and what
they asked for; arguments are there as a keyed digest only.

What is known to be missing is said on standard error. The bus keeps the newest 256
reports of an enforcer.`,
		Example: `  session-authority trail --agent billing-bot --since 1h
  session-authority trail --incident INC-142 | jq -r '.user + " " + .tool'
  session-authority trail --trace 0af7651916cd43dd8448eb211c80319c`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := trailQuery(&q, since); err != nil {
				return err
			}
			c, err := g.client()
			if err != nil {
				return err
			}
			defer c.Close()
			t, err := c.Trail(cmd.Context(), q)
			if err != nil {
				return err
			}
			if err := cli.PrintLines(cmd.OutOrStdout(), t.Records); err != nil {
				return err
			}
			return trailNotes(cmd.ErrOrStderr(), t.Enforcers, t.More)
		},
	}
	trailFlags(cmd, &q, &since)
	f := cmd.Flags()
	f.StringVar(&q.Tool, "tool", "", "of calls of this tool")
	f.StringVar(&q.Incident, "incident", "", "that this incident decided")
	f.StringVar(&q.Trace, "trace", "", "of this W3C trace id")
	f.StringVar(&q.Decision, "decision", "", "only allowed, denied or cut")
	return cmd
}

func newAgentsCommand(g *globals) *cobra.Command {
	var q authority.TrailQuery
	var since string
	var seen bool
	cmd := &cobra.Command{
		Use: "agents", Short: "Register, change and list agents; show who was seen in use", Args: cli.NoArgs,
		Long: `Registers, changes and lists agents. With --seen, lists the callers that enforcers saw, registered or not: agents, users, clients and
sessions, when first and last, and how many calls they made. Enforcers report them
about once a minute.`,
		Example: "  session-authority agents --seen --since 24h\n  session-authority agents --seen --json | jq -r .client | sort -u",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !seen {
				return cli.Usagef("give --seen, or one of the commands: see session-authority agents --help")
			}
			if err := trailQuery(&q, since); err != nil {
				return err
			}
			c, err := g.client()
			if err != nil {
				return err
			}
			defer c.Close()
			s, err := c.Seen(cmd.Context(), q)
			if err != nil {
				return err
			}
			if g.json {
				err = cli.PrintLines(cmd.OutOrStdout(), s.Seen)
			} else {
				err = seenTable(cmd.OutOrStdout(), s.Seen)
			}
			if err != nil {
				return err
			}
			return trailNotes(cmd.ErrOrStderr(), s.Enforcers, s.More)
		},
	}
	cmd.Flags().BoolVar(&seen, "seen", false, "those that enforcers saw in use")
	trailFlags(cmd, &q, &since)
	cmd.AddCommand(newAgentCommands(g)...)
	return cmd
}

func trailFlags(cmd *cobra.Command, q *authority.TrailQuery, since *string) {
	f := cmd.Flags()
	f.StringVar(&q.Enforcer, "enforcer", "", "of this enforcer")
	f.StringVar(&q.Tenant, "tenant", cli.Env("INTERLOCK_TENANT", ""), "of this tenant (INTERLOCK_TENANT)")
	f.StringVar(&q.User, "user", "", "of this user")
	f.StringVar(&q.Agent, "agent", "", "with this agent in the chain")
	f.StringVar(&q.Session, "session", "", "of this session, or one that descends from it")
	f.StringVar(&q.Client, "client", "", "of this client")
	f.StringVar(since, "since", "", "not older than this; as in 2h, 09:00Z or 2026-11-22T09:00:00Z")
	f.IntVar(&q.Limit, "limit", 100, fmt.Sprintf("at most so many, at most %d", authority.MaxTrail))
}

func trailQuery(q *authority.TrailQuery, since string) error {
	if q.Limit < 1 || q.Limit > authority.MaxTrail {
		return cli.Usagef("--limit %d is out of range: give 1 to %d", q.Limit, authority.MaxTrail)
	}
	var err error
	q.Since, err = parseMoment("since", since, time.Now())
	return err
}

// trailNotes says what of the trail is not there.
func trailNotes(w io.Writer, list []authority.TrailEnforcer, more bool) error {
	var errs []error
	note := func(format string, a ...any) {
		_, err := fmt.Fprintf(w, "note: "+format+"\n", a...)
		errs = append(errs, err)
	}
	for _, e := range list {
		for _, n := range []struct {
			count uint64
			what  string
		}{
			{e.Missing, "reports are missing"}, {e.Refused, "reports in its name were refused"}, {e.Unreadable, "reports cannot be opened with the keys that are here"},
			{e.Foreign, "records are of callers of tenants for which it is not enrolled, and left out"},
			{e.Dropped, "samples were dropped for want of room"}, {e.Folded, "denials have only their cause"},
			{e.Untracked, "sightings gave way before they were reported"},
		} {
			if n.count > 0 {
				note("%s: %d %s", e.Name, n.count, n.what)
			}
		}
	}
	if more {
		note("there may be more: give --limit, or narrow it down")
	}
	return errors.Join(errs...)
}

func seenTable(out io.Writer, list []authority.Sighting) error {
	if len(list) == 0 {
		_, err := fmt.Fprintln(out, "nobody was seen")
		return err
	}
	w := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)
	// Flush says what could not be written.
	_, _ = fmt.Fprintln(w, "AGENTS\tUSER\tCLIENT\tSESSION\tLAST\tFIRST\tCALLS\tDENIED\tENFORCERS")
	now := time.Now()
	for _, s := range list {
		var agents []string
		for _, a := range s.Actors {
			agents = append(agents, cli.OneLine(a.ID))
		}
		_, _ = fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s ago\t%s ago\t%d\t%d\t%s\n", dash(strings.Join(agents, " < ")), dash(s.User), dash(s.Client), dash(s.Session),
			ago(now, s.Last), ago(now, s.First), s.Calls, s.Denied, strings.Join(s.Enforcers, ","))
	}
	return w.Flush()
}
