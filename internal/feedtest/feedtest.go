// Package feedtest says, as tests, what an enforce.Feed must do, and has a feed in
// memory that does it. The same suite runs over that and over natsfeed on a real
// server, so that what is tested with the one holds for the other.
package feedtest

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/interlock-fabric/interlock/pkg/enforce"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// Bus is a bus under test: it makes feeds, and does in a test what the writer and
// the world do.
type Bus interface {
	// Feed returns a feed that is not started.
	Feed(t testing.TB) enforce.Feed
	// Append stores frames in the log, one message each, and has them heard.
	Append(t testing.TB, frames ...[]byte)
	// Delete takes the message at a position out of the log.
	Delete(t testing.TB, pos uint64)
	// Beat has a heartbeat heard.
	Beat(t testing.TB, frame []byte)
	// KeySet stores a key set and has it heard.
	KeySet(t testing.TB, frame []byte)
	// AnswerClock puts a writer on the bus. An answer of nil is silence.
	AnswerClock(t testing.TB, answer func(nonce []byte) []byte)
	// Receipt returns the next receipt that arrives.
	Receipt(t testing.TB) []byte
	// Down kills the bus and Up brings it back with what it had stored.
	Down(t testing.TB)
	Up(t testing.TB)
	// Recreate replaces the log by an empty one.
	Recreate(t testing.TB)
}

const patience = 20 * time.Second

// Recorder is a Sink that keeps what it hears.
type Recorder struct {
	mu      sync.Mutex
	batches [][]byte
	beats   [][]byte
	keySets [][]byte
	links   []bool
	changed chan struct{}
	// inside counts the calls of each kind that run at this moment.
	inside   [4]atomic.Int32
	overlaps atomic.Int32
}

// NewRecorder returns an empty one.
func NewRecorder() *Recorder { return &Recorder{changed: make(chan struct{})} }

func (r *Recorder) record(kind int, f func()) {
	if r.inside[kind].Add(1) > 1 {
		r.overlaps.Add(1)
	}
	r.mu.Lock()
	f()
	close(r.changed)
	r.changed = make(chan struct{})
	r.mu.Unlock()
	r.inside[kind].Add(-1)
}

// Batch implements enforce.Sink.
func (r *Recorder) Batch(b []byte) { r.record(0, func() { r.batches = append(r.batches, b) }) }

// Beat implements enforce.Sink.
func (r *Recorder) Beat(b []byte) { r.record(1, func() { r.beats = append(r.beats, b) }) }

// KeySet implements enforce.Sink.
func (r *Recorder) KeySet(b []byte) { r.record(2, func() { r.keySets = append(r.keySets, b) }) }

// Order implements enforce.Sink.
func (r *Recorder) Order([]byte) {}

// Connected implements enforce.Sink.
func (r *Recorder) Connected(up bool) { r.record(3, func() { r.links = append(r.links, up) }) }

// Await waits until cond holds of what was heard.
func (r *Recorder) Await(t testing.TB, what string, cond func(batches, beats, keySets [][]byte, links []bool) bool) {
	t.Helper()
	late := time.NewTimer(patience)
	defer late.Stop()
	for {
		r.mu.Lock()
		ok, changed := cond(r.batches, r.beats, r.keySets, r.links), r.changed
		heard := fmt.Sprintf("%d batches, %d beats, %d key sets, links %v", len(r.batches), len(r.beats), len(r.keySets), r.links)
		r.mu.Unlock()
		if ok {
			return
		}
		select {
		case <-changed:
		case <-late.C:
			t.Fatalf("not in time: %s; heard %s", what, heard)
		}
	}
}

func (r *Recorder) total() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.batches) + len(r.beats) + len(r.keySets) + len(r.links)
}

func testContext(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	return ctx
}

// frame is a message that can be told from the others.
func frame(i, size int) []byte {
	b := make([]byte, max(size, 8))
	binary.BigEndian.PutUint64(b, uint64(i))
	return b
}

func frames(from, n int) [][]byte {
	out := make([][]byte, n)
	for i := range out {
		out[i] = frame(from+i, 100)
	}
	return out
}

// sameFrames compares by number and length.
func sameFrames(t testing.TB, got, want [][]byte) {
	t.Helper()
	if len(got) != len(want) {
		t.Fatalf("%d messages, want %d", len(got), len(want))
	}
	for i := range got {
		if !bytes.Equal(got[i], want[i]) {
			t.Fatalf("message %d is number %d of %d bytes, want number %d of %d", i,
				binary.BigEndian.Uint64(got[i]), len(got[i]), binary.BigEndian.Uint64(want[i]), len(want[i]))
		}
	}
}

func start(t testing.TB, b Bus) (enforce.Feed, *Recorder) {
	t.Helper()
	f, r := b.Feed(t), NewRecorder()
	t.Cleanup(func() { closeFeed(t, f) })
	if err := f.Start(testContext(t), r); err != nil {
		t.Fatal(err)
	}
	return f, r
}

// readLog reads to the end and checks that positions ascend.
func readLog(t testing.TB, f enforce.Feed, from uint64) (got [][]byte, next uint64) {
	t.Helper()
	var last uint64
	next, err := f.Log(testContext(t), from, func(pos uint64, frame []byte) error {
		if pos <= last {
			t.Errorf("position %d after %d", pos, last)
		}
		last = pos
		got = append(got, frame)
		return nil
	})
	if err != nil {
		t.Fatalf("Log from %d: %v", from, err)
	}
	return got, next
}

// Run runs the suite, each test on a bus of its own.
func Run(t *testing.T, newBus func(t testing.TB) Bus) {
	for _, tc := range []struct {
		name string
		test func(*testing.T, Bus)
	}{
		{"LiveMessagesComeInOrder", testLive},
		{"LogIsReadInOrderAndResumed", testLog},
		{"LogOfNothing", testEmptyLog},
		{"LogOfFiveThousand", testBigLog},
		{"LogOfLargestFrames", testLargeFrames},
		{"LogStepsOverDeletedMessages", testDeleted},
		{"LogStopsWhereTheCallerStops", testCallerStops},
		{"LogEndsWithItsContext", testLogContext},
		{"LogGoesOnOverARestart", testLogRestart},
		{"LogMadeAnewIsReadFromItsFirst", testRecreated},
		{"WhatCannotBeAFrameIsPassedOver", testOversize},
		{"KeySetsAreBounded", testKeySets},
		{"Clock", testClock},
		{"Receipts", testReceipts},
		{"LinkGoesDownAndUp", testLink},
		{"StartOnADeadBus", testDeadStart},
		{"NothingAfterClose", testNothingAfterClose},
		{"CloseEndsWhatRuns", testCloseEnds},
	} {
		t.Run(tc.name, func(t *testing.T) { tc.test(t, newBus(t)) })
	}
}

func testLive(t *testing.T, b Bus) {
	_, r := start(t, b)
	_, r2 := start(t, b)
	want := frames(1, 300)
	b.Append(t, want...)
	b.Beat(t, []byte("beat"))
	b.KeySet(t, []byte("key set"))
	for _, r := range []*Recorder{r, r2} {
		r.Await(t, "all of it", func(batches, beats, keySets [][]byte, links []bool) bool {
			return len(batches) == len(want) && len(beats) == 1 && len(keySets) == 1 && len(links) > 0
		})
		sameFrames(t, r.batches, want)
		if string(r.beats[0]) != "beat" || string(r.keySets[0]) != "key set" || !r.links[0] {
			t.Errorf("heard %q, %q, %v", r.beats, r.keySets, r.links)
		}
		if n := r.overlaps.Load(); n > 0 {
			t.Errorf("%d calls of one kind at the same time", n)
		}
	}
}

func testLog(t *testing.T, b Bus) {
	want := frames(1, 20)
	b.Append(t, want...)
	f, _ := start(t, b)
	got, next := readLog(t, f, 0)
	sameFrames(t, got, want)
	if got, again := readLog(t, f, next); len(got) != 0 || again != next {
		t.Errorf("at the end: %d messages, then on from %d, was %d", len(got), again, next)
	}
	more := frames(21, 5)
	b.Append(t, more...)
	got, _ = readLog(t, f, next)
	sameFrames(t, got, more)
	got, _ = readLog(t, f, 11)
	sameFrames(t, got, append(want[10:], more...))
}

func testEmptyLog(t *testing.T, b Bus) {
	f, _ := start(t, b)
	got, next := readLog(t, f, 0)
	if len(got) != 0 {
		t.Errorf("%d messages", len(got))
	}
	want := frames(1, 1)
	b.Append(t, want...)
	got, _ = readLog(t, f, next)
	sameFrames(t, got, want)
	if sets, err := f.KeySets(testContext(t)); err != nil || len(sets) != 0 {
		t.Errorf("key sets: %d, %v", len(sets), err)
	}
}

func testBigLog(t *testing.T, b Bus) {
	want := frames(1, 5000)
	b.Append(t, want...)
	f, _ := start(t, b)
	got, _ := readLog(t, f, 0)
	sameFrames(t, got, want)
}

func testLargeFrames(t *testing.T, b Bus) {
	var want [][]byte
	for i := range 12 {
		want = append(want, frame(i, session.MaxFrameLen))
	}
	f, r := start(t, b)
	b.Append(t, want...)
	r.Await(t, "largest frames", func(batches, _, _ [][]byte, _ []bool) bool { return len(batches) == len(want) })
	got, _ := readLog(t, f, 0)
	sameFrames(t, got, want)
}

func testDeleted(t *testing.T, b Bus) {
	all := frames(1, 600)
	b.Append(t, all...)
	var want [][]byte
	for i, fr := range all {
		// The first, a run that is longer than any piece, one by itself, the last.
		if pos := i + 1; pos == 1 || pos >= 100 && pos < 400 || pos == 500 || pos == 600 {
			b.Delete(t, uint64(pos))
			continue
		}
		want = append(want, fr)
	}
	f, _ := start(t, b)
	got, next := readLog(t, f, 0)
	sameFrames(t, got, want)
	more := frames(601, 2)
	b.Append(t, more...)
	got, _ = readLog(t, f, next)
	sameFrames(t, got, more)
	got, _ = readLog(t, f, 150)
	sameFrames(t, got, append(append([][]byte{}, want[98:]...), more...))
}

func testCallerStops(t *testing.T, b Bus) {
	want := frames(1, 700)
	b.Append(t, want...)
	f, _ := start(t, b)
	stop := errors.New("stop")
	var got [][]byte
	next, err := f.Log(testContext(t), 0, func(_ uint64, fr []byte) error {
		if len(got) == 333 {
			return stop
		}
		got = append(got, fr)
		return nil
	})
	if !errors.Is(err, stop) {
		t.Fatalf("error %v", err)
	}
	rest, _ := readLog(t, f, next)
	sameFrames(t, append(got, rest...), want)
}

func testLogContext(t *testing.T, b Bus) {
	b.Append(t, frames(1, 700)...)
	f, _ := start(t, b)
	ctx, cancel := context.WithCancel(testContext(t))
	n := 0
	_, err := f.Log(ctx, 0, func(uint64, []byte) error {
		if n++; n == 10 {
			cancel()
		}
		return nil
	})
	if !errors.Is(err, context.Canceled) || n >= 700 {
		t.Errorf("%d messages, %v", n, err)
	}
}

func testLogRestart(t *testing.T, b Bus) {
	want := frames(1, 1500)
	b.Append(t, want...)
	f, _ := start(t, b)
	var got [][]byte
	_, err := f.Log(testContext(t), 0, func(_ uint64, fr []byte) error {
		if got = append(got, fr); len(got) == 600 {
			b.Down(t)
			b.Up(t)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	sameFrames(t, got, want)
}

func testRecreated(t *testing.T, b Bus) {
	b.Append(t, frames(1, 50)...)
	f, _ := start(t, b)
	_, next := readLog(t, f, 0)
	b.Recreate(t)
	want := frames(100, 3)
	b.Append(t, want...)
	got, next := readLog(t, f, next)
	sameFrames(t, got, want)
	if got, _ := readLog(t, f, next); len(got) != 0 {
		t.Errorf("%d messages twice", len(got))
	}
}

func testOversize(t *testing.T, b Bus) {
	want := frames(1, 3)
	f, r := start(t, b)
	b.Append(t, want[0], frame(99, session.MaxFrameLen+1), want[1])
	b.Append(t, want[2])
	r.Await(t, "the frames", func(batches, _, _ [][]byte, _ []bool) bool { return len(batches) >= 3 })
	sameFrames(t, r.batches, want)
	got, _ := readLog(t, f, 0)
	sameFrames(t, got, want)
}

func testKeySets(t *testing.T, b Bus) {
	want := frames(1, 70)
	for _, k := range want {
		b.KeySet(t, k)
	}
	f, _ := start(t, b)
	got, err := f.KeySets(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	sameFrames(t, got, want[6:])
}

func testClock(t *testing.T, b Bus) {
	f, _ := start(t, b)
	began := time.Now()
	if _, err := f.Clock(testContext(t), [32]byte{1}); err == nil {
		t.Error("an answer without a writer")
	}
	if d := time.Since(began); d > patience/2 {
		t.Errorf("noticed after %s that there is no writer", d)
	}
	silent := make(chan struct{}, 1)
	b.AnswerClock(t, func(nonce []byte) []byte {
		if nonce[0] == 0xff {
			silent <- struct{}{}
			return nil
		}
		return append([]byte("at "), nonce...)
	})
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			nonce := [32]byte{byte(i)}
			got, err := f.Clock(testContext(t), nonce)
			if err != nil || !bytes.Equal(got, append([]byte("at "), nonce[:]...)) {
				t.Errorf("nonce %d: %q, %v", i, got, err)
			}
		})
	}
	wg.Wait()
	ctx, cancel := context.WithCancel(testContext(t))
	defer cancel()
	wg.Go(func() {
		select {
		case <-silent:
			cancel()
		case <-ctx.Done():
		}
	})
	defer wg.Wait()
	if _, err := f.Clock(ctx, [32]byte{0xff}); !errors.Is(err, context.Canceled) {
		t.Errorf("a silent writer: %v", err)
	}
}

func testReceipts(t *testing.T, b Bus) {
	f, _ := start(t, b)
	for i := range 5 {
		if err := f.Receipt(testContext(t), frame(i, 300)); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 5 {
		if got := b.Receipt(t); !bytes.Equal(got, frame(i, 300)) {
			t.Errorf("receipt %d is another", i)
		}
	}
	if err := f.Receipt(testContext(t), make([]byte, 1<<20)); err == nil {
		t.Error("a receipt of a megabyte")
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := f.Receipt(ctx, frame(9, 9)); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

func testLink(t *testing.T, b Bus) {
	f, r := start(t, b)
	r.Await(t, "link up", func(_, _, _ [][]byte, links []bool) bool { return len(links) > 0 && links[0] })
	b.Down(t)
	r.Await(t, "link down", func(_, _, _ [][]byte, links []bool) bool { return !links[len(links)-1] })
	if err := f.Receipt(testContext(t), frame(1, 10)); err == nil {
		t.Error("a receipt was sent into nothing")
	}
	if _, err := f.Clock(testContext(t), [32]byte{}); err == nil {
		t.Error("a clock without a bus")
	}
	b.Up(t)
	r.Await(t, "link up again", func(_, _, _ [][]byte, links []bool) bool { return links[len(links)-1] })
	// The subscriptions are there again without anybody's help. A link that is up
	// may be a moment ahead of them: the log has what is missed.
	want := frames(1, 1)
	b.Append(t, want...)
	got, _ := readLog(t, f, 0)
	sameFrames(t, got, want)
	for i := 2; ; i++ {
		b.Append(t, frame(i, 100))
		r.mu.Lock()
		heard := len(r.batches)
		r.mu.Unlock()
		if heard > 0 {
			break
		}
		if i > 1000 {
			t.Fatal("deaf after the restart")
		}
	}
}

func testDeadStart(t *testing.T, b Bus) {
	b.Down(t)
	f, r := b.Feed(t), NewRecorder()
	t.Cleanup(func() { closeFeed(t, f) })
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if err := f.Start(ctx, r); err == nil {
		t.Fatal("started on a dead bus")
	}
	// A second Start waits, and goes on when the bus comes.
	done := make(chan error, 1)
	go func() { done <- f.Start(testContext(t), r) }()
	b.Up(t)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	want := frames(1, 3)
	b.Append(t, want...)
	r.Await(t, "what comes after", func(batches, _, _ [][]byte, _ []bool) bool { return len(batches) == 3 })
	sameFrames(t, r.batches, want)
}

func testNothingAfterClose(t *testing.T, b Bus) {
	f, r := start(t, b)
	stop := make(chan struct{})
	end := sync.OnceFunc(func() { close(stop) })
	defer end()
	var wg sync.WaitGroup
	wg.Go(func() {
		for i := 1; ; i++ {
			select {
			case <-stop:
				return
			default:
				b.Beat(t, frame(i, 50))
			}
		}
	})
	r.Await(t, "some", func(_, beats, _ [][]byte, _ []bool) bool { return len(beats) > 100 })
	for range 3 {
		wg.Go(func() { closeFeed(t, f) })
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	total := r.total()
	_, other := start(t, b)
	other.Await(t, "more, by another", func(_, beats, _ [][]byte, _ []bool) bool { return len(beats) > 100 })
	end()
	wg.Wait()
	if n := r.total(); n != total {
		t.Errorf("%d calls of the sink after Close", n-total)
	}
	ctx := testContext(t)
	if err := f.Start(ctx, r); err == nil {
		t.Error("Start after Close")
	}
	if _, err := f.Log(ctx, 0, func(uint64, []byte) error { return nil }); err == nil {
		t.Error("Log after Close")
	}
	if _, err := f.KeySets(ctx); err == nil {
		t.Error("KeySets after Close")
	}
	if _, err := f.Clock(ctx, [32]byte{}); err == nil {
		t.Error("Clock after Close")
	}
	if err := f.Receipt(ctx, frame(1, 10)); err == nil {
		t.Error("Receipt after Close")
	}
}

func testCloseEnds(t *testing.T, b Bus) {
	asked := make(chan struct{}, 1)
	b.AnswerClock(t, func([]byte) []byte { asked <- struct{}{}; return nil })
	f, _ := start(t, b)
	done := make(chan error, 1)
	go func() { _, err := f.Clock(testContext(t), [32]byte{}); done <- err }()
	select {
	case <-asked:
	case err := <-done:
		// On a machine that stood still for a second the link is given up.
		t.Fatalf("Clock, before the feed was closed: %v", err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err == nil || errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Clock: %v", err)
	}

	b.Down(t)
	dead := b.Feed(t)
	go func() { done <- dead.Start(testContext(t), NewRecorder()) }()
	if err := dead.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err == nil || errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Start: %v", err)
	}
}

func closeFeed(t testing.TB, f enforce.Feed) {
	if err := f.Close(); err != nil {
		t.Errorf("Close: %v", err)
	}
}

// clone keeps frames apart: a sink may keep, and change, what it was given.
func clone(b []byte) []byte { return slices.Clone(b) }
