package a2aguard_test

import (
	"bytes"
	"context"
	"crypto/ecdh"
	"crypto/ed25519"
	"sync"
	"testing"

	"github.com/a2aproject/a2a-go/v2/a2a"

	a2aguard "github.com/interlock-fabric/interlock/adapters/a2a"
	"github.com/interlock-fabric/interlock/pkg/authority"
	"github.com/interlock-fabric/interlock/pkg/session"
	"github.com/interlock-fabric/interlock/pkg/trail"
)

// tape is a bus that keeps the reports, and an enforcer that is at batch 7.
type tape struct {
	mu     sync.Mutex
	frames [][]byte
	key    *ecdh.PrivateKey
}

func (p *tape) Report(_ context.Context, frame []byte) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.frames = append(p.frames, bytes.Clone(frame))
	return nil
}

func (p *tape) KeySet() *session.KeySet {
	return &session.KeySet{Keys: []session.SigningKey{{Public: p.key.PublicKey().Bytes(), Use: session.UseAudit}}}
}

func (p *tape) Position() (uint64, uint64) { return 1, 7 }

// TestTrail: what the guard denies, cuts and allows is on record, on every
// transport.
func TestTrail(t *testing.T) {
	forEachTransport(t, func(t *testing.T, tr a2a.TransportProtocol) {
		key, err := ecdh.X25519().NewPrivateKey(bytes.Repeat([]byte{1}, 32))
		if err != nil {
			t.Fatal(err)
		}
		p := &tape{key: key}
		rec, err := trail.New(trail.Options{
			Enrollment: &session.Enrollment{Enforcer: "e", ReceiptKey: ed25519.NewKeyFromSeed(make([]byte, 32))},
			Enforcer:   p, Publisher: p, Sample: 1,
		})
		if err != nil {
			t.Fatal(err)
		}
		defer rec.Close()
		w := newWorld(t, &a2aguard.Options{Trail: rec}, a2aguard.HandlerOptions{}, 0)
		c, sid := w.user(t, tr, "ann")
		c.mustComplete(t, "echo", "")
		r := c.stream(t, "wait", "")
		w.On(t, authority.Revoke, "session", sid)
		r.mustEnd(t, a2a.TaskStateCanceled, "revoked")
		if _, err := c.send(t, "echo", ""); err == nil {
			t.Error("the caller is not denied")
		}
		if err := rec.Close(); err != nil {
			t.Fatal(err)
		}
		got := map[string]uint64{}
		for _, b := range p.frames {
			f, err := session.ParseFrame(b)
			if err != nil {
				t.Fatal(err)
			}
			rep, err := session.UnmarshalReport(f.Body)
			if err != nil {
				t.Fatal(err)
			}
			content, err := rep.Unseal(key)
			if err != nil {
				t.Fatal(err)
			}
			for _, x := range content.Records {
				if x.Caller.User != "ann" || x.Caller.Session != sid || x.Method == "" || x.Checked != 7 {
					t.Errorf("%+v", x)
				}
				got[x.Decision.String()+" "+x.Cause.String()] += x.Count
			}
		}
		if got["allowed "] < 2 || got["cut revoked"] != 1 || got["denied revoked"] != 1 {
			t.Errorf("%v", got)
		}
	})
}
