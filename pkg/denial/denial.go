// Package denial puts a denial into the words of HTTP and JSON-RPC, the same for
// every host: the status, the challenge, and the error object.
//
//	no credentials                401  Bearer resource_metadata, scope
//	invalid, expired, revoked,
//	or not registered             401  Bearer error="invalid_token"
//	step-up                       401  Bearer error="insufficient_user_authentication" (RFC 9470)
//	scope missing, reduced rights 403  Bearer error="insufficient_scope"
//	suspended                     403  Retry-After
//	revoked tool or audience      403  (another token would not help)
//	stale, overloaded, closed     503  Retry-After: the enforcer's trouble, not the caller's
//
// Nothing of a token, and nothing of an error that is not one of package
// session's, reaches the caller.
package denial

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/interlock-fabric/interlock/pkg/session"
)

// JSON-RPC error codes of a denial: -31000 less the HTTP status that the same
// denial has where a status can still be sent. They lie outside the ranges that
// JSON-RPC, MCP and A2A reserve.
const (
	// CodeUnauthorized: another credential is needed.
	CodeUnauthorized int64 = -31401
	// CodeForbidden: another credential would not help, now or at all.
	CodeForbidden int64 = -31403
	// CodeUnavailable: the enforcer cannot decide; try again.
	CodeUnavailable int64 = -31503
)

// ErrScope: the caller lacks a scope that the host requires. It wraps
// session.ErrDenied.
var ErrScope = fmt.Errorf("%w: insufficient scope", session.ErrDenied)

// Data is what a caller learns of a denial, as the data of the JSON-RPC error.
type Data struct {
	// Error is "revoked", "suspended", "step_up", "reduced", "stale",
	// "expired", "unregistered", "digest", "no_identity", "insufficient_scope", "overloaded", "closed" or
	// "denied".
	Error string `json:"error"`
	// Reason, Incident and Seq are those of the decision, where one is the
	// cause.
	Reason   string `json:"reason,omitempty"`
	Incident string `json:"incident,omitempty"`
	Seq      uint64 `json:"seq,omitempty"`
}

// Resource is what a host says of itself in its answers. The zero value is
// useful.
type Resource struct {
	// Metadata is the URL of the protected resource metadata (RFC 9728), named
	// in every challenge.
	Metadata string
	// Scopes are those that a caller must hold, named in every challenge.
	Scopes []string
	// RetryAfter is what a suspended caller is told to wait when the suspension
	// has no end; zero is 30 s.
	RetryAfter time.Duration
}

// Validate reports whether the resource fits in a challenge. The error wraps
// session.ErrInvalid.
func (r *Resource) Validate() error {
	for _, s := range append([]string{r.Metadata}, r.Scopes...) {
		if strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r == '"' || r == '\\' || r > '~' }) {
			return fmt.Errorf("%w: %q does not fit in a challenge", session.ErrInvalid, s)
		}
	}
	return nil
}

// Answer is one denial in every form that a host can send.
type Answer struct {
	// Status is the HTTP status: 401, 403 or 503.
	Status int
	// RetryAfter is how long to wait; zero says nothing of it.
	RetryAfter time.Duration
	// Message is what, why, and which incident, in one line.
	Message string
	Data    Data

	resource  *Resource
	challenge string // the error code of the WWW-Authenticate header
	acr       string
	more      challenger
}

// challenger is an error whose answer has headers of its own, such as another
// challenge: credential.ProofError is one.
type challenger interface{ Challenge(http.Header) }

// staleRetry is how long to wait for an enforcer to catch up.
const staleRetry = 5 * time.Second

// Answer translates an error. Whatever it is, nil included, the answer is a
// denial.
func (r *Resource) Answer(err error) Answer {
	a := Answer{Status: http.StatusServiceUnavailable, RetryAfter: staleRetry, Message: session.ErrDenied.Error(), resource: r}
	a.Data.Error = "denied"
	_ = errors.As(err, &a.more)
	var d *session.DeniedError
	if errors.As(err, &d) {
		a.Message = d.Error()
		if d.Effect != 0 {
			a.Data.Reason, a.Data.Incident, a.Data.Seq = d.Reason.String(), d.Incident, d.Seq
		}
	} else {
		d = &session.DeniedError{}
	}
	set := func(status int, word, challenge string, retry time.Duration) {
		a.Status, a.Data.Error, a.challenge, a.RetryAfter = status, word, challenge, retry
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
		retry := r.RetryAfter
		if retry <= 0 {
			retry = 30 * time.Second
		}
		if d.Until != 0 {
			retry = min(max(time.Until(d.Until.Time()), time.Second), time.Hour)
		}
		set(http.StatusForbidden, "suspended", "", retry)
	case errors.Is(err, session.ErrStepUp):
		set(http.StatusUnauthorized, "step_up", "insufficient_user_authentication", 0)
		a.acr = d.ACR
	case errors.Is(err, session.ErrReduced):
		set(http.StatusForbidden, "reduced", "insufficient_scope", 0)
	case errors.Is(err, ErrScope):
		set(http.StatusForbidden, "insufficient_scope", "insufficient_scope", 0)
	case errors.Is(err, session.ErrExpired):
		set(http.StatusUnauthorized, "expired", "invalid_token", 0)
	case errors.Is(err, session.ErrUnregistered):
		// A token of a session that is registered would do.
		set(http.StatusUnauthorized, "unregistered", "invalid_token", 0)
	case errors.Is(err, session.ErrDigest):
		// A token for code that is registered would do.
		set(http.StatusUnauthorized, "digest", "invalid_token", 0)
	case errors.Is(err, session.ErrNoIdentity):
		set(http.StatusUnauthorized, "no_identity", "invalid_token", 0)
	case errors.Is(err, session.ErrOverloaded):
		set(http.StatusServiceUnavailable, "overloaded", "", staleRetry)
	case errors.Is(err, session.ErrClosed):
		set(http.StatusServiceUnavailable, "closed", "", staleRetry)
	}
	switch {
	case a.Data.Error == "denied":
		// Nobody knows what such an error says.
		a.Message = session.ErrDenied.Error()
	case a.Message == session.ErrDenied.Error():
		// Not a DeniedError, but one of a kind that is fit for the caller.
		a.Message = err.Error()
	}
	return a
}

// Code is the JSON-RPC error code.
func (a *Answer) Code() int64 { return -31000 - int64(a.Status) }

// JSON returns Data as JSON.
func (a *Answer) JSON() json.RawMessage {
	b, err := json.Marshal(a.Data)
	if err != nil { // strings and a number
		return nil
	}
	return b
}

// Response returns the denial as a JSON-RPC response without a line break at its
// end. id is the call's, as JSON; without one it is left out.
func (a *Answer) Response(id json.RawMessage) []byte {
	type rpcError struct {
		Code    int64           `json:"code"`
		Message string          `json:"message"`
		Data    json.RawMessage `json:"data,omitempty"`
	}
	b, err := json.Marshal(struct {
		Version string          `json:"jsonrpc"`
		ID      json.RawMessage `json:"id,omitempty"`
		Error   rpcError        `json:"error"`
	}{"2.0", id, rpcError{a.Code(), a.Message, a.JSON()}})
	if err != nil {
		return a.Response(nil) // the id is not JSON
	}
	return b
}

// Header sets the challenge, Retry-After and Cache-Control. credentials is
// whether the request carried any: one without gets no error code (RFC 6750
// §3.1).
func (a *Answer) Header(h http.Header, credentials bool) {
	if c := a.Challenge(credentials); c != "" {
		h.Set("WWW-Authenticate", c)
	}
	if a.RetryAfter > 0 {
		h.Set("Retry-After", strconv.Itoa(int(math.Ceil(a.RetryAfter.Seconds()))))
	}
	if a.more != nil {
		a.more.Challenge(h)
	}
	h.Set("Cache-Control", "no-store")
}

// Challenge is the value of WWW-Authenticate (RFC 6750 §3, RFC 9470 §3, RFC 9728
// §5.1), empty where another credential would not help.
func (a *Answer) Challenge(credentials bool) string {
	if a.challenge == "" {
		return ""
	}
	var params []string
	add := func(name, value string) {
		if value != "" {
			params = append(params, name+`="`+quotable(value)+`"`)
		}
	}
	if credentials {
		add("error", a.challenge)
		add("error_description", a.Message)
	}
	if a.Data.Error == "step_up" {
		add("acr_values", a.acr)
		// What counts is a login after the decision, which only a new one is
		// certain to be.
		add("max_age", "0")
	}
	add("scope", strings.Join(a.resource.Scopes, " "))
	add("resource_metadata", a.resource.Metadata)
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

// readTime bounds how long a denied caller's request is read on.
const readTime = 500 * time.Millisecond

// Write answers an HTTP request with a JSON-RPC error. id, which may be nil, is
// called as WriteBody calls its body; it returns the call's id, or nil, and may
// read the request.
func (a *Answer) Write(w http.ResponseWriter, r *http.Request, id func() json.RawMessage) {
	a.WriteBody(w, r, func(readable bool) []byte {
		var call json.RawMessage
		if id != nil && readable {
			call = id()
		}
		return a.Response(call)
	})
}

// WriteBody answers an HTTP request with JSON of another form. The server reads on
// to the end of a request before it answers, and a caller that is denied must not
// hold a goroutine for as long as it likes: reading ends after half a second. body
// is called after that has been arranged, and may read the request if it could be.
func (a *Answer) WriteBody(w http.ResponseWriter, r *http.Request, body func(readable bool) []byte) {
	h := w.Header()
	a.Header(h, len(r.Header.Values("Authorization")) > 0)
	h.Set("Content-Type", "application/json")
	bounded := http.NewResponseController(w).SetReadDeadline(time.Now().Add(readTime)) == nil
	out := body(bounded)
	w.WriteHeader(a.Status)
	_, _ = w.Write(append(out, '\n')) // a client that has gone needs no answer
}
