package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/interlock-fabric/interlock/internal/enrolled"
	"github.com/interlock-fabric/interlock/pkg/authority"
	"github.com/interlock-fabric/interlock/pkg/enforce"
	"github.com/interlock-fabric/interlock/pkg/session"
)

const (
	stormClients = 8
	// stormQuota is what one tenant may have in force.
	stormQuota = 1_000_000
)

// storm measures n sessions revoked at the authority's API, a thousand a call, to
// the last of them in force on one enforcer and on ten. The authority with its bus
// is a process of its own; the enforcers share this one with the responders, each
// with a connection and a state directory of its own.
func storm(b *bench, n int) error {
	for _, on := range []int{1, 10} {
		if err := b.stormOn(n, on); err != nil {
			return fmt.Errorf("on %d: %w", on, err)
		}
	}
	return nil
}

func (b *bench) stormOn(n, enforcers int) (err error) {
	name := fmt.Sprint("storm-", enforcers)
	tenants := (n + stormQuota - 1) / stormQuota
	node, err := b.startNode(name, time.Minute, "-tenants", strconv.Itoa(tenants))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, node.close()) }()
	es := make([]*enforce.Enforcer, enforcers)
	defer func() {
		for _, e := range es {
			err = errors.Join(err, e.Close())
		}
	}()
	ctx, cancel := context.WithTimeout(b.ctx, 5*time.Minute)
	defer cancel()
	for i := range es {
		if es[i], err = enrolled.Open(ctx, node.client, fmt.Sprint(name, "-", i), enforce.Options{StateDir: filepath.Join(b.dir, name+"-state")}); err != nil {
			return err
		}
	}

	before, own := node.cpu(), cpuNow().own
	began := time.Now()
	last, err := decideStorm(ctx, node.client, n)
	if err != nil {
		return err
	}
	decided := time.Since(began)
	took := make([]time.Duration, len(es))
	if err := group(len(es), func(i int) error {
		err := await(ctx, es[i], func(s enforce.Status) bool { return s.Applied >= last })
		took[i] = time.Since(began)
		return err
	}); err != nil {
		return err
	}
	r, on := b.report, fmt.Sprintf("%d enforcers: ", enforcers)
	if enforcers == 1 {
		on = "1 enforcer: "
	}
	r.add(on+"all decided and durable", n, decided.Seconds(), "s", "")
	r.add(on+"all in force", n, quantile(took, 1).Seconds(), "s", either(enforcers == 10, "≤ 5 s", ""))
	r.add(on+"CPU of the authority with its bus", n, node.cpu()-before, "s", "")
	r.add(on+"CPU of the enforcers and the responders", n, cpuNow().own-own, "s", "")
	for _, e := range es {
		for i := 0; i < n; i += n/100 + 1 {
			p, err := e.Prepare(session.Identity{Tenant: tenantName(i / stormQuota), Issuer: issuer, Session: session.SessionRef{ID: stormSession(i)}})
			if err != nil {
				return err
			}
			if !errors.Is(e.Check(p, session.Call{}), session.ErrRevoked) {
				return errors.New("a revoked caller was allowed")
			}
		}
	}
	return nil
}

func stormSession(i int) string { return "s-" + strconv.Itoa(i) }

// decideStorm revokes sessions 0 to n-1 and returns the newest batch.
func decideStorm(ctx context.Context, client *authority.Client, n int) (uint64, error) {
	var next atomic.Int64
	var last atomic.Uint64
	err := group(stormClients, func(int) error {
		for {
			from := int(next.Add(authority.MaxTargets)) - authority.MaxTargets
			if from >= n {
				return nil
			}
			r := authority.Request{Operation: authority.Revoke, Reason: "compromised", Incident: incident, Commit: true}
			// A call is of one tenant's.
			for i := from; i < min(from+authority.MaxTargets, n); i++ {
				r.Targets = append(r.Targets, authority.One(tenantName(i/stormQuota), "session", issuer, stormSession(i)))
			}
			d, err := client.Decide(ctx, r)
			if err != nil {
				return err
			}
			if !d.Committed || d.Entries != len(r.Targets) {
				return fmt.Errorf("not decided: %+v", d)
			}
			for x := last.Load(); x < d.Number && !last.CompareAndSwap(x, d.Number); x = last.Load() {
			}
		}
	})
	return last.Load(), err
}
