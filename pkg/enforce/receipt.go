package enforce

import (
	"context"
	"time"

	"github.com/interlock-fabric/interlock/pkg/session"
)

// receipts collects what the next receipt says.
type receipts struct {
	batches []stamp
	dirty   bool
	sentAny bool
	sentAt  time.Duration
	count   uint64
}

// stamp is when a batch was put in force, by the local monotonic clock.
type stamp struct {
	number uint64
	at     time.Duration
	cut    int
}

const (
	// receiptEvery bounds receipts to two a second.
	receiptEvery = 500 * time.Millisecond
	// receiptIdle is how often an enforcer with nothing new shows that it is
	// there.
	receiptIdle = 2 * time.Second
)

func (r *receipts) applied(number uint64, at time.Duration, cut int) {
	if len(r.batches) >= session.MaxApplied {
		r.batches = r.batches[1:]
	}
	r.batches = append(r.batches, stamp{number, at, cut})
	r.dirty = true
}

func (r *receipts) confirmed() {
	if !r.sentAny {
		r.dirty = true
	}
}

// sendReceipt sends a receipt when one is due: the first news at once, later
// ones at most two a second, and a sign of life when there is none.
func (f *follower) sendReceipt(ctx context.Context) {
	r := &f.receipts
	now := f.now()
	since := now - r.sentAt
	if f.anchor == nil || r.sentAny && (r.dirty && since < receiptEvery || !r.dirty && since < receiptIdle) || !r.sentAny && !r.dirty {
		return
	}
	frame, err := f.receipt(now)
	if err == nil {
		rctx, cancel := context.WithTimeout(ctx, time.Second)
		err = f.e.feed.Receipt(rctx, frame)
		cancel()
	}
	r.sentAt, r.sentAny = now, true
	if err != nil {
		return // what it said stays for the next one
	}
	r.batches, r.dirty = nil, false
}

func (f *follower) receipt(now time.Duration) ([]byte, error) {
	v, a, c := f.e.view.Load(), f.anchor, &f.e.count
	f.receipts.count++
	middle := func(at time.Duration) int64 { return (a.lower(at) + a.upper(at)) / 2 }
	strict := session.Call{Strict: true}
	out := session.Receipt{
		Enforcer: f.e.opts.Enrollment.Enforcer, Boot: f.e.boot, Count: f.receipts.count,
		Epoch: v.epoch, Number: v.number, Head: v.head, Confirmed: v.confirmed,
		At: middle(now), Error: a.bound(now) + time.Millisecond,
		Mode: f.e.opts.Mode, MaxStale: f.e.opts.MaxStale, Age: max(0, now-v.origin),
		Denying: f.e.stale(v, &strict, f.e.opts.clock(), f.e.opts.MaxStale) != nil,
		Cut:     c.cut.Load(), Running: uint64(f.e.bound.len()), Denied: c.denied.Load(),
		Refused: c.refused.Load(), Foreign: c.foreign.Load(), Repairs: c.repairs.Load(), Diverged: c.diverged.Load(),
	}
	for _, s := range f.receipts.batches {
		out.Batches = append(out.Batches, session.Applied{Number: s.number, At: middle(s.at), Cut: uint32(s.cut)})
	}
	body, err := out.MarshalBody()
	if err != nil {
		return nil, err
	}
	return session.Seal(session.TypeReceipt, body, f.e.opts.Enrollment.ReceiptKey)
}
