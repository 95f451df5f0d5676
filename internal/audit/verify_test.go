package audit

import (
	"bytes"
	"crypto/ecdh"
	"crypto/ed25519"
	"errors"
	"fmt"
	"math/rand/v2"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/interlock-fabric/interlock/pkg/authority"
	"github.com/interlock-fabric/interlock/pkg/natsfeed"
	"github.com/interlock-fabric/interlock/pkg/session"
)

func s2(*store) func(session.KeyID) (*ecdh.PrivateKey, bool) {
	return func(session.KeyID) (*ecdh.PrivateKey, bool) { return nil, false }
}

func signs(k ed25519.PrivateKey) func(session.Instant) (ed25519.PrivateKey, error) {
	return func(session.Instant) (ed25519.PrivateKey, error) { return k, nil }
}

func public(k ed25519.PrivateKey) ed25519.PublicKey { return k.Public().(ed25519.PublicKey) }

// sample is an export with records, omitted ones, and statements on the way.
func sample(t *testing.T) (*store, []byte) {
	s := newStore(t)
	l := s.open()
	for i := range 6 {
		r := record(i)
		if i%3 == 2 {
			r.Incident = "INC-2"
		}
		must(t, l.Append(s.ctx, r))
	}
	b, _, err := (&reader{l: l, s: stream(s), ks: s.keys.KeySet(), first: 1, last: 6, at: l.at}).batch(s.ctx, 3)
	must(t, err)
	// One as a long export has every thousand records.
	file := s.export(l, authority.AuditQuery{Incident: "INC-1"})
	lines := bytes.SplitAfter(file, []byte("\n"))
	var out bytes.Buffer
	e := newExport(&out)
	for i, line := range lines[:len(lines)-2] {
		_, err := e.w.Write(line)
		must(t, err)
		if i == 3 {
			must(t, e.line(statementLine{b.frame}))
		}
	}
	st := &statement{For: forExport, First: 1, Floor: 1, Number: l.at.Number, Hash: l.at.Hash, Time: 1}
	key, err := s.keys.Signer(session.InstantOf(s.keys.KeySet().Issued.Time()))
	must(t, err)
	must(t, e.end(st, key))
	if r := s.verify(out.Bytes()); !r.Sound || r.Records != 4 || r.Omitted != 2 || r.Last != 6 {
		t.Fatalf("%+v", r)
	}
	return s, out.Bytes()
}

var numbered = regexp.MustCompile(`^\{"n":(\d+),`)

// Every single-byte change of an export is found, and so is which record it is
// in. It fails without the check of the spelling, of the links, or of the sum.
func TestEveryByteCounts(t *testing.T) {
	t.Parallel()
	s, file := sample(t)
	everyByteCounts(t, file, s.keys.Root(), nil, 1)
}

// So does it in an export for those who may see a part of it.
func TestEveryByteOfAViewCounts(t *testing.T) {
	t.Parallel()
	s, _ := sample(t)
	var b bytes.Buffer
	n := 0
	view := &View{Tenants: []string{"acme"}, Show: func(*authority.AuditRecord) (bool, bool) { n++; return n%3 == 0, true }}
	must(t, s.open().Export(s.ctx, authority.AuditQuery{}, view, &b))
	r, err := Verify(bytes.NewReader(b.Bytes()), s.keys.Root(), s.keys.Frame())
	if err != nil || !r.Sound || r.Records == 0 || r.Omitted == 0 || len(r.Tenants) != 1 {
		t.Fatalf("%+v, %v", r, err)
	}
	everyByteCounts(t, b.Bytes(), s.keys.Root(), s.keys.Frame(), 7) // what differs is few lines
}

func everyByteCounts(t *testing.T, file []byte, root ed25519.PublicKey, keySet []byte, step int) {
	t.Helper()
	line, of := 1, map[int]uint64{}
	for i, l := range bytes.Split(file, []byte("\n")) {
		if m := numbered.FindSubmatch(l); m != nil {
			of[i+1], _ = strconv.ParseUint(string(m[1]), 10, 64)
		}
	}
	rng := rand.New(rand.NewPCG(1, 2))
	tried := 0
	for i := range file {
		was := file[i]
		for _, b := range []byte{was ^ 1, was ^ 0x20, byte(rng.IntN(256))} {
			if b == was || i%step != 0 {
				continue
			}
			file[i] = b
			tried++
			r, err := Verify(bytes.NewReader(file), root, keySet)
			file[i] = was
			if err != nil {
				if line != 1 || !errors.Is(err, ErrNotExport) {
					t.Fatalf("byte %d of line %d: %v", i, line, err)
				}
				continue
			}
			if r.Sound || len(r.Faults) == 0 {
				t.Fatalf("byte %d, in line %d, is %q instead of %q, and nobody notices", i, line, b, was)
			}
			if n := of[line]; n != 0 && !slices.ContainsFunc(r.Faults, func(f Fault) bool { return f.Record == n || f.Line == line }) {
				t.Fatalf("byte %d of record %d changed: %v", i, n, r.Faults)
			}
		}
		if was == '\n' {
			line++
		}
	}
	t.Logf("%d changes of %d bytes", tried, len(file))
	for n := 0; n < len(file); n += step {
		if r, err := Verify(bytes.NewReader(file[:n]), root, keySet); err == nil && r.Sound {
			t.Fatalf("truncated to %d of %d bytes, and nobody notices", n, len(file))
		}
	}
}

// Records that are missing, moved or there twice are found by their numbers.
func TestLinesThatMove(t *testing.T) {
	s, file := sample(t)
	all := bytes.SplitAfter(bytes.TrimSuffix(file, []byte("\n")), []byte("\n"))
	all[len(all)-1] = append(bytes.Clone(all[len(all)-1]), '\n')
	// keyset, 1, 2, 3, statement, 4, 5, 6, end
	pick := func(at ...int) (out []byte) {
		for _, i := range at {
			out = append(out, all[i]...)
		}
		return out
	}
	for _, tt := range []struct {
		name, want string
		file       []byte
	}{
		{"the first is missing", "began with record 1", pick(0, 2, 3, 4, 5, 6, 7, 8)},
		{"one is missing", "record 3 (line 3): records 2 to 2 are missing before it", pick(0, 1, 3, 4, 5, 6, 7, 8)},
		{"two are missing", "records 4 to 5 are missing", pick(0, 1, 2, 3, 4, 7, 8)},
		{"the last is missing", "records 6 to 6 are missing behind it", pick(0, 1, 2, 3, 4, 5, 6, 8)},
		{"all are missing", "records 1 to 6 are missing", pick(0, 8)},
		{"two have changed places", "record 4 (line 7): it comes after record 5", pick(0, 1, 2, 3, 4, 6, 5, 7, 8)},
		{"one is there twice", "record 2 (line 4): it comes after record 2", pick(0, 1, 2, 2, 3, 4, 5, 6, 7, 8)},
		{"the end is missing", "truncated", pick(0, 1, 2, 3, 4, 5, 6, 7)},
		{"something behind the end", "behind the end", pick(0, 1, 2, 3, 4, 5, 6, 7, 8, 1)},
		{"the statement is missing", "byte for byte", pick(0, 1, 2, 3, 5, 6, 7, 8)},
		{"the statement is elsewhere", "is not what was signed", pick(0, 1, 2, 3, 5, 4, 6, 7, 8)},
		{"the statement is in place of the end", "truncated", pick(0, 1, 2, 3, 4)},
	} {
		r := s.verify(tt.file)
		if r.Sound || !strings.Contains(fmt.Sprint(r.Faults), tt.want) {
			t.Errorf("%s: %v", tt.name, r.Faults)
		}
	}
	// One that leaves records out and is closed by another export's end.
	other, third := sample(t)
	if _, err := Verify(bytes.NewReader(third), s.keys.Root(), nil); !errors.Is(err, ErrNotExport) {
		t.Errorf("of another deployment: %v", err)
	}
	if _, err := Verify(bytes.NewReader(pick(0, 8)), other.keys.Root(), nil); !errors.Is(err, ErrNotExport) {
		t.Errorf("by another root: %v", err)
	}
	for _, b := range [][]byte{nil, []byte("\n"), []byte("{}"), bytes.Repeat([]byte("x"), maxLine+1), pick(1)} {
		if _, err := Verify(bytes.NewReader(b), s.keys.Root(), nil); !errors.Is(err, ErrNotExport) {
			t.Errorf("%.20q: %v", b, err)
		}
	}
}

// Whatever is given to it, Verify neither fails otherwise than it says nor finds
// sound what is not the sample.
func FuzzVerify(f *testing.F) {
	f.Add([]byte(`{"keyset":""}` + "\n"))
	root := make(ed25519.PublicKey, ed25519.PublicKeySize)
	f.Fuzz(func(t *testing.T, b []byte) {
		if r, err := Verify(bytes.NewReader(b), root, nil); err == nil && r.Sound {
			t.Fatal("sound, by a root that signed nothing")
		}
	})
}

func TestLongRecords(t *testing.T) {
	r := record(0)
	r.Detail = strings.Repeat("é\x00", 1000)
	for range 5000 {
		r.Targets = append(r.Targets, strings.Repeat(`"`, 1000))
		r.Callers = append(r.Callers, authority.AuditCaller{Agent: strings.Repeat(`\`, 500)})
	}
	b, err := encode(r)
	must(t, err)
	if len(b) > maxRecord {
		t.Errorf("%d bytes", len(b))
	}
	s := newStore(t)
	l := s.open()
	must(t, l.Append(s.ctx, r))
	p, err := l.Records(s.ctx, authority.AuditQuery{}, nil)
	must(t, err)
	got := p.Records[0]
	if len(got.Targets)+got.Left != 5001 || len(got.Targets) == 0 || len(got.Detail) > authority.MaxAuditText {
		t.Errorf("%d targets, %d left out, detail of %d", len(got.Targets), got.Left, len(got.Detail))
	}
	r.Callers, r.Targets = nil, nil
	for range 3000 {
		r.Receipts = append(r.Receipts, authority.AuditedReceipt{Frame: make([]byte, 100)})
	}
	if err := l.Append(s.ctx, r); !errors.Is(err, ErrTooLong) {
		t.Errorf("%v", err)
	}
}

func stream(s *store) jetstream.Stream {
	s.Helper()
	st, err := s.js.Stream(s.ctx, natsfeed.AuditStream)
	must(s, err)
	return st
}
