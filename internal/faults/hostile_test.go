package faults

import (
	"context"
	"crypto/rand"
	"errors"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/interlock-fabric/interlock/pkg/authority"
	"github.com/interlock-fabric/interlock/pkg/natsfeed"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// turned is an enrolled enforcer that has been taken over: it has its own NKey
// and receipt key, and the whole protocol of the bus.
type turned struct {
	*session.Enrollment
	nc    *nats.Conn
	boot  session.WriterID
	count uint64
	// violations are the refusals of the bus.
	violations atomic.Int64
}

func turn(t *testing.T, addr string, e *session.Enrollment) *turned {
	t.Helper()
	h := &turned{Enrollment: e}
	h.nc = connect(t, addr, e.NATS.NKeySeed,
		nats.CustomInboxPrefix(natsfeed.InboxPrefix(e.Enforcer)),
		nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) {
			if errors.Is(err, nats.ErrPermissionViolation) {
				h.violations.Add(1)
			}
		}))
	_, _ = rand.Read(h.boot[:]) // never fails
	return h
}

// receipt publishes a receipt that claims what it likes.
func (h *turned) receipt(t *testing.T, edit func(*session.Receipt)) {
	t.Helper()
	h.count++
	r := session.Receipt{
		Enforcer: h.Enforcer, Boot: h.boot, Count: h.count, At: time.Now().UnixNano(), MaxStale: time.Hour,
	}
	edit(&r)
	body, err := r.MarshalBody()
	must(t, err)
	frame, err := session.Seal(session.TypeReceipt, body, h.ReceiptKey)
	must(t, err)
	must(t, h.nc.Publish(natsfeed.ReceiptSubject(h.Enforcer), frame))
}

// refused waits until the bus has refused n more than before.
func (h *turned) refused(t *testing.T, before int64, n int) {
	t.Helper()
	eventually(t, patience, "the bus refuses it", func() bool { return h.violations.Load() >= before+int64(n) })
}

// TestHostileEnforcer: an enforcer with a valid NKey tries everything that it
// can reach. It fails when the rights of the bus are widened, when enforcers
// share an account with the authority, when the roster takes a receipt by its
// subject alone, or when one enforcer's word stops the log.
func TestHostileEnforcer(t *testing.T) {
	f := newFabric(t)
	f.open()
	c := newCrowd(16, 400)
	honest := f.guards("honest", 3, c, guardOptions{maxStale: 3 * bound, steady: true})
	h := turn(t, f.listen, f.enrol("hostile", ""))
	honestName := honest[0].name

	// What the authority's side of the bus carries, and what the hostile one
	// gets to hear.
	seen := make(chan *nats.Msg, 1<<16)
	watch := f.connect()
	for _, s := range []string{natsfeed.LogSubject, natsfeed.BeatSubject, natsfeed.TrustSubject, natsfeed.ForwardSubject, natsfeed.ReceiptSubject(honestName), natsfeed.ClockSubject(honestName)} {
		_, err := watch.ChanSubscribe(s, seen)
		must(t, err)
	}
	must(t, watch.Flush())
	js, err := jetstream.New(watch)
	must(t, err)
	stop := f.steadily(c, 20*time.Millisecond, func(ctx context.Context, v *caller) error {
		_, err := v.insist(ctx, f.client)
		return err
	})

	t.Run("publishing where it may not", func(t *testing.T) {
		before := h.violations.Load()
		subjects := []string{
			natsfeed.LogSubject, natsfeed.BeatSubject, natsfeed.TrustSubject, natsfeed.ForwardSubject,
			natsfeed.ReceiptSubject(honestName), natsfeed.ClockSubject(honestName), natsfeed.InboxPrefix(honestName) + ".x",
			"_INBOX.x", "_R_.x", "$KV." + natsfeed.LeaseBucket + ".writer",
			"$JS.API.STREAM.PURGE." + natsfeed.LogStream, "$JS.API.STREAM.DELETE." + natsfeed.LogStream,
			"$JS.API.STREAM.MSG.GET." + natsfeed.LogStream, "$JS.API.CONSUMER.CREATE." + natsfeed.LogStream,
			"$JS.API.DIRECT.GET." + natsfeed.ReceiptStream, "$JS.API.DIRECT.GET.KV_" + natsfeed.LeaseBucket,
		}
		for _, s := range subjects {
			must(t, h.nc.PublishMsg(&nats.Msg{Subject: s, Data: []byte("hostile"), Reply: natsfeed.InboxPrefix("hostile") + ".x"}))
		}
		must(t, h.nc.Flush())
		h.refused(t, before, len(subjects))
	})
	t.Run("listening where it may not", func(t *testing.T) {
		before := h.violations.Load()
		subjects := []string{">", "interlock.>", "_INBOX.>", natsfeed.InboxPrefix(honestName) + ".>", natsfeed.ReceiptSubjects, natsfeed.ForwardSubject, "$KV.>", "_R_.>"}
		for _, s := range subjects {
			_, err := h.nc.Subscribe(s, func(m *nats.Msg) { t.Errorf("it hears %s", m.Subject) })
			must(t, err)
		}
		must(t, h.nc.Flush())
		h.refused(t, before, len(subjects))
	})
	t.Run("answers sent elsewhere", func(t *testing.T) {
		// The server answers a direct get to whatever subject the request
		// names, and the authority answers a nonce.
		for _, reply := range []string{
			natsfeed.LogSubject, natsfeed.BeatSubject, natsfeed.TrustSubject, natsfeed.ForwardSubject,
			natsfeed.ReceiptSubject(honestName), natsfeed.InboxPrefix(honestName) + ".x",
			"$JS.API.STREAM.PURGE." + natsfeed.LogStream, "$KV." + natsfeed.LeaseBucket + ".writer",
		} {
			for _, s := range []string{natsfeed.LogStream, natsfeed.TrustStream} {
				must(t, h.nc.PublishMsg(&nats.Msg{Subject: "$JS.API.DIRECT.GET." + s, Reply: reply, Data: []byte(`{"seq":1,"batch":10}`)}))
			}
			must(t, h.nc.PublishMsg(&nats.Msg{Subject: natsfeed.ClockSubject("hostile"), Reply: reply, Data: make([]byte, 32)}))
			must(t, h.nc.PublishMsg(&nats.Msg{Subject: natsfeed.ReceiptSubject("hostile"), Reply: reply, Data: []byte("x")}))
		}
		must(t, h.nc.Flush())
	})
	t.Run("a flood", func(t *testing.T) {
		// Its own subjects are open to it, as fast as it can.
		junk := make([]byte, 4<<10)
		for i := range 20_000 {
			must(t, h.nc.Publish(natsfeed.ReceiptSubject("hostile"), junk))
			if i%10 == 0 {
				must(t, h.nc.PublishMsg(&nats.Msg{Subject: natsfeed.ClockSubject("hostile"), Reply: natsfeed.InboxPrefix("hostile") + ".x", Data: junk[:32]}))
			}
		}
		must(t, h.nc.Flush())
		s, err := js.Stream(f.ctx, natsfeed.ReceiptStream)
		must(t, err)
		for _, g := range honest {
			_, err := s.GetLastMsgForSubject(f.ctx, natsfeed.ReceiptSubject(g.name))
			if err != nil {
				t.Errorf("the flood washed away the receipts of %s: %v", g.name, err)
			}
		}
		eventually(t, patience, "the flood is counted", func() bool {
			st, err := f.client.Enforcers(f.ctx)
			must(t, err)
			for _, e := range st {
				if e.Name == "hostile" && e.ReceiptsRefused > 1000 {
					return true
				}
			}
			return false
		})
	})
	t.Run("receipts in another's name", func(t *testing.T) {
		// Once the flood's penalty has passed.
		eventually(t, patience, "a receipt for another is refused", func() bool {
			before := f.enforcer(h.Enforcer).ReceiptsRefused
			h.receipt(t, func(r *session.Receipt) { r.Enforcer = honestName })
			must(t, h.nc.Flush())
			return f.enforcer(h.Enforcer).ReceiptsRefused > before
		})
	})
	t.Run("receipts of a log that is not", func(t *testing.T) {
		epoch, number := f.head()
		claims := []func(*session.Receipt){
			func(r *session.Receipt) { r.Number = number + 100_000 },
			func(r *session.Receipt) { r.Number = 1 },
			func(r *session.Receipt) { r.Number = 1<<64 - 1 },
			func(r *session.Receipt) { r.Epoch, r.Number = epoch+1, 1 },
		}
		for _, claim := range claims {
			eventually(t, patience, "the claim is seen", func() bool {
				h.receipt(t, func(r *session.Receipt) {
					r.Epoch, r.Head = epoch, session.Hash{1}
					claim(r)
					r.Confirmed = r.Number
				})
				must(t, h.nc.Flush())
				e := f.enforcer(h.Enforcer)
				var want session.Receipt
				claim(&want)
				return e.Confirmed == want.Number || want.Number == 0
			})
		}
	})
	n := stop()
	f.allAgree(honest)
	if st, err := f.client.Status(f.ctx); err != nil || !st.Writer {
		t.Errorf("status %+v, %v", st, err)
	}
	watch.Close()
	close(seen)
	for m := range seen {
		if _, err := session.ParseFrame(m.Data); err != nil && m.Subject != natsfeed.ClockSubject(honestName) || strings.Contains(string(m.Data), "hostile\x00") {
			t.Errorf("on %s there is %.40q", m.Subject, m.Data)
		}
	}
	for _, g := range honest {
		if s := g.enf.Status(); s.Refused > 0 || s.Lost > 0 || s.RolledBack > 0 {
			t.Errorf("%s was disturbed: %+v", g.name, s)
		}
		if e := f.enforcer(g.name); e.ReceiptsRefused > 0 || e.Condition != authority.ConditionFresh {
			t.Errorf("%s in the roster: %+v", g.name, e)
		}
	}
	t.Logf("%d decisions meanwhile, all durable; %d refusals by the bus", n, h.violations.Load())
}

// enforcer returns what the roster says of one.
func (f *fabric) enforcer(name string) authority.Enforcer {
	f.t.Helper()
	all, err := f.client.Enforcers(f.ctx)
	must(f.t, err)
	for _, e := range all {
		if e.Name == name {
			return e
		}
	}
	f.t.Fatalf("%s is not in the roster", name)
	return authority.Enforcer{}
}

// TestOneClaimDoesNotStopTheLog: the only enforcer that lives says that it has
// seen more of the log than there is, before and after a restart of the
// authority. It fails when the word of one, unproven, is enough.
func TestOneClaimDoesNotStopTheLog(t *testing.T) {
	t.Parallel()
	f := newFabric(t)
	f.open()
	c := newCrowd(1, 20)
	h := turn(t, f.listen, f.enrol("hostile", ""))
	lie := func() {
		epoch, number := f.head()
		h.receipt(t, func(r *session.Receipt) {
			r.Epoch, r.Number, r.Confirmed, r.Head = epoch, number+7, number+7, session.Hash{7}
		})
		must(t, h.nc.Flush())
		eventually(t, patience, "the claim is seen", func() bool { return f.enforcer("hostile").Confirmed == number+7 })
	}
	decide := func() {
		t.Helper()
		for range 3 {
			if _, err := c.victim(t).insist(f.ctx, f.client); err != nil {
				t.Fatal(err)
			}
		}
	}
	decide()
	lie()
	decide()
	st, err := f.client.Status(f.ctx)
	must(t, err)
	if !strings.Contains(strings.Join(st.Warnings, "\n"), "hostile") {
		t.Errorf("no alarm in the status: %q", st.Warnings)
	}
	f.close()
	f.open()
	eventually(t, patience, "the claim is recalled", func() bool { return f.enforcer("hostile").Confirmed > 0 })
	decide()
	eventually(t, patience, "it comes back", h.nc.IsConnected)
	lie()
	decide()
}
