package main

import (
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/interlock-fabric/interlock/internal/cli"
	"github.com/interlock-fabric/interlock/pkg/authority"
)

func newExemptionsCommand(g *globals) *cobra.Command {
	cmd := &cobra.Command{
		Use: "exemptions", Short: "Declare whom kills do not touch", RunE: cli.Subcommands,
		Long: `A kill, and whatever else is decided on a whole tenant or on everything, spares the
callers that were declared before: the responders' own tooling, and agents that must
come to a safe state by themselves. One entry of the log names eight: that many can
be declared in a tenant, and that many that also hold for everything. A kill that is
in force keeps those that it was taken with.`,
		Example: `  session-authority exemptions list
  session-authority exemptions add agent spiffe://corp/agent/valve --owner plant-ops --reason "closes the valve by itself"`,
	}
	var r authority.ExemptionRequest
	var tenant, issuer, until string
	add := &cobra.Command{
		Use: "add TARGET", Short: "Declare one", Args: func(*cobra.Command, []string) error { return nil },
		Long: `Declares a caller that kills of its tenant do not touch; with --global, those of
everything neither. Where principals are configured it counts when another commander
has approved it. What a target is: session-authority help targets.`,
		Example: `  session-authority exemptions add client incident-console --owner security --reason "responders' own tooling" --global`,
		RunE: func(cmd *cobra.Command, args []string) error {
			var err error
			if r.Target, err = parseTarget(args, tenant, issuer); err != nil {
				return err
			}
			if until != "" {
				if r.Expires, err = time.Parse(time.RFC3339Nano, until); err != nil {
					return cli.Usagef("--until %.64q is not a time: give one like 2027-11-22T09:00:00Z", until)
				}
			}
			return exemptions(cmd, g, func(c *authority.Client) ([]authority.Exemption, error) {
				x, err := c.DeclareExemption(cmd.Context(), r)
				if err != nil {
					return nil, err
				}
				return []authority.Exemption{*x}, nil
			})
		},
	}
	f := add.Flags()
	f.StringVar(&issuer, "issuer", cli.Env("INTERLOCK_ISSUER", ""), "who minted the target's ids (INTERLOCK_ISSUER)")
	f.StringVar(&tenant, "tenant", cli.Env("INTERLOCK_TENANT", ""), "the tenant, where there is more than one (INTERLOCK_TENANT)")
	f.StringVar(&r.Owner, "owner", "", "who answers for it; required")
	f.StringVar(&r.Reason, "reason", "", "why it must not be cut; required")
	f.StringVar(&until, "until", "", "when it ends (RFC 3339)")
	f.BoolVar(&r.Global, "global", false, "spare it from what is decided on everything, too; takes a commander of all tenants")
	cmd.AddCommand(
		&cobra.Command{
			Use: "list", Short: "Show them", Args: cli.NoArgs,
			Long:    "Shows what is declared, what waits for a second commander, and what expired in the\nlast day.",
			Example: `  session-authority exemptions list`,
			RunE: func(cmd *cobra.Command, _ []string) error {
				return exemptions(cmd, g, func(c *authority.Client) ([]authority.Exemption, error) { return c.Exemptions(cmd.Context()) })
			},
		},
		add,
		&cobra.Command{
			Use: "approve ID", Short: "Make one count that another declared", Args: cli.OneArg("the exemption's id"),
			Long:    "Makes an exemption count that another commander has declared.",
			Example: `  session-authority exemptions approve x-k3vq2abc`,
			RunE: func(cmd *cobra.Command, args []string) error {
				return exemptions(cmd, g, func(c *authority.Client) ([]authority.Exemption, error) {
					x, err := c.ApproveExemption(cmd.Context(), args[0])
					if err != nil {
						return nil, err
					}
					return []authority.Exemption{*x}, nil
				})
			},
		},
		&cobra.Command{
			Use: "remove ID", Short: "End one", Args: cli.OneArg("the exemption's id"),
			Long: `Ends an exemption for decisions to come; one commander does. A kill that is in
force goes on sparing it: kill anew, and the new decision spares it no more.`,
			Example: `  session-authority exemptions remove x-k3vq2abc`,
			RunE: func(cmd *cobra.Command, args []string) error {
				c, err := g.client()
				if err != nil {
					return err
				}
				defer c.Close()
				if err := c.RemoveExemption(cmd.Context(), args[0]); err != nil {
					return err
				}
				if g.json {
					return cli.PrintJSON(cmd.OutOrStdout(), map[string]string{"removed": args[0]})
				}
				_, err = fmt.Fprintf(cmd.OutOrStdout(), "removed %s; a kill that is in force goes on sparing it until it is decided anew\n", cli.OneLine(args[0]))
				return err
			},
		},
	)
	return cmd
}

// exemptions shows what do returns.
func exemptions(cmd *cobra.Command, g *globals, do func(*authority.Client) ([]authority.Exemption, error)) error {
	c, err := g.client()
	if err != nil {
		return err
	}
	defer c.Close()
	list, err := do(c)
	if err != nil {
		return err
	}
	if g.json {
		return cli.PrintJSON(cmd.OutOrStdout(), map[string]any{"exemptions": list})
	}
	if len(list) == 0 {
		_, err = fmt.Fprintln(cmd.OutOrStdout(), "no exemptions")
		return err
	}
	var b strings.Builder
	for i := range list {
		x := &list[i]
		fmt.Fprintf(&b, "%s %s: %s of tenant %s", x.ID, strings.ReplaceAll(string(x.State), "_", " "), cli.OneLine(x.Target.String()), cli.OneLine(x.Target.Tenant))
		if x.Global {
			b.WriteString(", from what is decided on everything, too")
		}
		if !x.Expires.IsZero() {
			fmt.Fprintf(&b, ", until %s", x.Expires.UTC().Format(time.RFC3339))
		}
		fmt.Fprintf(&b, "\n  of %s: %s\n", cli.OneLine(x.Owner), cli.OneLine(x.Reason))
		if x.State == authority.ExemptionDeclared {
			fmt.Fprintf(&b, "  declared by %s; it does NOT count until another commander approves it: session-authority exemptions approve %s\n", cli.OneLine(x.By), x.ID)
		}
	}
	_, err = fmt.Fprint(cmd.OutOrStdout(), b.String())
	return err
}
