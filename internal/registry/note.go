package registry

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"github.com/interlock-fabric/interlock/pkg/session"
)

// Note is something small that all authorities keep: what it says is their own. Its
// content must not be changed.
type Note struct {
	Kind string `json:"k"`
	ID   string `json:"i"`
	// Revision changes with every change.
	Revision uint64 `json:"v"`
	// Content is what it says; one without has been taken away.
	Content json.RawMessage `json:"c,omitempty"`
}

type noteKey struct{ kind, id string }

// Notes returns the notes of a kind, in the order of their ids. The error wraps
// ErrUnavailable while the log has not been read.
func (r *Registry) Notes(kind string) ([]Note, error) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	if !r.loaded {
		return nil, r.absent()
	}
	return r.x.notesOf(kind), nil
}

func (x *index) notesOf(kind string) []Note {
	var out []Note
	for k, n := range x.notes {
		if k.kind == kind {
			out = append(out, *n)
		}
	}
	slices.SortFunc(out, func(a, b Note) int { return strings.Compare(a.ID, b.ID) })
	return out
}

// PutNote writes a note in place of the one of n.Revision, 0 for none, and returns
// its revision when it is stored. Without content it takes the note away. admit, if
// not nil, says why not, given the notes of that kind, and which of them go away
// with it; it is called perhaps more than once, and no other note of the kind is
// written between it and this one. Errors are admit's, or wrap ErrConflict,
// ErrUnknown or what those of RegisterSessions do.
func (r *Registry) PutNote(ctx context.Context, n Note, admit func(have []Note) (drop []string, err error)) (uint64, error) {
	if n.Kind == "" || n.ID == "" || len(n.Content) > MaxNote {
		return 0, fmt.Errorf("%w: a note of %d bytes, at most %d", session.ErrInvalid, len(n.Content), MaxNote)
	}
	size, err := sizeOf(n)
	if err != nil {
		return 0, err
	}
	revision := n.Revision
	var out *Note
	u := &unit{size: size + 1<<10, judge: func(x *index) ([]op, error) {
		have := x.notes[noteKey{n.Kind, n.ID}]
		switch {
		case have == nil && (revision > 0 || n.Content == nil):
			return nil, ErrUnknown
		case have != nil && have.Revision != revision:
			return nil, ErrConflict
		}
		var drop []string
		if admit != nil {
			var err error
			if drop, err = admit(x.notesOf(n.Kind)); err != nil {
				return nil, err
			}
		}
		if have == nil && len(x.notes) >= MaxNotes {
			return nil, fmt.Errorf("%w: %d notes", ErrFull, len(x.notes))
		}
		put := n
		out = &put
		ops := []op{{Note: out}}
		for _, id := range drop[:min(len(drop), 8)] {
			if id != n.ID {
				ops = append(ops, op{Note: &Note{Kind: n.Kind, ID: id}})
			}
		}
		return ops, nil
	}}
	if err := r.do(ctx, u); err != nil {
		return 0, err
	}
	return out.Revision, nil
}

// putNote enters a note, or takes it away.
func (x *index) putNote(number uint64, in *Note) {
	x.next = max(x.next, number+1, in.Revision+1)
	k := noteKey{in.Kind, in.ID}
	have := x.notes[k]
	if have != nil {
		if have.Revision >= in.Revision {
			return
		}
		x.bytes -= have.cost()
		delete(x.notes, k)
	}
	if in.Content != nil {
		n := *in
		x.notes[k] = &n
		x.bytes += n.cost()
	}
}

func (n *Note) cost() int { return 128 + len(n.Kind) + len(n.ID) + len(n.Content) }
