package filter

import (
	"slices"

	"github.com/interlock-fabric/interlock/pkg/session"
)

// Overlay is an immutable collection of what batches deny that are not in the
// state yet, to be asked beside a Set. It is cheaper than one: it counts nothing
// and sums nothing, and so has no Digest to compare and cannot be sealed. Nil is
// empty. All methods are safe for concurrent use.
type Overlay struct {
	set Set // without counts and digest
	// tidyAt is how many nodes to write before those that others have replaced
	// are left behind.
	tidyAt int
}

// Apply returns an overlay that denies what the batch denies, too. Only entries
// that set something, and that take reports true for, are applied; nil takes all.
// The receiver is unchanged. It costs what Set.Apply costs, less the digest.
func (o *Overlay) Apply(b *session.Batch, take func(*session.Entry) bool) *Overlay {
	sets := func(e *session.Entry) bool { return e.Op == session.OpSet && (take == nil || take(e)) }
	first := slices.IndexFunc(b.Entries, func(e session.Entry) bool { return sets(&e) })
	if first < 0 {
		return o
	}
	s, tidyAt := &Set{}, mergeFloor
	if o != nil {
		s, tidyAt = &o.set, o.tidyAt
	}
	if s.layers.nodes() > tidyAt {
		tidy := *s
		tidy.layers = layers{copyLayers(s.layers)}
		s, tidyAt = &tidy, max(mergeFloor, 2*tidy.layers.nodes())
	}
	w := s.open()
	w.bare = true
	w.batch(b, sets)
	return &Overlay{set: *w.publish(), tidyAt: tidyAt}
}

// Decide is Set.Decide for the overlay.
func (o *Overlay) Decide(p *session.Prepared, call *session.Call, now session.Moment) (Match, error) {
	if o == nil {
		return Match{}, nil
	}
	return o.set.Decide(p, call, now)
}

// Range calls fn for every record, in no order but that a key's come together,
// until fn returns false.
func (o *Overlay) Range(fn func(session.Key, *session.Record) bool) {
	if o != nil {
		o.set.Range(fn)
	}
}
