package authority

import (
	"context"
	"net/http"
	"net/url"
	"time"
)

// ProposalState is what became of a proposal.
type ProposalState string

// The states.
const (
	// ProposalOpen waits for another commander, until it expires.
	ProposalOpen ProposalState = "open"
	// ProposalApproved is being carried out. Approved again, it goes on.
	ProposalApproved ProposalState = "approved"
	// ProposalExecuted has been decided.
	ProposalExecuted  ProposalState = "executed"
	ProposalWithdrawn ProposalState = "withdrawn"
	ProposalExpired   ProposalState = "expired"
	// ProposalBrokenGlass was never one: somebody decided alone.
	ProposalBrokenGlass ProposalState = "break_glass"
)

// Proposal is a decision on a whole tenant, or on everything, that waits for a
// second person.
type Proposal struct {
	ID    string        `json:"id"`
	State ProposalState `json:"state"`
	// Request is what is proposed.
	Request Request `json:"request"`
	// Would has a line for each target.
	Would []string `json:"would"`
	// Tenants are those that it is about; none is all of them.
	Tenants []string `json:"tenants,omitempty"`
	// By is who proposed it, At when, and Expires until when it can be approved.
	By      string    `json:"by"`
	At      time.Time `json:"at"`
	Expires time.Time `json:"expires,omitzero"`
	// EndedBy approved or withdrew it, at EndedAt.
	EndedBy string    `json:"ended_by,omitempty"`
	EndedAt time.Time `json:"ended_at,omitzero"`
	// Epoch and Number are the place in the log of what was decided.
	Epoch  uint64 `json:"epoch,omitempty"`
	Number uint64 `json:"number,omitempty"`
}

// Open reports whether the proposal can still be approved.
func (p *Proposal) Open(now time.Time) bool {
	return p.State == ProposalOpen && now.Before(p.Expires)
}

// Propose makes a proposal of what needs two persons: another commander must
// Approve it before it expires.
func (c *Client) Propose(ctx context.Context, r Request) (*Proposal, error) {
	var p Proposal
	if err := c.call(ctx, 0, http.MethodPost, "/v1/proposals", nil, r, &p); err != nil {
		return nil, err
	}
	return &p, nil
}

// Proposals returns the proposals of the last day, the newest first.
func (c *Client) Proposals(ctx context.Context) ([]Proposal, error) {
	var out struct {
		Proposals []Proposal `json:"proposals"`
	}
	if err := c.call(ctx, 0, http.MethodGet, "/v1/proposals", nil, nil, &out); err != nil {
		return nil, err
	}
	return out.Proposals, nil
}

// Approve has what another proposed decided. Sent again, it is decided once.
func (c *Client) Approve(ctx context.Context, id string) (*Decision, error) {
	var d Decision
	if err := c.call(ctx, 0, http.MethodPost, "/v1/proposals/"+url.PathEscape(id)+"/approve", nil, nil, &d); err != nil {
		return nil, err
	}
	return &d, nil
}

// Withdraw ends a proposal that is open.
func (c *Client) Withdraw(ctx context.Context, id string) (*Proposal, error) {
	var p Proposal
	if err := c.call(ctx, 0, http.MethodPost, "/v1/proposals/"+url.PathEscape(id)+"/withdraw", nil, nil, &p); err != nil {
		return nil, err
	}
	return &p, nil
}
