package enforce

import (
	"maps"
	"slices"
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
// it takes bounded memory. That a batch is stored is the word of the bus alone:
// it decides which of two forks is tried first and what is kept when memory is
// short, never what is in force. A chain is used by one goroutine.
type chain struct {
	confirmed, base state
	links           []*link
	loose           map[session.Hash]*link
	after           map[session.Hash][]*link // loose, by their predecessor
	size            int                      // bytes held in links and loose

	// settled are batches that must not be taken for new when they are heard
	// again: confirmed or rejected ones, until their deadline has passed.
	// crowded is set when not all of them are in it.
	settled map[session.Hash]settled
	crowded bool
	// surprised is set when a batch has come to count that was held to be
	// rejected: it was not in force meanwhile.
	surprised bool

	// overlay is what the unconfirmed part denies. It is kept only once
	// something is confirmed: until then every request is denied anyway. What has
	// been confirmed since may stay in it for a while, as long as the state denies
	// it, too: spent is set once that may not be so, or the overlay is not what
	// applying the unconfirmed in their order makes. laid is how many entries it
	// was made of, and newest the highest number of a batch in it.
	overlay *filter.Overlay
	spent   bool
	laid    int
	newest  uint64
	live    bool

	// linked are the batches that have come onto the chain since it was last
	// emptied.
	linked []*link

	// lifts are confirmed batches that lift something or move the horizon, for
	// what earlier epochs left in force; kept only while collect is set.
	lifts   []*link
	collect bool

	// floor is the newest head that was ever confirmed, here or in an earlier
	// run: no other chain is accepted. broken is set when base has left it.
	floor  head
	broken bool
	// trial is set for a chain that begins at a published segment, whose sum
	// source is.
	trial  bool
	source [32]byte

	// probe, if not zero, is a batch whose state is wanted; probed is that, once
	// the chain has passed the batch.
	probe  head
	probed *filter.Set
}

// head names one batch; the zero head is before every chain.
type head struct {
	number uint64
	hash   session.Hash
}

// state is the state of the fabric after one batch.
type state struct {
	head
	set *filter.Set
	// signers are the keys that signed the way here, with the newest batch of
	// each: a withdrawal may take batches back.
	signers []signer
	// horizon is the last of a batch that was folded into this, zero before one
	// was.
	horizon session.Instant
}

// settled is why a batch is not new, and until when that matters.
type settled struct {
	until    session.Instant
	rejected bool
}

type signer struct {
	Key  session.KeyID `json:"key"`
	Last uint64        `json:"last"`
}

func (s *state) signed(id session.KeyID, number uint64) {
	for i := range s.signers {
		if s.signers[i].Key == id {
			s.signers[i].Last = number
			return
		}
	}
	s.signers = append(s.signers, signer{id, number})
}

func anyRevoked(ks *session.KeySet, signers []signer) bool {
	return slices.ContainsFunc(signers, func(s signer) bool { return ks.Revoked(s.Key, s.Last) })
}

// link is a batch that was heard, with the rights of who signed it.
type link struct {
	batch  *session.Batch
	hash   session.Hash
	key    *session.SigningKey
	signer session.KeyID
	size   int
	// stored is set for a batch that was read from the log.
	stored bool
	// rejected is set when a writer has said that the batch is not in the log.
	// It denies nobody unless a heartbeat says otherwise.
	rejected bool
	// at is when it was heard, and cut how much running work it ended.
	at  time.Duration
	cut int
}

func (l *link) may(e *session.Entry) bool { return l.key.May(e.Key) }

func (l *link) lifts() bool {
	return slices.ContainsFunc(l.batch.Entries, func(e session.Entry) bool { return e.Op == session.OpLift })
}

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

func newChain(origin session.Hash, floor head) *chain {
	s := state{head: head{hash: origin}, set: &filter.Set{}}
	return &chain{
		confirmed: s, base: s, floor: floor,
		loose:   map[session.Hash]*link{},
		after:   map[session.Hash][]*link{},
		settled: map[session.Hash]settled{},
	}
}

// start makes a state the beginning of a chain that has nothing yet.
func (c *chain) start(s state) {
	c.base, c.confirmed = s, s
	c.base.signers = slices.Clone(s.signers)
	c.look()
}

// look keeps the state that is wanted when base is that.
func (c *chain) look() {
	if c.probe.number > 0 && c.base.head == c.probe {
		c.probed = c.base.set
	}
}

// carry takes over what the chain that this one replaces has of what comes after
// its beginning, but for what keep reports false for, and what need not be heard
// again: a batch that was heard while a segment was fetched may not be in the
// log yet. What is not after the beginning has its place taken in the log, by
// itself or by another batch.
func (c *chain) carry(old *chain, keep func(*link) bool) {
	maps.Copy(c.settled, old.settled)
	c.crowded = old.crowded
	take := func(l *link) {
		if l.batch.Number > c.base.number && keep(l) {
			c.attach(l)
		}
	}
	for _, l := range old.links {
		take(l)
	}
	for _, l := range old.loose {
		take(l)
	}
}

func (c *chain) tip() head {
	if n := len(c.links); n > 0 {
		return head{c.links[n-1].batch.Number, c.links[n-1].hash}
	}
	return c.base.head
}

// seen reports whether a batch of that hash needs no further look, and notes
// when a held one turns out to be stored.
func (c *chain) seen(h session.Hash, number uint64, stored bool) bool {
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
	// A rejection is not the last word on what is stored: a writer may have
	// given up on a batch that the store then took. The heartbeat knows.
	_, settled := c.settled[h]
	return settled && !stored
}

func (c *chain) find(h session.Hash, number uint64) *link {
	if l := c.at(number); l != nil && l.hash == h {
		return l
	}
	return nil
}

// at returns the link with that number, if there is one on the chain.
func (c *chain) at(number uint64) *link {
	if number <= c.base.number || number-c.base.number > uint64(len(c.links)) {
		return nil
	}
	return c.links[number-c.base.number-1]
}

// add takes a verified batch that has not been seen. It reports false when there
// is no room for it: what is stored makes room by being folded into base, and what
// was only heard, and fills the rest, goes with the next confirmation or restart.
func (c *chain) add(l *link) bool {
	if c.full(l) {
		c.trim(keepLinks)
		if c.full(l) && l.stored {
			c.trim(0)
		}
		if c.full(l) {
			return false
		}
	}
	l.rejected = c.settled[l.hash].rejected
	c.attach(l)
	c.deny(l)
	return true
}

func (c *chain) full(l *link) bool {
	return c.size+l.size > maxHeld || len(c.links)+len(c.loose) >= maxLinks
}

// deny puts what a batch denies in force before it is confirmed.
func (c *chain) deny(l *link) {
	if c.live && !l.rejected {
		c.overlay = c.overlay.Apply(l.batch, l.may)
		c.laid += len(l.batch.Entries)
		c.spent = c.spent || l.batch.Number <= c.newest
		c.newest = max(c.newest, l.batch.Number)
	}
}

// attach puts a batch on the chain or, where it does not fit, beside it.
func (c *chain) attach(l *link) {
	tip := c.tip()
	switch have := c.at(l.batch.Number); {
	case l.batch.Number == tip.number+1 && l.batch.Prev == tip.hash:
		c.append(l)
	case l.stored && have != nil && !have.stored && c.fork(head{l.batch.Number - 1, l.batch.Prev}):
		// What is stored outranks what was only heard; of two that are stored,
		// the first counts.
		c.append(l)
	default:
		c.park(l)
		return
	}
	c.follow()
}

// follow moves parked batches that fit the tip onto the chain.
func (c *chain) follow() {
	for {
		tip := c.tip()
		var next *link
		for _, l := range c.after[tip.hash] {
			if l.batch.Number == tip.number+1 && (next == nil || l.stored && !next.stored) {
				next = l
			}
		}
		if next == nil {
			return
		}
		c.unpark(next)
		c.append(next)
	}
}

func (c *chain) append(l *link) {
	c.links = append(c.links, l)
	c.linked = append(c.linked, l)
	c.size += l.size
	if len(c.links) > 2*keepLinks {
		c.trim(keepLinks)
	}
}

func (c *chain) park(l *link) {
	c.loose[l.hash] = l
	c.after[l.batch.Prev] = append(c.after[l.batch.Prev], l)
	c.size += l.size
}

func (c *chain) unpark(l *link) {
	if c.loose[l.hash] != l {
		return
	}
	delete(c.loose, l.hash)
	rest := slices.DeleteFunc(c.after[l.batch.Prev], func(x *link) bool { return x == l })
	if len(rest) == 0 {
		delete(c.after, l.batch.Prev)
	} else {
		c.after[l.batch.Prev] = rest
	}
	c.size -= l.size
}

// fork cuts the chain behind h, if h is on it, and parks what was behind it.
func (c *chain) fork(h head) bool {
	if h != c.base.head && c.find(h.hash, h.number) == nil {
		return false
	}
	keep := int(h.number - c.base.number)
	gone := c.links[keep:]
	c.links = c.links[:keep:keep]
	for _, l := range gone {
		c.size -= l.size
		c.park(l)
	}
	return true
}

// trim folds the oldest stored links into base, but for the newest keep. A link
// that was only heard is never folded: another batch may yet take its place.
func (c *chain) trim(keep int) {
	n := 0
	for n < len(c.links)-keep && c.links[n].stored {
		n++
	}
	c.fold(n)
}

// fold applies the first n links to base.
func (c *chain) fold(n int) {
	for _, l := range c.links[:n] {
		b := l.batch
		c.base.head, c.base.set = head{b.Number, l.hash}, c.base.set.Apply(b, l.may)
		c.look()
		c.base.signed(l.signer, b.Number)
		c.broken = c.broken || b.Number == c.floor.number && l.hash != c.floor.hash
		c.size -= l.size
		c.surprised = c.surprised || l.rejected
		c.settle(l.hash, settled{until: b.Deadline}, b.Time)
		if l.lifts() || b.Horizon > c.base.horizon {
			c.spent, c.base.horizon = true, max(c.base.horizon, b.Horizon)
			if c.collect {
				c.lifts = append(c.lifts, l)
			}
		}
	}
	c.links = slices.Clone(c.links[n:])
}

// settle remembers a batch until its deadline; now is as late as the authority's
// clock is known to be.
func (c *chain) settle(h session.Hash, s settled, now session.Instant) {
	if len(c.settled) >= maxSettled && !c.crowded {
		c.forget(now)
	}
	if len(c.settled) >= maxSettled {
		c.crowded = true
		return
	}
	c.settled[h] = s
}

func (c *chain) forget(now session.Instant) {
	for h, s := range c.settled {
		if now > s.until.Add(settleSlack) {
			delete(c.settled, h)
		}
	}
	c.crowded = c.crowded && len(c.settled) > 0
}

// takeLifts hands over the confirmed batches that lift something.
func (c *chain) takeLifts() []*link {
	out := c.lifts
	c.lifts = nil
	return out
}

// takeSurprise reports, once, whether a batch that was held to be rejected has
// come to count.
func (c *chain) takeSurprise() bool {
	was := c.surprised
	c.surprised = false
	return was
}

// takeLinked hands over the batches that have come onto the chain.
func (c *chain) takeLinked() []*link {
	out := c.linked
	c.linked = nil
	return out
}

// confirmation is what a heartbeat's head is to the chain.
type confirmation int

const (
	unknownHead confirmation = iota // not heard of: to be read from the log
	sameHead                        // confirmed already
	newHead                         // confirmed now
	olderHead                       // behind what was ever confirmed
	otherHead                       // on a chain that is not the one that was confirmed
)

// confirm moves the confirmed part up to the head that a heartbeat vouches for.
func (c *chain) confirm(h head) confirmation {
	switch {
	case h.number < c.floor.number:
		return olderHead
	case h.number == c.floor.number && c.floor.number > 0 && h != c.floor:
		return otherHead
	case h == c.confirmed.head:
		if c.live {
			return sameHead
		}
		if c.base.head != c.confirmed.head {
			return unknownHead // more has been read than could be denied apart
		}
		// At the origin: what was heard already denies from here on.
		c.live = true
		c.rebuild()
		return sameHead
	case h.number == c.confirmed.number:
		return otherHead
	case h != c.base.head && c.find(h.hash, h.number) == nil && !c.adopt(h.hash):
		if c.contradicts(h.hash) {
			return otherHead
		}
		return unknownHead
	}
	if c.offFloor(h) {
		return otherHead
	}
	c.fold(int(h.number - c.base.number))
	c.confirmed = c.base
	c.confirmed.signers = slices.Clone(c.base.signers)
	c.floor = h
	c.follow()
	c.sweep()
	return newHead
}

// offFloor reports whether a head, or the chain up to it, contradicts the floor.
func (c *chain) offFloor(h head) bool {
	l := c.at(c.floor.number)
	return c.broken || l != nil && l.hash != c.floor.hash ||
		h.number < c.floor.number || h.number == c.floor.number && c.floor.number > 0 && h != c.floor
}

// adopt makes the parked branch that ends in h the chain.
func (c *chain) adopt(h session.Hash) bool {
	path := c.branch(h)
	if len(path) == 0 {
		return false
	}
	first := path[len(path)-1].batch
	if !c.fork(head{first.Number - 1, first.Prev}) {
		return false
	}
	for _, l := range slices.Backward(path) {
		c.unpark(l)
		c.links = append(c.links, l)
		c.linked = append(c.linked, l)
		c.size += l.size
	}
	return true
}

// branch returns the parked links that end in h, newest first.
func (c *chain) branch(h session.Hash) (path []*link) {
	for l := c.loose[h]; l != nil && len(path) < len(c.loose); l = c.loose[l.batch.Prev] {
		path = append(path, l)
	}
	return path
}

// contradicts reports whether the parked branch that ends in h follows another
// batch than the one that is confirmed under that number.
func (c *chain) contradicts(h session.Hash) bool {
	path := c.branch(h)
	if len(path) == 0 {
		return false
	}
	first := path[len(path)-1].batch
	return first.Number == c.confirmed.number+1 && first.Prev != c.confirmed.hash
}

// restart forgets all that is not confirmed, because it leads nowhere: it will
// be read again. What it denies stays denied until the next confirmation.
func (c *chain) restart() {
	c.base = c.confirmed
	c.base.signers = slices.Clone(c.confirmed.signers)
	c.links, c.linked, c.lifts, c.size, c.broken, c.spent = nil, nil, nil, 0, false, true
	clear(c.loose)
	clear(c.after)
}

// retrust looks again at who signed what is unconfirmed, under a new key set. It
// reports whether anything was dropped.
func (c *chain) retrust(ks *session.KeySet) bool {
	dropped := anyRevoked(ks, c.base.signers)
	if dropped {
		c.restart()
	}
	var gone []*link
	each := func(l *link) {
		if ks.Revoked(l.signer, l.batch.Number) {
			gone = append(gone, l)
		}
	}
	for _, l := range c.links {
		each(l)
	}
	for _, l := range c.loose {
		each(l)
	}
	for _, l := range gone {
		c.drop(l)
	}
	if len(gone) > 0 {
		c.rebuild()
	}
	return dropped || len(gone) > 0
}

// sweep makes the overlay anew after a confirmation, if it may deny what the state
// does not, or if that is less work than it has saved: most of it is confirmed.
func (c *chain) sweep() {
	left := 0
	for _, l := range c.links {
		left += len(l.batch.Entries)
	}
	for _, l := range c.loose {
		left += len(l.batch.Entries)
	}
	if !c.live || c.spent || 2*left <= c.laid {
		c.live = true
		c.rebuild()
	}
}

// rebuild makes the overlay anew from what is still unconfirmed.
func (c *chain) rebuild() {
	if c.base.number > c.confirmed.number {
		// Some of it is folded into base already; the overlay that there is
		// denies at least as much.
		c.spent = true
		return
	}
	c.overlay, c.spent, c.laid, c.newest = nil, false, 0, 0
	for _, l := range c.links {
		c.deny(l)
	}
	for _, l := range c.loose {
		c.deny(l)
	}
}

// reject drops a batch that will never be in the log, or remembers it until
// then. It reports whether anything was dropped.
func (c *chain) reject(h head, until session.Instant) bool {
	l := c.loose[h.hash]
	if l == nil {
		l = c.find(h.hash, h.number)
	}
	if l == nil {
		if h.number > c.base.number {
			c.settle(h.hash, settled{until, true}, 0)
		}
		return false
	}
	c.drop(l)
	c.settle(l.hash, settled{max(until, l.batch.Deadline), true}, 0)
	c.rebuild()
	return true
}

// drop takes a link out; what was chained to it stays, beside the chain.
func (c *chain) drop(l *link) {
	if c.loose[l.hash] != l {
		c.fork(head{l.batch.Number - 1, l.batch.Prev})
	}
	c.unpark(l)
}

// expire drops what is unconfirmed and past its deadline in a log that is known
// to have been without it at fresh. now is the authority's clock.
func (c *chain) expire(fresh, now session.Instant) bool {
	c.forget(now)
	limit := min(fresh, now)
	var late []*link
	for _, l := range c.loose {
		if l.batch.Deadline < limit {
			late = append(late, l)
		}
	}
	for _, l := range c.links {
		if l.batch.Deadline < limit {
			late = append(late, l)
		}
	}
	for _, l := range late {
		c.drop(l)
	}
	if len(late) > 0 {
		c.rebuild()
	}
	return len(late) > 0
}
