package natsfeed_test

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"io"
	"math/rand/v2"
	"testing"

	"github.com/interlock-fabric/interlock/pkg/natsfeed"
	"github.com/interlock-fabric/interlock/pkg/session"
	"github.com/nats-io/nats.go/jetstream"
)

// TestSegmentsOverTheBus reads segments with an enforcer's rights alone.
func TestSegmentsOverTheBus(t *testing.T) {
	b := newBus(t)
	f := b.feed(t)
	ctx := testContext(t)
	if got, err := f.Segments(ctx); err != nil || len(got) != 0 {
		t.Fatal(got, err)
	}
	rnd := rand.New(rand.NewPCG(1, 1))
	whole := make([]byte, 5*natsfeed.SegmentChunkLen/2)
	for i := range whole {
		whole[i] = byte(rnd.Uint32())
	}
	publish := func(subject string, data []byte) {
		_, err := b.js.Publish(ctx, subject, data)
		must(t, err)
	}
	refs := make([]session.SegmentRef, 2)
	for i := range refs {
		part := whole[i:]
		refs[i] = session.SegmentRef{Epoch: 1, Size: uint64(len(part)), Sum: sha256.Sum256(part)}
	}
	// Chunks of two segments, each among the other's.
	for at := 0; at < len(whole); at += natsfeed.SegmentChunkLen {
		for i, ref := range refs {
			part := whole[i:]
			publish(natsfeed.SegmentChunkSubject(ref.Sum), part[at:min(at+natsfeed.SegmentChunkLen, len(part))])
		}
		publish(natsfeed.SegmentSubject, []byte{byte(at / natsfeed.SegmentChunkLen)})
	}
	if got, err := f.Segments(ctx); err != nil || len(got) != 3 || got[0][0] != 0 || got[2][0] != 2 {
		t.Fatal(got, err)
	}
	for i, ref := range refs {
		var buf bytes.Buffer
		if err := f.Segment(ctx, ref, &buf); err != nil || !bytes.Equal(buf.Bytes(), whole[i:]) {
			t.Fatalf("segment %d: %d bytes, %v", i, buf.Len(), err)
		}
	}
	short := refs[0]
	short.Size--
	if err := f.Segment(ctx, short, io.Discard); err == nil {
		t.Error("took more bytes than described")
	}
	for i := range 20 {
		publish(natsfeed.SegmentSubject, []byte{byte(100 + i)})
	}
	if got, err := f.Segments(ctx); err != nil || len(got) != 16 || got[0][0] != 104 || got[15][0] != 119 {
		t.Errorf("not the newest: %v, %v", got, err)
	}
	stream, err := b.js.Stream(ctx, natsfeed.SegmentStream)
	must(t, err)
	must(t, stream.Purge(ctx, jetstream.WithPurgeSubject(natsfeed.SegmentChunkSubject(refs[0].Sum))))
	if err := f.Segment(ctx, refs[0], io.Discard); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("a segment that is gone: %v", err)
	}
}
