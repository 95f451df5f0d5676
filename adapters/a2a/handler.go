package a2aguard

import (
	"context"
	"errors"
	"iter"

	"github.com/a2aproject/a2a-go/v2/a2a"
	"github.com/a2aproject/a2a-go/v2/a2asrv"
	"github.com/a2aproject/a2a-go/v2/a2asrv/push"
	"github.com/a2aproject/a2a-go/v2/a2asrv/taskstore"

	"github.com/interlock-fabric/interlock/pkg/guard"
	"github.com/interlock-fabric/interlock/pkg/session"
	"github.com/interlock-fabric/interlock/pkg/trail"
)

// HandlerOptions are the parts of a handler that the guard must know of. The zero
// value is useful.
type HandlerOptions struct {
	// Tasks keeps the tasks; nil keeps them in memory. See Guard.TaskStore for
	// what it must do.
	Tasks taskstore.Store
	// PushConfigs and PushSender are for push notifications; nil, both, is none.
	PushConfigs push.ConfigStore
	PushSender  push.Sender
}

// NewHandler makes the SDK's handler of an agent, guarded on every transport: it
// checks each operation, cuts tasks and streams, and keeps the tasks of one
// caller from all others. It goes behind JSONRPC, REST or the gRPC interceptors,
// which find out who calls: without them everything is denied.
//
// opts are the SDK's. The stores and the push sender are given in o: an
// a2asrv.WithTaskStore or WithPushNotifications in opts has no effect. Cluster
// mode does not carry who called, so its executions are denied.
func (g *Guard) NewHandler(agent a2asrv.AgentExecutor, o HandlerOptions, opts ...a2asrv.RequestHandlerOption) a2asrv.RequestHandler {
	tasks := o.Tasks
	if tasks == nil {
		tasks = taskstore.NewInMemory(&taskstore.InMemoryStoreConfig{Authenticator: a2asrv.NewTaskStoreAuthenticator()})
	}
	s, ok := g.TaskStore(tasks).(*store)
	if !ok {
		s = &store{next: tasks} // never: TaskStore returns one
	}
	var pushing push.Sender
	if o.PushSender != nil {
		pushing = &sender{g, o.PushSender}
	}
	all := make([]a2asrv.RequestHandlerOption, 0, len(opts)+3)
	if g.logger != nil {
		all = append(all, a2asrv.WithLogger(g.logger))
	}
	all = append(all, opts...)
	all = append(all, a2asrv.WithTaskStore(s), a2asrv.WithPushNotifications(o.PushConfigs, pushing))
	e := &executor{g: g, agent: agent, store: s}
	return &handler{g: g, tasks: s, executor: e, next: a2asrv.NewHandler(e, all...)}
}

type handler struct {
	g        *Guard
	tasks    *store
	executor *executor
	next     a2asrv.RequestHandler
}

// enter checks one operation of the caller that a transport has let in.
func (h *handler) enter(ctx context.Context, operation, skill string, task a2a.TaskID) (context.Context, *session.Prepared, error) {
	p := guard.FromContext(ctx)
	if err := h.g.work.Err(); err != nil {
		return ctx, nil, denied{err}
	}
	if !p.Valid() {
		return ctx, nil, denied{&session.DeniedError{Err: session.ErrNoIdentity}}
	}
	e := trail.Event{Mark: h.g.opts.Trail.Start(), Caller: p, Method: operation, Call: h.g.call(operation, skill), Traceparent: traceparent(ctx)}
	err := h.g.enforcer.Check(p, e.Call)
	if err == nil && skill != "" {
		e.Call.Tool = skill
		err = h.g.enforcer.Check(p, e.Call)
	}
	e.Err = err
	h.g.opts.Trail.Record(&e)
	if err != nil {
		return ctx, nil, denied{err}
	}
	callCtx, ok := a2asrv.CallContextFrom(ctx)
	if !ok {
		ctx, callCtx = a2asrv.NewCallContext(ctx, nil)
	}
	callCtx.User = a2asrv.NewAuthenticatedUser(ownerOf(p), nil)
	// The SDK looks at the task itself in most operations, but not in all:
	// subscribing and push notifications know it by its id alone.
	if task != "" {
		if _, err := h.tasks.Get(ctx, task); err != nil {
			return ctx, nil, err
		}
	}
	return ctx, p, nil
}

// denied marks the errors of the guard among those of the SDK.
type denied struct{ error }

// translate puts an error of enter into the words of the protocol.
func (h *handler) translate(err error) error {
	if d, ok := err.(denied); ok { //nolint:errorlint // enter wraps it in nothing
		return h.g.protocolError(d.error)
	}
	return err
}

// refuse translates the error of an operation whose headers have not been sent,
// and puts the challenge into them where the transport has a place for it.
func (h *handler) refuse(ctx context.Context, err error) error {
	d, ok := err.(denied) //nolint:errorlint // enter wraps it in nothing
	if !ok {
		return err
	}
	if c, ok := ctx.Value(connectionKey{}).(*connection); ok && c.header != nil {
		a := h.g.resource.Answer(d.error)
		a.Header(c.header, true)
	}
	return h.g.protocolError(d.error)
}

// taskOf is the task that a message belongs to, if any.
func taskOf(r *a2a.SendMessageRequest) a2a.TaskID {
	if r == nil || r.Message == nil {
		return ""
	}
	return r.Message.TaskID
}

// unary does an operation that ends by itself.
func unary[Req, Resp any](ctx context.Context, h *handler, operation string, task a2a.TaskID, req Req, do func(context.Context, Req) (Resp, error)) (Resp, error) {
	ctx, _, err := h.enter(ctx, operation, "", task)
	if err != nil {
		var none Resp
		return none, h.refuse(ctx, err)
	}
	return do(ctx, req)
}

// GetTask implements a2asrv.RequestHandler, as all below do.
func (h *handler) GetTask(ctx context.Context, r *a2a.GetTaskRequest) (*a2a.Task, error) {
	return unary(ctx, h, opGet, "", r, h.next.GetTask)
}

func (h *handler) ListTasks(ctx context.Context, r *a2a.ListTasksRequest) (*a2a.ListTasksResponse, error) {
	return unary(ctx, h, opList, "", r, h.next.ListTasks)
}

func (h *handler) GetTaskPushConfig(ctx context.Context, r *a2a.GetTaskPushConfigRequest) (*a2a.PushConfig, error) {
	return unary(ctx, h, opPushGet, r.TaskID, r, h.next.GetTaskPushConfig)
}

func (h *handler) ListTaskPushConfigs(ctx context.Context, r *a2a.ListTaskPushConfigRequest) (*a2a.ListTaskPushConfigResponse, error) {
	return unary(ctx, h, opPushList, r.TaskID, r, h.next.ListTaskPushConfigs)
}

func (h *handler) CreateTaskPushConfig(ctx context.Context, r *a2a.PushConfig) (*a2a.PushConfig, error) {
	return unary(ctx, h, opPushCreate, r.TaskID, r, h.next.CreateTaskPushConfig)
}

func (h *handler) DeleteTaskPushConfig(ctx context.Context, r *a2a.DeleteTaskPushConfigRequest) error {
	_, err := unary(ctx, h, opPushDelete, r.TaskID, r, func(ctx context.Context, r *a2a.DeleteTaskPushConfigRequest) (struct{}, error) {
		return struct{}{}, h.next.DeleteTaskPushConfig(ctx, r)
	})
	return err
}

func (h *handler) GetExtendedAgentCard(ctx context.Context, r *a2a.GetExtendedAgentCardRequest) (*a2a.AgentCard, error) {
	return unary(ctx, h, opExtendedCard, "", r, h.next.GetExtendedAgentCard)
}

func (h *handler) CancelTask(ctx context.Context, r *a2a.CancelTaskRequest) (*a2a.Task, error) {
	ctx, p, err := h.enter(ctx, opCancel, "", r.ID)
	if err != nil {
		return nil, h.refuse(ctx, err)
	}
	var out *a2a.Task
	for t, err := range h.relay(ctx, p, opCancel, "", r.ID, func(ctx context.Context) iter.Seq2[a2a.Event, error] {
		return once(ctx, r, h.next.CancelTask)
	}) {
		if err != nil {
			return nil, err
		}
		out, _ = t.(*a2a.Task)
	}
	return out, nil
}

// SendMessage answers a call that was cut with the end of the task, without what
// the task holds: that is not the caller's any more.
func (h *handler) SendMessage(ctx context.Context, r *a2a.SendMessageRequest) (a2a.SendMessageResult, error) {
	skill := h.g.skill(r)
	ctx, p, err := h.enter(ctx, opSend, skill, taskOf(r))
	if err != nil {
		return nil, h.refuse(ctx, err)
	}
	ctx = context.WithValue(ctx, executionKey{}, &execution{})
	var out a2a.SendMessageResult
	for ev, err := range h.relay(ctx, p, opSend, skill, "", func(ctx context.Context) iter.Seq2[a2a.Event, error] {
		return once(ctx, r, h.next.SendMessage)
	}) {
		if err != nil {
			return nil, err
		}
		switch ev := ev.(type) {
		case a2a.SendMessageResult:
			out = ev
		case *a2a.TaskStatusUpdateEvent:
			out = &a2a.Task{ID: ev.TaskID, ContextID: ev.ContextID, Status: ev.Status}
		}
	}
	return out, nil
}

// once is the outcome of a call as a sequence of one.
func once[Req any, Resp a2a.Event](ctx context.Context, r Req, do func(context.Context, Req) (Resp, error)) iter.Seq2[a2a.Event, error] {
	return func(yield func(a2a.Event, error) bool) {
		if resp, err := do(ctx, r); err != nil {
			yield(nil, err)
		} else {
			yield(resp, nil)
		}
	}
}

func (h *handler) SendStreamingMessage(ctx context.Context, r *a2a.SendMessageRequest) iter.Seq2[a2a.Event, error] {
	return func(yield func(a2a.Event, error) bool) {
		skill := h.g.skill(r)
		ctx, p, err := h.enter(ctx, opStream, skill, taskOf(r))
		if err != nil {
			yield(nil, h.translate(err))
			return
		}
		ctx = context.WithValue(ctx, executionKey{}, &execution{})
		h.relay(ctx, p, opStream, skill, "", func(ctx context.Context) iter.Seq2[a2a.Event, error] {
			return h.next.SendStreamingMessage(ctx, r)
		})(yield)
	}
}

func (h *handler) SubscribeToTask(ctx context.Context, r *a2a.SubscribeToTaskRequest) iter.Seq2[a2a.Event, error] {
	return func(yield func(a2a.Event, error) bool) {
		ctx, p, err := h.enter(ctx, opSubscribe, "", r.ID)
		if err != nil {
			yield(nil, h.translate(err))
			return
		}
		h.relay(ctx, p, opSubscribe, "", r.ID, func(ctx context.Context) iter.Seq2[a2a.Event, error] {
			return h.next.SubscribeToTask(ctx, r)
		})(yield)
	}
}

// relay passes on what an operation brings for as long as its caller may listen,
// and then how the task ended, or why nothing more comes. task is one that
// another request has begun, if any.
func (h *handler) relay(ctx context.Context, p *session.Prepared, operation, skill string, task a2a.TaskID, open func(context.Context) iter.Seq2[a2a.Event, error]) iter.Seq2[a2a.Event, error] {
	return func(yield func(a2a.Event, error) bool) {
		bound, release, err := h.g.bind(ctx, p, operation, skill)
		if err != nil {
			yield(nil, h.g.protocolError(err))
			return
		}
		defer release()
		if c, ok := ctx.Value(connectionKey{}).(*connection); ok {
			stop := context.AfterFunc(bound, func() {
				if guard.Cut(bound) != nil {
					c.cut()
				}
			})
			defer stop()
		}
		// Not under the binding: the execution is cut by its own, and how it
		// ends comes this way.
		inner, cancel := context.WithCancel(ctx)
		defer cancel()
		items, stop, err := h.g.pump(open(inner), nil, nil)
		if err != nil {
			yield(nil, h.g.protocolError(err))
			return
		}
		defer stop()
		for {
			var next item
			select {
			case <-bound.Done():
			case <-h.g.work.Stopped():
			case next = <-items:
			}
			if why := h.g.whyCut(bound); why != nil {
				h.end(ctx, why, task, next, items, yield)
				return
			}
			var cut *cutError
			switch {
			case next.panicked != nil:
				panic(next.panicked) // where the transport expects it
			case next.end:
				return
			case next.event == nil && next.err == nil:
				return // the client has gone
			case errors.As(next.err, &cut) || next.err != nil && errors.As(executionOf(ctx).ended(), &cut):
				h.last(cut, cut.why, yield)
				return
			case !yield(next.event, next.err):
				return
			}
		}
	}
}

// end says how the task ended, of which the execution's own end tells, and
// discards whatever else is still on its way. Where the execution goes on,
// because it is another's that may listen no longer, it says why alone.
func (h *handler) end(ctx context.Context, why error, task a2a.TaskID, next item, items <-chan item, yield func(a2a.Event, error) bool) {
	var cut *cutError
	if task == "" || h.executor.ending(task) {
		timeout, stop := h.g.flush()
		defer stop()
		for waiting := true; waiting && !next.end && !errors.As(next.err, &cut); {
			select {
			case next = <-items:
			case <-timeout:
				waiting = false
			}
		}
	}
	if cut == nil {
		errors.As(executionOf(ctx).ended(), &cut)
	}
	h.last(cut, why, yield)
}

func (h *handler) last(cut *cutError, why error, yield func(a2a.Event, error) bool) {
	if cut != nil && cut.status != nil {
		yield(cut.status, nil)
		return
	}
	yield(nil, h.g.protocolError(why))
}
