package sequencer

import (
	"bytes"
	"errors"
	"slices"
	"sync"

	"github.com/interlock-fabric/interlock/pkg/filter"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// chain is the log as far as it has been examined: the batch that the next one
// must name, and the state there. It is a function of the log and the key sets.
type chain struct {
	epoch, number uint64
	head          session.Hash
	set           *filter.Set
	time, horizon session.Instant
	// news is the newest batch here that did more than revoke canaries.
	news uint64
	// pos is the stream's sequence up to which everything has been examined, at
	// that of the head.
	pos, at uint64
	// carry is the state at the end of the epoch before, while the current one
	// has not restated all of it.
	carry *filter.Set
	// headless: the log was read from where it begins, which is not where an
	// epoch does, so that what was in force before is missing. stale: it was read
	// behind a published segment and has not led up to it so far.
	headless, stale bool
	// signers are the keys that signed the epoch's batches up to number, with the
	// newest of each, ascending by key. None are known behind a published segment
	// that does not say.
	signers []session.Signer
}

// signed notes who signed a batch that becomes the head.
func (c *chain) signed(id session.KeyID, number uint64) {
	if number == 1 {
		c.signers = nil
	} else if len(c.signers) == 0 {
		return
	}
	i, ok := slices.BinarySearchFunc(c.signers, id, func(s session.Signer, id session.KeyID) int { return bytes.Compare(s.Key[:], id[:]) })
	if !ok {
		c.signers = slices.Insert(c.signers, i, session.Signer{Key: id})
	}
	c.signers[i].Last = number
}

// link is a batch of the chain.
type link struct {
	epoch, number uint64
	hash          session.Hash
	key           session.KeyID
	own           bool
}

// hashRing remembers the newest links.
type hashRing struct {
	mu    sync.RWMutex
	links []link
}

func (h *hashRing) put(l link) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.links == nil {
		h.links = make([]link, HashWindow)
	}
	h.links[l.number%HashWindow] = l
}

func (h *hashRing) at(epoch, number uint64) (link, bool) {
	h.mu.RLock()
	defer h.mu.RUnlock()
	if h.links == nil || number == 0 {
		return link{}, false
	}
	l := h.links[number%HashWindow]
	return l, l.number == number && l.epoch == epoch
}

// verdict says what a stored message is to the chain.
type verdict uint8

const (
	garbage  verdict = iota // nobody's
	stray                   // a batch that the chain does not go through
	doubtful                // would extend the chain, if its key were trusted
	extends                 // the next batch
	opens                   // the first batch of a later epoch
	alien                   // signed by a trusted key, and of a form not known here
)

// judged is a stored message that has been looked at.
type judged struct {
	batch *session.Batch
	hash  session.Hash
	key   *session.SigningKey
	id    session.KeyID
}

// judge looks at a stored message. It does not change the chain. A signature is
// only checked when everything else is right, so that garbage is cheap.
func (c *chain) judge(data []byte, e *epochs) (judged, verdict) {
	f, err := session.ParseFrame(data)
	if err != nil || f.Type != session.TypeBatch {
		return judged{}, garbage
	}
	b, err := session.UnmarshalBatch(f.Body)
	if errors.Is(err, session.ErrCritical) && e.signed(&f) {
		return judged{}, alien
	}
	if err != nil {
		return judged{}, garbage
	}
	j := judged{batch: b, hash: f.Hash(), id: f.Key}
	v := extends
	switch {
	case b.Epoch == c.epoch && b.Number == c.number+1 && b.Prev == c.head:
	case b.Epoch > c.epoch && b.Number == 1:
		origin, ok := e.origin(b.Epoch)
		if !ok {
			return j, doubtful
		}
		if origin != b.Prev {
			return j, stray
		}
		v = opens
	default:
		return j, stray
	}
	if j.key, err = e.verify(&f, b); err != nil {
		return j, doubtful
	}
	return j, v
}

// adopt makes a batch that extends or opens the chain its head.
func (c *chain) adopt(j judged, v verdict) {
	b := j.batch
	if v == opens {
		c.begin(b.Epoch, b.Prev)
	}
	c.set = c.set.Apply(b, func(e *session.Entry) bool { return j.key.May(e.Key) })
	c.epoch, c.number, c.head = b.Epoch, b.Number, j.hash
	c.signed(j.id, b.Number)
	c.noteNews(b)
	c.time, c.horizon = max(c.time, b.Time), max(c.horizon, b.Horizon)
	c.stale = false
	if c.epoch == firstEpoch {
		c.carry, c.headless = nil, false // nothing was before it
	}
	if c.carry != nil || c.headless {
		done := restateID(c.epoch, -1)
		for i := range b.Decisions {
			if b.Decisions[i].ID == done {
				c.carry, c.headless = nil, false
			}
		}
	}
}

func (c *chain) noteNews(b *session.Batch) {
	if !b.IsCanary() {
		c.news = b.Number
	}
}

// begin starts an epoch: what is in force is to be restated in it.
func (c *chain) begin(epoch uint64, origin session.Hash) {
	carry := c.set
	if c.carry != nil {
		// The epoch before ended in the middle of its own restatement.
		b := &session.Batch{Epoch: c.epoch, Number: c.number, Time: c.time, Entries: restate(c.carry)}
		carry = carry.Apply(b, nil)
	}
	if carry.Len() == 0 {
		carry = &filter.Set{}
	}
	if c.epoch == 0 && !c.headless {
		carry = nil // the first epoch has nothing before it
	}
	c.epoch, c.number, c.head, c.set, c.carry, c.at, c.news = epoch, 0, origin, nil, carry, 0, 0
}

// firstEpoch is the number of the first epoch.
const firstEpoch = 1
