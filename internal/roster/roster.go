// Package roster knows the enrolled enforcers and what they report: the
// denominator and the numerator of every coverage figure.
//
// A Roster is the list of enforcers, kept in a bucket of the store, so that
// every authority on the store has the same one. A Tracker takes the enforcers'
// receipts and answers where a decision is in force.
package roster

import (
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/nats-io/nkeys"

	"github.com/interlock-fabric/interlock/pkg/natsfeed"
	"github.com/interlock-fabric/interlock/pkg/session"
)

const (
	// MaxEnforcers bounds the roster, retired enforcers included.
	MaxEnforcers = 2000

	// The roster shares the bucket of the lease, the one bucket that authorities
	// have rights on. It stays well below that bucket's size, because the lease
	// must always find room.
	bucket   = natsfeed.LeaseBucket
	prefix   = "enforcer."
	maxBytes = 768 << 10
	maxValue = 4 << 10
	// perEntry is about what the store adds to an entry.
	perEntry = 128

	// pollEvery is how soon a change that another authority made is known here
	// at the latest; the change itself is normally heard.
	pollEvery   = 2 * time.Second
	callTimeout = 5 * time.Second
	// patience is how long a change is tried for.
	patience   = 8 * time.Second
	tryTimeout = 2 * time.Second
	retryEvery = 100 * time.Millisecond
)

var (
	// ErrExists: an enforcer of that name is enrolled.
	ErrExists = errors.New("roster: an enforcer of that name is enrolled")
	// ErrUnknown: no enforcer of that name is enrolled.
	ErrUnknown = errors.New("roster: no enforcer of that name is enrolled")
	// ErrFull: the roster holds MaxEnforcers, or as many as its room allows.
	ErrFull = errors.New("roster: full")
)

// Enforcer is one enforcer as it was enrolled. It has no secrets.
type Enforcer struct {
	// Name is its name; see session.ValidEnforcerName.
	Name string `json:"name"`
	// NKey is the public NKey by which the bus knows it.
	NKey string `json:"nkey"`
	// ReceiptKey verifies its receipts.
	ReceiptKey ed25519.PublicKey `json:"receipt_key"`
	// Tenants are those whose keys it was given.
	Tenants  []session.TenantID `json:"tenants"`
	Enrolled time.Time          `json:"enrolled"`
	// Retired is when it was taken out; zero while it is in.
	Retired time.Time `json:"retired,omitzero"`
}

func (e *Enforcer) validate() error {
	switch {
	case !session.ValidEnforcerName(e.Name):
		return fmt.Errorf("roster: %q cannot name an enforcer: want 1 to 64 of a-z, 0-9, \"-\" and \"_\"", e.Name)
	case !nkeys.IsValidPublicUserKey(e.NKey):
		return fmt.Errorf("roster: %s: malformed public NKey", e.Name)
	case len(e.ReceiptKey) != ed25519.PublicKeySize:
		return fmt.Errorf("roster: %s: malformed receipt key", e.Name)
	case len(e.Tenants) == 0 || len(e.Tenants) > session.MaxTenants:
		return fmt.Errorf("roster: %s: %d tenants", e.Name, len(e.Tenants))
	}
	return nil
}

// Options configures a Roster. NC is required.
type Options struct {
	// NC is an authority's connection to the bus. The caller closes it after
	// the Roster.
	NC *nats.Conn
	// OnChange is called with the enforcers that are in, by name, before Open
	// returns and after each change, one call at a time. When it fails, it is
	// called again within seconds, and Enroll or Retire returns its error.
	OnChange func([]Enforcer) error
	// Logger hears of a bucket that cannot be read; nil is silent.
	Logger *slog.Logger
}

// Roster is the list of enforcers. Its methods may be called concurrently.
type Roster struct {
	opts Options
	js   jetstream.JetStream
	kv   jetstream.KeyValue
	log  *slog.Logger
	list atomic.Pointer[[]Enforcer]
	// all has the retired ones too. It is replaced as a whole, and never changed.
	all    atomic.Pointer[map[string]stored]
	cancel context.CancelFunc
	done   sync.WaitGroup
	nudge  chan struct{}
	sub    *nats.Subscription

	// loading has one element while the store is asked and OnChange told, and
	// guards what follows.
	loading chan struct{}
	seq     uint64
	told    bool // false while OnChange owes a call
}

type stored struct {
	Enforcer
	revision uint64
	size     int
}

const subjects = "$KV." + bucket + "." + prefix + ">"

// Open returns when the roster is loaded. The bucket must exist (see
// broker.EnsureStreams). ctx bounds the opening alone.
func Open(ctx context.Context, o Options) (*Roster, error) {
	if o.NC == nil {
		return nil, errors.New("roster: no connection")
	}
	js, err := jetstream.New(o.NC)
	if err != nil {
		return nil, fmt.Errorf("roster: %w", err)
	}
	r := &Roster{opts: o, js: js, log: o.Logger, nudge: make(chan struct{}, 1), loading: make(chan struct{}, 1)}
	if r.log == nil {
		r.log = slog.New(slog.DiscardHandler)
	}
	if r.kv, err = js.KeyValue(ctx, bucket); err != nil {
		return nil, fmt.Errorf("roster: bucket: %w", err)
	}
	// Listening comes before loading, so that nothing falls between.
	if r.sub, err = o.NC.Subscribe(subjects, func(*nats.Msg) { r.hint() }); err != nil {
		return nil, fmt.Errorf("roster: %w", err)
	}
	if err := r.load(ctx, true); err != nil {
		_ = r.sub.Unsubscribe() // the connection may be what failed
		return nil, err
	}
	run, cancel := context.WithCancel(context.Background())
	r.cancel = cancel
	r.done.Go(func() { r.follow(run) })
	return r, nil
}

// Close stops following the store. It is idempotent.
func (r *Roster) Close() error {
	r.cancel()
	r.done.Wait()
	_ = r.sub.Unsubscribe() // fails only when the connection is gone already
	return nil
}

// Enforcers returns those that are in, by name. The slice must not be changed.
func (r *Roster) Enforcers() []Enforcer { return *r.list.Load() }

// Find returns the enforcer of that name that is in, or else the one that was
// last. It waits for nothing.
func (r *Roster) Find(name string) (Enforcer, bool) {
	e, ok := (*r.all.Load())[name]
	return e.Enforcer, ok
}

// Enroll enters an enforcer and returns when the store has it and OnChange has
// been told. A name whose bearer was retired can be used again. Errors wrap
// ErrExists or ErrFull where those are the reason.
func (r *Roster) Enroll(ctx context.Context, e Enforcer) error {
	if err := e.validate(); err != nil {
		return err
	}
	e.Retired = time.Time{}
	value, err := json.Marshal(e)
	if err != nil {
		return fmt.Errorf("roster: %w", err)
	}
	if err := r.reload(ctx, false); err != nil {
		return err
	}
	all := *r.all.Load()
	have, known := all[e.Name]
	n, room := len(all), maxBytes
	for _, e := range all {
		room -= e.size + perEntry
	}
	put := func(ctx context.Context) error {
		_, err := r.kv.Create(ctx, prefix+e.Name, value)
		return err
	}
	switch {
	case len(value) > maxValue:
		return fmt.Errorf("%w: %s has too many tenants for one entry", ErrFull, e.Name)
	case known && have.Retired.IsZero():
		return fmt.Errorf("%w: %s", ErrExists, e.Name)
	case known:
		// The revision keeps two authorities from enrolling one name twice.
		put = func(ctx context.Context) error {
			_, err := r.kv.Update(ctx, prefix+e.Name, value, have.revision)
			return err
		}
	case n >= MaxEnforcers || room < len(value)+perEntry:
		return fmt.Errorf("%w: %d enforcers", ErrFull, n)
	}
	err = r.write(ctx, put, func(all map[string]stored) bool { return all[e.Name].NKey == e.NKey })
	if conflict(err) {
		return fmt.Errorf("%w: %s", ErrExists, e.Name)
	}
	if err != nil {
		return fmt.Errorf("roster: enroll %s: %w", e.Name, err)
	}
	return r.reload(ctx, true)
}

// Retire takes an enforcer out and returns when the store has it so and OnChange
// has been told. The error wraps ErrUnknown when there is none of that name.
func (r *Roster) Retire(ctx context.Context, name string, at time.Time) error {
	if err := r.reload(ctx, false); err != nil {
		return err
	}
	have, known := (*r.all.Load())[name]
	if !known || !have.Retired.IsZero() {
		return fmt.Errorf("%w: %s", ErrUnknown, name)
	}
	have.Retired = at
	value, err := json.Marshal(have.Enforcer)
	if err != nil {
		return fmt.Errorf("roster: %w", err)
	}
	err = r.write(ctx, func(ctx context.Context) error {
		_, err := r.kv.Update(ctx, prefix+name, value, have.revision)
		return err
	}, func(all map[string]stored) bool { return all[name].NKey == have.NKey && !all[name].Retired.IsZero() })
	if conflict(err) {
		return fmt.Errorf("%w: %s was changed meanwhile", ErrUnknown, name)
	}
	if err != nil {
		return fmt.Errorf("roster: retire %s: %w", name, err)
	}
	return r.reload(ctx, true)
}

// again calls f until it succeeds, fails with a conflict, or patience or ctx
// ends. A bus that reloads its accounts, or elects a leader, refuses for a
// moment what it takes in the next.
func again(ctx context.Context, f func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		try, end := context.WithTimeout(ctx, tryTimeout)
		err := f(try)
		end()
		if err == nil || conflict(err) {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(retryEvery):
		}
	}
}

func (r *Roster) reload(ctx context.Context, force bool) error {
	return again(ctx, func(ctx context.Context) error { return r.load(ctx, force) })
}

// write puts an entry. One whose answer was lost is found to conflict with
// itself: done tells that from another's.
func (r *Roster) write(ctx context.Context, put func(context.Context) error, done func(all map[string]stored) bool) error {
	err := again(ctx, put)
	if !conflict(err) {
		return err
	}
	if err := r.reload(ctx, true); err != nil {
		return err
	}
	if done(*r.all.Load()) {
		return nil
	}
	return err
}

func conflict(err error) bool {
	var api *jetstream.APIError
	return errors.Is(err, jetstream.ErrKeyExists) ||
		errors.As(err, &api) && (api.ErrorCode == jetstream.JSErrCodeStreamWrongLastSequence ||
			api.ErrorCode == jetstream.JSErrCodeStreamWrongLastSequenceConstant)
}

func (r *Roster) hint() {
	select {
	case r.nudge <- struct{}{}:
	default:
	}
}

// follow keeps up with the store. A watch may fall silent for good over a
// server's restart; asking for the last entry does not.
func (r *Roster) follow(ctx context.Context) {
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	failing := false
	for {
		select {
		case <-ctx.Done():
			return
		case <-r.nudge:
		case <-tick.C:
		}
		call, cancel := context.WithTimeout(ctx, callTimeout)
		err := r.load(call, false)
		cancel()
		if ctx.Err() != nil {
			return
		}
		if err != nil && !failing {
			r.log.Warn("the roster cannot be read; the one last read stands", "error", err)
		}
		failing = err != nil
	}
}

// load reads the bucket if it has changed, or always when force is set, and
// tells OnChange if that made a difference or is owed.
func (r *Roster) load(ctx context.Context, force bool) error {
	select {
	case r.loading <- struct{}{}:
		defer func() { <-r.loading }()
	case <-ctx.Done():
		return fmt.Errorf("roster: %w", ctx.Err())
	}
	last, err := r.lastSeq(ctx)
	if err != nil {
		return err
	}
	if !force && r.all.Load() != nil && last == r.seq && r.told {
		return nil
	}
	all, err := r.read(ctx)
	if err != nil {
		return err
	}
	in := make([]Enforcer, 0, len(all))
	for _, e := range all {
		if e.Retired.IsZero() {
			in = append(in, e.Enforcer)
		}
	}
	slices.SortFunc(in, func(a, b Enforcer) int { return strings.Compare(a.Name, b.Name) })
	r.seq = last
	r.all.Store(&all)
	r.list.Store(&in)
	r.told = false
	if r.opts.OnChange != nil {
		if err := r.opts.OnChange(in); err != nil {
			return fmt.Errorf("roster: %w", err)
		}
	}
	r.told = true
	return nil
}

// lastSeq returns where the newest entry is; 0 when there is none.
func (r *Roster) lastSeq(ctx context.Context) (uint64, error) {
	s, err := r.js.Stream(ctx, "KV_"+bucket)
	if err != nil {
		return 0, fmt.Errorf("roster: %w", err)
	}
	m, err := s.GetLastMsgForSubject(ctx, subjects)
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("roster: %w", err)
	}
	return m.Sequence, nil
}

func (r *Roster) read(ctx context.Context) (map[string]stored, error) {
	w, err := r.kv.Watch(ctx, prefix+">")
	if err != nil {
		return nil, fmt.Errorf("roster: %w", err)
	}
	defer func() { _ = w.Stop() }() // the consumer ends by itself when this fails
	all := map[string]stored{}
	for {
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("roster: %w", ctx.Err())
		case v, ok := <-w.Updates():
			if !ok {
				return nil, errors.New("roster: the bucket's reader was cut off")
			}
			if v == nil {
				return all, nil
			}
			name := strings.TrimPrefix(v.Key(), prefix)
			if v.Operation() != jetstream.KeyValuePut {
				delete(all, name)
				continue
			}
			e := stored{revision: v.Revision(), size: len(v.Value())}
			if err := json.Unmarshal(v.Value(), &e.Enforcer); err != nil {
				return nil, fmt.Errorf("roster: entry %s: %w", v.Key(), err)
			}
			if err := e.validate(); err != nil {
				return nil, fmt.Errorf("roster: entry %s: %w", v.Key(), err)
			}
			if e.Name != name {
				return nil, fmt.Errorf("roster: entry %s is another's", v.Key())
			}
			all[e.Name] = e
		}
	}
}
