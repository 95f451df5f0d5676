package trail

import (
	"cmp"
	"hash/maphash"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/interlock-fabric/interlock/pkg/session"
)

// text is what a record says of s, in memory of its own: what s is a part of
// must not be kept for it.
func text(s string) string { return strings.Clone(session.ReportText(s)) }

func callerOf(id *session.Identity) session.Caller {
	c := session.CallerOf(id)
	for _, s := range []*string{&c.Tenant, &c.Issuer, &c.User, &c.Session, &c.Client} {
		*s = strings.Clone(*s)
	}
	for _, l := range [][]session.Actor{c.Actors, c.Ancestors} {
		for i := range l {
			l[i].Issuer, l[i].ID = strings.Clone(l[i].Issuer), strings.Clone(l[i].ID)
		}
	}
	return c
}

// identity condenses who calls: 64 bits under a random seed of the recorder's,
// which nobody can aim at, and which by chance are the same for two of a few
// thousand callers once in 10^12. Zero is nobody.
type identity uint64

type hashSeed struct{ maphash.Seed }

func newSeed() hashSeed { return hashSeed{maphash.MakeSeed()} }

// identity is over what stays when a token is renewed. It allocates nothing.
func (s hashSeed) identity(p *session.Prepared) identity {
	id := p.Identity()
	var h maphash.Hash
	h.SetSeed(s.Seed)
	put := func(v string) {
		_, _ = h.WriteString(v) // never fails
		_ = h.WriteByte(0xff)   // in no UTF-8
	}
	put(id.Tenant)
	put(id.Issuer)
	put(id.User)
	put(id.Client)
	put(id.Session.ID)
	put(id.Session.Issuer)
	for i := range id.Actors {
		put(id.Actors[i].Issuer)
		put(id.Actors[i].ID)
	}
	if id.User == "" && id.Client == "" && id.Session.ID == "" && len(id.Actors) == 0 {
		put(id.Token) // nothing outlives the credential, so it is the caller
		for _, k := range id.Keys {
			put(k)
		}
	}
	return identity(h.Sum64() | 1)
}

func (s hashSeed) operation(e *Event) uint64 {
	var h maphash.Hash
	h.SetSeed(s.Seed)
	for _, v := range []string{e.Method, e.Call.Tool, e.Call.Audience} {
		_, _ = h.WriteString(v)
		_ = h.WriteByte(0xff)
	}
	return h.Sum64() | 1
}

// ring holds the samples that wait. A producer takes the next place and puts its
// sample there, over what is there still: so the oldest give way, and nobody
// waits for anybody.
type ring struct {
	next  atomic.Uint64
	slots []atomic.Pointer[sample]
}

type sample struct {
	session.TrailRecord
	at uint64 // its number
}

// push reports whether another sample had to give way.
func (r *ring) push(s *sample) bool {
	s.at = r.next.Add(1) - 1
	return r.slots[s.at%uint64(len(r.slots))].Swap(s) != nil
}

func (r *ring) len() (n int) {
	for i := range r.slots {
		if r.slots[i].Load() != nil {
			n++
		}
	}
	return n
}

// waiting returns the samples, oldest first. They stay until they are taken.
func (r *ring) waiting() []*sample {
	var out []*sample
	for i := range r.slots {
		if s := r.slots[i].Load(); s != nil {
			out = append(out, s)
		}
	}
	slices.SortFunc(out, func(a, b *sample) int { return cmp.Compare(a.at, b.at) })
	return out
}

// take reports whether s was there still.
func (r *ring) take(s *sample) bool {
	return r.slots[s.at%uint64(len(r.slots))].CompareAndSwap(s, nil)
}

// denialKey is what makes two denials the same.
type denialKey struct {
	who       identity
	operation uint64
	decision  session.Decision
	cause     session.Cause
	effect    session.Effect
	reason    session.Reason
	sequence  uint64
}

// denial is one record of denials. A record that was sent is kept for a while,
// so that the next of the same kind adds to a count and not to the reports.
type denial struct {
	session.TrailRecord
	sent  time.Time // when it was last reported
	fresh bool      // it has what was not reported
}

// repeatEvery is how often a denial that goes on is reported.
const repeatEvery = 30 * time.Second

// due reports whether x is to be reported now, or, when the recorder ends, ever.
func (x *denial) due(now time.Time, final bool) bool {
	return x.fresh && (final || now.Sub(x.sent) >= repeatEvery)
}

// denials are bounded twice: by their number, and by that of one caller, who
// must not take the places of all others. Of those that find no place the cause
// alone is kept.
type denials struct {
	mu    sync.Mutex
	limit int
	each  int
	all   map[denialKey]*denial
	by    map[identity]int
	// folded has nothing but decision and cause in its keys, so that they are
	// few.
	folded map[denialKey]*denial
	// full is set when no room could be made, until something is reported.
	full bool
}

func (d *denials) init(limit int) {
	d.limit, d.each = limit, max(1, limit/16)
	d.all, d.by, d.folded = map[denialKey]*denial{}, map[identity]int{}, map[denialKey]*denial{}
}

func (d *denials) len() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.all) + len(d.folded)
}

// waiting returns how many records are due.
func (d *denials) waiting(now time.Time, final bool) (n int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, m := range []map[denialKey]*denial{d.all, d.folded} {
		for _, x := range m {
			if x.due(now, final) {
				n++
			}
		}
	}
	return n
}

func (d *denials) add(r *Recorder, who identity, e *Event) {
	key := denialKey{who: who, operation: r.seed.operation(e), decision: decisionOf(e), cause: session.CauseOf(e.Err)}
	if x := deniedOf(e.Err); x != nil {
		key.effect, key.reason, key.sequence = x.Effect, x.Reason, x.Seq
	}
	if d.repeat(d.all, key, e) {
		return
	}
	// Made outside the lock: the arguments may be long.
	x := &denial{fresh: true}
	r.fill(&x.TrailRecord, e)
	d.mu.Lock()
	old := d.all[key]
	switch {
	case old != nil && !old.fresh:
		x.sent = old.sent
		d.all[key] = x
		d.mu.Unlock()
		return
	case old == nil && d.room(who):
		d.all[key] = x
		d.by[who]++
		d.mu.Unlock()
		return
	}
	d.mu.Unlock()
	if old != nil { // another was first
		d.repeat(d.all, key, e)
		return
	}
	r.totals.folded.Add(1)
	key = denialKey{decision: key.decision, cause: key.cause}
	if d.repeat(d.folded, key, e) {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	x = &denial{fresh: true, TrailRecord: session.TrailRecord{
		Decision: key.decision, Cause: key.cause, Count: 1, First: x.First, Last: x.Last,
		Detail: "others, of which no more is known",
	}}
	if old := d.folded[key]; old != nil {
		x.sent = old.sent
		if old.fresh {
			x.Count, x.First = old.Count+1, old.First
			x.Last = max(x.Last, old.Last)
		}
	}
	d.folded[key] = x
}

// repeat adds to a denial of which there is something to report already.
func (d *denials) repeat(m map[denialKey]*denial, key denialKey, e *Event) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	x := m[key]
	if x == nil || !x.fresh {
		return false
	}
	now := time.Now()
	x.Count++
	x.Last = max(x.First, session.InstantOf(now))
	x.Latency = max(x.Latency, e.took(now))
	return true
}

// room reports whether a denial of the caller finds a place; what was reported
// gives way. d.mu is held.
func (d *denials) room(who identity) bool {
	if d.by[who] >= d.each {
		return false
	}
	if len(d.all) >= d.limit && !d.full {
		for key, x := range d.all {
			if !x.fresh {
				d.forget(key)
			}
		}
		d.full = len(d.all) >= d.limit
	}
	return len(d.all) < d.limit
}

// forget is called with d.mu held.
func (d *denials) forget(key denialKey) {
	delete(d.all, key)
	if d.by[key.who]--; d.by[key.who] <= 0 {
		delete(d.by, key.who)
	}
}

// report hands take the records that are due, oldest first, until it has no more
// room. Those that have been quiet for long are forgotten.
func (d *denials) report(now time.Time, final bool, take func(*session.TrailRecord) bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.full = false
	var list []*denial
	for _, m := range []map[denialKey]*denial{d.all, d.folded} {
		for _, x := range m {
			if x.due(now, final) {
				list = append(list, x)
			}
		}
	}
	slices.SortFunc(list, func(a, b *denial) int { return cmp.Compare(a.First, b.First) })
	for _, x := range list {
		if !take(&x.TrailRecord) {
			break
		}
		x.sent, x.fresh = now, false
	}
	for key, x := range d.all {
		if !x.fresh && now.Sub(x.sent) >= repeatEvery {
			d.forget(key)
		}
	}
}

// callers is the table of who was seen: sets of a few places each, which a
// caller is found in by its hash. Finding one that is there takes no lock and
// allocates nothing. In a set that is full the one not seen for longest gives
// way.
type callers struct {
	slots []atomic.Pointer[sighted]
}

// ways is how many places a set has.
const ways = 8

type sighted struct {
	who           identity
	caller        session.Caller
	first         session.Instant
	last          atomic.Int64
	calls, denied atomic.Uint64
	reported      atomic.Uint64 // calls, when it was last reported
}

func (c *callers) init(limit int) {
	sets := max(1, limit/ways)
	c.slots = make([]atomic.Pointer[sighted], sets*ways)
}

func (c *callers) touch(r *Recorder, who identity, e *Event) {
	if len(c.slots) == 0 || e.Cut {
		return
	}
	at := e.Mark.at
	if at.IsZero() {
		at = time.Now()
	}
	now := session.InstantOf(at)
	set := c.slots[uint64(who)>>1%uint64(len(c.slots)/ways)*ways:][:ways]
	for range 4 { // another may be first, a few times
		place, oldest := -1, int64(0)
		for i := range set {
			s := set[i].Load()
			switch {
			case s == nil:
				if place < 0 || oldest != 0 {
					place, oldest = i, 0
				}
			case s.who == who:
				s.seen(now, e.Err != nil)
				return
			default:
				if last := s.last.Load(); place < 0 || last < oldest {
					place, oldest = i, last
				}
			}
		}
		old := set[place].Load()
		id := e.Caller.Identity()
		s := &sighted{who: who, caller: callerOf(&id), first: now}
		s.seen(now, e.Err != nil)
		if set[place].CompareAndSwap(old, s) {
			if old != nil && old.calls.Load() != old.reported.Load() {
				r.totals.untracked.Add(1)
			}
			return
		}
	}
	r.totals.untracked.Add(1)
}

func (s *sighted) seen(now session.Instant, denied bool) {
	for {
		last := s.last.Load()
		if last >= int64(now) || s.last.CompareAndSwap(last, int64(now)) {
			break
		}
	}
	s.calls.Add(1)
	if denied {
		s.denied.Add(1)
	}
}

// news returns the callers that were seen since they were last reported.
func (c *callers) news() []*sighted {
	var out []*sighted
	for i := range c.slots {
		if s := c.slots[i].Load(); s != nil && s.calls.Load() != s.reported.Load() {
			out = append(out, s)
		}
	}
	return out
}

// sighting is what a report says of s.
func (s *sighted) sighting() session.Sighting {
	denied := s.denied.Load() // before calls, which it must not exceed
	return session.Sighting{
		Caller: s.caller, First: s.first, Last: max(s.first, session.Instant(s.last.Load())),
		Denied: denied, Calls: s.calls.Load(),
	}
}
