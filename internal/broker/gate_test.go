package broker

import (
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
)

// One enforcer cannot take all the connections that the server has: its own
// oldest make room for the newest. Without makeRoom all of them stay.
func TestConnectionsOfOneEnforcer(t *testing.T) {
	f := newFabric(t, t.TempDir())
	connect := func(u user) *nats.Conn {
		nc, err := nats.Connect(f.ClientURL(), u.option(t), nats.NoReconnect())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(nc.Close)
		return nc
	}
	other := connect(f.b)
	var all []*nats.Conn
	for range 3 * maxConns {
		all = append(all, connect(f.a))
	}
	eventually(t, "the oldest are cut", func() bool {
		open := 0
		for _, nc := range all {
			if nc.IsConnected() {
				open++
			}
		}
		return open == maxConns
	})
	if !all[len(all)-1].IsConnected() || !other.IsConnected() || !f.nc.IsConnected() {
		t.Fatal("the wrong one was cut")
	}
}

// An enforcer that is taken off the list while it connects, over and over, has no
// connection afterwards and gets none. Without the disconnection in gate.set what
// was let in before stays.
func TestRemovedWhileConnecting(t *testing.T) {
	f := newFabric(t, t.TempDir())
	for range 20 {
		if err := f.SetEnforcers(f.enforcers()); err != nil {
			t.Fatal(err)
		}
		stop, in := make(chan struct{}), make(chan struct{}, 1)
		var wg sync.WaitGroup
		var mu sync.Mutex
		var got []*nats.Conn
		for range 4 {
			wg.Go(func() {
				for {
					select {
					case <-stop:
						return
					default:
					}
					nc, err := nats.Connect(f.ClientURL(), f.a.option(t), nats.NoReconnect(), nats.Timeout(5*time.Second))
					if err != nil {
						continue
					}
					mu.Lock()
					got = append(got, nc)
					mu.Unlock()
					select {
					case in <- struct{}{}:
					default:
					}
				}
			})
		}
		<-in
		if err := f.SetEnforcers(f.enforcers()[1:]); err != nil {
			t.Fatal(err)
		}
		close(stop)
		wg.Wait()
		eventually(t, "all are cut", func() bool {
			for _, nc := range got {
				if nc.IsConnected() {
					return false
				}
			}
			return true
		})
	}
}
