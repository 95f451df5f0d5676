package authority

import (
	"context"
	"crypto/rand"
	"time"

	"github.com/interlock-fabric/interlock/internal/sequencer"
	"github.com/interlock-fabric/interlock/pkg/session"
)

const (
	// canaryEnd is how long the entry of a canary stays: well beyond the time
	// in which everybody has checked it.
	canaryEnd = time.Minute
	// canaryLimit bounds the wait for one to be durable.
	canaryLimit = 5 * time.Second
)

// sendCanaries revokes a canary session in each tenant every so often, for as
// long as this authority writes the log. What enforcers find comes back in their
// receipts.
func (a *Authority) sendCanaries(ctx context.Context, every time.Duration) {
	tick := time.NewTicker(every)
	defer tick.Stop()
	failing := false
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if st := a.seq.Status(); !st.Writer || st.Halted != nil {
			continue
		}
		err := a.sendCanary(ctx)
		if err != nil && !failing && ctx.Err() == nil {
			a.log.Warn("the canary could not be revoked", "error", err)
		}
		failing = err != nil
	}
}

func (a *Authority) sendCanary(ctx context.Context) error {
	var id session.DecisionID
	_, _ = rand.Read(id[:]) // crypto/rand never fails
	t, _ := a.tenants()
	entries := make([]session.Entry, 0, len(t.list))
	for _, s := range t.list {
		e, err := s.CanaryEntry(id, session.InstantOf(time.Now().Add(canaryEnd)))
		if err != nil {
			return err
		}
		entries = append(entries, e)
	}
	ctx, cancel := context.WithTimeout(ctx, canaryLimit)
	defer cancel()
	_, err := a.seq.Decide(ctx, sequencer.Decision{ID: id, Entries: entries})
	return err
}
