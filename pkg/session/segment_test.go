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
	later := full
	later.Unknown = []Field{{Tag: 2, Value: []byte{11}}}
	for _, want := range []SegmentRef{plain, full, later} {
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
}
