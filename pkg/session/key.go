package session

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"fmt"
)

// TenantID numbers a tenant within a deployment; the root-signed KeySet maps
// numbers to names and never reuses one. Zero is the fabric itself: the tenant
// of global entries.
type TenantID uint32

// Digest is a 128-bit keyed digest of a canonical value: HMAC-SHA-256 under the
// tenant's key, truncated (RFC 2104 §5). It is all that the wire and the state
// know of a value.
type Digest [16]byte

// Key is what an entry is about, as the wire and the state carry it. Two keys
// of different tenants never match, whatever their digests. It is comparable.
type Key struct {
	Tenant TenantID
	Shape  Shape
	Digest Digest
}

// String shows the key without anything that could be traced to a value.
func (k Key) String() string {
	return fmt.Sprintf("%d/%s/%s", k.Tenant, k.Shape, hex.EncodeToString(k.Digest[:4]))
}

// Valid reports an error when no target could have this key.
func (k Key) Valid() error {
	zero := k.Digest == Digest{}
	switch {
	case !k.Shape.Valid():
		return fmt.Errorf("%w: %s", ErrCritical, k.Shape)
	case k.Shape == Shape(KindGlobal) && (k.Tenant != 0 || !zero):
		return fmt.Errorf("%w: a global key has no tenant and no digest", ErrMalformed)
	case k.Shape == Shape(KindTenant) && (k.Tenant == 0 || !zero):
		return fmt.Errorf("%w: a tenant key has a tenant and no digest", ErrMalformed)
	case k.Shape > Shape(KindTenant) && (k.Tenant == 0 || zero):
		return fmt.Errorf("%w: key without tenant or digest", ErrMalformed)
	}
	return nil
}

// GlobalKey is the key of the one global target.
func GlobalKey() Key { return Key{Shape: Shape(KindGlobal)} }

// TenantKey returns the key of a target that names a whole tenant.
func TenantKey(id TenantID) Key { return Key{Tenant: id, Shape: Shape(KindTenant)} }

// secretLen is the length of a tenant's key: 256 bits.
const secretLen = 32

// TenantSecret is a tenant's digest key. Whoever holds it can recognise values
// that it can guess, so it is handed only to enrolled enforcers. It is safe for
// concurrent use; its zero value prepares no identity and derives no key but the
// global one. It prints as its tenant alone.
type TenantSecret struct {
	id           TenantID
	name         string
	inner, outer [64]byte // HMAC key blocks: key xor ipad, key xor opad
	ok           bool
}

// NewTenantSecret makes the secret of the tenant from 32 bytes of key.
func NewTenantSecret(id TenantID, name string, key []byte) (*TenantSecret, error) {
	if id == 0 {
		return nil, fmt.Errorf("%w: tenant number 0 is the fabric's own", ErrInvalid)
	}
	if err := checkTenantName(name); err != nil {
		return nil, err
	}
	if len(key) != secretLen {
		return nil, fmt.Errorf("%w: a tenant key has %d bytes, not %d", ErrInvalid, secretLen, len(key))
	}
	s := &TenantSecret{id: id, name: name, ok: true}
	for i := range s.inner {
		var b byte
		if i < len(key) {
			b = key[i]
		}
		s.inner[i], s.outer[i] = b^0x36, b^0x5c
	}
	return s, nil
}

// ID returns the tenant's number.
func (s *TenantSecret) ID() TenantID { return s.id }

// Name returns the tenant's name.
func (s *TenantSecret) Name() string { return s.name }

// String never shows the key.
func (s TenantSecret) String() string { return "tenant " + s.name }

// GoString never shows the key.
func (s TenantSecret) GoString() string { return s.String() }

// maxDigestInput bounds what mac hashes: the label, a kind, and two values
// with their lengths.
const maxDigestInput = 3 + 1 + 2*(2+MaxValueLen)

// mac is HMAC-SHA-256 over msg, truncated. crypto/hmac would allocate, and this
// runs on the path of a check that involves a tool.
func (s *TenantSecret) mac(msg []byte) (d Digest) {
	var buf [64 + maxDigestInput]byte
	copy(buf[:64], s.inner[:])
	n := 64 + copy(buf[64:], msg)
	sum := sha256.Sum256(buf[:n])
	var outer [64 + sha256.Size]byte
	copy(outer[:64], s.outer[:])
	copy(outer[64:], sum[:])
	sum = sha256.Sum256(outer[:])
	copy(d[:], sum[:])
	return d
}

// valueDigest is the digest of one canonical term:
// "iv1" || kind || len(issuer) || issuer || len(value) || value.
func (s *TenantSecret) valueDigest(kind Kind, issuer, value string) Digest {
	var buf [maxDigestInput]byte
	b := append(buf[:0], 'i', 'v', '1', byte(kind))
	b = binary.BigEndian.AppendUint16(b, uint16(len(issuer)))
	b = append(b, issuer...)
	b = binary.BigEndian.AppendUint16(b, uint16(len(value)))
	b = append(b, value...)
	return s.mac(b)
}

// ArgumentDigest is the keyed digest of a call's arguments, as they came: the
// HMAC-SHA-256 of "ia1" and them. It tells equal arguments from others to whoever
// holds the tenant's key, and to nobody else.
func (s *TenantSecret) ArgumentDigest(args []byte) (d Hash) {
	if s == nil || !s.ok {
		return d
	}
	inner := sha256.New()
	inner.Write(s.inner[:])
	inner.Write([]byte("ia1"))
	inner.Write(args)
	var outer [64 + sha256.Size]byte
	copy(outer[:64], s.outer[:])
	inner.Sum(outer[:64])
	return sha256.Sum256(outer[:])
}

// joinDigest is the digest of a conjunction: "ic1" || shape || digests, in the
// order of the shape's kinds.
func (s *TenantSecret) joinDigest(shape Shape, d ...Digest) Digest {
	var buf [4 + 3*16]byte
	b := append(buf[:0], 'i', 'c', '1', byte(shape))
	for i := range d {
		b = append(b, d[i][:]...)
	}
	return s.mac(b)
}

// Key returns the key of a target in this tenant. It fails for a target of
// another tenant and for an invalid one.
func (s *TenantSecret) Key(t Target) (Key, error) {
	t, shape, err := t.Canonical()
	if err != nil {
		return Key{}, err
	}
	switch Kind(shape) {
	case KindGlobal:
		return GlobalKey(), nil
	}
	if t.Tenant != s.name {
		return Key{}, fmt.Errorf("%w: the target is in tenant %q, the key is of %q", ErrInvalid, t.Tenant, s.name)
	}
	if Kind(shape) == KindTenant {
		return TenantKey(s.id), nil
	}
	digests := make([]Digest, len(t.Terms))
	for i, term := range t.Terms {
		digests[i] = s.valueDigest(term.Kind, term.Issuer, term.Value)
	}
	if len(digests) == 1 {
		return Key{Tenant: s.id, Shape: shape, Digest: digests[0]}, nil
	}
	return Key{Tenant: s.id, Shape: shape, Digest: s.joinDigest(shape, digests...)}, nil
}

// TokenValue returns the value of KindToken for a token: its `jti`, or, for a
// token without one, "sha256:" and the base64url SHA-256 of its JWS signing
// input (RFC 7515 §5.1).
func TokenValue(jti string, signingInput []byte) string {
	if jti != "" {
		return jti
	}
	sum := sha256.Sum256(signingInput)
	return "sha256:" + base64.RawURLEncoding.EncodeToString(sum[:])
}
