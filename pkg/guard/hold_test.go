package guard_test

import (
	"context"
	"testing"

	"github.com/interlock-fabric/interlock/internal/guardtest"
	"github.com/interlock-fabric/interlock/pkg/guard"
	"github.com/interlock-fabric/interlock/pkg/session"
)

func TestHoldIsOfOneCredential(t *testing.T) {
	f := guardtest.Open(t, 0)
	prepared := func(change func(*session.Identity)) *session.Prepared {
		id := session.Identity{Tenant: guardtest.Tenant, Issuer: guardtest.Issuer, User: "ann", Token: "t1", Session: session.SessionRef{ID: "s1"}}
		change(&id)
		p, err := f.Enforcer.Prepare(id)
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	ann := prepared(func(*session.Identity) {})
	ctx, cancel := context.WithCancel(t.Context())
	h := guard.NewHold(ctx, cancel, ann)
	for name, c := range map[string]struct {
		p    *session.Prepared
		want bool
	}{
		"the same":             {ann, true},
		"prepared again":       {prepared(func(*session.Identity) {}), true},
		"a renewed token":      {prepared(func(id *session.Identity) { id.Token = "t2" }), false},
		"another issuer's":     {prepared(func(id *session.Identity) { id.Issuer = "https://other.example" }), false},
		"without a token's id": {prepared(func(id *session.Identity) { id.Token = "" }), false},
	} {
		if got := h.Keeps(c.p); got != c.want {
			t.Errorf("%s: %v", name, got)
		}
	}
	// Two callers of whose tokens nothing is known are not the same.
	nameless := prepared(func(id *session.Identity) { id.Token = "" })
	if other := prepared(func(id *session.Identity) { id.Token, id.User = "", "bob" }); guard.NewHold(ctx, cancel, nameless).Keeps(other) {
		t.Error("the hold of a caller without a token's id keeps another")
	}
	h.Release()
	if h.Keeps(ann) || (*guard.Hold)(nil).Keeps(ann) {
		t.Error("kept by no binding")
	}
	(*guard.Hold)(nil).Release()
}
