package trust

import (
	"crypto/ed25519"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/interlock-fabric/interlock/pkg/session"
)

// TestEmergencyKeys: what a key file signs is what the key set permits, and no
// more; a withdrawn key signs nothing.
func TestEmergencyKeys(t *testing.T) {
	s, r := initStore(t)
	path := filepath.Join(t.TempDir(), "k.json")
	name := s.KeySet().Tenants[0].Name
	for what, o := range map[string]EmergencyOptions{
		"no scope":          {Path: path, Orders: 1},
		"both scopes":       {Path: path, Orders: 1, Global: true, Tenants: []string{name}},
		"no orders":         {Path: path, Global: true},
		"too many orders":   {Path: path, Global: true, Orders: session.MaxOrders + 1},
		"an unknown tenant": {Path: path, Orders: 1, Tenants: []string{"nobody"}},
		"a tenant twice":    {Path: path, Orders: 1, Tenants: []string{name, name}},
	} {
		if _, err := s.AddEmergency(r, o, t0+1); !errors.Is(err, session.ErrInvalid) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) || s.KeySet().Version != 1 {
		t.Fatalf("%v, key set %d", err, s.KeySet().Version)
	}
	o := EmergencyOptions{Path: path, Orders: 2, Tenants: []string{name}, URLs: []string{"nats://127.0.0.1:4222"}}
	made, err := s.AddEmergency(r, o, t0+1)
	must(t, err)
	if _, err := s.AddEmergency(r, o, t0+1); !errors.Is(err, fs.ErrExist) {
		t.Errorf("over another key: %v", err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info, err)
	}
	key, err := LoadEmergencyKey(path)
	must(t, err)
	if strings.Contains(key.String()+made.GoString(), key.NATS.NKeySeed) || key.ID() != made.ID() || key.NATS.NKeySeed == "" {
		t.Errorf("%v", key)
	}
	tenant, ok := key.Tenant(name)
	if !ok {
		t.Fatal("the tenant is not in the key")
	}
	order := session.Order{Number: 2, Tenant: tenant.ID, Time: t0, Incident: "INC-1", Reason: "x"}
	frame, err := key.Sign(order)
	must(t, err)
	signed, err := session.ParseOrder(frame)
	must(t, err)
	must(t, s.Trust().Order(signed))
	for what, change := range map[string]func(*session.Order){
		"one too many": func(o *session.Order) { o.Number = 3 }, "everything": func(o *session.Order) { o.Tenant = 0 },
		"another tenant": func(o *session.Order) { o.Tenant++ },
	} {
		o := order
		change(&o)
		if _, err := key.Sign(o); !errors.Is(err, session.ErrInvalid) {
			t.Errorf("%s: %v", what, err)
		}
	}
	all, err := s.AddEmergency(r, EmergencyOptions{Path: path + ".all", Orders: 1, Global: true}, t0+1)
	must(t, err)
	for _, id := range []session.TenantID{0, tenant.ID} {
		frame, err := all.Sign(session.Order{Number: 1, Tenant: id, Time: t0, Incident: "INC-1", Reason: "x"})
		must(t, err)
		o, err := session.ParseOrder(frame)
		must(t, err)
		must(t, s.Trust().Order(o))
	}
	// No authority signs with it, and the store opens without it.
	again, err := Open(s.dir)
	must(t, err)
	if signer, err := again.Signer(t0 + 1); err != nil || session.KeyIDOf(pubOf(signer)) == key.ID() {
		t.Errorf("%v", err)
	}
	must(t, s.Withdraw(r, key.ID(), s.KeySet().Epoch, 0, t0+2))
	if err := s.Trust().Order(signed); !errors.Is(err, session.ErrUntrusted) {
		t.Errorf("withdrawn: %v", err)
	}

	good, err := os.ReadFile(path)
	must(t, err)
	for what, b := range map[string]string{
		"nothing": "", "half": string(good[:len(good)/2]), "another version": strings.Replace(string(good), `"version": 1`, `"version": 2`, 1),
		"a field more": strings.Replace(string(good), `"version": 1`, `"version": 1, "x": 1`, 1), "something behind it": string(good) + "{}",
		"no tenants": strings.Replace(string(good), `"tenants"`, `"tenantz"`, 1), "no orders": strings.Replace(string(good), `"orders": 2`, `"orders": 0`, 1),
	} {
		must(t, os.WriteFile(path, []byte(b), 0o600))
		if _, err := LoadEmergencyKey(path); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%s: %v", what, err)
		}
	}
	must(t, os.WriteFile(path, good, 0o600))
	must(t, os.Chmod(path, 0o640))
	if _, err := LoadEmergencyKey(path); !errors.Is(err, fs.ErrPermission) {
		t.Errorf("a file that others can read: %v", err)
	}
}

func pubOf(k ed25519.PrivateKey) ed25519.PublicKey { return k.Public().(ed25519.PublicKey) }
