package filter

import (
	"context"
	"fmt"
	"time"
)

// Scrub looks for rot: it verifies the filter, the index and every block against
// their checksums, one pass in the given time, again and again, until ctx ends
// (then it returns nil) or it has found damage (then an error wrapping
// ErrDamaged, which Err repeats). A confirmation verifies the block that it reads
// in any case; what only a scrub finds is a bit that fell out of the filter,
// which would hide an entry, and a file that can no longer be read.
//
// It does its work in slices of about a hundredth of a second, of which it
// spends the larger part waiting: a pass of 10 million entries in a minute takes
// about two thousandths of a core.
func (g *Segment) Scrub(ctx context.Context, pass time.Duration) error {
	steps := g.filter.chunks() + g.body.blocks/slabBlocks + 2
	wait := max(pass/time.Duration(steps), time.Millisecond)
	tick := time.NewTicker(wait)
	defer tick.Stop()
	buf := new([blockSize]byte)
	for {
		for step := range steps {
			select {
			case <-ctx.Done():
				return nil
			case <-tick.C:
			}
			if err := g.verify(step, buf); err != nil {
				return err
			}
		}
	}
}

// Verify is one pass of Scrub without a wait.
func (g *Segment) Verify() error {
	buf := new([blockSize]byte)
	for step := range g.filter.chunks() + g.body.blocks/slabBlocks + 2 {
		if err := g.verify(step, buf); err != nil {
			return err
		}
	}
	return nil
}

// verify does one step of a pass: a chunk of the filter, a slab of blocks, or
// the index.
func (g *Segment) verify(step int, buf *[blockSize]byte) error {
	if err := g.Err(); err != nil {
		return err
	}
	if step < g.filter.chunks() {
		if g.filter.sum(step) != g.filter.sums[step] {
			return g.damage(fmt.Errorf("%w: checksum of the filter", ErrDamaged))
		}
		return nil
	}
	step -= g.filter.chunks()
	if step > g.body.blocks/slabBlocks {
		if g.sumIndex() != g.indexed {
			return g.damage(fmt.Errorf("%w: checksum of the index", ErrDamaged))
		}
		return nil
	}
	for i := step * slabBlocks; i < min(g.body.blocks, (step+1)*slabBlocks); i++ {
		b, err := g.body.block(i, buf)
		if err == nil {
			err = checkBlock(b, i, g.salt)
		}
		if err != nil {
			return g.damage(err)
		}
	}
	return nil
}
