package enforce

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/interlock-fabric/interlock/pkg/filter"
)

const (
	// sealEvery is how long a change may wait to be sealed, where there is a
	// state directory: what came since is read from the log after a restart.
	sealEvery = 10 * time.Minute
	// calm is how long nothing may have been confirmed before a delta that is due
	// is merged: a burst is merged when it is over, unless it outgrows its bound.
	calm = time.Second
	// sealAgain is the pause after sealing failed.
	sealAgain = 10 * time.Second
	// scrubPass is how long rot may go unnoticed in what no check happens to
	// read.
	scrubPass = time.Minute
)

// keeper seals the confirmed state into segments, so that memory holds little of
// it and a restart begins where the last run ended, and looks after the segment
// in use. It is the follower's, and touched by run alone.
type keeper struct {
	sealing  bool
	sealAt   time.Duration // not before
	sealedAt time.Duration // when a segment was last sealed or loaded
	failed   bool
	// warm and left are of an earlier run, until something is confirmed: the
	// state, and what was left of epochs before.
	warm, left *filter.Segment
	// unsaved is set when inherited is not as it is kept, hurry when it is not
	// kept at all yet.
	unsaved, hurry bool
	scrubs         [2]scrub // of the state and of what was inherited
	// The delta, which no scrub reaches, is counted anew once a pass.
	counting bool
	countAt  time.Duration
	fetching bool // a published segment
	want     bool
	fetchAt  time.Duration // not before
	// fetchWait is the back-off of fetches that brought nothing.
	fetchWait time.Duration
	// gap, if not 0, is the first batch that the log has after what is here,
	// when that is not the next one.
	gap uint64
	// bad is the published segment that the last divergence began with.
	bad [32]byte
}

// segmentPath is in a directory that several enforcers may share.
func segmentPath(o Options) string {
	if o.StateDir == "" {
		return ""
	}
	return filepath.Join(o.StateDir, o.Enrollment.Enforcer+".segment")
}

// sweep removes what a crash has left of files that were being written, each of
// which may be as large as the state.
func (f *follower) sweep() {
	o := f.e.opts
	if o.StateDir == "" {
		return
	}
	for _, pattern := range []string{".segment.*.tmp", ".inherited.*.tmp", ".floor.json.*", ".orders.json.*", ".agents.*"} {
		left, err := fs.Glob(os.DirFS(o.StateDir), o.Enrollment.Enforcer+pattern)
		for _, name := range left {
			err = errors.Join(err, os.Remove(filepath.Join(o.StateDir, name)))
		}
		if err != nil {
			o.Logger.Warn("cannot remove what an earlier run has left in the state directory", "error", err)
		}
	}
}

// loadSegment loads what an earlier run has sealed. A segment that is refused is
// no loss but of time: the log has it all.
func (f *follower) loadSegment() {
	path := segmentPath(f.e.opts)
	if path == "" {
		return
	}
	g, err := filter.OpenSegment(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		f.e.count.damaged.Add(1)
		f.e.opts.Logger.Error("the state of the last run cannot be used: reading the log from its beginning", "error", err)
	default:
		f.keep.warm = g
	}
}

// resume begins the chain at the segment of an earlier run, if that is of this
// epoch, if nothing that was withdrawn since had a part in it, and if it does not
// contradict the floor. What it holds is in force once a heartbeat has vouched
// for it, like everything else.
func (f *follower) resume(bottom head) {
	g := f.keep.warm
	if g == nil {
		return
	}
	m, ks := g.Mark(), f.trust.KeySet() // g's file was this enforcer's own
	at := head{m.Number, m.Head}
	var signers []signer
	if err := json.Unmarshal([]byte(m.Note), &signers); err != nil || m.Epoch != ks.Epoch || anyRevoked(ks, signers) ||
		at.number == bottom.number && at != bottom {
		return
	}
	f.chain.resume(state{head: at, set: g.Set(), signers: signers})
	// The log's positions are at least the batches' numbers.
	f.rewind(1)
	f.keep.sealedAt = f.now()
	f.e.opts.Logger.Info("resuming from the state of the last run", "epoch", m.Epoch, "number", m.Number, "entries", g.Len())
}

// resume makes a state that was confirmed by an earlier run the beginning.
func (c *chain) resume(s state) {
	c.start(s)
	if s.number > c.floor.number {
		c.floor = s.head
	}
}

// tendState seals the state when that is due, has the segment in use scrubbed,
// and rebuilds when it turns out to be damaged.
func (f *follower) tendState(ctx context.Context) {
	set := f.chain.confirmed.set
	if err := errors.Join(set.Err(), f.chain.base.set.Err()); err != nil {
		f.damaged(err)
		return
	}
	f.countDelta(ctx)
	f.scrub(ctx, &f.keep.scrubs[0], set.Segment())
	f.scrub(ctx, &f.keep.scrubs[1], f.inherited.Segment())
	f.tendDoubt(ctx)
	f.tendInherited(ctx)
	now := f.now()
	due := set.Overdue() || set.Due() && now-f.headAt >= calm || f.e.opts.StateDir != "" && now-f.keep.sealedAt >= sealEvery && (set.Delta() > 0 || f.keep.sealedAt == never)
	ks := f.trust.KeySet()
	if !due || f.keep.sealing || now < f.keep.sealAt || !f.chain.live || ks == nil {
		return
	}
	c := f.chain
	note, err := json.Marshal(c.confirmed.signers)
	if err != nil {
		return // a list of numbers
	}
	mark, bare := f.mark(ks.Epoch, string(note)), f.mark(ks.Epoch, "")
	inherited, unsaved := f.inherited, f.keep.unsaved && f.e.opts.StateDir != ""
	f.keep.sealing = true
	f.jobs.Go(func() {
		var left, g *filter.Segment
		path, err := f.e.opts.sealPath()
		if err == nil && unsaved {
			left, err = inherited.SealBeside(ctx, inheritedPath(f.e.opts), bare)
		}
		if err == nil {
			g, err = set.SealBeside(ctx, path, mark)
		}
		f.post(ctx, func() {
			if left != nil {
				f.savedInherited(inherited, left)
			}
			f.sealed(c, set, g, err)
		})
	})
}

// sealPath returns where to seal, in a directory that is there: "" for the heap.
func (o Options) sealPath() (string, error) {
	path := segmentPath(o)
	if path == "" {
		return "", nil
	}
	return path, os.MkdirAll(o.StateDir, 0o700)
}

// sealed puts what has arrived meanwhile onto the new segment.
func (f *follower) sealed(c *chain, from *filter.Set, g *filter.Segment, err error) {
	now := f.now()
	f.keep.sealing, f.keep.sealedAt = false, now
	if err != nil {
		f.keep.sealAt = now + sealAgain
		f.sealFailed(err)
		return
	}
	f.keep.failed = false
	if c != f.chain {
		return // a rebuild has begun: what it will seal is sealed again
	}
	same := c.base.set == c.confirmed.set
	c.confirmed.set, _ = c.confirmed.set.Onto(from, g)
	if same {
		c.base.set = c.confirmed.set
	} else {
		c.base.set, _ = c.base.set.Onto(from, g)
	}
	f.publish()
}

// damaged denies everything and rebuilds.
func (f *follower) damaged(err error) {
	f.e.count.damaged.Add(1)
	f.e.opts.Logger.Error("the revocation state is damaged: denying and rebuilding", "error", err)
	f.forgetSegment()
	f.rebuild("the revocation state was damaged", f.chain.floor)
}

var errDelta = errors.New("what stands above the sealed state does not add up to its digest")

// countDelta counts the delta anew when that is due, beside run.
func (f *follower) countDelta(ctx context.Context) {
	c, now := f.chain, f.now()
	if f.keep.counting || now < f.keep.countAt || !c.live {
		return
	}
	f.keep.counting, f.keep.countAt = true, now+scrubPass
	set := c.confirmed.set
	f.jobs.Go(func() {
		sound, err := set.CheckDelta() // the segment's Err repeats the error
		f.post(ctx, func() {
			if f.keep.counting = false; err == nil && !sound && c == f.chain {
				f.damaged(errDelta)
			}
		})
	})
}

func (f *follower) sealFailed(err error) {
	if !f.keep.failed {
		f.e.opts.Logger.Error("cannot seal the state: it stays in memory, and the next start reads the log from further back", "error", err)
	}
	f.keep.failed = true
}

// scrub is the scrub of a segment in use.
type scrub struct {
	of   *filter.Segment
	stop context.CancelFunc
}

func (s *scrub) end() {
	if s.stop != nil {
		s.stop()
	}
	*s = scrub{}
}

// scrub has the segment in use, and no earlier one, scrubbed.
func (f *follower) scrub(ctx context.Context, s *scrub, g *filter.Segment) {
	if g == s.of {
		return
	}
	s.end()
	if g == nil {
		return
	}
	sctx, stop := context.WithCancel(ctx)
	*s = scrub{g, stop}
	f.jobs.Go(func() {
		_ = g.Scrub(sctx, scrubPass) // Err repeats the error, and tendState looks there
	})
}

// forgetSegment keeps the next start from a segment that is not to be trusted.
func (f *follower) forgetSegment() {
	path := segmentPath(f.e.opts)
	if path == "" {
		return
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		f.e.opts.Logger.Error("cannot remove the sealed state", "error", err)
	}
}

// keepLast seals what has changed since the last time, when the enforcer closes.
func (f *follower) keepLast() {
	for i := range f.keep.scrubs {
		f.keep.scrubs[i].end()
	}
	c, ks := f.chain, f.trust.KeySet()
	if f.e.opts.StateDir == "" || ks == nil {
		return
	}
	path, err := f.e.opts.sealPath()
	if err == nil && f.keep.unsaved {
		_, err = f.inherited.Seal(inheritedPath(f.e.opts), f.mark(ks.Epoch, ""))
	}
	if err == nil && f.verified && c.live && f.unusable == "" && (c.confirmed.set.Delta() > 0 || f.keep.sealedAt == never) {
		var note []byte
		if note, err = json.Marshal(c.confirmed.signers); err == nil {
			_, err = c.confirmed.set.Seal(path, f.mark(ks.Epoch, string(note)))
		}
	}
	if err != nil {
		f.e.opts.Logger.Error("cannot seal the state: the next start reads the log from further back", "error", err)
	}
}
