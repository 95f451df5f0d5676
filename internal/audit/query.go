package audit

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/interlock-fabric/interlock/pkg/authority"
	"github.com/interlock-fabric/interlock/pkg/session"
)

const (
	defaultLimit = 100
	// queryTime bounds a question: what has not been looked at by then is left to
	// the next page.
	queryTime = 8 * time.Second
	// statementEvery is after how many records an export has a statement at the
	// latest, beside the one at its end.
	statementEvery = 1000
)

// ErrCursor: the cursor is not one that a page has given.
var ErrCursor = errors.New("audit: not a cursor of a page")

// reader reads the batches of the stream, verified.
type reader struct {
	l           *Log
	s           jetstream.Stream
	ks          *session.KeySet
	first, last uint64 // of the stream
	at          place
}

func (l *Log) reader(ctx context.Context) (*reader, error) {
	// What another authority has stored is there to be read.
	l.mu.Lock()
	at := l.at
	l.mu.Unlock()
	s, state, err := l.stream(ctx)
	if err != nil {
		return nil, err
	}
	r := &reader{l: l, s: s, ks: l.o.Trust.KeySet(), first: max(state.FirstSeq, 1), last: state.LastSeq, at: at}
	if r.last > at.seq {
		if r.at, err = l.follow(ctx, s, at, r.last, r.ks); err != nil {
			return nil, err
		}
	}
	return r, nil
}

// batch returns the first batch of the chain's messages from seq on, and where it
// is; nil behind the last.
func (r *reader) batch(ctx context.Context, seq uint64) (*batch, uint64, error) {
	for ; seq <= r.at.last; seq++ {
		m, err := get(ctx, r.s, seq)
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			return nil, 0, nil
		}
		if err != nil {
			return nil, 0, err
		}
		seq = m.Sequence
		if b, err := parse(m.Data, r.ks); err == nil {
			return b, seq, nil
		}
	}
	return nil, 0, nil
}

// before returns the last message that begins a batch of which ok is true, given
// that ok is true of all up to it, and the first message where there is none.
func (r *reader) before(ctx context.Context, ok func(*batch) bool) (uint64, error) {
	lo, hi := r.first, r.at.last+1 // ok up to lo, not from hi on
	for lo+1 < hi {
		mid := lo + (hi-lo)/2
		b, seq, err := r.batch(ctx, mid)
		if err != nil {
			return 0, err
		}
		if b != nil && seq < hi && ok(b) {
			lo = seq
		} else {
			hi = mid
		}
	}
	return lo, nil
}

// View is what somebody may see: it takes out of a record what is not theirs, and
// reports whether all of it is, and whether any of it is. Nil is a view of
// everything.
type View struct {
	// Tenants are those that it is of, for the statement at an export's end.
	Tenants []string
	Show    func(*authority.AuditRecord) (whole, some bool)
}

func (v *View) show(r *authority.AuditRecord) (whole, some bool) {
	if v == nil {
		return true, true
	}
	return v.Show(r)
}

// Records returns the newest records that match q, newest first, as a view shows
// them.
func (l *Log) Records(ctx context.Context, q authority.AuditQuery, view *View) (*authority.AuditPage, error) {
	r, err := l.reader(ctx)
	if err != nil {
		return nil, err
	}
	out := &authority.AuditPage{Records: []authority.AuditEntry{}, Head: r.at.Number, Floor: max(r.at.Floor, 1)}
	seq, below := r.at.last, r.at.Number+1
	switch {
	case q.Before != "":
		n, s, ok := strings.Cut(q.Before, "-")
		var err1, err2 error
		below, err1 = strconv.ParseUint(n, 10, 64)
		seq, err2 = strconv.ParseUint(s, 10, 64)
		if !ok || err1 != nil || err2 != nil {
			return nil, ErrCursor
		}
		seq = min(seq, r.at.last)
	case !q.Until.IsZero():
		if seq, err = r.before(ctx, func(b *batch) bool { return b.Time.Time().Before(q.Until.Add(timeSlack)) }); err != nil {
			return nil, err
		}
	}
	w := newWanted(&q)
	limit, end := cmp.Or(q.Limit, defaultLimit), time.Now().Add(queryTime)
	return out, r.back(ctx, seq, func(b *batch, seq uint64) (bool, error) {
		if b.First >= below {
			return true, nil
		}
		if !q.Since.IsZero() && b.Time.Time().Add(timeSlack).Before(q.Since) {
			return false, nil
		}
		entries, err := b.open(l.o.Sealing)
		if err != nil {
			return false, err
		}
		for i := range slices.Backward(entries) {
			e := &entries[i]
			if e.number >= below {
				continue
			}
			if len(out.Records) == limit || time.Now().After(end) {
				out.Next = fmt.Sprintf("%d-%d", e.number+1, seq)
				return false, nil
			}
			var rec authority.AuditRecord
			if err := json.Unmarshal(e.body, &rec); err != nil {
				return false, fmt.Errorf("audit: record %d: %w", e.number, err)
			}
			// What is not shown is not searched either.
			if _, some := view.show(&rec); some && w.record(&rec) {
				h := e.hash()
				out.Records = append(out.Records, authority.AuditEntry{Number: e.number, Hash: hex.EncodeToString(h[:]), AuditRecord: rec})
			}
		}
		return true, nil
	})
}

// timeSlack is how far the time of a batch may be behind that of its records, and
// the clocks of authorities apart.
const timeSlack = 5 * time.Minute

// wanted is a query whose values are in the form of the records.
type wanted struct {
	authority.AuditQuery
	agent string // canonical
	any   bool   // about a caller
}

func newWanted(q *authority.AuditQuery) wanted {
	w := wanted{AuditQuery: *q}
	for _, s := range []*string{&w.Kind, &w.Tenant, &w.User, &w.Client, &w.Session, &w.Incident} {
		*s = session.ReportText(*s)
	}
	w.Trace = strings.ToLower(w.Trace)
	w.agent = session.ReportText(agentOf(q.Agent))
	w.any = w.agent+w.User+w.Client+w.Session+w.Tenant != ""
	return w
}

// agentOf is the form in which two spellings of one agent are the same.
func agentOf(v string) string {
	if c, err := session.Canonical(session.KindAgent, v); err == nil {
		return c
	}
	return v
}

func is(want, have string) bool { return want == "" || want == have }

// record reports whether r matches, and takes the calls out of its trail that do
// not.
func (w *wanted) record(r *authority.AuditRecord) bool {
	if !is(w.Kind, r.Kind) || !w.Since.IsZero() && r.Time.Before(w.Since) || !w.Until.IsZero() && !r.Time.Before(w.Until) {
		return false
	}
	if len(r.Trail) > 0 {
		r.Trail = slices.DeleteFunc(r.Trail, func(t authority.TrailRecord) bool { return !w.call(&t) })
		return len(r.Trail) > 0
	}
	return is(w.Incident, r.Incident) && is(w.Trace, r.TraceID) &&
		(!w.any || slices.ContainsFunc(r.Callers, w.caller))
}

func (w *wanted) caller(c authority.AuditCaller) bool {
	return is(w.Tenant, c.Tenant) && is(w.User, c.User) && is(w.Client, c.Client) && is(w.Session, c.Session) && (w.agent == "" || agentOf(c.Agent) == w.agent)
}

func (w *wanted) call(t *authority.TrailRecord) bool {
	agent := func(a authority.TrailLink) bool { return agentOf(a.ID) == w.agent }
	sid := func(a authority.TrailLink) bool { return a.ID == w.Session }
	return is(w.Tenant, t.Tenant) && is(w.User, t.User) && is(w.Client, t.Client) && is(w.Incident, t.Incident) && is(w.Trace, t.TraceID) &&
		(w.agent == "" || slices.ContainsFunc(t.Actors, agent)) &&
		(is(w.Session, t.Session) || slices.ContainsFunc(t.Ancestors, sid))
}

// export writes lines and sums them up.
type export struct {
	w io.Writer
	h hash.Hash
}

func newExport(w io.Writer) *export {
	e := &export{h: sha256.New()}
	e.w = io.MultiWriter(w, e.h)
	return e
}

func (e *export) line(v any) error {
	b, err := marshal(v)
	if err != nil {
		return err
	}
	_, err = e.w.Write(append(b, '\n'))
	return err
}

// end signs all that was written.
func (e *export) end(st *statement, key []byte) error {
	e.h.Sum(st.Sum[:0])
	frame, err := sign(st, key)
	if err != nil {
		return fmt.Errorf("audit: %w", err)
	}
	return e.line(endLine{frame})
}

// The lines of exports. Each is its only spelling.
type (
	keySetLine struct {
		KeySet []byte `json:"keyset"`
	}
	// versionLine stands for it where the key set, which names every tenant, is not
	// for those who may see the export.
	versionLine struct {
		Version uint64 `json:"keyset_version"`
	}
	recordLine struct {
		Number uint64          `json:"n"`
		Prev   sum             `json:"prev"`
		Digest *sum            `json:"digest,omitempty"` // instead of a body that is left out
		Body   json.RawMessage `json:"body,omitempty"`
	}
	statementLine struct {
		Statement []byte `json:"statement"`
	}
	endLine struct {
		End []byte `json:"end"`
	}
)

// Export writes the chain from q.Since on to its end as JSON lines: the key set,
// each record, statements that were signed on the way, and a statement of the
// whole, signed now. Of records that do not match q, or that a view does not show
// whole, only the digest is written. One for a view has the key set's version
// alone.
func (l *Log) Export(ctx context.Context, q authority.AuditQuery, view *View, w io.Writer) error {
	r, err := l.reader(ctx)
	if err != nil {
		return err
	}
	_, signer, err := l.keys()
	if err != nil {
		return err
	}
	from := r.first
	if !q.Since.IsZero() {
		if from, err = r.before(ctx, func(b *batch) bool { return b.Time.Time().Add(timeSlack).Before(q.Since) }); err != nil {
			return err
		}
	}
	out := newExport(w)
	var first any = keySetLine{l.o.Frame()}
	if view != nil {
		first = versionLine{r.ks.Version}
	}
	if err := out.line(first); err != nil {
		return err
	}
	end := &statement{For: forExport, Partial: !q.Since.IsZero(), First: max(r.at.Floor, 1), Prev: r.at.Below, Time: session.InstantOf(time.Now()),
		Floor: max(r.at.Floor, 1), Below: r.at.Below, Epoch: r.at.Epoch, Log: r.at.Log, KeySet: r.ks.Version}
	want := newWanted(&q)
	want.Since = time.Time{} // whole batches
	q.Since = time.Time{}
	if end.Filter = q.Encode(); view != nil {
		end.Tenants = view.Tenants
	}
	since, begun := 0, false
	var chain place
	for seq := from; ; seq++ {
		b, at, err := r.batch(ctx, seq)
		if err != nil {
			return err
		}
		if b == nil {
			break
		}
		seq = at
		entries, err := b.open(l.o.Sealing)
		if err != nil {
			return err
		}
		switch {
		case !begun:
			// Behind what was removed, this is not the first that there was.
			end.First, end.Prev, begun = b.First, b.Prev, true
		case b.First <= chain.Number+1 && !chain.takes(b):
			continue // part of no chain
		}
		// A gap is written as one: whoever verifies it sees what is missing.
		chain = chain.onto(seq, &b.statement, !b.key.Withdrawn)
		end.Number, end.Hash = b.Number, b.Hash
		for i := range entries {
			if err := out.line(want.line(&entries[i], view)); err != nil {
				return err
			}
		}
		if since += len(entries); since >= statementEvery {
			since = 0
			if err := out.line(statementLine{b.frame}); err != nil {
				return err
			}
		}
	}
	return out.end(end, signer)
}

func (w *wanted) line(e *entry, view *View) recordLine {
	l := recordLine{Number: e.number, Prev: sum(e.prev), Body: e.body}
	if view != nil || w.any || w.Kind+w.Incident+w.Trace != "" {
		var rec authority.AuditRecord
		err := json.Unmarshal(e.body, &rec)
		if whole, _ := view.show(&rec); err != nil || !whole || !w.record(&rec) {
			d := sum(e.digest)
			l.Digest, l.Body = &d, nil
		}
	}
	return l
}
