package audit

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/interlock-fabric/interlock/pkg/authority"
)

func decision(i int) authority.AuditRecord {
	r := record(i)
	r.Decision, r.Sequence, r.Epoch = fmt.Sprintf("%032x", i), uint64(i), 1
	return r
}

func recovered(i int) Recovered {
	return Recovered{At: Place{Epoch: 1, Number: uint64(i)}, Record: decision(i)}
}

// records returns how often each decision is on record.
func (s *store) records(l *Log) map[string]int {
	s.Helper()
	p, err := l.Records(s.ctx, authority.AuditQuery{Kind: authority.AuditDecision, Limit: authority.MaxAuditPage}, nil)
	must(s, err)
	out := map[string]int{}
	for i := range p.Records {
		out[decisionOf(&p.Records[i].AuditRecord)]++
	}
	return out
}

// However many authorities recover the same decisions, each gets one record, and
// where they were is known after a restart.
func TestRecoveredOnce(t *testing.T) {
	s := newStore(t)
	logs := []*Log{s.open(), s.open(), s.open()}
	const n = 40
	var wg sync.WaitGroup
	for _, l := range logs {
		wg.Go(func() {
			for i := 1; i <= n; i += 4 {
				var list []Recovered
				for k := i; k < i+4; k++ {
					list = append(list, recovered(k))
				}
				if err := l.Recover(s.ctx, list); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	again := s.open()
	have := s.records(again)
	for id, k := range have {
		if k != 1 {
			t.Errorf("%s is recorded %d times", id, k)
		}
	}
	if want := (Place{1, n, 1}); len(have) != n || again.Walked() != want {
		t.Errorf("%d decisions, walked to %+v", len(have), again.Walked())
	}
	// What was walked over without finding anything is known, too, once anything is
	// recorded.
	again.SetWalked(Place{Epoch: 1, Number: 100})
	must(t, again.Append(s.ctx, record(0)))
	if got := s.open().Walked(); got != (Place{Epoch: 1, Number: 100}) {
		t.Errorf("%+v", got)
	}
}

// A record that whoever took the decision stored after it was searched for, and
// before it was recovered, is the only one.
func TestRecoveredTooLate(t *testing.T) {
	s := newStore(t)
	author := s.open()
	must(t, author.Append(s.ctx, decision(1)))
	asked := decision(2)
	asked.Duplicate = true // of one that nobody recorded
	must(t, author.Append(s.ctx, asked))
	l := s.open()
	ids := map[string]struct{}{decision(1).Decision: {}, decision(2).Decision: {}, decision(3).Decision: {}}
	missing, kept, err := l.Unrecorded(s.ctx, ids, time.Now())
	must(t, err)
	if _, ok := missing[decision(1).Decision]; ok || len(missing) != 2 || !kept.IsZero() {
		t.Errorf("%v missing; kept since %s", missing, kept)
	}
	must(t, author.Append(s.ctx, decision(3)))
	must(t, l.Recover(s.ctx, []Recovered{recovered(2), recovered(3)}))
	if have := s.records(l); have[decision(1).Decision] != 1 || have[decision(2).Decision] != 1 || have[decision(3).Decision] != 1 {
		t.Errorf("%v", have)
	}
	if missing, _, err := l.Unrecorded(s.ctx, ids, time.Now()); err != nil || len(missing) != 0 {
		t.Errorf("%v, %v", missing, err)
	}
	// One of an author who was not heard of for too long comes behind it, and says
	// who asked.
	must(t, l.Recover(s.ctx, []Recovered{recovered(5)}))
	must(t, author.Append(s.ctx, decision(5)))
	p, err := l.Records(s.ctx, authority.AuditQuery{Limit: 1}, nil)
	must(t, err)
	if e := p.Records[0]; s.records(l)[decision(5).Decision] != 1 || !e.Duplicate || e.Recovered || e.Principal.Name == "" || e.Decision != decision(5).Decision {
		t.Errorf("%+v", e)
	}
	// Who does not get an answer is told so, and the record goes on waiting.
	must(t, l.Close())
	ctx, cancel := context.WithCancel(s.ctx)
	cancel()
	if err := l.Recover(ctx, []Recovered{recovered(4)}); !errors.Is(err, ErrClosed) {
		t.Error(err)
	}
}

// Of two records of one decision in one batch, one counts: the first; that of who
// took it says who asked all the same.
func TestRecoveredInTheBatchOfItsAuthor(t *testing.T) {
	l := newStore(t).open()
	made := func(r authority.AuditRecord, at Place) *item {
		body, err := encode(r)
		must(t, err)
		return &item{body: body, decision: decisionOf(&r), record: r, recovers: at}
	}
	again := recovered(3)
	again.Record.Recovered = true
	size := func(items ...*item) uint64 {
		_, st, err := l.build(items)
		must(t, err)
		return st.Number - st.First + 1
	}
	own := made(decision(3), Place{})
	if n := size(own, made(again.Record, again.At)); n != 1 || own.record.Duplicate {
		t.Errorf("behind it: %d records, %+v", n, own.record)
	}
	own = made(decision(3), Place{})
	if n := size(made(again.Record, again.At), own); n != 2 || !own.record.Duplicate {
		t.Errorf("before it: %d records, %+v", n, own.record)
	}
}
