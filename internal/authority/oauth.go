package authority

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/interlock-fabric/interlock/internal/access"
	"github.com/interlock-fabric/interlock/internal/api"
	"github.com/interlock-fabric/interlock/internal/issuers"
	"github.com/interlock-fabric/interlock/pkg/authority"
	"github.com/interlock-fabric/interlock/pkg/credential"
	"github.com/interlock-fabric/interlock/pkg/enforce"
	"github.com/interlock-fabric/interlock/pkg/natsfeed"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// The incidents of what standard protocols ask for: they have no room for one.
const (
	incidentToken   = "RFC 7009"
	incidentSubject = "Global Token Revocation"
)

// againLater is how many seconds a client is told to wait when a token can be
// verified, or a state shown to be fresh, only later.
const againLater = 2

// tokens verifies the tokens of callers. The zero value knows no issuer.
type tokens struct {
	mu  sync.Mutex
	now *tokenSet
}

// tokenSet is what one configuration comes to. Who uses it keeps it open.
type tokenSet struct {
	*issuers.Tokens
	verifier *credential.Verifier
	// enforcer says what is denied: an enforcer as any other, which is in no roster
	// and sends no receipts.
	enforcer *enforce.Enforcer
	users    sync.WaitGroup
}

func (s *tokenSet) close() error {
	s.users.Wait()
	s.verifier.Close()
	return s.enforcer.Close()
}

// use returns what is configured now, until done is called; nil where nothing is.
func (t *tokens) use() (s *tokenSet, done func()) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.now == nil {
		return nil, func() {}
	}
	t.now.users.Add(1)
	return t.now, t.now.users.Done
}

// set puts another configuration in force, or none, and ends the one before it when
// nobody uses that any more.
func (t *tokens) set(s *tokenSet) error {
	t.mu.Lock()
	old := t.now
	t.now = s
	t.mu.Unlock()
	if old == nil {
		return nil
	}
	return old.close()
}

// mute is a feed for an enforcer of the authority's own: whether that has applied a
// decision is nobody's coverage.
type mute struct{ *natsfeed.Feed }

func (mute) Receipt(context.Context, []byte) error { return nil }

// newTokens makes what a configuration asks for. Until its enforcer has heard of a
// fresh state, everything is denied as stale.
func (a *Authority) newTokens(c *issuers.Tokens) (*tokenSet, error) {
	var tenants []string
	for _, i := range c.Issuers {
		if _, ok := a.store.KeySet().Tenant(i.Tenant); !ok {
			return nil, fmt.Errorf("%w: issuer %s: no tenant %s", issuers.ErrInvalid, i.URL, i.Tenant)
		}
		if !slices.Contains(tenants, i.Tenant) {
			tenants = append(tenants, i.Tenant)
		}
	}
	v, err := c.Verifier(credential.Options{Possession: toldOn})
	if err != nil {
		return nil, err
	}
	name := "introspection-" + strings.ToLower(rand.Text()[:12])
	// Nothing connects with this enrolment: the connection is the authority's.
	en, _, err := a.store.Enroll(name, tenants, []string{"nats://127.0.0.1"}, "")
	if err != nil {
		v.Close()
		return nil, err
	}
	e, err := enforce.Start(mute{natsfeed.NewAuthority(a.nc, name)}, &enforce.Options{Enrollment: en, Logger: a.log})
	if err != nil {
		v.Close()
		return nil, err
	}
	return &tokenSet{Tokens: c, verifier: v, enforcer: e}, nil
}

// toldOn accepts a token that is bound to keys which an introspection tells on, so
// that the proof of them can be asked for where it is used.
func toldOn(_ *http.Request, _ string, id session.Identity) error {
	if len(id.Keys) == 0 {
		return errors.New("the token is bound in a way that cannot be told on")
	}
	return nil
}

func noTokens() *authority.Problem {
	return authority.NewProblem(authority.ProblemNotFound, "no issuers of callers' tokens are configured", "serve with --tokens FILE")
}

func later(why string) error {
	return &api.OAuthError{Status: http.StatusServiceUnavailable, Code: "temporarily_unavailable", Description: why, RetryAfter: againLater}
}

// RevokeToken revokes a token that is good, and in a tenant that the principal
// sees; it is the API's.
func (a *Authority) RevokeToken(ctx context.Context, token string) error {
	t, done := a.tokens.use()
	defer done()
	if t == nil {
		return noTokens()
	}
	p := access.From(ctx)
	id, err := t.verifier.Verify(ctx, token)
	switch {
	case errors.Is(err, session.ErrStale):
		return later("the token cannot be verified now, and must be taken to be good")
	case errors.Is(err, credential.ErrTokenNotYet):
		return &api.OAuthError{Status: http.StatusBadRequest, Code: "invalid_request", Description: "the token is not valid yet: revoke it when it is, or its session now"}
	case errors.Is(err, credential.ErrTokenPossession), errors.Is(err, credential.ErrTokenMalformed) && opaque(token):
		return &api.OAuthError{Status: http.StatusBadRequest, Code: "unsupported_token_type", Description: "tokens of this kind cannot be verified here: revoke the session or the user"}
	case err == nil && !p.Visible().Has(id.Tenant):
		err = credential.ErrTokenIssuer // as for one of an issuer that is not configured
	}
	if err != nil {
		a.noteFor(ctx, authority.AuditRecord{Kind: authority.AuditDecision, Action: string(authority.Revoke), Incident: incidentToken,
			Outcome: authority.OutcomeRefused, Error: err.Error(), Detail: "a token was presented: nothing was done"})
		return nil
	}
	r := authority.Request{Operation: authority.Revoke, Reason: session.ReasonLogout.String(), Incident: incidentToken, Commit: true,
		Targets: []authority.Target{authority.One(id.Tenant, session.KindToken.String(), id.Issuer, id.Token)}}
	if !id.Expires.IsZero() {
		r.Expires = id.Expires.Add(id.Skew + time.Minute) // it is good for as long as the skew
	}
	if err := a.revoke(ctx, access.RevokeToken, r); err != nil || t.Revoke != issuers.OfSession || id.Session.ID == "" {
		return err
	}
	// The session may outlive the token, and end nobody knows when.
	r.Expires = time.Time{}
	r.Targets = []authority.Target{authority.One(id.Tenant, session.KindSession.String(), cmp.Or(id.Session.Issuer, id.Issuer), id.Session.ID)}
	return a.revoke(ctx, access.RevokeToken, r)
}

// opaque reports whether a token has not the three parts of a JWS.
func opaque(token string) bool { return strings.Count(token, ".") != 2 }

// RevokeSubject revokes whatever a user holds from before now; it is the API's. It
// is where a security event about a subject would arrive, too.
func (a *Authority) RevokeSubject(ctx context.Context, sub api.SubjectID) error {
	t, done := a.tokens.use()
	defer done()
	if t == nil {
		return noTokens()
	}
	target, err := subject(t.Tokens, access.From(ctx).Visible(), sub)
	if err != nil {
		return err
	}
	return a.revoke(ctx, access.RevokeSubject, authority.Request{
		Operation: authority.Revoke, Reason: session.ReasonLogout.String(), Incident: incidentSubject, Commit: true,
		IssuedBefore: time.Now(), Targets: []authority.Target{target},
	})
}

// subject finds the user whom a subject identifier names (RFC 9493). Issuers of
// tenants that are not visible do not exist.
func subject(c *issuers.Tokens, visible access.Scope, sub api.SubjectID) (authority.Target, error) {
	format, value, asked := sub.Format, "", ""
	sub.Format = ""
	switch {
	case format == "iss_sub" && sub == api.SubjectID{Issuer: sub.Issuer, Subject: sub.Subject}:
		asked, value = sub.Issuer, sub.Subject
	case format == "opaque" && sub == api.SubjectID{ID: sub.ID}:
		value = sub.ID
	case format == "email" && sub == api.SubjectID{Email: sub.Email}:
		value = sub.Email
		if asked = c.EmailIssuer; asked == "" {
			return authority.Target{}, invalid("use iss_sub", "users are not known by their email addresses")
		}
	default:
		return authority.Target{}, invalid("use iss_sub, opaque or email, with the members of that format and no others", "unsupported subject identifier %.64q", format)
	}
	switch {
	case value == "":
		return authority.Target{}, invalid("name the user", "the subject identifier names nobody")
	case len(asked) > session.MaxValueLen:
		return authority.Target{}, invalid("name one of the configuration", "the issuer is longer than %d bytes", session.MaxValueLen)
	}
	var of []*issuers.Issuer
	for i := range c.Issuers {
		if x := &c.Issuers[i]; visible.Has(x.Tenant) && (asked == x.URL || asked == "" && format == "opaque") {
			of = append(of, x)
		}
	}
	switch len(of) {
	case 0:
		return authority.Target{}, authority.NewProblem(authority.ProblemNotFound, "no such user", "name an issuer of the configuration")
	case 1:
		return authority.One(of[0].Tenant, session.KindUser.String(), of[0].URL, value), nil
	}
	return authority.Target{}, invalid("use iss_sub", "there is more than one issuer, and the id does not say whose it is")
}

// revoke takes and records a decision that a standard protocol asks for. op is what
// the principal must be permitted in its tenant.
func (a *Authority) revoke(ctx context.Context, op access.Operation, r authority.Request) error {
	d, err := func() (*authority.Decision, error) {
		p := access.From(ctx)
		pl, err := a.planner(p).plan(&r)
		if err != nil {
			return nil, err
		}
		wide := false
		for _, t := range pl.touched {
			if err := p.CheckIn(op, t.tenant); err != nil {
				return nil, err
			}
			wide = wide || t.wide
		}
		if wide {
			if err := a.wide.admit(p, time.Now()); err != nil {
				return nil, err
			}
		}
		return a.commit(ctx, rand.Text(), &r, pl)
	}()
	_, err = a.decided(ctx, &r, d, err, string(op))
	return err
}

// Introspect says whether a token is good, and nothing denies it, at one of the
// resources at least that it is for; it is the API's. To whoever does not see its
// tenant, no token is.
func (a *Authority) Introspect(ctx context.Context, token string) (*api.Introspection, error) {
	t, done := a.tokens.use()
	defer done()
	if t == nil {
		return nil, noTokens()
	}
	inactive := &api.Introspection{}
	id, audiences, err := t.verifier.VerifyAudiences(ctx, token)
	switch {
	case errors.Is(err, session.ErrStale):
		return nil, later("the token cannot be verified now")
	case err != nil || !access.From(ctx).Scope(access.Introspect).Has(id.Tenant):
		return inactive, nil
	}
	prepared, err := t.enforcer.Prepare(id)
	if err != nil {
		return inactive, nil
	}
	now := session.Moment{Authority: session.InstantOf(time.Now())}
	var here []string
	for _, aud := range audiences {
		call := session.Call{Audience: aud}
		switch err := t.enforcer.Check(prepared, call); {
		case errors.Is(err, session.ErrStale):
			return nil, later("what is revoked is not known for certain now")
		case err != nil:
			continue
		}
		// What was acknowledged here counts, though the enforcer is yet to hear it.
		if m, err := a.seq.State().Decide(prepared, &call, now); err == nil && m.Record == nil {
			here = append(here, aud)
		}
	}
	if len(here) == 0 {
		return inactive, nil
	}
	return introspection(&id, here), nil
}

// introspection tells what makes an identity, so that whoever asks comes to the
// same one.
func introspection(id *session.Identity, audiences []string) *api.Introspection {
	at := func(t time.Time) float64 {
		if t.IsZero() {
			return 0
		}
		return float64(t.UnixMilli()) / 1000
	}
	i := &api.Introspection{
		Active: true, Issuer: id.Issuer, Subject: id.User, ID: id.Token, Audience: audiences, ClientID: id.Client,
		Expires: at(id.Expires), IssuedAt: at(id.IssuedAt), AuthTime: at(id.AuthTime), ACR: id.ACR, Transaction: id.Transaction,
		Session: id.Session.ID, Start: at(id.Session.Start), Roles: id.Roles, Digests: id.Digests, Credentials: id.Credentials,
		Blueprint: id.Blueprint, Owner: id.Owner,
	}
	if slices.ContainsFunc(id.Capabilities, func(c string) bool { return strings.ContainsAny(c, " \t\r\n") }) {
		i.Capabilities = id.Capabilities
	} else {
		i.Scope = strings.Join(id.Capabilities, " ")
	}
	for _, s := range id.Ancestors {
		i.Ancestors = append(i.Ancestors, api.SessionAncestor{Issuer: s.Issuer, ID: s.ID, Start: at(s.Start)})
	}
	for _, x := range slices.Backward(id.Actors) {
		i.Actor = &api.Actor{Issuer: x.Issuer, Subject: x.ID, Before: i.Actor}
	}
	for _, k := range id.Keys {
		if i.Keys == nil {
			i.Keys = &api.Confirmation{}
		}
		if v, ok := strings.CutPrefix(k, "jkt:"); ok {
			i.Keys.JKT = v
		} else if v, ok := strings.CutPrefix(k, "x5t#S256:"); ok {
			i.Keys.X5T = v
		}
	}
	return i
}
