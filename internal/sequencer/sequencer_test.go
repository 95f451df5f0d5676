package sequencer

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/interlock-fabric/interlock/internal/broker"
	"github.com/interlock-fabric/interlock/internal/trust"
	"github.com/interlock-fabric/interlock/pkg/filter"
	"github.com/interlock-fabric/interlock/pkg/natsfeed"
	"github.com/interlock-fabric/interlock/pkg/session"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/nats-io/nkeys"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	if os.Getenv(childEnv) != "" {
		child()
		return
	}
	goleak.VerifyTestMain(m)
}

// root signs key sets, and holds the signing keys of the authorities of a test.
type root struct {
	key     ed25519.PrivateKey
	mu      sync.Mutex
	version uint64
}

const tenant = session.TenantID(7)

func newRoot(tb testing.TB) *root {
	tb.Helper()
	_, key, err := ed25519.GenerateKey(rand.Reader)
	must(tb, err)
	return &root{key: key}
}

func newKey(tb testing.TB) ed25519.PrivateKey {
	tb.Helper()
	_, key, err := ed25519.GenerateKey(rand.Reader)
	must(tb, err)
	return key
}

// keySet signs a key set of the given epoch with these keys.
func (r *root) keySet(tb testing.TB, epoch uint64, keys ...session.SigningKey) []byte {
	tb.Helper()
	r.mu.Lock()
	defer r.mu.Unlock()
	r.version++
	now := session.InstantOf(time.Now())
	ks := session.KeySet{
		Version: r.version, Epoch: epoch, Salt: [16]byte{byte(epoch)}, Issued: now.Add(-time.Hour), NotAfter: now.Add(24 * time.Hour),
		Tenants: []session.Tenant{{ID: tenant, Name: "acme"}, {ID: tenant + 1, Name: "globex"}}, Keys: keys,
	}
	body, err := ks.MarshalBody()
	must(tb, err)
	frame, err := session.Seal(session.TypeKeySet, body, r.key)
	must(tb, err)
	return frame
}

func writerKey(k ed25519.PrivateKey) session.SigningKey {
	return session.SigningKey{Public: k.Public().(ed25519.PublicKey), Use: session.UseWriter}
}

// keys is what an authority holds.
type keys struct {
	trust *session.Trust
	mu    sync.Mutex
	key   ed25519.PrivateKey
	frame []byte
}

func (k *keys) Trust() *session.Trust { return k.trust }

func (k *keys) Signer(session.Instant) (ed25519.PrivateKey, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.key == nil {
		return nil, errors.New("no key")
	}
	return k.key, nil
}

func (k *keys) Frame() []byte {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.frame
}

func (k *keys) Accept(frame []byte, now session.Instant) (bool, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	taken, err := k.trust.Update(frame, now)
	if taken {
		k.frame = frame
	}
	return taken, err
}

var _ Keys = (*trust.Store)(nil)

func (k *keys) use(key ed25519.PrivateKey) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.key = key
}

func (r *root) keys(tb testing.TB, key ed25519.PrivateKey, sets ...[]byte) *keys {
	tb.Helper()
	t, err := session.NewTrust(r.key.Public().(ed25519.PublicKey))
	must(tb, err)
	k := &keys{trust: t, key: key}
	for _, f := range sets {
		_, err := k.Accept(f, session.InstantOf(time.Now()))
		must(tb, err)
	}
	return k
}

// store is a broker with the streams in it.
type store struct {
	tb   testing.TB
	dir  string
	b    *broker.Broker
	seed string
	*root
	key ed25519.PrivateKey
	set []byte
	// dial, when set, reaches a bus that is elsewhere.
	dial func() *nats.Conn
}

func newStore(tb testing.TB) *store {
	tb.Helper()
	s := &store{tb: tb, dir: tb.TempDir(), root: newRoot(tb), key: newKey(tb)}
	s.set = s.keySet(tb, 1, writerKey(s.key))
	kp, err := nkeys.CreateUser()
	must(tb, err)
	seed, err := kp.Seed()
	must(tb, err)
	s.seed = string(seed)
	s.start()
	tb.Cleanup(func() { must(tb, s.b.Close()) })
	return s
}

func (s *store) start() {
	s.tb.Helper()
	s.b = startBroker(s.tb, s.dir, s.seed)
}

func startBroker(tb testing.TB, dir, seed string) *broker.Broker {
	tb.Helper()
	kp, err := nkeys.FromSeed([]byte(seed))
	must(tb, err)
	pub, err := kp.PublicKey()
	must(tb, err)
	b, err := broker.Start(broker.Options{Dir: dir, Authority: pub})
	must(tb, err)
	nc, err := b.Conn(context.Background(), seed)
	must(tb, err)
	defer nc.Close()
	js, err := jetstream.New(nc)
	must(tb, err)
	must(tb, broker.EnsureStreams(context.Background(), js, 1))
	return b
}

func (s *store) conn() *nats.Conn {
	s.tb.Helper()
	if s.dial != nil {
		return s.dial()
	}
	nc, err := s.b.Conn(context.Background(), s.seed)
	must(s.tb, err)
	s.tb.Cleanup(nc.Close)
	return nc
}

// open opens a sequencer on the store; mod changes its options.
func (s *store) open(mod ...func(*Options)) *Sequencer {
	s.tb.Helper()
	o := Options{NC: s.conn(), Keys: s.keys(s.tb, s.key, s.set), Logger: testLogger()}
	for _, m := range mod {
		m(&o)
	}
	q, err := Open(context.Background(), o)
	must(s.tb, err)
	s.tb.Cleanup(q.Close)
	return q
}

func testLogger() *slog.Logger {
	if os.Getenv("SEQUENCER_TEST_LOG") == "" {
		return nil
	}
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

func must(tb testing.TB, err error) {
	tb.Helper()
	if err != nil {
		tb.Fatal(err)
	}
}

// eventually polls a condition of a real server.
func eventually(tb testing.TB, what string, cond func() bool) {
	tb.Helper()
	deadline := time.Now().Add(time.Minute)
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !cond() {
		if time.Now().After(deadline) {
			tb.Fatalf("not within a minute: %s", what)
		}
		<-tick.C
	}
}

func id(n int) session.DecisionID {
	var d session.DecisionID
	binary.BigEndian.PutUint64(d[:], uint64(n)+1)
	return d
}

func key(t session.TenantID, kind session.Kind, n int) session.Key {
	sum := sha256.Sum256(fmt.Append(nil, kind, n))
	return session.Key{Tenant: t, Shape: session.Shape(kind), Digest: session.Digest(sum[:16])}
}

func revoke(n int) Decision {
	return Decision{ID: id(n), Entries: []session.Entry{{
		Op: session.OpSet, Effect: session.EffectRevoked, Reason: session.ReasonStolenToken,
		Key: key(tenant, session.KindSession, n), Incident: "INC-1",
	}}}
}

// batches reads the whole log and checks the chain of each epoch: what any
// reader must find.
type logged struct {
	batches []*session.Batch
	hashes  map[uint64]session.Hash
	// at counts how often each decision is in the chain.
	at    map[session.DecisionID]int
	where map[session.DecisionID]uint64
	set   *filter.Set
	seqs  uint64
}

func readLog(tb testing.TB, nc *nats.Conn, trust *session.Trust) logged {
	tb.Helper()
	js, err := jetstream.New(nc)
	must(tb, err)
	st, err := js.Stream(context.Background(), natsfeed.LogStream)
	must(tb, err)
	info, err := st.Info(context.Background())
	must(tb, err)
	out := logged{at: map[session.DecisionID]int{}, where: map[session.DecisionID]uint64{}, hashes: map[uint64]session.Hash{}, seqs: info.State.LastSeq}
	prev, number := trust.Origin(), uint64(0)
	for seq := info.State.FirstSeq; seq <= info.State.LastSeq; seq++ {
		m, err := st.GetMsg(context.Background(), seq)
		must(tb, err)
		f, err := session.ParseFrame(m.Data)
		if err != nil || f.Type != session.TypeBatch {
			continue
		}
		b, err := session.UnmarshalBatch(f.Body)
		if err != nil || b.Epoch != trust.KeySet().Epoch || b.Number != number+1 || b.Prev != prev {
			continue
		}
		if _, err := trust.Writer(&f, b.Number, false, session.InstantOf(time.Now())); err != nil {
			continue
		}
		prev, number = f.Hash(), b.Number
		out.batches = append(out.batches, b)
		out.hashes[number] = prev
		out.set = out.set.Apply(b, nil)
		for _, d := range b.Decisions {
			out.at[d.ID]++
			out.where[d.ID] = number
		}
	}
	return out
}

func TestDecide(t *testing.T) {
	s := newStore(t)
	q := s.open()
	ctx := context.Background()
	res, err := q.Decide(ctx, revoke(1))
	must(t, err)
	if !res.Durable || res.Duplicate || res.Number == 0 || res.Epoch != 1 || res.At == 0 {
		t.Fatalf("result %+v", res)
	}
	again, err := q.Decide(ctx, revoke(1))
	must(t, err)
	if !again.Duplicate || !again.Durable || again.Number != res.Number || again.At != res.At {
		t.Fatalf("sent twice: %+v, first %+v", again, res)
	}
	must(t, q.AwaitDurable(ctx, res.Number))
	if len(q.State().Lookup(revoke(1).Entries[0].Key)) != 1 {
		t.Fatal("not in the state")
	}
	epoch, number, head := q.Head()
	if h, ok := q.HashAt(number); !ok || h != head || epoch != 1 {
		t.Fatal("head and hash differ")
	}
	if !q.IsWriter() {
		t.Fatal("it does not write")
	}
	q.Close()
	if _, err := q.Decide(ctx, revoke(2)); !errors.Is(err, ErrClosed) {
		t.Fatalf("after Close: %v", err)
	}

	// A restart knows what was decided.
	q2 := s.open()
	again, err = q2.Decide(ctx, revoke(1))
	must(t, err)
	if !again.Duplicate || !again.Durable || again.Number != res.Number {
		t.Fatalf("sent again after a restart: %+v, first %+v", again, res)
	}
	if q2.State().Digest() != q.State().Digest() {
		t.Fatal("another state after a restart")
	}
	l := readLog(t, s.conn(), q2.trust)
	if l.at[id(1)] != 1 || l.set.Digest() != q2.State().Digest() {
		t.Fatal("the log has something else")
	}
}

func TestConcurrent(t *testing.T) {
	s := newStore(t)
	q := s.open(func(o *Options) { o.AckWait = 30 * time.Second }) // a busy disk is no failure
	const n = 2000
	var wg sync.WaitGroup
	for g := range 32 {
		wg.Go(func() {
			for i := g; i < n; i += 32 {
				res, err := q.Decide(context.Background(), revoke(i))
				if err != nil || !res.Durable || res.Duplicate {
					t.Errorf("decision %d: %+v, %v", i, res, err)
				}
			}
		})
	}
	wg.Wait()
	l := readLog(t, s.conn(), q.trust)
	for i := range n {
		if l.at[id(i)] != 1 {
			t.Fatalf("decision %d is there %d times", i, l.at[id(i)])
		}
	}
	if len(l.batches) >= n {
		t.Fatalf("%d batches for %d decisions: none were grouped", len(l.batches), n)
	}
	if q.State().Len() != n || q.State().Digest() != l.set.Digest() {
		t.Fatalf("state of %d entries", q.State().Len())
	}
}
