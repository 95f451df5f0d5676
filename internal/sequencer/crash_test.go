package sequencer

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/interlock-fabric/interlock/internal/broker"
	"github.com/interlock-fabric/interlock/pkg/natsfeed"
	"github.com/interlock-fabric/interlock/pkg/session"
	"github.com/nats-io/nkeys"
)

const childEnv = "SEQUENCER_TEST_CHILD"

// childConfig is what the process that is to be killed reads from its input.
type childConfig struct {
	Dir, Seed string
	Root, Key []byte
	Set       []byte
	// Server is set for a server of a cluster, which runs until it is killed,
	// without a sequencer.
	Server, Listen, Route string
	Routes                []string

	// Segments has them published and the log trimmed all the time; Step is then
	// one of a publication, At how many of them come before.
	Segments      bool
	Step          string
	At            uint64
	First, Amount int
}

// child runs a broker and a sequencer, takes decisions, says on its output what
// was acknowledged, and kills itself at the step.
func child() {
	fail := func(err error) {
		if err != nil {
			fmt.Fprintln(os.Stderr, "child:", err)
			os.Exit(1)
		}
	}
	var c childConfig
	// A line, so that a server of a cluster can go on listening for the end.
	line, err := bufio.NewReader(os.Stdin).ReadBytes('\n')
	fail(err)
	fail(json.Unmarshal(line, &c))
	kp, err := nkeys.FromSeed([]byte(c.Seed))
	fail(err)
	pub, err := kp.PublicKey()
	fail(err)
	bo := broker.Options{Dir: c.Dir, Authority: pub, Listen: c.Listen}
	if c.Server != "" {
		bo.Cluster = &broker.Cluster{Name: "test", ServerName: c.Server, Listen: c.Route, Routes: c.Routes, Secret: "secret"}
	}
	b, err := broker.Start(bo)
	fail(err)
	if c.Server != "" {
		fmt.Println("ready")
		_, _ = io.Copy(io.Discard, os.Stdin) // until killed, or the test is gone
		os.Exit(0)
	}
	nc, err := b.Conn(context.Background(), c.Seed)
	fail(err)
	tr, err := session.NewTrust(c.Root)
	fail(err)
	k := &keys{trust: tr, key: ed25519.NewKeyFromSeed(c.Key)}
	_, err = k.Accept(c.Set, session.InstantOf(time.Now()))
	fail(err)
	die := func() {
		_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
		select {}
	}
	o := Options{NC: nc, Keys: k, Lease: 500 * time.Millisecond}
	switch c.Step {
	case "before append":
		o.Hooks.BeforeAppend = func(n uint64) {
			if n == c.At {
				die()
			}
		}
	case "between acknowledgement and answer":
		o.Hooks.AfterAck = func(n uint64) {
			if n == c.At {
				die()
			}
		}
	case "between two appends":
		// Its acknowledgements are lost, so that several are in flight.
		var lost sync.Once
		deaf := make(chan struct{})
		o.Hooks.BeforeAppend = func(n uint64) {
			if n == c.At-3 {
				lost.Do(func() { close(deaf) })
			}
			if n == c.At {
				die()
			}
		}
		o.Hooks.DropAcks = func() bool {
			select {
			case <-deaf:
				return true
			default:
				return false
			}
		}
	}
	if c.Segments {
		o.SegmentEvery, o.SegmentBatches, o.StateDir = time.Millisecond, 1, c.Dir+"/state"
		var count atomic.Uint64
		o.Hooks.Segment = func(step string) {
			if step == c.Step && count.Add(1) == c.At {
				die()
			}
		}
	}
	q, err := Open(context.Background(), o)
	fail(err)
	var out sync.Mutex
	var wg sync.WaitGroup
	const callers = 8
	for g := range callers {
		wg.Go(func() {
			for i := g; i < c.Amount; i += callers {
				res, err := q.Decide(context.Background(), revoke(c.First+i))
				fail(err)
				if res.Durable {
					out.Lock()
					fmt.Printf("%d %d\n", c.First+i, res.Number)
					out.Unlock()
				}
			}
		})
	}
	wg.Wait()
	for c.Segments { // until the step is reached
		_, err := q.Decide(context.Background(), Decision{Entries: revoke(c.First).Entries})
		fail(err)
	}
	q.Close()
}

// A kill -9 at each step of an append loses nothing that was acknowledged, and
// sending everything again under the same IDs applies nothing twice. Without the
// replay, or without the IDs in the batches, this fails.
func TestKill(t *testing.T) {
	for _, step := range []string{"before append", "between acknowledgement and answer", "between two appends"} {
		t.Run(step, func(t *testing.T) {
			s := newStore(t)
			must(t, s.b.Close())
			acked := map[int]uint64{}
			const rounds, amount = 3, 400
			for round := range rounds {
				for n, number := range s.runChild(t, childConfig{Step: step, At: uint64(8 * (round + 1)), First: round * amount, Amount: amount}) {
					acked[n] = number
				}
			}
			s.start()
			q := s.open(func(o *Options) { o.Lease = 500 * time.Millisecond })
			var wg sync.WaitGroup
			const callers = 16
			for g := range callers {
				wg.Go(func() {
					for n := g; n < rounds*amount; n += callers {
						res, err := q.Decide(context.Background(), revoke(n))
						number, was := acked[n]
						if err != nil || !res.Durable || was && (!res.Duplicate || res.Number != number) {
							t.Errorf("decision %d was acknowledged at %d, and is now %+v, %v", n, number, res, err)
						}
					}
				})
			}
			wg.Wait()
			l := readLog(t, s.conn(), q.trust)
			for n := range rounds * amount {
				if l.at[id(n)] != 1 {
					t.Fatalf("decision %d is in the chain %d times", n, l.at[id(n)])
				}
			}
			if l.set.Digest() != q.State().Digest() {
				t.Fatal("another state than the log's")
			}
			t.Logf("%d of %d acknowledged before the kills", len(acked), rounds*amount)
		})
	}
}

// runChild runs a child until it kills itself and returns what it said was
// acknowledged.
func (s *store) runChild(t *testing.T, c childConfig) map[int]uint64 {
	t.Helper()
	exe, err := os.Executable()
	must(t, err)
	c.Dir, c.Seed, c.Root, c.Key, c.Set = s.dir, s.seed, s.root.key.Public().(ed25519.PublicKey), s.key.Seed(), s.set
	in, err := json.Marshal(c)
	must(t, err)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, exe)
	cmd.Env = append(os.Environ(), childEnv+"=1")
	cmd.Stdin = bytes.NewReader(append(in, '\n'))
	cmd.Stderr = os.Stderr
	var out bytes.Buffer
	cmd.Stdout = &out
	err = cmd.Run()
	st, ok := cmd.ProcessState.Sys().(syscall.WaitStatus)
	if !ok || !st.Signaled() || st.Signal() != syscall.SIGKILL || ctx.Err() != nil {
		t.Fatalf("the child was to be killed: %v", err)
	}
	acked := map[int]uint64{}
	for sc := bufio.NewScanner(&out); sc.Scan(); {
		var n int
		var number uint64
		if _, err := fmt.Sscanf(sc.Text(), "%d %d", &n, &number); err == nil {
			acked[n] = number
		}
	}
	return acked
}

// A kill -9 at each step of publishing a segment and trimming the log behind it
// loses nothing: not what was acknowledged, nor that it was decided. It fails when
// the log is trimmed before what it is trimmed behind is stored.
func TestKillWhileTrimming(t *testing.T) {
	for _, step := range []string{"sealed", "stored", "read back", "described", "trimmed"} {
		t.Run(step, func(t *testing.T) {
			s := newStore(t)
			must(t, s.b.Close())
			acked := map[int]uint64{}
			const rounds, amount = 3, 200
			for round := range rounds {
				at := uint64(2 + round)
				if round == 0 && step != "trimmed" {
					at = KeepSegments + 1
				}
				for n, number := range s.runChild(t, childConfig{Segments: true, Step: step, At: at, First: round * amount, Amount: amount}) {
					acked[n] = number
				}
			}
			s.start()
			if s.first(natsfeed.LogStream) == 1 {
				t.Fatal("the log was never trimmed: the test tests nothing")
			}
			q := s.open(func(o *Options) { byHand(o); o.Lease = 500 * time.Millisecond })
			for n, number := range acked {
				res, err := q.Decide(context.Background(), revoke(n))
				must(t, err)
				if !res.Duplicate || res.Number != number {
					t.Errorf("decision %d was acknowledged at %d, and is now %+v", n, number, res)
				}
			}
			for n := range rounds * amount {
				must(t, decideDurable(q, n))
			}
			if got := q.State(); got.Len() != rounds*amount {
				t.Fatalf("%d entries of %d", got.Len(), rounds*amount)
			}
			publish(t, q, rounds*amount)
			if again := s.open(byHand); again.State().Digest() != q.State().Digest() {
				t.Fatal("another state after a restart")
			}
			t.Logf("%d acknowledged before the kills; the log begins at position %d", len(acked), s.first(natsfeed.LogStream))
		})
	}
}
