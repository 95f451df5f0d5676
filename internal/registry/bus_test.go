package registry

import (
	"context"
	"crypto/ecdh"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/nats-io/nkeys"
	"go.uber.org/goleak"

	"github.com/interlock-fabric/interlock/internal/broker"
	"github.com/interlock-fabric/interlock/pkg/session"
)

func TestMain(m *testing.M) {
	if os.Getenv(childEnv) != "" {
		child()
		return
	}
	goleak.VerifyTestMain(m)
}

const issuer = "https://issuer.example"

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// sealing is a key set with one sealing key, and its private half unless that is
// taken away.
type sealing struct {
	ks      *session.KeySet
	private *ecdh.PrivateKey
	away    bool
}

func (s *sealing) KeySet() *session.KeySet { return s.ks }
func (s *sealing) Sealing(id session.KeyID) (*ecdh.PrivateKey, bool) {
	return s.private, !s.away && id == session.KeyIDOf(s.private.PublicKey().Bytes())
}

func sealingOf(private *ecdh.PrivateKey) *sealing {
	return &sealing{private: private, ks: &session.KeySet{Keys: []session.SigningKey{{Public: private.PublicKey().Bytes(), Use: session.UseAudit}}}}
}

func newSealing(t testing.TB) *sealing {
	t.Helper()
	private, err := ecdh.X25519().GenerateKey(rand.Reader)
	must(t, err)
	return sealingOf(private)
}

// world is a real bus, and what is needed to open registries on it.
type world struct {
	testing.TB
	ctx  context.Context
	dir  string
	seed string
	b    *broker.Broker
	nc   *nats.Conn
	js   jetstream.JetStream
	keys *sealing
}

func newSeed(t testing.TB) (seed, public string) {
	t.Helper()
	kp, err := nkeys.CreateUser()
	must(t, err)
	s, err := kp.Seed()
	must(t, err)
	public, err = kp.PublicKey()
	must(t, err)
	return string(s), public
}

func newWorld(t testing.TB, relaxed bool) *world {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	t.Cleanup(cancel)
	w := &world{TB: t, ctx: ctx, dir: t.TempDir(), keys: newSealing(t)}
	w.seed, _ = newSeed(t)
	w.up(relaxed)
	t.Cleanup(w.down)
	return w
}

func (w *world) up(relaxed bool) {
	w.Helper()
	kp, err := nkeys.FromSeed([]byte(w.seed))
	must(w, err)
	public, err := kp.PublicKey()
	must(w, err)
	w.b, err = broker.Start(broker.Options{Dir: w.dir, Authority: public, RelaxedSync: relaxed})
	must(w, err)
	w.nc = w.conn()
	w.js, err = jetstream.New(w.nc)
	must(w, err)
	must(w, broker.EnsureStreams(w.ctx, w.js, 1))
}

func (w *world) conn() *nats.Conn {
	w.Helper()
	nc, err := w.b.Conn(w.ctx, w.seed)
	must(w, err)
	return nc
}

func (w *world) down() {
	w.Helper()
	w.nc.Close()
	must(w, w.b.Close())
}

func (w *world) open(o Options) *Registry {
	w.Helper()
	if o.NC == nil {
		o.NC = w.conn()
		w.Cleanup(o.NC.Close)
	}
	if o.Keys == nil {
		o.Keys = w.keys
	}
	r, err := Open(w.ctx, o)
	must(w, err)
	w.Cleanup(func() { must(w, r.Close()) })
	return r
}

// until polls a condition of a real server.
func (w *world) until(what string, ok func() bool) {
	w.Helper()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(30 * time.Second); !ok(); <-tick.C {
		if time.Now().After(end) {
			w.Fatalf("not in time: %s", what)
		}
	}
}

func in(d time.Duration) session.Instant { return session.InstantOf(time.Now().Add(d)) }

// hour is one expiry for a whole test: the same session twice must be the same.
var hour = in(time.Hour)

func ses(i int) Session {
	return Session{
		Tenant: "acme", Ref: Ref{issuer, fmt.Sprintf("s-%06d", i)}, Agent: Ref{ID: fmt.Sprintf("spiffe://corp/agent/%d", i%100)},
		User: fmt.Sprintf("user-%d", i%50), Expires: hour,
	}
}

func bot(i int) Agent {
	return Agent{Tenant: "acme", Ref: Ref{ID: fmt.Sprintf("spiffe://corp/agent/%d", i)}, Owner: "team", Blueprint: fmt.Sprintf("bp-%d", i%10)}
}

func (w *world) register(r *Registry, list ...Session) {
	w.Helper()
	by, err := r.RegisterSessions(w.ctx, list)
	n := 0
	for _, k := range by {
		n += k
	}
	if err != nil || n != len(list) {
		w.Fatalf("registered %v of %d: %v", by, len(list), err)
	}
}

// all walks the sessions of a query.
func all(t testing.TB, r *Registry, q SessionQuery) (out []Session) {
	t.Helper()
	for {
		list, next, err := r.Sessions(q)
		must(t, err)
		out = append(out, list...)
		if next == 0 {
			return out
		}
		if q.Before != 0 && next >= q.Before {
			t.Fatalf("page after %d leads to %d", q.Before, next)
		}
		q.Before = next
	}
}

func is(err error, want error) bool { return errors.Is(err, want) }
