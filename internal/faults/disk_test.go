package faults

import (
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/interlock-fabric/interlock/pkg/natsfeed"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// TestDiskFull takes the space away under the log. It fails when a decision that
// could not be stored is called durable, when it does not take effect for that,
// or when the authority does not recover by itself once there is space. Where a
// small disk cannot be mounted, the log's stream is given a limit instead; that
// does not show the recovery from an error of the disk.
func TestDiskFull(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	f := &fabric{t: t, ctx: t.Context(), dir: filepath.Join(dir, "mount"), listen: freeAddr(t)}
	must(t, os.MkdirAll(f.dir, 0o700))
	socket := filepath.Join(dir, "api.sock")
	config := childConfig{DataDir: f.dir, Socket: socket, NATSListen: f.listen, Tmpfs: "384m", AckWait: 200 * time.Millisecond}
	p := spawn(t, config)
	fill, empty := func() { p.ask(fillDisk) }, func() { p.ask(emptyDisk) }
	if p.addr == noMount {
		t.Log("mounting is not permitted here: limiting the stream instead")
		config.Tmpfs = ""
		spawn(t, config)
		js, err := jetstream.New(f.connect())
		must(t, err)
		limit := func(to func(jetstream.StreamState) int64) {
			s, err := js.Stream(f.ctx, natsfeed.LogStream)
			must(t, err)
			next := s.CachedInfo().Config
			next.MaxBytes = to(s.CachedInfo().State)
			_, err = js.UpdateStream(f.ctx, next)
			must(t, err)
		}
		fill = func() { limit(func(s jetstream.StreamState) int64 { return int64(s.Bytes) }) }
		empty = func() { limit(func(jetstream.StreamState) int64 { return -1 }) }
	}
	f.client = dialSocket(t, socket)
	c := newCrowd(8, 400)
	guards := f.guards("enforcer", 2, c, guardOptions{maxStale: bound})
	ctx, cancel := context.WithTimeout(f.ctx, patience)
	defer cancel()
	for range 5 {
		if _, err := c.victim(t).insist(ctx, f.client); err != nil {
			t.Fatal(err)
		}
	}
	auditor := f.enrol("auditor", "")
	fill()
	// What the last block had room for is stored yet.
	var waiting []*caller
	eventually(t, patience, "decisions that cannot be stored", func() bool {
		v := c.victim(t)
		d, err := v.revoke(f.ctx, f.client)
		if err != nil {
			t.Fatal(err)
		}
		if d.Durable && len(waiting) > 0 {
			t.Errorf("%s is durable on a full disk", v.sid)
		}
		if !d.Durable {
			waiting = append(waiting, v)
		}
		return len(waiting) >= 10
	})
	for _, v := range waiting {
		for _, g := range guards {
			eventually(t, patience, "what cannot be stored is in effect", func() bool { return g.denies(v, session.ErrRevoked) })
		}
		if d, err := v.revoke(f.ctx, f.client); err != nil || d.Durable {
			t.Errorf("asked for again: %+v, %v", d, err)
		}
	}
	began := time.Now()
	empty()
	for _, v := range waiting {
		if _, err := v.insist(ctx, f.client); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("durable %v after there was space", time.Since(began))
	f.allAgree(guards)
	l := readLog(t, auditor)
	l.once(t)
	if epoch, number := f.head(); l.epoch != epoch || l.number < number {
		t.Errorf("the log ends at %d, the authority at %d", l.number, number)
	}
}
