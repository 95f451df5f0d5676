package authority

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/interlock-fabric/interlock/internal/access"
	"github.com/interlock-fabric/interlock/internal/broker"
	"github.com/interlock-fabric/interlock/internal/registry"
	"github.com/interlock-fabric/interlock/internal/roster"
	"github.com/interlock-fabric/interlock/internal/sequencer"
	"github.com/interlock-fabric/interlock/pkg/authority"
	"github.com/interlock-fabric/interlock/pkg/session"
)

const (
	// renewAhead is how long before its end a key set is warned of.
	renewAhead  = 14 * 24 * time.Hour
	maxNotFresh = 100
)

// planner plans for p: with the tenants that exist for it.
func (a *Authority) planner(p *access.Principal) *planner {
	t, _ := a.tenants()
	now := time.Now()
	return &planner{
		tenants: t.within(p.Visible()), issuers: a.o.Issuers, state: a.seq.State(), now: now,
		all:        a.store.KeySet().Tenants,
		exemptions: sync.OnceValues(func() ([]declared, error) { return a.exemptions(now) }), declaredBy: now,
	}
}

// Decide takes a decision, or previews it, and returns when the log and the audit
// have it, or have not said so in time; it is the API's.
func (a *Authority) Decide(ctx context.Context, idempotencyKey string, r authority.Request) (*authority.Decision, error) {
	if err := breakGlass(&r); err != nil {
		return a.decided(ctx, &r, nil, err, "")
	}
	d, err := a.decide(ctx, a.planner(access.From(ctx)), idempotencyKey, r)
	return a.decided(ctx, &r, d, err, "")
}

// decideOwn takes a decision of which the authority itself says why; see Decide.
func (a *Authority) decideOwn(ctx context.Context, idempotencyKey string, r authority.Request) (*authority.Decision, error) {
	pl := a.planner(access.From(ctx))
	pl.own = true
	d, err := a.decide(ctx, pl, idempotencyKey, r)
	return a.decided(ctx, &r, d, err, "")
}

// decided records a decision and returns it.
func (a *Authority) decided(ctx context.Context, r *authority.Request, d *authority.Decision, err error, detail string) (*authority.Decision, error) {
	rec := a.decisionRecord(r, d, err)
	if r.BreakGlass != "" {
		detail = "break-glass: " + r.BreakGlass
	}
	rec.Detail = strings.Trim(rec.Detail+"; "+detail, "; ")
	if d != nil && !d.Committed {
		a.noteFor(ctx, rec)
		return d, nil
	}
	switch failed := a.record(ctx, rec); {
	case d == nil || failed == nil:
	case errors.Is(failed, context.DeadlineExceeded):
		d.Durable = false
	default:
		d.Durable = false
		d.Warnings = append(d.Warnings, "the decision is not in the audit: "+plain(failed))
	}
	if d != nil && !d.Duplicate {
		a.watched.decided(place{d.Epoch, d.Number}, r.Incident)
	}
	return d, err
}

func (a *Authority) decide(ctx context.Context, by *planner, idempotencyKey string, r authority.Request) (*authority.Decision, error) {
	p := access.From(ctx)
	pl, err := by.plan(&r)
	if err != nil {
		return nil, err
	}
	if err := permitted(p, &r, pl); err != nil {
		return nil, err
	}
	if err := a.tombstoned(&r, pl); err != nil {
		return nil, err
	}
	switch two := a.needsTwo(p, &r, pl); {
	case r.BreakGlass != "" && (!pl.everything() || r.Drill):
		return nil, invalid("leave it out", "break_glass is for what needs two persons")
	case two && r.Commit && r.BreakGlass == "":
		return nil, secondPerson()
	case two && r.BreakGlass == "":
		pl.warnings = append(pl.warnings, "it takes a second commander: with --commit it is proposed, for another to approve")
	case r.Commit && !pl.everything() && pl.beyondSingle():
		if err := a.wide.admit(p, time.Now()); err != nil {
			return nil, err
		}
	}
	if pl.wide && !r.Commit {
		d := &authority.Decision{Operation: r.Operation, Warnings: pl.warnings, Exempted: pl.exempted(), Preview: a.preview(&r, pl, p)}
		d.Warnings = append(d.Warnings, a.count(d.Preview, pl, p.Visible())...)
		return d, nil
	}
	if !p.Local() {
		// What keys others use is nobody's to find out.
		idempotencyKey = p.Name + "\x00" + idempotencyKey
	}
	d, err := a.commit(ctx, idempotencyKey, &r, pl)
	if err == nil && r.BreakGlass != "" {
		a.glassBroken(ctx, p, &r, pl, d)
	}
	return d, err
}

// commit takes a decision that may be taken.
func (a *Authority) commit(ctx context.Context, idempotencyKey string, r *authority.Request, pl *plan) (*authority.Decision, error) {
	id, content, err := decisionID(idempotencyKey, r)
	if err != nil {
		return nil, err
	}
	if a.once422.check(idempotencyKey, content) {
		return nil, authority.NewProblem(authority.ProblemIdempotency, "the idempotency key was used for another request", "use a new key for a new request")
	}
	d := &authority.Decision{Operation: r.Operation, Warnings: pl.warnings, Exempted: pl.exempted()}
	if r.NoExemptions {
		a.log.Warn("NO EXEMPTIONS: decided without sparing those that are declared", "by", access.From(ctx).Name, "incident", r.Incident)
	}
	a.once422.add(idempotencyKey, content)
	if pl.restore != nil {
		d, err := a.beginRestore(ctx, id, pl)
		if d != nil {
			d.Warnings = append(pl.warnings, d.Warnings...)
		}
		return d, err
	}
	res, err := a.seq.Decide(ctx, sequencer.Decision{ID: id, Entries: pl.entries})
	if err != nil {
		return nil, &undecided{decideProblem(err), id}
	}
	a.hub.note(res.Epoch, res.Number, res.At.Time(), pl.entries)
	d.Committed, d.Epoch, d.Number, d.At = true, res.Epoch, res.Number, res.At.Time()
	d.Durable, d.Duplicate, d.Entries, d.ID = res.Durable, res.Duplicate, len(pl.entries), hex.EncodeToString(id[:])
	// The sequence alone cannot be traced to a value.
	a.log.Info("decided", "by", access.From(ctx).Name, "operation", string(r.Operation), "epoch", d.Epoch, "number", d.Number, "entries", d.Entries,
		"incident", r.Incident, "drill", r.Drill, "durable", d.Durable, "duplicate", d.Duplicate)
	return d, nil
}

// undecided is why a decision of that id was not taken, or is not known to be.
type undecided struct {
	error
	id session.DecisionID
}

func (u *undecided) Unwrap() error { return u.error }

// preview counts the enforcers of the tenants that the decision is about, as p may
// see them.
func (a *Authority) preview(r *authority.Request, pl *plan, p *access.Principal) *authority.Preview {
	v := &authority.Preview{Would: pl.would, Targets: len(r.Targets), Tenants: []authority.TenantPreview{}}
	for _, e := range a.enforcersIn(p.Visible()) {
		if slices.ContainsFunc(pl.touched, func(t touched) bool { return t.tenant == "" || slices.Contains(e.Tenants, t.tenant) }) {
			v.Enforcers++
			v.Running += e.Running
		}
	}
	return v
}

func decideProblem(err error) error {
	again := "send it again with the same idempotency key: it is taken once"
	switch {
	case errors.Is(err, sequencer.ErrQuota):
		return authority.NewProblem(authority.ProblemQuota, "the tenant's entries would exceed its quota", "lift what is not needed any more, or decide on fewer, wider targets")
	case errors.Is(err, sequencer.ErrBusy):
		return authority.NewProblem(authority.ProblemOverloaded, "too many decisions are waiting for the store", again)
	case errors.Is(err, sequencer.ErrRolledBack):
		return authority.NewProblem(authority.ProblemUnavailable, "the log was rolled back: enforcers have seen more of it", "open a new epoch: session-authority epoch open")
	case errors.Is(err, sequencer.ErrTrimmed):
		return authority.NewProblem(authority.ProblemUnavailable, "the log was trimmed, and no published segment leads up to it",
			"restore the streams from a backup and start the authority again, or open a new epoch: session-authority epoch open")
	case errors.Is(err, sequencer.ErrUpgrade):
		return authority.NewProblem(authority.ProblemUnavailable, "the log has what this version cannot read", "upgrade this authority")
	case errors.Is(err, sequencer.ErrNoKey):
		return authority.NewProblem(authority.ProblemUnavailable, "no signing key that the key set trusts is here", "renew or rotate: session-authority keys renew, session-authority keys rotate")
	case errors.Is(err, sequencer.ErrUntrusted):
		return authority.NewProblem(authority.ProblemUnavailable, "the signing key may not decide for this tenant", "ask an authority whose key may")
	case errors.Is(err, sequencer.ErrNoWriter), errors.Is(err, sequencer.ErrClosed),
		errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return authority.NewProblem(authority.ProblemUnavailable, "whether the decision was taken is not known", again)
	case errors.Is(err, session.ErrInvalid), errors.Is(err, session.ErrMalformed):
		return invalid("see the API's description", "%s", plain(err))
	}
	return err
}

// Coverage says where a decision is in force; it is the API's.
func (a *Authority) Coverage(ctx context.Context, epoch, number uint64, wait time.Duration) (*authority.Coverage, error) {
	scope := access.From(ctx).Scope(access.ReadCoverage)
	now, head, _ := a.seq.Head()
	_, heard := a.hub.timeAt(epoch, number)
	if number == 0 || epoch != now || number > head && !heard || !scope.All() && !a.hub.touches(epoch, number, scope.Has) {
		return nil, authority.NewProblem(authority.ProblemNotFound, fmt.Sprintf("no decision %d in epoch %d; the newest is %d in epoch %d", number, epoch, head, now),
			"use the epoch and number in the answer to the decision")
	}
	ctx, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	c := a.tracker.Wait(ctx, epoch, number, a.view(scope))
	now, head, _ = a.seq.Head()
	c.Durable = epoch == now && number <= head
	return &c, nil
}

// Status says how the authority and its enforcers are; it is the API's.
func (a *Authority) Status(ctx context.Context) (*authority.Status, error) {
	p := access.From(ctx)
	s := a.status(p.Scope(access.ReadStatus))
	if a.access.Load() != nil {
		a.warnOfGlass(ctx, p.Scope(access.ReadStatus), func(format string, args ...any) { s.Warnings = append(s.Warnings, fmt.Sprintf(format, args...)) })
	}
	return s, nil
}

// status is the status as a scope shows it.
func (a *Authority) status(scope access.Scope) *authority.Status {
	st, ks, now := a.seq.Status(), a.store.KeySet(), time.Now()
	s := &authority.Status{
		Version: a.o.Version, Writer: st.Writer, Epoch: st.Epoch, Number: st.Number, Head: hex.EncodeToString(st.Head[:]),
		Time: now.UTC(), Entries: st.Entries, Tenants: slices.DeleteFunc(tenantNames(ks), func(t string) bool { return !scope.Has(t) }),
		KeySet:  authority.KeySetStatus{Version: ks.Version, NotAfter: ks.NotAfter.Time(), Keys: []string{}},
		Segment: st.Segment, SegmentTime: st.SegmentAt, LogFrom: st.LogFrom,
	}
	for _, k := range ks.Keys {
		if !k.Withdrawn && k.Use != session.UseAudit {
			s.KeySet.Keys = append(s.KeySet.Keys, session.KeyIDOf(k.Public).String())
		}
	}
	if !scope.All() { // how many there are elsewhere is nobody's to know
		s.Entries = 0
		for _, t := range ks.Tenants {
			if scope.Has(t.Name) {
				s.Entries += a.seq.State().TenantLen(t.ID)
			}
		}
	}
	warn := func(format string, args ...any) { s.Warnings = append(s.Warnings, fmt.Sprintf(format, args...)) }
	switch left := ks.NotAfter.Time().Sub(now); {
	case left <= 0:
		warn("the key set has ended: enforcers deny everything: session-authority keys renew")
	case left < renewAhead:
		warn("the key set ends in %s, and enforcers deny everything from then on: session-authority keys renew", left.Round(time.Minute))
	}
	if _, err := a.store.Signer(session.InstantOf(now)); err != nil {
		warn("no signing key here: session-authority keys rotate")
	}
	switch {
	case errors.Is(st.Halted, sequencer.ErrRolledBack):
		warn("the log was rolled back, and nothing is written: session-authority epoch open")
	case errors.Is(st.Halted, sequencer.ErrTrimmed):
		warn("the log was trimmed, no published segment leads up to it, and nothing is written: restore the streams from a backup and start again, or session-authority epoch open, which begins with the entries held here")
	case st.Halted != nil:
		warn("nothing is written: %v", st.Halted)
	}
	if st.SegmentsRefused > 0 {
		warn("%d published segments were refused, and older ones or the log used: see the log of this authority", st.SegmentsRefused)
	}
	if _, missing := a.tenants(); len(missing) > 0 && scope.All() {
		warn("the keys of %d tenants are not here, the first is %s: copy keys/tenants.json from where they were added", len(missing), missing[0])
	}
	if n := a.tracker.Strangers(); n > 0 && scope.All() {
		warn("%d receipts came in the name of enforcers that are not enrolled", n)
	}
	trails, strange := a.reports.Enforcers()
	for _, e := range a.trailIn(trails, scope) {
		if e.Refused > 0 {
			warn("%d reports in the name of %s were refused", e.Refused, e.Name)
		}
		if e.Missing > 0 {
			warn("%d reports of %s are missing: its trail has gaps", e.Missing, e.Name)
		}
		if n := a.discovered.foreignOf(e.Name); n > 0 {
			warn("%s reported %d times of callers of tenants for which it is not enrolled: that is left out", e.Name, n)
		}
	}
	if strange > 0 && scope.All() {
		warn("%d reports came in the name of enforcers that are not enrolled", strange)
	}
	if _, ok := ks.AuditKey(); !ok {
		warn("there is no key to seal the audit and the enforcers' reports to: session-authority keys rotate --audit")
	}
	if scope.All() {
		a.warnOfOrders(warn)
	}
	au := a.audit.Status()
	if scope.All() {
		s.Audit.Number, s.Audit.Waiting = au.Number, au.Waiting
	}
	if au.Failing != nil {
		warn("the audit cannot be written since %s, and %d of its records wait: see the log of this authority", au.Since.UTC().Format(time.RFC3339), au.Waiting)
	}
	if au.Lost > 0 {
		warn("%d records of the audit were stored and are not there any more: its stream was rolled back, or made anew", au.Lost)
	}
	if au.Missed > 0 {
		warn("%d records are missing from the audit: see the log of this authority", au.Missed)
	}
	if au.Strays > 0 {
		warn("%d messages in the audit's stream are not part of its chain: session-authority audit verify", au.Strays)
	}
	list := a.enforcersIn(scope)
	// Read after the receipts: none that is honest can be ahead of it.
	epoch, head, _ := a.seq.Head()
	for _, e := range list {
		s.Enforcers.Enrolled++
		switch e.Condition {
		case authority.ConditionFresh:
			s.Enforcers.Fresh++
		case authority.ConditionDenying:
			s.Enforcers.Denying++
		case authority.ConditionSilent:
			s.Enforcers.Silent++
		case authority.ConditionAbsent:
			s.Enforcers.Absent++
		}
		if e.Mode != "" && e.Mode != session.ModeStrict.String() {
			s.Enforcers.Exposed++
		}
		switch {
		case e.Canary == nil || e.Condition == authority.ConditionSilent:
		case e.Canary.Armed:
			s.Enforcers.Armed++
			a.holdToTarget(s, &e)
		default:
			s.Enforcers.Unarmed++
			warn("enforcer %s is not armed: %s", e.Name, e.Canary.Why)
		}
		if e.Diverged || st.Writer && (e.Epoch > epoch || e.Epoch == epoch && e.Confirmed > head) {
			warn("enforcer %s reports a head that is not the log's", e.Name)
		}
		if e.Divergence != "" {
			warn("enforcer %s: %s", e.Name, e.Divergence)
		}
		if e.ReceiptsRefused > 0 {
			warn("%d receipts in the name of %s were refused", e.ReceiptsRefused, e.Name)
		}
		if e.Condition != authority.ConditionFresh && len(s.NotFresh) < maxNotFresh {
			s.NotFresh = append(s.NotFresh, e)
		}
	}
	if t := s.TimeToRevoke; t != nil && t.Over > 0 {
		warn("%d of %d armed enforcers deny later than the target of %g ms: the slowest is %s with %.1f ms", t.Over, s.Enforcers.Armed, t.TargetMillis, t.Slowest, t.SlowestMillis)
	}
	if r := a.registry.Status(); scope.All() {
		s.Registry = &authority.RegistryStatus{
			Sessions: r.Sessions, Agents: r.Agents, Bytes: r.Bytes, Batch: r.Number, Snapshot: r.SnapshotNumber, Pending: r.Pending, Refused: r.Refused,
		}
		switch {
		case errors.Is(r.Err, registry.ErrKey):
			warn("the registry cannot be read: copy the sealing key, keys/audit-*.key, from where it was made")
		case r.Err != nil:
			warn("the registry takes no registrations: %v", r.Err)
		}
		if r.Refused > 0 {
			warn("%d messages in the registry's log were written by no authority, or altered", r.Refused)
		}
		if p := a.agents.Load(); p != nil {
			if err := p.Status().Err; err != nil {
				warn("the registered agents are not published, and enforcers that hold callers against them will deny: %v", err)
			}
		}
	}
	s.KillsInForce = a.kills(scope)
	if list, err := a.restoresIn(scope); err == nil {
		s.Restores = slices.DeleteFunc(list, func(r authority.StagedRestore) bool { return r.State != authority.RestoreRunning })
	}
	for _, k := range s.KillsInForce {
		if !slices.Contains(s.Kills, k.Target) { // with its credentials and without
			s.Kills = append(s.Kills, k.Target)
		}
	}
	return s
}

// holdToTarget counts an armed enforcer's last canary.
func (a *Authority) holdToTarget(s *authority.Status, e *authority.Enforcer) {
	if s.TimeToRevoke == nil {
		s.TimeToRevoke = &authority.TimeToRevoke{TargetMillis: float64(a.o.RevokeTarget) / float64(time.Millisecond)}
	}
	t := s.TimeToRevoke
	if e.Canary.LatencyMillis > t.SlowestMillis {
		t.SlowestMillis, t.Slowest = e.Canary.LatencyMillis, e.Name
	}
	if e.Canary.LatencyMillis > t.TargetMillis {
		t.Over++
	}
}

// Explain says what denies a caller; it is the API's.
func (a *Authority) Explain(ctx context.Context, r authority.ExplainRequest) (*authority.Explanation, error) {
	pl := a.planner(access.From(ctx))
	pl.tenants = pl.tenants.within(access.From(ctx).Scope(access.Explain))
	x, err := pl.explain(&r)
	if err != nil {
		return nil, err
	}
	x.Epoch, x.Number, _ = a.seq.Head()
	return x, nil
}

// Enforcers returns the roster; it is the API's.
func (a *Authority) Enforcers(ctx context.Context) ([]authority.Enforcer, error) {
	return a.enforcersIn(access.From(ctx).Scope(access.ListEnforcers)), nil
}

// enforcers is the whole roster.
func (a *Authority) enforcers() []authority.Enforcer { return a.enforcersIn(access.Everything()) }

// Trail returns what enforcers recorded; it is the API's.
func (a *Authority) Trail(ctx context.Context, q authority.TrailQuery) (*authority.Trail, error) {
	scope := access.From(ctx).Scope(access.ReadTrail)
	t, err := a.reports.Records(ctx, q, within(scope))
	if err != nil {
		return nil, reportProblem(err)
	}
	t.Enforcers = a.trailIn(t.Enforcers, scope)
	return t, nil
}

// Seen returns whom enforcers saw; it is the API's.
func (a *Authority) Seen(ctx context.Context, q authority.TrailQuery) (*authority.Sightings, error) {
	scope := access.From(ctx).Scope(access.ReadTrail)
	t, err := a.reports.Seen(ctx, q, within(scope))
	if err != nil {
		return nil, reportProblem(err)
	}
	t.Enforcers = a.trailIn(t.Enforcers, scope)
	return t, nil
}

func reportProblem(err error) error {
	if transient(err) {
		return authority.NewProblem(authority.ProblemUnavailable, "the store of the reports does not answer", "try again in a moment")
	}
	return err
}

// Enroll makes an enforcer's identity and enters it in the roster; it is the
// API's.
func (a *Authority) Enroll(ctx context.Context, r authority.EnrollRequest) (*session.Enrollment, error) {
	e, err := a.enroll(ctx, r)
	rec := authority.AuditRecord{Kind: authority.AuditRoster, Action: "enroll", Targets: []string{"enforcer " + r.Name}, Tenants: r.Tenants}
	if len(r.Tenants) > 0 {
		rec.Detail = "tenants " + strings.Join(r.Tenants, ", ")
	}
	if e != nil {
		rec.Detail += fmt.Sprintf("; receipt key %x", e.ReceiptKey.Public())
		rec.Detail = strings.TrimPrefix(rec.Detail, "; ")
	}
	a.recordOutcome(ctx, rec, err)
	return e, err
}

func (a *Authority) enroll(ctx context.Context, r authority.EnrollRequest) (*session.Enrollment, error) {
	p := access.From(ctx)
	if err := a.enrolIn(p, r.Tenants); err != nil {
		return nil, err
	}
	urls := r.URLs
	if len(urls) > authority.MaxURLs || slices.ContainsFunc(urls, func(u string) bool { return u == "" || len(u) > session.MaxValueLen || !printableText(u) }) {
		return nil, invalid(fmt.Sprintf("give at most %d, of at most %d printable characters", authority.MaxURLs, session.MaxValueLen), "the URLs of the bus are not valid")
	}
	if len(urls) == 0 {
		urls = a.busURLs()
	}
	if len(urls) == 0 {
		return nil, invalid("give the URLs, or serve with --nats-listen", "the bus listens nowhere that an enforcer could reach")
	}
	e, entry, err := a.store.Enroll(r.Name, r.Tenants, urls, a.o.EnforcerCAs)
	if errors.Is(err, session.ErrInvalid) {
		return nil, invalid("see session-authority enroll --help", "%s", plain(err))
	}
	if err != nil {
		return nil, err
	}
	err = a.roster.Enroll(ctx, roster.Enforcer{
		Name: entry.Name, NKey: entry.NKey, ReceiptKey: entry.ReceiptKey, Tenants: entry.Tenants, Enrolled: time.Now().UTC(),
	})
	switch {
	case errors.Is(err, roster.ErrExists):
		return nil, authority.NewProblem(authority.ProblemConflict, fmt.Sprintf("enforcer %s is enrolled already", entry.Name), "retire it first, or choose another name")
	case errors.Is(err, roster.ErrFull):
		return nil, authority.NewProblem(authority.ProblemConflict, "the roster is full", "retire enforcers that are gone, or enrol for fewer tenants")
	case err != nil:
		return nil, err
	}
	a.log.Info("enrolled", "by", p.Name, "enforcer", entry.Name)
	return e, nil
}

func (a *Authority) busURLs() []string {
	switch {
	case len(a.o.EnforcerURLs) > 0:
		return a.o.EnforcerURLs
	case a.o.NATSURL != "":
		return []string{a.o.NATSURL}
	case a.broker.ClientURL() != "":
		return []string{a.broker.ClientURL()}
	}
	return nil
}

// Retire takes an enforcer out of the roster and off the bus; it is the API's.
func (a *Authority) Retire(ctx context.Context, name string) error {
	p := access.From(ctx)
	var of []string
	if e, ok := a.roster.Find(name); ok {
		for _, id := range e.Tenants {
			of = append(of, a.store.KeySet().TenantName(id))
		}
	}
	err := a.retireIn(p, name)
	if err == nil {
		err = a.roster.Retire(ctx, name, time.Now().UTC())
	}
	if errors.Is(err, roster.ErrUnknown) {
		err = unknownEnforcer(name)
	}
	if err == nil {
		a.log.Info("retired", "by", p.Name, "enforcer", name)
	}
	a.recordOutcome(ctx, authority.AuditRecord{Kind: authority.AuditRoster, Action: "retire", Targets: []string{"enforcer " + name}, Tenants: of}, err)
	return err
}

// BusConfig returns what a bus that runs apart must be configured with; it is
// the API's.
func (a *Authority) BusConfig(context.Context) (string, error) {
	nkey, err := a.store.AuthorityNKey()
	if err != nil {
		return "", err
	}
	emergency, err := broker.EmergencyOf(a.store.KeySet())
	if err != nil {
		return "", err
	}
	return broker.ServerConfig(nkey, busUsers(a.roster.Enforcers()), emergency)
}

// KeySet returns the key set in force, as the root signed it; it is the API's.
func (a *Authority) KeySet(context.Context) ([]byte, error) { return a.store.Frame(), nil }

// PublishKeySet publishes a key set that the root signed and takes the keys that
// came into the directory with it; it is the API's. One that is in force already
// is no error.
func (a *Authority) PublishKeySet(ctx context.Context, frame []byte) error {
	before := a.store.KeySet()
	err := a.publishKeySet(ctx, frame)
	if now := a.store.KeySet(); err != nil || now.Version != before.Version {
		rec := authority.AuditRecord{Kind: authority.AuditKeys, Action: "publish"}
		if err == nil {
			rec.Detail = keySetChange(before, now)
		}
		a.recordOutcome(ctx, rec, err)
	}
	return err
}

func (a *Authority) publishKeySet(ctx context.Context, frame []byte) error {
	if !bytes.Equal(frame, a.store.Frame()) {
		if err := a.seq.PublishKeySet(ctx, frame); errors.Is(err, session.ErrFrame) {
			return invalid("sign a newer one with the deployment's root key", "the key set is refused: %s", plain(err))
		} else if err != nil {
			return err
		}
	}
	if _, err := a.store.Reload(); err != nil {
		return err
	}
	a.secrets.mu.Lock()
	a.secrets.list = nil
	a.secrets.mu.Unlock()
	a.log.Info("key set published", "by", access.From(ctx).Name, "version", a.store.KeySet().Version)
	return nil
}

// Watch tells what happens; it is the API's.
func (a *Authority) Watch(ctx context.Context, began func() error, fn func(authority.Event) error) error {
	scope := access.From(ctx).Scope(access.Watch)
	return a.hub.watch(ctx, began, func(e authority.Event) error {
		if e, ok := a.eventIn(e, scope); ok {
			return fn(e)
		}
		return nil
	})
}
