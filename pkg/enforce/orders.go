package enforce

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/interlock-fabric/interlock/pkg/filter"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// Emergency orders are kills outside the log: session.Order. What is held here are
// those that the key set permits. One is in force until the confirmed state says
// that it is spent, which the decision does by which the authority adopts it: with
// the same swap of the view its kill is in the state, and lifting that is the
// log's. Silence lifts none, a restart forgets none, and a key set that withdraws
// the key takes them all back.
type orders struct {
	held map[session.OrderID]*session.SignedOrder
	// early are frames of an earlier run, until there is a key set to judge them.
	early [][]byte
	// overlay is what those denied by inForce deny; both are of sets, until stale.
	overlay *filter.Overlay
	inForce []*session.SignedOrder
	sets    [2]*filter.Set
	stale   bool

	why    string        // the last refusal
	saidAt time.Duration // when one was logged
	dirWhy string        // why the directory cannot be read

	// Of those heard on the bus, queued wait to be taken; lost is set when one was
	// not. Both are the feed's goroutines', too.
	queued atomic.Int64
	lost   atomic.Bool

	// asked is set once the feed has been asked for what it has stored: until then
	// nobody is allowed, since an order may have been published while this
	// enforcer was away. When it does not answer, there is no waiting for it: it
	// may be older than orders are.
	asked, reading bool
	readAt         time.Duration // not before; negative is never
	wait           time.Duration // back-off
	// lostWait is how long the reading waited that was due for what was lost, last
	// at lostAt; againAt is when what is stored is read again while the state is
	// old.
	lostWait, lostAt, againAt time.Duration

	unsaved, saving, failed bool
	saveAt                  time.Duration // not before

	looking bool
	lookAt  time.Duration          // not before
	files   map[string]orderedFile // that have been looked at
}

// orderedFile is what a file was when it was looked at.
type orderedFile struct {
	size int64
	at   time.Time
}

const (
	// lookEvery is how often Options.OrdersDir is looked at.
	lookEvery = 250 * time.Millisecond
	// maxOrderFiles bounds the entries of the directory that are looked at.
	maxOrderFiles = 256
	// complainEvery spaces the log's lines about orders that are refused.
	complainEvery = 5 * time.Second
	// maxOrdersFile bounds what is kept of orders: session.MaxKeySetOrders in
	// base64.
	maxOrdersFile = 2 << 20
	// maxOrdersQueued bounds the orders heard that wait to be taken: whoever holds a
	// key's NKey can publish whatever it likes, and heartbeats wait in the same
	// queue.
	maxOrdersQueued = 64
	// The stored orders are asked for again after a failure, or a loss.
	orderWaitMin, orderWaitMax = time.Second, 30 * time.Second
)

// ordersPath is in a directory that several enforcers may share.
func ordersPath(o Options) string {
	return filepath.Join(o.StateDir, o.Enrollment.Enforcer+".orders.json")
}

type ordersJSON struct {
	Orders [][]byte `json:"orders"`
	Sum    []byte   `json:"sum"`
}

func (o *ordersJSON) sum() []byte {
	return floorSum(append([]byte("orders\x00"), bytes.Join(o.Orders, []byte("/"))...))
}

// Order takes what is heard on the bus. What is lost is read from what is stored.
func (s sink) Order(frame []byte) {
	f := s.f
	if len(frame) > session.MaxOrderLen {
		f.e.count.refused.Add(1)
		f.e.count.ordersRefused.Add(1)
		return
	}
	o := &f.orders
	if o.queued.Add(1) > maxOrdersQueued {
		f.e.count.lost.Add(1)
	} else if s.push(func() { o.queued.Add(-1); f.order(frame, "the bus") }) {
		return
	}
	o.queued.Add(-1)
	o.lost.Store(true)
}

// loadOrders reads what an earlier run has kept. Who signed it is judged anew
// under the key set. A file that is damaged is an error: an order that came as a
// file may be nowhere else.
func loadOrders(o Options, s *orders) error {
	s.held, s.files = map[session.OrderID]*session.SignedOrder{}, map[string]orderedFile{}
	s.readAt, s.saidAt, s.lostAt = -1, never, never
	if o.OrdersDir != "" {
		info, err := os.Stat(o.OrdersDir)
		if err == nil && !info.IsDir() {
			err = errors.New("it is no directory")
		}
		if err != nil {
			return fmt.Errorf("%w: OrdersDir: %w", session.ErrInvalid, err)
		}
	}
	if o.StateDir == "" {
		return nil
	}
	path := ordersPath(o)
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("%w: %w", ErrFloor, err)
	}
	b, err := io.ReadAll(io.LimitReader(f, maxOrdersFile))
	var in ordersJSON
	if err = errors.Join(err, f.Close()); err == nil {
		err = json.Unmarshal(b, &in)
	}
	if err == nil && !bytes.Equal(in.Sum, in.sum()) {
		err = errors.New("the checksum does not match")
	}
	if err != nil {
		return fmt.Errorf("%w: %s is damaged (%w), so which emergency orders are in force is not known: restore the file, or remove it and give the orders again",
			ErrFloor, path, err)
	}
	s.early = in.Orders
	return nil
}

// under returns what the orders deny beside the given sets, and which these are.
func (s *orders) under(set, inherited *filter.Set) (*filter.Overlay, []*session.SignedOrder) {
	if len(s.held) == 0 && len(s.inForce) == 0 {
		return nil, nil
	}
	if sets := [2]*filter.Set{set, inherited}; s.stale || s.sets != sets {
		s.sets, s.stale, s.overlay, s.inForce = sets, false, nil, nil
		for _, o := range s.held {
			if !spent(set, o.ID) && !spent(inherited, o.ID) {
				s.inForce = append(s.inForce, o)
			}
		}
		slices.SortFunc(s.inForce, func(a, b *session.SignedOrder) int {
			return cmp.Or(bytes.Compare(a.ID.Key[:], b.ID.Key[:]), cmp.Compare(a.Number, b.Number))
		})
		for _, o := range s.inForce {
			s.overlay = s.overlay.Apply(&session.Batch{Time: o.Time, Entries: []session.Entry{o.Entry()}}, nil)
		}
	}
	return s.overlay, s.inForce
}

// spent reports whether a state says that the order has been adopted. One that
// cannot be read says nothing.
func spent(set *filter.Set, id session.OrderID) bool {
	records, err := set.Find(id.Spent())
	return err == nil && len(records) > 0
}

// order takes an order from wherever it came. Without a key set it is nobody's;
// whoever gives it looks again when there is one.
func (f *follower) order(b []byte, from string) {
	if f.trust.KeySet() == nil {
		return
	}
	s, err := session.ParseOrder(b)
	if err == nil {
		have := f.orders.held[s.ID]
		if have != nil && have.Hash == s.Hash {
			return // it comes by every way there is, and with each reading again
		}
		if err = f.trust.Order(s); err == nil && have != nil {
			err = fmt.Errorf("%w: order %s was given before, with other content", session.ErrUntrusted, s.ID)
		}
	}
	if err != nil {
		f.refuseOrder(from, err)
		return
	}
	// It is held for long, and b may be part of something large.
	if s, err = session.ParseOrder(bytes.Clone(b)); err != nil {
		return // it has just been parsed
	}
	f.orders.held[s.ID] = s
	f.orders.stale, f.orders.unsaved, f.orders.saveAt = true, true, 0
	f.receipts.dirty = true
	v := f.publish()
	if !slices.Contains(v.ordered, s) {
		return // the log has it
	}
	cut := f.cutBy(v, &session.Batch{Entries: []session.Entry{s.Entry()}})
	f.e.opts.Logger.Warn("an emergency order is in force", "from", from, "order", s.ID, "kills", s.Target(), "incident", s.Incident, "signed", s.Time, "cut", cut)
}

// refuseOrder counts an order that is not believed, and says so now and then.
func (f *follower) refuseOrder(from string, err error) {
	f.e.count.refused.Add(1)
	f.e.count.ordersRefused.Add(1)
	f.orders.why = "order from " + from + ": " + err.Error()
	// By time alone: what the text is, the sender decides.
	if now := f.now(); now-f.orders.saidAt >= complainEvery {
		f.orders.saidAt = now
		f.e.opts.Logger.Error("an emergency order is refused", "from", from, "error", err)
	}
	f.publish()
}

// retrustOrders judges the orders anew under a key set that has just been taken.
func (f *follower) retrustOrders() {
	for id, s := range f.orders.held {
		if err := f.trust.Order(s); err != nil {
			delete(f.orders.held, id)
			f.orders.stale, f.orders.unsaved = true, true
			f.e.opts.Logger.Warn("an emergency order is lifted by the root", "order", id, "why", err)
		}
	}
	early := f.orders.early
	f.orders.early = nil
	for _, b := range early {
		f.order(b, "an earlier run")
	}
	// What was refused may be good now.
	clear(f.orders.files)
	f.orders.lookAt, f.orders.readAt = 0, f.now()
}

// readOrders has the stored orders read when that is due.
func (f *follower) readOrders(ctx context.Context) {
	o, now := &f.orders, f.now()
	if o.reading || f.trust.KeySet() == nil {
		return
	}
	switch {
	case o.readAt >= 0:
	case o.lost.Load():
		if now-o.lostAt > 2*orderWaitMax {
			o.lostWait = 0
		}
		o.lostWait = min(max(2*o.lostWait, orderWaitMin), orderWaitMax)
		o.lostAt, o.readAt = now, now+jitter(o.lostWait)
	case now >= o.againAt && now-f.origin > f.e.opts.MaxStale:
		// Perhaps no authority adopts what this enforcer did not hear.
		o.readAt = now
	}
	if o.readAt < 0 || now < o.readAt {
		return
	}
	feed, ok := f.e.feed.(OrderFeed)
	o.lost.Store(false)
	o.againAt = now + jitter(orderWaitMax)
	if o.readAt = -1; !ok {
		o.asked = true
		f.publish()
		return
	}
	o.reading = true
	f.job(ctx, jobLimit, func(jctx context.Context) func() {
		// What is read waits here, as what is heard does.
		room := make(chan struct{}, maxOrdersQueued)
		err := feed.Orders(jctx, func(frame []byte) error {
			select {
			case room <- struct{}{}:
			case <-jctx.Done():
				return jctx.Err()
			}
			if !f.post(jctx, func() { <-room; f.order(frame, "the bus") }) {
				return jctx.Err()
			}
			return nil
		})
		return func() {
			o.reading = false
			if o.wait = min(max(2*o.wait, orderWaitMin), orderWaitMax); err == nil {
				o.wait = 0
			} else if o.readAt < 0 {
				o.readAt = f.now() + jitter(o.wait)
			}
			if !o.asked {
				if o.asked = true; err != nil {
					f.e.opts.Logger.Warn("the emergency orders on the bus cannot be read: going on without those that are not known here", "error", err)
				}
				f.publish()
				f.nowReady()
			}
		}
	})
}

// tendOrders has the orders kept and the directory looked at when that is due.
func (f *follower) tendOrders(ctx context.Context) {
	f.saveOrders(ctx)
	o, now := &f.orders, f.now()
	dir := f.e.opts.OrdersDir
	if dir == "" || o.looking || now < o.lookAt {
		return
	}
	o.looking, o.lookAt = true, now+lookEvery
	f.jobs.Go(func() {
		found, err := lookForOrders(dir)
		f.post(ctx, func() {
			o.looking = false
			f.foundOrders(found, err)
		})
	})
}

// foundOrder is a file of the directory; read has its bytes.
type foundOrder struct {
	name string
	is   orderedFile
	err  error
	read []byte
}

// lookForOrders reads the directory. Names that begin with a dot are passed over:
// they are what is still being written. Symbolic links are followed, since
// mounted configurations are made of them.
func lookForOrders(dir string) ([]foundOrder, error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	entries, err := d.ReadDir(maxOrderFiles + 1)
	if errors.Is(err, io.EOF) {
		err = nil
	}
	if err = errors.Join(err, d.Close()); err == nil && len(entries) > maxOrderFiles {
		entries, err = entries[:maxOrderFiles], fmt.Errorf("more than %d files: the others are not read", maxOrderFiles)
	}
	var out []foundOrder
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), ".") {
			continue
		}
		x := foundOrder{name: e.Name()}
		if x.is, x.read, x.err = readOrder(filepath.Join(dir, e.Name())); x.err != nil || x.read != nil {
			out = append(out, x)
		}
	}
	return out, err
}

// readOrder reads a file if it can be an order; what is a directory is nothing.
func readOrder(path string) (orderedFile, []byte, error) {
	// What is no regular file must not hold the reading up.
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return orderedFile{}, nil, err
	}
	defer func() { _ = f.Close() }() // it was only read
	info, err := f.Stat()
	if err != nil || info.IsDir() {
		return orderedFile{}, nil, err
	}
	is := orderedFile{info.Size(), info.ModTime()}
	switch {
	case !info.Mode().IsRegular():
		return is, nil, errors.New("it is not a regular file")
	case info.Size() > session.MaxOrderLen:
		return is, nil, fmt.Errorf("%d bytes are no order", info.Size())
	}
	b, err := io.ReadAll(io.LimitReader(f, session.MaxOrderLen+1))
	return is, b, err
}

// foundOrders takes what the directory holds. A file is looked at again when it
// has changed; one that is gone leaves its order in force.
func (f *follower) foundOrders(found []foundOrder, err error) {
	o := &f.orders
	if err == nil {
		o.dirWhy = ""
	} else if why := "orders directory: " + err.Error(); o.dirWhy != why {
		o.why, o.dirWhy = why, why
		f.e.opts.Logger.Error("the directory of emergency orders cannot be read", "error", err)
		f.publish()
	}
	seen := make(map[string]orderedFile, len(found))
	for _, x := range found {
		if have, ok := o.files[x.name]; ok && have == x.is {
			seen[x.name] = x.is
			continue
		}
		seen[x.name] = x.is
		if x.err != nil {
			f.refuseOrder("file "+x.name, x.err)
		} else {
			f.order(x.read, "file "+x.name)
		}
	}
	if err == nil || len(found) > 0 {
		o.files = seen
	}
}

// ordersNow is what is to be kept.
func (f *follower) ordersNow() ([]byte, error) {
	var out ordersJSON
	for _, s := range f.orders.held {
		out.Orders = append(out.Orders, s.Frame)
	}
	slices.SortFunc(out.Orders, bytes.Compare)
	out.Sum = out.sum()
	return json.Marshal(out)
}

// saveOrders keeps the orders, beside run: they are in force already.
func (f *follower) saveOrders(ctx context.Context) {
	o, now := &f.orders, f.now()
	if f.e.opts.StateDir == "" || !o.unsaved || o.saving || now < o.saveAt {
		return
	}
	b, err := f.ordersNow()
	if err != nil {
		return // byte strings
	}
	o.saving, o.unsaved = true, false
	f.job(ctx, jobLimit, func(context.Context) func() {
		err := replaceFile(f.e.opts.StateDir, ordersPath(f.e.opts), b)
		return func() { o.saving = false; f.savedOrders(err) }
	})
}

func (f *follower) saveLastOrders() {
	if f.e.opts.StateDir == "" || !f.orders.unsaved || len(f.orders.early) > 0 {
		return
	}
	if b, err := f.ordersNow(); err == nil {
		f.savedOrders(replaceFile(f.e.opts.StateDir, ordersPath(f.e.opts), b))
	}
}

func (f *follower) savedOrders(err error) {
	o := &f.orders
	if err == nil {
		o.failed = false
		return
	}
	if !o.failed {
		f.e.opts.Logger.Error("cannot keep the emergency orders: a restart would forget those that came as files which are gone", "error", err)
	}
	o.failed, o.unsaved, o.saveAt = true, true, f.now()+sealAgain
}

// OrderStatus is an emergency order in force.
type OrderStatus struct {
	Key    string `json:"key"`
	Number uint16 `json:"number"`
	// Kills is "global", or "tenant" and its name or number.
	Kills    string    `json:"kills"`
	Incident string    `json:"incident"`
	Signed   time.Time `json:"signed"`
}

// statusOf names the orders in force.
func (e *Enforcer) statusOf(all []*session.SignedOrder) []OrderStatus {
	var out []OrderStatus
	ks := e.KeySet()
	for _, s := range all {
		o := OrderStatus{Key: s.ID.Key.String(), Number: s.Number, Kills: "global", Incident: s.Incident, Signed: s.Time.Time()}
		if s.Tenant != 0 {
			name := ""
			if ks != nil {
				name = ks.TenantName(s.Tenant)
			}
			o.Kills = "tenant " + cmp.Or(name, fmt.Sprint(uint32(s.Tenant)))
		}
		out = append(out, o)
	}
	return out
}
