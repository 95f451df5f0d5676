package feedtest

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/interlock-fabric/interlock/pkg/enforce"
	"github.com/interlock-fabric/interlock/pkg/session"
)

var (
	errDown   = errors.New("feedtest: the bus is down")
	errClosed = errors.New("feedtest: closed")
)

// Memory is a bus in memory. It delivers before Append, Beat and KeySet return, so
// that a test needs no waiting. Make it with NewMemory.
type Memory struct {
	mu       sync.Mutex
	log      []stored
	next     uint64
	keySets  [][]byte
	feeds    map[*memoryFeed]bool
	answer   func([]byte) []byte
	receipts chan []byte
	down     bool
	changed  chan struct{} // closed when down changes
}

type stored struct {
	pos   uint64
	frame []byte
}

// NewMemory returns an empty bus that is up.
func NewMemory() *Memory {
	return &Memory{next: 1, feeds: map[*memoryFeed]bool{}, receipts: make(chan []byte, 1024), changed: make(chan struct{})}
}

// Feed implements Bus.
func (m *Memory) Feed(testing.TB) enforce.Feed {
	return &memoryFeed{bus: m, done: make(chan struct{})}
}

func (m *Memory) each(f func(enforce.Sink)) {
	for feed := range m.feeds {
		f(feed.sink)
	}
}

// Append implements Bus.
func (m *Memory) Append(_ testing.TB, frames ...[]byte) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, f := range frames {
		m.log = append(m.log, stored{m.next, clone(f)})
		m.next++
		if len(f) <= session.MaxFrameLen && !m.down {
			m.each(func(s enforce.Sink) { s.Batch(clone(f)) })
		}
	}
}

// Delete implements Bus.
func (m *Memory) Delete(_ testing.TB, pos uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for i, s := range m.log {
		if s.pos == pos {
			m.log = append(m.log[:i:i], m.log[i+1:]...)
			return
		}
	}
}

// Beat implements Bus.
func (m *Memory) Beat(_ testing.TB, frame []byte) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.down {
		m.each(func(s enforce.Sink) { s.Beat(clone(frame)) })
	}
}

// KeySet implements Bus.
func (m *Memory) KeySet(_ testing.TB, frame []byte) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.keySets = append(m.keySets, clone(frame))
	m.keySets = m.keySets[max(0, len(m.keySets)-64):]
	if !m.down {
		m.each(func(s enforce.Sink) { s.KeySet(clone(frame)) })
	}
}

// AnswerClock implements Bus.
func (m *Memory) AnswerClock(_ testing.TB, answer func([]byte) []byte) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.answer = answer
}

// Receipt implements Bus.
func (m *Memory) Receipt(t testing.TB) []byte {
	t.Helper()
	select {
	case r := <-m.receipts:
		return r
	case <-time.After(patience):
		t.Fatal("no receipt")
		return nil
	}
}

func (m *Memory) set(down bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.down == down {
		return
	}
	m.down = down
	close(m.changed)
	m.changed = make(chan struct{})
	m.each(func(s enforce.Sink) { s.Connected(!down) })
}

// Down implements Bus.
func (m *Memory) Down(testing.TB) { m.set(true) }

// Up implements Bus.
func (m *Memory) Up(testing.TB) { m.set(false) }

// Recreate implements Bus.
func (m *Memory) Recreate(testing.TB) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.log, m.next = nil, 1
}

// memoryFeed is one enforcer's. Its sink is called under the bus's lock.
type memoryFeed struct {
	bus  *Memory
	sink enforce.Sink
	done chan struct{}
	once sync.Once
}

func (f *memoryFeed) usable(ctx context.Context) error {
	select {
	case <-f.done:
		return errClosed
	case <-ctx.Done():
		return ctx.Err()
	default:
		return nil
	}
}

func (f *memoryFeed) Start(ctx context.Context, sink enforce.Sink) error {
	for {
		if err := f.usable(ctx); err != nil {
			return err
		}
		f.bus.mu.Lock()
		if !f.bus.down {
			f.sink = sink
			f.bus.feeds[f] = true
			sink.Connected(true)
			f.bus.mu.Unlock()
			return nil
		}
		changed := f.bus.changed
		f.bus.mu.Unlock()
		select {
		case <-changed:
		case <-f.done:
		case <-ctx.Done():
		}
	}
}

func (f *memoryFeed) Log(ctx context.Context, from uint64, fn func(uint64, []byte) error) (uint64, error) {
	for pos := max(from, 1); ; {
		if err := f.usable(ctx); err != nil {
			return pos, err
		}
		f.bus.mu.Lock()
		if f.bus.down {
			f.bus.mu.Unlock()
			return pos, errDown
		}
		if f.bus.next < pos {
			pos = 1
		}
		var next *stored
		for i := range f.bus.log {
			if f.bus.log[i].pos >= pos {
				s := f.bus.log[i]
				next = &s
				break
			}
		}
		f.bus.mu.Unlock()
		if next == nil {
			return pos, nil
		}
		if len(next.frame) <= session.MaxFrameLen {
			if err := fn(next.pos, clone(next.frame)); err != nil {
				return pos, err
			}
		}
		pos = next.pos + 1
	}
}

func (f *memoryFeed) KeySets(ctx context.Context) ([][]byte, error) {
	if err := f.usable(ctx); err != nil {
		return nil, err
	}
	f.bus.mu.Lock()
	defer f.bus.mu.Unlock()
	if f.bus.down {
		return nil, errDown
	}
	var out [][]byte
	for _, k := range f.bus.keySets {
		out = append(out, clone(k))
	}
	return out, nil
}

func (f *memoryFeed) Clock(ctx context.Context, nonce [32]byte) ([]byte, error) {
	if err := f.usable(ctx); err != nil {
		return nil, err
	}
	f.bus.mu.Lock()
	answer, down := f.bus.answer, f.bus.down
	f.bus.mu.Unlock()
	if down || answer == nil {
		return nil, errDown
	}
	if a := answer(nonce[:]); a != nil {
		return a, nil
	}
	select {
	case <-f.done:
		return nil, errClosed
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (f *memoryFeed) Receipt(ctx context.Context, frame []byte) error {
	if err := f.usable(ctx); err != nil {
		return err
	}
	f.bus.mu.Lock()
	defer f.bus.mu.Unlock()
	if f.bus.down {
		return errDown
	}
	if len(frame) > 60<<10 {
		return session.ErrInvalid
	}
	select {
	case f.bus.receipts <- clone(frame):
	default: // as a stream that discards
	}
	return nil
}

func (f *memoryFeed) Close() error {
	f.once.Do(func() { close(f.done) })
	f.bus.mu.Lock()
	defer f.bus.mu.Unlock()
	delete(f.bus.feeds, f)
	return nil
}
