package session

import (
	"errors"
	"slices"
	"strings"
	"testing"
)

// The numbers are the wire form: a change here breaks every deployment.
func TestKindsKeepTheirNumbersAndProperties(t *testing.T) {
	tests := []struct {
		kind                            Kind
		number                          uint8
		name                            string
		terminal, wide, perCall, scoped bool
	}{
		{KindGlobal, 1, "global", false, true, false, false},
		{KindTenant, 2, "tenant", false, true, false, false},
		{KindIssuer, 3, "issuer", false, true, false, false},
		{KindUser, 4, "user", false, true, false, true},
		{KindAgent, 5, "agent", false, true, false, false},
		{KindClient, 6, "client", false, true, false, true},
		{KindSession, 7, "session", true, false, false, true},
		{KindToken, 8, "token", true, false, false, true},
		{KindCredential, 9, "credential", true, true, false, false},
		{KindKey, 10, "key", true, false, false, false},
		{KindDigest, 11, "digest", false, true, false, false},
		{KindBlueprint, 12, "blueprint", false, true, false, false},
		{KindOwner, 13, "owner", false, true, false, false},
		{KindRole, 14, "role", false, true, false, false},
		{KindCapability, 15, "capability", false, true, false, false},
		{KindTool, 16, "tool", false, true, true, false},
		{KindAudience, 17, "audience", false, true, true, false},
	}
	if len(tests) != len(Kinds()) {
		t.Fatalf("%d kinds, the table has %d", len(Kinds()), len(tests))
	}
	for i, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			k := tt.kind
			if Kinds()[i] != k || uint8(k) != tt.number || k.String() != tt.name || !k.Valid() {
				t.Errorf("kind %d is %q at %d", uint8(k), k, i)
			}
			if got, err := ParseKind(tt.name); err != nil || got != k {
				t.Errorf("ParseKind = %v, %v", got, err)
			}
			if k.Terminal() != tt.terminal || k.Wide() != tt.wide || k.PerCall() != tt.perCall || k.Scoped() != tt.scoped {
				t.Errorf("terminal %t, wide %t, per call %t, scoped %t", k.Terminal(), k.Wide(), k.PerCall(), k.Scoped())
			}
			s := Shape(k)
			if !s.Valid() || s.String() != tt.name || s.Terminal() != tt.terminal || s.PerCall() != tt.perCall {
				t.Errorf("shape of %s: %v terminal %t per call %t", k, s, s.Terminal(), s.PerCall())
			}
		})
	}
	for _, k := range []Kind{0, 18, 31, 32, 255} {
		if k.Valid() {
			t.Errorf("%s is valid", k)
		}
	}
}

func TestConjunctionsKeepTheirNumbers(t *testing.T) {
	want := []struct {
		number  uint8
		name    string
		perCall bool
	}{
		{32, "user+agent", false},
		{33, "user+client", false},
		{34, "user+tool", true},
		{35, "agent+client", false},
		{36, "agent+tool", true},
		{37, "agent+audience", true},
		{38, "session+tool", true},
		{39, "user+agent+tool", true},
	}
	got := Conjunctions()
	if len(got) != len(want) {
		t.Fatalf("%d conjunctions, want %d", len(got), len(want))
	}
	for i, s := range got {
		if uint8(s) != want[i].number || s.String() != want[i].name || s.PerCall() != want[i].perCall || s.Terminal() || !s.Valid() {
			t.Errorf("%d %s per call %t terminal %t", uint8(s), s, s.PerCall(), s.Terminal())
		}
		if !slices.IsSorted(s.Kinds()) {
			t.Errorf("%s: kinds out of order", s)
		}
		if back, ok := shapeOf(s.Kinds()); !ok || back != s {
			t.Errorf("shapeOf(%s) = %s, %t", s, back, ok)
		}
	}
	for _, s := range []Shape{0, 18, 31, 40, 255} {
		if s.Valid() {
			t.Errorf("%s is valid", s)
		}
	}
	for _, kinds := range [][]Kind{{KindUser, KindUser}, {KindAgent, KindUser}, {KindRole, KindTool}, {0}, nil} {
		if s, ok := shapeOf(kinds); ok {
			t.Errorf("shapeOf(%v) = %s", kinds, s)
		}
	}
}

func TestShapeSetHoldsEveryShape(t *testing.T) {
	var set ShapeSet
	all := Conjunctions()
	for _, k := range Kinds() {
		all = append(all, Shape(k))
	}
	for i, s := range all {
		if set.Has(s) {
			t.Errorf("%s is in the set before it was added", s)
		}
		set = set.With(s)
		for _, have := range all[:i+1] {
			if !set.Has(have) {
				t.Errorf("%s was lost", have)
			}
		}
	}
}

func TestNamesParseBack(t *testing.T) {
	for e := EffectReduced; e <= EffectRevoked; e++ {
		if got, err := ParseEffect(e.String()); err != nil || got != e || !e.Valid() {
			t.Errorf("effect %s: %v, %v", e, got, err)
		}
		if !errors.Is(e.Sentinel(), ErrDenied) || errors.Is(ErrDenied, e.Sentinel()) {
			t.Errorf("%s has the sentinel %v", e, e.Sentinel())
		}
	}
	if EffectRevoked <= EffectSuspended || EffectSuspended <= EffectStepUp || EffectStepUp <= EffectReduced {
		t.Error("the order of precedence has changed")
	}
	if Effect(0).Valid() || Effect(5).Valid() || !errors.Is(ErrDenied, Effect(0).Sentinel()) {
		t.Error("an effect that does not exist is valid")
	}
	for i, name := range Reasons() {
		if got, err := ParseReason(name); err != nil || got != Reason(i) || got.String() != name {
			t.Errorf("reason %q: %v, %v", name, got, err)
		}
	}
	if len(Reasons()) != int(lastReason)+1 {
		t.Errorf("%d reasons named of %d", len(Reasons()), lastReason+1)
	}
	if got := Reason(200).String(); got != "reason-200" {
		t.Errorf("unknown reason prints as %q", got)
	}
	for _, m := range []Mode{ModeStrict, ModeBestEffort, ModeShadow} {
		if got, err := ParseMode(m.String()); err != nil || got != m || m.Exposed() != (m != ModeStrict) {
			t.Errorf("mode %s: %v, %v", m, got, err)
		}
	}
	if m, err := ParseMode(""); err != nil || m != ModeStrict {
		t.Errorf("no mode is %s, %v", m, err)
	}
}

func TestParsingAnUnknownNameSaysWhatWouldDo(t *testing.T) {
	long := strings.Repeat("x", 5000)
	for name, parse := range map[string]func(string) error{
		"kind":   func(s string) error { _, err := ParseKind(s); return err },
		"effect": func(s string) error { _, err := ParseEffect(s); return err },
		"reason": func(s string) error { _, err := ParseReason(s); return err },
		"mode":   func(s string) error { _, err := ParseMode(s); return err },
	} {
		err := parse(long)
		if !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), "want") || len(err.Error()) > 600 {
			t.Errorf("%s: %v", name, err)
		}
		if err := parse("Global"); err == nil {
			t.Errorf("%s: names are matched without case", name)
		}
	}
}
