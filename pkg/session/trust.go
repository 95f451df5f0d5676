package session

import (
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"slices"
	"sync/atomic"
)

// Bounds of a key set.
const (
	MaxTenants = 4096
	MaxKeys    = 256
)

// KeyUse says what a key in a key set may sign.
type KeyUse uint8

const (
	// UseWriter signs batches, heartbeats, clock answers and rejections.
	UseWriter KeyUse = 1
	// UseEmergency signs orders outside the log; see Order.
	UseEmergency KeyUse = 2
	// UseAudit signs nothing: it is an X25519 key, to which enforcers seal
	// their reports. A reader that does not know the use ignores the key.
	UseAudit KeyUse = 3
)

// Tenant is a tenant of the deployment.
type Tenant struct {
	ID   TenantID
	Name string
}

// SigningKey is a key that the root trusts, and for what.
type SigningKey struct {
	// Public is an Ed25519 key, but for UseAudit.
	Public ed25519.PublicKey
	Use    KeyUse
	// Tenants limits the entries that the key may sign; nil is every tenant
	// and the global ones.
	Tenants []TenantID
	// Withdrawn is set when the key is no longer trusted, beyond what it signed
	// up to and with batch LastNumber of epoch LastEpoch.
	Withdrawn  bool
	LastEpoch  uint64
	LastNumber uint64
	// Orders is how many orders the key may sign, at most MaxOrders; zero for
	// any use but UseEmergency. A withdrawn key signs none.
	Orders uint16
	// Bus is the NKey, as an Ed25519 key, with which the holder of an emergency
	// key may publish its orders on the bus, and do nothing else there; nil is
	// nobody. Only with Orders.
	Bus ed25519.PublicKey
}

// May reports whether the key may sign an entry under k.
func (s *SigningKey) May(k Key) bool {
	return s.Tenants == nil || k.Tenant != 0 && slices.Contains(s.Tenants, k.Tenant)
}

// signs reports whether the key is trusted for a batch, if it is a writer's.
func (s *SigningKey) signs(epoch, number uint64) bool {
	return !s.Withdrawn || s.LastEpoch > epoch || s.LastEpoch == epoch && number <= s.LastNumber
}

// KeySet is the one document that the offline root key signs. Versions only
// grow; the newest that has not expired counts alone.
type KeySet struct {
	Version uint64
	// Epoch numbers the chain that is being written. A new epoch is opened,
	// with a fresh Salt, when the log was lost or rolled back.
	Epoch    uint64
	Salt     [16]byte
	Issued   Instant
	NotAfter Instant
	Tenants  []Tenant
	Keys     []SigningKey
	Unknown  []Field
}

// Origin returns the hash that the first batch of the set's epoch names as its
// Prev.
func (ks *KeySet) Origin(root ed25519.PublicKey) Hash {
	b := append([]byte("interlock epoch 1\x00"), root...)
	b = binary.BigEndian.AppendUint64(b, ks.Epoch)
	b = append(b, ks.Salt[:]...)
	return sha256.Sum256(b)
}

// AuditKey returns the X25519 key to which reports are sealed: the newest of its
// use that is not withdrawn. It must not be changed.
func (ks *KeySet) AuditKey() (public []byte, ok bool) {
	for _, k := range slices.Backward(ks.Keys) {
		if k.Use == UseAudit && !k.Withdrawn {
			return k.Public, true
		}
	}
	return nil, false
}

// Tenant finds a tenant by name.
func (ks *KeySet) Tenant(name string) (Tenant, bool) {
	for _, t := range ks.Tenants {
		if t.Name == name {
			return t, true
		}
	}
	return Tenant{}, false
}

// TenantName finds a tenant's name by number; the fabric's own is "".
func (ks *KeySet) TenantName(id TenantID) string {
	for _, t := range ks.Tenants {
		if t.ID == id {
			return t.Name
		}
	}
	return ""
}

func (ks *KeySet) validate() error {
	bad := func(format string, a ...any) error {
		return fmt.Errorf("%w: key set: %s", ErrMalformed, fmt.Sprintf(format, a...))
	}
	switch {
	case ks.Version == 0 || ks.Epoch == 0:
		return bad("without version or epoch")
	case ks.Issued < 0 || ks.NotAfter <= ks.Issued:
		return bad("ends before it begins")
	case len(ks.Tenants) > MaxTenants || len(ks.Keys) > MaxKeys:
		return bad("%d tenants, %d keys", len(ks.Tenants), len(ks.Keys))
	}
	names := map[string]bool{}
	for i, t := range ks.Tenants {
		if err := checkTenantName(t.Name); err != nil {
			return bad("%v", err)
		}
		if t.ID == 0 || i > 0 && ks.Tenants[i-1].ID >= t.ID || names[t.Name] {
			return bad("tenants are not in order, or repeated")
		}
		names[t.Name] = true
	}
	ids := map[KeyID]bool{}
	orders := 0
	for _, k := range ks.Keys {
		if len(k.Public) != ed25519.PublicKeySize {
			return bad("public key of %d bytes", len(k.Public))
		}
		if id := KeyIDOf(k.Public); ids[id] {
			return bad("key %s is there twice", id)
		} else {
			ids[id] = true
		}
		if len(k.Tenants) > MaxTenants {
			return bad("%d tenants of a key", len(k.Tenants))
		}
		last := TenantID(0)
		for _, id := range k.Tenants {
			if id <= last {
				return bad("tenants of a key are not in order, or repeated")
			}
			last = id
		}
		if !k.Withdrawn && (k.LastEpoch != 0 || k.LastNumber != 0) {
			return bad("a last number on a key that is not withdrawn")
		}
		switch orders += int(k.Orders); {
		case k.Orders > 0 && k.Use != UseEmergency || k.Orders > MaxOrders || orders > MaxKeySetOrders:
			return bad("%d orders of a key, %d in all", k.Orders, orders)
		case k.Bus != nil && (k.Orders == 0 || len(k.Bus) != ed25519.PublicKeySize):
			return bad("a bus key of %d bytes for %d orders", len(k.Bus), k.Orders)
		}
	}
	return checkUnknown(ks.Unknown, tagOrders)
}

// MarshalBody returns the body of the key set's frame.
func (ks *KeySet) MarshalBody() ([]byte, error) {
	if err := ks.validate(); err != nil {
		return nil, err
	}
	var w writer
	w.u64(ks.Version)
	w.u64(ks.Epoch)
	w.raw(ks.Salt[:])
	w.instant(ks.Issued)
	w.instant(ks.NotAfter)
	w.u16(uint16(len(ks.Tenants)))
	for _, t := range ks.Tenants {
		w.u32(uint32(t.ID))
		w.text(t.Name)
	}
	w.u16(uint16(len(ks.Keys)))
	for _, k := range ks.Keys {
		w.raw(k.Public)
		w.u8(uint8(k.Use))
		var flags uint8
		if k.Withdrawn {
			flags |= 1
		}
		if k.Tenants != nil {
			flags |= 2
		}
		w.u8(flags)
		if k.Withdrawn {
			w.u64(k.LastEpoch)
			w.u64(k.LastNumber)
		}
		if k.Tenants != nil {
			w.u16(uint16(len(k.Tenants)))
			for _, t := range k.Tenants {
				w.u32(uint32(t))
			}
		}
	}
	w.fields(ks.orders(), ks.Unknown)
	return w.b, nil
}

// tagOrders is the field of a key set that says what its emergency keys may do:
// whoever does not know it believes no orders.
const tagOrders = 2

func (ks *KeySet) orders() []Field {
	var w writer
	for _, k := range ks.Keys {
		if k.Orders == 0 {
			continue
		}
		id := KeyIDOf(k.Public)
		w.raw(id[:])
		w.u16(k.Orders)
		w.u8(uint8(len(k.Bus) / ed25519.PublicKeySize))
		w.raw(k.Bus)
	}
	if len(w.b) == 0 {
		return nil
	}
	return []Field{{Tag: tagOrders, Value: w.b}}
}

// readOrders takes what orders wrote: in the order of the keys.
func (ks *KeySet) readOrders(r *reader) {
	if len(r.b) == 0 {
		r.fail("no orders")
	}
	at := 0
	for len(r.b) > 0 && r.err == nil {
		id, n, bus := r.take(len(KeyID{})), r.u16(), r.u8()
		if r.err != nil {
			return
		}
		for at < len(ks.Keys) && KeyIDOf(ks.Keys[at].Public) != KeyID(id) {
			at++
		}
		if at == len(ks.Keys) || n == 0 || bus > 1 {
			r.fail("orders of a key")
			return
		}
		k := &ks.Keys[at]
		if k.Orders = n; bus == 1 {
			k.Bus = slices.Clone(r.take(ed25519.PublicKeySize))
		}
		at++
	}
}

// UnmarshalKeySet parses a body. Errors wrap ErrMalformed or ErrCritical.
func UnmarshalKeySet(body []byte) (*KeySet, error) {
	r := reader{b: body}
	ks := &KeySet{Version: r.u64(), Epoch: r.u64()}
	copy(ks.Salt[:], r.take(16))
	ks.Issued, ks.NotAfter = r.instant(), r.instant()
	for n := r.count(int(r.u16()), MaxTenants, 6); n > 0 && r.err == nil; n-- {
		ks.Tenants = append(ks.Tenants, Tenant{ID: TenantID(r.u32()), Name: r.text("tenant", 64)})
	}
	for n := r.count(int(r.u16()), MaxKeys, 34); n > 0 && r.err == nil; n-- {
		k := SigningKey{Public: slices.Clone(r.take(ed25519.PublicKeySize)), Use: KeyUse(r.u8())}
		flags := r.u8()
		if flags&^3 != 0 {
			r.fail("key flags")
		}
		if flags&1 != 0 {
			k.Withdrawn, k.LastEpoch, k.LastNumber = true, r.u64(), r.u64()
		}
		if flags&2 != 0 {
			k.Tenants = []TenantID{}
			for m := r.count(int(r.u16()), MaxTenants, 4); m > 0 && r.err == nil; m-- {
				k.Tenants = append(k.Tenants, TenantID(r.u32()))
			}
		}
		ks.Keys = append(ks.Keys, k)
	}
	ks.Unknown = r.fields(func(tag uint8, r *reader) bool {
		switch tag {
		case tagOrders:
			ks.readOrders(r)
		case tagOrders | critical:
			r.fail("tag %#02x has the wrong criticality", tag)
		default:
			return false
		}
		return true
	})
	if err := r.end(); err != nil {
		return nil, err
	}
	if err := ks.validate(); err != nil {
		return nil, err
	}
	return ks, nil
}

// Revoked reports whether the key set does not trust a key for the batch with
// that number of its epoch.
func (ks *KeySet) Revoked(id KeyID, number uint64) bool {
	for i := range ks.Keys {
		if k := &ks.Keys[i]; KeyIDOf(k.Public) == id {
			return k.Use != UseWriter || !k.signs(ks.Epoch, number)
		}
	}
	return true
}

// Trust decides which frames to believe: a pinned root and the newest key set
// that the root signed. Reads take no lock and may run beside one Update; it
// must be made by NewTrust.
type Trust struct {
	root    ed25519.PublicKey
	current atomic.Pointer[trusted]
}

type trusted struct {
	set  *KeySet
	hash Hash
	keys map[KeyID]*SigningKey
}

// NewTrust pins a root key. Nothing but key sets is trusted until the first
// Update.
func NewTrust(root ed25519.PublicKey) (*Trust, error) {
	if len(root) != ed25519.PublicKeySize {
		return nil, fmt.Errorf("%w: no root key to trust: pin the deployment's root", ErrInvalid)
	}
	return &Trust{root: slices.Clone(root)}, nil
}

// Root returns the pinned root key.
func (t *Trust) Root() ed25519.PublicKey { return t.root }

// KeySet returns the newest key set, or nil before the first Update. It must
// not be changed.
func (t *Trust) KeySet() *KeySet {
	if c := t.current.Load(); c != nil {
		return c.set
	}
	return nil
}

// Origin returns the hash before the first batch of the current epoch.
func (t *Trust) Origin() Hash {
	if ks := t.KeySet(); ks != nil {
		return ks.Origin(t.root)
	}
	return Hash{}
}

// Update takes a key set, if the root signed it, it has not expired at now, and
// it is newer than the one held. It reports whether it was taken: an older one
// is not an error, since every one is heard more than once. Errors wrap
// ErrFrame; a version that is held already with other content is one. So is a
// set in which a key has other rights than before: what the key has signed would
// be judged anew whenever the log is read, and states that applied the same log
// would differ.
func (t *Trust) Update(frame []byte, now Instant) (bool, error) {
	f, err := ParseFrame(frame)
	if err != nil {
		return false, err
	}
	if f.Type != TypeKeySet {
		return false, fmt.Errorf("%w: not a key set", ErrMalformed)
	}
	if err := f.Verify(t.root); err != nil {
		return false, err
	}
	ks, err := UnmarshalKeySet(f.Body)
	if err != nil {
		return false, err
	}
	if c := t.current.Load(); c != nil {
		have := c.set
		switch {
		case ks.Version == have.Version && f.Hash() != c.hash:
			return false, fmt.Errorf("%w: key set %d is held already, with other content", ErrUntrusted, ks.Version)
		case ks.Version <= have.Version:
			return false, nil
		case ks.Epoch < have.Epoch:
			return false, fmt.Errorf("%w: key set %d goes back to epoch %d", ErrUntrusted, ks.Version, ks.Epoch)
		case ks.Epoch == have.Epoch && ks.Salt != have.Salt:
			return false, fmt.Errorf("%w: key set %d changes the salt of epoch %d", ErrUntrusted, ks.Version, ks.Epoch)
		}
		for i := range ks.Keys {
			k := &ks.Keys[i]
			old := c.keys[KeyIDOf(k.Public)]
			if old != nil && (old.Use != k.Use || (old.Tenants == nil) != (k.Tenants == nil) || !slices.Equal(old.Tenants, k.Tenants) ||
				old.Orders != k.Orders || !old.Bus.Equal(k.Bus)) {
				return false, fmt.Errorf("%w: key set %d changes the rights of key %s: withdraw it and make another", ErrUntrusted, ks.Version, KeyIDOf(k.Public))
			}
		}
	}
	if now >= ks.NotAfter {
		return false, fmt.Errorf("%w: key set %d ended at %s", ErrUntrusted, ks.Version, ks.NotAfter)
	}
	next := &trusted{set: ks, hash: f.Hash(), keys: make(map[KeyID]*SigningKey, len(ks.Keys))}
	for i := range ks.Keys {
		next.keys[KeyIDOf(ks.Keys[i].Public)] = &ks.Keys[i]
	}
	t.current.Store(next)
	return true, nil
}

// Writer verifies a frame that a writer signs. number is the batch number that
// the frame speaks of, in the current epoch, which a withdrawn key must not
// exceed; a frame that speaks of none, such as a heartbeat, is refused from a
// withdrawn key altogether when live is set.
func (t *Trust) Writer(f *Frame, number uint64, live bool, now Instant) (*SigningKey, error) {
	c := t.current.Load()
	if c == nil {
		return nil, fmt.Errorf("%w: no key set yet", ErrUntrusted)
	}
	if now >= c.set.NotAfter {
		return nil, fmt.Errorf("%w: key set %d ended at %s", ErrUntrusted, c.set.Version, c.set.NotAfter)
	}
	k := c.keys[f.Key]
	if k == nil || k.Use != UseWriter {
		return nil, fmt.Errorf("%w: %s", ErrUntrusted, f.Key)
	}
	if k.Withdrawn && live || !k.signs(c.set.Epoch, number) {
		return nil, fmt.Errorf("%w: %s is withdrawn", ErrUntrusted, f.Key)
	}
	if err := f.Verify(k.Public); err != nil {
		return nil, err
	}
	return k, nil
}
