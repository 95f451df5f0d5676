package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/interlock-fabric/interlock/internal/cli"
	"github.com/interlock-fabric/interlock/pkg/authority"
)

func newDecisionsCommand(g *globals) *cobra.Command {
	cmd := &cobra.Command{
		Use: "decisions", Short: "Show the decisions of the log", RunE: cli.Subcommands,
		Long: `Shows what is in the log. It has no values in clear: who decided, and on whom, is in
the audit, under the same id.`,
	}
	var q authority.DecisionsQuery
	var since string
	list := &cobra.Command{
		Use: "list", Short: "Show the newest decisions", Args: cli.NoArgs,
		Long: `Prints the newest decisions, newest first; with --json one a line, whole. The log is
trimmed behind published segments: what is older is in the audit.`,
		Example: `  session-authority decisions list --incident INC-142
  session-authority decisions list --tenant acme --since 1h --json`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if q.Limit < 1 {
				return cli.Usagef("--limit %d is out of range: give at least 1", q.Limit)
			}
			var err error
			if q.Since, err = parseMoment("since", since, time.Now()); err != nil {
				return err
			}
			return g.with(func(c *authority.Client) error {
				out := bufio.NewWriter(cmd.OutOrStdout())
				enc := json.NewEncoder(out)
				enc.SetEscapeHTML(false)
				for left := q.Limit; left > 0; {
					q.Limit = min(left, authority.MaxPage)
					p, err := c.Decisions(cmd.Context(), q)
					if err != nil {
						return errors.Join(err, out.Flush())
					}
					for i := range p.Decisions {
						if g.json {
							err = enc.Encode(&p.Decisions[i])
						} else {
							_, err = out.WriteString(decisionText(&p.Decisions[i]))
						}
						if err != nil {
							return err
						}
					}
					left -= len(p.Decisions)
					if q.Page = p.Next; p.Next == "" {
						break
					}
				}
				return out.Flush()
			})
		},
	}
	f := list.Flags()
	f.StringVar(&q.Tenant, "tenant", "", "on this tenant, or on everything")
	f.StringVar(&q.Incident, "incident", "", "of this incident")
	f.StringVar(&since, "since", "", "not older than this; as in 2h, 09:00Z or 2026-11-22T09:00:00Z")
	f.IntVar(&q.Limit, "limit", 100, "at most so many")
	cmd.AddCommand(list)
	return cmd
}

func decisionText(d *authority.LoggedDecision) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%d %s", d.Number, d.At.Format(stamp))
	for i, l := range d.Lines {
		if i > 0 {
			b.WriteByte(',')
		}
		fmt.Fprintf(&b, " %s %s on %s", l.Operation, l.Effect, l.On)
		if l.Count > 1 {
			fmt.Fprintf(&b, " (%d)", l.Count)
		}
		if l.Tenant != "" && l.On != "tenant" {
			b.WriteString(" of")
		}
		for _, s := range []string{l.Tenant, l.Reason, l.Incident} {
			if s != "" {
				b.WriteString(" " + s)
			}
		}
		if l.Drill {
			b.WriteString(" (drill)")
		}
	}
	return cli.OneLine(b.String()) + "\n"
}
