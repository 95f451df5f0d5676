package filter

import (
	"encoding/binary"
	"hash/crc32"
	"math/bits"

	"github.com/bits-and-blooms/bloom/v3"

	"github.com/interlock-fabric/interlock/pkg/session"
)

// Parameters of the filter. With 24 bits a key and 8 probes, a filter of n keys
// is wrong about a key that it does not hold once in 24,000 times, which costs a
// block read and never a denial; and it is so sparse that two probes settle
// twelve misses out of thirteen.
const (
	bitsPerKey = 24
	probes     = 8
)

// sealedBloom is a bloom filter that nobody adds to any more, hence safe to
// share. The keys' digests are outputs of a keyed hash already, so a key's
// locations come from its own bits (Kirsch and Mitzenmacher 2006) instead of
// from hashing it again: a check computes them in a few cycles, and nobody
// without a tenant's secret can aim at them.
type sealedBloom struct {
	f     *bloom.BloomFilter
	words []uint64 // f's own
	m     uint64
	sums  []uint32 // CRC-32C of each sumChunk words
}

// sumChunk is how many words one checksum covers: 32 KiB.
const sumChunk = 4096

// hashOf spreads a key over 128 bits. Keys of different tenants or shapes differ
// in their digests anyhow; mixing them in keeps that from being a condition.
func hashOf(k *session.Key) (a, b uint64) {
	mix := (uint64(k.Tenant)<<8 | uint64(k.Shape)) * 0x9e3779b97f4a7c15
	return binary.LittleEndian.Uint64(k.Digest[:8]) ^ mix, binary.LittleEndian.Uint64(k.Digest[8:])
}

// at maps a hash to 0…m-1 without a division (Lemire 2016).
func at(h, m uint64) uint64 {
	hi, _ := bits.Mul64(h, m)
	return hi
}

// locations are the key's locations, as bloom.TestLocations takes them.
func (s *sealedBloom) locations(k *session.Key) (locs [probes]uint64) {
	a, b := hashOf(k)
	for i := range locs {
		locs[i] = at(a, s.m)
		a += b
	}
	return locs
}

// has reports whether the key may have been added.
func (s *sealedBloom) has(k *session.Key) bool {
	locs := s.locations(k)
	return s.f.TestLocations(locs[:])
}

// sift returns those of the keys in mask that may have been added. The first two
// probes of every key go out before any of them is looked at, so that their
// cache misses overlap; this is what makes a check of eight keys cost less than
// eight lookups.
func (s *sealedBloom) sift(keys []session.Key, mask uint64) (maybe uint64) {
	words, m := s.words, s.m
	for rest := mask; rest != 0; rest &= rest - 1 {
		i := bits.TrailingZeros64(rest)
		a, b := hashOf(&keys[i])
		x, y := at(a, m), at(a+b, m)
		maybe |= (words[x>>6] >> (x & 63) & (words[y>>6] >> (y & 63)) & 1) << i
	}
	for rest := maybe; rest != 0; rest &= rest - 1 {
		if i := bits.TrailingZeros64(rest); !s.has(&keys[i]) {
			maybe &^= 1 << i
		}
	}
	return maybe
}

// siftEntries is sift for up to 64 entries of a batch.
func (s *sealedBloom) siftEntries(entries []session.Entry) (maybe uint64) {
	words, m := s.words, s.m
	for i := range entries {
		a, b := hashOf(&entries[i].Key)
		x, y := at(a, m), at(a+b, m)
		maybe |= (words[x>>6] >> (x & 63) & (words[y>>6] >> (y & 63)) & 1) << i
	}
	for rest := maybe; rest != 0; rest &= rest - 1 {
		if i := bits.TrailingZeros64(rest); !s.has(&entries[i].Key) {
			maybe &^= 1 << i
		}
	}
	return maybe
}

// openBloom is for the builder: a filter for n keys.
func openBloom(n int) *sealedBloom {
	words := bloomWords(n)
	return sealBloom(make([]uint64, words))
}

// bloomWords is the length of the filter of n keys: never 0, so that the empty
// filter needs no case of its own.
func bloomWords(n int) int { return max(1, (n*bitsPerKey+63)/64) }

func sealBloom(words []uint64) *sealedBloom {
	m := uint64(len(words)) * 64
	return &sealedBloom{f: bloom.FromWithM(words, uint(m), probes), words: words, m: m}
}

// add is for the builder, before anybody else has the filter.
func (s *sealedBloom) add(k *session.Key) {
	a, b := hashOf(k)
	for range probes {
		x := at(a, s.m)
		s.words[x>>6] |= 1 << (x & 63)
		a += b
	}
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// sum returns the checksum of one chunk.
func (s *sealedBloom) sum(chunk int) uint32 {
	words := s.words[chunk*sumChunk : min(len(s.words), (chunk+1)*sumChunk)]
	var buf [4096]byte
	crc := uint32(0)
	for len(words) > 0 {
		n := min(len(words), len(buf)/8)
		for i, w := range words[:n] {
			binary.LittleEndian.PutUint64(buf[8*i:], w)
		}
		crc = crc32.Update(crc, castagnoli, buf[:8*n])
		words = words[n:]
	}
	return crc
}

func (s *sealedBloom) chunks() int { return (len(s.words) + sumChunk - 1) / sumChunk }

// seal remembers the checksums by which a scrub will find rot.
func (s *sealedBloom) seal() {
	s.sums = make([]uint32, s.chunks())
	for i := range s.sums {
		s.sums[i] = s.sum(i)
	}
}
