package authority

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// onSocket serves h on a unix socket, as the authority does.
func onSocket(t *testing.T, h http.HandlerFunc) *Client {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewUnstartedServer(h)
	if err := srv.Listener.Close(); err != nil {
		t.Fatal(err)
	}
	srv.Listener = l
	srv.Start()
	t.Cleanup(srv.Close)
	c, err := New(Options{Socket: path})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

func TestOptions(t *testing.T) {
	for name, c := range map[string]struct {
		o    Options
		want string
	}{
		"neither":           {Options{}, "either a socket or a URL"},
		"both":              {Options{Socket: "s", URL: "http://127.0.0.1:1", Token: "t"}, "either a socket or a URL"},
		"no token":          {Options{URL: "http://127.0.0.1:1"}, "needs a token"},
		"http elsewhere":    {Options{URL: "http://10.0.0.1:1", Token: "t"}, "use https"},
		"http by name":      {Options{URL: "http://localhost.example:1", Token: "t"}, "use https"},
		"no scheme":         {Options{URL: "127.0.0.1:1", Token: "t"}, "must be http"},
		"a path":            {Options{URL: "https://a/v2", Token: "t"}, "more than a scheme and a host"},
		"a password":        {Options{URL: "https://u:p@a", Token: "t"}, "more than a scheme and a host"},
		"negative time":     {Options{Socket: "s", Timeout: -1}, "negative"},
		"good, loopback":    {Options{URL: "http://[::1]:1", Token: "t"}, ""},
		"good, with a path": {Options{URL: "https://a/", Token: "t"}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			cl, err := New(c.o)
			switch {
			case c.want == "" && err != nil:
				t.Error(err)
			case c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)):
				t.Errorf("got %v, %v", cl, err)
			case err != nil && strings.Contains(err.Error(), "u:p"):
				t.Errorf("the error shows a password: %v", err)
			}
		})
	}
}

// Who gives up is not told that the server is at fault.
func TestCancelledIsNotUnreachable(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	c := onSocket(t, func(_ http.ResponseWriter, r *http.Request) {
		cancel()
		<-r.Context().Done()
	})
	if _, err := c.Status(ctx); !errors.Is(err, context.Canceled) || errors.Is(err, ErrUnreachable) {
		t.Error(err)
	}
}

func TestDecideOnce(t *testing.T) {
	c := onSocket(t, func(w http.ResponseWriter, r *http.Request) {
		var in Request
		if err := json.NewDecoder(r.Body).Decode(&in); err != nil {
			t.Error(err)
		}
		if r.Method != "POST" || r.URL.Path != "/v1/decisions" || r.Header.Get("Idempotency-Key") != "k" ||
			r.Header.Get("Content-Type") != "application/json" || in.For != Duration(time.Minute) {
			t.Errorf("%s %s %v %+v", r.Method, r.URL, r.Header, in)
		}
		w.WriteHeader(http.StatusAccepted)
		_, _ = fmt.Fprint(w, `{"operation":"suspend","committed":true,"epoch":1,"number":9,"durable":false}`)
	})
	d, err := c.DecideOnce(t.Context(), "k", Request{Operation: Suspend, Targets: []Target{One("", "user", "i", "u")}, For: Duration(time.Minute)})
	if err != nil || !d.Committed || d.Durable || d.Number != 9 {
		t.Errorf("%+v, %v", d, err)
	}
}

func TestProblemsAreTyped(t *testing.T) {
	for name, c := range map[string]struct {
		status     int
		body, want string
	}{
		"a problem":         {409, `{"type":"urn:interlock:problem:terminal","title":"t","status":200,"detail":"d","mend":"m"}`, ProblemTerminal},
		"another's answer":  {502, `<html>`, ProblemInternal},
		"an unknown type":   {400, `{"type":"urn:x"}`, "urn:x"},
		"a redirect":        {302, ``, ProblemInternal},
		"too long to trust": {400, `{"type":"` + strings.Repeat("x", maxProblem) + `"}`, ProblemInternal},
	} {
		t.Run(name, func(t *testing.T) {
			cl := onSocket(t, func(w http.ResponseWriter, _ *http.Request) {
				w.Header().Set("Location", "http://127.0.0.1:1/")
				w.WriteHeader(c.status)
				_, _ = fmt.Fprint(w, c.body)
			})
			_, err := cl.Status(t.Context())
			var p *Problem
			if !errors.As(err, &p) || p.Type != c.want || p.Status != c.status && c.want != ProblemInternal {
				t.Errorf("%+v", err)
			}
			if c.want == ProblemTerminal && err.Error() != "d: m" {
				t.Errorf("text %q", err)
			}
		})
	}
}

func TestUnreachable(t *testing.T) {
	c, err := New(Options{Socket: filepath.Join(t.TempDir(), "none")})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Status(t.Context()); !errors.Is(err, ErrUnreachable) {
		t.Errorf("no socket: %v", err)
	}
	for _, err := range c.Watch(t.Context()) {
		if !errors.Is(err, ErrUnreachable) {
			t.Errorf("watch: %v", err)
		}
	}
	// An answer that never comes is the same, and the token is in no error.
	block := make(chan struct{})
	srv := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { <-block }))
	defer srv.Close()
	defer close(block)
	c, err = New(Options{URL: srv.URL, Token: "t0ken", Timeout: 20 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Status(t.Context()); !errors.Is(err, ErrUnreachable) || !errors.Is(err, context.DeadlineExceeded) || strings.Contains(err.Error(), "t0ken") {
		t.Errorf("no answer: %v", err)
	}
}

func TestWatch(t *testing.T) {
	c := onSocket(t, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		_, _ = fmt.Fprint(w, ": watching\n\nevent: decision\ndata: {\"type\":\"decision\",\"decision\":{\"number\":1}}\n\n: alive\n\nevent: later\ndata: {\"type\":\"later\",\"news\":1}\n\n")
	})
	var types []string
	var last error
	for e, err := range c.Watch(t.Context()) {
		if last = err; err == nil {
			types = append(types, e.Type)
		}
	}
	if fmt.Sprint(types) != "[decision later]" || !errors.Is(last, ErrUnreachable) {
		t.Errorf("%v, %v", types, last)
	}
	for e, err := range c.Watch(t.Context()) {
		if err != nil || e.Type == "decision" {
			break // leaving the range ends the watch
		}
	}
}

func TestDuration(t *testing.T) {
	var v struct {
		D Duration `json:"d,omitzero"`
	}
	if err := json.Unmarshal([]byte(`{"d":"90m"}`), &v); err != nil || v.D != Duration(90*time.Minute) {
		t.Errorf("%v, %v", v, err)
	}
	if b, err := json.Marshal(v); err != nil || string(b) != `{"d":"1h30m0s"}` {
		t.Errorf("%s, %v", b, err)
	}
	for _, bad := range []string{`{"d":90}`, `{"d":"90"}`, `{"d":"` + strings.Repeat("1", 100) + `s"}`} {
		if err := json.Unmarshal([]byte(bad), &v); err == nil {
			t.Errorf("%s was accepted", bad)
		}
	}
}
