package main

import (
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/interlock-fabric/interlock/internal/cli"
	"github.com/interlock-fabric/interlock/pkg/authority"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// decisionFlags are the flags of the verbs that decide.
type decisionFlags struct {
	issuer, tenant, reason, incident, effect, acr, key string
	glass                                              string
	issuedBefore, until, share                         string
	exceptList                                         []string
	forTime, wait                                      time.Duration
	drill, commit, credentials, noExemptions, abort    bool
	stages                                             []string
	hold                                               time.Duration
}

type verb struct {
	op          authority.Operation
	use, short  string
	done        string
	long, other string
	flags       string // which optional flags it has
}

var verbs = []verb{
	{authority.Revoke, "revoke TARGET", "Deny for good", "revoked", `Denies the target for good, and ends what it has running. A session, token,
credential or key that was revoked never comes back; others can be restored.`,
		`  session-authority revoke session s_9f2c --reason stolen-token
  session-authority revoke user alice --issued-before 09:00Z --reason compromised --incident INC-142 --commit
  session-authority revoke user alice and agent billing-bot --reason anomaly --incident INC-142 --commit
  session-authority revoke token JTI --reason logout --until 2026-12-01T00:00:00Z`, "issued-before until except"},
	{authority.Suspend, "suspend TARGET", "Deny until resumed", "suspended", `Denies the target until it is resumed, or until the end that is given.`,
		`  session-authority suspend agent spiffe://corp/agent/billing --for 30m --reason anomaly --incident INC-142 --commit
  session-authority suspend session s_9f2c --reason anomaly`, "until except"},
	{authority.StepUp, "step-up TARGET", "Deny until authenticated again", "step-up required", `Denies the target until the caller has authenticated again, after this decision,
with the authentication context that is required, if any (RFC 9470).`,
		`  session-authority step-up user alice --acr urn:example:phr --reason risk-level --incident INC-142 --commit`, "until except acr"},
	{authority.Reduce, "reduce TARGET", "Permit low-risk operations only", "reduced", `Denies the target every operation that its host has not marked low-risk.`,
		`  session-authority reduce agent billing-bot --issuer https://login.example --reason anomaly --incident INC-142 --commit`, "until except"},
	{authority.Resume, "resume TARGET", "Lift suspend, step-up and reduce", "resumed", `Lifts what suspends, steps up or reduces the target, or one of these. With a
share, that part of its sessions is set free, and the rest later.`,
		`  session-authority resume agent spiffe://corp/agent/billing --incident INC-142 --commit
  session-authority resume user alice --effect reduced --incident INC-142 --commit`, "effect share"},
	{authority.Kill, "kill global | kill tenant NAME", "Suspend everything", "killed", `Suspends everything, in one tenant or in all, and ends what is running, until it
is restored. With --credentials, what was issued before the restoring stays dead.`,
		`  session-authority kill global --reason compromised --incident INC-143 --commit
  session-authority kill tenant acme --except user:break-glass --reason anomaly --incident INC-143 --commit
  session-authority kill global --offline --key emergency.json --reason "agents run wild" --incident INC-143 --commit`, "except credentials"},
	{authority.Restore, "restore TARGET", "Lift a kill, or a revocation", "restored", `Lifts a kill, in stages if wanted; or the revocation of what can be restored,
which leaves everything issued before now dead. A session, token, credential or
key that was revoked never comes back.

With --staged the authority takes the stages by itself, and holds each for --hold:
shares of the sessions, and of a global kill also tenants. session-authority
restores shows what to watch meanwhile, and --abort kills again.`,
		`  session-authority restore global --share 10% --incident INC-143 --commit
  session-authority restore global --incident INC-143 --commit
  session-authority restore global --staged 1%,10%,50%,100% --hold 5m --incident INC-143 --commit
  session-authority restore global --staged acme,10%,100% --hold 5m --incident INC-143 --commit
  session-authority restore global --abort
  session-authority restore user alice --incident INC-142 --commit`, "share staged"},
}

func newDecisionCommands(g *globals) []*cobra.Command {
	var out []*cobra.Command
	for _, v := range verbs {
		out = append(out, newDecisionCommand(g, v))
	}
	return out
}

func newDecisionCommand(g *globals, v verb) *cobra.Command {
	d := &decisionFlags{}
	off := &offlineFlags{}
	long := v.long
	if v.op == authority.Kill {
		long += helpOffline
	}
	cmd := &cobra.Command{
		Use: v.use, Short: v.short, Example: v.other,
		Long: long + `

One session, token or key is acted on at once. Anything wider is previewed: the
command prints what it would do, and does it with --commit. A decision says why:
--reason and, where it takes --commit, --incident; on a terminal you are asked for
what is missing. What a target is: session-authority help targets.

` + helpExitCodes,
		Args: func(*cobra.Command, []string) error { return nil }, // read below, for a better answer
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := off.check(cmd); err != nil {
				return err
			}
			if off.offline {
				return off.run(cmd, g, d, args)
			}
			return decide(cmd, g, v, d, args)
		},
	}
	if v.op == authority.Kill {
		off.add(cmd)
	}
	f := cmd.Flags()
	f.StringVar(&d.issuer, "issuer", cli.Env("INTERLOCK_ISSUER", ""), "who minted the target's ids (INTERLOCK_ISSUER)")
	f.StringVar(&d.tenant, "tenant", cli.Env("INTERLOCK_TENANT", ""), "the tenant, where there is more than one (INTERLOCK_TENANT)")
	f.StringVar(&d.incident, "incident", "", "incident id, shown in every denial; required for whatever takes --commit, but in a drill")
	f.StringVar(&d.key, "idempotency-key", "", "a decision sent twice under one key is taken once")
	f.BoolVar(&d.drill, "drill", false, "match and report, but deny nobody")
	f.StringVar(&d.glass, "break-glass", "", "decide alone what takes two persons, and say why; everybody is told, and --incident is required")
	f.BoolVar(&d.commit, "commit", false, "do it, where it would only be previewed")
	f.DurationVar(&d.wait, "wait", authority.MaxWait, "how long to wait until every enforcer has it in force; 0 does not wait")
	f.Lookup("wait").NoOptDefVal = authority.MaxWait.String()
	f.StringVar(&d.reason, "reason", "", "why; required, but to lift and in a drill: one of "+strings.Join(authority.Reasons(), ", "))
	for _, name := range strings.Fields(v.flags) {
		switch name {
		case "issued-before":
			f.StringVar(&d.issuedBefore, name, "", "only identities from before: a time (RFC 3339), a time of today (09:00Z), how long ago (30m), or now")
		case "until":
			f.StringVar(&d.until, name, "", "when it ends (RFC 3339); for revoke, when the credential expires")
			f.DurationVar(&d.forTime, "for", 0, "the same, counted from now, as in 30m")
		case "except":
			f.StringArrayVar(&d.exceptList, name, nil, "a caller that is not touched, as in user:alice; may be repeated")
			f.BoolVar(&d.noExemptions, "no-exemptions", false, "on a whole tenant, or everything: spare none of those that are declared (session-authority exemptions)")
		case "acr":
			f.StringVar(&d.acr, name, "", "the authentication context that is required")
		case "effect":
			f.StringVar(&d.effect, name, "", "lift only suspended, step_up or reduced")
		case "share":
			f.StringVar(&d.share, name, "", "set this part of the sessions free, as in 25%")
		case "staged":
			f.StringSliceVar(&d.stages, name, nil, "lift a kill step by step, as in 1%,10%,100%; of a global one tenants before that, as in acme,100%")
			f.DurationVar(&d.hold, "hold", 0, "how long each stage is held (5m where there are stages)")
			f.BoolVar(&d.abort, "abort", false, "kill again what the staged restore of the target has set free")
		case "credentials":
			f.BoolVar(&d.credentials, name, false, "revoke the credentials there are: they stay dead after restoring")
		}
	}
	return cmd
}

// parseTarget reads KIND VALUE [and KIND VALUE ...].
func parseTarget(args []string, tenant, issuer string) (authority.Target, error) {
	t := authority.Target{Tenant: tenant}
	mend := `name a target like "session s_9f2c" or "user alice and agent bot": see session-authority help targets`
	for i := 0; ; i++ {
		if i >= len(args) {
			return t, cli.Usagef("no target: %s", mend)
		}
		kind, err := session.ParseKind(args[i])
		if err != nil {
			return t, cli.Usagef("unknown target kind %.64q: %s", args[i], mend)
		}
		term := authority.Term{Kind: args[i]}
		if kind == session.KindGlobal {
			t.Tenant = ""
		} else {
			if i++; i >= len(args) {
				return t, cli.Usagef("%s what? %s", kind, mend)
			}
			term.Value = args[i]
			if kind.Scoped() || kind == session.KindAgent {
				term.Issuer = issuer
			}
			if kind == session.KindTenant {
				t.Tenant = ""
			}
		}
		t.Terms = append(t.Terms, term)
		if i++; i >= len(args) {
			return t, nil
		}
		if args[i] != "and" {
			return t, cli.Usagef(`unexpected %.64q after the target: join targets with "and", and quote a value with spaces`, args[i])
		}
	}
}

// parseMoment reads a time in one of the forms of --issued-before.
func parseMoment(flag, s string, now time.Time) (time.Time, error) {
	if s == "" {
		return time.Time{}, nil
	}
	if s == "now" {
		return now, nil
	}
	if t, err := time.Parse(time.RFC3339Nano, s); err == nil {
		return t, nil
	}
	for _, layout := range []string{"15:04Z07:00", "15:04:05Z07:00"} {
		if c, err := time.Parse(layout, s); err == nil {
			today := now.In(c.Location())
			return time.Date(today.Year(), today.Month(), today.Day(), c.Hour(), c.Minute(), c.Second(), 0, c.Location()), nil
		}
	}
	if d, err := time.ParseDuration(s); err == nil && d > 0 {
		return now.Add(-d), nil
	}
	return time.Time{}, cli.Usagef("--%s %.64q is not a time: give one like 2026-11-22T09:00:00Z, 09:00Z or 30m", flag, s)
}

func parseShare(s string) (float64, error) {
	if s == "" {
		return 0, nil
	}
	n, ok := strings.CutSuffix(s, "%")
	v, err := strconv.ParseFloat(n, 64)
	if !ok || err != nil || v < 0.01 || v > 100 {
		return 0, cli.Usagef("--share %.64q is not a share: give one like 25%%, from 0.01%% to 100%%", s)
	}
	return v, nil
}

func (d *decisionFlags) request(op authority.Operation, args []string, now time.Time) (authority.Request, error) {
	r := authority.Request{
		Operation: op, Effect: d.effect, For: authority.Duration(d.forTime), Reason: d.reason, Incident: d.incident,
		ACR: d.acr, Credentials: d.credentials, NoExemptions: d.noExemptions, Stages: d.stages, Hold: authority.Duration(d.hold), Drill: d.drill, Commit: d.commit, BreakGlass: d.glass,
	}
	target, err := parseTarget(args, d.tenant, d.issuer)
	if err != nil {
		return r, err
	}
	r.Targets = []authority.Target{target}
	if r.IssuedBefore, err = parseMoment("issued-before", d.issuedBefore, now); err != nil {
		return r, err
	}
	if d.until != "" {
		if r.Expires, err = time.Parse(time.RFC3339Nano, d.until); err != nil {
			return r, cli.Usagef("--until %.64q is not a time: give one like 2026-11-22T09:00:00Z, or use --for 30m", d.until)
		}
	}
	if len(r.Stages) > 0 && r.Hold == 0 {
		r.Hold = authority.Duration(defaultHold)
	}
	if d.forTime < 0 {
		return r, cli.Usagef("--for %s is in the past: give a time to come", d.forTime)
	}
	if r.Share, err = parseShare(d.share); err != nil {
		return r, err
	}
	for _, x := range d.exceptList {
		kind, value, ok := strings.Cut(x, ":")
		if !ok {
			return r, cli.Usagef("--except %.64q names nobody: give one like user:alice", x)
		}
		t, err := parseTarget([]string{kind, value}, d.tenant, d.issuer)
		if err != nil {
			return r, err
		}
		r.Except = append(r.Except, t)
	}
	if d.reason != "" {
		if !slices.Contains(authority.Reasons(), d.reason) {
			return r, cli.Usagef("unknown reason %.64q: use one of %s", d.reason, strings.Join(authority.Reasons(), ", "))
		}
	}
	return r, nil
}

func decide(cmd *cobra.Command, g *globals, v verb, d *decisionFlags, args []string) error {
	if d.until != "" && d.forTime != 0 {
		return cli.Usagef("both --until and --for: give one of them")
	}
	if d.wait < 0 || d.wait > authority.MaxWait {
		return cli.Usagef("--wait %s is out of range: give at most %s, or 0 not to wait", d.wait, authority.MaxWait)
	}
	r, err := d.request(v.op, args, time.Now())
	if err != nil {
		return err
	}
	// One from the environment is a default; one that was given is meant.
	if term := r.Targets[0].Terms[0]; r.Targets[0].Tenant == "" && d.tenant != "" && cmd.Flags().Changed("tenant") && term.Value != d.tenant {
		return cli.Usagef("--tenant %.64s and the target %s contradict each other: leave one of them out", d.tenant, strings.TrimSpace(term.Kind+" "+term.Value))
	}
	c, err := g.client()
	if err != nil {
		return err
	}
	defer c.Close()
	if d.abort {
		return abort(cmd, g, c, v, d, &r)
	}
	if d.key == "" {
		d.key = rand.Text()
	}
	res, err := c.DecideOnce(cmd.Context(), d.key, r)
	p := (*authority.Problem)(nil)
	if errors.As(err, &p) && p.Type == authority.ProblemUnaccounted {
		// The server alone knows what it takes.
		if r.Reason, r.Incident, err = askWhy(cmd, p, r.Reason, r.Incident); err != nil {
			return err
		}
		res, err = c.DecideOnce(cmd.Context(), d.key, r)
	}
	if errors.As(err, &p) && p.Type == authority.ProblemTwoPersons {
		return propose(cmd, g, c, r)
	}
	if err != nil {
		return err
	}
	return report(cmd, g, c, v, d.wait, &r, res)
}

// report waits for a decision to be in force, and says where it is.
func report(cmd *cobra.Command, g *globals, c *authority.Client, v verb, wait time.Duration, r *authority.Request, res *authority.Decision) (err error) {
	out := outcome{Decision: res}
	if res.Committed && wait > 0 {
		if out.Coverage, err = c.Coverage(cmd.Context(), res.Epoch, res.Number, wait); err != nil {
			return fmt.Errorf("%s at seq %d, but where it is in force is not known: %w", v.done, res.Number, err)
		}
	}
	// What cannot be said on stderr is no reason to deny what was done.
	for _, w := range res.Warnings {
		_, _ = fmt.Fprintln(cmd.ErrOrStderr(), "warning:", cli.OneLine(w))
	}
	if g.json {
		err = cli.PrintJSON(cmd.OutOrStdout(), out)
	} else {
		_, err = fmt.Fprint(cmd.OutOrStdout(), out.text(v, r, time.Now()))
	}
	if err != nil {
		return err
	}
	switch {
	case !res.Committed:
		return cli.Exit(exitCommit, nil)
	case !out.durable():
		return cli.Exit(exitNotDurable, nil)
	case out.Coverage != nil && !out.Coverage.Effective:
		return cli.Exit(exitFailed, nil)
	}
	return nil
}
