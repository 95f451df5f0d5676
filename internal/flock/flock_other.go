//go:build !unix

package flock

import (
	"errors"
	"os"
)

// Acquire fails: without a lock that dies with its process, two processes could
// write the same files.
func Acquire(path string) (*os.File, error) {
	return nil, &os.PathError{Op: "lock", Path: path, Err: errors.ErrUnsupported}
}
