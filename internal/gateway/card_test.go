package gateway

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/a2aproject/a2a-go/v2/a2a"
	"github.com/a2aproject/a2a-go/v2/a2aclient"
	a2agrpc "github.com/a2aproject/a2a-go/v2/a2agrpc/v1"
	"github.com/a2aproject/a2a-go/v2/a2asrv"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"

	"github.com/interlock-fabric/interlock/pkg/authority"
)

const (
	workerID = "spiffe://corp/agent/worker"
	inside   = "upstream.internal"
)

// The extended card shows the gateway's address over every transport, as the
// public one does, and there is none while the agent may not act. The mechanism is
// the rewriting of its answer in package proxy.
func TestExtendedAgentCard(t *testing.T) {
	w := newWorld(t)
	full := &a2a.AgentCard{
		Name: "worker", Version: "1", Description: "what only callers see",
		SupportedInterfaces: []*a2a.AgentInterface{
			{URL: "https://" + inside + "/rpc", ProtocolBinding: a2a.TransportProtocolJSONRPC, ProtocolVersion: "1.0", Tenant: "acme"},
			a2a.NewAgentInterface("https://"+inside+"/rest", a2a.TransportProtocolHTTPJSON),
			a2a.NewAgentInterface(inside+":443", a2a.TransportProtocolGRPC),
			a2a.NewAgentInterface("https://"+inside+"/odd", "CARRIER-PIGEON"),
		},
		Capabilities:      a2a.AgentCapabilities{ExtendedAgentCard: true},
		DefaultInputModes: []string{"text/plain"}, DefaultOutputModes: []string{"text/plain"},
		Skills:     []a2a.AgentSkill{{ID: "s", Name: "s", Description: "s", Tags: []string{"t"}}},
		Signatures: []a2a.AgentCardSignature{{Protected: "p", Signature: "s"}},
	}
	let := make(chan struct{})
	defer close(let)
	h := a2asrv.NewHandler(worker{let: let}, a2asrv.WithExtendedAgentCardProducer(a2asrv.ExtendedAgentCardProducerFn(
		func(context.Context, *a2a.GetExtendedAgentCardRequest) (*a2a.AgentCard, error) { return full, nil })))
	rpc, rest := httptest.NewServer(a2asrv.NewJSONRPCHandler(h)), httptest.NewServer(a2asrv.NewTenantRESTHandler("/{*}", h))
	for _, srv := range []*httptest.Server{rpc, rest} {
		t.Cleanup(func() { srv.CloseClientConnections(); srv.Close() })
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	gs := grpc.NewServer()
	a2agrpc.NewHandler(h).RegisterWith(gs)
	served := make(chan struct{})
	go func() { defer close(served); _ = gs.Serve(l) }()
	t.Cleanup(func() { gs.Stop(); <-served })
	card := fmt.Sprintf(`agent_card: {upstream: %q, agent: %q, tenant: default}`, rpc.URL, workerID)
	g := w.start(w.load(fmt.Sprintf(`
routes:
  - {name: rpc, protocol: a2a, path: /rpc, resource: %[1]q, %[5]s, upstream: {url: %[2]q}}
  - {name: rest, protocol: a2a, path: /rest, resource: %[1]q, %[5]s, upstream: {url: %[3]q}}
  - {name: grpc, protocol: a2a, path: /, resource: %[1]q, %[5]s, upstream: {url: "http://%[4]s", http2: true}}
`, resource, rpc.URL, rest.URL, l.Addr(), card)+listener), Proxy)

	clients := map[a2a.TransportProtocol]*a2aclient.Client{}
	for tr, at := range map[a2a.TransportProtocol]string{
		a2a.TransportProtocolJSONRPC: g.url() + "/rpc", a2a.TransportProtocolHTTPJSON: g.url() + "/rest", a2a.TransportProtocolGRPC: strings.TrimPrefix(g.url(), "http://"),
	} {
		base, token := &http.Transport{}, w.token("ann", "s-ann")
		t.Cleanup(base.CloseIdleConnections)
		hc := &http.Client{Transport: bearer{token, base}}
		c, err := a2aclient.NewFromEndpoints(t.Context(), []*a2a.AgentInterface{a2a.NewAgentInterface(at, tr)},
			a2aclient.WithJSONRPCTransport(hc), a2aclient.WithRESTTransport(hc),
			a2agrpc.WithGRPCTransport(grpc.WithTransportCredentials(insecure.NewCredentials()),
				grpc.WithUnaryInterceptor(func(ctx context.Context, m string, req, reply any, cc *grpc.ClientConn, next grpc.UnaryInvoker, o ...grpc.CallOption) error {
					return next(metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+token), m, req, reply, cc, o...)
				})))
		must(t, err)
		t.Cleanup(func() { _ = c.Destroy() })
		clients[tr] = c
	}
	ask := &a2a.GetExtendedAgentCardRequest{Tenant: "acme"}
	for tr, c := range clients {
		got, err := c.GetExtendedAgentCard(t.Context(), ask)
		if err != nil {
			t.Errorf("%s: %v", tr, err)
			continue
		}
		if len(got.SupportedInterfaces) != 3 || len(got.Signatures) != 0 || got.Description != full.Description || got.SupportedInterfaces[0].Tenant != "acme" {
			t.Errorf("%s: %+v", tr, got)
		}
		for _, i := range got.SupportedInterfaces {
			if i.URL != resource {
				t.Errorf("%s shows %s", tr, i.URL)
			}
		}
	}
	w.decide(authority.Suspend, "agent", workerID)
	for tr, c := range clients {
		eventually(t, string(tr)+": there is no card", func() bool { _, err := c.GetExtendedAgentCard(t.Context(), ask); return err != nil })
	}
	w.decide(authority.Resume, "agent", workerID)
	for tr, c := range clients {
		eventually(t, string(tr)+": it is there again", func() bool { _, err := c.GetExtendedAgentCard(t.Context(), ask); return err == nil })
	}
}

// Whatever an agent answers, nobody is shown its own address in place of a card.
func TestExtendedAgentCardInBytes(t *testing.T) {
	w := newWorld(t)
	const good = `{"x":{"kept":1},"supportedInterfaces":[{"url":"https://` + inside + `/","protocolBinding":"JSONRPC"}],"signatures":[{}]}`
	const rpc = `{"jsonrpc":"2.0","id":7,"method":%q}`
	var answer func(w http.ResponseWriter)
	requests := make(chan *http.Request, 1)
	up := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		requests <- r
		w.Header().Set("Content-Type", "application/json")
		w.Header().Set("ETag", `"1"`)
		answer(w)
	}))
	t.Cleanup(up.Close)
	card := fmt.Sprintf(`agent_card: {upstream: %q, agent: %q, tenant: default},`, up.URL, workerID)
	g := w.start(w.load(routeTo("a2a", "/agent", up.URL, card)), Proxy)
	token := w.token("ann", "s-ann")
	for name, tt := range map[string]struct {
		method, path, body string
		answer             string
		encoding           string
		status             int
		want               string
	}{
		"REST":            {"GET", "/extendedAgentCard", "", good, "", 200, `{"supportedInterfaces":[{"protocolBinding":"JSONRPC","url":"` + resource + `"}],"x":{"kept":1}}`},
		"REST, a tenant":  {"GET", "/acme/extendedAgentCard", "", good, "", 200, `"url":"` + resource},
		"REST of 0.3":     {"GET", "/v1/card", "", `{"url":"https://` + inside + `/","name":"n"}`, "", 200, `{"name":"n","url":"` + resource + `"}`},
		"HEAD":            {"HEAD", "/extendedAgentCard", "", good, "", 200, ""},
		"JSON-RPC":        {"POST", "", fmt.Sprintf(rpc, extended), `{"jsonrpc":"2.0","id":7,"result":` + good + `}`, "", 200, `"result":{"supportedInterfaces":[{"protocolBinding":"JSONRPC","url":"` + resource + `"}],"x":{"kept":1}}`},
		"JSON-RPC of 0.3": {"POST", "", fmt.Sprintf(rpc, "agent/getAuthenticatedExtendedCard"), `{"jsonrpc":"2.0","id":7,"result":{"url":"https://` + inside + `/"}}`, "", 200, `"url":"` + resource},
		"an error":        {"POST", "", fmt.Sprintf(rpc, extended), `{"jsonrpc":"2.0","id":7,"error":{"code":-32007,"message":"none"}}`, "", 200, `"code":-32007`},
		"in another case": {"POST", "", fmt.Sprintf(rpc, extended), `{"jsonrpc":"2.0","id":7,"Result":` + good + `}`, "", 200, `{"id":7,"jsonrpc":"2.0"}`},
		"a stream":        {"POST", "", fmt.Sprintf(rpc, extended), "data: {\"result\":" + good + "}\n\n", "", 502, ""},
		"encoded":         {"GET", "/extendedAgentCard", "", good, "x-none", 502, ""},
		"too long":        {"GET", "/extendedAgentCard", "", `{"y":"` + strings.Repeat("x", 1<<20) + `",` + good[1:], "", 502, ""},
		"no card":         {"GET", "/extendedAgentCard", "", `["https://` + inside + `/"]`, "", 502, ""},
		"not served":      {"GET", "/extendedAgentCard", "", strings.Replace(good, "JSONRPC", "PIGEON", 1), "", 502, ""},
	} {
		answer = func(w http.ResponseWriter) {
			if tt.encoding != "" {
				w.Header().Set("Content-Encoding", tt.encoding)
			}
			_, _ = io.WriteString(w, tt.answer)
		}
		req, err := http.NewRequestWithContext(t.Context(), tt.method, g.url()+"/agent"+tt.path, strings.NewReader(tt.body))
		must(t, err)
		for k, v := range map[string]string{"Content-Type": "application/json", "Authorization": "Bearer " + token, "If-None-Match": `"1"`, "Range": "bytes=0-5", "Accept-Encoding": "gzip"} {
			req.Header.Set(k, v)
		}
		res, err := (&http.Transport{DisableKeepAlives: true}).RoundTrip(req)
		must(t, err)
		b, err := io.ReadAll(res.Body)
		must(t, err)
		must(t, res.Body.Close())
		if res.StatusCode != tt.status || !strings.Contains(string(b), tt.want) || strings.Contains(string(b), inside) {
			t.Errorf("%s: %d %s", name, res.StatusCode, b)
		}
		if tt.status == 200 && (res.Header.Get("ETag") != "" || res.Header.Get("Cache-Control") != "private, no-cache") {
			t.Errorf("%s: %v", name, res.Header)
		}
		if sent := within(t, "the agent is asked", requests).Header; sent.Get("If-None-Match")+sent.Get("Range")+sent.Get("Accept-Encoding") != "" {
			t.Errorf("%s: the agent was asked for %v", name, sent)
		}
		if n := g.budget.Used(); n != 0 {
			t.Errorf("%s: %d bytes were not given back", name, n)
		}
	}
	ask := func() (int, string) {
		res := post(t, g.url()+"/agent", token, fmt.Sprintf(rpc, extended))
		b, err := io.ReadAll(res.Body)
		must(t, err)
		return res.StatusCode, string(b)
	}
	answer = func(http.ResponseWriter) {
		// While it is on its way.
		before := g.Status().Enforcer.Applied
		w.decide(authority.Suspend, "agent", workerID)
		eventually(t, "the decision is in force", func() bool { return g.Status().Enforcer.Applied > before })
	}
	if code, body := ask(); code != http.StatusNotFound || !strings.Contains(body, `"id":7`) {
		t.Errorf("suspended while it answers: %d %s", code, body)
	}
	<-requests
	if code, body := ask(); code != http.StatusNotFound || len(requests) != 0 {
		t.Errorf("suspended: %d %s, and %d requests", code, body, len(requests))
	}
}

const extended = "GetExtendedAgentCard"
