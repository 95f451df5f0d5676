package authority

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/santhosh-tekuri/jsonschema/v6"

	"github.com/interlock-fabric/interlock/internal/api/apitest"
	"github.com/interlock-fabric/interlock/internal/issuers"
	"github.com/interlock-fabric/interlock/pkg/authority"
	"github.com/interlock-fabric/interlock/pkg/session"
	"github.com/interlock-fabric/interlock/pkg/trail"
)

// longTenant has a name as long as one can be.
var longTenant = strings.Repeat("a", 64)

// described is a whole authority whose answers are held against the API's
// description.
type described struct {
	*fixture
	doc *apitest.Document
	hc  *http.Client
}

func startDescribed(t testing.TB) *described {
	t.Helper()
	const idp = "https://login.example"
	dir := t.TempDir()
	config := fmt.Sprintf("audiences: [https://tools.example/mcp]\nissuers:\n- {url: %q, tenant: acme, jwks_file: keys.json}\nemail_issuer: %q\n", idp, idp)
	for name, b := range map[string][]byte{"keys.json": newMinter(t, idp).keys(), "tokens.yaml": []byte(config)} {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	tokens, err := issuers.LoadTokens(filepath.Join(dir, "tokens.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	d := &described{fixture: start(t, Options{Issuers: []string{idp}, Tenants: []string{"acme", longTenant}, Tokens: tokens})}
	if d.doc, err = apitest.Load(); err != nil {
		t.Fatal(err)
	}
	socket := d.a.Socket()
	tr := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}}
	t.Cleanup(tr.CloseIdleConnections)
	d.hc = &http.Client{Transport: tr}
	return d
}

// do sends a request and returns the answer, which is as it is described.
func (d *described) do(method, path string, h http.Header, body []byte) (int, []byte) {
	d.Helper()
	ctx, cancel := context.WithTimeout(d.ctx, 30*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, "http://a"+path, bytes.NewReader(body))
	if err != nil {
		d.Fatal(err)
	}
	maps.Copy(req.Header, h)
	resp, err := d.hc.Do(req)
	if err != nil {
		d.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.Header.Get("Content-Type") == "text/event-stream" {
		return resp.StatusCode, nil // it does not end
	}
	b, err := io.ReadAll(resp.Body)
	if err == nil {
		err = d.doc.Check(method, path, resp.StatusCode, resp.Header, b)
	}
	if err != nil {
		d.Error(err)
	}
	if resp.StatusCode >= 500 {
		d.Errorf("%s %.200s: %d %.500s", method, path, resp.StatusCode, b)
	}
	return resp.StatusCode, b
}

var jsonBody = http.Header{"Content-Type": {"application/json"}}

// state is what requests change.
func (d *described) state() string {
	d.Helper()
	list, err := d.c.Proposals(d.ctx)
	if err != nil {
		d.Fatal(err)
	}
	epoch, number, _ := d.a.seq.Head()
	r := d.a.registry.Status()
	return fmt.Sprint(epoch, number, r.Sessions, r.Agents, r.Number, len(d.a.enforcers()), len(list), d.a.store.KeySet().Version)
}

// refused sends what must be refused, with one of the statuses, and change nothing.
func (d *described) refused(what, method, path string, h http.Header, body []byte, statuses ...int) {
	d.Helper()
	before := d.state()
	if code, b := d.do(method, path, h, body); !slices.Contains(statuses, code) {
		d.Errorf("%s: %s %.200s %.300s: %d %.300s", what, method, path, body, code, b)
	}
	if after := d.state(); after != before {
		d.Errorf("%s: %s %.200s: %s, and before it %s", what, method, path, after, before)
	}
}

// TestAPIAnswersAsDescribed: with enforcers that do something, every operation
// answers what its description says.
func TestAPIAnswersAsDescribed(t *testing.T) {
	d := startDescribed(t)
	p := d.point("eu-1", trail.Options{Sample: 1})
	d.enroll("eu-2")
	events := make(chan error, 1)
	ctx, stop := context.WithCancel(d.ctx)
	defer stop()
	told := make(chan string, 64)
	go func() { events <- d.events(ctx, told) }()
	alice, err := p.Prepare(session.Identity{
		Tenant: "acme", Issuer: "https://login.example", User: "alice", Session: session.SessionRef{ID: "s-81f3"}, Client: "console",
		Ancestors: []session.SessionRef{{ID: "s-0001"}}, Actors: []session.Actor{{ID: "spiffe://corp.example/agent/billing"}, {ID: "helper"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	running, release, err := p.Bind(d.ctx, alice, session.Call{Tool: "t"})
	if err != nil {
		t.Fatal(err)
	}
	defer release()
	if err := p.call(alice, "transfer"); err != nil {
		t.Fatal(err)
	}
	next := func() string {
		select {
		case kind := <-told:
			return kind
		case err := <-events:
			t.Fatal(err)
		case <-d.ctx.Done():
			t.Fatal("nothing was told")
		}
		return ""
	}
	if kind := next(); kind != "watching" {
		t.Fatal(kind)
	}
	var decided authority.Decision
	code, b := d.do("POST", "/v1/decisions", jsonBody, []byte(`{"operation":"revoke","reason":"stolen-token","incident":"INC-142","commit":true,
		"targets":[{"tenant":"acme","terms":[{"kind":"session","issuer":"https://login.example","value":"s-81f3"}]}]}`))
	if err := json.Unmarshal(b, &decided); code != 200 || err != nil || !decided.Durable {
		t.Fatalf("%d %s", code, b)
	}
	<-running.Done()
	place := fmt.Sprintf("/v1/decisions/%d/%d/coverage", decided.Epoch, decided.Number)
	d.until(func() bool {
		code, b := d.do("GET", place+"?wait=1s", nil, nil)
		return code == 200 && strings.Contains(string(b), `"applied_at"`) && strings.Contains(string(b), `"absent"`)
	})
	if err := p.call(alice, "transfer"); !errors.Is(err, session.ErrRevoked) {
		t.Fatal(err)
	}
	// Until everything that there can be has come about.
	for _, want := range []struct{ path, has string }{
		{"/v1/trail", `"decision":"denied"`}, {"/v1/seen", `"actors"`}, {"/v1/audit?kind=report", `"trail"`},
		{"/v1/audit?kind=receipts", `"receipts"`}, {"/v1/audit?kind=coverage", `"detail"`}, {"/v1/agents?tenant=acme", `"first_seen"`},
	} {
		d.until(func() bool { _, b := d.do("GET", want.path, nil, nil); return strings.Contains(string(b), want.has) })
	}
	for i, want := range []string{authority.EventDecision, authority.EventCoverage} {
		if kind := next(); kind != want {
			t.Errorf("event %d: %s", i, kind)
		}
	}
	stop()
	if err := <-events; err != nil {
		t.Error(err)
	}
	for _, o := range d.doc.Operations {
		if o.Method != "GET" || o.Path == "/v1/watch" {
			continue
		}
		path := strings.NewReplacer("{epoch}", fmt.Sprint(decided.Epoch), "{number}", fmt.Sprint(decided.Number)).Replace(o.Path)
		switch path {
		case "/v1/agents", "/v1/sessions":
			path += "?tenant=acme"
		case "/v1/receipts/export":
			path += "?incident=INC-142"
		}
		if code, b := d.do(o.Method, path, nil, nil); code != 200 {
			t.Errorf("%s: %d %s", path, code, b)
		}
	}
	// A key set that is in force is no error.
	_, keys := d.do("GET", "/v1/keyset", nil, nil)
	if code, b := d.do("POST", "/v1/keyset", jsonBody, keys); code != 204 {
		t.Errorf("%d %s", code, b)
	}
	var proposal authority.Proposal
	_, b = d.do("POST", "/v1/proposals", jsonBody, []byte(`{"operation":"suspend","targets":[{"terms":[{"kind":"tenant","value":"acme"}]}],"reason":"compromised","incident":"INC-9","for":"2h"}`))
	if err := json.Unmarshal(b, &proposal); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]int{
		"/v1/proposals/" + proposal.ID + "/approve": 403, "/v1/proposals/p99-none/approve": 404, "/v1/proposals/p99-none/withdraw": 404,
	} {
		if code, b := d.do("POST", path, nil, nil); code != want {
			t.Errorf("%s: %d %s", path, code, b)
		}
	}
	for _, want := range []int{200, 409} {
		if code, b := d.do("POST", "/v1/proposals/"+proposal.ID+"/withdraw", nil, nil); code != want {
			t.Errorf("withdraw: %d %s", code, b)
		}
	}
	for _, want := range []int{204, 404} {
		if code, b := d.do("DELETE", "/v1/enforcers/eu-2", nil, nil); code != want {
			t.Errorf("retire: %d %s", code, b)
		}
	}
}

// events reads what is watched until ctx ends, and tells the types.
func (d *described) events(ctx context.Context, told chan<- string) error {
	o := d.doc.Find("GET", "/v1/watch")
	req, err := http.NewRequestWithContext(ctx, "GET", "http://a/v1/watch", nil)
	if err != nil {
		return err
	}
	resp, err := d.hc.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	content, ok := o.Answers[resp.StatusCode][resp.Header.Get("Content-Type")]
	if !ok {
		return fmt.Errorf("%d %s is not described", resp.StatusCode, resp.Header.Get("Content-Type"))
	}
	buf, left := make([]byte, 4096), []byte(nil)
	for {
		n, err := resp.Body.Read(buf)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		left = append(left, buf[:n]...)
		for {
			one, rest, ok := bytes.Cut(left, []byte("\n\n"))
			if !ok {
				break
			}
			left = rest
			if bytes.HasPrefix(one, []byte(": ")) {
				if string(one) == ": watching" {
					told <- "watching"
				}
				continue
			}
			kind, data, ok := strings.Cut(strings.TrimPrefix(string(one), "event: "), "\ndata: ")
			if !ok {
				return fmt.Errorf("not an event: %q", one)
			}
			if err := apitest.Validate(content.Parts, []byte(data)); err != nil {
				return fmt.Errorf("%w\n%s", err, data)
			}
			if kind != authority.EventEnforcer { // which come and go as they like
				told <- kind
			}
		}
	}
}

// probe is a bound of a value: what is at it is taken, and what is beyond it is
// refused.
type probe struct {
	bound      string // of a schema, as in "Session.keys maxItems"
	at, beyond any    // the whole body, or parameter; nil is not tried
	score      int    // of several, that of the largest is tried
}

// bounds finds the bounds of a value. put returns the whole with another value in
// its place.
func bounds(s *jsonschema.Schema, name string, v any, put func(any) any, found func(probe)) {
	emit := func(keyword string, at, beyond any) {
		p := probe{bound: name + " " + keyword}
		if list, ok := v.([]any); ok {
			p.score = len(list)
		}
		if at != nil {
			p.at = put(at)
		}
		if beyond != nil {
			p.beyond = put(beyond)
		}
		found(p)
	}
	if s.Ref != nil {
		if len(s.Ref.Properties) > 0 || len(s.Ref.AllOf) > 0 {
			name = s.Ref.Location[strings.LastIndex(s.Ref.Location, "/")+1:]
		}
		bounds(s.Ref, name, v, put, found)
		return
	}
	for _, part := range s.AllOf {
		bounds(part, name, v, put, found)
	}
	switch v := v.(type) {
	case map[string]any:
		with := func(k string, x any) map[string]any {
			c := maps.Clone(v)
			if c[k] = x; x == nil {
				delete(c, k)
			}
			return c
		}
		if closed, _ := s.AdditionalProperties.(bool); s.AdditionalProperties != nil && !closed || s.UnevaluatedProperties != nil {
			emit("is closed", nil, with("x-unknown", 1))
		}
		for _, k := range s.Required {
			if len(v) > 1 || name != "TrailLink" { // an empty link is none
				emit("requires "+k, nil, with(k, nil))
			}
		}
		for _, k := range slices.Sorted(maps.Keys(s.Properties)) {
			p := s.Properties[k]
			if x, ok := v[k]; ok {
				bounds(p, name+"."+k, x, func(x any) any { return put(with(k, x)) }, found)
			}
		}
		emit("type", nil, []any{})
	case []any:
		if s.MaxItems != nil {
			emit("maxItems", grown(v, *s.MaxItems), grown(v, *s.MaxItems+1))
		}
		if s.MinItems != nil {
			emit("minItems", grown(v, *s.MinItems), v[:*s.MinItems-1])
		}
		emit("type", nil, map[string]any{})
		for i, x := range v {
			bounds(s.Items2020, name+"[]", x, func(x any) any {
				c := slices.Clone(v)
				c[i] = x
				return put(c)
			}, found)
		}
	case string:
		emit("type", nil, 7)
		if s.MaxLength != nil {
			emit("maxLength", long(s, v, *s.MaxLength), long(s, v, *s.MaxLength+1))
		}
		switch {
		case s.Enum != nil:
			emit("enum", nil, "no-such-thing")
		case s.Pattern != nil && !s.Pattern.MatchString("%"):
			emit("pattern", nil, "%")
		case s.Format != nil:
			emit("format", nil, "yesterday")
		}
	case bool:
		emit("type", nil, "true")
	case json.Number:
		emit("type", nil, "x")
		number := func(r *big.Rat, off string) json.Number {
			step, _ := new(big.Rat).SetString(off)
			if typeOf(s) == "integer" {
				step.SetInt64(int64(step.Sign()))
			}
			n := new(big.Rat).Add(r, step)
			if n.IsInt() {
				return json.Number(n.Num().String())
			}
			return json.Number(n.FloatString(4))
		}
		if s.Minimum != nil {
			emit("minimum", number(s.Minimum, "0"), number(s.Minimum, "-0.001"))
		}
		if s.Maximum != nil {
			emit("maximum", number(s.Maximum, "0"), number(s.Maximum, "0.001"))
		}
	}
}

// grown is a list of n, of which those that are not there yet are like the last,
// and differ.
func grown(list []any, n int) []any {
	out := slices.Clone(list[:min(n, len(list))])
	for i := len(out); i < n; i++ {
		out = append(out, varied(list[len(list)-1], i))
	}
	return out
}

func varied(v any, i int) any {
	switch v := v.(type) {
	case string:
		if n := len(v); n >= 16 {
			return fmt.Sprintf("%s%04x%s", v[:n-8], i, v[n-4:])
		}
		return fmt.Sprintf("%s%04x", v, i)
	case []any:
		return append([]any{varied(v[0], i)}, v[1:]...)
	case map[string]any:
		c := maps.Clone(v)
		for _, k := range []string{"id", "value", "terms"} {
			if x, ok := c[k]; ok {
				c[k] = varied(x, i)
			}
		}
		return c
	}
	return v
}

// long is a text of n bytes that is like v as far as the schema asks for that.
func long(s *jsonschema.Schema, v string, n int) string {
	fill := n - len(v)
	texts := []string{strings.Repeat("a", n), v + strings.Repeat("a", fill), strings.Repeat("0", fill) + v}
	if strings.Contains(v, ":") {
		texts = texts[1:] // what is before it says what the rest is
	}
	for _, c := range texts {
		if s.Pattern == nil || s.Pattern.MatchString(c) {
			return c
		}
	}
	panic("no text of that length: " + v)
}

// TestAPIEnforcesItsBounds: each example is taken; what is at a bound of the
// description is taken too, and what is beyond it refused, with nothing done.
func TestAPIEnforcesItsBounds(t *testing.T) {
	d := startDescribed(t)
	now := time.Now()
	encode := func(v any) []byte {
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	tried, n := map[string]bool{}, 0
	try := func(p probe, send func(v any) int) {
		tried[p.bound] = true
		if p.at != nil {
			n++
			if code := send(p.at); code == 400 || code == 413 || code == 422 {
				t.Errorf("%s: what is at the bound of %s is refused (%d)", apitest.File, p.bound, code)
			}
		}
		if p.beyond != nil {
			n++
			before := d.state()
			if code := send(p.beyond); code != 400 && code != 413 {
				t.Errorf("%s: what is beyond the bound of %s is not refused (%d)", apitest.File, p.bound, code)
			}
			if after := d.state(); after != before {
				t.Errorf("beyond the bound of %s: %s, and before it %s", p.bound, after, before)
			}
		}
	}
	for _, o := range d.doc.Operations {
		samples := make([]any, len(o.Samples))
		best := map[string]probe{}
		of := map[string]int{} // the sample
		for i, s := range o.Samples {
			var err error
			if samples[i], err = jsonschema.UnmarshalJSON(bytes.NewReader(s.JSON(now))); err != nil {
				t.Fatal(err)
			}
			bounds(o.Body, o.Method+" "+o.Path, samples[i], func(v any) any { return v }, func(p probe) {
				if have, ok := best[p.bound]; !ok || p.score > have.score {
					best[p.bound], of[p.bound] = p, i
				}
			})
		}
		for i, s := range o.Samples {
			if code, b := d.do(o.Method, o.Path, jsonBody, encode(samples[i])); code > 299 {
				t.Errorf("%s: %s %s: example %s: %d %s", apitest.File, o.Method, o.Path, s.Name, code, b)
			}
			for _, bound := range slices.Sorted(maps.Keys(best)) {
				if of[bound] == i && !tried[bound] {
					try(best[bound], func(v any) int { code, _ := d.do(o.Method, o.Path, jsonBody, encode(v)); return code })
				}
			}
		}
		for _, p := range o.Params {
			var sample any
			switch list := exampleOf(p.Schema); {
			case len(list) > 0:
				sample = list[0]
			case typeOf(p.Schema) == "array":
				sample = exampleOf(p.Schema.Items2020)[:1]
			case typeOf(p.Schema) == "integer":
				sample = json.Number("1")
			default:
				sample = "x"
			}
			bounds(p.Schema, o.Method+" "+o.Path+" "+p.Name, sample, func(v any) any { return v }, func(b probe) {
				if strings.HasSuffix(b.bound, " type") && typeOf(p.Schema) != "integer" {
					return // all of it is text
				}
				try(b, func(v any) int { return d.send(o, p, v, samples) })
			})
		}
	}
	// A bound that no example reaches would not have been tried.
	var want func(s *jsonschema.Schema, name string)
	want = func(s *jsonschema.Schema, name string) {
		if s.Ref != nil {
			if len(s.Ref.Properties) > 0 || len(s.Ref.AllOf) > 0 {
				name = s.Ref.Location[strings.LastIndex(s.Ref.Location, "/")+1:]
			}
			want(s.Ref, name)
			return
		}
		for keyword, there := range map[string]bool{
			"maxItems": s.MaxItems != nil, "minItems": s.MinItems != nil, "maxLength": s.MaxLength != nil, "minimum": s.Minimum != nil, "maximum": s.Maximum != nil, "enum": s.Enum != nil,
		} {
			if there && !tried[name+" "+keyword] {
				t.Errorf("%s: %s of %s is in no example of a request: add one", apitest.File, keyword, name)
			}
		}
		for _, part := range s.AllOf {
			want(part, name)
		}
		for k, p := range s.Properties {
			want(p, name+"."+k)
		}
		if s.Items2020 != nil {
			want(s.Items2020, name+"[]")
		}
	}
	for _, o := range d.doc.Operations {
		if o.Body != nil {
			want(o.Body, o.Method+" "+o.Path)
		}
		for _, p := range o.Params {
			want(p.Schema, o.Method+" "+o.Path+" "+p.Name)
		}
	}
	if n < 200 {
		t.Errorf("only %d tries", n)
	}
	t.Logf("%d bounds, %d tries", len(tried), n)
}

func typeOf(s *jsonschema.Schema) string {
	for s.Ref != nil {
		s = s.Ref
	}
	if s.Types == nil {
		return ""
	}
	return strings.Join(s.Types.ToStrings(), " ")
}

// TestAPIRefusesWhatIsBad: at every operation, what is malformed is refused by a
// problem document, and nothing of it is done.
func TestAPIRefusesWhatIsBad(t *testing.T) {
	d := startDescribed(t)
	repeated := func(b []byte) []byte { // its first member
		name, _, _ := bytes.Cut(b[1:], []byte(":"))
		return slices.Concat([]byte("{"), name, []byte(":null,"), b[1:])
	}
	for _, o := range d.doc.Operations {
		path := strings.NewReplacer("{epoch}", "1", "{number}", "1", "{name}", "none", "{id}", "none").Replace(o.Path)
		h, body := http.Header{}, []byte(nil)
		if o.Body != nil {
			h, body = jsonBody, []byte(`{"frame":""}`)
			if len(o.Samples) > 0 {
				body = o.Samples[0].JSON(time.Now())
			}
		}
		takes := slices.ContainsFunc(o.Params, func(p apitest.Param) bool { return p.In == "query" })
		d.refused("an unknown parameter", o.Method, path+"?x-unknown=1", h, body, 400)
		d.refused("a malformed query", o.Method, path+"?limit=%zz", h, body, 400)
		d.refused("a semicolon", o.Method, path+"?limit=1;limit=2", h, body, 400)
		d.refused("another method", "PATCH", path, h, body, 404)
		d.refused("a path that is not clean", o.Method, strings.Replace(path, "/v1/", "/v1//", 1), h, body, 404)
		d.refused("a path with dots", o.Method, path+"/../x", h, body, 404)
		d.refused("a path that goes on", o.Method, path+"/", h, body, 404)
		for _, p := range o.Params {
			switch {
			case p.In == "path":
				d.refused("a path that is too long", o.Method, strings.ReplaceAll(o.Path, "{"+p.Name+"}", strings.Repeat("9", 65)), h, body, 400)
			case p.In == "query" && typeOf(p.Schema) != "array":
				d.refused("a parameter twice", o.Method, path+"?"+p.Name+"=1&"+p.Name+"=1", h, body, 400)
				d.refused("a parameter that is too long", o.Method, path+"?"+p.Name+"="+strings.Repeat("a", 4097), h, body, 400)
			case p.In == "header":
				twice := maps.Clone(h)
				twice[p.Name] = []string{"a", "b"}
				d.refused("a header twice", o.Method, path, twice, body, 400)
			}
		}
		if o.Raw["requestBody"] != nil && o.Body == nil {
			form := http.Header{"Content-Type": {"application/x-www-form-urlencoded"}}
			for what, b := range map[string]string{
				"no token": "", "an empty one": "token=", "two": "token=a&token=b", "malformed": "token=%zz", "a semicolon": "token=a;token=b",
			} {
				d.refused(what, o.Method, path, form, []byte(b), 400)
			}
			d.refused("too large", o.Method, path, form, []byte("token="+strings.Repeat("a", authority.MaxBody)), 413)
		}
		if o.Body == nil {
			d.refused("a body", o.Method, path, jsonBody, []byte("{}"), 400)
			continue
		}
		if takes {
			t.Errorf("%s takes both a query and a body: say here how it is refused", o.Path)
		}
		for _, ct := range []string{"", "text/plain", "application/x-www-form-urlencoded", "application/jsonx", "multipart/form-data", "%"} {
			d.refused("content type "+ct, o.Method, path, http.Header{"Content-Type": {ct}}, body, 400)
		}
		for what, b := range map[string][]byte{
			"nothing":             {},
			"blank":               []byte(" \n\t "),
			"null":                []byte("null"),
			"a list":              []byte("[]"),
			"a text":              []byte(`"x"`),
			"an unknown member":   append([]byte(`{"x-unknown":1,`), body[1:]...),
			"a member twice":      repeated(body),
			"in another case":     bytes.ToUpper(repeated(body)),
			"more after it":       append(slices.Clone(body), " {}"...),
			"a byte order mark":   append([]byte("\xef\xbb\xbf"), body...),
			"UTF-16":              []byte("\xff\xfe{\x00}\x00"),
			"not UTF-8":           append([]byte("{\"\xff\":1,"), body[1:]...),
			"a comment":           append([]byte("/* */"), body...),
			"deep":                append([]byte(`{"x-unknown":`+strings.Repeat("[", 10_000)+strings.Repeat("]", 10_000)+","), body[1:]...),
			"deeper than closed":  []byte(strings.Repeat(`{"targets":[`, 80_000)),
			"a number that is no": []byte(`{"revision":1e999999999}`),
		} {
			d.refused(what, o.Method, path, h, b, 400)
		}
		for _, n := range []int{1, len(body) / 3, len(body) / 2, len(body) - 1} {
			d.refused("cut off", o.Method, path, h, body[:n], 400)
		}
		d.refused("too large", o.Method, path, h, append(bytes.Repeat([]byte(" "), authority.MaxBody), body...), 413)
	}
}

func exampleOf(s *jsonschema.Schema) []any {
	if s.Ref != nil && len(s.Examples) == 0 {
		return exampleOf(s.Ref)
	}
	return s.Examples
}

// send makes a request in which one parameter has the value.
func (d *described) send(o *apitest.Operation, p apitest.Param, v any, samples []any) int {
	d.Helper()
	path, h, q := o.Path, http.Header{}, url.Values{}
	for _, other := range o.Params {
		value := []any{v}
		if list, ok := v.([]any); ok {
			value = list
		}
		if other.Name != p.Name {
			if value = exampleOf(other.Schema); len(value) == 0 || !other.Required && other.Name != "tenant" {
				continue
			}
			value = value[:1]
		}
		for _, x := range value {
			switch s := fmt.Sprint(x); other.In {
			case "path":
				path = strings.ReplaceAll(path, "{"+other.Name+"}", url.PathEscape(s))
			case "query":
				q.Add(other.Name, s)
			case "header":
				h.Add(other.Name, s)
			}
		}
	}
	if len(q) > 0 {
		path += "?" + q.Encode()
	}
	var body []byte
	if o.Body != nil {
		maps.Copy(h, jsonBody)
		body, _ = json.Marshal(samples[0]) // it came from JSON
	}
	code, _ := d.do(o.Method, path, h, body)
	return code
}

// FuzzAPI sends what no client would. Whatever it is, the answer is as described,
// and never that the authority failed; what is refused changes nothing.
func FuzzAPI(f *testing.F) {
	d := startDescribed(f)
	state := func() string {
		epoch, number, _ := d.a.seq.Head()
		r := d.a.registry.Status()
		return fmt.Sprint(epoch, number, r.Sessions, r.Agents, r.Number, len(d.a.enforcers()), d.a.store.KeySet().Version)
	}
	for i, o := range d.doc.Operations {
		f.Add(uint8(i), "1", "", "", "", []byte(nil))
		f.Add(uint8(i), "1", "", "application/x-www-form-urlencoded", "", []byte("token=x&token_type_hint=access_token"))
		for _, s := range o.Samples {
			f.Add(uint8(i), "x", "", "application/json", "key", s.JSON(time.Now()))
		}
		for _, p := range o.Params {
			for _, v := range append(exampleOf(p.Schema), "1", "x") {
				f.Add(uint8(i), fmt.Sprint(v), url.Values{"tenant": {"acme"}, p.Name: {fmt.Sprint(v)}}.Encode(), "application/json", "", []byte("{}"))
			}
		}
	}
	f.Fuzz(func(t *testing.T, op uint8, name, query, contentType, key string, body []byte) {
		o := d.doc.Operations[int(op)%len(d.doc.Operations)]
		if name == "" || name == "." || name == ".." {
			name = "x" // another path
		}
		path := o.Path
		for _, p := range o.Params {
			if p.In == "path" {
				path = strings.ReplaceAll(path, "{"+p.Name+"}", url.PathEscape(name))
			}
		}
		if query != "" {
			path += "?" + query
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		req, err := http.NewRequestWithContext(ctx, o.Method, "http://a"+path, bytes.NewReader(body))
		if err != nil || strings.ContainsFunc(path, func(r rune) bool { return r <= ' ' || r >= 0x7f }) || strings.Contains(path, "#") || len(path) > 8<<10 {
			return // no HTTP
		}
		for k, v := range map[string]string{"Content-Type": contentType, "Idempotency-Key": key} {
			if len(v) > 2<<10 || strings.ContainsFunc(v, func(r rune) bool { return r < ' ' || r == 0x7f }) {
				return // no HTTP
			}
			if v != "" {
				req.Header.Set(k, v)
			}
		}
		before := state()
		resp, err := d.hc.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		if resp.Header.Get("Content-Type") == "text/event-stream" {
			return // it does not end
		}
		b, err := io.ReadAll(resp.Body)
		if err == nil {
			// Of a name with a slash in it, the path is another.
			err = d.doc.Check(o.Method, strings.SplitN(req.URL.Path, "?", 2)[0], resp.StatusCode, resp.Header, b)
		}
		if err != nil || resp.StatusCode == http.StatusInternalServerError {
			t.Fatalf("%d %s: %v", resp.StatusCode, b, err)
		}
		refused := resp.StatusCode >= 400 && resp.StatusCode < 500
		if after := state(); refused && after != before {
			t.Fatalf("refused (%d %s), and done: %s, and before it %s", resp.StatusCode, b, after, before)
		}
	})
}
