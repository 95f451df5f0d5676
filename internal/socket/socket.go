// Package socket listens on unix sockets that only their owner can open.
package socket

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"time"
)

// Listen listens on a unix socket of mode 0600. One that a dead process left is
// replaced; one that is answered, or a file that is none, is an error.
func Listen(path string) (net.Listener, error) {
	if err := replace(path); err != nil {
		return nil, err
	}
	l, err := new(net.ListenConfig).Listen(context.Background(), "unix", path)
	if err != nil {
		return nil, fmt.Errorf("socket %s: %w: give a shorter path, or one in a directory that exists", path, err)
	}
	// Until this returns, the directory's mode alone keeps others out.
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

// replace removes a socket that nobody answers any more.
func replace(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if info.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("%s exists and is not a socket: move it away", path)
	}
	d := net.Dialer{Timeout: time.Second}
	if c, err := d.DialContext(context.Background(), "unix", path); err == nil {
		_ = c.Close() // nothing was said
		return fmt.Errorf("another process listens on %s: stop it, or give another socket", path)
	}
	return os.Remove(path)
}
