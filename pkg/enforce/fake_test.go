package enforce

import (
	"context"
	"crypto/ed25519"
	"errors"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/interlock-fabric/interlock/pkg/filter"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// bus is an authority and the bus it speaks on, in memory, under the test's
// control: what the writer publishes reaches the enforcers unless the test drops
// or holds it, and the test can deliver whatever it likes. It runs inside a
// synctest bubble. The signatures are real.
type bus struct {
	t    testing.TB
	root ed25519.PrivateKey
	keys map[string]ed25519.PrivateKey
	done sync.WaitGroup

	// writing is held while the authority decides or beats.
	writing sync.Mutex
	set     session.KeySet
	signer  ed25519.PrivateKey
	writer  session.WriterID
	born    time.Time
	wall    time.Duration // the authority's wall clock against the test's
	proven  time.Duration
	beatAt  time.Duration // Mono of the last heartbeat
	epoch   uint64
	number  uint64
	head    session.Hash
	state   *filter.Set
	silent  bool // no heartbeats by themselves
	named   session.AgentsRef

	mu      sync.Mutex
	feeds   []*busFeed
	log     [][]byte
	keySets [][]byte
	orders  [][]byte // that are stored
	dead    bool     // nothing gets through in either direction
	mute    bool     // live messages are lost; the log can be read
	noLog   bool
	hold    bool // live messages wait for release
	held    []func(Sink)
	reads   int           // calls of Log
	delay   time.Duration // of clock answers
	// agents are the stored indexes and parts of the table of registered agents,
	// and agentReads how often parts were asked for.
	agentIndexes, agentParts [][]byte
	agentReads               int
	agentDelay               time.Duration // of reading the indexes
	// noOrders: the stored orders cannot be read.
	noOrders   bool
	orderDelay time.Duration // of reading them
	// clock, if set, replaces the answer to a nonce.
	clock func(answer []byte) []byte
}

type busFeed struct {
	b        *bus
	sink     Sink
	closed   bool
	deaf     bool // Receipt hangs
	receipts []timedReceipt
	frames   [][]byte
}

// timedReceipt is a receipt with the test's time of its arrival.
type timedReceipt struct {
	*session.Receipt
	at time.Time
}

func key(t testing.TB) ed25519.PrivateKey {
	_, k, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func newBus(t testing.TB) *bus {
	b := &bus{t: t, root: key(t), keys: map[string]ed25519.PrivateKey{"a": key(t), "b": key(t)}, epoch: 1}
	b.signer = b.keys["a"]
	b.writer[0], b.born = 1, time.Now()
	b.set = session.KeySet{
		Version: 1, Epoch: 1, Issued: session.InstantOf(time.Now()), NotAfter: session.InstantOf(time.Now().AddDate(1, 0, 0)),
		Tenants: []session.Tenant{{ID: 1, Name: "acme"}, {ID: 2, Name: "globex"}},
		Keys:    []session.SigningKey{{Public: b.pub("a"), Use: session.UseWriter}},
	}
	b.publishKeySet()
	return b
}

func (b *bus) pub(name string) ed25519.PublicKey { return b.keys[name].Public().(ed25519.PublicKey) }

// publishKeySet signs and publishes b.set as it is.
func (b *bus) publishKeySet() []byte {
	b.writing.Lock()
	defer b.writing.Unlock()
	body, err := b.set.MarshalBody()
	if err != nil {
		b.t.Fatal(err)
	}
	frame := b.seal(session.TypeKeySet, body, b.root)
	if b.set.Epoch != b.epoch || b.number == 0 {
		b.epoch, b.number, b.state = b.set.Epoch, 0, nil
		b.head = b.set.Origin(b.root.Public().(ed25519.PublicKey))
	}
	b.mu.Lock()
	b.keySets = append(b.keySets, frame)
	b.mu.Unlock()
	b.each(func(s Sink) { s.KeySet(frame) })
	return frame
}

// newKeySet publishes the next version, changed by mod.
func (b *bus) newKeySet(mod func(*session.KeySet)) []byte {
	b.writing.Lock()
	b.set.Keys = slices.Clone(b.set.Keys)
	b.set.Version++
	mod(&b.set)
	b.writing.Unlock()
	return b.publishKeySet()
}

// newEpoch opens the next epoch.
func (b *bus) newEpoch() {
	b.newKeySet(func(ks *session.KeySet) { ks.Epoch++; ks.Salt[0]++ })
}

func (b *bus) seal(t session.FrameType, body []byte, k ed25519.PrivateKey) []byte {
	f, err := session.Seal(t, body, k)
	if err != nil {
		b.t.Fatal(err)
	}
	return f
}

// each delivers what fn does with a sink.
func (b *bus) each(fn func(Sink)) {
	b.mu.Lock()
	if b.hold {
		b.held = append(b.held, fn)
		b.mu.Unlock()
		return
	}
	lost := b.dead || b.mute
	b.mu.Unlock()
	if !lost {
		b.deliver(fn)
	}
}

func (b *bus) deliver(fn func(Sink)) {
	b.mu.Lock()
	var to []Sink
	for _, f := range b.feeds {
		if f.sink != nil && !f.closed {
			to = append(to, f.sink)
		}
	}
	b.mu.Unlock()
	for _, s := range to {
		fn(s)
	}
}

// release delivers what was held.
func (b *bus) release() {
	b.mu.Lock()
	held := b.held
	b.hold, b.held = false, nil
	b.mu.Unlock()
	for _, fn := range held {
		b.deliver(fn)
	}
}

// with changes what the bus does.
func (b *bus) with(fn func(b *bus)) {
	b.mu.Lock()
	defer b.mu.Unlock()
	fn(b)
}

// as changes what the authority is.
func (b *bus) as(fn func(b *bus)) {
	b.writing.Lock()
	defer b.writing.Unlock()
	fn(b)
}

// store puts frames into the log, whatever they are.
func (b *bus) store(frames [][]byte) { b.with(func(b *bus) { b.log = append(b.log, frames...) }) }

func (b *bus) now() session.Instant { return session.InstantOf(time.Now().Add(b.wall)) }

// batch makes the next batch, without sending or storing it.
func (b *bus) batch(entries ...session.Entry) ([]byte, *session.Batch) {
	b.writing.Lock()
	defer b.writing.Unlock()
	return b.make(head{b.number, b.head}, b.signer, entries...)
}

func (b *bus) make(prev head, signer ed25519.PrivateKey, entries ...session.Entry) ([]byte, *session.Batch) {
	x := &session.Batch{
		Epoch: b.epoch, Number: prev.number + 1, Prev: prev.hash, Time: b.now(),
		Deadline: b.now().Add(session.BatchTTL), Entries: entries,
	}
	return b.encode(x, signer), x
}

func (b *bus) encode(x *session.Batch, signer ed25519.PrivateKey) []byte {
	body, err := x.MarshalBody()
	if err != nil {
		b.t.Fatal(err)
	}
	return b.seal(session.TypeBatch, body, signer)
}

// headOf names a batch by its frame.
func headOf(t testing.TB, frame []byte) head {
	f, err := session.ParseFrame(frame)
	if err != nil {
		t.Fatal(err)
	}
	_, n, err := session.PeekBatch(f.Body)
	if err != nil {
		t.Fatal(err)
	}
	return head{n, f.Hash()}
}

// accept makes a batch the head of the log.
func (b *bus) accept(frame []byte) {
	b.writing.Lock()
	defer b.writing.Unlock()
	b.acceptLocked(frame)
}

func (b *bus) acceptLocked(frame []byte) {
	f, err := session.ParseFrame(frame)
	if err != nil {
		b.t.Fatal(err)
	}
	x, err := session.UnmarshalBatch(f.Body)
	if err != nil {
		b.t.Fatal(err)
	}
	b.number, b.head = x.Number, f.Hash()
	var signer *session.SigningKey
	for i := range b.set.Keys {
		if session.KeyIDOf(b.set.Keys[i].Public) == f.Key {
			signer = &b.set.Keys[i]
		}
	}
	b.state = b.state.Apply(x, func(e *session.Entry) bool { return signer.May(e.Key) })
	b.mu.Lock()
	b.log = append(b.log, frame)
	b.mu.Unlock()
}

// decide publishes, stores, and vouches for a batch.
func (b *bus) decide(entries ...session.Entry) []byte {
	b.writing.Lock()
	defer b.writing.Unlock()
	frame, _ := b.make(head{b.number, b.head}, b.signer, entries...)
	b.say(frame)
	b.acceptLocked(frame)
	b.beatLocked()
	return frame
}

// say publishes a frame on the log's subject.
func (b *bus) say(frame []byte) { b.each(func(s Sink) { s.Batch(frame) }) }

// sayBeat publishes a frame on the heartbeat's subject.
func (b *bus) sayBeat(frame []byte) { b.each(func(s Sink) { s.Beat(frame) }) }

func (b *bus) heartbeat() session.Heartbeat {
	b.beatAt = max(b.beatAt+1, time.Since(b.born))
	return session.Heartbeat{
		Epoch: b.epoch, Number: b.number, Head: b.head, State: b.state.Digest(), Writer: b.writer,
		Mono: b.beatAt, Proven: b.proven, Time: b.now(), KeySet: b.set.Version,
		Agents: b.named,
	}
}

func (b *bus) beatLocked() []byte {
	h := b.heartbeat()
	frame := b.seal(session.TypeHeartbeat, h.MarshalBody(), b.signer)
	b.sayBeat(frame)
	return frame
}

// beat sends a heartbeat.
func (b *bus) beat() []byte {
	b.writing.Lock()
	defer b.writing.Unlock()
	return b.beatLocked()
}

// reject says that a batch will never be in the log.
func (b *bus) reject(frame []byte) []byte {
	h := headOf(b.t, frame)
	x := session.Rejection{Epoch: b.epoch, Number: h.number, Batch: h.hash}
	f := b.seal(session.TypeRejection, x.MarshalBody(), b.signer)
	b.sayBeat(f)
	return f
}

// run sends heartbeats until stop is called.
func (b *bus) run() (stop func()) {
	quit := make(chan struct{})
	b.done.Go(func() {
		tick := time.NewTicker(500 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-quit:
				return
			case <-tick.C:
				b.as(func(b *bus) {
					if !b.silent {
						b.beatLocked()
					}
				})
			}
		}
	})
	var once sync.Once
	return func() { once.Do(func() { close(quit); b.done.Wait() }) }
}

func (b *bus) feed() *busFeed {
	f := &busFeed{b: b}
	b.mu.Lock()
	b.feeds = append(b.feeds, f)
	b.mu.Unlock()
	return f
}

var errDead = errors.New("the bus is dead")

func (f *busFeed) up() error {
	f.b.mu.Lock()
	defer f.b.mu.Unlock()
	if f.b.dead || f.closed {
		return errDead
	}
	return nil
}

func (f *busFeed) Start(_ context.Context, s Sink) error {
	if err := f.up(); err != nil {
		return err
	}
	f.b.mu.Lock()
	defer f.b.mu.Unlock()
	f.sink = s
	return nil
}

// to is where the feed delivers, once it has started.
func (f *busFeed) to() Sink {
	f.b.mu.Lock()
	defer f.b.mu.Unlock()
	return f.sink
}

func (f *busFeed) Log(_ context.Context, from uint64, fn func(uint64, []byte) error) (uint64, error) {
	if err := f.up(); err != nil {
		return 0, err
	}
	f.b.mu.Lock()
	log, no := f.b.log, f.b.noLog
	f.b.reads++
	f.b.mu.Unlock()
	if no {
		return 0, errDead
	}
	if from == 0 {
		from = 1
	}
	for pos := from; pos <= uint64(len(log)); pos++ {
		if err := fn(pos, log[pos-1]); err != nil {
			return pos, err
		}
	}
	return max(from, uint64(len(log))+1), nil
}

func (f *busFeed) KeySets(context.Context) ([][]byte, error) {
	if err := f.up(); err != nil {
		return nil, err
	}
	f.b.mu.Lock()
	defer f.b.mu.Unlock()
	return slices.Clone(f.b.keySets), nil
}

// publishOrder publishes an order and stores it.
func (b *bus) publishOrder(frame []byte) {
	b.with(func(b *bus) { b.orders = append(b.orders, frame) })
	b.each(func(s Sink) { s.Order(frame) })
}

func (f *busFeed) Orders(_ context.Context, fn func([]byte) error) error {
	if err := f.up(); err != nil {
		return err
	}
	f.b.mu.Lock()
	orders, no, delay := slices.Clone(f.b.orders), f.b.noOrders, f.b.orderDelay
	f.b.mu.Unlock()
	time.Sleep(delay)
	if no {
		return errDead
	}
	for _, o := range orders {
		if err := fn(o); err != nil {
			return err
		}
	}
	return nil
}

func (f *busFeed) Clock(ctx context.Context, nonce [32]byte) ([]byte, error) {
	if err := f.up(); err != nil {
		return nil, err
	}
	pause := func(d time.Duration) bool {
		select {
		case <-time.After(d):
			return true
		case <-ctx.Done():
			return false
		}
	}
	f.b.mu.Lock()
	delay, replace := f.b.delay, f.b.clock
	f.b.mu.Unlock()
	if !pause(time.Millisecond) {
		return nil, ctx.Err()
	}
	f.b.writing.Lock()
	c := session.Clock{Nonce: nonce, Writer: f.b.writer, Mono: time.Since(f.b.born), Time: f.b.now()}
	frame := f.b.seal(session.TypeClock, c.MarshalBody(), f.b.signer)
	f.b.writing.Unlock()
	if !pause(time.Millisecond + delay) {
		return nil, ctx.Err()
	}
	if replace != nil {
		frame = replace(frame)
	}
	return frame, nil
}

func (f *busFeed) Receipt(ctx context.Context, frame []byte) error {
	if err := f.up(); err != nil {
		return err
	}
	f.b.mu.Lock()
	deaf := f.deaf
	f.b.mu.Unlock()
	if deaf {
		<-ctx.Done()
		return ctx.Err()
	}
	p, err := session.ParseFrame(frame)
	if err != nil {
		return err
	}
	r, err := session.UnmarshalReceipt(p.Body)
	if err != nil {
		return err
	}
	f.b.mu.Lock()
	defer f.b.mu.Unlock()
	f.receipts, f.frames = append(f.receipts, timedReceipt{r, time.Now()}), append(f.frames, frame)
	return nil
}

func (b *bus) readings() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.reads
}

// said returns the receipts so far.
func (f *busFeed) said() []timedReceipt {
	f.b.mu.Lock()
	defer f.b.mu.Unlock()
	return slices.Clone(f.receipts)
}

func (f *busFeed) Close() error {
	f.b.mu.Lock()
	defer f.b.mu.Unlock()
	f.closed = true
	return nil
}

// enrol makes what an enforcer of both tenants needs.
func (b *bus) enrol(name string) *session.Enrollment {
	e := &session.Enrollment{Enforcer: name, Root: b.root.Public().(ed25519.PublicKey), ReceiptKey: key(b.t)}
	for _, t := range b.set.Tenants {
		k := make([]byte, 32)
		k[0] = byte(t.ID)
		if err := e.AddTenant(t.ID, t.Name, k); err != nil {
			b.t.Fatal(err)
		}
	}
	return e
}

// start makes an enforcer on the bus; mod may change its options.
func (b *bus) start(mod func(*Options)) (*Enforcer, *busFeed) {
	b.t.Helper()
	f := b.feed()
	o := &Options{Enrollment: b.enrol("e1")}
	if mod != nil {
		mod(o)
	}
	e, err := Start(f, o)
	if err != nil {
		b.t.Fatal(err)
	}
	return e, f
}

// open is start, with a state.
func (b *bus) open(mod func(*Options)) (*Enforcer, *busFeed) {
	b.t.Helper()
	e, f := b.start(mod)
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := e.WaitReady(ctx); err != nil {
		b.t.Fatal(err)
	}
	return e, f
}

// target returns the key of a target in a tenant.
func (b *bus) target(tenant string, terms ...session.Term) session.Key {
	b.t.Helper()
	for _, s := range b.enrol("k").Tenants {
		if s.Name() == tenant {
			k, err := s.Key(session.Target{Tenant: tenant, Terms: terms})
			if err != nil {
				b.t.Fatal(err)
			}
			return k
		}
	}
	b.t.Fatalf("no tenant %s", tenant)
	return session.Key{}
}

const iss = "https://issuer.example"

func (b *bus) session(id string) session.Key {
	return b.target("acme", session.Term{Kind: session.KindSession, Issuer: iss, Value: id})
}

func (b *bus) user(id string) session.Key {
	return b.target("acme", session.Term{Kind: session.KindUser, Issuer: iss, Value: id})
}

func revoke(k session.Key) session.Entry {
	return session.Entry{Op: session.OpSet, Effect: session.EffectRevoked, Reason: session.ReasonStolenToken, Key: k, Incident: "INC-1"}
}

func set(effect session.Effect, k session.Key) session.Entry {
	return session.Entry{Op: session.OpSet, Effect: effect, Reason: session.ReasonAnomaly, Key: k}
}

func lift(effect session.Effect, k session.Key) session.Entry {
	return session.Entry{Op: session.OpLift, Effect: effect, Reason: session.ReasonRestored, Key: k}
}

// caller is an identity with the given session.
func caller(id string) session.Identity {
	return session.Identity{
		Tenant: "acme", Issuer: iss, Token: "jti-" + id, User: "alice",
		Session: session.SessionRef{ID: id}, Client: "cli",
		Actors: []session.Actor{{ID: "spiffe://acme/agent/" + id}},
	}
}

func prepare(t testing.TB, e *Enforcer, id session.Identity) *session.Prepared {
	t.Helper()
	p, err := e.Prepare(id)
	if err != nil {
		t.Fatal(err)
	}
	return p
}
