package registry

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/interlock-fabric/interlock/pkg/natsfeed"
	"github.com/interlock-fabric/interlock/pkg/session"
)

const (
	// publishPoll is how soon a change is noticed, and publishRest how long at
	// least the table is left as it is after a publication: those who follow it
	// read what has changed each time.
	publishPoll = 100 * time.Millisecond
	publishRest = time.Second
	// publishDuty is how many times as long as the last publication took nothing
	// is published.
	publishDuty = 4
	// lookAgain is how often the writer looks whether what it has published is
	// still there.
	lookAgain = time.Second
	// behindLimit is how long heartbeats go on naming a table of which it is not
	// known that it is what the registry says.
	behindLimit = 5 * time.Second
	// putLimit bounds one write.
	putLimit = 5 * time.Second
)

// errNoSecret: there are agents of a tenant whose key is not here.
var errNoSecret = errors.New("registry: there are agents of a tenant whose key is not here")

// PublisherKeys are the authority's.
type PublisherKeys interface {
	Trust() *session.Trust
	Signer(now session.Instant) (ed25519.PrivateKey, error)
	// Secrets returns the keys of the tenants, and the names of those whose key is
	// not here.
	Secrets() (have []*session.TenantSecret, missing []string)
}

// PublisherOptions configures a Publisher. All but Logger are required.
type PublisherOptions struct {
	NC       *nats.Conn
	Registry *Registry
	Keys     PublisherKeys
	// Writer reports whether this authority is the writer, which alone publishes.
	Writer func() bool
	// Published is called when heartbeats are to name another table.
	Published func()
	Logger    *slog.Logger
}

// Publisher publishes the table of registered agents for enforcers: the parts that
// have changed, and then their signed index. What of it counts is for heartbeats
// to say; see Ref.
type Publisher struct {
	o   PublisherOptions
	log *slog.Logger
	js  jetstream.JetStream
	// ref is what heartbeats are to name: nil while that is nothing.
	ref   atomic.Pointer[session.AgentsRef]
	state atomic.Pointer[PublisherStatus]
	// behindLimit and publishRest, but for tests.
	behind, rest time.Duration
}

// PublisherStatus says what is published.
type PublisherStatus struct {
	Version uint64 // 0 before there is one
	Agents  int
	At      session.Instant
	// Err is why the table is not what the registry says; nil while it is, and
	// while this is not the writer.
	Err error
}

// NewPublisher returns one that Run runs.
func NewPublisher(o PublisherOptions) (*Publisher, error) {
	js, err := jetstream.New(o.NC)
	if err != nil {
		return nil, fmt.Errorf("registry: %w", err)
	}
	p := &Publisher{o: o, log: o.Logger, js: js, behind: behindLimit, rest: publishRest}
	if p.log == nil {
		p.log = slog.New(slog.DiscardHandler)
	}
	p.state.Store(&PublisherStatus{})
	return p, nil
}

// Ref returns the table that heartbeats are to name: zero when there is none, or
// none of which it is known that it is what the registry says. It may be called on
// nil, and takes no lock.
func (p *Publisher) Ref() session.AgentsRef {
	if p == nil {
		return session.AgentsRef{}
	}
	if r := p.ref.Load(); r != nil {
		return *r
	}
	return session.AgentsRef{}
}

// Status says what is published. It waits for nothing.
func (p *Publisher) Status() PublisherStatus { return *p.state.Load() }

// published is a table in the store.
type published struct {
	index *session.AgentIndex
	ref   session.AgentsRef
	mark  agentMark // of the registry that it is made of
	set   uint64    // version of the key set
	seq   uint64    // of the index in its stream; what the next must come after
	// signer signed the index: when that key is withdrawn, enforcers let go of
	// what it signed.
	signer session.KeyID
}

// Run publishes until ctx ends.
func (p *Publisher) Run(ctx context.Context) {
	tick := time.NewTicker(publishPoll)
	defer tick.Stop()
	var have *published // nil is to be looked up
	var rest, look time.Time
	good := time.Now() // when the table was last known to be right
	failing := false
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		now := time.Now()
		if !p.o.Writer() {
			p.ref.Store(nil) // another's heartbeats name it
			if have, good = nil, now; failing {
				failing = false
				p.state.Store(&PublisherStatus{})
			}
			continue
		}
		mark, err := p.o.Registry.agentMark()
		if err == nil && have != nil && now.After(look) {
			look = now.Add(lookAgain)
			var last *published
			if last, err = p.stored(ctx); err == nil && last.ref != have.ref {
				have = nil
			}
		}
		if err == nil && (have == nil || !p.current(have, mark)) && now.After(rest) {
			have, err = p.publish(ctx, have, mark)
			took := time.Since(now)
			now = time.Now()
			rest, look = now.Add(max(p.rest, min(publishDuty*took, putLimit))), now.Add(lookAgain)
		}
		if ctx.Err() != nil {
			return
		}
		s := *p.state.Load()
		switch {
		case err == nil && have != nil && p.current(have, mark):
			good, failing = now, false
			s.Err = nil
			s.Version, s.Agents, s.At = have.index.Version, int(have.index.Agents), have.index.Time
			if before := p.ref.Swap(&have.ref); before == nil || *before != have.ref {
				p.o.Published()
			}
		case err != nil:
			s.Err = err
			if !failing {
				p.log.Warn("the table of registered agents is not published", "error", err)
			}
			failing = true
			fallthrough
		default: // not due again yet
			if now.Sub(good) > p.behind {
				p.ref.Store(nil)
			}
		}
		p.state.Store(&s)
	}
}

// current reports whether a published table is what the registry says, under the
// keys of now.
func (p *Publisher) current(have *published, mark agentMark) bool {
	ks := p.o.Keys.Trust().KeySet()
	signer, _, err := p.signer()
	return err == nil && have.signer == signer && have.mark == mark && have.set == ks.Version && have.index.Epoch == ks.Epoch
}

// signer returns the key that signs now.
func (p *Publisher) signer() (session.KeyID, ed25519.PrivateKey, error) {
	key, err := p.o.Keys.Signer(session.InstantOf(time.Now()))
	if err != nil {
		return session.KeyID{}, nil, err
	}
	return session.KeyIDOf(key.Public().(ed25519.PublicKey)), key, nil
}

// publish brings what is published to what the registry says. Of what is in the
// store it believes nothing that it has not read and verified since this authority
// became the writer.
func (p *Publisher) publish(ctx context.Context, have *published, mark agentMark) (*published, error) {
	now := session.InstantOf(time.Now())
	signer, key, err := p.signer()
	if err != nil {
		return nil, err
	}
	ks := p.o.Keys.Trust().KeySet()
	index, parts, err := p.table()
	if err != nil {
		return nil, err
	}
	last, err := p.stored(ctx)
	if err != nil {
		return nil, err
	}
	if have == nil || last.ref != have.ref {
		// Of another, or of another term, or made anew: which parts are whole shows
		// when they are read.
		have = last
		if err := p.readBack(ctx, have); err != nil {
			return nil, err
		}
	}
	next := &published{mark: mark, set: ks.Version, signer: signer}
	// Another key signs the same anew, so that the withdrawal of the one before
	// takes nothing from anybody.
	if have.index != nil && have.signer == signer && have.index.Parts == index.Parts && have.index.Epoch == ks.Epoch {
		next.index, next.ref, next.seq = have.index, have.ref, have.seq
		return next, nil
	}
	for i, b := range parts {
		if b == nil || have.index != nil && have.index.Parts[i] == index.Parts[i] {
			continue
		}
		if !p.o.Writer() {
			return nil, errors.New("registry: this is not the writer any more")
		}
		if _, err := p.put(ctx, natsfeed.AgentPartSubject(byte(i)), b); err != nil {
			return nil, err
		}
	}
	index.Epoch, index.Version, index.Time = ks.Epoch, max(uint64(now), last.ref.Version+1), now
	frame, err := session.Seal(session.TypeAgents, index.MarshalBody(), key)
	if err != nil {
		return nil, fmt.Errorf("registry: %w", err)
	}
	f, err := session.ParseFrame(frame)
	if err != nil {
		return nil, fmt.Errorf("registry: %w", err)
	}
	if !p.o.Writer() {
		return nil, errors.New("registry: this is not the writer any more")
	}
	next.seq, err = p.put(ctx, natsfeed.AgentSubject, frame, jetstream.WithExpectLastSequencePerSubject(last.seq))
	if err != nil {
		return nil, err
	}
	next.index, next.ref = index, session.AgentsRef{Version: index.Version, Sum: f.Hash()}
	return next, nil
}

// table makes the parts of what is registered, nil for those without agents, and
// their index.
func (p *Publisher) table() (*session.AgentIndex, [][]byte, error) {
	have, missing := p.o.Keys.Secrets()
	secrets := make(map[string]*session.TenantSecret, len(have))
	for _, s := range have {
		secrets[s.Name()] = s
	}
	var lists [session.AgentParts][]session.RegisteredAgent
	index := &session.AgentIndex{}
	for _, a := range p.o.Registry.listed() {
		if a.state == Decommissioned {
			continue
		}
		secret := secrets[a.tenant]
		if secret == nil {
			if slices.Contains(missing, a.tenant) {
				return nil, nil, fmt.Errorf("%w: %s", errNoSecret, a.tenant)
			}
			continue // the key set has no such tenant any more
		}
		digest := func(kind session.Kind, issuer, value string) (session.Digest, error) {
			k, err := secret.Key(session.Target{Tenant: a.tenant, Terms: []session.Term{{Kind: kind, Issuer: issuer, Value: value}}})
			return k.Digest, err
		}
		id, err := digest(session.KindAgent, a.ref.Issuer, a.ref.ID)
		if err != nil {
			return nil, nil, fmt.Errorf("registry: %w", err)
		}
		r := session.RegisteredAgent{Tenant: secret.ID(), Agent: id}
		for _, v := range a.digests {
			d, err := digest(session.KindDigest, "", v)
			if err != nil {
				return nil, nil, fmt.Errorf("registry: %w", err)
			}
			r.Digests = append(r.Digests, session.SortedDigest{Sort: session.SortOf(v), Digest: d})
		}
		lists[id[0]] = append(lists[id[0]], r)
		index.Agents++
	}
	parts := make([][]byte, session.AgentParts)
	for i, l := range lists {
		if len(l) == 0 {
			continue
		}
		b, err := session.MarshalAgentPart(l)
		if err != nil {
			return nil, nil, fmt.Errorf("registry: %w", err)
		}
		part, err := session.ParseAgentPart(b, byte(i))
		if err != nil {
			return nil, nil, fmt.Errorf("registry: %w", err)
		}
		parts[i], index.Parts[i] = b, part.Sum()
	}
	return index, parts, nil
}

// stored returns the newest index in the store; without a ref when there is none
// that can be believed.
func (p *Publisher) stored(ctx context.Context) (*published, error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	s, err := p.js.Stream(ctx, natsfeed.AgentStream)
	if err != nil {
		return nil, fmt.Errorf("registry: stream %s: %w", natsfeed.AgentStream, err)
	}
	m, err := s.GetLastMsgForSubject(ctx, natsfeed.AgentSubject)
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return &published{}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("registry: %w", err)
	}
	out := &published{seq: m.Sequence}
	f, err := session.ParseFrame(m.Data)
	if err != nil || f.Type != session.TypeAgents {
		return out, nil
	}
	if _, err := p.o.Keys.Trust().Writer(&f, 0, true, session.InstantOf(time.Now())); err != nil {
		return out, nil
	}
	if out.index, err = session.UnmarshalAgentIndex(f.Body); err == nil {
		out.ref, out.signer = session.AgentsRef{Version: out.index.Version, Sum: f.Hash()}, f.Key
	}
	return out, nil
}

// readBack takes out of a stored index the parts that are not in the store.
func (p *Publisher) readBack(ctx context.Context, have *published) error {
	if have.index == nil {
		return nil
	}
	s, err := p.js.Stream(ctx, natsfeed.AgentStream)
	if err != nil {
		return fmt.Errorf("registry: stream %s: %w", natsfeed.AgentStream, err)
	}
	index := *have.index
	have.index = &index
	for i := range index.Parts {
		if index.Parts[i] == (session.Hash{}) {
			continue
		}
		m, err := s.GetLastMsgForSubject(ctx, natsfeed.AgentPartSubject(byte(i)))
		if err != nil && !errors.Is(err, jetstream.ErrMsgNotFound) {
			return fmt.Errorf("registry: %w", err)
		}
		if err == nil {
			if part, err := session.ParseAgentPart(m.Data, byte(i)); err == nil && part.Sum() == index.Parts[i] {
				continue
			}
		}
		index.Parts[i] = session.Hash{} // has to be stored again
	}
	return nil
}

func (p *Publisher) put(ctx context.Context, subject string, b []byte, opts ...jetstream.PublishOpt) (uint64, error) {
	ctx, cancel := context.WithTimeout(ctx, putLimit)
	defer cancel()
	ack, err := p.js.Publish(ctx, subject, b, append(opts, jetstream.WithExpectStream(natsfeed.AgentStream))...)
	if err != nil {
		return 0, fmt.Errorf("registry: %w", err)
	}
	return ack.Sequence, nil
}

// agentMark changes with the agents that are registered.
type agentMark struct{ reloads, changes uint64 }

// agentMark returns the mark of what is known; the error is why it may not be what
// is in the log.
func (r *Registry) agentMark() (agentMark, error) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	if !r.loaded {
		return agentMark{}, ErrUnavailable
	}
	return agentMark{r.stats.Reloads, r.x.changes}, r.err
}

// listedAgent is what of an agent goes into the table.
type listedAgent struct {
	tenant  string
	ref     Ref
	state   State
	digests []string // not changed any more
}

// listed returns the agents, tombstones included.
func (r *Registry) listed() []listedAgent {
	r.mu.RLock()
	defer r.mu.RUnlock()
	out := make([]listedAgent, 0, r.x.agents)
	for _, t := range r.x.tenants {
		for _, a := range t.listed {
			out = append(out, listedAgent{t.name, a.Ref, a.State, a.Digests})
		}
	}
	return out
}
