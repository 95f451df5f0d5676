package broker

import (
	"encoding/base64"
	"fmt"
	"maps"
	"slices"
	"sync"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nkeys"

	"github.com/interlock-fabric/interlock/pkg/natsfeed"
)

// gate says who may connect, and with which rights. Enforcers come and go while
// the server runs: a reload of its configuration would cost more with each
// account that there is, and was seen to drop other connections and to take
// JetStream away for a moment, so their accounts are made, once, as they come.
type gate struct {
	mu    sync.Mutex
	srv   *server.Server
	main  *server.Account
	users map[string]*guest // by public NKey
}

// guest is somebody who may connect.
type guest struct {
	enforcer string // empty for the authority
	account  *server.Account
	rights   *server.Permissions
	conns    map[uint64]struct{} // that were let in; some may be gone
}

// open binds the gate to a server that accepts nobody yet.
func (g *gate) open(srv *server.Server, authority string) error {
	acc, err := srv.LookupAccount(Account)
	if err != nil {
		return fmt.Errorf("broker: %w", err)
	}
	g.srv, g.main = srv, acc
	g.users = map[string]*guest{authority: {account: acc, rights: AuthorityPermissions().server(), conns: map[uint64]struct{}{}}}
	return nil
}

// Check implements server.Authentication: the client has signed the server's
// nonce with a key on the list.
func (g *gate) Check(c server.ClientAuthentication) bool {
	o := c.GetOpts()
	pub, err := nkeys.FromPublicKey(o.Nkey)
	if err != nil {
		return false
	}
	sig, err := base64.RawURLEncoding.DecodeString(o.Sig)
	if err != nil {
		// Older clients use the padded alphabet, as nats-server permits.
		if sig, err = base64.StdEncoding.DecodeString(o.Sig); err != nil {
			return false
		}
	}
	if len(c.GetNonce()) == 0 || pub.Verify(c.GetNonce(), sig) != nil {
		return false
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	u := g.users[o.Nkey]
	if u == nil {
		return false
	}
	g.makeRoom(u)
	u.conns[c.GetID()] = struct{}{}
	c.RegisterUser(&server.User{Username: o.Nkey, Account: u.account, Permissions: u.rights})
	return true
}

const (
	// pruneAt is how many connections of the authority's key are remembered
	// before those that are gone are forgotten.
	pruneAt = 64
	// maxConns is how many connections one enforcer may have. It needs one; a
	// link that fails silently leaves dead ones for some pings. Each may make
	// the server hold maxPending for it, and all share the server's limit.
	maxConns = 8
)

// makeRoom forgets connections that are gone. Of an enforcer that has too many,
// the oldest make room: an honest one has left them, and it must get in.
func (g *gate) makeRoom(u *guest) {
	limit := pruneAt
	if u.enforcer != "" {
		limit = maxConns
	}
	if len(u.conns) < limit {
		return
	}
	for id := range u.conns {
		if g.srv.GetClient(id) == nil {
			delete(u.conns, id)
		}
	}
	for u.enforcer != "" && len(u.conns) >= limit {
		oldest := slices.Min(slices.Collect(maps.Keys(u.conns)))
		delete(u.conns, oldest)
		_ = g.srv.DisconnectClientByID(oldest) // gone already, or goes now
	}
}

// set replaces the enforcers. Those that are no longer listed, or have another
// key, are disconnected.
func (g *gate) set(list []Enforcer) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	keep := make(map[string]string, len(list))
	for _, e := range list {
		keep[e.PublicNKey] = e.Name
	}
	for key, u := range g.users {
		if u.enforcer == "" || keep[key] == u.enforcer {
			continue
		}
		delete(g.users, key)
		for id := range u.conns {
			_ = g.srv.DisconnectClientByID(id) // gone already, or goes now
		}
	}
	for _, e := range list {
		if g.users[e.PublicNKey] != nil {
			continue
		}
		acc, err := g.account(e.Name)
		if err != nil {
			return fmt.Errorf("broker: account of enforcer %s: %w", e.Name, err)
		}
		g.users[e.PublicNKey] = &guest{
			enforcer: e.Name, account: acc, rights: EnforcerPermissions(e.Name).server(), conns: map[uint64]struct{}{},
		}
	}
	return nil
}

// account makes the account of an enforcer, or finds the one that an earlier
// enrolment of that name left.
func (g *gate) account(name string) (*server.Account, error) {
	acc, isNew := g.srv.LookupOrRegisterAccount(AccountOf(name))
	if !isNew {
		return acc, nil
	}
	p := EnforcerPermissions(name)
	for _, s := range p.Subscribe {
		if s == natsfeed.InboxPrefix(name)+".>" {
			continue
		}
		if err := acc.AddStreamImport(g.main, s, ""); err != nil {
			return nil, fmt.Errorf("import %s: %w", s, err)
		}
	}
	for _, s := range p.Publish {
		if err := acc.AddServiceImport(g.main, s, s); err != nil {
			return nil, fmt.Errorf("import %s: %w", s, err)
		}
	}
	return acc, nil
}

func (p Permissions) server() *server.Permissions {
	return &server.Permissions{
		Publish:   &server.SubjectPermission{Allow: p.Publish},
		Subscribe: &server.SubjectPermission{Allow: p.Subscribe},
	}
}
