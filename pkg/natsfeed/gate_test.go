package natsfeed

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
)

type counting struct{ batches atomic.Int32 }

func (c *counting) Batch([]byte)   { c.batches.Add(1) }
func (c *counting) Beat([]byte)    {}
func (c *counting) KeySet([]byte)  {}
func (c *counting) Order([]byte)   {}
func (c *counting) Connected(bool) {}

// TestMessageThatMeetsClose: a message that nats.go has handed over already, when
// Close comes between, does not reach the sink after Close has returned.
func TestMessageThatMeetsClose(t *testing.T) {
	srv, err := server.NewServer(&server.Options{DontListen: true, NoSigs: true, NoLog: true})
	if err != nil {
		t.Fatal(err)
	}
	srv.Start()
	defer srv.WaitForShutdown()
	defer srv.Shutdown()
	nc, err := nats.Connect("", nats.InProcessServer(srv))
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	until := func(what string, cond func() bool) {
		t.Helper()
		tick := time.NewTicker(time.Millisecond)
		defer tick.Stop()
		for !cond() {
			select {
			case <-tick.C:
			case <-ctx.Done():
				t.Fatal(what)
			}
		}
	}

	f, sink := New(nc, "a"), &counting{}
	if err := f.Start(ctx, sink); err != nil {
		t.Fatal(err)
	}
	f.gate.Lock() // as another call of the sink that takes its time
	log := f.subs[0]
	if err := nc.Publish(LogSubject, []byte("late")); err != nil {
		t.Fatal(err)
	}
	until("the message is not handed over", func() bool { n, err := log.Delivered(); return err == nil && n == 1 })
	closed := make(chan error, 1)
	go func() { closed <- f.Close() }()
	until("Close does not run", func() bool { return errors.Is(f.publish(&nats.Msg{Subject: "x"}), ErrClosed) })
	f.open = false // what Close does next, ahead of the message
	f.gate.Unlock()
	if err := <-closed; err != nil {
		t.Fatal(err)
	}
	f.gate.Lock() // behind the message
	defer f.gate.Unlock()
	if n := sink.batches.Load(); n != 0 {
		t.Errorf("%d calls of the sink", n)
	}
}
