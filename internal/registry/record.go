package registry

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/interlock-fabric/interlock/pkg/session"
)

// Bounds of what is registered. A value of a kind of target is also bounded as
// session.Canonical says.
const (
	MaxPurpose      = 1024 // bytes
	MaxEnvironment  = 64   // bytes
	MaxCapabilities = 64
	MaxDigests      = 16
	MaxChain        = 16 // agents behind the session's own
	MaxKeys         = 8
	MaxCredentials  = 16
	// MaxLifetime is how far ahead a session's expiry may be.
	MaxLifetime = 366 * 24 * time.Hour
	// maxSkew is how far ahead of this clock a session may have been issued.
	maxSkew = 5 * time.Minute
	// Grace is how long a session that has expired is still listed, and its id
	// refused for another.
	Grace = time.Hour

	// MaxSessions and MaxAgents bound the index; MaxTenantSessions and
	// MaxTenantAgents what one tenant can have of it.
	MaxSessions       = 1_000_000
	MaxTenantSessions = 500_000
	MaxAgents         = 100_000
	MaxTenantAgents   = 50_000

	// MaxNotes bounds the notes, and MaxNote the content of one, in bytes.
	MaxNotes = 4096
	MaxNote  = 64 << 10

	// MaxUnit bounds the sessions that are registered together, all or none.
	MaxUnit = 1000
)

// The reasons for which a registration is refused. What is malformed wraps
// session.ErrInvalid.
var (
	// ErrConflict: the id is registered with another content.
	ErrConflict = errors.New("registry: registered already, with another content")
	// ErrTombstone: the id was decommissioned, and is never used again.
	ErrTombstone = errors.New("registry: decommissioned: the id cannot be used again")
	// ErrNotActive: the session's agent is suspended or decommissioned.
	ErrNotActive = errors.New("registry: the agent is suspended or decommissioned")
	// ErrDigest: a digest was presented that is not a registered one of the agent.
	ErrDigest = errors.New("registry: not a registered digest of the agent")
	// ErrUnknown: nothing of that id is registered.
	ErrUnknown = errors.New("registry: not registered")
	// ErrTooLarge: what is to be registered together does not fit a batch.
	ErrTooLarge = errors.New("registry: too much at once")
	// ErrFull: the registry, or the tenant's part of it, is full.
	ErrFull = errors.New("registry: full")
	// ErrBusy: too much waits for the store already.
	ErrBusy = errors.New("registry: busy")
	// ErrUnavailable: the store does not answer. Whether the registration was
	// stored is not known; it may be sent again.
	ErrUnavailable = errors.New("registry: the store does not answer")
	// ErrKey: no sealing key that the key set names is here.
	ErrKey = errors.New("registry: the sealing key is not here")
	// ErrHole: the log has a hole that no snapshot covers.
	ErrHole = errors.New("registry: the log has a hole")
	// ErrUpgrade: the log was written by a later version.
	ErrUpgrade = errors.New("registry: the log has what this version cannot read")
	// ErrClosed: the registry was closed. What was being registered may be stored.
	ErrClosed = errors.New("registry: closed")
)

// Ref names an agent or a session within a tenant. Issuer is empty where the id
// is unique by itself.
type Ref struct {
	Issuer string `json:"i,omitempty"`
	ID     string `json:"n"`
}

// State is where an agent is in its life.
type State string

// The states. From Decommissioned nothing leads back.
const (
	Registered     State = "registered"
	Active         State = "active"
	Suspended      State = "suspended"
	Decommissioned State = "decommissioned"
)

// Agent is what is registered of an agent.
type Agent struct {
	Tenant string `json:"t"`
	Ref
	Owner        string   `json:"o,omitempty"`
	Purpose      string   `json:"p,omitempty"`
	Environment  string   `json:"e,omitempty"`
	Blueprint    string   `json:"b,omitempty"`
	Capabilities []string `json:"c,omitempty"` // sorted
	Digests      []string `json:"d,omitempty"` // sorted; see session.KindDigest
}

// AgentRecord is an agent with what the registry adds.
type AgentRecord struct {
	Agent
	State State           `json:"s"`
	Since session.Instant `json:"z"` // of State
	At    session.Instant `json:"r"` // when it was registered
	// Revision changes with every change.
	Revision uint64 `json:"v"`
	// Cause is the decision by which the state was last made to deny; nil is none.
	Cause *Cause `json:"y,omitempty"`
}

// Cause names the decision that suspended or ended an agent together with its
// state, so that activating the agent lifts that one and no other.
type Cause struct {
	Epoch  uint64 `json:"e"`
	Number uint64 `json:"n"`
	// Over is the batch of another suspension that was in force already, in the
	// same epoch, and Until its end, 0 for none: both are in force as one, and it
	// outlasts the agent's activation.
	Over  uint64          `json:"o,omitempty"`
	Until session.Instant `json:"u,omitempty"`
}

// Session is what is registered of a session. It has no token, nor anything that
// could be presented as one.
type Session struct {
	Tenant string `json:"t"`
	Ref
	// Agent is who holds it, and Chain who acts through that agent, the nearest
	// first (RFC 8693 nested act).
	Agent  Ref    `json:"a,omitzero"`
	Chain  []Ref  `json:"h,omitempty"`
	User   string `json:"u,omitempty"`
	Client string `json:"l,omitempty"`
	// Parent is the session from which it descends.
	Parent      Ref             `json:"p,omitzero"`
	Keys        []string        `json:"k,omitempty"` // sorted; thumbprints
	Credentials []string        `json:"c,omitempty"` // sorted; ids
	Digests     []string        `json:"d,omitempty"` // sorted; presented
	Issued      session.Instant `json:"b,omitempty"`
	Expires     session.Instant `json:"e"`
}

// canonical brings the agent to the form under which it is kept. The error wraps
// session.ErrInvalid.
func (a *Agent) canonical() (err error) {
	if a.Ref, err = canonicalRef(a.Tenant, session.KindAgent, a.Ref); err != nil {
		return err
	}
	for _, f := range []struct {
		kind  session.Kind
		value *string
	}{{session.KindOwner, &a.Owner}, {session.KindBlueprint, &a.Blueprint}} {
		if *f.value != "" {
			if *f.value, err = session.Canonical(f.kind, *f.value); err != nil {
				return err
			}
		}
	}
	if err := text("purpose", a.Purpose, MaxPurpose); err != nil {
		return err
	}
	if err := text("environment", a.Environment, MaxEnvironment); err != nil {
		return err
	}
	if a.Capabilities, err = canonicalSet(session.KindCapability, a.Capabilities, MaxCapabilities); err != nil {
		return err
	}
	a.Digests, err = canonicalSet(session.KindDigest, a.Digests, MaxDigests)
	return err
}

func (a *Agent) equal(b *Agent) bool {
	return a.Tenant == b.Tenant && a.Ref == b.Ref && a.Owner == b.Owner && a.Purpose == b.Purpose && a.Environment == b.Environment &&
		a.Blueprint == b.Blueprint && slices.Equal(a.Capabilities, b.Capabilities) && slices.Equal(a.Digests, b.Digests)
}

// canonical brings the session to the form under which it is kept. The error wraps
// session.ErrInvalid.
func (s *Session) canonical(now time.Time) (err error) {
	issuer := s.Issuer
	if s.Ref, err = canonicalRef(s.Tenant, session.KindSession, s.Ref); err != nil {
		return err
	}
	// Links without an issuer are of the session's own.
	link := func(kind session.Kind, r *Ref) error {
		if r.ID == "" && r.Issuer == "" {
			return nil
		}
		if r.Issuer == "" {
			r.Issuer = issuer
		}
		var err error
		*r, err = canonicalRef(s.Tenant, kind, *r)
		return err
	}
	if err := link(session.KindAgent, &s.Agent); err != nil {
		return err
	}
	if err := link(session.KindSession, &s.Parent); err != nil {
		return err
	}
	if s.Parent == s.Ref {
		return fmt.Errorf("%w: a session is not its own parent", session.ErrInvalid)
	}
	switch {
	case len(s.Chain) > MaxChain:
		return fmt.Errorf("%w: a chain of %d, at most %d", session.ErrInvalid, len(s.Chain), MaxChain)
	case len(s.Chain) > 0 && s.Agent == Ref{}:
		return fmt.Errorf("%w: a chain without the agent that holds the session", session.ErrInvalid)
	}
	s.Chain = slices.Clone(s.Chain)
	for i := range s.Chain {
		if s.Chain[i] == (Ref{}) {
			return fmt.Errorf("%w: an empty link in the chain", session.ErrInvalid)
		}
		if err := link(session.KindAgent, &s.Chain[i]); err != nil {
			return err
		}
	}
	if len(s.Chain) == 0 {
		s.Chain = nil
	}
	for _, f := range []struct {
		kind  session.Kind
		value string
	}{{session.KindUser, s.User}, {session.KindClient, s.Client}} {
		if f.value != "" {
			if _, err := session.Canonical(f.kind, f.value); err != nil {
				return err
			}
			if err := notToken(f.kind.String(), f.value); err != nil {
				return err
			}
		}
	}
	if s.Keys, err = canonicalSet(session.KindKey, s.Keys, MaxKeys); err != nil {
		return err
	}
	if s.Credentials, err = canonicalSet(session.KindCredential, s.Credentials, MaxCredentials); err != nil {
		return err
	}
	if s.Digests, err = canonicalSet(session.KindDigest, s.Digests, MaxDigests); err != nil {
		return err
	}
	end := session.InstantOf(now)
	switch {
	case s.Expires <= 0:
		return fmt.Errorf("%w: a session without an expiry", session.ErrInvalid)
	case s.Expires <= end:
		return fmt.Errorf("%w: the session has expired", session.ErrInvalid)
	case s.Expires > end.Add(MaxLifetime):
		return fmt.Errorf("%w: the session would expire in more than %d days", session.ErrInvalid, int(MaxLifetime.Hours()/24))
	case s.Issued < 0 || s.Issued > end.Add(maxSkew) || s.Issued > s.Expires:
		return fmt.Errorf("%w: the session's time of issue is not in the past", session.ErrInvalid)
	}
	return nil
}

func (s *Session) equal(b *Session) bool {
	return s.Tenant == b.Tenant && s.Ref == b.Ref && s.Agent == b.Agent && slices.Equal(s.Chain, b.Chain) && s.User == b.User &&
		s.Client == b.Client && s.Parent == b.Parent && slices.Equal(s.Keys, b.Keys) && slices.Equal(s.Credentials, b.Credentials) &&
		slices.Equal(s.Digests, b.Digests) && s.Issued == b.Issued && s.Expires == b.Expires
}

func canonicalRef(tenant string, kind session.Kind, r Ref) (Ref, error) {
	t, _, err := session.Target{Tenant: tenant, Terms: []session.Term{{Kind: kind, Issuer: r.Issuer, Value: r.ID}}}.Canonical()
	if err != nil {
		return Ref{}, err
	}
	if err := notToken(kind.String(), r.ID); err != nil {
		return Ref{}, err
	}
	return Ref{Issuer: t.Terms[0].Issuer, ID: t.Terms[0].Value}, nil
}

// canonicalSet sorts a list of values and refuses one that is there twice.
func canonicalSet(kind session.Kind, in []string, limit int) ([]string, error) {
	if len(in) == 0 {
		return nil, nil
	}
	if len(in) > limit {
		return nil, fmt.Errorf("%w: %d values of %s, at most %d", session.ErrInvalid, len(in), kind, limit)
	}
	out := make([]string, len(in))
	for i, v := range in {
		var err error
		if out[i], err = session.Canonical(kind, v); err != nil {
			return nil, err
		}
		if err := notToken(kind.String(), v); err != nil {
			return nil, err
		}
	}
	slices.Sort(out)
	if n := len(out); len(slices.Compact(out)) != n {
		return nil, fmt.Errorf("%w: a %s is named twice", session.ErrInvalid, kind)
	}
	return out, nil
}

// notToken refuses what looks like a JWS or JWE: the registry keeps ids and
// thumbprints, and whoever sends a token has mistaken the field.
func notToken(what, v string) error {
	if strings.HasPrefix(v, "eyJ") && strings.Count(v, ".") >= 2 {
		return fmt.Errorf("%w: %s is a token: give its id or thumbprint", session.ErrInvalid, what)
	}
	return nil
}

func text(what, v string, limit int) error {
	switch {
	case len(v) > limit:
		return fmt.Errorf("%w: %s is %d bytes, at most %d", session.ErrInvalid, what, len(v), limit)
	case !utf8.ValidString(v) || strings.ContainsFunc(v, unicode.IsControl):
		return fmt.Errorf("%w: %s is not plain text", session.ErrInvalid, what)
	}
	return nil
}
