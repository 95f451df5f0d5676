package sequencer

import (
	"bytes"
	"context"
	"crypto/sha256"
	"maps"
	"sync/atomic"
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

// TestPublishedAfterAWithdrawal: a description says who signed what is in the
// segment, also behind a restart. When a key is withdrawn behind that, the segments
// with its batches are refused, and the chain that is left is published without
// waiting for a batch: it is shorter than what was published, and nothing else
// comes.
func TestPublishedAfterAWithdrawal(t *testing.T) {
	s := newStore(t)
	second := newKey(t)
	first := session.KeyIDOf(writerKey(s.key).Public)
	s.set = s.keySet(t, 1, writerKey(s.key), writerKey(second))
	k := s.keys(t, s.key, s.set)
	mod := func(o *Options) { byHand(o); o.Keys = k }
	q := s.open(mod)
	for n := range 10 {
		must(t, decideDurable(q, n))
	}
	_, by1, _ := q.Head()
	k.use(second)
	publish(t, q, 10)
	q.Close()
	q = s.open(mod) // from the segment
	for n := 11; n < 30; n++ {
		must(t, decideDurable(q, n))
	}
	must(t, q.publishSegment())
	_, by2, _ := q.Head()
	check := func(last map[session.KeyID]uint64) {
		t.Helper()
		all := s.refs(q)
		got := map[session.KeyID]uint64{}
		for _, x := range all[len(all)-1].Signers {
			got[x.Key] = x.Last
		}
		if !maps.Equal(got, last) {
			t.Fatalf("signers %v, want %v", got, last)
		}
	}
	id2 := session.KeyIDOf(writerKey(second).Public)
	check(map[session.KeyID]uint64{first: by1, id2: by2})

	old := writerKey(s.key)
	old.Withdrawn, old.LastEpoch, old.LastNumber = true, 1, 5
	must(t, q.PublishKeySet(context.Background(), s.keySet(t, 1, old, writerKey(second))))
	eventually(t, "what is left is published", func() bool { return len(s.refs(q)) == 1 })
	_, number, _ := q.Head()
	if number >= by2 || q.State().Len() < 6 {
		t.Fatalf("%d entries at batch %d, was at %d", q.State().Len(), number, by2)
	}
	check(map[session.KeyID]uint64{first: 5, id2: s.refs(q)[0].Number})
	if s.first(natsfeed.LogStream) != 1 {
		t.Error("the log was trimmed by segments that nobody may start from any more")
	}
}

// TestPublishedAgainWithoutSigners: behind a segment that does not say who signed
// what is in it, nothing published later can. What was sealed before a withdrawal
// is then refused by its time alone, so that the same state is published again,
// once.
func TestPublishedAgainWithoutSigners(t *testing.T) {
	s := newStore(t)
	second := newKey(t)
	s.set = s.keySet(t, 1, writerKey(s.key), writerKey(second))
	k := s.keys(t, s.key, s.set)
	var late atomic.Int64
	late.Store(int64(2 * time.Hour)) // before a key set is issued
	q := s.open(byHand, func(o *Options) {
		o.Keys = k
		o.Hooks.Now = func() time.Time { return time.Now().Add(-time.Duration(late.Load())) }
	})
	must(t, decideDurable(q, 1))
	q.post(func() { q.w.signers = nil })
	publish(t, q, 2)
	before := s.refs(q)[0]
	old := writerKey(second)
	old.Withdrawn, old.LastEpoch = true, 1
	late.Store(0)
	must(t, q.PublishKeySet(context.Background(), s.keySet(t, 1, writerKey(s.key), old)))
	eventually(t, "it is published again", func() bool { return len(s.refs(q)) == 2 })
	again := s.refs(q)[1]
	ks := q.trust.KeySet()
	if len(before.Signers)+len(again.Signers) > 0 || !before.Cut(ks) || again.Cut(ks) || again.Number != before.Number || again.State != before.State {
		t.Fatalf("%+v, then %+v", before, again)
	}
}

// TestSegmentDue: a state that has changed is published at its time, or when the
// log has become long; one that only canaries have changed, only then.
func TestSegmentDue(t *testing.T) {
	s := &Sequencer{o: Options{SegmentEvery: time.Minute, SegmentBatches: 100}}
	last := &session.SegmentRef{Epoch: 2, Number: 10}
	for _, c := range []struct {
		name  string
		v     view
		since time.Duration
		want  bool
	}{
		{"nothing new", view{epoch: 2, number: 10, news: 10}, time.Hour, false},
		{"new, at its time", view{epoch: 2, number: 11, news: 11}, time.Minute, true},
		{"new, before its time", view{epoch: 2, number: 11, news: 11}, time.Minute - 1, false},
		{"many", view{epoch: 2, number: 110, news: 110}, 0, true},
		{"canaries since", view{epoch: 2, number: 50, news: 10}, time.Hour, false},
		{"many canaries", view{epoch: 2, number: 110, news: 10}, 0, true},
		{"another epoch", view{epoch: 3, number: 1}, 0, true},
	} {
		if got := s.segmentDue(&c.v, last, c.since); got != c.want {
			t.Errorf("%s: %t", c.name, got)
		}
	}
	c := &chain{}
	canary := &session.Batch{Number: 7, Entries: []session.Entry{{Op: session.OpSet, Effect: session.EffectRevoked, Reason: session.ReasonCanary}}}
	for _, x := range []struct {
		batch *session.Batch
		want  uint64
	}{
		{canary, 0},
		{&session.Batch{Number: 8, Entries: append(canary.Entries, session.Entry{Reason: session.ReasonKill})}, 8},
		{&session.Batch{Number: 9, Entries: []session.Entry{{Op: session.OpLift, Reason: session.ReasonCanary}}}, 9},
		{&session.Batch{Number: 10, Horizon: 1}, 10},
	} {
		if c.noteNews(x.batch); c.news != x.want {
			t.Errorf("after %d: news %d, want %d", x.batch.Number, c.news, x.want)
		}
	}
}
