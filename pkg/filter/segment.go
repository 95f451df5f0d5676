package filter

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
	"io"
	"math"
	"os"
	"sync"
	"sync/atomic"

	"github.com/interlock-fabric/interlock/pkg/session"
)

// SegmentVersion is the version of the segment's form that this package writes.
// A newer one is refused.
//
//	1  2026-11: first form
const SegmentVersion = 1

// The errors of segments. A holder of a segment that is refused or damaged
// denies, and fetches or builds another.
var (
	// ErrSegment is the parent of every refusal of a segment.
	ErrSegment = errors.New("segment refused")
	// ErrNewer: the segment's version is one that this code does not know.
	ErrNewer = fmt.Errorf("%w: newer version", ErrSegment)
	// ErrTorn: the segment is not whole, or not one at all.
	ErrTorn = fmt.Errorf("%w: cut short or not a segment", ErrSegment)
	// ErrAltered: a checksum does not hold, or the content contradicts itself.
	ErrAltered = fmt.Errorf("%w: altered", ErrSegment)
	// ErrDamaged: a segment that was sound when it was opened is not any more.
	// What cannot be read is not "not found": whoever sees it denies.
	ErrDamaged = errors.New("revocation state damaged")
)

// Form of a segment. Integers are big-endian, the filter's words little-endian.
//
//	header   one block: see encodeHeader
//	blocks   rows in ascending order of their digests, in blocks
//	extra    tenants with their counts; the global and tenant records
//	filter   words of the bloom filter
//
//	block    crc (4) | number (4) | soonest (8) | rows (2) | metas (2) | salt (4)
//	         | rows, 34 bytes each | … | metas | offsets of the metas, 2 bytes each
//	row      digest (16) | tenant (2) | meta (1) | expires (5) | since (5) | seq (5)
//	meta     flags | shape | effect | reason | share (2) | issued-before (8)
//	         | incident | acr | exemptions: each with its length first (1)
//	         | when flagWide: tenant (4) | expires (8) | since (8) | seq (8)
//
// The rows of one key are in one block, so a block is all that a confirmation
// reads. A block's metas are what its rows share: a row that shares its own costs
// 34 bytes, whoever decided it when. A row's tenant is an index into the sorted
// tenants; its times are milliseconds since 2020, plus 1, or 0 for none. What
// does not fit is in a meta of its own. The salt keeps a block of another segment
// from passing for one.
const (
	segmentMagic = "ILKSEG\r\n"
	blockSize    = 4096
	blockHeader  = 24
	rowSize      = 34
	metaFixed    = 4 + 2 + 8 + 3 // with the three lengths
	metaWide     = 4 + 8 + 8 + 8
	maxMetas     = 255
	maxSegment   = 64 << 30
)

// Mark says where in the log a state is.
type Mark struct {
	Epoch, Number uint64
	// Head is the hash of that batch, or the epoch's origin.
	Head session.Hash
	// Time is that batch's time.
	Time session.Instant
	// Note is what whoever seals wants to find again: at most MaxNote bytes.
	Note string
}

// MaxNote bounds a Mark's Note.
const MaxNote = 1 << 16

// Segment is a sealed, immutable snapshot of the state: a bloom filter in
// memory, and behind it the exact entries, in a file or on the heap. A filter
// hit is always confirmed by the entries. All methods are safe for concurrent
// use.
type Segment struct {
	mark    Mark
	horizon session.Instant
	digest  session.StateDigest
	counts  [64]int
	shapes  session.ShapeSet // of the rows
	salt    uint32
	rows    int
	size    int64
	sum     [sha256.Size]byte

	header []byte
	extra  []byte
	body   body
	filter *sealedBloom
	// first is the first digest's first 8 bytes of each block, soonest the first
	// end of a row in it, or MaxInt64.
	first   []uint64
	soonest []session.Instant
	indexed uint32 // checksum of the two

	tenants   map[session.TenantID]int
	ids       []session.TenantID // sorted
	residents map[session.Key][]session.Record

	broken atomic.Pointer[error]
}

// body is where the blocks are: in a file, behind its header, or in slabs.
type body struct {
	file   *os.File
	slabs  [][]byte
	blocks int
}

const slabBlocks = 256

// block returns block i, unverified; buf is used when it is in a file.
func (b *body) block(i int, buf *[blockSize]byte) ([]byte, error) {
	if i < 0 || i >= b.blocks {
		return nil, fmt.Errorf("%w: no block %d", ErrDamaged, i)
	}
	if b.file == nil {
		at := i % slabBlocks * blockSize
		return b.slabs[i/slabBlocks][at : at+blockSize], nil
	}
	if _, err := b.file.ReadAt(buf[:], int64(i+1)*blockSize); err != nil {
		return nil, fmt.Errorf("%w: block %d: %w", ErrDamaged, i, err)
	}
	return buf[:], nil
}

// Mark returns where in the log the segment's state is.
func (g *Segment) Mark() Mark { return g.mark }

// Digest returns the state digest there.
func (g *Segment) Digest() session.StateDigest { return g.digest }

// Len returns the number of records, those included that a later horizon has
// ended.
func (g *Segment) Len() int {
	n := 0
	for _, c := range g.counts {
		n += c
	}
	return n
}

// Size returns the length of the segment's form in bytes.
func (g *Segment) Size() int64 { return g.size }

// Sum returns the checksum that the header carries: the SHA-256 of everything
// else. Equal sums mean equal segments.
func (g *Segment) Sum() [sha256.Size]byte { return g.sum }

// Err returns an error wrapping ErrDamaged once damage has been seen.
func (g *Segment) Err() error {
	if g == nil {
		return nil
	}
	if p := g.broken.Load(); p != nil {
		return *p
	}
	return nil
}

func (g *Segment) damage(err error) error {
	if !errors.Is(err, ErrDamaged) {
		err = fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	g.broken.CompareAndSwap(nil, &err)
	return err
}

// Close closes the file of a segment that has one; lookups fail from then on. A
// segment that nobody holds any more needs no Close.
func (g *Segment) Close() error {
	if g == nil || g.body.file == nil {
		return nil
	}
	return g.body.file.Close()
}

// Set returns the state that the segment holds.
func (g *Segment) Set() *Set {
	s := &Set{seg: g, counts: g.counts, digest: g.digest, horizon: g.horizon, global: g.residents[session.GlobalKey()]}
	for i := range s.global {
		if e := s.global[i].Expires; e != 0 && (s.soonest == 0 || e < s.soonest) {
			s.soonest = e
		}
	}
	s.settle()
	return s
}

// buffers are for blocks that are read from a file.
var buffers = sync.Pool{New: func() any { return new([blockSize]byte) }}

// hits are the rows under one key. They hold a buffer until done.
type hits struct {
	b      []byte
	buf    *[blockSize]byte
	lo, hi int
}

func (h *hits) done() {
	if h.buf != nil {
		buffers.Put(h.buf)
	}
	*h = hits{}
}

// seek finds the rows under a key, in a block whose checksum it has verified, and
// takes the first of them apart. done must be called on what it returns without
// an error.
func (g *Segment) seek(k *session.Key, e *entry) (h hits, err error) {
	if g.rows == 0 {
		return h, nil
	}
	prefix := binary.BigEndian.Uint64(k.Digest[:8])
	// The last block that begins at or before the key; and, as two keys may have
	// these 8 bytes in common, those before it that begin with the same.
	for i := g.lastBlock(prefix); i >= 0; i-- {
		if h.buf == nil && g.body.file != nil {
			h.buf = buffers.Get().(*[blockSize]byte)
		}
		if h.b, err = g.body.block(i, h.buf); err == nil {
			err = checkBlock(h.b, i, g.salt)
		}
		if err != nil {
			h.done()
			return h, g.damage(err)
		}
		h.lo, h.hi = blockFind(h.b, prefix, &k.Digest)
		// Keys with equal digests are next to each other; nobody has seen two.
		for ; h.lo < h.hi; h.lo++ {
			if err := g.read(h.b, h.lo, e); err != nil {
				h.done()
				return h, g.damage(err)
			}
			if e.key == *k {
				break
			}
		}
		if h.lo < h.hi || g.first[i] != prefix {
			break
		}
	}
	return h, nil
}

// lastBlock returns the last block that begins at or before a prefix, or -1.
// Digests are uniform, so it begins where the block should be, goes on in
// strides that double, and is there within a few cache lines. Whatever the
// digests, it takes no more than twice the steps of a binary search.
func (g *Segment) lastBlock(prefix uint64) int {
	lo, hi := -1, len(g.first)
	for i, stride := int(at(prefix, uint64(hi))), 1; lo < i && i < hi; stride *= 2 {
		if g.first[i] <= prefix {
			lo = i
			i += stride
		} else {
			hi = i
			i -= stride
		}
	}
	for hi-lo > 1 {
		if i := int(uint(lo+hi) / 2); g.first[i] <= prefix {
			lo = i
		} else {
			hi = i
		}
	}
	return lo
}

// blockFind returns the rows of a block that have a digest.
func blockFind(b []byte, prefix uint64, d *session.Digest) (lo, hi int) {
	n := blockRows(b)
	for lo, hi = 0, n; lo < hi; {
		if i := int(uint(lo+hi) / 2); binary.BigEndian.Uint64(row(b, i)) < prefix {
			lo = i + 1
		} else {
			hi = i
		}
	}
	for lo < n && bytes.Compare(row(b, lo)[:16], d[:]) < 0 {
		lo++
	}
	for hi = lo; hi < n && bytes.Equal(row(b, hi)[:16], d[:]); hi++ {
	}
	return lo, hi
}

// checkBlock verifies a block's checksum, that it is the one that was asked for,
// and that its counts fit.
func checkBlock(b []byte, i int, salt uint32) error {
	rows, metas := blockRows(b), blockMetas(b)
	switch {
	case crc32.Checksum(b[4:], castagnoli) != binary.BigEndian.Uint32(b):
		return fmt.Errorf("%w: checksum of block %d", ErrDamaged, i)
	case binary.BigEndian.Uint32(b[4:]) != uint32(i) || binary.BigEndian.Uint32(b[20:]) != salt:
		return fmt.Errorf("%w: another block in the place of %d", ErrDamaged, i)
	case rows == 0 || metas == 0 || metas > maxMetas || blockHeader+rows*rowSize+metas*(metaFixed+2) > blockSize:
		return fmt.Errorf("%w: %d rows, %d metas in block %d", ErrDamaged, rows, metas, i)
	}
	return nil
}

func blockSoonest(b []byte) session.Instant { return session.Instant(binary.BigEndian.Uint64(b[8:])) }
func blockRows(b []byte) int                { return int(binary.BigEndian.Uint16(b[16:])) }
func blockMetas(b []byte) int               { return int(binary.BigEndian.Uint16(b[18:])) }

func row(b []byte, i int) []byte {
	return b[blockHeader+i*rowSize : blockHeader+(i+1)*rowSize]
}

// entry is a row taken apart.
type entry struct {
	key            session.Key
	expires, since session.Instant
	seq            uint64
	m              meta
}

// epoch2020 is where the times in rows begin, less one.
const epoch2020 = 1577836800000 - 1

func packTime(t session.Instant) (v uint64, ok bool) {
	if t == 0 {
		return 0, true
	}
	v = uint64(t - epoch2020)
	return v, t > epoch2020 && v < 1<<40
}

func unpackTime(b []byte) session.Instant {
	if v := u40(b); v != 0 {
		return session.Instant(v) + epoch2020
	}
	return 0
}

func u40(b []byte) uint64 { return uint64(b[0])<<32 | uint64(binary.BigEndian.Uint32(b[1:])) }

func appendU40(b []byte, v uint64) []byte {
	return binary.BigEndian.AppendUint32(append(b, byte(v>>32)), uint32(v))
}

// read takes row i of a verified block apart. The entry aliases the block.
func (g *Segment) read(b []byte, i int, e *entry) (err error) {
	r := row(b, i)
	if e.m, err = blockMeta(b, rowMeta(r)); err != nil {
		return err
	}
	return g.readWith(r, e)
}

// readWith is read when the row's meta is known.
func (g *Segment) readWith(r []byte, e *entry) error {
	copy(e.key.Digest[:], r)
	e.key.Shape = session.Shape(e.m.fixed[1])
	if w := e.m.wide; w != nil {
		e.key.Tenant = session.TenantID(binary.BigEndian.Uint32(w))
		e.expires, e.since, e.seq = wideTimes(w)
		return nil
	}
	id := int(binary.BigEndian.Uint16(r[16:]))
	if id >= len(g.ids) {
		return fmt.Errorf("%w: tenant %d of %d", ErrDamaged, id, len(g.ids))
	}
	e.key.Tenant = g.ids[id]
	e.expires, e.since, e.seq = unpackTime(r[19:]), unpackTime(r[24:]), u40(r[29:])
	return nil
}

// reader takes the rows of one block after the other apart, and each meta once.
type reader struct {
	g     *Segment
	b     []byte
	metas []meta
	entry entry
}

// turn goes on to a verified block.
func (r *reader) turn(b []byte) {
	if r.metas == nil {
		r.metas = make([]meta, maxMetas)
	}
	r.b, r.metas = b, r.metas[:blockMetas(b)]
	clear(r.metas)
}

func (r *reader) meta(row []byte) (*meta, error) {
	i := rowMeta(row)
	if i >= len(r.metas) || r.metas[i].form == nil {
		m, err := blockMeta(r.b, i)
		if err != nil {
			return nil, err
		}
		r.metas[i] = m
	}
	return &r.metas[i], nil
}

// read takes row i apart. The entry is good until the next.
func (r *reader) read(i int) (*entry, error) {
	row := row(r.b, i)
	m, err := r.meta(row)
	if err != nil {
		return nil, err
	}
	r.entry.m = *m
	return &r.entry, r.g.readWith(row, &r.entry)
}

// expires is when row i ends.
func (r *reader) expires(i int) (end session.Instant, err error) {
	row := row(r.b, i)
	m, err := r.meta(row)
	switch {
	case err != nil:
	case m.wide != nil:
		end, _, _ = wideTimes(m.wide)
	default:
		end = unpackTime(row[19:])
	}
	return end, err
}

func wideTimes(w []byte) (expires, since session.Instant, seq uint64) {
	return session.Instant(binary.BigEndian.Uint64(w[4:])), session.Instant(binary.BigEndian.Uint64(w[12:])), binary.BigEndian.Uint64(w[20:])
}

func (e *entry) record() session.Record {
	r := e.m.record()
	r.Since, r.Seq, r.Expires = e.since, e.seq, e.expires
	return r
}

func rowMeta(r []byte) int { return int(r[18]) }

// meta is a record's shared part as a block has it.
type meta struct {
	form          []byte // all of it
	fixed         []byte
	incident, acr []byte
	except        []byte
	wide          []byte
}

// blockMeta takes meta i of a verified block apart. It trusts no length.
func blockMeta(b []byte, i int) (m meta, err error) {
	n := blockMetas(b)
	if i >= n {
		return m, fmt.Errorf("%w: meta %d of %d", ErrDamaged, i, n)
	}
	table := blockSize - 2*n
	low := blockHeader + blockRows(b)*rowSize
	off := int(binary.BigEndian.Uint16(b[table+2*i:]))
	if off < low || off+metaFixed > table {
		return m, fmt.Errorf("%w: meta %d at %d", ErrDamaged, i, off)
	}
	return parseMeta(b[off:table])
}

var errShortMeta = fmt.Errorf("%w: a meta is cut short", ErrDamaged)

func parseMeta(b []byte) (m meta, err error) {
	if len(b) < metaFixed {
		return m, errShortMeta
	}
	rest, ok := b[metaFixed-3:], true
	field := func(unit, most int) (f []byte) {
		if len(rest) == 0 || int(rest[0]) > most || 1+int(rest[0])*unit > len(rest) {
			ok = false
			return nil
		}
		end := 1 + int(rest[0])*unit
		f, rest = rest[1:end], rest[end:]
		return f
	}
	m.fixed = b[:metaFixed-3]
	m.incident, m.acr, m.except = field(1, session.MaxIncidentLen), field(1, 64), field(keyLen, session.MaxExcept)
	if ok && m.fixed[0]&flagWide != 0 {
		if ok = len(rest) >= metaWide; ok {
			m.wide, rest = rest[:metaWide], rest[metaWide:]
		}
	}
	if !ok {
		return m, errShortMeta
	}
	m.form = b[:len(b)-len(rest)]
	return m, nil
}

const keyLen = 21

func putKey(b []byte, k *session.Key) []byte {
	b = binary.BigEndian.AppendUint32(b, uint32(k.Tenant))
	return append(append(b, uint8(k.Shape)), k.Digest[:]...)
}

func getKey(b []byte) (k session.Key) {
	k.Tenant, k.Shape = session.TenantID(binary.BigEndian.Uint32(b)), session.Shape(b[4])
	copy(k.Digest[:], b[5:keyLen])
	return k
}

const (
	flagDrill = 1
	flagWide  = 2
)

// appendMeta appends the form of what a record shares with others.
func appendMeta(b []byte, shape session.Shape, r *session.Record) []byte {
	flags := uint8(0)
	if r.Drill {
		flags = flagDrill
	}
	b = append(b, flags, uint8(shape), uint8(r.Effect), uint8(r.Reason))
	b = binary.BigEndian.AppendUint16(b, r.Share)
	b = binary.BigEndian.AppendUint64(b, uint64(r.IssuedBefore))
	b = append(append(b, uint8(len(r.Incident))), r.Incident...)
	b = append(append(b, uint8(len(r.ACR))), r.ACR...)
	b = append(b, uint8(len(r.Except)))
	for i := range r.Except {
		b = putKey(b, &r.Except[i])
	}
	return b
}

// widen makes of a meta's form one that has what else there is, too.
func widen(b []byte, tenant session.TenantID, expires, since session.Instant, seq uint64) []byte {
	b[0] |= flagWide
	b = binary.BigEndian.AppendUint32(b, uint32(tenant))
	for _, v := range [...]uint64{uint64(expires), uint64(since), seq} {
		b = binary.BigEndian.AppendUint64(b, v)
	}
	return b
}

// lean returns what decides whether the record matches, without allocating:
// everything but the incident, and for the ACR, acr if it is that one and a text
// that nobody has otherwise. The exemptions go to except, if it is not nil.
func (m meta) lean(acr string, except *[session.MaxExcept]session.Key) (r session.Record) {
	f := m.fixed
	r.Drill, r.Effect, r.Reason = f[0]&flagDrill != 0, session.Effect(f[2]), session.Reason(f[3])
	r.Share = binary.BigEndian.Uint16(f[4:])
	r.IssuedBefore = session.Instant(binary.BigEndian.Uint64(f[6:]))
	switch {
	case len(m.acr) == 0:
	case string(m.acr) == acr:
		r.ACR = acr
	default:
		if r.ACR = "\x00"; acr == r.ACR {
			r.ACR = "\x01"
		}
	}
	if except != nil {
		r.Except = except[:len(m.except)/keyLen]
		m.exemptions(r.Except)
	}
	return r
}

// record returns what the meta has of the record.
func (m meta) record() session.Record {
	r := m.lean("", nil)
	r.Incident, r.ACR = string(m.incident), string(m.acr)
	if n := len(m.except) / keyLen; n > 0 {
		r.Except = make([]session.Key, n)
		m.exemptions(r.Except)
	}
	return r
}

func (m meta) exemptions(to []session.Key) {
	for i := range to {
		to[i] = getKey(m.except[i*keyLen:])
	}
}

// records appends the whole records under a key that are in force.
func (g *Segment) records(k *session.Key, horizon session.Instant, to []packed) ([]packed, error) {
	var e entry
	h, err := g.seek(k, &e)
	if err != nil {
		return to, err
	}
	defer h.done()
	for h.lo < h.hi && e.key == *k {
		if e.expires == 0 || e.expires > horizon {
			r := e.record()
			to = append(to, pack(&r))
		}
		if h.lo++; h.lo < h.hi {
			if err := g.read(h.b, h.lo, &e); err != nil {
				return to, g.damage(err)
			}
		}
	}
	return to, nil
}

// scan reads the blocks from first on in order, verifies each, and calls fn with
// it until fn returns false. It uses a buffer of its own and reads ahead, so
// that it goes at the speed of the disk.
func (g *Segment) scan(want func(i int) bool, fn func(i int, b []byte) bool) error {
	const ahead = 64
	var buf []byte
	have, end := 0, 0
	for i := 0; i < g.body.blocks; i++ {
		if want != nil && !want(i) {
			continue
		}
		var b []byte
		if g.body.file == nil {
			var err error
			if b, err = g.body.block(i, nil); err != nil {
				return g.damage(err)
			}
		} else {
			if i >= end {
				if buf == nil {
					buf = make([]byte, ahead*blockSize)
				}
				have, end = i, min(i+ahead, g.body.blocks)
				if _, err := g.body.file.ReadAt(buf[:(end-have)*blockSize], int64(i+1)*blockSize); err != nil {
					return g.damage(fmt.Errorf("%w: block %d: %w", ErrDamaged, i, err))
				}
			}
			b = buf[(i-have)*blockSize : (i-have+1)*blockSize]
		}
		if err := checkBlock(b, i, g.salt); err != nil {
			return g.damage(err)
		}
		if !fn(i, b) {
			return nil
		}
	}
	return nil
}

// sumIndex is the checksum of what is derived from the blocks.
func (g *Segment) sumIndex() uint32 {
	var b [16]byte
	crc := uint32(0)
	for i := range g.first {
		binary.BigEndian.PutUint64(b[:], g.first[i])
		binary.BigEndian.PutUint64(b[8:], uint64(g.soonest[i]))
		crc = crc32.Update(crc, castagnoli, b[:])
	}
	return crc
}

// encodeHeader writes the header but for its last 32 bytes, which are the
// SHA-256 of the header up to there and the SHA-256 of all that follows it.
//
//	magic (8) | version (4) | salt (4) | size (8) | epoch (8) | number (8)
//	| head (32) | time (8) | horizon (8) | digest (32) | rows (8) | blocks (8)
//	| extra (8) | words (8) | probes (4) | bits a key (4) | counts (64 × 8)
//	| pad … | sum (32)
func (g *Segment) encodeHeader() []byte {
	b := make([]byte, 0, blockSize)
	b = append(b, segmentMagic...)
	b = binary.BigEndian.AppendUint32(b, SegmentVersion)
	b = binary.BigEndian.AppendUint32(b, g.salt)
	u64 := func(v uint64) { b = binary.BigEndian.AppendUint64(b, v) }
	u64(uint64(g.size))
	u64(g.mark.Epoch)
	u64(g.mark.Number)
	b = append(b, g.mark.Head[:]...)
	u64(uint64(g.mark.Time))
	u64(uint64(g.horizon))
	b = append(b, g.digest[:]...)
	u64(uint64(g.rows))
	u64(uint64(g.body.blocks))
	u64(uint64(len(g.extra)))
	u64(uint64(len(g.filter.words)))
	b = binary.BigEndian.AppendUint32(b, probes)
	b = binary.BigEndian.AppendUint32(b, bitsPerKey)
	for _, n := range g.counts {
		u64(uint64(n))
	}
	return b[:blockSize]
}

func headerSum(header, body []byte) (sum [sha256.Size]byte) {
	h := sha256.New()
	h.Write(header[:blockSize-sha256.Size])
	h.Write(body)
	h.Sum(sum[:0])
	return sum
}

// decodeHeader reads a header and what the sizes in it bound. size is the length
// of what holds the segment.
func decodeHeader(b []byte, size int64) (g *Segment, extra, words int, err error) {
	switch {
	case len(b) < blockSize || string(b[:8]) != segmentMagic:
		return nil, 0, 0, ErrTorn
	case binary.BigEndian.Uint32(b[8:]) > SegmentVersion:
		return nil, 0, 0, fmt.Errorf("%w %d, this is version %d", ErrNewer, binary.BigEndian.Uint32(b[8:]), SegmentVersion)
	case binary.BigEndian.Uint32(b[8:]) != SegmentVersion:
		return nil, 0, 0, ErrAltered
	}
	g = &Segment{header: bytes.Clone(b[:blockSize]), salt: binary.BigEndian.Uint32(b[12:])}
	p := 16
	u64 := func() uint64 { p += 8; return binary.BigEndian.Uint64(b[p-8:]) }
	small := func() int {
		v := u64()
		if v > maxSegment {
			err = ErrAltered
			return 0
		}
		return int(v)
	}
	instant := func() session.Instant {
		v := session.Instant(u64())
		if v < 0 {
			err = ErrAltered
		}
		return v
	}
	g.size = int64(small())
	g.mark.Epoch, g.mark.Number = u64(), u64()
	p += copy(g.mark.Head[:], b[p:])
	g.mark.Time, g.horizon = instant(), instant()
	p += copy(g.digest[:], b[p:])
	g.rows, g.body.blocks = small(), small()
	extra, words = small(), small()
	k, per := binary.BigEndian.Uint32(b[p:]), binary.BigEndian.Uint32(b[p+4:])
	p += 8
	rows := 0
	for i := range g.counts {
		g.counts[i] = small()
		if i > int(session.KindTenant) {
			rows += g.counts[i]
		}
	}
	copy(g.sum[:], b[blockSize-sha256.Size:])
	want := int64(blockSize)*int64(g.body.blocks+1) + int64(extra) + 8*int64(words)
	switch {
	case err != nil:
		return nil, 0, 0, err
	case g.size != size:
		return nil, 0, 0, fmt.Errorf("%w: %d of %d bytes", ErrTorn, size, g.size)
	case want != size, k != probes, per != bitsPerKey, words != bloomWords(g.rows), g.body.blocks > g.rows, g.rows != rows,
		g.rows > 0 && g.body.blocks == 0:
		return nil, 0, 0, fmt.Errorf("%w: sizes", ErrAltered)
	}
	return g, extra, words, nil
}

// OpenSegment opens a segment in a file of the state directory and reads it once
// from end to end: nothing of it is believed before its checksums, version and
// bounds are known to hold. Its entries stay in the file, which must not be
// written to any more; it may be removed. Errors wrap ErrSegment, or are the
// file's.
func OpenSegment(path string) (*Segment, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	fi, err := f.Stat()
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	g, err := load(io.NewSectionReader(f, 0, fi.Size()), fi.Size(), false)
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	g.body.file = f
	return g, nil
}

// ReadSegment reads a segment of the given size onto the heap, and verifies it
// as OpenSegment does. Errors wrap ErrSegment, or are the reader's.
func ReadSegment(r io.Reader, size int64) (*Segment, error) { return load(r, size, true) }

func load(r io.Reader, size int64, keep bool) (*Segment, error) {
	head := make([]byte, blockSize)
	if _, err := io.ReadFull(r, head); err != nil {
		return nil, torn(err)
	}
	g, extra, words, err := decodeHeader(head, size)
	if err != nil {
		return nil, err
	}
	sha := startHash()
	defer sha.stop()
	tenants, err := g.loadBlocks(r, sha, keep)
	if err != nil {
		return nil, err
	}
	if g.extra, err = readExactly(r, extra); err != nil {
		return nil, err
	}
	sha.write(g.extra)
	if err := g.loadFilter(r, sha, words); err != nil {
		return nil, err
	}
	if headerSum(head, sha.stop()) != g.sum {
		return nil, fmt.Errorf("%w: checksum", ErrAltered)
	}
	if err := g.parseExtra(); err != nil {
		return nil, err
	}
	if tenants > len(g.ids) {
		return nil, fmt.Errorf("%w: %d tenants of %d", ErrAltered, len(g.ids), tenants)
	}
	g.filter.seal()
	g.indexed = g.sumIndex()
	return g, nil
}

func torn(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return ErrTorn
	}
	return err
}

// readExactly reads n bytes, allocating only as they come: n is not to be
// trusted yet.
func readExactly(r io.Reader, n int) ([]byte, error) {
	var out bytes.Buffer
	if m, err := io.CopyN(&out, r, int64(n)); err != nil || m != int64(n) {
		return nil, torn(err)
	}
	return out.Bytes(), nil
}

// hashing computes a SHA-256 beside what reads the bytes, since each takes as
// long as the other.
type hashing struct {
	in   chan []byte
	back chan []byte
	sum  chan []byte
	h    hash.Hash
	out  []byte
}

func startHash() *hashing {
	s := &hashing{in: make(chan []byte, 1), back: make(chan []byte, 2), sum: make(chan []byte, 1), h: sha256.New()}
	s.back <- nil
	s.back <- nil
	go func() {
		for b := range s.in {
			s.h.Write(b)
			s.back <- b
		}
		s.sum <- s.h.Sum(nil)
	}()
	return s
}

// buffer returns a buffer of n bytes that may be filled and written.
func (s *hashing) buffer(n int) []byte {
	if b := <-s.back; cap(b) >= n {
		return b[:n]
	}
	return make([]byte, n)
}

// write takes over a buffer of buffer's.
func (s *hashing) send(b []byte) { s.in <- b }

// write hashes b, which stays the caller's.
func (s *hashing) write(b []byte) {
	buf := s.buffer(len(b))
	copy(buf, b)
	s.send(buf)
}

// stop ends the goroutine and returns the sum.
func (s *hashing) stop() []byte {
	if s.out == nil {
		close(s.in)
		s.out = <-s.sum
	}
	return s.out
}

// loadBlocks also returns how many tenants the rows take for granted.
func (g *Segment) loadBlocks(r io.Reader, sha *hashing, keep bool) (tenants int, err error) {
	var last session.Digest
	rows := 0
	for i := 0; i < g.body.blocks; {
		n := min(slabBlocks, g.body.blocks-i)
		buf := sha.buffer(n * blockSize)
		if _, err := io.ReadFull(r, buf); err != nil {
			return 0, torn(err)
		}
		if keep {
			g.body.slabs = append(g.body.slabs, bytes.Clone(buf))
		}
		for j := range n {
			b := buf[j*blockSize : (j+1)*blockSize]
			if err := checkBlock(b, i+j, g.salt); err != nil {
				return 0, fmt.Errorf("%w: %w", ErrAltered, err)
			}
			first, end := row(b, 0), row(b, blockRows(b)-1)
			if bytes.Compare(last[:], first[:16]) > 0 || bytes.Compare(first[:16], end[:16]) > 0 {
				return 0, fmt.Errorf("%w: order of blocks", ErrAltered)
			}
			copy(last[:], end)
			top, err := checkContent(b)
			if err != nil {
				return 0, err
			}
			tenants = max(tenants, top)
			rows += blockRows(b)
			g.index(b)
		}
		sha.send(buf)
		i += n
	}
	if rows != g.rows {
		return 0, fmt.Errorf("%w: %d rows of %d", ErrAltered, rows, g.rows)
	}
	return tenants, nil
}

// checkContent holds what is in a block to what its readers take for granted,
// and returns how many tenants that includes.
func checkContent(b []byte) (tenants int, err error) {
	metas := blockMetas(b)
	var wide [maxMetas]bool
	for i := range metas {
		m, err := blockMeta(b, i)
		if err != nil {
			return 0, fmt.Errorf("%w: %w", ErrAltered, err)
		}
		if m.fixed[1] <= uint8(session.KindTenant) || m.fixed[1] > 63 || !session.Effect(m.fixed[2]).Valid() {
			return 0, fmt.Errorf("%w: meta", ErrAltered)
		}
		if wide[i] = m.wide != nil; wide[i] {
			if expires, since, _ := wideTimes(m.wide); expires < 0 || since < 0 {
				return 0, fmt.Errorf("%w: time", ErrAltered)
			}
		}
	}
	for i, n := 0, blockRows(b); i < n; i++ {
		r := row(b, i)
		if rowMeta(r) >= metas {
			return 0, fmt.Errorf("%w: row", ErrAltered)
		}
		if !wide[rowMeta(r)] {
			tenants = max(tenants, 1+int(binary.BigEndian.Uint16(r[16:])))
		}
	}
	return tenants, nil
}

// index notes where a block begins and when its first row ends.
func (g *Segment) index(b []byte) {
	g.first = append(g.first, binary.BigEndian.Uint64(row(b, 0)))
	s := blockSoonest(b)
	if s <= 0 {
		s = math.MaxInt64
	}
	g.soonest = append(g.soonest, s)
}

func (g *Segment) loadFilter(r io.Reader, sha *hashing, words int) error {
	all := make([]uint64, 0, words) // decodeHeader held it to the size
	for left := words; left > 0; {
		n := min(left, slabBlocks*blockSize/8)
		buf := sha.buffer(8 * n)
		if _, err := io.ReadFull(r, buf); err != nil {
			return torn(err)
		}
		for i := range n {
			all = append(all, binary.LittleEndian.Uint64(buf[8*i:]))
		}
		sha.send(buf)
		left -= n
	}
	g.filter = sealBloom(all)
	return nil
}

// The extra section: tenants (4) | each: id (4), count (8) | residents (4) |
// each: key (21), length of meta (2), wide meta | length of the note (4), note.
func (g *Segment) encodeExtra() []byte {
	b := binary.BigEndian.AppendUint32(nil, uint32(len(g.tenants)))
	for _, id := range sortedTenants(g.tenants) {
		b = binary.BigEndian.AppendUint32(b, uint32(id))
		b = binary.BigEndian.AppendUint64(b, uint64(g.tenants[id]))
	}
	n := 0
	for _, records := range g.residents {
		n += len(records)
	}
	b = binary.BigEndian.AppendUint32(b, uint32(n))
	for _, k := range sortedKeys(g.residents) {
		for i := range g.residents[k] {
			r := &g.residents[k][i]
			b = putKey(b, &k)
			m := widen(appendMeta(nil, k.Shape, r), k.Tenant, r.Expires, r.Since, r.Seq)
			b = append(binary.BigEndian.AppendUint16(b, uint16(len(m))), m...)
		}
	}
	b = binary.BigEndian.AppendUint32(b, uint32(len(g.mark.Note)))
	return append(b, g.mark.Note...)
}

func (g *Segment) parseExtra() error {
	b, ok := g.extra, true
	take := func(n int) []byte {
		if !ok || n > len(b) {
			ok = false
			return make([]byte, n)
		}
		out := b[:n]
		b = b[n:]
		return out
	}
	g.tenants, g.residents = map[session.TenantID]int{}, map[session.Key][]session.Record{}
	for n := binary.BigEndian.Uint32(take(4)); n > 0 && ok; n-- {
		id, c := session.TenantID(binary.BigEndian.Uint32(take(4))), binary.BigEndian.Uint64(take(8))
		if c == 0 || c > maxSegment {
			ok = false
		}
		g.tenants[id] = int(c)
	}
	residents := 0
	for n := binary.BigEndian.Uint32(take(4)); n > 0 && ok; n-- {
		k := getKey(take(keyLen))
		m, err := parseMeta(take(int(binary.BigEndian.Uint16(take(2)))))
		if err != nil || !ok || m.wide == nil || !session.Effect(m.fixed[2]).Valid() || k.Shape > session.Shape(session.KindTenant) {
			ok = false
			break
		}
		r := m.record()
		if r.Expires, r.Since, r.Seq = wideTimes(m.wide); r.Expires < 0 || r.Since < 0 {
			ok = false
		}
		g.residents[k] = append(g.residents[k], r)
		residents++
	}
	if n := binary.BigEndian.Uint32(take(4)); n <= MaxNote {
		g.mark.Note = string(take(int(n)))
	}
	if !ok || len(b) > 0 || residents != g.Len()-g.rows {
		return fmt.Errorf("%w: tenants", ErrAltered)
	}
	g.ids = sortedTenants(g.tenants)
	for shape, n := range g.counts {
		if n > 0 && shape > int(session.KindTenant) {
			g.shapes = g.shapes.With(session.Shape(shape))
		}
	}
	return nil
}

// WriteTo writes the segment's form, as ReadSegment takes it. It verifies each
// block on the way.
func (g *Segment) WriteTo(w io.Writer) (total int64, err error) {
	put := func(b []byte) bool {
		var n int
		if err == nil {
			n, err = w.Write(b)
			total += int64(n)
		}
		return err == nil
	}
	put(g.header)
	if serr := g.scan(nil, func(_ int, b []byte) bool { return put(b) }); err == nil {
		err = serr
	}
	put(g.extra)
	var buf [8 * 512]byte
	for words := g.filter.words; len(words) > 0 && err == nil; {
		n := min(len(words), 512)
		for i := range n {
			binary.LittleEndian.PutUint64(buf[8*i:], words[i])
		}
		put(buf[:8*n])
		words = words[n:]
	}
	return total, err
}
