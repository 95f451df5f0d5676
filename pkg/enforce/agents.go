package enforce

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/interlock-fabric/interlock/pkg/session"
)

// AgentFeed is a Feed that also has the authority's table of registered agents,
// which Options.Agents needs.
type AgentFeed interface {
	Feed
	// AgentIndexes returns the newest stored indexes, oldest first, as signed
	// frames.
	AgentIndexes(ctx context.Context) ([][]byte, error)
	// AgentParts calls fn with what is stored of the given parts, and perhaps of
	// others, in no order. An error of fn stops it and is returned.
	AgentParts(ctx context.Context, parts []byte, fn func(b []byte) error) error
}

// DigestRule says how what a caller shows of its code, model and image is held
// against what its agent is registered with. Of a sort of digest of which the agent
// has none registered, nothing is asked.
type DigestRule uint8

const (
	// DigestsRequired demands one of each sort that the agent is registered with,
	// and permits no other. It is the default.
	DigestsRequired DigestRule = iota
	// DigestsPresented permits no other, and lets callers pass that show none.
	DigestsPresented
	// DigestsIgnored demands nothing.
	DigestsIgnored
)

// AgentPolicy says what the authority's registry of agents decides. Its zero value
// admits registered agents alone, with the digests that they are registered with.
//
// A caller's agents are those of its delegation chain, the current one first; of a
// caller without one it is the agent whose id is the caller's client. The digests
// are the current one's.
type AgentPolicy struct {
	// AllowUnregistered admits callers that have no agent, or one that is not
	// registered. Otherwise each agent of the chain must be, or the denial is
	// session.ErrUnregistered.
	AllowUnregistered bool
	// Digests is how digests are judged; a denial is session.ErrDigest.
	Digests DigestRule
	// MaxAge is how old the table may be before callers are denied, with
	// session.ErrStale; zero is Options.MaxStale, the least is MinMaxStale. A call
	// that demands fresher state demands it of this, too.
	MaxAge time.Duration
}

// AgentsStatus is what an operator sees of the table of registered agents.
type AgentsStatus struct {
	Version uint64        `json:"version"` // 0 before there is one
	Agents  int           `json:"agents"`
	Bytes   int           `json:"bytes"` // that it takes in memory
	Age     time.Duration `json:"age_ns"`
	MaxAge  time.Duration `json:"max_age_ns"`
	Fresh   bool          `json:"fresh"`
	Why     string        `json:"why,omitempty"` // why not fresh
}

// agentTable is one version of the table. It never changes.
type agentTable struct {
	ref    session.AgentsRef
	index  *session.AgentIndex
	frame  []byte // of the index
	signer session.KeyID
	parts  [session.AgentParts]*session.AgentPart
	bytes  int
}

func (t *agentTable) find(tenant session.TenantID, agent *session.Digest) (session.AgentDigests, bool) {
	return t.parts[agent[0]].Find(tenant, agent)
}

// agentsAge is how old the table may be, as age is.
func (v *view) agentsAge(now reading) time.Duration {
	return now.mono - v.agentsOrigin + time.Duration(max(0, now.wall-int64(now.mono)-v.skew))
}

// agentsStale says why the table is too old for the call; empty when it is not.
func (v *view) agentsStale(call *session.Call, now reading, limit time.Duration) string {
	if call.MaxStale > 0 {
		limit = min(limit, call.MaxStale)
	}
	switch {
	case v.agents != nil && v.agentsAge(now) <= limit:
		return ""
	case v.agentsHint != "":
		return v.agentsHint
	case v.agents != nil:
		return "the table of registered agents is too old"
	}
	return "no table of registered agents yet"
}

// judgeAgents holds a caller against the registry: nil when it passes. exposed is
// set when that is by a table which is too old.
func (e *Enforcer) judgeAgents(v *view, p *session.Prepared, call *session.Call, now reading) (denied *session.DeniedError, exposed bool) {
	pol, agents := e.opts.Agents, p.Agents()
	if len(agents) == 0 && pol.AllowUnregistered {
		return nil, false // nothing is asked of it
	}
	if why := v.agentsStale(call, now, pol.MaxAge); why != "" {
		if e.opts.Mode != session.ModeBestEffort || call.Strict || v.agents == nil {
			d := &session.DeniedError{Err: session.ErrStale, Detail: why}
			if v.agents != nil {
				d.Age = v.agentsAge(now)
			}
			return d, false
		}
		exposed = true
	}
	if len(agents) == 0 {
		return &session.DeniedError{Err: session.ErrUnregistered}, exposed
	}
	for i := range agents {
		digests, known := v.agents.find(p.Tenant(), &agents[i])
		if !known && !pol.AllowUnregistered {
			return &session.DeniedError{Err: session.ErrUnregistered}, exposed
		}
		if i > 0 || pol.Digests == DigestsIgnored {
			continue
		}
		switch altered, missing := digests.Match(p.Presented()); {
		case altered:
			return &session.DeniedError{Err: session.ErrDigest}, exposed
		case missing && pol.Digests == DigestsRequired:
			return &session.DeniedError{Err: session.ErrDigest, Detail: notShown}, exposed
		}
	}
	return nil, exposed
}

// notShown is the detail of a denial of a caller who may run what it should.
const notShown = "none was presented of a sort that it has"

// agentsStatus is nil where nothing is held against the registry.
func (e *Enforcer) agentsStatus(v *view, now reading) *AgentsStatus {
	pol := e.opts.Agents
	if pol == nil {
		return nil
	}
	s := &AgentsStatus{MaxAge: pol.MaxAge, Why: v.agentsStale(&session.Call{}, now, pol.MaxAge)}
	s.Fresh = s.Why == ""
	if v.agentsCause != "" && !s.Fresh {
		s.Why += ": " + v.agentsCause
	}
	if t := v.agents; t != nil {
		s.Version, s.Agents, s.Bytes, s.Age = t.ref.Version, int(t.index.Agents), t.bytes, v.agentsAge(now)
	}
	return s
}

const (
	// agentsSilence bounds the reading of a table.
	agentsSilence = 15 * time.Second
	// agentsMin and agentsMax bound the back-off of reads that failed.
	agentsMin, agentsMax = 100 * time.Millisecond, 5 * time.Second
	// agentsSave is how often the table is kept at most.
	agentsSave = 10 * time.Second
)

var (
	errNoAgentFeed  = errors.New("this feed has no table of registered agents")
	errNoIndex      = errors.New("the index that the authority names is not in the store")
	errPartsMissing = errors.New("parts of the table are not in the store")
	errEnough       = errors.New("no more is needed")
)

// agentsKeeper keeps the table of registered agents: what a heartbeat names, and
// nothing else. It is the follower's, and touched by run alone.
type agentsKeeper struct {
	// table is in force, since then; warm is of an earlier run, and in force once a
	// heartbeat names it.
	table, warm *agentTable
	since       time.Duration
	// origin is the newest local moment at which table was surely what the
	// authority names.
	origin time.Duration
	// hint is why it may be getting old, in words fit for a caller; cause says
	// more, to operators.
	hint, cause string
	// want is what a heartbeat names and is not here, last at wantAt.
	want   session.AgentsRef
	wantAt time.Duration

	fetching bool
	fetchAt  time.Duration // not before
	// fetchOrigin is wantAt as it was when the running fetch began.
	fetchOrigin time.Duration
	fetchWait   time.Duration
	saved       session.AgentsRef
	saving      bool
	saveAt      time.Duration // not before
	failed      bool          // to save
}

// sayAgents says why the table may be getting old.
func (f *follower) sayAgents(hint string, err error) {
	cause := ""
	if err != nil {
		cause = err.Error()
	}
	if a := &f.agents; a.hint != hint || a.cause != cause {
		a.hint, a.cause = hint, cause
		if hint != "" {
			f.e.opts.Logger.Warn(hint, "cause", cause)
		}
	}
}

// named takes what a heartbeat says of the table of registered agents. origin is
// the local moment at which that was surely so.
func (f *follower) named(h *session.Heartbeat, origin time.Duration) {
	if f.e.opts.Agents == nil {
		return
	}
	a, ref := &f.agents, h.Agents
	if a.table == nil && a.warm != nil && a.warm.ref == ref {
		f.adoptAgents(a.warm, origin)
	}
	newest := a.table
	if newest == nil {
		newest = a.warm
	}
	switch {
	case ref.Version == 0:
		f.sayAgents("the authority names no table of registered agents", nil)
	case a.table != nil && a.table.ref == ref:
		a.origin = max(a.origin, origin)
		a.want = session.AgentsRef{}
		f.sayAgents("", nil)
	case newest != nil && h.Epoch == newest.index.Epoch && ref.Version <= newest.ref.Version:
		if a.table != nil && origin < a.since {
			f.e.count.replayed.Add(1) // of a writer that has been deposed
			return
		}
		f.e.count.rolledBack.Add(1)
		f.sayAgents("the authority names an older table of registered agents than was in force here", nil)
	default:
		if a.want != ref {
			a.want, a.wantAt = ref, origin
			a.fetchAt, a.fetchWait = f.now(), 0
		}
		a.wantAt = max(a.wantAt, origin)
	}
	f.publish()
}

// tendAgents starts what is due.
func (f *follower) tendAgents(ctx context.Context) {
	a, now := &f.agents, f.now()
	if a.want.Version > 0 && !a.fetching && now >= a.fetchAt {
		a.fetching, a.fetchOrigin = true, a.wantAt
		want, have, trust, wall := a.want, a.table, f.trust, f.wall()
		if have == nil {
			have = a.warm
		}
		f.job(ctx, agentsSilence, func(ctx context.Context) func() {
			t, err := fetchAgents(ctx, f.e.feed, trust, want, have, wall)
			return func() { f.fetchedAgents(want, t, err) }
		})
	}
	if t := a.table; f.e.opts.StateDir != "" && t != nil && t.ref != a.saved && !a.saving && now >= a.saveAt {
		a.saving, a.saveAt = true, now+agentsSave
		f.job(ctx, agentsSilence, func(context.Context) func() {
			err := saveAgents(f.e.opts, t)
			return func() { a.saving = false; f.savedAgents(t, err) }
		})
	}
}

func (f *follower) fetchedAgents(want session.AgentsRef, t *agentTable, err error) {
	a := &f.agents
	a.fetching = false
	superseded := want != a.want
	if superseded && (err != nil || a.want.Version <= want.Version) {
		return // another is named since, which is read at once
	}
	newest := a.table
	if newest == nil {
		newest = a.warm
	}
	if err == nil && newest != nil && (t.index.Epoch < newest.index.Epoch || t.index.Epoch == newest.index.Epoch && t.ref.Version < newest.ref.Version) {
		f.e.count.rolledBack.Add(1)
		err = fmt.Errorf("%w: it is older than what was in force here", session.ErrUntrusted)
	}
	if err == nil && f.trust.KeySet().Revoked(t.signer, math.MaxUint64) {
		err = session.ErrUntrusted
	}
	if superseded {
		// It was named when the fetch began, and is newer than what is in force:
		// where tables follow each other faster than they are read, none would
		// come into force otherwise.
		if err == nil {
			next, at := a.want, a.wantAt
			f.adoptAgents(t, a.fetchOrigin)
			a.want, a.wantAt = next, at
		}
		return
	}
	if err != nil {
		if errors.Is(err, session.ErrFrame) {
			f.e.count.refused.Add(1)
		}
		a.fetchWait = min(max(2*a.fetchWait, agentsMin), agentsMax)
		a.fetchAt = f.now() + jitter(a.fetchWait)
		f.sayAgents("the table of registered agents that the authority names cannot be read", err)
		f.publish()
		return
	}
	f.adoptAgents(t, a.wantAt)
}

// adoptAgents puts a table in force that a heartbeat has named, and ends the
// running work that it does not admit.
func (f *follower) adoptAgents(t *agentTable, origin time.Duration) {
	a := &f.agents
	if f.trust.KeySet().Revoked(t.signer, math.MaxUint64) {
		a.warm = nil
		return
	}
	a.table, a.warm, a.origin, a.since = t, nil, origin, f.now()
	a.want, a.fetchWait = session.AgentsRef{}, 0
	f.sayAgents("", nil)
	f.e.opts.Logger.Info("table of registered agents in force", "version", t.ref.Version, "agents", t.index.Agents)
	f.publish()
	f.jobs.Go(func() { f.e.cut(f.e.view.Load(), slices.Values(f.e.bound.snapshot())) })
}

// distrustAgents lets go of a table that a withdrawn key has signed.
func (f *follower) distrustAgents(ks *session.KeySet) {
	a := &f.agents
	if t := a.table; t != nil && ks.Revoked(t.signer, math.MaxUint64) {
		a.table, a.origin = nil, never
		f.sayAgents("a withdrawn key had signed the table of registered agents", nil)
	}
	if t := a.warm; t != nil && ks.Revoked(t.signer, math.MaxUint64) {
		a.warm = nil
	}
}

// proveWarmAgents lets go of the table of an earlier run if nobody whom the key set
// trusts signed its index: what has rotted in the file must not keep out what the
// authority names.
func (f *follower) proveWarmAgents() {
	a := &f.agents
	if a.warm == nil {
		return
	}
	frame, _, err := readAgentIndex(a.warm.frame)
	if err == nil {
		_, err = f.trust.Writer(&frame, 0, true, f.wall())
	}
	if err != nil {
		a.warm, a.saved = nil, session.AgentsRef{}
		f.damagedAgents(err)
	}
}

// damagedAgents says that what an earlier run has kept is of no use.
func (f *follower) damagedAgents(err error) {
	f.e.count.damaged.Add(1)
	f.e.opts.Logger.Error("the table of registered agents of the last run cannot be used: reading it from the bus", "error", err)
}

// readAgentIndex verifies an index, but for the key.
func readAgentIndex(b []byte) (session.Frame, *agentTable, error) {
	f, err := session.ParseFrame(b)
	if err != nil {
		return f, nil, err
	}
	if f.Type != session.TypeAgents {
		return f, nil, session.ErrMalformed
	}
	x, err := session.UnmarshalAgentIndex(f.Body)
	if err != nil {
		return f, nil, err
	}
	return f, &agentTable{ref: session.AgentsRef{Version: x.Version, Sum: f.Hash()}, index: x, frame: b, signer: f.Key}, nil
}

// put adds a part, if it is the one that the index has there.
func (t *agentTable) put(i int, p *session.AgentPart) bool {
	if p.Sum() != t.index.Parts[i] {
		return false
	}
	t.parts[i] = p
	return true
}

// whole reports what keeps the table from being what its index says.
func (t *agentTable) whole() error {
	n := 0
	for i, p := range t.parts {
		if p.Sum() != t.index.Parts[i] {
			return errPartsMissing
		}
		n += p.Len()
		t.bytes += len(p.Bytes()) + 4*p.Len()
	}
	if n != int(t.index.Agents) {
		return fmt.Errorf("%w: %d agents, the index says %d", session.ErrMalformed, n, t.index.Agents)
	}
	return nil
}

// fetchAgents reads the table that a heartbeat names, but for the parts that have
// has.
func fetchAgents(ctx context.Context, feed Feed, trust *session.Trust, want session.AgentsRef, have *agentTable, now session.Instant) (*agentTable, error) {
	from, ok := feed.(AgentFeed)
	if !ok {
		return nil, errNoAgentFeed
	}
	indexes, err := from.AgentIndexes(ctx)
	if err != nil {
		return nil, err
	}
	var t *agentTable
	for _, b := range indexes {
		f, x, err := readAgentIndex(b)
		if err != nil || x.ref != want {
			continue // another version, or nobody's
		}
		key, err := trust.Writer(&f, 0, true, now)
		if err != nil {
			return nil, err
		}
		if !key.May(session.GlobalKey()) {
			return nil, fmt.Errorf("%w: it may not speak for all tenants", session.ErrUntrusted)
		}
		t = x
	}
	if t == nil {
		return nil, errNoIndex
	}
	need := map[session.Hash]int{}
	var missing []byte
	for i, sum := range t.index.Parts {
		if sum == (session.Hash{}) || have != nil && t.put(i, have.parts[i]) {
			continue
		}
		need[sum] = i
		missing = append(missing, byte(i))
	}
	if len(missing) > 0 {
		err = from.AgentParts(ctx, missing, func(b []byte) error {
			i, ok := need[sha256.Sum256(b)]
			if !ok {
				return nil // another version
			}
			p, err := session.ParseAgentPart(b, byte(i))
			if err != nil {
				return err
			}
			t.put(i, p)
			if delete(need, p.Sum()); len(need) == 0 {
				return errEnough
			}
			return nil
		})
		if err != nil && !errors.Is(err, errEnough) {
			return nil, err
		}
	}
	return t, t.whole()
}

// agentsPath is in a directory that several enforcers may share.
func agentsPath(o Options) string { return filepath.Join(o.StateDir, o.Enrollment.Enforcer+".agents") }

// saveAgents keeps a table: its index and its parts, each with its length before
// it. What is in the file proves itself, once a heartbeat names it.
func saveAgents(o Options, t *agentTable) error {
	b := make([]byte, 0, 4+len(t.frame)+t.bytes+4*session.AgentParts)
	put := func(part []byte) { b = append(binary.BigEndian.AppendUint32(b, uint32(len(part))), part...) }
	put(t.frame)
	for _, p := range t.parts {
		if p.Len() > 0 {
			put(p.Bytes())
		}
	}
	return replaceFile(o.StateDir, agentsPath(o), b)
}

func (f *follower) savedAgents(t *agentTable, err error) {
	a := &f.agents
	if err == nil {
		a.saved = t.ref
	} else if !a.failed {
		f.e.opts.Logger.Error("cannot keep the table of registered agents: the next start reads it from the bus, and would not notice an older one", "error", err)
	}
	a.failed = err != nil
}

// saveLastAgents keeps the table when the enforcer closes.
func (f *follower) saveLastAgents() {
	if t := f.agents.table; f.e.opts.StateDir != "" && t != nil && t.ref != f.agents.saved {
		f.savedAgents(t, saveAgents(f.e.opts, t))
	}
}

// loadAgents reads what an earlier run has kept. It is no loss when it cannot be
// used: the bus has it.
func (f *follower) loadAgents() {
	o := f.e.opts
	if o.Agents == nil || o.StateDir == "" {
		return
	}
	t, err := openAgents(agentsPath(o))
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		f.damagedAgents(err)
	default:
		f.agents.warm, f.agents.saved = t, t.ref
	}
}

func openAgents(path string) (*agentTable, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	t, err := readAgents(bufio.NewReader(file))
	return t, errors.Join(err, file.Close())
}

func readAgents(in io.Reader) (*agentTable, error) {
	next := func() ([]byte, error) {
		var n uint32
		if err := binary.Read(in, binary.BigEndian, &n); err != nil {
			return nil, err
		}
		if n > session.MaxFrameLen {
			return nil, fmt.Errorf("%w: %d bytes", session.ErrMalformed, n)
		}
		b := make([]byte, n)
		_, err := io.ReadFull(in, b)
		return b, err
	}
	b, err := next()
	if err != nil {
		return nil, err
	}
	_, t, err := readAgentIndex(b)
	if err != nil {
		return nil, err
	}
	for i, sum := range t.index.Parts {
		if sum == (session.Hash{}) {
			continue
		}
		if b, err = next(); err != nil {
			return nil, err
		}
		p, err := session.ParseAgentPart(b, byte(i))
		if err != nil {
			return nil, err
		}
		t.put(i, p)
	}
	return t, t.whole()
}
