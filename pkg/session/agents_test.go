package session

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

func testIndex() *AgentIndex {
	x := &AgentIndex{Epoch: 2, Version: 1793610000000, Time: 1793610000000, Agents: 3, Unknown: []Field{{Tag: 3, Value: []byte{1}}}}
	x.Parts[0], x.Parts[0xff] = Hash{1}, Hash{2}
	return x
}

func testPart() []RegisteredAgent {
	return []RegisteredAgent{
		{Tenant: 1, Agent: Digest{7, 1}},
		{Tenant: 1, Agent: Digest{7, 2}, Digests: []SortedDigest{{DigestCode, Digest{1}}, {DigestCode, Digest{2}}, {DigestModel, Digest{1}}}},
		{Tenant: 9, Agent: Digest{7, 1}, Digests: []SortedDigest{{DigestImage, Digest{3}}}},
	}
}

// TestAgentIndexIsRefused: what no table can be.
func TestAgentIndexIsRefused(t *testing.T) {
	for name, change := range map[string]func(*AgentIndex){
		"no epoch": func(x *AgentIndex) { x.Epoch = 0 }, "no version": func(x *AgentIndex) { x.Version = 0 },
		"too many": func(x *AgentIndex) { x.Agents = MaxTableAgents + 1 }, "a time before all": func(x *AgentIndex) { x.Time = -1 },
	} {
		x := testIndex()
		change(x)
		if _, err := UnmarshalAgentIndex(x.MarshalBody()); !errors.Is(err, ErrMalformed) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestAgentPartIsRefused: a part has one spelling, and is found by halves, so what
// is not in order is refused, as is what belongs elsewhere.
func TestAgentPartIsRefused(t *testing.T) {
	encode := func(list []RegisteredAgent) []byte { // as it stands
		var w writer
		w.u32(uint32(len(list)))
		for _, a := range list {
			w.u32(uint32(a.Tenant))
			w.raw(a.Agent[:])
			w.u8(uint8(len(a.Digests)))
			for _, d := range a.Digests {
				w.u8(uint8(d.Sort))
				w.raw(d.Digest[:])
			}
		}
		w.fields(nil, nil)
		return w.b
	}
	good := encode(testPart())
	if _, err := ParseAgentPart(good, 7); err != nil {
		t.Fatal(err)
	}
	for n := range good {
		if _, err := ParseAgentPart(good[:n], 7); !errors.Is(err, ErrMalformed) {
			t.Fatalf("%d bytes: %v", n, err)
		}
	}
	many := make([]SortedDigest, MaxAgentDigests+1)
	for i := range many {
		many[i] = SortedDigest{DigestCode, Digest{byte(i)}}
	}
	for name, change := range map[string]func([]RegisteredAgent){
		"agents out of order": func(l []RegisteredAgent) { l[0], l[1] = l[1], l[0] },
		"an agent twice":      func(l []RegisteredAgent) { l[1] = l[0] },
		"no tenant":           func(l []RegisteredAgent) { l[0].Tenant = 0 },
		"another part's":      func(l []RegisteredAgent) { l[0].Agent[0] = 6 },
		"digests out of order": func(l []RegisteredAgent) {
			l[1].Digests[0], l[1].Digests[1] = l[1].Digests[1], l[1].Digests[0]
		},
		"a digest twice":   func(l []RegisteredAgent) { l[1].Digests[1] = l[1].Digests[0] },
		"no sort":          func(l []RegisteredAgent) { l[2].Digests[0].Sort = 0 },
		"too many digests": func(l []RegisteredAgent) { l[0].Digests = many },
	} {
		list := testPart()
		change(list)
		if _, err := ParseAgentPart(encode(list), 7); !errors.Is(err, ErrMalformed) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := ParseAgentPart(append(bytes.Clone(good[:len(good)-2]), 0, 3, 0x85, 0, 0), 7); !errors.Is(err, ErrCritical) {
		t.Errorf("a critical field: %v", err)
	}
}

// FuzzParseAgentPart: what is taken is found again, and only that.
func FuzzParseAgentPart(f *testing.F) {
	f.Add(must(MarshalAgentPart(testPart())), byte(7))
	f.Add(must(MarshalAgentPart(nil)), byte(0))
	f.Fuzz(func(t *testing.T, b []byte, first byte) {
		p, err := ParseAgentPart(b, first)
		if err != nil {
			if !errors.Is(err, ErrFrame) {
				t.Fatal(err)
			}
			return
		}
		for _, at := range p.at {
			r := reader{b: b[at:]}
			tenant, agent := TenantID(r.u32()), Digest(r.take(16))
			if d, ok := p.Find(tenant, &agent); !ok || len(d) != int(b[at+20])*agentDigestLen {
				t.Fatalf("%d/%x is not found", tenant, agent)
			}
		}
	})
}

// TestAgentPartAgainstAMap holds Find and Match against a plain map and the rule
// spelled out.
func TestAgentPartAgainstAMap(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		digest := rapid.Custom(func(t *rapid.T) SortedDigest {
			return SortedDigest{DigestSort(rapid.IntRange(1, 3).Draw(t, "sort")), Digest{rapid.Byte().Draw(t, "digest") % 4}}
		})
		type key struct {
			TenantID
			Digest
		}
		model := map[key]map[SortedDigest]bool{}
		for range rapid.IntRange(0, 40).Draw(t, "agents") {
			k := key{TenantID(rapid.IntRange(1, 3).Draw(t, "tenant")), Digest{7, rapid.Byte().Draw(t, "agent") % 32}}
			model[k] = map[SortedDigest]bool{}
			for range rapid.IntRange(0, 6).Draw(t, "digests") {
				model[k][digest.Draw(t, "registered")] = true
			}
		}
		var list []RegisteredAgent
		for k, set := range model {
			a := RegisteredAgent{Tenant: k.TenantID, Agent: k.Digest}
			for d := range set {
				a.Digests = append(a.Digests, d)
			}
			list = append(list, a)
		}
		b, err := MarshalAgentPart(list)
		if err != nil {
			t.Fatal(err)
		}
		p, err := ParseAgentPart(b, 7)
		if len(list) == 0 {
			p, err = ParseAgentPart(b, 0)
		}
		if err != nil || p.Len() != len(model) || p.Sum() != sha256.Sum256(b) {
			t.Fatal(err, p.Len())
		}
		again, err := MarshalAgentPart(list)
		if err != nil || !bytes.Equal(b, again) {
			t.Fatal("the order in which agents come changes the part")
		}
		for tenant := range TenantID(5) {
			for i := range byte(33) {
				set, want := model[key{tenant, Digest{7, i}}]
				got, ok := p.Find(tenant, &Digest{7, i})
				if ok != want {
					t.Fatalf("%d/%d: found %v", tenant, i, ok)
				}
				presented := rapid.SliceOfN(digest, 0, 3).Draw(t, "presented")
				altered, missing := false, false
				for sort := DigestCode; sort <= DigestImage; sort++ {
					registered, shown := false, false
					for d := range set {
						registered = registered || d.Sort == sort
					}
					for _, d := range presented {
						if d.Sort == sort {
							shown = true
							altered = altered || registered && !set[d]
						}
					}
					missing = missing || registered && !shown
				}
				if a, m := got.Match(presented); a != altered || m != missing {
					t.Fatalf("registered %v, presented %v: %v %v, want %v %v", set, presented, a, m, altered, missing)
				}
			}
		}
	})
}

// TestActingAgents: whose digests a credential shows.
func TestActingAgents(t *testing.T) {
	s, err := NewTenantSecret(1, "acme", make([]byte, 32))
	if err != nil {
		t.Fatal(err)
	}
	agent := func(issuer, id string) Digest {
		k, err := s.Key(Target{Tenant: "acme", Terms: []Term{{Kind: KindAgent, Issuer: issuer, Value: id}}})
		if err != nil {
			t.Fatal(err)
		}
		return k.Digest
	}
	code, model := "code:sha256:"+sha256Hex, "model:sha256:"+sha256Hex
	for name, c := range map[string]struct {
		id   Identity
		want []Digest
	}{
		"a chain":               {Identity{Actors: []Actor{{ID: "spiffe://a/b"}, {ID: "planner"}}, Client: "ci"}, []Digest{agent("", "spiffe://a/b"), agent("i", "planner")}},
		"a client":              {Identity{Client: "ci"}, []Digest{agent("i", "ci")}},
		"a client with an URI":  {Identity{Client: "SPIFFE://A/b"}, []Digest{agent("", "spiffe://a/b")}},
		"a client like nothing": {Identity{Client: "spiffe://a/"}, nil},
		"a user":                {Identity{User: "u"}, nil},
	} {
		c.id.Tenant, c.id.Issuer, c.id.Digests = "acme", "i", []string{code, model}
		p, err := s.Prepare(c.id)
		if err != nil {
			t.Fatal(name, err)
		}
		want := []SortedDigest{{DigestCode, s.valueDigest(KindDigest, "", code)}, {DigestModel, s.valueDigest(KindDigest, "", model)}}
		if d := cmp.Diff(c.want, p.Agents()); d != "" || cmp.Diff(want, p.Presented()) != "" {
			t.Error(name, d, p.Presented())
		}
		for _, k := range p.Keys() {
			if len(c.id.Actors) == 0 && Kind(k.Shape) == KindAgent {
				t.Errorf("%s: a decision on the agent would match", name)
			}
		}
	}
	for v, want := range map[string]DigestSort{code: DigestCode, "model:x": DigestModel, "image:": DigestImage, "": 0, "codes:": 0} {
		if SortOf(v) != want {
			t.Error(v, SortOf(v))
		}
	}
}

func BenchmarkAgentPart(b *testing.B) {
	for _, n := range []int{40, 400} { // of 10,000 and of 100,000 agents
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			list := make([]RegisteredAgent, n)
			for i := range list {
				h := sha256.Sum256(fmt.Append(nil, i))
				list[i] = RegisteredAgent{Tenant: 1, Agent: Digest(h[:16]), Digests: []SortedDigest{{DigestCode, Digest{1}}, {DigestModel, Digest{2}}}}
				list[i].Agent[0] = 7
			}
			raw, err := MarshalAgentPart(list)
			if err != nil {
				b.Fatal(err)
			}
			p, err := ParseAgentPart(raw, 7)
			if err != nil {
				b.Fatal(err)
			}
			presented := []SortedDigest{{DigestCode, Digest{1}}, {DigestModel, Digest{2}}}
			b.ReportMetric(float64(len(raw)+4*n)/float64(n), "B/agent")
			i := 0
			for b.Loop() {
				d, ok := p.Find(1, &list[i%n].Agent)
				if altered, missing := d.Match(presented); !ok || altered || missing {
					b.Fatal("not found")
				}
				i++
			}
		})
	}
}
