package enforce

import (
	"context"
	"time"

	"github.com/interlock-fabric/interlock/pkg/session"
)

// receipts collects what the next receipt says.
type receipts struct {
	batches []stamp
	canary  *canaryCheck
	dirty   bool // there is news
	begun   bool // the first state has been confirmed
	sending bool
	count   uint64
	// When the last receipt with news was sent, and the last two of any kind.
	news time.Duration
	sent [2]time.Duration
}

// stamp is when a batch was put in force, by the local monotonic clock.
type stamp struct {
	number uint64
	at     time.Duration
	cut    int
}

const (
	// receiptEvery spaces receipts with news. Together with the signs of life
	// there are at most two a second.
	receiptEvery = 500 * time.Millisecond
	// receiptIdle is how often an enforcer with nothing new shows that it is
	// there.
	receiptIdle = 2 * time.Second
)

func (r *receipts) applied(s stamp) {
	r.batches = append(r.batches, s)
	r.clip()
	r.dirty = true
}

// clip leaves out the oldest of more than a receipt holds.
func (r *receipts) clip() {
	if n := len(r.batches) - session.MaxApplied; n > 0 {
		r.batches = r.batches[n:]
	}
}

// confirmed makes the first state news in itself.
func (r *receipts) confirmed() {
	r.dirty = r.dirty || !r.begun
	r.begun = true
}

func (r *receipts) due(now time.Duration) bool {
	switch {
	case !r.begun || r.sending:
		return false
	case r.count == 0:
		return true
	case !r.dirty:
		return now-r.sent[1] >= receiptIdle
	}
	return now-r.news >= receiptEvery && (r.count == 1 || now-r.sent[0] >= time.Second)
}

// sendReceipt sends a receipt when one is due: news at once, or as soon as the
// rate permits, and a sign of life when there is none. Like all that touches the
// network it runs beside run, so that a bus that hangs holds up no decision.
func (f *follower) sendReceipt(ctx context.Context) {
	r := &f.receipts
	now := f.now()
	if f.anchor == nil || !r.due(now) {
		return
	}
	frame, err := f.receipt(now)
	if r.dirty {
		r.news = now
	}
	said, canary := r.batches, r.canary
	r.sent = [2]time.Duration{r.sent[1], now}
	r.batches, r.canary, r.dirty = nil, nil, false
	if err != nil {
		f.e.opts.Logger.Error("cannot make a receipt", "error", err)
		return
	}
	r.sending = true
	f.job(ctx, time.Second, func(ctx context.Context) func() {
		err := f.e.feed.Receipt(ctx, frame)
		return func() {
			r.sending = false
			if err != nil { // the next one says it
				r.batches, r.dirty = append(said, r.batches...), true
				r.clip()
				if r.canary == nil {
					r.canary = canary
				}
			}
		}
	})
}

func (f *follower) receipt(now time.Duration) ([]byte, error) {
	v, a, c := f.e.view.Load(), f.anchor, &f.e.count
	f.receipts.count++
	strict := session.Call{Strict: true}
	out := session.Receipt{
		Enforcer: f.e.opts.Enrollment.Enforcer, Boot: f.e.boot, Count: f.receipts.count,
		Epoch: v.epoch, Number: v.tip.number, Head: v.tip.hash, Confirmed: v.confirmed,
		At: a.middle(now), Error: a.bound(now),
		Mode: f.e.opts.Mode, MaxStale: f.e.opts.MaxStale, Age: max(0, now-v.origin),
		Denying: v.stale(&strict, f.e.opts.clock(), f.e.opts.MaxStale) != "",
		Cut:     c.cut.Load(), Running: uint64(f.e.bound.len()), Denied: c.denied.Load(),
		Refused: c.refused.Load(), Foreign: c.foreign.Load(), Repairs: c.repairs.Load(), Diverged: c.diverged.Load(),
		Divergence: v.divergence,
	}
	for _, s := range f.receipts.batches {
		out.Batches = append(out.Batches, session.Applied{Number: s.number, At: a.middle(s.at), Cut: uint32(s.cut)})
		out.Error = max(out.Error, a.bound(s.at))
	}
	for _, o := range v.ordered[:min(len(v.ordered), session.MaxReceiptOrders)] {
		out.Orders = append(out.Orders, o.Frame)
	}
	if k := f.receipts.canary; k != nil {
		out.Canary = &session.Canary{Number: k.number, At: a.middle(k.at), Denied: k.denied}
		out.Error = max(out.Error, a.bound(k.at))
	}
	body, err := out.MarshalBody()
	if err != nil {
		return nil, err
	}
	return session.Seal(session.TypeReceipt, body, f.e.opts.Enrollment.ReceiptKey)
}
