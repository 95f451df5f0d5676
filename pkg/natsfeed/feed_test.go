package natsfeed_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/interlock-fabric/interlock/internal/broker"
	"github.com/interlock-fabric/interlock/internal/feedtest"
	"github.com/interlock-fabric/interlock/pkg/natsfeed"
	"github.com/interlock-fabric/interlock/pkg/session"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
)

func links(want ...bool) func(_, _, _ [][]byte, got []bool) bool {
	return func(_, _, _ [][]byte, got []bool) bool {
		if len(got) < len(want) {
			return false
		}
		for i, up := range want {
			if got[i] != up {
				return false
			}
		}
		return true
	}
}

// TestLogIsReadInPieces: no answer is larger than what the server lets wait for a
// client.
func TestLogIsReadInPieces(t *testing.T) {
	b := newBus(t)
	var all [][]byte
	for i := range 1000 {
		all = append(all, frame(i))
	}
	for range 12 {
		all = append(all, make([]byte, session.MaxFrameLen))
	}
	b.Append(t, all...)
	f := b.feed(t)
	n := 0
	_, err := f.Log(testContext(t), 0, func(uint64, []byte) error { n++; return nil })
	must(t, err)
	// 256 a piece, then by the megabyte: two or three large ones, or, where the
	// machine is slow, each by itself.
	if r := f.Stats().Requests; n != len(all) || r < 3+12/3 || r > 4+12+3 {
		t.Errorf("%d messages in %d requests", n, r)
	}
}

// TestHostsConnectionOfAnotherEnforcer: without the look at what the server
// refused, such a feed would be deaf and say nothing.
func TestHostsConnectionOfAnotherEnforcer(t *testing.T) {
	b := newBus(t)
	seed, pub := newUser(t)
	must(t, b.b.SetEnforcers(append(b.opts.Enforcers, broker.Enforcer{Name: "eu-4", PublicNKey: pub})))
	// A user of a bus that lets it hear nothing but its inbox.
	nc := plainServer(t, &server.Options{Users: []*server.User{{
		Username: "u", Password: "p",
		Permissions: &server.Permissions{Subscribe: &server.SubjectPermission{Allow: []string{"_INBOX_eu-4.>"}}},
	}}}, nats.UserInfo("u", "p"))
	f := natsfeed.New(nc, "eu-4")
	defer f.Close()
	if err := f.Start(testContext(t), feedtest.NewRecorder()); !errors.Is(err, natsfeed.ErrRights) {
		t.Errorf("Start: %v", err)
	}

	// A connection that hears the log, but by another's name: its reads, clock
	// and receipts would come to nothing.
	e := b.enrollment()
	e.NATS.NKeySeed = seed
	wrong, err := natsfeed.Dial(e, nil)
	must(t, err)
	defer wrong.Close()
	if err := wrong.Start(testContext(t), feedtest.NewRecorder()); !errors.Is(err, natsfeed.ErrRights) {
		t.Errorf("Start by another's name: %v", err)
	}
	bad := natsfeed.New(nc, "no.such.name")
	defer bad.Close()
	if err := bad.Start(testContext(t), feedtest.NewRecorder()); !errors.Is(err, session.ErrInvalid) {
		t.Errorf("bad name: %v", err)
	}
	if _, err := bad.Clock(testContext(t), [32]byte{}); !errors.Is(err, session.ErrInvalid) {
		t.Errorf("bad name: %v", err)
	}
}

// TestBusOfOlderAccounts: a bus that knows neither emergency orders nor the table of
// registered agents serves what it knows: they alone are missing.
func TestBusOfOlderAccounts(t *testing.T) {
	refused := make(chan error, 16)
	nc := plainServer(t, &server.Options{Users: []*server.User{{
		Username: "u", Password: "p",
		Permissions: &server.Permissions{
			Subscribe: &server.SubjectPermission{Allow: []string{natsfeed.LogSubject, natsfeed.BeatSubject, natsfeed.TrustSubject, "_INBOX_eu-3.>"}},
			Publish:   &server.SubjectPermission{Allow: []string{natsfeed.LogSubject, natsfeed.BeatSubject, natsfeed.TrustSubject}}, // for the test
		},
	}}}, nats.UserInfo("u", "p"), nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) { refused <- err }))
	f := natsfeed.New(nc, "eu-3")
	defer f.Close()
	r := feedtest.NewRecorder()
	must(t, f.Start(testContext(t), r))
	for _, want := range []string{natsfeed.OrderSubjects, "DIRECT.GET." + natsfeed.OrderStream, "DIRECT.GET." + natsfeed.AgentStream} {
		ctx, cancel := context.WithTimeout(testContext(t), 200*time.Millisecond)
		switch want {
		case natsfeed.OrderSubjects:
		case "DIRECT.GET." + natsfeed.OrderStream:
			if err := f.Orders(ctx, func([]byte) error { return nil }); err == nil {
				t.Error("the orders are read without the right")
			}
		default:
			if _, err := f.AgentIndexes(ctx); err == nil {
				t.Error("the table is read without the right")
			}
		}
		cancel()
		select {
		case err := <-refused:
			if !errors.Is(err, nats.ErrPermissionViolation) || !strings.Contains(err.Error(), want) {
				t.Errorf("said: %v, of %s", err, want)
			}
		case <-testContext(t).Done():
			t.Fatalf("nobody says that %s is refused", want)
		}
	}
	for _, subject := range []string{natsfeed.LogSubject, natsfeed.BeatSubject, natsfeed.TrustSubject} {
		must(t, nc.Publish(subject, frame(1)))
	}
	r.Await(t, "what it may hear", func(batches, beats, keySets [][]byte, _ []bool) bool {
		return len(batches) == 1 && len(beats) == 1 && len(keySets) == 1
	})
}

// link is a wire between feed and bus that can be frozen: it stays open and
// carries nothing, as a suspended server or a lost route does.
type link struct {
	addr string
	mu   sync.Mutex
	melt *sync.Cond
	ice  bool
}

func newLink(t testing.TB, to string) *link {
	t.Helper()
	l := &link{}
	l.melt = sync.NewCond(&l.mu)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	l.addr = ln.Addr().String()
	var wg sync.WaitGroup
	var mu sync.Mutex
	var open []net.Conn
	ended := false
	carry := func(dst, src net.Conn) {
		defer dst.Close()
		buf := make([]byte, 32<<10)
		for {
			n, err := src.Read(buf)
			l.mu.Lock()
			for l.ice {
				l.melt.Wait()
			}
			l.mu.Unlock()
			if _, werr := dst.Write(buf[:n]); err != nil || werr != nil {
				return
			}
		}
	}
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			s, err := net.Dial("tcp", to)
			if err != nil {
				c.Close()
				continue
			}
			mu.Lock()
			open = append(open, c, s)
			if ended {
				c.Close()
				s.Close()
			}
			mu.Unlock()
			wg.Go(func() { carry(s, c) })
			wg.Go(func() { carry(c, s) })
		}
	})
	t.Cleanup(func() {
		l.freeze(false)
		ln.Close()
		mu.Lock()
		ended = true
		for _, c := range open {
			c.Close()
		}
		mu.Unlock()
		wg.Wait()
	})
	return l
}

func (l *link) freeze(ice bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ice = ice
	l.melt.Broadcast()
}

// TestHalfOpenLinkLooksHealthy is failure 6 of docs/design/failure-modes.md, as far
// as the feed reaches:
// a link that is open and carries nothing is reported down, by the feed's own
// pings, and comes up again by itself.
func TestHalfOpenLinkLooksHealthy(t *testing.T) {
	b := newBus(t)
	l := newLink(t, strings.TrimPrefix(b.url, "nats://"))
	e := b.enrollment()
	e.NATS.URLs = []string{"nats://" + l.addr}
	f, err := natsfeed.Dial(e, nil)
	must(t, err)
	defer f.Close()
	r := feedtest.NewRecorder()
	must(t, f.Start(testContext(t), r))
	r.Await(t, "up", links(true))
	frozen := time.Now()
	l.freeze(true)
	r.Await(t, "down", links(true, false))
	if d := time.Since(frozen); d > 5*time.Second {
		t.Errorf("noticed after %s", d)
	}
	b.Append(t, frame(1))
	l.freeze(false)
	r.Await(t, "up again", links(true, false, true))
	n := 0
	_, err = f.Log(testContext(t), 0, func(uint64, []byte) error { n++; return nil })
	if err != nil || n != 1 {
		t.Errorf("what was missed: %d, %v", n, err)
	}
	if f.Stats().Reconnects == 0 {
		t.Error("no reconnection counted")
	}
}

// slow is a sink that stands still.
type slow struct {
	*feedtest.Recorder
	entered, leave chan struct{}
	once           sync.Once
}

func (s *slow) Batch(b []byte) {
	s.once.Do(func() { close(s.entered) })
	<-s.leave // closed by the test, also when it fails: Close waits for this
	s.Recorder.Batch(b)
}

// TestSlowSinkIsBounded: what overflows is dropped, counted, and in the log.
func TestSlowSinkIsBounded(t *testing.T) {
	b := newBus(t)
	f := b.feed(t)
	s := &slow{Recorder: feedtest.NewRecorder(), entered: make(chan struct{}), leave: make(chan struct{})}
	leave := sync.OnceFunc(func() { close(s.leave) })
	t.Cleanup(leave) // before the feed is closed
	must(t, f.Start(testContext(t), s))
	const n = 6000
	var all [][]byte
	for i := range n {
		all = append(all, frame(i))
	}
	b.Append(t, all[0])
	select {
	case <-s.entered:
	case <-testContext(t).Done():
		t.Fatal("the first message did not reach the sink")
	}
	b.Append(t, all[1:]...)
	read := 0
	_, err := f.Log(testContext(t), 0, func(uint64, []byte) error { read++; return nil })
	must(t, err)
	if read != n {
		t.Errorf("the log has %d of %d", read, n)
	}
	// The answers came behind the live messages, so all of those were taken or
	// dropped.
	dropped := f.Stats().Overflowed
	if dropped == 0 || dropped > n-4096 {
		t.Errorf("%d of %d dropped", dropped, n)
	}
	leave()
	s.Await(t, "what was kept", func(batches, _, _ [][]byte, _ []bool) bool { return len(batches) == n-int(dropped) })
	must(t, f.Close())
	if after := f.Stats().Overflowed; after != dropped {
		t.Errorf("%d dropped before Close, %d after", dropped, after)
	}
}

// plainServer is a NATS server without streams, for a test to play the bus.
func plainServer(t testing.TB, o *server.Options, opts ...nats.Option) *nats.Conn {
	t.Helper()
	o.DontListen, o.NoSigs, o.NoLog = true, true, true
	s, err := server.NewServer(o)
	must(t, err)
	s.Start()
	if !s.ReadyForConnections(10 * time.Second) {
		t.Fatal("server not ready")
	}
	nc, err := nats.Connect("", append([]nats.Option{nats.InProcessServer(s)}, opts...)...)
	must(t, err)
	t.Cleanup(func() {
		nc.Close()
		s.Shutdown()
		s.WaitForShutdown()
	})
	return nc
}

// TestHostileAnswers: whoever answers a read can make it fail and nothing else.
func TestHostileAnswers(t *testing.T) {
	msg := func(pos string) *nats.Msg {
		m := nats.NewMsg("")
		m.Header.Set("Nats-Sequence", pos)
		m.Data = []byte("x")
		return m
	}
	status := func(code, pending string) *nats.Msg {
		m := nats.NewMsg("")
		m.Header.Set("Status", code)
		m.Header.Set("Nats-Num-Pending", pending)
		return m
	}
	for name, tc := range map[string]struct {
		answer func(n int) []*nats.Msg
		ok     bool
		read   int
		limit  int
	}{
		"no position":        {func(int) []*nats.Msg { return []*nats.Msg{msg("")} }, false, 0, 10},
		"not a position":     {func(int) []*nats.Msg { return []*nats.Msg{msg("-1")} }, false, 0, 10},
		"position goes back": {func(int) []*nats.Msg { return []*nats.Msg{msg("5"), msg("4")} }, false, 1, 10},
		"position repeats":   {func(int) []*nats.Msg { return []*nats.Msg{msg("5"), msg("5")} }, false, 1, 10},
		"last position there is": {func(int) []*nats.Msg {
			return []*nats.Msg{msg("18446744073709551615")}
		}, false, 0, 10},
		"promises without end": {func(int) []*nats.Msg { return []*nats.Msg{status("204", "7")} }, false, 0, 10},
		"unknown status":       {func(int) []*nats.Msg { return []*nats.Msg{status("418", "")} }, false, 0, 10},
		"no responders":        {func(int) []*nats.Msg { return []*nats.Msg{status("503", "")} }, false, 0, 10},
		"nothing":              {func(int) []*nats.Msg { return []*nats.Msg{status("404", "")} }, true, 0, 1},
		"more than was asked for": {func(n int) []*nats.Msg {
			if n > 1 {
				return []*nats.Msg{status("404", "")}
			}
			var out []*nats.Msg
			for i := range 5000 {
				out = append(out, msg(fmt.Sprint(i+1)))
			}
			return out
		}, true, 257, 12},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			nc := plainServer(t, &server.Options{})
			requests := 0
			_, err := nc.Subscribe("$JS.API.DIRECT.GET."+natsfeed.LogStream, func(m *nats.Msg) {
				requests++
				for _, a := range tc.answer(requests) {
					a.Subject = m.Reply
					if err := nc.PublishMsg(a); err != nil {
						t.Error(err)
					}
				}
			})
			must(t, err)
			f := natsfeed.New(nc, "a")
			defer f.Close()
			read := 0
			_, err = f.Log(testContext(t), 0, func(uint64, []byte) error { read++; return nil })
			if (err == nil) != tc.ok || errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("error %v", err)
			}
			if read != tc.read {
				t.Errorf("%d messages read, want %d", read, tc.read)
			}
			if n := int(f.Stats().Requests); n > tc.limit {
				t.Errorf("%d requests", n)
			}
		})
	}
}

func TestNoStreamIsAnError(t *testing.T) {
	nc := plainServer(t, &server.Options{})
	f := natsfeed.New(nc, "a")
	defer f.Close()
	if _, err := f.KeySets(testContext(t)); !errors.Is(err, nats.ErrNoResponders) {
		t.Errorf("KeySets: %v", err)
	}
	if _, err := f.Clock(testContext(t), [32]byte{}); !errors.Is(err, natsfeed.ErrNoWriter) {
		t.Errorf("Clock: %v", err)
	}
}

// TestConnectionOfTheHostIsGone: the host closed it under the feed.
func TestConnectionOfTheHostIsGone(t *testing.T) {
	nc := plainServer(t, &server.Options{})
	f := natsfeed.New(nc, "a")
	r := feedtest.NewRecorder()
	must(t, f.Start(testContext(t), r))
	nc.Close()
	r.Await(t, "down", links(true, false))
	if _, err := f.Log(testContext(t), 0, func(uint64, []byte) error { return nil }); !errors.Is(err, natsfeed.ErrDisconnected) {
		t.Errorf("Log: %v", err)
	}
	if err := f.Receipt(testContext(t), nil); !errors.Is(err, natsfeed.ErrDisconnected) {
		t.Errorf("Receipt: %v", err)
	}
	if err := f.Report(testContext(t), nil); !errors.Is(err, natsfeed.ErrDisconnected) {
		t.Errorf("Report: %v", err)
	}
	if err := f.Report(testContext(t), make([]byte, session.MaxReportLen+1)); !errors.Is(err, session.ErrInvalid) {
		t.Errorf("a report that is too long: %v", err)
	}
	must(t, f.Close())
	if err := f.Report(testContext(t), nil); !errors.Is(err, natsfeed.ErrClosed) {
		t.Errorf("Report after Close: %v", err)
	}
}

func TestDialRefusesBadEnrolments(t *testing.T) {
	seed, _ := newUser(t)
	for name, change := range map[string]func(*session.Enrollment){
		"no name":        func(e *session.Enrollment) { e.Enforcer = "" },
		"bad name":       func(e *session.Enrollment) { e.Enforcer = "a.>" },
		"no seed":        func(e *session.Enrollment) { e.NATS.NKeySeed = "" },
		"torn seed":      func(e *session.Enrollment) { e.NATS.NKeySeed = seed[:40] },
		"no server":      func(e *session.Enrollment) { e.NATS.URLs = nil },
		"not a URL":      func(e *session.Enrollment) { e.NATS.URLs = []string{"nats://user:hunter2@[::1"} },
		"two in one":     func(e *session.Enrollment) { e.NATS.URLs = []string{"nats://127.0.0.1:1,nats://evil:1"} },
		"other protocol": func(e *session.Enrollment) { e.NATS.URLs = []string{"ws://127.0.0.1:4222"} },
		"no certificate": func(e *session.Enrollment) { e.NATS.CAs = "none" },
	} {
		t.Run(name, func(t *testing.T) {
			e := &session.Enrollment{Enforcer: "a", NATS: session.NATSAccess{URLs: []string{"nats://127.0.0.1:1"}, NKeySeed: seed}}
			change(e)
			f, err := natsfeed.Dial(e, nil)
			if err == nil {
				f.Close()
				t.Fatal("no error")
			}
			if !errors.Is(err, session.ErrInvalid) || strings.Contains(err.Error(), seed[:40]) || strings.Contains(err.Error(), "hunter2") {
				t.Errorf("error %v", err)
			}
		})
	}
	if _, err := natsfeed.Dial(nil, nil); !errors.Is(err, session.ErrInvalid) {
		t.Errorf("nil: %v", err)
	}
}

// TestRefusedUntilTheRosterHasIt: a server that does not know the enforcer yet is
// asked again; nats.go alone gives up after two refusals.
func TestRefusedUntilTheRosterHasIt(t *testing.T) {
	b := newBus(t)
	list := b.opts.Enforcers
	must(t, b.b.SetEnforcers(nil))
	f, err := natsfeed.Dial(b.enrollment(), nil)
	must(t, err)
	defer f.Close()
	r := feedtest.NewRecorder()
	for range 5 {
		ctx, cancel := context.WithTimeout(context.Background(), 200*time.Millisecond)
		err := f.Start(ctx, r)
		cancel()
		if !errors.Is(err, natsfeed.ErrDisconnected) {
			t.Fatalf("Start: %v", err)
		}
	}
	must(t, b.b.SetEnforcers(list))
	must(t, f.Start(testContext(t), feedtest.NewRecorder()))
}
