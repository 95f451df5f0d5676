package proxy

import (
	"context"
	"errors"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/interlock-fabric/interlock/internal/gateway/operation"
	"github.com/interlock-fabric/interlock/pkg/guard"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// A task runs on for a while after its caller's token has expired; then, and
// at once for any other reason but the end of the gateway, it is cancelled. One
// that is bound is let go after a day.
func TestHowLongATaskIsKept(t *testing.T) {
	for name, tt := range map[string]struct {
		why   error
		after time.Duration
		asked bool
	}{
		"revoked":   {session.ErrRevoked, 0, true},
		"suspended": {session.ErrSuspended, 0, true},
		"stale":     {session.ErrStale, 0, true},
		"expired":   {session.ErrExpired, renewalTime, true},
		"closed":    {session.ErrClosed, runningTime, false},
		"bound":     {nil, runningTime, false},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var asked, said, released atomic.Int32
				tasks := NewTasks(TaskOptions{Observe: func(string, TaskOutcome) { asked.Add(1) }})
				defer tasks.Close()
				req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://up.example", strings.NewReader("{}"))
				if err != nil {
					t.Fatal(err)
				}
				up := &upstream{transport: &http.Transport{DialContext: func(context.Context, string, string) (net.Conn, error) { return nil, errors.New("down") }}}
				r := &running{
					key: runningKey{owner: "ann", task: "t1"}, ends: time.Now().Add(runningTime),
					c:    &cancellation{up: up, req: req, mcp: true, said: func() { said.Add(1) }},
					held: guard.NewHold(t.Context(), func() { released.Add(1) }, nil),
				}
				tasks.mu.Lock()
				tasks.running[r.key], tasks.kept, tasks.owned["ann"] = r, 1, 1
				if tt.why != nil {
					tasks.cutLocked(r, &session.DeniedError{Err: tt.why})
				}
				tasks.mu.Unlock()
				if tt.after > 0 {
					time.Sleep(tt.after - time.Second)
					synctest.Wait()
					tasks.mu.Lock()
					n := len(tasks.running)
					tasks.mu.Unlock()
					if asked.Load()+said.Load() != 0 || n != 1 {
						t.Fatalf("before its time: asked %d, said %d", asked.Load(), said.Load())
					}
				}
				time.Sleep(2 * sweepEvery)
				synctest.Wait()
				if got := asked.Load() == 1; got != tt.asked || said.Load() != 1 || released.Load() != 1 {
					t.Errorf("asked %d, said %d, released %d", asked.Load(), said.Load(), released.Load())
				}
				tasks.mu.Lock()
				defer tasks.mu.Unlock()
				if len(tasks.running)+tasks.kept+len(tasks.owned) != 0 {
					t.Errorf("left: %v, %d, %v", tasks.running, tasks.kept, tasks.owned)
				}
			})
		})
	}
}

// Tasks have a bound, of which one caller has a part; beyond it none is begun.
func TestTasksHaveABound(t *testing.T) {
	tasks := NewTasks(TaskOptions{})
	defer tasks.Close()
	secret, err := session.NewTenantSecret(1, "default", []byte(strings.Repeat("k", 32)))
	if err != nil {
		t.Fatal(err)
	}
	caller := func(who string) *exchange {
		p, err := secret.Prepare(session.Identity{Tenant: "default", Issuer: "https://id.example", User: who, Token: "j", IssuedAt: time.Now()})
		if err != nil {
			t.Fatal(err)
		}
		return &exchange{caller: p, op: operation.Operation{Method: "tools/call", Task: true}}
	}
	ann, bob := caller("ann"), caller("bob")
	var last *execution
	for range maxRunning / shareOfOwner {
		var err error
		if last, err = tasks.follow(ann); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := tasks.follow(ann); !errors.Is(err, session.ErrOverloaded) {
		t.Errorf("one more: %v", err)
	}
	if _, err := tasks.follow(bob); err != nil {
		t.Errorf("another's: %v", err)
	}
	tasks.leave(last)
	tasks.leave(last)
	if _, err := tasks.follow(ann); err != nil {
		t.Errorf("in its place: %v", err)
	}
	if _, err := tasks.follow(ann); !errors.Is(err, session.ErrOverloaded) {
		t.Errorf("one more again: %v", err)
	}
}
