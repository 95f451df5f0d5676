package main

import (
	"fmt"
	"strings"
	"time"

	"github.com/interlock-fabric/interlock/internal/cli"
	"github.com/interlock-fabric/interlock/pkg/authority"
)

// outcome is what a verb prints with --json.
type outcome struct {
	Decision *authority.Decision `json:"decision"`
	Coverage *authority.Coverage `json:"coverage,omitempty"`
}

func (o *outcome) durable() bool {
	return o.Decision.Durable || o.Coverage != nil && o.Coverage.Durable
}

func (o *outcome) text(v verb, r *authority.Request, now time.Time) string {
	d, c := o.Decision, o.Coverage
	if p := d.Preview; p != nil {
		var b strings.Builder
		for _, w := range p.Would {
			fmt.Fprintf(&b, "would %s\n", cli.OneLine(w))
		}
		if n := p.Targets - len(p.Would); n > 0 {
			fmt.Fprintf(&b, "and %s more\n", count(n, "target"))
		}
		for _, t := range p.Tenants {
			fmt.Fprintf(&b, "touches %s and %s of tenant %s, on %s\n", count(t.Agents, "agent"), count(t.Sessions, "live session"), t.Tenant, count(t.Enforcers, "enforcer"))
		}
		b.WriteString(sparedText(p))
		fmt.Fprintf(&b, "on %s with %s; add --commit to do it\n", count(p.Enforcers, "enforcer"), count(int(p.Running), "running call"))
		return b.String()
	}
	var parts []string
	done := v.done
	if s := d.Restore; s != nil && d.Operation == authority.Restore && s.Taken > 0 {
		done += " " + s.Stages[s.Taken-1]
	}
	if r.Share > 0 && r.Share < 100 {
		done += fmt.Sprintf(" %g%%", r.Share)
	}
	if r.Drill {
		done = "drill: " + done
	}
	first := fmt.Sprintf("%s at seq %d", done, d.Number)
	if d.Duplicate {
		first += " (already, under the same idempotency key)"
	}
	if n := len(d.Exempted); n > 0 {
		first += fmt.Sprintf(", %d exempt", n)
	}
	parts = append(parts, first)
	if c != nil {
		parts = append(parts, coverageText(c, now)...)
	}
	if !o.durable() {
		parts = append(parts, "not durable yet")
	}
	text := strings.Join(parts, "; ") + "\n"
	if d.Restore != nil {
		text += restoreText(d.Restore, now)
	}
	return text
}

// sparedText says whom a decision does not touch, one line each.
func sparedText(p *authority.Preview) string {
	if len(p.Spared) == 0 {
		return ""
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%d exempt: %s go on\n", len(p.Spared), count(p.SparedSessions, "live session"))
	for _, s := range p.Spared {
		fmt.Fprintf(&b, "  %s, %s", cli.OneLine(s.Target), count(s.Sessions, "live session"))
		if s.Exemption != "" {
			fmt.Fprintf(&b, " (%s, of %s)", s.Exemption, cli.OneLine(s.Owner))
		}
		b.WriteByte('\n')
	}
	return b.String()
}

// coverageText says where a decision is in force, against the roster.
func coverageText(c *authority.Coverage, now time.Time) []string {
	if c.Enforcers == 0 {
		return []string{"no enforcers are enrolled"}
	}
	s := fmt.Sprintf("in effect on %d of %s", c.InEffect, count(c.Enforcers, "enforcer"))
	if c.SlowestMillis > 0 {
		s += fmt.Sprintf(", slowest %s ms", trimFloat(c.SlowestMillis))
	}
	parts := []string{s}
	named := func(n int, what string, pick func(*authority.EnforcerCoverage) string) {
		if n == 0 {
			return
		}
		var who []string
		for i := range c.Detail {
			if s := pick(&c.Detail[i]); s != "" {
				who = append(who, s)
			}
		}
		s := fmt.Sprintf("%d %s", n, what)
		if len(who) > 3 {
			who = append(who[:3], "…")
		}
		if len(who) > 0 {
			s += " (" + strings.Join(who, ", ") + ")"
		}
		parts = append(parts, s)
	}
	in := func(state authority.EnforcerState) func(*authority.EnforcerCoverage) string {
		return func(e *authority.EnforcerCoverage) string {
			if e.State != state {
				return ""
			}
			return e.Name
		}
	}
	if c.Cut > 0 {
		parts = append(parts, fmt.Sprintf("%s cut", count(int(c.Cut), "running call")))
	}
	named(c.Denying, "silent, denying everything", func(e *authority.EnforcerCoverage) string {
		if e.State != authority.StateDenying {
			return ""
		}
		return fmt.Sprintf("%s: since %s", e.Name, ago(now, e.DenyingSince))
	})
	named(c.Exposed, "exposed", func(e *authority.EnforcerCoverage) string {
		if e.State != authority.StateExposed {
			return ""
		}
		return e.Name + ": " + e.Mode
	})
	named(c.Pending, "not heard from yet", in(authority.StatePending))
	named(c.Absent, "never heard of", in(authority.StateAbsent))
	// Best-effort ones that have it are in effect, and would be exposed if they
	// lost the bus.
	n := 0
	for i := range c.Detail {
		if c.Detail[i].State == authority.StateApplied && c.Detail[i].Mode == "best-effort" {
			n++
		}
	}
	if n > 0 {
		parts = append(parts, fmt.Sprintf("%d of these would fail open", n))
	}
	return parts
}

func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%s %ss", thousands(n), what)
}

func thousands(n int) string {
	s := fmt.Sprint(n)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}

func trimFloat(f float64) string {
	return strings.TrimSuffix(fmt.Sprintf("%.1f", f), ".0")
}

func ago(now, t time.Time) string {
	d := max(0, now.Sub(t))
	if d < time.Minute {
		return fmt.Sprintf("%.1f s", d.Seconds())
	}
	return d.Round(time.Second).String()
}
