package a2aguard

import (
	"context"
	"encoding/json"
	"io"
	"net/http"
	"time"

	"github.com/a2aproject/a2a-go/v2/a2a"
	"github.com/a2aproject/a2a-go/v2/errordetails"

	"github.com/interlock-fabric/interlock/pkg/denial"
	"github.com/interlock-fabric/interlock/pkg/guard"
	"github.com/interlock-fabric/interlock/pkg/trail"
)

// JSONRPC checks every HTTP request before next sees it, which must be, or lead
// to, the SDK's JSON-RPC handler of what NewHandler made.
func (g *Guard) JSONRPC(next http.Handler) http.Handler {
	return g.front(next, false, JSONRPCError)
}

// JSONRPCError is what a denied caller is answered over JSON-RPC. id is the
// call's, as JSON, or nil.
func JSONRPCError(a *denial.Answer, id json.RawMessage) []byte {
	if id == nil {
		id = json.RawMessage("null")
	}
	return marshal(map[string]any{"jsonrpc": "2.0", "id": id, "error": map[string]any{
		"code": a.Code(), "message": a.Message, "data": []any{errorInfo(a)},
	}})
}

// REST checks every HTTP request before next sees it, which must be, or lead to,
// the SDK's REST handler of what NewHandler made.
func (g *Guard) REST(next http.Handler) http.Handler {
	return g.front(next, true, func(a *denial.Answer, _ json.RawMessage) []byte { return RESTError(a) })
}

// RESTError is what a denied caller is answered over REST.
func RESTError(a *denial.Answer) []byte {
	status := "UNAVAILABLE"
	switch a.Status {
	case http.StatusUnauthorized:
		status = "UNAUTHENTICATED"
	case http.StatusForbidden:
		status = "PERMISSION_DENIED"
	}
	return marshal(map[string]any{"error": map[string]any{
		"code": a.Status, "status": status, "message": a.Message, "details": []any{errorInfo(a)},
	}})
}

func errorInfo(a *denial.Answer) *errordetails.Typed {
	return errordetails.NewErrorInfo(reason(a), a2a.ProtocolDomain, metadataOf(a))
}

func marshal(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		return nil // strings and a number
	}
	return b
}

// connection is what a stream may do about a client that does not read.
type connection struct {
	// cut gives up on it once what was cut had time to reach it.
	cut func()
	// header is that of the answer, where the status of the answer tells of a
	// denial; only for operations that have not begun to answer.
	header http.Header
}

type connectionKey struct{}

func (g *Guard) front(next http.Handler, status bool, body func(*denial.Answer, json.RawMessage) []byte) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		e := trail.Event{Mark: g.opts.Trail.Start(), Method: "http " + r.Method, Call: g.connect(), Traceparent: r.Header.Get("Traceparent")}
		p, known, err := g.admit(r, e.Call)
		if err != nil {
			e.Caller, e.Err, e.Took = p, err, e.Mark.Took()
			a := g.resource.Answer(err)
			a.Header(w.Header(), len(r.Header.Values("Authorization")) > 0)
			w.Header().Set("Content-Type", "application/json")
			id, method := requestID(w, r, known)
			switch {
			case method != "":
				e.Method = method
			case known && status: // REST: the path is the operation
				e.Method = r.Method + " " + r.URL.Path
			}
			g.opts.Trail.Record(&e)
			w.WriteHeader(a.Status)
			_, _ = w.Write(append(body(&a, id), '\n')) // a client that has gone needs no answer
			return
		}
		rc := http.NewResponseController(w)
		conn := &connection{cut: func() {
			_ = rc.SetWriteDeadline(time.Now().Add(g.opts.FlushTimeout)) // where there is none, the client's own pace
		}}
		if status {
			conn.header = w.Header()
		}
		next.ServeHTTP(w, r.WithContext(context.WithValue(guard.NewContext(r.Context(), p), connectionKey{}, conn)))
	})
}

// Bounds of what is read of a denied request.
const (
	maxDeniedBody  = 64 << 10
	deniedBodyTime = 500 * time.Millisecond
)

// requestID returns the id and the method of the JSON-RPC call in a request whose
// caller is known, or nothing. The server reads on to the end of a request before it answers,
// and a caller that is denied must not hold a goroutine for as long as it likes,
// so that reading ends soon in any case.
func requestID(w http.ResponseWriter, r *http.Request, known bool) (id json.RawMessage, method string) {
	bounded := http.NewResponseController(w).SetReadDeadline(time.Now().Add(deniedBodyTime)) == nil
	if !known || !bounded || r.Method != http.MethodPost || r.Body == nil {
		return nil, ""
	}
	raw, err := io.ReadAll(io.LimitReader(r.Body, maxDeniedBody+1))
	if err != nil || len(raw) > maxDeniedBody {
		return nil, ""
	}
	var call struct {
		Version string          `json:"jsonrpc"`
		ID      json.RawMessage `json:"id"`
		Method  string          `json:"method"`
	}
	if json.Unmarshal(raw, &call) != nil || call.Version == "" || len(call.ID) == 0 {
		return nil, ""
	}
	if c := call.ID[0]; c != '"' && c != '-' && (c < '0' || c > '9') {
		return nil, "" // JSON-RPC has strings and numbers
	}
	return call.ID, call.Method
}
