package natsfeed

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/interlock-fabric/interlock/pkg/session"
)

const (
	// SegmentStream holds the published segments: each in chunks on a subject of
	// its own, and behind them its signed description, on SegmentSubject.
	// Enforcers read it by batched direct gets, like the log.
	SegmentStream = "INTERLOCK_SEGMENTS"
	// SegmentSubject is where the descriptions are.
	SegmentSubject = "interlock.v1.segment"
	// SegmentChunks are the subjects of the chunks.
	SegmentChunks = "interlock.v1.segment.*"

	// SegmentChunkLen bounds a chunk.
	SegmentChunkLen = 256 << 10

	maxSegments = 16
)

// SegmentChunkSubject is where the chunks of the segment with that SHA-256 are.
func SegmentChunkSubject(sum [32]byte) string { return fmt.Sprintf("%s.%x", SegmentSubject, sum) }

// errTooLong: a segment has more bytes than its description says.
var errTooLong = errors.New("natsfeed: segment longer than described")

// Segments returns the newest 16 descriptions of published segments, oldest
// first, unverified. Errors are as Log's.
func (f *Feed) Segments(ctx context.Context) ([][]byte, error) {
	return f.newest(ctx, SegmentStream, SegmentSubject, maxSegments)
}

// Segment writes the bytes of a described segment, unverified, but no more of
// them than the description says. It goes on over lost answers as Log does.
// Errors are w's, io.ErrUnexpectedEOF for a segment that is not whole, as when
// newer ones have taken its place, and as Log's.
func (f *Feed) Segment(ctx context.Context, ref session.SegmentRef, w io.Writer) error {
	left := ref.Size
	_, err := f.read(ctx, SegmentStream, SegmentChunkSubject(ref.Sum), 0, func(_ uint64, chunk []byte) error {
		if uint64(len(chunk)) > left {
			return errTooLong
		}
		left -= uint64(len(chunk))
		_, err := w.Write(chunk)
		return err
	})
	if err == nil && left > 0 {
		err = io.ErrUnexpectedEOF
	}
	return err
}
