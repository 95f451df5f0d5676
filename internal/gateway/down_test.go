package gateway

import (
	"context"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"testing"
)

// text is what has been written to it.
type text struct {
	mu sync.Mutex
	b  strings.Builder
}

func (x *text) Write(p []byte) (int, error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.b.Write(p)
}

// lines are those that contain all of what.
func (x *text) lines(what ...string) (n int) {
	x.mu.Lock()
	defer x.mu.Unlock()
next:
	for l := range strings.Lines(x.b.String()) {
		for _, w := range what {
			if !strings.Contains(l, w) {
				continue next
			}
		}
		n++
	}
	return n
}

// An upstream that is down does not fill the log.
func TestDownUpstreamIsLoggedOnce(t *testing.T) {
	w := newWorld(t)
	up := newRecorder(t, "")
	up.Close()
	var log text
	g, err := Start(Options{Config: w.load(routeTo("http", "/up", up.URL, "")), Kind: Proxy, Logger: slog.New(slog.NewTextHandler(&log, nil))})
	must(t, err)
	t.Cleanup(func() { g.Shutdown(context.Background()) })
	eventually(t, "the gateway is ready", func() bool { return g.unready() == "" })
	token := w.token("ann", "s-ann")
	for range 20 {
		if res := post(t, g.url()+"/up", token, "{}"); res.StatusCode != http.StatusBadGateway {
			t.Fatal(res.Status)
		}
	}
	g.Shutdown(context.Background())
	// However slow the machine: what is not written is counted.
	if n := log.lines("level=WARN", "msg=upstream", "route=tools"); n < 2 || n > 5 || log.lines("msg=upstream", "times=") != n-1 {
		t.Errorf("%d lines:\n%s", n, log.b.String())
	}
}
