package enforce

import (
	"context"

	"github.com/interlock-fabric/interlock/pkg/filter"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// doubt is a state whose digest was not the heartbeat's, until it has been held
// against the one that was rebuilt at the same batch. Both are counted anew,
// record by record, beside run: that takes seconds where there are millions.
type doubt struct {
	head
	epoch    uint64
	set      *filter.Set      // that differed, until sums are there
	sums     filter.RangeSums // of it
	rebuilt  *filter.Set
	counting bool
}

// diverged takes note that the confirmed state's digest is not the heartbeat's at
// the same batch: it denies and rebuilds, and finds out where the two differ.
func (f *follower) diverged(h session.Heartbeat) {
	c := f.chain
	f.e.count.diverged.Add(1)
	f.e.opts.Logger.Error("the state differs from the authority's at the same batch: denying and rebuilding", "number", h.Number, "epoch", h.Epoch)
	if f.doubt == nil {
		f.doubt = &doubt{head: c.confirmed.head, epoch: h.Epoch, set: c.confirmed.set}
		f.tell(session.Divergence{Epoch: h.Epoch, Number: h.Number})
	} else if c.probed != nil {
		f.doubt.rebuilt = c.probed // it differs, too
	}
	f.forgetSegment()
	if c.trial {
		f.keep.bad = c.source
	}
	f.rebuild("the state differs from the authority's", c.floor)
	// A fault that lasts must not have every enforcer read the log for ever.
	f.repairAt = f.now() + jitter(f.rereadWait-rereadMin)
	f.rereadWait = min(2*f.rereadWait, rereadMax)
	if f.repairAt > f.keep.fetchAt {
		f.keep.fetchAt = f.repairAt
	}
}

// tell makes what is known of the last divergence known.
func (f *follower) tell(d session.Divergence) {
	f.divergence = &d
	f.receipts.dirty = true
	f.publish()
}

// tendDoubt does what can be done next to find out where the states differ.
func (f *follower) tendDoubt(ctx context.Context) {
	d := f.doubt
	if d == nil || d.counting {
		return
	}
	if d.rebuilt == nil {
		d.rebuilt = f.chain.probed
	}
	switch ks := f.trust.KeySet(); {
	case d.set != nil:
		f.recount(ctx, d.set, func(sums filter.RangeSums, err error) {
			if d.sums = sums; err == nil && sums.Total() != d.set.Digest() {
				f.e.opts.Logger.Error("the state that differed does not add up to its own digest: memory has rotted", "number", d.number)
			}
			d.set = nil
			if err != nil {
				f.settled(err)
			}
		})
	case d.rebuilt != nil:
		f.recount(ctx, d.rebuilt, func(sums filter.RangeSums, err error) {
			if err == nil {
				f.compared(d, sums)
			}
			f.settled(err)
		})
	case ks == nil || ks.Epoch != d.epoch || f.chain.live:
		// It goes on from a segment of after that batch.
		f.settled(errNotRebuilt)
	}
}

type constError string

func (e constError) Error() string { return string(e) }

const errNotRebuilt constError = "the state was not rebuilt at that batch"

func (f *follower) recount(ctx context.Context, s *filter.Set, then func(filter.RangeSums, error)) {
	f.doubt.counting = true
	f.jobs.Go(func() {
		sums, _, err := s.Recount()
		f.post(ctx, func() {
			f.doubt.counting = false
			then(sums, err)
		})
	})
}

// compared says where the state that differed was another than the one that was
// rebuilt.
func (f *follower) compared(d *doubt, rebuilt filter.RangeSums) {
	out := session.Divergence{Epoch: d.epoch, Number: d.number, Compared: true}
	for i := range session.DivergenceRanges {
		if d.sums[i] != rebuilt[i] {
			if out.Ranges == 0 {
				out.First = uint8(i)
			}
			out.Ranges++
		}
	}
	if out.Ranges == 0 {
		f.e.opts.Logger.Error("the state that differed from the authority's is what the log says, too: it is the authority's digest that differs", "number", d.number, "epoch", d.epoch)
	} else {
		f.e.opts.Logger.Error("where the state differed from what the log says", "number", d.number, "epoch", d.epoch, "ranges", out.Ranges, "first", out.First)
	}
	f.tell(out)
}

// settled ends the doubt. With an error, where it was is not known.
func (f *follower) settled(err error) {
	if err != nil {
		f.e.opts.Logger.Warn("where the state differed cannot be told", "number", f.doubt.number, "epoch", f.doubt.epoch, "error", err)
	}
	f.doubt, f.chain.probe, f.chain.probed = nil, head{}, nil
}
