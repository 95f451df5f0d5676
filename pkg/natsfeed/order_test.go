package natsfeed_test

import (
	"errors"
	"fmt"
	"testing"

	"github.com/interlock-fabric/interlock/internal/broker"
	"github.com/interlock-fabric/interlock/internal/feedtest"
	"github.com/interlock-fabric/interlock/pkg/natsfeed"
	"github.com/interlock-fabric/interlock/pkg/session"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nkeys"
)

type orderSink struct {
	*feedtest.Recorder
	heard chan string
}

func (s orderSink) Order(b []byte) { s.heard <- string(b) }

// TestOrdersOverTheBus hears and reads, with an enforcer's rights alone, what the
// holder of an emergency key publishes with its own.
func TestOrdersOverTheBus(t *testing.T) {
	b := newBus(t)
	f := b.feed(t)
	ctx := testContext(t)
	seed, pub := newUser(t)
	k := session.KeyID{7}
	must(t, b.b.SetEmergency([]broker.Emergency{{Key: k, PublicNKey: pub}}))
	sink := orderSink{feedtest.NewRecorder(), make(chan string, 8)}
	must(t, f.Start(ctx, sink))
	kp, err := nkeys.FromSeed([]byte(seed))
	must(t, err)
	nc, err := nats.Connect(b.url, nats.Nkey(pub, kp.Sign))
	must(t, err)
	defer nc.Close()
	for i := range 3 {
		must(t, nc.Publish(natsfeed.OrderSubject(k), fmt.Append(nil, i)))
		select {
		case got := <-sink.heard:
			if got != fmt.Sprint(i) {
				t.Errorf("heard %q", got)
			}
		case <-ctx.Done():
			t.Fatal("not heard")
		}
	}
	all := ""
	for all != "012" { // the stream may be a moment behind the subject
		must(t, ctx.Err())
		all = ""
		must(t, f.Orders(ctx, func(frame []byte) error { all += string(frame); return nil }))
	}
	enough := errors.New("enough")
	if err := f.Orders(ctx, func([]byte) error { return enough }); !errors.Is(err, enough) {
		t.Errorf("%v", err)
	}
}
