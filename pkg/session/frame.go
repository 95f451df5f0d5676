package session

import (
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
)

// Version is the version of the wire form that this package speaks.
//
//	1  2026-11: first form
const Version = 1

// MaxFrameLen bounds a frame in bytes.
const MaxFrameLen = 512 << 10

// FrameType says what a frame's body is.
type FrameType uint8

// The types of frame.
const (
	TypeKeySet    FrameType = 1  // root → all: whom to trust
	TypeBatch     FrameType = 2  // writer → log: decisions
	TypeHeartbeat FrameType = 3  // writer → enforcers: the freshness lease
	TypeClock     FrameType = 4  // writer → one enforcer: answer to a nonce
	TypeRejection FrameType = 5  // writer → enforcers: a batch that will never be in the log
	TypeReceipt   FrameType = 6  // enforcer → authority: what it has applied
	TypeForward   FrameType = 7  // authority → writer: a decision to be taken
	TypeSegment   FrameType = 8  // writer → enforcers: a published segment
	TypeReport    FrameType = 9  // enforcer → authority: calls and callers, sealed
	TypeAudit     FrameType = 10 // authority → its audit, and whoever verifies it
	TypeOrder     FrameType = 11 // emergency key → enforcers and authority: a kill outside the log
	TypeAgents    FrameType = 12 // writer → enforcers: the index of the table of registered agents
)

// KeyID names a public key by the first eight bytes of its SHA-256.
type KeyID [8]byte

// String returns the id in hex.
func (k KeyID) String() string { return hex.EncodeToString(k[:]) }

// KeyIDOf returns the id of a public key.
func KeyIDOf(pub ed25519.PublicKey) (id KeyID) {
	sum := sha256.Sum256(pub)
	copy(id[:], sum[:])
	return id
}

// Frame is a parsed frame whose signature has not been looked at yet.
type Frame struct {
	Type FrameType
	Key  KeyID
	Body []byte
	// content is what the signature and the hash are over.
	content   []byte
	signature []byte
}

const (
	frameMagic  = "ILK"
	frameHeader = len(frameMagic) + 1 + 1 + 8 + 4
	// signContext keeps a frame's signature from meaning anything elsewhere, and
	// orderContext keeps whatever else a key is made to sign from being an order.
	signContext  = "interlock frame 1\x00"
	orderContext = "interlock order 1\x00"
)

func contextOf(t FrameType) string {
	if t == TypeOrder {
		return orderContext
	}
	return signContext
}

// Seal signs body as a frame of the given type:
//
//	"ILK" | version | type | key id (8) | len(body) (4) | body | Ed25519 signature (64)
//
// The signature is over "interlock frame 1\0", or for TypeOrder "interlock order
// 1\0", and everything before it. Seal fails when the frame would be longer than MaxFrameLen, or key is not a whole
// key.
func Seal(t FrameType, body []byte, key ed25519.PrivateKey) ([]byte, error) {
	if len(key) != ed25519.PrivateKeySize {
		return nil, fmt.Errorf("%w: a signing key has %d bytes, not %d", ErrInvalid, len(key), ed25519.PrivateKeySize)
	}
	n := frameHeader + len(body) + ed25519.SignatureSize
	if n > MaxFrameLen {
		return nil, fmt.Errorf("%w: frame of %d bytes, at most %d", ErrMalformed, n, MaxFrameLen)
	}
	id := KeyIDOf(key.Public().(ed25519.PublicKey))
	context := contextOf(t)
	buf := make([]byte, len(context), len(context)+n)
	copy(buf, context)
	buf = append(buf, frameMagic...)
	buf = append(buf, Version, byte(t))
	buf = append(buf, id[:]...)
	buf = binary.BigEndian.AppendUint32(buf, uint32(len(body)))
	buf = append(buf, body...)
	buf = append(buf, ed25519.Sign(key, buf)...)
	return buf[len(context):], nil
}

// ParseFrame takes the frame apart without believing any of it. The frame
// aliases b. Errors wrap ErrVersion or ErrMalformed.
func ParseFrame(b []byte) (Frame, error) {
	switch {
	case len(b) > MaxFrameLen:
		return Frame{}, fmt.Errorf("%w: %d bytes, at most %d", ErrMalformed, len(b), MaxFrameLen)
	case len(b) < len(frameMagic)+1 || string(b[:len(frameMagic)]) != frameMagic:
		return Frame{}, fmt.Errorf("%w: not a frame", ErrMalformed)
	case b[len(frameMagic)] != Version:
		return Frame{}, fmt.Errorf("%w %d, this is version %d", ErrVersion, b[len(frameMagic)], Version)
	case len(b) < frameHeader+ed25519.SignatureSize:
		return Frame{}, fmt.Errorf("%w: cut short", ErrMalformed)
	}
	f := Frame{Type: FrameType(b[4])}
	copy(f.Key[:], b[5:13])
	n := int(binary.BigEndian.Uint32(b[13:17]))
	if n != len(b)-frameHeader-ed25519.SignatureSize {
		return Frame{}, fmt.Errorf("%w: body of %d bytes in a frame of %d", ErrMalformed, n, len(b))
	}
	end := frameHeader + n
	f.Body, f.content, f.signature = b[frameHeader:end:end], b[:end:end], b[end:]
	return f, nil
}

// Verify reports whether pub signed the frame.
func (f *Frame) Verify(pub ed25519.PublicKey) error {
	if len(pub) != ed25519.PublicKeySize || KeyIDOf(pub) != f.Key {
		return ErrSignature
	}
	context := contextOf(f.Type)
	msg := make([]byte, 0, len(context)+len(f.content))
	msg = append(append(msg, context...), f.content...)
	if !ed25519.Verify(pub, msg, f.signature) {
		return ErrSignature
	}
	return nil
}

// Hash returns the SHA-256 of the signed content, which is what the next batch
// of the chain names as its Prev.
func (f *Frame) Hash() Hash { return sha256.Sum256(f.content) }
