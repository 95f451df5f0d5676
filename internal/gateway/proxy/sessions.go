package proxy

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"sync"
	"time"

	"github.com/interlock-fabric/interlock/internal/gateway/operation"
	"github.com/interlock-fabric/interlock/internal/gateway/route"
	"github.com/interlock-fabric/interlock/pkg/guard"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// Bounds of what is said to an upstream about a session that ends.
const (
	lastWordsTime = 5 * time.Second
	enders        = 16
)

// SessionOptions configures Sessions.
type SessionOptions struct {
	// Max bounds the sessions, Timeout how long one is kept without requests.
	Max     int
	Timeout time.Duration
	// FlushTimeout bounds the wait for a session's requests to end, before it is
	// closed over them.
	FlushTimeout time.Duration
	Logger       *slog.Logger
}

// Sessions are the MCP sessions (up to revision 2025-11-25) that the upstreams
// hold. Each belongs to whoever opened it and is bound to them, so that it is
// closed upstream when its owner is revoked, even with nothing running.
type Sessions struct {
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup
	log    *slog.Logger
	warned *repeats

	mu     sync.Mutex
	opts   SessionOptions
	closed bool
	all    map[sessionKey]*tracked
	owned  map[string]int // how many of all each owner has
	ending []*tracked     // to be closed upstream
	active int            // goroutines that do so
}

type sessionKey struct{ route, id string }

// tracked is one session. All that changes is guarded by Sessions.mu.
type tracked struct {
	key   sessionKey
	owner string
	up    *upstream
	// below and query are where it was opened: its requests are made there.
	below, query string
	// header is what the upstream needs to see in what is said to it.
	header  http.Header
	held    *guard.Hold // nil while no binding is in place
	busy    int
	idle    chan struct{} // set while somebody waits for busy to fall to zero
	last    time.Time
	closing bool
}

// NewSessions begins to keep sessions; Close ends it.
func NewSessions(o SessionOptions) *Sessions {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	s := &Sessions{opts: o, log: o.Logger, warned: newRepeats(o.Logger), all: make(map[sessionKey]*tracked), owned: make(map[string]int)}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	every := min(max(o.Timeout/8, 100*time.Millisecond), time.Minute)
	s.wg.Go(func() { s.forget(every) })
	return s
}

// Configure changes the options, but for the logger.
func (s *Sessions) Configure(o SessionOptions) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.opts = o
}

// Len returns how many there are.
func (s *Sessions) Len() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.all)
}

// Close releases every session, without a word to the upstreams, and joins. It is
// idempotent.
func (s *Sessions) Close() {
	s.mu.Lock()
	s.closed = true
	for _, t := range s.all {
		t.release()
		s.removeLocked(t)
	}
	s.mu.Unlock()
	s.cancel()
	s.wg.Wait()
	s.warned.close()
}

func (t *tracked) release() {
	t.held.Release()
	t.held = nil
}

// shareOfOwner is the part of all sessions that one caller may have, so that none
// takes those of all others.
const shareOfOwner = 4

var errFull = &session.DeniedError{Err: session.ErrOverloaded, Detail: "too many sessions"}

// fullLocked reports whether there is no room for another session of a caller's.
func (s *Sessions) fullLocked(owner string) bool {
	return len(s.all)+len(s.ending) >= s.opts.Max || s.owned[owner] >= max(s.opts.Max/shareOfOwner, 1)
}

// removeLocked takes a session out, if it is there.
func (s *Sessions) removeLocked(t *tracked) {
	if s.all[t.key] != t {
		return
	}
	delete(s.all, t.key)
	if s.owned[t.owner]--; s.owned[t.owner] == 0 {
		delete(s.owned, t.owner)
	}
}

// use begins a request in a session. nil is a session that is not known, which it
// becomes when the upstream has answered. done, or cancelled, ends it.
func (s *Sessions) use(x *exchange, id string) (*tracked, error) {
	switch {
	case id == "" && x.op.Method == "initialize":
		// Before the upstream opens one.
		who := x.caller.Identity()
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.fullLocked(who.Caller()) {
			return nil, errFull
		}
		return nil, nil
	case id == "":
		return nil, nil
	case len(id) > session.MaxValueLen:
		return nil, &operation.Refusal{Status: http.StatusBadRequest, Code: codeInvalid, ID: x.op.ID, Why: "the session id is too long"}
	}
	s.mu.Lock()
	t := s.all[sessionKey{x.g.Route.Name, id}]
	if t == nil {
		s.mu.Unlock()
		return nil, nil
	}
	kept := t.held.Keeps(x.caller)
	if !kept {
		who := x.caller.Identity()
		if who.Caller() != t.owner {
			s.mu.Unlock()
			return nil, &operation.Refusal{Status: http.StatusForbidden, Code: codeInvalid, ID: x.op.ID, Why: "the session belongs to another caller"}
		}
	}
	t.busy++
	s.mu.Unlock()
	if !kept {
		if err := s.bind(x, t); err != nil {
			s.done(t)
			return nil, err
		}
	}
	return t, nil
}

// bind ties a session to the caller of its latest request.
func (s *Sessions) bind(x *exchange, t *tracked) error {
	// Outside the lock: the enforcer may call back at once.
	bound, release, err := x.g.Enforcer.Bind(s.ctx, x.caller, x.g.Call(nil))
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed || t.closing {
		release()
		return &session.DeniedError{Err: session.ErrClosed}
	}
	t.release()
	h := guard.NewHold(bound, release, x.caller)
	t.held = h
	context.AfterFunc(bound, func() { s.cut(t, h, route.Denied(bound)) })
	return nil
}

// cut runs when a binding has ended.
func (s *Sessions) cut(t *tracked, h *guard.Hold, why *session.DeniedError) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if why == nil || t.held != h || t.closing || s.closed {
		return
	}
	// It is bound anew at the next request that is let through. Only a
	// revocation closes: a suspension may be lifted, a token renewed, a bus come
	// back.
	t.release()
	if errors.Is(why, session.ErrRevoked) {
		s.endLocked(t)
	}
}

// endLocked forgets a session and has the upstream close it.
func (s *Sessions) endLocked(t *tracked) {
	t.closing = true
	s.removeLocked(t)
	s.ending = append(s.ending, t)
	if s.active < enders {
		s.active++
		s.wg.Go(s.end)
	}
}

// end closes sessions upstream for as long as there are any to close.
func (s *Sessions) end() {
	for {
		s.mu.Lock()
		if len(s.ending) == 0 || s.closed {
			s.active--
			s.mu.Unlock()
			return
		}
		t := s.ending[0]
		s.ending = s.ending[1:]
		var idle <-chan struct{}
		if t.busy > 0 {
			if t.idle == nil {
				t.idle = make(chan struct{})
			}
			idle = t.idle
		}
		flush := s.opts.FlushTimeout
		s.mu.Unlock()
		if idle != nil {
			// What it has running is cancelled first, while it can be.
			timer := time.NewTimer(flush)
			select {
			case <-idle:
			case <-timer.C:
			case <-s.ctx.Done():
			}
			timer.Stop()
		}
		if err := s.say(t, http.MethodDelete, nil); err != nil {
			s.warned.warn("a revoked caller's session could not be closed upstream", t.key.route, err)
		}
	}
}

// keep has a session last for a task that runs on in it, which done ends.
func (s *Sessions) keep(t *tracked) {
	s.mu.Lock()
	defer s.mu.Unlock()
	t.busy++
}

// done ends a request.
func (s *Sessions) done(t *tracked) {
	if t == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	t.last = time.Now()
	if t.busy--; t.busy == 0 && t.idle != nil {
		close(t.idle)
		t.idle = nil
	}
}

// cancelled ends a request that was cut: the upstream is told to give it up.
func (s *Sessions) cancelled(t *tracked, id json.RawMessage) {
	if t == nil {
		return
	}
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		s.done(t)
		return
	}
	s.wg.Go(func() {
		defer s.done(t)
		body := fmt.Appendf(nil, `{"jsonrpc":"2.0","method":"notifications/cancelled","params":{"requestId":%s,"reason":"the caller was denied"}}`, id)
		if err := s.say(t, http.MethodPost, body); err != nil {
			s.log.Debug("cancel upstream", "route", t.key.route, "error", err)
		}
	})
	s.mu.Unlock()
}

// say sends something of our own to the upstream of a session.
func (s *Sessions) say(t *tracked, method string, body []byte) error {
	ctx, cancel := context.WithTimeout(s.ctx, lastWordsTime)
	defer cancel()
	var u url.URL
	t.up.address(&u, t.below)
	u.RawQuery = t.query
	req, err := http.NewRequestWithContext(ctx, method, u.String(), bytes.NewReader(body))
	if err != nil {
		return err
	}
	s.mu.Lock()
	req.Header = t.header.Clone()
	s.mu.Unlock()
	req.Header.Set(headerSession, t.key.id)
	req.Header.Set("Accept", "application/json, text/event-stream")
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	res, err := t.up.transport.RoundTrip(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	_, _ = io.CopyN(io.Discard, res.Body, 4<<10) // so that the connection can be used again
	if res.StatusCode >= 300 && res.StatusCode != http.StatusNotFound {
		return errors.New(res.Status)
	}
	return nil
}

// kept are the headers of a request that what is said to the upstream needs, too.
var kept = append([]string{headerVersion, "Authorization"}, route.IdentityHeaders()...)

// answered learns from an upstream's answer which session the request was in.
func (s *Sessions) answered(x *exchange, res *http.Response) error {
	id := res.Header.Get(headerSession)
	if t := x.session; t != nil {
		gone := res.StatusCode == http.StatusNotFound || res.Request.Method == http.MethodDelete && res.StatusCode < 300
		// What is said of it elsewhere says nothing.
		if gone && x.below == t.below && res.Request.URL.RawQuery == t.query {
			s.mu.Lock()
			defer s.mu.Unlock()
			t.closing = true
			t.release()
			s.removeLocked(t)
			return nil
		}
		if id == "" || id == t.key.id {
			return nil
		}
		// The upstream has opened another.
		x.session = nil
		s.done(t)
	}
	if id == "" {
		id = res.Request.Header.Get(headerSession)
	}
	if id == "" || len(id) > session.MaxValueLen || res.StatusCode >= 300 || res.Request.Method == http.MethodDelete {
		return nil
	}
	who := x.caller.Identity()
	t := &tracked{key: sessionKey{x.g.Route.Name, id}, owner: who.Caller(), up: x.up, below: x.below, query: res.Request.URL.RawQuery, header: http.Header{}, busy: 1}
	for _, name := range kept {
		if v := res.Request.Header.Values(name); len(v) > 0 {
			t.header[name] = v
		}
	}
	s.mu.Lock()
	switch other := s.all[t.key]; {
	case other != nil && other.owner != t.owner:
		s.mu.Unlock()
		return &operation.Refusal{Status: http.StatusForbidden, Code: codeInvalid, Why: "the session belongs to another caller"}
	case other != nil:
		s.mu.Unlock()
		return nil
	case s.closed || s.fullLocked(t.owner):
		// A session that nobody could close is not handed out.
		if !s.closed && len(s.ending) < s.opts.Max {
			s.endLocked(t)
			t.busy = 0
		}
		s.mu.Unlock()
		return errFull
	}
	s.all[t.key] = t
	s.owned[t.owner]++
	s.mu.Unlock()
	if err := s.bind(x, t); err != nil {
		s.mu.Lock()
		if !s.closed && !t.closing {
			s.endLocked(t)
			t.busy = 0
		}
		s.mu.Unlock()
		return err
	}
	x.session = t
	return nil
}

// forget lets go of sessions that have not been used for long.
func (s *Sessions) forget(every time.Duration) {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		select {
		case <-s.ctx.Done():
			return
		case now := <-tick.C:
			s.mu.Lock()
			for _, t := range s.all {
				switch {
				case t.busy > 0 || now.Sub(t.last) <= s.opts.Timeout:
				case t.held == nil:
					// Its caller was suspended, or its token has expired, and
					// nobody would hear of a revocation.
					s.endLocked(t)
				default:
					t.closing = true
					t.release()
					s.removeLocked(t)
				}
			}
			s.mu.Unlock()
		}
	}
}
