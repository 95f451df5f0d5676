package session

import (
	"encoding/binary"
	"fmt"
)

// SegmentRef is the signed description of a published segment: which state it
// holds and how its bytes are known. The bytes are found under its Sum.
type SegmentRef struct {
	Epoch  uint64
	Number uint64
	// Head is the hash of that batch, or the epoch's origin.
	Head Hash
	// State is the digest of the state at Number.
	State StateDigest
	Time  Instant
	// Entries are in the state.
	Entries uint64
	// Size is the length of the segment in bytes, Sum its SHA-256.
	Size uint64
	Sum  [32]byte
	// ResumeSize and ResumeSum are the same of what a writer needs beside the
	// state to go on from here; both are zero where there is none. Enforcers
	// need nothing of it.
	ResumeSize uint64
	ResumeSum  [32]byte
	// Unknown holds fields of a later version.
	Unknown []Field
}

// MaxSegmentSize bounds a segment in bytes, MaxResumeSize what a writer needs
// beside it.
const (
	MaxSegmentSize = 8 << 30
	MaxResumeSize  = 64 << 20
)

const tagResume = 0x01

// MarshalBody returns the body of the description's frame.
func (s *SegmentRef) MarshalBody() []byte {
	var w writer
	w.u64(s.Epoch)
	w.u64(s.Number)
	w.raw(s.Head[:])
	w.raw(s.State[:])
	w.instant(s.Time)
	w.u64(s.Entries)
	w.u64(s.Size)
	w.raw(s.Sum[:])
	var known []Field
	if s.ResumeSize > 0 {
		known = []Field{{Tag: tagResume, Value: append(binary.BigEndian.AppendUint64(nil, s.ResumeSize), s.ResumeSum[:]...)}}
	}
	w.fields(known, s.Unknown)
	return w.b
}

// UnmarshalSegmentRef parses a body. Errors wrap ErrMalformed or ErrCritical.
func UnmarshalSegmentRef(body []byte) (SegmentRef, error) {
	r := reader{b: body}
	s := SegmentRef{Epoch: r.u64(), Number: r.u64()}
	copy(s.Head[:], r.take(len(s.Head)))
	copy(s.State[:], r.take(len(s.State)))
	s.Time, s.Entries, s.Size = r.instant(), r.u64(), r.u64()
	copy(s.Sum[:], r.take(len(s.Sum)))
	s.Unknown = r.fields(func(tag uint8, v *reader) bool {
		if tag != tagResume {
			return false
		}
		s.ResumeSize = v.u64()
		copy(s.ResumeSum[:], v.take(len(s.ResumeSum)))
		if s.ResumeSize == 0 || s.ResumeSize > MaxResumeSize {
			v.fail("resume of %d bytes", s.ResumeSize)
		}
		return true
	})
	if err := r.end(); err != nil {
		return SegmentRef{}, err
	}
	if s.Epoch == 0 || s.Size == 0 || s.Size > MaxSegmentSize {
		return SegmentRef{}, fmt.Errorf("%w: segment of %d bytes in epoch %d", ErrMalformed, s.Size, s.Epoch)
	}
	return s, nil
}
