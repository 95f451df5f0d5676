package credential_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/interlock-fabric/interlock/pkg/credential"
	"github.com/interlock-fabric/interlock/pkg/denial"
	"github.com/interlock-fabric/interlock/pkg/session"
)

func hash64(b []byte) string {
	sum := sha256.Sum256(b)
	return base64.RawURLEncoding.EncodeToString(sum[:])
}

// holder has the key that its tokens are bound to.
type holder struct {
	t   testing.TB
	key *ecdsa.PrivateKey
	jwk jose.JSONWebKey
	jkt string
}

func newHolder(t testing.TB) *holder {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	h := &holder{t: t, key: key, jwk: jose.JSONWebKey{Key: key.Public()}}
	sum, err := h.jwk.Thumbprint(crypto.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	h.jkt = base64.RawURLEncoding.EncodeToString(sum)
	return h
}

// proofOf is the payload of a good proof, with what is to be different.
func proofOf(token, method, url string, at time.Time, change map[string]any) map[string]any {
	c := map[string]any{"jti": rand.Text(), "htm": method, "htu": url, "iat": at.Unix(), "ath": hash64([]byte(token))}
	for k, v := range change {
		if v == nil {
			delete(c, k)
		} else {
			c[k] = v
		}
	}
	return c
}

func (h *holder) sign(payload any, header map[jose.HeaderKey]any) string {
	h.t.Helper()
	opts := (&jose.SignerOptions{EmbedJWK: true}).WithType("dpop+jwt")
	for k, v := range header {
		opts = opts.WithHeader(k, v)
		if k == "jwk" {
			opts.EmbedJWK = false
		}
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: h.key}, opts)
	if err != nil {
		h.t.Fatal(err)
	}
	b, ok := payload.([]byte)
	if !ok {
		if b, err = json.Marshal(payload); err != nil {
			h.t.Fatal(err)
		}
	}
	jws, err := signer.Sign(b)
	if err != nil {
		h.t.Fatal(err)
	}
	proof, err := jws.CompactSerialize()
	if err != nil {
		h.t.Fatal(err)
	}
	return proof
}

func newChecker(t testing.TB, c *clock, change ...func(*credential.ProofOptions)) *credential.ProofChecker {
	t.Helper()
	o := credential.ProofOptions{Clock: c.now, Origin: "https://tools.example"}
	for _, f := range change {
		f(&o)
	}
	p, err := credential.NewProofChecker(o)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// bench is a verifier that asks for proofs, and one caller.
type provingCaller struct {
	*holder
	v     *credential.Verifier
	clock *clock
	token string
}

func newProvingCaller(t testing.TB, change ...func(*credential.ProofOptions)) *provingCaller {
	t.Helper()
	s, h, c := newSigner(t), newHolder(t), newClock(epoch)
	checker := newChecker(t, c, change...)
	v := newVerifier(t, []jose.JSONWebKey{s.public()}, with(c), func(o *credential.Options) { o.Possession = checker.Check })
	return &provingCaller{h, v, c, s.sign(claims(map[string]any{"cnf": map[string]any{"jkt": h.jkt}}))}
}

const here = "https://tools.example/mcp"

func (p *provingCaller) proof(change map[string]any) string {
	return p.sign(proofOf(p.token, http.MethodPost, here, p.clock.now(), change), nil)
}

func (p *provingCaller) request(proofs ...string) *http.Request {
	r := httptest.NewRequest(http.MethodPost, "/mcp?x=1#f", nil)
	r.Header.Set("Authorization", "DPoP "+p.token)
	for _, proof := range proofs {
		r.Header.Add("DPoP", proof)
	}
	return r
}

func (p *provingCaller) present(proofs ...string) error {
	_, err := p.v.VerifyRequest(p.request(proofs...))
	return err
}

func TestProofsThatAreRefused(t *testing.T) {
	p := newProvingCaller(t)
	if err := p.present(p.proof(nil)); err != nil {
		t.Fatal(err)
	}
	other := newHolder(t)
	claimsNow := func(change map[string]any) map[string]any {
		return proofOf(p.token, http.MethodPost, here, p.clock.now(), change)
	}
	good := p.proof(nil)
	parts := strings.Split(good, ".")
	hmacSigner, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.HS256, Key: make([]byte, 32)}, (&jose.SignerOptions{}).WithType("dpop+jwt").WithHeader("jwk", p.jwk))
	if err != nil {
		t.Fatal(err)
	}
	payload, err := json.Marshal(claimsNow(nil))
	if err != nil {
		t.Fatal(err)
	}
	object, err := hmacSigner.Sign(payload)
	if err != nil {
		t.Fatal(err)
	}
	hmacProof, err := object.CompactSerialize()
	if err != nil {
		t.Fatal(err)
	}
	private := jose.JSONWebKey{Key: p.key}
	for name, proofs := range map[string][]string{
		"none":              nil,
		"two":               {p.proof(nil), p.proof(nil)},
		"empty":             {""},
		"garbage":           {"a.b.c"},
		"too long":          {p.proof(map[string]any{"x": strings.Repeat("a", credential.MaxProofLen)})},
		"another key":       {other.sign(claimsNow(nil), nil)},
		"another's key":     {other.sign(claimsNow(nil), map[jose.HeaderKey]any{"jwk": p.jwk})},
		"private key":       {p.sign(claimsNow(nil), map[jose.HeaderKey]any{"jwk": private})},
		"no key":            {p.sign(claimsNow(nil), map[jose.HeaderKey]any{"jwk": nil})},
		"alg none":          {base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"none","typ":"dpop+jwt"}`)) + "." + parts[1] + "."},
		"hmac":              {hmacProof},
		"type of a token":   {p.sign(claimsNow(nil), map[jose.HeaderKey]any{"typ": "at+jwt"})},
		"no type":           {p.sign(claimsNow(nil), map[jose.HeaderKey]any{"typ": nil})},
		"crit":              {p.sign(claimsNow(nil), map[jose.HeaderKey]any{"crit": []string{"b64"}, "b64": true})},
		"altered":           {parts[0] + "." + base64.RawURLEncoding.EncodeToString(payload) + "." + parts[2]},
		"twice a member":    {p.sign([]byte(strings.Replace(string(payload), "{", `{"jti":"x",`, 1)), nil)},
		"another method":    {p.proof(map[string]any{"htm": "GET"})},
		"method's case":     {p.proof(map[string]any{"htm": "post"})},
		"no method":         {p.proof(map[string]any{"htm": nil})},
		"another host":      {p.proof(map[string]any{"htu": "https://other.example/mcp"})},
		"another scheme":    {p.proof(map[string]any{"htu": "http://tools.example/mcp"})},
		"another path":      {p.proof(map[string]any{"htu": "https://tools.example/mcp/"})},
		"a user in the URL": {p.proof(map[string]any{"htu": "https://ann@tools.example/mcp"})},
		"relative URL":      {p.proof(map[string]any{"htu": "/mcp"})},
		"no URL":            {p.proof(map[string]any{"htu": nil})},
		"another token":     {p.proof(map[string]any{"ath": hash64([]byte("other"))})},
		"no token":          {p.proof(map[string]any{"ath": nil})},
		"no jti":            {p.proof(map[string]any{"jti": nil})},
		"empty jti":         {p.proof(map[string]any{"jti": ""})},
		"jti too long":      {p.proof(map[string]any{"jti": strings.Repeat("a", 257)})},
		"jti no text":       {p.proof(map[string]any{"jti": 7})},
		"no iat":            {p.proof(map[string]any{"iat": nil})},
		"iat as text":       {p.proof(map[string]any{"iat": "now"})},
		"from the future":   {p.proof(map[string]any{"iat": p.clock.now().Add(11 * time.Second).Unix()})},
		"before the start":  {p.proof(map[string]any{"iat": epoch.Add(-time.Second).Unix()})},
	} {
		t.Run(name, func(t *testing.T) {
			err := p.present(proofs...)
			if !errors.Is(err, credential.ErrTokenPossession) || !errors.Is(err, session.ErrNoIdentity) {
				t.Fatal(err)
			}
			var again *credential.ProofError
			if !errors.As(err, &again) {
				t.Fatalf("%T does not say how to try again", err)
			}
		})
	}
	if err := p.present(good); err != nil {
		t.Fatal(err)
	}

	p.clock.set(epoch.Add(2 * time.Minute))
	if err := p.present(p.proof(map[string]any{"iat": epoch.Add(time.Minute).Unix()})); !errors.Is(err, credential.ErrTokenPossession) {
		t.Fatalf("a proof of a minute ago: %v", err)
	}
	if err := p.present(p.proof(map[string]any{"iat": epoch.Add(time.Minute + time.Second).Unix()})); err != nil {
		t.Fatal(err)
	}

	bearer := p.request(p.proof(nil))
	bearer.Header.Set("Authorization", "Bearer "+p.token)
	if _, err := p.v.VerifyRequest(bearer); !errors.Is(err, credential.ErrTokenPossession) {
		t.Fatalf("a bound token as a bearer's: %v", err)
	}
	if _, err := p.v.Verify(t.Context(), p.token); !errors.Is(err, credential.ErrTokenPossession) {
		t.Fatalf("a bound token without a request: %v", err)
	}
	for _, htu := range []string{"HTTPS://Tools.Example:443/mcp", here + "?y=2", here + "#f", here + "?"} {
		if err := p.present(p.proof(map[string]any{"htu": htu})); err != nil {
			t.Errorf("%s: %v", htu, err)
		}
	}
}

func TestTokensThatCannotBeProved(t *testing.T) {
	s, h, c := newSigner(t), newHolder(t), newClock(epoch)
	checker := newChecker(t, c)
	v := newVerifier(t, []jose.JSONWebKey{s.public()}, with(c), func(o *credential.Options) { o.Possession = checker.Check })
	unasked := newVerifier(t, []jose.JSONWebKey{s.public()}, with(c))
	for name, cnf := range map[string]any{
		"unbound":        nil,
		"empty":          map[string]any{},
		"unknown method": map[string]any{"kid": "k1"},
		"a certificate":  map[string]any{"x5t#S256": h.jkt},
		"two keys":       map[string]any{"jkt": h.jkt, "jwk": newHolder(t).jwk},
	} {
		t.Run(name, func(t *testing.T) {
			token := s.sign(claims(map[string]any{"cnf": cnf}))
			r := httptest.NewRequest(http.MethodPost, "/mcp", nil)
			r.Header.Set("Authorization", "DPoP "+token)
			r.Header.Set("DPoP", h.sign(proofOf(token, http.MethodPost, here, c.now(), nil), nil))
			for range 2 { // verified, and seen
				if _, err := v.VerifyRequest(r); !errors.Is(err, credential.ErrTokenPossession) {
					t.Fatal(err)
				}
				if _, err := unasked.VerifyRequest(r); !errors.Is(err, credential.ErrTokenPossession) {
					t.Fatalf("by one that checks no proofs: %v", err)
				}
				v.Settle()
			}
		})
	}
	// The same key in both forms is one key.
	token := s.sign(claims(map[string]any{"cnf": map[string]any{"jkt": h.jkt, "jwk": h.jwk}}))
	r := httptest.NewRequest(http.MethodPost, "/mcp", nil)
	r.Header.Set("Authorization", "DPoP "+token)
	r.Header.Set("DPoP", h.sign(proofOf(token, http.MethodPost, here, c.now(), nil), nil))
	if _, err := v.VerifyRequest(r); err != nil {
		t.Fatal(err)
	}
	if err := new(credential.ProofChecker).Check(r, token, session.Identity{Keys: []string{"jkt:" + h.jkt}}); !errors.Is(err, credential.ErrTokenPossession) {
		t.Fatal(err)
	}
}

func TestProofIsGoodOnce(t *testing.T) {
	p := newProvingCaller(t)
	p.clock.set(epoch.Add(3 * time.Second)) // amid those that will be forgotten together
	proof := p.proof(nil)
	var accepted atomic.Int64
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			switch err := p.present(proof); {
			case err == nil:
				accepted.Add(1)
			case !errors.Is(err, credential.ErrTokenPossession):
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if n := accepted.Load(); n != 1 {
		t.Fatalf("accepted %d times", n)
	}
	// Until it is too old, and then too.
	for d := 3 * time.Second; d < 3*time.Minute; d += 500 * time.Millisecond {
		p.clock.set(epoch.Add(d))
		if p.present(proof) == nil {
			t.Fatalf("accepted again after %v", d)
		}
		if d%(5*time.Second) == 0 {
			if err := p.present(p.proof(nil)); err != nil {
				t.Fatalf("a new one after %v: %v", d, err)
			}
		}
	}
	// Nor when the clock says that it is young again.
	for _, d := range []time.Duration{time.Minute, 30 * time.Second, 0, -9 * time.Second} {
		p.clock.set(epoch.Add(d))
		if p.present(proof) == nil {
			t.Fatalf("accepted again with the clock back at %v", d)
		}
	}
}

func TestFullStoreOfProofsDenies(t *testing.T) {
	const most = 16
	s, c := newSigner(t), newClock(epoch)
	checker := newChecker(t, c, func(o *credential.ProofOptions) { o.MaxProofs = most })
	v := newVerifier(t, []jose.JSONWebKey{s.public()}, with(c), func(o *credential.Options) { o.Possession = checker.Check })
	caller := func() *provingCaller {
		h := newHolder(t)
		return &provingCaller{h, v, c, s.sign(claims(map[string]any{"cnf": map[string]any{"jkt": h.jkt}}))}
	}
	full := func(p *provingCaller) {
		t.Helper()
		err := p.present(p.proof(nil))
		if !errors.Is(err, credential.ErrTokenProofs) || !errors.Is(err, session.ErrStale) {
			t.Fatal(err)
		}
		a := new(denial.Resource).Answer(err)
		if a.Status != http.StatusServiceUnavailable {
			t.Fatal(a)
		}
	}
	var first []string
	greedy := caller()
	for range most / 4 {
		first = append(first, greedy.proof(nil))
		if err := greedy.present(first[len(first)-1]); err != nil {
			t.Fatal(err)
		}
	}
	full(greedy) // has its share, and the others theirs
	for range 3 {
		other := caller()
		for range most / 4 {
			if err := other.present(other.proof(nil)); err != nil {
				t.Fatal(err)
			}
		}
	}
	full(caller())
	// None of them was forgotten to make room.
	for _, proof := range first {
		if greedy.present(proof) == nil {
			t.Fatal("a proof was accepted twice")
		}
	}
	c.set(epoch.Add(2 * time.Minute))
	for range most / 4 {
		if err := greedy.present(greedy.proof(nil)); err != nil {
			t.Fatal(err)
		}
	}
	full(greedy)
}

// What is stated about memory holds.
func TestProofsTakeTheMemoryThatIsStated(t *testing.T) {
	const most = 20_000
	c := newClock(epoch)
	before := heap()
	s := credential.NewSeen(most, time.Minute, epoch)
	for i := range 3 * most {
		var key [sha256.Size]byte // each proof by another key
		key[0], key[1], key[2] = byte(i), byte(i>>8), byte(i>>16)
		at := epoch.Add(time.Duration(i%60) * time.Second)
		err := s.Add(key, fmt.Sprint(i), at, c.now())
		if i < most && err != nil || i >= most && !errors.Is(err, credential.ErrTokenProofs) {
			t.Fatal(i, err)
		}
	}
	if taken := heap() - before; taken > most*250 {
		t.Fatalf("%d bytes each", taken/most)
	}
	runtime.KeepAlive(s)
}

func TestNonceIsDemanded(t *testing.T) {
	key := []byte(strings.Repeat("k", 32))
	p := newProvingCaller(t, func(o *credential.ProofOptions) { o.NonceKey = key })
	present := func(nonce any) (http.Header, error) {
		err := p.present(p.proof(map[string]any{"nonce": nonce}))
		h := make(http.Header)
		if err != nil {
			a := new(denial.Resource).Answer(err)
			if a.Status != http.StatusUnauthorized {
				t.Fatal(a)
			}
			a.Header(h, true)
		}
		return h, err
	}
	h, err := present(nil)
	challenges := h.Values("WWW-Authenticate")
	if !errors.Is(err, credential.ErrTokenNonce) || len(challenges) != 2 || !strings.HasPrefix(challenges[1], `DPoP error="use_dpop_nonce", algs="ES256 `) {
		t.Fatal(err, h)
	}
	nonce := h.Get("DPoP-Nonce")
	if _, err := present(nonce); err != nil {
		t.Fatal(err)
	}
	// Another server of the resource takes it too.
	twin := newChecker(t, p.clock, func(o *credential.ProofOptions) { o.NonceKey = key })
	if err := twin.Check(p.request(p.proof(map[string]any{"nonce": nonce})), p.token, session.Identity{Keys: []string{"jkt:" + p.jkt}}); err != nil {
		t.Fatal(err)
	}
	forged := newChecker(t, p.clock, func(o *credential.ProofOptions) { o.NonceKey = []byte(strings.Repeat("x", 32)) }).Nonce()
	for _, bad := range []any{"", forged, nonce[:len(nonce)-1], 7} {
		if _, err := present(bad); !errors.Is(err, credential.ErrTokenNonce) {
			t.Fatal(bad, err)
		}
	}
	p.clock.set(epoch.Add(time.Minute))
	if _, err := present(nonce); err != nil {
		t.Fatal(err)
	}
	p.clock.set(epoch.Add(2 * time.Minute))
	if _, err := present(nonce); !errors.Is(err, credential.ErrTokenNonce) {
		t.Fatal(err)
	}
	// Any other fault has a challenge too.
	err = p.present()
	a := new(denial.Resource).Answer(err)
	h = make(http.Header)
	a.Header(h, true)
	if got := h.Values("WWW-Authenticate"); len(got) != 2 || !strings.HasPrefix(got[1], `DPoP error="invalid_dpop_proof"`) || h.Get("DPoP-Nonce") == "" {
		t.Fatal(err, h)
	}
}

// What the request says of the host is not believed, and there is nothing else to
// go by: a proof for another server would be as good.
func TestProofWithoutAnOriginIsRefused(t *testing.T) {
	for name, of := range map[string]func(*http.Request) string{"none": nil, "none for this": func(*http.Request) string { return "" }} {
		p := newProvingCaller(t, func(o *credential.ProofOptions) { o.Origin, o.OriginOf = "", of })
		r := p.request(p.proof(nil))
		r.Host = "tools.example"
		if _, err := p.v.VerifyRequest(r); !errors.Is(err, credential.ErrTokenPossession) || !strings.Contains(err.Error(), "configured") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestProofOptionsThatAreRefused(t *testing.T) {
	for name, o := range map[string]credential.ProofOptions{
		"origin with a path": {Origin: "https://tools.example/mcp"},
		"origin, no scheme":  {Origin: "tools.example"},
		"two origins":        {Origin: "https://tools.example", OriginOf: func(*http.Request) string { return "" }},
		"age":                {MaxAge: time.Hour},
		"age too little":     {MaxAge: time.Millisecond},
		"proofs":             {MaxProofs: -1},
		"nonce key":          {NonceKey: []byte("short")},
	} {
		if _, err := credential.NewProofChecker(o); !errors.Is(err, session.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// certificate is a client's, by itself: RFC 8705 asks for nobody's signature.
func certificate(t *testing.T) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "agent"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// Over real TLS: the token of a certificate is good only on a connection that
// was made with it, and where it is bound to a key too, only with both.
func TestCertificateAndProofOverTLS(t *testing.T) {
	s, h, c := newSigner(t), newHolder(t), newClock(time.Now())
	origin := ""
	checker := newChecker(t, c, func(o *credential.ProofOptions) {
		o.Origin, o.OriginOf = "", func(*http.Request) string { return origin }
	})
	v := newVerifier(t, []jose.JSONWebKey{s.public()}, with(c), func(o *credential.Options) { o.Possession = checker.Check })
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if _, err := v.VerifyRequest(r); err != nil {
			a := new(denial.Resource).Answer(err)
			a.Write(w, r, nil)
		}
	}))
	server.TLS = &tls.Config{ClientAuth: tls.RequestClientCert}
	server.StartTLS()
	t.Cleanup(server.Close)
	origin = server.URL
	own, other := certificate(t), certificate(t)
	x5t := map[string]any{"x5t#S256": hash64(own.Certificate[0])}
	both := map[string]any{"x5t#S256": hash64(own.Certificate[0]), "jkt": h.jkt}
	call := func(cnf map[string]any, cert *tls.Certificate, proved bool) int {
		t.Helper()
		token := s.sign(claims(map[string]any{"cnf": cnf, "iat": time.Now().Unix(), "exp": time.Now().Add(time.Hour).Unix()}))
		transport := server.Client().Transport.(*http.Transport).Clone()
		defer transport.CloseIdleConnections()
		if cert != nil {
			transport.TLSClientConfig.Certificates = []tls.Certificate{*cert}
		}
		r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, server.URL+"/a%2Fb?q", nil)
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set("Authorization", "Bearer "+token)
		if proved {
			r.Header.Set("Authorization", "DPoP "+token)
			r.Header.Set("DPoP", h.sign(proofOf(token, http.MethodGet, server.URL+"/a%2Fb", c.now(), nil), nil))
		}
		resp, err := (&http.Client{Transport: transport}).Do(r)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		return resp.StatusCode
	}
	for _, tt := range []struct {
		name   string
		cnf    map[string]any
		cert   *tls.Certificate
		proved bool
		want   int
	}{
		{"its certificate", x5t, &own, false, 200},
		{"another's", x5t, &other, false, 401},
		{"none", x5t, nil, false, 401},
		{"a proof instead", x5t, nil, true, 401},
		{"both", both, &own, true, 200},
		{"a proof that it does not want", x5t, &own, true, 401},
		{"no proof", both, &own, false, 401},
		{"another's certificate, a proof", both, &other, true, 401},
		{"a key", map[string]any{"jkt": h.jkt}, nil, true, 200},
	} {
		if got := call(tt.cnf, tt.cert, tt.proved); got != tt.want {
			t.Errorf("%s: %d", tt.name, got)
		}
	}
}

// FuzzProof: no proof panics, and none is accepted that its holder did not make.
func FuzzProof(f *testing.F) {
	p := newProvingCaller(f)
	good := p.proof(nil)
	f.Add(good)
	f.Add(good[:len(good)-1])
	f.Add("eyJ0eXAiOiJkcG9wK2p3dCIsImFsZyI6Im5vbmUifQ.e30.")
	f.Fuzz(func(t *testing.T, proof string) {
		if err := p.present(proof); err == nil && proof != good {
			t.Fatalf("accepted %q", proof)
		}
	})
}

// FuzzProofClaims: whatever the holder signs is accepted or refused.
func FuzzProofClaims(f *testing.F) {
	p := newProvingCaller(f)
	b, err := json.Marshal(proofOf(p.token, http.MethodPost, here, epoch, nil))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte(`{"jti":"a","htm":"POST","htu":"https://%zz","iat":1e308,"ath":""}`))
	f.Fuzz(func(t *testing.T, payload []byte) {
		own := *p.holder
		own.t = t
		_, err := p.v.VerifyRequest(p.request(own.sign(payload, nil)).WithContext(context.Background()))
		if err == nil {
			var c map[string]any
			if json.Unmarshal(payload, &c) != nil || c["htm"] != http.MethodPost || c["ath"] != hash64([]byte(p.token)) {
				t.Fatalf("accepted %q", payload)
			}
		}
	})
}
