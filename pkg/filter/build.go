package filter

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
	"io"
	"maps"
	"math"
	"os"
	"path/filepath"
	"slices"

	"github.com/interlock-fabric/interlock/pkg/session"
)

// builder makes a segment of rows that come in ascending order of their keys. It
// holds the filter, one block, and, on the heap, the sealed blocks: nothing that
// grows with the rows beside what the segment itself holds.
type builder struct {
	g    *Segment
	file *os.File
	sha  hash.Hash
	slab []byte

	rows  []byte // of the block being filled
	metas []byte
	offs  []uint16
	ends  session.Instant
	last  session.Key
	any   bool
	group int // bytes of rows before the rows of the last key
	// What the rows of the last key have added, so that they can move to a new
	// block together.
	groupMetas, groupOffs int
	groupEnds             session.Instant
	exps                  []session.Instant // ends of the rows in the block
	wide                  []byte
	lastID                int
	pace                  *pacer // may be nil
	err                   error
}

// compareKeys is the order of rows.
func compareKeys(a, b *session.Key) int {
	return cmp.Or(bytes.Compare(a.Digest[:], b.Digest[:]), cmp.Compare(a.Tenant, b.Tenant), cmp.Compare(a.Shape, b.Shape))
}

func sortedKeys[V any](m map[session.Key]V) []session.Key {
	return slices.SortedFunc(maps.Keys(m), func(a, b session.Key) int { return compareKeys(&a, &b) })
}

func sortedTenants(m map[session.TenantID]int) []session.TenantID {
	return slices.Sorted(maps.Keys(m))
}

func newBuilder(g *Segment, f *os.File, pace *pacer) *builder {
	b := &builder{g: g, file: f, sha: sha256.New(), ends: math.MaxInt64, pace: pace}
	g.filter = openBloom(g.rows)
	if f != nil {
		b.slab = make([]byte, 0, slabBlocks*blockSize)
		b.write(f, make([]byte, blockSize)) // until the header is known, no segment
	}
	return b
}

// rest is called after each piece of work of some microseconds.
func (b *builder) rest() {
	if b.pace != nil && b.err == nil {
		b.err = b.pace.rest()
	}
}

func (b *builder) write(w io.Writer, p []byte) {
	if b.err == nil {
		_, b.err = w.Write(p)
	}
}

// add appends a row. class is the form of its meta; its capacity is the
// builder's to use.
func (b *builder) add(k *session.Key, class []byte, expires, since session.Instant, seq uint64) {
	if same := b.any && *k == b.last; !same {
		b.g.filter.add(k)
		b.group, b.groupMetas, b.groupOffs, b.groupEnds = len(b.rows), len(b.metas), len(b.offs), b.ends
		b.last, b.any = *k, true
	}
	id := b.tenant(k.Tenant)
	e, eok := packTime(expires)
	s, sok := packTime(since)
	if !eok || !sok || seq >= 1<<40 || id < 0 {
		b.wide = widen(append(b.wide[:0], class...), k.Tenant, expires, since, seq)
		class, id, e, s, seq = b.wide, 0, 0, 0, 0
	}
	i := b.meta(class)
	if i < 0 || blockHeader+len(b.rows)+rowSize+len(b.metas)+2*len(b.offs) > blockSize {
		b.turn()
		if i = b.meta(class); i < 0 || blockHeader+len(b.rows)+rowSize+len(b.metas)+2*len(b.offs) > blockSize {
			key := *k // k itself must not escape
			b.err = errors.Join(b.err, fmt.Errorf("filter: the records of key %s do not fit a block", key))
			return
		}
	}
	r := append(b.rows, k.Digest[:]...)
	r = append(binary.BigEndian.AppendUint16(r, uint16(id)), uint8(i))
	b.rows = appendU40(appendU40(appendU40(r, e), s), seq)
	b.exps = append(b.exps, expires)
	b.end(expires)
}

func (b *builder) end(expires session.Instant) {
	if expires != 0 {
		b.ends = min(b.ends, expires)
	}
}

// tenant returns the index of a tenant, or -1 when it is too large for a row.
func (b *builder) tenant(id session.TenantID) int {
	if len(b.g.ids) > b.lastID && b.g.ids[b.lastID] == id {
		return b.lastID
	}
	i, ok := slices.BinarySearch(b.g.ids, id)
	if !ok || i > math.MaxUint16 {
		return -1
	}
	b.lastID = i
	return i
}

// meta returns the index of a meta in the block, which it adds if it is new, or
// -1 when there is no room for another.
func (b *builder) meta(m []byte) int {
	// The newest first: neighbours in the log are rarely neighbours here, but
	// often there is one decision only.
	for i := len(b.offs) - 1; i >= 0; i-- {
		if bytes.HasPrefix(b.metas[b.offs[i]:], m) {
			return i
		}
	}
	if len(b.offs) == maxMetas {
		return -1
	}
	b.offs = append(b.offs, uint16(len(b.metas)))
	b.metas = append(b.metas, m...)
	return len(b.offs) - 1
}

// turn seals the block, but for the rows of the last key, which begin the next.
func (b *builder) turn() {
	type moved struct {
		row, meta []byte
		expires   session.Instant
	}
	var tail []moved
	for at := b.group; at < len(b.rows); at += rowSize {
		r := bytes.Clone(b.rows[at : at+rowSize])
		i := rowMeta(r)
		end := len(b.metas)
		if i+1 < len(b.offs) {
			end = int(b.offs[i+1])
		}
		tail = append(tail, moved{r, bytes.Clone(b.metas[b.offs[i]:end]), b.exps[at/rowSize]})
	}
	b.rows, b.metas, b.offs, b.ends = b.rows[:b.group], b.metas[:b.groupMetas], b.offs[:b.groupOffs], b.groupEnds
	b.flush()
	b.exps = b.exps[:0]
	for _, t := range tail {
		t.row[18] = uint8(b.meta(t.meta))
		b.rows = append(b.rows, t.row...)
		b.exps = append(b.exps, t.expires)
		b.end(t.expires)
	}
}

// flush seals the block.
func (b *builder) flush() {
	if len(b.rows) == 0 {
		return
	}
	b.rest()
	g := b.g
	if cap(b.slab) == 0 {
		b.slab = make([]byte, 0, slabBlocks*blockSize)
	}
	n := len(b.slab)
	b.slab = b.slab[:n+blockSize]
	p := b.slab[n:]
	clear(p)
	binary.BigEndian.PutUint32(p[4:], uint32(g.body.blocks))
	if b.ends != math.MaxInt64 {
		binary.BigEndian.PutUint64(p[8:], uint64(b.ends))
	}
	binary.BigEndian.PutUint16(p[16:], uint16(len(b.rows)/rowSize))
	binary.BigEndian.PutUint16(p[18:], uint16(len(b.offs)))
	binary.BigEndian.PutUint32(p[20:], g.salt)
	copy(p[blockHeader:], b.rows)
	table := blockSize - 2*len(b.offs)
	base := table - len(b.metas)
	copy(p[base:], b.metas)
	for i, o := range b.offs {
		binary.BigEndian.PutUint16(p[table+2*i:], uint16(base)+o)
	}
	binary.BigEndian.PutUint32(p, crc32.Checksum(p[4:], castagnoli))
	g.body.blocks++
	g.index(p)
	b.rows, b.metas, b.offs, b.ends, b.exps = b.rows[:0], b.metas[:0], b.offs[:0], math.MaxInt64, b.exps[:0]
	b.group, b.groupMetas, b.groupOffs, b.groupEnds = 0, 0, 0, math.MaxInt64
	if len(b.slab) == cap(b.slab) {
		b.turnSlab()
	}
}

func (b *builder) turnSlab() {
	_, _ = b.sha.Write(b.slab) // never fails (hash.Hash)
	if b.file != nil {
		b.write(b.file, b.slab)
		b.slab = b.slab[:0]
		return
	}
	b.g.body.slabs = append(b.g.body.slabs, slices.Clip(b.slab))
	b.slab = nil
}

// finish seals the segment. The file is synchronised, and has its header only
// then, so that what a crash leaves is none.
func (b *builder) finish() error {
	g := b.g
	b.flush()
	if len(b.slab) > 0 {
		if b.file == nil {
			b.slab = bytes.Clone(b.slab)
		}
		b.turnSlab()
	}
	g.extra = g.encodeExtra()
	_, _ = b.sha.Write(g.extra) // never fails (hash.Hash)
	if b.file != nil {
		b.write(b.file, g.extra)
	}
	buf := make([]byte, 0, 64<<10)
	for words := g.filter.words; len(words) > 0; {
		n := min(len(words), cap(buf)/8)
		buf = buf[:0]
		for _, w := range words[:n] {
			buf = binary.LittleEndian.AppendUint64(buf, w)
		}
		_, _ = b.sha.Write(buf) // never fails (hash.Hash)
		if b.file != nil {
			b.write(b.file, buf)
		}
		words = words[n:]
		b.rest()
	}
	g.size = int64(blockSize)*int64(g.body.blocks+1) + int64(len(g.extra)) + 8*int64(len(g.filter.words))
	g.header = g.encodeHeader()
	g.sum = headerSum(g.header, b.sha.Sum(nil))
	copy(g.header[blockSize-sha256.Size:], g.sum[:])
	g.filter.seal()
	g.indexed = g.sumIndex()
	if b.file == nil {
		return b.err
	}
	if b.err == nil {
		b.err = b.file.Sync()
	}
	if b.err == nil {
		_, b.err = b.file.WriteAt(g.header, 0)
	}
	if b.err == nil {
		b.err = b.file.Sync()
	}
	return b.err
}

// Seal makes a segment of the state, which is that at mark: a file of that path,
// 0600, which appears only whole, or, with an empty path, on the heap. It reads
// the state while others do, and while newer states are derived from it; Onto
// then puts those onto the segment. What the horizon has ended is left out.
//
// It fails with an error wrapping ErrDamaged when the state cannot be read, and
// with the file's. What it needs beside what it makes is some MiB, and 8 bytes
// for each change in the delta.
func (s *Set) Seal(path string, mark Mark) (*Segment, error) { return s.seal(path, mark, nil) }

// SealBeside is Seal beside checks that are to notice little of it: it rests for
// three quarters of the time, but not when so much arrives meanwhile that the
// delta would grow without bound. It ends early, with ctx's error, when ctx does.
func (s *Set) SealBeside(ctx context.Context, path string, mark Mark) (*Segment, error) {
	return s.seal(path, mark, newPacer(ctx, s))
}

func (s *Set) seal(path string, mark Mark, pace *pacer) (*Segment, error) {
	if s == nil {
		s = &Set{}
	}
	if err := s.Err(); err != nil {
		return nil, err
	}
	if len(mark.Note) > MaxNote {
		return nil, fmt.Errorf("%w: a note of %d bytes", session.ErrInvalid, len(mark.Note))
	}
	g := &Segment{
		mark: mark, horizon: s.horizon, digest: s.digest, counts: s.counts,
		salt:      binary.BigEndian.Uint32(s.digest[:]) ^ uint32(mark.Number),
		tenants:   s.tenantCounts(),
		residents: s.residents(),
	}
	g.ids = sortedTenants(g.tenants)
	for shape, n := range g.counts {
		if n > 0 && shape > int(session.KindTenant) {
			g.shapes = g.shapes.With(session.Shape(shape))
			g.rows += n
		}
	}
	if path == "" {
		b := newBuilder(g, nil, pace)
		if err := s.feed(b); err != nil {
			return nil, err
		}
		return g, b.finish()
	}
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".*.tmp") // 0600
	if err != nil {
		return nil, err
	}
	b := newBuilder(g, f, pace)
	if err = s.feed(b); err == nil {
		err = b.finish()
	}
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err == nil {
		err = syncDir(filepath.Dir(path))
	}
	if err != nil {
		return nil, errors.Join(err, f.Close(), os.Remove(f.Name()))
	}
	g.body.file = f
	return g, nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// feed gives the builder the rows of the state in order: those of the segment
// below, and those of the delta, which take their place.
func (s *Set) feed(b *builder) error {
	delta := make([]*node, 0, s.layers.nodes())
	s.layers.each(func(n *node) bool {
		if n.key.Shape > session.Shape(session.KindTenant) {
			delta = append(delta, n)
		}
		return true
	})
	compared := 0
	slices.SortFunc(delta, func(x, y *node) int {
		if compared++; compared%256 == 0 {
			b.rest()
		}
		return compareKeys(&x.key, &y.key)
	})
	want := b.g.rows
	added := 0
	var form []byte
	put := func(n *node) {
		n.each(s.horizon, func(p packed) {
			form = appendMeta(form[:0], n.key.Shape, p.meta)
			b.add(&n.key, form, p.expires, p.meta.Since, p.meta.Seq)
			added++
		})
	}
	var serr error
	if s.seg != nil {
		in := &reader{g: s.seg}
		err := s.seg.scan(nil, func(_ int, blk []byte) bool {
			in.turn(blk)
			for i, n := 0, blockRows(blk); i < n; i++ {
				var e *entry
				if e, serr = in.read(i); serr != nil {
					return false
				}
				for len(delta) > 0 && compareKeys(&delta[0].key, &e.key) < 0 {
					put(delta[0])
					delta = delta[1:]
				}
				if len(delta) > 0 && delta[0].key == e.key {
					continue // replaced; put when its place comes
				}
				if e.expires != 0 && e.expires <= s.horizon {
					continue
				}
				class := e.m.form
				if e.m.wide != nil {
					class = append(form[:0], class[:len(class)-metaWide]...)
					class[0] &^= flagWide
					form = class
				}
				b.add(&e.key, class, e.expires, e.since, e.seq)
				added++
			}
			return b.err == nil
		})
		if serr != nil {
			serr = s.seg.damage(serr)
		}
		if err = errors.Join(err, serr); err != nil {
			return err
		}
	}
	for _, n := range delta {
		put(n)
	}
	if b.err == nil && added != want {
		return fmt.Errorf("%w: %d records where there should be %d", ErrDamaged, added, want)
	}
	return b.err
}
