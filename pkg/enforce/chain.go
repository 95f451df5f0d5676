package enforce

import (
	"time"

	"github.com/interlock-fabric/interlock/pkg/filter"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// chain is what an enforcer knows of the log: a confirmed part, which a
// heartbeat has vouched for, and behind it what has been heard or read but not
// yet confirmed. What the second part denies is in force at once; what it lifts
// waits for the heartbeat.
//
//	origin ── … ── confirmed ── … ── base ── link ── link ── tip
//	                                          └─ loose: forks, and batches whose
//	                                             predecessor has not come yet
//
// base runs ahead of confirmed only while a long log is read, so that reading
// it takes bounded memory. A chain is used by one goroutine.
type chain struct {
	confirmed, base state
	links           []*link
	loose           map[session.Hash]*link
	size            int // bytes held in links and loose

	// settled are batches that must not be taken for new when they are heard
	// again: confirmed or rejected ones, until their deadline has passed.
	settled map[session.Hash]session.Instant

	// overlay is what the unconfirmed part denies. It is kept only once
	// something is confirmed: until then every request is denied anyway.
	overlay *filter.Set
	live    bool

	// lifts are confirmed batches that lift something, for what earlier epochs
	// left in force; kept only while collect is set.
	lifts   []*link
	collect bool

	// floor is the head that an earlier run of this enforcer had confirmed.
	floor floor
}

// state is the state of the fabric after one batch.
type state struct {
	number uint64
	hash   session.Hash
	set    *filter.Set
}

// link is a batch that was heard, with the rights of who signed it.
type link struct {
	batch *session.Batch
	hash  session.Hash
	key   *session.SigningKey
	size  int
	// stored is set for a batch that was read from the log.
	stored bool
}

func (l *link) may(e *session.Entry) bool  { return l.key.May(e.Key) }
func (l *link) sets(e *session.Entry) bool { return e.Op == session.OpSet && l.key.May(e.Key) }

// Bounds of what is held unconfirmed.
const (
	maxLinks   = 4096
	maxHeld    = 64 << 20
	maxSettled = 1 << 17
	// keepLinks are kept apart from base, so that a fork among the newest
	// batches can still be undone.
	keepLinks = 1024
	// settleSlack keeps a settled batch known for longer than its deadline, so
	// that a correction of the clock's estimate lets no replay in.
	settleSlack = 10 * time.Second
)

func newChain(origin session.Hash, f floor) *chain {
	s := state{hash: origin, set: &filter.Set{}}
	return &chain{
		confirmed: s, base: s, floor: f,
		loose:   map[session.Hash]*link{},
		settled: map[session.Hash]session.Instant{},
	}
}

func (c *chain) tip() (uint64, session.Hash) {
	if n := len(c.links); n > 0 {
		return c.links[n-1].batch.Number, c.links[n-1].hash
	}
	return c.base.number, c.base.hash
}

// added is what became of a batch.
type added int

const (
	duplicate  added = iota // known already
	linked                  // extends the chain
	parked                  // held, off the chain
	overflowed              // not held: to be read from the log later
	rolledBack              // contradicts what an earlier run had confirmed
)

// seen reports whether a batch of that hash needs no further look, and notes
// when a held one turns out to be stored.
func (c *chain) seen(h session.Hash, number uint64, stored bool) bool {
	if _, ok := c.settled[h]; ok {
		return true
	}
	if stored && number <= c.base.number {
		return true
	}
	if l := c.find(h, number); l != nil {
		l.stored = l.stored || stored
		return true
	}
	if l := c.loose[h]; l != nil {
		if stored && !l.stored {
			l.stored = true
			c.unpark(l)
			c.attach(l)
		}
		return true
	}
	return false
}

func (c *chain) find(h session.Hash, number uint64) *link {
	if i := int(int64(number) - int64(c.base.number) - 1); i >= 0 && i < len(c.links) && c.links[i].hash == h {
		return c.links[i]
	}
	return nil
}

// add takes a verified batch that has not been seen.
func (c *chain) add(l *link) added {
	if c.full(l) {
		c.trim()
		for h, x := range c.loose {
			if !l.stored || !c.full(l) {
				break
			}
			// What is stored goes first; what it pushes out was only heard and
			// is in the log too, or will be rejected. What it denied stays
			// denied until the next heartbeat.
			if !x.stored {
				c.unpark(c.loose[h])
			}
		}
		if c.full(l) {
			return overflowed
		}
	}
	what := c.attach(l)
	if what == linked || what == parked {
		c.deny(l)
	}
	return what
}

func (c *chain) full(l *link) bool {
	return c.size+l.size > maxHeld || len(c.links)+len(c.loose) >= maxLinks
}

// deny puts what a batch denies in force before it is confirmed.
func (c *chain) deny(l *link) {
	if !c.live {
		return
	}
	for i := range l.batch.Entries {
		if l.sets(&l.batch.Entries[i]) {
			c.overlay = c.overlay.Apply(l.batch, l.sets)
			return
		}
	}
}

func (c *chain) attach(l *link) added {
	if l.batch.Number == c.floor.Number && l.batch.Epoch == c.floor.Epoch && l.hash != c.floor.Hash {
		return rolledBack
	}
	number, hash := c.tip()
	switch {
	case l.batch.Number == number+1 && l.batch.Prev == hash:
		c.append(l)
	case l.stored && c.fork(l.batch.Prev, l.batch.Number-1):
		// What is stored outranks what was only heard.
		c.append(l)
	default:
		c.loose[l.hash] = l
		c.size += l.size
		return parked
	}
	for c.follow() {
	}
	return linked
}

// follow moves a parked batch that fits the tip onto the chain.
func (c *chain) follow() bool {
	number, hash := c.tip()
	for _, l := range c.loose {
		if l.batch.Number == number+1 && l.batch.Prev == hash {
			c.unpark(l)
			c.append(l)
			return true
		}
	}
	return false
}

func (c *chain) append(l *link) {
	c.links = append(c.links, l)
	c.size += l.size
	if len(c.links) > 2*keepLinks {
		c.trim()
	}
}

func (c *chain) unpark(l *link) {
	if _, ok := c.loose[l.hash]; ok {
		delete(c.loose, l.hash)
		c.size -= l.size
	}
}

// fork cuts the chain behind the batch of that hash, if it is on it, and parks
// what was behind it.
func (c *chain) fork(h session.Hash, number uint64) bool {
	keep := -1
	switch {
	case c.base.number == number && c.base.hash == h:
		keep = 0
	case c.find(h, number) != nil:
		keep = int(number - c.base.number)
	}
	if keep < 0 {
		return false
	}
	for _, l := range c.links[keep:] {
		c.loose[l.hash] = l
	}
	c.links = c.links[:keep:keep]
	return true
}

// trim folds the oldest stored links into base. A link that was only heard is
// never folded: another batch may yet take its place.
func (c *chain) trim() {
	n := 0
	for n < len(c.links)-keepLinks && c.links[n].stored {
		n++
	}
	c.fold(n)
}

// fold applies the first n links to base.
func (c *chain) fold(n int) {
	for _, l := range c.links[:n] {
		c.base = state{number: l.batch.Number, hash: l.hash, set: c.base.set.Apply(l.batch, l.may)}
		c.size -= l.size
		if len(c.settled) < maxSettled {
			c.settled[l.hash] = l.batch.Deadline
		}
		if c.collect && l.lifts() {
			c.lifts = append(c.lifts, l)
		}
	}
	c.links = append([]*link(nil), c.links[n:]...)
}

func (l *link) lifts() bool {
	for i := range l.batch.Entries {
		if l.batch.Entries[i].Op == session.OpLift {
			return true
		}
	}
	return false
}

// takeLifts hands over the confirmed batches that lift something.
func (c *chain) takeLifts() []*link {
	out := c.lifts
	c.lifts = nil
	return out
}

// confirmation is what a heartbeat's head is to the chain.
type confirmation int

const (
	unknownHead confirmation = iota // not heard of: to be read from the log
	sameHead                        // confirmed already
	newHead                         // confirmed now
	olderHead                       // behind what is confirmed
	conflicting                     // another batch under a number that is confirmed
	belowFloor                      // behind what an earlier run had confirmed
)

// confirm moves the confirmed part up to the head that a heartbeat vouches for.
func (c *chain) confirm(epoch, number uint64, h session.Hash) confirmation {
	if epoch == c.floor.Epoch && (number < c.floor.Number || number == c.floor.Number && h != c.floor.Hash) {
		return belowFloor
	}
	switch {
	case number < c.confirmed.number:
		return olderHead
	case number == c.confirmed.number && h == c.confirmed.hash:
		c.live = true
		return sameHead
	case number == c.confirmed.number:
		return conflicting
	case number < c.base.number:
		return olderHead
	}
	if number > c.base.number && c.find(h, number) == nil && !c.adopt(h) {
		return unknownHead
	}
	if number == c.base.number && h != c.base.hash {
		return conflicting
	}
	c.fold(int(number - c.base.number))
	c.confirmed, c.live = c.base, true
	for c.follow() {
	}
	c.rebuild()
	return newHead
}

// adopt makes the parked branch that ends in h the chain.
func (c *chain) adopt(h session.Hash) bool {
	var path []*link
	for l := c.loose[h]; l != nil && len(path) <= len(c.loose); l = c.loose[l.batch.Prev] {
		path = append(path, l)
	}
	if len(path) == 0 {
		return false
	}
	first := path[len(path)-1].batch
	if !c.fork(first.Prev, first.Number-1) {
		return false
	}
	for i := len(path) - 1; i >= 0; i-- {
		c.unpark(path[i])
		c.links = append(c.links, path[i])
		c.size += path[i].size
	}
	return true
}

// rebuild makes the overlay anew from what is still unconfirmed.
func (c *chain) rebuild() {
	if c.base.number > c.confirmed.number {
		// Some of it is folded into base already; the overlay that there is
		// denies at least as much.
		return
	}
	c.overlay = nil
	for _, l := range c.links {
		c.deny(l)
	}
	for _, l := range c.loose {
		c.deny(l)
	}
}

// reject drops a batch that will never be in the log. It reports whether
// anything was dropped.
func (c *chain) reject(h session.Hash, number uint64, until session.Instant) bool {
	if number <= c.confirmed.number && c.loose[h] == nil {
		return false
	}
	dropped := c.drop(h, number)
	if !dropped && number > c.base.number && len(c.settled) < maxSettled {
		// Not heard yet, or no more: do not take it when it comes late.
		c.settled[h] = until
	}
	if dropped {
		c.rebuild()
	}
	return dropped
}

func (c *chain) drop(h session.Hash, number uint64) bool {
	l := c.loose[h]
	if l == nil {
		if l = c.find(h, number); l == nil || l.stored {
			return false
		}
		c.fork(l.batch.Prev, number-1)
	}
	c.unpark(l)
	if len(c.settled) < maxSettled {
		c.settled[h] = l.batch.Deadline
	}
	return true
}

// expire drops what has been unconfirmed for longer than its deadline, seen by
// the authority's clock in a log that is fresh. fresh is the authority's time of
// the newest heartbeat whose head is confirmed, now its clock.
func (c *chain) expire(fresh, now session.Instant) bool {
	for h, deadline := range c.settled {
		if now > deadline.Add(settleSlack) {
			delete(c.settled, h)
		}
	}
	limit := min(fresh, now)
	var late []*link
	for _, l := range c.loose {
		if l.batch.Deadline < limit {
			late = append(late, l)
		}
	}
	for _, l := range c.links {
		if !l.stored && l.batch.Deadline < limit {
			late = append(late, l)
			break
		}
	}
	for _, l := range late {
		c.drop(l.hash, l.batch.Number)
		delete(c.settled, l.hash)
	}
	if len(late) > 0 {
		c.rebuild()
	}
	return len(late) > 0
}
