package session

import (
	"fmt"
	"strings"
)

// Kind says what a target names. The numbers are the wire form and are never
// reused. The zero Kind is invalid.
type Kind uint8

// The kinds of target. A Kind below 32 names one value; the Shape of a
// conjunction is 32 or more.
const (
	KindGlobal     Kind = 1  // everything in every tenant
	KindTenant     Kind = 2  // everything in one tenant
	KindIssuer     Kind = 3  // every identity a token issuer vouched for
	KindUser       Kind = 4  // the `sub` of an issuer
	KindAgent      Kind = 5  // an actor anywhere in the delegation chain (RFC 8693 `act`)
	KindClient     Kind = 6  // an OAuth client of an issuer
	KindSession    Kind = 7  // a session, or an ancestor of one (`sid`)
	KindToken      Kind = 8  // one token: its `jti`, or the hash of its signing input
	KindCredential Kind = 9  // a verifiable credential id
	KindKey        Kind = 10 // a proof-of-possession key or an API key's hash
	KindDigest     Kind = 11 // a code, model or container image digest
	KindBlueprint  Kind = 12 // the blueprint an agent was made from
	KindOwner      Kind = 13 // who answers for an agent
	KindRole       Kind = 14 // a role held
	KindCapability Kind = 15 // a capability or scope held
	KindTool       Kind = 16 // the tool or operation called; known per call
	KindAudience   Kind = 17 // the resource called; known per call

	lastKind = KindAudience
)

var kindNames = [...]string{
	KindGlobal: "global", KindTenant: "tenant", KindIssuer: "issuer", KindUser: "user",
	KindAgent: "agent", KindClient: "client", KindSession: "session", KindToken: "token",
	KindCredential: "credential", KindKey: "key", KindDigest: "digest",
	KindBlueprint: "blueprint", KindOwner: "owner", KindRole: "role",
	KindCapability: "capability", KindTool: "tool", KindAudience: "audience",
}

// Kinds returns every kind in the order of its wire number.
func Kinds() []Kind {
	out := make([]Kind, 0, lastKind)
	for k := KindGlobal; k <= lastKind; k++ {
		out = append(out, k)
	}
	return out
}

// Valid reports whether k is a kind that this version knows.
func (k Kind) Valid() bool { return k >= KindGlobal && k <= lastKind }

// String returns the kind's name as the API and the command line spell it.
func (k Kind) String() string {
	if k.Valid() {
		return kindNames[k]
	}
	return fmt.Sprintf("kind-%d", uint8(k))
}

// ParseKind is the inverse of String. The error lists what would be accepted.
func ParseKind(s string) (Kind, error) {
	for k := KindGlobal; k <= lastKind; k++ {
		if kindNames[k] == s {
			return k, nil
		}
	}
	return 0, fmt.Errorf("%w: unknown target kind %q (want one of %s)", ErrInvalid, clip(s), strings.Join(kindNames[1:], ", "))
}

// Terminal reports whether a revocation of this kind is for ever: a session,
// token, credential or key that was revoked never comes back.
func (k Kind) Terminal() bool {
	switch k {
	case KindSession, KindToken, KindCredential, KindKey:
		return true
	}
	return false
}

// Wide reports whether a target of this kind can match more than one session,
// so that a decision on it deserves a preview first.
func (k Kind) Wide() bool {
	switch k {
	case KindSession, KindToken, KindKey:
		return false
	}
	return true
}

// PerCall reports whether values of this kind belong to a call rather than to
// the caller's credential.
func (k Kind) PerCall() bool { return k == KindTool || k == KindAudience }

// Scoped reports whether values of this kind are minted by an issuer, so that
// the same text from another issuer is another value. An agent is scoped when
// its id is not a URI; see Term.
func (k Kind) Scoped() bool {
	switch k {
	case KindUser, KindClient, KindSession, KindToken:
		return true
	}
	return false
}

// Shape is what a key in the revocation state is about: a single Kind, or one
// of the eight conjunctions of kinds. A Shape is below 64, so a set of shapes
// is one word (ShapeSet).
type Shape uint8

// The conjunctions. Which ones exist is fixed, so that the number of probes
// per check stays bounded: a responder cannot make every check dearer.
const (
	ShapeUserAgent     Shape = 32
	ShapeUserClient    Shape = 33
	ShapeUserTool      Shape = 34
	ShapeAgentClient   Shape = 35
	ShapeAgentTool     Shape = 36
	ShapeAgentAudience Shape = 37
	ShapeSessionTool   Shape = 38
	ShapeUserAgentTool Shape = 39

	firstConjunction = ShapeUserAgent
	lastConjunction  = ShapeUserAgentTool
)

var conjunctionKinds = [...][]Kind{
	{KindUser, KindAgent},
	{KindUser, KindClient},
	{KindUser, KindTool},
	{KindAgent, KindClient},
	{KindAgent, KindTool},
	{KindAgent, KindAudience},
	{KindSession, KindTool},
	{KindUser, KindAgent, KindTool},
}

// Conjunctions returns the shapes that combine kinds.
func Conjunctions() []Shape {
	out := make([]Shape, 0, len(conjunctionKinds))
	for s := firstConjunction; s <= lastConjunction; s++ {
		out = append(out, s)
	}
	return out
}

// Valid reports whether s is a shape that this version knows.
func (s Shape) Valid() bool {
	return Kind(s).Valid() || s >= firstConjunction && s <= lastConjunction
}

// Kinds returns the kinds that s combines, in the order of their numbers. The
// slice must not be changed.
func (s Shape) Kinds() []Kind {
	if s >= firstConjunction && s <= lastConjunction {
		return conjunctionKinds[s-firstConjunction]
	}
	return []Kind{Kind(s)}
}

// String returns the names of the shape's kinds, joined by "+".
func (s Shape) String() string {
	if !s.Valid() {
		return fmt.Sprintf("shape-%d", uint8(s))
	}
	names := make([]string, 0, 3)
	for _, k := range s.Kinds() {
		names = append(names, k.String())
	}
	return strings.Join(names, "+")
}

// Terminal reports whether a revocation of this shape can never be lifted.
func (s Shape) Terminal() bool { return Kind(s).Terminal() }

// PerCall reports whether the shape involves a value known only per call.
func (s Shape) PerCall() bool { return PerCallShapes.Has(s) }

// PerCallShapes are the shapes that involve a tool or an audience, which only
// a call names.
const PerCallShapes ShapeSet = 1<<KindTool | 1<<KindAudience | 1<<ShapeUserTool | 1<<ShapeAgentTool |
	1<<ShapeAgentAudience | 1<<ShapeSessionTool | 1<<ShapeUserAgentTool

// shapeOf finds the conjunction of exactly these kinds, sorted.
func shapeOf(kinds []Kind) (Shape, bool) {
	if len(kinds) == 1 {
		return Shape(kinds[0]), kinds[0].Valid()
	}
next:
	for i, want := range conjunctionKinds {
		if len(want) != len(kinds) {
			continue
		}
		for j := range want {
			if want[j] != kinds[j] {
				continue next
			}
		}
		return firstConjunction + Shape(i), true
	}
	return 0, false
}

// ShapeSet is a set of shapes. The zero value is empty.
type ShapeSet uint64

// With returns the set with s added.
func (m ShapeSet) With(s Shape) ShapeSet { return m | 1<<(s&63) }

// Has reports whether s is in the set.
func (m ShapeSet) Has(s Shape) bool { return m&(1<<(s&63)) != 0 }

// Effect is what a decision does to the callers that it matches. A larger
// Effect takes precedence. The zero Effect denies nothing and is invalid on
// the wire.
type Effect uint8

// The effects, weakest first.
const (
	// EffectReduced denies every operation that the host has not marked
	// low-risk.
	EffectReduced Effect = 1
	// EffectStepUp denies, with an RFC 9470 challenge, until the caller has
	// authenticated again after the decision, with the required acr.
	EffectStepUp Effect = 2
	// EffectSuspended denies until it is lifted or ends by itself.
	EffectSuspended Effect = 3
	// EffectRevoked denies for good. On a session, token, credential or key it
	// cannot be lifted.
	EffectRevoked Effect = 4
)

var effectNames = [...]string{EffectReduced: "reduced", EffectStepUp: "step_up", EffectSuspended: "suspended", EffectRevoked: "revoked"}

// Valid reports whether e is an effect that this version knows.
func (e Effect) Valid() bool { return e >= EffectReduced && e <= EffectRevoked }

// String returns the effect's name as the API spells it.
func (e Effect) String() string {
	if e.Valid() {
		return effectNames[e]
	}
	return fmt.Sprintf("effect-%d", uint8(e))
}

// ParseEffect is the inverse of String.
func ParseEffect(s string) (Effect, error) {
	for e := EffectReduced; e <= EffectRevoked; e++ {
		if effectNames[e] == s {
			return e, nil
		}
	}
	return 0, fmt.Errorf("%w: unknown effect %q (want one of %s)", ErrInvalid, clip(s), strings.Join(effectNames[1:], ", "))
}

// Reason is why a decision was taken: one byte on the wire, so that it can be
// counted and shown to a caller without carrying anybody's words. A reason
// that this version does not know is kept and printed as its number.
type Reason uint8

// The reasons. ReasonUnspecified is the zero value.
const (
	ReasonUnspecified       Reason = 0
	ReasonStolenToken       Reason = 1
	ReasonCompromised       Reason = 2
	ReasonPolicyViolation   Reason = 3
	ReasonAnomaly           Reason = 4
	ReasonUserRequest       Reason = 5
	ReasonOffboarded        Reason = 6
	ReasonCredentialExposed Reason = 7
	ReasonAlteredCode       Reason = 8
	ReasonUnsafeBehaviour   Reason = 9
	ReasonAuthenticationOld Reason = 10
	ReasonMaintenance       Reason = 11
	ReasonSuperseded        Reason = 12
	ReasonRestored          Reason = 13
	ReasonKill              Reason = 14
	ReasonCanary            Reason = 15
	ReasonDrill             Reason = 16
	ReasonDecommissioned    Reason = 17
	ReasonLogout            Reason = 18
	ReasonRiskLevel         Reason = 19
	// ReasonLifecycle is what an agent's state in the registry says.
	ReasonLifecycle Reason = 20
	lastReason             = ReasonLifecycle
)

var reasonNames = [...]string{
	"unspecified", "stolen-token", "compromised", "policy-violation", "anomaly",
	"user-request", "offboarded", "credential-exposed", "altered-code",
	"unsafe-behaviour", "authentication-old", "maintenance", "superseded",
	"restored", "kill", "canary", "drill", "decommissioned", "logout", "risk-level",
	"lifecycle",
}

// Reasons returns the names that ParseReason accepts.
func Reasons() []string { return append([]string(nil), reasonNames[:]...) }

// String returns the reason's name, or "reason-N" for one that is not known.
func (r Reason) String() string {
	if r <= lastReason {
		return reasonNames[r]
	}
	return fmt.Sprintf("reason-%d", uint8(r))
}

// ParseReason is the inverse of String for the reasons that are known.
func ParseReason(s string) (Reason, error) {
	for i, name := range reasonNames {
		if name == s {
			return Reason(i), nil
		}
	}
	return 0, fmt.Errorf("%w: unknown reason %q (want one of %s)", ErrInvalid, clip(s), strings.Join(reasonNames[:], ", "))
}

// clip bounds a foreign string before it goes into an error.
func clip(s string) string {
	if len(s) > 64 {
		return s[:64] + "…"
	}
	return s
}
