package gateway

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/a2aproject/a2a-go/v2/a2a"
	"github.com/a2aproject/a2a-go/v2/a2aclient"
	a2agrpc "github.com/a2aproject/a2a-go/v2/a2agrpc/v1"
	"github.com/a2aproject/a2a-go/v2/a2apb/v1"
	"github.com/a2aproject/a2a-go/v2/a2asrv"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"

	"github.com/interlock-fabric/interlock/internal/guardtest"
	"github.com/interlock-fabric/interlock/pkg/authority"
)

// books is an agent that guards nothing, and knows which tasks it executes.
type books struct {
	worker
	mu    sync.Mutex
	tasks map[a2a.TaskID]bool
	// canceled are the requests to cancel that came over gRPC.
	canceled chan canceled
}

type canceled struct {
	*a2apb.CancelTaskRequest
	metadata.MD
}

func (b *books) Execute(ctx context.Context, ec *a2asrv.ExecutorContext) iter.Seq2[a2a.Event, error] {
	return func(yield func(a2a.Event, error) bool) {
		b.executes(ec.TaskID, true)
		defer b.executes(ec.TaskID, false)
		b.worker.Execute(ctx, ec)(yield)
	}
}

func (b *books) executes(id a2a.TaskID, yes bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.tasks[id] = yes
}

func (b *books) executing(id a2a.TaskID) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.tasks[id]
}

// newBooks serves an agent on all transports, behind a gateway.
func newBooks(t *testing.T) (w *world, b *books, dial func(tr a2a.TransportProtocol, token string) *a2aclient.Client, g *Gateway) {
	t.Helper()
	w = newWorld(t)
	let := make(chan struct{})
	t.Cleanup(func() { close(let) })
	b = &books{worker: worker{let, 250 * time.Millisecond}, tasks: make(map[a2a.TaskID]bool), canceled: make(chan canceled, 16)}
	h := a2asrv.NewHandler(b)
	rpc, rest := httptest.NewServer(a2asrv.NewJSONRPCHandler(h)), httptest.NewServer(a2asrv.NewTenantRESTHandler("/{*}", h))
	for _, srv := range []*httptest.Server{rpc, rest} {
		t.Cleanup(func() { srv.CloseClientConnections(); srv.Close() })
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	gs := grpc.NewServer(grpc.UnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
		if r, ok := req.(*a2apb.CancelTaskRequest); ok {
			md, _ := metadata.FromIncomingContext(ctx)
			b.canceled <- canceled{r, md}
		}
		return next(ctx, req)
	}))
	a2agrpc.NewHandler(h).RegisterWith(gs)
	served := make(chan struct{})
	go func() { defer close(served); _ = gs.Serve(l) }()
	t.Cleanup(func() { gs.Stop(); <-served })
	g = w.start(w.load(fmt.Sprintf(`
routes:
  - {name: rpc, protocol: a2a, path: /rpc, resource: %[1]q, upstream: {url: %[2]q}}
  - {name: rest, protocol: a2a, path: /rest, resource: %[1]q, upstream: {url: %[3]q}}
  - {name: grpc, protocol: a2a, path: /, resource: %[1]q, upstream: {url: "http://%[4]s", http2: true}}
`, resource, rpc.URL, rest.URL, l.Addr())+listener), Proxy)

	return w, b, func(tr a2a.TransportProtocol, token string) *a2aclient.Client {
		t.Helper()
		base := &http.Transport{}
		t.Cleanup(base.CloseIdleConnections)
		hc := &http.Client{Transport: bearer{token, base}}
		at := g.url() + "/rpc"
		switch tr {
		case a2a.TransportProtocolHTTPJSON:
			at = g.url() + "/rest"
		case a2a.TransportProtocolGRPC:
			at = strings.TrimPrefix(g.url(), "http://")
		}
		c, err := a2aclient.NewFromEndpoints(t.Context(), []*a2a.AgentInterface{a2a.NewAgentInterface(at, tr)},
			a2aclient.WithJSONRPCTransport(hc), a2aclient.WithRESTTransport(hc),
			a2agrpc.WithGRPCTransport(grpc.WithTransportCredentials(insecure.NewCredentials()),
				grpc.WithPerRPCCredentials(guardtest.CallMetadata(func() map[string]string { return map[string]string{"authorization": "Bearer " + token} }))))
		must(t, err)
		t.Cleanup(func() { _ = c.Destroy() })
		return c
	}, g
}

var transports = []a2a.TransportProtocol{a2a.TransportProtocolJSONRPC, a2a.TransportProtocolHTTPJSON, a2a.TransportProtocolGRPC}

// stream follows a task, and returns its id once it is executed.
func stream(t *testing.T, events iter.Seq2[a2a.Event, error]) (id a2a.TaskID, end chan error) {
	t.Helper()
	ids, end := make(chan a2a.TaskID, 1), make(chan error, 1)
	go func() {
		n := 0
		for ev, err := range events {
			if err != nil {
				end <- err
				return
			}
			if n++; n == 3 {
				ids <- ev.TaskInfo().TaskID
			}
		}
		end <- nil
	}()
	select {
	case id = <-ids:
	case err := <-end:
		t.Fatalf("the stream ended: %v", err)
	case <-time.After(patience):
		t.Fatal("never: events come")
	}
	return id, end
}

// An agent that guards nothing stops when its caller is cut at the gateway, on
// every transport, and goes on for everybody else: even where the one who is cut
// was listening. The mechanism is the CancelTask of package proxy.
func TestCutTasksAreCanceled(t *testing.T) {
	w, agent, dial, g := newBooks(t)
	type task struct {
		tr  a2a.TransportProtocol
		id  a2a.TaskID
		end chan error
	}
	var anns, bobs, listeners []task
	long := strings.Repeat("work ", 14<<10) // more than is looked at of any message
	for _, tr := range transports {
		begin := func(who string) task {
			id, end := stream(t, dial(tr, w.token(who, "s-"+who)).SendStreamingMessage(t.Context(), &a2a.SendMessageRequest{
				Tenant: "acme", Message: a2a.NewMessage(a2a.MessageRoleUser, a2a.NewTextPart(long)),
			}))
			return task{tr, id, end}
		}
		anns, bobs = append(anns, begin("ann")), append(bobs, begin("bob"))
		_, end := stream(t, dial(tr, w.token("eve", "s-eve")).SubscribeToTask(t.Context(), &a2a.SubscribeToTaskRequest{Tenant: "acme", ID: bobs[len(bobs)-1].id}))
		listeners = append(listeners, task{tr, "", end})
	}
	w.decide(authority.Revoke, "session", "s-eve")
	w.decide(authority.Revoke, "session", "s-ann")
	for _, x := range append(listeners, anns...) {
		if within(t, string(x.tr)+" is cut", x.end) == nil {
			t.Errorf("%s: the stream ended in order", x.tr)
		}
	}
	for _, x := range anns {
		eventually(t, string(x.tr)+": the agent stops", func() bool { return !agent.executing(x.id) })
	}
	for _, x := range bobs {
		select {
		case err := <-x.end:
			t.Errorf("%s: the bystander's stream ended: %v", x.tr, err)
		default:
		}
		if !agent.executing(x.id) {
			t.Errorf("%s: the bystander's task is not executed any more", x.tr)
		}
	}
	got := within(t, "gRPC is asked", agent.canceled)
	if got.GetTenant() != "acme" || a2a.TaskID(got.GetId()) != anns[2].id ||
		len(got.Get("authorization")) != 0 || strings.Join(got.Get("interlock-subject"), "") != "ann" || strings.Join(got.Get("a2a-version"), "") != "1.0" {
		t.Errorf("over gRPC: %v, %v", got.CancelTaskRequest, got.MD)
	}
	eventually(t, "three cancellations are counted", func() bool {
		families, err := g.metrics.registry.Gather()
		must(t, err)
		n := 0.0
		for _, f := range families {
			if f.GetName() == "interlock_gateway_task_cancellations_total" {
				for _, m := range f.GetMetric() {
					// A slow machine may not answer in time.
					if v := m.GetLabel()[0].GetValue(); v != "canceled" && v != "failed" {
						t.Fatalf("%v", m)
					}
					n += m.GetCounter().GetValue()
				}
			}
		}
		return n == 3
	})
}

// recorder is an agent in bytes: it begins an answer, if it has one, and tells of
// requests to cancel.
type recorder struct {
	*httptest.Server
	answer   string
	began    chan struct{}
	asked    chan *http.Request // with the body put back
	statuses chan int           // of answers to requests to cancel; 200 when there is none
	hang     bool
	left     chan struct{} // a request to cancel that hung
}

func newRecorder(t *testing.T, answer string) *recorder {
	x := &recorder{answer: answer, began: make(chan struct{}, 16), asked: make(chan *http.Request, 16), statuses: make(chan int, 16), left: make(chan struct{}, 16)}
	x.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		if strings.HasSuffix(r.URL.Path, ":cancel") || strings.Contains(string(body), `"CancelTask"`) || strings.Contains(string(body), `"tasks/cancel"`) {
			r.Body = io.NopCloser(strings.NewReader(string(body)))
			x.asked <- r
			if x.hang {
				<-r.Context().Done()
				x.left <- struct{}{}
			}
			select {
			case s := <-x.statuses:
				w.WriteHeader(s)
			default:
				_, _ = io.WriteString(w, "{}")
			}
			return
		}
		if x.answer != "" {
			w.Header().Set("Content-Type", "text/event-stream")
			_, _ = io.WriteString(w, x.answer)
			_ = http.NewResponseController(w).Flush()
		}
		x.began <- struct{}{}
		<-r.Context().Done()
	}))
	t.Cleanup(func() { x.CloseClientConnections(); x.Close() })
	return x
}

const rpcSend = `{"jsonrpc":"2.0","id":7,"method":%q,"params":{%s"message":{"messageId":"m","role":"ROLE_USER","parts":[]%s}}}`

// A task is cancelled over the transport of the request that has begun it, at its
// place, in its version, for its caller.
func TestCancellationsGoTheSameWay(t *testing.T) {
	w := newWorld(t)
	event := func(result string) string {
		return ": hello\n\ndata: {\"jsonrpc\":\"2.0\",\"id\":7,\"result\":" + result + "}\n\n"
	}
	for name, tt := range map[string]struct {
		answer, more   string
		path, body     string
		want, wantBody string
	}{
		"JSON-RPC": {
			answer: event(`{"task":{"id":"t/1","status":{"state":"TASK_STATE_WORKING"}}}`), path: "/agent/rpc?x=1", body: fmt.Sprintf(rpcSend, "SendStreamingMessage", "", ""),
			want: "/up/rpc?x=1", wantBody: `{"jsonrpc":"2.0","id":"interlock","method":"CancelTask","params":{"id":"t/1"}}`,
		},
		"JSON-RPC tenant": {
			answer: event(`{"statusUpdate":{"taskId":"t1"}}`), path: "/agent", body: fmt.Sprintf(rpcSend, "SendStreamingMessage", `"tenant":"acme",`, ""),
			want: "/up", wantBody: `{"jsonrpc":"2.0","id":"interlock","method":"CancelTask","params":{"id":"t1","tenant":"acme"}}`,
		},
		"JSON-RPC of 0.3": {
			answer: event(`{"kind":"task","id":"t1"}`), path: "/agent", body: fmt.Sprintf(rpcSend, "message/stream", "", ""),
			want: "/up", wantBody: `{"jsonrpc":"2.0","id":"interlock","method":"tasks/cancel","params":{"id":"t1"}}`,
		},
		"JSON-RPC without an answer": {
			path: "/agent", body: fmt.Sprintf(rpcSend, "SendMessage", "", `,"taskId":"t1"`),
			want: "/up", wantBody: `{"jsonrpc":"2.0","id":"interlock","method":"CancelTask","params":{"id":"t1"}}`,
		},
		"REST": {
			answer: "data: {\"task\":{\"id\":\"t/1\"}}\n\n", path: "/agent/message:stream", body: `{"message":{}}`,
			want: "/up/tasks/t%2F1:cancel", wantBody: `{}`,
		},
		"REST tenant": {
			answer: "data: {\"task\":{\"id\":\"t1\"}}\n\n", path: "/agent/a%20b/v1/message:stream", body: `{"message":{}}`,
			want: "/up/a%20b/v1/tasks/t1:cancel", wantBody: `{}`,
		},
		"REST without an answer": {
			path: "/agent/acme/message:send", body: `{"message":{"taskId":"t1"}}`, more: "forward_token: true, no_identity_headers: true,",
			want: "/up/acme/tasks/t1:cancel", wantBody: `{}`,
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := *w
			w.t = t
			up := newRecorder(t, tt.answer)
			g := w.start(w.load(fmt.Sprintf("routes:\n  - {name: tools, protocol: a2a, path: /agent, resource: %q, upstream: {%s url: %q}}\n%s", resource, tt.more, up.URL+"/up", listener)), Proxy)
			token := w.token("ann", "s-"+strings.ReplaceAll(name, " ", "-"))
			type ended struct {
				body string
				err  error
			}
			began, done := make(chan struct{}), make(chan ended, 1)
			go func() {
				req, _ := http.NewRequestWithContext(t.Context(), http.MethodPost, g.url()+tt.path, strings.NewReader(tt.body))
				for k, v := range map[string]string{"Content-Type": "application/json", "Authorization": "Bearer " + token, "A2A-Version": "1.0", "X-Other": "x"} {
					req.Header.Set(k, v)
				}
				res, err := (&http.Transport{DisableKeepAlives: true}).RoundTrip(req)
				if err != nil {
					done <- ended{err: err}
					return
				}
				defer res.Body.Close()
				r := bufio.NewReader(res.Body)
				if tt.answer != "" {
					_, _ = r.Peek(len(tt.answer))
					close(began)
				}
				b, err := io.ReadAll(r)
				done <- ended{string(b), err}
			}()
			within(t, "the agent works", up.began)
			if tt.answer != "" {
				within(t, "the client hears of it", began)
			}
			w.decide(authority.Revoke, "session", "s-"+strings.ReplaceAll(name, " ", "-"))
			end := within(t, "the client is told", done)
			if !strings.HasPrefix(end.body, tt.answer) || !strings.Contains(end.body, "INC-142") {
				t.Errorf("the client read %q, %v", end.body, end.err)
			}
			r := within(t, "the agent is asked to cancel", up.asked)
			body, _ := io.ReadAll(r.Body)
			if r.Method != http.MethodPost || r.RequestURI != tt.want || string(body) != tt.wantBody {
				t.Errorf("%s %s %s, want %s %s", r.Method, r.RequestURI, body, tt.want, tt.wantBody)
			}
			auth, subject := "", "ann"
			if tt.more != "" {
				auth, subject = "Bearer "+token, ""
			}
			for k, v := range map[string]string{"Authorization": auth, "Interlock-Subject": subject, "A2a-Version": "1.0", "Content-Type": "application/json", "X-Other": ""} {
				if r.Header.Get(k) != v {
					t.Errorf("%s is %q, want %q", k, r.Header.Get(k), v)
				}
			}
		})
	}
}

// begin has somebody's task begun at an agent in bytes.
func (x *recorder) begin(t *testing.T, w *world, g *Gateway, who string) (end chan error) {
	t.Helper()
	end, heard := make(chan error, 1), make(chan struct{})
	token := w.token(who, "s-"+who)
	go func() {
		req, _ := http.NewRequestWithContext(t.Context(), http.MethodPost, g.url()+"/agent", strings.NewReader(fmt.Sprintf(rpcSend, "SendStreamingMessage", "", "")))
		req.Header.Set("Content-Type", "application/json")
		req.Header.Set("Authorization", "Bearer "+token)
		res, err := (&http.Transport{DisableKeepAlives: true}).RoundTrip(req)
		if err != nil {
			end <- err
			return
		}
		defer res.Body.Close()
		r := bufio.NewReader(res.Body)
		_, _ = r.Peek(len(x.answer))
		close(heard)
		b, err := io.ReadAll(r)
		if err == nil && !strings.Contains(string(b), "INC-142") {
			err = errors.New("the client was not told")
		}
		end <- err
	}()
	within(t, "the agent works", x.began)
	within(t, "its client hears of it", heard)
	return end
}

const rpcTask = "data: {\"id\":7,\"result\":{\"task\":{\"id\":\"t1\"}}}\n\n"

// An agent that does not take it at once is asked again, and one that never
// answers holds up neither the cut nor the end of the gateway.
func TestCancellationsThatFail(t *testing.T) {
	w := newWorld(t)
	flaky, hanging := newRecorder(t, rpcTask), newRecorder(t, rpcTask)
	flaky.statuses <- http.StatusServiceUnavailable
	flaky.statuses <- http.StatusServiceUnavailable
	hanging.hang = true
	for name, up := range map[string]*recorder{"flaky": flaky, "hanging": hanging} {
		g := w.start(w.load(routeTo("a2a", "/agent", up.URL, "")), Proxy)
		end := up.begin(t, w, g, name)
		w.decide(authority.Revoke, "session", "s-"+name)
		must(t, within(t, name+": the client is told", end))
		within(t, name+" is asked", up.asked)
		if name == "flaky" {
			for range 2 {
				within(t, "it is asked again", up.asked)
			}
		} else {
			began := time.Now()
			g.Shutdown(context.Background())
			within(t, "the request is given up", up.left)
			if took := time.Since(began); took > 4*time.Second {
				t.Errorf("the gateway took %v to end", took)
			}
		}
	}
}

// A caller that is cut before the first event of its stream is told at once, and
// gets nothing of that event; the task that it names is cancelled all the same. An
// agent that goes on saying nothing is left. The mechanism is package proxy's
// hearing.
func TestTasksAreNamedAfterTheCut(t *testing.T) {
	w := newWorld(t)
	first, canceled, given := make(chan string, 1), make(chan string, 4), make(chan struct{}, 4)
	up := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		if strings.Contains(string(body), `"CancelTask"`) {
			canceled <- string(body)
			_, _ = io.WriteString(w, "{}")
			return
		}
		w.Header().Set("Content-Type", "text/event-stream")
		_ = http.NewResponseController(w).Flush()
		select {
		case event := <-first:
			_, _ = io.WriteString(w, event)
			_ = http.NewResponseController(w).Flush()
			<-r.Context().Done()
		case <-r.Context().Done():
		}
		given <- struct{}{}
	}))
	t.Cleanup(func() { up.CloseClientConnections(); up.Close() })
	g := w.start(w.load(routeTo("a2a", "/agent", up.URL, "")), Proxy)
	begin := func(who string) *http.Response {
		return post(t, g.url()+"/agent", w.token(who, "s-"+who), fmt.Sprintf(rpcSend, "SendStreamingMessage", "", ""))
	}
	for _, who := range []string{"ann", "eve"} {
		res := begin(who)
		// That the decision is durable can take longer than the agent is listened
		// to after the cut.
		decided := make(chan struct{})
		go func() {
			defer close(decided)
			w.decide(authority.Revoke, "session", "s-"+who)
		}()
		body := make(chan string, 1)
		go func() {
			b, _ := io.ReadAll(res.Body)
			body <- string(b)
		}()
		if got := within(t, who+" is told", body); !strings.Contains(got, "INC-142") || strings.Contains(got, "t1") {
			t.Errorf("%s read %q", who, got)
		}
		if who == "ann" {
			first <- rpcTask
			if got := within(t, "the task is cancelled", canceled); !strings.Contains(got, `"id":"t1"`) {
				t.Errorf("%s", got)
			}
		}
		within(t, who+"'s request is given up", given)
		<-decided
	}
	if len(canceled) != 0 {
		t.Errorf("another was cancelled: %s", <-canceled)
	}

	// Whoever has merely gone is not listened to.
	res := begin("bob")
	must(t, res.Body.Close())
	within(t, "bob's request is given up", given)
}

// A gateway that goes away takes nobody's task with it.
func TestTasksOutliveTheGateway(t *testing.T) {
	w := newWorld(t)
	up := newRecorder(t, rpcTask)
	g := w.start(w.load(routeTo("a2a", "/agent", up.URL, "")), Proxy)
	end := up.begin(t, w, g, "ann")
	g.Shutdown(context.Background())
	if err := within(t, "the stream ends", end); err == nil || !strings.Contains(err.Error(), "not told") {
		t.Errorf("the client: %v", err)
	}
	select {
	case r := <-up.asked:
		t.Errorf("the task was cancelled: %v", r)
	default:
	}
}
