package sequencer

import (
	"bytes"
	"context"
	"crypto/sha256"
	"testing"
	"time"

	"github.com/interlock-fabric/interlock/pkg/filter"
	"github.com/interlock-fabric/interlock/pkg/natsfeed"
	"github.com/interlock-fabric/interlock/pkg/session"
	"github.com/nats-io/nats.go/jetstream"
)

// published reads the published segments, newest last, and verifies each.
func (s *store) published(q *Sequencer) (out []*filter.Segment, subjects int) {
	ctx := context.Background()
	js, err := jetstream.New(s.conn())
	must(s.tb, err)
	stream, err := js.Stream(ctx, natsfeed.SegmentStream)
	must(s.tb, err)
	info, err := stream.Info(ctx, jetstream.WithSubjectFilter(">"))
	must(s.tb, err)
	chunks := map[string]*bytes.Buffer{}
	for seq := info.State.FirstSeq; seq <= info.State.LastSeq && info.State.Msgs > 0; seq++ {
		m, err := stream.GetMsg(ctx, seq)
		if err != nil {
			continue // purged
		}
		if m.Subject != natsfeed.SegmentSubject {
			if chunks[m.Subject] == nil {
				chunks[m.Subject] = &bytes.Buffer{}
			}
			chunks[m.Subject].Write(m.Data)
			continue
		}
		f, err := session.ParseFrame(m.Data)
		must(s.tb, err)
		ref, err := session.UnmarshalSegmentRef(f.Body)
		must(s.tb, err)
		_, err = q.trust.Writer(&f, ref.Number, true, session.InstantOf(time.Now()))
		must(s.tb, err)
		b := chunks[natsfeed.SegmentChunkSubject(ref.Sum)]
		if b == nil || sha256.Sum256(b.Bytes()) != ref.Sum {
			return nil, 0 // it is being replaced
		}
		g, err := filter.ReadSegment(bytes.NewReader(b.Bytes()), int64(ref.Size))
		must(s.tb, err)
		if g.Digest() != ref.State || g.Mark().Head != ref.Head || g.Mark().Number != ref.Number {
			s.tb.Fatal("the description is not of the segment")
		}
		out = append(out, g)
	}
	return out, len(chunks)
}

// TestPublishedSegments: the writer publishes the state as it changes, keeps the
// newest few, and loses nothing of what it decides meanwhile.
func TestPublishedSegments(t *testing.T) {
	s := newStore(t)
	q := s.open(func(o *Options) { o.SegmentEvery = 20 * time.Millisecond })
	n := 0
	for deadline := time.Now().Add(20 * time.Second); ; n++ {
		_, err := q.Decide(context.Background(), revoke(n))
		must(t, err)
		if n%50 != 49 {
			continue
		}
		all, _ := s.published(q)
		if len(all) == KeepSegments && all[0].Mark().Number > 1 && all[len(all)-1].Len() > 0 && n > 300 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d segments after %d decisions", len(all), n)
		}
	}
	eventually(t, "the newest segment has the newest state, and old chunks are gone", func() bool {
		all, subjects := s.published(q)
		if len(all) == 0 || len(all) > KeepSegments || subjects > 2*KeepSegments {
			return false
		}
		newest := all[len(all)-1]
		_, number, head := q.Head()
		return newest.Mark().Number == number && newest.Mark().Head == head && newest.Digest() == q.State().Digest() && newest.Len() == n+1
	})
	sums, count, err := q.State().Recount()
	if err != nil || count != n+1 || sums.Total() != q.State().Digest() {
		t.Error(count, err)
	}
}
