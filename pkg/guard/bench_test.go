package guard_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	"github.com/interlock-fabric/interlock/internal/guardtest"
	"github.com/interlock-fabric/interlock/pkg/credential"
	"github.com/interlock-fabric/interlock/pkg/guard"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// BenchmarkAdmit is what a request costs a host before its own work, with a real
// enforcer: its token seen before, or not.
//
// Run with: go test -run '^$' -bench . ./pkg/guard
func BenchmarkAdmit(b *testing.B) {
	f := guardtest.Open(b, time.Hour)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		b.Fatal(err)
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: key}, (&jose.SignerOptions{}).WithType("at+jwt"))
	if err != nil {
		b.Fatal(err)
	}
	token, err := jwt.Signed(signer).Claims(map[string]any{
		"iss": guardtest.Issuer, "sub": "ann", "aud": guardtest.Audience, "sid": "s-ann", "jti": rand.Text(), "client_id": "cli",
		"act": map[string]any{"sub": "agent-2", "act": map[string]any{"sub": "agent-1"}}, "session_ancestors": []string{"s0", "r0"},
		"iat": time.Now().Unix(), "exp": time.Now().Add(time.Hour).Unix(),
	}).Serialize()
	if err != nil {
		b.Fatal(err)
	}
	r := httptest.NewRequest(http.MethodPost, "/", nil)
	r.Header.Set("Authorization", "Bearer "+token)
	call := session.Call{Tool: "read", Audience: guardtest.Audience}
	var unseen float64
	for _, c := range []struct {
		name  string
		bytes int64
	}{{"unseen", -1}, {"seen", 0}} {
		b.Run(c.name, func(b *testing.B) {
			v, err := credential.New(credential.Options{
				Audiences: []string{guardtest.Audience}, CacheBytes: c.bytes,
				Issuers: []credential.Issuer{{
					URL: guardtest.Issuer, Tenant: guardtest.Tenant,
					Keys: jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: key.Public(), KeyID: "k1"}}},
				}},
			})
			if err != nil {
				b.Fatal(err)
			}
			defer v.Close()
			admit := func() {
				if _, _, err := guard.Admit(f.Enforcer, v, r, call, nil); err != nil {
					b.Fatal(err)
				}
			}
			for c.bytes >= 0 && v.CacheStats().Hits == 0 {
				admit() // the cache takes it up beside us
			}
			b.ReportAllocs()
			for b.Loop() {
				admit()
			}
			ns := float64(b.Elapsed()) / float64(b.N)
			if c.bytes < 0 {
				unseen = ns
			} else {
				b.ReportMetric(unseen/ns, "times-cheaper")
			}
		})
	}
}
