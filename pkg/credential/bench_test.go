package credential_test

import (
	"crypto/ed25519"
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"net/http"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/interlock-fabric/interlock/pkg/credential"
	"github.com/interlock-fabric/interlock/pkg/filter"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// Run with: go test -run '^$' -bench . ./pkg/credential

// state is a revocation state with n entries in force of each kind that the
// benchmark's tokens carry, none of which they match.
func state(secret *session.TenantSecret, n int) *filter.Set {
	set := new(filter.Set)
	var number uint64
	for _, kind := range []session.Kind{session.KindToken, session.KindSession, session.KindUser, session.KindAgent, session.KindClient} {
		for i := 0; i < n; i += session.MaxBatchEntries {
			number++
			b := &session.Batch{Number: number}
			for j := i; j < min(n, i+session.MaxBatchEntries); j++ {
				k := session.Key{Tenant: secret.ID(), Shape: session.Shape(kind)}
				binary.BigEndian.PutUint64(k.Digest[:], uint64(j+1)*0x9E3779B97F4A7C15)
				b.Entries = append(b.Entries, session.Entry{Op: session.OpSet, Effect: session.EffectRevoked, Reason: session.ReasonStolenToken, Key: k})
			}
			set = set.Apply(b, func(*session.Entry) bool { return true })
		}
	}
	return set
}

// BenchmarkRequest is what a request costs: its token seen before (hash, cache,
// check), or not (signature, claims, keys, check).
func BenchmarkRequest(b *testing.B) {
	by := secret(b, 1, "acme", 'a')
	set := state(by, 20_000)
	_, edKey, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		b.Fatal(err)
	}
	for _, c := range []struct {
		alg jose.SignatureAlgorithm
		key any
	}{{jose.ES256, newSigner(b).key}, {jose.EdDSA, edKey}, {jose.RS256, newRSA(b, 2048)}} {
		s := newSigner(b)
		s.alg, s.key = c.alg, c.key
		token := s.sign(claims(map[string]any{
			"iat": time.Now().Unix(), "exp": time.Now().Add(time.Hour).Unix(), "client_id": "cli", "scope": "tools.use",
			"session_ancestors": []string{"s0", "r0"}, "act": map[string]any{"sub": "agent-2", "act": map[string]any{"sub": "agent-1"}},
		}))
		var unseen float64
		run := func(name string, cache int64) (ns float64) {
			b.Run(fmt.Sprintf("%s/%s", c.alg, name), func(b *testing.B) {
				v := newVerifier(b, []jose.JSONWebKey{s.public()}, func(o *credential.Options) { o.Clock, o.CacheBytes = nil, cache })
				r := request(token)
				if cache >= 0 {
					seen(b, v, token)
				}
				b.ReportAllocs()
				for b.Loop() {
					admit(b, v, r, by, set)
				}
				ns = float64(b.Elapsed()) / float64(b.N)
				if cache >= 0 {
					b.ReportMetric(unseen/ns, "times-cheaper")
				}
			})
			return ns
		}
		b.Run(fmt.Sprintf("%s/signature alone", c.alg), func(b *testing.B) {
			jws, err := jose.ParseSignedCompact(token, []jose.SignatureAlgorithm{c.alg})
			if err != nil {
				b.Fatal(err)
			}
			key := s.public().Key
			for b.Loop() {
				if _, err := jws.Verify(key); err != nil {
					b.Fatal(err)
				}
			}
		})
		unseen = run("unseen", -1)
		run("seen", 0)
		b.Run(fmt.Sprintf("%s/seen, parallel", c.alg), func(b *testing.B) {
			v := newVerifier(b, []jose.JSONWebKey{s.public()}, func(o *credential.Options) { o.Clock = nil })
			seen(b, v, token)
			b.ReportAllocs()
			b.RunParallel(func(pb *testing.PB) {
				r := request(token)
				for pb.Next() {
					admit(b, v, r, by, set)
				}
			})
		})
	}
}

func admit(b *testing.B, v *credential.Verifier, r *http.Request, by credential.Preparer, set *filter.Set) {
	p, err := v.PrepareRequest(r, by)
	if err != nil {
		b.Error(err)
		return
	}
	// What an enforcer's Check comes down to.
	now := session.InstantOf(time.Now())
	call := session.Call{Tool: "read", Audience: audience}
	m, err := set.Decide(p, &call, session.Moment{Authority: now})
	if err != nil || m.Record != nil || now >= p.Expires() {
		b.Error("denied")
	}
}
