package authority

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/interlock-fabric/interlock/pkg/session"
)

// Bounds of a request. The server refuses what exceeds them.
const (
	// MaxBody bounds a request's body, in bytes.
	MaxBody = 1 << 20
	// MaxTargets bounds the targets of one decision.
	MaxTargets = 1000
	// MaxIdempotencyKey bounds an idempotency key, in bytes.
	MaxIdempotencyKey = 255
	// MaxWait bounds how long a request for coverage may wait.
	MaxWait = 30 * time.Second
	// MaxURLs bounds the URLs of an enrolment; each has at most
	// session.MaxValueLen bytes.
	MaxURLs = 16
	// MaxBreakGlass bounds the reason for deciding alone, in bytes.
	MaxBreakGlass = 200
)

// Operation is what a decision does to the callers that its targets match.
type Operation string

// The operations.
const (
	// Revoke denies for good. A session, token, credential or key that was
	// revoked never comes back.
	Revoke Operation = "revoke"
	// Suspend denies until Resume, or until it ends by itself.
	Suspend Operation = "suspend"
	// StepUp denies until the caller has authenticated again.
	StepUp Operation = "step_up"
	// Reduce denies every operation that is not marked low-risk.
	Reduce Operation = "reduce"
	// Resume lifts Suspend, StepUp and Reduce.
	Resume Operation = "resume"
	// Restore lifts Revoke, leaving an issued-before behind, and Kill.
	Restore Operation = "restore"
	// Kill suspends everything, in one tenant or in all.
	Kill Operation = "kill"
)

// Operations returns every operation.
func Operations() []Operation {
	return []Operation{Revoke, Suspend, StepUp, Reduce, Resume, Restore, Kill}
}

// Reasons returns the reasons that can be given for a decision: those of
// session.Reasons that say why, and are not the authority's own to give.
func Reasons() []string {
	return slices.DeleteFunc(session.Reasons(), func(s string) bool {
		switch s {
		case session.ReasonUnspecified.String(), session.ReasonKill.String(), session.ReasonCanary.String(), session.ReasonDrill.String():
			return true
		}
		return false
	})
}

// Lifts reports whether the operation sets callers free.
func (o Operation) Lifts() bool { return o == Resume || o == Restore }

// Term is one named thing: a kind of session.Kinds by its name, the issuer that
// minted the value where the kind needs one, and the value in clear.
type Term struct {
	Kind   string `json:"kind"`
	Issuer string `json:"issuer,omitempty"`
	Value  string `json:"value,omitempty"`
}

// Target is what a decision names: one term, or a conjunction of two or three.
// The tenant may be left out where the authority has only one, and the issuer
// where the authority has a default.
type Target struct {
	Tenant string `json:"tenant,omitempty"`
	Terms  []Term `json:"terms"`
}

// One returns the target of a single term.
func One(tenant, kind, issuer, value string) Target {
	return Target{Tenant: tenant, Terms: []Term{{Kind: kind, Issuer: issuer, Value: value}}}
}

// String shows the target to a person who may see values in clear.
func (t Target) String() string {
	parts := make([]string, 0, len(t.Terms))
	for _, term := range t.Terms {
		parts = append(parts, strings.TrimSpace(term.Kind+" "+term.Value))
	}
	return strings.Join(parts, " and ")
}

// Request asks for a decision: one operation on up to MaxTargets targets, all of
// which take effect together. Operation and Targets are required.
type Request struct {
	Operation Operation `json:"operation"`
	Targets   []Target  `json:"targets"`
	// Effect limits Resume to one effect: "suspended", "step_up" or "reduced".
	Effect string `json:"effect,omitempty"`
	// IssuedBefore restricts Revoke to identities from before that instant.
	IssuedBefore time.Time `json:"issued_before,omitzero"`
	// Expires is when the last credential that Revoke can match has expired; on
	// Suspend, StepUp and Reduce it is when the effect ends by itself. For is
	// the same, counted from now. At most one of the two.
	Expires time.Time `json:"expires,omitzero"`
	For     Duration  `json:"for,omitzero"`
	// Reason is one of Reasons. It is required, but of Resume and Restore, which are
	// their own, and of a drill. It ends up in every denial, but for a Kill's, whose
	// denials say "kill": the audit has why.
	Reason string `json:"reason,omitempty"`
	// Incident ends up in every denial; at most session.MaxIncidentLen bytes. It is
	// required for whatever is wider than single sessions, tokens, credentials and
	// keys, drills excepted.
	Incident string `json:"incident,omitempty"`
	// ACR is the authentication context that StepUp requires.
	ACR string `json:"acr,omitempty"`
	// Except are callers that the decision does not touch; at most
	// session.MaxExcept.
	Except []Target `json:"except,omitempty"`
	// NoExemptions decides on a whole tenant, or on everything, without sparing
	// those that are declared; see Exemption.
	NoExemptions bool `json:"no_exemptions,omitempty"`
	// Share is the percentage, above 0 and up to 100, of the sessions that
	// Restore (of a kill) or Resume sets free now; zero is all of them.
	Share float64 `json:"share,omitzero"`
	// Stages makes Restore (of one kill) lift it step by step, each of which is held
	// for Hold, MinHold to MaxHold: shares that grow to "100%", as in "1%", and of a
	// global kill also names of its tenants; at most MaxStages. See StagedRestore.
	Stages []string `json:"stages,omitempty"`
	Hold   Duration `json:"hold,omitzero"`
	// Credentials makes Kill revoke the credentials there are: when it is
	// restored, credentials from before stay dead.
	Credentials bool `json:"credentials,omitempty"`
	// Drill decisions are matched and reported, and deny nobody.
	Drill bool `json:"drill,omitempty"`
	// BreakGlass says why one person alone decides what takes two; at most
	// MaxBreakGlass bytes. It goes with Incident, and everybody is told.
	BreakGlass string `json:"break_glass,omitempty"`
	// Commit does what would otherwise only be previewed.
	Commit bool `json:"commit,omitempty"`
}

// Decision is the answer to a Request.
type Decision struct {
	Operation Operation `json:"operation"`
	// Committed is false when the decision was only previewed; Preview is set
	// then, and nothing else but Warnings.
	Committed bool `json:"committed"`
	// Epoch and Number are the decision's place in the log.
	Epoch  uint64 `json:"epoch,omitempty"`
	Number uint64 `json:"number,omitempty"`
	// ID is what the log calls it: a hash of the idempotency key and the request,
	// in hex. The audit names it, too.
	ID string `json:"id,omitempty"`
	// At is the authority's time of the decision.
	At time.Time `json:"at,omitzero"`
	// Durable is set when the log has stored it, and the audit who asked for it.
	// Without it the decision is in effect and may yet be lost: send it again with
	// the same idempotency key.
	Durable bool `json:"durable"`
	// Duplicate is set when the idempotency key had been used for this same
	// request: nothing was decided again.
	Duplicate bool `json:"duplicate,omitempty"`
	// Entries is how many entries of the log it took.
	Entries int `json:"entries,omitempty"`
	// Exempted are the callers that it does not touch, with the ids of the
	// exemptions that are declared, at most the first twenty.
	Exempted []string `json:"exempted,omitempty"`
	Warnings []string `json:"warnings,omitempty"`
	Preview  *Preview `json:"preview,omitempty"`
	// Restore is the staged restore of which this is the first stage.
	Restore *StagedRestore `json:"restore,omitempty"`
}

// Preview is what a wide decision would do.
type Preview struct {
	// Would has a line for each target, at most the first twenty.
	Would []string `json:"would"`
	// Targets is how many targets there are.
	Targets int `json:"targets"`
	// Enforcers is the size of the roster, and Running how many calls were
	// running on it by the last receipts: an upper bound of what can be cut.
	Enforcers int    `json:"enforcers"`
	Running   uint64 `json:"running"`
	// Agents and Sessions are what it would touch, as far as it is registered; see
	// TenantPreview. Tenants has them by tenant.
	Agents   int             `json:"agents"`
	Sessions int             `json:"sessions"`
	Tenants  []TenantPreview `json:"tenants"`
	// Spared are the callers that it does not touch, at most the first twenty, and
	// SparedSessions how many live sessions fewer it touches for them.
	Spared         []Spared `json:"spared,omitempty"`
	SparedSessions int      `json:"spared_sessions,omitempty"`
}

// EnforcerState says where one enforcer stands, as regards a decision.
type EnforcerState string

// The states.
const (
	// StateApplied: its receipt says that the decision is in force there.
	StateApplied EnforcerState = "applied"
	// StatePending: neither its receipt nor its staleness bound has come.
	StatePending EnforcerState = "pending"
	// StateDenying: it has not reported the decision, and denies everything by
	// itself, because its state is older than its bound.
	StateDenying EnforcerState = "denying"
	// StateExposed: it may allow what the decision denies: it only watches
	// (shadow), or is configured to fail open and has not reported.
	StateExposed EnforcerState = "exposed"
	// StateAbsent: enrolled, and never heard of. One that was never started
	// holds no state, so it denies; retire one that never will be.
	StateAbsent EnforcerState = "absent"
)

// Coverage says where a decision is in force. InEffect, Denying, Exposed,
// Pending and Absent sum to Enforcers.
type Coverage struct {
	Epoch  uint64    `json:"epoch"`
	Number uint64    `json:"number"`
	At     time.Time `json:"at,omitzero"`
	// Durable is set when the log has stored the decision.
	Durable bool `json:"durable"`
	// Complete is set when nothing is pending.
	Complete bool `json:"complete"`
	// Effective is set when every enforcer that was ever heard of has it in
	// force, or denies by itself.
	Effective bool `json:"effective"`
	// Enforcers is the size of the roster: the denominator.
	Enforcers int `json:"enforcers"`
	InEffect  int `json:"in_effect"`
	Denying   int `json:"denying"`
	Exposed   int `json:"exposed"`
	Pending   int `json:"pending"`
	Absent    int `json:"absent"`
	// Silent counts those not heard of for longer than their bound, whatever
	// their state. BestEffort and Shadow count those in these modes.
	Silent     int `json:"silent"`
	BestEffort int `json:"best_effort"`
	Shadow     int `json:"shadow"`
	// SlowestMillis is the longest time from the decision to its application.
	SlowestMillis float64 `json:"slowest_millis"`
	// Cut is how many running calls ended.
	Cut    uint64             `json:"cut"`
	Detail []EnforcerCoverage `json:"detail,omitempty"`
}

// EnforcerCoverage is one enforcer's part of a Coverage.
type EnforcerCoverage struct {
	Name  string        `json:"name"`
	State EnforcerState `json:"state"`
	Mode  string        `json:"mode,omitempty"`
	// AppliedAt is the moment of application in the authority's time, as the
	// enforcer estimates it, and ErrorMillis how far it may be off. It is
	// absent when the receipt covers the decision without timing it.
	// LatencyMillis counts from the decision; where that is less than the clocks
	// can tell apart, it is ErrorMillis.
	AppliedAt     time.Time `json:"applied_at,omitzero"`
	LatencyMillis float64   `json:"latency_millis,omitzero"`
	ErrorMillis   float64   `json:"error_millis,omitzero"`
	Cut           uint32    `json:"cut,omitempty"`
	// LastHeard is when its last receipt came.
	LastHeard time.Time `json:"last_heard,omitzero"`
	Silent    bool      `json:"silent,omitempty"`
	// DenyingSince is when it denies everything by itself, at the latest.
	DenyingSince time.Time `json:"denying_since,omitzero"`
}

// Enforcer is one enforcer of the roster.
type Enforcer struct {
	Name     string    `json:"name"`
	Tenants  []string  `json:"tenants"`
	Enrolled time.Time `json:"enrolled"`
	// Condition is "fresh", "denying", "silent" or "absent".
	Condition string `json:"condition"`
	// The rest is by its last receipt.
	Mode           string    `json:"mode,omitempty"`
	LastHeard      time.Time `json:"last_heard,omitzero"`
	DenyingSince   time.Time `json:"denying_since,omitzero"`
	Epoch          uint64    `json:"epoch,omitempty"`
	Applied        uint64    `json:"applied,omitempty"`
	Confirmed      uint64    `json:"confirmed,omitempty"`
	MaxStaleMillis float64   `json:"max_stale_millis,omitzero"`
	AgeMillis      float64   `json:"age_millis,omitzero"`
	// Diverged is set while the head that it reports is not the log's.
	Diverged bool `json:"diverged,omitempty"`
	// Divergence says when and where its state last had another digest than the
	// authority's at the same batch; empty when that never happened since its
	// start.
	Divergence string `json:"divergence,omitempty"`

	Running uint64 `json:"running"`
	Cut     uint64 `json:"cut"`
	Denied  uint64 `json:"denied"`
	Refused uint64 `json:"refused"`
	Repairs uint64 `json:"repairs"`
	Rebuilt uint64 `json:"rebuilt"`
	// ReceiptsRefused counts receipts in its name that were not believed:
	// forged, replayed or too many.
	ReceiptsRefused uint64 `json:"receipts_refused,omitempty"`
	// Canary is what it did with the canaries; nil where there are none, or none
	// yet since it was first heard.
	Canary *Canary `json:"canary,omitempty"`
}

// Canary is what an enforcer did with the sessions that the authority revokes
// every few seconds to see that they are denied.
type Canary struct {
	// Armed is set when it denied the newest one that it has had time for.
	Armed bool `json:"armed"`
	// Why says why not.
	Why string `json:"why,omitempty"`
	// Number is the batch of the newest that it reported, and LatencyMillis the
	// time from the decision on the last that it denied to its check.
	Number        uint64  `json:"number,omitempty"`
	LatencyMillis float64 `json:"latency_millis,omitempty"`
}

// The values of Enforcer.Condition.
const (
	ConditionFresh   = "fresh"
	ConditionDenying = "denying"
	ConditionSilent  = "silent"
	ConditionAbsent  = "absent"
)

// EnrollRequest enters an enforcer in the roster.
type EnrollRequest struct {
	// Name is 1 to 64 of a-z, 0-9, "-" and "_".
	Name string `json:"name"`
	// Tenants that it serves; empty is all.
	Tenants []string `json:"tenants,omitempty"`
	// URLs are how it reaches the bus, at most MaxURLs; empty is the authority's
	// own address.
	URLs []string `json:"urls,omitempty"`
}

// Status is how the authority and its enforcers are.
type Status struct {
	Version string `json:"version"`
	// Writer says whether this authority is the one that writes the log.
	Writer bool   `json:"writer"`
	Epoch  uint64 `json:"epoch"`
	// Number is the newest batch of the log; Head its hash.
	Number uint64    `json:"number"`
	Head   string    `json:"head"`
	Time   time.Time `json:"time"`
	// Entries is how many are in force.
	Entries int `json:"entries"`
	// Segment is the batch of the newest published segment, from which whoever
	// starts reads on, and SegmentTime when that was published; zero while there
	// is none. LogFrom is the first batch that the log still has.
	Segment     uint64       `json:"segment,omitempty"`
	SegmentTime time.Time    `json:"segment_time,omitzero"`
	LogFrom     uint64       `json:"log_from,omitempty"`
	Tenants     []string     `json:"tenants"`
	KeySet      KeySetStatus `json:"key_set"`
	Enforcers   struct {
		Enrolled int `json:"enrolled"`
		Fresh    int `json:"fresh"`
		Denying  int `json:"denying"`
		Silent   int `json:"silent"`
		Absent   int `json:"absent"`
		Exposed  int `json:"exposed"`
		// Armed are those that denied the newest canary, Unarmed those that
		// should have and did not show it.
		Armed   int `json:"armed"`
		Unarmed int `json:"unarmed"`
	} `json:"enforcers"`
	// TimeToRevoke holds the time from a canary's decision to its denial against
	// the deployment's target; nil where there are no canaries.
	TimeToRevoke *TimeToRevoke `json:"time_to_revoke,omitempty"`
	// NotFresh are the enforcers that are not, at most the first hundred.
	NotFresh []Enforcer `json:"not_fresh,omitempty"`
	// Audit is the newest record of the audit, and how many wait for the store.
	Audit struct {
		Number  uint64 `json:"number"`
		Waiting int    `json:"waiting"`
	} `json:"audit"`
	// Registry is how the registry is, for who may see all tenants.
	Registry *RegistryStatus `json:"registry,omitempty"`
	// Kills are the kills in force: "global", or "tenant" and its name.
	Kills []string `json:"kills,omitempty"`
	// KillsInForce says more of each.
	KillsInForce []KillInForce `json:"kills_in_force,omitempty"`
	// Restores are the staged restores under way.
	Restores []StagedRestore `json:"restores,omitempty"`
	// Warnings are what an operator should mend.
	Warnings []string `json:"warnings,omitempty"`
}

// TimeToRevoke is how fast the enforcers that are armed denied the last canary.
type TimeToRevoke struct {
	TargetMillis float64 `json:"target_millis"`
	// SlowestMillis is the slowest enforcer's, and Slowest its name.
	SlowestMillis float64 `json:"slowest_millis"`
	Slowest       string  `json:"slowest"`
	// Over is how many took longer than the target.
	Over int `json:"over"`
}

// KeySetStatus is the key set in force.
type KeySetStatus struct {
	Version  uint64    `json:"version"`
	NotAfter time.Time `json:"not_after"`
	// Keys are the ids of the signing keys, those withdrawn left out.
	Keys []string `json:"keys"`
}

// Identity is a caller in clear, for Explain.
type Identity struct {
	Tenant       string    `json:"tenant,omitempty"`
	Issuer       string    `json:"issuer,omitempty"`
	Token        string    `json:"token,omitempty"`
	Session      string    `json:"session,omitempty"`
	SessionStart time.Time `json:"session_start,omitzero"`
	Ancestors    []string  `json:"ancestors,omitempty"`
	User         string    `json:"user,omitempty"`
	// Actors is the delegation chain, the current actor first.
	Actors       []string  `json:"actors,omitempty"`
	Client       string    `json:"client,omitempty"`
	Keys         []string  `json:"keys,omitempty"`
	Credentials  []string  `json:"credentials,omitempty"`
	Digests      []string  `json:"digests,omitempty"`
	Blueprint    string    `json:"blueprint,omitempty"`
	Owner        string    `json:"owner,omitempty"`
	Roles        []string  `json:"roles,omitempty"`
	Capabilities []string  `json:"capabilities,omitempty"`
	IssuedAt     time.Time `json:"issued_at,omitzero"`
	AuthTime     time.Time `json:"auth_time,omitzero"`
	ACR          string    `json:"acr,omitempty"`
}

// ExplainRequest asks what denies a caller: by its identity, or by the claims of
// a token, which the authority neither verifies nor keeps. Exactly one of the
// two.
type ExplainRequest struct {
	Identity *Identity       `json:"identity,omitempty"`
	Claims   json.RawMessage `json:"claims,omitempty"`
	// SigningInputHash names a token that has no `jti`: session.TokenValue of
	// it. It goes with Claims.
	SigningInputHash string `json:"signing_input_hash,omitempty"`
	// Tenant goes with Claims; see Target.
	Tenant string `json:"tenant,omitempty"`
	// Tool and Audience are what is called; LowRisk marks it so.
	Tool     string `json:"tool,omitempty"`
	Audience string `json:"audience,omitempty"`
	LowRisk  bool   `json:"low_risk,omitempty"`
}

// Explanation says which entries in force match a caller.
type Explanation struct {
	Epoch  uint64 `json:"epoch"`
	Number uint64 `json:"number"`
	// Denied is set when one of Matches, not a drill, denies the caller.
	Denied bool `json:"denied"`
	// Verdict is what an enforcer would answer: "allowed", or the text of the
	// denial.
	Verdict string  `json:"verdict"`
	Matches []Match `json:"matches,omitempty"`
	// Nearby are entries under the caller's keys that do not match this call:
	// ended, exempted, or bounded to older credentials.
	Nearby []Match `json:"nearby,omitempty"`
	// Checked is how many keys were looked up.
	Checked int `json:"checked"`
}

// Match is an entry in force.
type Match struct {
	Effect string `json:"effect"`
	// On is the kind, or the kinds, that the entry names.
	On           string    `json:"on"`
	Reason       string    `json:"reason"`
	Incident     string    `json:"incident,omitempty"`
	Number       uint64    `json:"number"`
	Since        time.Time `json:"since"`
	Expires      time.Time `json:"expires,omitzero"`
	IssuedBefore time.Time `json:"issued_before,omitzero"`
	ACR          string    `json:"acr,omitempty"`
	Share        float64   `json:"share,omitzero"`
	Drill        bool      `json:"drill,omitempty"`
	// Exempt is how many callers the entry does not touch, and Exempted whether
	// this one is among them.
	Exempt   int  `json:"exempt,omitempty"`
	Exempted bool `json:"exempted,omitempty"`
}

// Event is one of what Watch tells. Type says which of the others is set.
type Event struct {
	// Type is "decision", "coverage" or "enforcer".
	Type     string         `json:"type"`
	At       time.Time      `json:"at"`
	Decision *DecisionEvent `json:"decision,omitempty"`
	Coverage *Coverage      `json:"coverage,omitempty"`
	Enforcer *Enforcer      `json:"enforcer,omitempty"`
}

// The types of Event.
const (
	EventDecision = "decision"
	EventCoverage = "coverage"
	EventEnforcer = "enforcer"
)

// DecisionEvent is a batch of the log, summed up: one line per operation, effect
// and shape. The log has no values in clear.
type DecisionEvent struct {
	Epoch  uint64      `json:"epoch"`
	Number uint64      `json:"number"`
	At     time.Time   `json:"at"`
	Lines  []EntryLine `json:"lines"`
}

// EntryLine sums up like entries of a batch.
type EntryLine struct {
	Operation string `json:"operation"` // "set" or "lift"
	Effect    string `json:"effect"`
	On        string `json:"on"`
	Tenant    string `json:"tenant,omitempty"`
	Reason    string `json:"reason"`
	Incident  string `json:"incident,omitempty"`
	Drill     bool   `json:"drill,omitempty"`
	Count     int    `json:"count"`
}

// Duration is a time.Duration that is text in JSON, as in "15m".
type Duration time.Duration

// MarshalText returns the form that time.ParseDuration reads.
func (d Duration) MarshalText() ([]byte, error) { return []byte(time.Duration(d).String()), nil }

// UnmarshalText is the inverse of MarshalText.
func (d *Duration) UnmarshalText(b []byte) error {
	if len(b) > 64 {
		return fmt.Errorf("duration of %d characters", len(b))
	}
	v, err := time.ParseDuration(string(b))
	if err != nil {
		return fmt.Errorf("not a duration like 15m or 2h30m")
	}
	*d = Duration(v)
	return nil
}
