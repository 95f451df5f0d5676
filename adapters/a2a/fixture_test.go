package a2aguard_test

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/a2aproject/a2a-go/v2/a2a"
	"github.com/a2aproject/a2a-go/v2/a2aclient"
	a2agrpc "github.com/a2aproject/a2a-go/v2/a2agrpc/v1"
	"github.com/a2aproject/a2a-go/v2/a2asrv"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	a2aguard "github.com/interlock-fabric/interlock/adapters/a2a"
	"github.com/interlock-fabric/interlock/internal/guardtest"
	"github.com/interlock-fabric/interlock/pkg/guard"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// transports are those of the protocol; each test of a mechanism runs on all.
var transports = []a2a.TransportProtocol{
	a2a.TransportProtocolJSONRPC, a2a.TransportProtocolHTTPJSON, a2a.TransportProtocolGRPC,
}

// world is a guarded agent on real sockets, on every transport, with a real
// enforcer and real tokens.
type world struct {
	*guardtest.Fabric
	guard   *a2aguard.Guard
	agent   *agent
	at      map[a2a.TransportProtocol]string
	handler a2asrv.RequestHandler
	serving atomic.Int64 // requests and streams that have not been left
}

func newWorld(t *testing.T, opts *a2aguard.Options, h a2aguard.HandlerOptions, maxStale time.Duration) *world {
	t.Helper()
	w := &world{Fabric: guardtest.Open(t, maxStale), agent: newAgent(), at: make(map[a2a.TransportProtocol]string)}
	if opts == nil {
		opts = &a2aguard.Options{}
	}
	opts.Resource = guardtest.Audience
	opts.ResourceMetadata = "https://agent.example/.well-known/oauth-protected-resource"
	var err error
	if w.guard, err = a2aguard.New(w.Enforcer, w.Verifier, opts); err != nil {
		t.Fatal(err)
	}
	w.handler = w.guard.NewHandler(w.agent, h)
	for _, s := range []struct {
		transport a2a.TransportProtocol
		handler   http.Handler
	}{
		{a2a.TransportProtocolJSONRPC, w.guard.JSONRPC(a2asrv.NewJSONRPCHandler(w.handler))},
		{a2a.TransportProtocolHTTPJSON, w.guard.REST(a2asrv.NewRESTHandler(w.handler))},
	} {
		srv := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
			w.serving.Add(1)
			defer w.serving.Add(-1)
			s.handler.ServeHTTP(rw, r)
		}))
		w.at[s.transport] = srv.URL
		t.Cleanup(func() { srv.CloseClientConnections(); srv.Close() })
	}
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	count := func(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, next grpc.StreamHandler) error {
		w.serving.Add(1)
		defer w.serving.Add(-1)
		return next(srv, ss)
	}
	gs := grpc.NewServer(grpc.ChainUnaryInterceptor(w.guard.UnaryInterceptor), grpc.ChainStreamInterceptor(count, w.guard.StreamInterceptor))
	a2agrpc.NewHandler(w.handler).RegisterWith(gs)
	served := make(chan struct{})
	go func() { defer close(served); _ = gs.Serve(l) }()
	w.at[a2a.TransportProtocolGRPC] = l.Addr().String()
	t.Cleanup(func() { gs.Stop(); <-served })
	t.Cleanup(func() {
		w.agent.letGo()
		if err := w.guard.Close(); err != nil {
			t.Error(err)
		}
	})
	return w
}

// client is a real client of one transport, with a token that may change.
type client struct {
	*a2aclient.Client
	mu    sync.Mutex
	token string
	base  *http.Transport
}

func (c *client) set(token string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.token = token
}

func (c *client) bearer() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return "Bearer " + c.token
}

func (c *client) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.Header.Set("Authorization", c.bearer())
	return c.base.RoundTrip(r)
}

func (w *world) dial(t *testing.T, transport a2a.TransportProtocol, token string) *client {
	t.Helper()
	c := &client{token: token, base: &http.Transport{}}
	t.Cleanup(c.base.CloseIdleConnections)
	hc := &http.Client{Transport: c}
	var err error
	c.Client, err = a2aclient.NewFromEndpoints(t.Context(), []*a2a.AgentInterface{a2a.NewAgentInterface(w.at[transport], transport)},
		a2aclient.WithJSONRPCTransport(hc), a2aclient.WithRESTTransport(hc),
		a2agrpc.WithGRPCTransport(grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithPerRPCCredentials(guardtest.CallMetadata(func() map[string]string { return map[string]string{"authorization": c.bearer()} }))))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Destroy() })
	return c
}

// user dials as a user with a session of their own, whose id it returns.
func (w *world) user(t *testing.T, transport a2a.TransportProtocol, name string) (c *client, sid string) {
	t.Helper()
	sid = fmt.Sprintf("s-%s-%s", name, strings.ReplaceAll(t.Name(), "/", "-"))
	return w.dial(t, transport, w.Token(t, name, sid)), sid
}

func forEachTransport(t *testing.T, test func(t *testing.T, transport a2a.TransportProtocol)) {
	for _, tr := range transports {
		t.Run(string(tr), func(t *testing.T) { test(t, tr) })
	}
}

func message(text string, task a2a.TaskID) *a2a.SendMessageRequest {
	m := a2a.NewMessage(a2a.MessageRoleUser, a2a.NewTextPart(text))
	m.TaskID = task
	return &a2a.SendMessageRequest{Message: m}
}

func bounded(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), guardtest.Patience)
	t.Cleanup(cancel)
	return ctx
}

// send asks for something and returns the task that comes of it.
func (c *client) send(t *testing.T, text string, task a2a.TaskID) (*a2a.Task, error) {
	t.Helper()
	res, err := c.SendMessage(bounded(t), message(text, task))
	if err != nil {
		return nil, err
	}
	out, ok := res.(*a2a.Task)
	if !ok {
		t.Fatalf("%T", res)
	}
	return out, nil
}

func (c *client) mustComplete(t *testing.T, text string, task a2a.TaskID) *a2a.Task {
	t.Helper()
	got, err := c.send(t, text, task)
	if err != nil {
		t.Fatal(err)
	}
	if got.Status.State != a2a.TaskStateCompleted {
		t.Fatalf("%s: %s", text, got.Status.State)
	}
	return got
}

// running is a stream that a test follows.
type running struct {
	id   a2a.TaskID
	end  chan outcome
	mu   sync.Mutex
	seen int
}

// outcome is the last event of a stream, and the error that it ended with.
type outcome struct {
	last a2a.Event
	err  error
}

func (r *running) events() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.seen
}

// follow reads a stream in the background, and returns once its task is working.
func follow(t *testing.T, events iter.Seq2[a2a.Event, error]) *running {
	t.Helper()
	r := &running{end: make(chan outcome, 1)}
	working := make(chan a2a.TaskID, 1)
	go func() {
		var out outcome
		for ev, err := range events {
			if err != nil {
				out.err = err
				break
			}
			out.last = ev
			r.mu.Lock()
			r.seen++
			r.mu.Unlock()
			state := a2a.TaskStateUnspecified
			switch ev := ev.(type) {
			case *a2a.TaskStatusUpdateEvent:
				state = ev.Status.State
			case *a2a.Task:
				state = ev.Status.State
			}
			if state == a2a.TaskStateWorking {
				select {
				case working <- ev.TaskInfo().TaskID:
				default:
				}
			}
		}
		r.end <- out
	}()
	select {
	case r.id = <-working:
	case out := <-r.end:
		t.Fatalf("the stream ended before its task ran: %+v", out)
	case <-time.After(guardtest.Patience):
		t.Fatal("never: the task runs")
	}
	return r
}

func (c *client) stream(t *testing.T, text string, task a2a.TaskID) *running {
	t.Helper()
	return follow(t, c.SendStreamingMessage(t.Context(), message(text, task)))
}

func (c *client) subscribe(t *testing.T, task a2a.TaskID) *running {
	t.Helper()
	return follow(t, c.SubscribeToTask(t.Context(), &a2a.SubscribeToTaskRequest{ID: task}))
}

// mustEnd fails unless the stream ends with this state and this denial, and
// returns the challenge.
func (r *running) mustEnd(t *testing.T, state a2a.TaskState, want string) string {
	t.Helper()
	out := guardtest.Within(t, "the stream ends", r.end)
	if out.err != nil {
		t.Fatalf("the stream ended with an error: %v", out.err)
	}
	ev, ok := out.last.(*a2a.TaskStatusUpdateEvent)
	if !ok {
		t.Fatalf("the last event is %+v", out.last)
	}
	if ev.TaskID != r.id {
		t.Fatalf("the end of task %s", ev.TaskID)
	}
	return mustBe(t, ev.Status, state, want)
}

func mustBe(t *testing.T, s a2a.TaskStatus, state a2a.TaskState, want string) string {
	t.Helper()
	got, challenge, ok := a2aguard.DeniedIn(s)
	if s.State != state || !ok || got.Error != want {
		t.Fatalf("%s, %+v; want %s, %s", s.State, got, state, want)
	}
	if (got.Seq == 0) != (got.Reason == "") || got.Reason != "" && (got.Reason != "stolen-token" || got.Incident != "INC-142") {
		t.Fatalf("%+v", got)
	}
	return challenge
}

// mustRun fails if the stream has ended, or does not go on to bring events.
func (r *running) mustRun(t *testing.T) {
	t.Helper()
	before := r.events()
	guardtest.Eventually(t, "the bystander's events go on", func() bool {
		select {
		case out := <-r.end:
			t.Fatalf("the bystander's stream ended: %+v", out)
		default:
		}
		return r.events() >= before+5
	})
}

// agent does what it is told.
type agent struct {
	let    chan struct{} // closed to let "stubborn" go
	letGo  func()
	causes chan error  // why the contexts of "wait" ended
	ended  chan string // an execution has returned
	said   chan string // "stubborn" has tried to say something after the cut
	client func(ctx context.Context) error

	flooded atomic.Int64 // events of "flood" that were taken

	mu      sync.Mutex
	running int
	cleaned []a2a.TaskID
}

func newAgent() *agent {
	a := &agent{let: make(chan struct{}), causes: make(chan error, 1024), ended: make(chan string, 1024), said: make(chan string, 1024)}
	a.letGo = sync.OnceFunc(func() { close(a.let) })
	return a
}

func (a *agent) Execute(ctx context.Context, ec *a2asrv.ExecutorContext) iter.Seq2[a2a.Event, error] {
	return func(yield func(a2a.Event, error) bool) {
		what := ec.Message.Parts[0].Text()
		a.mu.Lock()
		a.running++
		a.mu.Unlock()
		defer func() {
			a.mu.Lock()
			a.running--
			a.mu.Unlock()
			a.ended <- what
		}()
		status := func(s a2a.TaskState) bool { return yield(a2a.NewStatusUpdateEvent(ec, s, nil), nil) }
		say := func(text string) bool { return yield(a2a.NewArtifactEvent(ec, a2a.NewTextPart(text)), nil) }
		if ec.StoredTask == nil && !yield(a2a.NewSubmittedTask(ec, ec.Message), nil) {
			return
		}
		if !status(a2a.TaskStateWorking) {
			return
		}
		switch what {
		case "echo":
			say("hello")
			status(a2a.TaskStateCompleted)
		case "whoami":
			id, _ := a2aguard.IdentityOf(ctx)
			say(id.User)
			status(a2a.TaskStateCompleted)
		case "ask":
			status(a2a.TaskStateInputRequired)
		case "wait":
			say("a secret")
			<-ctx.Done()
			a.causes <- context.Cause(ctx)
			yield(nil, ctx.Err())
		case "stubborn":
			<-a.let
			a.said <- fmt.Sprint(say("too late"))
		case "work":
			id := a2a.NewArtifactID()
			say("begun")
			if !yield(&a2a.TaskArtifactUpdateEvent{TaskID: ec.TaskID, ContextID: ec.ContextID, Artifact: &a2a.Artifact{ID: id, Parts: a2a.ContentParts{a2a.NewTextPart("0")}}}, nil) {
				return
			}
			tick := time.NewTicker(2 * time.Millisecond)
			defer tick.Stop()
			for {
				select {
				case <-ctx.Done():
					return
				case <-tick.C:
				}
				if !yield(&a2a.TaskArtifactUpdateEvent{TaskID: ec.TaskID, ContextID: ec.ContextID, Artifact: &a2a.Artifact{ID: id, Parts: a2a.ContentParts{a2a.NewTextPart("x")}}}, nil) {
					return
				}
			}
		case "flood":
			text := strings.Repeat("x", 256<<10)
			for ctx.Err() == nil && yield(&a2a.TaskArtifactUpdateEvent{TaskID: ec.TaskID, ContextID: ec.ContextID, Artifact: &a2a.Artifact{ID: "a", Parts: a2a.ContentParts{a2a.NewTextPart(text)}}}, nil) {
				a.flooded.Add(1)
			}
		case "delegate":
			if err := a.client(ctx); err != nil {
				a.causes <- err
				yield(nil, err)
				return
			}
			status(a2a.TaskStateCompleted)
		case "panic":
			panic("the agent's own")
		default:
			yield(nil, errors.New("no such thing: "+what))
		}
	}
}

func (a *agent) Cancel(_ context.Context, ec *a2asrv.ExecutorContext) iter.Seq2[a2a.Event, error] {
	return func(yield func(a2a.Event, error) bool) {
		yield(a2a.NewStatusUpdateEvent(ec, a2a.TaskStateCanceled, nil), nil)
	}
}

func (a *agent) Cleanup(_ context.Context, ec *a2asrv.ExecutorContext, _ a2a.SendMessageResult, _ error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.cleaned = append(a.cleaned, ec.TaskID)
}

func (a *agent) wasCleaned(id a2a.TaskID) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, c := range a.cleaned {
		if c == id {
			return true
		}
	}
	return false
}

// stored is a task as its owner would find it, without asking the guard.
func (w *world) stored(t *testing.T, token string, id a2a.TaskID) (*a2a.Task, error) {
	t.Helper()
	who, err := w.Verifier.Verify(t.Context(), token)
	if err != nil {
		t.Fatal(err)
	}
	p, err := w.Enforcer.Prepare(who)
	if err != nil {
		t.Fatal(err)
	}
	return w.handler.GetTask(guard.NewContext(t.Context(), p), &a2a.GetTaskRequest{ID: id})
}
