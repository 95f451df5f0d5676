package demo

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/modelcontextprotocol/go-sdk/mcp"

	mcpguard "github.com/interlock-fabric/interlock/adapters/mcp"
	"github.com/interlock-fabric/interlock/pkg/credential"
	"github.com/interlock-fabric/interlock/pkg/enforce"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// tools is an MCP server with the enforcer in it.
type tools struct {
	era      string
	url      string
	enforcer *enforce.Enforcer
	guard    *mcpguard.Guard
	verifier *credential.Verifier
	http     *http.Server
	served   chan struct{}
	started  chan struct{} // a tool that waits has begun
}

// startTools is what an author of an MCP server writes, with a listener that the
// demo picks.
func (f *fabric) startTools(ctx context.Context, name, era string, m *mint, log *slog.Logger) (_ *tools, err error) {
	t := &tools{era: era, served: make(chan struct{}), started: make(chan struct{}, 16)}
	defer func() {
		if err != nil {
			t.close()
		}
	}()
	if t.enforcer, err = f.openEnforcer(ctx, name, log); err != nil {
		return nil, err
	}
	if t.verifier, err = m.verifier(); err != nil {
		return nil, err
	}
	if t.guard, err = mcpguard.New(t.enforcer, t.verifier, &mcpguard.Options{Resource: resource, Logger: log}); err != nil {
		return nil, err
	}
	server := mcp.NewServer(&mcp.Implementation{Name: name, Version: "1"}, nil)
	mcp.AddTool(server, &mcp.Tool{Name: "echo", Description: "Answers at once."},
		func(context.Context, *mcp.CallToolRequest, struct{}) (*mcp.CallToolResult, any, error) {
			return &mcp.CallToolResult{Content: []mcp.Content{&mcp.TextContent{Text: "hello"}}}, nil, nil
		})
	mcp.AddTool(server, &mcp.Tool{Name: "wait", Description: "Works until it is cut."},
		func(ctx context.Context, _ *mcp.CallToolRequest, _ struct{}) (*mcp.CallToolResult, any, error) {
			t.started <- struct{}{}
			<-ctx.Done()
			return nil, nil, ctx.Err()
		})
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	t.url = "http://" + l.Addr().String()
	t.http = &http.Server{Handler: t.guard.Serve(server, nil), ReadHeaderTimeout: 10 * time.Second}
	go func() {
		defer close(t.served)
		if err := t.http.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			log.Error("serve", "server", name, "error", err)
		}
	}()
	return t, nil
}

func (t *tools) close() {
	if t.guard != nil {
		_ = t.guard.Close()
	}
	if t.http != nil {
		_ = t.http.Close()
		<-t.served
	}
	if t.verifier != nil {
		t.verifier.Close()
	}
	if t.enforcer != nil {
		_ = t.enforcer.Close()
	}
}

// client is an MCP client of one session.
type client struct {
	*mcp.ClientSession
	base *http.Transport
}

type bearer struct {
	token string
	base  http.RoundTripper
}

func (b bearer) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.Header.Set("Authorization", "Bearer "+b.token)
	return b.base.RoundTrip(r)
}

// dial connects a client that speaks the server's era.
func (t *tools) dial(ctx context.Context, mintToken func() (string, error)) (*client, error) {
	token, err := mintToken()
	if err != nil {
		return nil, err
	}
	c := &client{base: &http.Transport{}}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	c.ClientSession, err = mcp.NewClient(&mcp.Implementation{Name: "demo-agent", Version: "1"}, nil).Connect(ctx,
		&mcp.StreamableClientTransport{Endpoint: t.url, HTTPClient: &http.Client{Transport: bearer{token, c.base}}},
		&mcp.ClientSessionOptions{ProtocolVersion: t.era})
	if err != nil {
		c.base.CloseIdleConnections()
		return nil, err
	}
	if got := c.InitializeResult().ProtocolVersion; got != t.era {
		c.close()
		return nil, fmt.Errorf("negotiated MCP %s, want %s", got, t.era)
	}
	return c, nil
}

func (c *client) close() {
	_ = c.Close()
	c.base.CloseIdleConnections()
}

// timed is an outcome with its moment.
type timed struct {
	err error
	at  time.Time
}

func (c *client) call(ctx context.Context, tool string) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	res, err := c.CallTool(ctx, &mcp.CallToolParams{Name: tool})
	if err == nil && res.IsError {
		err = errors.New("the tool failed")
	}
	return err
}

// start calls a tool and returns once it runs.
func (c *client) start(ctx context.Context, t *tools, tool string) (<-chan timed, error) {
	done := make(chan timed, 1)
	go func() {
		err := c.call(ctx, tool)
		done <- timed{err, time.Now()}
	}()
	select {
	case <-t.started:
		return done, nil
	case r := <-done:
		return nil, fmt.Errorf("the call ended before it ran: %w", r.err)
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// poll is how often a client tries again while it waits for a change.
const poll = 200 * time.Microsecond

// untilDenied calls a tool until that is denied.
func (c *client) untilDenied(ctx context.Context, began time.Time) timed {
	for {
		err := c.call(ctx, "echo")
		now := time.Now()
		switch {
		case err != nil:
			return timed{err, now}
		case now.Sub(began) > 15*time.Second:
			return timed{errors.New("never denied"), now}
		}
		pause(ctx, poll)
	}
}

// untilAllowed calls a tool until that is allowed.
func (c *client) untilAllowed(ctx context.Context) (time.Time, error) {
	limit := time.Now().Add(15 * time.Second)
	for {
		err := c.call(ctx, "echo")
		if now := time.Now(); err == nil || now.After(limit) || ctx.Err() != nil {
			return now, err
		}
		pause(ctx, poll)
	}
}

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}

// expect checks that a client could read the denial that was due.
func expect(err, want error, incident string) error {
	d, ok := mcpguard.DeniedOf(err)
	word := map[error]string{
		session.ErrRevoked: "revoked", session.ErrSuspended: "suspended", session.ErrStale: "stale",
	}[want]
	switch {
	case err == nil:
		return errors.New("it was allowed")
	case !ok && errors.Is(want, session.ErrStale) && strings.Contains(err.Error(), http.StatusText(http.StatusServiceUnavailable)):
		// The SDK's client shows the status of a 503, and not its body.
		return nil
	case !ok:
		return fmt.Errorf("it failed without a reason that the client can read: %w", err)
	case d.Error != word || d.Incident != incident:
		return fmt.Errorf("denied as %q for incident %q, want %q for %q", d.Error, d.Incident, word, incident)
	}
	return nil
}
