package registry

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/interlock-fabric/interlock/pkg/natsfeed"
	"github.com/interlock-fabric/interlock/pkg/session"
)

func TestTheSameIsNoErrorAndAnotherIsAConflict(t *testing.T) {
	w := newWorld(t, true)
	r := w.open(Options{})
	w.register(r, ses(1), ses(2))
	if n, err := r.RegisterSessions(w.ctx, []Session{ses(2), ses(3)}); err != nil || len(n) != 1 || n[ses(2).Tenant] != 1 {
		t.Errorf("%v new, %v", n, err)
	}
	other := ses(1)
	other.User = "mallory"
	if _, err := r.RegisterSessions(w.ctx, []Session{ses(4), other}); !is(err, ErrConflict) || !strings.Contains(err.Error(), "session 2") {
		t.Errorf("another content: %v", err)
	}
	if _, err := r.Session("acme", ses(4).Ref); !is(err, ErrUnknown) {
		t.Errorf("half of a refused request is registered: %v", err)
	}
	got, err := r.Session("acme", ses(1).Ref)
	if want := ses(1); err != nil || !got.equal(&want) {
		t.Errorf("%+v, %v", got, err)
	}
	// The same id of another issuer, or tenant, is another session.
	elsewhere, foreign := ses(1), ses(1)
	elsewhere.Tenant, foreign.Issuer = "other", "https://other.example"
	w.register(r, elsewhere, foreign)

	a, changed, err := r.RegisterAgent(w.ctx, bot(1), 0)
	if err != nil || !changed || a.State != Registered {
		t.Fatalf("%+v, %v", a, err)
	}
	if again, changed, err := r.RegisterAgent(w.ctx, bot(1), 0); err != nil || changed || again.Revision != a.Revision {
		t.Errorf("the same agent: %+v, %v, %v", again, changed, err)
	}
	next := bot(1)
	next.Digests = []string{"code:sha256:" + strings.Repeat("ab", 32)}
	if _, _, err := r.RegisterAgent(w.ctx, next, 0); !is(err, ErrConflict) {
		t.Errorf("another content: %v", err)
	}
	if _, _, err := r.RegisterAgent(w.ctx, next, a.Revision-1); !is(err, ErrConflict) {
		t.Errorf("in place of another revision: %v", err)
	}
	b, changed, err := r.RegisterAgent(w.ctx, next, a.Revision)
	if err != nil || !changed || b.Revision <= a.Revision || !slices.Equal(b.Digests, next.Digests) {
		t.Errorf("in place of its revision: %+v, %v", b, err)
	}
}

// TestATombstoneBlocksTheID: and a suspended agent gets no sessions.
func TestATombstoneBlocksTheID(t *testing.T) {
	w := newWorld(t, true)
	r := w.open(Options{})
	_, _, err := r.RegisterAgent(w.ctx, bot(7), 0)
	must(t, err)
	to := func(s State) error { _, err := r.SetState(w.ctx, "acme", bot(7).Ref, s, nil); return err }
	must(t, to(Active))
	w.register(r, ses(7))
	must(t, to(Suspended))
	if _, err := r.RegisterSessions(w.ctx, []Session{ses(107)}); !is(err, ErrNotActive) {
		t.Errorf("a session of a suspended agent: %v", err)
	}
	must(t, to(Suspended))
	must(t, to(Active))
	w.register(r, ses(107))
	must(t, to(Decommissioned))
	must(t, to(Decommissioned))
	for what, err := range map[string]error{"activated": to(Active), "suspended": to(Suspended)} {
		if !is(err, ErrTombstone) {
			t.Errorf("%s after its end: %v", what, err)
		}
	}
	if _, _, err := r.RegisterAgent(w.ctx, bot(7), 0); !is(err, ErrTombstone) {
		t.Errorf("the id is used again: %v", err)
	}
	// In another spelling it is the same id.
	if _, _, err := r.RegisterAgent(w.ctx, Agent{Tenant: "acme", Ref: Ref{ID: "SPIFFE://CORP/agent/7"}}, 0); !is(err, ErrTombstone) {
		t.Errorf("the id in another spelling: %v", err)
	}
	if err := func() error { _, err := r.SetState(w.ctx, "acme", bot(8).Ref, Active, nil); return err }(); !is(err, ErrUnknown) {
		t.Errorf("an agent that is not registered: %v", err)
	}
	if _, err := r.RegisterSessions(w.ctx, []Session{ses(207)}); !is(err, ErrNotActive) {
		t.Errorf("a session of a decommissioned agent: %v", err)
	}
}

func TestAnUnregisteredDigestIsRefused(t *testing.T) {
	w := newWorld(t, true)
	r := w.open(Options{})
	code, model := "code:sha256:"+strings.Repeat("0a", 32), "model:sha256:"+strings.Repeat("0b", 32)
	a := bot(1)
	a.Digests = []string{code}
	_, _, err := r.RegisterAgent(w.ctx, a, 0)
	must(t, err)
	s := ses(1)
	s.Digests = []string{"code:sha256:" + strings.Repeat("0c", 32)}
	if _, err := r.RegisterSessions(w.ctx, []Session{s}); !is(err, ErrDigest) {
		t.Errorf("altered code: %v", err)
	}
	s.Digests = []string{code, model} // of models none is registered
	w.register(r, s)
}

func TestLimits(t *testing.T) {
	now := time.Now()
	long := strings.Repeat("x", session.MaxValueLen+1)
	jwt := "eyJhbGciOiJFUzI1NiJ9.eyJzdWIiOiJhIn0.c2ln"
	refs := make([]Ref, MaxChain+1)
	caps := make([]string, MaxCapabilities+1)
	for i := range refs {
		refs[i].ID = fmt.Sprint("spiffe://a/", i)
	}
	for i := range caps {
		caps[i] = fmt.Sprint("c", i)
	}
	for name, change := range map[string]func(*Session){
		"no id":                func(s *Session) { s.ID = "" },
		"no issuer":            func(s *Session) { s.Issuer = "" },
		"no tenant":            func(s *Session) { s.Tenant = "" },
		"long id":              func(s *Session) { s.ID = long },
		"control character":    func(s *Session) { s.User = "a\nb" },
		"long user":            func(s *Session) { s.User = long },
		"no expiry":            func(s *Session) { s.Expires = 0 },
		"expired":              func(s *Session) { s.Expires = in(-time.Second) },
		"too long":             func(s *Session) { s.Expires = in(MaxLifetime + time.Hour) },
		"issued ahead":         func(s *Session) { s.Issued = in(10 * time.Minute) },
		"long chain":           func(s *Session) { s.Chain = refs },
		"empty link":           func(s *Session) { s.Chain = []Ref{{}} },
		"chain without agent":  func(s *Session) { s.Agent, s.Chain = Ref{}, refs[:1] },
		"its own parent":       func(s *Session) { s.Parent = Ref{ID: s.ID} },
		"key of no form":       func(s *Session) { s.Keys = []string{"secret"} },
		"key twice":            func(s *Session) { k := "apikey:" + strings.Repeat("ab", 32); s.Keys = []string{k, k} },
		"token as id":          func(s *Session) { s.ID = jwt },
		"token as credential":  func(s *Session) { s.Credentials = []string{jwt} },
		"token as user":        func(s *Session) { s.User = jwt },
		"digest of no form":    func(s *Session) { s.Digests = []string{"sha256:ab"} },
		"too many credentials": func(s *Session) { s.Credentials = caps },
	} {
		s := ses(1)
		change(&s)
		if err := s.canonical(now); !is(err, session.ErrInvalid) || strings.Contains(fmt.Sprint(err), jwt) {
			t.Errorf("%s: %v", name, err)
		}
	}
	s := ses(1)
	s.Chain, s.Issued, s.Parent = refs[:MaxChain], in(-time.Minute), Ref{ID: "p"}
	must(t, s.canonical(now))
	if s.Parent.Issuer != issuer {
		t.Errorf("a parent of %q", s.Parent.Issuer)
	}
	for name, change := range map[string]func(*Agent){
		"no id":            func(a *Agent) { a.ID = "" },
		"name, no issuer":  func(a *Agent) { a.ID = "billing-bot" },
		"bad spiffe id":    func(a *Agent) { a.ID = "spiffe://corp/" },
		"long purpose":     func(a *Agent) { a.Purpose = long },
		"long environment": func(a *Agent) { a.Environment = long[:65] },
		"purpose in bytes": func(a *Agent) { a.Purpose = "\xff" },
		"capabilities":     func(a *Agent) { a.Capabilities = caps },
		"capability twice": func(a *Agent) { a.Capabilities = []string{"a", "a"} },
		"token as id":      func(a *Agent) { a.ID, a.Issuer = jwt, issuer },
	} {
		a := bot(1)
		change(&a)
		if err := a.canonical(); !is(err, session.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// What does not fit a batch is refused whole, before anything is stored.
	w := newWorld(t, true)
	r := w.open(Options{})
	var big []Session
	for i := range MaxUnit {
		s := ses(i)
		s.User = strings.Repeat("u", session.MaxValueLen)
		big = append(big, s)
	}
	if _, err := r.RegisterSessions(w.ctx, big); !is(err, ErrTooLarge) {
		t.Errorf("too large: %v", err)
	}
	if _, err := r.RegisterSessions(w.ctx, append(big, big...)); !is(err, session.ErrInvalid) {
		t.Errorf("too many: %v", err)
	}
	if _, err := r.RegisterSessions(w.ctx, []Session{ses(1), ses(1)}); !is(err, session.ErrInvalid) {
		t.Errorf("twice: %v", err)
	}
	if n := r.Status().Number; n != 0 {
		t.Errorf("%d batches", n)
	}
}

// TestTwoAuthoritiesDoNotDiverge: both write at once, also the same and contrary
// things, and come to the same index; of two contents one won everywhere.
func TestTwoAuthoritiesDoNotDiverge(t *testing.T) {
	w := newWorld(t, true)
	rs := []*Registry{w.open(Options{}), w.open(Options{}), w.open(Options{})}
	const n = 60
	var wg sync.WaitGroup
	var won [n]atomic.Int32
	for k, r := range rs {
		for i := range n {
			wg.Go(func() {
				w.register(r, ses(1000*(k+1)+i))
				shared := ses(i)
				shared.User = fmt.Sprint("by-", k)
				switch _, err := r.RegisterSessions(w.ctx, []Session{shared}); {
				case err == nil:
					won[i].Add(1)
				case !is(err, ErrConflict):
					t.Error(err)
				}
			})
		}
	}
	wg.Wait()
	for i := range won {
		if won[i].Load() != 1 {
			t.Errorf("session %d was registered by %d authorities, each with another content", i, won[i].Load())
		}
	}
	last := uint64(0)
	for _, r := range rs {
		last = max(last, r.Status().Number)
	}
	for _, r := range rs {
		w.until("the same log", func() bool { return r.Status().Number == last })
	}
	want := all(t, rs[0], SessionQuery{Tenant: "acme", Limit: 17})
	if len(want) != 4*n {
		t.Errorf("%d sessions", len(want))
	}
	for _, r := range rs[1:] {
		same(t, rs[0], r)
	}
	same(t, rs[0], w.open(Options{})) // and who starts now
	lost := uint64(0)
	for _, r := range rs {
		st := r.Status()
		lost += st.Lost
		if st.Refused > 0 || st.Reloads > 0 {
			t.Errorf("%+v", st)
		}
	}
	t.Logf("%d appends lost to another authority", lost)
}

// same demands that two registries answer alike.
func same(t testing.TB, a, b *Registry) {
	t.Helper()
	a.mu.RLock()
	defer a.mu.RUnlock()
	b.mu.RLock()
	defer b.mu.RUnlock()
	if a.at != b.at || a.x.next != b.x.next || a.x.sessions != b.x.sessions || a.x.agents != b.x.agents {
		t.Errorf("at %+v with %d sessions, and at %+v with %d", a.at, a.x.sessions, b.at, b.x.sessions)
	}
	for name, ta := range a.x.tenants {
		tb := b.x.tenants[name]
		if tb == nil {
			t.Errorf("tenant %s is missing", name)
			continue
		}
		var sa, sb []string
		for _, l := range []struct {
			t   *tenant
			out *[]string
		}{{ta, &sa}, {tb, &sb}} {
			for _, s := range l.t.all.items {
				if !s.gone {
					*l.out = append(*l.out, fmt.Sprint(s.number, s.session(l.t)))
				}
			}
			for _, x := range l.t.listed {
				*l.out = append(*l.out, fmt.Sprint(x.number, x.AgentRecord))
			}
		}
		if !slices.Equal(sa, sb) {
			t.Errorf("tenant %s differs: %d and %d records", name, len(sa), len(sb))
		}
	}
}

// TestStatusAnswersWhenTheStoreDoesNot: what waits for the store waits alone, and
// is told in time; when the store is back, it goes on.
func TestStatusAnswersWhenTheStoreDoesNot(t *testing.T) {
	w := newWorld(t, true)
	var down atomic.Bool
	hung := make(chan struct{}, 64)
	release := make(chan struct{})
	r := w.open(Options{Hooks: Hooks{Ask: func() error {
		if down.Load() {
			select {
			case hung <- struct{}{}:
			default:
			}
			<-release
			return nats.ErrTimeout
		}
		return nil
	}}})
	w.register(r, ses(1))
	down.Store(true)
	ctx, cancel := context.WithTimeout(w.ctx, 300*time.Millisecond)
	defer cancel()
	result := make(chan error, 1)
	go func() { _, err := r.RegisterSessions(ctx, []Session{ses(2)}); result <- err }()
	<-hung // the loop waits for the store
	answered := make(chan struct{})
	go func() {
		defer close(answered)
		r.Status()
		if _, err := r.Session("acme", ses(1).Ref); err != nil {
			t.Error(err)
		}
		if list := all(t, r, SessionQuery{Tenant: "acme", Limit: 10}); len(list) != 1 {
			t.Errorf("%d sessions", len(list))
		}
		if _, err := r.Touched([]session.Target{{Tenant: "acme", Terms: []session.Term{{Kind: session.KindTenant, Value: "acme"}}}}, nil); err != nil {
			t.Error(err)
		}
	}()
	select {
	case <-answered:
	case <-time.After(5 * time.Second):
		t.Fatal("nobody answers while the store does not")
	}
	if err := <-result; !is(err, ErrUnavailable) {
		t.Errorf("without a store: %v", err)
	}
	down.Store(false)
	close(release)
	w.until("registering again", func() bool {
		_, err := r.RegisterSessions(w.ctx, []Session{ses(2)})
		return err == nil
	})
	if err := r.Status().Err; err != nil {
		t.Error(err)
	}
}

// TestALostAcknowledgementIsNoSecondBatch: a batch that is stored and not
// acknowledged is found in the log.
func TestALostAcknowledgementIsNoSecondBatch(t *testing.T) {
	w := newWorld(t, true)
	var r *Registry
	var once sync.Once
	r = w.open(Options{Hooks: Hooks{BeforeAppend: func(uint64) {
		// Somebody stores the very same message first.
		once.Do(func() {
			if _, err := w.js.Publish(w.ctx, natsfeed.RegistrySubject, r.flight.frame); err != nil {
				t.Error(err)
			}
		})
	}}})
	w.register(r, ses(1))
	w.register(r, ses(2))
	if st := r.Status(); st.Number != 2 || st.Sessions != 2 || st.Lost != 1 {
		t.Errorf("%+v", st)
	}
}

// TestWhatNoAuthorityWroteIsPassedOver: garbage, replays and what was altered
// change nothing, and are counted; the log goes on.
func TestWhatNoAuthorityWroteIsPassedOver(t *testing.T) {
	w := newWorld(t, true)
	r := w.open(Options{})
	w.register(r, ses(1))
	s, err := w.js.Stream(w.ctx, natsfeed.RegistryStream)
	must(t, err)
	m, err := s.GetMsg(w.ctx, 1)
	must(t, err)
	stranger := newSealing(t)
	forged, err := (&sealer{keys: stranger}).seal(header{kindBatch, 2, hashOf(m.Data)}, []byte(`{"ops":[]}`))
	must(t, err)
	fork, err := (&sealer{keys: w.keys}).seal(header{kindBatch, 2, [32]byte{1}}, []byte(`{"ops":[]}`))
	must(t, err)
	bad := [][]byte{[]byte("garbage"), nil, forged, fork}
	for _, at := range []int{0, 3, 4, 6, 20, 30, 50, headerLen + 3, len(m.Data) - 1} {
		flipped := slices.Clone(m.Data)
		flipped[at] ^= 1
		bad = append(bad, flipped)
	}
	for _, b := range append(bad, m.Data) {
		_, err := w.js.Publish(w.ctx, natsfeed.RegistrySubject, b)
		must(t, err)
	}
	w.register(r, ses(2))
	if st := r.Status(); st.Number != 2 || st.Refused != uint64(len(bad)) || st.Sessions != 2 {
		t.Errorf("%+v, %d were bad", st, len(bad))
	}
	same(t, r, w.open(Options{}))
}

// TestAHoleStopsTheRegistry: a log of which a batch is missing is not gone on
// with.
func TestAHoleStopsTheRegistry(t *testing.T) {
	w := newWorld(t, true)
	r := w.open(Options{})
	w.register(r, ses(1))
	s, err := w.js.Stream(w.ctx, natsfeed.RegistryStream)
	must(t, err)
	m, err := s.GetMsg(w.ctx, 1)
	must(t, err)
	// Batch 3, where 2 should be: as if that had been lost.
	ahead, err := (&sealer{keys: w.keys}).seal(header{kindBatch, 3, hashOf(m.Data)}, []byte(`{"ops":[]}`))
	must(t, err)
	_, err = w.js.Publish(w.ctx, natsfeed.RegistrySubject, ahead)
	must(t, err)
	w.until("stopped", func() bool { return is(r.Status().Err, ErrHole) })
	ctx, cancel := context.WithTimeout(w.ctx, 200*time.Millisecond)
	defer cancel()
	if _, err := r.RegisterSessions(ctx, []Session{ses(2)}); !is(err, ErrUnavailable) || !is(err, ErrHole) {
		t.Errorf("registered behind a hole: %v", err)
	}
	if _, _, err := r.Sessions(SessionQuery{Tenant: "acme", Limit: 1}); !is(err, ErrUnavailable) {
		t.Errorf("listed: %v", err)
	}
}

// TestAKeyThatIsAwayStopsIt: what another authority's key sealed is not passed
// over.
func TestAKeyThatIsAwayStopsIt(t *testing.T) {
	w := newWorld(t, true)
	r := w.open(Options{})
	w.register(r, ses(1))
	blind := &sealing{ks: w.keys.ks, private: w.keys.private, away: true}
	b := w.open(Options{Keys: blind})
	w.until("stopped", func() bool { return is(b.Status().Err, ErrKey) })
	if st := b.Status(); st.Number != 0 || st.Refused != 0 {
		t.Errorf("%+v", st)
	}
}

// TestNothingRestsInClear: neither the log nor a snapshot shows what it is of.
func TestNothingRestsInClear(t *testing.T) {
	w := newWorld(t, true)
	r := w.open(Options{SnapshotBatches: 1})
	s := ses(1)
	s.User = "alice-of-accounting"
	w.register(r, s)
	w.until("a snapshot", func() bool { return r.Status().Snapshot > 0 })
	for _, name := range []string{natsfeed.RegistryStream, natsfeed.SnapshotStream} {
		st, err := w.js.Stream(w.ctx, name)
		must(t, err)
		n := 0
		for seq := st.CachedInfo().State.FirstSeq; seq <= st.CachedInfo().State.LastSeq; seq++ {
			m, err := st.GetMsg(w.ctx, seq)
			must(t, err)
			n++
			for _, secret := range []string{"alice", s.ID, "spiffe", "acme", "issuer.example"} {
				if strings.Contains(string(m.Data), secret) || strings.Contains(m.Subject, secret) {
					t.Errorf("%s shows %q", name, secret)
				}
			}
		}
		if n == 0 {
			t.Errorf("%s is empty", name)
		}
	}
}

func TestClose(t *testing.T) {
	w := newWorld(t, true)
	block := make(chan struct{})
	held := make(chan struct{})
	var once sync.Once
	r := w.open(Options{Hooks: Hooks{BeforeAppend: func(uint64) { once.Do(func() { close(held); <-block }) }}})
	errs := make(chan error, 2)
	go func() { _, err := r.RegisterSessions(w.ctx, []Session{ses(1)}); errs <- err }()
	<-held
	go func() { _, err := r.RegisterSessions(w.ctx, []Session{ses(2)}); errs <- err }()
	w.until("both wait", func() bool { return r.Status().Pending == 1 })
	r.cancel()
	close(block)
	must(t, r.Close())
	for range 2 {
		if err := <-errs; err != nil && !errors.Is(err, ErrClosed) {
			t.Error(err)
		}
	}
	must(t, r.Close())
	if _, err := r.RegisterSessions(w.ctx, []Session{ses(3)}); !is(err, ErrClosed) {
		t.Error(err)
	}
}

// TestOneBatchHasOneRecordOfAnID: contrary registrations that wait for the same
// batch are judged one after the other.
func TestOneBatchHasOneRecordOfAnID(t *testing.T) {
	w := newWorld(t, true)
	held, release := make(chan struct{}), make(chan struct{})
	var once sync.Once
	r := w.open(Options{Hooks: Hooks{BeforeAppend: func(uint64) { once.Do(func() { close(held); <-release }) }}})
	first := make(chan error, 1)
	go func() { _, err := r.RegisterSessions(w.ctx, []Session{ses(0)}); first <- err }()
	<-held
	const n = 5
	errs := make(chan error, 2*n)
	for i := range n {
		go func() {
			s := ses(1)
			s.User = fmt.Sprint("by-", i)
			_, err := r.RegisterSessions(w.ctx, []Session{s})
			errs <- err
		}()
		go func() {
			a := bot(1)
			a.Purpose = fmt.Sprint("by-", i)
			_, _, err := r.RegisterAgent(w.ctx, a, 0)
			errs <- err
		}()
	}
	w.until("all wait", func() bool { return r.Status().Pending == 2*n })
	close(release)
	must(t, <-first)
	won := 0
	for range 2 * n {
		switch err := <-errs; {
		case err == nil:
			won++
		case !is(err, ErrConflict):
			t.Error(err)
		}
	}
	if st := r.Status(); won != 2 || st.Records != 3 {
		t.Errorf("%d won, %d records", won, st.Records)
	}
}
