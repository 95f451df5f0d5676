package enforce

import "github.com/interlock-fabric/interlock/pkg/session"

// Registry says which sessions are known to the authority. It is asked about
// each call that everything else allows, so its answer must come from memory:
// without a lock, I/O or allocation. Where it does not know yet, it says no.
type Registry interface {
	// Registered reports whether the session of p, or the caller where it has
	// none, is registered.
	Registered(p *session.Prepared) bool
}

// Position returns the epoch and number of the newest batch in force,
// provisional ones included. It takes no lock. Zero is no state yet.
func (e *Enforcer) Position() (epoch, number uint64) {
	if e == nil {
		return 0, 0
	}
	v := e.view.Load()
	if v == nil {
		return 0, 0
	}
	return v.epoch, v.tip.number
}

// KeySet returns the newest key set that the root signed, nil before the first.
// It must not be changed.
func (e *Enforcer) KeySet() *session.KeySet {
	if e == nil || e.trust == nil {
		return nil
	}
	return e.trust.KeySet()
}
