package filter

import (
	"errors"

	"github.com/interlock-fabric/interlock/pkg/session"
)

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

// CheckDelta counts anew what stands above the segment, and reports whether that
// and the segment's digest make the set's. False means that something in memory
// has rotted where no Scrub looks. It costs some microseconds for each change
// since the segment was sealed, and what it takes to read those blocks of it of
// which the horizon has ended something.
func (s *Set) CheckDelta() (bool, error) {
	if s == nil || s.Err() != nil {
		return true, s.Err()
	}
	var d session.StateDigest
	for k, records := range s.residents() {
		for i := range records {
			d.Plus(records[i].Sum(k))
		}
	}
	g := s.seg
	if g != nil {
		all := g.digest
		for k, records := range g.residents {
			for i := range records {
				all.Minus(records[i].Sum(k))
			}
		}
		d.Plus(all)
		var bad error
		err := g.scan(func(i int) bool { return g.soonest[i] <= s.horizon }, func(_ int, b []byte) bool {
			for i := range blockRows(b) {
				var e entry
				if bad = g.read(b, i, &e); bad != nil {
					return false
				}
				if e.expires != 0 && e.expires <= s.horizon && s.layers.find(&e.key) == nil {
					r := e.record()
					d.Minus(r.Sum(e.key))
				}
			}
			return true
		})
		if err = errors.Join(err, bad); err != nil {
			return true, g.damage(err)
		}
	}
	var err error
	s.layers.each(func(n *node) bool {
		if n.key.Shape <= session.Shape(session.KindTenant) {
			return true // counts, and residents
		}
		n.each(s.horizon, func(p packed) {
			r := p.record()
			d.Plus(r.Sum(n.key))
		})
		if g != nil && g.filter.has(&n.key) {
			var under []packed
			if under, err = g.records(&n.key, 0, nil); err != nil {
				return false
			}
			for _, p := range under {
				r := p.record()
				d.Minus(r.Sum(n.key))
			}
		}
		return true
	})
	return d == s.digest, err
}
