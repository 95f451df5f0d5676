package guardtest

import (
	"bytes"
	"context"
	"crypto/ecdh"
	"crypto/ed25519"
	"crypto/rand"
	"sync"
	"testing"

	"github.com/interlock-fabric/interlock/pkg/session"
	"github.com/interlock-fabric/interlock/pkg/trail"
)

// Tape is a recorder of every event, and the bus that takes its reports, under an
// enforcer that is at batch Position of epoch 1.
type Tape struct {
	*trail.Recorder
	key *ecdh.PrivateKey

	mu     sync.Mutex
	frames [][]byte
}

// Position is the batch by which everything on a tape was decided.
const Position = 7

// NewTape returns a tape that ends with the test.
func NewTape(t testing.TB) *Tape {
	t.Helper()
	key, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p := &Tape{key: key}
	p.Recorder, err = trail.New(trail.Options{
		Enrollment: &session.Enrollment{Enforcer: "e", ReceiptKey: ed25519.NewKeyFromSeed(make([]byte, ed25519.SeedSize))},
		Enforcer:   (*reel)(p), Publisher: (*reel)(p), Sample: 1,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Recorder.Close(); err != nil {
			t.Error(err)
		}
	})
	return p
}

// Records ends the recorder and opens what it reported.
func (p *Tape) Records(t testing.TB) (out []session.TrailRecord) {
	t.Helper()
	if err := p.Recorder.Close(); err != nil {
		t.Fatal(err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, b := range p.frames {
		f, err := session.ParseFrame(b)
		if err != nil {
			t.Fatal(err)
		}
		r, err := session.UnmarshalReport(f.Body)
		if err != nil {
			t.Fatal(err)
		}
		c, err := r.Unseal(p.key)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, c.Records...)
	}
	return out
}

// reel is what the recorder asks of a tape.
type reel Tape

func (r *reel) Report(_ context.Context, frame []byte) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.frames = append(r.frames, bytes.Clone(frame))
	return nil
}

func (r *reel) KeySet() *session.KeySet {
	return &session.KeySet{Keys: []session.SigningKey{{Public: r.key.PublicKey().Bytes(), Use: session.UseAudit}}}
}

func (r *reel) Position() (epoch, number uint64) { return 1, Position }
