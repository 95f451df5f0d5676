package mcpguard

import (
	"encoding/json"
	"errors"
	"io"
	"net/http"

	"github.com/modelcontextprotocol/go-sdk/jsonrpc"

	"github.com/interlock-fabric/interlock/pkg/denial"
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
func (g *Guard) deny(w http.ResponseWriter, r *http.Request, err error, known bool) {
	a := g.resource.Answer(err)
	var id func() json.RawMessage
	if known {
		id = func() json.RawMessage { return requestID(r) }
	}
	a.Write(w, r, id)
}

// maxDeniedBody bounds what is read of a denied request.
const maxDeniedBody = 64 << 10

// requestID returns the id of the JSON-RPC call in a request, or nil.
func requestID(r *http.Request) json.RawMessage {
	if r.Method != http.MethodPost || r.Body == nil {
		return nil
	}
	body, err := io.ReadAll(io.LimitReader(r.Body, maxDeniedBody+1))
	if err != nil || len(body) > maxDeniedBody {
		return nil
	}
	var call struct {
		ID     any    `json:"id"`
		Method string `json:"method"`
	}
	if json.Unmarshal(body, &call) != nil || call.Method == "" {
		return nil
	}
	id, err := jsonrpc.MakeID(call.ID)
	if err != nil || !id.IsValid() {
		return nil
	}
	raw, err := json.Marshal(id.Raw())
	if err != nil {
		return nil
	}
	return raw
}
