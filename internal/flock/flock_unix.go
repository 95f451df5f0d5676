//go:build unix

package flock

import (
	"errors"
	"os"
	"syscall"
)

// Acquire takes the lock on the file, which it makes with mode 0600 if absent.
// It fails with ErrHeld when somebody else has it, in this process or another.
// Closing the file frees the lock.
func Acquire(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		_ = f.Close() // nothing was written
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, ErrHeld
		}
		return nil, &os.PathError{Op: "lock", Path: path, Err: err}
	}
	return f, nil
}
