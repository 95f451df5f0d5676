package credential

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"reflect"
	"slices"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/dgraph-io/ristretto/v2"

	"github.com/interlock-fabric/interlock/pkg/session"
)

const (
	// DefaultCacheBytes is what verified tokens may take of memory: some forty
	// thousand of ordinary size.
	DefaultCacheBytes = 64 << 20
	// maxCached is how long a token is kept at most, in use or not. It also
	// bounds the expiry times that the cache keeps lists for.
	maxCached = time.Hour
	// maxPending bounds the tokens that wait to be taken up by the cache, which
	// its own bound does not count.
	maxPending = 1024
	// cacheOverhead is what the cache itself and the allocator take for a token.
	cacheOverhead = 256
	// costPerCounter is how many bytes of room in the cache go with one of the
	// counters by which it tells tokens in use from others: some ten counters
	// of three bytes for a token of ordinary size.
	costPerCounter = 160
)

// verified is a token whose signature verified, with what is kept of it. All but
// prepared is immutable.
type verified struct {
	sum         [sha256.Size]byte // of the whole token
	issuer      *issuer
	key         *verificationKey // that signed it; nil for an opaque token
	asked, good time.Time        // when the issuer was asked about an opaque token, and until when that holds
	audiences   []string         // those of the options that it was issued for
	from, until time.Time        // nbf, iat and exp, with the issuer's skew; zero where there is none
	bound       bool             // to a key (cnf)
	id          session.Identity
	prepared    atomic.Pointer[prepared]
	cost        int64
}

// prepared is an identity with its keys, and who derived them: another's secrets
// are others, and so are its keys.
type prepared struct {
	by Preparer
	p  *session.Prepared
}

// vouched reports whether what was found out about the token may still be
// believed.
func (t *verified) vouched(now time.Time) bool {
	if t.key == nil {
		// A clock that went back makes the age unknown.
		return !now.Before(t.asked) && now.Before(t.good)
	}
	return t.issuer.keys.vouches(t.key, now)
}

func (t *verified) prepare(by Preparer) (*session.Prepared, error) {
	if by == nil {
		return nil, fmt.Errorf("%w: credential: nobody to prepare the identity", session.ErrInvalid)
	}
	// Interfaces that hold anything else may not be comparable.
	kept := reflect.TypeOf(by).Kind() == reflect.Pointer
	if kept {
		if have := t.prepared.Load(); have != nil && have.by == by {
			return have.p, nil
		}
	}
	p, err := by.Prepare(t.id)
	if err == nil && kept {
		t.prepared.Store(&prepared{by, p})
	}
	return p, err
}

// tokenCache finds verified tokens again. What it forgets is verified anew, so
// nothing depends on what it keeps: ristretto drops what comes too fast, and
// what it thinks is used less. A nil cache keeps nothing.
//
// ristretto finds a value by 64 bits of the token's SHA-256 and compares no more
// than that; get compares the rest.
type tokenCache struct {
	tokens  *ristretto.Cache[uint64, *verified]
	pending atomic.Int64
	closing sync.Once
	stripes [16]stripe
}

// stripe is a share of what all requests touch, so that they seldom touch the
// same.
type stripe struct {
	// open is read-locked by whoever uses the cache, for less than a
	// microsecond and without waiting, and locked by close: ristretto must not
	// be closed under its users.
	open         sync.RWMutex
	closed       bool
	hits, misses atomic.Uint64
	_            [64]byte
}

func newTokenCache(size int64) (*tokenCache, error) {
	switch {
	case size < 0:
		return nil, nil
	case size == 0:
		size = DefaultCacheBytes
	}
	c := &tokenCache{}
	var err error
	c.tokens, err = ristretto.NewCache(&ristretto.Config[uint64, *verified]{
		NumCounters: max(size/costPerCounter, 64), MaxCost: size, BufferItems: 64, IgnoreInternalCost: true,
		// Nobody asks how long ago a token that is not found has expired: every
		// minute is often enough to clear them away.
		TtlTickerDurationInSec: 120,
		// Asked once for each token that is taken up, or refused.
		Cost: func(t *verified) int64 { c.pending.Add(-1); return t.cost },
	})
	if err != nil {
		return nil, fmt.Errorf("token cache: %w", err)
	}
	return c, nil
}

// sumOf is the SHA-256 of a token, without a copy of it.
func sumOf(token string) [sha256.Size]byte {
	return sha256.Sum256(unsafe.Slice(unsafe.StringData(token), len(token))) //nolint:gosec // it only reads
}

func keyOf(sum *[sha256.Size]byte) uint64 { return binary.LittleEndian.Uint64(sum[:]) }

// stripe picks one at random, so that a token which all use is no bottleneck.
func (c *tokenCache) stripe() *stripe {
	return &c.stripes[rand.Uint32()%uint32(len(c.stripes))] //nolint:gosec // no secret
}

// enter returns a stripe, to be left with RUnlock, or nil when the cache is
// closed or about to be.
func (c *tokenCache) enter() *stripe {
	s := c.stripe()
	if !s.open.TryRLock() {
		return nil
	}
	if s.closed {
		s.open.RUnlock()
		return nil
	}
	return s
}

func (c *tokenCache) get(sum *[sha256.Size]byte) *verified {
	if c == nil {
		return nil
	}
	key := keyOf(sum)
	s := c.enter()
	if s == nil {
		return nil
	}
	defer s.open.RUnlock()
	if t, ok := c.tokens.Get(key); ok && t.sum == *sum {
		return t
	}
	return nil
}

// count counts a token that was found and is still vouched for, or was not.
func (c *tokenCache) count(hit bool) {
	switch {
	case c == nil:
	case hit:
		c.stripe().hits.Add(1)
	default:
		c.stripe().misses.Add(1)
	}
}

func (c *tokenCache) put(sum *[sha256.Size]byte, t *verified, now time.Time) {
	if c == nil {
		return
	}
	t.sum = *sum
	t.seal()
	ttl := maxCached
	for _, end := range []time.Time{t.until, t.good} {
		if !end.IsZero() {
			ttl = min(ttl, end.Sub(now))
		}
	}
	key := keyOf(sum)
	s := c.enter()
	if s == nil {
		return
	}
	defer s.open.RUnlock()
	if ttl <= 0 || c.pending.Add(1) > maxPending || !c.tokens.SetWithTTL(key, t, 0, ttl) {
		if ttl > 0 {
			c.pending.Add(-1)
		}
	}
}

// close joins ristretto's goroutines, once nobody is in it and nobody can enter.
func (c *tokenCache) close() {
	if c == nil {
		return
	}
	c.closing.Do(func() {
		for i := range c.stripes {
			s := &c.stripes[i]
			s.open.Lock()
			s.closed = true
			s.open.Unlock()
		}
		c.tokens.Close()
	})
}

// seal makes the identity fit to be shared, and reckons what it takes to keep
// it: the strings it holds, the lists, and the keys that will be prepared.
func (t *verified) seal() {
	id := &t.id
	keys := 0
	size := func(s ...*string) {
		for _, s := range s {
			t.cost += int64(len(*s))
			keys++
		}
	}
	t.cost = cacheOverhead + int64(unsafe.Sizeof(*t)) + int64(cap(t.audiences))*16
	size(&id.Issuer, &id.Token, &id.User, &id.Client, &id.Blueprint, &id.Owner, &id.ACR, &id.Session.ID, &id.Session.Issuer)
	// A list that a caller appends to must not grow into what others read.
	for _, list := range []*[]string{&id.Keys, &id.Credentials, &id.Digests, &id.Roles, &id.Capabilities} {
		*list = slices.Clip(*list)
		for i := range *list {
			size(&(*list)[i])
		}
	}
	id.Ancestors, id.Actors = slices.Clip(id.Ancestors), slices.Clip(id.Actors)
	for i := range id.Ancestors {
		size(&id.Ancestors[i].ID, &id.Ancestors[i].Issuer)
	}
	for i := range id.Actors {
		size(&id.Actors[i].ID, &id.Actors[i].Issuer)
	}
	// Two words of header for each string, and twice a key for the slices that
	// grew to hold the prepared ones.
	t.cost += int64(keys) * int64(16+2*unsafe.Sizeof(session.Key{}))
	t.cost += int64(unsafe.Sizeof(session.Prepared{}) + unsafe.Sizeof(prepared{}))
}

// CacheStats says how a verifier's token cache fares.
type CacheStats struct {
	// Hits counts requests whose token need not be verified, and Misses those
	// whose token had to be, was refused for its form or key included.
	Hits, Misses uint64
	// Bytes is what the tokens in the cache take, reckoned so as to be no less
	// than what they do take, and MaxBytes the most that they may.
	Bytes, MaxBytes int64
}

// CacheStats reports on the cache of verified tokens; all is zero where there
// is none.
func (v *Verifier) CacheStats() (s CacheStats) {
	if v.shared == nil || v.cache == nil {
		return s
	}
	for i := range v.cache.stripes {
		s.Hits += v.cache.stripes[i].hits.Load()
		s.Misses += v.cache.stripes[i].misses.Load()
	}
	s.MaxBytes = v.cache.tokens.MaxCost()
	s.Bytes = s.MaxBytes - v.cache.tokens.RemainingCost()
	return s
}
