package enforce

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/interlock-fabric/interlock/pkg/session"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// within runs a test in a bubble with a bus that beats.
func within(t *testing.T, fn func(t *testing.T, b *bus)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		b := newBus(t)
		stop := b.run()
		defer stop()
		fn(t, b)
	})
}

func mustAllow(t testing.TB, e *Enforcer, p *session.Prepared, call session.Call) {
	t.Helper()
	if err := e.Check(p, call); err != nil {
		t.Fatalf("denied: %v (status %+v)", err, e.Status())
	}
}

func mustDeny(t testing.TB, e *Enforcer, p *session.Prepared, call session.Call, want error) {
	t.Helper()
	if err := e.Check(p, call); !errors.Is(err, want) {
		t.Fatalf("got %v, want %v (status %+v)", err, want, e.Status())
	}
}

func settle() { synctest.Wait() }

func TestRevocationDeniesAndCuts(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		e, f := b.open(nil)
		defer e.Close()
		p, q := prepare(t, e, caller("s1")), prepare(t, e, caller("s2"))
		mustAllow(t, e, p, session.Call{Tool: "read"})
		ctx, release, err := e.Bind(context.Background(), p, session.Call{Tool: "read"})
		if err != nil {
			t.Fatal(err)
		}
		defer release()
		bystander, release2, err := e.Bind(context.Background(), q, session.Call{})
		if err != nil {
			t.Fatal(err)
		}
		defer release2()
		b.decide(revoke(b.session("s1")))
		settle()
		mustDeny(t, e, p, session.Call{Tool: "read"}, session.ErrRevoked)
		mustAllow(t, e, q, session.Call{})
		if !errors.Is(context.Cause(ctx), session.ErrRevoked) {
			t.Fatalf("cause %v", context.Cause(ctx))
		}
		if bystander.Err() != nil {
			t.Fatal("a bystander was cut")
		}
		time.Sleep(1200 * time.Millisecond)
		var cut uint32
		said := f.said()
		for _, r := range said {
			for _, x := range r.Batches {
				cut += x.Cut
			}
		}
		if last := said[len(said)-1]; last.Number != 1 || last.Confirmed != 1 || cut != 1 || last.Cut != 1 {
			t.Fatalf("receipt %+v, cut %d", last, cut)
		}
	})
}
