package session

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"slices"
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
	// Signers are the keys that signed the epoch's batches up to Number, with the
	// newest batch of each, ascending by key: at most MaxKeys, each Last from 1 to
	// Number, and the largest of them Number. Empty is that they are not known.
	Signers []Signer
	// Unknown holds fields of a later version.
	Unknown []Field
}

// Signer is a key with the newest batch of an epoch that it has signed.
type Signer struct {
	Key  KeyID
	Last uint64
}

// Cut reports whether a key set of the segment's epoch takes batches out of the
// log that are in the segment. Without Signers, those of every withdrawn key may
// be in one that was sealed before the key set was issued. Of another epoch's key
// set it is false.
func (s *SegmentRef) Cut(ks *KeySet) bool {
	switch {
	case s.Epoch != ks.Epoch:
		return false
	case len(s.Signers) > 0:
		return slices.ContainsFunc(s.Signers, func(x Signer) bool { return ks.Revoked(x.Key, x.Last) })
	}
	return s.Time <= ks.Issued && slices.ContainsFunc(ks.Keys, func(k SigningKey) bool { return k.Withdrawn && !k.signs(ks.Epoch, s.Number) })
}

// MaxSegmentSize bounds a segment in bytes, MaxResumeSize what a writer needs
// beside it.
const (
	MaxSegmentSize = 8 << 30
	MaxResumeSize  = 64 << 20
)

const (
	tagResume  = 0x01
	tagSigners = 0x02
)

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
		known = append(known, Field{Tag: tagResume, Value: append(binary.BigEndian.AppendUint64(nil, s.ResumeSize), s.ResumeSum[:]...)})
	}
	if len(s.Signers) > 0 {
		var v writer
		for i := range s.Signers {
			v.raw(s.Signers[i].Key[:])
			v.u64(s.Signers[i].Last)
		}
		known = append(known, Field{Tag: tagSigners, Value: v.b})
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
		switch tag {
		case tagResume:
			s.ResumeSize = v.u64()
			copy(s.ResumeSum[:], v.take(len(s.ResumeSum)))
			if s.ResumeSize == 0 || s.ResumeSize > MaxResumeSize {
				v.fail("resume of %d bytes", s.ResumeSize)
			}
		case tagSigners:
			s.Signers = v.signers(s.Number)
		default:
			return false
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

// signers reads the signers of what leads up to a batch.
func (r *reader) signers(number uint64) (out []Signer) {
	newest := uint64(0)
	for r.err == nil && (len(r.b) > 0 || newest == 0) {
		var s Signer
		copy(s.Key[:], r.take(len(s.Key)))
		s.Last = r.u64()
		if n := len(out); n == MaxKeys || s.Last == 0 || s.Last > number || n > 0 && bytes.Compare(out[n-1].Key[:], s.Key[:]) >= 0 {
			r.fail("signers")
		}
		out, newest = append(out, s), max(newest, s.Last)
	}
	if newest != number {
		r.fail("signers up to batch %d", newest)
	}
	return out
}
