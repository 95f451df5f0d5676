package faults

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nkeys"

	service "github.com/interlock-fabric/interlock/internal/authority"
	"github.com/interlock-fabric/interlock/internal/broker"
	"github.com/interlock-fabric/interlock/internal/flock"
	"github.com/interlock-fabric/interlock/internal/trust"
	"github.com/interlock-fabric/interlock/pkg/authority"
	"github.com/interlock-fabric/interlock/pkg/enforce"
	"github.com/interlock-fabric/interlock/pkg/natsfeed"
	"github.com/interlock-fabric/interlock/pkg/session"
)

const (
	issuer = "https://id.example"
	// bound is the staleness bound of the enforcers that are under attack.
	bound = enforce.MinMaxStale
	// patience is for what must happen, however slow the machine.
	patience = 30 * time.Second
)

// fabric is an authority, here or in another process, by its API.
type fabric struct {
	t      *testing.T
	ctx    context.Context
	dir    string
	client *authority.Client
	// svc is set while the authority runs in this process.
	svc    *service.Authority
	listen string
	// segments is how often they are published; 0 is as in production.
	segments time.Duration
}

func newFabric(t *testing.T) *fabric {
	t.Helper()
	f := &fabric{t: t, ctx: t.Context(), dir: filepath.Join(t.TempDir(), "authority"), listen: freeAddr(t)}
	return f
}

// open runs the authority in this process, always on the same address.
func (f *fabric) open() {
	f.t.Helper()
	ctx, cancel := context.WithTimeout(f.ctx, patience)
	defer cancel()
	var svc *service.Authority
	eventually(f.t, patience, "nobody holds the directory", func() bool {
		var err error
		svc, err = service.Open(ctx, service.Options{DataDir: f.dir, NATSListen: f.listen, SegmentEvery: f.segments})
		if errors.Is(err, flock.ErrHeld) || errors.Is(err, broker.ErrInUse) {
			return false // by a child of another test, between its fork and its exec
		}
		must(f.t, err)
		return true
	})
	f.svc = svc
	f.t.Cleanup(f.close)
	f.dial()
}

func (f *fabric) close() {
	if f.svc != nil {
		if err := f.svc.Close(); err != nil {
			f.t.Error(err)
		}
		f.svc = nil
	}
}

// dial makes the client of the API.
func (f *fabric) dial() {
	f.t.Helper()
	if f.client != nil {
		return
	}
	f.client = dialAPI(f.t, f.dir)
}

func dialAPI(t *testing.T, dir string) *authority.Client {
	t.Helper()
	return dialSocket(t, filepath.Join(dir, service.SocketFile))
}

func dialSocket(t *testing.T, path string) *authority.Client {
	t.Helper()
	c, err := authority.New(authority.Options{Socket: path})
	must(t, err)
	t.Cleanup(c.Close)
	return c
}

// freeAddr finds a port that nobody listens on now.
func freeAddr(t testing.TB) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer ln.Close()
	return ln.Addr().String()
}

// enrol enters an enforcer in the roster. A via other than "" takes the place of
// the bus's address.
func (f *fabric) enrol(name, via string) *session.Enrollment {
	f.t.Helper()
	r := authority.EnrollRequest{Name: name}
	if via != "" {
		r.URLs = []string{"nats://" + via}
	}
	raw, err := f.client.Enroll(f.ctx, r)
	must(f.t, err)
	e, err := session.ParseEnrollment(raw)
	must(f.t, err)
	return e
}

// connect joins the bus with the authority's own rights, to see what is on it.
func (f *fabric) connect() *nats.Conn {
	f.t.Helper()
	keys, err := trust.Open(filepath.Join(f.dir, service.KeysDir))
	must(f.t, err)
	return connect(f.t, f.listen, keys.AuthoritySeed())
}

func connect(t *testing.T, addr, seed string, opts ...nats.Option) *nats.Conn {
	t.Helper()
	nc, err := nats.Connect("nats://"+addr, append([]nats.Option{
		nkeyOption(t, seed), nats.MaxReconnects(-1), nats.ReconnectWait(50 * time.Millisecond),
		nats.IgnoreAuthErrorAbort(), // a server that starts does not know its accounts yet
		nats.ErrorHandler(func(*nats.Conn, *nats.Subscription, error) {}),
	}, opts...)...)
	must(t, err)
	t.Cleanup(nc.Close)
	return nc
}

func nkeyOption(t *testing.T, seed string) nats.Option {
	t.Helper()
	kp, err := nkeys.FromSeed([]byte(seed))
	must(t, err)
	pub, err := kp.PublicKey()
	must(t, err)
	return nats.Nkey(pub, kp.Sign)
}

// newEpoch opens a new epoch with the root key, as the command does.
func (f *fabric) newEpoch() {
	f.t.Helper()
	keysDir := filepath.Join(f.dir, service.KeysDir)
	root, err := trust.LoadRoot(filepath.Join(keysDir, trust.RootFile))
	must(f.t, err)
	store, err := trust.Open(keysDir)
	must(f.t, err)
	must(f.t, store.OpenEpoch(root, session.InstantOf(time.Now())))
	must(f.t, f.client.PublishKeySet(f.ctx, store.Frame()))
}

// head returns the newest batch that the authority knows to be stored.
func (f *fabric) head() (epoch, number uint64) {
	f.t.Helper()
	st, err := f.client.Status(f.ctx)
	must(f.t, err)
	return st.Epoch, st.Number
}

// caller is one session. Those below innocents are never decided on.
type caller struct {
	sid   string
	asked atomic.Bool // a decision on it was sent
	// denied is set once a decision on it was acknowledged as durable, with the
	// moment of that.
	denied atomic.Pointer[acknowledged]
}

type acknowledged struct {
	epoch, number uint64
	at            time.Time
	id            string
}

// crowd is the callers of a test.
type crowd struct {
	callers   []*caller
	innocents int
	next      atomic.Int64
}

func newCrowd(innocents, victims int) *crowd {
	c := &crowd{innocents: innocents}
	for i := range innocents + victims {
		c.callers = append(c.callers, &caller{sid: fmt.Sprintf("s%d", i)})
	}
	c.next.Store(int64(innocents))
	return c
}

// victim takes the next caller that nobody has decided on.
func (c *crowd) victim(t testing.TB) *caller {
	i := int(c.next.Add(1)) - 1
	if i >= len(c.callers) {
		t.Error("out of victims")
		i = len(c.callers) - 1
	}
	return c.callers[i]
}

func (v *caller) request() authority.Request {
	return authority.Request{
		Operation: authority.Revoke, Targets: []authority.Target{authority.One("", "session", issuer, v.sid)},
		Reason: "stolen-token", Incident: "INC-1",
	}
}

func (v *caller) identity() session.Identity {
	return session.Identity{
		Tenant: "default", Issuer: issuer, User: "u-" + v.sid,
		Session: session.SessionRef{Issuer: issuer, ID: v.sid},
	}
}

// revoke decides on a caller, under a key of its own.
func (v *caller) revoke(ctx context.Context, c *authority.Client) (*authority.Decision, error) {
	v.asked.Store(true)
	d, err := c.DecideOnce(ctx, "revoke "+v.sid, v.request())
	if err == nil && d.Durable {
		v.denied.CompareAndSwap(nil, &acknowledged{d.Epoch, d.Number, time.Now(), d.ID})
	}
	return d, err
}

// insist decides on a caller until that is durable.
func (v *caller) insist(ctx context.Context, c *authority.Client) (*authority.Decision, error) {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		d, err := v.revoke(ctx, c)
		if err == nil && d.Durable {
			return d, nil
		}
		select {
		case <-ctx.Done():
			return nil, errors.Join(ctx.Err(), err)
		case <-tick.C:
		}
	}
}

// guard is an enforcer with everything that is held against it.
type guard struct {
	t        *testing.T
	name     string
	enrolled *session.Enrollment
	feed     *natsfeed.Feed
	enf      *enforce.Enforcer
	maxStale time.Duration
	// steady guards are out of reach of the fault: once they are ready they never
	// deny an innocent caller.
	steady atomic.Bool

	crowd    *crowd
	prepared []*session.Prepared
	// exempt are callers that the test judges by itself.
	exempt  []*caller
	cancel  context.CancelFunc
	done    sync.WaitGroup
	stopped sync.Once

	allowed, stale, revoked, wrong atomic.Int64
}

type guardOptions struct {
	maxStale time.Duration
	stateDir string
	steady   bool
	exempt   []*caller
}

// guard enrols an enforcer, opens it, and puts it under load.
func (f *fabric) guard(name, via string, c *crowd, o guardOptions) *guard {
	f.t.Helper()
	return open(f.t, f.enrol(name, via), c, o)
}

func open(t *testing.T, e *session.Enrollment, c *crowd, o guardOptions) *guard {
	t.Helper()
	g := start(t, e, c, o)
	g.ready(o.steady)
	return g
}

func (g *guard) ready(steady bool) {
	g.t.Helper()
	ctx, cancel := context.WithTimeout(g.t.Context(), patience)
	defer cancel()
	must(g.t, g.enf.WaitReady(ctx))
	g.steady.Store(steady)
}

// guards opens several at once: each waits for a heartbeat.
func (f *fabric) guards(name string, n int, c *crowd, o guardOptions) (all []*guard) {
	f.t.Helper()
	for i := range n {
		all = append(all, start(f.t, f.enrol(fmt.Sprintf("%s-%d", name, i), ""), c, o))
	}
	for _, g := range all {
		g.ready(o.steady)
	}
	return all
}

// start does not wait until the enforcer is ready.
func start(t *testing.T, e *session.Enrollment, c *crowd, o guardOptions) *guard {
	t.Helper()
	feed, err := natsfeed.Dial(e, nil)
	must(t, err)
	enf, err := enforce.Start(feed, &enforce.Options{Enrollment: e, MaxStale: o.maxStale, StateDir: o.stateDir})
	must(t, err)
	g := &guard{
		t: t, name: e.Enforcer, enrolled: e, feed: feed, enf: enf, maxStale: enf.Status().MaxStale, crowd: c, exempt: o.exempt,
	}
	for _, v := range c.callers {
		p, err := enf.Prepare(v.identity())
		must(t, err)
		g.prepared = append(g.prepared, p)
	}
	ctx, cancel := context.WithCancel(context.Background())
	g.cancel = cancel
	g.done.Go(func() { g.load(ctx) })
	t.Cleanup(g.close)
	return g
}

func (g *guard) close() {
	g.stopped.Do(func() {
		g.cancel()
		g.done.Wait()
		if err := g.enf.Close(); err != nil {
			g.t.Errorf("%s: %v", g.name, err)
		}
		g.t.Logf("%-12s %6d allowed, %5d stale, %5d revoked, %d wrong", g.name, g.allowed.Load(), g.stale.Load(), g.revoked.Load(), g.wrong.Load())
	})
}

// A load is 16 checks every 5 ms: it is there to find a wrong verdict at any
// moment, not to use the machine up.
const (
	loadEvery = 5 * time.Millisecond
	loadSize  = 16
)

func (g *guard) load(ctx context.Context) {
	tick := time.NewTicker(loadEvery)
	defer tick.Stop()
	for i := 0; ; {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		for range loadSize {
			_ = g.judge(i % len(g.prepared)) // it notes by itself what must not be
			i++
		}
	}
}

// judge checks one caller and holds the verdict against the guarantees.
func (g *guard) judge(i int) error {
	v := g.crowd.callers[i]
	if slices.Contains(g.exempt, v) {
		return nil
	}
	// All of this is read before the check: what held before it binds it.
	applied, denied, began := g.enf.Status(), v.denied.Load(), time.Now()
	err := g.enf.Check(g.prepared[i], session.Call{Tool: "echo"})
	switch {
	case err == nil:
		g.allowed.Add(1)
		switch {
		case denied == nil:
		case applied.Epoch == denied.epoch && applied.Applied >= denied.number:
			g.blame("G1: %s was allowed, and its revocation %d is applied (%d)", v.sid, denied.number, applied.Applied)
		case began.Sub(denied.at) > g.maxStale:
			g.blame("G2: %s was allowed %v after its revocation was acknowledged; applied %d, confirmed %d of %d, age %v, epoch %d of %d",
				v.sid, began.Sub(denied.at), applied.Applied, applied.Confirmed, denied.number, applied.Age, applied.Epoch, denied.epoch)
		}
	case errors.Is(err, session.ErrRevoked):
		g.revoked.Add(1)
		if !v.asked.Load() {
			g.blame("G4: %s was denied as revoked, and nobody asked for that: %v", v.sid, err)
		}
	case errors.Is(err, session.ErrStale):
		g.stale.Add(1)
		if g.steady.Load() {
			g.blame("%s was denied beside the fault: %v", v.sid, err)
		}
	default:
		g.blame("%s was denied: %v", v.sid, err)
	}
	return err
}

func (g *guard) blame(format string, a ...any) {
	if g.wrong.Add(1) <= 3 {
		g.t.Errorf("%s: %s", g.name, fmt.Sprintf(format, a...))
	}
}

// agrees reports whether the guard is fresh, at the head of the log, and has the
// right verdict on every caller.
func (g *guard) agrees(epoch, number uint64) bool {
	s := g.enf.Status()
	if !s.Fresh || s.Epoch != epoch || s.Confirmed < number {
		return false
	}
	for i, v := range g.crowd.callers {
		err := g.judge(i)
		if slices.Contains(g.exempt, v) {
			continue
		}
		if v.denied.Load() != nil && !errors.Is(err, session.ErrRevoked) || !v.asked.Load() && err != nil {
			return false
		}
	}
	return true
}

// allAgree waits until every guard does.
func (f *fabric) allAgree(guards []*guard) {
	f.t.Helper()
	epoch, number := f.head()
	for _, g := range guards {
		eventually(f.t, patience, g, func() bool { return g.agrees(epoch, number) })
	}
}

func (g *guard) String() string {
	s := g.enf.Status()
	return fmt.Sprintf("%s: %+v", g.name, s)
}

// steadily decides on one victim after the other until the returned function is
// called, and counts those that were acknowledged as durable.
func (f *fabric) steadily(c *crowd, every time.Duration, decide func(context.Context, *caller) error) (stop func() int) {
	ctx, cancel := context.WithCancel(f.ctx)
	var wg sync.WaitGroup
	var n atomic.Int64
	wg.Go(func() {
		tick := time.NewTicker(every)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			v := c.victim(f.t)
			if err := decide(f.ctx, v); err != nil {
				f.t.Errorf("decide on %s: %v", v.sid, err)
			}
			n.Add(1)
		}
	})
	return func() int {
		cancel()
		wg.Wait()
		return int(n.Load())
	}
}
