package enforce

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"

	"github.com/interlock-fabric/interlock/pkg/filter"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// What earlier epochs left in force stays so until it is lifted by name, and the
// new epoch's log does not have it: where there is a state directory it is kept
// there, as a segment of its own. Its mark's epoch is the one that inherited it;
// what earlier epochs' sealed states hold is in it and must not come back, since
// it may have been lifted.
//
// It is written as soon as there is something to inherit, and then, when lifts
// have changed it, always before the state of the batches that lifted: what it
// may still have too much is lifted again when the log is read from there.

// inheritedPath is in a directory that several enforcers may share.
func inheritedPath(o Options) string {
	if o.StateDir == "" {
		return ""
	}
	return filepath.Join(o.StateDir, o.Enrollment.Enforcer+".inherited")
}

// loadInherited loads what an earlier run has kept of earlier epochs. One that
// cannot be read is an error: unlike the rest of the state it is nowhere else.
func loadInherited(o Options) (*filter.Segment, error) {
	path := inheritedPath(o)
	if path == "" {
		return nil, nil
	}
	g, err := filter.OpenSegment(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %s is damaged (%w), so what earlier epochs left in force is not known: restore the file, or remove it if all of that has been decided anew",
			ErrFloor, path, err)
	}
	return g, nil
}

// inherit takes over what is in force, at the beginning of an epoch.
func (f *follower) inherit() {
	v := f.e.view.Load()
	set := with(v.set, v.overlay)
	if v.inherited.Len() > 0 {
		set = filter.Merge(v.inherited, set)
	}
	f.leave(set)
}

// inheritSealed takes over what earlier runs have sealed of earlier epochs.
func (f *follower) inheritSealed(epoch uint64) {
	left, warm := f.keep.left, f.keep.warm
	var set *filter.Set
	if left != nil {
		set = left.Set()
	}
	if warm != nil && warm.Mark().Epoch < epoch && (left == nil || left.Mark().Epoch <= warm.Mark().Epoch) {
		if set.Len() > 0 {
			set = filter.Merge(set, warm.Set())
		} else {
			set = warm.Set()
		}
	} else if left == nil || left.Mark().Epoch == epoch {
		f.inherited = set
		return // it is as it is kept
	}
	f.leave(set)
}

// leave makes a set what earlier epochs left.
func (f *follower) leave(set *filter.Set) {
	f.inherited, f.keep.unsaved, f.keep.hurry = set, true, true
	if n := set.Len(); n > 0 {
		f.e.opts.Logger.Warn("new epoch: entries of earlier ones stay in force until lifted", "epoch", f.trust.KeySet().Epoch, "entries", n)
	}
}

// with returns a state that denies what more denies, too, at the cost of more,
// which is small.
func with(s *filter.Set, more *filter.Overlay) *filter.Set {
	type decision struct {
		seq   uint64
		since session.Instant
	}
	batches := map[decision]*session.Batch{}
	more.Range(func(k session.Key, r *session.Record) bool {
		if r.Drill {
			return true
		}
		d := decision{r.Seq, r.Since}
		if batches[d] == nil {
			batches[d] = &session.Batch{Number: r.Seq, Time: r.Since}
		}
		batches[d].Entries = append(batches[d].Entries, session.Entry{
			Op: session.OpSet, Effect: r.Effect, Reason: r.Reason, Key: k, IssuedBefore: r.IssuedBefore,
			Expires: r.Expires, Incident: r.Incident, ACR: r.ACR, Except: r.Except,
		})
		return true
	})
	for _, b := range batches {
		s = s.Apply(b, nil)
	}
	return s
}

// mark says where in the log the confirmed state is.
func (f *follower) mark(epoch uint64, note string) filter.Mark {
	c := &f.chain.confirmed
	return filter.Mark{Epoch: epoch, Number: c.number, Head: c.hash, Time: f.fresh, Note: note}
}

// tendInherited has what was inherited written when it has just been.
func (f *follower) tendInherited(ctx context.Context) {
	ks := f.trust.KeySet()
	if !f.keep.hurry || f.keep.sealing || ks == nil || f.e.opts.StateDir == "" || f.now() < f.keep.sealAt {
		return
	}
	set, mark := f.inherited, f.mark(ks.Epoch, "")
	f.keep.sealing = true
	f.jobs.Go(func() {
		_, err := f.e.opts.sealPath()
		var g *filter.Segment
		if err == nil {
			g, err = set.Seal(inheritedPath(f.e.opts), mark)
		}
		f.post(ctx, func() {
			f.keep.sealing = false
			if err == nil {
				f.savedInherited(set, g)
				return
			}
			f.keep.sealAt = f.now() + sealAgain
			f.sealFailed(err)
		})
	})
}

// savedInherited puts what has been inherited onto its segment.
func (f *follower) savedInherited(set *filter.Set, g *filter.Segment) {
	if ks := f.trust.KeySet(); g.Mark().Epoch == ks.Epoch {
		f.keep.hurry = false
	}
	f.keep.unsaved = f.inherited != set
	if f.inherited.Len() > 0 {
		f.inherited, _ = f.inherited.Onto(set, g)
		f.publish()
	}
}
