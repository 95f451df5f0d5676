package guard

import (
	"context"
	"errors"
	"net/http"
	"slices"

	"github.com/interlock-fabric/interlock/pkg/denial"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// Admit finds out who sent a request, and whether they may make the call and
// hold the scopes, which are looked for among the identity's capabilities. known
// is set once the credentials have been verified, and p is there from then on,
// also when it is refused. Nothing of the body is read.
// Without an enforcer or a verifier nobody is admitted. Every error denies.
func Admit(e Enforcer, v Verifier, r *http.Request, call session.Call, scopes []string) (p *session.Prepared, known bool, err error) {
	if e == nil {
		return nil, false, &session.DeniedError{Err: session.ErrClosed}
	}
	if v == nil {
		return nil, false, &session.DeniedError{Err: session.ErrNoIdentity}
	}
	if p, err = prepare(e, v, r); err != nil {
		return nil, false, err
	}
	if err := e.Check(p, call); err != nil {
		return p, true, err
	}
	for _, s := range scopes {
		if !slices.Contains(p.Identity().Capabilities, s) {
			return p, true, &session.DeniedError{Err: denial.ErrScope}
		}
	}
	return p, true, nil
}

// watcher is a Verifier of credentials whose end is not known beforehand.
type watcher interface {
	Watch(context.Context, *http.Request) (context.Context, func())
}

// Watch ties running work to the credentials of the request that has begun it, by
// a Verifier that has a method of that name and signature: the context ends, with
// a *session.DeniedError as its cause, when they are not good any more. Bind the
// work under it, and call the function when it is done. By another Verifier the
// context is ctx.
func Watch(ctx context.Context, v Verifier, r *http.Request) (context.Context, func()) {
	if v, ok := v.(watcher); ok {
		return v.Watch(ctx, r)
	}
	return ctx, func() {}
}

// prepare finds out who is calling, and what Check needs to know of them.
func prepare(e Enforcer, v Verifier, r *http.Request) (*session.Prepared, error) {
	if v, ok := v.(preparer); ok {
		return v.PrepareRequest(r, e)
	}
	id, err := v.VerifyRequest(r)
	if err != nil {
		if !errors.Is(err, session.ErrDenied) {
			err = &session.DeniedError{Err: session.ErrNoIdentity}
		}
		return nil, err
	}
	return e.Prepare(id)
}
