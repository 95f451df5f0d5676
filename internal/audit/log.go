package audit

import (
	"bytes"
	"context"
	"crypto/ecdh"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/interlock-fabric/interlock/pkg/authority"
	"github.com/interlock-fabric/interlock/pkg/natsfeed"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// Bounds and times.
const (
	// maxWaiting and maxWaitingBytes bound the records that wait for the store.
	maxWaiting      = 8192
	maxWaitingBytes = 64 << 20
	// maxBatch and maxBatchBytes bound the records that are stored together.
	maxBatch      = 512
	maxBatchBytes = 384 << 10
	// askTimeout bounds each question to the store: an answer that was with a
	// server when it died never comes.
	askTimeout = 3 * time.Second
	// retryEvery is the pause after a failure.
	retryEvery = 200 * time.Millisecond
	// closeTimeout bounds what Close waits for the store.
	closeTimeout = 4 * time.Second

	// DefaultKeepFor and DefaultKeepBytes are how long records are kept, and how
	// many bytes of them.
	DefaultKeepFor   = 400 * 24 * time.Hour
	DefaultKeepBytes = 16 << 30
	trimEvery        = time.Hour
	// headEvery is how often HeadFile is written when there is something new.
	headEvery = time.Second
)

var (
	// ErrBusy: too many records wait for the store. This one was not taken.
	ErrBusy = errors.New("audit: too many records are waiting for the store")
	// ErrClosed: the log has been closed, and whether the record is stored is not
	// known.
	ErrClosed = errors.New("audit: closed")
	// ErrNoKey: there is no key to seal records to, or none to sign with.
	ErrNoKey = errors.New("audit: no key: session-authority keys rotate, session-authority keys rotate --audit")
)

// Options configures Open. JetStream, Trust, Signer and Sealing are required.
type Options struct {
	JetStream jetstream.JetStream
	// Trust has the key set, Signer the key to sign with now, Sealing the private
	// halves of the sealing keys, without which nothing can be read.
	Trust   *session.Trust
	Signer  func(now session.Instant) (ed25519.PrivateKey, error)
	Sealing func(session.KeyID) (*ecdh.PrivateKey, bool)
	// Frame returns the key set as the root signed it, for exports.
	Frame func() []byte
	// Head returns the newest decision of the log that is known; nil is none.
	Head func() (epoch, number uint64)
	// Authority names this run in records.
	Authority string
	// Reports is where the stream of reports ends. One that ends before what the
	// audit has of it was made anew, and is audited from its beginning.
	Reports uint64
	// HeadFile keeps where the chain was, so that a stream that was rolled back or
	// lost is noticed at the next start; empty keeps it nowhere.
	HeadFile string
	// KeepFor and KeepBytes bound what is kept; 0 is the default.
	KeepFor   time.Duration
	KeepBytes uint64
	Logger    *slog.Logger

	// publish, of tests, stands between the log and the store.
	publish func(func() (uint64, error)) (uint64, error)
}

// Log is one authority's part in the audit. Its methods may be called
// concurrently. It must be made by Open.
type Log struct {
	o      Options
	log    *slog.Logger
	ctx    context.Context // ends when Close stops waiting for the store
	cancel context.CancelFunc
	done   sync.WaitGroup
	once   sync.Once
	wake   chan struct{}

	// mu is held by nobody who waits for the store.
	mu      sync.Mutex
	queue   []*item
	bytes   int
	closing bool
	at      place
	failing error
	since   time.Time // of failing
	strays  uint64
	missed  uint64 // records that were not taken
	found   uint64 // the newest record at the start
	lost    uint64 // how many records the stream lacked at the start
	kept    uint64 // the record that HeadFile has; of tend
	walked  Place
	seen    seen
}

// item is a record that waits for the store.
type item struct {
	body     []byte
	more     [][]byte              // bodies that are stored together with it
	report   uint64                // its place in the stream of reports
	recovers Place                 // of the decision, if it is that of another run
	decision string                // that it is the record of
	record   authority.AuditRecord // of it
	floor    *floor
	done     chan struct{}
	err      error
}

// size is what its bodies take in a batch.
func (it *item) size() int {
	n := len(it.body) + 1
	for _, b := range it.more {
		n += len(b) + 1
	}
	return n
}

// floor is where what is kept shall begin.
type floor struct {
	number uint64
	below  sum
	seq    uint64 // of the stream
}

// place is the end of the chain.
type place struct {
	seq  uint64 // of the last message of the stream, part of the chain or not
	last uint64 // of the last one that is part of it
	statement
	// trusted is the newest decision named by a key that is not withdrawn.
	epoch, number uint64
}

// Status is a snapshot for operators.
type Status struct {
	// Number and Hash are of the newest record that is known to be stored, Floor
	// the number of the oldest that is kept.
	Number, Floor uint64
	Hash          session.Hash
	// Waiting records are not known to be stored yet.
	Waiting int
	// Failing is why the store does not take records, and since when; nil is the
	// usual case.
	Failing error
	Since   time.Time
	// Strays counts messages in the stream that are not part of the chain, and
	// Missed records that were not taken, for want of room or of a key.
	Strays, Missed uint64
	// Lost is how many records this authority knew to be stored, and did not find
	// at its start.
	Lost uint64
}

// Open finds the end of the chain and returns when records can be appended. The
// stream must exist. ctx bounds the opening alone.
func Open(ctx context.Context, o Options) (*Log, error) {
	if o.JetStream == nil || o.Trust == nil || o.Signer == nil || o.Sealing == nil {
		return nil, errors.New("audit: options without stream or keys")
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.KeepFor <= 0 {
		o.KeepFor = DefaultKeepFor
	}
	if o.KeepBytes == 0 {
		o.KeepBytes = DefaultKeepBytes
	}
	l := &Log{o: o, log: o.Logger, wake: make(chan struct{}, 1)}
	at, err := l.findEnd(ctx)
	if err != nil {
		return nil, err
	}
	if at.Reports > o.Reports {
		at.Reports = 0
	}
	l.at = l.remember(at)
	l.ctx, l.cancel = context.WithCancel(context.WithoutCancel(ctx))
	if l.lost > 0 {
		l.Note(authority.AuditRecord{
			Kind: authority.AuditRetention, Action: "lose", Outcome: authority.OutcomeUnknown, Count: l.lost,
			Principal: authority.AuditPrincipal{Means: "authority"},
			Detail:    fmt.Sprintf("records %d to %d were stored, and are not there any more: the stream was rolled back, or made anew", l.found+1, l.found+l.lost),
		})
	}
	l.done.Go(l.run)
	l.done.Go(l.tend)
	return l, nil
}

// Close stores what waits, for a few seconds at most, and stops. It is
// idempotent.
func (l *Log) Close() error {
	l.once.Do(func() {
		l.mu.Lock()
		l.closing = true
		l.mu.Unlock()
		l.nudge()
		timer := time.AfterFunc(closeTimeout, l.cancel)
		defer timer.Stop()
		l.done.Wait()
		l.cancel()
		l.keepHead()
	})
	l.done.Wait()
	return nil
}

// Status never waits for the store.
func (l *Log) Status() Status {
	l.mu.Lock()
	defer l.mu.Unlock()
	return Status{
		Number: l.at.Number, Floor: max(l.at.Floor, 1), Hash: session.Hash(l.at.Hash), Waiting: len(l.queue),
		Failing: l.failing, Since: l.since, Strays: l.strays, Missed: l.missed, Lost: l.lost,
	}
}

// Append records r and returns when that is durable. When ctx ends first the
// record goes on waiting for the store, and its error is ctx's. Other errors wrap
// ErrBusy, ErrTooLong, ErrNoKey or ErrClosed; but for the last, the record was
// not taken.
func (l *Log) Append(ctx context.Context, r authority.AuditRecord) error {
	it, err := l.enqueueItem(r, &item{})
	if err != nil {
		return err
	}
	select {
	case <-it.done:
		return it.err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Note records r without waiting for the store. What is not taken is counted and
// logged.
func (l *Log) Note(r authority.AuditRecord) {
	_, _ = l.enqueueItem(r, &item{}) // counted
}

// NoteReport records what the stream of reports has at seq, in one record or in
// several that are stored together, unless another authority has done so. Reports
// must be noted in their order.
func (l *Log) NoteReport(seq uint64, r authority.AuditRecord, more ...authority.AuditRecord) {
	if l.Reported(seq) {
		return
	}
	it := &item{report: seq}
	for _, r := range more {
		r.Authority = l.o.Authority
		if b, err := encode(r); err == nil { // else it is counted with the first
			it.more = append(it.more, b)
		}
	}
	_, _ = l.enqueueItem(r, it) // counted
}

// Reported says whether what the stream of reports has at seq is known to be in
// the audit.
func (l *Log) Reported(seq uint64) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return seq <= l.at.Reports
}

func (l *Log) enqueueItem(r authority.AuditRecord, it *item) (*item, error) {
	r.Authority = l.o.Authority
	var err error
	it.body, err = encode(r)
	if it.decision, it.done = decisionOf(&r), make(chan struct{}); it.decision != "" {
		it.record = r
	}
	if err == nil {
		err = l.add(it)
	}
	if err != nil {
		l.mu.Lock()
		l.missed++
		l.mu.Unlock()
		l.log.Error("a record is missing from the audit", "kind", r.Kind, "action", r.Action, "error", err)
		return nil, err
	}
	return it, nil
}

func (l *Log) add(it *item) error {
	// Asked before anything is promised: what cannot be sealed would wait for ever.
	if _, _, err := l.keys(); err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.closing:
		return ErrClosed
	case len(l.queue) >= maxWaiting || l.bytes+it.size() > maxWaitingBytes:
		return ErrBusy
	}
	l.queue = append(l.queue, it)
	l.bytes += it.size()
	l.nudge()
	return nil
}

func (l *Log) keys() (to []byte, signer ed25519.PrivateKey, err error) {
	ks := l.o.Trust.KeySet()
	if ks == nil {
		return nil, nil, ErrNoKey
	}
	to, ok := ks.AuditKey()
	if !ok {
		return nil, nil, ErrNoKey
	}
	if signer, err = l.o.Signer(session.InstantOf(time.Now())); err != nil {
		return nil, nil, fmt.Errorf("%w: %w", ErrNoKey, err)
	}
	return to, signer, nil
}

func (l *Log) nudge() {
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// run owns the end of the chain.
func (l *Log) run() {
	defer l.stop()
	for {
		batch, closing := l.next()
		switch {
		case len(batch) > 0:
			l.store(batch)
			if l.ctx.Err() != nil {
				return
			}
		case closing:
			l.cancel()
			return
		default:
			select {
			case <-l.wake:
			case <-l.ctx.Done():
				return
			}
		}
	}
}

// stop tells whoever still waits.
func (l *Log) stop() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closing = true
	for _, it := range l.queue {
		it.err = ErrClosed
		close(it.done)
	}
	l.queue = nil
}

// next returns the oldest items that fit a batch. They stay in the queue until
// they are stored.
func (l *Log) next() (batch []*item, closing bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	size := 0
	for _, it := range l.queue {
		if len(batch) == maxBatch || len(batch) > 0 && size+it.size() > maxBatchBytes {
			break
		}
		size += it.size()
		batch = append(batch, it)
	}
	return batch, l.closing
}

// finish takes items off the queue, of which they are the oldest.
func (l *Log) finish(items []*item) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.queue = append(l.queue[:0:0], l.queue[len(items):]...)
	for _, it := range items {
		l.bytes -= it.size()
		l.seen.add(it.decision)
		close(it.done)
	}
}

// store appends items and returns when they are durable, or l.ctx has ended.
func (l *Log) store(items []*item) {
	// An attempt without an answer may be stored yet: while nothing else is, it
	// is sent again as it was, so that it is known for what it is.
	var sent []byte
	var st *statement
	var seq uint64 // behind which sent is to be
	for l.ctx.Err() == nil {
		var err error
		if behind := l.end(); sent == nil || behind != seq {
			if sent, st, err = l.build(items); err == nil && sent == nil { // all of it is there already
				l.finish(items)
				return
			}
			seq = behind
		}
		if err == nil {
			at, failed := l.publish(sent, seq)
			if err = failed; err == nil {
				l.advance(at, st, true)
				l.failed(nil)
				l.finish(items)
				return
			}
		}
		if !conflict(err) {
			l.failed(err)
			l.rest()
		}
		mine, err := l.readOn(sent)
		if err != nil {
			l.failed(err)
			l.rest()
			continue
		}
		if mine {
			l.failed(nil)
			l.finish(items)
			return
		}
	}
}

func (l *Log) rest() {
	timer := time.NewTimer(retryEvery)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-l.ctx.Done():
	}
}

func (l *Log) failed(err error) {
	l.mu.Lock()
	was := l.failing
	if l.failing = err; was == nil {
		l.since = time.Now()
	}
	l.mu.Unlock()
	if err != nil && was == nil && l.ctx.Err() == nil {
		l.log.Warn("the audit cannot be written; its records wait", "error", err)
	}
}

// build chains items to the end of the chain. A nil message has nothing new.
func (l *Log) build(items []*item) ([]byte, *statement, error) {
	to, signer, err := l.keys()
	if err != nil {
		return nil, nil, err
	}
	l.mu.Lock()
	at, walked := l.at, l.walked
	done := make([]bool, len(items))
	here := map[string]bool{}
	for i, it := range items {
		known := l.seen.has(it.decision) || here[it.decision]
		if it.decision != "" {
			here[it.decision] = true
		}
		switch {
		case !known:
		case it.recovers != Place{}:
			done[i] = true
		default:
			// It was recovered from the log meanwhile: this one says who asked, and
			// is not its record any more.
			it.record.Duplicate, it.decision = true, ""
			body, err := encode(it.record)
			if err != nil {
				l.mu.Unlock()
				return nil, nil, err
			}
			l.bytes += len(body) - len(it.body)
			it.body = body
		}
	}
	l.mu.Unlock()
	st := &statement{
		For: forBatch, First: at.Number + 1, Prev: at.Hash, Number: at.Number, Hash: at.Hash, Time: session.InstantOf(time.Now()),
		Floor: max(at.Floor, 1), Below: at.Below, Reports: at.Reports, KeySet: l.o.Trust.KeySet().Version,
		Walked: at.Walked,
	}
	if l.o.Head != nil {
		st.Epoch, st.Log = l.o.Head()
	}
	if st.Epoch < at.Epoch || st.Epoch == at.Epoch && st.Log < at.Log {
		st.Epoch, st.Log = at.Epoch, at.Log
	}
	if walked.after(st.Walked) {
		st.Walked = walked
	}
	var bodies [][]byte
	for i, it := range items {
		switch {
		case done[i]:
			continue // it has its record meanwhile
		case it.report != 0 && it.report <= at.Reports:
			continue // another authority's, or an earlier run's
		case it.floor != nil && it.floor.number <= st.Floor:
			continue
		case it.floor != nil:
			st.Floor, st.Below = it.floor.number, it.floor.below
		}
		st.Reports = max(st.Reports, it.report)
		if p := it.recovers; p != (Place{}) {
			p.Part++
			st.Walked = p
		}
		for _, body := range append([][]byte{it.body}, it.more...) {
			st.Number++
			st.Hash = sum(link(st.Number, session.Hash(st.Hash), sha256.Sum256(body)))
			bodies = append(bodies, body)
		}
	}
	if len(bodies) == 0 {
		return nil, nil, nil
	}
	msg, err := seal(st, bodies, to, signer)
	return msg, st, err
}

// end returns where the stream ends, as far as is known here.
func (l *Log) end() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.at.seq
}

func (l *Log) publish(msg []byte, expected uint64) (uint64, error) {
	publish := func() (uint64, error) {
		ctx, cancel := context.WithTimeout(l.ctx, askTimeout)
		defer cancel()
		ack, err := l.o.JetStream.Publish(ctx, natsfeed.AuditSubject, msg,
			jetstream.WithExpectStream(natsfeed.AuditStream), jetstream.WithExpectLastSequence(expected), jetstream.WithRetryAttempts(0))
		if err != nil {
			return 0, fmt.Errorf("audit: %w", err)
		}
		return ack.Sequence, nil
	}
	if l.o.publish != nil {
		return l.o.publish(publish)
	}
	return publish()
}

func conflict(err error) bool {
	var api *jetstream.APIError
	return errors.As(err, &api) && (api.ErrorCode == jetstream.JSErrCodeStreamWrongLastSequence ||
		api.ErrorCode == jetstream.JSErrCodeStreamWrongLastSequenceConstant)
}

// advance takes a batch at seq for the end of the chain.
func (l *Log) advance(seq uint64, st *statement, trusted bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.at = l.at.onto(seq, st, trusted)
}

func (p place) onto(seq uint64, st *statement, trusted bool) place {
	next := place{seq: seq, last: seq, statement: *st, epoch: p.epoch, number: p.number}
	if trusted {
		next.epoch, next.number = st.Epoch, st.Log
	}
	return next
}

// takes reports whether a batch goes on from p. One by a key that is withdrawn
// does only as long as no key that is not has spoken of what comes after its
// last: until then it may be honest.
func (p *place) takes(b *batch) bool {
	if b.First != p.Number+1 || b.Prev != p.Hash || b.Floor < p.Floor {
		return false
	}
	k := b.key
	return !k.Withdrawn || p.epoch < k.LastEpoch || p.epoch == k.LastEpoch && p.number <= k.LastNumber
}

// readOn reads what was stored behind the end of the chain that is known here.
// It reports whether one of that is sent.
func (l *Log) readOn(sent []byte) (mine bool, err error) {
	s, state, err := l.stream(l.ctx)
	if err != nil {
		return false, err
	}
	l.mu.Lock()
	at := l.at
	l.mu.Unlock()
	if state.LastSeq < at.seq {
		return false, fmt.Errorf("audit: the stream ends at %d, before %d: it was restored from a backup or made anew: start the authority again", state.LastSeq, at.seq)
	}
	ks := l.o.Trust.KeySet()
	strays := uint64(0)
	for at.seq < state.LastSeq && l.ctx.Err() == nil {
		m, err := get(l.ctx, s, at.seq+1)
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			at.seq = state.LastSeq // purged meanwhile
			break
		}
		if err != nil {
			return mine, err
		}
		b, err := parse(m.Data, ks)
		if err == nil && !at.takes(b) {
			err = errStray
		}
		if err != nil {
			at.seq = m.Sequence
			strays++
			l.log.Warn("a message in the audit's stream is not part of the chain", "at", m.Sequence, "error", err)
			continue
		}
		at = at.onto(m.Sequence, &b.statement, !b.key.Withdrawn)
		if bytes.Equal(m.Data, sent) {
			mine = true
		} else {
			l.note(b)
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.at = at
	l.strays += strays
	return mine, l.ctx.Err()
}

func (l *Log) stream(ctx context.Context) (jetstream.Stream, jetstream.StreamState, error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	s, err := l.o.JetStream.Stream(ctx, natsfeed.AuditStream)
	if err != nil {
		return nil, jetstream.StreamState{}, fmt.Errorf("audit: %w", err)
	}
	return s, s.CachedInfo().State, nil
}

// get returns the first message from seq on.
func get(ctx context.Context, s jetstream.Stream, seq uint64) (*jetstream.RawStreamMsg, error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	m, err := s.GetMsg(ctx, seq, jetstream.WithGetMsgSubject(natsfeed.AuditSubject))
	if err != nil && !errors.Is(err, jetstream.ErrMsgNotFound) {
		err = fmt.Errorf("audit: %w", err)
	}
	return m, err
}

// findEnd finds the last message that is part of the chain. Going back from the
// end it takes the first that a trusted key signed: with the fence, only that
// goes on from what is before it, and verify proves it.
func (l *Log) findEnd(ctx context.Context) (place, error) {
	s, state, err := l.stream(ctx)
	if err != nil {
		return place{}, err
	}
	at := place{seq: state.LastSeq}
	at.Floor = 1
	ks := l.o.Trust.KeySet()
	var tail *place // of a withdrawn key
	for seq := state.LastSeq; seq >= state.FirstSeq && seq > 0; seq-- {
		m, err := get(ctx, s, seq)
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			continue
		}
		if err != nil {
			return place{}, err
		}
		b, err := parse(m.Data, ks)
		if err != nil {
			l.strays++
			continue
		}
		p := at.onto(m.Sequence, &b.statement, !b.key.Withdrawn)
		p.seq = state.LastSeq
		if !b.key.Withdrawn {
			return l.follow(ctx, s, p, state.LastSeq, ks)
		}
		tail = &p // the oldest of them so far
	}
	if tail != nil {
		return l.follow(ctx, s, *tail, state.LastSeq, ks)
	}
	return at, nil
}

// follow goes on from p, over what a withdrawn key signed, to the end.
func (l *Log) follow(ctx context.Context, s jetstream.Stream, p place, last uint64, ks *session.KeySet) (place, error) {
	for seq := p.last + 1; seq <= last; seq++ {
		m, err := get(ctx, s, seq)
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			break
		}
		if err != nil {
			return p, err
		}
		seq = m.Sequence
		if b, err := parse(m.Data, ks); err == nil && p.takes(b) {
			p = p.onto(seq, &b.statement, !b.key.Withdrawn)
		}
	}
	p.seq = last
	return p, nil
}

// headFile is what HeadFile has.
type headFile struct {
	Number uint64 `json:"number"`
	Hash   sum    `json:"hash"`
}

// remember holds what was found in the stream against what was there before. On
// an empty stream the chain goes on from there, so that no number is given twice.
func (l *Log) remember(at place) place {
	l.found = at.Number
	if l.o.HeadFile == "" {
		return at
	}
	b, err := os.ReadFile(l.o.HeadFile)
	if errors.Is(err, fs.ErrNotExist) {
		return at
	}
	var was headFile
	if err == nil {
		err = json.Unmarshal(b, &was)
	}
	if err != nil {
		// An authority that does not start for it would be the worse harm.
		l.log.Error("where the audit was is not known: records that were lost since are not noticed", "file", l.o.HeadFile, "error", err)
		return at
	}
	l.kept = was.Number
	if was.Number <= at.Number {
		return at
	}
	l.lost = was.Number - at.Number
	l.log.Error("the audit lacks records that were stored: its stream was rolled back, or made anew", "have", at.Number, "had", was.Number)
	if at.Number == 0 {
		at.Number, at.Hash, at.Floor, at.Below = was.Number, was.Hash, was.Number+1, was.Hash
	}
	return at
}

// keepHead writes HeadFile, if there is something new.
func (l *Log) keepHead() {
	l.mu.Lock()
	now := headFile{l.at.Number, l.at.Hash}
	l.mu.Unlock()
	if l.o.HeadFile == "" || now.Number == l.kept {
		return
	}
	b, err := marshal(now)
	if err == nil {
		err = os.WriteFile(l.o.HeadFile+".new", append(b, '\n'), 0o600)
	}
	if err == nil {
		err = os.Rename(l.o.HeadFile+".new", l.o.HeadFile)
	}
	if err != nil {
		l.log.Warn("where the audit is was not written down", "error", err)
		return
	}
	l.kept = now.Number
}

// tend writes down where the chain is, and removes what is past its keeping.
func (l *Log) tend() {
	tick, head := time.NewTicker(trimEvery), time.NewTicker(headEvery)
	defer tick.Stop()
	defer head.Stop()
	for {
		if err := l.trim(l.ctx); err != nil && l.ctx.Err() == nil {
			l.log.Warn("the audit was not trimmed", "error", err)
		}
		for again := true; again; {
			select {
			case <-l.ctx.Done():
				return
			case <-head.C:
				l.keepHead()
			case <-tick.C:
				again = false
			}
		}
	}
}

// trimAtOnce bounds how many batches one trimming looks at.
const trimAtOnce = 10_000

// trim finds the oldest batch to keep, says in the chain, signed, that what is
// before it goes, and then removes that.
func (l *Log) trim(ctx context.Context) error {
	s, state, err := l.stream(ctx)
	if err != nil {
		return err
	}
	limit := session.InstantOf(time.Now().Add(-l.o.KeepFor))
	spare := int64(state.Bytes) - int64(l.o.KeepBytes)
	ks := l.o.Trust.KeySet()
	var keep *floor
	l.mu.Lock()
	last := l.at.last
	l.mu.Unlock()
	for seq, n := state.FirstSeq, 0; seq < last && n < trimAtOnce; n++ {
		m, err := get(ctx, s, seq)
		if err != nil {
			return err
		}
		seq = m.Sequence + 1
		b, err := parse(m.Data, ks)
		if err != nil {
			continue
		}
		if keep != nil { // the first that stays is the one after what goes
			keep.number, keep.below, keep.seq = b.First, b.Prev, m.Sequence
		}
		if b.Time >= limit && spare <= 0 {
			break
		}
		spare -= int64(len(m.Data))
		if keep == nil {
			keep = &floor{}
		}
	}
	if keep == nil || keep.number == 0 {
		return nil
	}
	body, err := encode(authority.AuditRecord{
		Kind: authority.AuditRetention, Action: "trim", Outcome: authority.OutcomeDone, Authority: l.o.Authority,
		Principal: authority.AuditPrincipal{Means: "authority"},
		Detail:    fmt.Sprintf("records before %d are removed; the last of them has the hash %s", keep.number, hex.EncodeToString(keep.below[:])),
	})
	if err != nil {
		return err
	}
	it := &item{body: body, floor: keep, done: make(chan struct{})}
	if err := l.add(it); err != nil {
		return err
	}
	select {
	case <-it.done:
	case <-ctx.Done():
		return ctx.Err()
	}
	if it.err != nil {
		return it.err
	}
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	if err := s.Purge(ctx, jetstream.WithPurgeSequence(keep.seq)); err != nil {
		return fmt.Errorf("audit: %w", err)
	}
	l.log.Info("the audit was trimmed", "from", keep.number)
	return nil
}
