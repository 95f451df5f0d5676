package session

import (
	"encoding/hex"
	"fmt"
	"slices"
)

// CanaryIssuer is the issuer of canary sessions, which are nobody's: the
// authority revokes one every few seconds, and every enforcer then checks that it
// denies it.
const CanaryIssuer = "urn:interlock:canary"

// CanarySession is the session that the canary of that decision revokes, in each
// tenant that the decision has an entry for.
func CanarySession(id DecisionID) SessionRef {
	return SessionRef{Issuer: CanaryIssuer, ID: hex.EncodeToString(id[:])}
}

// CanaryEntry is the entry by which a decision revokes its canary in a tenant.
// The entry has nothing left to match when it expires.
func (s *TenantSecret) CanaryEntry(id DecisionID, expires Instant) (Entry, error) {
	ref := CanarySession(id)
	key, err := s.Key(Target{Tenant: s.name, Terms: []Term{{Kind: KindSession, Issuer: ref.Issuer, Value: ref.ID}}})
	if err != nil {
		return Entry{}, err
	}
	return Entry{Op: OpSet, Effect: EffectRevoked, Reason: ReasonCanary, Key: key, Expires: expires}, nil
}

// CanaryCaller is a caller in the canary session of that decision.
func (s *TenantSecret) CanaryCaller(id DecisionID) (*Prepared, error) {
	return s.Prepare(Identity{Tenant: s.name, Issuer: CanaryIssuer, Session: CanarySession(id)})
}

// IsCanary reports whether the batch revokes canaries and does nothing else.
func (b *Batch) IsCanary() bool {
	return len(b.Entries) > 0 && !slices.ContainsFunc(b.Entries, func(e Entry) bool { return e.Reason != ReasonCanary || e.Op != OpSet })
}

// Canary is what an enforcer found when it checked a caller of the canary session
// of a batch, in each of its tenants that the batch has one for.
type Canary struct {
	// Number is the batch's.
	Number uint64
	// At is when the check was made, in nanoseconds on the authority's wall
	// clock; Receipt.Error bounds how far that may be off.
	At int64
	// Denied is set when each of them was denied, as an ordinary caller is.
	Denied bool
}

// tagCanary is the field of a receipt that holds a Canary.
const tagCanary = 2

func (c *Canary) field() []Field {
	if c == nil {
		return nil
	}
	var w writer
	w.u64(c.Number)
	w.u64(uint64(c.At))
	var denied uint8
	if c.Denied {
		denied = 1
	}
	w.u8(denied)
	return []Field{{Tag: tagCanary, Value: w.b}}
}

func readCanary(r *reader) *Canary {
	c := &Canary{Number: r.u64(), At: int64(r.u64())}
	denied := r.u8()
	if c.Denied = denied == 1; denied > 1 {
		r.fail("canary")
	}
	return c
}

// String says it in words.
func (c *Canary) String() string {
	if c.Denied {
		return fmt.Sprintf("the canary at seq %d was denied", c.Number)
	}
	return fmt.Sprintf("the canary at seq %d was allowed", c.Number)
}
