package natsfeed_test

import (
	"context"
	"fmt"
	"log"
	"time"

	"github.com/interlock-fabric/interlock/pkg/enforce"
	"github.com/interlock-fabric/interlock/pkg/natsfeed"
	"github.com/interlock-fabric/interlock/pkg/session"
	"github.com/nats-io/nats.go"
)

func ExampleDial() {
	enrollment, err := session.LoadEnrollment("enrollment.json")
	if err != nil {
		log.Print(err)
		return
	}
	feed, err := natsfeed.Dial(enrollment, nil)
	if err != nil {
		log.Print(err)
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	enf, err := enforce.Open(ctx, feed, &enforce.Options{Enrollment: enrollment}) // closes the feed
	if err != nil {
		log.Print(err)
		return
	}
	defer enf.Close()
	fmt.Println(enf.Status())
}

func ExampleNew() {
	// The host's own connection, authenticated as the enforcer.
	nc, err := nats.Connect("nats://127.0.0.1:4222",
		nats.MaxReconnects(-1), nats.ReconnectWait(50*time.Millisecond),
		nats.PingInterval(500*time.Millisecond), nats.MaxPingsOutstanding(2))
	if err != nil {
		log.Print(err)
		return
	}
	defer nc.Close()
	feed := natsfeed.New(nc, "eu-3")
	defer feed.Close()
	fmt.Println(feed.Stats())
}
