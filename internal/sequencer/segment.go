package sequencer

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/interlock-fabric/interlock/pkg/filter"
	"github.com/interlock-fabric/interlock/pkg/natsfeed"
	"github.com/interlock-fabric/interlock/pkg/session"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

const (
	// DefaultSegmentEvery is how often the state is sealed and published, when it
	// has changed.
	DefaultSegmentEvery = 5 * time.Minute
	// DefaultSegmentBatches is how many batches do not wait for that.
	DefaultSegmentBatches = 10_000
	// KeepSegments is how many published segments are kept, so that an enforcer
	// can finish reading one while the next is published, and that one which
	// cannot be read is not the end. The log reaches back to the oldest of them.
	KeepSegments = 3

	segmentPoll  = time.Second
	segmentLimit = 5 * time.Minute
	// segmentRest is how many times as long as the last one took nothing is
	// published: sealing must leave the machine to those who decide.
	segmentRest = 4
	// storeLimit bounds each write to the store: an acknowledgement that is lost
	// with its leader never comes. failedRest bounds the rest after such waiting,
	// which was no work.
	storeLimit = 5 * time.Second
	failedRest = 2 * time.Second
	// pauseAtMost bounds the rest after each chunk.
	pauseAtMost = 50 * time.Millisecond
)

// publishSegments seals the state and publishes it when that is due, as long as
// this sequencer is the writer, and trims the log behind what is published.
func (s *Sequencer) publishSegments() {
	tick := time.NewTicker(min(segmentPoll, s.o.SegmentEvery))
	defer tick.Stop()
	at, took := time.Now(), time.Duration(0)
	answered := uint64(0) // the version of the newest key set that was published for
	for {
		select {
		case <-s.ctx.Done():
			return
		case <-tick.C:
		}
		s.lookAtLog()
		v, since := s.view.Load(), time.Since(at)
		last := s.published.Load()
		if last == nil {
			last = &session.SegmentRef{Epoch: v.epoch}
		}
		due := s.segmentDue(v, last, since)
		// A withdrawal leaves nobody anything to start from, and the chain that
		// it leaves may be shorter: it does not wait for a batch.
		ks := s.trust.KeySet()
		cut := ks.Version != answered && last.Cut(ks)
		if !s.IsWriter() || !cut && !due || v.number == 0 || since < segmentRest*took {
			continue
		}
		start := time.Now()
		err := s.publishSegment()
		at = time.Now() // also when it fails: the next attempt has its time, too
		took = at.Sub(start)
		if err == nil && s.published.Load() != last {
			answered = ks.Version
		}
		if err != nil {
			took = min(took, failedRest)
		}
		if err != nil && s.ctx.Err() == nil {
			s.log.Warn("sequencer: the state was not published, or the log not trimmed behind it: both go on with the next segment", "err", err)
		}
	}
}

// segmentDue reports whether the state is to be published: since is how long ago
// the last attempt was. Canaries alone make that due by their number and not by
// the clock: they end by themselves, and sealing a large state costs seconds.
func (s *Sequencer) segmentDue(v *view, last *session.SegmentRef, since time.Duration) bool {
	return v.epoch != last.Epoch || v.number >= last.Number+s.o.SegmentBatches || v.news > last.Number && since >= s.o.SegmentEvery
}

// step tells a test where in a publication this is.
func (s *Sequencer) step(name string) {
	if h := s.o.Hooks.Segment; h != nil {
		h(name)
	}
}

// publishSegment seals the state, publishes it in chunks with what a writer needs
// to go on from there, reads both back, and then publishes their signed
// description: what is described is whole. What older segments and the log have
// beyond the newest KeepSegments is then removed.
func (s *Sequencer) publishSegment() error {
	ctx, cancel := context.WithTimeout(s.ctx, segmentLimit)
	defer cancel()
	var x snapshot
	var ok bool
	taken := make(chan struct{})
	if !s.post(func() { x, ok = s.w.snapshot(); close(taken) }) {
		return ErrClosed
	}
	select {
	case <-taken:
	case <-ctx.Done():
		return ctx.Err()
	}
	if !ok {
		return nil // not now
	}
	all, fence, err := s.described(ctx)
	if err != nil {
		return err
	}
	if len(all) > 0 {
		s.published.Store(&all[0].SegmentRef)
		if d := &all[0]; d.Epoch > x.epoch || d.Epoch == x.epoch && d.Number >= x.number && !d.Cut(s.trust.KeySet()) {
			return nil // another has been faster
		}
	}
	now := session.InstantOf(s.o.Hooks.Now())
	// The note makes the sum this attempt's own: nobody else writes under it.
	g, err := x.set.Seal(s.segmentPath(), filter.Mark{Epoch: x.epoch, Number: x.number, Head: x.head, Time: x.time, Note: rand.Text()})
	if err != nil {
		return fmt.Errorf("sequencer: segment: %w", err)
	}
	s.post(func() { s.w.onto(x.set, g) })
	s.step("sealed")
	more, err := x.resume(&s.hashes).bytes()
	if err != nil {
		return fmt.Errorf("sequencer: segment: %w", err)
	}
	sum := sha256.New()
	if _, err := g.WriteTo(sum); err != nil {
		return fmt.Errorf("sequencer: segment: %w", err)
	}
	ref := session.SegmentRef{
		Epoch: x.epoch, Number: x.number, Head: x.head, State: g.Digest(), Time: now,
		Entries: uint64(g.Len()), Size: uint64(g.Size()), ResumeSize: uint64(len(more)), ResumeSum: sha256.Sum256(more),
		Signers: x.signers,
	}
	sum.Sum(ref.Sum[:0])
	err = s.publishObject(ctx, ref.Sum, g)
	if err == nil {
		err = s.publishObject(ctx, ref.ResumeSum, bytes.NewReader(more))
	}
	s.step("stored")
	if err == nil {
		err = s.readObject(ctx, ref.Sum, ref.Size, &pacer{ctx: ctx, w: io.Discard})
	}
	if err == nil {
		err = s.readObject(ctx, ref.ResumeSum, ref.ResumeSize, &pacer{ctx: ctx, w: io.Discard})
	}
	if err != nil {
		return fmt.Errorf("sequencer: segment: %w", err)
	}
	s.step("read back")
	if err := s.describe(ctx, &ref, fence); err != nil {
		return fmt.Errorf("sequencer: segment: %w", err)
	}
	s.published.Store(&ref)
	s.step("described")
	return s.trim(ctx)
}

// publishObject stores what is written, in chunks, under its sum.
func (s *Sequencer) publishObject(ctx context.Context, sum [32]byte, from io.WriterTo) error {
	out := &chunker{ctx: ctx, js: s.js, pace: pacer{ctx: ctx}, subject: natsfeed.SegmentChunkSubject(sum)}
	if _, err := from.WriteTo(out); err != nil {
		return err
	}
	return out.flush()
}

// pacer rests after each write for as long as that and what led up to it took:
// nobody waits for a publication, but for decisions they do.
type pacer struct {
	ctx  context.Context // of one publication
	w    io.Writer
	last time.Time
}

func (p *pacer) Write(b []byte) (int, error) {
	n, err := p.w.Write(b)
	if err == nil {
		err = p.rest()
	}
	return n, err
}

func (p *pacer) rest() error {
	took := time.Duration(0)
	if !p.last.IsZero() {
		took = min(time.Since(p.last), pauseAtMost)
	}
	err := sleep(p.ctx, took)
	p.last = time.Now()
	return err
}

// describe publishes a segment's description, unless another was published since
// the one at fence: what a deposed writer describes must not take the place of
// what its successor did, and trimmed the log by.
func (s *Sequencer) describe(ctx context.Context, ref *session.SegmentRef, fence uint64) error {
	if !s.IsWriter() {
		return errors.New("this is not the writer any more")
	}
	key, may, err := s.signer()
	if err != nil {
		return err
	}
	if !may.May(session.GlobalKey()) {
		return fmt.Errorf("%w: the key may not speak for all tenants", ErrUntrusted)
	}
	frame, err := session.Seal(session.TypeSegment, ref.MarshalBody(), key)
	if err == nil {
		ctx, cancel := context.WithTimeout(ctx, storeLimit)
		defer cancel()
		_, err = s.js.Publish(ctx, natsfeed.SegmentSubject, frame,
			jetstream.WithExpectStream(natsfeed.SegmentStream), jetstream.WithExpectLastSequencePerSubject(fence))
	}
	return err
}

// trim removes what is older than the newest KeepSegments: the log behind the
// oldest of them, and then the segments before it. Nothing is removed unless that
// one can be read back from the store, whole, and the log goes on from it. All
// of that is the same whoever does it, so that a deposed writer removes nothing
// that its successor would keep: what is kept only ever moves on.
func (s *Sequencer) trim(ctx context.Context) error {
	all, _, err := s.described(ctx)
	if err != nil || len(all) < KeepSegments {
		return err
	}
	d := &all[KeepSegments-1]
	refuse := func(err error) error {
		return fmt.Errorf("sequencer: nothing is trimmed behind segment %d of epoch %d: %w", d.Number, d.Epoch, err)
	}
	r, err := s.readResume(ctx, d)
	if err == nil {
		err = s.readObject(ctx, d.Sum, d.Size, &pacer{ctx: ctx, w: io.Discard})
	}
	if err != nil {
		return refuse(err)
	}
	switch stale, err := s.leadsOn(ctx, r); {
	case err != nil:
		return refuse(err)
	case stale:
		return refuse(errors.New("the log has another batch in its place"))
	}
	start, err := s.objectStart(ctx, d)
	if err != nil {
		return refuse(err)
	}
	if !s.IsWriter() {
		return refuse(errors.New("this is not the writer any more"))
	}
	if err := s.halted(); err != nil {
		return refuse(err)
	}
	if err := s.purge(ctx, natsfeed.LogStream, r.at); err != nil {
		return err
	}
	s.step("trimmed")
	return s.purge(ctx, natsfeed.SegmentStream, start)
}

// objectStart returns where in its stream a published segment begins.
func (s *Sequencer) objectStart(ctx context.Context, d *described) (uint64, error) {
	start := d.pos
	for _, sum := range [][32]byte{d.Sum, d.ResumeSum} {
		m, err := s.getNext(ctx, natsfeed.SegmentStream, natsfeed.SegmentChunkSubject(sum), 1)
		if err != nil {
			return 0, err
		}
		if m == nil {
			return 0, errMissing
		}
		start = min(start, m.Seq)
	}
	return start, nil
}

// purge removes what a stream has before a position.
func (s *Sequencer) purge(ctx context.Context, name string, before uint64) error {
	ctx, cancel := context.WithTimeout(ctx, storeLimit)
	defer cancel()
	stream, err := s.js.Stream(ctx, name)
	if err == nil {
		err = stream.Purge(ctx, jetstream.WithPurgeSequence(before))
	}
	if err != nil {
		return fmt.Errorf("sequencer: trimming %s: %w", name, err)
	}
	return nil
}

// lookAtLog notes for Status with which batch the log begins.
func (s *Sequencer) lookAtLog() {
	ctx, cancel := context.WithTimeout(s.ctx, time.Second)
	defer cancel()
	first, _, err := s.logBounds(ctx)
	if err != nil || first == s.firstPos {
		return // looked at again
	}
	m, err := s.getNext(ctx, natsfeed.LogStream, natsfeed.LogSubject, first)
	if err != nil || m == nil {
		return
	}
	s.firstPos = first
	if f, err := session.ParseFrame(m.Data); err == nil {
		if b, err := session.UnmarshalBatch(f.Body); err == nil {
			s.kept.Store(b.Number)
		}
	}
}

// onSegment hears descriptions that another authority publishes.
func (s *Sequencer) onSegment(m *nats.Msg) {
	if d, err := s.describes(&stored{Data: m.Data}); err == nil && !s.IsWriter() {
		s.published.Store(&d.SegmentRef)
	}
}

// onto puts the states that descend from a sealed one onto its segment, which
// keeps them from being merged while somebody waits for a decision.
func (w *writer) onto(sealed *filter.Set, g *filter.Segment) {
	if next, ok := w.set.Onto(sealed, g); ok {
		w.set = next
	}
	for _, f := range w.flight {
		if next, ok := f.set.Onto(sealed, g); ok {
			f.set = next
		}
	}
}

// chunker publishes what is written to it.
type chunker struct {
	ctx     context.Context // of one publication
	js      jetstream.JetStream
	subject string
	buf     bytes.Buffer
	pace    pacer
}

func (c *chunker) Write(p []byte) (int, error) {
	n := len(p)
	for len(p) > 0 {
		part := min(len(p), natsfeed.SegmentChunkLen-c.buf.Len())
		c.buf.Write(p[:part])
		if p = p[part:]; c.buf.Len() == natsfeed.SegmentChunkLen {
			if err := c.flush(); err != nil {
				return 0, err
			}
		}
	}
	return n, nil
}

func (c *chunker) flush() error {
	if c.buf.Len() == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(c.ctx, storeLimit)
	_, err := c.js.Publish(ctx, c.subject, bytes.Clone(c.buf.Bytes()))
	cancel()
	c.buf.Reset()
	if err == nil {
		err = c.pace.rest()
	}
	return err
}

var _ io.Writer = (*chunker)(nil)
