package natsfeed

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	mrand "math/rand/v2"
	"strconv"
	"time"

	"github.com/interlock-fabric/interlock/pkg/session"
	"github.com/nats-io/nats.go"
)

const (
	directGet = "$JS.API.DIRECT.GET."

	// One request answers at most so many messages and, but for the last of
	// them, bytes: the server cuts a client that lets 32 MiB wait. A feed has one
	// request out at a time.
	pieceMessages = 256
	pieceBytes    = 1 << 20
	// How many bytes it asks for follows from how long the last answer took: twice
	// as many after a quick one, half after a slow one. So what a hundred
	// enforcers that start together have in flight is what the server can send in
	// about slow, and an append waits no longer than that for the reads before it.
	pieceFirst = 256 << 10
	pieceLeast = 64 << 10
	quick      = 150 * time.Millisecond
	slow       = 500 * time.Millisecond

	// silence is how long an answer may pause before it is asked for again,
	// and attempts how often that is done without any progress.
	silence  = 2 * time.Second
	attempts = 6
	// retryFirst doubles with each attempt, more or less at random: together some
	// 3 s, a restart of the server.
	retryFirst = 50 * time.Millisecond
	// A stream that ends before the position asked for is believed to have been
	// made anew when shorter is said so often, and not by one replica that is
	// behind.
	shorter = 4

	maxKeySets = 64
)

// errCut: an answer stopped before its end.
var errCut = errors.New("natsfeed: the server's answer stopped")

// Log reads the stored batches as enforce.Feed says, in pieces of at most
// 1.5 MiB and less when the server is slow, and goes on by position over lost answers, restarts and reconnections
// of a few seconds. Positions ascend; a deleted message leaves a gap. When the
// stream ends before from, because it was restored or made anew, it is read from
// its first message. Messages that cannot be frames are passed over and counted.
// fn is called by the caller's own goroutine. Errors wrap ErrDisconnected,
// ErrClosed, nats.ErrNoResponders when the stream does not answer, or ctx's.
func (f *Feed) Log(ctx context.Context, from uint64, fn func(pos uint64, frame []byte) error) (uint64, error) {
	return f.read(ctx, LogStream, "", from, fn)
}

// KeySets returns the newest 64 stored key sets. Errors are as Log's.
func (f *Feed) KeySets(ctx context.Context) ([][]byte, error) {
	return f.newest(ctx, TrustStream, "", maxKeySets)
}

// Orders reads the stored emergency orders, oldest first, unverified, and calls fn
// with each. Errors are as Log's.
func (f *Feed) Orders(ctx context.Context, fn func(frame []byte) error) error {
	_, err := f.read(ctx, OrderStream, "", 0, func(_ uint64, frame []byte) error { return fn(frame) })
	return err
}

// newest returns the newest frames, at most so many of them, oldest first.
func (f *Feed) newest(ctx context.Context, stream, subject string, most int) ([][]byte, error) {
	var out [][]byte
	_, err := f.read(ctx, stream, subject, 0, func(_ uint64, frame []byte) error {
		if len(out) == most {
			out = append(out[:0], out[1:]...)
		}
		out = append(out, frame)
		return nil
	})
	if err != nil {
		return nil, err
	}
	return out, nil
}

// Clock asks the writer for its clock. It waits for the first answer until ctx
// ends; without a writer on the bus it fails at once with ErrNoWriter.
func (f *Feed) Clock(ctx context.Context, nonce [32]byte) ([]byte, error) {
	in, err := f.inbox(1)
	if err != nil {
		return nil, err
	}
	defer in.close()
	if err := in.ask(ClockSubject(f.name), nonce[:]); err != nil {
		return nil, err
	}
	m, err := in.next(ctx, 0)
	switch {
	case err != nil:
		return nil, err
	case m.Header.Get("Status") == "503":
		return nil, ErrNoWriter
	case len(m.Data) > session.MaxFrameLen:
		f.oversize.Add(1)
		return nil, fmt.Errorf("%w: clock answer of %d bytes", session.ErrMalformed, len(m.Data))
	}
	return m.Data, nil
}

// read reads what is on one subject of a stream, or all of it.
func (f *Feed) read(ctx context.Context, stream, subject string, from uint64, fn func(uint64, []byte) error) (uint64, error) {
	pos := max(from, 1)
	in, err := f.inbox(pieceMessages + 1)
	if err != nil {
		return pos, err
	}
	defer in.close()
	size := pace(pieceFirst)
	for failed, short := 0, 0; ; {
		in.waited = 0
		next, last, err := in.piece(ctx, stream, subject, pos, int(size), fn)
		rest := size.took(in.waited)
		if next > pos {
			failed, short = 0, 0
		}
		pos = next
		var own callbackError
		switch {
		case errors.As(err, &own):
			return pos, own.error
		case errors.Is(err, ErrClosed) || ctx.Err() != nil:
			return pos, err
		case err == nil && last == nil:
			if rest > 0 {
				if err := f.wait(ctx, rest); err != nil {
					return pos, err
				}
			}
			continue
		case err == nil && *last+1 >= pos:
			return pos, nil
		case err == nil:
			if short++; short == shorter {
				pos, short = 1, 0
				continue
			}
		default:
			if failed++; failed == attempts {
				return pos, err
			}
		}
		if err := f.wait(ctx, jitter(retryFirst<<min(max(failed, short)-1, 10))); err != nil {
			return pos, err
		}
	}
}

// jitter returns d give or take its half, so that those who failed together do
// not come back together.
func jitter(d time.Duration) time.Duration {
	return d/2 + mrand.N(d) //nolint:gosec // jitter is no secret
}

// pace is how many bytes to ask for next.
type pace int

// took adapts it to how long the answer took, and returns how long to leave the
// server to others: not at all, unless it is slow.
func (p *pace) took(d time.Duration) time.Duration {
	switch {
	case d <= quick:
		*p = min(2**p, pieceBytes)
	case d >= slow:
		*p = max(*p/2, pieceLeast)
		return mrand.N(d) //nolint:gosec // jitter is no secret
	}
	return 0
}

func (f *Feed) wait(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-f.done:
		return ErrClosed
	case <-ctx.Done():
		return ctx.Err()
	}
}

// callbackError marks an error of the caller's own function.
type callbackError struct{ error }

// inbox takes the answers to a sequence of requests. Each has a subject of its
// own, so that what is left of one is not taken for the next.
type inbox struct {
	f       *Feed
	sub     *nats.Subscription
	ch      chan *nats.Msg
	prefix  string
	n       int
	current string
	waited  time.Duration // for answers
}

func (f *Feed) inbox(size int) (*inbox, error) {
	select {
	case <-f.done:
		return nil, ErrClosed
	default:
	}
	if !session.ValidEnforcerName(f.name) {
		return nil, fmt.Errorf("%w: enforcer name", session.ErrInvalid)
	}
	in := &inbox{f: f, ch: make(chan *nats.Msg, size), prefix: f.prefix + "." + rand.Text() + "."}
	var err error
	if in.sub, err = f.nc.ChanSubscribe(in.prefix+"*", in.ch); err != nil {
		if errors.Is(err, nats.ErrConnectionClosed) {
			return nil, ErrDisconnected
		}
		return nil, fmt.Errorf("natsfeed: inbox: %w", err)
	}
	return in, nil
}

// close fails only when the connection is gone, and the subscription with it.
func (in *inbox) close() { _ = in.sub.Unsubscribe() }

func (in *inbox) ask(subject string, data []byte) error {
	in.n++
	in.current = in.prefix + strconv.Itoa(in.n)
	return in.f.publish(&nats.Msg{Subject: subject, Reply: in.current, Data: data})
}

// next waits for a message that answers the current request; patience 0 is as
// long as ctx.
func (in *inbox) next(ctx context.Context, patience time.Duration) (*nats.Msg, error) {
	began := time.Now()
	defer func() { in.waited += time.Since(began) }()
	var late <-chan time.Time
	if patience > 0 {
		t := time.NewTimer(patience)
		defer t.Stop()
		late = t.C
	}
	for {
		select {
		case m := <-in.ch:
			if m != nil && m.Subject == in.current {
				return m, nil
			}
			if m == nil { // closed with the connection
				return nil, ErrDisconnected
			}
		case <-late:
			return nil, errCut
		case <-in.f.done:
			return nil, ErrClosed
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// piece reads once from pos and returns the position to go on from. last is set
// when the end of the stream was reached: its last position as far as known.
func (in *inbox) piece(ctx context.Context, stream, subject string, pos uint64, size int, fn func(uint64, []byte) error) (next uint64, last *uint64, err error) {
	in.f.requests.Add(1)
	req := fmt.Appendf(nil, `{"seq":%d,"batch":%d,"max_bytes":%d}`, pos, pieceMessages, size)
	if subject != "" {
		req = fmt.Appendf(nil, `{"seq":%d,"next_by_subj":%q,"batch":%d,"max_bytes":%d}`, pos, subject, pieceMessages, size)
	}
	if err := in.ask(directGet+stream, req); err != nil {
		return pos, nil, err
	}
	// The chan holds a whole answer, and the server was asked for no more.
	for n := 0; n <= pieceMessages; n++ {
		m, err := in.next(ctx, silence)
		if err != nil {
			return pos, nil, err
		}
		switch status := m.Header.Get("Status"); status {
		case "":
		case "204":
			if m.Header.Get("Nats-Num-Pending") != "0" {
				if n == 0 {
					return pos, nil, errCut
				}
				return pos, nil, nil
			}
			end := pos - 1
			return pos, &end, nil
		case "404":
			if n > 0 || pos == 1 {
				end := pos - 1
				return pos, &end, nil
			}
			end, err := in.end(ctx, stream)
			return pos, end, err
		case "503":
			return pos, nil, fmt.Errorf("natsfeed: stream %s: %w", stream, nats.ErrNoResponders)
		default:
			return pos, nil, fmt.Errorf("natsfeed: stream %s: the server answers %s %.64q", stream, status, m.Header.Get("Description"))
		}
		at, err := strconv.ParseUint(m.Header.Get("Nats-Sequence"), 10, 64)
		if err != nil || at < pos || at == 1<<64-1 {
			return pos, nil, fmt.Errorf("natsfeed: stream %s: answer without a position to follow %d", stream, pos)
		}
		if len(m.Data) > session.MaxFrameLen {
			in.f.oversize.Add(1)
		} else if err := fn(at, m.Data); err != nil {
			return pos, nil, callbackError{err}
		}
		pos = at + 1
	}
	return pos, nil, nil
}

// end asks for the position of the stream's last message; 0 when it is empty.
func (in *inbox) end(ctx context.Context, stream string) (*uint64, error) {
	in.f.requests.Add(1)
	if err := in.ask(directGet+stream, []byte(`{"last_by_subj":">"}`)); err != nil {
		return nil, err
	}
	m, err := in.next(ctx, silence)
	if err != nil {
		return nil, err
	}
	var last uint64
	switch m.Header.Get("Status") {
	case "404":
	case "":
		if last, err = strconv.ParseUint(m.Header.Get("Nats-Sequence"), 10, 64); err != nil {
			return nil, fmt.Errorf("natsfeed: stream %s: last message without a position", stream)
		}
	default:
		return nil, fmt.Errorf("natsfeed: stream %s: the server answers %s", stream, m.Header.Get("Status"))
	}
	return &last, nil
}
