package main

import (
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/interlock-fabric/interlock/pkg/enforce"
	"github.com/interlock-fabric/interlock/pkg/filter"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// world is an authority and its bus in this process, without a network between:
// it publishes a segment, signs batches and heartbeats, and answers clocks. What
// it makes in advance it signs in advance, so that while enforcers are measured
// it costs next to nothing. Its state rests in files.
type world struct {
	*keys
	keySet []byte
	writer session.WriterID
	born   time.Time
	path   string // of the segment
	ref    []byte // its signed description

	base, last moment      // in the segment, and signed so far
	state      *filter.Set // at last; nil once nothing more is to be signed
	stop       context.CancelFunc
	done       sync.WaitGroup

	mu    sync.Mutex
	log   [][]byte // behind the segment
	head  moment   // published
	sinks []enforce.Sink
}

// moment is a place in the log.
type moment struct {
	number uint64
	head   session.Hash
	state  session.StateDigest
}

// signed is a batch that is ready to be published.
type signed struct {
	frame []byte
	at    moment
}

const tenant = "acme"

// keys are those of an authority and of its one enforcer.
type keys struct {
	root, key  ed25519.PrivateKey
	enrollment *session.Enrollment
}

func newKeys() (*keys, error) {
	pub, root, err := ed25519.GenerateKey(nil)
	if err != nil {
		return nil, err
	}
	_, key, err := ed25519.GenerateKey(nil)
	if err != nil {
		return nil, err
	}
	k := &keys{root, key, &session.Enrollment{Enforcer: "bench", Root: pub, ReceiptKey: key}}
	return k, k.enrollment.AddTenant(1, tenant, make([]byte, 32))
}

// callers returns as many identities of eight keys as take turns, whose names begin with prefix.
func (k *keys) callers(prefix string) ([]*session.Prepared, error) {
	out := make([]*session.Prepared, identities)
	for i := range out {
		var err error
		if out[i], err = k.enrollment.Tenants[0].Prepare(identity(fmt.Sprint(prefix, i))); err != nil {
			return nil, err
		}
	}
	return out, nil
}

const issuer = "https://idp.example"

// identity has a token, a session with two ancestors, a user, two agents and a
// client, all of them its own.
func identity(name string) session.Identity {
	return session.Identity{
		Tenant: tenant, Issuer: issuer, Token: "t" + name, Session: session.SessionRef{ID: "s" + name},
		Ancestors: []session.SessionRef{{ID: "p" + name}, {ID: "q" + name}}, User: "u" + name,
		Actors: []session.Actor{{ID: "a" + name}, {ID: "b" + name}}, Client: "c" + name,
	}
}

// segment makes a segment of n random entries of the kinds given, and of those
// that revoke the sessions of the callers given; once in a run for each name.
func (b *bench) segment(name string, n int, of []session.Kind, revoked []*session.Prepared) (path string, err error) {
	path = filepath.Join(b.shared, fmt.Sprint(name, "-", n))
	if _, err := os.Stat(path); err == nil {
		return path, nil
	}
	// On the heap, and merged only when Apply does so by itself: the result is
	// the same, and is there much sooner.
	var s *filter.Set
	batches(n, 1, of, func(x *session.Batch) { s = s.Apply(x, nil) })
	number := uint64(n)
	for len(revoked) > 0 {
		part := revoked[:min(len(revoked), session.MaxBatchEntries)]
		revoked = revoked[len(part):]
		number++
		x := &session.Batch{Epoch: 1, Number: number, Time: session.InstantOf(time.Now())}
		for _, p := range part {
			x.Entries = append(x.Entries, revokeSession(p))
		}
		s = s.Apply(x, nil)
	}
	// Nobody will ask for the batches behind it: only the newest one's hash is
	// ever looked at.
	g, err := s.Seal(path, filter.Mark{Epoch: 1, Number: number, Head: session.Hash{1}, Time: session.InstantOf(time.Now())})
	if err != nil {
		return "", err
	}
	return path, g.Close()
}

// revokeSession is the entry that revokes a caller's session.
func revokeSession(p *session.Prepared) session.Entry {
	e := session.Entry{Op: session.OpSet, Effect: session.EffectRevoked, Reason: session.ReasonCompromised, Incident: incident}
	for _, k := range p.Keys() {
		if k.Shape == session.Shape(session.KindSession) {
			e.Key = k
			break // its own comes before its ancestors'
		}
	}
	return e
}

// revokedWorld makes a world of n random entries, and of those that revoke the
// callers it returns.
func (b *bench) revokedWorld(n int) (w *world, gone []*session.Prepared, err error) {
	k, err := newKeys()
	if err != nil {
		return nil, nil, err
	}
	if gone, err = k.callers("gone"); err != nil {
		return nil, nil, err
	}
	path, err := b.segment("revoked", n, kinds, gone)
	if err != nil {
		return nil, nil, err
	}
	w, err = newWorld(k, path)
	return w, gone, err
}

// newWorld makes a world whose log begins behind the segment in a file.
func newWorld(k *keys, path string) (*world, error) {
	w := &world{keys: k, born: time.Now(), path: path}
	w.writer[0] = 1
	now := session.InstantOf(time.Now())
	ks := session.KeySet{
		Version: 1, Epoch: 1, Issued: now, NotAfter: now.Add(24 * time.Hour), Tenants: []session.Tenant{{ID: 1, Name: tenant}},
		Keys: []session.SigningKey{{Public: w.key.Public().(ed25519.PublicKey), Use: session.UseWriter}},
	}
	body, err := ks.MarshalBody()
	if err == nil {
		w.keySet, err = session.Seal(session.TypeKeySet, body, w.root)
	}
	if err != nil {
		return nil, err
	}
	g, err := filter.OpenSegment(path)
	if err != nil {
		return nil, err
	}
	m := g.Mark()
	w.state = g.Set()
	w.base = moment{m.Number, m.Head, g.Digest()}
	w.last, w.head = w.base, w.base
	ref := session.SegmentRef{
		Epoch: 1, Number: m.Number, Head: m.Head, State: g.Digest(), Time: m.Time, Entries: uint64(g.Len()), Size: uint64(g.Size()),
	}
	sum := sha256.New()
	if _, err := g.WriteTo(sum); err != nil {
		return nil, err
	}
	sum.Sum(ref.Sum[:0])
	if w.ref, err = session.Seal(session.TypeSegment, ref.MarshalBody(), w.key); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	w.stop = cancel
	w.done.Go(func() { w.beats(ctx) })
	return w, nil
}

const incident = "INC-7"

// weak is a source of keys that need not be secret, the same in each run.
func weak(seed uint64) *rand.Rand { return rand.New(rand.NewPCG(seed, seed)) }

// close ends the heartbeats. The enforcers must have been closed.
func (w *world) close() {
	w.stop()
	w.done.Wait()
}

// sign makes the next batch, for say.
func (w *world) sign(entries []session.Entry) (signed, error) {
	now := session.InstantOf(time.Now())
	b := &session.Batch{
		Epoch: 1, Number: w.last.number + 1, Prev: w.last.head, Time: now, Deadline: now.Add(session.BatchTTL), Entries: entries,
	}
	body, err := b.MarshalBody()
	if err != nil {
		return signed{}, err
	}
	frame, err := session.Seal(session.TypeBatch, body, w.key)
	if err != nil {
		return signed{}, err
	}
	f, err := session.ParseFrame(frame)
	if err != nil {
		return signed{}, err
	}
	w.state = w.state.Apply(b, nil)
	w.last = moment{b.Number, f.Hash(), w.state.Digest()}
	return signed{frame, w.last}, nil
}

// signMany makes the next batches, of n random entries.
func (w *world) signMany(n int, seed uint64) ([]signed, error) {
	var out []signed
	var err error
	batches(n, seed, kinds, func(b *session.Batch) {
		if err == nil {
			var s signed
			s, err = w.sign(b.Entries)
			out = append(out, s)
		}
	})
	return out, err
}

// say stores batches and has them heard, a heartbeat behind them.
func (w *world) say(batches ...signed) {
	w.mu.Lock()
	sinks := w.sinks
	for _, b := range batches {
		w.log, w.head = append(w.log, b.frame), b.at
	}
	w.mu.Unlock()
	for _, s := range sinks {
		for _, b := range batches {
			s.Batch(b.frame)
		}
	}
	w.beat()
}

// beat sends a heartbeat.
func (w *world) beat() {
	w.mu.Lock()
	defer w.mu.Unlock()
	h := session.Heartbeat{
		Epoch: 1, Number: w.head.number, Head: w.head.head, State: w.head.state, Writer: w.writer,
		Mono: time.Since(w.born), Time: session.InstantOf(time.Now()), KeySet: 1,
	}
	frame, err := session.Seal(session.TypeHeartbeat, h.MarshalBody(), w.key)
	if err != nil {
		return // a lost heartbeat is what staleness is for
	}
	for _, s := range w.sinks {
		s.Beat(frame)
	}
}

func (w *world) beats(ctx context.Context) {
	tick := time.NewTicker(500 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			w.beat()
		}
	}
}

// open opens an enforcer; with an empty dir, without a state directory.
func (w *world) open(ctx context.Context, dir string) (*enforce.Enforcer, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	e, err := enforce.Open(ctx, &worldFeed{w: w}, &enforce.Options{Enrollment: w.enrollment, StateDir: dir})
	if err != nil {
		return nil, err
	}
	return e, await(ctx, e, func(s enforce.Status) bool { return s.Confirmed >= w.published() })
}

func (w *world) published() uint64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.head.number
}

// await polls until cond holds of an enforcer's status.
func await(ctx context.Context, e *enforce.Enforcer, cond func(enforce.Status) bool) error {
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for !cond(e.Status()) {
		select {
		case <-ctx.Done():
			return fmt.Errorf("the enforcer did not get there: %+v: %w", e.Status(), context.Cause(ctx))
		case <-tick.C:
		}
	}
	return nil
}

// worldFeed is one enforcer's feed of a world.
type worldFeed struct {
	w    *world
	sink enforce.Sink
}

var _ enforce.SegmentFeed = (*worldFeed)(nil)

// Start implements enforce.Feed.
func (f *worldFeed) Start(_ context.Context, s enforce.Sink) error {
	f.w.mu.Lock()
	defer f.w.mu.Unlock()
	f.sink = s
	f.w.sinks = append(f.w.sinks[:len(f.w.sinks):len(f.w.sinks)], s)
	return nil
}

// Log implements enforce.Feed. The log begins behind the segment; positions are
// the batches' numbers.
func (f *worldFeed) Log(_ context.Context, from uint64, fn func(uint64, []byte) error) (uint64, error) {
	f.w.mu.Lock()
	log, first := f.w.log, f.w.base.number+1
	f.w.mu.Unlock()
	pos := max(from, first)
	for ; pos < first+uint64(len(log)); pos++ {
		if err := fn(pos, log[pos-first]); err != nil {
			return pos, err
		}
	}
	return pos, nil
}

// KeySets implements enforce.Feed.
func (f *worldFeed) KeySets(context.Context) ([][]byte, error) { return [][]byte{f.w.keySet}, nil }

// Clock implements enforce.Feed.
func (f *worldFeed) Clock(_ context.Context, nonce [32]byte) ([]byte, error) {
	c := session.Clock{Nonce: nonce, Writer: f.w.writer, Mono: time.Since(f.w.born), Time: session.InstantOf(time.Now())}
	return session.Seal(session.TypeClock, c.MarshalBody(), f.w.key)
}

// Receipt implements enforce.Feed.
func (f *worldFeed) Receipt(context.Context, []byte) error { return nil }

// Segments implements enforce.SegmentFeed.
func (f *worldFeed) Segments(context.Context) ([][]byte, error) { return [][]byte{f.w.ref}, nil }

// Segment implements enforce.SegmentFeed.
func (f *worldFeed) Segment(_ context.Context, _ session.SegmentRef, to io.Writer) error {
	file, err := os.Open(f.w.path)
	if err != nil {
		return err
	}
	_, err = io.Copy(to, file)
	return errors.Join(err, file.Close())
}

// Close implements enforce.Feed.
func (f *worldFeed) Close() error {
	f.w.mu.Lock()
	defer f.w.mu.Unlock()
	var rest []enforce.Sink
	for _, s := range f.w.sinks {
		if s != f.sink {
			rest = append(rest, s)
		}
	}
	f.w.sinks = rest
	return nil
}
