package mcpguard_test

import (
	"context"
	"fmt"
	"net/http"
	"os"

	"github.com/modelcontextprotocol/go-sdk/mcp"

	mcpguard "github.com/interlock-fabric/interlock/adapters/mcp"
	"github.com/interlock-fabric/interlock/pkg/credential"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// A server of both eras of the protocol behind a guard. The enforcer is an
// *enforce.Enforcer.
func ExampleNew() {
	serve := func(enforcer mcpguard.Enforcer) error {
		verifier, err := credential.New(credential.Options{
			Audiences: []string{"https://tools.example/mcp"},
			Issuers:   []credential.Issuer{{URL: "https://id.example", Tenant: "acme", JWKS: "https://id.example/jwks.json"}},
		})
		if err != nil {
			return err
		}
		defer verifier.Close()
		guard, err := mcpguard.New(enforcer, verifier, &mcpguard.Options{
			Resource:         "https://tools.example/mcp",
			ResourceMetadata: "https://tools.example/.well-known/oauth-protected-resource",
			// What a caller with reduced rights may still do.
			Classify: func(method, name string) session.Call {
				return session.Call{LowRisk: method == "tools/call" && name == "search"}
			},
		})
		if err != nil {
			return err
		}
		defer guard.Close()

		server := mcp.NewServer(&mcp.Implementation{Name: "tools", Version: "1"}, nil)
		return http.ListenAndServe(":8080", guard.Serve(server, nil))
	}
	fmt.Println(serve(nil))
	// Output: invalid: mcpguard: no enforcer
}

// A server over stdio has no HTTP request to take an identity from: whoever
// starts it puts a token into its environment.
func ExampleNew_stdio() {
	run := func(ctx context.Context, enforcer mcpguard.Enforcer, verifier *credential.Verifier) error {
		id, err := verifier.Verify(ctx, os.Getenv("INTERLOCK_TOKEN"))
		if err != nil {
			return err
		}
		guard, err := mcpguard.New(enforcer, nil, &mcpguard.Options{Identity: &id})
		if err != nil {
			return err
		}
		defer guard.Close()

		server := mcp.NewServer(&mcp.Implementation{Name: "tools", Version: "1"}, nil)
		server.AddReceivingMiddleware(guard.Middleware)
		return server.Run(ctx, &mcp.StdioTransport{})
	}
	fmt.Println(run(context.Background(), nil, new(credential.Verifier)))
	// Output: token refused: no bearer token
}

// A host that makes the SDK's handlers itself puts them behind Handler, and
// gives every server the Middleware.
func ExampleEras() {
	server := mcp.NewServer(&mcp.Implementation{Name: "tools", Version: "1"}, nil)
	get := func(*http.Request) *mcp.Server { return server }
	endpoint := func(guard *mcpguard.Guard) http.Handler {
		server.AddReceivingMiddleware(guard.Middleware)
		return guard.Handler(mcpguard.Eras(
			mcp.NewStreamableHTTPHandler(get, &mcp.StreamableHTTPOptions{}),
			mcp.NewStreamableHTTPHandler(get, &mcp.StreamableHTTPOptions{Stateless: true, PropagateRequestCancellation: true}),
		))
	}
	_ = endpoint
}

// A Go client finds out why it was denied.
func ExampleDeniedOf() {
	report := func(ctx context.Context, client *mcp.ClientSession) {
		_, err := client.CallTool(ctx, &mcp.CallToolParams{Name: "search"})
		if d, ok := mcpguard.DeniedOf(err); ok {
			fmt.Println(d.Error, d.Reason, d.Incident, d.Seq)
		}
	}
	_ = report
}
