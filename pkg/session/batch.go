package session

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
)

var errUnnumbered = fmt.Errorf("%w: batch without epoch or number", ErrMalformed)

// MarshalBody returns the body of the batch's frame. It fails when the batch is
// one that UnmarshalBatch would refuse.
func (b *Batch) MarshalBody() ([]byte, error) {
	switch {
	case b.Epoch == 0 || b.Number == 0:
		return nil, errUnnumbered
	case len(b.Entries) > MaxBatchEntries || len(b.Decisions) > MaxBatchEntries:
		return nil, fmt.Errorf("%w: %d decisions, %d entries, at most %d", ErrMalformed, len(b.Decisions), len(b.Entries), MaxBatchEntries)
	case b.Time < 0 || b.Deadline < 0 || b.Horizon < 0:
		return nil, fmt.Errorf("%w: negative time", ErrMalformed)
	}
	if err := checkUnknown(b.Unknown); err != nil {
		return nil, err
	}
	w := writer{b: make([]byte, 0, 96+18*len(b.Decisions)+64*len(b.Entries))}
	w.u64(b.Epoch)
	w.u64(b.Number)
	w.raw(b.Prev[:])
	w.instant(b.Time)
	w.instant(b.Deadline)
	w.instant(b.Horizon)
	w.u16(uint16(len(b.Decisions)))
	covered := 0
	for _, d := range b.Decisions {
		w.raw(d.ID[:])
		w.u16(d.Count)
		covered += int(d.Count)
	}
	if covered > len(b.Entries) {
		return nil, fmt.Errorf("%w: decisions cover %d of %d entries", ErrMalformed, covered, len(b.Entries))
	}
	w.u16(uint16(len(b.Entries)))
	for i := range b.Entries {
		e := &b.Entries[i]
		if err := e.Validate(); err != nil {
			return nil, err
		}
		w.entry(e)
	}
	w.fields(nil, b.Unknown)
	return w.b, nil
}

// UnmarshalBatch parses a body. It refuses, wrapping ErrMalformed or
// ErrCritical, what MarshalBody would not have written, so that whatever parses
// marshals back to the same bytes.
func UnmarshalBatch(body []byte) (*Batch, error) {
	r := reader{b: body}
	b := &Batch{Epoch: r.u64(), Number: r.u64()}
	copy(b.Prev[:], r.take(len(b.Prev)))
	b.Time, b.Deadline, b.Horizon = r.instant(), r.instant(), r.instant()
	covered := 0
	for n := r.count(int(r.u16()), MaxBatchEntries, 18); n > 0 && r.err == nil; n-- {
		var d DecisionRef
		copy(d.ID[:], r.take(16))
		d.Count = r.u16()
		covered += int(d.Count)
		b.Decisions = append(b.Decisions, d)
	}
	n := r.count(int(r.u16()), MaxBatchEntries, minEntryLen)
	if covered > n {
		r.fail("decisions cover %d of %d entries", covered, n)
	}
	if n > 0 {
		b.Entries = make([]Entry, 0, n)
	}
	for ; n > 0 && r.err == nil; n-- {
		e := r.entry()
		if r.err == nil {
			r.err = e.Validate()
		}
		b.Entries = append(b.Entries, e)
	}
	b.Unknown = r.fields(refuseAll)
	if err := r.end(); err != nil {
		return nil, err
	}
	if b.Epoch == 0 || b.Number == 0 {
		return nil, errUnnumbered
	}
	return b, nil
}

// minEntryLen is the length of an entry without optional fields: operation,
// effect, reason, key, two instants, and the length of the fields.
const minEntryLen = 3 + 21 + 16 + 2

func (w *writer) entry(e *Entry) {
	w.u8(uint8(e.Op))
	w.u8(uint8(e.Effect))
	w.u8(uint8(e.Reason))
	w.key(e.Key)
	w.instant(e.IssuedBefore)
	w.instant(e.Expires)
	var known []Field
	if e.Incident != "" {
		known = append(known, Field{tagIncident, []byte(e.Incident)})
	}
	if e.ACR != "" {
		known = append(known, Field{tagACR, []byte(e.ACR)})
	}
	if len(e.Except) > 0 {
		var x writer
		for _, k := range e.Except {
			x.key(k)
		}
		known = append(known, Field{tagExcept, x.b})
	}
	if e.Share > 0 {
		known = append(known, Field{tagShare, binary.BigEndian.AppendUint16(nil, e.Share)})
	}
	if e.Drill {
		known = append(known, Field{tagDrill, nil})
	}
	w.fields(known, e.Unknown)
}

func (r *reader) entry() (e Entry) {
	e.Op, e.Effect, e.Reason = Op(r.u8()), Effect(r.u8()), Reason(r.u8())
	e.Key = r.key()
	e.IssuedBefore, e.Expires = r.instant(), r.instant()
	e.Unknown = r.fields(func(tag uint8, v *reader) bool {
		switch tag {
		case tagIncident, tagACR:
			if len(v.b) == 0 {
				v.fail("empty field")
			}
			s := string(v.take(min(len(v.b), MaxIncidentLen)))
			if tag == tagIncident {
				e.Incident = s
			} else {
				e.ACR = s
			}
		case tagExcept:
			if len(v.b) == 0 || len(v.b) > MaxExcept*21 {
				v.fail("exemptions")
			}
			for len(v.b) > 0 && v.err == nil {
				e.Except = append(e.Except, v.key())
			}
		case tagShare:
			if e.Share = v.u16(); e.Share == 0 {
				v.fail("share of nothing")
			}
		case tagDrill:
			e.Drill = true
		case tagIncident | critical, tagACR | critical, tagExcept &^ critical, tagShare &^ critical, tagDrill &^ critical:
			// Read as unknown, an exemption or a share that is not marked
			// critical would be kept and ignored.
			v.fail("tag %#02x has the wrong criticality", tag)
		default:
			return false
		}
		return true
	})
	return e
}

// Sum returns what a record under a key adds to the state digest. It is on the
// path of every entry that is applied, and does not allocate.
func (r *Record) Sum(k Key) StateDigest {
	// Through a writer's pointer, the buffer would escape.
	var buf [512]byte
	b := appendKey(buf[:0], k)
	drill := byte(0)
	if r.Drill {
		drill = 1
	}
	b = append(b, byte(r.Effect), byte(r.Reason), byte(r.Share>>8), byte(r.Share), drill)
	for _, v := range [...]uint64{uint64(r.IssuedBefore), uint64(r.Expires), uint64(r.Since), r.Seq} {
		b = binary.BigEndian.AppendUint64(b, v)
	}
	for _, s := range [...]string{r.Incident, r.ACR} {
		b = append(binary.BigEndian.AppendUint16(b, uint16(len(s))), s...)
	}
	for _, x := range r.Except {
		b = appendKey(b, x)
	}
	return sha256.Sum256(b)
}

func appendKey(b []byte, k Key) []byte {
	b = binary.BigEndian.AppendUint32(b, uint32(k.Tenant))
	return append(append(b, byte(k.Shape)), k.Digest[:]...)
}

// Plus adds s to the digest.
func (d *StateDigest) Plus(s StateDigest) {
	for i := 0; i < len(d); i += 8 {
		binary.BigEndian.PutUint64(d[i:], binary.BigEndian.Uint64(d[i:])+binary.BigEndian.Uint64(s[i:]))
	}
}

// Minus takes s out of the digest.
func (d *StateDigest) Minus(s StateDigest) {
	for i := 0; i < len(d); i += 8 {
		binary.BigEndian.PutUint64(d[i:], binary.BigEndian.Uint64(d[i:])-binary.BigEndian.Uint64(s[i:]))
	}
}

// PeekBatch reads the epoch and number of a batch's body, unverified, so that
// one that is known already need not be verified again.
func PeekBatch(body []byte) (epoch, number uint64, err error) {
	r := reader{b: body}
	epoch, number = r.u64(), r.u64()
	return epoch, number, r.err
}
