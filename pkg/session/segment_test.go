package session

import (
	"bytes"
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestSegmentRef(t *testing.T) {
	plain := SegmentRef{Epoch: 1, Number: 2, Head: Hash{3}, State: StateDigest{4}, Time: 5, Entries: 6, Size: 7, Sum: [32]byte{8}}
	full := plain
	full.ResumeSize, full.ResumeSum = 9, [32]byte{10}
	signed := full
	signed.Signers = []Signer{{KeyID{1}, 2}, {KeyID{1, 1}, 1}}
	later := signed
	later.Unknown = []Field{{Tag: 3, Value: []byte{11}}}
	for _, want := range []SegmentRef{plain, full, signed, later} {
		body := want.MarshalBody()
		got, err := UnmarshalSegmentRef(body)
		if err != nil || cmp.Diff(want, got) != "" || !bytes.Equal(got.MarshalBody(), body) {
			t.Fatal(got, err)
		}
		for n := range body {
			if _, err := UnmarshalSegmentRef(body[:n]); !errors.Is(err, ErrMalformed) {
				t.Fatalf("%d bytes: %v", n, err)
			}
		}
	}
	for _, bad := range []SegmentRef{{}, {Epoch: 1}, {Size: 1}, {Epoch: 1, Size: MaxSegmentSize + 1}, {Epoch: 1, Size: 1, Time: -1}, {Epoch: 1, Size: 1, ResumeSize: MaxResumeSize + 1}} {
		if _, err := UnmarshalSegmentRef(bad.MarshalBody()); !errors.Is(err, ErrMalformed) {
			t.Errorf("%+v: %v", bad, err)
		}
	}
	many := make([]Signer, MaxKeys+1)
	for i := range many {
		many[i] = Signer{KeyID{byte(i >> 8), byte(i)}, 2}
	}
	atBound := plain
	atBound.Signers = many[:MaxKeys]
	if got, err := UnmarshalSegmentRef(atBound.MarshalBody()); err != nil || cmp.Diff(atBound, got) != "" {
		t.Error(err)
	}
	for name, bad := range map[string][]Signer{
		"too many":         many,
		"out of order":     {{KeyID{2}, 2}, {KeyID{1}, 1}},
		"twice":            {{KeyID{1}, 2}, {KeyID{1}, 1}},
		"of no batch":      {{KeyID{1}, 2}, {KeyID{2}, 0}},
		"beyond the state": {{KeyID{1}, 2}, {KeyID{2}, 3}},
		"of no head":       {{KeyID{1}, 1}},
	} {
		ref := plain
		ref.Signers = bad
		if _, err := UnmarshalSegmentRef(ref.MarshalBody()); !errors.Is(err, ErrMalformed) {
			t.Errorf("signers %s: %v", name, err)
		}
	}
	w := writer{b: bytes.TrimSuffix(plain.MarshalBody(), []byte{0, 0})}
	w.fields([]Field{{Tag: tagSigners}}, nil)
	if _, err := UnmarshalSegmentRef(w.b); !errors.Is(err, ErrMalformed) {
		t.Errorf("a field of no signers: %v", err)
	}
}

func FuzzUnmarshalSegmentRef(f *testing.F) {
	ref := SegmentRef{Epoch: 1, Number: 2, Size: 7, ResumeSize: 9}
	f.Add(ref.MarshalBody())
	ref.Signers = []Signer{{KeyID{1}, 2}, {KeyID{2}, 1}}
	f.Add(ref.MarshalBody())
	f.Fuzz(func(t *testing.T, body []byte) {
		if ref, err := UnmarshalSegmentRef(body); err == nil && !bytes.Equal(ref.MarshalBody(), body) {
			t.Errorf("%x has another spelling", body)
		}
	})
}

// TestSegmentCut: with signers a segment is judged by what they have signed,
// whenever it was sealed; without them by when that was.
func TestSegmentCut(t *testing.T) {
	key := func(b byte) SigningKey { return SigningKey{Public: bytes.Repeat([]byte{b}, 32), Use: UseWriter} }
	a, gone := key(1), key(2)
	gone.Withdrawn, gone.LastEpoch, gone.LastNumber = true, 3, 5
	ks := KeySet{Epoch: 3, Issued: 100, Keys: []SigningKey{a, gone}}
	by := func(k SigningKey, last uint64) Signer { return Signer{KeyIDOf(k.Public), last} }
	for name, tt := range map[string]struct {
		ref  SegmentRef
		want bool
	}{
		"at the last number":          {SegmentRef{Epoch: 3, Number: 9, Time: 50, Signers: []Signer{by(a, 9), by(gone, 5)}}, false},
		"behind the last number":      {SegmentRef{Epoch: 3, Number: 9, Time: 200, Signers: []Signer{by(a, 9), by(gone, 6)}}, true},
		"a key that is not there":     {SegmentRef{Epoch: 3, Number: 9, Time: 200, Signers: []Signer{by(a, 9), by(key(7), 1)}}, true},
		"another epoch":               {SegmentRef{Epoch: 2, Number: 9, Signers: []Signer{by(gone, 9)}}, false},
		"not known, sealed before":    {SegmentRef{Epoch: 3, Number: 6, Time: 100}, true},
		"not known, sealed after":     {SegmentRef{Epoch: 3, Number: 6, Time: 101}, false},
		"not known, before its batch": {SegmentRef{Epoch: 3, Number: 5, Time: 100}, false},
	} {
		if got := tt.ref.Cut(&ks); got != tt.want {
			t.Errorf("%s: %t", name, got)
		}
	}
	ks.Keys[1].LastEpoch = 2
	if ref := (SegmentRef{Epoch: 3, Number: 9, Signers: []Signer{by(gone, 1)}}); !ref.Cut(&ks) {
		t.Error("a key that was withdrawn in an earlier epoch")
	}
}
