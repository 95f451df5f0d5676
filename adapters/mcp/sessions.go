package mcpguard

import (
	"context"
	"errors"
	"time"

	"github.com/modelcontextprotocol/go-sdk/mcp"

	"github.com/interlock-fabric/interlock/pkg/guard"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// tracked is a session that outlives its requests: a legacy one over HTTP, or
// any over stdio. It is bound to its caller for as long as it lives, so that it
// is closed when the caller is revoked, even with nothing running.
type tracked struct {
	g  *Guard
	ss *mcp.ServerSession

	// All below is guarded by g.mu.

	held    *guard.Hold   // nil while no binding is in place
	posts   int           // HTTP requests whose answers may still be on their way
	idle    chan struct{} // set while somebody waits for posts to fall to zero
	closing bool
}

// sessionKey finds a session again from an HTTP request, which knows its id
// alone. Over stdio there is no id, and one session.
func sessionKey(ss *mcp.ServerSession) any {
	if id := ss.ID(); id != "" {
		return id
	}
	return ss
}

// track binds a session to the caller of its latest request. Sessions that end
// with their request need none of this.
func (g *Guard) track(ss *mcp.ServerSession, req mcp.Request, c *caller) error {
	if extra := req.GetExtra(); ss.ID() == "" && extra != nil && extra.Header != nil {
		return nil
	}
	key := sessionKey(ss)
	g.mu.Lock()
	t := g.sessions[key]
	closed := g.work.Err() != nil || t != nil && t.closing
	kept := t != nil && t.held.Keeps(c.prepared)
	g.mu.Unlock()
	if closed {
		// A session that is closing was cut: its caller is to read why, also from
		// a request that was let in just before.
		if err := g.enforcer.Check(c.prepared, g.connect()); err != nil {
			return err
		}
		return &session.DeniedError{Err: session.ErrClosed}
	}
	if kept {
		return nil
	}

	// Bound outside the lock: the enforcer may call back at once.
	bound, release, err := g.enforcer.Bind(context.Background(), c.prepared, g.connect())
	if err != nil {
		return err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if t = g.sessions[key]; t != nil {
		err = g.work.Err()
	} else {
		t = &tracked{g: g, ss: ss}
		if err = g.work.Go(func() { t.await(key) }); err == nil {
			g.sessions[key] = t
		}
	}
	if err != nil {
		release()
		return err
	}
	t.releaseLocked()
	h := guard.NewHold(bound, release, c.prepared)
	t.held = h
	context.AfterFunc(bound, func() { t.cut(h, guard.Cut(bound)) })
	return nil
}

func (t *tracked) releaseLocked() {
	t.held.Release()
	t.held = nil
}

// await forgets the session when it ends, by whomever.
func (t *tracked) await(key any) {
	_ = t.ss.Wait() // how it ended is the SDK's to report
	t.g.mu.Lock()
	defer t.g.mu.Unlock()
	delete(t.g.sessions, key)
	t.closing = true
	t.releaseLocked()
}

// cut runs when a binding has ended.
func (t *tracked) cut(h *guard.Hold, why *session.DeniedError) {
	t.g.mu.Lock()
	defer t.g.mu.Unlock()
	if why == nil || t.held != h || t.closing {
		return
	}
	// Bind anew at the next request that is let through. Only a revocation
	// closes: a suspension may be lifted, a token renewed, a bus come back.
	t.releaseLocked()
	if errors.Is(why, session.ErrRevoked) {
		t.closing = true
		flushed := t.flushedLocked()
		_ = t.g.work.Go(func() { // refused only once Close has closed it
			// Closing first would lose the errors of what was running: the SDK
			// writes nothing more on a session that is closing.
			t.g.awaitFlush(flushed)
			t.close()
		})
	}
}

// awaitFlush waits for flushed, as long as the options allow.
func (g *Guard) awaitFlush(flushed <-chan struct{}) {
	timer := time.NewTimer(g.opts.FlushTimeout)
	defer timer.Stop()
	select {
	case <-flushed:
	case <-timer.C:
	}
}

// closeLocked closes the session from Guard.Close.
func (t *tracked) closeLocked() {
	if !t.closing {
		t.closing = true
		_ = t.g.work.Go(t.close) // never refused: the work is stopped after this
	}
}

func (t *tracked) close() {
	if err := t.ss.Close(); err != nil {
		t.g.logger.Debug("closing a revoked session", "error", err)
	}
}

// flushedLocked returns a channel that is closed once no answer is on its way.
// Without HTTP that cannot be seen, and the channel is nil.
func (t *tracked) flushedLocked() <-chan struct{} {
	switch {
	case t.ss.ID() == "":
		return nil
	case t.posts == 0:
		return closedChan()
	case t.idle == nil:
		t.idle = make(chan struct{})
	}
	return t.idle
}

func closedChan() <-chan struct{} {
	c := make(chan struct{})
	close(c)
	return c
}

func (g *Guard) trackedByID(id string) *tracked {
	if id == "" {
		return nil
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.sessions[id]
}

// begin and end count the HTTP requests of a session.
func (t *tracked) begin() {
	t.g.mu.Lock()
	t.posts++
	t.g.mu.Unlock()
}

func (t *tracked) end() {
	t.g.mu.Lock()
	defer t.g.mu.Unlock()
	if t.posts--; t.posts == 0 && t.idle != nil {
		close(t.idle)
		t.idle = nil
	}
}
