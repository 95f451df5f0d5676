package gateway

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	goruntime "runtime"
	"strings"
	"testing"
	"time"

	"github.com/interlock-fabric/interlock/internal/gateway/route"
	"github.com/interlock-fabric/interlock/pkg/authority"
	"github.com/interlock-fabric/interlock/pkg/trail"
)

// plainUpstream answers everything, and counts what reaches it.
func plainUpstream(t testing.TB) (srv *httptest.Server, reached chan *http.Request) {
	reached = make(chan *http.Request, 1024)
	srv = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		r.Body = io.NopCloser(bytes.NewReader(body))
		select {
		case reached <- r:
		default:
		}
		w.Header().Set("Content-Type", "application/json")
		_, _ = io.WriteString(w, `{"jsonrpc":"2.0","id":7,"result":{}}`)
	}))
	t.Cleanup(srv.Close)
	return srv, reached
}

func TestHostileRequestsAreRefused(t *testing.T) {
	w := newWorld(t)
	up, reached := plainUpstream(t)
	g := w.start(w.load(routeTo("mcp", "/mcp", up.URL, "max_body: 65536,")), Proxy)
	ann := w.token("ann", "s-ann")
	url := g.url() + "/mcp"
	good := toolCall("echo")
	for name, c := range map[string]struct {
		body   string
		change func(*http.Request)
		status int
	}{
		"batch":             {"[" + good + "]", nil, 400},
		"name twice":        {strings.Replace(good, `"name":"echo"`, `"name":"echo","name":"rm"`, 1), nil, 400},
		"another case":      {strings.Replace(good, `"name":"echo"`, `"name":"echo","Name":"rm"`, 1), nil, 400},
		"bomb":              {good[:len(good)-3] + strings.Repeat("[", 60000), nil, 400},
		"too long":          {good + strings.Repeat(" ", 65536), nil, 413},
		"too long, chunked": {good + strings.Repeat(" ", 65536), func(r *http.Request) { r.ContentLength = -1 }, 413},
		"another type":      {good, func(r *http.Request) { r.Header.Set("Content-Type", "text/plain") }, 415},
		"two types":         {good, func(r *http.Request) { r.Header.Add("Content-Type", "text/plain") }, 415},
		"encoded":           {good, func(r *http.Request) { r.Header.Set("Content-Encoding", "gzip") }, 415},
		"another charset":   {good, func(r *http.Request) { r.Header.Set("Content-Type", "application/json; charset=utf-16") }, 415},
		"a broken type":     {good, func(r *http.Request) { r.Header.Set("Content-Type", "application/json; charset=utf-7; x") }, 415},
		"not UTF-8":         {good, func(r *http.Request) { r.URL.Path = "/mcp/\xff" }, 400},
		"header mismatch": {good, func(r *http.Request) {
			r.Header["Mcp-Protocol-Version"], r.Header["Mcp-Method"], r.Header["Mcp-Name"] = []string{modern}, []string{"tools/call"}, []string{"other"}
		}, 400},
		"upgrade":     {good, func(r *http.Request) { r.Header.Set("Connection", "Upgrade"); r.Header.Set("Upgrade", "websocket") }, 400},
		"put":         {good, func(r *http.Request) { r.Method = http.MethodPut }, 405},
		"dot segment": {good, func(r *http.Request) { r.URL.Path = "/mcp/../admin" }, 400},
		"encoded dots": {good, func(r *http.Request) {
			r.URL.Path, r.URL.RawPath = "/mcp/../admin", "/mcp/%2e%2e/admin"
		}, 400},
		"encoded slash": {good, func(r *http.Request) { r.URL.Path, r.URL.RawPath = "/mcp/a/b", "/mcp/a%2Fb" }, 400},
		"empty segment": {good, func(r *http.Request) { r.URL.Path = "//mcp" }, 400},
		"parameter":     {good, func(r *http.Request) { r.URL.Path = "/mcp/..;/admin" }, 400},
		"no route":      {good, func(r *http.Request) { r.URL.Path = "/mcpx" }, 404},
		"no token":      {good, func(r *http.Request) { r.Header.Del("Authorization") }, 401},
		"two tokens":    {good, func(r *http.Request) { r.Header.Add("Authorization", "Bearer x") }, 401},
		"huge headers":  {good, func(r *http.Request) { r.Header.Set("X-A", strings.Repeat("a", 128<<10)) }, 431},
	} {
		t.Run(name, func(t *testing.T) {
			change := c.change
			if change == nil {
				change = func(*http.Request) {}
			}
			resp := post(t, url, ann, c.body, change)
			body, _ := io.ReadAll(resp.Body)
			if resp.StatusCode != c.status {
				t.Fatalf("%s: %s", resp.Status, body)
			}
			if c.status != 431 && !bytes.Contains(body, []byte(`"message":"`)) {
				t.Errorf("says nothing: %s", body)
			}
			if len(reached) != 0 {
				t.Fatal("it reached the upstream")
			}
		})
	}
	if resp := post(t, url, ann, good); resp.StatusCode != http.StatusOK {
		t.Fatal(resp.Status)
	}
}

// An agent may take a message of JSON-RPC at any path and of any type: it must not
// pass for another operation.
func TestA2AOperationsHaveOneName(t *testing.T) {
	w := newWorld(t)
	up, reached := plainUpstream(t)
	g := w.start(w.load(routeTo("a2a", "/a2a", up.URL, "")), Proxy)
	w.decide(authority.Suspend, "tool", "SubscribeToTask")
	w.decide(authority.Suspend, "tool", "SendMessage")
	ann := w.token("ann", "s-ann")
	send := `{"jsonrpc":"2.0","id":1,"method":"SendMessage","params":{}}`
	eventually(t, "sending is denied", func() bool { return post(t, g.url()+"/a2a", ann, send).StatusCode == http.StatusForbidden })
	for len(reached) > 0 {
		<-reached
	}
	grpc := func(r *http.Request) { r.Header.Set("Content-Type", "application/grpc") }
	for name, c := range map[string]struct {
		path, body string
		change     func(*http.Request)
		tr         http.RoundTripper
	}{
		"as gRPC, HTTP/1":        {"/a2a", send, grpc, nil},
		"as gRPC":                {"/a2a/GetTask", send, grpc, h2c()},
		"as gRPC, no method":     {"/a2a/", send, grpc, h2c()},
		"at a path of REST":      {"/a2a/tasks/t1:cancel", send, nil, nil},
		"without the version":    {"/a2a/tasks/t1:cancel", strings.Replace(send, `"jsonrpc":"2.0",`, "", 1), nil, nil},
		"by the name of A2A 0.3": {"/a2a", strings.Replace(send, "SendMessage", "message/stream", 1), nil, nil},
		"as REST, further down":  {"/a2a/x/y/z/message:send", strings.Replace(send, "SendMessage", "GetTask", 1), nil, nil},
		"REST":                   {"/a2a/message:send", "{}", nil, nil},
		"gRPC":                   {"/a2a/lf.a2a.v1.A2AService/SendMessage", "\x00\x00\x00\x00\x00", grpc, h2c()},
		"gRPC of A2A 0.3":        {"/a2a/a2a.v1.A2AService/TaskSubscription", "\x00\x00\x00\x00\x00", grpc, h2c()},
		"HEAD":                   {"/a2a/tasks/t1:subscribe", "", func(r *http.Request) { r.Method = http.MethodHead }, nil},
	} {
		t.Run(name, func(t *testing.T) {
			resp := post(t, g.url()+c.path, ann, c.body, func(r *http.Request) {
				if c.change != nil {
					c.change(r)
				}
			})
			if c.tr != nil {
				req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, g.url()+c.path, strings.NewReader(c.body))
				must(t, err)
				req.Header.Set("Authorization", "Bearer "+ann)
				c.change(req)
				resp, err = c.tr.RoundTrip(req)
				must(t, err)
				defer resp.Body.Close()
			}
			if resp.StatusCode == http.StatusOK && resp.Header.Get("Grpc-Status") != "7" {
				t.Errorf("%s", resp.Status)
			}
			for len(reached) > 0 {
				if b, _ := io.ReadAll((<-reached).Body); len(b) > 0 {
					t.Errorf("the agent reads %q", b)
				}
			}
		})
	}
}

// What the upstream would take for a request, or for requests of ours, is no
// upgrade.
func TestUpgradesHideNothing(t *testing.T) {
	w := newWorld(t)
	up, reached := plainUpstream(t)
	g := w.start(w.load(routeTo("mcp", "/mcp", up.URL, "allow_upgrade: true,")), Proxy)
	ann := w.token("ann", "s-ann")
	for name, change := range map[string]func(*http.Request){
		"with a body": func(*http.Request) {},
		"chunked":     func(r *http.Request) { r.Method, r.ContentLength = http.MethodGet, -1 },
		"no body":     func(r *http.Request) { r.Body, r.ContentLength = nil, 0 },
		"h2c": func(r *http.Request) {
			r.Method, r.Body, r.ContentLength = http.MethodGet, nil, 0
			r.Header.Set("Upgrade", "websocket, h2c")
		},
	} {
		resp := post(t, g.url()+"/mcp", ann, toolCall("echo"), func(r *http.Request) {
			r.Header.Set("Connection", "Upgrade")
			r.Header.Set("Upgrade", "websocket")
			change(r)
		})
		if resp.StatusCode != http.StatusBadRequest || len(reached) != 0 {
			t.Errorf("%s: %s", name, resp.Status)
		}
	}
}

// One caller cannot take the place of all sessions, also not of those that no
// upstream has.
func TestSessionsAreShared(t *testing.T) {
	w := newWorld(t)
	up, _ := plainUpstream(t)
	g := w.start(w.load(strings.Replace(routeTo("mcp", "/mcp", up.URL, ""), "flush_timeout", "max_sessions: 8, flush_timeout", 1)), Proxy)
	list := `{"jsonrpc":"2.0","id":7,"method":"tools/list"}`
	ask := func(token, sid string) int {
		return post(t, g.url()+"/mcp", token, list, func(r *http.Request) { r.Header.Set("Mcp-Session-Id", sid) }).StatusCode
	}
	ann := w.token("ann", "s-ann")
	for i := range 20 {
		if got, want := ask(ann, fmt.Sprint("made-up-", i)), map[bool]int{true: 200, false: 503}[i < 2]; got != want {
			t.Errorf("session %d: %d", i, got)
		}
	}
	if got := ask(w.token("bob", "s-bob"), "bob's"); got != http.StatusOK {
		t.Errorf("another caller: %d", got)
	}
}

// The mechanism is the body's deadline, and the header's.
func TestSlowClientsAreAnswered(t *testing.T) {
	w := newWorld(t)
	up, reached := plainUpstream(t)
	c := w.load(strings.Replace(routeTo("mcp", "/mcp", up.URL, ""), "flush_timeout: 500ms", "flush_timeout: 500ms, body_timeout: 200ms, read_header_timeout: 200ms", 1))
	g := w.start(c, Proxy)
	addr := strings.TrimPrefix(g.url(), "http://")
	for name, sent := range map[string]string{
		"half a body":  fmt.Sprintf("POST /mcp HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\nContent-Type: application/json\r\nContent-Length: 4000000\r\n\r\n{\"jsonrpc\"", w.token("ann", "s-ann")),
		"half a chunk": fmt.Sprintf("POST /mcp HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\nffff\r\n{", w.token("ann", "s-ann")),
		"half a head":  "POST /mcp HTTP/1.1\r\nHost: x\r\nX-A: ",
		"nothing":      "",
	} {
		t.Run(name, func(t *testing.T) {
			conn, err := net.Dial("tcp", addr)
			must(t, err)
			defer conn.Close()
			_, err = io.WriteString(conn, sent)
			must(t, err)
			must(t, conn.SetReadDeadline(time.Now().Add(patience)))
			answer, err := io.ReadAll(conn)
			must(t, err) // the server ends the connection
			if strings.Contains(sent, "Bearer") && !bytes.HasPrefix(answer, []byte("HTTP/1.1 408 ")) {
				t.Errorf("answered %q", answer)
			}
			if len(reached) != 0 {
				t.Error("it reached the upstream")
			}
		})
	}
}

// What is refused for its body's sake has not been held in memory first.
func TestBodiesHaveABudget(t *testing.T) {
	w := newWorld(t)
	up, _ := plainUpstream(t)
	g := w.start(w.load(routeTo("mcp", "/mcp", up.URL, "")), Proxy)
	addr, token := strings.TrimPrefix(g.url(), "http://"), w.token("ann", "s-ann")
	var before, after goruntime.MemStats
	goruntime.GC()
	goruntime.ReadMemStats(&before)
	for range 200 {
		conn, err := net.Dial("tcp", addr)
		must(t, err)
		defer conn.Close()
		_, err = fmt.Fprintf(conn, "POST /mcp HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\nContent-Type: application/json\r\nContent-Length: 4000000\r\n\r\n{", token)
		must(t, err)
	}
	eventually(t, "all are being read", func() bool { return g.budget.Used() >= 200*4096 })
	goruntime.GC()
	goruntime.ReadMemStats(&after)
	if grown := int64(after.HeapInuse) - int64(before.HeapInuse); grown > 32<<20 {
		t.Errorf("200 announced bodies took %d MiB", grown>>20)
	}
}

// The mechanism is that a body which has been passed on is let go of, while its
// answer may take as long as it likes; what the trail says of the call at its end
// is as if it were still there.
func TestBodiesAreLetGoOf(t *testing.T) {
	for name, proto := range map[string]string{"HTTP/1.1": "", "HTTP/2": "http2: true, "} {
		t.Run(name, func(t *testing.T) {
			const calls, size = 32, 2 << 20
			w := newWorld(t)
			began := make(chan int64, calls)
			up := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				n, _ := io.Copy(io.Discard, r.Body)
				w.Header().Set("Content-Type", "text/event-stream")
				_ = http.NewResponseController(w).Flush()
				began <- n
				<-r.Context().Done()
			}))
			up.Config.Protocols = new(http.Protocols)
			up.Config.Protocols.SetHTTP1(true)
			up.Config.Protocols.SetUnencryptedHTTP2(true)
			up.Start()
			defer up.Close()
			cut := make(chan trail.Event, calls)
			g, err := Start(Options{Config: w.load(strings.Replace(routeTo("mcp", "/mcp", up.URL, ""), "upstream: {", "upstream: {"+proto, 1)), Kind: Proxy, Observe: func(d *route.Decision) {
				if d.Cut {
					cut <- d.Event
				}
			}})
			must(t, err)
			defer g.Shutdown(context.Background())
			eventually(t, "ready", func() bool { return g.unready() == "" })
			token := w.token("ann", "s-ann")
			params := fmt.Sprintf(`{"name":"echo","arguments":{"x":%q}}`, strings.Repeat("x", size))
			body := `{"jsonrpc":"2.0","id":7,"method":"tools/call","params":` + params + `}`
			var before, after goruntime.MemStats
			goruntime.GC()
			goruntime.ReadMemStats(&before)
			for range calls {
				if resp := post(t, g.url()+"/mcp", token, body); resp.StatusCode != http.StatusOK {
					t.Fatal(resp.Status)
				}
				if n := within(t, "a call runs", began); n != int64(len(body)) {
					t.Fatalf("the upstream read %d bytes of %d", n, len(body))
				}
			}
			if n := g.Status().Enforcer.Running; n < calls {
				t.Fatalf("%d calls run", n)
			}
			if n := g.budget.Used(); n != 0 {
				t.Errorf("%d calls that wait for their answers take %d MiB of the budget", calls, n>>20)
			}
			goruntime.GC()
			goruntime.ReadMemStats(&after)
			if grown := int64(after.HeapInuse) - int64(before.HeapInuse); grown > calls*size/4 {
				t.Errorf("%d calls of %d MiB hold %d MiB", calls, size>>20, grown>>20)
			}
			w.decide(authority.Revoke, "session", "s-ann")
			for range calls {
				e := within(t, "the cut is noted", cut)
				if want := e.Caller.ArgumentDigest([]byte(params)); e.Digest != want || e.Method != "tools/call" || e.Call.Tool != "echo" {
					t.Fatalf("noted %x of %s %s, want %x", e.Digest, e.Method, e.Call.Tool, want)
				}
			}
		})
	}
}

// A body of 100 MB streams in both directions, byte for byte.
func TestLargeBodiesStream(t *testing.T) {
	const size = 100 << 20
	w := newWorld(t)
	up := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_ = http.NewResponseController(w).EnableFullDuplex()
		w.Header().Set("Trailer", "X-Sum")
		h := sha256.New()
		_, _ = io.Copy(io.MultiWriter(w, h), r.Body)
		w.Header().Set("X-Sum", fmt.Sprintf("%x %s", h.Sum(nil), r.Trailer.Get("X-End")))
	}))
	defer up.Close()
	g := w.start(w.load(routeTo("http", "/files", up.URL, "")), Proxy)
	token := w.token("ann", "s-ann")
	for name, tr := range map[string]http.RoundTripper{
		"HTTP/1.1": &http.Transport{DisableKeepAlives: true, DisableCompression: true},
		"HTTP/2":   h2c(),
	} {
		t.Run(name, func(t *testing.T) {
			pr, pw := io.Pipe()
			sent := sha256.New()
			req, err := http.NewRequestWithContext(t.Context(), http.MethodPut, g.url()+"/files/x", pr)
			must(t, err)
			req.Header.Set("Authorization", "Bearer "+token)
			req.Trailer = http.Header{"X-End": nil}
			go func() {
				chunk := bytes.Repeat([]byte("0123456789abcdef"), 4096)
				for n := 0; n < size; n += len(chunk) {
					chunk[0] = byte(n >> 16)
					sent.Write(chunk)
					if _, err := pw.Write(chunk); err != nil {
						return
					}
				}
				req.Trailer.Set("X-End", "end")
				pw.Close()
			}()
			var before, peak goruntime.MemStats
			goruntime.GC()
			goruntime.ReadMemStats(&before)
			resp, err := tr.RoundTrip(req)
			must(t, err)
			defer resp.Body.Close()
			got, n, buf := sha256.New(), 0, make([]byte, 64<<10)
			var most uint64
			for {
				k, err := resp.Body.Read(buf)
				got.Write(buf[:k])
				if n += k; n%(10<<20) < k {
					goruntime.ReadMemStats(&peak)
					most = max(most, peak.HeapInuse)
				}
				if err == io.EOF {
					break
				}
				must(t, err)
			}
			sum := fmt.Sprintf("%x", sent.Sum(nil))
			if n != size || fmt.Sprintf("%x", got.Sum(nil)) != sum || resp.Trailer.Get("X-Sum") != sum+" end" {
				t.Errorf("%d bytes, trailer %q", n, resp.Trailer.Get("X-Sum"))
			}
			if most > before.HeapInuse+32<<20 {
				t.Errorf("the heap grew by %d MiB", (most-before.HeapInuse)>>20)
			}
		})
	}
}

// h2c speaks HTTP/2 without TLS.
func h2c() *http.Transport {
	tr := &http.Transport{DisableKeepAlives: true, DisableCompression: true, Protocols: new(http.Protocols)}
	tr.Protocols.SetUnencryptedHTTP2(true)
	return tr
}

// What the upstream sees of a request.
func TestWhatPasses(t *testing.T) {
	w := newWorld(t)
	up, reached := plainUpstream(t)
	g := w.start(w.load(routeTo("mcp", "/mcp", up.URL+"/v1/endpoint", "")), Proxy)
	body := "  " + toolCall("echo") + "\n"
	resp := post(t, g.url()+"/mcp?a=1;b=%zz", w.token("änn,x", "s-ann"), body, func(r *http.Request) {
		r.Header.Set("X-Own", "kept")
		r.Header["Interlock-Subject"] = []string{"root"}
		r.Header["Interlock_Roles"] = []string{"admin"}
		r.Header.Set("Connection", "X-Hop")
		r.Header.Set("X-Hop", "1")
		r.Header.Set("X-Http-Method-Override", "DELETE")
		r.Header["X_http_method_override"] = []string{"DELETE"}
		r.Header.Set("X-Forwarded-User", "root")
		r.Header.Set("X-Forwarded-For", "127.0.0.9")
		r.Header["Mcp_session_id"] = []string{"another"}
		r.ContentLength = -1
		r.Trailer = http.Header{"X-End": {"end"}, "Interlock-Session": {"s-root"}}
	})
	if resp.StatusCode != http.StatusOK {
		t.Fatal(resp.Status)
	}
	r := within(t, "the request arrives", reached)
	got, _ := io.ReadAll(r.Body)
	if string(got) != body || r.URL.Path != "/v1/endpoint" || r.URL.RawQuery != "a=1;b=%zz" {
		t.Errorf("%s %q", r.URL, got)
	}
	h := r.Header
	for _, name := range []string{"Authorization", "X-Hop", "X-Http-Method-Override", "Interlock_Roles", "X_http_method_override", "Mcp_session_id", "X-Forwarded-User"} {
		if h.Get(name) != "" || h[name] != nil {
			t.Errorf("%s passed: %v", name, h[name])
		}
	}
	if h.Get("X-Own") != "kept" || h.Get("Interlock-Subject") != "%C3%A4nn%2Cx" || len(h["Interlock-Subject"]) != 1 || h.Get("Interlock-Tenant") != "default" {
		t.Errorf("%v", h)
	}
	if got := h["X-Forwarded-For"]; len(got) != 1 || got[0] != "127.0.0.1" || h.Get("X-Forwarded-Proto") != "http" {
		t.Errorf("forwarded for %q", got)
	}
	if len(r.Trailer) != 1 || r.Trailer.Get("X-End") != "end" {
		t.Errorf("trailers %v", r.Trailer)
	}
	resp = get(t, g.url()+"/.well-known/oauth-protected-resource/mcp")
	meta, _ := io.ReadAll(resp.Body)
	if resp.StatusCode != http.StatusOK || !bytes.Contains(meta, []byte(`"authorization_servers":["https://id.example"]`)) {
		t.Errorf("%s: %s", resp.Status, meta)
	}
}

// An answer that is cut in the middle does not look complete, and an event stream
// ends with the cause, even in the middle of an event.
func TestCutAnswers(t *testing.T) {
	w := newWorld(t)
	begun := make(chan struct{}, 4)
	up := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/plain":
			// More than the proxy holds back of an answer of known length.
			w.Header().Set("Content-Length", "1000000")
			_, _ = io.WriteString(w, strings.Repeat("data: half", 10_000))
		case "/events":
			w.Header().Set("Content-Type", "text/event-stream")
		}
		_, _ = io.WriteString(w, "data: half")
		_ = http.NewResponseController(w).Flush()
		begun <- struct{}{}
		<-r.Context().Done()
		begun <- struct{}{}
	}))
	defer up.Close()
	g := w.start(w.load(routeTo("http", "/", up.URL, "")), Proxy)
	token, reading := w.token("ann", "s-ann"), make(chan struct{}, 3)
	read := func(path string) error {
		resp := post(t, g.url()+path, token, "")
		within(t, "it begins", begun)
		b := make([]byte, len("data: half"))
		_, err := io.ReadFull(resp.Body, b)
		must(t, err)
		reading <- struct{}{}
		all, err := io.ReadAll(resp.Body)
		if path == "/events" && err == nil && !strings.HasPrefix(string(all), "\nevent: interrupted\n\nevent: error\ndata: {\"jsonrpc\":\"2.0\",\"error\":{\"code\":-31401") {
			err = fmt.Errorf("ended with %q", all)
		}
		return err
	}
	done := map[string]chan error{"/plain": make(chan error, 1), "/chunked": make(chan error, 1), "/events": make(chan error, 1)}
	for path, c := range done {
		go func() { c <- read(path) }()
	}
	for range done {
		within(t, "all are being read", reading)
	}
	w.decide(authority.Revoke, "session", "s-ann")
	for path, c := range done {
		if err := within(t, path, c); (err == nil) != (path == "/events") {
			t.Errorf("%s: %v", path, err)
		}
	}
}

// The trail of a caller who is denied at the door says what was asked for.
func TestDeniedCallsAreNamed(t *testing.T) {
	w := newWorld(t)
	up, _ := plainUpstream(t)
	seen := make(chan *route.Decision, 64)
	g, err := Start(Options{Config: w.load(routeTo("mcp", "/mcp", up.URL, "")), Kind: Proxy, Observe: func(d *route.Decision) {
		c := *d
		c.Arguments = bytes.Clone(d.Arguments)
		seen <- &c
	}})
	must(t, err)
	defer g.Shutdown(context.Background())
	eventually(t, "ready", func() bool { return g.unready() == "" })
	ann := w.token("ann", "s-ann")
	w.decide(authority.Revoke, "session", "s-ann")
	eventually(t, "denied", func() bool {
		return post(t, g.url()+"/mcp", ann, toolCall("echo")).StatusCode == http.StatusUnauthorized
	})
	var last *route.Decision
	for len(seen) > 0 {
		last = <-seen
	}
	if last == nil || last.Err == nil || last.Method != "tools/call" || last.Call.Tool != "echo" || last.Call.Audience != resource || len(last.Arguments) == 0 || last.Took <= 0 {
		t.Errorf("%+v", last)
	}
}

// A session that nobody watches any more does not stay open at its upstream.
func TestUnwatchedSessionsAreClosed(t *testing.T) {
	w := newWorld(t)
	up, reached := plainUpstream(t)
	g := w.start(w.load(strings.Replace(routeTo("mcp", "/mcp", up.URL, ""), "flush_timeout", "session_timeout: 1s, flush_timeout", 1)), Proxy)
	resp := post(t, g.url()+"/mcp", w.token("ann", "s-ann"), `{"jsonrpc":"2.0","id":7,"method":"tools/list"}`, func(r *http.Request) { r.Header.Set("Mcp-Session-Id", "ann's") })
	if resp.StatusCode != http.StatusOK || g.sessions.Len() != 1 {
		t.Fatal(resp.Status)
	}
	within(t, "it arrives", reached)
	w.decide(authority.Suspend, "session", "s-ann")
	if r := within(t, "the upstream is told", reached); r.Method != http.MethodDelete || r.Header.Get("Mcp-Session-Id") != "ann's" {
		t.Errorf("%s %v", r.Method, r.Header)
	}
}

// What no decision can name is not denied for that.
func TestLongPathsPass(t *testing.T) {
	w := newWorld(t)
	up, _ := plainUpstream(t)
	g := w.start(w.load(routeTo("http", "/", up.URL, "")), Proxy)
	ann := w.token("ann", "s-ann")
	path := "/files/" + strings.Repeat("a", 500)
	if resp := post(t, g.url()+path, ann, ""); resp.StatusCode != http.StatusOK {
		t.Fatal(resp.Status)
	}
	w.decide(authority.Revoke, "session", "s-ann")
	eventually(t, "denied", func() bool { return post(t, g.url()+path, ann, "").StatusCode == http.StatusUnauthorized })
}
