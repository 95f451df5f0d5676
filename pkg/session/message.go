package session

import (
	"encoding/binary"
	"fmt"
	"slices"
	"time"
)

// Heartbeat is the signed freshness lease: what the writer knows to be the head
// of the log, and how fresh that knowledge is.
type Heartbeat struct {
	Epoch  uint64
	Number uint64
	Head   Hash
	// State is the digest of the state at Number.
	State StateDigest
	// Writer changes with every start of a writer; Mono is that writer's
	// monotonic clock and means nothing across writers.
	Writer WriterID
	Mono   time.Duration
	// Proven is the age, at Mono, of the last quorum operation that proved this
	// writer to be the one, with this head.
	Proven time.Duration
	// Time is the writer's wall clock.
	Time Instant
	// KeySet is the version of the newest key set.
	KeySet uint64
	// Agents is the table of registered agents that the writer has published, if
	// that is what the registry says.
	Agents AgentsRef
	// Unknown holds fields of a later version.
	Unknown []Field
}

const tagAgents = 0x01

// WriterID identifies one run of a writer.
type WriterID [16]byte

// MarshalBody returns the body of the heartbeat's frame. What UnmarshalHeartbeat
// would refuse, such as a negative duration, it would refuse at the other end.
func (h *Heartbeat) MarshalBody() []byte {
	var w writer
	w.u64(h.Epoch)
	w.u64(h.Number)
	w.raw(h.Head[:])
	w.raw(h.State[:])
	w.raw(h.Writer[:])
	w.u64(uint64(h.Mono))
	w.u64(uint64(h.Proven))
	w.instant(h.Time)
	w.u64(h.KeySet)
	var known []Field
	if h.Agents.Version > 0 {
		known = append(known, Field{Tag: tagAgents, Value: append(binary.BigEndian.AppendUint64(nil, h.Agents.Version), h.Agents.Sum[:]...)})
	}
	w.fields(known, h.Unknown)
	return w.b
}

// UnmarshalHeartbeat parses a body. Errors wrap ErrMalformed or ErrCritical.
func UnmarshalHeartbeat(body []byte) (Heartbeat, error) {
	r := reader{b: body}
	h := Heartbeat{Epoch: r.u64(), Number: r.u64()}
	copy(h.Head[:], r.take(len(h.Head)))
	copy(h.State[:], r.take(len(h.State)))
	copy(h.Writer[:], r.take(len(h.Writer)))
	h.Mono, h.Proven = r.duration(), r.duration()
	h.Time, h.KeySet = r.instant(), r.u64()
	h.Unknown = r.fields(func(tag uint8, v *reader) bool {
		if tag != tagAgents {
			return false
		}
		h.Agents.Version = v.u64()
		copy(h.Agents.Sum[:], v.take(len(h.Agents.Sum)))
		if h.Agents.Version == 0 {
			v.fail("agents without a version")
		}
		return true
	})
	return h, r.end()
}

func refuseAll(uint8, *reader) bool { return false }

func (r *reader) duration() time.Duration {
	d := time.Duration(r.u64())
	if d < 0 {
		r.fail("negative duration")
	}
	return d
}

// Clock answers an enforcer's nonce, so that the enforcer can place the
// writer's monotonic and wall clock between two moments of its own.
type Clock struct {
	Nonce  [32]byte
	Writer WriterID
	Mono   time.Duration
	Time   Instant
	// Unknown holds fields of a later version.
	Unknown []Field
}

// MarshalBody returns the body of the answer's frame.
func (c *Clock) MarshalBody() []byte {
	var w writer
	w.raw(c.Nonce[:])
	w.raw(c.Writer[:])
	w.u64(uint64(c.Mono))
	w.instant(c.Time)
	w.fields(nil, c.Unknown)
	return w.b
}

// UnmarshalClock parses a body. Errors wrap ErrMalformed or ErrCritical.
func UnmarshalClock(body []byte) (Clock, error) {
	r := reader{b: body}
	var c Clock
	copy(c.Nonce[:], r.take(len(c.Nonce)))
	copy(c.Writer[:], r.take(len(c.Writer)))
	c.Mono, c.Time = r.duration(), r.instant()
	c.Unknown = r.fields(refuseAll)
	return c, r.end()
}

// Rejection says that a batch was heard but will never be in the log: the
// writer had been deposed, and its decisions were taken by another.
type Rejection struct {
	Epoch  uint64
	Number uint64
	Batch  Hash
	// Unknown holds fields of a later version.
	Unknown []Field
}

// MarshalBody returns the body of the rejection's frame.
func (x *Rejection) MarshalBody() []byte {
	var w writer
	w.u64(x.Epoch)
	w.u64(x.Number)
	w.raw(x.Batch[:])
	w.fields(nil, x.Unknown)
	return w.b
}

// UnmarshalRejection parses a body. Errors wrap ErrMalformed or ErrCritical.
func UnmarshalRejection(body []byte) (Rejection, error) {
	r := reader{b: body}
	x := Rejection{Epoch: r.u64(), Number: r.u64()}
	copy(x.Batch[:], r.take(len(x.Batch)))
	x.Unknown = r.fields(refuseAll)
	return x, r.end()
}

// Mode is how an enforcer acts on its verdicts.
type Mode uint8

const (
	// ModeStrict denies whenever it should. It is the default.
	ModeStrict Mode = 0
	// ModeBestEffort allows while the state is stale, except operations marked
	// strict. Coverage reports show it as exposed.
	ModeBestEffort Mode = 1
	// ModeShadow decides and reports but denies nobody. Coverage reports show
	// it as exposed.
	ModeShadow Mode = 2
)

// String returns the mode's name.
func (m Mode) String() string {
	switch m {
	case ModeStrict:
		return "strict"
	case ModeBestEffort:
		return "best-effort"
	case ModeShadow:
		return "shadow"
	}
	return fmt.Sprintf("mode-%d", uint8(m))
}

// ParseMode is the inverse of String; empty is ModeStrict.
func ParseMode(s string) (Mode, error) {
	for m := ModeStrict; m <= ModeShadow; m++ {
		if m.String() == s {
			return m, nil
		}
	}
	if s == "" {
		return ModeStrict, nil
	}
	return 0, fmt.Errorf("%w: unknown mode %q (want strict, best-effort or shadow)", ErrInvalid, clip(s))
}

// Exposed reports whether an enforcer in this mode can allow what it should
// deny.
func (m Mode) Exposed() bool { return m != ModeStrict }

// Applied says when an enforcer put a batch in force.
type Applied struct {
	Number uint64
	// At is in nanoseconds of the authority's wall clock, as the enforcer
	// estimates it.
	At int64
	// Cut is how many running calls the batch ended there.
	Cut uint32
}

// MaxApplied bounds the batches that one receipt times.
const MaxApplied = 256

// Receipt is an enforcer's signed statement of what it has applied. It is
// cumulative: each covers everything up to Number.
type Receipt struct {
	// Enforcer is the name under which it was enrolled.
	Enforcer string
	// Boot changes with every start of the enforcer; Count grows with each
	// receipt of a boot, so that an old one cannot be played again.
	Boot  WriterID
	Count uint64

	Epoch uint64
	// Number is the newest batch in force, provisional ones included, on the
	// chain that ends in Head.
	Number uint64
	Head   Hash
	// Confirmed is the newest batch known to be in the log.
	Confirmed uint64
	// At is the enforcer's estimate of the authority's wall clock, in
	// nanoseconds, when it signed, and Error how far it may be off.
	At    int64
	Error time.Duration
	// Batches are the batches put in force since the last receipt, oldest
	// first; the oldest are left out when there are more than MaxApplied.
	Batches []Applied

	Mode     Mode
	MaxStale time.Duration
	// Age is how old the state was at worst.
	Age time.Duration
	// Denying is set while the enforcer denies everything for staleness.
	Denying bool
	// Totals since boot.
	Cut      uint64 // running calls ended
	Running  uint64 // running calls bound now
	Denied   uint64 // checks denied
	Refused  uint64 // frames refused
	Foreign  uint64 // entries ignored because their signer has no right to the tenant
	Repairs  uint64 // gaps repaired from the log
	Diverged uint64 // times the state was found to differ and was rebuilt
	// Divergence is the last of those times; nil when there was none.
	Divergence *Divergence
	// Canary is the newest canary that was checked since the last receipt; nil
	// when there was none.
	Canary *Canary
	// Orders are the frames of emergency orders that are in force there and that
	// the authority has not adopted, at most MaxReceiptOrders.
	Orders [][]byte
	// Unknown holds fields of a later version.
	Unknown []Field
}

// DivergenceRanges is into how many ranges the keys are divided, by the first
// byte of their digests, to say where two states differ.
const DivergenceRanges = 256

// Divergence is what an enforcer knows of a state of its own whose digest was not
// the heartbeat's at the same batch.
type Divergence struct {
	Epoch  uint64 `json:"epoch"`
	Number uint64 `json:"number"`
	// Compared is set once the state has been held against the one that was
	// rebuilt at that batch. Ranges is then in how many of the DivergenceRanges
	// the two differ, and First the first of these; with none, it is the
	// authority's digest that differs from the log.
	Compared bool   `json:"compared"`
	Ranges   uint16 `json:"ranges"`
	First    uint8  `json:"first"`
}

// String says it in words.
func (d *Divergence) String() string {
	at := fmt.Sprintf("at seq %d of epoch %d", d.Number, d.Epoch)
	switch {
	case !d.Compared:
		return "the state differed " + at + ", where is not known"
	case d.Ranges == 0:
		return "the authority's digest differs from the log " + at
	}
	return fmt.Sprintf("the state differed %s, in %d of %d ranges, the first of them %#02x", at, d.Ranges, DivergenceRanges, d.First)
}

// tagDivergence is the field of a receipt that holds a Divergence.
const tagDivergence = 1

func (d *Divergence) field() []Field {
	if d == nil {
		return nil
	}
	var w writer
	w.u64(d.Epoch)
	w.u64(d.Number)
	var compared uint8
	if d.Compared {
		compared = 1
	}
	w.u8(compared)
	w.u16(d.Ranges)
	w.u8(d.First)
	return []Field{{Tag: tagDivergence, Value: w.b}}
}

func readDivergence(r *reader) *Divergence {
	d := &Divergence{Epoch: r.u64(), Number: r.u64()}
	compared := r.u8()
	d.Compared, d.Ranges, d.First = compared == 1, r.u16(), r.u8()
	if !d.valid() || compared > 1 {
		r.fail("divergence")
	}
	return d
}

// valid reports whether what says where is there only when it is known.
func (d *Divergence) valid() bool {
	return d.Ranges <= DivergenceRanges && (d.Compared || d.Ranges == 0) && (d.Ranges > 0 || d.First == 0) &&
		int(d.First)+int(d.Ranges) <= DivergenceRanges
}

var errNameless = fmt.Errorf("%w: receipt without the name of an enforcer", ErrMalformed)

// MarshalBody returns the body of the receipt's frame. It fails for a receipt
// that UnmarshalReceipt would refuse.
func (c *Receipt) MarshalBody() ([]byte, error) {
	switch {
	case !ValidEnforcerName(c.Enforcer):
		return nil, errNameless
	case len(c.Batches) > MaxApplied:
		return nil, fmt.Errorf("%w: receipt of %d batches", ErrMalformed, len(c.Batches))
	case c.Mode > ModeShadow || c.Error < 0 || c.MaxStale < 0 || c.Age < 0:
		return nil, fmt.Errorf("%w: receipt with %s or a negative duration", ErrMalformed, c.Mode)
	}
	if c.Divergence != nil && !c.Divergence.valid() {
		return nil, fmt.Errorf("%w: receipt with a divergence that cannot be", ErrMalformed)
	}
	orders, err := ordersField(c.Orders)
	if err == nil {
		err = checkUnknown(c.Unknown, tagDivergence, tagCanary, tagReceiptOrders)
	}
	if err != nil {
		return nil, err
	}
	var w writer
	w.text(c.Enforcer)
	w.raw(c.Boot[:])
	w.u64(c.Count)
	w.u64(c.Epoch)
	w.u64(c.Number)
	w.raw(c.Head[:])
	w.u64(c.Confirmed)
	w.u64(uint64(c.At))
	w.u64(uint64(c.Error))
	w.u16(uint16(len(c.Batches)))
	for _, b := range c.Batches {
		w.u64(b.Number)
		w.u64(uint64(b.At))
		w.u32(b.Cut)
	}
	w.u8(uint8(c.Mode))
	w.u64(uint64(c.MaxStale))
	w.u64(uint64(c.Age))
	var denying uint8
	if c.Denying {
		denying = 1
	}
	w.u8(denying)
	for _, v := range []uint64{c.Cut, c.Running, c.Denied, c.Refused, c.Foreign, c.Repairs, c.Diverged} {
		w.u64(v)
	}
	w.fields(slices.Concat(c.Divergence.field(), c.Canary.field(), orders), c.Unknown)
	return w.b, nil
}

// UnmarshalReceipt parses a body. Errors wrap ErrMalformed or ErrCritical.
func UnmarshalReceipt(body []byte) (*Receipt, error) {
	r := reader{b: body}
	c := &Receipt{Enforcer: r.text("enforcer", 64)}
	copy(c.Boot[:], r.take(len(c.Boot)))
	c.Count, c.Epoch, c.Number = r.u64(), r.u64(), r.u64()
	copy(c.Head[:], r.take(len(c.Head)))
	c.Confirmed = r.u64()
	c.At, c.Error = int64(r.u64()), r.duration()
	for n := r.count(int(r.u16()), MaxApplied, 20); n > 0 && r.err == nil; n-- {
		c.Batches = append(c.Batches, Applied{Number: r.u64(), At: int64(r.u64()), Cut: r.u32()})
	}
	c.Mode = Mode(r.u8())
	if c.Mode > ModeShadow {
		r.fail("%s", c.Mode)
	}
	c.MaxStale, c.Age = r.duration(), r.duration()
	switch r.u8() {
	case 0:
	case 1:
		c.Denying = true
	default:
		r.fail("flag")
	}
	for _, p := range []*uint64{&c.Cut, &c.Running, &c.Denied, &c.Refused, &c.Foreign, &c.Repairs, &c.Diverged} {
		*p = r.u64()
	}
	c.Unknown = r.fields(func(tag uint8, r *reader) bool {
		switch tag {
		case tagDivergence:
			c.Divergence = readDivergence(r)
		case tagCanary:
			c.Canary = readCanary(r)
		case tagReceiptOrders:
			c.Orders = readOrders(r)
		default:
			return false
		}
		return true
	})
	if err := r.end(); err != nil {
		return nil, err
	}
	if !ValidEnforcerName(c.Enforcer) {
		return nil, errNameless
	}
	return c, nil
}
