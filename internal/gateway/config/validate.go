package config

import (
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"path/filepath"
	"strings"
	"time"

	"github.com/interlock-fabric/interlock/internal/issuers"
	"github.com/interlock-fabric/interlock/pkg/denial"
	"github.com/interlock-fabric/interlock/pkg/enforce"
	"github.com/interlock-fabric/interlock/pkg/session"
)

func bad(key, format string, a ...any) error {
	return fmt.Errorf("%w: %s: %s", ErrInvalid, key, fmt.Sprintf(format, a...))
}

// validate checks everything that can be checked without I/O.
func (c *Config) validate() error {
	if c.Enrollment == "" {
		return bad("enrollment", "is missing: name the file that `session-authority enroll` wrote")
	}
	if c.OrdersDir != "" && filepath.Clean(c.OrdersDir) == filepath.Clean(c.StateDir) {
		return bad("orders_dir", "is state_dir: what is kept there is no order; name another directory")
	}
	if _, err := session.ParseMode(c.Mode); err != nil {
		return bad("mode", "%q: use strict, best-effort or shadow", c.Mode)
	}
	for _, d := range []struct {
		key      string
		v        time.Duration
		min, max time.Duration
	}{
		{"max_stale", c.MaxStale, enforce.MinMaxStale, time.Hour},
		{"max_stale_running", c.MaxStaleRunning, enforce.MinMaxStale, time.Hour},
		{"max_stale_registry", c.MaxStaleRegistry, enforce.MinMaxStale, 24 * time.Hour},
		{"drain_timeout", c.DrainTimeout, 0, time.Hour},
		{"trail.interval", c.Trail.Interval, 0, time.Hour},
		{"proxy.read_header_timeout", c.Proxy.ReadHeaderTimeout, 100 * time.Millisecond, 5 * time.Minute},
		{"proxy.body_timeout", c.Proxy.BodyTimeout, 100 * time.Millisecond, time.Hour},
		{"proxy.idle_timeout", c.Proxy.IdleTimeout, time.Second, time.Hour},
		{"proxy.flush_timeout", c.Proxy.FlushTimeout, 10 * time.Millisecond, time.Minute},
		{"proxy.write_stall_timeout", c.Proxy.WriteStallTimeout, 100 * time.Millisecond, time.Hour},
		{"proxy.session_timeout", c.Proxy.SessionTimeout, time.Second, 7 * 24 * time.Hour},
	} {
		// Zero is the enforcer's default, where that is what Defaults leaves.
		if (d.v != 0 || !strings.HasPrefix(d.key, "max_stale")) && (d.v < d.min || d.v > d.max) {
			return bad(d.key, "%s: give %s to %s", d.v, d.min, d.max)
		}
	}
	for _, n := range []struct {
		key         string
		v, min, max int
	}{
		{"max_entries", c.MaxEntries, 0, 100_000_000},
		{"max_bound", c.MaxBound, 0, 1 << 24},
		{"proxy.max_header_bytes", c.Proxy.MaxHeaderBytes, 4 << 10, 1 << 20},
		{"proxy.max_connections", c.Proxy.MaxConnections, 1, 1 << 20},
		{"proxy.max_sessions", c.Proxy.MaxSessions, 1, 1 << 20},
	} {
		if n.v < n.min || n.v > n.max {
			return bad(n.key, "%d: give %d to %d", n.v, n.min, n.max)
		}
	}
	if s := c.Trail.Sample; s < 0 || s > 1 || s != s {
		return bad("trail.sample", "%v: give 0 to 1", s)
	}
	for i, s := range c.NATSURLs {
		if u, err := url.Parse(s); err != nil || u.Host == "" || u.Scheme != "nats" && u.Scheme != "tls" {
			return bad(fmt.Sprintf("nats_urls[%d]", i), "want nats://host:port or tls://host:port")
		}
	}
	switch c.Log.Level {
	case "debug", "info", "warn", "error":
	default:
		return bad("log.level", "%q: use debug, info, warn or error", c.Log.Level)
	}
	switch {
	case c.Unregistered != Allow && c.Unregistered != Deny:
		return bad("unregistered", "%q: use allow or deny", c.Unregistered)
	case c.Unregistered != Deny && c.RegisteredFile != "":
		return bad("registered_file", "is for unregistered: deny")
	case c.Digests != Ignored && c.Digests != Presented && c.Digests != Required:
		return bad("digests", "%q: use ignored, presented or required", c.Digests)
	case c.MaxStaleRegistry != 0 && c.Agents() == nil:
		return bad("max_stale_registry", "nothing is asked of the registry: set unregistered or digests, or leave it out")
	}
	if c.Log.Format != "text" && c.Log.Format != "json" {
		return bad("log.format", "%q: use text or json", c.Log.Format)
	}
	if c.Admin.Listen != "" {
		if err := hostPort("admin.listen", c.Admin.Listen); err != nil {
			return err
		}
	}
	if h := c.Authz.ForwardHeaders; h != "x-forwarded" && h != "x-original" {
		return bad("authz.forward_headers", "%q: use x-forwarded or x-original", h)
	}
	if n := len(c.Proxy.Listeners); n > maxListeners {
		return bad("proxy.listeners", "%d of them, at most %d", n, maxListeners)
	}
	if err := c.validateListeners(); err != nil {
		return err
	}
	if key, err := issuers.Validate(c.Issuers); err != nil {
		return bad(key, "%v", err)
	}
	return c.validateRoutes()
}

func (c *Config) validateListeners() error {
	type named struct {
		key string
		*Listener
	}
	all := []named{{"authz.grpc", &c.Authz.GRPC}, {"authz.http", &c.Authz.HTTP}}
	for i := range c.Proxy.Listeners {
		key := fmt.Sprintf("proxy.listeners[%d]", i)
		if c.Proxy.Listeners[i].Listen == "" {
			return bad(key+".listen", "is missing")
		}
		all = append(all, named{key, &c.Proxy.Listeners[i]})
	}
	seen := map[string]string{}
	for _, l := range all {
		if l.Listen == "" {
			continue
		}
		if err := hostPort(l.key+".listen", l.Listen); err != nil {
			return err
		}
		host, port, _ := net.SplitHostPort(l.Listen)
		if other := seen[l.Listen]; other != "" && port != "0" {
			return bad(l.key+".listen", "%s is taken by %s", l.Listen, other)
		}
		seen[l.Listen] = l.key
		t := l.TLS
		switch {
		case (t.Cert == "") != (t.Key == ""):
			return bad(l.key+".tls", "cert and key go together")
		case t.Cert == "" && t.ClientCA != "":
			return bad(l.key+".tls.client_ca", "needs cert and key")
		case t.RequireClientCert && t.ClientCA == "":
			return bad(l.key+".tls.require_client_cert", "needs client_ca")
		case t.Cert == "" && !l.Plaintext && !loopback(host):
			return bad(l.key+".tls", "is missing: %s is outside loopback, and tokens would pass in clear; where something else secures them, say plaintext: true", l.Listen)
		}
	}
	return nil
}

func (c *Config) validateRoutes() error {
	if len(c.Routes) == 0 || len(c.Routes) > maxRoutes {
		return bad("routes", "%d of them: give 1 to %d", len(c.Routes), maxRoutes)
	}
	names, places := map[string]bool{}, map[string]string{}
	for i := range c.Routes {
		r, key := &c.Routes[i], fmt.Sprintf("routes[%d]", i)
		if !session.ValidEnforcerName(r.Name) {
			return bad(key+".name", "%q: use 1 to 64 of a-z, 0-9, - and _", r.Name)
		}
		if names[r.Name] {
			return bad(key+".name", "%s is there twice", r.Name)
		}
		names[r.Name] = true
		if err := r.validate(key); err != nil {
			return err
		}
		for _, h := range append(r.Hosts, "")[:max(1, len(r.Hosts))] {
			place := strings.ToLower(h) + strings.TrimSuffix(r.Path, "/")
			if other := places[place]; other != "" {
				return bad(key+".path", "%s is that of route %s already", r.Path, other)
			}
			places[place] = r.Name
		}
		if len(c.Proxy.Listeners) > 0 && r.Upstream.URL == "" {
			return bad(key+".upstream.url", "is missing")
		}
	}
	return nil
}

func (r *Route) validate(key string) error {
	if !strings.HasPrefix(r.Path, "/") || strings.ContainsAny(r.Path, "?#%\\ ") || !CleanPath(r.Path) {
		return bad(key+".path", "%q: want a clean path that begins with /", r.Path)
	}
	switch r.Protocol {
	case MCP, A2A, HTTP:
	default:
		return bad(key+".protocol", "%q: use mcp, a2a or http", r.Protocol)
	}
	if r.Resource == "" {
		return bad(key+".resource", "is missing: without an audience, a token for any resource would be accepted")
	}
	for _, a := range []string{r.Resource, r.Audience} {
		if _, err := session.Canonical(session.KindAudience, a); err != nil {
			return bad(key+".resource or audience", "%v", err)
		}
	}
	if len(r.Hosts) > maxValues || len(r.Scopes) > maxValues || len(r.LowRisk)+len(r.Operations) > maxOperations {
		return bad(key, "too many hosts, scopes or operations")
	}
	for _, h := range r.Hosts {
		if h == "" || strings.ContainsAny(h, ":/ ") {
			return bad(key+".hosts", "%q: want a host name without a port", h)
		}
	}
	if err := (&denial.Resource{Metadata: r.ResourceMetadata, Scopes: r.Scopes}).Validate(); err != nil {
		return bad(key, "resource_metadata or scopes: %v", err)
	}
	for name, op := range r.Operations {
		if op.MaxStale < 0 || name == "" {
			return bad(key+".operations", "%q: want a name, and max_stale of 0 or more", name)
		}
	}
	if r.MaxBody < 1<<10 || r.MaxBody > 64<<20 {
		return bad(key+".max_body", "%d: give %d to %d", r.MaxBody, 1<<10, 64<<20)
	}
	if card := r.AgentCard; card != (AgentCard{}) {
		switch {
		case r.Protocol != A2A:
			return bad(key+".agent_card", "is for protocol a2a")
		case card.Upstream == "" || card.Agent == "" || card.Tenant == "":
			return bad(key+".agent_card", "want upstream, agent and tenant")
		}
	}
	u := &r.Upstream
	if u.URL == "" {
		return nil
	}
	p, err := url.Parse(u.URL)
	switch {
	case err != nil || p.Host == "" || p.User != nil || p.RawQuery != "" || p.Fragment != "" || p.Scheme != "http" && p.Scheme != "https":
		return bad(key+".upstream.url", "want http:// or https://, a host, and at most a path")
	case u.HTTP2 && p.Scheme != "http":
		return bad(key+".upstream.http2", "is for http URLs: https finds out by itself")
	case p.Scheme == "http" && u.CA+u.Cert+u.Key != "":
		return bad(key+".upstream", "ca, cert and key are for https URLs")
	case (u.Cert == "") != (u.Key == ""):
		return bad(key+".upstream", "cert and key go together")
	case u.DialTimeout < 0 || u.HeaderTimeout < 0:
		return bad(key+".upstream", "a timeout is negative")
	}
	return nil
}

// CleanPath reports whether a decoded path means the same to everybody: no dot
// segments, no empty ones, which many servers merge, no backslashes and no
// control characters.
func CleanPath(path string) bool {
	if strings.Contains(path, "//") || strings.ContainsFunc(path, func(r rune) bool { return r < ' ' || r == 0x7f || r == '\\' }) {
		return false
	}
	for seg := range strings.SplitSeq(path, "/") {
		if seg == "." || seg == ".." {
			return false
		}
	}
	return true
}

func hostPort(key, s string) error {
	if _, port, err := net.SplitHostPort(s); err != nil || port == "" {
		return bad(key, "%q: want host:port", s)
	}
	return nil
}

func loopback(host string) bool {
	if host == "localhost" {
		return true
	}
	ip, err := netip.ParseAddr(host)
	return err == nil && ip.Unmap().IsLoopback()
}
