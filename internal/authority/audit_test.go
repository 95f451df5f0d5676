package authority

import (
	"bufio"
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/interlock-fabric/interlock/internal/access"
	"github.com/interlock-fabric/interlock/internal/audit"
	"github.com/interlock-fabric/interlock/internal/trust"
	"github.com/interlock-fabric/interlock/pkg/authority"
	"github.com/interlock-fabric/interlock/pkg/enforce"
	"github.com/interlock-fabric/interlock/pkg/natsfeed"
	"github.com/interlock-fabric/interlock/pkg/session"
	"github.com/interlock-fabric/interlock/pkg/trail"
)

func (f *fixture) audited(q authority.AuditQuery) []authority.AuditEntry {
	f.Helper()
	p, err := f.c.Audit(f.ctx, q)
	if err != nil {
		f.Fatal(err)
	}
	return p.Records
}

// exported exports the audit, demands that it is sound, and returns it.
func (f *fixture) exported(q authority.AuditQuery) []byte {
	f.Helper()
	var b bytes.Buffer
	if err := f.c.ExportAudit(f.ctx, q, &b); err != nil {
		f.Fatal(err)
	}
	r, err := audit.Verify(bytes.NewReader(b.Bytes()), f.a.store.Root(), nil)
	if err != nil || !r.Sound {
		f.Fatalf("%+v, %v", r, err)
	}
	return b.Bytes()
}

// Everything that is asked for is on record: who asked, by what means, for what,
// why, and how it ended; agent and user both.
func TestAudit(t *testing.T) {
	f := start(t, Options{Issuers: []string{issuer}, Version: "v1.2.3"})
	f.enroll("tools")
	d := f.decide(authority.Request{Operation: authority.Revoke, Reason: "stolen-token", Incident: "INC-142",
		Targets: []authority.Target{{Terms: []authority.Term{{Kind: "user", Issuer: issuer, Value: "alice"}, {Kind: "agent", Issuer: issuer, Value: "billing-bot"}}}}})
	if !d.Durable {
		t.Fatalf("%+v", d)
	}
	if _, err := f.c.Decide(f.ctx, authority.Request{Operation: authority.Kill, Reason: "anomaly", Targets: everything(), Incident: "INC-142"}); err != nil {
		t.Fatal(err)
	}
	_, err := f.c.Decide(f.ctx, authority.Request{Operation: authority.Revoke, Reason: "anomaly", Targets: one("session", "s"), Share: 5, Commit: true})
	var p *authority.Problem
	if !errors.As(err, &p) {
		t.Fatal(err)
	}
	if _, err := f.c.Enroll(f.ctx, authority.EnrollRequest{Name: "tools"}); !errors.As(err, &p) || p.Type != authority.ProblemConflict {
		t.Fatal(err)
	}
	if err := f.c.Retire(f.ctx, "tools"); err != nil {
		t.Fatal(err)
	}
	root, err := trust.LoadRoot(filepath.Join(f.a.o.DataDir, KeysDir, trust.RootFile))
	if err != nil {
		t.Fatal(err)
	}
	keys, err := trust.Open(filepath.Join(f.a.o.DataDir, KeysDir))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := keys.AddTenant(root, "globex", session.InstantOf(time.Now())); err != nil {
		t.Fatal(err)
	}
	if err := f.c.PublishKeySet(f.ctx, keys.Frame()); err != nil {
		t.Fatal(err)
	}
	const want = `retention
	start authority done/authority v1.2.3
	hold keys done/authority keys
	start config done/authority bootstrap token
	sign-in sign-in done/socket
	enroll roster done/socket enforcer tools
	revoke decision done/socket user alice and agent billing-bot
	kill decision previewed/socket global
	revoke decision refused/socket session s
	enroll roster refused/socket enforcer tools
	retire roster done/socket enforcer tools
	publish keys done/socket tenant globex added`
	list := f.audited(authority.AuditQuery{})
	slices.Reverse(list)
	list = slices.DeleteFunc(list, func(e authority.AuditEntry) bool { return e.Kind == authority.AuditCoverage })
	lines := strings.Split(want, "\n\t")[1:]
	if len(list) != len(lines) {
		t.Fatalf("%d records, want %d: %+v", len(list), len(lines), list)
	}
	for i, e := range list {
		means := e.Principal.Means
		if means == "socket" && e.Principal.Name != fmt.Sprintf("uid:%d@localhost", os.Getuid()) {
			t.Errorf("asked for by %q", e.Principal.Name)
		}
		got := fmt.Sprintf("%s %s %s/%s %s%s", e.Action, e.Kind, e.Outcome, means, strings.Join(e.Targets, ", "), e.Detail)
		words := strings.Fields(lines[i])
		if !strings.HasPrefix(got, strings.Join(words[:3], " ")+" ") || !strings.Contains(got, strings.Join(words[3:], " ")) || e.Authority == "" {
			t.Errorf("%q, want %q", got, lines[i])
		}
	}
	dec := list[5]
	if dec.Epoch != d.Epoch || dec.Sequence != d.Number || dec.Reason != "stolen-token" || dec.Incident != "INC-142" || dec.Pending ||
		fmt.Sprint(dec.Callers) != "[{default billing-bot alice  }]" {
		t.Errorf("%+v", dec)
	}
	if r := list[7]; r.Error == "" || r.Callers[0].Agent != "*" || r.Callers[0].User != "*" || r.Callers[0].Session != "s" {
		t.Errorf("%+v", r)
	}
	for _, q := range []authority.AuditQuery{{Agent: "billing-bot"}, {User: "alice"}, {User: "alice", Agent: "billing-bot", Incident: "INC-142"}} {
		if l := f.audited(q); len(l) != 1 || l[0].Number != dec.Number {
			t.Errorf("%+v: %+v", q, l)
		}
	}
	if raw := f.exported(authority.AuditQuery{}); bytes.Contains(raw, []byte("seed")) || bytes.Count(raw, []byte(`"body"`)) < len(list) {
		t.Errorf("%s", raw)
	}
	if raw := f.exported(authority.AuditQuery{Incident: "INC-142"}); bytes.Contains(raw, []byte("globex")) {
		t.Error("more than was asked for")
	}
}

// The trace id of a request is on record, and attempts without a token are.
func TestAuditOfRequests(t *testing.T) {
	f := start(t, Options{Issuers: []string{issuer}, APIListen: "127.0.0.1:0"})
	send := func(token string) int {
		req, err := http.NewRequestWithContext(f.ctx, http.MethodPost, "http://"+f.a.APIAddr()+"/v1/decisions",
			strings.NewReader(`{"operation":"revoke","reason":"anomaly","targets":[{"terms":[{"kind":"session","value":"s"}]}]}`))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Type", "application/json")
		req.Header.Set("Authorization", "Bearer "+token)
		req.Header.Set("Traceparent", "00-"+trace+"-b7ad6b7169203331-01")
		resp, err := http.DefaultTransport.RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		return resp.StatusCode
	}
	defer http.DefaultTransport.(*http.Transport).CloseIdleConnections()
	token, err := os.ReadFile(filepath.Join(f.a.o.DataDir, TokenFile))
	if err != nil {
		t.Fatal(err)
	}
	if code := send(strings.TrimSpace(string(token))); code != http.StatusOK {
		t.Fatal(code)
	}
	if l := f.audited(authority.AuditQuery{Trace: trace}); len(l) != 1 || l[0].Principal.Means != "bootstrap" || l[0].ParentID != "b7ad6b7169203331" {
		t.Errorf("%+v", l)
	}
	for range 20 {
		if code := send("wrong"); code != http.StatusUnauthorized {
			t.Fatal(code)
		}
	}
	f.until(func() bool {
		n := uint64(0)
		for _, e := range f.audited(authority.AuditQuery{Kind: authority.AuditSignIn}) {
			if e.Outcome == authority.OutcomeDone {
				continue // of the test itself
			}
			if n += e.Count; e.Outcome != authority.OutcomeRefused || !strings.Contains(e.Detail, "127.0.0.1") || strings.Contains(fmt.Sprint(e), "wrong") {
				t.Fatalf("%+v", e)
			}
		}
		return n == 20
	})
	if l := f.audited(authority.AuditQuery{Kind: authority.AuditSignIn}); len(l) > 4 {
		t.Errorf("%d records of 20 attempts", len(l))
	}
}

// A decision that the audit does not have is in effect, and is not acknowledged
// as durable; its record is there once the store takes it.
func TestDecisionWaitsForItsRecord(t *testing.T) {
	f := start(t, Options{Issuers: []string{issuer}, AckWait: 200 * time.Millisecond})
	f.until(func() bool { return f.a.audit.Status().Number > 0 })
	limit := func(n int64) {
		js, err := jetstream.New(f.a.nc)
		if err != nil {
			t.Fatal(err)
		}
		s, err := js.Stream(f.ctx, natsfeed.AuditStream)
		if err != nil {
			t.Fatal(err)
		}
		c := s.CachedInfo().Config
		if c.MaxMsgs = n; n > 0 {
			c.MaxMsgs = int64(s.CachedInfo().State.Msgs)
		}
		if _, err := js.UpdateStream(f.ctx, c); err != nil {
			t.Fatal(err)
		}
	}
	r := authority.Request{Operation: authority.Revoke, Reason: "anomaly", Targets: one("session", "s"), Incident: "INC-1", Commit: true}
	limit(1)
	d, err := f.c.DecideOnce(f.ctx, "k", r)
	if err != nil || d.Durable || !d.Committed || d.Number == 0 {
		t.Fatalf("%+v, %v", d, err)
	}
	if c := f.settle(d); !c.Durable {
		t.Errorf("the log has it: %+v", c)
	}
	f.until(func() bool {
		st, err := f.c.Status(f.ctx)
		if err != nil {
			t.Fatal(err)
		}
		return st.Audit.Waiting > 0 && strings.Contains(strings.Join(st.Warnings, "\n"), "the audit cannot be written")
	})
	limit(-1)
	f.until(func() bool {
		l := f.audited(authority.AuditQuery{Incident: "INC-1", Kind: authority.AuditDecision})
		return len(l) == 1 && l[0].Sequence == d.Number
	})
	if d, err = f.c.DecideOnce(f.ctx, "k", r); err != nil || !d.Durable || !d.Duplicate {
		t.Errorf("%+v, %v", d, err)
	}
}

// What enforcers reported is in the audit, found by agent, user and trace, beside
// what was decided; receipts and coverage are there, too. A restart audits none
// of it again.
func TestAuditOfEnforcement(t *testing.T) {
	dir := t.TempDir()
	f := start(t, Options{Issuers: []string{issuer}, DataDir: dir})
	p := f.point("tools", trail.Options{Sample: 1})
	alice := f.prepare(p.Enforcer, session.Identity{User: "alice", Session: session.SessionRef{ID: "s-1"}, Actors: []session.Actor{{ID: "spiffe://corp/agent/billing"}}})
	bob := f.prepare(p.Enforcer, session.Identity{User: "bob", Session: session.SessionRef{ID: "s-2"}})
	for _, who := range []*session.Prepared{alice, bob} {
		if err := p.call(who, "transfer_funds"); err != nil {
			t.Fatal(err)
		}
	}
	d := f.decide(authority.Request{Operation: authority.Revoke, Reason: "anomaly", Targets: one("user", "alice"), Incident: "INC-7"})
	f.settle(d)
	if err := p.call(alice, "transfer_funds"); !errors.Is(err, session.ErrRevoked) {
		t.Fatal(err)
	}
	decisions := func(q authority.AuditQuery) (calls, others []string) {
		for _, e := range f.audited(q) {
			for _, c := range e.Trail {
				calls = append(calls, c.Decision+" "+c.User)
			}
			if e.Kind != authority.AuditReport {
				others = append(others, e.Kind)
			}
		}
		slices.Sort(calls)
		slices.Sort(others)
		return calls, others
	}
	f.until(func() bool {
		calls, others := decisions(authority.AuditQuery{User: "alice"})
		return fmt.Sprint(calls, others) == "[allowed alice denied alice] [decision]"
	})
	if calls, _ := decisions(authority.AuditQuery{Agent: "SPIFFE://corp/agent/billing"}); len(calls) != 2 {
		t.Errorf("by agent: %v", calls)
	}
	if calls, _ := decisions(authority.AuditQuery{Trace: trace, User: "bob"}); fmt.Sprint(calls) != "[allowed bob]" {
		t.Errorf("by trace and user: %v", calls)
	}
	f.until(func() bool {
		_, others := decisions(authority.AuditQuery{Incident: "INC-7"})
		return fmt.Sprint(others) == "[coverage decision]"
	})
	cover := f.audited(authority.AuditQuery{Kind: authority.AuditCoverage, Incident: "INC-7"})[0]
	if c := cover.Coverage; c == nil || !c.Effective || c.InEffect != 1 || len(c.Detail) != 1 || c.Detail[0].AppliedAt.IsZero() || cover.Sequence != d.Number {
		t.Errorf("%+v", cover)
	}
	f.until(func() bool {
		return slices.ContainsFunc(f.audited(authority.AuditQuery{Kind: authority.AuditReceipts}), times(t, d))
	})
	for _, by := range []func(*bytes.Buffer) error{
		func(b *bytes.Buffer) error { return f.c.ExportReceipts(f.ctx, "INC-7", 0, 0, b) },
		func(b *bytes.Buffer) error { return f.c.ExportReceipts(f.ctx, "", d.Epoch, d.Number, b) },
	} {
		var b bytes.Buffer
		if err := by(&b); err != nil {
			t.Fatal(err)
		}
		r, err := audit.VerifyReceipts(bytes.NewReader(b.Bytes()), f.a.store.Root(), nil)
		if err != nil || !r.Sound || len(r.Decisions) != 1 || len(r.Decisions[0].Applied) != 1 || r.Decisions[0].Applied[0].Enforcer != "tools" ||
			r.Decisions[0].Applied[0].LatencyMillis > 5000 || !r.Decisions[0].At.Equal(d.At) {
			t.Errorf("%+v, %v", r, err)
		}
	}
	var problem *authority.Problem
	if err := f.c.ExportReceipts(f.ctx, "INC-8", 0, 0, &bytes.Buffer{}); !errors.As(err, &problem) || problem.Type != authority.ProblemNotFound {
		t.Errorf("of no decision: %v", err)
	}
	calls, _ := decisions(authority.AuditQuery{})
	f.exported(authority.AuditQuery{})
	if err := errors.Join(p.rec.Close(), p.Close(), f.a.Close()); err != nil {
		t.Fatal(err)
	}
	f = start(t, Options{Issuers: []string{issuer}, DataDir: dir})
	if err := f.a.reports.CatchUp(f.ctx); err != nil {
		t.Fatal(err)
	}
	f.decide(authority.Request{Operation: authority.Revoke, Reason: "anomaly", Targets: one("session", "s")})
	if again, _ := decisions(authority.AuditQuery{}); len(again) < len(calls) || len(again) > len(calls)+1 { // one more may have come as it closed
		t.Errorf("after a restart: %v, before it %v", again, calls)
	}
	actions := []string{}
	for _, e := range f.audited(authority.AuditQuery{Kind: authority.AuditAuthority}) {
		actions = append(actions, e.Action)
	}
	if fmt.Sprint(actions) != "[start stop start]" {
		t.Errorf("%v", actions)
	}
	f.exported(authority.AuditQuery{})
}

// times reports whether a record has a receipt that says when d was applied.
func times(t *testing.T, d *authority.Decision) func(authority.AuditEntry) bool {
	return func(e authority.AuditEntry) bool {
		for _, x := range e.Receipts {
			fr, err := session.ParseFrame(x.Frame)
			if err != nil {
				t.Fatal(err)
			}
			r, err := session.UnmarshalReceipt(fr.Body)
			if err != nil {
				t.Fatal(err)
			}
			if slices.ContainsFunc(r.Batches, func(b session.Applied) bool { return b.Number == d.Number }) {
				return true
			}
		}
		return false
	}
}

const childEnv = "AUTHORITY_TEST_CHILD"

// child is an authority that decides without end, and says what was acknowledged.
func child(dir string) {
	fail := func(err error) {
		if err != nil {
			fmt.Fprintln(os.Stderr, "child:", err)
			os.Exit(1)
		}
	}
	ctx := context.Background()
	o := Options{DataDir: dir, Issuers: []string{issuer}}
	if os.Getenv(childEnv+"_BETWEEN") != "" {
		// Stored in the log, and nobody has been told.
		o.Hooks.AfterAck = func(number uint64) {
			if number >= 5 {
				_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
			}
		}
	}
	a, err := Open(ctx, o)
	fail(err)
	c, err := authority.New(authority.Options{Socket: a.Socket()})
	fail(err)
	var n atomic.Int64
	var out sync.Mutex
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for {
				incident := fmt.Sprintf("%s-%d", os.Getenv(childEnv+"_ROUND"), n.Add(1))
				d, err := c.Decide(ctx, authority.Request{Operation: authority.Revoke, Reason: "anomaly", Targets: one("session", incident), Incident: incident, Commit: true})
				fail(err)
				if d.Durable {
					out.Lock()
					fmt.Println(incident, d.Number)
					out.Unlock()
				}
			}
		})
	}
	wg.Wait()
}

// An authority that is killed with -9 at any moment has the record of every
// decision that it acknowledged, and the chain goes on.
func TestKilledAuthorityKeepsItsRecords(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "d")
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	acked := map[string]string{}
	for round := range 4 {
		cmd := exec.CommandContext(t.Context(), exe)
		cmd.Env = append(os.Environ(), childEnv+"="+dir, fmt.Sprintf("%s_ROUND=r%d", childEnv, round))
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		at, n := 1+rand.IntN(150), 0
		for lines := bufio.NewScanner(out); lines.Scan(); {
			incident, number, _ := strings.Cut(lines.Text(), " ")
			acked[incident] = number
			if n++; n == at {
				_ = cmd.Process.Signal(syscall.SIGKILL)
			}
		}
		if err := cmd.Wait(); err == nil || n < at {
			t.Fatalf("the child was to be killed after %d, and ended after %d: %v", at, n, err)
		}
	}
	f := start(t, Options{DataDir: dir, Issuers: []string{issuer}, recoverAfter: 50 * time.Millisecond})
	f.recordsOfTheLog()
	found := map[string]string{}
	for line := range bytes.Lines(f.exported(authority.AuditQuery{})) {
		var l struct{ Body authority.AuditRecord }
		if err := json.Unmarshal(line, &l); err != nil {
			t.Fatal(err)
		}
		if l.Body.Kind == authority.AuditDecision && !l.Body.Recovered {
			found[l.Body.Incident] = fmt.Sprint(l.Body.Sequence)
		}
	}
	for incident, number := range acked {
		if found[incident] != number {
			t.Errorf("%s was acknowledged at %s, and its record says %q", incident, number, found[incident])
		}
	}
	t.Logf("%d decisions acknowledged before 4 kills, %d on record", len(acked), len(found))
}

// recordsOfTheLog waits until each decision of the log has exactly one record, and
// returns them all.
func (f *fixture) recordsOfTheLog() (list []authority.AuditEntry) {
	f.Helper()
	js, err := jetstream.New(f.a.nc)
	if err != nil {
		f.Fatal(err)
	}
	s, err := js.Stream(f.ctx, natsfeed.LogStream)
	if err != nil {
		f.Fatal(err)
	}
	want := map[string]uint64{}
	for seq := uint64(1); seq <= s.CachedInfo().State.LastSeq; seq++ {
		m, err := s.GetMsg(f.ctx, seq)
		if err != nil {
			f.Fatal(err)
		}
		fr, err := session.ParseFrame(m.Data)
		if err != nil {
			f.Fatal(err)
		}
		b, err := session.UnmarshalBatch(fr.Body)
		if err != nil {
			f.Fatal(err)
		}
		if h, ok := f.a.seq.HashAt(b.Number); !ok || h != fr.Hash() {
			continue // no part of the chain
		}
		for _, d := range b.Decisions {
			want[hex.EncodeToString(d.ID[:])] = b.Number
		}
	}
	f.until(func() bool {
		if f.a.audit.Walked().Number <= f.a.headNumber() {
			return false
		}
		have := map[string]uint64{}
		list = list[:0]
		if err := f.a.eachAudited(f.ctx, authority.AuditQuery{Kind: authority.AuditDecision}, func(e *authority.AuditEntry) bool {
			if e.Sequence > 0 && !e.Duplicate {
				if have[e.Decision] != 0 {
					f.Fatalf("two records of the decision at %d: %+v", have[e.Decision], e)
				}
				have[e.Decision] = e.Sequence
				list = append(list, *e)
			}
			return true
		}); err != nil {
			f.Fatal(err)
		}
		if !maps.Equal(have, want) {
			f.Fatalf("the log has %d decisions, the audit %d: %v, %v", len(want), len(have), want, have)
		}
		return true
	})
	return list
}

func (a *Authority) headNumber() uint64 {
	_, n, _ := a.seq.Head()
	return n
}

// A decision that reached the log of an authority that was killed before it could
// record it is recorded from the log by whoever writes next, once: the next start
// finds nothing more to do.
func TestKilledBetweenTheLogAndTheAudit(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "d")
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), exe)
	cmd.Env = append(os.Environ(), childEnv+"="+dir, childEnv+"_BETWEEN=1", childEnv+"_ROUND=r")
	cmd.Stderr = os.Stderr
	if err := cmd.Run(); err == nil {
		t.Fatal("the child was to be killed")
	}
	for round := range 2 {
		f := start(t, Options{DataDir: dir, Issuers: []string{issuer}, recoverAfter: 50 * time.Millisecond})
		list := f.recordsOfTheLog()
		n := 0
		for _, e := range list {
			if !e.Recovered {
				continue
			}
			n++
			if e.Principal.Name != "" || e.Principal.Means != "unknown" || e.Outcome != authority.OutcomeDone || e.Entries != 1 || e.Reason != "anomaly" ||
				!strings.HasPrefix(e.Incident, "r-") || e.Decided.IsZero() || len(e.Targets) != 1 || !strings.Contains(e.Targets[0], "of tenant default") ||
				!strings.Contains(e.Detail, "key ") || e.Callers[0].Agent != "*" || e.Callers[0].User != "*" {
				t.Errorf("%+v", e)
			}
		}
		if n == 0 {
			t.Errorf("start %d: none of %d decisions was recovered", round+1, len(list))
		}
		f.exported(authority.AuditQuery{})
		// Asked again, it is no second one.
		if round == 0 {
			d := f.decide(authority.Request{Operation: authority.Revoke, Targets: one("session", "more"), Incident: "INC-1", Reason: "anomaly"})
			f.until(func() bool { return f.a.audit.Walked().Number > d.Number })
			if got := f.recordsOfTheLog(); len(got) != len(list)+1 {
				t.Errorf("%d records, want %d", len(got), len(list)+1)
			}
		}
		if err := f.a.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// What somebody asks for without the role for it is on record, with who it was.
func TestAuditOfForbidden(t *testing.T) {
	f := start(t, Options{Issuers: []string{issuer}})
	req, err := http.NewRequestWithContext(access.With(f.ctx, access.NewPrincipal("eve@"+issuer, access.MeansToken)), http.MethodPost, "http://a/v1/keyset", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Pattern = "POST /v1/keyset"
	for range 3 {
		f.a.refused(req, access.From(req.Context()).Check(access.PublishKeySet))
	}
	f.until(func() bool {
		l := f.audited(authority.AuditQuery{Kind: authority.AuditAccess})
		return len(l) > 0 && l[0].Principal.Name == "eve@"+issuer && l[0].Principal.Means == "token" && l[0].Action == "POST /v1/keyset" &&
			l[0].Outcome == authority.OutcomeRefused
	})
	// However many different ones there are, they come to a bounded number.
	for i := range 3 * maxAttempts {
		r := req.Clone(access.With(f.ctx, access.NewPrincipal(fmt.Sprint("eve", i), access.MeansToken)))
		f.a.refused(r, errors.New("no"))
	}
	f.a.watched.mu.Lock()
	n := len(f.a.watched.denied)
	f.a.watched.mu.Unlock()
	if n > maxAttempts+1 {
		t.Errorf("%d attempts wait to be recorded", n)
	}
}

// Canaries are revoked all the time: neither they nor the receipts of them fill
// the audit.
func TestCanariesDoNotFillTheAudit(t *testing.T) {
	f := start(t, Options{Issuers: []string{issuer}, CanaryEvery: 50 * time.Millisecond})
	f.enforcer("tools", enforce.Options{})
	f.until(func() bool { _, n, _ := f.a.seq.Head(); return n >= 12 })
	d := f.decide(authority.Request{Operation: authority.Revoke, Reason: "anomaly", Targets: one("session", "s"), Incident: "INC-1"})
	f.settle(d)
	f.until(func() bool {
		return slices.ContainsFunc(f.audited(authority.AuditQuery{Kind: authority.AuditReceipts}), times(t, d))
	})
	receipts := 0
	for _, e := range f.audited(authority.AuditQuery{Kind: authority.AuditReceipts}) {
		receipts += len(e.Receipts)
	}
	if receipts != 1 {
		t.Errorf("%d receipts are kept of one decision", receipts)
	}
	if l := f.audited(authority.AuditQuery{Kind: authority.AuditDecision}); len(l) != 1 {
		t.Errorf("%d records of one decision", len(l))
	}
}

// Sessions that are registered are counted, by who did it and in which tenant, and
// not one by one; who comes is mentioned once in a while, and only so many.
func TestAuditOfWhatComesInMasses(t *testing.T) {
	f := start(t, Options{Issuers: []string{issuer}, Tenants: []string{"acme", "umbrella"}})
	const n, each = 10, 500
	for i := range n {
		list := make([]authority.Session, each)
		for k := range list {
			list[k] = aSession(fmt.Sprintf("s-%d-%d", i, k), "alice", billing)
			list[k].Tenant = []string{"acme", "umbrella"}[k%2]
		}
		f.register(list...)
	}
	f.until(func() bool {
		total := map[string]uint64{}
		l := f.audited(authority.AuditQuery{Kind: authority.AuditRegistry})
		for _, e := range l {
			if e.Action != "register-sessions" || e.Principal.Means != "socket" || len(e.Tenants) != 1 || e.Callers[0].Tenant != e.Tenants[0] ||
				e.Callers[0].Agent != "*" || e.Callers[0].User != "*" || !strings.Contains(e.Detail, "hash ") {
				t.Fatalf("%+v", e)
			}
			total[e.Tenants[0]] += e.Count
		}
		if len(l) > 2*n {
			t.Fatalf("%d records", len(l))
		}
		return total["acme"] == n*each/2 && total["umbrella"] == n*each/2
	})
	number, hash := f.a.registry.Head()
	if l := f.audited(authority.AuditQuery{Kind: authority.AuditRegistry}); !strings.Contains(l[0].Detail, fmt.Sprintf("batch %d of the registry, which has the hash %x", number, hash)) {
		t.Errorf("%s, and it is %d", l[0].Detail, number)
	}
	forbidden := access.With(f.ctx, access.NewPrincipal("eve", access.MeansToken, access.Grant{Role: access.Viewer, Tenants: []string{"acme"}}))
	for range 3 {
		if _, err := f.a.RegisterSessions(forbidden, authority.SessionsRequest{Sessions: []authority.Session{{Tenant: "acme", ID: "x"}}}); problemOf(err) != "forbidden" {
			t.Fatal(err)
		}
	}
	f.until(func() bool {
		l := f.audited(authority.AuditQuery{Kind: authority.AuditAccess})
		return len(l) > 0 && l[0].Principal.Name == "eve" && fmt.Sprint(l[0].Tenants) == "[acme]"
	})
	for i := range 2 * maxSignedIn {
		f.a.admitted(access.NewPrincipal(fmt.Sprint("user-", i/2), access.MeansToken, access.Grant{Role: access.Viewer, Tenants: []string{"acme"}}))
	}
	names, more := map[string]int{}, uint64(0)
	f.until(func() bool {
		clear(names)
		more = 0
		if err := f.a.eachAudited(f.ctx, authority.AuditQuery{Kind: authority.AuditSignIn}, func(e *authority.AuditEntry) bool {
			if names[e.Principal.Name]++; e.Principal.Name == "" {
				more += e.Count
			}
			return true
		}); err != nil {
			t.Fatal(err)
		}
		return more > 0
	})
	delete(names, "")
	for name, k := range names {
		if k != 1 {
			t.Errorf("%s is mentioned %d times", name, k)
		}
	}
	if len(names) != maxSignedIn { // with the test's own
		t.Errorf("%d names", len(names))
	}
}

// Whoever may read the audit in one tenant sees what is about that one, in a list
// and in an export, which can be verified, and nothing of any other: neither a
// value, nor that it exists.
func TestAuditOfOneTenant(t *testing.T) {
	f := start(t, Options{Issuers: []string{issuer}, Tenants: []string{"acme", "umbrella"}, Version: "v9"})
	auditor := func(tenants ...string) context.Context {
		return access.With(f.ctx, access.NewPrincipal("auditor", access.MeansToken, access.Grant{Role: access.Auditor, Tenants: tenants}))
	}
	target := func(tenant, user string) authority.Target { return authority.One(tenant, "user", issuer, user) }
	revoke := func(incident string, targets ...authority.Target) *authority.Decision {
		return f.decide(authority.Request{Operation: authority.Revoke, Targets: targets, Reason: "anomaly", Incident: incident})
	}
	for name, tenants := range map[string][]string{"acme-1": {"acme"}, "umbrella-1": {"umbrella"}, "both-1": {"acme", "umbrella"}} {
		if _, err := f.c.Enroll(f.ctx, authority.EnrollRequest{Name: name, Tenants: tenants}); err != nil {
			t.Fatal(err)
		}
	}
	revoke("INC-A", target("acme", "alice"))
	last := revoke("INC-U", target("umbrella", "uma"))
	mixed := revoke("INC-B", target("acme", "anna"), target("umbrella", "ute"))
	f.agent(authority.Agent{Tenant: "umbrella", ID: "spiffe://umbrella/agent"})
	f.agent(authority.Agent{Tenant: "acme", ID: "spiffe://acme/agent"})
	kill := authority.Request{Operation: authority.Kill, Targets: everything(), Incident: "INC-P", Except: []authority.Target{target("umbrella", "undine")}}
	if _, err := f.c.Decide(f.ctx, kill); err != nil {
		t.Fatal(err)
	}
	kill.Incident, kill.Reason = "INC-G", "compromised"
	f.decide(kill)
	// Whom a kill spares by what was declared is not everybody's to know.
	if _, err := f.c.DeclareExemption(f.ctx, authority.ExemptionRequest{
		Target: authority.One("umbrella", "agent", "", "spiffe://umbrella/valve"), Owner: "plant", Reason: "closes by itself", Global: true,
	}); err != nil {
		t.Fatal(err)
	}
	if d := f.decide(authority.Request{Operation: authority.Kill, Targets: everything(), Incident: "INC-H", Reason: "compromised"}); len(d.Exempted) != 1 {
		t.Fatalf("%+v", d)
	}
	// Somebody of acme names another tenant: that stays theirs.
	mallory := access.With(f.ctx, access.NewPrincipal("mallory", access.MeansToken, access.Grant{Role: access.Responder, Tenants: []string{"acme"}}))
	if _, err := f.a.Decide(mallory, "k", authority.Request{Operation: authority.Revoke, Reason: "anomaly", Incident: "INC-M", Targets: []authority.Target{target("umbrella", "ursula")}, Commit: true}); problemOf(err) != "tenant" {
		t.Fatal(err)
	}
	f.a.trailed(1, "acme-1", "acme", "allan")
	f.a.trailed(2, "both-1", "acme", "aki", "umbrella", "ulla", "acme", "amy")
	f.a.trailed(3, "acme-1", "umbrella", "forged")
	f.until(func() bool {
		return len(f.audited(authority.AuditQuery{Kind: authority.AuditCoverage})) >= 3 && len(f.audited(authority.AuditQuery{Kind: authority.AuditReport})) == 4
	})
	for tenant, c := range map[string]struct{ sees, not []string }{
		"acme":     {[]string{"alice", "anna", "acme/agent", "allan", "aki", "amy", "INC-A", "INC-B", "INC-G", "INC-H", "acme-1", "both-1", "mallory"}, []string{"umbrella-", "umbrella/", "uma", "ute", "undine", "ulla", "INC-U", "INC-P", "forged", "v9"}},
		"umbrella": {[]string{"uma", "ute", "umbrella/agent", "ulla", "INC-U", "INC-B", "INC-G", "umbrella-1", "both-1"}, []string{"acme", "alice", "anna", "allan", "aki", "amy", "INC-A", "mallory", "ursula", "INC-P", "forged", "v9"}},
	} {
		ctx := auditor(tenant)
		p, err := f.a.Audit(ctx, authority.AuditQuery{Limit: authority.MaxAuditPage})
		if err != nil {
			t.Fatal(err)
		}
		list, err := json.Marshal(p.Records)
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range c.sees {
			if !bytes.Contains(list, []byte(s)) {
				t.Errorf("%s: %s is not in the list", tenant, s)
			}
		}
		// What one asks for finds nothing either.
		for _, q := range []authority.AuditQuery{{Tenant: "umbrella", User: "uma"}, {Tenant: "acme", Agent: "spiffe://acme/agent"}, {Tenant: "acme", User: "aki"}, {Kind: authority.AuditReceipts}, {Kind: authority.AuditAuthority}} {
			if p, err := f.a.Audit(ctx, q); err != nil || (len(p.Records) != 0) != (q.Tenant == tenant) {
				t.Errorf("%s: %+v: %+v, %v", tenant, q, p, err)
			}
		}
		if p, err := f.a.Audit(ctx, authority.AuditQuery{Incident: "INC-B", Kind: authority.AuditDecision}); err != nil || len(p.Records) != 1 ||
			len(p.Records[0].Targets) != 1 || len(p.Records[0].Callers) != 1 || p.Records[0].Callers[0].Tenant != tenant || p.Records[0].Sequence != mixed.Number {
			t.Errorf("%s: of both: %+v, %v", tenant, p, err)
		}
		var b bytes.Buffer
		if err := f.a.ExportAudit(ctx, authority.AuditQuery{}, &b); err != nil {
			t.Fatal(err)
		}
		for _, s := range c.not {
			if bytes.Contains(list, []byte(s)) && (s != "umbrella-" && s != "ursula") {
				t.Errorf("%s: %s is in the list", tenant, s)
			}
			if bytes.Contains(b.Bytes(), []byte(s)) {
				t.Errorf("%s: %s is in the export", tenant, s)
			}
		}
		if bytes.Contains(b.Bytes(), f.a.store.Frame()[:8]) || bytes.Contains(b.Bytes(), []byte(`{"keyset":`)) {
			t.Errorf("%s: the key set, which names all tenants, is in the export", tenant)
		}
		if _, err := audit.Verify(bytes.NewReader(b.Bytes()), f.a.store.Root(), nil); !errors.Is(err, audit.ErrNotExport) {
			t.Errorf("%s: without a key set: %v", tenant, err)
		}
		r, err := audit.Verify(bytes.NewReader(b.Bytes()), f.a.store.Root(), f.a.store.Frame())
		if err != nil || !r.Sound || fmt.Sprint(r.Tenants) != "["+tenant+"]" || r.Records == 0 || r.Omitted == 0 || r.Last < last.Number {
			t.Errorf("%s: %+v, %v", tenant, r, err)
		}
		// A record of another, put in from an export of all, is found out by the end
		// that was signed for this view.
		whole := f.exported(authority.AuditQuery{})
		for i, line := range bytes.Split(whole, []byte("\n")) {
			if bytes.Contains(line, []byte("INC-")) {
				lines := bytes.Split(slices.Clone(b.Bytes()), []byte("\n"))
				same := bytes.Equal(lines[i], line)
				lines[i] = line
				if r, err := audit.Verify(bytes.NewReader(bytes.Join(lines, []byte("\n"))), f.a.store.Root(), f.a.store.Frame()); err == nil && r.Sound && !same {
					t.Errorf("%s: line %d was exchanged unnoticed", tenant, i)
				}
			}
		}
	}
	if p, err := f.a.Audit(auditor(), authority.AuditQuery{}); err != nil || len(p.Records) != 0 {
		t.Errorf("of no tenant: %+v, %v", p, err)
	}
	if p, err := f.a.Audit(auditor("acme", "umbrella"), authority.AuditQuery{Incident: "INC-B", Kind: authority.AuditDecision}); err != nil || len(p.Records) != 1 || len(p.Records[0].Targets) != 2 {
		t.Errorf("of both tenants: %+v, %v", p, err)
	}
}

// trailed takes a report of an enforcer in, of calls by users of tenants, as if it
// had been read.
func (a *Authority) trailed(seq uint64, enforcer string, calls ...string) {
	rec := authority.AuditRecord{Kind: authority.AuditReport, Action: "report", Principal: authority.AuditPrincipal{Name: enforcer, Means: "enforcer"},
		Report: &authority.AuditedReport{Enforcer: enforcer}}
	var all []authority.TrailRecord
	for i := 0; i < len(calls); i += 2 {
		all = append(all, authority.TrailRecord{Enforcer: enforcer, TrailCaller: authority.TrailCaller{Tenant: calls[i], User: calls[i+1]}})
	}
	more := a.trailsOf(&rec, all)
	a.audit.NoteReport(seq, rec, more...)
}
