package a2aguard

import (
	"context"
	"iter"

	"github.com/a2aproject/a2a-go/v2/a2a"
	"github.com/a2aproject/a2a-go/v2/a2aclient"

	"github.com/interlock-fabric/interlock/pkg/guard"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// ClientOptions configures what NewTransport makes. The zero value is useful.
type ClientOptions struct {
	// Own is the agent's own identity, prepared by the enforcer. It is checked
	// beside the caller on whose behalf the agent works; where it is nil, there
	// must be one.
	Own *session.Prepared
	// Audience is the URI of the agent that is called, so that a decision on it
	// holds; empty leaves that out.
	Audience string
}

// NewTransport guards the calls that an agent makes to another, on whichever
// transport: each is checked before it is sent, and bound while it runs. The
// caller is the one whose work ctx belongs to (see guard.NewContext): the context
// of the agent's own Execute says so already. A denial is a *session.DeniedError.
//
// Give it to the SDK's client by a factory:
//
//	a2aclient.WithTransport(a2a.TransportProtocolGRPC, a2aclient.TransportFactoryFn(
//		func(ctx context.Context, _ *a2a.AgentCard, i *a2a.AgentInterface) (a2aclient.Transport, error) {
//			conn, err := grpc.NewClient(i.URL, dialOptions...)
//			if err != nil {
//				return nil, err
//			}
//			return a2aguard.NewTransport(enforcer, a2agrpc.NewGRPCTransport(conn), nil), nil
//		}))
//
// Over HTTP a guard.Transport in the client's http.Client does the same.
func NewTransport(e Enforcer, base a2aclient.Transport, o *ClientOptions) a2aclient.Transport {
	t := &transport{enforcer: e, base: base}
	if o != nil {
		t.opts = *o
	}
	return t
}

type transport struct {
	enforcer Enforcer
	base     a2aclient.Transport
	opts     ClientOptions
}

func (t *transport) bind(ctx context.Context, operation string) (context.Context, context.CancelFunc, error) {
	if operation == opStream {
		operation = opSend
	}
	return guard.BindOutgoing(ctx, t.enforcer, t.opts.Own, session.Call{Tool: operation, Audience: t.opts.Audience, LowRisk: lowRisk[operation]})
}

func call[Req, Resp any](ctx context.Context, t *transport, operation string, p a2aclient.ServiceParams, r Req,
	do func(context.Context, a2aclient.ServiceParams, Req) (Resp, error),
) (Resp, error) {
	var none Resp
	bound, release, err := t.bind(ctx, operation)
	if err != nil {
		return none, err
	}
	defer release()
	resp, err := do(bound, p, r)
	if d := guard.Cut(bound); d != nil {
		return none, d // what came is not the caller's any more
	}
	return resp, err
}

func stream[Req any](ctx context.Context, t *transport, operation string, p a2aclient.ServiceParams, r Req,
	do func(context.Context, a2aclient.ServiceParams, Req) iter.Seq2[a2a.Event, error],
) iter.Seq2[a2a.Event, error] {
	return func(yield func(a2a.Event, error) bool) {
		bound, release, err := t.bind(ctx, operation)
		if err != nil {
			yield(nil, err)
			return
		}
		defer release()
		for ev, err := range do(bound, p, r) {
			if d := guard.Cut(bound); d != nil {
				yield(nil, d)
				return
			}
			if !yield(ev, err) {
				return
			}
		}
		if d := guard.Cut(bound); d != nil {
			yield(nil, d)
		}
	}
}

func (t *transport) GetTask(ctx context.Context, p a2aclient.ServiceParams, r *a2a.GetTaskRequest) (*a2a.Task, error) {
	return call(ctx, t, opGet, p, r, t.base.GetTask)
}

func (t *transport) ListTasks(ctx context.Context, p a2aclient.ServiceParams, r *a2a.ListTasksRequest) (*a2a.ListTasksResponse, error) {
	return call(ctx, t, opList, p, r, t.base.ListTasks)
}

func (t *transport) CancelTask(ctx context.Context, p a2aclient.ServiceParams, r *a2a.CancelTaskRequest) (*a2a.Task, error) {
	return call(ctx, t, opCancel, p, r, t.base.CancelTask)
}

func (t *transport) SendMessage(ctx context.Context, p a2aclient.ServiceParams, r *a2a.SendMessageRequest) (a2a.SendMessageResult, error) {
	return call(ctx, t, opSend, p, r, t.base.SendMessage)
}

func (t *transport) SubscribeToTask(ctx context.Context, p a2aclient.ServiceParams, r *a2a.SubscribeToTaskRequest) iter.Seq2[a2a.Event, error] {
	return stream(ctx, t, opSubscribe, p, r, t.base.SubscribeToTask)
}

func (t *transport) SendStreamingMessage(ctx context.Context, p a2aclient.ServiceParams, r *a2a.SendMessageRequest) iter.Seq2[a2a.Event, error] {
	return stream(ctx, t, opStream, p, r, t.base.SendStreamingMessage)
}

func (t *transport) GetTaskPushConfig(ctx context.Context, p a2aclient.ServiceParams, r *a2a.GetTaskPushConfigRequest) (*a2a.PushConfig, error) {
	return call(ctx, t, opPushGet, p, r, t.base.GetTaskPushConfig)
}

func (t *transport) ListTaskPushConfigs(ctx context.Context, p a2aclient.ServiceParams, r *a2a.ListTaskPushConfigRequest) ([]*a2a.PushConfig, error) {
	return call(ctx, t, opPushList, p, r, t.base.ListTaskPushConfigs)
}

func (t *transport) CreateTaskPushConfig(ctx context.Context, p a2aclient.ServiceParams, r *a2a.PushConfig) (*a2a.PushConfig, error) {
	return call(ctx, t, opPushCreate, p, r, t.base.CreateTaskPushConfig)
}

func (t *transport) DeleteTaskPushConfig(ctx context.Context, p a2aclient.ServiceParams, r *a2a.DeleteTaskPushConfigRequest) error {
	_, err := call(ctx, t, opPushDelete, p, r, func(ctx context.Context, p a2aclient.ServiceParams, r *a2a.DeleteTaskPushConfigRequest) (struct{}, error) {
		return struct{}{}, t.base.DeleteTaskPushConfig(ctx, p, r)
	})
	return err
}

func (t *transport) GetExtendedAgentCard(ctx context.Context, p a2aclient.ServiceParams, r *a2a.GetExtendedAgentCardRequest) (*a2a.AgentCard, error) {
	return call(ctx, t, opExtendedCard, p, r, t.base.GetExtendedAgentCard)
}

func (t *transport) Destroy() error { return t.base.Destroy() }
