package authority

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/interlock-fabric/interlock/pkg/authority"
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
	case r.Identity != nil:
		id = p.identity(r.Identity)
	default:
		var err error
		if id, err = claimsIdentity(r.Claims, r.SigningInputHash); err != nil {
			return nil, err
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
		if strings.Contains(err.Error(), "needs the issuer") {
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
		ACR: r.ACR, Share: float64(r.Share) * 100 / session.ShareUnit, Drill: r.Drill,
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

// claimSet is what is read of a token's claims: those that name something an
// entry can be about, under their registered and their default names.
type claimSet struct {
	Issuer       string         `json:"iss"`
	Subject      string         `json:"sub"`
	ID           string         `json:"jti"`
	Session      string         `json:"sid"`
	SessionStart numericDate    `json:"session_start"`
	Ancestors    []ancestor     `json:"session_ancestors"`
	Client       string         `json:"client_id"`
	Azp          string         `json:"azp"`
	Act          *actor         `json:"act"`
	Confirmation map[string]any `json:"cnf"`
	Digests      []string       `json:"digests"`
	Credentials  []string       `json:"credential_ids"`
	Blueprint    string         `json:"blueprint"`
	Owner        string         `json:"owner"`
	Roles        words          `json:"roles"`
	Scope        words          `json:"scope"`
	Scp          words          `json:"scp"`
	IssuedAt     numericDate    `json:"iat"`
	AuthTime     numericDate    `json:"auth_time"`
	Expires      numericDate    `json:"exp"`
	ACR          string         `json:"acr"`
}

type actor struct {
	Issuer  string `json:"iss"`
	Subject string `json:"sub"`
	Act     *actor `json:"act"`
}

type ancestor struct {
	Issuer string
	ID     string
	Start  numericDate
}

func (a *ancestor) UnmarshalJSON(b []byte) error {
	if json.Unmarshal(b, &a.ID) == nil {
		return nil
	}
	var o struct {
		Issuer string      `json:"iss"`
		ID     string      `json:"sid"`
		Start  numericDate `json:"start"`
	}
	if err := json.Unmarshal(b, &o); err != nil {
		return err
	}
	a.Issuer, a.ID, a.Start = o.Issuer, o.ID, o.Start
	return nil
}

// words is a list of strings, or one string of words (RFC 6749 §3.3).
type words []string

func (w *words) UnmarshalJSON(b []byte) error {
	var s string
	if json.Unmarshal(b, &s) == nil {
		*w = strings.Fields(s)
		return nil
	}
	return json.Unmarshal(b, (*[]string)(w))
}

type numericDate struct{ time.Time }

func (n *numericDate) UnmarshalJSON(b []byte) error {
	var f float64
	if err := json.Unmarshal(b, &f); err != nil {
		return err
	}
	if math.IsNaN(f) || f < 0 || f > 253402300799 {
		return errors.New("not a NumericDate")
	}
	sec, frac := math.Modf(f)
	n.Time = time.Unix(int64(sec), int64(frac*1e9))
	return nil
}

// claimsIdentity reads the claims of a token that nobody has verified here.
func claimsIdentity(raw []byte, tokenHash string) (session.Identity, error) {
	var c claimSet
	// Claims that name nothing are many, and not of interest.
	if err := json.Unmarshal(raw, &c); err != nil {
		return session.Identity{}, invalid("give the payload of a JWT", "the claims cannot be read")
	}
	id := session.Identity{
		Issuer: c.Issuer, Token: c.ID, Session: session.SessionRef{ID: c.Session, Start: c.SessionStart.Time},
		User: c.Subject, Client: c.Client, Digests: c.Digests, Credentials: c.Credentials,
		Blueprint: c.Blueprint, Owner: c.Owner, Roles: c.Roles, Capabilities: c.Scope,
		IssuedAt: c.IssuedAt.Time, AuthTime: c.AuthTime.Time, Expires: c.Expires.Time, ACR: c.ACR,
	}
	if id.Client == "" {
		id.Client = c.Azp
	}
	if id.Capabilities == nil {
		id.Capabilities = c.Scp
	}
	if id.Token == "" {
		id.Token = tokenHash
	}
	for _, a := range c.Ancestors {
		id.Ancestors = append(id.Ancestors, session.SessionRef{Issuer: a.Issuer, ID: a.ID, Start: a.Start.Time})
	}
	for a := c.Act; a != nil; a = a.Act {
		if len(id.Actors) == session.MaxProbes {
			return session.Identity{}, invalid("shorten it", "the delegation chain is longer than %d", session.MaxProbes)
		}
		id.Actors = append(id.Actors, session.Actor{Issuer: a.Issuer, ID: a.Subject})
	}
	for _, member := range []string{"jkt", "x5t#S256"} {
		if v, ok := c.Confirmation[member].(string); ok {
			id.Keys = append(id.Keys, fmt.Sprintf("%s:%s", member, v))
		}
	}
	return id, nil
}
