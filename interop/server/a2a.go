package main

import (
	"context"
	"errors"
	"iter"
	"net/http"
	"time"

	"github.com/a2aproject/a2a-go/v2/a2a"
	"github.com/a2aproject/a2a-go/v2/a2asrv"

	a2aguard "github.com/interlock-fabric/interlock/adapters/a2a"
	"github.com/interlock-fabric/interlock/pkg/credential"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// agentID is who the agent is to decisions.
const agentID = "https://agents.interop.example/worker"

// agent echoes, works until it is stopped, or ignores that it is.
type agent struct{ let <-chan struct{} }

func (a agent) Execute(ctx context.Context, ec *a2asrv.ExecutorContext) iter.Seq2[a2a.Event, error] {
	return func(yield func(a2a.Event, error) bool) {
		status := func(s a2a.TaskState) bool { return yield(a2a.NewStatusUpdateEvent(ec, s, nil), nil) }
		say := func(text string) bool { return yield(a2a.NewArtifactEvent(ec, a2a.NewTextPart(text)), nil) }
		if ec.StoredTask == nil && !yield(a2a.NewSubmittedTask(ec, ec.Message), nil) || !status(a2a.TaskStateWorking) {
			return
		}
		switch ec.Message.Parts[0].Text() {
		case "echo":
			if say("hello") {
				status(a2a.TaskStateCompleted)
			}
		case "work":
			tick := time.NewTicker(20 * time.Millisecond)
			defer tick.Stop()
			for say("more") {
				select {
				case <-ctx.Done():
					return
				case <-tick.C:
				}
			}
		case "stubborn":
			<-a.let
			say("too late")
		default:
			yield(nil, errors.New("no such thing"))
		}
	}
}

func (agent) Cancel(_ context.Context, ec *a2asrv.ExecutorContext) iter.Seq2[a2a.Event, error] {
	return func(yield func(a2a.Event, error) bool) {
		yield(a2a.NewStatusUpdateEvent(ec, a2a.TaskStateCanceled, nil), nil)
	}
}

// a2aSide is the agent behind its guard, and its card behind the gateway's.
type a2aSide struct {
	guard    *a2aguard.Guard
	upstream http.Handler // the card, as the agent itself would serve it
	rpc      http.Handler
	rest     http.Handler
	enforcer a2aguard.Enforcer
}

func newA2A(enforcer a2aguard.Enforcer, verifier *credential.Verifier, let <-chan struct{}) (*a2aSide, error) {
	guard, err := a2aguard.New(enforcer, verifier, &a2aguard.Options{
		Resource: resource, ResourceMetadata: "https://tools.example/.well-known/oauth-protected-resource",
	})
	if err != nil {
		return nil, err
	}
	handler := guard.NewHandler(agent{let}, a2aguard.HandlerOptions{})
	return &a2aSide{
		guard: guard, enforcer: enforcer,
		rpc: guard.JSONRPC(a2asrv.NewJSONRPCHandler(handler)), rest: guard.REST(a2asrv.NewRESTHandler(handler)),
		upstream: upstreamCard(),
	}, nil
}

func upstreamCard() http.Handler {
	return a2asrv.NewStaticAgentCardHandler(&a2a.AgentCard{
		Name: "worker", Description: "works", Version: "1", DefaultInputModes: []string{"text/plain"}, DefaultOutputModes: []string{"text/plain"},
		Capabilities: a2a.AgentCapabilities{Streaming: true},
		SupportedInterfaces: []*a2a.AgentInterface{
			a2a.NewAgentInterface("http://upstream.invalid/rpc", a2a.TransportProtocolJSONRPC),
			a2a.NewAgentInterface("http://upstream.invalid/rest", a2a.TransportProtocolHTTPJSON),
		},
		Skills: []a2a.AgentSkill{},
	})
}

// unguardedAgent is the same agent as its author would serve it, on both
// transports at one address, which checks nobody.
func unguardedAgent(let <-chan struct{}) http.Handler {
	handler := a2asrv.NewHandler(agent{let})
	mux := http.NewServeMux()
	mux.Handle("POST /mcp", a2asrv.NewJSONRPCHandler(handler))
	mux.Handle("GET /mcp"+a2asrv.WellKnownAgentCardPath, upstreamCard())
	mux.Handle("/mcp/", http.StripPrefix("/mcp", a2asrv.NewRESTHandler(handler)))
	return mux
}

// cards is the gateway's view of the agent, at the addresses that it has by now.
func (s *a2aSide) cards(upstream, rpc, rest string) (http.Handler, error) {
	return a2aguard.NewCards(s.enforcer, a2aguard.CardOptions{
		Upstream:   upstream,
		Interfaces: map[a2a.TransportProtocol]string{a2a.TransportProtocolJSONRPC: rpc, a2a.TransportProtocolHTTPJSON: rest},
		Agent:      session.Identity{Tenant: tenant, Issuer: issuer, Actors: []session.Actor{{ID: agentID}}},
	})
}
