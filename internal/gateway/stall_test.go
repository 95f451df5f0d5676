package gateway

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync"
	"testing"
	"time"
)

const stall = 400 * time.Millisecond

func (w *world) stalling(url string) *Gateway {
	w.t.Helper()
	return w.start(w.load(strings.Replace(routeTo("http", "/", url, ""), "flush_timeout: 500ms", "flush_timeout: 500ms, write_stall_timeout: "+stall.String(), 1)), Proxy)
}

// The mechanisms are the time that each write may take, and the deadlines of what
// the server writes by itself.
func TestClientsThatDoNotReadAreLetGoOf(t *testing.T) {
	w := newWorld(t)
	begun, gone := make(chan struct{}, 16), make(chan struct{}, 16)
	up := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/small" {
			_, _ = io.WriteString(w, strings.Repeat("x", 1000)) // less than is written before the end
			return
		}
		begun <- struct{}{}
		chunk := make([]byte, 64<<10)
		for {
			if _, err := w.Write(chunk); err != nil {
				gone <- struct{}{}
				return
			}
		}
	}))
	defer up.Close()
	g := w.stalling(up.URL)
	token := w.token("ann", "s-ann")
	addr := strings.TrimPrefix(g.url(), "http://")
	head := func(path string) string {
		return fmt.Sprintf("GET %s HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\n\r\n", path, token)
	}
	ended := func() {
		t.Helper()
		within(t, "the answer begins", begun)
		within(t, "the upstream is let go of", gone)
	}

	t.Run("HTTP/1.1", func(t *testing.T) {
		conn, err := net.Dial("tcp", addr)
		must(t, err)
		defer conn.Close()
		_, err = io.WriteString(conn, head("/endless"))
		must(t, err)
		ended()
	})
	t.Run("a stream of HTTP/2", func(t *testing.T) {
		tr := h2c()
		defer tr.CloseIdleConnections()
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, g.url()+"/endless", nil)
		must(t, err)
		req.Header.Set("Authorization", "Bearer "+token)
		resp, err := tr.RoundTrip(req) // whose body is not read
		must(t, err)
		defer resp.Body.Close()
		ended()
		if _, err := io.Copy(io.Discard, resp.Body); err == nil {
			t.Error("an answer that was given up looks complete")
		}
	})
	t.Run("a connection of HTTP/2", func(t *testing.T) {
		tr := h2c()
		defer tr.CloseIdleConnections()
		// More than the kernel holds: it is the connection that takes nothing.
		tr.HTTP2 = &http.HTTP2Config{MaxReceiveBufferPerStream: 64 << 20, MaxReceiveBufferPerConnection: 64 << 20}
		block, dialed := make(chan struct{}), make(chan net.Conn, 1)
		tr.DialContext = func(ctx context.Context, _, addr string) (net.Conn, error) {
			c, err := new(net.Dialer).DialContext(ctx, "tcp", addr)
			if err != nil {
				return nil, err
			}
			dialed <- c
			return &deaf{Conn: c, left: 32 << 10, until: block}, nil
		}
		defer close(block)
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, g.url()+"/endless", nil)
		must(t, err)
		req.Header.Set("Authorization", "Bearer "+token)
		resp, err := tr.RoundTrip(req)
		must(t, err)
		defer resp.Body.Close()
		ended()
		c := within(t, "it is connected", dialed)
		ping := append([]byte{0, 0, 8, 6, 0, 0, 0, 0, 0}, make([]byte, 8)...)
		eventually(t, "its connection is closed", func() bool {
			_, err := c.Write(ping)
			return err != nil
		})
	})
	t.Run("answers that the server holds", func(t *testing.T) {
		conn, err := net.Dial("tcp", addr)
		must(t, err)
		defer conn.Close()
		must(t, conn.SetWriteDeadline(time.Now().Add(patience)))
		out := bufio.NewWriter(conn)
		for err == nil {
			_, err = out.WriteString(head("/small"))
		}
		if errors.Is(err, os.ErrDeadlineExceeded) {
			t.Error("the connection of a client that reads no answers stays")
		}
	})
	eventually(t, "nothing runs", func() bool { return g.Status().Enforcer.Running == 0 })
}

// deaf is a connection that reads so much and no more.
type deaf struct {
	net.Conn
	mu    sync.Mutex
	left  int
	until chan struct{}
}

func (d *deaf) Read(p []byte) (int, error) {
	d.mu.Lock()
	left := d.left
	d.mu.Unlock()
	if left <= 0 {
		<-d.until
		return 0, io.EOF
	}
	n, err := d.Conn.Read(p[:min(len(p), left)])
	d.mu.Lock()
	d.left -= n
	d.mu.Unlock()
	return n, err
}

// A client that reads what there is may wait for more as long as it likes, and one
// that reads slowly gets it all.
func TestStreamsMayBeIdle(t *testing.T) {
	w := newWorld(t)
	let := make(chan struct{})
	up := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		for _, s := range []string{"data: one\n\n", "data: two\n\n"} {
			_, _ = io.WriteString(w, s)
			_ = http.NewResponseController(w).Flush()
			<-let
		}
	}))
	defer up.Close()
	g := w.stalling(up.URL)
	for name, tr := range map[string]*http.Transport{"HTTP/1.1": {}, "HTTP/2": h2c()} {
		t.Run(name, func(t *testing.T) {
			tr.DisableKeepAlives = false
			defer tr.CloseIdleConnections()
			for range 2 { // on the same connection
				req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, g.url()+"/events", nil)
				must(t, err)
				req.Header.Set("Authorization", "Bearer "+w.token("ann", "s-ann"))
				resp, err := tr.RoundTrip(req)
				must(t, err)
				lines := bufio.NewReader(resp.Body)
				for _, want := range []string{"data: one\n", "data: two\n"} {
					got, err := lines.ReadString('\n')
					_, err2 := lines.ReadString('\n')
					if got != want || err != nil || err2 != nil {
						t.Fatalf("%q, %v %v", got, err, err2)
					}
					idle := time.NewTimer(2 * stall) // what is being tried
					<-idle.C
					let <- struct{}{}
				}
				if rest, err := io.ReadAll(lines); err != nil || len(rest) > 0 {
					t.Fatalf("%q, %v", rest, err)
				}
				resp.Body.Close()
			}
		})
	}
}
