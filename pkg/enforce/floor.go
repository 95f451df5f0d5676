package enforce

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/interlock-fabric/interlock/pkg/session"
)

// floor is what an enforcer remembers across restarts: it never again accepts a
// log that ends before this head or has another batch in its place, nor an older
// key set.
type floor struct {
	Epoch  uint64       `json:"epoch"`
	Number uint64       `json:"number"`
	Hash   session.Hash `json:"hash"`
	KeySet uint64       `json:"key_set"`
}

const floorFile = "floor.json"

type floorJSON struct {
	Floor floor  `json:"floor"`
	Sum   []byte `json:"sum"`
}

func (f floor) sum() []byte {
	b, err := json.Marshal(f)
	if err != nil {
		return nil
	}
	sum := sha256.Sum256(append([]byte("interlock floor 1\x00"), b...))
	return sum[:]
}

// loadFloor reads the floor. A directory without one is a first start; one that
// cannot be read is an error, since to go on without it would forget it.
func loadFloor(dir string) (floor, error) {
	if dir == "" {
		return floor{}, nil
	}
	b, err := os.ReadFile(filepath.Join(dir, floorFile))
	if errors.Is(err, fs.ErrNotExist) {
		return floor{}, nil
	}
	if err != nil {
		return floor{}, err
	}
	var in floorJSON
	if err := json.Unmarshal(b, &in); err != nil || !bytes.Equal(in.Sum, in.Floor.sum()) {
		return floor{}, fmt.Errorf("%s is damaged: the enforcer cannot tell whether its log was rolled back; restore the file, or remove it if you trust the bus now",
			filepath.Join(dir, floorFile))
	}
	return in.Floor, nil
}

// save writes the floor so that a crash leaves the old one or the new one.
func (f floor) save(dir string) error {
	b, err := json.Marshal(floorJSON{Floor: f, Sum: f.sum()})
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	tmp, err := os.CreateTemp(dir, floorFile+".*") // 0600
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name())
	if _, err = tmp.Write(b); err == nil {
		err = tmp.Sync()
	}
	if cerr := tmp.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(tmp.Name(), filepath.Join(dir, floorFile))
	}
	if err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
