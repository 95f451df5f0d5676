package enforce

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/interlock-fabric/interlock/pkg/session"
)

func (f *busFeed) AgentIndexes(context.Context) ([][]byte, error) {
	if err := f.up(); err != nil {
		return nil, err
	}
	f.b.mu.Lock()
	delay := f.b.agentDelay
	f.b.mu.Unlock()
	time.Sleep(delay)
	f.b.mu.Lock()
	defer f.b.mu.Unlock()
	return slices.Clone(f.b.agentIndexes), nil
}

func (f *busFeed) AgentParts(_ context.Context, parts []byte, fn func([]byte) error) error {
	if err := f.up(); err != nil {
		return err
	}
	f.b.mu.Lock()
	f.b.agentReads += len(parts)
	stored := slices.Clone(f.b.agentParts)
	f.b.mu.Unlock()
	for _, p := range stored {
		if err := fn(p); err != nil {
			return err
		}
	}
	return nil
}

// registered is what a test registers of an agent.
type registered struct {
	tenant  string
	id      string // a URI
	digests []string
}

// table makes a version of the table, with its index sealed by a key.
func (b *bus) table(version uint64, by ed25519.PrivateKey, agents ...registered) (index []byte, parts [][]byte) {
	b.t.Helper()
	x := session.AgentIndex{Epoch: b.epoch, Version: version, Time: b.now(), Agents: uint32(len(agents))}
	lists := map[byte][]session.RegisteredAgent{}
	secrets := b.enrol("k").Tenants
	digest := func(tenant string, kind session.Kind, value string) session.Key {
		i := slices.IndexFunc(secrets, func(s *session.TenantSecret) bool { return s.Name() == tenant })
		k, err := secrets[i].Key(session.Target{Tenant: tenant, Terms: []session.Term{{Kind: kind, Value: value}}})
		if err != nil {
			b.t.Fatal(err)
		}
		return k
	}
	for _, a := range agents {
		k := digest(a.tenant, session.KindAgent, a.id)
		r := session.RegisteredAgent{Tenant: k.Tenant, Agent: k.Digest}
		for _, d := range a.digests {
			r.Digests = append(r.Digests, session.SortedDigest{Sort: session.SortOf(d), Digest: digest(a.tenant, session.KindDigest, d).Digest})
		}
		lists[k.Digest[0]] = append(lists[k.Digest[0]], r)
	}
	for i, l := range lists {
		p, err := session.MarshalAgentPart(l)
		if err != nil {
			b.t.Fatal(err)
		}
		parts, x.Parts[i] = append(parts, p), sha256.Sum256(p)
	}
	return b.seal(session.TypeAgents, x.MarshalBody(), by), parts
}

func refOf(t testing.TB, index []byte) session.AgentsRef {
	f, x, err := readAgentIndex(index)
	if err != nil {
		t.Fatal(err)
	}
	return session.AgentsRef{Version: x.index.Version, Sum: f.Hash()}
}

// storeTable puts a table beside what is stored.
func (b *bus) storeTable(index []byte, parts [][]byte) {
	b.with(func(b *bus) {
		b.agentIndexes, b.agentParts = append(b.agentIndexes, index), append(b.agentParts, parts...)
	})
}

// register publishes a table in place of what is stored, and names it.
func (b *bus) register(version uint64, agents ...registered) {
	b.t.Helper()
	index, parts := b.table(version, b.signer, agents...)
	b.with(func(b *bus) { b.agentIndexes, b.agentParts = nil, nil })
	b.storeTable(index, parts)
	b.name(index)
}

// name has heartbeats name an index.
func (b *bus) name(index []byte) {
	ref := session.AgentsRef{}
	if index != nil {
		ref = refOf(b.t, index)
	}
	b.as(func(b *bus) { b.named = ref })
	b.beat()
	settle()
}

func code(i int) string  { return fmt.Sprintf("code:sha256:%064x", i) }
func model(i int) string { return fmt.Sprintf("model:sha256:%064x", i) }

const worker = "spiffe://acme/agent/worker"

// running is a caller of an agent that shows these digests.
func running(agent string, digests ...string) session.Identity {
	return session.Identity{Tenant: "acme", Issuer: iss, User: "alice", Actors: []session.Actor{{ID: agent}}, Digests: digests}
}

func guarded(pol AgentPolicy) func(*Options) { return func(o *Options) { o.Agents = &pol } }

// TestAlteredCodeIsDenied is the point of it all: what an agent is registered with
// is what it may run, from the moment that it is registered, and no more once that
// has been replaced.
func TestAlteredCodeIsDenied(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		b.register(1, registered{"acme", worker, []string{code(1), model(1)}}, registered{"acme", "spiffe://acme/agent/free", nil})
		e, _ := b.open(guarded(AgentPolicy{}))
		defer e.Close()
		good := prepare(t, e, running(worker, code(1), model(1)))
		altered := prepare(t, e, running(worker, code(2), model(1)))
		both := prepare(t, e, running(worker, code(1), code(2), model(1)))
		none := prepare(t, e, running(worker))
		half := prepare(t, e, running(worker, code(1)))
		free := prepare(t, e, running("spiffe://acme/agent/free", code(9)))
		stranger := prepare(t, e, running("spiffe://acme/agent/stranger", code(1)))
		below := running(worker, code(1), model(1))
		below.Actors = append(below.Actors, session.Actor{ID: "spiffe://acme/agent/stranger"})
		elsewhere := running(worker, code(1), model(1))
		elsewhere.Tenant = "globex"
		mustAllow(t, e, good, session.Call{Tool: "read"})
		mustAllow(t, e, free, session.Call{})
		for _, p := range []*session.Prepared{altered, both, none, half} {
			mustDeny(t, e, p, session.Call{}, session.ErrDigest)
		}
		for _, p := range []*session.Prepared{stranger, prepare(t, e, below), prepare(t, e, elsewhere), prepare(t, e, session.Identity{Tenant: "acme", Issuer: iss, User: "alice"})} {
			mustDeny(t, e, p, session.Call{}, session.ErrUnregistered)
		}
		if s := e.Status(); s.Altered != 2 || s.Unregistered != 4 || s.Denied != 8 || s.Agents.Version != 1 || s.Agents.Agents != 2 || !s.Agents.Fresh || s.Agents.Bytes == 0 {
			t.Errorf("%+v, %+v", s, s.Agents)
		}
		work, done, err := e.Bind(context.Background(), good, session.Call{Tool: "read"})
		if err != nil {
			t.Fatal(err)
		}
		defer done()
		other, done, err := e.Bind(context.Background(), free, session.Call{Tool: "read"})
		if err != nil {
			t.Fatal(err)
		}
		defer done()
		b.register(2, registered{"acme", worker, []string{code(2), model(1)}}, registered{"acme", "spiffe://acme/agent/free", nil})
		mustAllow(t, e, altered, session.Call{})
		mustDeny(t, e, good, session.Call{}, session.ErrDigest)
		if !errors.Is(context.Cause(work), session.ErrDigest) || other.Err() != nil {
			t.Errorf("running: %v, %v", context.Cause(work), other.Err())
		}
		b.decide(revoke(b.target("acme", session.Term{Kind: session.KindAgent, Value: worker})))
		settle()
		mustDeny(t, e, altered, session.Call{}, session.ErrRevoked) // the log goes before
	})
}

// TestDigestRules: what the weaker policies let pass, and what they do not.
func TestDigestRules(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		b.register(1, registered{"acme", worker, []string{code(1)}})
		for name, x := range map[string]struct {
			pol                           AgentPolicy
			altered, none, stranger, user error
		}{
			"required":           {AgentPolicy{}, session.ErrDigest, session.ErrDigest, session.ErrUnregistered, session.ErrUnregistered},
			"presented":          {AgentPolicy{Digests: DigestsPresented}, session.ErrDigest, nil, session.ErrUnregistered, session.ErrUnregistered},
			"ignored":            {AgentPolicy{Digests: DigestsIgnored}, nil, nil, session.ErrUnregistered, session.ErrUnregistered},
			"strangers":          {AgentPolicy{AllowUnregistered: true}, session.ErrDigest, session.ErrDigest, nil, nil},
			"strangers, present": {AgentPolicy{AllowUnregistered: true, Digests: DigestsPresented}, session.ErrDigest, nil, nil, nil},
		} {
			e, _ := b.open(guarded(x.pol))
			for id, want := range map[*session.Prepared]error{
				prepare(t, e, running(worker, code(1))): nil, prepare(t, e, running(worker, code(2))): x.altered,
				prepare(t, e, running(worker)): x.none, prepare(t, e, running("spiffe://acme/agent/x", code(2))): x.stranger,
				prepare(t, e, session.Identity{Tenant: "acme", Issuer: iss, User: "alice"}): x.user,
			} {
				if err := e.Check(id, session.Call{}); !errors.Is(err, want) || (want == nil) != (err == nil) {
					t.Errorf("%s: %v: %v, want %v", name, id.Identity().Actors, err, want)
				}
			}
			e.Close()
		}
		for _, bad := range []AgentPolicy{{MaxAge: time.Second}, {Digests: 3}, {AllowUnregistered: true, Digests: DigestsIgnored}} {
			if _, err := Start(b.feed(), &Options{Enrollment: b.enrol("e"), Agents: &bad}); !errors.Is(err, session.ErrInvalid) {
				t.Errorf("%+v: %v", bad, err)
			}
		}
	})
}

// TestAgentsAgainstAModel holds an enforcer that follows many versions of the table
// against a plain map.
func TestAgentsAgainstAModel(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		rnd := rand.New(rand.NewPCG(1, 2))
		type key struct{ tenant, id string }
		mirror := map[key][]string{}
		list := func() (out []registered) {
			for k, d := range mirror {
				out = append(out, registered{k.tenant, k.id, d})
			}
			return out
		}
		pick := func() key {
			return key{[]string{"acme", "globex"}[rnd.IntN(2)], fmt.Sprint("spiffe://acme/agent/", rnd.IntN(30))}
		}
		some := func() (out []string) {
			for range rnd.IntN(4) {
				d := code(rnd.IntN(3))
				if rnd.IntN(2) == 0 {
					d = model(rnd.IntN(3))
				}
				if !slices.Contains(out, d) {
					out = append(out, d)
				}
			}
			return out
		}
		b.register(1)
		e, _ := b.open(guarded(AgentPolicy{}))
		defer e.Close()
		denied := map[error]int{}
		for version := range uint64(60) {
			for range rnd.IntN(6) {
				if k := pick(); rnd.IntN(3) == 0 {
					delete(mirror, k)
				} else {
					mirror[k] = some()
				}
			}
			b.register(version+2, list()...)
			for range 40 {
				k := pick()
				id := running(k.id, some()...)
				if id.Tenant = k.tenant; rnd.IntN(4) == 0 {
					id.Actors = append(id.Actors, session.Actor{ID: pick().id})
				}
				var want error
				have, known := mirror[k]
				for _, a := range id.Actors {
					if _, ok := mirror[key{k.tenant, a.ID}]; !ok {
						known = false
					}
				}
				for _, sort := range []string{"code:", "model:"} {
					of := func(all []string) (out []string) {
						for _, d := range all {
							if strings.HasPrefix(d, sort) {
								out = append(out, d)
							}
						}
						return out
					}
					if len(of(have)) > 0 && (len(of(id.Digests)) == 0 || slices.ContainsFunc(of(id.Digests), func(d string) bool { return !slices.Contains(have, d) })) {
						want = session.ErrDigest
					}
				}
				err := e.Check(prepare(t, e, id), session.Call{})
				if !known && want == nil {
					want = session.ErrUnregistered
				}
				if ok := errors.Is(err, want) || !known && errors.Is(err, session.ErrUnregistered); !ok || (want == nil) != (err == nil) {
					t.Fatalf("version %d: %v: %v, want %v", version, id, err, want)
				}
				denied[want]++
			}
		}
		if len(denied) != 3 {
			t.Errorf("the test tests nothing: %v", denied)
		}
	})
}

// TestAgentsOnAHostileBus: what a heartbeat names counts, by its hash, and nothing
// else; what is withheld makes the table stale.
func TestAgentsOnAHostileBus(t *testing.T) {
	good := registered{"acme", worker, []string{code(1)}}
	evil := registered{"acme", worker, []string{code(2)}}
	for name, x := range map[string]struct {
		attack func(b *bus)
		why    string
	}{
		"another index in its place, unsigned": {func(b *bus) {
			index, parts := b.table(6, key(b.t), evil)
			b.storeTable(index, parts)
		}, ""},
		"another index in its place, signed and not named": {func(b *bus) { // a replay
			index, parts := b.table(6, b.signer, evil)
			b.storeTable(index, parts)
		}, ""},
		"an index of nobody's is named": {func(b *bus) {
			index, parts := b.table(6, key(b.t), evil)
			b.storeTable(index, parts)
			b.name(index)
		}, "cannot be read: frame refused: key not trusted"},
		"another index under the version that is named": {func(b *bus) {
			index, parts := b.table(6, b.signer, evil)
			b.storeTable(index, parts)
			index, _ = b.table(6, b.signer, good, registered{"acme", "spiffe://acme/agent/x", nil})
			b.name(index)
		}, "is not in the store"},
		"the signature is nobody's": {func(b *bus) {
			index, parts := b.table(6, b.signer, evil)
			index[len(index)-1] ^= 1
			b.storeTable(index, parts)
			b.name(index)
		}, "bad signature"},
		"the index is withheld": {func(b *bus) {
			index, _ := b.table(6, b.signer, evil)
			b.name(index)
		}, "is not in the store"},
		"the parts are withheld": {func(b *bus) {
			index, _ := b.table(6, b.signer, evil)
			b.storeTable(index, nil)
			b.name(index)
		}, "parts of the table are not in the store"},
		"a part is altered": {func(b *bus) {
			index, parts := b.table(6, b.signer, evil)
			parts[0][30] ^= 1
			b.storeTable(index, parts)
			b.name(index)
		}, "parts of the table are not in the store"},
		"an index that counts another number": {func(b *bus) {
			_, parts := b.table(6, b.signer, evil)
			x := session.AgentIndex{Epoch: 1, Version: 6, Agents: 2}
			x.Parts[b.target("acme", session.Term{Kind: session.KindAgent, Value: worker}).Digest[0]] = sha256.Sum256(parts[0])
			index := b.seal(session.TypeAgents, x.MarshalBody(), b.signer)
			b.storeTable(index, parts)
			b.name(index)
		}, "1 agents, the index says 2"},
		"an older one is named": {func(b *bus) {
			index, parts := b.table(4, b.signer, evil)
			b.storeTable(index, parts)
			b.name(index)
		}, "older table"},
		"none is named": {func(b *bus) { b.name(nil) }, "names no table"},
	} {
		t.Run(name, func(t *testing.T) {
			within(t, func(t *testing.T, b *bus) {
				b.register(5, good)
				e, _ := b.open(guarded(AgentPolicy{MaxAge: 5 * time.Second}))
				defer e.Close()
				p, q := prepare(t, e, running(worker, code(1))), prepare(t, e, running(worker, code(2)))
				x.attack(b)
				settle()
				mustAllow(t, e, p, session.Call{}) // not too old yet
				mustDeny(t, e, q, session.Call{}, session.ErrDigest)
				work, done, err := e.Bind(context.Background(), p, session.Call{})
				if err != nil {
					t.Fatal(err)
				}
				defer done()
				time.Sleep(6 * time.Second)
				settle()
				mustDeny(t, e, q, session.Call{}, session.ErrDenied)
				s := e.Status()
				if x.why == "" {
					mustAllow(t, e, p, session.Call{})
					if !s.Fresh || s.Agents.Version != 5 || work.Err() != nil {
						t.Errorf("%+v, %v", s.Agents, work.Err())
					}
					return
				}
				mustDeny(t, e, p, session.Call{}, session.ErrStale)
				if s.Fresh || s.Agents.Fresh || !strings.Contains(s.Why, x.why) || s.Why != s.Agents.Why || s.Agents.Age < 5*time.Second {
					t.Errorf("%+v, %+v", s, s.Agents)
				}
				if !errors.Is(context.Cause(work), session.ErrStale) {
					t.Errorf("running: %v", context.Cause(work))
				}
				// It ends with the attack.
				b.register(9, good)
				mustAllow(t, e, p, session.Call{})
				if s := e.Status(); !s.Fresh || s.Agents.Version != 9 {
					t.Errorf("%+v", s.Agents)
				}
			})
		})
	}
}

// TestAgentsOfAWriterForSomeTenants: a key that may not speak for all tenants names
// no table, and seals none.
func TestAgentsOfAWriterForSomeTenants(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		good := registered{"acme", worker, nil}
		b.register(1, good)
		b.newKeySet(func(ks *session.KeySet) {
			ks.Keys = append(ks.Keys, session.SigningKey{Public: b.pub("b"), Use: session.UseWriter, Tenants: []session.TenantID{1}})
		})
		e, _ := b.open(guarded(AgentPolicy{MaxAge: 3 * time.Second}))
		defer e.Close()
		p := prepare(t, e, running(worker))
		index, parts := b.table(2, b.keys["b"], good)
		b.storeTable(index, parts)
		b.name(index) // in a's heartbeat
		time.Sleep(4 * time.Second)
		mustDeny(t, e, p, session.Call{}, session.ErrStale)
		if s := e.Status(); !strings.Contains(s.Why, "may not speak for all tenants") {
			t.Error(s.Why)
		}
		b.register(3, good)
		mustAllow(t, e, p, session.Call{})
		b.as(func(b *bus) { b.signer = b.keys["b"] }) // whose heartbeats name what is good
		time.Sleep(4 * time.Second)
		mustDeny(t, e, p, session.Call{}, session.ErrStale)
		if s := e.Status(); !strings.Contains(s.Why, "names no table") {
			t.Error(s.Why)
		}
	})
}

// TestAgentsOfAWithdrawnKey: what a stolen key has registered ends with the key,
// and its version, however high, keeps nobody out.
func TestAgentsOfAWithdrawnKey(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		b.newKeySet(func(ks *session.KeySet) {
			ks.Keys = append(ks.Keys, session.SigningKey{Public: b.pub("b"), Use: session.UseWriter})
		})
		index, parts := b.table(1<<62, b.keys["b"], registered{"acme", worker, []string{code(2)}})
		b.storeTable(index, parts)
		b.name(index)
		e, _ := b.open(guarded(AgentPolicy{}))
		defer e.Close()
		p, q := prepare(t, e, running(worker, code(1))), prepare(t, e, running(worker, code(2)))
		mustAllow(t, e, q, session.Call{})
		b.newKeySet(func(ks *session.KeySet) { ks.Keys[1].Withdrawn, ks.Keys[1].LastEpoch = true, 1 })
		settle()
		mustDeny(t, e, q, session.Call{}, session.ErrStale)
		b.beat()
		time.Sleep(2 * time.Second)
		mustDeny(t, e, q, session.Call{}, session.ErrStale) // although it is still named
		b.register(2, registered{"acme", worker, []string{code(1)}})
		mustAllow(t, e, p, session.Call{})
		mustDeny(t, e, q, session.Call{}, session.ErrDigest)
	})
}

// TestKeyRotationDeniesNobody: what another key has signed anew outlives the key
// that had signed it before, is not read again, and cuts nothing.
func TestKeyRotationDeniesNobody(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		agents := registered{"acme", worker, []string{code(1)}}
		b.register(1, agents)
		e, _ := b.open(guarded(AgentPolicy{}))
		defer e.Close()
		p := prepare(t, e, running(worker, code(1)))
		work := mustBind(t, e, p, session.Call{})
		reads := b.agentReads
		b.newKeySet(func(ks *session.KeySet) {
			ks.Keys = append(ks.Keys, session.SigningKey{Public: b.pub("b"), Use: session.UseWriter})
		})
		b.as(func(b *bus) { b.signer = b.keys["b"] })
		b.register(2, agents)
		mustAllow(t, e, p, session.Call{})
		b.newKeySet(func(ks *session.KeySet) {
			ks.Keys[0].Withdrawn, ks.Keys[0].LastEpoch, ks.Keys[0].LastNumber = true, 1, b.number
		})
		settle()
		mustAllow(t, e, p, session.Call{})
		mustRun(work, t)
		b.with(func(b *bus) {
			if b.agentReads != reads {
				t.Errorf("%d parts read", b.agentReads-reads)
			}
		})
	})
}

// TestAgentsFasterThanTheyAreRead: tables that follow each other faster than one is
// read come into force one after the other, each as old as it is.
func TestAgentsFasterThanTheyAreRead(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		b.register(1, registered{"acme", worker, nil})
		e, _ := b.open(guarded(AgentPolicy{MaxAge: 4 * time.Second}))
		defer e.Close()
		p := prepare(t, e, running(worker))
		b.with(func(b *bus) { b.agentDelay = 1500 * time.Millisecond })
		for i := range 20 {
			index, parts := b.table(uint64(i+2), b.signer, registered{"acme", worker, []string{code(i)}}, registered{"acme", worker + "x", nil})
			b.storeTable(index, parts)
			b.name(index)
			for range 7 {
				time.Sleep(100 * time.Millisecond)
				if err := e.Check(p, session.Call{}); errors.Is(err, session.ErrStale) {
					t.Fatalf("version %d: %v (%+v)", i+2, err, e.Status().Agents)
				}
			}
			if s := e.Status().Agents; i > 5 && (s.Version < uint64(i-3) || s.Age < 700*time.Millisecond) {
				t.Fatalf("version %d is named: %+v", i+2, s)
			}
		}
	})
}

// TestAgentsNamedBeforeAJump: a table that was named before a clock jumped is not
// fresh when it comes after that.
func TestAgentsNamedBeforeAJump(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		h := newHost()
		b.register(1, registered{"acme", worker, nil})
		e, _ := b.open(func(o *Options) { o.Agents, o.clock = &AgentPolicy{MaxAge: time.Minute}, h.read })
		defer e.Close()
		p := prepare(t, e, running(worker))
		b.with(func(b *bus) { b.agentDelay = 3 * time.Second })
		index, parts := b.table(2, b.signer, registered{"acme", worker, []string{code(1)}}, registered{"acme", worker + "x", nil})
		b.storeTable(index, parts)
		b.name(index) // and is being read
		b.name(nil)   // by nobody from now on, but for what the host has heard
		h.set(time.Hour)
		time.Sleep(5 * time.Second)
		settle()
		mustDeny(t, e, p, session.Call{}, session.ErrStale)
		if s := e.Status(); s.Agents.Fresh || s.Jumps != 1 {
			t.Errorf("%+v", s)
		}
	})
}

// TestAgentsAcrossARestart: the table of the last run serves from the first
// heartbeat that names it, without being read again, keeps an older one out, and is
// no loss when the file is damaged.
func TestAgentsAcrossARestart(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		dir := t.TempDir()
		pol := func(o *Options) { o.Agents, o.StateDir = &AgentPolicy{MaxAge: 3 * time.Second}, dir }
		var agents []registered
		for i := range 50 {
			agents = append(agents, registered{"acme", fmt.Sprint(worker, i), []string{code(1)}})
		}
		older, olderParts := b.table(4, b.signer, registered{"acme", worker, []string{code(2)}})
		b.register(5, agents...)
		e, _ := b.open(pol)
		mustAllow(t, e, prepare(t, e, running(worker+"7", code(1))), session.Call{})
		e.Close()
		path := filepath.Join(dir, "e1.agents")
		kept, err := os.ReadFile(path)
		if info, serr := os.Stat(path); err != nil || serr != nil || info.Mode().Perm() != 0o600 {
			t.Fatal(err, info)
		}

		reads := func() (n int) { b.with(func(b *bus) { n, b.agentReads = b.agentReads, 0 }); return n }
		reads()
		e, _ = b.start(pol)
		p := prepare(t, e, running(worker+"7", code(1)))
		mustDeny(t, e, p, session.Call{}, session.ErrStale) // not named yet
		time.Sleep(time.Second)
		mustAllow(t, e, p, session.Call{})
		if n := reads(); n != 0 {
			t.Errorf("%d parts read", n)
		}
		e.Close()

		// One agent more: what has changed is read, and no more.
		b.register(6, append(agents, registered{"acme", worker, nil})...)
		e, _ = b.open(pol)
		if n := reads(); n != 1 {
			t.Errorf("%d parts read", n)
		}
		e.Close()

		b.storeTable(older, olderParts)
		b.name(older)
		e, _ = b.start(pol)
		time.Sleep(4 * time.Second)
		mustDeny(t, e, prepare(t, e, running(worker, code(2))), session.Call{}, session.ErrStale)
		if s := e.Status(); s.RolledBack == 0 || !strings.Contains(s.Why, "older table") {
			t.Errorf("%+v", s)
		}
		e.Close()

		b.register(7, agents...)
		version := binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64(nil, 1), 5)
		rotten := bytes.Clone(version)
		rotten[9] ^= 1
		if bytes.Count(kept, version) != 1 {
			t.Fatal("where is the version?")
		}
		for _, damage := range [][]byte{bytes.Replace(kept, version, rotten, 1), nil, kept[:len(kept)/2], bytes.Replace(kept, []byte("ILK"), []byte("ilk"), 1), append([]byte{0xff}, kept...)} {
			if err := os.WriteFile(path, damage, 0o600); err != nil {
				t.Fatal(err)
			}
			e, _ = b.open(pol)
			mustAllow(t, e, prepare(t, e, running(worker+"7", code(1))), session.Call{})
			if s := e.Status(); s.Damaged != 1 {
				t.Errorf("%+v", s)
			}
			e.Close()
		}
	})
}

// TestAgentsWithoutAFeed: a feed that has no table denies, and says so.
func TestAgentsWithoutAFeed(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		b.register(1, registered{"acme", worker, nil})
		e, err := Start(struct{ Feed }{b.feed()}, &Options{Enrollment: b.enrol("e1"), Agents: &AgentPolicy{}})
		if err != nil {
			t.Fatal(err)
		}
		defer e.Close()
		time.Sleep(2 * time.Second)
		mustDeny(t, e, prepare(t, e, running(worker)), session.Call{}, session.ErrStale)
		if s := e.Status(); s.Ready || s.Fresh || !strings.Contains(s.Why, errNoAgentFeed.Error()) {
			t.Errorf("%+v", s)
		}
	})
}

// TestAgentsFailOpen: best effort goes on by a table that is too old, and says so;
// strict calls do not, and without any table nobody does.
func TestAgentsFailOpen(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		pol := func(o *Options) { o.Agents, o.Mode = &AgentPolicy{MaxAge: 2 * time.Second}, session.ModeBestEffort }
		none, _ := b.start(pol)
		defer none.Close()
		time.Sleep(2 * time.Second)
		mustDeny(t, none, prepare(t, none, running(worker)), session.Call{}, session.ErrStale)
		b.register(1, registered{"acme", worker, []string{code(1)}})
		e, _ := b.open(pol)
		defer e.Close()
		p, q := prepare(t, e, running(worker, code(1))), prepare(t, e, running(worker, code(2)))
		mustAllow(t, e, p, session.Call{})
		if n := e.Status().Exposed; n != 0 {
			t.Error(n)
		}
		b.name(nil)
		time.Sleep(3 * time.Second)
		mustAllow(t, e, p, session.Call{})
		mustDeny(t, e, q, session.Call{}, session.ErrDigest)
		mustDeny(t, e, p, session.Call{Strict: true}, session.ErrStale)
		if n := e.Status().Exposed; n != 1 {
			t.Error(n)
		}
	})
}

// TestAgentsOnTheAllowPath guards G8 where callers are held against the registry:
// with every mutex held and the follower blocked, a check answers, and allocates
// nothing.
func TestAgentsOnTheAllowPath(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		b.register(1, registered{"acme", worker, []string{code(1), model(1)}})
		e, f := b.open(guarded(AgentPolicy{}))
		defer e.Close()
		p, q := prepare(t, e, running(worker, code(1), model(1))), prepare(t, e, running(worker, code(2)))
		busy, stop := make(chan struct{}), make(chan struct{})
		f.to().(sink).push(func() { close(busy); <-stop })
		<-busy
		e.bound.mu.Lock()
		if n := testing.AllocsPerRun(100, func() { mustAllow(t, e, p, session.Call{Tool: "read"}) }); n != 0 {
			t.Errorf("%v allocations", n)
		}
		mustDeny(t, e, q, session.Call{}, session.ErrDigest)
		e.bound.mu.Unlock()
		close(stop)
	})
}

// BenchmarkAgents is what holding callers against the registry adds to a check.
func BenchmarkAgents(b *testing.B) {
	for _, n := range []int{0, 10_000, 100_000} { // 0 is without
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			bus := newBus(b)
			var agents []registered
			for i := range n {
				agents = append(agents, registered{"acme", fmt.Sprint(worker, i), []string{code(i), model(i)}})
			}
			if n > 0 {
				index, parts := bus.table(1, bus.signer, agents...)
				bus.storeTable(index, parts)
				bus.named = refOf(b, index)
			}
			b.Cleanup(bus.run())
			e, _ := bus.open(func(o *Options) {
				if o.MaxStale = time.Hour; n > 0 {
					o.Agents = &AgentPolicy{}
				}
			})
			b.Cleanup(func() { e.Close() })
			all := make([]*session.Prepared, 256)
			for i := range all {
				j := i * max(n, 256) / 256
				all[i] = prepare(b, e, running(fmt.Sprint(worker, j), code(j), model(j)))
			}
			b.ReportAllocs()
			i := 0
			for b.Loop() {
				if err := e.Check(all[i%256], session.Call{Tool: "read"}); err != nil {
					b.Fatal(err)
				}
				i++
			}
			if a := e.Status().Agents; a != nil {
				b.ReportMetric(float64(a.Bytes), "B-table")
			}
		})
	}
}
