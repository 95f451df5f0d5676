package session

import (
	"errors"
	"fmt"
	"time"
)

// The errors form a small tree. A host reacts to the parent; logs and audit
// read the detail from DeniedError.
var (
	// ErrInvalid is the parent of every refusal of malformed input: a value, a
	// target, an identity. The caller mends the input.
	ErrInvalid = errors.New("invalid")
	// ErrNoIssuer: the value is unique only with the issuer that minted it, and
	// there is none. It wraps ErrInvalid.
	ErrNoIssuer = fmt.Errorf("%w: needs the issuer that minted it", ErrInvalid)

	// ErrDenied is the parent of every reason an enforcer does not allow a
	// request.
	ErrDenied = errors.New("denied")
	// ErrRevoked: an entry in force with EffectRevoked matches the caller.
	ErrRevoked = fmt.Errorf("%w: revoked", ErrDenied)
	// ErrSuspended: an entry in force with EffectSuspended matches the caller.
	ErrSuspended = fmt.Errorf("%w: suspended", ErrDenied)
	// ErrStepUp: the caller must authenticate again (RFC 9470).
	ErrStepUp = fmt.Errorf("%w: step-up authentication required", ErrDenied)
	// ErrReduced: the caller may only use operations marked low-risk.
	ErrReduced = fmt.Errorf("%w: only low-risk operations are permitted", ErrDenied)
	// ErrStale: the enforcer cannot show that its state is recent enough, or
	// has none yet.
	ErrStale = fmt.Errorf("%w: revocation state is stale", ErrDenied)
	// ErrNoIdentity: no identity that this enforcer can check was presented.
	ErrNoIdentity = fmt.Errorf("%w: no verified identity", ErrDenied)
	// ErrExpired: the caller's credential has expired.
	ErrExpired = fmt.Errorf("%w: credential expired", ErrDenied)
	// ErrUnregistered: the enforcer admits only sessions that the authority
	// knows, and this is none.
	ErrUnregistered = fmt.Errorf("%w: session is not registered", ErrDenied)
	// ErrDigest: the code, model or image that the caller runs is not what its
	// agent is registered with, or was not shown to be.
	ErrDigest = fmt.Errorf("%w: digest is not registered for the agent", ErrDenied)
	// ErrOverloaded: a bound of the enforcer was reached, so it cannot promise
	// to end the work later.
	ErrOverloaded = fmt.Errorf("%w: enforcer at its limit", ErrDenied)
	// ErrClosed: the enforcer has been closed.
	ErrClosed = fmt.Errorf("%w: enforcer closed", ErrDenied)

	// ErrFrame is the parent of every refusal of bytes from the wire.
	ErrFrame = errors.New("frame refused")
	// ErrMalformed: the bytes are not a frame or body of this version.
	ErrMalformed = fmt.Errorf("%w: malformed", ErrFrame)
	// ErrVersion: the version is not one that this code knows.
	ErrVersion = fmt.Errorf("%w: unknown version", ErrFrame)
	// ErrCritical: a critical field that this code does not know.
	ErrCritical = fmt.Errorf("%w: unknown critical field", ErrFrame)
	// ErrSignature: the signature does not verify.
	ErrSignature = fmt.Errorf("%w: bad signature", ErrFrame)
	// ErrUntrusted: the key is not trusted for this, now, or at this number.
	ErrUntrusted = fmt.Errorf("%w: key not trusted", ErrFrame)
)

// Denial is one reason for a denial: what an entry in force says.
type Denial struct {
	Effect   Effect
	Reason   Reason
	Incident string
	// Shape is what the matching entry names.
	Shape Shape
	// Seq is the number of the batch that brought the entry.
	Seq uint64
	// Provisional is set while the batch has been heard but not yet confirmed
	// to be in the log.
	Provisional bool
	// Until is when a suspension ends by itself, if it does.
	Until Instant
	// ACR is the authentication context that a step-up requires, if any.
	ACR string
	// IssuedBefore is the instant before which identities match, if the entry
	// is bounded so.
	IssuedBefore Instant
}

// DeniedError is the error of a denied check. It unwraps to one of ErrRevoked,
// ErrSuspended, ErrStepUp, ErrReduced, ErrStale, ErrNoIdentity, ErrExpired,
// ErrUnregistered, ErrDigest, ErrOverloaded or ErrClosed, all of which wrap ErrDenied. Its text
// carries no identity, token or target value and is fit for the caller.
type DeniedError struct {
	// Denial is set when an entry matched; its Effect is zero otherwise.
	Denial
	// Err is the sentinel.
	Err error
	// Age is how old the state was, when Err is ErrStale and an age is known.
	Age time.Duration
	// Detail says more about why, in fixed words.
	Detail string
}

// Unwrap returns the sentinel, ErrDenied when there is none.
func (e *DeniedError) Unwrap() error {
	if e.Err == nil {
		return ErrDenied
	}
	return e.Err
}

// Error says what, why, and which incident.
func (e *DeniedError) Error() string {
	s := e.Unwrap().Error()
	if e.Effect == 0 {
		if e.Detail != "" {
			return s + ": " + e.Detail
		}
		return s
	}
	s += ": " + e.Reason.String()
	if e.Incident != "" {
		return fmt.Sprintf("%s (seq %d, %s)", s, e.Seq, e.Incident)
	}
	return fmt.Sprintf("%s (seq %d)", s, e.Seq)
}

// Sentinel returns the error that stands for an effect.
func (e Effect) Sentinel() error {
	switch e {
	case EffectRevoked:
		return ErrRevoked
	case EffectSuspended:
		return ErrSuspended
	case EffectStepUp:
		return ErrStepUp
	case EffectReduced:
		return ErrReduced
	}
	return ErrDenied
}
