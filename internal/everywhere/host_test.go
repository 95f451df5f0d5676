package everywhere

import (
	"context"
	"iter"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/a2aproject/a2a-go/v2/a2a"
	a2agrpc "github.com/a2aproject/a2a-go/v2/a2agrpc/v1"
	"github.com/a2aproject/a2a-go/v2/a2asrv"
	"github.com/modelcontextprotocol/go-sdk/mcp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	a2aguard "github.com/interlock-fabric/interlock/adapters/a2a"
	mcpguard "github.com/interlock-fabric/interlock/adapters/mcp"
	"github.com/interlock-fabric/interlock/internal/guardtest"
)

// Work says of a request which piece of long work it is, for the host's books.
const workHeader = "X-Work"

const clockURI = "clock://now"

// beat is how often work that runs says so.
const beat = 50 * time.Millisecond

// host is an MCP server of both eras and an A2A agent on two transports.
type host struct {
	http *httptest.Server
	grpc string

	mu       sync.Mutex
	gates    map[string]chan struct{}
	requests map[string]int // that have not been left, by their piece of work
	runs     map[string]int // of the tool and the agent that have not returned
}

func (h *host) count(m map[string]int, what string, n int) {
	if what == "" {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	m[what] += n
}

// gate is closed when a piece of work may end in order.
func (h *host) gate(what string) chan struct{} {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.gates[what] == nil {
		h.gates[what] = make(chan struct{})
	}
	return h.gates[what]
}

// open is how many requests of a piece of work the host is at.
func (h *host) open(what string) int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.requests[what]
}

// running is how often the tool or the agent is at a piece of work.
func (h *host) running(what string) int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.runs[what]
}

// newHost starts a host, guarded unless the guards are nil.
func newHost(t *testing.T, mg *mcpguard.Guard, ag *a2aguard.Guard) *host {
	t.Helper()
	h := &host{gates: make(map[string]chan struct{}), requests: make(map[string]int), runs: make(map[string]int)}

	none := func(context.Context, *mcp.SubscribeRequest) error { return nil }
	server := mcp.NewServer(&mcp.Implementation{Name: "tools", Version: "1"}, &mcp.ServerOptions{
		SubscribeHandler: none, UnsubscribeHandler: func(context.Context, *mcp.UnsubscribeRequest) error { return nil },
	})
	server.AddResource(&mcp.Resource{Name: "clock", URI: clockURI}, func(context.Context, *mcp.ReadResourceRequest) (*mcp.ReadResourceResult, error) {
		return &mcp.ReadResourceResult{Contents: []*mcp.ResourceContents{{URI: clockURI, Text: time.Now().String()}}}, nil
	})
	mcp.AddTool(server, &mcp.Tool{Name: "echo"}, func(context.Context, *mcp.CallToolRequest, struct{}) (*mcp.CallToolResult, any, error) {
		return &mcp.CallToolResult{Content: []mcp.Content{&mcp.TextContent{Text: "hello"}}}, nil, nil
	})
	mcp.AddTool(server, &mcp.Tool{Name: "work"}, func(ctx context.Context, r *mcp.CallToolRequest, in struct {
		What string `json:"what"`
	}) (*mcp.CallToolResult, any, error) {
		h.count(h.runs, in.What, 1)
		defer h.count(h.runs, in.What, -1)
		tick := time.NewTicker(beat)
		defer tick.Stop()
		for n := 1.0; ; n++ {
			select {
			case <-ctx.Done():
				return nil, nil, ctx.Err()
			case <-h.gate(in.What):
				return &mcp.CallToolResult{}, nil, nil
			case <-tick.C:
			}
			if err := r.Session.NotifyProgress(ctx, &mcp.ProgressNotificationParams{ProgressToken: r.Params.GetProgressToken(), Progress: n}); err != nil && ctx.Err() == nil {
				return nil, nil, err
			}
		}
	})
	agent := a2asrv.AgentExecutor(&agent{h})

	var tools http.Handler
	var rpc http.Handler
	var gs *grpc.Server
	if mg != nil {
		tools = mg.Serve(server, nil)
		handler := ag.NewHandler(agent, a2aguard.HandlerOptions{})
		rpc = ag.JSONRPC(a2asrv.NewJSONRPCHandler(handler))
		gs = grpc.NewServer(grpc.ChainUnaryInterceptor(ag.UnaryInterceptor), grpc.ChainStreamInterceptor(h.countStream, ag.StreamInterceptor))
		a2agrpc.NewHandler(handler).RegisterWith(gs)
	} else {
		get := func(*http.Request) *mcp.Server { return server }
		tools = mcpguard.Eras(mcp.NewStreamableHTTPHandler(get, nil),
			mcp.NewStreamableHTTPHandler(get, &mcp.StreamableHTTPOptions{Stateless: true, PropagateRequestCancellation: true}))
		handler := a2asrv.NewHandler(agent)
		rpc = a2asrv.NewJSONRPCHandler(handler)
		gs = grpc.NewServer(grpc.ChainStreamInterceptor(h.countStream))
		a2agrpc.NewHandler(handler).RegisterWith(gs)
	}
	mux := http.NewServeMux()
	mux.Handle("/mcp", tools)
	mux.Handle("/rpc", rpc)
	h.http = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		what := r.Header.Get(workHeader)
		h.count(h.requests, what, 1)
		defer h.count(h.requests, what, -1)
		mux.ServeHTTP(w, r)
	}))
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	must(t, err)
	h.grpc = l.Addr().String()
	var wg sync.WaitGroup
	wg.Go(func() { _ = gs.Serve(l) })
	stop := make(chan struct{})
	wg.Go(func() {
		tick := time.NewTicker(beat)
		defer tick.Stop()
		for {
			select {
			case <-stop:
				return
			case <-tick.C:
				_ = server.ResourceUpdated(context.Background(), &mcp.ResourceUpdatedNotificationParams{URI: clockURI})
			}
		}
	})
	t.Cleanup(func() {
		close(stop)
		h.mu.Lock()
		for _, g := range h.gates { // of a test that has failed
			select {
			case <-g:
			default:
				close(g)
			}
		}
		h.mu.Unlock()
		gs.Stop()
		wg.Wait()
		if mg != nil {
			must(t, mg.Close())
			must(t, ag.Close())
		}
		h.http.CloseClientConnections()
		for s := range server.Sessions() {
			wg.Go(func() { _ = s.Close() })
		}
		wg.Wait()
		h.http.Close()
		guardtest.Eventually(t, "all work has ended", func() bool {
			h.mu.Lock()
			defer h.mu.Unlock()
			for _, n := range h.runs {
				if n != 0 {
					return false
				}
			}
			return true
		})
	})
	return h
}

func (h *host) countStream(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, next grpc.StreamHandler) error {
	if v := metadata.ValueFromIncomingContext(ss.Context(), strings.ToLower(workHeader)); len(v) == 1 {
		h.count(h.requests, v[0], 1)
		defer h.count(h.requests, v[0], -1)
	}
	return next(srv, ss)
}

// agent answers "echo", and works at everything else until it is stopped.
type agent struct{ host *host }

func (a *agent) Execute(ctx context.Context, ec *a2asrv.ExecutorContext) iter.Seq2[a2a.Event, error] {
	return func(yield func(a2a.Event, error) bool) {
		what := ec.Message.Parts[0].Text()
		status := func(s a2a.TaskState) bool { return yield(a2a.NewStatusUpdateEvent(ec, s, nil), nil) }
		if ec.StoredTask == nil && !yield(a2a.NewSubmittedTask(ec, ec.Message), nil) || !status(a2a.TaskStateWorking) {
			return
		}
		if what == "echo" {
			status(a2a.TaskStateCompleted)
			return
		}
		a.host.count(a.host.runs, what, 1)
		defer a.host.count(a.host.runs, what, -1)
		tick := time.NewTicker(beat)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				yield(nil, ctx.Err())
				return
			case <-a.host.gate(what):
				status(a2a.TaskStateCompleted)
				return
			case <-tick.C:
			}
			if !yield(a2a.NewStatusUpdateEvent(ec, a2a.TaskStateWorking, nil), nil) {
				return
			}
		}
	}
}

func (*agent) Cancel(_ context.Context, ec *a2asrv.ExecutorContext) iter.Seq2[a2a.Event, error] {
	return func(yield func(a2a.Event, error) bool) {
		yield(a2a.NewStatusUpdateEvent(ec, a2a.TaskStateCanceled, nil), nil)
	}
}
