package a2aguard_test

import (
	"context"
	"fmt"
	"net/http"

	"github.com/a2aproject/a2a-go/v2/a2a"
	"github.com/a2aproject/a2a-go/v2/a2aclient"
	a2agrpc "github.com/a2aproject/a2a-go/v2/a2agrpc/v1"
	"github.com/a2aproject/a2a-go/v2/a2asrv"
	"google.golang.org/grpc"

	a2aguard "github.com/interlock-fabric/interlock/adapters/a2a"
	"github.com/interlock-fabric/interlock/pkg/credential"
	"github.com/interlock-fabric/interlock/pkg/guard"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// An agent behind a guard, on every transport. The enforcer is an
// *enforce.Enforcer.
func ExampleNew() {
	serve := func(enforcer a2aguard.Enforcer, agent a2asrv.AgentExecutor) error {
		verifier, err := credential.New(credential.Options{
			Audiences: []string{"https://agent.example/a2a"},
			Issuers:   []credential.Issuer{{URL: "https://id.example", Tenant: "acme", JWKS: "https://id.example/jwks.json"}},
		})
		if err != nil {
			return err
		}
		defer verifier.Close()
		guard, err := a2aguard.New(enforcer, verifier, &a2aguard.Options{
			Resource:         "https://agent.example/a2a",
			ResourceMetadata: "https://agent.example/.well-known/oauth-protected-resource",
		})
		if err != nil {
			return err
		}
		defer guard.Close()

		handler := guard.NewHandler(agent, a2aguard.HandlerOptions{})
		server := grpc.NewServer(grpc.ChainUnaryInterceptor(guard.UnaryInterceptor), grpc.ChainStreamInterceptor(guard.StreamInterceptor))
		a2agrpc.NewHandler(handler).RegisterWith(server) // and server.Serve(listener)

		mux := http.NewServeMux()
		mux.Handle("/a2a", guard.JSONRPC(a2asrv.NewJSONRPCHandler(handler)))
		mux.Handle("/rest/", guard.REST(http.StripPrefix("/rest", a2asrv.NewRESTHandler(handler))))
		return http.ListenAndServe(":8080", mux)
	}
	fmt.Println(serve(nil, nil))
	// Output: invalid: a2aguard: no enforcer
}

// A gateway shows an agent under its own address, for as long as the agent may
// act.
func ExampleNewCards() {
	serve := func(enforcer a2aguard.Enforcer) error {
		cards, err := a2aguard.NewCards(enforcer, a2aguard.CardOptions{
			Upstream:   "https://billing.internal.example/.well-known/agent-card.json",
			Interfaces: map[a2a.TransportProtocol]string{a2a.TransportProtocolJSONRPC: "https://gateway.example/billing"},
			Agent:      session.Identity{Tenant: "acme", Issuer: "https://id.example", Actors: []session.Actor{{ID: "https://agents.example/billing"}}},
		})
		if err != nil {
			return err
		}
		http.Handle(a2asrv.WellKnownAgentCardPath, cards)
		return nil
	}
	fmt.Println(serve(nil))
	// Output: invalid: a2aguard: no enforcer
}

// An agent that delegates to another, over gRPC here, does so for its own caller:
// the context of its Execute says who that is.
func ExampleNewTransport() {
	connect := func(ctx context.Context, enforcer a2aguard.Enforcer, card *a2a.AgentCard) (*a2aclient.Client, error) {
		return a2aclient.NewFromCard(ctx, card, a2aclient.WithTransport(a2a.TransportProtocolGRPC, a2aclient.TransportFactoryFn(
			func(_ context.Context, _ *a2a.AgentCard, i *a2a.AgentInterface) (a2aclient.Transport, error) {
				conn, err := grpc.NewClient(i.URL)
				if err != nil {
					return nil, err
				}
				return a2aguard.NewTransport(enforcer, a2agrpc.NewGRPCTransport(conn), nil), nil
			})))
	}
	_ = connect
}

// Over HTTP one guarded client serves the tools and the agents alike.
func ExampleNewTransport_http() {
	client := func(enforcer guard.Enforcer) *http.Client {
		return &http.Client{Transport: &guard.Transport{Enforcer: enforcer}}
	}
	connect := func(ctx context.Context, enforcer guard.Enforcer, card *a2a.AgentCard) (*a2aclient.Client, error) {
		return a2aclient.NewFromCard(ctx, card, a2aclient.WithJSONRPCTransport(client(enforcer)))
	}
	_ = connect
}

// A Go client finds out why its task ended.
func ExampleDeniedIn() {
	report := func(ctx context.Context, client *a2aclient.Client, id a2a.TaskID) {
		task, err := client.GetTask(ctx, &a2a.GetTaskRequest{ID: id})
		if d, ok := a2aguard.DeniedOf(err); ok {
			fmt.Println("denied:", d.Error, d.Incident)
			return
		}
		if d, challenge, ok := a2aguard.DeniedIn(task.Status); ok {
			fmt.Println("cut:", d.Error, d.Incident, challenge)
		}
	}
	_ = report
}
