package natsfeed_test

import (
	"bytes"
	"crypto/ed25519"
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
	n := session.NATSAccess{URLs: []string{b.url, "nats://127.0.0.1:1"}, NKeySeed: seed}
	root, own := ed25519.NewKeyFromSeed(make([]byte, 32)), ed25519.NewKeyFromSeed(bytes.Repeat([]byte{1}, 32))
	frame, err := session.SealOrder(&session.Order{Fabric: session.FabricOf(root.Public().(ed25519.PublicKey)), Number: 1, Time: 1, Incident: "i", Reason: "r"}, own)
	must(t, err)
	// The NKey is not that of the order's key: the bus refuses it.
	if reached, err := natsfeed.PublishOrder(ctx, n, frame); reached != 0 || !errors.Is(err, nats.ErrPermissionViolation) {
		t.Errorf("%d, %v", reached, err)
	}
	must(t, b.b.SetEmergency([]broker.Emergency{{Key: session.KeyIDOf(own.Public().(ed25519.PublicKey)), PublicNKey: pub}}))
	if reached, err := natsfeed.PublishOrder(ctx, n, frame); reached != 1 || err != nil {
		t.Errorf("%d, %v", reached, err)
	}
	select {
	case got := <-sink.heard:
		if got != string(frame) {
			t.Errorf("heard %q", got)
		}
	case <-ctx.Done():
		t.Fatal("not heard")
	}
	for _, bad := range []session.NATSAccess{{URLs: n.URLs}, {NKeySeed: seed}, {URLs: []string{"http://x"}, NKeySeed: seed}} {
		if _, err := natsfeed.PublishOrder(ctx, bad, frame); !errors.Is(err, session.ErrInvalid) {
			t.Errorf("%v: %v", bad, err)
		}
	}
	enough := errors.New("enough")
	if err := f.Orders(ctx, func([]byte) error { return enough }); !errors.Is(err, enough) {
		t.Errorf("%v", err)
	}
}
