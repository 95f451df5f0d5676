package mcpguard

import (
	"context"
	"reflect"

	"github.com/modelcontextprotocol/go-sdk/mcp"

	"github.com/interlock-fabric/interlock/pkg/guard"
	"github.com/interlock-fabric/interlock/pkg/session"
	"github.com/interlock-fabric/interlock/pkg/trail"
)

// housekeeping are the methods that run no host code worth cutting: they end by
// themselves, and a caller with reduced rights needs them to find out what it
// may still do. Everything else is bound for as long as it runs, methods that
// this code has never heard of included.
var housekeeping = map[string]bool{
	"initialize": true, "ping": true, "server/discover": true, "logging/setLevel": true,
	"tools/list": true, "prompts/list": true, "resources/list": true, "resources/templates/list": true,
	"notifications/initialized": true, "notifications/cancelled": true,
	"notifications/progress": true, "notifications/roots/list_changed": true,
}

// LowRisk reports whether a method of MCP only finds out what may be done: it is
// permitted to a caller with reduced rights, and ends by itself.
func LowRisk(method string) bool { return housekeeping[method] }

// Middleware checks every method that a server receives, binds what runs to its
// caller, and cuts it. Add it with mcp.Server.AddReceivingMiddleware, after all
// others, unless Serve does.
func (g *Guard) Middleware(next mcp.MethodHandler) mcp.MethodHandler {
	return func(ctx context.Context, method string, req mcp.Request) (mcp.Result, error) {
		e := trail.Event{Mark: g.opts.Trail.Start(), Method: method, Traceparent: traceparent(req)}
		refuse := func(err error) (mcp.Result, error) {
			e.Err = err
			g.opts.Trail.Record(&e)
			return nil, g.rpcError(err)
		}
		c, err := g.identify(req)
		if err != nil {
			return refuse(err)
		}
		e.Caller, e.Call = c.prepared, g.call(method, req)
		if p, ok := req.GetParams().(*mcp.CallToolParamsRaw); ok {
			e.Arguments = p.Arguments
		}
		if ss, ok := req.GetSession().(*mcp.ServerSession); ok {
			if err := g.track(ss, req, c); err != nil {
				return refuse(err)
			}
		}
		ctx = guard.NewContext(ctx, c.prepared)
		if housekeeping[method] {
			if err := g.enforcer.Check(c.prepared, e.Call); err != nil {
				return refuse(err)
			}
			g.opts.Trail.Record(&e)
			return next(ctx, method, req)
		}
		return g.run(ctx, c, &e, func(ctx context.Context) (mcp.Result, error) {
			return next(ctx, method, req)
		})
	}
}

// traceparent returns the W3C trace context of a request: the header's, or what
// the client put into the request itself.
func traceparent(req mcp.Request) string {
	if extra := req.GetExtra(); extra != nil && extra.Header != nil {
		if h := extra.Header.Get(headerTrace); h != "" {
			return h
		}
	}
	if p := req.GetParams(); p != nil && !reflect.ValueOf(p).IsNil() {
		s, _ := p.GetMeta()["traceparent"].(string)
		return s
	}
	return ""
}

// call says what a request asks for.
func (g *Guard) call(method string, req mcp.Request) session.Call {
	name := ""
	switch p := req.GetParams().(type) {
	case *mcp.CallToolParamsRaw:
		name = p.Name
	case *mcp.GetPromptParams:
		name = p.Name
	case *mcp.ReadResourceParams:
		name = p.URI
	}
	var call session.Call
	if g.opts.Classify != nil {
		call = g.opts.Classify(method, name)
	}
	call.Tool, call.Audience = "", g.opts.Resource
	if method == "tools/call" {
		call.Tool = name
	}
	call.LowRisk = call.LowRisk || housekeeping[method]
	return call
}

type outcome struct {
	result mcp.Result
	err    error
}

// run runs work until it returns or its caller must stop, whichever is first.
func (g *Guard) run(ctx context.Context, c *caller, e *trail.Event, work func(context.Context) (mcp.Result, error)) (mcp.Result, error) {
	// The binding outlives a cancellation by the client: work that ignores it
	// goes on, and so must our watch over it.
	bound, release, err := g.enforcer.Bind(context.WithoutCancel(ctx), c.prepared, e.Call)
	e.Err = err
	g.opts.Trail.Record(e)
	if err != nil {
		return nil, g.rpcError(err)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	done := make(chan outcome, 1)
	err = g.work.Go(func() {
		defer release()
		defer cancel(nil)
		result, err := work(ctx)
		done <- outcome{result, err}
	})
	if err != nil {
		cancel(nil)
		release()
		return nil, g.rpcError(err)
	}

	var out outcome
	var why error
	select {
	case <-g.work.Stopped():
		why = g.work.Err()
	case <-bound.Done():
		select {
		case out = <-done: // the binding was released, because the work is over
		default:
			why = context.Cause(bound)
		}
	case out = <-done:
	}
	// The outcome of work that was cut is not the caller's any more, and a tool
	// that was cut reports that as a result of its own making, without an error.
	if d := guard.Cut(bound); d != nil {
		why = d
	}
	if why != nil {
		e.Err, e.Cut = why, true
		g.opts.Trail.Record(e)
		cancel(why) // first: the SDK cancels with no cause once we return
		return nil, g.rpcError(why)
	}
	return out.result, out.err
}
