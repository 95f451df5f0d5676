package a2aguard_test

import (
	"bytes"
	"context"
	"encoding/json"
	"iter"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/a2aproject/a2a-go/v2/a2a"
	"github.com/a2aproject/a2a-go/v2/a2asrv"

	a2aguard "github.com/interlock-fabric/interlock/adapters/a2a"
	"github.com/interlock-fabric/interlock/internal/guardtest"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// once verifies a token once, so that what is measured is the guard.
type once struct{ id session.Identity }

func (v once) VerifyRequest(*http.Request) (session.Identity, error) { return v.id, nil }

// answer is an agent that has its answer ready.
type answer struct{}

func (answer) Execute(_ context.Context, ec *a2asrv.ExecutorContext) iter.Seq2[a2a.Event, error] {
	return func(yield func(a2a.Event, error) bool) {
		yield(a2a.NewMessageForTask(a2a.MessageRoleAgent, ec, a2a.NewTextPart("hello")), nil)
	}
}

func (answer) Cancel(context.Context, *a2asrv.ExecutorContext) iter.Seq2[a2a.Event, error] {
	return func(func(a2a.Event, error) bool) {}
}

// BenchmarkRequest is one request, without a network: through the SDK alone, and
// through the guard, with a token that is verified already and with a real one.
func BenchmarkRequest(b *testing.B) {
	f := guardtest.Open(b, 0)
	token := f.Token(b, "ann", "s-ann")
	id, err := f.Verifier.Verify(b.Context(), token)
	if err != nil {
		b.Fatal(err)
	}
	send, err := json.Marshal(map[string]any{"jsonrpc": "2.0", "id": "1", "method": "SendMessage", "params": message("hello", "")})
	if err != nil {
		b.Fatal(err)
	}
	bodies := map[string][]byte{"send": send, "list": []byte(`{"jsonrpc":"2.0","id":"1","method":"ListTasks","params":{}}`)}
	handlers := map[string]http.Handler{"sdk": a2asrv.NewJSONRPCHandler(named{a2asrv.NewHandler(answer{})})}
	for name, v := range map[string]a2aguard.Verifier{"guarded": once{id}, "verified": f.Verifier} {
		g, err := a2aguard.New(f.Enforcer, v, &a2aguard.Options{Resource: guardtest.Audience})
		if err != nil {
			b.Fatal(err)
		}
		defer g.Close()
		handlers[name] = g.JSONRPC(a2asrv.NewJSONRPCHandler(g.NewHandler(answer{}, a2aguard.HandlerOptions{})))
	}
	for _, what := range []string{"send", "list"} {
		for _, name := range []string{"sdk", "guarded", "verified"} {
			b.Run(what+"/"+name, func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					r := httptest.NewRequest(http.MethodPost, "/", bytes.NewReader(bodies[what]))
					r.Header.Set("Authorization", "Bearer "+token)
					w := httptest.NewRecorder()
					handlers[name].ServeHTTP(w, r)
					if w.Code != http.StatusOK || bytes.Contains(w.Body.Bytes(), []byte(`"error"`)) {
						b.Fatal(w.Body)
					}
				}
			})
		}
	}
}

// named is the SDK's handler with a caller, without which it lists nothing.
type named struct{ a2asrv.RequestHandler }

func (n named) ListTasks(ctx context.Context, r *a2a.ListTasksRequest) (*a2a.ListTasksResponse, error) {
	if c, ok := a2asrv.CallContextFrom(ctx); ok {
		c.User = a2asrv.NewAuthenticatedUser("ann", nil)
	}
	return n.RequestHandler.ListTasks(ctx, r)
}
