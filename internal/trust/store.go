package trust

import (
	"bytes"
	"crypto/ecdh"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/interlock-fabric/interlock/internal/flock"
	"github.com/interlock-fabric/interlock/pkg/session"
	"github.com/nats-io/nkeys"
)

// The files of a directory.
const (
	RootFile      = "root.key"
	PublicFile    = "root.pub"
	keySetFile    = "keyset"
	tenantsFile   = "tenants.json"
	authorityFile = "authority.nk"
	lockFile      = "trust.lock"
)

const (
	lockWait = 3 * time.Second
	lockPoll = 5 * time.Millisecond
)

// DefaultValidity is how long a key set counts.
const DefaultValidity = 90 * 24 * time.Hour

var (
	// ErrExists: there are keys already, and nothing is overwritten.
	ErrExists = errors.New("trust: keys exist already")
	// ErrCorrupt: a file is torn or is not what it should be.
	ErrCorrupt = errors.New("corrupt file")
	// ErrNoSigner: no key of the key set can sign here: all whose private half
	// is held are withdrawn, or the key set has ended.
	ErrNoSigner = errors.New("trust: no signing key")
)

// InitOptions says what Init makes. Dir is required.
type InitOptions struct {
	// Dir is the authority's directory; it is made if absent.
	Dir string
	// RootPath is where the root key goes; empty is RootFile in Dir.
	RootPath string
	// Tenants are the first tenants' names; empty is one called "default".
	Tenants []string
	// Validity is how long a key set counts; 0 is DefaultValidity.
	Validity time.Duration
}

// Init makes a deployment's keys: root, first signing key, first sealing key,
// tenants, the authority's NKey, and key set 1 of epoch 1. It fails with ErrExists when any of
// the files is there.
func Init(o InitOptions, now session.Instant) (*Store, error) {
	switch {
	case o.Dir == "":
		return nil, fmt.Errorf("%w: no directory for the keys", session.ErrInvalid)
	case o.Validity < 0:
		return nil, fmt.Errorf("%w: negative validity", session.ErrInvalid)
	case o.Validity == 0:
		o.Validity = DefaultValidity
	}
	if o.RootPath == "" {
		o.RootPath = filepath.Join(o.Dir, RootFile)
	}
	if len(o.Tenants) == 0 {
		o.Tenants = []string{"default"}
	}
	ks := &session.KeySet{Version: 1, Epoch: 1, Issued: now, NotAfter: now.Add(o.Validity)}
	s := &Store{dir: o.Dir, keys: map[session.KeyID]ed25519.PrivateKey{}, sealing: map[session.KeyID]*ecdh.PrivateKey{}}
	for i, name := range o.Tenants {
		t, err := newTenant(session.TenantID(i+1), name)
		if err != nil {
			return nil, err
		}
		s.tenants = append(s.tenants, t)
		ks.Tenants = append(ks.Tenants, session.Tenant{ID: t.ID, Name: t.Name})
	}
	root, err := NewRoot()
	if err != nil {
		return nil, err
	}
	pub, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	if _, err := rand.Read(ks.Salt[:]); err != nil {
		return nil, err
	}
	audit, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	ks.Keys = []session.SigningKey{
		{Public: pub, Use: session.UseWriter},
		{Public: audit.PublicKey().Bytes(), Use: session.UseAudit},
	}
	frame, err := root.SignKeySet(ks) // refuses bad tenant names before anything is written
	if err != nil {
		return nil, fmt.Errorf("trust: %w", err)
	}
	nk, err := nkeys.CreateUser()
	if err != nil {
		return nil, err
	}
	seed, err := nk.Seed()
	if err != nil {
		return nil, err
	}

	if err := makeDir(o.Dir); err != nil {
		return nil, fmt.Errorf("trust: %w", err)
	}
	err = s.locked(func() error {
		for _, f := range []string{o.RootPath, s.path(RootFile), s.path(PublicFile), s.path(keySetFile), s.path(tenantsFile), s.path(authorityFile)} {
			if _, err := os.Lstat(f); err == nil {
				return fmt.Errorf("%w: %s", ErrExists, f)
			} else if !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
		if err := os.MkdirAll(filepath.Dir(o.RootPath), 0o700); err != nil {
			return err
		}
		id := session.KeyIDOf(pub)
		for _, write := range []func() error{
			func() error { return writePrivate(o.RootPath, root.key) },
			func() error { return writePublic(s.path(PublicFile), root.Public()) },
			func() error { return writePrivate(s.signPath(id), key) },
			func() error { return writePrivate(s.auditPath(session.KeyIDOf(ks.Keys[1].Public)), audit) },
			func() error { return writeFile(s.path(authorityFile), append(seed, '\n'), true) },
			func() error { return s.writeTenants(true) },
			func() error { return writeFile(s.path(keySetFile), frame, true) },
		} {
			if err := write(); err != nil {
				return fmt.Errorf("trust: %w", err)
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return Open(o.Dir)
}

// Store is a directory of keys, without the root's private half. Its methods may
// be called concurrently. It prints without its secrets.
type Store struct {
	dir string

	mu      sync.Mutex
	trust   *session.Trust
	frame   []byte
	keys    map[session.KeyID]ed25519.PrivateKey
	sealing map[session.KeyID]*ecdh.PrivateKey
	tenants []tenant
	seed    string
}

type tenant struct {
	ID   session.TenantID `json:"id"`
	Name string           `json:"name"`
	Key  []byte           `json:"key"`
}

// String shows nothing of what is inside.
func (t tenant) String() string { return "tenant " + t.Name }

type tenantsJSON struct {
	Version int      `json:"version"`
	Tenants []tenant `json:"tenants"`
}

func newTenant(id session.TenantID, name string) (tenant, error) {
	t := tenant{ID: id, Name: name, Key: make([]byte, 32)}
	if _, err := rand.Read(t.Key); err != nil {
		return tenant{}, err
	}
	_, err := session.NewTenantSecret(id, name, t.Key)
	return t, err
}

// Open loads a directory that Init made. A key set that has ended loads, so that
// it can be renewed; Signer refuses to sign under it. Errors wrap fs.ErrNotExist
// when there is none, fs.ErrPermission when a secret can be read by others, and
// ErrCorrupt; they never show what a file holds.
func Open(dir string) (*Store, error) {
	s := &Store{dir: dir}
	if err := s.load(); err != nil {
		return nil, err
	}
	return s, nil
}

func (s *Store) path(name string) string { return filepath.Join(s.dir, name) }

func (s *Store) signPath(id session.KeyID) string {
	return s.path("sign-" + id.String() + ".key")
}

func (s *Store) auditPath(id session.KeyID) string {
	return s.path("audit-" + id.String() + ".key")
}

// locked runs f under the lock of the directory, which others hold for
// milliseconds only.
func (s *Store) locked(f func() error) error {
	lock, err := flock.Acquire(s.path(lockFile))
	for end := time.Now().Add(lockWait); errors.Is(err, flock.ErrHeld) && time.Now().Before(end); {
		<-time.After(lockPoll)
		lock, err = flock.Acquire(s.path(lockFile))
	}
	if err != nil {
		return fmt.Errorf("trust: %s: %w", s.dir, err)
	}
	return errors.Join(f(), lock.Close())
}

// load reads everything. s.mu is held, or s is not shared yet.
func (s *Store) load() error {
	wrap := func(err error) error { return fmt.Errorf("trust: %w", err) }
	root, err := ReadPublic(s.path(PublicFile))
	if err != nil {
		return wrap(err)
	}
	if s.trust != nil && !root.Equal(s.trust.Root()) {
		return fmt.Errorf("trust: %s holds the root of another deployment than at start", s.path(PublicFile))
	}
	tr, err := session.NewTrust(root)
	if err != nil {
		return wrap(err)
	}
	frame, err := readFile(s.path(keySetFile), false)
	if err != nil {
		return wrap(err)
	}
	issued, err := issuedAt(frame)
	if err == nil {
		// Its end is judged when it is used.
		_, err = tr.Update(frame, issued)
	}
	if err != nil {
		return fmt.Errorf("trust: %w: %s: %w", ErrCorrupt, s.path(keySetFile), err)
	}
	ks := tr.KeySet()
	keys, sealing := map[session.KeyID]ed25519.PrivateKey{}, map[session.KeyID]*ecdh.PrivateKey{}
	for _, k := range ks.Keys {
		id := session.KeyIDOf(k.Public)
		if k.Use == session.UseAudit {
			key, err := readSealing(s.auditPath(id))
			switch {
			case errors.Is(err, fs.ErrNotExist): // another authority's
			case err != nil:
				return wrap(err)
			case !bytes.Equal(key.PublicKey().Bytes(), k.Public):
				return fmt.Errorf("trust: %w: %s is another key than its name says", ErrCorrupt, s.auditPath(id))
			default:
				sealing[id] = key
			}
			continue
		}
		key, err := readPrivate(s.signPath(id))
		if errors.Is(err, fs.ErrNotExist) {
			continue // another authority's
		}
		if err != nil {
			return wrap(err)
		}
		if !key.Public().(ed25519.PublicKey).Equal(k.Public) {
			return fmt.Errorf("trust: %w: %s is another key than its name says", ErrCorrupt, s.signPath(id))
		}
		keys[id] = key
	}
	tenants, err := s.readTenants()
	if err != nil {
		return wrap(err)
	}
	seed, err := readFile(s.path(authorityFile), true)
	if err != nil {
		return wrap(err)
	}
	seed = bytes.TrimSpace(seed)
	if _, err := nkeys.FromSeed(seed); err != nil {
		return fmt.Errorf("trust: %w: %s is not an NKey seed", ErrCorrupt, s.path(authorityFile))
	}
	if s.trust == nil {
		s.trust = tr
	} else if have := s.trust.KeySet().Version; ks.Version < have {
		return fmt.Errorf("trust: %w: %s went back from version %d to %d", ErrCorrupt, s.path(keySetFile), have, ks.Version)
	} else if _, err := s.trust.Update(frame, issued); err != nil {
		return wrap(err)
	}
	s.frame, s.keys, s.sealing, s.tenants, s.seed = frame, keys, sealing, tenants, string(seed)
	return nil
}

func issuedAt(frame []byte) (session.Instant, error) {
	f, err := session.ParseFrame(frame)
	if err != nil {
		return 0, err
	}
	ks, err := session.UnmarshalKeySet(f.Body)
	if err != nil {
		return 0, err
	}
	return ks.Issued, nil
}

func (s *Store) readTenants() ([]tenant, error) {
	path := s.path(tenantsFile)
	b, err := readFile(path, true)
	if err != nil {
		return nil, err
	}
	var in tenantsJSON
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	// The decoder's errors could quote what it read.
	if err := d.Decode(&in); err != nil || in.Version != 1 {
		return nil, fmt.Errorf("%w: %s is not a list of tenants of version 1", ErrCorrupt, path)
	}
	seen := map[session.TenantID]bool{}
	for _, t := range in.Tenants {
		if _, err := session.NewTenantSecret(t.ID, t.Name, t.Key); err != nil || seen[t.ID] {
			return nil, fmt.Errorf("%w: %s: tenant %d", ErrCorrupt, path, t.ID)
		}
		seen[t.ID] = true
	}
	return in.Tenants, nil
}

func (s *Store) writeTenants(mustBeNew bool) error {
	b, err := json.MarshalIndent(tenantsJSON{Version: 1, Tenants: s.tenants}, "", "  ")
	if err != nil {
		return err
	}
	return writeFile(s.path(tenantsFile), append(b, '\n'), mustBeNew)
}

// String shows the directory and the root's id.
func (s *Store) String() string {
	return "keys in " + s.dir + " of root " + session.KeyIDOf(s.trust.Root()).String()
}

// GoString shows no more than String.
func (s *Store) GoString() string { return s.String() }

// Reload takes what another process changed in the directory. It reports whether
// the key set is newer.
func (s *Store) Reload() (bool, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	before := s.trust.KeySet().Version
	if err := s.load(); err != nil {
		return false, err
	}
	return s.trust.KeySet().Version > before, nil
}

// Accept takes a key set that was heard, if the root signed it and it is newer,
// and stores it before it counts. Errors wrap session.ErrFrame, or are the
// disk's. It reports whether it was taken.
func (s *Store) Accept(frame []byte, now session.Instant) (bool, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var taken bool
	err := s.locked(func() (err error) {
		taken, err = s.accept(frame, now)
		return err
	})
	return taken, err
}

func (s *Store) accept(frame []byte, now session.Instant) (bool, error) {
	// First on a copy, so that nothing counts that is not stored.
	probe, err := session.NewTrust(s.trust.Root())
	if err != nil {
		return false, err
	}
	if _, err := probe.Update(s.frame, s.trust.KeySet().Issued); err != nil {
		return false, err
	}
	newer, err := probe.Update(frame, now)
	if err != nil || !newer {
		return false, err
	}
	frame = slices.Clone(frame)
	if err := writeFile(s.path(keySetFile), frame, false); err != nil {
		return false, fmt.Errorf("trust: %w", err)
	}
	if _, err := s.trust.Update(frame, now); err != nil {
		return false, err
	}
	s.frame = frame
	return true, nil
}

// Trust returns what decides which frames to believe. It follows the store.
func (s *Store) Trust() *session.Trust { return s.trust }

// Root returns the root's public key.
func (s *Store) Root() ed25519.PublicKey { return s.trust.Root() }

// KeySet returns the newest key set; it must not be changed.
func (s *Store) KeySet() *session.KeySet { return s.trust.KeySet() }

// Frame returns the newest key set as the root signed it.
func (s *Store) Frame() []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.frame)
}

// Signer returns the current signing key: the newest of the key set's writer keys
// for every tenant that is not withdrawn and whose private half is here. It fails
// with ErrNoSigner when there is none or the key set has ended.
func (s *Store) Signer(now session.Instant) (ed25519.PrivateKey, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	ks := s.trust.KeySet()
	if now >= ks.NotAfter {
		return nil, fmt.Errorf("%w: key set %d ended at %s: renew it with the root key", ErrNoSigner, ks.Version, ks.NotAfter)
	}
	for _, k := range slices.Backward(ks.Keys) {
		if key := s.keys[session.KeyIDOf(k.Public)]; key != nil && k.Use == session.UseWriter && !k.Withdrawn && k.Tenants == nil {
			return key, nil
		}
	}
	return nil, fmt.Errorf("%w: rotate with the root key", ErrNoSigner)
}

// Sealing returns the private half of a sealing key, withdrawn ones included:
// what was sealed to them is there to be read still.
func (s *Store) Sealing(id session.KeyID) (*ecdh.PrivateKey, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	k, ok := s.sealing[id]
	return k, ok
}

// Secrets returns the digest keys of the key set's tenants, in order of number.
// missing names the tenants whose keys are not here: the key set was heard, and
// the tenants file has to be copied from where they were added.
func (s *Store) Secrets() (have []*session.TenantSecret, missing []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, t := range s.trust.KeySet().Tenants {
		var secret *session.TenantSecret
		if own, ok := s.tenant(t); ok {
			// readTenants has seen that it is sound.
			secret, _ = session.NewTenantSecret(own.ID, own.Name, own.Key)
		}
		if secret == nil {
			missing = append(missing, t.Name)
			continue
		}
		have = append(have, secret)
	}
	return have, missing
}

func (s *Store) tenant(t session.Tenant) (tenant, bool) {
	i := slices.IndexFunc(s.tenants, func(o tenant) bool { return o.ID == t.ID && o.Name == t.Name })
	if i < 0 {
		return tenant{}, false
	}
	return s.tenants[i], true
}

// AuthoritySeed returns the authority's NKey seed. Secret.
func (s *Store) AuthoritySeed() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.seed
}

// AuthorityNKey returns the public half of the authority's NKey.
func (s *Store) AuthorityNKey() (string, error) {
	kp, err := nkeys.FromSeed([]byte(s.AuthoritySeed()))
	if err != nil {
		return "", errors.New("trust: the authority's NKey seed is malformed")
	}
	defer kp.Wipe()
	return kp.PublicKey()
}

// RosterEntry is what the roster keeps of an enrolment: nothing secret.
type RosterEntry struct {
	Name       string
	NKey       string
	ReceiptKey ed25519.PublicKey
	Tenants    []session.TenantID
}

// Enroll makes an enforcer's identity, for the named tenants (all when empty).
// Nothing is stored: the enrolment is the enforcer's alone, and the entry goes
// into the roster before the enforcer can connect. urls and caPEM are where and
// how it reaches the bus.
func (s *Store) Enroll(name string, tenants, urls []string, caPEM string) (*session.Enrollment, RosterEntry, error) {
	fail := func(err error) (*session.Enrollment, RosterEntry, error) { return nil, RosterEntry{}, err }
	if !session.ValidEnforcerName(name) {
		return fail(fmt.Errorf("%w: %q cannot name an enforcer: want 1 to 64 of a-z, 0-9, \"-\" and \"_\"", session.ErrInvalid, strings.ToValidUTF8(name[:min(len(name), 64)], "?")))
	}
	if len(urls) == 0 {
		return fail(fmt.Errorf("%w: no server of the bus to enrol for", session.ErrInvalid))
	}
	pub, receipt, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return fail(err)
	}
	nk, err := nkeys.CreateUser()
	if err != nil {
		return fail(err)
	}
	defer nk.Wipe()
	seed, err := nk.Seed()
	if err != nil {
		return fail(err)
	}
	npub, err := nk.PublicKey()
	if err != nil {
		return fail(err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	ks := s.trust.KeySet()
	if len(tenants) == 0 {
		for _, t := range ks.Tenants {
			tenants = append(tenants, t.Name)
		}
	}
	e := &session.Enrollment{
		Enforcer: name, Root: slices.Clone(s.trust.Root()), ReceiptKey: receipt,
		NATS: session.NATSAccess{URLs: slices.Clone(urls), NKeySeed: string(seed), CAs: caPEM},
	}
	entry := RosterEntry{Name: name, NKey: npub, ReceiptKey: pub}
	for _, tn := range tenants {
		t, ok := ks.Tenant(tn)
		if !ok {
			return fail(fmt.Errorf("%w: no tenant %.64q", session.ErrInvalid, tn))
		}
		own, ok := s.tenant(t)
		if !ok {
			return fail(fmt.Errorf("trust: %s lacks the key of tenant %s", s.path(tenantsFile), tn))
		}
		if err := e.AddTenant(own.ID, own.Name, own.Key); err != nil {
			return fail(err)
		}
		entry.Tenants = append(entry.Tenants, own.ID)
	}
	return e, entry, nil
}

// WriteEnrollment writes an enrolment to a new file of mode 0600. It fails with
// fs.ErrExist rather than replace one.
func WriteEnrollment(path string, e *session.Enrollment) error {
	b, err := e.MarshalSecret()
	if err != nil {
		return fmt.Errorf("trust: enrolment cannot be encoded")
	}
	if err := writeFile(path, append(b, '\n'), true); err != nil {
		return fmt.Errorf("trust: %w", err)
	}
	return nil
}
