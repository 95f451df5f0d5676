package session

import (
	"encoding/binary"
	"fmt"
	"slices"
)

// writer appends the wire form. Integers are big-endian; see
// docs/design/wire.md.
type writer struct{ b []byte }

func (w *writer) u8(v uint8)        { w.b = append(w.b, v) }
func (w *writer) u16(v uint16)      { w.b = binary.BigEndian.AppendUint16(w.b, v) }
func (w *writer) u32(v uint32)      { w.b = binary.BigEndian.AppendUint32(w.b, v) }
func (w *writer) u64(v uint64)      { w.b = binary.BigEndian.AppendUint64(w.b, v) }
func (w *writer) instant(i Instant) { w.u64(uint64(i)) }
func (w *writer) raw(b []byte)      { w.b = append(w.b, b...) }
func (w *writer) text(s string)     { w.u16(uint16(len(s))); w.b = append(w.b, s...) }

func (w *writer) key(k Key) {
	w.u32(uint32(k.Tenant))
	w.u8(uint8(k.Shape))
	w.raw(k.Digest[:])
}

// fields writes the tagged fields of a record that are present, in the order of
// their tags.
func (w *writer) fields(known []Field, unknown []Field) {
	all := known
	if len(unknown) > 0 {
		all = append(slices.Clone(known), unknown...)
		slices.SortStableFunc(all, func(a, b Field) int { return int(a.Tag&^critical) - int(b.Tag&^critical) })
	}
	at := len(w.b)
	w.u16(0)
	for _, f := range all {
		w.u8(f.Tag)
		w.u16(uint16(len(f.Value)))
		w.raw(f.Value)
	}
	binary.BigEndian.PutUint16(w.b[at:], uint16(len(w.b)-at-2))
}

// checkUnknown reports, wrapping ErrMalformed, unknown fields that could not
// have been parsed. known are the tags that the record has fields for.
func checkUnknown(unknown []Field, known ...uint8) error {
	size := 0
	for i, f := range unknown {
		size += 3 + len(f.Value)
		switch {
		case i >= maxUnknown || size > maxUnknownLen:
			return fmt.Errorf("%w: unknown fields: %d, %d bytes", ErrMalformed, len(unknown), size)
		case f.Tag&critical != 0:
			return fmt.Errorf("%w: tag %#02x", ErrCritical, f.Tag)
		case i > 0 && unknown[i-1].Tag >= f.Tag:
			return fmt.Errorf("%w: unknown fields out of order", ErrMalformed)
		}
		for _, k := range known {
			if f.Tag == k&^critical {
				return fmt.Errorf("%w: tag %d is not an unknown one", ErrMalformed, f.Tag)
			}
		}
	}
	return nil
}

// reader consumes the wire form. The first error sticks; every read after it
// gives zero. Slices that it returns alias the input.
type reader struct {
	b   []byte
	err error
}

func (r *reader) fail(format string, a ...any) {
	if r.err == nil {
		r.err = fmt.Errorf("%w: %s", ErrMalformed, fmt.Sprintf(format, a...))
	}
}

func (r *reader) take(n int) []byte {
	if r.err != nil {
		return nil
	}
	if n < 0 || n > len(r.b) {
		r.fail("cut short")
		return nil
	}
	out := r.b[:n:n]
	r.b = r.b[n:]
	return out
}

func (r *reader) u8() uint8 {
	if b := r.take(1); b != nil {
		return b[0]
	}
	return 0
}

func (r *reader) u16() uint16 {
	if b := r.take(2); b != nil {
		return binary.BigEndian.Uint16(b)
	}
	return 0
}

func (r *reader) u32() uint32 {
	if b := r.take(4); b != nil {
		return binary.BigEndian.Uint32(b)
	}
	return 0
}

func (r *reader) u64() uint64 {
	if b := r.take(8); b != nil {
		return binary.BigEndian.Uint64(b)
	}
	return 0
}

func (r *reader) instant() Instant {
	i := Instant(r.u64())
	if i < 0 {
		r.fail("negative time")
	}
	return i
}

func (r *reader) text(what string, limit int) string {
	b := r.take(int(r.u16()))
	if len(b) == 0 {
		return ""
	}
	if err := checkText(what, string(b), limit); err != nil {
		r.fail("%v", err)
		return ""
	}
	return string(b)
}

func (r *reader) key() (k Key) {
	k.Tenant = TenantID(r.u32())
	k.Shape = Shape(r.u8())
	copy(k.Digest[:], r.take(16))
	return k
}

func (r *reader) end() error {
	if r.err == nil && len(r.b) > 0 {
		r.fail("%d bytes too many", len(r.b))
	}
	return r.err
}

// count reads a count of items that take at least size bytes each, so that a
// claimed count never makes us allocate more than the input could hold.
func (r *reader) count(n, limit, size int) int {
	if r.err != nil {
		return 0
	}
	if n > limit || n*size > len(r.b) {
		r.fail("count %d", n)
		return 0
	}
	return n
}

// Bounds of the fields of later versions that a record may carry: how many, and
// how long with their headers.
const (
	maxUnknown    = 16
	maxUnknownLen = 4096
)

// fields reads tagged fields in ascending order. known is called for each and
// reports whether it took it; one that it does not take is refused when
// critical, and kept otherwise.
func (r *reader) fields(known func(tag uint8, r *reader) bool) (unknown []Field) {
	sub := reader{b: r.take(int(r.u16())), err: r.err}
	last, size := -1, 0
	for len(sub.b) > 0 && sub.err == nil {
		tag := sub.u8()
		value := reader{b: sub.take(int(sub.u16())), err: sub.err}
		if sub.err != nil {
			break
		}
		if int(tag&^critical) <= last {
			sub.fail("fields out of order")
			break
		}
		last = int(tag &^ critical)
		raw := value.b
		switch {
		case known(tag, &value):
			if err := value.end(); err != nil {
				sub.err = err
			}
		case tag&critical != 0:
			sub.err = fmt.Errorf("%w: tag %#02x", ErrCritical, tag)
		case len(unknown) >= maxUnknown || size+3+len(raw) > maxUnknownLen:
			sub.fail("too many unknown fields")
		default:
			size += 3 + len(raw)
			unknown = append(unknown, Field{Tag: tag, Value: slices.Clone(raw)})
		}
	}
	if r.err == nil {
		r.err = sub.err
	}
	return unknown
}
