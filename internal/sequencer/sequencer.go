// Package sequencer writes the log: it turns decisions into signed, chained
// batches, appends them to the one JetStream stream, and says when they are
// durable.
//
// Any number of sequencers run on one store; a lease names the one that writes,
// and the others forward to it. The lease only avoids contention. What keeps the
// chain from forking is a function of the log alone, the same for every reader:
// the batch with number n is the first one stored that names the hash of batch
// n-1, carries number n, and is signed by a key that the key set trusts for it;
// everything else that is stored is skipped. A writer counts its batch as
// stored only when it knows everything before it.
//
// One goroutine owns the writer's state and never waits for I/O, so that
// decisions are published, and heard by enforcers, while the store has no leader.
package sequencer

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/interlock-fabric/interlock/pkg/filter"
	"github.com/interlock-fabric/interlock/pkg/session"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

var (
	// ErrClosed: the sequencer has been closed. Whether the decision was taken
	// is not known: send it again, under its ID.
	ErrClosed = errors.New("sequencer: closed")
	// ErrQuota: the decision would exceed its tenant's quota or the bound of the
	// whole state. It has not been taken.
	ErrQuota = errors.New("sequencer: quota exceeded")
	// ErrBusy: too many decisions wait for the store. It has not been taken.
	ErrBusy = errors.New("sequencer: too many decisions are waiting")
	// ErrRolledBack: the log is behind what enforcers have seen of it. Nothing
	// is written until the root opens a new epoch.
	ErrRolledBack = errors.New("sequencer: the log was rolled back: open a new epoch")
	// ErrTrimmed: the log does not reach back to where its epoch begins, and no
	// published segment that can be trusted leads up to it. Nothing is written
	// until the segments or the log have been restored from a backup, and the
	// authority started again; or until the root opens a new epoch, which begins
	// with what this authority still holds: for one that was started since,
	// nothing.
	ErrTrimmed = errors.New("sequencer: the log was trimmed and no published segment leads up to it: restore the streams, or open a new epoch")
	// ErrUpgrade: the log holds a batch of a later version. Nothing is written
	// by this one.
	ErrUpgrade = errors.New("sequencer: the log holds what this version does not know: upgrade it")
	// ErrNoKey: this authority holds no signing key that the key set trusts.
	ErrNoKey = errors.New("sequencer: no trusted signing key")
	// ErrUntrusted: the signing key has no right to the tenant of an entry.
	ErrUntrusted = errors.New("sequencer: the signing key may not decide for this tenant")
	// ErrNoWriter: no writer could be reached in time. Whether the decision was
	// taken is not known: send it again, under its ID.
	ErrNoWriter = errors.New("sequencer: no writer can be reached")
	// ErrTooLarge: a decision has more entries than a batch holds.
	ErrTooLarge = fmt.Errorf("sequencer: %w: more than %d entries in one decision", session.ErrInvalid, session.MaxBatchEntries)
)

// Bounds and times.
const (
	// DefaultAckWait is how long Decide waits for durability by default.
	DefaultAckWait = time.Second
	// DefaultLease is how long a lease must not have changed before another
	// takes it.
	DefaultLease = 5 * time.Second
	// DefaultQuota bounds the entries of one tenant.
	DefaultQuota = 1_000_000
	// DefaultMaxState bounds the entries of all tenants.
	DefaultMaxState = 10_000_000
	// HashWindow is how many of the newest batches HashAt knows.
	HashWindow = 1 << 16

	maxFlight      = 1024     // batches without acknowledgement
	maxFlightBytes = 64 << 20 // and their bytes
	maxPending     = 50_000   // decisions that wait for a batch
	patience       = 30 * time.Second
	maxForwards    = 4096
	eventBacklog   = 4096
)

// Keys is what the sequencer needs of the authority's keys. Its methods are
// called often and concurrently.
type Keys interface {
	// Trust returns the pinned root with the newest key set; always the same
	// Trust, which others may update.
	Trust() *session.Trust
	// Frame returns the newest key set as the root signed it, or nil.
	Frame() []byte
	// Accept keeps a key set that was heard and updates Trust with it, if the
	// root signed it and it is newer than the one held.
	Accept(frame []byte, now session.Instant) (bool, error)
	// Signer returns the key to sign with now.
	Signer(now session.Instant) (ed25519.PrivateKey, error)
}

// Options configures Open. NC and Keys are required.
type Options struct {
	// NC is the connection to the bus. The sequencer does not close it.
	NC *nats.Conn
	// Keys are the authority's.
	Keys Keys
	// AckWait is how long Decide waits for durability; 0 is DefaultAckWait.
	AckWait time.Duration
	// Lease is the duration of the lease, the same on all authorities; 0 is
	// DefaultLease.
	Lease time.Duration
	// Quota is how many entries a tenant may have in force; nil is DefaultQuota
	// for each. Entries on a whole tenant and global ones are exempt.
	Quota func(session.TenantID) int
	// MaxState bounds the entries in force of all tenants; 0 is
	// DefaultMaxState. It must stay below what enforcers hold.
	MaxState int
	// SegmentEvery is how often a state that has changed is published as a
	// segment, and SegmentBatches how many batches do not wait for that; 0 is
	// DefaultSegmentEvery and DefaultSegmentBatches.
	SegmentEvery   time.Duration
	SegmentBatches uint64
	// StateDir is where the state is sealed, in a file of about 40 bytes an
	// entry, so that it is not held in memory, let alone twice; empty is the heap.
	// It is made with mode 0700, and one sequencer's. Nothing in it is needed: a
	// start reuses the file if it is what the bus has published.
	StateDir string
	// Agents returns the table of registered agents that heartbeats name; nil is
	// none. It is called for each, and waits for nothing.
	Agents func() session.AgentsRef
	// Logger takes what an operator should know; nil is silence.
	Logger *slog.Logger
	// Hooks are for tests.
	Hooks Hooks
}

// Hooks let a test act at the steps of an append. They run on the writer's
// goroutine, which waits for them.
type Hooks struct {
	// BeforeAppend runs before a batch is published for the first time.
	BeforeAppend func(number uint64)
	// AfterAck runs when a batch is known to be stored, before anybody is told.
	AfterAck func(number uint64)
	// Usurp, while it returns true, makes this sequencer write without the
	// lease.
	Usurp func() bool
	// Now replaces the wall clock.
	Now func() time.Time
	// HorizonEvery replaces how often the expiry horizon moves.
	HorizonEvery time.Duration
	// DropAcks, while it returns true, loses the store's acknowledgements and
	// answers, as an outage of the store would.
	DropAcks func() bool
	// Segment runs at the steps of a publication, on its goroutine: sealed,
	// stored, read back, described, trimmed.
	Segment func(step string)
}

// Decision is one decision of a responder or issuer: entries that apply
// together.
type Decision struct {
	// ID is the hash of the idempotency key: a decision that is sent twice within
	// 24 hours, and among the newest 1,048,576, is taken once. The zero ID is replaced by a random one.
	ID session.DecisionID
	// Entries are at most session.MaxBatchEntries. They stay in one batch.
	Entries []session.Entry
}

// Result says where in the log a decision is.
type Result struct {
	ID     session.DecisionID
	Epoch  uint64
	Number uint64
	// At is the authority's time of the decision.
	At session.Instant
	// Durable is set when the decision is stored. Otherwise enforcers have heard
	// it and act on it, and it is stored as soon as the store answers.
	Durable bool
	// Duplicate is set when a decision with this ID had been taken before.
	Duplicate bool
}

// Sequencer is one authority's part in writing the log. Its methods may be
// called concurrently. It must be made by Open.
type Sequencer struct {
	o     Options
	nc    *nats.Conn
	js    jetstream.JetStream
	trust *session.Trust
	log   *slog.Logger
	base  time.Time // of the monotonic clock

	ctx    context.Context // ends with Close
	cancel context.CancelFunc
	wg     sync.WaitGroup // everything but the writer's goroutine
	events *events
	loop   chan struct{} // closed when the writer's goroutine has ended
	w      *writer       // touched on the writer's goroutine only
	inbox  string
	subs   []*nats.Subscription
	once   sync.Once

	view     atomic.Pointer[view]
	role     atomic.Uint32
	hashes   hashRing
	forwards chan struct{} // bounds what is being forwarded
	answers  chan struct{} // and what is being answered
	leaseNow chan struct{}
	keysNow  chan struct{}
	keysMu   sync.Mutex
	keysSeen uint64 // version of the newest key set that is stored
	keysPos  uint64 // how far their stream has been read
	firstPos uint64 // of the log, when it was last looked at; of publishSegments
	counters
}

// view is what readers see: the state as far as it is known to be stored.
type view struct {
	epoch, number uint64
	news          uint64 // see chain
	head          session.Hash
	set           *filter.Set
}

// counters are what Status reports beside the view.
type counters struct {
	garbage, strays, deposed, position atomic.Uint64
	pending, flight                    atomic.Int64
	halt                               atomic.Pointer[error]
	published                          atomic.Pointer[session.SegmentRef] // the newest
	kept, refused                      atomic.Uint64
}

// Status is a snapshot for operators.
type Status struct {
	Writer bool
	Epoch  uint64
	Number uint64
	Head   session.Hash
	// Entries are in force.
	Entries int
	// Position is the stream's sequence up to which the log has been examined.
	Position uint64
	// InFlight batches are published and not known to be stored; Pending
	// decisions are in no batch yet.
	InFlight, Pending int
	// Halted is why nothing is written, ErrRolledBack, ErrTrimmed or ErrUpgrade; nil is the
	// usual case.
	Halted error
	// Garbage messages in the log were nobody's; Strays were batches that the
	// chain does not go through, such as a deposed writer's.
	Garbage, Strays uint64
	// Deposed counts how often another writer's batch came first.
	Deposed uint64
	// Segment is the batch of which the newest published segment is, as far as
	// this authority knows, and SegmentAt when that was published; zero without
	// one. SegmentsRefused counts published segments that were not taken, at
	// start or when the log was to be trimmed.
	Segment         uint64
	SegmentAt       time.Time
	SegmentsRefused uint64
	// LogFrom is the number of the first batch that the log still has; 0 while
	// that is not known.
	LogFrom uint64
}

// Open reads the log, from the newest published segment on that can be trusted,
// takes part in the lease, and returns when the state up to
// the end of the log is known. The streams must exist. ctx bounds the opening
// alone.
func Open(ctx context.Context, o Options) (*Sequencer, error) {
	if o.NC == nil || o.Keys == nil || o.Keys.Trust() == nil {
		return nil, errors.New("sequencer: options without connection or keys")
	}
	if o.AckWait <= 0 {
		o.AckWait = DefaultAckWait
	}
	if o.Lease <= 0 {
		o.Lease = DefaultLease
	}
	if o.SegmentEvery <= 0 {
		o.SegmentEvery = DefaultSegmentEvery
	}
	if o.SegmentBatches == 0 {
		o.SegmentBatches = DefaultSegmentBatches
	}
	if o.MaxState <= 0 {
		o.MaxState = DefaultMaxState
	}
	if o.Quota == nil {
		o.Quota = func(session.TenantID) int { return DefaultQuota }
	}
	if o.Hooks.Now == nil {
		o.Hooks.Now = time.Now
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	js, err := jetstream.New(o.NC)
	if err != nil {
		return nil, fmt.Errorf("sequencer: %w", err)
	}
	s := &Sequencer{
		o: o, nc: o.NC, js: js, trust: o.Keys.Trust(), log: o.Logger, base: time.Now(),
		events: newEvents(), loop: make(chan struct{}),
		inbox: nats.NewInbox(), forwards: make(chan struct{}, maxForwards), answers: make(chan struct{}, maxForwards),
		leaseNow: make(chan struct{}, 1), keysNow: make(chan struct{}, 1),
	}
	s.ctx, s.cancel = context.WithCancel(context.WithoutCancel(ctx))
	s.view.Store(&view{})
	s.w = newWriter(s)
	if err := s.openStateDir(); err != nil {
		s.cancel()
		return nil, err
	}
	if err := s.start(ctx); err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}

func (s *Sequencer) start(ctx context.Context) error {
	ready := make(chan struct{})
	s.w.ready = func() { close(ready) }
	go s.w.run()
	if err := s.subscribe(); err != nil {
		return err
	}
	if err := s.fetchKeySets(ctx); err != nil {
		return err
	}
	if s.trust.KeySet() == nil {
		return fmt.Errorf("%w: no key set, neither held nor stored", ErrNoKey)
	}
	if err := s.storeKeySet(ctx); err != nil {
		return err
	}
	s.post(s.w.load)
	select {
	case <-ready:
	case <-ctx.Done():
		return fmt.Errorf("sequencer: reading the log: %w", context.Cause(ctx))
	}
	s.wg.Go(s.followKeySets)
	s.wg.Go(s.holdLease)
	s.wg.Go(s.publishSegments)
	return nil
}

// post hands f to the writer's goroutine. It reports false after Close.
func (s *Sequencer) post(f func()) bool {
	return s.events.add(f, 0)
}

// Close stops writing, gives what has been published a moment to be stored,
// releases the lease, and joins every goroutine. Decisions that still wait get
// ErrClosed. It is idempotent.
func (s *Sequencer) Close() {
	s.once.Do(func() {
		drained := make(chan struct{})
		if s.post(func() { s.w.drain(func() { close(drained) }) }) {
			t := time.NewTimer(2 * time.Second)
			select {
			case <-drained:
			case <-t.C:
			case <-s.loop:
			}
			t.Stop()
		}
		quiet := make(chan struct{})
		if s.post(func() { s.w.quit(); close(quiet) }) {
			<-quiet
		}
		s.wg.Wait()
		for _, sub := range s.subs {
			_ = sub.Unsubscribe() // the connection may be gone, and with it the subscription
		}
		s.post(s.w.stop)
		<-s.loop
	})
	<-s.loop
}

// Decide takes a decision, here or at the writer. It returns when the decision
// is stored; or, with Durable false, when AckWait has passed and enforcers have
// been told. An error wraps one of this package's, or session.ErrInvalid or
// session.ErrMalformed. When it is ctx's, ErrClosed or ErrNoWriter, the decision
// may have been taken: sending it again under its ID is safe and tells.
func (s *Sequencer) Decide(ctx context.Context, d Decision) (Result, error) {
	r, err := newRequest(d)
	if err != nil {
		return Result{}, err
	}
	if !s.post(func() { s.w.accept(r) }) {
		return Result{}, ErrClosed
	}
	return s.await(ctx, r, s.o.AckWait)
}

func (s *Sequencer) await(ctx context.Context, r *request, wait time.Duration) (Result, error) {
	soon, late := time.NewTimer(wait), time.NewTimer(patience)
	defer soon.Stop()
	defer late.Stop()
	var announced <-chan struct{}
	for {
		select {
		case <-r.done:
			return r.outcome()
		case <-announced:
			return r.outcome()
		case <-soon.C:
			announced = r.announced
		case <-late.C:
			r.abandoned.Store(true)
			return Result{ID: r.d.ID}, ErrNoWriter
		case <-ctx.Done():
			r.abandoned.Store(true)
			res, err := r.outcome()
			if err == nil && !res.Durable {
				err = fmt.Errorf("sequencer: %w", context.Cause(ctx))
			}
			return res, err
		case <-s.loop:
			select {
			case <-r.done:
				return r.outcome()
			default:
				return Result{ID: r.d.ID}, ErrClosed
			}
		}
	}
}

// AwaitDurable returns when the batch of that number, in the current epoch, is
// stored as far as this authority knows, and no decision that a batch of this
// authority held is still on its way to another writer.
func (s *Sequencer) AwaitDurable(ctx context.Context, number uint64) error {
	done := make(chan struct{})
	if !s.post(func() { s.w.await(number, done) }) {
		return ErrClosed
	}
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		s.post(func() { s.w.forget(done) })
		return fmt.Errorf("sequencer: %w", context.Cause(ctx))
	case <-s.loop:
		return ErrClosed
	}
}

// State returns the state as far as it is stored. It waits for nothing.
func (s *Sequencer) State() *filter.Set { return s.view.Load().set }

// Head returns the newest batch that is known to be stored; number 0 is the
// origin of an epoch without batches.
func (s *Sequencer) Head() (epoch, number uint64, head session.Hash) {
	v := s.view.Load()
	return v.epoch, v.number, v.head
}

// HashAt returns the hash of a stored batch of the current epoch, if it is one
// of the newest HashWindow.
func (s *Sequencer) HashAt(number uint64) (session.Hash, bool) {
	l, ok := s.hashes.at(s.view.Load().epoch, number)
	return l.hash, ok
}

// IsWriter reports whether this sequencer writes the log now.
func (s *Sequencer) IsWriter() bool { return role(s.role.Load()) == writing }

// Status returns a snapshot for operators.
func (s *Sequencer) Status() Status {
	v := s.view.Load()
	st := Status{
		Writer: s.IsWriter(), Epoch: v.epoch, Number: v.number, Head: v.head, Entries: v.set.Len(),
		Position: s.position.Load(), InFlight: int(s.flight.Load()), Pending: int(s.pending.Load()),
		Halted: s.halted(), Garbage: s.garbage.Load(), Strays: s.strays.Load(),
		Deposed: s.deposed.Load(), LogFrom: s.kept.Load(), SegmentsRefused: s.refused.Load(),
	}
	if p := s.published.Load(); p != nil {
		st.Segment, st.SegmentAt = p.Number, p.Time.Time()
	}
	return st
}

func (s *Sequencer) halted() error {
	if err := s.halt.Load(); err != nil {
		return *err
	}
	return nil
}

// Heard takes what an enforcer's receipt, verified by the caller, says of the
// newest batch that was confirmed to it. A writer that never wrote such a batch
// has been given an old log: it writes no more until a new epoch, and Decide
// returns ErrRolledBack. The word of one enforcer is enough, so the caller must
// not pass on that of one that it has reason to distrust.
func (s *Sequencer) Heard(epoch, number uint64, head session.Hash) {
	v := s.view.Load()
	if epoch != v.epoch || number == 0 {
		return
	}
	if l, ok := s.hashes.at(epoch, number); ok && l.hash == head && number <= v.number {
		return // the common case, without troubling the writer
	}
	s.post(func() { s.w.heardClaim(claim{epoch, number, head}) })
}

// request is a decision on its way.
type request struct {
	d         Decision
	size      int
	arrived   time.Time
	number    uint64 // of the batch it is in; the writer's
	dups      []*request
	internal  bool // the sequencer's own: no quota
	away      bool // forwarded; the writer's
	abandoned atomic.Bool

	mu        sync.Mutex
	res       Result
	err       error
	told      bool
	retried   bool // taken again after a loss: being known is no surprise
	finished  bool
	after     []func() // called once finished, outside the lock
	announced chan struct{}
	done      chan struct{}
}

func newRequest(d Decision) (*request, error) {
	if len(d.Entries) > session.MaxBatchEntries {
		return nil, ErrTooLarge
	}
	if len(d.Entries) == 0 {
		return nil, fmt.Errorf("sequencer: %w: a decision without entries", session.ErrInvalid)
	}
	r := &request{d: d, announced: make(chan struct{}), done: make(chan struct{})}
	for i := range d.Entries {
		e := &d.Entries[i]
		if err := e.Validate(); err != nil {
			return nil, fmt.Errorf("sequencer: %w", err)
		}
		if len(e.Unknown) > 0 {
			return nil, fmt.Errorf("sequencer: %w: unknown fields", session.ErrInvalid)
		}
		r.size += entrySize(e)
	}
	if r.d.ID == (session.DecisionID{}) {
		_, _ = rand.Read(r.d.ID[:]) // crypto/rand never fails
	}
	r.res.ID = r.d.ID
	return r, nil
}

// entrySize is at least what the entry takes on the wire.
func entrySize(e *session.Entry) int {
	return 64 + len(e.Incident) + len(e.ACR) + 21*len(e.Except)
}

// announce says in which batch enforcers have been told of the decision.
func (r *request) announce(res Result) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.finished {
		return
	}
	res.ID, res.Duplicate = r.d.ID, res.Duplicate && !r.retried || r.res.Duplicate
	r.res = res
	if !r.told {
		r.told = true
		close(r.announced)
	}
}

// finish ends the request. Only the first call counts.
func (r *request) finish(res Result, err error) {
	r.mu.Lock()
	if r.finished {
		r.mu.Unlock()
		return
	}
	res.ID, res.Duplicate = r.d.ID, res.Duplicate && !r.retried || r.res.Duplicate
	r.res, r.err, r.finished = res, err, true
	after := r.after
	r.after = nil
	close(r.done)
	r.mu.Unlock()
	for _, f := range after {
		f()
	}
}

// then calls f when the request has ended.
func (r *request) then(f func()) {
	r.mu.Lock()
	if !r.finished {
		r.after = append(r.after, f)
		r.mu.Unlock()
		return
	}
	r.mu.Unlock()
	f()
}

func (r *request) markDuplicate() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.retried && !r.finished {
		r.res.Duplicate = true
	}
}

func (r *request) retry() {
	r.mu.Lock()
	r.retried = true
	r.mu.Unlock()
}

func (r *request) ended() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.finished
}

func (r *request) outcome() (Result, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.res, r.err
}

func (r *request) wasTold() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.told
}
