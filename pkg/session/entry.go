package session

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"fmt"
	"slices"
	"time"
)

// MaxBatchEntries bounds the entries of one batch.
const MaxBatchEntries = 1000

// MaxACRLen bounds an authentication context class, in bytes.
const MaxACRLen = 64

// MaxExcept bounds the exemptions of one entry.
const MaxExcept = 8

// Op is what an entry does to the state.
type Op uint8

const (
	// OpSet puts an effect in force on a key, or makes one that is in force
	// stricter. It never weakens what is there.
	OpSet Op = 1
	// OpLift ends an effect on a key, or, with a Share, ends it for that share
	// of the sessions.
	OpLift Op = 2
)

// Entry is one change of the state, as the log carries it.
type Entry struct {
	Op     Op
	Effect Effect
	Reason Reason
	Key    Key
	// IssuedBefore, when set, restricts the entry to identities from before
	// that instant. On a lift of EffectRevoked it is required, and is what
	// stays behind. A lift of any other effect that has one lifts nothing that
	// was decided after it.
	IssuedBefore Instant
	// Expires is when the entry has nothing left to match, and for an effect
	// other than EffectRevoked also when it ends by itself. Zero stands until
	// lifted.
	Expires Instant
	// Incident ends up in every denial; at most MaxIncidentLen bytes.
	Incident string
	// ACR is what EffectStepUp requires; empty accepts any later
	// authentication.
	ACR string
	// Except are keys of callers that the entry does not touch. Critical.
	Except []Key
	// Share, of ShareUnit, is the part of the sessions that a staged restore
	// has set free. Critical.
	Share uint16
	// Drill entries are matched and reported, and deny nobody. Critical.
	Drill bool
	// Unknown holds fields of a later version that an enforcer may ignore.
	Unknown []Field
}

// Field is a field that this version does not know and that is not critical. A
// record's Unknown is what parsing found, in ascending order of tags; at most 16
// of them are kept, of 4096 bytes with their headers.
type Field struct {
	Tag   uint8
	Value []byte
}

// Tags of an entry's optional fields. The high bit marks a critical one.
const (
	tagIncident uint8 = 1
	tagACR      uint8 = 2
	tagExcept   uint8 = 3 | critical
	tagShare    uint8 = 4 | critical
	tagDrill    uint8 = 5 | critical

	critical uint8 = 0x80
)

// Validate reports, wrapping ErrMalformed, what makes the entry one that no
// authority may publish and no enforcer may apply.
func (e *Entry) Validate() error {
	bad := func(format string, a ...any) error {
		return fmt.Errorf("%w: entry: %s", ErrMalformed, fmt.Sprintf(format, a...))
	}
	if err := e.Key.Valid(); err != nil {
		return err
	}
	if e.Op != OpSet && e.Op != OpLift {
		return fmt.Errorf("%w: entry operation %d", ErrCritical, e.Op)
	}
	if !e.Effect.Valid() {
		return fmt.Errorf("%w: %s", ErrCritical, e.Effect)
	}
	if e.IssuedBefore < 0 || e.Expires < 0 {
		return bad("negative time")
	}
	if e.Incident != "" {
		if err := checkText("incident", e.Incident, MaxIncidentLen); err != nil {
			return bad("%v", err)
		}
	}
	if e.ACR != "" {
		if e.Effect != EffectStepUp || e.Op != OpSet {
			return bad("acr on %s", e.Effect)
		}
		if err := checkText("acr", e.ACR, MaxACRLen); err != nil {
			return bad("%v", err)
		}
	}
	if len(e.Except) > MaxExcept {
		return bad("%d exemptions, at most %d", len(e.Except), MaxExcept)
	}
	for i, k := range e.Except {
		if err := k.Valid(); err != nil {
			return err
		}
		if k.Shape.PerCall() || k.Shape <= Shape(KindTenant) {
			return bad("exemption of %s", k.Shape)
		}
		if i > 0 && compareKeys(e.Except[i-1], k) >= 0 {
			return bad("exemptions are not in order")
		}
	}
	lift := e.Op == OpLift
	switch {
	case lift && len(e.Except) > 0:
		return bad("a lift has no exemptions")
	case e.Share > ShareUnit:
		return bad("share %d of %d", e.Share, ShareUnit)
	case e.Share > 0 && !lift:
		return bad("share on a set: a staged restore is a lift")
	case lift && e.Effect == EffectRevoked && e.Key.Shape.Terminal() && !e.Drill:
		return bad("a revoked %s cannot be restored", e.Key.Shape)
	case lift && e.Effect == EffectRevoked && e.IssuedBefore == 0 && !e.Drill:
		return bad("restoring a revoked %s must leave an issued-before behind", e.Key.Shape)
	case lift && e.Share > 0 && e.Effect == EffectRevoked:
		return bad("a staged restore of what is revoked: its sessions stay dead")
	case lift && e.Expires != 0 && e.IssuedBefore == 0:
		return bad("expiry on a lift")
	case e.Effect == EffectRevoked && e.Expires != 0 && !e.mayExpire():
		return bad("a revoked %s stands until lifted: what future credentials can match must not expire", e.Key.Shape)
	}
	return checkUnknown(e.Unknown, tagIncident, tagACR, tagExcept, tagShare, tagDrill)
}

func (e *Entry) mayExpire() bool {
	if e.IssuedBefore != 0 {
		return true
	}
	switch Kind(e.Key.Shape) {
	case KindSession, KindToken, KindCredential:
		return true
	}
	return e.Key.Shape == ShapeSessionTool
}

func compareKeys(a, b Key) int {
	return cmp.Or(cmp.Compare(a.Tenant, b.Tenant), cmp.Compare(a.Shape, b.Shape), bytes.Compare(a.Digest[:], b.Digest[:]))
}

// SortKeys puts exemptions into the one order that the wire accepts and drops
// repeated ones.
func SortKeys(keys []Key) []Key {
	slices.SortFunc(keys, compareKeys)
	return slices.Compact(keys)
}

// Record is an entry in force: what the state holds under a key.
type Record struct {
	Effect       Effect
	Reason       Reason
	Drill        bool
	Share        uint16
	IssuedBefore Instant
	Expires      Instant
	// Since is the authority's time of the decision.
	Since Instant
	// Seq is the number of the batch that brought it.
	Seq      uint64
	Incident string
	ACR      string
	Except   []Key
}

// Moment is what a verdict needs to know of time. Lifting, which is what an end
// of a suspension is, goes by the authority's clock alone and its earliest
// estimate, so that a local clock that runs fast frees nobody.
type Moment struct {
	// Authority is the earliest that the authority's clock can now show.
	Authority Instant
}

// Matches reports whether the record, found under one of p's keys, denies this
// call of p. For a drill it reports whether it would.
func (r *Record) Matches(p *Prepared, call *Call, now Moment) bool {
	if r.Effect != EffectRevoked && r.Expires != 0 && now.Authority >= r.Expires {
		return false
	}
	if r.IssuedBefore != 0 && p.origin != 0 && p.origin >= r.IssuedBefore.Add(p.skew) {
		return false
	}
	if r.Share != 0 && p.bucket < r.Share {
		return false
	}
	switch r.Effect {
	case EffectReduced:
		if call.LowRisk {
			return false
		}
	case EffectStepUp:
		if p.auth > r.Since && (r.ACR == "" || r.ACR == p.id.ACR) {
			return false
		}
	}
	for i := range r.Except {
		for j := range p.keys {
			if p.keys[j] == r.Except[i] {
				return false
			}
		}
	}
	return true
}

// Denial says to the caller what the record says.
func (r *Record) Denial(shape Shape, provisional bool) Denial {
	d := Denial{
		Effect: r.Effect, Reason: r.Reason, Incident: r.Incident, Shape: shape, Seq: r.Seq,
		Provisional: provisional, ACR: r.ACR, IssuedBefore: r.IssuedBefore,
	}
	if r.Effect != EffectRevoked {
		d.Until = r.Expires
	}
	return d
}

// StateDigest is an order-independent sum over the records in force: equal
// states have equal sums, whatever the way to them. It is four 64-bit sums of
// the SHA-256 of each record's canonical bytes.
type StateDigest [sha256.Size]byte

// Hash identifies a frame by the SHA-256 of its signed content.
type Hash [sha256.Size]byte

// BatchTTL is how long after its time a batch that never reached the log stays
// provisional at most, once the log is fresh again.
const BatchTTL = 60 * time.Second

// DecisionID identifies a decision by the hash of its idempotency key, so that
// a decision that is sent twice is taken once.
type DecisionID [16]byte

// DecisionRef says which entries of a batch belong to a decision: the next
// Count, in order.
type DecisionRef struct {
	ID    DecisionID
	Count uint16
}

// Batch is one link of the log: the entries of one or more decisions, in the
// order in which they apply. Batch numbers are the authority's own and have no
// holes.
type Batch struct {
	Epoch  uint64
	Number uint64
	// Prev is the hash of the batch before, or the epoch's origin.
	Prev Hash
	// Time is the authority's clock.
	Time Instant
	// Deadline is when the batch falls away if a fresh log does not have it.
	Deadline Instant
	// Horizon is the authority's promise that nothing with an Expires at or
	// before it can match any more: such entries leave the state here. It never
	// goes back.
	Horizon   Instant
	Decisions []DecisionRef
	Entries   []Entry
	Unknown   []Field
}
