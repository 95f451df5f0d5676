package session

import (
	"bytes"
	"crypto"
	"crypto/ed25519"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// noHash makes ed25519.PrivateKey.Sign sign the message itself.
const noHash = crypto.Hash(0)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// testKey returns a signing key that is the same in every run.
func testKey(n byte) ed25519.PrivateKey {
	return ed25519.NewKeyFromSeed(bytes.Repeat([]byte{n}, ed25519.SeedSize))
}

func testPublic(n byte) ed25519.PublicKey { return testKey(n).Public().(ed25519.PublicKey) }

func testSecret(t testing.TB, id TenantID, name string) *TenantSecret {
	t.Helper()
	s, err := NewTenantSecret(id, name, bytes.Repeat([]byte{byte(id)}, secretLen))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func mustKey(t testing.TB, s *TenantSecret, terms ...Term) Key {
	t.Helper()
	k, err := s.Key(Target{Tenant: s.Name(), Terms: terms})
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func mustPrepare(t testing.TB, s *TenantSecret, id Identity) *Prepared {
	t.Helper()
	id.Tenant = s.Name()
	p, err := s.Prepare(id)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

var testTime = time.Date(2026, 11, 2, 9, 0, 0, 0, time.UTC)

const testIssuer = "https://idp.example"
