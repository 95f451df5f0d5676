package audit

import (
	"bytes"
	"crypto/ecdh"
	"crypto/ed25519"
	"crypto/hpke"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"github.com/interlock-fabric/interlock/pkg/session"
)

// A batch is stored as
//
//	len(frame) (4) | frame | key id (8) | HPKE enc (32) | ciphertext
//
// with the statement in the frame, and the records' bodies, joined by newlines,
// in the ciphertext. The statement has the SHA-256 of all that follows the frame.

const (
	sealInfo  = "interlock audit 1\x00"
	sealedMin = len(session.KeyID{}) + 32
)

// Reasons for which a stored message is not part of the chain.
var (
	errStray   = errors.New("it does not go on from the chain")
	errForeign = errors.New("no key that may speak for the audit signed it")
	// ErrSealed: the audit, or a part of it, is sealed to a key that is not here.
	ErrSealed = errors.New("audit: sealed to a key that is not here: copy keys/audit-*.key from where it was made")
)

// sign returns the frame of a statement.
func sign(st *statement, key ed25519.PrivateKey) ([]byte, error) {
	body, err := marshal(st)
	if err != nil {
		return nil, err
	}
	return session.Seal(session.TypeAudit, body, key)
}

// speaker returns the key of the key set that signed a frame, if it may speak
// for the audit: a writer's for all tenants, withdrawn ones included.
func speaker(f *session.Frame, ks *session.KeySet) (*session.SigningKey, error) {
	if ks == nil || f.Type != session.TypeAudit {
		return nil, errForeign
	}
	i := slices.IndexFunc(ks.Keys, func(k session.SigningKey) bool {
		return k.Use == session.UseWriter && k.Tenants == nil && session.KeyIDOf(k.Public) == f.Key
	})
	if i < 0 {
		return nil, errForeign
	}
	if err := f.Verify(ks.Keys[i].Public); err != nil {
		return nil, err
	}
	return &ks.Keys[i], nil
}

// stated parses a frame and verifies who signed it.
func stated(frame []byte, purpose string, ks *session.KeySet) (*statement, *session.SigningKey, error) {
	f, err := session.ParseFrame(frame)
	if err != nil {
		return nil, nil, err
	}
	key, err := speaker(&f, ks)
	if err != nil {
		return nil, nil, err
	}
	var st statement
	d := json.NewDecoder(bytes.NewReader(f.Body))
	if err := d.Decode(&st); err != nil || st.For != purpose {
		return nil, nil, fmt.Errorf("%w: not a statement for %s", session.ErrMalformed, purpose)
	}
	return &st, key, nil
}

// seal makes a message of a statement and the bodies that it covers. It sets the
// statement's Sum.
func seal(st *statement, bodies [][]byte, to []byte, signer ed25519.PrivateKey) ([]byte, error) {
	pub, err := ecdh.X25519().NewPublicKey(to)
	if err != nil {
		return nil, fmt.Errorf("audit: sealing key: %w", err)
	}
	key, err := hpke.NewDHKEMPublicKey(pub)
	if err != nil {
		return nil, fmt.Errorf("audit: sealing key: %w", err)
	}
	enc, sender, err := hpke.NewSender(key, hpke.HKDFSHA256(), hpke.AES256GCM(), []byte(sealInfo))
	if err != nil {
		return nil, fmt.Errorf("audit: sealing: %w", err)
	}
	cipher, err := sender.Seal(nil, bytes.Join(bodies, []byte("\n")))
	if err != nil {
		return nil, fmt.Errorf("audit: sealing: %w", err)
	}
	id := session.KeyIDOf(to)
	sealed := slices.Concat(id[:], enc, cipher)
	st.Sum = sha256.Sum256(sealed)
	frame, err := sign(st, signer)
	if err != nil {
		return nil, fmt.Errorf("audit: signing: %w", err)
	}
	return slices.Concat(binary.BigEndian.AppendUint32(nil, uint32(len(frame))), frame, sealed), nil
}

// split takes a message apart, unverified.
func split(msg []byte) (frame, sealed []byte, err error) {
	if len(msg) < 4 {
		return nil, nil, fmt.Errorf("%w: not a batch of the audit", session.ErrMalformed)
	}
	n := int(binary.BigEndian.Uint32(msg))
	if n > session.MaxFrameLen || n > len(msg)-4-sealedMin {
		return nil, nil, fmt.Errorf("%w: not a batch of the audit", session.ErrMalformed)
	}
	return msg[4 : 4+n], msg[4+n:], nil
}

// batch is a stored message whose signature and sum have been verified.
type batch struct {
	statement
	key    *session.SigningKey
	frame  []byte
	sealed []byte
}

func parse(msg []byte, ks *session.KeySet) (*batch, error) {
	frame, sealed, err := split(msg)
	if err != nil {
		return nil, err
	}
	st, key, err := stated(frame, forBatch, ks)
	if err != nil {
		return nil, err
	}
	if sha256.Sum256(sealed) != st.Sum || st.First == 0 || st.Number < st.First || st.Floor > st.First {
		return nil, fmt.Errorf("%w: a batch that contradicts itself", session.ErrMalformed)
	}
	return &batch{*st, key, frame, sealed}, nil
}

// entry is a record in its place.
type entry struct {
	number       uint64
	prev, digest session.Hash
	body         []byte
}

func (e *entry) hash() session.Hash { return link(e.number, e.prev, e.digest) }

// open unseals the records of a batch and chains them, which must lead to what
// the statement says.
func (b *batch) open(sealing func(session.KeyID) (*ecdh.PrivateKey, bool)) ([]entry, error) {
	var id session.KeyID
	copy(id[:], b.sealed)
	priv, ok := sealing(id)
	if !ok {
		return nil, ErrSealed
	}
	key, err := hpke.NewDHKEMPrivateKey(priv)
	if err != nil {
		return nil, fmt.Errorf("audit: %w", err)
	}
	rec, err := hpke.NewRecipient(b.sealed[len(id):sealedMin], key, hpke.HKDFSHA256(), hpke.AES256GCM(), []byte(sealInfo))
	if err != nil {
		return nil, fmt.Errorf("audit: %w", session.ErrSealed)
	}
	plain, err := rec.Open(nil, b.sealed[sealedMin:])
	if err != nil {
		return nil, fmt.Errorf("audit: %w", session.ErrSealed)
	}
	prev, number := session.Hash(b.Prev), b.First
	var out []entry
	for body := range bytes.SplitSeq(plain, []byte("\n")) {
		e := entry{number: number, prev: prev, digest: sha256.Sum256(body), body: body}
		prev, number = e.hash(), number+1
		out = append(out, e)
	}
	if number != b.Number+1 || prev != session.Hash(b.Hash) {
		return nil, fmt.Errorf("audit: %w: records %d to %d are not what was signed", session.ErrMalformed, b.First, b.Number)
	}
	return out, nil
}
