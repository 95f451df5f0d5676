package credential_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/base64"
	"encoding/json"
	"errors"
	"math/big"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/interlock-fabric/interlock/pkg/credential"
	"github.com/interlock-fabric/interlock/pkg/session"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	issuerURL = "https://id.example"
	audience  = "https://tools.example/mcp"
)

var epoch = time.Unix(1_800_000_000, 0)

type signer struct {
	t   testing.TB
	key any
	alg jose.SignatureAlgorithm
	kid string
	typ string
}

func newSigner(t testing.TB) *signer {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return &signer{t: t, key: key, alg: jose.ES256, kid: "k1", typ: "at+jwt"}
}

func (s *signer) public() jose.JSONWebKey {
	return jose.JSONWebKey{Key: s.key.(crypto.Signer).Public(), KeyID: s.kid}
}

func (s *signer) sign(payload string) string { s.t.Helper(); return s.signWith(payload, "", nil) }

// signWith adds a header.
func (s *signer) signWith(payload string, name jose.HeaderKey, value any) string {
	s.t.Helper()
	opts := &jose.SignerOptions{}
	if name != "" {
		opts = opts.WithHeader(name, value)
	}
	if name == "b64" {
		opts = opts.WithCritical("b64")
	}
	if s.typ != "" {
		opts = opts.WithType(jose.ContentType(s.typ))
	}
	js, err := jose.NewSigner(jose.SigningKey{Algorithm: s.alg, Key: jose.JSONWebKey{Key: s.key, KeyID: s.kid}}, opts)
	if err != nil {
		s.t.Fatal(err)
	}
	jws, err := js.Sign([]byte(payload))
	if err != nil {
		s.t.Fatal(err)
	}
	token, err := jws.CompactSerialize()
	if err != nil {
		s.t.Fatal(err)
	}
	return token
}

func claims(change map[string]any) string {
	return changed(map[string]any{
		"iss": issuerURL, "sub": "ann", "aud": audience, "jti": "t1", "sid": "s1",
		"iat": epoch.Unix(), "exp": epoch.Add(time.Hour).Unix(),
	}, change)
}

// changed is an object in JSON with some members set, or taken out where they are
// nil.
func changed(c, change map[string]any) string {
	for k, v := range change {
		if v == nil {
			delete(c, k)
		} else {
			c[k] = v
		}
	}
	b, err := json.Marshal(c)
	if err != nil {
		panic(err)
	}
	return string(b)
}

func at(t time.Time) func() time.Time { return func() time.Time { return t } }

func newVerifier(t testing.TB, keys []jose.JSONWebKey, change ...func(*credential.Options)) *credential.Verifier {
	t.Helper()
	opts := credential.Options{
		Audiences: []string{audience}, Clock: at(epoch),
		Issuers: []credential.Issuer{{URL: issuerURL, Tenant: "acme", Keys: jose.JSONWebKeySet{Keys: keys}}},
	}
	for _, c := range change {
		c(&opts)
	}
	v, err := credential.New(opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(v.Close)
	return v
}

func TestIdentityIsTakenFromTheClaims(t *testing.T) {
	s := newSigner(t)
	jkt := base64.RawURLEncoding.EncodeToString(make([]byte, 32))
	v := newVerifier(t, []jose.JSONWebKey{s.public()}, func(o *credential.Options) { o.Issuers[0].FixedIssue = true })
	got, err := v.Verify(t.Context(), s.sign(claims(map[string]any{
		"aud": []string{"https://other.example", "HTTPS://Tools.Example:443/mcp"},
		"act": map[string]any{"sub": "agent-2", "iss": "https://agents.example", "act": map[string]any{"sub": "spiffe://acme/agent-1"}},
		"cnf": map[string]any{"jkt": jkt, "x5t#S256": jkt}, "client_id": "cli", "azp": "ignored",
		"session_start": epoch.Unix() - 60, "session_ancestors": []any{"s0", map[string]any{"iss": "https://up.example", "sid": "r", "start": epoch.Unix() - 90}},
		"auth_time": epoch.Unix() - 30, "acr": "phr", "scope": "read write", "roles": []string{"ops"},
		"digests": []string{"model:sha256:" + strings.Repeat("ab", 32)}, "blueprint": "bp", "owner": "team@example", "credential_ids": []string{"urn:uuid:1"},
		"tenant": "other",
	})))
	if err != nil {
		t.Fatal(err)
	}
	want := session.Identity{
		Tenant: "acme", Issuer: issuerURL, Token: "t1", User: "ann", Client: "cli",
		Session:   session.SessionRef{ID: "s1", Start: epoch.Add(-time.Minute)},
		Ancestors: []session.SessionRef{{ID: "s0"}, {Issuer: "https://up.example", ID: "r", Start: epoch.Add(-90 * time.Second)}},
		Actors:    []session.Actor{{Issuer: "https://agents.example", ID: "agent-2"}, {ID: "spiffe://acme/agent-1"}},
		Keys:      []string{"jkt:" + jkt, "x5t#S256:" + jkt}, Credentials: []string{"urn:uuid:1"},
		Digests: []string{"model:sha256:" + strings.Repeat("ab", 32)}, Blueprint: "bp", Owner: "team@example",
		Roles: []string{"ops"}, Capabilities: []string{"read", "write"}, ACR: "phr",
		IssuedAt: epoch, AuthTime: epoch.Add(-30 * time.Second), Expires: epoch.Add(time.Hour),
		FixedIssue: true, Skew: 30 * time.Second,
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Fatal(diff)
	}
	secret, err := session.NewTenantSecret(1, "acme", make([]byte, 32))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := secret.Prepare(got); err != nil {
		t.Fatal(err)
	}
}

// Whoever explains a denial sees the identity that was denied.
func TestUnverifiedIsWhatAVerifierWouldSay(t *testing.T) {
	s := newSigner(t)
	names := credential.Claims{Roles: "/realm_access/roles"}
	v := newVerifier(t, []jose.JSONWebKey{s.public()}, func(o *credential.Options) { o.Issuers[0].Claims = names })
	payload := claims(map[string]any{
		"act": map[string]any{"sub": "agent-2"}, "realm_access": map[string]any{"roles": []string{"admin"}},
		"cnf": map[string]any{"jwk": s.public()}, "session_ancestors": []string{"s0"}, "scope": "read write",
	})
	want, err := v.Verify(t.Context(), s.sign(payload))
	if err != nil {
		t.Fatal(err)
	}
	want.Tenant, want.Skew = "", 0 // of the configuration
	got, err := credential.Unverified([]byte(payload), names)
	if diff := cmp.Diff(want, got); err != nil || diff != "" {
		t.Fatal(err, diff)
	}
	for _, bad := range []string{"", "[]", `{"sub":5}`, `{"sub":"a","sub":"b"}`, `{"act":{}}`} {
		if id, err := credential.Unverified([]byte(bad), names); !errors.Is(err, credential.ErrToken) {
			t.Errorf("%s: %+v, %v", bad, id, err)
		}
	}
}

func TestMappingCanBeOverridden(t *testing.T) {
	s := newSigner(t)
	v := newVerifier(t, []jose.JSONWebKey{s.public()}, func(o *credential.Options) {
		o.Issuers[0].Claims = credential.Claims{Session: "session_state", Roles: "/realm_access/roles", Client: "/a~1b/c~0d"}
	})
	got, err := v.Verify(t.Context(), s.sign(claims(map[string]any{
		"session_state": "kc", "realm_access": map[string]any{"roles": []string{"admin"}}, "a/b": map[string]any{"c~d": "cli"},
	})))
	if err != nil {
		t.Fatal(err)
	}
	if got.Session.ID != "kc" || len(got.Roles) != 1 || got.Roles[0] != "admin" || got.Client != "cli" {
		t.Fatalf("%+v", got)
	}
}

func TestTokenWithoutJTIIsKnownByItsSigningInput(t *testing.T) {
	s := newSigner(t)
	token := s.sign(claims(map[string]any{"jti": nil}))
	got, err := newVerifier(t, []jose.JSONWebKey{s.public()}).Verify(t.Context(), token)
	if err != nil {
		t.Fatal(err)
	}
	// Another signature over the same input is the same token.
	if want := session.TokenValue("", []byte(token[:strings.LastIndex(token, ".")])); got.Token != want {
		t.Fatal(got.Token)
	}
}

// A token known by its signing input must have only one: the library that
// verifies it would let all of these through.
func TestTokenHasOneForm(t *testing.T) {
	s := newSigner(t)
	v := newVerifier(t, []jose.JSONWebKey{s.public()})
	// The payload's length leaves spare bits in its last character.
	token := s.sign(strings.Replace(claims(map[string]any{"jti": nil}), "}", strings.Repeat(" ", 3-(len(claims(map[string]any{"jti": nil}))+1)%3)+"}", 1))
	if _, err := v.Verify(t.Context(), token); err != nil {
		t.Fatal(err)
	}
	parts := strings.Split(token, ".")
	if len(parts[1])%4 == 0 {
		t.Fatal("the payload has no spare bits")
	}
	const alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
	stray := func(part string) string {
		last := strings.IndexByte(alphabet, part[len(part)-1])
		return part[:len(part)-1] + string(alphabet[last^1])
	}
	for name, other := range map[string]string{
		"line break in the claims": parts[0] + "." + parts[1][:9] + "\n" + parts[1][9:] + "." + parts[2],
		"stray bits in the claims": parts[0] + "." + stray(parts[1]) + "." + parts[2],
		"line break at the end":    token + "\r\n",
		"stray bits at the end":    parts[0] + "." + parts[1] + "." + stray(parts[2]),
		"padding":                  token + "=",
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := v.Verify(t.Context(), other); !errors.Is(err, credential.ErrTokenMalformed) {
				t.Fatal(err)
			}
		})
	}
}

// Each case is what would be let in if one check were missing.
func TestTokensThatAreRefused(t *testing.T) {
	s := newSigner(t)
	v := newVerifier(t, []jose.JSONWebKey{s.public()})
	good := s.sign(claims(nil))
	if _, err := v.Verify(t.Context(), good); err != nil {
		t.Fatal(err)
	}
	with := func(change func(*signer)) *signer { c := *s; change(&c); return &c }
	hmacKey, err := json.Marshal(s.public())
	if err != nil {
		t.Fatal(err)
	}
	parts := strings.Split(good, ".")
	b64 := base64.RawURLEncoding.EncodeToString
	deep := func(n int) any {
		var act any
		for range n {
			m := map[string]any{"sub": "a"}
			if act != nil {
				m["act"] = act
			}
			act = m
		}
		return act
	}
	if _, err := v.Verify(t.Context(), s.sign(claims(map[string]any{"act": deep(credential.MaxActors)}))); err != nil {
		t.Fatalf("a chain of the greatest length: %v", err)
	}

	if _, err := v.Verify(t.Context(), s.sign(claims(map[string]any{"x": nested(31), "y": strings.Repeat(`"{`, 80)}))); err != nil {
		t.Fatalf("nested as deep as may be: %v", err)
	}

	for name, c := range map[string]struct {
		token string
		want  error
	}{
		"empty":             {"", credential.ErrTokenMissing},
		"garbage":           {"a.b.c", credential.ErrTokenMalformed},
		"too long":          {good + strings.Repeat("A", credential.MaxTokenLen), credential.ErrTokenMalformed},
		"alg none":          {b64([]byte(`{"alg":"none","typ":"at+jwt"}`)) + "." + parts[1] + ".", credential.ErrTokenAlgorithm},
		"hmac, public key":  {with(func(c *signer) { c.alg, c.key = jose.HS256, hmacKey }).sign(claims(nil)), credential.ErrTokenAlgorithm},
		"alg not pinned":    {with(func(c *signer) { c.alg, c.key = jose.PS512, newRSA(t, 2048) }).sign(claims(nil)), credential.ErrTokenAlgorithm},
		"another key":       {newSigner(t).sign(claims(nil)), credential.ErrTokenSignature},
		"unknown kid":       {with(func(c *signer) { c.kid = "k2" }).sign(claims(nil)), credential.ErrTokenKey},
		"key of other type": {with(func(c *signer) { c.alg, c.key = jose.RS256, newRSA(t, 2048) }).sign(claims(nil)), credential.ErrTokenKey},
		"altered claims":    {parts[0] + "." + b64([]byte(claims(map[string]any{"sub": "root"}))) + "." + parts[2], credential.ErrTokenSignature},
		"security event":    {with(func(c *signer) { c.typ = "secevent+jwt" }).sign(claims(nil)), credential.ErrTokenType},
		"no type":           {with(func(c *signer) { c.typ = "" }).sign(claims(nil)), credential.ErrTokenType},
		"unknown issuer":    {s.sign(claims(map[string]any{"iss": issuerURL + "/"})), credential.ErrTokenIssuer},
		"no issuer":         {s.sign(claims(map[string]any{"iss": nil})), credential.ErrTokenIssuer},
		"other audience":    {s.sign(claims(map[string]any{"aud": "https://tools.example/"})), credential.ErrTokenAudience},
		"no audience":       {s.sign(claims(map[string]any{"aud": nil})), credential.ErrTokenAudience},
		"expired":           {s.sign(claims(map[string]any{"exp": epoch.Unix() - 30})), credential.ErrTokenExpired},
		"no expiry":         {s.sign(claims(map[string]any{"exp": nil})), credential.ErrTokenClaims},
		"expiry as text":    {s.sign(claims(map[string]any{"exp": "2999"})), credential.ErrTokenClaims},
		"expiry overflows":  {s.sign(claims(map[string]any{"exp": 1e300})), credential.ErrTokenClaims},
		"not yet":           {s.sign(claims(map[string]any{"nbf": epoch.Unix() + 31})), credential.ErrTokenNotYet},
		"from the future":   {s.sign(claims(map[string]any{"iat": epoch.Unix() + 31})), credential.ErrTokenNotYet},
		"twice a member":    {s.sign(`{"iss":"` + issuerURL + `","sub":"ann","sub":"root","aud":"` + audience + `","exp":1800003600}`), credential.ErrTokenMalformed},
		"twice, nested":     {s.sign(strings.Replace(claims(nil), "{", `{"act":{"sub":"a","sub":"b"},`, 1)), credential.ErrTokenMalformed},
		"two values":        {s.sign(claims(nil) + "{}"), credential.ErrTokenMalformed},
		"nested too deep":   {s.sign(claims(map[string]any{"x": nested(32)})), credential.ErrTokenMalformed},
		"claims are null":   {s.sign("null"), credential.ErrTokenMalformed},
		"critical header":   {s.signWith(claims(nil), "crit", []string{"exp"}), credential.ErrTokenMalformed},
		"claims not base64": {s.signWith(claims(nil), "b64", false), credential.ErrTokenMalformed},
		"header twice":      {b64([]byte(`{"alg":"ES256","typ":"at+jwt","alg":"none"}`)) + "." + parts[1] + "." + parts[2], credential.ErrTokenMalformed},
		"sid not text":      {s.sign(claims(map[string]any{"sid": 7})), credential.ErrTokenClaims},
		"jti not text":      {s.sign(claims(map[string]any{"jti": []string{"a"}})), credential.ErrTokenClaims},
		"sub too long":      {s.sign(claims(map[string]any{"sub": strings.Repeat("a", session.MaxValueLen+1)})), credential.ErrTokenClaims},
		"chain too deep":    {s.sign(claims(map[string]any{"act": deep(credential.MaxActors + 1)})), credential.ErrTokenClaims},
		"actor unnamed":     {s.sign(claims(map[string]any{"act": map[string]any{"iss": issuerURL}})), credential.ErrTokenClaims},
		"thumbprint":        {s.sign(claims(map[string]any{"cnf": map[string]any{"jkt": "short"}})), credential.ErrTokenClaims},
		"too many roles":    {s.sign(claims(map[string]any{"roles": strings.Fields(strings.Repeat("r ", session.MaxProbes+1))})), credential.ErrTokenClaims},
		"ancestor unnamed":  {s.sign(claims(map[string]any{"session_ancestors": []any{map[string]any{"iss": issuerURL}}})), credential.ErrTokenClaims},
		"ancestors":         {s.sign(claims(map[string]any{"session_ancestors": make([]string, credential.MaxAncestors+1)})), credential.ErrTokenClaims},
	} {
		t.Run(name, func(t *testing.T) {
			id, err := v.Verify(t.Context(), c.token)
			if !errors.Is(err, c.want) || !errors.Is(err, credential.ErrToken) || !errors.Is(err, session.ErrNoIdentity) {
				t.Fatalf("%+v, %v; want %v", id, err, c.want)
			}
			if err != nil && c.token != "" && strings.Contains(c.token, err.Error()) {
				t.Fatal("the error quotes the token")
			}
		})
	}
	if !errors.Is(credential.ErrTokenExpired, session.ErrExpired) || !errors.Is(credential.ErrTokenKeys, session.ErrStale) {
		t.Fatal("hosts could not tell these apart")
	}
}

// nested is n lists in each other.
func nested(n int) (v any) {
	for range n {
		v = []any{v}
	}
	return v
}

func newRSA(t testing.TB, bits int) *rsa.PrivateKey {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, bits)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func TestSkewIsTheIssuersOwn(t *testing.T) {
	s := newSigner(t)
	v := newVerifier(t, []jose.JSONWebKey{s.public()}, func(o *credential.Options) { o.Issuers[0].Skew = time.Minute })
	if _, err := v.Verify(t.Context(), s.sign(claims(map[string]any{"exp": epoch.Unix() - 59, "nbf": epoch.Unix() + 59}))); err != nil {
		t.Fatal(err)
	}
}

func TestEveryDefaultAlgorithmVerifies(t *testing.T) {
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	rsaKey := newRSA(t, 2048)
	for alg, key := range map[jose.SignatureAlgorithm]any{jose.EdDSA: ed, jose.RS256: rsaKey, jose.PS256: rsaKey} {
		s := newSigner(t)
		s.alg, s.key, s.typ = alg, key, "application/at+JWT"
		if _, err := newVerifier(t, []jose.JSONWebKey{s.public()}).Verify(t.Context(), s.sign(claims(nil))); err != nil {
			t.Errorf("%s: %v", alg, err)
		}
	}
}

// A token that names no key is tried with each that fits.
func TestTokenWithoutKeyID(t *testing.T) {
	s, other := newSigner(t), newSigner(t)
	v := newVerifier(t, []jose.JSONWebKey{other.public(), s.public()})
	s.kid = ""
	if _, err := v.Verify(t.Context(), s.sign(claims(nil))); err != nil {
		t.Fatal(err)
	}
}

// One issuer's key must not sign for another.
func TestIssuersKeysAreTheirOwn(t *testing.T) {
	s, other := newSigner(t), newSigner(t)
	v := newVerifier(t, []jose.JSONWebKey{s.public()}, func(o *credential.Options) {
		o.Issuers = append(o.Issuers, credential.Issuer{URL: "https://other.example", Tenant: "other", Keys: jose.JSONWebKeySet{Keys: []jose.JSONWebKey{other.public()}}})
	})
	if _, err := v.Verify(t.Context(), other.sign(claims(nil))); !errors.Is(err, credential.ErrTokenSignature) {
		t.Fatal(err)
	}
	id, err := v.Verify(t.Context(), other.sign(claims(map[string]any{"iss": "https://other.example"})))
	if err != nil || id.Tenant != "other" {
		t.Fatal(id.Tenant, err)
	}
}

// The algorithms are pinned per issuer, whatever another one uses.
func TestAlgorithmsArePinnedPerIssuer(t *testing.T) {
	s, other := newSigner(t), newSigner(t)
	v := newVerifier(t, []jose.JSONWebKey{s.public()}, func(o *credential.Options) {
		o.Issuers[0].Algorithms = []jose.SignatureAlgorithm{jose.EdDSA}
		o.Issuers = append(o.Issuers, credential.Issuer{URL: "https://other.example", Tenant: "other", Keys: jose.JSONWebKeySet{Keys: []jose.JSONWebKey{other.public()}}})
	})
	if _, err := v.Verify(t.Context(), s.sign(claims(nil))); !errors.Is(err, credential.ErrTokenAlgorithm) {
		t.Fatal(err)
	}
}

func TestVerifyRequest(t *testing.T) {
	s := newSigner(t)
	v := newVerifier(t, []jose.JSONWebKey{s.public()})
	token := s.sign(claims(nil))
	for name, c := range map[string]struct {
		header []string
		want   error
	}{
		"bearer":       {[]string{"Bearer " + token}, nil},
		"any case":     {[]string{"bEARER  " + token}, nil},
		"none":         {nil, credential.ErrTokenMissing},
		"no token":     {[]string{"Bearer "}, credential.ErrTokenMissing},
		"basic":        {[]string{"Basic " + token}, credential.ErrTokenMalformed},
		"two":          {[]string{"Bearer " + token, "Bearer " + token}, credential.ErrTokenMalformed},
		"scheme alone": {[]string{"Bearer"}, credential.ErrTokenMalformed},
	} {
		t.Run(name, func(t *testing.T) {
			r := httptest.NewRequest(http.MethodPost, "/?access_token="+token, nil)
			r.Header["Authorization"] = c.header
			if _, err := v.VerifyRequest(r); !errors.Is(err, c.want) {
				t.Fatal(err)
			}
		})
	}
}

func TestPossessionIsAskedForBoundTokens(t *testing.T) {
	s := newSigner(t)
	asked := 0
	v := newVerifier(t, []jose.JSONWebKey{s.public()}, func(o *credential.Options) {
		o.Possession = func(r *http.Request, _ string, id session.Identity) error {
			asked++
			if len(id.Keys) != 1 {
				t.Error(id.Keys)
			}
			if r == nil {
				return errors.New("no proof")
			}
			return nil
		}
	})
	if _, err := v.Verify(t.Context(), s.sign(claims(nil))); err != nil || asked != 0 {
		t.Fatal(err, asked)
	}
	bound := s.sign(claims(map[string]any{"cnf": map[string]any{"jkt": base64.RawURLEncoding.EncodeToString(make([]byte, 32))}}))
	if _, err := v.Verify(t.Context(), bound); !errors.Is(err, credential.ErrTokenPossession) || asked != 1 {
		t.Fatal(err, asked)
	}
	r := httptest.NewRequest(http.MethodPost, "/", nil)
	r.Header.Set("Authorization", "Bearer "+bound)
	if _, err := v.VerifyRequest(r); err != nil || asked != 2 {
		t.Fatal(err, asked)
	}
}

func TestOptionsThatAreRefused(t *testing.T) {
	s := newSigner(t)
	for name, change := range map[string]func(*credential.Options){
		"no issuers":       func(o *credential.Options) { o.Issuers = nil },
		"no audiences":     func(o *credential.Options) { o.Audiences = nil },
		"audience":         func(o *credential.Options) { o.Audiences = []string{""} },
		"issuer twice":     func(o *credential.Options) { o.Issuers = append(o.Issuers, o.Issuers[0]) },
		"no tenant":        func(o *credential.Options) { o.Issuers[0].Tenant = "" },
		"no keys":          func(o *credential.Options) { o.Issuers[0].Keys = jose.JSONWebKeySet{} },
		"both":             func(o *credential.Options) { o.Issuers[0].JWKS = "https://id.example/jwks" },
		"none":             func(o *credential.Options) { o.Issuers[0].Algorithms = []jose.SignatureAlgorithm{"none"} },
		"hmac":             func(o *credential.Options) { o.Issuers[0].Algorithms = []jose.SignatureAlgorithm{jose.HS256} },
		"no algorithms":    func(o *credential.Options) { o.Issuers[0].Algorithms = []jose.SignatureAlgorithm{} },
		"skew":             func(o *credential.Options) { o.Issuers[0].Skew = time.Hour },
		"private key":      func(o *credential.Options) { o.Issuers[0].Keys.Keys[0].Key = s.key },
		"symmetric key":    func(o *credential.Options) { o.Issuers[0].Keys.Keys[0].Key = []byte("secret") },
		"short RSA":        func(o *credential.Options) { o.Issuers[0].Keys.Keys[0].Key = &weakRSA },
		"JWKS in clear":    func(o *credential.Options) { remote(o, "http://id.example/jwks") },
		"JWKS with a user": func(o *credential.Options) { remote(o, "https://a:b@id.example/jwks") },
	} {
		t.Run(name, func(t *testing.T) {
			opts := credential.Options{
				Audiences: []string{audience},
				Issuers:   []credential.Issuer{{URL: issuerURL, Tenant: "acme", Keys: jose.JSONWebKeySet{Keys: []jose.JSONWebKey{s.public()}}}},
			}
			change(&opts)
			if _, err := credential.New(opts); !errors.Is(err, session.ErrInvalid) {
				t.Fatal(err)
			}
		})
	}
}

// weakRSA has a modulus of 1024 bits; nothing is ever verified with it.
var weakRSA = rsa.PublicKey{N: new(big.Int).Lsh(big.NewInt(1), 1023), E: 65537}

func TestZeroAndClosedVerifierRefuse(t *testing.T) {
	s := newSigner(t)
	var v credential.Verifier
	if _, err := v.Verify(t.Context(), s.sign(claims(nil))); !errors.Is(err, credential.ErrToken) {
		t.Fatal(err)
	}
	v.Close()
	w := newVerifier(t, []jose.JSONWebKey{s.public()})
	w.Close()
	w.Close()
	if _, err := w.Verify(t.Context(), s.sign(claims(nil))); !errors.Is(err, credential.ErrToken) {
		t.Fatal(err)
	}
}

func remote(o *credential.Options, url string) {
	o.Issuers[0].Keys, o.Issuers[0].JWKS = jose.JSONWebKeySet{}, url
}

// jwks is an issuer's key endpoint.
type jwks struct {
	fetches atomic.Int64
	status  atomic.Int64
	body    atomic.Value
	gate    chan struct{} // when set, a fetch waits for it
}

func (j *jwks) set(keys ...jose.JSONWebKey) {
	b, err := json.Marshal(jose.JSONWebKeySet{Keys: keys})
	if err != nil {
		panic(err)
	}
	j.body.Store(string(b))
}

// RoundTrip answers without a network, so that time can be the test's own.
func (j *jwks) RoundTrip(r *http.Request) (*http.Response, error) {
	j.fetches.Add(1)
	if j.gate != nil {
		select {
		case <-j.gate:
		case <-r.Context().Done():
			return nil, r.Context().Err()
		}
	}
	rec := httptest.NewRecorder()
	if s := j.status.Load(); s != 0 {
		rec.WriteHeader(int(s))
	}
	_, _ = rec.WriteString(j.body.Load().(string))
	return rec.Result(), nil
}

func remoteVerifier(t testing.TB, j *jwks) *credential.Verifier {
	return newVerifier(t, nil, func(o *credential.Options) {
		remote(o, "https://id.example/jwks")
		o.HTTP, o.Clock = &http.Client{Transport: j}, nil
	})
}

func fresh(s *signer) string {
	return s.sign(claims(map[string]any{"iat": time.Now().Unix(), "exp": time.Now().Add(24 * time.Hour).Unix()}))
}

func TestUnknownKeyRefreshesOncePerInterval(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, next := newSigner(t), newSigner(t)
		next.kid = "k2"
		j := &jwks{}
		j.set(s.public())
		v := remoteVerifier(t, j)
		defer v.Close()
		if _, err := v.Verify(t.Context(), fresh(s)); err != nil {
			t.Fatal(err)
		}
		j.set(s.public(), next.public()) // rotated
		for range 10 {
			if _, err := v.Verify(t.Context(), fresh(next)); !errors.Is(err, credential.ErrTokenKey) {
				t.Fatal(err)
			}
		}
		if n := j.fetches.Load(); n != 1 {
			t.Fatalf("%d fetches within the interval", n)
		}
		time.Sleep(15 * time.Second)
		if _, err := v.Verify(t.Context(), fresh(next)); err != nil {
			t.Fatal(err)
		}
		if n := j.fetches.Load(); n != 2 {
			t.Fatalf("%d fetches", n)
		}
	})
}

func TestConcurrentMissesShareOneFetch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSigner(t)
		j := &jwks{gate: make(chan struct{})}
		j.set(s.public())
		v := remoteVerifier(t, j)
		defer v.Close()
		token := fresh(s)
		errs := make(chan error, 10)
		for range 10 {
			go func() { _, err := v.Verify(t.Context(), token); errs <- err }()
		}
		// One that gives up does not take the fetch with it.
		ctx, cancel := context.WithCancel(t.Context())
		gone := make(chan error)
		go func() { _, err := v.Verify(ctx, token); gone <- err }()
		synctest.Wait()
		cancel()
		if err := <-gone; !errors.Is(err, credential.ErrTokenKeys) {
			t.Fatal(err)
		}
		close(j.gate)
		for range 10 {
			if err := <-errs; err != nil {
				t.Fatal(err)
			}
		}
		if n := j.fetches.Load(); n != 1 {
			t.Fatalf("%d fetches", n)
		}
	})
}

// An issuer that cannot be reached vouches for KeysMaxAge and no longer, and is
// tried again after a first fetch that failed.
func TestKeysAgeAndRecover(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSigner(t)
		j := &jwks{}
		j.set(s.public())
		j.status.Store(http.StatusNotFound)
		v := remoteVerifier(t, j)
		defer v.Close()
		verify := func() error { _, err := v.Verify(t.Context(), fresh(s)); return err }
		if err := verify(); !errors.Is(err, credential.ErrTokenKeys) || !errors.Is(err, session.ErrStale) {
			t.Fatal(err)
		}
		time.Sleep(15 * time.Second)
		j.status.Store(http.StatusOK)
		if err := verify(); err != nil {
			t.Fatalf("after a failed first fetch: %v", err)
		}
		// In the second half of their age they are fetched beside the request.
		time.Sleep(31 * time.Minute)
		if err := verify(); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if n := j.fetches.Load(); n != 3 {
			t.Fatalf("%d fetches", n)
		}
		j.status.Store(http.StatusServiceUnavailable)
		time.Sleep(59 * time.Minute)
		if err := verify(); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		time.Sleep(time.Minute)
		if err := verify(); !errors.Is(err, credential.ErrTokenKeys) {
			t.Fatalf("keys beyond their age: %v", err)
		}
		time.Sleep(time.Minute)
		j.status.Store(http.StatusOK)
		if err := verify(); err != nil {
			t.Fatal(err)
		}
	})
}

func TestHostileKeySetsAreRefused(t *testing.T) {
	for name, body := range map[string]string{
		"not json": "<html>", "no keys": "{}", "twice": `{"keys":[],"keys":[]}`,
		"too long": `{"keys":[],"x":"` + strings.Repeat("a", 256<<10) + `"}`,
		"too many": `{"keys":[` + strings.TrimSuffix(strings.Repeat("{},", 65), ",") + `]}`,
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				j := &jwks{}
				j.body.Store(body)
				v := remoteVerifier(t, j)
				defer v.Close()
				if _, err := v.Verify(t.Context(), fresh(newSigner(t))); !errors.Is(err, credential.ErrTokenKeys) {
					t.Fatal(err)
				}
			})
		})
	}
}

// What we do not know in a key set must not lose us what we do; a symmetric or
// private key in it is never used.
func TestUnusableKeysAreLeftOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSigner(t)
		public, err := json.Marshal(s.public())
		if err != nil {
			t.Fatal(err)
		}
		private, err := json.Marshal(jose.JSONWebKey{Key: s.key, KeyID: "private"})
		if err != nil {
			t.Fatal(err)
		}
		j := &jwks{}
		j.body.Store(`{"keys":[{"kty":"new"},{"kty":"oct","kid":"k0","k":"c2VjcmV0"},` + string(private) + `,` + string(public) + `]}`)
		weak := newSigner(t)
		weak.alg, weak.key, weak.kid = jose.RS256, newRSA(t, 1024), "weak"
		short, err := json.Marshal(weak.public())
		if err != nil {
			t.Fatal(err)
		}
		j.body.Store(strings.Replace(j.body.Load().(string), "]}", ","+string(short)+"]}", 1))
		v := remoteVerifier(t, j)
		defer v.Close()
		if _, err := v.Verify(t.Context(), fresh(s)); err != nil {
			t.Fatal(err)
		}
		if _, err := v.Verify(t.Context(), fresh(weak)); !errors.Is(err, credential.ErrTokenKey) {
			t.Fatal(err)
		}
		s.kid = "private"
		if _, err := v.Verify(t.Context(), fresh(s)); !errors.Is(err, credential.ErrTokenKey) {
			t.Fatal(err)
		}
	})
}

// An issuer that never answers holds a request no longer than the bound, and
// Close ends the fetch.
func TestFetchIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSigner(t)
		j := &jwks{gate: make(chan struct{})}
		j.set(s.public())
		v := remoteVerifier(t, j)
		start := time.Now()
		if _, err := v.Verify(t.Context(), fresh(s)); !errors.Is(err, credential.ErrTokenKeys) {
			t.Fatal(err)
		}
		if d := time.Since(start); d != 5*time.Second {
			t.Fatal(d)
		}
		time.Sleep(15 * time.Second)
		done := make(chan error)
		go func() { _, err := v.Verify(t.Context(), fresh(s)); done <- err }()
		synctest.Wait()
		v.Close()
		if err := <-done; !errors.Is(err, credential.ErrTokenKeys) {
			t.Fatal(err)
		}
	})
}

// FuzzVerify: no input panics, and none that we did not sign is let in.
func FuzzVerify(f *testing.F) {
	s := newSigner(f)
	v := newVerifier(f, []jose.JSONWebKey{s.public()})
	good := s.sign(claims(nil))
	f.Add(good)
	f.Add(good[:len(good)-1])
	f.Add("eyJhbGciOiJub25lIn0.e30.")
	f.Fuzz(func(t *testing.T, token string) {
		if _, err := v.Verify(context.Background(), token); err == nil && token != good {
			t.Fatalf("accepted %q", token)
		}
	})
}

// FuzzClaims: a signed token with any payload gives an identity that can be
// prepared or an error, and never a panic.
func FuzzClaims(f *testing.F) {
	s := newSigner(f)
	v := newVerifier(f, []jose.JSONWebKey{s.public()})
	f.Add(claims(map[string]any{"act": map[string]any{"sub": "a"}, "cnf": map[string]any{"jkt": "x"}}))
	f.Add(claims(map[string]any{"cnf": map[string]any{"jwk": map[string]any{"kty": "EC"}}}))
	f.Fuzz(func(t *testing.T, payload string) {
		own := *s
		own.t = t
		id, err := v.Verify(context.Background(), own.sign(payload))
		if err == nil && (id.Tenant != "acme" || id.Issuer != issuerURL || id.Token == "" || id.Expires.IsZero()) {
			t.Fatalf("%+v", id)
		}
	})
}

// The mechanism is the intersection with what the verifier is for: a token's other
// audiences are nobody's business.
func TestAudiencesOfAToken(t *testing.T) {
	s := newSigner(t)
	const agent = "https://agent.example/a2a"
	v := newVerifier(t, []jose.JSONWebKey{s.public()}, func(o *credential.Options) { o.Audiences = append(o.Audiences, agent) })
	alone, err := v.For(agent)
	if err != nil {
		t.Fatal(err)
	}
	token := s.sign(claims(map[string]any{"aud": []string{"https://other.example", "HTTPS://AGENT.example:443/a2a", agent, audience}}))
	for _, c := range []struct {
		v    *credential.Verifier
		want []string
	}{{v, []string{agent, audience}}, {alone, []string{agent}}, {v, []string{agent, audience}}} {
		id, got, err := c.v.VerifyAudiences(t.Context(), token)
		if err != nil || id.User != "ann" || !cmp.Equal(got, c.want) {
			t.Errorf("%+v for %q, %v", id, got, err)
		}
	}
	if _, got, err := alone.VerifyAudiences(t.Context(), s.sign(claims(nil))); !errors.Is(err, credential.ErrTokenAudience) || got != nil {
		t.Errorf("for another: %q, %v", got, err)
	}
}
