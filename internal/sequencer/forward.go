package sequencer

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/interlock-fabric/interlock/pkg/natsfeed"
	"github.com/interlock-fabric/interlock/pkg/session"
	"github.com/nats-io/nats.go"
)

// A forward is a frame of TypeForward, signed by the authority that sends it:
//
//	1 | 1 | body of a batch: its decision, Time, and a nonce as Prev
//
// and so is its answer, signed by the writer:
//
//	1 | 2 | hash of the forward (32) | code | flags | epoch (8) | number (8) | time (8)
//
// The answer names the forward by its hash, so that none can be given for
// another; that a forward is played again does no harm, because its decision
// has an ID.
const (
	forwardVersion  = 1
	forwardRequest  = 1
	forwardResponse = 2
	responseLen     = 2 + 32 + 2 + 24

	// forwardAge is how old a forward may be.
	forwardAge = 30 * time.Second
	// forwardPause is between attempts while there is no writer, and forwardPoll
	// between those for a decision that the writer has: that it is stored is
	// seen in the log.
	forwardPause = 50 * time.Millisecond
	forwardPoll  = time.Second
)

const (
	flagDurable   = 1
	flagDuplicate = 2
)

// forwardCodes are the errors that an answer can carry. Zero is none.
var forwardCodes = []struct {
	code byte
	err  error
}{
	{1, ErrQuota}, {2, ErrBusy}, {3, ErrRolledBack}, {4, ErrNoKey}, {5, ErrUntrusted},
	{6, ErrTooLarge}, {7, session.ErrInvalid}, {8, session.ErrMalformed}, {9, ErrNoWriter}, {10, ErrTrimmed},
}

func forwardCode(err error) byte {
	if err == nil {
		return 0
	}
	for _, c := range forwardCodes {
		if errors.Is(err, c.err) {
			return c.code
		}
	}
	return 9 // unknown: the sender tries again
}

func forwardError(code byte) error {
	for _, c := range forwardCodes {
		if c.code == code {
			return c.err
		}
	}
	return ErrNoWriter
}

// final reports whether an error answers the decision for good.
func final(err error) bool {
	return err != nil && !errors.Is(err, ErrNoWriter) && !errors.Is(err, ErrBusy) && !errors.Is(err, ErrClosed) && !errors.Is(err, ErrNoKey)
}

// ownReply reports whether a reply subject is an inbox. Anything else would have
// the authority publish, with its own rights, where somebody else wants.
func ownReply(reply string) bool {
	return strings.HasPrefix(reply, "_INBOX") || strings.HasPrefix(reply, "_R_.")
}

// forward brings decisions to whoever writes, one after the other, until they
// are stored. One whose caller has been told that enforcers know of it goes on
// without the caller. It is this sequencer's meanwhile: asked for again it is not
// sent a second time, which in an outage of the store would be everything, over
// and over.
func (w *writer) forward(rs ...*request) {
	s := w.s
	if w.away+len(rs) > maxPending {
		for _, r := range rs {
			r.finish(Result{}, ErrBusy)
		}
		return
	}
	for _, r := range rs {
		w.away++
		r.away = true
		w.ids[r.d.ID] = taken{own: r}
		r.then(func() { s.post(func() { w.returned(r) }) })
	}
	started := w.spawn(func() {
		for _, r := range rs {
			s.carry(r)
		}
	})
	if !started {
		for _, r := range rs {
			r.finish(Result{}, ErrClosed)
		}
	}
}

// returned is called when a decision that was forwarded has ended.
func (w *writer) returned(r *request) {
	w.away--
	w.release(r)
	res, err := r.outcome()
	w.end(r, res, err)
}

// regain takes a decision that was forwarded, now that this is the writer.
func (w *writer) regain(r *request) {
	r.away = false
	if !r.ended() {
		w.release(r)
		w.accept(r)
	}
}

// told is called when the writer has told enforcers of a decision.
func (w *writer) told(r *request, res Result) {
	if w.ids[r.d.ID].own != r {
		return
	}
	w.ids[r.d.ID] = taken{epoch: res.Epoch, number: res.Number, at: res.At, own: r}
	for _, d := range r.dups {
		d.announce(res)
	}
}

// carry returns when the decision has ended, or is with this sequencer's writer.
func (s *Sequencer) carry(r *request) {
	for !r.ended() {
		if s.ctx.Err() != nil {
			r.finish(Result{}, ErrClosed)
			return
		}
		if r.abandoned.Load() && !r.wasTold() {
			r.finish(Result{}, ErrNoWriter)
			return
		}
		if rl := role(s.role.Load()); rl == writing || rl == proving {
			if !s.post(func() { s.w.regain(r) }) {
				r.finish(Result{}, ErrClosed)
			}
			return
		}
		res, err := s.sendForward(r)
		wait := forwardPause
		switch {
		case err == nil && res.Durable:
			r.finish(res, nil)
			return
		case err == nil:
			r.announce(res)
			s.post(func() { s.w.told(r, res) })
			wait = forwardPoll
		case final(err):
			r.finish(Result{}, err)
			return
		}
		pause := time.NewTimer(wait)
		select {
		case <-pause.C:
		case <-r.done:
			pause.Stop()
		case <-s.ctx.Done():
			pause.Stop()
		}
		if !errors.Is(err, nats.ErrNoResponders) && !errors.Is(err, ErrBusy) {
			r.retry() // it may have been taken: being known is no surprise
		}
	}
}

// sendForward asks the writer once.
func (s *Sequencer) sendForward(r *request) (Result, error) {
	select {
	case s.forwards <- struct{}{}:
		defer func() { <-s.forwards }()
	case <-s.ctx.Done():
		return Result{}, ErrClosed
	}
	key, _, err := s.signer()
	if err != nil {
		return Result{}, err
	}
	b := &session.Batch{
		Epoch: 1, Number: 1, Time: session.InstantOf(s.o.Hooks.Now()),
		Decisions: []session.DecisionRef{{ID: r.d.ID, Count: uint16(len(r.d.Entries))}}, Entries: r.d.Entries,
	}
	_, _ = rand.Read(b.Prev[:]) // crypto/rand never fails
	body, err := b.MarshalBody()
	if err != nil {
		return Result{}, fmt.Errorf("sequencer: %w", err)
	}
	frame, err := session.Seal(session.TypeForward, append([]byte{forwardVersion, forwardRequest}, body...), key)
	if err != nil {
		return Result{}, fmt.Errorf("sequencer: %w", err)
	}
	sent, err := session.ParseFrame(frame)
	if err != nil {
		return Result{}, fmt.Errorf("sequencer: %w", err)
	}
	ctx, cancel := context.WithTimeout(s.ctx, s.o.AckWait+time.Second)
	defer cancel()
	m, err := s.nc.RequestWithContext(ctx, natsfeed.ForwardSubject, frame)
	if err != nil {
		return Result{}, fmt.Errorf("%w: %w", ErrNoWriter, err)
	}
	return s.readResponse(m.Data, sent.Hash())
}

// readResponse believes an answer only if a writer's key signed it for this
// very forward.
func (s *Sequencer) readResponse(data []byte, to session.Hash) (Result, error) {
	f, err := session.ParseFrame(data)
	if err != nil {
		return Result{}, fmt.Errorf("%w: %w", ErrNoWriter, err)
	}
	if f.Type != session.TypeForward || len(f.Body) != responseLen || f.Body[0] != forwardVersion || f.Body[1] != forwardResponse {
		return Result{}, fmt.Errorf("%w: %w", ErrNoWriter, session.ErrMalformed)
	}
	if _, err := s.trust.Writer(&f, 0, true, session.InstantOf(s.o.Hooks.Now())); err != nil {
		return Result{}, fmt.Errorf("%w: %w", ErrNoWriter, err)
	}
	b := f.Body[2:]
	if session.Hash(b[:32]) != to {
		return Result{}, fmt.Errorf("%w: answer to another forward", ErrNoWriter)
	}
	if b[32] != 0 {
		return Result{}, forwardError(b[32])
	}
	return Result{
		Durable: b[33]&flagDurable != 0, Duplicate: b[33]&flagDuplicate != 0,
		Epoch: binary.BigEndian.Uint64(b[34:]), Number: binary.BigEndian.Uint64(b[42:]),
		At: session.Instant(binary.BigEndian.Uint64(b[50:])),
	}, nil
}

// onForward takes decisions that others forward, while this is the writer.
func (s *Sequencer) onForward(m *nats.Msg) {
	if !ownReply(m.Reply) {
		return
	}
	now := session.InstantOf(s.o.Hooks.Now())
	f, err := session.ParseFrame(m.Data)
	if err != nil || f.Type != session.TypeForward || len(f.Body) < 2 || f.Body[0] != forwardVersion || f.Body[1] != forwardRequest {
		s.garbage.Add(1)
		return
	}
	may, err := s.trust.Writer(&f, 0, true, now)
	if err != nil {
		s.garbage.Add(1)
		return
	}
	b, err := session.UnmarshalBatch(f.Body[2:])
	if err != nil || len(b.Decisions) != 1 || int(b.Decisions[0].Count) != len(b.Entries) ||
		b.Decisions[0].ID == (session.DecisionID{}) ||
		now.Time().Sub(b.Time.Time()).Abs() > forwardAge {
		s.garbage.Add(1)
		return
	}
	hash, reply := f.Hash(), m.Reply
	r, err := newRequest(Decision{ID: b.Decisions[0].ID, Entries: b.Entries})
	if err == nil {
		for i := range b.Entries {
			if !may.May(b.Entries[i].Key) {
				err = ErrUntrusted // another authority's key is no way around its tenants
			}
		}
	}
	if err != nil {
		s.respond(reply, hash, Result{}, err)
		return
	}
	select {
	case s.answers <- struct{}{}:
	default:
		return // the sender asks again, and the ID makes it one decision
	}
	if !s.post(func() {
		started := s.w.spawn(func() {
			defer func() { <-s.answers }()
			res, err := s.await(s.ctx, r, s.o.AckWait)
			s.respond(reply, hash, res, err)
		})
		switch {
		case !started:
			<-s.answers
		case s.w.role != writing:
			r.finish(Result{}, ErrNoWriter) // the sender looks for the writer itself
		default:
			s.w.accept(r)
		}
	}) {
		<-s.answers
	}
}

func (s *Sequencer) respond(reply string, to session.Hash, res Result, err error) {
	key, _, keyErr := s.signer()
	if keyErr != nil {
		return
	}
	body := make([]byte, 0, responseLen)
	body = append(body, forwardVersion, forwardResponse)
	body = append(body, to[:]...)
	var flags byte
	if res.Durable {
		flags |= flagDurable
	}
	if res.Duplicate {
		flags |= flagDuplicate
	}
	body = append(body, forwardCode(err), flags)
	body = binary.BigEndian.AppendUint64(body, res.Epoch)
	body = binary.BigEndian.AppendUint64(body, res.Number)
	body = binary.BigEndian.AppendUint64(body, uint64(res.At))
	if frame, err := session.Seal(session.TypeForward, body, key); err == nil {
		_ = s.nc.Publish(reply, frame) // the sender asks again
	}
}
