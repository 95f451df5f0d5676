// Package access says who may do what at the Session Authority: principals, their
// roles by tenant, and the table of what each role may do.
//
// An Authenticator finds out who sends a request. What it returns travels in the
// request's context; whoever serves the request asks it with From, and limits what
// is shown and done to its Scope. A request without a principal may do nothing.
package access

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/interlock-fabric/interlock/pkg/authority"
)

// Role is what a principal is, in one tenant or in all.
type Role string

// The roles. None includes another: a principal may hold several.
const (
	// Viewer sees how things stand, and nobody's ids.
	Viewer Role = "viewer"
	// Issuer is a service that mints credentials: it registers them, and denies
	// single ones.
	Issuer Role = "issuer"
	// Responder denies and lifts, all but everything at once.
	Responder Role = "responder"
	// Commander kills, restores, and administers enforcers as well.
	Commander Role = "commander"
	// Auditor reads everything and changes nothing.
	Auditor Role = "auditor"
)

// Roles returns every role.
func Roles() []Role { return []Role{Viewer, Issuer, Responder, Commander, Auditor} }

// Operation is something that roles permit.
type Operation string

// The operations. Each endpoint is one; the last ones are kinds of decision,
// which the service tells apart.
const (
	ReadStatus    Operation = "read the status"
	ReadAPI       Operation = "read the API's description"
	Watch         Operation = "watch"
	ReadCoverage  Operation = "read where a decision is in force"
	Explain       Operation = "ask what denies a caller"
	ListEnforcers Operation = "list enforcers"
	ReadTrail     Operation = "read the trail"
	ReadAudit     Operation = "read the audit"
	ReadReceipts  Operation = "export receipts"
	Enroll        Operation = "enrol enforcers"
	Retire        Operation = "retire enforcers"
	ReadBus       Operation = "read the bus's configuration"
	ReadKeySet    Operation = "read the key set"
	PublishKeySet Operation = "publish a key set"
	Decide        Operation = "decide"
	ListDecisions Operation = "list decisions"
	ReadRegistry  Operation = "list agents and sessions"
	// RegisterAgents and RegisterSessions enter what is not there.
	RegisterAgents   Operation = "register agents"
	RegisterSessions Operation = "register sessions"
	// ChangeAgents suspends, activates and decommissions; it takes DecideWide as
	// well.
	ChangeAgents  Operation = "change an agent's state"
	Propose       Operation = "propose what takes two persons"
	ListProposals Operation = "list proposals"
	Approve       Operation = "approve proposals"
	Withdraw      Operation = "withdraw proposals"
	// DeclareExemptions also approves what another declared, and removes.
	DeclareExemptions Operation = "declare exemptions"
	ListExemptions    Operation = "list exemptions"

	// DenyOne denies one session, token, credential or key.
	DenyOne Operation = "deny a single credential"
	// LiftOne sets one of these free.
	LiftOne Operation = "lift what denies a single credential"
	// DecideWide is on anything wider but everything.
	DecideWide Operation = "decide on more than a single credential"
	// RevokeToken, Introspect and RevokeSubject are RFC 7009, RFC 7662 and Global
	// Token Revocation. The last denies what a user holds already, and nothing to
	// come, so that it is an issuer's to ask for.
	RevokeToken   Operation = "revoke what is presented"
	Introspect    Operation = "ask whether a token is active"
	RevokeSubject Operation = "revoke all tokens of a user"
	// DecideAll is on the targets global and tenant: kills, and their restoring.
	DecideAll Operation = "decide on a whole tenant or on everything"
)

// rule is one line of the table.
type rule struct {
	roles []Role
	// everywhere asks for the role in all tenants, those to come included.
	everywhere bool
}

// table is who may do what. Whatever is not in it nobody may do.
var table = map[Operation]rule{
	ReadStatus:       {roles: []Role{Viewer, Issuer, Responder, Commander, Auditor}},
	ReadAPI:          {roles: []Role{Viewer, Issuer, Responder, Commander, Auditor}},
	Watch:            {roles: []Role{Viewer, Responder, Commander, Auditor}},
	ReadCoverage:     {roles: []Role{Viewer, Issuer, Responder, Commander, Auditor}},
	Explain:          {roles: []Role{Viewer, Responder, Commander, Auditor}},
	ListEnforcers:    {roles: []Role{Viewer, Responder, Commander, Auditor}},
	ReadTrail:        {roles: []Role{Responder, Commander, Auditor}},
	Enroll:           {roles: []Role{Commander}},
	Retire:           {roles: []Role{Commander}},
	ReadBus:          {roles: []Role{Commander}, everywhere: true},
	ReadKeySet:       {roles: []Role{Commander, Auditor}, everywhere: true},
	PublishKeySet:    {roles: []Role{Commander}, everywhere: true},
	ReadRegistry:     {roles: []Role{Issuer, Responder, Commander, Auditor}},
	RegisterAgents:   {roles: []Role{Issuer, Commander}},
	RegisterSessions: {roles: []Role{Issuer, Commander}},
	ChangeAgents:     {roles: []Role{Responder, Commander}},
	ReadAudit:        {roles: []Role{Responder, Commander, Auditor}},
	ReadReceipts:     {roles: []Role{Responder, Commander, Auditor}, everywhere: true},
	Decide:           {roles: []Role{Issuer, Responder, Commander}},
	ListDecisions:    {roles: []Role{Viewer, Responder, Commander, Auditor}},
	DenyOne:          {roles: []Role{Issuer, Responder, Commander}},
	LiftOne:          {roles: []Role{Responder, Commander}},
	DecideWide:       {roles: []Role{Responder, Commander}},
	DecideAll:        {roles: []Role{Commander}},
	RevokeToken:      {roles: []Role{Issuer, Responder, Commander}},
	Introspect:       {roles: []Role{Viewer, Issuer, Responder, Commander, Auditor}},
	RevokeSubject:    {roles: []Role{Issuer, Responder, Commander}},
	Propose:          {roles: []Role{Commander}},
	ListProposals:    {roles: []Role{Responder, Commander, Auditor}},
	Approve:          {roles: []Role{Commander}},
	Withdraw:         {roles: []Role{Commander}},
	ListExemptions:   {roles: []Role{Responder, Commander, Auditor}},
	// Global ones take it in all tenants.
	DeclareExemptions: {roles: []Role{Commander}},
}

// endpoints are the operations of the API's endpoints, by their patterns.
var endpoints = map[string]Operation{
	"POST /v1/decisions":                          Decide,
	"GET /v1/decisions":                           ListDecisions,
	"GET /v1/decisions/{epoch}/{number}/coverage": ReadCoverage,
	"GET /v1/status":                              ReadStatus,
	"GET /v1/openapi.yaml":                        ReadAPI,
	"GET /v1/watch":                               Watch,
	"POST /v1/explain":                            Explain,
	"GET /v1/enforcers":                           ListEnforcers,
	"POST /v1/enforcers":                          Enroll,
	"DELETE /v1/enforcers/{name}":                 Retire,
	"GET /v1/trail":                               ReadTrail,
	"GET /v1/agents":                              ReadRegistry,
	"POST /v1/agents":                             RegisterAgents,
	"POST /v1/agents/lifecycle":                   ChangeAgents,
	"GET /v1/sessions":                            ReadRegistry,
	"POST /v1/sessions":                           RegisterSessions,
	"GET /v1/seen":                                ReadTrail,
	"GET /v1/audit":                               ReadAudit,
	"GET /v1/audit/export":                        ReadAudit,
	"GET /v1/receipts/export":                     ReadReceipts,
	"GET /v1/bus-config":                          ReadBus,
	"GET /v1/keyset":                              ReadKeySet,
	"POST /v1/keyset":                             PublishKeySet,
	"POST /v1/oauth/revoke":                       RevokeToken,
	"POST /v1/oauth/introspect":                   Introspect,
	"POST /v1/oauth/global-token-revocation":      RevokeSubject,
	"POST /v1/proposals":                          Propose,
	"GET /v1/proposals":                           ListProposals,
	"POST /v1/proposals/{id}/approve":             Approve,
	"POST /v1/proposals/{id}/withdraw":            Withdraw,
	"GET /v1/restores":                            ListProposals,
	"POST /v1/restores/{id}/abort":                DecideAll,
	"GET /v1/exemptions":                          ListExemptions,
	"POST /v1/exemptions":                         DeclareExemptions,
	"POST /v1/exemptions/{id}/approve":            DeclareExemptions,
	"DELETE /v1/exemptions/{id}":                  DeclareExemptions,
}

// Endpoint returns the operation of an endpoint, by its pattern. One that has
// none is nobody's to use.
func Endpoint(pattern string) (Operation, bool) {
	op, ok := endpoints[pattern]
	return op, ok
}

// Endpoints returns the patterns of all endpoints, sorted.
func Endpoints() []string { return slices.Sorted(maps.Keys(endpoints)) }

// Permitted returns the roles that permit an operation, and whether they must be
// held in all tenants.
func Permitted(op Operation) (roles []Role, everywhere bool) {
	r := table[op]
	return slices.Clone(r.roles), r.everywhere
}

// Means is how a principal was authenticated.
type Means string

// The means.
const (
	MeansSocket    Means = "socket"    // a user of this machine, on the unix socket
	MeansBootstrap Means = "bootstrap" // the bootstrap token
	MeansToken     Means = "token"     // a token of an issuer
	MeansCert      Means = "cert"      // a client certificate
	MeansClient    Means = "client"    // an OAuth client's secret
	MeansEmergency Means = "emergency" // an order that an emergency key signed
)

// Everywhere is all tenants, those to come included, as a tenant of a Grant.
const Everywhere = "*"

// Grant is a role, and the tenants in which it is held.
type Grant struct {
	Role    Role
	Tenants []string
}

// Principal is who sends a request. The zero value, like a nil one, may do
// nothing. It is immutable.
type Principal struct {
	// Name is unique: SUBJECT@ISSUER, a name of a certificate with its kind,
	// client: and the id of a client with a secret, or what stands for a user of
	// this machine.
	Name  string
	Means Means
	// Agent is set when the credential is an agent's. Such a principal holds no
	// role, whatever it was granted.
	Agent bool
	// Expires is when the credential ends; zero is never. What a request began
	// does not outlive it.
	Expires time.Time
	grants  []Grant
}

// NewPrincipal makes a principal that holds the grants.
func NewPrincipal(name string, means Means, grants ...Grant) *Principal {
	return &Principal{Name: name, Means: means, grants: grants}
}

// operator is a principal that may do everything.
func operator(name string, means Means) *Principal {
	p := NewPrincipal(name, means)
	for _, r := range Roles() {
		p.grants = append(p.grants, Grant{r, []string{Everywhere}})
	}
	return p
}

// Local reports whether p is a user of this machine, or bears the bootstrap
// token: the operator who set the authority up, and not a configured principal.
func (p *Principal) Local() bool {
	return p != nil && (p.Means == MeansSocket || p.Means == MeansBootstrap)
}

// Scope returns where p may do op.
func (p *Principal) Scope(op Operation) Scope {
	r := table[op]
	return p.scope(func(g *Grant) bool { return slices.Contains(r.roles, g.Role) })
}

// Visible returns where p holds any role: the tenants that exist for it.
func (p *Principal) Visible() Scope { return p.scope(func(*Grant) bool { return true }) }

func (p *Principal) scope(fits func(*Grant) bool) (s Scope) {
	if p == nil || p.Agent {
		return s
	}
	for i := range p.grants {
		if g := &p.grants[i]; fits(g) {
			s.all = s.all || slices.Contains(g.Tenants, Everywhere)
			s.tenants = append(s.tenants, g.Tenants...)
		}
	}
	return s
}

// Scope is a set of tenants. The zero value is none.
type Scope struct {
	all     bool
	tenants []string
}

// Everything is the scope of the authority itself.
func Everything() Scope { return Scope{all: true} }

// All reports whether the scope is all tenants, those to come included, and so
// what belongs to none.
func (s Scope) All() bool { return s.all }

// Tenants returns the names of those in it, sorted; none where it is all.
func (s Scope) Tenants() []string {
	if s.all {
		return nil
	}
	return slices.Compact(slices.Sorted(slices.Values(s.tenants)))
}

// Empty reports whether no tenant is in it.
func (s Scope) Empty() bool { return !s.all && len(s.tenants) == 0 }

// Has reports whether a tenant is in it, by its name.
func (s Scope) Has(tenant string) bool {
	return s.all || tenant != "" && slices.Contains(s.tenants, tenant)
}

// HasAny reports whether one of the tenants is in it.
func (s Scope) HasAny(tenants []string) bool { return s.all || slices.ContainsFunc(tenants, s.Has) }

// HasEach reports whether all of the tenants are in it; where there are none,
// whether it is all.
func (s Scope) HasEach(tenants []string) bool {
	return s.all || len(tenants) > 0 && !slices.ContainsFunc(tenants, func(t string) bool { return !s.Has(t) })
}

// Check says whether p may do op at all: somewhere, or everywhere where the table
// demands that. The error is a *authority.Problem.
func (p *Principal) Check(op Operation) error {
	s := p.Scope(op)
	if s.all || !s.Empty() && !table[op].everywhere {
		return nil
	}
	return p.forbidden(op, "")
}

// CheckIn says whether p may do op in a tenant; an empty one is what belongs to no
// tenant and so asks for all. A tenant that p does not see must have been refused
// before, as one that does not exist. The error is a *authority.Problem.
func (p *Principal) CheckIn(op Operation, tenant string) error {
	if p.Scope(op).Has(tenant) {
		return nil
	}
	return p.forbidden(op, tenant)
}

func (p *Principal) forbidden(op Operation, tenant string) error {
	if p == nil {
		p = &Principal{}
	}
	roles, everywhere := Permitted(op)
	names := make([]string, len(roles))
	for i, r := range roles {
		names[i] = string(r)
	}
	need := "nobody may do that here"
	switch {
	case p.Agent:
		need = "an agent holds no role: ask a person or a service that does"
	case len(names) > 0 && tenant != "":
		need = fmt.Sprintf("it takes the role %s in tenant %s", strings.Join(names, " or "), tenant)
	case len(names) > 0 && (everywhere || op == DecideAll || op == Propose || op == Approve || op == Withdraw || op == DeclareExemptions):
		need = fmt.Sprintf("it takes the role %s in all tenants", strings.Join(names, " or "))
	case len(names) > 0:
		need = "it takes the role " + strings.Join(names, " or ")
	}
	who := p.Name
	if who == "" {
		who = "whoever asks"
	}
	if len(who) > 200 {
		who = who[:200] + "…"
	}
	return authority.NewProblem(authority.ProblemForbidden, fmt.Sprintf("%s may not %s", who, op), need)
}

type contextKey struct{}

// With returns a context of requests by p.
func With(ctx context.Context, p *Principal) context.Context {
	return context.WithValue(ctx, contextKey{}, p)
}

// From returns who sent the request of ctx. Where nobody did, it is nil, which may
// do nothing.
func From(ctx context.Context) *Principal {
	p, _ := ctx.Value(contextKey{}).(*Principal)
	return p
}
