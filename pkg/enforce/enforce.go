package enforce

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/interlock-fabric/interlock/pkg/filter"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// Bounds and defaults of Options.
const (
	// DefaultMaxStale is how old the state may be before requests are denied.
	DefaultMaxStale = 15 * time.Second
	// MinMaxStale is the least that can be asked for: below it, a lost
	// heartbeat or two would deny everyone.
	MinMaxStale = 2 * time.Second
	// DefaultMaxBound is how much running work may be bound at once.
	DefaultMaxBound = 1 << 17
	// DefaultMaxEntries is how many entries may be in force.
	DefaultMaxEntries = 12_000_000
)

// Options configures an Enforcer. Only Enrollment is required; every zero value
// is the safe choice.
type Options struct {
	// Enrollment says whom to trust and which tenants to serve.
	Enrollment *session.Enrollment
	// Mode is how to act on verdicts; the zero value denies whenever it should.
	Mode session.Mode
	// MaxStale is how old the state may be before requests are denied; zero is
	// DefaultMaxStale, the least is MinMaxStale.
	MaxStale time.Duration
	// MaxStaleRunning is the same for work that is running already; zero is
	// MaxStale.
	MaxStaleRunning time.Duration
	// StateDir keeps what must survive a restart: the newest head that was in
	// force, so that a log that was rolled back meanwhile is refused, and the
	// sealed state, so that the next start goes on from there, and what earlier
	// epochs left in force. Empty keeps nothing: a rollback while the enforcer is
	// down goes unnoticed, a restart forgets what earlier epochs left, and memory
	// holds every entry, at some 40 bytes each instead of 4. When an epoch begins
	// while entries of two before it are in force, they are merged in memory, at
	// some 100 bytes each for as long as that takes.
	StateDir string
	// OrdersDir is a directory in which an emergency order (session.Order) takes
	// force when it is put there as a file, with the bus dead or alive: any name
	// that does not begin with a dot, at most 256 of them, looked at every 250 ms.
	// An order stays in force when its file is gone. The directory must be there,
	// and nobody but operators should be able to write to it. Empty looks nowhere.
	// Orders are kept in StateDir, if there is one, over restarts.
	OrdersDir string
	// MaxEntries bounds the entries in force, those of the current epoch and
	// those left by earlier ones each; zero is DefaultMaxEntries. The
	// quotas of the authority sum below it. Should there be more all the same,
	// everything is denied, rather than some of them forgotten.
	MaxEntries int
	// MaxBound bounds the running work that may be bound at once; beyond it Bind
	// denies. Zero is DefaultMaxBound.
	MaxBound int
	// Registry, when set, denies the sessions that it does not know, with
	// session.ErrUnregistered. Nil admits every session.
	Registry Registry
	// Agents, when set, holds callers against the authority's registry of agents,
	// of which the feed, an AgentFeed, brings a table. Nil asks nothing of it.
	Agents *AgentPolicy
	// Logger hears of what an operator should know; nil is silent. Nothing is
	// logged per request.
	Logger *slog.Logger

	// clock replaces the operating system's clocks in tests; checked is
	// called by Bind between its first check and registering the work.
	clock   func() reading
	checked func()
}

func (o Options) validate() (Options, error) {
	bad := func(format string, a ...any) (Options, error) {
		return o, fmt.Errorf("%w: %s", session.ErrInvalid, fmt.Sprintf(format, a...))
	}
	e := o.Enrollment
	switch {
	case e == nil:
		return bad("no enrolment: load the file that `session-authority enroll` wrote")
	case len(e.Root) != ed25519.PublicKeySize:
		return bad("the enrolment pins no root key")
	case len(e.ReceiptKey) != ed25519.PrivateKeySize:
		return bad("the enrolment has no receipt key")
	case !session.ValidEnforcerName(e.Enforcer):
		return bad("the enrolment names no enforcer")
	case len(e.Tenants) == 0:
		return bad("the enrolment has no tenant")
	case o.Mode > session.ModeShadow:
		return bad("%s", o.Mode)
	}
	if o.MaxStale == 0 {
		o.MaxStale = DefaultMaxStale
	}
	if o.MaxStale < MinMaxStale {
		return bad("MaxStale is %v, the least is %v", o.MaxStale, MinMaxStale)
	}
	if o.MaxStaleRunning == 0 {
		o.MaxStaleRunning = o.MaxStale
	}
	if o.MaxStaleRunning < MinMaxStale {
		return bad("MaxStaleRunning is %v, the least is %v", o.MaxStaleRunning, MinMaxStale)
	}
	if o.MaxBound == 0 {
		o.MaxBound = DefaultMaxBound
	}
	if o.MaxEntries == 0 {
		o.MaxEntries = DefaultMaxEntries
	}
	if o.MaxEntries < 0 {
		return bad("MaxEntries is %d", o.MaxEntries)
	}
	if o.MaxBound < 0 {
		return bad("MaxBound is %d", o.MaxBound)
	}
	if o.Agents != nil {
		pol := *o.Agents
		if pol.MaxAge == 0 {
			pol.MaxAge = o.MaxStale
		}
		switch {
		case pol.MaxAge < MinMaxStale:
			return bad("Agents.MaxAge is %v, the least is %v", pol.MaxAge, MinMaxStale)
		case pol.Digests > DigestsIgnored:
			return bad("Agents.Digests is %d", pol.Digests)
		case pol.AllowUnregistered && pol.Digests == DigestsIgnored:
			return bad("Agents asks nothing of callers")
		}
		o.Agents = &pol
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.clock == nil {
		o.clock = localClock()
	}
	return o, nil
}

// Enforcer answers, for each request, whether the caller may go on, and ends
// work that is running when the answer changes. All methods are safe for
// concurrent use. The zero Enforcer, and a nil one, deny everything.
type Enforcer struct {
	opts Options
	// view is what Check reads: replaced whole by the follower, never changed.
	view   atomic.Pointer[view]
	bound  registry
	count  counters
	ready  chan struct{} // closed once a fresh state has been in force
	gone   chan struct{} // closed by Close
	once   sync.Once
	cancel context.CancelFunc
	done   sync.WaitGroup
	feed   Feed
	boot   session.WriterID
	trust  *session.Trust // as the follower's
}

// view is one immutable state of affairs.
type view struct {
	// set is the confirmed state, overlay what unconfirmed batches deny, and
	// inherited what earlier epochs left in force.
	set, inherited *filter.Set
	overlay        *filter.Overlay
	// orders is what the emergency orders in force deny, which are ordered;
	// orderWhy is why the last one was refused.
	orders   *filter.Overlay
	ordered  []*session.SignedOrder
	orderWhy string
	// verified is set once any state was confirmed, closed after Close.
	verified, closed bool
	// origin is the local moment at which the state was surely current.
	origin time.Duration
	// anchor places the authority's clock, when it is known, and skew is wall
	// minus monotonic clock when it was anchored.
	anchor *anchor
	skew   int64
	// unusable, when not empty, says why nothing may be allowed by this state,
	// and hint why it may be getting old, both in words fit for a caller. cause
	// says more about unusable, to operators.
	unusable, hint, cause string

	epoch, confirmed, keySet uint64
	tip                      head
	divergence               *session.Divergence // the last one

	// agents are those that are registered, as was surely so at agentsOrigin; the
	// words are as hint and cause.
	agents                  *agentTable
	agentsOrigin            time.Duration
	agentsHint, agentsCause string
}

// stale says why the state is too old for the call, or cannot be told to be
// recent enough; empty when it is fresh.
func (v *view) stale(call *session.Call, now reading, limit time.Duration) string {
	if call.MaxStale > 0 {
		limit = min(limit, call.MaxStale)
	}
	switch {
	case v.unusable != "":
		return v.unusable
	case jumped(now, v.skew):
		return "the clock jumped"
	case v.age(now) <= limit:
		return ""
	case v.hint != "":
		return v.hint
	}
	return "no sign of life from the authority"
}

// why is stale for an operator, of calls that demand nothing.
func (v *view) why(now reading, limit time.Duration) string {
	s := v.stale(&session.Call{}, now, limit)
	if s != "" && s == v.unusable && v.cause != "" {
		s += ": " + v.cause
	}
	return s
}

// age is how old the state may be, by the clock that ran further: the monotonic
// one stands still in a host that is suspended.
func (v *view) age(now reading) time.Duration {
	return now.mono - v.origin + time.Duration(max(0, now.wall-int64(now.mono)-v.skew))
}

// authority is the least that the authority's clock can show; zero when it is
// not known.
func (v *view) authority(now reading) session.Instant {
	if v.anchor == nil {
		return 0
	}
	return session.Instant(v.anchor.lower(now.mono) / int64(time.Millisecond))
}

// latest is the later of the local and the authority's clock.
func (v *view) latest(now reading) session.Instant {
	return max(session.Instant(now.wall/int64(time.Millisecond)), v.authority(now))
}

// counters are totals since the start.
type counters struct {
	denied, wouldDeny, drills, exposed, cut   atomic.Uint64
	refused, replayed, foreign, lost, orphans atomic.Uint64
	repairs, diverged, rolledBack, jumps      atomic.Uint64
	damaged, ordersRefused                    atomic.Uint64
	unregistered, altered                     atomic.Uint64
}

// Start begins to follow the feed and returns at once. Until the first verified
// state is there, every request is denied; WaitReady waits for it. The Enforcer
// owns the feed from here on, also when Start fails. Close ends it.
func Start(feed Feed, o *Options) (*Enforcer, error) {
	if o == nil {
		o = &Options{}
	}
	opts, err := o.validate()
	if err == nil && feed == nil {
		err = fmt.Errorf("%w: no feed", session.ErrInvalid)
	}
	var f floor
	if err == nil {
		f, err = loadFloor(opts)
	}
	if err != nil {
		if feed != nil {
			err = errors.Join(err, feed.Close())
		}
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	e := &Enforcer{opts: opts, ready: make(chan struct{}), gone: make(chan struct{}), cancel: cancel, feed: feed}
	_, _ = rand.Read(e.boot[:]) // never fails (crypto/rand)
	fw, err := newFollower(e, f)
	if err != nil {
		cancel()
		return nil, errors.Join(err, feed.Close())
	}
	fw.publish()
	e.done.Go(func() { fw.run(ctx) })
	e.done.Go(func() { e.watch(ctx) })
	return e, nil
}

// Open is Start and WaitReady: it returns once a verified state is in force, or
// with the error of ctx joined with what was missing. ctx bounds the opening
// only.
func Open(ctx context.Context, feed Feed, o *Options) (*Enforcer, error) {
	e, err := Start(feed, o)
	if err != nil {
		return nil, err
	}
	if err := e.WaitReady(ctx); err != nil {
		return nil, errors.Join(err, e.Close())
	}
	return e, nil
}

// WaitReady waits until a verified, fresh state has been in force once. The
// error says what was still missing when ctx ended, or is session.ErrClosed.
func (e *Enforcer) WaitReady(ctx context.Context) error {
	if e == nil || e.ready == nil || e.view.Load().closed {
		return session.ErrClosed
	}
	select {
	case <-e.gone:
		return session.ErrClosed
	case <-e.ready:
		return nil
	case <-ctx.Done():
		why := e.Status().Why
		return fmt.Errorf("enforcer %s has no verified state: %s: %w", e.opts.Enrollment.Enforcer, why, context.Cause(ctx))
	}
}

// Close stops following, cuts the bound work, closes the feed and waits for
// every goroutine. Everything is denied from then on. It may be called more than
// once.
func (e *Enforcer) Close() error {
	if e == nil || e.cancel == nil {
		return nil
	}
	var err error
	e.once.Do(func() {
		close(e.gone)
		e.cancel()
		err = e.feed.Close()
		e.done.Wait()
		v := *e.view.Load()
		v.closed, v.unusable = true, "closed"
		e.view.Store(&v)
		e.bound.close(&session.DeniedError{Err: session.ErrClosed})
	})
	e.done.Wait()
	return err
}

// Prepare derives an identity's keys, once per credential. The error wraps
// session.ErrNoIdentity when the tenant is not one that this enforcer serves or
// the identity is malformed or needs more than session.MaxProbes keys.
func (e *Enforcer) Prepare(id session.Identity) (*session.Prepared, error) {
	if e != nil && e.opts.Enrollment != nil {
		for _, t := range e.opts.Enrollment.Tenants {
			if t.Name() == id.Tenant {
				return t.Prepare(id)
			}
		}
	}
	return nil, &session.DeniedError{Err: session.ErrNoIdentity, Detail: "the tenant is not served here"}
}

// Check reports whether p may make the call now: nil, or a *session.DeniedError
// that says why not. It reads the clock once and the state in memory; it takes
// no lock, does no I/O, logs nothing, and when it allows it allocates nothing.
// A credential whose issuer, audience or proof of possession does not hold must
// not come this far: Check answers for revocation, expiry and freshness.
func (e *Enforcer) Check(p *session.Prepared, call session.Call) error {
	if e == nil {
		return denyZero()
	}
	v := e.view.Load()
	if v == nil {
		return denyZero()
	}
	verdict := e.judge(v, p, &call, e.opts.clock(), e.opts.MaxStale)
	if verdict.denied != nil {
		return e.denied(verdict.denied)
	}
	if verdict.exposed {
		e.count.exposed.Add(1)
	}
	if verdict.drill {
		e.count.drills.Add(1)
	}
	return nil
}

func denyZero() error {
	return &session.DeniedError{Err: session.ErrStale, Detail: "no verified state yet"}
}

// denied counts a denial and gives it the effect that the mode asks for.
func (e *Enforcer) denied(d *session.DeniedError) error {
	if e.opts.Mode == session.ModeShadow && !errors.Is(d, session.ErrClosed) {
		e.count.wouldDeny.Add(1)
		return nil
	}
	e.count.denied.Add(1)
	switch {
	case errors.Is(d, session.ErrUnregistered):
		e.count.unregistered.Add(1)
	case errors.Is(d, session.ErrDigest) && d.Detail != notShown:
		e.count.altered.Add(1)
	}
	return d
}

// verdict is what becomes of a call: denied when that is set, else allowed,
// exposed where the state was too old, and drilled where a drill would have
// denied it.
type verdict struct {
	denied         *session.DeniedError
	exposed, drill bool
}

// judge finds the verdict by v. limit is how old the state may be.
func (e *Enforcer) judge(v *view, p *session.Prepared, call *session.Call, now reading, limit time.Duration) verdict {
	refuse := func(err error) verdict { return verdict{denied: &session.DeniedError{Err: err}} }
	switch {
	case v.closed:
		return refuse(session.ErrClosed)
	case !p.Valid() || !e.serves(p):
		return refuse(session.ErrNoIdentity)
	}
	stale := v.stale(call, now, limit)
	// To fail open takes a state: without any there is nothing to be exposed
	// about, only a deny list that has not been loaded.
	exposed := stale != "" && e.opts.Mode == session.ModeBestEffort && !call.Strict && v.verified
	if v.unusable != "" && !exposed {
		// What a state in doubt says of a caller is in doubt, too.
		return e.tooOld(v, now, stale)
	}
	m := session.Moment{Authority: v.authority(now)}
	if exp := p.Expires(); exp != 0 && v.latest(now) >= exp.Add(p.Skew()) {
		// By the later of the two clocks: a host whose clock was set back must
		// not bring a token back to life.
		return refuse(session.ErrExpired)
	}
	match, err := v.set.Decide(p, call, m)
	if err == nil && v.inherited != nil {
		var o filter.Match
		o, err = v.inherited.Decide(p, call, m)
		o.Drill = false // those of an earlier epoch are over
		match = match.Stronger(o)
	}
	provisional := false
	if err == nil && v.overlay != nil {
		var o filter.Match
		o, err = v.overlay.Decide(p, call, m)
		had := match.Record
		match = match.Stronger(o)
		provisional = match.Record != had
	}
	if err == nil && v.orders != nil {
		var o filter.Match
		o, err = v.orders.Decide(p, call, m)
		had := match.Record
		match = match.Stronger(o)
		provisional = provisional || match.Record != had
	}
	switch {
	case match.Record != nil:
		d := match.Record.Denial(match.Shape, provisional)
		return verdict{denied: &session.DeniedError{Denial: d, Err: d.Effect.Sentinel()}}
	case err != nil:
		return verdict{denied: asDenied(err)}
	case stale != "" && !exposed:
		return e.tooOld(v, now, stale)
	}
	if r := e.opts.Registry; r != nil && !r.Registered(p) {
		return refuse(session.ErrUnregistered)
	}
	if e.opts.Agents != nil {
		denied, old := e.judgeAgents(v, p, call, now)
		if denied != nil {
			return verdict{denied: denied}
		}
		exposed = exposed || old
	}
	return verdict{exposed: exposed, drill: match.Drill}
}

func (e *Enforcer) tooOld(v *view, now reading, why string) verdict {
	d := &session.DeniedError{Err: session.ErrStale, Detail: why}
	if v.unusable == "" {
		d.Age = v.age(now)
	}
	return verdict{denied: d}
}

func (e *Enforcer) serves(p *session.Prepared) bool {
	for _, t := range e.opts.Enrollment.Tenants {
		if p.By(t) {
			return true
		}
	}
	return false
}

// Status is what an operator sees of an enforcer.
type Status struct {
	Enforcer string        `json:"enforcer"`
	Mode     string        `json:"mode"`
	Ready    bool          `json:"ready"`
	Fresh    bool          `json:"fresh"`
	Why      string        `json:"why,omitempty"` // why not fresh
	Age      time.Duration `json:"age_ns"`
	MaxStale time.Duration `json:"max_stale_ns"`

	Epoch     uint64 `json:"epoch"`
	Applied   uint64 `json:"applied"`   // newest in force, provisional ones included
	Confirmed uint64 `json:"confirmed"` // newest known to be in the log
	Entries   int    `json:"entries"`
	Inherited int    `json:"inherited"` // kept from earlier epochs
	Digest    string `json:"digest"`
	KeySet    uint64 `json:"key_set"`
	Running   int    `json:"running"`

	Denied uint64 `json:"denied"`
	// Unregistered and Altered are those of Denied whose agent is not registered,
	// or not with a digest that was presented.
	Unregistered uint64 `json:"unregistered"`
	Altered      uint64 `json:"altered"`
	WouldDeny    uint64 `json:"would_deny"` // in shadow mode
	Drills       uint64 `json:"drills"`
	Exposed      uint64 `json:"exposed"` // allowed on stale state, in best-effort mode
	Cut          uint64 `json:"cut"`
	Refused      uint64 `json:"refused"`  // frames that were not believed
	Replayed     uint64 `json:"replayed"` // frames that came too late or again
	Orphans      uint64 `json:"orphans"`  // batches heard that the log did not have
	Foreign      uint64 `json:"foreign"`  // entries whose signer had no right to the tenant
	Lost         uint64 `json:"lost"`     // frames that the queue had no room for
	Repairs      uint64 `json:"repairs"`
	Diverged     uint64 `json:"diverged"`
	Damaged      uint64 `json:"damaged"` // times that state on disk or in memory was found altered
	RolledBack   uint64 `json:"rolled_back"`
	Jumps        uint64 `json:"clock_jumps"`

	// Divergence is the last one.
	Divergence *session.Divergence `json:"divergence,omitempty"`

	// Orders are the emergency orders in force that the authority has not adopted.
	// OrdersRefused counts those that were not believed, and OrderWhy says why the
	// last one was not, or why the directory cannot be read.
	Orders        []OrderStatus `json:"orders,omitempty"`
	OrdersRefused uint64        `json:"orders_refused"`
	OrderWhy      string        `json:"order_why,omitempty"`
	// Agents is the table of registered agents; nil unless callers are held
	// against it. While it is too old, the state counts as not fresh, too.
	Agents *AgentsStatus `json:"agents,omitempty"`
}

// Status reports the state of affairs. It takes no lock.
func (e *Enforcer) Status() Status {
	if e == nil || e.ready == nil {
		return Status{Why: "not opened"}
	}
	v, now := e.view.Load(), e.opts.clock()
	c := &e.count
	s := Status{
		Enforcer: e.opts.Enrollment.Enforcer, Mode: e.opts.Mode.String(), MaxStale: e.opts.MaxStale,
		Epoch: v.epoch, Applied: v.tip.number, Confirmed: v.confirmed,
		Entries: v.set.Len(), Inherited: v.inherited.Len(), KeySet: v.keySet, Running: e.bound.len(),
		Denied: c.denied.Load(), Unregistered: c.unregistered.Load(), Altered: c.altered.Load(), WouldDeny: c.wouldDeny.Load(), Drills: c.drills.Load(), Exposed: c.exposed.Load(),
		Cut: c.cut.Load(), Refused: c.refused.Load(), Replayed: c.replayed.Load(), Orphans: c.orphans.Load(),
		Foreign: c.foreign.Load(), Lost: c.lost.Load(), Repairs: c.repairs.Load(), Diverged: c.diverged.Load(), Damaged: c.damaged.Load(),
		RolledBack: c.rolledBack.Load(), Jumps: c.jumps.Load(),
	}
	s.Ready, s.Divergence = e.isReady(), v.divergence
	s.Orders, s.OrdersRefused, s.OrderWhy = e.statusOf(v.ordered), c.ordersRefused.Load(), v.orderWhy
	if v.origin > never && v.verified {
		s.Age = v.age(now)
	}
	digest := v.set.Digest()
	s.Digest = hex.EncodeToString(digest[:])
	s.Why = v.why(now, e.opts.MaxStale)
	if s.Agents = e.agentsStatus(v, now); s.Agents != nil && s.Why == "" {
		s.Why = s.Agents.Why
	}
	s.Fresh = s.Why == ""
	return s
}

func (e *Enforcer) isReady() bool {
	select {
	case <-e.ready:
		return true
	default:
		return false
	}
}
