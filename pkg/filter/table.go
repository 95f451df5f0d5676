package filter

import (
	"encoding/binary"
	"math/bits"
	"sync/atomic"

	"github.com/interlock-fabric/interlock/pkg/session"
)

// packed is one record in force: what it says, which the entries of a decision
// share, and when it ends. The shared part's Expires is zero.
type packed struct {
	meta    *session.Record
	expires session.Instant
}

// live reports whether the record has not left the state at the horizon.
func (p packed) live(horizon session.Instant) bool {
	return p.meta != nil && (p.expires == 0 || p.expires > horizon)
}

func (p packed) record() session.Record {
	r := *p.meta
	r.Expires = p.expires
	return r
}

// table is the delta: a hash table that remembers its own past. Each batch is a
// version; a node belongs to the version that wrote it, and points to the node
// that it replaced. So one writer appends while any number of readers, each at
// the version that its Set is of, go on reading without locks, and a batch costs
// what its entries cost, whatever the size of the table.
//
//	slots ──► node (key, version 7) ──prev──► node (version 3)
//
// In front of the slots stands a fence, a bloom filter of one word a key: it is
// an eighth of their size, so that it stays in the near cache, and tells a check
// of most keys that the table does not have them.
//
// Only the Set of the newest version can append; a Set of an older one that is
// applied to anew starts a table of its own, above this one (see layer).
type table struct {
	tip atomic.Uint32 // newest version, taken by whoever appends to it
	// line is shared by the tables of one line of versions, of which each but
	// the first is a copy of what the one before still held; base is the version
	// up to which it had been merged.
	line *line
	base uint32

	// The rest is the writer's. A reader reaches a node only through a slot,
	// whose atomic store came after the node was written.
	chunks [27][]node
	n      uint32   // nodes
	keys   int      // distinct ones
	slots  []uint64 // read and, once a reader may have them, written atomically
	fence  []uint64 // the same
	shapes session.ShapeSet
}

// node is what is in force under a key from a version on. With first.meta nil,
// nothing is. A node whose key has shape 0 counts a tenant's records instead, in
// first.expires.
type node struct {
	key       session.Key
	ver, prev uint32 // prev is an index plus 1
	first     packed
	more      *[]packed
}

// append appends the node's records that have not left at the horizon.
func (n *node) append(horizon session.Instant, to []packed) []packed {
	if n.first.live(horizon) {
		to = append(to, n.first)
	}
	if n.more != nil {
		for _, p := range *n.more {
			if p.live(horizon) {
				to = append(to, p)
			}
		}
	}
	return to
}

// each calls fn for the node's records that have not left at the horizon.
func (n *node) each(horizon session.Instant, fn func(packed)) {
	if n.first.live(horizon) {
		fn(n.first)
	}
	if n.more != nil {
		for _, p := range *n.more {
			if p.live(horizon) {
				fn(p)
			}
		}
	}
}

const (
	firstChunk = 16
	firstSlots = 32
	maxNodes   = firstChunk * (1<<27 - 1)
	maxVersion = 1 << 31
)

// line is the identity of a line of versions. nodes is how many changes the
// newest of them has.
type line struct{ nodes atomic.Int64 }

// newTable makes a table with room for that many keys. Whoever copies one table
// into another must ask for it: keys come in the order of their places, and would
// crowd at the beginning of a table that grows under them.
func newTable(l *line, keys int) *table {
	slots := firstSlots
	for slots < 2*keys {
		slots *= 2
	}
	return &table{line: l, slots: make([]uint64, slots), fence: make([]uint64, slots/8)}
}

// tagOf is what a slot keeps of a key. Its top bits are the key's place, and all
// of it can be had from the slot, so that a table grows without a look at its
// nodes. A digest is uniform already; tenants and their counts have none.
func tagOf(k *session.Key) uint32 {
	t := binary.BigEndian.Uint32(k.Digest[:4])
	if k.Shape <= session.Shape(session.KindTenant) {
		t ^= uint32(k.Tenant) * 0x9e3779b1
	}
	return t
}

// place is where the search for a tag begins in that many slots, a power of 2.
func place(tag uint32, slots int) int { return int(tag >> bits.LeadingZeros32(uint32(slots-1))) }

// guard returns the word of a fence that a tag has, and its bits there.
func guard(tag uint32, fence int) (word int, mask uint64) {
	return place(tag, fence), 1<<(tag&63) | 1<<(tag>>6&63) | 1<<(tag>>12&63)
}

// node returns the node of an index. Chunks double in size and never move.
func (t *table) node(i uint32) *node {
	c := bits.Len32(i/firstChunk+1) - 1
	return &t.chunks[c][i-firstChunk*(1<<c-1)]
}

// newest returns the index plus 1 of the newest node of a key, and the slot that
// holds it or would.
func newest(t *table, slots []uint64, k *session.Key) (idx uint32, slot *uint64) {
	tag := tagOf(k)
	for i := place(tag, len(slots)); ; i++ {
		s := &slots[i&(len(slots)-1)]
		w := atomic.LoadUint64(s)
		if w == 0 {
			return 0, s
		}
		if uint32(w>>32) == tag && t.node(uint32(w)-1).key == *k {
			return uint32(w), s
		}
	}
}

// at returns the node that a version has written for a key, or nil.
func (t *table) at(k *session.Key, ver uint32) *node {
	if idx, _ := newest(t, t.slots, k); idx != 0 {
		if n := t.node(idx - 1); n.ver == ver {
			return n
		}
	}
	return nil
}

// put returns the node to fill in for a key at a version that no reader has yet.
func (t *table) put(k *session.Key, ver uint32) *node {
	idx, slot := newest(t, t.slots, k)
	if idx != 0 {
		if n := t.node(idx - 1); n.ver == ver {
			return n
		}
	} else {
		if 2*(t.keys+1) > len(t.slots) {
			t.grow()
			_, slot = newest(t, t.slots, k)
		}
		t.keys++
	}
	i := t.n
	t.n++
	if c := bits.Len32(i/firstChunk+1) - 1; t.chunks[c] == nil {
		t.chunks[c] = make([]node, firstChunk<<c)
	}
	n := t.node(i)
	n.key, n.ver, n.prev = *k, ver, idx
	tag := tagOf(k)
	atomic.StoreUint64(slot, uint64(tag)<<32|uint64(i+1))
	if idx == 0 {
		j, mask := guard(tag, len(t.fence))
		atomic.StoreUint64(&t.fence[j], t.fence[j]|mask)
	}
	t.shapes = t.shapes.With(k.Shape)
	return n
}

// touch brings the slots of the entries' keys into the cache, all at once rather
// than one after the other as each entry is applied.
func (t *table) touch(entries []session.Entry) {
	for i := range entries {
		atomic.LoadUint64(&t.slots[place(tagOf(&entries[i].Key), len(t.slots))])
	}
}

// grow makes room in new arrays: readers of older versions keep those that they
// have, which hold all that they may see.
func (t *table) grow() {
	slots, fence := make([]uint64, 2*len(t.slots)), make([]uint64, 2*len(t.fence))
	for _, w := range t.slots {
		if w == 0 {
			continue
		}
		tag := uint32(w >> 32)
		i := place(tag, len(slots))
		for slots[i] != 0 {
			i = (i + 1) & (len(slots) - 1)
		}
		slots[i] = w
		j, mask := guard(tag, len(fence))
		fence[j] |= mask
	}
	t.slots, t.fence = slots, fence
}

// layer is a table as one Set sees it: the versions after from, up to to.
type layer struct {
	t        *table
	slots    []uint64
	fence    []uint64
	from, to uint32
	n        uint32 // nodes at to
	shapes   session.ShapeSet
}

// find returns what the layer has for a key, or nil.
func (l *layer) find(k *session.Key) *node {
	idx, _ := newest(l.t, l.slots, k)
	return l.visible(idx)
}

// sift returns those of the keys in mask that the layer may have. As with the
// filter, all the memory is asked for before any of the answers is needed.
func (l *layer) sift(keys []session.Key, mask uint64) (maybe uint64) {
	fence := l.fence
	for rest := mask; rest != 0; rest &= rest - 1 {
		i := bits.TrailingZeros64(rest)
		at, want := guard(tagOf(&keys[i]), len(fence))
		if atomic.LoadUint64(&fence[at])&want == want {
			maybe |= 1 << i
		}
	}
	return maybe
}

func (l *layer) visible(idx uint32) *node {
	for idx != 0 {
		n := l.t.node(idx - 1)
		switch {
		case n.ver <= l.from:
			return nil
		case n.ver <= l.to:
			return n
		}
		idx = n.prev
	}
	return nil
}

// each calls fn for each key's node until fn returns false.
func (l *layer) each(fn func(*node) bool) bool {
	for i := range l.slots {
		if n := l.visible(uint32(atomic.LoadUint64(&l.slots[i]))); n != nil && !fn(n) {
			return false
		}
	}
	return true
}

// layers are a Set's delta, oldest first: a key's newest node is in the last
// layer that has one. There is one layer, unless a Set was applied to twice.
type layers []layer

func (ls layers) find(k *session.Key) *node {
	for i := len(ls) - 1; i >= 0; i-- {
		if n := ls[i].find(k); n != nil {
			return n
		}
	}
	return nil
}

// each calls fn for each key's newest node until fn returns false.
func (ls layers) each(fn func(*node) bool) {
	for i := range ls {
		above := ls[i+1:]
		if !ls[i].each(func(n *node) bool { return above.find(&n.key) != nil || fn(n) }) {
			return
		}
	}
}

// nodes is at least how many keys the layers have.
func (ls layers) nodes() (n int) {
	for i := range ls {
		n += int(ls[i].n)
	}
	return n
}

// open returns layers whose last one can be appended to as the given version.
// Its slots, n, to and shapes are to be set when that is done.
func (ls layers) open() (layers, uint32) {
	out := make(layers, len(ls), len(ls)+1)
	copy(out, ls)
	if n := len(out); n > 0 {
		top := &out[n-1]
		if top.to < maxVersion && top.n < maxNodes/2 && top.t.tip.CompareAndSwap(top.to, top.to+1) {
			if top.from > top.t.base && top.t.n > 1024 {
				// What a merge has taken over is garbage here: leave it behind.
				*top = top.t.shed(top)
			}
			return out, top.to + 1
		}
	}
	// A branch. Layers stay few by merging those of like size.
	for n := len(out); n > 1 && 2*out[n-1].n >= out[n-2].n; n = len(out) {
		out = append(out[:n-2], copyLayers(out[n-2:]))
	}
	t := newTable(new(line), 0)
	t.tip.Store(1)
	return append(out, layer{t: t, slots: t.slots, fence: t.fence}), 1
}

// copyLayers returns one layer with what the given ones hold.
func copyLayers(ls layers) layer {
	t := newTable(new(line), ls.nodes())
	ls.each(func(n *node) bool {
		to := t.put(&n.key, 1)
		to.first, to.more = n.first, n.more
		return true
	})
	t.tip.Store(1)
	return t.layer(1)
}

// shed returns the layer in a table without what it does not show. Whoever calls
// it has taken the next version. The nodes keep their versions, so that the copy
// can be put onto a segment that was sealed before.
func (t *table) shed(l *layer) layer {
	out := newTable(t.line, int(l.n))
	out.base = l.from
	l.each(func(n *node) bool {
		to := out.put(&n.key, n.ver)
		to.first, to.more = n.first, n.more
		return true
	})
	out.tip.Store(l.to + 1)
	c := out.layer(l.to)
	c.from = l.from
	return c
}

func (t *table) layer(to uint32) layer {
	return layer{t: t, slots: t.slots, fence: t.fence, to: to, n: t.n, shapes: t.shapes}
}
