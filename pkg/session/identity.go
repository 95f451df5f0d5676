package session

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"slices"
	"time"
)

// MaxProbes bounds the keys that one check may look up. An identity that needs
// more is refused when it is prepared.
const MaxProbes = 64

// SessionRef is a session in an identity: the caller's own or an ancestor.
type SessionRef struct {
	// Issuer defaults to the identity's.
	Issuer string
	ID     string
	// Start is when the session began, if known.
	Start time.Time
}

// Actor is one link of the delegation chain (RFC 8693 §4.1 `act`).
type Actor struct {
	// Issuer defaults to the identity's and is ignored when ID is a URI.
	Issuer string
	ID     string
}

// Identity is who is calling, taken from verified credentials only. Tenant
// comes from the configuration of the issuer, never from a claim. Every other
// field may be empty, but an identity that names nothing at all is refused by
// Prepare.
type Identity struct {
	Tenant string
	Issuer string
	// Token is TokenValue of the credential.
	Token string
	// Session is the caller's session; Ancestors are the sessions it descends
	// from, nearest first. A decision on any of them is a decision on it.
	Session   SessionRef
	Ancestors []SessionRef
	// User is the `sub` on whose behalf the call is made.
	User string
	// Actors is the delegation chain, the current actor first.
	Actors []Actor
	Client string
	// Keys are proof-of-possession and API keys; see Canonical for the forms.
	Keys        []string
	Credentials []string
	Digests     []string
	Blueprint   string
	Owner       string
	Roles       []string
	// Capabilities are scopes and other permissions held.
	Capabilities []string

	IssuedAt time.Time
	AuthTime time.Time
	Expires  time.Time
	// ACR is the authentication context class (OpenID Connect Core §2).
	ACR string
	// Transaction is the credential's `txn` (RFC 8417 §2.2). Nothing is decided
	// by it; it is for the trail.
	Transaction string

	// FixedIssue states that the credential can be neither refreshed nor
	// exchanged, so that IssuedAt counts for issued-before.
	FixedIssue bool
	// Skew is how far the issuer's clock may be off.
	Skew time.Duration
}

// Caller condenses who is calling into a name that stays the same over all the
// tokens that they will hold: tenant, issuer, user, client, session and
// delegation chain, or the credential where there is none of these.
func (id *Identity) Caller() string {
	h := sha256.New()
	put := func(s string) {
		_ = binary.Write(h, binary.BigEndian, uint32(len(s)))
		h.Write([]byte(s))
	}
	put(id.Tenant)
	put(id.Issuer)
	put(id.User)
	put(id.Client)
	put(id.Session.ID)
	for _, a := range id.Actors {
		put(a.Issuer)
		put(a.ID)
	}
	if id.User == "" && id.Client == "" && id.Session.ID == "" && len(id.Actors) == 0 {
		// Nothing outlives the credential, so it is the caller.
		put(id.Token)
		for _, k := range id.Keys {
			put(k)
		}
	}
	return base64.RawURLEncoding.EncodeToString(h.Sum(nil))
}

// Call is what is being asked for in one request. The zero Call is an
// operation without a name, treated as high-risk.
type Call struct {
	// Tool is the tool or operation, byte for byte.
	Tool string
	// Audience is the resource, canonical or not.
	Audience string
	// LowRisk marks an operation that a caller with reduced rights may use.
	LowRisk bool
	// MaxStale demands fresher state than the enforcer's own bound; zero, or
	// more than that bound, demands nothing.
	MaxStale time.Duration
	// Strict makes the enforcer deny on stale state, even where it is
	// configured to fail open.
	Strict bool
}

// Prepared is an identity with its keys derived, once per credential. It is
// immutable and safe for concurrent use. Only Prepare makes one; the zero
// value is denied by every enforcer.
type Prepared struct {
	id     Identity
	secret *TenantSecret
	keys   []Key
	shapes ShapeSet
	// Digests that conjunctions with per-call values are made from.
	user     Digest
	agents   []Digest
	sessions []Digest
	// acting are agents or, without any, the agent that has the client's id;
	// presented are the digests of its code, model and image.
	acting    []Digest
	presented []SortedDigest

	origin  Instant
	auth    Instant
	expires Instant
	skew    time.Duration
	bucket  uint16
	perCall int
}

// ShareUnit is the number of equal shares into which a staged restore divides
// the sessions.
const ShareUnit = 10000

// Prepare checks the identity and derives its keys under the tenant's secret.
// The error wraps ErrNoIdentity, and ErrInvalid where a value is malformed.
func (s *TenantSecret) Prepare(id Identity) (*Prepared, error) {
	p, err := s.prepare(id)
	if err != nil {
		return nil, &DeniedError{Err: fmt.Errorf("%w: %w", ErrNoIdentity, err)}
	}
	return p, nil
}

func (s *TenantSecret) prepare(id Identity) (*Prepared, error) {
	if s == nil || !s.ok {
		return nil, fmt.Errorf("%w: no tenant key", ErrInvalid)
	}
	if id.Tenant != s.name {
		return nil, fmt.Errorf("%w: the identity is not of this tenant", ErrInvalid)
	}
	p := &Prepared{id: id, secret: s, skew: max(0, id.Skew)}
	b := keyBuilder{p: p}
	b.add(KindIssuer, "", id.Issuer)
	b.add(KindToken, id.Issuer, id.Token)
	p.user = b.add(KindUser, id.Issuer, id.User)
	client := b.add(KindClient, id.Issuer, id.Client)
	for _, ref := range append([]SessionRef{id.Session}, id.Ancestors...) {
		if d := b.add(KindSession, or(ref.Issuer, id.Issuer), ref.ID); d != (Digest{}) && !slices.Contains(p.sessions, d) {
			p.sessions = append(p.sessions, d)
		}
		p.noteOrigin(ref.Start)
	}
	for _, a := range id.Actors {
		if d := b.add(KindAgent, or(a.Issuer, id.Issuer), a.ID); d != (Digest{}) && !slices.Contains(p.agents, d) {
			p.agents = append(p.agents, d)
		}
	}
	for _, list := range []struct {
		kind   Kind
		values []string
	}{
		{KindKey, id.Keys}, {KindCredential, id.Credentials}, {KindDigest, id.Digests},
		{KindRole, id.Roles}, {KindCapability, id.Capabilities},
	} {
		for _, v := range list.values {
			if d := b.add(list.kind, "", v); list.kind == KindDigest {
				p.presented = append(p.presented, SortedDigest{SortOf(v), d})
			}
		}
	}
	b.add(KindBlueprint, "", id.Blueprint)
	b.add(KindOwner, "", id.Owner)
	if b.err != nil {
		return nil, b.err
	}
	if len(p.keys) == 0 {
		return nil, fmt.Errorf("%w: the identity names nothing", ErrInvalid)
	}

	if p.acting = p.agents; len(p.agents) == 0 && id.Client != "" {
		// Not a key: a decision on the agent does not match by it.
		if t, err := (Term{Kind: KindAgent, Issuer: id.Issuer, Value: id.Client}).canonical(); err == nil {
			p.acting = []Digest{s.valueDigest(t.Kind, t.Issuer, t.Value)}
		}
	}
	for _, agent := range p.agents {
		b.join(ShapeUserAgent, p.user, agent)
		b.join(ShapeAgentClient, agent, client)
	}
	b.join(ShapeUserClient, p.user, client)

	// What a call can add: tool, audience, and their conjunctions.
	p.perCall = 2 + 2*len(p.agents) + len(p.sessions)
	if p.user != (Digest{}) {
		p.perCall += 1 + len(p.agents)
	}
	// Two more: the global and tenant entries.
	if n := 2 + len(p.keys) + p.perCall; n > MaxProbes {
		return nil, fmt.Errorf("%w: the identity needs %d probes, at most %d: shorten its chain, roles or capabilities", ErrInvalid, n, MaxProbes)
	}
	p.noteOrigin(id.AuthTime)
	if id.FixedIssue {
		p.noteOrigin(id.IssuedAt)
	}
	p.auth, p.expires = InstantOf(id.AuthTime), InstantOf(id.Expires)
	// Sessions are spread evenly by the digest of the outermost one, so that a
	// delegation tree is restored as a whole. Without a session, what the next
	// token will name again comes before the token, and the issuer, which all
	// share, comes last.
	root := p.keys[len(p.keys)-1].Digest
	switch {
	case len(p.sessions) > 0:
		root = p.sessions[len(p.sessions)-1]
	case p.user != Digest{}:
		root = p.user
	case client != Digest{}:
		root = client
	case len(p.agents) > 0:
		root = p.agents[len(p.agents)-1]
	}
	p.bucket = uint16(binary.BigEndian.Uint64(root[:8]) % ShareUnit)
	return p, nil
}

func (p *Prepared) noteOrigin(t time.Time) {
	if i := InstantOf(t); i != 0 && (p.origin == 0 || i < p.origin) {
		p.origin = i
	}
}

type keyBuilder struct {
	p   *Prepared
	err error
}

// add derives the key of a value, if there is one, and returns its digest.
func (b *keyBuilder) add(kind Kind, issuer, value string) Digest {
	if value == "" || b.err != nil {
		return Digest{}
	}
	t, err := Term{Kind: kind, Issuer: issuer, Value: value}.canonical()
	if err != nil {
		b.err = err
		return Digest{}
	}
	if len(b.p.keys) >= MaxProbes {
		b.err = fmt.Errorf("%w: the identity needs more than %d probes", ErrInvalid, MaxProbes)
		return Digest{}
	}
	d := b.p.secret.valueDigest(t.Kind, t.Issuer, t.Value)
	b.p.push(Shape(kind), d)
	return d
}

func (b *keyBuilder) join(shape Shape, d ...Digest) {
	for i := range d {
		if d[i] == (Digest{}) {
			return
		}
	}
	b.p.push(shape, b.p.secret.joinDigest(shape, d...))
}

func (p *Prepared) push(shape Shape, d Digest) {
	k := Key{Tenant: p.secret.id, Shape: shape, Digest: d}
	if slices.Contains(p.keys, k) {
		return
	}
	p.keys = append(p.keys, k)
	p.shapes = p.shapes.With(shape)
}

func or(a, b string) string {
	if a != "" {
		return a
	}
	return b
}

// Identity returns what was prepared. Its slices must not be changed.
func (p *Prepared) Identity() Identity { return p.id }

// Tenant returns the number of the identity's tenant.
func (p *Prepared) Tenant() TenantID { return p.secret.id }

// Keys returns the keys that hold for every call of this identity, without the
// global and tenant keys. The slice must not be changed.
func (p *Prepared) Keys() []Key { return p.keys }

// Shapes returns the shapes of Keys.
func (p *Prepared) Shapes() ShapeSet { return p.shapes }

// Expires returns when the credential ends; zero when it does not say.
func (p *Prepared) Expires() Instant { return p.expires }

// Agents returns the digests of the agents of the delegation chain, the current
// one first. Of an identity without a chain it is that of the agent which has the
// client's id as its own. The slice must not be changed.
func (p *Prepared) Agents() []Digest { return p.acting }

// Presented returns the digests that the credential shows of the caller's code,
// model and image. The slice must not be changed.
func (p *Prepared) Presented() []SortedDigest { return p.presented }

// ArgumentDigest is that of the tenant's secret.
func (p *Prepared) ArgumentDigest(args []byte) Hash { return p.secret.ArgumentDigest(args) }

// Valid reports whether p was made by Prepare.
func (p *Prepared) Valid() bool { return p != nil && p.secret != nil }

// CallKeys appends to buf the keys that this call adds, for the shapes in want,
// and returns the result. call must not be nil. It allocates nothing when buf
// has room for MaxProbes keys and an audience is in canonical form. A tool or audience that has no canonical form is an error wrapping
// ErrNoIdentity, since what cannot be named cannot be shown to be permitted.
func (p *Prepared) CallKeys(buf []Key, call *Call, want ShapeSet) ([]Key, error) {
	if !p.Valid() {
		return buf, &DeniedError{Err: ErrNoIdentity}
	}
	if want&PerCallShapes == 0 {
		return buf, nil
	}
	s := p.secret
	if call.Tool != "" && want&toolShapes != 0 {
		if _, err := Canonical(KindTool, call.Tool); err != nil {
			return buf, &DeniedError{Err: ErrNoIdentity, Detail: "the tool name is malformed"}
		}
		tool := s.valueDigest(KindTool, "", call.Tool)
		push := func(shape Shape, d Digest) { buf = append(buf, Key{Tenant: s.id, Shape: shape, Digest: d}) }
		if want.Has(Shape(KindTool)) {
			push(Shape(KindTool), tool)
		}
		hasUser := p.user != Digest{}
		if hasUser && want.Has(ShapeUserTool) {
			push(ShapeUserTool, s.joinDigest(ShapeUserTool, p.user, tool))
		}
		for i := range p.agents {
			if want.Has(ShapeAgentTool) {
				push(ShapeAgentTool, s.joinDigest(ShapeAgentTool, p.agents[i], tool))
			}
			if hasUser && want.Has(ShapeUserAgentTool) {
				push(ShapeUserAgentTool, s.joinDigest(ShapeUserAgentTool, p.user, p.agents[i], tool))
			}
		}
		if want.Has(ShapeSessionTool) {
			for i := range p.sessions {
				push(ShapeSessionTool, s.joinDigest(ShapeSessionTool, p.sessions[i], tool))
			}
		}
	}
	if call.Audience != "" && want&audienceShapes != 0 {
		audience, err := Canonical(KindAudience, call.Audience)
		if err != nil {
			return buf, &DeniedError{Err: ErrNoIdentity, Detail: "the audience is malformed"}
		}
		d := s.valueDigest(KindAudience, "", audience)
		if want.Has(Shape(KindAudience)) {
			buf = append(buf, Key{Tenant: s.id, Shape: Shape(KindAudience), Digest: d})
		}
		if want.Has(ShapeAgentAudience) {
			for i := range p.agents {
				buf = append(buf, Key{Tenant: s.id, Shape: ShapeAgentAudience, Digest: s.joinDigest(ShapeAgentAudience, p.agents[i], d)})
			}
		}
	}
	return buf, nil
}

var (
	toolShapes = ShapeSet(0).With(Shape(KindTool)).With(ShapeUserTool).
			With(ShapeAgentTool).With(ShapeSessionTool).With(ShapeUserAgentTool)
	audienceShapes = ShapeSet(0).With(Shape(KindAudience)).With(ShapeAgentAudience)
)

// By reports whether p was prepared under this secret.
func (p *Prepared) By(s *TenantSecret) bool { return p.secret == s }

// Skew returns how far the issuer's clock may be off.
func (p *Prepared) Skew() time.Duration { return p.skew }
