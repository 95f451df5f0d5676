package authority

import (
	"context"
	"net/http"
	"net/url"
	"time"
)

// Bounds of a staged restore.
const (
	MaxStages = 32
	MinHold   = time.Second
	MaxHold   = 24 * time.Hour
)

// RestoreState is what became of a staged restore.
type RestoreState string

// The states.
const (
	RestoreRunning RestoreState = "running"
	RestoreDone    RestoreState = "done"
	// RestoreAborted: somebody killed again what it had set free.
	RestoreAborted RestoreState = "aborted"
	// RestoreStopped: it found something else in force than it knew of, and left it.
	RestoreStopped RestoreState = "stopped"
)

// StagedRestore is a kill that is being lifted in stages, by the authority that writes
// the log: each is held for a while, to be watched. What no stage has set free yet
// is killed, whatever happens to the authorities. Sessions that a share has set
// free stay so while it grows.
type StagedRestore struct {
	ID string `json:"id"`
	// Target is "global", or "tenant" and its name.
	Target string `json:"target"`
	// Stages are those of the Request, and Taken how many have been taken.
	Stages []string `json:"stages"`
	Taken  int      `json:"taken"`
	// Hold is how long each is held.
	Hold  Duration     `json:"hold"`
	State RestoreState `json:"state"`
	// Why says why it was stopped.
	Why      string `json:"why,omitempty"`
	Incident string `json:"incident,omitempty"`
	// By began it, at Begun.
	By    string    `json:"by"`
	Begun time.Time `json:"begun"`
	// At is when the newest stage was taken, at Epoch and Number of the log, and
	// Next when the next one will be.
	At     time.Time `json:"at,omitzero"`
	Next   time.Time `json:"next,omitzero"`
	Epoch  uint64    `json:"epoch,omitempty"`
	Number uint64    `json:"number,omitempty"`
	// Figures are those of the newest stage, while it is held.
	Figures *RestoreFigures `json:"figures,omitempty"`
}

// RestoreFigures are what to watch while a stage is held.
type RestoreFigures struct {
	// Since is from when on calls are counted: the stage's beginning, or when the
	// authority that was asked has begun to count.
	Since time.Time `json:"since"`
	// Denied is how many calls were denied since, by the enforcers' receipts, and
	// Allowed how many were not, by their reports, which come later.
	Denied  uint64 `json:"denied"`
	Allowed uint64 `json:"allowed"`
	// Running is how many calls run now.
	Running uint64 `json:"running"`
	// InEffect is at how many of the Enforcers the stage is in force; Armed and
	// Unarmed are as in Status.
	Enforcers int `json:"enforcers"`
	InEffect  int `json:"in_effect"`
	Armed     int `json:"armed"`
	Unarmed   int `json:"unarmed"`
}

// Restores returns the staged restores under way, and those that ended in the last
// day, the newest first.
func (c *Client) Restores(ctx context.Context) ([]StagedRestore, error) {
	var out struct {
		Restores []StagedRestore `json:"restores"`
	}
	if err := c.call(ctx, 0, http.MethodGet, "/v1/restores", nil, nil, &out); err != nil {
		return nil, err
	}
	return out.Restores, nil
}

// AbortRestore kills again what a restore has set free. Sent again, it is decided
// once.
func (c *Client) AbortRestore(ctx context.Context, id string) (*Decision, error) {
	var d Decision
	if err := c.call(ctx, 0, http.MethodPost, "/v1/restores/"+url.PathEscape(id)+"/abort", nil, nil, &d); err != nil {
		return nil, err
	}
	return &d, nil
}
