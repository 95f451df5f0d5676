package interlock_test

import (
	"context"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/a2aproject/a2a-go/v2/a2asrv"
	"github.com/modelcontextprotocol/go-sdk/mcp"

	a2aguard "github.com/interlock-fabric/interlock/adapters/a2a"
	mcpguard "github.com/interlock-fabric/interlock/adapters/mcp"
	"github.com/interlock-fabric/interlock/pkg/credential"
	"github.com/interlock-fabric/interlock/pkg/enforce"
	"github.com/interlock-fabric/interlock/pkg/natsfeed"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// embed is what the README shows, so that it compiles.
func embed(ctx context.Context) error {
	enrollment, err := session.LoadEnrollment("enforcer.json")
	if err != nil {
		return err
	}
	feed, err := natsfeed.Dial(enrollment, nil)
	if err != nil {
		return err
	}
	// Open returns once a verified state is in force.
	enf, err := enforce.Open(ctx, feed, &enforce.Options{Enrollment: enrollment, StateDir: "/var/lib/tools"})
	if err != nil {
		return err
	}
	defer enf.Close()

	verifier, err := credential.New(credential.Options{
		Audiences: []string{"https://tools.example/mcp"},
		Issuers:   []credential.Issuer{{URL: "https://id.example", Tenant: "default", JWKS: "https://id.example/jwks.json"}},
	})
	if err != nil {
		return err
	}
	defer verifier.Close()
	guard, err := mcpguard.New(enf, verifier, &mcpguard.Options{Resource: "https://tools.example/mcp"})
	if err != nil {
		return err
	}
	defer guard.Close()

	server := mcp.NewServer(&mcp.Implementation{Name: "tools"}, nil)
	// … mcp.AddTool(server, …)
	return http.ListenAndServe(":8080", guard.Serve(server, nil))
}

// embedA2A is the same for an agent.
func embedA2A(enf *enforce.Enforcer, verifier *credential.Verifier, agent a2asrv.AgentExecutor) error {
	guard, err := a2aguard.New(enf, verifier, &a2aguard.Options{Resource: "https://agent.example/a2a"})
	if err != nil {
		return err
	}
	defer guard.Close()

	handler := guard.NewHandler(agent, a2aguard.HandlerOptions{}) // in place of a2asrv.NewHandler
	return http.ListenAndServe(":8080", guard.JSONRPC(a2asrv.NewJSONRPCHandler(handler)))
}

// TestReadmeShowsCodeThatCompiles holds the README to the functions above.
func TestReadmeShowsCodeThatCompiles(t *testing.T) {
	_, _ = embed, embedA2A // compiled, not run: they would listen
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	source, err := os.ReadFile("readme_test.go")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for rest := string(readme); ; n++ {
		_, after, ok := strings.Cut(rest, "```go\n")
		if !ok {
			break
		}
		shown, after, ok := strings.Cut(after, "```")
		if !ok {
			t.Fatal("the README's Go does not end")
		}
		rest = after
		var indented strings.Builder
		for line := range strings.Lines(shown) {
			if strings.TrimSpace(line) != "" {
				indented.WriteString("\t")
			}
			indented.WriteString(line)
		}
		if !strings.Contains(string(source), indented.String()) {
			t.Errorf("the README's code is not that of a function here:\n%s", shown)
		}
	}
	if n < 2 {
		t.Fatalf("the README shows %d pieces of Go", n)
	}
}

// TestFailureModesNameTestsThatExist: what the documents promise a test for has it.
func TestFailureModesNameTestsThatExist(t *testing.T) {
	const page = "docs/design/failure-modes.md"
	text, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	links := regexp.MustCompile("\\[`(Test\\w+)`\\]\\(([^)]+)\\)").FindAllStringSubmatch(string(text), -1)
	if len(links) < 8 {
		t.Fatalf("%s names %d tests", page, len(links))
	}
	for _, l := range links {
		source, err := os.ReadFile(filepath.Join(filepath.Dir(page), l[2]))
		if err != nil || !strings.Contains(string(source), "\nfunc "+l[1]+"(") {
			t.Errorf("%s is not in %s: %v", l[1], l[2], err)
		}
	}
}
