package registry

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/interlock-fabric/interlock/pkg/natsfeed"
	"github.com/interlock-fabric/interlock/pkg/session"
)

const (
	// askTimeout bounds each request to the store: the answer to one that was with
	// a server when it died never comes.
	askTimeout = 2 * time.Second
	// retryAfter is how long the store is left alone after a failure, and pollEvery
	// how soon what another authority wrote is known at the latest; normally it is
	// heard.
	retryAfter = 250 * time.Millisecond
	restAfter  = 5 * time.Second
	pollEvery  = time.Second
	// openTimeout bounds how long Open waits for the log to be read.
	openTimeout = 30 * time.Second

	// maxUnitBytes bounds the records of a batch, and so of a unit.
	maxUnitBytes    = maxPlain - 4<<10
	maxPending      = 4096    // units
	maxPendingBytes = 8 << 20 // of their records
	maxBatchOps     = 4096
	maxSwept        = 1000 // at a time
)

// Options configures a Registry. NC and Keys are required.
type Options struct {
	// NC is an authority's connection to the bus; the caller closes it after the
	// registry. The streams must exist; see broker.EnsureStreams.
	NC   *nats.Conn
	Keys Keys
	// SnapshotBytes and SnapshotBatches are how much of the log there may be since
	// the newest snapshot before another is made; 0 is 16 MiB, or the size of the
	// snapshot if that is more, and 4,096.
	SnapshotBytes   int
	SnapshotBatches uint64
	Logger          *slog.Logger
	// Hooks are for tests.
	Hooks Hooks
}

// Hooks let tests stop between two steps.
type Hooks struct {
	// BeforeAppend, AfterAppend and Snapshot are called before a batch is sent,
	// when it is stored and nobody has been told, and at each step of a snapshot.
	BeforeAppend, AfterAppend func(number uint64)
	Snapshot                  func(step string)
	// Ask, if not nil, is called before each request to the store, which fails
	// with its error.
	Ask func() error
}

// Registry is the registry. Its methods may be called concurrently.
type Registry struct {
	o      Options
	log    *slog.Logger
	js     jetstream.JetStream
	sealer sealer
	cancel context.CancelFunc
	done   sync.WaitGroup
	sub    *nats.Subscription
	wake   chan struct{}
	heard  atomic.Bool
	own    atomic.Pointer[[nonceLen]byte] // of the newest batch made here
	ready  chan struct{}                  // closed when the log has been read once, or cannot be
	once   sync.Once

	// mu guards the index and where in the log it is. Nobody holds it while he
	// waits for the store.
	mu sync.RWMutex
	x  *index
	at place
	// loaded is set once the index is that of the log.
	loaded bool
	err    error // why the log is not being read or written
	stats  Stats

	// in guards what waits to be registered.
	in           sync.Mutex
	pending      []*unit
	pendingBytes int
	closed       bool

	flight     *flight // the loop's own
	snapshots  chan struct{}
	snapshotMu sync.Mutex
	snapshot   manifest // the newest that is known
	// since and sinceBytes are how much of the log there is since then.
	since      uint64
	sinceBytes int
}

// place is a place in the log.
type place struct {
	Number uint64   `json:"number"` // of the newest batch
	Head   [32]byte `json:"head"`   // its hash
	Seq    uint64   `json:"seq"`    // of the stream
}

// Stats are totals since the start.
type Stats struct {
	Batches  uint64 // written here
	Records  uint64 // in them
	Lost     uint64 // appends that another authority was faster than
	Refused  uint64 // messages that no authority wrote, or that chain on nothing
	Reloads  uint64
	Snapshot uint64 // made here
}

// Status says how the registry is. It waits for nothing.
type Status struct {
	Sessions, Agents int
	Tenants          int
	// Bytes is about what the index takes in memory.
	Bytes  int
	Number uint64 // of the newest batch
	// SnapshotNumber is the batch of the newest snapshot.
	SnapshotNumber uint64
	Pending        int
	// Err is why the log is not being read or written; nil while it is.
	Err error
	Stats
}

// op is a record as it is in the log: of one session, one agent, or one note.
type op struct {
	Number  uint64       `json:"n"`
	Session *Session     `json:"s,omitempty"`
	Agent   *AgentRecord `json:"a,omitempty"`
	Note    *Note        `json:"k,omitempty"`
}

type batch struct {
	Ops []op `json:"ops"`
}

// unit is what is registered together, all or nothing.
type unit struct {
	// judge says what to write, given the index; nothing is a success that needs
	// no write. It is called with mu held for reading, perhaps more than once.
	judge func(*index) ([]op, error)
	size  int
	gone  atomic.Bool // nobody waits any more
	done  chan error
}

// flight is a batch that has been sent and is not known to be stored.
type flight struct {
	frame []byte
	hash  [32]byte
	at    place // on which it chains
	ops   []op
	units []*unit
}

// Open starts the registry, and returns when the log has been read, or cannot be:
// see Status. ctx bounds the opening alone.
func Open(ctx context.Context, o Options) (*Registry, error) {
	if o.NC == nil || o.Keys == nil {
		return nil, errors.New("registry: neither connection nor keys")
	}
	if o.SnapshotBatches == 0 {
		o.SnapshotBatches = 4096
	}
	js, err := jetstream.New(o.NC)
	if err != nil {
		return nil, fmt.Errorf("registry: %w", err)
	}
	r := &Registry{
		o: o, log: o.Logger, js: js, sealer: sealer{keys: o.Keys}, x: newIndex(),
		wake: make(chan struct{}, 1), ready: make(chan struct{}), snapshots: make(chan struct{}, 1),
	}
	if r.log == nil {
		r.log = slog.New(slog.DiscardHandler)
	}
	// Listening comes before reading, so that nothing falls between.
	if r.sub, err = o.NC.Subscribe(natsfeed.RegistrySubject, r.hear); err != nil {
		return nil, fmt.Errorf("registry: %w", err)
	}
	run, cancel := context.WithCancel(context.Background())
	r.cancel = cancel
	r.done.Go(func() { r.run(run) })
	r.done.Go(func() { r.snapshotter(run) })
	ctx, end := context.WithTimeout(ctx, openTimeout)
	defer end()
	select {
	case <-r.ready:
	case <-ctx.Done():
		r.log.Error("the registry could not be read in time", "error", r.Status().Err)
	}
	return r, nil
}

// Close ends what waits, and joins every goroutine. It is idempotent.
func (r *Registry) Close() error {
	r.in.Lock()
	r.closed = true
	r.in.Unlock()
	r.cancel()
	r.done.Wait()
	r.once.Do(func() { _ = r.sub.Unsubscribe() }) // fails only when the connection is gone already
	r.in.Lock()
	defer r.in.Unlock()
	for _, u := range r.pending {
		u.done <- ErrClosed
	}
	r.pending = nil
	if r.flight != nil {
		r.land(ErrClosed)
	}
	return nil
}

// hear notes that there is something new in the log; what was written here is
// none.
func (r *Registry) hear(m *nats.Msg) {
	if own := r.own.Load(); own != nil && len(m.Data) >= headerLen && nonceOf(m.Data) == *own {
		return
	}
	r.heard.Store(true)
	r.nudge()
}

// Status says how the registry is.
func (r *Registry) Status() Status {
	r.in.Lock()
	pending := len(r.pending)
	r.in.Unlock()
	r.snapshotMu.Lock()
	snapshot := r.snapshot.Number
	r.snapshotMu.Unlock()
	r.mu.RLock()
	defer r.mu.RUnlock()
	return Status{
		Sessions: r.x.sessions, Agents: r.x.agents, Tenants: len(r.x.tenants), Bytes: r.x.bytes, Number: r.at.Number,
		SnapshotNumber: snapshot, Pending: pending, Err: r.err, Stats: r.stats,
	}
}

// RegisterSessions registers up to MaxUnit sessions, all or none, and returns how
// many of them are new, by tenant, when they are stored. Those that are registered already
// with the same content are no error. Errors wrap session.ErrInvalid, or one of
// this package's.
func (r *Registry) RegisterSessions(ctx context.Context, list []Session) (fresh map[string]int, err error) {
	if n := len(list); n == 0 || n > MaxUnit {
		return nil, fmt.Errorf("%w: %d sessions, at most %d", session.ErrInvalid, n, MaxUnit)
	}
	now := time.Now()
	list = slices.Clone(list)
	seen := make(map[string]map[Ref]bool, 1)
	for i := range list {
		s := &list[i]
		if err := s.canonical(now); err != nil {
			return nil, fmt.Errorf("session %d: %w", i+1, err)
		}
		if seen[s.Tenant][s.Ref] {
			return nil, fmt.Errorf("%w: session %d is named twice", session.ErrInvalid, i+1)
		}
		if seen[s.Tenant] == nil {
			seen[s.Tenant] = make(map[Ref]bool, len(list))
		}
		seen[s.Tenant][s.Ref] = true
	}
	size, err := sizeOf(list)
	if err != nil {
		return nil, err
	}
	by := map[string]int{}
	u := &unit{size: size, judge: func(x *index) ([]op, error) {
		ops := make([]op, 0, len(list))
		clear(by) // it may be called again
		for i := range list {
			known, err := x.judgeSession(&list[i], len(ops))
			if err != nil {
				return nil, fmt.Errorf("session %d: %w", i+1, err)
			}
			if !known {
				ops = append(ops, op{Session: &list[i]})
				by[list[i].Tenant]++
			}
		}
		return ops, nil
	}}
	if err := r.do(ctx, u); err != nil {
		return nil, err
	}
	return by, nil
}

// judgeSession says whether the session is known already, or why it is refused.
// more counts what is to be added before it.
func (x *index) judgeSession(s *Session, more int) (known bool, err error) {
	t, have := x.find(s.Tenant, s.Ref)
	if have != nil {
		old := have.session(t)
		if !old.equal(s) {
			return false, ErrConflict
		}
		return true, nil
	}
	switch {
	case x.sessions+more >= MaxSessions:
		return false, fmt.Errorf("%w: %d sessions", ErrFull, x.sessions)
	case t != nil && len(t.sessions)+more >= MaxTenantSessions:
		return false, fmt.Errorf("%w: %d sessions of the tenant", ErrFull, len(t.sessions))
	}
	a := x.findAgent(s.Tenant, s.Agent)
	if a == nil {
		return false, nil
	}
	if a.State == Suspended || a.State == Decommissioned {
		return false, fmt.Errorf("%w: %s", ErrNotActive, a.State)
	}
	for _, d := range s.Digests {
		if !a.permits(d) {
			return false, ErrDigest
		}
	}
	return false, nil
}

// permits reports whether a digest is a registered one, or none of its sort (code,
// model, image) is.
func (a *agent) permits(digest string) bool {
	sort := digest[:strings.IndexByte(digest, ':')+1]
	some := false
	for _, d := range a.Digests {
		if d == digest {
			return true
		}
		some = some || strings.HasPrefix(d, sort)
	}
	return !some
}

// RegisterAgent registers an agent. One that is registered with the same content
// is no error; another content is taken only in place of the revision that is
// named, 0 for none. It returns the record when it is stored, and whether anything
// changed. Errors are as those of RegisterSessions.
func (r *Registry) RegisterAgent(ctx context.Context, a Agent, revision uint64) (AgentRecord, bool, error) {
	fail := func(err error) (AgentRecord, bool, error) { return AgentRecord{}, false, err }
	if err := a.canonical(); err != nil {
		return fail(err)
	}
	size, err := sizeOf(a)
	if err != nil {
		return fail(err)
	}
	now := session.InstantOf(time.Now())
	var out AgentRecord
	changed := false
	u := &unit{size: size, judge: func(x *index) ([]op, error) {
		have := x.findAgent(a.Tenant, a.Ref)
		changed = true
		out = AgentRecord{Agent: a, State: Registered, Since: now, At: now}
		switch {
		case have == nil && revision > 0:
			return nil, ErrUnknown
		case have == nil && x.agents >= MaxAgents:
			return nil, fmt.Errorf("%w: %d agents", ErrFull, x.agents)
		case have == nil:
			if t := x.tenants[a.Tenant]; t != nil && len(t.listed) >= MaxTenantAgents {
				return nil, fmt.Errorf("%w: %d agents of the tenant", ErrFull, len(t.listed))
			}
		case have.State == Decommissioned:
			return nil, ErrTombstone
		case have.equal(&a):
			changed, out = false, have.AgentRecord
			return nil, nil
		case have.Revision != revision:
			return nil, ErrConflict
		default:
			out.State, out.Since, out.At, out.Cause = have.State, have.Since, have.At, have.Cause
		}
		return []op{{Agent: &out}}, nil
	}}
	if err := r.do(ctx, u); err != nil {
		return fail(err)
	}
	return out, changed, nil
}

// SetState moves an agent through its life, and returns the record when it is
// stored. Being in that state already is no error. cause is the decision that goes
// with it; nil leaves the one before. Errors wrap ErrUnknown, ErrTombstone, or as
// those of RegisterSessions.
func (r *Registry) SetState(ctx context.Context, tenant string, ref Ref, to State, cause *Cause) (AgentRecord, error) {
	if to != Active && to != Suspended && to != Decommissioned {
		return AgentRecord{}, fmt.Errorf("%w: no way leads to %q", session.ErrInvalid, to)
	}
	ref, err := canonicalRef(tenant, session.KindAgent, ref)
	if err != nil {
		return AgentRecord{}, err
	}
	now := session.InstantOf(time.Now())
	var out AgentRecord
	u := &unit{size: 1 << 10, judge: func(x *index) ([]op, error) {
		have := x.findAgent(tenant, ref)
		switch {
		case have == nil:
			return nil, ErrUnknown
		case have.State == to && (cause == nil || have.Cause != nil && *have.Cause == *cause):
			out = have.AgentRecord
			return nil, nil
		case have.State == Decommissioned && to != Decommissioned:
			return nil, ErrTombstone
		}
		out = have.AgentRecord
		if out.State != to {
			out.State, out.Since = to, now
		}
		if cause != nil {
			out.Cause = cause
		}
		return []op{{Agent: &out}}, nil
	}}
	if err := r.do(ctx, u); err != nil {
		return AgentRecord{}, err
	}
	return out, nil
}

// sizeOf is how long the records are in a batch, about.
func sizeOf(v any) (int, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return 0, fmt.Errorf("registry: %w", err)
	}
	n := len(b)
	if l, ok := v.([]Session); ok {
		n += 32 * len(l)
	}
	if n > maxUnitBytes {
		return 0, fmt.Errorf("%w: %d bytes, at most %d", ErrTooLarge, n, maxUnitBytes)
	}
	return n, nil
}

// do hands a unit to the loop and waits for its end.
func (r *Registry) do(ctx context.Context, u *unit) error {
	u.done = make(chan error, 1)
	r.in.Lock()
	switch {
	case r.closed:
		r.in.Unlock()
		return ErrClosed
	case len(r.pending) >= maxPending || r.pendingBytes+u.size > maxPendingBytes:
		r.in.Unlock()
		return ErrBusy
	}
	r.pending = append(r.pending, u)
	r.pendingBytes += u.size
	r.in.Unlock()
	r.nudge()
	select {
	case err := <-u.done:
		return err
	case <-ctx.Done():
		u.gone.Store(true)
		r.mu.RLock()
		why := r.err
		r.mu.RUnlock()
		if why != nil {
			return fmt.Errorf("%w: %w", ErrUnavailable, why)
		}
		return fmt.Errorf("%w: %w", ErrUnavailable, ctx.Err())
	}
}

func (r *Registry) nudge() {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// Session returns a session that is known, expired or not.
func (r *Registry) Session(tenant string, ref Ref) (Session, error) {
	ref, err := canonicalRef(tenant, session.KindSession, ref)
	if err != nil {
		return Session{}, err
	}
	r.mu.RLock()
	defer r.mu.RUnlock()
	t, s := r.x.find(tenant, ref)
	if s == nil {
		return Session{}, r.absent()
	}
	return s.session(t), nil
}

// Agent returns an agent, and how many live sessions name it in their chains. One
// that is not registered may have sessions all the same.
func (r *Registry) Agent(tenant string, ref Ref) (rec AgentRecord, sessions int, err error) {
	ref, err = canonicalRef(tenant, session.KindAgent, ref)
	if err != nil {
		return AgentRecord{}, 0, err
	}
	now := session.InstantOf(time.Now())
	r.mu.RLock()
	defer r.mu.RUnlock()
	if t := r.x.tenants[tenant]; t != nil {
		if v := t.terms[termKey{session.KindAgent, ref.Issuer, ref.ID}]; v != nil {
			for _, s := range v.list.items {
				if s.live(now) {
					sessions++
				}
			}
			if v.agent != nil {
				return v.agent.AgentRecord, sessions, nil
			}
		}
	}
	return AgentRecord{}, sessions, r.absent()
}

// Head returns the number and the hash of the newest batch that is known.
func (r *Registry) Head() (number uint64, hash [32]byte) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.at.Number, r.at.Head
}

// absent says why something is not there. mu is held.
func (r *Registry) absent() error {
	if !r.loaded {
		return fmt.Errorf("%w: the log has not been read", ErrUnavailable)
	}
	return ErrUnknown
}

// Sessions returns a page of sessions, the newest first, and the number below
// which the next one begins, 0 if there is none. A page may be short, even empty,
// and have a next one. What is registered meanwhile does not move it. The error
// wraps ErrUnavailable while the log has not been read.
func (r *Registry) Sessions(q SessionQuery) ([]Session, uint64, error) {
	q.Limit = min(max(q.Limit, 1), MaxPage)
	now := session.InstantOf(time.Now())
	r.mu.RLock()
	defer r.mu.RUnlock()
	if !r.loaded {
		return nil, 0, r.absent()
	}
	out, next := r.x.page(&q, now)
	return out, next, nil
}

// Agents is Sessions for agents.
func (r *Registry) Agents(q AgentQuery) ([]AgentRecord, uint64, error) {
	q.Limit = min(max(q.Limit, 1), MaxPage)
	r.mu.RLock()
	defer r.mu.RUnlock()
	if !r.loaded {
		return nil, 0, r.absent()
	}
	out, next := r.x.pageAgents(&q)
	return out, next, nil
}

// Touched counts what a decision on any of the targets would touch, but for what
// except names, by tenant. The targets are canonical; see Known for the kinds that
// cannot be counted. The error wraps ErrUnavailable while the log has not been
// read.
func (r *Registry) Touched(targets, except []session.Target) (map[string]Counts, error) {
	now := session.InstantOf(time.Now())
	r.mu.RLock()
	defer r.mu.RUnlock()
	if !r.loaded {
		return nil, r.absent()
	}
	return r.x.touched(targets, except, now), nil
}

// hashOf is the hash by which the next batch names a message.
func hashOf(frame []byte) [32]byte { return sha256.Sum256(frame) }
