// Package filter holds the revocation state: which entries are in force under
// which keys, and what they say about a caller.
//
// A Set is an immutable snapshot. A reader loads one through an atomic pointer
// and asks it without locks; the single writer derives the next one with Apply.
// A Set is a function of the batches applied to it and of nothing else, so that
// two that applied the same log have the same Digest.
package filter

import (
	"maps"
	"slices"

	"github.com/interlock-fabric/interlock/pkg/session"
)

// Set is an immutable snapshot of the revocation state. The zero value and nil
// are the empty state: it matches nobody, so whoever holds one must know from
// elsewhere that it is the verified state and not merely one that has not been
// loaded. All methods are safe for concurrent use.
type Set struct {
	// delta overrides base, key by key; an empty slice in it means that the
	// key's records in base are gone.
	base, delta map[session.Key][]session.Record
	// Global and tenant entries are kept apart: every check asks for them.
	global  []session.Record
	tenants map[session.TenantID][]session.Record

	shapes  session.ShapeSet
	counts  [64]int
	perTen  map[session.TenantID]int
	digest  session.StateDigest
	horizon session.Instant
	// soonest is not after the first end of a record; zero when none ends.
	soonest session.Instant
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

// TenantLen returns the number of records in force in a tenant, which is what a
// quota counts.
func (s *Set) TenantLen(id session.TenantID) int {
	if s == nil {
		return 0
	}
	return s.perTen[id]
}

// Lookup returns the records under a key. The slice must not be changed.
func (s *Set) Lookup(k session.Key) []session.Record {
	if s == nil {
		return nil
	}
	switch session.Kind(k.Shape) {
	case session.KindGlobal:
		return s.global
	case session.KindTenant:
		return s.tenants[k.Tenant]
	}
	if r, ok := s.delta[k]; ok {
		return r
	}
	return s.base[k]
}

// Range calls fn for every record in force, in no order, until fn returns
// false.
func (s *Set) Range(fn func(session.Key, *session.Record) bool) {
	if s == nil {
		return
	}
	each := func(k session.Key, records []session.Record) bool {
		for i := range records {
			if !fn(k, &records[i]) {
				return false
			}
		}
		return true
	}
	if !each(session.GlobalKey(), s.global) {
		return
	}
	for id, records := range s.tenants {
		if !each(session.TenantKey(id), records) {
			return
		}
	}
	for k, records := range s.delta {
		if !each(k, records) {
			return
		}
	}
	for k, records := range s.base {
		if _, over := s.delta[k]; over {
			continue
		}
		if !each(k, records) {
			return
		}
	}
}

// Match is the strongest record that matches a call. The zero Match matches
// nothing.
type Match struct {
	// Record denies the call; nil when nothing does.
	Record *session.Record
	// Shape is what Record was found under.
	Shape session.Shape
	// Drill would have denied the call, had it not been a drill.
	Drill *session.Record
}

// Stronger returns the stronger of two matches; m wins a tie.
func (m Match) Stronger(o Match) Match {
	if o.Record != nil && (m.Record == nil || o.Record.Effect > m.Record.Effect) {
		m.Record, m.Shape = o.Record, o.Shape
	}
	if m.Drill == nil {
		m.Drill = o.Drill
	}
	return m
}

// Decide finds the strongest record that matches this call of p. It takes no
// lock, and allocates nothing. The error is that of a call which cannot be
// named; it wraps session.ErrDenied.
func (s *Set) Decide(p *session.Prepared, call *session.Call, now session.Moment) (m Match, err error) {
	if s == nil || s.shapes == 0 {
		return m, nil
	}
	m.consider(s.global, session.Shape(session.KindGlobal), p, call, now)
	if len(s.tenants) > 0 {
		m.consider(s.tenants[p.Tenant()], session.Shape(session.KindTenant), p, call, now)
	}
	if s.shapes&p.Shapes() != 0 {
		for _, k := range p.Keys() {
			if s.shapes.Has(k.Shape) {
				m.consider(s.Lookup(k), k.Shape, p, call, now)
			}
		}
	}
	if s.shapes&session.PerCallShapes != 0 {
		return s.decideCall(m, p, call, now)
	}
	return m, nil
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
	for i := range keys {
		m.consider(s.Lookup(keys[i]), keys[i].Shape, p, call, now)
	}
	return m, nil
}

func (m *Match) consider(records []session.Record, shape session.Shape, p *session.Prepared, call *session.Call, now session.Moment) {
	for i := range records {
		r := &records[i]
		if r.Drill && m.Drill != nil || !r.Drill && m.Record != nil && m.Record.Effect >= r.Effect || !r.Matches(p, call, now) {
			continue
		}
		if r.Drill {
			m.Drill = r
		} else {
			m.Record, m.Shape = r, shape
		}
	}
}

// Apply returns the state after the batch. Only entries that take reports true
// for are applied; nil takes all. The receiver is unchanged and may be nil.
func (s *Set) Apply(b *session.Batch, take func(*session.Entry) bool) *Set {
	w := s.edit()
	for i := range b.Entries {
		if e := &b.Entries[i]; take == nil || take(e) {
			w.apply(e, b)
		}
	}
	if b.Horizon > w.horizon {
		w.expire(b.Horizon)
	}
	w.settle()
	return w
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
				w.put(k, func(have *session.Record) (session.Record, bool) {
					if have == nil {
						return *r, true
					}
					return stricter(have, *r), true
				}, r.Effect, false)
			}
			return true
		})
	}
	w.settle()
	if w.shapes == 0 {
		return nil
	}
	return w
}

// mergeAt is how large a delta grows before it is merged into a new base.
// Copying the delta with each batch and the base with each merge costs the
// least, per batch, when the delta is about the square root of the base; a
// sixteenth keeps memory churn low at the sizes that a map is meant for.
const mergeAt = 512

func (s *Set) edit() *Set {
	if s == nil {
		s = &Set{}
	}
	w := *s
	w.tenants = maps.Clone(s.tenants)
	w.perTen = maps.Clone(s.perTen)
	if w.perTen == nil {
		w.perTen = map[session.TenantID]int{}
	}
	if len(s.delta) > mergeAt+len(s.base)/16 {
		w.base = make(map[session.Key][]session.Record, len(s.base)+len(s.delta))
		maps.Copy(w.base, s.base)
		for k, records := range s.delta {
			if len(records) == 0 {
				delete(w.base, k)
			} else {
				w.base[k] = records
			}
		}
		w.delta = map[session.Key][]session.Record{}
	} else {
		w.delta = maps.Clone(s.delta)
		if w.delta == nil {
			w.delta = map[session.Key][]session.Record{}
		}
	}
	return &w
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

func (s *Set) store(k session.Key, records []session.Record) {
	switch session.Kind(k.Shape) {
	case session.KindGlobal:
		s.global = records
	case session.KindTenant:
		if s.tenants == nil {
			s.tenants = map[session.TenantID][]session.Record{}
		}
		s.tenants[k.Tenant] = records
		if len(records) == 0 {
			delete(s.tenants, k.Tenant)
		}
	default:
		s.delta[k] = records
	}
}

func (s *Set) account(k session.Key, r *session.Record, n int) {
	s.counts[k.Shape] += n
	s.perTen[k.Tenant] += n
	if s.perTen[k.Tenant] == 0 {
		delete(s.perTen, k.Tenant)
	}
	if n > 0 {
		s.digest.Plus(r.Sum(k))
	} else {
		s.digest.Minus(r.Sum(k))
	}
}

func (s *Set) apply(e *session.Entry, b *session.Batch) {
	s.put(e.Key, func(have *session.Record) (session.Record, bool) { return Step(have, e, b) }, e.Effect, e.Drill)
}

// put replaces the record of an effect under a key by what step makes of it.
func (s *Set) put(k session.Key, step func(*session.Record) (session.Record, bool), effect session.Effect, drill bool) {
	old := s.Lookup(k)
	i := slices.IndexFunc(old, func(r session.Record) bool { return r.Effect == effect && r.Drill == drill })
	var have *session.Record
	if i >= 0 {
		have = &old[i]
	}
	next, keep := step(have)
	// What the horizon has passed already never comes in, so that the state does
	// not depend on where one batch ends and the next begins.
	keep = keep && !ended(&next, s.horizon)
	if have == nil && !keep {
		return
	}
	// Readers hold the old slice: never write to it.
	records := make([]session.Record, 0, len(old)+1)
	for j := range old {
		if j != i {
			records = append(records, old[j])
		}
	}
	if have != nil {
		s.account(k, have, -1)
	}
	if keep {
		records = append(records, next)
		s.account(k, &next, +1)
		if next.Expires != 0 && (s.soonest == 0 || next.Expires < s.soonest) {
			s.soonest = next.Expires
		}
	}
	s.store(k, records)
}

// Step is the rule of the vocabulary for one effect on one key: given the
// record in force, if any, what is in force after the entry. A set never
// weakens what is there; a lift of a terminal revocation does nothing; a lift
// of any other revocation leaves its issued-before behind.
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

// ended reports whether the horizon has passed the record.
func ended(r *session.Record, horizon session.Instant) bool {
	return r.Expires != 0 && r.Expires <= horizon
}

// expire drops what the horizon says has nothing left to match.
func (s *Set) expire(horizon session.Instant) {
	s.horizon = horizon
	if s.soonest == 0 || s.soonest > horizon {
		return
	}
	s.soonest = 0
	var keys []session.Key
	s.Range(func(k session.Key, r *session.Record) bool {
		switch {
		case ended(r, horizon):
			keys = append(keys, k)
		case r.Expires != 0 && (s.soonest == 0 || r.Expires < s.soonest):
			s.soonest = r.Expires
		}
		return true
	})
	for _, k := range slices.Compact(keys) { // a key's records come together
		var keep []session.Record
		old := s.Lookup(k)
		for i := range old {
			if ended(&old[i], horizon) {
				s.account(k, &old[i], -1)
			} else {
				keep = append(keep, old[i])
			}
		}
		s.store(k, keep)
	}
}
