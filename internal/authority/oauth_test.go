package authority

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/google/go-cmp/cmp"

	"github.com/interlock-fabric/interlock/internal/access"
	"github.com/interlock-fabric/interlock/internal/api"
	"github.com/interlock-fabric/interlock/internal/issuers"
	"github.com/interlock-fabric/interlock/pkg/authority"
	"github.com/interlock-fabric/interlock/pkg/credential"
	"github.com/interlock-fabric/interlock/pkg/enforce"
	"github.com/interlock-fabric/interlock/pkg/natsfeed"
	"github.com/interlock-fabric/interlock/pkg/session"
)

const (
	toolsURL  = "https://tools.example/mcp"
	agentURL  = "https://agent.example/a2a"
	betaIDP   = "https://beta.example"
	theSecret = "0123456789abcdef0123456789abcdef-"
)

// minter mints the tokens of an issuer.
type minter struct {
	t   testing.TB
	url string
	key *ecdsa.PrivateKey
}

func newMinter(t testing.TB, url string) *minter {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return &minter{t, url, key}
}

func (m *minter) keys() []byte {
	b, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: m.key.Public(), KeyID: "k"}}})
	if err != nil {
		m.t.Fatal(err)
	}
	return b
}

func (m *minter) token(change map[string]any) string {
	m.t.Helper()
	claims := map[string]any{
		"iss": m.url, "aud": toolsURL, "sub": "ann", "sid": "s1", "jti": "t1", "client_id": "bot",
		"iat": time.Now().Unix(), "auth_time": time.Now().Add(-time.Minute).Unix(), "exp": time.Now().Add(time.Hour).Unix(),
	}
	maps.Copy(claims, change)
	b, err := json.Marshal(claims)
	if err != nil {
		m.t.Fatal(err)
	}
	s, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: m.key, KeyID: "k"}}, (&jose.SignerOptions{}).WithType("at+jwt"))
	if err != nil {
		m.t.Fatal(err)
	}
	jws, err := s.Sign(b)
	if err != nil {
		m.t.Fatal(err)
	}
	token, err := jws.CompactSerialize()
	if err != nil {
		m.t.Fatal(err)
	}
	return token
}

// standards is an authority that verifies tokens of two tenants, and what asks it.
type standards struct {
	*fixture
	acme, beta *minter
	dir, url   string
	http       *http.Client
}

func startStandards(t *testing.T, tokens string, o Options) *standards {
	t.Helper()
	s := &standards{acme: newMinter(t, issuer), beta: newMinter(t, betaIDP), dir: t.TempDir()}
	for name, b := range map[string][]byte{"acme.json": s.acme.keys(), "beta.json": s.beta.keys(), "secret": []byte(theSecret + "acme\n"), "secret-beta": []byte(theSecret + "beta"),
		"access.yaml": []byte(`clients:
- {id: "gateway:eu", secret_file: secret, role: viewer, tenants: [acme]}
- {id: idp, secret_file: secret, role: issuer, tenants: [acme]}
- {id: other, secret_file: secret-beta, role: issuer, tenants: [beta]}
wide_per_minute: 8
`), "tokens.yaml": []byte(fmt.Sprintf(`audiences: [%q, %q]
issuers:
- {url: %q, tenant: acme, jwks_file: acme.json%s}
- {url: %q, tenant: beta, jwks_file: beta.json}
`, toolsURL, agentURL, issuer, tokens, betaIDP))} {
		if err := os.WriteFile(filepath.Join(s.dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	var err error
	if o.Access, err = access.Load(filepath.Join(s.dir, "access.yaml")); err != nil {
		t.Fatal(err)
	}
	if o.Tokens, err = issuers.LoadTokens(filepath.Join(s.dir, "tokens.yaml")); err != nil {
		t.Fatal(err)
	}
	o.Tenants, o.APIListen = []string{"acme", "beta"}, "127.0.0.1:0"
	s.fixture = start(t, o)
	s.url = "http://" + s.a.APIAddr()
	tr := &http.Transport{}
	t.Cleanup(tr.CloseIdleConnections)
	s.http = &http.Client{Transport: tr, Timeout: 20 * time.Second}
	s.ready()
	return s
}

// ready waits until the state is fresh.
func (s *standards) ready() {
	s.Helper()
	s.until(func() bool {
		code, _, _ := s.post("gateway:eu", "introspect", url.Values{"token": {"x"}}.Encode())
		_, err := s.a.Introspect(access.With(s.ctx, access.NewPrincipal("x", access.MeansToken, access.Grant{Role: access.Viewer, Tenants: []string{"*"}})), s.acme.token(nil))
		return code == 200 && err == nil
	})
}

func secretOf(client string) string {
	if client == "other" {
		return theSecret + "beta"
	}
	return theSecret + "acme"
}

func (s *standards) post(who, endpoint, body string) (int, http.Header, string) {
	s.Helper()
	req, err := http.NewRequestWithContext(s.ctx, http.MethodPost, s.url+"/v1/oauth/"+endpoint, strings.NewReader(body))
	if err != nil {
		s.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	if endpoint == "global-token-revocation" {
		req.Header.Set("Content-Type", "application/json")
	}
	if who != "" {
		req.SetBasicAuth(url.QueryEscape(who), url.QueryEscape(secretOf(who)))
	}
	resp, err := s.http.Do(req)
	if err != nil {
		s.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		s.Fatal(err)
	}
	return resp.StatusCode, resp.Header, string(b)
}

func (s *standards) revoke(who, token string) error {
	s.Helper()
	form := url.Values{"token": {token}, "token_type_hint": {"access_token"}}
	if code, _, body := s.post(who, "revoke", form.Encode()); code != http.StatusOK {
		return fmt.Errorf("%d %s", code, body)
	}
	return nil
}

func (s *standards) introspect(who, token string) map[string]any {
	s.Helper()
	code, h, body := s.post(who, "introspect", url.Values{"token": {token}}.Encode())
	answer := map[string]any{}
	if err := json.Unmarshal([]byte(body), &answer); err != nil || code != http.StatusOK || h.Get("Content-Type") != "application/json" {
		s.Fatalf("%d %v %s: %v", code, h, body, err)
	}
	return answer
}

func (s *standards) active(token string) bool {
	s.Helper()
	a := s.introspect("gateway:eu", token)
	if a["active"] != true && len(a) != 1 {
		s.Errorf("an inactive token is told of: %v", a)
	}
	return a["active"] == true
}

// A client revokes, and asks; an enforcer denies.
func TestTokenIsRevoked(t *testing.T) {
	s := startStandards(t, "", Options{})
	e := s.enforcer("tools", enforce.Options{})
	token, other := s.acme.token(nil), s.acme.token(map[string]any{"jti": "t2"})
	if !s.active(token) || !s.active(other) {
		t.Fatal("not active to begin with")
	}
	if err := s.revoke("idp", token); err != nil {
		t.Fatal(err)
	}
	// What was acknowledged is what the next answer says.
	if s.active(token) || !s.active(other) {
		t.Errorf("the revoked one is active: %v, the other: %v", s.active(token), s.active(other))
	}
	id := session.Identity{Tenant: "acme", Issuer: issuer, Token: "t1", Session: session.SessionRef{ID: "s1"}, User: "ann"}
	s.until(func() bool {
		p, err := e.Prepare(id)
		return err == nil && errors.Is(e.Check(p, session.Call{}), session.ErrRevoked)
	})
	id.Token = "t2"
	if p, err := e.Prepare(id); err != nil || e.Check(p, session.Call{}) != nil {
		t.Error("another token of the session is denied")
	}

	// Nothing happens to what is not a good token of the client's tenants, and who
	// asks cannot tell why.
	_, before, _ := s.a.seq.Head()
	for what, token := range map[string]string{
		"another tenant's":  s.beta.token(nil),
		"a stranger's":      newMinter(t, "https://stranger.example").token(nil),
		"a forged one":      newMinter(t, issuer).token(map[string]any{"jti": "t3"}),
		"an expired one":    s.acme.token(map[string]any{"exp": time.Now().Add(-time.Hour).Unix()}),
		"for somebody else": s.acme.token(map[string]any{"aud": "https://other.example"}),
	} {
		if code, _, body := s.post("idp", "revoke", url.Values{"token": {token}}.Encode()); code != 200 || body != "{}\n" {
			t.Errorf("%s: %d %s", what, code, body)
		}
		if a := s.introspect("idp", token); len(a) != 1 || a["active"] != false {
			t.Errorf("%s: %v", what, a)
		}
	}
	if _, now, _ := s.a.seq.Head(); now != before {
		t.Errorf("%d batches were written", now-before)
	}
	if a := s.introspect("other", s.beta.token(nil)); a["active"] != true {
		t.Error("another tenant's token was revoked")
	}
	// A role in one tenant is none in another, however much of that is visible.
	both := access.With(s.ctx, access.NewPrincipal("both", access.MeansToken, access.Grant{Role: access.Viewer, Tenants: []string{"acme"}}, access.Grant{Role: access.Issuer, Tenants: []string{"beta"}}))
	for what, err := range map[string]error{
		"a token":  s.a.RevokeToken(both, other),
		"the user": s.a.RevokeSubject(both, api.SubjectID{Format: "iss_sub", Issuer: issuer, Subject: "ann"}),
	} {
		if problemOf(err) != "forbidden" {
			t.Errorf("%s by a viewer: %v", what, err)
		}
	}
	if !s.active(other) {
		t.Error("a viewer has revoked")
	}
	// All of it is in the audit.
	s.until(func() bool {
		var done, refused int
		for _, r := range s.audited(authority.AuditQuery{Kind: authority.AuditDecision, Incident: incidentToken}) {
			switch {
			case r.Principal.Name == "both" && r.Outcome == authority.OutcomeRefused:
			case r.Principal != authority.AuditPrincipal{Name: "client:idp", Means: "client"}:
				t.Fatalf("by %+v", r.Principal)
			case r.Outcome == authority.OutcomeDone:
				done++
			default:
				refused++
			}
		}
		return done == 1 && refused == 5
	})
}

// The mechanism is the extent; the entry on a session does not end with the token.
func TestSessionEndsWithItsToken(t *testing.T) {
	s := startStandards(t, "", Options{})
	s.a.tokens.now.Revoke = issuers.OfSession
	if err := s.revoke("idp", s.acme.token(nil)); err != nil {
		t.Fatal(err)
	}
	if s.active(s.acme.token(map[string]any{"jti": "t2"})) {
		t.Error("another token of the session is active")
	}
	if !s.active(s.acme.token(map[string]any{"jti": "t3", "sid": "s2"})) {
		t.Error("another session's token is not")
	}
}

// Whoever asks comes to the identity that a token makes, and every decision counts
// that an enforcer knows of.
func TestIntrospectionIsTheIdentity(t *testing.T) {
	opaque := map[string]map[string]any{"opaque-1": {"active": true, "sub": "carl", "sid": "s9", "aud": toolsURL, "scope": "read"}}
	up := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		answer := opaque[r.FormValue("token")]
		if answer == nil {
			answer = map[string]any{"active": false}
		}
		_ = json.NewEncoder(w).Encode(answer)
	}))
	t.Cleanup(up.Close)
	s := startStandards(t, fmt.Sprintf(", introspection: {url: %q}", up.URL), Options{})
	jkt := strings.Repeat("A", 43)
	full := map[string]any{
		"aud": []string{toolsURL, agentURL, "https://other.example"}, "acr": "silver", "txn": "x1", "session_start": time.Now().Add(-time.Hour).Unix(),
		"session_ancestors": []any{"p1", map[string]any{"sid": "p2", "iss": betaIDP}}, "roles": []string{"r1", "r2"}, "scope": "read write",
		"act":     map[string]any{"sub": "inner", "iss": betaIDP, "act": map[string]any{"sub": "spiffe://corp/outer"}},
		"digests": []string{"code:sha256:" + strings.Repeat("0", 64)}, "credential_ids": []string{"urn:uuid:c"}, "blueprint": "b", "owner": "o",
		"cnf": map[string]any{"jkt": jkt, "x5t#S256": jkt},
	}
	direct, err := s.a.o.Tokens.Verifier(credential.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(direct.Close)
	asking, err := credential.New(credential.Options{Audiences: []string{toolsURL}, Issuers: []credential.Issuer{{URL: issuer, Tenant: "acme",
		Introspection: &credential.Introspection{URL: s.url + "/v1/oauth/introspect", ClientID: "gateway:eu", ClientSecret: secretOf(""), MaxAge: time.Millisecond}}}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(asking.Close)
	token := s.acme.token(full)
	want, err := direct.Verify(s.ctx, token)
	if err != nil {
		t.Fatal(err)
	}
	// As package credential reads the answer: it asks itself for opaque tokens only.
	raw, err := json.Marshal(s.introspect("gateway:eu", token))
	if err != nil {
		t.Fatal(err)
	}
	got, err := credential.Unverified(raw, credential.Claims{})
	if err != nil {
		t.Fatal(err)
	}
	got.Tenant, got.Skew = want.Tenant, want.Skew
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if aud := s.introspect("gateway:eu", token)["aud"]; !cmp.Equal(aud, []any{toolsURL, agentURL}) {
		t.Errorf("for %v", aud)
	}
	// One that is bound in a way that the answer cannot say is good for nobody.
	if s.active(s.acme.token(map[string]any{"cnf": map[string]any{"kid": "k"}})) {
		t.Error("a token that needs a proof became a bearer token")
	}
	if id, err := asking.Verify(s.ctx, "opaque-1"); err != nil || id.User != "carl" || id.Session.ID != "s9" {
		t.Errorf("%+v, %v", id, err)
	}

	bystander := s.beta.token(nil)
	for _, c := range []struct {
		kind, value string
		still       []any // what the token is good for
	}{
		{"session", "s1", nil}, {"user", "ann", nil}, {"tenant", "acme", nil}, {"agent", "spiffe://corp/outer", nil}, {"role", "r2", nil},
		{"audience", toolsURL, []any{agentURL}},
	} {
		target := []authority.Target{authority.One("acme", c.kind, issuer, c.value)}
		s.decide(authority.Request{Operation: authority.Suspend, Targets: target, Reason: "anomaly", Incident: "INC-1"})
		if a := s.introspect("gateway:eu", token); a["active"] != (c.still != nil) || c.still != nil && !cmp.Equal(a["aud"], any(c.still)) {
			t.Errorf("%s suspended: %v", c.kind, a)
		}
		if c.kind == "tenant" {
			if _, err := asking.Verify(s.ctx, "opaque-1"); !errors.Is(err, credential.ErrTokenInactive) {
				t.Errorf("an opaque token: %v", err)
			}
		}
		if a := s.introspect("other", bystander); a["active"] != true {
			t.Errorf("%s suspended: another tenant's is %v", c.kind, a)
		}
		s.decide(authority.Request{Operation: map[bool]authority.Operation{true: authority.Restore, false: authority.Resume}[c.kind == "tenant"], Targets: target, Reason: "restored", Incident: "INC-1"})
		s.until(func() bool {
			return cmp.Equal(s.introspect("gateway:eu", token)["aud"], any([]any{toolsURL, agentURL}))
		})
	}

	// Whoever has decided reads that in the next answer, though the enforcer is yet
	// to hear of it.
	deaf := s.a.tokens.now.enforcer
	late, _, err := s.a.store.Enroll("late", []string{"acme"}, []string{"nats://127.0.0.1"}, "")
	if err != nil {
		t.Fatal(err)
	}
	feed := &lateFeed{mute: mute{natsfeed.NewAuthority(s.a.nc, "late")}}
	behind, err := enforce.Open(s.ctx, feed, &enforce.Options{Enrollment: late})
	if err != nil {
		t.Fatal(err)
	}
	s.a.tokens.now.enforcer = behind
	feed.late.Store(true)
	if !s.active(token) {
		t.Error("not active to begin with")
	}
	s.decide(authority.Request{Operation: authority.Suspend, Targets: []authority.Target{authority.One("acme", "session", issuer, "s1")}, Reason: "anomaly", Incident: "INC-2"})
	p, err := behind.Prepare(want)
	if err != nil || behind.Check(p, session.Call{}) != nil {
		t.Errorf("the enforcer has heard of it, or is stale: %v, %v", err, behind.Check(p, session.Call{}))
	}
	if s.active(token) {
		t.Error("what was acknowledged does not count")
	}
	if err := behind.Close(); err != nil {
		t.Error(err)
	}

	// What cannot be shown to be fresh is not called active, nor inactive.
	en, _, err := s.a.store.Enroll("deaf", nil, []string{"nats://127.0.0.1"}, "")
	if err != nil {
		t.Fatal(err)
	}
	e, err := enforce.Start(deafFeed{natsfeed.NewAuthority(s.a.nc, "deaf")}, &enforce.Options{Enrollment: en})
	if err != nil {
		t.Fatal(err)
	}
	s.a.tokens.now.enforcer = e
	if err := deaf.Close(); err != nil {
		t.Error(err)
	}
	if code, h, body := s.post("gateway:eu", "introspect", url.Values{"token": {token}}.Encode()); code != 503 || h.Get("Retry-After") == "" || !strings.Contains(body, `"temporarily_unavailable"`) {
		t.Errorf("stale: %d %s", code, body)
	}
	up.Close()
	for _, endpoint := range []string{"introspect", "revoke"} {
		if code, _, body := s.post("idp", endpoint, "token=opaque-2"); code != 503 || !strings.Contains(body, `"temporarily_unavailable"`) {
			t.Errorf("%s while the issuer cannot be asked: %d %s", endpoint, code, body)
		}
	}
}

// lateFeed withholds batches while it is late.
type lateFeed struct {
	mute
	late atomic.Bool
}

func (f *lateFeed) Start(ctx context.Context, sink enforce.Sink) error {
	return f.Feed.Start(ctx, lateSink{sink, f})
}

func (f *lateFeed) Log(ctx context.Context, from uint64, fn func(uint64, []byte) error) (uint64, error) {
	if f.late.Load() {
		<-ctx.Done()
		return from, ctx.Err()
	}
	return f.Feed.Log(ctx, from, fn)
}

type lateSink struct {
	enforce.Sink
	f *lateFeed
}

func (s lateSink) Batch(frame []byte) {
	if !s.f.late.Load() {
		s.Sink.Batch(frame)
	}
}

// deafFeed never starts.
type deafFeed struct{ *natsfeed.Feed }

func (deafFeed) Start(ctx context.Context, _ enforce.Sink) error { <-ctx.Done(); return ctx.Err() }

// Each user is denied with what he holds, and nothing that he signs in for anew.
func TestGlobalTokenRevocation(t *testing.T) {
	s := startStandards(t, "", Options{})
	s.a.tokens.now.EmailIssuer = issuer
	subject := func(m map[string]any) string {
		b, err := json.Marshal(map[string]any{"sub_id": m})
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	for user, sub := range map[string]map[string]any{
		"ann": {"format": "iss_sub", "iss": issuer, "sub": "ann"}, "bob": {"format": "opaque", "id": "bob"}, "eve@acme.example": {"format": "email", "email": "eve@acme.example"},
	} {
		token := s.acme.token(map[string]any{"sub": user, "sid": "of " + user, "jti": "of " + user})
		theirs := s.beta.token(map[string]any{"sub": user})
		if !s.active(token) {
			t.Fatal("not active to begin with")
		}
		if code, _, body := s.post("idp", "global-token-revocation", subject(sub)); code != 204 || body != "" {
			t.Errorf("%s: %d %s", user, code, body)
		}
		if s.active(token) {
			t.Errorf("%s's token is active", user)
		}
		if s.introspect("other", theirs)["active"] != true {
			t.Errorf("%s's namesake at another issuer is denied", user)
		}
		again := s.acme.token(map[string]any{"sub": user, "sid": "new " + user, "jti": "new " + user, "auth_time": time.Now().Add(2 * time.Minute).Unix()})
		if !s.active(again) {
			t.Errorf("%s cannot sign in anew", user)
		}
	}
	_, before, _ := s.a.seq.Head()
	for what, c := range map[string]struct {
		who, body string
		code      int
	}{
		"a viewer":                {"gateway:eu", subject(map[string]any{"format": "opaque", "id": "ann"}), 403},
		"nobody":                  {"", subject(map[string]any{"format": "opaque", "id": "ann"}), 401},
		"another tenant's issuer": {"other", subject(map[string]any{"format": "iss_sub", "iss": issuer, "sub": "ann"}), 404},
		"no issuer of ours":       {"idp", subject(map[string]any{"format": "iss_sub", "iss": "https://no.example", "sub": "ann"}), 404},
		"another tenant's emails": {"other", subject(map[string]any{"format": "email", "email": "a@b"}), 404},
		"a phone":                 {"idp", subject(map[string]any{"format": "phone_number", "phone_number": "+1"}), 400},
		"a format of two":         {"idp", subject(map[string]any{"format": "opaque", "id": "ann", "sub": "ann"}), 400},
		"an empty one":            {"idp", subject(map[string]any{"format": "iss_sub", "iss": issuer}), 400},
		"no format":               {"idp", subject(map[string]any{"id": "ann"}), 400},
		"no subject":              {"idp", `{}`, 400},
		"more than a subject":     {"idp", `{"sub_id":{"format":"opaque","id":"a"},"x":1}`, 400},
		"no JSON":                 {"idp", `sub_id=a`, 400},
	} {
		if code, h, body := s.post(c.who, "global-token-revocation", c.body); code != c.code || h.Get("Content-Type") != "application/problem+json" || (c.code == 404) != strings.Contains(body, "no such user") {
			t.Errorf("%s: %d %s", what, code, body)
		}
	}
	if _, now, _ := s.a.seq.Head(); now != before {
		t.Errorf("%d batches were written", now-before)
	}
	// It is wide, and limited as what is wide.
	limited := false
	for n := range 8 {
		code, h, _ := s.post("idp", "global-token-revocation", subject(map[string]any{"format": "opaque", "id": fmt.Sprint("u", n)}))
		limited = limited || code == 429 && h.Get("Retry-After") != ""
	}
	if !limited {
		t.Error("there is no limit")
	}
}

// The errors have the form and the codes that their standards say.
func TestOAuthErrors(t *testing.T) {
	s := startStandards(t, "", Options{})
	good := s.acme.token(nil)
	for what, c := range map[string]struct {
		who, endpoint, body string
		code                int
		err                 string
	}{
		"nobody":                {"", "introspect", "token=x", 401, "invalid_client"},
		"no such client":        {"nobody", "introspect", "token=x", 401, "invalid_client"},
		"no token":              {"idp", "revoke", "token_type_hint=access_token", 400, "invalid_request"},
		"an empty one":          {"idp", "introspect", "token=", 400, "invalid_request"},
		"two":                   {"idp", "revoke", "token=a&token=b", 400, "invalid_request"},
		"no form":               {"idp", "introspect", "token=%zz", 400, "invalid_request"},
		"in the URL":            {"idp", "introspect?token=x", "token=x", 400, "invalid_request"},
		"too long":              {"idp", "introspect", "token=" + strings.Repeat("x", 60<<10), 413, "invalid_request"},
		"a viewer":              {"gateway:eu", "revoke", "token=" + good, 403, "insufficient_scope"},
		"opaque":                {"idp", "revoke", "token=opaque", 400, "unsupported_token_type"},
		"encrypted":             {"idp", "revoke", "token=a.b.c.d.e", 400, "unsupported_token_type"},
		"bound to the unknown":  {"idp", "revoke", "token=" + s.acme.token(map[string]any{"cnf": map[string]any{"kid": "k"}}), 400, "unsupported_token_type"},
		"not valid yet":         {"idp", "revoke", "token=" + s.acme.token(map[string]any{"nbf": time.Now().Add(time.Hour).Unix()}), 400, "invalid_request"},
		"malformed, of a JWT":   {"idp", "revoke", "token=a.b.c", 200, ""},
		"longer than a token":   {"idp", "introspect", "token=" + strings.Repeat("x", credential.MaxTokenLen+1), 200, ""},
		"what is not known":     {"idp", "introspect", "token=x&resource=y&token_type_hint=saml", 200, ""},
		"a hint that is untrue": {"idp", "revoke", "token_type_hint=refresh_token&token=" + s.acme.token(map[string]any{"jti": "hinted"}), 200, ""},
	} {
		code, h, body := s.post(c.who, c.endpoint, c.body)
		var e struct {
			Error       string `json:"error"`
			Description string `json:"error_description"`
		}
		if c.code != 200 && (json.Unmarshal([]byte(body), &e) != nil || h.Get("Content-Type") != "application/json" || h.Get("Cache-Control") != "no-store" || e.Description == "") {
			t.Errorf("%s: %v %s", what, h, body)
		}
		if code != c.code || e.Error != c.err || (code == 401) != (h.Get("WWW-Authenticate") != "") {
			t.Errorf("%s: %d %s", what, code, body)
		}
		if len(c.body) > 40 && strings.Contains(body, good) {
			t.Errorf("%s: the token is in the answer", what)
		}
	}
	if s.active(s.acme.token(map[string]any{"jti": "hinted"})) {
		t.Error("a hint kept a token from being revoked")
	}
	// A secret that is another's, or said twice, is none.
	for _, header := range [][]string{{"Basic aWRwOng="}, {"Basic !"}, {"Basic", "Basic"}} {
		req, err := http.NewRequestWithContext(s.ctx, http.MethodGet, s.url+"/v1/status", nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header["Authorization"] = header
		resp, err := s.http.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != 401 || !strings.HasPrefix(resp.Header.Get("WWW-Authenticate"), "Basic ") {
			t.Errorf("%q: %s %q", header, resp.Status, resp.Header.Get("WWW-Authenticate"))
		}
	}
	if err := s.a.tokens.set(nil); err != nil {
		t.Fatal(err)
	}
	for _, endpoint := range []string{"revoke", "introspect"} {
		if code, _, body := s.post("idp", endpoint, "token="+good); code != 404 || !strings.Contains(body, "--tokens") {
			t.Errorf("without issuers: %d %s", code, body)
		}
	}
}
