package filter

import (
	"math/rand/v2"
	"reflect"
	"slices"
	"testing"

	"github.com/interlock-fabric/interlock/pkg/session"
)

// TestOverlayDeniesWhatASetDoes: of batches that set and nothing else, and of
// others it takes no notice of the rest.
func TestOverlayDeniesWhatASetDoes(t *testing.T) {
	t.Parallel()
	w := newPeople(t)
	for seed := range uint64(200) {
		r := rand.New(rand.NewPCG(seed, 1))
		var s *Set
		var o *Overlay
		horizon := session.Instant(0)
		for number := uint64(1); number < 20; number++ {
			b := w.batch(r.IntN, number, horizon)
			horizon = b.Horizon
			o = o.Apply(b, nil)
			b.Entries = slices.DeleteFunc(b.Entries, func(e session.Entry) bool { return e.Op != session.OpSet })
			if len(b.Entries) > 0 { // a horizon alone lifts
				s = s.Apply(b, nil)
			}
			for _, p := range w.callers {
				for i := range w.calls {
					now := session.Moment{Authority: horizon}
					want, err := s.Decide(p, &w.calls[i], now)
					got, oerr := o.Decide(p, &w.calls[i], now)
					if err != nil || oerr != nil || got.Drill != want.Drill || got.Shape != want.Shape ||
						(got.Record == nil) != (want.Record == nil) || got.Record != nil && !equal(got.Record, want.Record) {
						t.Fatalf("seed %d, batch %d: %+v (%v), want %+v (%v)", seed, number, got, oerr, want, err)
					}
				}
			}
		}
	}
}

// TestOverlayCannotBeComparedOrSealed: it has no digest, so nothing must take it
// for a state that has one.
func TestOverlayCannotBeComparedOrSealed(t *testing.T) {
	var o *Overlay
	b := batch(1, put(session.EffectRevoked, userKey), put(session.EffectRevoked, sessionKey(1)))
	if o = o.Apply(b, nil); o.set.digest != (session.StateDigest{}) || o.set.Len() != 0 {
		t.Error("it is summed or counted")
	}
	for typ := range slices.Values([]reflect.Type{reflect.TypeFor[*Overlay](), reflect.TypeFor[Overlay]()}) {
		for i := range typ.NumMethod() {
			m := typ.Method(i)
			for j := range m.Type.NumOut() {
				switch m.Type.Out(j) {
				case reflect.TypeFor[*Set](), reflect.TypeFor[Set](), reflect.TypeFor[*Segment](), reflect.TypeFor[session.StateDigest](), reflect.TypeFor[RangeSums]():
					t.Errorf("%s returns a %s", m.Name, m.Type.Out(j))
				}
			}
		}
		for i := range reflect.TypeFor[Overlay]().NumField() {
			if f := reflect.TypeFor[Overlay]().Field(i); f.IsExported() || f.Anonymous {
				t.Errorf("%s is within reach", f.Name)
			}
		}
	}
}

// TestOverlayForgetsWhatIsReplaced: keys that are decided about again and again
// take no more room for it, and lose nothing.
func TestOverlayForgetsWhatIsReplaced(t *testing.T) {
	var o *Overlay
	for number := range uint64(3 * mergeFloor / session.MaxBatchEntries) {
		b := batch(number + 1)
		for i := range session.MaxBatchEntries {
			b.Entries = append(b.Entries, put(session.EffectRevoked, sessionKey(i)))
		}
		o = o.Apply(b, nil)
	}
	if n := o.set.layers.nodes(); n > mergeFloor+session.MaxBatchEntries {
		t.Errorf("%d nodes for %d keys", n, session.MaxBatchEntries)
	}
	n := 0
	o.Range(func(_ session.Key, r *session.Record) bool {
		n++
		return r.Seq > 1
	})
	if n != session.MaxBatchEntries {
		t.Errorf("%d records of %d", n, session.MaxBatchEntries)
	}
}
