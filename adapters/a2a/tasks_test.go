package a2aguard_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/a2aproject/a2a-go/v2/a2a"
	"github.com/a2aproject/a2a-go/v2/a2aclient"
	a2apb "github.com/a2aproject/a2a-go/v2/a2apb/v1"
	"github.com/a2aproject/a2a-go/v2/a2asrv"
	"github.com/a2aproject/a2a-go/v2/a2asrv/push"
	"github.com/a2aproject/a2a-go/v2/a2asrv/taskstore"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	a2aguard "github.com/interlock-fabric/interlock/adapters/a2a"
	"github.com/interlock-fabric/interlock/internal/guardtest"
	"github.com/interlock-fabric/interlock/pkg/authority"
	"github.com/interlock-fabric/interlock/pkg/guard"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// open is a store that protects nothing, so that what does is the guard's.
type open struct{ *taskstore.InMemory }

func newOpen() open {
	return open{taskstore.NewInMemory(&taskstore.InMemoryStoreConfig{Authenticator: func(context.Context) (string, error) { return "all", nil }})}
}

// The mechanism is the task store, and the look into it before what the SDK does
// by a task's id alone.
func TestTaskOfAnotherCallerIsNotThere(t *testing.T) {
	w := newWorld(t, nil, a2aguard.HandlerOptions{Tasks: newOpen(), PushConfigs: push.NewInMemoryStore(), PushSender: push.NewHTTPPushSender(nil)}, 0)
	forEachTransport(t, func(t *testing.T, tr a2a.TransportProtocol) {
		c, sid := w.user(t, tr, "ann")
		r := c.stream(t, "work", "")
		asked, err := c.send(t, "ask", "")
		if err != nil {
			t.Fatal(err)
		}
		strangers := map[string]*client{"another user": nil, "another agent": nil, "another client": nil}
		strangers["another user"], _ = w.user(t, tr, "bob")
		strangers["another agent"] = w.dial(t, tr, w.Token(t, "ann", sid, func(m map[string]any) { m["act"] = map[string]any{"sub": "https://agent.example/b"} }))
		strangers["another client"] = w.dial(t, tr, w.Token(t, "ann", sid, func(m map[string]any) { m["client_id"] = "other" }))
		for who, s := range strangers {
			for _, id := range []a2a.TaskID{r.id, asked.ID} {
				for name, try := range ways(t, s, id) {
					if err := try(); !errors.Is(err, a2a.ErrTaskNotFound) {
						t.Errorf("%s: %s: %v", who, name, err)
					}
				}
			}
			if list, err := s.ListTasks(bounded(t), &a2a.ListTasksRequest{}); err != nil || len(list.Tasks) != 0 || list.TotalSize != 0 {
				t.Errorf("%s lists %+v, %v", who, list, err)
			}
		}
		// Nothing of that has touched it, and its owner may, with another login.
		r.mustRun(t)
		c.set(w.Token(t, "ann", "another"))
		second := c.subscribe(t, r.id)
		second.mustRun(t)
		if _, err := c.CancelTask(bounded(t), &a2a.CancelTaskRequest{ID: r.id}); err != nil {
			t.Fatal(err)
		}
		c.mustComplete(t, "echo", asked.ID)
	})
}

// One that listens, without having begun the task, is cut by itself, with an
// error: the task goes on.
func TestListenerIsCutAloneAndIdleStreamsToo(t *testing.T) {
	w := newWorld(t, nil, a2aguard.HandlerOptions{}, 0)
	forEachTransport(t, func(t *testing.T, tr a2a.TransportProtocol) {
		c, _ := w.user(t, tr, "ann")
		r := c.stream(t, "work", "")
		second, sid := w.user(t, tr, "ann")
		sid += "-second"
		second.set(w.Token(t, "ann", sid))
		listener := second.subscribe(t, r.id)
		listener.mustRun(t)
		w.On(t, authority.Revoke, "session", sid)
		out := guardtest.Within(t, "the listener is cut", listener.end)
		if d, ok := a2aguard.DeniedOf(out.err); !ok || d.Error != "revoked" || d.Incident != "INC-142" {
			t.Fatalf("%+v, %v", out.last, out.err)
		}
		r.mustRun(t)

		// An idle stream, which brings nothing that could be checked.
		idle, sid := w.user(t, tr, "eve")
		waits := idle.stream(t, "wait", "")
		idle.set(w.Token(t, "eve", sid))
		listens := idle.subscribe(t, waits.id)
		w.On(t, authority.Revoke, "session", sid)
		waits.mustEnd(t, a2a.TaskStateCanceled, "revoked")
		listens.mustEnd(t, a2a.TaskStateCanceled, "revoked")
		if _, err := c.CancelTask(bounded(t), &a2a.CancelTaskRequest{ID: r.id}); err != nil {
			t.Fatal(err)
		}
	})
}

// webhook counts what is pushed to it, by path.
type webhook struct {
	*httptest.Server
	mu  sync.Mutex
	got map[string]int
}

func newWebhook(t *testing.T) *webhook {
	h := &webhook{got: make(map[string]int)}
	h.Server = httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		h.mu.Lock()
		h.got[r.URL.Path]++
		h.mu.Unlock()
	}))
	t.Cleanup(h.Close)
	return h
}

func (h *webhook) count(path string) int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.got[path]
}

// The mechanism is the push sender, which asks again for each notification.
func TestPushNotificationsStop(t *testing.T) {
	hook := newWebhook(t)
	w := newWorld(t, nil, a2aguard.HandlerOptions{PushConfigs: push.NewInMemoryStore(), PushSender: push.NewHTTPPushSender(nil)}, 0)
	t.Cleanup(http.DefaultTransport.(*http.Transport).CloseIdleConnections)
	forEachTransport(t, func(t *testing.T, tr a2a.TransportProtocol) {
		begin := func(name string) (r *running, sid, path string) {
			c, sid := w.user(t, tr, name)
			r = c.stream(t, "work", "")
			path = "/" + name + "/" + string(tr)
			if _, err := c.CreateTaskPushConfig(bounded(t), &a2a.PushConfig{TaskID: r.id, URL: hook.URL + path}); err != nil {
				t.Fatal(err)
			}
			guardtest.Eventually(t, "it is told", func() bool { return hook.count(path) > 3 })
			return r, sid, path
		}
		r, sid, path := begin("ann")
		other, otherSID, otherPath := begin("bob")
		w.On(t, authority.Revoke, "session", sid)
		r.mustEnd(t, a2a.TaskStateCanceled, "revoked")
		// What was on its way arrives; then nothing more.
		settled := hook.count(path)
		before := hook.count(otherPath)
		guardtest.Eventually(t, "the bystander is told", func() bool { return hook.count(otherPath) > before+10 })
		if got := hook.count(path); got > settled+1 {
			t.Errorf("%d notifications after the cut", got-settled)
		}
		w.On(t, authority.Revoke, "session", otherSID)
		other.mustEnd(t, a2a.TaskStateCanceled, "revoked")
	})
}

// slowSender holds its first notification until it is let go, whatever becomes of
// its context.
type slowSender struct {
	begun, let chan struct{}
	sent       atomic.Int64
}

func (s *slowSender) SendPush(context.Context, *a2a.PushConfig, a2a.Event) error {
	if s.sent.Add(1) == 1 {
		close(s.begun)
		<-s.let
	}
	return nil
}

// The mechanism is that each notification is checked by itself, those of one
// event included.
func TestNotificationsOfTheSameEventStop(t *testing.T) {
	slow := &slowSender{begun: make(chan struct{}), let: make(chan struct{})}
	w := newWorld(t, nil, a2aguard.HandlerOptions{PushConfigs: push.NewInMemoryStore(), PushSender: slow}, 0)
	c, sid := w.user(t, a2a.TransportProtocolJSONRPC, "ann")
	asked, err := c.send(t, "ask", "")
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if _, err := c.CreateTaskPushConfig(bounded(t), &a2a.PushConfig{TaskID: asked.ID, URL: "https://hook.example/"}); err != nil {
			t.Fatal(err)
		}
	}
	ended := make(chan error, 1)
	go func() { _, err := c.send(t, "wait", asked.ID); ended <- err }()
	guardtest.Within(t, "the first is sent", slow.begun)
	w.On(t, authority.Revoke, "session", sid)
	close(slow.let)
	if err := guardtest.Within(t, "the call ends", ended); err != nil {
		if _, ok := a2aguard.DeniedOf(err); !ok {
			t.Fatal(err)
		}
	}
	w.agent.letGo()
	guardtest.Eventually(t, "the task ends", func() bool { return w.Enforcer.Status().Running == 0 })
	if n := slow.sent.Load(); n != 1 {
		t.Errorf("%d notifications were sent", n)
	}
}

// The mechanism is the skill, as the tool of the call.
func TestRevokedSkillIsDeniedAloneAndCut(t *testing.T) {
	w := newWorld(t, &a2aguard.Options{Skill: func(r *a2a.SendMessageRequest) string { return "skill-" + r.Message.Parts[0].Text() }}, a2aguard.HandlerOptions{}, 0)
	var runs []*running
	for _, tr := range transports {
		c, _ := w.user(t, tr, "ann")
		runs = append(runs, c.stream(t, "wait", ""))
	}
	w.On(t, authority.Revoke, "tool", "skill-wait")
	for _, r := range runs {
		r.mustEnd(t, a2a.TaskStateCanceled, "revoked")
	}
	forEachTransport(t, func(t *testing.T, tr a2a.TransportProtocol) {
		c, _ := w.user(t, tr, "ann")
		_, err := c.send(t, "wait", "")
		if d, ok := a2aguard.DeniedOf(err); !ok || d.Error != "revoked" || !errors.Is(err, a2a.ErrUnauthorized) {
			t.Fatal(err)
		}
		for _, err := range c.SendStreamingMessage(bounded(t), message("wait", "")) {
			if d, ok := a2aguard.DeniedOf(err); !ok || d.Error != "revoked" {
				t.Fatal(err)
			}
		}
		c.mustComplete(t, "echo", "")
	})
}

// The operation is the tool of the call too; streaming is no way around it.
func TestRevokedOperationIsDeniedAlone(t *testing.T) {
	w := newWorld(t, nil, a2aguard.HandlerOptions{}, 0)
	w.On(t, authority.Revoke, "tool", "SendMessage")
	forEachTransport(t, func(t *testing.T, tr a2a.TransportProtocol) {
		c, _ := w.user(t, tr, "ann")
		if _, err := c.send(t, "echo", ""); !errors.Is(err, a2a.ErrUnauthorized) {
			t.Fatal(err)
		}
		for _, err := range c.SendStreamingMessage(bounded(t), message("echo", "")) {
			if !errors.Is(err, a2a.ErrUnauthorized) {
				t.Fatal(err)
			}
		}
		if _, err := c.ListTasks(bounded(t), &a2a.ListTasksRequest{}); err != nil {
			t.Fatal(err)
		}
	})
}

func TestReducedCallerLooksOnAndStops(t *testing.T) {
	w := newWorld(t, nil, a2aguard.HandlerOptions{}, 0)
	forEachTransport(t, func(t *testing.T, tr a2a.TransportProtocol) {
		c, sid := w.user(t, tr, "ann")
		asked, err := c.send(t, "ask", "")
		if err != nil {
			t.Fatal(err)
		}
		w.On(t, authority.Reduce, "session", sid)
		if _, err := c.send(t, "echo", asked.ID); !errors.Is(err, a2a.ErrUnauthorized) {
			t.Fatal(err)
		}
		if _, err := c.GetTask(bounded(t), &a2a.GetTaskRequest{ID: asked.ID}); err != nil {
			t.Fatal(err)
		}
		if _, err := c.CancelTask(bounded(t), &a2a.CancelTaskRequest{ID: asked.ID}); err != nil {
			t.Fatal(err)
		}
	})
}

// Under load, from many at once: what is let in after the decision has been
// applied is none, and nobody else is denied.
func TestNothingIsAcceptedAfterADecisionIsApplied(t *testing.T) {
	w := newWorld(t, nil, a2aguard.HandlerOptions{}, 0)
	forEachTransport(t, func(t *testing.T, tr a2a.TransportProtocol) {
		c, sid := w.user(t, tr, "ann")
		other, _ := w.user(t, tr, "bob")
		var applied atomic.Bool
		var accepted, late, denied, served atomic.Int64
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() {
				for ctx.Err() == nil {
					after := applied.Load()
					_, err := c.SendMessage(bounded(t), message("echo", ""))
					switch {
					case err != nil:
						denied.Add(1)
					case after:
						late.Add(1)
					default:
						accepted.Add(1)
					}
				}
			})
			wg.Go(func() {
				for ctx.Err() == nil {
					if _, err := other.SendMessage(bounded(t), message("echo", "")); err != nil && ctx.Err() == nil {
						t.Errorf("the bystander was denied: %v", err)
						return
					}
					served.Add(1)
				}
			})
		}
		guardtest.Eventually(t, "they are served", func() bool { return accepted.Load() > 10 && served.Load() > 10 })
		w.On(t, authority.Revoke, "session", sid)
		applied.Store(true)
		before := served.Load()
		guardtest.Eventually(t, "they are denied", func() bool { return denied.Load() > 20 && served.Load() > before+10 })
		cancel()
		wg.Wait()
		if n := late.Load(); n != 0 {
			t.Errorf("%d calls were accepted after the decision was applied", n)
		}
	})
}

// The mechanism is the end of the connection: a client that does not read must
// not keep the agent running, nor its own stream.
func TestClientThatDoesNotReadHoldsNothing(t *testing.T) {
	w := newWorld(t, &a2aguard.Options{FlushTimeout: 200 * time.Millisecond}, a2aguard.HandlerOptions{}, 0)
	forEachTransport(t, func(t *testing.T, tr a2a.TransportProtocol) {
		c, sid := w.user(t, tr, "ann")
		block := make(chan struct{})
		begun, ended := make(chan struct{}), make(chan struct{})
		go func() {
			defer close(ended)
			n := 0
			for _, err := range c.SendStreamingMessage(t.Context(), message("flood", "")) {
				if err != nil {
					return
				}
				if n++; n == 3 {
					close(begun)
					<-block
				}
			}
		}()
		guardtest.Within(t, "the flood", begun)
		// Until nothing moves any more: every buffer on the way is full.
		last, still := int64(-1), 0
		guardtest.Eventually(t, "the flood is held up", func() bool {
			if n := w.agent.flooded.Load(); n != last {
				last, still = n, 0
			}
			still++
			return still > 200
		})
		w.On(t, authority.Revoke, "session", sid)
		guardtest.Eventually(t, "the agent has stopped", func() bool {
			w.agent.mu.Lock()
			defer w.agent.mu.Unlock()
			return w.agent.running == 0
		})
		guardtest.Eventually(t, "the stream is given up", func() bool { return w.serving.Load() == 0 })
		close(block)
		guardtest.Within(t, "the client's end", ended)
	})
}

// The panics of an agent stay the SDK's to handle.
func TestAgentThatPanicsFailsItsTaskAlone(t *testing.T) {
	w := newWorld(t, nil, a2aguard.HandlerOptions{}, 0)
	forEachTransport(t, func(t *testing.T, tr a2a.TransportProtocol) {
		c, _ := w.user(t, tr, "ann")
		task, err := c.send(t, "panic", "")
		if err != nil || task.Status.State != a2a.TaskStateFailed {
			t.Fatalf("%+v, %v", task, err)
		}
		c.mustComplete(t, "echo", "")
	})
}

func TestClosedGuardDeniesAndCuts(t *testing.T) {
	w := newWorld(t, &a2aguard.Options{CloseTimeout: 20 * time.Millisecond}, a2aguard.HandlerOptions{}, 0)
	var runs []*running
	for _, tr := range transports {
		c, _ := w.user(t, tr, "ann")
		runs = append(runs, c.stream(t, "wait", ""))
	}
	c, _ := w.user(t, a2a.TransportProtocolGRPC, "bob")
	stubborn := c.stream(t, "stubborn", "")
	if err := w.guard.Close(); err == nil || !strings.Contains(err.Error(), "agents or calls") {
		t.Fatal(err)
	}
	for _, r := range append(runs, stubborn) {
		r.mustEnd(t, a2a.TaskStateFailed, "closed")
	}
	forEachTransport(t, func(t *testing.T, tr a2a.TransportProtocol) {
		c, _ := w.user(t, tr, "ann")
		if _, err := c.send(t, "echo", ""); err == nil {
			t.Fatal("allowed")
		}
	})
	w.agent.letGo()
	guardtest.Eventually(t, "Close joins", func() bool { return w.guard.Close() == nil })
}

func TestZeroGuardDenies(t *testing.T) {
	var g a2aguard.Guard
	agent := newAgent()
	h := g.NewHandler(agent, a2aguard.HandlerOptions{})
	if _, err := h.SendMessage(t.Context(), message("echo", "")); err == nil {
		t.Fatal("allowed")
	}
	for _, front := range []http.Handler{g.JSONRPC(a2asrv.NewJSONRPCHandler(h)), g.REST(a2asrv.NewRESTHandler(h))} {
		rec := httptest.NewRecorder()
		front.ServeHTTP(rec, httptest.NewRequest(http.MethodPost, "/message:send", nil))
		if rec.Code != http.StatusServiceUnavailable {
			t.Fatal(rec.Code)
		}
	}
	if err := g.Close(); err != nil {
		t.Fatal(err)
	}
}

// A handler that is reached by no way of the guard's knows nobody.
func TestHandlerWithoutAFrontDenies(t *testing.T) {
	w := newWorld(t, nil, a2aguard.HandlerOptions{}, 0)
	bare := httptest.NewServer(a2asrv.NewJSONRPCHandler(w.handler))
	defer bare.Close()
	w.at[a2a.TransportProtocolJSONRPC] = bare.URL
	c, _ := w.user(t, a2a.TransportProtocolJSONRPC, "ann")
	_, err := c.send(t, "echo", "")
	if d, ok := a2aguard.DeniedOf(err); !ok || d.Error != "no_identity" {
		t.Fatal(err)
	}
	c.base.CloseIdleConnections()
}

func TestConstructorRefusesWhatCouldNotGuard(t *testing.T) {
	f := guardtest.Open(t, 0)
	for name, c := range map[string]struct {
		enforcer a2aguard.Enforcer
		verifier a2aguard.Verifier
		opts     *a2aguard.Options
	}{
		"no enforcer": {nil, f.Verifier, nil},
		"no verifier": {f.Enforcer, nil, nil},
		"resource":    {f.Enforcer, f.Verifier, &a2aguard.Options{Resource: "https://user@host/"}},
		"scope":       {f.Enforcer, f.Verifier, &a2aguard.Options{Scopes: []string{"a b"}}},
	} {
		if g, err := a2aguard.New(c.enforcer, c.verifier, c.opts); g != nil || !errors.Is(err, session.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// An agent that delegates does so for its caller: once that one is cut, the work
// below ends too, and nothing more goes out.
func TestDelegatedWorkEndsWithItsCaller(t *testing.T) {
	below := newWorld(t, nil, a2aguard.HandlerOptions{}, 0)
	above := newWorld(t, nil, a2aguard.HandlerOptions{}, 0)
	forEachTransport(t, func(t *testing.T, tr a2a.TransportProtocol) {
		// The delegate knows the agent by a login of its own, which nobody cuts.
		c, _ := below.user(t, tr, "agent")
		base := &clientTransport{c: c.Client}
		out := a2aguard.NewTransport(above.Enforcer, base, &a2aguard.ClientOptions{Audience: "https://below.example/"})
		var sent atomic.Int64
		working := make(chan struct{}, 1)
		above.agent.client = func(ctx context.Context) error {
			for ev, err := range out.SendStreamingMessage(ctx, nil, message("work", "")) {
				if err != nil {
					sent.Add(-1000)
					_, again := out.SendMessage(context.WithoutCancel(ctx), nil, message("echo", ""))
					return errors.Join(err, fmt.Errorf("again: %w", again))
				}
				if _, ok := ev.(*a2a.TaskArtifactUpdateEvent); ok {
					select {
					case working <- struct{}{}:
					default:
					}
				}
			}
			return nil
		}
		caller, sid := above.user(t, tr, "ann")
		r := caller.stream(t, "delegate", "")
		guardtest.Within(t, "the delegate works", working)
		calls := base.calls.Load()
		above.On(t, authority.Revoke, "session", sid)
		r.mustEnd(t, a2a.TaskStateCanceled, "revoked")
		err := guardtest.Within(t, "the agent is told", above.agent.causes)
		if n := strings.Count(err.Error(), session.ErrRevoked.Error()); n != 2 {
			t.Fatalf("the agent was told: %v", err)
		}
		if base.calls.Load() != calls {
			t.Error("a call went out after the cut")
		}
		// Nobody's call does not go out at all.
		if _, err := out.GetTask(t.Context(), nil, &a2a.GetTaskRequest{ID: "x"}); !errors.Is(err, session.ErrNoIdentity) {
			t.Error(err)
		}
		p, err := above.Enforcer.Prepare(above.Identity(t, "bob", "s-bob"))
		if err != nil {
			t.Fatal(err)
		}
		if res, err := out.SendMessage(guard.NewContext(bounded(t), p), nil, message("echo", "")); err != nil {
			t.Errorf("the bystander's call: %v, %v", res, err)
		}
		// The binding is the call's own: it ends where nothing else would.
		sid = "s-eve-" + string(tr)
		if p, err = above.Enforcer.Prepare(above.Identity(t, "eve", sid)); err != nil {
			t.Fatal(err)
		}
		own := follow(t, a2aguard.NewTransport(above.Enforcer, base, &a2aguard.ClientOptions{Own: p}).SendStreamingMessage(t.Context(), nil, message("work", "")))
		own.mustRun(t)
		above.On(t, authority.Revoke, "session", sid)
		if out := guardtest.Within(t, "the agent's own call ends", own.end); !errors.Is(out.err, session.ErrRevoked) {
			t.Errorf("%+v, %v", out.last, out.err)
		}
		if _, err := c.CancelTask(bounded(t), &a2a.CancelTaskRequest{ID: own.id}); err != nil {
			t.Error(err)
		}
	})
}

// clientTransport sends by a client that is there already.
type clientTransport struct {
	a2aclient.Transport
	c     *a2aclient.Client
	calls atomic.Int64
}

func (t *clientTransport) SendMessage(ctx context.Context, _ a2aclient.ServiceParams, r *a2a.SendMessageRequest) (a2a.SendMessageResult, error) {
	t.calls.Add(1)
	return t.c.SendMessage(ctx, r)
}

func (t *clientTransport) SendStreamingMessage(ctx context.Context, _ a2aclient.ServiceParams, r *a2a.SendMessageRequest) iter.Seq2[a2a.Event, error] {
	t.calls.Add(1)
	return t.c.SendStreamingMessage(ctx, r)
}

// The same over gRPC.
func TestAnswersOverGRPC(t *testing.T) {
	w := newWorld(t, nil, a2aguard.HandlerOptions{}, 0)
	w.On(t, authority.Revoke, "session", "s-revoke")
	w.On(t, authority.Suspend, "session", "s-suspend")
	conn, err := grpc.NewClient(w.at[a2a.TransportProtocolGRPC], grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	service := a2apb.NewA2AServiceClient(conn)
	for _, tt := range []struct {
		name, token      string
		code             codes.Code
		challenge, retry string
		word             string
	}{
		{"none", "", codes.Unauthenticated, `Bearer resource_metadata="`, "", "no_identity"},
		{"revoked", w.Token(t, "ann", "s-revoke"), codes.Unauthenticated, `Bearer error="invalid_token", error_description="denied: revoked: stolen-token (seq `, "", "revoked"},
		{"suspended", w.Token(t, "ann", "s-suspend"), codes.PermissionDenied, "", "30", "suspended"},
	} {
		ctx := bounded(t)
		if tt.token != "" {
			ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+tt.token)
		}
		var unary, streamed metadata.MD
		_, err := service.ListTasks(ctx, &a2apb.ListTasksRequest{}, grpc.Trailer(&unary))
		stream, serr := service.SubscribeToTask(ctx, &a2apb.SubscribeToTaskRequest{Id: "x"})
		if serr != nil {
			t.Fatal(serr)
		}
		_, serr = stream.Recv()
		streamed = stream.Trailer()
		for err, trailer := range map[error]metadata.MD{err: unary, serr: streamed} {
			st, _ := status.FromError(err)
			if st.Code() != tt.code {
				t.Fatalf("%s: %v", tt.name, err)
			}
			if got := strings.Join(trailer.Get("www-authenticate"), ""); !strings.HasPrefix(got, tt.challenge) || (got == "") != (tt.challenge == "") {
				t.Errorf("%s: %v", tt.name, trailer)
			}
			if got := strings.Join(trailer.Get("retry-after"), ""); got != tt.retry {
				t.Errorf("%s: %v", tt.name, trailer)
			}
			info, ok := st.Details()[0].(*errdetails.ErrorInfo)
			if !ok || info.Domain != a2a.ProtocolDomain || info.Metadata["error"] != tt.word {
				t.Errorf("%s: %v", tt.name, st.Details())
			}
		}
	}
}

// What a client without an SDK reads.
func TestAnswersOnTheWire(t *testing.T) {
	w := newWorld(t, &a2aguard.Options{Scopes: []string{"agent.use"}}, a2aguard.HandlerOptions{}, 0)
	token := func(sid string) string {
		return w.Token(t, "ann", sid, func(m map[string]any) { m["scope"] = "agent.use" })
	}
	for _, op := range []authority.Operation{authority.Revoke, authority.Suspend} {
		w.On(t, op, "session", "s-"+string(op))
	}
	w.Decide(t, authority.Request{
		Operation: authority.StepUp, Targets: []authority.Target{authority.One("", "session", guardtest.Issuer, "s-step_up")}, Reason: "risk-level", ACR: "gold",
	})
	const meta = `scope="agent.use", resource_metadata="https://agent.example/.well-known/oauth-protected-resource"`
	for _, tt := range []struct {
		name, token string
		status      int
		challenge   string // its beginning
		retry, word string
	}{
		{"none", "", 401, "Bearer " + meta, "", "no_identity"},
		{"garbage", "garbage", 401, `Bearer error="invalid_token", error_description="token refused: malformed: not canonical base64url", ` + meta, "", "no_identity"},
		{"revoked", token("s-revoke"), 401, `Bearer error="invalid_token", error_description="denied: revoked: stolen-token (seq `, "", "revoked"},
		{"suspended", token("s-suspend"), 403, "", "30", "suspended"},
		{"step-up", token("s-step_up"), 401, `Bearer error="insufficient_user_authentication", error_description="denied: step-up authentication required: risk-level (seq `, "", "step_up"},
		{"scope", w.Token(t, "ann", "s"), 403, `Bearer error="insufficient_scope", error_description="denied: insufficient scope", ` + meta, "", "insufficient_scope"},
	} {
		for _, tr := range transports[:2] {
			t.Run(tt.name+"/"+string(tr), func(t *testing.T) {
				url, body := w.at[tr], `{"jsonrpc":"2.0","id":"7","method":"ListTasks","params":{}}`
				if tr == a2a.TransportProtocolHTTPJSON {
					url += "/message:send"
				}
				req, err := http.NewRequestWithContext(bounded(t), http.MethodPost, url, strings.NewReader(body))
				if err != nil {
					t.Fatal(err)
				}
				if tt.token != "" {
					req.Header.Set("Authorization", "Bearer "+tt.token)
				}
				tp := &http.Transport{DisableKeepAlives: true}
				resp, err := tp.RoundTrip(req)
				if err != nil {
					t.Fatal(err)
				}
				defer resp.Body.Close()
				raw, err := io.ReadAll(resp.Body)
				if err != nil {
					t.Fatal(err)
				}
				h := resp.Header
				if resp.StatusCode != tt.status || !strings.HasPrefix(h.Get("WWW-Authenticate"), tt.challenge) || (tt.challenge == "") != (h.Get("WWW-Authenticate") == "") ||
					h.Get("Retry-After") != tt.retry || h.Get("Cache-Control") != "no-store" {
					t.Fatalf("%s\n%v", resp.Status, h)
				}
				if tt.name == "step-up" && !strings.Contains(h.Get("WWW-Authenticate"), `acr_values="gold", max_age="0"`) {
					t.Fatal(h.Get("WWW-Authenticate"))
				}
				var got struct {
					ID    any `json:"id"`
					Error struct {
						Code          int
						Data, Details []struct {
							Domain   string
							Metadata map[string]string
						}
					}
				}
				if err := json.Unmarshal(raw, &got); err != nil {
					t.Fatalf("%v: %s", err, raw)
				}
				details, code := got.Error.Details, tt.status
				if tr == a2a.TransportProtocolJSONRPC {
					details, code = got.Error.Data, -31000-tt.status
					known := tt.name != "none" && tt.name != "garbage"
					if (got.ID == "7") != known {
						t.Errorf("id %v", got.ID)
					}
				}
				if got.Error.Code != code || len(details) != 1 || details[0].Domain != a2a.ProtocolDomain || details[0].Metadata["error"] != tt.word {
					t.Fatalf("%s", raw)
				}
			})
		}
	}
}
