package registry

import (
	"cmp"
	"container/heap"
	"slices"
	"unsafe"

	"github.com/interlock-fabric/interlock/pkg/session"
)

// index is the registry in memory. A term is a value that sessions or agents
// name, kept once, and at the same time the list of those who name it. It is not
// safe for concurrent use.
type index struct {
	tenants  map[string]*tenant
	next     uint64 // number of the next record
	sessions int
	agents   int
	notes    map[noteKey]*Note
	changes  uint64 // of agents
	expiring expiring
	bytes    int // about what it takes in memory
}

type tenant struct {
	name     string
	sessions map[id]*sess
	all      list     // of sessions
	listed   []*agent // in the order of their numbers
	terms    map[termKey]*term
}

// id is that of a session; its issuer is interned.
type id struct {
	issuer *term
	value  string
}

type termKey struct {
	kind          session.Kind
	issuer, value string
}

type term struct {
	termKey
	list   list
	agents map[*agent]struct{}
	// agent is the registration of an agent's term.
	agent *agent
	// refs counts what would be lost with the term, beside the lists.
	refs int
}

// sess is a session. The pointers are nil where there is none.
type sess struct {
	number  uint64
	id      string
	issuer  *term
	user    *term
	agent   *term
	client  *term
	parent  *term
	others  []*term // chain, keys, credentials, digests
	chain   uint8   // how many of others are the chain
	issued  session.Instant
	expires session.Instant
	gone    bool
}

type agent struct {
	number uint64
	AgentRecord
	self  *term
	terms []*term // blueprint, owner, capabilities, digests
}

// list has sessions in the order of their numbers. Those that are gone stay until
// they are half of it.
type list struct {
	items []*sess
	gone  int
}

// add puts a session in its place: the end, but for what a snapshot has later
// ones than.
func (l *list) add(s *sess) {
	if n := len(l.items); n > 0 && l.items[n-1].number > s.number {
		l.items = slices.Insert(l.items, l.below(s.number), s)
		return
	}
	l.items = append(l.items, s)
}

func (l *list) drop() {
	if l.gone++; l.gone*2 > len(l.items) {
		l.items = slices.DeleteFunc(l.items, func(s *sess) bool { return s.gone })
		l.gone = 0
		if cap(l.items) > 4*len(l.items) {
			l.items = slices.Clip(slices.Clone(l.items))
		}
	}
}

func (l *list) size() int { return len(l.items) - l.gone }

// below returns how many items have a number below n.
func (l *list) below(n uint64) int {
	i, _ := slices.BinarySearchFunc(l.items, n, func(s *sess, n uint64) int { return cmp.Compare(s.number, n) })
	return i
}

// expiring is a heap by expiry. A session that was replaced stays in it until its
// time has come.
type expiring []*sess

func (h expiring) Len() int           { return len(h) }
func (h expiring) Less(i, j int) bool { return h[i].expires < h[j].expires }
func (h expiring) Swap(i, j int)      { h[i], h[j] = h[j], h[i] }
func (h *expiring) Push(x any)        { *h = append(*h, x.(*sess)) }
func (h *expiring) Pop() any {
	old := *h
	s := old[len(old)-1]
	old[len(old)-1] = nil
	*h = old[:len(old)-1]
	return s
}

func newIndex() *index {
	return &index{tenants: map[string]*tenant{}, notes: map[noteKey]*Note{}, next: 1}
}

// What the parts take, as allocated: struct, entry of its map at the usual load,
// places in lists. Measured against the heap by TestMemoryIsReported.
const (
	sessCost  = int(unsafe.Sizeof(sess{})) + 24 + 8 + 16
	termCost  = int(unsafe.Sizeof(term{})) + int(unsafe.Sizeof(termKey{})) + 24
	agentCost = int(unsafe.Sizeof(agent{})) + 48
	placeCost = 16
)

func (x *index) tenant(name string) *tenant {
	t := x.tenants[name]
	if t == nil {
		t = &tenant{name: name, sessions: map[id]*sess{}, terms: map[termKey]*term{}}
		x.tenants[name] = t
	}
	return t
}

// term interns; an empty value is nil.
func (x *index) term(t *tenant, kind session.Kind, issuer, value string) *term {
	if value == "" {
		return nil
	}
	k := termKey{kind, issuer, value}
	v := t.terms[k]
	if v == nil {
		if issuer != "" && kind != session.KindIssuer {
			// One copy of an issuer's name for all that it minted.
			i := x.term(t, session.KindIssuer, "", issuer)
			i.refs++
			k.issuer = i.value
		}
		v = &term{termKey: k}
		t.terms[k] = v
		x.bytes += termCost + len(value)
	}
	return v
}

// release lets go of a term that nothing needs any more.
func (x *index) release(t *tenant, v *term) {
	if v == nil || v.refs > 0 || v.list.size() > 0 || len(v.agents) > 0 || v.agent != nil || t.terms[v.termKey] != v {
		return
	}
	delete(t.terms, v.termKey)
	x.bytes -= termCost + len(v.value)
	if v.issuer != "" && v.kind != session.KindIssuer {
		i := t.terms[termKey{session.KindIssuer, "", v.issuer}]
		i.refs--
		x.release(t, i)
	}
}

// named lists every list that a session is in, but for its tenant's.
func (s *sess) named(fn func(*term)) {
	for _, v := range [...]*term{s.issuer, s.user, s.agent, s.client, s.parent} {
		if v != nil {
			fn(v)
		}
	}
	for i, v := range s.others {
		// An agent that is in a chain twice names the session once.
		if v != s.agent && !slices.Contains(s.others[:i], v) {
			fn(v)
		}
	}
}

func (s *sess) cost() int { return sessCost + len(s.id) + (len(s.others)+6)*(8+placeCost) }

func (x *index) find(tn string, r Ref) (*tenant, *sess) {
	t := x.tenants[tn]
	if t == nil {
		return nil, nil
	}
	return t, t.sessions[id{t.terms[termKey{session.KindIssuer, "", r.Issuer}], r.ID}]
}

func (x *index) findAgent(tn string, r Ref) *agent {
	t := x.tenants[tn]
	if t == nil {
		return nil
	}
	if v := t.terms[termKey{session.KindAgent, r.Issuer, r.ID}]; v != nil {
		return v.agent
	}
	return nil
}

// putSession enters a session, in place of the one that has its id. A record with
// a lower number than the one that is there is an older one.
func (x *index) putSession(number uint64, in *Session) {
	x.next = max(x.next, number+1)
	t, old := x.find(in.Tenant, in.Ref)
	if old != nil {
		if old.number >= number {
			return
		}
		x.drop(t, old)
	}
	t = x.tenant(in.Tenant)
	s := &sess{number: number, id: in.ID, issued: in.Issued, expires: in.Expires, chain: uint8(len(in.Chain))}
	s.issuer = x.term(t, session.KindIssuer, "", in.Issuer)
	s.user = x.term(t, session.KindUser, in.Issuer, in.User)
	s.agent = x.term(t, session.KindAgent, in.Agent.Issuer, in.Agent.ID)
	s.client = x.term(t, session.KindClient, in.Issuer, in.Client)
	s.parent = x.term(t, session.KindSession, in.Parent.Issuer, in.Parent.ID)
	if n := len(in.Chain) + len(in.Keys) + len(in.Credentials) + len(in.Digests); n > 0 {
		s.others = make([]*term, 0, n)
	}
	for _, r := range in.Chain {
		s.others = append(s.others, x.term(t, session.KindAgent, r.Issuer, r.ID))
	}
	for _, l := range []struct {
		kind   session.Kind
		values []string
	}{{session.KindKey, in.Keys}, {session.KindCredential, in.Credentials}, {session.KindDigest, in.Digests}} {
		for _, v := range l.values {
			s.others = append(s.others, x.term(t, l.kind, "", v))
		}
	}
	s.named(func(v *term) { v.list.add(s) })
	t.all.add(s)
	t.sessions[id{s.issuer, s.id}] = s
	heap.Push(&x.expiring, s)
	x.sessions++
	x.bytes += s.cost()
}

func (x *index) drop(t *tenant, s *sess) {
	delete(t.sessions, id{s.issuer, s.id})
	x.sessions--
	x.bytes -= s.cost()
	s.gone = true
	s.named(func(v *term) { v.list.drop() })
	t.all.drop()
	s.named(func(v *term) { x.release(t, v) })
	// It may stay in a list for a while: not with all that it names.
	*s = sess{number: s.number, expires: s.expires, gone: true}
}

// sweep lets go of the sessions whose grace has ended, at most limit of them, and
// reports whether there are more.
func (x *index) sweep(now session.Instant, limit int) (more bool) {
	for ; len(x.expiring) > 0 && x.expiring[0].expires.Add(Grace) <= now; limit-- {
		if limit == 0 {
			return true
		}
		s := heap.Pop(&x.expiring).(*sess)
		if s.gone {
			continue
		}
		for _, t := range x.tenants { // few, and a session does not say which
			if t.sessions[id{s.issuer, s.id}] == s {
				x.drop(t, s)
				break
			}
		}
	}
	return false
}

// putAgent enters an agent, or what has become of it. An agent keeps its place in
// the order.
func (x *index) putAgent(number uint64, in *AgentRecord) {
	x.next = max(x.next, number+1, in.Revision+1)
	t := x.tenant(in.Tenant)
	self := x.term(t, session.KindAgent, in.Issuer, in.ID)
	a := self.agent
	var stale []*term
	if a == nil {
		a = &agent{number: number, self: self}
		self.agent = a
		at, _ := slices.BinarySearchFunc(t.listed, number, func(a *agent, n uint64) int { return cmp.Compare(a.number, n) })
		t.listed = slices.Insert(t.listed, at, a)
		x.agents++
		x.bytes += agentCost
	} else {
		if a.Revision >= in.Revision {
			return
		}
		stale = a.terms
		x.bytes -= a.size()
		for _, v := range stale {
			delete(v.agents, a)
		}
	}
	x.changes++
	a.AgentRecord = *in
	a.ID, a.Issuer = self.value, self.issuer
	a.terms = nil
	add := func(kind session.Kind, value string) string {
		v := x.term(t, kind, "", value)
		if v == nil {
			return ""
		}
		if v.agents == nil {
			v.agents = map[*agent]struct{}{}
		}
		v.agents[a] = struct{}{}
		a.terms = append(a.terms, v)
		return v.value
	}
	a.Blueprint, a.Owner = add(session.KindBlueprint, in.Blueprint), add(session.KindOwner, in.Owner)
	a.Capabilities, a.Digests = slices.Clone(in.Capabilities), slices.Clone(in.Digests)
	for i, v := range a.Capabilities {
		a.Capabilities[i] = add(session.KindCapability, v)
	}
	for i, v := range a.Digests {
		a.Digests[i] = add(session.KindDigest, v)
	}
	x.bytes += a.size()
	for _, v := range stale {
		x.release(t, v)
	}
}

func (a *agent) size() int {
	return len(a.Purpose) + len(a.Environment) + len(a.terms)*(8+placeCost+16)
}

// session is what was registered.
func (s *sess) session(t *tenant) Session {
	ref := func(v *term) Ref {
		if v == nil {
			return Ref{}
		}
		return Ref{v.issuer, v.value}
	}
	text := func(v *term) string { return ref(v).ID }
	out := Session{
		Tenant: t.name, Ref: Ref{text(s.issuer), s.id}, Agent: ref(s.agent), User: text(s.user), Client: text(s.client),
		Parent: ref(s.parent), Issued: s.issued, Expires: s.expires,
	}
	for _, v := range s.others[:s.chain] {
		out.Chain = append(out.Chain, ref(v))
	}
	for _, v := range s.others[s.chain:] {
		switch v.kind {
		case session.KindKey:
			out.Keys = append(out.Keys, v.value)
		case session.KindCredential:
			out.Credentials = append(out.Credentials, v.value)
		default:
			out.Digests = append(out.Digests, v.value)
		}
	}
	return out
}

func (s *sess) live(now session.Instant) bool { return !s.gone && s.expires > now }
