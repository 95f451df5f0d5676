package report

import (
	"bytes"
	"context"
	"crypto/ecdh"
	"crypto/ed25519"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/nats-io/nkeys"
	"go.uber.org/goleak"

	"github.com/interlock-fabric/interlock/internal/broker"
	"github.com/interlock-fabric/interlock/pkg/authority"
	"github.com/interlock-fabric/interlock/pkg/natsfeed"
	"github.com/interlock-fabric/interlock/pkg/session"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

type user struct{ seed, pub string }

func newUser(t *testing.T) user {
	t.Helper()
	kp, err := nkeys.CreateUser()
	must(t, err)
	seed, err := kp.Seed()
	must(t, err)
	pub, err := kp.PublicKey()
	must(t, err)
	return user{string(seed), pub}
}

// world is a bus with the enforcers a and b, and a reader of their reports.
type world struct {
	*testing.T
	ctx    context.Context
	js     jetstream.JetStream
	bus    map[string]*nats.Conn
	signer map[string]ed25519.PrivateKey
	key    *ecdh.PrivateKey
	reader *Reader
	opts   Options
}

func newWorld(t *testing.T) *world {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	t.Cleanup(cancel)
	main := newUser(t)
	users := map[string]user{"a": newUser(t), "b": newUser(t)}
	b, err := broker.Start(broker.Options{Dir: t.TempDir(), Listen: "127.0.0.1:0", Authority: main.pub, RelaxedSync: true,
		Enforcers: []broker.Enforcer{{Name: "a", PublicNKey: users["a"].pub}, {Name: "b", PublicNKey: users["b"].pub}}})
	must(t, err)
	t.Cleanup(func() { b.Close() })
	nc, err := b.Conn(ctx, main.seed)
	must(t, err)
	t.Cleanup(nc.Close)
	w := &world{T: t, ctx: ctx, bus: map[string]*nats.Conn{}, signer: map[string]ed25519.PrivateKey{}}
	w.js, err = jetstream.New(nc)
	must(t, err)
	must(t, broker.EnsureStreams(ctx, w.js, 1))
	for i, name := range []string{"a", "b"} {
		kp, err := nkeys.FromSeed([]byte(users[name].seed))
		must(t, err)
		w.bus[name], err = nats.Connect(b.ClientURL(), nats.Nkey(users[name].pub, kp.Sign), nats.CustomInboxPrefix(natsfeed.InboxPrefix(name)))
		must(t, err)
		t.Cleanup(w.bus[name].Close)
		w.signer[name] = ed25519.NewKeyFromSeed(bytes.Repeat([]byte{byte(i + 1)}, 32))
	}
	w.key, err = ecdh.X25519().NewPrivateKey(bytes.Repeat([]byte{9}, 32))
	must(t, err)
	w.opts = Options{
		JetStream: w.js,
		ReceiptKey: func(name string) (ed25519.PublicKey, bool) {
			k, ok := w.signer[name]
			if !ok {
				return nil, false
			}
			return k.Public().(ed25519.PublicKey), true
		},
		Sealing: func(id session.KeyID) (*ecdh.PrivateKey, bool) {
			return w.key, id == session.KeyIDOf(w.key.PublicKey().Bytes())
		},
	}
	w.reader = NewReader(w.opts)
	return w
}

// author makes the reports of one boot.
type author struct {
	*world
	name string
	next session.Report
}

func (w *world) author(name string, boot byte) *author {
	return &author{w, name, session.Report{Enforcer: name, Boot: session.WriterID{boot}}}
}

func denied(user, tool string) session.TrailRecord {
	now := session.InstantOf(time.Now())
	return session.TrailRecord{Decision: session.DecisionDenied, Cause: session.CauseRevoked, Count: 1, First: now, Last: now,
		Caller: session.Caller{Tenant: "acme", User: user}, Tool: tool}
}

// write seals the next report of the boot. It does not publish it.
func (a *author) write(records ...session.TrailRecord) []byte {
	a.Helper()
	a.next.Count++
	a.next.Time = session.InstantOf(time.Now())
	frame, hash, err := a.next.Seal(&session.TrailContent{Records: records}, a.key.PublicKey().Bytes(), a.signer[a.name])
	must(a, err)
	a.next.Prev = hash
	return frame
}

// send publishes as an enforcer, and waits until it is stored.
func (w *world) send(name string, frames ...[]byte) {
	w.Helper()
	for _, f := range frames {
		must(w, w.bus[name].Publish(natsfeed.ReportSubject(name), f))
	}
	must(w, w.bus[name].Flush())
}

// stored waits until the stream has had n messages.
func (w *world) stored(n uint64) {
	w.Helper()
	for {
		s, err := w.js.Stream(w.ctx, natsfeed.ReportStream)
		must(w, err)
		if s.CachedInfo().State.LastSeq >= n {
			return
		}
		select {
		case <-time.After(5 * time.Millisecond):
		case <-w.ctx.Done():
			w.Fatalf("%d messages, want %d", s.CachedInfo().State.LastSeq, n)
		}
	}
}

func (w *world) tools(q authority.TrailQuery) (tools []string, of map[string]authority.TrailEnforcer) {
	w.Helper()
	t, err := w.reader.Records(w.ctx, q, nil)
	must(w, err)
	for _, r := range t.Records {
		tools = append(tools, r.Tool)
	}
	of = map[string]authority.TrailEnforcer{}
	for _, e := range t.Enforcers {
		of[e.Name] = e
	}
	return tools, of
}

// TestReportsThatAreNotBelieved sends everything that is not an honest next
// report. Each is refused and counted, and nothing of it is told.
func TestReportsThatAreNotBelieved(t *testing.T) {
	w := newWorld(t)
	a, b := w.author("a", 1), w.author("b", 3)
	first, second := a.write(denied("alice", "one")), a.write(denied("alice", "two"))
	fork := &author{w, "a", session.Report{Enforcer: "a", Boot: session.WriterID{1}, Count: 2, Prev: session.Hash{1}}}
	forger := &author{w, "a", session.Report{Enforcer: "a", Boot: session.WriterID{7}}}
	own := w.signer["a"]
	w.signer["a"] = w.signer["b"]
	forged := forger.write(denied("mallory", "forged"))
	w.signer["a"] = own
	ofB := b.write(denied("bob", "of-b"))

	// What b sealed, with a's name and signature around it.
	f, err := session.ParseFrame(ofB)
	must(t, err)
	rep, err := session.UnmarshalReport(f.Body)
	must(t, err)
	stolen := *rep
	stolen.Enforcer, stolen.Boot, stolen.Count, stolen.Prev = "a", session.WriterID{1}, 3, a.next.Prev
	body, err := stolen.MarshalBody()
	must(t, err)
	resigned, err := session.Seal(session.TypeReport, body, w.signer["a"])
	must(t, err)

	inName, err := session.Seal(session.TypeReport, f.Body, w.signer["a"])
	must(t, err)
	next := &author{w, "a", a.next}
	third, err := session.ParseFrame(next.write(denied("alice", "of another type")))
	must(t, err)
	receipt, err := session.Seal(session.TypeReceipt, third.Body, w.signer["a"])
	must(t, err)
	flipped := bytes.Clone(second)
	flipped[len(flipped)/2] ^= 1

	w.send("a", first, second)
	bad := map[string][]byte{
		"forged by another":           forged,
		"another's whole report":      ofB,
		"signed, but in b's name":     inName,
		"a frame of another type":     receipt,
		"a bit flipped":               flipped,
		"truncated":                   second[:len(second)-1],
		"half":                        second[:len(second)/2],
		"empty":                       {},
		"garbage":                     []byte("ILK\x01\x09"),
		"replayed":                    first,
		"another at the same place":   fork.write(denied("mallory", "forked")),
		"as long as the stream takes": bytes.Repeat([]byte{1}, session.MaxReportLen-len(natsfeed.ReportSubject("a"))-64),
	}
	n := uint64(2)
	for name, frame := range bad {
		w.send("a", frame)
		n++
		w.stored(n)
		if _, of := w.tools(authority.TrailQuery{}); of["a"].Refused != n-2 || of["a"].Reports != 2 {
			t.Errorf("%s: %+v", name, of["a"])
		}
	}
	// Longer than a report: the server does not store it at all.
	w.send("a", bytes.Repeat([]byte{1}, session.MaxReportLen+1))
	// The last one once more is no fault: its sender did not know.
	w.send("a", second)
	w.send("b", ofB)
	w.stored(n + 2)
	tools, of := w.tools(authority.TrailQuery{})
	if fmt.Sprint(tools) != "[one two of-b]" || of["a"].Again != 1 || of["a"].Refused != uint64(len(bad)) || of["b"].Refused != 0 || of["b"].Reports != 1 {
		t.Errorf("%v, %+v", tools, of)
	}

	// What b sealed is believed to come from a, who signed it, but opens as
	// nothing: and is counted as that.
	w.send("a", resigned)
	w.stored(n + 3)
	if tools, of := w.tools(authority.TrailQuery{}); of["a"].Unreadable != 1 || fmt.Sprint(tools) != "[one two of-b]" {
		t.Errorf("%v, %+v", tools, of)
	}
	// An authority that starts now comes to the same.
	w.reader = NewReader(w.opts)
	if tools, of := w.tools(authority.TrailQuery{}); of["a"].Refused != uint64(len(bad)) || fmt.Sprint(tools) != "[one two of-b]" {
		t.Errorf("after a restart: %v, %+v", tools, of)
	}
	delete(w.signer, "a")
	w.reader = NewReader(w.opts)
	w.tools(authority.TrailQuery{})
	if _, strangers := w.reader.Enforcers(); strangers != n+2 {
		t.Errorf("%d reports of nobody", strangers)
	}
}

// TestGapsShow: reports that do not arrive are counted, within a boot and at the
// beginning of another; a boot that has ended does not come back.
func TestGapsShow(t *testing.T) {
	w := newWorld(t)
	a := w.author("a", 1)
	one := a.write(denied("alice", "1"))
	a.write(denied("alice", "lost"))
	a.write(denied("alice", "lost"))
	four := a.write(denied("alice", "4"))
	next := w.author("a", 2)
	next.write(denied("alice", "lost"))
	w.send("a", one, four, next.write(denied("alice", "6")), a.write(denied("alice", "late")))
	w.stored(4)
	tools, of := w.tools(authority.TrailQuery{})
	if fmt.Sprint(tools) != "[1 4 6]" || of["a"].Missing != 3 || of["a"].Refused != 1 {
		t.Errorf("%v, %+v", tools, of)
	}
}

// TestWhatOneEnforcerCanFill: an enforcer that floods the stream lets its own
// oldest reports give way, and nobody else's; nothing that it stores exceeds the
// bound.
func TestWhatOneEnforcerCanFill(t *testing.T) {
	w := newWorld(t)
	a, b := w.author("a", 1), w.author("b", 1)
	w.send("b", b.write(denied("bob", "kept")))
	w.send("a", a.write(denied("alice", "gone")))
	must(t, w.reader.CatchUp(w.ctx))
	big := bytes.Repeat([]byte{1}, session.MaxReportLen-1024)
	for range broker.MaxReports + 20 {
		w.send("a", big)
	}
	w.send("a", a.write(denied("alice", "new")))
	w.stored(broker.MaxReports + 23)
	s, err := w.js.Stream(w.ctx, natsfeed.ReportStream)
	must(t, err)
	if st := s.CachedInfo().State; st.Msgs != broker.MaxReports+1 || st.Bytes > (broker.MaxReports+1)*(session.MaxReportLen+1024) {
		t.Errorf("%d messages, %d bytes", st.Msgs, st.Bytes)
	}
	tools, of := w.tools(authority.TrailQuery{})
	if fmt.Sprint(tools) != "[kept new]" || of["a"].Refused < broker.MaxReports-1 || of["b"].Refused != 0 {
		t.Errorf("%v, %+v", tools, of)
	}
}

func TestQueries(t *testing.T) {
	w := newWorld(t)
	a, b := w.author("a", 1), w.author("b", 1)
	full := denied("alice", "delete")
	full.Caller.Client, full.Caller.Session = "cli", "s-2"
	full.Caller.Ancestors = []session.Actor{{ID: "s-1"}}
	full.Caller.Actors = []session.Actor{{ID: "SPIFFE://Corp/bot"}, {ID: "planner"}}
	full.Incident, full.Trace = "INC-1", session.TraceContext{TraceID: [16]byte{0xab}}
	allowed := denied("bob", "read")
	allowed.Decision, allowed.Cause = session.DecisionAllowed, session.CauseNone
	long := denied(strings.Repeat("u", 1000), "long")
	long.Caller.User = session.ReportText(long.Caller.User)
	w.send("a", a.write(full, allowed), a.write(denied("alice", "later")))
	w.send("b", b.write(long))
	w.stored(3)
	for _, tt := range []struct {
		q    authority.TrailQuery
		want string
	}{
		{authority.TrailQuery{}, "[delete read later long]"},
		{authority.TrailQuery{Enforcer: "b"}, "[long]"},
		{authority.TrailQuery{Enforcer: "c"}, "[]"},
		{authority.TrailQuery{User: "alice"}, "[delete later]"},
		{authority.TrailQuery{User: strings.Repeat("u", 1000)}, "[long]"},
		{authority.TrailQuery{Tenant: "acme", Client: "cli"}, "[delete]"},
		{authority.TrailQuery{Tenant: "other"}, "[]"},
		{authority.TrailQuery{Agent: "spiffe://corp/bot"}, "[delete]"},
		{authority.TrailQuery{Agent: "planner"}, "[delete]"},
		{authority.TrailQuery{Agent: "plan"}, "[]"},
		{authority.TrailQuery{Session: "s-1"}, "[delete]"},
		{authority.TrailQuery{Session: "s-2"}, "[delete]"},
		{authority.TrailQuery{Tool: "read"}, "[read]"},
		{authority.TrailQuery{Incident: "INC-1"}, "[delete]"},
		{authority.TrailQuery{Trace: "AB" + strings.Repeat("0", 30)}, "[delete]"},
		{authority.TrailQuery{Decision: "allowed"}, "[read]"},
		{authority.TrailQuery{Limit: 2}, "[later long]"},
		{authority.TrailQuery{Since: time.Now().Add(time.Hour)}, "[]"},
		{authority.TrailQuery{Since: time.Now().Add(-time.Hour)}, "[delete read later long]"},
	} {
		if tools, _ := w.tools(tt.q); fmt.Sprint(tools) != tt.want {
			t.Errorf("%+v: %v, want %s", tt.q, tools, tt.want)
		}
	}
	if tr, err := w.reader.Records(w.ctx, authority.TrailQuery{Limit: 4}, nil); err != nil || tr.More {
		t.Errorf("more than all: %v", err)
	}
	if tr, err := w.reader.Records(w.ctx, authority.TrailQuery{Limit: 3}, nil); err != nil || !tr.More {
		t.Errorf("there is more, and it does not say so: %v", err)
	}
	for tenant, want := range map[string]int{"acme": 4, "other": 0} {
		tr, err := w.reader.Records(w.ctx, authority.TrailQuery{}, func(t string) bool { return t == tenant })
		if err != nil || len(tr.Records) != want {
			t.Errorf("within %s: %d records, %v", tenant, len(tr.Records), err)
		}
	}
}

// TestSeenAreAddedUp: a caller's later report says more of the same; that of
// another boot, of another enforcer, or from after it was forgotten, is added.
// An enforcer is believed about the callers of its own tenants, and about those of
// whom it knows no tenant.
func TestWhatIsForeignIsLeftOut(t *testing.T) {
	w := newWorld(t)
	w.opts.Serves = func(enforcer, tenant string) bool { return enforcer == "b" || tenant == "acme" }
	w.reader = NewReader(w.opts)
	foreign, nobody := denied("carol", "foreign"), denied("", "nobody")
	foreign.Caller.Tenant, nobody.Caller.Tenant = "beta", ""
	sighting := func(tenant string) session.Sighting {
		return session.Sighting{Caller: session.Caller{Tenant: tenant, User: "carol"}, First: 1, Last: 2, Calls: 1}
	}
	for _, name := range []string{"a", "b"} {
		a := w.author(name, 1)
		a.next.Count, a.next.Time = 1, session.InstantOf(time.Now())
		frame, _, err := a.next.Seal(&session.TrailContent{
			Records: []session.TrailRecord{denied("alice", "own"), foreign, nobody}, Sightings: []session.Sighting{sighting("acme"), sighting("beta")},
		}, a.key.PublicKey().Bytes(), a.signer[name])
		must(t, err)
		w.send(name, frame)
	}
	w.stored(2)
	for name, want := range map[string]string{"a": "[own nobody]", "b": "[own foreign nobody]"} {
		tools, of := w.tools(authority.TrailQuery{Enforcer: name})
		if fmt.Sprint(tools) != want || of[name].Foreign != map[string]uint64{"a": 2}[name] {
			t.Errorf("%s: %v, %+v", name, tools, of)
		}
		seen, err := w.reader.Seen(w.ctx, authority.TrailQuery{Enforcer: name}, nil)
		must(t, err)
		if len(seen.Seen) != map[string]int{"a": 1, "b": 2}[name] || seen.Enforcers[0].Foreign != map[string]uint64{"a": 2}[name] {
			t.Errorf("%s: %+v", name, seen)
		}
	}
}

func TestSeenAreAddedUp(t *testing.T) {
	w := newWorld(t)
	send := func(a *author, list ...session.Sighting) {
		a.next.Count++
		frame, hash, err := a.next.Seal(&session.TrailContent{Sightings: list}, w.key.PublicKey().Bytes(), w.signer[a.name])
		must(t, err)
		a.next.Prev = hash
		w.send(a.name, frame)
	}
	saw := func(user string, first, last session.Instant, calls uint64) session.Sighting {
		return session.Sighting{Caller: session.Caller{User: user}, First: first, Last: last, Calls: calls, Denied: 1}
	}
	a, b := w.author("a", 1), w.author("b", 1)
	send(a, saw("alice", 1000, 2000, 5), saw("bob", 1500, 1500, 1))
	send(a, saw("alice", 1000, 3000, 9))
	send(a, saw("alice", 3500, 4000, 2)) // forgotten and seen again
	send(w.author("a", 2), saw("alice", 5000, 6000, 3))
	send(b, saw("alice", 500, 5500, 4))
	w.stored(5)
	s, err := w.reader.Seen(w.ctx, authority.TrailQuery{}, nil)
	must(t, err)
	if len(s.Seen) != 2 || s.Seen[1].User != "bob" {
		t.Fatalf("%+v", s.Seen)
	}
	x := s.Seen[0]
	if x.User != "alice" || x.Calls != 9+2+3+4 || x.Denied != 4 || x.First.UnixMilli() != 500 || x.Last.UnixMilli() != 6000 || fmt.Sprint(x.Enforcers) != "[a b]" {
		t.Errorf("%+v", x)
	}
	if s, err := w.reader.Seen(w.ctx, authority.TrailQuery{User: "bob"}, nil); err != nil || len(s.Seen) != 1 || s.Seen[0].Calls != 1 {
		t.Errorf("%+v, %v", s, err)
	}
	if s, err := w.reader.Seen(w.ctx, authority.TrailQuery{}, func(tenant string) bool { return tenant != "" }); err != nil || len(s.Seen) != 0 {
		t.Errorf("those of no tenant are seen by one: %+v, %v", s, err)
	}
	if s, err := w.reader.Seen(w.ctx, authority.TrailQuery{Limit: 1}, nil); err != nil || len(s.Seen) != 1 || !s.More {
		t.Errorf("%+v, %v", s, err)
	}
}

// TestBelievedIsTheSeamOfTheAudit: each believed report is handed on once, in
// order, and sealed still.
func TestBelievedIsTheSeamOfTheAudit(t *testing.T) {
	w := newWorld(t)
	var got []uint64
	w.opts.Believed = func(seq uint64, r *session.Report, _ session.Hash) {
		if r.Count != uint64(len(got)+1) || bytes.Contains(r.Sealed, []byte("alice")) {
			t.Errorf("report %d at %d", r.Count, seq)
		}
		got = append(got, seq)
	}
	w.reader = NewReader(w.opts)
	a := w.author("a", 1)
	w.send("a", a.write(denied("alice", "x")), []byte("garbage"), a.write(denied("alice", "y")))
	w.stored(3)
	ctx, cancel := context.WithCancel(w.ctx)
	done := make(chan struct{})
	go func() { w.reader.Follow(ctx); close(done) }()
	must(t, w.reader.CatchUp(w.ctx))
	must(t, w.reader.CatchUp(w.ctx))
	cancel()
	<-done
	if fmt.Sprint(got) != "[1 3]" {
		t.Errorf("%v", got)
	}
}

func TestAcceptIsBounded(t *testing.T) {
	e := &member{}
	for i := range 3 * maxBoots {
		must(t, e.accept(&session.Report{Boot: session.WriterID{byte(i), 1}, Count: 1}, session.Hash{1}))
	}
	if len(e.boots) != maxBoots {
		t.Errorf("%d boots are remembered", len(e.boots))
	}
	if err := e.accept(&session.Report{Boot: session.WriterID{3*maxBoots - 2, 1}, Count: 2}, session.Hash{1}); !errors.Is(err, ErrReplayed) {
		t.Errorf("an earlier boot: %v", err)
	}
}

// A question that was with a server when it died is never answered. What has
// been read is there all the same, and the next question is asked soon.
func TestStoreThatDoesNotAnswer(t *testing.T) {
	w := newWorld(t)
	asked := make(chan struct{}, 16)
	sub, err := w.js.Conn().Subscribe("_INBOX.dead.>", func(*nats.Msg) { asked <- struct{}{} })
	must(t, err)
	defer func() { must(t, sub.Unsubscribe()) }()
	w.opts.JetStream, err = jetstream.NewWithAPIPrefix(w.js.Conn(), "_INBOX.dead")
	must(t, err)
	r := NewReader(w.opts)
	reading, told := make(chan error, 1), make(chan struct{})
	go func() { reading <- r.CatchUp(w.ctx) }()
	select {
	case <-asked:
	case err := <-reading:
		t.Fatal("nothing was asked:", err)
	}
	go func() {
		r.Enforcers()
		close(told)
	}()
	select {
	case <-told:
	case err := <-reading:
		t.Fatal("what is known waited for the store:", err)
	}
	if err := <-reading; !errors.Is(err, context.DeadlineExceeded) || w.ctx.Err() != nil {
		t.Errorf("a question without an answer: %v, and the caller's time: %v", err, w.ctx.Err())
	}
}
