package a2aguard_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/a2aproject/a2a-go/v2/a2a"
	"github.com/a2aproject/a2a-go/v2/a2aclient/agentcard"
	"github.com/a2aproject/a2a-go/v2/a2apb/v1"
	"github.com/a2aproject/a2a-go/v2/a2asrv"
	"google.golang.org/protobuf/proto"

	a2aguard "github.com/interlock-fabric/interlock/adapters/a2a"
	"github.com/interlock-fabric/interlock/internal/guardtest"
	"github.com/interlock-fabric/interlock/pkg/authority"
	"github.com/interlock-fabric/interlock/pkg/session"
)

const agentID = "https://agents.example/billing"

var upstreamCard = &a2a.AgentCard{
	Name: "billing", Version: "7",
	SupportedInterfaces: []*a2a.AgentInterface{
		a2a.NewAgentInterface("https://upstream.internal/rpc", a2a.TransportProtocolJSONRPC),
		a2a.NewAgentInterface("https://upstream.internal/rest", a2a.TransportProtocolHTTPJSON),
		a2a.NewAgentInterface("upstream.internal:443", a2a.TransportProtocolGRPC),
	},
	Signatures: []a2a.AgentCardSignature{{Protected: "p", Signature: "s"}},
}

// source is an upstream that counts how often its card is asked for.
type source struct {
	*httptest.Server
	fetched, revalidated atomic.Int64
	mu                   sync.Mutex
	answer               func(w http.ResponseWriter, r *http.Request)
}

func (s *source) set(answer func(w http.ResponseWriter, r *http.Request)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.answer = answer
}

func newSource(t *testing.T) *source {
	s := &source{}
	raw, err := json.Marshal(upstreamCard)
	if err != nil {
		t.Fatal(err)
	}
	raw = append([]byte(`{"x-unknown":{"kept":true},`), raw[1:]...)
	s.set(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("ETag", `"v1"`)
		if r.Header.Get("If-None-Match") == `"v1"` {
			s.revalidated.Add(1)
			w.WriteHeader(http.StatusNotModified)
			return
		}
		_, _ = w.Write(raw)
	})
	s.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.fetched.Add(1)
		s.mu.Lock()
		answer := s.answer
		s.mu.Unlock()
		answer(w, r)
	}))
	t.Cleanup(s.Close)
	return s
}

// gateway serves cards on a real socket.
func gateway(t *testing.T, f *guardtest.Fabric, s *source, change func(*a2aguard.CardOptions)) (*a2aguard.Cards, string) {
	t.Helper()
	base := &http.Transport{}
	o := a2aguard.CardOptions{
		Upstream: s.URL + a2asrv.WellKnownAgentCardPath,
		Interfaces: map[a2a.TransportProtocol]string{
			a2a.TransportProtocolJSONRPC: "https://gateway.example/billing", a2a.TransportProtocolHTTPJSON: "https://gateway.example/billing/rest",
		},
		Agent: session.Identity{Tenant: guardtest.Tenant, Issuer: guardtest.Issuer, Actors: []session.Actor{{ID: agentID}}},
		HTTP:  &http.Client{Transport: base},
	}
	if change != nil {
		change(&o)
	}
	cards, err := a2aguard.NewCards(f.Enforcer, o)
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.Handle(a2asrv.WellKnownAgentCardPath, cards)
	srv := httptest.NewServer(mux)
	t.Cleanup(func() { srv.Close(); base.CloseIdleConnections() })
	return cards, srv.URL
}

func get(t *testing.T, url string, header ...string) (status int, h http.Header, body string) {
	t.Helper()
	req, err := http.NewRequestWithContext(bounded(t), http.MethodGet, url+a2asrv.WellKnownAgentCardPath, nil)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i+1 < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := (&http.Transport{DisableKeepAlives: true}).RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, resp.Header, string(raw)
}

func TestCardShowsTheGatewayAlone(t *testing.T) {
	f, s := guardtest.Open(t, 0), newSource(t)
	_, url := gateway(t, f, s, nil)
	status, h, body := get(t, url)
	if status != http.StatusOK || strings.Contains(body, "upstream.internal") || strings.Contains(body, "signatures") || !strings.Contains(body, `"x-unknown":{"kept":true}`) {
		t.Fatalf("%d %s", status, body)
	}
	if h.Get("Cache-Control") != "no-cache" || h.Get("Content-Type") != "application/json" {
		t.Fatalf("%v", h)
	}
	if status, _, _ := get(t, url, "If-None-Match", h.Get("ETag")); status != http.StatusNotModified {
		t.Fatal(status)
	}
	if n := s.fetched.Load(); n != 1 {
		t.Errorf("fetched %d times", n)
	}
	// And the SDK's own client reads it.
	tr := &http.Transport{DisableKeepAlives: true}
	card, err := agentcard.NewResolver(&http.Client{Transport: tr}).Resolve(bounded(t), url)
	if err != nil || card.Name != "billing" || len(card.SupportedInterfaces) != 2 {
		t.Fatalf("%+v, %v", card, err)
	}
	for _, i := range card.SupportedInterfaces {
		if !strings.HasPrefix(i.URL, "https://gateway.example/") || i.ProtocolVersion != a2a.Version {
			t.Errorf("%+v", i)
		}
	}
}

// The mechanism is the check of the agent's own identity, before the card is
// looked for.
func TestRevokedAgentIsNotDiscovered(t *testing.T) {
	f, s := guardtest.Open(t, 0), newSource(t)
	cards, url := gateway(t, f, s, nil)
	extended := cards.ExtendedCard(a2asrv.ExtendedAgentCardProducerFn(func(context.Context, *a2a.GetExtendedAgentCardRequest) (*a2a.AgentCard, error) {
		return upstreamCard, nil
	}))
	check := func(want int) {
		t.Helper()
		status, h, body := get(t, url)
		if status != want || status != http.StatusOK && (h.Get("Cache-Control") != "no-store" || body != "") {
			t.Fatalf("%d %v %s", status, h, body)
		}
		card, err := extended.ExtendedCard(t.Context(), nil)
		if (err == nil) != (want == http.StatusOK) {
			t.Fatal(err)
		}
		if err == nil && (len(card.SupportedInterfaces) != 2 || card.Signatures != nil || strings.Contains(fmt.Sprint(*card.SupportedInterfaces[0], *card.SupportedInterfaces[1]), "upstream")) {
			t.Fatalf("%+v", card)
		}
	}
	check(http.StatusOK)
	for _, step := range []struct {
		op   authority.Operation
		want int
	}{
		{authority.Suspend, 404}, {authority.Resume, 200}, {authority.StepUp, 200}, {authority.Resume, 200},
		{authority.Reduce, 200}, {authority.Resume, 200}, {authority.Revoke, 404},
	} {
		f.On(t, step.op, "agent", agentID)
		check(step.want)
	}
	f.On(t, authority.Restore, "agent", agentID)
	check(http.StatusOK)
	f.On(t, authority.Revoke, "agent", "https://agents.example/another")
	check(http.StatusOK)
}

// saying is an enforcer that says the same of everybody.
type saying struct {
	a2aguard.Enforcer
	err error
}

func (s saying) Check(*session.Prepared, session.Call) error { return s.err }

// The card shows nothing of what the agent runs, which is judged when it calls: an
// agent that the registry has with digests is discovered all the same, and one that
// it does not have is not.
func TestCardOfARegisteredAgent(t *testing.T) {
	f := guardtest.Open(t, 0)
	for err, shown := range map[error]bool{session.ErrDigest: true, session.ErrUnregistered: false} {
		cards, nerr := a2aguard.NewCards(saying{f.Enforcer, &session.DeniedError{Err: err}}, a2aguard.CardOptions{
			Upstream:   "https://upstream.example/card",
			Interfaces: map[a2a.TransportProtocol]string{a2a.TransportProtocolJSONRPC: "https://gateway.example/billing"},
			Agent:      session.Identity{Tenant: guardtest.Tenant, Issuer: guardtest.Issuer, Actors: []session.Actor{{ID: agentID}}},
		})
		if nerr != nil {
			t.Fatal(nerr)
		}
		if got := cards.Discoverable(); (got == nil) != shown {
			t.Errorf("%v: %v", err, got)
		}
	}
}

func TestCardWaitsForAFreshState(t *testing.T) {
	f, s := guardtest.Open(t, 2*time.Second), newSource(t)
	_, url := gateway(t, f, s, nil)
	f.Stop()
	guardtest.Eventually(t, "the state is stale", func() bool { return !f.Enforcer.Status().Fresh })
	status, h, _ := get(t, url)
	if status != http.StatusServiceUnavailable || h.Get("Retry-After") == "" {
		t.Fatal(status)
	}
	if s.fetched.Load() != 0 {
		t.Error("it was fetched for nothing")
	}
}

// The bounds of what is fetched, and how long it is kept.
func TestCardIsFetchedWithinBounds(t *testing.T) {
	f := guardtest.Open(t, 0)
	t.Run("revalidated", func(t *testing.T) {
		s := newSource(t)
		_, url := gateway(t, f, s, func(o *a2aguard.CardOptions) { o.MaxAge = time.Nanosecond })
		for range 3 {
			if status, _, _ := get(t, url); status != http.StatusOK {
				t.Fatal(status)
			}
		}
		if s.fetched.Load() != 3 || s.revalidated.Load() != 2 {
			t.Errorf("fetched %d times, %d of them revalidated", s.fetched.Load(), s.revalidated.Load())
		}
		// It is served on while the upstream fails, and no longer than that.
		s.set(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusInternalServerError) })
		if status, _, _ := get(t, url); status != http.StatusOK {
			t.Fatal(status)
		}
		before := s.fetched.Load()
		for range 5 {
			get(t, url)
		}
		if n := s.fetched.Load() - before; n > 1 {
			t.Errorf("an upstream that fails was asked %d times", n)
		}
	})
	t.Run("gone", func(t *testing.T) {
		s := newSource(t)
		_, url := gateway(t, f, s, func(o *a2aguard.CardOptions) { o.MaxAge = time.Nanosecond })
		get(t, url)
		s.set(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNotFound) })
		if status, _, _ := get(t, url); status != http.StatusBadGateway {
			t.Fatal(status)
		}
	})
	t.Run("stale", func(t *testing.T) {
		s := newSource(t)
		_, url := gateway(t, f, s, func(o *a2aguard.CardOptions) { o.MaxAge, o.MaxStale = time.Nanosecond, time.Nanosecond })
		get(t, url)
		s.set(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusInternalServerError) })
		if status, _, _ := get(t, url); status != http.StatusBadGateway {
			t.Fatal(status)
		}
	})
	for name, answer := range map[string]func(w http.ResponseWriter, r *http.Request){
		"too long": func(w http.ResponseWriter, _ *http.Request) {
			_, _ = io.WriteString(w, `{"x":"`+strings.Repeat("x", 5000)+`"}`)
		},
		"not JSON":   func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "<html>") },
		"null":       func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "null") },
		"no address": func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "{}") },
		"only others": func(w http.ResponseWriter, _ *http.Request) {
			_, _ = io.WriteString(w, `{"supportedInterfaces":[{"url":"u","protocolBinding":"GRPC"}]}`)
		},
		"redirect": func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "http://127.0.0.1:1/", http.StatusFound)
		},
		"silent": func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() },
	} {
		t.Run(name, func(t *testing.T) {
			s := newSource(t)
			s.set(answer)
			_, url := gateway(t, f, s, func(o *a2aguard.CardOptions) {
				o.MaxSize, o.HTTP, o.Timeout = 4096, nil, time.Second
				t.Cleanup(http.DefaultTransport.(*http.Transport).CloseIdleConnections)
			})
			if status, _, _ := get(t, url); status != http.StatusBadGateway {
				t.Fatal(status)
			}
		})
	}
	t.Run("many at once", func(t *testing.T) {
		s := newSource(t)
		_, url := gateway(t, f, s, nil)
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() { get(t, url) })
		}
		wg.Wait()
		if n := s.fetched.Load(); n != 1 {
			t.Errorf("fetched %d times", n)
		}
	})
}

func TestRewrite(t *testing.T) {
	f, s := guardtest.Open(t, 0), newSource(t)
	cards, _ := gateway(t, f, s, nil)
	for name, tt := range map[string]struct{ in, want string }{
		"A2A 0.3": {
			`{"url":"http://u/","preferredTransport":"JSONRPC","additionalInterfaces":[{"url":"http://u/g","transport":"GRPC"},{"url":"http://u/r","transport":"HTTP+JSON"}],"signatures":[{}]}`,
			`{"additionalInterfaces":[{"transport":"HTTP+JSON","url":"https://gateway.example/billing/rest"}],"preferredTransport":"JSONRPC","url":"https://gateway.example/billing"}`,
		},
		"A2A 0.3, by default": {`{"url":"http://u/"}`, `{"url":"https://gateway.example/billing"}`},
		"in another case": {
			`{"supportedInterfaces":[{"url":"http://u/","URL":"http://u/","protocolBinding":"JSONRPC"}],"SupportedInterfaces":[{"url":"http://u/","protocolBinding":"JSONRPC"}]}`,
			`{"supportedInterfaces":[{"protocolBinding":"JSONRPC","url":"https://gateway.example/billing"}]}`,
		},
		"not served":     {`{"url":"http://u/","preferredTransport":"GRPC"}`, ""},
		"odd interfaces": {`{"supportedInterfaces":"none"}`, ""},
		"odd binding":    {`{"supportedInterfaces":[{"url":"http://u/","protocolBinding":7}]}`, ""},
	} {
		got, err := cards.Rewrite([]byte(tt.in))
		if string(got) != tt.want || (tt.want == "") != errors.Is(err, a2aguard.ErrCard) {
			t.Errorf("%s: %s, %v", name, got, err)
		}
	}
}

func TestRewriteMessage(t *testing.T) {
	f, s := guardtest.Open(t, 0), newSource(t)
	cards, _ := gateway(t, f, s, nil)
	card := func(bindings ...string) []byte {
		m := &a2apb.AgentCard{Name: "billing", Signatures: []*a2apb.AgentCardSignature{{Signature: "s"}}}
		for _, b := range bindings {
			m.SupportedInterfaces = append(m.SupportedInterfaces, &a2apb.AgentInterface{Url: "https://upstream.internal/", ProtocolBinding: b, Tenant: "acme"})
		}
		raw, err := proto.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		return raw
	}
	raw, err := cards.RewriteMessage(card("JSONRPC", "GRPC"))
	if err != nil {
		t.Fatal(err)
	}
	var got a2apb.AgentCard
	if err := proto.Unmarshal(raw, &got); err != nil {
		t.Fatal(err)
	}
	want := &a2apb.AgentCard{Name: "billing", SupportedInterfaces: []*a2apb.AgentInterface{{Url: "https://gateway.example/billing", ProtocolBinding: "JSONRPC", Tenant: "acme"}}}
	if !proto.Equal(&got, want) {
		t.Errorf("%v", &got)
	}
	for name, raw := range map[string][]byte{
		"not served": card("GRPC"), "none": card(), "not a card": []byte("\x0a\xff"), "too long": append(card("JSONRPC"), make([]byte, 256<<10)...),
	} {
		if got, err := cards.RewriteMessage(raw); !errors.Is(err, a2aguard.ErrCard) {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
}

func FuzzRewrite(f *testing.F) {
	cards, err := a2aguard.NewCards(nobody{}, a2aguard.CardOptions{
		Upstream: "http://u/", Interfaces: map[a2a.TransportProtocol]string{a2a.TransportProtocolJSONRPC: "https://gateway.example/"},
		Agent: session.Identity{User: "x"},
	})
	if err != nil {
		f.Fatal(err)
	}
	f.Add([]byte(`{"supportedInterfaces":[{"url":"http://upstream/","protocolBinding":"JSONRPC"}],"signatures":[]}`))
	f.Add([]byte(`{"url":"http://upstream/","additionalInterfaces":[null,{"transport":"JSONRPC"}]}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		out, err := cards.Rewrite(raw)
		if err != nil {
			if !errors.Is(err, a2aguard.ErrCard) {
				t.Fatal(err)
			}
			return
		}
		var card a2a.AgentCard
		if json.Unmarshal(out, &card) != nil {
			return // not one that the SDK reads
		}
		for _, i := range card.SupportedInterfaces {
			if i == nil || i.URL != "https://gateway.example/" {
				t.Fatalf("%s shows %+v", out, i)
			}
		}
	})
}

// nobody is an enforcer that is asked for nothing.
type nobody struct{ a2aguard.Enforcer }

func (nobody) Prepare(session.Identity) (*session.Prepared, error) { return new(session.Prepared), nil }
