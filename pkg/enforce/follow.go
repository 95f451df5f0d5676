package enforce

import (
	"context"
	"crypto/rand"
	"sync"
	"sync/atomic"
	"time"

	"github.com/interlock-fabric/interlock/pkg/filter"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// follower keeps an enforcer's state up to date. One goroutine, run, owns it;
// what waits for the network runs beside it, one of each kind at most, and
// answers through events.
type follower struct {
	e     *Enforcer
	trust *session.Trust
	chain *chain
	// inherited is what earlier epochs left in force, until lifted by name.
	inherited *filter.Set

	events chan func()  // done by run, in order
	queued atomic.Int64 // bytes in events
	jobs   sync.WaitGroup

	anchor   *anchor
	previous *anchor // of the writer before, whose heartbeats may still be due
	// origin is the newest local moment at which the state was surely current;
	// fresh is the authority's time then.
	origin time.Duration
	fresh  session.Instant
	// beats are heartbeats whose head has not been heard of, oldest first.
	beats []beat

	// logPos is where to go on reading the log, behind batch logNumber, which is
	// the last that was read.
	logPos    uint64
	logNumber uint64
	logIdle   int // repairs in a row that read nothing

	repairing, anchoring, fetching bool
	repairAt, anchorAt, fetchAt    time.Duration // not before
	repairWait, anchorWait         time.Duration // back-off

	unusable  string
	expiredAt time.Duration // when chain.expire last ran

	floorSaved  floor
	floorAt     time.Duration
	floorFailed bool
	saving      bool

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
	backMin  = 20 * time.Millisecond
	// readAhead bounds the messages of the log, and maxQueued the bytes heard,
	// that wait to be taken.
	readAhead = 64
	maxQueued = 64 << 20
	backMax   = time.Second
)

func newFollower(e *Enforcer, f floor) (*follower, error) {
	trust, err := session.NewTrust(e.opts.Enrollment.Root)
	if err != nil {
		return nil, err
	}
	return &follower{
		e: e, trust: trust, chain: newChain(session.Hash{}, f), floorSaved: f,
		events: make(chan func(), eventQueue), unusable: "no key set yet",
		fetchAt: -1, anchorAt: -1, repairAt: -1,
	}, nil
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
			f.needKeySets()
			f.needAnchor()
			f.needRepair()
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
	defer f.saveLastFloor()
	defer f.jobs.Wait()
	f.start(ctx)
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
				f.post(ctx, f.needKeySets)
				return
			}
			f.post(ctx, func() { f.say("cannot subscribe to the bus") })
			select {
			case <-ctx.Done():
			case <-time.After(wait):
			}
			wait = min(2*wait, backMax)
		}
	})
}

// say sets why nothing is allowed, while nothing has ever been confirmed.
func (f *follower) say(why string) {
	if !f.chain.live && f.unusable != why {
		f.unusable = why
		f.publish()
	}
}

func (f *follower) tick(ctx context.Context) {
	now := f.e.opts.clock()
	v := f.e.view.Load()
	if v.anchored {
		if d := now.wall - int64(now.mono) - v.skew; d > int64(jumpLimit) || d < -int64(jumpLimit) {
			// Everything that was known of the authority's clock is in doubt.
			f.e.count.jumps.Add(1)
			f.e.opts.Logger.Warn("the wall clock jumped against the monotonic one: denying until the authority's clock is anchored anew",
				"by", time.Duration(d))
			f.anchor, f.previous, f.beats = nil, nil, nil
			f.needAnchor()
			f.origin = now.mono - 24*time.Hour
			f.publish()
		}
	}
	if f.e.bound.len() > 0 {
		f.e.sweep(f.e.view.Load())
	}
	if f.anchor == nil || now.mono-f.anchor.sent > reanchor {
		f.needAnchor()
	}
	if f.trust.KeySet() == nil {
		f.needKeySets()
	}
	if f.anchor != nil && f.chain.live && now.mono-f.origin <= f.e.opts.MaxStale && now.mono-f.expiredAt >= time.Second {
		f.expiredAt = now.mono
		if f.chain.expire(f.fresh, f.authority()) {
			f.e.count.orphans.Add(1)
			f.publish()
		}
	}
	f.saveFloor(ctx)
}

// tend starts the jobs that are due.
func (f *follower) tend(ctx context.Context) {
	now := f.now()
	if f.fetchAt >= 0 && !f.fetching && now >= f.fetchAt {
		f.fetching, f.fetchAt = true, -1
		f.job(ctx, jobLimit, func(ctx context.Context) func() {
			sets, err := f.e.feed.KeySets(ctx)
			return func() {
				f.fetching = false
				for _, s := range sets {
					f.keySet(s)
				}
				if err != nil || f.trust.KeySet() == nil {
					f.fetchAt = f.now() + 10*backMin
				}
			}
		})
	}
	if f.anchorAt >= 0 && !f.anchoring && now >= f.anchorAt && f.trust.KeySet() != nil {
		f.anchoring, f.anchorAt = true, -1
		f.job(ctx, jobLimit, f.askClock)
	}
	if f.repairAt >= 0 && !f.repairing && now >= f.repairAt && f.trust.KeySet() != nil {
		f.repairing, f.repairAt = true, -1
		f.repair(ctx)
	}
}

func (f *follower) needKeySets() {
	if f.fetchAt < 0 {
		f.fetchAt = f.now()
	}
}

func (f *follower) needAnchor() {
	if f.anchorAt < 0 && !f.anchoring {
		f.anchorAt = f.now()
	}
}

func (f *follower) needRepair() {
	if f.repairAt < 0 && !f.repairing {
		f.repairAt = f.now() + f.repairWait
	}
}

// keySet takes a key set. A higher epoch starts a new chain.
func (f *follower) keySet(frame []byte) {
	before := f.trust.KeySet()
	newer, err := f.trust.Update(frame, f.wall())
	if err != nil {
		f.e.count.refused.Add(1)
		if before == nil {
			f.say("the key set on the bus is not trusted: " + err.Error())
		}
		return
	}
	if !newer {
		return
	}
	ks := f.trust.KeySet()
	if ks.Version < f.chain.floor.KeySet {
		// An earlier run knew a newer one: what this one trusts may have been
		// withdrawn since.
		f.e.count.rolledBack.Add(1)
		f.e.opts.Logger.Error("the bus offers an older key set than an earlier run of this enforcer knew", "have", f.chain.floor.KeySet, "offered", ks.Version)
		f.trust, _ = session.NewTrust(f.e.opts.Enrollment.Root)
		f.say("the bus offers an older key set than was known before")
		return
	}
	f.e.opts.Logger.Info("key set in force", "version", ks.Version, "epoch", ks.Epoch)
	if before == nil || ks.Epoch > before.Epoch {
		f.openEpoch(before == nil)
	}
	f.needAnchor()
	f.say("no heartbeat from the authority yet")
	f.publish()
}

// openEpoch begins a new chain. What was in force stays so until lifted by name.
func (f *follower) openEpoch(first bool) {
	if !first {
		f.inherited = inherit(inherit(f.inherited, f.chain.confirmed.set), f.chain.overlay)
		f.e.opts.Logger.Warn("new epoch: entries of the one before stay in force until lifted", "epoch", f.trust.KeySet().Epoch, "entries", f.inherited.Len())
	}
	f.chain = newChain(f.trust.Origin(), f.chain.floor)
	f.chain.live, f.chain.collect = !first, f.inherited != nil
	f.beats, f.logPos, f.logNumber, f.repairWait = nil, 0, 0, 0
	f.needRepair()
}

// inherit puts every record of from into to, which may be nil.
func inherit(to, from *filter.Set) *filter.Set {
	from.Range(func(k session.Key, r *session.Record) bool {
		if r.Drill {
			return true
		}
		to = to.Apply(&session.Batch{
			Number: r.Seq, Time: r.Since,
			Entries: []session.Entry{{
				Op: session.OpSet, Effect: r.Effect, Reason: r.Reason, Key: k, IssuedBefore: r.IssuedBefore,
				Expires: r.Expires, Incident: r.Incident, ACR: r.ACR, Except: r.Except,
			}},
		}, nil)
		return true
	})
	return to
}

// heard takes a batch from the bus or the log. It returns the batch's number if
// it is one of the current epoch's chain or may be, verified or known already.
func (f *follower) heard(b []byte, stored bool) uint64 {
	frame, err := session.ParseFrame(b)
	if err != nil || frame.Type != session.TypeBatch {
		f.e.count.refused.Add(1)
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
		f.e.count.refused.Add(1)
		return 0
	case epoch != ks.Epoch:
		if epoch > ks.Epoch {
			f.needKeySets()
		} else if !stored {
			f.e.count.replayed.Add(1)
		}
		return 0
	case f.chain.seen(hash, number, stored):
		return number
	}
	key, err := f.trust.Writer(&frame, number, false, f.wall())
	if err != nil {
		f.e.count.refused.Add(1)
		return 0
	}
	batch, err := session.UnmarshalBatch(frame.Body)
	if err != nil {
		// It is authentic but not of a version that can be enforced here: to go
		// on without it would be to skip a decision. The state goes stale.
		f.e.count.refused.Add(1)
		f.e.opts.Logger.Error("a signed batch cannot be understood: upgrade this enforcer; it denies once its state is stale", "number", number, "error", err)
		return 0
	}
	if !stored && batch.Number <= f.chain.confirmed.number {
		// Either it lost its place to another batch, and its decisions are about
		// to be taken again, or somebody plays an old one.
		if now := f.authority(); now == 0 || now >= batch.Deadline {
			f.e.count.replayed.Add(1)
			return 0
		}
	}
	for i := range batch.Entries {
		if !key.May(batch.Entries[i].Key) {
			f.e.count.foreign.Add(1)
		}
	}
	at := f.now()
	switch f.chain.add(&link{batch: batch, hash: hash, key: key, size: len(b), stored: stored}) {
	case rolledBack:
		f.rolledBack("the log has another batch where an earlier run of this enforcer confirmed one")
		return 0
	case overflowed:
		f.e.count.lost.Add(1)
		f.logPos, f.logNumber = 0, 0 // it must be read again
		f.needRepair()
		return 0
	}
	f.retry()
	if f.chain.live {
		v := f.publish()
		f.receipts.applied(batch.Number, at, f.cutBy(v, batch))
	}
	return number
}

// cutBy ends the running work that a batch's entries match.
func (f *follower) cutBy(v *view, b *session.Batch) int {
	works := map[*work]struct{}{}
	for i := range b.Entries {
		if b.Entries[i].Op == session.OpSet {
			f.e.bound.touched(b.Entries[i].Key, works)
		}
	}
	return f.e.cut(v, works)
}

func (f *follower) rolledBack(why string) {
	f.e.count.rolledBack.Add(1)
	f.e.opts.Logger.Error(why)
	f.say(why)
}

// beat takes a heartbeat or a rejection.
func (f *follower) beat(b []byte) {
	frame, err := session.ParseFrame(b)
	if err != nil {
		f.e.count.refused.Add(1)
		return
	}
	ks := f.trust.KeySet()
	if ks == nil {
		return
	}
	switch frame.Type {
	case session.TypeHeartbeat:
		h, err := session.UnmarshalHeartbeat(frame.Body)
		if err != nil {
			f.e.count.refused.Add(1)
			return
		}
		if _, err := f.trust.Writer(&frame, h.Number, true, f.wall()); err != nil {
			f.e.count.refused.Add(1)
			f.needKeySets()
			return
		}
		f.heartbeat(h)
	case session.TypeRejection:
		x, err := session.UnmarshalRejection(frame.Body)
		if err != nil || x.Epoch != ks.Epoch {
			f.e.count.refused.Add(1)
			return
		}
		if _, err := f.trust.Writer(&frame, x.Number, true, f.wall()); err != nil {
			f.e.count.refused.Add(1)
			return
		}
		if f.chain.reject(x.Batch, x.Number, f.authority().Add(session.BatchTTL)) {
			f.e.count.orphans.Add(1)
			f.publish()
		}
	default:
		f.e.count.refused.Add(1)
	}
}

func (f *follower) heartbeat(h session.Heartbeat) {
	f.e.count.beats.Add(1)
	ks := f.trust.KeySet()
	if h.KeySet > ks.Version || h.Epoch > ks.Epoch {
		f.needKeySets()
	}
	if h.Epoch != ks.Epoch {
		return
	}
	a := f.anchor
	if a == nil || a.writer != h.Writer {
		if f.previous != nil && f.previous.writer == h.Writer {
			a = f.previous
		} else {
			// A writer whose clock is not known: until it is, nothing that it
			// says can be told from a recording.
			f.needAnchor()
			return
		}
	}
	if a.beaten && h.Mono <= a.beat {
		f.e.count.replayed.Add(1)
		return
	}
	now := f.now()
	if a.earliest(h.Mono) > now {
		// From the future: one of the two clocks is not what it was.
		f.e.count.refused.Add(1)
		f.anchor = nil
		f.needAnchor()
		return
	}
	a.beaten, a.beat = true, h.Mono
	b := beat{Heartbeat: h, origin: a.earliest(h.Mono) - h.Proven}
	if !f.confirm(b) {
		if len(f.beats) >= maxBeats {
			f.beats = f.beats[1:]
		}
		f.beats = append(f.beats, b)
		f.needRepair()
	}
}

// retry tries the heartbeats that wait for batches, newest first.
func (f *follower) retry() {
	for i := len(f.beats) - 1; i >= 0; i-- {
		if f.confirm(f.beats[i]) {
			f.beats = append([]beat(nil), f.beats[i+1:]...)
			f.repairWait = 0
			return
		}
	}
}

// confirm lets a heartbeat vouch for the chain and renew the lease. It reports
// whether there is nothing more to be had from it.
func (f *follower) confirm(b beat) bool {
	switch f.chain.confirm(b.Epoch, b.Number, b.Head) {
	case unknownHead:
		return false
	case olderHead:
		f.e.count.replayed.Add(1)
		return true
	case belowFloor:
		f.rolledBack("the authority's log ends before what an earlier run of this enforcer had in force: a new epoch is needed")
		return true
	case conflicting:
		f.diverge("the authority's chain has another batch at a number that is in force here", b)
		return true
	case newHead:
		f.liftInherited()
	}
	if f.chain.confirmed.set.Digest() != b.State {
		f.diverge("the state differs from the authority's at the same batch", b)
		return true
	}
	first := !f.e.isReady()
	f.unusable = ""
	f.origin, f.fresh = max(f.origin, b.origin), max(f.fresh, b.Time)
	if first {
		f.origin, f.fresh = b.origin, b.Time
	}
	f.publish()
	if first {
		close(f.e.ready)
	}
	f.receipts.confirmed()
	return true
}

func (e *Enforcer) isReady() bool {
	select {
	case <-e.ready:
		return true
	default:
		return false
	}
}

// liftInherited applies the new epoch's lifts to what earlier ones left.
func (f *follower) liftInherited() {
	for _, l := range f.chain.takeLifts() {
		f.inherited = f.inherited.Apply(l.batch, func(e *session.Entry) bool {
			return e.Op == session.OpLift && l.may(e)
		})
	}
	if f.inherited.Len() == 0 {
		f.inherited, f.chain.collect = nil, false
	}
}

// diverge denies everything and reads the log anew.
func (f *follower) diverge(why string, b beat) {
	f.e.count.diverged.Add(1)
	f.e.opts.Logger.Error(why+": denying and rebuilding", "number", b.Number, "epoch", b.Epoch)
	f.unusable = why
	f.publish()
	f.chain = newChain(f.trust.Origin(), f.chain.floor)
	f.beats, f.logPos, f.logNumber = nil, 0, 0
	f.repairWait = backMax
	f.needRepair()
}

// repair reads the log from where it is known up to.
func (f *follower) repair(ctx context.Context) {
	f.e.count.repairs.Add(1)
	epoch := f.trust.KeySet().Epoch
	from, last := f.logPos, f.logNumber
	if n := f.chain.base.number; n > f.logNumber && f.logPos > 0 {
		// Each batch takes at least one position.
		from += n - f.logNumber
	}
	f.jobs.Go(func() {
		// What is read waits here, not in memory, until run has taken it.
		room := make(chan struct{}, readAhead)
		read := 0
		next, err := f.e.feed.Log(ctx, from, func(_ uint64, frame []byte) error {
			read++
			select {
			case room <- struct{}{}:
			case <-ctx.Done():
				return ctx.Err()
			}
			if !f.post(ctx, func() {
				<-room
				if ks := f.trust.KeySet(); ks != nil && ks.Epoch == epoch {
					last = max(last, f.heard(frame, true))
				}
			}) {
				return ctx.Err()
			}
			return nil
		})
		f.post(ctx, func() { f.repaired(epoch, next, last, read, err) })
	})
}

// repaired takes the outcome of a repair: last is the number of the newest batch
// that the log held before position next.
func (f *follower) repaired(epoch, next, last uint64, read int, err error) {
	f.repairing = false
	if ks := f.trust.KeySet(); ks == nil || ks.Epoch != epoch {
		f.needRepair()
		return
	}
	waiting := len(f.beats)
	f.retry()
	switch {
	case err != nil:
		f.say("the log cannot be read: " + err.Error())
	case read > 0:
		f.logPos, f.logNumber, f.logIdle = next, last, 0
	case len(f.beats) > 0:
		// Nothing where there must be something: a replica that lags, or another
		// stream than before.
		if f.logIdle++; f.logIdle >= 5 {
			f.logPos, f.logNumber, f.logIdle = 0, 0, 0
		}
	}
	if err == nil && len(f.beats) < waiting {
		f.repairWait = 0
	} else {
		f.repairWait = min(max(2*f.repairWait, backMin), backMax)
	}
	if len(f.beats) > 0 || err != nil {
		f.needRepair()
	}
}

// askClock anchors the writer's clocks by a nonce.
func (f *follower) askClock(ctx context.Context) func() {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
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
			f.anchorAt = f.now() + f.anchorWait
			f.say("no authority answers")
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
	if d := (received.wall - int64(received.mono)) - (sent.wall - int64(sent.mono)); d > int64(jumpLimit) || d < -int64(jumpLimit) {
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
	f.anchor = next
	f.publishSkew(received.wall - int64(received.mono))
	return nil
}

// publish makes what the follower knows what Check reads.
func (f *follower) publish() *view {
	return f.publishSkew(f.e.view.Load().skew)
}

func (f *follower) publishSkew(skew int64) *view {
	c := f.chain
	number, head := c.tip()
	v := &view{
		set: c.confirmed.set, overlay: c.overlay, inherited: f.inherited,
		origin: f.origin, skew: skew, unusable: f.unusable,
		number: number, confirmed: c.confirmed.number, head: head, anchored: f.anchor != nil,
	}
	if v.unusable == "" && f.anchor == nil {
		v.unusable = "the authority's clock is not anchored"
	}
	if f.unusable != "" && !c.live {
		// A rebuild is under way: keep denying what was denied, in the modes
		// that do not deny everything meanwhile.
		old := f.e.view.Load()
		if old.set != nil {
			v.set, v.overlay, v.inherited = old.set, old.overlay, old.inherited
		}
	}
	if a := f.anchor; a != nil {
		now := f.now()
		v.authority = a.lower(now) - int64(now)
	}
	if ks := f.trust.KeySet(); ks != nil {
		v.epoch, v.keySet = ks.Epoch, ks.Version
	}
	f.e.view.Store(v)
	return v
}

// floorNow is the head that a later run must not go behind, if there is a new
// one.
func (f *follower) floorNow() (floor, bool) {
	ks := f.trust.KeySet()
	if f.e.opts.StateDir == "" || ks == nil || !f.e.isReady() || f.unusable != "" {
		return floor{}, false
	}
	want := floor{Epoch: ks.Epoch, Number: f.chain.confirmed.number, Hash: f.chain.confirmed.hash, KeySet: ks.Version}
	return want, want != f.floorSaved
}

// saveFloor persists it, at most once a second, beside run: a slow disk must not
// hold a decision back.
func (f *follower) saveFloor(ctx context.Context) {
	now := f.now()
	if f.saving || now-f.floorAt < time.Second {
		return
	}
	want, ok := f.floorNow()
	if !ok {
		return
	}
	f.floorAt, f.saving = now, true
	f.job(ctx, jobLimit, func(context.Context) func() {
		err := want.save(f.e.opts.StateDir)
		return func() { f.saving = false; f.savedFloor(want, err) }
	})
}

func (f *follower) saveLastFloor() {
	if want, ok := f.floorNow(); ok {
		f.savedFloor(want, want.save(f.e.opts.StateDir))
	}
}

func (f *follower) savedFloor(saved floor, err error) {
	if err == nil {
		f.floorFailed, f.floorSaved = false, saved
		return
	}
	if !f.floorFailed {
		f.e.opts.Logger.Error("cannot save the head that is in force: a rollback during the next restart would go unnoticed", "error", err)
	}
	f.floorFailed = true
}
