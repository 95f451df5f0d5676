package roster

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/nats-io/nkeys"

	"github.com/interlock-fabric/interlock/internal/broker"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// bus starts a real bus and returns a connection with the authority's rights.
func bus(t *testing.T) (context.Context, *nats.Conn) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	t.Cleanup(cancel)
	kp, err := nkeys.CreateUser()
	if err != nil {
		t.Fatal(err)
	}
	pub, err := kp.PublicKey()
	if err != nil {
		t.Fatal(err)
	}
	seed, err := kp.Seed()
	if err != nil {
		t.Fatal(err)
	}
	b, err := broker.Start(broker.Options{Dir: t.TempDir(), Authority: pub, RelaxedSync: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := b.Close(); err != nil {
			t.Error(err)
		}
	})
	nc, err := b.Conn(ctx, string(seed))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	if err := broker.EnsureStreams(ctx, js, 1); err != nil {
		t.Fatal(err)
	}
	return ctx, nc
}

func enforcer(t *testing.T, name string) Enforcer {
	t.Helper()
	kp, err := nkeys.CreateUser()
	if err != nil {
		t.Fatal(err)
	}
	pub, err := kp.PublicKey()
	if err != nil {
		t.Fatal(err)
	}
	key, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return Enforcer{Name: name, NKey: pub, ReceiptKey: key, Tenants: []session.TenantID{1}, Enrolled: time.Now().UTC()}
}

func openRoster(ctx context.Context, t *testing.T, nc *nats.Conn, onChange func([]Enforcer) error) *Roster {
	t.Helper()
	r, err := Open(ctx, Options{NC: nc, OnChange: onChange})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	return r
}

func names(list []Enforcer) (out []string) {
	for _, e := range list {
		out = append(out, e.Name)
	}
	return out
}

func TestEveryAuthorityHasTheSameRoster(t *testing.T) {
	ctx, nc := bus(t)
	a := openRoster(ctx, t, nc, nil)
	changes := make(chan []string, 16)
	b := openRoster(ctx, t, nc, func(list []Enforcer) error { changes <- names(list); return nil })
	until := func(want string) {
		t.Helper()
		for {
			select {
			case got := <-changes:
				if fmt.Sprint(got) == want {
					return
				}
			case <-ctx.Done():
				t.Fatalf("the other authority never had %s", want)
			}
		}
	}
	until("[]")
	for _, name := range []string{"eu-2", "eu-1"} {
		if err := a.Enroll(ctx, enforcer(t, name)); err != nil {
			t.Fatal(err)
		}
	}
	until("[eu-1 eu-2]")
	if err := b.Enroll(ctx, enforcer(t, "eu-1")); !errors.Is(err, ErrExists) {
		t.Errorf("enrolled twice: %v", err)
	}
	if err := a.Retire(ctx, "eu-1", time.Now()); err != nil {
		t.Fatal(err)
	}
	until("[eu-2]")
	if err := b.Retire(ctx, "eu-1", time.Now()); !errors.Is(err, ErrUnknown) {
		t.Errorf("retired twice: %v", err)
	}
	again := enforcer(t, "eu-1")
	if err := b.Enroll(ctx, again); err != nil {
		t.Fatal(err)
	}
	until("[eu-1 eu-2]")
	c := openRoster(ctx, t, nc, nil)
	if got := c.Enforcers(); len(got) != 2 || got[0].NKey != again.NKey || !got[0].ReceiptKey.Equal(again.ReceiptKey) {
		t.Errorf("a later authority has %+v", got)
	}
}

// Of two that enrol one name at the same time, one succeeds.
func TestEnrolledOnce(t *testing.T) {
	ctx, nc := bus(t)
	var rosters []*Roster
	for range 4 {
		rosters = append(rosters, openRoster(ctx, t, nc, nil))
	}
	var done sync.WaitGroup
	var won atomic.Int32
	for _, r := range rosters {
		e := enforcer(t, "eu-1")
		done.Go(func() {
			switch err := r.Enroll(ctx, e); {
			case err == nil:
				won.Add(1)
			case !errors.Is(err, ErrExists):
				t.Error(err)
			}
		})
	}
	done.Wait()
	if won.Load() != 1 {
		t.Errorf("%d succeeded", won.Load())
	}
}

// A bus that could not be told is told again.
func TestOwedChange(t *testing.T) {
	ctx, nc := bus(t)
	var fail atomic.Bool
	told := make(chan []string, 16)
	r := openRoster(ctx, t, nc, func(list []Enforcer) error {
		if fail.Load() {
			return errors.New("no")
		}
		told <- names(list)
		return nil
	})
	<-told
	fail.Store(true)
	short, cancel := context.WithTimeout(ctx, 300*time.Millisecond)
	defer cancel()
	if err := r.Enroll(short, enforcer(t, "eu-1")); err == nil {
		t.Error("nobody was told that the bus does not know it")
	}
	fail.Store(false)
	select {
	case got := <-told:
		if len(got) != 1 {
			t.Errorf("told %v", got)
		}
	case <-ctx.Done():
		t.Fatal("not told again")
	}
}

// While the store is asked, which may take long, nobody else is held up by it.
func TestNobodyWaitsForALoad(t *testing.T) {
	ctx, nc := bus(t)
	r := openRoster(ctx, t, nc, nil)
	if err := r.Enroll(ctx, enforcer(t, "eu-1")); err != nil {
		t.Fatal(err)
	}
	if err := r.Retire(ctx, "eu-1", time.Now()); err != nil {
		t.Fatal(err)
	}
	r.loading <- struct{}{} // as load has it
	defer func() { <-r.loading }()
	done := make(chan error, 1)
	go func() {
		if _, ok := r.Find("eu-1"); !ok {
			done <- errors.New("what was enrolled is not known")
			return
		}
		short, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
		defer cancel()
		if err := r.Enroll(short, enforcer(t, "eu-2")); !errors.Is(err, context.DeadlineExceeded) {
			done <- fmt.Errorf("enrolled: %w", err)
			return
		}
		done <- nil
	}()
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
	case <-ctx.Done():
		t.Fatal("they wait for the load")
	}
}

func TestRefusesWhatIsNotAnEnforcer(t *testing.T) {
	ctx, nc := bus(t)
	r := openRoster(ctx, t, nc, nil)
	for name, edit := range map[string]func(*Enforcer){
		"a bad name":        func(e *Enforcer) { e.Name = "eu.1" },
		"a bad NKey":        func(e *Enforcer) { e.NKey = "U" },
		"no receipt key":    func(e *Enforcer) { e.ReceiptKey = nil },
		"no tenant":         func(e *Enforcer) { e.Tenants = nil },
		"too many to store": func(e *Enforcer) { e.Tenants = make([]session.TenantID, 4000) },
	} {
		t.Run(name, func(t *testing.T) {
			e := enforcer(t, "eu-1")
			edit(&e)
			if err := r.Enroll(ctx, e); err == nil {
				t.Error("accepted")
			}
		})
	}
	if got := r.Enforcers(); len(got) != 0 {
		t.Errorf("roster %v", got)
	}
}

// A write whose answer was lost has happened, and is not taken for another's.
func TestLostAnswer(t *testing.T) {
	ctx, nc := bus(t)
	r := openRoster(ctx, t, nc, nil)
	e := enforcer(t, "eu-1")
	value, err := json.Marshal(e)
	if err != nil {
		t.Fatal(err)
	}
	lost := true
	put := func(ctx context.Context) error {
		_, err := r.kv.Create(ctx, prefix+e.Name, value)
		if err == nil && lost {
			lost = false
			return nats.ErrNoResponders
		}
		return err
	}
	if err := r.write(ctx, put, func(all map[string]stored) bool { return all[e.Name].NKey == e.NKey }); err != nil {
		t.Error(err)
	}
	other := enforcer(t, "eu-1")
	if err := r.write(ctx, put, func(all map[string]stored) bool { return all[e.Name].NKey == other.NKey }); !conflict(err) {
		t.Errorf("another's: %v", err)
	}
}
