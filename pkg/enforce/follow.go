package enforce

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"maps"
	"math"
	mrand "math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/interlock-fabric/interlock/pkg/filter"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// follower keeps an enforcer's state up to date. One goroutine, run, owns it;
// what waits for the network or the disk runs beside it, one of each kind at
// most, and answers through events.
type follower struct {
	e     *Enforcer
	trust *session.Trust
	chain *chain
	// inherited is what earlier epochs left in force, until lifted by name: see
	// inherit.go.
	inherited *filter.Set

	events chan func()  // done by run, in order
	queued atomic.Int64 // bytes in events
	jobs   sync.WaitGroup

	anchor   *anchor
	previous *anchor // of the writer before, whose heartbeats may still be due
	// skew is wall minus monotonic clock when the clocks were last anchored.
	skew int64
	// origin is the newest local moment at which the state was surely current;
	// fresh is the authority's time then. headAt is when the newest head was
	// confirmed: one that is proven later cannot be behind it.
	origin time.Duration
	fresh  session.Instant
	headAt time.Duration
	// early is the newest heartbeat of a writer whose clock was not anchored yet.
	early *session.Heartbeat
	// beats are heartbeats whose head has not been heard of, oldest first.
	beats []beat
	// interim denies beside what was in force while a chain is made anew: what
	// was heard and not confirmed.
	interim *filter.Overlay
	// doubt is the last divergence, until it is known where it was, and
	// divergence what is known of it.
	doubt      *doubt
	divergence *session.Divergence

	// logPos is where to go on reading the log, behind batch logNumber, which is
	// the last that was read.
	logPos    uint64
	logNumber uint64
	rewound   int // times that logPos was set back
	// tipSeen is the newest tip, and stuckAt when it or a confirmation last
	// moved: when heartbeats wait for longer than rereadWait since, the log is
	// read from its beginning.
	tipSeen    uint64
	stuckAt    time.Duration
	rereadWait time.Duration

	repairing, anchoring, fetching bool
	repairAt, anchorAt, fetchAt    time.Duration // not before
	repairWait, anchorWait         time.Duration // back-off
	fetched, fetchWait             time.Duration // when the last fetch began, and the least time to the next

	// verified is set once any state was confirmed. unusable says why nothing
	// may be allowed now, with the error that caused it, and hint what to say of
	// a state that is too old.
	verified bool
	unusable string
	cause    string
	hint     string
	alarmed  string // the last alarm
	// When it was raised, and when chain.expire runs next.
	alarmedAt, expireAt time.Duration

	floor       floor // of an earlier run
	floorSaved  []byte
	floorAt     time.Duration
	floorFailed bool
	saving      bool

	started bool // the feed has
	linked  bool // the link has been up

	keep     keeper
	orders   orders
	agents   agentsKeeper
	receipts receipts
}

// beat is a heartbeat with the local moment from which its age counts.
type beat struct {
	session.Heartbeat
	origin time.Duration
}

const (
	eventQueue = 4096
	tickEvery  = 50 * time.Millisecond
	maxBeats   = 16
	// reanchor is how often the authority's clock is anchored anew, so that the
	// drift that must be allowed for stays below 30 ms.
	reanchor = time.Minute
	jobLimit = 5 * time.Second
	// clockLimit bounds the error of an anchor, and so what it adds to the age.
	clockLimit = time.Second
	// logSilence is how long reading the log may make no progress.
	logSilence = 15 * time.Second
	backMin    = 20 * time.Millisecond
	backMax    = 1500 * time.Millisecond // see jitter
	// An enforcer asks for key sets at most so often, whatever it hears: less and
	// less often while that brings nothing new.
	fetchMin, fetchMax = 200 * time.Millisecond, 2 * time.Second
	// herd is over how long enforcers spread what all of them do at the same
	// time: read on after the link was down, and rebuild. A start waits for
	// nothing: how much it asks for at once is for the feed to say.
	herd = 250 * time.Millisecond
	// The log is read anew from its beginning at most so often.
	rereadMin, rereadMax = 2 * time.Second, time.Minute
	// readAhead bounds the messages of the log, and maxQueued the bytes heard,
	// that wait to be taken.
	readAhead = 64
	maxQueued = 64 << 20
	// never is an origin so long ago that it is not a time.
	never = time.Duration(math.MinInt64 / 4)
)

func newFollower(e *Enforcer, f floor) (*follower, error) {
	trust, err := session.NewTrust(e.opts.Enrollment.Root)
	if err != nil {
		return nil, err
	}
	left, err := loadInherited(e.opts)
	if err != nil {
		return nil, err
	}
	out := &follower{
		keep: keeper{left: left}, agents: agentsKeeper{origin: never, fetchOrigin: never},
		e: e, trust: trust, chain: newChain(session.Hash{}, head{}), floor: f, unusable: "no key set yet",
		events: make(chan func(), eventQueue), origin: never, fetched: never, rereadWait: rereadMin,
		fetchAt: -1, anchorAt: -1, repairAt: -1,
	}
	if err := loadOrders(e.opts, &out.orders); err != nil {
		return nil, err
	}
	e.trust = trust
	return out, nil
}

// sink hands what the feed delivers to run. It never blocks: what does not fit
// is lost, which the next heartbeat shows and the log repairs.
type sink struct{ f *follower }

func (s sink) push(fn func()) bool {
	select {
	case s.f.events <- fn:
		return true
	default:
		s.f.e.count.lost.Add(1)
		return false
	}
}

// frame queues what is small enough to be a frame and fits the bytes that may
// wait.
func (s sink) frame(b []byte, take func([]byte)) {
	n := int64(len(b))
	if n > session.MaxFrameLen {
		s.f.e.count.refused.Add(1)
		return
	}
	if s.f.queued.Add(n) > maxQueued {
		s.f.queued.Add(-n)
		s.f.e.count.lost.Add(1)
		return
	}
	if !s.push(func() { s.f.queued.Add(-n); take(b) }) {
		s.f.queued.Add(-n)
	}
}

func (s sink) Batch(frame []byte)  { s.frame(frame, func(b []byte) { s.f.heard(b, false) }) }
func (s sink) Beat(frame []byte)   { s.frame(frame, s.f.beat) }
func (s sink) KeySet(frame []byte) { s.frame(frame, s.f.keySet) }

func (s sink) Connected(up bool) {
	if f := s.f; up {
		s.push(func() {
			// Whatever was sent meanwhile is missing.
			f.repairWait, f.anchorWait = 0, 0
			at := f.now()
			if f.linked {
				at += mrand.N(herd) //nolint:gosec // every enforcer is back at this moment
			}
			f.linked = true
			f.fetchAt = at
			if !f.anchoring {
				f.anchorAt = at
			}
			if !f.repairing {
				f.repairAt = at
			}
			f.orders.wait, f.orders.readAt = 0, at
		})
	}
}

func (f *follower) now() time.Duration { return f.e.opts.clock().mono }

// wall is the time by which a key set's end is judged: the later of the two
// clocks, so that a clock that was set back keeps no old key alive.
func (f *follower) wall() session.Instant {
	r := f.e.opts.clock()
	w := session.Instant(r.wall / int64(time.Millisecond))
	if f.anchor != nil {
		w = max(w, session.Instant(f.anchor.lower(r.mono)/int64(time.Millisecond)))
	}
	return w
}

// authority is the least that the authority's clock can show; zero before it is
// anchored.
func (f *follower) authority() session.Instant {
	if f.anchor == nil {
		return 0
	}
	return session.Instant(f.anchor.lower(f.now()) / int64(time.Millisecond))
}

func (f *follower) run(ctx context.Context) {
	defer f.saveLastFloor() // after the jobs, one of which may be saving
	defer f.saveLastOrders()
	defer f.saveLastAgents()
	defer f.keepLast() // and sealing
	defer f.jobs.Wait()
	f.start(ctx)
	f.sweep()
	f.loadSegment()
	f.loadAgents()
	tick := time.NewTicker(tickEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case fn := <-f.events:
			fn()
		case <-tick.C:
			f.tick(ctx)
		}
		f.tend(ctx)
		f.sendReceipt(ctx)
	}
}

// job runs what waits for the network, and then its outcome in run.
func (f *follower) job(ctx context.Context, limit time.Duration, do func(context.Context) func()) {
	f.jobs.Go(func() {
		jctx, cancel := context.WithTimeout(ctx, limit)
		defer cancel()
		f.post(ctx, do(jctx))
	})
}

// post queues an outcome; unlike the sink it may wait.
func (f *follower) post(ctx context.Context, fn func()) bool {
	select {
	case f.events <- fn:
		return true
	case <-ctx.Done():
		return false
	}
}

// start subscribes, and keeps trying until it has: the bus may be dead at boot.
func (f *follower) start(ctx context.Context) {
	f.jobs.Go(func() {
		wait := backMin
		for ctx.Err() == nil {
			sctx, cancel := context.WithTimeout(ctx, jobLimit)
			err := f.e.feed.Start(sctx, sink{f})
			cancel()
			if err == nil {
				f.post(ctx, func() { f.started = true; f.needKeySets() })
				return
			}
			f.post(ctx, func() { f.say("cannot subscribe to the bus", err) })
			select {
			case <-ctx.Done():
			case <-time.After(wait):
			}
			wait = min(2*wait, backMax)
		}
	})
}

// say sets why nothing is allowed, while nothing has ever been confirmed. err,
// which may be nil, is for operators alone: it can name what a caller must not
// learn.
func (f *follower) say(why string, err error) {
	cause := ""
	if err != nil {
		cause = err.Error()
	}
	if !f.chain.live && (f.unusable != why || f.cause != cause) {
		f.unusable, f.cause = why, cause
		f.publish()
	}
}

// alarm says what an operator must know, once a minute and not with each frame
// that shows it again.
func (f *follower) alarm(why string, args ...any) {
	if now := f.now(); f.alarmed != why || now-f.alarmedAt >= time.Minute {
		f.alarmed, f.alarmedAt = why, now
		f.e.opts.Logger.Error(why, args...)
	}
	if f.hint != why {
		f.hint = why
		f.publish()
	}
}

func (f *follower) tick(ctx context.Context) {
	now := f.e.opts.clock()
	if f.anchor != nil && jumped(now, f.skew) {
		// Everything that was known of the authority's clock is in doubt.
		f.e.count.jumps.Add(1)
		f.e.opts.Logger.Warn("the wall clock jumped against the monotonic one: denying until the authority's clock is anchored anew",
			"by", time.Duration(now.wall-int64(now.mono)-f.skew))
		f.anchor, f.previous, f.early, f.beats, f.origin, f.agents.origin = nil, nil, nil, nil, never, never
		// Nor does a table count as fresh that was named before.
		f.agents.want, f.agents.fetchOrigin = session.AgentsRef{}, never
		f.publish()
	}
	if f.anchor == nil || now.mono-f.anchor.sent > reanchor {
		f.needAnchor()
	}
	if f.started && f.trust.KeySet() == nil {
		f.needKeySets()
	}
	if f.anchor != nil && now.mono >= f.expireAt {
		f.expireAt = now.mono + time.Second
		if f.chain.expire(f.fresh, f.authority()) {
			f.e.count.orphans.Add(1)
			f.publish()
		}
	}
	f.saveFloor(ctx)
	f.tendState(ctx)
	f.tendOrders(ctx)
}

// tend starts the jobs that are due.
func (f *follower) tend(ctx context.Context) {
	now := f.now()
	if f.fetchAt >= 0 && !f.fetching && now >= f.fetchAt {
		f.fetching, f.fetchAt, f.fetched = true, -1, now
		f.fetchWait = min(max(2*f.fetchWait, fetchMin), fetchMax)
		f.job(ctx, jobLimit, func(ctx context.Context) func() {
			sets, err := f.e.feed.KeySets(ctx)
			return func() {
				f.fetching = false
				// The newest first: it makes the others superfluous.
				for _, s := range slices.Backward(sets) {
					f.keySet(s)
				}
				if err != nil {
					f.say("the key sets cannot be read", err)
					f.needKeySets()
				}
			}
		})
	}
	if f.anchorAt >= 0 && !f.anchoring && now >= f.anchorAt && f.trust.KeySet() != nil {
		f.anchoring, f.anchorAt = true, -1
		f.job(ctx, clockLimit, f.askClock)
	}
	if f.keep.want && !f.keep.fetching && now >= f.keep.fetchAt && f.trust.KeySet() != nil {
		f.needSegment(ctx)
	}
	if f.repairAt >= 0 && !f.repairing && !f.keep.fetching && now >= f.repairAt && f.trust.KeySet() != nil {
		f.repairing, f.repairAt = true, -1
		f.repair(ctx)
	}
	f.tendAgents(ctx)
	f.readOrders(ctx)
}

func (f *follower) needKeySets() {
	if f.fetchAt < 0 {
		f.fetchAt = max(f.now(), f.fetched+jitter(f.fetchWait))
	}
}

func (f *follower) needAnchor() {
	if f.anchorAt < 0 && !f.anchoring {
		f.anchorAt = f.now() + jitter(f.anchorWait)
	}
}

func (f *follower) needRepair() {
	if f.repairAt < 0 && !f.repairing {
		f.repairAt = f.now() + jitter(f.repairWait)
	}
}

// jitter returns between half of d and d, so that many enforcers do not do the
// same at the same moment again and again.
func jitter(d time.Duration) time.Duration {
	if d <= 0 {
		return 0
	}
	return d - mrand.N(d/2+1) //nolint:gosec // jitter is no secret
}

// keySet takes a key set. A higher epoch starts a new chain.
func (f *follower) keySet(frame []byte) {
	before := f.trust.KeySet()
	newer, err := f.trust.Update(frame, f.wall())
	if err != nil {
		f.e.count.refused.Add(1)
		if before == nil {
			f.say("the key set on the bus is not trusted", err)
		}
		return
	}
	if !newer {
		return
	}
	ks := f.trust.KeySet()
	if ks.Version < f.floor.KeySet {
		// An earlier run knew a newer one: what this one trusts may have been
		// withdrawn since.
		f.trust, _ = session.NewTrust(f.e.opts.Enrollment.Root)
		f.rolledBack("the bus offers an older key set than an earlier run of this enforcer knew", "have", f.floor.KeySet, "offered", ks.Version)
		return
	}
	f.fetchWait = 0
	f.distrustAgents(ks)
	f.proveWarmAgents()
	f.e.opts.Logger.Info("key set in force", "version", ks.Version, "epoch", ks.Epoch)
	switch {
	case before == nil || ks.Epoch > before.Epoch:
		f.openEpoch(ks)
	case anyRevoked(ks, f.chain.confirmed.signers):
		f.e.opts.Logger.Warn("a key was withdrawn that had signed what is in force: denying and rebuilding", "version", ks.Version)
		f.rebuild("a withdrawn key had signed what is in force", head{})
	case f.chain.retrust(ks):
		f.rewind(0)
		f.needRepair()
	}
	f.retrustOrders()
	f.needAnchor()
	f.say("no heartbeat from the authority yet", nil)
	f.publish()
}

// openEpoch begins a new chain. What was in force stays so until lifted by name.
func (f *follower) openEpoch(ks *session.KeySet) {
	var bottom head
	if f.verified {
		f.inherit()
	} else {
		f.inheritSealed(ks.Epoch)
		if f.floor.Epoch == ks.Epoch && !anyRevoked(ks, f.floor.Signers) {
			bottom = head{f.floor.Number, f.floor.Hash}
		}
	}
	f.begin(bottom)
	if !f.verified {
		f.resume(bottom)
		f.keep.want = f.chain.base.number == 0
	}
	f.chain.live = f.verified
}

// begin starts on the chain of the current epoch, from its origin.
func (f *follower) begin(floor head) {
	f.chain = newChain(f.trust.Origin(), floor)
	f.chain.collect = f.inherited.Len() > 0
	if f.doubt != nil && f.doubt.epoch == f.trust.KeySet().Epoch {
		f.chain.probe = f.doubt.head
	}
	f.interim = nil
	f.beats, f.tipSeen, f.headAt = nil, 0, 0
	f.rewind(0)
	f.keep.gap = 0
	f.repairWait = 0
	if f.verified {
		f.interim = f.e.view.Load().overlay
		f.repairWait = herd // what makes one begin anew may make all
	}
	f.needRepair()
	f.repairWait = 0
}

// rewind has the log read from another position next, whatever is being read.
func (f *follower) rewind(pos uint64) {
	f.logPos, f.logNumber = pos, 0
	f.rewound++
}

// again begins anew on the chain of the same epoch, from a state or else from
// its origin. What was heard of what comes after stays known.
func (f *follower) again(floor head, from *state) {
	old, ks := f.chain, f.trust.KeySet()
	f.begin(floor)
	if from != nil {
		f.chain.start(*from)
	}
	f.chain.carry(old, func(l *link) bool { return !ks.Revoked(l.signer, l.batch.Number) })
}

// rebuild denies everything and reads the log anew.
func (f *follower) rebuild(why string, floor head) {
	f.unusable, f.cause = why, ""
	f.again(floor, nil)
	f.keep.want = true
	f.publish()
}

// heard takes a batch from the bus or the log. It returns the batch's number if
// it is one of the current epoch's chain or may be, verified or known already.
func (f *follower) heard(b []byte, stored bool) uint64 {
	frame, err := session.ParseFrame(b)
	if err != nil || frame.Type != session.TypeBatch {
		f.refuse(err)
		return 0
	}
	ks := f.trust.KeySet()
	if ks == nil {
		return 0
	}
	hash := frame.Hash()
	epoch, number, err := session.PeekBatch(frame.Body)
	switch {
	case err != nil:
		f.refuse(err)
		return 0
	case epoch != ks.Epoch:
		if epoch > ks.Epoch {
			f.needKeySets()
		} else if !stored {
			f.e.count.replayed.Add(1)
		}
		return 0
	case f.chain.seen(hash, number, stored):
		f.progress()
		return number
	}
	key, err := f.trust.Writer(&frame, number, false, f.wall())
	if err != nil {
		f.refuse(err)
		return 0
	}
	batch, err := session.UnmarshalBatch(frame.Body)
	if err != nil {
		// It is authentic but not of a form that can be enforced here: to go on
		// without it would be to skip a decision. The state goes stale.
		f.e.count.refused.Add(1)
		f.alarm("a signed batch cannot be understood: upgrade this enforcer", "number", number, "error", err)
		return 0
	}
	if !stored && f.late(batch) {
		f.e.count.replayed.Add(1)
		return 0
	}
	foreign := 0
	for i := range batch.Entries {
		if !key.May(batch.Entries[i].Key) {
			foreign++
		}
	}
	l := &link{batch: batch, hash: hash, key: key, signer: frame.Key, size: len(b), stored: stored, at: f.now()}
	if !f.chain.add(l) {
		// It is read from the log later.
		f.e.count.lost.Add(1)
		f.needRepair()
		return 0
	}
	if foreign > 0 {
		f.e.count.foreign.Add(uint64(foreign))
		f.e.opts.Logger.Warn("a batch decides for tenants that its signer has no right to: those entries are ignored", "number", number, "entries", foreign)
	}
	switch {
	case f.chain.live:
		l.cut = f.cutBy(f.publish(), batch)
	case f.verified && !stored && !l.rejected:
		f.interim = f.interim.Apply(batch, l.may)
		l.cut = f.cutBy(f.publish(), batch)
	}
	f.retry()
	f.progress()
	return number
}

// refuse counts a frame that is not believed. One of another version may be the
// authority's: nobody can tell, but it is worth a word.
func (f *follower) refuse(err error) {
	f.e.count.refused.Add(1)
	if errors.Is(err, session.ErrVersion) {
		f.alarm("there are frames on the bus of a version that is not known here: this enforcer may be too old", "error", err)
	}
}

// late reports whether a batch that was heard comes too late to count: either it
// lost its place, and its decisions have been taken again, or somebody plays an
// old one.
func (f *follower) late(b *session.Batch) bool {
	now := f.authority()
	if b.Number <= f.chain.confirmed.number {
		return f.chain.crowded || now == 0 || now >= b.Deadline
	}
	return b.Deadline < min(f.fresh, now)
}

// progress notes what has come onto the chain.
func (f *follower) progress() {
	for _, l := range f.chain.takeLinked() {
		if f.chain.live {
			f.receipts.applied(stamp{l.batch.Number, l.at, l.cut})
			f.checkCanary(l.batch)
		}
	}
	if n := f.chain.tip().number; n > f.tipSeen {
		f.tipSeen, f.stuckAt = n, f.now()
	}
}

// cutBy ends the running work that a batch's entries match.
func (f *follower) cutBy(v *view, b *session.Batch) int {
	works := map[*work]struct{}{}
	for i := range b.Entries {
		if b.Entries[i].Op == session.OpSet {
			f.e.bound.touched(b.Entries[i].Key, works)
		}
	}
	return f.e.cut(v, maps.Keys(works))
}

// rolledBack reports that the bus or the authority has gone back behind what was
// in force. There is no way on in this epoch: the state goes stale.
func (f *follower) rolledBack(why string, args ...any) {
	f.e.count.rolledBack.Add(1)
	f.alarm(why, args...)
	f.say(why, nil)
}

// beat takes a heartbeat or a rejection.
func (f *follower) beat(b []byte) {
	frame, err := session.ParseFrame(b)
	if err != nil {
		f.refuse(err)
		return
	}
	if f.trust.KeySet() == nil {
		return
	}
	switch frame.Type {
	case session.TypeHeartbeat:
		h, err := session.UnmarshalHeartbeat(frame.Body)
		var key *session.SigningKey
		if err == nil {
			key, err = f.trust.Writer(&frame, h.Number, true, f.wall())
		}
		if err != nil {
			f.refuse(err)
			f.needKeySets()
			return
		}
		if !key.May(session.GlobalKey()) {
			h.Agents = session.AgentsRef{} // they are of all tenants
		}
		f.heartbeat(h)
	case session.TypeRejection:
		x, err := session.UnmarshalRejection(frame.Body)
		if err == nil {
			_, err = f.trust.Writer(&frame, x.Number, true, f.wall())
		}
		if err != nil {
			f.refuse(err)
			return
		}
		if x.Epoch == f.trust.KeySet().Epoch && f.chain.reject(head{x.Number, x.Batch}, f.authority().Add(session.BatchTTL)) {
			f.e.count.orphans.Add(1)
			f.publish()
		}
	default:
		f.e.count.refused.Add(1)
	}
}

func (f *follower) heartbeat(h session.Heartbeat) {
	ks := f.trust.KeySet()
	if h.KeySet > ks.Version || h.Epoch > ks.Epoch {
		// There is a key set that is not known here: it may withdraw what is
		// trusted, so nothing is fresh without it.
		f.needKeySets()
		return
	}
	if h.Epoch != ks.Epoch {
		return
	}
	a := f.anchor
	if a == nil || a.writer != h.Writer {
		if a = f.previous; a == nil || a.writer != h.Writer {
			// A writer whose clock is not known: until it is, nothing that it
			// says can be told from a recording. The answer that anchors it may
			// be behind this in the queue.
			f.early = &h
			f.needAnchor()
			return
		}
	}
	if a.beaten && h.Mono <= a.beat {
		f.e.count.replayed.Add(1)
		return
	}
	if a.earliest(h.Mono) > f.now() {
		// From the future: one of the two clocks is not what it was.
		f.e.count.refused.Add(1)
		f.anchor = nil
		f.needAnchor()
		f.publish()
		return
	}
	a.beaten, a.beat = true, h.Mono
	b := beat{Heartbeat: h, origin: a.earliest(h.Mono) - h.Proven}
	f.named(&h, b.origin)
	if f.confirm(b) {
		f.progress()
		return
	}
	if len(f.beats) == 0 {
		f.stuckAt = f.now()
	}
	if len(f.beats) >= maxBeats {
		f.beats = f.beats[1:]
	}
	f.beats = append(f.beats, b)
	f.needRepair()
}

// retry tries the heartbeats that wait for batches, newest first. What is older
// than one that is done with is of no more use.
func (f *follower) retry() {
	for i, b := range slices.Backward(f.beats) {
		if f.confirm(b) {
			if i < len(f.beats) { // else a rebuild has begun, without any
				f.beats = slices.Clone(f.beats[i+1:])
			}
			f.repairWait = 0
			return
		}
	}
}

// confirm lets a heartbeat vouch for the chain and renew the lease. It reports
// whether there is nothing more to be had from it.
func (f *follower) confirm(b beat) bool {
	wasLive := f.chain.live
	switch f.chain.confirm(head{b.Number, b.Head}) {
	case unknownHead:
		return false
	case olderHead, otherHead:
		if f.giveUp(head{b.Number, b.Head}) {
			return true
		}
		if b.origin < f.headAt {
			f.e.count.replayed.Add(1)
		} else {
			f.rolledBack("the authority's log is not the one that was in force here: it was rolled back, and a new epoch is needed", "epoch", b.Epoch, "number", b.Number)
		}
		return true
	case newHead:
		f.headAt = f.now()
		f.liftInherited()
	}
	if f.chain.confirmed.set.Digest() != b.State {
		f.diverged(b.Heartbeat)
		return true
	}
	if err := f.inherited.Err(); err != nil {
		f.alarm("what earlier epochs left in force is damaged: denying until a restart reads it again from the state directory", "error", err)
		f.unusable = "the revocation state was damaged"
		f.publish()
		return true
	}
	if n := max(f.chain.confirmed.set.Len(), f.inherited.Len()); n > f.e.opts.MaxEntries {
		f.alarm("there are more entries in force than this enforcer may hold: denying", "entries", n, "bound", f.e.opts.MaxEntries)
		f.unusable = "more entries are in force than may be held here"
		f.publish()
		return true
	}
	if b.origin > f.origin {
		f.origin, f.fresh = b.origin, b.Time.Add(-b.Proven)
	}
	f.unusable, f.cause, f.hint, f.verified = "", "", "", true
	f.interim, f.keep.warm, f.keep.left = nil, nil, nil
	if f.keep.gap <= b.Number {
		f.keep.gap, f.keep.want, f.keep.fetchWait = 0, false, 0
	}
	f.rereadWait, f.stuckAt = rereadMin, f.now()
	if !wasLive {
		// Strays that lay in the log are not news.
		f.chain.expire(f.fresh, f.authority())
	}
	v := f.publish()
	if f.chain.takeSurprise() || !wasLive {
		// What came into force during a rebuild, or against a rejection, has cut
		// nothing yet.
		f.e.cut(v, slices.Values(f.e.bound.snapshot()))
	}
	f.nowReady()
	f.receipts.confirmed()
	return true
}

// nowReady says that a verified, fresh state is in force, when it first is.
func (f *follower) nowReady() {
	v, now := f.e.view.Load(), f.e.opts.clock()
	if f.orders.asked && f.verified && !f.e.isReady() && now.mono-f.origin <= f.e.opts.MaxStale &&
		(f.e.opts.Agents == nil || v.agentsStale(&session.Call{}, now, f.e.opts.Agents.MaxAge) == "") {
		close(f.e.ready)
	}
}

// liftInherited applies the new epoch's lifts to what earlier ones left.
func (f *follower) liftInherited() {
	lifts := f.chain.takeLifts()
	f.keep.unsaved = f.keep.unsaved || len(lifts) > 0
	for _, l := range lifts {
		f.inherited = f.inherited.Apply(l.batch, func(e *session.Entry) bool {
			return e.Op == session.OpLift && l.may(e)
		})
	}
	if f.inherited.Len() == 0 && f.inherited.Err() == nil {
		f.inherited, f.chain.collect = nil, false
	}
}

// repair reads the log from where it is known up to.
func (f *follower) repair(ctx context.Context) {
	f.e.count.repairs.Add(1)
	epoch := f.trust.KeySet().Epoch
	from, last := f.logPos, f.logNumber
	before, rewound := last, f.rewound
	if n := f.chain.base.number; n > f.logNumber && f.logPos > 0 {
		// Each batch takes at least one position.
		from += n - f.logNumber
	}
	f.jobs.Go(func() {
		rctx, cancel := context.WithCancel(ctx)
		defer cancel()
		silence := time.AfterFunc(logSilence, cancel)
		defer silence.Stop()
		// What is read waits here, not in memory, until run has taken it.
		room := make(chan struct{}, readAhead)
		next, err := f.e.feed.Log(rctx, from, func(_ uint64, frame []byte) error {
			select {
			case room <- struct{}{}:
			case <-ctx.Done():
				return ctx.Err()
			}
			silence.Reset(logSilence)
			if !f.post(ctx, func() {
				<-room
				if ks := f.trust.KeySet(); ks != nil && ks.Epoch == epoch {
					tip := f.chain.tip().number
					n := f.heard(frame, true)
					switch {
					case n <= tip+1 || last != before || f.keep.gap > 0:
					case from > 1:
						f.rewind(0) // positions prove nothing: this may be another stream than before
					default:
						f.gap(n)
					}
					last = max(last, n)
				}
			}) {
				return ctx.Err()
			}
			return nil
		})
		f.post(ctx, func() {
			f.repairing = false
			if f.rewound != rewound {
				f.needRepair() // what comes first has not been read
				return
			}
			f.repaired(from, next, last, err)
		})
	})
}

// gap notes that the log does not have what comes after what is here, but goes on
// with batch n: what is between has been trimmed, and only a segment leads on.
func (f *follower) gap(n uint64) {
	f.keep.gap, f.keep.want = n, true
	if f.verified {
		f.keep.fetchAt = max(f.keep.fetchAt, f.now()+mrand.N(herd)) //nolint:gosec // many may be in this
	}
}

// repaired takes the outcome of a repair that began at from: last is the number
// of the newest batch that the log held before position next.
func (f *follower) repaired(from, next, last uint64, err error) {
	waiting := len(f.beats)
	f.retry()
	f.progress()
	now := f.now()
	if err != nil {
		f.say("the log cannot be read", err)
	} else if next > from {
		f.logPos, f.logNumber = next, last
	}
	if err == nil && from <= 1 && last == 0 && len(f.beats) > 0 && f.keep.gap == 0 {
		f.gap(f.beats[len(f.beats)-1].Number + 1) // all of it has been trimmed
	}
	if err == nil && len(f.beats) < waiting {
		f.repairWait = 0
	} else {
		f.repairWait = min(max(2*f.repairWait, backMin), backMax)
	}
	if err == nil && len(f.beats) > 0 && now-f.stuckAt >= f.rereadWait {
		// Nothing where there must be something: a replica that lags, another
		// stream than before, or a branch that leads nowhere.
		if f.rereadWait > rereadMin && f.hint == "" && f.keep.gap == 0 {
			f.alarm("the log does not lead from what is in force here to the authority's head: it was rolled back, or part of it is missing")
		}
		f.keep.want = true
		f.chain.restart()
		f.rewind(0)
		f.tipSeen, f.stuckAt = 0, now
		f.rereadWait = min(2*f.rereadWait, rereadMax)
	}
	if len(f.beats) > 0 || err != nil {
		f.needRepair()
	}
}

// askClock anchors the writer's clocks by a nonce.
func (f *follower) askClock(ctx context.Context) func() {
	var nonce [32]byte
	_, _ = rand.Read(nonce[:]) // never fails (crypto/rand)
	sent := f.e.opts.clock()
	answer, err := f.e.feed.Clock(ctx, nonce)
	received := f.e.opts.clock()
	return func() {
		f.anchoring = false
		if err == nil {
			err = f.anchored(nonce, sent, received, answer)
			if err != nil {
				f.e.count.refused.Add(1)
			}
		}
		if err != nil {
			f.anchorWait = min(max(2*f.anchorWait, backMin), backMax)
			f.anchorAt = f.now() + jitter(f.anchorWait)
			f.say("no authority answers", err)
			return
		}
		f.anchorWait = 0
	}
}

func (f *follower) anchored(nonce [32]byte, sent, received reading, answer []byte) error {
	frame, err := session.ParseFrame(answer)
	if err != nil {
		return err
	}
	if frame.Type != session.TypeClock {
		return session.ErrMalformed
	}
	c, err := session.UnmarshalClock(frame.Body)
	if err != nil {
		return err
	}
	if c.Nonce != nonce {
		return session.ErrUntrusted
	}
	if _, err := f.trust.Writer(&frame, 0, true, f.wall()); err != nil {
		return err
	}
	skew := received.wall - int64(received.mono)
	if jumped(sent, skew) {
		return session.ErrStale
	}
	next := &anchor{
		writer: c.Writer, sent: sent.mono, received: received.mono,
		mono: c.Mono, wall: int64(c.Time) * int64(time.Millisecond),
	}
	if a := f.anchor; a != nil && a.writer == next.writer {
		next.beaten, next.beat = a.beaten, a.beat
	} else if a != nil {
		f.previous = a
	}
	f.anchor, f.skew = next, skew
	f.publish()
	if h := f.early; h != nil && h.Writer == next.writer {
		f.early = nil
		f.heartbeat(*h)
	}
	return nil
}

// publish makes what the follower knows what Check reads.
func (f *follower) publish() *view {
	c := f.chain
	v := &view{
		set: c.confirmed.set, overlay: c.overlay, inherited: f.inherited,
		divergence: f.divergence,
		verified:   f.verified && f.orders.asked, origin: f.origin, anchor: f.anchor, skew: f.skew, unusable: f.unusable, cause: f.cause, hint: f.hint,
		tip: c.tip(), confirmed: c.confirmed.number,
		agents: f.agents.table, agentsOrigin: f.agents.origin, agentsHint: f.agents.hint, agentsCause: f.agents.cause,
	}
	switch {
	case v.unusable != "":
	case f.anchor == nil:
		v.unusable = "the authority's clock is not anchored"
	case !f.orders.asked:
		v.unusable = "the emergency orders have not been read yet"
	}
	if f.verified && !c.live {
		// A rebuild is under way: keep denying what was denied, and what is
		// heard meanwhile. That is what is applied, and not what has been read.
		old := f.e.view.Load()
		v.set, v.overlay, v.inherited = old.set, f.interim, old.inherited
		v.tip, v.confirmed = old.tip, old.confirmed
	}
	if ks := f.trust.KeySet(); ks != nil {
		v.epoch, v.keySet = ks.Epoch, ks.Version
	}
	v.orders, v.ordered = f.orders.under(v.set, v.inherited)
	v.orderWhy = f.orders.why
	f.e.view.Store(v)
	return v
}

// floorNow is the head that a later run must not go behind, marshalled, or nil
// if there is none or it is saved.
func (f *follower) floorNow() []byte {
	ks := f.trust.KeySet()
	if f.e.opts.StateDir == "" || ks == nil || !f.verified || f.unusable != "" {
		return nil
	}
	c := &f.chain.confirmed
	if c.number == 0 && ks.Epoch == f.floor.Epoch {
		return nil
	}
	b := floor{
		Root: f.trust.Root(), Epoch: ks.Epoch, Number: c.number, Hash: c.hash, Signers: c.signers, KeySet: ks.Version,
	}.marshal()
	if bytes.Equal(b, f.floorSaved) {
		return nil
	}
	return b
}

// saveFloor persists it, at most once a second, beside run: a slow disk must not
// hold a decision back.
func (f *follower) saveFloor(ctx context.Context) {
	now := f.now()
	if f.saving || now-f.floorAt < time.Second {
		return
	}
	b := f.floorNow()
	if b == nil {
		return
	}
	f.floorAt, f.saving = now, true
	f.job(ctx, jobLimit, func(context.Context) func() {
		err := writeFloor(f.e.opts, b)
		return func() { f.saving = false; f.savedFloor(b, err) }
	})
}

func (f *follower) saveLastFloor() {
	if b := f.floorNow(); b != nil {
		f.savedFloor(b, writeFloor(f.e.opts, b))
	}
}

func (f *follower) savedFloor(b []byte, err error) {
	if err == nil {
		f.floorFailed, f.floorSaved = false, b
		return
	}
	if !f.floorFailed {
		f.e.opts.Logger.Error("cannot save the head that is in force: a rollback during the next restart would go unnoticed", "error", err)
	}
	f.floorFailed = true
}
