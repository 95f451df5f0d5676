package authority

import (
	"errors"
	"slices"
	"strings"

	"github.com/interlock-fabric/interlock/pkg/authority"
	"github.com/interlock-fabric/interlock/pkg/credential"
	"github.com/interlock-fabric/interlock/pkg/filter"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// explain says which entries in force match a caller. Nothing of the caller is
// kept. Errors are Problems.
func (p *planner) explain(r *authority.ExplainRequest) (*authority.Explanation, error) {
	var id session.Identity
	switch {
	case (r.Identity == nil) == (len(r.Claims) == 0):
		return nil, invalid("give one of them", "an explanation is of either an identity or a token's claims")
	case r.Identity != nil && r.SigningInputHash != "":
		return nil, invalid("put it in the identity's token", "signing_input_hash goes with claims")
	case r.Identity != nil && r.Tenant != "":
		return nil, invalid("put it in the identity", "tenant goes with claims")
	case r.Identity != nil && len(r.Identity.ACR) > session.MaxACRLen:
		return nil, invalid("give the one that the token has", "the identity's acr is longer than %d bytes", session.MaxACRLen)
	case r.Identity != nil:
		id = p.identity(r.Identity)
	default:
		var err error
		if id, err = credential.Unverified(r.Claims, credential.Claims{}); err != nil {
			return nil, invalid("give the payload of a JWT that its host would not refuse for its form", "%s", err)
		}
		if id.Token == "" {
			id.Token = r.SigningInputHash
		}
		id.Tenant = r.Tenant
	}
	secret, err := p.tenants.resolve(id.Tenant)
	if err != nil {
		return nil, err
	}
	id.Tenant = secret.Name()
	prepared, err := secret.Prepare(id)
	if err != nil {
		if errors.Is(err, session.ErrNoIssuer) {
			return nil, authority.NewProblem(authority.ProblemIssuer, "the caller's ids are not unique without the issuer that minted them",
				"give --issuer or set INTERLOCK_ISSUER (in the API: the identity's issuer)")
		}
		return nil, invalid("see session-authority explain --help", "%s", plain(err))
	}
	call := session.Call{Tool: r.Tool, Audience: r.Audience, LowRisk: r.LowRisk}
	return explain(p.state, prepared, &call, session.InstantOf(p.now))
}

func explain(state *filter.Set, p *session.Prepared, call *session.Call, now session.Instant) (*authority.Explanation, error) {
	moment := session.Moment{Authority: now}
	keys := append([]session.Key{session.GlobalKey(), session.TenantKey(p.Tenant())}, p.Keys()...)
	keys, err := p.CallKeys(keys, call, session.PerCallShapes)
	if err != nil {
		return nil, invalid("check the tool and the audience", "%s", plain(err))
	}
	x := &authority.Explanation{Verdict: "allowed", Checked: len(keys)}
	for _, k := range keys {
		records := state.Lookup(k)
		for i := range records {
			m := match(&records[i], k.Shape)
			m.Exempted = slices.ContainsFunc(p.Keys(), func(k session.Key) bool { return slices.Contains(records[i].Except, k) })
			if records[i].Matches(p, call, moment) {
				x.Matches = append(x.Matches, m)
			} else {
				x.Nearby = append(x.Nearby, m)
			}
		}
	}
	strongest := func(a, b authority.Match) int { return rank(b) - rank(a) }
	slices.SortStableFunc(x.Matches, strongest)
	slices.SortStableFunc(x.Nearby, strongest)
	// The verdict comes from the very code that enforcers run.
	d, err := state.Decide(p, call, moment)
	if err != nil {
		return nil, invalid("check the tool and the audience", "%s", plain(err))
	}
	if d.Record != nil {
		denied := session.DeniedError{Denial: d.Record.Denial(d.Shape, false), Err: d.Record.Effect.Sentinel()}
		x.Denied, x.Verdict = true, strings.TrimPrefix(denied.Error(), session.ErrDenied.Error()+": ")
	}
	return x, nil
}

func rank(m authority.Match) int {
	e, err := session.ParseEffect(m.Effect)
	if err != nil {
		return 0
	}
	n := 2 * int(e)
	if !m.Drill {
		n++
	}
	return n
}

func match(r *session.Record, shape session.Shape) authority.Match {
	return authority.Match{
		Effect: r.Effect.String(), On: shape.String(), Reason: r.Reason.String(), Incident: r.Incident,
		Number: r.Seq, Since: r.Since.Time(), Expires: r.Expires.Time(), IssuedBefore: r.IssuedBefore.Time(),
		ACR: r.ACR, Share: float64(r.Share) * 100 / session.ShareUnit, Drill: r.Drill, Exempt: exempt(r.Except),
	}
}

func (p *planner) identity(in *authority.Identity) session.Identity {
	id := session.Identity{
		Tenant: in.Tenant, Issuer: in.Issuer, Token: in.Token,
		Session: session.SessionRef{ID: in.Session, Start: in.SessionStart}, User: in.User,
		Client: in.Client, Keys: in.Keys, Credentials: in.Credentials, Digests: in.Digests,
		Blueprint: in.Blueprint, Owner: in.Owner, Roles: in.Roles, Capabilities: in.Capabilities,
		IssuedAt: in.IssuedAt, AuthTime: in.AuthTime, ACR: in.ACR,
	}
	if id.Issuer == "" && len(p.issuers) == 1 {
		id.Issuer = p.issuers[0]
	}
	for _, s := range in.Ancestors {
		id.Ancestors = append(id.Ancestors, session.SessionRef{ID: s})
	}
	for _, a := range in.Actors {
		id.Actors = append(id.Actors, session.Actor{ID: a})
	}
	return id
}
