package authority

import (
	"errors"
	"maps"
	"net/http"
	"slices"
)

// ErrUnreachable is wrapped by errors of a server that could not be reached, or
// that did not answer in time. What was asked for may or may not have happened:
// send it again with the same idempotency key.
var ErrUnreachable = errors.New("authority unreachable")

// Problem is a problem document (RFC 9457), and the error that every method
// returns for an answer that is not a success.
type Problem struct {
	// Type is one of the Problem types below.
	Type   string `json:"type"`
	Title  string `json:"title"`
	Status int    `json:"status"`
	// Detail says what is wrong with this request.
	Detail string `json:"detail,omitempty"`
	// Mend says what would make it succeed.
	Mend string `json:"mend,omitempty"`
	// Fields are the members of the request that are missing, where that is the
	// reason.
	Fields []string `json:"fields,omitempty"`
	// RetryAfter is in how many seconds it may succeed as it is; zero says
	// nothing.
	RetryAfter int `json:"retry_after,omitempty"`
}

// The types of Problem. They are stable.
const (
	// ProblemInvalid: the request is malformed, or a value in it is. 400.
	ProblemInvalid = "urn:interlock:problem:invalid-request"
	// ProblemUnaccounted: the decision must say why it is taken, and Fields has what
	// is missing: "reason", "incident". 400.
	ProblemUnaccounted = "urn:interlock:problem:unaccounted"
	// ProblemTenant: the tenant is not known, or must be named. 400.
	ProblemTenant = "urn:interlock:problem:tenant"
	// ProblemIssuer: the value needs the issuer that minted it. 400.
	ProblemIssuer = "urn:interlock:problem:issuer"
	// ProblemTerminal: what was revoked for good cannot be restored. 409.
	ProblemTerminal = "urn:interlock:problem:terminal"
	// ProblemIdempotency: the idempotency key was used for another request. 422.
	ProblemIdempotency = "urn:interlock:problem:idempotency"
	// ProblemUnauthorised: no valid token or client certificate was presented.
	// 401.
	ProblemUnauthorised = "urn:interlock:problem:unauthorised"
	// ProblemForbidden: who asks may not do that, and the mend says which role
	// may. 403.
	ProblemForbidden = "urn:interlock:problem:forbidden"
	// ProblemTwoPersons: it takes a second person; see Client.Propose. 403.
	ProblemTwoPersons = "urn:interlock:problem:two-persons"
	// ProblemNotFound: no such resource. 404.
	ProblemNotFound = "urn:interlock:problem:not-found"
	// ProblemConflict: it exists already, or another was faster. 409.
	ProblemConflict = "urn:interlock:problem:conflict"
	// ProblemQuota: the tenant's quota would be exceeded. 409.
	ProblemQuota = "urn:interlock:problem:quota"
	// ProblemTooLarge: the body is longer than MaxBody. 413.
	ProblemTooLarge = "urn:interlock:problem:too-large"
	// ProblemOverloaded: a bound of the server was reached. 429 or 503.
	ProblemOverloaded = "urn:interlock:problem:overloaded"
	// ProblemUnavailable: the authority cannot take decisions now. 503.
	ProblemUnavailable = "urn:interlock:problem:unavailable"
	// ProblemInternal: the authority failed. 500.
	ProblemInternal = "urn:interlock:problem:internal"
)

var problemTitles = map[string]struct {
	title  string
	status int
}{
	ProblemInvalid:      {"The request is not valid", http.StatusBadRequest},
	ProblemUnaccounted:  {"A decision must say why", http.StatusBadRequest},
	ProblemTenant:       {"The tenant is missing or unknown", http.StatusBadRequest},
	ProblemIssuer:       {"The issuer is missing", http.StatusBadRequest},
	ProblemTerminal:     {"Revoked for good", http.StatusConflict},
	ProblemIdempotency:  {"The idempotency key was used for another request", http.StatusUnprocessableEntity},
	ProblemUnauthorised: {"Not authorised", http.StatusUnauthorized},
	ProblemForbidden:    {"Forbidden", http.StatusForbidden},
	ProblemTwoPersons:   {"Two persons are needed", http.StatusForbidden},
	ProblemNotFound:     {"Not found", http.StatusNotFound},
	ProblemConflict:     {"Conflict", http.StatusConflict},
	ProblemQuota:        {"Quota exceeded", http.StatusConflict},
	ProblemTooLarge:     {"The request is too large", http.StatusRequestEntityTooLarge},
	ProblemOverloaded:   {"Overloaded", http.StatusTooManyRequests},
	ProblemUnavailable:  {"Unavailable", http.StatusServiceUnavailable},
	ProblemInternal:     {"Internal error", http.StatusInternalServerError},
}

// ProblemTypes returns every type of Problem, sorted.
func ProblemTypes() []string { return slices.Sorted(maps.Keys(problemTitles)) }

// NewProblem makes a problem of a type, with that type's title and status.
func NewProblem(typ, detail, mend string) *Problem {
	t, ok := problemTitles[typ]
	if !ok {
		typ, t = ProblemInternal, problemTitles[ProblemInternal]
	}
	return &Problem{Type: typ, Title: t.title, Status: t.status, Detail: detail, Mend: mend}
}

// Error is one line: what is wrong and, after it, what mends it.
func (p *Problem) Error() string {
	s := p.Detail
	if s == "" {
		s = p.Title
	}
	if p.Mend != "" {
		s += ": " + p.Mend
	}
	return s
}
