package registry

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/interlock-fabric/interlock/pkg/natsfeed"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// publishing is what a publisher signs and derives keys with.
type publishing struct {
	trust  *session.Trust
	root   ed25519.PrivateKey
	signer atomic.Pointer[ed25519.PrivateKey]
	secret *session.TenantSecret
	set    session.KeySet
}

func newPublishing(t testing.TB) *publishing {
	t.Helper()
	public, root, err := ed25519.GenerateKey(nil)
	must(t, err)
	k := &publishing{root: root}
	k.trust, err = session.NewTrust(public)
	must(t, err)
	k.secret, err = session.NewTenantSecret(1, "acme", make([]byte, 32))
	must(t, err)
	k.set = session.KeySet{Epoch: 1, Issued: in(-time.Hour), NotAfter: in(time.Hour), Tenants: []session.Tenant{{ID: 1, Name: "acme"}}}
	k.rotate(t, nil)
	return k
}

// rotate brings another signing key, in a key set that mod may change.
func (k *publishing) rotate(t testing.TB, mod func(*session.KeySet)) {
	t.Helper()
	public, key, err := ed25519.GenerateKey(nil)
	must(t, err)
	k.set.Version++
	k.set.Keys = append(slices.Clone(k.set.Keys), session.SigningKey{Public: public, Use: session.UseWriter})
	if mod != nil {
		mod(&k.set)
	}
	body, err := k.set.MarshalBody()
	must(t, err)
	frame, err := session.Seal(session.TypeKeySet, body, k.root)
	must(t, err)
	_, err = k.trust.Update(frame, in(0))
	must(t, err)
	k.signer.Store(&key)
}

func (k *publishing) Trust() *session.Trust { return k.trust }
func (k *publishing) Signer(session.Instant) (ed25519.PrivateKey, error) {
	return *k.signer.Load(), nil
}
func (k *publishing) Secrets() ([]*session.TenantSecret, []string) {
	return []*session.TenantSecret{k.secret}, []string{"umbrella"}
}

// publisher runs one.
func (w *world) publisher(r *Registry, k *publishing, writer *atomic.Bool) *Publisher {
	w.Helper()
	p, err := NewPublisher(PublisherOptions{NC: w.nc, Registry: r, Keys: k, Writer: writer.Load, Published: func() {}})
	must(w, err)
	p.behind, p.rest = 500*time.Millisecond, 10*time.Millisecond
	ctx, cancel := context.WithCancel(w.ctx)
	done := make(chan struct{})
	go func() { defer close(done); p.Run(ctx) }()
	w.Cleanup(func() { cancel(); <-done })
	return p
}

// named reads the table that a publisher names as an enforcer does, and returns how
// many agents it has; -1 while it names none that is whole.
func (w *world) named(p *Publisher) int {
	w.Helper()
	ref := p.Ref()
	s, err := w.js.Stream(w.ctx, natsfeed.AgentStream)
	must(w, err)
	m, err := s.GetLastMsgForSubject(w.ctx, natsfeed.AgentSubject)
	if err != nil {
		return -1
	}
	f, err := session.ParseFrame(m.Data)
	if err != nil || f.Hash() != ref.Sum {
		return -1
	}
	x, err := session.UnmarshalAgentIndex(f.Body)
	must(w, err)
	n := 0
	for i, sum := range x.Parts {
		if sum == (session.Hash{}) {
			continue
		}
		m, err := s.GetLastMsgForSubject(w.ctx, natsfeed.AgentPartSubject(byte(i)))
		must(w, err)
		part, err := session.ParseAgentPart(m.Data, byte(i))
		must(w, err)
		if part.Sum() != sum {
			return -1
		}
		n += part.Len()
	}
	if n != int(x.Agents) || x.Version != ref.Version {
		w.Fatalf("%d agents, the index says %d of version %d, named is %d", n, x.Agents, x.Version, ref.Version)
	}
	return n
}

// TestTableIsNamedWhileItIsRight: what heartbeats name is whole, and is what the
// registry says; when that is not known any more, nothing is named.
func TestTableIsNamedWhileItIsRight(t *testing.T) {
	w := newWorld(t, true)
	var away atomic.Bool
	r := w.open(Options{Hooks: Hooks{Ask: func() error {
		if away.Load() {
			return errors.New("the store is away")
		}
		return nil
	}}})
	k := newPublishing(t)
	var writer atomic.Bool
	p := w.publisher(r, k, &writer)
	register := func(a Agent) {
		t.Helper()
		_, _, err := r.RegisterAgent(w.ctx, a, 0)
		must(t, err)
	}
	register(bot(1))
	if p.Ref() != (session.AgentsRef{}) {
		t.Error("named by one that is not the writer")
	}
	writer.Store(true)
	w.until("it is named", func() bool { return w.named(p) == 1 })
	first := p.Ref()
	for i := range 20 {
		register(bot(i + 2))
	}
	w.until("all are in it", func() bool { return w.named(p) == 21 })
	if _, err := r.SetState(w.ctx, "acme", bot(1).Ref, Decommissioned, nil); err != nil {
		t.Fatal(err)
	}
	w.until("what is decommissioned is not", func() bool { return w.named(p) == 20 })
	if _, err := r.SetState(w.ctx, "acme", bot(2).Ref, Suspended, nil); err != nil {
		t.Fatal(err)
	}

	away.Store(true)
	w.until("nothing is named while the registry cannot be read", func() bool { return p.Ref() == session.AgentsRef{} && p.Status().Err != nil })
	away.Store(false)
	w.until("what is suspended still is in it, and the version is higher", func() bool {
		return w.named(p) == 20 && p.Status().Err == nil && p.Ref().Version > first.Version
	})

	// A key that is withdrawn vouches for nothing: the same is published anew.
	before := p.Ref()
	k.rotate(t, func(ks *session.KeySet) { ks.Keys[0].Withdrawn, ks.Keys[0].LastEpoch = true, 1 })
	w.until("another key signs it", func() bool { return p.Ref() != before && w.named(p) == 20 })

	// Agents whose keys cannot be derived here would be denied as strangers.
	register(Agent{Tenant: "umbrella", Ref: Ref{ID: "spiffe://corp/agent/x"}})
	w.until("nothing is named without the tenant's key", func() bool {
		return p.Ref() == session.AgentsRef{} && errors.Is(p.Status().Err, errNoSecret)
	})
}

// TestTwoPublishers: while two authorities both believe that they write, what is in
// the store is one table after the other, each whole, in ascending versions.
func TestTwoPublishers(t *testing.T) {
	w := newWorld(t, true)
	k := newPublishing(t)
	var writer atomic.Bool
	writer.Store(true)
	r := []*Registry{w.open(Options{}), w.open(Options{})}
	p := []*Publisher{w.publisher(r[0], k, &writer), w.publisher(r[1], k, &writer)}
	for i := range 10 {
		_, _, err := r[i%2].RegisterAgent(w.ctx, bot(i), 0)
		must(t, err)
	}
	w.until("both name the same, and it is right", func() bool {
		return p[0].Ref() == p[1].Ref() && w.named(p[0]) == 10
	})
	s, err := w.js.Stream(w.ctx, natsfeed.AgentStream)
	must(t, err)
	last := uint64(0)
	for seq := uint64(1); seq <= s.CachedInfo().State.LastSeq; seq++ {
		m, err := s.GetMsg(w.ctx, seq)
		if err != nil || m.Subject != natsfeed.AgentSubject {
			continue
		}
		f, err := session.ParseFrame(m.Data)
		must(t, err)
		x, err := session.UnmarshalAgentIndex(f.Body)
		must(t, err)
		if x.Version <= last {
			t.Errorf("version %d after %d", x.Version, last)
		}
		last = x.Version
	}
	writer.Store(false)
	w.until("a deposed one names nothing", func() bool { return p[0].Ref() == session.AgentsRef{} })
}

func BenchmarkTable(b *testing.B) {
	w := newWorld(b, true)
	r := w.open(Options{})
	for i := range 10_000 {
		a := bot(i)
		a.Digests = []string{fmt.Sprintf("code:sha256:%064x", i), fmt.Sprintf("model:sha256:%064x", i)}
		must(b, a.canonical())
		r.mu.Lock()
		r.x.putAgent(uint64(i+1), &AgentRecord{Agent: a, State: Active, Revision: uint64(i + 1)})
		r.mu.Unlock()
	}
	p, err := NewPublisher(PublisherOptions{NC: w.nc, Registry: r, Keys: newPublishing(b)})
	must(b, err)
	for b.Loop() {
		if x, _, err := p.table(); err != nil || x.Agents != 10_000 {
			b.Fatal(err)
		}
	}
}
