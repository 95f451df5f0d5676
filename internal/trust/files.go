package trust

import (
	"crypto/ecdh"
	"crypto/ed25519"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
)

// maxFile bounds every file: a key set is a frame, and 4,096 tenants take 600 KiB.
const maxFile = 1 << 20

// makeDir makes a directory that is its owner's alone.
func makeDir(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	return os.Chmod(dir, 0o700)
}

// readFile reads a bounded regular file. One that others can read is refused when
// it is secret.
func readFile(path string, secret bool) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }() // it was only read
	info, err := f.Stat()
	switch {
	case err != nil:
		return nil, err
	case !info.Mode().IsRegular():
		return nil, fmt.Errorf("%s is not a regular file", path)
	case secret && info.Mode().Perm()&0o077 != 0:
		return nil, fmt.Errorf("%w: %s can be read or written by others (mode %04o): chmod 600 it, and replace what is in it if anybody else has used this machine",
			fs.ErrPermission, path, info.Mode().Perm())
	}
	b, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err == nil && len(b) > maxFile {
		err = fmt.Errorf("%s is longer than %d bytes", path, maxFile)
	}
	return b, err
}

// writeFile replaces the file as a whole, or, when it must be new, fails with
// fs.ErrExist if there is one. What it wrote is on disk when it returns.
func writeFile(path string, b []byte, mustBeNew bool) (err error) {
	dir := filepath.Dir(path)
	tmp, err := os.CreateTemp(dir, ".new-*") // mode 0600
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			// The first error is the one that matters; after a rename there is
			// nothing to remove.
			_ = tmp.Close()
			_ = os.Remove(tmp.Name())
		}
	}()
	if _, err := tmp.Write(b); err != nil {
		return err
	}
	if err := tmp.Sync(); err != nil {
		return err
	}
	if err := tmp.Close(); err != nil {
		return err
	}
	if mustBeNew {
		// A link, unlike a rename, does not replace.
		if err := os.Link(tmp.Name(), path); err != nil {
			return err
		}
		if err := os.Remove(tmp.Name()); err != nil {
			return err
		}
	} else if err := os.Rename(tmp.Name(), path); err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

const (
	privateBlock = "PRIVATE KEY"
	publicBlock  = "PUBLIC KEY"
)

// writePrivate writes an ed25519.PrivateKey, or an X25519 *ecdh.PrivateKey.
func writePrivate(path string, key any) error {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return errors.New("trust: key cannot be encoded") // the cause could show the key
	}
	return writeFile(path, pem.EncodeToMemory(&pem.Block{Type: privateBlock, Bytes: der}), true)
}

// readPrivate never puts what it read into an error.
func readPrivate(path string) (ed25519.PrivateKey, error) {
	key, err := readPKCS8(path)
	if err != nil {
		return nil, err
	}
	if k, ok := key.(ed25519.PrivateKey); ok {
		return k, nil
	}
	return nil, fmt.Errorf("%w: %s is not an Ed25519 key in PKCS #8", ErrCorrupt, path)
}

// readSealing reads an X25519 key, and is as silent.
func readSealing(path string) (*ecdh.PrivateKey, error) {
	key, err := readPKCS8(path)
	if err != nil {
		return nil, err
	}
	if k, ok := key.(*ecdh.PrivateKey); ok && k.Curve() == ecdh.X25519() {
		return k, nil
	}
	return nil, fmt.Errorf("%w: %s is not an X25519 key in PKCS #8", ErrCorrupt, path)
}

func readPKCS8(path string) (any, error) {
	b, err := readFile(path, true)
	if err != nil {
		return nil, err
	}
	block, rest := pem.Decode(b)
	if block == nil || block.Type != privateBlock || len(rest) > 0 {
		return nil, fmt.Errorf("%w: %s is not a private key in PEM", ErrCorrupt, path)
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("%w: %s is not a key in PKCS #8", ErrCorrupt, path)
	}
	return key, nil
}

func writePublic(path string, pub ed25519.PublicKey) error {
	der, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return err
	}
	return writeFile(path, pem.EncodeToMemory(&pem.Block{Type: publicBlock, Bytes: der}), true)
}

// ReadPublic reads a root.pub.
func ReadPublic(path string) (ed25519.PublicKey, error) {
	b, err := readFile(path, false)
	if err != nil {
		return nil, err
	}
	block, rest := pem.Decode(b)
	if block != nil && block.Type == publicBlock && len(rest) == 0 {
		if pub, err := x509.ParsePKIXPublicKey(block.Bytes); err == nil {
			if p, ok := pub.(ed25519.PublicKey); ok {
				return p, nil
			}
		}
	}
	return nil, fmt.Errorf("%w: %s is not an Ed25519 public key in PEM", ErrCorrupt, path)
}
