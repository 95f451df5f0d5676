package broker

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/interlock-fabric/interlock/pkg/natsfeed"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/nats-io/nkeys"
)

// user is an NKey.
type user struct{ seed, pub string }

func newUser(t testing.TB) user {
	t.Helper()
	kp, err := nkeys.CreateUser()
	if err != nil {
		t.Fatal(err)
	}
	seed, err := kp.Seed()
	if err != nil {
		t.Fatal(err)
	}
	pub, err := kp.PublicKey()
	if err != nil {
		t.Fatal(err)
	}
	return user{string(seed), pub}
}

func (u user) option(t testing.TB) nats.Option {
	t.Helper()
	kp, err := nkeys.FromSeed([]byte(u.seed))
	if err != nil {
		t.Fatal(err)
	}
	return nats.Nkey(u.pub, kp.Sign)
}

// fabric is a broker with an authority's connection and two enforcers enrolled.
type fabric struct {
	*Broker
	authority, a, b user
	nc              *nats.Conn
	js              jetstream.JetStream
}

func testContext(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func newFabric(t testing.TB, dir string) *fabric {
	t.Helper()
	f := &fabric{authority: newUser(t), a: newUser(t), b: newUser(t)}
	f.start(t, dir)
	return f
}

func (f *fabric) enforcers() []Enforcer { return []Enforcer{{"a", f.a.pub}, {"b", f.b.pub}} }

func (f *fabric) start(t testing.TB, dir string) {
	t.Helper()
	b, err := Start(Options{Dir: dir, Listen: "127.0.0.1:0", Authority: f.authority.pub, Enforcers: f.enforcers()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.Close() })
	f.Broker = b
	f.nc, err = b.Conn(testContext(t), f.authority.seed)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(f.nc.Close)
	f.js, err = jetstream.New(f.nc)
	if err != nil {
		t.Fatal(err)
	}
	if err := EnsureStreams(testContext(t), f.js, 1); err != nil {
		t.Fatal(err)
	}
}

// client is an enforcer's connection that collects what the server refuses.
type client struct {
	*nats.Conn
	errs chan error
}

func (f *fabric) dial(t testing.TB, name string, u user) *client {
	t.Helper()
	c := &client{errs: make(chan error, 64)}
	nc, err := nats.Connect(f.ClientURL(), u.option(t), nats.CustomInboxPrefix(natsfeed.InboxPrefix(name)),
		nats.MaxReconnects(-1), nats.ReconnectWait(20*time.Millisecond),
		nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) {
			select {
			case c.errs <- err:
			default:
			}
		}))
	if err != nil {
		t.Fatal(err)
	}
	c.Conn = nc
	t.Cleanup(nc.Close)
	return c
}

// refused reports the refusals up to now. The server answers a client's
// operations in order, but reports to the handler run on a goroutine of their
// own, so a marker refusal ends the list.
func (c *client) refused(t testing.TB) []string {
	t.Helper()
	const marker = "marker.of.the.test"
	if err := c.Publish(marker, nil); err != nil {
		t.Fatal(err)
	}
	if err := c.Flush(); err != nil {
		t.Fatal(err)
	}
	var out []string
	for {
		select {
		case err := <-c.errs:
			if !errors.Is(err, nats.ErrPermissionViolation) {
				t.Fatalf("unexpected error: %v", err)
			}
			if strings.Contains(err.Error(), marker) {
				return out
			}
			out = append(out, err.Error())
		case <-time.After(10 * time.Second):
			t.Fatal("the marker was not refused: the enforcer may publish anything")
		}
	}
}

func (f *fabric) state(t testing.TB, stream string) jetstream.StreamState {
	t.Helper()
	s, err := f.js.Stream(testContext(t), stream)
	if err != nil {
		t.Fatalf("stream %s: %v", stream, err)
	}
	return s.CachedInfo().State
}

// eventually polls cond, which looks at a server of its own pace.
func eventually(t testing.TB, what string, cond func() bool) {
	t.Helper()
	deadline := time.NewTimer(10 * time.Second)
	defer deadline.Stop()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !cond() {
		select {
		case <-tick.C:
		case <-deadline.C:
			t.Fatalf("not in time: %s", what)
		}
	}
}

func TestEnforcerMayDoThisAndNothingElse(t *testing.T) {
	f := newFabric(t, t.TempDir())
	for _, tc := range []struct {
		name, subject string
		publish, ok   bool
	}{
		{"own receipt", natsfeed.ReceiptSubject("a"), true, true},
		{"own report", natsfeed.ReportSubject("a"), true, true},
		{"own clock request", natsfeed.ClockSubject("a"), true, true},
		{"read of the log", "$JS.API.DIRECT.GET.INTERLOCK_LOG", true, true},
		{"read of the key sets", "$JS.API.DIRECT.GET.INTERLOCK_TRUST", true, true},

		{"read of the orders", "$JS.API.DIRECT.GET.INTERLOCK_ORDERS", true, true},

		{"an order", "interlock.v1.order.0100000000000000", true, false},
		{"another's receipt", natsfeed.ReceiptSubject("b"), true, false},
		{"another's report", natsfeed.ReportSubject("b"), true, false},
		{"read of the reports", "$JS.API.DIRECT.GET.INTERLOCK_REPORTS", true, false},
		{"the audit", natsfeed.AuditSubject, true, false},
		{"hearing the audit", natsfeed.AuditSubject, false, false},
		{"read of the audit", "$JS.API.DIRECT.GET.INTERLOCK_AUDIT", true, false},
		{"another read of the audit", "$JS.API.STREAM.MSG.GET.INTERLOCK_AUDIT", true, false},
		{"another's clock request", natsfeed.ClockSubject("b"), true, false},
		{"the log", natsfeed.LogSubject, true, false},
		{"heartbeats", natsfeed.BeatSubject, true, false},
		{"key sets", natsfeed.TrustSubject, true, false},
		{"forwarding", natsfeed.ForwardSubject, true, false},
		{"own inbox", "_INBOX_a.x", true, false},
		{"another's inbox", "_INBOX_b.x", true, false},
		{"the authority's inbox", "_INBOX.x", true, false},
		{"a mapped reply", "_R_.x", true, false},
		{"read of the receipts", "$JS.API.DIRECT.GET.INTERLOCK_RECEIPTS", true, false},
		{"read by subject", "$JS.API.DIRECT.GET.INTERLOCK_LOG.interlock.v1.log", true, false},
		{"read by message get", "$JS.API.STREAM.MSG.GET.INTERLOCK_LOG", true, false},
		{"the lease", "$KV.INTERLOCK_LEASE.writer", true, false},
		{"consumer create", "$JS.API.CONSUMER.CREATE.INTERLOCK_LOG", true, false},
		{"consumer create, named", "$JS.API.CONSUMER.CREATE.INTERLOCK_LOG.c", true, false},
		{"consumer create, durable", "$JS.API.CONSUMER.DURABLE.CREATE.INTERLOCK_LOG.c", true, false},
		{"consumer delete", "$JS.API.CONSUMER.DELETE.INTERLOCK_LOG.c", true, false},
		{"consumer next", "$JS.API.CONSUMER.MSG.NEXT.INTERLOCK_LOG.c", true, false},
		{"stream create", "$JS.API.STREAM.CREATE.X", true, false},
		{"stream update", "$JS.API.STREAM.UPDATE.INTERLOCK_LOG", true, false},
		{"stream info", "$JS.API.STREAM.INFO.INTERLOCK_LOG", true, false},
		{"stream purge", "$JS.API.STREAM.PURGE.INTERLOCK_LOG", true, false},
		{"stream delete", "$JS.API.STREAM.DELETE.INTERLOCK_LOG", true, false},
		{"stream snapshot", "$JS.API.STREAM.SNAPSHOT.INTERLOCK_LOG", true, false},
		{"message delete", "$JS.API.STREAM.MSG.DELETE.INTERLOCK_LOG", true, false},
		{"leader step-down", "$JS.API.STREAM.LEADER.STEPDOWN.INTERLOCK_LOG", true, false},
		{"account info", "$JS.API.INFO", true, false},
		{"acknowledgement", "$JS.ACK.INTERLOCK_LOG.c.1.1.1.1.1", true, false},
		{"system requests", "$SYS.REQ.SERVER.PING", true, false},
		{"system account", "$SYS.REQ.ACCOUNT.INTERLOCK.CONNZ", true, false},

		{"hear the log", natsfeed.LogSubject, false, true},
		{"hear heartbeats", natsfeed.BeatSubject, false, true},
		{"hear key sets", natsfeed.TrustSubject, false, true},
		{"hear orders", natsfeed.OrderSubjects, false, true},
		{"hear own inbox", "_INBOX_a.x", false, true},
		{"hear all of own inbox", "_INBOX_a.>", false, true},

		{"hear everything", ">", false, false},
		{"hear the fabric", "interlock.v1.>", false, false},
		{"hear others' receipts", natsfeed.ReceiptSubjects, false, false},
		{"hear own receipts", natsfeed.ReceiptSubject("a"), false, false},
		{"hear others' reports", natsfeed.ReportSubjects, false, false},
		{"hear own reports", natsfeed.ReportSubject("a"), false, false},
		{"hear clock requests", natsfeed.ClockSubject("b"), false, false},
		{"hear forwarded decisions", natsfeed.ForwardSubject, false, false},
		{"hear another's inbox", "_INBOX_b.>", false, false},
		{"hear every inbox", "*.>", false, false},
		{"hear the authority's inbox", "_INBOX.>", false, false},
		{"hear JetStream", "$JS.>", false, false},
		{"hear the lease", "$KV.>", false, false},
		{"hear the system", "$SYS.>", false, false},
		{"queue on the log", natsfeed.LogSubject + " q", false, true},
	} {
		t.Run(strings.ReplaceAll(tc.name, "'", ""), func(t *testing.T) {
			c := f.dial(t, "a", f.a)
			if tc.publish {
				if err := c.Publish(tc.subject, []byte("{}")); err != nil {
					t.Fatal(err)
				}
			} else {
				var err error
				if subject, queue, ok := strings.Cut(tc.subject, " "); ok {
					_, err = c.QueueSubscribeSync(subject, queue)
				} else {
					_, err = c.SubscribeSync(tc.subject)
				}
				if err != nil {
					t.Fatal(err)
				}
			}
			got := c.refused(t)
			if ok := len(got) == 0; ok != tc.ok {
				t.Errorf("allowed = %v, want %v (%v)", ok, tc.ok, got)
			}
		})
	}
}

// TestReplySubjectLeadsNowhere: the server sends the answer to a read past all
// permissions, to whatever reply subject the request names. With enforcers in the
// authority's account, the empty end-of-batch message purged and deleted streams
// when this was tried.
func TestReplySubjectLeadsNowhere(t *testing.T) {
	f := newFabric(t, t.TempDir())
	ctx := testContext(t)
	for range 3 {
		if _, err := f.js.Publish(ctx, natsfeed.LogSubject, []byte("batch")); err != nil {
			t.Fatal(err)
		}
		if _, err := f.js.Publish(ctx, natsfeed.TrustSubject, []byte("key set")); err != nil {
			t.Fatal(err)
		}
	}
	all := []string{natsfeed.LogStream, natsfeed.TrustStream, natsfeed.ReceiptStream, natsfeed.ReportStream, natsfeed.AuditStream, "KV_" + natsfeed.LeaseBucket}
	before := map[string]jetstream.StreamState{}
	for _, s := range all {
		before[s] = f.state(t, s)
	}
	other := f.dial(t, "b", f.b)
	heard := make(chan *nats.Msg, 64)
	for _, s := range []string{natsfeed.LogSubject, natsfeed.TrustSubject, natsfeed.BeatSubject, "_INBOX_b.>"} {
		if _, err := other.ChanSubscribe(s, heard); err != nil {
			t.Fatal(err)
		}
	}
	if err := other.Flush(); err != nil {
		t.Fatal(err)
	}

	hostile := f.dial(t, "a", f.a)
	replies := []string{
		natsfeed.LogSubject, natsfeed.TrustSubject, natsfeed.BeatSubject, natsfeed.ForwardSubject,
		natsfeed.ReceiptSubject("b"), natsfeed.ClockSubject("b"),
		"$KV." + natsfeed.LeaseBucket + ".writer", "_INBOX_b.x",
		"$JS.API.STREAM.PURGE." + natsfeed.LogStream, "$JS.API.STREAM.DELETE." + natsfeed.LogStream,
		"$JS.API.STREAM.PURGE." + natsfeed.TrustStream, "$JS.API.STREAM.DELETE." + natsfeed.TrustStream,
		"$JS.API.STREAM.DELETE.KV_" + natsfeed.LeaseBucket,
	}
	for _, reply := range replies {
		for _, stream := range []string{natsfeed.LogStream, natsfeed.TrustStream} {
			for _, req := range []string{`{"seq":1,"batch":10}`, `{}`, ``, `{"multi_last":[">"]}`} {
				if err := hostile.PublishRequest(directGet+stream, reply, []byte(req)); err != nil {
					t.Fatal(err)
				}
			}
		}
		// A clock request, which the writer answers on its own authority.
		if err := hostile.PublishRequest(natsfeed.ClockSubject("a"), reply, make([]byte, 32)); err != nil {
			t.Fatal(err)
		}
		// A receipt, which a stream with acknowledgements would answer.
		if err := hostile.PublishRequest(natsfeed.ReceiptSubject("a"), reply, []byte("receipt")); err != nil {
			t.Fatal(err)
		}
	}
	// Tracing sends events to a subject that a header names.
	m := &nats.Msg{Subject: natsfeed.ReceiptSubject("a"), Header: nats.Header{}, Data: []byte("receipt")}
	m.Header.Set("Nats-Trace-Dest", natsfeed.LogSubject)
	m.Header.Set("Nats-Rollup", "all")
	if err := hostile.PublishMsg(m); err != nil {
		t.Fatal(err)
	}
	// An honest read behind all of it: the server works a client's messages off
	// in order.
	if _, err := hostile.Request(directGet+natsfeed.LogStream, []byte(`{"seq":1}`), 5*time.Second); err != nil {
		t.Fatal(err)
	}
	eventually(t, "receipts stored", func() bool {
		return f.state(t, natsfeed.ReceiptStream).Msgs >= uint64(len(replies))
	})
	for _, s := range all {
		got, want := f.state(t, s), before[s]
		if s == natsfeed.ReceiptStream {
			if got.Msgs != uint64(len(replies)) {
				t.Errorf("%s: %d messages, want the %d receipts", s, got.Msgs, len(replies))
			}
			continue
		}
		if got.LastSeq != want.LastSeq || got.Msgs != want.Msgs {
			t.Errorf("%s: was %d messages to %d, is %d to %d", s, want.Msgs, want.LastSeq, got.Msgs, got.LastSeq)
		}
	}
	if err := other.Flush(); err != nil {
		t.Fatal(err)
	}
	select {
	case m := <-heard:
		t.Errorf("the other enforcer heard %q on %s", m.Data, m.Subject)
	default:
	}
}

// TestPublisherPortWithoutAuthentication is failure 12 of docs/design/failure-modes.md.
func TestPublisherPortWithoutAuthentication(t *testing.T) {
	f := newFabric(t, t.TempDir())
	stranger := newUser(t)
	for name, opts := range map[string][]nats.Option{
		"no credentials":   nil,
		"user and pass":    {nats.UserInfo("admin", "admin")},
		"unknown key":      {stranger.option(t)},
		"another's public": {nats.Nkey(f.a.pub, func([]byte) ([]byte, error) { return make([]byte, 64), nil })},
	} {
		t.Run(name, func(t *testing.T) {
			nc, err := nats.Connect(f.ClientURL(), opts...)
			if err == nil {
				nc.Close()
				t.Fatal("connected")
			}
			if !errors.Is(err, nats.ErrAuthorization) && !strings.Contains(err.Error(), "nkey") {
				t.Fatalf("refused for another reason: %v", err)
			}
		})
	}
	if nc, err := f.Conn(testContext(t), stranger.seed); err == nil {
		nc.Close()
		t.Fatal("in-process connection without rights")
	}
}

func TestEnforcerReadsAndIsAnswered(t *testing.T) {
	f := newFabric(t, t.TempDir())
	ctx := testContext(t)
	c := f.dial(t, "a", f.a)
	live, err := c.SubscribeSync(natsfeed.LogSubject)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Flush(); err != nil {
		t.Fatal(err)
	}
	if _, err := f.js.Publish(ctx, natsfeed.LogSubject, []byte("batch 1")); err != nil {
		t.Fatal(err)
	}
	if m, err := live.NextMsg(5 * time.Second); err != nil || string(m.Data) != "batch 1" {
		t.Fatalf("live: %v, %v", m, err)
	}
	m, err := c.Request(directGet+natsfeed.LogStream, []byte(`{"seq":1}`), 5*time.Second)
	if err != nil || string(m.Data) != "batch 1" {
		t.Fatalf("read: %v, %v", m, err)
	}

	// The writer answers a nonce, under the right to answer alone.
	sub, err := f.nc.Subscribe(natsfeed.ClockSubjects, func(m *nats.Msg) { m.Respond([]byte("time")) })
	if err != nil {
		t.Fatal(err)
	}
	defer sub.Unsubscribe()
	if err := f.nc.Flush(); err != nil {
		t.Fatal(err)
	}
	if m, err := c.Request(natsfeed.ClockSubject("a"), []byte("nonce"), 5*time.Second); err != nil || string(m.Data) != "time" {
		t.Fatalf("clock: %v, %v", m, err)
	}
	if err := c.Publish(natsfeed.ReceiptSubject("a"), []byte("receipt")); err != nil {
		t.Fatal(err)
	}
	eventually(t, "receipt stored", func() bool { return f.state(t, natsfeed.ReceiptStream).Msgs == 1 })
}

func TestSetEnforcers(t *testing.T) {
	f := newFabric(t, t.TempDir())
	var dropped sync.Map
	a, b := f.dial(t, "a", f.a), f.dial(t, "b", f.b)
	a.SetDisconnectErrHandler(func(*nats.Conn, error) { dropped.Store("a", true) })
	b.SetDisconnectErrHandler(func(*nats.Conn, error) { dropped.Store("b", true) })
	live, err := b.SubscribeSync(natsfeed.LogSubject)
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Flush(); err != nil {
		t.Fatal(err)
	}

	// Decisions go on while the list changes: the one who stays hears all.
	const n = 200
	published := make(chan error, 1)
	go func() {
		for i := range n {
			if _, err := f.js.Publish(context.Background(), natsfeed.LogSubject, fmt.Append(nil, i)); err != nil {
				published <- err
				return
			}
		}
		published <- nil
	}()
	late := newUser(t)
	if err := f.SetEnforcers([]Enforcer{{"b", f.b.pub}, {"late", late.pub}}); err != nil {
		t.Fatal(err)
	}
	if err := <-published; err != nil {
		t.Fatal(err)
	}
	for i := range n {
		m, err := live.NextMsg(5 * time.Second)
		if err != nil {
			t.Fatalf("message %d: %v", i, err)
		}
		if string(m.Data) != fmt.Sprint(i) {
			t.Fatalf("heard %s, want %d", m.Data, i)
		}
	}
	eventually(t, "the removed one is cut", func() bool { _, ok := dropped.Load("a"); return ok })
	if _, ok := dropped.Load("b"); ok {
		t.Error("the one who stays was cut")
	}
	if nc, err := nats.Connect(f.ClientURL(), f.a.option(t)); err == nil {
		nc.Close()
		t.Error("the removed one is back")
	}
	l := f.dial(t, "late", late)
	if _, err := l.Request(directGet+natsfeed.LogStream, []byte(`{"seq":1}`), 5*time.Second); err != nil {
		t.Errorf("the new one cannot read: %v", err)
	}
	if _, err := b.Request(directGet+natsfeed.LogStream, []byte(`{"seq":1}`), 5*time.Second); err != nil {
		t.Errorf("the one who stays cannot read any more: %v", err)
	}
	if err := f.SetEnforcers([]Enforcer{{"x", f.b.pub}, {"y", f.b.pub}}); err == nil {
		t.Error("one key for two enforcers")
	}
	if err := f.SetEnforcers([]Enforcer{{"x.>", f.b.pub}}); err == nil {
		t.Error("a name with a wildcard")
	}
}

func TestRestartKeepsData(t *testing.T) {
	dir := t.TempDir()
	f := newFabric(t, dir)
	ctx := testContext(t)
	for i := range 50 {
		if _, err := f.js.Publish(ctx, natsfeed.LogSubject, fmt.Append(nil, i)); err != nil {
			t.Fatal(err)
		}
	}
	f.nc.Close()
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatalf("second Close: %v", err)
	}
	if _, err := f.Conn(ctx, f.authority.seed); !errors.Is(err, ErrClosed) {
		t.Errorf("Conn after Close: %v", err)
	}
	if err := f.SetEnforcers(nil); !errors.Is(err, ErrClosed) {
		t.Errorf("SetEnforcers after Close: %v", err)
	}
	f.start(t, dir)
	if got := f.state(t, natsfeed.LogStream); got.Msgs != 50 || got.LastSeq != 50 {
		t.Fatalf("after restart: %+v", got)
	}
	s, err := f.js.Stream(ctx, natsfeed.LogStream)
	if err != nil {
		t.Fatal(err)
	}
	if m, err := s.GetMsg(ctx, 50); err != nil || string(m.Data) != "49" {
		t.Fatalf("last message: %v, %v", m, err)
	}
}

// TestSyncAlwaysIsInForce asks the running server: a field of that name in its
// options that JetStream did not read would be worth nothing.
func TestSyncAlwaysIsInForce(t *testing.T) {
	for name, relaxed := range map[string]bool{"default": false, "relaxed": true} {
		t.Run(name, func(t *testing.T) {
			b, err := Start(Options{Dir: t.TempDir(), Authority: newUser(t).pub, RelaxedSync: relaxed})
			if err != nil {
				t.Fatal(err)
			}
			defer b.Close()
			v, err := b.srv.Jsz(&server.JSzOptions{Config: true})
			if err != nil {
				t.Fatal(err)
			}
			if v.Config.SyncAlways == relaxed {
				t.Errorf("sync_always = %v", v.Config.SyncAlways)
			}
			if b.ClientURL() != "" {
				t.Errorf("in-process broker has the URL %s", b.ClientURL())
			}
		})
	}
}

func TestTwoBrokersOnOneDirectory(t *testing.T) {
	dir := t.TempDir()
	f := newFabric(t, dir)
	if _, err := Start(Options{Dir: dir, Authority: f.authority.pub}); !errors.Is(err, ErrInUse) {
		t.Fatalf("second broker: %v", err)
	}
	if f.state(t, natsfeed.LogStream).Msgs != 0 {
		t.Fatal("the first one is harmed")
	}
}

func TestDirectoryIsPrivate(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "data")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	newFabric(t, dir)
	info, err := os.Stat(dir)
	if err != nil {
		t.Fatal(err)
	}
	if info.Mode().Perm() != 0o700 {
		t.Errorf("mode %v", info.Mode())
	}
}

func TestOptionsAreRefused(t *testing.T) {
	a, e := newUser(t).pub, newUser(t).pub
	for name, tc := range map[string]struct {
		o    Options
		want string
	}{
		"no directory":        {Options{Authority: a}, "no directory"},
		"no authority":        {Options{Dir: "d"}, "authority"},
		"open without TLS":    {Options{Dir: "d", Authority: a, Listen: "0.0.0.0:4222"}, "TLS is required"},
		"named host, no TLS":  {Options{Dir: "d", Authority: a, Listen: "bus.internal:4222"}, "TLS is required"},
		"no host":             {Options{Dir: "d", Authority: a, Listen: ":4222"}, "names no host"},
		"bad port":            {Options{Dir: "d", Authority: a, Listen: "127.0.0.1:x"}, "bad port"},
		"small payload":       {Options{Dir: "d", Authority: a, MaxPayload: 1024}, "does not hold a frame"},
		"twice":               {Options{Dir: "d", Authority: a, Enforcers: []Enforcer{{"a", e}, {"a", a}}}, "twice"},
		"authority as an enf": {Options{Dir: "d", Authority: a, Enforcers: []Enforcer{{"a", a}}}, "another's"},
		"config in a name":    {Options{Dir: "d", Authority: a, Enforcers: []Enforcer{{"a} users: [", e}}}, "cannot name"},
		"config in a key":     {Options{Dir: "d", Authority: a, Enforcers: []Enforcer{{"a", "U}, {"}}}, "malformed"},
		"cluster in process": {Options{Dir: "d", Authority: a, Cluster: &Cluster{
			Name: "c", ServerName: "s", Secret: "x", Listen: "127.0.0.1:0"}}, "needs a listen address"},
		"route without secret": {Options{Dir: "d", Authority: a, Listen: "127.0.0.1:0", Cluster: &Cluster{
			Name: "c", ServerName: "s", Listen: "127.0.0.1:0"}}, "secret"},
		"route without TLS": {Options{Dir: "d", Authority: a, Listen: "127.0.0.1:0", Cluster: &Cluster{
			Name: "c", ServerName: "s", Secret: "x", Listen: "127.0.0.1:0", Routes: []string{"10.0.0.1:6222"}}}, "TLS is required"},
	} {
		t.Run(name, func(t *testing.T) {
			b, err := Start(tc.o)
			if err == nil {
				b.Close()
				t.Fatal("started")
			}
			if !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error %q, want %q", err, tc.want)
			}
		})
	}
}

func TestPortTaken(t *testing.T) {
	f := newFabric(t, t.TempDir())
	addr := strings.TrimPrefix(f.ClientURL(), "nats://")
	b, err := Start(Options{Dir: t.TempDir(), Listen: addr, Authority: f.authority.pub})
	if err == nil {
		b.Close()
		t.Fatal("two listeners on one port")
	}
	if !strings.Contains(err.Error(), "address already in use") {
		t.Errorf("error %q", err)
	}
}

// TestServerConfigIsWhatRuns: the text for an external server parses, and gives
// the same accounts.
func TestServerConfigIsWhatRuns(t *testing.T) {
	a, e := newUser(t).pub, newUser(t).pub
	text, err := ServerConfig(a, []Enforcer{{"eu-3", e}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	var so server.Options
	if err := so.ProcessConfigString(text + "\njetstream { sync_interval: always }\n"); err != nil {
		t.Fatal(err)
	}
	if !so.SyncAlways || len(so.Nkeys) != 2 || len(so.Accounts) != 2 {
		t.Errorf("parsed %d users in %d accounts", len(so.Nkeys), len(so.Accounts))
	}
	for _, u := range so.Nkeys {
		if u.Nkey != e {
			continue
		}
		got, err := json.Marshal(u.Permissions)
		if err != nil {
			t.Fatal(err)
		}
		if u.Account.Name != AccountOf("eu-3") || u.Permissions.Response != nil {
			t.Errorf("account %s, permissions %s", u.Account.Name, got)
		}
	}
	if _, err := ServerConfig(a, []Enforcer{{"}", e}}, nil); err == nil {
		t.Error("a name that ends the block")
	}
}

func TestTLS(t *testing.T) {
	cert, pool := selfSigned(t)
	authority, e := newUser(t), newUser(t)
	b, err := Start(Options{Dir: t.TempDir(), Listen: "0.0.0.0:0", Authority: authority.pub,
		Enforcers: []Enforcer{{"a", e.pub}}, TLS: &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS13}})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	nc, err := b.Conn(testContext(t), authority.seed)
	if err != nil {
		t.Fatalf("in-process: %v", err)
	}
	nc.Close()
	url := strings.Replace(b.ClientURL(), "0.0.0.0", "127.0.0.1", 1)
	if nc, err := nats.Connect(url, e.option(t)); err == nil {
		nc.Close()
		t.Error("connected without verifying the server")
	}
	nc, err = nats.Connect(url, e.option(t), nats.Secure(&tls.Config{RootCAs: pool, ServerName: "127.0.0.1", MinVersion: tls.VersionTLS13}))
	if err != nil {
		t.Fatal(err)
	}
	nc.Close()
	if err := b.SetEnforcers(nil); err != nil {
		t.Errorf("reload under TLS: %v", err)
	}
}
