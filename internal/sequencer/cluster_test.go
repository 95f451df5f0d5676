package sequencer

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/interlock-fabric/interlock/internal/broker"
	"github.com/interlock-fabric/interlock/pkg/natsfeed"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/nats-io/nkeys"
)

// cluster is three servers, each in a process of its own.
type cluster struct {
	tb    testing.TB
	procs map[string]*exec.Cmd
	urls  []string
	seed  string
}

func newCluster(tb testing.TB) *cluster {
	tb.Helper()
	kp, err := nkeys.CreateUser()
	must(tb, err)
	seed, err := kp.Seed()
	must(tb, err)
	c := &cluster{tb: tb, procs: map[string]*exec.Cmd{}, seed: string(seed)}
	addrs := freeAddrs(tb, 6)
	exe, err := os.Executable()
	must(tb, err)
	var ready sync.WaitGroup
	for i := range 3 {
		name := fmt.Sprint("s", i)
		in, err := json.Marshal(childConfig{
			Dir: tb.TempDir(), Seed: c.seed, Server: name, Listen: addrs[i], Route: addrs[3+i], Routes: addrs[3:],
		})
		must(tb, err)
		cmd := exec.Command(exe)
		cmd.Env = append(os.Environ(), childEnv+"=1")
		cmd.Stderr = os.Stderr
		stdin, err := cmd.StdinPipe()
		must(tb, err)
		stdout, err := cmd.StdoutPipe()
		must(tb, err)
		must(tb, cmd.Start())
		c.procs[name] = cmd
		c.urls = append(c.urls, "nats://"+addrs[i])
		_, err = stdin.Write(append(in, '\n'))
		must(tb, err)
		ready.Go(func() { _, _ = bufio.NewReader(stdout).ReadString('\n') })
	}
	tb.Cleanup(func() {
		for _, p := range c.procs {
			_ = p.Process.Kill()
			_ = p.Wait()
		}
	})
	ready.Wait()
	js, err := jetstream.New(c.conn())
	must(tb, err)
	eventually(tb, "the cluster makes streams", func() bool {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		return broker.EnsureStreams(ctx, js, 3) == nil
	})
	return c
}

func freeAddrs(tb testing.TB, n int) (out []string) {
	tb.Helper()
	for range n {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		must(tb, err)
		defer l.Close()
		out = append(out, l.Addr().String())
	}
	return out
}

func (c *cluster) conn() *nats.Conn {
	c.tb.Helper()
	kp, err := nkeys.FromSeed([]byte(c.seed))
	must(c.tb, err)
	pub, err := kp.PublicKey()
	must(c.tb, err)
	nc, err := nats.Connect(strings.Join(c.urls, ","), nats.Nkey(pub, kp.Sign), nats.MaxReconnects(-1),
		nats.ReconnectWait(50*time.Millisecond), nats.PingInterval(500*time.Millisecond))
	must(c.tb, err)
	c.tb.Cleanup(nc.Close)
	return nc
}

// leader returns the name of the server that leads the log.
func (c *cluster) leader(js jetstream.JetStream) string {
	name := ""
	eventually(c.tb, "the log has a leader", func() bool {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		st, err := js.Stream(ctx, natsfeed.LogStream)
		if err != nil || st.CachedInfo().Cluster == nil {
			return false
		}
		name = st.CachedInfo().Cluster.Leader
		return name != ""
	})
	return name
}

// The leader of the log is killed while decisions arrive at two authorities. Each
// decision is heard throughout, those that were acknowledged are all stored, the
// others become so, and the chain does not fork.
func TestClusterLosesItsLeader(t *testing.T) {
	c := newCluster(t)
	s := &store{tb: t, root: newRoot(t), key: newKey(t)}
	s.set = s.keySet(t, 1, writerKey(s.key))
	open := func() *Sequencer {
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		q, err := Open(ctx, Options{NC: c.conn(), Keys: s.keys(t, s.key, s.set), Logger: testLogger(), AckWait: 100 * time.Millisecond})
		must(t, err)
		t.Cleanup(q.Close)
		return q
	}
	a := open()
	eventually(t, "somebody writes", a.IsWriter)
	b := open()
	nc := c.conn()
	js, err := jetstream.New(nc)
	must(t, err)
	leader := c.leader(js)
	heard := &sync.Map{}
	sub, err := nc.Subscribe(natsfeed.LogSubject, func(m *nats.Msg) { noteDecisions(heard, m.Data) })
	must(t, err)
	defer func() { _ = sub.Unsubscribe() }()
	must(t, nc.Flush())
	const n = 300
	// Servers tell each other of a subscription in their own time.
	probe := n
	eventually(t, "all servers know of the subscription", func() bool {
		if _, ok := heard.Load(id(probe)); ok {
			return true
		}
		probe++
		must(t, decideDurable(a, probe))
		return false
	})

	type told struct {
		durable bool
		number  uint64
	}
	first := make([]told, n)
	var slowest time.Duration
	var late int
	for i := range n {
		if i == n/4 {
			must(t, c.procs[leader].Process.Kill())
			t.Logf("killed %s; connections on %s, %s, %s", leader, a.nc.ConnectedServerName(), b.nc.ConnectedServerName(), nc.ConnectedServerName())
		}
		q := []*Sequencer{a, b}[i%2]
		start := time.Now()
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		res, err := q.Decide(ctx, revoke(i))
		cancel()
		if err != nil {
			t.Fatalf("decision %d: %v", i, err)
		}
		first[i] = told{res.Durable, res.Number}
		if !res.Durable {
			late++
		}
		eventually(t, "the decision is heard", func() bool { _, ok := heard.Load(id(i)); return ok })
		slowest = max(slowest, time.Since(start))
	}
	for i := range n {
		must(t, decideDurable(a, i))
	}
	l := readLog(t, c.conn(), a.trust)
	for i := range n {
		if l.at[id(i)] != 1 {
			t.Fatalf("decision %d is in the chain %d times", i, l.at[id(i)])
		}
		if first[i].durable && first[i].number != l.where[id(i)] {
			t.Fatalf("decision %d was acknowledged at %d and is at %d", i, first[i].number, l.where[id(i)])
		}
	}
	for _, q := range []*Sequencer{a, b} {
		eventually(t, "both have the log's state", func() bool { return q.State().Digest() == l.set.Digest() })
	}
	t.Logf("%d of %d not durable at first; answered and heard after %v at worst; deposed %d times",
		late, n, slowest, a.Status().Deposed+b.Status().Deposed)
}

// The leader of the log and of the segments is killed while they are published and
// trimmed. Nothing is lost, and who starts then has it all.
func TestClusterTrims(t *testing.T) {
	c := newCluster(t)
	s := &store{tb: t, root: newRoot(t), key: newKey(t), dial: c.conn}
	s.set = s.keySet(t, 1, writerKey(s.key))
	open := func(mod func(*Options)) *Sequencer {
		ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
		defer cancel()
		o := Options{NC: c.conn(), Keys: s.keys(t, s.key, s.set), Logger: testLogger()}
		mod(&o)
		q, err := Open(ctx, o)
		must(t, err)
		t.Cleanup(q.Close)
		return q
	}
	a := open(func(o *Options) { o.SegmentEvery, o.SegmentBatches = 10*time.Millisecond, 1 })
	n := 0
	trimmed := func(past uint64) {
		eventually(t, "the log is trimmed", func() bool {
			must(t, decideDurable(a, n))
			n++
			return a.Status().LogFrom > past
		})
	}
	trimmed(1)
	js, err := jetstream.New(c.conn())
	must(t, err)
	must(t, c.procs[c.leader(js)].Process.Kill())
	for range 50 {
		must(t, decideDurable(a, n))
		n++
	}
	trimmed(a.Status().LogFrom)
	b := open(byHand)
	if b.Status().Halted != nil || b.State().Len() != n {
		t.Fatalf("%d entries of %d, %+v", b.State().Len(), n, b.Status())
	}
	for i := range n {
		res, err := b.Decide(context.Background(), revoke(i))
		must(t, err)
		if !res.Duplicate {
			t.Fatalf("decision %d was forgotten", i)
		}
	}
	if b.State().Digest() != a.State().Digest() {
		t.Fatal("two states")
	}
}
