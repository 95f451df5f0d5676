package enforce

import (
	"testing"
	"time"

	"github.com/interlock-fabric/interlock/pkg/session"
)

// canary publishes a batch with the canary of each of the tenants, and returns
// its number.
func (b *bus) canary(tenants ...string) uint64 {
	b.t.Helper()
	id := session.DecisionID{byte(b.number + 1)}
	var entries []session.Entry
	for _, name := range tenants {
		for _, s := range b.enrol("k").Tenants {
			if s.Name() == name {
				e, err := s.CanaryEntry(id, b.now().Add(time.Minute))
				if err != nil {
					b.t.Fatal(err)
				}
				entries = append(entries, e)
			}
		}
	}
	_, x := b.batch(entries...)
	x.Decisions = []session.DecisionRef{{ID: id, Count: uint16(len(entries))}}
	frame := b.encode(x, b.signer)
	b.say(frame)
	b.accept(frame)
	b.beat()
	return x.Number
}

// TestCanary: an enforcer says of each canary of its tenants whether it denies it,
// by the check that callers go through, and counts it among no callers.
func TestCanary(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		for _, c := range []struct {
			name    string
			mode    session.Mode
			tenants []string
			denied  bool
			none    bool
		}{
			{name: "strict", tenants: []string{"acme", "globex"}, denied: true},
			{name: "best effort", mode: session.ModeBestEffort, tenants: []string{"acme"}, denied: true},
			{name: "shadow", mode: session.ModeShadow, tenants: []string{"acme"}},
			{name: "none of its tenants", none: true},
		} {
			e, f := b.open(func(o *Options) { o.Mode = c.mode })
			time.Sleep(2 * time.Second)
			number := b.number
			if c.none {
				b.decide(session.Entry{Op: session.OpSet, Effect: session.EffectRevoked, Reason: session.ReasonCanary, Key: b.session("nobody's")})
			} else {
				number = b.canary(c.tenants...)
			}
			time.Sleep(2 * time.Second)
			var found []*session.Canary
			for _, r := range f.said() {
				if r.Canary != nil {
					found = append(found, r.Canary)
				}
			}
			switch {
			case c.none && len(found) > 0:
				t.Errorf("%s: %v", c.name, found[0])
			case c.none:
			case len(found) != 1 || found[0].Number != number || found[0].Denied != c.denied || found[0].At == 0:
				t.Errorf("%s: %d canaries, %v", c.name, len(found), found)
			}
			if s := e.Status(); s.Denied > 0 || s.WouldDeny > 0 {
				t.Errorf("%s: a canary counts as a caller: %+v", c.name, s)
			}
			e.Close()
		}
	})
}
