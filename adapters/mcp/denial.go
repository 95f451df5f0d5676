package mcpguard

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/modelcontextprotocol/go-sdk/jsonrpc"

	"github.com/interlock-fabric/interlock/pkg/session"
)

// JSON-RPC error codes of a denial: -31000 less the HTTP status that the same
// denial has where a status can still be sent.
const (
	// CodeUnauthorized: another credential is needed.
	CodeUnauthorized int64 = -31401
	// CodeForbidden: another credential would not help, now or at all.
	CodeForbidden int64 = -31403
	// CodeUnavailable: the enforcer cannot decide; try again.
	CodeUnavailable int64 = -31503
)

// Denied is what a caller learns of a denial, as the data of the JSON-RPC error.
type Denied struct {
	// Error is "revoked", "suspended", "step_up", "reduced", "stale",
	// "expired", "no_identity", "insufficient_scope", "overloaded", "closed" or
	// "denied".
	Error string `json:"error"`
	// Reason, Incident and Seq are those of the decision, where one is the
	// cause.
	Reason   string `json:"reason,omitempty"`
	Incident string `json:"incident,omitempty"`
	Seq      uint64 `json:"seq,omitempty"`
}

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

// answer is one denial in every form that a host can send.
type answer struct {
	status     int
	challenge  string // the error code of the WWW-Authenticate header
	acr        string
	retryAfter time.Duration
	message    string
	data       Denied
}

// errScope is the guard's own: the caller lacks a scope that the host requires.
var errScope = fmt.Errorf("%w: insufficient scope", session.ErrDenied)

// answerTo translates an error. Whatever it is, the answer is a denial.
func (g *Guard) answerTo(err error) answer {
	a := answer{status: http.StatusServiceUnavailable, retryAfter: staleRetry, message: session.ErrDenied.Error()}
	a.data.Error = "denied"
	var d *session.DeniedError
	if errors.As(err, &d) {
		a.message = d.Error()
		if d.Effect != 0 {
			a.data.Reason, a.data.Incident, a.data.Seq = d.Reason.String(), d.Incident, d.Seq
		}
	} else {
		d = &session.DeniedError{}
	}
	set := func(status int, word, challenge string, retry time.Duration) {
		a.status, a.data.Error, a.challenge, a.retryAfter = status, word, challenge, retry
	}
	// Stale is first: a verifier that has no fresh keys cannot tell whether the
	// token is good, and must not send its bearer away for another.
	switch {
	case errors.Is(err, session.ErrStale):
		set(http.StatusServiceUnavailable, "stale", "", staleRetry)
	case errors.Is(err, session.ErrRevoked) && d.Shape.PerCall():
		set(http.StatusForbidden, "revoked", "", 0)
	case errors.Is(err, session.ErrRevoked):
		set(http.StatusUnauthorized, "revoked", "invalid_token", 0)
	case errors.Is(err, session.ErrSuspended):
		retry := g.opts.RetryAfter
		if d.Until != 0 {
			retry = min(max(time.Until(d.Until.Time()), time.Second), time.Hour)
		}
		set(http.StatusForbidden, "suspended", "", retry)
	case errors.Is(err, session.ErrStepUp):
		set(http.StatusUnauthorized, "step_up", "insufficient_user_authentication", 0)
		a.acr = d.ACR
	case errors.Is(err, session.ErrReduced):
		set(http.StatusForbidden, "reduced", "insufficient_scope", 0)
	case errors.Is(err, errScope):
		set(http.StatusForbidden, "insufficient_scope", "insufficient_scope", 0)
	case errors.Is(err, session.ErrExpired):
		set(http.StatusUnauthorized, "expired", "invalid_token", 0)
	case errors.Is(err, session.ErrNoIdentity):
		set(http.StatusUnauthorized, "no_identity", "invalid_token", 0)
	case errors.Is(err, session.ErrOverloaded):
		set(http.StatusServiceUnavailable, "overloaded", "", staleRetry)
	case errors.Is(err, session.ErrClosed):
		set(http.StatusServiceUnavailable, "closed", "", staleRetry)
	}
	switch {
	case a.data.Error == "denied":
		// Nobody knows what such an error says.
		a.message = session.ErrDenied.Error()
	case a.message == session.ErrDenied.Error():
		// Not a DeniedError, but one of a kind that is fit for the caller.
		a.message = err.Error()
	}
	return a
}

// staleRetry is how long to wait for an enforcer to catch up.
const staleRetry = 5 * time.Second

// rpc returns the denial as the answer of a JSON-RPC call.
func (a *answer) rpc() *jsonrpc.Error {
	data, err := json.Marshal(a.data)
	if err != nil { // strings and a number
		data = nil
	}
	return &jsonrpc.Error{Code: -31000 - int64(a.status), Message: a.message, Data: data}
}

// rpcError is the answer to err inside the protocol.
func (g *Guard) rpcError(err error) error {
	a := g.answerTo(err)
	return a.rpc()
}

// deny answers an HTTP request. known is set once the caller's credentials have
// been verified: its request is then read as far as its id, so that its client
// can tell which call the answer is to. A stranger's is not read at all.
func (g *Guard) deny(w http.ResponseWriter, r *http.Request, err error, known bool) {
	a := g.answerTo(err)
	h := w.Header()
	if a.challenge != "" {
		h.Set("WWW-Authenticate", g.challenge(&a, len(r.Header.Values("Authorization")) > 0))
	}
	if a.retryAfter > 0 {
		h.Set("Retry-After", strconv.Itoa(int(math.Ceil(a.retryAfter.Seconds()))))
	}
	h.Set("Cache-Control", "no-store")
	h.Set("Content-Type", "application/json")
	body := struct {
		Version string          `json:"jsonrpc"`
		ID      json.RawMessage `json:"id,omitempty"`
		Error   *jsonrpc.Error  `json:"error"`
	}{Version: "2.0", Error: a.rpc()}
	// The server reads on to the end of a request before it answers, and a
	// caller that is denied must not hold a goroutine for as long as it likes.
	bounded := http.NewResponseController(w).SetReadDeadline(time.Now().Add(deniedBodyTime)) == nil
	if known && bounded {
		body.ID = requestID(r)
	}
	out, err := json.Marshal(body)
	if err != nil {
		out = nil
	}
	w.WriteHeader(a.status)
	_, _ = w.Write(append(out, '\n')) // a client that has gone needs no answer
}

// challenge is the value of WWW-Authenticate (RFC 6750 §3, RFC 9470 §3, RFC
// 9728 §5.1). A request without credentials gets no error code (RFC 6750 §3.1).
func (g *Guard) challenge(a *answer, credentials bool) string {
	var params []string
	add := func(name, value string) {
		if value != "" {
			params = append(params, name+`="`+quotable(value)+`"`)
		}
	}
	if credentials {
		add("error", a.challenge)
		add("error_description", a.message)
	}
	if a.data.Error == "step_up" {
		add("acr_values", a.acr)
		// What counts is a login after the decision, which only a new one is
		// certain to be.
		add("max_age", "0")
	}
	add("scope", strings.Join(g.opts.Scopes, " "))
	add("resource_metadata", g.opts.ResourceMetadata)
	if len(params) == 0 {
		return "Bearer"
	}
	return "Bearer " + strings.Join(params, ", ")
}

// quotable keeps to the characters of RFC 6750 §3.
func quotable(s string) string {
	if len(s) > 256 {
		s = s[:256]
	}
	return strings.Map(func(r rune) rune {
		switch {
		case r == '"' || r == '\\':
			return '\''
		case r < ' ' || r > '~':
			return ' '
		}
		return r
	}, s)
}

// Bounds of what is read of a denied request.
const (
	maxDeniedBody  = 64 << 10
	deniedBodyTime = 500 * time.Millisecond
)

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
