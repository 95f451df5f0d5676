package natsfeed

import (
	"context"
	"fmt"
)

const (
	// AgentStream holds the table of registered agents: its parts, each on a
	// subject of its own, and its signed index, on AgentSubject, of each the newest
	// AgentKeep. Enforcers read it by batched direct gets, like the log.
	AgentStream = "INTERLOCK_AGENTS"
	// AgentSubject is where the indexes are.
	AgentSubject = "interlock.v1.agents"
	// AgentPartSubjects are the subjects of the parts.
	AgentPartSubjects = "interlock.v1.agents.*"

	// AgentKeep is how many versions of the index, and of a part, are kept: an
	// enforcer can finish reading one while the next are published.
	AgentKeep = 4

	// From so many parts on, all are read at once.
	manyParts = 8
)

// AgentPartSubject is where a part of the table is, by the first byte of its
// agents' digests.
func AgentPartSubject(part byte) string { return fmt.Sprintf("%s.%02x", AgentSubject, part) }

// AgentIndexes returns the stored indexes, oldest first, unverified. Errors are as
// Log's.
func (f *Feed) AgentIndexes(ctx context.Context) ([][]byte, error) {
	return f.newest(ctx, AgentStream, AgentSubject, AgentKeep)
}

// AgentParts calls fn with what is stored of the given parts, and perhaps of
// others, unverified, in no order. Errors are fn's, and as Log's.
func (f *Feed) AgentParts(ctx context.Context, parts []byte, fn func(b []byte) error) error {
	subjects := []string{AgentPartSubjects}
	if len(parts) < manyParts {
		subjects = subjects[:0]
		for _, p := range parts {
			subjects = append(subjects, AgentPartSubject(p))
		}
	}
	for _, s := range subjects {
		if _, err := f.read(ctx, AgentStream, s, 0, func(_ uint64, b []byte) error { return fn(b) }); err != nil {
			return err
		}
	}
	return nil
}
