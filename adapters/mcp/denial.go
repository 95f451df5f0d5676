package mcpguard

import (
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"strings"

	"github.com/modelcontextprotocol/go-sdk/jsonrpc"

	"github.com/interlock-fabric/interlock/pkg/denial"
	"github.com/interlock-fabric/interlock/pkg/trail"
)

// JSON-RPC error codes of a denial: -31000 less the HTTP status that the same
// denial has where a status can still be sent.
const (
	// CodeUnauthorized: another credential is needed.
	CodeUnauthorized = denial.CodeUnauthorized
	// CodeForbidden: another credential would not help, now or at all.
	CodeForbidden = denial.CodeForbidden
	// CodeUnavailable: the enforcer cannot decide; try again.
	CodeUnavailable = denial.CodeUnavailable
)

// Denied is what a caller learns of a denial, as the data of the JSON-RPC error.
type Denied = denial.Data

// DeniedOf returns what a guarded server said to a Go client, if err is a
// denial.
func DeniedOf(err error) (Denied, bool) {
	var rpc *jsonrpc.Error
	if !errors.As(err, &rpc) {
		return Denied{}, false
	}
	switch rpc.Code {
	case CodeUnauthorized, CodeForbidden, CodeUnavailable:
	default:
		return Denied{}, false
	}
	var d Denied
	if json.Unmarshal(rpc.Data, &d) != nil || d.Error == "" {
		return Denied{}, false
	}
	return d, true
}

// rpcError is the answer to err inside the protocol.
func (g *Guard) rpcError(err error) error {
	a := g.resource.Answer(err)
	return &jsonrpc.Error{Code: a.Code(), Message: a.Message, Data: a.JSON()}
}

// deny answers an HTTP request. known is set once the caller's credentials have
// been verified: its request is then read as far as its id, so that its client
// can tell which call the answer is to. A stranger's is not read at all.
// e is what the trail is to say of it, beside that.
func (g *Guard) deny(w http.ResponseWriter, r *http.Request, err error, known bool, e *trail.Event) {
	e.Err, e.Took = err, e.Mark.Took()
	g.name(e, r)
	a := g.resource.Answer(err)
	var id func() json.RawMessage
	if known {
		id = func() json.RawMessage {
			c := readDenied(r)
			if c.Method != "" {
				e.Method, e.Call.Tool, e.Arguments = c.Method, "", nil
			}
			if c.Method == "tools/call" {
				e.Call.Tool, e.Arguments = c.Params.Name, c.Params.Arguments
			}
			return c.id
		}
	}
	a.Write(w, r, id)
	g.opts.Trail.Record(e)
}

// name says of an event what can be said of an HTTP request that is not read.
func (g *Guard) name(e *trail.Event, r *http.Request) {
	e.Method, e.Call, e.Traceparent = "http "+r.Method, g.connect(), r.Header.Get(headerTrace)
}

// maxDeniedBody bounds what is read of a denied request.
const maxDeniedBody = 64 << 10

// deniedCall is the JSON-RPC call in a request that is denied, with its id as it
// is to be answered; nil for none.
type deniedCall struct {
	id     json.RawMessage
	ID     any    `json:"id"`
	Method string `json:"method"`
	Params struct {
		Name      string          `json:"name"`
		Arguments json.RawMessage `json:"arguments"`
	} `json:"params"`
}

// readDenied reads the call in a request, zero where there is none.
func readDenied(r *http.Request) (c deniedCall) {
	if r.Method != http.MethodPost || r.Body == nil {
		return c
	}
	body, err := io.ReadAll(io.LimitReader(r.Body, maxDeniedBody+1))
	if err != nil || len(body) > maxDeniedBody {
		return c
	}
	// Parameters of another form are no reason to leave out the id.
	var wrong *json.UnmarshalTypeError
	if err := json.Unmarshal(body, &c); err != nil && (!errors.As(err, &wrong) || !strings.HasPrefix(wrong.Field, "params")) || c.Method == "" {
		return deniedCall{}
	}
	id, err := jsonrpc.MakeID(c.ID)
	if err != nil || !id.IsValid() {
		return c
	}
	if raw, err := json.Marshal(id.Raw()); err == nil {
		c.id = raw
	}
	return c
}
