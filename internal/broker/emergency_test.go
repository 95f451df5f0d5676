package broker

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/interlock-fabric/interlock/pkg/natsfeed"
	"github.com/interlock-fabric/interlock/pkg/session"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

var k1, k2 = session.KeyID{1}, session.KeyID{2}

// newEmergencyFabric is a fabric in which two emergency keys may publish.
func newEmergencyFabric(t *testing.T) (f *fabric, one, two user) {
	f = newFabric(t, t.TempDir())
	one, two = newUser(t), newUser(t)
	if err := f.SetEmergency([]Emergency{{k1, one.pub}, {k2, two.pub}}); err != nil {
		t.Fatal(err)
	}
	return f, one, two
}

// publish publishes an order as its holder does.
func publish(t testing.TB, nc *nats.Conn, k session.KeyID, order string) {
	t.Helper()
	if err := errors.Join(nc.Publish(natsfeed.OrderSubject(k), []byte(order)), nc.Flush()); err != nil {
		t.Fatal(err)
	}
}

// stored returns how many orders of each subject are stored.
func (f *fabric) stored(t testing.TB) map[string]uint64 {
	t.Helper()
	s, err := f.js.Stream(testContext(t), natsfeed.OrderStream)
	if err != nil {
		t.Fatal(err)
	}
	info, err := s.Info(testContext(t), jetstream.WithSubjectFilter(natsfeed.OrderSubjects))
	if err != nil {
		t.Fatal(err)
	}
	return info.State.Subjects
}

// TestEmergencyHolderMayPublishItsOrders: every enforcer hears them, the store
// acknowledges them, and nothing else is open.
func TestEmergencyHolderMayPublishItsOrders(t *testing.T) {
	f, one, two := newEmergencyFabric(t)
	var live []*nats.Subscription
	for name, u := range map[string]user{"a": f.a, "b": f.b} {
		c := f.dial(t, name, u)
		s, err := c.SubscribeSync(natsfeed.OrderSubjects)
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Flush(); err != nil {
			t.Fatal(err)
		}
		live = append(live, s)
	}
	c := f.dial(t, k1.String(), one)
	publish(t, c.Conn, k1, "kill")
	for _, s := range live {
		m, err := s.NextMsg(5 * time.Second)
		if err != nil || string(m.Data) != "kill" || m.Subject != natsfeed.OrderSubject(k1) {
			t.Errorf("live: %+v, %v", m, err)
		}
	}
	eventually(t, "stored", func() bool { return f.stored(t)[natsfeed.OrderSubject(k1)] == 1 })
	m, err := f.dial(t, "a", f.a).Request(directGet+natsfeed.OrderStream, []byte(`{"seq":1}`), 5*time.Second)
	if err != nil || string(m.Data) != "kill" {
		t.Errorf("stored: %+v, %v", m, err)
	}

	other := f.dial(t, k2.String(), two)
	for _, s := range []string{
		natsfeed.OrderSubject(k2), "interlock.v1.order.x", natsfeed.LogSubject, natsfeed.BeatSubject, natsfeed.TrustSubject, natsfeed.ForwardSubject,
		natsfeed.ReceiptSubject("a"), natsfeed.ReportSubject("a"), natsfeed.ClockSubject("a"), natsfeed.AuditSubject,
		directGet + natsfeed.LogStream, directGet + natsfeed.OrderStream, directGet + natsfeed.TrustStream,
		"$JS.API.INFO", "$JS.API.STREAM.PURGE." + natsfeed.OrderStream, "$JS.API.STREAM.MSG.DELETE." + natsfeed.OrderStream,
		"$JS.API.CONSUMER.CREATE." + natsfeed.LogStream, "$KV.INTERLOCK_LEASE.writer", "_INBOX.x", "_INBOX_a.x", "_R_.x", "$SYS.REQ.SERVER.PING",
	} {
		if err := c.Publish(s, []byte("{}")); err != nil {
			t.Fatal(err)
		}
		if got := c.refused(t); len(got) != 1 {
			t.Errorf("may publish on %s", s)
		}
	}
	for _, s := range []string{
		natsfeed.OrderSubjects, natsfeed.OrderSubject(k1), natsfeed.LogSubject, natsfeed.BeatSubject, natsfeed.TrustSubject, "interlock.v1.>", ">", "_INBOX.>",
		"_INBOX_a.>", natsfeed.InboxPrefix(k2.String()) + ".>", "$SYS.>", "$JS.>",
	} {
		if _, err := c.SubscribeSync(s); err != nil {
			t.Fatal(err)
		}
		if got := c.refused(t); len(got) != 1 {
			t.Errorf("may listen on %s", s)
		}
	}

	// A reply subject leads nowhere, whatever the store thinks of the order.
	all := []string{natsfeed.LogStream, natsfeed.TrustStream, natsfeed.ReceiptStream, natsfeed.AuditStream, "KV_" + natsfeed.LeaseBucket}
	before := map[string]jetstream.StreamState{}
	for _, s := range all {
		before[s] = f.state(t, s)
	}
	heard := make(chan *nats.Msg, 64)
	for _, s := range []string{natsfeed.LogSubject, natsfeed.BeatSubject, natsfeed.TrustSubject, natsfeed.ReceiptSubjects, "_INBOX.>"} {
		if _, err := f.nc.ChanSubscribe(s, heard); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.nc.Flush(); err != nil {
		t.Fatal(err)
	}
	for _, reply := range []string{
		natsfeed.LogSubject, natsfeed.TrustSubject, natsfeed.OrderSubject(k2), natsfeed.ReceiptSubject("a"), "_INBOX.x", "$KV.INTERLOCK_LEASE.writer",
		"$JS.API.STREAM.PURGE." + natsfeed.LogStream, "$JS.API.STREAM.DELETE." + natsfeed.TrustStream,
	} {
		for _, header := range []nats.Header{
			nil, {"Nats-Expected-Last-Sequence": {"999"}}, {"Nats-Expected-Stream": {"X"}}, {"Nats-Rollup": {"all"}}, {"Nats-TTL": {"1s"}},
			{"Nats-Msg-Id": {"same"}}, {"Nats-Trace-Dest": {natsfeed.LogSubject}}, {"Nats-Incr": {"1"}}, {"Nats-Batch-Id": {"b"}, "Nats-Batch-Sequence": {"1"}},
			{"Nats-Schedule": {"@at 2020-01-01T00:00:00Z"}, "Nats-Schedule-Target": {natsfeed.LogSubject}},
		} {
			for _, body := range [][]byte{[]byte("order"), make([]byte, session.MaxOrderLen+1)} {
				if err := c.PublishMsg(&nats.Msg{Subject: natsfeed.OrderSubject(k1), Reply: reply, Header: header, Data: body}); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	c.refused(t)
	// What one holder floods, of its own, is not the other's.
	publish(t, other.Conn, k2, "kept")
	for range MaxOrdersOfKey + 10 {
		publish(t, c.Conn, k1, "flood")
	}
	publish(t, c.Conn, k1, "last")
	publish(t, other.Conn, k2, "second")
	eventually(t, "all is stored", func() bool { return f.stored(t)[natsfeed.OrderSubject(k2)] == 2 })
	if n := f.stored(t); n[natsfeed.OrderSubject(k1)] != MaxOrdersOfKey || len(n) != 2 {
		t.Errorf("%v", n)
	}
	for s, want := range before {
		if got := f.state(t, s); got.LastSeq != want.LastSeq || got.Msgs != want.Msgs {
			t.Errorf("%s: was %d messages to %d, is %d to %d", s, want.Msgs, want.LastSeq, got.Msgs, got.LastSeq)
		}
	}
	for {
		select {
		case m := <-heard:
			// The answers to this test's own questions.
			if !strings.Contains(string(m.Data), "io.nats.jetstream.api") {
				t.Errorf("heard %q on %s", m.Data, m.Subject)
			}
			continue
		default:
		}
		break
	}
}

// TestEmergencyHoldersComeAndGo beside the enforcers, which are not disturbed.
func TestEmergencyHoldersComeAndGo(t *testing.T) {
	f, one, two := newEmergencyFabric(t)
	c := f.dial(t, k1.String(), one)
	enforcer := f.dial(t, "a", f.a)
	gone := make(chan struct{}, 8)
	c.SetDisconnectErrHandler(func(*nats.Conn, error) { gone <- struct{}{} })
	enforcer.SetDisconnectErrHandler(func(*nats.Conn, error) { t.Error("the enforcer was disconnected") })
	if err := f.SetEmergency([]Emergency{{k2, two.pub}}); err != nil {
		t.Fatal(err)
	}
	select {
	case <-gone:
	case <-time.After(10 * time.Second):
		t.Fatal("a holder whose key is withdrawn stays connected")
	}
	if nc, err := nats.Connect(f.ClientURL(), one.option(t)); err == nil {
		nc.Close()
		t.Error("a holder whose key is withdrawn comes back")
	}
	if err := f.SetEnforcers(f.enforcers()); err != nil {
		t.Fatal(err)
	}
	publish(t, f.dial(t, k2.String(), two).Conn, k2, "kill")
	for name, bad := range map[string][]Emergency{
		"an enforcer's NKey": {{k1, f.a.pub}},
		"one NKey for two":   {{k1, one.pub}, {k2, one.pub}},
		"no NKey":            {{k1, "x"}},
	} {
		if err := f.SetEmergency(bad); err == nil {
			t.Errorf("%s is taken", name)
		}
	}
	if err := f.SetEnforcers([]Enforcer{{"a", two.pub}}); err == nil {
		t.Error("an enforcer takes the NKey of a holder")
	}
	publish(t, f.dial(t, k2.String(), two).Conn, k2, "kill")
	if err := f.SetEmergency(nil); err != nil {
		t.Fatal(err)
	}
	enforcer.SetDisconnectErrHandler(nil)
	f.Close()
	if err := f.SetEmergency(nil); !errors.Is(err, ErrClosed) {
		t.Errorf("%v", err)
	}
}

// TestEmergencyOnAServerOfItsOwn: the text for an external server gives a holder
// the same rights.
func TestEmergencyOnAServerOfItsOwn(t *testing.T) {
	authority, a, one := newUser(t), newUser(t), newUser(t)
	text, err := ServerConfig(authority.pub, []Enforcer{{"a", a.pub}}, []Emergency{{k1, one.pub}})
	if err != nil {
		t.Fatal(err)
	}
	so := &server.Options{Host: "127.0.0.1", Port: server.RANDOM_PORT, NoSigs: true, JetStream: true, StoreDir: t.TempDir()}
	if err := so.ProcessConfigString(text); err != nil {
		t.Fatal(err)
	}
	srv, err := server.NewServer(so)
	if err != nil {
		t.Fatal(err)
	}
	srv.Start()
	defer func() { srv.Shutdown(); srv.WaitForShutdown() }()
	if !srv.ReadyForConnections(10 * time.Second) {
		t.Fatal("not ready")
	}
	connect := func(name string, u user) *nats.Conn {
		nc, err := nats.Connect(srv.ClientURL(), u.option(t), nats.CustomInboxPrefix(natsfeed.InboxPrefix(name)))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(nc.Close)
		return nc
	}
	nc, err := nats.Connect(srv.ClientURL(), authority.option(t))
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	if err := EnsureStreams(testContext(t), js, 1); err != nil {
		t.Fatal(err)
	}
	enforcer := connect("a", a)
	sub, err := enforcer.SubscribeSync(natsfeed.OrderSubjects)
	if err != nil {
		t.Fatal(err)
	}
	if err := enforcer.Flush(); err != nil {
		t.Fatal(err)
	}
	publish(t, connect(k1.String(), one), k1, "kill")
	if m, err := sub.NextMsg(5 * time.Second); err != nil || string(m.Data) != "kill" {
		t.Errorf("%v, %v", m, err)
	}
}

func TestEmergencyOf(t *testing.T) {
	pub := func(b byte) []byte { return slices.Repeat([]byte{b}, 32) }
	ks := &session.KeySet{Keys: []session.SigningKey{
		{Public: pub(1), Use: session.UseWriter},
		{Public: pub(2), Use: session.UseEmergency, Orders: 1, Bus: pub(12)},
		{Public: pub(3), Use: session.UseEmergency, Orders: 1, Bus: pub(13), Withdrawn: true},
		{Public: pub(4), Use: session.UseEmergency, Orders: 1},
	}}
	got, err := EmergencyOf(ks)
	if err != nil || len(got) != 1 || got[0].Key != session.KeyIDOf(pub(2)) || validateUsers(newUser(t).pub, nil, got) != nil {
		t.Errorf("%+v, %v", got, err)
	}
}
