package filter

import (
	"fmt"
	"path/filepath"
	"testing"

	"github.com/interlock-fabric/interlock/pkg/session"
)

// sessions is a state of n sessions in a file, and what prepares callers for it.
func sessions(t *testing.T, n int) (*world, *Set) {
	t.Helper()
	w := newWorld(t)
	var s *Set
	for at := 0; at < n; at += session.MaxBatchEntries {
		b := &session.Batch{Number: uint64(at/session.MaxBatchEntries + 1)}
		for i := at; i < min(n, at+session.MaxBatchEntries); i++ {
			b.Entries = append(b.Entries, put(session.EffectRevoked, sessionKey(i)))
		}
		s = s.Apply(b, nil)
	}
	g, err := s.Seal(filepath.Join(t.TempDir(), "s"), Mark{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = g.Close() })
	return w, g.Set()
}

// stranger is a caller that nobody has decided on.
func (w *world) stranger(t *testing.T, i int) *session.Prepared {
	t.Helper()
	id := w.callers[0]
	id.Session, id.Ancestors = session.SessionRef{ID: fmt.Sprint("stranger-", i), Issuer: id.Session.Issuer}, nil
	return w.prepare(t, id)
}

// TestFailure08ACheckScansNothing: elsewhere, every check looks through every lock.
// Here the entries are out of reach, their file is closed, and callers who are not
// revoked are answered all the same: a check reads no entry, but for the few that
// the filter takes for others.
func TestFailure08ACheckScansNothing(t *testing.T) {
	w, s := sessions(t, 50_000)
	if err := s.Segment().Close(); err != nil {
		t.Fatal(err)
	}
	const n = 200
	answered := 0
	for i := range n {
		if m, err := s.Decide(w.stranger(t, i), &session.Call{}, session.Moment{}); err == nil && m.Record == nil {
			answered++
		}
		s.seg.broken.Store(nil) // what one has met is not the next one's
	}
	if answered < n*95/100 {
		t.Fatalf("%d of %d were answered without a look at the entries", answered, n)
	}
}

// TestFailure11AFilterHitIsLookedUp: elsewhere, a positive of the filter is a
// denial. Here callers whom the filter takes for revoked are looked up, and
// allowed. Without confirm they would all be denied.
func TestFailure11AFilterHitIsLookedUp(t *testing.T) {
	w, s := sessions(t, 50_000)
	const want = 3
	hits := 0
	for i := 0; hits < want; i++ {
		if i == 500_000 {
			t.Fatalf("%d false positives in %d callers: is the filter asked at all?", hits, i)
		}
		p := w.stranger(t, i)
		for _, k := range p.Keys() {
			if s.Shapes().Has(k.Shape) && s.seg.filter.has(&k) {
				hits++
				if m, err := s.Decide(p, &session.Call{}, session.Moment{}); err != nil || m.Record != nil {
					t.Fatalf("caller %d, whom nobody has revoked: %+v, %v", i, m.Record, err)
				}
			}
		}
	}
}
