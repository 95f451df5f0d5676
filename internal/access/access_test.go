package access

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"math/big"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/interlock-fabric/interlock/pkg/authority"
	"github.com/interlock-fabric/interlock/pkg/session"
)

func problem(t *testing.T, err error) *authority.Problem {
	t.Helper()
	var p *authority.Problem
	if !errors.As(err, &p) {
		t.Fatalf("not a problem: %v", err)
	}
	return p
}

// Whoever was not looked at may do nothing, and sees nothing.
func TestNobodyMayNothing(t *testing.T) {
	agent := NewPrincipal("a", MeansToken, Grant{Commander, []string{Everywhere}})
	agent.Agent = true
	for name, p := range map[string]*Principal{
		"nil": From(t.Context()), "zero": {}, "an agent with a role": agent,
		"a role in no tenant": NewPrincipal("x", MeansToken, Grant{Role: Commander}),
		"an unknown role":     NewPrincipal("x", MeansToken, Grant{"root", []string{Everywhere}}),
	} {
		for op := range table {
			if p.Check(op) == nil || p.CheckIn(op, "acme") == nil || p.CheckIn(op, "") == nil || p.Scope(op).Has("") || p.Scope(op).HasEach(nil) {
				t.Errorf("%s may %s", name, op)
			}
		}
	}
	if p := problem(t, agent.Check(ReadStatus)); p.Status != 403 || !strings.Contains(p.Mend, "agent") {
		t.Errorf("%+v", p)
	}
	p := NewPrincipal("x", MeansToken, Grant{Auditor, []string{"acme"}})
	if p.Check("something new") == nil || operator("o", MeansSocket).Check("something new") == nil {
		t.Error("an operation that is not in the table is permitted")
	}
}

func TestScopes(t *testing.T) {
	p := NewPrincipal("x", MeansToken, Grant{Responder, []string{"acme", "beta"}}, Grant{Commander, []string{"beta"}}, Grant{Viewer, []string{"gamma"}})
	for _, c := range []struct {
		op     Operation
		tenant string
		may    bool
	}{
		{DecideWide, "acme", true}, {DecideWide, "beta", true}, {DecideWide, "gamma", false}, {DecideWide, "delta", false}, {DecideWide, "", false},
		{DecideAll, "acme", false}, {DecideAll, "beta", true}, {DecideAll, "", false}, {ReadStatus, "gamma", true}, {ReadStatus, "delta", false},
	} {
		if err := p.CheckIn(c.op, c.tenant); (err == nil) != c.may {
			t.Errorf("%s in %q: %v", c.op, c.tenant, err)
		}
	}
	for _, op := range []Operation{ReadBus, PublishKeySet} {
		if err := problem(t, p.Check(op)); !strings.Contains(err.Mend, "commander in all tenants") {
			t.Errorf("%s: %v", op, err)
		}
	}
	if err := problem(t, p.CheckIn(DecideAll, "acme")); err.Status != 403 || err.Mend != "it takes the role commander in tenant acme" {
		t.Errorf("%+v", err)
	}
	s := p.Visible()
	if s.All() || !s.HasAny([]string{"delta", "gamma"}) || s.HasEach([]string{"delta", "gamma"}) || !s.HasEach([]string{"acme", "gamma"}) || s.HasEach(nil) {
		t.Error("what is visible")
	}
	if s := operator("o", MeansSocket).Scope(DecideAll); !s.All() || !s.Has("") || !s.HasEach(nil) {
		t.Error("an operator is limited")
	}
}

func TestConfigurationIsCheckedWhole(t *testing.T) {
	const issuer = "audience: https://a\nissuers:\n- url: https://i\n  discovery: true\n  clients: [c]\n  grants:\n  - {claim: roles, value: r, role: viewer, tenants: ['*']}\n"
	if _, err := Parse([]byte(issuer)); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct{ text, says string }{
		"an unknown key":          {issuer + "audiance: x\n", `unknown key "audiance"`},
		"an unknown key, deeper":  {strings.Replace(issuer, "clients", "client", 1), `unknown key "client"`},
		"nothing":                 {"", "issuers, client_ca and clients"},
		"two documents":           {issuer + "---\n" + issuer, "follows the first"},
		"no audience":             {strings.Replace(issuer, "audience: https://a\n", "", 1), "audience: required"},
		"no clients":              {strings.Replace(issuer, "clients: [c]", "clients: []", 1), "issuers[0]: clients"},
		"no keys":                 {strings.Replace(issuer, "discovery: true", "discovery: false", 1), "want one of them"},
		"two ways to the keys":    {strings.Replace(issuer, "discovery: true", "discovery: true\n  jwks: https://i/k", 1), "want one of them"},
		"an unknown role":         {strings.Replace(issuer, "viewer", "root", 1), "issuers[0]: grants[0].role"},
		"no tenants":              {strings.Replace(issuer, "['*']", "[]", 1), "grants[0].tenants"},
		"everywhere and more":     {strings.Replace(issuer, "['*']", "['*', a]", 1), "grants[0].tenants"},
		"no value":                {strings.Replace(issuer, "value: r", "value: ''", 1), "grants[0]: want a claim"},
		"certificates without CA": {issuer + "certificates:\n- {name: 'dns:a', role: viewer, tenants: [a]}\n", "go together"},
		"a nameless certificate":  {"client_ca: f\ncertificates:\n- {name: 'a', role: viewer, tenants: [a]}\n", "certificates[0].name"},
		"a client's role":         {issuer + "clients: [{id: x, secret_file: f, role: responder, tenants: [a]}]\n", "clients[0].role"},
		"a client twice":          {issuer + "clients: [{id: x, secret_file: f, role: viewer, tenants: [a]}, {id: x, secret_file: g, role: issuer, tenants: [a]}]\n", "clients[1].id"},
		"a client with no secret": {issuer + "clients: [{id: x, role: viewer, tenants: [a]}]\n", "clients[0].secret_file"},
		"a client in no tenant":   {issuer + "clients: [{id: x, secret_file: f, role: viewer}]\n", "clients[0].tenants"},
		"a switch in between":     {issuer + "two_person: sometimes\n", "two_person"},
		"an endless proposal":     {issuer + "proposal_for: 1000h\n", "proposal_for"},
		"no wide decisions":       {issuer + "wide_per_minute: 0\n", "wide_per_minute"},
		"a bad switch":            {issuer + "local_operator: maybe\n", "local_operator"},
		"too long":                {issuer + "# " + strings.Repeat("x", 1<<20), "longer than"},
	} {
		if _, err := Parse([]byte(c.text)); !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// The document has a configuration that is one, and the table as it is.
func TestTheDocumentIsTrue(t *testing.T) {
	b, err := os.ReadFile("../../docs/access.md")
	if err != nil {
		t.Fatal(err)
	}
	doc := string(b)
	_, rest, _ := strings.Cut(doc, "```yaml\n")
	example, _, ok := strings.Cut(rest, "```")
	c, err := Parse([]byte(example))
	if !ok || err != nil || len(c.Issuers) != 1 || c.Local != On || c.TwoPerson != On || c.origin() != "https://authority.example" {
		t.Errorf("the example: %+v, %v", c, err)
	}
	for op, r := range table {
		line := "| " + string(op) + " |"
		for _, role := range Roles() {
			switch {
			case !slices.Contains(r.roles, role):
				line += " |"
			case r.everywhere:
				line += " yes* |"
			default:
				line += " yes |"
			}
		}
		if !strings.Contains(doc, line+"\n") {
			t.Errorf("docs/access.md does not have\n%s", line)
		}
	}
}

// signer mints the tokens of an issuer whose keys are in a file.
type signer struct {
	*testing.T
	key  ed25519.PrivateKey
	file string
}

func newSigner(t *testing.T) *signer {
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	set := jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: key.Public(), KeyID: "k", Algorithm: "EdDSA", Use: "sig"}}}
	b, err := json.Marshal(set)
	if err != nil {
		t.Fatal(err)
	}
	s := &signer{t, key, filepath.Join(t.TempDir(), "jwks.json")}
	if err := os.WriteFile(s.file, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return s
}

func (s *signer) mint(change map[string]any) string {
	s.Helper()
	claims := map[string]any{
		"iss": "https://i", "aud": "https://a", "sub": "alice", "client_id": "console", "jti": "1",
		"exp": time.Now().Add(time.Hour).Unix(), "iat": time.Now().Unix(), "groups": []string{"on-call"},
	}
	for k, v := range change {
		if v == nil {
			delete(claims, k)
		} else {
			claims[k] = v
		}
	}
	sig, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.EdDSA, Key: jose.JSONWebKey{Key: s.key, KeyID: "k"}}, (&jose.SignerOptions{}).WithType("at+jwt"))
	if err != nil {
		s.Fatal(err)
	}
	b, err := json.Marshal(claims)
	if err != nil {
		s.Fatal(err)
	}
	jws, err := sig.Sign(b)
	if err != nil {
		s.Fatal(err)
	}
	token, err := jws.CompactSerialize()
	if err != nil {
		s.Fatal(err)
	}
	return token
}

func (s *signer) authenticator(edit func(*Config)) *Authenticator {
	s.Helper()
	c := &Config{Local: On, Audience: "https://a", Issuers: []IssuerConfig{{
		URL: "https://i", JWKSFile: s.file, Clients: []string{"console", "ci"},
		Grants: []ClaimsGrant{
			{"groups", "on-call", Responder, []string{"acme"}},
			{"/realm/roles", "chief", Commander, []string{Everywhere}},
			{"scope", "interlock.read", Viewer, []string{"acme"}},
			{"client_id", "ci", Issuer, []string{"acme"}},
		},
	}}}
	if edit != nil {
		edit(c)
	}
	a, err := New(Options{Config: c, Bootstrap: strings.Repeat("b", 40)})
	if err != nil {
		s.Fatal(err)
	}
	s.Cleanup(a.Close)
	return a
}

func bearer(token string) *http.Request {
	r := httptest.NewRequest("GET", "https://a/v1/status", nil)
	if token != "" {
		r.Header.Set("Authorization", "Bearer "+token)
	}
	return r
}

func TestTokens(t *testing.T) {
	s := newSigner(t)
	a := s.authenticator(nil)
	for name, c := range map[string]struct {
		change map[string]any
		status int // 0 is let in
		agent  bool
		may    []Operation
		mayNot []Operation
	}{
		"a group":                      {nil, 0, false, []Operation{DecideWide}, []Operation{DecideAll, Enroll}},
		"a deeper claim":               {map[string]any{"realm": map[string]any{"roles": []string{"x", "chief"}}}, 0, false, []Operation{DecideAll, PublishKeySet}, nil},
		"a word of the scope":          {map[string]any{"groups": nil, "scope": "openid interlock.read"}, 0, false, []Operation{ReadStatus}, []Operation{Decide, ReadTrail}},
		"a word of a group":            {map[string]any{"groups": "not on-call"}, 0, false, nil, []Operation{ReadStatus}},
		"a service":                    {map[string]any{"sub": "ci", "client_id": "ci", "groups": nil}, 0, false, []Operation{DenyOne}, []Operation{LiftOne, DecideWide}},
		"no grant":                     {map[string]any{"groups": nil}, 0, false, nil, []Operation{ReadStatus}},
		"azp":                          {map[string]any{"client_id": nil, "azp": "console"}, 0, false, []Operation{DecideWide}, nil},
		"an agent's client":            {map[string]any{"client_id": "helper"}, 0, true, nil, []Operation{ReadStatus, DecideWide}},
		"no client":                    {map[string]any{"client_id": nil}, 0, true, nil, []Operation{ReadStatus}},
		"an actor":                     {map[string]any{"act": map[string]any{"sub": "bot"}}, 0, true, nil, []Operation{ReadStatus, DecideWide}},
		"a blueprint":                  {map[string]any{"blueprint": "b"}, 0, true, nil, []Operation{ReadStatus}},
		"a child session":              {map[string]any{"session_ancestors": []string{"p"}}, 0, true, nil, []Operation{ReadStatus}},
		"another audience":             {map[string]any{"aud": "https://b"}, 401, false, nil, nil},
		"no audience":                  {map[string]any{"aud": nil}, 401, false, nil, nil},
		"ended":                        {map[string]any{"exp": time.Now().Add(-time.Hour).Unix()}, 401, false, nil, nil},
		"another issuer":               {map[string]any{"iss": "https://j"}, 401, false, nil, nil},
		"nobody":                       {map[string]any{"sub": nil}, 401, false, nil, nil},
		"a name for terminals":         {map[string]any{"sub": "a\x1b[2J"}, 401, false, nil, nil},
		"bound to a key, not shown":    {map[string]any{"cnf": map[string]any{"jkt": strings.Repeat("A", 43)}}, 401, false, nil, nil},
		"a role in the wrong position": {map[string]any{"groups": nil, "realm": map[string]any{"roles": map[string]any{"chief": true}}}, 0, false, nil, []Operation{ReadStatus}},
	} {
		p, err := a.Request(bearer(s.mint(c.change)))
		if c.status != 0 {
			if problem(t, err).Status != c.status {
				t.Errorf("%s: %v", name, err)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if !strings.HasSuffix(p.Name, "@https://i") || p.Agent != c.agent || p.Means != MeansToken || p.Local() || p.Expires.IsZero() {
			t.Errorf("%s: %+v", name, p)
		}
		for _, op := range c.may {
			if err := p.CheckIn(op, "acme"); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
		for _, op := range c.mayNot {
			if p.CheckIn(op, "acme") == nil {
				t.Errorf("%s may %s", name, op)
			}
		}
	}
	forged := strings.Split(s.mint(nil), ".")
	forged[1] = strings.Split(s.mint(map[string]any{"realm": map[string]any{"roles": []string{"chief"}}}), ".")[1]
	if _, err := a.Request(bearer(strings.Join(forged, "."))); problem(t, err).Status != 401 {
		t.Error("altered claims are believed")
	}
	_, err := a.Request(bearer(strings.Repeat("b", 40)))
	if p := problem(t, err); p.Status != 401 || !strings.Contains(p.Detail, "bootstrap token is refused") {
		t.Errorf("the bootstrap token: %v", err)
	}
	_, err = a.Request(bearer(""))
	if p := problem(t, err); p.Status != 401 || a.Challenge(bearer("")) != `Bearer realm="session-authority"` || !strings.Contains(a.Challenge(bearer("x")), "invalid_token") {
		t.Errorf("nothing sent: %v", err)
	}
}

func TestSocket(t *testing.T) {
	s := newSigner(t)
	on, off := s.authenticator(nil), s.authenticator(func(c *Config) { c.Local = Off })
	me := os.Geteuid()
	for _, uid := range []int{0, me} {
		if p, err := on.Socket(bearer(""), uid, true); err != nil || p.CheckIn(DecideAll, "") != nil || !p.Local() {
			t.Errorf("uid %d: %v", uid, err)
		}
		if _, err := off.Socket(bearer(""), uid, true); problem(t, err).Status != 401 {
			t.Errorf("uid %d, switched off: %v", uid, err)
		}
	}
	if _, err := on.Socket(bearer(""), me+4711, true); problem(t, err).Status != 401 {
		t.Errorf("another user: %v", err)
	}
	for _, a := range []*Authenticator{on, off} {
		p, err := a.Socket(bearer(s.mint(nil)), me, true)
		if err != nil || p.Name != "alice@https://i" || p.CheckIn(DecideAll, "") == nil {
			t.Errorf("with a token: %+v, %v", p, err)
		}
	}
}

func TestCertificates(t *testing.T) {
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ca := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "ca"}, NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, ca, ca, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	if ca, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	_, another, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
	a, err := New(Options{Config: &Config{Local: Off, ClientCA: file, Certificates: []CertConfig{
		{"uri:spiffe://corp/ops/alice", Commander, []string{Everywhere}},
		{"email:bob@corp", Viewer, []string{"acme"}},
	}}})
	if err != nil {
		t.Fatal(err)
	}
	alice, agent := &url.URL{Scheme: "spiffe", Host: "corp", Path: "/ops/alice"}, &url.URL{Scheme: "spiffe", Host: "corp", Path: "/agent/bot"}
	with := func(c x509.Certificate, verified bool, by ed25519.PrivateKey) *http.Request {
		if c.NotAfter.IsZero() {
			c.NotAfter = time.Now().Add(time.Hour)
		}
		c.SerialNumber, c.ExtKeyUsage = big.NewInt(2), []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
		parent := *ca
		parent.PublicKey = by.Public()
		der, err := x509.CreateCertificate(rand.Reader, &c, &parent, key.Public(), by)
		if err != nil {
			t.Fatal(err)
		}
		leaf, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		r := bearer("")
		r.TLS = &tls.ConnectionState{PeerCertificates: []*x509.Certificate{leaf}}
		if verified {
			r.TLS.VerifiedChains = [][]*x509.Certificate{{leaf}}
		}
		return r
	}
	for name, c := range map[string]struct {
		cert      x509.Certificate
		status    int
		principal string
		commands  bool
	}{
		"a commander": {x509.Certificate{URIs: []*url.URL{alice}}, 0, "uri:spiffe://corp/ops/alice", true},
		"by email":    {x509.Certificate{EmailAddresses: []string{"bob@corp"}}, 0, "email:bob@corp", false},
		"an agent":    {x509.Certificate{URIs: []*url.URL{agent}}, 0, "uri:spiffe://corp/agent/bot", false},
		"a subject":   {x509.Certificate{Subject: pkix.Name{CommonName: "spiffe://corp/ops/alice"}}, 401, "", false},
		"ended":       {x509.Certificate{URIs: []*url.URL{alice}, NotAfter: time.Now().Add(-time.Minute)}, 401, "", false},
	} {
		p, err := a.Request(with(c.cert, true, key))
		if c.status != 0 {
			if problem(t, err).Status != c.status {
				t.Errorf("%s: %v", name, err)
			}
			continue
		}
		if err != nil || p.Name != c.principal || (p.CheckIn(DecideAll, "") == nil) != c.commands {
			t.Errorf("%s: %+v, %v", name, p, err)
		}
	}
	if _, err := a.Request(with(x509.Certificate{URIs: []*url.URL{alice}}, false, key)); problem(t, err).Status != 401 {
		t.Error("a certificate that nobody verified is believed")
	}
	// The connection may be from before the CA was taken out.
	if _, err := a.Request(with(x509.Certificate{URIs: []*url.URL{alice}}, true, another)); problem(t, err).Status != 401 {
		t.Error("a certificate of a CA that is not configured any more is believed")
	}
	if _, err := a.Socket(bearer(""), os.Geteuid(), true); problem(t, err).Status != 401 {
		t.Error("the socket is not switched off")
	}
}

// A client is who has its secret, form-encoded or not needing to be, and who else
// speaks of it is told nothing of it.
func TestClientsHaveSecrets(t *testing.T) {
	dir := t.TempDir()
	secret := strings.Repeat("s3cr%+ t", 5)
	write := func(mode os.FileMode, name, text string) {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), mode); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(filepath.Join(dir, name), mode); err != nil {
			t.Fatal(err)
		}
	}
	write(0o600, "secret", secret+"\n")
	write(0o600, "short", "0123456789")
	write(0o644, "open", secret)
	config := func(file string) *Config {
		write(0o600, "access.yaml", "clients: [{id: 'a:b c', secret_file: "+file+", role: issuer, tenants: [acme]}]")
		c, err := Load(filepath.Join(dir, "access.yaml"))
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	for _, file := range []string{"short", "open", "absent"} {
		if _, err := New(Options{Config: config(file)}); !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), "clients[0].secret_file") {
			t.Errorf("%s: %v", file, err)
		}
	}
	a, err := New(Options{Config: config("secret")})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(a.Close)
	try := func(change func(*http.Request)) (*Principal, *http.Request, error) {
		r := httptest.NewRequest(http.MethodPost, "/v1/oauth/revoke", nil)
		change(r)
		p, err := a.Request(r)
		return p, r, err
	}
	p, _, err := try(func(r *http.Request) { r.SetBasicAuth(url.QueryEscape("a:b c"), url.QueryEscape(secret)) })
	if err != nil || p.Name != "client:a:b c" || p.Means != MeansClient || !p.Scope(DenyOne).Has("acme") || p.Scope(DenyOne).Has("beta") || !p.Scope(DecideWide).Empty() {
		t.Errorf("%+v, %v", p, err)
	}
	for what, change := range map[string]func(*http.Request){
		"another secret": func(r *http.Request) { r.SetBasicAuth(url.QueryEscape("a:b c"), "x") },
		"none":           func(r *http.Request) { r.SetBasicAuth(url.QueryEscape("a:b c"), "") },
		"another client": func(r *http.Request) { r.SetBasicAuth("nobody", url.QueryEscape(secret)) },
		"not encoded":    func(r *http.Request) { r.SetBasicAuth("a%zz", "%zz") },
		"not base64":     func(r *http.Request) { r.Header.Set("Authorization", "Basic !") },
		"said twice": func(r *http.Request) {
			r.SetBasicAuth(url.QueryEscape("a:b c"), url.QueryEscape(secret))
			r.Header.Add("Authorization", "Bearer x")
		},
		"as a token": func(r *http.Request) { r.Header.Set("Authorization", "Bearer "+secret) },
		"nobody":     func(*http.Request) {},
	} {
		p, r, err := try(change)
		basic := strings.HasPrefix(r.Header.Get("Authorization"), "Basic")
		if x := problem(t, err); p != nil || x.Status != 401 || strings.Contains(x.Error(), secret) || strings.HasPrefix(a.Challenge(r), "Basic ") != basic {
			t.Errorf("%s: %+v, %v, %s", what, p, err, a.Challenge(r))
		}
	}
}

// What the verifier knows of an issuer's keys is kept where the issuer is the same,
// and nowhere else; it lasts until the last that has it is closed.
func TestKeysAreKeptOverAChange(t *testing.T) {
	srv := httptest.NewServer(http.NotFoundHandler())
	t.Cleanup(srv.Close)
	config := func(change string) *Config {
		text := "audience: https://a\nissuers:\n- url: https://i\n  jwks: " + srv.URL + "/k\n  clients: [c]\n  grants:\n  - {claim: roles, value: r, role: viewer, tenants: ['*']}\n"
		old, with, _ := strings.Cut(change, ">")
		c, err := Parse([]byte(strings.Replace(text, old, with, 1)))
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	first, err := New(Options{Config: config("")})
	if err != nil {
		t.Fatal(err)
	}
	for change, kept := range map[string]bool{"viewer>auditor": true, "[c]>[c, d]": true, "https://a>https://b": false, "https://i>https://j": false, "/k>/l": false} {
		next, err := New(Options{Config: config(change), Before: first})
		if err != nil {
			t.Fatal(err)
		}
		if (next.verifier == first.verifier) != kept || next.issuers[next.config.Issuers[0].URL] != &next.config.Issuers[0] {
			t.Errorf("%s: kept %v", change, next.verifier == first.verifier)
		}
		next.Close()
		next.Close()
	}
	if n := first.verifier.users.Load(); n != 1 {
		t.Errorf("%d users", n)
	}
	if _, err := first.verifier.Verify(t.Context(), "a.b.c"); errors.Is(err, session.ErrStale) {
		t.Error("it was closed while it was used")
	}
	first.Close()
	if _, err := first.verifier.Verify(t.Context(), "a.b.c"); !errors.Is(err, session.ErrStale) {
		t.Errorf("it was not closed: %v", err)
	}
}

func TestChangesAreNamed(t *testing.T) {
	parse := func(text string) *Config {
		c, err := Parse([]byte(text))
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	before := parse("audience: https://a\nissuers:\n- url: https://i\n  discovery: true\n  clients: [c, d]\n  grants:\n  - {claim: roles, value: r, role: viewer, tenants: ['*']}\nclient_ca: f\ncertificates:\n- {name: 'dns:a', role: issuer, tenants: [a]}\n")
	after := parse("audience: https://a\nissuers:\n- url: https://i\n  jwks: https://i/k\n  clients: [c]\n  grants:\n  - {claim: roles, value: r, role: commander, tenants: ['*']}\nclients: [{id: x, secret_file: f, role: viewer, tenants: [a, b]}]\ntwo_person: off\n")
	want := []string{"granted: commander in * to roles r at https://i", "granted: viewer in a, b to client x",
		"withdrawn: issuer in a to certificate dns:a", "withdrawn: people of https://i who sign in by d", "withdrawn: viewer in * to roles r at https://i",
		"changed: issuers", "changed: client_ca", "changed: two_person"}
	if got := before.Changes(after); !slices.Equal(got, want) {
		t.Errorf("%q", got)
	}
	if got := before.Changes(before); got != nil {
		t.Errorf("nothing changed: %q", got)
	}
}
