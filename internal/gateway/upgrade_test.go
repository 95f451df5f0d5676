package gateway

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/interlock-fabric/interlock/internal/gateway/route"
	"github.com/interlock-fabric/interlock/pkg/authority"
	"github.com/interlock-fabric/interlock/pkg/trail"
)

// panics tells of each panic that a server logs.
type panics chan string

func (p panics) Write(b []byte) (int, error) {
	if bytes.Contains(b, []byte("panic")) {
		select {
		case p <- string(b):
		default:
		}
	}
	return len(b), nil
}

// An upgrade that the route allows is cut with its caller, in both directions,
// though nothing is said or read on it; others go on. The mechanism is the context
// of the request, which the connection ends with.
func TestUpgradedConnectionsAreCut(t *testing.T) {
	w := newWorld(t)
	ended := make(chan string, 4)
	up := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		who := r.Header.Get("Interlock-Subject")
		conn, rw, err := http.NewResponseController(w).Hijack()
		if err != nil {
			ended <- err.Error()
			return
		}
		defer conn.Close()
		_, _ = rw.WriteString("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
		_ = rw.Flush()
		_, _ = io.Copy(conn, rw) // an echo, until the other side ends
		ended <- who
	}))
	defer up.Close()
	cut, logged := make(chan trail.Event, 4), make(panics, 4)
	g, err := Start(Options{
		Config: w.load(strings.Replace(routeTo("http", "/", up.URL, "allow_upgrade: true,"), "flush_timeout", "write_stall_timeout: 300ms, flush_timeout", 1)),
		Kind:   Proxy, Logger: slog.New(slog.NewTextHandler(logged, &slog.HandlerOptions{Level: slog.LevelDebug})),
		Observe: func(d *route.Decision) {
			if d.Cut {
				cut <- d.Event
			}
		},
	})
	must(t, err)
	defer g.Shutdown(context.Background())
	eventually(t, "ready", func() bool { return g.unready() == "" })
	open := func(user string) (net.Conn, *bufio.Reader, *http.Response) {
		t.Helper()
		conn, err := net.Dial("tcp", strings.TrimPrefix(g.url(), "http://"))
		must(t, err)
		t.Cleanup(func() { conn.Close() })
		must(t, conn.SetDeadline(time.Now().Add(patience)))
		_, err = fmt.Fprintf(conn, "GET /ws HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nAuthorization: Bearer %s\r\n\r\n", w.token(user, "s-"+user))
		must(t, err)
		in := bufio.NewReader(conn)
		resp, err := http.ReadResponse(in, nil)
		must(t, err)
		return conn, in, resp
	}
	echo := func(conn net.Conn, in *bufio.Reader) {
		t.Helper()
		_, err := io.WriteString(conn, "hello\n")
		must(t, err)
		if got, err := in.ReadString('\n'); got != "hello\n" || err != nil {
			t.Fatalf("%q %v", got, err)
		}
	}
	ann, fromAnn, resp := open("ann")
	if resp.StatusCode != http.StatusSwitchingProtocols {
		t.Fatal(resp.Status)
	}
	bob, fromBob, _ := open("bob")
	echo(ann, fromAnn)
	echo(bob, fromBob)
	w.decide(authority.Revoke, "session", "s-ann")
	if rest, err := io.ReadAll(fromAnn); len(rest) > 0 || err != nil && strings.Contains(err.Error(), "timeout") {
		t.Errorf("the connection ended with %q, %v", rest, err)
	}
	if who := within(t, "the upstream is told", ended); who != "ann" {
		t.Errorf("%s was cut", who)
	}
	if e := within(t, "the cut is noted", cut); e.Caller.Identity().User != "ann" || e.Method != "GET /ws" {
		t.Errorf("noted %+v", e)
	}
	echo(bob, fromBob)
	if _, _, resp := open("ann"); resp.StatusCode != http.StatusUnauthorized {
		t.Errorf("after the cut: %s", resp.Status)
	}
	bob.Close()
	within(t, "the other ends", ended)
	g.Shutdown(context.Background())
	select {
	case s := <-logged:
		t.Error(s)
	default:
	}
}
