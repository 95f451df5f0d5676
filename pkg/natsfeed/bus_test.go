package natsfeed_test

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/interlock-fabric/interlock/internal/broker"
	"github.com/interlock-fabric/interlock/internal/feedtest"
	"github.com/interlock-fabric/interlock/pkg/enforce"
	"github.com/interlock-fabric/interlock/pkg/natsfeed"
	"github.com/interlock-fabric/interlock/pkg/session"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/nats-io/nkeys"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func testContext(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func newUser(t testing.TB) (seed, pub string) {
	t.Helper()
	kp, err := nkeys.CreateUser()
	must(t, err)
	s, err := kp.Seed()
	must(t, err)
	pub, err = kp.PublicKey()
	must(t, err)
	return string(s), pub
}

// bus is the real broker, with the authority's connection in the writer's place.
type bus struct {
	opts     broker.Options
	b        *broker.Broker
	url      string
	seed     string // the authority's
	enforcer string // its seed
	nc       *nats.Conn
	js       jetstream.JetStream
	receipts chan *nats.Msg
}

func newBus(t testing.TB) *bus {
	t.Helper()
	b := &bus{receipts: make(chan *nats.Msg, 1024)}
	var pub, epub string
	b.seed, pub = newUser(t)
	b.enforcer, epub = newUser(t)
	b.opts = broker.Options{
		Dir: t.TempDir(), Listen: "127.0.0.1:0", Authority: pub, RelaxedSync: true,
		Enforcers: []broker.Enforcer{{Name: "eu-3", PublicNKey: epub}},
	}
	b.Up(t)
	b.url = b.b.ClientURL()
	b.opts.Listen = strings.TrimPrefix(b.url, "nats://") // the same after a restart
	t.Cleanup(func() { b.Down(t) })
	return b
}

func (b *bus) enrollment() *session.Enrollment {
	return &session.Enrollment{Enforcer: "eu-3", NATS: session.NATSAccess{URLs: []string{b.url}, NKeySeed: b.enforcer}}
}

func (b *bus) Feed(t testing.TB) enforce.Feed {
	t.Helper()
	return b.feed(t)
}

func (b *bus) feed(t testing.TB) *natsfeed.Feed {
	t.Helper()
	f, err := natsfeed.Dial(b.enrollment(), nil)
	must(t, err)
	t.Cleanup(func() { must(t, f.Close()) })
	return f
}

func (b *bus) Append(t testing.TB, frames ...[]byte) {
	t.Helper()
	for _, f := range frames {
		_, err := b.js.PublishAsync(natsfeed.LogSubject, f, jetstream.WithStallWait(time.Minute))
		must(t, err)
	}
	select {
	case <-b.js.PublishAsyncComplete():
	case <-testContext(t).Done():
		t.Fatal("not stored in time")
	}
}

func (b *bus) Beat(t testing.TB, frame []byte) {
	t.Helper()
	must(t, b.nc.Publish(natsfeed.BeatSubject, frame))
	must(t, b.nc.Flush())
}

func (b *bus) KeySet(t testing.TB, frame []byte) {
	t.Helper()
	_, err := b.js.Publish(testContext(t), natsfeed.TrustSubject, frame)
	must(t, err)
}

func (b *bus) AnswerClock(t testing.TB, answer func([]byte) []byte) {
	t.Helper()
	_, err := b.nc.Subscribe(natsfeed.ClockSubjects, func(m *nats.Msg) {
		if a := answer(m.Data); a != nil {
			if err := m.Respond(a); err != nil {
				t.Error(err)
			}
		}
	})
	must(t, err)
	must(t, b.nc.Flush())
}

func (b *bus) Receipt(t testing.TB) []byte {
	t.Helper()
	select {
	case m := <-b.receipts:
		if m.Subject != natsfeed.ReceiptSubject("eu-3") {
			t.Errorf("receipt on %s", m.Subject)
		}
		return m.Data
	case <-testContext(t).Done():
		t.Fatal("no receipt")
		return nil
	}
}

func (b *bus) Down(t testing.TB) {
	t.Helper()
	b.nc.Close()
	must(t, b.b.Close())
}

func (b *bus) Up(t testing.TB) {
	t.Helper()
	var err error
	b.b, err = broker.Start(b.opts)
	must(t, err)
	b.nc, err = b.b.Conn(testContext(t), b.seed)
	must(t, err)
	b.js, err = jetstream.New(b.nc, jetstream.WithPublishAsyncMaxPending(256))
	must(t, err)
	must(t, broker.EnsureStreams(testContext(t), b.js, 1))
	_, err = b.nc.ChanSubscribe(natsfeed.ReceiptSubjects, b.receipts)
	must(t, err)
	must(t, b.nc.Flush())
}

func (b *bus) Recreate(t testing.TB) {
	t.Helper()
	must(t, b.js.DeleteStream(testContext(t), natsfeed.LogStream))
	must(t, broker.EnsureStreams(testContext(t), b.js, 1))
}

// deletable is a bus whose log permits deletion, for the one test that needs it.
type deletable struct{ *bus }

func (d deletable) Delete(t testing.TB, pos uint64) {
	t.Helper()
	s, err := d.js.Stream(testContext(t), natsfeed.LogStream)
	must(t, err)
	cfg := s.CachedInfo().Config
	if cfg.DenyDelete {
		// The configuration of a stream that is not empty cannot be loosened:
		// make it anew, looser, with the same messages.
		info, err := s.Info(testContext(t))
		must(t, err)
		var data [][]byte
		for seq := info.State.FirstSeq; seq <= info.State.LastSeq; seq++ {
			m, err := s.GetMsg(testContext(t), seq)
			must(t, err)
			data = append(data, m.Data)
		}
		must(t, d.js.DeleteStream(testContext(t), natsfeed.LogStream))
		cfg.DenyDelete = false
		s, err = d.js.CreateStream(testContext(t), cfg)
		must(t, err)
		d.Append(t, data...)
	}
	must(t, s.DeleteMsg(testContext(t), pos))
}

func TestContract(t *testing.T) {
	feedtest.Run(t, func(t testing.TB) feedtest.Bus { return deletable{newBus(t)} })
}

// TestContractOverTheHostsConnection: the same over New.
func TestContractOverTheHostsConnection(t *testing.T) {
	feedtest.Run(t, func(t testing.TB) feedtest.Bus { return hosted{deletable{newBus(t)}} })
}

type hosted struct{ deletable }

func (h hosted) Feed(t testing.TB) enforce.Feed {
	t.Helper()
	nc := h.connect(t, nats.CustomInboxPrefix("_INBOX_of_the_host"))
	return natsfeed.New(nc, "eu-3")
}

// connect is what a host does, with options of its own.
func (b *bus) connect(t testing.TB, opts ...nats.Option) *nats.Conn {
	t.Helper()
	kp, err := nkeys.FromSeed([]byte(b.enforcer))
	must(t, err)
	pub, err := kp.PublicKey()
	must(t, err)
	nc, err := nats.Connect(b.url, append([]nats.Option{
		nats.Nkey(pub, kp.Sign), nats.RetryOnFailedConnect(true), nats.MaxReconnects(-1), nats.ReconnectWait(20 * time.Millisecond),
	}, opts...)...)
	must(t, err)
	t.Cleanup(func() {
		if nc.IsClosed() {
			t.Error("the feed closed the host's connection")
		}
		nc.Close()
	})
	return nc
}

func frame(i int) []byte { return fmt.Appendf(nil, "frame %d", i) }
