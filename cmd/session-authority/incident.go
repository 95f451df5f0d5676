package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/interlock-fabric/interlock/internal/cli"
	"github.com/interlock-fabric/interlock/pkg/authority"
)

// Bounds of a report.
const (
	maxIncident = 10_000 // records of the incident
	maxCalls    = 10_000 // calls of those whom it revoked
	maxSearched = 200    // callers whose calls are searched for
	maxShown    = 200    // calls that the Markdown shows
)

func newIncidentCommand(g *globals) *cobra.Command {
	cmd := &cobra.Command{Use: "incident", Short: "Report on an incident", RunE: cli.Subcommands}
	var since string
	report := &cobra.Command{
		Use: "report ID", Short: "Say what was decided, where it held, and what came before", Args: cli.OneArg("the incident's id"),
		Long: `Writes, from the audit, what an incident needs said: who decided what and when, where
and how fast it was in force, which enforcers were silent and since when they denied
by themselves, how many running calls were cut, and, with --since, what the callers
that it revoked did between that moment and the decision. It is Markdown, or data
with --json.

Enforcers record every call that they deny or cut, and of those that they allow the
share that is configured: what is not in the report may have happened all the same.`,
		Example: "  session-authority incident report INC-142 --since 09:00Z > INC-142.md\n  session-authority incident report INC-142 --json | jq '.decisions[].coverage.slowest_millis'",
		RunE: func(cmd *cobra.Command, args []string) error {
			now := time.Now()
			from, err := parseMoment("since", since, now)
			if err != nil {
				return err
			}
			c, err := g.client()
			if err != nil {
				return err
			}
			defer c.Close()
			r, err := gatherIncident(cmd.Context(), c, args[0], from, now)
			if err != nil {
				return err
			}
			if g.json {
				return cli.PrintJSON(cmd.OutOrStdout(), r)
			}
			_, err = io.WriteString(cmd.OutOrStdout(), r.markdown())
			return err
		},
	}
	report.Flags().StringVar(&since, "since", "", "when the compromise began, as far as is known; as in 2h, 09:00Z or 2026-11-22T09:00:00Z")
	cmd.AddCommand(report)
	return cmd
}

// incident is the report on one.
type incident struct {
	Incident string    `json:"incident"`
	At       time.Time `json:"at"`
	// Since is when the compromise began, as far as is known.
	Since     time.Time          `json:"since,omitzero"`
	Timeline  []moment           `json:"timeline"`
	Decisions []incidentDecision `json:"decisions"`
	// Before are the calls of those whom it revoked, from Since to the decision;
	// After are those that were denied or cut for it.
	Before []incidentCall `json:"before"`
	After  []incidentCall `json:"after"`
	// Notes are what the report leaves out, and why.
	Notes []string `json:"notes"`
}

type moment struct {
	At   time.Time `json:"at"`
	What string    `json:"what"`
	By   string    `json:"by,omitempty"`
	// Record is the number of the record of the audit.
	Record uint64 `json:"record,omitempty"`
}

type incidentDecision struct {
	Record    uint64                  `json:"record"`
	At        time.Time               `json:"at"`
	By        string                  `json:"by"`
	Operation string                  `json:"operation"`
	Targets   []string                `json:"targets"`
	Callers   []authority.AuditCaller `json:"callers"`
	Reason    string                  `json:"reason,omitempty"`
	Epoch     uint64                  `json:"epoch"`
	Sequence  uint64                  `json:"seq"`
	Drill     bool                    `json:"drill,omitempty"`
	// Coverage is where it was in force as the audit has it, a while after it, and
	// Now as the authority knows it now; absent where neither does.
	Coverage *authority.Coverage `json:"coverage,omitempty"`
	Now      *authority.Coverage `json:"coverage_now,omitempty"`
}

// incidentCall is a call, or several of the same.
type incidentCall struct {
	Record uint64 `json:"record"`
	authority.TrailRecord
}

// coverage is the best that is known.
func (d *incidentDecision) coverage() *authority.Coverage {
	// The authority may have been started since: it knows less then.
	if d.Now != nil && (d.Coverage == nil || d.Now.InEffect >= d.Coverage.InEffect && d.Now.SlowestMillis > 0) {
		return d.Now
	}
	return d.Coverage
}

func gatherIncident(ctx context.Context, c *authority.Client, id string, since, now time.Time) (*incident, error) {
	since = since.Truncate(time.Millisecond) // as the trail's times are
	r := &incident{Incident: id, At: now.UTC(), Since: since.UTC(), Timeline: []moment{}, Decisions: []incidentDecision{}, Before: []incidentCall{}, After: []incidentCall{}, Notes: []string{}}
	type at struct{ epoch, seq uint64 }
	measured := map[at]*authority.Coverage{}
	n := 0
	err := eachRecord(ctx, c, authority.AuditQuery{Incident: id}, func(e *authority.AuditEntry) (bool, error) {
		r.take(e)
		if e.Coverage != nil {
			measured[at{e.Epoch, e.Sequence}] = e.Coverage
		}
		if n++; n == maxIncident {
			r.note("the audit has more than %d records of the incident: older ones are left out", maxIncident)
		}
		return n < maxIncident, nil
	})
	if err != nil {
		return nil, err
	}
	if len(r.Timeline) == 0 && len(r.After) == 0 {
		return nil, authority.NewProblem(authority.ProblemNotFound, fmt.Sprintf("the audit has nothing of incident %.64q", id), "see session-authority audit list")
	}
	if !since.IsZero() {
		r.Timeline = append(r.Timeline, moment{At: since.UTC(), What: "the compromise began, as far as is known"})
	}
	for i := range r.Decisions {
		d := &r.Decisions[i]
		d.Coverage = measured[at{d.Epoch, d.Sequence}]
		var p *authority.Problem
		switch d.Now, err = c.Coverage(ctx, d.Epoch, d.Sequence, 0); {
		case err == nil:
		case errors.As(err, &p):
			d.Now = nil // another epoch's
		default:
			return nil, err
		}
		if cov := d.coverage(); cov != nil && cov.SlowestMillis > 0 {
			r.Timeline = append(r.Timeline, moment{
				At:   d.At.Add(time.Duration(cov.SlowestMillis * float64(time.Millisecond))),
				What: fmt.Sprintf("seq %d was in force on %d of %s, %s cut", d.Sequence, cov.InEffect, count(cov.Enforcers, "enforcer"), count(int(cov.Cut), "running call")),
			})
		}
	}
	if !since.IsZero() {
		if err := r.search(ctx, c, since); err != nil {
			return nil, err
		}
	}
	slices.SortStableFunc(r.Timeline, func(a, b moment) int { return a.At.Compare(b.At) })
	slices.SortStableFunc(r.Decisions, func(a, b incidentDecision) int { return a.At.Compare(b.At) })
	byTime := func(a, b incidentCall) int { return a.First.Compare(b.First) }
	slices.SortStableFunc(r.Before, byTime)
	slices.SortStableFunc(r.After, byTime)
	return r, nil
}

func (r *incident) note(format string, a ...any) {
	if s := fmt.Sprintf(format, a...); !slices.Contains(r.Notes, s) {
		r.Notes = append(r.Notes, s)
	}
}

// take takes a record of the incident.
func (r *incident) take(e *authority.AuditEntry) {
	for _, t := range e.Trail {
		if t.Decision != "allowed" && len(r.After) < maxCalls {
			r.After = append(r.After, incidentCall{e.Number, t})
		}
	}
	if e.Kind != authority.AuditDecision {
		return
	}
	by := e.Principal.Name
	if by == "" {
		by = e.Principal.Means
	}
	what := e.Action
	if e.Drill {
		what = "drill: " + what
	}
	if len(e.Targets) > 0 {
		what += " " + e.Targets[0]
	}
	if n := len(e.Targets) + e.Left; n > 1 {
		what += fmt.Sprintf(" and %s more", count(n-1, "target"))
	}
	when := e.Time
	switch {
	case e.Outcome == authority.OutcomeDone && e.Duplicate:
		what += fmt.Sprintf(" (again, as at seq %d)", e.Sequence)
	case e.Outcome == authority.OutcomeDone:
		what += fmt.Sprintf(" at seq %d", e.Sequence)
		when = cmp.Or(e.Decided, e.Time)
	default:
		what += ": " + e.Outcome
	}
	if e.Error != "" {
		what += ", " + e.Error
	}
	r.Timeline = append(r.Timeline, moment{when, what, by, e.Number})
	if e.Outcome == authority.OutcomeDone && !e.Duplicate {
		r.Decisions = append(r.Decisions, incidentDecision{
			Record: e.Number, At: when, By: by, Operation: e.Action, Targets: e.Targets, Callers: e.Callers,
			Reason: e.Reason, Epoch: e.Epoch, Sequence: e.Sequence, Drill: e.Drill,
		})
	}
}

// search finds what the callers that were revoked did between since and the
// decision, or the moment in which the slowest enforcer had it.
func (r *incident) search(ctx context.Context, c *authority.Client, since time.Time) error {
	until := map[authority.AuditCaller]time.Time{}
	for i := range r.Decisions {
		d := &r.Decisions[i]
		if d.Drill || authority.Operation(d.Operation).Lifts() {
			continue
		}
		end := d.At
		if cov := d.coverage(); cov != nil {
			end = end.Add(time.Duration(cov.SlowestMillis * float64(time.Millisecond)))
		}
		if len(d.Callers) < len(d.Targets) {
			r.note("the audit names fewer callers than the decision at seq %d has targets", d.Sequence)
		}
		for _, x := range d.Callers {
			if x.Agent == authority.AuditAny && x.User == authority.AuditAny && x.Client == "" && x.Session == "" {
				r.note("what everybody did whom the decision at seq %d is about is not searched for: it names no user, agent, client or session", d.Sequence)
				continue
			}
			if t, known := until[x]; !known || end.Before(t) {
				until[x] = end
			}
		}
	}
	some := func(s string) string {
		if s == authority.AuditAny {
			return ""
		}
		return s
	}
	seen := map[string]bool{}
	searched := 0
	for x, end := range until {
		if searched++; searched > maxSearched {
			r.note("of the %d callers that were revoked, the calls of %d were searched for", len(until), maxSearched)
			break
		}
		// A report comes after its calls.
		q := authority.AuditQuery{Kind: authority.AuditReport, Tenant: some(x.Tenant), Agent: some(x.Agent), User: some(x.User), Client: x.Client, Session: x.Session, Since: since}
		err := eachRecord(ctx, c, q, func(e *authority.AuditEntry) (bool, error) {
			if e.Report != nil && e.Report.Withheld > 0 {
				r.note("enforcer %s reported more calls than the audit keeps", e.Report.Enforcer)
			}
			for i, t := range e.Trail {
				key := fmt.Sprint(e.Number, " ", t.First.UnixNano(), " ", t.Tool, " ", t.User, " ", t.Session, " ", t.Decision, " ", i)
				if t.Last.Before(since) || t.First.After(end) || seen[key] || t.Incident == r.Incident {
					continue
				}
				seen[key] = true
				r.Before = append(r.Before, incidentCall{e.Number, t})
			}
			if len(r.Before) >= maxCalls {
				r.note("there are more than %d calls before the decisions: the rest are left out", maxCalls)
			}
			return len(r.Before) < maxCalls, nil
		})
		if err != nil {
			return err
		}
	}
	r.note("enforcers record a sample of the calls that they allow, and all that they deny or cut")
	return nil
}

// cell keeps what others wrote from becoming Markdown.
func cell(s string) string {
	return strings.NewReplacer("\\", "\\\\", "|", "\\|", "<", "&lt;", "`", "\\`", "[", "\\[", "*", "\\*", "_", "\\_").Replace(cli.OneLine(s))
}

func (r *incident) markdown() string {
	var b strings.Builder
	line := func(format string, a ...any) { fmt.Fprintf(&b, format+"\n", a...) }
	line("# Incident %s\n", cell(r.Incident))
	line("As of %s, from the audit of the Session Authority.\n", r.At.Format(stamp))
	line("## Timeline\n\n| when | what | who | record |\n|---|---|---|---|")
	for _, m := range r.Timeline {
		record := ""
		if m.Record > 0 {
			record = fmt.Sprint(m.Record)
		}
		line("| %s | %s | %s | %s |", m.At.UTC().Format(stamp), cell(m.What), cell(m.By), record)
	}
	line("\n## Where it was in force\n")
	if len(r.Decisions) == 0 {
		line("Nothing was decided.")
	}
	for i := range r.Decisions {
		d := &r.Decisions[i]
		line("### %s at seq %d of epoch %d\n", cell(d.Operation), d.Sequence, d.Epoch)
		c := d.coverage()
		if c == nil {
			line("Not known: neither the audit nor the authority has measured it.\n")
			continue
		}
		line("- %s", cell(strings.Join(coverageText(c, r.At), "; ")))
		if s := slowest(c); s != nil {
			line("- slowest: %s, after %s ms", s.Name, trimFloat(s.LatencyMillis))
		}
		line("- cut: %s", count(int(c.Cut), "running call"))
		for _, e := range c.Detail {
			switch {
			case e.State == authority.StateApplied:
			case !e.DenyingSince.IsZero():
				line("- %s: no receipt; denying everything since %s at the latest", e.Name, e.DenyingSince.Format(stamp))
			case e.State == authority.StateAbsent:
				line("- %s: enrolled, and never heard of", e.Name)
			case e.State == authority.StateExposed:
				line("- **%s: exposed (%s): it may have let callers through**", e.Name, e.Mode)
			default:
				line("- %s: no receipt; last heard of at %s", e.Name, e.LastHeard.Format(stamp))
			}
		}
		line("")
	}
	calls := func(list []incidentCall) {
		line("| when | until | times | decision | tool | agent | user | session | enforcer |\n|---|---|---|---|---|---|---|---|---|")
		for i, t := range list {
			if i == maxShown {
				line("\nand %d more, in `--json`", len(list)-maxShown)
				break
			}
			var agents []string
			for _, a := range t.Actors {
				agents = append(agents, a.ID)
			}
			line("| %s | %s | %d | %s | %s | %s | %s | %s | %s |", t.First.UTC().Format(stamp), t.Last.UTC().Format(stamp), t.Count, t.Decision, cell(cmp.Or(t.Tool, t.Method)),
				cell(cmp.Or(strings.Join(agents, " < "), "none")), cell(cmp.Or(t.User, "none")), cell(t.Session), t.Enforcer)
		}
		line("")
	}
	line("## What those who were revoked did before\n")
	switch {
	case r.Since.IsZero():
		line("Not searched for: give `--since`, when the compromise began.\n")
	case len(r.Before) == 0:
		line("No call of theirs since %s is on record.\n", r.Since.Format(stamp))
	default:
		line("Since %s, until each of them was cut off:\n", r.Since.Format(stamp))
		calls(r.Before)
	}
	line("## What was denied and cut for it\n")
	if len(r.After) == 0 {
		line("No such call is on record.\n")
	} else {
		calls(r.After)
	}
	if len(r.Notes) > 0 {
		line("## What this report leaves out\n")
		for _, n := range r.Notes {
			line("- %s", cell(n))
		}
	}
	return b.String()
}

func slowest(c *authority.Coverage) (s *authority.EnforcerCoverage) {
	for i := range c.Detail {
		if e := &c.Detail[i]; e.LatencyMillis > 0 && (s == nil || e.LatencyMillis > s.LatencyMillis) {
			s = e
		}
	}
	return s
}
