package faults

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/interlock-fabric/interlock/internal/audit"
	service "github.com/interlock-fabric/interlock/internal/authority"
	"github.com/interlock-fabric/interlock/internal/trust"
	"github.com/interlock-fabric/interlock/pkg/authority"
	"github.com/interlock-fabric/interlock/pkg/enforce"
	"github.com/interlock-fabric/interlock/pkg/natsfeed"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// cluster is three authorities, each a process with a server of the bus.
type cluster struct {
	t     *testing.T
	keys  *trust.Store
	nodes [3]*node
	urls  []string
}

type node struct {
	*process
	name, listen string
	client       *authority.Client
}

func newCluster(t *testing.T) *cluster {
	t.Helper()
	dir := t.TempDir()
	c := &cluster{t: t, keys: initKeys(t, dir)}
	var routes []string
	for i := range c.nodes {
		c.nodes[i] = &node{name: fmt.Sprint("n", i), listen: freeAddr(t)}
		routes = append(routes, freeAddr(t))
		c.urls = append(c.urls, "nats://"+c.nodes[i].listen)
	}
	var starting [3]launched
	for i, n := range c.nodes {
		own := filepath.Join(dir, n.name)
		copyTree(t, filepath.Join(dir, service.KeysDir), filepath.Join(own, service.KeysDir))
		starting[i] = launch(t, childConfig{
			DataDir: own, NATSListen: n.listen, EnforcerURLs: c.urls,
			Cluster: &clusterConfig{Name: "faults", ServerName: n.name, Listen: routes[i], Routes: routes, Secret: "s3cret"},
		})
		n.client = dialAPI(t, own)
	}
	for i, n := range c.nodes {
		starting[i].await(t)
		n.process = starting[i].process
	}
	return c
}

// bus joins the bus at one server, with an authority's rights.
func (c *cluster) bus(n *node) *nats.Conn {
	c.t.Helper()
	return connect(c.t, n.listen, c.keys.AuthoritySeed())
}

// leader returns the server that leads the log's stream.
func (c *cluster) leader(nc *nats.Conn) *node {
	c.t.Helper()
	js, err := jetstream.New(nc)
	must(c.t, err)
	var found *node
	eventually(c.t, patience, "the log has a leader", func() bool {
		ctx, cancel := context.WithTimeout(c.t.Context(), time.Second)
		defer cancel()
		s, err := js.Stream(ctx, natsfeed.LogStream)
		if err != nil || s.CachedInfo().Cluster == nil {
			return false
		}
		i := slices.IndexFunc(c.nodes[:], func(n *node) bool { return n.name == s.CachedInfo().Cluster.Leader })
		if i < 0 {
			return false
		}
		found = c.nodes[i]
		return true
	})
	return found
}

// writer returns the authority that writes.
func (c *cluster) writer() *node {
	c.t.Helper()
	var found *node
	eventually(c.t, patience, "there is a writer", func() bool {
		for _, n := range c.nodes {
			if st, err := n.client.Status(c.t.Context()); err == nil && st.Writer {
				found = n
				return true
			}
		}
		return false
	})
	return found
}

// other returns a server that is none of those.
func (c *cluster) other(than ...*node) *node {
	for _, n := range c.nodes {
		if !slices.Contains(than, n) {
			return n
		}
	}
	return nil
}

// sample is one decision with how long it took to be in effect.
type sample struct {
	v      *caller
	at     time.Time
	answer atomic.Pointer[authority.Decision] // the first
	err    atomic.Pointer[error]
	cut    []atomic.Int64 // by guard; 0 is not yet
}

// measure decides on victims at a steady pace until it is stopped. Each has a
// call running on every guard, and the moment at which that is cut is taken.
func (c *cluster) measure(guards []*guard, crowd *crowd, at *authority.Client, every time.Duration) (stop func() []*sample) {
	ctx, cancel := context.WithCancel(c.t.Context())
	var all []*sample
	var wg sync.WaitGroup
	wg.Go(func() {
		tick := time.NewTicker(every)
		defer tick.Stop()
		var asking sync.WaitGroup
		defer asking.Wait()
		for i := crowd.innocents; i < len(crowd.callers); i++ {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			s := &sample{v: crowd.callers[i], cut: make([]atomic.Int64, len(guards))}
			for j, g := range guards {
				call, release, err := g.enf.Bind(c.t.Context(), g.prepared[i], session.Call{Tool: "wait"})
				if err != nil {
					c.t.Errorf("%s: %v", g.name, err)
					continue
				}
				c.t.Cleanup(release)
				context.AfterFunc(call, func() {
					if errors.Is(context.Cause(call), session.ErrRevoked) {
						s.cut[j].Store(int64(time.Since(s.at)))
					}
				})
			}
			s.at = time.Now()
			all = append(all, s)
			asking.Go(func() {
				try, stop := context.WithTimeout(c.t.Context(), 2*patience)
				defer stop()
				first := true
				for {
					d, err := s.v.revoke(try, at)
					if first {
						first = false
						s.answer.Store(d)
						s.err.Store(&err)
					}
					if err == nil && d.Durable {
						return
					}
					select {
					case <-try.Done():
						c.t.Errorf("%s is not durable: %v", s.v.sid, err)
						return
					case <-time.After(20 * time.Millisecond):
					}
				}
			})
		}
		c.t.Error("out of victims")
	})
	return func() []*sample {
		cancel()
		wg.Wait()
		return all
	}
}

// latencies returns how long the samples took on those guards, in order, and how
// many have not come yet.
func latencies(samples []*sample, which []int) (out []time.Duration, missing int) {
	for _, s := range samples {
		for _, j := range which {
			if d := s.cut[j].Load(); d > 0 {
				out = append(out, time.Duration(d))
			} else {
				missing++
			}
		}
	}
	slices.Sort(out)
	return out, missing
}

func spread(d []time.Duration) string {
	if len(d) == 0 {
		return "none"
	}
	at := func(q float64) time.Duration { return d[int(q*float64(len(d)-1))].Round(10 * time.Microsecond) }
	return fmt.Sprintf("median %v, 90%% %v, 99%% %v, max %v of %d", at(.5), at(.9), at(.99), at(1), len(d))
}

const (
	// inEffect is the bound aimed at, asserted of the median, and inEffectHard
	// the most that a machine that is busy with other things may make of it.
	inEffect     = slack * 100 * time.Millisecond
	inEffectHard = slack * 2 * time.Second
)

// TestClusterLosesALeader kills one of three servers while decisions arrive. It
// fails when enforcers wait for the store before they act, when a decision is
// called durable that is not, when the writer's freshness needs the log's
// leader for longer than the default bound, or when an enforcer does not find
// another server.
func TestClusterLosesALeader(t *testing.T) {
	t.Run("of the log", func(t *testing.T) { loseServer(t, false) })
	t.Run("the writer", func(t *testing.T) { loseServer(t, true) })
}

// onRecord waits until each decision has exactly one record, in a chain that is
// sound: of one that the authority could not say anything about, made from the log.
func (c *cluster) onRecord(samples []*sample, at *authority.Client) {
	c.t.Helper()
	want := map[string]bool{}
	for _, s := range samples {
		want[s.v.denied.Load().id] = true
	}
	var have map[string]int
	recovered := 0
	complete := func() bool {
		var b bytes.Buffer
		if err := at.ExportAudit(c.t.Context(), authority.AuditQuery{}, &b); err != nil {
			c.t.Log(err)
			return false
		}
		r, err := audit.Verify(bytes.NewReader(b.Bytes()), c.keys.Root(), nil)
		must(c.t, err)
		if !r.Sound {
			c.t.Fatalf("%+v", r.Faults)
		}
		have, recovered = map[string]int{}, 0
		for line := range bytes.Lines(b.Bytes()) {
			var l struct{ Body authority.AuditRecord }
			must(c.t, json.Unmarshal(line, &l))
			if e := &l.Body; e.Kind == authority.AuditDecision && e.Sequence > 0 && !e.Duplicate && want[e.Decision] {
				if have[e.Decision]++; e.Recovered {
					recovered++
				}
			}
		}
		return len(have) == len(want)
	}
	eventually(c.t, slack*patience, "every decision has its record", complete)
	for id, n := range have {
		if n != 1 {
			c.t.Errorf("%s has %d records", id, n)
		}
	}
	c.t.Logf("%d decisions on record, %d of them from the log", len(have), recovered)
}

func loseServer(t *testing.T, killWriter bool) {
	c := newCluster(t)
	writer := c.writer()
	f := &fabric{t: t, ctx: t.Context(), client: writer.client}
	crowd := newCrowd(8, 1200)
	guards := f.guards("enforcer", 6, crowd, guardOptions{maxStale: enforce.DefaultMaxStale, steady: true})
	auditor := f.enrol("auditor", "")
	nc := c.bus(writer)

	// Which server goes, and where decisions are sent meanwhile.
	victim := writer
	if killWriter {
		nc = c.bus(c.other(writer))
	} else {
		for victim = c.leader(nc); victim == writer; victim = c.leader(nc) {
			_, err := nc.Request("$JS.API.STREAM.LEADER.STEPDOWN."+natsfeed.LogStream, nil, 5*time.Second)
			must(t, err)
		}
	}
	through := c.other(writer, victim)
	stop := c.measure(guards, crowd, through.client, slack*25*time.Millisecond)
	durable := func() uint64 {
		st, err := through.client.Status(f.ctx)
		if err != nil {
			return 0
		}
		return st.Number
	}
	before := durable()
	eventually(t, patience, "decisions before", func() bool { return durable() > before+30 })
	var stay, move []int
	reconnects := make([]uint64, len(guards))
	for i, g := range guards {
		reconnects[i] = g.feed.Stats().Reconnects
	}
	killed := time.Now()
	victim.kill()
	after := durable()
	if !killWriter {
		eventually(t, slack*patience, "the log has another leader", func() bool {
			n := c.leader(nc)
			return n != victim
		})
	}
	eventually(t, slack*patience, "decisions are durable again", func() bool { return durable() > after+3 })
	gap := time.Since(killed)
	eventually(t, patience, "decisions afterwards", func() bool { return time.Since(killed) > gap+2*time.Second })
	samples := stop()
	for i, g := range guards {
		if g.feed.Stats().Reconnects > reconnects[i] {
			move = append(move, i)
		} else {
			stay = append(stay, i)
		}
	}
	f.client = through.client
	f.allAgree(guards)

	var durableAt, provisional, failed int
	for _, s := range samples {
		switch d, err := s.answer.Load(), *s.err.Load(); {
		case err != nil:
			failed++
		case d.Durable:
			durableAt++
		default:
			provisional++
		}
	}
	t.Logf("the log took decisions again after %v; of %d decisions the first answer was: %d durable, %d in effect, %d not known",
		gap, len(samples), durableAt, provisional, failed)
	var usual, during []*sample
	for _, s := range samples {
		if at := s.at.Sub(killed); at > -100*time.Millisecond && at < gap {
			during = append(during, s)
		} else {
			usual = append(usual, s)
		}
	}
	for _, p := range []struct {
		name    string
		samples []*sample
		which   []int
	}{{"connected, usually", usual, stay}, {"connected, meanwhile", during, stay}, {"moved, usually", usual, move}, {"moved, meanwhile", during, move}} {
		got, missing := latencies(p.samples, p.which)
		t.Logf("%-20s  %s", p.name, spread(got))
		if missing > 0 {
			t.Errorf("%s: %d of %d never took effect", p.name, missing, missing+len(got))
		}
		if len(got) == 0 {
			continue
		}
		median, most := inEffect, inEffectHard
		if killWriter && strings.HasSuffix(p.name, "meanwhile") {
			// Nobody may decide until the lease of the dead one has run out.
			median, most = enforce.DefaultMaxStale, enforce.DefaultMaxStale
		}
		if m := got[len(got)/2]; m > median {
			t.Errorf("%s: the median is %v, more than %v", p.name, m, median)
		}
		if m := got[len(got)-1]; m > most {
			t.Errorf("%s: one took %v, more than %v", p.name, m, most)
		}
	}
	if !killWriter && provisional == 0 && failed == 0 {
		t.Error("no decision was answered before it was durable: nothing was tested")
	}
	l := readLog(t, auditor)
	l.once(t)
	if len(l.at) < len(samples) {
		t.Errorf("%d decisions were made durable, %d are in the log", len(samples), len(l.at))
	}
	c.onRecord(samples, through.client)
}
