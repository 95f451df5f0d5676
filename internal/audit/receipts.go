package audit

import (
	"cmp"
	"crypto/ed25519"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/interlock-fabric/interlock/pkg/session"
)

// MaxReceipts bounds the receipts of one export, and MaxReceiptDecisions the
// decisions that they are of.
const (
	MaxReceipts         = 100_000
	MaxReceiptDecisions = 1000
)

// Enforcer is an enforcer of the roster, and the key with which it signs.
type Enforcer struct {
	Name string            `json:"name"`
	Key  ed25519.PublicKey `json:"key"`
}

// Decision is a decision of the log that receipts are to be of.
type Decision struct {
	Epoch     uint64    `json:"epoch"`
	Number    uint64    `json:"seq"`
	At        time.Time `json:"at"`
	Operation string    `json:"operation"`
	Incident  string    `json:"incident,omitempty"`
	Drill     bool      `json:"drill,omitempty"`
}

// Receipts is what an export of receipts says, oldest first.
type Receipts struct {
	// Enforcers are those in the roster at the export: whoever is not among those
	// that applied a decision is among these.
	Enforcers []Enforcer
	Decisions []Decision
	Frames    [][]byte
}

// The lines of an export of receipts, beside those of every export.
type (
	enforcerLine struct {
		Enforcer Enforcer `json:"enforcer"`
	}
	decisionLine struct {
		Decision Decision `json:"decision"`
	}
	receiptLine struct {
		Receipt []byte `json:"receipt"`
	}
)

// WriteReceipts writes receipts as JSON lines that VerifyReceipts reads. keySet
// is the frame of the key set in force, signer the authority's key.
func WriteReceipts(w io.Writer, x *Receipts, keySet []byte, version uint64, signer ed25519.PrivateKey) error {
	out := newExport(w)
	if err := out.line(keySetLine{keySet}); err != nil {
		return err
	}
	for _, e := range x.Enforcers {
		if err := out.line(enforcerLine{e}); err != nil {
			return err
		}
	}
	for _, d := range x.Decisions {
		d.At = d.At.UTC()
		if err := out.line(decisionLine{d}); err != nil {
			return err
		}
	}
	for _, f := range x.Frames {
		if err := out.line(receiptLine{f}); err != nil {
			return err
		}
	}
	return out.end(&statement{For: forReceipts, Number: uint64(len(x.Frames)), Time: session.InstantOf(time.Now()), KeySet: version}, signer)
}

// ReceiptsReport says what receipts prove.
type ReceiptsReport struct {
	// Sound is set when every receipt is as its enforcer signed it, and the export
	// as the authority signed it.
	Sound  bool      `json:"sound"`
	Signed time.Time `json:"signed"`
	Key    string    `json:"key,omitempty"`
	KeySet uint64    `json:"keyset"`
	// Receipts is how many there are.
	Receipts  int             `json:"receipts"`
	Decisions []ProvenApplied `json:"decisions"`
	Faults    []Fault         `json:"faults"`
	More      int             `json:"more_faults,omitempty"`
}

// ProvenApplied is where a decision was applied, by what enforcers signed.
type ProvenApplied struct {
	Decision
	// Applied has the enforcers that say when they put it in force, the fastest
	// first. Silent are those in the roster of which there is no such receipt.
	Applied []ProvenBy `json:"applied"`
	Silent  []string   `json:"silent"`
}

// ProvenBy is an enforcer's word.
type ProvenBy struct {
	Enforcer string `json:"enforcer"`
	// At is on the authority's clock, as the enforcer estimates it, and
	// ErrorMillis how far it may be off. LatencyMillis counts from the decision.
	At            time.Time `json:"at"`
	ErrorMillis   float64   `json:"error_millis"`
	LatencyMillis float64   `json:"latency_millis"`
	// Cut is how many running calls that ended, Mode how the enforcer acts on it.
	Cut  uint32 `json:"cut"`
	Mode string `json:"mode"`
}

// VerifyReceipts reads an export of receipts; root, newer and errors are as for
// Verify.
func VerifyReceipts(r io.Reader, root ed25519.PublicKey, newer []byte) (*ReceiptsReport, error) {
	in := newLines(r)
	ks, err := in.keySet(root, newer)
	if err != nil {
		return nil, err
	}
	v := &receiptVerification{
		rep: &ReceiptsReport{KeySet: ks.Version, Decisions: []ProvenApplied{}}, faults: &Report{Faults: []Fault{}}, ks: ks,
		keys: map[string]ed25519.PublicKey{}, seen: map[session.Hash]bool{},
	}
	ended, err := in.each(v.faults, v.line)
	if err != nil {
		return nil, err
	}
	if !ended {
		v.faults.fault(in.n, 0, "the export is truncated: the authority vouches for none of it")
	}
	v.conclude()
	v.rep.Faults, v.rep.More = v.faults.Faults, v.faults.More
	v.rep.Sound = ended && len(v.rep.Faults) == 0
	return v.rep, nil
}

type receiptVerification struct {
	rep    *ReceiptsReport
	faults *Report // for its faults
	ks     *session.KeySet
	keys   map[string]ed25519.PublicKey
	names  []string
	seen   map[session.Hash]bool
}

func (v *receiptVerification) line(in *lines) (last bool) {
	var l struct {
		Enforcer *Enforcer `json:"enforcer,omitempty"`
		Decision *Decision `json:"decision,omitempty"`
		Receipt  []byte    `json:"receipt,omitempty"`
		End      []byte    `json:"end,omitempty"`
	}
	if err := in.decode(&l); err != nil {
		v.faults.fault(in.n, 0, "%v", err)
		return false
	}
	switch {
	case l.Enforcer != nil:
		if len(l.Enforcer.Key) != ed25519.PublicKeySize || !session.ValidEnforcerName(l.Enforcer.Name) || v.keys[l.Enforcer.Name] != nil {
			v.faults.fault(in.n, 0, "it is not an enforcer of a roster, or there twice")
			return false
		}
		v.keys[l.Enforcer.Name] = l.Enforcer.Key
		v.names = append(v.names, l.Enforcer.Name)
	case l.Decision != nil:
		if len(v.rep.Decisions) == MaxReceiptDecisions {
			v.faults.fault(in.n, 0, "there are more than %d decisions", MaxReceiptDecisions)
			return false
		}
		v.rep.Decisions = append(v.rep.Decisions, ProvenApplied{Decision: *l.Decision, Applied: []ProvenBy{}, Silent: []string{}})
	case l.Receipt != nil:
		if v.rep.Receipts++; v.rep.Receipts > MaxReceipts {
			v.faults.fault(in.n, 0, "there are more than %d receipts", MaxReceipts)
			return false
		}
		if err := v.receipt(l.Receipt); err != nil {
			v.faults.fault(in.n, 0, "%v", err)
		}
	case l.End != nil:
		v.end(in, l.End)
		return true
	}
	return false
}

func (v *receiptVerification) receipt(frame []byte) error {
	f, err := session.ParseFrame(frame)
	if err != nil {
		return fmt.Errorf("not a receipt: %w", err)
	}
	r, err := session.UnmarshalReceipt(f.Body)
	if f.Type != session.TypeReceipt || err != nil {
		return fmt.Errorf("not a receipt: %w", cmp.Or(err, session.ErrMalformed))
	}
	key, ok := v.keys[r.Enforcer]
	if !ok {
		return fmt.Errorf("a receipt of %s, which is not in the roster that comes with it", r.Enforcer)
	}
	if err := f.Verify(key); err != nil {
		return fmt.Errorf("a receipt in the name of %s that %s did not sign, or that was changed", r.Enforcer, r.Enforcer)
	}
	if v.seen[f.Hash()] {
		return fmt.Errorf("a receipt of %s that is there twice", r.Enforcer)
	}
	v.seen[f.Hash()] = true
	for i := range v.rep.Decisions {
		d := &v.rep.Decisions[i]
		if d.Epoch != r.Epoch {
			continue
		}
		for _, b := range r.Batches {
			// What is applied again, as after a rebuild, was in force before.
			if b.Number != d.Number || slices.ContainsFunc(d.Applied, func(p ProvenBy) bool { return p.Enforcer == r.Enforcer }) {
				continue
			}
			at := time.Unix(0, b.At).UTC()
			d.Applied = append(d.Applied, ProvenBy{
				Enforcer: r.Enforcer, At: at, ErrorMillis: millis(r.Error), LatencyMillis: millis(max(0, at.Sub(d.At))),
				Cut: b.Cut, Mode: r.Mode.String(),
			})
		}
	}
	return nil
}

func millis(d time.Duration) float64 {
	return float64(d.Round(time.Microsecond)) / float64(time.Millisecond)
}

func (v *receiptVerification) end(in *lines, frame []byte) {
	st, key, err := stated(frame, forReceipts, v.ks)
	if err != nil {
		v.faults.fault(in.n, 0, "the end is not signed by a key that may: %v", err)
		return
	}
	v.rep.Signed, v.rep.Key = st.Time.Time(), session.KeyIDOf(key.Public).String()
	if key.Withdrawn {
		v.faults.fault(in.n, 0, "the end is signed by key %s, which has been withdrawn", v.rep.Key)
	}
	if st.Number != uint64(v.rep.Receipts) {
		v.faults.fault(in.n, 0, "there are %d receipts, and %d were signed", v.rep.Receipts, st.Number)
	}
	var whole sum
	in.h.Sum(whole[:0])
	if whole != st.Sum && len(v.faults.Faults) == 0 {
		v.faults.fault(in.n, 0, "the file is not, byte for byte, what was signed")
	}
}

func (v *receiptVerification) conclude() {
	for i := range v.rep.Decisions {
		d := &v.rep.Decisions[i]
		slices.SortStableFunc(d.Applied, func(a, b ProvenBy) int { return a.At.Compare(b.At) })
		for _, name := range v.names {
			if !slices.ContainsFunc(d.Applied, func(p ProvenBy) bool { return p.Enforcer == name }) {
				d.Silent = append(d.Silent, name)
			}
		}
	}
}
