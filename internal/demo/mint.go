package demo

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"fmt"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	"github.com/interlock-fabric/interlock/pkg/credential"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// The names of the demo's world.
const (
	issuer   = "https://id.demo.example"
	resource = "https://tools.demo.example/mcp"
	tenant   = "default"
)

// mint is the demo's token issuer.
type mint struct {
	key    *ecdsa.PrivateKey
	signer jose.Signer
}

func newMint() (*mint, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	signer, err := jose.NewSigner(
		jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: key, KeyID: "demo"}},
		(&jose.SignerOptions{}).WithType("at+jwt"))
	if err != nil {
		return nil, err
	}
	return &mint{key: key, signer: signer}, nil
}

func (m *mint) verifier() (*credential.Verifier, error) {
	return credential.New(credential.Options{
		Audiences: []string{resource},
		Issuers: []credential.Issuer{{
			URL: issuer, Tenant: tenant,
			Keys: jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: m.key.Public(), KeyID: "demo", Algorithm: string(jose.ES256), Use: "sig"}}},
		}},
	})
}

// caller mints a token for a session of a user, with a delegation chain, the
// current actor first.
func (m *mint) caller(user, sid string, actors ...string) func() (string, error) {
	return m.child(user, sid, "", actors...)
}

// child does the same for a session that descends from another.
func (m *mint) child(user, sid, parent string, actors ...string) func() (string, error) {
	return func() (string, error) {
		now := time.Now()
		claims := map[string]any{
			"iss": issuer, "sub": user, "aud": resource, "sid": sid, "jti": rand.Text(), "client_id": "demo-client",
			"iat": now.Unix(), "auth_time": now.Unix(), "exp": now.Add(time.Hour).Unix(),
		}
		if parent != "" {
			claims["session_ancestors"] = []string{parent}
		}
		var act map[string]any
		for i := len(actors) - 1; i >= 0; i-- {
			next := map[string]any{"sub": actors[i]}
			if act != nil {
				next["act"] = act
			}
			act = next
		}
		if act != nil {
			claims["act"] = act
		}
		token, err := jwt.Signed(m.signer).Claims(claims).Serialize()
		if err != nil {
			return "", fmt.Errorf("sign a token: %w", err)
		}
		return token, nil
	}
}

// identity is what the verifier makes of such a token, for enforcers that are
// asked without a host around them.
func identity(user, sid string) session.Identity {
	return session.Identity{
		Tenant: tenant, Issuer: issuer, User: user, Session: session.SessionRef{ID: sid},
		Client: "demo-client", Token: sid + "-token", Expires: time.Now().Add(time.Hour),
	}
}
