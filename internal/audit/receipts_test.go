package audit

import (
	"bytes"
	"crypto/ed25519"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/interlock-fabric/interlock/pkg/authority"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// evidence is a deployment's receipts for two decisions, and the enforcers' keys.
func evidence(t *testing.T) (*store, *Receipts, map[string]ed25519.PrivateKey) {
	t.Helper()
	s := newStore(t)
	keys := map[string]ed25519.PrivateKey{}
	at := time.Date(2026, 11, 22, 9, 0, 0, 0, time.UTC)
	x := &Receipts{Decisions: []Decision{
		{Epoch: 1, Number: 5, At: at, Operation: "revoke", Incident: "INC-1"}, {Epoch: 1, Number: 7, At: at.Add(time.Second), Operation: "kill", Drill: true},
	}}
	for i, name := range []string{"a", "b", "c"} {
		keys[name] = ed25519.NewKeyFromSeed(bytes.Repeat([]byte{byte(i + 1)}, 32))
		x.Enforcers = append(x.Enforcers, Enforcer{name, public(keys[name])})
	}
	x.Frames = [][]byte{
		receipt(t, "b", keys["b"], 1, session.Applied{Number: 5, At: at.Add(9 * time.Millisecond).UnixNano(), Cut: 2}),
		receipt(t, "a", keys["a"], 1, session.Applied{Number: 5, At: at.Add(3 * time.Millisecond).UnixNano()}, session.Applied{Number: 7, At: at.Add(time.Second - time.Millisecond).UnixNano()}),
		receipt(t, "a", keys["a"], 2, session.Applied{Number: 5, At: at.Add(time.Hour).UnixNano()}), // a rebuild
	}
	return s, x, keys
}

func receipt(t *testing.T, name string, key ed25519.PrivateKey, count uint64, batches ...session.Applied) []byte {
	t.Helper()
	r := session.Receipt{Enforcer: name, Boot: session.WriterID{1}, Count: count, Epoch: 1, Number: 9, Confirmed: 9, At: 1, Error: time.Millisecond, Batches: batches}
	body, err := r.MarshalBody()
	must(t, err)
	frame, err := session.Seal(session.TypeReceipt, body, key)
	must(t, err)
	return frame
}

func (s *store) writeReceipts(x *Receipts) []byte {
	s.Helper()
	key, err := s.keys.Signer(session.InstantOf(time.Now()))
	must(s, err)
	var b bytes.Buffer
	must(s, WriteReceipts(&b, x, s.keys.Frame(), 1, key))
	return b.Bytes()
}

func (s *store) verifyReceipts(file []byte) *ReceiptsReport {
	s.Helper()
	r, err := VerifyReceipts(bytes.NewReader(file), s.keys.Root(), nil)
	must(s, err)
	return r
}

// Receipts say who applied what, when, and who has none.
func TestReceipts(t *testing.T) {
	s, x, keys := evidence(t)
	r := s.verifyReceipts(s.writeReceipts(x))
	if !r.Sound || r.Receipts != 3 || len(r.Decisions) != 2 {
		t.Fatalf("%+v", r)
	}
	one, two := r.Decisions[0], r.Decisions[1]
	if len(one.Applied) != 2 || one.Applied[0].Enforcer != "a" || one.Applied[0].LatencyMillis != 3 || one.Applied[1].Cut != 2 || one.Applied[1].LatencyMillis != 9 ||
		one.Applied[1].ErrorMillis != 1 || fmt.Sprint(one.Silent) != "[c]" || one.Incident != "INC-1" {
		t.Errorf("%+v", one)
	}
	if len(two.Applied) != 1 || two.Applied[0].LatencyMillis != 0 || fmt.Sprint(two.Silent) != "[b c]" || !two.Drill {
		t.Errorf("%+v", two)
	}
	// Not even the authority can make an enforcer say what it did not.
	for _, tt := range []struct {
		name, want string
		frames     [][]byte
	}{
		{"signed by another", "did not sign", [][]byte{receipt(t, "a", keys["b"], 9)}},
		{"of nobody", "not in the roster", [][]byte{receipt(t, "d", keys["a"], 9)}},
		{"twice", "there twice", [][]byte{x.Frames[0], x.Frames[0]}},
		{"no receipt", "not a receipt", [][]byte{s.keys.Frame()}},
		{"garbage", "not a receipt", [][]byte{[]byte("x")}},
	} {
		forged := *x
		forged.Frames = tt.frames
		if r := s.verifyReceipts(s.writeReceipts(&forged)); r.Sound || !strings.Contains(fmt.Sprint(r.Faults), tt.want) {
			t.Errorf("%s: %+v", tt.name, r)
		}
	}
	_, signer, err := ed25519.GenerateKey(nil)
	must(t, err)
	var b bytes.Buffer
	must(t, WriteReceipts(&b, x, s.keys.Frame(), 1, signer))
	if r := s.verifyReceipts(b.Bytes()); r.Sound || !strings.Contains(fmt.Sprint(r.Faults), "not signed by a key that may") {
		t.Errorf("by a stranger: %+v", r)
	}
	// The end of one kind of export is none of the other.
	l := s.open()
	must(t, l.Append(s.ctx, record(1)))
	if r := s.verifyReceipts(s.export(l, authority.AuditQuery{})); r.Sound {
		t.Error("an export of the audit passes for one of receipts")
	}
	if r := s.verify(s.writeReceipts(x)); r.Sound {
		t.Error("an export of receipts passes for one of the audit")
	}
}

// Every single-byte change is found, as is every line that is missing, moved or
// there twice, and every truncation.
func TestEveryByteOfReceiptsCounts(t *testing.T) {
	t.Parallel()
	s, x, _ := evidence(t)
	file := s.writeReceipts(x)
	root := s.keys.Root()
	tried := 0
	for i := range file {
		was := file[i]
		for _, b := range []byte{was ^ 1, was ^ 0x20, '\n', '"'} {
			if b == was {
				continue
			}
			file[i] = b
			tried++
			r, err := VerifyReceipts(bytes.NewReader(file), root, nil)
			file[i] = was
			if err != nil && !errors.Is(err, ErrNotExport) || err == nil && (r.Sound || len(r.Faults) == 0) {
				t.Fatalf("byte %d is %q instead of %q, and nobody notices: %v", i, b, was, err)
			}
		}
	}
	t.Logf("%d changes of %d bytes", tried, len(file))
	for n := range len(file) {
		if r, err := VerifyReceipts(bytes.NewReader(file[:n]), root, nil); err == nil && r.Sound {
			t.Fatalf("truncated to %d of %d bytes, and nobody notices", n, len(file))
		}
	}
	lines := bytes.SplitAfter(file, []byte("\n"))
	lines = lines[:len(lines)-1]
	for i := range lines {
		for name, changed := range map[string][][]byte{
			"missing": slices.Concat(lines[:i], lines[i+1:]),
			"twice":   slices.Concat(lines[:i+1], lines[i:]),
		} {
			if r, err := VerifyReceipts(bytes.NewReader(bytes.Join(changed, nil)), root, nil); err == nil && r.Sound {
				t.Errorf("line %d %s, and nobody notices", i+1, name)
			}
		}
		if i > 0 {
			swapped := slices.Clone(lines)
			swapped[i-1], swapped[i] = swapped[i], swapped[i-1]
			if r, err := VerifyReceipts(bytes.NewReader(bytes.Join(swapped, nil)), root, nil); err == nil && r.Sound {
				t.Errorf("lines %d and %d in each other's place, and nobody notices", i, i+1)
			}
		}
	}
}
