package credential

import (
	"crypto"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/interlock-fabric/interlock/pkg/session"
)

// Bounds of proofs of possession.
const (
	// MaxProofLen bounds a DPoP proof, in bytes.
	MaxProofLen = 8 << 10
	// DefaultMaxProofs is how many proofs are remembered at once.
	DefaultMaxProofs = 1 << 18
	// DefaultProofAge is how old a proof may be.
	DefaultProofAge = time.Minute
	// maxProofAge is the longest that one may be.
	maxProofAge = 5 * time.Minute
	// proofSkew is how far a client's clock may be ahead.
	proofSkew = 10 * time.Second
	// proofSlots is how many steps a proof's age is divided into: what is older
	// is forgotten a step at a time.
	proofSlots = 8
	// shareOfKey is the part of all remembered proofs that one key may have, so
	// that no single client can have all others denied.
	shareOfKey = 4
	maxJTILen  = 256
	nonceLen   = 8 + 16
)

// ProofOptions configures a ProofChecker. The zero value checks certificates, and
// refuses every DPoP proof.
type ProofOptions struct {
	// Origin is the scheme and authority by which clients know this server, as
	// in "https://tools.example", which the URL in a DPoP proof must begin with.
	Origin string
	// OriginOf takes the place of Origin where resources have several. It must
	// not believe what a client says of the host, or a proof that was made for
	// another server would be accepted from whoever names that. "" refuses.
	OriginOf func(*http.Request) string
	// MaxAge is how old a DPoP proof may be; zero is DefaultProofAge, at most
	// 5 min.
	MaxAge time.Duration
	// MaxProofs bounds the proofs that are remembered, at some 250 bytes each at
	// the worst; zero is DefaultMaxProofs. A proof is remembered until it is too
	// old, and when there is no room for more, proofs are refused. One key may
	// have a quarter of them.
	MaxProofs int
	// NonceKey demands a nonce of the server's in every proof (RFC 9449 §9),
	// made under this key of at least 32 bytes, which all servers of a resource
	// must share. Nil demands none.
	NonceKey []byte
	// Certificate returns the client's certificate, where something in front
	// ends TLS and says what it was. Whoever can send the request past that must
	// not be able to choose it. Nil takes it from the connection.
	Certificate func(*http.Request) *x509.Certificate
	// Clock is the local clock; nil is time.Now.
	Clock func() time.Time
}

// ProofChecker checks that whoever presents a token has the key that it is
// bound to: a DPoP proof (RFC 9449) for `cnf.jkt`, a client certificate (RFC
// 8705) for `cnf.x5t#S256`, both where the token has both. Its Check is for
// Options.Possession. It is made by NewProofChecker, is safe for concurrent use,
// and needs no closing; its zero value refuses everything.
//
// It remembers every proof that it has accepted until that is too old, and
// accepts none twice. It knows only its own: a proof that was captured can be
// used once at each other server of the resource, and none whose `iat` lies
// before the second in which the checker was made is accepted, since they may
// have been seen by the one before. NonceKey does not change the first.
type ProofChecker struct {
	opts ProofOptions
	seen *seenProofs
}

var proofAlgorithms = []jose.SignatureAlgorithm{jose.ES256, jose.ES384, jose.ES512, jose.EdDSA, jose.RS256, jose.PS256}

// NewProofChecker checks the options and makes a checker. Errors wrap
// session.ErrInvalid.
func NewProofChecker(o ProofOptions) (*ProofChecker, error) {
	bad := func(format string, a ...any) (*ProofChecker, error) {
		return nil, fmt.Errorf("%w: credential: %s", session.ErrInvalid, fmt.Sprintf(format, a...))
	}
	c := &ProofChecker{opts: o}
	if o.Origin != "" {
		u, err := url.Parse(o.Origin)
		if err != nil || u.Scheme != "https" && u.Scheme != "http" || u.Host == "" || u.User != nil ||
			u.Path != "" && u.Path != "/" || u.RawQuery != "" || u.Fragment != "" {
			return bad("Origin %q is not a scheme and an authority", o.Origin)
		}
		if o.OriginOf != nil {
			return bad("Origin and OriginOf: want one of them")
		}
		origin := u.Scheme + "://" + u.Host
		c.opts.OriginOf = func(*http.Request) string { return origin }
	}
	if c.opts.MaxAge == 0 {
		c.opts.MaxAge = DefaultProofAge
	}
	if c.opts.MaxAge < time.Second || c.opts.MaxAge > maxProofAge {
		return bad("MaxAge %s: want 1s to %s", o.MaxAge, maxProofAge)
	}
	if c.opts.MaxProofs == 0 {
		c.opts.MaxProofs = DefaultMaxProofs
	}
	if c.opts.MaxProofs < 0 {
		return bad("MaxProofs is %d", o.MaxProofs)
	}
	if o.NonceKey != nil && len(o.NonceKey) < sha256.Size {
		return bad("NonceKey has %d bytes, want %d", len(o.NonceKey), sha256.Size)
	}
	c.opts.NonceKey = slices.Clone(o.NonceKey)
	if o.Clock == nil {
		c.opts.Clock = time.Now
	}
	c.seen = newSeenProofs(c.opts.MaxProofs, c.opts.MaxAge, c.opts.Clock())
	return c, nil
}

// Check is an Options.Possession. Errors wrap ErrTokenPossession.
func (c *ProofChecker) Check(r *http.Request, token string, id session.Identity) error {
	if r == nil || c.seen == nil {
		return ErrTokenPossession.because("no request to prove it with")
	}
	thumbprint := ""
	for _, k := range id.Keys {
		method, sum, _ := strings.Cut(k, ":")
		switch {
		case method == "x5t#S256":
			if err := c.checkCertificate(r, sum); err != nil {
				return err
			}
		case method != "jkt" || thumbprint != "" && thumbprint != sum:
			return ErrTokenPossession.because("the token is bound in a way that is not known here")
		default:
			thumbprint = sum
		}
	}
	scheme, _, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	switch dpop := strings.EqualFold(scheme, "DPoP"); {
	case len(id.Keys) == 0:
		return ErrTokenPossession.because("the token is bound in a way that is not known here")
	case thumbprint == "" && dpop:
		return ErrTokenPossession.because("the scheme is DPoP and the token is not bound to such a key")
	case thumbprint == "":
		return nil
	case !dpop:
		// RFC 9449 §7.1: as a bearer token it must not be accepted.
		return c.again(ErrTokenPossession.because("the token is bound to a key and wants the scheme DPoP"))
	}
	return c.again(c.checkProof(r, token, thumbprint))
}

// ProofError refuses a proof of possession. The caller may try again with
// another; Challenge says how to tell it so. It unwraps to ErrTokenPossession,
// and to ErrTokenNonce where that is the trouble.
type ProofError struct {
	err   error
	nonce string
}

func (e *ProofError) Error() string { return e.err.Error() }
func (e *ProofError) Unwrap() error { return e.err }

// Challenge adds to the header of the answer what RFC 9449 §7.1 and §9 want
// there: a challenge, and the nonce to use where one is wanted. Package denial
// calls it.
func (e *ProofError) Challenge(h http.Header) {
	code := "invalid_dpop_proof"
	if errors.Is(e.err, ErrTokenNonce) {
		code = "use_dpop_nonce"
	}
	algs := make([]string, len(proofAlgorithms))
	for i, alg := range proofAlgorithms {
		algs[i] = string(alg)
	}
	h.Add("WWW-Authenticate", `DPoP error="`+code+`", algs="`+strings.Join(algs, " ")+`"`)
	if e.nonce != "" {
		h.Set("DPoP-Nonce", e.nonce)
	}
}

func (c *ProofChecker) again(err error) error {
	if err == nil || errors.Is(err, session.ErrStale) {
		return err
	}
	return &ProofError{err, c.Nonce()}
}

// Nonce is what the answer to ErrTokenNonce carries as DPoP-Nonce; empty
// without a NonceKey.
func (c *ProofChecker) Nonce() string {
	if c.opts.NonceKey == nil {
		return ""
	}
	return c.nonce(c.opts.Clock().Unix() / int64(c.opts.MaxAge/time.Second))
}

// nonce is the one of a period of MaxAge. It needs no memory: what it says is
// only that it is not older than two periods.
func (c *ProofChecker) nonce(period int64) string {
	b := binary.BigEndian.AppendUint64(nil, uint64(period))
	mac := hmac.New(sha256.New, c.opts.NonceKey)
	mac.Write(b)
	return base64.RawURLEncoding.EncodeToString(mac.Sum(b)[:nonceLen])
}

func (c *ProofChecker) fresh(nonce string, now time.Time) bool {
	period := now.Unix() / int64(c.opts.MaxAge/time.Second)
	return hmac.Equal([]byte(nonce), []byte(c.nonce(period))) || hmac.Equal([]byte(nonce), []byte(c.nonce(period-1)))
}

func (c *ProofChecker) checkCertificate(r *http.Request, thumbprint string) error {
	var cert *x509.Certificate
	switch {
	case c.opts.Certificate != nil:
		cert = c.opts.Certificate(r)
	case r.TLS != nil && len(r.TLS.PeerCertificates) > 0:
		cert = r.TLS.PeerCertificates[0]
	}
	if cert == nil {
		return ErrTokenPossession.because("no client certificate")
	}
	sum := sha256.Sum256(cert.Raw)
	if base64.RawURLEncoding.EncodeToString(sum[:]) != thumbprint {
		return ErrTokenPossession.because("another client certificate")
	}
	return nil
}

func notProof(why string) error { return ErrTokenPossession.because("the DPoP proof " + why) }

// checkProof checks what RFC 9449 §4.3 asks of a proof, what is cheap first.
func (c *ProofChecker) checkProof(r *http.Request, token, thumbprint string) error {
	values := r.Header.Values("DPoP")
	if len(values) != 1 || len(values[0]) > MaxProofLen {
		return notProof("is missing, too long or there twice")
	}
	jws, err := jose.ParseSignedCompact(values[0], proofAlgorithms)
	if err != nil {
		return notProof("is not a JWT of an accepted algorithm")
	}
	header := jws.Signatures[0].Protected
	typ, _ := header.ExtraHeaders[jose.HeaderType].(string)
	if _, critical := header.ExtraHeaders["crit"]; critical || !strings.EqualFold(typ, "dpop+jwt") {
		return notProof("is of another type")
	}
	key := header.JSONWebKey
	if key == nil || usable(key) != nil || !fits(&jose.JSONWebKey{Key: key.Key}, jose.SignatureAlgorithm(header.Algorithm)) {
		return notProof("has no key that could have signed it")
	}
	own, err := key.Thumbprint(crypto.SHA256)
	if err != nil || base64.RawURLEncoding.EncodeToString(own) != thumbprint {
		return notProof("is by another key than the token's")
	}
	claims, err := parseClaims(jws.UnsafePayloadWithoutVerification())
	if err != nil {
		return notProof("is not one JSON object with distinct members")
	}
	text := func(name string) string { s, _ := claims[name].(string); return s }
	if text("htm") != r.Method {
		return notProof("is for another method")
	}
	origin := ""
	if c.opts.OriginOf != nil {
		origin = c.opts.OriginOf(r)
	}
	if origin == "" {
		return notProof("cannot be checked: it is not configured by which origin clients know this server")
	}
	if !addressed(text("htu"), origin, r) {
		return notProof("is for another URL")
	}
	sum := sumOf(token)
	if text("ath") != base64.RawURLEncoding.EncodeToString(sum[:]) {
		return notProof("is for another token")
	}
	jti := text("jti")
	if jti == "" || len(jti) > maxJTILen {
		return notProof("has no jti of a permitted length")
	}
	now := c.opts.Clock()
	iat, err := claims.time("iat")
	if err != nil || !iat.After(now.Add(-c.opts.MaxAge)) || iat.After(now.Add(proofSkew)) {
		return notProof("is too old or not valid yet")
	}
	if c.opts.NonceKey != nil && !c.fresh(text("nonce"), now) {
		return ErrTokenNonce
	}
	if _, err := jws.Verify(key.Key); err != nil {
		return notProof("has a bad signature")
	}
	return c.seen.add([sha256.Size]byte(own), jti, iat, now)
}

// addressed reports whether htu is the URL of a request to origin, less query and
// fragment, as far as the forms of RFC 3986 §6.2.2.1 and §6.2.3 go.
func addressed(htu, origin string, r *http.Request) bool {
	u, err := url.Parse(htu)
	if err != nil || u.Host == "" || u.User != nil {
		return false
	}
	want, err := session.Canonical(session.KindAudience, origin+r.URL.EscapedPath())
	if err != nil {
		return false
	}
	u.RawQuery, u.Fragment, u.ForceQuery = "", "", false
	have, err := session.Canonical(session.KindAudience, u.Scheme+"://"+u.Host+u.EscapedPath())
	return err == nil && have == want
}

// seenProofs are the proofs that were accepted. A proof's `iat`, which it cannot
// change, says in which slot it is; a slot goes when all in it are too old to be
// accepted, and floor then keeps them out, whatever the clock does.
type seenProofs struct {
	max          int
	maxAge, step time.Duration

	mu    sync.Mutex
	floor time.Time
	count int
	slots map[int64]*proofSlot
	keys  map[[sha256.Size]byte]int // how many proofs a key has in all slots
}

type proofSlot struct {
	proofs map[[sha256.Size]byte]struct{}
	keys   map[[sha256.Size]byte]int
}

func newSeenProofs(most int, maxAge time.Duration, now time.Time) *seenProofs {
	return &seenProofs{
		max: most, maxAge: maxAge, step: max(maxAge/proofSlots, time.Second), floor: now.Truncate(time.Second),
		slots: make(map[int64]*proofSlot), keys: make(map[[sha256.Size]byte]int),
	}
}

// add remembers a proof. It returns an error if it did already, or cannot.
func (s *seenProofs) add(key [sha256.Size]byte, jti string, iat, now time.Time) error {
	id := sha256.Sum256(append(append(make([]byte, 0, sha256.Size+maxJTILen), key[:]...), jti...))
	s.mu.Lock()
	defer s.mu.Unlock()
	s.forget(now)
	if iat.Before(s.floor) {
		return notProof("is from before what is remembered")
	}
	at := iat.UnixNano() / int64(s.step)
	slot := s.slots[at]
	if slot == nil {
		slot = &proofSlot{proofs: make(map[[sha256.Size]byte]struct{}), keys: make(map[[sha256.Size]byte]int)}
	}
	if _, seen := slot.proofs[id]; seen {
		return notProof("has been used")
	}
	if s.count >= s.max || s.keys[key] >= max(s.max/shareOfKey, 1) {
		return ErrTokenProofs
	}
	s.slots[at] = slot
	slot.proofs[id] = struct{}{}
	slot.keys[key]++
	s.keys[key]++
	s.count++
	return nil
}

// forget drops the slots whose proofs are all too old by now.
func (s *seenProofs) forget(now time.Time) {
	oldest := now.Add(-s.maxAge)
	for at, slot := range s.slots {
		end := time.Unix(0, (at+1)*int64(s.step))
		if end.After(oldest) {
			continue
		}
		if end.After(s.floor) {
			s.floor = end
		}
		delete(s.slots, at)
		s.count -= len(slot.proofs)
		for key, n := range slot.keys {
			if s.keys[key] -= n; s.keys[key] == 0 {
				delete(s.keys, key)
			}
		}
	}
}
