package credential

import (
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/interlock-fabric/interlock/pkg/session"
)

// Bounds of what comes from outside.
const (
	// MaxTokenLen bounds a token, in bytes.
	MaxTokenLen = 16 << 10
	// MaxActors bounds the delegation chain.
	MaxActors = 8
	// MaxAncestors bounds the sessions that a session descends from.
	MaxAncestors = 16
	// maxValues bounds every other list in a token. What a decision can look
	// up is bounded further by session.MaxProbes.
	maxValues = session.MaxProbes
	// maxSkew bounds how far an issuer's clock is let be off.
	maxSkew = 5 * time.Minute
)

// Options configures a Verifier. Issuers and Audiences are required.
type Options struct {
	Issuers []Issuer
	// Audiences are the values of `aud` that stand for this resource: a token
	// must carry one of them (RFC 8707 §2, RFC 9068 §4). They are compared in
	// the form that session.Canonical gives them.
	Audiences []string
	// Clock is the local clock; nil is time.Now.
	Clock func() time.Time
	// HTTP fetches key sets; nil is a client of the verifier's own, which
	// follows no redirect.
	HTTP *http.Client
	// Possession is asked about every token that verified and is bound to a
	// key (`cnf`), with the request that presented it, or nil when there is
	// none. An error refuses the token. ProofChecker.Check is one. Nil accepts it
	// as a bearer token.
	Possession func(r *http.Request, token string, id session.Identity) error
	// CacheBytes bounds the memory that verified tokens may take, so that a
	// token that has been seen need not be verified again. Zero is
	// DefaultCacheBytes; less than zero keeps none.
	CacheBytes int64
}

// Issuer is one token issuer that the deployment trusts.
type Issuer struct {
	// URL is the issuer identifier: `iss`, byte for byte.
	URL string
	// Tenant is the tenant of every identity from this issuer.
	Tenant string
	// Keys are static verification keys, JWKS is where to fetch them, and
	// Discover finds out where. At most one of the three is set, and one must be
	// unless there is Introspection.
	Keys jose.JSONWebKeySet
	// JWKS is an https URL, or an http one on a loopback address.
	JWKS string
	// Discover returns the URL of the issuer's JWKS, by its metadata. It is
	// called before each fetch, with the client of Options.HTTP, and must bound
	// what it reads; credential/discovery has one. URL must be fit to be fetched
	// from then, as JWKS.
	Discover func(ctx context.Context, client *http.Client, issuer string) (jwks string, err error)
	// Introspection has opaque tokens verified by asking this issuer. They do
	// not name theirs, so one issuer at most may have it. Nil refuses them.
	Introspection *Introspection
	// Algorithms pins the signature algorithms; nil is ES256, EdDSA, RS256 and
	// PS256. "none" and HMAC are refused here too.
	Algorithms []jose.SignatureAlgorithm
	// Types are the accepted values of the header's `typ`, without
	// "application/", in any case; nil is "at+jwt" and "JWT". An empty string
	// in it accepts a token without one.
	Types []string
	// Skew is how far the issuer's clock may be off; zero is 30 s, at most
	// 5 min.
	Skew time.Duration
	// FixedIssue states that tokens of this issuer can be neither refreshed nor
	// exchanged, so that `iat` counts for issued-before.
	FixedIssue bool
	// RefreshInterval is the least time between two fetches of the JWKS; zero
	// is 15 s.
	RefreshInterval time.Duration
	// KeysMaxAge is how long fetched keys are used while the JWKS cannot be
	// fetched again; zero is 1 h. They are fetched anew after half of it.
	KeysMaxAge time.Duration
	// Claims overrides which claims the identity is taken from.
	Claims Claims
}

// Verifier verifies tokens. It is made by New, is safe for concurrent use, and
// refuses every token once closed, as does its zero value.
type Verifier struct {
	*shared
	audiences []string
}

// shared is what a verifier has in common with those that For makes of it.
type shared struct {
	issuers    map[string]*issuer
	audiences  []string // of the options
	algorithms []jose.SignatureAlgorithm
	clock      func() time.Time
	possession func(*http.Request, string, session.Identity) error
	cache      *tokenCache
	opaque     *introspector
	closing    context.CancelFunc
	closed     atomic.Bool
}

type issuer struct {
	Issuer
	claims *mapping
	keys   keySource
}

// keySource finds the keys that may have signed a token. The error is one of
// this package's.
type keySource interface {
	find(ctx context.Context, kid string, alg jose.SignatureAlgorithm) ([]*verificationKey, error)
	// vouches reports whether a key that find returned is still the issuer's.
	vouches(k *verificationKey, now time.Time) bool
	close()
}

var (
	defaultAlgorithms = []jose.SignatureAlgorithm{jose.ES256, jose.EdDSA, jose.RS256, jose.PS256}
	// everAccepted is what an issuer may pin at all.
	everAccepted = []jose.SignatureAlgorithm{
		jose.ES256, jose.ES384, jose.ES512, jose.EdDSA,
		jose.RS256, jose.RS384, jose.RS512, jose.PS256, jose.PS384, jose.PS512,
	}
	defaultTypes = []string{"at+jwt", "JWT"}
)

// New checks the options and makes a verifier. It does no I/O: the first token
// of an issuer fetches its keys. Errors wrap session.ErrInvalid and say which
// option to mend.
func New(opts Options) (*Verifier, error) {
	bad := func(format string, a ...any) error {
		return fmt.Errorf("%w: credential: %s", session.ErrInvalid, fmt.Sprintf(format, a...))
	}
	if len(opts.Issuers) == 0 {
		return nil, bad("no issuers")
	}
	if len(opts.Audiences) == 0 {
		return nil, bad("no audiences: a token for any resource would be accepted")
	}
	v := &shared{
		issuers: make(map[string]*issuer), clock: opts.Clock, possession: opts.Possession,
	}
	if v.clock == nil {
		v.clock = time.Now
	}
	for _, a := range opts.Audiences {
		a, err := session.Canonical(session.KindAudience, a)
		if err != nil {
			return nil, bad("audience: %v", err)
		}
		v.audiences = append(v.audiences, a)
	}
	client := opts.HTTP
	if client == nil {
		client = newClient()
	}
	ctx, cancel := context.WithCancel(context.Background())
	v.closing = cancel
	var err error
	for _, iss := range opts.Issuers {
		i := &issuer{Issuer: iss}
		if iss.URL == "" || v.issuers[iss.URL] != nil {
			cancel()
			return nil, bad("issuer %q is empty or there twice", iss.URL)
		}
		if err := i.complete(ctx, client, v.clock); err != nil {
			cancel()
			return nil, bad("issuer %s: %v", iss.URL, err)
		}
		v.issuers[iss.URL] = i
		if i.Introspection != nil {
			if v.opaque != nil {
				cancel()
				return nil, bad("issuer %s: another one has Introspection, and opaque tokens do not name theirs", iss.URL)
			}
			if v.opaque, err = newIntrospector(ctx, opts.HTTP, v.clock, i); err != nil {
				cancel()
				return nil, bad("issuer %s: introspection: %v", iss.URL, err)
			}
		}
		for _, alg := range i.Algorithms {
			if !slices.Contains(v.algorithms, alg) {
				v.algorithms = append(v.algorithms, alg)
			}
		}
	}
	if v.cache, err = newTokenCache(opts.CacheBytes); err != nil {
		cancel()
		return nil, bad("CacheBytes: %v", err)
	}
	return &Verifier{v, v.audiences}, nil
}

// For returns a verifier for one of Options.Audiences alone. It shares keys and
// verified tokens with v, and to close either closes both.
func (v *Verifier) For(audience string) (*Verifier, error) {
	a, err := session.Canonical(session.KindAudience, audience)
	if err != nil || v.shared == nil || !slices.Contains(v.shared.audiences, a) {
		return nil, fmt.Errorf("%w: credential: %q is not among the audiences", session.ErrInvalid, audience)
	}
	return &Verifier{v.shared, []string{a}}, nil
}

func (i *issuer) complete(ctx context.Context, client *http.Client, clock func() time.Time) (err error) {
	if _, err := session.Canonical(session.KindIssuer, i.URL); err != nil {
		return err
	}
	if _, err := session.Canonical(session.KindTenant, i.Tenant); err != nil {
		return err
	}
	if i.Algorithms == nil {
		i.Algorithms = defaultAlgorithms
	}
	if len(i.Algorithms) == 0 {
		return errors.New("no algorithms")
	}
	for _, alg := range i.Algorithms {
		if !slices.Contains(everAccepted, alg) {
			return fmt.Errorf("algorithm %q is never accepted", alg)
		}
	}
	if i.Types == nil {
		i.Types = defaultTypes
	}
	if i.Skew == 0 {
		i.Skew = 30 * time.Second
	}
	if i.Skew < 0 || i.Skew > maxSkew {
		return fmt.Errorf("skew %s: want at most %s", i.Skew, maxSkew)
	}
	if i.RefreshInterval <= 0 {
		i.RefreshInterval = 15 * time.Second
	}
	if i.KeysMaxAge <= 0 {
		i.KeysMaxAge = time.Hour
	}
	if i.claims, err = i.Claims.compile(); err != nil {
		return err
	}
	sources := 0
	for _, set := range []bool{len(i.Issuer.Keys.Keys) > 0, i.JWKS != "", i.Discover != nil} {
		if set {
			sources++
		}
	}
	switch {
	case sources > 1 || sources == 0 && i.Introspection == nil:
		return errors.New("want one of Keys, JWKS and Discover")
	case i.JWKS != "" || i.Discover != nil:
		i.keys, err = newRemoteKeys(ctx, client, clock, &i.Issuer)
	default:
		i.keys, err = newStaticKeys(i.Issuer.Keys)
	}
	return err
}

// Close ends fetches that are under way, forgets the tokens that it knew and
// joins every goroutine. It is idempotent.
func (v *Verifier) Close() {
	if v.shared == nil {
		return
	}
	v.closed.Store(true)
	v.closing()
	for _, i := range v.issuers {
		i.keys.close()
	}
	if v.opaque != nil {
		v.opaque.close()
	}
	v.cache.close()
}

// Preparer derives the keys of an identity. Every enforcer is one.
type Preparer = interface {
	Prepare(session.Identity) (*session.Prepared, error)
}

// VerifyRequest verifies the token in the request's Authorization header, of
// scheme Bearer (RFC 6750 §2.1) or DPoP (RFC 9449 §7.1); a token anywhere else is
// not looked at. It is Verify otherwise.
func (v *Verifier) VerifyRequest(r *http.Request) (session.Identity, error) {
	t, err := v.request(r)
	if err != nil {
		return session.Identity{}, err
	}
	return t.id, nil
}

// PrepareRequest is VerifyRequest and by.Prepare. What Prepare returned is kept
// with the token, for as long as by, which must be a pointer for that, is the
// one that asks: a request with a token that has been seen costs a hash and a
// lookup. Errors are those of VerifyRequest and of by.
func (v *Verifier) PrepareRequest(r *http.Request, by Preparer) (*session.Prepared, error) {
	t, err := v.request(r)
	if err != nil {
		return nil, err
	}
	return t.prepare(by)
}

func (v *Verifier) request(r *http.Request) (*verified, error) {
	values := r.Header.Values("Authorization")
	if len(values) == 0 {
		return nil, ErrTokenMissing
	}
	scheme, token, ok := strings.Cut(values[0], " ")
	dpop := strings.EqualFold(scheme, "DPoP")
	if len(values) > 1 || !ok || !dpop && !strings.EqualFold(scheme, "Bearer") {
		return nil, ErrTokenMalformed.because("want one Authorization header with a Bearer or DPoP token")
	}
	t, err := v.verify(r.Context(), strings.TrimLeft(token, " "), r)
	if err == nil && dpop && (v.possession == nil || !t.bound) {
		// Nobody has looked at its proof (RFC 9449 §7.1).
		return nil, ErrTokenPossession.because("the scheme is DPoP and the token is bound to no key")
	}
	return t, err
}

// Verify verifies a token that arrived by another way than a request, such as
// an environment variable. It waits only where the issuer's keys have to be
// fetched, or the issuer asked about an opaque token, no longer than ctx allows. The slices of the identity must not be
// changed: they are kept with the token. The error wraps ErrToken.
func (v *Verifier) Verify(ctx context.Context, token string) (session.Identity, error) {
	t, err := v.verify(ctx, token, nil)
	if err != nil {
		return session.Identity{}, err
	}
	return t.id, nil
}

// VerifyAudiences is Verify, and says which of the audiences the token is for, in
// canonical form: of those in Options, or of the one that For was given.
func (v *Verifier) VerifyAudiences(ctx context.Context, token string) (id session.Identity, audiences []string, err error) {
	t, err := v.verify(ctx, token, nil)
	if err != nil {
		return session.Identity{}, nil, err
	}
	for _, a := range t.audiences {
		if slices.Contains(v.audiences, a) && !slices.Contains(audiences, a) {
			audiences = append(audiences, a)
		}
	}
	return t.id, audiences, nil
}

// verify is what every request goes through. A token that has been seen is not
// verified again, but what time, place and the issuer's keys say of it is asked
// each time.
func (v *Verifier) verify(ctx context.Context, token string, r *http.Request) (*verified, error) {
	if token == "" {
		return nil, ErrTokenMissing
	}
	if len(token) > MaxTokenLen {
		return nil, ErrTokenMalformed.because("too long")
	}
	if v.shared == nil || v.closed.Load() {
		return nil, ErrTokenKeys.because("the verifier is closed")
	}
	now := v.clock()
	sum := sumOf(token)
	t := v.cache.get(&sum)
	if t != nil && t.vouched(now) {
		v.cache.count(true)
		if err := v.admits(t, now); err != nil {
			return nil, err
		}
	} else {
		v.cache.count(false)
		var err error
		if v.opaque != nil && opaque(token) {
			t, err = v.introspect(ctx, token, &sum)
		} else {
			t, err = v.authenticate(ctx, token)
		}
		if err != nil {
			return nil, err
		}
		// To ask the issuer takes time.
		v.cache.put(&sum, t, v.clock())
	}
	if t.bound && v.possession != nil {
		if err := v.possession(r, token, t.id); errors.Is(err, ErrTokenPossession) {
			return nil, err
		} else if err != nil {
			return nil, errors.Join(ErrTokenPossession, err)
		}
	}
	return t, nil
}

// authenticate finds out whose token it is, from the token alone.
func (v *Verifier) authenticate(ctx context.Context, token string) (*verified, error) {
	if !canonical(token) {
		return nil, ErrTokenMalformed.because("not canonical base64url")
	}
	jws, err := jose.ParseSignedCompact(token, v.algorithms)
	if err != nil {
		var alg *jose.ErrUnexpectedSignatureAlgorithm
		if errors.As(err, &alg) {
			return nil, ErrTokenAlgorithm
		}
		return nil, ErrTokenMalformed
	}
	header := jws.Signatures[0].Protected
	if _, critical := header.ExtraHeaders["crit"]; critical {
		return nil, ErrTokenMalformed.because("a critical header extension")
	}
	// The claims are read before the signature is verified only to find out
	// whose keys to verify with.
	claims, err := parseClaims(jws.UnsafePayloadWithoutVerification())
	if err != nil {
		return nil, err
	}
	iss, err := claims.text("iss")
	if err != nil {
		return nil, err
	}
	i := v.issuers[iss]
	if i == nil {
		return nil, ErrTokenIssuer
	}
	alg := jose.SignatureAlgorithm(header.Algorithm)
	if !slices.Contains(i.Algorithms, alg) {
		return nil, ErrTokenAlgorithm
	}
	if !i.accepts(header.ExtraHeaders[jose.HeaderType]) {
		return nil, ErrTokenType
	}
	keys, err := i.keys.find(ctx, header.KeyID, alg)
	if err != nil {
		return nil, err
	}
	signer := slices.IndexFunc(keys, func(k *verificationKey) bool {
		_, err := jws.Verify(k.Key)
		return err == nil
	})
	if signer < 0 {
		return nil, ErrTokenSignature
	}

	t := &verified{issuer: i, key: keys[signer]}
	if err := v.read(t, claims); err != nil {
		return nil, err
	}
	t.id.Token = session.TokenValue(t.id.Token, []byte(token[:strings.LastIndexByte(token, '.')]))
	return t, nil
}

// read takes from verified claims what is kept of a token, if it is good now.
func (v *Verifier) read(t *verified, c claims) error {
	audiences, err := c.list("aud")
	if err != nil {
		return err
	}
	for _, a := range audiences {
		if a, err := session.Canonical(session.KindAudience, a); err == nil {
			if i := slices.Index(v.shared.audiences, a); i >= 0 {
				t.audiences = append(t.audiences, v.shared.audiences[i])
			}
		}
	}
	if audiences == nil && t.key == nil && t.issuer.Introspection.AudienceImplied {
		t.audiences = v.shared.audiences
	}
	exp, err := c.time("exp")
	if err != nil {
		return err
	}
	if !exp.IsZero() {
		t.until = exp.Add(t.issuer.Skew)
	} else if t.key != nil {
		return ErrTokenClaims.because("exp is missing")
	}
	for _, name := range []string{"nbf", "iat"} {
		at, err := c.time(name)
		if err != nil {
			return err
		}
		if at = at.Add(-t.issuer.Skew); at.After(t.from) {
			t.from = at
		}
	}
	if err := v.admits(t, v.clock()); err != nil {
		return err
	}
	if t.id, err = t.issuer.claims.identity(c); err != nil {
		return err
	}
	_, t.bound = c["cnf"]
	t.id.Tenant, t.id.FixedIssue, t.id.Skew = t.issuer.Tenant, t.issuer.FixedIssue, t.issuer.Skew
	return nil
}

// admits checks what RFC 9068 §4 and RFC 7519 §4.1 ask of every token, each time
// that it is used.
func (v *Verifier) admits(t *verified, now time.Time) error {
	switch {
	case !slices.ContainsFunc(t.audiences, func(a string) bool { return slices.Contains(v.audiences, a) }):
		return ErrTokenAudience
	case !t.until.IsZero() && !now.Before(t.until):
		return ErrTokenExpired
	case t.from.After(now):
		return ErrTokenNotYet
	}
	return nil
}

// canonical reports whether every part of the token is base64url in the one form
// that its bytes have. The signature covers the bytes, as they are encoded
// again: in another form, with line breaks or stray bits in the last character,
// a token that is known by the hash of its signing input would still verify,
// and be another token to every decision on it.
func canonical(token string) bool {
	for part := range strings.SplitSeq(token, ".") {
		if strings.ContainsAny(part, "\r\n") {
			return false
		}
		if _, err := base64.RawURLEncoding.Strict().DecodeString(part); err != nil {
			return false
		}
	}
	return true
}

func (i *issuer) accepts(typ any) bool {
	if typ == nil {
		return slices.Contains(i.Types, "")
	}
	s, ok := typ.(string)
	if len(s) > len("application/") && strings.EqualFold(s[:len("application/")], "application/") {
		s = s[len("application/"):]
	}
	return ok && s != "" && slices.ContainsFunc(i.Types, func(t string) bool { return strings.EqualFold(t, s) })
}

// fits reports whether a key may verify this algorithm: its type and curve, and
// what it says of itself. It keeps a public key from ever being tried as
// another algorithm's.
func fits(k *jose.JSONWebKey, alg jose.SignatureAlgorithm) bool {
	if k.Use != "" && k.Use != "sig" || k.Algorithm != "" && k.Algorithm != string(alg) {
		return false
	}
	switch key := k.Key.(type) {
	case *ecdsa.PublicKey:
		switch alg {
		case jose.ES256:
			return key.Params().BitSize == 256
		case jose.ES384:
			return key.Params().BitSize == 384
		case jose.ES512:
			return key.Params().BitSize == 521
		}
	case ed25519.PublicKey:
		return alg == jose.EdDSA
	case *rsa.PublicKey:
		return strings.HasPrefix(string(alg), "RS") || strings.HasPrefix(string(alg), "PS")
	}
	return false
}

// usable reports why a key must not be in a set of verification keys.
func usable(k *jose.JSONWebKey) error {
	switch key := k.Key.(type) {
	case *ecdsa.PublicKey, ed25519.PublicKey:
	case *rsa.PublicKey:
		if key.N.BitLen() < 2048 {
			return errors.New("an RSA key of less than 2048 bits")
		}
	default:
		return errors.New("a key that is not the public half of a signing key")
	}
	if !k.Valid() {
		return errors.New("an invalid key")
	}
	return nil
}
