package a2aguard_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/a2aproject/a2a-go/v2/a2a"
	"github.com/a2aproject/a2a-go/v2/a2asrv/taskstore"

	a2aguard "github.com/interlock-fabric/interlock/adapters/a2a"
	"github.com/interlock-fabric/interlock/internal/guardtest"
	"github.com/interlock-fabric/interlock/pkg/authority"
	"github.com/interlock-fabric/interlock/pkg/session"
)

func TestAllowedCallerIsServed(t *testing.T) {
	w := newWorld(t, nil, a2aguard.HandlerOptions{}, 0)
	forEachTransport(t, func(t *testing.T, tr a2a.TransportProtocol) {
		c, _ := w.user(t, tr, "ann")
		task := c.mustComplete(t, "whoami", "")
		if got := task.Artifacts[0].Parts[0].Text(); got != "ann" {
			t.Errorf("the agent works for %q", got)
		}
		if task.Metadata != nil {
			t.Errorf("the client sees %v", task.Metadata)
		}
		got, err := c.GetTask(bounded(t), &a2a.GetTaskRequest{ID: task.ID})
		if err != nil || got.Status.State != a2a.TaskStateCompleted || got.Metadata != nil {
			t.Fatalf("%+v, %v", got, err)
		}
		list, err := c.ListTasks(bounded(t), &a2a.ListTasksRequest{ContextID: task.ContextID})
		if err != nil || len(list.Tasks) != 1 || list.TotalSize != 1 || list.Tasks[0].Metadata != nil {
			t.Fatalf("%+v, %v", list, err)
		}
		// Asked for more, and answered.
		asked, err := c.send(t, "ask", "")
		if err != nil || asked.Status.State != a2a.TaskStateInputRequired {
			t.Fatalf("%+v, %v", asked, err)
		}
		c.mustComplete(t, "echo", asked.ID)
		// Cancelled by the caller.
		r := c.stream(t, "wait", "")
		if got, err := c.CancelTask(bounded(t), &a2a.CancelTaskRequest{ID: r.id}); err != nil || got.Status.State != a2a.TaskStateCanceled {
			t.Fatalf("%+v, %v", got, err)
		}
		if out := guardtest.Within(t, "the stream ends", r.end); out.err != nil {
			t.Fatal(out.err)
		}
		if err := guardtest.Within(t, "the agent is told", w.agent.causes); errors.Is(err, session.ErrDenied) {
			t.Fatal(err)
		}
	})
}

// The mechanism is the executor: the SDK runs an agent whatever becomes of the
// request, so that cutting the stream alone would leave it running.
func TestRunningTaskIsCut(t *testing.T) {
	w := newWorld(t, nil, a2aguard.HandlerOptions{}, 0)
	for _, tt := range []struct {
		op    authority.Operation
		want  string
		cause error
	}{
		{authority.Revoke, "revoked", session.ErrRevoked},
		{authority.Suspend, "suspended", session.ErrSuspended},
		{authority.Reduce, "reduced", session.ErrReduced},
	} {
		t.Run(string(tt.op), func(t *testing.T) {
			forEachTransport(t, func(t *testing.T, tr a2a.TransportProtocol) {
				c, sid := w.user(t, tr, "ann")
				other, _ := w.user(t, tr, "bob")
				r, goesOn := c.stream(t, "wait", ""), other.stream(t, "work", "")
				goesOn.mustRun(t)
				w.On(t, tt.op, "session", sid)
				r.mustEnd(t, a2a.TaskStateCanceled, tt.want)
				if cause := guardtest.Within(t, "the agent is told", w.agent.causes); !errors.Is(cause, tt.cause) {
					t.Fatalf("the agent was told %v", cause)
				}
				goesOn.mustRun(t)
				// The task's end is stored: its owner finds it with a login that
				// is not denied.
				task, err := w.stored(t, w.Token(t, "ann", "another"), r.id)
				if err != nil {
					t.Fatal(err)
				}
				mustBe(t, task.Status, a2a.TaskStateCanceled, tt.want)
				if _, err := other.CancelTask(bounded(t), &a2a.CancelTaskRequest{ID: goesOn.id}); err != nil {
					t.Fatal(err)
				}
			})
		})
	}
}

// The mechanism is that the agent runs in a goroutine of its own, and that the
// store refuses what it says later.
func TestAgentThatIgnoresItsContextDoesNotHoldTheCutBack(t *testing.T) {
	w := newWorld(t, nil, a2aguard.HandlerOptions{}, 0)
	type run struct {
		*running
		token string
	}
	var runs []run
	forEachTransport(t, func(t *testing.T, tr a2a.TransportProtocol) {
		c, sid := w.user(t, tr, "ann")
		r := c.stream(t, "stubborn", "")
		w.On(t, authority.Revoke, "session", sid)
		r.mustEnd(t, a2a.TaskStateCanceled, "revoked")
		runs = append(runs, run{r, w.Token(t, "ann", "another")})
		if w.agent.wasCleaned(r.id) {
			t.Error("cleaned up while it ran")
		}
	})
	w.agent.letGo()
	for _, r := range runs {
		if got := guardtest.Within(t, "the agent speaks", w.agent.said); got != "false" {
			t.Errorf("the agent was heard: %s", got)
		}
		guardtest.Eventually(t, "it is cleaned up", func() bool { return w.agent.wasCleaned(r.id) })
		task, err := w.stored(t, r.token, r.id)
		if err != nil {
			t.Fatal(err)
		}
		mustBe(t, task.Status, a2a.TaskStateCanceled, "revoked")
		if len(task.Artifacts) != 0 {
			t.Error("what it said late was stored")
		}
	}
}

// The mechanism is that a call that is waited for is answered with the end alone.
func TestWaitingCallIsAnsweredWithTheEndOfItsTask(t *testing.T) {
	w := newWorld(t, nil, a2aguard.HandlerOptions{}, 0)
	forEachTransport(t, func(t *testing.T, tr a2a.TransportProtocol) {
		c, sid := w.user(t, tr, "ann")
		type answer struct {
			task *a2a.Task
			err  error
		}
		done := make(chan answer, 1)
		before := w.Enforcer.Status().Running
		go func() { task, err := c.send(t, "wait", ""); done <- answer{task, err} }()
		guardtest.Eventually(t, "it runs", func() bool { return w.Enforcer.Status().Running >= before+2 })
		w.On(t, authority.Revoke, "session", sid)
		got := guardtest.Within(t, "the answer", done)
		if got.err != nil {
			t.Fatal(got.err)
		}
		if s := got.task.Status.State; s != a2a.TaskStateCanceled && s != a2a.TaskStateRejected {
			t.Fatal(s)
		}
		mustBe(t, got.task.Status, got.task.Status.State, "revoked")
		if len(got.task.Artifacts)+len(got.task.History) != 0 {
			t.Error("a revoked caller was given what the task holds")
		}
	})
}

// unversioned is a store that whoever writes last wins in.
type unversioned struct{ open }

func (s unversioned) Update(ctx context.Context, r *taskstore.UpdateRequest) (taskstore.TaskVersion, error) {
	c := *r
	c.PrevVersion = taskstore.TaskVersionMissing
	return s.open.Update(ctx, &c)
}

// The mechanisms are AUTH_REQUIRED, which is not an end, that the execution has
// ended all the same, so that the task can be gone on with, and that the store
// refuses the failure that the SDK makes of it.
func TestStepUpInterruptsATaskAndItGoesOn(t *testing.T) {
	w := newWorld(t, nil, a2aguard.HandlerOptions{Tasks: unversioned{newOpen()}}, 0)
	forEachTransport(t, func(t *testing.T, tr a2a.TransportProtocol) {
		for name, meet := range map[string]func(c *client, sid string){
			"login": func(c *client, sid string) {
				c.set(w.Token(t, "ann", sid, func(m map[string]any) {
					m["auth_time"] = time.Now().Add(time.Second).Unix()
					m["acr"] = "gold"
				}))
			},
			"approval": func(_ *client, sid string) { w.On(t, authority.Resume, "session", sid) },
		} {
			t.Run(name, func(t *testing.T) {
				c, sid := w.user(t, tr, "ann")
				r := c.stream(t, "wait", "")
				w.Decide(t, authority.Request{
					Operation: authority.StepUp, Targets: []authority.Target{authority.One("", "session", guardtest.Issuer, sid)},
					Reason: "stolen-token", Incident: "INC-142", ACR: "gold",
				})
				challenge := r.mustEnd(t, a2a.TaskStateAuthRequired, "step_up")
				const want = `Bearer error="insufficient_user_authentication", error_description="denied: step-up authentication required: stolen-token (seq `
				if len(challenge) < len(want) || challenge[:len(want)] != want {
					t.Errorf("challenge %s", challenge)
				}
				if _, err := c.send(t, "echo", r.id); err == nil {
					t.Fatal("it went on without another login")
				}
				meet(c, sid)
				got := c.mustComplete(t, "echo", r.id)
				if got.ID != r.id {
					t.Fatalf("task %s went on as %s", r.id, got.ID)
				}
			})
		}
	})
}

func TestExpiredCredentialInterruptsATaskAndItGoesOn(t *testing.T) {
	w := newWorld(t, nil, a2aguard.HandlerOptions{}, 0)
	forEachTransport(t, func(t *testing.T, tr a2a.TransportProtocol) {
		c, sid := w.user(t, tr, "ann")
		c.set(w.Token(t, "ann", sid, func(m map[string]any) { m["exp"] = time.Now().Add(2 * time.Second).Unix() }))
		r := c.stream(t, "wait", "")
		if challenge := r.mustEnd(t, a2a.TaskStateAuthRequired, "expired"); challenge == "" {
			t.Error("no challenge")
		}
		c.set(w.Token(t, "ann", sid))
		c.mustComplete(t, "echo", r.id)
	})
}

// The mechanism is the binding, which ends with a state that is too old.
func TestTaskEndsWithAStaleState(t *testing.T) {
	w := newWorld(t, nil, a2aguard.HandlerOptions{}, 2*time.Second)
	var runs []*running
	for _, tr := range transports {
		c, _ := w.user(t, tr, "ann")
		runs = append(runs, c.stream(t, "wait", ""))
	}
	w.Stop()
	began := time.Now()
	for _, r := range runs {
		r.mustEnd(t, a2a.TaskStateFailed, "stale")
	}
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("cut after %s", took)
	}
	for _, tr := range transports {
		c, _ := w.user(t, tr, "ann")
		if _, err := c.send(t, "echo", ""); err == nil {
			t.Error("allowed")
		}
	}
}

// Every way to a task is closed to a caller that is revoked, and open again to
// one that has come back with a login of its own.
func TestRevokedCallerReachesNoTask(t *testing.T) {
	w := newWorld(t, nil, a2aguard.HandlerOptions{}, 0)
	forEachTransport(t, func(t *testing.T, tr a2a.TransportProtocol) {
		c, sid := w.user(t, tr, "ann")
		asked, err := c.send(t, "ask", "")
		if err != nil {
			t.Fatal(err)
		}
		w.On(t, authority.Revoke, "session", sid)
		for name, try := range ways(t, c, asked.ID) {
			err := try()
			if err == nil {
				t.Errorf("%s: allowed", name)
			}
			if d, ok := a2aguard.DeniedOf(err); tr != a2a.TransportProtocolJSONRPC && (!ok || d.Error != "revoked" || d.Incident != "INC-142" || d.Seq == 0) {
				t.Errorf("%s: %v", name, err)
			}
		}
		c.set(w.Token(t, "ann", "another"))
		c.mustComplete(t, "echo", asked.ID)
	})
}

// ways are all that lead to a task that is known by its id.
func ways(t *testing.T, c *client, id a2a.TaskID) map[string]func() error {
	return map[string]func() error{
		"get":    func() error { _, err := c.GetTask(bounded(t), &a2a.GetTaskRequest{ID: id}); return err },
		"cancel": func() error { _, err := c.CancelTask(bounded(t), &a2a.CancelTaskRequest{ID: id}); return err },
		"resume": func() error { _, err := c.send(t, "echo", id); return err },
		"resume by stream": func() error {
			for _, err := range c.SendStreamingMessage(bounded(t), message("echo", id)) {
				return err
			}
			return nil
		},
		"subscribe": func() error {
			for _, err := range c.SubscribeToTask(bounded(t), &a2a.SubscribeToTaskRequest{ID: id}) {
				return err
			}
			return nil
		},
		"push, create": func() error {
			_, err := c.CreateTaskPushConfig(bounded(t), &a2a.PushConfig{TaskID: id, URL: "http://127.0.0.1:1/hook"})
			return err
		},
		"push, list": func() error {
			_, err := c.ListTaskPushConfigs(bounded(t), &a2a.ListTaskPushConfigRequest{TaskID: id})
			return err
		},
		"push, get": func() error {
			_, err := c.GetTaskPushConfig(bounded(t), &a2a.GetTaskPushConfigRequest{TaskID: id, ID: "p"})
			return err
		},
		"push, delete": func() error {
			return c.DeleteTaskPushConfig(bounded(t), &a2a.DeleteTaskPushConfigRequest{TaskID: id, ID: "p"})
		},
	}
}
