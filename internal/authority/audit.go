package authority

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"golang.org/x/time/rate"

	"github.com/interlock-fabric/interlock/internal/access"
	"github.com/interlock-fabric/interlock/internal/audit"
	"github.com/interlock-fabric/interlock/internal/report"
	"github.com/interlock-fabric/interlock/internal/sequencer"
	"github.com/interlock-fabric/interlock/pkg/authority"
	"github.com/interlock-fabric/interlock/pkg/natsfeed"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// Bounds of what goes into the audit by itself.
const (
	auditTick = 500 * time.Millisecond
	// maxCovered is how many decisions' coverage is watched at once, and coverFor
	// how long one is when it does not become complete.
	maxCovered = 256
	coverFor   = 30 * time.Second
	// maxEvidence bounds the receipts, in bytes, that wait to be recorded.
	maxEvidence = 8 << 20
	// evidenceLen bounds those in one record.
	evidenceLen = 64 << 10
	// reportsPerDay is how many bytes of one enforcer's reports, and reportBurst
	// how many at once, are kept with their calls.
	reportsPerDay = 64 << 20
	reportBurst   = 8 << 20
	// trailLen bounds the calls of a report in its records, and maxSplit those that
	// it is split into.
	trailLen = 192 << 10
	maxSplit = 64
	// signInEvery is how long somebody who came is not mentioned again, and
	// maxSignedIn how many are told apart.
	signInEvery = time.Hour
	maxSignedIn = 4096
)

func (a *Authority) openAudit(ctx context.Context) error {
	js, err := jetstream.New(a.nc)
	if err != nil {
		return fmt.Errorf("authority: %w", err)
	}
	reports, err := js.Stream(ctx, natsfeed.ReportStream)
	if err != nil {
		return fmt.Errorf("authority: %w", err)
	}
	run := rand.Text()[:12]
	if a.audit, err = audit.Open(ctx, audit.Options{
		JetStream: js, Trust: a.store.Trust(), Signer: a.store.Signer, Sealing: a.store.Sealing, Frame: a.store.Frame,
		Head:      func() (uint64, uint64) { e, n, _ := a.seq.Head(); return e, n },
		HeadFile:  filepath.Join(a.o.DataDir, AuditHeadFile),
		Authority: run, Reports: reports.CachedInfo().State.LastSeq, KeepFor: a.o.AuditFor, KeepBytes: a.o.AuditBytes, Logger: a.log,
	}); err != nil {
		return fmt.Errorf("authority: %w", err)
	}
	ks := a.store.KeySet()
	a.note(authority.AuditRecord{Kind: authority.AuditAuthority, Action: "start",
		Detail: fmt.Sprintf("version %s; key set %d of epoch %d; %d tenants; run %s", cmp.Or(a.o.Version, "unknown"), ks.Version, ks.Epoch, len(ks.Tenants), run)})
	var keys []string
	for _, k := range ks.Keys {
		if !k.Withdrawn {
			keys = append(keys, session.KeyIDOf(k.Public).String())
		}
	}
	a.note(authority.AuditRecord{Kind: authority.AuditKeys, Action: "hold", Detail: "keys " + strings.Join(keys, ", ")})
	a.noteAccess("start")
	return nil
}

// noteAccess records who may use the API, as it is configured from now on.
func (a *Authority) noteAccess(action string) {
	detail := "users of this machine, and whoever has the bootstrap token"
	if c := a.access.Load(); c != nil {
		var issuers []string
		grants := 0
		for i := range c.Issuers {
			issuers = append(issuers, c.Issuers[i].URL)
			grants += len(c.Issuers[i].Grants)
		}
		detail = fmt.Sprintf("%d grants of the issuers %s; %d of certificates; two_person %s; local_operator %s; wide_per_minute %d; proposal_for %s; SHA-256 %s",
			grants, strings.Join(issuers, ", "), len(c.Certificates), c.TwoPerson, c.Local, c.WidePerMinute, c.ProposalFor, c.Digest())
	}
	a.note(authority.AuditRecord{Kind: authority.AuditConfig, Action: action, Detail: detail})
}

// note records what the authority did by itself, without waiting.
func (a *Authority) note(r authority.AuditRecord) {
	r.Principal.Means = "authority"
	r.Outcome = cmp.Or(r.Outcome, authority.OutcomeDone)
	a.audit.Note(r)
}

// noteFor records what was asked for in ctx, without waiting.
func (a *Authority) noteFor(ctx context.Context, r authority.AuditRecord) {
	a.audit.Note(asked(ctx, r))
}

// record records what was asked for in ctx and returns when that is durable, or
// after as long as a decision waits for the log: context.DeadlineExceeded then,
// and the record goes on waiting. That the caller has gone does not end it.
func (a *Authority) record(ctx context.Context, r authority.AuditRecord) error {
	wait, cancel := context.WithTimeout(context.WithoutCancel(ctx), cmp.Or(a.o.AckWait, sequencer.DefaultAckWait))
	defer cancel()
	return a.audit.Append(wait, asked(ctx, r))
}

func asked(ctx context.Context, r authority.AuditRecord) authority.AuditRecord {
	r.Principal.Means = "unknown"
	if p := access.From(ctx); p != nil {
		r.Principal = authority.AuditPrincipal{Name: p.Name, Means: string(p.Means)}
		if home := p.Visible(); !home.HasEach(r.Tenants) {
			r.Tenants = home.Tenants() // of what it does not see it says nothing there
		}
	}
	if t := audit.TraceOf(ctx); t.TraceID != [16]byte{} {
		r.TraceID, r.ParentID = hex.EncodeToString(t.TraceID[:]), hex.EncodeToString(t.Parent[:])
	}
	return r
}

// recordOutcome records what was asked for in ctx and how it ended. What is not
// durable in time is logged by the audit.
func (a *Authority) recordOutcome(ctx context.Context, r authority.AuditRecord, err error) {
	r.Outcome, r.Error = outcomeOf(err)
	_ = a.record(ctx, r) // what was done is done
}

// outcomeOf says how something ended, without what the API would not tell.
func outcomeOf(err error) (outcome, problem string) {
	var p *authority.Problem
	switch {
	case err == nil:
		return authority.OutcomeDone, ""
	case !errors.As(err, &p):
		return authority.OutcomeUnknown, "the authority failed"
	}
	outcome = authority.OutcomeRefused
	if p.Type == authority.ProblemUnavailable || p.Type == authority.ProblemInternal {
		outcome = authority.OutcomeUnknown
	}
	return outcome, strings.TrimPrefix(p.Type, "urn:interlock:problem:") + ": " + p.Detail
}

// decisionRecord is the record of a request for a decision.
func (a *Authority) decisionRecord(r *authority.Request, d *authority.Decision, err error) authority.AuditRecord {
	rec := authority.AuditRecord{
		Kind: authority.AuditDecision, Action: string(r.Operation), Reason: r.Reason, Incident: r.Incident, Drill: r.Drill,
	}
	rec.Outcome, rec.Error = outcomeOf(err)
	if u := (*undecided)(nil); errors.As(err, &u) {
		rec.Decision = hex.EncodeToString(u.id[:])
	}
	tenant := ""
	tenants, _ := a.tenants()
	if len(tenants.list) == 1 {
		tenant = tenants.list[0].Name()
	}
	of := func(t authority.Target) authority.AuditCaller {
		c := callerOf(t, tenant)
		if !slices.Contains(rec.Tenants, c.Tenant) {
			rec.Tenants = append(rec.Tenants, c.Tenant)
		}
		return c
	}
	for _, t := range r.Targets {
		rec.Targets = append(rec.Targets, t.String())
		rec.Callers = append(rec.Callers, of(t))
	}
	var more []string
	say := func(format string, v any) { more = append(more, fmt.Sprintf(format, v)) }
	for _, t := range r.Except {
		say("except %s", t)
		of(t)
	}
	if r.NoExemptions {
		more = append(more, "NO EXEMPTIONS")
	}
	if d != nil && len(d.Exempted) > 0 {
		say("exempted: %s", strings.Join(d.Exempted, ", "))
	}
	if len(r.Stages) > 0 {
		say("in stages: %s", strings.Join(r.Stages, ", "))
	}
	if len(more) > 0 && slices.Contains(rec.Tenants, authority.AuditAny) {
		// What is said of everything may name callers of any tenant, and tenants.
		for _, t := range tenants.list {
			if name := t.Name(); !slices.Contains(rec.Tenants, name) {
				rec.Tenants = append(rec.Tenants, name)
			}
		}
	}
	if r.Share != 0 {
		say("share %g%%", r.Share)
	}
	if !r.IssuedBefore.IsZero() {
		say("issued before %s", r.IssuedBefore.UTC().Format(time.RFC3339))
	}
	if !r.Expires.IsZero() {
		say("until %s", r.Expires.UTC().Format(time.RFC3339))
	}
	if r.For != 0 {
		say("for %s", time.Duration(r.For))
	}
	if r.Effect != "" {
		say("effect %s", r.Effect)
	}
	if r.ACR != "" {
		say("acr %s", r.ACR)
	}
	if r.Credentials {
		more = append(more, "credentials too")
	}
	rec.Detail = strings.Join(more, "; ")
	switch {
	case d == nil:
	case !d.Committed:
		rec.Outcome = authority.OutcomePreview
	default:
		rec.Epoch, rec.Sequence, rec.Entries, rec.Decided = d.Epoch, d.Number, d.Entries, d.At.UTC()
		rec.Decision = d.ID
		rec.Pending, rec.Duplicate = !d.Durable, d.Duplicate
	}
	return rec
}

// callerOf says whom a target is about: the agent and the user are both named.
func callerOf(t authority.Target, tenant string) authority.AuditCaller {
	c := authority.AuditCaller{Tenant: cmp.Or(t.Tenant, tenant), Agent: authority.AuditAny, User: authority.AuditAny}
	for _, term := range t.Terms {
		switch term.Kind {
		case session.KindGlobal.String():
			c.Tenant = authority.AuditAny
		case session.KindTenant.String():
			c.Tenant = term.Value
		case session.KindUser.String():
			c.User = term.Value
		case session.KindAgent.String():
			c.Agent = term.Value
		case session.KindClient.String():
			c.Client = term.Value
		case session.KindSession.String():
			c.Session = term.Value
		}
	}
	return c
}

// keySetChange says what a key set changed. Keys are named by their ids.
func keySetChange(before, now *session.KeySet) string {
	parts := []string{fmt.Sprintf("key set %d, until %s", now.Version, now.NotAfter)}
	if now.Epoch != before.Epoch {
		parts = append(parts, fmt.Sprintf("epoch %d opened", now.Epoch))
	}
	for _, t := range now.Tenants {
		if before.TenantName(t.ID) == "" {
			parts = append(parts, "tenant "+t.Name+" added")
		}
	}
	for _, k := range now.Keys {
		id := session.KeyIDOf(k.Public)
		i := slices.IndexFunc(before.Keys, func(o session.SigningKey) bool { return session.KeyIDOf(o.Public) == id })
		if i < 0 {
			parts = append(parts, fmt.Sprintf("key %s added", id))
		}
		if k.Withdrawn && (i < 0 || !before.Keys[i].Withdrawn) {
			parts = append(parts, fmt.Sprintf("key %s withdrawn after seq %d of epoch %d", id, k.LastNumber, k.LastEpoch))
		}
	}
	return strings.Join(parts, "; ")
}

// auditReport takes a believed report. The reader is locked meanwhile.
func (a *Authority) auditReport(seq uint64, r *session.Report, hash session.Hash) {
	if a.audit.Reported(seq) {
		return
	}
	rec := authority.AuditRecord{
		Time: time.Now(), Kind: authority.AuditReport, Action: "report", Outcome: authority.OutcomeDone,
		Principal: authority.AuditPrincipal{Name: r.Enforcer, Means: "enforcer"},
		Report: &authority.AuditedReport{
			Enforcer: r.Enforcer, Boot: hex.EncodeToString(r.Boot[:]), Number: r.Count, Hash: hex.EncodeToString(hash[:]),
		},
	}
	var content *session.TrailContent
	if key, ok := a.store.Sealing(r.Key); ok {
		content, _ = r.Unseal(key) // the reader counts those that it cannot open
	}
	foreign := 0
	if content != nil {
		content.Sightings = nil // they are not recorded
		foreign = report.Own(r.Enforcer, content, a.serves)
		if t := content.Totals; t.Calls >= t.Denied {
			a.flow.allowed(r.Enforcer, r.Boot, t.Calls-t.Denied)
		}
	}
	if foreign > 0 {
		rec.Detail = fmt.Sprintf("%d calls of tenants for which it is not enrolled are left out", foreign)
	}
	switch {
	case content == nil:
		rec.Detail = "it cannot be opened with the keys that are here"
	case len(content.Records) == 0 && foreign == 0:
		return // callers that were seen, and totals
	case !a.watched.room(r.Enforcer, len(r.Sealed)):
		rec.Report.Withheld = uint64(len(content.Records))
		rec.Detail = strings.TrimPrefix(rec.Detail+"; the enforcer reports more than the audit keeps of it", "; ")
	default:
		more := a.trailsOf(&rec, report.Records(r, content))
		a.audit.NoteReport(seq, rec, more...)
		return
	}
	a.audit.NoteReport(seq, rec)
}

// trailsOf puts calls into records, one for each tenant, so that whoever may see
// one of them sees a whole record: the first in r itself. Those of tenants that the
// enforcer does not serve, or beyond maxSplit, are nobody's in particular.
func (a *Authority) trailsOf(r *authority.AuditRecord, all []authority.TrailRecord) (more []authority.AuditRecord) {
	kept := all
	for len(kept) > 0 {
		if b, err := json.Marshal(kept); err == nil && len(b) <= trailLen {
			break
		}
		kept = kept[:len(kept)*3/4]
	}
	var order []string
	trails := map[string]*authority.AuditRecord{}
	for i := range all {
		t := all[i].Tenant
		if trails[t] == nil && (len(order) >= maxSplit || !a.serves(r.Report.Enforcer, t)) {
			t = ""
		}
		own := trails[t]
		if own == nil {
			own = r
			if len(order) > 0 {
				next, rep := *r, *r.Report
				next.Trail, next.Tenants, next.Report = nil, nil, &rep
				next.Report.Withheld = 0
				own = &next
			}
			if t != "" {
				own.Tenants = []string{t}
			}
			order, trails[t] = append(order, t), own
		}
		if i < len(kept) {
			own.Trail = append(own.Trail, all[i])
		} else {
			own.Report.Withheld++
		}
	}
	for _, t := range order[min(1, len(order)):] {
		more = append(more, *trails[t])
	}
	return more
}

// watched is what goes into the audit by itself, gathered.
type watched struct {
	mu       sync.Mutex
	denied   map[attempt]denial
	signedIn map[authority.AuditPrincipal]time.Time
	unnamed  uint64 // who came, and could not be told apart
	entered  map[registrant]uint64
	receipts []evidence
	size     int
	lost     uint64
	open     []covered
	limits   map[string]*rate.Limiter
	// news are the newest batches with decisions, canaries not counted.
	news  map[place]struct{}
	order []place
}

// attempt is something that was refused for who asked for it.
type attempt struct {
	who   authority.AuditPrincipal
	what  string // the endpoint, of whoever is known
	where string // the host, of whoever is not
}

// denial is how often, and of which tenants whoever asked is.
type denial struct {
	count   uint64
	tenants []string
}

// maxAttempts and maxNews bound the distinct attempts between two records, and
// the batches that are known to hold decisions.
const (
	maxAttempts = 256
	maxNews     = 1 << 14
)

// evidence is a receipt and the batches that it says were applied.
type evidence struct {
	authority.AuditedReceipt
	of []place
}

// covered is a decision whose coverage is to be recorded.
type covered struct {
	place
	incident string
	since    time.Time
}

// refused counts a request that was refused for who sent it; it is the API's.
func (a *Authority) refused(r *http.Request, err error) {
	var at attempt
	var p *authority.Problem
	switch who := access.From(r.Context()); {
	case who != nil:
		a.watched.forbidden(who, r.Pattern)
		return
	case errors.As(err, &p) && p.Type == authority.ProblemUnauthorised:
		at.who.Means = "unknown"
		at.where, _, _ = net.SplitHostPort(r.RemoteAddr) // none on the socket
	default:
		return // an issuer that does not answer says nothing of anybody
	}
	a.watched.deny(at, nil)
}

// forbidden counts what p asked for, and may not do.
func (w *watched) forbidden(p *access.Principal, what string) {
	w.deny(attempt{who: authority.AuditPrincipal{Name: p.Name, Means: string(p.Means)}, what: what}, p.Visible().Tenants())
}

func (w *watched) deny(at attempt, tenants []string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if _, known := w.denied[at]; !known && len(w.denied) >= maxAttempts {
		at, tenants = attempt{who: authority.AuditPrincipal{Means: "unknown"}, where: "more hosts than are told apart"}, nil
	}
	if w.denied == nil {
		w.denied = map[attempt]denial{}
	}
	w.denied[at] = denial{w.denied[at].count + 1, tenants}
}

// registrant is who registered sessions, and where.
type registrant struct {
	who    authority.AuditPrincipal
	tenant string
}

// registered counts sessions that were registered. What each of them is, the
// registry's own log has, to which the record points.
func (w *watched) registered(p *access.Principal, tenant string, n int) {
	by := registrant{tenant: tenant}
	if p != nil {
		by.who = authority.AuditPrincipal{Name: p.Name, Means: string(p.Means)}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if _, known := w.entered[by]; !known && len(w.entered) >= maxAttempts {
		by = registrant{who: authority.AuditPrincipal{Means: "unknown"}}
	}
	if w.entered == nil {
		w.entered = map[registrant]uint64{}
	}
	w.entered[by] += uint64(n)
}

// admitted notes who came; it is the API's.
func (a *Authority) admitted(p *access.Principal) {
	who, now := authority.AuditPrincipal{Name: p.Name, Means: string(p.Means)}, time.Now()
	w := &a.watched
	w.mu.Lock()
	if at, known := w.signedIn[who]; known && now.Sub(at) < signInEvery {
		w.mu.Unlock()
		return
	}
	if len(w.signedIn) >= maxSignedIn {
		maps.DeleteFunc(w.signedIn, func(_ authority.AuditPrincipal, at time.Time) bool { return now.Sub(at) >= signInEvery })
	}
	if len(w.signedIn) >= maxSignedIn { // an issuer mints more names than there are people
		w.unnamed++
		w.mu.Unlock()
		return
	}
	if w.signedIn == nil {
		w.signedIn = map[authority.AuditPrincipal]time.Time{}
	}
	w.signedIn[who] = now
	w.mu.Unlock()
	a.audit.Note(authority.AuditRecord{
		Kind: authority.AuditSignIn, Action: "sign-in", Outcome: authority.OutcomeDone, Principal: who, Tenants: p.Visible().Tenants(),
	})
}

// heard notes a batch with decisions.
func (w *watched) heard(p place) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if _, known := w.news[p]; known {
		return
	}
	if w.news == nil {
		w.news = map[place]struct{}{}
	}
	if len(w.order) >= maxNews {
		for _, old := range w.order[:maxNews/4] {
			delete(w.news, old)
		}
		w.order = append(w.order[:0], w.order[maxNews/4:]...)
	}
	w.news[p] = struct{}{}
	w.order = append(w.order, p)
}

// receipt keeps a receipt that was believed, if it says that something was
// applied.
func (w *watched) receipt(frame []byte) {
	f, err := session.ParseFrame(frame)
	if err != nil {
		return
	}
	r, err := session.UnmarshalReceipt(f.Body)
	if err != nil || len(r.Batches) == 0 {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.size+len(frame) > maxEvidence {
		w.lost++
		return
	}
	e := evidence{AuditedReceipt: authority.AuditedReceipt{Enforcer: r.Enforcer, Frame: slices.Clone(frame)}}
	for _, b := range r.Batches {
		e.of = append(e.of, place{r.Epoch, b.Number})
	}
	w.receipts = append(w.receipts, e)
	w.size += len(frame)
}

// decided has the coverage of a decision recorded. In a storm only the newest are.
func (w *watched) decided(p place, incident string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if n := len(w.open); n > 0 && w.open[n-1].place == p && w.open[n-1].incident == incident {
		return // of the same batch
	}
	if len(w.open) >= maxCovered {
		w.open = append(w.open[:0], w.open[1:]...)
	}
	w.open = append(w.open, covered{p, incident, time.Now()})
}

// room reports whether n more bytes of an enforcer's reports are kept.
func (w *watched) room(enforcer string, n int) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	l := w.limits[enforcer]
	if l == nil {
		if w.limits == nil {
			w.limits = map[string]*rate.Limiter{}
		}
		l = rate.NewLimiter(reportsPerDay/(24*3600.0), reportBurst)
		w.limits[enforcer] = l
	}
	return l.AllowN(time.Now(), n)
}

// tendAudit records what was gathered, until ctx ends.
func (a *Authority) tendAudit(ctx context.Context) {
	tick := time.NewTicker(auditTick)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			a.auditGathered(true)
			return
		case <-tick.C:
			a.auditGathered(false)
		}
	}
}

func (a *Authority) auditGathered(last bool) {
	w := &a.watched
	w.mu.Lock()
	denied, lost, open, entered, unnamed := w.denied, w.lost, w.open, w.entered, w.unnamed
	var receipts []authority.AuditedReceipt
	for _, e := range w.receipts {
		// The batches have been heard meanwhile.
		if slices.ContainsFunc(e.of, func(p place) bool { _, ok := w.news[p]; return ok }) {
			receipts = append(receipts, e.AuditedReceipt)
		}
	}
	w.denied, w.lost, w.receipts, w.size, w.open, w.entered, w.unnamed = nil, 0, nil, 0, nil, nil, 0
	w.mu.Unlock()
	for by, n := range entered {
		// Read behind the registrations: the hash covers them.
		number, hash := a.registry.Head()
		r := authority.AuditRecord{
			Kind: authority.AuditRegistry, Action: "register-sessions", Outcome: authority.OutcomeDone, Principal: by.who, Count: n,
			Callers: []authority.AuditCaller{{Tenant: by.tenant, Agent: authority.AuditAny, User: authority.AuditAny}},
			Detail:  fmt.Sprintf("up to batch %d of the registry, which has the hash %x", number, hash),
		}
		if by.tenant != "" {
			r.Tenants = []string{by.tenant}
		}
		a.audit.Note(r)
	}
	if unnamed > 0 {
		a.audit.Note(authority.AuditRecord{
			Kind: authority.AuditSignIn, Action: "sign-in", Outcome: authority.OutcomeDone, Principal: authority.AuditPrincipal{Means: "unknown"},
			Count: unnamed, Detail: "requests of more principals than are told apart",
		})
	}
	for at, n := range denied {
		r := authority.AuditRecord{Kind: authority.AuditAccess, Action: at.what, Outcome: authority.OutcomeRefused, Count: n.count, Principal: at.who, Tenants: n.tenants}
		if at.what == "" {
			r.Kind, r.Action, r.Detail = authority.AuditSignIn, "sign-in", "from "+cmp.Or(at.where, "this machine")
		}
		a.audit.Note(r)
	}
	for len(receipts) > 0 {
		n := 0
		for size := 0; n < len(receipts) && (n == 0 || size+len(receipts[n].Frame) <= evidenceLen); n++ {
			size += len(receipts[n].Frame)
		}
		a.note(authority.AuditRecord{Kind: authority.AuditReceipts, Action: "keep", Receipts: receipts[:n]})
		receipts = receipts[n:]
	}
	if lost > 0 {
		a.note(authority.AuditRecord{Kind: authority.AuditReceipts, Action: "lose", Count: lost, Detail: "more receipts than are kept at once"})
	}
	var keep []covered
	for _, o := range open {
		c := a.tracker.Coverage(o.epoch, o.number, true)
		if !c.Complete && time.Since(o.since) < coverFor && !last {
			keep = append(keep, o)
			continue
		}
		epoch, head, _ := a.seq.Head()
		c.Durable = epoch == o.epoch && o.number <= head
		c.Detail = notable(c.Detail)
		a.note(authority.AuditRecord{
			Kind: authority.AuditCoverage, Action: "measure", Incident: o.incident, Epoch: o.epoch, Sequence: o.number, Coverage: &c,
			Tenants: a.hub.tenantsOf(o.place),
		})
	}
	if len(keep) > 0 {
		w.mu.Lock()
		w.open = append(keep, w.open...)
		w.mu.Unlock()
	}
}

// notable returns the enforcers at which a decision was not in force, and then
// the slowest.
func notable(all []authority.EnforcerCoverage) []authority.EnforcerCoverage {
	slices.SortStableFunc(all, func(a, b authority.EnforcerCoverage) int {
		in := func(e authority.EnforcerCoverage) int {
			if e.State == authority.StateApplied {
				return 1
			}
			return 0
		}
		return cmp.Or(cmp.Compare(in(a), in(b)), cmp.Compare(b.LatencyMillis, a.LatencyMillis))
	})
	return all[:min(len(all), authority.MaxAuditDetail)]
}

// Audit returns records of the audit; it is the API's.
func (a *Authority) Audit(ctx context.Context, q authority.AuditQuery) (*authority.AuditPage, error) {
	p, err := a.audit.Records(ctx, q, a.auditView(access.From(ctx).Scope(access.ReadAudit)))
	return p, auditProblem(err)
}

// ExportAudit writes the audit as lines that can be verified; it is the API's.
func (a *Authority) ExportAudit(ctx context.Context, q authority.AuditQuery, w io.Writer) error {
	return auditProblem(a.audit.Export(ctx, q, a.auditView(access.From(ctx).Scope(access.ReadAudit)), w))
}

func auditProblem(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, audit.ErrCursor):
		return invalid("use the next of the page before", "the cursor is not one that a page has given")
	case errors.Is(err, audit.ErrNoKey), errors.Is(err, audit.ErrSealed):
		return authority.NewProblem(authority.ProblemUnavailable, strings.TrimPrefix(plain(err), "audit: "), "then ask again")
	case transient(err):
		return authority.NewProblem(authority.ProblemUnavailable, "the store of the audit does not answer", "try again in a moment")
	}
	return err
}

// maxProving bounds the search for what proves where decisions were applied.
const maxProving = 60 * time.Second

// ExportReceipts writes the receipts that prove where the decisions of an
// incident, or the one at a place of the log, were applied; it is the API's.
func (a *Authority) ExportReceipts(ctx context.Context, incident string, epoch, number uint64, w io.Writer) error {
	ctx, cancel := context.WithTimeout(ctx, maxProving)
	defer cancel()
	x := &audit.Receipts{}
	for _, e := range a.roster.Enforcers() {
		x.Enforcers = append(x.Enforcers, audit.Enforcer{Name: e.Name, Key: e.ReceiptKey})
	}
	var first, last time.Time
	err := a.eachAudited(ctx, authority.AuditQuery{Kind: authority.AuditDecision, Incident: incident}, func(e *authority.AuditEntry) bool {
		if e.Outcome != authority.OutcomeDone || e.Duplicate || incident == "" && (e.Epoch != epoch || e.Sequence != number) {
			return true
		}
		at := e.Time
		if t, ok := a.hub.timeAt(e.Epoch, e.Sequence); ok {
			at = t // the log's own; the record is of a moment later
		} else if !e.Decided.IsZero() {
			at = e.Decided
		}
		x.Decisions = append(x.Decisions, audit.Decision{Epoch: e.Epoch, Number: e.Sequence, At: at, Operation: e.Action, Incident: e.Incident, Drill: e.Drill})
		if first = at; last.IsZero() {
			last = at
		}
		return len(x.Decisions) < audit.MaxReceiptDecisions && incident != ""
	})
	if err != nil {
		return auditProblem(err)
	}
	if len(x.Decisions) == 0 {
		return authority.NewProblem(authority.ProblemNotFound, "the audit has no such decision", "see session-authority audit list --kind decision")
	}
	slices.Reverse(x.Decisions)
	keys := map[string]bool{}
	err = a.eachAudited(ctx, authority.AuditQuery{Kind: authority.AuditReceipts, Since: first.Add(-time.Second), Until: last.Add(provenWithin)}, func(e *authority.AuditEntry) bool {
		for _, r := range slices.Backward(e.Receipts) {
			if a.proves(r.Frame, x.Decisions) && len(x.Frames) < audit.MaxReceipts {
				x.Frames = append(x.Frames, r.Frame)
				keys[r.Enforcer] = true
			}
		}
		return len(x.Frames) < audit.MaxReceipts
	})
	if err != nil {
		return auditProblem(err)
	}
	slices.Reverse(x.Frames)
	// Those that are not in the roster any more can be verified all the same.
	for _, e := range x.Enforcers {
		delete(keys, e.Name)
	}
	for _, name := range slices.Sorted(maps.Keys(keys)) {
		e, _ := a.roster.Find(name)
		x.Enforcers = append(x.Enforcers, audit.Enforcer{Name: name, Key: e.ReceiptKey})
	}
	signer, err := a.store.Signer(session.InstantOf(time.Now()))
	if err != nil {
		return authority.NewProblem(authority.ProblemUnavailable, "no signing key is here", "session-authority keys rotate")
	}
	return audit.WriteReceipts(w, x, a.store.Frame(), a.store.KeySet().Version, signer)
}

// provenWithin is how long after the last decision receipts are looked for.
const provenWithin = 10 * time.Minute

// proves reports whether a frame is a receipt that its enforcer signed, and says
// that one of the decisions was applied.
func (a *Authority) proves(frame []byte, decisions []audit.Decision) bool {
	f, err := session.ParseFrame(frame)
	if err != nil {
		return false
	}
	r, err := session.UnmarshalReceipt(f.Body)
	if err != nil {
		return false
	}
	of := func(b session.Applied) bool {
		return slices.ContainsFunc(decisions, func(d audit.Decision) bool { return d.Epoch == r.Epoch && d.Number == b.Number })
	}
	key, ok := a.receiptKey(r.Enforcer)
	// One of before its enforcer was enrolled anew is not signed by the key now.
	return ok && slices.ContainsFunc(r.Batches, of) && f.Verify(key) == nil
}

// eachAudited calls fn with the records that match, newest first, until it
// returns false.
func (a *Authority) eachAudited(ctx context.Context, q authority.AuditQuery, fn func(*authority.AuditEntry) bool) error {
	q.Limit = authority.MaxAuditPage
	for {
		p, err := a.audit.Records(ctx, q, nil)
		if err != nil {
			return err
		}
		for i := range p.Records {
			if !fn(&p.Records[i]) {
				return nil
			}
		}
		if q.Before = p.Next; p.Next == "" {
			return nil
		}
	}
}
