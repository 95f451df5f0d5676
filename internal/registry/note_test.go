package registry

import (
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"testing"

	"github.com/interlock-fabric/interlock/pkg/natsfeed"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// TestNotes: what authorities note is changed by revision, bounded by all that is
// there, whoever writes it, and outlasts snapshots and starts; what was taken away
// stays away.
func TestNotes(t *testing.T) {
	w := newWorld(t, true)
	rs := []*Registry{w.open(Options{SnapshotBatches: 10}), w.open(Options{})}
	r := rs[0]
	errFull := errors.New("enough")
	atMost := func(n int) func([]Note) ([]string, error) {
		return func(have []Note) ([]string, error) {
			if len(have) >= n {
				return nil, errFull
			}
			return nil, nil
		}
	}
	put := func(r *Registry, n Note, admit func([]Note) ([]string, error)) (uint64, error) {
		return r.PutNote(w.ctx, n, admit)
	}
	one, err := put(r, Note{Kind: "a", ID: "1", Content: json.RawMessage(`{"x":1}`)}, atMost(1))
	must(t, err)
	if _, err := put(r, Note{Kind: "a", ID: "1", Content: json.RawMessage(`{"x":2}`)}, nil); !is(err, ErrConflict) {
		t.Errorf("in place of another revision: %v", err)
	}
	if _, err := put(r, Note{Kind: "a", ID: "2", Revision: one, Content: json.RawMessage(`{}`)}, nil); !is(err, ErrUnknown) {
		t.Errorf("in place of none: %v", err)
	}
	if _, err := put(r, Note{Kind: "a", ID: "2"}, nil); !is(err, ErrUnknown) {
		t.Errorf("taking away what is not there: %v", err)
	}
	if _, err := put(r, Note{Kind: "a", ID: "2", Content: make(json.RawMessage, MaxNote+1)}, nil); !is(err, session.ErrInvalid) {
		t.Errorf("too long: %v", err)
	}
	if _, err := put(r, Note{Kind: "a", ID: "2", Content: json.RawMessage(`{}`)}, atMost(1)); !errors.Is(err, errFull) {
		t.Errorf("one too many: %v", err)
	}
	two, err := put(r, Note{Kind: "a", ID: "1", Revision: one, Content: json.RawMessage(`{"x":2}`)}, nil)
	must(t, err)

	// Many at once, by both: no more than are admitted.
	const limit = 12
	var wg sync.WaitGroup
	for i := range 40 {
		wg.Go(func() {
			if _, err := put(rs[i%2], Note{Kind: "b", ID: fmt.Sprint(i), Content: json.RawMessage(`{}`)}, atMost(limit)); err != nil && !errors.Is(err, errFull) {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	have, err := r.Notes("b")
	if err != nil || len(have) != limit {
		t.Fatalf("%d of %d notes, %v", len(have), limit, err)
	}
	// One in place of two, which go away with it, and one that is taken away.
	_, err = put(r, Note{Kind: "b", ID: have[0].ID, Revision: have[0].Revision, Content: json.RawMessage(`{"y":1}`)},
		func([]Note) ([]string, error) { return []string{have[1].ID, have[2].ID}, nil })
	must(t, err)
	_, err = put(r, Note{Kind: "b", ID: have[3].ID, Revision: have[3].Revision}, nil)
	must(t, err)

	n := 0
	w.until("trimmed", func() bool { n++; w.register(r, ses(n)); return w.state(natsfeed.RegistryStream).FirstSeq > 20 })
	w.until("the other has read it", func() bool { return rs[1].Status().Number == r.Status().Number })
	for _, r := range append(rs, w.open(Options{})) {
		a, err := r.Notes("a")
		if err != nil || len(a) != 1 || a[0].Revision != two || string(a[0].Content) != `{"x":2}` {
			t.Errorf("%+v, %v", a, err)
		}
		b, err := r.Notes("b")
		if err != nil || len(b) != limit-3 || b[0].ID != have[0].ID || string(b[0].Content) != `{"y":1}` {
			t.Errorf("%+v, %v", b, err)
		}
	}
}

// TestNotesAreNotKnownBeforeTheLogIs: nobody takes their absence for an answer.
func TestNotesAreNotKnownBeforeTheLogIs(t *testing.T) {
	r := &Registry{x: newIndex()}
	if _, err := r.Notes("a"); !is(err, ErrUnavailable) {
		t.Error(err)
	}
}
