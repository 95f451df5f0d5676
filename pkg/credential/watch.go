package credential

import (
	"context"
	"errors"
	"net/http"
	"strings"
	"time"

	"github.com/interlock-fabric/interlock/pkg/session"
)

// watchRetry is how long an issuer that could not be asked is left alone.
const watchRetry = time.Second

// Watch ties running work to an opaque token, whose issuer may revoke it at any
// time and does not say when. While the work runs, the issuer is asked again as
// often as for requests: each time that its last answer is older than
// Introspection.MaxAge. The returned context ends, with a *session.DeniedError as
// its cause, when the token is not good any more, or when for twice MaxAge nobody
// could find out. Call the function when the work is done; it waits until nothing
// of Watch runs any more.
//
// The request is one that has been verified. For a token that is not opaque, whose
// end is known, the context is ctx, and costs nothing.
func (v *Verifier) Watch(ctx context.Context, r *http.Request) (context.Context, func()) {
	if v.shared == nil || v.opaque == nil {
		return ctx, func() {}
	}
	_, token, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	if token = strings.TrimLeft(token, " "); !opaque(token) {
		return ctx, func() {}
	}
	ctx, cut := context.WithCancelCause(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		cut(v.watch(ctx, token))
	}()
	return ctx, func() {
		cut(context.Canceled)
		<-done
	}
}

// watch returns why the token is not good any more, or that ctx has ended.
func (v *Verifier) watch(ctx context.Context, token string) error {
	sum, known := sumOf(token), v.clock()
	for {
		var err error
		t := v.cache.get(&sum)
		if t == nil || !t.vouched(v.clock()) {
			if t, err = v.introspect(ctx, token, &sum); err == nil {
				v.cache.put(&sum, t, v.clock())
			}
		}
		if err == nil {
			err = v.admits(t, v.clock())
		}
		wait := watchRetry
		switch now := v.clock(); {
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case err == nil:
			known, wait = t.asked, t.good.Sub(now)
		case !errors.Is(err, ErrTokenIntrospection) || now.Sub(known) >= 2*v.opaque.maxAge:
			return &session.DeniedError{Err: err}
		}
		timer := time.NewTimer(max(wait, time.Millisecond))
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return context.Cause(ctx)
		}
	}
}
