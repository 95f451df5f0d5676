package gateway

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/interlock-fabric/interlock/internal/access"
	service "github.com/interlock-fabric/interlock/internal/authority"
	"github.com/interlock-fabric/interlock/internal/issuers"
	"github.com/interlock-fabric/interlock/pkg/authority"
)

// issuer serves OpenID Connect metadata, keys and introspection over HTTP, at an
// address that stays the same while it is away.
type issuer struct {
	t   testing.TB
	url string

	mu    sync.Mutex
	srv   *http.Server // nil while it is away
	done  chan struct{}
	quiet chan struct{} // while it takes connections and does not answer
	claim string        // who its metadata says that it is
	jwks  string        // the path of its keys
	keys  []jose.JSONWebKey
	// opaque are the tokens that are active, with what it says of them.
	opaque map[string]map[string]any
	asked  map[string]int // requests, by path
}

const clientSecret = "s3cret-of-the-gateway"

// newIssuer starts an issuer, which mints the world's tokens from then on. config
// is what the configuration says of it besides its URL.
func newIssuer(w *world, config string) *issuer {
	w.t.Helper()
	l, err := new(net.ListenConfig).Listen(w.t.Context(), "tcp", "127.0.0.1:0")
	must(w.t, err)
	i := &issuer{
		t: w.t, url: "http://" + l.Addr().String(), jwks: "/jwks.json",
		opaque: make(map[string]map[string]any), asked: make(map[string]int),
	}
	i.claim = i.url
	w.issuer = i.url
	w.issuers = fmt.Sprintf("{url: %q, tenant: default, %s}", i.url, strings.ReplaceAll(config, "@", i.url))
	i.rotate(w, "k1")
	i.serve(l)
	w.t.Cleanup(i.leave)
	return i
}

// rotate has a new key in the place of all others.
func (i *issuer) rotate(w *world, kid string) {
	i.t.Helper()
	signer, key := newSigner(i.t, kid)
	i.mu.Lock()
	defer i.mu.Unlock()
	w.signer, i.keys = signer, []jose.JSONWebKey{key}
}

func (i *issuer) serve(l net.Listener) {
	srv := &http.Server{Handler: i, ReadHeaderTimeout: patience}
	done := make(chan struct{})
	i.mu.Lock()
	i.srv, i.done = srv, done
	i.mu.Unlock()
	go func() {
		defer close(done)
		_ = srv.Serve(l)
	}()
}

// leave closes its listener and every connection.
func (i *issuer) leave() {
	i.mu.Lock()
	srv, done := i.srv, i.done
	i.srv = nil
	i.mu.Unlock()
	if srv != nil {
		_ = srv.Close()
		<-done
	}
}

// back has it listen where it did before.
func (i *issuer) back() {
	i.t.Helper()
	l, err := new(net.ListenConfig).Listen(i.t.Context(), "tcp", strings.TrimPrefix(i.url, "http://"))
	must(i.t, err)
	i.serve(l)
}

// hush has it answer nothing, until speak.
func (i *issuer) hush() {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.quiet = make(chan struct{})
}

func (i *issuer) speak() {
	i.mu.Lock()
	defer i.mu.Unlock()
	close(i.quiet)
	i.quiet = nil
}

// requests is how many there were for a path.
func (i *issuer) requests(path string) int {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.asked[path]
}

func (i *issuer) set(change func()) {
	i.mu.Lock()
	defer i.mu.Unlock()
	change()
}

func (i *issuer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	i.mu.Lock()
	i.asked[r.URL.Path]++
	quiet := i.quiet
	i.mu.Unlock()
	if quiet != nil {
		select {
		case <-quiet:
		case <-r.Context().Done():
		}
		return
	}
	var out any
	i.mu.Lock()
	switch r.URL.Path {
	case "/.well-known/openid-configuration":
		out = map[string]any{
			"issuer": i.claim, "jwks_uri": i.url + i.jwks, "authorization_endpoint": i.url + "/authorize",
			"response_types_supported": []string{"code"}, "subject_types_supported": []string{"public"}, "id_token_signing_alg_values_supported": []string{"ES256"},
		}
	case i.jwks:
		out = jose.JSONWebKeySet{Keys: i.keys}
	case "/introspect":
		user, secret, _ := r.BasicAuth()
		claims := i.opaque[r.PostFormValue("token")]
		switch {
		case r.Method != http.MethodPost || user != "gateway" || secret != clientSecret:
		case claims == nil:
			out = map[string]any{"active": false}
		default:
			out = claims
		}
	}
	i.mu.Unlock()
	if out == nil {
		w.WriteHeader(http.StatusUnauthorized)
		return
	}
	b, err := json.Marshal(out)
	if err != nil {
		w.WriteHeader(http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_, _ = w.Write(b)
}

// ask makes a small call, and returns the status and the body of the answer.
func ask(t testing.TB, g *Gateway, token string) (status int, body string, h http.Header) {
	t.Helper()
	resp := post(t, g.url()+"/mcp", token, toolCall("echo"))
	b, err := io.ReadAll(resp.Body)
	must(t, err)
	return resp.StatusCode, string(b), resp.Header
}

func wantStatus(t testing.TB, what string, g *Gateway, token string, want int, says string) {
	t.Helper()
	if status, body, h := ask(t, g, token); status != want || !strings.Contains(body, says) {
		t.Fatalf("%s: %d, want %d and %q: %s %v", what, status, want, says, body, h)
	}
}

// The mechanism is the age of the keys: it is asked about for each request, also
// where the token has been seen.
func TestIssuerIsCutOff(t *testing.T) {
	for name, c := range map[string]struct{ cut, mend func(*issuer) }{
		"refused": {(*issuer).leave, (*issuer).back},
		"silent":  {(*issuer).hush, (*issuer).speak},
	} {
		t.Run(name, func(t *testing.T) {
			const age = 2 * time.Second
			w := newWorld(t)
			i := newIssuer(w, fmt.Sprintf("jwks: %q, refresh_interval: 100ms, keys_max_age: %s", "@/jwks.json", age))
			up, reached := plainUpstream(t)
			g := w.start(w.load(routeTo("mcp", "/mcp", up.URL, "")), Proxy)
			seen := w.token("ann", "s-ann")
			began := time.Now()
			wantStatus(t, "with the issuer there", g, seen, http.StatusOK, "")
			c.cut(i)
			cut := time.Now()

			tick := time.NewTicker(10 * time.Millisecond)
			defer tick.Stop()
			// late counts those that were served while the keys were being fetched.
			for late := 0; ; <-tick.C {
				asked := time.Now()
				// One that has been verified before, and one that is verified by
				// the keys that are there.
				for what, token := range map[string]string{"seen": seen, "new": w.token("bob", "s-bob")} {
					status, body, h := ask(t, g, token)
					answered := time.Now()
					if what == "new" && status == http.StatusOK && asked.After(cut.Add(age/2)) && answered.Before(cut.Add(age)) {
						late++
					}
					switch {
					case answered.Before(began.Add(age)) && status != http.StatusOK:
						t.Fatalf("%s after %s, the keys may be used for %s: %d %s", what, answered.Sub(began), age, status, body)
					case asked.After(cut.Add(age)) && (status != http.StatusServiceUnavailable || h.Get("Retry-After") == "" || !strings.Contains(body, "the issuer's keys cannot be fetched")):
						t.Fatalf("%s after %s, the keys may be used for %s: %d %s %v", what, asked.Sub(cut), age, status, body, h)
					}
				}
				if asked.After(cut.Add(age)) {
					if late == 0 {
						t.Fatal("nothing was served while the issuer was being asked again")
					}
					break
				}
			}
			for len(reached) > 0 {
				<-reached
			}
			if status, _, _ := ask(t, g, seen); status == http.StatusOK || len(reached) > 0 {
				t.Fatal("a refused call reached the upstream")
			}

			c.mend(i)
			for _, token := range []string{seen, w.token("bob", "s-bob")} {
				eventually(t, "served again", func() bool { status, _, _ := ask(t, g, token); return status == http.StatusOK })
			}
		})
	}
}

// The mechanism is that keys are fetched once in an interval, whoever asks.
func TestFloodOfUnknownKeysSparesTheIssuer(t *testing.T) {
	const interval = time.Second
	w := newWorld(t)
	i := newIssuer(w, fmt.Sprintf("jwks: %q, refresh_interval: %s", "@/jwks.json", interval))
	up, reached := plainUpstream(t)
	g := w.start(w.load(routeTo("mcp", "/mcp", up.URL, "")), Proxy)
	good := w.token("ann", "s-ann")
	began := time.Now()
	wantStatus(t, "before", g, good, http.StatusOK, "")
	<-reached

	const callers, each = 8, 50
	answers := make(chan string, callers*each)
	var wg sync.WaitGroup
	for c := range callers {
		signer, _ := newSigner(t, fmt.Sprint("own-", c))
		wg.Go(func() {
			for n := range each {
				signer := signer
				if n%2 == 0 {
					signer, _ = newSigner(t, fmt.Sprintf("own-%d-%d", c, n))
				}
				status, body, h := ask(t, g, sign(t, signer, w.claims("eve", "s-eve")))
				answers <- fmt.Sprint(status, " ", strings.Contains(body, "unknown signing key"), " ", strings.Contains(h.Get("Www-Authenticate"), `error="invalid_token"`))
			}
		})
	}
	served := make(chan struct{})
	go func() { wg.Wait(); close(served) }()
	for waiting := true; waiting; {
		wantStatus(t, "a good token beside the flood", g, good, http.StatusOK, "")
		<-reached
		select {
		case <-served:
			waiting = false
		default:
		}
	}
	for range callers * each {
		if got := <-answers; got != "401 true true" {
			t.Fatalf("an unknown key: %s", got)
		}
	}
	if len(reached) > 0 {
		t.Error("one reached the upstream")
	}
	if n, most := i.requests("/jwks.json"), 1+int(time.Since(began)/interval); n > most {
		t.Errorf("%d tokens had the issuer asked %d times in %s, want at most %d", callers*each, n, time.Since(began), most)
	}
	// Nor does the flood keep a new key from being learnt.
	i.rotate(w, "k2")
	next := w.token("ann", "s-ann")
	eventually(t, "the new key is known", func() bool { status, _, _ := ask(t, g, next); return status == http.StatusOK })
}

// The mechanisms are the metadata, read before each fetch, and that a token ends
// with its key, seen or not.
func TestDiscoveryAndRotation(t *testing.T) {
	w := newWorld(t)
	i := newIssuer(w, "discovery: true, refresh_interval: 100ms")
	up, reached := plainUpstream(t)
	g := w.start(w.load(routeTo("mcp", "/mcp", up.URL, "")), Proxy)
	i.set(func() { i.claim = "https://another.example" })
	first := w.token("ann", "s-ann")
	wantStatus(t, "with the metadata of another", g, first, http.StatusServiceUnavailable, "the issuer's keys cannot be fetched")
	i.set(func() { i.claim = i.url })
	eventually(t, "served", func() bool { status, _, _ := ask(t, g, first); return status == http.StatusOK })
	if i.requests("/jwks.json") == 0 || i.requests("/.well-known/openid-configuration") == 0 {
		t.Error("the keys came from elsewhere")
	}

	i.rotate(w, "k2")
	i.set(func() { i.jwks = "/moved.json" })
	second := w.token("ann", "s-ann")
	wantStatus(t, "the old key, while nobody has asked", g, first, http.StatusOK, "")
	eventually(t, "the new key is known", func() bool { status, _, _ := ask(t, g, second); return status == http.StatusOK })
	for len(reached) > 0 {
		<-reached
	}
	wantStatus(t, "the old key", g, first, http.StatusUnauthorized, "unknown signing key")
	wantStatus(t, "another token by it", g, sign(t, func() jose.Signer { s, _ := newSigner(t, "k2"); return s }(), w.claims("ann", "s-ann")), http.StatusUnauthorized, "bad signature")
	if len(reached) > 0 {
		t.Error("one reached the upstream")
	}
}

// The mechanisms are the age of an answer, and the check of each request against
// the state, whatever is remembered of its token.
func TestIntrospection(t *testing.T) {
	const age = 2 * time.Second
	w := newWorld(t)
	w.write("introspection.secret", clientSecret+"\n")
	i := newIssuer(w, fmt.Sprintf(`introspection: {url: "@/introspect", client_id: gateway, client_secret_file: introspection.secret, max_age: %s}`, age))
	up, reached := plainUpstream(t)
	g := w.start(w.load(routeTo("mcp", "/mcp", up.URL, "")), Proxy)
	active := func(user string, change ...func(map[string]any)) (token string) {
		c := w.claims(user, "s-"+user)
		c["active"] = true
		for _, f := range change {
			f(c)
		}
		token = "opaque-" + user
		i.set(func() { i.opaque[token] = c })
		return token
	}

	wantStatus(t, "an unknown token", g, "never-issued", http.StatusUnauthorized, "not active")
	wantStatus(t, "for another resource", g, active("joe", func(c map[string]any) { c["aud"] = "https://other.example" }), http.StatusUnauthorized, "another audience")
	if len(reached) > 0 {
		t.Fatal("one reached the upstream")
	}
	ann, bob := active("ann"), active("bob")
	began := time.Now()
	wantStatus(t, "active", g, ann, http.StatusOK, "")
	if r := <-reached; r.Header.Get("Interlock-Subject") != "ann" || r.Header.Get("Authorization") != "" {
		t.Errorf("the upstream saw %v", r.Header)
	}
	eventually(t, "the answer is remembered", func() bool {
		before := i.requests("/introspect")
		wantStatus(t, "still active", g, ann, http.StatusOK, "")
		return i.requests("/introspect") == before
	})
	asked := time.Now()
	i.set(func() { i.opaque[ann] = nil })

	// The issuer's own revocation counts once what it has said is too old.
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	before := i.requests("/introspect")
	for {
		at := time.Now()
		status, body, _ := ask(t, g, ann)
		if at.After(asked.Add(age)) {
			if status != http.StatusUnauthorized || !strings.Contains(body, "not active") {
				t.Fatalf("%s after the answer: %d %s", at.Sub(asked), status, body)
			}
			break
		}
		if status != http.StatusOK && time.Now().Before(began.Add(age)) {
			t.Fatalf("%s after the answer: %d %s", at.Sub(began), status, body)
		}
		<-tick.C
	}
	if n := i.requests("/introspect") - before; n == 0 || n > 5 {
		t.Errorf("the issuer was asked %d times in %s", n, age)
	}

	// A decision counts at once, also on what is remembered.
	wantStatus(t, "the other", g, bob, http.StatusOK, "")
	before = i.requests("/introspect")
	w.decide(authority.Revoke, "session", "s-bob")
	eventually(t, "denied", func() bool {
		status, body, _ := ask(t, g, bob)
		return status == http.StatusUnauthorized && strings.Contains(body, "INC-142")
	})
	if n := i.requests("/introspect") - before; n > 1+int(patience/age) {
		t.Errorf("asked %d times", n)
	}

	// An issuer that cannot be asked denies what is not remembered.
	eve := active("eve")
	i.leave()
	wantStatus(t, "with the issuer away", g, eve, http.StatusServiceUnavailable, "the issuer cannot be asked")
	i.back()
	wantStatus(t, "with the issuer back", g, eve, http.StatusOK, "")
}

// A gateway can ask an authority, which asks the issuer: what is denied there is
// not active here. The gateway follows the log of another authority, so that it
// can have heard of the decision in no other way.
func TestAnAuthorityIsAsked(t *testing.T) {
	w := newWorld(t)
	w.write("introspection.secret", clientSecret)
	i := newIssuer(w, `introspection: {url: "@/introspect", client_id: gateway, client_secret_file: introspection.secret}`)
	secret := rand.Text() + rand.Text()
	w.write("client.secret", secret)
	tokens, err := issuers.LoadTokens(w.write("tokens.yaml", fmt.Sprintf("audiences: [%q]\nissuers: [%s]\n", resource, w.issuers)))
	must(t, err)
	who, err := access.Load(w.write("access.yaml", "clients: [{id: eu, secret_file: client.secret, role: viewer, tenants: [default]}]"))
	must(t, err)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	asked, err := service.Open(ctx, service.Options{
		DataDir: filepath.Join(w.dir, "b"), RelaxedSync: true, APIListen: "127.0.0.1:0", Access: who, Tokens: tokens,
	})
	must(t, err)
	t.Cleanup(func() { must(t, asked.Close()) })
	operator, err := authority.New(authority.Options{Socket: asked.Socket()})
	must(t, err)
	t.Cleanup(operator.Close)

	w.issuers = fmt.Sprintf(`{url: %q, tenant: default, introspection: {url: "http://%s/v1/oauth/introspect", client_id: eu, client_secret_file: client.secret, max_age: 10ms}}`, i.url, asked.APIAddr())
	up, _ := plainUpstream(t)
	g := w.start(w.load(routeTo("mcp", "/mcp", up.URL, "")), Proxy)
	for _, user := range []string{"ann", "bob"} {
		c := w.claims(user, "s-"+user)
		c["active"] = true
		i.set(func() { i.opaque["opaque-"+user] = c })
	}
	eventually(t, "let in", func() bool { status, _, _ := ask(t, g, "opaque-ann"); return status == http.StatusOK })
	wantStatus(t, "unknown to the issuer", g, "never-issued", http.StatusUnauthorized, "not active")
	_, err = operator.Decide(ctx, authority.Request{
		Operation: authority.Revoke, Targets: []authority.Target{authority.One("", "session", i.url, "s-ann")}, Reason: "stolen-token", Incident: "INC-7", Commit: true,
	})
	must(t, err)
	eventually(t, "denied", func() bool {
		status, body, _ := ask(t, g, "opaque-ann")
		return status == http.StatusUnauthorized && strings.Contains(body, "not active")
	})
	wantStatus(t, "the other", g, "opaque-bob", http.StatusOK, "")
}

// A call under an opaque token that has no end is cut once the issuer has revoked
// it, and nobody else's is. The mechanism is the watch over the token.
func TestRunningCallsAreIntrospected(t *testing.T) {
	w, x := newWorld(t), newTools(t)
	w.write("introspection.secret", clientSecret+"\n")
	i := newIssuer(w, `introspection: {url: "@/introspect", client_id: gateway, client_secret_file: introspection.secret, max_age: 300ms}`)
	g := w.start(w.load(routeTo("mcp", "/mcp", x.URL, "")), Proxy)
	running := map[string]<-chan error{}
	for _, user := range []string{"ann", "bob"} {
		c := w.claims(user, "s-"+user)
		c["active"] = true
		delete(c, "exp")
		i.set(func() { i.opaque["opaque-"+user] = c })
		a, err := dial(t, g.url()+"/mcp", modern, "opaque-"+user)
		must(t, err)
		running[user] = a.start(t.Context(), user)
		within(t, user+"'s call runs", x.started)
	}
	before := i.requests("/introspect")
	eventually(t, "the issuer is asked again", func() bool { return i.requests("/introspect") >= before+4 })
	for user, end := range running {
		select {
		case err := <-end:
			t.Fatalf("%s's call ended: %v", user, err)
		default:
		}
	}
	i.set(func() { i.opaque["opaque-ann"] = nil })
	if err := within(t, "ann's call is cut", running["ann"]); err == nil || !strings.Contains(err.Error(), "not active") && !strings.Contains(err.Error(), "Unauthorized") {
		t.Errorf("ann's call: %v", err)
	}
	if who := within(t, "the tool is cancelled", x.ended); who != "ann" {
		t.Errorf("%s's call was cancelled", who)
	}
	before = i.requests("/introspect")
	eventually(t, "the issuer is asked on", func() bool { return i.requests("/introspect") >= before+2 })
	select {
	case err := <-running["bob"]:
		t.Errorf("bob's call ended: %v", err)
	default:
	}
}
