package sequencer

import (
	"time"

	"github.com/interlock-fabric/interlock/pkg/session"
)

const (
	// horizonMargin is how long after its end an entry leaves the state.
	horizonMargin = time.Minute
	// horizonEvery is how often the horizon moves at most, and how much less often
	// for each horizonPer entries: all who apply a move look through what may have
	// ended, and decisions behind it wait meanwhile, up to half a second at ten
	// million entries.
	horizonEvery = time.Minute
	horizonPer   = 1_000_000
	// horizonSlack is how far the wall clock may be ahead of where the log's
	// last time and the monotonic clock put it. A clock that jumps ahead must
	// not take entries out of the state.
	horizonSlack = time.Minute
)

// horizon decides how far the expiry horizon may go.
type horizon struct {
	next session.Instant // for the next batch
	log  session.Instant // the log's time when it was read
	mono time.Time       // and the moment of that
}

// anchor notes the time of the log's last batch, or the wall clock for a log
// that is empty.
func (h *horizon) anchor(last, wall session.Instant, now time.Time) {
	if last == 0 {
		last = wall
	}
	h.log, h.mono, h.next = last, now, 0
}

// bound returns how far the horizon may go at a wall-clock time.
func (h *horizon) bound(wall session.Instant, now time.Time) session.Instant {
	limit := h.log.Add(now.Sub(h.mono) + horizonSlack)
	return min(wall, limit).Add(-horizonMargin)
}

// horizonInterval is the least time between two moves in a state of n entries.
func horizonInterval(n int) time.Duration { return horizonEvery * time.Duration(1+n/horizonPer) }

// advanceHorizon moves the horizon when something is behind it. The state is
// searched beside the writer, since that takes long for a large one.
func (w *writer) advanceHorizon(now time.Time) {
	every := w.s.o.Hooks.HorizonEvery
	if every <= 0 {
		every = horizonInterval(w.set.Len())
	}
	if w.role != writing || now.Sub(w.horizonAt) < every {
		return
	}
	w.horizonAt = now
	bound, set := w.expiry.bound(w.wall(), now), w.set
	if bound <= w.chain.horizon || set.Len() == 0 {
		return
	}
	w.spawn(func() {
		expired := false
		set.Range(func(_ session.Key, r *session.Record) bool {
			expired = r.Expires != 0 && r.Expires <= bound
			return !expired && w.s.ctx.Err() == nil
		})
		if expired {
			w.s.post(func() {
				w.expiry.next = max(w.expiry.next, bound)
				w.proof = w.role == writing && len(w.flight) == 0 || w.proof
			})
		}
	})
}
