//go:build !unix

package broker

import (
	"errors"
	"os"
)

// lockFile fails: without a lock that dies with its process, two brokers could
// write the same streams.
func lockFile(string) (*os.File, error) {
	return nil, errors.New("broker: the embedded bus needs a Unix system: use an external cluster")
}
