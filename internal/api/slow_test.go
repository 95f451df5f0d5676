package api

import (
	"bufio"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/interlock-fabric/interlock/internal/access"
	"github.com/interlock-fabric/interlock/pkg/authority"
)

// pipes is a listener of connections in memory, whose time is the bubble's.
type pipes struct {
	conns chan net.Conn
	done  chan struct{}
}

func (p *pipes) Accept() (net.Conn, error) {
	select {
	case c := <-p.conns:
		return c, nil
	case <-p.done:
		return nil, net.ErrClosed
	}
}
func (p *pipes) Close() error   { close(p.done); return nil }
func (p *pipes) Addr() net.Addr { return &net.UnixAddr{Name: "pipes", Net: "unix"} }

// What does not come within the time allowed is refused, or cut, and never handed
// on: whoever sends a byte now and then holds no place for long.
func TestSlowRequests(t *testing.T) {
	for name, c := range map[string]struct {
		send   []string // a second between them
		status int      // 0: cut, with no answer of this API
		within time.Duration
		called bool
	}{
		"all of it, slowly":       {append([]string{post(len(good))}, slowly(good, 10)...), 200, readTimeout, true},
		"a body too slowly":       {append([]string{post(len(good))}, slowly(good, len(good))...), 400, readTimeout + time.Second, false},
		"a body that never comes": {[]string{post(len(good))}, 400, readTimeout + time.Second, false},
		"half a body":             {[]string{post(len(good)), good[:40]}, 400, readTimeout + time.Second, false},
		"no header":               {nil, 0, headerTimeout + time.Second, false},
		"half a header":           {[]string{"POST /v1/decisions HT"}, 0, headerTimeout + time.Second, false},
		"a header too slowly":     {slowly(post(len(good)), 20), 0, headerTimeout + time.Second, false},
		"chunks too slowly":       {append([]string{chunked}, chunks(good, 30)...), 400, readTimeout + time.Second, false},
		"chunks that are none":    {[]string{chunked, "zz\r\nx\r\n"}, 400, readTimeout, false},
		"chunks, in time":         {append([]string{chunked}, append(chunks(good, 5), "0\r\n\r\n")...), 200, readTimeout, true},
		"chunks without an end":   {[]string{chunked, fmt.Sprintf("%x\r\n%s\r\n", authority.MaxBody+1, strings.Repeat(" ", authority.MaxBody+1))}, 413, readTimeout, false},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				called := false
				s := &Server{
					svc: &service{decide: func(key string, r authority.Request) (*authority.Decision, error) {
						called = true
						return decided(key, r)
					}},
					log: slog.New(slog.DiscardHandler), all: make(chan struct{}, 1), reserve: make(chan struct{}),
					refused: func(*http.Request, error) {}, end: func() {},
				}
				p := access.NewPrincipal("a", access.MeansSocket, access.Grant{Role: access.Commander, Tenants: []string{access.Everywhere}})
				l := &pipes{make(chan net.Conn), make(chan struct{})}
				s.serve(l, s.routes(func(*http.Request) (*access.Principal, error) { return p, nil }))
				ours, theirs := net.Pipe()
				l.conns <- theirs
				begun := time.Now()
				sent := make(chan struct{})
				go func() {
					defer close(sent)
					for _, part := range c.send {
						if _, err := io.WriteString(ours, part); err != nil {
							return // it is cut
						}
						time.Sleep(time.Second) // the bubble's
					}
				}()
				resp, err := http.ReadResponse(bufio.NewReader(ours), nil)
				took := time.Since(begun)
				switch {
				case c.status == 0 && err == nil && (!resp.Close || resp.StatusCode != 400): // net/http's own
					t.Errorf("answered %d", resp.StatusCode)
				case c.status != 0 && err != nil:
					t.Errorf("after %s: %v", took, err)
				case c.status != 0:
					ct := resp.Header.Get("Content-Type")
					if resp.StatusCode != c.status || c.status >= 400 && ct != "application/problem+json" {
						t.Errorf("%d %s", resp.StatusCode, ct)
					}
				}
				if took > c.within {
					t.Errorf("it took %s", took)
				}
				if called != c.called {
					t.Errorf("handed on: %v", called)
				}
				_ = ours.Close()
				<-sent
				if err := s.Close(); err != nil {
					t.Error(err)
				}
			})
		})
	}
}

const chunked = "POST /v1/decisions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"

func post(n int) string {
	return fmt.Sprintf("POST /v1/decisions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n", n)
}

// slowly is s in n parts.
func slowly(s string, n int) (parts []string) {
	for i := range n {
		parts = append(parts, s[len(s)*i/n:len(s)*(i+1)/n])
	}
	return parts
}

func chunks(s string, n int) (parts []string) {
	for _, p := range slowly(s, n) {
		parts = append(parts, fmt.Sprintf("%x\r\n%s\r\n", len(p), p))
	}
	return parts
}
