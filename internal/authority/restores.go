package authority

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/interlock-fabric/interlock/internal/access"
	"github.com/interlock-fabric/interlock/internal/registry"
	"github.com/interlock-fabric/interlock/internal/sequencer"
	"github.com/interlock-fabric/interlock/pkg/authority"
	"github.com/interlock-fabric/interlock/pkg/session"
)

const (
	// restoreNotes is the kind of the registry's notes that are staged restores.
	restoreNotes = "restore"
	keepRestore  = 24 * time.Hour
	restoreTick  = 200 * time.Millisecond
	// stageLimit bounds the taking of a stage.
	stageLimit = 10 * time.Second
)

// stage is one step of a restore: a tenant of a global kill, or a share of the
// sessions of what no tenant's stage has restored.
type stage struct {
	tenant string
	share  uint16
}

// parseStages reads the stages of a restore of everything, where tenants are its
// tenants, or of one tenant. Tenants come first: the first stage gives the others
// kills of their own, and no kill is set and lifted in one batch, where the lift
// could not tell it from another's. The error is a Problem.
func parseStages(list []string, tenants func(string) bool) ([]stage, error) {
	const mend = `give shares that grow, as in 1%,10%,100%; of a global kill, tenants before them, as in acme,50%,100%`
	if len(list) > authority.MaxStages {
		return nil, invalid(fmt.Sprintf("give at most %d", authority.MaxStages), "%d stages", len(list))
	}
	var out []stage
	last := uint16(0)
	for _, text := range list {
		if number, ok := strings.CutSuffix(text, "%"); ok {
			v, err := strconv.ParseFloat(number, 64)
			share := uint16(math.Round(min(max(v, 0), 100) * session.ShareUnit / 100))
			if err != nil || math.IsNaN(v) || v > 100 || share <= last {
				return nil, invalid(mend, "%.64q is not a stage after %g%%", text, float64(last)*100/session.ShareUnit)
			}
			last = share
			out = append(out, stage{share: share})
			continue
		}
		if tenants != nil && last != 0 {
			return nil, invalid(mend, "tenant %.64q comes after a share: name tenants first", text)
		}
		if tenants == nil || !tenants(text) || slices.Contains(out, stage{tenant: text}) {
			return nil, invalid(mend, "%.64q is not a stage: neither a share nor another tenant", text)
		}
		out = append(out, stage{tenant: text})
	}
	if last != 0 && last != session.ShareUnit {
		return nil, invalid("end with 100%", "the last share is %g%%: the rest would stay killed", float64(last)*100/session.ShareUnit)
	}
	return out, nil
}

// heldKill is a kill that a restore lifts, as it was found, or made.
type heldKill struct {
	Tenant string          `json:"tenant,omitempty"` // empty is everything
	Key    session.Key     `json:"key"`
	Since  session.Instant `json:"since"`
	Share  uint16          `json:"share,omitempty"`
	Except []session.Key   `json:"except,omitempty"`
}

// restore is a staged restore as it is kept.
type restore struct {
	authority.StagedRestore
	Tenant string `json:"tenant,omitempty"` // that it is about
	// Whole is the kill that was found.
	Whole heldKill `json:"whole"`
	// Parts are the tenants of which each gets a kill of its own, in place of the
	// global one, with the first stage: where a stage is a tenant. The first stage's
	// tenant gets none. SplitAt is when they got them.
	Parts   []string        `json:"parts,omitempty"`
	SplitAt session.Instant `json:"split_at,omitempty"`
	// KillIncident is the incident of the kill.
	KillIncident string `json:"kill_incident,omitempty"`

	revision uint64
	stages   []stage
	// nothing is why there is nothing to restore, unless it has begun already.
	nothing error
}

// next is the stage that is to be taken.
func (x *restore) next() stage { return x.stages[x.Taken] }

// restores reports whether a stage leaves nothing of a kill.
func (s stage) restores(h *heldKill) bool {
	return s.share == session.ShareUnit || s.tenant != "" && s.tenant == h.Tenant
}

// suspension returns the suspension of a key, whoever decided it: a kill and a
// suspension that is none share one record.
func (p *planner) suspension(k session.Key) (session.Record, bool) {
	records := p.state.Lookup(k)
	i := slices.IndexFunc(records, func(r session.Record) bool {
		return r.Effect == session.EffectSuspended && !r.Drill
	})
	if i < 0 {
		return session.Record{}, false
	}
	return records[i], true
}

// stage plans the first stage of a staged restore of n.
func (p *planner) stage(out *plan, r *authority.Request, n *named) error {
	hold := time.Duration(r.Hold)
	switch {
	case len(r.Targets) != 1 || !n.everything():
		return invalid("restore one kill: global, or tenant NAME", "only a kill is restored in stages that are held")
	case r.Share != 0 || r.Drill:
		return invalid("leave share and drill out", "the stages say what is restored")
	case hold < authority.MinHold || hold > authority.MaxHold:
		return invalid(fmt.Sprintf("give %s to %s, as in 5m", authority.MinHold, authority.MaxHold), "hold is %s", hold)
	}
	for _, have := range p.state.Lookup(n.key) {
		if have.Effect == session.EffectRevoked && have.Reason == session.ReasonKill && !have.Drill && have.IssuedBefore == 0 {
			return invalid("restore it at once", "%s was killed with its credentials: they stay dead, so there is nothing to stage", n.text)
		}
	}
	record, ok := p.suspension(n.key)
	var nothing error
	if !ok || record.Reason != session.ReasonKill {
		nothing = authority.NewProblem(authority.ProblemConflict, n.text+" is not killed", "see session-authority status")
		if !r.Commit {
			out.warnings = append(out.warnings, n.text+" is not killed: there would be nothing to restore in stages")
		}
	}
	target := "global"
	var known func(string) bool
	if n.tenant == "" {
		known = func(name string) bool {
			return slices.ContainsFunc(p.all, func(t session.Tenant) bool { return t.Name == name })
		}
	} else {
		target = "tenant " + n.tenant
	}
	stages, err := parseStages(r.Stages, known)
	if err != nil {
		return err
	}
	x := &restore{
		StagedRestore: authority.StagedRestore{
			Target: target, Stages: r.Stages, Hold: r.Hold, State: authority.RestoreRunning, Incident: r.Incident,
		},
		Tenant: n.tenant, stages: stages, nothing: nothing, KillIncident: record.Incident,
		Whole: heldKill{Tenant: n.tenant, Key: n.key, Since: record.Since, Share: record.Share, Except: record.Except},
	}
	if slices.ContainsFunc(stages, func(s stage) bool { return s.tenant != "" }) {
		x.Parts = []string{}
		for _, t := range p.all {
			if own, ok := p.suspension(session.TenantKey(t.ID)); ok {
				verb := "suspended"
				if own.Reason == session.ReasonKill {
					verb = "killed"
				}
				out.warnings = append(out.warnings, "tenant "+t.Name+" is "+verb+" by itself, and stays so")
				continue
			}
			x.Parts = append(x.Parts, t.Name)
		}
		if len(x.Parts) == 0 {
			return invalid("restore the tenants, or global at once", "every tenant is killed or suspended by itself")
		}
		if record.Share != 0 {
			return invalid("leave the tenants out, or kill anew first", "global is restored in part: it goes on by shares alone")
		}
		for _, h := range p.parts(x) {
			if len(h.Except) > session.MaxExcept {
				return invalid("leave the tenants out", "the kill spares %d callers of tenant %s, at most %d in a kill that takes its place", len(h.Except)-1, h.Tenant, session.MaxExcept-1)
			}
		}
	}
	out.restore = x
	out.entries = append(out.entries, p.stageEntries(x)...)
	return nil
}

// liftKill lifts a kill, or a share of it, and nothing that was decided since: the
// log itself leaves that alone.
func liftKill(h *heldKill, share uint16, incident string) session.Entry {
	if share == session.ShareUnit {
		share = 0
	}
	return session.Entry{Op: session.OpLift, Effect: session.EffectSuspended, Reason: session.ReasonRestored, Key: h.Key, IssuedBefore: h.Since, Share: share, Incident: incident}
}

func setKill(h *heldKill, incident string) session.Entry {
	return session.Entry{Op: session.OpSet, Effect: session.EffectSuspended, Reason: session.ReasonKill, Key: h.Key, Except: h.Except, Incident: incident}
}

// mark is an exemption of nobody that the kills of single tenants have. What else
// is set on such a tenant, before or after, has it not, and so neither has what
// becomes of the two: who finds it knows that nobody else has decided.
func (x *restore) mark() session.Key {
	sum := sha256.Sum256([]byte("interlock restore part 1\x00" + x.ID))
	return session.Key{Tenant: session.FabricTenant, Shape: session.Shape(session.KindCredential), Digest: session.Digest(sum[:16])}
}

// exempt counts the callers among what an entry spares.
func exempt(except []session.Key) (n int) {
	for _, k := range except {
		if k.Tenant != session.FabricTenant {
			n++
		}
	}
	return n
}

// parts are the kills of single tenants that take the place of a global one.
func (p *planner) parts(x *restore) (out []heldKill) {
	for _, t := range p.all {
		if !slices.Contains(x.Parts, t.Name) {
			continue
		}
		h := heldKill{Tenant: t.Name, Key: session.TenantKey(t.ID), Since: x.SplitAt}
		for _, k := range x.Whole.Except {
			if k.Tenant == t.ID {
				h.Except = append(h.Except, k)
			}
		}
		h.Except = append(h.Except, x.mark()) // the last in order: no tenant has its number
		out = append(out, h)
	}
	return out
}

// own reports whether a record is what the restore found, or made, and of nobody
// else.
func (x *restore) own(h *heldKill, r *session.Record) bool {
	return r.Reason == session.ReasonKill && r.Since == h.Since && (h.Tenant == x.Tenant || slices.Contains(r.Except, x.mark()))
}

// held are the kills that the restore has yet to lift.
func (p *planner) held(x *restore) []heldKill {
	held := []heldKill{x.Whole}
	if x.Parts != nil && x.Taken > 0 {
		held = p.parts(x)
	}
	return slices.DeleteFunc(held, func(h heldKill) bool {
		return slices.ContainsFunc(x.stages[:x.Taken], func(s stage) bool { return s.restores(&h) })
	})
}

// splits reports whether the next stage gives tenants kills of their own.
func (x *restore) splits() bool { return x.Parts != nil && x.Taken == 0 }

// stageEntries are the entries of the next stage.
func (p *planner) stageEntries(x *restore) (out []session.Entry) {
	s := x.next()
	if x.splits() {
		for _, h := range p.parts(x) {
			if !s.restores(&h) {
				out = append(out, setKill(&h, x.KillIncident))
			}
		}
		// What is set is in force when this is lifted: it is one batch.
		return append(out, liftKill(&x.Whole, 0, x.Incident))
	}
	for _, h := range p.held(x) {
		if s.tenant == "" || s.restores(&h) {
			out = append(out, liftKill(&h, s.share, x.Incident))
		}
	}
	return out
}

// anew says that something else is in force than what a restore has found or made.
func (h *heldKill) anew(r *session.Record) string {
	name := "global"
	if h.Tenant != "" {
		name = "tenant " + h.Tenant
	}
	if r == nil {
		return name + " was restored by somebody else"
	}
	if r.Reason != session.ReasonKill {
		return fmt.Sprintf("%s was suspended at seq %d", name, r.Seq)
	}
	return fmt.Sprintf("%s was killed anew at seq %d", name, r.Seq)
}

// undone says why a restore does not go on: something else is in force than it
// has left. Nothing else is touched then.
func (p *planner) undone(x *restore) string {
	split := p.hasParts(x)
	for _, h := range p.held(x) {
		switch r, ok := p.suspension(h.Key); {
		case ok && !x.own(&h, &r):
			return h.anew(&r)
		case ok && x.splits() && r.Share != 0:
			return "global was restored in part by somebody else"
		case !ok && !split && (x.splits() || !x.next().restores(&h)):
			return h.anew(nil)
		}
		// The stage was taken, perhaps, and its author died before saying so.
	}
	if x.splits() && !split {
		for _, h := range p.parts(x) {
			if r, ok := p.suspension(h.Key); ok {
				return h.anew(&r)
			}
		}
	}
	return ""
}

// hasParts reports whether the first stage has made the kills of single tenants,
// and the restore does not say so yet.
func (p *planner) hasParts(x *restore) bool {
	if _, whole := p.suspension(x.Whole.Key); whole || !x.splits() {
		return false
	}
	for _, h := range p.parts(x) {
		if r, ok := p.suspension(h.Key); !x.next().restores(&h) && (!ok || !slices.Contains(r.Except, x.mark())) {
			return false
		}
	}
	return true
}

// ended are the kills of which the next stage leaves nothing.
func (p *planner) ended(x *restore) (out []heldKill) {
	held := p.held(x)
	if x.splits() {
		out, held = held, p.parts(x)
	}
	for _, h := range held {
		if x.next().restores(&h) {
			out = append(out, h)
		}
	}
	return out
}

// overtaken says what somebody else decided before a stage that has just been
// taken, which has left it alone. ended are those of which it was to leave nothing.
func (p *planner) overtaken(x *restore, ended []heldKill) string {
	for _, h := range ended {
		if r, ok := p.suspension(h.Key); ok {
			return h.anew(&r)
		}
	}
	for _, h := range p.held(x) {
		if r, ok := p.suspension(h.Key); ok && !x.own(&h, &r) {
			return h.anew(&r)
		}
	}
	return ""
}

// restores returns the staged restores, the newest first. The error is a Problem.
func (a *Authority) restores() ([]restore, error) {
	notes, err := a.registry.Notes(restoreNotes)
	if err != nil {
		return nil, registryProblem(err)
	}
	return readRestores(notes)
}

func readRestores(notes []registry.Note) ([]restore, error) {
	out := make([]restore, len(notes))
	for i, n := range notes {
		x := &out[i]
		if err := json.Unmarshal(n.Content, x); err != nil {
			return nil, fmt.Errorf("authority: restore %s: %w", n.ID, err)
		}
		x.revision = n.Revision
		var err error
		if x.stages, err = parseStages(x.Stages, func(string) bool { return x.Tenant == "" }); err != nil || x.Taken > len(x.stages) || x.State == authority.RestoreRunning && x.Taken == len(x.stages) {
			return nil, fmt.Errorf("authority: restore %s: %w", n.ID, cmp.Or(err, errors.New("it has more stages taken than there are")))
		}
	}
	slices.SortStableFunc(out, func(a, b restore) int { return b.Begun.Compare(a.Begun) })
	return out, nil
}

// putRestore keeps a restore. One that begins must be the only one of its target.
func (a *Authority) putRestore(ctx context.Context, x *restore, now time.Time) error {
	content, err := json.Marshal(x)
	if err != nil {
		return fmt.Errorf("authority: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, registerWait)
	defer cancel()
	revision, err := a.registry.PutNote(ctx, registry.Note{Kind: restoreNotes, ID: x.ID, Revision: x.revision, Content: content}, func(have []registry.Note) (drop []string, err error) {
		all, err := readRestores(have)
		if err != nil {
			return nil, err
		}
		for i := range all {
			switch o := &all[i]; {
			case o.ID == x.ID:
			case o.State != authority.RestoreRunning:
				if now.Sub(cmp.Or(o.At, o.Begun)) > keepRestore {
					drop = append(drop, o.ID)
				}
			case x.revision == 0 && (o.Tenant == x.Tenant || o.Tenant == "" || x.Tenant == ""):
				return nil, authority.NewProblem(authority.ProblemConflict, fmt.Sprintf("restore %s of %s is under way", o.ID, o.Target), "wait for its end, or abort it: session-authority restore "+o.Target+" --abort")
			}
		}
		return drop, nil
	})
	switch {
	case err == nil:
		x.revision = revision
		return nil
	case errors.Is(err, registry.ErrConflict):
		return authority.NewProblem(authority.ProblemConflict, "another was faster", "see session-authority restores")
	}
	var p *authority.Problem
	if errors.As(err, &p) {
		return err
	}
	return registryProblem(err)
}

// beginRestore keeps a staged restore and takes its first stage. Asked for again
// under the same idempotency key, it goes on from where it is.
func (a *Authority) beginRestore(ctx context.Context, id session.DecisionID, pl *plan) (*authority.Decision, error) {
	x, p, now := pl.restore, access.From(ctx), time.Now().UTC()
	x.ID, x.By, x.Begun = "r-"+hex.EncodeToString(id[:8]), p.Name, now
	all, err := a.restores()
	if err != nil {
		return nil, err
	}
	if i := slices.IndexFunc(all, func(o restore) bool { return o.ID == x.ID && o.Tenant == x.Tenant }); i >= 0 {
		x = &all[i]
	} else if x.nothing != nil {
		return nil, x.nothing
	} else if err := a.putRestore(ctx, x, now); err != nil {
		return nil, err
	}
	if x.Taken > 0 {
		shown := x.StagedRestore
		return &authority.Decision{
			ID: hex.EncodeToString(id[:]), Operation: authority.Restore, Committed: true, Durable: true, Duplicate: true,
			Epoch: x.Epoch, Number: x.Number, At: x.At, Restore: &shown,
		}, nil
	}
	a.log.Warn("restoring in stages", "restore", x.ID, "by", x.By, "target", x.Target, "stages", x.Stages, "hold", time.Duration(x.Hold).String())
	return a.takeStage(ctx, x)
}

// stageID names the decision of a stage: however often, and by whatever authority,
// it comes to be taken, it is taken once.
func (x *restore) stageID(what string) (session.DecisionID, error) {
	id, _, err := decisionID("restore\x00"+x.ID+"\x00"+what, &authority.Request{Operation: authority.Restore, Stages: x.Stages})
	return id, err
}

// takeStage takes the next stage and keeps that it was taken.
func (a *Authority) takeStage(ctx context.Context, x *restore) (*authority.Decision, error) {
	a.staging.Lock()
	defer a.staging.Unlock()
	id, err := x.stageID(fmt.Sprint(x.Taken))
	if err != nil {
		return nil, err
	}
	p := a.planner(nil)
	if why := p.undone(x); why != "" {
		return nil, a.stopRestore(ctx, x, why)
	}
	ended, entries := p.ended(x), p.stageEntries(x)
	if h := a.o.beforeStage; h != nil {
		h()
	}
	if len(entries) > session.MaxBatchEntries {
		return nil, invalid("restore it by shares", "a stage of a tenant takes %d entries, at most %d", len(entries), session.MaxBatchEntries)
	}
	d, err := a.enter(ctx, id, authority.Restore, entries)
	if err != nil {
		return nil, err
	}
	if h := a.o.afterStage; h != nil {
		if err := h(); err != nil {
			return nil, err
		}
	}
	if !a.stored(ctx, d.Epoch, d.Number) {
		// It is taken again, which finds it taken, and then marked.
		shown := x.StagedRestore
		d.Restore = &shown
		d.Warnings = append(d.Warnings, "the stage is not known to be stored yet; when it is, the restore goes on")
		return d, nil
	}
	stage := x.Stages[x.Taken]
	if x.Taken == 0 {
		x.SplitAt = session.InstantOf(d.At)
	}
	x.Taken++
	x.At, x.Epoch, x.Number = d.At.UTC(), d.Epoch, d.Number
	if why := a.planner(nil).overtaken(x, ended); why != "" {
		return nil, a.stopRestore(ctx, x, why)
	}
	if x.Next = x.At.Add(time.Duration(x.Hold)); x.Taken == len(x.stages) {
		x.State, x.Next = authority.RestoreDone, time.Time{}
	}
	if err := a.putRestore(ctx, x, time.Now()); err != nil {
		// What is in force is that of the stage; who looks next sees that it was taken.
		a.log.Warn("a stage was taken, and is not marked so", "restore", x.ID, "error", err)
	}
	a.log.Warn("restored a stage", "restore", x.ID, "stage", stage, "taken", x.Taken, "of", len(x.stages), "number", d.Number)
	shown := x.StagedRestore
	d.Restore = &shown
	return d, nil
}

// storeTimeout is how long it is waited for a stage to be stored.
const storeTimeout = 2 * time.Second

// stored waits until the state here has a batch, and reports whether it has.
func (a *Authority) stored(ctx context.Context, epoch, number uint64) bool {
	ctx, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for {
		if e, n, _ := a.seq.Head(); e > epoch || e == epoch && n >= number {
			return true
		}
		select {
		case <-ctx.Done():
			return false
		case <-tick.C:
		}
	}
}

// stopRestore keeps that a restore does not go on, and returns why as a Problem.
func (a *Authority) stopRestore(ctx context.Context, x *restore, why string) error {
	x.State, x.Why, x.Next = authority.RestoreStopped, why, time.Time{}
	a.log.Warn("a staged restore stops", "restore", x.ID, "why", why)
	if err := a.putRestore(ctx, x, time.Now()); err != nil {
		return err
	}
	return authority.NewProblem(authority.ProblemConflict, "the restore stopped: "+why, "see session-authority status, and restore what is to be restored")
}

// tendRestores takes stages that are due, while this authority writes the log,
// until ctx ends.
func (a *Authority) tendRestores(ctx context.Context) {
	tick := time.NewTicker(restoreTick)
	defer tick.Stop()
	failing := ""
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		err := a.takeDue(ctx)
		if now := fmt.Sprint(err); err != nil && now != failing && ctx.Err() == nil {
			a.log.Warn("staged restores wait", "error", err)
			failing = now
		} else if err == nil {
			failing = ""
		}
	}
}

func (a *Authority) takeDue(ctx context.Context) error {
	all, err := a.restores()
	if err != nil {
		return err
	}
	a.flow.keep(all)
	if st := a.seq.Status(); !st.Writer || st.Halted != nil {
		return nil //nolint:nilerr // the status says so itself
	}
	var errs []error
	for i := range all {
		x := &all[i]
		if x.State != authority.RestoreRunning {
			continue
		}
		due := !time.Now().Before(x.Next)
		if x.Taken == 0 {
			due = time.Since(x.Begun) > stageLimit // whoever began it takes the first
		}
		if !due && (x.Taken == 0 || a.planner(nil).undone(x) == "") {
			continue
		}
		step, cancel := context.WithTimeout(ctx, stageLimit)
		d, err := a.takeStage(step, x)
		cancel()
		if err == nil && d.Number != x.Number {
			continue // not stored yet
		}
		rec := a.stageRecord(x, d, err)
		if d != nil || rec.Outcome == authority.OutcomeRefused {
			a.note(rec)
		}
		if d != nil {
			a.watched.decided(place{d.Epoch, d.Number}, x.Incident)
		}
		var p *authority.Problem
		if err != nil && (!errors.As(err, &p) || p.Type != authority.ProblemConflict) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// stageRecord is the audit's record of a stage that the authority took by itself.
func (a *Authority) stageRecord(x *restore, d *authority.Decision, err error) authority.AuditRecord {
	r := &authority.Request{Operation: authority.Restore, Incident: x.Incident, Targets: []authority.Target{x.target()}, Stages: x.Stages}
	rec := a.decisionRecord(r, d, err)
	rec.Detail = fmt.Sprintf("restore %s of %s: %d of %d stages taken (%s)", x.ID, x.By, x.Taken, len(x.Stages), strings.Join(x.Stages, ", "))
	return rec
}

func (x *restore) target() authority.Target { return wholeTarget(x.Tenant) }

// wholeTarget is a whole tenant, or everything where the name is empty.
func wholeTarget(tenant string) authority.Target {
	if tenant == "" {
		return authority.One("", session.KindGlobal.String(), "", "")
	}
	return authority.One("", session.KindTenant.String(), "", tenant)
}

// Restores returns what p may see of the staged restores; it is the API's.
func (a *Authority) Restores(ctx context.Context) ([]authority.StagedRestore, error) {
	return a.restoresIn(access.From(ctx).Scope(access.ListProposals))
}

func (a *Authority) restoresIn(scope access.Scope) ([]authority.StagedRestore, error) {
	all, err := a.restores()
	if err != nil {
		return nil, err
	}
	out := []authority.StagedRestore{}
	for i := range all {
		x := &all[i]
		if x.Tenant != "" && !scope.Has(x.Tenant) || x.State != authority.RestoreRunning && time.Since(cmp.Or(x.At, x.Begun)) > keepRestore {
			continue
		}
		r := x.StagedRestore
		if !scope.All() { // the stages name tenants, and so may the reason
			if x.Tenant == "" {
				r.Why = ""
			}
			for i, s := range x.stages {
				if s.tenant != "" && !scope.Has(s.tenant) {
					r.Stages = slices.Clone(r.Stages)
					r.Stages[i] = "another tenant"
				}
			}
		}
		if x.State == authority.RestoreRunning && x.Taken > 0 {
			r.Figures = a.figures(x, scope)
		}
		out = append(out, r)
	}
	return out, nil
}

// AbortRestore kills again what a restore has set free; it is the API's. One
// commander does: two had decided the kill.
func (a *Authority) AbortRestore(ctx context.Context, id string) (*authority.Decision, error) {
	x, d, err := a.abortRestore(ctx, id)
	r := &authority.Request{Operation: authority.Kill}
	if x != nil {
		r.Targets, r.Incident = []authority.Target{x.target()}, x.KillIncident
	}
	return a.decided(ctx, r, d, err, "abort of restore "+clip(id))
}

func (a *Authority) abortRestore(ctx context.Context, id string) (*restore, *authority.Decision, error) {
	a.staging.Lock()
	defer a.staging.Unlock()
	p := access.From(ctx)
	all, err := a.restores()
	if err != nil {
		return nil, nil, err
	}
	i := slices.IndexFunc(all, func(x restore) bool {
		return x.ID == id && (x.Tenant == "" || p.Scope(access.ListProposals).Has(x.Tenant))
	})
	if i < 0 {
		return nil, nil, authority.NewProblem(authority.ProblemNotFound, fmt.Sprintf("no restore %.32q", id), "see session-authority restores")
	}
	x := &all[i]
	if err := p.CheckIn(access.DecideAll, x.Tenant); err != nil {
		return nil, nil, err
	}
	kill := "kill anew: session-authority kill " + x.Target
	if x.State != authority.RestoreRunning && x.State != authority.RestoreAborted {
		return x, nil, authority.NewProblem(authority.ProblemConflict, "the restore is "+string(x.State), kill)
	}
	decision, err := x.stageID("abort")
	if err != nil {
		return x, nil, err
	}
	if x.State == authority.RestoreAborted {
		if time.Since(x.At) > keepRestore {
			return x, nil, authority.NewProblem(authority.ProblemConflict, "the restore was aborted at "+x.At.Format(time.RFC3339), kill)
		}
		shown := x.StagedRestore
		return x, &authority.Decision{
			ID: hex.EncodeToString(decision[:]), Operation: authority.Kill, Committed: true, Durable: true, Duplicate: true,
			Epoch: x.Epoch, Number: x.Number, At: x.At, Restore: &shown,
			Warnings: []string{"it was aborted then; see session-authority status for what is in force"},
		}, nil
	}
	entries := []session.Entry{setKill(&x.Whole, x.KillIncident)}
	planner := a.planner(nil)
	for _, h := range planner.held(x) {
		// One that was killed anew since stays so.
		if r, ok := planner.suspension(h.Key); ok && x.own(&h, &r) && h.Tenant != x.Tenant {
			entries = append(entries, liftKill(&h, 0, x.KillIncident))
		}
	}
	d, err := a.enter(ctx, decision, authority.Kill, entries)
	if err != nil {
		return x, nil, err
	}
	x.State, x.Next, x.Why = authority.RestoreAborted, time.Time{}, "aborted by "+p.Name
	x.At, x.Epoch, x.Number = d.At.UTC(), d.Epoch, d.Number
	if err := a.putRestore(ctx, x, time.Now()); err != nil && !d.Duplicate {
		d.Warnings = append(d.Warnings, "the abort is in force, and not marked yet: "+err.Error())
	}
	a.log.Warn("a staged restore is aborted: killed again", "restore", x.ID, "by", p.Name, "number", d.Number)
	shown := x.StagedRestore
	d.Restore = &shown
	return x, d, nil
}

// enter takes a decision of that id into the log.
func (a *Authority) enter(ctx context.Context, id session.DecisionID, op authority.Operation, entries []session.Entry) (*authority.Decision, error) {
	res, err := a.seq.Decide(ctx, sequencer.Decision{ID: id, Entries: entries})
	if err != nil {
		return nil, &undecided{decideProblem(err), id}
	}
	a.hub.note(res.Epoch, res.Number, res.At.Time(), entries)
	return &authority.Decision{
		ID: hex.EncodeToString(id[:]), Operation: op, Committed: true, Epoch: res.Epoch, Number: res.Number, At: res.At.Time(),
		Durable: res.Durable, Duplicate: res.Duplicate, Entries: len(entries),
	}, nil
}
