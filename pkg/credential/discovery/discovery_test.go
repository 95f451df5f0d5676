package discovery_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"go.uber.org/goleak"

	"github.com/interlock-fabric/interlock/pkg/credential"
	"github.com/interlock-fabric/interlock/pkg/credential/discovery"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const audience = "https://tools.example/mcp"

// issuer is a real OpenID provider's outside: metadata and keys.
type issuer struct {
	*httptest.Server
	metadata, fetches atomic.Int64
	mu                sync.Mutex
	keys              map[string]*ecdsa.PrivateKey // by kid
	path              string                       // of the JWKS
	says              map[string]any               // in the metadata, instead
}

func newIssuer(t *testing.T, kids ...string) *issuer {
	i := &issuer{}
	i.rotate(t, "/jwks", kids...)
	i.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		i.mu.Lock()
		defer i.mu.Unlock()
		w.Header().Set("Content-Type", "application/json")
		switch r.URL.Path {
		case "/.well-known/openid-configuration":
			i.metadata.Add(1)
			doc := map[string]any{"issuer": i.URL, "jwks_uri": i.URL + i.path}
			for k, v := range i.says {
				doc[k] = v
			}
			_ = json.NewEncoder(w).Encode(doc)
		case i.path:
			i.fetches.Add(1)
			set := jose.JSONWebKeySet{Keys: []jose.JSONWebKey{}}
			for kid, k := range i.keys {
				set.Keys = append(set.Keys, jose.JSONWebKey{Key: k.Public(), KeyID: kid})
			}
			_ = json.NewEncoder(w).Encode(set)
		default:
			http.NotFound(w, r)
		}
	}))
	t.Cleanup(i.Close)
	return i
}

func (i *issuer) rotate(t *testing.T, path string, kids ...string) {
	t.Helper()
	i.mu.Lock()
	defer i.mu.Unlock()
	i.path, i.keys = path, make(map[string]*ecdsa.PrivateKey)
	for _, kid := range kids {
		k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		i.keys[kid] = k
	}
}

func (i *issuer) say(name string, value any) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.says = map[string]any{name: value}
}

// token is signed by kid, under the name of as.
func (i *issuer) token(t *testing.T, kid, as string) string {
	t.Helper()
	i.mu.Lock()
	key := i.keys[kid]
	i.mu.Unlock()
	signer, err := jose.NewSigner(
		jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: key, KeyID: as}}, (&jose.SignerOptions{}).WithType("at+jwt"))
	if err != nil {
		t.Fatal(err)
	}
	token, err := jwt.Signed(signer).Claims(map[string]any{
		"iss": i.URL, "sub": "ann", "aud": audience, "jti": rand.Text(), "exp": time.Now().Add(10 * time.Hour).Unix(),
	}).Serialize()
	if err != nil {
		t.Fatal(err)
	}
	return token
}

// clock runs ahead of the real one by what a test says.
type clock struct{ ahead atomic.Int64 }

func (c *clock) now() time.Time { return time.Now().Add(time.Duration(c.ahead.Load())) }

func (c *clock) advance(d time.Duration) { c.ahead.Add(int64(d)) }

func (i *issuer) verifier(t *testing.T, c *clock) *credential.Verifier {
	t.Helper()
	v, err := credential.New(credential.Options{
		Audiences: []string{audience}, Clock: c.now,
		Issuers: []credential.Issuer{{URL: i.URL, Tenant: "acme", Discover: discovery.OpenID}},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(v.Close)
	return v
}

func verify(t *testing.T, v *credential.Verifier, token string, want error) {
	t.Helper()
	if id, err := v.Verify(t.Context(), token); !errors.Is(err, want) || err == nil && id.User != "ann" {
		t.Fatalf("%+v, %v; want %v", id, err, want)
	}
}

func TestKeysAreFoundAndRotate(t *testing.T) {
	i, c := newIssuer(t, "k1"), new(clock)
	v := i.verifier(t, c)
	old := i.token(t, "k1", "k1")
	verify(t, v, old, nil)
	verify(t, v, old, nil)
	if m, f := i.metadata.Load(), i.fetches.Load(); m != 1 || f != 1 {
		t.Fatalf("%d fetches of metadata, %d of keys", m, f)
	}
	// The keys are others, and elsewhere.
	i.rotate(t, "/new", "k2")
	fresh := i.token(t, "k2", "k2")
	verify(t, v, fresh, credential.ErrTokenKey)
	c.advance(15 * time.Second)
	verify(t, v, fresh, nil)
	// What the old key signed is no longer good, seen or not.
	verify(t, v, old, credential.ErrTokenKey)
}

// Whoever invents key ids has the issuer asked once, all of them together.
func TestFloodOfUnknownKeysDoesNotHammerTheIssuer(t *testing.T) {
	i, c := newIssuer(t, "k1"), new(clock)
	v := i.verifier(t, c)
	verify(t, v, i.token(t, "k1", "k1"), nil)
	c.advance(15 * time.Second)
	before := i.fetches.Load()
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			for n := range 50 {
				if _, err := v.Verify(t.Context(), i.token(t, "k1", fmt.Sprint("invented-", w, "-", n))); !errors.Is(err, credential.ErrTokenKey) {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if n := i.fetches.Load() - before; n != 1 {
		t.Fatalf("%d fetches", n)
	}
	verify(t, v, i.token(t, "k1", "k1"), nil)
}

// The connection is really cut: keys serve until their stated age and no longer.
func TestUnreachableIssuerVouchesUntilItsKeysAreTooOld(t *testing.T) {
	i, c := newIssuer(t, "k1"), new(clock)
	v := i.verifier(t, c)
	seen, unseen := i.token(t, "k1", "k1"), i.token(t, "k1", "k1")
	verify(t, v, seen, nil)
	i.CloseClientConnections()
	i.Close()
	c.advance(59 * time.Minute)
	verify(t, v, seen, nil)
	verify(t, v, unseen, nil)
	c.advance(time.Minute)
	verify(t, v, seen, credential.ErrTokenKeys)
	verify(t, v, unseen, credential.ErrTokenKeys)
}

func TestHostileMetadataIsRefused(t *testing.T) {
	for name, say := range map[string]struct {
		member string
		value  any
	}{
		"another issuer":   {"issuer", "https://id.example"},
		"no JWKS":          {"jwks_uri", ""},
		"JWKS in clear":    {"jwks_uri", "http://id.example/jwks"},
		"JWKS with a user": {"jwks_uri", "http://a:b@HOST/jwks"}, // which is there
		"JWKS not a text":  {"jwks_uri", 7},
		"too long":         {"padding", strings.Repeat("a", 300<<10)},
	} {
		t.Run(name, func(t *testing.T) {
			i, c := newIssuer(t, "k1"), new(clock)
			if s, ok := say.value.(string); ok {
				say.value = strings.Replace(s, "HOST", i.Listener.Addr().String(), 1)
			}
			i.say(say.member, say.value)
			v := i.verifier(t, c)
			token := i.token(t, "k1", "k1")
			verify(t, v, token, credential.ErrTokenKeys)
			if i.fetches.Load() != 0 {
				t.Fatal("its keys were fetched")
			}
			i.say("issuer", i.URL)
			c.advance(15 * time.Second)
			verify(t, v, token, nil)
		})
	}
}
