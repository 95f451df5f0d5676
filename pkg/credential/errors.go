package credential

import "github.com/interlock-fabric/interlock/pkg/session"

// Every refusal wraps ErrToken, which wraps session.ErrNoIdentity, so that a
// host need only know the errors of package session. No text carries any part
// of a token: it names claims at most, and is fit for the caller.
var (
	// ErrToken is the parent of every refusal of a token.
	ErrToken = &refusal{"token refused", []error{session.ErrNoIdentity}}
	// ErrTokenMissing: the request carries no token.
	ErrTokenMissing = refused("no bearer token")
	// ErrTokenMalformed: it is neither a signed JWT in compact form nor, where
	// those are accepted, an opaque token; or it is too long, names a member
	// twice, or has a critical header extension.
	ErrTokenMalformed = refused("malformed")
	// ErrTokenAlgorithm: it is signed with an algorithm that is not pinned for
	// its issuer.
	ErrTokenAlgorithm = refused("signature algorithm not accepted")
	// ErrTokenType: its `typ` is that of another kind of JWT.
	ErrTokenType = refused("not an access token")
	// ErrTokenIssuer: its issuer is not configured.
	ErrTokenIssuer = refused("unknown issuer")
	// ErrTokenKey: its issuer has no such key.
	ErrTokenKey = refused("unknown signing key")
	// ErrTokenSignature: the signature does not verify.
	ErrTokenSignature = refused("bad signature")
	// ErrTokenAudience: it was issued for another resource (RFC 8707).
	ErrTokenAudience = refused("issued for another audience")
	// ErrTokenNotYet: it is not valid yet, or was issued in the future.
	ErrTokenNotYet = refused("not valid yet")
	// ErrTokenClaims: a claim is missing or malformed.
	ErrTokenClaims = refused("claims")
	// ErrTokenPossession: the caller did not prove possession of the key that
	// the token is bound to.
	ErrTokenPossession = refused("proof of possession")
	// ErrTokenNonce: the proof of possession lacks a nonce of the server's, or
	// the one it has is too old. It wraps ErrTokenPossession; a
	// ProofError carries the one to use (RFC 9449 §9).
	ErrTokenNonce = &refusal{"token refused: the proof of possession needs a fresh nonce", []error{ErrTokenPossession}}
	// ErrTokenProofs: too many proofs of possession are remembered to tell
	// whether this one is new. It wraps session.ErrStale too, and the caller may
	// try again.
	ErrTokenProofs = &refusal{"token refused: too many proofs of possession at once", []error{ErrTokenPossession, session.ErrStale}}
	// ErrTokenInactive: its issuer says that it is not active (RFC 7662 §2.2).
	ErrTokenInactive = refused("not active")
	// ErrTokenIntrospection: its issuer cannot be asked about it now, or gives
	// no answer that could be understood. It wraps session.ErrStale too, and the
	// caller may try again.
	ErrTokenIntrospection = &refusal{"token refused: the issuer cannot be asked about it", []error{ErrToken, session.ErrStale}}
	// ErrTokenExpired: it has expired. It wraps session.ErrExpired too.
	ErrTokenExpired = &refusal{"token refused: expired", []error{ErrToken, session.ErrExpired}}
	// ErrTokenKeys: the issuer's keys are not known, or were fetched too long
	// ago, and cannot be fetched now. The token may be good: it wraps
	// session.ErrStale too, and the caller may try again.
	ErrTokenKeys = &refusal{"token refused: the issuer's keys cannot be fetched", []error{ErrToken, session.ErrStale}}
)

type refusal struct {
	text    string
	parents []error
}

func (e *refusal) Error() string   { return e.text }
func (e *refusal) Unwrap() []error { return e.parents }

func refused(why string) *refusal {
	return &refusal{"token refused: " + why, []error{ErrToken}}
}

// because says more about an error, in words that are never the token's own.
func (e *refusal) because(detail string) error {
	return &refusal{e.text + ": " + detail, []error{e}}
}
