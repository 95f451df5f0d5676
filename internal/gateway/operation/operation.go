// Package operation finds out what a request asks for, before it is passed on to
// a server that will read it again. Whatever two parsers could read differently
// is refused: a tool that is called here under another name than there would
// escape the decisions on it.
package operation

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"mime"
	"net/http"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/interlock-fabric/interlock/internal/gateway/config"
)

// Bounds of a message.
const (
	maxMembers = 64   // of the message, and of its params
	maxID      = 1024 // bytes of an id
	maxMethod  = 256
	maxName    = 4096 // a resource's URI may be long
)

// Operation is what one request asks for.
type Operation struct {
	// Method is the JSON-RPC method; for REST and gRPC that of A2A which it
	// stands for, and for other HTTP the method and the path. It is empty for a
	// client's answer to its server, and for a stream that asks for nothing.
	Method string
	// Name is the tool, prompt or resource of an MCP request that has one.
	Name string
	// ID is the id of a call, as JSON; nil for what is not answered.
	ID json.RawMessage
	// Task says that a tool of MCP is to be called as a task.
	Task bool
	// Renamed says that the method was named as A2A 0.3 does.
	Renamed bool
	// Arguments are the params, as they were sent.
	Arguments []byte
}

// Tool is what decisions on a tool or operation name: the tool of MCP, and the
// method of anything else that is not MCP.
func (o *Operation) Tool(p config.Protocol) string {
	switch {
	case p == config.A2A && o.Method == "SendStreamingMessage":
		return "SendMessage" // one operation, whether or not its answer is streamed
	case p != config.MCP:
		return o.Method
	case o.Method == "tools/call":
		return o.Name
	}
	return ""
}

// Label is what a configuration calls it: the tool where one is called, else the
// method.
func (o *Operation) Label(p config.Protocol) string {
	if tool := o.Tool(p); tool != "" {
		return tool
	}
	return o.Method
}

// Refusal is the error of a request that is not passed on, whoever sends it. Its
// text is fit for the caller.
type Refusal struct {
	// Status is the HTTP status, and Code the JSON-RPC error code.
	Status int
	Code   int64
	// ID is the call's, where it could be read.
	ID  json.RawMessage
	Why string
}

func (r *Refusal) Error() string { return r.Why }

// JSON-RPC error codes of refusals.
const (
	codeParse   = -32700
	codeInvalid = -32600
	codeParams  = -32602
	// codeHeaderMismatch is that of MCP 2026-07-28.
	codeHeaderMismatch = -32020
)

func refuse(code int64, format string, a ...any) *Refusal {
	return &Refusal{Status: http.StatusBadRequest, Code: code, Why: fmt.Sprintf(format, a...)}
}

// Parse reads one JSON-RPC message. A batch, a member that is there twice or in
// another case, and text that is not the same to every parser are refused. The
// error is a *Refusal.
func Parse(body []byte, protocol config.Protocol) (Operation, error) {
	var o Operation
	// Invalid UTF-8 is repaired by some parsers, each in its own way.
	if !utf8.Valid(body) {
		return o, refuse(codeParse, "the message is not UTF-8")
	}
	if b := bytes.TrimLeft(body, " \t\r\n"); len(b) > 0 && b[0] == '[' {
		return o, refuse(codeInvalid, "batches are not accepted: send one message in a request")
	}
	if !json.Valid(body) {
		return o, refuse(codeParse, "not JSON, or nested too deep")
	}
	var version, method, params, id, result, rpcError json.RawMessage
	err := members(body, func(key []byte, value json.RawMessage) error {
		switch string(key) {
		case "jsonrpc":
			version = value
		case "method":
			method = value
		case "params":
			params = value
		case "id":
			id = value
		case "result":
			result = value
		case "error":
			rpcError = value
		default:
			return otherCase(key, "jsonrpc", "method", "params", "id", "result", "error")
		}
		return nil
	})
	if err != nil {
		return o, err
	}
	if id != nil {
		if c := id[0]; c != '"' && c != '-' && (c < '0' || c > '9') || len(id) > maxID {
			return o, refuse(codeInvalid, "the id is neither a string nor a number, or too long")
		}
		o.ID = id
	}
	fail := func(r *Refusal) (Operation, error) {
		r.ID = o.ID
		return Operation{}, r
	}
	if string(version) != `"2.0"` {
		return fail(refuse(codeInvalid, "not a message of JSON-RPC 2.0"))
	}
	if method == nil {
		if o.ID == nil || (result == nil) == (rpcError == nil) {
			return fail(refuse(codeInvalid, "neither a call nor an answer"))
		}
		o.ID = nil // it is not ours to answer
		return o, nil
	}
	if result != nil || rpcError != nil {
		return fail(refuse(codeInvalid, "both a call and an answer"))
	}
	name, err := text(method, maxMethod)
	if err != nil || len(name) == 0 {
		return fail(refuse(codeInvalid, "the method is not a string that is fit for one"))
	}
	o.Method = string(name)
	if now := renamed[o.Method]; now != "" && protocol == config.A2A {
		o.Method, o.Renamed = now, true
	}
	o.Arguments = params
	if protocol != config.MCP {
		if params != nil && params[0] == '{' {
			err = members(params, func([]byte, json.RawMessage) error { return nil })
		}
	} else {
		o.Name, o.Task, err = mcpName(o.Method, params)
	}
	if r := (*Refusal)(nil); errors.As(err, &r) {
		return fail(r)
	}
	return o, nil
}

// renamed are the methods of A2A 0.3 by what A2A 1.0 calls them: many agents
// speak both, and a decision on an operation is on it in either.
var renamed = map[string]string{
	"message/send": "SendMessage", "message/stream": "SendStreamingMessage",
	"tasks/get": "GetTask", "tasks/cancel": "CancelTask", "tasks/resubscribe": "SubscribeToTask",
	"tasks/pushNotificationConfig/set":    "CreateTaskPushNotificationConfig",
	"tasks/pushNotificationConfig/get":    "GetTaskPushNotificationConfig",
	"tasks/pushNotificationConfig/list":   "ListTaskPushNotificationConfigs",
	"tasks/pushNotificationConfig/delete": "DeleteTaskPushNotificationConfig",
	"agent/getAuthenticatedExtendedCard":  "GetExtendedAgentCard",
	// Over gRPC.
	"TaskSubscription": "SubscribeToTask", "GetAgentCard": "GetExtendedAgentCard",
	"ListTaskPushNotificationConfig": "ListTaskPushNotificationConfigs",
}

// Renamed is what A2A 1.0 calls a method, whose name may be that of 0.3.
func Renamed(method string) string {
	if now := renamed[method]; now != "" {
		return now
	}
	return method
}

// CheckREST checks the body of a request that stands for an A2A method by its
// path. A message of JSON-RPC is refused: an agent may take those at any path,
// and would do what the message says, and not what the path does. The error is a
// *Refusal.
func CheckREST(body []byte) error {
	if len(body) == 0 {
		return nil
	}
	if !utf8.Valid(body) || !json.Valid(body) {
		return refuse(codeParse, "the body is not JSON")
	}
	if string(bytes.TrimSpace(body)) == "null" {
		return nil // what the Go SDK sends where there is nothing to say
	}
	return members(body, func(key []byte, _ json.RawMessage) error {
		// Some do without the version; no body of REST has a method.
		if k := string(key); strings.EqualFold(k, "jsonrpc") || strings.EqualFold(k, "method") {
			return refuse(codeInvalid, "a message of JSON-RPC at a path of REST")
		}
		return nil
	})
}

// named are the methods of MCP that name what they are about, and the member
// that does.
var named = map[string]string{"tools/call": "name", "prompts/get": "name", "resources/read": "uri"}

// mcpName returns what a request is about, and whether it is to be done as a task.
func mcpName(method string, params json.RawMessage) (name string, task bool, err error) {
	field := named[method]
	if params == nil && field == "" {
		return "", false, nil
	}
	var value json.RawMessage
	err = members(params, func(key []byte, v json.RawMessage) error {
		switch string(key) {
		case "task":
			task = method == "tools/call"
			return nil
		case "name", "uri", "arguments":
			if string(key) == field {
				value = v
			}
			return nil
		}
		return otherCase(key, "name", "uri", "arguments", "task")
	})
	if err != nil || field == "" {
		return "", false, err
	}
	b, err := text(value, maxName)
	if err != nil || len(b) == 0 {
		return "", false, refuse(codeParams, "params.%s is not a string that is fit for one", field)
	}
	return string(b), task, nil
}

// otherCase refuses a member that a parser which folds case, as that of Go does,
// takes for one of those that count.
func otherCase(key []byte, known ...string) error {
	for _, k := range known {
		if len(key) <= 3*len(k) && strings.EqualFold(string(key), k) {
			return refuse(codeInvalid, "the member %q is in another case", k)
		}
	}
	return nil
}

// members calls fn with each member of an object, which must be valid JSON.
func members(b []byte, fn func(key []byte, value json.RawMessage) error) error {
	i := space(b, 0)
	if i == len(b) || b[i] != '{' {
		return refuse(codeInvalid, "not a JSON object")
	}
	var room [8][]byte
	seen := room[:0]
	for i = space(b, i+1); b[i] != '}'; {
		end := skip(b, i)
		key, err := text(b[i:end], maxName)
		if err != nil {
			return refuse(codeInvalid, "a member's name is not plain")
		}
		if slices.ContainsFunc(seen, func(k []byte) bool { return bytes.Equal(k, key) }) {
			return refuse(codeInvalid, "a member is there twice")
		}
		if seen = append(seen, key); len(seen) > maxMembers {
			return refuse(codeInvalid, "more than %d members", maxMembers)
		}
		i = space(b, space(b, end)+1) // behind the colon
		end = skip(b, i)
		if err := fn(key, b[i:end:end]); err != nil {
			return err
		}
		if i = space(b, end); b[i] == ',' {
			i = space(b, i+1)
		}
	}
	return nil
}

func space(b []byte, i int) int {
	for i < len(b) && (b[i] == ' ' || b[i] == '\t' || b[i] == '\r' || b[i] == '\n') {
		i++
	}
	return i
}

// skip returns the end of the value that begins at i.
func skip(b []byte, i int) int {
	depth := 0
	for ; i < len(b); i++ {
		switch b[i] {
		case '"':
			for i++; b[i] != '"'; i++ {
				if b[i] == '\\' {
					i++
				}
			}
			if depth == 0 {
				return i + 1
			}
		case '{', '[':
			depth++
		case '}', ']':
			if depth == 0 {
				return i
			}
			if depth--; depth == 0 {
				return i + 1
			}
		case ',', ':', ' ', '\t', '\r', '\n':
			if depth == 0 {
				return i
			}
		}
	}
	return i
}

var errNotPlain = errors.New("not a plain string")

// text reads a JSON string that every parser reads alike.
func text(raw json.RawMessage, limit int) ([]byte, error) {
	if len(raw) < 2 || raw[0] != '"' || len(raw) > 6*limit+2 {
		return nil, errNotPlain
	}
	b := []byte(raw[1 : len(raw)-1])
	if bytes.IndexByte(b, '\\') >= 0 {
		var s string
		if json.Unmarshal(raw, &s) != nil {
			return nil, errNotPlain
		}
		b = []byte(s)
	}
	if len(b) > limit || !plain(b) {
		return nil, errNotPlain
	}
	return b, nil
}

// plain reports whether a string has neither control characters, at which some
// parsers end it, nor what stands for a surrogate without its half.
func plain(b []byte) bool {
	return !bytes.ContainsFunc(b, func(r rune) bool { return r == utf8.RuneError || unicode.IsControl(r) })
}

// firstMirrored is the first revision of MCP whose requests repeat the method
// and the name in headers.
const firstMirrored = "2026-07-28"

// MatchHeaders checks that the headers of an MCP request say the same as its
// body (MCP 2026-07-28, standard request headers): whatever stands in front of
// the server may have gone by either. The error is a *Refusal.
func (o *Operation) MatchHeaders(h http.Header) error {
	fail := func(why string) error {
		return &Refusal{Status: http.StatusBadRequest, Code: codeHeaderMismatch, ID: o.ID, Why: "header mismatch: " + why}
	}
	for _, name := range [...]string{"Mcp-Protocol-Version", "Mcp-Method", "Mcp-Name", "Mcp-Session-Id"} {
		if len(h[name]) > 1 {
			return fail(name + " is there twice")
		}
	}
	for _, v := range h["Connection"] {
		for name := range strings.SplitSeq(v, ",") {
			if name = strings.TrimSpace(name); len(name) > 4 && strings.EqualFold(name[:4], "Mcp-") {
				// Whoever passes the request on would leave it out.
				return fail("Connection names " + http.CanonicalHeaderKey(name))
			}
		}
	}
	mirrored := o.Method != "" && h.Get("Mcp-Protocol-Version") >= firstMirrored
	if m := h.Get("Mcp-Method"); m != o.Method && (m != "" || mirrored) {
		return fail("Mcp-Method is not the method of the body")
	}
	// What other methods name there is between client and server.
	if n := h.Get("Mcp-Name"); named[o.Method] != "" && (n != "" || mirrored) {
		if n != o.Name && decodeHeader(n) != o.Name {
			return fail("Mcp-Name is not the name in the body")
		}
	}
	return nil
}

// decodeHeader reads a value that does not fit in a header as it is.
func decodeHeader(s string) string {
	if in, ok := strings.CutPrefix(s, "=?base64?"); ok {
		if in, ok = strings.CutSuffix(in, "?="); ok {
			if b, err := base64.StdEncoding.DecodeString(in); err == nil {
				return string(b)
			}
		}
	}
	return s
}

// Mirrored is the operation that the headers of an MCP request name, for where
// the body is out of reach. Only since 2026-07-28 must the server hold them
// against the body, so before that there is none.
func Mirrored(h http.Header) (Operation, error) {
	var o Operation
	if h.Get("Mcp-Protocol-Version") < firstMirrored {
		return o, nil
	}
	if o.Method, o.Name = h.Get("Mcp-Method"), decodeHeader(h.Get("Mcp-Name")); o.Method == "" || named[o.Method] != "" && o.Name == "" {
		return Operation{}, &Refusal{Status: http.StatusBadRequest, Code: codeHeaderMismatch, Why: "header mismatch: Mcp-Method or Mcp-Name is missing"}
	}
	return o, o.MatchHeaders(h)
}

// JSONBody reports whether a request has a body that is to be read as JSON-RPC. A
// *Refusal says why the body could not be told to be what it is.
func JSONBody(h http.Header) (bool, error) {
	if e := h.Values("Content-Encoding"); len(e) > 1 || len(e) == 1 && !strings.EqualFold(e[0], "identity") {
		return false, &Refusal{Status: http.StatusUnsupportedMediaType, Code: codeInvalid, Why: "the body is encoded: send it as it is"}
	}
	types := h.Values("Content-Type")
	if len(types) != 1 {
		return false, nil
	}
	if types[0] == "application/json" {
		return true, nil // as nearly all are
	}
	mt, params, err := mime.ParseMediaType(types[0])
	if err != nil {
		mt = "" // what cannot be parsed, with a charset that cannot, is of no type
	}
	if cs := params["charset"]; cs != "" && !strings.EqualFold(cs, "utf-8") {
		return false, &Refusal{Status: http.StatusUnsupportedMediaType, Code: codeInvalid, Why: "the body is not UTF-8"}
	}
	return mt == "application/json" || mt == "application/a2a+json", nil
}

// GRPC reports whether a request is one of gRPC.
func GRPC(h http.Header) bool {
	ct := h.Get("Content-Type")
	rest, ok := strings.CutPrefix(ct, "application/grpc")
	return ok && (rest == "" || rest[0] == '+' || rest[0] == ';')
}

// Framed reports whether the first byte of a gRPC request can begin its first
// message. None of JSON can: an agent that does not look at the content type
// would read a message of JSON-RPC there.
func Framed(first byte) bool { return first <= 1 }

// ErrFrame is the refusal of a request whose first byte cannot.
var ErrFrame = &Refusal{Status: http.StatusBadRequest, Code: codeInvalid, Why: "the body is not one of gRPC"}

// REST is the method of A2A 1.0 that an HTTP request stands for (§11.3), by the
// end of its path: where the agent's own begins, and whether there is a tenant in
// front, only the agent knows. ok is false for one that stands for none.
func REST(method, path string) (name string, ok bool) {
	segs := strings.Split(strings.Trim(path, "/"), "/")
	for skip := range segs {
		if name := rest(method, segs[skip:]); name != "" {
			return name, true
		}
	}
	return "", false
}

func rest(method string, segs []string) string {
	last := len(segs) - 1
	// HEAD does what GET does, and is answered with less.
	switch get, post := method == http.MethodGet || method == http.MethodHead, method == http.MethodPost; {
	case last == 0 && segs[0] == "message:send" && post:
		return "SendMessage"
	case last == 0 && segs[0] == "message:stream" && post:
		return "SendStreamingMessage"
	case last == 0 && segs[0] == "extendedAgentCard" && get,
		last == 1 && segs[0] == "v1" && segs[1] == "card" && get: // A2A 0.3
		return "GetExtendedAgentCard"
	case segs[0] != "tasks":
		return ""
	case last == 0 && get:
		return "ListTasks"
	case last == 1 && strings.HasSuffix(segs[1], ":cancel") && post:
		return "CancelTask"
	case last == 1 && strings.HasSuffix(segs[1], ":subscribe") && (get || post):
		return "SubscribeToTask"
	case last == 1 && get:
		return "GetTask"
	case last < 2 || segs[2] != "pushNotificationConfigs":
		return ""
	case last == 2 && get:
		return "ListTaskPushNotificationConfigs"
	case last == 2 && post:
		return "CreateTaskPushNotificationConfig"
	case last == 3 && get:
		return "GetTaskPushNotificationConfig"
	case last == 3 && method == http.MethodDelete:
		return "DeleteTaskPushNotificationConfig"
	}
	return ""
}
