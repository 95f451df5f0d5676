// Package yamlfile reads the configuration files of both programs: one YAML
// document, in which every key must be known.
package yamlfile

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"go.yaml.in/yaml/v3"
)

// MaxLen bounds a file, in bytes.
const MaxLen = 1 << 20

// Read returns the contents of a file, and one byte more than MaxLen at most.
func Read(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }() // only read
	return io.ReadAll(io.LimitReader(f, MaxLen+1))
}

// Decode reads the one document in b into v, whose values stay where the document
// has none. The error's text is fit for a person, and names the line and the key.
func Decode(b []byte, v any) error {
	if len(b) > MaxLen {
		return fmt.Errorf("longer than %d bytes", MaxLen)
	}
	d := yaml.NewDecoder(bytes.NewReader(b))
	d.KnownFields(true)
	if err := d.Decode(v); err != nil && !errors.Is(err, io.EOF) {
		return errors.New(plain(err))
	}
	if err := d.Decode(new(any)); !errors.Is(err, io.EOF) {
		return errors.New("something follows the first document")
	}
	return nil
}

// plain says in our words what the library says of a field, without the names of
// our types.
func plain(err error) string {
	var t *yaml.TypeError
	if !errors.As(err, &t) {
		return strings.TrimPrefix(err.Error(), "yaml: ")
	}
	var lines []string
	for _, s := range t.Errors {
		line, rest, _ := strings.Cut(s, ": ")
		if name, _, ok := strings.Cut(strings.TrimPrefix(rest, "field "), " not found in type "); ok {
			rest = fmt.Sprintf("unknown key %q", name)
		} else if what, into, ok := strings.Cut(rest, " into "); ok && strings.Contains(into, ".") {
			rest = what + " into a " + strings.ToLower(into[strings.LastIndexByte(into, '.')+1:])
		}
		lines = append(lines, line+": "+rest)
		if len(lines) == 5 {
			break
		}
	}
	return strings.Join(lines, "; ")
}
