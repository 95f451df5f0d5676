package enforce_test

import (
	"context"
	"errors"
	"log"
	"log/slog"
	"time"

	"github.com/interlock-fabric/interlock/pkg/enforce"
	"github.com/interlock-fabric/interlock/pkg/natsfeed"
	"github.com/interlock-fabric/interlock/pkg/session"
)

func ExampleOpen() {
	enrollment, err := session.LoadEnrollment("enforcer.json")
	if err != nil {
		log.Fatal(err)
	}
	feed, err := natsfeed.Dial(enrollment, nil)
	if err != nil {
		log.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	enf, err := enforce.Open(ctx, feed, &enforce.Options{Enrollment: enrollment, StateDir: "/var/lib/interlock"})
	if err != nil {
		log.Fatal(err) // says what was missing
	}
	defer enf.Close()

	// Once per credential, from what was verified.
	caller, err := enf.Prepare(session.Identity{
		Tenant: "acme", Issuer: "https://idp.example", User: "alice",
		Session: session.SessionRef{ID: "s_9f2c"}, Expires: time.Now().Add(time.Hour),
	})
	if err != nil {
		log.Fatal(err)
	}
	// On each request.
	err = enf.Check(caller, session.Call{Tool: "invoices.read", LowRisk: true})
	var denied *session.DeniedError
	if errors.As(err, &denied) {
		log.Print(denied) // fit for the caller: what, why, which incident
	}
	// Around what takes time.
	work, done, err := enf.Bind(context.Background(), caller, session.Call{Tool: "invoices.export"})
	defer done()
	if err != nil {
		return
	}
	<-work.Done()
	log.Print(context.Cause(work)) // revoked, expired, stale or closed
}

// ExampleStart serves while the bus may still be down: every request is denied
// until there is a verified state.
func ExampleStart() {
	enrollment, err := session.LoadEnrollment("enforcer.json")
	if err != nil {
		log.Fatal(err)
	}
	feed, err := natsfeed.Dial(enrollment, nil)
	if err != nil {
		log.Fatal(err)
	}
	enf, err := enforce.Start(feed, &enforce.Options{
		Enrollment: enrollment,
		MaxStale:   5 * time.Second,
		Logger:     slog.Default(),
	})
	if err != nil {
		log.Fatal(err)
	}
	defer enf.Close()
	if err := enf.WaitReady(context.Background()); err != nil {
		log.Fatal(err)
	}
	log.Printf("%+v", enf.Status())
}
