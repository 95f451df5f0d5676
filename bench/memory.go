package main

import (
	"errors"
	"path/filepath"
	"runtime"
	"runtime/metrics"
	"time"

	"github.com/interlock-fabric/interlock/pkg/filter"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// memory measures what an open enforcer holds on the heap, with a state directory
// and without, and the peak while the state is sealed.
func memory(b *bench, n int) error {
	w, _, err := b.revokedWorld(n)
	if err != nil {
		return err
	}
	defer w.close()
	w.state = nil // the file has it
	for _, x := range []struct{ name, dir, goal string }{
		{"heap of an open enforcer with a state directory, per entry", filepath.Join(b.dir, "enforcer"), "≤ 4.5 B"},
		{"heap of an open enforcer without, per entry", "", "≤ 40 B"},
	} {
		before := heap()
		e, err := w.open(b.ctx, x.dir)
		if err != nil {
			return err
		}
		entries := e.Status().Entries
		held := heap() - before
		if err := e.Close(); err != nil {
			return err
		}
		if entries < n {
			return errors.New("the enforcer did not hold all entries")
		}
		b.report.add(x.name, n, held/float64(entries), "B", either(n >= 10_000_000, x.goal, ""))
	}
	return b.peak(n, w.path)
}

// peak seals a state of a segment and a delta, to a file and to the heap, and
// reports by how much the heap was higher meanwhile than before.
func (b *bench) peak(n int, path string) error {
	g, err := filter.OpenSegment(path)
	if err != nil {
		return err
	}
	set := g.Set()
	batches(min(n/10, 1<<17), 33, kinds, func(x *session.Batch) { set = set.Apply(x, nil) })
	for _, x := range []struct{ name, to string }{
		{"peak heap while sealing into a file, to the sealed size", filepath.Join(b.dir, "sealed")},
		{"peak heap while sealing onto the heap, the result included, to the sealed size", ""},
	} {
		before := heap()
		stop, peak := make(chan struct{}), make(chan float64)
		go func() { peak <- highest(stop) }()
		g, err := set.Seal(x.to, filter.Mark{})
		close(stop)
		top := <-peak
		if err != nil {
			return err
		}
		b.report.add(x.name, n, (top-before)/float64(g.Size()), "×", "≤ 2 ×")
		if err := g.Close(); err != nil {
			return err
		}
	}
	runtime.KeepAlive(set)
	return nil
}

// highest is the most that the heap's objects took, garbage included, until stop.
func highest(stop <-chan struct{}) (top float64) {
	s := []metrics.Sample{{Name: "/memory/classes/heap/objects:bytes"}}
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for {
		metrics.Read(s)
		top = max(top, float64(s[0].Value.Uint64()))
		select {
		case <-stop:
			return top
		case <-tick.C:
		}
	}
}
