package authority

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/interlock-fabric/interlock/internal/access"
	"github.com/interlock-fabric/interlock/internal/broker"
	"github.com/interlock-fabric/interlock/internal/sequencer"
	"github.com/interlock-fabric/interlock/pkg/authority"
	"github.com/interlock-fabric/interlock/pkg/natsfeed"
	"github.com/interlock-fabric/interlock/pkg/session"
)

const (
	// ordersTick is how often emergency orders are looked after.
	ordersTick = 500 * time.Millisecond
	// readOrdersEvery is how many of these pass between readings of what is stored:
	// what is published is heard, too.
	readOrdersEvery = 4
	// ordersLimit bounds a reading of the stored orders, and the wait for an
	// adoption to be durable.
	ordersLimit = 5 * time.Second
)

// orders are the emergency orders that this authority has heard of: live, from
// their stream, and from the receipts of enforcers that got them as files. The
// writer adopts them: the kill and that the order is spent are one decision, like
// any other, whose id follows from the order's, so that it is taken once.
type orders struct {
	// admitted is the version of the key set whose holders the bus lets in, and
	// read the one under which the stream was read up to next, and is read on from
	// there. They are tendOrders'.
	admitted, read, next uint64
	failing              bool

	mu sync.Mutex
	// pending are those that the log does not have; known is the first content
	// heard of each.
	pending map[session.OrderID]pendingOrder
	known   map[session.OrderID]session.Hash
	// refused counts those that were not believed since the last record of it.
	refused uint64
	why     string
}

// pendingOrder is an order that waits for the writer.
type pendingOrder struct {
	*session.SignedOrder
	from string
	why  string // it waits still
	said bool   // its adoption is logged and recorded; the log does not have it yet
}

// hearOrder takes an order from wherever it came. What is stored is read anew at
// every start, so that what is refused of it is no news.
func (a *Authority) hearOrder(frame []byte, from string, news bool) {
	s, err := session.ParseOrder(bytes.Clone(frame))
	if err == nil {
		err = a.store.Trust().Order(s)
	}
	o := &a.orders
	o.mu.Lock()
	defer o.mu.Unlock()
	if err == nil {
		if o.known == nil {
			o.known, o.pending = map[session.OrderID]session.Hash{}, map[session.OrderID]pendingOrder{}
		}
		hash, known := o.known[s.ID]
		switch {
		case !known:
			o.known[s.ID] = s.Hash
			o.pending[s.ID] = pendingOrder{SignedOrder: s, from: from}
		case hash != s.Hash:
			err = fmt.Errorf("%w: order %s was given before, with other content", session.ErrUntrusted, s.ID)
		}
	}
	if err != nil && news {
		o.refused++
		o.why = from + ": " + plain(err)
	}
}

// tendOrders looks after emergency orders until ctx ends.
func (a *Authority) tendOrders(ctx context.Context, js jetstream.JetStream) {
	tick := time.NewTicker(ordersTick)
	defer tick.Stop()
	for n := 0; ; n++ {
		a.admitHolders()
		if n%readOrdersEvery == 0 {
			err := a.readOrders(ctx, js)
			if err != nil && !a.orders.failing && ctx.Err() == nil {
				a.log.Warn("the stored emergency orders cannot be read", "error", err)
			}
			a.orders.failing = err != nil
		}
		a.adoptOrders(ctx)
		a.recordRefusedOrders()
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// admitHolders has the embedded bus let in the holders of the emergency keys of
// the key set in force, whoever published it.
func (a *Authority) admitHolders() {
	ks := a.store.KeySet()
	if a.broker == nil || ks.Version == a.orders.admitted {
		return
	}
	list, err := broker.EmergencyOf(ks)
	if err == nil {
		err = a.broker.SetEmergency(list)
	}
	if err != nil {
		a.log.Error("the holders of the emergency keys cannot be let onto the bus", "error", err)
	}
	a.orders.admitted = ks.Version
}

// readOrders reads what has been stored since the last time, and everything again
// under a new key set. What it has no time for it leaves to the next time.
func (a *Authority) readOrders(ctx context.Context, js jetstream.JetStream) error {
	ctx, cancel := context.WithTimeout(ctx, ordersLimit)
	defer cancel()
	s, err := js.Stream(ctx, natsfeed.OrderStream)
	if err != nil {
		return err
	}
	o, state, version := &a.orders, s.CachedInfo().State, a.store.KeySet().Version
	if version != o.read || state.LastSeq+1 < o.next {
		o.next, o.read = 1, version
	}
	for began := o.next; o.next <= state.LastSeq; {
		m, err := s.GetMsg(ctx, o.next, jetstream.WithGetMsgSubject(natsfeed.OrderSubjects))
		switch {
		case errors.Is(err, jetstream.ErrMsgNotFound):
			return nil
		case errors.Is(err, context.DeadlineExceeded) && o.next > began:
			return nil
		case err != nil:
			return err
		}
		a.hearOrder(m.Data, "the bus", false)
		o.next = m.Sequence + 1
	}
	return nil
}

// adoptOrders takes the decisions that adopt what is pending, if this authority is
// the writer.
func (a *Authority) adoptOrders(ctx context.Context) {
	o, state := &a.orders, a.seq.State()
	o.mu.Lock()
	var pending []pendingOrder
	for id, p := range o.pending {
		// A key that was withdrawn meanwhile has lifted it.
		if len(state.Lookup(id.Spent())) > 0 || a.store.Trust().Order(p.SignedOrder) != nil {
			delete(o.pending, id)
			continue
		}
		pending = append(pending, p)
	}
	o.mu.Unlock()
	if st := a.seq.Status(); !st.Writer || st.Halted != nil {
		return
	}
	for _, p := range pending {
		why := ""
		if err := a.adoptOrder(ctx, p); err != nil {
			if why = plain(err); why != p.why {
				a.log.Error("an emergency order cannot be adopted: enforcers that have it go on denying by it", "order", p.ID, "error", err)
			}
		}
		o.mu.Lock()
		if q, ok := o.pending[p.ID]; ok {
			q.why, q.said = why, q.said || why == ""
			o.pending[p.ID] = q
		}
		o.mu.Unlock()
	}
}

// adoptOrder takes the decision that adopts an order.
func (a *Authority) adoptOrder(ctx context.Context, p pendingOrder) error {
	tenant := ""
	if p.Tenant != 0 {
		tenant = a.store.KeySet().TenantName(p.Tenant)
	}
	r := authority.Request{Operation: authority.Kill, Targets: []authority.Target{wholeTarget(tenant)}, Incident: p.Incident, Commit: true}
	ctx, cancel := context.WithTimeout(access.With(ctx, access.NewPrincipal("emergency-key:"+p.ID.Key.String(), access.MeansEmergency)), ordersLimit)
	defer cancel()
	id := adoption(p.ID)
	res, err := a.seq.Decide(ctx, sequencer.Decision{ID: id, Entries: p.Adopted()})
	if err != nil {
		return err // it is tried again, and recorded from the log if it was taken
	}
	if res.Duplicate && p.said {
		return nil // the store has not acknowledged it yet
	}
	a.hub.note(res.Epoch, res.Number, res.At.Time(), p.Adopted())
	d := &authority.Decision{
		Operation: r.Operation, Committed: true, Epoch: res.Epoch, Number: res.Number, At: res.At.Time(), Durable: res.Durable,
		Duplicate: res.Duplicate, Entries: len(p.Adopted()), ID: hex.EncodeToString(id[:]),
	}
	a.log.Warn("an emergency order was adopted: it stands until it is restored", "order", p.ID, "kills", p.Target(), "incident", p.Incident,
		"from", p.from, "epoch", d.Epoch, "number", d.Number, "durable", d.Durable)
	_, err = a.decided(ctx, &r, d, nil, fmt.Sprintf("emergency order %s, signed %s, heard from %s, reason: %s", p.ID, p.Time, p.from, p.Reason))
	return err
}

// adoption is the id of the decision that adopts an order.
func adoption(o session.OrderID) (id session.DecisionID) {
	b := append([]byte("interlock adoption 1\x00"), o.Key[:]...)
	sum := sha256.Sum256(binary.BigEndian.AppendUint16(b, o.Number))
	copy(id[:], sum[:])
	return id
}

// recordRefusedOrders records that orders were not believed.
func (a *Authority) recordRefusedOrders() {
	o := &a.orders
	o.mu.Lock()
	n, why := o.refused, o.why
	o.refused = 0
	o.mu.Unlock()
	if n == 0 {
		return
	}
	a.log.Error("emergency orders are refused", "count", n, "last", why)
	a.audit.Note(authority.AuditRecord{
		Kind: authority.AuditDecision, Action: "adopt", Outcome: authority.OutcomeRefused, Count: n, Detail: why,
		Principal: authority.AuditPrincipal{Means: "unknown"},
	})
}

// warnOfOrders tells of orders that are in force and not in the log.
func (a *Authority) warnOfOrders(warn func(string, ...any)) {
	o, state := &a.orders, a.seq.State()
	o.mu.Lock()
	defer o.mu.Unlock()
	for id, p := range o.pending {
		if len(state.Lookup(id.Spent())) > 0 {
			continue
		}
		why := ""
		if p.why != "" {
			why = ": " + p.why
		}
		warn("emergency order %s (%s) is in force at enforcers and not adopted yet%s", id, p.Incident, why)
	}
}
