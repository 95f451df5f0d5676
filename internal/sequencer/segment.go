package sequencer

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/interlock-fabric/interlock/pkg/filter"
	"github.com/interlock-fabric/interlock/pkg/natsfeed"
	"github.com/interlock-fabric/interlock/pkg/session"
	"github.com/nats-io/nats.go/jetstream"
)

const (
	// DefaultSegmentEvery is how often the state is sealed and published, when it
	// has changed.
	DefaultSegmentEvery = 5 * time.Minute
	// DefaultSegmentBatches is how many batches do not wait for that.
	DefaultSegmentBatches = 1000
	// KeepSegments is how many published segments are kept, so that an enforcer
	// can finish reading one while the next is published.
	KeepSegments = 3

	segmentPoll  = time.Second
	segmentLimit = 5 * time.Minute
)

// publishSegments seals the state and publishes it when that is due, as long as
// this sequencer is the writer.
func (s *Sequencer) publishSegments() {
	tick := time.NewTicker(min(segmentPoll, s.o.SegmentEvery))
	defer tick.Stop()
	var last view
	at := time.Now()
	for {
		select {
		case <-s.ctx.Done():
			return
		case <-tick.C:
		}
		v := s.view.Load()
		news := v.epoch != last.epoch || v.number > last.number
		due := v.number >= last.number+s.o.SegmentBatches || time.Since(at) >= s.o.SegmentEvery
		if !s.IsWriter() || !news || !due || v.number == 0 {
			continue
		}
		at = time.Now() // also when it fails: the next attempt has its time, too
		if err := s.publishSegment(v); err != nil {
			if s.ctx.Err() == nil {
				s.log.Warn("sequencer: the state could not be published: new enforcers read the log from further back", "err", err)
			}
			continue
		}
		last = *v
	}
}

// publishSegment seals a state, publishes it in chunks, and then its signed
// description: what an enforcer finds described is whole.
func (s *Sequencer) publishSegment(v *view) error {
	ctx, cancel := context.WithTimeout(s.ctx, segmentLimit)
	defer cancel()
	now := session.InstantOf(s.o.Hooks.Now())
	g, err := v.set.Seal("", filter.Mark{Epoch: v.epoch, Number: v.number, Head: v.head, Time: now})
	if err != nil {
		return err
	}
	s.post(func() { s.w.onto(v.set, g) })
	sum := sha256.New()
	if _, err := g.WriteTo(sum); err != nil {
		return err
	}
	ref := session.SegmentRef{
		Epoch: v.epoch, Number: v.number, Head: v.head, State: g.Digest(), Time: now,
		Entries: uint64(g.Len()), Size: uint64(g.Size()),
	}
	sum.Sum(ref.Sum[:0])
	out := &chunker{ctx: ctx, js: s.js, subject: natsfeed.SegmentChunkSubject(ref.Sum)}
	// What an earlier attempt has left of the same segment would come first.
	stream, err := s.js.Stream(ctx, natsfeed.SegmentStream)
	if err == nil {
		err = stream.Purge(ctx, jetstream.WithPurgeSubject(out.subject))
	}
	if err == nil {
		_, err = g.WriteTo(out)
	}
	if err == nil {
		err = out.flush()
	}
	if err != nil {
		return fmt.Errorf("sequencer: segment: %w", err)
	}
	if !s.IsWriter() {
		return nil // another describes what it finds
	}
	key, may, err := s.signer()
	if err != nil {
		return err
	}
	if !may.May(session.GlobalKey()) {
		return fmt.Errorf("sequencer: segment: %w: the key may not speak for all tenants", ErrUntrusted)
	}
	frame, err := session.Seal(session.TypeSegment, ref.MarshalBody(), key)
	if err == nil {
		_, err = s.js.Publish(ctx, natsfeed.SegmentSubject, frame)
	}
	if err != nil {
		return fmt.Errorf("sequencer: segment: %w", err)
	}
	return s.purgeSegments(ctx, stream)
}

// purgeSegments removes all but the newest segments.
func (s *Sequencer) purgeSegments(ctx context.Context, stream jetstream.Stream) error {
	if err := stream.Purge(ctx, jetstream.WithPurgeSubject(natsfeed.SegmentSubject), jetstream.WithPurgeKeep(KeepSegments)); err != nil {
		return fmt.Errorf("sequencer: old segments: %w", err)
	}
	keep := map[string]bool{natsfeed.SegmentSubject: true}
	info, err := stream.Info(ctx, jetstream.WithSubjectFilter(">"))
	if err != nil {
		return fmt.Errorf("sequencer: old segments: %w", err)
	}
	for seq := info.State.FirstSeq; seq <= info.State.LastSeq; seq++ {
		m, err := stream.GetMsg(ctx, seq, jetstream.WithGetMsgSubject(natsfeed.SegmentSubject))
		if err != nil {
			break
		}
		seq = m.Sequence
		f, err := session.ParseFrame(m.Data)
		if err != nil {
			continue
		}
		if ref, err := session.UnmarshalSegmentRef(f.Body); err == nil {
			keep[natsfeed.SegmentChunkSubject(ref.Sum)] = true
		}
	}
	for subject := range info.State.Subjects {
		if !keep[subject] && strings.HasPrefix(subject, natsfeed.SegmentSubject+".") {
			if err := stream.Purge(ctx, jetstream.WithPurgeSubject(subject)); err != nil {
				return fmt.Errorf("sequencer: old segments: %w", err)
			}
		}
	}
	return nil
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
	_, err := c.js.Publish(c.ctx, c.subject, bytes.Clone(c.buf.Bytes()))
	c.buf.Reset()
	return err
}

var _ io.Writer = (*chunker)(nil)
