package credential_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/interlock-fabric/interlock/pkg/credential"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// authorizationServer answers for opaque tokens, on a real socket.
type authorizationServer struct {
	*httptest.Server
	asked  atomic.Int64
	status atomic.Int64
	gate   chan struct{} // when set, an answer waits for it

	mu      sync.Mutex
	answers map[string]string
}

func newAuthorizationServer(t *testing.T) *authorizationServer {
	a := &authorizationServer{answers: make(map[string]string)}
	a.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		a.asked.Add(1)
		if a.gate != nil {
			<-a.gate
		}
		if s := a.status.Load(); s != 0 {
			w.WriteHeader(int(s))
			return
		}
		id, secret, ok := r.BasicAuth()
		if r.Method != http.MethodPost || !ok || id != "gateway" || secret != "p%3Aw" || r.PostFormValue("token_type_hint") != "access_token" {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		a.mu.Lock()
		answer, ok := a.answers[r.PostFormValue("token")]
		a.mu.Unlock()
		if !ok {
			answer = `{"active":false}`
		}
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write([]byte(answer))
	}))
	t.Cleanup(a.Close)
	return a
}

// know has the server answer with these members beside the usual ones.
func (a *authorizationServer) know(t *testing.T, token string, change map[string]any) {
	t.Helper()
	a.answer(token, changed(map[string]any{
		"active": true, "sub": "ann", "aud": audience, "client_id": "cli", "scope": "read write",
		"exp": time.Now().Add(time.Hour).Unix(),
	}, change))
}

func (a *authorizationServer) answer(token, body string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.answers[token] = body
}

func (a *authorizationServer) verifier(t *testing.T, c *clock, change ...func(*credential.Introspection)) *credential.Verifier {
	t.Helper()
	in := &credential.Introspection{URL: a.URL, ClientID: "gateway", ClientSecret: "p:w"}
	for _, f := range change {
		f(in)
	}
	v, err := credential.New(credential.Options{
		Audiences: []string{audience}, Clock: c.now,
		Issuers: []credential.Issuer{{URL: issuerURL, Tenant: "acme", Introspection: in}},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(v.Close)
	return v
}

func refusedAs(t *testing.T, v *credential.Verifier, token string, want error) {
	t.Helper()
	if id, err := v.Verify(t.Context(), token); !errors.Is(err, want) || !errors.Is(err, credential.ErrToken) {
		t.Fatalf("%+v, %v; want %v", id, err, want)
	}
}

func TestOpaqueTokenIsAskedAboutOncePerMaxAge(t *testing.T) {
	a, c := newAuthorizationServer(t), newClock(time.Now())
	v := a.verifier(t, c)
	const token = "2YotnFZFEjr1zCsicMWpAA"
	a.know(t, token, nil)
	id := seen(t, v, token)
	want := session.TokenValue("", []byte(token))
	if id.Tenant != "acme" || id.Issuer != issuerURL || id.User != "ann" || id.Client != "cli" || id.Token != want || len(id.Capabilities) != 2 {
		t.Fatalf("%+v", id)
	}
	for range 3 {
		if _, err := v.Verify(t.Context(), token); err != nil {
			t.Fatal(err)
		}
	}
	if n := a.asked.Load(); n != 1 {
		t.Fatalf("asked %d times", n)
	}
	// Revoked there: at once for those who ask, here once the answer is too old.
	a.answer(token, `{"active":false}`)
	c.set(c.now().Add(credential.DefaultIntrospectionMaxAge - time.Nanosecond))
	if _, err := v.Verify(t.Context(), token); err != nil || a.asked.Load() != 1 {
		t.Fatal(err, a.asked.Load())
	}
	c.set(c.now().Add(time.Nanosecond))
	for range 2 { // what is refused is not kept
		refusedAs(t, v, token, credential.ErrTokenInactive)
	}
	if n := a.asked.Load(); n != 3 {
		t.Fatalf("asked %d times", n)
	}
	a.know(t, token, nil)
	if _, err := v.Verify(t.Context(), token); err != nil {
		t.Fatal(err)
	}
	c.set(c.now().Add(-time.Hour)) // a clock that went back makes the age unknown
	a.answer(token, `{"active":false}`)
	refusedAs(t, v, token, credential.ErrTokenInactive)
}

func TestOpaqueTokenEndsWithItsExpiry(t *testing.T) {
	a, c := newAuthorizationServer(t), newClock(time.Now())
	v := a.verifier(t, c)
	end := time.Unix(c.now().Unix()+5, 0)
	a.know(t, "short", map[string]any{"exp": end.Unix(), "jti": "t1", "iss": issuerURL})
	if id := seen(t, v, "short"); id.Token != "t1" || !id.Expires.Equal(end) {
		t.Fatalf("%+v", id)
	}
	c.set(end.Add(30*time.Second - time.Nanosecond)) // too old to be believed, and asked about again
	if _, err := v.Verify(t.Context(), "short"); err != nil {
		t.Fatal(err)
	}
	c.set(end.Add(30 * time.Second))
	refusedAs(t, v, "short", credential.ErrTokenExpired)
	if n := a.asked.Load(); n != 3 {
		t.Fatalf("asked %d times", n)
	}
	a.know(t, "open", map[string]any{"exp": nil})
	if id := seen(t, v, "open"); !id.Expires.IsZero() {
		t.Fatal(id.Expires)
	}
}

func TestAnswersThatAreRefused(t *testing.T) {
	a, c := newAuthorizationServer(t), newClock(time.Now())
	v := a.verifier(t, c)
	good := `"active":true,"aud":"` + audience + `","sub":"ann"`
	for name, tt := range map[string]struct {
		answer string
		want   error
	}{
		"not active":      {`{"active":false,"sub":"ann"}`, credential.ErrTokenInactive},
		"does not say":    {`{"sub":"ann"}`, credential.ErrTokenIntrospection},
		"says it as text": {`{"active":"true","aud":"` + audience + `"}`, credential.ErrTokenIntrospection},
		"says it twice":   {`{` + good + `,"active":false}`, credential.ErrTokenIntrospection},
		"not an object":   {`[true]`, credential.ErrTokenIntrospection},
		"a page":          {`<html>`, credential.ErrTokenIntrospection},
		"too long":        {`{` + good + `,"x":"` + strings.Repeat("a", 64<<10) + `"}`, credential.ErrTokenIntrospection},
		"long, of spaces": {`{` + good + `}` + strings.Repeat(" ", 64<<10), credential.ErrTokenIntrospection},
		"deep":            {strings.Repeat(`{"active":`, 20_000), credential.ErrTokenIntrospection},
		"other issuer":    {`{` + good + `,"iss":"https://other.example"}`, credential.ErrTokenIssuer},
		"issuer no text":  {`{` + good + `,"iss":7}`, credential.ErrTokenIssuer},
		"other audience":  {`{"active":true,"aud":"https://other.example","sub":"ann"}`, credential.ErrTokenAudience},
		"no audience":     {`{"active":true,"sub":"ann"}`, credential.ErrTokenAudience},
		"not yet":         {fmt.Sprintf(`{%s,"nbf":%d}`, good, time.Now().Add(time.Hour).Unix()), credential.ErrTokenNotYet},
		"expired":         {fmt.Sprintf(`{%s,"exp":%d}`, good, time.Now().Add(-time.Hour).Unix()), credential.ErrTokenExpired},
		"expiry as text":  {`{` + good + `,"exp":"never"}`, credential.ErrTokenClaims},
		"actor unnamed":   {`{` + good + `,"act":{}}`, credential.ErrTokenClaims},
	} {
		t.Run(name, func(t *testing.T) {
			a.answer("token", tt.answer)
			refusedAs(t, v, "token", tt.want)
			if v.Kept("token") {
				t.Fatal("and kept")
			}
		})
	}
	implied := a.verifier(t, c, func(i *credential.Introspection) { i.AudienceImplied = true })
	a.answer("token", `{"active":true,"sub":"ann"}`)
	seen(t, implied, "token")
	a.answer("token2", `{"active":true,"sub":"ann","aud":"https://other.example"}`)
	refusedAs(t, implied, "token2", credential.ErrTokenAudience)
}

// The connection is really cut: the answer serves until its stated age.
func TestUnreachableIssuerOfOpaqueTokens(t *testing.T) {
	a, c := newAuthorizationServer(t), newClock(time.Now())
	v := a.verifier(t, c)
	a.know(t, "token", nil)
	seen(t, v, "token")
	a.status.Store(http.StatusServiceUnavailable)
	refusedAs(t, v, "unseen", credential.ErrTokenIntrospection)
	a.status.Store(http.StatusUnauthorized) // our credentials, not the caller's
	refusedAs(t, v, "unseen", session.ErrStale)
	a.CloseClientConnections()
	a.Close()
	c.set(c.now().Add(credential.DefaultIntrospectionMaxAge - time.Nanosecond))
	if _, err := v.Verify(t.Context(), "token"); err != nil {
		t.Fatal(err)
	}
	c.set(c.now().Add(time.Nanosecond))
	refusedAs(t, v, "token", credential.ErrTokenIntrospection)
	refusedAs(t, v, "unseen", session.ErrStale)
}

// A JWT is verified or refused here, whoever issued it, and what cannot be a
// token at all goes nowhere.
func TestIssuerIsAskedAboutOpaqueTokensOnly(t *testing.T) {
	a, c := newAuthorizationServer(t), newClock(time.Now())
	v := a.verifier(t, c)
	s := newSigner(t)
	jwt := fresh(s)
	sealer, err := jose.NewEncrypter(jose.A128GCM, jose.Recipient{Algorithm: jose.DIRECT, Key: make([]byte, 16)}, (&jose.EncrypterOptions{}).WithContentType("JWT"))
	if err != nil {
		t.Fatal(err)
	}
	object, err := sealer.Encrypt([]byte(jwt))
	if err != nil {
		t.Fatal(err)
	}
	nested, err := object.CompactSerialize()
	if err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		token string
		want  error
	}{
		"JWT":           {jwt, credential.ErrTokenKey}, // this issuer has no keys
		"nested JWE":    {nested, credential.ErrTokenMalformed},
		"JOSE, 2 parts": {jwt[:strings.LastIndexByte(jwt, '.')], credential.ErrTokenMalformed},
		"alg none":      {"eyJhbGciOiJub25lIn0.e30.", credential.ErrTokenAlgorithm},
		"spaces":        {"a b", credential.ErrTokenMalformed},
		"line break":    {"a\r\nb", credential.ErrTokenMalformed},
		"padding alone": {"==", credential.ErrTokenMalformed},
		"not ASCII":     {"tökén", credential.ErrTokenMalformed},
		"too long":      {strings.Repeat("a", credential.MaxTokenLen+1), credential.ErrTokenMalformed},
	} {
		t.Run(name, func(t *testing.T) { refusedAs(t, v, tt.token, tt.want) })
	}
	if n := a.asked.Load(); n != 0 {
		t.Fatalf("asked %d times", n)
	}
	for _, token := range []string{"a", "v2.local.abc", "a.b.c", "=a"[1:] + "=="} {
		refusedAs(t, v, token, credential.ErrTokenInactive)
	}
	if n := a.asked.Load(); n != 4 {
		t.Fatalf("asked %d times", n)
	}
}

// However many ask, the issuer is asked about one token once at a time, and
// about a bounded number of them.
func TestFloodOfOpaqueTokensIsBounded(t *testing.T) {
	const most = 128
	a, c := newAuthorizationServer(t), newClock(time.Now())
	a.gate = make(chan struct{})
	v := a.verifier(t, c)
	a.know(t, "token", nil)
	errs := make(chan error, 10)
	for range 10 {
		go func() { _, err := v.Verify(t.Context(), "token"); errs <- err }()
	}
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := v.Verify(gone, "token"); !errors.Is(err, credential.ErrTokenIntrospection) {
		t.Fatal(err)
	}
	flood, stop := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for i := range most - 1 {
		wg.Go(func() { _, _ = v.Verify(flood, fmt.Sprint("invented-", i)) })
	}
	limit := time.After(20 * time.Second)
	for tick := time.NewTicker(time.Millisecond); a.asked.Load() < most; {
		select {
		case <-tick.C:
		case <-limit:
			t.Fatalf("asked %d times", a.asked.Load())
		}
	}
	refusedAs(t, v, "one-more", session.ErrStale)
	stop()
	wg.Wait()
	close(a.gate)
	for range 10 {
		if err := <-errs; err != nil {
			t.Fatal(err)
		}
	}
	if n := a.asked.Load(); n != most {
		t.Fatalf("asked %d times", n)
	}
}

// An issuer that never answers holds a request no longer than the bound, and
// Close ends the question.
func TestIntrospectionIsBoundedInTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := &jwks{gate: make(chan struct{})}
		j.body.Store("")
		v, err := credential.New(credential.Options{
			Audiences: []string{audience}, HTTP: &http.Client{Transport: j},
			Issuers: []credential.Issuer{{URL: issuerURL, Tenant: "acme", Introspection: &credential.Introspection{URL: "https://id.example/introspect"}}},
		})
		if err != nil {
			t.Fatal(err)
		}
		defer v.Close()
		start := time.Now()
		refusedAs(t, v, "token", credential.ErrTokenIntrospection)
		if d := time.Since(start); d != 5*time.Second {
			t.Fatal(d)
		}
		done := make(chan error)
		go func() { _, err := v.Verify(t.Context(), "token"); done <- err }()
		synctest.Wait()
		v.Close()
		if err := <-done; !errors.Is(err, credential.ErrTokenIntrospection) {
			t.Fatal(err)
		}
		refusedAs(t, v, "token", credential.ErrTokenKeys)
	})
}

// FuzzIntrospection: no answer panics or makes an identity that the issuer did
// not call active.
func FuzzIntrospection(f *testing.F) {
	j := &jwks{}
	v, err := credential.New(credential.Options{
		Audiences: []string{audience}, HTTP: &http.Client{Transport: j}, Clock: at(epoch), CacheBytes: -1,
		Issuers: []credential.Issuer{{URL: issuerURL, Tenant: "acme", Introspection: &credential.Introspection{URL: "https://id.example/introspect"}}},
	})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(v.Close)
	f.Add("token", `{"active":true,"aud":"`+audience+`","sub":"ann","cnf":{"jkt":"x"}}`)
	f.Add("a.b.c", `{"active":false}`)
	f.Add("trailing", `{"active":true,"aud":"`+audience+`"}}`)
	f.Add("eyJhbGciOiJub25lIn0.e30.", `{"active":true,"active":false}`)
	f.Fuzz(func(t *testing.T, token, answer string) {
		j.body.Store(answer)
		id, err := v.Verify(context.Background(), token)
		if err != nil {
			return
		}
		var c map[string]any
		if json.Unmarshal([]byte(answer), &c) != nil || c["active"] != true || id.Tenant != "acme" || id.Issuer != issuerURL || id.Token == "" {
			t.Fatalf("%q, %q: %+v", token, answer, id)
		}
	})
}
