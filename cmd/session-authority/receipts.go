package main

import (
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/interlock-fabric/interlock/internal/audit"
	"github.com/interlock-fabric/interlock/internal/cli"
)

func newReceiptsCommand(g *globals) *cobra.Command {
	cmd := &cobra.Command{
		Use: "receipts", Aliases: []string{"receipt"}, Short: "Export and verify what enforcers signed", RunE: cli.Subcommands,
		Long: `Every enforcer signs, with a key of its own, when it has put a decision in force.
These receipts are in the audit, can be exported for an incident, and be verified
offline by whoever has the root's public key.`,
	}
	cmd.AddCommand(newReceiptsExportCommand(g), newReceiptsVerifyCommand(g))
	return cmd
}

func newReceiptsExportCommand(g *globals) *cobra.Command {
	var incident, path string
	var epoch, number uint64
	cmd := &cobra.Command{
		Use: "export --incident ID | --seq NUMBER", Short: "Write the receipts of decisions", Args: cli.NoArgs,
		Long: `Writes the receipts that say where, and when, the decisions of an incident were
applied, or one decision, as JSON lines: with the enforcers' keys, signed by the
authority. The file is made with mode 0600.`,
		Example: "  session-authority receipts export --incident INC-142 --out receipts.jsonl\n  session-authority receipts export --seq 48213 | session-authority receipt verify -",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if (incident == "") == (number == 0) {
				return cli.Usagef("give either --incident or --seq")
			}
			c, err := g.client()
			if err != nil {
				return err
			}
			defer c.Close()
			if number != 0 && epoch == 0 {
				st, err := c.Status(cmd.Context())
				if err != nil {
					return err
				}
				epoch = st.Epoch
			}
			return writeOut(cmd, path, func(w io.Writer) error { return c.ExportReceipts(cmd.Context(), incident, epoch, number, w) })
		},
	}
	f := cmd.Flags()
	f.StringVar(&incident, "incident", "", "of the decisions of this incident")
	f.Uint64Var(&number, "seq", 0, "of the decision at this place of the log")
	f.Uint64Var(&epoch, "epoch", 0, "the epoch of --seq; default is the current one")
	f.StringVar(&path, "out", "", "write to this new file instead of printing")
	return cmd
}

func newReceiptsVerifyCommand(g *globals) *cobra.Command {
	var p pinned
	cmd := &cobra.Command{
		Use: "verify FILE", Short: "Verify exported receipts, offline", Args: cli.OneArg("the export, or - for the standard input"),
		Long: `Verifies what receipts export wrote, with nothing but the root's public key, and
says who applied what, and when. It ends with exit code 1 if a receipt, or anything
else in the file, is not as it was signed.

An enforcer without a receipt may have denied by itself, or applied the decision
and not been heard: coverage, in the audit and in incident report, says which.`,
		Example: "  session-authority receipt verify receipts.jsonl --root root.pub",
		RunE: func(cmd *cobra.Command, args []string) error {
			return p.verify(cmd, g, args[0], func(r io.Reader, root, newer []byte) error {
				rep, err := audit.VerifyReceipts(r, root, newer)
				if err != nil {
					return err
				}
				if g.json {
					err = cli.PrintJSON(cmd.OutOrStdout(), rep)
				} else {
					_, err = io.WriteString(cmd.OutOrStdout(), receiptsText(rep))
				}
				if err == nil && !rep.Sound {
					err = cli.Exit(exitFailed, nil)
				}
				return err
			})
		},
	}
	p.flags(cmd)
	return cmd
}

func receiptsText(r *audit.ReceiptsReport) string {
	if !r.Sound {
		return "NOT SOUND\n" + faultsText(r.Faults, r.More)
	}
	var b strings.Builder
	fmt.Fprintf(&b, "sound: %s, as key %s signed them at %s\n", count(r.Receipts, "receipt"), r.Key, r.Signed.Format(time.RFC3339))
	for i := range r.Decisions {
		d := &r.Decisions[i]
		fmt.Fprintf(&b, "%s at seq %d of epoch %d, %s", cli.OneLine(d.Operation), d.Number, d.Epoch, d.At.Format(stamp))
		if d.Incident != "" {
			fmt.Fprintf(&b, ", %s", cli.OneLine(d.Incident))
		}
		if d.Drill {
			b.WriteString(" (drill)")
		}
		fmt.Fprintf(&b, ": applied by %d of %s\n", len(d.Applied), count(len(d.Applied)+len(d.Silent), "enforcer"))
		for _, a := range d.Applied {
			fmt.Fprintf(&b, "  %s at %s, after %s ms, give or take %s ms", a.Enforcer, a.At.Format(stamp), trimFloat(a.LatencyMillis), trimFloat(a.ErrorMillis))
			if a.Cut > 0 {
				fmt.Fprintf(&b, "; %s cut", count(int(a.Cut), "running call"))
			}
			if a.Mode != "strict" {
				fmt.Fprintf(&b, "; %s", a.Mode)
			}
			b.WriteString("\n")
		}
		if len(d.Silent) > 0 {
			fmt.Fprintf(&b, "  no receipt: %s\n", strings.Join(d.Silent, ", "))
		}
	}
	return b.String()
}

// stamp is how moments are printed.
const stamp = "2006-01-02T15:04:05.000Z07:00"
