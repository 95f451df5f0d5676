package authority_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"net/http"
	"net/http/httptest"
	"time"

	"github.com/interlock-fabric/interlock/pkg/authority"
)

// answers stands for an authority that runs.
func answers() (url string, stop func()) {
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/v1/decisions":
			_, _ = fmt.Fprint(w, `{"operation":"revoke","committed":true,"epoch":1,"number":48213,"durable":true}`)
		case "/v1/decisions/1/48213/coverage":
			_, _ = fmt.Fprint(w, `{"enforcers":41,"in_effect":41,"complete":true,"effective":true,"slowest_millis":2.9}`)
		default:
			w.WriteHeader(http.StatusConflict)
			_, _ = fmt.Fprint(w, `{"type":"urn:interlock:problem:conflict","detail":"enforcer eu-1 is enrolled already","mend":"retire it first"}`)
		}
	}))
	return srv.URL, srv.Close
}

// An issuer revokes a session that it has ended, and waits until that is so
// everywhere.
func Example() {
	url, stop := answers()
	defer stop()
	ctx := context.Background()
	c, err := authority.New(authority.Options{URL: url, Token: "the token from api.token"})
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()
	d, err := c.Decide(ctx, authority.Request{
		Operation: authority.Revoke,
		Targets:   []authority.Target{authority.One("acme", "session", "https://login.example", "s_9f2c")},
		Reason:    "stolen-token",
		Incident:  "INC-142",
	})
	if err != nil {
		log.Fatal(err)
	}
	cov, err := c.Coverage(ctx, d.Epoch, d.Number, 20*time.Second)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Printf("durable %t; in effect on %d of %d\n", d.Durable, cov.InEffect, cov.Enforcers)
	// Output: durable true; in effect on 41 of 41
}

// A program decides by a problem's type, a person by its mend.
func ExampleProblem() {
	url, stop := answers()
	defer stop()
	c, err := authority.New(authority.Options{URL: url, Token: "the token from api.token"})
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()
	_, err = c.Enroll(context.Background(), authority.EnrollRequest{Name: "eu-1"})
	var p *authority.Problem
	if errors.As(err, &p) && p.Type == authority.ProblemConflict {
		fmt.Println(p)
	}
	// Output: enforcer eu-1 is enrolled already: retire it first
}
