package enforce

import (
	"slices"
	"time"

	"github.com/interlock-fabric/interlock/pkg/session"
)

// canaryCheck is what became of a canary, by the local monotonic clock.
type canaryCheck struct {
	number uint64
	at     time.Duration
	denied bool
}

// checkCanary checks callers of the canary sessions of a batch that has just been
// put in force, if it has any, the way in which any caller is: the authority wants
// to see that this enforcer denies, and not only that it has the batch. What it
// finds is no caller's, so it is not in the totals.
func (f *follower) checkCanary(b *session.Batch) {
	at := 0
	var id *session.DecisionID
	for i := range b.Decisions {
		d := &b.Decisions[i]
		if d.Count > 0 && at < len(b.Entries) && b.Entries[at].Reason == session.ReasonCanary {
			id = &d.ID // the newest counts
		}
		at += int(d.Count)
	}
	if id == nil {
		return
	}
	found, denied := false, true
	for _, s := range f.e.opts.Enrollment.Tenants {
		entry, err := s.CanaryEntry(*id, 0)
		if err != nil || !slices.ContainsFunc(b.Entries, func(e session.Entry) bool { return e.Key == entry.Key && e.Reason == session.ReasonCanary }) {
			continue // the authority has no canary in this tenant, or only claims to
		}
		found = true
		p, err := s.CanaryCaller(*id)
		denied = denied && err == nil && f.denies(p)
	}
	if found {
		f.receipts.canary = &canaryCheck{b.Number, f.now(), denied}
		f.receipts.dirty = true
	}
}

// denies reports whether a call of the caller would be denied now.
func (f *follower) denies(p *session.Prepared) bool {
	e := f.e
	v := e.judge(e.view.Load(), p, &session.Call{}, e.opts.clock(), e.opts.MaxStale)
	return v.denied != nil && e.opts.Mode != session.ModeShadow
}
