package authority

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"time"
)

const (
	// DefaultTimeout bounds a request that does not wait for anything.
	DefaultTimeout = 15 * time.Second
	maxAnswer      = 64 << 20
	maxProblem     = 64 << 10
	// maxEvent bounds one event: its coverage names every enforcer.
	maxEvent = 8 << 20
	// watchSilence is how long a watch may hear nothing, the server's keep-alive
	// comments included, before the link is taken for dead.
	watchSilence = 30 * time.Second
)

// Options says where the authority is: either Socket, or URL.
type Options struct {
	// Socket is the path of the API's unix socket. What may be done on it is what
	// this machine's user may, or with a Token, whom that names.
	Socket string
	// URL is the API's address, as in "http://127.0.0.1:8470". Plain http is
	// refused outside loopback: the token would travel in clear.
	URL string
	// Token is the bearer token. With URL it is required, unless TLS has a client
	// certificate.
	Token string
	// TLS configures https; nil uses the system's roots.
	TLS *tls.Config
	// Timeout bounds a request, beside its context; zero is DefaultTimeout. A
	// wait that a request asks for is added to it.
	Timeout time.Duration
}

// Client asks one authority. It is safe for concurrent use. The zero Client
// reaches nothing; New makes one.
type Client struct {
	base    string
	token   string
	timeout time.Duration
	http    *http.Client
}

// New returns a client. It connects to nothing yet.
func New(o Options) (*Client, error) {
	if (o.Socket == "") == (o.URL == "") {
		return nil, errors.New("authority: give either a socket or a URL")
	}
	if o.Timeout < 0 {
		return nil, errors.New("authority: negative timeout")
	}
	c := &Client{token: o.Token, timeout: o.Timeout}
	if c.timeout == 0 {
		c.timeout = DefaultTimeout
	}
	tr := &http.Transport{
		TLSClientConfig: o.TLS, MaxIdleConnsPerHost: 16, IdleConnTimeout: 30 * time.Second,
		MaxResponseHeaderBytes: 64 << 10, ForceAttemptHTTP2: o.TLS != nil,
	}
	if o.Socket != "" {
		c.base = "http://authority"
		tr.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", o.Socket)
		}
	} else {
		u, err := url.Parse(o.URL)
		if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
			return nil, errors.New("authority: the URL must be http://127.0.0.1:port or https://host")
		}
		if u.User != nil || u.RawQuery != "" || u.Fragment != "" || strings.Trim(u.Path, "/") != "" {
			return nil, errors.New("authority: the URL has more than a scheme and a host")
		}
		if u.Scheme == "http" && !isLoopback(u.Hostname()) {
			return nil, errors.New("authority: plain http is for loopback only: use https")
		}
		if o.Token == "" && (o.TLS == nil || len(o.TLS.Certificates) == 0 && o.TLS.GetClientCertificate == nil) {
			return nil, errors.New("authority: a URL needs a token or a client certificate")
		}
		c.base = u.Scheme + "://" + u.Host
	}
	c.http = &http.Client{
		Transport: tr,
		// The API redirects nobody; following one would hand on the token.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return c, nil
}

func isLoopback(host string) bool {
	if host == "localhost" {
		return true
	}
	ip, err := netip.ParseAddr(host)
	return err == nil && ip.Unmap().IsLoopback()
}

// Close frees idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// Decide asks for a decision under an idempotency key of its own; see
// DecideOnce.
func (c *Client) Decide(ctx context.Context, r Request) (*Decision, error) {
	return c.DecideOnce(ctx, rand.Text(), r)
}

// DecideOnce asks for a decision. Sent again with the same key and the same
// request, it is taken once, and the answer is that of the first time. A key has
// at most MaxIdempotencyKey printable characters.
func (c *Client) DecideOnce(ctx context.Context, key string, r Request) (*Decision, error) {
	var d Decision
	err := c.call(ctx, 0, http.MethodPost, "/v1/decisions", http.Header{"Idempotency-Key": {key}}, r, &d)
	if err != nil {
		return nil, err
	}
	return &d, nil
}

// Coverage says where a decision is in force. With a wait, of at most MaxWait,
// it returns when the coverage is complete or the wait has passed.
func (c *Client) Coverage(ctx context.Context, epoch, number uint64, wait time.Duration) (*Coverage, error) {
	path := "/v1/decisions/" + strconv.FormatUint(epoch, 10) + "/" + strconv.FormatUint(number, 10) + "/coverage"
	if wait = min(wait, MaxWait); wait > 0 {
		path += "?wait=" + wait.String()
	}
	var cov Coverage
	if err := c.call(ctx, max(wait, 0), http.MethodGet, path, nil, nil, &cov); err != nil {
		return nil, err
	}
	return &cov, nil
}

// Status says how the authority and its enforcers are.
func (c *Client) Status(ctx context.Context) (*Status, error) {
	var s Status
	if err := c.call(ctx, 0, http.MethodGet, "/v1/status", nil, nil, &s); err != nil {
		return nil, err
	}
	return &s, nil
}

// Explain says what denies a caller.
func (c *Client) Explain(ctx context.Context, r ExplainRequest) (*Explanation, error) {
	var x Explanation
	if err := c.call(ctx, 0, http.MethodPost, "/v1/explain", nil, r, &x); err != nil {
		return nil, err
	}
	return &x, nil
}

// Enforcers returns the roster, by name.
func (c *Client) Enforcers(ctx context.Context) ([]Enforcer, error) {
	var out struct {
		Enforcers []Enforcer `json:"enforcers"`
	}
	if err := c.call(ctx, 0, http.MethodGet, "/v1/enforcers", nil, nil, &out); err != nil {
		return nil, err
	}
	return out.Enforcers, nil
}

// Enroll enters an enforcer in the roster and returns its enrolment, which
// session.ParseEnrollment reads. It is full of secrets and is made only once:
// write it to a file with mode 0600.
func (c *Client) Enroll(ctx context.Context, r EnrollRequest) ([]byte, error) {
	var raw json.RawMessage
	if err := c.call(ctx, 0, http.MethodPost, "/v1/enforcers", nil, r, &raw); err != nil {
		return nil, err
	}
	return raw, nil
}

// Retire takes an enforcer out of the roster and off the bus.
func (c *Client) Retire(ctx context.Context, name string) error {
	err := c.call(ctx, 0, http.MethodDelete, "/v1/enforcers/"+url.PathEscape(name), nil, nil, nil)
	return err
}

// BusConfig returns the part of a nats-server's configuration that gives the
// authority and the enforcers their rights. The operator of a bus that runs
// apart puts it there and reloads, whenever the roster changes; the embedded bus
// does so by itself.
func (c *Client) BusConfig(ctx context.Context) (string, error) {
	var out struct {
		Config string `json:"config"`
	}
	if err := c.call(ctx, 0, http.MethodGet, "/v1/bus-config", nil, nil, &out); err != nil {
		return "", err
	}
	return out.Config, nil
}

// KeySet returns the frame of the key set in force, which session.ParseFrame
// reads.
func (c *Client) KeySet(ctx context.Context) ([]byte, error) {
	var out struct {
		Frame []byte `json:"frame"`
	}
	if err := c.call(ctx, 0, http.MethodGet, "/v1/keyset", nil, nil, &out); err != nil {
		return nil, err
	}
	return out.Frame, nil
}

// PublishKeySet hands a key set that the root signed to the authority, which
// verifies and publishes it.
func (c *Client) PublishKeySet(ctx context.Context, frame []byte) error {
	err := c.call(ctx, 0, http.MethodPost, "/v1/keyset", nil, map[string][]byte{"frame": frame}, nil)
	return err
}

// Watch yields events until ctx ends, the range is left, or the link breaks,
// which is its last yield, with an error. Events that happen while nobody
// watches are not told later: read Status after reconnecting.
func (c *Client) Watch(ctx context.Context) iter.Seq2[Event, error] {
	return func(yield func(Event, error) bool) {
		ctx, cancel := context.WithCancelCause(ctx)
		defer cancel(nil)
		// The keep-alive is the only sign that a quiet link is not a dead one.
		silence := time.AfterFunc(watchSilence, func() {
			cancel(fmt.Errorf("%w: nothing heard for %s", ErrUnreachable, watchSilence))
		})
		defer silence.Stop()
		fail := func(err error) { yield(Event{}, c.unreachable(ctx, err)) }
		resp, err := c.send(ctx, http.MethodGet, "/v1/watch", http.Header{"Accept": {"text/event-stream"}}, nil)
		if err != nil {
			fail(err)
			return
		}
		defer resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			yield(Event{}, readProblem(resp))
			return
		}
		lines := bufio.NewScanner(resp.Body)
		lines.Buffer(make([]byte, 0, 64<<10), maxEvent)
		for lines.Scan() {
			silence.Reset(watchSilence)
			data, ok := bytes.CutPrefix(lines.Bytes(), []byte("data: "))
			if !ok {
				continue
			}
			var e Event
			if err := json.Unmarshal(data, &e); err != nil {
				yield(Event{}, fmt.Errorf("authority: event: %w", err))
				return
			}
			if !yield(e, nil) {
				return
			}
		}
		err = lines.Err()
		if err == nil {
			err = io.ErrUnexpectedEOF
		}
		fail(err)
	}
}

// call sends a request and decodes the answer into out, if there is one.
func (c *Client) call(ctx context.Context, wait time.Duration, method, path string, h http.Header, in, out any) error {
	ctx, cancel := context.WithTimeout(ctx, c.timeout+wait)
	defer cancel()
	var body []byte
	if in != nil {
		var err error
		if body, err = json.Marshal(in); err != nil {
			return fmt.Errorf("authority: %w", err)
		}
	}
	resp, err := c.send(ctx, method, path, h, body)
	if err != nil {
		return c.unreachable(ctx, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode < 200 || resp.StatusCode > 299 {
		return readProblem(resp)
	}
	if out == nil {
		return nil
	}
	raw, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	if err != nil {
		return c.unreachable(ctx, err)
	}
	if len(raw) > maxAnswer {
		return fmt.Errorf("authority: answer of more than %d bytes", maxAnswer)
	}
	if err := json.Unmarshal(raw, out); err != nil {
		return fmt.Errorf("authority: answer: %w", err)
	}
	return nil
}

func (c *Client) send(ctx context.Context, method, path string, h http.Header, body []byte) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, method, c.base+path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	for k, v := range h {
		req.Header[k] = v
	}
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	if c.token != "" {
		req.Header.Set("Authorization", "Bearer "+c.token)
	}
	return c.http.Do(req)
}

func (c *Client) unreachable(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); cause != nil && errors.Is(cause, ErrUnreachable) {
		return cause
	}
	if errors.Is(ctx.Err(), context.Canceled) {
		return context.Cause(ctx) // the caller's doing, not the server's
	}
	var u *url.Error
	if errors.As(err, &u) {
		err = u.Err
	}
	return fmt.Errorf("%w: %w", ErrUnreachable, err)
}

func readProblem(resp *http.Response) error {
	raw, err := io.ReadAll(io.LimitReader(resp.Body, maxProblem))
	p := &Problem{}
	if err != nil || json.Unmarshal(raw, p) != nil || p.Type == "" {
		return NewProblem(ProblemInternal, fmt.Sprintf("the server answered %d", resp.StatusCode), "check that the address is an authority's")
	}
	p.Status = resp.StatusCode
	return p
}
