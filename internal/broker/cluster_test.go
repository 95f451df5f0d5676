package broker

import (
	"fmt"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/interlock-fabric/interlock/pkg/natsfeed"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// freePorts reserves ports for routes, which must be known beforehand.
func freePorts(t testing.TB, n int) []string {
	t.Helper()
	var out []string
	var open []net.Listener
	for range n {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		open = append(open, ln)
		out = append(out, ln.Addr().String())
	}
	for _, ln := range open {
		if err := ln.Close(); err != nil {
			t.Fatal(err)
		}
	}
	return out
}

// TestCluster: three servers, three replicas; enforcers read, hear and are heard
// through any of them, the list changes under load, and the loss of the log's
// leader loses nothing that was acknowledged and stops nobody from hearing.
func TestCluster(t *testing.T) {
	authority, a, b := newUser(t), newUser(t), newUser(t)
	routes := freePorts(t, 3)
	servers := make([]*Broker, 3)
	for i := range servers {
		var err error
		servers[i], err = Start(Options{
			Dir: t.TempDir(), Listen: "127.0.0.1:0", Authority: authority.pub,
			Enforcers: []Enforcer{{"a", a.pub}, {"b", b.pub}},
			Cluster:   &Cluster{Name: "c", ServerName: fmt.Sprint("n", i), Listen: routes[i], Routes: routes, Secret: "s3cret"},
		})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { servers[i].Close() })
	}
	connect := func(i int) (*nats.Conn, jetstream.JetStream) {
		t.Helper()
		nc, err := servers[i].Conn(testContext(t), authority.seed)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(nc.Close)
		js, err := jetstream.New(nc)
		if err != nil {
			t.Fatal(err)
		}
		return nc, js
	}
	_, js := connect(0)
	var last error
	for end := time.Now().Add(40 * time.Second); ; {
		ctx, cancel := timeout(3 * time.Second)
		last = EnsureStreams(ctx, js, 3)
		cancel()
		if last == nil {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("no streams of three replicas: %v", last)
		}
	}
	s, err := js.Stream(testContext(t), natsfeed.LogStream)
	if err != nil {
		t.Fatal(err)
	}
	if n := s.CachedInfo().Config.Replicas; n != 3 {
		t.Fatalf("%d replicas", n)
	}
	leader := int(s.CachedInfo().Cluster.Leader[1] - '0')
	other, third := (leader+1)%3, (leader+2)%3

	nc, js := connect(other)
	f := &fabric{Broker: servers[third], authority: authority, a: a, b: b, nc: nc, js: js}
	ea := f.dial(t, "a", a)
	heard := make(chan *nats.Msg, 1024)
	if _, err := ea.ChanSubscribe(natsfeed.LogSubject, heard); err != nil {
		t.Fatal(err)
	}
	answering, err := nc.Subscribe(natsfeed.ClockSubjects, func(m *nats.Msg) { m.Respond([]byte("time")) })
	if err != nil {
		t.Fatal(err)
	}
	defer answering.Unsubscribe()
	ask := func() bool {
		m, err := ea.Request(natsfeed.ClockSubject("a"), []byte("nonce"), 200*time.Millisecond)
		return err == nil && string(m.Data) == "time"
	}
	eventually(t, "the writer answers across servers", ask)

	// Removing b on every server does not touch a.
	for _, srv := range servers {
		if err := srv.SetEnforcers([]Enforcer{{"a", a.pub}}); err != nil {
			t.Fatal(err)
		}
	}
	if n := ea.Stats().Reconnects; n != 0 {
		t.Errorf("the one who stays was cut %d times", n)
	}
	if nc, err := nats.Connect(servers[third].ClientURL(), b.option(t)); err == nil {
		nc.Close()
		t.Error("the removed one is back")
	}
	eventually(t, "answers after the change", ask)
	ctx := testContext(t)
	for i := range 20 {
		if _, err := js.Publish(ctx, natsfeed.LogSubject, fmt.Append(nil, i)); err != nil {
			t.Fatal(err)
		}
	}

	// The leader goes. What is published meanwhile is heard at once, whether or
	// not it can be acknowledged yet.
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := servers[leader].Close(); err != nil {
			t.Error(err)
		}
	})
	if err := nc.Publish(natsfeed.LogSubject, []byte("during")); err != nil {
		t.Fatal(err)
	}
	for i := range 21 {
		select {
		case m := <-heard:
			if want := fmt.Sprint(i); i < 20 && string(m.Data) != want || i == 20 && string(m.Data) != "during" {
				t.Fatalf("heard %q at %d", m.Data, i)
			}
		case <-time.After(10 * time.Second):
			t.Fatalf("heard %d of 21", i)
		}
	}
	wg.Wait()
	deadline := time.Now().Add(20 * time.Second)
	for {
		ctx, cancel := timeout(2 * time.Second)
		_, err := js.Publish(ctx, natsfeed.LogSubject, []byte("after"))
		cancel()
		if err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("no new leader: %v", err)
		}
	}
	for i := range 20 {
		eventually(t, "read of what was acknowledged", func() bool {
			m, err := ea.Request(directGet+natsfeed.LogStream, fmt.Appendf(nil, `{"seq":%d}`, i+1), time.Second)
			return err == nil && string(m.Data) == fmt.Sprint(i)
		})
	}
}

// TestRouteWithoutTheSecret: a server that does not know the cluster's secret
// does not come in. (The side that dials counts a route for a moment, so that what
// is looked at is whether a message crosses.)
func TestRouteWithoutTheSecret(t *testing.T) {
	for name, tc := range map[string]struct {
		secrets [2]string
		crosses bool
	}{
		"another secret": {[2]string{"right", "wrong"}, false},
		"the secret":     {[2]string{"right", "right"}, true},
	} {
		t.Run(name, func(t *testing.T) {
			routes := freePorts(t, 2)
			var conns [2]*nats.Conn
			heard := make(chan *nats.Msg, 1024)
			for i, secret := range tc.secrets {
				u := newUser(t)
				b, err := Start(Options{Dir: t.TempDir(), Listen: "127.0.0.1:0", Authority: u.pub,
					Cluster: &Cluster{Name: "c", ServerName: fmt.Sprint("n", i), Listen: routes[i], Routes: routes, Secret: secret}})
				if err != nil {
					t.Fatal(err)
				}
				defer b.Close()
				if conns[i], err = b.Conn(testContext(t), u.seed); err != nil {
					t.Fatal(err)
				}
				defer conns[i].Close()
				if _, err := conns[i].ChanSubscribe(fmt.Sprintf("interlock.v1.receipt.%d", i), heard); err != nil {
					t.Fatal(err)
				}
			}
			limit := 2 * time.Second // routes are tried from both sides each second
			if tc.crosses {
				limit = 20 * time.Second
			}
			quiet := time.After(limit)
			tick := time.NewTicker(5 * time.Millisecond)
			defer tick.Stop()
			for {
				select {
				case <-tick.C:
					for i, nc := range conns {
						if err := nc.Publish(fmt.Sprintf("interlock.v1.receipt.%d", 1-i), nil); err != nil {
							t.Fatal(err)
						}
					}
				case <-heard:
					if !tc.crosses {
						t.Error("a message crossed")
					}
					return
				case <-quiet:
					if tc.crosses {
						t.Error("no message crossed: the test would see nothing")
					}
					return
				}
			}
		})
	}
}
