//go:build unix

package broker

import (
	"errors"
	"os"
	"syscall"
)

// lockFile takes the lock that a process holds for as long as it lives: kill -9
// frees it. It fails with ErrInUse when somebody else has it, in this process or
// another.
func lockFile(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, ErrInUse
		}
		return nil, err
	}
	return f, nil
}
