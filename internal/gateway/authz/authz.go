// Package authz answers the authorization requests of proxies that are there
// already: Envoy's ext_authz v3, and the forward-auth requests of nginx, Caddy and
// Traefik. A request is decided when it begins; what runs is not cut, since none
// of these can be told to.
package authz

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"net/http"
	"net/url"
	"strings"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	auth "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"

	"github.com/interlock-fabric/interlock/internal/gateway/config"
	"github.com/interlock-fabric/interlock/internal/gateway/operation"
	"github.com/interlock-fabric/interlock/internal/gateway/route"
	"github.com/interlock-fabric/interlock/pkg/session"
	"github.com/interlock-fabric/interlock/pkg/trail"
)

// Service decides on requests that others describe. It is immutable.
type Service struct {
	Table  *route.Table
	Config *config.Config
}

// errNoRoute and the like are answered as what nobody may send.
var (
	errNoRoute   = &operation.Refusal{Status: http.StatusForbidden, Code: -32600, Why: "no such resource"}
	errDescribed = &operation.Refusal{Status: http.StatusForbidden, Code: -32600, Why: "the request is not described: see authz.forward_headers"}
	errUnread    = &operation.Refusal{Status: http.StatusForbidden, Code: -32600, Why: "the message was not sent along whole: raise max_request_bytes"}
	errSpoofed   = &operation.Refusal{Status: http.StatusForbidden, Code: -32600, Why: "a header could be taken for one that names the caller"}
	errPanic     = &operation.Refusal{Status: http.StatusServiceUnavailable, Code: -32603, Why: "the request could not be decided"}
	errMethod    = &operation.Refusal{Status: http.StatusForbidden, Code: -32600, Why: "the method is not one of MCP"}
	errOverride  = &operation.Refusal{Status: http.StatusForbidden, Code: -32600, Why: "a header asks for another method than the request's"}
)

// decide decides on r, whose body, where it is known, is body. partial says that
// there is more of it.
func (s *Service) decide(r *http.Request, body []byte, partial bool) (g *route.Guard, p *session.Prepared, op operation.Operation, err error) {
	if err := route.CheckPath(r.URL); err != nil {
		return nil, nil, op, err
	}
	g, below := s.Table.Find(r.Host, r.URL.Path)
	if g == nil {
		return nil, nil, op, errNoRoute
	}
	mark := g.Trail.Start()
	var call session.Call
	p, _, err = g.Identify(r)
	if err == nil {
		if op, err = operationOf(g, r, below, body, partial); err == nil {
			call = g.Call(&op)
			err = g.Enforcer.Check(p, call)
		}
	}
	var refusal *operation.Refusal
	if !errors.As(err, &refusal) {
		g.Note(&op, trail.Event{Mark: mark, Caller: p, Call: call, Traceparent: r.Header.Get("Traceparent"), Err: err})
	}
	return g, p, op, err
}

// overridden reports whether a server could take the request for another one.
func overridden(h http.Header) bool {
	for name := range h {
		if route.Overrides(name) {
			return true
		}
	}
	return false
}

func operationOf(g *route.Guard, r *http.Request, below string, body []byte, partial bool) (op operation.Operation, err error) {
	proto := g.Route.Protocol
	_, rest := operation.REST(r.Method, below)
	rest = rest && proto == config.A2A
	byPath := proto == config.HTTP || proto == config.A2A && (r.Method != http.MethodPost || rest || operation.GRPC(r.Header))
	switch {
	case overridden(r.Header):
		return op, errOverride
	case byPath && (len(body) == 0 || proto == config.HTTP || r.Method != http.MethodPost):
		return g.ByPath(r.Method, r.URL, below, r.Header), nil
	case byPath && !rest:
		if !operation.Framed(body[0]) {
			return op, operation.ErrFrame
		}
		return g.ByPath(r.Method, r.URL, below, r.Header), nil
	case r.Method == http.MethodGet || r.Method == http.MethodDelete:
		return op, op.MatchHeaders(r.Header)
	case r.Method != http.MethodPost:
		return op, errMethod
	case body == nil:
		if proto == config.MCP {
			if op, err = operation.Mirrored(r.Header); err != nil || op.Method != "" {
				return op, err
			}
		}
		// What it does is not known, and so no low risk.
		return g.ByPath(r.Method, r.URL, below, r.Header), nil
	case partial:
		return op, errUnread
	}
	isJSON, err := operation.JSONBody(r.Header)
	if err == nil && !isJSON {
		err = &operation.Refusal{Status: http.StatusUnsupportedMediaType, Code: -32600, Why: "the body is not declared to be JSON"}
	}
	if err != nil {
		return op, err
	}
	if rest {
		op = g.ByPath(r.Method, r.URL, below, r.Header)
		op.Arguments = body
		return op, operation.CheckREST(body)
	}
	if op, err = operation.Parse(body, proto); err == nil && proto == config.MCP {
		err = op.MatchHeaders(r.Header)
	}
	return op, err
}

// GRPC is Envoy's ext_authz v3. Service returns the one in force, and a function
// to be called when it is not used any more.
type GRPC struct {
	auth.UnimplementedAuthorizationServer
	Service func() (*Service, func())
	// Panicked hears of a panic, whose request is denied: gRPC's server would end
	// the process.
	Panicked func(any)
}

// Check answers one request. It has no error of its own: what cannot be decided is
// denied.
func (x *GRPC) Check(ctx context.Context, in *auth.CheckRequest) (res *auth.CheckResponse, err error) {
	defer func() {
		if v := recover(); v != nil {
			x.Panicked(v)
			res, err = refused(errPanic), nil
		}
	}()
	s, done := x.Service()
	defer done()
	h := in.GetAttributes().GetRequest().GetHttp()
	r, err := described(ctx, h)
	if err != nil {
		return refused(errDescribed), nil
	}
	if cert := in.GetAttributes().GetSource().GetCertificate(); cert != "" && h.GetScheme() == "https" {
		r.TLS = &tls.ConnectionState{HandshakeComplete: true, PeerCertificates: peer(cert)}
	}
	var body []byte
	if b := h.GetRawBody(); len(b) > 0 {
		body = b
	} else if b := h.GetBody(); b != "" {
		body = []byte(b)
	}
	partial := h.GetHeaders()["x-envoy-auth-partial-body"] == "true"
	g, p, op, err := s.decide(r, body, partial)
	var refusal *operation.Refusal
	switch {
	case errors.As(err, &refusal):
		return refused(refusal), nil
	case err != nil:
		a := g.Resource.Answer(err)
		head := http.Header{"Content-Type": {"application/json"}}
		a.Header(head, r.Header.Get("Authorization") != "")
		return denied(a.Status, head, a.Response(op.ID)), nil
	}
	ok := &auth.OkHttpResponse{}
	for _, kv := range route.Identity(p) {
		ok.Headers = append(ok.Headers, option(kv[0], kv[1]))
	}
	for name := range r.Header {
		if route.Spoofed(name) && !sets(ok, name) {
			ok.HeadersToRemove = append(ok.HeadersToRemove, strings.ToLower(name))
		}
	}
	if s.Config.Authz.StripToken {
		ok.HeadersToRemove = append(ok.HeadersToRemove, "authorization", "dpop")
	}
	return &auth.CheckResponse{Status: &rpcstatus.Status{Code: int32(codes.OK)}, HttpResponse: &auth.CheckResponse_OkResponse{OkResponse: ok}}, nil
}

func sets(ok *auth.OkHttpResponse, name string) bool {
	for _, o := range ok.Headers {
		if strings.EqualFold(o.Header.Key, name) {
			return true
		}
	}
	return false
}

// described makes the request that Envoy describes.
func described(ctx context.Context, h *auth.AttributeContext_HttpRequest) (*http.Request, error) {
	if h == nil || h.GetMethod() == "" || h.GetHost() == "" {
		return nil, errDescribed
	}
	u, err := parse(h.GetPath())
	if err != nil {
		return nil, err
	}
	r := &http.Request{Method: h.GetMethod(), URL: u, Host: h.GetHost(), Header: make(http.Header, len(h.GetHeaders()))}
	u.Scheme, u.Host = h.GetScheme(), h.GetHost()
	for name, value := range h.GetHeaders() {
		if !strings.HasPrefix(name, ":") {
			r.Header.Set(name, value)
		}
	}
	return r.WithContext(ctx), nil
}

// parse reads a request target. One that is not a path is refused, and a
// fragment, which others cut off.
func parse(target string) (*url.URL, error) {
	if !strings.HasPrefix(target, "/") || strings.Contains(target, "#") {
		return nil, errDescribed
	}
	return url.ParseRequestURI(target)
}

// peer is the client's certificate, which Envoy has verified, as it sends it:
// URL-encoded PEM.
func peer(encoded string) []*x509.Certificate {
	text, err := url.PathUnescape(encoded)
	if err != nil {
		return nil
	}
	block, _ := pem.Decode([]byte(text))
	if block == nil {
		return nil
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil
	}
	return []*x509.Certificate{cert}
}

func option(name, value string) *core.HeaderValueOption {
	return &core.HeaderValueOption{
		Header:       &core.HeaderValue{Key: name, Value: value},
		AppendAction: core.HeaderValueOption_OVERWRITE_IF_EXISTS_OR_ADD,
	}
}

func denied(status int, head http.Header, body []byte) *auth.CheckResponse {
	code := codes.PermissionDenied
	switch status {
	case http.StatusUnauthorized:
		code = codes.Unauthenticated
	case http.StatusServiceUnavailable:
		code = codes.Unavailable
	}
	d := &auth.DeniedHttpResponse{Status: &typev3.HttpStatus{Code: typev3.StatusCode(status)}, Body: string(body)}
	for name, values := range head {
		for _, v := range values {
			d.Headers = append(d.Headers, option(name, v))
		}
	}
	return &auth.CheckResponse{Status: &rpcstatus.Status{Code: int32(code)}, HttpResponse: &auth.CheckResponse_DeniedResponse{DeniedResponse: d}}
}

func refused(r *operation.Refusal) *auth.CheckResponse {
	return denied(r.Status, http.Header{"Content-Type": {"application/json"}, "Cache-Control": {"no-store"}}, refusal(r))
}

func refusal(r *operation.Refusal) []byte {
	b, err := json.Marshal(map[string]any{"jsonrpc": "2.0", "error": map[string]any{"code": r.Code, "message": r.Why}})
	if err != nil { // a number and a string
		return nil
	}
	return b
}

// HTTP is the forward-auth endpoint. Whoever can reach it learns which tokens are
// good, and nothing else.
type HTTP struct {
	Service func() (*Service, func())
}

// ServeHTTP answers 200 with the headers that name the caller, or with the denial.
func (x *HTTP) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s, done := x.Service()
	defer done()
	orig, err := forwarded(r, s.Config.Authz.ForwardHeaders)
	if err != nil {
		answerRefusal(w, errDescribed)
		return
	}
	for name := range r.Header {
		if route.Spoofed(name) && strings.Contains(name, "_") {
			// Whoever asks replaces the headers that it knows by name; this one
			// would pass, and is the same to some servers.
			answerRefusal(w, errSpoofed)
			return
		}
	}
	g, p, _, err := s.decide(orig, nil, false)
	var refusal *operation.Refusal
	switch {
	case errors.As(err, &refusal):
		answerRefusal(w, refusal)
		return
	case err != nil:
		a := g.Resource.Answer(err)
		a.Write(w, r, nil)
		return
	}
	h := w.Header()
	h.Set("Cache-Control", "no-store")
	// All of them, so that whoever copies them replaces what a client has sent:
	// Caddy makes something else of one that is not there.
	for _, name := range route.IdentityHeaders() {
		h.Set(name, "")
	}
	for _, kv := range route.Identity(p) {
		h.Set(kv[0], kv[1])
	}
	w.WriteHeader(http.StatusOK)
}

func answerRefusal(w http.ResponseWriter, r *operation.Refusal) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	status := r.Status
	if status < 401 || status == http.StatusNotFound {
		status = http.StatusForbidden // nginx takes anything but 401 and 403 for a fault of ours
	}
	w.WriteHeader(status)
	_, _ = w.Write(append(refusal(r), '\n')) // a client that has gone needs no answer
}

// forwarded makes the request that a proxy describes in headers. Those of the
// other dialect are the client's own, and say nothing.
func forwarded(r *http.Request, dialect string) (*http.Request, error) {
	one := func(name string) string {
		if v := r.Header.Values(name); len(v) == 1 {
			return v[0]
		}
		return ""
	}
	method, uri, host, scheme := one("X-Forwarded-Method"), one("X-Forwarded-Uri"), one("X-Forwarded-Host"), one("X-Forwarded-Proto")
	if dialect == "x-original" {
		method, uri, host, scheme = one("X-Original-Method"), one("X-Original-Uri"), one("X-Original-Host"), one("X-Original-Proto")
	}
	if method == "" || uri == "" || host == "" {
		return nil, errDescribed
	}
	u, err := parse(uri)
	if err != nil {
		return nil, err
	}
	u.Scheme, u.Host = scheme, host
	head := r.Header.Clone()
	if dialect == "x-original" {
		head.Del("X-Original-Uri") // it is from whoever asks here
	}
	out := &http.Request{Method: method, URL: u, Host: host, Header: head, Body: http.NoBody}
	return out.WithContext(r.Context()), nil
}
