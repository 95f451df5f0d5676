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

// defaultHold is how long a stage is held where nothing else is said.
const defaultHold = 5 * time.Minute

func newRestoresCommand(g *globals) *cobra.Command {
	return &cobra.Command{
		Use: "restores", Short: "Show staged restores, and what to watch meanwhile", Args: cli.NoArgs,
		Long: `Shows the staged restores that are under way, and those that ended in the last day:
which stage is held, until when, and what enforcers have denied and allowed since.
What no stage has set free is killed, whatever happens to the authorities.`,
		Example: "  session-authority restores\n  session-authority restore global --abort",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return g.with(func(c *authority.Client) error {
				list, err := c.Restores(cmd.Context())
				if err != nil {
					return err
				}
				if g.json {
					return cli.PrintJSON(cmd.OutOrStdout(), map[string]any{"restores": list})
				}
				if len(list) == 0 {
					_, err = fmt.Fprintln(cmd.OutOrStdout(), "no staged restores")
					return err
				}
				for i := range list {
					if _, err := fmt.Fprint(cmd.OutOrStdout(), restoreText(&list[i], time.Now())); err != nil {
						return err
					}
				}
				return nil
			})
		},
	}
}

// restoreText is a staged restore, in lines.
func restoreText(r *authority.StagedRestore, now time.Time) string {
	var b strings.Builder
	stage := "no stage yet"
	if r.Taken > 0 {
		stage = fmt.Sprintf("stage %d of %d (%s)", r.Taken, len(r.Stages), cli.OneLine(r.Stages[r.Taken-1]))
	}
	switch r.State {
	case authority.RestoreRunning:
		fmt.Fprintf(&b, "RESTORING %s, %s: %s", cli.OneLine(r.Target), r.ID, stage)
		if !r.Next.IsZero() {
			fmt.Fprintf(&b, "; %s in %s", cli.OneLine(r.Stages[r.Taken]), max(0, r.Next.Sub(now)).Round(time.Second))
		}
		fmt.Fprintf(&b, "; to kill again: session-authority restore %s --abort\n", cli.OneLine(r.Target))
	default:
		fmt.Fprintf(&b, "restore of %s, %s: %s after %s", cli.OneLine(r.Target), r.ID, r.State, stage)
		if r.Why != "" {
			b.WriteString(": " + cli.OneLine(r.Why))
		}
		b.WriteByte('\n')
	}
	if f := r.Figures; f != nil {
		fmt.Fprintf(&b, "  for %s: %s denied, %s allowed; %s; in effect on %d of %s, %d armed, %d not\n", ago(now, f.Since), count(int(f.Denied), "call"), thousands(int(f.Allowed)),
			count(int(f.Running), "running call"), f.InEffect, count(f.Enforcers, "enforcer"), f.Armed, f.Unarmed)
	}
	return b.String()
}

// abort ends the staged restore of a target, and kills again.
func abort(cmd *cobra.Command, g *globals, c *authority.Client, v verb, d *decisionFlags, r *authority.Request) error {
	for _, name := range []string{"staged", "share", "hold", "drill", "break-glass", "except", "no-exemptions"} {
		if f := cmd.Flags().Lookup(name); f != nil && f.Changed {
			return cli.Usagef("--abort kills again as the kill was: leave --%s out", name)
		}
	}
	list, err := c.Restores(cmd.Context())
	if err != nil {
		return err
	}
	target := r.Targets[0].String()
	i := slices.IndexFunc(list, func(x authority.StagedRestore) bool { return x.State == authority.RestoreRunning && x.Target == target })
	if i < 0 {
		return fmt.Errorf("no staged restore of %s is under way: see session-authority restores", cli.OneLine(target))
	}
	res, err := c.AbortRestore(cmd.Context(), list[i].ID)
	if err != nil {
		return err
	}
	v.done = "killed again"
	return report(cmd, g, c, v, d.wait, r, res)
}
