package api

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/interlock-fabric/interlock/internal/access"
	"github.com/interlock-fabric/interlock/pkg/authority"
)

// service answers as it is told to. It stands for the authority, whose own
// answers are tested where it is.
type service struct {
	Service
	decide   func(key string, r authority.Request) (*authority.Decision, error)
	coverage func(ctx context.Context) (*authority.Coverage, error)
	watch    func(ctx context.Context, fn func(authority.Event) error) error
	retire   func(name string) error
}

func (s *service) Decide(_ context.Context, key string, r authority.Request) (*authority.Decision, error) {
	return s.decide(key, r)
}
func (s *service) Coverage(ctx context.Context, _, _ uint64, _ time.Duration) (*authority.Coverage, error) {
	return s.coverage(ctx)
}
func (s *service) Watch(ctx context.Context, began func() error, fn func(authority.Event) error) error {
	if err := began(); err != nil {
		return err
	}
	return s.watch(ctx, fn)
}
func (s *service) Retire(_ context.Context, name string) error { return s.retire(name) }
func (s *service) Status(context.Context) (*authority.Status, error) {
	return &authority.Status{Epoch: 7}, nil
}

func decided(key string, r authority.Request) (*authority.Decision, error) {
	return &authority.Decision{Operation: r.Operation, Committed: true, Durable: true, Epoch: 1, Number: 2}, nil
}

type running struct {
	*testing.T
	srv    *Server
	socket string
	client *http.Client
	base   string
}

func serve(t *testing.T, svc Service, o Options) *running {
	t.Helper()
	dir := t.TempDir()
	if o.Socket == "" {
		o.Socket = filepath.Join(dir, "s")
	}
	if o.TokenFile == "" {
		o.TokenFile = filepath.Join(dir, "token")
	}
	s, err := Serve(svc, o)
	if err != nil {
		t.Fatal(err)
	}
	tr := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", o.Socket)
	}}
	t.Cleanup(func() {
		tr.CloseIdleConnections()
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return &running{t, s, o.Socket, &http.Client{Transport: tr}, "http://a"}
}

func (r *running) do(method, path, body string, h http.Header) (*http.Response, string) {
	r.Helper()
	req, err := http.NewRequestWithContext(r.Context(), method, r.base+path, strings.NewReader(body))
	if err != nil {
		r.Fatal(err)
	}
	if body != "" {
		req.Header.Set("Content-Type", "application/json")
	}
	for k, v := range h {
		req.Header[k] = v
	}
	resp, err := r.client.Do(req)
	if err != nil {
		r.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		r.Fatal(err)
	}
	return resp, string(b)
}

const good = `{"operation":"revoke","targets":[{"terms":[{"kind":"session","value":"s"}]}]}`

func TestDecideStatuses(t *testing.T) {
	for name, c := range map[string]struct {
		d    authority.Decision
		want int
	}{
		"durable":     {authority.Decision{Committed: true, Durable: true}, 200},
		"not durable": {authority.Decision{Committed: true}, 202},
		"previewed":   {authority.Decision{Preview: &authority.Preview{}}, 200},
	} {
		t.Run(name, func(t *testing.T) {
			r := serve(t, &service{decide: func(string, authority.Request) (*authority.Decision, error) { return &c.d, nil }}, Options{})
			resp, body := r.do("POST", "/v1/decisions", good, nil)
			if resp.StatusCode != c.want || !strings.Contains(body, fmt.Sprintf(`"committed":%v`, c.d.Committed)) {
				t.Errorf("%d %s", resp.StatusCode, body)
			}
			if resp.Header.Get("Cache-Control") != "no-store" {
				t.Error("an answer may be cached")
			}
		})
	}
}

func TestIdempotencyKeyIsHandedOn(t *testing.T) {
	var keys []string
	r := serve(t, &service{decide: func(key string, q authority.Request) (*authority.Decision, error) {
		keys = append(keys, key)
		return decided(key, q)
	}}, Options{})
	r.do("POST", "/v1/decisions", good, http.Header{"Idempotency-Key": {"k"}})
	r.do("POST", "/v1/decisions", good, nil)
	r.do("POST", "/v1/decisions", good, nil)
	if len(keys) != 3 || keys[0] != "k" || keys[1] == "" || keys[1] == keys[2] {
		t.Errorf("keys %q", keys)
	}
	for _, bad := range []http.Header{
		{"Idempotency-Key": {strings.Repeat("k", authority.MaxIdempotencyKey+1)}},
		{"Idempotency-Key": {"a", "b"}},
		{"Idempotency-Key": {"é"}},
	} {
		if resp, body := r.do("POST", "/v1/decisions", good, bad); resp.StatusCode != 400 {
			t.Errorf("%v: %d %s", bad, resp.StatusCode, body)
		}
	}
}

// What two parsers could read in two ways is refused before anything is decided.
func TestStrictJSON(t *testing.T) {
	r := serve(t, &service{decide: func(string, authority.Request) (*authority.Decision, error) {
		t.Error("decided")
		return nil, errors.New("no")
	}}, Options{})
	for name, body := range map[string]string{
		"an unknown member":               `{"operation":"revoke","target":[]}`,
		"an unknown member, deeper":       `{"operation":"revoke","targets":[{"terms":[{"kind":"session","value":"s","isuer":"x"}]}]}`,
		"a member in another case":        `{"Operation":"revoke","targets":[]}`,
		"a member with a long s":          `{"rea\u017fon":"kill","operation":"revoke","targets":[]}`,
		"a member twice":                  `{"operation":"suspend","operation":"revoke","targets":[]}`,
		"a member twice, in another case": `{"operation":"suspend","Operation":"revoke","targets":[]}`,
		"a member twice, escaped":         `{"operation":"suspend","oper\u0061tion":"revoke","targets":[]}`,
		"a member twice, a long s":        `{"reason":"kill","rea\u017fon":"other","operation":"revoke","targets":[]}`,
		"a member twice, apart":           `{"reason":"kill","targets":[{"terms":[{"kind":"s","value":"}\"{"}]}],"reason":"other"}`,
		"a member twice, deeper":          `{"operation":"revoke","targets":[{"terms":[{"kind":"session","value":"a","value":"b"}]}]}`,
		"more after the value":            good + good,
		"garbage after the value":         good + "x",
		"nothing":                         " ",
		"not JSON":                        `{"operation":`,
		"not UTF-8":                       "{\"operation\":\"\xff\"}",
		"another type":                    `[1]`,
		"a number for text":               `{"operation":1}`,
		"a bad duration":                  `{"operation":"suspend","for":"soon"}`,
		"a bad time":                      `{"operation":"suspend","expires":"soon"}`,
		"deep nesting":                    `{"targets":` + strings.Repeat("[", 100) + strings.Repeat("]", 100) + `}`,
	} {
		t.Run(name, func(t *testing.T) {
			resp, got := r.do("POST", "/v1/decisions", body, nil)
			var p authority.Problem
			if err := json.Unmarshal([]byte(got), &p); err != nil || resp.StatusCode != 400 || p.Type != authority.ProblemInvalid || p.Mend == "" ||
				p.Status != 400 || resp.Header.Get("Content-Type") != "application/problem+json" {
				t.Errorf("%d %s", resp.StatusCode, got)
			}
		})
	}
	if resp, _ := r.do("POST", "/v1/decisions", good, http.Header{"Content-Type": {"text/plain"}}); resp.StatusCode != 400 {
		t.Errorf("another content type: %d", resp.StatusCode)
	}
	long := `{"operation":"` + strings.Repeat("x", authority.MaxBody) + `"}`
	if resp, body := r.do("POST", "/v1/decisions", long, nil); resp.StatusCode != 413 || !strings.Contains(body, authority.ProblemTooLarge) {
		t.Errorf("too long: %d %.100s", resp.StatusCode, body)
	}
}

func TestProblems(t *testing.T) {
	var log bytes.Buffer
	r := serve(t, &service{
		decide: func(string, authority.Request) (*authority.Decision, error) {
			return nil, errors.New("secret detail")
		},
		retire: func(name string) error {
			return fmt.Errorf("wrapped: %w", authority.NewProblem(authority.ProblemNotFound, name, "mend"))
		},
	}, Options{Logger: slog.New(slog.NewTextHandler(&log, nil))})
	for _, c := range []struct {
		method, path, body string
		status             int
		typ                string
	}{
		{"POST", "/v1/decisions", good, 500, authority.ProblemInternal},
		{"DELETE", "/v1/enforcers/eu-1", "", 404, authority.ProblemNotFound},
		{"GET", "/", "", 404, authority.ProblemNotFound},
		{"GET", "/v1/nothing", "", 404, authority.ProblemNotFound},
		{"PUT", "/v1/decisions", good, 404, authority.ProblemNotFound},
		{"GET", "/v1/decisions/1/x/coverage", "", 400, authority.ProblemInvalid},
		{"GET", "/v1/decisions/1/1/coverage?wait=1h", "", 400, authority.ProblemInvalid},
		{"GET", "/v1/decisions/1/1/coverage?wait=-1s", "", 400, authority.ProblemInvalid},
		{"GET", "/v1/decisions/1/1/coverage?wiat=1s", "", 400, authority.ProblemInvalid},
	} {
		resp, body := r.do(c.method, c.path, c.body, nil)
		var p authority.Problem
		if err := json.Unmarshal([]byte(body), &p); err != nil || resp.StatusCode != c.status || p.Type != c.typ || p.Title == "" {
			t.Errorf("%s %s: %d %s", c.method, c.path, resp.StatusCode, body)
		}
		if strings.Contains(body, "secret") {
			t.Errorf("an internal error shows its text: %s", body)
		}
	}
	if !strings.Contains(log.String(), "secret detail") {
		t.Error("an internal error is not logged")
	}
}

func TestTCPTakesNobodyWithoutTheToken(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "token")
	r := serve(t, &service{}, Options{Listen: "127.0.0.1:0", TokenFile: file})
	r.client, r.base = &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}, "http://"+r.srv.Addr()
	info, err := os.Stat(file)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Fatalf("token file %v, %v", info, err)
	}
	token, err := ReadToken(file)
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		header string
		want   int
	}{
		"the token":     {"Bearer " + token, 200},
		"another case":  {"bearer " + token, 200},
		"nothing":       {"", 401},
		"another token": {"Bearer " + strings.Repeat("x", len(token)), 401},
		"half of it":    {"Bearer " + token[:len(token)/2], 401},
		"more than it":  {"Bearer " + token + "x", 401},
		"no scheme":     {token, 401},
		"basic":         {"Basic " + token, 401},
	} {
		resp, body := r.do("GET", "/v1/status", "", http.Header{"Authorization": {c.header}})
		if resp.StatusCode != c.want || c.want == 401 && (resp.Header.Get("WWW-Authenticate") == "" || !strings.Contains(body, authority.ProblemUnauthorised)) {
			t.Errorf("%s: %d %s", name, resp.StatusCode, body)
		}
	}
	// It is kept over a restart, and refused once others could read it.
	if again, err := LoadToken(file); err != nil || again != token {
		t.Errorf("loaded again: %v", err)
	}
	if err := os.Chmod(file, 0o640); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadToken(file); !errors.Is(err, fs.ErrPermission) || strings.Contains(err.Error(), token) {
		t.Errorf("readable by others: %v", err)
	}
}

func TestListening(t *testing.T) {
	dir := t.TempDir()
	socket := filepath.Join(dir, "s")
	r := serve(t, &service{}, Options{Socket: socket})
	info, err := os.Lstat(socket)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Fatalf("socket %v, %v", info, err)
	}
	if _, err := Serve(&service{}, Options{Socket: socket}); err == nil || !strings.Contains(err.Error(), "another process") {
		t.Errorf("the same socket twice: %v", err)
	}
	if err := r.srv.Close(); err != nil {
		t.Fatal(err)
	}
	// A socket that a killed process left behind is in nobody's way.
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	serve(t, &service{}, Options{Socket: socket})

	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("data"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Serve(&service{}, Options{Socket: file}); err == nil {
		t.Error("a file was taken for a socket")
	}
	if b, err := os.ReadFile(file); err != nil || string(b) != "data" {
		t.Errorf("the file is gone: %v", err)
	}
	for _, addr := range []string{"0.0.0.0:0", "[::]:0", "192.0.2.1:0", "example.com:0"} {
		if _, err := Serve(&service{}, Options{Listen: addr, TokenFile: filepath.Join(dir, "t")}); !errors.Is(err, ErrNoTLS) {
			t.Errorf("%s without TLS: %v", addr, err)
		}
	}
	for _, o := range []Options{{}, {Listen: "127.0.0.1:0"}, {Listen: ":0", TokenFile: filepath.Join(dir, "t")}} {
		if _, err := Serve(&service{}, o); err == nil {
			t.Errorf("%+v was accepted", o)
		}
	}
}

// Close does not wait for those who wait.
func TestCloseEndsWaitsAndWatches(t *testing.T) {
	inside := make(chan struct{}, 2)
	svc := &service{
		coverage: func(ctx context.Context) (*authority.Coverage, error) {
			inside <- struct{}{}
			<-ctx.Done()
			return &authority.Coverage{Epoch: 1}, nil
		},
		watch: func(ctx context.Context, _ func(authority.Event) error) error {
			inside <- struct{}{}
			<-ctx.Done()
			return ctx.Err()
		},
	}
	r := serve(t, svc, Options{})
	ended := make(chan error, 2)
	for _, path := range []string{"/v1/decisions/1/1/coverage?wait=30s", "/v1/watch"} {
		go func() {
			req, err := http.NewRequestWithContext(t.Context(), "GET", r.base+path, nil)
			if err == nil {
				var resp *http.Response
				if resp, err = r.client.Do(req); err == nil {
					_, err = io.Copy(io.Discard, resp.Body)
					resp.Body.Close()
				}
			}
			ended <- err
		}()
	}
	<-inside
	<-inside
	begun := time.Now()
	if err := r.srv.Close(); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := <-ended; err != nil {
			t.Log(err) // a stream that was cut is no fault
		}
	}
	if took := time.Since(begun); took >= closeTimeout {
		t.Errorf("took %s", took)
	}
}

func TestWatchIsAnEventStream(t *testing.T) {
	r := serve(t, &service{watch: func(_ context.Context, fn func(authority.Event) error) error {
		for n := range uint64(3) {
			if err := fn(authority.Event{Type: authority.EventDecision, Decision: &authority.DecisionEvent{Number: n}}); err != nil {
				return err
			}
		}
		return errors.New("fell behind")
	}}, Options{})
	resp, body := r.do("GET", "/v1/watch", "", nil)
	if resp.Header.Get("Content-Type") != "text/event-stream" || strings.Count(body, "event: decision\ndata: {") != 3 {
		t.Errorf("%s\n%s", resp.Header, body)
	}
}

// Too many who stay are refused, so that the others get through.
func TestWatchesAreBounded(t *testing.T) {
	inside := make(chan struct{}, maxWatches)
	r := serve(t, &service{watch: func(ctx context.Context, _ func(authority.Event) error) error {
		inside <- struct{}{}
		<-ctx.Done()
		return ctx.Err()
	}}, Options{})
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{}, maxWatches)
	for range maxWatches {
		go func() {
			defer func() { ended <- struct{}{} }()
			req, err := http.NewRequestWithContext(ctx, "GET", r.base+"/v1/watch", nil)
			if err != nil {
				return
			}
			if resp, err := r.client.Do(req); err == nil {
				_, _ = io.Copy(io.Discard, resp.Body) // ends with the context
				resp.Body.Close()
			}
		}()
	}
	for range maxWatches {
		<-inside
	}
	if resp, body := r.do("GET", "/v1/watch", "", nil); resp.StatusCode != 429 || !strings.Contains(body, authority.ProblemOverloaded) {
		t.Errorf("one more: %d %s", resp.StatusCode, body)
	}
	if resp, _ := r.do("GET", "/v1/status", "", nil); resp.StatusCode != 200 {
		t.Errorf("status: %d", resp.StatusCode)
	}
	cancel()
	for range maxWatches {
		<-ended
	}
}

// When every place is taken, a commander's decision still finds one.
func TestKillsHaveAReserve(t *testing.T) {
	r := serve(t, &service{decide: decided}, Options{})
	for range maxAtOnce {
		r.srv.all <- struct{}{}
	}
	if resp, body := r.do("GET", "/v1/status", "", nil); resp.StatusCode != 429 {
		t.Errorf("the status: %d %s", resp.StatusCode, body)
	}
	for range 2 * maxReserve { // and gives it back
		if resp, body := r.do("POST", "/v1/decisions", good, nil); resp.StatusCode != 200 {
			t.Fatalf("a decision: %d %s", resp.StatusCode, body)
		}
	}
}

// Every endpoint is in the table of who may, and the table has nothing else.
func TestEveryEndpointSaysWhoMay(t *testing.T) {
	patterns := slices.Sorted(maps.Keys((&Server{}).endpoints()))
	if !slices.Equal(patterns, access.Endpoints()) {
		t.Errorf("served and in the table:\n%q\n%q", patterns, access.Endpoints())
	}
	for _, pattern := range patterns {
		op, ok := access.Endpoint(pattern)
		if roles, _ := access.Permitted(op); !ok || len(roles) == 0 {
			t.Errorf("%s: nobody may %s", pattern, op)
		}
	}
	h := (&Server{}).permit("GET /v1/new", endpoint{serve: func(http.ResponseWriter, *http.Request) error { return nil }})
	var p *authority.Problem
	if err := h(nil, nil); !errors.As(err, &p) || p.Status != 403 {
		t.Errorf("an endpoint that is not in the table: %v", err)
	}
}

// What is asked for wrongly is refused before anything is looked for: the service
// here would panic.
func TestAuditParameters(t *testing.T) {
	r := serve(t, &service{}, Options{})
	for _, path := range []string{
		"/v1/audit?limit=1001", "/v1/audit?limit=-1", "/v1/audit?limit=x", "/v1/audit?x=1", "/v1/audit?kind=a&kind=b", "/v1/audit?since=yesterday",
		"/v1/audit?user=" + strings.Repeat("a", 4097),
		"/v1/audit/export?limit=5", "/v1/audit/export?until=2026-11-22T09:00:00Z", "/v1/audit/export?before=1-1", "/v1/audit/export?x=1",
		"/v1/receipts/export", "/v1/receipts/export?epoch=1", "/v1/receipts/export?epoch=1&number=0", "/v1/receipts/export?epoch=1&number=x",
		"/v1/receipts/export?incident=a&epoch=1&number=1", "/v1/receipts/export?incident=a&incident=b", "/v1/receipts/export?incident=" + strings.Repeat("a", 4097),
	} {
		resp, body := r.do(http.MethodGet, path, "", nil)
		if resp.StatusCode != http.StatusBadRequest || !strings.Contains(body, authority.ProblemInvalid) {
			t.Errorf("%.80s: %d %s", path, resp.StatusCode, body)
		}
	}
}

// exporting is a service whose exports fail at a place.
type exporting struct {
	Service
	after int
}

func (e *exporting) ExportAudit(_ context.Context, _ authority.AuditQuery, w io.Writer) error {
	if _, err := w.Write(bytes.Repeat([]byte("x"), e.after)); err != nil {
		return err
	}
	return authority.NewProblem(authority.ProblemUnavailable, "the store is away", "")
}

// An export that fails before anything was sent is answered, and one that fails
// later is cut off: nobody takes it for whole.
func TestExportThatFails(t *testing.T) {
	for after, want := range map[int]int{0: http.StatusServiceUnavailable, 3 * exportBuffer: 0} {
		r := serve(t, &exporting{after: after}, Options{})
		c, err := authority.New(authority.Options{Socket: r.socket})
		if err != nil {
			t.Fatal(err)
		}
		var got bytes.Buffer
		err = c.ExportAudit(t.Context(), authority.AuditQuery{}, &got)
		c.Close()
		var p *authority.Problem
		if want != 0 && (!errors.As(err, &p) || p.Status != want) || want == 0 && !errors.Is(err, authority.ErrUnreachable) {
			t.Errorf("after %d bytes: %v", after, err)
		}
	}
}

func FuzzDecodeStrict(f *testing.F) {
	for _, s := range []string{good, `{"claims":{"a":{"b":"\"}","\\\"":1},"":[{}]}}`, `{"claims":{"k":1,"\u212a":2}}`, `{}`, `[]`, `{"a":{"a":1},"b":[{"a":1},{"a":2}]}`, `{"operation":"x","operation":"y"}`, `1`, `"x"`, `{"targets":[[`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		var r, loose authority.Request
		if decodeStrict(body, &r) != nil {
			return
		}
		// What is accepted is what any reader of JSON would have made of it.
		if err := json.Unmarshal(body, &loose); err != nil {
			t.Fatalf("accepted, though it is not JSON: %v", err)
		}
		if twice(t, json.NewDecoder(bytes.NewReader(body))) {
			t.Fatal("accepted, though a member is there twice")
		}
		a, err1 := json.Marshal(r)
		b, err2 := json.Marshal(loose)
		if err1 != nil || err2 != nil || !bytes.Equal(a, b) {
			t.Fatalf("%s and %s, %v, %v", a, b, err1, err2)
		}
	})
}

// twice reads a value and reports whether an object of it has two members that
// fold to the same.
func twice(t *testing.T, d *json.Decoder) (found bool) {
	tok, err := d.Token()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	switch tok {
	case json.Delim('{'):
		for d.More() {
			tok, err := d.Token()
			if err != nil {
				t.Fatal(err)
			}
			name := tok.(string)
			found = found || slices.ContainsFunc(names, func(s string) bool { return strings.EqualFold(s, name) })
			names = append(names, name)
			found = twice(t, d) || found
		}
	case json.Delim('['):
		for d.More() {
			found = twice(t, d) || found
		}
	default:
		return false
	}
	if _, err := d.Token(); err != nil {
		t.Fatal(err)
	}
	return found
}

func BenchmarkDecodeBatch(b *testing.B) {
	r := authority.Request{Operation: authority.Revoke, Reason: "anomaly", Commit: true}
	for i := range authority.MaxTargets {
		r.Targets = append(r.Targets, authority.One("acme", "session", "https://idp.example", fmt.Sprint("session-", i)))
	}
	body, err := json.Marshal(r)
	if err != nil {
		b.Fatal(err)
	}
	b.SetBytes(int64(len(body)))
	b.ReportAllocs()
	for b.Loop() {
		var r authority.Request
		if err := decodeStrict(body, &r); err != nil {
			b.Fatal(err)
		}
	}
}
