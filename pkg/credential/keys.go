package credential

import (
	"context"
	"crypto"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/json"
)

// Bounds of a fetched key set.
const (
	maxKeySetLen = 256 << 10
	maxKeys      = 64
	fetchTimeout = 5 * time.Second
	// maxTries bounds the signatures that are verified for a token that does
	// not name its key.
	maxTries = 4
)

// verificationKey is one key of an issuer. While a key stays in the issuer's
// set it stays the same value in memory, over any number of fetches, so that
// what it vouched for can be told by its address.
type verificationKey struct {
	jose.JSONWebKey
	// id is the thumbprint (RFC 7638), which says nothing of kid, alg and use.
	id [sha256.Size]byte
}

func newVerificationKey(k jose.JSONWebKey) (*verificationKey, error) {
	if err := usable(&k); err != nil {
		return nil, err
	}
	sum, err := k.Thumbprint(crypto.SHA256)
	if err != nil {
		return nil, err
	}
	return &verificationKey{JSONWebKey: k, id: [sha256.Size]byte(sum)}, nil
}

func (k *verificationKey) same(o *verificationKey) bool {
	return k.id == o.id && k.KeyID == o.KeyID && k.Algorithm == o.Algorithm && k.Use == o.Use
}

type staticKeys []*verificationKey

func newStaticKeys(set jose.JSONWebKeySet) (keys staticKeys, err error) {
	for i := range set.Keys {
		k, err := newVerificationKey(set.Keys[i])
		if err != nil {
			return nil, fmt.Errorf("keys: %w", err)
		}
		keys = append(keys, k)
	}
	return keys, nil
}

func (s staticKeys) find(_ context.Context, kid string, alg jose.SignatureAlgorithm) ([]*verificationKey, error) {
	if found := candidates(s, kid, alg); len(found) > 0 {
		return found, nil
	}
	return nil, ErrTokenKey
}

func (s staticKeys) vouches(k *verificationKey, _ time.Time) bool { return slices.Contains(s, k) }

func (staticKeys) close() {}

func candidates(keys []*verificationKey, kid string, alg jose.SignatureAlgorithm) (found []*verificationKey) {
	for _, k := range keys {
		if (kid == "" || k.KeyID == kid) && fits(&k.JSONWebKey, alg) && len(found) < maxTries {
			found = append(found, k)
		}
	}
	return found
}

// remoteKeys are the keys at a JWKS URL (RFC 7517 §5). Lookups read one atomic
// pointer; a miss, or keys that have reached half their age, start a fetch.
// There is at most one fetch at a time and one per interval, whatever the
// number of callers: a stranger who invents key ids must not make us hammer the
// issuer.
type remoteKeys struct {
	// fetch is bounded in time, and ends when the verifier closes.
	fetch    func() ([]*verificationKey, error)
	clock    func() time.Time
	interval time.Duration
	maxAge   time.Duration
	wg       sync.WaitGroup

	current atomic.Pointer[fetched]
	// quiet is when the next fetch may begin, in nanoseconds of Unix time. It
	// repeats last for those who must not wait for mu.
	quiet atomic.Int64

	mu       sync.Mutex
	closed   bool
	inFlight chan struct{} // closed when the fetch under way has ended
	last     time.Time     // when the last fetch began
}

type fetched struct {
	keys []*verificationKey
	at   time.Time
}

// age says whether the keys may be used, and whether they are in the first half
// of their age.
func (f *fetched) age(now time.Time, limit time.Duration) (usable, fresh bool) {
	if f == nil {
		return false, false
	}
	// A clock that went back makes the age unknown, and unknown is too old.
	age := now.Sub(f.at)
	return age >= 0 && age < limit, age >= 0 && age < limit/2
}

func newClient() *http.Client {
	return &http.Client{
		Transport:     &http.Transport{Proxy: http.ProxyFromEnvironment, DisableKeepAlives: true, TLSHandshakeTimeout: fetchTimeout},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

// endpoint checks the URL of something that an issuer serves. Whoever can alter
// what it answers can make tokens.
func endpoint(what, s string) error {
	u, err := url.Parse(s)
	if err != nil || u.Host == "" || u.User != nil {
		return errors.New(what + " is not a URL with a host and no user")
	}
	if ip := net.ParseIP(u.Hostname()); u.Scheme != "https" && (u.Scheme != "http" || u.Hostname() != "localhost" && !ip.IsLoopback()) {
		return errors.New(what + " must be https")
	}
	return nil
}

func newRemoteKeys(ctx context.Context, client *http.Client, clock func() time.Time, i *Issuer) (*remoteKeys, error) {
	what, known := "JWKS", i.JWKS
	if i.Discover != nil {
		what, known = "the issuer", i.URL
	}
	if err := endpoint(what, known); err != nil {
		return nil, err
	}
	fetch := func() ([]*verificationKey, error) {
		ctx, cancel := context.WithTimeout(ctx, fetchTimeout)
		defer cancel()
		jwks := i.JWKS
		if i.Discover != nil {
			var err error
			if jwks, err = i.Discover(ctx, client, i.URL); err != nil {
				return nil, err
			}
			if err := endpoint("the JWKS of the issuer", jwks); err != nil {
				return nil, err
			}
		}
		return fetchKeys(ctx, client, jwks)
	}
	return &remoteKeys{fetch: fetch, clock: clock, interval: i.RefreshInterval, maxAge: i.KeysMaxAge}, nil
}

func (s *remoteKeys) find(ctx context.Context, kid string, alg jose.SignatureAlgorithm) ([]*verificationKey, error) {
	have, fresh := s.load()
	if found := candidates(have, kid, alg); len(found) > 0 {
		if !fresh {
			_, _ = s.refresh() // and go on with what there is
		}
		return found, nil
	}
	done, err := s.refresh()
	if err != nil {
		return nil, err
	}
	if done != nil {
		select {
		case <-done:
		case <-ctx.Done():
			return nil, ErrTokenKeys.because("the caller went away")
		}
		have, _ = s.load()
	}
	if found := candidates(have, kid, alg); len(found) > 0 {
		return found, nil
	}
	if have == nil {
		return nil, ErrTokenKeys
	}
	return nil, ErrTokenKey
}

// load returns the keys, or nil when there are none that may be used any more,
// and whether they are in the first half of their age.
func (s *remoteKeys) load() (keys []*verificationKey, fresh bool) {
	f := s.current.Load()
	usable, fresh := f.age(s.clock(), s.maxAge)
	if !usable {
		return nil, false
	}
	return f.keys, fresh
}

// vouches reports whether a key is still the issuer's, by keys that may still
// be used. It waits for nothing. In the second half of their age it has them
// fetched, which those who were verified long ago would otherwise never do.
func (s *remoteKeys) vouches(k *verificationKey, now time.Time) bool {
	f := s.current.Load()
	usable, fresh := f.age(now, s.maxAge)
	if !usable || !slices.Contains(f.keys, k) {
		return false
	}
	if !fresh && now.UnixNano() >= s.quiet.Load() {
		_, _ = s.refresh()
	}
	return true
}

// refresh starts a fetch, or finds the one under way. The channel is closed
// when it has ended; it is nil when the last one is too recent.
func (s *remoteKeys) refresh() (<-chan struct{}, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, ErrTokenKeys.because("the verifier is closed")
	}
	if s.inFlight != nil {
		return s.inFlight, nil
	}
	now := s.clock()
	if since := now.Sub(s.last); !s.last.IsZero() && since >= 0 && since < s.interval {
		return nil, nil
	}
	s.last = now
	s.quiet.Store(now.Add(s.interval).UnixNano())
	done := make(chan struct{})
	s.inFlight = done
	s.wg.Go(func() {
		// A failed fetch leaves the keys as they are until their age ends;
		// callers learn of it from the keys that are not there.
		if keys, err := s.fetch(); err == nil {
			s.current.Store(&fetched{keys: s.keep(keys), at: now})
		}
		s.mu.Lock()
		s.inFlight = nil
		s.mu.Unlock()
		close(done)
	})
	return done, nil
}

// keep puts the keys that are there already in the place of their equals.
func (s *remoteKeys) keep(keys []*verificationKey) []*verificationKey {
	f := s.current.Load()
	if f == nil {
		return keys
	}
	for i, k := range keys {
		if at := slices.IndexFunc(f.keys, k.same); at >= 0 {
			keys[i] = f.keys[at]
		}
	}
	return keys
}

func fetchKeys(ctx context.Context, client *http.Client, url string) ([]*verificationKey, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Accept", "application/jwk-set+json, application/json")
	body, err := answer(client, req, maxKeySetLen)
	if err != nil {
		return nil, err
	}
	return parseKeySet(body)
}

// answer returns the body of what an issuer answers, if that is 200 and no
// longer than limit.
func answer(client *http.Client, req *http.Request, limit int) ([]byte, error) {
	resp, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("status %d", resp.StatusCode)
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, int64(limit)+1))
	if err != nil {
		return nil, err
	}
	if len(body) > limit {
		return nil, errors.New("the answer is too long")
	}
	return body, nil
}

// parseKeySet reads a JWKS. Keys that it does not know or must not use are left
// out, as RFC 7517 §5 asks: one new key type must not lose the others.
func parseKeySet(body []byte) ([]*verificationKey, error) {
	var set struct {
		Keys []json.RawMessage `json:"keys"`
	}
	if err := json.Unmarshal(body, &set); err != nil {
		return nil, err
	}
	if set.Keys == nil || len(set.Keys) > maxKeys {
		return nil, errors.New("no keys, or too many")
	}
	keys := []*verificationKey{}
	for _, raw := range set.Keys {
		var k jose.JSONWebKey
		if k.UnmarshalJSON(raw) != nil {
			continue
		}
		if k, err := newVerificationKey(k); err == nil {
			keys = append(keys, k)
		}
	}
	return keys, nil
}

func (s *remoteKeys) close() {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.current.Store(nil)
	s.wg.Wait()
}
