package authority

import (
	"cmp"
	"context"
	"encoding/hex"
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/interlock-fabric/interlock/internal/audit"
	"github.com/interlock-fabric/interlock/internal/sequencer"
	"github.com/interlock-fabric/interlock/pkg/authority"
	"github.com/interlock-fabric/interlock/pkg/session"
)

const (
	// recoverAfter is how long whoever took a decision has to leave its record,
	// before the writer of the log makes one from the log.
	recoverAfter = 10 * time.Second
	// recoverFor bounds one walk over the log, and maxWalk its messages.
	recoverFor = 5 * time.Minute
	maxWalk    = 1 << 18
	getTimeout = 3 * time.Second
)

// tendRecovery sees to it that every decision of the log has its record: what an
// authority decided and did not live to record is recorded by whoever writes the
// log.
func (a *Authority) tendRecovery(ctx context.Context) {
	tick := time.NewTicker(cmp.Or(a.o.recoverAfter, recoverAfter))
	defer tick.Stop()
	var head placed
	failing := false
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if head.number > 0 && a.seq.IsWriter() {
			err := a.recordUpTo(ctx, head)
			if err != nil && !failing && ctx.Err() == nil {
				a.log.Warn("whether every decision has its record in the audit is not known", "error", err)
			}
			failing = err != nil
		}
		// What is in the log now has until the next time.
		head.epoch, head.number, head.hash = a.seq.Head()
	}
}

// placed is a batch of the log.
type placed struct {
	place
	hash session.Hash
}

// logged is a decision as the log has it.
type logged struct {
	at      audit.Place
	id      session.DecisionID
	key     session.KeyID // that signed it
	time    session.Instant
	entries []session.Entry
}

// recordUpTo records the decisions up to head that have no record.
func (a *Authority) recordUpTo(ctx context.Context, head placed) error {
	end := audit.Place{Epoch: head.epoch, Number: head.number + 1}
	walked := a.audit.Walked()
	if walked.Compare(end) >= 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, recoverFor)
	defer cancel()
	list, err := a.walk(ctx, head, walked)
	if err != nil {
		return err
	}
	if len(list) > 0 {
		if err := a.recordMissing(ctx, list); err != nil {
			return err
		}
	}
	a.audit.SetWalked(end)
	return nil
}

func (a *Authority) recordMissing(ctx context.Context, list []logged) error {
	ids := make(map[string]struct{}, len(list))
	for i := range list {
		ids[hex.EncodeToString(list[i].id[:])] = struct{}{}
	}
	missing, kept, err := a.audit.Unrecorded(ctx, ids, list[0].time.Time())
	if err != nil || len(missing) == 0 {
		return err
	}
	own := sequencer.Restatement(list[0].at.Epoch)
	var records []audit.Recovered
	for i := range list {
		d := &list[i]
		_, none := missing[hex.EncodeToString(d.id[:])]
		_, restated := own[d.id]
		// Of what is older than the oldest record that is kept, retention may have
		// removed it.
		if none && !restated && !d.time.Time().Before(kept) {
			records = append(records, audit.Recovered{At: d.at, Record: a.recovered(d)})
		}
	}
	if len(records) > 0 {
		a.log.Warn("decisions are in the log that have no record in the audit: they are recorded from the log", "decisions", len(records), "first", records[0].Record.Sequence)
	}
	return a.audit.Recover(ctx, records)
}

// walk returns the decisions between a place and a batch that is in the chain,
// oldest first.
func (a *Authority) walk(ctx context.Context, head placed, from audit.Place) ([]logged, error) {
	var out []logged
	_, err := a.back(ctx, mark{math.MaxUint64, head.hash}, maxWalk, func(_ mark, f *session.Frame, b *session.Batch) bool {
		if (audit.Place{Epoch: b.Epoch, Number: b.Number + 1}).Compare(from) <= 0 {
			return false
		}
		out = append(out, decisionsOf(b, f.Key, from)...)
		return true
	})
	if err != nil {
		return nil, err
	}
	slices.Reverse(out)
	return out, nil
}

// decisionsOf returns the decisions of a batch that are not before a place, newest
// first. Canaries are nobody's decisions.
func decisionsOf(b *session.Batch, key session.KeyID, from audit.Place) (out []logged) {
	entries := b.Entries
	for i, d := range b.Decisions {
		at := audit.Place{Epoch: b.Epoch, Number: b.Number, Part: uint64(i)}
		n := min(int(d.Count), len(entries))
		own := entries[:n]
		entries = entries[n:]
		canary := n > 0 && !slices.ContainsFunc(own, func(e session.Entry) bool { return e.Reason != session.ReasonCanary })
		if !canary && at.Compare(from) >= 0 {
			out = append(out, logged{at, d.ID, key, b.Time, own})
		}
	}
	slices.Reverse(out)
	return out
}

// recovered is the record of a decision by what the log has of it.
func (a *Authority) recovered(d *logged) authority.AuditRecord {
	r := authority.AuditRecord{
		Kind: authority.AuditDecision, Action: "recover", Outcome: authority.OutcomeDone, Principal: authority.AuditPrincipal{Means: "unknown"},
		Epoch: d.at.Epoch, Sequence: d.at.Number, Decision: hex.EncodeToString(d.id[:]), Decided: d.time.Time().UTC(), Entries: len(d.entries),
		Detail: fmt.Sprintf("from the log, as key %s signed it: who asked for it left no record", d.key),
	}
	ks := a.store.KeySet()
	for i := range d.entries {
		e := &d.entries[i]
		if i == 0 {
			r.Reason, r.Incident, r.Drill = e.Reason.String(), e.Incident, e.Drill
		}
		if i == maxRecovered {
			r.Left = len(d.entries) - i
			r.Tenants = nil // there may be more
			break
		}
		verb := "set"
		if e.Op == session.OpLift {
			verb = "lift"
		}
		tenant := authority.AuditAny
		what := fmt.Sprintf("%s %s on %s", verb, e.Effect, e.Key.Shape)
		if e.Key != session.GlobalKey() {
			tenant = cmp.Or(ks.TenantName(e.Key.Tenant), authority.AuditUnknown)
			what += fmt.Sprintf(" %x of tenant %s", e.Key.Digest, tenant)
		}
		r.Targets = append(r.Targets, what)
		if !slices.Contains(r.Tenants, tenant) {
			r.Tenants = append(r.Tenants, tenant)
		}
		c := authority.AuditCaller{Tenant: tenant, Agent: authority.AuditAny, User: authority.AuditAny}
		for _, k := range e.Key.Shape.Kinds() {
			switch k {
			case session.KindAgent:
				c.Agent = authority.AuditUnknown
			case session.KindUser:
				c.User = authority.AuditUnknown
			}
		}
		if !slices.Contains(r.Callers, c) {
			r.Callers = append(r.Callers, c)
		}
	}
	return r
}

// maxRecovered bounds the entries that a recovered record has.
const maxRecovered = 100
