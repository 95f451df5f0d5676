package sequencer

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/interlock-fabric/interlock/pkg/filter"
	"github.com/interlock-fabric/interlock/pkg/natsfeed"
	"github.com/interlock-fabric/interlock/pkg/session"
	"github.com/nats-io/nats.go/jetstream"
)

// byHand has segments published only when the test does it.
func byHand(o *Options) { o.SegmentEvery, o.SegmentBatches = time.Hour, 1<<40 }

// publish decides something and publishes a segment behind it.
func publish(t *testing.T, q *Sequencer, n int) {
	t.Helper()
	must(t, decideDurable(q, n))
	must(t, q.publishSegment())
}

func (s *store) stream(name string) jetstream.Stream {
	s.tb.Helper()
	js, err := jetstream.New(s.conn())
	must(s.tb, err)
	st, err := js.Stream(context.Background(), name)
	must(s.tb, err)
	return st
}

// first returns the position of a stream's first message.
func (s *store) first(name string) uint64 { return s.stream(name).CachedInfo().State.FirstSeq }

// refs returns what is described, oldest first.
func (s *store) refs(q *Sequencer) []described {
	s.tb.Helper()
	all, _, err := q.described(context.Background())
	must(s.tb, err)
	slices.Reverse(all)
	return all
}

// chainOf follows the chain back from the head of a sequencer through all that
// was heard of it, and checks that each decision is in it once.
func chainOf(t *testing.T, q *Sequencer, log *ear) *filter.Set {
	t.Helper()
	frames := map[session.Hash]*session.Batch{}
	for _, f := range log.all() {
		if b, err := session.UnmarshalBatch(f.Body); err == nil && f.Type == session.TypeBatch {
			frames[f.Hash()] = b
		}
	}
	var chain []*session.Batch
	_, number, head := q.Head()
	for at := head; at != q.trust.Origin(); {
		b := frames[at]
		if b == nil {
			t.Fatalf("batch %d was never heard", number-uint64(len(chain)))
		}
		chain, at = append(chain, b), b.Prev
	}
	if uint64(len(chain)) != number {
		t.Fatalf("%d batches up to number %d", len(chain), number)
	}
	var set *filter.Set
	seen := map[session.DecisionID]bool{}
	for _, b := range slices.Backward(chain) {
		set = set.Apply(b, nil)
		for _, d := range b.Decisions {
			if seen[d.ID] {
				t.Fatalf("decision %x is in the chain twice", d.ID)
			}
			seen[d.ID] = true
		}
	}
	return set
}

// The log is trimmed behind the oldest segment, and an authority that starts
// knows all the same what is in force, what was decided, and the hashes by which
// claims are judged. It fails when any of the three is not published beside the
// state, and when the log is read from its beginning or not trimmed.
func TestTrimmedLog(t *testing.T) {
	for _, where := range []string{"heap", "file"} {
		t.Run(where, func(t *testing.T) {
			s := newStore(t)
			dir := ""
			if where == "file" {
				dir = filepath.Join(t.TempDir(), "state")
			}
			mod := func(o *Options) { byHand(o); o.StateDir = dir }
			log := s.listen(natsfeed.LogSubject)
			q := s.open(mod)
			numbers := map[int]uint64{}
			const n = 60
			for i := range n {
				res, err := q.Decide(context.Background(), revoke(i))
				must(t, err)
				numbers[i] = res.Number
				if i%10 == 5 {
					must(t, q.publishSegment())
				}
			}
			refs := s.refs(q)
			if len(refs) != KeepSegments || s.first(natsfeed.LogStream) == 1 || s.first(natsfeed.SegmentStream) == 1 {
				t.Fatalf("%d segments; the log begins at %d, the segments at %d", len(refs), s.first(natsfeed.LogStream), s.first(natsfeed.SegmentStream))
			}
			q.lookAtLog()
			if st := q.Status(); st.LogFrom != refs[0].Number || st.Segment != refs[2].Number || time.Since(st.SegmentAt) > time.Minute {
				t.Fatalf("%+v, the oldest segment is of %d", st, refs[0].Number)
			}
			want := chainOf(t, q, log)
			if want.Digest() != q.State().Digest() {
				t.Fatal("another state than what was heard")
			}
			epoch, number, head := q.Head()
			old, _ := q.HashAt(2)
			q.Close()
			if dir != "" {
				checkModes(t, dir)
				must(t, os.WriteFile(filepath.Join(dir, segmentFile+".1.tmp"), nil, 0o600)) // of a crash
			}

			again := s.open(mod)
			if e, n, h := again.Head(); e != epoch || n != number || h != head {
				t.Fatalf("head %d of epoch %d, was %d", n, e, number)
			}
			if again.State().Digest() != want.Digest() || again.State().Len() != n {
				t.Fatal("another state after a restart")
			}
			if h, ok := again.HashAt(2); !ok || h != old {
				t.Error("the hash of a batch that was trimmed is not known")
			}
			for i := range n {
				res, err := again.Decide(context.Background(), revoke(i))
				must(t, err)
				if !res.Duplicate || !res.Durable || res.Number != numbers[i] {
					t.Fatalf("decision %d is at %d, sent again %+v", i, numbers[i], res)
				}
			}
			if again.segmentPath() != "" {
				if left, _ := filepath.Glob(filepath.Join(dir, "*.tmp")); len(left) > 0 {
					t.Error("left over:", left)
				}
			}
			for i := range KeepSegments {
				publish(t, again, n+i)
			}
			if got := chainOf(t, again, log); got.Digest() != again.State().Digest() {
				t.Fatal("another state than what was heard")
			}
		})
	}
}

func checkModes(t *testing.T, dir string) {
	t.Helper()
	for path, want := range map[string]os.FileMode{dir: 0o700, filepath.Join(dir, segmentFile): 0o600} {
		fi, err := os.Stat(path)
		must(t, err)
		if fi.Mode().Perm() != want {
			t.Errorf("%s: %v", path, fi.Mode())
		}
	}
}

// The file in the state directory is a copy and no more: one that is damaged, old
// or somebody else's is not used.
func TestStateDirIsOnlyACopy(t *testing.T) {
	s := newStore(t)
	dir := t.TempDir()
	mod := func(o *Options) { byHand(o); o.StateDir = dir }
	q := s.open(mod)
	publish(t, q, 1)
	path := q.segmentPath()
	old, err := os.ReadFile(path)
	must(t, err)
	publish(t, q, 2)
	now, err := os.ReadFile(path)
	must(t, err)
	want := q.State().Digest()
	q.Close()
	flipped := slices.Clone(now)
	flipped[len(flipped)/2] ^= 1
	for name, b := range map[string][]byte{"old": old, "flipped": flipped, "cut": now[:len(now)-1], "empty": {}} {
		must(t, os.WriteFile(path, b, 0o600))
		q := s.open(mod)
		if q.State().Digest() != want || q.State().Err() != nil {
			t.Errorf("%s: another state", name)
		}
		q.Close()
		if got, err := os.ReadFile(path); err != nil || !slices.Equal(got, now) {
			t.Errorf("%s: the file is not the published one now: %v", name, err)
		}
	}
}

// A file that rots under a running writer is noticed when the next segment is
// sealed of it; nothing is published of it, and the state is read anew.
func TestStateFileRots(t *testing.T) {
	s := newStore(t)
	q := s.open(byHand, func(o *Options) { o.StateDir = t.TempDir() })
	for n := range 200 {
		must(t, decideDurable(q, n))
	}
	must(t, q.publishSegment())
	want := q.State().Digest()
	f, err := os.OpenFile(q.segmentPath(), os.O_RDWR, 0)
	must(t, err)
	_, err = f.WriteAt([]byte("rot"), 4096+100)
	must(t, errors.Join(err, f.Close()))
	must(t, decideDurable(q, 1000))
	before := len(s.refs(q))
	if err := q.publishSegment(); !errors.Is(err, filter.ErrDamaged) {
		t.Fatalf("published: %v", err)
	}
	if len(s.refs(q)) != before {
		t.Fatal("something was described")
	}
	eventually(t, "it writes with a sound state", func() bool {
		return q.IsWriter() && q.State().Err() == nil && q.State().Len() == 201
	})
	publish(t, q, 1001)
	sums, count, err := q.State().Recount()
	if err != nil || count != 202 || sums.Total() != q.State().Digest() || q.State().Digest() == want {
		t.Fatal(count, err)
	}
}

// What is described but cannot be believed is passed over, and an older segment
// used: damaged, gone, of a later version, signed by nobody's key or by one that
// may not speak for all tenants, or of another log altogether.
func TestRefusedSegments(t *testing.T) {
	s := newStore(t)
	limited := newKey(t)
	lk := writerKey(limited)
	lk.Tenants = []session.TenantID{tenant}
	s.set = s.keySet(t, 1, writerKey(s.key), lk)
	q := s.open(byHand)
	for n := range KeepSegments + 1 {
		publish(t, q, n)
	}
	must(t, decideDurable(q, 100))
	want := q.State().Digest()
	refs := s.refs(q)
	newest := refs[len(refs)-1].SegmentRef
	q.Close()
	reader := &Sequencer{nc: s.conn()}
	js, err := jetstream.New(s.conn())
	must(t, err)
	describe := func(key ed25519.PrivateKey, typ session.FrameType, change func(*session.SegmentRef)) {
		r := newest
		change(&r)
		frame, err := session.Seal(typ, r.MarshalBody(), key)
		must(t, err)
		_, err = js.Publish(context.Background(), natsfeed.SegmentSubject, frame)
		must(t, err)
	}
	same := func(*session.SegmentRef) {} // so that nothing else is wrong
	steps := []struct {
		name string
		do   func()
	}{
		{"forged", func() { describe(newKey(t), session.TypeSegment, same) }},
		{"of a key for one tenant", func() { describe(limited, session.TypeSegment, same) }},
		{"later version", func() {
			describe(s.key, session.TypeSegment, func(r *session.SegmentRef) { r.Unknown = []session.Field{{Tag: 0x81, Value: []byte{1}}} })
		}},
		{"another frame", func() { describe(s.key, session.TypeHeartbeat, same) }},
		{"garbage", func() {
			_, err := js.Publish(context.Background(), natsfeed.SegmentSubject, []byte("garbage"))
			must(t, err)
		}},
		{"described as another number", func() { describe(s.key, session.TypeSegment, func(r *session.SegmentRef) { r.Number += 5 }) }},
		{"another head", func() {
			describe(s.key, session.TypeSegment, func(r *session.SegmentRef) { r.Head[0] ^= 1 })
		}},
		{"another state", func() {
			describe(s.key, session.TypeSegment, func(r *session.SegmentRef) { r.State[0] ^= 1 })
		}},
		{"without what a writer needs", func() {
			describe(s.key, session.TypeSegment, func(r *session.SegmentRef) { r.ResumeSize = 0 })
		}},
		{"of bytes that are not there", func() { describe(s.key, session.TypeSegment, func(r *session.SegmentRef) { r.Sum[0] ^= 1 }) }},
		{"of an epoch to come", func() { describe(s.key, session.TypeSegment, func(r *session.SegmentRef) { r.Epoch++ }) }},
		{"the newest has other decisions beside it", func() {
			var b bytes.Buffer
			must(t, reader.readObject(context.Background(), newest.ResumeSum, newest.ResumeSize, &b))
			subject := natsfeed.SegmentChunkSubject(newest.ResumeSum)
			must(t, s.stream(natsfeed.SegmentStream).Purge(context.Background(), jetstream.WithPurgeSubject(subject)))
			b.Bytes()[b.Len()-1] ^= 1
			_, err := js.Publish(context.Background(), subject, b.Bytes())
			must(t, err)
		}},
		{"the one before it is gone", func() {
			before := refs[len(refs)-2]
			must(t, s.stream(natsfeed.SegmentStream).Purge(context.Background(), jetstream.WithPurgeSubject(natsfeed.SegmentChunkSubject(before.Sum))))
		}},
	}
	for i, x := range steps {
		x.do()
		again := s.open(byHand)
		if again.State().Digest() != want || again.Status().Halted != nil {
			t.Fatalf("%s: another state: %+v", x.name, again.Status())
		}
		if got := again.Status().SegmentsRefused; got != uint64(i+1) {
			t.Errorf("%s: %d were refused, not %d", x.name, got, i+1)
		}
		again.Close()
	}
	again := s.open(byHand)
	if st := again.Status(); st.Segment != refs[len(refs)-3].Number {
		t.Fatalf("started from %d, not %d", st.Segment, refs[len(refs)-3].Number)
	}
	// Garbage does not push out what is needed, and goes with the next ones.
	n := 200
	eventually(t, "the log is trimmed behind new ones", func() bool {
		must(t, decideDurable(again, n))
		n++
		_ = again.publishSegment() // refuses, while what is gone has its turn
		refs := s.refs(again)
		return refs[0].Number > newest.Number+5 && len(refs) == KeepSegments
	})
	if last := s.open(byHand); last.State().Digest() != again.State().Digest() {
		t.Fatal("another state")
	}
}

// Nothing is trimmed while the store does not have, whole, what the log would be
// trimmed behind: its state, what a writer needs beside it, or its batch.
func TestNothingIsTrimmedBehindWhatIsLost(t *testing.T) {
	for _, lost := range []string{"state", "resume", "a chunk"} {
		t.Run(lost, func(t *testing.T) {
			s := newStore(t)
			q := s.open(byHand)
			for n := range 10 { // enough for two chunks
				d := Decision{ID: id(1000 + n)}
				for i := range session.MaxBatchEntries {
					d.Entries = append(d.Entries, revoke(10_000+n*session.MaxBatchEntries+i).Entries...)
				}
				_, err := q.Decide(context.Background(), d)
				must(t, err)
			}
			for n := range KeepSegments - 1 {
				publish(t, q, n)
			}
			oldest := s.refs(q)[0]
			purge := []jetstream.StreamPurgeOpt{jetstream.WithPurgeSubject(natsfeed.SegmentChunkSubject(oldest.Sum))}
			switch lost {
			case "resume":
				purge[0] = jetstream.WithPurgeSubject(natsfeed.SegmentChunkSubject(oldest.ResumeSum))
			case "a chunk":
				purge = append(purge, jetstream.WithPurgeKeep(1))
			}
			must(t, s.stream(natsfeed.SegmentStream).Purge(context.Background(), purge...))
			must(t, decideDurable(q, 10))
			if err := q.publishSegment(); !errors.Is(err, errMissing) {
				t.Fatalf("trimmed behind what is lost: %v", err)
			}
			if first := s.first(natsfeed.LogStream); first != 1 {
				t.Fatalf("the log begins at %d", first)
			}
			// The next one has its turn.
			publish(t, q, 11)
			if first := s.first(natsfeed.LogStream); first == 1 {
				t.Fatal("nothing is trimmed any more")
			}
			if again := s.open(byHand); again.State().Digest() != q.State().Digest() {
				t.Fatal("another state after a restart")
			}
		})
	}
}

// What the store loses while it is being published is never described.
func TestLostWhilePublished(t *testing.T) {
	s := newStore(t)
	var lose atomic.Bool
	q := s.open(byHand, func(o *Options) {
		o.Hooks.Segment = func(step string) {
			if step == "stored" && lose.Load() {
				must(t, s.stream(natsfeed.SegmentStream).Purge(context.Background()))
			}
		}
	})
	for n := range KeepSegments - 1 {
		publish(t, q, n)
	}
	lose.Store(true)
	must(t, decideDurable(q, 10))
	if err := q.publishSegment(); !errors.Is(err, errMissing) {
		t.Fatalf("described: %v", err)
	}
	if len(s.refs(q)) != 0 || s.first(natsfeed.LogStream) != 1 {
		t.Fatal("something was described, or trimmed")
	}
	if again := s.open(byHand); again.State().Digest() != q.State().Digest() {
		t.Fatal("another state after a restart")
	}
}

// Without a segment that leads up to it, a trimmed log is not written to, and
// says why; a new epoch mends that.
func TestTrimmedWithoutSegments(t *testing.T) {
	s := newStore(t)
	q := s.open(byHand)
	for n := range KeepSegments + 1 {
		publish(t, q, n)
	}
	q.Close()
	must(t, s.stream(natsfeed.SegmentStream).Purge(context.Background()))
	q = s.open(byHand)
	if !errors.Is(q.Status().Halted, ErrTrimmed) || q.State().Len() != 0 {
		t.Fatalf("%+v", q.Status())
	}
	if _, err := q.Decide(context.Background(), revoke(50)); !errors.Is(err, ErrTrimmed) {
		t.Fatalf("decided: %v", err)
	}
	must(t, q.PublishKeySet(context.Background(), s.keySet(t, 2, writerKey(s.key))))
	eventually(t, "the new epoch", func() bool {
		res, err := q.Decide(context.Background(), revoke(50))
		return err == nil && res.Durable
	})
	// The log begins with an epoch now, though not at its first position.
	must(t, decideDurable(q, 51))
	again := s.open(byHand)
	if again.Status().Halted != nil || again.State().Digest() != q.State().Digest() {
		t.Fatalf("%+v", again.Status())
	}
}

// A withdrawal that reaches behind what is kept stops the writing, and loses
// nothing: the next epoch restates what was held. One that does not is as before
// the log was trimmed.
func TestWithdrawalBehindTheTrimmedLog(t *testing.T) {
	for _, deep := range []bool{false, true} {
		t.Run(fmt.Sprint("deep=", deep), func(t *testing.T) {
			s := newStore(t)
			second := newKey(t)
			s.set = s.keySet(t, 1, writerKey(s.key), writerKey(second))
			k := s.keys(t, s.key, s.set)
			q := s.open(byHand, func(o *Options) { o.Keys = k })
			for n := range 2 * KeepSegments {
				publish(t, q, n)
			}
			must(t, decideDurable(q, 10))
			last := s.refs(q)[2].Number
			if deep {
				last = 2
			}
			// These are described by a key that is not withdrawn: what they are of
			// was signed by the one that is.
			k.use(second)
			publish(t, q, 11)
			if deep {
				publish(t, q, 12)
				publish(t, q, 13)
			}
			n := q.State().Len()
			old := writerKey(s.key)
			old.Withdrawn, old.LastEpoch, old.LastNumber = true, 1, last
			set := s.keySet(t, 1, old, writerKey(second))
			must(t, q.PublishKeySet(context.Background(), set))
			if !deep {
				eventually(t, "all is decided again", func() bool { return q.State().Len() == n && q.IsWriter() })
				must(t, decideDurable(q, 20))
				if r := s.open(byHand, func(o *Options) { o.Keys = s.keys(t, second, set) }); r.State().Digest() != q.State().Digest() {
					t.Fatal("another state after a restart")
				}
				return
			}
			eventually(t, "it stops", func() bool { return errors.Is(q.Status().Halted, ErrTrimmed) })
			if q.State().Len() != n {
				t.Fatalf("%d entries are held", q.State().Len())
			}
			must(t, q.PublishKeySet(context.Background(), s.keySet(t, 2, writerKey(second))))
			eventually(t, "the next epoch has it all", func() bool { return q.State().Len() == n })
			res, err := q.Decide(context.Background(), revoke(0))
			must(t, err)
			if !res.Duplicate {
				t.Error("what was decided is not known any more")
			}
		})
	}
}

// An authority that was not reading while the log was trimmed goes on from a
// segment.
func TestFollowerAwayAcrossATrim(t *testing.T) {
	s := newStore(t)
	q := s.open(byHand)
	eventually(t, "it writes", q.IsWriter)
	var deaf atomic.Bool
	f := s.open(byHand, func(o *Options) { o.Hooks.DropAcks = deaf.Load })
	must(t, decideDurable(q, 0))
	eventually(t, "it follows", func() bool { return f.State().Len() == 1 })
	deaf.Store(true)
	for n := range 2 * KeepSegments {
		publish(t, q, 1+n)
	}
	if first := s.first(natsfeed.LogStream); first <= f.Status().Position+1 {
		t.Fatalf("the log begins at %d, it had read up to %d", first, f.Status().Position)
	}
	deaf.Store(false)
	eventually(t, "it has caught up", func() bool { return f.State().Digest() == q.State().Digest() })
	if f.Status().Halted != nil {
		t.Fatal(f.Status().Halted)
	}
}

// A writer that was deposed while it published describes nothing any more, and
// trims nothing that its successor has not.
func TestDeposedPublisher(t *testing.T) {
	s := newStore(t)
	reached, goOn := make(chan string, 1), make(chan struct{})
	var hold atomic.Bool
	var usurp atomic.Bool
	a := s.open(byHand, func(o *Options) {
		o.Lease = 500 * time.Millisecond
		o.Hooks.Usurp = usurp.Load // it goes on believing that it writes
		o.Hooks.Segment = func(step string) {
			if step == "read back" && hold.Load() {
				reached <- step
				<-goOn
			}
		}
	})
	publish(t, a, 0)
	must(t, decideDurable(a, 1))
	usurp.Store(true)
	hold.Store(true)
	ended := make(chan error, 1)
	go func() { ended <- a.publishSegment() }()
	<-reached
	b := s.open(byHand, func(o *Options) { o.Lease = 500 * time.Millisecond; o.Hooks.Usurp = func() bool { return true } })
	eventually(t, "the successor writes", b.IsWriter)
	for n := range KeepSegments + 2 {
		must(t, decideDurable(b, 10+n))
		eventually(t, "the successor publishes", func() bool {
			_, number, _ := b.Head()
			_ = b.publishSegment() // they depose each other all the time
			p := b.published.Load()
			return p != nil && p.Number >= number
		})
	}
	refs, first := s.refs(b), s.first(natsfeed.LogStream)
	close(goOn)
	hold.Store(false)
	if err := <-ended; err == nil {
		t.Error("described by a writer that was deposed meanwhile")
	}
	_ = a.trim(context.Background()) // whether it believes to write or not
	after := s.refs(b)
	if len(after) < KeepSegments || after[len(after)-1].Number < refs[len(refs)-1].Number || s.first(natsfeed.LogStream) < first {
		t.Fatal("something of the successor's is gone")
	}
	a.Close()
	b.Close()
	if c := s.open(byHand); c.State().Len() != b.State().Len() || c.Status().Halted != nil {
		t.Fatalf("%+v", c.Status())
	}
}

// The writer changes while segments are published and the log is trimmed all the
// time, by a pause that outlasts the lease and by two that both believe to write:
// there is one chain, with each decision in it once, and whoever starts has it.
func TestTwoAuthoritiesTrim(t *testing.T) {
	var log *ear
	p := newPair(t, func(o *Options) {
		o.SegmentEvery, o.SegmentBatches = time.Millisecond, 1
	}, func(o *Options) {
		if log == nil {
			log = listenOn(t, o.NC, natsfeed.LogSubject) // before there is a log
		}
	})
	s := p.store
	const n, callers = 3000, 32
	var done atomic.Int64
	var wg sync.WaitGroup
	for g := range callers {
		wg.Go(func() {
			for i := g; i < n; i += callers {
				if !p.decide(t, i).durable {
					t.Errorf("decision %d is not durable", i)
				}
				done.Add(1)
			}
		})
	}
	reached := func(at int64) { eventually(t, "progress", func() bool { return done.Load() >= at || t.Failed() }) }
	reached(n / 10)
	pause(t, p)
	reached(3 * n / 10)
	p.usurp[0].Store(true)
	p.usurp[1].Store(true)
	reached(5 * n / 10)
	p.usurp[0].Store(false)
	p.usurp[1].Store(false)
	reached(6 * n / 10)
	w := p.writer()
	p.at(w).Close()
	p.reopen(w)
	reached(8 * n / 10)
	pause(t, p)
	wg.Wait()
	if t.Failed() {
		return
	}
	must(t, decideDurable(p.at(0), n))
	eventually(t, "the log is trimmed", func() bool { return s.first(natsfeed.LogStream) > 10 })
	fresh := s.open(byHand)
	for i := range n {
		res, err := fresh.Decide(context.Background(), revoke(i))
		must(t, err)
		if !res.Duplicate {
			t.Fatalf("decision %d was forgotten", i)
		}
	}
	set := chainOf(t, fresh, log)
	if set.Len() != n+1 || set.Digest() != fresh.State().Digest() {
		t.Fatalf("%d entries", set.Len())
	}
	for i := range p.q {
		eventually(t, "all agree", func() bool { return p.at(i).State().Digest() == fresh.State().Digest() })
	}
	if p.at(0).Status().Deposed+p.at(1).Status().Deposed == 0 {
		t.Fatal("nobody was ever deposed: the test tests nothing")
	}
}

// A restored backup of a trimmed log is noticed like any other: by what enforcers
// say, or, when the segments go further than the log, at the start. The next
// epoch restates what is held.
func TestTrimmedAndRolledBack(t *testing.T) {
	for _, part := range []string{"all", "log"} {
		t.Run(part, func(t *testing.T) {
			s := newStore(t)
			q := s.open(byHand)
			for n := range KeepSegments + 1 {
				publish(t, q, n)
			}
			q.Close()
			must(t, s.b.Close())
			backup := filepath.Join(t.TempDir(), "backup")
			must(t, os.CopyFS(backup, os.DirFS(s.dir)))
			s.start()
			q = s.open(byHand)
			publish(t, q, 10)
			epoch, number, head := q.Head()
			n := q.State().Len()
			q.Close()
			must(t, s.b.Close())
			if part == "all" {
				s.dir = backup
			} else {
				restoreStream(t, backup, s.dir, natsfeed.LogStream)
			}
			s.start()
			q = s.open(byHand)
			if part == "all" {
				eventually(t, "it writes", q.IsWriter)
				q.Heard(epoch, number+10, head)
				n-- // what was decided since is lost
			}
			eventually(t, "it is noticed", func() bool { return errors.Is(q.Status().Halted, ErrRolledBack) })
			if _, err := q.Decide(context.Background(), revoke(20)); !errors.Is(err, ErrRolledBack) {
				t.Fatalf("decided: %v", err)
			}
			set := s.keySet(t, 2, writerKey(s.key))
			must(t, q.PublishKeySet(context.Background(), set))
			eventually(t, "the new epoch has what was held", func() bool {
				_, err := q.Decide(context.Background(), revoke(20))
				return err == nil && q.State().Len() == n+1
			})
			// And so after a restart, before and after the first segment of the epoch.
			for range 2 {
				q.Close()
				q = s.open(byHand, func(o *Options) { o.Keys = s.keys(t, s.key, set) })
				if st := q.Status(); q.State().Len() != n+1 || st.Halted != nil || st.Epoch != 2 {
					t.Fatalf("%d entries, %+v", q.State().Len(), st)
				}
				publish(t, q, 20)
			}
		})
	}
}

// restoreStream puts one stream's files of a backup in place.
func restoreStream(t *testing.T, from, to, name string) {
	t.Helper()
	found := false
	must(t, filepath.WalkDir(from, func(path string, d os.DirEntry, err error) error {
		if err != nil || !d.IsDir() || d.Name() != name {
			return err
		}
		rel, err := filepath.Rel(from, path)
		must(t, err)
		found = true
		must(t, os.RemoveAll(filepath.Join(to, rel)))
		must(t, os.CopyFS(filepath.Join(to, rel), os.DirFS(path)))
		return filepath.SkipDir
	}))
	if !found {
		t.Fatal("no such stream in the backup")
	}
}

// A resume is what it was before it was published, and nothing else is one.
func TestResume(t *testing.T) {
	r := &resume{epoch: 3, number: 5, head: session.Hash{5}, at: 9, time: 7, horizon: 6, judged: map[session.KeyID]uint64{{1}: 4, {2}: 1 << 63}}
	for n := uint64(3); n <= 5; n++ {
		r.links = append(r.links, link{epoch: 3, number: n, hash: session.Hash{byte(n)}, key: session.KeyID{1}})
	}
	r.taken = []decided{{2, 900, 3, []session.DecisionID{{1}, {2}}}, {3, 1, 4, []session.DecisionID{{3}}}}
	b, err := r.bytes()
	must(t, err)
	got, err := parseResume(b)
	must(t, err)
	if fmt.Sprintf("%+v", got) != fmt.Sprintf("%+v", r) {
		t.Fatalf("%+v, was %+v", got, r)
	}
	for n := range b {
		if _, err := parseResume(b[:n]); !errors.Is(err, session.ErrMalformed) {
			t.Fatalf("%d bytes: %v", n, err)
		}
	}
	if _, err := parseResume(append(b, 0)); !errors.Is(err, session.ErrMalformed) {
		t.Fatal(err)
	}
	for _, x := range []struct {
		last1, last2 uint64
		cut          bool
	}{{1 << 63, 1 << 63, false}, {5, 1 << 63, false}, {4, 1 << 63, true}, {1 << 63, 1, true}, {1 << 63, 2, false}} {
		if got := r.cutBy(map[session.KeyID]uint64{{1}: x.last1, {2}: x.last2}); got != x.cut {
			t.Errorf("%+v", x)
		}
	}
}

// FuzzResume: whatever is parsed is bounded, and is written the same again.
func FuzzResume(f *testing.F) {
	r := &resume{epoch: 1, number: 1, judged: map[session.KeyID]uint64{{1}: 4}, links: []link{{epoch: 1, number: 1}}, taken: []decided{{1, 1, 1, []session.DecisionID{{1}}}}}
	b, err := r.bytes()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := parseResume(b)
		if err != nil {
			return
		}
		again, err := r.bytes()
		must(t, err)
		if got, err := parseResume(again); err != nil || got.number != r.number || len(got.taken) != len(r.taken) {
			t.Fatal(err)
		}
	})
}
