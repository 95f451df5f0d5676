package main

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/interlock-fabric/interlock/internal/cli"
	"github.com/interlock-fabric/interlock/pkg/authority"
)

// propose makes a proposal of what one person may not decide alone, and says what
// to do next.
func propose(cmd *cobra.Command, g *globals, c *authority.Client, r authority.Request) error {
	p, err := c.Propose(cmd.Context(), r)
	if err != nil {
		return err
	}
	if g.json {
		err = cli.PrintJSON(cmd.OutOrStdout(), map[string]any{"proposal": p})
	} else {
		_, err = fmt.Fprintf(cmd.OutOrStdout(), "proposed as %s, NOT in effect: another commander must approve it by %s:\n  session-authority proposals approve %s\nif nobody can: the same command with --break-glass REASON\n",
			p.ID, p.Expires.UTC().Format(time.RFC3339), p.ID)
	}
	if err != nil {
		return err
	}
	return cli.Exit(exitProposed, nil)
}

func newProposalsCommand(g *globals) *cobra.Command {
	cmd := &cobra.Command{
		Use: "proposals", Short: "Approve what takes two commanders", RunE: cli.Subcommands,
		Long: `A kill, and whatever else is decided on a whole tenant or on everything, takes two
commanders where principals are configured: one proposes it with kill, restore, …
and another approves it before it expires.`,
		Example: `  session-authority proposals list
  session-authority proposals approve p00-k3vq2a`,
	}
	var wait time.Duration
	approve := &cobra.Command{
		Use: "approve ID", Short: "Have what another proposed decided", Args: cli.OneArg("the proposal's id"),
		Long: `Has what another commander proposed decided now. Approved twice, it is decided
once.

` + helpExitCodes,
		Example: `  session-authority proposals approve p00-k3vq2a`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if wait < 0 || wait > authority.MaxWait {
				return cli.Usagef("--wait %s is out of range: give at most %s, or 0 not to wait", wait, authority.MaxWait)
			}
			c, err := g.client()
			if err != nil {
				return err
			}
			defer c.Close()
			d, err := c.Approve(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			i := slices.IndexFunc(verbs, func(v verb) bool { return v.op == d.Operation })
			if i < 0 {
				return fmt.Errorf("decided at seq %d, by an operation that is not known here: %.32q", d.Number, d.Operation)
			}
			return report(cmd, g, c, verbs[i], wait, &authority.Request{Operation: d.Operation}, d)
		},
	}
	approve.Flags().DurationVar(&wait, "wait", authority.MaxWait, "how long to wait until every enforcer has it in force; 0 does not wait")
	approve.Flags().Lookup("wait").NoOptDefVal = authority.MaxWait.String()
	cmd.AddCommand(
		&cobra.Command{
			Use: "list", Short: "Show the proposals of the last day", Args: cli.NoArgs,
			Long:    "Shows the proposals of the last day, the newest first, and what was decided by one\nperson alone.",
			Example: `  session-authority proposals list`,
			RunE: func(cmd *cobra.Command, _ []string) error {
				c, err := g.client()
				if err != nil {
					return err
				}
				defer c.Close()
				list, err := c.Proposals(cmd.Context())
				if err != nil {
					return err
				}
				if g.json {
					return cli.PrintJSON(cmd.OutOrStdout(), map[string]any{"proposals": list})
				}
				_, err = fmt.Fprint(cmd.OutOrStdout(), proposalsText(list))
				return err
			},
		},
		approve,
		&cobra.Command{
			Use: "withdraw ID", Short: "End a proposal", Args: cli.OneArg("the proposal's id"),
			Long:    "Ends a proposal that nobody has approved yet. Any commander may.",
			Example: `  session-authority proposals withdraw p00-k3vq2a`,
			RunE: func(cmd *cobra.Command, args []string) error {
				c, err := g.client()
				if err != nil {
					return err
				}
				defer c.Close()
				p, err := c.Withdraw(cmd.Context(), args[0])
				if err != nil {
					return err
				}
				if g.json {
					return cli.PrintJSON(cmd.OutOrStdout(), map[string]any{"proposal": p})
				}
				_, err = fmt.Fprintln(cmd.OutOrStdout(), "withdrawn", cli.OneLine(p.ID))
				return err
			},
		},
	)
	return cmd
}

func proposalsText(list []authority.Proposal) string {
	if len(list) == 0 {
		return "no proposals\n"
	}
	var b strings.Builder
	for i := range list {
		p := &list[i]
		fmt.Fprintf(&b, "%s %s, by %s at %s", p.ID, p.State, cli.OneLine(p.By), p.At.UTC().Format(time.RFC3339))
		switch p.State {
		case authority.ProposalOpen:
			fmt.Fprintf(&b, ", until %s", p.Expires.UTC().Format(time.RFC3339))
		case authority.ProposalExecuted, authority.ProposalBrokenGlass:
			fmt.Fprintf(&b, "; seq %d", p.Number)
		}
		if p.EndedBy != "" && p.EndedBy != p.By {
			fmt.Fprintf(&b, "; ended by %s", cli.OneLine(p.EndedBy))
		}
		if r := p.Request; r.Incident != "" {
			fmt.Fprintf(&b, "; %s", cli.OneLine(r.Incident))
		}
		b.WriteByte('\n')
		for _, w := range p.Would {
			fmt.Fprintf(&b, "  %s\n", cli.OneLine(w))
		}
		if p.Request.BreakGlass != "" {
			fmt.Fprintf(&b, "  break-glass: %s\n", cli.OneLine(p.Request.BreakGlass))
		}
	}
	return b.String()
}
