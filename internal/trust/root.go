package trust

import (
	"crypto/ecdh"
	"crypto/ed25519"
	"crypto/rand"
	"fmt"
	"slices"
	"time"

	"github.com/interlock-fabric/interlock/pkg/session"
)

// Root is the offline root key. It prints as its id alone.
type Root struct{ key ed25519.PrivateKey }

// NewRoot makes a root key.
func NewRoot() (*Root, error) {
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	return &Root{key}, nil
}

// LoadRoot reads a root.key. A file that others can read is refused.
func LoadRoot(path string) (*Root, error) {
	key, err := readPrivate(path)
	if err != nil {
		return nil, fmt.Errorf("trust: root key: %w", err)
	}
	return &Root{key}, nil
}

// Public returns the key that enforcers pin.
func (r *Root) Public() ed25519.PublicKey { return r.key.Public().(ed25519.PublicKey) }

// String shows the id alone.
func (r *Root) String() string { return "root " + session.KeyIDOf(r.Public()).String() }

// GoString shows the id alone.
func (r *Root) GoString() string { return r.String() }

// SignKeySet signs ks as a frame.
func (r *Root) SignKeySet(ks *session.KeySet) ([]byte, error) {
	body, err := ks.MarshalBody()
	if err != nil {
		return nil, err
	}
	return session.Seal(session.TypeKeySet, body, r.key)
}

// Every change below derives the next key set from the store's, with the next
// version, issued now and valid as long as the one before; signs it; and stores
// it. The caller publishes Store.Frame. A key set of a root other than the
// store's is refused. The changes of two processes on one directory exclude each
// other, and each starts from what is on disk.

// Renew signs the same content anew. A validity of 0 is that of the set before.
func (s *Store) Renew(r *Root, validity time.Duration, now session.Instant) error {
	return s.change(r, now, func(ks *session.KeySet) error {
		if validity > 0 {
			ks.NotAfter = now.Add(validity)
		}
		return nil
	})
}

// Rotate adds a new signing key, which becomes the current one. The old ones
// stay trusted until they are withdrawn.
func (s *Store) Rotate(r *Root, now session.Instant) (session.KeyID, error) {
	var id session.KeyID
	err := s.change(r, now, func(ks *session.KeySet) error {
		if len(ks.Keys) >= session.MaxKeys {
			return fmt.Errorf("the key set holds %d keys: open a new epoch on a new deployment", len(ks.Keys))
		}
		pub, key, err := ed25519.GenerateKey(rand.Reader)
		if err != nil {
			return err
		}
		id = session.KeyIDOf(pub)
		if err := writePrivate(s.signPath(id), key); err != nil {
			return err
		}
		s.keys[id] = key
		ks.Keys = append(ks.Keys, session.SigningKey{Public: pub, Use: session.UseWriter})
		return nil
	})
	return id, err
}

// RotateAudit adds a new sealing key, to which enforcers seal from now on. What
// was sealed to the old ones stays readable where their private halves are.
func (s *Store) RotateAudit(r *Root, now session.Instant) (session.KeyID, error) {
	var id session.KeyID
	err := s.change(r, now, func(ks *session.KeySet) error {
		if len(ks.Keys) >= session.MaxKeys {
			return fmt.Errorf("the key set holds %d keys: open a new epoch on a new deployment", len(ks.Keys))
		}
		key, err := ecdh.X25519().GenerateKey(rand.Reader)
		if err != nil {
			return err
		}
		pub := key.PublicKey().Bytes()
		id = session.KeyIDOf(pub)
		if err := writePrivate(s.auditPath(id), key); err != nil {
			return err
		}
		s.sealing[id] = key
		ks.Keys = append(ks.Keys, session.SigningKey{Public: pub, Use: session.UseAudit})
		return nil
	})
	return id, err
}

// Withdraw ends the trust in a signing key beyond batch number of that epoch: 0
// ends it for all of the epoch's batches. A key that is withdrawn already can
// only be cut back further.
func (s *Store) Withdraw(r *Root, id session.KeyID, epoch, number uint64, now session.Instant) error {
	return s.change(r, now, func(ks *session.KeySet) error {
		i := slices.IndexFunc(ks.Keys, func(k session.SigningKey) bool { return session.KeyIDOf(k.Public) == id })
		if i < 0 {
			return fmt.Errorf("%w: no key %s in the key set", session.ErrInvalid, id)
		}
		k := &ks.Keys[i]
		switch {
		case epoch == 0 || epoch > ks.Epoch:
			return fmt.Errorf("%w: epoch %d: the key set is of epoch %d", session.ErrInvalid, epoch, ks.Epoch)
		case k.Withdrawn && (epoch > k.LastEpoch || epoch == k.LastEpoch && number > k.LastNumber):
			return fmt.Errorf("%w: key %s is withdrawn from batch %d of epoch %d on", session.ErrInvalid, id, k.LastNumber, k.LastEpoch)
		}
		k.Withdrawn, k.LastEpoch, k.LastNumber = true, epoch, number
		return nil
	})
}

// OpenEpoch begins a new chain with a fresh origin, after the log was lost or
// rolled back.
func (s *Store) OpenEpoch(r *Root, now session.Instant) error {
	return s.change(r, now, func(ks *session.KeySet) error {
		ks.Epoch++
		_, err := rand.Read(ks.Salt[:])
		return err
	})
}

// AddTenant adds a tenant with a new digest key. Numbers are never used twice.
// Enforcers that shall serve it must be enrolled anew.
func (s *Store) AddTenant(r *Root, name string, now session.Instant) (session.TenantID, error) {
	var id session.TenantID
	err := s.change(r, now, func(ks *session.KeySet) error {
		if _, ok := ks.Tenant(name); ok {
			return fmt.Errorf("%w: tenant %s exists", session.ErrInvalid, name)
		}
		if len(ks.Tenants) >= session.MaxTenants {
			return fmt.Errorf("%w: %d tenants", session.ErrInvalid, len(ks.Tenants))
		}
		id = 1
		if n := len(ks.Tenants); n > 0 {
			id = ks.Tenants[n-1].ID + 1
		}
		ks.Tenants = append(ks.Tenants, session.Tenant{ID: id, Name: name})
		t, err := newTenant(id, name)
		if err != nil {
			return err
		}
		// A key for this number that a broken-off attempt left behind was never
		// named by a key set.
		s.tenants = append(slices.DeleteFunc(s.tenants, func(o tenant) bool { return o.ID == id }), t)
		return s.writeTenants(false)
	})
	return id, err
}

// change runs one change under the directory's lock.
func (s *Store) change(r *Root, now session.Instant, edit func(*session.KeySet) error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !r.Public().Equal(s.trust.Root()) {
		return fmt.Errorf("%w: this is not the deployment's root key (%s)", session.ErrInvalid, session.KeyIDOf(s.trust.Root()))
	}
	return s.locked(func() error {
		if err := s.load(); err != nil {
			return err
		}
		have := s.trust.KeySet()
		next := *have
		next.Tenants, next.Keys = slices.Clone(have.Tenants), slices.Clone(have.Keys)
		next.Version++
		// Times do not go back, whatever the machine's clock does.
		next.Issued = max(now, have.Issued)
		next.NotAfter = next.Issued + (have.NotAfter - have.Issued)
		if err := edit(&next); err != nil {
			return fmt.Errorf("trust: %w", err)
		}
		frame, err := r.SignKeySet(&next)
		if err != nil {
			return fmt.Errorf("trust: %w", err)
		}
		_, err = s.accept(frame, next.Issued)
		return err
	})
}
