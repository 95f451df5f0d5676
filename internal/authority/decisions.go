package authority

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/interlock-fabric/interlock/internal/access"
	"github.com/interlock-fabric/interlock/internal/audit"
	"github.com/interlock-fabric/interlock/pkg/authority"
	"github.com/interlock-fabric/interlock/pkg/natsfeed"
	"github.com/interlock-fabric/interlock/pkg/session"
)

const (
	// maxLooked bounds the batches, and decisionsTime the time, of one page of
	// decisions.
	maxLooked     = 2000
	decisionsTime = 5 * time.Second
)

// mark is a batch of the log: its message in the stream, or a later one, and its
// hash.
type mark struct {
	seq  uint64
	hash session.Hash
}

// back calls fn with the batches of the log from one on, newest first, until fn
// returns false, and returns the one to go on from; its seq is 0 where there is
// none. Each names the one before by its hash, so that what else is in the stream
// is passed over. It looks at no more than most messages.
func (a *Authority) back(ctx context.Context, from mark, most int, fn func(mark, *session.Frame, *session.Batch) bool) (mark, error) {
	js, err := jetstream.New(a.nc)
	if err != nil {
		return mark{}, fmt.Errorf("authority: %w", err)
	}
	ask := func(f func(context.Context) error) error {
		ctx, cancel := context.WithTimeout(ctx, getTimeout)
		defer cancel()
		return f(ctx)
	}
	var s jetstream.Stream
	if err := ask(func(ctx context.Context) (err error) { s, err = js.Stream(ctx, natsfeed.LogStream); return err }); err != nil {
		return mark{}, fmt.Errorf("authority: %w", err)
	}
	state := s.CachedInfo().State
	at := mark{min(from.seq, state.LastSeq), from.hash}
	for ; at.seq >= max(state.FirstSeq, 1); at.seq-- {
		if most--; most < 0 {
			return at, nil
		}
		var m *jetstream.RawStreamMsg
		err := ask(func(ctx context.Context) (err error) { m, err = s.GetMsg(ctx, at.seq); return err })
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			continue // trimmed, or a hole
		}
		if err != nil {
			return mark{}, fmt.Errorf("authority: %w", err)
		}
		f, err := session.ParseFrame(m.Data)
		if err != nil || f.Hash() != at.hash {
			continue
		}
		b, err := session.UnmarshalBatch(f.Body)
		if err != nil {
			return mark{}, fmt.Errorf("authority: %w", err)
		}
		if !fn(at, &f, b) {
			return at, nil
		}
		if at.hash = b.Prev; b.Number == 1 {
			break
		}
	}
	return mark{}, nil
}

// Decisions lists the decisions of the log, newest first; it is the API's.
func (a *Authority) Decisions(ctx context.Context, q authority.DecisionsQuery) (*authority.DecisionsPage, error) {
	scope := access.From(ctx).Scope(access.ListDecisions)
	if q.Tenant != "" {
		t, _ := a.tenants()
		t = t.within(scope)
		if _, err := t.resolve(q.Tenant); err != nil {
			return nil, err
		}
	}
	at, err := a.decisionsFrom(&q)
	if err != nil {
		return nil, err
	}
	wanted := func(l authority.EntryLine) bool {
		global := l.On == session.KindGlobal.String()
		return (scope.Has(l.Tenant) || global) && (q.Tenant == "" || l.Tenant == q.Tenant || global) && (q.Incident == "" || l.Incident == q.Incident)
	}
	ks, limit, until := a.store.KeySet(), cmp.Or(q.Limit, authority.DefaultPage), time.Now().Add(decisionsTime)
	out := &authority.DecisionsPage{Decisions: []authority.LoggedDecision{}}
	// Of the batch where the page before ended, the decisions up to below are left.
	below := at.below
	rest, err := a.back(ctx, at.mark, maxLooked, func(_ mark, f *session.Frame, b *session.Batch) bool {
		if time.Now().After(until) {
			return false
		}
		for _, d := range decisionsOf(b, f.Key, audit.Place{}) {
			if d.at.Part >= below {
				continue
			}
			if !q.Since.IsZero() && d.time.Time().Before(q.Since) {
				limit = -1 // nor is anything older wanted
				return false
			}
			lines := slices.DeleteFunc(linesOf(d.entries, ks.TenantName), func(l authority.EntryLine) bool { return !wanted(l) })
			if len(lines) == 0 {
				continue
			}
			if len(out.Decisions) == limit {
				return false
			}
			below = d.at.Part
			out.Decisions = append(out.Decisions, authority.LoggedDecision{
				ID: hex.EncodeToString(d.id[:]), Epoch: b.Epoch, Number: b.Number, At: d.time.Time().UTC(), Key: d.key.String(), Lines: lines,
			})
		}
		below = math.MaxUint64
		return true
	})
	if err != nil {
		if transient(err) {
			err = authority.NewProblem(authority.ProblemUnavailable, "the store of the log does not answer", "try again in a moment")
		}
		return nil, err
	}
	if rest.seq > 0 && limit >= 0 {
		out.Next = decisionsPage{rest, below}.token(&q)
	}
	return out, nil
}

// decisionsPage is where a page of decisions begins: at a batch, with its decisions
// below one.
type decisionsPage struct {
	mark
	below uint64
}

// decisionsHash ties a page to its query.
func decisionsHash(q *authority.DecisionsQuery) []byte {
	h := sha256.Sum256(fmt.Appendf(nil, "decisions %q %q %d", q.Tenant, q.Incident, q.Since.UnixNano()))
	return h[:8]
}

func (p decisionsPage) token(q *authority.DecisionsQuery) string {
	b := append(decisionsHash(q), p.hash[:]...)
	b = binary.BigEndian.AppendUint64(b, p.seq)
	return base64.RawURLEncoding.EncodeToString(binary.BigEndian.AppendUint64(b, p.below))
}

// decisionsFrom returns where the page that is asked for begins. A place that there
// is not has no page.
func (a *Authority) decisionsFrom(q *authority.DecisionsQuery) (p decisionsPage, err error) {
	if q.Page == "" {
		p.seq, p.below = math.MaxUint64, math.MaxUint64
		_, _, p.hash = a.seq.Head()
		return p, nil
	}
	b, err := base64.RawURLEncoding.DecodeString(q.Page)
	if err != nil || len(b) != 24+len(p.hash) || string(b[:8]) != string(decisionsHash(q)) {
		return p, invalid("use the next of the page before, with the same query", "the page is not one of this query")
	}
	copy(p.hash[:], b[8:])
	b = b[8+len(p.hash):]
	p.seq, p.below = binary.BigEndian.Uint64(b), binary.BigEndian.Uint64(b[8:])
	return p, nil
}

// linesOf sums entries up: one line for all that are alike.
func linesOf(entries []session.Entry, tenant func(session.TenantID) string) (lines []authority.EntryLine) {
	index := map[authority.EntryLine]int{}
	for i := range entries {
		e := &entries[i]
		if e.Key.Tenant == session.FabricTenant {
			continue // the fabric's own books
		}
		l := authority.EntryLine{
			Operation: "set", Effect: e.Effect.String(), On: e.Key.Shape.String(), Tenant: tenant(e.Key.Tenant),
			Reason: e.Reason.String(), Incident: e.Incident, Drill: e.Drill,
		}
		if e.Op == session.OpLift {
			l.Operation = "lift"
		}
		at, ok := index[l]
		if !ok {
			at = len(lines)
			index[l] = at
			lines = append(lines, l)
		}
		lines[at].Count++
	}
	return lines
}
