package session

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

// reference is the derivation of docs/design/wire.md, in the plainest words.
func reference(key []byte, msg []byte) (d Digest) {
	h := hmac.New(sha256.New, key)
	h.Write(msg)
	copy(d[:], h.Sum(nil))
	return d
}

func referenceValue(key []byte, kind Kind, issuer, value string) Digest {
	msg := append([]byte("iv1"), byte(kind))
	msg = binary.BigEndian.AppendUint16(msg, uint16(len(issuer)))
	msg = append(msg, issuer...)
	msg = binary.BigEndian.AppendUint16(msg, uint16(len(value)))
	msg = append(msg, value...)
	return reference(key, msg)
}

func TestMACIsHMACSHA256(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		key := rapid.SliceOfN(rapid.Byte(), secretLen, secretLen).Draw(t, "key")
		msg := rapid.SliceOfN(rapid.Byte(), 0, maxDigestInput).Draw(t, "msg")
		s, err := NewTenantSecret(7, "acme", key)
		if err != nil {
			t.Fatal(err)
		}
		if got, want := s.mac(msg), reference(key, msg); got != want {
			t.Fatalf("mac of %d bytes is %x, want %x", len(msg), got, want)
		}
	})
}

func TestTheLongestValueIsHashedWhole(t *testing.T) {
	s := testSecret(t, 7, "acme")
	issuer, value := strings.Repeat("i", MaxValueLen), strings.Repeat("v", MaxValueLen)
	k := mustKey(t, s, Term{Kind: KindUser, Issuer: issuer, Value: value})
	if want := referenceValue(bytes.Repeat([]byte{7}, secretLen), KindUser, issuer, value); k.Digest != want {
		t.Errorf("digest %x, want %x", k.Digest, want)
	}
	other := mustKey(t, s, Term{Kind: KindUser, Issuer: issuer, Value: value[1:] + "w"})
	if other == k {
		t.Error("two values have one key")
	}
}

func TestKeysOfTargets(t *testing.T) {
	raw := bytes.Repeat([]byte{7}, secretLen)
	s := testSecret(t, 7, "acme")
	user := Term{Kind: KindUser, Issuer: testIssuer, Value: "alice"}
	agent := Term{Kind: KindAgent, Value: "SPIFFE://Prod.example/bot"}
	du := referenceValue(raw, KindUser, testIssuer, "alice")
	da := referenceValue(raw, KindAgent, "", "spiffe://prod.example/bot")
	join := reference(raw, append(append([]byte("ic1\x20"), du[:]...), da[:]...))
	tests := []struct {
		name  string
		terms []Term
		want  Key
	}{
		{"one value", []Term{user}, Key{7, Shape(KindUser), du}},
		{"a URI has no issuer", []Term{{Kind: KindAgent, Issuer: "https://anybody.example", Value: agent.Value}}, Key{7, Shape(KindAgent), da}},
		{"a conjunction", []Term{user, agent}, Key{7, ShapeUserAgent, join}},
		{"a conjunction the other way round", []Term{agent, user}, Key{7, ShapeUserAgent, join}},
		{"the tenant", []Term{{Kind: KindTenant}}, Key{7, Shape(KindTenant), Digest{}}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got := mustKey(t, s, tt.terms...)
			if got != tt.want {
				t.Errorf("key %+v, want %+v", got, tt.want)
			}
			if err := got.Valid(); err != nil {
				t.Error(err)
			}
		})
	}
	if k, err := s.Key(Target{Terms: []Term{{Kind: KindGlobal}}}); err != nil || k != GlobalKey() || k.Valid() != nil {
		t.Errorf("global: %v, %v", k, err)
	}
	if _, err := s.Key(Target{Tenant: "other", Terms: []Term{user}}); !errors.Is(err, ErrInvalid) {
		t.Errorf("a target of another tenant: %v", err)
	}
	if _, err := s.Key(Target{Tenant: "acme", Terms: []Term{{Kind: KindUser}}}); !errors.Is(err, ErrInvalid) {
		t.Errorf("a target that is invalid: %v", err)
	}
	var zero TenantSecret
	if _, err := zero.Key(Target{Tenant: "acme", Terms: []Term{user}}); !errors.Is(err, ErrInvalid) {
		t.Errorf("the zero secret derived a key: %v", err)
	}
}

// Where a value ends must not be something that a value can say.
func TestIssuerAndValueDoNotRunIntoEachOther(t *testing.T) {
	s := testSecret(t, 7, "acme")
	seen := map[Digest]string{}
	for _, pair := range [][2]string{{"ab", "c"}, {"a", "bc"}, {"abc", "\x00"}, {"ab\x00", "c"}, {"", "abc"}} {
		for _, kind := range []Kind{KindUser, KindSession} {
			d := s.valueDigest(kind, pair[0], pair[1])
			name := fmt.Sprintf("%s %q", kind, pair)
			if have, ok := seen[d]; ok {
				t.Errorf("%s and %s have one digest", have, name)
			}
			seen[d] = name
		}
	}
}

func TestKeysThatNoTargetHas(t *testing.T) {
	d := Digest{1}
	for name, tt := range map[string]struct {
		key  Key
		want error
	}{
		"zero":                   {Key{}, ErrCritical},
		"an unknown shape":       {Key{1, 18, d}, ErrCritical},
		"a later conjunction":    {Key{1, 40, d}, ErrCritical},
		"global with a tenant":   {Key{1, Shape(KindGlobal), Digest{}}, ErrMalformed},
		"global with a digest":   {Key{0, Shape(KindGlobal), d}, ErrMalformed},
		"tenant with a digest":   {Key{1, Shape(KindTenant), d}, ErrMalformed},
		"tenant zero":            {Key{0, Shape(KindTenant), Digest{}}, ErrMalformed},
		"user without digest":    {Key{1, Shape(KindUser), Digest{}}, ErrMalformed},
		"user without tenant":    {Key{0, Shape(KindUser), d}, ErrMalformed},
		"conjunction, no digest": {Key{1, ShapeUserAgent, Digest{}}, ErrMalformed},
	} {
		if err := tt.key.Valid(); !errors.Is(err, tt.want) || !errors.Is(err, ErrFrame) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestNewTenantSecretRefuses(t *testing.T) {
	key := make([]byte, secretLen)
	for name, err := range map[string]error{
		"tenant zero": second(NewTenantSecret(0, "acme", key)),
		"a bad name":  second(NewTenantSecret(1, "Acme", key)),
		"no name":     second(NewTenantSecret(1, "", key)),
		"a short key": second(NewTenantSecret(1, "acme", key[1:])),
		"a long key":  second(NewTenantSecret(1, "acme", append(key, 0))),
	} {
		if !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func second[T any](_ T, err error) error { return err }

func TestATenantSecretDoesNotPrint(t *testing.T) {
	key := []byte("0123456789abcdef0123456789abcdef")
	s, err := NewTenantSecret(7, "acme", key)
	if err != nil {
		t.Fatal(err)
	}
	inner := fmt.Sprint(s.inner[:4])
	inner = inner[1 : len(inner)-1]
	// As %#v shows bytes. A pointer may begin with any of them, so one byte
	// alone says nothing.
	hexed := fmt.Sprintf("%#v", s.inner[:4])
	hexed = hexed[len("[]byte{") : len(hexed)-1]
	js, err := json.Marshal(struct{ S *TenantSecret }{s})
	if err != nil {
		t.Fatal(err)
	}
	p := mustPrepare(t, s, Identity{Issuer: testIssuer, User: "alice"})
	for _, out := range []string{
		fmt.Sprint(s), fmt.Sprintf("%v %+v %#v %s", s, s, s, s), fmt.Sprintf("%v %+v %#v", *s, *s, *s),
		fmt.Sprintf("%+v", struct{ S TenantSecret }{*s}), fmt.Sprintf("%+v %#v", p, p), string(js),
	} {
		if strings.Contains(out, "01234567") || strings.Contains(out, inner) || strings.Contains(out, hexed) || strings.Contains(out, "0x30, 0x31") {
			t.Errorf("the key shows in %q", out)
		}
	}
}

func TestAKeyDoesNotShowItsWholeDigest(t *testing.T) {
	k := Key{7, Shape(KindUser), Digest{1, 2, 3, 4, 5, 6}}
	if got := k.String(); got != "7/user/01020304" {
		t.Errorf("String = %q", got)
	}
}

func TestTokenValue(t *testing.T) {
	if got := TokenValue("jti-1", []byte("a.b")); got != "jti-1" {
		t.Errorf("with a jti: %q", got)
	}
	if got := TokenValue("", []byte("")); got != "sha256:47DEQpj8HBSa-_TImW-5JCeuQeRkm5NMpJWZG3hSuFU" {
		t.Errorf("without a jti: %q", got)
	}
}
