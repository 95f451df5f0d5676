// Package report reads the enforcers' sealed reports.
//
// A Reader follows the stream by sequence, believes what the enrolled enforcer
// signed and what goes on from its last report, counts the rest, and keeps where
// the believed ones are. Their contents it opens when they are asked for, and
// keeps none. Whoever keeps them, as an audit log does, takes them from Believed.
package report

import (
	"context"
	"crypto/ecdh"
	"crypto/ed25519"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/interlock-fabric/interlock/internal/broker"
	"github.com/interlock-fabric/interlock/pkg/authority"
	"github.com/interlock-fabric/interlock/pkg/natsfeed"
	"github.com/interlock-fabric/interlock/pkg/session"
)

const (
	// pollEvery is how often the stream is looked at when nobody asks, so that
	// what is refused is noticed while it is there.
	pollEvery   = 2 * time.Second
	pollTimeout = time.Minute
	// askTimeout bounds each question to the store: the answer to one that was
	// with a server when it died never comes.
	askTimeout = 2 * time.Second
	// maxBoots is how many earlier boots of an enforcer are remembered.
	maxBoots = 64
)

// The reasons for which a report is not believed.
var (
	// ErrReport is the parent of them all.
	ErrReport = errors.New("report refused")
	// ErrNotEnrolled: no enforcer of that name was ever in.
	ErrNotEnrolled = fmt.Errorf("%w: not enrolled", ErrReport)
	// ErrForged: the signature is not the enforcer's, or it speaks in another's
	// name.
	ErrForged = fmt.Errorf("%w: forged", ErrReport)
	// ErrReplayed: it is an earlier one.
	ErrReplayed = fmt.Errorf("%w: replayed", ErrReport)
	// ErrForked: it does not go on from the one before it.
	ErrForked = fmt.Errorf("%w: forked", ErrReport)
	// errAgain: it is the last one once more, as after a lost connection.
	errAgain = fmt.Errorf("%w: heard already", ErrReport)
)

// Options configures a Reader. All but Logger, Serves and Believed are required.
type Options struct {
	JetStream jetstream.JetStream
	// ReceiptKey finds the key of an enforcer that is, or was, in the roster.
	ReceiptKey func(enforcer string) (ed25519.PublicKey, bool)
	// Sealing finds the private half of a sealing key.
	Sealing func(session.KeyID) (*ecdh.PrivateKey, bool)
	// Serves reports whether an enforcer is, or was, enrolled for a tenant; nil is
	// always. What it says of callers of other tenants is left out; see Own.
	Serves func(enforcer, tenant string) bool
	// Believed, if not nil, is called with each report that is believed, once
	// per Reader and in the order of the stream, with its frame's hash. It must not
	// call the Reader.
	Believed func(seq uint64, r *session.Report, hash session.Hash)
	Logger   *slog.Logger
}

// Reader reads reports. Its methods may be called concurrently.
type Reader struct {
	o   Options
	log *slog.Logger

	// reading is held by whoever reads the stream; next is its own. What has been
	// read is behind mu, which nobody holds while he waits for the store: status
	// must answer when the store does not.
	reading chan struct{}
	next    uint64 // stream sequence

	mu        sync.Mutex
	all       map[string]*member
	strangers uint64
}

// member is what is known of one enforcer's reports.
type member struct {
	key   ed25519.PublicKey
	boot  session.WriterID
	count uint64
	hash  session.Hash
	boots []session.WriterID // earlier ones
	at    []place            // the newest that are believed, oldest first
	stats authority.TrailEnforcer
}

// place is where a believed report is.
type place struct {
	seq  uint64
	time time.Time // when the server stored it
}

// NewReader returns a reader that has read nothing yet.
func NewReader(o Options) *Reader {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return &Reader{o: o, log: o.Logger, reading: make(chan struct{}, 1), next: 1, all: map[string]*member{}}
}

// Follow reads until ctx ends.
func (r *Reader) Follow(ctx context.Context) {
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	failing := false
	for {
		call, cancel := context.WithTimeout(ctx, pollTimeout)
		err := r.CatchUp(call)
		cancel()
		if ctx.Err() != nil {
			return
		}
		if err != nil && !failing {
			r.log.Warn("the reports cannot be read", "error", err)
		}
		failing = err != nil
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// CatchUp reads what the stream had when it was called.
func (r *Reader) CatchUp(ctx context.Context) error {
	select {
	case r.reading <- struct{}{}:
		defer func() { <-r.reading }()
	case <-ctx.Done():
		return fmt.Errorf("report: %w", ctx.Err())
	}
	s, err := r.stream(ctx)
	if err != nil {
		return err
	}
	state := s.CachedInfo().State
	if state.LastSeq+1 < r.next {
		r.next = 1 // the stream was made anew, and what is known of it is not of it
		r.mu.Lock()
		clear(r.all)
		r.mu.Unlock()
	}
	r.next = max(r.next, state.FirstSeq)
	for r.next <= state.LastSeq {
		m, err := get(ctx, s, r.next, jetstream.WithGetMsgSubject(natsfeed.ReportSubjects))
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			r.next = state.LastSeq + 1 // the rest has given way meanwhile
			break
		}
		if err != nil {
			return fmt.Errorf("report: %w", err)
		}
		r.next = m.Sequence + 1
		if err := r.take(m); err != nil && !errors.Is(err, errAgain) {
			r.log.Debug("a report was refused", "subject", m.Subject, "error", err)
		}
	}
	return nil
}

func (r *Reader) stream(ctx context.Context) (jetstream.Stream, error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	s, err := r.o.JetStream.Stream(ctx, natsfeed.ReportStream)
	if err != nil {
		return nil, fmt.Errorf("report: %w", err)
	}
	return s, nil
}

func get(ctx context.Context, s jetstream.Stream, seq uint64, opts ...jetstream.GetMsgOpt) (*jetstream.RawStreamMsg, error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	return s.GetMsg(ctx, seq, opts...)
}

// take believes a stored message, or says why not.
func (r *Reader) take(m *jetstream.RawStreamMsg) error {
	name := strings.TrimPrefix(m.Subject, natsfeed.ReportSubject(""))
	key, ok := r.o.ReceiptKey(name) // may wait
	r.mu.Lock()
	defer r.mu.Unlock()
	if !ok {
		r.strangers++
		return ErrNotEnrolled
	}
	e := r.all[name]
	if e == nil || !e.key.Equal(key) {
		e = &member{key: key, stats: authority.TrailEnforcer{Name: name}}
		r.all[name] = e
	}
	rep, hash, err := open(name, m.Data, key)
	if err == nil {
		err = e.accept(rep, hash)
	}
	switch {
	case errors.Is(err, errAgain):
		e.stats.Again++
		return err
	case err != nil:
		e.stats.Refused++
		return err
	}
	e.stats.Reports++
	if len(e.at) >= broker.MaxReports {
		e.at = slices.Delete(e.at, 0, 1)
	}
	e.at = append(e.at, place{m.Sequence, m.Time})
	if r.o.Believed != nil {
		r.o.Believed(m.Sequence, rep, hash)
	}
	return nil
}

// open verifies who sent a report.
func open(name string, frame []byte, key ed25519.PublicKey) (*session.Report, session.Hash, error) {
	fail := func(err error) (*session.Report, session.Hash, error) { return nil, session.Hash{}, err }
	if len(frame) > session.MaxReportLen {
		return fail(fmt.Errorf("%w: report of %d bytes", session.ErrMalformed, len(frame)))
	}
	f, err := session.ParseFrame(frame)
	if err != nil {
		return fail(err)
	}
	if f.Type != session.TypeReport {
		return fail(fmt.Errorf("%w: frame of another type", ErrForged))
	}
	if err := f.Verify(key); err != nil {
		return fail(fmt.Errorf("%w: %w", ErrForged, err))
	}
	rep, err := session.UnmarshalReport(f.Body)
	if err != nil {
		return fail(err)
	}
	if rep.Enforcer != name {
		return fail(fmt.Errorf("%w: it speaks for another", ErrForged))
	}
	return rep, f.Hash(), nil
}

// accept takes a verified report, if it goes on from what is there.
func (e *member) accept(rep *session.Report, hash session.Hash) error {
	known := e.count > 0
	switch {
	case known && rep.Boot == e.boot && rep.Count == e.count && hash == e.hash:
		return errAgain
	case known && rep.Boot == e.boot && rep.Count <= e.count, slices.Contains(e.boots, rep.Boot):
		return ErrReplayed
	case known && rep.Boot == e.boot && rep.Count == e.count+1 && rep.Prev != e.hash:
		return ErrForked
	case known && rep.Boot == e.boot:
		e.stats.Missing += rep.Count - e.count - 1
	case known:
		// A new boot. Of the first that is heard here the stream may have let go
		// what was before it, but of the next it has the beginning.
		e.stats.Missing += rep.Count - 1
		if len(e.boots) >= maxBoots {
			e.boots = slices.Delete(e.boots, 0, 1)
		}
		e.boots = append(e.boots, e.boot)
	}
	e.boot, e.count, e.hash = rep.Boot, rep.Count, hash
	return nil
}

// Enforcers says how whole the trail of each enforcer is, by name, and how many
// reports came in the name of nobody. It reads nothing.
func (r *Reader) Enforcers() (list []authority.TrailEnforcer, strangers uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, name := range slices.Sorted(maps.Keys(r.all)) {
		list = append(list, r.all[name].stats)
	}
	return list, r.strangers
}

// Own takes out of a report's content what an enforcer may not speak of: callers of
// tenants for which it is not enrolled. It could have prepared none of them, and
// could not be held to what it says of them by anybody there. Callers of whom no
// tenant is known stay. It returns how many records and sightings it took out.
func Own(enforcer string, c *session.TrailContent, serves func(enforcer, tenant string) bool) int {
	n := len(c.Records) + len(c.Sightings)
	foreign := func(x *session.Caller) bool { return x.Tenant != "" && !serves(enforcer, x.Tenant) }
	c.Records = slices.DeleteFunc(c.Records, func(t session.TrailRecord) bool { return foreign(&t.Caller) })
	c.Sightings = slices.DeleteFunc(c.Sightings, func(t session.Sighting) bool { return foreign(&t.Caller) })
	return n - len(c.Records) - len(c.Sightings)
}

// opened is a believed report with its content.
type opened struct {
	*session.Report
	*session.TrailContent
}

// contents calls fn with the reports of the enforcer, of all when it is empty,
// newest first, until fn is content or they are older than since. stats are of
// those that were looked at. What gave way meanwhile is passed over.
func (r *Reader) contents(ctx context.Context, enforcer string, since time.Time, fn func(opened) bool) (stats []authority.TrailEnforcer, err error) {
	if err := r.CatchUp(ctx); err != nil {
		return nil, err
	}
	type item struct {
		place
		name string
		key  ed25519.PublicKey
	}
	var items []item
	r.mu.Lock()
	found := map[string]*authority.TrailEnforcer{}
	for name, e := range r.all {
		if enforcer != "" && name != enforcer {
			continue
		}
		s := e.stats
		found[name] = &s
		for _, p := range e.at {
			if since.IsZero() || !p.time.Before(since) {
				items = append(items, item{p, name, e.key})
			}
		}
	}
	r.mu.Unlock()
	slices.SortFunc(items, func(a, b item) int { return int(b.seq) - int(a.seq) })
	s, err := r.stream(ctx)
	if err != nil {
		return nil, err
	}
	newest := map[string]bool{}
	for _, i := range items {
		m, err := get(ctx, s, i.seq)
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("report: %w", err)
		}
		// Verified again: the stream may have been made anew.
		rep, _, err := open(i.name, m.Data, i.key)
		if err != nil {
			continue
		}
		st := found[i.name]
		var content *session.TrailContent
		if key, ok := r.o.Sealing(rep.Key); ok {
			content, err = rep.Unseal(key)
		}
		if content == nil || err != nil {
			st.Unreadable++
			continue
		}
		if r.o.Serves != nil {
			st.Foreign += uint64(Own(i.name, content, r.o.Serves))
		}
		if !newest[i.name] {
			newest[i.name] = true
			t := content.Totals
			st.Calls, st.Denied, st.Sampled, st.Dropped, st.Folded, st.Untracked = t.Calls, t.Denied, t.Sampled, t.Dropped, t.Folded, t.Untracked
		}
		if !fn(opened{rep, content}) {
			break
		}
	}
	for _, name := range slices.Sorted(maps.Keys(found)) {
		stats = append(stats, *found[name])
	}
	return stats, nil
}
