package demo

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	service "github.com/interlock-fabric/interlock/internal/authority"
	"github.com/interlock-fabric/interlock/internal/enrolled"
	"github.com/interlock-fabric/interlock/pkg/authority"
	"github.com/interlock-fabric/interlock/pkg/enforce"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// fabric is the authority with its bus, and the client of its API.
type fabric struct {
	dir     string
	log     *slog.Logger
	listen  string
	service *service.Authority
	client  *authority.Client
}

func startFabric(ctx context.Context, dir string, log *slog.Logger) (*fabric, error) {
	f := &fabric{dir: filepath.Join(dir, "authority"), log: log, listen: "127.0.0.1:0"}
	if err := f.start(ctx); err != nil {
		return nil, err
	}
	return f, nil
}

// start opens the authority on its data; the second time on what the first left.
func (f *fabric) start(ctx context.Context) error {
	svc, err := service.Open(ctx, service.Options{DataDir: f.dir, NATSListen: f.listen, Logger: f.log})
	if err != nil {
		return err
	}
	f.service, f.listen = svc, svc.NATSAddr()
	f.client, err = authority.New(authority.Options{Socket: svc.Socket()})
	if err != nil {
		f.stop()
	}
	return err
}

// stop takes the authority and the bus away.
func (f *fabric) stop() {
	if f.client != nil {
		f.client.Close()
	}
	if f.service != nil {
		if err := f.service.Close(); err != nil {
			f.log.Warn("close the authority", "error", err)
		}
	}
	f.client, f.service = nil, nil
}

func (f *fabric) close() { f.stop() }

// openEnforcer enrols an enforcer and opens it.
func (f *fabric) openEnforcer(ctx context.Context, name string, log *slog.Logger) (*enforce.Enforcer, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	return enrolled.Open(ctx, f.client, name, enforce.Options{MaxStale: maxStale, Logger: log})
}

// fleet is many enforcers, each with its own connection and one running call.
type fleet struct {
	enforcers []*enforce.Enforcer
	callers   []*session.Prepared
	calls     []context.Context
	releases  []context.CancelFunc
}

// fleet opens n enforcers.
func (f *fabric) fleet(ctx context.Context, n int) (_ *fleet, err error) {
	out := &fleet{}
	defer func() {
		if err != nil {
			out.close()
		}
	}()
	open, octx := errgroup.WithContext(ctx)
	open.SetLimit(16)
	out.enforcers = make([]*enforce.Enforcer, n)
	for i := range n {
		open.Go(func() (err error) {
			out.enforcers[i], err = f.openEnforcer(octx, fmt.Sprintf("fleet-%d", i), nil)
			return err
		})
	}
	if err := open.Wait(); err != nil {
		return nil, err
	}
	return out, nil
}

// bind starts a piece of running work on each enforcer, under one session.
func (fl *fleet) bind(ctx context.Context, sid string) error {
	fl.release()
	for _, e := range fl.enforcers {
		p, err := e.Prepare(identity("frank", sid))
		if err != nil {
			return err
		}
		call, release, err := e.Bind(ctx, p, session.Call{Tool: "wait"})
		if err != nil {
			return err
		}
		fl.callers = append(fl.callers, p)
		fl.calls = append(fl.calls, call)
		fl.releases = append(fl.releases, release)
	}
	return nil
}

func (fl *fleet) release() {
	for _, release := range fl.releases {
		release()
	}
	fl.callers, fl.calls, fl.releases = nil, nil, nil
}

// revoke revokes a session and returns how long, from the decision's being sent,
// the first and the last enforcer took to cut its running call and deny the next
// one.
func (fl *fleet) revoke(ctx context.Context, c *authority.Client, sid string) (first, last time.Duration, err error) {
	if err := fl.bind(ctx, sid); err != nil {
		return 0, 0, err
	}
	type outcome struct {
		at  time.Time
		err error
	}
	done := make(chan outcome, len(fl.enforcers))
	for i, e := range fl.enforcers {
		if err := context.Cause(fl.calls[i]); err != nil {
			return 0, 0, fmt.Errorf("a call was cut before the decision: %w", err)
		}
		stop := context.AfterFunc(fl.calls[i], func() {
			err := e.Check(fl.callers[i], session.Call{Tool: "echo"})
			at := time.Now()
			switch {
			case err == nil:
				err = errors.New("allowed after it was cut")
			case errors.Is(err, session.ErrRevoked):
				err = nil
			}
			done <- outcome{at, err}
		})
		defer stop()
	}
	began := time.Now()
	if _, err := c.Decide(ctx, authority.Request{
		Operation: authority.Revoke, Targets: []authority.Target{authority.One("", "session", issuer, sid)},
		Reason: "stolen-token", Incident: "INC-146",
	}); err != nil {
		return 0, 0, err
	}
	var took []time.Duration
	limit := time.After(10 * time.Second)
	for range fl.enforcers {
		select {
		case o := <-done:
			took = append(took, o.at.Sub(began))
			err = errors.Join(err, o.err)
		case <-limit:
			return 0, 0, fmt.Errorf("%d of %d enforcers did not cut the call", len(fl.enforcers)-len(took), len(fl.enforcers))
		}
	}
	return slices.Min(took), slices.Max(took), err
}

func (fl *fleet) close() {
	fl.release()
	for _, e := range fl.enforcers {
		_ = e.Close()
	}
}
