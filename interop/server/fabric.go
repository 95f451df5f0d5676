package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	service "github.com/interlock-fabric/interlock/internal/authority"
	"github.com/interlock-fabric/interlock/internal/enrolled"
	"github.com/interlock-fabric/interlock/pkg/authority"
	"github.com/interlock-fabric/interlock/pkg/enforce"
)

// tenant is the one that a new authority begins with.
const tenant = "default"

// fabric is an authority of its own with one enforcer.
type fabric struct {
	enforcer *enforce.Enforcer
	client   *authority.Client
	close    func() error
}

func openFabric(ctx context.Context) (_ *fabric, err error) {
	var closers []func() error
	closeAll := func() error {
		var errs []error
		for i := len(closers) - 1; i >= 0; i-- {
			errs = append(errs, closers[i]())
		}
		return errors.Join(errs...)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, closeAll())
		}
	}()
	dir, err := os.MkdirTemp("", "interlock-interop-")
	if err != nil {
		return nil, err
	}
	closers = append(closers, func() error { return os.RemoveAll(dir) })
	svc, err := service.Open(ctx, service.Options{DataDir: dir, NATSListen: "127.0.0.1:0"})
	if err != nil {
		return nil, err
	}
	closers = append(closers, svc.Close)
	client, err := authority.New(authority.Options{Socket: svc.Socket()})
	if err != nil {
		return nil, err
	}
	closers = append(closers, func() error { client.Close(); return nil })

	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	enforcer, err := enrolled.Open(ctx, client, "interop", enforce.Options{})
	if err != nil {
		return nil, err
	}
	closers = append(closers, enforcer.Close)
	return &fabric{enforcer: enforcer, client: client, close: closeAll}, nil
}

// revoke ends a session.
func (f *fabric) revoke(ctx context.Context, sid string) error {
	return f.decide(ctx, authority.Revoke, "session", issuer, sid)
}

// enroll makes an enrolment for an enforcer of its own process. From then on a
// decision waits for it, too.
func (f *fabric) enroll(ctx context.Context, name string) (string, error) {
	raw, err := f.client.Enroll(ctx, authority.EnrollRequest{Name: name})
	return string(raw), err
}

// decide decides on one value, and returns once every enforcer has said that it is
// in force: what lifts waits for the log to confirm it.
func (f *fabric) decide(ctx context.Context, op authority.Operation, kind, issuer, value string) error {
	d, err := f.client.Decide(ctx, authority.Request{
		Operation: op, Targets: []authority.Target{authority.One("", kind, issuer, value)},
		Reason: "stolen-token", Incident: "INC-142", Commit: true,
	})
	if err != nil {
		return err
	}
	cov, err := f.client.Coverage(ctx, d.Epoch, d.Number, 10*time.Second)
	if err != nil {
		return err
	}
	if cov.InEffect != cov.Enforcers {
		return fmt.Errorf("in effect on %d of %d enforcers: %+v", cov.InEffect, cov.Enforcers, cov.Detail)
	}
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for op.Lifts() {
		all, err := f.client.Enforcers(ctx)
		if err != nil {
			return err
		}
		if !slices.ContainsFunc(all, func(e authority.Enforcer) bool { return e.Confirmed < d.Number }) {
			break
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-tick.C:
		}
	}
	return nil
}
