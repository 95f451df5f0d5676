package session

import (
	"errors"
	"slices"
	"testing"
)

func TestCanaryEntryIsOfItsCaller(t *testing.T) {
	s := testSecret(t, 1, "acme")
	id, other := DecisionID{1}, DecisionID{2}
	e, err := s.CanaryEntry(id, 99)
	if err != nil {
		t.Fatal(err)
	}
	if e.Effect != EffectRevoked || e.Reason != ReasonCanary || e.Expires != 99 || e.Op != OpSet {
		t.Errorf("%+v", e)
	}
	for _, c := range []struct {
		id   DecisionID
		want bool
	}{{id, true}, {other, false}} {
		p, err := s.CanaryCaller(c.id)
		if err != nil {
			t.Fatal(err)
		}
		if got := slices.Contains(p.Keys(), e.Key); got != c.want {
			t.Errorf("the entry is of the caller of %x: %t", c.id[:1], got)
		}
	}
}

func TestCanaryOfAReceipt(t *testing.T) {
	for _, want := range []*Canary{nil, {Number: 7, At: -3, Denied: true}, {Number: 1 << 60}} {
		in := Receipt{Enforcer: "e", Canary: want, Divergence: &Divergence{Epoch: 1}, Unknown: []Field{{Tag: 3, Value: []byte{1}}}}
		body, err := in.MarshalBody()
		if err != nil {
			t.Fatal(err)
		}
		out, err := UnmarshalReceipt(body)
		if err != nil || (out.Canary == nil) != (want == nil) || want != nil && *out.Canary != *want || out.Divergence == nil || len(out.Unknown) != 1 {
			t.Errorf("%v: %+v, %v", want, out, err)
		}
	}
	in := Receipt{Enforcer: "e", Canary: &Canary{Denied: true}}
	body, err := in.MarshalBody()
	if err != nil {
		t.Fatal(err)
	}
	body[len(body)-1] = 2
	if _, err := UnmarshalReceipt(body); !errors.Is(err, ErrMalformed) {
		t.Errorf("neither denied nor allowed: %v", err)
	}
	in = Receipt{Enforcer: "e", Unknown: []Field{{Tag: tagCanary}}}
	if _, err := in.MarshalBody(); !errors.Is(err, ErrMalformed) {
		t.Errorf("a canary among what is unknown: %v", err)
	}
}
