package authority

import (
	"context"
	"net/http"
	"net/url"
	"strconv"
	"time"
)

// MaxTrail bounds the records, and the sightings, of one answer.
const MaxTrail = 10_000

// TrailQuery says which records, or sightings, are asked for; what is empty asks
// for all. Values are compared as they are in the records.
type TrailQuery struct {
	Enforcer string
	Tenant   string
	User     string
	// Agent is one anywhere in the delegation chain, Session one that the call's
	// is or descends from.
	Agent   string
	Session string
	Client  string
	// The rest is of records alone.
	Tool     string
	Incident string
	Trace    string // the W3C trace id, in hex
	// Decision is "allowed", "denied" or "cut".
	Decision string
	// Since leaves out what ended before. Zero is all that is stored.
	Since time.Time
	// Limit is how many of the newest are returned; zero is 100, at most
	// MaxTrail.
	Limit int
}

func (q *TrailQuery) values() url.Values {
	v := url.Values{}
	for name, s := range map[string]string{
		"enforcer": q.Enforcer, "tenant": q.Tenant, "user": q.User, "agent": q.Agent, "session": q.Session, "client": q.Client,
		"tool": q.Tool, "incident": q.Incident, "trace": q.Trace, "decision": q.Decision,
	} {
		if s != "" {
			v.Set(name, s)
		}
	}
	if !q.Since.IsZero() {
		v.Set("since", q.Since.UTC().Format(time.RFC3339Nano))
	}
	if q.Limit != 0 {
		v.Set("limit", strconv.Itoa(q.Limit))
	}
	return v
}

// ParseTrailQuery is the inverse of the client's encoding. Errors are Problems.
func ParseTrailQuery(v url.Values) (TrailQuery, error) {
	var q TrailQuery
	texts := map[string]*string{
		"enforcer": &q.Enforcer, "tenant": &q.Tenant, "user": &q.User, "agent": &q.Agent, "session": &q.Session, "client": &q.Client,
		"tool": &q.Tool, "incident": &q.Incident, "trace": &q.Trace, "decision": &q.Decision,
	}
	const mend = "see session-authority trail --help"
	bad := func(what string) (TrailQuery, error) { return TrailQuery{}, NewProblem(ProblemInvalid, what, mend) }
	if err := parseQuery(v, 4096, mend, texts, &q.Since, &q.Limit); err != nil {
		return TrailQuery{}, err
	}
	switch {
	case q.Limit < 0 || q.Limit > MaxTrail:
		return bad("limit is not 1 to " + strconv.Itoa(MaxTrail))
	case q.Decision != "" && q.Decision != "allowed" && q.Decision != "denied" && q.Decision != "cut":
		return bad("a decision is allowed, denied or cut")
	}
	return q, nil
}

// parseQuery reads texts of at most maxLen bytes, since and limit from a query that
// may have nothing else, and nothing twice. Errors are Problems with that mend.
func parseQuery(v url.Values, maxLen int, mend string, texts map[string]*string, since *time.Time, limit *int) error {
	bad := func(what string) error { return NewProblem(ProblemInvalid, what, mend) }
	for name, values := range v {
		if len(values) != 1 || len(values[0]) > maxLen {
			return bad("a parameter is repeated, or too long")
		}
		s := values[0]
		var err error
		switch p := texts[name]; {
		case p != nil:
			*p = s
		case name == "since":
			*since, err = time.Parse(time.RFC3339Nano, s)
		case name == "limit":
			*limit, err = strconv.Atoi(s)
		default:
			return bad("an unknown parameter")
		}
		if err != nil {
			return bad(name + " is not valid")
		}
	}
	return nil
}

// Trail is what the enforcers reported, in the order in which it was stored.
type Trail struct {
	Records []TrailRecord `json:"records"`
	// More is set when older records match too, or were not looked at.
	More      bool            `json:"more"`
	Enforcers []TrailEnforcer `json:"enforcers"`
}

// TrailLink is a link of a chain. Issuer is empty where it is the caller's.
type TrailLink struct {
	Issuer string `json:"issuer,omitempty"`
	ID     string `json:"id"`
}

// TrailCaller is who called. A value of more than session.MaxReportText bytes is
// cut; see session.ReportText.
type TrailCaller struct {
	Tenant    string      `json:"tenant,omitempty"`
	Issuer    string      `json:"issuer,omitempty"`
	User      string      `json:"user,omitempty"`
	Session   string      `json:"session,omitempty"`
	Client    string      `json:"client,omitempty"`
	Actors    []TrailLink `json:"actors,omitempty"`
	Ancestors []TrailLink `json:"ancestors,omitempty"`
}

// TrailRecord is a decision, or Count of the same; see session.TrailRecord.
type TrailRecord struct {
	Enforcer    string    `json:"enforcer"`
	Boot        string    `json:"boot"`
	Report      uint64    `json:"report"`
	Decision    string    `json:"decision"`
	Error       string    `json:"error,omitempty"`
	Effect      string    `json:"effect,omitempty"`
	Reason      string    `json:"reason,omitempty"`
	Provisional bool      `json:"provisional,omitempty"`
	Count       uint64    `json:"count"`
	First       time.Time `json:"first"`
	Last        time.Time `json:"last"`
	// LatencyMillis is how long the slowest took, to decide or, when it was
	// cut, to run.
	LatencyMillis float64 `json:"latency_ms"`
	Epoch         uint64  `json:"epoch,omitempty"`
	Checked       uint64  `json:"checked,omitempty"` // newest batch surely in force
	Sequence      uint64  `json:"seq,omitempty"`     // the entry's that decided
	TrailCaller
	Token       string `json:"token,omitempty"` // its id
	Method      string `json:"method,omitempty"`
	Tool        string `json:"tool,omitempty"`
	Audience    string `json:"audience,omitempty"`
	Arguments   string `json:"arguments_digest,omitempty"`
	TraceID     string `json:"trace_id,omitempty"`
	ParentID    string `json:"parent_id,omitempty"`
	Transaction string `json:"txn,omitempty"`
	Incident    string `json:"incident,omitempty"`
	Detail      string `json:"detail,omitempty"`
}

// TrailEnforcer says how whole the trail of one enforcer is, since the authority
// started.
type TrailEnforcer struct {
	Name string `json:"name"`
	// Reports counts those that were believed, Missing those that its numbers
	// say were made and were not found here, Refused those that were not
	// believed, Again those that came twice, as after a lost connection.
	Reports uint64 `json:"reports"`
	Missing uint64 `json:"missing"`
	Refused uint64 `json:"refused"`
	Again   uint64 `json:"again"`
	// Unreadable counts, of those that were looked at, the ones that no key here
	// opens.
	Unreadable uint64 `json:"unreadable"`
	// Foreign counts, of those that were looked at, the records and sightings of
	// callers of tenants for which the enforcer is not enrolled. They are left out.
	Foreign uint64 `json:"foreign"`
	// The enforcer's own totals since its start, by its newest report, if that
	// was looked at; see session.TrailTotals.
	Calls     uint64 `json:"calls"`
	Denied    uint64 `json:"denied"`
	Sampled   uint64 `json:"sampled"`
	Dropped   uint64 `json:"dropped"`
	Folded    uint64 `json:"folded"`
	Untracked uint64 `json:"untracked"`
}

// Sightings are the callers that enforcers saw, the last seen first.
type Sightings struct {
	Seen      []Sighting      `json:"seen"`
	More      bool            `json:"more"`
	Enforcers []TrailEnforcer `json:"enforcers"`
}

// Sighting is a caller that was seen, by all enforcers together.
type Sighting struct {
	TrailCaller
	First     time.Time `json:"first"`
	Last      time.Time `json:"last"`
	Calls     uint64    `json:"calls"`
	Denied    uint64    `json:"denied"`
	Enforcers []string  `json:"enforcers"`
}

// Trail returns the newest records that match, oldest first.
func (c *Client) Trail(ctx context.Context, q TrailQuery) (*Trail, error) {
	var out Trail
	if err := c.call(ctx, 0, http.MethodGet, "/v1/trail?"+q.values().Encode(), nil, nil, &out); err != nil {
		return nil, err
	}
	return &out, nil
}

// Seen returns the callers that enforcers saw in use.
func (c *Client) Seen(ctx context.Context, q TrailQuery) (*Sightings, error) {
	var out Sightings
	if err := c.call(ctx, 0, http.MethodGet, "/v1/seen?"+q.values().Encode(), nil, nil, &out); err != nil {
		return nil, err
	}
	return &out, nil
}
