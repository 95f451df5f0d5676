package sequencer

import (
	"crypto/ed25519"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"time"

	"github.com/interlock-fabric/interlock/pkg/filter"
	"github.com/interlock-fabric/interlock/pkg/natsfeed"
	"github.com/interlock-fabric/interlock/pkg/session"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// role is what the sequencer is at the moment.
type role uint32

const (
	loading   role = iota // the log has not been read yet
	following             // another may write
	proving               // holds the lease; reads to the end, then appends a proof
	writing
)

const (
	// ackPatience is how long the batches in flight keep later decisions
	// waiting for a common batch; then they are published regardless.
	ackPatience = 20 * time.Millisecond
	// groupNormal and groupOutage are how long a decision may wait for others
	// while a batch is in flight.
	groupNormal = 5 * time.Millisecond
	groupOutage = 20 * time.Millisecond
	groupFull   = 80 * time.Millisecond
	outageAfter = 50 * time.Millisecond

	retryAfter   = 250 * time.Millisecond
	retrySoon    = 20 * time.Millisecond
	resendWindow = 64
	repeatBytes  = 1 << 20 // each retryAfter
	readTimeout  = time.Second
	pollIdle     = time.Second
	pollHeard    = 20 * time.Millisecond
	// lostAfter is how long the stream must have been seen to end before what
	// was stored in it: a new leader may need a moment to apply all it has.
	lostAfter = 5 * time.Second

	// unfencedAfter is how often the fence of a batch may fail before it is
	// appended without: somebody floods the log. What chains, and when a batch
	// counts, does not depend on the fence; it only saves appends in vain.
	unfencedAfter = 3
	// bulkBehind is how far behind what is stored reads go in pieces.
	bulkBehind = 16
	// floodFor is how long a flood is expected to go on.
	floodFor = 10 * time.Second

	// maxBatchSize leaves room in a frame for the batch's own fields.
	maxBatchSize = session.MaxFrameLen - 40<<10
	maxReqs      = session.MaxBatchEntries

	idsFor = 24 * time.Hour
	maxIDs = 1 << 20
)

// inflight is a batch that has been published and is not known to be stored.
type inflight struct {
	batch    *session.Batch
	hash     session.Hash
	key      session.KeyID
	token    string // of the answers to its appends
	frame    []byte
	set      *filter.Set
	reqs     []*request
	first    time.Time // published
	sent     time.Time // published last
	expected uint64    // the fence that it was sent with last
	stored   uint64    // the sequence that the store named
	failed   bool      // the store refused the last attempt
	warned   bool
	refused  int    // how often the fence did not hold against something new
	refusal  uint64 // pos at the last of those
}

// taken is where a decision is.
type taken struct {
	epoch, number uint64
	at            session.Instant
	own           *request // set until it is known to be stored
}

type waiter struct {
	number uint64
	done   chan struct{}
}

// writer is the state of one sequencer, owned by one goroutine. Nothing in it
// waits for I/O: requests go out, answers come back as events.
type writer struct {
	s *Sequencer
	chain
	epochs epochs
	role   role

	flight      []*inflight // oldest first, each chained on the one before
	flightBytes int
	repeated    int // which of flight was said again last
	pending     []*request
	pendingAt   time.Time // arrival of the oldest
	ids         map[session.DecisionID]taken
	taken       []decided // what ids holds of the log, oldest first
	takenIDs    int       // and how many that are
	waiters     []waiter
	redoing     int // decisions of orphaned batches that are still on their way
	away        int // decisions that were forwarded and have not ended

	// Reading the log.
	reading     bool
	again       bool
	token       uint64
	readAt      time.Time
	pollAt      time.Time
	heardAt     time.Time
	onEnd       func()
	ready       func() // once the log has been read for the first time
	loads       int    // how often it was read anew
	before      chain  // what was known before it was read anew
	takenBefore []decided
	gap         bool // positions of the log were missing before pos
	bulk        bool // reads in pieces, from any replica
	flooded     time.Time
	keySet      uint64 // version of the key set that was acted on
	doubt       bool   // a batch was skipped for its key alone
	stored      uint64 // the furthest sequence that is known to be stored
	asked       uint64 // key sets were fetched after everything up to here was stored
	lostFrom    time.Time
	made        time.Time // when the stream was made
	claims      []claim
	former      map[session.Hash]bool // the chain before a withdrawal cut it
	mine        map[session.Hash]bool // batches of this sequencer that the chain was cut before
	salvaged    []*request            // their decisions, and what else waits for the reload
	unstored    int                   // of those, in no stored batch
	fallen      [][]fallen            // to be rejected once the chain has passed them

	lease     bool
	proof     bool // the next batch is due even when empty
	draining  func()
	stopped   bool
	horizonAt time.Time
	expiry    horizon
	closing   bool
	beat      beat
}

func newWriter(s *Sequencer) *writer {
	return &writer{s: s, ids: map[session.DecisionID]taken{}, epochs: epochs{trust: s.trust}}
}

func (w *writer) run() {
	defer close(w.s.loop)
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for !w.stopped {
		select {
		case <-w.s.events.ready:
		case <-timer.C:
		}
		// Whatever arrives together shares the next batch.
		for _, f := range w.s.events.all() {
			if !w.stopped {
				f()
			}
		}
		if !w.stopped {
			timer.Reset(w.tick(time.Now()))
		}
	}
	w.s.events.close()
}

// tick does what is due and returns how long until something else will be.
func (w *writer) tick(now time.Time) time.Duration {
	next := time.Second
	due := func(at time.Time) bool {
		d := at.Sub(now)
		if d <= 0 {
			return true
		}
		next = min(next, d)
		return false
	}
	if w.role == loading {
		if w.reading && due(w.readAt.Add(readTimeout)) {
			w.bulk, w.stored = false, w.pos // it may be that only the leader answers
			w.read()
		}
		return next
	}
	if err := w.set.Err(); err != nil && w.s.halted() == nil {
		// Nothing more is derived from it, nor said: the published segments and
		// the log have it whole.
		w.s.log.Error("sequencer: the state is damaged", "err", err)
		w.reload()
		return next
	}
	if ks := w.s.trust.KeySet(); ks.Version != w.keySet {
		w.keySet = ks.Version
		w.keysChanged(ks)
	}
	if w.reading && due(w.readAt.Add(readTimeout)) {
		w.bulk, w.stored = false, w.pos
		w.read()
	}
	if !w.reading && due(w.pollAt) {
		w.examine()
	}
	if w.canAppend() {
		w.restateNext()
		w.advanceHorizon(now)
		for w.canAppend() && (len(w.pending) > 0 || w.proof) && due(w.flushAt(now)) {
			w.appendBatch(now)
		}
	}
	if w.writes() && len(w.flight) > 0 {
		f := w.flight[0]
		wait := retryAfter
		if f.failed && (!w.reading || f.refused >= unfencedAfter) {
			wait = retrySoon
		}
		if due(f.sent.Add(wait)) {
			w.publish(f, w.pos, now)
			w.repeat(now)
			due(f.sent.Add(retryAfter))
		}
	}
	w.tickBeat(now, due)
	w.sayFallen()
	w.forgetOld()
	w.s.pending.Store(int64(len(w.pending)))
	w.s.flight.Store(int64(len(w.flight)))
	w.s.position.Store(w.pos)
	if w.draining != nil && len(w.flight) == 0 && len(w.pending) == 0 {
		w.draining()
		w.draining = nil
	}
	return max(next, 100*time.Microsecond)
}

func (w *writer) setRole(r role) {
	w.role = r
	w.s.role.Store(uint32(r))
}

// writes reports whether batches may be published. A log that was rolled back
// takes the proof, which decides nothing: without a writer there are no
// heartbeats, and an enforcer that starts learns from them alone that this log
// ends before what it had.
func (w *writer) writes() bool {
	halted := w.s.halted()
	switch w.role {
	case writing:
		return halted == nil
	case proving:
		return halted == nil || errors.Is(halted, ErrRolledBack)
	default:
		return false
	}
}

// canAppend reports whether another batch may be made. A writer that has not
// proven itself makes the proof alone, so that what it cannot append is little.
func (w *writer) canAppend() bool {
	if !w.writes() || len(w.flight) >= maxFlight || w.flightBytes >= maxFlightBytes {
		return false
	}
	return w.role == writing || w.proof && len(w.flight) == 0 && !w.reading
}

// full reports whether what is pending fills a batch, so that there is nobody to
// wait for.
func (w *writer) full() bool {
	entries, size := 0, 0
	for _, r := range w.pending {
		entries, size = entries+len(r.d.Entries), size+r.size
		if entries >= session.MaxBatchEntries || size >= maxBatchSize {
			return true
		}
	}
	return false
}

// flushAt is when the pending decisions must go out.
func (w *writer) flushAt(now time.Time) time.Time {
	if len(w.flight) == 0 || w.proof || w.full() {
		return now
	}
	oldest := now.Sub(w.flight[0].first)
	wait := groupNormal
	switch {
	case oldest > outageAfter && len(w.flight) > maxFlight/2:
		wait = groupFull
	case oldest > outageAfter:
		wait = groupOutage
	case oldest > ackPatience:
		return now
	default:
		// Nothing says yet that the acknowledgement is late.
		if at := w.flight[0].first.Add(ackPatience); at.Before(w.pendingAt.Add(wait)) {
			return at
		}
	}
	return w.pendingAt.Add(wait)
}

// accept takes a decision in.
func (w *writer) accept(r *request) {
	if w.closing {
		r.finish(Result{}, ErrClosed)
		return
	}
	if t, ok := w.ids[r.d.ID]; ok {
		if t.own == r {
			return
		}
		r.markDuplicate()
		res := Result{Epoch: t.epoch, Number: t.number, At: t.at}
		if t.own == nil {
			res.Durable = true
			r.finish(res, nil)
			return
		}
		t.own.dups = append(t.own.dups, r)
		if t.number > 0 {
			r.announce(res)
		}
		return
	}
	switch {
	case w.s.halted() != nil:
		r.finish(Result{}, w.s.halted())
	case w.role != writing && w.role != proving:
		w.forward(r)
	case len(w.pending) >= maxPending:
		r.finish(Result{}, ErrBusy)
	default:
		w.queue(r)
	}
}

func (w *writer) queue(r *request) {
	r.arrived, r.number = time.Now(), 0
	if len(w.pending) == 0 {
		w.pendingAt = r.arrived
	}
	w.pending = append(w.pending, r)
	w.ids[r.d.ID] = taken{own: r}
}

// tip is what the next batch chains on.
func (w *writer) tip() (number uint64, head session.Hash, set *filter.Set, at, horizon session.Instant) {
	if n := len(w.flight); n > 0 {
		f := w.flight[n-1]
		return f.batch.Number, f.hash, f.set, f.batch.Time, f.batch.Horizon
	}
	return w.number, w.head, w.set, w.time, w.chain.horizon
}

// appendBatch makes a batch of what is pending, signs it, and publishes it.
func (w *writer) appendBatch(now time.Time) {
	key, may, err := w.s.signer()
	if err != nil {
		w.cannotSign(err)
		return
	}
	number, head, set, at, hz := w.tip()
	wall := w.wall()
	b := &session.Batch{
		Epoch: w.epoch, Number: number + 1, Prev: head, Time: max(wall, at),
		Horizon: max(hz, w.expiry.next),
	}
	reqs := w.pack(b, set, may)
	if slices.ContainsFunc(b.Entries, suspendsAll) {
		b.Time = max(b.Time, at+1)
	}
	b.Deadline = b.Time.Add(session.BatchTTL)
	if len(b.Decisions) == 0 && !w.proof {
		return
	}
	body, err := b.MarshalBody()
	var frame []byte
	if err == nil {
		frame, err = session.Seal(session.TypeBatch, body, key)
	}
	if err != nil {
		// Entries were validated one by one, so this is a defect: those that
		// are in it are refused, the others go on.
		w.s.log.Error("sequencer: a batch could not be made", "err", err)
		for _, r := range reqs {
			w.drop(r, fmt.Errorf("sequencer: %w", err))
		}
		return
	}
	parsed, err := session.ParseFrame(frame)
	if err != nil {
		w.cannotSign(err)
		return
	}
	f := &inflight{batch: b, hash: parsed.Hash(), key: parsed.Key, frame: frame, reqs: reqs, first: now, refusal: w.pos}
	// Numbers are used again after a deposition; a late answer must not be
	// taken for that of another batch.
	if now.Sub(w.flooded) < floodFor {
		f.refused = unfencedAfter
	}
	f.token = hex.EncodeToString(f.hash[:16])
	f.set = set.Apply(b, func(e *session.Entry) bool { return may.May(e.Key) })
	w.proof = false
	if h := w.s.o.Hooks.BeforeAppend; h != nil {
		h(b.Number)
	}
	w.flight = append(w.flight, f)
	w.flightBytes += len(frame)
	w.publish(f, w.pos+uint64(len(w.flight))-1, now)
	for _, r := range reqs {
		r.number = b.Number
		w.ids[r.d.ID] = taken{epoch: b.Epoch, number: b.Number, at: b.Time, own: r}
		res := Result{Epoch: b.Epoch, Number: b.Number, At: b.Time}
		r.announce(res)
		for _, d := range r.dups {
			d.announce(res)
		}
	}
}

// suspendsAll reports whether an entry suspends a tenant, or everything. Its time is
// after that of all that was decided before, so that a restore that lifts what it
// has seen, by its time, cannot mean this one: also where the clock stands still.
func suspendsAll(e session.Entry) bool {
	return e.Op == session.OpSet && e.Effect == session.EffectSuspended && e.Key.Shape <= session.Shape(session.KindTenant)
}

// pack moves what fits from pending into the batch. What the quotas do not
// allow is refused.
func (w *writer) pack(b *session.Batch, set *filter.Set, may *session.SigningKey) (reqs []*request) {
	size, n := 0, 0
	adds := newTally(set, w.s.o.Quota, w.s.o.MaxState)
	for ; n < len(w.pending); n++ {
		r := w.pending[n]
		if len(b.Entries)+len(r.d.Entries) > session.MaxBatchEntries || len(reqs) >= maxReqs || size+r.size > maxBatchSize {
			break
		}
		if r.ended() {
			continue // found in another writer's batch
		}
		if r.abandoned.Load() && !r.wasTold() {
			w.drop(r, ErrNoWriter)
			continue
		}
		if err := w.permit(r, adds, may); err != nil {
			w.drop(r, err)
			continue
		}
		size += r.size + 18
		b.Entries = append(b.Entries, r.d.Entries...)
		b.Decisions = append(b.Decisions, session.DecisionRef{ID: r.d.ID, Count: uint16(len(r.d.Entries))})
		reqs = append(reqs, r)
	}
	w.pending = slices.Delete(w.pending, 0, n)
	if len(w.pending) > 0 {
		w.pendingAt = w.pending[0].arrived
	}
	return reqs
}

func (w *writer) permit(r *request, adds *tally, may *session.SigningKey) error {
	for i := range r.d.Entries {
		if !may.May(r.d.Entries[i].Key) {
			return ErrUntrusted
		}
	}
	if r.internal {
		return nil
	}
	return adds.add(r.d.Entries)
}

// drop refuses a decision that is in no batch.
func (w *writer) drop(r *request, err error) {
	if w.ids[r.d.ID].own == r {
		delete(w.ids, r.d.ID)
	}
	w.end(r, Result{}, err)
}

// end finishes a request and all that were sent with the same ID meanwhile.
func (w *writer) end(r *request, res Result, err error) {
	r.finish(res, err)
	for _, d := range r.dups {
		d.finish(res, err)
	}
	r.dups = nil
}

// signer returns the key to sign with and what it may sign.
func (s *Sequencer) signer() (ed25519.PrivateKey, *session.SigningKey, error) {
	now := session.InstantOf(s.o.Hooks.Now())
	key, err := s.o.Keys.Signer(now)
	if err != nil {
		return nil, nil, fmt.Errorf("%w: %w", ErrNoKey, err)
	}
	ks := s.trust.KeySet()
	if len(key) != ed25519.PrivateKeySize || ks == nil || now >= ks.NotAfter {
		return nil, nil, ErrNoKey
	}
	pub := key.Public().(ed25519.PublicKey)
	for i := range ks.Keys {
		k := &ks.Keys[i]
		if k.Use == session.UseWriter && !k.Withdrawn && pub.Equal(k.Public) {
			return key, k, nil
		}
	}
	return nil, nil, ErrNoKey
}

// cannotSign refuses what is pending and gives the lease to somebody who can.
func (w *writer) cannotSign(err error) {
	w.s.log.Error("sequencer: cannot sign, so another authority must write", "err", err)
	for _, r := range w.pending {
		w.drop(r, err)
	}
	w.pending = nil
	w.proof = false
	if len(w.flight) == 0 {
		w.follow()
	}
}

func (w *writer) wall() session.Instant { return session.InstantOf(w.s.o.Hooks.Now()) }

// publish sends a batch on the log's subject: enforcers hear it there, and the
// stream stores it if its last sequence is expected.
func (w *writer) publish(f *inflight, expected uint64, now time.Time) {
	f.expected, f.sent, f.failed, f.stored = expected, now, false, 0
	m := &nats.Msg{
		Subject: natsfeed.LogSubject,
		Reply:   w.s.inbox + ".a." + f.token,
		Header:  nats.Header{jetstream.ExpectedStreamHeader: {natsfeed.LogStream}},
		Data:    f.frame,
	}
	if f.refused < unfencedAfter {
		m.Header[jetstream.ExpectedLastSeqHeader] = []string{strconv.FormatUint(expected, 10)}
	}
	if err := w.s.nc.PublishMsg(m); err != nil {
		f.failed = true
	}
}

// acknowledged takes the store's answer to an append.
func (w *writer) acknowledged(token string, a ack, now time.Time) {
	i := slices.IndexFunc(w.flight, func(f *inflight) bool { return f.token == token })
	if i < 0 {
		return
	}
	f := w.flight[i]
	switch {
	case a.seq > 0:
		// The first attempt's answer may arrive after the second was sent; both
		// name where the same bytes are.
		if a.seq > w.pos {
			f.stored = a.seq
			w.stored = max(w.stored, a.seq)
		}
		w.settle(now)
	case a.wrongLast && i == 0:
		f.failed = true
		if w.pos > f.refusal {
			f.refused, f.refusal = f.refused+1, w.pos
		}
		if f.refused >= unfencedAfter {
			w.flooded = now
		}
		w.examine()
	case a.wrongLast:
		f.failed = true
	default:
		f.failed = true
		if !f.warned {
			f.warned = true
			w.s.log.Warn("sequencer: the store refused a batch", "number", f.batch.Number, "code", a.code, "err", a.text)
		}
		f.sent = now.Add(retryAfter - retrySoon)
	}
}

// settle confirms from the oldest on what is stored right behind all that has
// been examined. A later one that is stored further on is not counted: what is
// between is not known, and may be what the chain goes through.
func (w *writer) settle(now time.Time) {
	confirmed := false
	for len(w.flight) > 0 && w.flight[0].stored == w.pos+1 {
		w.confirm()
		confirmed = true
	}
	if confirmed {
		w.resend(now)
		w.beat.soon()
	} else if len(w.flight) > 0 && w.flight[0].stored > w.pos+1 {
		w.examine()
	}
}

// confirm counts the oldest batch in flight as stored at pos+1.
func (w *writer) confirm() {
	f := w.flight[0]
	w.flight[0] = nil
	w.flight = w.flight[1:]
	w.flightBytes -= len(f.frame)
	w.pos++
	if h := w.s.o.Hooks.AfterAck; h != nil {
		h(f.batch.Number)
	}
	w.number, w.head, w.set, w.at = f.batch.Number, f.hash, f.set, w.pos
	w.signed(f.key, f.batch.Number)
	w.noteNews(f.batch)
	w.chain.time, w.chain.horizon = max(w.time, f.batch.Time), max(w.chain.horizon, f.batch.Horizon)
	w.s.hashes.put(link{epoch: f.batch.Epoch, number: f.batch.Number, hash: f.hash, key: f.key, own: true})
	w.beat.prove(f.first) // which of the attempts succeeded is not known
	w.publishView()       // whoever is told that it is stored finds it in State
	w.remember(f.batch)
	for _, r := range f.reqs {
		if r.d.ID == restateID(w.epoch, -1) {
			w.carry, w.headless = nil, false
		}
		w.end(r, Result{Epoch: f.batch.Epoch, Number: f.batch.Number, At: f.batch.Time, Durable: true}, nil)
	}
	if w.role == proving {
		w.prevail()
	}
}

// resend publishes again those behind the oldest whose last attempt can no
// longer be on its way.
func (w *writer) resend(now time.Time) {
	if !w.writes() {
		return
	}
	for i, f := range w.flight {
		if i >= resendWindow {
			return
		}
		want := w.pos + uint64(i)
		if f.stored == 0 && (f.failed || f.expected != want || now.Sub(f.sent) >= retryAfter) {
			w.publish(f, want, now)
		}
	}
}

// repeat says again what is in flight behind the oldest, a part at a time, while
// the store does not answer. An enforcer that was changing servers when it was
// said hears it then, and not only once it is stored.
func (w *writer) repeat(now time.Time) {
	behind := len(w.flight) - 1
	if now.Sub(w.flight[0].first) < retryAfter {
		return
	}
	for size, n := 0, 0; size < repeatBytes && n < behind; n++ {
		w.repeated = w.repeated%behind + 1
		if f := w.flight[w.repeated]; f.stored == 0 {
			w.publish(f, w.pos+uint64(w.repeated), now)
			size += len(f.frame)
		}
	}
}

// remember keeps where the decisions of a batch are, so that none is taken twice.
func (w *writer) remember(b *session.Batch) {
	if len(b.Decisions) == 0 {
		return
	}
	d := decided{epoch: b.Epoch, number: b.Number, at: b.Time, ids: make([]session.DecisionID, len(b.Decisions))}
	for i := range b.Decisions {
		d.ids[i] = b.Decisions[i].ID
	}
	w.note(d)
}

// note is remember for a batch that is known already.
func (w *writer) note(d decided) {
	for _, id := range d.ids {
		w.ids[id] = taken{epoch: d.epoch, number: d.number, at: d.at}
	}
	w.taken = append(w.taken, d)
	w.takenIDs += len(d.ids)
}

// forgetOld forgets decisions that are older than idsFor, and the oldest beyond
// maxIDs. What was decided is never changed in place: a snapshot may hold it.
func (w *writer) forgetOld() {
	limit := w.wall().Add(-idsFor)
	for len(w.taken) > 0 && (w.taken[0].at < limit || w.takenIDs-len(w.taken[0].ids) >= maxIDs) {
		d := &w.taken[0]
		for _, id := range d.ids {
			if t := w.ids[id]; t.own == nil && t.epoch == d.epoch && t.number == d.number {
				delete(w.ids, id)
			}
		}
		w.takenIDs -= len(d.ids)
		w.taken = w.taken[1:]
	}
}

// publishView lets readers see what is stored.
func (w *writer) publishView() {
	set := w.set
	if set == nil {
		set = &filter.Set{}
	}
	w.s.view.Store(&view{epoch: w.epoch, number: w.number, news: w.news, head: w.head, set: set})
	w.wakeWaiters()
}

func (w *writer) wakeWaiters() {
	if w.redoing > 0 {
		return
	}
	w.waiters = slices.DeleteFunc(w.waiters, func(x waiter) bool {
		if x.number > w.number {
			return false
		}
		close(x.done)
		return true
	})
}

func (w *writer) await(number uint64, done chan struct{}) {
	w.waiters = append(w.waiters, waiter{number, done})
	w.wakeWaiters()
}

func (w *writer) forget(done chan struct{}) {
	w.waiters = slices.DeleteFunc(w.waiters, func(x waiter) bool { return x.done == done })
}

// elected is called when the lease is held.
func (w *writer) elected(proven time.Time) {
	w.lease = true
	if w.role != following || w.closing {
		return
	}
	w.beat.prove(proven)
	w.setRole(proving)
	w.onEnd = func() {
		if ks := w.s.trust.KeySet(); ks.Epoch > w.epoch {
			w.begin(ks.Epoch, ks.Origin(w.s.trust.Root()))
			w.publishView()
		}
		w.proof = true
	}
	w.examine()
}

// prevail is called when the proof is stored: from here on this is the writer.
func (w *writer) prevail() {
	w.beat.begin(w.s)
	w.setRole(writing)
	w.s.log.Info("sequencer: writing the log", "epoch", w.epoch, "number", w.number)
}

// unelected is called when another holds the lease.
func (w *writer) unelected() {
	w.lease = false
	if w.role == writing || w.role == proving {
		w.depose()
	}
}

// depose stops writing. What is in flight or pending goes to the new writer;
// whatever of it was published is then rejected.
func (w *writer) depose() {
	if w.role == writing {
		w.s.deposed.Add(1)
		w.s.log.Warn("sequencer: deposed", "number", w.number, "in flight", len(w.flight))
	}
	orphans, pending := w.flight, w.pending
	w.flight, w.flightBytes, w.pending = nil, 0, nil
	w.follow()
	again := w.orphan(orphans)
	for _, r := range pending {
		w.release(r)
		again = append(again, r)
	}
	w.reroute(again)
	w.s.checkLease()
}

func (w *writer) follow() {
	w.beat.stop()
	w.proof = false
	w.onEnd = nil
	w.setRole(following)
}

func (w *writer) release(r *request) {
	if w.ids[r.d.ID].own == r {
		delete(w.ids, r.d.ID)
	}
}

// reroute sends decisions on their way again, in their order, under their IDs.
func (w *writer) reroute(rs []*request) {
	var away []*request
	for _, r := range rs {
		r.retry()
		dups := r.dups
		r.dups = nil
		w.redoing++
		r.then(func() {
			res, err := r.outcome()
			for _, d := range dups {
				d.finish(res, err)
			}
			w.s.post(func() {
				w.redoing--
				w.wakeWaiters()
			})
		})
		switch {
		case r.internal:
			r.finish(Result{}, ErrClosed) // made anew by whoever writes
		case w.role == writing || w.role == proving || w.closing:
			w.accept(r)
		default:
			away = append(away, r)
		}
	}
	if len(away) > 0 {
		w.forward(away...)
	}
}

// orphan deals with batches that were published and are given up, and returns
// what has to be decided again. Their rejection is said only when that has been
// done, and they are known not to be in the chain: until then enforcers keep to
// them.
func (w *writer) orphan(batches []*inflight) (again []*request) {
	if len(batches) == 0 {
		return nil
	}
	group := make([]fallen, len(batches))
	left := 1
	settled := func(err error) {
		if err != nil {
			left = -1 << 30 // never: a decision's fate is not known
		}
		if left--; left == 0 {
			w.fallen = append(w.fallen, group)
			w.sayFallen()
		}
	}
	for i, f := range batches {
		group[i] = fallen{session.Rejection{Epoch: f.batch.Epoch, Number: f.batch.Number, Batch: f.hash}, f.key, f.batch.Deadline}
		for _, r := range f.reqs {
			w.release(r)
			if !r.internal {
				left++
				r.then(func() {
					_, err := r.outcome()
					w.s.post(func() { settled(err) })
				})
			}
			again = append(again, r)
		}
	}
	settled(nil)
	return again
}

// fallen is a batch that was given up.
type fallen struct {
	session.Rejection
	key      session.KeyID
	deadline session.Instant
}

// sayFallen rejects what has turned out not to be in the chain. Of a batch whose
// acknowledgement never came that is not known before its place is taken: the
// store may have it.
func (w *writer) sayFallen() {
	if w.role == loading || len(w.fallen) == 0 {
		return
	}
	now := w.wall()
	var last map[session.KeyID]uint64
	if ks := w.s.trust.KeySet(); ks.Epoch == w.epoch {
		last = trustedUpTo(ks)
	}
	w.fallen = slices.DeleteFunc(w.fallen, func(group []fallen) bool {
		for len(group) > 0 && now < group[0].deadline {
			x := &group[0]
			l, known := w.s.hashes.at(x.Epoch, x.Number)
			switch {
			case x.Epoch == w.epoch && x.Number <= w.number && (!known || l.hash == x.Batch):
				group = group[1:] // it counts, or is too long ago to tell
				continue
			case x.Epoch < w.epoch, x.Number <= w.number, last != nil && x.Number > last[x.key]:
			default:
				return false
			}
			// Each is chained on the one before.
			for i := range group {
				w.reject(&group[i].Rejection)
			}
			return true
		}
		return true // past its deadline it falls away by itself
	})
}

func (w *writer) reject(x *session.Rejection) {
	key, _, err := w.s.signer()
	if err != nil {
		return
	}
	if frame, err := session.Seal(session.TypeRejection, x.MarshalBody(), key); err == nil {
		_ = w.s.nc.Publish(natsfeed.BeatSubject, frame) // unheard, it falls away by its deadline
	}
}

// drain calls done when everything that was accepted is stored.
func (w *writer) drain(done func()) {
	w.closing = true
	w.draining = done
	if w.role != writing {
		w.draining = nil
		done()
	}
}

// quit ends this run as a writer. No goroutine is started after it.
func (w *writer) quit() {
	w.closing = true
	w.s.cancel()
	w.follow()
}

// spawn starts a goroutine that Close joins, unless it is closing.
func (w *writer) spawn(f func()) bool {
	if w.s.ctx.Err() != nil {
		return false
	}
	w.s.wg.Go(f)
	return true
}

// stop ends the writer's goroutine.
func (w *writer) stop() {
	w.stopped = true
	w.beat.stop()
	for _, f := range w.flight {
		for _, r := range f.reqs {
			w.end(r, Result{}, ErrClosed)
		}
	}
	for _, r := range w.pending {
		w.end(r, Result{}, ErrClosed)
	}
	w.setRole(following)
}

// tally counts what a batch would add to the state.
type tally struct {
	set   *filter.Set
	quota func(session.TenantID) int
	max   int
	fresh map[slot]struct{}
	per   map[session.TenantID]int
}

type slot struct {
	key    session.Key
	effect session.Effect
	drill  bool
}

func newTally(set *filter.Set, quota func(session.TenantID) int, limit int) *tally {
	return &tally{set: set, quota: quota, max: limit, per: map[session.TenantID]int{}}
}

// add counts the entries of one decision, or none of them.
func (t *tally) add(entries []session.Entry) error {
	mine := make([]slot, 0, len(entries))
	if len(t.fresh) == 0 {
		t.fresh = make(map[slot]struct{}, len(entries))
	}
	per := map[session.TenantID]int{}
	for i := range entries {
		e := &entries[i]
		s := slot{e.Key, e.Effect, e.Drill}
		// Wide kills have a reserve: they are few, and must always be possible.
		// The fabric's own books have none: the root has counted what is in them.
		if e.Op != session.OpSet || e.Key.Shape <= session.Shape(session.KindTenant) || e.Key.Tenant == session.FabricTenant {
			continue
		}
		if _, ok := t.fresh[s]; ok || slices.ContainsFunc(t.set.Lookup(e.Key), func(r session.Record) bool {
			return r.Effect == e.Effect && r.Drill == e.Drill
		}) {
			continue
		}
		t.fresh[s] = struct{}{}
		mine = append(mine, s)
		per[e.Key.Tenant]++
	}
	refuse := t.set.Len()+len(t.fresh) > t.max && len(mine) > 0
	for id, n := range per {
		refuse = refuse || t.set.TenantLen(id)+t.per[id]+n > t.quota(id)
	}
	if refuse {
		for _, s := range mine {
			delete(t.fresh, s)
		}
		return ErrQuota
	}
	for id, n := range per {
		t.per[id] += n
	}
	return nil
}

// newWriterID names one run of a writer.
func newWriterID() (id session.WriterID) {
	_, _ = rand.Read(id[:]) // crypto/rand never fails
	return id
}
