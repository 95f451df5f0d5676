package everywhere

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/a2aproject/a2a-go/v2/a2a"
	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"go.uber.org/goleak"

	a2aguard "github.com/interlock-fabric/interlock/adapters/a2a"
	mcpguard "github.com/interlock-fabric/interlock/adapters/mcp"
	service "github.com/interlock-fabric/interlock/internal/authority"
	"github.com/interlock-fabric/interlock/internal/enrolled"
	"github.com/interlock-fabric/interlock/internal/gateway"
	"github.com/interlock-fabric/interlock/internal/gateway/config"
	"github.com/interlock-fabric/interlock/internal/guardtest"
	"github.com/interlock-fabric/interlock/pkg/authority"
	"github.com/interlock-fabric/interlock/pkg/credential"
	"github.com/interlock-fabric/interlock/pkg/enforce"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	issuer   = "https://id.example"
	resource = "https://agent.example"
	incident = "INC-142"
	// patience is for what must happen, however slow the machine.
	patience = 30 * time.Second
	// bound is for the way from a decision to the end of what it cuts, which takes
	// some milliseconds where the machine has the time.
	bound = 10 * time.Second
	// afterwards is how often each caller that is denied tries again.
	afterwards = 20
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// world is the fabric, and both ways to a host.
type world struct {
	t      *testing.T
	client *authority.Client
	signer jose.Signer
	ways   []*way
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{t: t}
	dir := t.TempDir()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	svc, err := service.Open(ctx, service.Options{DataDir: filepath.Join(dir, "a"), NATSListen: "127.0.0.1:0", RelaxedSync: true})
	must(t, err)
	t.Cleanup(func() { must(t, svc.Close()) })
	w.client, err = authority.New(authority.Options{Socket: svc.Socket()})
	must(t, err)
	t.Cleanup(w.client.Close)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	w.signer, err = jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: key, KeyID: "k1"}}, (&jose.SignerOptions{}).WithType("at+jwt"))
	must(t, err)
	keys := jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: key.Public(), KeyID: "k1", Algorithm: "ES256", Use: "sig"}}}
	w.ways = []*way{w.embedded(ctx, keys), w.proxied(ctx, keys, dir)}
	return w
}

func (w *world) enroll(ctx context.Context, name string) []byte {
	w.t.Helper()
	raw, err := w.client.Enroll(ctx, authority.EnrollRequest{Name: name})
	must(w.t, err)
	return raw
}

// embedded is a host that guards itself.
func (w *world) embedded(ctx context.Context, keys jose.JSONWebKeySet) *way {
	t := w.t
	t.Helper()
	e, err := enrolled.Open(ctx, w.client, "embedded", enforce.Options{})
	must(t, err)
	t.Cleanup(func() {
		if n := e.Status().Running; n != 0 {
			t.Errorf("%d bindings were never released", n)
		}
		must(t, e.Close())
	})
	v, err := credential.New(credential.Options{
		Audiences: []string{resource}, Issuers: []credential.Issuer{{URL: issuer, Tenant: "default", Keys: keys}},
	})
	must(t, err)
	t.Cleanup(v.Close)
	mg, err := mcpguard.New(e, v, &mcpguard.Options{Resource: resource})
	must(t, err)
	ag, err := a2aguard.New(e, v, &a2aguard.Options{Resource: resource})
	must(t, err)
	h := newHost(t, mg, ag)
	return &way{name: "embedded", host: h, mcp: h.http.URL + "/mcp", rpc: h.http.URL + "/rpc", grpc: h.grpc, applied: func() uint64 { return e.Status().Applied }}
}

const configuration = `
enrollment: enrollment.json
issuers:
  - {url: %q, tenant: default, jwks_file: jwks.json}
admin: {socket: %q}
drain_timeout: 500ms
routes:
  - {name: tools, protocol: mcp, path: /mcp, resource: %[3]q, upstream: {url: "%[4]s/mcp"}}
  - {name: agent, protocol: a2a, path: /rpc, resource: %[3]q, upstream: {url: "%[4]s/rpc"}}
  - {name: grpc, protocol: a2a, path: /, resource: %[3]q, upstream: {url: "http://%[5]s", http2: true}}
proxy: {listeners: [{listen: "127.0.0.1:0"}]}
`

// proxied is a host that guards nothing, behind a gateway.
func (w *world) proxied(ctx context.Context, keys jose.JSONWebKeySet, dir string) *way {
	t := w.t
	t.Helper()
	h := newHost(t, nil, nil)
	jwks, err := json.Marshal(keys)
	must(t, err)
	// A path in a test's own folder may be too long for a socket.
	short, err := os.MkdirTemp("", "everywhere")
	must(t, err)
	t.Cleanup(func() { must(t, os.RemoveAll(short)) })
	for name, b := range map[string][]byte{
		"enrollment.json": w.enroll(ctx, "gateway"), "jwks.json": jwks,
		"enforcer.yaml": fmt.Appendf(nil, configuration, issuer, filepath.Join(short, "s"), resource, h.http.URL, h.grpc),
	} {
		must(t, os.WriteFile(filepath.Join(dir, name), b, 0o600))
	}
	c, err := config.Load(filepath.Join(dir, "enforcer.yaml"), nil, nil)
	must(t, err)
	g, err := gateway.Start(gateway.Options{Config: c, Kind: gateway.Proxy})
	must(t, err)
	t.Cleanup(func() { g.Shutdown(context.Background()) })
	guardtest.Eventually(t, "the gateway is ready", func() bool { return g.Status().Enforcer.Ready })
	addr := g.Addrs()["127.0.0.1:0"]
	return &way{
		name: "proxy", host: h, mcp: "http://" + addr + "/mcp", rpc: "http://" + addr + "/rpc", grpc: addr,
		applied: func() uint64 { return g.Status().Enforcer.Applied },
	}
}

const agentPrefix = "spiffe://corp/agent/"

// token is one for an agent that works for a user, as all do here, in a session
// of its own.
func (w *world) token(t *testing.T, agent, sid string) string {
	t.Helper()
	now := time.Now()
	s, err := jwt.Signed(w.signer).Claims(map[string]any{
		"iss": issuer, "sub": "ann", "aud": resource, "sid": sid, "jti": rand.Text(), "client_id": "cli",
		"act": map[string]any{"sub": agentPrefix + agent},
		"iat": now.Unix(), "auth_time": now.Unix(), "exp": now.Add(time.Hour).Unix(),
	}).Serialize()
	must(t, err)
	return s
}

func (w *world) decide(t *testing.T, r authority.Request) *authority.Decision {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	r.Commit = true
	d, err := w.client.Decide(ctx, r)
	must(t, err)
	return d
}

// inEffect returns once every enforcer says so.
func (w *world) inEffect(t *testing.T, d *authority.Decision) *authority.Coverage {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	c, err := w.client.Coverage(ctx, d.Epoch, d.Number, patience)
	must(t, err)
	if !c.Effective || !c.Complete || !c.Durable || c.Enforcers != len(w.ways) || c.InEffect != c.Enforcers {
		t.Fatalf("coverage %+v", c)
	}
	return c
}

// begin has a caller run everything, both ways, and returns once its clients hear
// of it.
func (w *world) begin(t *testing.T, who, token string) (all []*work) {
	t.Helper()
	for _, way := range w.ways {
		for _, k := range kinds {
			all = append(all, begin(t, way, k, who, token))
		}
	}
	for _, x := range all {
		x.goesOn(t)
	}
	return all
}

// attempt is one that was made while a decision came.
type attempt struct {
	before, after uint64 // what the enforcer had applied
	result        result
	err           error
}

// load is a caller that tries everything all the time.
type load struct {
	way  *way
	kind kind
	// until is the decision that the load is about, once that is known.
	until *atomic.Uint64
	since atomic.Int64 // attempts that began after it
	all   []attempt
}

func (w *world) load(t *testing.T, token string, decision *atomic.Uint64) (loads []*load, stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	stop = sync.OnceFunc(func() { cancel(); wg.Wait() })
	for _, way := range w.ways {
		a := newAttempts(t, way, token)
		for _, k := range kinds {
			if res, err := a.try(ctx, k); res != accepted {
				t.Fatalf("%s, %s is not accepted in the first place: %v", way.name, k, err)
			}
			l := &load{way: way, kind: k, until: decision}
			loads = append(loads, l)
			wg.Go(func() {
				tick := time.NewTicker(5 * time.Millisecond)
				defer tick.Stop()
				for {
					x := attempt{before: way.applied()}
					x.result, x.err = a.try(ctx, k)
					x.after = way.applied()
					if ctx.Err() != nil {
						return
					}
					l.all = append(l.all, x)
					if n := decision.Load(); n > 0 && x.before >= n {
						l.since.Add(1)
					}
					<-tick.C
				}
			})
		}
	}
	t.Cleanup(stop)
	return loads, stop
}

// mustBeDenied fails if anything was accepted that began once the decision had
// been applied, or if anything else went wrong.
func (l *load) mustBeDenied(t *testing.T) (before, after int) {
	t.Helper()
	n := l.until.Load()
	for _, x := range l.all {
		switch {
		case x.before >= n && x.result != denied:
			t.Errorf("%s, %s: after the decision was applied: %d, %v", l.way.name, l.kind, x.result, x.err)
		case x.before >= n:
			after++
		case x.after < n && x.result != accepted:
			t.Errorf("%s, %s: before the decision: %d, %v", l.way.name, l.kind, x.result, x.err)
		default:
			before++
		}
	}
	return before, after
}

// mustBeAccepted fails if anything was not.
func (l *load) mustBeAccepted(t *testing.T) {
	t.Helper()
	for _, x := range l.all {
		if x.result != accepted {
			t.Errorf("%s, %s: a bystander: %d, %v", l.way.name, l.kind, x.result, x.err)
		}
	}
}

// A decision ends everything that its caller has running, wherever it runs, and
// nothing of it is accepted from then on. The mechanisms are the binding of each
// piece of work at its enforcer, and, for what begins, the check.
func TestOneDecisionEndsEverythingEverywhere(t *testing.T) {
	w := newWorld(t)
	for _, tt := range []struct {
		name     string
		agent    string
		decision authority.Request
		word     string // what the callers are told
		everyone bool
	}{
		{"agent", "mallory", authority.Request{
			Operation: authority.Revoke, Targets: []authority.Target{authority.One("", "agent", "", agentPrefix+"mallory")},
			Reason: "stolen-token", Incident: incident,
		}, "revoked", false},
		{"global", "eve", authority.Request{
			Operation: authority.Kill, Targets: []authority.Target{authority.One("", "global", "", "")}, Reason: "compromised", Incident: incident,
		}, "suspended", true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			agents := []string{tt.agent, "bob"}
			tokens := map[string]string{}
			for _, who := range agents {
				tokens[who] = w.token(t, who, "s-"+tt.name)
			}
			cut, goesOn := w.begin(t, agents[0], tokens[agents[0]]), w.begin(t, agents[1], tokens[agents[1]])
			var decision atomic.Uint64
			loads, stopLoad := w.load(t, tokens[agents[0]], &decision)
			var others []*load
			stopOthers := func() {}
			if tt.everyone {
				cut, goesOn = append(cut, goesOn...), nil
			} else {
				others, stopOthers = w.load(t, tokens[agents[1]], &decision)
			}

			began := time.Now()
			d := w.decide(t, tt.decision)
			answered := time.Since(began)
			decision.Store(d.Number)
			late, cancel := context.WithTimeout(t.Context(), bound)
			defer cancel()
			for _, x := range cut {
				select {
				case out := <-x.ended:
					t.Logf("%-8s %-8s %-22s %8.2f ms", x.who, x.way.name, x.kind, float64(out.at.Sub(began).Microseconds())/1000)
					if !strings.Contains(out.said, tt.word) || !strings.Contains(out.said, incident) {
						t.Errorf("%s, %s: the client learnt %q, %v", x.way.name, x.name, out.said, out.err)
					}
				case <-late.Done():
					t.Errorf("%s, %s goes on after %v", x.way.name, x.name, bound)
				}
			}
			if t.Failed() {
				return
			}
			c := w.inEffect(t, d)
			t.Logf("answered after %v; in effect at %d of %d, slowest %v ms, %d cut", answered, c.InEffect, c.Enforcers, c.SlowestMillis, c.Cut)
			if c.Cut < uint64(len(cut)) {
				t.Errorf("%d of %d cuts are reported", c.Cut, len(cut))
			}
			for _, x := range cut {
				guardtest.Eventually(t, x.way.name+": the host has left the requests of "+x.name, func() bool { return x.way.host.open(x.name) == 0 })
				guardtest.Eventually(t, x.way.name+": the work has ended: "+x.name, func() bool { return x.way.host.running(x.name) == 0 })
			}

			// Afterwards, under load all along.
			for _, l := range loads {
				guardtest.Eventually(t, fmt.Sprintf("%s, %s is tried again %d times", l.way.name, l.kind, afterwards), func() bool { return l.since.Load() >= afterwards })
			}
			for _, l := range others {
				guardtest.Eventually(t, fmt.Sprintf("%s, %s: the bystander goes on", l.way.name, l.kind), func() bool { return l.since.Load() >= afterwards })
			}
			stopLoad()
			stopOthers()
			for _, l := range others {
				l.mustBeAccepted(t)
			}
			before, after := 0, 0
			for _, l := range loads {
				b, a := l.mustBeDenied(t)
				before, after = before+b, after+a
			}
			t.Logf("%d attempts began before it was applied, %d after, and none of these was accepted", before, after)
			for _, way := range w.ways {
				for _, who := range agents {
					if who != agents[0] && !tt.everyone {
						continue
					}
					// The SDK's clients are told, too.
					for _, era := range []string{legacy, modern} {
						by := newWire(t, tokens[who], "")
						if cs, err := dialMCP(t, way, era, by, new(atomic.Int64)); err == nil {
							t.Errorf("%s: %s is let in over MCP %s", way.name, who, era)
							_ = cs.Close()
						} else if s := by.status.Load(); s != http.StatusUnauthorized && s != http.StatusForbidden {
							t.Errorf("%s: %s over MCP %s: %d, %v", way.name, who, era, s, err)
						}
					}
				}
			}
			for _, x := range cut {
				if !x.kind.isA2A() {
					continue
				}
				if _, err := dialA2A(t, x.way, x.kind, newWire(t, tokens[agents[0]], "")).GetTask(t.Context(), &a2a.GetTaskRequest{ID: x.task.Load().(a2a.TaskID)}); err == nil {
					t.Errorf("%s: the task of %s can be read", x.way.name, x.name)
				}
			}

			if tt.everyone {
				w.inEffect(t, w.decide(t, authority.Request{Operation: authority.Restore, Targets: tt.decision.Targets, Incident: incident}))
				for _, who := range agents {
					goesOn = append(goesOn, w.begin(t, who+" again", tokens[who])...)
				}
			}
			for _, x := range goesOn {
				x.goesOn(t)
			}
			for _, way := range w.ways {
				a := newAttempts(t, way, tokens[agents[1]])
				for _, k := range kinds {
					if res, err := a.try(t.Context(), k); res != accepted {
						t.Errorf("%s, %s: %s: %d, %v", way.name, k, agents[1], res, err)
					}
				}
			}
			for _, x := range goesOn {
				x.mustEnd(t)
			}
		})
	}
}
