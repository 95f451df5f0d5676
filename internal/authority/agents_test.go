package authority

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/interlock-fabric/interlock/pkg/authority"
	"github.com/interlock-fabric/interlock/pkg/enforce"
	"github.com/interlock-fabric/interlock/pkg/natsfeed"
	"github.com/interlock-fabric/interlock/pkg/session"
)

func codeDigest(i int) string { return fmt.Sprintf("code:sha256:%064x", i) }

// TestAlteredCodeLosesItsIdentity: what is registered over the API is what enforcers
// admit, over a real bus: the digest that is registered and no other, on all of them,
// until another takes its place; across what is done to the stream, and across a
// restart of the authority.
func TestAlteredCodeLosesItsIdentity(t *testing.T) {
	dir, began := t.TempDir(), time.Now()
	f := start(t, Options{DataDir: dir, Issuers: []string{issuer}})
	rec := f.agent(authority.Agent{ID: billing, Digests: []string{codeDigest(1)}})
	for i := range 30 { // more parts than are read one by one
		f.agent(authority.Agent{ID: fmt.Sprint("spiffe://corp/agent/", i)})
	}
	var all []*enforce.Enforcer
	for i := range 2 {
		all = append(all, f.enforcer(fmt.Sprint("eu-", i), enforce.Options{Agents: &enforce.AgentPolicy{}}))
	}
	check := func(e *enforce.Enforcer, agent string, digests ...string) error {
		return e.Check(f.prepare(e, session.Identity{User: "alice", Actors: []session.Actor{{ID: agent}}, Digests: digests}), session.Call{Tool: "t"})
	}
	everywhere := func(what string, want error, agent string, digests ...string) {
		t.Helper()
		for _, e := range all {
			var err error
			f.until(func() bool {
				err = check(e, agent, digests...)
				return err == nil && want == nil || want != nil && errors.Is(err, want)
			})
		}
		t.Log(what, time.Since(began))
	}
	everywhere("what is registered", nil, billing, codeDigest(1))
	everywhere("another", nil, "spiffe://corp/agent/29")
	for _, e := range all {
		if err := check(e, billing, codeDigest(2)); !errors.Is(err, session.ErrDigest) {
			t.Errorf("altered: %v", err)
		}
		if err := check(e, billing); !errors.Is(err, session.ErrDigest) {
			t.Errorf("without a digest: %v", err)
		}
		if err := check(e, "spiffe://corp/agent/nobody", codeDigest(1)); !errors.Is(err, session.ErrUnregistered) {
			t.Errorf("not registered: %v", err)
		}
		if s := e.Status().Agents; s == nil || s.Agents != 31 || !s.Fresh || s.Version == 0 {
			t.Errorf("%+v", s)
		}
	}
	replace := func(i int) {
		t.Helper()
		next, err := f.c.RegisterAgent(f.ctx, authority.AgentRequest{Agent: authority.Agent{ID: billing, Digests: []string{codeDigest(i)}}, Revision: rec.Revision})
		if err != nil {
			t.Fatal(err)
		}
		rec = next
	}
	replace(2)
	everywhere("its replacement", nil, billing, codeDigest(2))
	everywhere("what was replaced", session.ErrDigest, billing, codeDigest(1))
	f.settle(f.change(authority.DecommissionAgent, "spiffe://corp/agent/0").Decision)
	everywhere("decommissioned", session.ErrRevoked, "spiffe://corp/agent/0")

	// Whoever holds the stream can keep the table from being read, for a moment.
	js, err := jetstream.New(f.a.nc)
	if err != nil {
		t.Fatal(err)
	}
	s, err := js.Stream(f.ctx, natsfeed.AgentStream)
	if err != nil {
		t.Fatal(err)
	}
	old, err := s.GetLastMsgForSubject(f.ctx, natsfeed.AgentSubject)
	if err != nil {
		t.Fatal(err)
	}
	replace(3)
	everywhere("another", nil, billing, codeDigest(3))
	version := f.a.agents.Load().Status().Version
	for i := range natsfeed.AgentKeep { // what was good pushes itself out, and then garbage does
		b := old.Data
		if i == natsfeed.AgentKeep-1 {
			b = []byte("garbage")
		}
		if _, err := js.Publish(f.ctx, natsfeed.AgentSubject, b); err != nil {
			t.Fatal(err)
		}
	}
	f.until(func() bool { return all[0].Status().Agents.Version > version }) // published again
	everywhere("after a replay and garbage", nil, billing, codeDigest(3))
	if err := s.Purge(f.ctx); err != nil {
		t.Fatal(err)
	}
	late := f.enforcer("late", enforce.Options{Agents: &enforce.AgentPolicy{}})
	all = append(all, late)
	everywhere("after a purge", nil, billing, codeDigest(3))
	everywhere("after a purge, what is not registered", session.ErrDigest, billing, codeDigest(1))

	// The next authority goes on with the same table.
	version = late.Status().Agents.Version
	addr := f.a.NATSAddr()
	if err := f.a.Close(); err != nil {
		t.Fatal(err)
	}
	f = start(t, Options{DataDir: dir, Issuers: []string{issuer}, NATSListen: addr})
	f.until(func() bool { return f.a.agents.Load().Status().Version > 0 })
	if v := f.a.agents.Load().Status().Version; v != version {
		t.Errorf("version %d after a restart, was %d", v, version)
	}
	replace(4)
	everywhere("after a restart", nil, billing, codeDigest(4))
	everywhere("after a restart, what was replaced", session.ErrDigest, billing, codeDigest(3))

	// What cannot be published is said.
	if js, err = jetstream.New(f.a.nc); err != nil {
		t.Fatal(err)
	}
	if err := js.DeleteStream(f.ctx, natsfeed.AgentStream); err != nil {
		t.Fatal(err)
	}
	f.until(func() bool {
		st, err := f.c.Status(f.ctx)
		return err == nil && slices.ContainsFunc(st.Warnings, func(w string) bool { return strings.Contains(w, "registered agents are not published") })
	})
}
