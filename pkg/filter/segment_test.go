package filter

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"github.com/interlock-fabric/interlock/pkg/session"
)

// populate returns a state of n entries of the kinds that people have and others.
func populate(tb testing.TB, w *people, n int) *Set {
	rnd := rand.New(rand.NewPCG(5, 6))
	var s *Set
	for number := uint64(1); s.Len() < n/2; number++ {
		s = s.Apply(w.batch(rnd.IntN, number, 0), nil)
	}
	fill(n/2, 3, func(b *session.Batch) { s = s.Apply(b, nil) })
	return s
}

func segmentBytes(tb testing.TB, n int) []byte {
	g, err := populate(tb, newPeople(tb), n).Seal("", Mark{Epoch: 2, Number: 7, Head: session.Hash{1}, Time: 9, Note: "a note"})
	if err != nil {
		tb.Fatal(err)
	}
	var buf bytes.Buffer
	if _, err := g.WriteTo(&buf); err != nil {
		tb.Fatal(err)
	}
	return buf.Bytes()
}

func read(b []byte) (*Segment, error) { return ReadSegment(bytes.NewReader(b), int64(len(b))) }

func TestOpenRefusesWhatIsNotWhole(t *testing.T) {
	whole := segmentBytes(t, 2000)
	if g, err := read(whole); err != nil || g.Mark() != (Mark{Epoch: 2, Number: 7, Head: session.Hash{1}, Time: 9, Note: "a note"}) {
		t.Fatal(err)
	}
	for _, n := range []int{0, 1, 8, blockSize - 1, blockSize, blockSize + 1, len(whole) / 2, len(whole) - 1} {
		if _, err := read(whole[:n]); !errors.Is(err, ErrTorn) {
			t.Errorf("the first %d of %d bytes: %v", n, len(whole), err)
		}
	}
	if _, err := read(append(bytes.Clone(whole), 0)); !errors.Is(err, ErrTorn) {
		t.Errorf("a byte too many: %v", err)
	}
	// A crash while it was written: everything but the header.
	torn := append(make([]byte, blockSize), whole[blockSize:]...)
	if _, err := read(torn); !errors.Is(err, ErrTorn) {
		t.Errorf("without a header: %v", err)
	}
	newer := bytes.Clone(whole)
	binary.BigEndian.PutUint32(newer[8:], SegmentVersion+1)
	if _, err := read(newer); !errors.Is(err, ErrNewer) {
		t.Errorf("a newer version: %v", err)
	}
	path := filepath.Join(t.TempDir(), "segment")
	if err := os.WriteFile(path, whole[:len(whole)-1], 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenSegment(path); !errors.Is(err, ErrTorn) {
		t.Errorf("a file that is cut short: %v", err)
	}
}

// TestOpenRefusesEveryFlippedBit flips one bit in each part of a segment.
func TestOpenRefusesEveryFlippedBit(t *testing.T) {
	whole := segmentBytes(t, 600)
	rnd := rand.New(rand.NewPCG(1, 1))
	for at := 0; at < len(whole); at += 1 + rnd.IntN(9) {
		bit := byte(1) << rnd.IntN(8)
		whole[at] ^= bit
		if _, err := read(whole); !errors.Is(err, ErrSegment) {
			t.Fatalf("bit %#x of byte %d of %d: %v", bit, at, len(whole), err)
		}
		whole[at] ^= bit
	}
}

func TestSealLeavesTheOldFileUntilTheNewOneIsWhole(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "segment")
	w := newPeople(t)
	a, b := populate(t, w, 100), populate(t, w, 300)
	if _, err := a.Seal(path, Mark{Number: 1}); err != nil {
		t.Fatal(err)
	}
	a.bad = errors.New("nothing can be read") // so sealing fails
	if _, err := a.Seal(path, Mark{Number: 2}); err == nil {
		t.Fatal("sealed what cannot be read")
	}
	g, err := OpenSegment(path)
	if err != nil || g.Mark().Number != 1 {
		t.Fatal("the file of before is gone", err)
	}
	if _, err := b.Seal(path, Mark{Number: 3}); err != nil {
		t.Fatal(err)
	}
	if g.Verify() != nil {
		t.Error("a segment in use was changed by its successor")
	}
	files, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil || len(files) != 1 {
		t.Errorf("left behind: %v", files)
	}
	if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", fi.Mode(), err)
	}
}

// revoked is a caller whose session is revoked, in a segment in a file.
func revoked(t *testing.T, path string) (*Set, *session.Prepared, session.Key) {
	w := newPeople(t)
	p := w.callers[4]
	k := p.Keys()[1]
	s := populate(t, w, 4000).Apply(&session.Batch{Number: 1 << 20, Entries: []session.Entry{
		{Op: session.OpSet, Effect: session.EffectRevoked, Reason: session.ReasonStolenToken, Incident: "INC-7", Key: k},
	}}, nil)
	// Nothing else may deny the caller.
	clean := &Set{}
	s.Range(func(have session.Key, r *session.Record) bool {
		if have == k || have.Shape == session.Shape(session.KindToken) && have.Tenant == 1 {
			clean = Merge(clean, (*Set)(nil).Apply(&session.Batch{Number: r.Seq, Entries: []session.Entry{{Op: session.OpSet, Effect: session.EffectRevoked, Reason: r.Reason, Incident: r.Incident, Key: have}}}, nil))
		}
		return clean.Len() < 600
	})
	clean = Merge((*Set)(nil).Apply(&session.Batch{Number: 9, Entries: []session.Entry{{Op: session.OpSet, Effect: session.EffectRevoked, Reason: session.ReasonStolenToken, Incident: "INC-7", Key: k}}}, nil), clean)
	g, err := clean.Seal(path, Mark{})
	if err != nil {
		t.Fatal(err)
	}
	return g.Set(), p, k
}

func isDenied(s *Set, p *session.Prepared) bool {
	m, err := s.Decide(p, &session.Call{}, session.Moment{})
	return err != nil || m.Record != nil
}

// TestDamageIsNeverNotFound damages the file under a running reader: what can
// not be confirmed is denied, and said.
func TestDamageIsNeverNotFound(t *testing.T) {
	t.Parallel()
	for name, damage := range map[string]func(f *os.File, g *Segment, k session.Key) error{
		"truncated": func(f *os.File, _ *Segment, _ session.Key) error { return f.Truncate(blockSize) },
		"empty":     func(f *os.File, _ *Segment, _ session.Key) error { return f.Truncate(0) },
		"a bit of the row": func(f *os.File, g *Segment, k session.Key) error {
			return flip(f, g, func(b []byte) int { return bytes.Index(b, k.Digest[:]) })
		},
		"a bit of the decision": func(f *os.File, g *Segment, _ session.Key) error {
			return flip(f, g, func(b []byte) int { return bytes.Index(b, []byte("INC-7")) })
		},
		"blocks in each other's place": func(f *os.File, g *Segment, _ session.Key) error {
			all := make([]byte, g.body.blocks*blockSize)
			if _, err := f.ReadAt(all, blockSize); err != nil {
				return err
			}
			_, err := f.WriteAt(append(all[blockSize:], all[:blockSize]...), blockSize)
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "segment")
			s, p, k := revoked(t, path)
			if s.seg.body.blocks < 2 {
				t.Fatal("one block has no other")
			}
			m, err := s.Decide(p, &session.Call{}, session.Moment{})
			if err != nil || m.Record == nil || m.Record.Incident != "INC-7" {
				t.Fatalf("before: %+v, %v", m, err)
			}
			f, err := os.OpenFile(path, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if err := damage(f, s.seg, k); err != nil {
				t.Fatal(err)
			}
			if m, err := s.Decide(p, &session.Call{}, session.Moment{}); !errors.Is(err, session.ErrDenied) {
				t.Fatalf("the verdict on damaged state: %+v, %v", m, err)
			}
			if !errors.Is(s.Err(), ErrDamaged) {
				t.Errorf("Err: %v", s.Err())
			}
			if got, err := s.Find(k); !errors.Is(err, ErrDamaged) || got != nil {
				t.Errorf("Find: %v, %v", got, err)
			}
			// Nothing is derived from it either.
			next := s.Apply(&session.Batch{Number: 5}, nil)
			if !isDenied(next, p) || next.Err() == nil {
				t.Error("the next state forgot the damage")
			}
			if _, err := next.Seal("", Mark{}); !errors.Is(err, ErrDamaged) {
				t.Errorf("sealed what is damaged: %v", err)
			}
		})
	}
}

// TestDamageThatLeavesNothing: a state of which nothing could be read, so that it
// has no entries at all, is not the empty state.
func TestDamageThatLeavesNothing(t *testing.T) {
	path := filepath.Join(t.TempDir(), "segment")
	s, p, _ := revoked(t, path)
	if err := os.Truncate(path, blockSize); err != nil {
		t.Fatal(err)
	}
	got := Merge(s)
	if got.Len() != 0 || !errors.Is(got.Err(), ErrDamaged) || !isDenied(got, p) {
		t.Fatalf("%d records, %v", got.Len(), got.Err())
	}
}

// TestKeysThatBeginAlike: two keys with the same first 8 bytes of digest, which a
// block's index cannot tell apart, are each found, also where one block ends with
// the one and the next begins with the other, and over more blocks than two.
func TestKeysThatBeginAlike(t *testing.T) {
	var keys []session.Key
	var s *Set
	for n := range 400 {
		k := session.Key{Tenant: 1, Shape: session.Shape(session.KindSession)}
		binary.BigEndian.PutUint64(k.Digest[:], 1<<63)
		binary.BigEndian.PutUint64(k.Digest[8:], uint64(n)<<32)
		keys = append(keys, k)
		s = s.Apply(batch(uint64(n+1), put(session.EffectRevoked, k)), nil)
	}
	for _, path := range []string{"", filepath.Join(t.TempDir(), "segment")} {
		g, err := s.Seal(path, Mark{})
		if err != nil {
			t.Fatal(err)
		}
		if g.body.blocks < 3 || g.first[0] != g.first[2] {
			t.Fatalf("%d blocks that begin with %x", g.body.blocks, g.first)
		}
		sealed := g.Set()
		for i, k := range keys {
			if r, err := sealed.Find(k); err != nil || len(r) != 1 || r[0].Seq != uint64(i+1) {
				t.Fatalf("key %d: %+v, %v", i, r, err)
			}
		}
	}
}

func flip(f *os.File, g *Segment, find func([]byte) int) error {
	all := make([]byte, (g.body.blocks+1)*blockSize)
	if _, err := f.ReadAt(all, 0); err != nil {
		return err
	}
	at := find(all)
	if at < 0 {
		return io.ErrUnexpectedEOF
	}
	_, err := f.WriteAt([]byte{all[at] ^ 4}, int64(at))
	return err
}

// TestScrubFindsRot has a bit fall out of the filter, which hides an entry from
// every check, and finds it within one pass; and the same for what else there is
// in memory and on disk.
func TestScrubFindsRot(t *testing.T) {
	for name, rot := range map[string]func(g *Segment, path string, k session.Key) error{
		"filter": func(g *Segment, _ string, k session.Key) error {
			loc := g.filter.locations(&k)[3]
			g.filter.words[loc/64] &^= 1 << (loc % 64)
			return nil
		},
		"index": func(g *Segment, _ string, _ session.Key) error { g.first[1]++; return nil },
		"file":  func(g *Segment, path string, _ session.Key) error { return os.Truncate(path, g.size/2) },
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "segment")
			s, p, k := revoked(t, path)
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithCancel(t.Context())
				done := make(chan error)
				go func() { done <- s.seg.Scrub(ctx, time.Minute) }()
				select {
				case err := <-done:
					t.Fatalf("sound, and %v", err)
				case <-time.After(3 * time.Minute):
				}
				// Rot takes no lock, but a test that writes must.
				cancel()
				if err := <-done; err != nil {
					t.Fatal(err)
				}
				if err := rot(s.seg, path, k); err != nil {
					t.Fatal(err)
				}
				if name == "filter" && isDenied(s, p) {
					t.Error("the bit was none of the key's")
				}
				start := time.Now()
				if err := s.seg.Scrub(t.Context(), time.Minute); !errors.Is(err, ErrDamaged) {
					t.Errorf("found %v", err)
				}
				if d := time.Since(start); d > 2*time.Minute {
					t.Errorf("found after %v", d)
				}
				if !isDenied(s, p) {
					t.Error("allowed on state that is known to be damaged")
				}
			})
		})
	}
}

func TestScrubEnds(t *testing.T) {
	g, err := populate(t, newPeople(t), 100).Seal("", Mark{})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := g.Scrub(ctx, time.Hour); err != nil {
		t.Error(err)
	}
}

// TestFilterIsABloomFilter holds the sieve to what bits-and-blooms says.
func TestFilterIsABloomFilter(t *testing.T) {
	s := openBloom(20_000)
	var in []session.Key
	fill(20_000, 1, func(b *session.Batch) {
		for i := range b.Entries {
			in = append(in, b.Entries[i].Key)
			s.add(&b.Entries[i].Key)
		}
	})
	wrong := 0
	fill(200_000, 2, func(b *session.Batch) {
		for at := 0; at < len(b.Entries); at += 64 {
			part := b.Entries[at:min(at+64, len(b.Entries))]
			keys := make([]session.Key, len(part))
			for i := range part {
				keys[i] = part[i].Key
			}
			maybe := s.sift(keys, 1<<len(keys)-1)
			if maybe != s.siftEntries(part) {
				t.Fatal("the two sieves differ")
			}
			for i := range keys {
				locs := s.locations(&keys[i])
				if has := s.f.TestLocations(locs[:]); has != (maybe>>i&1 == 1) {
					t.Fatal("the sieve differs from bloom.TestLocations")
				} else if has {
					wrong++
				}
			}
		}
	})
	for i := 0; i < len(in); i += 50 {
		if got := s.sift(in[i:i+50], 1<<50-1); got != 1<<50-1 {
			t.Fatal("a key that was added is not found")
		}
	}
	if wrong > 40 { // 8 expected
		t.Errorf("%d of 200,000 wrong", wrong)
	}
}

// TestSealTakesNoMoreThanTheSegment seals on the heap and counts what that
// allocates in all.
func TestSealTakesNoMoreThanTheSegment(t *testing.T) {
	var s *Set
	fill(400_000, 1, func(b *session.Batch) { s = s.Apply(b, nil) })
	for _, path := range []string{"", filepath.Join(t.TempDir(), "segment")} {
		var g *Segment
		r := testing.Benchmark(func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				var err error
				if g, err = s.Seal(path, Mark{}); err != nil {
					b.Fatal(err)
				}
			}
		})
		if got := r.AllocedBytesPerOp(); got > 2*g.Size() {
			t.Errorf("sealing %d bytes allocated %d", g.Size(), got)
		}
	}
}

func TestSegmentMovesItsSize(t *testing.T) {
	whole := segmentBytes(t, 200)
	short := bytes.Clone(whole)
	// An altered size with everything else made to fit.
	binary.BigEndian.PutUint64(short[16:], uint64(len(short)+blockSize))
	resum(short)
	if _, err := read(append(short, make([]byte, blockSize)...)); !errors.Is(err, ErrSegment) {
		t.Error(err)
	}
}

// resum makes the checksums of an altered segment hold, as whoever can sign
// segments could.
func resum(b []byte) {
	if len(b) < blockSize {
		return
	}
	for i := 0; (i+2)*blockSize <= len(b) && uint64(i) < binary.BigEndian.Uint64(b[128:]); i++ {
		p := b[(i+1)*blockSize : (i+2)*blockSize]
		binary.BigEndian.PutUint32(p, crc32.Checksum(p[4:], castagnoli))
	}
	body := sha256.Sum256(b[blockSize:])
	sum := headerSum(b[:blockSize], body[:])
	copy(b[blockSize-sha256.Size:], sum[:])
}

// FuzzSegment alters a segment, with and without making its checksums hold
// again: what is altered is refused, and what has been given valid checksums may
// be nonsense but is read within its bounds.
func FuzzSegment(f *testing.F) {
	whole := segmentBytes(f, 400)
	for _, at := range []uint32{0, 9, 16, 120, 128, 136, 152, blockSize + 17, blockSize + 45, 2*blockSize - 2} {
		f.Add(at, []byte{0xff}, uint32(0))
	}
	f.Add(uint32(0), []byte{}, uint32(100))
	w := newPeople(f)
	f.Fuzz(func(t *testing.T, at uint32, put []byte, cut uint32) {
		b := bytes.Clone(whole)
		copy(b[int(at)%len(b):], put)
		b = b[:len(b)-int(cut)%len(b)]
		if g, err := read(b); (err == nil) != bytes.Equal(b, whole) || (g == nil) != (err != nil) {
			t.Fatalf("altered: %v, %v", bytes.Equal(b, whole), err)
		}
		resum(b)
		g, err := read(b)
		if err != nil {
			if !errors.Is(err, ErrSegment) {
				t.Fatalf("an untyped error: %v", err)
			}
			return
		}
		s := g.Set()
		for _, k := range w.keys {
			s.Lookup(k)
		}
		for _, p := range w.callers {
			for i := range w.calls {
				_, _ = s.Decide(p, &w.calls[i], session.Moment{})
			}
		}
		s.Range(func(session.Key, *session.Record) bool { return true })
		s.Apply(&session.Batch{Number: 1, Horizon: 1 << 40}, nil)
		_, _ = s.Seal("", Mark{})
	})
}
