package enforce

import (
	"testing"
	"time"

	"github.com/interlock-fabric/interlock/pkg/session"
)

// TestConfirmedAfterRejection: work that began while a batch counted as rejected
// is cut when the log turns out to have it. Without the sweep in
// follower.confirm it runs on under a revocation that is in force.
func TestConfirmedAfterRejection(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		e, _ := b.open(nil)
		defer e.Close()
		p := prepare(t, e, caller("s1"))
		frame, _ := b.batch(revoke(b.session("s1")))
		b.say(frame)
		settle()
		b.reject(frame)
		settle()
		ctx := mustBind(t, e, p, session.Call{})
		b.accept(frame)
		b.beat()
		time.Sleep(time.Second)
		mustDenyAs(t, e, p, session.ErrRevoked, false)
		mustBeCut(ctx, t, session.ErrRevoked)
	})
}

// TestHeardBeforeTheFirstHeartbeat: in a log without batches, one that is heard
// before the first heartbeat is in force as soon as anything is allowed. Without
// the rebuild in chain.confirm for a head that is the origin, it is allowed.
func TestHeardBeforeTheFirstHeartbeat(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		b.as(func(b *bus) { b.silent = true })
		e, _ := b.start(nil)
		defer e.Close()
		time.Sleep(time.Second)
		p := prepare(t, e, caller("s1"))
		mustDeny(t, e, p, session.Call{}, session.ErrStale)
		frame, _ := b.batch(revoke(b.session("s1")))
		b.say(frame)
		settle()
		b.beat() // of the origin: it was sent before the batch was stored
		settle()
		if s := e.Status(); s.Applied != 1 || !s.Fresh {
			t.Fatalf("status %+v", s)
		}
		mustDenyAs(t, e, p, session.ErrRevoked, true)
	})
}
