package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/interlock-fabric/interlock/pkg/enforce"
	"github.com/interlock-fabric/interlock/pkg/natsfeed"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// start measures how long an enforcer takes from nothing, or from its state
// directory, to the first request that it allows, over a bus in another process.
func start(b *bench, n int) (err error) {
	node, err := b.startNode("node", 5*time.Minute, "-log", strconv.Itoa(n))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, node.close()) }()
	b.report.add("entries decided at the sequencer, API and fsync left out", n, float64(n)/node.Decided/1e6, "M/s", "")
	enrollment, err := session.ParseEnrollment(node.Enrollment)
	if err != nil {
		return err
	}
	s := starter{b, enrollment, node.Number}
	repeat := pick(b, 3, 1)
	var cold, warm, heap []time.Duration
	for i := range repeat {
		dir := filepath.Join(b.dir, "state-"+strconv.Itoa(i))
		for _, x := range []struct {
			dir  string
			took *[]time.Duration
		}{{dir, &cold}, {dir, &warm}, {"", &heap}} {
			d, err := s.once(x.dir)
			if err != nil {
				return err
			}
			*x.took = append(*x.took, d)
		}
		if err := os.RemoveAll(dir); err != nil {
			return err
		}
	}
	b.report.add("cold start to the first allowed request", n, quantile(cold, .5).Seconds(), "s", "≤ 3 s")
	b.report.add("warm start to the first allowed request", n, quantile(warm, .5).Seconds(), "s", "≤ 0.5 s")
	b.report.add("cold start without a state directory", n, quantile(heap, .5).Seconds(), "s", "")
	return nil
}

type starter struct {
	b          *bench
	enrollment *session.Enrollment
	number     uint64 // the newest batch
}

// once opens an enforcer, and closes it again once it has seen all of the log.
func (s *starter) once(dir string) (took time.Duration, err error) {
	ctx, cancel := context.WithTimeout(s.b.ctx, time.Minute)
	defer cancel()
	began := time.Now()
	feed, err := natsfeed.Dial(s.enrollment, nil)
	if err != nil {
		return 0, err
	}
	e, err := enforce.Open(ctx, feed, &enforce.Options{Enrollment: s.enrollment, StateDir: dir})
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, e.Close()) }()
	p, err := e.Prepare(identity("1"))
	if err != nil {
		return 0, err
	}
	if err := e.Check(p, session.Call{}); err != nil {
		return 0, fmt.Errorf("denied: %w", err)
	}
	took = time.Since(began)
	if p, err = e.Prepare(identity("gone")); err != nil {
		return 0, err
	}
	if !errors.Is(e.Check(p, session.Call{}), session.ErrRevoked) {
		return 0, errors.New("a revoked caller was allowed")
	}
	if x := e.Status(); x.Confirmed < s.number {
		return 0, fmt.Errorf("ready at batch %d of %d", x.Confirmed, s.number)
	}
	return took, nil
}
