package gateway

import (
	"compress/gzip"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/interlock-fabric/interlock/pkg/authority"
)

// jobs is an MCP server of revision 2025-11-25 with tasks, which run on until they
// are let go or cancelled. It guards nothing but that a task is its caller's.
type jobs struct {
	*httptest.Server
	events bool // it answers in event streams

	mu    sync.Mutex
	wg    sync.WaitGroup
	next  int
	tasks map[string]*job
	// seen are the cancellations and the ends of sessions.
	seen   []*http.Request
	answer string // the latest
}

type job struct {
	owner, status string
	stop          context.CancelFunc
	let           chan struct{}
	ended         chan struct{}
}

func newJobs(t *testing.T, events bool) *jobs {
	x := &jobs{events: events, tasks: make(map[string]*job)}
	x.Server = httptest.NewServer(x)
	t.Cleanup(func() {
		x.CloseClientConnections()
		x.Close()
		x.mu.Lock()
		for _, j := range x.tasks {
			j.stop()
		}
		x.mu.Unlock()
		x.wg.Wait()
	})
	return x
}

func (x *jobs) status(task string) string {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.tasks[task].status
}

func (x *jobs) ended(task string) <-chan struct{} {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.tasks[task].ended
}

// finish lets a task end in order.
func (x *jobs) finish(t *testing.T, task string) {
	t.Helper()
	x.mu.Lock()
	close(x.tasks[task].let)
	x.mu.Unlock()
	within(t, "it ends", x.ended(task))
}

func (x *jobs) saw() []*http.Request {
	x.mu.Lock()
	defer x.mu.Unlock()
	return slices.Clone(x.seen)
}

func (x *jobs) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodPost {
		x.mu.Lock()
		x.seen = append(x.seen, r)
		x.mu.Unlock()
		return
	}
	var in struct {
		ID     json.RawMessage
		Method string
		Params struct {
			TaskID string
			Task   *struct{}
		}
	}
	if err := json.NewDecoder(r.Body).Decode(&in); err != nil {
		w.WriteHeader(http.StatusBadRequest)
		return
	}
	if in.Method == "initialize" {
		x.mu.Lock()
		x.next++
		w.Header().Set("Mcp-Session-Id", fmt.Sprintf("session-%d", x.next))
		x.mu.Unlock()
	}
	result, code := x.do(r, in.Method, in.Params.TaskID, in.Params.Task != nil)
	out := fmt.Sprintf(`{"jsonrpc":"2.0","id":%s,"result":%s}`, in.ID, result)
	if code != 0 {
		out = fmt.Sprintf(`{"jsonrpc":"2.0","id":%s,"error":{"code":%d,"message":"no"}}`, in.ID, code)
	}
	w.Header().Set("Content-Type", "application/json")
	if x.events {
		w.Header().Set("Content-Type", "text/event-stream")
		out = "id: 1\ndata:\n\nevent: message\ndata: {\"jsonrpc\":\"2.0\",\"method\":\"notifications/progress\",\"params\":{\"task\":{\"taskId\":\"no\"}}}\n\nevent: message\ndata: " + out + "\n\n"
	}
	x.mu.Lock()
	x.answer = out
	x.mu.Unlock()
	if strings.Contains(r.Header.Get("Accept-Encoding"), "gzip") {
		w.Header().Set("Content-Encoding", "gzip")
		z := gzip.NewWriter(w)
		defer z.Close()
		_, _ = io.WriteString(z, out)
		return
	}
	_, _ = io.WriteString(w, out)
}

func (x *jobs) do(r *http.Request, method, task string, asTask bool) (result string, code int) {
	x.mu.Lock()
	defer x.mu.Unlock()
	owner := r.Header.Get("Interlock-Subject")
	j := x.tasks[task]
	if strings.HasPrefix(method, "tasks/") && (j == nil || j.owner != owner) {
		return "", -32602
	}
	about := func() string {
		return fmt.Sprintf(`{"taskId":%q,"status":%q,"createdAt":"2025-11-25T10:30:00Z","lastUpdatedAt":"2025-11-25T10:30:00Z","ttl":60000}`, task, j.status)
	}
	switch method {
	case "initialize":
		return `{"protocolVersion":"2025-11-25","capabilities":{"tasks":{"cancel":{},"requests":{"tools":{"call":{}}}},"tools":{}},"serverInfo":{"name":"jobs","version":"1"}}`, 0
	case "tools/call":
		if !asTask {
			return `{"content":[{"type":"text","text":"done"}],"task":"none","taskId":"none"}`, 0
		}
		x.next++
		task = fmt.Sprintf("task-%d", x.next)
		ctx, stop := context.WithCancel(context.Background())
		j = &job{owner: owner, status: "working", stop: stop, let: make(chan struct{}), ended: make(chan struct{})}
		x.tasks[task] = j
		x.wg.Go(func() {
			defer close(j.ended)
			select {
			case <-ctx.Done():
			case <-j.let:
				x.mu.Lock()
				defer x.mu.Unlock()
				j.status = "completed"
			}
		})
		return `{"task":` + about() + `}`, 0
	case "tasks/get":
		return about(), 0
	case "tasks/result":
		x.mu.Unlock()
		<-j.ended
		x.mu.Lock()
		return fmt.Sprintf(`{"content":[],"_meta":{"io.modelcontextprotocol/related-task":{"taskId":%q}}}`, task), 0
	case "tasks/cancel":
		r.Form = map[string][]string{"task": {task}}
		x.seen = append(x.seen, r)
		if j.status != "working" {
			return "", -32602
		}
		j.status = "cancelled"
		j.stop()
		return about(), 0
	}
	return "", -32601
}

// caller is a client of jobs, in bytes.
type caller struct {
	t                   *testing.T
	url, token, session string
	jobs                *jobs
}

func (c *caller) send(method, params string) string {
	c.t.Helper()
	res := post(c.t, c.url, c.token, fmt.Sprintf(`{"jsonrpc":"2.0","id":7,"method":%q,"params":%s}`, method, params), func(r *http.Request) {
		r.Header.Set("Mcp-Protocol-Version", legacy)
		if c.session != "" {
			r.Header.Set("Mcp-Session-Id", c.session)
		}
	})
	b, err := io.ReadAll(res.Body)
	must(c.t, err)
	if res.StatusCode != http.StatusOK {
		return res.Status
	}
	c.jobs.mu.Lock()
	defer c.jobs.mu.Unlock()
	if string(b) != c.jobs.answer {
		c.t.Errorf("%s was answered with %q, not %q", method, b, c.jobs.answer)
	}
	if id := res.Header.Get("Mcp-Session-Id"); method == "initialize" {
		c.session = id
	}
	return string(b)
}

func (c *caller) begin() (task string) {
	c.t.Helper()
	out := c.send("tools/call", `{"name":"work","arguments":{},"task":{"ttl":60000}}`)
	_, out, _ = strings.Cut(out, `"result":{"task":{"taskId":"`)
	task, _, ok := strings.Cut(out, `"`)
	if !ok {
		c.t.Fatalf("no task in %q", out)
	}
	return task
}

// A task of MCP stops when its caller is revoked, however long after the request
// that has begun it, and before its session is closed; nobody else's does, and none
// that its caller knows to have ended is asked about. The mechanism is the
// tasks/cancel of package proxy.
func TestCutMCPTasksAreCanceled(t *testing.T) {
	w := newWorld(t)
	for name, tt := range map[string]struct{ events, session bool }{
		"JSON": {false, true}, "events": {true, true}, "no session": {false, false}, "events without a session": {true, false},
	} {
		t.Run(name, func(t *testing.T) {
			w := *w
			w.t = t
			up := newJobs(t, tt.events)
			g := w.start(w.load(routeTo("mcp", "/mcp", up.URL+"/up", "")), Proxy)
			sid := func(who string) string { return who + strings.ReplaceAll(name, " ", "-") }
			as := func(who string) *caller {
				c := &caller{t: t, url: g.url() + "/mcp", token: w.token(who, sid(who)), jobs: up}
				if tt.session {
					c.send("initialize", `{"protocolVersion":"2025-11-25","capabilities":{},"clientInfo":{"name":"c","version":"1"}}`)
				}
				return c
			}
			ann, bob := as("ann"), as("bob")
			ann.send("tools/call", `{"name":"work","arguments":{"task":{}}}`) // not as a task
			runs, bobs := ann.begin(), bob.begin()
			asked, awaited := ann.begin(), ann.begin()
			for _, task := range []string{asked, awaited} {
				up.finish(t, task)
			}
			if out := ann.send("tasks/get", fmt.Sprintf(`{"taskId":%q}`, asked)); !strings.Contains(out, "completed") {
				t.Error(out)
			}
			ann.send("tasks/result", fmt.Sprintf(`{"taskId":%q}`, awaited))
			if out := ann.send("tasks/get", fmt.Sprintf(`{"taskId":%q}`, runs)); !strings.Contains(out, "working") {
				t.Error(out)
			}
			// Whose a task is, the upstream says.
			for _, method := range []string{"tasks/get", "tasks/cancel", "tasks/result"} {
				if out := bob.send(method, fmt.Sprintf(`{"taskId":%q}`, runs)); !strings.Contains(out, "-32602") {
					t.Errorf("another's %s: %s", method, out)
				}
			}
			if got := up.saw(); len(got) != 0 {
				t.Fatalf("cancelled, or closed, too early: %v", got)
			}
			w.decide(authority.Revoke, "session", sid("ann"))
			within(t, "the task stops", up.ended(runs))
			want := 1
			if tt.session {
				want = 2
			}
			eventually(t, "the upstream is told", func() bool { return len(up.saw()) >= want })
			eventually(t, "it is counted", func() bool { return g.tasksCounted(t, "canceled") == 1 })
			got := up.saw()
			if len(got) != want || got[0].Method != http.MethodPost || got[0].Form.Get("task") != runs || tt.session && got[1].Method != http.MethodDelete {
				t.Errorf("the upstream was told %v", got)
			}
			for k, v := range map[string]string{
				"Mcp-Session-Id": ann.session, "Mcp-Protocol-Version": legacy, "Interlock-Subject": "ann", "Authorization": "", "Content-Type": "application/json",
			} {
				if got[0].Header.Get(k) != v {
					t.Errorf("%s is %q, want %q", k, got[0].Header.Get(k), v)
				}
			}
			if s := up.status(bobs); s != "working" || got[0].URL.Path != "/up" {
				t.Errorf("the bystander's is %s; at %s", s, got[0].URL.Path)
			}
			g.Shutdown(context.Background()) // takes nobody's task with it
			if s := up.status(bobs); s != "working" {
				t.Errorf("the bystander's is %s", s)
			}
		})
	}
}

func (g *Gateway) tasksCounted(t *testing.T, outcome string) (n float64) {
	t.Helper()
	families, err := g.metrics.registry.Gather()
	must(t, err)
	for _, f := range families {
		if f.GetName() == "interlock_gateway_task_cancellations_total" {
			for _, m := range f.GetMetric() {
				if m.GetLabel()[0].GetValue() == outcome {
					n += m.GetCounter().GetValue()
				}
			}
		}
	}
	return n
}

// A task goes with the latest token that its caller has asked about it with.
func TestMCPTasksFollowTheToken(t *testing.T) {
	w := newWorld(t)
	up := newJobs(t, false)
	g := w.start(w.load(routeTo("mcp", "/mcp", up.URL, "")), Proxy)
	token := func(jti string) string {
		return w.token("ann", "s-ann", func(c map[string]any) { c["jti"] = jti })
	}
	old := &caller{t: t, url: g.url() + "/mcp", token: token("j1"), jobs: up}
	task := old.begin()
	latest := *old
	latest.token = token("j2")
	about := fmt.Sprintf(`{"taskId":%q}`, task)
	latest.send("tasks/get", about)
	w.decide(authority.Revoke, "token", "j1")
	eventually(t, "the old token is denied", func() bool { return strings.HasPrefix(old.send("tasks/get", about), "401") })
	if out := latest.send("tasks/get", about); !strings.Contains(out, "working") {
		t.Errorf("the task: %s", out)
	}
	w.decide(authority.Revoke, "token", "j2")
	within(t, "the task stops", up.ended(task))
}

// A task that its upstream does not have any more is not asked about again.
func TestMCPTasksThatAreOver(t *testing.T) {
	w := newWorld(t)
	up := newJobs(t, true)
	g := w.start(w.load(routeTo("mcp", "/mcp", up.URL, "")), Proxy)
	ann := &caller{t: t, url: g.url() + "/mcp", token: w.token("ann", "s-ann"), jobs: up}
	task := ann.begin()
	up.finish(t, task)
	w.decide(authority.Revoke, "session", "s-ann")
	eventually(t, "it is over", func() bool { return g.tasksCounted(t, "over") == 1 })
	if got := up.saw(); len(got) != 1 {
		t.Errorf("asked %d times", len(got))
	}
}
