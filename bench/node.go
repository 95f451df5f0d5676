package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"golang.org/x/sync/errgroup"

	service "github.com/interlock-fabric/interlock/internal/authority"
	"github.com/interlock-fabric/interlock/internal/broker"
	"github.com/interlock-fabric/interlock/internal/sequencer"
	"github.com/interlock-fabric/interlock/internal/trust"
	"github.com/interlock-fabric/interlock/pkg/authority"
	"github.com/interlock-fabric/interlock/pkg/natsfeed"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// nodeCommand makes this program the other side of a measurement: the authority
// in a process of its own, as it is in the field. It says on stdout, in one line
// of JSON, when it is ready, and ends when stdin does.
const nodeCommand = "node"

// ready is what a node says.
type ready struct {
	// Socket is the API's.
	Socket string `json:"socket,omitempty"`
	// Enrollment is an enforcer's, secrets included.
	Enrollment json.RawMessage `json:"enrollment,omitempty"`
	// Decided is how long the decisions took, in seconds.
	Decided float64 `json:"decided,omitempty"`
	// Number is the newest batch.
	Number uint64 `json:"number,omitempty"`
}

// node is such a process, seen from this one.
type node struct {
	ready
	cmd    *exec.Cmd
	stdin  io.Closer
	client *authority.Client // of the API, where there is one
}

// startNode starts a node and waits until it is ready.
func (b *bench) startNode(name string, limit time.Duration, args ...string) (*node, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	args = append([]string{nodeCommand, "-dir", filepath.Join(b.dir, name)}, args...)
	if b.profiles != "" {
		args = append(args, "-profile", b.profiles+"-"+name+".pprof")
	}
	n := &node{cmd: exec.CommandContext(b.ctx, self, args...)} //nolint:gosec // G204: this very program
	n.cmd.Stderr = os.Stderr
	if n.stdin, err = n.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := n.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := n.cmd.Start(); err != nil {
		return nil, err
	}
	late := time.AfterFunc(limit, func() { _ = n.cmd.Process.Kill() }) // it may have ended
	defer late.Stop()
	line, err := bufio.NewReader(out).ReadBytes('\n')
	if err == nil {
		err = json.Unmarshal(line, &n.ready)
	}
	if err == nil && n.Socket != "" {
		n.client, err = authority.New(authority.Options{Socket: n.Socket})
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("the node did not become ready: %w", err), n.close())
	}
	return n, nil
}

// close ends the node and waits for it.
func (n *node) close() error {
	if n.client != nil {
		n.client.Close()
	}
	return errors.Join(n.stdin.Close(), n.cmd.Wait())
}

// cpu is how much CPU the node has used so far, in seconds.
func (n *node) cpu() float64 {
	s := firstLine("/proc/" + strconv.Itoa(n.cmd.Process.Pid) + "/stat")
	f := strings.Fields(s[strings.LastIndexByte(s, ')')+1:]) // from the state on
	total := 0.0
	for _, i := range []int{11, 12} { // utime, stime
		if i < len(f) {
			x, _ := strconv.ParseFloat(f[i], 64) // 0 is unknown
			total += x / 100
		}
	}
	return total
}

func nodeMain(args []string) int {
	fs := flag.NewFlagSet(nodeCommand, flag.ContinueOnError)
	dir := fs.String("dir", "", "data directory")
	log := fs.Int("log", 0, "be a log with a published segment of so many entries; without, be an authority")
	tenants := fs.Int("tenants", 1, "how many tenants an authority has")
	prof := fs.String("profile", "", "write a CPU profile to this file")
	if err := fs.Parse(args); err != nil || *dir == "" {
		return exitUsage
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_, _ = io.Copy(io.Discard, os.Stdin) // until it ends, in whatever way
		cancel()
	}()
	serve := func() error {
		if *prof != "" {
			stop, err := profile(*prof)
			if err != nil {
				return err
			}
			defer func() { _ = stop() }() // a profile is no result
		}
		if *log > 0 {
			return serveLog(ctx, *dir, *log, ended)
		}
		return serveAuthority(ctx, *dir, *tenants, ended)
	}
	if err := serve(); err != nil {
		say(os.Stderr, "bench node: %v\n", err)
		return exitFailed
	}
	return 0
}

func sayReady(r ready) error { return json.NewEncoder(os.Stdout).Encode(r) }

// serveAuthority is the Session Authority as its command runs it: the embedded
// bus, each append synced to disk, and the API.
func serveAuthority(ctx context.Context, dir string, tenants int, ended <-chan struct{}) error {
	var names []string
	for i := range tenants {
		names = append(names, tenantName(i))
	}
	a, err := service.Open(ctx, service.Options{DataDir: dir, NATSListen: "127.0.0.1:0", Tenants: names, Issuers: []string{issuer}})
	if err != nil {
		return err
	}
	if err = sayReady(ready{Socket: a.Socket()}); err == nil {
		<-ended
	}
	return errors.Join(err, a.Close())
}

// serveLog is the authority's bus and its sequencer, with n entries decided and
// published as a segment, and a hundredth of that behind it in the log. It is fed
// past the API, and without the quota of a tenant, to be ready sooner.
func serveLog(ctx context.Context, dir string, n int, ended <-chan struct{}) (err error) {
	store, err := trust.Init(trust.InitOptions{Dir: filepath.Join(dir, "keys"), Tenants: []string{tenant}}, session.InstantOf(time.Now()))
	if err != nil {
		return err
	}
	nkey, err := store.AuthorityNKey()
	if err != nil {
		return err
	}
	bus, err := broker.Start(broker.Options{Dir: filepath.Join(dir, "bus"), Listen: "127.0.0.1:0", Authority: nkey, RelaxedSync: true})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, bus.Close()) }()
	enrollment, entry, err := store.Enroll("bench", nil, []string{bus.ClientURL()}, "")
	if err != nil {
		return err
	}
	if err := bus.SetEnforcers([]broker.Enforcer{{Name: entry.Name, PublicNKey: entry.NKey}}); err != nil {
		return err
	}
	secrets, _ := store.Secrets()
	gone, err := secrets[0].Prepare(identity("gone"))
	if err != nil {
		return err
	}
	nc, err := bus.Conn(ctx, store.AuthoritySeed(), nats.Name("bench"))
	if err != nil {
		return err
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		return err
	}
	if err := broker.EnsureStreams(ctx, js, 1); err != nil {
		return err
	}
	unlimited := 2*n + 1_000_000
	seq, err := sequencer.Open(ctx, sequencer.Options{
		NC: nc, Keys: store, Quota: func(session.TenantID) int { return unlimited }, MaxState: unlimited,
		SegmentEvery: 24 * time.Hour, SegmentBatches: uint64(max(n/session.MaxBatchEntries, 1)),
	})
	if err != nil {
		return err
	}
	defer seq.Close()
	began := time.Now()
	if _, err := seq.Decide(ctx, sequencer.Decision{Entries: []session.Entry{revokeSession(gone)}}); err != nil {
		return err
	}
	if err := decideAll(ctx, seq, n, 1); err != nil {
		return err
	}
	took := time.Since(began).Seconds()
	if err := awaitSegment(ctx, js); err != nil {
		return err
	}
	if err := decideAll(ctx, seq, max(n/100, 1000), 2); err != nil {
		return err
	}
	raw, err := enrollment.MarshalSecret()
	if err != nil {
		return err
	}
	var line json.RawMessage
	if line, err = json.Marshal(json.RawMessage(raw)); err != nil { // in one line
		return err
	}
	_, number, _ := seq.Head()
	if err := sayReady(ready{Enrollment: line, Decided: took, Number: number}); err != nil {
		return err
	}
	<-ended
	return nil
}

// decideAll decides n random entries, in decisions of 1,000.
func decideAll(ctx context.Context, seq *sequencer.Sequencer, n int, seed uint64) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(16)
	batches(n, seed, kinds, func(b *session.Batch) {
		if ctx.Err() == nil {
			g.Go(func() error {
				_, err := seq.Decide(ctx, sequencer.Decision{Entries: b.Entries})
				return err
			})
		}
	})
	return g.Wait()
}

// awaitSegment waits until a segment has been published.
func awaitSegment(ctx context.Context, js jetstream.JetStream) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	s, err := js.Stream(ctx, natsfeed.SegmentStream)
	if err != nil {
		return err
	}
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		_, err := s.GetLastMsgForSubject(ctx, natsfeed.SegmentSubject)
		if !errors.Is(err, jetstream.ErrMsgNotFound) {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("no segment was published: %w", ctx.Err())
		case <-tick.C:
		}
	}
}

func tenantName(i int) string { return "t" + strconv.Itoa(i) }

// group runs fn for 0 to n-1 at once and joins the errors.
func group(n int, fn func(i int) error) error {
	errs := make([]error, n)
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() { errs[i] = fn(i) })
	}
	wg.Wait()
	return errors.Join(errs...)
}
