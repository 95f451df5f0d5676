package registry

import (
	"fmt"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/interlock-fabric/interlock/internal/broker"
	"github.com/interlock-fabric/interlock/pkg/natsfeed"
)

func (w *world) state(stream string) jetstream.StreamState {
	w.Helper()
	s, err := w.js.Stream(w.ctx, stream)
	must(w, err)
	return s.CachedInfo().State
}

// TestSnapshotsBoundTheStart: the log is trimmed behind them, and whoever starts
// from one comes to the same; also one who slept while the log was trimmed past
// what it knows.
func TestSnapshotsBoundTheStart(t *testing.T) {
	w := newWorld(t, true)
	var asleep atomic.Bool
	slept := w.open(Options{Hooks: Hooks{Ask: func() error {
		if asleep.Load() {
			return jetstream.ErrNoStreamResponse
		}
		return nil
	}}})
	r := w.open(Options{SnapshotBatches: 10})
	w.register(r, ses(0))
	w.until("it is there too", func() bool { return slept.Status().Number == 1 })
	asleep.Store(true)
	for i := range 20 {
		if i%5 == 0 {
			_, _, err := r.RegisterAgent(w.ctx, bot(i), 0)
			must(t, err)
			_, err = r.SetState(w.ctx, "acme", bot(i).Ref, Active, nil)
			must(t, err)
		}
		list := []Session{ses(100 + 2*i), ses(101 + 2*i)}
		list[1].Tenant = "other"
		w.register(r, list...)
	}
	// Of three snapshots the oldest is gone, and the log before the second.
	// On a slow machine one snapshot is for more batches than it need be.
	n := 5000
	w.until("trimmed", func() bool { n++; w.register(r, ses(n)); return w.state(natsfeed.RegistryStream).FirstSeq > 5 })
	before := r.Status().Snapshot
	for i := range 40 {
		w.register(r, ses(1000+i))
		made := before + uint64(i+1)/10
		w.until("the snapshot that is due", func() bool { return r.Status().Snapshot >= made })
	}
	st := w.state(natsfeed.RegistryStream)
	if st.Msgs > 40 {
		t.Errorf("%d batches are kept", st.Msgs)
	}
	if s := w.state(natsfeed.SnapshotStream); s.Msgs > 8 {
		t.Errorf("%d messages of snapshots are kept", s.Msgs)
	}
	fresh := w.open(Options{})
	same(t, r, fresh)
	if n := fresh.Status().SnapshotNumber; n == 0 {
		t.Error("started without a snapshot")
	}
	asleep.Store(false)
	w.until("awake", func() bool { return slept.Status().Number == r.Status().Number })
	same(t, r, slept)
	if slept.Status().Reloads == 0 {
		t.Error("it was not read anew")
	}
	w.register(slept, ses(9999))
}

// TestADamagedSnapshotIsNotUsed: the one before it is, with the log from there on.
func TestADamagedSnapshotIsNotUsed(t *testing.T) {
	w := newWorld(t, true)
	r := w.open(Options{SnapshotBatches: 10})
	for i := range 25 {
		w.register(r, ses(i))
		want := uint64(i+1) / 10
		w.until("the snapshot that is due", func() bool { return r.Status().Snapshot >= want })
	}
	last := r.Status().SnapshotNumber
	// A chunk of it is lost: the stream lets nobody delete, but a purge of its
	// subject.
	r.snapshotMu.Lock()
	name := r.snapshot.Name
	r.snapshotMu.Unlock()
	s, err := w.js.Stream(w.ctx, natsfeed.SnapshotStream)
	must(t, err)
	must(t, s.Purge(w.ctx, jetstream.WithPurgeSubject(chunkSubject(name))))
	b := w.open(Options{})
	same(t, r, b)
	if n := b.Status().SnapshotNumber; n == 0 || n >= last {
		t.Errorf("read from the snapshot at %d, the damaged one is at %d", n, last)
	}
	// With both gone, nothing is made up.
	must(t, s.Purge(w.ctx))
	if st := w.open(Options{}).Status(); !is(st.Err, ErrHole) || st.Sessions != 0 {
		t.Errorf("%+v", st)
	}
}

// TestALogMadeAnew: the snapshot is what is left, and the log goes on from it.
func TestALogMadeAnew(t *testing.T) {
	w := newWorld(t, true)
	r := w.open(Options{SnapshotBatches: 5})
	for i := range 5 {
		w.register(r, ses(i))
	}
	w.until("a snapshot", func() bool { return r.Status().Snapshot > 0 })
	covered := r.Status().SnapshotNumber
	must(t, w.js.DeleteStream(w.ctx, natsfeed.RegistryStream))
	must(t, broker.EnsureStreams(w.ctx, w.js, 1))
	w.until("read anew", func() bool { st := r.Status(); return st.Reloads > 0 && st.Err == nil })
	if st := r.Status(); st.Number != covered || st.Sessions != int(covered) {
		t.Errorf("%+v", st)
	}
	w.register(r, ses(100))
	same(t, r, w.open(Options{}))
}

func TestListsOfManyPages(t *testing.T) {
	w := newWorld(t, true)
	r := w.open(Options{})
	for i := range 30 {
		w.register(r, ses(i))
	}
	// What is registered between two pages moves neither.
	q := SessionQuery{Tenant: "acme", Limit: 7}
	var got []string
	for i := 0; ; i++ {
		list, next, err := r.Sessions(q)
		must(t, err)
		for _, s := range list {
			got = append(got, s.ID)
		}
		if q.Before = next; next == 0 {
			break
		}
		w.register(r, ses(100+i))
	}
	var want []string
	for i := 29; i >= 0; i-- {
		want = append(want, fmt.Sprintf("s-%06d", i))
	}
	if !slices.Equal(got, want) {
		t.Errorf("%q", got)
	}
}

// TestNumbersGoOnFromASnapshot: those of records that have left are not given
// again, since pages go by them.
func TestNumbersGoOnFromASnapshot(t *testing.T) {
	w := newWorld(t, true)
	r := w.open(Options{})
	s := ses(1)
	s.Expires = in(2 * time.Hour)
	w.register(r, s, ses(2))
	r.mu.Lock()
	r.x.sweep(in(time.Hour+Grace+time.Minute), maxSwept)
	r.mu.Unlock()
	must(t, r.makeSnapshot(w.ctx))
	b := w.open(Options{})
	if n := b.Status().Sessions; n != 1 {
		t.Errorf("%d sessions", n)
	}
	same(t, r, b)
}
