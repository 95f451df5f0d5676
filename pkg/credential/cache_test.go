package credential_test

import (
	"crypto/ed25519"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/google/go-cmp/cmp"

	"github.com/interlock-fabric/interlock/pkg/credential"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// clock is a clock that a test sets.
type clock struct{ atomic.Pointer[time.Time] }

func newClock(t time.Time) *clock {
	c := &clock{}
	c.set(t)
	return c
}

func (c *clock) set(t time.Time) { c.Store(&t) }
func (c *clock) now() time.Time  { return *c.Load() }

func with(c *clock) func(*credential.Options) {
	return func(o *credential.Options) { o.Clock = c.now }
}

// seen verifies a token, and returns once the cache keeps it.
func seen(t testing.TB, v *credential.Verifier, token string) session.Identity {
	t.Helper()
	id, err := v.Verify(t.Context(), token)
	if err != nil {
		t.Fatal(err)
	}
	v.Settle()
	if !v.Kept(token) {
		t.Fatal("the token was not kept")
	}
	return id
}

func hits(v *credential.Verifier) uint64 { return v.CacheStats().Hits }

func TestSeenTokenIsNotVerifiedAgain(t *testing.T) {
	s := newSigner(t)
	v := newVerifier(t, []jose.JSONWebKey{s.public()})
	token := s.sign(claims(map[string]any{"jti": nil, "session_ancestors": []string{"a", "b", "c"}}))
	first := seen(t, v, token)
	second, err := v.Verify(t.Context(), token)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(first, second); diff != "" {
		t.Fatal(diff)
	}
	stats := v.CacheStats()
	if stats.Hits != 1 || stats.Misses != 1 || stats.Bytes <= 0 || stats.MaxBytes != credential.DefaultCacheBytes {
		t.Fatalf("%+v", stats)
	}
	// What one caller makes of its identity is not what the next one gets.
	_ = append(second.Ancestors, session.SessionRef{ID: "d"})
	third, err := v.Verify(t.Context(), token)
	if err != nil || cap(third.Ancestors) != 3 {
		t.Fatal(third.Ancestors[:cap(third.Ancestors)], err)
	}
}

func TestNothingIsKeptWithoutACache(t *testing.T) {
	s := newSigner(t)
	v := newVerifier(t, []jose.JSONWebKey{s.public()}, func(o *credential.Options) { o.CacheBytes = -1 })
	for range 2 {
		if _, err := v.Verify(t.Context(), s.sign(claims(nil))); err != nil {
			t.Fatal(err)
		}
	}
	if stats := v.CacheStats(); stats != (credential.CacheStats{}) {
		t.Fatalf("%+v", stats)
	}
}

// ristretto compares 64 bits. Whoever finds a token that has those of another,
// or gets at what is kept under them, must not be taken for its bearer.
func TestTokenWithTheHashOfAnotherIsNotBelieved(t *testing.T) {
	s := newSigner(t)
	v := newVerifier(t, []jose.JSONWebKey{s.public()})
	root := s.sign(claims(map[string]any{"sub": "root"}))
	seen(t, v, root)

	forged := newSigner(t).sign(claims(nil))
	v.Collide(forged, root)
	if id, err := v.Verify(t.Context(), forged); !errors.Is(err, credential.ErrTokenSignature) {
		t.Fatal(id.User, err)
	}
	good := s.sign(claims(nil))
	v.Collide(good, root)
	for range 2 { // the second time, from the cache
		if id, err := v.Verify(t.Context(), good); err != nil || id.User != "ann" {
			t.Fatal(id.User, err)
		}
		v.Settle()
	}
	if n := hits(v); n != 1 {
		t.Fatalf("%d hits", n)
	}
}

func TestTimesAreCheckedOnEveryHit(t *testing.T) {
	s := newSigner(t)
	c := newClock(epoch)
	v := newVerifier(t, []jose.JSONWebKey{s.public()}, with(c))
	token := s.sign(claims(map[string]any{"nbf": epoch.Unix()}))
	seen(t, v, token)
	last := epoch.Add(time.Hour + 30*time.Second) // exp and skew
	for _, step := range []struct {
		at   time.Time
		want error
	}{
		{last.Add(-time.Nanosecond), nil},
		{last, credential.ErrTokenExpired},
		{epoch.Add(-30 * time.Second), nil},
		{epoch.Add(-30*time.Second - time.Nanosecond), credential.ErrTokenNotYet},
	} {
		c.set(step.at)
		before := hits(v)
		if _, err := v.Verify(t.Context(), token); !errors.Is(err, step.want) {
			t.Fatalf("%v: %v", step.at.Sub(epoch), err)
		}
		if hits(v) != before+1 {
			t.Fatal("not from the cache")
		}
	}
}

func TestAudienceIsCheckedOnEveryHit(t *testing.T) {
	const other = "https://other.example"
	s := newSigner(t)
	v := newVerifier(t, []jose.JSONWebKey{s.public()}, func(o *credential.Options) { o.Audiences = append(o.Audiences, other) })
	here, err := v.For(audience)
	if err != nil {
		t.Fatal(err)
	}
	there, err := v.For(other)
	if err != nil {
		t.Fatal(err)
	}
	token, both := s.sign(claims(nil)), s.sign(claims(map[string]any{"aud": []string{other, audience}}))
	seen(t, here, token)
	seen(t, here, both)
	if _, err := there.Verify(t.Context(), token); !errors.Is(err, credential.ErrTokenAudience) {
		t.Fatal(err)
	}
	if _, err := there.Verify(t.Context(), both); err != nil {
		t.Fatal(err)
	}
	if n := hits(v); n != 2 {
		t.Fatalf("%d hits", n)
	}
	if _, err := v.For("https://unknown.example"); !errors.Is(err, session.ErrInvalid) {
		t.Fatal(err)
	}
	if _, err := new(credential.Verifier).For(audience); !errors.Is(err, session.ErrInvalid) {
		t.Fatal(err)
	}
}

func TestPossessionIsAskedOnEveryHit(t *testing.T) {
	s := newSigner(t)
	var asked int
	proof := error(nil)
	v := newVerifier(t, []jose.JSONWebKey{s.public()}, func(o *credential.Options) {
		o.Possession = func(*http.Request, string, session.Identity) error { asked++; return proof }
	})
	bound := s.sign(claims(map[string]any{"cnf": map[string]any{"jkt": base64.RawURLEncoding.EncodeToString(make([]byte, 32))}}))
	seen(t, v, bound)
	proof = errors.New("no proof")
	if _, err := v.Verify(t.Context(), bound); !errors.Is(err, credential.ErrTokenPossession) || asked != 2 || hits(v) != 1 {
		t.Fatal(err, asked, hits(v))
	}
}

// A key that is no longer the issuer's vouches for nothing, however many tokens
// that it signed are known.
func TestKeysVouchOnEveryHit(t *testing.T) {
	for name, c := range map[string]struct {
		then func(*jwks, *signer)
		want error
		hit  bool
	}{
		"still there":            {func(j *jwks, s *signer) { o := *newSigner(t); o.kid = "k2"; j.set(o.public(), s.public()) }, nil, true},
		"rotated out":            {func(j *jwks, s *signer) { o := *newSigner(t); o.kid = "k2"; j.set(o.public()) }, credential.ErrTokenKey, false},
		"another under its name": {func(j *jwks, s *signer) { j.set(newSigner(t).public()) }, credential.ErrTokenSignature, false},
		"under another name":     {func(j *jwks, s *signer) { o := *s; o.kid = "k2"; j.set(o.public()) }, credential.ErrTokenKey, false},
		"for encryption now":     {func(j *jwks, s *signer) { k := s.public(); k.Use = "enc"; j.set(k) }, credential.ErrTokenKey, false},
		"no keys at all":         {func(j *jwks, _ *signer) { j.body.Store(`{"keys":[]}`) }, credential.ErrTokenKey, false},
		"unreachable":            {func(j *jwks, _ *signer) { j.status.Store(http.StatusBadGateway) }, nil, true},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newSigner(t)
				j := &jwks{}
				j.set(s.public())
				v := remoteVerifier(t, j)
				defer v.Close()
				token := fresh(s)
				seen(t, v, token)
				c.then(j, s)
				// A hit in the second half of the keys' age has them fetched.
				time.Sleep(31 * time.Minute)
				if _, err := v.Verify(t.Context(), token); err != nil {
					t.Fatal(err)
				}
				synctest.Wait()
				if n := j.fetches.Load(); n != 2 {
					t.Fatalf("%d fetches", n)
				}
				before := hits(v)
				if _, err := v.Verify(t.Context(), token); !errors.Is(err, c.want) || (hits(v) > before) != c.hit {
					t.Fatal(err, hits(v)-before)
				}
			})
		})
	}
}

// However many hits there are, an issuer that cannot be reached is asked once
// per interval, and vouches for no more than KeysMaxAge.
func TestSeenTokenEndsWithTheAgeOfItsKeys(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSigner(t)
		j := &jwks{}
		j.set(s.public())
		v := remoteVerifier(t, j)
		defer v.Close()
		token := fresh(s)
		seen(t, v, token)
		j.status.Store(http.StatusServiceUnavailable)
		time.Sleep(time.Hour - time.Nanosecond)
		for range 10 {
			if _, err := v.Verify(t.Context(), token); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
		}
		if n := j.fetches.Load(); n != 2 || hits(v) != 10 {
			t.Fatalf("%d fetches, %d hits", n, hits(v))
		}
		time.Sleep(time.Nanosecond)
		if _, err := v.Verify(t.Context(), token); !errors.Is(err, credential.ErrTokenKeys) {
			t.Fatal(err)
		}
		// The same key again: what it signed is known again.
		j.status.Store(http.StatusOK)
		time.Sleep(15 * time.Second)
		seen(t, v, fresh(s))
	})
}

func TestRefusalsAreNotKept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, next := newSigner(t), newSigner(t)
		next.kid = "k2"
		j := &jwks{}
		j.set(s.public())
		v := remoteVerifier(t, j)
		defer v.Close()
		token := fresh(next)
		for name, bad := range map[string]string{
			"unknown key": token, "another key": fresh(newSigner(t)),
			"other audience": s.sign(claims(map[string]any{"aud": "https://other.example", "iat": nil, "exp": time.Now().Unix() + 60})),
			"expired":        s.sign(claims(map[string]any{"iat": nil, "exp": time.Now().Unix() - 60})),
		} {
			if _, err := v.Verify(t.Context(), bad); err == nil || v.Kept(bad) {
				t.Errorf("%s: %v", name, err)
			}
		}
		v.Settle()
		if stats := v.CacheStats(); stats.Bytes != 0 {
			t.Fatalf("%+v", stats)
		}
		j.set(next.public())
		time.Sleep(15 * time.Second)
		if _, err := v.Verify(t.Context(), token); err != nil {
			t.Fatal(err)
		}
	})
}

func request(token string) *http.Request {
	r := httptest.NewRequest(http.MethodPost, "/", nil)
	r.Header.Set("Authorization", "Bearer "+token)
	return r
}

func secret(t testing.TB, id session.TenantID, tenant string, key byte) *session.TenantSecret {
	s, err := session.NewTenantSecret(id, tenant, []byte(strings.Repeat(string(key), 32)))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// A prepared identity is worth something only to the enforcer that made it.
func TestPreparedIdentityIsWhoAskedOnes(t *testing.T) {
	s := newSigner(t)
	v := newVerifier(t, []jose.JSONWebKey{s.public()})
	r := request(s.sign(claims(nil)))
	one, two := secret(t, 1, "acme", 'a'), secret(t, 1, "acme", 'b')
	prepare := func(by *session.TenantSecret) *session.Prepared {
		t.Helper()
		p, err := v.PrepareRequest(r, by)
		if err != nil || !p.By(by) {
			t.Fatal(err)
		}
		v.Settle()
		return p
	}
	first := prepare(one)
	if prepare(one) != first {
		t.Fatal("prepared again")
	}
	// The tenant's key was replaced, and the enforcer with it.
	second := prepare(two)
	if prepare(two) != second {
		t.Fatal("prepared again")
	}
	prepare(one)

	if _, err := v.PrepareRequest(r, secret(t, 2, "other", 'a')); !errors.Is(err, session.ErrNoIdentity) {
		t.Fatal(err)
	}
	if p := prepare(one); !p.Valid() {
		t.Fatal("a refusal was kept")
	}
	if _, err := v.PrepareRequest(r, nil); !errors.Is(err, session.ErrInvalid) {
		t.Fatal(err)
	}
	// Not a pointer, and not comparable.
	for range 2 {
		if p, err := v.PrepareRequest(r, byValue{[]*session.TenantSecret{two}}); err != nil || !p.By(two) {
			t.Fatal(err)
		}
	}
}

type byValue struct{ secrets []*session.TenantSecret }

func (b byValue) Prepare(id session.Identity) (*session.Prepared, error) {
	return b.secrets[0].Prepare(id)
}

func TestHitAllocatesNothing(t *testing.T) {
	s := newSigner(t)
	c := newClock(epoch)
	v := newVerifier(t, []jose.JSONWebKey{s.public()}, with(c))
	token := s.sign(claims(nil))
	seen(t, v, token)
	r, by := request(token), secret(t, 1, "acme", 'a')
	var p *session.Prepared
	n := testing.AllocsPerRun(1000, func() {
		var err error
		if p, err = v.PrepareRequest(r, by); err != nil {
			t.Fatal(err)
		}
	})
	if n != 0 || !p.Valid() {
		t.Fatalf("%v allocations", n)
	}
}

// edSigner signs fast, for floods.
func edSigner(t testing.TB) *signer {
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return &signer{t: t, key: key, alg: jose.EdDSA, kid: "k1", typ: "at+jwt"}
}

func heap() int64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// A flood of valid tokens takes no more memory than was agreed, and what the
// cache says it takes is what it takes.
func TestFloodIsBounded(t *testing.T) {
	const bound, tokens = 2 << 20, 3000
	s := edSigner(t)
	by := secret(t, 1, "acme", 'a')
	for name, change := range map[string]map[string]any{
		"small": {},
		"large": {
			"roles": strings.Fields(strings.Repeat("role ", 30)), "scope": strings.Repeat("a-scope:of-some-length ", 5),
			"act": map[string]any{"sub": "agent-1", "act": map[string]any{"sub": "agent-2"}}, "session_ancestors": []string{"a", "b"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			v := newVerifier(t, []jose.JSONWebKey{s.public()}, func(o *credential.Options) { o.CacheBytes = bound })
			before := heap()
			var wg sync.WaitGroup
			for w := range 4 {
				wg.Go(func() {
					c := map[string]any{}
					for k, v := range change {
						c[k] = v
					}
					for i := range tokens / 4 {
						c["jti"] = fmt.Sprint("token-", w, "-", i)
						if _, err := v.PrepareRequest(request(s.sign(claims(c))), by); err != nil {
							t.Error(err)
							return
						}
						if i%100 == 0 {
							if stats := v.CacheStats(); stats.Bytes > bound {
								t.Errorf("%+v", stats)
							}
						}
					}
				})
			}
			wg.Wait()
			v.Settle()
			stats, taken := v.CacheStats(), heap()-before
			t.Logf("%d bytes of heap, %+v", taken, stats)
			if stats.Bytes > bound || stats.Bytes < bound/2 || stats.Misses != tokens || v.Pending() != 0 {
				t.Fatalf("%+v, %d pending", stats, v.Pending())
			}
			if taken > stats.Bytes {
				t.Fatalf("%d bytes of heap for %d reckoned", taken, stats.Bytes)
			}
			runtime.KeepAlive(v)
		})
	}
}

// Everything at once: hits, misses, rotation, expiry, other audiences and Close.
// Whoever is let in has a token that was good.
func TestCacheUnderConcurrentUse(t *testing.T) {
	s, next := newSigner(t), newSigner(t)
	next.kid = "k2"
	j := &jwks{}
	j.set(s.public())
	c := newClock(epoch)
	v := newVerifier(t, nil, func(o *credential.Options) {
		remote(o, "https://id.example/jwks")
		o.Issuers[0].RefreshInterval = time.Nanosecond
		o.HTTP, o.Clock, o.CacheBytes = &http.Client{Transport: j}, c.now, 64<<10
	})
	by := secret(t, 1, "acme", 'a')
	var tokens, forged []string
	for i := range 50 {
		cl := claims(map[string]any{"sub": strconv.Itoa(i), "jti": strconv.Itoa(i)})
		tokens = append(tokens, s.sign(cl))
		forged = append(forged, newSigner(t).sign(cl))
	}
	seen(t, v, tokens[0])
	if _, err := v.Verify(t.Context(), tokens[0]); err != nil || hits(v) != 1 {
		t.Fatal(err, hits(v))
	}
	var workers, others sync.WaitGroup
	stop := make(chan struct{})
	for w := range 4 {
		workers.Go(func() {
			for i := range 500 {
				n := (i*7 + w) % len(tokens)
				if p, err := v.PrepareRequest(request(tokens[n]), by); err == nil {
					if got := p.Identity().User; got != strconv.Itoa(n) {
						t.Errorf("token %d is taken for %s", n, got)
					}
				} else if !errors.Is(err, credential.ErrTokenKey) && !errors.Is(err, credential.ErrTokenKeys) {
					t.Error(err)
				}
				if i%10 == 0 {
					if _, err := v.Verify(t.Context(), forged[n]); err == nil {
						t.Error("a forged token was let in")
					}
				}
				_ = v.CacheStats()
			}
		})
	}
	others.Go(func() { // rotates
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			if i%2 == 0 {
				j.set(next.public())
			} else {
				j.set(s.public())
			}
			c.set(c.now().Add(time.Millisecond))
			_, _ = v.Verify(t.Context(), forged[0]) // may fetch
			runtime.Gosched()
		}
	})
	workers.Wait()
	close(stop)
	others.Wait()

	// Closed under its users.
	for range 4 {
		workers.Go(func() {
			for i := range 200 {
				_, _ = v.Verify(t.Context(), tokens[i%len(tokens)])
			}
		})
	}
	workers.Go(v.Close)
	workers.Go(v.Close)
	workers.Wait()
	if _, err := v.Verify(t.Context(), tokens[0]); !errors.Is(err, credential.ErrTokenKeys) {
		t.Fatal(err)
	}
}
