package audit

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"go.uber.org/goleak"

	"github.com/interlock-fabric/interlock/internal/broker"
	"github.com/interlock-fabric/interlock/internal/trust"
	"github.com/interlock-fabric/interlock/pkg/authority"
	"github.com/interlock-fabric/interlock/pkg/natsfeed"
	"github.com/interlock-fabric/interlock/pkg/session"
)

const childEnv = "AUDIT_TEST_CHILD"

func TestMain(m *testing.M) {
	if dir := os.Getenv(childEnv); dir != "" {
		child(dir)
		return
	}
	goleak.VerifyTestMain(m)
}

func must(tb testing.TB, err error) {
	tb.Helper()
	if err != nil {
		tb.Fatal(err)
	}
}

func eventually(tb testing.TB, what string, ok func() bool) {
	tb.Helper()
	deadline := time.Now().Add(20 * time.Second)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		if time.Now().After(deadline) {
			tb.Fatal("not in time: " + what)
		}
		<-tick.C
	}
}

// store is a deployment: its keys and its bus.
type store struct {
	testing.TB
	ctx  context.Context
	dir  string
	keys *trust.Store
	root *trust.Root
	b    *broker.Broker
	js   jetstream.JetStream
}

func newStore(tb testing.TB) *store {
	tb.Helper()
	ctx, cancel := context.WithTimeout(tb.Context(), 2*time.Minute)
	tb.Cleanup(cancel)
	s := &store{TB: tb, ctx: ctx, dir: tb.TempDir()}
	var err error
	s.keys, err = trust.Init(trust.InitOptions{Dir: filepath.Join(s.dir, "keys")}, session.InstantOf(time.Now()))
	must(tb, err)
	s.root, err = trust.LoadRoot(filepath.Join(s.dir, "keys", trust.RootFile))
	must(tb, err)
	s.start()
	return s
}

func (s *store) start() {
	s.Helper()
	nkey, err := s.keys.AuthorityNKey()
	must(s, err)
	s.b, err = broker.Start(broker.Options{Dir: filepath.Join(s.dir, "bus"), Authority: nkey, RelaxedSync: true})
	must(s, err)
	b := s.b
	s.Cleanup(func() { must(s, b.Close()) })
	s.js = s.conn()
	must(s, broker.EnsureStreams(s.ctx, s.js, 1))
}

func (s *store) conn() jetstream.JetStream {
	s.Helper()
	nc, err := s.b.Conn(s.ctx, s.keys.AuthoritySeed())
	must(s, err)
	s.Cleanup(nc.Close)
	js, err := jetstream.New(nc)
	must(s, err)
	return js
}

func (s *store) options() Options {
	return Options{
		JetStream: s.conn(), Trust: s.keys.Trust(), Signer: s.keys.Signer, Sealing: s.keys.Sealing, Frame: s.keys.Frame, Authority: "a",
	}
}

func (s *store) open(change ...func(*Options)) *Log {
	s.Helper()
	o := s.options()
	for _, c := range change {
		c(&o)
	}
	l, err := Open(s.ctx, o)
	must(s, err)
	s.Cleanup(func() { must(s, l.Close()) })
	return l
}

func record(i int) authority.AuditRecord {
	return authority.AuditRecord{
		Kind: authority.AuditDecision, Action: "revoke", Outcome: authority.OutcomeDone, Incident: "INC-1",
		Principal: authority.AuditPrincipal{Name: "uid 0", Means: "socket"},
		Callers:   []authority.AuditCaller{{Tenant: "acme", Agent: authority.AuditAny, User: "alice"}},
		Targets:   []string{"user alice"}, Detail: fmt.Sprint("record ", i),
	}
}

func (s *store) export(l *Log, q authority.AuditQuery) []byte {
	s.Helper()
	var b bytes.Buffer
	must(s, l.Export(s.ctx, q, nil, &b))
	return b.Bytes()
}

func (s *store) verify(file []byte) *Report {
	s.Helper()
	r, err := Verify(bytes.NewReader(file), s.keys.Root(), nil)
	must(s, err)
	return r
}

// sound demands that an export is, and returns how often each detail is in it.
func (s *store) sound(file []byte) map[string]int {
	s.Helper()
	if r := s.verify(file); !r.Sound {
		s.Fatalf("%+v", r)
	}
	out := map[string]int{}
	for line := range bytes.Lines(file) {
		var l struct{ Body *authority.AuditRecord }
		must(s, json.Unmarshal(line, &l))
		if l.Body != nil {
			out[l.Body.Detail]++
		}
	}
	return out
}

func sequence(s *store) jetstream.StreamState {
	s.Helper()
	st, err := s.js.Stream(s.ctx, natsfeed.AuditStream)
	must(s, err)
	return st.CachedInfo().State
}

// Several authorities write one chain, without a hole, and with nothing twice,
// whoever comes first, and whatever answers are lost on the way. It fails without
// the expected sequence, without reading on, and when what was sent is not known
// again.
func TestSeveralWriters(t *testing.T) {
	s := newStore(t)
	var lost atomic.Int64
	drop := func(o *Options) {
		o.publish = func(send func() (uint64, error)) (uint64, error) {
			seq, err := send()
			if err == nil && lost.Add(1)%3 == 0 {
				return 0, context.DeadlineExceeded // stored, and the answer is lost
			}
			return seq, err
		}
	}
	logs := []*Log{s.open(drop), s.open(drop), s.open()}
	const each = 40
	var wg sync.WaitGroup
	for w, l := range logs {
		for i := range each {
			wg.Go(func() {
				if err := l.Append(s.ctx, record(1000*w+i)); err != nil {
					t.Error(err)
				}
			})
		}
	}
	wg.Wait()
	got := s.sound(s.export(logs[2], authority.AuditQuery{}))
	for w := range logs {
		for i := range each {
			if n := got[record(1000*w+i).Detail]; n != 1 {
				t.Errorf("record %d of authority %d is there %d times", i, w, n)
			}
		}
	}
	if len(got) != len(logs)*each {
		t.Errorf("%d records", len(got))
	}
	if st := sequence(s); st.Msgs >= uint64(len(logs)*each) {
		t.Errorf("%d messages: nothing was stored together", st.Msgs)
	}
	again := s.open()
	if st := again.Status(); st.Number != uint64(len(logs)*each) || st.Strays != 0 {
		t.Errorf("after a restart: %+v", st)
	}
}

// An attempt that the store takes only after it was given up, and tried again, is
// known for what it is.
func TestStoredLate(t *testing.T) {
	s := newStore(t)
	var late func() (uint64, error)
	l := s.open(func(o *Options) {
		o.publish = func(send func() (uint64, error)) (uint64, error) {
			if late == nil {
				late = send
				return 0, context.DeadlineExceeded
			}
			_, _ = late()
			return send()
		}
	})
	must(t, l.Append(s.ctx, record(1)))
	if got := s.sound(s.export(l, authority.AuditQuery{})); got[record(1).Detail] != 1 {
		t.Errorf("%v", got)
	}
}

// Nothing in the stream can be read by whoever has the stream.
func TestSealedAtRest(t *testing.T) {
	s := newStore(t)
	l := s.open()
	must(t, l.Append(s.ctx, record(1)))
	m, err := s.js.Stream(s.ctx, natsfeed.AuditStream)
	must(t, err)
	raw, err := m.GetMsg(s.ctx, 1)
	must(t, err)
	for _, clear := range []string{"alice", "INC-1", "revoke", "socket"} {
		if bytes.Contains(raw.Data, []byte(clear)) {
			t.Errorf("%q is in clear", clear)
		}
	}
	// An authority that lacks the key writes, and says why it cannot read.
	o := s.options()
	o.Sealing = s2(s)
	blind, err := Open(s.ctx, o)
	must(t, err)
	defer blind.Close()
	must(t, blind.Append(s.ctx, record(2)))
	if _, err := blind.Records(s.ctx, authority.AuditQuery{}, nil); !errors.Is(err, ErrSealed) {
		t.Errorf("without the key: %v", err)
	}
	if got := s.sound(s.export(l, authority.AuditQuery{})); len(got) != 2 {
		t.Errorf("%v", got)
	}
}

// What does not go on from the chain, or is not signed by a key that may, is no
// part of it, and does not keep others from writing.
func TestStrays(t *testing.T) {
	s := newStore(t)
	l := s.open()
	must(t, l.Append(s.ctx, record(1)))
	stream, err := s.js.Stream(s.ctx, natsfeed.AuditStream)
	must(t, err)
	first, err := stream.GetMsg(s.ctx, 1)
	must(t, err)
	other := newStore(t)
	foreign := other.open()
	must(t, foreign.Append(other.ctx, record(66)))
	fs, err := other.js.Stream(other.ctx, natsfeed.AuditStream)
	must(t, err)
	forged, err := fs.GetMsg(other.ctx, 1)
	must(t, err)
	flipped := bytes.Clone(first.Data)
	flipped[len(flipped)-1] ^= 1
	bad := [][]byte{nil, []byte("garbage"), first.Data, forged.Data, flipped}
	for _, b := range bad {
		_, err := s.js.Publish(s.ctx, natsfeed.AuditSubject, b)
		must(t, err)
	}
	must(t, l.Append(s.ctx, record(2)))
	if st := l.Status(); st.Strays != uint64(len(bad)) || st.Number != 2 {
		t.Errorf("%+v", st)
	}
	if got := s.sound(s.export(l, authority.AuditQuery{})); len(got) != 2 {
		t.Errorf("%v", got)
	}
	again := s.open()
	must(t, again.Append(s.ctx, record(3)))
	if got := s.sound(s.export(l, authority.AuditQuery{})); len(got) != 3 {
		t.Errorf("after a restart: %v", got)
	}
}

// A key that was withdrawn cannot write on behind one that is trusted, but what
// it wrote before stays.
func TestWithdrawnKey(t *testing.T) {
	s := newStore(t)
	stolen, err := s.keys.Signer(session.InstantOf(time.Now()))
	must(t, err)
	thief := s.options()
	thief.Head = func() (uint64, uint64) { return 1, 5 }
	thief.Trust, err = session.NewTrust(s.keys.Root()) // which does not hear of the withdrawal
	must(t, err)
	_, err = thief.Trust.Update(s.keys.Frame(), s.keys.KeySet().Issued)
	must(t, err)
	thief.Signer = signs(stolen)

	l := s.open(func(o *Options) { o.Head = func() (uint64, uint64) { return 1, 10 } })
	must(t, l.Append(s.ctx, record(1)))
	_, err = s.keys.Rotate(s.root, session.InstantOf(time.Now()))
	must(t, err)
	must(t, s.keys.Withdraw(s.root, session.KeyIDOf(public(stolen)), 1, 8, session.InstantOf(time.Now())))
	must(t, l.Append(s.ctx, record(2)))
	th, err := Open(s.ctx, thief)
	must(t, err)
	th.at.Number, th.at.Hash, th.at.seq = l.at.Number, l.at.Hash, l.at.seq
	must(t, th.Append(s.ctx, record(66)))
	must(t, th.Close())
	must(t, l.Append(s.ctx, record(3)))
	if got := s.sound(s.export(l, authority.AuditQuery{})); len(got) != 3 || got[record(66).Detail] != 0 {
		t.Errorf("%v", got)
	}
	if st := s.open().Status(); st.Number != 3 {
		t.Errorf("after a restart: %+v", st)
	}
	// An export that it signs is not believed by who knows of the withdrawal.
	file := s.export(th, authority.AuditQuery{})
	r, err := Verify(bytes.NewReader(file), s.keys.Root(), s.keys.Frame())
	must(t, err)
	if r.Sound || !strings.Contains(fmt.Sprint(r.Faults), "withdrawn") {
		t.Errorf("%+v", r)
	}
}

// While the store does not answer, nobody waits for it who does not want to, and
// what waits is bounded and counted. It is stored once the store is back.
func TestStoreThatDoesNotAnswer(t *testing.T) {
	s := newStore(t)
	l := s.open()
	must(t, l.Append(s.ctx, record(0)))
	must(t, s.b.Close())
	ctx, cancel := context.WithTimeout(s.ctx, 50*time.Millisecond)
	defer cancel()
	if err := l.Append(ctx, record(1)); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("no store, and %v", err)
	}
	eventually(t, "it says why", func() bool { return l.Status().Failing != nil })
	for i := range maxWaiting + 10 {
		l.Note(record(2 + i))
	}
	st := l.Status()
	if st.Waiting != maxWaiting || st.Missed != 11 || st.Number != 1 {
		t.Fatalf("%+v", st)
	}
	if err := l.Append(s.ctx, record(1)); !errors.Is(err, ErrBusy) {
		t.Fatalf("no room, and %v", err)
	}
	start := time.Now()
	must(t, l.Close())
	if took := time.Since(start); took > closeTimeout+2*time.Second {
		t.Errorf("closing took %s", took)
	}
	if err := l.Append(s.ctx, record(1)); !errors.Is(err, ErrClosed) {
		t.Errorf("closed, and %v", err)
	}
}

// What waits when a log is closed is stored first.
func TestCloseStoresWhatWaits(t *testing.T) {
	s := newStore(t)
	l := s.open()
	for i := range 700 {
		l.Note(record(i))
	}
	must(t, l.Close())
	if got := s.sound(s.export(s.open(), authority.AuditQuery{})); len(got) != 700 {
		t.Errorf("%d of 700", len(got))
	}
}

// What retention removes is said in the chain, signed; what anybody else removes
// shows.
func TestRetention(t *testing.T) {
	s := newStore(t)
	l := s.open()
	for i := range 20 {
		must(t, l.Append(s.ctx, record(i)))
	}
	must(t, l.trim(s.ctx))
	if st := sequence(s); st.FirstSeq != 1 {
		t.Fatalf("nothing is old, and it begins at %d", st.FirstSeq)
	}
	l.o.KeepBytes = sequence(s).Bytes / 2
	must(t, l.trim(s.ctx))
	st := l.Status()
	if st.Floor < 8 || st.Floor > 14 || sequence(s).FirstSeq != st.Floor {
		t.Fatalf("floor %d, the stream begins at %d", st.Floor, sequence(s).FirstSeq)
	}
	file := s.export(l, authority.AuditQuery{})
	if r := s.verify(file); !r.Sound || r.First != st.Floor || r.Floor != st.Floor {
		t.Errorf("%+v", r)
	}
	l.o.KeepFor = time.Nanosecond
	must(t, l.trim(s.ctx))
	if got := l.Status().Floor; got < 20 {
		t.Errorf("by age: floor %d", got)
	}
	must(t, l.Append(s.ctx, record(30)))
	// Somebody with the store's own rights removes more.
	stream, err := s.js.Stream(s.ctx, natsfeed.AuditStream)
	must(t, err)
	must(t, stream.Purge(s.ctx, jetstream.WithPurgeSequence(sequence(s).LastSeq)))
	r := s.verify(s.export(s.open(), authority.AuditQuery{}))
	if r.Sound || !strings.Contains(fmt.Sprint(r.Faults), "lost them") {
		t.Errorf("%+v", r)
	}
	// One that was asked to begin later says so.
	if r := s.verify(s.export(s.open(), authority.AuditQuery{Since: time.Now().Add(-time.Hour)})); !r.Sound || !r.Partial {
		t.Errorf("%+v", r)
	}
}

// A stream that lacks what was stored is noticed at the next start, and no number
// is given twice.
func TestLostRecords(t *testing.T) {
	s := newStore(t)
	path := filepath.Join(s.dir, "head")
	with := func(o *Options) { o.HeadFile = path }
	l := s.open(with)
	for i := range 5 {
		must(t, l.Append(s.ctx, record(i)))
	}
	eventually(t, "where it is is written down", func() bool {
		b, err := os.ReadFile(path)
		return err == nil && bytes.Contains(b, []byte(`"number":5,`))
	})
	must(t, l.Append(s.ctx, record(5)))
	must(t, l.Close())
	if st := s.open(with).Status(); st.Lost != 0 || st.Number != 6 {
		t.Fatalf("%+v", st)
	}
	// Made anew.
	must(t, s.js.DeleteStream(s.ctx, natsfeed.AuditStream))
	must(t, broker.EnsureStreams(s.ctx, s.js, 1))
	l = s.open(with)
	must(t, l.Append(s.ctx, record(7)))
	if st := l.Status(); st.Lost != 6 || st.Number != 8 || st.Floor != 7 {
		t.Errorf("%+v", st)
	}
	file := s.export(l, authority.AuditQuery{})
	if got := s.sound(file); got[record(7).Detail] != 1 || !bytes.Contains(file, []byte("records 1 to 6 were stored, and are not there any more")) {
		t.Errorf("%v", got)
	}
	must(t, l.Close())
	// Rolled back.
	must(t, os.WriteFile(path, []byte(`{"number":20,"hash":"`+strings.Repeat("0", 64)+`"}`), 0o600))
	l = s.open(with)
	must(t, l.Append(s.ctx, record(9)))
	if st := l.Status(); st.Lost != 12 || st.Number != 10 {
		t.Errorf("%+v", st)
	}
	s.sound(s.export(l, authority.AuditQuery{}))
	must(t, l.Close())
	must(t, os.WriteFile(path, []byte("torn"), 0o600))
	if st := s.open(with).Status(); st.Lost != 0 || st.Number != 10 {
		t.Errorf("a torn file: %+v", st)
	}
}

// Reports are audited once, whoever hears them, and however often.
func TestReportsOnce(t *testing.T) {
	s := newStore(t)
	a, b := s.open(), s.open()
	for i := range 30 {
		a.NoteReport(uint64(i+1), record(i))
		b.NoteReport(uint64(i+1), record(i))
	}
	must(t, a.Append(s.ctx, record(100)))
	must(t, b.Append(s.ctx, record(101)))
	c := s.open(func(o *Options) { o.Reports = 31 })
	for i := range 31 {
		c.NoteReport(uint64(i+1), record(i))
	}
	must(t, c.Append(s.ctx, record(102)))
	got := s.sound(s.export(c, authority.AuditQuery{}))
	for i := range 31 {
		if n := got[record(i).Detail]; n != 1 {
			t.Errorf("report %d is there %d times", i, n)
		}
	}
	// A stream of reports that was made anew begins again.
	d := s.open(func(o *Options) { o.Reports = 5 })
	d.NoteReport(3, record(200))
	must(t, d.Append(s.ctx, record(201)))
	if got := s.sound(s.export(d, authority.AuditQuery{})); got[record(200).Detail] != 1 {
		t.Error("the reports of a new stream are not taken")
	}
}

func TestQueries(t *testing.T) {
	s := newStore(t)
	l := s.open()
	before := time.Now().Add(-time.Second)
	add := func(change func(*authority.AuditRecord)) {
		r := record(0)
		change(&r)
		must(t, l.Append(s.ctx, r))
	}
	add(func(r *authority.AuditRecord) { r.Detail = "1" })
	add(func(r *authority.AuditRecord) {
		r.Detail, r.Incident, r.TraceID = "2", "INC-2", "ab"
		r.Callers = []authority.AuditCaller{{Tenant: "acme", Agent: "SPIFFE://Corp/bot", User: "bob", Session: "s"}}
	})
	add(func(r *authority.AuditRecord) {
		r.Detail, r.Kind, r.Callers, r.Incident = "3", authority.AuditReport, nil, ""
		call := func(user string) authority.TrailRecord {
			return authority.TrailRecord{Tool: "tool of " + user, Incident: "INC-2", TraceID: "cd", TrailCaller: authority.TrailCaller{
				Tenant: "acme", User: user, Client: "cli", Session: "s-2", Actors: []authority.TrailLink{{ID: "planner"}, {ID: "worker"}}, Ancestors: []authority.TrailLink{{ID: "s-1"}},
			}}
		}
		r.Trail = []authority.TrailRecord{call("alice"), call("carol")}
	})
	for _, tt := range []struct {
		q    authority.AuditQuery
		want string
	}{
		{authority.AuditQuery{}, "[3 2 1]"},
		{authority.AuditQuery{Kind: "report"}, "[3]"},
		{authority.AuditQuery{User: "alice"}, "[3 1]"},
		{authority.AuditQuery{User: "carol"}, "[3]"},
		{authority.AuditQuery{Agent: "spiffe://corp/bot"}, "[2]"},
		{authority.AuditQuery{Agent: "worker"}, "[3]"},
		{authority.AuditQuery{Client: "cli"}, "[3]"},
		{authority.AuditQuery{Session: "s-1"}, "[3]"},
		{authority.AuditQuery{Session: "s"}, "[2]"},
		{authority.AuditQuery{Incident: "INC-2"}, "[3 2]"},
		{authority.AuditQuery{Trace: "AB"}, "[2]"},
		{authority.AuditQuery{Trace: "cd"}, "[3]"},
		{authority.AuditQuery{Tenant: "globex"}, "[]"},
		{authority.AuditQuery{Since: before}, "[3 2 1]"},
		{authority.AuditQuery{Until: before}, "[]"},
		{authority.AuditQuery{Since: time.Now().Add(time.Hour)}, "[]"},
		{authority.AuditQuery{Until: time.Now().Add(time.Hour)}, "[3 2 1]"},
	} {
		p, err := l.Records(s.ctx, tt.q, nil)
		must(t, err)
		var got []string
		for _, r := range p.Records {
			got = append(got, r.Detail)
		}
		if fmt.Sprint(got) != tt.want || p.Head != 3 || p.Floor != 1 || p.Next != "" {
			t.Errorf("%+v: %v of %+v, want %s", tt.q, got, p, tt.want)
		}
	}
	p, err := l.Records(s.ctx, authority.AuditQuery{User: "carol"}, nil)
	must(t, err)
	if len(p.Records[0].Trail) != 1 || p.Records[0].Trail[0].Tool != "tool of carol" {
		t.Errorf("calls of others: %+v", p.Records[0].Trail)
	}
	// In pages, across batches and within one.
	for i := range 50 {
		l.Note(record(1000 + i))
	}
	must(t, l.Append(s.ctx, record(2000)))
	var all []uint64
	q := authority.AuditQuery{Limit: 7}
	for {
		p, err := l.Records(s.ctx, q, nil)
		must(t, err)
		for _, r := range p.Records {
			all = append(all, r.Number)
		}
		if q.Before = p.Next; p.Next == "" {
			break
		}
	}
	for i, n := range all {
		if n != uint64(54-i) {
			t.Fatalf("pages: %v", all)
		}
	}
	if len(all) != 54 {
		t.Errorf("pages of %d records", len(all))
	}
	for _, bad := range []string{"x", "1", "1-", "-1", "1-2-3"} {
		if _, err := l.Records(s.ctx, authority.AuditQuery{Before: bad}, nil); !errors.Is(err, ErrCursor) {
			t.Errorf("cursor %q: %v", bad, err)
		}
	}
}

// child appends without end, and says on its output what was acknowledged.
func child(dir string) {
	fail := func(err error) {
		if err != nil {
			fmt.Fprintln(os.Stderr, "child:", err)
			os.Exit(1)
		}
	}
	keys, err := trust.Open(filepath.Join(dir, "keys"))
	fail(err)
	nkey, err := keys.AuthorityNKey()
	fail(err)
	b, err := broker.Start(broker.Options{Dir: filepath.Join(dir, "bus"), Authority: nkey})
	fail(err)
	ctx := context.Background()
	nc, err := b.Conn(ctx, keys.AuthoritySeed())
	fail(err)
	js, err := jetstream.New(nc)
	fail(err)
	l, err := Open(ctx, Options{JetStream: js, Trust: keys.Trust(), Signer: keys.Signer, Sealing: keys.Sealing, Frame: keys.Frame})
	fail(err)
	var first int
	_, err = fmt.Sscan(os.Getenv(childEnv+"_FIRST"), &first)
	fail(err)
	var next atomic.Int64
	var out sync.Mutex
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for {
				n := first + int(next.Add(1))
				fail(l.Append(ctx, record(n)))
				out.Lock()
				fmt.Println(n)
				out.Unlock()
			}
		})
	}
	wg.Wait()
}

// A kill -9 at any moment loses no record that was acknowledged, and breaks no
// chain.
func TestKill(t *testing.T) {
	s := newStore(t)
	must(t, s.b.Close())
	exe, err := os.Executable()
	must(t, err)
	const rounds, each = 6, 1_000_000
	acked := map[int]bool{}
	for round := range rounds {
		cmd := exec.CommandContext(s.ctx, exe)
		cmd.Env = append(os.Environ(), childEnv+"="+s.dir, fmt.Sprintf("%s_FIRST=%d", childEnv, round*each))
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		must(t, err)
		must(t, cmd.Start())
		// At a moment that nobody chose.
		at, n := 1+rand.IntN(300), 0
		lines := bufio.NewScanner(out)
		for lines.Scan() {
			var i int
			if _, err := fmt.Sscan(lines.Text(), &i); err == nil {
				acked[i] = true
			}
			if n++; n == at {
				must(t, cmd.Process.Signal(syscall.SIGKILL))
			}
		}
		if err := cmd.Wait(); err == nil || n < at {
			t.Fatalf("the child was to be killed after %d, and ended after %d: %v", at, n, err)
		}
	}
	s.start()
	got := s.sound(s.export(s.open(), authority.AuditQuery{}))
	for i := range acked {
		if n := got[record(i).Detail]; n != 1 {
			t.Errorf("record %d was acknowledged, and is there %d times", i, n)
		}
	}
	t.Logf("%d records acknowledged before %d kills, %d stored", len(acked), rounds, len(got))
}

func BenchmarkAppend(b *testing.B) {
	s := newStore(b)
	l := s.open()
	for b.Loop() {
		must(b, l.Append(s.ctx, record(1)))
	}
}
