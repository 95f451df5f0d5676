package everywhere

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/a2aproject/a2a-go/v2/a2a"
	"github.com/a2aproject/a2a-go/v2/a2aclient"
	a2agrpc "github.com/a2aproject/a2a-go/v2/a2agrpc/v1"
	"github.com/modelcontextprotocol/go-sdk/mcp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	a2aguard "github.com/interlock-fabric/interlock/adapters/a2a"
	mcpguard "github.com/interlock-fabric/interlock/adapters/mcp"
	"github.com/interlock-fabric/interlock/internal/guardtest"
)

// The revisions of MCP, with sessions and without.
const (
	legacy = "2025-11-25"
	modern = "2026-07-28"
)

// kind is a way to have something running.
type kind string

const (
	legacyCall   kind = "MCP call " + legacy
	modernCall   kind = "MCP call " + modern
	legacyStream kind = "MCP stream " + legacy
	modernStream kind = "MCP stream " + modern
	a2aStream    kind = "A2A stream"
	grpcStream   kind = "gRPC stream"
)

var kinds = []kind{legacyCall, modernCall, legacyStream, modernStream, a2aStream, grpcStream}

func (k kind) era() string {
	if k == legacyCall || k == legacyStream {
		return legacy
	}
	return modern
}

func (k kind) isStream() bool { return k == legacyStream || k == modernStream }
func (k kind) isA2A() bool    { return k == a2aStream || k == grpcStream }

// way is where clients are guarded: in the host, or at a proxy before it.
type way struct {
	name     string
	host     *host
	mcp, rpc string
	grpc     string
	// applied is the newest decision that the way's enforcer has in force.
	applied func() uint64
}

// outcome is how a piece of work ended, for its client.
type outcome struct {
	at time.Time
	// said is what the client could read of why.
	said string
	err  error
}

// work is a piece of work that a client has running.
type work struct {
	kind   kind
	way    *way
	who    string
	name   string // of all, unique
	events atomic.Int64
	ended  chan outcome
	// stop ends it from the client's side.
	stop func()
	// task is A2A's.
	task atomic.Value
}

// wire adds credentials to the requests of a client, and watches what comes.
type wire struct {
	token, work string
	base        *http.Transport
	status      atomic.Int64 // the last one
	// stream is told how the answer to a request ended that opens a stream.
	stream chan outcome
}

func newWire(t *testing.T, token, work string) *wire {
	w := &wire{token: token, work: work, base: &http.Transport{}, stream: make(chan outcome, 1)}
	t.Cleanup(w.base.CloseIdleConnections)
	return w
}

func (w *wire) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.Header.Set("Authorization", "Bearer "+w.token)
	if w.work != "" {
		r.Header.Set(workHeader, w.work)
	}
	res, err := w.base.RoundTrip(r)
	if err != nil {
		return nil, err
	}
	w.status.Store(int64(res.StatusCode))
	if res.StatusCode == http.StatusOK && (r.Method == http.MethodGet || r.Header.Get("Mcp-Method") == "subscriptions/listen") {
		res.Body = &watched{ReadCloser: res.Body, wire: w}
	}
	return res, nil
}

// watched remembers the end of a body, which the SDK does not show.
type watched struct {
	io.ReadCloser
	wire *wire
	once sync.Once
	tail []byte
}

func (b *watched) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	b.tail = append(b.tail, p[:n]...)
	b.tail = bytes.Clone(b.tail[max(0, len(b.tail)-512):])
	if err != nil {
		b.once.Do(func() {
			o := outcome{at: time.Now(), said: string(b.tail), err: err}
			select {
			case b.wire.stream <- o:
			default:
			}
		})
	}
	return n, err
}

// dialMCP connects the SDK's client. events are counted.
func dialMCP(t *testing.T, w *way, era string, by *wire, events *atomic.Int64, change ...func(*mcp.StreamableClientTransport)) (*mcp.ClientSession, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	tr := &mcp.StreamableClientTransport{Endpoint: w.mcp, HTTPClient: &http.Client{Transport: by}}
	for _, c := range change {
		c(tr)
	}
	return mcp.NewClient(&mcp.Implementation{Name: "agent", Version: "1"}, &mcp.ClientOptions{
		ProgressNotificationHandler: func(context.Context, *mcp.ProgressNotificationClientRequest) { events.Add(1) },
		ResourceUpdatedHandler:      func(context.Context, *mcp.ResourceUpdatedNotificationRequest) { events.Add(1) },
	}).Connect(ctx, tr, &mcp.ClientSessionOptions{ProtocolVersion: era})
}

// dialA2A connects the SDK's client over the transport of a kind.
func dialA2A(t *testing.T, w *way, k kind, by *wire) *a2aclient.Client {
	t.Helper()
	at := a2a.NewAgentInterface(w.rpc, a2a.TransportProtocolJSONRPC)
	if k == grpcStream {
		at = a2a.NewAgentInterface(w.grpc, a2a.TransportProtocolGRPC)
	}
	out := func() map[string]string {
		md := map[string]string{"authorization": "Bearer " + by.token}
		if by.work != "" {
			md[strings.ToLower(workHeader)] = by.work
		}
		return md
	}
	c, err := a2aclient.NewFromEndpoints(t.Context(), []*a2a.AgentInterface{at},
		a2aclient.WithJSONRPCTransport(&http.Client{Transport: by}),
		a2agrpc.WithGRPCTransport(grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithPerRPCCredentials(guardtest.CallMetadata(out))))
	must(t, err)
	t.Cleanup(func() { _ = c.Destroy() })
	return c
}

func message(text string) *a2a.SendMessageRequest {
	return &a2a.SendMessageRequest{Message: a2a.NewMessage(a2a.MessageRoleUser, a2a.NewTextPart(text))}
}

// begin starts a piece of work.
func begin(t *testing.T, w *way, k kind, who, token string) *work {
	t.Helper()
	x := &work{kind: k, way: w, who: who, name: fmt.Sprintf("%s: %s %s", t.Name(), who, k), ended: make(chan outcome, 1)}
	by := newWire(t, token, x.name)
	if k.isA2A() {
		x.follow(t, dialA2A(t, w, k, by))
	} else {
		x.join(t, by)
	}
	return x
}

// follow begins a task.
func (x *work) follow(t *testing.T, c *a2aclient.Client) {
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	x.stop = func() { cancel(); <-done }
	t.Cleanup(x.stop)
	go func() {
		defer close(done)
		var out outcome
		for ev, err := range c.SendStreamingMessage(ctx, message(x.name)) {
			if err != nil {
				out.err, out.said = err, err.Error()
				if d, ok := a2aguard.DeniedOf(err); ok {
					out.said = fmt.Sprint(d)
				}
				break
			}
			x.task.Store(ev.TaskInfo().TaskID)
			x.events.Add(1)
			if u, ok := ev.(*a2a.TaskStatusUpdateEvent); ok {
				out.said = string(u.Status.State)
				if d, _, ok := a2aguard.DeniedIn(u.Status); ok {
					out.said = fmt.Sprint(d)
				}
			}
		}
		out.at = time.Now()
		x.ended <- out
	}()
}

// join begins a call of MCP, or opens a stream.
func (x *work) join(t *testing.T, by *wire) {
	t.Helper()
	cs, err := dialMCP(t, x.way, x.kind.era(), by, &x.events)
	must(t, err)
	if got := cs.InitializeResult().ProtocolVersion; got != x.kind.era() {
		t.Fatalf("negotiated %s, want %s", got, x.kind.era())
	}
	var wg sync.WaitGroup
	x.stop = sync.OnceFunc(func() { _ = cs.Close(); wg.Wait() })
	t.Cleanup(x.stop)
	if x.kind.isStream() {
		must(t, cs.Subscribe(t.Context(), &mcp.SubscribeParams{URI: clockURI}))
		x.ended = by.stream
		return
	}
	p := &mcp.CallToolParams{Name: "work", Arguments: map[string]any{"what": x.name}}
	p.SetProgressToken(x.name)
	wg.Go(func() {
		res, err := cs.CallTool(t.Context(), p)
		out := outcome{at: time.Now(), err: err}
		if err == nil && res.IsError {
			out.err = errors.New("the tool failed")
		}
		if d, ok := mcpguard.DeniedOf(err); ok {
			out.said = fmt.Sprint(d)
		} else if err != nil {
			out.said = err.Error()
		}
		x.ended <- out
	})
}

// goesOn fails unless the work runs and its client goes on to hear of it.
func (x *work) goesOn(t *testing.T) {
	t.Helper()
	before := x.events.Load()
	guardtest.Eventually(t, x.way.name+", "+x.name+" goes on", func() bool {
		select {
		case out := <-x.ended:
			t.Fatalf("%s, %s ended: %+v", x.way.name, x.name, out)
		default:
		}
		return x.events.Load() >= before+2
	})
}

// mustEnd ends the work, and fails unless it ends in order.
func (x *work) mustEnd(t *testing.T) {
	t.Helper()
	if !x.kind.isStream() {
		close(x.way.host.gate(x.name))
		select {
		case out := <-x.ended:
			if out.err != nil || x.kind.isA2A() && out.said != string(a2a.TaskStateCompleted) {
				t.Errorf("%s, %s: the end is %+v", x.way.name, x.name, out)
			}
		case <-time.After(patience):
			t.Fatalf("never: %s, %s ends", x.way.name, x.name)
		}
	}
	x.stop()
	guardtest.Eventually(t, x.way.name+": the host has left "+x.name, func() bool { return x.way.host.open(x.name) == 0 && x.way.host.running(x.name) == 0 })
}

// result is how an attempt ended.
type result int

const (
	accepted result = iota
	denied
	broken // neither: it was cut on its way, or something is wrong
)

// attempts are what a caller may try again and again, with what it holds.
type attempts struct {
	way     *way
	by      *wire
	session string // of the legacy era
	a2a     map[kind]*a2aclient.Client
	rpc     *wire // of a2aStream
}

func newAttempts(t *testing.T, w *way, token string) *attempts {
	t.Helper()
	a := &attempts{way: w, by: newWire(t, token, ""), rpc: newWire(t, token, ""), a2a: make(map[kind]*a2aclient.Client)}
	cs, err := dialMCP(t, w, legacy, newWire(t, token, ""), new(atomic.Int64),
		func(tr *mcp.StreamableClientTransport) { tr.DisableStandaloneSSE = true }) // a session has one, which is to be tried
	must(t, err)
	t.Cleanup(func() { _ = cs.Close() })
	a.session = cs.ID()
	for _, k := range []kind{a2aStream, grpcStream} {
		a.a2a[k] = dialA2A(t, w, k, a.rpc)
	}
	return a
}

// try tries once, in a few bytes on the wire for MCP, where a client of the SDK
// gives up at its first denial.
func (a *attempts) try(ctx context.Context, k kind) (result, error) {
	if k.isA2A() {
		return a.send(ctx, k)
	}
	meta := ""
	method, params := "tools/call", `"name":"echo","arguments":{}`
	if k.era() == modern {
		meta = fmt.Sprintf(`,"_meta":{"io.modelcontextprotocol/protocolVersion":%q,"io.modelcontextprotocol/clientInfo":{"name":"a","version":"1"},"io.modelcontextprotocol/clientCapabilities":{}}`, modern)
	}
	if k == modernStream {
		method, params = "subscriptions/listen", fmt.Sprintf(`"notifications":{"resourceSubscriptions":[%q]}`, clockURI)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	verb, body := http.MethodPost, fmt.Sprintf(`{"jsonrpc":"2.0","id":7,"method":%q,"params":{%s%s}}`, method, params, meta)
	if k == legacyStream {
		verb, body = http.MethodGet, ""
	}
	r, err := http.NewRequestWithContext(ctx, verb, a.way.mcp, strings.NewReader(body))
	if err != nil {
		return broken, err
	}
	r.Header.Set("Content-Type", "application/json")
	r.Header.Set("Accept", "application/json, text/event-stream")
	r.Header.Set("Mcp-Protocol-Version", k.era())
	if k.era() == legacy {
		r.Header.Set("Mcp-Session-Id", a.session)
	} else {
		r.Header.Set("Mcp-Method", method)
		if k == modernCall {
			r.Header.Set("Mcp-Name", "echo")
		}
	}
	res, err := a.by.RoundTrip(r)
	if err != nil {
		return broken, err
	}
	defer res.Body.Close()
	switch {
	case res.StatusCode == http.StatusUnauthorized || res.StatusCode == http.StatusForbidden:
		return denied, nil
	case res.StatusCode == http.StatusConflict && k == legacyStream:
		return accepted, nil // by the guard: the host has not left the last one yet
	case res.StatusCode != http.StatusOK:
		b, _ := io.ReadAll(io.LimitReader(res.Body, 1<<10))
		return broken, fmt.Errorf("%s: %s", res.Status, b)
	case k.isStream():
		return accepted, nil // the answer has begun
	}
	b, err := io.ReadAll(res.Body)
	switch {
	case err != nil:
		return broken, err
	case bytes.Contains(b, []byte(`"hello"`)):
		return accepted, nil
	case bytes.Contains(b, []byte(`"code":-314`)):
		return denied, nil
	}
	return broken, fmt.Errorf("%s", b)
}

func (a *attempts) send(ctx context.Context, k kind) (result, error) {
	for ev, err := range a.a2a[k].SendStreamingMessage(ctx, message("echo")) {
		if err != nil {
			code, httpStatus := status.Code(err), a.rpc.status.Load()
			if errors.Is(err, a2a.ErrUnauthenticated) || errors.Is(err, a2a.ErrUnauthorized) ||
				code == codes.Unauthenticated || code == codes.PermissionDenied ||
				k == a2aStream && (httpStatus == http.StatusUnauthorized || httpStatus == http.StatusForbidden) {
				return denied, nil
			}
			return broken, err
		}
		if u, ok := ev.(*a2a.TaskStatusUpdateEvent); ok {
			if u.Status.State == a2a.TaskStateCompleted {
				return accepted, nil
			}
			if _, _, ok := a2aguard.DeniedIn(u.Status); ok {
				return denied, nil
			}
		}
	}
	return broken, errors.New("the stream ended early")
}
