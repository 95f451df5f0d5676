package authority

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/interlock-fabric/interlock/internal/registry"
	"github.com/interlock-fabric/interlock/internal/trust"
	"github.com/interlock-fabric/interlock/pkg/authority"
	"github.com/interlock-fabric/interlock/pkg/enforce"
	"github.com/interlock-fabric/interlock/pkg/natsfeed"
	"github.com/interlock-fabric/interlock/pkg/session"
	"github.com/interlock-fabric/interlock/pkg/trail"
)

// point is an enforcement point with a recorder.
type point struct {
	*enforce.Enforcer
	rec *trail.Recorder
}

func (f *fixture) point(name string, o trail.Options) *point {
	f.Helper()
	o.Enrollment = f.enroll(name)
	feed, err := natsfeed.Dial(o.Enrollment, nil)
	if err != nil {
		f.Fatal(err)
	}
	e, err := enforce.Open(f.ctx, feed, &enforce.Options{Enrollment: o.Enrollment})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { _ = e.Close() })
	f.heard(name)
	o.Enforcer, o.Publisher, o.Interval = e, feed, 100*time.Millisecond
	if o.SightEvery == 0 {
		o.SightEvery = 200 * time.Millisecond
	}
	rec, err := trail.New(o)
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { _ = rec.Close() }) // before the enforcer
	return &point{e, rec}
}

const trace = "0af7651916cd43dd8448eb211c80319c"

// call makes a call as an adapter would.
func (p *point) call(who *session.Prepared, tool string) error {
	e := trail.Event{
		Mark: p.rec.Start(), Caller: who, Method: "tools/call", Call: session.Call{Tool: tool}, Arguments: []byte(`{"path":"/etc/secrets"}`),
		Traceparent: "00-" + trace + "-b7ad6b7169203331-01",
	}
	e.Err = p.Check(who, e.Call)
	p.rec.Record(&e)
	return e.Err
}

func (f *fixture) trail(q authority.TrailQuery) *authority.Trail {
	f.Helper()
	t, err := f.c.Trail(f.ctx, q)
	if err != nil {
		f.Fatal(err)
	}
	return t
}

// TestTrail follows decisions from the enforcement point, over the bus, to the
// authority: who reads the bus learns nothing of them, and the authority all.
func TestTrail(t *testing.T) {
	f := start(t, Options{Issuers: []string{issuer}})
	p := f.point("tools", trail.Options{Sample: 1})
	alice := f.prepare(p.Enforcer, session.Identity{
		User: "alice-of-accounting", Session: session.SessionRef{ID: "s-secret"}, Client: "client-x", Transaction: "txn-77",
		Actors: []session.Actor{{ID: "spiffe://corp/agent/billing"}},
	})
	if err := p.call(alice, "transfer_funds"); err != nil {
		t.Fatal(err)
	}
	d := f.decide(authority.Request{Operation: authority.Revoke, Targets: one("session", "s-secret"), Reason: "stolen-token", Incident: "INC-142"})
	f.until(func() bool { return errors.Is(p.Check(alice, session.Call{}), session.ErrRevoked) })
	for range 50 {
		if err := p.call(alice, "transfer_funds"); !errors.Is(err, session.ErrRevoked) {
			t.Fatal(err)
		}
	}
	var tr *authority.Trail
	f.until(func() bool { tr = f.trail(authority.TrailQuery{}); return len(tr.Records) >= 2 })
	var allowed, denied authority.TrailRecord
	for _, r := range tr.Records {
		switch r.Decision {
		case "allowed":
			allowed = r
		case "denied":
			denied = r
		}
	}
	if allowed.Count != 1 || allowed.Checked >= d.Number || allowed.Error != "" || allowed.Sequence != 0 {
		t.Errorf("allowed: %+v", allowed)
	}
	if denied.Error != "revoked" || denied.Effect != "revoked" || denied.Reason != "stolen-token" || denied.Sequence != d.Number ||
		denied.Incident != "INC-142" || denied.Checked < d.Number || denied.Epoch != d.Epoch || denied.User != "alice-of-accounting" ||
		denied.Session != "s-secret" || denied.Client != "client-x" || denied.Tool != "transfer_funds" || denied.TraceID != trace ||
		denied.Transaction != "txn-77" || denied.Tenant != "default" || denied.Issuer != issuer || denied.Enforcer != "tools" ||
		len(denied.Actors) != 1 || denied.Actors[0].ID != "spiffe://corp/agent/billing" || !strings.HasPrefix(denied.Arguments, "hmac-sha256:") {
		t.Errorf("denied: %+v", denied)
	}
	if allowed.Arguments != denied.Arguments {
		t.Error("the same arguments have two digests")
	}
	if got := f.trail(authority.TrailQuery{Incident: "INC-142", Trace: trace, Agent: "spiffe://corp/agent/billing"}); len(got.Records) == 0 || got.Records[0].Decision != "denied" {
		t.Errorf("by incident, trace and agent: %+v", got.Records)
	}

	// Discovery: the caller is listed, with what it did.
	var seen *authority.Sightings
	f.until(func() bool {
		var err error
		if seen, err = f.c.Seen(f.ctx, authority.TrailQuery{}); err != nil {
			t.Fatal(err)
		}
		return len(seen.Seen) == 1 && seen.Seen[0].Calls == 51
	})
	if s := seen.Seen[0]; s.Denied != 50 || s.User != "alice-of-accounting" || s.Session != "s-secret" || s.First.After(s.Last) || fmt.Sprint(s.Enforcers) != "[tools]" {
		t.Errorf("%+v", s)
	}

	// Its agent is listed as one that nobody registered, until somebody does.
	agents := func(registered string) []authority.AgentRecord {
		p, err := f.c.Agents(f.ctx, authority.RegistryQuery{Registered: registered})
		if err != nil {
			t.Fatal(err)
		}
		return p.Agents
	}
	f.until(func() bool { return len(agents("false")) == 1 })
	if x := agents("")[0]; x.Registered || x.ID != "spiffe://corp/agent/billing" || x.Tenant != "default" || fmt.Sprint(x.Enforcers) != "[tools]" || x.LastSeen.IsZero() || x.State != "" {
		t.Errorf("%+v", x)
	}
	if l := agents("true"); len(l) != 0 {
		t.Errorf("%+v", l)
	}
	if _, err := f.c.RegisterAgent(f.ctx, authority.AgentRequest{Agent: authority.Agent{ID: "spiffe://corp/agent/billing"}}); err != nil {
		t.Fatal(err)
	}
	if l := agents(""); len(l) != 1 || !l[0].Registered || len(agents("false")) != 0 {
		t.Errorf("%+v", l)
	}

	// After the last report nothing is left to say.
	if err := p.rec.Close(); err != nil {
		t.Fatal(err)
	}
	var sum uint64
	f.until(func() bool {
		sum = 0
		for _, r := range f.trail(authority.TrailQuery{Decision: "denied"}).Records {
			sum += r.Count
		}
		return sum >= 50
	})
	if sum != 50 {
		t.Errorf("%d denials, want 50", sum)
	}

	// The bus, as whoever holds it sees it.
	js, err := jetstream.New(f.a.nc)
	if err != nil {
		t.Fatal(err)
	}
	s, err := js.Stream(f.ctx, natsfeed.ReportStream)
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for seq := uint64(1); seq <= s.CachedInfo().State.LastSeq; seq++ {
		m, err := s.GetMsg(f.ctx, seq)
		if err != nil {
			t.Fatal(err)
		}
		n++
		for _, word := range []string{"alice", "s-secret", "client-x", "txn-77", "corp", "billing", "transfer", "INC-142", "stolen", "default", issuer, "tools/call", trace, "/etc/secrets"} {
			if bytes.Contains(m.Data, []byte(word)) {
				t.Errorf("message %d shows %q", seq, word)
			}
		}
	}
	if n == 0 {
		t.Error("there was nothing to look at")
	}
}

// TestTrailOutlivesTheBus: what is recorded while the authority and its bus are
// away is reported once they are back, on the same chain; what was reported
// before is there still.
func TestTrailOutlivesTheBus(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := ln.Addr().String()
	if err := ln.Close(); err != nil {
		t.Fatal(err)
	}
	o := Options{DataDir: t.TempDir(), NATSListen: addr, Issuers: []string{issuer}}
	f := start(t, o)
	p := f.point("tools", trail.Options{Sample: 1})
	who := f.prepare(p.Enforcer, session.Identity{User: "alice"})
	if err := p.call(who, "before"); err != nil {
		t.Fatal(err)
	}
	f.until(func() bool { return len(f.trail(authority.TrailQuery{Tool: "before"}).Records) == 1 })
	if err := f.a.Close(); err != nil {
		t.Fatal(err)
	}
	f.until(func() bool {
		return p.rec.Stats().Failures > 0 || p.call(who, "meanwhile") == nil && p.rec.Stats().Failures > 0
	})
	f2 := start(t, o)
	f2.until(func() bool { return p.call(who, "after") == nil })
	f2.until(func() bool { return len(f2.trail(authority.TrailQuery{Tool: "after"}).Records) > 0 })
	tr := f2.trail(authority.TrailQuery{Limit: authority.MaxTrail})
	tools := map[string]int{}
	for _, r := range tr.Records {
		tools[r.Tool]++
	}
	if tools["before"] != 1 || tools["meanwhile"] == 0 || tr.Enforcers[0].Missing != 0 || tr.Enforcers[0].Refused != 0 || tr.Enforcers[0].Dropped != 0 {
		t.Errorf("%v, %+v", tools, tr.Enforcers)
	}
}

// TestSealingKeyIsRotated: enforcers take the new key from the key set, and the
// authority reads what is sealed to either.
func TestSealingKeyIsRotated(t *testing.T) {
	f := start(t, Options{Issuers: []string{issuer}})
	p := f.point("tools", trail.Options{Sample: 1})
	who := f.prepare(p.Enforcer, session.Identity{User: "alice"})
	if err := p.call(who, "old"); err != nil {
		t.Fatal(err)
	}
	f.until(func() bool { return len(f.trail(authority.TrailQuery{Tool: "old"}).Records) == 1 })
	keys := filepath.Join(f.a.o.DataDir, KeysDir)
	root, err := trust.LoadRoot(filepath.Join(keys, trust.RootFile))
	if err != nil {
		t.Fatal(err)
	}
	s, err := trust.Open(keys)
	if err != nil {
		t.Fatal(err)
	}
	id, err := s.RotateAudit(root, session.InstantOf(time.Now()))
	if err != nil {
		t.Fatal(err)
	}
	if err := f.c.PublishKeySet(f.ctx, s.Frame()); err != nil {
		t.Fatal(err)
	}
	f.until(func() bool {
		k, ok := p.KeySet().AuditKey()
		return ok && session.KeyIDOf(k) == id
	})
	if err := p.call(who, "new"); err != nil {
		t.Fatal(err)
	}
	f.until(func() bool { return len(f.trail(authority.TrailQuery{Tool: "new"}).Records) == 1 })
	if tr := f.trail(authority.TrailQuery{}); len(tr.Records) != 2 || tr.Enforcers[0].Unreadable != 0 {
		t.Errorf("%+v", tr)
	}
}

// TestAnEnforcerSpeaksOfItsOwnTenantsOnly: in the trail, among the agents that were
// seen, in the audit and in the status.
func TestAnEnforcerSpeaksOfItsOwnTenantsOnly(t *testing.T) {
	f := start(t, Options{Tenants: []string{"acme", "beta"}})
	raw, err := f.c.Enroll(f.ctx, authority.EnrollRequest{Name: "eu", Tenants: []string{"acme"}})
	if err != nil {
		t.Fatal(err)
	}
	e, err := session.ParseEnrollment(raw)
	if err != nil {
		t.Fatal(err)
	}
	feed, err := natsfeed.Dial(e, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = feed.Close() })
	key, ok := f.a.store.KeySet().AuditKey()
	if !ok {
		t.Fatal("no audit key")
	}
	now := session.InstantOf(time.Now())
	content := &session.TrailContent{}
	for _, tenant := range []string{"acme", "beta"} {
		c := session.Caller{Tenant: tenant, Issuer: issuer, User: "ann", Actors: []session.Actor{{ID: "spiffe://corp/of-" + tenant}}}
		content.Records = append(content.Records, session.TrailRecord{Decision: session.DecisionDenied, Cause: session.CauseRevoked, Count: 1, First: now, Last: now, Caller: c, Tool: "of-" + tenant})
		content.Sightings = append(content.Sightings, session.Sighting{Caller: c, First: now, Last: now, Calls: 1})
	}
	r := session.Report{Enforcer: "eu", Boot: session.WriterID{1}, Count: 1, Time: now}
	frame, _, err := r.Seal(content, key, e.ReceiptKey)
	if err != nil {
		t.Fatal(err)
	}
	// The bus may not have the enforcer's account yet.
	f.until(func() bool { return feed.Report(f.ctx, frame) == nil })
	f.until(func() bool { return len(f.trail(authority.TrailQuery{}).Records) > 0 })
	tr := f.trail(authority.TrailQuery{})
	if len(tr.Records) != 1 || tr.Records[0].Tool != "of-acme" || tr.Enforcers[0].Foreign != 2 {
		t.Errorf("%+v", tr)
	}
	f.until(func() bool { return f.a.discovered.foreignOf("eu") == 2 })
	if own, _ := f.a.discovered.list("acme", "", 10, func(registry.Ref) bool { return true }); len(own) != 1 {
		t.Errorf("of its own tenant %+v", own)
	}
	if others, _ := f.a.discovered.list("beta", "", 10, func(registry.Ref) bool { return true }); len(others) != 0 {
		t.Errorf("of another tenant %+v", others)
	}
	f.until(func() bool { return len(f.audited(authority.AuditQuery{Kind: authority.AuditReport})) == 1 })
	if a := f.audited(authority.AuditQuery{Kind: authority.AuditReport})[0]; len(a.Trail) != 1 || a.Trail[0].Tool != "of-acme" || !strings.Contains(a.Detail, "1 calls of tenants") {
		t.Errorf("%+v", a)
	}
	st, err := f.c.Status(f.ctx)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.ContainsFunc(st.Warnings, func(w string) bool { return strings.Contains(w, "eu reported 2 times") }) {
		t.Errorf("%q", st.Warnings)
	}
}

// memoryRegistry is a registry as the enforcer sees one. The authority's comes
// with its registry; this holds the seam.
type memoryRegistry map[string]bool

func (m memoryRegistry) Registered(p *session.Prepared) bool { return m[p.Identity().Session.ID] }

// TestUnregisteredIsDenied: with a registry, a session that it does not know is
// denied, after whatever else denies it, and running work is not bound.
func TestUnregisteredIsDenied(t *testing.T) {
	f := start(t, Options{Issuers: []string{issuer}})
	e := f.enforcer("tools", enforce.Options{Registry: memoryRegistry{"s-known": true, "s-revoked": true}})
	known := f.prepare(e, session.Identity{Session: session.SessionRef{ID: "s-known"}})
	shadow := f.prepare(e, session.Identity{Session: session.SessionRef{ID: "s-shadow"}})
	if err := e.Check(known, session.Call{}); err != nil {
		t.Error(err)
	}
	if err := e.Check(shadow, session.Call{}); !errors.Is(err, session.ErrUnregistered) || !errors.Is(err, session.ErrDenied) {
		t.Errorf("unregistered: %v", err)
	}
	if _, _, err := e.Bind(f.ctx, shadow, session.Call{}); !errors.Is(err, session.ErrUnregistered) {
		t.Errorf("Bind: %v", err)
	}
	f.decide(authority.Request{Operation: authority.Revoke, Reason: "anomaly", Targets: one("session", "s-shadow")})
	f.until(func() bool { return errors.Is(e.Check(shadow, session.Call{}), session.ErrRevoked) })
}
