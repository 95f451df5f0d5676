package gateway

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"iter"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/a2aproject/a2a-go/v2/a2a"
	"github.com/a2aproject/a2a-go/v2/a2aclient"
	a2agrpc "github.com/a2aproject/a2a-go/v2/a2agrpc/v1"
	"github.com/a2aproject/a2a-go/v2/a2asrv"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/interlock-fabric/interlock/internal/guardtest"
	"github.com/interlock-fabric/interlock/pkg/authority"
)

// worker is an agent that works until it is let go, and guards nothing.
type worker struct {
	let  chan struct{}
	beat time.Duration
}

func (x worker) Execute(ctx context.Context, ec *a2asrv.ExecutorContext) iter.Seq2[a2a.Event, error] {
	return func(yield func(a2a.Event, error) bool) {
		if !yield(a2a.NewSubmittedTask(ec, ec.Message), nil) || !yield(a2a.NewStatusUpdateEvent(ec, a2a.TaskStateWorking, nil), nil) {
			return
		}
		tick := time.NewTicker(x.beat)
		defer tick.Stop()
		for {
			select {
			case <-x.let:
				yield(a2a.NewStatusUpdateEvent(ec, a2a.TaskStateCompleted, nil), nil)
				return
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			if !yield(a2a.NewArtifactEvent(ec, a2a.NewTextPart("x")), nil) {
				return
			}
		}
	}
}

func (worker) Cancel(_ context.Context, ec *a2asrv.ExecutorContext) iter.Seq2[a2a.Event, error] {
	return func(yield func(a2a.Event, error) bool) {
		yield(a2a.NewStatusUpdateEvent(ec, a2a.TaskStateCanceled, nil), nil)
	}
}

// One revocation ends the streams of a caller on every transport, and no other.
func TestA2AStreamsAreCut(t *testing.T) {
	w := newWorld(t)
	let := make(chan struct{})
	defer close(let)
	h := a2asrv.NewHandler(worker{let, 5 * time.Millisecond})
	transports := map[a2a.TransportProtocol]string{}
	config := "routes:\n"
	for tr, handler := range map[a2a.TransportProtocol]http.Handler{
		a2a.TransportProtocolJSONRPC: a2asrv.NewJSONRPCHandler(h), a2a.TransportProtocolHTTPJSON: a2asrv.NewRESTHandler(h),
	} {
		srv := httptest.NewServer(handler)
		t.Cleanup(func() { srv.CloseClientConnections(); srv.Close() })
		name := map[a2a.TransportProtocol]string{a2a.TransportProtocolJSONRPC: "rpc", a2a.TransportProtocolHTTPJSON: "rest"}[tr]
		config += "  - {name: " + name + ", protocol: a2a, path: /" + name + ", resource: \"" + resource + "\", upstream: {url: \"" + srv.URL + "\"}}\n"
		transports[tr] = "/" + name
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	gs := grpc.NewServer()
	a2agrpc.NewHandler(h).RegisterWith(gs)
	served := make(chan struct{})
	go func() { defer close(served); _ = gs.Serve(l) }()
	t.Cleanup(func() { gs.Stop(); <-served })
	config += "  - {name: grpc, protocol: a2a, path: /, resource: \"" + resource + "\", upstream: {url: \"http://" + l.Addr().String() + "\", http2: true}}\n"
	transports[a2a.TransportProtocolGRPC] = ""
	g := w.start(w.load(config+listener), Proxy)

	dial := func(tr a2a.TransportProtocol, token string) *a2aclient.Client {
		t.Helper()
		base := &http.Transport{}
		t.Cleanup(base.CloseIdleConnections)
		hc := &http.Client{Transport: bearer{token, base}}
		at := g.url() + transports[tr]
		if tr == a2a.TransportProtocolGRPC {
			at = strings.TrimPrefix(g.url(), "http://")
		}
		c, err := a2aclient.NewFromEndpoints(t.Context(), []*a2a.AgentInterface{a2a.NewAgentInterface(at, tr)},
			a2aclient.WithJSONRPCTransport(hc), a2aclient.WithRESTTransport(hc),
			a2agrpc.WithGRPCTransport(grpc.WithTransportCredentials(insecure.NewCredentials()),
				grpc.WithPerRPCCredentials(guardtest.CallMetadata(func() map[string]string { return map[string]string{"authorization": "Bearer " + token} }))))
		must(t, err)
		t.Cleanup(func() { _ = c.Destroy() })
		return c
	}
	message := func() *a2a.SendMessageRequest {
		return &a2a.SendMessageRequest{Message: a2a.NewMessage(a2a.MessageRoleUser, a2a.NewTextPart("work"))}
	}
	// stream follows one, and counts its events.
	stream := func(c *a2aclient.Client) (events chan struct{}, end chan error) {
		events, end = make(chan struct{}, 1<<16), make(chan error, 1)
		go func() {
			for _, err := range c.SendStreamingMessage(t.Context(), message()) {
				if err != nil {
					end <- err
					return
				}
				events <- struct{}{}
			}
			end <- nil
		}()
		for range 3 {
			within(t, "events come", events)
		}
		return events, end
	}
	type pair struct {
		cut, goesOn chan error
		events      chan struct{}
		ann, bob    *a2aclient.Client
	}
	pairs := map[a2a.TransportProtocol]*pair{}
	for tr := range transports {
		p := &pair{ann: dial(tr, w.token("ann", "s-ann")), bob: dial(tr, w.token("bob", "s-bob"))}
		_, p.cut = stream(p.ann)
		p.events, p.goesOn = stream(p.bob)
		pairs[tr] = p
	}
	w.decide(authority.Revoke, "session", "s-ann")
	for tr, p := range pairs {
		if err := within(t, string(tr)+" is cut", p.cut); err == nil || !strings.Contains(err.Error(), "INC-142") && !errors.Is(err, a2a.ErrUnauthenticated) {
			t.Errorf("%s: the client learnt %v", tr, err)
		}
		if _, err := p.ann.SendMessage(t.Context(), message()); err == nil {
			t.Errorf("%s: allowed after the cut", tr)
		}
		for len(p.events) > 0 {
			<-p.events
		}
		for range 5 {
			within(t, string(tr)+": the bystander's events go on", p.events)
		}
		select {
		case err := <-p.goesOn:
			t.Errorf("%s: the bystander's stream ended: %v", tr, err)
		default:
		}
	}
	// A decision on the operation holds on every transport, streamed or not.
	w.decide(authority.Suspend, "tool", "SendMessage")
	for tr, p := range pairs {
		err := within(t, string(tr)+": the bystander is cut by the operation", p.goesOn)
		if tr == a2a.TransportProtocolGRPC && status.Code(err) != codes.PermissionDenied && !errors.Is(err, a2a.ErrUnauthorized) {
			t.Errorf("%s: %v", tr, err)
		}
		if _, err := p.bob.SendMessage(t.Context(), message()); err == nil {
			t.Errorf("%s: allowed", tr)
		}
		if _, err := p.bob.GetTask(t.Context(), &a2a.GetTaskRequest{ID: "none"}); !errors.Is(err, a2a.ErrTaskNotFound) {
			t.Errorf("%s: another operation: %v", tr, err)
		}
	}
}

// The card of an agent shows the gateway's address, and nothing once the agent is
// revoked.
func TestAgentCard(t *testing.T) {
	w := newWorld(t)
	var up *httptest.Server
	up = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/.well-known/agent-card.json" {
			_ = json.NewEncoder(w).Encode(map[string]any{
				"name": "worker", "description": "works", "version": "1", "capabilities": map[string]any{}, "skills": []any{},
				"defaultInputModes": []string{"text/plain"}, "defaultOutputModes": []string{"text/plain"},
				"supportedInterfaces": []any{map[string]any{"url": up.URL + "/rpc", "protocolBinding": "JSONRPC", "protocolVersion": "1.0"}},
			})
		}
	}))
	defer up.Close()
	more := `agent_card: {upstream: "` + up.URL + `/.well-known/agent-card.json", agent: "spiffe://corp/agent/worker", tenant: default},`
	g := w.start(w.load(strings.Replace(routeTo("a2a", "/agent", up.URL, more), resource, "https://agents.example/agent", 1)), Proxy)
	card := func() (int, string) {
		resp := get(t, g.url()+"/agent/.well-known/agent-card.json")
		b, _ := io.ReadAll(resp.Body)
		return resp.StatusCode, string(b)
	}
	if code, body := card(); code != http.StatusOK || !strings.Contains(body, `"https://agents.example/agent"`) || strings.Contains(body, up.URL) {
		t.Fatal(code, body)
	}
	w.decide(authority.Suspend, "agent", "spiffe://corp/agent/worker")
	eventually(t, "the agent is not to be found", func() bool { code, _ := card(); return code == http.StatusNotFound })
	w.decide(authority.Resume, "agent", "spiffe://corp/agent/worker")
	eventually(t, "the agent is there again", func() bool { code, _ := card(); return code == http.StatusOK })
}
