package registry

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/interlock-fabric/interlock/pkg/natsfeed"
)

const (
	// chunkRecords is how many records are copied while the index is held, and
	// chunkBytes about how long a chunk becomes.
	chunkRecords = 500
	chunkBytes   = 256 << 10
	maxManifests = 8 // that are tried
	maxChunks    = 1 << 16

	snapshotBytes = 16 << 20
)

// manifest describes a snapshot. Its chunks have every record as it was at Place
// or later: what was written meanwhile is in the log as well, whole, so that
// reading on from Place comes to the same.
type manifest struct {
	place
	Name     [32]byte `json:"name"`
	Chunks   int      `json:"chunks"`
	Bytes    int      `json:"bytes"`
	FirstSeq uint64   `json:"first_seq"` // of the chunks
	Previous uint64   `json:"previous"`  // sequence of the manifest before
	Next     uint64   `json:"next"`      // number of the next record

	seq uint64 // its own
}

func chunkSubject(name [32]byte) string {
	return natsfeed.SnapshotSubject + "." + hex.EncodeToString(name[:16])
}

// load reads the newest snapshot that is whole, and leaves the rest of the log to
// be read. state is that of the log.
func (r *Registry) load(ctx context.Context, state jetstream.StreamState) error {
	r.mu.Lock()
	first := !r.loaded && r.at == place{}
	if !first {
		r.stats.Reloads++
	}
	before := r.at.Number
	r.mu.Unlock()
	s, err := r.stream(ctx, natsfeed.SnapshotStream)
	if err != nil {
		return err
	}
	x, m, err := r.newest(ctx, s)
	if err != nil {
		return err
	}
	at := m.place
	if at.Seq > state.LastSeq {
		at.Seq = 0 // the log was made anew since
	}
	if m.seq == 0 && state.FirstSeq > 1 {
		return fmt.Errorf("%w: it begins at message %d, and no snapshot can be read", ErrHole, state.FirstSeq)
	}
	if at.Seq+1 < state.FirstSeq {
		at.Seq = state.FirstSeq - 1 // whether batches are missing shows by their numbers
	}
	if m.Number < before {
		r.log.Warn("the registry is read anew", "before", before, "snapshot", m.Number)
	}
	r.snapshotMu.Lock()
	r.snapshot, r.since, r.sinceBytes = m, 0, 0
	r.snapshotMu.Unlock()
	r.mu.Lock()
	r.x, r.at, r.loaded = x, at, false
	r.mu.Unlock()
	if r.flight != nil {
		r.requeue() // judged by what is there now
	}
	return nil
}

// newest reads the newest snapshot that is whole; an empty index if there is none.
func (r *Registry) newest(ctx context.Context, s jetstream.Stream) (*index, manifest, error) {
	m, err := r.lastManifest(ctx, s)
	for range maxManifests {
		if err != nil || m.seq == 0 {
			break
		}
		var x *index
		if x, err = r.readSnapshot(ctx, s, &m); err == nil {
			return x, m, nil
		}
		if !errors.Is(err, errForeign) && !errors.Is(err, jetstream.ErrMsgNotFound) {
			break
		}
		r.log.Warn("a snapshot of the registry is not whole", "batch", m.Number, "error", err)
		m, err = r.manifestAt(ctx, s, m.Previous)
	}
	if err != nil && !errors.Is(err, errForeign) && !errors.Is(err, jetstream.ErrMsgNotFound) {
		return nil, manifest{}, err
	}
	return newIndex(), manifest{}, nil
}

// lastManifest returns the newest manifest that an authority wrote, or none.
func (r *Registry) lastManifest(ctx context.Context, s jetstream.Stream) (manifest, error) {
	ask, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	if err := r.asked(); err != nil {
		return manifest{}, err
	}
	raw, err := s.GetLastMsgForSubject(ask, natsfeed.SnapshotSubject)
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return manifest{}, nil
	}
	if err != nil {
		return manifest{}, fmt.Errorf("registry: %w", err)
	}
	return r.openManifest(raw)
}

func (r *Registry) manifestAt(ctx context.Context, s jetstream.Stream, seq uint64) (manifest, error) {
	if seq == 0 {
		return manifest{}, nil
	}
	raw, err := r.get(ctx, s, seq)
	if err != nil {
		return manifest{}, fmt.Errorf("registry: %w", err)
	}
	return r.openManifest(raw)
}

func (r *Registry) openManifest(raw *jetstream.RawStreamMsg) (m manifest, err error) {
	h, plain, err := r.sealer.open(raw.Data)
	if err != nil {
		return m, err
	}
	if h.kind != kindManifest || json.Unmarshal(plain, &m) != nil || m.Chunks < 0 || m.Chunks > maxChunks {
		return manifest{}, errForeign
	}
	m.seq = raw.Sequence
	return m, nil
}

func (r *Registry) readSnapshot(ctx context.Context, s jetstream.Stream, m *manifest) (*index, error) {
	x := newIndex()
	seq := m.FirstSeq
	for i := range m.Chunks {
		raw, err := r.get(ctx, s, seq, jetstream.WithGetMsgSubject(chunkSubject(m.Name)))
		if err != nil {
			return nil, fmt.Errorf("registry: chunk %d: %w", i, err)
		}
		seq = raw.Sequence + 1
		h, plain, err := r.sealer.open(raw.Data)
		if err != nil {
			return nil, err
		}
		var b batch
		if h.kind != kindChunk || h.number != uint64(i) || h.prev != m.Name || json.Unmarshal(plain, &b) != nil {
			return nil, errForeign
		}
		x.apply(b.Ops)
	}
	x.next = max(x.next, m.Next)
	return x, nil
}

// grown counts what was added to the log since the newest snapshot, and has
// another made when that is due.
// Whoever wrote the batch sees to it; others do where that does not help.
func (r *Registry) grown(size int, own bool) {
	r.snapshotMu.Lock()
	r.since++
	r.sinceBytes += size
	limit := r.o.SnapshotBytes
	if limit == 0 {
		limit = max(snapshotBytes, r.snapshot.Bytes)
	}
	batches := r.o.SnapshotBatches
	if !own {
		limit, batches = 2*limit, 2*batches
	}
	due := r.since >= batches || r.sinceBytes >= limit
	r.snapshotMu.Unlock()
	if due {
		select {
		case r.snapshots <- struct{}{}:
		default:
		}
	}
}

func (r *Registry) snapshotter(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-r.snapshots:
		}
		if err := r.makeSnapshot(ctx); err != nil && ctx.Err() == nil {
			r.log.Warn("a snapshot of the registry could not be made", "error", err)
		}
	}
}

// makeSnapshot writes a snapshot and trims what it makes superfluous, unless
// another authority has just done so.
func (r *Registry) makeSnapshot(ctx context.Context) error {
	s, err := r.stream(ctx, natsfeed.SnapshotStream)
	if err != nil {
		return err
	}
	last, err := r.lastManifest(ctx, s)
	if err != nil && !errors.Is(err, errForeign) {
		return err
	}
	r.mu.RLock()
	m := manifest{place: r.at, Previous: last.seq, Next: r.x.next}
	loaded := r.loaded
	r.mu.RUnlock()
	r.snapshotMu.Lock()
	known := r.snapshot.Number
	r.snapshotMu.Unlock()
	if !loaded || m.Number <= last.Number {
		return nil
	}
	if last.Number > known { // another authority's
		r.snapshotMu.Lock()
		r.snapshot, r.since, r.sinceBytes = last, 0, 0
		r.snapshotMu.Unlock()
		return nil
	}
	if _, err := rand.Read(m.Name[:]); err != nil {
		return fmt.Errorf("registry: %w", err)
	}
	r.hook("begin")
	if err := r.writeChunks(ctx, &m); err != nil {
		return err
	}
	r.hook("chunks")
	plain, err := json.Marshal(&m)
	if err != nil {
		return fmt.Errorf("registry: %w", err)
	}
	if m.seq, err = r.put(ctx, natsfeed.SnapshotSubject, header{kind: kindManifest}, plain); err != nil {
		return err
	}
	r.hook("manifest")
	r.snapshotMu.Lock()
	r.snapshot, r.since, r.sinceBytes = m, 0, 0
	r.snapshotMu.Unlock()
	r.mu.Lock()
	r.stats.Snapshot++
	r.mu.Unlock()
	return r.trim(ctx, s, &last)
}

func (r *Registry) hook(name string) {
	if h := r.o.Hooks.Snapshot; h != nil {
		h(name)
	}
}

// writeChunks copies the records in pieces, so that nobody waits for long, and
// writes them.
func (r *Registry) writeChunks(ctx context.Context, m *manifest) error {
	var ops []op
	size := 0
	flush := func() error {
		if len(ops) == 0 {
			return nil
		}
		plain, err := json.Marshal(batch{Ops: ops})
		if err != nil {
			return fmt.Errorf("registry: %w", err)
		}
		seq, err := r.put(ctx, chunkSubject(m.Name), header{kindChunk, uint64(m.Chunks), m.Name}, plain)
		if err != nil {
			return err
		}
		if m.Chunks == 0 {
			m.FirstSeq = seq
		}
		m.Chunks++
		m.Bytes += len(plain)
		ops, size = ops[:0], 0
		return nil
	}
	add := func(o op) error {
		b, err := json.Marshal(&o)
		if err != nil {
			return fmt.Errorf("registry: %w", err)
		}
		if size > 0 && size+len(b) > chunkBytes {
			if err := flush(); err != nil {
				return err
			}
		}
		ops, size = append(ops, o), size+len(b)+1
		return nil
	}
	r.mu.RLock()
	var names []string
	for name := range r.x.tenants {
		names = append(names, name)
	}
	x := r.x
	var notes []op
	for _, n := range x.notes {
		notes = append(notes, op{Number: n.Revision, Note: n})
	}
	r.mu.RUnlock()
	for i := range notes {
		if err := add(notes[i]); err != nil {
			return err
		}
	}
	for _, name := range names {
		for after, more := uint64(0), true; more; {
			var piece []op
			r.mu.RLock()
			if r.x != x {
				r.mu.RUnlock()
				return errors.New("registry: read anew meanwhile")
			}
			t := r.x.tenants[name]
			agents := t.agentsAfter(after, chunkRecords)
			for _, a := range agents {
				rec := a.AgentRecord
				piece = append(piece, op{Number: a.number, Agent: &rec})
			}
			r.mu.RUnlock()
			more = len(piece) == chunkRecords
			for i := range piece {
				after = piece[i].Number
				if err := add(piece[i]); err != nil {
					return err
				}
			}
		}
		for after, more := uint64(0), true; more; {
			var piece []op
			r.mu.RLock()
			if r.x != x {
				r.mu.RUnlock()
				return errors.New("registry: read anew meanwhile")
			}
			t := r.x.tenants[name]
			items := t.all.items[t.all.below(after+1):]
			more = len(items) > chunkRecords
			for _, s := range items[:min(len(items), chunkRecords)] {
				after = s.number
				if !s.gone {
					rec := s.session(t)
					piece = append(piece, op{Number: s.number, Session: &rec})
				}
			}
			r.mu.RUnlock()
			for i := range piece {
				if err := add(piece[i]); err != nil {
					return err
				}
			}
		}
	}
	return flush()
}

func (t *tenant) agentsAfter(number uint64, n int) []*agent {
	lo, hi := 0, len(t.listed)
	for lo < hi {
		if mid := (lo + hi) / 2; t.listed[mid].number <= number {
			lo = mid + 1
		} else {
			hi = mid
		}
	}
	return t.listed[lo:min(lo+n, len(t.listed))]
}

// put seals and stores one message of a snapshot.
func (r *Registry) put(ctx context.Context, subject string, h header, plain []byte) (uint64, error) {
	frame, err := r.sealer.seal(h, plain)
	if err != nil {
		return 0, err
	}
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	if err := r.asked(); err != nil {
		return 0, err
	}
	ack, err := r.js.PublishMsg(ctx, &nats.Msg{Subject: subject, Data: frame}, jetstream.WithExpectStream(natsfeed.SnapshotStream))
	if err != nil {
		return 0, fmt.Errorf("registry: snapshot: %w", err)
	}
	return ack.Sequence, nil
}

// trim lets go of what is behind the snapshot before the newest: that one stays,
// and the log from there on, in case that the newest cannot be read.
func (r *Registry) trim(ctx context.Context, snapshots jetstream.Stream, kept *manifest) error {
	if kept.seq == 0 {
		return nil
	}
	log, err := r.stream(ctx, natsfeed.RegistryStream)
	if err != nil {
		return err
	}
	purge := func(s jetstream.Stream, below uint64) error {
		if below <= 1 {
			return nil
		}
		ctx, cancel := context.WithTimeout(ctx, askTimeout)
		defer cancel()
		if err := r.asked(); err != nil {
			return err
		}
		if err := s.Purge(ctx, jetstream.WithPurgeSequence(below)); err != nil {
			return fmt.Errorf("registry: trim: %w", err)
		}
		return nil
	}
	if err := purge(log, kept.Seq+1); err != nil {
		return err
	}
	r.hook("trimmed")
	from := kept.seq
	if kept.Chunks > 0 {
		from = min(from, kept.FirstSeq)
	}
	return purge(snapshots, from)
}
