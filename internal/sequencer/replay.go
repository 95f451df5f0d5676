package sequencer

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/interlock-fabric/interlock/pkg/natsfeed"
	"github.com/interlock-fabric/interlock/pkg/session"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// ack is the store's answer to an append.
type ack struct {
	seq       uint64
	wrongLast bool
	code      int
	text      string
}

// apiError is the part of a JetStream answer that says what went wrong.
type apiError struct {
	Code        int    `json:"code"`
	ErrCode     int    `json:"err_code"`
	Description string `json:"description"`
}

func (e *apiError) wrongLast() bool {
	return e.ErrCode == int(jetstream.JSErrCodeStreamWrongLastSequence) ||
		e.ErrCode == int(jetstream.JSErrCodeStreamWrongLastSequenceConstant)
}

func (e *apiError) notFound() bool {
	return e.ErrCode == int(jetstream.JSErrCodeMessageNotFound)
}

func parseAck(m *nats.Msg) ack {
	if st := m.Header.Get("Status"); st != "" {
		return ack{code: 503, text: "no stream listens"}
	}
	var a struct {
		Stream string    `json:"stream"`
		Seq    uint64    `json:"seq"`
		Error  *apiError `json:"error"`
	}
	switch err := json.Unmarshal(m.Data, &a); {
	case err != nil:
		return ack{text: "malformed answer"}
	case a.Error != nil:
		return ack{code: a.Error.ErrCode, text: a.Error.Description, wrongLast: a.Error.wrongLast()}
	case a.Stream != natsfeed.LogStream:
		return ack{text: "answer of another stream"}
	}
	return ack{seq: a.Seq}
}

// stored is a message of a stream.
type stored struct {
	Seq  uint64 `json:"seq"`
	Data []byte `json:"data"`
}

// parseStored takes the answer of STREAM.MSG.GET apart. A nil message without
// error means that there is none.
func parseStored(m *nats.Msg) (*stored, error) {
	if m.Header.Get("Status") != "" {
		return nil, errors.New("no stream leader")
	}
	var a struct {
		Message *stored   `json:"message"`
		Error   *apiError `json:"error"`
	}
	switch err := json.Unmarshal(m.Data, &a); {
	case err != nil:
		return nil, err
	case a.Error != nil && a.Error.notFound():
		return nil, nil
	case a.Error != nil:
		return nil, fmt.Errorf("%s (%d)", a.Error.Description, a.Error.ErrCode)
	case a.Message == nil:
		return nil, errors.New("answer without message")
	}
	return a.Message, nil
}

const (
	// msgGet is the request that only a stream's leader answers. A direct get is
	// answered by any replica, and one that lags would hide the log's end.
	msgGet    = "$JS.API.STREAM.MSG.GET."
	directGet = "$JS.API.DIRECT.GET."
)

// subscribe begins to listen: to the answers to appends and reads, and to the
// log itself.
func (s *Sequencer) subscribe() error {
	for _, x := range []struct {
		subject string
		fn      nats.MsgHandler
	}{
		{s.inbox + ".a.*", s.onAck},
		{s.inbox + ".r.*", s.onRead},
		{s.inbox + ".i.*", s.onInfo},
		{natsfeed.LogSubject, s.onLog},
		{natsfeed.TrustSubject, s.onKeySet},
		{natsfeed.SegmentSubject, s.onSegment},
	} {
		sub, err := s.nc.Subscribe(x.subject, x.fn)
		if err != nil {
			return fmt.Errorf("sequencer: %w", err)
		}
		s.subs = append(s.subs, sub)
	}
	if err := s.nc.Flush(); err != nil {
		return fmt.Errorf("sequencer: %w", err)
	}
	return nil
}

func (s *Sequencer) deaf() bool { d := s.o.Hooks.DropAcks; return d != nil && d() }

func (s *Sequencer) onAck(m *nats.Msg) {
	if s.deaf() {
		return
	}
	a, token := parseAck(m), m.Subject[strings.LastIndexByte(m.Subject, '.')+1:]
	s.post(func() { s.w.acknowledged(token, a, time.Now()) })
}

func (s *Sequencer) onRead(m *nats.Msg) {
	if s.deaf() {
		return
	}
	token, err := strconv.ParseUint(m.Subject[strings.LastIndexByte(m.Subject, '.')+1:], 10, 64)
	if err != nil {
		return
	}
	if seq := m.Header.Get(jetstream.SequenceHeader); seq != "" || m.Header.Get("Status") == "204" {
		var msg *stored
		if n, err := strconv.ParseUint(seq, 10, 64); err == nil && m.Header.Get("Status") == "" {
			msg = &stored{Seq: n, Data: m.Data}
		}
		pending, err := strconv.ParseUint(m.Header.Get("Nats-Num-Pending"), 10, 64)
		s.post(func() {
			if msg != nil && err == nil {
				s.w.stored = max(s.w.stored, msg.Seq+pending)
			}
			s.w.haveBulk(token, msg, err != nil || pending > 0)
		})
		return
	}
	if m.Header.Get("Status") == "404" {
		s.post(func() { s.w.haveBulk(token, nil, false) })
		return
	}
	msg, err := parseStored(m)
	s.post(func() { s.w.haveRead(token, msg, err) })
}

// onLog hears what anybody publishes on the log's subject. It is only a hint to
// look: what counts is what is stored.
func (s *Sequencer) onLog(m *nats.Msg) {
	f, err := session.ParseFrame(m.Data)
	if err != nil {
		s.events.add(func() { s.w.heard(session.Hash{}) }, eventBacklog)
		return
	}
	h := f.Hash()
	s.events.add(func() { s.w.heard(h) }, eventBacklog)
}

func (w *writer) heard(h session.Hash) {
	for _, f := range w.flight {
		if f.hash == h {
			return
		}
	}
	if h == w.head {
		return
	}
	w.heardAt = time.Now()
	if w.role != loading {
		w.examine()
	}
}

// load reads the log anew: from the newest published segment on that can be
// trusted, or from its beginning.
func (w *writer) load() {
	if w.role != loading {
		w.before, w.takenBefore = w.chain, w.taken
	}
	w.setRole(loading)
	w.chain = chain{}
	w.ids, w.taken, w.takenIDs = map[session.DecisionID]taken{}, nil, 0
	w.doubt, w.gap = false, false
	w.bulk, w.stored, w.asked = true, 0, 0
	w.keySet = w.s.trust.KeySet().Version
	w.reading, w.onEnd = false, w.loaded
	w.token++ // what is still being read is of no use
	w.loads++
	n := w.loads
	w.spawn(func() {
		b, err := w.s.findBase(w.s.ctx)
		if err != nil {
			return // closing
		}
		w.s.post(func() {
			if w.loads == n && w.role == loading {
				w.startAt(b)
			}
		})
	})
}

// startAt begins at a base and reads what is stored behind it.
func (w *writer) startAt(b base) {
	if r := b.resume; r != nil {
		w.chain = chain{
			epoch: r.epoch, number: r.number, head: r.head, set: b.segment.Set(), time: r.time, horizon: r.horizon,
			pos: r.at, at: r.at, stale: b.stale, signers: slices.Clone(b.signers),
		}
		if b.stale {
			w.pos = 0
		}
		for _, l := range r.links {
			w.s.hashes.put(l)
		}
		for _, d := range r.taken {
			w.note(d)
		}
	} else {
		w.headless = b.trimmed
	}
	w.examine()
}

// loaded is called when everything that is stored has been examined.
func (w *writer) loaded() {
	known, taken := w.before, w.takenBefore
	w.before, w.takenBefore = chain{}, nil
	missing, ks := w.headless, w.s.trust.KeySet()
	switch {
	case missing && known.number > 0:
		// Of what the log does not hold any more this is all there is.
		w.chain = known
		for _, d := range taken {
			w.note(d)
		}
	case missing:
		w.chain = chain{pos: w.pos, headless: true}
	case w.stale && w.epoch < ks.Epoch:
		w.stale = false // the root has opened an epoch for that
	case w.epoch == 0:
		w.begin(ks.Epoch, w.s.trust.Origin())
	}
	w.setRole(following)
	w.expiry.anchor(w.chain.time, w.wall(), time.Now())
	w.publishView()
	switch halted := w.s.halted(); {
	case missing:
		w.s.log.Error("sequencer: the log was trimmed, and no published segment leads up to it", "epoch", w.epoch, "number", w.number)
		w.halt(ErrTrimmed)
	case w.stale:
		w.rollback("a published segment is of a log that goes further")
	case errors.Is(halted, ErrTrimmed):
		w.s.halt.Store(nil)
	}
	if w.ready != nil {
		w.ready()
		w.ready = nil
	}
	if w.lease {
		w.elected(time.Time{})
	}
	again := w.salvaged
	w.mine, w.salvaged, w.unstored = nil, nil, 0
	for _, r := range again {
		w.release(r)
	}
	w.reroute(again)
}

// examine looks at what is stored behind pos, one message after the other, up to
// the end. One read is out at any time.
func (w *writer) examine() {
	if w.reading {
		w.again = true
		return
	}
	w.again = false
	w.reading = true
	w.read()
}

func (w *writer) read() {
	w.bulk = w.bulk || w.stored > w.pos+bulkBehind
	w.token++
	w.readAt = time.Now()
	m := &nats.Msg{Subject: msgGet + natsfeed.LogStream, Reply: w.s.inbox + ".r." + strconv.FormatUint(w.token, 10)}
	if w.bulk {
		m.Subject = directGet + natsfeed.LogStream
		m.Data = fmt.Appendf(nil, `{"seq":%d,"batch":%d,"max_bytes":%d}`, w.pos+1, bulkMessages, bulkBytes)
	} else {
		m.Data = fmt.Appendf(nil, `{"seq":%d,"next_by_subj":%q}`, w.pos+1, natsfeed.LogSubject)
	}
	_ = w.s.nc.PublishMsg(m) // without an answer, it is asked again
}

// A piece of a bulk read.
const (
	bulkMessages = 256
	bulkBytes    = 1 << 20
)

// haveBulk takes one answer to a bulk read. It comes from any replica, so that
// its end says nothing: the rest is read from the leader.
func (w *writer) haveBulk(token uint64, m *stored, more bool) {
	if !w.reading || token != w.token || !w.bulk {
		return
	}
	switch {
	case m != nil && m.Seq <= w.pos:
	case m != nil:
		w.readAt = time.Now()
		if !w.take(m) {
			w.token++ // the rest of the piece is asked for again
		}
	case more:
		w.read()
	default:
		// Of what this replica does not have, the leader knows.
		w.bulk, w.stored = false, w.pos
		w.read()
	}
}

func (w *writer) haveRead(token uint64, m *stored, err error) {
	if !w.reading || token != w.token {
		return
	}
	if err != nil {
		return // asked again after readTimeout
	}
	if m == nil {
		w.reading = false
		w.atEnd(time.Now())
		return
	}
	if m.Seq > w.pos && !w.take(m) {
		return // goes on when the key sets have been fetched
	}
	w.read()
}

// take examines the stored message behind pos. It reports false when it has to
// be looked at again.
func (w *writer) take(m *stored) bool {
	w.lostFrom = time.Time{}
	if len(w.flight) > 0 && bytes.Equal(m.Data, w.flight[0].frame) {
		w.pos = m.Seq - 1
		w.confirm()
		w.beat.soon()
		return true
	}
	j, v := w.judge(m.Data, &w.epochs)
	if v == doubtful && w.asked < m.Seq {
		// Its key may be in a key set that has not arrived here yet: one that
		// was stored before it.
		w.asked = max(m.Seq, w.stored)
		w.spawn(func() {
			_ = w.s.fetchKeySets(w.s.ctx) // what cannot be fetched leaves it in doubt
			w.s.post(func() { w.read() })
		})
		w.readAt = time.Now().Add(10 * time.Second)
		return false
	}
	w.gap = w.gap || w.pos > 0 && m.Seq > w.pos+1
	w.pos = m.Seq
	for _, f := range w.flight {
		if f.stored <= w.pos {
			f.stored = 0
		}
	}
	switch v {
	case extends, opens:
		w.adopt(j, v)
		w.at, w.gap = w.pos, false
		w.s.hashes.put(link{epoch: w.epoch, number: w.number, hash: w.head, key: j.id})
		if v == opens && w.role != loading {
			w.s.halt.Store(nil)
		}
		w.beat.unprove()
		if w.role != loading {
			w.publishView()
		}
		owners := make([]*request, len(j.batch.Decisions))
		for i := range owners {
			owners[i] = w.ids[j.batch.Decisions[i].ID].own
		}
		w.remember(j.batch)
		for _, own := range owners {
			// The writer says whether it was first, unless it has said so.
			if own != nil && (!own.away || own.wasTold()) {
				own.retry()
				w.end(own, Result{Epoch: j.batch.Epoch, Number: j.batch.Number, At: j.batch.Time, Durable: true}, nil)
			}
		}
		if w.role != loading && (len(w.flight) > 0 || w.role == writing) {
			w.depose()
		}
	case doubtful:
		w.salvage(j)
		w.doubt = true
		w.s.strays.Add(1)
		w.s.log.Warn("sequencer: a stored batch is signed by a key that is not trusted", "position", m.Seq)
	case stray:
		if w.stale && j.hash == w.head {
			w.at, w.stale = w.pos, false // at another position, as after a move
			break
		}
		w.salvage(j)
		w.s.strays.Add(1)
		if w.gap && w.s.halted() == nil && (j.batch.Epoch > w.epoch || j.batch.Epoch == w.epoch && j.batch.Number > w.number+1) {
			w.s.log.Warn("sequencer: the log was trimmed before it had been read here", "epoch", w.epoch, "number", w.number)
			if w.role == loading {
				w.load()
			} else {
				w.reload()
			}
			return false
		}
	case alien:
		w.s.log.Error("sequencer: the log holds what this version does not know: upgrade it", "position", m.Seq)
		w.halt(ErrUpgrade)
	default:
		w.s.garbage.Add(1)
	}
	return true
}

// atEnd is called when the stream's leader has nothing behind pos.
func (w *writer) atEnd(now time.Time) {
	w.pollAt = now.Add(pollIdle)
	if w.role == following && now.Sub(w.heardAt) < 2*pollIdle {
		w.pollAt = now.Add(pollHeard)
	}
	if f := w.onEnd; f != nil {
		w.onEnd = nil
		f()
	}
	if len(w.flight) == 0 || w.flight[0].failed {
		// When the fence did not hold and yet nothing is there, it is a message
		// that the leader has not committed yet, or a stream that has gone back.
		w.askInfo()
	}
	w.resend(now)
	if w.again {
		w.examine() // asked for after this read was sent
		return
	}
	for _, c := range w.claims {
		if w.contradicted(c) {
			w.rollback("an enforcer has more of the chain, or another")
		}
	}
	w.claims = w.claims[:0]
}

// askInfo asks the leader where the stream ends.
func (w *writer) askInfo() {
	m := &nats.Msg{Subject: streamInfo + natsfeed.LogStream, Reply: w.s.inbox + ".i.0"}
	_ = w.s.nc.PublishMsg(m) // asked again at the next end
}

func (s *Sequencer) onInfo(m *nats.Msg) {
	a, err := parseInfo(m)
	if s.deaf() || err != nil {
		return
	}
	s.post(func() { s.w.streamEnds(a.Created, a.State.LastSeq, time.Now()) })
}

// streamEnds notices a stream that lost what had been read from it.
func (w *writer) streamEnds(made time.Time, last uint64, now time.Time) {
	if w.made.IsZero() {
		w.made = made
	}
	switch {
	case !made.Equal(w.made) && w.s.halted() == nil:
		w.rollback("the stream was made anew")
	case last >= w.pos:
		w.lostFrom = time.Time{}
	case w.lostFrom.IsZero():
		w.lostFrom = now
	case now.Sub(w.lostFrom) >= lostAfter && w.s.halted() == nil:
		w.rollback("the stream ends before what was read from it")
	}
}

// rollback stops all writing until a new epoch.
func (w *writer) rollback(why string) {
	w.s.log.Error("sequencer: the log was rolled back: open a new epoch", "why", why, "epoch", w.epoch, "number", w.number)
	w.halt(ErrRolledBack)
	// The key sets may have gone the same way: read and store them again.
	w.s.keysMu.Lock()
	w.s.keysPos, w.s.keysSeen = 0, 0
	w.s.keysMu.Unlock()
}

// halt refuses everything that is not stored.
func (w *writer) halt(err error) {
	w.s.halt.Store(&err)
	for _, f := range w.flight {
		for _, r := range f.reqs {
			w.drop(r, err)
		}
	}
	for _, r := range w.pending {
		w.drop(r, err)
	}
	w.flight, w.flightBytes, w.pending = nil, 0, nil
}

// claim is what an enforcer says was confirmed to it.
type claim struct {
	epoch, number uint64
	head          session.Hash
}

// heardClaim judges a claim when everything that is stored has been examined:
// an enforcer may read the log before this sequencer does.
func (w *writer) heardClaim(c claim) {
	if w.contradicted(c) {
		w.claims = append(w.claims[:0], c)
		if w.role != loading {
			w.examine()
		}
	}
}

// contradicted reports whether a claim cannot be true of the log as it is known.
func (w *writer) contradicted(c claim) bool {
	if c.epoch != w.epoch || w.s.halted() != nil || w.former[c.head] {
		return false
	}
	if c.number <= w.number {
		l, ok := w.s.hashes.at(c.epoch, c.number)
		return ok && l.hash != c.head
	}
	for _, f := range w.flight {
		if f.batch.Number == c.number && f.hash == c.head {
			return false // stored, and read by the enforcer before the answer came
		}
	}
	return w.role == writing
}
