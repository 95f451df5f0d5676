package guard

import (
	"context"
	"net/http"

	"github.com/interlock-fabric/interlock/pkg/session"
)

// Enforcer decides. Every error that it returns denies, and should wrap
// session.ErrDenied; a *session.DeniedError says why. All methods are called
// concurrently.
type Enforcer interface {
	// Prepare derives what Check and Bind need from an identity.
	Prepare(session.Identity) (*session.Prepared, error)
	// Check decides without waiting for anything.
	Check(*session.Prepared, session.Call) error
	// Bind ties work to the caller: the context that it returns is cancelled,
	// with a *session.DeniedError as its cause, when the work must stop. It
	// checks again after registering. The CancelFunc releases it.
	Bind(context.Context, *session.Prepared, session.Call) (context.Context, context.CancelFunc, error)
}

// Verifier finds out who is calling, from a request whose body it leaves alone.
// An error that wraps session.ErrNoIdentity or session.ErrExpired refuses the
// credentials, and its text reaches the caller; one that wraps session.ErrStale
// says that it cannot be found out now. Of any other error nothing is passed on.
//
// One that can prepare the identity too, as credential.Verifier can, which keeps
// what it has prepared with the token, is asked for that instead:
//
//	PrepareRequest(*http.Request, interface {
//		Prepare(session.Identity) (*session.Prepared, error)
//	}) (*session.Prepared, error)
//
// Its errors are its own, as above, and those of Prepare.
type Verifier interface {
	VerifyRequest(*http.Request) (session.Identity, error)
}

// preparer is a Verifier that prepares.
type preparer interface {
	PrepareRequest(*http.Request, interface {
		Prepare(session.Identity) (*session.Prepared, error)
	}) (*session.Prepared, error)
}

type contextKey struct{}

// NewContext returns a context that carries the caller on whose behalf its work
// is done. Only what has been verified belongs there.
func NewContext(ctx context.Context, p *session.Prepared) context.Context {
	return context.WithValue(ctx, contextKey{}, p)
}

// FromContext returns the caller that a context carries, or nil.
func FromContext(ctx context.Context) *session.Prepared {
	p, _ := ctx.Value(contextKey{}).(*session.Prepared)
	return p
}
