package faults

import (
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/nats-io/nkeys"
)

// copyTree copies what is in a directory, as a backup does.
func copyTree(t *testing.T, from, to string) {
	t.Helper()
	must(t, filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		dest := filepath.Join(to, rel)
		switch {
		case d.IsDir():
			return os.MkdirAll(dest, 0o700)
		case !d.Type().IsRegular():
			return nil // a socket
		}
		in, err := os.Open(path)
		if err != nil {
			return err
		}
		defer in.Close()
		out, err := os.OpenFile(dest, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
		if err != nil {
			return err
		}
		if _, err := io.Copy(out, in); err != nil {
			return err
		}
		return out.Close()
	}))
}

// restore puts a backup in a directory's place.
func restore(t *testing.T, backup, dir string) {
	t.Helper()
	must(t, os.RemoveAll(dir))
	copyTree(t, backup, dir)
}

func publicNKey(t *testing.T, seed string) string {
	t.Helper()
	kp, err := nkeys.FromSeed([]byte(seed))
	must(t, err)
	pub, err := kp.PublicKey()
	must(t, err)
	return pub
}
