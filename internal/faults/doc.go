// Package faults breaks the whole fabric on purpose: it has no code but tests.
//
// They run the real parts (authority, bus, feed, enforcers), put a hostile bus
// between them, kill processes with signal 9, fill the disk, restore old
// backups, and watch while callers are checked and decisions are made.
// docs/design/failure-modes.md says which test shows what.
package faults
