package proxy

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/a2aproject/a2a-go/v2/a2a"

	a2aguard "github.com/interlock-fabric/interlock/adapters/a2a"
	"github.com/interlock-fabric/interlock/internal/gateway/config"
	"github.com/interlock-fabric/interlock/internal/gateway/route"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// upstream is where a route's requests go.
type upstream struct {
	target    *url.URL
	transport *http.Transport
}

func newUpstream(r *config.Route) (*upstream, error) {
	u, err := url.Parse(r.Upstream.URL)
	if err != nil {
		return nil, fmt.Errorf("route %s: %w", r.Name, err)
	}
	d := &net.Dialer{Timeout: r.Upstream.DialTimeout, KeepAlive: 15 * time.Second}
	t := &http.Transport{
		DialContext: d.DialContext, TLSHandshakeTimeout: r.Upstream.DialTimeout,
		MaxIdleConns: 1024, MaxIdleConnsPerHost: 256, IdleConnTimeout: 90 * time.Second,
		ResponseHeaderTimeout: r.Upstream.HeaderTimeout, MaxResponseHeaderBytes: 256 << 10,
		ExpectContinueTimeout: time.Second,
		// The body is the client's business.
		DisableCompression: true,
		Protocols:          new(http.Protocols),
	}
	switch {
	case u.Scheme == "https":
		t.Protocols.SetHTTP1(true)
		t.Protocols.SetHTTP2(true)
		if t.TLSClientConfig, err = clientTLS(&r.Upstream); err != nil {
			return nil, fmt.Errorf("route %s: upstream: %w", r.Name, err)
		}
	case r.Upstream.HTTP2:
		t.Protocols.SetUnencryptedHTTP2(true)
	default:
		t.Protocols.SetHTTP1(true)
	}
	return &upstream{target: u, transport: t}, nil
}

func clientTLS(u *config.Upstream) (*tls.Config, error) {
	c := &tls.Config{MinVersion: tls.VersionTLS12}
	if u.CA != "" {
		pem, err := os.ReadFile(u.CA)
		if err != nil {
			return nil, err
		}
		c.RootCAs = x509.NewCertPool()
		if !c.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("%s has no certificate in PEM", u.CA)
		}
	}
	if u.Cert != "" {
		pair, err := tls.LoadX509KeyPair(u.Cert, u.Key)
		if err != nil {
			return nil, err
		}
		c.Certificates = []tls.Certificate{pair}
	}
	return c, nil
}

// address points a URL at the upstream. below is escaped.
func (u *upstream) address(out *url.URL, below string) {
	out.Scheme, out.Host = u.target.Scheme, u.target.Host
	escaped := u.target.EscapedPath()
	if below != "" {
		escaped = strings.TrimSuffix(escaped, "/") + below
	}
	if escaped == "" {
		escaped = "/"
	}
	// Both have been parsed before.
	if path, err := url.PathUnescape(escaped); err == nil {
		out.Path, out.RawPath = path, escaped
	}
}

// cardPath is where an agent's card is, below the path of its route.
const cardPath = "/.well-known/agent-card.json"

func newCards(g *route.Guard) (*a2aguard.Cards, error) {
	c := &g.Route.AgentCard
	return a2aguard.NewCards(g.Enforcer, a2aguard.CardOptions{
		Upstream: c.Upstream,
		Interfaces: map[a2a.TransportProtocol]string{
			a2a.TransportProtocolJSONRPC: g.Route.Resource, a2a.TransportProtocolHTTPJSON: g.Route.Resource,
			a2a.TransportProtocolGRPC: g.Route.Resource,
		},
		Agent: session.Identity{Tenant: c.Tenant, Issuer: c.Issuer, Actors: []session.Actor{{ID: c.Agent}}},
	})
}

// metadataPath is where the proxy serves the metadata of a route's resource (RFC
// 9728); empty where the configuration names another place.
func metadataPath(r *config.Route) string {
	u, err := url.Parse(r.ResourceMetadata)
	res, err2 := url.Parse(r.Resource)
	if err != nil || err2 != nil || u.Host != res.Host || !strings.HasPrefix(u.Path, config.MetadataPath) {
		return ""
	}
	return u.Path
}

// serveMetadata tells anybody where tokens for the resource come from.
func (p *Proxy) serveMetadata(w http.ResponseWriter, g *route.Guard) {
	m := struct {
		Resource string   `json:"resource"`
		Servers  []string `json:"authorization_servers"`
		Scopes   []string `json:"scopes_supported,omitempty"`
		Methods  []string `json:"bearer_methods_supported"`
	}{Resource: g.Route.Resource, Scopes: g.Route.Scopes, Methods: []string{"header"}}
	for _, i := range p.opts.Config.Issuers {
		m.Servers = append(m.Servers, i.URL)
	}
	b, err := json.Marshal(m)
	if err != nil { // strings
		w.WriteHeader(http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	// Clients in browsers read it before they have any credentials.
	w.Header().Set("Access-Control-Allow-Origin", "*")
	_, _ = w.Write(b) // a client that has gone needs no answer
}
