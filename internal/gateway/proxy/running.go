package proxy

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"time"

	"github.com/interlock-fabric/interlock/internal/gateway/route"
	"github.com/interlock-fabric/interlock/pkg/guard"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// Bounds of the tasks of MCP that run on after the requests which have begun them.
const (
	maxRunning = 1 << 16 // in all; one caller has at most a shareOfOwner of it
	// runningTime is how long one is kept that nobody says has ended.
	runningTime = 24 * time.Hour
	// renewalTime is how long one runs on after its caller's token has expired,
	// before they ask about it with another.
	renewalTime = 5 * time.Minute
	sweepEvery  = time.Minute
)

// part is what a request has to do with a task of MCP (2025-11-25, Tasks).
type part uint8

const (
	none   part = iota
	begins      // tools/call with params.task
	polls       // tasks/get and tasks/cancel, whose answers have its status
	awaits      // tasks/result, which is answered once the task has ended
)

// running is a task of MCP that runs on. All that changes is guarded by Tasks.mu.
type running struct {
	key  runningKey
	g    *route.Guard
	call session.Call
	c    *cancellation
	held *guard.Hold // nil while no binding is in place
	ends time.Time   // when it is cancelled without a binding, or let go with one
}

// runningKey has the caller in it, so that what one is told of a task says nothing
// of another's, and the session, as servers may count tasks in each.
type runningKey struct{ route, owner, session, task string }

// follow finds out what a request has to do with a task. A task that nobody could
// stop is not begun: the error is a denial. leave ends it.
func (t *Tasks) follow(x *exchange) (*execution, error) {
	e := &execution{}
	switch x.op.Method {
	case "tools/call":
		if !x.op.Task {
			return nil, nil
		}
		who := x.caller.Identity()
		t.mu.Lock()
		defer t.mu.Unlock()
		if t.kept >= maxRunning || t.owned[who.Caller()] >= maxRunning/shareOfOwner {
			return nil, &session.DeniedError{Err: session.ErrOverloaded, Detail: "too many tasks"}
		}
		t.kept++
		t.owned[who.Caller()]++
		e.part, e.reserved = begins, who.Caller()
		return e, nil
	case "tasks/get", "tasks/cancel":
		e.part = polls
	case "tasks/result":
		e.part = awaits
	default:
		return nil, nil
	}
	var asked struct {
		Task string `json:"taskId"`
	}
	if json.Unmarshal(x.op.Arguments, &asked) != nil || asked.Task == "" || len(asked.Task) > maxTask {
		return nil, nil // which the upstream will say
	}
	e.goesOn = asked.Task
	return e, nil
}

// leave gives back the room for a task that was not begun.
func (t *Tasks) leave(e *execution) {
	if e == nil || e.reserved == "" {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.giveLocked(e.reserved)
	e.reserved = ""
}

func (t *Tasks) giveLocked(owner string) {
	t.kept--
	if t.owned[owner]--; t.owned[owner] == 0 {
		delete(t.owned, owner)
	}
}

func (x *exchange) taskKey(sent *http.Request, task string) runningKey {
	who := x.caller.Identity()
	return runningKey{x.g.Route.Name, who.Caller(), sent.Header.Get(headerSession), task}
}

// begun keeps a task that the upstream has named, and ties it to its caller.
func (t *Tasks) begun(x *exchange, task string) {
	if x.exec.reserved == "" {
		return
	}
	c, err := x.cancelMCP(x.exec.sent, task)
	if err != nil {
		x.p.warnings.warn("cancel a task", x.g.Route.Name, err)
		return
	}
	r := &running{key: x.taskKey(x.exec.sent, task), g: x.g, call: x.call, c: c, ends: time.Now().Add(runningTime)}
	// The session is not closed before the task is cancelled.
	if s := x.session; s != nil {
		x.p.opts.Sessions.keep(s)
		c.said = func() { x.p.opts.Sessions.done(s) }
	}
	t.mu.Lock()
	if t.closed {
		t.mu.Unlock()
		c.over()
		return
	}
	if old := t.running[r.key]; old != nil {
		t.forgetLocked(old)
		old.c.over()
	}
	t.running[r.key] = r
	x.exec.reserved = "" // it is the task's now
	t.mu.Unlock()
	t.bind(r, x.caller)
}

// bind ties a task to its caller's credential.
func (t *Tasks) bind(r *running, caller *session.Prepared) {
	// Outside the lock: the enforcer may call back at once.
	bound, release, err := r.g.Enforcer.Bind(t.ctx, caller, r.call)
	t.mu.Lock()
	defer t.mu.Unlock()
	switch {
	case t.closed || t.running[r.key] != r:
		release()
		return
	case err != nil:
		why := &session.DeniedError{}
		_ = errors.As(err, &why) // always
		t.cutLocked(r, why)
		return
	}
	r.held.Release()
	h := guard.NewHold(bound, release, caller)
	r.held, r.ends = h, time.Now().Add(runningTime)
	context.AfterFunc(bound, func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		if why := route.Denied(bound); why != nil && r.held == h {
			t.cutLocked(r, why)
		}
	})
}

// cutLocked has a task cancelled whose caller must stop. One whose token has
// expired may come with another.
func (t *Tasks) cutLocked(r *running, why *session.DeniedError) {
	if t.closed || t.running[r.key] != r || errors.Is(why, session.ErrClosed) {
		return
	}
	if errors.Is(why, session.ErrExpired) {
		r.held.Release()
		r.held, r.ends = nil, time.Now().Add(renewalTime)
		return
	}
	t.forgetLocked(r)
	t.addLocked(r.c)
}

func (t *Tasks) forgetLocked(r *running) {
	r.held.Release()
	r.held = nil
	delete(t.running, r.key)
	t.giveLocked(r.key.owner)
}

// renew ties a task to the latest credential of its caller, who asks about it.
func (t *Tasks) renew(x *exchange, sent *http.Request) {
	t.mu.Lock()
	r := t.running[x.taskKey(sent, x.exec.goesOn)]
	if r == nil || r.held.Keeps(x.caller) {
		t.mu.Unlock()
		return
	}
	if c, err := x.cancelMCP(sent, r.key.task); err == nil {
		c.said = r.c.said
		r.c = c
	}
	t.mu.Unlock()
	t.bind(r, x.caller)
}

// ended lets go of a task that its caller is told has ended.
func (t *Tasks) ended(x *exchange) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if r := t.running[x.taskKey(x.exec.sent, x.exec.goesOn)]; r != nil {
		t.forgetLocked(r)
		r.c.over()
	}
}

// sweep sees to tasks of which nobody has said anything for long.
func (t *Tasks) sweep() {
	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	for {
		select {
		case <-t.ctx.Done():
			return
		case now := <-tick.C:
			t.mu.Lock()
			for _, r := range t.running {
				if now.Before(r.ends) {
					continue
				}
				unheld := r.held == nil
				t.forgetLocked(r)
				if unheld { // nobody would hear of a revocation
					t.addLocked(r.c)
				} else {
					r.c.over()
				}
			}
			t.mu.Unlock()
		}
	}
}

// learn hears what the finder has found in the answer.
func (x *exchange) learn(found string) {
	switch x.exec.part {
	case none:
		x.exec.named(found)
	case begins:
		x.p.opts.Tasks.begun(x, found)
	default:
		x.p.opts.Tasks.ended(x)
	}
}

// cancelMCP is what stops a task of MCP: tasks/cancel, in the session and in the
// revision of a request that its caller has sent.
func (x *exchange) cancelMCP(sent *http.Request, task string) (*cancellation, error) {
	// An id may be used once in a session.
	body, err := json.Marshal(struct {
		Version string            `json:"jsonrpc"`
		ID      string            `json:"id"`
		Method  string            `json:"method"`
		Params  map[string]string `json:"params"`
	}{"2.0", "interlock:" + task, "tasks/cancel", map[string]string{"taskId": task}})
	if err != nil { // strings
		return nil, err
	}
	req, err := http.NewRequest(http.MethodPost, sent.URL.String(), bytes.NewReader(body)) //nolint:noctx,gosec // it gets one when it is sent, to the upstream that the route names
	if err != nil {
		return nil, err
	}
	for _, name := range kept {
		if v := sent.Header[name]; len(v) > 0 {
			req.Header[name] = v
		}
	}
	if v := sent.Header[headerSession]; len(v) > 0 {
		req.Header[headerSession] = v
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Accept", "application/json, text/event-stream")
	req.Header["Idempotency-Key"] = nil // as with any other: see cancellation
	return &cancellation{route: x.g.Route.Name, up: x.up, req: req, mcp: true}, nil
}

// answerIn returns the message that answers a call, in what has been read of an
// event stream.
func answerIn(b []byte) []byte {
	var data []byte
	for line := range bytes.Lines(b) {
		if line = bytes.TrimRight(line, "\r\n"); len(line) > 0 {
			data = append(data, dataOf(line)...)
			continue
		}
		var m struct {
			Result, Error json.RawMessage
		}
		if json.Unmarshal(data, &m) == nil && (m.Result != nil || m.Error != nil) {
			return data
		}
		data = data[:0]
	}
	return data
}

// namesMCP reports whether a string in an answer is the id of a task that has
// begun, or says that one has ended.
func namesMCP(p part, at []string, v string) bool {
	if len(at) < 2 || at[0] != "result" {
		return false
	}
	switch p {
	case begins:
		return len(at) == 3 && at[1] == "task" && at[2] == "taskId"
	case polls:
		return len(at) == 2 && at[1] == "status" && (v == "completed" || v == "failed" || v == "cancelled")
	}
	return p == awaits
}
