package session

import (
	"fmt"
	"slices"
	"strings"
)

// Term is one named thing: a kind, the issuer that minted the value where the
// kind is scoped, and the value in clear.
type Term struct {
	Kind   Kind   `json:"kind"`
	Issuer string `json:"issuer,omitempty"`
	Value  string `json:"value,omitempty"`
}

// canonical checks and normalises the term.
func (t Term) canonical() (Term, error) {
	v, err := Canonical(t.Kind, t.Value)
	if err != nil {
		return Term{}, err
	}
	t.Value = v
	scoped := t.Kind.Scoped() || t.Kind == KindAgent && !isURI(v)
	switch {
	case scoped && t.Issuer == "":
		return Term{}, fmt.Errorf("%w: %s", ErrNoIssuer, t.Kind)
	case !scoped:
		// What is unique by itself must have one key, whoever vouches for it.
		t.Issuer = ""
	default:
		if err := checkText("issuer", t.Issuer, MaxValueLen); err != nil {
			return Term{}, err
		}
	}
	return t, nil
}

// Target is what a decision names, within one tenant: a single term, or a
// conjunction of two or three whose kinds are one of Conjunctions. The zero
// Target is invalid.
type Target struct {
	Tenant string `json:"tenant,omitempty"`
	Terms  []Term `json:"terms"`
}

// Canonical returns the target with its terms in canonical form, sorted by
// kind, and its shape. A global target names no tenant; a tenant target names
// only its tenant, in Tenant; every other target names both.
func (t Target) Canonical() (Target, Shape, error) {
	if n := len(t.Terms); n < 1 || n > 3 {
		return Target{}, 0, fmt.Errorf("%w: a target has one to three terms, not %d", ErrInvalid, n)
	}
	terms := make([]Term, 0, len(t.Terms))
	for _, term := range t.Terms {
		if term.Kind == KindTenant && len(t.Terms) == 1 && term.Value == "" {
			term.Value = t.Tenant
		}
		term, err := term.canonical()
		if err != nil {
			return Target{}, 0, err
		}
		terms = append(terms, term)
	}
	slices.SortFunc(terms, func(a, b Term) int { return int(a.Kind) - int(b.Kind) })
	kinds := make([]Kind, len(terms))
	for i, term := range terms {
		kinds[i] = term.Kind
	}
	shape, ok := shapeOf(kinds)
	if !ok {
		var names []string
		for _, s := range Conjunctions() {
			names = append(names, s.String())
		}
		return Target{}, 0, fmt.Errorf("%w: no such conjunction; want one of %s", ErrInvalid, strings.Join(names, ", "))
	}
	switch Kind(shape) {
	case KindGlobal:
		if t.Tenant != "" {
			return Target{}, 0, fmt.Errorf("%w: a global target names no tenant", ErrInvalid)
		}
	case KindTenant:
		if t.Tenant != "" && t.Tenant != terms[0].Value {
			return Target{}, 0, fmt.Errorf("%w: the target names two tenants", ErrInvalid)
		}
		t.Tenant = terms[0].Value
	default:
		if err := checkTenantName(t.Tenant); err != nil {
			return Target{}, 0, err
		}
	}
	return Target{Tenant: t.Tenant, Terms: terms}, shape, nil
}

// Shape returns the target's shape, or zero when the target is invalid.
func (t Target) Shape() Shape {
	_, s, err := t.Canonical()
	if err != nil {
		return 0
	}
	return s
}

// String shows the target to a person who may see values in clear.
func (t Target) String() string {
	parts := make([]string, 0, len(t.Terms))
	for _, term := range t.Terms {
		s := term.Kind.String()
		if term.Value != "" {
			s += " " + term.Value
		}
		parts = append(parts, s)
	}
	return strings.Join(parts, " and ")
}
