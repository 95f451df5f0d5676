package authority

import (
	"context"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"github.com/interlock-fabric/interlock/pkg/session"
)

// LoggedDecision is a decision as the log has it, with what whoever asks may see of
// its lines. The log has no values in clear: who decided, and on whom, is in the
// audit, under the same ID.
type LoggedDecision struct {
	ID     string    `json:"id"`
	Epoch  uint64    `json:"epoch"`
	Number uint64    `json:"number"`
	At     time.Time `json:"at"`
	// Key is the id of the key that signed it.
	Key   string      `json:"key"`
	Lines []EntryLine `json:"lines"`
}

// DecisionsQuery says which decisions are asked for; what is empty asks for all.
type DecisionsQuery struct {
	// Tenant asks for those on a tenant, global ones among them.
	Tenant   string
	Incident string
	// Since leaves out what was decided before.
	Since time.Time
	// Page is the Next of the page before; empty is the first.
	Page string
	// Limit is at most MaxPage; zero is DefaultPage.
	Limit int
}

func (q *DecisionsQuery) texts() map[string]*string {
	return map[string]*string{"tenant": &q.Tenant, "incident": &q.Incident, "page": &q.Page}
}

func (q *DecisionsQuery) values() url.Values {
	v := url.Values{}
	for name, s := range q.texts() {
		if *s != "" {
			v.Set(name, *s)
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

// ParseDecisionsQuery is the inverse of the client's encoding. Errors are Problems.
func ParseDecisionsQuery(v url.Values) (DecisionsQuery, error) {
	var q DecisionsQuery
	const mend = "see the API's description"
	if err := parseQuery(v, session.MaxValueLen, mend, q.texts(), &q.Since, &q.Limit); err != nil {
		return DecisionsQuery{}, err
	}
	if q.Limit < 0 || q.Limit > MaxPage {
		return DecisionsQuery{}, NewProblem(ProblemInvalid, "limit is not 1 to "+strconv.Itoa(MaxPage), mend)
	}
	return q, nil
}

// DecisionsPage is a page of the decisions of the log, the newest first. The log is
// of one epoch, and trimmed at its beginning: what was decided earlier is in the
// audit.
type DecisionsPage struct {
	Decisions []LoggedDecision `json:"decisions"`
	// Next asks for the next page; empty where there is none. A page may be short,
	// even empty, and have a next one.
	Next string `json:"next,omitempty"`
}

// Decisions returns a page of the decisions of the log.
func (c *Client) Decisions(ctx context.Context, q DecisionsQuery) (*DecisionsPage, error) {
	var out DecisionsPage
	if err := c.call(ctx, 0, http.MethodGet, "/v1/decisions?"+q.values().Encode(), nil, nil, &out); err != nil {
		return nil, err
	}
	return &out, nil
}
