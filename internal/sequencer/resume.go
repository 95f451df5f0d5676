package sequencer

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"maps"
	"slices"

	"github.com/interlock-fabric/interlock/pkg/session"
)

// decided is the decisions of one stored batch.
type decided struct {
	epoch, number uint64
	at            session.Instant
	ids           []session.DecisionID // never changed
}

// resume is what a writer needs beside the state of a published segment to go on
// from there without the log before it: where the log goes on, the newest hashes,
// by which the claims of enforcers are judged, and the decisions that must not be
// taken twice. It is published beside the segment; docs/design/wire.md has its
// form.
type resume struct {
	epoch, number uint64
	head          session.Hash
	at            uint64 // the log's position of that batch
	time, horizon session.Instant
	// judged is up to which batch of the epoch the writer trusted each key.
	judged map[session.KeyID]uint64
	links  []link // up to number, without holes
	taken  []decided
}

const (
	resumeVersion = 1
	resumeHead    = 1 + 8 + 8 + 32 + 8 + 8 + 8
	resumeKey     = 8 + 8
	resumeLink    = 32 + 8
)

// writeTo writes the form of a resume.
func (r *resume) writeTo(w io.Writer) error {
	out := bufio.NewWriterSize(w, 64<<10)
	b := []byte{resumeVersion}
	u64 := func(v uint64) { b = binary.BigEndian.AppendUint64(b, v) }
	put := func() { _, _ = out.Write(b); b = b[:0] } // the error sticks until Flush
	u64(r.epoch)
	u64(r.number)
	b = append(b, r.head[:]...)
	u64(r.at)
	u64(uint64(r.time))
	u64(uint64(r.horizon))
	u64(uint64(len(r.judged)))
	for _, id := range slices.SortedFunc(maps.Keys(r.judged), func(a, b session.KeyID) int { return bytes.Compare(a[:], b[:]) }) {
		b = append(b, id[:]...)
		u64(r.judged[id])
	}
	u64(uint64(len(r.links)))
	put()
	for i := range r.links {
		b = append(append(b, r.links[i].hash[:]...), r.links[i].key[:]...)
		put()
	}
	u64(uint64(len(r.taken)))
	for i := range r.taken {
		d := &r.taken[i]
		b = binary.AppendUvarint(b, d.epoch)
		b = binary.AppendUvarint(b, d.number)
		b = binary.AppendUvarint(b, uint64(d.at))
		b = binary.AppendUvarint(b, uint64(len(d.ids)))
		for j := range d.ids {
			b = append(b, d.ids[j][:]...)
		}
		put()
	}
	put()
	return out.Flush()
}

// parseResume takes the form apart. Errors wrap session.ErrMalformed.
func parseResume(b []byte) (*resume, error) {
	malformed := fmt.Errorf("sequencer: resume: %w", session.ErrMalformed)
	if len(b) < resumeHead+16 || b[0] != resumeVersion {
		return nil, malformed
	}
	b = b[1:]
	u64 := func() uint64 {
		v := binary.BigEndian.Uint64(b)
		b = b[8:]
		return v
	}
	r := &resume{epoch: u64(), number: u64()}
	b = b[copy(r.head[:], b):]
	r.at, r.time, r.horizon = u64(), session.Instant(u64()), session.Instant(u64())
	n := u64()
	if n > session.MaxKeys || uint64(len(b)) < n*resumeKey+8 {
		return nil, malformed
	}
	r.judged = map[session.KeyID]uint64{}
	for range n {
		id := session.KeyID(b)
		b = b[len(id):]
		r.judged[id] = u64()
	}
	n = u64()
	if n > HashWindow || n > r.number || uint64(len(b)) < n*resumeLink+8 || r.time < 0 || r.horizon < 0 {
		return nil, malformed
	}
	r.links = make([]link, n)
	for i := range r.links {
		l := &r.links[i]
		l.epoch, l.number = r.epoch, r.number-n+1+uint64(i)
		b = b[copy(l.hash[:], b):]
		b = b[copy(l.key[:], b):]
	}
	if n == 0 || r.links[n-1].hash != r.head {
		return nil, malformed
	}
	n = u64()
	if n > uint64(len(b)/4) {
		return nil, malformed
	}
	r.taken = make([]decided, 0, n)
	for range n {
		var f [4]uint64
		for i := range f {
			v, k := binary.Uvarint(b)
			if k <= 0 {
				return nil, malformed
			}
			f[i], b = v, b[k:]
		}
		d := decided{epoch: f[0], number: f[1], at: session.Instant(f[2])}
		if f[3] > uint64(len(b)/len(session.DecisionID{})) || d.at < 0 {
			return nil, malformed
		}
		d.ids = make([]session.DecisionID, f[3])
		for i := range d.ids {
			b = b[copy(d.ids[i][:], b):]
		}
		r.taken = append(r.taken, d)
	}
	if len(b) > 0 {
		return nil, malformed
	}
	return r, nil
}

// cut reports whether a key set of the same epoch takes out of the chain what the
// resume is behind, or may: a withdrawal that the writer did not know, from before
// where the hashes begin, takes out one knows not what.
func (r *resume) cut(ks *session.KeySet) bool { return r.cutBy(trustedUpTo(ks)) }

func (r *resume) cutBy(last map[session.KeyID]uint64) bool {
	for i := range r.links {
		if l := &r.links[i]; l.number > last[l.key] {
			return true
		}
	}
	before := r.number - uint64(len(r.links))
	for id, then := range r.judged {
		if last[id] < min(then, before) {
			return true
		}
	}
	return false
}

// snapshot is what a segment is sealed of.
type snapshot struct {
	chain
	judged map[session.KeyID]uint64
	taken  []decided
}

// snapshot returns what is stored, if this is the writer and knows all that is in
// force. It copies nothing that grows.
func (w *writer) snapshot() (snapshot, bool) {
	ks := w.s.trust.KeySet()
	if w.role != writing || w.s.halted() != nil || w.number == 0 || w.carry != nil || w.headless || w.keySet != ks.Version || w.epoch != ks.Epoch {
		return snapshot{}, false
	}
	n := len(w.taken)
	c := w.chain
	c.signers = slices.Clone(c.signers)
	return snapshot{c, trustedUpTo(ks), w.taken[:n:n]}, true
}

// resume adds the hashes to a snapshot.
func (x *snapshot) resume(h *hashRing) *resume {
	r := &resume{
		epoch: x.epoch, number: x.number, head: x.head, at: x.at, time: x.time, horizon: x.horizon,
		judged: x.judged, taken: x.taken,
	}
	for n := x.number; n > 0; n-- {
		l, ok := h.at(x.epoch, n)
		if !ok {
			break
		}
		r.links = append(r.links, l)
	}
	slices.Reverse(r.links)
	return r
}

// bytes returns the form. It takes 17 bytes a decision and 40 a hash.
func (r *resume) bytes() ([]byte, error) {
	var b bytes.Buffer
	err := r.writeTo(&b)
	return b.Bytes(), err
}
