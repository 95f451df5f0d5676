package session

import (
	"bytes"
	"crypto/ed25519"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"os"
)

// maxEnrollmentLen bounds an enrolment file.
const maxEnrollmentLen = 1 << 20

// Enrollment is what `session-authority enroll` hands to one enforcer: whom to
// trust, where the bus is, and the secrets that are the enforcer's own. It
// prints without its secrets.
type Enrollment struct {
	// Enforcer is the name in the roster.
	Enforcer string
	// Root is the pinned root key.
	Root ed25519.PublicKey
	// NATS is where and how to reach the bus.
	NATS NATSAccess
	// ReceiptKey signs receipts.
	ReceiptKey ed25519.PrivateKey
	// Tenants are the digest keys of the tenants that the enforcer serves.
	Tenants []*TenantSecret

	tenantKeys map[TenantID][]byte
}

// NATSAccess is an enforcer's way onto the bus. It prints, and marshals to
// JSON, without its seed.
type NATSAccess struct {
	URLs []string `json:"urls"`
	// NKeySeed is the enforcer's NKey seed ("SU…"). Secret.
	NKeySeed string `json:"-"`
	// CAs, in PEM, verify the server; empty uses the system's.
	CAs string `json:"ca_pem,omitempty"`
}

type natsAccessJSON struct {
	URLs     []string `json:"urls"`
	NKeySeed string   `json:"nkey_seed"`
	CAs      string   `json:"ca_pem,omitempty"`
}

// String never shows the seed.
func (n NATSAccess) String() string { return fmt.Sprint(n.URLs) }

// GoString never shows the seed.
func (n NATSAccess) GoString() string { return n.String() }

// String shows the name alone.
func (e Enrollment) String() string { return "enforcer " + e.Enforcer }

// GoString shows the name alone.
func (e Enrollment) GoString() string { return e.String() }

type enrollmentJSON struct {
	Version    int                `json:"version"`
	Enforcer   string             `json:"enforcer"`
	Root       []byte             `json:"root"`
	NATS       natsAccessJSON     `json:"nats"`
	ReceiptKey []byte             `json:"receipt_key"`
	Tenants    []tenantSecretJSON `json:"tenants"`
}

type tenantSecretJSON struct {
	ID   TenantID `json:"id"`
	Name string   `json:"name"`
	Key  []byte   `json:"key"`
}

// AddTenant adds a tenant's digest key.
func (e *Enrollment) AddTenant(id TenantID, name string, key []byte) error {
	s, err := NewTenantSecret(id, name, key)
	if err != nil {
		return err
	}
	for _, have := range e.Tenants {
		if have.id == id || have.name == name {
			return fmt.Errorf("%w: tenant %d, %s, is enrolled twice", ErrInvalid, id, name)
		}
	}
	if e.tenantKeys == nil {
		e.tenantKeys = map[TenantID][]byte{}
	}
	e.tenantKeys[id] = bytes.Clone(key)
	e.Tenants = append(e.Tenants, s)
	return nil
}

// MarshalSecret returns the enrolment as JSON, secrets included: write it to a
// file that only the enforcer can read. It fails for what ParseEnrollment would
// refuse. MarshalJSON is not it, so that an enrolment that strays into a log or
// an answer shows nothing.
func (e *Enrollment) MarshalSecret() ([]byte, error) {
	if len(e.ReceiptKey) != ed25519.PrivateKeySize {
		return nil, fmt.Errorf("%w: enrolment has no receipt key", ErrInvalid)
	}
	out := enrollmentJSON{
		Version: 1, Enforcer: e.Enforcer, Root: e.Root, NATS: natsAccessJSON(e.NATS), ReceiptKey: e.ReceiptKey.Seed(),
	}
	for _, t := range e.Tenants {
		out.Tenants = append(out.Tenants, tenantSecretJSON{ID: t.id, Name: t.name, Key: e.tenantKeys[t.id]})
	}
	b, err := json.MarshalIndent(out, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("%w: enrolment: %w", ErrInvalid, err)
	}
	if _, err := ParseEnrollment(b); err != nil {
		return nil, err
	}
	return b, nil
}

// MarshalJSON shows the name alone.
func (e Enrollment) MarshalJSON() ([]byte, error) {
	return json.Marshal(map[string]string{"enforcer": e.Enforcer})
}

// ParseEnrollment is the inverse of MarshalSecret. An unknown field or version
// is an error, and so is a missing root.
func ParseEnrollment(b []byte) (*Enrollment, error) {
	if len(b) > maxEnrollmentLen {
		return nil, fmt.Errorf("%w: enrolment of %d bytes", ErrInvalid, len(b))
	}
	var in enrollmentJSON
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&in); err != nil {
		return nil, fmt.Errorf("%w: enrolment: %v", ErrInvalid, err)
	}
	if _, err := d.Token(); err != io.EOF {
		return nil, fmt.Errorf("%w: enrolment: something follows it", ErrInvalid)
	}
	switch {
	case in.Version != 1:
		return nil, fmt.Errorf("%w: enrolment version %d, this is version 1", ErrInvalid, in.Version)
	case !ValidEnforcerName(in.Enforcer):
		return nil, fmt.Errorf("%w: enrolment: enforcer name", ErrInvalid)
	case len(in.Root) != ed25519.PublicKeySize:
		return nil, fmt.Errorf("%w: enrolment pins no root key", ErrInvalid)
	case len(in.ReceiptKey) != ed25519.SeedSize:
		return nil, fmt.Errorf("%w: enrolment has no receipt key", ErrInvalid)
	case len(in.Tenants) == 0 || len(in.Tenants) > MaxTenants:
		return nil, fmt.Errorf("%w: enrolment has %d tenants", ErrInvalid, len(in.Tenants))
	}
	e := &Enrollment{
		Enforcer: in.Enforcer, Root: in.Root, NATS: NATSAccess(in.NATS),
		ReceiptKey: ed25519.NewKeyFromSeed(in.ReceiptKey),
	}
	for _, t := range in.Tenants {
		if err := e.AddTenant(t.ID, t.Name, t.Key); err != nil {
			return nil, err
		}
	}
	return e, nil
}

// LoadEnrollment reads an enrolment file. A file that others can read is
// refused: its secrets must be taken for known.
func LoadEnrollment(path string) (*Enrollment, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	// What was opened is examined, not what the path may name by now.
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if info.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("%w: %s can be read by others: chmod 600 it, and enrol the enforcer anew if anybody else has used this machine",
			fs.ErrPermission, path)
	}
	b, err := io.ReadAll(io.LimitReader(f, maxEnrollmentLen+1))
	if err != nil {
		return nil, err
	}
	return ParseEnrollment(b)
}

// ValidEnforcerName reports whether s can name an enforcer: 1 to 64 of a-z,
// 0-9, "-" and "_". A name is part of the subjects that the enforcer may use.
func ValidEnforcerName(s string) bool {
	if s == "" || len(s) > 64 {
		return false
	}
	for i := 0; i < len(s); i++ {
		c := s[i]
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' && c != '_' {
			return false
		}
	}
	return true
}
