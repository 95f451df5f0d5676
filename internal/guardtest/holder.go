package guardtest

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"maps"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
)

// Holder has a key that tokens are bound to (RFC 9449).
type Holder struct {
	// Thumbprint is that of the key, as in cnf.jkt.
	Thumbprint string

	t      testing.TB
	signer jose.Signer
}

// NewHolder returns a holder of a new key.
func NewHolder(t testing.TB) *Holder {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: key}, (&jose.SignerOptions{EmbedJWK: true}).WithType("dpop+jwt"))
	if err != nil {
		t.Fatal(err)
	}
	sum, err := (&jose.JSONWebKey{Key: key.Public()}).Thumbprint(crypto.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	return &Holder{base64.RawURLEncoding.EncodeToString(sum), t, signer}
}

// Bind binds the token with these claims to the key.
func (h *Holder) Bind(claims map[string]any) {
	claims["cnf"] = map[string]any{"jkt": h.Thumbprint}
}

// Proof is a good one for a request with a token, but for the claims that are
// changed.
func (h *Holder) Proof(method, url, token string, change map[string]any) string {
	h.t.Helper()
	sum := sha256.Sum256([]byte(token))
	claims := map[string]any{
		"jti": rand.Text(), "htm": method, "htu": url, "iat": time.Now().Unix(), "ath": base64.RawURLEncoding.EncodeToString(sum[:]),
	}
	maps.Copy(claims, change)
	proof, err := jwt.Signed(h.signer).Claims(claims).Serialize()
	if err != nil {
		h.t.Error(err) // perhaps in a client's goroutine
	}
	return proof
}
