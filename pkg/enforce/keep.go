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
	warm     *filter.Segment // of an earlier run, until an epoch begins
	scrubbed *filter.Segment
	stop     context.CancelFunc // ends the scrub
	fetching bool               // a published segment
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
	f.keep.warm = nil
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
		f.e.count.damaged.Add(1)
		f.e.opts.Logger.Error("the revocation state is damaged: denying and rebuilding", "error", err)
		f.forgetSegment()
		f.rebuild("the revocation state was damaged", f.chain.floor)
		return
	}
	f.scrub(ctx, set.Segment())
	f.tendDoubt(ctx)
	now := f.now()
	due := set.Due() || f.e.opts.StateDir != "" && now-f.keep.sealedAt >= sealEvery && (set.Delta() > 0 || f.keep.sealedAt == never)
	ks := f.trust.KeySet()
	if !due || f.keep.sealing || now < f.keep.sealAt || !f.chain.live || ks == nil {
		return
	}
	c := f.chain
	note, err := json.Marshal(c.confirmed.signers)
	if err != nil {
		return // a list of numbers
	}
	mark := filter.Mark{Epoch: ks.Epoch, Number: c.confirmed.number, Head: c.confirmed.hash, Time: f.fresh, Note: string(note)}
	f.keep.sealing = true
	f.jobs.Go(func() {
		path, err := f.e.opts.sealPath()
		var g *filter.Segment
		if err == nil {
			g, err = set.SealBeside(ctx, path, mark)
		}
		f.post(ctx, func() { f.sealed(c, set, g, err) })
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
		if !f.keep.failed {
			f.e.opts.Logger.Error("cannot seal the state: it stays in memory, and the next start reads the log from further back", "error", err)
		}
		f.keep.failed = true
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

// scrub has the segment in use, and none else, scrubbed.
func (f *follower) scrub(ctx context.Context, g *filter.Segment) {
	if g == f.keep.scrubbed {
		return
	}
	if f.keep.stop != nil {
		f.keep.stop()
	}
	f.keep.scrubbed = g
	if g == nil {
		return
	}
	sctx, stop := context.WithCancel(ctx)
	f.keep.stop = stop
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
	if f.keep.stop != nil {
		f.keep.stop()
	}
	c, ks := f.chain, f.trust.KeySet()
	if f.e.opts.StateDir == "" || ks == nil || !f.verified || !c.live || f.unusable != "" || c.confirmed.set.Delta() == 0 && f.keep.sealedAt != never {
		return
	}
	note, err := json.Marshal(c.confirmed.signers)
	if err == nil {
		var path string
		if path, err = f.e.opts.sealPath(); err == nil {
			_, err = c.confirmed.set.Seal(path, filter.Mark{Epoch: ks.Epoch, Number: c.confirmed.number, Head: c.confirmed.hash, Time: f.fresh, Note: string(note)})
		}
	}
	if err != nil {
		f.e.opts.Logger.Error("cannot seal the state: the next start reads the log from further back", "error", err)
	}
}
