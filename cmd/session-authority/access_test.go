package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"maps"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/interlock-fabric/interlock/internal/access"
	"github.com/interlock-fabric/interlock/internal/api/apitest"
	"github.com/interlock-fabric/interlock/pkg/authority"
)

const (
	audience = "https://authority.example"
	idp      = "https://login.example" // of the callers that are decided on
)

// signIn is an OpenID provider at which people sign in. Its keys can rotate.
type signIn struct {
	t   *testing.T
	srv *httptest.Server

	mu  sync.Mutex
	key *ecdsa.PrivateKey
	kid string
}

func newSignIn(t *testing.T) *signIn {
	s := &signIn{t: t}
	s.rotate("k1")
	s.srv = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/.well-known/openid-configuration":
			_ = json.NewEncoder(w).Encode(map[string]any{"issuer": s.srv.URL, "jwks_uri": s.srv.URL + "/keys"})
		case "/keys":
			s.mu.Lock()
			defer s.mu.Unlock()
			_ = json.NewEncoder(w).Encode(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: s.key.Public(), KeyID: s.kid, Algorithm: "ES256", Use: "sig"}}})
		default:
			http.NotFound(w, r)
		}
	}))
	t.Cleanup(s.srv.Close)
	return s
}

func (s *signIn) rotate(kid string) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		s.t.Fatal(err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.key, s.kid = key, kid
}

// token is one for sub, who is in the groups. change alters claims.
func (s *signIn) token(sub string, groups []string, change map[string]any) string {
	s.t.Helper()
	claims := map[string]any{
		"iss": s.srv.URL, "aud": audience, "sub": sub, "client_id": "console", "groups": groups,
		"iat": time.Now().Unix(), "exp": time.Now().Add(time.Hour).Unix(),
	}
	maps.Copy(claims, change)
	b, err := json.Marshal(claims)
	if err != nil {
		s.t.Fatal(err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	sig, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: s.key, KeyID: s.kid}}, (&jose.SignerOptions{}).WithType("at+jwt"))
	if err != nil {
		s.t.Fatal(err)
	}
	jws, err := sig.Sign(b)
	if err != nil {
		s.t.Fatal(err)
	}
	out, err := jws.CompactSerialize()
	if err != nil {
		s.t.Fatal(err)
	}
	return out
}

// pki issues certificates, into files.
type pki struct {
	t   *testing.T
	dir string
	ca  *x509.Certificate
	key *ecdsa.PrivateKey
}

func newPKI(t *testing.T) *pki {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ca := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "ca"}, NotBefore: time.Now().Add(-time.Minute),
		NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, ca, ca, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	p := &pki{t, t.TempDir(), ca, key}
	p.write("ca.pem", "CERTIFICATE", der)
	return p
}

func (p *pki) path(name string) string { return filepath.Join(p.dir, name) }

func (p *pki) write(name, kind string, der []byte) {
	if err := os.WriteFile(p.path(name), pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		p.t.Fatal(err)
	}
}

// issue makes NAME.pem and NAME.key, for a server on loopback or for a client with
// a URI.
func (p *pki) issue(name, uri string) {
	p.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		p.t.Fatal(err)
	}
	c := &x509.Certificate{SerialNumber: big.NewInt(time.Now().UnixNano()), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour)}
	if uri == "" {
		c.IPAddresses, c.ExtKeyUsage = []net.IP{net.IPv4(127, 0, 0, 1)}, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	} else {
		u, err := url.Parse(uri)
		if err != nil {
			p.t.Fatal(err)
		}
		c.URIs, c.ExtKeyUsage = []*url.URL{u}, []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	}
	der, err := x509.CreateCertificate(rand.Reader, c, p.ca, key.Public(), p.key)
	if err != nil {
		p.t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		p.t.Fatal(err)
	}
	p.write(name+".pem", "CERTIFICATE", der)
	p.write(name+".key", "PRIVATE KEY", private)
}

// client trusts the CA, and shows the certificate of that name, if any.
func (p *pki) client(name string) *http.Client {
	p.t.Helper()
	pool := x509.NewCertPool()
	b, err := os.ReadFile(p.path("ca.pem"))
	if err != nil || !pool.AppendCertsFromPEM(b) {
		p.t.Fatal("no CA")
	}
	c := &tls.Config{RootCAs: pool}
	if name != "" {
		pair, err := tls.LoadX509KeyPair(p.path(name+".pem"), p.path(name+".key"))
		if err != nil {
			p.t.Fatal(err)
		}
		c.Certificates = []tls.Certificate{pair}
	}
	tr := &http.Transport{TLSClientConfig: c}
	p.t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr}
}

// served is the real program, serving two tenants to whom its access file names.
type served struct {
	*testing.T
	dir, url string
	login    *signIn
	pki      *pki
	plain    *http.Client
	op       *authority.Client // the operator's, on the socket
	log      *syncBuffer
	stop     func()
	hup      func() // has it read its files again
}

// syncBuffer is a buffer that a process writes and a test reads.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// grants is the part of the access file that gives group ROLE-TENANT that role.
func grants() string {
	var b strings.Builder
	for _, r := range access.Roles() {
		for name, tenant := range map[string]string{"acme": "acme", "beta": "beta", "all": "*"} {
			fmt.Fprintf(&b, "  - {claim: groups, value: %s-%s, role: %s, tenants: ['%s']}\n", r, name, r, tenant)
		}
	}
	return b.String()
}

func startServed(t *testing.T, more string) *served {
	t.Helper()
	s := &served{T: t, dir: t.TempDir(), login: newSignIn(t), pki: newPKI(t)}
	s.pki.issue("server", "")
	s.plain = s.pki.client("")
	config := fmt.Sprintf(`audience: %s
issuers:
- url: %s
  discovery: true
  clients: [console, ci]
  refresh_interval: 10ms
  grants:
%sclient_ca: %s
certificates:
- {name: "uri:spiffe://corp/ops/alice", role: commander, tenants: ["*"]}
- {name: "uri:spiffe://corp/ci", role: issuer, tenants: [acme]}
`, audience, s.login.srv.URL, grants(), s.pki.path("ca.pem")) + more
	file := filepath.Join(s.dir, "access.yaml")
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	s.start(file)
	return s
}

// tokens is the file by which callers' tokens are verified: acme's issuer signs them
// with the key that people's tokens are signed with.
func (s *served) tokens() string {
	s.Helper()
	s.login.mu.Lock()
	keys, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: s.login.key.Public(), KeyID: s.login.kid}}})
	s.login.mu.Unlock()
	if err != nil {
		s.Fatal(err)
	}
	file := filepath.Join(s.dir, "tokens.yaml")
	for name, b := range map[string][]byte{filepath.Join(s.dir, "keys.json"): keys,
		file: []byte("audiences: [https://tools.example/mcp]\nissuers:\n- {url: " + idp + ", tenant: acme, jwks_file: keys.json}\n")} {
		if err := os.WriteFile(name, b, 0o600); err != nil {
			s.Fatal(err)
		}
	}
	return file
}

func (s *served) start(accessFile string) {
	s.Helper()
	data := filepath.Join(s.dir, "d")
	cmd := exec.Command("session-authority", "serve", "--data-dir", data, "--tenant", "acme", "--tenant", "beta", "--issuer", idp,
		"--nats-listen", "127.0.0.1:0", "--api-listen", "127.0.0.1:0", "--api-tls-cert", s.pki.path("server.pem"), "--api-tls-key", s.pki.path("server.key"),
		"--access", accessFile, "--tokens", s.tokens(), "--log-format", "json")
	cmd.Env = append(os.Environ(), "GORACE=atexit_sleep_ms=50")
	r, w, err := os.Pipe()
	if err != nil {
		s.Fatal(err)
	}
	s.log = &syncBuffer{}
	cmd.Stderr = w
	if err := cmd.Start(); err != nil {
		s.Fatal(err)
	}
	w.Close()
	up, read := make(chan string, 1), make(chan struct{})
	go func() {
		defer close(read)
		lines := bufio.NewScanner(io.TeeReader(r, s.log))
		for lines.Scan() {
			var l struct{ Message, API string }
			if json.Unmarshal(lines.Bytes(), &l) == nil && l.Message == "the authority is up" {
				up <- l.API
			}
		}
		close(up)
	}()
	s.hup = func() {
		if err := cmd.Process.Signal(syscall.SIGHUP); err != nil {
			s.Fatal(err)
		}
	}
	s.stop = sync.OnceFunc(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM) // it may have ended
		<-read
		_ = cmd.Wait() // how it ended is in the log
		r.Close()
	})
	s.Cleanup(s.stop)
	addr, ok := <-up
	if !ok {
		s.Fatalf("it did not come up:\n%s", s.log)
	}
	s.url = "https://" + addr
	if s.op, err = authority.New(authority.Options{Socket: filepath.Join(data, "api.sock")}); err != nil {
		s.Fatal(err)
	}
	s.Cleanup(s.op.Close)
}

// caller is who sends a request: with a token, a certificate, or both, or nothing.
type caller struct {
	token string
	http  *http.Client
}

func (s *served) as(sub string, groups ...string) caller {
	return caller{s.login.token(sub, groups, nil), s.plain}
}

// described is the API's description, against which each answer is held.
var described = sync.OnceValues(apitest.Load)

func (s *served) do(c caller, method, path, body string) (int, http.Header, string) {
	s.Helper()
	ctx, cancel := context.WithTimeout(s.Context(), 20*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, s.url+path, strings.NewReader(body))
	if err != nil {
		s.Fatal(err)
	}
	if body != "" {
		req.Header.Set("Content-Type", "application/json")
	}
	if isOAuth(path) {
		req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	}
	if c.token != "" {
		req.Header.Set("Authorization", "Bearer "+c.token)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		s.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.Header.Get("Content-Type") == "text/event-stream" {
		return resp.StatusCode, resp.Header, "" // it does not end
	}
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		s.Fatal(err)
	}
	d, err := described()
	if err == nil {
		err = d.Check(method, path, resp.StatusCode, resp.Header, b)
	}
	if err != nil {
		s.Error(err)
	}
	return resp.StatusCode, resp.Header, string(b)
}

// isOAuth reports whether an endpoint takes forms, and fails, as OAuth says.
func isOAuth(path string) bool {
	return strings.HasPrefix(path, "/v1/oauth/") && !strings.HasSuffix(path, "/global-token-revocation")
}

func (s *served) decide(tenant, kind, value, incident string) *authority.Decision {
	s.Helper()
	r := authority.Request{Operation: authority.Suspend, Reason: "anomaly", Targets: []authority.Target{authority.One(tenant, kind, idp, value)}, Incident: incident, Commit: true}
	d, err := s.op.Decide(s.Context(), r)
	if err != nil {
		s.Fatal(err)
	}
	return d
}

func decision(op, tenant, terms string) string {
	if tenant != "" {
		tenant = `"tenant":"` + tenant + `",`
	}
	reason := `"reason":"anomaly",`
	if op == "resume" || op == "restore" {
		reason = ""
	}
	return `{"operation":"` + op + `",` + reason + `"incident":"INC-0","targets":[{` + tenant + `"terms":[` + terms + `]}]}`
}

const (
	sessionTerm = `{"kind":"session","issuer":"` + idp + `","value":"s1"}`
	userTerm    = `{"kind":"user","issuer":"` + idp + `","value":"alice"}`
)

// The table: each endpoint, and each kind of decision, and who may.
func TestWhoMayDoWhat(t *testing.T) {
	s := startServed(t, "")
	d := s.decide("acme", "session", "s0", "INC-1")
	keySet, err := s.op.KeySet(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.op.RegisterAgent(t.Context(), authority.AgentRequest{Agent: authority.Agent{Tenant: "acme", ID: "spiffe://corp/bot"}}); err != nil {
		t.Fatal(err)
	}
	frame, err := json.Marshal(map[string][]byte{"frame": keySet})
	if err != nil {
		t.Fatal(err)
	}
	const (
		v, i, r, c, a = access.Viewer, access.Issuer, access.Responder, access.Commander, access.Auditor
	)
	type roles = []access.Role
	n := 0
	for _, e := range []struct {
		pattern, path, body string
		want                int // of who may
		may                 roles
		everywhere          bool // only who has the role in all tenants
	}{
		{"POST /v1/decisions", "", decision("revoke", "acme", sessionTerm), 200, roles{i, r, c}, false},
		{"POST /v1/decisions", "", decision("suspend", "acme", sessionTerm), 200, roles{i, r, c}, false},
		{"POST /v1/decisions", "", decision("resume", "acme", sessionTerm), 200, roles{r, c}, false},
		{"POST /v1/decisions", "", decision("revoke", "acme", userTerm), 200, roles{r, c}, false},
		{"POST /v1/decisions", "", decision("restore", "acme", userTerm), 200, roles{r, c}, false},
		{"POST /v1/decisions", "", decision("kill", "", `{"kind":"tenant","value":"acme"}`), 200, roles{c}, false},
		{"POST /v1/decisions", "", decision("suspend", "", `{"kind":"tenant","value":"acme"}`), 200, roles{c}, false},
		{"POST /v1/decisions", "", decision("restore", "", `{"kind":"tenant","value":"acme"}`), 200, roles{c}, false},
		{"POST /v1/decisions", "", decision("kill", "", `{"kind":"global"}`), 200, roles{c}, true},
		{"POST /v1/decisions", "", decision("revoke", "", `{"kind":"global"}`), 200, roles{c}, true},
		{"POST /v1/decisions", "", decision("restore", "", `{"kind":"global"}`), 200, roles{c}, true},
		{"GET /v1/decisions", "/v1/decisions?tenant=acme", "", 200, roles{v, r, c, a}, false},
		{"GET /v1/decisions/{epoch}/{number}/coverage", fmt.Sprintf("/v1/decisions/%d/%d/coverage", d.Epoch, d.Number), "", 200, roles{v, i, r, c, a}, false},
		{"GET /v1/status", "", "", 200, roles{v, i, r, c, a}, false},
		{"GET /v1/openapi.yaml", "", "", 200, roles{v, i, r, c, a}, false},
		{"GET /v1/watch", "", "", 200, roles{v, r, c, a}, false},
		{"POST /v1/explain", "", `{"identity":{"tenant":"acme","issuer":"` + idp + `","user":"u"}}`, 200, roles{v, r, c, a}, false},
		{"GET /v1/enforcers", "", "", 200, roles{v, r, c, a}, false},
		{"POST /v1/enforcers", "", `{"name":"NEW","tenants":["acme"]}`, 201, roles{c}, false},
		{"POST /v1/enforcers", "", `{"name":"NEW"}`, 201, roles{c}, true},
		{"DELETE /v1/enforcers/{name}", "/v1/enforcers/NEW", "", 204, roles{c}, false},
		{"GET /v1/trail", "", "", 200, roles{r, c, a}, false},
		{"GET /v1/seen", "", "", 200, roles{r, c, a}, false},
		{"GET /v1/audit", "", "", 200, roles{r, c, a}, false},
		{"GET /v1/audit/export", "", "", 200, roles{r, c, a}, false},
		{"GET /v1/receipts/export", fmt.Sprintf("/v1/receipts/export?epoch=%d&number=%d", d.Epoch, d.Number), "", 200, roles{r, c, a}, true},
		{"GET /v1/agents", "/v1/agents?tenant=acme", "", 200, roles{i, r, c, a}, false},
		{"POST /v1/agents", "", `{"tenant":"acme","id":"spiffe://corp/NEW"}`, 201, roles{i, c}, false},
		{"POST /v1/agents/lifecycle", "", `{"tenant":"acme","id":"spiffe://corp/bot","operation":"suspend"}`, 200, roles{r, c}, false},
		{"GET /v1/sessions", "/v1/sessions?tenant=acme", "", 200, roles{i, r, c, a}, false},
		{"POST /v1/sessions", "", `{"sessions":[{"tenant":"acme","issuer":"` + idp + `","id":"NEW","expires":"` + time.Now().Add(time.Hour).UTC().Format(time.RFC3339) + `"}]}`, 201, roles{i, c}, false},
		{"GET /v1/bus-config", "", "", 200, roles{c}, true},
		{"GET /v1/keyset", "", "", 200, roles{c, a}, true},
		{"POST /v1/keyset", "", string(frame), 204, roles{c}, true},
		{"POST /v1/oauth/revoke", "", "token=a.b.c", 200, roles{i, r, c}, false},
		{"POST /v1/oauth/introspect", "", "token=a.b.c", 200, roles{v, i, r, c, a}, false},
		{"POST /v1/oauth/global-token-revocation", "", `{"sub_id":{"format":"iss_sub","iss":"` + idp + `","sub":"NEW"}}`, 204, roles{i, r, c}, false},
		{"GET /v1/proposals", "", "", 200, roles{r, c, a}, false},
		{"POST /v1/proposals", "", decision("suspend", "", `{"kind":"tenant","value":"acme"}`), 201, roles{c}, false},
		{"POST /v1/proposals", "", decision("kill", "", `{"kind":"global"}`), 201, roles{c}, true},
		{"GET /v1/restores", "", "", 200, roles{r, c, a}, false},
		{"POST /v1/restores/{id}/abort", "/v1/restores/STAGED/abort", "", 200, roles{c}, false},
		{"GET /v1/exemptions", "", "", 200, roles{r, c, a}, false},
		{"POST /v1/exemptions", "", `{"target":{"tenant":"acme","terms":[{"kind":"role","value":"NEW"}]},"owner":"o","reason":"r"}`, 201, roles{c}, false},
		{"POST /v1/exemptions", "", `{"target":{"tenant":"acme","terms":[{"kind":"role","value":"NEW"}]},"global":true,"owner":"o","reason":"r"}`, 201, roles{c}, true},
		{"POST /v1/exemptions/{id}/approve", "/v1/exemptions/EXEMPT/approve", "", 200, roles{c}, false},
		{"DELETE /v1/exemptions/{id}", "/v1/exemptions/EXEMPT", "", 204, roles{c}, false},
		{"POST /v1/proposals/{id}/withdraw", "/v1/proposals/ID/withdraw", "", 200, roles{c}, false},
		{"POST /v1/proposals/{id}/approve", "/v1/proposals/ID/approve", "", 200, roles{c}, false},
	} {
		method, path, _ := strings.Cut(e.pattern, " ")
		if e.path != "" {
			path = e.path
		}
		for _, role := range access.Roles() {
			for _, where := range []string{"all", "acme"} {
				n++
				name := fmt.Sprintf("e%d", n)
				path, body := strings.ReplaceAll(path, "NEW", name), strings.ReplaceAll(e.body, "NEW", name)
				if method == "DELETE" {
					if _, err := s.op.Enroll(t.Context(), authority.EnrollRequest{Name: name, Tenants: []string{"acme"}}); err != nil {
						t.Fatal(err)
					}
				}
				if strings.Contains(path, "/ID/") {
					path = strings.Replace(path, "ID", s.propose(s.as(name, "commander-all"), "suspend", "acme").ID, 1)
				}
				path = strings.Replace(path, "EXEMPT", s.exemption(path, name), 1)
				path = strings.Replace(path, "STAGED", s.staged(path), 1)
				code, _, got := s.do(s.as("p", string(role)+"-"+where), method, path, body)
				s.noExemptions()
				s.noRestores()
				may := slices.Contains(e.may, role) && (where == "all" || !e.everywhere)
				what := fmt.Sprintf("%s of %s: %s %s %s", role, where, method, path, body)
				switch {
				case may && code != e.want:
					t.Errorf("%s: %d %s", what, code, got)
				case !may && (code != 403 || !strings.Contains(got, forbidden(path)) || !strings.Contains(got, string(e.may[0]))):
					t.Errorf("%s: %d %s", what, code, got)
				}
			}
		}
		for what, c := range map[string]struct {
			caller
			want int
		}{
			"nobody":              {caller{http: s.plain}, 401},
			"no role":             {s.as("p", "on-call"), 403},
			"an agent for a user": {caller{s.login.token("alice", []string{"commander-all"}, map[string]any{"act": map[string]any{"sub": "bot"}}), s.plain}, 403},
			"an agent's client":   {caller{s.login.token("alice", []string{"commander-all"}, map[string]any{"client_id": "bot"}), s.plain}, 403},
			"for another":         {caller{s.login.token("alice", []string{"commander-all"}, map[string]any{"aud": "https://tools.example"}), s.plain}, 401},
			"ended":               {caller{s.login.token("alice", []string{"commander-all"}, map[string]any{"exp": time.Now().Add(-time.Hour).Unix()}), s.plain}, 401},
			"garbage":             {caller{"x.y.z", s.plain}, 401},
		} {
			code, h, got := s.do(c.caller, method, path, e.body)
			if code != c.want || (code == 401) != (h.Get("WWW-Authenticate") != "") || (h.Get("Content-Type") != "application/problem+json") != isOAuth(path) {
				t.Errorf("%s: %s: %d %s", what, e.pattern, code, got)
			}
			if what == "an agent for a user" && !strings.Contains(got, "agent holds no role") {
				t.Errorf("%s is not told why: %s", what, got)
			}
		}
		tested[e.pattern] = true
	}
	for _, p := range access.Endpoints() {
		if !tested[p] {
			t.Errorf("%s is in no test: add it to the table", p)
		}
	}
}

// forbidden is what a refusal for who asks is called.
func forbidden(path string) string {
	if isOAuth(path) {
		return `"insufficient_scope"`
	}
	return authority.ProblemForbidden
}

// tested are the endpoints that a table has.
var tested = map[string]bool{}

// A client certificate is as good as a token; the bootstrap token is none any more.
func TestMeans(t *testing.T) {
	s := startServed(t, "")
	s.pki.issue("alice", "spiffe://corp/ops/alice")
	s.pki.issue("ci", "spiffe://corp/ci")
	s.pki.issue("bot", "spiffe://corp/agent/bot")
	stranger := newPKI(t)
	stranger.issue("alice", "spiffe://corp/ops/alice")
	alice := caller{http: s.pki.client("alice")}
	kill := decision("kill", "", `{"kind":"global"}`)
	for name, c := range map[string]struct {
		caller
		body string
		want int
	}{
		"a commander's":      {alice, kill, 200},
		"a service's":        {caller{http: s.pki.client("ci")}, decision("revoke", "acme", sessionTerm), 200},
		"a service's, wide":  {caller{http: s.pki.client("ci")}, decision("revoke", "acme", userTerm), 403},
		"a service's, other": {caller{http: s.pki.client("ci")}, decision("revoke", "beta", sessionTerm), 400},
		"an agent's":         {caller{http: s.pki.client("bot")}, kill, 403},
		"none":               {caller{http: s.plain}, kill, 401},
		// The token is who speaks, whatever the connection shows.
		"a commander's, with a viewer's token": {caller{s.login.token("v", []string{"viewer-all"}, nil), alice.http}, kill, 403},
	} {
		if code, _, got := s.do(c.caller, "POST", "/v1/decisions", c.body); code != c.want {
			t.Errorf("%s: %d %s", name, code, got)
		}
	}
	// One of another CA does not get as far as a request.
	c := stranger.client("alice")
	c.Transport.(*http.Transport).TLSClientConfig.RootCAs = s.plain.Transport.(*http.Transport).TLSClientConfig.RootCAs
	if resp, err := c.Get(s.url + "/v1/status"); err == nil {
		resp.Body.Close()
		t.Errorf("a certificate of another CA: %s", resp.Status)
	}

	token := strings.Repeat("b", 52)
	if err := os.WriteFile(filepath.Join(s.dir, "d", "api.token"), []byte(token), 0o600); err != nil {
		t.Fatal(err)
	}
	s.stop()
	s.start(filepath.Join(s.dir, "access.yaml"))
	if code, _, got := s.do(caller{token, s.plain}, "GET", "/v1/status", ""); code != 401 || !strings.Contains(got, "bootstrap token is refused") {
		t.Errorf("the bootstrap token: %d %s", code, got)
	}
	if strings.Contains(s.log.String(), token) {
		t.Error("a token is in the log")
	}

	// The issuer's keys rotate: the new ones are good, and the old ones are not.
	old := s.as("p", "viewer-all")
	if code, _, got := s.do(old, "GET", "/v1/status", ""); code != 200 {
		t.Errorf("before: %d %s", code, got)
	}
	s.login.rotate("k2")
	tick := time.NewTicker(20 * time.Millisecond) // keys are fetched once in a while only
	defer tick.Stop()
	for deadline := time.Now().Add(20 * time.Second); ; <-tick.C {
		code, _, got := s.do(s.as("p", "viewer-all"), "GET", "/v1/status", "")
		if code == 200 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("a new key: %d %s", code, got)
		}
	}
	if code, _, got := s.do(old, "GET", "/v1/status", ""); code != 401 {
		t.Errorf("an old key: %d %s", code, got)
	}
}

// What is another tenant's does not exist: the answers are those for what there
// never was, and nothing that is shown has a trace of it.
func TestOneTenantNeverSeesAnother(t *testing.T) {
	s := startServed(t, "")
	ctx := t.Context()
	for name, tenants := range map[string][]string{"eu-acme": {"acme"}, "eu-beta": {"beta"}, "shared": {"acme", "beta"}} {
		if _, err := s.op.Enroll(ctx, authority.EnrollRequest{Name: name, Tenants: tenants}); err != nil {
			t.Fatal(err)
		}
	}
	var everything []string
	for _, r := range access.Roles() {
		everything = append(everything, string(r)+"-beta")
	}
	beta := s.as("b", everything...)

	// A watcher of beta's hears of beta's, though acme's came first.
	watch, err := authority.New(authority.Options{URL: s.url, Token: beta.token, TLS: s.plain.Transport.(*http.Transport).TLSClientConfig.Clone()})
	if err != nil {
		t.Fatal(err)
	}
	defer watch.Close()
	events := make(chan authority.Event, 16)
	watching, stop := context.WithTimeout(ctx, 30*time.Second)
	defer stop()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for e, err := range watch.Watch(watching) {
			if err != nil {
				return
			}
			select {
			case events <- e:
			default:
			}
		}
	}()

	acme := s.decide("acme", "user", "carol", "INC-OURS")
	kill, err := s.op.Decide(ctx, authority.Request{Operation: authority.Kill, Reason: "anomaly", Targets: []authority.Target{authority.One("", "tenant", "", "acme")}, Incident: "INC-OURS", Commit: true})
	if err != nil {
		t.Fatal(err)
	}
	// The watch may begin only now: beta's decisions are made until one is heard.
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	var first *authority.DecisionEvent
	for n := 0; first == nil; n++ {
		s.decide("acme", "user", fmt.Sprint("carol", n), "INC-OURS")
		s.decide("beta", "user", fmt.Sprint("dave", n), "INC-THEIRS")
		select {
		case e := <-events:
			first = e.Decision
		case <-tick.C:
		case <-ended:
			t.Fatal("the watch ended")
		}
	}
	if len(first.Lines) != 1 || first.Lines[0].Tenant != "beta" || first.Lines[0].Incident != "INC-THEIRS" {
		t.Errorf("heard %+v", first)
	}
	stop()
	<-ended

	if _, err := s.op.RegisterAgent(ctx, authority.AgentRequest{Agent: authority.Agent{Tenant: "acme", ID: "spiffe://corp/carol-bot"}}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.op.RegisterSessions(ctx, []authority.Session{{Tenant: "acme", Issuer: idp, ID: "s-carol", User: "carol", Expires: time.Now().Add(time.Hour)}}); err != nil {
		t.Fatal(err)
	}
	// Nothing that beta can read has a word of acme's.
	for _, path := range []string{"/v1/status", "/v1/enforcers", "/v1/trail", "/v1/seen", "/v1/trail?tenant=acme", "/v1/seen?tenant=acme", "/v1/trail?enforcer=eu-acme",
		"/v1/agents", "/v1/sessions", "/v1/agents?id=spiffe://corp/carol-bot", "/v1/sessions?id=s-carol&issuer=" + url.QueryEscape(idp), "/v1/sessions?term=user:carol&issuer=" + url.QueryEscape(idp)} {
		code, _, got := s.do(beta, "GET", path, "")
		if code != 200 {
			t.Errorf("%s: %d %s", path, code, got)
		}
		for _, word := range []string{"acme", "INC-OURS", "carol"} {
			if strings.Contains(got, word) {
				t.Errorf("%s shows %s: %s", path, word, got)
			}
		}
	}
	var st authority.Status
	if _, _, got := s.do(beta, "GET", "/v1/status", ""); json.Unmarshal([]byte(got), &st) != nil || !slices.Equal(st.Tenants, []string{"beta"}) || len(st.Kills) != 0 || st.Enforcers.Enrolled != 2 {
		t.Errorf("status %+v", st)
	}
	if all, err := s.op.Status(ctx); err != nil || all.Entries <= st.Entries || st.Entries == 0 || len(all.Kills) != 1 || all.Enforcers.Enrolled != 3 {
		t.Errorf("the operator's %+v, %v; beta's has %d entries", all, err, st.Entries)
	}

	// What names acme's is answered as what names nothing.
	missing := func(s string) string {
		return strings.NewReplacer("eu-acme", "eu-none", "acme", "none").Replace(s)
	}
	for _, e := range []struct{ method, path, body string }{
		{"POST", "/v1/decisions", decision("revoke", "acme", sessionTerm)},
		{"POST", "/v1/decisions", decision("revoke", "acme", userTerm)},
		{"POST", "/v1/decisions", decision("kill", "", `{"kind":"tenant","value":"acme"}`)},
		{"POST", "/v1/decisions", decision("restore", "", `{"kind":"tenant","value":"acme"}`)},
		{"POST", "/v1/decisions", `{"operation":"suspend","reason":"anomaly","targets":[{"tenant":"beta","terms":[` + userTerm + `]}],"except":[{"tenant":"acme","terms":[` + userTerm + `]}]}`},
		{"POST", "/v1/oauth/global-token-revocation", `{"sub_id":{"format":"iss_sub","iss":"` + idp + `","sub":"carol"}}`},
		{"POST", "/v1/explain", `{"identity":{"tenant":"acme","issuer":"` + idp + `","user":"carol"}}`},
		{"POST", "/v1/enforcers", `{"name":"mine","tenants":["acme"]}`},
		{"POST", "/v1/enforcers", `{"name":"mine","tenants":["beta","acme"]}`},
		{"DELETE", "/v1/enforcers/eu-acme", ""},
		{"GET", "/v1/agents?tenant=acme", ""},
		{"GET", "/v1/sessions?tenant=acme", ""},
		{"POST", "/v1/agents", `{"tenant":"acme","id":"spiffe://corp/carol-bot"}`},
		{"POST", "/v1/agents/lifecycle", `{"tenant":"acme","id":"spiffe://corp/carol-bot","operation":"decommission"}`},
		{"POST", "/v1/sessions", `{"sessions":[{"tenant":"acme","issuer":"` + idp + `","id":"s-carol","expires":"2030-01-01T00:00:00Z"}]}`},
	} {
		code, _, got := s.do(beta, e.method, e.path, e.body)
		other, _, want := s.do(beta, e.method, missing(e.path), missing(e.body))
		if code != other || missing(got) != want || code < 400 {
			t.Errorf("%s %s %s: %d %s; for what there is not: %d %s", e.method, e.path, e.body, code, got, other, want)
		}
	}
	for _, d := range []*authority.Decision{acme, kill} {
		code, _, got := s.do(beta, "GET", fmt.Sprintf("/v1/decisions/%d/%d/coverage", d.Epoch, d.Number), "")
		other, _, _ := s.do(beta, "GET", fmt.Sprintf("/v1/decisions/%d/%d/coverage", d.Epoch, 1_000_000), "")
		if code != 404 || other != 404 {
			t.Errorf("coverage of acme's: %d %s; of none: %d", code, got, other)
		}
	}
	mine := s.decide("beta", "user", "erin", "INC-THEIRS")
	var cov authority.Coverage
	if _, _, got := s.do(beta, "GET", fmt.Sprintf("/v1/decisions/%d/%d/coverage", mine.Epoch, mine.Number), ""); json.Unmarshal([]byte(got), &cov) != nil || cov.Enforcers != 2 || len(cov.Detail) != 2 {
		t.Errorf("coverage of beta's own: %+v", cov)
	}
	// Global is everybody's to be shown and nobody's of one tenant to decide.
	if code, _, got := s.do(beta, "POST", "/v1/decisions", decision("kill", "", `{"kind":"global"}`)); code != 403 {
		t.Errorf("a global kill: %d %s", code, got)
	}
	// The shared enforcer is not beta's alone.
	if code, _, got := s.do(beta, "DELETE", "/v1/enforcers/shared", ""); code != 403 || strings.Contains(got, "acme") {
		t.Errorf("retiring the shared enforcer: %d %s", code, got)
	}
	// A preview counts the enforcers of the tenant.
	var prev authority.Decision
	if _, _, got := s.do(beta, "POST", "/v1/decisions", decision("suspend", "beta", userTerm)); json.Unmarshal([]byte(got), &prev) != nil || prev.Preview == nil || prev.Preview.Enforcers != 2 {
		t.Errorf("preview %s", got)
	}
	// Idempotency keys are one's own.
	body := strings.Replace(decision("suspend", "beta", sessionTerm), "{", `{"commit":true,`, 1)
	for _, who := range []caller{beta, s.as("b2", "responder-beta"), s.as("o", "commander-all")} {
		req, err := http.NewRequestWithContext(ctx, "POST", s.url+"/v1/decisions", strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		req.Header = http.Header{"Content-Type": {"application/json"}, "Idempotency-Key": {"k"}, "Authorization": {"Bearer " + who.token}}
		resp, err := s.plain.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		var d authority.Decision
		err = json.NewDecoder(resp.Body).Decode(&d)
		resp.Body.Close()
		if err != nil || !d.Committed || d.Duplicate {
			t.Errorf("%s %+v, %v", resp.Status, d, err)
		}
		body = strings.Replace(body, `"s1"`, `"s1x"`, 1)
	}
}

// propose makes a proposal on a tenant, or on everything.
func (s *served) propose(c caller, op, tenant string) authority.Proposal {
	s.Helper()
	term := `{"kind":"global"}`
	if tenant != "" {
		term = `{"kind":"tenant","value":"` + tenant + `"}`
	}
	var p authority.Proposal
	code, _, got := s.do(c, "POST", "/v1/proposals", strings.Replace(decision(op, "", term), "INC-0", "INC-7", 1))
	if code != 201 || json.Unmarshal([]byte(got), &p) != nil || p.ID == "" {
		s.Fatalf("propose: %d %s", code, got)
	}
	return p
}

// exemption declares one for a path that names one, and returns its id.
func (s *served) exemption(path, name string) string {
	s.Helper()
	if !strings.Contains(path, "EXEMPT") {
		return ""
	}
	var x authority.Exemption
	body := `{"target":{"tenant":"acme","terms":[{"kind":"role","value":"` + name + `"}]},"owner":"o","reason":"r"}`
	code, _, got := s.do(s.as(name, "commander-all"), "POST", "/v1/exemptions", body)
	if code != 201 || json.Unmarshal([]byte(got), &x) != nil || x.State != authority.ExemptionDeclared {
		s.Fatalf("exempt: %d %s", code, got)
	}
	return x.ID
}

// staged begins a staged restore of a kill for a path that names one, and returns
// its id.
func (s *served) staged(path string) string {
	s.Helper()
	if !strings.Contains(path, "STAGED") {
		return ""
	}
	acme := []authority.Target{authority.One("", "tenant", "", "acme")}
	if _, err := s.op.Decide(s.Context(), authority.Request{Operation: authority.Kill, Targets: acme, Reason: "anomaly", Incident: "INC-1", Commit: true}); err != nil {
		s.Fatal(err)
	}
	d, err := s.op.Decide(s.Context(), authority.Request{
		Operation: authority.Restore, Targets: acme, Stages: []string{"1%", "100%"}, Hold: authority.Duration(time.Hour), Incident: "INC-1", Commit: true,
	})
	if err != nil || d.Restore == nil {
		s.Fatalf("%+v, %v", d, err)
	}
	return d.Restore.ID
}

// noRestores aborts all.
func (s *served) noRestores() {
	s.Helper()
	list, err := s.op.Restores(s.Context())
	if err != nil {
		s.Fatal(err)
	}
	for _, x := range list {
		if x.State != authority.RestoreRunning {
			continue
		}
		if _, err := s.op.AbortRestore(s.Context(), x.ID); err != nil {
			s.Fatal(err)
		}
	}
}

// noExemptions removes all.
func (s *served) noExemptions() {
	s.Helper()
	list, err := s.op.Exemptions(s.Context())
	if err != nil {
		s.Fatal(err)
	}
	for _, x := range list {
		if err := s.op.RemoveExemption(s.Context(), x.ID); err != nil {
			s.Fatal(err)
		}
	}
}

func (s *served) kills() []string {
	s.Helper()
	st, err := s.op.Status(s.Context())
	if err != nil {
		s.Fatal(err)
	}
	return st.Kills
}

func committed(body, more string) string {
	if strings.Contains(more, `"incident"`) {
		body = strings.Replace(body, `"incident":"INC-0",`, "", 1)
	}
	return strings.Replace(body, "{", `{"commit":true,`+more, 1)
}

// A kill takes two commanders, over a restart too; one and the same person is not
// two, and nobody else counts.
func TestTwoPersons(t *testing.T) {
	s := startServed(t, "")
	alice, bob := s.as("alice", "commander-all"), s.as("bob", "commander-acme")
	killAcme := decision("kill", "", `{"kind":"tenant","value":"acme"}`)
	for _, op := range []string{"kill", "revoke", "suspend", "step_up", "reduce", "resume", "restore"} {
		for _, term := range []string{`{"kind":"global"}`, `{"kind":"tenant","value":"acme"}`} {
			if code, _, got := s.do(alice, "POST", "/v1/decisions", committed(decision(op, "", term), "")); code != 403 || !strings.Contains(got, authority.ProblemTwoPersons) {
				t.Errorf("%s %s by one: %d %s", op, term, code, got)
			}
		}
	}
	if code, _, got := s.do(alice, "POST", "/v1/decisions", killAcme); code != 200 || !strings.Contains(got, "second commander") {
		t.Errorf("preview: %d %s", code, got)
	}
	if code, _, got := s.do(alice, "POST", "/v1/decisions", committed(killAcme, `"drill":true,`)); code != 200 {
		t.Errorf("a drill: %d %s", code, got)
	}
	p := s.propose(alice, "kill", "acme")
	approve, withdraw := "/v1/proposals/"+p.ID+"/approve", "/v1/proposals/"+p.ID+"/withdraw"
	if p.By != "alice@"+s.login.srv.URL || p.State != authority.ProposalOpen || time.Until(p.Expires) > 15*time.Minute || len(s.kills()) != 0 {
		t.Errorf("proposed %+v, kills %v", p, s.kills())
	}

	s.stop()
	s.start(filepath.Join(s.dir, "access.yaml"))
	for name, c := range map[string]struct {
		caller
		want int
	}{
		"the proposer":                {alice, 403},
		"the proposer, another token": {caller{s.login.token("alice", []string{"commander-acme"}, map[string]any{"jti": "2"}), s.plain}, 403},
		"a responder":                 {s.as("r", "responder-all"), 403},
		"a responder, there":          {s.as("r", "responder-acme", "commander-beta"), 403},
		"another tenant's":            {s.as("b", "commander-beta", "responder-beta"), 404},
		"an agent":                    {caller{s.login.token("bob", []string{"commander-all"}, map[string]any{"act": map[string]any{"sub": "x"}}), s.plain}, 403},
	} {
		if code, _, got := s.do(c.caller, "POST", approve, ""); code != c.want {
			t.Errorf("%s: %d %s", name, code, got)
		}
	}
	if code, _, got := s.do(s.as("b", "commander-beta"), "POST", withdraw, ""); code != 404 {
		t.Errorf("another tenant's withdraws: %d %s", code, got)
	}
	if _, _, got := s.do(s.as("b", "commander-beta"), "GET", "/v1/proposals", ""); strings.Contains(got, p.ID) || strings.Contains(got, "acme") {
		t.Errorf("another tenant's sees it: %s", got)
	}
	if _, _, got := s.do(bob, "GET", "/v1/proposals", ""); !strings.Contains(got, p.ID) {
		t.Errorf("it is not listed: %s", got)
	}
	if k := s.kills(); len(k) != 0 {
		t.Errorf("killed before it was approved: %v", k)
	}
	before, err := s.op.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	// However many approve it at once, it is decided once.
	var wg sync.WaitGroup
	type answer struct {
		code int
		body string
	}
	answers := make(chan answer, 8)
	for n := range cap(answers) {
		c := s.as(fmt.Sprint("bob", n), "commander-acme")
		wg.Go(func() {
			code, _, body := s.do(c, "POST", approve, "")
			answers <- answer{code, body}
		})
	}
	wg.Wait()
	close(answers)
	numbers := map[uint64]bool{}
	for a := range answers {
		var d authority.Decision
		switch {
		case a.code == 409:
		case a.code == 200 && json.Unmarshal([]byte(a.body), &d) == nil && d.Durable:
			numbers[d.Number] = true
		default:
			t.Errorf("approve: %d %s", a.code, a.body)
		}
	}
	after, err := s.op.Status(t.Context())
	if err != nil || len(numbers) != 1 || !slices.Equal(after.Kills, []string{"tenant acme"}) || after.Entries != before.Entries+1 {
		t.Errorf("decided at %v; kills %v, %d and %d entries, %v", numbers, after.Kills, before.Entries, after.Entries, err)
	}
	for _, path := range []string{approve, withdraw} {
		if code, _, got := s.do(s.as("carol", "commander-all"), "POST", path, ""); code != 409 || !strings.Contains(got, "executed") {
			t.Errorf("%s once more: %d %s", path, code, got)
		}
	}

	// Its restoring takes two as well; one that was withdrawn is none.
	w := s.propose(bob, "restore", "acme")
	if code, _, got := s.do(alice, "POST", "/v1/proposals/"+w.ID+"/withdraw", ""); code != 200 {
		t.Errorf("withdraw: %d %s", code, got)
	}
	if code, _, got := s.do(alice, "POST", "/v1/proposals/"+w.ID+"/approve", ""); code != 409 || len(s.kills()) != 1 {
		t.Errorf("approve what was withdrawn: %d %s", code, got)
	}
	w = s.propose(bob, "restore", "acme")
	if code, _, got := s.do(alice, "POST", "/v1/proposals/"+w.ID+"/approve", ""); code != 200 || len(s.kills()) != 0 {
		t.Errorf("restore: %d %s", code, got)
	}
	// One principal's open proposals are bounded.
	code := 0
	for range 9 {
		code, _, _ = s.do(s.as("eve", "commander-all"), "POST", "/v1/proposals", killAcme)
	}
	if code != 429 {
		t.Errorf("the ninth open proposal: %d", code)
	}
	// The operator of the machine is alone, and may.
	if d, err := s.op.Decide(t.Context(), authority.Request{Operation: authority.Kill, Reason: "anomaly", Incident: "INC-0", Targets: []authority.Target{authority.One("", "global", "", "")}, Commit: true}); err != nil || !d.Committed {
		t.Errorf("the operator: %+v, %v", d, err)
	}
}

// Whoever decides alone is heard of.
func TestBreakGlass(t *testing.T) {
	s := startServed(t, "")
	alice := s.as("alice", "commander-all")
	kill := decision("kill", "", `{"kind":"global"}`)
	for name, c := range map[string]struct {
		body string
		want int
	}{
		"no incident":         {committed(kill, `"break_glass":"x","incident":"",`), 400},
		"too long a one":      {committed(kill, `"break_glass":"x","incident":"`+strings.Repeat("i", 60)+`",`), 400},
		"too long a reason":   {committed(kill, `"break_glass":"`+strings.Repeat("x", 201)+`","incident":"i",`), 400},
		"where it is not for": {committed(decision("revoke", "acme", userTerm), `"break_glass":"x","incident":"i",`), 400},
	} {
		if code, _, got := s.do(alice, "POST", "/v1/decisions", c.body); code != c.want {
			t.Errorf("%s: %d %s", name, code, got)
		}
	}
	if code, _, got := s.do(s.as("r", "responder-all"), "POST", "/v1/decisions", committed(kill, `"break_glass":"x","incident":"i",`)); code != 403 {
		t.Errorf("a responder: %d %s", code, got)
	}
	if k := s.kills(); len(k) != 0 {
		t.Fatalf("kills %v", k)
	}
	var d authority.Decision
	if code, _, got := s.do(alice, "POST", "/v1/decisions", committed(kill, `"break_glass":"nobody answers","incident":"INC-9",`)); code != 200 || json.Unmarshal([]byte(got), &d) != nil || !d.Durable || len(d.Warnings) == 0 {
		t.Errorf("%d %s", code, got)
	}
	x, err := s.op.Explain(t.Context(), authority.ExplainRequest{Identity: &authority.Identity{Tenant: "beta", Issuer: idp, User: "u"}})
	if err != nil || !x.Denied || len(x.Matches) != 1 || x.Matches[0].Incident != "BREAK-GLASS INC-9" {
		t.Errorf("%+v, %v", x, err)
	}
	st, err := s.op.Status(t.Context())
	if err != nil || !slices.ContainsFunc(st.Warnings, func(w string) bool {
		return strings.HasPrefix(w, "BREAK-GLASS: kill global") && strings.Contains(w, "alice@") && strings.Contains(w, "nobody answers")
	}) {
		t.Errorf("warnings %q, %v", st.Warnings, err)
	}
	if _, _, got := s.do(s.as("a", "auditor-all"), "GET", "/v1/proposals", ""); !strings.Contains(got, `"state":"break_glass"`) {
		t.Errorf("proposals %s", got)
	}
	if l := s.log.String(); !strings.Contains(l, "BREAK-GLASS: decided by one person alone") || !strings.Contains(l, "alice@") {
		t.Error("the log is silent")
	}
}

// An expired proposal is none. Wide decisions are limited, each principal's for
// itself, and kills are not.
func TestLimits(t *testing.T) {
	s := startServed(t, "proposal_for: 1s\nwide_per_minute: 4\n")
	p := s.propose(s.as("alice", "commander-all"), "kill", "")
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	bob := s.as("bob", "commander-all")
	for deadline := time.Now().Add(20 * time.Second); ; <-tick.C {
		_, _, got := s.do(bob, "GET", "/v1/proposals", "")
		if strings.Contains(got, `"state":"expired"`) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("it does not expire: %s", got)
		}
	}
	if code, _, got := s.do(bob, "POST", "/v1/proposals/"+p.ID+"/approve", ""); code != 409 || !strings.Contains(got, "expired") || len(s.kills()) != 0 {
		t.Errorf("approve what has expired: %d %s", code, got)
	}

	wide := committed(decision("suspend", "acme", userTerm), "")
	code, h, got := 0, http.Header(nil), ""
	for n := 0; code != 429 && n < 20; n++ {
		code, h, got = s.do(bob, "POST", "/v1/decisions", wide)
	}
	if code != 429 || h.Get("Retry-After") == "" || h.Get("Retry-After") == "0" || !strings.Contains(got, authority.ProblemOverloaded) {
		t.Errorf("twenty wide decisions at once: %d %v %s", code, h, got)
	}
	for what, c := range map[string]struct {
		caller
		body string
	}{
		"a single session":   {bob, committed(decision("suspend", "acme", sessionTerm), "")},
		"a preview":          {bob, decision("suspend", "acme", userTerm)},
		"another principal":  {s.as("carol", "responder-acme"), wide},
		"a kill":             {bob, committed(decision("kill", "", `{"kind":"global"}`), `"break_glass":"x","incident":"i",`)},
		"a kill, once again": {bob, committed(decision("kill", "", `{"kind":"tenant","value":"acme"}`), `"break_glass":"x","incident":"i",`)},
	} {
		if code, _, got := s.do(c.caller, "POST", "/v1/decisions", c.body); code != 200 {
			t.Errorf("%s: %d %s", what, code, got)
		}
	}
}

// The program says what to do next.
func TestProposalsOnTheCommandLine(t *testing.T) {
	s := startServed(t, "")
	as := func(who string, args ...string) (int, string) {
		file := filepath.Join(s.dir, who+".token")
		if err := os.WriteFile(file, []byte(s.login.token(who, []string{"commander-all"}, nil)), 0o600); err != nil {
			t.Fatal(err)
		}
		var out, errs strings.Builder
		code := run(append([]string{"--url", s.url, "--api-ca", s.pki.path("ca.pem"), "--api-token-file", file}, args...), strings.NewReader(""), &out, &errs)
		return code, out.String() + errs.String()
	}
	code, out := as("alice", "kill", "global", "--reason", "compromised", "--incident", "INC-1", "--commit")
	if code != exitProposed || !strings.HasPrefix(out, "proposed as p") || !strings.Contains(out, "NOT in effect") || len(s.kills()) != 0 {
		t.Fatalf("%d %s", code, out)
	}
	id := strings.TrimSuffix(strings.Fields(out)[2], ",")
	if !strings.Contains(out, "session-authority proposals approve "+id) {
		t.Errorf("it does not say what to do next: %s", out)
	}
	if code, out := as("alice", "proposals", "approve", id); code == 0 || !strings.Contains(out, "their own proposal") {
		t.Errorf("%d %s", code, out)
	}
	if code, out := as("bob", "proposals", "list"); code != 0 || !strings.Contains(out, id+" open, by alice@") || !strings.Contains(out, "kill global") {
		t.Errorf("%d %s", code, out)
	}
	if code, out := as("bob", "proposals", "approve", id); code != 0 || !strings.HasPrefix(out, "killed at seq") || len(s.kills()) != 1 {
		t.Errorf("%d %s", code, out)
	}
	code, out = as("bob", "restore", "global", "--incident", "INC-1", "--commit")
	if code != exitProposed {
		t.Fatalf("%d %s", code, out)
	}
	if code, out := as("bob", "proposals", "withdraw", strings.TrimSuffix(strings.Fields(out)[2], ",")); code != 0 || !strings.HasPrefix(out, "withdrawn p") {
		t.Errorf("%d %s", code, out)
	}
	if code, out := as("bob", "restore", "global", "--commit", "--incident", "INC-1", "--break-glass", "false alarm"); code != 0 || !strings.Contains(out, "restored at seq") || !strings.Contains(out, "break-glass") || len(s.kills()) != 0 {
		t.Errorf("%d %s", code, out)
	}
	// A certificate does as well as a token.
	s.pki.issue("alice", "spiffe://corp/ops/alice")
	var o, e strings.Builder
	if code := run([]string{"--url", s.url, "--api-ca", s.pki.path("ca.pem"), "--client-cert", s.pki.path("alice.pem"), "--client-key", s.pki.path("alice.key"), "status"}, strings.NewReader(""), &o, &e); code != 0 || !strings.Contains(o.String()+e.String(), "BREAK-GLASS") {
		t.Errorf("%d %s%s", code, o.String(), e.String())
	}
}
