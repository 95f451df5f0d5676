package authority

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/interlock-fabric/interlock/internal/access"
	"github.com/interlock-fabric/interlock/internal/proposal"
	"github.com/interlock-fabric/interlock/pkg/authority"
	"github.com/interlock-fabric/interlock/pkg/session"
)

const (
	// brokenGlass begins the incident of what one person decided alone.
	brokenGlass = "BREAK-GLASS "
	// glassTimeout bounds the keeping of the notice of one, after the decision.
	glassTimeout = 3 * time.Second
)

// everything reports whether a target of the plan is a whole tenant, or all.
func (pl *plan) everything() bool {
	for _, t := range pl.touched {
		if t.everything {
			return true
		}
	}
	return false
}

// needsTwo reports whether p may not take a decision alone. A drill denies nobody.
func (a *Authority) needsTwo(p *access.Principal, r *authority.Request, pl *plan) bool {
	return !a.alone(p) && pl.everything() && !r.Drill
}

// breakGlass marks a request whose one author takes it upon themselves.
func breakGlass(r *authority.Request) error {
	switch {
	case r.BreakGlass == "":
		return nil
	case !printableText(r.BreakGlass) || len(r.BreakGlass) > authority.MaxBreakGlass:
		return invalid(fmt.Sprintf("say why in at most %d printable characters", authority.MaxBreakGlass), "break_glass is not a reason")
	case r.Incident == "":
		return invalid("give the incident", "what one person decides alone must name its incident")
	}
	if !strings.HasPrefix(r.Incident, brokenGlass) {
		r.Incident = brokenGlass + r.Incident
	}
	if len(r.Incident) > session.MaxIncidentLen {
		return invalid(fmt.Sprintf("give one of at most %d bytes", session.MaxIncidentLen-len(brokenGlass)), "the incident is too long to be marked as a break-glass one")
	}
	return nil
}

func printableText(s string) bool {
	return !strings.ContainsFunc(s, func(r rune) bool { return r < 0x20 || r == 0x7f || r == 0xfffd })
}

func secondPerson() error {
	return authority.NewProblem(authority.ProblemTwoPersons, "a decision on a whole tenant, or on everything, takes two commanders",
		"propose it (POST /v1/proposals) and have another commander approve it; if nobody can be reached, break the glass: --break-glass REASON")
}

// Propose keeps a decision until another commander approves it; it is the API's.
func (a *Authority) Propose(ctx context.Context, r authority.Request) (*authority.Proposal, error) {
	p, err := a.propose(ctx, &r)
	rec := a.decisionRecord(&r, nil, err)
	rec.Kind, rec.Action = authority.AuditProposal, "propose "+rec.Action
	if p != nil {
		rec.Detail = strings.TrimPrefix(rec.Detail+"; proposal "+p.ID, "; ")
	}
	rec.Outcome, rec.Error = outcomeOf(err)
	_ = a.record(ctx, rec) // what is not durable in time is logged by the audit
	return p, err
}

func (a *Authority) propose(ctx context.Context, r *authority.Request) (*authority.Proposal, error) {
	p, now := access.From(ctx), time.Now().UTC()
	r.Commit = true
	pl, err := a.planner(p).plan(r)
	if err != nil {
		return nil, err
	}
	if err := permitted(p, r, pl); err != nil {
		return nil, err
	}
	if !pl.everything() || r.Drill || r.BreakGlass != "" {
		return nil, invalid("decide it: POST /v1/decisions", "only what needs two persons is proposed")
	}
	if pl.restore != nil && pl.restore.nothing != nil {
		return nil, pl.restore.nothing
	}
	for _, t := range orAll(pl.tenants()) {
		if err := p.CheckIn(access.Propose, t); err != nil {
			return nil, err
		}
	}
	rec, err := a.proposals.Add(ctx, authority.Proposal{
		State: authority.ProposalOpen, Request: *r, Would: pl.would[:min(len(pl.would), 4)], Tenants: pl.tenants(), By: p.Name, At: now, Expires: now.Add(a.proposalFor()),
	}, now)
	if err != nil {
		return nil, proposalProblem(err)
	}
	a.log.Warn("proposed", "proposal", rec.ID, "by", p.Name, "operation", string(r.Operation), "incident", r.Incident, "until", rec.Expires)
	return &rec.Proposal, nil
}

func (a *Authority) proposalFor() time.Duration {
	c := a.access.Load()
	if c == nil {
		return access.DefaultProposalFor
	}
	return cmp.Or(c.ProposalFor, access.DefaultProposalFor)
}

// tenants are the tenants that the plan is about; none are all.
func (pl *plan) tenants() (out []string) {
	for _, t := range pl.touched {
		if t.tenant == "" {
			return nil
		}
		out = append(out, t.tenant)
	}
	return out
}

// orAll is what to ask for each of the tenants: "" stands for all.
func orAll(tenants []string) []string {
	if len(tenants) == 0 {
		return []string{""}
	}
	return tenants
}

// Proposals returns what p may see of the proposals; it is the API's.
func (a *Authority) Proposals(ctx context.Context) ([]authority.Proposal, error) {
	return a.proposalsIn(ctx, access.From(ctx).Scope(access.ListProposals), time.Now())
}

func (a *Authority) proposalsIn(ctx context.Context, s access.Scope, now time.Time) ([]authority.Proposal, error) {
	all, err := a.proposals.List(ctx)
	if err != nil {
		return nil, proposalProblem(err)
	}
	out := []authority.Proposal{}
	for i := range all {
		p := all[i].Proposal
		if !s.HasEach(p.Tenants) || now.Sub(p.At) > proposal.Keep {
			continue
		}
		if p.State == authority.ProposalOpen && !p.Open(now) {
			p.State = authority.ProposalExpired
		}
		out = append(out, p)
	}
	return out, nil
}

// find returns a proposal that p may see, and may end.
func (a *Authority) find(ctx context.Context, p *access.Principal, op access.Operation, id string) (*proposal.Record, error) {
	rec, err := a.proposals.Find(ctx, id)
	switch {
	case errors.Is(err, proposal.ErrUnknown), err == nil && !p.Scope(access.ListProposals).HasEach(rec.Tenants):
		return nil, unknownProposal(id)
	case err != nil:
		return nil, proposalProblem(err)
	}
	for _, t := range orAll(rec.Tenants) {
		if err := p.CheckIn(op, t); err != nil {
			return nil, err
		}
	}
	return rec, nil
}

func unknownProposal(id string) error {
	return authority.NewProblem(authority.ProblemNotFound, fmt.Sprintf("no proposal %.32q", id), "see session-authority proposals list")
}

// Approve has a proposal of another's decided; it is the API's.
func (a *Authority) Approve(ctx context.Context, id string) (*authority.Decision, error) {
	d, rec, err := a.approve(ctx, id)
	if rec == nil {
		a.recordOutcome(ctx, authority.AuditRecord{Kind: authority.AuditProposal, Action: "approve", Detail: "proposal " + clip(id)}, err)
		return d, err
	}
	return a.decided(ctx, &rec.Request, d, err, fmt.Sprintf("proposal %s of %s", rec.ID, rec.By))
}

// approve returns the proposal where it came to be decided on.
func (a *Authority) approve(ctx context.Context, id string) (*authority.Decision, *proposal.Record, error) {
	p, now := access.From(ctx), time.Now().UTC()
	rec, err := a.find(ctx, p, access.Approve, id)
	if err != nil {
		return nil, nil, err
	}
	switch {
	case rec.By == p.Name:
		return nil, nil, authority.NewProblem(authority.ProblemForbidden, "nobody approves their own proposal", "ask another commander to approve it")
	case rec.State != authority.ProposalOpen && rec.State != authority.ProposalApproved: // and not carried out to the end
		return nil, nil, ended(rec)
	case !now.Before(rec.Expires):
		return nil, nil, authority.NewProblem(authority.ProblemConflict, "the proposal has expired", "propose it anew")
	}
	by := a.planner(p)
	by.declaredBy = rec.At // what came to be exempted since is not what was proposed
	pl, err := by.plan(&rec.Request)
	if err != nil {
		return nil, nil, err
	}
	if err := permitted(p, &rec.Request, pl); err != nil {
		return nil, nil, err
	}
	if err := a.tombstoned(&rec.Request, pl); err != nil {
		return nil, nil, err
	}
	if rec.State == authority.ProposalOpen {
		rec.State, rec.EndedBy, rec.EndedAt = authority.ProposalApproved, p.Name, now
		if err := a.proposals.Change(ctx, rec); err != nil {
			return nil, nil, proposalProblem(err)
		}
	}
	a.log.Warn("approved", "proposal", rec.ID, "proposed_by", rec.By, "by", p.Name)
	// However often it comes to this, on whatever authority, it is decided once.
	d, err := a.commit(ctx, "proposal\x00"+rec.ID, &rec.Request, pl)
	if err != nil {
		return nil, rec, err
	}
	rec.State, rec.Epoch, rec.Number = authority.ProposalExecuted, d.Epoch, d.Number
	if err := a.proposals.Change(ctx, rec); err != nil {
		a.log.Warn("a proposal was carried out, and is not marked so", "proposal", rec.ID, "error", err)
	}
	return d, rec, nil
}

func ended(rec *proposal.Record) error {
	detail := fmt.Sprintf("the proposal was %s by %s", rec.State, rec.EndedBy)
	if rec.Number != 0 {
		detail += fmt.Sprintf(", at seq %d", rec.Number)
	}
	return authority.NewProblem(authority.ProblemConflict, detail, "propose it anew if it is still wanted")
}

// Withdraw ends a proposal; it is the API's.
func (a *Authority) Withdraw(ctx context.Context, id string) (*authority.Proposal, error) {
	p, err := a.withdraw(ctx, id)
	rec := authority.AuditRecord{Kind: authority.AuditProposal, Action: "withdraw", Detail: "proposal " + clip(id)}
	if p != nil {
		rec.Tenants = p.Tenants
	}
	a.recordOutcome(ctx, rec, err)
	return p, err
}

func (a *Authority) withdraw(ctx context.Context, id string) (*authority.Proposal, error) {
	p, now := access.From(ctx), time.Now().UTC()
	rec, err := a.find(ctx, p, access.Withdraw, id)
	if err != nil {
		return nil, err
	}
	if rec.State != authority.ProposalOpen {
		return nil, ended(rec)
	}
	rec.State, rec.EndedBy, rec.EndedAt = authority.ProposalWithdrawn, p.Name, now
	if err := a.proposals.Change(ctx, rec); err != nil {
		return nil, proposalProblem(err)
	}
	a.log.Info("withdrawn", "proposal", rec.ID, "by", p.Name)
	return &rec.Proposal, nil
}

// glassBroken tells everybody that one person decided alone. The decision stands
// whether or not that can be kept.
func (a *Authority) glassBroken(ctx context.Context, p *access.Principal, r *authority.Request, pl *plan, d *authority.Decision) {
	a.log.Error("BREAK-GLASS: decided by one person alone", "by", p.Name, "operation", string(r.Operation), "why", r.BreakGlass,
		"incident", r.Incident, "epoch", d.Epoch, "number", d.Number)
	d.Warnings = append(d.Warnings, "break-glass: you decided alone; everybody is told so")
	if d.Duplicate {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), glassTimeout)
	defer cancel()
	now := time.Now().UTC()
	if _, err := a.proposals.Add(ctx, authority.Proposal{
		State: authority.ProposalBrokenGlass, Request: *r, Would: pl.would[:min(len(pl.would), 4)], Tenants: pl.tenants(),
		By: p.Name, At: now, EndedBy: p.Name, EndedAt: now, Epoch: d.Epoch, Number: d.Number,
	}, now); err != nil {
		a.log.Error("the break-glass decision is not among the proposals", "number", d.Number, "error", err)
	}
}

// warnOfGlass adds to the status what was decided alone in the last day, and what
// waits for a second person.
func (a *Authority) warnOfGlass(ctx context.Context, s access.Scope, warn func(string, ...any)) {
	ctx, cancel := context.WithTimeout(ctx, glassTimeout)
	defer cancel()
	now := time.Now()
	list, err := a.proposalsIn(ctx, s, now)
	if err != nil {
		warn("the proposals cannot be read: the store does not answer")
		return
	}
	for _, p := range list {
		switch p.State {
		case authority.ProposalBrokenGlass:
			warn("BREAK-GLASS: %s %s at seq %d, by %s alone, %s ago: %s", p.Request.Operation, cmp.Or(strings.Join(p.Tenants, ", "), "global"), p.Number, p.By,
				now.Sub(p.At).Round(time.Minute), p.Request.BreakGlass)
		case authority.ProposalOpen:
			warn("proposal %s of %s waits for a second commander until %s: session-authority proposals approve %s", p.ID, p.By, p.Expires.Format(time.RFC3339), p.ID)
		}
	}
}

func proposalProblem(err error) error {
	var p *authority.Problem
	switch {
	case errors.As(err, &p):
		return err
	case errors.Is(err, proposal.ErrConflict):
		return authority.NewProblem(authority.ProblemConflict, "another was faster", "see session-authority proposals list")
	case errors.Is(err, proposal.ErrFull):
		return authority.NewProblem(authority.ProblemOverloaded, "too many proposals are open", "withdraw those that are not wanted any more, or have them approved")
	case errors.Is(err, proposal.ErrTooLarge):
		return invalid("name fewer targets and exemptions", "the proposal is too large")
	case transient(err):
		return authority.NewProblem(authority.ProblemUnavailable, "the store of the proposals does not answer", "try again in a moment, or break the glass: --break-glass REASON")
	}
	return err
}
