package gateway

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/interlock-fabric/interlock/internal/gateway/config"
	"github.com/interlock-fabric/interlock/pkg/authority"
)

// With the authority's registry as the source, a caller is known by its agents, and
// its token shows what it runs: whoever is not registered, or runs something else,
// is denied until the registry says otherwise. The mechanism is the enforcer's table
// of registered agents.
func TestTheRegistryDecidesAtTheGateway(t *testing.T) {
	w := newWorld(t)
	up := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	t.Cleanup(up.Close)
	const agent = "spiffe://corp/agent/worker"
	code := func(i int) string { return fmt.Sprintf("code:sha256:%064x", i) }
	revision := uint64(0)
	register := func(digests ...string) {
		t.Helper()
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		rec, err := w.client.RegisterAgent(ctx, authority.AgentRequest{Agent: authority.Agent{ID: agent, Digests: digests}, Revision: revision})
		must(t, err)
		revision = rec.Revision
	}
	register(code(1))
	const ask = "unregistered: deny\ndigests: required\nmax_stale_registry: 1h\n"
	c := w.load(ask + routeTo("http", "/", up.URL, ""))
	g := w.start(c, Proxy)
	call := func(agent string, digests ...string) (int, string) {
		t.Helper()
		res := post(t, g.url()+"/", w.token("ann", "s-ann", func(c map[string]any) {
			if agent != "" {
				c["act"] = map[string]any{"sub": agent}
			}
			c["digests"] = digests
		}), "{}")
		b, err := io.ReadAll(res.Body)
		must(t, err)
		return res.StatusCode, string(b)
	}
	allowed := func(agent string, digests ...string) bool {
		status, _ := call(agent, digests...)
		return status == http.StatusOK
	}
	denied := func(word, agent string, digests ...string) {
		t.Helper()
		if status, body := call(agent, digests...); status != http.StatusUnauthorized || !strings.Contains(body, `"error":"`+word+`"`) {
			t.Errorf("%s %v: %d %s", agent, digests, status, body)
		}
	}
	if status, body := call(agent, code(1)); status != http.StatusOK {
		t.Errorf("%d %s", status, body)
	}
	denied("digest", agent, code(2))
	denied("digest", agent)
	denied("unregistered", "spiffe://corp/agent/stranger", code(1))
	denied("unregistered", "")
	if s := g.Status().Enforcer; s.Altered != 1 || s.Unregistered != 2 || s.Agents == nil || s.Agents.MaxAge != time.Hour {
		t.Errorf("%+v", s)
	}
	register(code(2))
	eventually(t, "what takes its place is allowed", func() bool { return allowed(agent, code(2)) })
	denied("digest", agent, code(1))

	// What is asked of the registry takes a restart; a file is read as before.
	next := w.load(routeTo("http", "/", up.URL, ""))
	next.Admin = c.Admin
	if err := g.Reload(next); !errors.Is(err, config.ErrInvalid) || !strings.Contains(err.Error(), "digests") {
		t.Errorf("%v", err)
	}

	if res, err := http.Get("http://" + g.AdminAddr() + "/metrics"); err != nil {
		t.Error(err)
	} else {
		b, err := io.ReadAll(res.Body)
		_ = res.Body.Close()
		if err != nil || !strings.Contains(string(b), `interlock_agents_registered{enforcer="gateway"} 1`) || !strings.Contains(string(b), `interlock_denied_altered_total{enforcer="gateway"} `) {
			t.Errorf("%v, %s", err, b)
		}
	}
}
