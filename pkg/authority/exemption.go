package authority

import (
	"context"
	"net/http"
	"net/url"
	"time"
)

// Bounds of an exemption's texts, in bytes.
const (
	MaxExemptionOwner  = 200
	MaxExemptionReason = 500
)

// ExemptionState says whether an exemption counts.
type ExemptionState string

// The states.
const (
	// ExemptionDeclared waits for a second commander.
	ExemptionDeclared ExemptionState = "declared"
	ExemptionInForce  ExemptionState = "in_force"
	ExemptionExpired  ExemptionState = "expired"
)

// ExemptionRequest declares an exemption. What is not marked as optional is
// required.
type ExemptionRequest struct {
	// Target is a caller: what a decision's Except can name.
	Target Target `json:"target"`
	// Global spares it from what is decided on everything as well, and not only on
	// its tenant.
	Global bool `json:"global,omitempty"`
	// Owner answers for it, and Reason says why it must not be cut.
	Owner  string `json:"owner"`
	Reason string `json:"reason"`
	// Expires is when it ends by itself; optional.
	Expires time.Time `json:"expires,omitzero"`
}

// Exemption is a caller that kills, and whatever else is decided on a whole tenant
// or on everything, do not touch. One entry of the log names at most
// session.MaxExcept: that many can be declared in a tenant, and that many Global
// ones in all. A decision that is in force keeps those that it was taken with,
// whatever becomes of them.
type Exemption struct {
	ID string `json:"id"`
	ExemptionRequest
	State ExemptionState `json:"state"`
	// By declared it, and ApprovedBy made it count, at ApprovedAt.
	By         string    `json:"by"`
	At         time.Time `json:"at"`
	ApprovedBy string    `json:"approved_by,omitempty"`
	ApprovedAt time.Time `json:"approved_at,omitzero"`
}

// Spared is a caller that a decision does not touch.
type Spared struct {
	// Exemption is the id of the declared one; empty where the decision itself
	// names the caller.
	Exemption string `json:"exemption,omitempty"`
	Owner     string `json:"owner,omitempty"`
	Target    string `json:"target"`
	// Agents and Sessions are those under it, as far as they are registered.
	Agents   int `json:"agents"`
	Sessions int `json:"sessions"`
}

// KillInForce is what is in force on a whole tenant, or on everything, by a kill.
type KillInForce struct {
	// Target is "global", or "tenant" and its name.
	Target   string    `json:"target"`
	Number   uint64    `json:"number"`
	Since    time.Time `json:"since"`
	Incident string    `json:"incident,omitempty"`
	// Share is the percentage of the sessions that a staged restore has set free.
	Share float64 `json:"share,omitzero"`
	// Exempt is how many callers it does not touch, and Spared those of them that
	// are declared now.
	Exempt int      `json:"exempt,omitempty"`
	Spared []Spared `json:"spared,omitempty"`
}

// DeclareExemption declares an exemption. Where principals are configured it counts
// when another commander has approved it.
func (c *Client) DeclareExemption(ctx context.Context, r ExemptionRequest) (*Exemption, error) {
	var x Exemption
	if err := c.call(ctx, 0, http.MethodPost, "/v1/exemptions", nil, r, &x); err != nil {
		return nil, err
	}
	return &x, nil
}

// Exemptions returns the exemptions, in the order of their ids.
func (c *Client) Exemptions(ctx context.Context) ([]Exemption, error) {
	var out struct {
		Exemptions []Exemption `json:"exemptions"`
	}
	if err := c.call(ctx, 0, http.MethodGet, "/v1/exemptions", nil, nil, &out); err != nil {
		return nil, err
	}
	return out.Exemptions, nil
}

// ApproveExemption makes what another declared count.
func (c *Client) ApproveExemption(ctx context.Context, id string) (*Exemption, error) {
	var x Exemption
	if err := c.call(ctx, 0, http.MethodPost, "/v1/exemptions/"+url.PathEscape(id)+"/approve", nil, nil, &x); err != nil {
		return nil, err
	}
	return &x, nil
}

// RemoveExemption ends an exemption for decisions to come.
func (c *Client) RemoveExemption(ctx context.Context, id string) error {
	return c.call(ctx, 0, http.MethodDelete, "/v1/exemptions/"+url.PathEscape(id), nil, nil, nil)
}
