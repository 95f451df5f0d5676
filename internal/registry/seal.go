package registry

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/ecdh"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"

	"github.com/interlock-fabric/interlock/pkg/session"
)

// Keys are the sealing keys. trust.Store is one.
type Keys interface {
	KeySet() *session.KeySet
	Sealing(id session.KeyID) (*ecdh.PrivateKey, bool)
}

// A message of the registry's streams:
//
//	"ILR" | version | kind | key id (8) | nonce (12) | number (8) | prev (32) | AES-256-GCM
//
// Everything before the ciphertext is authenticated with it. The key is derived
// (HKDF-SHA-256) from the private half of the sealing key: whoever can read the
// log is who may write it, and nobody else.
const (
	magic      = "ILR"
	version    = 1
	nonceLen   = 12
	headerLen  = len(magic) + 2 + 8 + nonceLen + 8 + 32
	keyContext = "interlock registry 1"

	// maxPlain bounds what is sealed in one message.
	maxPlain = 448 << 10
	maxSeal  = headerLen + maxPlain + 16
)

type messageKind uint8

const (
	kindBatch    messageKind = 1 // number is the batch's, prev the hash of the one before
	kindChunk    messageKind = 2 // number is its place, prev the snapshot's name
	kindManifest messageKind = 3
)

// errForeign: the message is not of this registry, or was altered.
var errForeign = errors.New("registry: not a message of this registry")

// nonceOf is the nonce of a message of at least headerLen bytes.
func nonceOf(b []byte) [nonceLen]byte { return [nonceLen]byte(b[13 : 13+nonceLen]) }

type header struct {
	kind   messageKind
	number uint64
	prev   [32]byte
}

// sealer keeps the derived keys.
type sealer struct {
	keys Keys
	mu   sync.Mutex
	have map[session.KeyID]cipher.AEAD
}

func (s *sealer) aead(id session.KeyID) (cipher.AEAD, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if a := s.have[id]; a != nil {
		return a, nil
	}
	private, ok := s.keys.Sealing(id)
	if !ok {
		return nil, fmt.Errorf("%w: %s", ErrKey, id)
	}
	key, err := hkdf.Key(sha256.New, private.Bytes(), nil, keyContext, 32)
	if err != nil {
		return nil, fmt.Errorf("registry: %w", err)
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, fmt.Errorf("registry: %w", err)
	}
	a, err := cipher.NewGCM(block)
	if err != nil {
		return nil, fmt.Errorf("registry: %w", err)
	}
	if s.have == nil {
		s.have = map[session.KeyID]cipher.AEAD{}
	}
	s.have[id] = a
	return a, nil
}

func (s *sealer) seal(h header, plain []byte) ([]byte, error) {
	if len(plain) > maxPlain {
		return nil, fmt.Errorf("%w: %d bytes", ErrTooLarge, len(plain))
	}
	public, ok := s.keys.KeySet().AuditKey()
	if !ok {
		return nil, fmt.Errorf("%w: the key set has none", ErrKey)
	}
	id := session.KeyIDOf(public)
	a, err := s.aead(id)
	if err != nil {
		return nil, err
	}
	b := make([]byte, 0, headerLen+len(plain)+a.Overhead())
	b = append(b, magic...)
	b = append(b, version, byte(h.kind))
	b = append(b, id[:]...)
	nonce := b[len(b) : len(b)+nonceLen]
	if _, err := rand.Read(nonce); err != nil {
		return nil, fmt.Errorf("registry: %w", err)
	}
	b = b[:len(b)+nonceLen]
	b = binary.BigEndian.AppendUint64(b, h.number)
	b = append(b, h.prev[:]...)
	return a.Seal(b, nonce, plain, b), nil
}

// open verifies a message. Errors wrap errForeign for what no authority wrote,
// ErrKey when its key is one of the key set's and not here, and ErrUpgrade.
func (s *sealer) open(b []byte) (header, []byte, error) {
	fail := func(err error) (header, []byte, error) { return header{}, nil, err }
	if len(b) < headerLen || len(b) > maxSeal || string(b[:len(magic)]) != magic {
		return fail(errForeign)
	}
	h := header{kind: messageKind(b[4])}
	var id session.KeyID
	copy(id[:], b[5:])
	at := 5 + len(id) + nonceLen
	nonce := b[at-nonceLen : at]
	h.number = binary.BigEndian.Uint64(b[at:])
	copy(h.prev[:], b[at+8:])
	a, err := s.aead(id)
	if errors.Is(err, ErrKey) && !s.named(id) {
		return fail(errForeign)
	}
	if err != nil {
		return fail(err)
	}
	plain, err := a.Open(nil, nonce, b[headerLen:], b[:headerLen])
	if err != nil {
		return fail(errForeign)
	}
	if b[3] != version {
		return fail(fmt.Errorf("%w: version %d", ErrUpgrade, b[3]))
	}
	return h, plain, nil
}

// named reports whether the key set names the key: then somebody has it.
func (s *sealer) named(id session.KeyID) bool {
	for _, k := range s.keys.KeySet().Keys {
		if session.KeyIDOf(k.Public) == id {
			return true
		}
	}
	return false
}
