package authority

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nkeys"

	"github.com/interlock-fabric/interlock/internal/broker"
	"github.com/interlock-fabric/interlock/internal/sequencer"
	"github.com/interlock-fabric/interlock/internal/trust"
	"github.com/interlock-fabric/interlock/pkg/authority"
	"github.com/interlock-fabric/interlock/pkg/enforce"
	"github.com/interlock-fabric/interlock/pkg/natsfeed"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// orderWorld is an authority on a bus that runs apart, with an enforcer on it.
type orderWorld struct {
	*fixture
	t               *testing.T
	data, ordersDir string
	bus             *broker.Broker
	store           *trust.Store
	root            *trust.Root
	global, tenant  *trust.EmergencyKey
	e               *enforce.Enforcer
	caller          *session.Prepared
	enrolled        *session.Enrollment
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func newOrderWorld(t *testing.T) *orderWorld {
	w := &orderWorld{t: t, data: t.TempDir(), ordersDir: t.TempDir()}
	keys := filepath.Join(w.data, KeysDir)
	now := session.InstantOf(time.Now())
	var err error
	w.store, err = trust.Init(trust.InitOptions{Dir: keys}, now)
	must(t, err)
	w.root, err = trust.LoadRoot(filepath.Join(keys, trust.RootFile))
	must(t, err)
	nkey, err := w.store.AuthorityNKey()
	must(t, err)
	w.bus, err = broker.Start(broker.Options{Dir: t.TempDir(), Listen: "127.0.0.1:0", Authority: nkey, RelaxedSync: true})
	must(t, err)
	t.Cleanup(func() { must(t, w.bus.Close()) })
	urls := []string{w.bus.ClientURL()}
	w.global, err = w.store.AddEmergency(w.root, trust.EmergencyOptions{Path: filepath.Join(w.data, "global"), Global: true, Orders: 2, URLs: urls}, now)
	must(t, err)
	w.tenant, err = w.store.AddEmergency(w.root, trust.EmergencyOptions{Path: filepath.Join(w.data, "tenant"), Tenants: []string{"default"}, Orders: 1}, now)
	must(t, err)
	holders, err := broker.EmergencyOf(w.store.KeySet())
	must(t, err)
	must(t, w.bus.SetEmergency(holders))
	w.open()

	w.enrolled = w.enroll("tools")
	kp, err := nkeys.FromSeed([]byte(w.enrolled.NATS.NKeySeed))
	must(t, err)
	pub, err := kp.PublicKey()
	must(t, err)
	must(t, w.bus.SetEnforcers([]broker.Enforcer{{Name: "tools", PublicNKey: pub}}))
	feed, err := natsfeed.Dial(w.enrolled, nil)
	must(t, err)
	// What denies here is an order, and not its age.
	w.e, err = enforce.Open(w.ctx, feed, &enforce.Options{Enrollment: w.enrolled, OrdersDir: w.ordersDir, MaxStale: 10 * time.Minute})
	must(t, err)
	t.Cleanup(func() { _ = w.e.Close() })
	w.caller = w.prepare(w.e, session.Identity{User: "alice", Session: session.SessionRef{ID: "s1"}})
	must(t, w.e.Check(w.caller, session.Call{}))
	return w
}

// open starts the authority, or starts it again.
func (w *orderWorld) open() {
	w.t.Helper()
	w.fixture = start(w.t, Options{DataDir: w.data, NATSURL: w.bus.ClientURL()})
}

func (w *orderWorld) signed(k *trust.EmergencyKey, number uint16, tenant session.TenantID, incident string) []byte {
	w.t.Helper()
	frame, err := k.Sign(session.Order{Number: number, Tenant: tenant, Time: session.InstantOf(time.Now()), Incident: incident, Reason: "it burns"})
	must(w.t, err)
	return frame
}

func (w *orderWorld) publish(frame []byte) {
	w.t.Helper()
	if n, err := natsfeed.PublishOrder(w.ctx, w.global.NATS, frame); n != 1 || err != nil {
		w.t.Fatal(n, err)
	}
}

func (w *orderWorld) denied() bool {
	return errors.Is(w.e.Check(w.caller, session.Call{}), session.ErrSuspended)
}

func (w *orderWorld) status() *authority.Status {
	w.t.Helper()
	s, err := w.c.Status(w.ctx)
	must(w.t, err)
	return s
}

// adopted returns what the audit has of adoptions.
func (w *orderWorld) adopted() (all []string) {
	w.t.Helper()
	p, err := w.c.Audit(w.ctx, authority.AuditQuery{Kind: authority.AuditDecision})
	must(w.t, err)
	for _, r := range p.Records {
		if r.Principal.Means == "emergency" && r.Action == "kill" && r.Outcome == authority.OutcomeDone && strings.Contains(r.Detail, "it burns") {
			all = append(all, r.Principal.Name+" "+r.Incident+" "+r.Targets[0])
		}
	}
	return all
}

// always demands that the caller is denied from now on until stop is called.
func (w *orderWorld) always() (stop func()) {
	done := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for n := 0; ; n++ {
			select {
			case <-done:
				return
			case <-time.After(100 * time.Microsecond):
			}
			if err := w.e.Check(w.caller, session.Call{}); err == nil {
				w.t.Errorf("allowed between two denials, after %d of them", n)
				return
			}
		}
	})
	return sync.OnceFunc(func() { close(done); wg.Wait() })
}

// TestOfflineKill: with the authority dead an order on the bus denies, and so does
// one in a file; the authority adopts both when it is back, without a moment in
// between; its restore lifts them, and nothing brings them back.
func TestOfflineKill(t *testing.T) {
	w := newOrderWorld(t)
	must(t, w.a.Close())
	order := w.signed(w.global, 1, 0, "INC-1")
	w.publish(order)
	w.until(w.denied)
	must(t, os.WriteFile(filepath.Join(w.ordersDir, "kill"), w.signed(w.tenant, 1, 1, "INC-2"), 0o600))
	w.until(func() bool { return len(w.e.Status().Orders) == 2 })

	stop := w.always()
	defer stop()
	w.open()
	w.until(func() bool {
		s := w.status()
		return len(s.Kills) == 2 && len(w.e.Status().Orders) == 0
	})
	if s := w.status(); s.Entries != 4 || strings.Contains(strings.Join(s.Warnings, " "), "emergency order") {
		t.Errorf("%d entries, %q", s.Entries, s.Warnings)
	}
	var d *session.DeniedError
	w.until(func() bool { return errors.As(w.e.Check(w.caller, session.Call{}), &d) && !d.Provisional })
	if d.Seq == 0 {
		t.Errorf("%+v", d)
	}
	stop()
	w.until(func() bool { return len(w.adopted()) == 2 })
	if all := strings.Join(w.adopted(), "; "); !strings.Contains(all, w.global.ID().String()+" INC-1 global") || !strings.Contains(all, w.tenant.ID().String()+" INC-2 tenant default") {
		t.Errorf("the audit has %s", all)
	}

	restore := func(target string, value string) {
		t.Helper()
		w.settle(w.decide(authority.Request{Operation: authority.Restore, Incident: "INC-1", Targets: []authority.Target{{Terms: []authority.Term{{Kind: target, Value: value}}}}}))
	}
	restore("global", "")
	if !w.denied() {
		t.Error("the tenant's order is lifted with the other")
	}
	restore("tenant", "default")
	w.until(func() bool { return w.e.Check(w.caller, session.Call{}) == nil })

	// The same again, and another under its number, are nothing; the second is
	// refused by both, and recorded.
	w.publish(order)
	w.publish(w.signed(w.global, 1, 0, "INC-3"))
	w.until(func() bool { return w.e.Status().OrdersRefused == 1 })
	must(t, w.e.Check(w.caller, session.Call{}))
	w.until(func() bool {
		p, err := w.c.Audit(w.ctx, authority.AuditQuery{Kind: authority.AuditDecision})
		must(t, err)
		for _, r := range p.Records {
			if r.Action == "adopt" && r.Outcome == authority.OutcomeRefused && strings.Contains(r.Detail, "other content") {
				return true
			}
		}
		return false
	})
	// Nor does a restart adopt again what is stored.
	must(t, w.a.Close())
	w.open()
	// What is forged takes no number from what is not.
	last := w.signed(w.global, 2, 0, "INC-4")
	w.a.hearOrder(bytes.Replace(last, []byte("INC-4"), []byte("INC-5"), 1), "a forger", true)
	w.publish(last)
	w.until(w.denied)
	w.until(func() bool { return len(w.adopted()) == 3 && len(w.e.Status().Orders) == 0 })
	if s := w.status(); len(s.Kills) != 1 {
		t.Errorf("%q", s.Kills)
	}
}

// TestOrderWithdrawn: the root lifts an order by withdrawing its key, whatever
// authority there is, and it is not adopted then.
func TestOrderWithdrawn(t *testing.T) {
	w := newOrderWorld(t)
	must(t, w.a.Close())
	w.publish(w.signed(w.global, 1, 0, "INC-1"))
	w.until(w.denied)
	store, err := trust.Open(filepath.Join(w.data, KeysDir))
	must(t, err)
	must(t, store.Withdraw(w.root, w.global.ID(), 1, 0, session.InstantOf(time.Now())))
	w.open()
	w.until(func() bool { return w.e.Check(w.caller, session.Call{}) == nil })
	if s := w.status(); len(s.Kills) != 0 || s.Entries != 0 {
		t.Errorf("%+v", s)
	}
}

// TestAdoptionIsSaidOnce: while the store does not acknowledge an adoption, it is
// tried again and again, and is on record once.
func TestAdoptionIsSaidOnce(t *testing.T) {
	w := &orderWorld{t: t, data: t.TempDir()}
	keys := filepath.Join(w.data, KeysDir)
	now := session.InstantOf(time.Now())
	store, err := trust.Init(trust.InitOptions{Dir: keys}, now)
	must(t, err)
	root, err := trust.LoadRoot(filepath.Join(keys, trust.RootFile))
	must(t, err)
	key, err := store.AddEmergency(root, trust.EmergencyOptions{Path: filepath.Join(w.data, "global"), Global: true, Orders: 1}, now)
	must(t, err)
	var outage atomic.Bool
	w.fixture = start(t, Options{DataDir: w.data, AckWait: 50 * time.Millisecond, Hooks: sequencer.Hooks{DropAcks: outage.Load}})
	w.until(func() bool { return w.a.seq.Status().Writer })
	outage.Store(true)
	w.a.hearOrder(w.signed(key, 1, 0, "INC-1"), "a test", true)
	o := &w.a.orders
	w.until(func() bool {
		o.mu.Lock()
		defer o.mu.Unlock()
		for _, p := range o.pending {
			return p.said
		}
		return false
	})
	for range 3 {
		w.a.adoptOrders(w.ctx)
	}
	if n := len(w.adopted()); n != 1 {
		t.Errorf("%d records of it in an outage of the store", n)
	}
	outage.Store(false)
	w.until(func() bool {
		w.a.adoptOrders(w.ctx)
		o.mu.Lock()
		defer o.mu.Unlock()
		return len(o.pending) == 0
	})
	if n := len(w.adopted()); n != 1 {
		t.Errorf("%d records of it", n)
	}
}
