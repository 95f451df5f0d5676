package session

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

func TestRecordMatches(t *testing.T) {
	s := testSecret(t, 7, "acme")
	at := func(d time.Duration) Instant { return InstantOf(testTime.Add(d)) }
	caller := func(change func(*Identity)) Identity {
		id := Identity{Issuer: testIssuer, User: "alice", Session: SessionRef{ID: "s-1"}, Roles: []string{"admin"}, AuthTime: testTime, ACR: "pwd"}
		if change != nil {
			change(&id)
		}
		return id
	}
	plain := caller(nil)
	bucket := mustPrepare(t, s, plain).bucket
	admin := mustKey(t, s, Term{Kind: KindRole, Value: "admin"})
	ops := mustKey(t, s, Term{Kind: KindRole, Value: "ops"})
	otherTenant := Key{Tenant: 8, Shape: admin.Shape, Digest: admin.Digest}

	tests := []struct {
		name string
		r    Record
		id   Identity
		call Call
		now  Instant
		want bool
	}{
		{"revoked", Record{Effect: EffectRevoked}, plain, Call{}, at(0), true},
		{"suspended", Record{Effect: EffectSuspended}, plain, Call{}, at(0), true},

		{"a suspension before its end", Record{Effect: EffectSuspended, Expires: at(time.Minute)}, plain, Call{}, at(time.Minute) - 1, true},
		{"a suspension at its end", Record{Effect: EffectSuspended, Expires: at(time.Minute)}, plain, Call{}, at(time.Minute), false},
		{"a suspension whose end the authority's clock has not shown", Record{Effect: EffectSuspended, Expires: at(-time.Hour)}, plain, Call{}, 0, true},
		{"a revocation past its expiry, until the log drops it", Record{Effect: EffectRevoked, Expires: at(-time.Hour)}, plain, Call{}, at(0), true},

		{"issued before", Record{Effect: EffectRevoked, IssuedBefore: at(time.Millisecond)}, plain, Call{}, at(0), true},
		{"issued at that instant", Record{Effect: EffectRevoked, IssuedBefore: at(0)}, plain, Call{}, at(0), false},
		{"issued after, within the issuer's skew", Record{Effect: EffectRevoked, IssuedBefore: at(0)}, caller(func(id *Identity) { id.Skew = time.Second }), Call{}, at(0), true},
		{"issued after, at the edge of the skew", Record{Effect: EffectRevoked, IssuedBefore: at(-time.Second)}, caller(func(id *Identity) { id.Skew = time.Second }), Call{}, at(0), false},
		{"a negative skew is none", Record{Effect: EffectRevoked, IssuedBefore: at(time.Second)}, caller(func(id *Identity) { id.Skew = -time.Hour }), Call{}, at(0), true},
		{"issued nobody knows when", Record{Effect: EffectRevoked, IssuedBefore: at(-time.Hour)}, caller(func(id *Identity) { id.AuthTime = time.Time{} }), Call{}, at(0), true},
		{"issued late in an old session", Record{Effect: EffectRevoked, IssuedBefore: at(-time.Hour)}, caller(func(id *Identity) { id.Ancestors = []SessionRef{{ID: "s-0", Start: testTime.Add(-2 * time.Hour)}} }), Call{}, at(0), true},
		{"an issued-before at the end of time", Record{Effect: EffectRevoked, IssuedBefore: 1<<63 - 1}, caller(func(id *Identity) { id.Skew = time.Hour }), Call{}, at(0), true},

		{"set free by the share", Record{Effect: EffectSuspended, Share: bucket + 1}, plain, Call{}, at(0), false},
		{"not yet set free by the share", Record{Effect: EffectSuspended, Share: bucket}, plain, Call{}, at(0), true},

		{"reduced, and the call is low-risk", Record{Effect: EffectReduced}, plain, Call{LowRisk: true}, at(0), false},
		{"reduced, and the call is unmarked", Record{Effect: EffectReduced}, plain, Call{Tool: "t"}, at(0), true},
		{"suspended, and the call is low-risk", Record{Effect: EffectSuspended}, plain, Call{LowRisk: true}, at(0), true},

		{"step-up, and authentication is older", Record{Effect: EffectStepUp, Since: at(time.Millisecond)}, plain, Call{}, at(0), true},
		{"step-up, and authentication is as old", Record{Effect: EffectStepUp, Since: at(0)}, plain, Call{}, at(0), true},
		{"step-up, and authentication is later", Record{Effect: EffectStepUp, Since: at(-time.Millisecond)}, plain, Call{}, at(0), false},
		{"step-up, later, with another acr", Record{Effect: EffectStepUp, Since: at(-time.Millisecond), ACR: "mfa"}, plain, Call{}, at(0), true},
		{"step-up, later, with the acr", Record{Effect: EffectStepUp, Since: at(-time.Millisecond), ACR: "pwd"}, plain, Call{}, at(0), false},
		{"step-up, with the acr from before", Record{Effect: EffectStepUp, Since: at(time.Millisecond), ACR: "pwd"}, plain, Call{}, at(0), true},
		{"step-up, and nobody knows when", Record{Effect: EffectStepUp, Since: at(-time.Millisecond)}, caller(func(id *Identity) { id.AuthTime = time.Time{} }), Call{}, at(0), true},

		{"exempt", Record{Effect: EffectRevoked, Except: []Key{ops, admin}}, plain, Call{}, at(0), false},
		{"others are exempt", Record{Effect: EffectRevoked, Except: []Key{ops}}, plain, Call{}, at(0), true},
		{"the same in another tenant is exempt", Record{Effect: EffectRevoked, Except: []Key{otherTenant}}, plain, Call{}, at(0), true},

		{"a drill matches like the real thing", Record{Effect: EffectRevoked, Drill: true}, plain, Call{}, at(0), true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p := mustPrepare(t, s, tt.id)
			if got := tt.r.Matches(p, &tt.call, Moment{Authority: tt.now}); got != tt.want {
				t.Errorf("matches %t, want %t", got, tt.want)
			}
		})
	}
}

func TestDenialSaysWhatTheRecordSays(t *testing.T) {
	r := Record{Effect: EffectSuspended, Reason: ReasonAnomaly, Seq: 9, Incident: "INC-1", Expires: 77, IssuedBefore: 5, ACR: "mfa"}
	want := Denial{Effect: EffectSuspended, Reason: ReasonAnomaly, Seq: 9, Incident: "INC-1", Until: 77, IssuedBefore: 5, ACR: "mfa", Shape: ShapeUserAgent, Provisional: true}
	if got := r.Denial(ShapeUserAgent, true); got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
	r.Effect = EffectRevoked
	if got := r.Denial(ShapeUserAgent, true); got.Until != 0 {
		t.Error("a revocation has an end")
	}
}

func TestDeniedErrors(t *testing.T) {
	tests := []struct {
		name string
		err  DeniedError
		is   error
		text string
	}{
		{"revoked", DeniedError{Denial: Denial{Effect: EffectRevoked, Reason: ReasonStolenToken, Seq: 48213, Incident: "INC-142"}, Err: ErrRevoked}, ErrRevoked, "denied: revoked: stolen-token (seq 48213, INC-142)"},
		{"without incident", DeniedError{Denial: Denial{Effect: EffectSuspended, Seq: 3}, Err: ErrSuspended}, ErrSuspended, "denied: suspended: unspecified (seq 3)"},
		{"stale", DeniedError{Err: ErrStale, Age: time.Second}, ErrStale, "denied: revocation state is stale"},
		{"with detail", DeniedError{Err: ErrNoIdentity, Detail: "the tool name is malformed"}, ErrNoIdentity, "denied: no verified identity: the tool name is malformed"},
		{"zero", DeniedError{}, ErrDenied, "denied"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if tt.err.Error() != tt.text || !errors.Is(&tt.err, tt.is) || !errors.Is(&tt.err, ErrDenied) {
				t.Errorf("%q", tt.err.Error())
			}
		})
	}
	for _, err := range []error{ErrMalformed, ErrVersion, ErrCritical, ErrSignature, ErrUntrusted} {
		if !errors.Is(err, ErrFrame) || errors.Is(err, ErrDenied) {
			t.Errorf("%v is in the wrong tree", err)
		}
	}
}

func testKeyOf(shape Shape) Key {
	switch Kind(shape) {
	case KindGlobal:
		return GlobalKey()
	case KindTenant:
		return TenantKey(7)
	}
	return Key{Tenant: 7, Shape: shape, Digest: Digest{byte(shape), 1}}
}

func TestEntryValidate(t *testing.T) {
	set := func(shape Shape, change func(*Entry)) Entry {
		e := Entry{Op: OpSet, Effect: EffectRevoked, Key: testKeyOf(shape)}
		if change != nil {
			change(&e)
		}
		return e
	}
	lift := func(shape Shape, effect Effect, change func(*Entry)) Entry {
		return set(shape, func(e *Entry) {
			e.Op, e.Effect = OpLift, effect
			if change != nil {
				change(e)
			}
		})
	}
	user, session := Shape(KindUser), Shape(KindSession)
	tests := []struct {
		name string
		e    Entry
		want error  // nil is valid
		text string // part of the error
	}{
		{"revoke a session", set(session, nil), nil, ""},
		{"revoke a session that expires", set(session, func(e *Entry) { e.Expires = 9 }), nil, ""},
		{"revoke a token that expires", set(Shape(KindToken), func(e *Entry) { e.Expires = 9 }), nil, ""},
		{"revoke a credential that expires", set(Shape(KindCredential), func(e *Entry) { e.Expires = 9 }), nil, ""},
		{"revoke a session's tool, which expires with it", set(ShapeSessionTool, func(e *Entry) { e.Expires = 9 }), nil, ""},
		{"revoke a user issued before, which expires", set(user, func(e *Entry) { e.Expires, e.IssuedBefore = 9, 5 }), nil, ""},
		{"suspend a user until", set(user, func(e *Entry) { e.Effect, e.Expires = EffectSuspended, 9 }), nil, ""},
		{"step up with acr", set(user, func(e *Entry) { e.Effect, e.ACR = EffectStepUp, "mfa" }), nil, ""},
		{"kill", set(Shape(KindGlobal), func(e *Entry) { e.Effect = EffectSuspended }), nil, ""},
		{"a reason of a later version", set(user, func(e *Entry) { e.Reason = 250 }), nil, ""},
		{"an exemption", set(Shape(KindTenant), func(e *Entry) { e.Except = []Key{testKeyOf(user)} }), nil, ""},
		{"resume", lift(user, EffectSuspended, nil), nil, ""},
		{"resume a share", lift(user, EffectSuspended, func(e *Entry) { e.Share = ShareUnit }), nil, ""},
		{"restore a user", lift(user, EffectRevoked, func(e *Entry) { e.IssuedBefore = 5 }), nil, ""},
		{"restore a user, leaving what expires", lift(user, EffectRevoked, func(e *Entry) { e.IssuedBefore, e.Expires = 5, 9 }), nil, ""},
		{"end the drill of a session's revocation", lift(session, EffectRevoked, func(e *Entry) { e.Drill = true }), nil, ""},

		{"no operation", set(user, func(e *Entry) { e.Op = 0 }), ErrCritical, "operation 0"},
		{"an operation of a later version", set(user, func(e *Entry) { e.Op = 3 }), ErrCritical, "operation 3"},
		{"no effect", set(user, func(e *Entry) { e.Effect = 0 }), ErrCritical, "effect-0"},
		{"an effect of a later version", set(user, func(e *Entry) { e.Effect = 5 }), ErrCritical, "effect-5"},
		{"a shape of a later version", set(user, func(e *Entry) { e.Key.Shape = 40 }), ErrCritical, "shape-40"},
		{"a key that no target has", set(user, func(e *Entry) { e.Key.Digest = Digest{} }), ErrMalformed, "without"},
		{"a negative time", set(user, func(e *Entry) { e.IssuedBefore = -1 }), ErrMalformed, "negative"},
		{"a negative expiry", set(session, func(e *Entry) { e.Expires = -1 }), ErrMalformed, "negative"},
		{"an incident with a control character", set(user, func(e *Entry) { e.Incident = "a\nb" }), ErrMalformed, "incident"},
		{"a long incident", set(user, func(e *Entry) { e.Incident = strings.Repeat("i", MaxIncidentLen+1) }), ErrMalformed, "incident"},
		{"acr on a revocation", set(user, func(e *Entry) { e.ACR = "mfa" }), ErrMalformed, "acr"},
		{"a long acr", set(user, func(e *Entry) { e.Effect, e.ACR = EffectStepUp, strings.Repeat("a", 65) }), ErrMalformed, "acr"},
		{"too many exemptions", set(Shape(KindGlobal), func(e *Entry) {
			for i := range MaxExcept + 1 {
				e.Except = append(e.Except, Key{7, user, Digest{1, byte(i)}})
			}
		}), ErrMalformed, "exemptions"},
		{"exemptions out of order", set(Shape(KindGlobal), func(e *Entry) { e.Except = []Key{{7, user, Digest{2}}, {7, user, Digest{1}}} }), ErrMalformed, "order"},
		{"an exemption twice", set(Shape(KindGlobal), func(e *Entry) { e.Except = []Key{{7, user, Digest{2}}, {7, user, Digest{2}}} }), ErrMalformed, "order"},
		{"an exemption of everybody", set(Shape(KindGlobal), func(e *Entry) { e.Except = []Key{TenantKey(7)} }), ErrMalformed, "exemption of tenant"},
		{"an exemption of a tool", set(Shape(KindGlobal), func(e *Entry) { e.Except = []Key{testKeyOf(Shape(KindTool))} }), ErrMalformed, "exemption of tool"},
		{"an exemption that no target has", set(Shape(KindGlobal), func(e *Entry) { e.Except = []Key{{0, user, Digest{1}}} }), ErrMalformed, "key"},
		{"a lift with exemptions", lift(user, EffectSuspended, func(e *Entry) { e.Except = []Key{testKeyOf(user)} }), ErrMalformed, "exemptions"},
		{"a share of more than all", lift(user, EffectSuspended, func(e *Entry) { e.Share = ShareUnit + 1 }), ErrMalformed, "share"},
		{"a share on a set", set(user, func(e *Entry) { e.Share = 1 }), ErrMalformed, "share"},
		{"restoring a session", lift(session, EffectRevoked, func(e *Entry) { e.IssuedBefore = 5 }), ErrMalformed, "cannot be restored"},
		{"restoring a token", lift(Shape(KindToken), EffectRevoked, func(e *Entry) { e.IssuedBefore = 5 }), ErrMalformed, "cannot be restored"},
		{"restoring a credential", lift(Shape(KindCredential), EffectRevoked, func(e *Entry) { e.IssuedBefore = 5 }), ErrMalformed, "cannot be restored"},
		{"restoring a key", lift(Shape(KindKey), EffectRevoked, func(e *Entry) { e.IssuedBefore = 5 }), ErrMalformed, "cannot be restored"},
		{"restoring a user and its stolen tokens", lift(user, EffectRevoked, nil), ErrMalformed, "issued-before"},
		{"restoring a share of what is revoked", lift(user, EffectRevoked, func(e *Entry) { e.IssuedBefore, e.Share = 5, 5 }), ErrMalformed, "staged"},
		{"a lift that expires", lift(user, EffectSuspended, func(e *Entry) { e.Expires = 9 }), ErrMalformed, "expiry"},
		{"a revoked user that expires", set(user, func(e *Entry) { e.Expires = 9 }), ErrMalformed, "stands until lifted"},
		{"a revoked key that expires", set(Shape(KindKey), func(e *Entry) { e.Expires = 9 }), ErrMalformed, "stands until lifted"},
		{"a revoked agent that expires", set(Shape(KindAgent), func(e *Entry) { e.Expires = 9 }), ErrMalformed, "stands until lifted"},
		{"an unknown critical field", set(user, func(e *Entry) { e.Unknown = []Field{{Tag: 0x90}} }), ErrCritical, "0x90"},
		{"an unknown field that is known", set(user, func(e *Entry) { e.Unknown = []Field{{Tag: 4}} }), ErrMalformed, "tag 4"},
		{"unknown fields out of order", set(user, func(e *Entry) { e.Unknown = []Field{{Tag: 9}, {Tag: 9}} }), ErrMalformed, "order"},
		{"too many unknown fields", set(user, func(e *Entry) {
			for i := range maxUnknown + 1 {
				e.Unknown = append(e.Unknown, Field{Tag: uint8(10 + i)})
			}
		}), ErrMalformed, "unknown"},
		{"unknown fields that are too long", set(user, func(e *Entry) { e.Unknown = []Field{{Tag: 9, Value: make([]byte, maxUnknownLen)}} }), ErrMalformed, "unknown"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			err := tt.e.Validate()
			if !errors.Is(err, tt.want) || tt.want != nil && (!errors.Is(err, ErrFrame) || !strings.Contains(err.Error(), tt.text)) {
				t.Errorf("got %v, want %v with %q", err, tt.want, tt.text)
			}
		})
	}
}

func TestSortKeysGivesTheOrderOfTheWire(t *testing.T) {
	a, b, c, d := Key{7, 4, Digest{1}}, Key{7, 4, Digest{2}}, Key{7, 5, Digest{1}}, Key{1 << 31, 4, Digest{0, 1}}
	got := SortKeys([]Key{d, c, b, a, b, d})
	if !slices.Equal(got, []Key{a, b, c, d}) {
		t.Errorf("%v", got)
	}
	e := Entry{Op: OpSet, Effect: EffectRevoked, Key: GlobalKey(), Except: got}
	if err := e.Validate(); err != nil {
		t.Error(err)
	}
}

// The sum says everything that a record does: two that differ in any field that
// a verdict or a denial shows have different sums.
func TestSumCoversEveryField(t *testing.T) {
	k := testKeyOf(Shape(KindUser))
	base := Record{Effect: EffectStepUp, Since: 1, Seq: 2}
	seen := map[StateDigest]string{base.Sum(k): "base"}
	for name, change := range map[string]func(*Record){
		"effect": func(r *Record) { r.Effect = EffectRevoked }, "reason": func(r *Record) { r.Reason = 1 },
		"drill": func(r *Record) { r.Drill = true }, "share": func(r *Record) { r.Share = 1 },
		"issued before": func(r *Record) { r.IssuedBefore = 1 }, "expires": func(r *Record) { r.Expires = 1 },
		"since": func(r *Record) { r.Since = 9 }, "seq": func(r *Record) { r.Seq = 9 },
		"incident": func(r *Record) { r.Incident = "a" }, "acr": func(r *Record) { r.ACR = "a" },
		"except": func(r *Record) { r.Except = []Key{k} },
	} {
		r := base
		change(&r)
		if have, ok := seen[r.Sum(k)]; ok {
			t.Errorf("%s and %s have one sum", name, have)
		}
		seen[r.Sum(k)] = name
	}
	if _, ok := seen[base.Sum(testKeyOf(Shape(KindAgent)))]; ok {
		t.Error("the key is not in the sum")
	}
}

func TestStateDigestIsASum(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		draw := func(name string) (d StateDigest) {
			copy(d[:], rapid.SliceOfN(rapid.Byte(), len(d), len(d)).Draw(t, name))
			return d
		}
		a, b := draw("a"), draw("b")
		ab, ba := a, b
		ab.Plus(b)
		ba.Plus(a)
		if ab != ba {
			t.Fatal("the order matters")
		}
		ab.Minus(b)
		if ab != a {
			t.Fatal("taking out is not the inverse")
		}
	})
}

func TestMatchesAllocatesNothing(t *testing.T) {
	s := testSecret(t, 7, "acme")
	p := mustPrepare(t, s, fullIdentity())
	r := &Record{Effect: EffectStepUp, ACR: "hw", Share: 1, IssuedBefore: InstantOf(testTime), Except: []Key{testKeyOf(Shape(KindRole))}}
	call, now := &Call{Tool: "t"}, Moment{Authority: InstantOf(testTime)}
	if n := testing.AllocsPerRun(100, func() { r.Matches(p, call, now) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func TestCallKeysAllocatesNothing(t *testing.T) {
	s := testSecret(t, 7, "acme")
	p := mustPrepare(t, s, fullIdentity())
	buf := make([]Key, 0, MaxProbes)
	for _, call := range []*Call{
		{Tool: "files.delete"},
		{Tool: "files.delete", Audience: "https://api.example/mcp/with/a/long/path?and=query"},
		{Audience: "spiffe://prod.example/ns/billing"},
		{Audience: "did:web:api.example"},
		{Audience: "urn:example:api"},
	} {
		n := testing.AllocsPerRun(100, func() {
			if keys, err := p.CallKeys(buf[:0], call, PerCallShapes); err != nil || len(keys) == 0 {
				t.Fatal(keys, err)
			}
		})
		if n != 0 {
			t.Errorf("%+v: %v allocations", *call, n)
		}
	}
}

func BenchmarkPrepare(b *testing.B) {
	s := testSecret(b, 7, "acme")
	id := fullIdentity()
	id.Tenant = "acme"
	b.ReportAllocs()
	for b.Loop() {
		if _, err := s.Prepare(id); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkCallKeys(b *testing.B) {
	s := testSecret(b, 7, "acme")
	p := mustPrepare(b, s, fullIdentity())
	buf, call := make([]Key, 0, MaxProbes), &Call{Tool: "files.delete", Audience: "https://api.example/mcp"}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := p.CallKeys(buf[:0], call, PerCallShapes); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkMatches(b *testing.B) {
	s := testSecret(b, 7, "acme")
	p := mustPrepare(b, s, fullIdentity())
	r := &Record{Effect: EffectRevoked, IssuedBefore: InstantOf(testTime)}
	call, now := &Call{}, Moment{Authority: InstantOf(testTime)}
	b.ReportAllocs()
	for b.Loop() {
		r.Matches(p, call, now)
	}
}
