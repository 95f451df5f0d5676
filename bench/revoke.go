package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/interlock-fabric/interlock/internal/enrolled"
	"github.com/interlock-fabric/interlock/pkg/authority"
	"github.com/interlock-fabric/interlock/pkg/enforce"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// revoke measures one session revoked at the authority's API, to the moment at
// which the first and the last enforcer have cut that session's running call and
// denied its next one. The authority with its bus is a process of its own; the
// enforcers share this one, each with a connection.
func revoke(b *bench, _ int) error {
	for _, n := range []int{1, pick(b, 100, 10)} {
		if err := b.revokeOn(n); err != nil {
			return fmt.Errorf("%d enforcers: %w", n, err)
		}
	}
	return nil
}

func (b *bench) revokeOn(n int) (err error) {
	node, err := b.startNode(fmt.Sprint("revoke-", n), time.Minute)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, node.close()) }()
	ctx, cancel := context.WithTimeout(b.ctx, 5*time.Minute)
	defer cancel()
	es := make([]*enforce.Enforcer, n)
	defer func() {
		for _, e := range es {
			err = errors.Join(err, e.Close())
		}
	}()
	g, octx := errgroup.WithContext(ctx)
	g.SetLimit(16)
	for i := range es {
		g.Go(func() (err error) {
			es[i], err = enrolled.Open(octx, node.client, fmt.Sprint("revoke-", i), enforce.Options{})
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	var first, last []time.Duration
	for i := range pick(b, 300, 5) {
		took, err := revokeOnce(ctx, node.client, es, fmt.Sprint("s-", i))
		if err != nil {
			return err
		}
		first, last = append(first, quantile(took, 0)), append(last, quantile(took, 1))
	}
	r, on, ms := b.report, fmt.Sprintf(" of %d", n), func(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
	if n > 1 {
		r.add("cut and denied on the first enforcer"+on+", p50", 1, ms(quantile(first, .5)), "ms", "")
	}
	r.add("cut and denied on the last enforcer"+on+", p50", 1, ms(quantile(last, .5)), "ms", "")
	r.add("cut and denied on the last enforcer"+on+", p99", 1, ms(quantile(last, .99)), "ms", "")
	return nil
}

// revokeOnce returns how long each enforcer took, from the decision's being sent.
func revokeOnce(ctx context.Context, client *authority.Client, es []*enforce.Enforcer, sid string) ([]time.Duration, error) {
	type outcome struct {
		at  time.Time
		err error
	}
	done := make(chan outcome, len(es))
	for _, e := range es {
		p, err := e.Prepare(session.Identity{Tenant: tenantName(0), Issuer: issuer, User: "ann", Session: session.SessionRef{ID: sid}})
		if err != nil {
			return nil, err
		}
		call, release, err := e.Bind(ctx, p, session.Call{Tool: "wait"})
		if err != nil {
			return nil, err
		}
		defer release()
		stop := context.AfterFunc(call, func() {
			err := e.Check(p, session.Call{Tool: "echo"})
			at := time.Now()
			if errors.Is(err, session.ErrRevoked) {
				err = nil
			} else {
				err = fmt.Errorf("after it was cut: %w", errors.Join(err, context.Cause(call)))
			}
			done <- outcome{at, err}
		})
		defer stop()
	}
	began := time.Now()
	if _, err := client.Decide(ctx, authority.Request{
		Operation: authority.Revoke, Reason: "stolen-token", Incident: incident,
		Targets: []authority.Target{authority.One("", "session", issuer, sid)},
	}); err != nil {
		return nil, err
	}
	took := make([]time.Duration, 0, len(es))
	limit := time.NewTimer(10 * time.Second)
	defer limit.Stop()
	var err error
	for range es {
		select {
		case o := <-done:
			took, err = append(took, o.at.Sub(began)), errors.Join(err, o.err)
		case <-limit.C:
			return nil, fmt.Errorf("%d of %d enforcers did not cut the call", len(es)-len(took), len(es))
		}
	}
	return took, err
}
