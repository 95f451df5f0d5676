package roster

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/interlock-fabric/interlock/pkg/authority"
	"github.com/interlock-fabric/interlock/pkg/natsfeed"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// Bounds of what one enforcer can make the authority do and keep. An enforcer
// sends two receipts a second, and one more at once when something is applied.
const (
	receiptRate  = 8
	receiptBurst = 24
	// maxTimed is how many batches' times are kept per enforcer.
	maxTimed = 1024
	// maxBoots is how many earlier boots are remembered per enforcer.
	maxBoots = 64
	// expectFor is how long an enforcer is expected to send its first receipt after
	// it asked for the writer's clock. It does that as it starts, and allows nothing
	// before it is answered; the receipt follows within a second.
	expectFor = 10 * time.Second
	// recheck is how often a wait looks again without a receipt: the log may
	// only now have come to know the head that a receipt named.
	recheck = 100 * time.Millisecond
)

// The reasons for which a receipt is not believed.
var (
	// ErrReceipt is the parent of them all.
	ErrReceipt = errors.New("receipt refused")
	// ErrNotEnrolled: no enforcer of that name is in.
	ErrNotEnrolled = fmt.Errorf("%w: not enrolled", ErrReceipt)
	// ErrForged: the signature is not the enrolled enforcer's, or it speaks in
	// another's name.
	ErrForged = fmt.Errorf("%w: forged", ErrReceipt)
	// ErrReplayed: it is an earlier one.
	ErrReplayed = fmt.Errorf("%w: replayed", ErrReceipt)
	// ErrFlood: the enforcer sends more than it may.
	ErrFlood = fmt.Errorf("%w: too many", ErrReceipt)
)

// Log is what a Tracker needs to know of the log.
type Log interface {
	// HashAt returns the hash of a batch, and false while it is not known to be
	// in the log.
	HashAt(epoch, number uint64) (session.Hash, bool)
	// TimeAt returns the authority's time of a batch, and false when it is not
	// known any more.
	TimeAt(epoch, number uint64) (time.Time, bool)
}

// Tracker takes receipts and answers where a decision is in force. Its methods
// may be called concurrently. It starts no goroutine.
type Tracker struct {
	log Log
	now func() time.Time

	mu      sync.Mutex
	members map[string]*member
	names   []string
	// changed is closed, and made anew, when there may be something new to a
	// wait.
	changed  chan struct{}
	strange  uint64
	canaries canaries
	onAccept func(*session.Receipt)
}

type member struct {
	Enforcer
	limit   *rate.Limiter
	last    *session.Receipt
	heard   time.Time // by the local clock, monotonic
	boots   []session.WriterID
	refused uint64
	timed   map[uint64]session.Applied // of epoch
	order   []uint64
	epoch   uint64
	since   time.Time // when its boot was first heard of
	asked   time.Time // when it last asked for the writer's clock, by the local clock
	canary  memberCanary
}

// NewTracker returns a tracker of nobody; SetEnforcers names whom to track.
// accepted, if not nil, is called with each receipt that is believed, outside
// any lock.
func NewTracker(log Log, accepted func(*session.Receipt)) *Tracker {
	return &Tracker{log: log, now: time.Now, members: map[string]*member{}, changed: make(chan struct{}), onAccept: accepted}
}

// SetEnforcers replaces the list of enforcers. What is known of those that stay
// is kept; an enforcer that was enrolled anew starts afresh.
func (t *Tracker) SetEnforcers(list []Enforcer) {
	t.mu.Lock()
	defer t.mu.Unlock()
	next := make(map[string]*member, len(list))
	t.names = t.names[:0]
	for _, e := range list {
		m := t.members[e.Name]
		if m == nil || !m.ReceiptKey.Equal(e.ReceiptKey) {
			m = &member{limit: rate.NewLimiter(receiptRate, receiptBurst), timed: map[uint64]session.Applied{}}
		}
		m.Enforcer = e
		next[e.Name] = m
		t.names = append(t.names, e.Name)
	}
	slices.Sort(t.names)
	t.members = next
	t.wake()
}

// wake is called with mu held.
func (t *Tracker) wake() {
	close(t.changed)
	t.changed = make(chan struct{})
}

// Receive takes what was heard on a receipt subject. An error, which wraps
// ErrReceipt or session.ErrFrame, says why it is not believed; it is counted
// against the name, so that a caller need do no more about it.
func (t *Tracker) Receive(subject string, frame []byte) error {
	return t.receive(subject, frame, t.now(), true)
}

// Recall takes a receipt that was heard at an earlier time and stored, as at
// the start of an authority. It is believed on the same terms.
func (t *Tracker) Recall(subject string, frame []byte, heard time.Time) error {
	return t.receive(subject, frame, heard, false)
}

func (t *Tracker) receive(subject string, frame []byte, heard time.Time, limited bool) error {
	name, _ := strings.CutPrefix(subject, natsfeed.ReceiptSubject(""))
	t.mu.Lock()
	m := t.members[name]
	if m == nil {
		t.strange++
		t.mu.Unlock()
		return ErrNotEnrolled
	}
	if limited && !m.limit.AllowN(heard, 1) {
		m.refused++
		t.mu.Unlock()
		return ErrFlood
	}
	key := m.ReceiptKey
	t.mu.Unlock()

	// A signature takes longer than a lock should be held.
	r, err := open(name, frame, key)

	t.mu.Lock()
	if t.members[name] != m {
		t.mu.Unlock()
		return ErrNotEnrolled
	}
	if err == nil {
		err = m.accept(r, heard)
	}
	if err == nil && r.Canary != nil {
		m.canary.take(r, t.log)
	}
	if err != nil {
		m.refused++
		t.mu.Unlock()
		return err
	}
	t.wake()
	t.mu.Unlock()
	if t.onAccept != nil {
		t.onAccept(r)
	}
	return nil
}

// Asked notes that an enforcer asked for the writer's clock, by the subject that
// only it may publish on. From then on it is expected: a decision is not counted
// as in effect everywhere before it has said so, or has failed to in time.
func (t *Tracker) Asked(subject string) {
	name, _ := strings.CutPrefix(subject, natsfeed.ClockSubject(""))
	t.mu.Lock()
	defer t.mu.Unlock()
	if m := t.members[name]; m != nil {
		m.asked = t.now()
	}
}

// opening returns until when a member of which nothing has been heard since it
// asked for the clock is expected; zero is not. One that is heard of needs no such
// promise.
func (m *member) opening(now time.Time) time.Time {
	if m.asked.IsZero() || m.last != nil && (m.asked.Before(m.silentAt()) || !m.asked.After(m.heard)) {
		return time.Time{}
	}
	if until := m.asked.Add(expectFor); now.Before(until) {
		return until
	}
	return time.Time{}
}

func open(name string, frame, key []byte) (*session.Receipt, error) {
	f, err := session.ParseFrame(frame)
	if err != nil {
		return nil, err
	}
	if f.Type != session.TypeReceipt {
		return nil, fmt.Errorf("%w: frame of another type", ErrForged)
	}
	if err := f.Verify(key); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrForged, err)
	}
	r, err := session.UnmarshalReceipt(f.Body)
	if err != nil {
		return nil, err
	}
	if r.Enforcer != name {
		return nil, fmt.Errorf("%w: it speaks for another", ErrForged)
	}
	return r, nil
}

// accept takes a verified receipt if it is newer than what is there.
func (m *member) accept(r *session.Receipt, heard time.Time) error {
	if last := m.last; last != nil {
		switch {
		case r.Boot == last.Boot && r.Count <= last.Count:
			return ErrReplayed
		case r.Boot == last.Boot:
		case slices.Contains(m.boots, r.Boot):
			return ErrReplayed
		case r.At+int64(r.Error) < last.At-int64(last.Error):
			// A boot that is not remembered, but was before the last one.
			return ErrReplayed
		default:
			if len(m.boots) >= maxBoots {
				m.boots = slices.Delete(m.boots, 0, 1)
			}
			m.boots = append(m.boots, last.Boot)
		}
		if heard.Before(m.heard) {
			heard = m.heard
		}
	}
	if m.last == nil || m.last.Boot != r.Boot {
		m.since = heard
	}
	if r.Epoch != m.epoch {
		clear(m.timed)
		m.order, m.epoch = m.order[:0], r.Epoch
	}
	for _, b := range r.Batches {
		if _, again := m.timed[b.Number]; again {
			continue // a rebuild applies again what was in force before
		}
		if len(m.order) >= maxTimed {
			delete(m.timed, m.order[0])
			m.order = append(m.order[:0], m.order[1:]...)
		}
		m.timed[b.Number] = b
		m.order = append(m.order, b.Number)
	}
	r.Batches = nil
	m.last, m.heard = r, heard
	return nil
}

// standing is what a receipt's claim is worth.
type standing int

const (
	onLog   standing = iota // its head is the log's
	ahead                   // its head is not known here yet
	offPath                 // its head is another than the log's
)

func (t *Tracker) standing(r *session.Receipt) standing {
	if r.Number == 0 {
		return onLog
	}
	h, ok := t.log.HashAt(r.Epoch, r.Number)
	switch {
	case !ok:
		return ahead
	case h == r.Head:
		return onLog
	}
	return offPath
}

// covers reports whether the last receipt says that a batch is in force, and
// when it was put so, if that is known.
func (t *Tracker) covers(m *member, epoch, number uint64) (at session.Applied, timed, ok bool) {
	if m.last == nil || m.last.Epoch != epoch {
		return at, false, false
	}
	at, timed = m.timed[number]
	switch s := t.standing(m.last); {
	case number > m.last.Number:
		// Fallen away again.
	case s == onLog:
		ok = true
	case number <= m.last.Confirmed && m.last.Confirmed < m.last.Number:
		ok = true // the enforcer has it from the log itself; its head is in doubt
	case s == ahead:
		// The claim as a whole waits, but what it lists by number counts.
		ok = timed
	}
	return at, timed && ok, ok
}

// silentAt is when m, if nothing more is heard, counts as silent; a strict one
// denies by itself from then on at the latest.
func (m *member) silentAt() time.Time { return m.heard.Add(m.last.MaxStale) }

// Coverage says where a batch is in force, by the last receipts. Detail has an
// element for each enforcer when detail is set. next is when a pending enforcer
// passes its bound; zero when none does.
func (t *Tracker) Coverage(epoch, number uint64, detail bool) authority.Coverage {
	t.mu.Lock()
	defer t.mu.Unlock()
	c, _ := t.coverage(epoch, number, detail, nil)
	return c
}

// View says, by the tenants of an enforcer, whether it belongs to what somebody
// may see, and whether all that it does is theirs to know: else what it counts over
// its tenants is left out. Nil is a view of everything.
type View func(tenants []session.TenantID) (visible, whole bool)

// CoverageOf is Coverage, without detail, of the enforcers in a view.
func (t *Tracker) CoverageOf(epoch, number uint64, view View) authority.Coverage {
	t.mu.Lock()
	defer t.mu.Unlock()
	c, _ := t.coverage(epoch, number, false, view)
	return c
}

func (t *Tracker) coverage(epoch, number uint64, detail bool, view View) (c authority.Coverage, next time.Time) {
	now := t.now()
	c = authority.Coverage{Epoch: epoch, Number: number, Complete: true, Effective: true}
	decided, dated := t.log.TimeAt(epoch, number)
	if dated {
		c.At = decided.UTC()
	}
	shadowed := 0
	for _, name := range t.names {
		m := t.members[name]
		whole := true
		if view != nil {
			visible := false
			if visible, whole = view(m.Tenants); !visible {
				continue
			}
		}
		e := authority.EnforcerCoverage{Name: name, State: authority.StateAbsent}
		if m.last != nil {
			e.Mode, e.LastHeard = m.last.Mode.String(), m.heard.UTC()
			silent := m.silentAt()
			e.Silent = !now.Before(silent)
			// Whatever is heard, by this moment it has the decision or denies:
			// its state cannot be younger than the decision without having it.
			bound := silent
			if dated && decided.Add(m.last.MaxStale).Before(bound) {
				bound = decided.Add(m.last.MaxStale)
			}
			at, timed, applied := t.covers(m, epoch, number)
			denies := m.last.Denying && dated && m.heard.After(decided)
			switch {
			case applied:
				e.State, e.Cut = authority.StateApplied, at.Cut
				if timed {
					e.AppliedAt = time.Unix(0, at.At).UTC()
					e.ErrorMillis = millis(m.last.Error)
					if dated {
						took := e.AppliedAt.Sub(decided)
						if took <= 0 {
							// Sooner than the clocks can tell apart: at most
							// their error.
							took = m.last.Error
						}
						e.LatencyMillis = millis(took)
					}
				}
				if m.last.Mode == session.ModeShadow {
					e.State = authority.StateExposed
					shadowed++
				}
			case !m.last.Mode.Exposed() && (denies || !now.Before(bound)):
				e.State, e.DenyingSince = authority.StateDenying, bound.UTC()
				if denies {
					e.DenyingSince = m.heard.UTC()
				}
			case m.last.Mode.Exposed() && !now.Before(bound):
				e.State = authority.StateExposed
			default:
				e.State = authority.StatePending
				if next.IsZero() || bound.Before(next) {
					next = bound
				}
			}
		}
		if until := m.opening(now); !until.IsZero() && e.State != authority.StateApplied {
			// It runs anew, in a mode and with a state that it has yet to tell.
			e.State, e.DenyingSince = authority.StatePending, time.Time{}
			if next.IsZero() || until.Before(next) {
				next = until
			}
		}
		if !whole {
			e.Cut = 0
		}
		Count(&c, &e)
		if detail {
			c.Detail = append(c.Detail, e)
		}
	}
	return c, next
}

// Count adds an enforcer to a coverage.
func Count(c *authority.Coverage, e *authority.EnforcerCoverage) {
	c.Enforcers++
	switch e.Mode {
	case session.ModeBestEffort.String():
		c.BestEffort++
	case session.ModeShadow.String():
		c.Shadow++
	}
	if e.Silent {
		c.Silent++
	}
	switch e.State {
	case authority.StateApplied:
		c.InEffect++
	case authority.StatePending:
		c.Pending++
	case authority.StateDenying:
		c.Denying++
	case authority.StateExposed:
		c.Exposed++
	case authority.StateAbsent:
		c.Absent++
	}
	c.Cut += uint64(e.Cut)
	c.SlowestMillis = max(c.SlowestMillis, e.LatencyMillis)
	c.Complete = c.Pending == 0
	c.Effective = c.Complete && c.Exposed == 0
}

// Wait returns the coverage of a batch when every live enforcer in the view has sent its
// receipt or has passed its own staleness bound, or when ctx ends, which is not
// an error: Complete says which.
func (t *Tracker) Wait(ctx context.Context, epoch, number uint64, view View) authority.Coverage {
	for {
		t.mu.Lock()
		c, next := t.coverage(epoch, number, true, view)
		changed := t.changed
		t.mu.Unlock()
		if c.Complete {
			return c
		}
		timer := time.NewTimer(min(recheck, max(0, next.Sub(t.now()))))
		select {
		case <-ctx.Done():
			timer.Stop()
			return c
		case <-changed:
		case <-timer.C:
		}
		timer.Stop()
	}
}

// Enforcers returns the roster with what is known of each, by name. The names of
// the tenants are the caller's to fill in from the numbers that it gets.
func (t *Tracker) Enforcers() ([]authority.Enforcer, [][]session.TenantID) {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := t.now()
	out := make([]authority.Enforcer, 0, len(t.names))
	tenants := make([][]session.TenantID, 0, len(t.names))
	for _, name := range t.names {
		m := t.members[name]
		e := authority.Enforcer{
			Name: name, Enrolled: m.Enrolled, Condition: authority.ConditionAbsent, ReceiptsRefused: m.refused,
		}
		if r := m.last; r != nil {
			e.Condition = authority.ConditionFresh
			switch {
			case !now.Before(m.silentAt()):
				e.Condition = authority.ConditionSilent
				if !r.Mode.Exposed() {
					e.DenyingSince = m.silentAt().UTC()
				}
			case r.Denying:
				e.Condition = authority.ConditionDenying
				e.DenyingSince = m.heard.UTC()
			}
			e.Mode, e.LastHeard = r.Mode.String(), m.heard.UTC()
			e.Epoch, e.Applied, e.Confirmed = r.Epoch, r.Number, r.Confirmed
			e.MaxStaleMillis, e.AgeMillis = millis(r.MaxStale), millis(r.Age)
			e.Running, e.Cut, e.Denied = r.Running, r.Cut, r.Denied
			e.Refused, e.Repairs, e.Rebuilt = r.Refused, r.Repairs, r.Diverged
			e.Diverged = t.standing(r) == offPath
			if r.Divergence != nil {
				e.Divergence = r.Divergence.String()
			}
			e.Canary = t.armed(m, now)
		}
		out = append(out, e)
		tenants = append(tenants, m.Tenants)
	}
	return out, tenants
}

// Strangers returns how many receipts came in the name of nobody who is in.
func (t *Tracker) Strangers() uint64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.strange
}

func millis(d time.Duration) float64 {
	return float64(d.Round(time.Microsecond)) / float64(time.Millisecond)
}
