package credential

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/interlock-fabric/interlock/pkg/session"
)

// Bounds of token introspection.
const (
	maxIntrospectionLen = 64 << 10
	// maxIntrospections bounds the tokens that an issuer is asked about at once.
	maxIntrospections = 128
	// DefaultIntrospectionMaxAge is how long an answer is believed.
	DefaultIntrospectionMaxAge = 10 * time.Second
	// MaxIntrospectionMaxAge is the longest that one may be.
	MaxIntrospectionMaxAge = 5 * time.Minute
)

// Introspection is how opaque tokens of an issuer are verified: by asking it
// about each (RFC 7662). Its answer becomes the identity as the claims of a JWT
// do; `iss`, if it is there, must be the issuer, `aud` must name this resource,
// and `exp` may be missing.
//
// Anything that is not a JWT is taken to be opaque, so that any stranger can
// have the issuer asked: about each token once at a time, and about no more than
// 128 at a time. Only tokens that are active are remembered.
type Introspection struct {
	// URL is the introspection endpoint: https, or http on a loopback address.
	URL string
	// ClientID and ClientSecret authenticate this resource server to the issuer
	// (client_secret_basic, RFC 6749 §2.3.1). Without a ClientID, Options.HTTP
	// must see to it, with a client certificate for instance.
	ClientID, ClientSecret string
	// MaxAge is how long an answer is believed, and so how long a token that
	// the issuer has revoked may begin requests. What runs by then is not asked
	// about again. Zero is DefaultIntrospectionMaxAge, at
	// most MaxIntrospectionMaxAge.
	MaxAge time.Duration
	// AudienceImplied states that the issuer calls a token active only for the
	// resource servers that it is meant for (RFC 7662 §4), so that an answer
	// without `aud` is for this one.
	AudienceImplied bool
}

type introspector struct {
	issuer *issuer
	clock  func() time.Time
	maxAge time.Duration
	// ask is bounded in time, and ends when the verifier closes.
	ask  func(token string) (claims, error)
	idle func() // closes idle connections
	wg   sync.WaitGroup

	mu     sync.Mutex
	closed bool
	calls  map[[sha256.Size]byte]*introspection
}

// introspection is one question, for everyone who asks the same. What it came
// to is there once done is closed.
type introspection struct {
	done   chan struct{}
	asked  time.Time
	claims claims
	err    error
}

func newIntrospector(ctx context.Context, client *http.Client, clock func() time.Time, i *issuer) (*introspector, error) {
	o := *i.Introspection
	if err := endpoint("URL", o.URL); err != nil {
		return nil, err
	}
	if o.MaxAge == 0 {
		o.MaxAge = DefaultIntrospectionMaxAge
	}
	if o.MaxAge < 0 || o.MaxAge > MaxIntrospectionMaxAge {
		return nil, fmt.Errorf("MaxAge %s: want at most %s", o.MaxAge, MaxIntrospectionMaxAge)
	}
	n := &introspector{
		issuer: i, clock: clock, maxAge: o.MaxAge, idle: func() {},
		calls: make(map[[sha256.Size]byte]*introspection),
	}
	if client == nil {
		// Unlike key sets, these are fetched often.
		client = newClient()
		transport := client.Transport.(*http.Transport)
		transport.DisableKeepAlives = false
		transport.MaxIdleConnsPerHost, transport.IdleConnTimeout = 16, 30*time.Second
		n.idle = transport.CloseIdleConnections
	}
	n.ask = func(token string) (claims, error) {
		ctx, cancel := context.WithTimeout(ctx, fetchTimeout)
		defer cancel()
		return o.ask(ctx, client, token, i.URL)
	}
	return n, nil
}

// ask returns the claims of an active token.
func (o *Introspection) ask(ctx context.Context, client *http.Client, token, issuer string) (claims, error) {
	form := url.Values{"token": {token}, "token_type_hint": {"access_token"}}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, o.URL, strings.NewReader(form.Encode()))
	if err != nil {
		return nil, ErrTokenIntrospection
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	req.Header.Set("Accept", "application/json")
	if o.ClientID != "" {
		req.SetBasicAuth(url.QueryEscape(o.ClientID), url.QueryEscape(o.ClientSecret))
	}
	body, err := answer(client, req, maxIntrospectionLen)
	if err != nil {
		return nil, ErrTokenIntrospection
	}
	c, err := parseClaims(body)
	if err != nil {
		return nil, ErrTokenIntrospection.because("its answer is not one JSON object with distinct members")
	}
	active, ok := c["active"].(bool)
	switch iss := c["iss"]; {
	case !ok:
		return nil, ErrTokenIntrospection.because("its answer does not say whether the token is active")
	case !active:
		return nil, ErrTokenInactive
	case iss == nil:
		c["iss"] = issuer
	case iss != issuer:
		return nil, ErrTokenIssuer
	}
	return c, nil
}

// find asks, or waits for who asks the same.
func (n *introspector) find(ctx context.Context, token string, sum [sha256.Size]byte) (*introspection, error) {
	n.mu.Lock()
	c := n.calls[sum]
	switch {
	case n.closed:
		n.mu.Unlock()
		return nil, ErrTokenIntrospection.because("the verifier is closed")
	case c == nil && len(n.calls) >= maxIntrospections:
		n.mu.Unlock()
		return nil, ErrTokenIntrospection.because("it is being asked about too many")
	case c == nil:
		c = &introspection{done: make(chan struct{}), asked: n.clock()}
		n.calls[sum] = c
		n.wg.Go(func() {
			c.claims, c.err = n.ask(token)
			n.mu.Lock()
			delete(n.calls, sum)
			n.mu.Unlock()
			close(c.done)
		})
	}
	n.mu.Unlock()
	select {
	case <-c.done:
		return c, c.err
	case <-ctx.Done():
		return nil, ErrTokenIntrospection.because("the caller went away")
	}
}

func (n *introspector) close() {
	n.mu.Lock()
	n.closed = true
	n.mu.Unlock()
	n.wg.Wait()
	n.idle()
}

// introspect is authenticate for opaque tokens.
func (v *Verifier) introspect(ctx context.Context, token string, sum *[sha256.Size]byte) (*verified, error) {
	c, err := v.opaque.find(ctx, token, *sum)
	if err != nil {
		return nil, err
	}
	t := &verified{issuer: v.opaque.issuer, asked: c.asked, good: c.asked.Add(v.opaque.maxAge)}
	if err := v.read(t, c.claims); err != nil {
		return nil, err
	}
	t.id.Token = session.TokenValue(t.id.Token, []byte(token))
	return t, nil
}

// opaque reports whether a token is of the form that RFC 6750 §2.1 permits and
// is no JOSE object: those begin with a JSON object in base64url, and are
// verified here or not at all.
func opaque(token string) bool {
	body := strings.TrimRight(token, "=")
	for i := range len(body) {
		c := body[i]
		if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && !strings.ContainsRune("-._~+/", rune(c)) {
			return false
		}
	}
	first, _, dots := strings.Cut(body, ".")
	if !dots {
		return body != ""
	}
	header, err := base64.RawURLEncoding.DecodeString(first)
	return err != nil || !strings.HasPrefix(strings.TrimLeft(string(header), " \t\r\n"), "{")
}
