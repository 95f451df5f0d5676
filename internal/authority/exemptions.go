package authority

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/interlock-fabric/interlock/internal/access"
	"github.com/interlock-fabric/interlock/internal/registry"
	"github.com/interlock-fabric/interlock/pkg/authority"
	"github.com/interlock-fabric/interlock/pkg/session"
)

const (
	// exemptionNotes is the kind of the registry's notes that are exemptions.
	exemptionNotes = "exemption"
	// keepExpired is how long one that has expired is still listed.
	keepExpired = 24 * time.Hour
)

// declared is an exemption, and where it is kept.
type declared struct {
	authority.Exemption
	revision uint64
}

// exemptions returns all exemptions, as they are at now. The error is a Problem.
func (a *Authority) exemptions(now time.Time) ([]declared, error) {
	notes, err := a.registry.Notes(exemptionNotes)
	if err != nil {
		return nil, registryProblem(err)
	}
	return readExemptions(notes, now)
}

func readExemptions(notes []registry.Note, now time.Time) ([]declared, error) {
	out := make([]declared, len(notes))
	for i, n := range notes {
		x := &out[i]
		if err := json.Unmarshal(n.Content, &x.Exemption); err != nil {
			return nil, fmt.Errorf("authority: exemption %s: %w", n.ID, err)
		}
		x.revision = n.Revision
		switch {
		case !x.Expires.IsZero() && !now.Before(x.Expires):
			x.State = authority.ExemptionExpired
		case x.ApprovedBy == "":
			x.State = authority.ExemptionDeclared
		default:
			x.State = authority.ExemptionInForce
		}
	}
	return out, nil
}

// sparing returns the exemptions that apply to a decision of at, or later, on a
// whole tenant, or on everything where the tenant is empty.
func sparing(all []declared, tenant string, at time.Time) []declared {
	return slices.DeleteFunc(slices.Clone(all), func(x declared) bool {
		return x.State != authority.ExemptionInForce || x.ApprovedAt.After(at) || tenant == "" && !x.Global || tenant != "" && x.Target.Tenant != tenant
	})
}

// spare adds to an entry on a whole tenant, or on everything, the exemptions that
// are declared.
func (p *planner) spare(out *plan, r *authority.Request, n *named, e *session.Entry) error {
	if !n.everything() || p.exemptions == nil {
		return nil
	}
	all, err := p.exemptions()
	if err != nil && !r.NoExemptions {
		return authority.NewProblem(authority.ProblemUnavailable, "which callers are exempted is not known: the registry does not answer",
			"see session-authority status; --no-exemptions decides without them")
	}
	list := sparing(all, n.tenant, p.declaredBy)
	if r.NoExemptions {
		out.warnings = append(out.warnings, fmt.Sprintf("NO EXEMPTIONS: %s spares none of the %d callers that are declared for it", n.text, len(list)))
		return nil
	}
	keys := slices.Clone(e.Except)
	for _, x := range list {
		c, err := p.name(x.Target)
		if err != nil {
			return err
		}
		keys = append(keys, c.key)
		out.spared = append(out.spared, spared{authority.Spared{Exemption: x.ID, Owner: x.Owner, Target: c.text}, c.target})
		out.except = append(out.except, c.target)
	}
	if keys = session.SortKeys(keys); len(keys) > session.MaxExcept {
		return invalid("exempt fewer, or decide with --no-exemptions and name those that matter with --except", "%s would spare %d callers, at most %d", n.text, len(keys), session.MaxExcept)
	}
	if len(keys) > 0 {
		e.Except = keys
	}
	for _, have := range p.state.Lookup(n.key) {
		if have.Effect != e.Effect || have.Drill != e.Drill {
			continue
		}
		if lost := slices.DeleteFunc(slices.Clone(keys), func(k session.Key) bool { return slices.Contains(have.Except, k) }); len(lost) > 0 {
			out.warnings = append(out.warnings, fmt.Sprintf("%s is %s already, without sparing %d of these: what is in force is never weakened; restore it first", n.text, e.Effect, len(lost)))
		}
	}
	return nil
}

// spared is a caller that a decision does not touch, with its canonical target.
type spared struct {
	authority.Spared
	target session.Target
}

// exempted are the texts of those that a plan spares, for the audit and an answer.
func (pl *plan) exempted() (out []string) {
	for _, s := range pl.spared {
		text := s.Target
		if s.Exemption != "" {
			text += " (" + s.Exemption + ")"
		}
		if !slices.Contains(out, text) && len(out) < maxPreview {
			out = append(out, text)
		}
	}
	return out
}

// countSpared counts what is under each of those that are spared, as a scope shows
// it.
func (a *Authority) countSpared(list []spared, scope access.Scope) []authority.Spared {
	out := make([]authority.Spared, 0, len(list))
	for _, s := range list[:min(len(list), maxPreview)] {
		// What is not known is none.
		counts, _ := a.registry.Touched([]session.Target{s.target}, nil)
		for tenant, c := range counts {
			if scope.Has(tenant) {
				s.Agents, s.Sessions = s.Agents+c.Agents, s.Sessions+c.Sessions
			}
		}
		out = append(out, s.Spared)
	}
	return out
}

// kills are the kills in force, as a scope shows them.
func (a *Authority) kills(scope access.Scope) []authority.KillInForce {
	state, ks := a.seq.State(), a.store.KeySet()
	all, _ := a.exemptions(time.Now()) // those that are not known are counted
	t, _ := a.tenants()
	p := &planner{tenants: t.within(scope), issuers: a.o.Issuers, state: state, now: time.Now()}
	var out []authority.KillInForce
	look := func(k session.Key, target string) {
		for _, r := range state.Lookup(k) {
			if r.Reason != session.ReasonKill || r.Drill || r.IssuedBefore != 0 || r.Effect < session.EffectSuspended {
				continue
			}
			kill := authority.KillInForce{
				Target: target, Number: r.Seq, Since: r.Since.Time(), Incident: r.Incident, Exempt: exempt(r.Except),
				Share: float64(r.Share) * 100 / session.ShareUnit,
			}
			var known []spared
			for _, x := range all {
				if n, err := p.name(x.Target); err == nil && slices.Contains(r.Except, n.key) {
					known = append(known, spared{authority.Spared{Exemption: x.ID, Owner: x.Owner, Target: n.text}, n.target})
				}
			}
			kill.Spared = a.countSpared(known, scope)
			out = append(out, kill)
		}
	}
	look(session.GlobalKey(), "global")
	for _, t := range ks.Tenants {
		if scope.Has(t.Name) {
			look(session.TenantKey(t.ID), "tenant "+t.Name)
		}
	}
	return out
}

// Exemptions returns what p may see of the exemptions; it is the API's.
func (a *Authority) Exemptions(ctx context.Context) ([]authority.Exemption, error) {
	scope := access.From(ctx).Scope(access.ListExemptions)
	all, err := a.exemptions(time.Now())
	if err != nil {
		return nil, err
	}
	out := []authority.Exemption{}
	for _, x := range all {
		if scope.Has(x.Target.Tenant) {
			out = append(out, x.Exemption)
		}
	}
	return out, nil
}

// DeclareExemption declares a caller that kills do not touch; it is the API's.
func (a *Authority) DeclareExemption(ctx context.Context, r authority.ExemptionRequest) (*authority.Exemption, error) {
	x, err := a.declareExemption(ctx, &r)
	rec := authority.AuditRecord{Kind: authority.AuditExemption, Action: "declare", Targets: []string{r.Target.String()}}
	if x != nil {
		rec.Targets, rec.Tenants = []string{x.Target.String()}, []string{x.Target.Tenant}
		rec.Detail = describeExemption(x)
	}
	a.recordOutcome(ctx, rec, err)
	return x, err
}

func describeExemption(x *authority.Exemption) string {
	s := fmt.Sprintf("exemption %s, %s; owner %s: %s", x.ID, x.State, x.Owner, x.Reason)
	if x.Global {
		s += "; from what is decided on everything, too"
	}
	if !x.Expires.IsZero() {
		s += "; until " + x.Expires.UTC().Format(time.RFC3339)
	}
	return s
}

// mayExempt says whether p may declare, approve or remove an exemption of a tenant.
func mayExempt(p *access.Principal, tenant string, global bool) error {
	if err := p.CheckIn(access.DeclareExemptions, tenant); err != nil || !global {
		return err
	}
	return p.CheckIn(access.DeclareExemptions, "")
}

// alone reports whether p decides alone what takes two commanders of others.
func (a *Authority) alone(p *access.Principal) bool {
	c := a.access.Load()
	return c == nil || c.TwoPerson == access.Off || p.Local()
}

func (a *Authority) declareExemption(ctx context.Context, r *authority.ExemptionRequest) (*authority.Exemption, error) {
	p, now := access.From(ctx), time.Now().UTC()
	planner := a.planner(p)
	n, err := planner.name(r.Target)
	if err != nil {
		return nil, err
	}
	if err := exemptible(&n); err != nil {
		return nil, err
	}
	if err := mayExempt(p, n.tenant, r.Global); err != nil {
		return nil, err
	}
	for _, f := range []struct {
		name, value string
		limit       int
	}{{"owner", r.Owner, authority.MaxExemptionOwner}, {"reason", r.Reason, authority.MaxExemptionReason}} {
		if f.value == "" || len(f.value) > f.limit || !printableText(f.value) {
			return nil, invalid(fmt.Sprintf("give one of 1 to %d printable characters", f.limit), "the exemption's %s is missing, or not plain text", f.name)
		}
	}
	if !r.Expires.IsZero() && (!r.Expires.After(now) || r.Expires.Year() > 9999) {
		return nil, invalid("give a time to come, or none", "the exemption would have expired at %s", r.Expires.UTC().Format(time.RFC3339))
	}
	x := &authority.Exemption{
		ID: "x-" + strings.ToLower(rand.Text()[:8]), ExemptionRequest: *r, State: authority.ExemptionDeclared, By: p.Name, At: now,
	}
	x.Target = targetOf(n.target)
	if a.alone(p) {
		x.State, x.ApprovedBy, x.ApprovedAt = authority.ExemptionInForce, p.Name, now
	}
	if err := a.putExemption(ctx, &declared{Exemption: *x}, now); err != nil {
		return nil, err
	}
	a.log.Warn("exemption declared", "exemption", x.ID, "by", p.Name, "state", string(x.State), "global", x.Global)
	return x, nil
}

// exemptible refuses what an entry cannot spare.
func exemptible(n *named) error {
	if n.shape.PerCall() || n.shape <= session.Shape(session.KindTenant) {
		return invalid("exempt a caller: a user, agent, session, …", "%s cannot be exempted", n.text)
	}
	return nil
}

// targetOf is a canonical target as the API has it.
func targetOf(t session.Target) authority.Target {
	out := authority.Target{Tenant: t.Tenant}
	for _, m := range t.Terms {
		out.Terms = append(out.Terms, authority.Term{Kind: m.Kind.String(), Issuer: m.Issuer, Value: m.Value})
	}
	return out
}

// putExemption keeps an exemption, if an entry can hold it beside those that there
// are.
func (a *Authority) putExemption(ctx context.Context, x *declared, now time.Time) error {
	content, err := json.Marshal(&x.Exemption)
	if err != nil {
		return fmt.Errorf("authority: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, registerWait)
	defer cancel()
	_, err = a.registry.PutNote(ctx, registry.Note{Kind: exemptionNotes, ID: x.ID, Revision: x.revision, Content: content}, func(have []registry.Note) (drop []string, err error) {
		all, err := readExemptions(have, now)
		if err != nil {
			return nil, err
		}
		inTenant, global := 1, 1
		for _, o := range all {
			switch {
			case o.ID == x.ID:
			case o.State == authority.ExemptionExpired:
				if now.Sub(o.Expires) > keepExpired {
					drop = append(drop, o.ID)
				}
			case o.Target.Tenant == x.Target.Tenant && slices.Equal(o.Target.Terms, x.Target.Terms):
				return nil, authority.NewProblem(authority.ProblemConflict, "it is exempted already, as "+o.ID, "remove that one first")
			default:
				if o.Target.Tenant == x.Target.Tenant {
					inTenant++
				}
				if o.Global {
					global++
				}
			}
		}
		where := ""
		switch {
		case inTenant > session.MaxExcept:
			where = "of tenant " + x.Target.Tenant
		case x.Global && global > session.MaxExcept:
			where = "from what is decided on everything"
		default:
			return drop, nil
		}
		return nil, authority.NewProblem(authority.ProblemQuota, fmt.Sprintf("%d exemptions %s are declared, as many as a kill can have", session.MaxExcept, where),
			"remove one, or name what they have in common")
	})
	if err != nil {
		return exemptionProblem(err)
	}
	return nil
}

func exemptionProblem(err error) error {
	var p *authority.Problem
	switch {
	case errors.As(err, &p):
		return err
	case errors.Is(err, registry.ErrConflict), errors.Is(err, registry.ErrUnknown):
		return authority.NewProblem(authority.ProblemConflict, "another was faster", "see session-authority exemptions list")
	case errors.Is(err, registry.ErrFull):
		return authority.NewProblem(authority.ProblemQuota, "too many exemptions are declared", "remove those that are not needed any more")
	}
	return registryProblem(err)
}

// findExemption returns an exemption that p may see, and may change.
func (a *Authority) findExemption(p *access.Principal, id string, now time.Time) (*declared, error) {
	all, err := a.exemptions(now)
	if err != nil {
		return nil, err
	}
	i := slices.IndexFunc(all, func(x declared) bool { return x.ID == id && p.Scope(access.ListExemptions).Has(x.Target.Tenant) })
	if i < 0 {
		return nil, authority.NewProblem(authority.ProblemNotFound, fmt.Sprintf("no exemption %.32q", id), "see session-authority exemptions list")
	}
	return &all[i], mayExempt(p, all[i].Target.Tenant, all[i].Global)
}

// ApproveExemption makes what another declared count; it is the API's.
func (a *Authority) ApproveExemption(ctx context.Context, id string) (*authority.Exemption, error) {
	x, err := a.approveExemption(ctx, id)
	rec := authority.AuditRecord{Kind: authority.AuditExemption, Action: "approve", Detail: "exemption " + clip(id)}
	if x != nil {
		rec.Targets, rec.Detail = []string{x.Target.String()}, describeExemption(x)+"; declared by "+x.By
		rec.Tenants = []string{x.Target.Tenant}
	}
	a.recordOutcome(ctx, rec, err)
	return x, err
}

func (a *Authority) approveExemption(ctx context.Context, id string) (*authority.Exemption, error) {
	p, now := access.From(ctx), time.Now().UTC()
	x, err := a.findExemption(p, id, now)
	switch {
	case err != nil:
		return nil, err
	case x.State != authority.ExemptionDeclared:
		return nil, authority.NewProblem(authority.ProblemConflict, "the exemption is "+strings.ReplaceAll(string(x.State), "_", " "), "see session-authority exemptions list")
	case x.By == p.Name && !a.alone(p):
		return nil, authority.NewProblem(authority.ProblemForbidden, "nobody approves their own exemption", "ask another commander to approve it")
	}
	x.State, x.ApprovedBy, x.ApprovedAt = authority.ExemptionInForce, p.Name, now
	if err := a.putExemption(ctx, x, now); err != nil {
		return nil, err
	}
	a.log.Warn("exemption approved", "exemption", x.ID, "declared_by", x.By, "by", p.Name)
	return &x.Exemption, nil
}

// RemoveExemption ends an exemption for decisions to come; it is the API's. One
// commander does, since nothing is weakened by it.
func (a *Authority) RemoveExemption(ctx context.Context, id string) error {
	x, err := a.removeExemption(ctx, id)
	rec := authority.AuditRecord{Kind: authority.AuditExemption, Action: "remove", Detail: "exemption " + clip(id)}
	if x != nil {
		rec.Targets, rec.Tenants = []string{x.Target.String()}, []string{x.Target.Tenant}
	}
	a.recordOutcome(ctx, rec, err)
	return err
}

// removeExemption returns what it removed, and what it tried to.
func (a *Authority) removeExemption(ctx context.Context, id string) (*declared, error) {
	p := access.From(ctx)
	x, err := a.findExemption(p, id, time.Now())
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, registerWait)
	defer cancel()
	if _, err := a.registry.PutNote(ctx, registry.Note{Kind: exemptionNotes, ID: x.ID, Revision: x.revision}, nil); err != nil {
		return x, exemptionProblem(err)
	}
	a.log.Warn("exemption removed", "exemption", x.ID, "by", p.Name)
	return x, nil
}
