package broker

import (
	"encoding/base64"
	"fmt"
	"maps"
	"slices"
	"sync"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nkeys"
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
	name    string // empty for the authority
	account *server.Account
	rights  *server.Permissions
	conns   map[uint64]struct{} // that were let in; some may be gone
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
	if u.name != "" {
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
	for u.name != "" && len(u.conns) >= limit {
		oldest := slices.Min(slices.Collect(maps.Keys(u.conns)))
		delete(u.conns, oldest)
		_ = g.srv.DisconnectClientByID(oldest) // gone already, or goes now
	}
}

// set replaces who may connect beside the authority. Those that are no longer listed, or have another
// key, are disconnected.
func (g *gate) set(list []holder) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	keep := make(map[string]string, len(list))
	for _, u := range list {
		keep[u.nkey] = u.name
	}
	for key, u := range g.users {
		if u.name == "" || keep[key] == u.name {
			continue
		}
		delete(g.users, key)
		for id := range u.conns {
			_ = g.srv.DisconnectClientByID(id) // gone already, or goes now
		}
	}
	for _, u := range list {
		if g.users[u.nkey] != nil {
			continue
		}
		acc, err := g.account(u)
		if err != nil {
			return fmt.Errorf("broker: %s: %w", u.name, err)
		}
		g.users[u.nkey] = &guest{name: u.name, account: acc, rights: u.rights.server(), conns: map[uint64]struct{}{}}
	}
	return nil
}

// account makes the account of a holder of rights, or finds the one that an earlier one of
// that name left.
func (g *gate) account(u holder) (*server.Account, error) {
	if !u.own {
		return g.main, nil
	}
	acc, isNew := g.srv.LookupOrRegisterAccount(u.name)
	if !isNew {
		return acc, nil
	}
	for _, s := range u.rights.Subscribe {
		if s == u.inbox {
			continue
		}
		if err := acc.AddStreamImport(g.main, s, ""); err != nil {
			return nil, fmt.Errorf("import %s: %w", s, err)
		}
	}
	for _, s := range u.rights.Publish {
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
