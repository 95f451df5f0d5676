package session

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"slices"
	"strings"
)

// Bounds of the table of registered agents.
const (
	// AgentParts is into how many parts the table is divided, by the first byte
	// of an agent's digest.
	AgentParts = 256
	// MaxTableAgents bounds the agents of all tenants.
	MaxTableAgents = 1 << 17
	// MaxAgentDigests bounds the digests of one agent.
	MaxAgentDigests = 16
)

// DigestSort is what a value of KindDigest is a digest of. The numbers are the
// wire form.
type DigestSort uint8

// The sorts of digest.
const (
	DigestCode  DigestSort = 1
	DigestModel DigestSort = 2
	DigestImage DigestSort = 3
)

// SortOf returns the sort of a canonical value of KindDigest; 0 for anything
// else.
func SortOf(value string) DigestSort {
	of, _, _ := strings.Cut(value, ":")
	switch of {
	case "code":
		return DigestCode
	case "model":
		return DigestModel
	case "image":
		return DigestImage
	}
	return 0
}

// SortedDigest is the keyed digest of a value of KindDigest, with its sort, which
// that alone does not tell.
type SortedDigest struct {
	Sort   DigestSort
	Digest Digest
}

func (d SortedDigest) compare(o SortedDigest) int {
	if d.Sort != o.Sort {
		return int(d.Sort) - int(o.Sort)
	}
	return bytes.Compare(d.Digest[:], o.Digest[:])
}

// AgentsRef names a version of the table of registered agents. Zero is none.
type AgentsRef struct {
	Version uint64
	// Sum is the hash of its index's frame.
	Sum Hash
}

// AgentIndex describes a version of the table of registered agents: which parts
// it has, by their sums. It is signed by a writer that may speak for all tenants,
// and counts while a fresh heartbeat names it.
type AgentIndex struct {
	Epoch uint64
	// Version grows with each index of an epoch.
	Version uint64
	Time    Instant
	// Agents are in all parts.
	Agents uint32
	// Parts are the SHA-256 of the parts; zeroes for one without agents.
	Parts [AgentParts]Hash
	// Unknown holds fields of a later version.
	Unknown []Field
}

// MarshalBody returns the body of the index's frame.
func (x *AgentIndex) MarshalBody() []byte {
	var w writer
	w.u64(x.Epoch)
	w.u64(x.Version)
	w.instant(x.Time)
	w.u32(x.Agents)
	var has [AgentParts / 8]byte
	for i := range x.Parts {
		if x.Parts[i] != (Hash{}) {
			has[i/8] |= 0x80 >> (i % 8)
		}
	}
	w.raw(has[:])
	for i := range x.Parts {
		if x.Parts[i] != (Hash{}) {
			w.raw(x.Parts[i][:])
		}
	}
	w.fields(nil, x.Unknown)
	return w.b
}

// UnmarshalAgentIndex parses a body. Errors wrap ErrMalformed or ErrCritical.
func UnmarshalAgentIndex(body []byte) (*AgentIndex, error) {
	r := reader{b: body}
	x := &AgentIndex{Epoch: r.u64(), Version: r.u64(), Time: r.instant(), Agents: r.u32()}
	has := r.take(AgentParts / 8)
	for i := range x.Parts {
		if r.err == nil && has[i/8]&(0x80>>(i%8)) != 0 {
			if copy(x.Parts[i][:], r.take(len(x.Parts[i]))); x.Parts[i] == (Hash{}) {
				r.fail("a part without a sum")
			}
		}
	}
	x.Unknown = r.fields(refuseAll)
	if err := r.end(); err != nil {
		return nil, err
	}
	if x.Epoch == 0 || x.Version == 0 || x.Agents > MaxTableAgents {
		return nil, fmt.Errorf("%w: table %d of epoch %d with %d agents", ErrMalformed, x.Version, x.Epoch, x.Agents)
	}
	return x, nil
}

// RegisteredAgent is what the table has of one agent.
type RegisteredAgent struct {
	Tenant TenantID
	// Agent is the digest of its KindAgent key.
	Agent Digest
	// Digests are those that it is registered with, at most MaxAgentDigests.
	Digests []SortedDigest
}

func (a *RegisteredAgent) compare(b *RegisteredAgent) int {
	if a.Tenant != b.Tenant {
		if a.Tenant < b.Tenant {
			return -1
		}
		return 1
	}
	return bytes.Compare(a.Agent[:], b.Agent[:])
}

const (
	agentHeader    = 4 + 16 + 1
	agentDigestLen = 1 + 16
)

// MarshalAgentPart returns the part of the table that has these agents, all with
// the same first byte of their digest, which it sorts. Errors wrap ErrMalformed.
func MarshalAgentPart(agents []RegisteredAgent) ([]byte, error) {
	slices.SortFunc(agents, func(a, b RegisteredAgent) int { return a.compare(&b) })
	w := writer{b: make([]byte, 0, 4+len(agents)*(agentHeader+2*agentDigestLen)+2)}
	w.u32(uint32(len(agents)))
	for i := range agents {
		a := &agents[i]
		slices.SortFunc(a.Digests, SortedDigest.compare)
		w.u32(uint32(a.Tenant))
		w.raw(a.Agent[:])
		w.u8(uint8(min(len(a.Digests), 0xff)))
		for _, d := range a.Digests {
			w.u8(uint8(d.Sort))
			w.raw(d.Digest[:])
		}
	}
	w.fields(nil, nil)
	if len(w.b) > MaxFrameLen {
		return nil, fmt.Errorf("%w: a part of %d bytes, at most %d", ErrMalformed, len(w.b), MaxFrameLen)
	}
	first := byte(0)
	if len(agents) > 0 {
		first = agents[0].Agent[0]
	}
	if _, err := ParseAgentPart(w.b, first); err != nil {
		return nil, err
	}
	return w.b, nil
}

// AgentPart is a part of the table of registered agents, as it is on the wire,
// with the places of the agents in it. Nil is one without agents. It is
// immutable.
type AgentPart struct {
	b   []byte
	at  []uint32 // where each agent begins
	sum Hash
}

// ParseAgentPart takes a part whose agents' digests begin with first. It keeps b.
// Errors wrap ErrMalformed or ErrCritical.
func ParseAgentPart(b []byte, first byte) (*AgentPart, error) {
	if len(b) > MaxFrameLen {
		return nil, fmt.Errorf("%w: a part of %d bytes, at most %d", ErrMalformed, len(b), MaxFrameLen)
	}
	r := reader{b: b}
	n := r.count(int(r.u32()), MaxTableAgents, agentHeader)
	p := &AgentPart{b: b, at: make([]uint32, 0, n), sum: sha256.Sum256(b)}
	for i := 0; i < n && r.err == nil; i++ {
		at := uint32(len(b) - len(r.b))
		tenant := TenantID(r.u32())
		agent := r.take(16)
		var last SortedDigest
		for m := r.count(int(r.u8()), MaxAgentDigests, agentDigestLen); m > 0 && r.err == nil; m-- {
			d := SortedDigest{Sort: DigestSort(r.u8())}
			copy(d.Digest[:], r.take(16))
			// A sort of a later version is kept: no caller presents one here.
			if d.Sort == 0 || last.compare(d) >= 0 {
				r.fail("digests of an agent are not in order")
			}
			last = d
		}
		switch {
		case r.err != nil:
		case tenant == 0 || agent[0] != first:
			r.fail("an agent that is not of this part")
		case i > 0 && bytes.Compare(b[p.at[i-1]:][:20], b[at:][:20]) >= 0:
			r.fail("agents are not in order")
		default:
			p.at = append(p.at, at)
		}
	}
	r.fields(refuseAll)
	if err := r.end(); err != nil {
		return nil, err
	}
	return p, nil
}

// Len returns the number of agents.
func (p *AgentPart) Len() int {
	if p == nil {
		return 0
	}
	return len(p.at)
}

// Bytes returns the part as it is on the wire; it must not be changed.
func (p *AgentPart) Bytes() []byte {
	if p == nil {
		return nil
	}
	return p.b
}

// Sum returns the part's SHA-256; zeroes for one without agents.
func (p *AgentPart) Sum() Hash {
	if p == nil {
		return Hash{}
	}
	return p.sum
}

// Find returns the digests with which an agent is registered, and whether it is.
// It allocates nothing.
func (p *AgentPart) Find(tenant TenantID, agent *Digest) (AgentDigests, bool) {
	if p == nil {
		return nil, false
	}
	high, low := binary.BigEndian.Uint64(agent[:8]), binary.BigEndian.Uint64(agent[8:])
	i, end := 0, len(p.at)
	for i < end {
		mid := (i + end) / 2
		b := p.b[p.at[mid]:][:20]
		t, h, l := TenantID(binary.BigEndian.Uint32(b)), binary.BigEndian.Uint64(b[4:]), binary.BigEndian.Uint64(b[12:])
		switch {
		case t == tenant && h == high && l == low:
			b := p.b[p.at[mid]+20:]
			return AgentDigests(b[1:][:int(b[0])*agentDigestLen]), true
		case t < tenant || t == tenant && (h < high || h == high && l < low):
			i = mid + 1
		default:
			end = mid
		}
	}
	return nil, false
}

// AgentDigests are the digests with which an agent is registered, in their wire
// form.
type AgentDigests []byte

// Match compares them with those that a caller presents. altered: one that was
// presented is of a sort of which the agent has others. missing: the agent has
// digests of a sort of which none was presented. It allocates nothing.
func (d AgentDigests) Match(presented []SortedDigest) (altered, missing bool) {
	for _, p := range presented {
		some, same := false, false
		for b := []byte(d); len(b) > 0; b = b[agentDigestLen:] {
			if DigestSort(b[0]) == p.Sort {
				some, same = true, same || bytes.Equal(b[1:agentDigestLen], p.Digest[:])
			}
		}
		altered = altered || some && !same
	}
	for b := []byte(d); len(b) > 0; b = b[agentDigestLen:] {
		missing = missing || !slices.ContainsFunc(presented, func(p SortedDigest) bool { return p.Sort == DigestSort(b[0]) })
	}
	return altered, missing
}
