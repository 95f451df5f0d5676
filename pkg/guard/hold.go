package guard

import (
	"context"

	"github.com/interlock-fabric/interlock/pkg/session"
)

// Hold is the binding of something that outlives its requests, such as a session,
// to the caller of the latest of them. nil is none. It is immutable. Hosts do not
// need it, adapters do.
type Hold struct {
	owner   *session.Prepared
	ended   <-chan struct{}
	release context.CancelFunc
}

// NewHold returns the hold of owner, by what Enforcer.Bind returned.
func NewHold(bound context.Context, release context.CancelFunc, owner *session.Prepared) *Hold {
	return &Hold{owner, bound.Done(), release}
}

// Keeps reports whether the binding is alive and is to this credential, though it
// may have been prepared for another request.
func (h *Hold) Keeps(p *session.Prepared) bool {
	if h == nil {
		return false
	}
	select {
	case <-h.ended:
		return false
	default:
	}
	if h.owner == p {
		return true
	}
	a, b := h.owner.Identity(), p.Identity()
	return a.Token == b.Token && a.Token != "" && a.Issuer == b.Issuer && a.Tenant == b.Tenant
}

// Release releases the binding.
func (h *Hold) Release() {
	if h != nil {
		h.release()
	}
}
