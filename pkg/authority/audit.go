package authority

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"time"
)

// Bounds of audit records and of questions for them. Longer texts are cut to
// these, in bytes, as session.ReportText does.
const (
	// MaxAuditText bounds each text of a record, target texts included.
	MaxAuditText = 256
	// MaxAuditDetail bounds the enforcers that a record of coverage names.
	MaxAuditDetail = 200
	// MaxAuditPage bounds the records of one answer.
	MaxAuditPage = 1000
)

// The kinds of AuditRecord. They are stable, and there may be more.
const (
	AuditDecision  = "decision"  // a decision, taken or refused
	AuditSignIn    = "sign-in"   // somebody came, or attempted to without a valid credential
	AuditAccess    = "access"    // what was asked for without the role for it
	AuditProposal  = "proposal"  // a proposal was made, withdrawn or not approved
	AuditRoster    = "roster"    // an enforcer was enrolled or retired
	AuditKeys      = "keys"      // a key set came into force: keys, tenants, epochs
	AuditAuthority = "authority" // an authority was started or stopped, or read its files again
	AuditReport    = "report"    // what an enforcer reported of calls
	AuditReceipts  = "receipts"  // what enforcers reported to have applied
	AuditCoverage  = "coverage"  // where a decision was in force, a while after it
	AuditRegistry  = "registry"  // an agent or sessions were registered, or an agent's state changed
	AuditExemption = "exemption" // a caller that kills do not touch was declared, approved or removed
	AuditRetention = "retention" // the oldest records were removed
	AuditConfig    = "config"    // who may do what was configured
)

// The values of AuditRecord.Outcome.
const (
	OutcomeDone    = "done"
	OutcomePreview = "previewed"
	OutcomeRefused = "refused"
	// OutcomeUnknown: it failed in a way that leaves open whether it was done.
	OutcomeUnknown = "unknown"
)

// AuditAny names the agent, or the user, of an AuditCaller that stands for all of
// them, as where a decision names the other alone. Empty says that there is none.
const AuditAny = "*"

// AuditUnknown names the agent, or the user, that a recovered decision is about:
// the log has its keyed digest alone.
const AuditUnknown = "?"

// AuditRecord is one thing that was done, or asked for, at an authority.
type AuditRecord struct {
	Time time.Time `json:"time"`
	// Kind is one of the kinds above, Action what of that kind: an Operation,
	// "enroll", "start", …
	Kind    string `json:"kind"`
	Action  string `json:"action"`
	Outcome string `json:"outcome"`
	// Authority names the run of the authority that wrote the record.
	Authority string         `json:"authority"`
	Principal AuditPrincipal `json:"principal"`
	// Tenants are those that it is about, AuditAny all of them: whoever may read
	// the audit there sees it. Without any it is the deployment's, and seen by those
	// who may everywhere.
	Tenants []string `json:"tenants,omitempty"`
	// Callers are whom it concerns: of each, the agent and the user on whose
	// behalf that acts are both named.
	Callers []AuditCaller `json:"callers,omitempty"`
	// Targets are what a decision names, in clear, or whatever else was acted on.
	// Left is how many more there were than fit the record.
	Targets []string `json:"targets,omitempty"`
	Left    int      `json:"left,omitempty"`
	Reason  string   `json:"reason,omitempty"`
	// Incident is the id of the incident that it belongs to.
	Incident string `json:"incident,omitempty"`
	// Error is the problem of what was refused, or failed: its type without what
	// is common to all, and its detail.
	Error  string `json:"error,omitempty"`
	Detail string `json:"detail,omitempty"`
	// Epoch and Sequence are a decision's place in the log of decisions, Entries
	// how many of its entries it took.
	Epoch    uint64 `json:"epoch,omitempty"`
	Sequence uint64 `json:"seq,omitempty"`
	Entries  int    `json:"entries,omitempty"`
	// Decision is the decision's id in the log, in hex; see Decision.ID.
	Decision string `json:"decision,omitempty"`
	// Decided is the authority's time of the decision.
	Decided time.Time `json:"decided,omitzero"`
	// Recovered is set where the log has the decision and whoever took it left no
	// record: this one was made from the log, which has neither who asked nor the
	// values of its targets.
	Recovered bool `json:"recovered,omitempty"`
	// Pending is set when the log had not said, when the record was made, that
	// it has stored the decision; Duplicate when it had been taken before under
	// the same idempotency key, or recorded before from the log.
	Pending   bool `json:"pending,omitempty"`
	Duplicate bool `json:"duplicate,omitempty"`
	Drill     bool `json:"drill,omitempty"`
	// Count is how often, where that is more than once.
	Count uint64 `json:"count,omitempty"`
	// TraceID and ParentID are of the request's W3C traceparent.
	TraceID  string `json:"trace_id,omitempty"`
	ParentID string `json:"parent_id,omitempty"`
	// Report is an enforcer's, and Trail the calls that it is of.
	Report *AuditedReport `json:"report,omitempty"`
	Trail  []TrailRecord  `json:"trail,omitempty"`
	// Receipts are frames that enforcers signed, which session.ParseFrame reads.
	Receipts []AuditedReceipt `json:"receipts,omitempty"`
	// Coverage is of the decision at Sequence. Its Detail has those enforcers at
	// which it was not in force, and the slowest at which it was, at most
	// MaxAuditDetail of them.
	Coverage *Coverage `json:"coverage,omitempty"`
	// Salt is random: it keeps whoever sees the digest of a record from finding
	// out by guessing what is in it.
	Salt string `json:"salt"`
}

// AuditPrincipal is who asked: a name, as far as it is known, and by what means
// it was established: "socket", "bootstrap", "token", "cert", "client", "emergency"
// for an order that an emergency key signed, "authority" for the authority itself, "enforcer", or "unknown".
type AuditPrincipal struct {
	Name  string `json:"name"`
	Means string `json:"means"`
}

// AuditCaller is a caller of the fabric: an agent, and the user on whose behalf
// it acts; see AuditAny. Both are always there.
type AuditCaller struct {
	Tenant  string `json:"tenant,omitempty"`
	Agent   string `json:"agent"`
	User    string `json:"user"`
	Client  string `json:"client,omitempty"`
	Session string `json:"session,omitempty"`
}

// AuditedReport names an enforcer's report; see session.Report.
type AuditedReport struct {
	Enforcer string `json:"enforcer"`
	Boot     string `json:"boot"`
	Number   uint64 `json:"number"`
	// Hash is the frame's, by which the enforcer's next one continues.
	Hash string `json:"hash"`
	// Withheld is how many of its calls are not in the record, because the
	// enforcer reports more than the audit takes, or because no key here opens it.
	Withheld uint64 `json:"withheld,omitempty"`
}

// AuditedReceipt is a receipt, as the enforcer signed it.
type AuditedReceipt struct {
	Enforcer string `json:"enforcer"`
	Frame    []byte `json:"frame"`
}

// AuditEntry is a record in its place in the chain.
type AuditEntry struct {
	Number uint64 `json:"number"`
	Hash   string `json:"hash"`
	AuditRecord
}

// AuditQuery says which records are asked for; what is empty asks for all.
// Values are compared whole. A record matches by a caller when one of its
// callers, or of the calls of its trail, does; of a trail only the calls that
// match are returned.
type AuditQuery struct {
	Kind     string
	Tenant   string
	Agent    string
	User     string
	Client   string
	Session  string
	Incident string
	Trace    string // the W3C trace id, in hex
	// Since and Until bound the time of the record; a moment at Until itself is
	// out.
	Since, Until time.Time
	// Before is the Next of the page before this one.
	Before string
	// Limit is how many are returned; zero is 100, at most MaxAuditPage.
	Limit int
}

func (q *AuditQuery) texts() map[string]*string {
	return map[string]*string{
		"kind": &q.Kind, "tenant": &q.Tenant, "agent": &q.Agent, "user": &q.User, "client": &q.Client, "session": &q.Session,
		"incident": &q.Incident, "trace": &q.Trace, "before": &q.Before,
	}
}

// Encode returns the query as it is asked of the API, without a "?"; empty when it
// asks for all.
func (q AuditQuery) Encode() string { return q.values().Encode() }

func (q *AuditQuery) values() url.Values {
	v := url.Values{}
	for name, s := range q.texts() {
		if *s != "" {
			v.Set(name, *s)
		}
	}
	for name, t := range map[string]time.Time{"since": q.Since, "until": q.Until} {
		if !t.IsZero() {
			v.Set(name, t.UTC().Format(time.RFC3339Nano))
		}
	}
	if q.Limit != 0 {
		v.Set("limit", strconv.Itoa(q.Limit))
	}
	return v
}

// ParseAuditQuery is the inverse of the client's encoding. Errors are Problems.
func ParseAuditQuery(v url.Values) (AuditQuery, error) {
	var q AuditQuery
	texts := q.texts()
	times := map[string]*time.Time{"since": &q.Since, "until": &q.Until}
	bad := func(what string) (AuditQuery, error) {
		return AuditQuery{}, NewProblem(ProblemInvalid, what, "see session-authority audit list --help")
	}
	for name, values := range v {
		if len(values) != 1 || len(values[0]) > 4096 {
			return bad("a parameter is repeated, or too long")
		}
		var err error
		switch p, t := texts[name], times[name]; {
		case p != nil:
			*p = values[0]
		case t != nil:
			*t, err = time.Parse(time.RFC3339Nano, values[0])
		case name == "limit":
			q.Limit, err = strconv.Atoi(values[0])
		default:
			return bad("an unknown parameter")
		}
		if err != nil {
			return bad(name + " is not valid")
		}
	}
	if q.Limit < 0 || q.Limit > MaxAuditPage {
		return bad("limit is not 1 to " + strconv.Itoa(MaxAuditPage))
	}
	return q, nil
}

// AuditPage is a part of the audit, newest first.
type AuditPage struct {
	Records []AuditEntry `json:"records"`
	// Next asks for what is older, as AuditQuery.Before; empty when there is
	// nothing. A page may be short, or empty, and have a Next: the time for one
	// question is bounded.
	Next string `json:"next,omitempty"`
	// Head is the number of the newest record, Floor that of the oldest that is
	// kept.
	Head  uint64 `json:"head"`
	Floor uint64 `json:"floor"`
}

// Audit returns the newest records that match, newest first.
func (c *Client) Audit(ctx context.Context, q AuditQuery) (*AuditPage, error) {
	var out AuditPage
	if err := c.call(ctx, 0, http.MethodGet, "/v1/audit?"+q.values().Encode(), nil, nil, &out); err != nil {
		return nil, err
	}
	return &out, nil
}

// ExportAudit writes the audit as JSON lines, which can be verified offline
// (docs/audit.md): every record from Since on, with the digest alone of those
// that do not match. Until, Before and Limit do not apply. ctx bounds it; without an error
// all was written.
func (c *Client) ExportAudit(ctx context.Context, q AuditQuery, w io.Writer) error {
	q.Until, q.Before, q.Limit = time.Time{}, "", 0
	return c.stream(ctx, "/v1/audit/export?"+q.values().Encode(), w)
}

// ExportReceipts writes the receipts that prove where the decisions of an
// incident, or the decision at a place of the log when incident is empty, were
// applied, as JSON lines that can be verified offline. ctx bounds it.
func (c *Client) ExportReceipts(ctx context.Context, incident string, epoch, number uint64, w io.Writer) error {
	v := url.Values{}
	if incident != "" {
		v.Set("incident", incident)
	} else {
		v.Set("epoch", strconv.FormatUint(epoch, 10))
		v.Set("number", strconv.FormatUint(number, 10))
	}
	return c.stream(ctx, "/v1/receipts/export?"+v.Encode(), w)
}

// stream copies an answer that may be long. One that is cut off is an error.
func (c *Client) stream(ctx context.Context, path string, w io.Writer) error {
	resp, err := c.send(ctx, http.MethodGet, path, nil, nil)
	if err != nil {
		return c.unreachable(ctx, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return readProblem(resp)
	}
	from := &reading{r: resp.Body}
	if _, err := io.Copy(w, from); from.err != nil {
		return c.unreachable(ctx, from.err)
	} else if err != nil {
		return fmt.Errorf("authority: %w", err)
	}
	return nil
}

// reading tells an error of the answer from one of where it is written to.
type reading struct {
	r   io.Reader
	err error
}

func (r *reading) Read(b []byte) (int, error) {
	n, err := r.r.Read(b)
	if err != nil && err != io.EOF {
		r.err = err
	}
	return n, err
}
