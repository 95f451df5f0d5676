package a2aguard

import (
	"context"
	"crypto/tls"
	"net/http"
	"net/url"
	"path"

	"github.com/a2aproject/a2a-go/v2/a2a"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/protoadapt"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/interlock-fabric/interlock/pkg/guard"
	"github.com/interlock-fabric/interlock/pkg/session"
	"github.com/interlock-fabric/interlock/pkg/trail"
)

// UnaryInterceptor is a grpc.UnaryServerInterceptor: it checks every call before
// its handler sees it. It guards whatever the server has, so that what is open
// to all, such as health checks, wants a server of its own.
func (g *Guard) UnaryInterceptor(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	p, err := g.admitGRPC(ctx, info.FullMethod)
	if err != nil {
		st, trailer := g.grpcStatus(ctx, err)
		_ = grpc.SetTrailer(ctx, trailer) // fails where there is no stream, and no client
		return nil, st.Err()
	}
	return next(guard.NewContext(ctx, p), req)
}

// StreamInterceptor is a grpc.StreamServerInterceptor: it checks every stream
// before its handler sees it, and ends one whose client does not read when its
// caller must stop.
func (g *Guard) StreamInterceptor(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) error {
	p, err := g.admitGRPC(ss.Context(), info.FullMethod)
	if err != nil {
		st, trailer := g.grpcStatus(ss.Context(), err)
		ss.SetTrailer(trailer)
		return st.Err()
	}
	cut := make(chan struct{}, 1)
	ctx := context.WithValue(guard.NewContext(ss.Context(), p), connectionKey{}, &connection{cut: func() {
		select {
		case cut <- struct{}{}:
		default:
		}
	}})
	type outcome struct {
		err      error
		panicked any
	}
	done := make(chan outcome, 1)
	err = g.work.Go(func() {
		out := outcome{panicked: errGoexit}
		defer func() {
			if r := recover(); r != nil {
				out.panicked = r
			}
			done <- out
		}()
		out.err = next(srv, &serverStream{ServerStream: ss, ctx: ctx})
		out.panicked = nil
	})
	if err != nil {
		st, trailer := g.grpcStatus(ss.Context(), err)
		ss.SetTrailer(trailer)
		return st.Err()
	}
	finish := func(out outcome) error {
		if out.panicked != nil {
			panic(out.panicked) // where the host's own interceptors expect it
		}
		return out.err
	}
	select {
	case out := <-done:
		return finish(out)
	case <-cut:
	}
	timeout, stop := g.flush()
	defer stop()
	select {
	case out := <-done:
		return finish(out)
	case <-timeout:
		// Blocked in a write. It ends with the stream, and the stream with our
		// return.
		err := g.enforcer.Check(p, g.connect())
		if err == nil {
			err = &session.DeniedError{Err: session.ErrClosed}
		}
		st, trailer := g.grpcStatus(ss.Context(), err)
		ss.SetTrailer(trailer)
		return st.Err()
	}
}

type serverStream struct {
	grpc.ServerStream
	ctx context.Context //nolint:containedctx // the interface asks for it
}

func (s *serverStream) Context() context.Context { return s.ctx }

func (g *Guard) admitGRPC(ctx context.Context, method string) (*session.Prepared, error) {
	r := requestOf(ctx, method)
	e := trail.Event{Mark: g.opts.Trail.Start(), Method: path.Base(method), Call: g.connect(), Traceparent: r.Header.Get("Traceparent")}
	p, _, err := g.admit(r, e.Call)
	if err == nil {
		e.Call = g.call(e.Method, "")
		err = g.enforcer.Check(p, e.Call)
	}
	if err != nil { // what is allowed here is recorded where it is carried out
		e.Caller, e.Err = p, err
		g.opts.Trail.Record(&e)
		return nil, err
	}
	return p, nil
}

// requestOf is a gRPC call as the HTTP request that it is.
func requestOf(ctx context.Context, method string) *http.Request {
	r := &http.Request{
		Method: http.MethodPost, URL: &url.URL{Scheme: "http", Path: method},
		Proto: "HTTP/2.0", ProtoMajor: 2, Header: make(http.Header), Body: http.NoBody,
	}
	md, _ := metadata.FromIncomingContext(ctx)
	for k, v := range md {
		if k == ":authority" && len(v) > 0 {
			r.Host = v[0]
			continue
		}
		r.Header[http.CanonicalHeaderKey(k)] = v
	}
	r.URL.Host = r.Host
	if pr, ok := peer.FromContext(ctx); ok {
		if pr.Addr != nil {
			r.RemoteAddr = pr.Addr.String()
		}
		if info, ok := pr.AuthInfo.(credentials.TLSInfo); ok {
			r.TLS = new(tls.ConnectionState)
			*r.TLS = info.State
			r.URL.Scheme = "https"
		}
	}
	return r.WithContext(ctx)
}

// grpcStatus is a denial as a gRPC status, with what HTTP has in its headers in the trailer.
func (g *Guard) grpcStatus(ctx context.Context, err error) (*status.Status, metadata.MD) {
	a := g.resource.Answer(err)
	code := codes.Unavailable
	switch a.Status {
	case http.StatusUnauthorized:
		code = codes.Unauthenticated
	case http.StatusForbidden:
		code = codes.PermissionDenied
	}
	details := []protoadapt.MessageV1{&errdetails.ErrorInfo{Reason: reason(&a), Domain: a2a.ProtocolDomain, Metadata: metadataOf(&a)}}
	if a.RetryAfter > 0 {
		details = append(details, &errdetails.RetryInfo{RetryDelay: durationpb.New(a.RetryAfter)})
	}
	st := status.New(code, a.Message)
	if with, err := st.WithDetails(details...); err == nil {
		st = with
	}
	h := make(http.Header)
	a.Header(h, len(metadata.ValueFromIncomingContext(ctx, "authorization")) > 0)
	h.Del("Cache-Control")
	trailer := metadata.MD{}
	for k, v := range h {
		trailer.Set(k, v...)
	}
	return st, trailer
}
