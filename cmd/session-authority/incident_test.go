package main

import (
	"context"
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"

	service "github.com/interlock-fabric/interlock/internal/authority"
	"github.com/interlock-fabric/interlock/internal/cli"
	"github.com/interlock-fabric/interlock/pkg/authority"
	"github.com/interlock-fabric/interlock/pkg/enforce"
	"github.com/interlock-fabric/interlock/pkg/natsfeed"
	"github.com/interlock-fabric/interlock/pkg/session"
	"github.com/interlock-fabric/interlock/pkg/trail"
)

// A report on an incident that happened: an agent that acts for alice is seen
// misusing a tool, and alice's session is revoked while a call of it runs. One
// enforcer was never started.
func TestIncidentReport(t *testing.T) {
	const issuer = "https://login.example"
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	dir := t.TempDir()
	a, err := service.Open(ctx, service.Options{DataDir: dir, NATSListen: "127.0.0.1:0", Issuers: []string{issuer}, RelaxedSync: true})
	must(err)
	defer func() { must(a.Close()) }()
	c, err := authority.New(authority.Options{Socket: a.Socket()})
	must(err)
	defer c.Close()
	_, err = c.Enroll(ctx, authority.EnrollRequest{Name: "eu-2"})
	must(err)
	raw, err := c.Enroll(ctx, authority.EnrollRequest{Name: "eu-1"})
	must(err)
	enrollment, err := session.ParseEnrollment(raw)
	must(err)
	feed, err := natsfeed.Dial(enrollment, nil)
	must(err)
	enf, err := enforce.Open(ctx, feed, &enforce.Options{Enrollment: enrollment})
	must(err)
	defer func() { must(enf.Close()) }()
	rec, err := trail.New(trail.Options{Enrollment: enrollment, Enforcer: enf, Publisher: feed, Sample: 1, Interval: 50 * time.Millisecond})
	must(err)
	defer func() { must(rec.Close()) }()
	caller := func(user, sid string) *session.Prepared {
		p, err := enf.Prepare(session.Identity{Tenant: "default", Issuer: issuer, User: user, Session: session.SessionRef{ID: sid}, Actors: []session.Actor{{ID: "spiffe://corp/agent/billing"}}})
		must(err)
		return p
	}
	call := func(who *session.Prepared, tool string) error {
		e := trail.Event{Mark: rec.Start(), Caller: who, Method: "tools/call", Call: session.Call{Tool: tool}}
		e.Err = enf.Check(who, e.Call)
		rec.Record(&e)
		return e.Err
	}
	alice, bob := caller("alice", "s-1"), caller("bob", "s-2")
	must(call(alice, "long_ago"))
	compromise := until(ctx, t, c, "long_ago")
	must(call(alice, "transfer|funds"))
	must(call(bob, "read"))
	until(ctx, t, c, "transfer|funds")
	_, release, err := enf.Bind(ctx, alice, session.Call{Tool: "slow"})
	must(err)
	defer release()

	verb := func(want int, args ...string) {
		t.Helper()
		var out, errs strings.Builder
		if code := run(append([]string{"--data-dir", dir}, args...), strings.NewReader(""), &out, &errs); code != want {
			t.Fatalf("%q: exit code %d, %s%s", args, code, out.String(), errs.String())
		}
	}
	verb(exitCommit, "kill", "global", "--incident", "INC-142")
	verb(cli.ExitOK, "revoke", "session", "s-1", "--reason", "stolen-token", "--incident", "INC-142", "--wait", "20s")
	if err := call(alice, "transfer|funds"); !errors.Is(err, session.ErrRevoked) {
		t.Fatal(err)
	}
	report := func(args ...string) string {
		t.Helper()
		var out, errs strings.Builder
		if code := run(append([]string{"--data-dir", dir, "incident", "report"}, args...), strings.NewReader(""), &out, &errs); code != cli.ExitOK {
			t.Fatalf("exit code %d: %s", code, errs.String())
		}
		return out.String()
	}
	var r incident
	for r.After = nil; len(r.After) == 0 || r.Decisions[0].Coverage == nil; {
		must(ctx.Err())
		r = incident{}
		must(json.Unmarshal([]byte(report("INC-142", "--since", compromise.Format(time.RFC3339Nano), "--json")), &r))
	}
	if len(r.Decisions) != 1 || r.Decisions[0].Operation != "revoke" || r.Decisions[0].Coverage.Cut != 1 || r.Decisions[0].Coverage.Absent != 1 {
		t.Errorf("%+v", r.Decisions)
	}
	if len(r.Before) != 1 || r.Before[0].Tool != "transfer|funds" || r.Before[0].User != "alice" || r.Before[0].Decision != "allowed" {
		t.Errorf("before: %+v", r.Before)
	}
	if r.After[0].Decision != "denied" || r.After[0].Tool != "transfer|funds" {
		t.Errorf("after: %+v", r.After)
	}
	text := report("INC-142", "--since", compromise.Format(time.RFC3339Nano))
	for _, want := range []string{
		"# Incident INC-142\n", "| the compromise began, as far as is known |", "| kill global: previewed | uid:", "| revoke session s-1 at seq ",
		"was in force on 1 of 2 enforcers, 1 running call cut |", "- slowest: eu-1, after ", "- cut: 1 running call\n", "- eu-2: enrolled, and never heard of\n",
		"| allowed | transfer\\|funds | spiffe://corp/agent/billing | alice | s-1 | eu-1 |", "| denied | transfer\\|funds |", "a sample of the calls that they allow",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in\n%s", want, text)
		}
	}
	for _, not := range []string{"bob", "long_ago", "long\\_ago"} {
		if strings.Contains(text, not) {
			t.Errorf("%q is in\n%s", not, text)
		}
	}
	if text := report("INC-142"); !strings.Contains(text, "give `--since`") {
		t.Errorf("without a beginning:\n%s", text)
	}
	verb(exitFailed, "incident", "report", "INC-143")
	verb(cli.ExitUsage, "incident", "report", "INC-142", "--since", "yesterday")
}

// until waits until a call of the tool is in the audit, and returns a moment after
// it.
func until(ctx context.Context, t *testing.T, c *authority.Client, tool string) time.Time {
	t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		p, err := c.Audit(ctx, authority.AuditQuery{Kind: authority.AuditReport})
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range p.Records {
			for _, r := range e.Trail {
				if r.Tool == tool {
					return time.Now()
				}
			}
		}
		<-tick.C
	}
}
