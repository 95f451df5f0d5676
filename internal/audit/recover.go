package audit

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/interlock-fabric/interlock/pkg/authority"
)

// Place is a place in the log of decisions: before the Part-th decision, from 0,
// of a batch.
type Place struct {
	Epoch  uint64 `json:"epoch"`
	Number uint64 `json:"number"`
	Part   uint64 `json:"part,omitempty"`
}

// Compare orders places as the log does.
func (p Place) Compare(o Place) int {
	return cmp.Or(cmp.Compare(p.Epoch, o.Epoch), cmp.Compare(p.Number, o.Number), cmp.Compare(p.Part, o.Part))
}

func (p Place) after(o Place) bool { return p.Compare(o) > 0 }

// Recovered is the record of a decision that the log has and the audit had not.
type Recovered struct {
	At     Place // of the decision
	Record authority.AuditRecord
}

// Walked returns up to where every decision of the log is known to have its
// record.
func (l *Log) Walked() Place {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.at.Walked.after(l.walked) {
		return l.at.Walked
	}
	return l.walked
}

// SetWalked notes that every decision before p has its record. It is said in the
// next batch, and so outlives this run.
func (l *Log) SetWalked(p Place) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if p.after(l.walked) {
		l.walked = p
	}
}

// Recover stores records of decisions, in the order of the log, and returns when
// they are durable or ctx ends. One that turns out to have its record meanwhile,
// from whoever took the decision or from another authority that recovered it, gets
// no second. Errors are as those of Append.
func (l *Log) Recover(ctx context.Context, list []Recovered) error {
	for _, r := range list {
		r.Record.Recovered = true
		it, err := l.enqueueItem(r.Record, &item{recovers: r.At})
		if err != nil {
			return err
		}
		select {
		case <-it.done:
			if it.err != nil {
				return it.err
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

// decisionOf returns the id of the decision that r is the record of; "" when it is
// none's, as that of one who asked again.
func decisionOf(r *authority.AuditRecord) string {
	if r.Kind != authority.AuditDecision || r.Duplicate || r.Sequence == 0 {
		return ""
	}
	return r.Decision
}

// Unrecorded returns those of the decisions, by their ids, that have no record, and
// the time from which on records are kept: what is older may have had one. since
// is when the oldest of them was taken.
func (l *Log) Unrecorded(ctx context.Context, ids map[string]struct{}, since time.Time) (missing map[string]struct{}, kept time.Time, err error) {
	missing = make(map[string]struct{}, len(ids))
	l.mu.Lock()
	for id := range ids {
		if !l.seen.has(id) {
			missing[id] = struct{}{}
		}
	}
	l.mu.Unlock()
	if len(missing) == 0 {
		return missing, kept, nil
	}
	r, err := l.reader(ctx)
	if err != nil {
		return nil, kept, err
	}
	err = r.back(ctx, r.at.last, func(b *batch, _ uint64) (bool, error) {
		if r.at.Floor > 1 {
			kept = b.Time.Time()
		}
		if b.Time.Time().Add(timeSlack).Before(since) {
			return false, nil
		}
		entries, err := b.open(l.o.Sealing)
		if err != nil {
			return false, err
		}
		for i := range entries {
			delete(missing, recorded(&entries[i]))
		}
		return len(missing) > 0, nil
	})
	return missing, kept, err
}

// recorded returns the decision that a stored record is of.
func recorded(e *entry) string {
	var r struct {
		Kind      string `json:"kind"`
		Decision  string `json:"decision"`
		Duplicate bool   `json:"duplicate"`
		Sequence  uint64 `json:"seq"`
	}
	if json.Unmarshal(e.body, &r) != nil {
		return ""
	}
	return decisionOf(&authority.AuditRecord{Kind: r.Kind, Decision: r.Decision, Duplicate: r.Duplicate, Sequence: r.Sequence})
}

// back calls fn with the batches of the chain from seq on back, until it returns
// false or fails.
func (r *reader) back(ctx context.Context, seq uint64, fn func(b *batch, seq uint64) (bool, error)) error {
	after := r.at.statement // the batch behind the one that is read
	after.First, after.Prev = r.at.Number+1, r.at.Hash
	if seq != r.at.last {
		after.First = 0 // not known
	}
	for ; seq >= r.first && seq > 0; seq-- {
		m, err := get(ctx, r.s, seq)
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			return nil // purged, and what is before it
		}
		if err != nil {
			return err
		}
		b, err := parse(m.Data, r.ks)
		if err != nil || m.Sequence != seq || after.First > 0 && (b.Number >= after.First || b.Number == after.First-1 && b.Hash != after.Prev) {
			continue // not part of the chain
		}
		after = b.statement
		if more, err := fn(b, seq); err != nil || !more {
			return err
		}
	}
	return nil
}

// maxSeen bounds the decisions that are known to have their records without
// looking.
const maxSeen = 1 << 16

// seen are the newest decisions whose records were stored here, or read.
type seen struct {
	ids   map[string]struct{}
	order []string
}

func (s *seen) has(id string) bool { _, ok := s.ids[id]; return ok }

func (s *seen) add(id string) {
	if id == "" || s.has(id) {
		return
	}
	if s.ids == nil {
		s.ids = map[string]struct{}{}
	}
	if len(s.order) >= maxSeen {
		// A quarter at once, so that forgetting is cheap.
		for _, old := range s.order[:maxSeen/4] {
			delete(s.ids, old)
		}
		s.order = append(s.order[:0], s.order[maxSeen/4:]...)
	}
	s.ids[id] = struct{}{}
	s.order = append(s.order, id)
}

// note notes whose records a batch of another authority has.
func (l *Log) note(b *batch) {
	entries, err := b.open(l.o.Sealing)
	if err != nil {
		return // whoever cannot read the audit recovers nothing
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for i := range entries {
		l.seen.add(recorded(&entries[i]))
	}
}
