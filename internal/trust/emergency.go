package trust

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/interlock-fabric/interlock/pkg/session"
	"github.com/nats-io/nkeys"
)

// EmergencyKey is what `session-authority keys emergency` hands to whoever shall
// be able to kill when no authority answers: a key whose tenants and orders the key
// set fixes, and the way onto the bus. It prints without its secrets.
type EmergencyKey struct {
	// Root is the deployment's.
	Root ed25519.PublicKey
	// Orders is how many it may sign.
	Orders uint16
	// Global is set when it may kill everything, and any tenant. Tenants are those
	// that it may kill, or for Global those whose numbers it knows.
	Global  bool
	Tenants []session.Tenant
	// NATS is how it publishes; without URLs it signs files alone.
	NATS session.NATSAccess

	key ed25519.PrivateKey
}

// EmergencyOptions says what an emergency key may do.
type EmergencyOptions struct {
	// Path is the new file that the key is written to, with mode 0600.
	Path string
	// Tenants are those that it may kill; with Global it may kill each, and
	// everything, and Tenants is empty.
	Tenants []string
	Global  bool
	// Orders is how many orders it may sign, 1 to session.MaxOrders.
	Orders int
	// URLs and CAs are how the bus is reached; without URLs it is not.
	URLs []string
	CAs  string
}

type emergencyJSON struct {
	Version int              `json:"version"`
	KeyID   string           `json:"key_id"` // for people
	Root    []byte           `json:"root"`
	Key     []byte           `json:"key"`
	Orders  uint16           `json:"orders"`
	Global  bool             `json:"global"`
	Tenants []session.Tenant `json:"tenants"`
	NATS    struct {
		URLs     []string `json:"urls"`
		NKeySeed string   `json:"nkey_seed"`
		CAs      string   `json:"ca_pem,omitempty"`
	} `json:"nats"`
}

// AddEmergency adds an emergency key and writes it to a file. What it may do stands
// until it is withdrawn.
func (s *Store) AddEmergency(r *Root, o EmergencyOptions, now session.Instant) (*EmergencyKey, error) {
	var e *EmergencyKey
	err := s.change(r, now, func(ks *session.KeySet) error {
		if len(ks.Keys) >= session.MaxKeys {
			return fmt.Errorf("the key set holds %d keys: open a new epoch on a new deployment", len(ks.Keys))
		}
		if o.Orders < 1 || o.Orders > session.MaxOrders {
			return fmt.Errorf("%w: %d orders: give 1 to %d", session.ErrInvalid, o.Orders, session.MaxOrders)
		}
		if o.Global == (len(o.Tenants) > 0) {
			return fmt.Errorf("%w: name the tenants that the key may kill, or that it may kill everything", session.ErrInvalid)
		}
		sk := session.SigningKey{Use: session.UseEmergency, Orders: uint16(o.Orders)}
		e = &EmergencyKey{Root: s.trust.Root(), Orders: sk.Orders, Global: o.Global, NATS: session.NATSAccess{URLs: o.URLs, CAs: o.CAs}}
		for _, name := range o.Tenants {
			t, ok := ks.Tenant(name)
			if !ok || slices.Contains(sk.Tenants, t.ID) {
				return fmt.Errorf("%w: tenant %.64q is not there, or named twice", session.ErrInvalid, name)
			}
			sk.Tenants = append(sk.Tenants, t.ID)
			e.Tenants = append(e.Tenants, t)
		}
		slices.Sort(sk.Tenants)
		if o.Global {
			e.Tenants = ks.Tenants
		}
		var err error
		if sk.Public, e.key, err = ed25519.GenerateKey(rand.Reader); err != nil {
			return err
		}
		if len(o.URLs) > 0 {
			if sk.Bus, e.NATS.NKeySeed, err = newBusKey(); err != nil {
				return err
			}
		}
		ks.Keys = append(ks.Keys, sk)
		b, err := e.marshal()
		if err != nil {
			return err
		}
		return writeFile(o.Path, b, true)
	})
	if err != nil {
		return nil, err
	}
	return e, nil
}

// newBusKey makes an NKey of its own: the server has its holder sign what the
// server chooses, which must never be an order.
func newBusKey() (pub ed25519.PublicKey, seed string, err error) {
	nk, err := nkeys.CreateUser()
	if err != nil {
		return nil, "", err
	}
	defer nk.Wipe()
	s, err := nk.Seed()
	if err != nil {
		return nil, "", err
	}
	text, err := nk.PublicKey()
	if err != nil {
		return nil, "", err
	}
	raw, err := nkeys.Decode(nkeys.PrefixByteUser, []byte(text))
	return raw, string(s), err
}

func (e *EmergencyKey) marshal() ([]byte, error) {
	out := emergencyJSON{Version: 1, KeyID: e.ID().String(), Root: e.Root, Key: e.key.Seed(), Orders: e.Orders, Global: e.Global, Tenants: e.Tenants}
	out.NATS.URLs, out.NATS.NKeySeed, out.NATS.CAs = e.NATS.URLs, e.NATS.NKeySeed, e.NATS.CAs
	b, err := json.MarshalIndent(out, "", "  ")
	if err != nil {
		return nil, errors.New("trust: key cannot be encoded") // the cause could show the key
	}
	return append(b, '\n'), nil
}

// LoadEmergencyKey reads what AddEmergency wrote. A file that others can read is
// refused.
func LoadEmergencyKey(path string) (*EmergencyKey, error) {
	b, err := readFile(path, true)
	if err != nil {
		return nil, fmt.Errorf("trust: emergency key: %w", err)
	}
	var in emergencyJSON
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	// The decoder's errors could quote what it read.
	bad := d.Decode(&in) != nil
	if _, err := d.Token(); bad || !errors.Is(err, io.EOF) || in.Version != 1 || len(in.Root) != ed25519.PublicKeySize ||
		len(in.Key) != ed25519.SeedSize || len(in.Tenants) == 0 || in.Orders == 0 || in.Orders > session.MaxOrders {
		return nil, fmt.Errorf("%w: %s is not an emergency key of version 1", ErrCorrupt, path)
	}
	return &EmergencyKey{
		Root: in.Root, Orders: in.Orders, Global: in.Global, Tenants: in.Tenants, key: ed25519.NewKeyFromSeed(in.Key),
		NATS: session.NATSAccess{URLs: in.NATS.URLs, NKeySeed: in.NATS.NKeySeed, CAs: in.NATS.CAs},
	}, nil
}

// WriteOrder writes a signed order to a new file of mode 0600. It fails with
// fs.ErrExist rather than replace one. In an enforcer's directory it is seen whole
// or not at all.
func WriteOrder(path string, frame []byte) error {
	if err := writeFile(path, frame, true); err != nil {
		return fmt.Errorf("trust: %w", err)
	}
	return nil
}

// ID returns the key's id.
func (e *EmergencyKey) ID() session.KeyID {
	return session.KeyIDOf(e.key.Public().(ed25519.PublicKey))
}

// String shows the id alone.
func (e *EmergencyKey) String() string { return "emergency key " + e.ID().String() }

// GoString shows the id alone.
func (e *EmergencyKey) GoString() string { return e.String() }

// Tenant finds a tenant that the key may kill, by name.
func (e *EmergencyKey) Tenant(name string) (session.Tenant, bool) {
	i := slices.IndexFunc(e.Tenants, func(t session.Tenant) bool { return t.Name == name })
	if i < 0 {
		return session.Tenant{}, false
	}
	return e.Tenants[i], true
}

// Sign signs an order for the deployment. What the key set would refuse is refused
// here, wrapping session.ErrInvalid, so that it is found out while there is time.
func (e *EmergencyKey) Sign(o session.Order) ([]byte, error) {
	o.Fabric = session.FabricOf(e.Root)
	switch {
	case o.Number > e.Orders:
		return nil, fmt.Errorf("%w: the key may sign %d orders, and this is number %d", session.ErrInvalid, e.Orders, o.Number)
	case !e.Global && !slices.ContainsFunc(e.Tenants, func(t session.Tenant) bool { return t.ID == o.Tenant }):
		return nil, fmt.Errorf("%w: the key may not kill that", session.ErrInvalid)
	}
	return session.SealOrder(&o, e.key)
}
