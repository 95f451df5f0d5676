package demo

import (
	"bytes"
	"encoding/json"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// TestEveryExpectationHolds plays the whole demo, bus cut included.
func TestEveryExpectationHolds(t *testing.T) {
	var out bytes.Buffer
	r, err := Run(t.Context(), Options{Out: &out, JSON: true, Fleet: 10, Dir: t.TempDir()})
	if err != nil {
		t.Fatalf("%v\n%s", err, out.String())
	}
	var got Result
	if err := json.Unmarshal(out.Bytes(), &got); err != nil {
		t.Fatalf("not one JSON object: %v", err)
	}
	if !got.OK || len(got.Steps) != len(r.Steps) || len(got.Steps) < 25 {
		t.Fatalf("%d steps, ok %v", len(got.Steps), got.OK)
	}
}
