package sequencer

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"github.com/interlock-fabric/interlock/pkg/filter"
	"github.com/interlock-fabric/interlock/pkg/natsfeed"
	"github.com/interlock-fabric/interlock/pkg/session"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// maxDescribed bounds how many descriptions are looked at, the newest: the
// writer keeps KeepSegments, and what else is there is nobody's.
const maxDescribed = 64

var (
	errMissing = errors.New("it is not whole, or not the one described")
	errBehind  = errors.New("the log behind it has been trimmed")
	errCut     = errors.New("a key was withdrawn that has signed what it is of")
)

// described is a published segment, as its description says.
type described struct {
	session.SegmentRef
	pos uint64 // of the description, in its stream
}

// base is where reading the log begins: at a published segment, or without one at
// what the stream has first.
type base struct {
	*resume
	segment *filter.Segment
	signers []session.Signer // as its description says
	// stale: the log does not have the segment's batch where it was.
	stale bool
	// trimmed: without a segment, the log begins later than it once did.
	trimmed bool
}

// findBase returns the newest published segment that can be trusted and that the
// log goes on from. It waits for the store as long as that takes: its error is
// ctx's.
func (s *Sequencer) findBase(ctx context.Context) (base, error) {
	for {
		b, err := s.tryBase(ctx)
		if err == nil || ctx.Err() != nil {
			return b, err
		}
		s.log.Warn("sequencer: the published segments cannot be read: waiting", "err", err)
		if err := sleep(ctx, retryAfter); err != nil {
			return base{}, err
		}
	}
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (s *Sequencer) tryBase(ctx context.Context) (base, error) {
	all, _, err := s.described(ctx)
	if err != nil {
		return base{}, err
	}
	for i := range all {
		d := &all[i]
		b, err := s.openBase(ctx, d)
		if err == nil {
			s.log.Info("sequencer: starting from a published segment", "epoch", d.Epoch, "number", d.Number, "entries", d.Entries)
			s.published.Store(&d.SegmentRef)
			return b, nil
		}
		if ctx.Err() != nil || !definite(err) {
			return base{}, err
		}
		s.refused.Add(1)
		s.log.Error("sequencer: a published segment was refused", "epoch", d.Epoch, "number", d.Number, "err", err)
	}
	first, _, err := s.logBounds(ctx)
	return base{trimmed: first > 1}, err
}

// definite reports whether an error says that a segment is not to be used. Any
// other, such as a store without a leader, says nothing of it.
func definite(err error) bool {
	for _, e := range []error{errMissing, errCut, errBehind, session.ErrFrame, filter.ErrSegment, filter.ErrDamaged} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// openBase verifies all of a published segment, and its place in the log.
func (s *Sequencer) openBase(ctx context.Context, d *described) (b base, err error) {
	if b.resume, err = s.readResume(ctx, d); err != nil {
		return base{}, err
	}
	if b.stale, err = s.leadsOn(ctx, b.resume); err != nil {
		return base{}, err
	}
	if b.segment, err = s.openSegment(ctx, d); err != nil {
		return base{}, err
	}
	b.signers = d.Signers
	return b, nil
}

// leadsOn looks for the segment's batch in the log. stale is that the log has
// another in its place, or ends before it; the latter is believed after a while,
// since a new leader may need a moment to apply all that it has.
func (s *Sequencer) leadsOn(ctx context.Context, r *resume) (stale bool, err error) {
	for deadline := time.Now().Add(lostAfter); ; {
		first, last, err := s.logBounds(ctx)
		switch {
		case err != nil:
			return false, err
		case first > r.at+1:
			return false, errBehind
		case first > r.at:
			return false, nil // the next batch names it
		case last < r.at && time.Now().Before(deadline):
			if err := sleep(ctx, retryAfter); err != nil {
				return false, err
			}
			continue
		}
		break
	}
	m, err := s.getNext(ctx, natsfeed.LogStream, natsfeed.LogSubject, r.at)
	if err != nil {
		return false, err
	}
	if m == nil || m.Seq != r.at {
		return true, nil
	}
	if f, err := session.ParseFrame(m.Data); err == nil {
		return f.Hash() != r.head, nil
	}
	return true, nil
}

// described returns the published segments that a trusted key describes, newest
// first, and the position of the last message on their subject.
func (s *Sequencer) described(ctx context.Context) (all []described, last uint64, err error) {
	for pos := uint64(1); ; {
		m, err := s.getNext(ctx, natsfeed.SegmentStream, natsfeed.SegmentSubject, pos)
		if err != nil {
			return nil, 0, err
		}
		if m == nil {
			break
		}
		pos, last = m.Seq+1, m.Seq
		d, err := s.describes(m)
		if err != nil {
			s.refused.Add(1)
			s.log.Warn("sequencer: a description of a published segment was refused", "position", m.Seq, "err", err)
			continue
		}
		if all = append(all, d); len(all) > maxDescribed {
			all = slices.Delete(all, 0, 1)
		}
	}
	slices.SortStableFunc(all, func(a, b described) int {
		return cmp.Or(cmp.Compare(b.Epoch, a.Epoch), cmp.Compare(b.Number, a.Number), cmp.Compare(b.pos, a.pos))
	})
	return all, last, nil
}

// describes verifies who signed a description: a key that may speak for all
// tenants, and was not withdrawn before that number; and that no other key was
// whose batches it says are in it.
func (s *Sequencer) describes(m *stored) (described, error) {
	f, err := session.ParseFrame(m.Data)
	if err != nil {
		return described{}, err
	}
	if f.Type != session.TypeSegment {
		return described{}, fmt.Errorf("%w: not a segment's description", session.ErrMalformed)
	}
	ref, err := session.UnmarshalSegmentRef(f.Body)
	if err != nil {
		return described{}, err
	}
	t := s.w.epochs.of(ref.Epoch)
	if t == nil || t.KeySet() == nil {
		return described{}, session.ErrUntrusted
	}
	key, err := t.Writer(&f, ref.Number, false, t.KeySet().NotAfter-1)
	if err != nil {
		return described{}, err
	}
	if !key.May(session.GlobalKey()) {
		return described{}, fmt.Errorf("%w: the key may not speak for all tenants", session.ErrUntrusted)
	}
	if len(ref.Signers) > 0 && ref.Cut(t.KeySet()) {
		return described{}, errCut
	}
	if l, ok := s.hashes.at(ref.Epoch, ref.Number); ok && s.IsWriter() && l.hash != ref.Head {
		return described{}, errCut
	}
	return described{ref, m.Seq}, nil
}

// readResume reads and verifies what a writer needs beside a published segment.
func (s *Sequencer) readResume(ctx context.Context, d *described) (*resume, error) {
	if d.ResumeSize == 0 {
		return nil, errMissing
	}
	var b bytes.Buffer
	if err := s.readObject(ctx, d.ResumeSum, d.ResumeSize, &b); err != nil {
		return nil, err
	}
	r, err := parseResume(b.Bytes())
	if err != nil {
		return nil, err
	}
	if r.epoch != d.Epoch || r.number != d.Number || r.head != d.Head {
		return nil, errMissing
	}
	if t := s.w.epochs.of(r.epoch); t == nil || r.cut(t.KeySet()) {
		return nil, errCut
	}
	return r, nil
}

// getChunk reads the first chunk on a subject at or behind pos. A direct get is
// much cheaper, and any replica's will do, since the sum says whether it is right;
// that there is none only the leader knows.
func (s *Sequencer) getChunk(ctx context.Context, subject string, pos uint64) (*stored, error) {
	try, cancel := context.WithTimeout(ctx, 2*time.Second)
	m, err := s.nc.RequestWithContext(try, directGet+natsfeed.SegmentStream, fmt.Appendf(nil, `{"seq":%d,"next_by_subj":%q}`, pos, subject))
	cancel()
	if err == nil && m.Header.Get("Status") == "" {
		if seq, err := strconv.ParseUint(m.Header.Get(jetstream.SequenceHeader), 10, 64); err == nil && seq >= pos {
			return &stored{Seq: seq, Data: m.Data}, nil
		}
	}
	return s.getNext(ctx, natsfeed.SegmentStream, subject, pos)
}

// readObject writes what is stored under a sum to w, and fails unless it has that
// sum and size.
func (s *Sequencer) readObject(ctx context.Context, sum [32]byte, size uint64, w io.Writer) error {
	subject, h, left := natsfeed.SegmentChunkSubject(sum), sha256.New(), size
	for pos := uint64(1); left > 0; {
		m, err := s.getChunk(ctx, subject, pos)
		if err != nil {
			return err
		}
		if m == nil || uint64(len(m.Data)) > left {
			return errMissing
		}
		pos, left = m.Seq+1, left-uint64(len(m.Data))
		_, _ = h.Write(m.Data) // never fails (hash.Hash)
		if _, err := w.Write(m.Data); err != nil {
			return err
		}
	}
	if [32]byte(h.Sum(nil)) != sum {
		return errMissing
	}
	return nil
}

// segmentFile is the file of the state directory that holds the newest segment.
const segmentFile = "state.seg"

// openSegment opens a published segment: the file in the state directory, if that
// is the one, and otherwise what the store has.
func (s *Sequencer) openSegment(ctx context.Context, d *described) (g *filter.Segment, err error) {
	switch path := s.segmentPath(); {
	case path != "" && fileSum(path) == d.Sum:
		g, err = filter.OpenSegment(path)
	case path != "":
		g, err = s.downloadFile(ctx, d, path)
	}
	if g == nil && (err == nil || isPath(err)) {
		g, err = s.downloadHeap(ctx, d) // also when the disk has no room
	}
	if err != nil {
		return nil, err
	}
	if m := g.Mark(); m.Epoch != d.Epoch || m.Number != d.Number || m.Head != d.Head || g.Digest() != d.State || uint64(g.Size()) != d.Size {
		return nil, errors.Join(errMissing, g.Close())
	}
	return g, nil
}

func isPath(err error) bool {
	var p *fs.PathError
	return errors.As(err, &p)
}

func (s *Sequencer) segmentPath() string {
	if s.o.StateDir == "" {
		return ""
	}
	return filepath.Join(s.o.StateDir, segmentFile)
}

// openStateDir makes the state directory, and removes what a crash left there.
func (s *Sequencer) openStateDir() error {
	if s.o.StateDir == "" {
		return nil
	}
	if err := os.MkdirAll(s.o.StateDir, 0o700); err != nil {
		return fmt.Errorf("sequencer: %w", err)
	}
	left, err := filepath.Glob(filepath.Join(s.o.StateDir, segmentFile+".*.tmp"))
	for _, path := range left {
		err = errors.Join(err, os.Remove(path))
	}
	if err != nil {
		return fmt.Errorf("sequencer: %w", err)
	}
	return nil
}

// fileSum returns the SHA-256 of a file, or zeros for one that cannot be read.
func fileSum(path string) (sum [32]byte) {
	f, err := os.Open(path)
	if err != nil {
		return sum
	}
	h := sha256.New()
	_, err = io.Copy(h, f)
	if errors.Join(err, f.Close()) == nil {
		h.Sum(sum[:0])
	}
	return sum
}

func (s *Sequencer) downloadFile(ctx context.Context, d *described, path string) (g *filter.Segment, err error) {
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".*.tmp") // 0600
	if err != nil {
		return nil, err
	}
	err = s.readObject(ctx, d.Sum, d.Size, f)
	if err = errors.Join(err, f.Close()); err == nil {
		g, err = filter.OpenSegment(f.Name())
	}
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return nil, errors.Join(err, os.Remove(f.Name()))
	}
	return g, nil
}

func (s *Sequencer) downloadHeap(ctx context.Context, d *described) (*filter.Segment, error) {
	r, w := io.Pipe()
	done := make(chan error, 1)
	go func() {
		err := s.readObject(ctx, d.Sum, d.Size, w)
		_ = w.CloseWithError(err) // never fails (io.Pipe)
		done <- err
	}()
	g, err := filter.ReadSegment(r, int64(d.Size))
	_ = r.CloseWithError(err) // never fails (io.Pipe)
	if rerr := <-done; rerr != nil {
		err = rerr // of which err is a consequence, or which came after the last byte
	}
	return g, err
}

// logBounds asks the log's leader for the positions of its first and last
// message.
func (s *Sequencer) logBounds(ctx context.Context) (first, last uint64, err error) {
	try, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	m, err := s.nc.RequestWithContext(try, streamInfo+natsfeed.LogStream, nil)
	if err != nil {
		return 0, 0, fmt.Errorf("sequencer: the log: %w", err)
	}
	a, err := parseInfo(m)
	if err != nil {
		return 0, 0, fmt.Errorf("sequencer: the log: %w", err)
	}
	return a.State.FirstSeq, a.State.LastSeq, nil
}

const streamInfo = "$JS.API.STREAM.INFO."

// info is what a stream's leader says of it.
type info struct {
	Created time.Time `json:"created"`
	State   *struct {
		FirstSeq uint64 `json:"first_seq"`
		LastSeq  uint64 `json:"last_seq"`
	} `json:"state"`
	Error *apiError `json:"error"`
}

func parseInfo(m *nats.Msg) (a info, err error) {
	switch err := json.Unmarshal(m.Data, &a); {
	case err != nil:
		return a, err
	case a.Error != nil:
		return a, fmt.Errorf("%s (%d)", a.Error.Description, a.Error.ErrCode)
	case a.State == nil:
		return a, errors.New("answer without state")
	}
	return a, nil
}
