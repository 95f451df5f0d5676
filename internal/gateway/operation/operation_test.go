package operation

import (
	"bytes"
	"encoding/json"
	"errors"
	"net/http"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"github.com/interlock-fabric/interlock/internal/gateway/config"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestParse(t *testing.T) {
	tests := []struct {
		in, method, name, id string
	}{
		{`{"jsonrpc":"2.0","id":7,"method":"tools/call","params":{"name":"echo","arguments":{"name":"x","name":"y"}}}`, "tools/call", "echo", "7"},
		{`{"jsonrpc":"2.0","id":"a","method":"tools\/call","params":{"\u006eame":"ec\u0068o"}}`, "tools/call", "echo", `"a"`},
		{` {"params":{"uri":"file:///x"},"method":"resources/read","id":-1,"jsonrpc":"2.0"}` + "\n", "resources/read", "file:///x", "-1"},
		{`{"jsonrpc":"2.0","id":1,"method":"prompts/get","params":{"name":"p"}}`, "prompts/get", "p", "1"},
		{`{"jsonrpc":"2.0","id":1,"method":"tools/list"}`, "tools/list", "", "1"},
		{`{"jsonrpc":"2.0","method":"notifications/initialized"}`, "notifications/initialized", "", ""},
		{`{"jsonrpc":"2.0","id":1,"result":{"action":"accept"}}`, "", "", ""},
		{`{"jsonrpc":"2.0","id":1,"error":{"code":1,"message":"x"}}`, "", "", ""},
	}
	for _, tt := range tests {
		o, err := Parse([]byte(tt.in), config.MCP)
		if err != nil || o.Method != tt.method || o.Name != tt.name || string(o.ID) != tt.id {
			t.Errorf("%s: %+v, %v", tt.in, o, err)
		}
	}
}

// Whatever could be read differently further on is not passed on.
func TestParseRefuses(t *testing.T) {
	call := func(params string) string {
		return `{"jsonrpc":"2.0","id":7,"method":"tools/call","params":` + params + `}`
	}
	for name, in := range map[string]string{
		"empty":                      ``,
		"null":                       `null`,
		"batch":                      `[` + call(`{"name":"a"}`) + `]`,
		"batch behind space":         " \n[]",
		"byte order mark":            "\ufeff" + call(`{"name":"a"}`),
		"two messages":               call(`{"name":"a"}`) + call(`{"name":"b"}`),
		"garbage behind":             call(`{"name":"a"}`) + `x`,
		"cut off":                    call(`{"name":"a"}`)[:40],
		"method twice":               `{"jsonrpc":"2.0","id":1,"method":"ping","method":"tools/call","params":{"name":"a"}}`,
		"method twice, escaped":      `{"jsonrpc":"2.0","id":1,"method":"ping","m\u0065thod":"tools/call","params":{"name":"a"}}`,
		"method in another case":     `{"jsonrpc":"2.0","id":1,"method":"ping","Method":"tools/call","params":{"name":"a"}}`,
		"params folded beyond ASCII": `{"jsonrpc":"2.0","id":1,"method":"tools/call","param\u017f":{"name":"b"},"params":{"name":"a"}}`,
		"params twice":               `{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"a"},"params":{"name":"b"}}`,
		"name twice":                 call(`{"name":"a","name":"b"}`),
		"name twice, escaped":        call(`{"name":"a","n\u0061me":"b"}`),
		"name in another case":       call(`{"name":"a","NAME":"b"}`),
		"only in another case":       call(`{"Name":"b"}`),
		"task in another case":       call(`{"name":"a","Task":{}}`),
		"name with a NUL behind":     call(`{"name":"a","name\u0000":"b"}`),
		"NUL in the name":            call(`{"name":"a\u0000b"}`),
		"half a surrogate":           call(`{"name":"a\ud800"}`),
		"invalid UTF-8":              call("{\"name\":\"a\xff\"}"),
		"no name":                    call(`{}`),
		"empty name":                 call(`{"name":""}`),
		"name is no string":          call(`{"name":["a"]}`),
		"params is an array":         call(`["a"]`),
		"no params":                  `{"jsonrpc":"2.0","id":7,"method":"tools/call"}`,
		"params is null":             call(`null`),
		"method is no string":        `{"jsonrpc":"2.0","id":7,"method":["tools/call"]}`,
		"method is empty":            `{"jsonrpc":"2.0","id":7,"method":""}`,
		"no version":                 `{"id":7,"method":"ping"}`,
		"another version":            `{"jsonrpc":"1.0","id":7,"method":"ping"}`,
		"call and answer":            `{"jsonrpc":"2.0","id":7,"method":"ping","result":{}}`,
		"neither":                    `{"jsonrpc":"2.0","id":7}`,
		"null id":                    `{"jsonrpc":"2.0","id":null,"method":"ping"}`,
		"id is an object":            `{"jsonrpc":"2.0","id":{},"method":"ping"}`,
		"long id":                    `{"jsonrpc":"2.0","id":"` + strings.Repeat("a", maxID) + `","method":"ping"}`,
		"many members":               `{"jsonrpc":"2.0"` + strings.Repeat(`,"a":1`, 100) + `}`,
		"deep":                       call(`{"name":"a","arguments":` + strings.Repeat("[", 1<<20)),
		"long method":                `{"jsonrpc":"2.0","id":7,"method":"` + strings.Repeat("a", maxMethod+1) + `"}`,
	} {
		o, err := Parse([]byte(in), config.MCP)
		var r *Refusal
		if !errors.As(err, &r) || r.Status != http.StatusBadRequest || r.Why == "" || o.Method != "" {
			t.Errorf("%s: %+v, %v", name, o, err)
		}
	}
}

func TestMatchHeaders(t *testing.T) {
	call := Operation{Method: "tools/call", Name: "echo"}
	odd := Operation{Method: "tools/call", Name: "écho"}
	list := Operation{Method: "tools/list"}
	tests := []struct {
		name string
		o    Operation
		h    http.Header
		ok   bool
	}{
		{"legacy without", call, http.Header{}, true},
		{"legacy with", call, http.Header{"Mcp-Method": {"tools/call"}, "Mcp-Name": {"echo"}}, true},
		{"legacy with another", call, http.Header{"Mcp-Method": {"tools/list"}}, false},
		{"both", call, http.Header{"Mcp-Protocol-Version": {"2026-07-28"}, "Mcp-Method": {"tools/call"}, "Mcp-Name": {"echo"}}, true},
		{"encoded", odd, http.Header{"Mcp-Protocol-Version": {"2026-07-28"}, "Mcp-Method": {"tools/call"}, "Mcp-Name": {"=?base64?w6ljaG8=?="}}, true},
		{"list", list, http.Header{"Mcp-Protocol-Version": {"2026-07-28"}, "Mcp-Method": {"tools/list"}}, true},
		{"no method", call, http.Header{"Mcp-Protocol-Version": {"2026-07-28"}, "Mcp-Name": {"echo"}}, false},
		{"no name", call, http.Header{"Mcp-Protocol-Version": {"2026-07-28"}, "Mcp-Method": {"tools/call"}}, false},
		{"another name", call, http.Header{"Mcp-Protocol-Version": {"2026-07-28"}, "Mcp-Method": {"tools/call"}, "Mcp-Name": {"other"}}, false},
		{"another method", call, http.Header{"Mcp-Protocol-Version": {"2026-07-28"}, "Mcp-Method": {"tools/list"}, "Mcp-Name": {"echo"}}, false},
		{"another case", call, http.Header{"Mcp-Protocol-Version": {"2026-07-28"}, "Mcp-Method": {"Tools/call"}, "Mcp-Name": {"echo"}}, false},
		{"an extension's name", Operation{Method: "tasks/get"}, http.Header{"Mcp-Protocol-Version": {"2026-07-28"}, "Mcp-Method": {"tasks/get"}, "Mcp-Name": {"t1"}}, true},
		{"two names", call, http.Header{"Mcp-Method": {"tools/call"}, "Mcp-Name": {"echo", "other"}}, false},
		{"two sessions", call, http.Header{"Mcp-Session-Id": {"a", "b"}}, false},
	}
	for _, tt := range tests {
		if err := tt.o.MatchHeaders(tt.h); (err == nil) != tt.ok {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
}

func TestREST(t *testing.T) {
	for in, want := range map[string]string{
		"POST /message:send": "SendMessage", "POST /acme/message:stream": "SendStreamingMessage",
		"GET /tasks": "ListTasks", "GET /tasks/t1": "GetTask", "POST /tasks/t1:cancel": "CancelTask", "POST /tasks/t1:subscribe": "SubscribeToTask",
		"GET /tasks/t1/pushNotificationConfigs": "ListTaskPushNotificationConfigs", "DELETE /tasks/t1/pushNotificationConfigs/c": "DeleteTaskPushNotificationConfig",
		"GET /extendedAgentCard": "GetExtendedAgentCard", "GET /acme/v1/card": "GetExtendedAgentCard", "GET /card": "",
		"HEAD /tasks/t1": "GetTask", "HEAD /tasks/t1:subscribe": "SubscribeToTask", "HEAD /acme/tasks/t1/pushNotificationConfigs": "ListTaskPushNotificationConfigs", "HEAD /message:send": "", "GET /message:send": "", "POST /tasks/t1": "", "GET /": "", "GET /a/b/tasks": "ListTasks", "POST /a/b/c/v1/message:send": "SendMessage",
	} {
		method, path, _ := strings.Cut(in, " ")
		if got, ok := REST(method, path); got != want || ok != (want != "") {
			t.Errorf("%s: %q", in, got)
		}
	}
}

func TestRESTBody(t *testing.T) {
	for in, ok := range map[string]bool{
		``: true, `{}`: true, "null\n": true, `{"message":{"jsonrpc":"2.0"}}`: true,
		`{"jsonrpc":"2.0","method":"SendMessage","id":1}`: false, `{"JSONRPC":"2.0"}`: false, `{"json\u0072pc":"2.0"}`: false,
		`[{"jsonrpc":"2.0"}]`: false, `{"a":1,"a":2}`: false, `x`: false, "{\"a\":\"\xff\"}": false,
	} {
		if err := CheckREST([]byte(in)); (err == nil) != ok {
			t.Errorf("%s: %v", in, err)
		}
	}
}

// An operation of A2A has one name, whichever version it comes by.
func TestA2AVersions(t *testing.T) {
	for old, now := range renamed {
		o, err := Parse([]byte(`{"jsonrpc":"2.0","id":1,"method":"`+old+`","params":{}}`), config.A2A)
		if err != nil || o.Method != now {
			t.Errorf("%s: %+v, %v", old, o, err)
		}
	}
}

// FuzzParse holds what is let through against the parser of the Go SDK's kind,
// one that goes by the exact name and takes the last, and one that folds case:
// all must see the same call.
func FuzzParse(f *testing.F) {
	f.Add([]byte(`{"jsonrpc":"2.0","id":7,"method":"tools/call","params":{"name":"echo","arguments":{}}}`))
	f.Add([]byte(`{"jsonrpc":"2.0","id":"a","method":"tools/call","params":{"name":"a","NAME":"b"}}`))
	f.Add([]byte(`{"jsonrpc":"2.0","method":"ping","m\u0065thod":"tools/call"}`))
	f.Add([]byte(`[{"jsonrpc":"2.0","id":1,"result":{}}]`))
	f.Fuzz(func(t *testing.T, body []byte) {
		o, err := Parse(body, config.MCP)
		if err != nil {
			var r *Refusal
			if !errors.As(err, &r) || r.Why == "" || r.ID != nil && !json.Valid(r.ID) {
				t.Fatal(err)
			}
			return
		}
		var folding struct {
			ID     json.RawMessage `json:"id"`
			Method string          `json:"method"`
			Params json.RawMessage `json:"params"`
		}
		if err := json.Unmarshal(body, &folding); err != nil {
			t.Fatalf("let through what is no JSON: %v", err)
		}
		var exact map[string]json.RawMessage
		if err := json.Unmarshal(body, &exact); err != nil {
			t.Fatal(err)
		}
		var method string
		if exact["method"] != nil && json.Unmarshal(exact["method"], &method) != nil || method != o.Method || folding.Method != o.Method {
			t.Fatalf("%q is %q to one that folds and %q to one that does not", o.Method, folding.Method, method)
		}
		if o.Method != "" && !bytes.Equal(o.ID, exact["id"]) {
			t.Fatalf("id %s, %s", o.ID, exact["id"])
		}
		if field := named[o.Method]; field != "" {
			var fold struct{ Name, URI string }
			if err := json.Unmarshal(folding.Params, &fold); err != nil {
				return // a field of ours that it does not read
			}
			if got := map[string]string{"name": fold.Name, "uri": fold.URI}[field]; got != o.Name {
				t.Fatalf("name %q, %q", o.Name, got)
			}
		}
	})
}

func BenchmarkParse(b *testing.B) {
	body := []byte(`{"jsonrpc":"2.0","id":7,"method":"tools/call","params":{"name":"echo","arguments":{"text":"hello"},"_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28"}}}`)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := Parse(body, config.MCP); err != nil {
			b.Fatal(err)
		}
	}
}
