// Package registry knows the agents and their sessions: who an agent is and who
// answers for it, what sessions it has, under which user and from which parent.
//
// It is a log of batches in a stream of its own, with snapshots beside it, and an
// index in memory that every authority derives from it. Registrations that arrive
// together share one message, one acknowledgement and one sync of the disk; each
// caller waits for its batch's. A batch is appended only at the very end of what
// its author has read (expected-last-sequence), so that two authorities cannot
// diverge: whoever loses reads on, judges anew, and tries again. Records rest on
// the log encrypted and authenticated under a key that only authorities hold, and
// each batch names the one before it by its hash.
//
// What authorities must agree on beside that, and find without asking the store, is
// here as well: notes, which are small, few, and nobody's but theirs.
//
// Nothing that is asked of the index waits for the store.
package registry
