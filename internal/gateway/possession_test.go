package gateway

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/interlock-fabric/interlock/internal/guardtest"
	"github.com/interlock-fabric/interlock/pkg/authority"
)

func hash64(b []byte) string {
	sum := sha256.Sum256(b)
	return base64.RawURLEncoding.EncodeToString(sum[:])
}

// present has a request carry a token with its proofs.
func present(token string, proofs ...string) func(*http.Request) {
	return func(r *http.Request) {
		r.Header.Set("Authorization", "DPoP "+token)
		for _, p := range proofs {
			r.Header.Add("DPoP", p)
		}
	}
}

// The mechanisms are the checks of RFC 9449 §4.3, the memory of what was accepted,
// and that the origin is the configuration's, whatever the request says.
func TestDPoP(t *testing.T) {
	w := newWorld(t)
	up, reached := plainUpstream(t)
	c := w.load(routeTo("mcp", "/mcp", up.URL, ""))
	g := w.start(c, Proxy)
	ann, eve := guardtest.NewHolder(t), guardtest.NewHolder(t)
	token, other := w.token("ann", "s-ann", ann.Bind), w.token("ann", "s-ann", ann.Bind)
	send := func(change func(*http.Request)) (int, string, http.Header) {
		t.Helper()
		resp := post(t, g.url()+"/mcp", "", toolCall("echo"), change)
		b, err := io.ReadAll(resp.Body)
		must(t, err)
		return resp.StatusCode, string(b), resp.Header
	}
	first := ann.Proof(http.MethodPost, resource, token, nil)
	if status, body, _ := send(present(token, first)); status != http.StatusOK {
		t.Fatalf("a good proof: %d %s", status, body)
	}
	if r := <-reached; r.Header.Get("Authorization")+r.Header.Get("Dpop") != "" || r.Header.Get("Interlock-Subject") != "ann" {
		t.Errorf("the upstream saw %v", r.Header)
	}
	at := func(url string, host ...string) func(*http.Request) {
		return func(r *http.Request) {
			present(token, ann.Proof(http.MethodPost, url, token, nil))(r)
			for _, h := range host {
				r.Host = h
			}
		}
	}
	proof := func(change map[string]any) func(*http.Request) {
		return present(token, ann.Proof(http.MethodPost, resource, token, change))
	}
	for name, x := range map[string]struct {
		change func(*http.Request)
		says   string
	}{
		"again":          {present(token, first), "has been used"},
		"another path":   {at("https://tools.example/other"), "another URL"},
		"another scheme": {at("http://tools.example/mcp"), "another URL"},
		"another server": {at("https://other.example/mcp"), "another URL"},
		"another server, which the request names": {at("http://other.example/mcp", "other.example"), "another URL"},
		"the listener's own address":              {at(g.url() + "/mcp"), "another URL"},
		"another method":                          {proof(map[string]any{"htm": http.MethodGet}), "another method"},
		"another token":                           {present(token, ann.Proof(http.MethodPost, resource, other, nil)), "another token"},
		"another's key":                           {present(token, eve.Proof(http.MethodPost, resource, token, nil)), "another key"},
		"too old":                                 {proof(map[string]any{"iat": time.Now().Add(-2 * time.Minute).Unix()}), "too old"},
		"of the future":                           {proof(map[string]any{"iat": time.Now().Add(time.Minute).Unix()}), "not valid yet"},
		"none":                                    {present(token), "missing"},
		"two":                                     {present(token, ann.Proof(http.MethodPost, resource, token, nil), ann.Proof(http.MethodPost, resource, token, nil)), "twice"},
		"as a bearer token":                       {func(r *http.Request) { r.Header.Set("Authorization", "Bearer "+token) }, "scheme DPoP"},
		"for a token of no key":                   {present(w.token("ann", "s-ann"), first), "bound to no key"},
	} {
		t.Run(name, func(t *testing.T) {
			status, body, h := send(x.change)
			if status != http.StatusUnauthorized || !strings.Contains(body, x.says) {
				t.Errorf("%d %s", status, body)
			}
			if challenge := strings.Join(h.Values("Www-Authenticate"), ", "); !strings.Contains(challenge, `DPoP error="invalid_dpop_proof", algs="ES256`) && name != "for a token of no key" {
				t.Errorf("challenge %q", challenge)
			}
			if len(reached) > 0 {
				t.Fatal("it reached the upstream")
			}
		})
	}

	// What was accepted is remembered over a reload.
	last := ann.Proof(http.MethodPost, resource, token, nil)
	if status, body, _ := send(present(token, last)); status != http.StatusOK {
		t.Fatalf("a good proof: %d %s", status, body)
	}
	must(t, g.Reload(c))
	if status, body, _ := send(present(token, last)); status != http.StatusUnauthorized || !strings.Contains(body, "has been used") {
		t.Errorf("again, after a reload: %d %s", status, body)
	}
	// A decision on the key counts for whoever proves it.
	w.decide(authority.Revoke, "key", "jkt:"+ann.Thumbprint)
	eventually(t, "denied", func() bool {
		status, body, _ := send(proof(nil))
		return status == http.StatusUnauthorized && strings.Contains(body, "INC-142")
	})
}

// Where clients know the server by another origin than the resource's, and where
// nothing says by which.
func TestOriginOfProofs(t *testing.T) {
	w := newWorld(t)
	up, reached := plainUpstream(t)
	ann := guardtest.NewHolder(t)
	route := routeTo("mcp", "/mcp", up.URL, "")
	for name, x := range map[string]struct {
		config string
		origin string // of a proof that is accepted
		says   string // else
	}{
		"the resource's":          {route, "https://tools.example", ""},
		"another":                 {"proof: {origin: \"https://edge.example:8443\"}\n" + route, "https://edge.example:8443", ""},
		"not the resource's then": {"proof: {origin: \"https://edge.example:8443\"}\n" + route, "", "another URL"},
		"unknown":                 {strings.Replace(route, resource, "urn:example:tools", 1), "", "not configured"},
	} {
		t.Run(name, func(t *testing.T) {
			g := w.start(w.load(x.config), Proxy)
			token := w.token("ann", "s-ann", ann.Bind, func(c map[string]any) {
				if name == "unknown" {
					c["aud"] = "urn:example:tools"
				}
			})
			origin, want := x.origin, http.StatusOK
			if origin == "" {
				origin, want = "https://tools.example", http.StatusUnauthorized
			}
			resp := post(t, g.url()+"/mcp", "", toolCall("echo"), present(token, ann.Proof(http.MethodPost, origin+"/mcp", token, nil)), func(r *http.Request) { r.Host = "tools.example" })
			body, _ := io.ReadAll(resp.Body)
			if resp.StatusCode != want || !strings.Contains(string(body), x.says) || len(reached) != map[int]int{http.StatusOK: 1}[want] {
				t.Errorf("%s: %s", resp.Status, body)
			}
			for len(reached) > 0 {
				<-reached
			}
			g.Shutdown(t.Context())
		})
	}
}

// A client that is told which nonce to use gets through with it.
func TestNonceOfProofs(t *testing.T) {
	w := newWorld(t)
	up, _ := plainUpstream(t)
	w.write("nonce", strings.Repeat("k", 32))
	g := w.start(w.load("proof: {nonce_key_file: nonce}\n"+routeTo("mcp", "/mcp", up.URL, "")), Proxy)
	ann := guardtest.NewHolder(t)
	token := w.token("ann", "s-ann", ann.Bind)
	resp := post(t, g.url()+"/mcp", "", toolCall("echo"), present(token, ann.Proof(http.MethodPost, resource, token, nil)))
	nonce := resp.Header.Get("Dpop-Nonce")
	if challenge := strings.Join(resp.Header.Values("Www-Authenticate"), ", "); resp.StatusCode != http.StatusUnauthorized || nonce == "" || !strings.Contains(challenge, `DPoP error="use_dpop_nonce"`) {
		t.Fatalf("%s %v", resp.Status, resp.Header)
	}
	resp = post(t, g.url()+"/mcp", "", toolCall("echo"), present(token, ann.Proof(http.MethodPost, resource, token, map[string]any{"nonce": nonce})))
	if resp.StatusCode != http.StatusOK {
		t.Error(resp.Status)
	}
}

// ca signs certificates for servers and clients.
type ca struct {
	t    testing.TB
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newCA(t testing.TB) *ca {
	t.Helper()
	c := &ca{t: t}
	var err error
	c.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	template := c.template("ca " + rand.Text())
	template.IsCA, template.BasicConstraintsValid, template.KeyUsage = true, true, x509.KeyUsageCertSign
	der, err := x509.CreateCertificate(rand.Reader, template, template, c.key.Public(), c.key)
	must(t, err)
	c.cert, err = x509.ParseCertificate(der)
	must(t, err)
	return c
}

func (c *ca) template(name string) *x509.Certificate {
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	must(c.t, err)
	return &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
}

func (c *ca) issue(name string) *tls.Certificate {
	c.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(c.t, err)
	der, err := x509.CreateCertificate(rand.Reader, c.template(name), c.cert, key.Public(), c.key)
	must(c.t, err)
	leaf, err := x509.ParseCertificate(der)
	must(c.t, err)
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}
}

func (c *ca) pem() string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.cert.Raw}))
}

func (c *ca) pool() *x509.CertPool {
	p := x509.NewCertPool()
	p.AddCert(c.cert)
	return p
}

// writePair writes a certificate and its key where a configuration looks for them.
func (w *world) writePair(pair *tls.Certificate) {
	w.t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(pair.PrivateKey)
	must(w.t, err)
	w.write("server.pem", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: pair.Certificate[0]})))
	w.write("server.key", string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})))
}

const secureListener = "proxy: {listeners: [{listen: \"127.0.0.1:0\", tls: {cert: server.pem, key: server.key%s}}], flush_timeout: 500ms}\n"

// over is a transport of one HTTP version over TLS.
func over(t testing.TB, trusts *ca, h2 bool, cert *tls.Certificate) *http.Transport {
	tr := &http.Transport{
		TLSClientConfig: &tls.Config{RootCAs: trusts.pool(), MinVersion: tls.VersionTLS12}, Protocols: new(http.Protocols),
	}
	if cert != nil {
		// Whether or not the server asks for one of its authority.
		tr.TLSClientConfig.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return cert, nil }
	}
	tr.Protocols.SetHTTP1(!h2)
	tr.Protocols.SetHTTP2(h2)
	t.Cleanup(tr.CloseIdleConnections)
	return tr
}

func (g *Gateway) secureURL() string { return strings.Replace(g.url(), "http:", "https:", 1) }

// sendTLS makes a small call over TLS.
func sendTLS(t testing.TB, tr *http.Transport, g *Gateway, authorization string, proofs ...string) (*http.Response, string, error) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, g.secureURL()+"/mcp", strings.NewReader(toolCall("echo")))
	must(t, err)
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Authorization", authorization)
	for _, p := range proofs {
		req.Header.Add("DPoP", p)
	}
	resp, err := tr.RoundTrip(req)
	if err != nil {
		return nil, "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return resp, string(b), err
}

// The mechanism is the thumbprint of the certificate of the connection itself.
func TestCertificateBoundTokens(t *testing.T) {
	w := newWorld(t)
	up, reached := plainUpstream(t)
	serverCA, clientCA := newCA(t), newCA(t)
	w.writePair(serverCA.issue("server"))
	w.write("clients.pem", clientCA.pem())
	g := w.start(w.load(strings.Replace(routeTo("mcp", "/mcp", up.URL, ""), listener, fmt.Sprintf(secureListener, ", client_ca: clients.pem"), 1)), Proxy)
	own, anothers, stranger := clientCA.issue("ann"), clientCA.issue("eve"), newCA(t).issue("ann")
	ann := guardtest.NewHolder(t)
	x5t := hash64(own.Certificate[0])
	byCert := w.token("ann", "s-ann", func(c map[string]any) { c["cnf"] = map[string]any{"x5t#S256": x5t} })
	byBoth := w.token("ann", "s-ann", func(c map[string]any) { c["cnf"] = map[string]any{"x5t#S256": x5t, "jkt": ann.Thumbprint} })
	byNone := w.token("ann", "s-ann")
	for _, h2 := range []bool{false, true} {
		for name, x := range map[string]struct {
			cert   *tls.Certificate
			auth   string
			proved string // a token to prove
			status int    // 0: no connection
			says   string
		}{
			"its certificate":                   {own, "Bearer " + byCert, "", 200, ""},
			"another's certificate":             {anothers, "Bearer " + byCert, "", 401, "another client certificate"},
			"no certificate":                    {nil, "Bearer " + byCert, "", 401, "no client certificate"},
			"a stranger's certificate":          {stranger, "Bearer " + byCert, "", 0, ""},
			"its certificate and its proof":     {own, "DPoP " + byBoth, byBoth, 200, ""},
			"its proof, another's certificate":  {anothers, "DPoP " + byBoth, byBoth, 401, "another client certificate"},
			"its certificate, no proof":         {own, "Bearer " + byBoth, "", 401, "scheme DPoP"},
			"a bearer token, any certificate":   {anothers, "Bearer " + byNone, "", 200, ""},
			"a bearer token and no certificate": {nil, "Bearer " + byNone, "", 200, ""},
		} {
			t.Run(fmt.Sprintf("%s, HTTP/2 %v", name, h2), func(t *testing.T) {
				tr := over(t, serverCA, h2, x.cert)
				var proofs []string
				if x.proved != "" {
					proofs = append(proofs, ann.Proof(http.MethodPost, resource, x.proved, nil))
				}
				resp, body, err := sendTLS(t, tr, g, x.auth, proofs...)
				switch {
				case x.status == 0:
					if err == nil {
						t.Error(resp.Status)
					}
				case err != nil || resp.StatusCode != x.status || !strings.Contains(body, x.says) || resp.ProtoMajor != map[bool]int{false: 1, true: 2}[h2]:
					t.Errorf("%v %v %s", err, resp, body)
				}
				if n := len(reached); n != map[bool]int{true: 1}[x.status == 200] {
					t.Errorf("%d reached the upstream", n)
				}
				for len(reached) > 0 {
					<-reached
				}
			})
		}
	}
	w.decide(authority.Revoke, "key", "x5t#S256:"+x5t)
	eventually(t, "denied", func() bool {
		resp, body, err := sendTLS(t, over(t, serverCA, true, own), g, "Bearer "+byCert)
		return err == nil && resp.StatusCode == http.StatusUnauthorized && strings.Contains(body, "INC-142")
	})
}

// The mechanisms are the files read again at each reload, which is what SIGHUP
// does, and a TLS configuration that is found for each connection.
func TestReloadTakesNewCertificates(t *testing.T) {
	w := newWorld(t)
	up, _ := plainUpstream(t)
	before, after := newCA(t), newCA(t)
	w.writePair(before.issue("before"))
	w.write("clients.pem", before.pem())
	c := w.load(strings.Replace(routeTo("mcp", "/mcp", up.URL, ""), listener, fmt.Sprintf(secureListener, ", client_ca: clients.pem"), 1))
	g := w.start(c, Proxy)
	client := before.issue("ann")
	tokenOf := func(cert *tls.Certificate) string {
		return "Bearer " + w.token("ann", "s-ann", func(c map[string]any) { c["cnf"] = map[string]any{"x5t#S256": hash64(cert.Certificate[0])} })
	}
	served := func(tr *http.Transport, token string) error {
		t.Helper()
		resp, body, err := sendTLS(t, tr, g, token)
		if err == nil && resp.StatusCode >= 300 {
			err = fmt.Errorf("%s %s", resp.Status, body)
		}
		return err
	}
	kept := map[bool]*http.Transport{}
	resuming := over(t, before, false, client)
	resuming.DisableKeepAlives = true
	resuming.TLSClientConfig.ClientSessionCache = tls.NewLRUClientSessionCache(4)
	for _, h2 := range []bool{false, true} {
		kept[h2] = over(t, before, h2, client)
		must(t, served(kept[h2], tokenOf(client)))
	}
	for _, resumed := range []bool{false, true} {
		resp, _, err := sendTLS(t, resuming, g, tokenOf(client))
		if err != nil || resp.StatusCode != http.StatusOK || resp.TLS.DidResume != resumed {
			t.Fatal(err, resp)
		}
	}

	// What cannot be read changes nothing.
	w.write("server.key", "no key")
	if err := g.Reload(c); err == nil || !strings.Contains(err.Error(), "listener") {
		t.Fatalf("a broken key was taken: %v", err)
	}
	if err := served(over(t, before, true, client), tokenOf(client)); err != nil {
		t.Fatalf("after a broken reload: %v", err)
	}

	w.writePair(after.issue("after"))
	w.write("clients.pem", after.pem())
	must(t, g.Reload(c))
	for _, h2 := range []bool{false, true} {
		if err := served(over(t, before, h2, client), tokenOf(client)); err == nil {
			t.Error("a new connection was shown the old certificate")
		}
		next := after.issue("ann")
		if err := served(over(t, after, h2, next), tokenOf(next)); err != nil {
			t.Errorf("with the new certificates: %v", err)
		}
		if err := served(kept[h2], tokenOf(client)); err != nil {
			t.Errorf("a connection that was there: %v", err)
		}
	}
	// A session that is resumed is shown no certificate, and shows none.
	resuming.TLSClientConfig.RootCAs.AddCert(after.cert)
	if err := served(resuming, tokenOf(client)); err == nil {
		t.Error("a client certificate of an authority that was taken out is accepted from a resumed session")
	}
}
