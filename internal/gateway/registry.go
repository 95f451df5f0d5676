package gateway

import (
	"fmt"
	"sync/atomic"

	"github.com/interlock-fabric/interlock/internal/gateway/config"
	"github.com/interlock-fabric/interlock/internal/yamlfile"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// registry is the enforcer's: who is known, by the file that the configuration
// names. Where none is asked for, everybody is. It is replaced as a whole when the
// configuration is read again.
type registry struct {
	known atomic.Pointer[map[session.Key]struct{}] // nil is everybody
}

// registered is a part of the file: what is known in one tenant, by one issuer.
type registered struct {
	Tenant   string   `yaml:"tenant"`
	Issuer   string   `yaml:"issuer"`
	Agents   []string `yaml:"agents"`
	Clients  []string `yaml:"clients"`
	Sessions []string `yaml:"sessions"`
}

// readRegistry reads the file, if there is one; nil is everybody.
func readRegistry(c *config.Config, tenants []*session.TenantSecret) (*map[session.Key]struct{}, error) {
	if c.RegisteredFile == "" {
		return nil, nil
	}
	b, err := yamlfile.Read(c.RegisteredFile)
	if err != nil {
		return nil, fmt.Errorf("registered_file: %w", err)
	}
	var all []registered
	if err := yamlfile.Decode(b, &all); err != nil {
		return nil, fmt.Errorf("%w: registered_file: %s: %w", config.ErrInvalid, c.RegisteredFile, err)
	}
	secrets := make(map[string]*session.TenantSecret, len(tenants))
	for _, s := range tenants {
		secrets[s.Name()] = s
	}
	known := make(map[session.Key]struct{})
	for i, r := range all {
		secret := secrets[r.Tenant]
		if secret == nil {
			return nil, fmt.Errorf("%w: registered_file: %s: [%d].tenant: this enforcer has no tenant %q", config.ErrInvalid, c.RegisteredFile, i, r.Tenant)
		}
		for _, l := range []struct {
			kind   session.Kind
			name   string
			values []string
		}{{session.KindAgent, "agents", r.Agents}, {session.KindClient, "clients", r.Clients}, {session.KindSession, "sessions", r.Sessions}} {
			for _, v := range l.values {
				key, err := secret.Key(session.Target{Tenant: r.Tenant, Terms: []session.Term{{Kind: l.kind, Issuer: r.Issuer, Value: v}}})
				if err != nil {
					return nil, fmt.Errorf("%w: registered_file: %s: [%d].%s: %q: %w", config.ErrInvalid, c.RegisteredFile, i, l.name, v, err)
				}
				known[key] = struct{}{}
			}
		}
	}
	return &known, nil
}

// Registered implements enforce.Registry: a caller is known by its session or one
// of that's ancestors, else by all the agents of its chain, and where it has none,
// by its client.
func (r *registry) Registered(p *session.Prepared) bool {
	known := r.known.Load()
	if known == nil {
		return true
	}
	agents, strangers, client := false, false, false
	for _, k := range p.Keys() {
		_, ok := (*known)[k]
		switch session.Kind(k.Shape) {
		case session.KindSession:
			if ok {
				return true
			}
		case session.KindAgent:
			agents, strangers = true, strangers || !ok
		case session.KindClient:
			client = client || ok
		}
	}
	return agents && !strangers || !agents && client
}
