// Package guardtest gives the tests of the adapters a fabric of their own: a real
// authority with its bus, a real enforcer that follows it, and an issuer whose
// tokens a real verifier accepts.
package guardtest

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	service "github.com/interlock-fabric/interlock/internal/authority"
	"github.com/interlock-fabric/interlock/internal/enrolled"
	"github.com/interlock-fabric/interlock/pkg/authority"
	"github.com/interlock-fabric/interlock/pkg/credential"
	"github.com/interlock-fabric/interlock/pkg/enforce"
	"github.com/interlock-fabric/interlock/pkg/session"
)

const (
	// Issuer signs the tokens.
	Issuer = "https://id.example"
	// Tenant is the one that it belongs to.
	Tenant = "default"
	// Audience is the resource that tokens are for.
	Audience = "https://agent.example/a2a"
)

// Patience is how long a test waits for what must happen.
const Patience = 30 * time.Second

// Fabric is one of each.
type Fabric struct {
	Enforcer *enforce.Enforcer
	Verifier *credential.Verifier
	service  *service.Authority
	client   *authority.Client
	signer   jose.Signer
	stop     func()
}

// Open starts a fabric that ends with the test. maxStale is the enforcer's bound,
// zero the default.
func Open(t testing.TB, maxStale time.Duration) *Fabric {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	f := &Fabric{}
	ctx, cancel := context.WithTimeout(context.Background(), Patience)
	defer cancel()
	var err error
	f.service, err = service.Open(ctx, service.Options{DataDir: t.TempDir(), NATSListen: "127.0.0.1:0"})
	must(err)
	f.stop = sync.OnceFunc(func() {
		if err := f.service.Close(); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(f.stop)
	f.client, err = authority.New(authority.Options{Socket: f.service.Socket()})
	must(err)
	t.Cleanup(f.client.Close)
	f.Enforcer, err = enrolled.Open(ctx, f.client, "test", enforce.Options{MaxStale: maxStale})
	must(err)
	t.Cleanup(func() {
		if n := f.Enforcer.Status().Running; n != 0 {
			t.Errorf("%d bindings were never released", n)
		}
		if err := f.Enforcer.Close(); err != nil {
			t.Error(err)
		}
	})
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(err)
	f.signer, err = jose.NewSigner(
		jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: key, KeyID: "k1"}}, (&jose.SignerOptions{}).WithType("at+jwt"))
	must(err)
	f.Verifier, err = credential.New(credential.Options{
		Audiences: []string{Audience},
		Issuers: []credential.Issuer{{
			URL: Issuer, Tenant: Tenant, Skew: time.Millisecond,
			Keys: jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: key.Public(), KeyID: "k1", Algorithm: "ES256", Use: "sig"}}},
		}},
	})
	must(err)
	t.Cleanup(f.Verifier.Close)
	return f
}

// Stop takes the authority and its bus away.
func (f *Fabric) Stop() { f.stop() }

// Token signs claims for a user and a session, with whatever is to be different.
func (f *Fabric) Token(t testing.TB, user, sid string, change ...func(map[string]any)) string {
	t.Helper()
	now := time.Now()
	claims := map[string]any{
		"iss": Issuer, "sub": user, "aud": Audience, "sid": sid, "jti": rand.Text(),
		"client_id": "cli", "iat": now.Unix(), "auth_time": now.Unix(), "exp": now.Add(time.Hour).Unix(),
	}
	for _, c := range change {
		c(claims)
	}
	token, err := jwt.Signed(f.signer).Claims(claims).Serialize()
	if err != nil {
		t.Fatal(err)
	}
	return token
}

// Identity is what the verifier makes of a token for a user and a session.
func (f *Fabric) Identity(t testing.TB, user, sid string, change ...func(map[string]any)) session.Identity {
	t.Helper()
	id, err := f.Verifier.Verify(t.Context(), f.Token(t, user, sid, change...))
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// Decide decides, and returns once the enforcer has applied it.
func (f *Fabric) Decide(t testing.TB, r authority.Request) {
	t.Helper()
	r.Commit = true
	ctx, cancel := context.WithTimeout(context.Background(), Patience)
	defer cancel()
	d, err := f.client.Decide(ctx, r)
	if err != nil {
		t.Fatal(err)
	}
	// What lifts takes effect when it is confirmed, not when it is heard.
	Eventually(t, "the decision is in force", func() bool {
		s := f.Enforcer.Status()
		return s.Applied >= d.Number && (!r.Operation.Lifts() || s.Confirmed >= d.Number)
	})
}

// On decides on one value of a kind, of Issuer where the kind is an issuer's.
func (f *Fabric) On(t testing.TB, op authority.Operation, kind, value string) {
	t.Helper()
	iss := Issuer
	if kind == "tool" || kind == "audience" || kind == "agent" {
		iss = ""
	}
	f.Decide(t, authority.Request{
		Operation: op, Targets: []authority.Target{authority.One("", kind, iss, value)}, Reason: "stolen-token", Incident: "INC-142",
	})
}

// Eventually waits for a condition.
func Eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	deadline := time.After(Patience)
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("never: %s", what)
		}
	}
}

// Within returns what a channel brings.
func Within[T any](t testing.TB, what string, ch <-chan T) T {
	t.Helper()
	select {
	case v := <-ch:
		return v
	case <-time.After(Patience):
		t.Fatalf("never: %s", what)
		panic("unreachable")
	}
}

// DeniedAs fails unless err is a denial with this sentinel.
func DeniedAs(t testing.TB, err, sentinel error) {
	t.Helper()
	var d *session.DeniedError
	if !errors.As(err, &d) || !errors.Is(err, sentinel) {
		t.Fatalf("got %v, want %v", err, sentinel)
	}
}

// CallMetadata is what each call of a gRPC client carries, over plain text too.
type CallMetadata func() map[string]string

// GetRequestMetadata implements credentials.PerRPCCredentials.
func (m CallMetadata) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	return m(), nil
}

// RequireTransportSecurity implements credentials.PerRPCCredentials.
func (m CallMetadata) RequireTransportSecurity() bool { return false }
