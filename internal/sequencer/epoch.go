package sequencer

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"slices"
	"sync"
	"time"

	"github.com/interlock-fabric/interlock/pkg/filter"
	"github.com/interlock-fabric/interlock/pkg/natsfeed"
	"github.com/interlock-fabric/interlock/pkg/session"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// epochs verifies batches of the current epoch and of earlier ones. An earlier
// one is judged by the last key set that belonged to it.
type epochs struct {
	mu    sync.RWMutex
	trust *session.Trust
	old   map[uint64]*session.Trust
}

// learn takes a key set that the root signed, whatever its age.
func (e *epochs) learn(root *session.Trust, frame []byte) error {
	f, err := session.ParseFrame(frame)
	if err != nil {
		return err
	}
	if f.Type != session.TypeKeySet {
		return fmt.Errorf("%w: not a key set", session.ErrMalformed)
	}
	if err := f.Verify(root.Root()); err != nil {
		return err
	}
	ks, err := session.UnmarshalKeySet(f.Body)
	if err != nil {
		return err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.old == nil {
		e.old = map[uint64]*session.Trust{}
	}
	t := e.old[ks.Epoch]
	if t == nil {
		if t, err = session.NewTrust(root.Root()); err != nil {
			return err
		}
		e.old[ks.Epoch] = t
	}
	_, err = t.Update(frame, ks.NotAfter-1) // an expired one still says what was trusted then
	return err
}

func (e *epochs) of(epoch uint64) *session.Trust {
	e.mu.RLock()
	defer e.mu.RUnlock()
	if e.trust != nil {
		if ks := e.trust.KeySet(); ks != nil && ks.Epoch == epoch {
			return e.trust
		}
	}
	return e.old[epoch]
}

// origin returns what the first batch of an epoch names.
func (e *epochs) origin(epoch uint64) (session.Hash, bool) {
	t := e.of(epoch)
	if t == nil || t.KeySet() == nil {
		return session.Hash{}, false
	}
	return t.Origin(), true
}

// verify checks who signed a batch that chains. That a key set has ended does
// not make what is stored untrue: it stops the writing, not the reading.
func (e *epochs) verify(f *session.Frame, b *session.Batch) (*session.SigningKey, error) {
	t := e.of(b.Epoch)
	if t == nil || t.KeySet() == nil {
		return nil, session.ErrUntrusted
	}
	return t.Writer(f, b.Number, false, t.KeySet().NotAfter-1)
}

// signed reports whether a frame whose body is not understood is from a writer.
func (e *epochs) signed(f *session.Frame) bool {
	e.mu.RLock()
	t := e.trust
	e.mu.RUnlock()
	if t == nil || t.KeySet() == nil {
		return false
	}
	_, err := t.Writer(f, 0, true, t.KeySet().NotAfter-1)
	return err == nil
}

// PublishKeySet stores a key set that the root signed, for everybody to hear, and
// takes it. One of a later epoch makes the writer open that epoch: numbers start
// at 1, and what is in force is restated before anything else is decided. It
// fails, wrapping session.ErrFrame, for one that is older than what is held, or
// that the root did not sign.
func (s *Sequencer) PublishKeySet(ctx context.Context, frame []byte) error {
	probe, err := session.NewTrust(s.trust.Root())
	if err != nil {
		return err
	}
	if _, err := probe.Update(frame, session.InstantOf(s.o.Hooks.Now())); err != nil {
		return fmt.Errorf("sequencer: %w", err)
	}
	ks := probe.KeySet()
	if have := s.trust.KeySet(); have != nil && (ks.Version < have.Version || ks.Epoch < have.Epoch) {
		return fmt.Errorf("sequencer: %w: key set %d of epoch %d is older than %d of epoch %d",
			session.ErrUntrusted, ks.Version, ks.Epoch, have.Version, have.Epoch)
	}
	s.keysMu.Lock()
	stored := s.keysSeen >= ks.Version
	s.keysMu.Unlock()
	if !stored {
		if _, err := s.js.Publish(ctx, natsfeed.TrustSubject, frame, jetstream.WithExpectStream(natsfeed.TrustStream)); err != nil {
			return fmt.Errorf("sequencer: storing the key set: %w", err)
		}
	}
	return s.takeKeySet(frame, ks.Version)
}

// storeKeySet stores the key set that is held, if a newer one than is stored:
// enforcers learn of it there, and an authority that starts later needs each
// epoch's to read that epoch.
func (s *Sequencer) storeKeySet(ctx context.Context) error {
	s.keysMu.Lock()
	seen := s.keysSeen
	s.keysMu.Unlock()
	frame := s.o.Keys.Frame()
	if ks := s.trust.KeySet(); ks.Version <= seen || frame == nil || session.InstantOf(s.o.Hooks.Now()) >= ks.NotAfter {
		return nil
	}
	return s.PublishKeySet(ctx, frame)
}

// takeKeySet takes a key set from wherever it came. One that is held already is
// no error.
func (s *Sequencer) takeKeySet(frame []byte, stored uint64) error {
	s.keysMu.Lock()
	defer s.keysMu.Unlock()
	if err := s.w.epochs.learn(s.trust, frame); err != nil {
		return fmt.Errorf("sequencer: %w", err)
	}
	s.keysSeen = max(s.keysSeen, stored)
	if _, err := s.o.Keys.Accept(frame, session.InstantOf(s.o.Hooks.Now())); err != nil {
		return fmt.Errorf("sequencer: %w", err)
	}
	s.post(func() {}) // the writer sees that the version has changed
	return nil
}

// onKeySet hears key sets that another authority publishes.
func (s *Sequencer) onKeySet(m *nats.Msg) {
	select {
	case s.keysNow <- struct{}{}:
	default:
	}
}

// followKeySets reads the stored key sets when one was heard, and now and then.
func (s *Sequencer) followKeySets() {
	tick := time.NewTicker(5 * time.Second)
	defer tick.Stop()
	for {
		select {
		case <-s.ctx.Done():
			return
		case <-tick.C:
		case <-s.keysNow:
		}
		err := s.fetchKeySets(s.ctx)
		if err == nil && s.IsWriter() {
			err = s.storeKeySet(s.ctx)
		}
		if err != nil && s.ctx.Err() == nil {
			s.log.Warn("sequencer: key sets", "err", err)
		}
	}
}

// fetchKeySets reads the stored key sets that have not been read yet. What the
// root did not sign is skipped.
func (s *Sequencer) fetchKeySets(ctx context.Context) error {
	for {
		s.keysMu.Lock()
		pos := s.keysPos
		s.keysMu.Unlock()
		m, err := s.getNext(ctx, natsfeed.TrustStream, natsfeed.TrustSubject, pos+1)
		if err != nil || m == nil {
			return err
		}
		if err := s.takeKeySet(m.Data, versionOf(m.Data)); err != nil && !errors.Is(err, session.ErrUntrusted) {
			s.log.Warn("sequencer: a stored key set was refused", "position", m.Seq, "err", err)
			if !errors.Is(err, session.ErrFrame) {
				return err // it could not be kept: try again
			}
		}
		s.keysMu.Lock()
		if s.keysPos == pos {
			s.keysPos = m.Seq
		}
		s.keysMu.Unlock()
	}
}

// versionOf returns what a key set claims to be; nothing of it is verified.
func versionOf(frame []byte) uint64 {
	if f, err := session.ParseFrame(frame); err == nil {
		if ks, err := session.UnmarshalKeySet(f.Body); err == nil {
			return ks.Version
		}
	}
	return 0
}

// getNext reads the first message at or behind seq from the stream's leader.
func (s *Sequencer) getNext(ctx context.Context, stream, subject string, seq uint64) (*stored, error) {
	for {
		try, cancel := context.WithTimeout(ctx, 2*time.Second)
		m, err := s.nc.RequestWithContext(try, msgGet+stream, fmt.Appendf(nil, `{"seq":%d,"next_by_subj":%q}`, seq, subject))
		cancel()
		if err == nil {
			return parseStored(m)
		}
		if ctx.Err() != nil || errors.Is(err, nats.ErrConnectionClosed) {
			return nil, fmt.Errorf("sequencer: reading %s: %w", stream, err)
		}
		pause := time.NewTimer(50 * time.Millisecond)
		select {
		case <-pause.C:
		case <-ctx.Done():
			pause.Stop()
		}
	}
}

// keysChanged follows a new key set: into a new epoch, out of a key that was
// withdrawn, or back to what was in doubt.
func (w *writer) keysChanged(ks *session.KeySet) {
	switch {
	case ks.Epoch > w.epoch:
		w.openEpoch(ks)
		return
	case w.doubt || w.cut(ks):
		w.reload()
		return
	}
	last := trustedUpTo(ks)
	for i, f := range w.flight {
		if f.batch.Number > last[f.key] {
			w.recall(i)
			break
		}
	}
}

// trustedUpTo returns up to which batch of the key set's epoch each of its keys
// is trusted.
func trustedUpTo(ks *session.KeySet) map[session.KeyID]uint64 {
	last := map[session.KeyID]uint64{}
	for i := range ks.Keys {
		switch k := &ks.Keys[i]; {
		case !k.Withdrawn || k.LastEpoch > ks.Epoch:
			last[session.KeyIDOf(k.Public)] = math.MaxUint64
		case k.LastEpoch == ks.Epoch:
			last[session.KeyIDOf(k.Public)] = k.LastNumber
		}
	}
	return last
}

// cut reports whether a key set takes batches out of the chain as it is known.
func (w *writer) cut(ks *session.KeySet) bool {
	last := trustedUpTo(ks)
	for n := w.number; n > 0; n-- {
		l, ok := w.s.hashes.at(w.epoch, n)
		if !ok {
			return false
		}
		if n > last[l.key] {
			return true
		}
	}
	return false
}

// reload reads the log anew: which of it is trusted has changed, it went on while
// this sequencer was not reading, or what was held of it is damaged.
func (w *writer) reload() {
	w.s.log.Warn("sequencer: reading the log anew")
	// What this sequencer decided is not undone because its key was stolen.
	w.mine, w.former = map[session.Hash]bool{}, map[session.Hash]bool{}
	for n := w.number; n > 0; n-- {
		l, ok := w.s.hashes.at(w.epoch, n)
		if !ok {
			break
		}
		w.former[l.hash] = true // enforcers may still speak of it
		if l.own {
			w.mine[l.hash] = true
		}
	}
	w.salvaged = w.orphan(w.flight)
	w.salvaged = append(w.salvaged, w.pending...)
	w.unstored = len(w.salvaged)
	w.flight, w.flightBytes, w.pending = nil, 0, nil
	w.follow()
	w.load()
}

// salvage keeps the decisions of a stored batch that the chain does not go
// through any more, if it is this sequencer's own.
func (w *writer) salvage(j judged) {
	if !w.mine[j.hash] {
		return
	}
	entries := j.batch.Entries
	var rs []*request
	for _, d := range j.batch.Decisions {
		n := int(d.Count)
		if r, err := newRequest(Decision{ID: d.ID, Entries: entries[:n]}); err == nil {
			rs = append(rs, r)
		}
		entries = entries[n:]
	}
	// They come before what was only in flight.
	at := len(w.salvaged) - w.unstored
	w.salvaged = slices.Insert(w.salvaged, at, rs...)
}

// recall takes the batches in flight from the i-th on back: they can no longer
// be in the chain. Their decisions are taken again.
func (w *writer) recall(i int) {
	gone := w.flight[i:]
	w.flight = slices.Clone(w.flight[:i])
	for _, f := range gone {
		w.flightBytes -= len(f.frame)
	}
	w.reroute(w.orphan(gone))
}

// openEpoch begins the chain of the key set's epoch.
func (w *writer) openEpoch(ks *session.KeySet) {
	w.s.log.Warn("sequencer: a new epoch", "epoch", ks.Epoch, "entries to restate", w.set.Len())
	if w.s.halted() != nil {
		// What is stored now is not what was read: look at all of it again.
		w.pos = 0
	}
	gone := w.flight
	w.flight, w.flightBytes = nil, 0
	w.s.halt.Store(nil)
	w.lostFrom, w.made = time.Time{}, time.Time{}
	w.reading = false // of what may no longer be there
	if w.role == writing || w.role == proving {
		w.follow()
		w.elected(time.Time{})
	}
	w.examine()
	w.reroute(w.orphan(gone))
}

// restateChunk is how many entries of the old epoch go into one decision.
const restateChunk = 500

// restateID names the n-th part of an epoch's restatement, and with n = -1 its
// end, so that one that was interrupted is continued and not begun again.
func restateID(epoch uint64, n int) (id session.DecisionID) {
	b := binary.BigEndian.AppendUint64([]byte("interlock restate 1\x00"), epoch)
	sum := sha256.Sum256(binary.BigEndian.AppendUint64(b, uint64(int64(n))))
	copy(id[:], sum[:])
	return id
}

// Restatement returns the ids of what the sequencer itself decides at the beginning
// of an epoch, to put into force again what was in force before; nobody asked for
// that.
func Restatement(epoch uint64) map[session.DecisionID]struct{} {
	out := map[session.DecisionID]struct{}{}
	if epoch == firstEpoch {
		return out
	}
	for n := -1; n <= 2*DefaultMaxState/restateChunk; n++ { // an entry and its share
		out[restateID(epoch, n)] = struct{}{}
	}
	return out
}

// restateNext puts what is missing of the restatement before everything else.
func (w *writer) restateNext() {
	if w.carry == nil || w.role != writing {
		return
	}
	if _, ok := w.ids[restateID(w.epoch, -1)]; ok {
		return
	}
	entries := restate(w.carry)
	var reqs []*request
	add := func(n int, e []session.Entry) {
		id := restateID(w.epoch, n)
		if _, ok := w.ids[id]; ok {
			return
		}
		r := &request{
			d: Decision{ID: id, Entries: e}, internal: true, arrived: time.Now(),
			announced: make(chan struct{}), done: make(chan struct{}),
		}
		for i := range e {
			r.size += entrySize(&e[i])
		}
		w.ids[id] = taken{own: r}
		reqs = append(reqs, r)
	}
	n := 0
	for chunk := range slices.Chunk(entries, restateChunk) {
		add(n, chunk)
		n++
	}
	add(-1, nil)
	w.pending = append(reqs, w.pending...)
	w.pendingAt = w.pending[0].arrived
}

// restate returns entries that put into force what is in force in a state, in
// an order that depends on the state alone.
func restate(set *filter.Set) []session.Entry {
	type item struct {
		key session.Key
		r   *session.Record
	}
	var all []item
	set.Range(func(k session.Key, r *session.Record) bool {
		all = append(all, item{k, r})
		return true
	})
	slices.SortFunc(all, func(a, b item) int {
		return cmp.Or(
			cmp.Compare(a.key.Tenant, b.key.Tenant), cmp.Compare(a.key.Shape, b.key.Shape),
			slices.Compare(a.key.Digest[:], b.key.Digest[:]), cmp.Compare(a.r.Effect, b.r.Effect),
			cmp.Compare(drill(a.r), drill(b.r)),
		)
	})
	var out []session.Entry
	for _, x := range all {
		r := x.r
		out = append(out, session.Entry{
			Op: session.OpSet, Effect: r.Effect, Reason: r.Reason, Key: x.key, IssuedBefore: r.IssuedBefore,
			Expires: r.Expires, Incident: r.Incident, ACR: r.ACR, Except: r.Except, Drill: r.Drill,
		})
		if r.Share > 0 {
			// A restore that was half way stays half way.
			out = append(out, session.Entry{
				Op: session.OpLift, Effect: r.Effect, Reason: r.Reason, Key: x.key,
				Incident: r.Incident, Share: r.Share, Drill: r.Drill,
			})
		}
	}
	return out
}

func drill(r *session.Record) int {
	if r.Drill {
		return 1
	}
	return 0
}
