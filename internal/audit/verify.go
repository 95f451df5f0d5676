package audit

import (
	"bufio"
	"bytes"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"time"

	"github.com/interlock-fabric/interlock/pkg/session"
)

const (
	// maxLine bounds a line of an export, newline included: a key set or a batch's
	// statement in base64.
	maxLine = 1 << 20
	// maxFaults bounds the faults that are told; those behind are counted.
	maxFaults = 100
)

// ErrNotExport: the file is not an export, or of another deployment's authority,
// so that nothing in it could be verified.
var ErrNotExport = errors.New("audit: not an export that the root vouches for")

// Fault is something that is wrong with an export.
type Fault struct {
	// Line is of the file, from 1; Record is the number of the record, 0 when it
	// is none's.
	Line   int    `json:"line"`
	Record uint64 `json:"record,omitempty"`
	What   string `json:"what"`
}

// String is one line.
func (f Fault) String() string {
	if f.Record != 0 {
		return fmt.Sprintf("record %d (line %d): %s", f.Record, f.Line, f.What)
	}
	return fmt.Sprintf("line %d: %s", f.Line, f.What)
}

// Report says what the verification of an export found.
type Report struct {
	// Sound is set when the export is what the authority signed, whole.
	Sound bool `json:"sound"`
	// First and Last are the numbers of the first and the last record, Records
	// how many there are with their content, Omitted how many by their digest.
	First   uint64 `json:"first"`
	Last    uint64 `json:"last"`
	Records uint64 `json:"records"`
	Omitted uint64 `json:"omitted"`
	// Floor is the oldest record that the authority kept: what is before it was
	// removed by its retention. Partial is set when the export was not asked to
	// begin there.
	Floor   uint64 `json:"floor"`
	Partial bool   `json:"partial"`
	// Filter is what the export was asked for, as the authority signed it, and
	// Tenants those whose view it is; empty is everything. What is omitted did not
	// match, or was not theirs.
	Filter  string   `json:"filter,omitempty"`
	Tenants []string `json:"tenants,omitempty"`
	// Signed is when the authority signed the export, and Key the id of the key
	// that it did so with; KeySet the version of the key set by which that is
	// trusted.
	Signed time.Time `json:"signed"`
	Key    string    `json:"key,omitempty"`
	KeySet uint64    `json:"keyset"`
	// Withdrawn counts statements on the way by keys that have been withdrawn
	// since. They prove nothing by themselves.
	Withdrawn int     `json:"withdrawn"`
	Faults    []Fault `json:"faults"`
	More      int     `json:"more_faults,omitempty"`
}

func (r *Report) fault(line int, record uint64, format string, a ...any) {
	if len(r.Faults) == maxFaults {
		r.More++
		return
	}
	r.Faults = append(r.Faults, Fault{line, record, fmt.Sprintf(format, a...)})
}

// lines reads a file of lines, and sums up those before the last one read.
type lines struct {
	r    *bufio.Reader
	h    hash.Hash
	line []byte // without its newline
	n    int
	cut  bool // the last line has no newline
}

func newLines(r io.Reader) *lines { return &lines{r: bufio.NewReader(r), h: sha256.New()} }

// next reads a line; false at the end. Errors are the reader's.
func (l *lines) next() (bool, error) {
	if l.n > 0 {
		_, _ = l.h.Write(l.line) // never fails
		_, _ = l.h.Write([]byte("\n"))
	}
	l.line = l.line[:0]
	var err error
	for {
		var part []byte
		part, err = l.r.ReadSlice('\n')
		if l.line = append(l.line, part...); len(l.line) > maxLine {
			return false, fmt.Errorf("%w: line %d is longer than %d bytes", ErrNotExport, l.n+1, maxLine)
		}
		if !errors.Is(err, bufio.ErrBufferFull) {
			break
		}
	}
	switch {
	case errors.Is(err, io.EOF) && len(l.line) == 0:
		return false, nil
	case err != nil && !errors.Is(err, io.EOF):
		return false, err
	}
	l.n++
	l.cut = err != nil
	l.line = bytes.TrimSuffix(l.line, []byte("\n"))
	return true, nil
}

// decode reads the line into v, if it is v's only spelling.
func (l *lines) decode(v any) error {
	d := json.NewDecoder(bytes.NewReader(l.line))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return errors.New("it is not a line of an export")
	}
	if again, err := marshal(v); err != nil || !bytes.Equal(again, l.line) {
		return errors.New("it is not spelled as the authority does")
	}
	return nil
}

// keySet reads the key set of the first line, which the root must have signed. It
// is judged as of when it was issued: an export outlives it.
func (l *lines) keySet(root ed25519.PublicKey, newer []byte) (*session.KeySet, error) {
	ok, err := l.next()
	if err != nil {
		return nil, err
	}
	var named versionLine
	if ok && bytes.HasPrefix(l.line, []byte(`{"keyset_version":`)) && l.decode(&named) == nil {
		if newer == nil {
			return nil, fmt.Errorf("%w: it is a view of some tenants, and has no key set: give that of the authority", ErrNotExport)
		}
		over, err := trusted(root, newer)
		if err == nil && over.Version < named.Version {
			err = fmt.Errorf("%w: the key set given is older than the export's", ErrNotExport)
		}
		return over, err
	}
	var in keySetLine
	if !ok || l.decode(&in) != nil {
		return nil, fmt.Errorf("%w: it does not begin with a key set", ErrNotExport)
	}
	ks, err := trusted(root, in.KeySet)
	if err != nil || newer == nil {
		return ks, err
	}
	over, err := trusted(root, newer)
	if err != nil {
		return nil, err
	}
	if over.Version < ks.Version {
		return nil, fmt.Errorf("%w: the key set given is older than the export's", ErrNotExport)
	}
	return over, nil
}

func trusted(root ed25519.PublicKey, frame []byte) (*session.KeySet, error) {
	t, err := session.NewTrust(root)
	if err != nil {
		return nil, fmt.Errorf("audit: %w", err)
	}
	f, err := session.ParseFrame(frame)
	if err != nil {
		return nil, fmt.Errorf("%w: key set: %w", ErrNotExport, err)
	}
	ks, err := session.UnmarshalKeySet(f.Body)
	if err != nil {
		return nil, fmt.Errorf("%w: key set: %w", ErrNotExport, err)
	}
	if _, err := t.Update(frame, ks.Issued); err != nil {
		return nil, fmt.Errorf("%w: key set: %w", ErrNotExport, err)
	}
	return ks, nil
}

// Verify reads an export and says what of it is not as the authority signed it.
// root is the deployment's, from a source other than the export. newer, if not
// nil, is the frame of a key set by which to judge instead of by the export's:
// one that knows of keys that were withdrawn since. Errors wrap ErrNotExport, or
// are r's; what is wrong with an export that can be read is in the report.
func Verify(r io.Reader, root ed25519.PublicKey, newer []byte) (*Report, error) {
	in := newLines(r)
	ks, err := in.keySet(root, newer)
	if err != nil {
		return nil, err
	}
	v := &verification{rep: &Report{Faults: []Fault{}, KeySet: ks.Version}, ks: ks}
	ended, err := in.each(v.rep, v.line)
	if err != nil {
		return nil, err
	}
	if !ended {
		v.rep.fault(in.n, v.number, "the export is truncated: nothing is known of what comes after this, and nothing vouches for what is before")
	}
	v.rep.Last = v.number
	v.rep.Sound = ended && len(v.rep.Faults) == 0
	return v.rep, nil
}

// each hands on the lines up to the one that ends the export, and notes what is
// behind it. It reports whether there was such a line.
func (l *lines) each(rep *Report, line func(*lines) bool) (ended bool, err error) {
	for {
		ok, err := l.next()
		if !ok || err != nil {
			return ended, err
		}
		if ended {
			rep.fault(l.n, 0, "it is behind the end of the export")
			continue
		}
		ended = line(l)
		if l.cut {
			rep.fault(l.n, 0, "the file is cut off within the line")
		}
	}
}

// verification is how far an export has been verified.
type verification struct {
	rep    *Report
	ks     *session.KeySet
	number uint64
	hash   session.Hash
	first  session.Hash // before the first record
}

// line takes a line and reports whether it is the last.
func (v *verification) line(in *lines) bool {
	switch {
	case bytes.HasPrefix(in.line, []byte(`{"n":`)):
		v.record(in)
	case bytes.HasPrefix(in.line, []byte(`{"statement":`)):
		var l statementLine
		if err := in.decode(&l); err != nil {
			v.rep.fault(in.n, 0, "%v", err)
			return false
		}
		st, key, err := stated(l.Statement, forBatch, v.ks)
		switch {
		case err != nil:
			v.rep.fault(in.n, 0, "the statement is not signed by a key that may: %v", err)
		case st.Number != v.number || session.Hash(st.Hash) != v.hash:
			v.rep.fault(in.n, v.number, "what is before it is not what was signed when record %d was stored", st.Number)
		case key.Withdrawn:
			v.rep.Withdrawn++
		}
	case bytes.HasPrefix(in.line, []byte(`{"end":`)):
		v.end(in)
		return true
	default:
		v.rep.fault(in.n, 0, "it is not a line of an export")
	}
	return false
}

func (v *verification) record(in *lines) {
	var l recordLine
	if err := in.decode(&l); err != nil || (l.Digest == nil) == (l.Body == nil) || l.Number == 0 {
		v.rep.fault(in.n, l.Number, "it is not a record as the authority writes one")
		return
	}
	switch {
	case v.number == 0:
		v.rep.First, v.first = l.Number, session.Hash(l.Prev)
	case l.Number > v.number+1:
		v.rep.fault(in.n, l.Number, "records %d to %d are missing before it, or moved", v.number+1, l.Number-1)
	case l.Number <= v.number:
		v.rep.fault(in.n, l.Number, "it comes after record %d: moved, or there twice", v.number)
	case session.Hash(l.Prev) != v.hash:
		v.rep.fault(in.n, v.number, "it was changed, or record %d, which names its hash", l.Number)
	}
	e := entry{number: l.Number, prev: session.Hash(l.Prev)}
	if l.Digest != nil {
		v.rep.Omitted++
		e.digest = session.Hash(*l.Digest)
	} else {
		v.rep.Records++
		e.digest = sha256.Sum256(l.Body)
	}
	v.number, v.hash = l.Number, e.hash()
}

func (v *verification) end(in *lines) {
	var l endLine
	if err := in.decode(&l); err != nil {
		v.rep.fault(in.n, 0, "%v", err)
		return
	}
	st, key, err := stated(l.End, forExport, v.ks)
	if err != nil {
		v.rep.fault(in.n, 0, "the end is not signed by a key that may: %v", err)
		return
	}
	v.rep.Floor, v.rep.Partial, v.rep.Signed, v.rep.Key = st.Floor, st.Partial, st.Time.Time(), session.KeyIDOf(key.Public).String()
	v.rep.Filter, v.rep.Tenants = st.Filter, st.Tenants
	if key.Withdrawn {
		v.rep.fault(in.n, 0, "the end is signed by key %s, which has been withdrawn", v.rep.Key)
	}
	var whole sum
	in.h.Sum(whole[:0])
	switch {
	case st.Number > v.number:
		v.rep.fault(in.n, v.number, "records %d to %d are missing behind it", v.number+1, st.Number)
	case st.Number < v.number:
		v.rep.fault(in.n, v.number, "it is behind record %d, the last that the authority signed", st.Number)
	case session.Hash(st.Hash) != v.hash:
		v.rep.fault(in.n, v.number, "it was changed, or one before it: the authority signed another hash")
	}
	switch {
	case v.number == 0:
	case st.First != v.rep.First:
		v.rep.fault(in.n, v.rep.First, "the export as it was signed began with record %d", st.First)
	case session.Hash(st.Prev) != v.first:
		v.rep.fault(in.n, v.rep.First, "it does not go on from what the authority signed")
	case !st.Partial && st.First > st.Floor:
		v.rep.fault(in.n, st.First, "records %d to %d are missing before it: the authority had lost them", st.Floor, st.First-1)
	case st.First == st.Floor && st.Prev != st.Below:
		v.rep.fault(in.n, st.First, "it does not go on from what retention removed")
	}
	if whole != st.Sum && len(v.rep.Faults) == 0 {
		v.rep.fault(in.n, 0, "the file is not, byte for byte, what was signed")
	}
}
