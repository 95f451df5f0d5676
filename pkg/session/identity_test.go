package session

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
)

func fullIdentity() Identity {
	return Identity{
		Issuer: testIssuer, Token: "jti-1",
		Session:   SessionRef{ID: "s-3", Start: testTime.Add(-time.Minute)},
		Ancestors: []SessionRef{{ID: "s-2", Start: testTime.Add(-time.Hour)}, {Issuer: "https://other.example", ID: "s-1"}},
		User:      "alice",
		Actors:    []Actor{{ID: "sub-bot"}, {ID: "spiffe://prod.example/bot", Issuer: "https://ignored.example"}, {ID: "root-bot", Issuer: "https://other.example"}},
		Client:    "app",
		Keys:      []string{"jkt:" + jkt}, Credentials: []string{"https://vc.example/1#2"}, Digests: []string{"image:sha256:" + sha256Hex},
		Blueprint: "bp-1", Owner: "did:web:owner.example", Roles: []string{"admin", "ops"}, Capabilities: []string{"files:write"},
		IssuedAt: testTime, AuthTime: testTime.Add(-2 * time.Minute), Expires: testTime.Add(time.Hour), ACR: "mfa",
	}
}

// Every term of the identity, ancestors and the whole chain included, has the
// key that a decision on it has.
func TestPrepareDerivesTheKeyOfEveryTarget(t *testing.T) {
	s := testSecret(t, 7, "acme")
	p := mustPrepare(t, s, fullIdentity())
	const other = "https://other.example"
	user := Term{KindUser, testIssuer, "alice"}
	client := Term{KindClient, testIssuer, "app"}
	sub := Term{KindAgent, testIssuer, "sub-bot"}
	uri := Term{KindAgent, "", "spiffe://prod.example/bot"}
	root := Term{KindAgent, other, "root-bot"}
	targets := [][]Term{
		{{Kind: KindIssuer, Value: testIssuer}}, {{KindToken, testIssuer, "jti-1"}}, {user}, {client},
		{{KindSession, testIssuer, "s-3"}}, {{KindSession, testIssuer, "s-2"}}, {{KindSession, other, "s-1"}},
		{sub}, {uri}, {root},
		{{Kind: KindKey, Value: "jkt:" + jkt}}, {{Kind: KindCredential, Value: "https://vc.example/1#2"}},
		{{Kind: KindDigest, Value: "image:sha256:" + sha256Hex}}, {{Kind: KindBlueprint, Value: "bp-1"}},
		{{Kind: KindOwner, Value: "did:web:owner.example"}}, {{Kind: KindRole, Value: "admin"}},
		{{Kind: KindRole, Value: "ops"}}, {{Kind: KindCapability, Value: "files:write"}},
		{user, sub}, {user, uri}, {user, root}, {user, client}, {sub, client}, {uri, client}, {root, client},
	}
	want := map[Key]bool{}
	var shapes ShapeSet
	for _, terms := range targets {
		k := mustKey(t, s, terms...)
		want[k] = true
		shapes = shapes.With(k.Shape)
		if !slices.Contains(p.Keys(), k) {
			t.Errorf("no key for %s", Target{Terms: terms})
		}
	}
	if len(p.Keys()) != len(want) {
		t.Errorf("%d keys, want %d", len(p.Keys()), len(want))
	}
	if p.Shapes() != shapes {
		t.Errorf("shapes %b, want %b", p.Shapes(), shapes)
	}
	if p.Tenant() != 7 || !p.Valid() || p.Expires() != InstantOf(testTime.Add(time.Hour)) || p.Identity().User != "alice" {
		t.Error("the prepared identity lost a field")
	}
	if !p.By(s) || p.By(testSecret(t, 7, "acme")) {
		t.Error("an identity is not bound to the secret that prepared it")
	}
	if mustPrepare(t, s, Identity{Issuer: testIssuer, Skew: -time.Second}).Skew() != 0 {
		t.Error("a skew is negative")
	}
}

func TestPrepareTakesTheEarliestOrigin(t *testing.T) {
	s := testSecret(t, 7, "acme")
	at := func(m int) time.Time { return testTime.Add(time.Duration(m) * time.Minute) }
	tests := []struct {
		name string
		id   Identity
		want Instant
	}{
		{"nothing known", Identity{}, 0},
		{"issue does not count: the token may have been refreshed", Identity{IssuedAt: at(1)}, 0},
		{"issue counts where nothing refreshes", Identity{IssuedAt: at(1), FixedIssue: true}, InstantOf(at(1))},
		{"authentication", Identity{AuthTime: at(2), IssuedAt: at(9), FixedIssue: true}, InstantOf(at(2))},
		{"the session's start", Identity{AuthTime: at(2), Session: SessionRef{ID: "s", Start: at(1)}}, InstantOf(at(1))},
		{"an ancestor's start", Identity{AuthTime: at(2), Session: SessionRef{ID: "s", Start: at(1)}, Ancestors: []SessionRef{{ID: "a", Start: at(3)}, {ID: "b", Start: at(-5)}}}, InstantOf(at(-5))},
		{"the first millisecond of 1970 is not absent", Identity{AuthTime: time.Unix(0, 0)}, -1},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			tt.id.Issuer, tt.id.User = testIssuer, "alice"
			if p := mustPrepare(t, s, tt.id); p.origin != tt.want {
				t.Errorf("origin %s, want %s", p.origin, tt.want)
			}
		})
	}
}

func TestPrepareRefuses(t *testing.T) {
	s := testSecret(t, 7, "acme")
	tests := []struct {
		name string
		id   Identity
	}{
		{"another tenant", Identity{Tenant: "other", Issuer: testIssuer, User: "alice"}},
		{"no tenant", Identity{Issuer: testIssuer, User: "alice"}},
		{"nothing", Identity{Tenant: "acme"}},
		{"a user without issuer", Identity{Tenant: "acme", User: "secret-user"}},
		{"a malformed user", Identity{Tenant: "acme", Issuer: testIssuer, User: "secret-user\n"}},
		{"a malformed key", Identity{Tenant: "acme", Issuer: testIssuer, Keys: []string{"secret-user"}}},
		{"a malformed ancestor", Identity{Tenant: "acme", Issuer: testIssuer, Ancestors: []SessionRef{{ID: strings.Repeat("secret-user", 100)}}}},
		{"a malformed agent", Identity{Tenant: "acme", Issuer: testIssuer, Actors: []Actor{{ID: "https://secret-user@x/"}}}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p, err := s.Prepare(tt.id)
			var denied *DeniedError
			if p != nil || !errors.Is(err, ErrNoIdentity) || !errors.Is(err, ErrInvalid) || !errors.Is(err, ErrDenied) || !errors.As(err, &denied) {
				t.Fatalf("got %v", err)
			}
			if strings.Contains(err.Error(), "secret-user") {
				t.Errorf("the error names the caller: %v", err)
			}
		})
	}
	for name, s := range map[string]*TenantSecret{"nil": nil, "zero": {}} {
		if p, err := s.Prepare(Identity{Issuer: testIssuer, User: "alice"}); p != nil || !errors.Is(err, ErrNoIdentity) {
			t.Errorf("a %s secret prepared an identity: %v", name, err)
		}
	}
}

// What a check looks up is bounded by the identity alone: the worst call of one
// that was accepted needs no more than MaxProbes keys.
func TestPrepareBoundsTheProbes(t *testing.T) {
	s := testSecret(t, 7, "acme")
	all := ^ShapeSet(0)
	roles := func(n int) Identity {
		id := Identity{Tenant: "acme", Issuer: testIssuer, User: "alice"}
		for i := range n {
			id.Roles = append(id.Roles, fmt.Sprint("role-", i))
		}
		return id
	}
	actors := func(n int) Identity {
		id := roles(0)
		id.Client, id.Session.ID = "app", "s-1"
		for i := range n {
			id.Actors = append(id.Actors, Actor{ID: fmt.Sprint("bot-", i)})
		}
		return id
	}
	// Global, tenant, issuer, user, tool, audience, user+tool: 7 beside the roles.
	// Two for client and its pair with the user, two for the session: 11 beside
	// the agents, each of which makes six.
	for _, tt := range []struct {
		name string
		make func(int) Identity
		most int
	}{{"roles", roles, MaxProbes - 7}, {"actors", actors, (MaxProbes - 11) / 6}} {
		t.Run(tt.name, func(t *testing.T) {
			p, err := s.Prepare(tt.make(tt.most))
			if err != nil {
				t.Fatal(err)
			}
			keys, err := p.CallKeys(nil, &Call{Tool: "t", Audience: "https://a.example/"}, all)
			if err != nil {
				t.Fatal(err)
			}
			if n := 2 + len(p.Keys()) + len(keys); n > MaxProbes {
				t.Errorf("%d probes, at most %d", n, MaxProbes)
			}
			for _, more := range []int{1, 2, 1000} {
				if _, err := s.Prepare(tt.make(tt.most + more)); !errors.Is(err, ErrNoIdentity) || !strings.Contains(err.Error(), "probes") {
					t.Errorf("%d more: %v", more, err)
				}
			}
		})
	}
	t.Run("the same role again and again costs nothing", func(t *testing.T) {
		id := roles(0)
		id.Roles = slices.Repeat([]string{"admin"}, 1000)
		if p, err := s.Prepare(id); err != nil || len(p.Keys()) != 3 {
			t.Errorf("%v", err)
		}
	})
	t.Run("the same agent twice in a chain costs one", func(t *testing.T) {
		id := roles(0)
		id.Actors = slices.Repeat([]Actor{{ID: "bot"}}, 100)
		p, err := s.Prepare(id)
		if err != nil {
			t.Fatal(err)
		}
		if keys, _ := p.CallKeys(nil, &Call{Tool: "t"}, all); len(keys) != 4 {
			t.Errorf("%d keys for a call, want tool, user+tool, agent+tool, user+agent+tool", len(keys))
		}
	})
}

func TestTwoTenantsNeverShareAKey(t *testing.T) {
	key := make([]byte, secretLen)
	// The same key material, which no authority would hand out, is the worst case.
	a, err := NewTenantSecret(1, "a", key)
	if err != nil {
		t.Fatal(err)
	}
	b, err := NewTenantSecret(2, "b", key)
	if err != nil {
		t.Fatal(err)
	}
	pa, pb := mustPrepare(t, a, fullIdentity()), mustPrepare(t, b, fullIdentity())
	for _, k := range pa.Keys() {
		if slices.Contains(pb.Keys(), k) {
			t.Errorf("%s is a key of both", k)
		}
	}
	call := &Call{Tool: "t", Audience: "https://a.example/"}
	ka, _ := pa.CallKeys(nil, call, ^ShapeSet(0))
	kb, _ := pb.CallKeys(nil, call, ^ShapeSet(0))
	for _, k := range ka {
		if slices.Contains(kb, k) {
			t.Errorf("%s is a call's key of both", k)
		}
	}
}

func TestTwoIssuersMintDifferentValues(t *testing.T) {
	s := testSecret(t, 7, "acme")
	mk := func(issuer string) *Prepared {
		return mustPrepare(t, s, Identity{
			Issuer: issuer, Token: "1", User: "1", Client: "1", Session: SessionRef{ID: "1"},
			Actors: []Actor{{ID: "bot"}, {ID: "spiffe://prod.example/bot"}},
		})
	}
	a, b := mk("https://a.example"), mk("https://b.example")
	var shared []Key
	for _, k := range a.Keys() {
		if slices.Contains(b.Keys(), k) {
			shared = append(shared, k)
		}
	}
	// Nothing but the agent that is a URI is one and the same.
	want := mustKey(t, s, Term{Kind: KindAgent, Value: "spiffe://prod.example/bot"})
	if !slices.Equal(shared, []Key{want}) {
		t.Errorf("shared keys %v, want %v", shared, want)
	}
}

// For each shape that a call makes keys of, CallKeys derives what a decision on
// the same target has.
func TestCallKeysAreTheKeysOfTargets(t *testing.T) {
	s := testSecret(t, 7, "acme")
	p := mustPrepare(t, s, fullIdentity())
	tool := Term{Kind: KindTool, Value: "files.delete"}
	audience := Term{Kind: KindAudience, Value: "https://api.example/mcp"}
	user := Term{KindUser, testIssuer, "alice"}
	agents := []Term{{KindAgent, testIssuer, "sub-bot"}, {KindAgent, "", "spiffe://prod.example/bot"}, {KindAgent, "https://other.example", "root-bot"}}
	sessions := []Term{{KindSession, testIssuer, "s-3"}, {KindSession, testIssuer, "s-2"}, {KindSession, "https://other.example", "s-1"}}
	call := &Call{Tool: tool.Value, Audience: "HTTPS://API.example:443/mcp#x"}

	want := map[Shape][]Key{}
	add := func(terms ...Term) {
		k := mustKey(t, s, terms...)
		want[k.Shape] = append(want[k.Shape], k)
	}
	add(tool)
	add(audience)
	add(user, tool)
	for _, a := range agents {
		add(a, tool)
		add(a, audience)
		add(user, a, tool)
	}
	for _, ref := range sessions {
		add(ref, tool)
	}
	total := 0
	for shape := range Shape(64) {
		got, err := p.CallKeys(nil, call, ShapeSet(0).With(shape))
		if err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(got, want[shape]) {
			t.Errorf("%s: %v, want %v", shape, got, want[shape])
		}
		if PerCallShapes.Has(shape) != (len(want[shape]) > 0) {
			t.Errorf("%s: in PerCallShapes %t", shape, PerCallShapes.Has(shape))
		}
		total += len(got)
	}
	got, err := p.CallKeys(make([]Key, 0, MaxProbes), call, PerCallShapes)
	if err != nil || len(got) != total || total != p.perCall {
		t.Errorf("%d keys at once, %d one by one, %d expected: %v", len(got), total, p.perCall, err)
	}
	if got, err := p.CallKeys(nil, &Call{}, PerCallShapes); err != nil || len(got) != 0 {
		t.Errorf("a call without a name has keys %v, %v", got, err)
	}
}

func TestCallKeysRefusesWhatCannotBeNamed(t *testing.T) {
	s := testSecret(t, 7, "acme")
	p := mustPrepare(t, s, Identity{Issuer: testIssuer, User: "alice"})
	for name, call := range map[string]*Call{
		"a tool with a control character": {Tool: "a\x00b"},
		"a tool that is too long":         {Tool: strings.Repeat("t", 257)},
		"an audience with user info":      {Audience: "https://u@api.example/"},
	} {
		_, err := p.CallKeys(nil, call, PerCallShapes)
		var denied *DeniedError
		if !errors.Is(err, ErrNoIdentity) || !errors.As(err, &denied) || denied.Detail == "" {
			t.Errorf("%s: %v", name, err)
		}
		// Without an entry on any tool or audience nothing needs the name.
		if _, err := p.CallKeys(nil, call, ShapeSet(0).With(Shape(KindUser))); err != nil {
			t.Errorf("%s: %v, with no such entry in force", name, err)
		}
	}
	var zero Prepared
	if _, err := zero.CallKeys(nil, &Call{Tool: "t"}, PerCallShapes); !errors.Is(err, ErrNoIdentity) || zero.Valid() {
		t.Errorf("the zero Prepared: %v", err)
	}
	if (*Prepared)(nil).Valid() {
		t.Error("nil is valid")
	}
}

// A staged restore frees a share of the callers: a whole delegation tree at a
// time, and not all callers of an issuer at once because they have no session.
func TestSharesAreSpreadByTheOutermostSession(t *testing.T) {
	s := testSecret(t, 7, "acme")
	parent := mustPrepare(t, s, Identity{Issuer: testIssuer, User: "alice", Session: SessionRef{ID: "root"}})
	child := mustPrepare(t, s, Identity{
		Issuer: testIssuer, User: "service", Session: SessionRef{ID: "leaf"}, Ancestors: []SessionRef{{ID: "mid"}, {ID: "root"}},
	})
	if parent.bucket != child.bucket {
		t.Error("a child is in another share than its parent")
	}
	for name, mk := range map[string]func(string) Identity{
		"by session": func(v string) Identity { return Identity{Session: SessionRef{ID: v}, User: "same"} },
		"by user":    func(v string) Identity { return Identity{User: v, Token: "same"} },
		"by client":  func(v string) Identity { return Identity{Client: v, Token: "same"} },
		"by agent":   func(v string) Identity { return Identity{Actors: []Actor{{ID: "same"}, {ID: v}}, Token: "same"} },
		"by token":   func(v string) Identity { return Identity{Token: v} },
	} {
		t.Run(name, func(t *testing.T) {
			const n = 400
			low := 0
			for i := range n {
				id := mk(fmt.Sprint("v-", i))
				id.Issuer = testIssuer
				p := mustPrepare(t, s, id)
				if p.bucket >= ShareUnit {
					t.Fatalf("bucket %d", p.bucket)
				}
				if p.bucket < ShareUnit/2 {
					low++
				}
			}
			if low < n/3 || low > 2*n/3 {
				t.Errorf("half of the shares hold %d of %d callers", low, n)
			}
		})
	}
}

func TestInstants(t *testing.T) {
	if InstantOf(time.Time{}) != 0 || !Instant(0).Time().IsZero() || Instant(0).String() != "-" {
		t.Error("the zero instant is not the zero time")
	}
	at := time.Date(2026, 11, 2, 9, 0, 0, 999_999_999, time.UTC)
	if i := InstantOf(at); i.String() != "2026-11-02T09:00:00.999Z" || !i.Time().Equal(at.Truncate(time.Millisecond)) {
		t.Errorf("%s is not rounded down", i)
	}
	if InstantOf(time.Unix(0, 500)) != -1 {
		t.Error("a time at the epoch is taken for an absent one")
	}
	const far = Instant(1<<63 - 1)
	if far.Add(time.Hour) != far || (-far).Add(-time.Hour) > -far || Instant(5).Add(-2*time.Millisecond) != 3 {
		t.Error("Add wraps")
	}
}
