package sequencer

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/interlock-fabric/interlock/pkg/natsfeed"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

const leaseKey = "writer"

// lease is the key-value entry that names the writer: "holder count". The count
// makes each renewal's value its own, so that one whose answer was lost can be
// told from another's.
type lease struct {
	s      *Sequencer
	kv     jetstream.KeyValue
	holder string
	count  uint64
	held   bool
	rev    uint64
	value  string
	seen   time.Time // when rev was first seen, by this process's clock
}

// holdLease takes part in the lease until Close: it takes it when nobody has
// renewed it for its duration, and renews it five times as often. Nobody's wall
// clock matters.
func (s *Sequencer) holdLease() {
	var id [8]byte
	_, _ = rand.Read(id[:]) // crypto/rand never fails
	l := &lease{s: s, holder: hex.EncodeToString(id[:]), seen: time.Now()}
	defer l.release()
	every := s.o.Lease / 5
	look := min(every, 250*time.Millisecond)
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-s.ctx.Done():
			return
		case <-s.leaseNow:
		case <-timer.C:
		}
		if err := l.step(); err != nil && s.ctx.Err() == nil {
			s.log.Debug("sequencer: lease", "err", err)
		}
		if l.held {
			timer.Reset(every)
		} else {
			timer.Reset(look)
		}
	}
}

// checkLease makes the lease be looked at now.
func (s *Sequencer) checkLease() {
	select {
	case s.leaseNow <- struct{}{}:
	default:
	}
}

func (l *lease) step() error {
	s := l.s
	ctx, cancel := context.WithTimeout(s.ctx, 2*time.Second)
	defer cancel()
	if u := s.o.Hooks.Usurp; u != nil && u() {
		now := time.Now()
		s.post(func() { s.w.leaseProven(now) })
		return nil
	}
	if l.kv == nil {
		kv, err := s.js.KeyValue(ctx, natsfeed.LeaseBucket)
		if err != nil {
			return err
		}
		l.kv = kv
	}
	if _, _, err := s.signer(); err != nil {
		l.release() // somebody else may be able to sign
		s.post(s.w.unelected)
		return err
	}
	if l.held {
		// A writer that stands still must lose its lease.
		alive := make(chan struct{})
		s.post(func() { close(alive) })
		select {
		case <-alive:
		case <-ctx.Done():
			l.held = false
			return errors.New("the writer stands still")
		}
		return l.put(ctx)
	}
	if err := l.look(ctx); err != nil {
		return err
	}
	if l.held {
		return nil
	}
	free := l.rev == 0 || l.value == "" || time.Since(l.seen) >= s.o.Lease
	if !free {
		s.post(s.w.unelected)
		return nil
	}
	return l.put(ctx)
}

// look reads the entry from the bucket's leader.
func (l *lease) look(ctx context.Context) error {
	m, err := l.s.nc.RequestWithContext(ctx, msgGet+"KV_"+natsfeed.LeaseBucket,
		fmt.Appendf(nil, `{"last_by_subj":"$KV.%s.%s"}`, natsfeed.LeaseBucket, leaseKey))
	if err != nil {
		return err
	}
	e, err := parseStored(m)
	if err != nil {
		return err
	}
	var rev uint64
	var value string
	if e != nil {
		rev, value = e.Seq, string(e.Data)
	}
	if rev != l.rev || value != l.value {
		l.rev, l.value, l.seen = rev, value, time.Now()
	}
	l.held = strings.HasPrefix(value, l.holder+" ")
	return nil
}

// put takes or renews the lease.
func (l *lease) put(ctx context.Context) error {
	s := l.s
	sent := time.Now()
	l.count++
	value := fmt.Sprintf("%s %d", l.holder, l.count)
	rev, err := l.kv.Update(ctx, leaseKey, []byte(value), l.rev)
	if err != nil {
		var api *jetstream.APIError
		if !errors.As(err, &api) || !(&apiError{ErrCode: int(api.ErrorCode)}).wrongLast() {
			// Whether it arrived is not known. Nobody can have taken the lease
			// from the same revision if it did, so going on is right until the
			// store says otherwise.
			return err
		}
		if err := l.look(ctx); err != nil {
			return err
		}
		if !l.held {
			s.post(s.w.unelected)
			return nil
		}
		return nil // an earlier renewal had arrived; the next one proves it
	}
	l.rev, l.value, l.seen, l.held = rev, value, sent, true
	s.post(func() { s.w.leaseProven(sent) })
	return nil
}

// release lets a successor take over at once.
func (l *lease) release() {
	if !l.held || l.kv == nil || l.s.nc.Status() != nats.CONNECTED {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	l.held = false
	_, _ = l.kv.Update(ctx, leaseKey, nil, l.rev) // otherwise it runs out
}

// leaseProven is called when the lease was taken or renewed by an operation that
// was sent at that time.
func (w *writer) leaseProven(sent time.Time) {
	switch w.role {
	case following:
		w.elected(sent)
	case writing:
		w.lease = true
		w.beat.prove(sent)
	default:
		w.lease = true
	}
}
