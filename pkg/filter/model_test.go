package filter

import (
	"bytes"
	"encoding/binary"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/interlock-fabric/interlock/pkg/session"
)

// The model knows nothing of keys, digests, shapes or snapshots: it keeps every
// entry that was ever applied, with its target in clear, and for each question
// replays them all and compares values. What it shares with the package is the
// vocabulary alone.

const issuer = "https://idp.example"

type modelEntry struct {
	target  session.Target
	except  []session.Target
	e       session.Entry
	number  uint64
	time    session.Instant
	horizon session.Instant // of its batch; set on the last entry of one
}

type modelRecord struct {
	effect       session.Effect
	drill        bool
	issuedBefore session.Instant
	expires      session.Instant
	since        session.Instant
	share        uint16
	acr          string
	except       []session.Target
}

type slot struct {
	target string
	effect session.Effect
	drill  bool
}

// show is a name of a target that no other has.
func show(t session.Target) string { return t.Tenant + ": " + t.String() }

type model struct{ log []modelEntry }

func (m *model) state() map[slot]modelRecord {
	out := map[slot]modelRecord{}
	var horizon session.Instant
	for _, x := range m.log {
		at := slot{show(x.target), x.e.Effect, x.e.Drill}
		have, there := out[at]
		switch {
		case x.e.Op == session.OpSet:
			r := modelRecord{
				effect: x.e.Effect, drill: x.e.Drill, issuedBefore: x.e.IssuedBefore, expires: x.e.Expires,
				since: x.time, acr: x.e.ACR, except: x.except,
			}
			if there {
				r.issuedBefore = wider(have.issuedBefore, r.issuedBefore)
				r.expires = wider(have.expires, r.expires)
				r.since = max(have.since, r.since)
				if r.acr == "" {
					r.acr = have.acr
				}
				var both []session.Target
				for _, t := range have.except {
					if slices.ContainsFunc(r.except, func(o session.Target) bool { return show(o) == show(t) }) {
						both = append(both, t)
					}
				}
				r.except = both
			}
			out[at] = r
		case !there:
		case x.e.Effect != session.EffectRevoked && x.e.IssuedBefore != 0 && have.since > x.e.IssuedBefore:
			// It was decided anew after what is to be lifted.
		case x.e.Drill:
			delete(out, at)
		case x.e.Effect == session.EffectRevoked:
			// Validate keeps lifts of what is terminal out of the log; what is
			// bounded already stays as it is.
			if have.issuedBefore == 0 {
				out[at] = modelRecord{
					effect: have.effect, issuedBefore: max(x.e.IssuedBefore, have.since), expires: x.e.Expires,
					since: x.time, except: have.except,
				}
			}
		case x.e.Share > 0 && x.e.Share < session.ShareUnit:
			have.share = max(have.share, x.e.Share)
			out[at] = have
		default:
			delete(out, at)
		}
		horizon = max(horizon, x.horizon)
		for at, r := range out {
			if r.expires != 0 && r.expires <= horizon {
				delete(out, at)
			}
		}
	}
	return out
}

// wider is the bound that excludes nobody whom either includes; zero is none.
func wider(a, b session.Instant) session.Instant {
	if a == 0 || b == 0 {
		return 0
	}
	return max(a, b)
}

// names reports whether every term of the target is true of the call.
func names(t session.Target, id session.Identity, call session.Call) bool {
	if t.Terms[0].Kind == session.KindGlobal {
		return true
	}
	if t.Tenant != id.Tenant {
		return false
	}
	for _, term := range t.Terms {
		var ok bool
		switch term.Kind {
		case session.KindTenant:
			ok = true
		case session.KindIssuer:
			ok = term.Value == id.Issuer
		case session.KindUser:
			ok = term.Value == id.User
		case session.KindClient:
			ok = term.Value == id.Client
		case session.KindSession:
			ok = term.Value == id.Session.ID
			for _, a := range id.Ancestors {
				ok = ok || term.Value == a.ID
			}
		case session.KindAgent:
			for _, a := range id.Actors {
				ok = ok || term.Value == a.ID
			}
		case session.KindRole:
			ok = slices.Contains(id.Roles, term.Value)
		case session.KindTool:
			ok = term.Value == call.Tool
		case session.KindAudience:
			ok = term.Value == call.Audience
		}
		if !ok {
			return false
		}
	}
	return true
}

func (m *model) verdict(w *world, id session.Identity, call session.Call, now session.Instant) (effect session.Effect, drill bool) {
	var origin session.Instant
	for _, at := range append([]time.Time{id.AuthTime, id.Session.Start}, starts(id.Ancestors)...) {
		if i := session.InstantOf(at); i != 0 && (origin == 0 || i < origin) {
			origin = i
		}
	}
	for at, r := range m.state() {
		i := slices.IndexFunc(w.targets, func(t session.Target) bool { return show(t) == at.target })
		exempt := slices.ContainsFunc(r.except, func(t session.Target) bool { return names(t, id, session.Call{}) })
		switch {
		case !names(w.targets[i], id, call):
		case exempt:
		case r.effect != session.EffectRevoked && r.expires != 0 && now >= r.expires:
		case r.issuedBefore != 0 && origin != 0 && origin >= r.issuedBefore+session.Instant(id.Skew.Milliseconds()):
		case r.share != 0 && w.bucket(id) < r.share:
		case r.effect == session.EffectReduced && call.LowRisk:
		case r.effect == session.EffectStepUp && session.InstantOf(id.AuthTime) > r.since && (r.acr == "" || r.acr == id.ACR):
		case r.drill:
			drill = true
		default:
			effect = max(effect, r.effect)
		}
	}
	return effect, drill
}

func starts(refs []session.SessionRef) (out []time.Time) {
	for _, r := range refs {
		out = append(out, r.Start)
	}
	return out
}

// world is the small universe in which collisions are likely.
type world struct {
	secrets map[string]*session.TenantSecret
	targets []session.Target
	callers []session.Identity
	calls   []session.Call
}

// milli is an instant n milliseconds into the test's time.
func milli(n int) session.Instant { return session.Instant(1_000_000 + n) }

func newWorld(t testing.TB) *world {
	w := &world{secrets: map[string]*session.TenantSecret{}}
	for i, name := range []string{"acme", "globex"} {
		s, err := session.NewTenantSecret(session.TenantID(i+1), name, bytes.Repeat([]byte{byte(i + 1)}, 32))
		if err != nil {
			t.Fatal(err)
		}
		w.secrets[name] = s
	}
	term := func(k session.Kind, v string) session.Term {
		x := session.Term{Kind: k, Value: v}
		if k.Scoped() || k == session.KindAgent {
			x.Issuer = issuer
		}
		return x
	}
	user, agent, sess := term(session.KindUser, "u0"), term(session.KindAgent, "a0"), term(session.KindSession, "s0")
	client, tool := term(session.KindClient, "c0"), term(session.KindTool, "t0")
	audience := term(session.KindAudience, "https://api.example/a")
	w.targets = []session.Target{{Terms: []session.Term{{Kind: session.KindGlobal}}}}
	for _, tenant := range []string{"acme", "globex"} {
		for _, terms := range [][]session.Term{
			{{Kind: session.KindTenant, Value: tenant}}, {term(session.KindIssuer, issuer)},
			{user}, {term(session.KindUser, "u1")}, {agent}, {term(session.KindAgent, "a1")}, {client},
			{sess}, {term(session.KindSession, "s1")}, {term(session.KindRole, "admin")}, {tool}, {audience},
			{user, agent}, {user, client}, {user, tool}, {agent, client}, {agent, tool}, {agent, audience},
			{sess, tool}, {user, agent, tool},
		} {
			c, _, err := session.Target{Tenant: tenant, Terms: terms}.Canonical()
			if err != nil {
				t.Fatal(err)
			}
			w.targets = append(w.targets, c)
		}
	}
	at := func(n int) time.Time { return milli(n).Time() }
	for _, tenant := range []string{"acme", "globex"} {
		w.callers = append(w.callers,
			session.Identity{Tenant: tenant, Issuer: issuer, User: "u0", Session: session.SessionRef{ID: "s0"}},
			session.Identity{Tenant: tenant, Issuer: issuer, User: "u0", Client: "c0", ACR: "mfa", AuthTime: at(50), Session: session.SessionRef{ID: "s1", Start: at(40)}},
			session.Identity{
				Tenant: tenant, Issuer: issuer, User: "u1", AuthTime: at(80), Skew: 10 * time.Millisecond,
				Actors:  []session.Actor{{ID: "a0"}, {ID: "a1"}},
				Session: session.SessionRef{ID: "s2", Start: at(80)}, Ancestors: []session.SessionRef{{ID: "s1", Start: at(60)}, {ID: "s0", Start: at(70)}},
			},
			session.Identity{Tenant: tenant, Issuer: issuer, User: "u2", Client: "c0", Actors: []session.Actor{{ID: "a0"}}, Roles: []string{"admin"}, ACR: "pwd", AuthTime: at(20)},
		)
	}
	for _, tool := range []string{"", "t0", "t1"} {
		for _, audience := range []string{"", "https://api.example/a"} {
			w.calls = append(w.calls, session.Call{Tool: tool, Audience: audience, LowRisk: tool == "t1"})
		}
	}
	return w
}

func (w *world) key(t session.Target) session.Key {
	for _, s := range w.secrets {
		if k, err := s.Key(t); err == nil {
			return k
		}
	}
	panic("no key for " + t.String())
}

// bucket is which of the equal shares a caller falls into, from the digest of
// the outermost session or, without one, the user.
func (w *world) bucket(id session.Identity) uint16 {
	last := session.Term{Kind: session.KindUser, Issuer: issuer, Value: id.User}
	for _, r := range append([]session.SessionRef{id.Session}, id.Ancestors...) {
		if r.ID != "" {
			last = session.Term{Kind: session.KindSession, Issuer: issuer, Value: r.ID}
		}
	}
	d := w.key(session.Target{Tenant: id.Tenant, Terms: []session.Term{last}}).Digest
	return uint16(binary.BigEndian.Uint64(d[:8]) % session.ShareUnit)
}

// draw makes an entry that Validate accepts.
func (w *world) draw(t *rapid.T) modelEntry {
	for {
		x := modelEntry{target: rapid.SampledFrom(w.targets).Draw(t, "target")}
		x.e = session.Entry{
			Op: session.OpSet, Key: w.key(x.target),
			Effect: session.Effect(rapid.IntRange(int(session.EffectReduced), int(session.EffectRevoked)).Draw(t, "effect")),
			Reason: session.ReasonAnomaly, Drill: rapid.IntRange(0, 5).Draw(t, "drill") == 0,
		}
		instant := func(label string) session.Instant {
			if rapid.Bool().Draw(t, label+"?") {
				return milli(rapid.IntRange(1, 100).Draw(t, label))
			}
			return 0
		}
		x.e.IssuedBefore, x.e.Expires = instant("issued before"), instant("expires")
		if rapid.IntRange(0, 2).Draw(t, "lift") == 0 {
			x.e.Op = session.OpLift
			if x.e.Effect != session.EffectRevoked && rapid.Bool().Draw(t, "staged") {
				x.e.Share = uint16(rapid.IntRange(1, session.ShareUnit).Draw(t, "share"))
			}
		} else {
			for _, i := range rapid.SliceOfNDistinct(rapid.IntRange(2, len(w.targets)-1), 0, 2, rapid.ID).Draw(t, "except") {
				if k := w.key(w.targets[i]); !k.Shape.PerCall() && k.Shape > session.Shape(session.KindTenant) {
					x.except = append(x.except, w.targets[i])
					x.e.Except = append(x.e.Except, k)
				}
			}
			x.e.Except = session.SortKeys(x.e.Except)
			if x.e.Effect == session.EffectStepUp {
				x.e.ACR = rapid.SampledFrom([]string{"", "pwd", "mfa"}).Draw(t, "acr")
			}
		}
		if x.e.Validate() == nil {
			return x
		}
	}
}

func (w *world) prepare(t interface{ Fatal(...any) }, id session.Identity) *session.Prepared {
	p, err := w.secrets[id.Tenant].Prepare(id)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// TestSetAgainstModel guards G4: whatever is applied, in whatever batches, the
// set answers as a list of entries that is replayed for each question would. It
// fails when, for instance, a key's records in the delta do not hide those in the
// base, or a probe for a conjunction is left out.
func TestSetAgainstModel(t *testing.T) {
	w := newWorld(t)
	rapid.Check(t, func(t *rapid.T) {
		m := &model{}
		var set, singly *Set // in batches, and entry by entry
		number, now, horizon := uint64(0), 1, session.Instant(0)
		type snapshot struct {
			set     *Set
			entries int
			digest  session.StateDigest
			size    int
		}
		var old []snapshot
		agree := func(t *rapid.T, m *model, set *Set) {
			id := rapid.SampledFrom(w.callers).Draw(t, "caller")
			call := rapid.SampledFrom(w.calls).Draw(t, "call")
			at := milli(now)
			effect, drill := m.verdict(w, id, call, at)
			match, err := set.Decide(w.prepare(t, id), &call, session.Moment{Authority: at})
			if err != nil {
				t.Fatal(err)
			}
			var got session.Effect
			if match.Record != nil {
				got = match.Record.Effect
			}
			if got != effect || match.Drill != drill {
				t.Fatalf("%+v calls %+v: the set says %v, drill %t; the model %v, drill %t", id, call, got, match.Drill, effect, drill)
			}
		}
		t.Repeat(map[string]func(*rapid.T){
			"batch": func(t *rapid.T) {
				number++
				now += rapid.IntRange(0, 10).Draw(t, "later")
				if rapid.IntRange(0, 3).Draw(t, "sweep") == 0 {
					horizon = max(horizon, milli(rapid.IntRange(0, now).Draw(t, "horizon")))
				}
				b := &session.Batch{Number: number, Time: milli(now), Horizon: horizon}
				n := rapid.IntRange(1, 4).Draw(t, "entries")
				for i := range n {
					x := w.draw(t)
					x.number, x.time = number, b.Time
					if i == n-1 {
						x.horizon = horizon
					}
					b.Entries, m.log = append(b.Entries, x.e), append(m.log, x)
					one := &session.Batch{Number: number, Time: b.Time, Entries: []session.Entry{x.e}, Horizon: x.horizon}
					singly = singly.Apply(one, nil)
				}
				set = set.Apply(b, nil)
				old = append(old, snapshot{set, len(m.log), set.Digest(), set.Len()})
			},
			"time passes": func(t *rapid.T) { now += rapid.IntRange(1, 20).Draw(t, "by") },
			"ask":         func(t *rapid.T) { agree(t, m, set) },
			"ask an old one": func(t *rapid.T) {
				if len(old) == 0 {
					return
				}
				s := rapid.SampledFrom(old).Draw(t, "snapshot")
				if s.set.Digest() != s.digest || s.set.Len() != s.size {
					t.Fatal("a snapshot has changed")
				}
				agree(t, &model{log: m.log[:s.entries]}, s.set)
			},
			"": func(t *rapid.T) {
				state := m.state()
				perTenant := map[session.TenantID]int{}
				for at := range state {
					i := slices.IndexFunc(w.targets, func(t session.Target) bool { return show(t) == at.target })
					perTenant[w.key(w.targets[i]).Tenant]++
				}
				if set.Len() != len(state) {
					t.Fatalf("%d records, the model has %d", set.Len(), len(state))
				}
				for id := range session.TenantID(3) {
					if set.TenantLen(id) != perTenant[id] {
						t.Fatalf("%d records of tenant %d, the model has %d", set.TenantLen(id), id, perTenant[id])
					}
				}
				// The digest is a function of the state: of how it was batched,
				// and of the way there, nothing is left in it.
				var sum session.StateDigest
				set.Range(func(k session.Key, r *session.Record) bool { sum.Plus(r.Sum(k)); return true })
				if set.Digest() != sum || set.Digest() != singly.Digest() {
					t.Fatalf("digests %x, summed %x, entry by entry %x", set.Digest(), sum, singly.Digest())
				}
			},
		})
	})
}
