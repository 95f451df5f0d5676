package trail

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"math"
	mrand "math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/interlock-fabric/interlock/pkg/session"
)

// Defaults of Options.
const (
	DefaultInterval   = 10 * time.Second
	DefaultSightEvery = time.Minute
	DefaultMaxSamples = 1024
	DefaultMaxDenials = 1024
	DefaultMaxCallers = 2048
)

const (
	// tick is how often the recorder looks at what waits; it sends at most one
	// report at each.
	tick = 250 * time.Millisecond
	// soon is how many items make a report that does not wait for Interval.
	soon = 64
	// publishTimeout bounds one attempt, and closeTimeout the attempts of Close.
	publishTimeout = 2 * time.Second
	closeTimeout   = 2 * time.Second
	maxItems       = 1 << 20
)

// Publisher carries reports to the bus; natsfeed.Feed does.
type Publisher interface {
	// Report publishes a frame and returns once the bus has taken it, or with an
	// error, upon which the same frame is published again later.
	Report(ctx context.Context, frame []byte) error
}

// Enforcer is what the recorder asks of an enforcer; enforce.Enforcer has it.
type Enforcer interface {
	// KeySet returns the newest key set, nil while there is none. It must not be
	// changed.
	KeySet() *session.KeySet
	// Position returns the newest batch in force. It takes no lock.
	Position() (epoch, number uint64)
}

// Options configures a Recorder. Enrollment, Enforcer and Publisher are
// required.
type Options struct {
	Enrollment *session.Enrollment
	Enforcer   Enforcer
	Publisher  Publisher
	// Sample is the share of allowed calls that are recorded, from 0 to 1. Of
	// which calls that is, nothing in the call decides.
	Sample float64
	// Interval is how long what waits is collected; zero is DefaultInterval. The
	// first after a quiet time, and a full report, goes at once.
	Interval time.Duration
	// SightEvery is how often callers are reported that were seen since the last
	// time; zero is DefaultSightEvery, negative tracks none.
	SightEvery time.Duration
	// MaxSamples, MaxDenials and MaxCallers bound what is kept: samples that
	// wait, distinct denials, and callers. Zero is the default. Each takes at
	// most session.MaxReportItemLen bytes, and typically some 600.
	MaxSamples, MaxDenials, MaxCallers int
	// Logger hears when reports cannot be sent, and when they can again. Nil is
	// silent.
	Logger *slog.Logger
}

// Recorder records decisions. It is made by New and is safe for concurrent use.
// A nil Recorder records nothing.
type Recorder struct {
	opts      Options
	threshold uint64 // a random number below it is sampled
	always    bool
	seed      hashSeed

	totals  totals
	samples ring
	denials denials
	callers callers

	cancel context.CancelFunc
	done   sync.WaitGroup
	once   sync.Once
	out    outbox
}

type totals struct {
	calls, denied, sampled, dropped, folded, untracked atomic.Uint64
	reports, failures                                  atomic.Uint64
}

// New starts a recorder. Errors wrap session.ErrInvalid.
func New(o Options) (*Recorder, error) {
	bad := func(format string, a ...any) (*Recorder, error) {
		return nil, fmt.Errorf("%w: trail: %s", session.ErrInvalid, fmt.Sprintf(format, a...))
	}
	switch {
	case o.Enrollment == nil || !session.ValidEnforcerName(o.Enrollment.Enforcer) || len(o.Enrollment.ReceiptKey) != ed25519.PrivateKeySize:
		return bad("no enrolment, or one without name or receipt key")
	case o.Enforcer == nil || o.Publisher == nil:
		return bad("no enforcer, or nowhere to publish")
	case !(o.Sample >= 0 && o.Sample <= 1):
		return bad("a share of %v", o.Sample)
	case o.Interval < 0:
		return bad("a negative interval")
	}
	for _, n := range []struct {
		have *int
		def  int
	}{{&o.MaxSamples, DefaultMaxSamples}, {&o.MaxDenials, DefaultMaxDenials}, {&o.MaxCallers, DefaultMaxCallers}} {
		if *n.have == 0 {
			*n.have = n.def
		}
		if *n.have < 0 || *n.have > maxItems {
			return bad("a bound of %d items", *n.have)
		}
	}
	if o.Interval == 0 {
		o.Interval = DefaultInterval
	}
	if o.SightEvery == 0 {
		o.SightEvery = DefaultSightEvery
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	r := &Recorder{opts: o, always: o.Sample == 1, threshold: uint64(o.Sample * math.MaxUint64), seed: newSeed()}
	if r.always {
		r.threshold = math.MaxUint64 // the conversion of 1 is out of range
	}
	r.samples.slots = make([]atomic.Pointer[sample], o.MaxSamples)
	r.denials.init(o.MaxDenials)
	if o.SightEvery > 0 {
		r.callers.init(o.MaxCallers)
	}
	_, _ = rand.Read(r.out.boot[:])
	ctx, cancel := context.WithCancel(context.Background()) //nolint:gosec // Close calls it
	r.cancel = cancel
	r.done.Go(func() { r.run(ctx) })
	return r, nil
}

// Close sends what waits, for at most 2 s, and joins the recorder's goroutine.
// What could not be sent is lost, and said in the log. What is recorded after
// Close is lost, too. It is idempotent.
func (r *Recorder) Close() error {
	if r == nil || r.cancel == nil {
		return nil
	}
	r.once.Do(r.cancel)
	r.done.Wait()
	return nil
}

// Mark is the moment at which a decision began, and how far the enforcer was.
type Mark struct {
	at            time.Time
	epoch, number uint64
}

// Start marks the beginning of a decision: call it before Check or Bind, so that
// what the record says was in force was so when the call was decided.
func (r *Recorder) Start() Mark {
	if r == nil || r.cancel == nil {
		return Mark{}
	}
	epoch, number := r.opts.Enforcer.Position()
	return Mark{time.Now(), epoch, number}
}

// Took returns how long it is since the mark; zero for a zero Mark.
func (m Mark) Took() time.Duration {
	if m.at.IsZero() {
		return 0
	}
	return time.Since(m.at)
}

// Event is one decision. Nothing of it is kept but what a record has.
type Event struct {
	// Mark is of Start; zero leaves latency and position unknown.
	Mark Mark
	// Caller is who called; nil when nobody was identified.
	Caller *session.Prepared
	// Method is the protocol's operation, as in "tools/call", and Call what was
	// checked.
	Method string
	Call   session.Call
	// Arguments are the call's, as they came. Only their keyed digest is
	// recorded, and none when they are nil.
	Arguments []byte
	// Digest is their ArgumentDigest by Caller, for an event after which they
	// are not in memory any more: it counts where Arguments is nil.
	Digest session.Hash
	// Traceparent is the request's header of that name (W3C Trace Context). What
	// is malformed is ignored.
	Traceparent string
	// Err is what the enforcer said; nil allowed the call.
	Err error
	// Took is how long the decision took; zero is from Mark until now.
	Took time.Duration
	// Cut says that the call was running when Err ended it.
	Cut bool
}

// Record takes note of a decision. It never blocks; see the package on what it
// costs.
func (r *Recorder) Record(e *Event) {
	if r == nil || r.cancel == nil {
		return
	}
	var who identity
	if e.Caller.Valid() {
		who = r.seed.identity(e.Caller)
		r.callers.touch(r, who, e)
	}
	if !e.Cut {
		r.totals.calls.Add(1) // a call that is cut was counted when it was allowed
	}
	if e.Err != nil {
		r.totals.denied.Add(1)
		r.denials.add(r, who, e)
		return
	}
	if !r.always && mrand.Uint64() >= r.threshold { //nolint:gosec // a share is no secret
		return
	}
	r.totals.sampled.Add(1)
	s := &sample{}
	r.fill(&s.TrailRecord, e)
	if r.samples.push(s) {
		r.totals.dropped.Add(1)
	}
}

// Stats are totals since New.
type Stats struct {
	session.TrailTotals
	// Reports counts those that the bus took, and Failures the attempts that
	// came to nothing; what they carried is sent again.
	Reports, Failures uint64
	// Denials and Samples are how many distinct ones are held now.
	Denials, Samples int
}

// Stats returns the totals; zero for a nil Recorder.
func (r *Recorder) Stats() Stats {
	if r == nil || r.cancel == nil {
		return Stats{}
	}
	return Stats{
		TrailTotals: r.totals.snapshot(), Reports: r.totals.reports.Load(), Failures: r.totals.failures.Load(),
		Denials: r.denials.len(), Samples: r.samples.len(),
	}
}

func (t *totals) snapshot() session.TrailTotals {
	return session.TrailTotals{
		Calls: t.calls.Load(), Denied: t.denied.Load(), Sampled: t.sampled.Load(),
		Dropped: t.dropped.Load(), Folded: t.folded.Load(), Untracked: t.untracked.Load(),
	}
}

// fill makes the record of an event.
func (r *Recorder) fill(t *session.TrailRecord, e *Event) {
	now := time.Now()
	*t = session.TrailRecord{
		Decision: session.DecisionAllowed, Count: 1, First: session.InstantOf(now), Last: session.InstantOf(now),
		Epoch: e.Mark.epoch, Checked: e.Mark.number,
		Method: text(e.Method), Tool: text(e.Call.Tool), Audience: text(e.Call.Audience), Trace: session.ParseTraceparent(e.Traceparent),
	}
	t.Latency = e.took(now)
	if e.Caller.Valid() {
		id := e.Caller.Identity()
		t.Caller = callerOf(&id)
		t.Token, t.Transaction = text(id.Token), text(id.Transaction)
		if t.Arguments = e.Digest; e.Arguments != nil {
			t.Arguments = e.Caller.ArgumentDigest(e.Arguments)
		}
	}
	if e.Err == nil {
		return
	}
	t.Decision = decisionOf(e)
	t.Cause = session.CauseOf(e.Err)
	if d := deniedOf(e.Err); d != nil {
		t.Effect, t.Reason, t.Provisional = d.Effect, d.Reason, d.Provisional
		t.Sequence, t.Incident, t.Detail = d.Seq, text(d.Incident), text(d.Detail)
		if t.Cause == session.CauseOther && t.Detail == "" {
			t.Detail = text(d.Error()) // fit for the caller, so for the trail
		}
	}
}

func (e *Event) took(now time.Time) time.Duration {
	if e.Took == 0 && !e.Mark.at.IsZero() {
		return max(0, now.Sub(e.Mark.at))
	}
	return max(0, e.Took)
}

func decisionOf(e *Event) session.Decision {
	if e.Cut {
		return session.DecisionCut
	}
	return session.DecisionDenied
}

func deniedOf(err error) *session.DeniedError {
	var d *session.DeniedError
	if errors.As(err, &d) {
		return d
	}
	return nil
}
