package proxy

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"mime"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/interlock-fabric/interlock/internal/gateway/operation"
	"github.com/interlock-fabric/interlock/internal/gateway/route"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// Bounds of what is said to an agent about tasks whose callers were cut.
const (
	maxTask    = session.MaxValueLen // bytes of an id
	maxWaiting = 1 << 16             // cancellations that have not begun, in all
	cancellers = 16                  // at once, for each upstream
	tries      = 3
	triesPause = 250 * time.Millisecond
)

// TaskOutcome is what became of the cancellation of a task.
type TaskOutcome string

// The outcomes.
const (
	TaskCanceled TaskOutcome = "canceled"
	TaskOver     TaskOutcome = "over"    // the agent does not have it, or it has ended
	TaskFailed   TaskOutcome = "failed"  // the agent refuses, or does not answer
	TaskDropped  TaskOutcome = "dropped" // too many are waiting
)

// TaskOptions configures Tasks.
type TaskOptions struct {
	// Observe hears of each outcome; nil is nobody. It must be quick, and safe for
	// concurrent use.
	Observe func(route string, o TaskOutcome)
	Logger  *slog.Logger
}

// Tasks stops what callers that were cut have running at A2A agents, and as tasks
// of MCP (2025-11-25). These are executed apart from the request that has begun
// them, so that the upstream has to be told: by CancelTask, over the transport of
// that request, or by tasks/cancel. A task of MCP is bound to its caller until its
// upstream says that it has ended, for a day without a word at most.
//
// Nothing waits for it. Each cancellation is tried three times, within five
// seconds in all; each upstream is asked sixteen at once, and what is waiting has
// a bound, behind which it is dropped. It is safe for concurrent use.
type Tasks struct {
	opts   TaskOptions
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup
	warned *repeats

	mu      sync.Mutex
	closed  bool
	waiting int
	queues  map[*upstream]*queue
	// listening is how many answers are listened to without their callers.
	listening int
	running   map[runningKey]*running
	kept      int            // running, and requests that may begin one
	owned     map[string]int // of these, how many each caller has
}

// queue is what one upstream is to be told.
type queue struct {
	waiting []*cancellation
	active  int // goroutines that do so
}

// cancellation is one task that is to be cancelled.
type cancellation struct {
	route string
	up    *upstream
	req   *http.Request
	mcp   bool
	said  func() // called at the end; nil is nothing
}

func (c *cancellation) over() {
	if c.said != nil {
		c.said()
	}
}

// NewTasks returns Tasks that are ready; Close ends them.
func NewTasks(o TaskOptions) *Tasks {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Observe == nil {
		o.Observe = func(string, TaskOutcome) {}
	}
	t := &Tasks{opts: o, queues: make(map[*upstream]*queue), running: make(map[runningKey]*running), owned: make(map[string]int), warned: newRepeats(o.Logger)}
	t.ctx, t.cancel = context.WithCancel(context.Background())
	t.wg.Go(t.sweep)
	return t
}

// Close gives up what has not been said yet, and joins. It is idempotent.
func (t *Tasks) Close() {
	t.mu.Lock()
	t.closed = true
	for _, r := range t.running {
		t.forgetLocked(r)
	}
	t.mu.Unlock()
	t.cancel()
	t.wg.Wait()
	t.warned.close()
}

// add has a task cancelled.
func (t *Tasks) add(c *cancellation) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.addLocked(c)
}

func (t *Tasks) addLocked(c *cancellation) {
	if t.closed {
		return
	}
	if t.waiting >= maxWaiting {
		t.opts.Observe(c.route, TaskDropped)
		c.over()
		return
	}
	q := t.queues[c.up]
	if q == nil {
		q = &queue{}
		t.queues[c.up] = q
	}
	q.waiting = append(q.waiting, c)
	t.waiting++
	if q.active < cancellers {
		q.active++
		t.wg.Go(func() { t.work(c.up, q) })
	}
}

// work cancels tasks at one upstream for as long as there are any.
func (t *Tasks) work(up *upstream, q *queue) {
	for {
		t.mu.Lock()
		if len(q.waiting) == 0 || t.closed {
			if q.active--; q.active == 0 {
				delete(t.queues, up)
			}
			t.mu.Unlock()
			return
		}
		c := q.waiting[0]
		q.waiting = q.waiting[1:]
		t.waiting--
		t.mu.Unlock()
		out, err := t.try(c)
		c.over()
		t.opts.Observe(c.route, out)
		if err != nil {
			t.warned.warn("a task could not be cancelled at its agent, whose caller was cut", c.route, err)
		}
	}
}

func (t *Tasks) try(c *cancellation) (out TaskOutcome, err error) {
	ctx, cancel := context.WithTimeout(t.ctx, lastWordsTime)
	defer cancel()
	for n := 1; ; n++ {
		again := false
		if out, again, err = c.say(ctx); !again || n == tries {
			return out, err
		}
		pause := time.NewTimer(triesPause)
		select {
		case <-pause.C:
		case <-ctx.Done():
			pause.Stop()
			return out, err
		}
	}
}

// say asks once. again says whether it is of use to ask once more.
func (c *cancellation) say(ctx context.Context) (out TaskOutcome, again bool, err error) {
	req := c.req.WithContext(ctx)
	if req.Body, err = c.req.GetBody(); err != nil {
		return TaskFailed, false, err
	}
	res, err := c.up.transport.RoundTrip(req)
	if err != nil {
		return TaskFailed, true, err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(io.LimitReader(res.Body, maxLook))
	if err == nil {
		// The status of gRPC stands behind the task, of whatever length.
		_, err = io.Copy(io.Discard, res.Body)
	}
	switch code := res.StatusCode; {
	case err != nil:
		return TaskFailed, true, err
	case code == http.StatusTooManyRequests || code >= 500:
		return TaskFailed, true, errors.New(res.Status)
	case operation.GRPC(req.Header):
		s := res.Trailer.Get("Grpc-Status")
		if s == "" {
			s = res.Header.Get("Grpc-Status")
		}
		switch s {
		case "0":
			return TaskCanceled, false, nil
		case "5", "9": // NOT_FOUND, FAILED_PRECONDITION
			return TaskOver, false, nil
		}
		return TaskFailed, s == "14", errors.New("gRPC status " + s) // UNAVAILABLE
	case code == http.StatusNotFound || code == http.StatusConflict || bytes.Contains(body, []byte("TASK_NOT_CANCELABLE")):
		return TaskOver, false, nil
	case code >= 300:
		return TaskFailed, false, errors.New(res.Status)
	}
	var answer struct {
		Error *struct {
			Code int64 `json:"code"`
		} `json:"error"`
	}
	if mt, _, _ := mime.ParseMediaType(res.Header.Get("Content-Type")); mt == "text/event-stream" {
		body = answerIn(body)
	}
	switch _ = json.Unmarshal(body, &answer); { // a task may be longer than what was read
	case answer.Error == nil:
		return TaskCanceled, false, nil
	case c.mcp && answer.Error.Code == -32602, // of either
		!c.mcp && (answer.Error.Code == -32001 || answer.Error.Code == -32002): // not found, not cancelable
		return TaskOver, false, nil
	}
	return TaskFailed, false, errors.New("JSON-RPC error")
}

// execution is what a request has an agent do.
type execution struct {
	rest bool // A2A's REST, and neither JSON-RPC nor gRPC
	// tenant and goesOn, a task that there was before, are what the message
	// says, where it is JSON.
	tenant, goesOn string
	// part is what it has to do with a task of MCP, which is then goesOn, or that
	// for which reserved, a caller, has room.
	part     part
	reserved string

	mu   sync.Mutex
	sent *http.Request // as the agent has seen it; nil before that
	// cancel gives the request up. hears says that its answer is a hearing, which
	// does that.
	cancel context.CancelFunc
	hears  bool
	silent bool // nothing in the answer has a name
	// answer is the transport's, for the goroutine that reads it.
	answer *http.Response
	// asked is the beginning of the message of a gRPC request.
	asked []byte
	task  string // as the agent has named it
	told  bool   // to cancel
}

// executes reports whether an operation has an agent execute a task. Who listens
// to a task does not: it may be another's.
func executes(o *operation.Operation) bool {
	return o.Method == "SendMessage" || o.Method == "SendStreamingMessage"
}

// newExecution reads what the message says, which is not kept for as long as its
// execution takes.
func newExecution(o *operation.Operation, rest bool) *execution {
	var asked struct {
		Tenant  string `json:"tenant"`
		Message struct {
			TaskID string `json:"taskId"`
		} `json:"message"`
	}
	// A message that the agent reads in another way names no task here.
	_ = json.Unmarshal(o.Arguments, &asked)
	return &execution{rest: rest, tenant: asked.Tenant, goesOn: asked.Message.TaskID}
}

// sending returns the request that the agent is to see, in the place of r.
func (x *exchange) sending(r *http.Request) *http.Request {
	ctx, cancel := context.WithCancel(context.WithoutCancel(r.Context()))
	e := x.exec
	e.mu.Lock()
	defer e.mu.Unlock()
	e.sent, e.cancel = r.WithContext(ctx), cancel
	context.AfterFunc(r.Context(), func() {
		e.mu.Lock()
		hears := e.hears
		e.mu.Unlock()
		if !hears || !x.unnamed() {
			cancel()
		}
	})
	return e.sent
}

func (e *execution) named(task string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.task = task
}

// asks sees a gRPC request as it passes.
func (e *execution) asks(p []byte) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.asked = append(e.asked, p[:min(len(p), maxAsked-len(e.asked))]...)
}

// maxAsked is how much of a gRPC request is kept: its tenant comes first in it,
// and then the message with the ids.
const maxAsked = 8 << 10

// cancelTask has the agent stop when its caller has been cut, as soon as the task
// has a name. It may be called at any time.
func (x *exchange) cancelTask() {
	e := x.exec
	if e == nil || e.part != none {
		return
	}
	if !ends(route.Denied(x.bound)) {
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.told || e.sent == nil {
		return
	}
	req, err := e.cancellation(&x.op)
	if req == nil {
		if err != nil {
			x.p.warnings.warn("cancel a task", x.g.Route.Name, err)
		}
		return
	}
	e.told = true
	x.p.opts.Tasks.add(&cancellation{route: x.g.Route.Name, up: x.up, req: req})
}

// ends reports whether a cut ends what its caller has running at an agent. A
// gateway that goes away says nothing about a caller, who will find the task again.
func ends(why *session.DeniedError) bool { return why != nil && !errors.Is(why, session.ErrClosed) }

// sentAlong are the headers of a request that its cancellation needs, too: the
// agent must take both for requests of the same caller, in the same protocol.
var sentAlong = append([]string{"A2a-Version", "A2a-Extensions", "Authorization", "Content-Type"}, route.IdentityHeaders()...)

// cancellation is the request that stops the task; nil while nobody has said which
// it is.
func (e *execution) cancellation(op *operation.Operation) (*http.Request, error) {
	h := http.Header{}
	for _, name := range sentAlong {
		if v := e.sent.Header[name]; len(v) > 0 {
			h[name] = v
		}
	}
	u := *e.sent.URL
	escaped := u.EscapedPath()
	below := strings.LastIndexByte(escaped, '/') + 1
	var body []byte
	switch task, tenant := e.task, ""; {
	case operation.GRPC(e.sent.Header):
		if len(e.asked) >= frameHeader && e.asked[0] == 0 {
			// SendMessageRequest: the tenant, and the message with its task.
			asked := e.asked[frameHeader:]
			v, _ := field(asked, 1)
			tenant = string(v)
			if msg, _ := field(asked, 2); task == "" {
				if v, whole := field(msg, 3); whole && len(v) <= maxTask {
					task = string(v)
				}
			}
		}
		if task == "" {
			return nil, nil
		}
		escaped = escaped[:below] + "CancelTask"
		msg := make([]byte, frameHeader)
		if tenant != "" {
			msg = protowire.AppendString(protowire.AppendTag(msg, 1, protowire.BytesType), tenant)
		}
		msg = protowire.AppendString(protowire.AppendTag(msg, 2, protowire.BytesType), task)
		binary.BigEndian.PutUint32(msg[1:], uint32(len(msg)-frameHeader))
		body = msg
		h.Set("Te", "trailers")
	default:
		if task == "" {
			task = e.goesOn
		}
		if task == "" || len(task) > maxTask {
			return nil, nil
		}
		h.Set("Accept", "application/json")
		if e.rest { // the tenant is in the path
			escaped, body = escaped[:below]+"tasks/"+url.PathEscape(task)+":cancel", []byte("{}")
			break
		}
		method := "CancelTask"
		if op.Renamed {
			method = "tasks/cancel"
		}
		var err error
		if body, err = json.Marshal(struct {
			Version string            `json:"jsonrpc"`
			ID      string            `json:"id"`
			Method  string            `json:"method"`
			Params  map[string]string `json:"params"`
		}{"2.0", "interlock", method, params(e.tenant, task)}); err != nil { // strings
			return nil, err
		}
	}
	path, err := url.PathUnescape(escaped)
	if err != nil {
		return nil, err
	}
	u.Path, u.RawPath = path, escaped
	req, err := http.NewRequest(http.MethodPost, u.String(), bytes.NewReader(body)) //nolint:noctx // it gets one when it is sent
	if err != nil {
		return nil, err
	}
	// It may be sent again over another connection, like a GET: to cancel twice is
	// to cancel.
	h["Idempotency-Key"] = nil
	req.Header, req.Host = h, e.sent.Host
	return req, nil
}

func params(tenant, task string) map[string]string {
	if tenant == "" {
		return map[string]string{"id": task}
	}
	return map[string]string{"id": task, "tenant": tenant}
}
