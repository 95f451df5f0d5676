package a2aguard

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/a2aproject/a2a-go/v2/a2a"
	"github.com/a2aproject/a2a-go/v2/a2apb/v1"
	"github.com/a2aproject/a2a-go/v2/a2asrv"
	"google.golang.org/protobuf/proto"

	"github.com/interlock-fabric/interlock/pkg/denial"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// ErrCard is the parent of what may be wrong with an upstream's agent card: it
// cannot be fetched, is too long or not a card, or has no interface that the
// gateway serves.
var ErrCard = errors.New("a2aguard: agent card")

// errGone: the upstream has answered, and there is none any more.
var errGone = fmt.Errorf("%w: the upstream has none", ErrCard)

// CardOptions configures Cards. Upstream, Interfaces and Agent are required.
type CardOptions struct {
	// Upstream is the URL of the upstream's agent card.
	Upstream string
	// Interfaces are the gateway's own addresses, by protocol binding. An
	// interface of the upstream whose binding is not among them is left out:
	// nobody is shown a way around the gateway.
	Interfaces map[a2a.TransportProtocol]string
	// Agent is who the upstream is: the identity that decisions on the agent
	// match, with its id as the one actor.
	Agent session.Identity
	// MaxAge is how long a card is served before it is asked for anew; zero is
	// a minute.
	MaxAge time.Duration
	// MaxStale is how long the last card is served while the upstream does not
	// answer; zero is an hour.
	MaxStale time.Duration
	// Timeout bounds each fetch; zero is 5 s.
	Timeout time.Duration
	// MaxSize bounds the card, in bytes; zero is 256 KiB.
	MaxSize int64
	// HTTP fetches the card; nil is a client of its own that follows no
	// redirect.
	HTTP *http.Client
}

// Cards serves the agent card of an upstream with the gateway's own addresses in
// it, for as long as the agent may act. It is made by NewCards and is safe for
// concurrent use.
//
// An agent that is revoked, suspended or unregistered is not to be discovered: it
// is answered with 404, which says no more to a stranger than that there is none, and may
// not be cached. When it is restored, it is there again. While the enforcer
// cannot tell, the answer is 503. A card is answered with an ETag and no-cache,
// so that nobody keeps one for longer than that.
//
// Every member of the card is kept but its addresses and its signatures, which
// are over another card and are left out.
type Cards struct {
	enforcer Enforcer
	agent    *session.Prepared
	opts     CardOptions
	client   *http.Client
	now      func() time.Time

	mu     sync.Mutex
	card   *card
	failed error         // of the last fetch
	next   time.Time     // when to fetch again
	busy   chan struct{} // closed when the fetch under way has ended
}

// card is one that was fetched and rewritten.
type card struct {
	body     []byte
	etag     string
	tag, mod string    // the upstream's validators
	checked  time.Time // when the upstream last vouched for it
}

// NewCards makes a Cards. Errors wrap session.ErrInvalid, or session.ErrDenied
// when Agent cannot be prepared.
func NewCards(enforcer Enforcer, o CardOptions) (*Cards, error) {
	bad := func(format string, a ...any) error {
		return fmt.Errorf("%w: a2aguard: %s", session.ErrInvalid, fmt.Sprintf(format, a...))
	}
	if enforcer == nil {
		return nil, bad("no enforcer")
	}
	if u, err := url.Parse(o.Upstream); err != nil || u.Scheme != "https" && u.Scheme != "http" || u.Host == "" {
		return nil, bad("upstream %q is no URL of a card", o.Upstream)
	}
	if len(o.Interfaces) == 0 {
		return nil, bad("no interfaces: nothing of a card would be left")
	}
	for binding, own := range o.Interfaces {
		if own == "" {
			return nil, bad("no address for %s", binding)
		}
	}
	// An agent that is shown presents no credential: neither an end, nor an
	// issued-before that a restored agent leaves behind for the stolen ones, may
	// hold for it.
	o.Agent.AuthTime, o.Agent.Expires = time.Now().AddDate(100, 0, 0), time.Time{}
	p, err := enforcer.Prepare(o.Agent)
	if err != nil {
		return nil, fmt.Errorf("a2aguard: agent: %w", err)
	}
	o.MaxAge, o.MaxStale = cmp.Or(max(o.MaxAge, 0), time.Minute), cmp.Or(max(o.MaxStale, 0), time.Hour)
	o.Timeout = cmp.Or(max(o.Timeout, 0), 5*time.Second)
	o.MaxSize = cmp.Or(max(o.MaxSize, 0), 256<<10)
	c := &Cards{enforcer: enforcer, agent: p, opts: o, client: o.HTTP, now: time.Now}
	if c.client == nil {
		c.client = &http.Client{CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	}
	return c, nil
}

// Discoverable returns nil while the agent may be shown, and else a denial.
func (c *Cards) Discoverable() error {
	err := c.enforcer.Check(c.agent, session.Call{LowRisk: true})
	if errors.Is(err, session.ErrStepUp) || errors.Is(err, session.ErrReduced) || errors.Is(err, session.ErrDigest) {
		return nil // it may still act, once it has done what is asked of it
	}
	return err
}

// ServeHTTP answers GET and HEAD with the card.
func (c *Cards) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	h := w.Header()
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		h.Set("Allow", "GET, HEAD")
		w.WriteHeader(http.StatusMethodNotAllowed)
		return
	}
	h.Set("Cache-Control", "no-store")
	if err := c.Discoverable(); err != nil {
		refuse(w, err)
		return
	}
	got, err := c.get(r.Context())
	if err != nil {
		w.WriteHeader(http.StatusBadGateway)
		return
	}
	// It may have been revoked while the card was fetched.
	if err := c.Discoverable(); err != nil {
		refuse(w, err)
		return
	}
	h.Set("Cache-Control", "no-cache")
	h.Set("Content-Type", "application/json")
	h.Set("ETag", got.etag)
	h.Set("Access-Control-Allow-Origin", "*") // as the SDK's: it is public
	http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(got.body))
}

// refuse answers for an agent that is not to be shown.
func refuse(w http.ResponseWriter, err error) {
	if errors.Is(err, session.ErrRevoked) || errors.Is(err, session.ErrSuspended) || errors.Is(err, session.ErrUnregistered) {
		w.WriteHeader(http.StatusNotFound)
		return
	}
	a := new(denial.Resource).Answer(err)
	w.Header().Set("Retry-After", strconv.Itoa(max(1, int(a.RetryAfter.Seconds()))))
	w.WriteHeader(http.StatusServiceUnavailable)
}

// ExtendedCard makes a producer for a2asrv.WithExtendedAgentCardProducer of one
// that asks the upstream, which is asked only while the agent may act. What it
// brings is rewritten as the public card is.
func (c *Cards) ExtendedCard(upstream a2asrv.ExtendedAgentCardProducer) a2asrv.ExtendedAgentCardProducer {
	return a2asrv.ExtendedAgentCardProducerFn(func(ctx context.Context, r *a2a.GetExtendedAgentCardRequest) (*a2a.AgentCard, error) {
		if err := c.Discoverable(); err != nil {
			return nil, a2a.ErrExtendedCardNotConfigured
		}
		got, err := upstream.ExtendedCard(ctx, r)
		if err != nil {
			return nil, err
		}
		if err := c.Discoverable(); err != nil {
			return nil, a2a.ErrExtendedCardNotConfigured
		}
		out := *got
		out.Signatures, out.SupportedInterfaces = nil, nil
		for _, i := range got.SupportedInterfaces {
			if own, ok := c.opts.Interfaces[i.ProtocolBinding]; ok {
				ours := *i
				ours.URL = own
				out.SupportedInterfaces = append(out.SupportedInterfaces, &ours)
			}
		}
		if len(out.SupportedInterfaces) == 0 {
			return nil, fmt.Errorf("%w: no interface that is served here", ErrCard)
		}
		return &out, nil
	})
}

// Rewrite puts the gateway's addresses into a card as it came, for gateways that
// pass on an extended card. Cards of A2A 0.3 are rewritten too. Errors wrap
// ErrCard.
func (c *Cards) Rewrite(raw []byte) ([]byte, error) {
	if int64(len(raw)) > c.opts.MaxSize {
		return nil, fmt.Errorf("%w: more than %d bytes", ErrCard, c.opts.MaxSize)
	}
	var m map[string]json.RawMessage
	if err := json.Unmarshal(raw, &m); err != nil || m == nil {
		return nil, fmt.Errorf("%w: not a JSON object", ErrCard)
	}
	exact(m, "signatures", "supportedInterfaces", "additionalInterfaces", "url", "preferredTransport")
	delete(m, "signatures")
	served := 0
	list := func(member, bindingOf string) error {
		var all []map[string]json.RawMessage
		if m[member] == nil {
			return nil
		}
		if err := json.Unmarshal(m[member], &all); err != nil {
			return fmt.Errorf("%w: %s is no list of interfaces", ErrCard, member)
		}
		ours := make([]map[string]json.RawMessage, 0, len(all))
		for _, i := range all {
			exact(i, "url", bindingOf)
			if own := c.own(i[bindingOf]); own != nil {
				i["url"] = own
				ours = append(ours, i)
			}
		}
		served += len(ours)
		out, err := json.Marshal(ours)
		m[member] = out
		return err
	}
	if err := list("supportedInterfaces", "protocolBinding"); err != nil {
		return nil, err
	}
	// A2A 0.3: one address at the top, JSON-RPC unless it says otherwise, and
	// others below.
	if err := list("additionalInterfaces", "transport"); err != nil {
		return nil, err
	}
	if m["url"] != nil {
		binding := m["preferredTransport"]
		if binding == nil {
			binding = json.RawMessage(`"` + a2a.TransportProtocolJSONRPC + `"`)
		}
		own := c.own(binding)
		if own == nil {
			return nil, fmt.Errorf("%w: its preferred transport is not served here", ErrCard)
		}
		m["url"] = own
		served++
	}
	if served == 0 {
		return nil, fmt.Errorf("%w: no interface that is served here", ErrCard)
	}
	return json.Marshal(m)
}

// RewriteMessage is Rewrite for a card of A2A 1.0 as gRPC sends it, an AgentCard
// in the protobuf encoding. Errors wrap ErrCard.
func (c *Cards) RewriteMessage(raw []byte) ([]byte, error) {
	if int64(len(raw)) > c.opts.MaxSize {
		return nil, fmt.Errorf("%w: more than %d bytes", ErrCard, c.opts.MaxSize)
	}
	var m a2apb.AgentCard
	if err := proto.Unmarshal(raw, &m); err != nil {
		return nil, fmt.Errorf("%w: not an AgentCard", ErrCard)
	}
	m.Signatures = nil
	m.SupportedInterfaces = slices.DeleteFunc(m.SupportedInterfaces, func(i *a2apb.AgentInterface) bool {
		i.Url = c.opts.Interfaces[a2a.TransportProtocol(i.GetProtocolBinding())]
		return i.Url == ""
	})
	if len(m.SupportedInterfaces) == 0 {
		return nil, fmt.Errorf("%w: no interface that is served here", ErrCard)
	}
	return proto.Marshal(&m)
}

// exact removes members that some readers, Go's among them, take for those that
// are rewritten, because they differ in case alone.
func exact(m map[string]json.RawMessage, names ...string) {
	for k := range m {
		for _, name := range names {
			if k != name && strings.EqualFold(k, name) {
				delete(m, k)
			}
		}
	}
}

// own is the gateway's address for a binding, as JSON, or nil.
func (c *Cards) own(binding json.RawMessage) json.RawMessage {
	var b a2a.TransportProtocol
	if json.Unmarshal(binding, &b) != nil || c.opts.Interfaces[b] == "" {
		return nil
	}
	out, err := json.Marshal(c.opts.Interfaces[b])
	if err != nil {
		return nil
	}
	return out
}

// retryAfter is how long an upstream that has failed is left alone.
const retryAfter = time.Second

// get returns the card, as fresh as the options ask. Of all who ask at once, one
// fetches.
func (c *Cards) get(ctx context.Context) (*card, error) {
	for {
		c.mu.Lock()
		switch now := c.now(); {
		case c.card != nil && now.Before(c.card.checked.Add(c.opts.MaxAge)):
			defer c.mu.Unlock()
			return c.card, nil
		case now.Before(c.next):
			defer c.mu.Unlock()
			return c.lastLocked(now)
		}
		if busy := c.busy; busy != nil {
			c.mu.Unlock()
			select {
			case <-busy:
				continue
			case <-ctx.Done():
				return nil, ctx.Err()
			}
		}
		busy, old := make(chan struct{}), c.card
		c.busy = busy
		c.mu.Unlock()

		// Not under the request's own end: others wait for it too.
		fctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), c.opts.Timeout)
		got, err := c.fetch(fctx, old)
		cancel()

		c.mu.Lock()
		defer c.mu.Unlock()
		close(busy)
		c.busy, c.failed = nil, err
		now := c.now()
		if err != nil {
			c.next = now.Add(retryAfter)
			if errors.Is(err, errGone) {
				c.card = nil
			}
			return c.lastLocked(now)
		}
		got.checked = now
		c.card, c.next = got, time.Time{}
		return got, nil
	}
}

// lastLocked is what there is while the upstream does not answer.
func (c *Cards) lastLocked(now time.Time) (*card, error) {
	if c.card == nil || !now.Before(c.card.checked.Add(c.opts.MaxStale)) {
		return nil, c.failed
	}
	return c.card, nil
}

func (c *Cards) fetch(ctx context.Context, old *card) (*card, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.opts.Upstream, nil)
	if err != nil {
		return nil, fmt.Errorf("%w: %v", ErrCard, err)
	}
	req.Header.Set("Accept", "application/json")
	if old != nil && old.tag != "" {
		req.Header.Set("If-None-Match", old.tag)
	}
	if old != nil && old.mod != "" {
		req.Header.Set("If-Modified-Since", old.mod)
	}
	resp, err := c.client.Do(req)
	if err != nil {
		return nil, fmt.Errorf("%w: %v", ErrCard, err)
	}
	defer resp.Body.Close()
	if old != nil && resp.StatusCode == http.StatusNotModified {
		again := *old
		return &again, nil
	}
	if resp.StatusCode == http.StatusNotFound || resp.StatusCode == http.StatusGone {
		return nil, errGone
	}
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%w: the upstream answered %s", ErrCard, resp.Status)
	}
	raw, err := io.ReadAll(io.LimitReader(resp.Body, c.opts.MaxSize+1))
	if err != nil {
		return nil, fmt.Errorf("%w: %v", ErrCard, err)
	}
	body, err := c.Rewrite(raw)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(body)
	return &card{
		body: body, etag: `"` + hex.EncodeToString(sum[:16]) + `"`,
		tag: resp.Header.Get("ETag"), mod: resp.Header.Get("Last-Modified"),
	}, nil
}
