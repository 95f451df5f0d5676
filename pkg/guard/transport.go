package guard

import (
	"context"
	"errors"
	"io"
	"net/http"
	"sync"

	"github.com/interlock-fabric/interlock/pkg/session"
)

// Transport is the http.RoundTripper of the calls that a host makes itself, such
// as those of an agent to the tools and agents that it delegates to. Each is
// checked before it is sent and bound for as long as its answer is read: once a
// caller on whose behalf the host acts, or the host's own session, may no longer
// act, nothing more goes out, and what is under way is cut. A request that
// nobody answers for is denied.
//
// Set it as the Transport of the http.Client that an MCP or A2A client is made
// with. It is safe for concurrent use and must not be changed once in use.
type Transport struct {
	// Enforcer decides; without one everything is denied.
	Enforcer Enforcer
	// Own is the host's own identity, prepared by Enforcer. It is checked beside
	// the caller that the request's context carries (see NewContext); where
	// it is nil, there must be one.
	Own *session.Prepared
	// Base sends the requests; nil is http.DefaultTransport.
	Base http.RoundTripper
	// Call says what a request is to Enforcer; nil is its URL, without query,
	// as the audience.
	Call func(*http.Request) session.Call
}

// RoundTrip implements http.RoundTripper. A denial is a *session.DeniedError,
// also where it comes while the body is read.
func (t *Transport) RoundTrip(r *http.Request) (*http.Response, error) {
	call := session.Call{Audience: audienceOf(r)}
	if t.Call != nil {
		call = t.Call(r)
	}
	ctx, release, err := BindOutgoing(r.Context(), t.Enforcer, t.Own, call)
	if err != nil {
		if r.Body != nil {
			_ = r.Body.Close() // RoundTrip must, errors included
		}
		return nil, err
	}
	base := t.Base
	if base == nil {
		base = http.DefaultTransport
	}
	resp, err := base.RoundTrip(r.WithContext(ctx))
	if d := Cut(ctx); d != nil {
		if err == nil {
			_ = resp.Body.Close() // the answer is not the caller's any more
		}
		err = d
	}
	if err != nil {
		release()
		return nil, err
	}
	b := &body{ReadCloser: resp.Body, ctx: ctx, release: sync.OnceFunc(release)}
	resp.Body = b
	if w, ok := b.ReadCloser.(io.Writer); ok {
		// 101 Switching Protocols: the context ends nothing any more.
		stop := context.AfterFunc(ctx, func() { _ = b.ReadCloser.Close() }) // whoever reads or writes hears of it
		release := b.release
		b.release = func() { stop(); release() }
		resp.Body = &writableBody{body: b, Writer: w}
	}
	return resp, nil
}

func audienceOf(r *http.Request) string {
	if r.URL == nil {
		return ""
	}
	u := *r.URL
	u.User, u.RawQuery, u.ForceQuery, u.Fragment, u.RawFragment = nil, "", false, "", ""
	return u.String()
}

// body releases the binding when the answer has been read.
type body struct {
	io.ReadCloser
	ctx     context.Context //nolint:containedctx // its end is what a read finds out
	release func()
}

func (b *body) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if d := Cut(b.ctx); d != nil {
		// What came after the cut is not the caller's any more.
		n, err = 0, d
	}
	if err != nil {
		b.release()
	}
	return n, err
}

func (b *body) Close() error {
	b.release()
	return b.ReadCloser.Close()
}

// writableBody is both directions of a connection that has been upgraded.
type writableBody struct {
	*body
	io.Writer
}

func (b *writableBody) Write(p []byte) (int, error) {
	if d := Cut(b.ctx); d != nil {
		return 0, d
	}
	n, err := b.Writer.Write(p)
	if d := Cut(b.ctx); d != nil {
		err = d
	}
	return n, err
}

// BindOutgoing binds a call that the host makes to whom it makes it for: the
// caller that ctx carries, and own, unless that is nil. Without either it is
// denied. The error is Enforcer's.
func BindOutgoing(ctx context.Context, e Enforcer, own *session.Prepared, call session.Call) (context.Context, context.CancelFunc, error) {
	caller := FromContext(ctx)
	switch {
	case e == nil:
		return nil, nil, &session.DeniedError{Err: session.ErrClosed}
	case caller == nil && own == nil:
		return nil, nil, &session.DeniedError{Err: session.ErrNoIdentity}
	case caller == nil || own == nil || caller == own:
		if caller == nil {
			caller = own
		}
		return e.Bind(ctx, caller, call)
	}
	ctx, first, err := e.Bind(ctx, own, call)
	if err != nil {
		return nil, nil, err
	}
	ctx, second, err := e.Bind(ctx, caller, call)
	if err != nil {
		first()
		return nil, nil, err
	}
	return ctx, func() { second(); first() }, nil
}

// Cut returns the denial that a bound context was cut with, or nil when it has
// not ended, or for another reason.
func Cut(ctx context.Context) *session.DeniedError {
	var d *session.DeniedError
	if ctx.Err() != nil && errors.As(context.Cause(ctx), &d) {
		return d
	}
	return nil
}
