package enforce

import (
	"context"
	"crypto/ed25519"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/interlock-fabric/interlock/pkg/session"
)

// emergencyKey has the root permit three orders of a new key: of a tenant, or of
// everything for zero.
func (b *bus) emergencyKey(tenant session.TenantID) ed25519.PrivateKey {
	k := key(b.t)
	b.newKeySet(func(ks *session.KeySet) {
		sk := session.SigningKey{Public: pub(k), Use: session.UseEmergency, Orders: 3}
		if tenant != 0 {
			sk.Tenants = []session.TenantID{tenant}
		}
		ks.Keys = append(ks.Keys, sk)
	})
	return k
}

// order signs an order.
func (b *bus) order(k ed25519.PrivateKey, number uint16, tenant session.TenantID, change func(*session.Order)) *session.SignedOrder {
	b.t.Helper()
	o := session.Order{
		Fabric: session.FabricOf(pub(b.root)), Number: number, Tenant: tenant,
		Time: session.InstantOf(time.Now()), Incident: "INC-911", Reason: "nobody answers",
	}
	if change != nil {
		change(&o)
	}
	f, err := session.SealOrder(&o, k)
	if err != nil {
		b.t.Fatal(err)
	}
	s, err := session.ParseOrder(f)
	if err != nil {
		b.t.Fatal(err)
	}
	return s
}

// drop puts a file into a directory and waits until it has been looked at.
func drop(t testing.TB, dir, name string, content []byte) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
		t.Fatal(err)
	}
	looked()
}

// looked waits until the directory has been looked at, and what was found taken.
func looked() {
	time.Sleep(3*lookEvery + tickEvery)
	settle()
}

// inOrders has the options of an enforcer that looks into a directory.
func inOrders(dir, state string) func(*Options) {
	return func(o *Options) { o.OrdersDir, o.StateDir = dir, state }
}

func globexCaller(t testing.TB, e *Enforcer) *session.Prepared {
	id := caller("s1")
	id.Tenant = "globex"
	return prepare(t, e, id)
}

// TestOrderFile: with the bus dead, a file denies its tenant and ends its work,
// whatever becomes of the file, of the time, of the bus and of the process.
func TestOrderFile(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		dir, state := t.TempDir(), t.TempDir()
		k := b.emergencyKey(1)
		e, _ := b.open(inOrders(dir, state))
		p, other := prepare(t, e, caller("s1")), globexCaller(t, e)
		mustAllow(t, e, p, session.Call{})
		work, bystander := mustBind(t, e, p, session.Call{}), mustBind(t, e, other, session.Call{})
		b.with(func(b *bus) { b.dead = true })
		drop(t, dir, "kill", b.order(k, 1, 1, nil).Frame)
		mustDenyAs(t, e, p, session.ErrSuspended, true)
		mustBeCut(work, t, session.ErrSuspended)
		mustAllow(t, e, other, session.Call{})
		mustRun(bystander, t)
		var d *session.DeniedError
		if err := e.Check(p, session.Call{}); !errors.As(err, &d) || d.Incident != "INC-911" || d.Reason != session.ReasonKill {
			t.Errorf("%+v", d)
		}
		if s := e.Status(); len(s.Orders) != 1 || s.Orders[0].Kills != "tenant acme" || s.Orders[0].Number != 1 || s.OrdersRefused != 0 {
			t.Errorf("%+v", s)
		}

		if err := os.Remove(filepath.Join(dir, "kill")); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * time.Minute)
		mustDeny(t, e, p, session.Call{}, session.ErrSuspended)
		b.with(func(b *bus) { b.dead = false })
		time.Sleep(5 * time.Second)
		mustDeny(t, e, p, session.Call{}, session.ErrSuspended)
		mustAllow(t, e, other, session.Call{})
		e.Close()

		e, f := b.open(inOrders(dir, state))
		defer func() { e.Close() }()
		p = prepare(t, e, caller("s1"))
		mustDenyAs(t, e, p, session.ErrSuspended, true)
		mustAllow(t, e, globexCaller(t, e), session.Call{})
		time.Sleep(3 * time.Second)
		if all := f.said(); len(all[len(all)-1].Orders) != 1 {
			t.Errorf("the receipt does not show it: %+v", all[len(all)-1])
		}
		// So does an epoch that is opened meanwhile.
		b.newEpoch()
		b.decide(revoke(b.session("other")))
		time.Sleep(3 * time.Second)
		mustDenyAs(t, e, p, session.ErrSuspended, true)
	})
}

// TestOrderIsLifted: by a decision after the one that adopts it, or by the root;
// and what is spent stays so, wherever the order turns up again.
func TestOrderIsLifted(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		dir, state := t.TempDir(), t.TempDir()
		k := b.emergencyKey(0)
		e, _ := b.open(inOrders(dir, state))
		p := prepare(t, e, caller("s1"))
		o := b.order(k, 1, 0, nil)
		drop(t, dir, "a", o.Frame)
		mustDenyAs(t, e, p, session.ErrSuspended, true)

		// What is lifted without it having been adopted does not touch it.
		b.decide(set(session.EffectSuspended, session.GlobalKey()))
		b.decide(lift(session.EffectSuspended, session.GlobalKey()))
		settle()
		mustDenyAs(t, e, p, session.ErrSuspended, true)

		// Until the adoption is confirmed both are in force, then the log's alone.
		frame, _ := b.batch(o.Adopted()...)
		b.say(frame)
		settle()
		mustDenyAs(t, e, p, session.ErrSuspended, true)
		if n := len(e.Status().Orders); n != 1 {
			t.Errorf("%d orders", n)
		}
		b.accept(frame)
		b.beat()
		settle()
		mustDenyAs(t, e, p, session.ErrSuspended, false)
		if n := len(e.Status().Orders); n != 0 {
			t.Errorf("%d orders", n)
		}
		b.decide(lift(session.EffectSuspended, session.GlobalKey()))
		settle()
		mustAllow(t, e, p, session.Call{})

		// The same order, another of the same number, and both of them where
		// nobody has seen the first.
		again := b.order(k, 1, 1, nil)
		drop(t, dir, "b", o.Frame)
		drop(t, dir, "c", again.Frame)
		mustAllow(t, e, p, session.Call{})
		if s := e.Status(); s.OrdersRefused != 1 || !strings.Contains(s.OrderWhy, "other content") {
			t.Errorf("%+v", s)
		}
		e.Close()
		for _, where := range []string{state, t.TempDir()} {
			e, _ = b.open(inOrders(dir, where))
			looked()
			mustAllow(t, e, prepare(t, e, caller("s1")), session.Call{})
			e.Close()
		}
		b.newEpoch()
		e, _ = b.open(inOrders(dir, state))
		defer func() { e.Close() }()
		looked()
		p = prepare(t, e, caller("s1"))
		mustAllow(t, e, p, session.Call{})

		// The root withdraws the key of one that stands.
		drop(t, dir, "d", b.order(k, 2, 0, nil).Frame)
		mustDeny(t, e, p, session.Call{}, session.ErrSuspended)
		b.newKeySet(func(ks *session.KeySet) {
			i := slices.IndexFunc(ks.Keys, func(x session.SigningKey) bool { return x.Use == session.UseEmergency })
			ks.Keys[i].Withdrawn = true
		})
		looked()
		mustAllow(t, e, p, session.Call{})
		drop(t, dir, "e", b.order(k, 3, 0, nil).Frame)
		mustAllow(t, e, p, session.Call{})
		e.Close()
		e, _ = b.open(inOrders(t.TempDir(), state))
		mustAllow(t, e, prepare(t, e, caller("s1")), session.Call{})
	})
}

// TestOrdersAreNotBelieved: nothing but what the key set permits, once, has any
// effect.
func TestOrdersAreNotBelieved(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		dir := t.TempDir()
		k := b.emergencyKey(2)
		e, _ := b.open(inOrders(dir, ""))
		defer e.Close()
		p, q := prepare(t, e, caller("s1")), globexCaller(t, e)
		widened := b.order(k, 1, 2, nil).Frame
		widened = slices.Clone(widened)
		widened[17+32+1+2+3] = 1 // the tenant
		for name, frame := range map[string][]byte{
			"another tenant":     b.order(k, 1, 1, nil).Frame,
			"everything":         b.order(k, 1, 0, nil).Frame,
			"a number too many":  b.order(k, 4, 2, nil).Frame,
			"another deployment": b.order(k, 1, 2, func(o *session.Order) { o.Fabric[0]++ }).Frame,
			"a stranger's":       b.order(key(t), 1, 2, nil).Frame,
			"a writer's":         b.order(b.keys["a"], 1, 2, nil).Frame,
			"widened":            widened,
			"junk":               []byte("kill -9 everything"),
			"long":               make([]byte, session.MaxOrderLen+1),
		} {
			before := e.Status()
			drop(t, dir, name, frame)
			if s := e.Status(); s.OrdersRefused != before.OrdersRefused+1 || s.Refused != before.Refused+1 || s.OrderWhy == "" || len(s.Orders) != 0 {
				t.Errorf("%s: %+v", name, s)
			}
			mustAllow(t, e, p, session.Call{})
			mustAllow(t, e, q, session.Call{})
		}
		// What is no file is passed over or refused, and holds nothing up.
		if err := errors.Join(os.Mkdir(filepath.Join(dir, "folder"), 0o700), os.Symlink("/dev/zero", filepath.Join(dir, "endless"))); err != nil {
			t.Fatal(err)
		}
		drop(t, dir, ".hidden", b.order(k, 1, 2, nil).Frame)
		mustAllow(t, e, q, session.Call{})
		// Half of it first.
		good := b.order(k, 1, 2, nil).Frame
		drop(t, dir, "good", good[:40])
		mustAllow(t, e, q, session.Call{})
		drop(t, dir, "good", good)
		mustDeny(t, e, q, session.Call{}, session.ErrSuspended)
		mustAllow(t, e, p, session.Call{})
		n := e.Status().OrdersRefused
		// The same again is nothing new; another under its number is.
		drop(t, dir, "copy", good)
		looked()
		if s := e.Status(); s.OrdersRefused != n || len(s.Orders) != 1 {
			t.Errorf("%+v, %d before", s, n)
		}
		drop(t, dir, "other", b.order(k, 1, 2, func(o *session.Order) { o.Incident = "INC-912" }).Frame)
		if s := e.Status(); s.OrdersRefused != n+1 || len(s.Orders) != 1 || s.Orders[0].Incident != "INC-911" {
			t.Errorf("%+v", s)
		}
	})
}

// TestOrdersInEveryMode: to fail open is not to ignore an order.
func TestOrdersInEveryMode(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		dir := t.TempDir()
		k := b.emergencyKey(0)
		open := func(m session.Mode) *Enforcer {
			e, _ := b.open(func(o *Options) { o.OrdersDir, o.Mode = dir, m })
			return e
		}
		loose, shadow := open(session.ModeBestEffort), open(session.ModeShadow)
		defer loose.Close()
		defer shadow.Close()
		p := prepare(t, loose, caller("s1"))
		work := mustBind(t, loose, p, session.Call{})
		b.with(func(b *bus) { b.dead = true })
		time.Sleep(time.Minute)
		mustAllow(t, loose, p, session.Call{}) // exposed
		drop(t, dir, "kill", b.order(k, 1, 0, nil).Frame)
		mustDeny(t, loose, p, session.Call{}, session.ErrSuspended)
		mustBeCut(work, t, session.ErrSuspended)
		before := shadow.Status().WouldDeny
		mustAllow(t, shadow, prepare(t, shadow, caller("s1")), session.Call{})
		if n := shadow.Status().WouldDeny; n != before+1 {
			t.Errorf("%d would have been denied", n-before)
		}
	})
}

// TestOrderOnTheBus: one that is published denies at once, and one that was while
// the enforcer was away denies before anybody is allowed.
func TestOrderOnTheBus(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		k := b.emergencyKey(0)
		e, _ := b.open(nil)
		p := prepare(t, e, caller("s1"))
		work := mustBind(t, e, p, session.Call{})
		b.publishOrder(b.order(k, 1, 1, nil).Frame)
		settle()
		mustDeny(t, e, p, session.Call{}, session.ErrSuspended)
		mustBeCut(work, t, session.ErrSuspended)
		mustAllow(t, e, globexCaller(t, e), session.Call{})
		// The same from the other source is the same, and junk is nothing.
		b.publishOrder(b.order(k, 1, 1, nil).Frame)
		b.publishOrder([]byte("junk"))
		settle()
		if s := e.Status(); len(s.Orders) != 1 || s.OrdersRefused != 1 {
			t.Errorf("%+v", s)
		}

		// The link was down when another was published.
		b.with(func(b *bus) { b.mute = true })
		b.publishOrder(b.order(k, 2, 2, nil).Frame)
		b.with(func(b *bus) { b.mute = false })
		settle()
		mustAllow(t, e, globexCaller(t, e), session.Call{})
		b.each(func(s Sink) { s.Connected(true) })
		time.Sleep(time.Second)
		settle()
		mustDeny(t, e, globexCaller(t, e), session.Call{}, session.ErrSuspended)
		e.Close()

		for _, mode := range []session.Mode{session.ModeStrict, session.ModeBestEffort} {
			b.with(func(b *bus) { b.orderDelay = 2 * time.Second })
			e, _ = b.start(func(o *Options) { o.Mode = mode })
			p = prepare(t, e, caller("s1"))
			for range 300 {
				time.Sleep(10 * time.Millisecond)
				if e.Check(p, session.Call{}) == nil {
					t.Fatal("allowed before the orders were read")
				}
			}
			if s := e.Status(); !s.Ready || !s.Fresh || len(s.Orders) != 2 {
				t.Errorf("%+v", s)
			}
			e.Close()
		}

		// A bus without them holds nobody up, and is asked again.
		b.with(func(b *bus) { b.orderDelay, b.noOrders = 0, true })
		e, _ = b.open(nil)
		defer e.Close()
		p = prepare(t, e, caller("s1"))
		mustAllow(t, e, p, session.Call{})
		b.with(func(b *bus) { b.noOrders = false })
		time.Sleep(30 * time.Second)
		mustDeny(t, e, p, session.Call{}, session.ErrSuspended)
	})
}

// TestOrderBeforeTheBus: a file that lay there when the enforcer came up, without
// a bus, denies from the first moment.
func TestOrderBeforeTheBus(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		dir := t.TempDir()
		k := b.emergencyKey(1)
		b.with(func(b *bus) { b.dead = true })
		e, _ := b.start(inOrders(dir, ""))
		defer e.Close()
		p := prepare(t, e, caller("s1"))
		drop(t, dir, "kill", b.order(k, 1, 1, nil).Frame)
		mustDeny(t, e, p, session.Call{}, session.ErrStale)
		b.with(func(b *bus) { b.dead = false })
		time.Sleep(5 * time.Second)
		mustDeny(t, e, p, session.Call{}, session.ErrSuspended)
		mustAllow(t, e, globexCaller(t, e), session.Call{})
	})
}

// TestOrderOfAKeyToCome: a file that could not be believed yet is looked at again
// when there is a new key set; and what is in force is kept, however soon the
// enforcer ends.
func TestOrderOfAKeyToCome(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		dir, state := t.TempDir(), t.TempDir()
		e, _ := b.open(inOrders(dir, state))
		p := prepare(t, e, caller("s1"))
		k := key(t)
		drop(t, dir, "kill", b.order(k, 1, 1, nil).Frame)
		mustAllow(t, e, p, session.Call{})
		b.newKeySet(func(ks *session.KeySet) {
			ks.Keys = append(ks.Keys, session.SigningKey{Public: pub(k), Use: session.UseEmergency, Orders: 1})
		})
		for range 1000 {
			if settle(); len(e.Status().Orders) > 0 {
				break
			}
			time.Sleep(time.Millisecond)
		}
		mustDeny(t, e, p, session.Call{}, session.ErrSuspended)
		e.Close()
		e, _ = b.open(inOrders(t.TempDir(), state))
		defer e.Close()
		mustDeny(t, e, prepare(t, e, caller("s1")), session.Call{}, session.ErrSuspended)
	})
}

// TestOrdersThatCannotBeRead: to start without knowing which orders are in force
// would be to lift them.
func TestOrdersThatCannotBeRead(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		dir, state := t.TempDir(), t.TempDir()
		k := b.emergencyKey(1)
		e, _ := b.open(inOrders(dir, state))
		drop(t, dir, "kill", b.order(k, 1, 1, nil).Frame)
		e.Close()
		path := filepath.Join(state, "e1.orders.json")
		good, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		refuse := func(what string, o *Options, want error) {
			t.Helper()
			o.Enrollment = b.enrol("e1")
			if e, err := Start(b.feed(), o); !errors.Is(err, want) {
				t.Errorf("%s: %v", what, err)
				e.Close()
			}
		}
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%v, %v", info, err)
		}
		for _, bad := range [][]byte{nil, good[:len(good)/2], []byte(strings.Replace(string(good), `"orders":["`, `"orders":["QUFB","`, 1))} {
			if err := os.WriteFile(path, bad, 0o600); err != nil {
				t.Fatal(err)
			}
			refuse("damaged", &Options{StateDir: state}, ErrFloor)
		}
		refuse("no directory", &Options{OrdersDir: filepath.Join(dir, "nothing")}, session.ErrInvalid)
		refuse("a file", &Options{OrdersDir: filepath.Join(dir, "kill")}, session.ErrInvalid)
	})
}

// TestAllowedBesideAnOrder: an order that is about others costs an allowed call
// nothing on the heap.
func TestAllowedBesideAnOrder(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		dir := t.TempDir()
		k := b.emergencyKey(2)
		e, _ := b.open(inOrders(dir, ""))
		defer e.Close()
		b.many(2000)
		settle()
		drop(t, dir, "kill", b.order(k, 1, 2, nil).Frame)
		mustDeny(t, e, globexCaller(t, e), session.Call{}, session.ErrSuspended)
		p := prepare(t, e, caller("s1"))
		if n := testing.AllocsPerRun(200, func() {
			if e.Check(p, session.Call{Tool: "read"}) != nil {
				t.Error("denied")
			}
		}); n != 0 {
			t.Errorf("%v allocations", n)
		}
	})
}

// countLines counts what is logged.
type countLines struct {
	slog.Handler
	n *atomic.Int64
}

func (c countLines) Enabled(context.Context, slog.Level) bool { return true }

func (c countLines) Handle(_ context.Context, r slog.Record) error {
	if strings.Contains(r.Message, "order is refused") {
		c.n.Add(1)
	}
	return nil
}

// TestOrdersUnderAFlood: who may publish orders and publishes anything else as fast
// as it can takes heartbeats from nobody, fills no log, and hides no order.
func TestOrdersUnderAFlood(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		k := b.emergencyKey(0)
		var lines atomic.Int64
		e, f := b.open(func(o *Options) { o.Logger = slog.New(countLines{n: &lines}) })
		defer e.Close()
		p := prepare(t, e, caller("s1"))
		busy, stop := make(chan struct{}), make(chan struct{})
		f.to().(sink).push(func() { close(busy); <-stop })
		<-busy
		before := e.Status()
		for i := range 2 * eventQueue {
			junk := b.order(k, 1, 1, func(o *session.Order) { o.Fabric[0] += byte(1 + i%200) }).Frame
			f.to().Order(junk)
		}
		f.to().Order(make([]byte, session.MaxOrderLen+1))
		if n := len(f.to().(sink).f.events); n > maxOrdersQueued+8 {
			t.Errorf("%d events wait, heartbeats behind them", n)
		}
		b.publishOrder(b.order(k, 1, 1, nil).Frame) // is lost with the rest
		close(stop)
		settle()
		mustAllow(t, e, p, session.Call{})
		time.Sleep(2 * orderWaitMin)
		settle()
		mustDeny(t, e, p, session.Call{}, session.ErrSuspended)
		s := e.Status()
		if n := s.OrdersRefused - before.OrdersRefused; n != maxOrdersQueued+1 || lines.Load() != 1 || len(s.Orders) != 1 {
			t.Errorf("%d refused, %d lines, %+v", n, lines.Load(), s.Orders)
		}
	})
}

// TestOrderThatWasNotHeard: while no authority is there to adopt it, an order that
// was published and not heard is read.
func TestOrderThatWasNotHeard(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		k := b.emergencyKey(0)
		e, _ := b.open(func(o *Options) { o.Mode = session.ModeBestEffort })
		defer e.Close()
		p := prepare(t, e, caller("s1"))
		b.as(func(b *bus) { b.silent = true })
		time.Sleep(time.Minute)
		mustAllow(t, e, p, session.Call{})
		b.with(func(b *bus) { b.mute = true })
		b.publishOrder(b.order(k, 1, 1, nil).Frame)
		time.Sleep(orderWaitMax + time.Second)
		settle()
		mustDeny(t, e, p, session.Call{}, session.ErrSuspended)
	})
}
