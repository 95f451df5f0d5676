package main

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"fmt"
	"net/http"
	"path/filepath"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	"github.com/interlock-fabric/interlock/pkg/credential"
	"github.com/interlock-fabric/interlock/pkg/enforce"
	"github.com/interlock-fabric/interlock/pkg/session"
)

const audience = "https://tools.example/mcp"

// token measures a request whose token has been seen before (hash, cache, check)
// against the verification of its signature, and against a request whose token
// has not.
func token(b *bench, n int) (err error) {
	w, _, err := b.revokedWorld(n)
	if err != nil {
		return err
	}
	defer w.close()
	e, err := w.open(b.ctx, filepath.Join(b.dir, "enforcer"))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, e.Close()) }()

	_, ed, err := ed25519.GenerateKey(nil)
	if err != nil {
		return err
	}
	ec, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	rs, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return err
	}
	for _, x := range []struct {
		alg jose.SignatureAlgorithm
		key crypto.Signer
	}{{jose.ES256, ec}, {jose.EdDSA, ed}, {jose.RS256, rs}} {
		if err := b.tokens(n, e, x.alg, x.key); err != nil {
			return fmt.Errorf("%s: %w", x.alg, err)
		}
	}
	return nil
}

// tokens measures with tokens of one algorithm, each of an identity of its own.
func (b *bench) tokens(n int, e *enforce.Enforcer, alg jose.SignatureAlgorithm, key crypto.Signer) error {
	const many = 1 << 10
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: alg, Key: jose.JSONWebKey{Key: key, KeyID: "k1"}},
		(&jose.SignerOptions{}).WithType("at+jwt"))
	if err != nil {
		return err
	}
	requests, signed := make([]*http.Request, many), make([]*jose.JSONWebSignature, many)
	for i := range many {
		compact, err := jwt.Signed(signer).Claims(claimsOf(fmt.Sprint(alg, i))).Serialize()
		if err != nil {
			return err
		}
		requests[i] = &http.Request{Header: http.Header{"Authorization": {"Bearer " + compact}}}
		if signed[i], err = jose.ParseSignedCompact(compact, []jose.SignatureAlgorithm{alg}); err != nil {
			return err
		}
	}
	verifier := func(cache int64) (*credential.Verifier, error) {
		return credential.New(credential.Options{
			Audiences: []string{audience}, CacheBytes: cache,
			Issuers: []credential.Issuer{{
				URL: issuer, Tenant: tenant, Algorithms: []jose.SignatureAlgorithm{alg},
				Keys: jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: key.Public(), KeyID: "k1"}}},
			}},
		})
	}
	cold, err := verifier(-1)
	if err != nil {
		return err
	}
	defer cold.Close()
	warm, err := verifier(0)
	if err != nil {
		return err
	}
	defer warm.Close()
	var wrong error
	admit := func(v *credential.Verifier) func(int) {
		return func(i int) {
			p, err := v.PrepareRequest(requests[i&(many-1)], e)
			if err == nil {
				err = e.Check(p, session.Call{})
			}
			if err != nil {
				wrong = err
			}
		}
	}
	// The cache takes tokens up in its own time.
	for limit := time.Now().Add(10 * time.Second); ; {
		before := warm.CacheStats().Misses
		for i := range many {
			admit(warm)(i)
		}
		if warm.CacheStats().Misses == before {
			break
		}
		if time.Now().After(limit) {
			return errors.New("the cache does not keep the tokens")
		}
	}
	few, lots := pick(b, 1<<12, 1<<8), pick(b, 1<<19, 1<<12)
	alone := perOp(few, func(i int) {
		if _, err := signed[i&(many-1)].Verify(key.Public()); err != nil {
			wrong = err
		}
	})
	unseen := perOp(few, admit(cold))
	seen := perOp(lots, admit(warm))
	if wrong != nil {
		return wrong
	}
	name := string(alg) + ": "
	b.report.add(name+"verifying the signature alone", n, alone, "ns", "")
	b.report.add(name+"request with an unseen token", n, unseen, "ns", "")
	b.report.add(name+"request with a cached token", n, seen, "ns", "")
	b.report.add(name+"the signature alone to a request with a cached token", n, alone/seen, "×", "≥ 40 ×")
	b.report.add(name+"request with an unseen token to one with a cached", n, unseen/seen, "×", "")
	return nil
}

// claimsOf are claims of an identity of eight keys.
func claimsOf(name string) map[string]any {
	now := time.Now()
	return map[string]any{
		"iss": issuer, "aud": audience, "iat": now.Unix(), "exp": now.Add(time.Hour).Unix(), "scope": "tools.use",
		"jti": "t" + name, "sub": "u" + name, "sid": "s" + name, "session_ancestors": []string{"p" + name, "q" + name}, "client_id": "c" + name,
		"act": map[string]any{"sub": "a" + name, "act": map[string]any{"sub": "b" + name}},
	}
}
