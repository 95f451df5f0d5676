package credential

import "time"

// Settle waits until the cache has taken up what it was given.
func (v *Verifier) Settle() { v.cache.tokens.Wait() }

// Kept reports whether a token is in the cache.
func (v *Verifier) Kept(token string) bool {
	sum := sumOf(token)
	return v.cache.get(&sum) != nil
}

// Collide has the cache answer for one token with what it keeps of another, as
// if the two had the same 64 bits of hash.
func (v *Verifier) Collide(token, other string) {
	a, b := sumOf(token), sumOf(other)
	t := v.cache.get(&b)
	if t == nil {
		panic("nothing is kept of the other token")
	}
	v.cache.tokens.Set(keyOf(&a), t, 1)
	v.cache.tokens.Wait()
	if got, ok := v.cache.tokens.Get(keyOf(&a)); !ok || got != t {
		panic("no collision")
	}
}

// Pending is how many tokens wait to be taken up by the cache.
func (v *Verifier) Pending() int64 { return v.cache.pending.Load() }

// Seen is a store of seen proofs by itself.
type Seen struct{ s *seenProofs }

// NewSeen makes one as a checker does.
func NewSeen(most int, maxAge time.Duration, now time.Time) *Seen {
	return &Seen{newSeenProofs(most, maxAge, now)}
}

// Add remembers a proof.
func (s *Seen) Add(key [32]byte, jti string, iat, now time.Time) error {
	return s.s.add(key, jti, iat, now)
}
