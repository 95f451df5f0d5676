package authority

import (
	"context"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/interlock-fabric/interlock/pkg/session"
)

// Bounds of the registry's requests and answers. What bounds each field is in
// docs/registry.md.
const (
	// MaxSessions bounds the sessions of one request.
	MaxSessions = 1000
	// MaxPage bounds the records of one page; DefaultPage is how many there are
	// where no limit is given.
	MaxPage     = 1000
	DefaultPage = 100
	// MaxTerms bounds the terms of one query.
	MaxTerms = 8
	// maxRegistryText bounds a text of a query, and a term's value, in bytes.
	maxRegistryText = session.MaxValueLen
)

// Agent is an agent as it is registered.
type Agent struct {
	// Tenant may be left out where there is one.
	Tenant string `json:"tenant,omitempty"`
	// ID is a DID, a SPIFFE id or another URI, or a name that Issuer minted, which
	// may be left out where the authority has a default.
	Issuer string `json:"issuer,omitempty"`
	ID     string `json:"id"`
	// Owner answers for it.
	Owner       string `json:"owner,omitempty"`
	Purpose     string `json:"purpose,omitempty"`
	Environment string `json:"environment,omitempty"`
	// Blueprint is what it was made from.
	Blueprint    string   `json:"blueprint,omitempty"`
	Capabilities []string `json:"capabilities,omitempty"`
	// Digests are of its code, models and images, as in "code:sha256:…".
	Digests []string `json:"digests,omitempty"`
}

// AgentRequest registers an agent.
type AgentRequest struct {
	Agent
	// Revision is that of the record in whose place this one is put; zero
	// registers an agent that is new.
	Revision uint64 `json:"revision,omitempty"`
}

// The states of an agent.
const (
	AgentRegistered     = "registered"
	AgentActive         = "active"
	AgentSuspended      = "suspended"
	AgentDecommissioned = "decommissioned"
)

// AgentRecord is an agent with what the registry, or the enforcers, know of it.
type AgentRecord struct {
	Agent
	// Registered is false for one that enforcers saw, and nobody registered. The
	// rest up to Revision is of those that are, and the rest behind it of those
	// that are not.
	Registered bool      `json:"registered"`
	State      string    `json:"state,omitempty"`
	Since      time.Time `json:"since,omitzero"` // of State
	At         time.Time `json:"at,omitzero"`    // of registration
	Revision   uint64    `json:"revision,omitempty"`
	// Sessions are the live ones that have it in their chains, in an answer about
	// this agent alone.
	Sessions int `json:"sessions,omitempty"`

	FirstSeen time.Time `json:"first_seen,omitzero"`
	LastSeen  time.Time `json:"last_seen,omitzero"`
	Enforcers []string  `json:"enforcers,omitempty"`
}

// Lifecycle is what is done with an agent.
type Lifecycle string

// The ways of an agent's life. Suspending and decommissioning it deny it
// everywhere, as decisions do; activating it lifts what suspends it. A
// decommissioned agent never comes back, and its id is not used again.
const (
	ActivateAgent     Lifecycle = "activate"
	SuspendAgent      Lifecycle = "suspend"
	DecommissionAgent Lifecycle = "decommission"
)

// LifecycleRequest changes the state of an agent.
type LifecycleRequest struct {
	Tenant    string    `json:"tenant,omitempty"`
	Issuer    string    `json:"issuer,omitempty"`
	ID        string    `json:"id"`
	Operation Lifecycle `json:"operation"`
	// Reason and Incident are the decision's; see Request.
	Reason   string `json:"reason,omitempty"`
	Incident string `json:"incident,omitempty"`
}

// LifecycleAnswer is the agent as it is now, and the decision that was taken on
// it, if there was one. Warnings say what denies it still.
type LifecycleAnswer struct {
	Agent    AgentRecord `json:"agent"`
	Decision *Decision   `json:"decision,omitempty"`
	Warnings []string    `json:"warnings,omitempty"`
}

// Session is a session as it is registered. It has no token: keys are thumbprints
// and hashes, credentials ids.
type Session struct {
	Tenant string `json:"tenant,omitempty"`
	Issuer string `json:"issuer,omitempty"`
	ID     string `json:"id"`
	// Agent holds it; Chain are those who act through that agent, the nearest
	// first. Of all links the issuer is the session's where there is none.
	Agent  TrailLink   `json:"agent,omitzero"`
	Chain  []TrailLink `json:"chain,omitempty"`
	User   string      `json:"user,omitempty"`
	Client string      `json:"client,omitempty"`
	// Parent is the session from which it descends.
	Parent      TrailLink `json:"parent,omitzero"`
	Keys        []string  `json:"keys,omitempty"`
	Credentials []string  `json:"credentials,omitempty"`
	// Digests are those that the agent presented.
	Digests []string  `json:"digests,omitempty"`
	Issued  time.Time `json:"issued,omitzero"`
	Expires time.Time `json:"expires"`
}

// SessionsRequest registers sessions, all or none.
type SessionsRequest struct {
	Sessions []Session `json:"sessions"`
}

// SessionsAnswer says how many of the sessions were new, and how many were
// registered already, with the same content.
type SessionsAnswer struct {
	Registered int `json:"registered"`
	Known      int `json:"known"`
}

// RegistryQuery says which agents, or sessions, are asked for. All that is given
// must match.
type RegistryQuery struct {
	// Tenant may be left out where there is one.
	Tenant string
	// Issuer is of the terms, and of ID, that need one.
	Issuer string
	// ID asks for a single one.
	ID string
	// Terms are of the kinds of targets, but for those that only a call or a token
	// has; of agents: blueprint, owner, capability, digest.
	Terms []Term
	// Expired asks for sessions too that have expired within the last hour.
	Expired bool
	// Environment and State are of agents. Registered is "true" or "false" to ask
	// for those alone that are registered, or are not.
	Environment string
	State       string
	Registered  string
	// Page is the Next of the page before; empty is the first.
	Page string
	// Limit is at most MaxPage; zero is DefaultPage.
	Limit int
}

func (q *RegistryQuery) values() url.Values {
	v := url.Values{}
	for name, s := range map[string]string{
		"tenant": q.Tenant, "issuer": q.Issuer, "id": q.ID, "environment": q.Environment, "state": q.State, "registered": q.Registered, "page": q.Page,
	} {
		if s != "" {
			v.Set(name, s)
		}
	}
	for _, t := range q.Terms {
		v.Add("term", t.Kind+":"+t.Value)
	}
	if q.Expired {
		v.Set("expired", "true")
	}
	if q.Limit != 0 {
		v.Set("limit", strconv.Itoa(q.Limit))
	}
	return v
}

// ParseRegistryQuery is the inverse of the client's encoding. Errors are Problems.
func ParseRegistryQuery(v url.Values) (RegistryQuery, error) {
	var q RegistryQuery
	texts := map[string]*string{
		"tenant": &q.Tenant, "issuer": &q.Issuer, "id": &q.ID, "environment": &q.Environment, "state": &q.State, "registered": &q.Registered, "page": &q.Page,
	}
	bad := func(what string) (RegistryQuery, error) {
		return RegistryQuery{}, NewProblem(ProblemInvalid, what, "see the API's description")
	}
	for name, values := range v {
		if name == "term" && len(values) <= MaxTerms {
			for _, s := range values {
				kind, value, ok := strings.Cut(s, ":")
				if !ok || len(value) > maxRegistryText {
					return bad("a term is KIND:VALUE")
				}
				q.Terms = append(q.Terms, Term{Kind: kind, Value: value})
			}
			continue
		}
		if len(values) != 1 || len(values[0]) > maxRegistryText && name != "page" {
			return bad("a parameter is repeated, or too long")
		}
		s := values[0]
		var err error
		switch p := texts[name]; {
		case p != nil:
			*p = s
		case name == "expired":
			q.Expired, err = strconv.ParseBool(s)
		case name == "limit":
			q.Limit, err = strconv.Atoi(s)
		default:
			return bad("an unknown parameter")
		}
		if err != nil {
			return bad(name + " is not valid")
		}
	}
	switch {
	case q.Limit < 0 || q.Limit > MaxPage:
		return bad("limit is not 1 to " + strconv.Itoa(MaxPage))
	case q.Registered != "" && q.Registered != "true" && q.Registered != "false":
		return bad("registered is true or false")
	}
	for i := range q.Terms {
		q.Terms[i].Issuer = q.Issuer
	}
	return q, nil
}

// AgentsPage is a page of agents: those that are registered, the newest first, and
// then those that are not.
type AgentsPage struct {
	Agents []AgentRecord `json:"agents"`
	// Next asks for the next page; empty where there is none. A page may be short,
	// even empty, and have a next one.
	Next string `json:"next,omitempty"`
}

// SessionsPage is a page of sessions, the newest first.
type SessionsPage struct {
	Sessions []Session `json:"sessions"`
	Next     string    `json:"next,omitempty"`
}

// RegistryStatus is how the registry is.
type RegistryStatus struct {
	Sessions int `json:"sessions"` // that are known, those that expired in the last hour included
	Agents   int `json:"agents"`
	// Bytes is about what they take in memory.
	Bytes int `json:"bytes"`
	// Batch is the newest of its log, Snapshot that of the newest snapshot.
	Batch    uint64 `json:"batch"`
	Snapshot uint64 `json:"snapshot,omitempty"`
	// Pending is how many requests wait for the store.
	Pending int `json:"pending"`
	// Refused counts messages that no authority wrote.
	Refused uint64 `json:"refused,omitempty"`
}

// TenantPreview is what a decision would touch in one tenant.
type TenantPreview struct {
	Tenant string `json:"tenant"`
	// Agents are those that are named and registered, and those that hold a
	// session that is touched. Sessions are live ones that are registered.
	Agents   int `json:"agents"`
	Sessions int `json:"sessions"`
	// Enforcers are those that serve the tenant.
	Enforcers int `json:"enforcers"`
}

// RegisterAgent registers an agent and returns its record. One that is registered
// with the same content is no error.
func (c *Client) RegisterAgent(ctx context.Context, r AgentRequest) (*AgentRecord, error) {
	var out AgentRecord
	if err := c.call(ctx, 0, http.MethodPost, "/v1/agents", nil, r, &out); err != nil {
		return nil, err
	}
	return &out, nil
}

// Agents returns a page of agents.
func (c *Client) Agents(ctx context.Context, q RegistryQuery) (*AgentsPage, error) {
	var out AgentsPage
	if err := c.call(ctx, 0, http.MethodGet, "/v1/agents?"+q.values().Encode(), nil, nil, &out); err != nil {
		return nil, err
	}
	return &out, nil
}

// ChangeAgent suspends, activates or decommissions an agent. One that failed half
// way is completed by asking again.
func (c *Client) ChangeAgent(ctx context.Context, r LifecycleRequest) (*LifecycleAnswer, error) {
	var out LifecycleAnswer
	if err := c.call(ctx, 0, http.MethodPost, "/v1/agents/lifecycle", nil, r, &out); err != nil {
		return nil, err
	}
	return &out, nil
}

// RegisterSessions registers up to MaxSessions sessions, all or none. Sent again,
// it is done once.
func (c *Client) RegisterSessions(ctx context.Context, list []Session) (*SessionsAnswer, error) {
	var out SessionsAnswer
	if err := c.call(ctx, 0, http.MethodPost, "/v1/sessions", nil, SessionsRequest{list}, &out); err != nil {
		return nil, err
	}
	return &out, nil
}

// Sessions returns a page of sessions.
func (c *Client) Sessions(ctx context.Context, q RegistryQuery) (*SessionsPage, error) {
	var out SessionsPage
	if err := c.call(ctx, 0, http.MethodGet, "/v1/sessions?"+q.values().Encode(), nil, nil, &out); err != nil {
		return nil, err
	}
	return &out, nil
}
