package session

import (
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"math"
	"slices"
)

// Bounds of emergency orders.
const (
	// MaxOrders is how many orders one emergency key may sign at most, and
	// MaxKeySetOrders how many all the keys of a key set together.
	MaxOrders       = 64
	MaxKeySetOrders = 1024
	// MaxOrderLen bounds an order's frame in bytes.
	MaxOrderLen = 1024
	// MaxOrderReasonLen bounds an order's reason in bytes.
	MaxOrderReasonLen = 256
	// MaxReceiptOrders bounds the orders of one receipt.
	MaxReceiptOrders = 8
)

// FabricTenant is the tenant number under which the fabric keeps its own books in
// the state: no tenant has it, and no identity matches an entry under it.
const FabricTenant TenantID = math.MaxUint32

// orderKill is the one thing that can be ordered.
const orderKill = 1

// Order is a kill outside the log, signed by an emergency key for the hour in
// which no authority answers: it suspends a tenant, or everything, until the
// authority has adopted it and lifts it, or the root withdraws the key. Which
// tenants, and how many orders, the key set fixes.
type Order struct {
	// Fabric is FabricOf the root: the deployment that the order is for.
	Fabric Hash
	// Number is from 1 to the key's SigningKey.Orders. A number is used once.
	Number uint16
	// Tenant is what is killed; zero is everything.
	Tenant TenantID
	// Time is when it was signed, by the signer's clock. Nothing depends on it.
	Time Instant
	// Incident ends up in every denial; 1 to MaxIncidentLen bytes.
	Incident string
	// Reason is why, in the signer's words, for the audit; 1 to
	// MaxOrderReasonLen bytes.
	Reason string
	// Unknown holds fields of a later version.
	Unknown []Field
}

// OrderID names an order: a key signs one under each number.
type OrderID struct {
	Key    KeyID
	Number uint16
}

// String returns the key's id and the number.
func (id OrderID) String() string { return fmt.Sprintf("%s/%d", id.Key, id.Number) }

// SignedOrder is an order with the frame that it came in.
type SignedOrder struct {
	Order
	ID   OrderID
	Hash Hash
	// Frame is the whole of it; it must not be changed.
	Frame []byte

	parsed Frame
}

// FabricOf names the deployment with that root key.
func FabricOf(root ed25519.PublicKey) Hash {
	return sha256.Sum256(append([]byte("interlock fabric 1\x00"), root...))
}

// Target is the key of what the order kills.
func (o *Order) Target() Key {
	if o.Tenant == 0 {
		return GlobalKey()
	}
	return TenantKey(o.Tenant)
}

// Entry is the kill.
func (o *Order) Entry() Entry {
	return Entry{Op: OpSet, Effect: EffectSuspended, Reason: ReasonKill, Key: o.Target(), Incident: o.Incident}
}

// Spent is the key under which the log says that the order of that id has been
// adopted. From then on it has no force of its own, here and wherever it turns up
// later: what is in the log instead decides.
func (id OrderID) Spent() Key {
	b := append([]byte("interlock order spent 1\x00"), id.Key[:]...)
	sum := sha256.Sum256(binary.BigEndian.AppendUint16(b, id.Number))
	k := Key{Tenant: FabricTenant, Shape: Shape(KindCredential)}
	copy(k.Digest[:], sum[:])
	return k
}

// Adopted are the entries of the decision that adopts the order: the kill, and
// that the order is spent, which is never lifted.
func (s *SignedOrder) Adopted() []Entry {
	return []Entry{
		s.Entry(),
		{Op: OpSet, Effect: EffectRevoked, Reason: ReasonKill, Key: s.ID.Spent(), Incident: s.Incident},
	}
}

func (o *Order) validate() error {
	bad := func(format string, a ...any) error {
		return fmt.Errorf("%w: order: %s", ErrMalformed, fmt.Sprintf(format, a...))
	}
	switch {
	case o.Number == 0 || o.Number > MaxOrders:
		return bad("number %d, it is from 1 to %d", o.Number, MaxOrders)
	case o.Tenant == FabricTenant:
		return bad("tenant %d is nobody's", o.Tenant)
	case o.Time <= 0:
		return bad("without its time")
	case o.Incident == "" || o.Reason == "":
		return bad("without incident or reason")
	}
	if err := checkText("incident", o.Incident, MaxIncidentLen); err != nil {
		return bad("%v", err)
	}
	if err := checkText("reason", o.Reason, MaxOrderReasonLen); err != nil {
		return bad("%v", err)
	}
	return checkUnknown(o.Unknown)
}

// MarshalBody returns the body of the order's frame. It fails for what
// UnmarshalOrder would refuse.
func (o *Order) MarshalBody() ([]byte, error) {
	if err := o.validate(); err != nil {
		return nil, err
	}
	var w writer
	w.raw(o.Fabric[:])
	w.u8(orderKill)
	w.u16(o.Number)
	w.u32(uint32(o.Tenant))
	w.instant(o.Time)
	w.text(o.Incident)
	w.text(o.Reason)
	w.fields(nil, o.Unknown)
	return w.b, nil
}

// UnmarshalOrder parses a body. Errors wrap ErrMalformed or ErrCritical.
func UnmarshalOrder(body []byte) (*Order, error) {
	r := reader{b: body}
	o := &Order{}
	copy(o.Fabric[:], r.take(len(o.Fabric)))
	if op := r.u8(); op != orderKill && r.err == nil {
		return nil, fmt.Errorf("%w: order of operation %d", ErrCritical, op)
	}
	o.Number, o.Tenant, o.Time = r.u16(), TenantID(r.u32()), r.instant()
	o.Incident, o.Reason = r.text("incident", MaxIncidentLen), r.text("reason", MaxOrderReasonLen)
	o.Unknown = r.fields(refuseAll)
	if err := r.end(); err != nil {
		return nil, err
	}
	if err := o.validate(); err != nil {
		return nil, err
	}
	return o, nil
}

// ParseOrder takes an order apart without believing any of it. It aliases b.
// Errors wrap ErrFrame.
func ParseOrder(b []byte) (*SignedOrder, error) {
	if len(b) > MaxOrderLen {
		return nil, fmt.Errorf("%w: order of %d bytes, at most %d", ErrMalformed, len(b), MaxOrderLen)
	}
	f, err := ParseFrame(b)
	if err != nil {
		return nil, err
	}
	if f.Type != TypeOrder {
		return nil, fmt.Errorf("%w: not an order", ErrMalformed)
	}
	o, err := UnmarshalOrder(f.Body)
	if err != nil {
		return nil, err
	}
	return &SignedOrder{Order: *o, ID: OrderID{f.Key, o.Number}, Hash: f.Hash(), Frame: b, parsed: f}, nil
}

// SealOrder signs an order with an emergency key. Whether the key may sign it is
// for the key set to say.
func SealOrder(o *Order, key ed25519.PrivateKey) ([]byte, error) {
	body, err := o.MarshalBody()
	if err != nil {
		return nil, err
	}
	b, err := Seal(TypeOrder, body, key)
	if err == nil && len(b) > MaxOrderLen {
		err = fmt.Errorf("%w: order of %d bytes, at most %d", ErrMalformed, len(b), MaxOrderLen)
	}
	return b, err
}

// Order verifies an order: an emergency key of the newest key set that is not
// withdrawn signed it, for this deployment, within the tenants and the count that
// the key set fixes. Whether its number was used before, the caller knows. A key
// set that has ended counts here: an order only denies, and time must not lift it.
// Errors wrap ErrUntrusted or ErrSignature.
func (t *Trust) Order(s *SignedOrder) error {
	bad := func(format string, a ...any) error {
		return fmt.Errorf("%w: order %s: %s", ErrUntrusted, s.ID, fmt.Sprintf(format, a...))
	}
	c := t.current.Load()
	if c == nil {
		return fmt.Errorf("%w: no key set yet", ErrUntrusted)
	}
	k := c.keys[s.ID.Key]
	switch {
	case k == nil || k.Use != UseEmergency:
		return bad("no emergency key of key set %d", c.set.Version)
	case k.Withdrawn:
		return bad("the key is withdrawn")
	case s.Fabric != FabricOf(t.root):
		return bad("it is for another deployment")
	case s.Number > k.Orders:
		return bad("the key may sign %d", k.Orders)
	case !k.May(s.Target()):
		return bad("the key may not kill %s", s.Target())
	}
	return s.parsed.Verify(k.Public)
}

// tagReceiptOrders is the field of a receipt that holds Receipt.Orders.
const tagReceiptOrders = 4

func ordersField(frames [][]byte) ([]Field, error) {
	if len(frames) == 0 {
		return nil, nil
	}
	var w writer
	for _, b := range frames {
		if len(b) == 0 || len(b) > MaxOrderLen || len(frames) > MaxReceiptOrders {
			return nil, fmt.Errorf("%w: %d orders of a receipt, one of %d bytes", ErrMalformed, len(frames), len(b))
		}
		w.u16(uint16(len(b)))
		w.raw(b)
	}
	return []Field{{Tag: tagReceiptOrders, Value: w.b}}, nil
}

func readOrders(r *reader) (frames [][]byte) {
	for first := true; first || len(r.b) > 0 && r.err == nil; first = false {
		b := r.take(int(r.u16()))
		if len(b) == 0 || len(b) > MaxOrderLen || len(frames) == MaxReceiptOrders {
			r.fail("orders of a receipt")
			return nil
		}
		frames = append(frames, slices.Clone(b))
	}
	return frames
}
