package proposal

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/nats-io/nkeys"
	"go.uber.org/goleak"

	"github.com/interlock-fabric/interlock/internal/broker"
	"github.com/interlock-fabric/interlock/pkg/authority"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// bus starts a real bus and returns a connection with the authority's rights.
func bus(t *testing.T) (context.Context, *nats.Conn) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	t.Cleanup(cancel)
	kp, err := nkeys.CreateUser()
	must(t, err)
	pub, err := kp.PublicKey()
	must(t, err)
	seed, err := kp.Seed()
	must(t, err)
	b, err := broker.Start(broker.Options{Dir: t.TempDir(), Authority: pub, RelaxedSync: true})
	must(t, err)
	t.Cleanup(func() { must(t, b.Close()) })
	nc, err := b.Conn(ctx, string(seed))
	must(t, err)
	t.Cleanup(nc.Close)
	js, err := jetstream.New(nc)
	must(t, err)
	must(t, broker.EnsureStreams(ctx, js, 1))
	return ctx, nc
}

func open(ctx context.Context, t *testing.T, nc *nats.Conn, secret string) *Store {
	t.Helper()
	s, err := Open(ctx, nc, []byte(secret))
	must(t, err)
	return s
}

func kill(by string, now time.Time) authority.Proposal {
	return authority.Proposal{
		State: authority.ProposalOpen, By: by, At: now, Expires: now.Add(time.Minute),
		Request: authority.Request{Operation: authority.Kill, Reason: "anomaly", Targets: []authority.Target{authority.One("", "global", "", "")}, Incident: "INC-1"},
	}
}

// Of all who change a proposal at once, on two authorities, one does; and what one
// authority adds the other has.
func TestOneChangesAProposal(t *testing.T) {
	ctx, nc := bus(t)
	a, b := open(ctx, t, nc, "secret"), open(ctx, t, nc, "secret")
	now := time.Now()
	for round := range 5 {
		r, err := a.Add(ctx, kill(fmt.Sprint("p", round), now), now)
		must(t, err)
		var wg sync.WaitGroup
		var mu sync.Mutex
		won := 0
		for n := range 8 {
			s := []*Store{a, b}[n%2]
			wg.Go(func() {
				x, err := s.Find(ctx, r.ID)
				if err != nil {
					t.Error(err)
					return
				}
				if x.State != authority.ProposalOpen {
					return
				}
				x.State, x.EndedBy = authority.ProposalApproved, fmt.Sprint(n)
				switch err := s.Change(ctx, x); {
				case err == nil:
					mu.Lock()
					won++
					mu.Unlock()
				case !errors.Is(err, ErrConflict):
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if won != 1 {
			t.Errorf("%d changed it", won)
		}
	}
	// Adding at once takes a slot each.
	var wg sync.WaitGroup
	for n := range 6 {
		s := []*Store{a, b}[n%2]
		wg.Go(func() {
			if _, err := s.Add(ctx, kill(fmt.Sprint("q", n), now), now); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	all, err := b.List(ctx)
	must(t, err)
	if len(all) != 11 {
		t.Errorf("%d proposals", len(all))
	}
}

// The bus can neither read a proposal nor pass off another for it.
func TestSealed(t *testing.T) {
	ctx, nc := bus(t)
	s := open(ctx, t, nc, "secret")
	now := time.Now()
	r, err := s.Add(ctx, kill("alice", now), now)
	must(t, err)
	_, err = s.Add(ctx, kill("mallory", now), now)
	must(t, err)
	e, err := s.kv.Get(ctx, keyOf(0))
	must(t, err)
	if bytes.Contains(e.Value(), []byte("alice")) || bytes.Contains(e.Value(), []byte("INC-1")) {
		t.Error("it is in clear")
	}
	other, err := s.kv.Get(ctx, keyOf(1))
	must(t, err)
	for i := range e.Value() {
		v := bytes.Clone(e.Value())
		v[i] ^= 1
		if _, ok := s.open(0, v); ok {
			t.Fatalf("byte %d can be altered", i)
		}
	}
	_, err = s.kv.Put(ctx, keyOf(0), other.Value())
	must(t, err)
	if _, err := s.Find(ctx, r.ID); !errors.Is(err, ErrUnknown) {
		t.Errorf("it stands for another: %v", err)
	}
	if all, err := open(ctx, t, nc, "another").List(ctx); err != nil || len(all) != 0 {
		t.Errorf("another's key opens %d, %v", len(all), err)
	}
}

// What is open never gives way; what ended first does.
func TestBounds(t *testing.T) {
	ctx, nc := bus(t)
	s := open(ctx, t, nc, "secret")
	now := time.Now()
	for n := range MaxOpen {
		_, err := s.Add(ctx, kill("alice", now.Add(time.Duration(n))), now)
		must(t, err)
	}
	if _, err := s.Add(ctx, kill("alice", now), now); !errors.Is(err, ErrFull) {
		t.Errorf("one more of one principal's: %v", err)
	}
	for n := range MaxProposals - MaxOpen {
		_, err := s.Add(ctx, kill(fmt.Sprint("p", n), now.Add(time.Second)), now)
		must(t, err)
	}
	if _, err := s.Add(ctx, kill("bob", now), now); !errors.Is(err, ErrFull) {
		t.Errorf("one more than there is room for: %v", err)
	}
	later := now.Add(2 * time.Minute) // all have expired
	r, err := s.Add(ctx, kill("bob", later), later)
	must(t, err)
	all, err := s.List(ctx)
	must(t, err)
	if len(all) != MaxProposals || all[0].ID != r.ID || !strings.HasPrefix(r.ID, "p00-") {
		t.Errorf("%d proposals, the newest %s", len(all), all[0].ID)
	}
	big := kill("carol", later)
	big.Request.Incident = strings.Repeat("i", maxValue)
	if _, err := s.Add(ctx, big, later); !errors.Is(err, ErrTooLarge) {
		t.Errorf("one that does not fit: %v", err)
	}
}
