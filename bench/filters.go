package main

import (
	"encoding/binary"
	"math/bits"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/FastFilter/xorfilter"
	"github.com/bits-and-blooms/bloom/v3"

	"github.com/interlock-fabric/interlock/pkg/session"
)

// contender is a filter under comparison: sealed, asked about eight keys at
// once, as a check does.
type contender interface {
	any8(keys *[8]session.Key) bool
	bytes() int
}

// asIs is bloom/v3 as its README shows it.
type asIs struct{ f *bloom.BloomFilter }

func (a asIs) any8(keys *[8]session.Key) (some bool) {
	for i := range keys {
		some = a.f.Test(keys[i].Digest[:]) || some
	}
	return some
}
func (a asIs) bytes() int { return int(a.f.Cap() / 8) }

// sieve is bloom/v3's bits with the locations taken from the digest, and the
// first two probes of all keys before any other: what pkg/filter does.
type sieve struct {
	words []uint64
	m     uint64
}

func halves(k *session.Key) (a, b uint64) {
	return binary.LittleEndian.Uint64(k.Digest[:8]), binary.LittleEndian.Uint64(k.Digest[8:])
}

func reduce(h, m uint64) uint64 { hi, _ := bits.Mul64(h, m); return hi }

func (s sieve) add(k *session.Key) {
	a, b := halves(k)
	for range 8 {
		x := reduce(a, s.m)
		s.words[x>>6] |= 1 << (x & 63)
		a += b
	}
}

func (s sieve) any8(keys *[8]session.Key) bool {
	maybe := uint64(0)
	for i := range keys {
		a, b := halves(&keys[i])
		x, y := reduce(a, s.m), reduce(a+b, s.m)
		maybe |= (s.words[x>>6] >> (x & 63) & (s.words[y>>6] >> (y & 63)) & 1) << i
	}
	for ; maybe != 0; maybe &= maybe - 1 {
		a, b := halves(&keys[bits.TrailingZeros64(maybe)])
		hit := uint64(1)
		for range 8 {
			x := reduce(a, s.m)
			hit &= s.words[x>>6] >> (x & 63)
			a += b
		}
		if hit&1 == 1 {
			return true
		}
	}
	return false
}
func (s sieve) bytes() int { return 8 * len(s.words) }

// split is a split-block bloom filter: eight words of one cache line a key, one
// bit in each. In Go its eight multiplications a key are not done at once as with
// SIMD, so it is sifted, too: two words of all keys come before any other.
type split struct{ blocks [][8]uint32 }

var salts = [8]uint32{0x47b6137b, 0x44974d91, 0x8824ad5b, 0xa2b7289d, 0x705495c7, 0x2df1424b, 0x9efc4947, 0x5c6bfb31}

func (s split) add(k *session.Key) {
	a, b := halves(k)
	block := &s.blocks[reduce(a, uint64(len(s.blocks)))]
	for i := range block {
		block[i] |= 1 << (uint32(b) * salts[i] >> 27)
	}
}

func (s split) any8(keys *[8]session.Key) bool {
	maybe := uint32(0)
	for i := range keys {
		a, b := halves(&keys[i])
		block := &s.blocks[reduce(a, uint64(len(s.blocks)))]
		maybe |= (block[0] >> (uint32(b) * salts[0] >> 27) & (block[1] >> (uint32(b) * salts[1] >> 27)) & 1) << i
	}
	for ; maybe != 0; maybe &= maybe - 1 {
		a, b := halves(&keys[bits.TrailingZeros32(maybe)])
		block := &s.blocks[reduce(a, uint64(len(s.blocks)))]
		hit := uint32(1)
		for j := range block {
			hit &= block[j] >> (uint32(b) * salts[j] >> 27)
		}
		if hit == 1 {
			return true
		}
	}
	return false
}
func (s split) bytes() int { return 32 * len(s.blocks) }

// fuse is BinaryFuse16.
type fuse struct {
	f *xorfilter.BinaryFuse[uint16]
}

func (f fuse) any8(keys *[8]session.Key) (some bool) {
	for i := range keys {
		a, _ := halves(&keys[i])
		some = f.f.Contains(a) || some
	}
	return some
}
func (f fuse) bytes() int { return 2 * len(f.f.Fingerprints) }

// rounds is how often the contenders take turns.
const rounds = 7

// filters compares the filters, each on n keys and on the same questions, turn and
// turn about, so that what else the machine does hits all of them alike. A check of
// the state is hardly more than its probes (see "check"), so that p50 to that of
// the filter in use is the least that a whole check would take with another.
func filters(rep *report, n int) {
	keys := make([]session.Key, n)
	rnd := rand.New(rand.NewPCG(11, 11))
	for i := range keys {
		keys[i] = randomKey(rnd, kinds)
	}
	const questions = 1 << 14
	hits := 0 // that the questions are not compiled away
	ask := make([][8]session.Key, questions)
	for i := range ask {
		for j := range ask[i] {
			ask[i][j] = randomKey(rnd, kinds)
		}
	}
	type entrant struct {
		name      string
		build     func() (contender, error)
		f         contender
		mean, p50 []float64
	}
	entrants := []entrant{
		{name: "bloom/v3 as is, 24 bits", build: func() (contender, error) {
			f := bloom.New(uint(24*n), 8)
			for i := range keys {
				f.Add(keys[i].Digest[:])
			}
			return asIs{f}, nil
		}},
		{name: "bloom/v3's bits, sifted (in use)", build: func() (contender, error) {
			s := sieve{make([]uint64, 24*n/64+1), 0}
			s.m = uint64(64 * len(s.words))
			for i := range keys {
				s.add(&keys[i])
			}
			return s, nil
		}},
		{name: "split-block bloom, 24 bits", build: func() (contender, error) {
			s := split{make([][8]uint32, 24*n/256+1)}
			for i := range keys {
				s.add(&keys[i])
			}
			return s, nil
		}},
		{name: "BinaryFuse16", build: func() (contender, error) {
			hashes := make([]uint64, n)
			for i := range keys {
				hashes[i], _ = halves(&keys[i])
			}
			f, err := xorfilter.NewBinaryFuse[uint16](hashes)
			return fuse{f}, err
		}},
	}
	for i := range entrants {
		c := &entrants[i]
		t := time.Now()
		f, err := c.build()
		if err != nil {
			continue
		}
		c.f = f
		rep.add("filter: "+c.name+", build", n, time.Since(t).Seconds(), "s", "")
		rep.add("filter: "+c.name+", memory", n, float64(f.bytes())/float64(n), "B/entry", "")
		wrong := 0
		for i := range ask {
			if f.any8(&ask[i]) {
				wrong++
			}
		}
		rep.add("filter: "+c.name+", wrong per question of 8", n, float64(wrong)/questions*1e6, "ppm", "")
	}
	for range rounds {
		for i := range entrants {
			c := &entrants[i]
			if c.f == nil {
				continue
			}
			question := func(i int) {
				if c.f.any8(&ask[i&(questions-1)]) {
					hits++
				}
			}
			c.p50 = append(c.p50, sample(2*questions, nil, question).at(.5))
			c.mean = append(c.mean, perOp(questions, question))
		}
	}
	inUse := 0.0
	for i := range entrants {
		if _, ok := entrants[i].f.(sieve); ok {
			inUse = median(entrants[i].p50)
		}
	}
	for i := range entrants {
		c := &entrants[i]
		if c.f == nil {
			continue
		}
		rep.add("filter: "+c.name+", 8 misses, one question after the other, mean", n, median(c.mean), "ns", "")
		rep.add("filter: "+c.name+", 8 misses, each timed, p50", n, median(c.p50), "ns", "")
		rep.add("filter: "+c.name+", p50 to the filter in use", n, median(c.p50)/inUse, "×", "")
	}
}

// median of an odd number.
func median(x []float64) float64 {
	slices.Sort(x)
	return x[len(x)/2]
}
