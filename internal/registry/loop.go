package registry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/interlock-fabric/interlock/pkg/natsfeed"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// errBehind: another message is at the end of the log than was read.
var errBehind = errors.New("registry: the log has more")

// run is the one goroutine that changes the index: it reads the log and appends
// to it.
func (r *Registry) run(ctx context.Context) {
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	readyOnce := func() {
		select {
		case <-r.ready:
		default:
			close(r.ready)
		}
	}
	defer readyOnce()
	r.heard.Store(true) // read it whole
	var retry <-chan time.Time
	r.nudge()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			r.heard.Store(true)
			r.sweep()
		case <-retry:
		case <-r.wake:
			if retry != nil {
				continue
			}
		}
		err := r.step(ctx)
		if ctx.Err() != nil {
			return
		}
		if err == nil || !transient(err) {
			readyOnce()
		}
		r.note(err)
		retry = nil
		switch {
		case err == nil:
		case transient(err):
			retry = time.After(retryAfter)
		default:
			retry = time.After(restAfter) // it takes a person to mend it
		}
	}
}

// transient reports whether an error is of the store, and not of what is in it.
func transient(err error) bool {
	return !errors.Is(err, ErrKey) && !errors.Is(err, ErrHole) && !errors.Is(err, ErrUpgrade)
}

// note keeps why nothing goes on, and says it once.
func (r *Registry) note(err error) {
	r.mu.Lock()
	before := r.err
	r.err = err
	r.mu.Unlock()
	switch {
	case err != nil && before == nil:
		r.log.Error("the registry takes no registrations", "error", err)
	case err == nil && before != nil:
		r.log.Info("the registry takes registrations again")
	}
}

func (r *Registry) sweep() {
	now := session.InstantOf(time.Now())
	for more := true; more; {
		r.mu.Lock()
		more = r.x.sweep(now, maxSwept)
		r.mu.Unlock()
	}
}

// step reads what is new, and writes what is pending until nothing is.
func (r *Registry) step(ctx context.Context) error {
	for {
		// What was heard is read before it is judged by what is known.
		if r.heard.Swap(false) || r.flight != nil || !r.loaded {
			if err := r.catchUp(ctx); err != nil {
				r.heard.Store(true)
				return err
			}
		}
		if r.flight == nil && !r.nextFlight() {
			return nil
		}
		err := r.append(ctx)
		if errors.Is(err, errBehind) {
			before := r.at.Seq
			if err = r.catchUp(ctx); err == nil && r.at.Seq == before && r.flight != nil {
				err = errBehind // not told yet what was faster
			}
		}
		if err != nil {
			return err
		}
	}
}

// nextFlight makes a batch of what is pending, and reports whether there is one.
// What needs no write is answered at once.
func (r *Registry) nextFlight() bool {
	r.in.Lock()
	units := r.pending
	r.pending = nil
	r.in.Unlock()
	f := &flight{at: r.at}
	type key struct {
		tenant string // of a note, its kind
		ref    Ref
		sort   byte
	}
	var touched map[key]bool
	var later []*unit
	size, taken := 0, 0
	number := r.x.next
	r.mu.RLock()
	for i, u := range units {
		if u.gone.Load() {
			taken += u.size
			continue
		}
		if size+u.size > maxUnitBytes || len(f.ops) >= maxBatchOps {
			later = append(later, units[i:]...)
			break
		}
		ops, err := u.judge(r.x)
		if err != nil || len(ops) == 0 {
			taken += u.size
			u.done <- err
			continue
		}
		need := u.size
		if ops[0].Agent != nil {
			// A change of state has the whole record. What a note needs was counted.
			if need, err = sizeOf(ops[0].Agent); err != nil || size+need > maxUnitBytes {
				later = append(later, u)
				continue
			}
		}
		// One that names what the batch changes already is judged when that is in
		// force.
		clash := false
		keyOf := func(o *op) key {
			switch {
			case o.Agent != nil:
				return key{o.Agent.Tenant, o.Agent.Ref, 'a'}
			case o.Note != nil: // of one kind, one at a time: they bound each other
				return key{tenant: o.Note.Kind, sort: 'k'}
			}
			return key{o.Session.Tenant, o.Session.Ref, 's'}
		}
		for i := range ops {
			clash = clash || touched[keyOf(&ops[i])]
		}
		if clash {
			later = append(later, u)
			continue
		}
		if touched == nil {
			touched = map[key]bool{}
		}
		for i := range ops {
			touched[keyOf(&ops[i])] = true
			ops[i].Number = number
			if ops[i].Note != nil {
				ops[i].Note.Revision = number
			}
			if ops[i].Agent != nil {
				ops[i].Agent.Revision = number
				if have := r.x.findAgent(ops[i].Agent.Tenant, ops[i].Agent.Ref); have != nil {
					ops[i].Number = have.number
				}
			}
			number++
		}
		size += need
		taken += u.size
		f.ops = append(f.ops, ops...)
		f.units = append(f.units, u)
	}
	r.mu.RUnlock()
	r.in.Lock()
	r.pending = append(later, r.pending...)
	r.pendingBytes -= taken
	r.in.Unlock()
	if len(f.units) == 0 {
		return false
	}
	r.flight = f
	return true
}

// land ends a flight: what it has is stored, if err is nil.
func (r *Registry) land(err error) {
	f := r.flight
	r.flight = nil
	for _, u := range f.units {
		u.done <- err
	}
}

// requeue judges the units of a flight again, before all others: it was not
// stored, and never will be.
func (r *Registry) requeue() {
	f := r.flight
	r.flight = nil
	r.in.Lock()
	defer r.in.Unlock()
	for _, u := range f.units {
		r.pendingBytes += u.size
	}
	r.pending = append(f.units, r.pending...)
}

// append sends the flight and applies it when it is stored. The error is
// errBehind when the end of the log is another than was read.
func (r *Registry) append(ctx context.Context) error {
	f := r.flight
	number := f.at.Number + 1
	if f.frame == nil {
		plain, err := json.Marshal(batch{Ops: f.ops})
		if err == nil {
			f.frame, err = r.sealer.seal(header{kindBatch, number, f.at.Head}, plain)
		}
		if errors.Is(err, ErrKey) {
			r.requeue()
			return err
		}
		if err != nil {
			r.land(err) // a defect: sizes were checked
			return nil
		}
		f.hash = hashOf(f.frame)
		own := nonceOf(f.frame)
		r.own.Store(&own)
	}
	if h := r.o.Hooks.BeforeAppend; h != nil {
		h(number)
	}
	ask, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	if err := r.asked(); err != nil {
		return err
	}
	ack, err := r.js.PublishMsg(ask, &nats.Msg{Subject: natsfeed.RegistrySubject, Data: f.frame},
		jetstream.WithExpectLastSequence(f.at.Seq), jetstream.WithExpectStream(natsfeed.RegistryStream))
	var api *jetstream.APIError
	if errors.As(err, &api) && (api.ErrorCode == jetstream.JSErrCodeStreamWrongLastSequence || api.ErrorCode == jetstream.JSErrCodeStreamWrongLastSequenceConstant) {
		r.mu.Lock()
		r.stats.Lost++
		r.mu.Unlock()
		return errBehind
	}
	if err != nil {
		return fmt.Errorf("registry: %w", err)
	}
	if h := r.o.Hooks.AfterAppend; h != nil {
		h(number)
	}
	r.apply(place{number, f.hash, ack.Sequence}, f.ops)
	r.grown(len(f.frame), true)
	r.mu.Lock()
	r.stats.Batches++
	r.stats.Records += uint64(len(f.ops))
	r.mu.Unlock()
	r.land(nil)
	return nil
}

// apply takes a stored batch into the index.
func (r *Registry) apply(at place, ops []op) {
	for len(ops) > 0 {
		// In pieces, so that nobody waits for long.
		n := min(len(ops), 256)
		r.mu.Lock()
		r.x.apply(ops[:n])
		r.mu.Unlock()
		ops = ops[n:]
	}
	r.mu.Lock()
	r.at = at
	r.mu.Unlock()
}

func (x *index) apply(ops []op) {
	for i := range ops {
		switch o := &ops[i]; {
		case o.Session != nil:
			x.putSession(o.Number, o.Session)
		case o.Agent != nil:
			x.putAgent(o.Number, o.Agent)
		case o.Note != nil:
			x.putNote(o.Number, o.Note)
		}
	}
}

func (r *Registry) asked() error {
	if h := r.o.Hooks.Ask; h != nil {
		return h()
	}
	return nil
}

// stream returns the handle of a stream with its state of now.
func (r *Registry) stream(ctx context.Context, name string) (jetstream.Stream, error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	if err := r.asked(); err != nil {
		return nil, err
	}
	s, err := r.js.Stream(ctx, name)
	if err != nil {
		return nil, fmt.Errorf("registry: stream %s: %w", name, err)
	}
	return s, nil
}

func (r *Registry) get(ctx context.Context, s jetstream.Stream, seq uint64, opts ...jetstream.GetMsgOpt) (*jetstream.RawStreamMsg, error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	if err := r.asked(); err != nil {
		return nil, err
	}
	return s.GetMsg(ctx, seq, opts...)
}

// catchUp reads the log to the end that it had when it was called, and finds out
// what has become of the flight.
func (r *Registry) catchUp(ctx context.Context) error {
	s, err := r.stream(ctx, natsfeed.RegistryStream)
	if err != nil {
		return err
	}
	state := s.CachedInfo().State
	if !r.loaded || state.LastSeq < r.at.Seq || state.FirstSeq > r.at.Seq+1 {
		// Not read yet, made anew or restored, or trimmed past what is known.
		if err := r.load(ctx, state); err != nil {
			return err
		}
	}
	for r.at.Seq < state.LastSeq {
		m, err := r.get(ctx, s, r.at.Seq+1, jetstream.WithGetMsgSubject(natsfeed.RegistrySubject))
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			// It was trimmed meanwhile, or a new leader is not there yet: what is
			// missing shows by the numbers.
			return fmt.Errorf("registry: message %d is not there", r.at.Seq+1)
		}
		if err != nil {
			return fmt.Errorf("registry: %w", err)
		}
		if err := r.take(m.Sequence, m.Data); err != nil {
			if errors.Is(err, ErrHole) {
				r.mu.Lock()
				r.loaded = false // a newer snapshot may cover it
				r.mu.Unlock()
			}
			return err
		}
	}
	r.mu.Lock()
	r.loaded = true
	r.mu.Unlock()
	if r.flight != nil && r.flight.at.Seq != r.at.Seq {
		r.requeue() // something else is where it would have been
	}
	return nil
}

// take takes a stored message in, or passes over it.
func (r *Registry) take(seq uint64, data []byte) error {
	skip := func(refused bool) error {
		r.mu.Lock()
		r.at.Seq = seq
		if refused {
			r.stats.Refused++
		}
		r.mu.Unlock()
		return nil
	}
	h, plain, err := r.sealer.open(data)
	switch {
	case errors.Is(err, errForeign):
		return skip(true)
	case err != nil:
		return err
	case h.kind != kindBatch:
		return skip(true)
	case h.number <= r.at.Number:
		return skip(false) // a snapshot has it
	case h.number > r.at.Number+1:
		return fmt.Errorf("%w: batch %d is followed by %d", ErrHole, r.at.Number, h.number)
	case h.prev != r.at.Head:
		return skip(true)
	}
	var b batch
	if err := json.Unmarshal(plain, &b); err != nil {
		return fmt.Errorf("%w: batch %d: %w", ErrUpgrade, h.number, err)
	}
	hash := hashOf(data)
	r.apply(place{h.number, hash, seq}, b.Ops)
	r.grown(len(data), false)
	if r.flight != nil && r.flight.hash == hash {
		r.land(nil) // its acknowledgement was lost
	}
	return nil
}
