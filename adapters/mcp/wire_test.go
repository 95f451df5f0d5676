package mcpguard_test

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/google/go-cmp/cmp"
	"github.com/rogpeppe/go-internal/txtar"

	mcpguard "github.com/interlock-fabric/interlock/adapters/mcp"
	"github.com/interlock-fabric/interlock/pkg/session"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// wire talks to the server without an SDK and keeps what went over it.
type wire struct {
	t       *testing.T
	w       *world
	archive txtar.Archive
	names   *strings.Replacer // what differs between runs
}

func (x *wire) hide(value, name string) {
	x.names = strings.NewReplacer(value, name)
}

// request is one HTTP request. The token is left out of the record.
type request struct {
	method, era, token, session, body string
	header                            http.Header
	unrecorded                        bool
}

var shown = []string{"Content-Type", "Retry-After", "Www-Authenticate", "Cache-Control", "Allow"}

// send sends and returns the response, whose body the caller reads.
func (x *wire) send(r request) *http.Response {
	x.t.Helper()
	if r.method == "" {
		r.method = http.MethodPost
	}
	req, err := http.NewRequestWithContext(context.Background(), r.method, x.w.http.URL, strings.NewReader(r.body))
	if err != nil {
		x.t.Fatal(err)
	}
	maps.Copy(req.Header, r.header)
	req.Header.Set("Accept", "application/json, text/event-stream")
	if r.body != "" {
		req.Header.Set("Content-Type", "application/json")
	}
	if r.era != "" {
		req.Header.Set("Mcp-Protocol-Version", r.era)
	}
	if r.session != "" {
		req.Header.Set("Mcp-Session-Id", r.session)
	}
	if r.era == modern && strings.Contains(r.body, "tools/call") {
		req.Header.Set("Mcp-Method", "tools/call")
		req.Header.Set("Mcp-Name", between(r.body, `"name":"`, `"`))
	}
	if r.era == modern && strings.Contains(r.body, "subscriptions/listen") {
		req.Header.Set("Mcp-Method", "subscriptions/listen")
	}
	record := dump(r.method+" /mcp", req.Header, slices.Collect(maps.Keys(req.Header)), r.body)
	if r.token != "" {
		req.Header.Set("Authorization", "Bearer "+r.token)
		record = strings.Replace(record, "\n", "\nAuthorization: Bearer <token>\n", 1)
	}
	if !r.unrecorded {
		x.record("request", record)
	}
	resp, err := http.DefaultTransport.RoundTrip(req)
	if err != nil {
		x.t.Fatal(err)
	}
	x.t.Cleanup(func() { resp.Body.Close() })
	return resp
}

func between(s, from, to string) string {
	_, s, _ = strings.Cut(s, from)
	s, _, _ = strings.Cut(s, to)
	return s
}

func (x *wire) receive(resp *http.Response) string {
	x.t.Helper()
	timer := time.AfterFunc(20*time.Second, func() { resp.Body.Close() })
	defer timer.Stop()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		x.t.Fatal(err)
	}
	x.record("response", dump(resp.Status, resp.Header, shown, string(body)))
	return string(body)
}

// open opens a legacy session and returns its id.
func (x *wire) open(token string) string {
	x.t.Helper()
	resp := x.send(request{token: token, unrecorded: true, body: `{"jsonrpc":"2.0","id":0,"method":"initialize","params":{"protocolVersion":"2025-11-25","capabilities":{},"clientInfo":{"name":"raw","version":"1"}}}`})
	if resp.StatusCode != http.StatusOK {
		x.t.Fatal(resp.Status)
	}
	_, _ = io.Copy(io.Discard, resp.Body)
	id := resp.Header.Get("Mcp-Session-Id")
	x.hide(id, "<session>")
	resp = x.send(request{token: token, session: id, era: legacy, unrecorded: true, body: `{"jsonrpc":"2.0","method":"notifications/initialized"}`})
	if resp.StatusCode != http.StatusAccepted {
		x.t.Fatal(resp.Status)
	}
	return id
}

func dump(first string, h http.Header, keys []string, body string) string {
	var b strings.Builder
	fmt.Fprintln(&b, first)
	slices.Sort(keys)
	for _, k := range keys {
		for _, v := range h.Values(k) {
			fmt.Fprintf(&b, "%s: %s\n", k, v)
		}
	}
	if body != "" {
		fmt.Fprintf(&b, "\n%s", body)
		if !strings.HasSuffix(body, "\n") {
			b.WriteString("\n")
		}
	}
	return b.String()
}

func (x *wire) record(name, text string) {
	if x.names != nil {
		text = x.names.Replace(text)
	}
	x.archive.Files = append(x.archive.Files, txtar.File{Name: name, Data: []byte(text)})
}

const meta = `"_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28","io.modelcontextprotocol/clientInfo":{"name":"raw","version":"1"},"io.modelcontextprotocol/clientCapabilities":{}}`

func callBody(era, tool string) string {
	if era == modern {
		return `{"jsonrpc":"2.0","id":7,"method":"tools/call","params":{"name":"` + tool + `","arguments":{},` + meta + `}}`
	}
	return `{"jsonrpc":"2.0","id":7,"method":"tools/call","params":{"name":"` + tool + `","arguments":{}}}`
}

// TestWhatADenialLooksLike pins every byte that matters of what a denied caller
// is sent. Rewrite with -update, and read the difference.
func TestWhatADenialLooksLike(t *testing.T) {
	everyone := func(*session.Identity, *session.Call) bool { return true }
	effect := func(d session.Denial) func(*world) {
		return func(w *world) { w.enforcer.deny(d, everyone) }
	}
	bare := func(err error) func(*world) {
		return func(w *world) { w.enforcer.denyErr(&session.DeniedError{Err: err}, everyone) }
	}
	// Denials at HTTP, of a call that comes with a token or without.
	atHTTP := map[string]struct {
		about string
		setup func(*world)
		token func(testing.TB, *world) string
		opts  *mcpguard.Options
	}{
		"no-credentials": {about: "Nothing was presented: no error code (RFC 6750 section 3.1).",
			token: func(testing.TB, *world) string { return "" }},
		"garbage": {about: "The token is not one.",
			token: func(testing.TB, *world) string { return "garbage" }},
		"wrong-audience": {about: "The token is for another resource.",
			token: func(t testing.TB, w *world) string {
				return w.token(t, "ann", func(c map[string]any) { c["aud"] = "https://other.example" })
			}},
		"expired": {about: "The token has expired.",
			token: func(t testing.TB, w *world) string {
				return w.token(t, "ann", func(c map[string]any) { c["exp"] = time.Now().Add(-time.Hour).Unix() })
			}},
		"alg-none": {about: "An unsigned token.",
			token: func(testing.TB, *world) string {
				return "eyJhbGciOiJub25lIiwidHlwIjoiYXQrand0In0.eyJpc3MiOiJodHRwczovL2lkLmV4YW1wbGUifQ."
			}},
		"hmac-with-public-key": {about: "A token signed with HMAC, the public key as the secret.",
			token: func(t testing.TB, w *world) string {
				public, err := (&jose.JSONWebKey{Key: w.key.Public(), KeyID: "k1"}).MarshalJSON()
				if err != nil {
					t.Fatal(err)
				}
				return sign(t, jose.SigningKey{Algorithm: jose.HS256, Key: jose.JSONWebKey{Key: public, KeyID: "k1"}},
					map[string]any{"iss": issuerURL, "sub": "ann", "aud": resource, "exp": time.Now().Add(time.Hour).Unix()})
			}},
		"insufficient-scope": {about: "A scope that the host requires is missing.",
			opts: &mcpguard.Options{Scopes: []string{"tools.admin"}}},
		"revoked": {about: "An entry in force revokes the caller.", setup: effect(stolen)},
		"suspended": {about: "An entry in force suspends the caller, without an end.",
			setup: effect(session.Denial{Effect: session.EffectSuspended, Reason: session.ReasonAnomaly, Incident: "INC-7", Shape: session.Shape(session.KindUser), Seq: 12})},
		"step-up": {about: "The caller must log in again (RFC 9470).",
			setup: effect(session.Denial{Effect: session.EffectStepUp, Reason: session.ReasonRiskLevel, Shape: session.Shape(session.KindUser), Seq: 13, ACR: "urn:acr:phr"})},
		"stale":          {about: "The enforcer's state is too old.", setup: bare(session.ErrStale)},
		"overloaded":     {about: "The enforcer is at a bound.", setup: bare(session.ErrOverloaded)},
		"token-expired":  {about: "The enforcer, by its clock, holds the token to have expired.", setup: bare(session.ErrExpired)},
		"audience":       {about: "This resource itself is closed: another token would not help.", setup: effect(session.Denial{Effect: session.EffectRevoked, Reason: session.ReasonMaintenance, Shape: session.Shape(session.KindAudience), Seq: 14})},
		"kill":           {about: "Everything is stopped.", setup: effect(session.Denial{Effect: session.EffectRevoked, Reason: session.ReasonKill, Incident: "INC-143", Shape: session.Shape(session.KindGlobal), Seq: 15})},
		"enforcer-error": {about: "An error that nobody planned for denies, and says nothing.", setup: bare(io.ErrUnexpectedEOF)},
	}
	for name, c := range atHTTP {
		t.Run(name, func(t *testing.T) {
			x := newWire(t, c.about, c.opts)
			token := ""
			if c.token != nil {
				token = c.token(t, x.w)
			} else {
				token = x.w.token(t, "ann")
			}
			if c.setup != nil {
				c.setup(x.w)
			}
			x.receive(x.send(request{token: token, era: modern, body: callBody(modern, "echo")}))
			x.compare("http-" + name)
			if len(x.w.started) != 0 {
				t.Fatal("a tool ran")
			}
		})
	}

	t.Run("reduced", func(t *testing.T) {
		x := newWire(t, "A caller with reduced rights connects, and is denied what is not low-risk.", nil)
		x.w.enforcer.deny(session.Denial{Effect: session.EffectReduced, Reason: session.ReasonAnomaly, Shape: session.Shape(session.KindUser), Seq: 16},
			func(_ *session.Identity, call *session.Call) bool { return !call.LowRisk })
		x.receive(x.send(request{token: x.w.token(t, "ann"), era: modern, body: callBody(modern, "echo")}))
		x.compare("call-reduced")
	})
	for name, era := range eras {
		t.Run("cut-"+name, func(t *testing.T) {
			x := newWire(t, "A running call is cut.", nil)
			token, id := x.w.token(t, "ann"), ""
			if era == legacy {
				id = x.open(token)
			}
			got := make(chan *http.Response, 1)
			go func() { got <- x.send(request{token: token, session: id, era: era, body: callBody(era, "wait")}) }()
			x.w.await(t, x.w.started, "wait")
			x.w.enforcer.deny(stolen, everyone)
			x.receive(<-got)
			x.compare("cut-" + name)
		})
	}
	t.Run("cut-listen", func(t *testing.T) {
		x := newWire(t, "A subscription of the stateless era is cut.", nil)
		resp := x.send(request{token: x.w.token(t, "ann"), era: modern, body: `{"jsonrpc":"2.0","id":"sub","method":"subscriptions/listen","params":{"notifications":{"toolsListChanged":true},` + meta + `}}`})
		// The acknowledgement says that the subscription is in place.
		ack := readEvent(t, resp.Body)
		x.w.enforcer.deny(stolen, everyone)
		resp.Body = struct {
			io.Reader
			io.Closer
		}{io.MultiReader(strings.NewReader(ack), resp.Body), resp.Body}
		x.receive(resp)
		x.compare("cut-listen")
	})
	t.Run("cut-get", func(t *testing.T) {
		x := newWire(t, "The event stream of a legacy session is cut.", nil)
		token := x.w.token(t, "ann")
		resp := x.send(request{method: http.MethodGet, token: token, session: x.open(token), era: legacy})
		x.w.enforcer.deny(stolen, everyone)
		x.receive(resp)
		x.compare("cut-get")
	})
	t.Run("client-response", func(t *testing.T) {
		x := newWire(t, "A legacy client's answer to the server never reaches the middleware: it is denied at HTTP.", nil)
		token := x.w.token(t, "ann")
		id := x.open(token)
		x.w.enforcer.deny(stolen, everyone)
		x.receive(x.send(request{token: token, session: id, era: legacy, body: `{"jsonrpc":"2.0","id":1,"result":{"action":"accept"}}`}))
		x.compare("http-client-response")
	})
	t.Run("another-callers-session", func(t *testing.T) {
		x := newWire(t, "A session of one caller is used with the token of another.", nil)
		id := x.open(x.w.token(t, "ann"))
		x.receive(x.send(request{token: x.w.token(t, "bob"), session: id, era: legacy, body: callBody(legacy, "echo")}))
		x.compare("http-another-callers-session")
	})
}

// readEvent reads one server-sent event, byte by byte so as to take no more.
func readEvent(t *testing.T, r io.Reader) string {
	t.Helper()
	var b bytes.Buffer
	one := make([]byte, 1)
	for !bytes.HasSuffix(b.Bytes(), []byte("\n\n")) {
		if _, err := r.Read(one); err != nil {
			t.Fatal(err)
		}
		b.Write(one)
	}
	return b.String()
}

func newWire(t *testing.T, about string, opts *mcpguard.Options) *wire {
	x := &wire{t: t, w: newWorld(t, opts)}
	x.archive.Comment = []byte(about + "\n\n")
	return x
}

func (x *wire) compare(name string) {
	x.t.Helper()
	// Requests are recorded before their responses, whatever goroutine sent them.
	file := filepath.Join("testdata", name+".txtar")
	got := txtar.Format(&x.archive)
	if *update {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			x.t.Fatal(err)
		}
		if err := os.WriteFile(file, got, 0o644); err != nil {
			x.t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(file)
	if err != nil {
		x.t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), string(got)); diff != "" {
		x.t.Errorf("%s (-want +got):\n%s", file, diff)
	}
}
