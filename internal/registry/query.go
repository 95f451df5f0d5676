package registry

import (
	"cmp"
	"slices"

	"github.com/interlock-fabric/interlock/pkg/session"
)

const (
	// MaxPage bounds the records of one page.
	MaxPage = 1000
	// maxLooked bounds what one page looks at: one that is not full for that has
	// a next one all the same.
	maxLooked = 50_000
	// maxSorted is up to how many sessions are gathered and sorted, where no list
	// has them in order.
	maxSorted = 10_000
)

// SessionQuery says which sessions of a tenant are asked for. Terms are canonical
// (see session.Target) and all of them must match.
type SessionQuery struct {
	Tenant string
	Terms  []session.Term
	// Expired asks for those too that have expired and are still known.
	Expired bool
	// Before is the number below which the page begins, 0 for the first; Limit is
	// at most MaxPage.
	Before uint64
	Limit  int
}

// AgentQuery says which agents of a tenant are asked for; what is empty asks for
// all. Terms are of the kinds agent, blueprint, owner, capability and digest.
type AgentQuery struct {
	Tenant      string
	Terms       []session.Term
	Environment string
	State       State
	Before      uint64
	Limit       int
}

// want is a term that a session must match.
type want struct {
	kind  session.Kind
	v     *term
	under map[*sess]bool // session: it and what descends from it
}

// wants resolves terms; ok is false when nothing can match.
func (t *tenant) wants(terms []session.Term) (out []want, ok bool) {
	for _, m := range terms {
		w := want{kind: m.Kind}
		switch m.Kind {
		case session.KindGlobal, session.KindTenant:
			continue
		case session.KindSession:
			if w.under = t.descendants(Ref{m.Issuer, m.Value}); len(w.under) == 0 {
				return nil, false
			}
		default:
			if w.v = t.terms[termKey{m.Kind, m.Issuer, m.Value}]; w.v == nil {
				return nil, false
			}
		}
		out = append(out, w)
	}
	return out, true
}

// descendants returns a session and all that descend from it, whether it is
// registered itself or not.
func (t *tenant) descendants(r Ref) map[*sess]bool {
	out := map[*sess]bool{}
	if s := t.sessions[id{t.terms[termKey{session.KindIssuer, "", r.Issuer}], r.ID}]; s != nil {
		out[s] = true
	}
	level := []*term{t.terms[termKey{session.KindSession, r.Issuer, r.ID}]}
	for len(level) > 0 {
		var next []*term
		for _, v := range level {
			if v == nil {
				continue
			}
			for _, s := range v.list.items {
				if !s.gone && !out[s] { // parents may be registered in a circle
					out[s] = true
					next = append(next, t.terms[termKey{session.KindSession, s.issuer.value, s.id}])
				}
			}
		}
		level = next
	}
	// In a circle it is its own descendant.
	return out
}

func (w *want) match(s *sess) bool {
	switch w.kind {
	case session.KindIssuer:
		return s.issuer == w.v
	case session.KindUser:
		return s.user == w.v
	case session.KindClient:
		return s.client == w.v
	case session.KindSession:
		return w.under[s]
	case session.KindAgent:
		return s.agent == w.v || slices.Contains(s.others[:s.chain], w.v)
	case session.KindKey, session.KindCredential:
		return slices.Contains(s.others[s.chain:], w.v)
	case session.KindDigest:
		return s.of(w.v) || slices.Contains(s.others[s.chain:], w.v)
	}
	return s.of(w.v)
}

// of reports whether the session's agent is registered with v.
func (s *sess) of(v *term) bool {
	return s.agent != nil && s.agent.agent != nil && slices.Contains(s.agent.agent.terms, v)
}

// ordered returns the list that has every match, in order, if there is one.
func (w *want) ordered() *list {
	switch w.kind {
	case session.KindIssuer, session.KindUser, session.KindClient, session.KindAgent, session.KindKey, session.KindCredential:
		return &w.v.list
	}
	return nil
}

// size bounds how many match from above.
func (w *want) size() int {
	if w.under != nil {
		return len(w.under)
	}
	n := len(w.v.list.items)
	if w.ordered() == nil {
		for a := range w.v.agents {
			n += len(a.self.list.items)
		}
	}
	return n
}

// each calls fn once with each session that matches, in no order.
func (t *tenant) each(wants []want, fn func(*sess)) {
	if len(wants) == 0 {
		for _, s := range t.all.items {
			if !s.gone {
				fn(s)
			}
		}
		return
	}
	best := 0
	for i := range wants {
		if wants[i].size() < wants[best].size() {
			best = i
		}
	}
	w := &wants[best]
	visit := func(s *sess) {
		if s.gone {
			return
		}
		for i := range wants {
			if i != best && !wants[i].match(s) {
				return
			}
		}
		fn(s)
	}
	if w.under != nil {
		for s := range w.under {
			visit(s)
		}
		return
	}
	if w.ordered() != nil {
		for _, s := range w.v.list.items {
			visit(s)
		}
		return
	}
	for a := range w.v.agents {
		for _, s := range a.self.list.items {
			if s.agent == a.self { // and not further up the chain
				visit(s)
			}
		}
	}
	for _, s := range w.v.list.items { // digests that sessions presented
		if !s.gone && !s.of(w.v) {
			visit(s)
		}
	}
}

// page returns sessions, the newest first, and the number below which the next
// page begins, 0 if there is none.
func (x *index) page(q *SessionQuery, now session.Instant) (out []Session, next uint64) {
	t := x.tenants[q.Tenant]
	if t == nil {
		return nil, 0
	}
	wants, ok := t.wants(q.Terms)
	if !ok {
		return nil, 0
	}
	from, bound := &t.all, len(t.all.items)
	for i := range wants {
		if l := wants[i].ordered(); l != nil && len(l.items) <= bound {
			from, bound = l, len(l.items)
		}
	}
	items := from.items
	for i := range wants {
		if n := wants[i].size(); wants[i].ordered() == nil && n <= maxSorted && n < bound {
			var gathered []*sess
			t.each(wants, func(s *sess) { gathered = append(gathered, s) })
			slices.SortFunc(gathered, func(a, b *sess) int { return cmp.Compare(a.number, b.number) })
			items = gathered
			break
		}
	}
	before := q.Before
	if before == 0 {
		before = x.next
	}
	at := (&list{items: items}).below(before)
	for looked := 0; at > 0; looked++ {
		if len(out) == q.Limit || looked == maxLooked {
			return out, items[at].number
		}
		at--
		s := items[at]
		if s.gone || !q.Expired && !s.live(now) || slices.ContainsFunc(wants, func(w want) bool { return !w.match(s) }) {
			continue
		}
		out = append(out, s.session(t))
	}
	return out, 0
}

// pageAgents is page for agents.
func (x *index) pageAgents(q *AgentQuery) (out []AgentRecord, next uint64) {
	t := x.tenants[q.Tenant]
	if t == nil {
		return nil, 0
	}
	var wants []*term
	for _, m := range q.Terms {
		v := t.terms[termKey{m.Kind, m.Issuer, m.Value}]
		if v == nil {
			return nil, 0
		}
		wants = append(wants, v)
	}
	at := len(t.listed)
	if q.Before > 0 {
		at, _ = slices.BinarySearchFunc(t.listed, q.Before, func(a *agent, n uint64) int { return cmp.Compare(a.number, n) })
	}
	for at > 0 {
		if len(out) == q.Limit {
			return out, t.listed[at].number
		}
		at--
		a := t.listed[at]
		if q.Environment != "" && a.Environment != q.Environment || q.State != "" && a.State != q.State ||
			slices.ContainsFunc(wants, func(v *term) bool { return a.self != v && !slices.Contains(a.terms, v) }) {
			continue
		}
		out = append(out, a.AgentRecord)
	}
	return out, 0
}

// Counts are what a decision would touch in one tenant.
type Counts struct {
	// Agents are those that are named, registered, and not decommissioned, and
	// those that hold a session that is touched, registered or not.
	Agents int
	// Sessions are live.
	Sessions int
}

// Known reports whether sessions are known by values of the kind. A token, a role,
// a tool and an audience are not known beforehand.
func Known(k session.Kind) bool {
	switch k {
	case session.KindToken, session.KindRole, session.KindTool, session.KindAudience:
		return false
	}
	return true
}

// touched counts what targets would touch, but for what except names, by tenant.
// Targets are canonical. Terms of kinds that are not known are passed over, so
// that the counts bound a conjunction with them from above; a target of nothing
// else counts nothing.
func (x *index) touched(targets, except []session.Target, now session.Instant) map[string]Counts {
	out := map[string]Counts{}
	for name, t := range x.tenants {
		agents := map[*term]bool{}
		var seen map[*sess]bool
		if len(targets) > 1 {
			seen = map[*sess]bool{}
		}
		var spared [][]want
		for _, e := range except {
			if e.Tenant == name || e.Tenant == "" {
				if w, ok := t.wants(e.Terms); ok {
					spared = append(spared, w)
				}
			}
		}
		sessions := 0
		for _, target := range targets {
			if target.Tenant != name && target.Terms[0].Kind != session.KindGlobal {
				continue
			}
			terms := slices.DeleteFunc(slices.Clone(target.Terms), func(m session.Term) bool { return !Known(m.Kind) })
			if len(terms) == 0 {
				continue
			}
			if len(target.Terms) == 1 {
				t.nameAgents(terms[0], agents)
			}
			wants, ok := t.wants(terms)
			if !ok {
				continue
			}
			var last *term
			t.each(wants, func(s *sess) {
				if !s.live(now) || seen[s] || slices.ContainsFunc(spared, s.all) {
					return
				}
				if seen != nil {
					seen[s] = true
				}
				sessions++
				if s.agent != nil && s.agent != last {
					last = s.agent
					agents[last] = true
				}
			})
		}
		if len(agents) > 0 || sessions > 0 {
			out[name] = Counts{Agents: len(agents), Sessions: sessions}
		}
	}
	return out
}

func (s *sess) all(wants []want) bool {
	return !slices.ContainsFunc(wants, func(w want) bool { return !w.match(s) })
}

// nameAgents adds the registered agents that a term names.
func (t *tenant) nameAgents(m session.Term, to map[*term]bool) {
	add := func(a *agent) {
		if a.State != Decommissioned {
			to[a.self] = true
		}
	}
	switch m.Kind {
	case session.KindGlobal, session.KindTenant:
		for _, a := range t.listed {
			add(a)
		}
	case session.KindAgent:
		if v := t.terms[termKey{m.Kind, m.Issuer, m.Value}]; v != nil && v.agent != nil {
			add(v.agent)
		}
	case session.KindBlueprint, session.KindOwner, session.KindCapability, session.KindDigest:
		if v := t.terms[termKey{m.Kind, m.Issuer, m.Value}]; v != nil {
			for a := range v.agents {
				add(a)
			}
		}
	}
}
