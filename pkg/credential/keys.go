package credential

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
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

type staticKeys []jose.JSONWebKey

func newStaticKeys(set jose.JSONWebKeySet) (staticKeys, error) {
	for i := range set.Keys {
		if err := usable(&set.Keys[i]); err != nil {
			return nil, fmt.Errorf("keys: %w", err)
		}
	}
	return append(staticKeys(nil), set.Keys...), nil
}

func (s staticKeys) find(_ context.Context, kid string, alg jose.SignatureAlgorithm) ([]jose.JSONWebKey, error) {
	if found := candidates(s, kid, alg); len(found) > 0 {
		return found, nil
	}
	return nil, ErrTokenKey
}

func (staticKeys) close() {}

func candidates(keys []jose.JSONWebKey, kid string, alg jose.SignatureAlgorithm) (found []jose.JSONWebKey) {
	for i := range keys {
		if (kid == "" || keys[i].KeyID == kid) && fits(&keys[i], alg) && len(found) < maxTries {
			found = append(found, keys[i])
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
	fetch    func() ([]jose.JSONWebKey, error)
	clock    func() time.Time
	interval time.Duration
	maxAge   time.Duration
	wg       sync.WaitGroup

	current atomic.Pointer[fetched]

	mu       sync.Mutex
	closed   bool
	inFlight chan struct{} // closed when the fetch under way has ended
	last     time.Time     // when the last fetch began
}

type fetched struct {
	keys []jose.JSONWebKey
	at   time.Time
}

func newClient() *http.Client {
	return &http.Client{
		Transport:     &http.Transport{Proxy: http.ProxyFromEnvironment, DisableKeepAlives: true, TLSHandshakeTimeout: fetchTimeout},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

func newRemoteKeys(ctx context.Context, client *http.Client, clock func() time.Time, i *Issuer) (*remoteKeys, error) {
	u, err := url.Parse(i.JWKS)
	if err != nil || u.Host == "" || u.User != nil {
		return nil, errors.New("JWKS is not a URL with a host and no user")
	}
	if ip := net.ParseIP(u.Hostname()); u.Scheme != "https" && (u.Scheme != "http" || u.Hostname() != "localhost" && !ip.IsLoopback()) {
		return nil, errors.New("JWKS must be https: whoever can alter it can sign tokens")
	}
	return &remoteKeys{
		fetch: func() ([]jose.JSONWebKey, error) { return fetchKeys(ctx, client, u.String()) },
		clock: clock, interval: i.RefreshInterval, maxAge: i.KeysMaxAge,
	}, nil
}

func (s *remoteKeys) find(ctx context.Context, kid string, alg jose.SignatureAlgorithm) ([]jose.JSONWebKey, error) {
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
func (s *remoteKeys) load() (keys []jose.JSONWebKey, fresh bool) {
	f := s.current.Load()
	if f == nil {
		return nil, false
	}
	// A clock that went back makes the age unknown, and unknown is too old.
	age := s.clock().Sub(f.at)
	if age < 0 || age >= s.maxAge {
		return nil, false
	}
	return f.keys, age < s.maxAge/2
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
	done := make(chan struct{})
	s.inFlight = done
	s.wg.Go(func() {
		// A failed fetch leaves the keys as they are until their age ends;
		// callers learn of it from the keys that are not there.
		if keys, err := s.fetch(); err == nil {
			s.current.Store(&fetched{keys: keys, at: now})
		}
		s.mu.Lock()
		s.inFlight = nil
		s.mu.Unlock()
		close(done)
	})
	return done, nil
}

func fetchKeys(ctx context.Context, client *http.Client, url string) ([]jose.JSONWebKey, error) {
	ctx, cancel := context.WithTimeout(ctx, fetchTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Accept", "application/jwk-set+json, application/json")
	resp, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("status %d", resp.StatusCode)
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxKeySetLen+1))
	if err != nil {
		return nil, err
	}
	if len(body) > maxKeySetLen {
		return nil, errors.New("key set too long")
	}
	return parseKeySet(body)
}

// parseKeySet reads a JWKS. Keys that it does not know or must not use are left
// out, as RFC 7517 §5 asks: one new key type must not lose the others.
func parseKeySet(body []byte) ([]jose.JSONWebKey, error) {
	var set struct {
		Keys []json.RawMessage `json:"keys"`
	}
	if err := json.Unmarshal(body, &set); err != nil {
		return nil, err
	}
	if set.Keys == nil || len(set.Keys) > maxKeys {
		return nil, errors.New("no keys, or too many")
	}
	keys := []jose.JSONWebKey{}
	for _, raw := range set.Keys {
		var k jose.JSONWebKey
		if k.UnmarshalJSON(raw) == nil && usable(&k) == nil {
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
