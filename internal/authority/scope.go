package authority

import (
	"fmt"
	"slices"

	"github.com/interlock-fabric/interlock/internal/access"
	"github.com/interlock-fabric/interlock/internal/audit"
	"github.com/interlock-fabric/interlock/internal/roster"
	"github.com/interlock-fabric/interlock/pkg/authority"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// within are the tenants of a scope. What is not among them does not exist, for
// whoever has that scope.
func (t tenants) within(s access.Scope) tenants {
	if s.All() {
		return t
	}
	var out tenants
	for _, secret := range t.list {
		if s.Has(secret.Name()) {
			out.list = append(out.list, secret)
		}
	}
	return out
}

// permitted says whether p may take the decision, in each tenant that it is about.
func permitted(p *access.Principal, r *authority.Request, pl *plan) error {
	for _, t := range pl.touched {
		op := access.DenyOne
		switch {
		case t.everything:
			op = access.DecideAll
		case t.wide:
			op = access.DecideWide
		case r.Operation.Lifts():
			op = access.LiftOne
		}
		if err := p.CheckIn(op, t.tenant); err != nil {
			return err
		}
	}
	return nil
}

// view is how much of an enforcer a scope shows: one that serves a tenant of it,
// and what that one counts over all of its tenants only where they are all in it.
func (a *Authority) view(s access.Scope) roster.View {
	if s.All() {
		return nil
	}
	ks := a.store.KeySet()
	return func(ids []session.TenantID) (visible, whole bool) {
		names := make([]string, len(ids))
		for i, id := range ids {
			names[i] = ks.TenantName(id)
		}
		return s.HasAny(names), s.HasEach(names)
	}
}

// enforcersIn is the roster, as a scope shows it.
func (a *Authority) enforcersIn(s access.Scope) []authority.Enforcer {
	ks, view := a.store.KeySet(), a.view(s)
	list, ids := a.tracker.Enforcers()
	out := list[:0]
	for i := range list {
		e := list[i]
		if view != nil {
			visible, whole := view(ids[i])
			if !visible {
				continue
			}
			if !whole {
				e.Running, e.Cut, e.Denied, e.Refused, e.Repairs, e.Rebuilt, e.ReceiptsRefused = 0, 0, 0, 0, 0, 0, 0
			}
		}
		e.Tenants = []string{}
		for _, id := range ids[i] {
			if name := ks.TenantName(id); s.Has(name) {
				e.Tenants = append(e.Tenants, name)
			}
		}
		out = append(out, e)
	}
	return out
}

// within selects the records of a scope. Those of callers without a tenant belong
// to whoever has all.
func within(s access.Scope) func(tenant string) bool {
	if s.All() {
		return nil
	}
	return s.Has
}

// trailIn leaves of what is known of the enforcers' trails what a scope shows.
func (a *Authority) trailIn(list []authority.TrailEnforcer, s access.Scope) []authority.TrailEnforcer {
	view := a.view(s)
	out := []authority.TrailEnforcer{}
	if view == nil {
		return append(out, list...)
	}
	for _, e := range list {
		enrolled, _ := a.roster.Find(e.Name)
		visible, whole := view(enrolled.Tenants)
		if !visible {
			continue
		}
		if !whole {
			e = authority.TrailEnforcer{Name: e.Name, Missing: e.Missing, Refused: e.Refused}
		}
		out = append(out, e)
	}
	return out
}

// eventIn is an event as a scope shows it; ok is false where it shows nothing.
func (a *Authority) eventIn(e authority.Event, s access.Scope) (_ authority.Event, ok bool) {
	switch {
	case s.All():
	case e.Decision != nil:
		d := *e.Decision
		d.Lines = slices.DeleteFunc(slices.Clone(d.Lines), func(l authority.EntryLine) bool {
			return !s.Has(l.Tenant) && l.On != session.KindGlobal.String()
		})
		e.Decision = &d
		return e, len(d.Lines) > 0
	case e.Coverage != nil:
		if !a.hub.touches(e.Coverage.Epoch, e.Coverage.Number, s.Has) {
			return e, false
		}
		c := a.tracker.CoverageOf(e.Coverage.Epoch, e.Coverage.Number, a.view(s))
		e.Coverage = &c
	case e.Enforcer != nil:
		i := slices.IndexFunc(a.enforcersIn(s), func(o authority.Enforcer) bool { return o.Name == e.Enforcer.Name })
		if i < 0 {
			return e, false
		}
		o := a.enforcersIn(s)[i]
		o.Condition = e.Enforcer.Condition
		e.Enforcer = &o
	default:
		return e, false
	}
	return e, true
}

// auditView is the audit as a scope shows it: what is about its tenants, without
// what the same record has of others; nil for all of it.
func (a *Authority) auditView(s access.Scope) *audit.View {
	if s.All() {
		return nil
	}
	return &audit.View{Tenants: s.Tenants(), Show: func(r *authority.AuditRecord) (whole, some bool) {
		// What is about all tenants is everybody's once it is done.
		in := func(tenant string) bool { return s.Has(tenant) || tenant == authority.AuditAny && !s.Empty() }
		if !slices.ContainsFunc(r.Tenants, in) || r.Outcome != authority.OutcomeDone && slices.Contains(r.Tenants, authority.AuditAny) {
			return false, false
		}
		if r.Coverage != nil && !a.coverageIn(r.Coverage, s, &whole) {
			return false, false
		}
		n := len(r.Tenants)
		r.Tenants = slices.DeleteFunc(r.Tenants, func(t string) bool { return !in(t) })
		if len(r.Tenants) == n {
			return r.Coverage == nil || whole, true
		}
		// Whatever is not told apart by tenant goes.
		r.Detail, r.Error, r.Left, r.Entries = "", "", 0, 0
		if r.Kind == authority.AuditRoster {
			return false, true // an enforcer that serves others, too
		}
		targets := r.Targets
		r.Targets = nil
		for i, c := range r.Callers {
			if in(c.Tenant) && len(targets) == len(r.Callers) {
				r.Targets = append(r.Targets, targets[i])
			}
		}
		r.Callers = slices.DeleteFunc(r.Callers, func(c authority.AuditCaller) bool { return !in(c.Tenant) })
		return false, true
	}}
}

// coverageIn leaves of a coverage what a scope shows: the enforcers that serve it.
// It reports whether that can be told, and whether it is all.
func (a *Authority) coverageIn(c *authority.Coverage, s access.Scope, whole *bool) bool {
	if len(c.Detail) != c.Enforcers {
		return false // not all enforcers are named
	}
	view, all := a.view(s), true
	d := *c
	c.Enforcers, c.InEffect, c.Denying, c.Exposed, c.Pending, c.Absent, c.Silent, c.BestEffort, c.Shadow, c.Cut, c.SlowestMillis = 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0
	c.Detail = nil
	for _, e := range d.Detail {
		enrolled, _ := a.roster.Find(e.Name)
		visible, own := view(enrolled.Tenants)
		all = all && visible && own
		if !visible {
			continue
		}
		if !own {
			e.Cut = 0
		}
		roster.Count(c, &e)
		c.Detail = append(c.Detail, e)
	}
	if *whole = all; all {
		*c = d
	}
	return true
}

// enrolIn says whether p may enrol an enforcer for tenants; none are all.
func (a *Authority) enrolIn(p *access.Principal, names []string) error {
	if len(names) == 0 {
		return p.CheckIn(access.Enroll, "")
	}
	for _, t := range names {
		if _, ok := a.store.KeySet().Tenant(t); !ok || !p.Visible().Has(t) {
			return authority.NewProblem(authority.ProblemTenant, fmt.Sprintf("no tenant %.64q", t), "name tenants of the key set: session-authority keys show")
		}
		if err := p.CheckIn(access.Enroll, t); err != nil {
			return err
		}
	}
	return nil
}

func unknownEnforcer(name string) error {
	return authority.NewProblem(authority.ProblemNotFound, fmt.Sprintf("no enforcer %.64q is enrolled", name), "see session-authority enforcers")
}

// retireIn says whether p may retire an enforcer: in all of its tenants.
func (a *Authority) retireIn(p *access.Principal, name string) error {
	if p.Scope(access.Retire).All() {
		return nil
	}
	e, _ := a.roster.Find(name)
	visible, _ := a.view(p.Visible())(e.Tenants)
	if !e.Retired.IsZero() || !visible {
		return unknownEnforcer(name)
	}
	if _, whole := a.view(p.Scope(access.Retire))(e.Tenants); !whole {
		return authority.NewProblem(authority.ProblemForbidden, fmt.Sprintf("%s may not retire enforcer %s", p.Name, name), "it takes the role commander in all tenants that it serves")
	}
	return nil
}
