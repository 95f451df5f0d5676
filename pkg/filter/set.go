// Package filter holds the revocation state: which entries are in force under
// which keys, and what they say about a caller.
//
// A Set is an immutable snapshot. A reader loads one through an atomic pointer
// and asks it without locks; the single writer derives the next one with Apply.
// A Set is a function of the batches applied to it and of nothing else, so that
// two that applied the same log have the same Digest.
//
// Underneath, a Set is a Segment, sealed and immutable, and a small delta above
// it. Seal makes a new segment of both, in a file or on the heap, beside checks
// and arriving batches; Onto puts what has arrived meanwhile onto it. Whoever
// keeps a Set for long does so when Due says so.
package filter

import (
	"errors"
	"maps"
	"math/bits"
	"slices"

	"github.com/interlock-fabric/interlock/pkg/session"
)

// Set is an immutable snapshot of the revocation state. The zero value and nil
// are the empty state: it matches nobody, so whoever holds one must know from
// elsewhere that it is the verified state and not merely one that has not been
// loaded. All methods are safe for concurrent use.
type Set struct {
	seg *Segment // may be nil
	// layers override seg, key by key; a node without records in them means that
	// the key's records in seg are gone. They also count records by tenant.
	layers layers
	// Global entries are kept apart: every check asks for them.
	global []session.Record

	shapes session.ShapeSet
	counts [64]int
	digest session.StateDigest
	// Records that end at or before the horizon are gone, wherever they still
	// stand.
	horizon session.Instant
	// soonest is not after the first end of a record in the layers or global;
	// zero when none ends.
	soonest session.Instant
	bad     error
}

// Len returns the number of records in force.
func (s *Set) Len() int {
	if s == nil {
		return 0
	}
	n := 0
	for _, c := range s.counts {
		n += c
	}
	return n
}

// Digest returns the order-independent sum over the records in force.
func (s *Set) Digest() session.StateDigest {
	if s == nil {
		return session.StateDigest{}
	}
	return s.digest
}

// Shapes returns the shapes that have records in force.
func (s *Set) Shapes() session.ShapeSet {
	if s == nil {
		return 0
	}
	return s.shapes
}

// Err returns an error wrapping ErrDamaged once something that the set needs
// could not be read. From then on it decides nothing, and whoever holds it
// denies until it has another, built from the log or from a sound segment.
func (s *Set) Err() error {
	if s == nil {
		return nil
	}
	if s.bad != nil {
		return s.bad
	}
	return s.seg.Err()
}

// TenantLen returns the number of records in force in a tenant, which is what a
// quota counts.
func (s *Set) TenantLen(id session.TenantID) int {
	if s == nil {
		return 0
	}
	k := session.Key{Tenant: id}
	if n := s.layers.find(&k); n != nil {
		return int(n.first.expires)
	}
	if s.seg != nil {
		return s.seg.tenants[id]
	}
	return 0
}

func (s *Set) tenantCounts() map[session.TenantID]int {
	out := map[session.TenantID]int{}
	if s.seg != nil {
		maps.Copy(out, s.seg.tenants)
	}
	s.layers.each(func(n *node) bool {
		if n.key.Shape != 0 {
			return true
		}
		if out[n.key.Tenant] = int(n.first.expires); n.first.expires == 0 {
			delete(out, n.key.Tenant)
		}
		return true
	})
	return out
}

// residents are the global and tenant records, which a segment keeps in memory.
func (s *Set) residents() map[session.Key][]session.Record {
	out := map[session.Key][]session.Record{}
	put := func(k session.Key, records []session.Record) {
		if len(records) > 0 {
			out[k] = records
		}
	}
	put(session.GlobalKey(), s.global)
	if s.seg != nil {
		for k := range s.seg.residents {
			if k.Shape == session.Shape(session.KindTenant) {
				put(k, s.Lookup(k))
			}
		}
	}
	s.layers.each(func(n *node) bool {
		if n.key.Shape == session.Shape(session.KindTenant) {
			put(n.key, s.Lookup(n.key))
		}
		return true
	})
	return out
}

// Lookup returns the records under a key. The slice must not be changed. When
// they cannot be read it returns none, and Err is set.
func (s *Set) Lookup(k session.Key) []session.Record {
	records, _ := s.Find(k) // Err repeats the error
	return records
}

// Find is Lookup with the error, which wraps ErrDamaged.
func (s *Set) Find(k session.Key) ([]session.Record, error) {
	if s == nil {
		return nil, nil
	}
	if k == session.GlobalKey() {
		return s.global, s.Err()
	}
	var buf [8]packed
	all, err := s.under(s.layers, &k, true, buf[:0])
	if err != nil || len(all) == 0 {
		return nil, err
	}
	out := make([]session.Record, len(all))
	for i, p := range all {
		out[i] = p.record()
	}
	return out, nil
}

// under appends the records under a key other than the global one, as the layers
// and the segment have them. maybe is false when the filter has said already that
// the segment has none.
func (s *Set) under(ls layers, k *session.Key, maybe bool, to []packed) ([]packed, error) {
	if n := ls.find(k); n != nil {
		return n.append(s.horizon, to), nil
	}
	switch {
	case s.seg == nil:
	case s.bad != nil:
		return to, s.bad
	case k.Shape == session.Shape(session.KindTenant):
		for _, r := range s.seg.residents[*k] {
			if p := pack(&r); p.live(s.horizon) {
				to = append(to, p)
			}
		}
	case maybe && s.seg.filter.has(k):
		return s.seg.records(k, s.horizon, to)
	}
	return to, s.seg.Err()
}

// pack divides a record.
func pack(r *session.Record) packed {
	m := *r
	m.Expires = 0
	return packed{meta: &m, expires: r.Expires}
}

// Range calls fn for every record in force, in no order but that a key's come
// together, until fn returns false. When Err is set afterwards, some may be
// missing.
func (s *Set) Range(fn func(session.Key, *session.Record) bool) {
	if s == nil {
		return
	}
	goOn := true
	for i := range s.global {
		if goOn = fn(session.GlobalKey(), &s.global[i]); !goOn {
			return
		}
	}
	s.layers.each(func(n *node) bool {
		if n.key.Shape != 0 {
			n.each(s.horizon, func(p packed) {
				if goOn {
					r := p.record()
					goOn = fn(n.key, &r)
				}
			})
		}
		return goOn
	})
	if s.seg == nil || !goOn {
		return
	}
	for k, records := range s.seg.residents {
		if k.Shape != session.Shape(session.KindTenant) || s.layers.find(&k) != nil {
			continue
		}
		for _, r := range records {
			if pack(&r).live(s.horizon) && !fn(k, &r) {
				return
			}
		}
	}
	_ = s.rows(0, func(e *entry) bool { // Err repeats the error
		r := e.record()
		return fn(e.key, &r)
	})
}

// rows calls fn for every record in force that stands in the segment, or only for
// those that end by an instant.
func (s *Set) rows(by session.Instant, fn func(*entry) bool) error {
	var want func(int) bool
	if by != 0 {
		want = func(block int) bool { return s.seg.soonest[block] <= by }
	}
	var rerr error
	in := &reader{g: s.seg}
	err := s.seg.scan(want, func(_ int, b []byte) bool {
		in.turn(b)
		for i, n := 0, blockRows(b); i < n && rerr == nil; i++ {
			if by != 0 {
				if end, err := in.expires(i); err != nil || end == 0 || end > by {
					rerr = err
					continue
				}
			}
			e, err := in.read(i)
			if err != nil {
				rerr = err
				return false
			}
			if e.expires != 0 && e.expires <= s.horizon || len(s.layers) > 0 && s.layers.find(&e.key) != nil {
				continue
			}
			if !fn(e) {
				return false
			}
		}
		return rerr == nil
	})
	if rerr != nil {
		err = errors.Join(err, s.seg.damage(rerr))
	}
	return err
}

// Match is the strongest record that matches a call. The zero Match matches
// nothing.
type Match struct {
	// Record denies the call; nil when nothing does.
	Record *session.Record
	// Shape is what Record was found under.
	Shape session.Shape
	// Drill: a drill matches, which denies nothing.
	Drill bool
}

// Stronger returns the stronger of two matches; m wins a tie.
func (m Match) Stronger(o Match) Match {
	if o.Record != nil && (m.Record == nil || o.Record.Effect > m.Record.Effect) {
		m.Record, m.Shape = o.Record, o.Shape
	}
	m.Drill = m.Drill || o.Drill
	return m
}

// Decide finds the strongest record that matches this call of p. It takes no
// lock, and allocates nothing unless the call is denied. The error wraps
// session.ErrDenied: the call cannot be named, or what decides about it cannot
// be read (then Err is set).
func (s *Set) Decide(p *session.Prepared, call *session.Call, now session.Moment) (m Match, err error) {
	if s == nil {
		return m, nil
	}
	if s.bad != nil || s.seg.Err() != nil { // even if nothing is left: what was lost was something
		return m, unreadable()
	}
	if s.shapes == 0 {
		return m, nil
	}
	for i := range s.global {
		m.consider(&s.global[i], session.Shape(session.KindGlobal), p, call, now)
	}
	if s.shapes.Has(session.Shape(session.KindTenant)) {
		s.decideTenant(&m, p, call, now)
	}
	if s.shapes&p.Shapes() != 0 {
		if err := s.decideKeys(&m, p.Keys(), p, call, now); err != nil {
			return m, err
		}
	}
	if s.shapes&session.PerCallShapes != 0 {
		return s.decideCall(m, p, call, now)
	}
	return m, nil
}

func unreadable() error {
	return &session.DeniedError{Err: session.ErrStale, Detail: "the revocation state is damaged"}
}

func (s *Set) decideTenant(m *Match, p *session.Prepared, call *session.Call, now session.Moment) {
	k := session.TenantKey(p.Tenant())
	if n := s.layers.find(&k); n != nil {
		m.node(n, s.horizon, p, call, now)
		return
	}
	if s.seg == nil {
		return
	}
	records := s.seg.residents[k]
	for i := range records {
		if r := &records[i]; r.Expires == 0 || r.Expires > s.horizon {
			m.consider(r, k.Shape, p, call, now)
		}
	}
}

// decideCall is apart, so that its buffer is on the stack of only those checks
// that need it.
//
//go:noinline
func (s *Set) decideCall(m Match, p *session.Prepared, call *session.Call, now session.Moment) (Match, error) {
	var buf [session.MaxProbes]session.Key
	keys, err := p.CallKeys(buf[:0], call, s.shapes)
	if err != nil {
		return m, err
	}
	return m, s.decideKeys(&m, keys, p, call, now)
}

// decideKeys looks up at most 64 keys.
func (s *Set) decideKeys(m *Match, keys []session.Key, p *session.Prepared, call *session.Call, now session.Moment) error {
	var mask uint64
	for i := range keys {
		mask |= uint64(s.shapes) >> (keys[i].Shape & 63) & 1 << i
	}
	for l := len(s.layers) - 1; l >= 0 && mask != 0; l-- {
		layer := &s.layers[l]
		for rest := layer.sift(keys, mask); rest != 0; rest &= rest - 1 {
			i := bits.TrailingZeros64(rest)
			if n := layer.find(&keys[i]); n != nil {
				mask &^= 1 << i
				m.node(n, s.horizon, p, call, now)
			}
		}
	}
	if s.seg == nil || mask == 0 {
		return nil
	}
	for rest := s.seg.filter.sift(keys, mask); rest != 0; rest &= rest - 1 {
		if err := s.confirm(m, &keys[bits.TrailingZeros64(rest)], p, call, now); err != nil {
			return unreadable()
		}
	}
	return nil
}

// confirm asks the segment's exact entries about a key that the filter did not
// rule out.
//
//go:noinline
func (s *Set) confirm(m *Match, k *session.Key, p *session.Prepared, call *session.Call, now session.Moment) error {
	var e entry
	h, err := s.seg.seek(k, &e)
	if err != nil {
		return err
	}
	defer h.done()
	for h.lo < h.hi && e.key == *k {
		if e.expires == 0 || e.expires > s.horizon {
			m.entry(&e, p, call, now)
		}
		if h.lo++; h.lo < h.hi {
			if err := s.seg.read(h.b, h.lo, &e); err != nil {
				return s.seg.damage(err)
			}
		}
	}
	return nil
}

// entry is consider for a row of a segment. It makes a record of it only when
// that denies.
func (m *Match) entry(e *entry, p *session.Prepared, call *session.Call, now session.Moment) {
	var acr string
	if len(e.m.acr) > 0 {
		acr = p.Identity().ACR
	}
	var except [session.MaxExcept]session.Key
	r := e.m.lean(acr, &except)
	r.Expires, r.Since, r.Seq = e.expires, e.since, e.seq
	switch {
	case !m.weaker(&r) || !r.Matches(p, call, now):
	case r.Drill:
		m.Drill = true
	default:
		m.Record, m.Shape = new(session.Record), e.key.Shape
		*m.Record = e.record()
	}
}

// weaker reports whether a record, if it matched, would change m.
func (m *Match) weaker(r *session.Record) bool {
	if r.Drill {
		return !m.Drill
	}
	return m.Record == nil || m.Record.Effect < r.Effect
}

func (m *Match) consider(r *session.Record, shape session.Shape, p *session.Prepared, call *session.Call, now session.Moment) {
	switch {
	case !m.weaker(r) || !r.Matches(p, call, now):
	case r.Drill:
		m.Drill = true
	default:
		m.Record, m.Shape = r, shape
	}
}

func (m *Match) node(n *node, horizon session.Instant, p *session.Prepared, call *session.Call, now session.Moment) {
	if n.first.live(horizon) {
		m.packed(n.first, n.key.Shape, p, call, now)
	}
	if n.more != nil {
		for _, x := range *n.more {
			if x.live(horizon) {
				m.packed(x, n.key.Shape, p, call, now)
			}
		}
	}
}

func (m *Match) packed(x packed, shape session.Shape, p *session.Prepared, call *session.Call, now session.Moment) {
	r := x.record()
	switch {
	case !m.weaker(&r) || !r.Matches(p, call, now):
	case r.Drill:
		m.Drill = true
	default:
		m.Record, m.Shape = new(session.Record), shape
		*m.Record = r
	}
}

// Apply returns the state after the batch. Only entries that take reports true
// for are applied; nil takes all. The receiver is unchanged and may be nil. What
// the horizon has passed already comes into force no more.
//
// It costs what the batch's entries cost, whatever the size of the state, but
// for two things: a batch that moves the horizon looks through what may end by
// it, which took 15 to 20 ms at 1 million entries and 0.15 to 0.5 s at 10 million
// of which one in a hundred ended, and as much at each later move until a merge
// has left them out; and when nobody has merged for so long that the delta outgrows the
// segment, Apply does so itself, on the heap. Two states may be derived from
// one, by any goroutines; the second costs more than the first.
func (s *Set) Apply(b *session.Batch, take func(*session.Entry) bool) *Set {
	w := s.edit()
	w.batch(b, take)
	return w.publish()
}

func (w *edit) batch(b *session.Batch, take func(*session.Entry) bool) {
	for at := 0; at < len(b.Entries); at += 64 {
		part := b.Entries[at:min(at+64, len(b.Entries))]
		maybe := uint64(0)
		if w.seg != nil {
			maybe = w.seg.filter.siftEntries(part)
		}
		w.t.touch(part)
		for i := range part {
			if e := &part[i]; take == nil || take(e) {
				w.apply(e, b, maybe>>i&1 == 1)
			}
		}
	}
	if b.Horizon > w.horizon {
		w.expire(b.Horizon)
	}
}

// Merge returns a state that matches whatever any of the given ones matches,
// drills left out; nil when that is nobody. Where two have the same effect on the
// same key, the earlier set's decision is the one that a caller is told of if it
// reaches further. The result has no horizon yet.
func Merge(sets ...*Set) *Set {
	w := (*Set)(nil).edit()
	for _, s := range sets {
		s.Range(func(k session.Key, r *session.Record) bool {
			if !r.Drill {
				w.join(&k, r)
			}
			return true
		})
		if err := s.Err(); err != nil {
			w.bad = err
		}
	}
	out := w.publish()
	if out.shapes == 0 && out.bad == nil {
		return nil
	}
	return out
}

// edit is a Set in the making.
type edit struct {
	Set
	t   *table
	ver uint32
	// The tenant whose records were counted last, and its count's node.
	tenant session.TenantID
	count  *node
	meta   *session.Record // written last
	// bare is set for an overlay, which is neither counted nor summed.
	bare bool
}

func (s *Set) edit() *edit {
	if s == nil {
		s = &Set{}
	}
	if s.layers.nodes() > mergeAt(s.seg) {
		// Nobody merges: do it here. On failure the state is damaged anyway.
		if g, err := s.Seal("", Mark{}); err == nil {
			s = s.onto(g)
		} else {
			c := *s
			c.bad, s = err, &c
		}
	}
	return s.open()
}

// open is edit without a merge.
func (s *Set) open() *edit {
	w := &edit{Set: *s}
	w.layers, w.ver = s.layers.open()
	w.t = w.layers[len(w.layers)-1].t
	return w
}

// publish ends the editing.
func (w *edit) publish() *Set {
	top := &w.layers[len(w.layers)-1]
	from := top.from
	*top = w.t.layer(w.ver)
	top.from = from
	w.t.line.nodes.Store(int64(w.layers.nodes()))
	if !w.bare {
		w.settle()
	}
	out := w.Set
	return &out
}

// settle recomputes which shapes are present.
func (s *Set) settle() {
	s.shapes = 0
	for shape, n := range s.counts {
		if n > 0 {
			s.shapes = s.shapes.With(session.Shape(shape))
		}
	}
}

func (w *edit) account(k *session.Key, r *session.Record, n int) {
	if w.bare {
		w.shapes = w.shapes.With(k.Shape)
		return
	}
	w.counts[k.Shape] += n
	if w.count == nil || w.tenant != k.Tenant {
		c := session.Key{Tenant: k.Tenant}
		w.tenant, w.count = k.Tenant, w.t.at(&c, w.ver)
		if w.count == nil {
			have := w.TenantLen(k.Tenant) // as it was before this batch
			w.count = w.t.put(&c, w.ver)
			w.count.first.expires = session.Instant(have)
		}
	}
	w.count.first.expires += session.Instant(n)
	if n > 0 {
		w.digest.Plus(r.Sum(*k))
	} else {
		w.digest.Minus(r.Sum(*k))
	}
}

// apply puts into force what an entry makes of what is there. maybe is false when
// the segment's filter has ruled the key out.
func (w *edit) apply(e *session.Entry, b *session.Batch, maybe bool) {
	var buf [8]packed
	old, at, ok := w.find(&e.Key, maybe, e.Effect, e.Drill, buf[:0])
	if !ok {
		return
	}
	var have *session.Record
	if at >= 0 {
		r := old[at].record()
		have = &r
	}
	next, keep := Step(have, e, b)
	w.replace(&e.Key, old, at, have, &next, keep)
}

// join puts a record into force beside what is there.
func (w *edit) join(k *session.Key, r *session.Record) {
	var buf [8]packed
	old, at, ok := w.find(k, true, r.Effect, r.Drill, buf[:0])
	if !ok {
		return
	}
	if at < 0 {
		w.replace(k, old, at, nil, r, true)
		return
	}
	have := old[at].record()
	next := stricter(&have, *r)
	w.replace(k, old, at, &have, &next, true)
}

// find returns the records under a key, and the index of the effect's or -1.
func (w *edit) find(k *session.Key, maybe bool, effect session.Effect, drill bool, to []packed) (old []packed, at int, ok bool) {
	if k.Shape == session.Shape(session.KindGlobal) {
		for i := range w.global {
			to = append(to, pack(&w.global[i]))
		}
	} else {
		var err error
		if to, err = w.current(k, maybe, to); err != nil {
			w.bad = err
			return nil, -1, false
		}
	}
	for i := range to {
		if m := to[i].meta; m.Effect == effect && m.Drill == drill {
			return to, i, true
		}
	}
	return to, -1, true
}

// replace puts next, if it is to be kept, in the place of old[at], which is have.
func (w *edit) replace(k *session.Key, old []packed, at int, have, next *session.Record, keep bool) {
	keep = keep && (next.Expires == 0 || next.Expires > w.horizon)
	if have == nil && !keep {
		return
	}
	if have != nil {
		w.account(k, have, -1)
		old = slices.Delete(old, at, at+1)
	}
	if keep {
		w.account(k, next, +1)
		old = append(old, w.pack(next))
	}
	w.store(k, old)
}

// current is under for a Set in the making: the newest node of its own table is
// not in its layers yet.
func (w *edit) current(k *session.Key, maybe bool, to []packed) ([]packed, error) {
	if idx, _ := newest(w.t, w.t.slots, k); idx != 0 {
		if n := w.t.node(idx - 1); n.ver > w.layers[len(w.layers)-1].from {
			return n.append(w.horizon, to), nil
		}
	}
	return w.under(w.layers[:len(w.layers)-1], k, maybe, to)
}

// pack shares what the records of one decision have in common.
func (w *edit) pack(r *session.Record) packed {
	if w.meta == nil || !same(w.meta, r) {
		m := *r // only now on the heap
		m.Expires = 0
		w.meta = &m
	}
	return packed{meta: w.meta, expires: r.Expires}
}

func same(a, b *session.Record) bool {
	return a.Effect == b.Effect && a.Reason == b.Reason && a.Drill == b.Drill && a.Share == b.Share &&
		a.IssuedBefore == b.IssuedBefore && a.Since == b.Since && a.Seq == b.Seq &&
		a.Incident == b.Incident && a.ACR == b.ACR && slices.Equal(a.Except, b.Except)
}

func (w *edit) store(k *session.Key, records []packed) {
	for _, p := range records { // some may come from the segment
		if p.expires != 0 && (w.soonest == 0 || p.expires < w.soonest) {
			w.soonest = p.expires
		}
	}
	if k.Shape == session.Shape(session.KindGlobal) {
		w.global = make([]session.Record, len(records)) // readers hold the old one
		for i, p := range records {
			w.global[i] = p.record()
		}
		return
	}
	n := w.t.put(k, w.ver)
	n.first, n.more = packed{}, nil
	if len(records) > 0 {
		n.first = records[0]
	}
	if len(records) > 1 {
		more := slices.Clone(records[1:])
		n.more = &more
	}
}

// Step is the rule of the vocabulary for one effect on one key: given the
// record in force, if any, what is in force after the entry. A set never
// weakens what is there; a lift of a terminal revocation does nothing; a lift
// of any other revocation leaves its issued-before behind; a lift of anything else
// that has an issued-before leaves alone what was decided after it.
func Step(have *session.Record, e *session.Entry, b *session.Batch) (next session.Record, keep bool) {
	fresh := session.Record{
		Effect: e.Effect, Reason: e.Reason, Drill: e.Drill, IssuedBefore: e.IssuedBefore,
		Expires: e.Expires, Since: b.Time, Seq: b.Number, Incident: e.Incident, ACR: e.ACR, Except: e.Except,
	}
	if e.Op == session.OpSet {
		if have == nil {
			return fresh, true
		}
		return stricter(have, fresh), true
	}
	switch {
	case have == nil:
		return session.Record{}, false
	case e.Effect != session.EffectRevoked && e.IssuedBefore != 0 && have.Since > e.IssuedBefore:
		// Decided anew since: the lift is of what was before.
		return *have, true
	case e.Drill:
		return session.Record{}, false
	case e.Effect == session.EffectRevoked && e.Key.Shape.Terminal():
		return *have, true
	case e.Effect == session.EffectRevoked && have.IssuedBefore != 0:
		// It already binds only identities from before an instant, and those
		// stay dead: a lift must not make it reach later ones.
		return *have, true
	case e.Effect == session.EffectRevoked:
		fresh.IssuedBefore = max(e.IssuedBefore, have.Since)
		fresh.Except = have.Except
		return fresh, true
	case e.Share > 0 && e.Share < session.ShareUnit:
		staged := *have
		// A stage never takes back what an earlier one set free.
		staged.Share = max(have.Share, e.Share)
		return staged, true
	}
	return session.Record{}, false
}

// stricter merges a set into what is in force: the result matches whatever
// either matched.
func stricter(have *session.Record, set session.Record) session.Record {
	widens := false
	out := set
	switch {
	case have.IssuedBefore == 0:
		widens = widens || set.IssuedBefore != 0
		out.IssuedBefore = 0
	case set.IssuedBefore != 0 && have.IssuedBefore > set.IssuedBefore:
		widens = true
		out.IssuedBefore = have.IssuedBefore
	}
	switch {
	case have.Expires == 0:
		widens = widens || set.Expires != 0
		out.Expires = 0
	case set.Expires != 0 && have.Expires > set.Expires:
		widens = true
		out.Expires = have.Expires
	}
	var except []session.Key
	for _, k := range have.Except {
		if slices.Contains(set.Except, k) {
			except = append(except, k)
		}
	}
	widens = widens || len(except) < len(set.Except)
	out.Except = except
	out.Share = min(have.Share, set.Share)
	out.Since = max(have.Since, set.Since)
	if set.ACR == "" {
		// A set that asks for any authentication does not make do with less
		// than was asked for before. Of two that ask for different ones, which
		// no caller could both have, the later counts.
		out.ACR = have.ACR
	}
	if widens {
		// The first decision reaches further in some way: it stays the one that
		// a caller is told of.
		out.Reason, out.Incident, out.Seq = have.Reason, have.Incident, have.Seq
	}
	return out
}

// expire drops what the horizon says has nothing left to match. Only the sums
// change: what has ended is skipped wherever it stands, until the next merge
// leaves it out.
func (w *edit) expire(horizon session.Instant) {
	before := w.Set
	before.layers = slices.Clone(before.layers)
	before.layers[len(before.layers)-1] = func() layer {
		l := w.t.layer(w.ver)
		l.from = w.layers[len(w.layers)-1].from
		return l
	}()
	ended := func(e session.Instant) bool { return e != 0 && e <= horizon }
	if before.soonest != 0 && before.soonest <= horizon {
		w.soonest = 0
		note := func(e session.Instant) {
			if e != 0 && (w.soonest == 0 || e < w.soonest) {
				w.soonest = e
			}
		}
		var gone []*node
		before.layers.each(func(n *node) bool {
			if n.key.Shape == 0 {
				return true
			}
			some := false
			n.each(before.horizon, func(p packed) {
				if ended(p.expires) {
					some = true
				} else {
					note(p.expires)
				}
			})
			if some {
				gone = append(gone, n)
			}
			return true
		})
		for _, n := range gone {
			n.each(before.horizon, func(p packed) {
				if ended(p.expires) {
					r := p.record()
					w.account(&n.key, &r, -1)
				}
			})
		}
		var global []session.Record
		for i := range w.global {
			if r := &w.global[i]; ended(r.Expires) {
				k := session.GlobalKey()
				w.account(&k, r, -1)
			} else {
				note(r.Expires)
				global = append(global, *r)
			}
		}
		w.global = global
	}
	if g := w.seg; g != nil {
		for k, records := range g.residents {
			for i := range records {
				if r := &records[i]; k.Shape == session.Shape(session.KindTenant) && ended(r.Expires) && r.Expires > before.horizon && before.layers.find(&k) == nil {
					w.account(&k, r, -1)
				}
			}
		}
		err := before.rows(horizon, func(e *entry) bool {
			r := e.record()
			w.account(&e.key, &r, -1)
			return true
		})
		if err != nil {
			w.bad = err
		}
	}
	w.horizon = horizon
}
