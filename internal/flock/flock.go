// Package flock locks a directory for one process at a time. The lock dies with
// the process that holds it, kill -9 included.
package flock

import "errors"

// ErrHeld: somebody else holds the lock.
var ErrHeld = errors.New("locked by another process")
