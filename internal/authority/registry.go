package authority

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
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

// registerWait bounds how long a registration waits for the store.
const registerWait = 5 * time.Second

// tenantFor resolves a tenant as it exists for whoever asks, who must be permitted
// op there.
func (a *Authority) tenantFor(ctx context.Context, op access.Operation, name string) (string, error) {
	p := access.From(ctx)
	t, _ := a.tenants()
	t = t.within(p.Visible())
	secret, err := t.resolve(name)
	if err != nil {
		return "", err
	}
	if err = p.CheckIn(op, secret.Name()); err != nil && op != access.ChangeAgents { // which has a record of its own
		a.watched.forbidden(p, string(op))
	}
	return secret.Name(), err
}

func (a *Authority) issuerOr(s string) string {
	if s == "" && len(a.o.Issuers) == 1 {
		return a.o.Issuers[0]
	}
	return s
}

// RegisterAgent registers an agent; it is the API's.
func (a *Authority) RegisterAgent(ctx context.Context, r authority.AgentRequest) (*authority.AgentRecord, bool, error) {
	tenant, err := a.tenantFor(ctx, access.RegisterAgents, r.Tenant)
	if err != nil {
		return nil, false, err
	}
	ctx, cancel := context.WithTimeout(ctx, registerWait)
	defer cancel()
	rec, changed, err := a.registry.RegisterAgent(ctx, registry.Agent{
		Tenant: tenant, Ref: registry.Ref{Issuer: a.issuerOr(r.Issuer), ID: r.ID}, Owner: r.Owner, Purpose: r.Purpose, Environment: r.Environment,
		Blueprint: r.Blueprint, Capabilities: r.Capabilities, Digests: r.Digests,
	}, r.Revision)
	if err != nil {
		err = registryProblem(err)
	}
	a.recordAgent(ctx, "register", tenant, r.Agent.ID, "", "", err)
	if err != nil {
		return nil, false, err
	}
	return agentOf(&rec), changed, nil
}

// recordAgent records what was asked for of an agent.
func (a *Authority) recordAgent(ctx context.Context, action, tenant, id, reason, incident string, err error) {
	a.recordOutcome(ctx, authority.AuditRecord{
		Kind: authority.AuditRegistry, Action: action, Targets: []string{strings.TrimSpace("agent " + id + " " + tenant)}, Reason: reason, Incident: incident,
		Callers: []authority.AuditCaller{{Tenant: tenant, Agent: id, User: authority.AuditAny}}, Tenants: []string{tenant},
	}, err)
}

// RegisterSessions registers sessions; it is the API's.
func (a *Authority) RegisterSessions(ctx context.Context, r authority.SessionsRequest) (*authority.SessionsAnswer, error) {
	if n := len(r.Sessions); n == 0 || n > authority.MaxSessions {
		return nil, invalid(fmt.Sprintf("register 1 to %d at once", authority.MaxSessions), "%d sessions", n)
	}
	resolved := map[string]string{}
	list := make([]registry.Session, len(r.Sessions))
	for i := range r.Sessions {
		s := &r.Sessions[i]
		tenant, ok := resolved[s.Tenant]
		if !ok {
			var err error
			if tenant, err = a.tenantFor(ctx, access.RegisterSessions, s.Tenant); err != nil {
				return nil, err
			}
			resolved[s.Tenant] = tenant
		}
		ref := func(l authority.TrailLink) registry.Ref { return registry.Ref{Issuer: l.Issuer, ID: l.ID} }
		list[i] = registry.Session{
			Tenant: tenant, Ref: registry.Ref{Issuer: a.issuerOr(s.Issuer), ID: s.ID}, Agent: ref(s.Agent), User: s.User, Client: s.Client,
			Parent: ref(s.Parent), Keys: s.Keys, Credentials: s.Credentials, Digests: s.Digests,
			Issued: session.InstantOf(s.Issued), Expires: session.InstantOf(s.Expires),
		}
		for _, l := range s.Chain {
			list[i].Chain = append(list[i].Chain, ref(l))
		}
	}
	ctx, cancel := context.WithTimeout(ctx, registerWait)
	defer cancel()
	fresh, err := a.registry.RegisterSessions(ctx, list)
	if err != nil {
		return nil, registryProblem(err)
	}
	n := 0
	for tenant, k := range fresh {
		a.watched.registered(access.From(ctx), tenant, k)
		n += k
	}
	return &authority.SessionsAnswer{Registered: n, Known: len(list) - n}, nil
}

// queryTerms brings the terms of a query to their canonical form.
func (a *Authority) queryTerms(tenant string, q *authority.RegistryQuery, may func(session.Kind) bool) ([]session.Term, error) {
	var out []session.Term
	for _, t := range q.Terms {
		kind, err := session.ParseKind(t.Kind)
		if err != nil || !may(kind) {
			return nil, invalid("see the API's description", "nothing is listed by %.64q", t.Kind)
		}
		c, _, err := session.Target{Tenant: tenant, Terms: []session.Term{{Kind: kind, Issuer: a.issuerOr(t.Issuer), Value: t.Value}}}.Canonical()
		if err != nil {
			return nil, registryProblem(err)
		}
		out = append(out, c.Terms...)
	}
	return out, nil
}

// Sessions lists sessions; it is the API's.
func (a *Authority) Sessions(ctx context.Context, q authority.RegistryQuery) (*authority.SessionsPage, error) {
	tenant, err := a.tenantFor(ctx, access.ReadRegistry, q.Tenant)
	if err != nil {
		return nil, err
	}
	if q.State != "" || q.Environment != "" || q.Registered != "" {
		return nil, invalid("leave them out", "state, environment and registered are of agents")
	}
	out := &authority.SessionsPage{Sessions: []authority.Session{}}
	if q.ID != "" {
		s, err := a.registry.Session(tenant, registry.Ref{Issuer: a.issuerOr(q.Issuer), ID: q.ID})
		if errors.Is(err, registry.ErrUnknown) {
			return out, nil
		}
		if err != nil {
			return nil, registryProblem(err)
		}
		out.Sessions = append(out.Sessions, sessionOf(&s))
		return out, nil
	}
	known := func(k session.Kind) bool {
		return registry.Known(k) && k != session.KindGlobal && k != session.KindTenant
	}
	rq := registry.SessionQuery{Tenant: tenant, Expired: q.Expired, Limit: limitOf(&q)}
	if rq.Terms, err = a.queryTerms(tenant, &q, known); err != nil {
		return nil, err
	}
	at, err := readPage("sessions", tenant, &q)
	if err != nil {
		return nil, err
	}
	rq.Before = at.before
	list, next, err := a.registry.Sessions(rq)
	if err != nil {
		return nil, registryProblem(err)
	}
	for i := range list {
		out.Sessions = append(out.Sessions, sessionOf(&list[i]))
	}
	if next > 0 {
		out.Next = page{before: next}.token("sessions", tenant, &q)
	}
	return out, nil
}

// Agents lists agents; it is the API's.
func (a *Authority) Agents(ctx context.Context, q authority.RegistryQuery) (*authority.AgentsPage, error) {
	tenant, err := a.tenantFor(ctx, access.ReadRegistry, q.Tenant)
	if err != nil {
		return nil, err
	}
	if q.Expired {
		return nil, invalid("leave it out", "agents do not expire")
	}
	if !slices.Contains([]string{"", authority.AgentRegistered, authority.AgentActive, authority.AgentSuspended, authority.AgentDecommissioned}, q.State) {
		return nil, invalid("use registered, active, suspended or decommissioned", "unknown state %.64q", q.State)
	}
	out := &authority.AgentsPage{Agents: []authority.AgentRecord{}}
	if q.ID != "" {
		ref := registry.Ref{Issuer: a.issuerOr(q.Issuer), ID: q.ID}
		rec, n, err := a.registry.Agent(tenant, ref)
		switch {
		case err == nil && q.Registered != "false":
			x := agentOf(&rec)
			x.Sessions = n
			out.Agents = append(out.Agents, *x)
		case err != nil && !errors.Is(err, registry.ErrUnknown):
			return nil, registryProblem(err)
		case err != nil && q.Registered != "true":
			if x, ok := a.discovered.find(tenant, ref); ok {
				x.Sessions = n
				out.Agents = append(out.Agents, x)
			}
		}
		return out, nil
	}
	of := func(k session.Kind) bool {
		return k == session.KindBlueprint || k == session.KindOwner || k == session.KindCapability || k == session.KindDigest
	}
	rq := registry.AgentQuery{Tenant: tenant, Environment: q.Environment, State: registry.State(q.State), Limit: limitOf(&q)}
	if rq.Terms, err = a.queryTerms(tenant, &q, of); err != nil {
		return nil, err
	}
	at, err := readPage("agents", tenant, &q)
	if err != nil {
		return nil, err
	}
	// Of those that nobody registered nothing else is known than that they are.
	strangers := q.Registered != "true" && len(q.Terms) == 0 && q.Environment == "" && q.State == ""
	if q.Registered != "false" && at.after == "" {
		rq.Before = at.before
		list, next, err := a.registry.Agents(rq)
		if err != nil {
			return nil, registryProblem(err)
		}
		for i := range list {
			out.Agents = append(out.Agents, *agentOf(&list[i]))
		}
		if next > 0 {
			out.Next = page{before: next}.token("agents", tenant, &q)
			return out, nil
		}
	}
	if !strangers {
		return out, nil
	}
	list, more := a.discovered.list(tenant, at.after, limitOf(&q)-len(out.Agents), func(r registry.Ref) bool {
		_, _, err := a.registry.Agent(tenant, r)
		return err != nil
	})
	out.Agents = append(out.Agents, list...)
	if more {
		last := "\x00" // before all of them
		if n := len(list); n > 0 {
			last = strangerKey(registry.Ref{Issuer: list[n-1].Issuer, ID: list[n-1].ID})
		} else if at.after != "" {
			last = at.after
		}
		out.Next = page{after: last}.token("agents", tenant, &q)
	}
	return out, nil
}

func limitOf(q *authority.RegistryQuery) int {
	if q.Limit == 0 {
		return authority.DefaultPage
	}
	return q.Limit
}

// page is where a page begins: below a number of the registry, or after a key.
type page struct {
	before uint64
	after  string
}

// queryHash ties a page to its query.
func queryHash(what, tenant string, q *authority.RegistryQuery) []byte {
	h := sha256.New()
	_, _ = fmt.Fprintf(h, "%q %q %q %q %v %q %q %q", what, tenant, q.Issuer, q.Terms, q.Expired, q.Environment, q.State, q.Registered)
	return h.Sum(nil)[:8]
}

func (p page) token(what, tenant string, q *authority.RegistryQuery) string {
	b := binary.BigEndian.AppendUint64(queryHash(what, tenant, q), p.before)
	return base64.RawURLEncoding.EncodeToString(append(b, p.after...))
}

func readPage(what, tenant string, q *authority.RegistryQuery) (page, error) {
	if q.Page == "" {
		return page{}, nil
	}
	b, err := base64.RawURLEncoding.DecodeString(q.Page)
	if err != nil || len(b) < 16 || string(b[:8]) != string(queryHash(what, tenant, q)) {
		return page{}, invalid("use the next of the page before, with the same query", "the page is not one of this query")
	}
	return page{before: binary.BigEndian.Uint64(b[8:]), after: string(b[16:])}, nil
}

func agentOf(r *registry.AgentRecord) *authority.AgentRecord {
	return &authority.AgentRecord{
		Agent: authority.Agent{
			Tenant: r.Tenant, Issuer: r.Issuer, ID: r.ID, Owner: r.Owner, Purpose: r.Purpose, Environment: r.Environment,
			Blueprint: r.Blueprint, Capabilities: r.Capabilities, Digests: r.Digests,
		},
		Registered: true, State: string(r.State), Since: r.Since.Time(), At: r.At.Time(), Revision: r.Revision,
	}
}

func sessionOf(s *registry.Session) authority.Session {
	link := func(r registry.Ref) authority.TrailLink { return authority.TrailLink{Issuer: r.Issuer, ID: r.ID} }
	out := authority.Session{
		Tenant: s.Tenant, Issuer: s.Issuer, ID: s.ID, Agent: link(s.Agent), User: s.User, Client: s.Client, Parent: link(s.Parent),
		Keys: s.Keys, Credentials: s.Credentials, Digests: s.Digests, Issued: s.Issued.Time(), Expires: s.Expires.Time(),
	}
	for _, r := range s.Chain {
		out.Chain = append(out.Chain, link(r))
	}
	return out
}

// ChangeAgent suspends, activates or decommissions an agent; it is the API's. What
// denies comes first, and what lifts last: between the two the agent is denied,
// and asking again completes it. Activating lifts what suspending it here set, and
// no suspension of anybody else's.
func (a *Authority) ChangeAgent(ctx context.Context, r authority.LifecycleRequest) (out *authority.LifecycleAnswer, err error) {
	defer func() {
		if out != nil {
			r.Tenant = out.Agent.Tenant
		}
		a.recordAgent(ctx, string(r.Operation), r.Tenant, r.ID, r.Reason, r.Incident, err)
	}()
	return a.changeAgent(ctx, &r)
}

func (a *Authority) changeAgent(ctx context.Context, r *authority.LifecycleRequest) (*authority.LifecycleAnswer, error) {
	tenant, err := a.tenantFor(ctx, access.ChangeAgents, r.Tenant)
	if err != nil {
		return nil, err
	}
	ref := registry.Ref{Issuer: a.issuerOr(r.Issuer), ID: r.ID}
	have, _, err := a.registry.Agent(tenant, ref)
	if err != nil {
		return nil, registryProblem(err)
	}
	ask := authority.Request{
		Targets: []authority.Target{authority.One(tenant, session.KindAgent.String(), ref.Issuer, ref.ID)},
		Reason:  r.Reason, Incident: r.Incident, Commit: true,
	}
	var to registry.State
	switch r.Operation {
	case authority.SuspendAgent:
		ask.Operation, to = authority.Suspend, registry.Suspended
		ask.Reason = cmp.Or(ask.Reason, session.ReasonLifecycle.String())
	case authority.DecommissionAgent:
		ask.Operation, to = authority.Revoke, registry.Decommissioned
		ask.Reason = cmp.Or(ask.Reason, session.ReasonDecommissioned.String())
	case authority.ActivateAgent:
		ask.Operation, ask.Effect, to = authority.Resume, session.EffectSuspended.String(), registry.Active
	default:
		return nil, invalid("use activate, suspend or decommission", "unknown operation %.64q", r.Operation)
	}
	if have.State == registry.Decommissioned && to != registry.Decommissioned {
		return nil, registryProblem(registry.ErrTombstone)
	}
	// What would be refused is refused before anything is done.
	planner := a.planner(access.From(ctx))
	planner.own = true
	pl, err := planner.plan(&ask)
	if err != nil {
		return nil, err
	}
	out := &authority.LifecycleAnswer{}
	key := pl.entries[0].Key
	var cause *registry.Cause
	if to != registry.Active {
		if out.Decision, cause, err = a.denyAgent(ctx, ask, &have, key); err != nil {
			return nil, err
		}
	}
	rec, err := a.setState(ctx, tenant, ref, to, cause)
	if err != nil {
		return nil, err
	}
	out.Agent = *agentOf(&rec)
	if to != registry.Active {
		return out, nil
	}
	epoch, _, _ := a.seq.Head()
	in := a.suspension(key)
	switch c := rec.Cause; {
	case in == nil:
	case c == nil || c.Epoch != epoch || c.Number != in.Seq:
		// Somebody else's is theirs to lift.
		out.Warnings = append(out.Warnings, stays(in.Seq, in.Incident))
	case c.Over != 0 && (c.Until == 0 || c.Until > session.InstantOf(time.Now())):
		out.Warnings = append(out.Warnings, stays(c.Over, ""))
	default:
		if out.Decision, err = a.decideAgent(ctx, rand.Text(), ask); err != nil {
			return nil, err
		}
	}
	return out, nil
}

func stays(number uint64, incident string) string {
	if incident != "" {
		incident = " (" + incident + ")"
	}
	return fmt.Sprintf("the agent stays suspended by decision %d%s, which did not come from here: session-authority resume agent lifts it", number, incident)
}

// denyAgent takes the decision that denies an agent, once however often it is
// asked for before its state is written.
func (a *Authority) denyAgent(ctx context.Context, ask authority.Request, have *registry.AgentRecord, key session.Key) (*authority.Decision, *registry.Cause, error) {
	before := a.suspension(key)
	d, err := a.decideAgent(ctx, fmt.Sprintf("lifecycle %q %q %q %d %q %q", have.Tenant, have.Issuer, have.ID, have.Revision, ask.Reason, ask.Incident), ask)
	if err == nil && d.Duplicate && ask.Operation == authority.Suspend && before == nil {
		d, err = a.decideAgent(ctx, rand.Text(), ask) // it has been lifted since
	}
	if err != nil {
		return nil, nil, err
	}
	cause := &registry.Cause{Epoch: d.Epoch, Number: d.Number}
	switch was := have.Cause; {
	case before == nil || before.Seq == d.Number:
	case was != nil && was.Epoch == d.Epoch && was.Number == before.Seq:
		cause.Over, cause.Until = was.Over, was.Until // it was suspended in this way already
	default:
		cause.Over, cause.Until = before.Seq, before.Expires
	}
	return d, cause, nil
}

// suspension returns the suspension of a key that is in force.
func (a *Authority) suspension(k session.Key) *session.Record {
	all, now := a.seq.State().Lookup(k), session.InstantOf(time.Now())
	i := slices.IndexFunc(all, func(r session.Record) bool {
		return r.Effect == session.EffectSuspended && !r.Drill && (r.Expires == 0 || r.Expires > now)
	})
	if i < 0 {
		return nil
	}
	return &all[i]
}

func (a *Authority) setState(ctx context.Context, tenant string, ref registry.Ref, to registry.State, cause *registry.Cause) (registry.AgentRecord, error) {
	if h := a.o.beforeState; h != nil {
		if err := h(); err != nil {
			return registry.AgentRecord{}, err
		}
	}
	ctx, cancel := context.WithTimeout(ctx, registerWait)
	defer cancel()
	rec, err := a.registry.SetState(ctx, tenant, ref, to, cause)
	if err != nil {
		return rec, registryProblem(err)
	}
	return rec, nil
}

// decideAgent takes a decision that must be durable before anything rests on it.
func (a *Authority) decideAgent(ctx context.Context, key string, r authority.Request) (*authority.Decision, error) {
	d, err := a.decideOwn(ctx, key, r)
	if err != nil {
		return nil, err
	}
	if !d.Durable {
		return nil, authority.NewProblem(authority.ProblemUnavailable, "the decision is in effect, and not durable yet", "ask again: what is done already is not done twice")
	}
	return d, nil
}

// tombstoned refuses to lift what denies a decommissioned agent.
func (a *Authority) tombstoned(r *authority.Request, pl *plan) error {
	if !r.Operation.Lifts() || r.Drill {
		return nil
	}
	for _, t := range pl.targets {
		if len(t.Terms) != 1 || t.Terms[0].Kind != session.KindAgent {
			continue
		}
		rec, _, err := a.registry.Agent(t.Tenant, registry.Ref{Issuer: t.Terms[0].Issuer, ID: t.Terms[0].Value})
		if err == nil && rec.State == registry.Decommissioned {
			return authority.NewProblem(authority.ProblemTerminal, "the agent is decommissioned, and never comes back", "register another under another id")
		}
	}
	return nil
}

// count says what a decision would touch, as a scope shows it.
func (a *Authority) count(v *authority.Preview, pl *plan, scope access.Scope) (warnings []string) {
	counts, err := a.registry.Touched(pl.targets, pl.except)
	if err != nil {
		return []string{"agents and sessions are not counted: the registry has not been read"}
	}
	var unknown []string
	for _, t := range pl.targets {
		for _, m := range t.Terms {
			if k := m.Kind.String(); !registry.Known(m.Kind) && !slices.Contains(unknown, k) {
				unknown = append(unknown, k)
			}
		}
	}
	if len(unknown) > 0 {
		warnings = append(warnings, fmt.Sprintf("of sessions it is not known beforehand which %s they have: those counted are by the rest of the target", strings.Join(unknown, " or ")))
	}
	enforcers := a.enforcersIn(scope)
	if v.Spared = a.countSpared(pl.spared, scope); len(v.Spared) > 0 {
		all, err := a.registry.Touched(pl.targets, nil)
		if err == nil {
			for name, c := range all {
				if scope.Has(name) {
					v.SparedSessions += c.Sessions - counts[name].Sessions
				}
			}
		}
	}
	for name, c := range counts {
		if !scope.Has(name) {
			continue
		}
		t := authority.TenantPreview{Tenant: name, Agents: c.Agents, Sessions: c.Sessions}
		for i := range enforcers {
			if slices.Contains(enforcers[i].Tenants, name) {
				t.Enforcers++
			}
		}
		v.Agents, v.Sessions = v.Agents+c.Agents, v.Sessions+c.Sessions
		v.Tenants = append(v.Tenants, t)
	}
	slices.SortFunc(v.Tenants, func(a, b authority.TenantPreview) int { return strings.Compare(a.Tenant, b.Tenant) })
	return warnings
}

func registryProblem(err error) error {
	again := "send it again: the same is registered once"
	problem := func(typ, mend string) error {
		return authority.NewProblem(typ, strings.ReplaceAll(plain(err), "registry: ", ""), mend)
	}
	switch {
	case errors.Is(err, session.ErrNoIssuer):
		return authority.NewProblem(authority.ProblemIssuer, "the id is not unique without the issuer that minted it", "give --issuer or set INTERLOCK_ISSUER (in the API: issuer)")
	case errors.Is(err, session.ErrInvalid):
		return problem(authority.ProblemInvalid, "see the API's description")
	case errors.Is(err, registry.ErrConflict):
		return problem(authority.ProblemConflict, "choose another id; to change an agent, name its revision")
	case errors.Is(err, registry.ErrTombstone):
		return problem(authority.ProblemTerminal, "choose another id")
	case errors.Is(err, registry.ErrNotActive):
		return problem(authority.ProblemConflict, "activate the agent first, if it can be: session-authority agents activate")
	case errors.Is(err, registry.ErrDigest):
		return problem(authority.ProblemConflict, "register the new digest with the agent, if the change is wanted")
	case errors.Is(err, registry.ErrUnknown):
		return problem(authority.ProblemNotFound, "register it first")
	case errors.Is(err, registry.ErrFull):
		return problem(authority.ProblemQuota, "let sessions expire, or register them for less time")
	case errors.Is(err, registry.ErrTooLarge):
		return problem(authority.ProblemTooLarge, "register fewer at once")
	case errors.Is(err, registry.ErrBusy):
		return problem(authority.ProblemOverloaded, "try again in a moment")
	case errors.Is(err, registry.ErrUnavailable), errors.Is(err, registry.ErrClosed):
		return authority.NewProblem(authority.ProblemUnavailable, "the registry does not answer: see session-authority status", again)
	}
	return err
}
