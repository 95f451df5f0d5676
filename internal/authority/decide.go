package authority

import (
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/interlock-fabric/interlock/pkg/authority"
	"github.com/interlock-fabric/interlock/pkg/filter"
	"github.com/interlock-fabric/interlock/pkg/session"
)

const (
	// revokeSkew is added to the end of a credential, so that its entry outlives
	// every verifier's tolerance for clocks.
	revokeSkew = 5 * time.Minute
	// maxAhead bounds an issued-before in the future: beyond a clock's error it
	// would deny callers who have yet to sign in.
	maxAhead   = 5 * time.Minute
	maxPreview = 20
	maxListed  = 8 // names shown in a mend
)

// tenants are the tenants that the key set names, with their digest keys.
type tenants struct {
	list []*session.TenantSecret
}

func (t tenants) names() []string {
	out := make([]string, len(t.list))
	for i, s := range t.list {
		out[i] = s.Name()
	}
	return out
}

func (t tenants) find(name string) *session.TenantSecret {
	i := slices.IndexFunc(t.list, func(s *session.TenantSecret) bool { return s.Name() == name })
	if i < 0 {
		return nil
	}
	return t.list[i]
}

// resolve returns the named tenant; an empty name is the only tenant there is.
func (t tenants) resolve(name string) (*session.TenantSecret, error) {
	if name == "" && len(t.list) == 1 {
		return t.list[0], nil
	}
	names := t.names()
	if len(names) > maxListed {
		names = append(names[:maxListed], "…")
	}
	known := strings.Join(names, ", ")
	if name == "" {
		return nil, authority.NewProblem(authority.ProblemTenant, "there is more than one tenant", "name one of "+known)
	}
	if s := t.find(name); s != nil {
		return s, nil
	}
	return nil, authority.NewProblem(authority.ProblemTenant, fmt.Sprintf("no tenant %.64q", name), "name one of "+known)
}

// planner turns requests into entries. It does no I/O.
type planner struct {
	tenants tenants
	issuers []string
	state   *filter.Set
	now     time.Time
	// exemptions returns those that are declared; nil where none are asked for. Only
	// what counted at declaredBy applies.
	exemptions func() ([]declared, error)
	declaredBy time.Time
	// all are the tenants that there are, also where their keys are not here.
	all []session.Tenant
	// own is set for what the authority decides by itself, and not a person.
	own bool
}

// plan is what a request comes to.
type plan struct {
	entries  []session.Entry
	wide     bool
	would    []string
	warnings []string
	// targets and except are what is named, in canonical form.
	targets, except []session.Target
	// spared are those of except that the declared exemptions, or the request,
	// name.
	spared []spared
	// restore is the staged restore that is planned; nil for all others.
	restore *restore
	// touched are what the targets ask of whoever decides, each once.
	touched []touched
}

// touched is a tenant, or "" for all, and how wide a target in it is.
type touched struct {
	tenant           string
	wide, everything bool
}

// named is a target with its key.
type named struct {
	text  string
	key   session.Key
	shape session.Shape
	wide  bool
	// target is canonical.
	target session.Target
	// tenant is the name of the target's; empty for all.
	tenant string
}

// everything reports whether the target is a whole tenant, or all of them.
func (n *named) everything() bool {
	return n.shape == session.Shape(session.KindGlobal) || n.shape == session.Shape(session.KindTenant)
}

func invalid(mend, format string, a ...any) error {
	return authority.NewProblem(authority.ProblemInvalid, fmt.Sprintf(format, a...), mend)
}

// plan checks the request and maps it to entries. Errors are Problems.
func (p *planner) plan(r *authority.Request) (*plan, error) {
	if !slices.Contains(authority.Operations(), r.Operation) {
		var names []string
		for _, o := range authority.Operations() {
			names = append(names, string(o))
		}
		return nil, invalid("use one of "+strings.Join(names, ", "), "unknown operation %.64q", r.Operation)
	}
	if n := len(r.Targets); n == 0 || n > authority.MaxTargets {
		return nil, invalid(fmt.Sprintf("name 1 to %d", authority.MaxTargets), "%d targets", n)
	}
	if err := fits(r); err != nil {
		return nil, err
	}
	base, except, err := p.base(r)
	if err != nil {
		return nil, err
	}
	out := &plan{entries: make([]session.Entry, 0, len(r.Targets))}
	for _, n := range except {
		out.except = append(out.except, n.target)
		out.spared = append(out.spared, spared{authority.Spared{Target: n.text}, n.target})
	}
	seen := make(map[session.Key]bool, len(r.Targets))
	for _, t := range r.Targets {
		n, err := p.name(t)
		if err != nil {
			return nil, err
		}
		if seen[n.key] {
			continue
		}
		seen[n.key] = true
		out.wide = out.wide || n.wide
		if t := (touched{n.tenant, n.wide, n.everything()}); !slices.Contains(out.touched, t) {
			out.touched = append(out.touched, t)
		}
		out.targets = append(out.targets, n.target)
		before := len(out.entries)
		if err := p.apply(out, r, n, base); err != nil {
			return nil, err
		}
		for i := range out.entries[before:] {
			if err := out.entries[before+i].Validate(); err != nil {
				return nil, invalid("see the API's description", "%s: %s", n.text, plain(err))
			}
		}
		if len(out.would) < maxPreview {
			d := base
			if len(out.entries) > before {
				d.Except = out.entries[before].Except
			}
			out.would = append(out.would, describe(r, n, d))
		}
	}
	if len(seen) > 1 {
		out.wide = true
	}
	if r.NoExemptions && !out.everything() {
		return nil, invalid("leave it out", "no_exemptions is for what is decided on a whole tenant, or on everything")
	}
	if missing := p.unaccounted(r, out); len(missing) > 0 {
		if r.Commit || !out.wide {
			return nil, saysNotWhy(missing)
		}
		out.warnings = append(out.warnings, "with --commit it takes "+strings.Join(flags(missing), " and "))
	}
	if n := len(out.entries); n > session.MaxBatchEntries {
		return nil, invalid("name fewer targets at once, or one effect", "the decision has %d entries, at most %d", n, session.MaxBatchEntries)
	}
	return out, nil
}

// unaccounted returns what the decision must say and does not: why it is taken
// and, where it reaches further than single credentials, the incident. A lift and a
// drill are reason enough, and what the authority decides by itself brings its own.
func (p *planner) unaccounted(r *authority.Request, pl *plan) (missing []string) {
	if r.Drill || p.own {
		return nil
	}
	if r.Reason == "" && !r.Operation.Lifts() {
		missing = append(missing, "reason")
	}
	if r.Incident == "" && pl.beyondSingle() {
		missing = append(missing, "incident")
	}
	return missing
}

func saysNotWhy(missing []string) error {
	mend := "give " + strings.Join(flags(missing), " and ")
	if slices.Contains(missing, "reason") {
		mend += "; a reason is one of " + strings.Join(authority.Reasons(), ", ")
	}
	p := authority.NewProblem(authority.ProblemUnaccounted, "the decision does not say why: no "+strings.Join(missing, ", no "), mend)
	p.Fields = missing
	return p
}

// flags are the flags of the command line for members of a request.
func flags(members []string) []string {
	out := make([]string, len(members))
	for i, m := range members {
		out[i] = "--" + m
	}
	return out
}

// beyondSingle reports whether a target is more than a single session, token,
// credential or key.
func (pl *plan) beyondSingle() bool {
	return slices.ContainsFunc(pl.touched, func(t touched) bool { return t.wide })
}

// fits refuses what does not go with the operation, and says why: what is
// ignored is believed to have worked.
func fits(r *authority.Request) error {
	op := r.Operation
	for _, f := range []struct {
		name  string
		given bool
		on    []authority.Operation
		mend  string
	}{
		{"effect", r.Effect != "", []authority.Operation{authority.Resume}, "leave it out: only resume takes one"},
		{"issued_before", !r.IssuedBefore.IsZero(), []authority.Operation{authority.Revoke}, "leave it out: only revoke takes one"},
		{"expires", !r.Expires.IsZero() || r.For != 0, []authority.Operation{authority.Revoke, authority.Suspend, authority.StepUp, authority.Reduce},
			"leave the end out: what was lifted has none, and a kill stands until it is restored"},
		{"acr", r.ACR != "", []authority.Operation{authority.StepUp}, "leave it out: only step_up takes one"},
		{"except", len(r.Except) > 0, []authority.Operation{authority.Revoke, authority.Suspend, authority.StepUp, authority.Reduce, authority.Kill},
			"leave the exemptions out: a lift has none"},
		{"no_exemptions", r.NoExemptions, []authority.Operation{authority.Revoke, authority.Suspend, authority.StepUp, authority.Reduce, authority.Kill},
			"leave it out: a lift has none"},
		{"share", r.Share != 0, []authority.Operation{authority.Resume, authority.Restore}, "leave it out: only resume and restore are done in stages"},
		{"stages", len(r.Stages) > 0, []authority.Operation{authority.Restore}, "leave them out: only a kill is restored in stages that are held"},
		{"hold", r.Hold != 0, []authority.Operation{authority.Restore}, "leave it out: only a kill is restored in stages that are held"},
		{"credentials", r.Credentials, []authority.Operation{authority.Kill}, "leave it out: only kill takes it"},
	} {
		if f.given && !slices.Contains(f.on, op) {
			return invalid(f.mend, "%s does not take %s", op, f.name)
		}
	}
	switch {
	case !r.Expires.IsZero() && r.For != 0:
		return invalid("give one of them", "both expires and for are given")
	case r.Hold != 0 && len(r.Stages) == 0:
		return invalid("give the stages, as in 1%,10%,100%", "hold is of stages, and there are none")
	case r.For < 0:
		return invalid("give a time to come", "for is negative")
	case r.Share < 0 || r.Share > 100 || r.Share != 0 && r.Share < 0.01 || math.IsNaN(r.Share):
		return invalid("give 0.01 to 100 percent", "share is out of range")
	case op == authority.Kill && slices.ContainsFunc(r.Targets, func(t authority.Target) bool {
		return len(t.Terms) != 1 || t.Terms[0].Kind != session.KindGlobal.String() && t.Terms[0].Kind != session.KindTenant.String()
	}):
		return invalid("kill global, or kill tenant NAME; to deny one caller, revoke or suspend it", "a kill is of everything, in one tenant or in all")
	}
	return nil
}

// base has what all entries of the decision share.
func (p *planner) base(r *authority.Request) (e session.Entry, except []named, err error) {
	e = session.Entry{Op: session.OpSet, Incident: r.Incident, ACR: r.ACR, Drill: r.Drill}
	switch r.Operation {
	case authority.Revoke:
		e.Effect = session.EffectRevoked
	case authority.Suspend:
		e.Effect = session.EffectSuspended
	case authority.StepUp:
		e.Effect = session.EffectStepUp
	case authority.Reduce:
		e.Effect = session.EffectReduced
	case authority.Kill:
		e.Effect = session.EffectSuspended
		if r.Credentials {
			e.Effect = session.EffectRevoked
		}
		e.Reason = session.ReasonKill
	default:
		e.Op, e.Reason = session.OpLift, session.ReasonRestored
	}
	switch {
	case r.Reason != "":
		if !slices.Contains(authority.Reasons(), r.Reason) {
			return e, nil, invalid("use one of "+strings.Join(authority.Reasons(), ", "), "unknown reason %.64q", r.Reason)
		}
		reason, err := session.ParseReason(r.Reason)
		if err != nil {
			return e, nil, err
		}
		if r.Operation != authority.Kill { // by which a kill is known
			e.Reason = reason
		}
	case r.Drill && e.Reason == session.ReasonUnspecified:
		e.Reason = session.ReasonDrill
	}
	now := session.InstantOf(p.now)
	if !r.IssuedBefore.IsZero() {
		if e.IssuedBefore = session.InstantOf(r.IssuedBefore); r.IssuedBefore.After(p.now.Add(maxAhead)) || e.IssuedBefore <= 0 {
			return e, nil, invalid("give a time that has passed, or leave it out to deny those to come as well", "issued_before is %s, and it is %s", e.IssuedBefore, now)
		}
	}
	end := r.Expires
	if r.For != 0 {
		end = p.now.Add(time.Duration(r.For))
	}
	if !end.IsZero() {
		if !end.After(p.now) || end.Year() > 9999 {
			return e, nil, invalid("give a time to come", "the end %s has passed", end.UTC().Format(time.RFC3339))
		}
		if e.Effect == session.EffectRevoked {
			end = end.Add(revokeSkew)
		}
		e.Expires = session.InstantOf(end)
	}
	if len(r.Except) > session.MaxExcept {
		return e, nil, invalid(fmt.Sprintf("exempt at most %d", session.MaxExcept), "%d exemptions", len(r.Except))
	}
	for _, t := range r.Except {
		n, err := p.name(t)
		if err != nil {
			return e, nil, err
		}
		if err := exemptible(&n); err != nil {
			return e, nil, err
		}
		e.Except = append(e.Except, n.key)
		except = append(except, n)
	}
	e.Except = session.SortKeys(e.Except)
	if len(e.Except) == 0 {
		e.Except = nil
	}
	return e, except, nil
}

// name resolves a target of the API to its key.
func (p *planner) name(t authority.Target) (named, error) {
	target := session.Target{}
	var issuerless *authority.Term
	for i := range t.Terms {
		term := &t.Terms[i]
		kind, err := session.ParseKind(term.Kind)
		if err != nil {
			return named{}, authority.NewProblem(authority.ProblemInvalid, fmt.Sprintf("unknown target kind %.64q", term.Kind), "use one of "+kindNames())
		}
		issuer := term.Issuer
		if issuer == "" && len(p.issuers) == 1 {
			issuer = p.issuers[0]
		}
		if issuer == "" {
			issuerless = term
		}
		target.Terms = append(target.Terms, session.Term{Kind: kind, Issuer: issuer, Value: term.Value})
	}
	var secret *session.TenantSecret
	if len(target.Terms) != 1 || target.Terms[0].Kind != session.KindGlobal {
		name := t.Tenant
		if len(target.Terms) == 1 && target.Terms[0].Kind == session.KindTenant && name == "" {
			name = target.Terms[0].Value
		}
		var err error
		if secret, err = p.tenants.resolve(name); err != nil {
			return named{}, err
		}
		target.Tenant = secret.Name()
	} else if t.Tenant != "" {
		target.Tenant = t.Tenant // refused below
	}
	canonical, shape, err := target.Canonical()
	if err != nil {
		if issuerless != nil && errors.Is(err, session.ErrNoIssuer) {
			return named{}, authority.NewProblem(authority.ProblemIssuer,
				fmt.Sprintf("%s %.64q is not unique without the issuer that minted it", issuerless.Kind, issuerless.Value),
				"give --issuer or set INTERLOCK_ISSUER (in the API: the term's issuer)")
		}
		return named{}, invalid("see session-authority help targets", "%s: %s", clip(t.String()), plain(err))
	}
	n := named{text: clip(canonical.String()), shape: shape, key: session.GlobalKey(), wide: true, target: canonical}
	for _, k := range shape.Kinds() {
		n.wide = n.wide && k.Wide()
	}
	if secret != nil {
		n.tenant = secret.Name()
		if n.key, err = secret.Key(canonical); err != nil {
			return named{}, invalid("see session-authority help targets", "%s: %s", n.text, plain(err))
		}
		if session.Kind(shape) != session.KindTenant && len(p.tenants.list) > 1 {
			n.text += " of tenant " + secret.Name()
		}
	}
	return n, nil
}

// apply adds the entries for one target.
func (p *planner) apply(out *plan, r *authority.Request, n named, base session.Entry) error {
	base.Key = n.key
	if base.Op == session.OpSet {
		if err := p.spare(out, r, &n, &base); err != nil {
			return err
		}
	}
	warn := func(format string, a ...any) {
		if len(out.warnings) < maxPreview {
			out.warnings = append(out.warnings, n.text+" "+fmt.Sprintf(format, a...))
		}
	}
	inForce := map[session.Effect]*session.Record{}
	if base.Op == session.OpLift { // what is set does not depend on it
		records := p.state.Lookup(n.key)
		for i := range records {
			if records[i].Drill == r.Drill {
				inForce[records[i].Effect] = &records[i]
			}
		}
	}
	lift := func(e session.Effect) {
		l := base
		l.Effect = e
		if e == session.EffectRevoked {
			l.IssuedBefore = session.InstantOf(p.now)
		} else if r.Share < 100 {
			l.Share = uint16(math.Round(r.Share * session.ShareUnit / 100))
		}
		out.entries = append(out.entries, l)
	}
	switch r.Operation {
	case authority.Kill:
		out.entries = append(out.entries, base)

	case authority.Resume:
		effects := []session.Effect{session.EffectSuspended, session.EffectStepUp, session.EffectReduced}
		if r.Effect != "" {
			e, err := session.ParseEffect(r.Effect)
			if err != nil || !slices.Contains(effects, e) {
				return invalid("use suspended, step_up or reduced; restore lifts a revocation", "resume does not lift %.64q", r.Effect)
			}
			effects = []session.Effect{e}
		}
		if s := inForce[session.EffectSuspended]; s != nil && s.Reason == session.ReasonKill && slices.Contains(effects, session.EffectSuspended) {
			return invalid("use restore", "%s is killed, not suspended", n.text)
		}
		before := len(out.entries)
		for _, e := range effects {
			if inForce[e] != nil {
				lift(e)
			}
		}
		if len(out.entries) == before {
			warn("is not %s here; lifted all the same, since an enforcer may hold it from an earlier epoch", orList(effects))
			for _, e := range effects {
				lift(e)
			}
		}
		if inForce[session.EffectRevoked] != nil && (!n.shape.Terminal() || inForce[session.EffectRevoked].IssuedBefore == 0) {
			warn("is also revoked, and stays so")
		}

	case authority.Restore:
		switch {
		case len(r.Stages) > 0:
			return p.stage(out, r, &n)
		case n.shape.Terminal() && !r.Drill:
			return authority.NewProblem(authority.ProblemTerminal, fmt.Sprintf("a revoked %s never comes back", n.shape), "have the caller sign in again for a new one")
		case n.everything():
			return p.restoreAll(out, r, n, inForce, lift, warn)
		case r.Share != 0 && r.Share < 100:
			return invalid("leave share out", "a revoked %s is restored at once, and its earlier sessions stay dead", n.shape)
		}
		switch {
		case inForce[session.EffectRevoked] == nil && inForce[session.EffectSuspended] != nil:
			warn("is suspended, not revoked: resume lifts that")
		case inForce[session.EffectRevoked] == nil:
			warn("is not revoked here; lifted all the same, since an enforcer may hold it from an earlier epoch")
		}
		lift(session.EffectRevoked)

	default:
		if base.Effect == session.EffectRevoked && base.Expires != 0 && base.Validate() != nil {
			return invalid("leave the end out, give issued_before as well, or suspend it instead", "a revoked %s stands until it is restored: credentials yet to come can match it", n.shape)
		}
		out.entries = append(out.entries, base)
	}
	return nil
}

// restoreAll lifts a kill.
func (p *planner) restoreAll(out *plan, r *authority.Request, n named, inForce map[session.Effect]*session.Record, lift func(session.Effect), warn func(string, ...any)) error {
	staged := r.Share != 0 && r.Share < 100
	suspended := inForce[session.EffectSuspended] != nil
	revoked := inForce[session.EffectRevoked] != nil && inForce[session.EffectRevoked].IssuedBefore == 0
	if revoked && staged {
		return invalid("leave share out", "%s was killed with its credentials: they stay dead, so there is nothing to stage", n.text)
	}
	if !suspended && !revoked {
		warn("is not killed here; lifted all the same, since an enforcer may hold it from an earlier epoch")
		suspended, revoked = true, !staged
	}
	if suspended {
		lift(session.EffectSuspended)
	}
	if revoked {
		lift(session.EffectRevoked)
		if r := inForce[session.EffectRevoked]; r != nil {
			// Whoever has authenticated since the kill need not do so again.
			out.entries[len(out.entries)-1].IssuedBefore = r.Since
		}
	}
	return nil
}

func kindNames() string {
	var names []string
	for _, k := range session.Kinds() {
		names = append(names, k.String())
	}
	return strings.Join(names, ", ")
}

func orList(effects []session.Effect) string {
	var names []string
	for _, e := range effects {
		names = append(names, e.String())
	}
	return strings.Join(names, " or ")
}

// describe says what the decision would do to one target.
func describe(r *authority.Request, n named, e session.Entry) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s %s", strings.ReplaceAll(string(r.Operation), "_", "-"), n.text)
	switch {
	case len(r.Stages) > 0:
		fmt.Fprintf(&b, " in %d stages: %s, each held for %s", len(r.Stages), strings.Join(r.Stages, ", "), time.Duration(r.Hold))
	case r.Operation.Lifts() && r.Share > 0 && r.Share < 100:
		fmt.Fprintf(&b, " for %g%% of its sessions", r.Share)
	case r.Operation.Lifts():
	case r.Operation == authority.Kill && r.Credentials:
		b.WriteString(": every session under it, now and to come; its credentials stay dead when it is restored")
	case r.Operation == authority.Kill:
		b.WriteString(": every session under it, now and to come; its credentials come back when it is restored")
	case e.IssuedBefore != 0:
		fmt.Fprintf(&b, ": every session under it from before %s", e.IssuedBefore)
	default:
		b.WriteString(": every session under it, now and to come")
	}
	if e.Expires != 0 && e.Effect != session.EffectRevoked {
		fmt.Fprintf(&b, ", until %s", e.Expires)
	}
	if n := exempt(e.Except); n > 0 {
		fmt.Fprintf(&b, ", %d exempted", n)
	}
	if r.Drill {
		b.WriteString(" (a drill: nobody is denied)")
	}
	return b.String()
}

// plain takes the prefixes of the error tree off, which tell a person nothing.
func plain(err error) string {
	s := err.Error()
	for _, parent := range []error{session.ErrMalformed, session.ErrCritical, session.ErrNoIdentity, session.ErrInvalid} {
		s = strings.ReplaceAll(s, parent.Error()+": ", "")
	}
	return strings.TrimPrefix(s, "entry: ")
}

func clip(s string) string {
	if len(s) > 200 {
		return strings.ToValidUTF8(s[:200], "") + "…"
	}
	return s
}

// decisionID names a decision by its idempotency key and what was asked for: a
// key that is used again for something else never passes the first answer off
// as the second's.
func decisionID(key string, r *authority.Request) (id session.DecisionID, content [32]byte, err error) {
	asked := *r
	asked.Commit = false
	b, err := json.Marshal(asked)
	if err != nil {
		return id, content, fmt.Errorf("request: %w", err)
	}
	content = sha256.Sum256(b)
	h := sha256.New()
	h.Write([]byte("interlock decision 1\x00"))
	k := sha256.Sum256([]byte(key))
	h.Write(k[:])
	h.Write(content[:])
	copy(id[:], h.Sum(nil))
	return id, content, nil
}
