package enforce

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/interlock-fabric/interlock/pkg/filter"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// SegmentFeed is a Feed that can also fetch published segments. With one, a cold
// start takes a segment and the log from there, instead of the whole log; and a
// log that does not reach back far enough is no end.
type SegmentFeed interface {
	Feed
	// Segments returns the descriptions of the published segments, oldest first,
	// as signed frames.
	Segments(ctx context.Context) ([][]byte, error)
	// Segment writes the bytes of a described segment to w. An error of w stops
	// it and is returned.
	Segment(ctx context.Context, ref session.SegmentRef, w io.Writer) error
}

const (
	// fetchSilence is how long a segment may make no progress.
	fetchSilence = 15 * time.Second
	// refetchMin and refetchMax bound the back-off of fetches that bring nothing.
	refetchMin, refetchMax = time.Second, time.Minute
)

var (
	errNotNewer   = errors.New("no published segment is newer than what is here")
	errNoSegments = errors.New("this feed has no published segments")
)

// fetched is a segment that has been verified, with who vouched for it.
type fetchedSegment struct {
	ref    session.SegmentRef
	g      *filter.Segment
	signer session.KeyID
}

// needSegment begins to fetch the newest published segment, if the feed has any.
// Until that has ended, the log is not read anew, but what is heard goes on.
func (f *follower) needSegment(ctx context.Context) {
	f.keep.want = false
	feed, ok := f.e.feed.(SegmentFeed)
	if !ok {
		f.noSegment(errNoSegments)
		return
	}
	f.keep.fetching = true
	want := wanted{above: f.chain.base.number, most: f.mostSegment(), not: f.keep.bad}
	if f.doubt != nil {
		want.best = f.doubt.number
	}
	c, trust := f.chain, f.trust
	f.jobs.Go(func() {
		x, err := f.fetchSegment(ctx, feed, trust, want)
		f.post(ctx, func() {
			f.keep.fetching = false
			switch {
			case c != f.chain:
				// A rebuild has begun, which asks by itself.
			case err == nil:
				f.keep.fetchWait = 0
				f.adoptSegment(x)
			default:
				f.noSegment(err)
			}
			f.needRepair()
		})
	})
}

// noSegment goes on without a segment: from the log, unless that has a gap. It
// is tried again later where it is needed.
func (f *follower) noSegment(err error) {
	f.keep.fetchWait = min(max(2*f.keep.fetchWait, refetchMin), refetchMax)
	f.keep.fetchAt = f.now() + jitter(f.keep.fetchWait)
	switch {
	case f.keep.gap > 0:
		f.keep.want = true
		f.say("the log begins after what is in force here, and no published segment leads on", err)
		if f.hint == "" {
			f.alarm("the log begins after what is in force here, and no published segment leads on", "number", f.chain.tip().number, "first", f.keep.gap, "error", err)
		}
	case !errors.Is(err, errNotNewer) && !errors.Is(err, errNoSegments):
		f.keep.want = !f.chain.live
		f.e.opts.Logger.Warn("no published segment could be had: reading the log instead", "error", err)
	}
}

// wanted says which published segments are of use: those above a number, and, if
// most is not 0, not above that; of these the newest that is not above best, if
// best is not 0; and not one of the sum not.
type wanted struct {
	above, most, best uint64
	not               [32]byte
}

// mostSegment is the newest batch at which a published segment may begin the
// chain, or 0 for any. It is the floor, for as long as the log may have it or what
// comes after it: whoever has not gone over it cannot tell the log that was in
// force here from a branch of it, grown after the store was rolled back.
func (f *follower) mostSegment() uint64 {
	if n := f.chain.floor.number; f.keep.gap <= n {
		return n
	}
	return 0
}

// fetchSegment fetches the first segment in the order wanted whose description
// is signed by a trusted writer, and verifies that it is the one described.
func (f *follower) fetchSegment(ctx context.Context, feed SegmentFeed, trust *session.Trust, want wanted) (fetchedSegment, error) {
	ks := trust.KeySet()
	lctx, cancel := context.WithTimeout(ctx, jobLimit)
	frames, err := feed.Segments(lctx)
	cancel()
	if err != nil {
		return fetchedSegment{}, err
	}
	type candidate struct {
		frame session.Frame
		ref   session.SegmentRef
	}
	var found []candidate
	for _, b := range slices.Backward(frames) {
		frame, ferr := session.ParseFrame(b)
		if ferr != nil || frame.Type != session.TypeSegment {
			continue
		}
		ref, ferr := session.UnmarshalSegmentRef(frame.Body)
		if ferr != nil || ref.Epoch != ks.Epoch || ref.Number <= want.above || want.most > 0 && ref.Number > want.most || ref.Sum == want.not || ref.Cut(ks) {
			continue
		}
		found = append(found, candidate{frame, ref})
	}
	if want.best > 0 {
		slices.SortStableFunc(found, func(a, b candidate) int {
			if late := a.ref.Number > want.best; late != (b.ref.Number > want.best) {
				if late {
					return 1
				}
				return -1
			}
			return 0
		})
	}
	err = errNotNewer
	for _, c := range found {
		frame, ref := c.frame, c.ref
		key, ferr := trust.Writer(&frame, ref.Number, false, session.Instant(f.e.opts.clock().wall/int64(time.Millisecond)))
		if ferr != nil || !key.May(session.GlobalKey()) {
			// One that may not speak for all tenants must not say what is in
			// force in all of them.
			f.e.count.refused.Add(1)
			continue
		}
		var g *filter.Segment
		if g, err = f.download(ctx, feed, ref); err == nil {
			return fetchedSegment{ref, g, frame.Key}, nil
		}
	}
	return fetchedSegment{}, err
}

// download fetches one segment, into the state directory if there is one.
func (f *follower) download(ctx context.Context, feed SegmentFeed, ref session.SegmentRef) (g *filter.Segment, err error) {
	if limit := 512 * uint64(f.e.opts.MaxEntries); ref.Size > limit {
		return nil, fmt.Errorf("%w: %d bytes, at most %d", filter.ErrSegment, ref.Size, limit)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	silence := time.AfterFunc(fetchSilence, cancel)
	defer silence.Stop()
	sum := sha256.New()
	to := func(w io.Writer) error {
		return feed.Segment(ctx, ref, io.MultiWriter(w, sum, progress(func() { silence.Reset(fetchSilence) })))
	}
	if path := segmentPath(f.e.opts); path != "" {
		g, err = downloadFile(path, to)
	} else {
		g, err = downloadHeap(ref, to)
	}
	if err != nil {
		return nil, err
	}
	m := g.Mark()
	if [32]byte(sum.Sum(nil)) != ref.Sum || m.Epoch != ref.Epoch || m.Number != ref.Number || m.Head != ref.Head ||
		g.Digest() != ref.State || uint64(g.Size()) != ref.Size {
		return nil, fmt.Errorf("%w: not the one described", filter.ErrAltered)
	}
	return g, nil
}

type progress func()

func (p progress) Write(b []byte) (int, error) { p(); return len(b), nil }

// downloadFile puts the bytes into a file beside path and opens them there. The
// file goes at once; what is open of it stays. What is resumed from after a
// restart is what this enforcer has sealed itself, after it was vouched for.
func downloadFile(path string, to func(io.Writer) error) (g *filter.Segment, err error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, err
	}
	file, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".*.tmp") // 0600
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.Remove(file.Name())) }()
	if err = to(file); err != nil {
		return nil, errors.Join(err, file.Close())
	}
	if err = file.Close(); err != nil {
		return nil, err
	}
	return filter.OpenSegment(file.Name())
}

func downloadHeap(ref session.SegmentRef, to func(io.Writer) error) (*filter.Segment, error) {
	r, w := io.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = w.CloseWithError(to(w)) // never fails (io.Pipe)
	}()
	g, err := filter.ReadSegment(r, int64(ref.Size))
	if err == nil {
		// The end, or the error that there was after it.
		_, err = io.Copy(io.Discard, r)
	}
	_ = r.CloseWithError(err) // never fails (io.Pipe)
	<-done
	return g, err
}

// giveUp leaves a published segment that turned out not to be of the authority's
// log, before anything of it was in force, for the log itself. It reports whether
// there was one. Where the floor contradicts the head, the segment is not to blame.
func (f *follower) giveUp(h head) bool {
	if !f.chain.trial || f.chain.live || f.chain.offFloor(h) {
		return false
	}
	f.e.count.refused.Add(1)
	f.alarm("a published segment is not of the authority's log: reading the log from its beginning")
	f.again(f.chain.floor, nil)
	f.publish()
	return true
}

// adoptSegment begins the chain at a fetched segment. It is in force once a
// heartbeat has vouched for it; until then what was in force is, and what is
// heard meanwhile beside it.
func (f *follower) adoptSegment(x fetchedSegment) {
	floor := f.chain.floor
	at := head{x.ref.Number, x.ref.Head}
	switch ks := f.trust.KeySet(); {
	case ks.Epoch != x.ref.Epoch || ks.Revoked(x.signer, x.ref.Number) || x.ref.Cut(ks):
		return
	case at.number <= f.chain.base.number || f.chain.live && len(f.beats) == 0 && f.keep.gap == 0:
		return // the log was faster
	case f.mostSegment() > 0 && at.number > f.mostSegment():
		return // or has been found to have what is between
	case at.number == floor.number && at != floor:
		f.rolledBack("a published segment is not of the log that was in force here: it was rolled back, and a new epoch is needed", "number", at.number)
		return
	}
	if n := f.inherited.Len(); n > 0 && f.chain.base.number > 0 {
		f.e.opts.Logger.Warn("a published segment bridges a gap in the log: what was lifted there of what earlier epochs left stays in force here until it is lifted again",
			"entries", n, "after", f.chain.base.number, "until", at.number)
	}
	beats := f.beats
	from := state{head: at, set: x.g.Set()}
	for _, s := range x.ref.Signers {
		from.signed(s.Key, s.Last)
	}
	from.signed(x.signer, at.number) // who vouched for it
	f.again(floor, &from)
	f.chain.trial, f.chain.source = true, x.ref.Sum
	f.rewind(1) // the log's positions are at least the batches' numbers
	f.keep.sealedAt = never
	f.e.opts.Logger.Info("starting from a published segment", "epoch", x.ref.Epoch, "number", x.ref.Number, "entries", x.g.Len())
	f.publish()
	f.beats = beats
	f.retry()
	f.progress()
}
