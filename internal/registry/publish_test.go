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

	"github.com/nats-io/nats.go/jetstream"

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

// withdraw brings a key set in which key i signs nothing any more.
func (k *publishing) withdraw(t testing.TB, i int) {
	t.Helper()
	signer := k.signer.Load()
	k.rotate(t, func(ks *session.KeySet) {
		ks.Keys = ks.Keys[:len(ks.Keys)-1]
		ks.Keys[i].Withdrawn, ks.Keys[i].LastEpoch = true, 1
	})
	k.signer.Store(signer)
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
		if err != nil {
			return -1
		}
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

	// Another key signs the same index anew, and when the one before is withdrawn
	// then, nothing has to change. The parts stay.
	stream, err := w.js.Stream(w.ctx, natsfeed.AgentStream)
	must(t, err)
	parts := func() (last uint64) {
		for i := range session.AgentParts {
			if m, err := stream.GetLastMsgForSubject(w.ctx, natsfeed.AgentPartSubject(byte(i))); err == nil {
				last = max(last, m.Sequence)
			}
		}
		return last
	}
	before, stored := p.Ref(), parts()
	k.rotate(t, nil)
	w.until("the key of now signs it", func() bool { return p.Ref() != before && w.named(p) == 20 })
	before = p.Ref()
	k.withdraw(t, 0)
	mark, err := r.agentMark()
	must(t, err)
	x, err := p.publish(w.ctx, nil, mark) // what it does under the new key set
	must(t, err)
	if x.ref != before || w.named(p) != 20 || parts() != stored {
		t.Errorf("%v after the withdrawal of a key that has signed nothing of it, %v before; parts up to %d, %d", x.ref, before, parts(), stored)
	}

	// A key that is withdrawn vouches for nothing: the same is published anew.
	k.rotate(t, func(ks *session.KeySet) { ks.Keys[1].Withdrawn, ks.Keys[1].LastEpoch = true, 1 })
	w.until("another key signs it", func() bool { return p.Ref() != before && w.named(p) == 20 })

	// Agents whose keys cannot be derived here would be denied as strangers.
	register(Agent{Tenant: "umbrella", Ref: Ref{ID: "spiffe://corp/agent/x"}})
	w.until("nothing is named without the tenant's key", func() bool {
		return p.Ref() == session.AgentsRef{} && errors.Is(p.Status().Err, errNoSecret)
	})
}

// TestTwoPublishers: of two authorities that both believe that they write, the one
// that has read what the other has since replaced publishes no index. In the end
// both name the same.
func TestTwoPublishers(t *testing.T) {
	w := newWorld(t, true)
	k := newPublishing(t)
	r := w.open(Options{})
	register := func(i int) agentMark {
		t.Helper()
		_, _, err := r.RegisterAgent(w.ctx, bot(i), 0)
		must(t, err)
		mark, err := r.agentMark()
		must(t, err)
		return mark
	}
	first := register(1)
	var between func()
	p := make([]*Publisher, 2)
	for i := range p {
		var err error
		p[i], err = NewPublisher(PublisherOptions{NC: w.nc, Registry: r, Keys: k, Published: func() {}, Writer: func() bool {
			if f := between; i == 0 && f != nil { // the first is about to write
				between = nil
				f()
			}
			return true
		}})
		must(t, err)
	}
	var second *published
	between = func() {
		var err error
		second, err = p[1].publish(w.ctx, nil, register(2))
		must(t, err)
	}
	if _, err := p[0].publish(w.ctx, nil, first); err == nil {
		t.Error("a deposed writer has put its table in the place of its successor's")
	}
	mark, err := r.agentMark()
	must(t, err)
	third, err := p[0].publish(w.ctx, nil, mark)
	must(t, err)
	if third.ref != second.ref {
		t.Errorf("%v after %v, of the same agents", third.ref, second.ref)
	}
	p[0].ref.Store(&third.ref)
	if n := w.named(p[0]); n != 2 {
		t.Errorf("%d agents", n)
	}
	// Whoever writes next does not believe that the parts are there.
	s, err := w.js.Stream(w.ctx, natsfeed.AgentStream)
	must(t, err)
	must(t, s.Purge(w.ctx, jetstream.WithPurgeSubject(natsfeed.AgentPartSubjects)))
	next, err := p[1].publish(w.ctx, nil, mark)
	must(t, err)
	p[1].ref.Store(&next.ref)
	if n := w.named(p[1]); n != 2 || next.ref.Version <= third.ref.Version {
		t.Errorf("%d agents, version %d after %d", n, next.ref.Version, third.ref.Version)
	}
}

// TestVersionsGrow: enforcers take no lower version, so a clock that steps back, or
// had been ahead by however much, lowers none.
func TestVersionsGrow(t *testing.T) {
	w := newWorld(t, true)
	k := newPublishing(t)
	r := w.open(Options{})
	_, _, err := r.RegisterAgent(w.ctx, bot(1), 0)
	must(t, err)
	ahead := session.AgentIndex{Epoch: 1, Version: uint64(in(48 * time.Hour)), Time: in(48 * time.Hour)}
	frame, err := session.Seal(session.TypeAgents, ahead.MarshalBody(), *k.signer.Load())
	must(t, err)
	_, err = w.js.Publish(w.ctx, natsfeed.AgentSubject, frame)
	must(t, err)
	p, err := NewPublisher(PublisherOptions{NC: w.nc, Registry: r, Keys: k, Published: func() {}, Writer: func() bool { return true }})
	must(t, err)
	mark, err := r.agentMark()
	must(t, err)
	next, err := p.publish(w.ctx, nil, mark)
	must(t, err)
	if next.ref.Version != ahead.Version+1 {
		t.Errorf("version %d after %d", next.ref.Version, ahead.Version)
	}
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
