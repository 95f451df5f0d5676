package enforce

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/interlock-fabric/interlock/pkg/session"
)

// floor is what an enforcer remembers across restarts: it never again accepts a
// log that ends before this head or has another batch in its place, nor an older
// key set. The zero floor is that of a first start.
type floor struct {
	Root    []byte       `json:"root"`
	Epoch   uint64       `json:"epoch"`
	Number  uint64       `json:"number"`
	Hash    session.Hash `json:"hash"`
	Signers []signer     `json:"signers"`
	KeySet  uint64       `json:"key_set"`
}

// ErrFloor: the file in Options.StateDir that keeps a rolled-back log out cannot
// be used.
var ErrFloor = errors.New("the enforcer's memory of its log cannot be used")

// maxFloorLen is far more than a floor with as many signers as a key set has.
const maxFloorLen = 1 << 17

type floorJSON struct {
	Floor json.RawMessage `json:"floor"`
	Sum   []byte          `json:"sum"`
}

func floorSum(b []byte) []byte {
	sum := sha256.Sum256(append([]byte("interlock floor 1\x00"), b...))
	return sum[:]
}

// floorPath is in a directory that several enforcers may share.
func floorPath(o Options) string {
	return filepath.Join(o.StateDir, o.Enrollment.Enforcer+".floor.json")
}

// loadFloor reads the floor. A directory without one is a first start; one that
// cannot be read is an error, since to go on without it would forget it.
func loadFloor(o Options) (floor, error) {
	if o.StateDir == "" {
		return floor{}, nil
	}
	path := floorPath(o)
	b, err := readFloor(path)
	if errors.Is(err, fs.ErrNotExist) {
		return floor{}, nil
	}
	if err != nil {
		return floor{}, fmt.Errorf("%w: %w", ErrFloor, err)
	}
	var in floorJSON
	var f floor
	err = json.Unmarshal(b, &in)
	if err == nil && !bytes.Equal(in.Sum, floorSum(in.Floor)) {
		err = errors.New("the checksum does not match")
	}
	if err == nil {
		err = json.Unmarshal(in.Floor, &f)
	}
	if err != nil {
		return floor{}, fmt.Errorf("%w: %s is damaged (%w), so whether the log was rolled back cannot be told: restore the file, or remove it if you trust the bus now",
			ErrFloor, path, err)
	}
	if !bytes.Equal(f.Root, o.Enrollment.Root) {
		return floor{}, fmt.Errorf("%w: %s is of a deployment with another root key: give each deployment a StateDir of its own", ErrFloor, path)
	}
	return f, nil
}

func readFloor(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	b, err := io.ReadAll(io.LimitReader(f, maxFloorLen))
	return b, errors.Join(err, f.Close())
}

func (f floor) marshal() []byte {
	b, err := json.Marshal(f)
	if err != nil {
		panic(err) // it has no type that can fail
	}
	return b
}

func writeFloor(o Options, b []byte) error {
	out, err := json.Marshal(floorJSON{Floor: b, Sum: floorSum(b)})
	if err != nil {
		return err
	}
	return replaceFile(o.StateDir, floorPath(o), out)
}

// replaceFile replaces a file of the state directory so that a crash leaves the
// old one or the new one.
func replaceFile(dir, path string, b []byte) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	tmp, err := os.CreateTemp(dir, filepath.Base(path)+".*") // 0600
	if err != nil {
		return err
	}
	if _, err = tmp.Write(b); err == nil {
		err = tmp.Sync()
	}
	err = errors.Join(err, tmp.Close())
	if err == nil {
		err = os.Rename(tmp.Name(), path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(tmp.Name()))
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
