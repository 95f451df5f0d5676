package filter

import "github.com/interlock-fabric/interlock/pkg/session"

// ranges is how many parts RangeSums divides the keys into, by the first byte of
// their digests.
const ranges = 256

// RangeSums are state digests of parts of the state: range i has the records
// whose key's digest begins with byte i. The digest of the whole is their sum.
// Two parties that differ find out where by comparing 8 KiB.
type RangeSums []session.StateDigest

// Total returns the digest of the whole state.
func (r RangeSums) Total() (d session.StateDigest) {
	for i := range r {
		d.Plus(r[i])
	}
	return d
}

// Differ returns the first range in which the two differ, or -1. A missing range
// counts as an empty one.
func (r RangeSums) Differ(o RangeSums) int {
	for i := range ranges {
		var a, b session.StateDigest
		if i < len(r) {
			a = r[i]
		}
		if i < len(o) {
			b = o[i]
		}
		if a != b {
			return i
		}
	}
	return -1
}

// Recount computes the digests and the number of the records anew, from the
// records themselves, at about 5 million a second. A total that differs from
// Digest, or a number that differs from Len, means that something has rotted.
func (s *Set) Recount() (sums RangeSums, n int, err error) {
	sums = make(RangeSums, ranges)
	s.Range(func(k session.Key, r *session.Record) bool {
		sums[k.Digest[0]].Plus(r.Sum(k))
		n++
		return true
	})
	return sums, n, s.Err()
}
