package filter

import (
	"context"
	"slices"
	"time"
)

// How many entries a delta may hold, of about 100 bytes each, before it is worth a
// merge; before that is worth one in the middle of a burst; and before Apply merges
// by itself, where the segment is not larger.
const (
	mergeFloor = 1 << 17        // 13 MiB
	mergeBurst = 4 * mergeFloor // 50 MiB
	mergeLast  = 8 * mergeFloor // 100 MiB
)

// mergeAt is where Apply merges by itself. With the delta as large as the
// segment, each entry is rewritten about as often as the state has doubled.
func mergeAt(g *Segment) int {
	n := mergeLast
	if g != nil {
		n = max(n, g.rows)
	}
	return n
}

// Due reports whether the delta is large enough to be merged with the segment:
// beyond 131,072 entries, an eighth of it, so that what a merge rewrites stays in
// proportion to what has arrived. The delta takes about 100 bytes an entry.
func (s *Set) Due() bool { return s.outgrown(mergeFloor) }

// Overdue is Due while more keeps arriving: merged once it has stopped, it is
// rewritten once. Beyond 524,288 entries, or 50 MiB, the merge does not wait.
func (s *Set) Overdue() bool { return s.outgrown(mergeBurst) }

func (s *Set) outgrown(floor int) bool {
	if s == nil {
		return false
	}
	n := s.layers.nodes()
	return n > floor && (s.seg == nil || n > s.seg.rows/8)
}

// A merge beside checks works for a while and then rests three times as long: a
// core that two threads share, and the memory, are the checks' alone for most of
// the time.
const (
	workFor = time.Millisecond
	restFor = 3 * workFor
)

// pacer makes a merge rest.
type pacer struct {
	done  <-chan struct{}
	err   func() error // why it is done
	line  *line
	limit int64
	since time.Time
	timer *time.Timer
}

func newPacer(ctx context.Context, s *Set) *pacer {
	p := &pacer{done: ctx.Done(), err: ctx.Err, since: time.Now()}
	if s != nil && len(s.layers) > 0 {
		// No rest once the delta has doubled, or is half way to where Apply would
		// have to merge.
		n := s.layers.nodes()
		p.line = s.layers[len(s.layers)-1].t.line
		p.limit = int64(min(max(2*n, mergeFloor), (n+mergeAt(s.seg))/2))
	}
	return p
}

func (p *pacer) rest() error {
	if time.Since(p.since) < workFor {
		return nil
	}
	if p.line != nil && p.line.nodes.Load() > p.limit {
		p.since = time.Now()
		return p.err()
	}
	if p.timer == nil {
		p.timer = time.NewTimer(restFor)
	} else {
		p.timer.Reset(restFor)
	}
	select {
	case <-p.done:
		p.timer.Stop()
		return p.err()
	case <-p.timer.C:
	}
	p.since = time.Now()
	return nil
}

// Segment returns the segment that the set stands on, or nil.
func (s *Set) Segment() *Segment {
	if s == nil {
		return nil
	}
	return s.seg
}

// Delta returns how many changes stand above the segment.
func (s *Set) Delta() int {
	if s == nil {
		return 0
	}
	return s.layers.nodes()
}

// Onto returns s on the segment that was sealed of an earlier state of it, with
// all that was applied since. It reports false, and returns s, when sealed is not
// such an earlier state. It copies nothing, so that it can be done between two
// batches, and the result goes on where s was: only one of the two may be
// applied to.
func (s *Set) Onto(sealed *Set, g *Segment) (*Set, bool) {
	if g == nil {
		return s, false
	}
	if s == nil {
		s = &Set{}
	}
	if sealed == nil {
		sealed = &Set{}
	}
	n := len(sealed.layers)
	if s.seg != sealed.seg || len(s.layers) < n || g.digest != sealed.digest || s.bad != nil {
		return s, false
	}
	for i := range n {
		a, b := &sealed.layers[i], &s.layers[i]
		if a.t.line != b.t.line || a.from != b.from || b.to < a.to || i < n-1 && b.to != a.to {
			return s, false
		}
	}
	out := *s
	out.seg, out.layers = g, slices.Clone(s.layers[n:])
	if n > 0 && s.layers[n-1].to > sealed.layers[n-1].to {
		// Versions after the one that was sealed.
		top := s.layers[n-1]
		top.from = sealed.layers[n-1].to
		top.n -= min(top.n, sealed.layers[n-1].n)
		out.layers = append(layers{top}, out.layers...)
	}
	return &out, true
}

// onto is Onto for the very state that was sealed.
func (s *Set) onto(g *Segment) *Set {
	out, _ := s.Onto(s, g)
	return out
}
