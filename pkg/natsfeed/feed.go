package natsfeed

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/interlock-fabric/interlock/pkg/enforce"
	"github.com/interlock-fabric/interlock/pkg/session"
	"github.com/nats-io/nats.go"
)

// MaxReceiptLen bounds a receipt's frame.
const MaxReceiptLen = 60 << 10

var (
	// ErrClosed: the feed has been closed.
	ErrClosed = errors.New("natsfeed: closed")
	// ErrDisconnected: there is no connection to the bus at the moment.
	ErrDisconnected = errors.New("natsfeed: not connected to the bus")
	// ErrNoWriter: the bus is there, but no authority answers on it.
	ErrNoWriter = errors.New("natsfeed: no authority answers")
	// ErrRights: the bus refuses the feed its subjects. The connection is not
	// that of the enforcer named.
	ErrRights = errors.New("natsfeed: the connection has not the rights of the enforcer")
)

// Feed follows the bus for one enforcer. It implements enforce.Feed. Make it with
// Dial or New. Its methods may be called concurrently.
type Feed struct {
	nc     *nats.Conn
	name   string
	prefix string // of the inboxes
	owned  bool   // nc is closed with the feed

	done chan struct{} // closed first of all by Close
	end  sync.Once

	mu     sync.Mutex // held by Start and Close, never while a sink is called
	subs   []*nats.Subscription
	status chan nats.Status
	watch  sync.WaitGroup
	closed bool

	// gate is held for reading while the sink is called, so that Close can wait
	// until nobody calls it any more. open is under it.
	gate sync.RWMutex
	open bool

	oversize   atomic.Uint64
	overflowed atomic.Uint64 // of subscriptions that are gone
	reconnects atomic.Uint64
	requests   atomic.Uint64
}

var (
	_ enforce.SegmentFeed = (*Feed)(nil)
	_ enforce.OrderFeed   = (*Feed)(nil)
)

// New returns a feed over a connection that the host owns: Close leaves it open.
// The connection must be authenticated as the enforcer of that name. Its ping
// interval and reconnect wait decide how soon a dead server is noticed: see Dial
// for good ones. Errors of the name show in Start.
func New(nc *nats.Conn, enforcer string) *Feed {
	return &Feed{nc: nc, name: enforcer, prefix: InboxPrefix(enforcer), done: make(chan struct{})}
}

// NewAuthority is New for an enforcer that runs inside an authority, over the
// authority's own connection; hosts use Dial or New. The name must not be that of
// an enrolled enforcer: the writer tells by it who asks for its clock.
func NewAuthority(nc *nats.Conn, name string) *Feed {
	f := New(nc, name)
	f.prefix = nats.InboxPrefix + name // the only inboxes that an authority hears
	return f
}

// Stats are totals since the feed was made.
type Stats struct {
	// Overflowed counts messages dropped because the sink was too slow. They
	// are found again in the log.
	Overflowed uint64
	// Oversize counts messages dropped because they cannot be frames.
	Oversize uint64
	// Reconnects counts how often the link came up again.
	Reconnects uint64
	// Requests counts reads of the streams.
	Requests uint64
}

// Stats returns the totals.
func (f *Feed) Stats() Stats {
	s := Stats{
		Overflowed: f.overflowed.Load(), Oversize: f.oversize.Load(),
		Reconnects: f.reconnects.Load(), Requests: f.requests.Load(),
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, sub := range f.subs {
		if n, err := sub.Dropped(); err == nil {
			s.Overflowed += uint64(n)
		}
	}
	return s
}

// Start waits for the connection, subscribes, and returns once the server has the
// subscriptions. An error leaves nothing behind and Start may be called again; it wraps ErrRights when
// trying again is of no use. After success it must not be called again. The
// sink's methods are each called by one goroutine at a time; a method of the sink
// must not call Close. A bus that refuses emergency orders alone is done without
// them.
func (f *Feed) Start(ctx context.Context, sink enforce.Sink) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case f.closed:
		return ErrClosed
	case f.status != nil:
		return errors.New("natsfeed: started twice")
	case !session.ValidEnforcerName(f.name):
		return fmt.Errorf("%w: enforcer name", session.ErrInvalid)
	}
	ctx, cancel := f.until(ctx)
	defer cancel()
	f.gate.Lock()
	f.open = true
	f.gate.Unlock()
	f.status = f.nc.StatusChanged()
	err := f.connected(ctx)
	if err == nil {
		err = f.subscribe(ctx, sink)
	}
	if err != nil {
		f.unsubscribe()
		return err
	}
	status := f.status
	f.watch.Go(func() { f.follow(status, sink) })
	return nil
}

// until returns a context that ends with the feed, too.
func (f *Feed) until(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	f.watch.Go(func() {
		select {
		case <-f.done:
			cancel(ErrClosed)
		case <-ctx.Done():
		}
	})
	return ctx, func() { cancel(context.Canceled) }
}

// connected waits for the connection: what nats.go is asked to flush before there
// is one is not answered when it comes.
func (f *Feed) connected(ctx context.Context) error {
	for !f.nc.IsConnected() {
		if f.nc.IsClosed() {
			return fmt.Errorf("natsfeed: %w", nats.ErrConnectionClosed)
		}
		select {
		case <-f.status:
		case <-ctx.Done():
			err := fmt.Errorf("%w: %w", ErrDisconnected, context.Cause(ctx))
			if why := f.nc.LastError(); why != nil {
				// nats.go tells nobody else of a refusal before the first success.
				err = fmt.Errorf("%w: %w", err, why)
			}
			return err
		}
	}
	return nil
}

func (f *Feed) subscribe(ctx context.Context, sink enforce.Sink) error {
	before := f.nc.LastError()
	// What may wait for the sink before it is dropped: a batch is at most
	// session.MaxFrameLen, a heartbeat some 300 bytes.
	err := errors.Join(
		f.hear(LogSubject, sink.Batch, 4096, 32<<20),
		f.hear(BeatSubject, sink.Beat, 1024, 4<<20),
		f.hear(TrustSubject, sink.KeySet, 64, 32<<20),
	)
	if err != nil {
		return err
	}
	// The inbox is subscribed to when it is needed; whether it may be shows now.
	probe, err := f.nc.SubscribeSync(f.prefix + ".start")
	if err != nil {
		return fmt.Errorf("natsfeed: subscribe: %w", err)
	}
	err = flush(ctx, f.nc)
	_ = probe.Unsubscribe() // fails only with the connection
	if err != nil {
		return fmt.Errorf("natsfeed: subscribe: %w", err)
	}
	// The server's refusal comes before its answer to the flush. Without this a
	// feed of the wrong name would be deaf without a word.
	if err := f.nc.LastError(); err != nil && !errors.Is(err, before) && errors.Is(err, nats.ErrPermissionViolation) {
		return fmt.Errorf("%w: %v", ErrRights, err)
	}
	// A bus whose accounts are from before there were orders refuses this one, and
	// says so to the connection's error handler: the rest is of use without it.
	if err := f.hear(OrderSubjects, sink.Order, 256, 1<<20); err != nil {
		return err
	}
	if err := flush(ctx, f.nc); err != nil {
		return fmt.Errorf("natsfeed: subscribe: %w", err)
	}
	return nil
}

// hear subscribes to a subject: of its messages so many, of so many bytes, may wait.
func (f *Feed) hear(subject string, deliver func([]byte), messages, bytes int) error {
	sub, err := f.nc.Subscribe(subject, func(m *nats.Msg) {
		if len(m.Data) > session.MaxFrameLen {
			f.oversize.Add(1)
			return
		}
		f.gate.RLock()
		defer f.gate.RUnlock()
		if f.open {
			deliver(m.Data)
		}
	})
	if err != nil {
		return fmt.Errorf("natsfeed: subscribe: %w", err)
	}
	f.subs = append(f.subs, sub)
	if err := sub.SetPendingLimits(messages, bytes); err != nil {
		return fmt.Errorf("natsfeed: subscribe: %w", err)
	}
	return nil
}

// flush waits until the server has all that was sent.
func flush(ctx context.Context, nc *nats.Conn) error {
	if _, ok := ctx.Deadline(); ok {
		return nc.FlushWithContext(ctx)
	}
	// nats.go demands a deadline.
	ctx, cancel := context.WithTimeout(ctx, nats.DefaultTimeout)
	defer cancel()
	return nc.FlushWithContext(ctx)
}

// follow tells the sink of the link until the status channel is closed.
func (f *Feed) follow(status <-chan nats.Status, sink enforce.Sink) {
	up := false
	tell := func(now bool) {
		f.gate.RLock()
		defer f.gate.RUnlock()
		if f.open && (now || up) {
			sink.Connected(now)
		}
		up = now
	}
	tell(true) // or Start would have failed; what came after is in the channel
	for s := range status {
		if s == nats.CONNECTED {
			f.reconnects.Add(1)
		}
		tell(s == nats.CONNECTED)
	}
}

// unsubscribe undoes subscribe. f.mu is held.
func (f *Feed) unsubscribe() {
	f.gate.Lock()
	f.open = false
	f.gate.Unlock()
	for _, sub := range f.subs {
		if n, err := sub.Dropped(); err == nil {
			f.overflowed.Add(uint64(n))
		}
		// It fails only when the connection is gone, and the subscription with
		// it.
		_ = sub.Unsubscribe()
	}
	f.subs = nil
	if f.status != nil {
		f.nc.RemoveStatusListener(f.status)
		f.status = nil
	}
}

// Close ends delivery, makes running calls of Log, KeySets and Clock return
// ErrClosed, and closes the connection if Dial made it. It may be called more
// than once; every call returns when no sink is being called any more.
func (f *Feed) Close() error {
	f.end.Do(func() { close(f.done) })
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.closed {
		f.closed = true
		f.unsubscribe()
		if f.owned {
			f.nc.Close()
		}
	}
	f.watch.Wait()
	return nil
}

// Receipt publishes a receipt of at most MaxReceiptLen. It neither waits for it
// to be stored nor keeps it: while there is no connection it fails with
// ErrDisconnected, since a receipt is cumulative and the next one says more.
func (f *Feed) Receipt(ctx context.Context, frame []byte) error {
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case len(frame) > MaxReceiptLen:
		return fmt.Errorf("%w: receipt of %d bytes, at most %d", session.ErrInvalid, len(frame), MaxReceiptLen)
	}
	return f.publish(&nats.Msg{Subject: ReceiptSubject(f.name), Data: frame})
}

// Report publishes a report of at most session.MaxReportLen and returns when the
// server has taken it, which is not yet when it is stored. After an error, of
// which ErrDisconnected and ctx's are the usual ones, it may have it or not. It
// makes a Feed a trail.Publisher.
func (f *Feed) Report(ctx context.Context, frame []byte) error {
	if len(frame) > session.MaxReportLen {
		return fmt.Errorf("%w: report of %d bytes, at most %d", session.ErrInvalid, len(frame), session.MaxReportLen)
	}
	if err := f.publish(&nats.Msg{Subject: ReportSubject(f.name), Data: frame}); err != nil {
		return err
	}
	if err := flush(ctx, f.nc); err != nil {
		return fmt.Errorf("natsfeed: report: %w", err)
	}
	return nil
}

// publish sends at once or not at all.
func (f *Feed) publish(m *nats.Msg) error {
	select {
	case <-f.done:
		return ErrClosed
	default:
	}
	if !f.nc.IsConnected() {
		return ErrDisconnected
	}
	if err := f.nc.PublishMsg(m); err != nil {
		if errors.Is(err, nats.ErrReconnectBufExceeded) {
			return ErrDisconnected
		}
		return fmt.Errorf("natsfeed: publish: %w", err)
	}
	return nil
}
