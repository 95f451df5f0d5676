package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/interlock-fabric/interlock/internal/cli"
	"github.com/interlock-fabric/interlock/pkg/authority"
)

func newStatusCommand(g *globals) *cobra.Command {
	var wait time.Duration
	cmd := &cobra.Command{
		Use: "status", Short: "Show how the authority and its enforcers are", Args: cli.NoArgs,
		Long: `Shows how the authority and its enforcers are. With --wait, it does so once the
authority answers and every enforcer in the roster is fresh; if that takes longer,
it shows what there is, and ends with exit code 1, or 4 if nothing answers.`,
		Example: "  session-authority status\n  session-authority status --wait 30s\n  session-authority status --json | jq .enforcers",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if wait < 0 {
				return cli.Usagef("--wait %s is in the past: give how long to wait, or 0 not to wait", wait)
			}
			c, err := g.client()
			if err != nil {
				return err
			}
			defer c.Close()
			s, ready, err := statusWithin(cmd.Context(), c, wait)
			if err != nil {
				return err
			}
			if g.json {
				err = cli.PrintJSON(cmd.OutOrStdout(), s)
			} else {
				_, err = fmt.Fprint(cmd.OutOrStdout(), statusText(s))
			}
			if err == nil && wait > 0 && !ready {
				return cli.Exit(exitFailed, nil)
			}
			return err
		},
	}
	cmd.Flags().DurationVar(&wait, "wait", 0, "how long to wait until every enforcer is fresh; 0 does not wait")
	return cmd
}

// statusWithin asks again and again until every enforcer is fresh, for as long as
// wait. It returns the last answer.
func statusWithin(ctx context.Context, c *authority.Client, wait time.Duration) (s *authority.Status, ready bool, err error) {
	end := time.After(wait)
	for {
		s, err = c.Status(ctx)
		ready = err == nil && s.Enforcers.Fresh == s.Enforcers.Enrolled
		if ready || wait <= 0 || err != nil && !errors.Is(err, authority.ErrUnreachable) {
			return s, ready, err
		}
		select {
		case <-ctx.Done():
			return s, ready, cmp.Or(err, ctx.Err())
		case <-end:
			return s, ready, err
		case <-time.After(statusPoll):
		}
	}
}

// statusPoll is how often a status that is waited for is asked for.
const statusPoll = 100 * time.Millisecond

func statusText(s *authority.Status) string {
	var b strings.Builder
	e := s.Enforcers
	parts := []string{fmt.Sprintf("%d fresh", e.Fresh)}
	for _, p := range []struct {
		n    int
		what string
	}{{e.Denying, "denying"}, {e.Silent, "silent"}, {e.Absent, "never heard of"}, {e.Exposed, "exposed"}, {e.Armed, "armed"}, {e.Unarmed, "NOT ARMED"}} {
		if p.n > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", p.n, p.what))
		}
	}
	if e.Enrolled == 0 {
		b.WriteString("no enforcers are enrolled\n")
	} else {
		fmt.Fprintf(&b, "%s: %s\n", count(e.Enrolled, "enforcer"), strings.Join(parts, ", "))
	}
	for _, x := range s.NotFresh {
		switch {
		case x.LastHeard.IsZero():
			fmt.Fprintf(&b, "  %s: never heard of\n", x.Name)
		case x.DenyingSince.IsZero():
			fmt.Fprintf(&b, "  %s: %s for %s, and may allow what it should deny (%s)\n", x.Name, x.Condition, ago(s.Time, x.LastHeard), x.Mode)
		case x.Condition == authority.ConditionDenying:
			fmt.Fprintf(&b, "  %s: denying everything, by its last receipt\n", x.Name)
		default:
			fmt.Fprintf(&b, "  %s: %s for %s, denying since %s\n", x.Name, x.Condition, ago(s.Time, x.LastHeard), ago(s.Time, x.DenyingSince))
		}
	}
	if t := s.TimeToRevoke; t != nil {
		fmt.Fprintf(&b, "time to revoke: at most %.1f ms (%s), target %g ms\n", t.SlowestMillis, t.Slowest, t.TargetMillis)
	}
	role := "not the writer"
	if s.Writer {
		role = "writing"
	}
	fmt.Fprintf(&b, "%s; epoch %d, seq %d; %s in force\n", role, s.Epoch, s.Number, entries(s.Entries))
	if s.Segment > 0 {
		fmt.Fprintf(&b, "newest segment at seq %d, %s; the log begins at seq %d\n", s.Segment, ago(s.Time, s.SegmentTime), s.LogFrom)
	}
	if r := s.Registry; r != nil {
		fmt.Fprintf(&b, "registry: %s, %s, %.1f MiB\n", count(r.Agents, "agent"), count(r.Sessions, "session"), float64(r.Bytes)/(1<<20))
	}
	fmt.Fprintf(&b, "key set %d, until %s; tenants %s\n", s.KeySet.Version, s.KeySet.NotAfter.Format(time.DateOnly), strings.Join(s.Tenants, ", "))
	if len(s.Kills) > 0 {
		fmt.Fprintf(&b, "KILLED: %s\n", strings.Join(s.Kills, ", "))
	}
	for _, k := range s.KillsInForce {
		sessions := 0
		for _, x := range k.Spared {
			sessions += x.Sessions
		}
		if k.Exempt > 0 {
			fmt.Fprintf(&b, "  %s: %d exempt, with %s\n", k.Target, k.Exempt, count(sessions, "live session"))
		}
	}
	for i := range s.Restores {
		b.WriteString(restoreText(&s.Restores[i], s.Time))
	}
	for _, w := range s.Warnings {
		fmt.Fprintf(&b, "warning: %s\n", cli.OneLine(w))
	}
	return b.String()
}

func entries(n int) string {
	if n == 1 {
		return "1 entry"
	}
	return thousands(n) + " entries"
}

func newWatchCommand(g *globals) *cobra.Command {
	var events int
	cmd := &cobra.Command{
		Use: "watch", Short: "Follow decisions, their coverage, and enforcers that come and go", Args: cli.NoArgs,
		Example: "  session-authority watch\n  session-authority watch --json | jq 'select(.type == \"coverage\")'",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if events < 0 {
				return cli.Usagef("--events %d is negative: give how many to wait for, or 0", events)
			}
			c, err := g.client()
			if err != nil {
				return err
			}
			defer c.Close()
			n := 0
			for e, err := range c.Watch(cmd.Context()) {
				if err != nil {
					if cmd.Context().Err() != nil {
						return nil // interrupted
					}
					return err
				}
				if g.json {
					err = cli.PrintJSON(cmd.OutOrStdout(), e)
				} else {
					_, err = fmt.Fprintln(cmd.OutOrStdout(), eventText(&e))
				}
				if err != nil {
					return err
				}
				if n++; n == events {
					return nil
				}
			}
			return nil
		},
	}
	cmd.Flags().IntVar(&events, "events", 0, "end after so many; 0 goes on")
	return cmd
}

func eventText(e *authority.Event) string {
	at := e.At.Format("15:04:05.000Z07:00")
	switch {
	case e.Decision != nil:
		var parts []string
		for _, l := range e.Decision.Lines {
			s := fmt.Sprintf("%s %s on %s", l.Operation, l.Effect, count(l.Count, l.On))
			if l.Tenant != "" {
				s += " of " + l.Tenant
			}
			s += ": " + l.Reason
			if l.Incident != "" {
				s += ", " + l.Incident
			}
			if l.Drill {
				s += " (drill)"
			}
			parts = append(parts, s)
		}
		return cli.OneLine(fmt.Sprintf("%s seq %d: %s", at, e.Decision.Number, strings.Join(parts, "; ")))
	case e.Coverage != nil:
		return fmt.Sprintf("%s seq %d: %s", at, e.Coverage.Number, strings.Join(coverageText(e.Coverage, e.At), "; "))
	case e.Enforcer != nil:
		return fmt.Sprintf("%s enforcer %s: %s", at, e.Enforcer.Name, e.Enforcer.Condition)
	}
	return at + " " + cli.OneLine(e.Type)
}
