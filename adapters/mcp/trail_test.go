package mcpguard_test

import (
	"bytes"
	"context"
	"crypto/ecdh"
	"crypto/ed25519"
	"sync"
	"testing"

	mcpguard "github.com/interlock-fabric/interlock/adapters/mcp"
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

// records ends the recorder and opens what it reported.
func (p *tape) records(t *testing.T, rec *trail.Recorder) (out []session.TrailRecord) {
	t.Helper()
	if err := rec.Close(); err != nil {
		t.Fatal(err)
	}
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

// TestTrail: what the guard denies, cuts and allows is on record, with the tool
// and the caller, whether it was denied before the request was read or after.
func TestTrail(t *testing.T) {
	forEachEra(t, func(t *testing.T, era string) {
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
		w := newWorld(t, &mcpguard.Options{Resource: resource, Trail: rec})
		ann := w.mustDial(t, era, w.token(t, "ann", func(c map[string]any) { c["txn"] = "txn-9" }))
		mustAllow(t, ann, "echo")
		w.await(t, w.started, "echo")
		// By tool: denied by the middleware.
		w.enforcer.deny(session.Denial{Effect: session.EffectRevoked, Seq: 5, Shape: session.Shape(session.KindTool)},
			func(_ *session.Identity, c *session.Call) bool { return c.Tool == "forbidden" })
		if _, err := ann.call("forbidden"); err == nil {
			t.Error("the tool is not denied")
		}
		// By caller: cut while it runs, then denied before it is read.
		done := w.goCall(t, ann, "wait")
		w.enforcer.deny(stolen, user("ann"))
		mustDeny(t, within(t, done), stolenAnswer)
		if _, err := ann.call("echo"); err == nil {
			t.Error("the caller is not denied")
		}
		if _, err := w.dial(t, era, "garbage"); err == nil {
			t.Error("garbage connects")
		}
		got := map[string]session.TrailRecord{}
		for _, r := range p.records(t, rec) {
			if r.Method == "tools/call" || r.Caller.User == "" {
				got[r.Decision.String()+" "+r.Cause.String()+" "+r.Tool] = r
			}
		}
		for _, want := range []string{"allowed  echo", "denied revoked forbidden", "allowed  wait", "cut revoked wait", "denied revoked echo"} {
			r, ok := got[want]
			if !ok {
				t.Errorf("no record of %q among %d", want, len(got))
				continue
			}
			if r.Caller.User != "ann" || r.Transaction != "txn-9" || r.Audience != resource || r.Checked != 7 || r.Arguments == (session.Hash{}) {
				t.Errorf("%s: %+v", want, r)
			}
		}
		if r := got["denied no_identity "]; r.Count == 0 || r.Caller.Tenant != "" {
			t.Errorf("a stranger: %+v", r)
		}
		if r := got["cut revoked wait"]; r.Incident != stolen.Incident || r.Sequence != stolen.Seq || r.Latency == 0 {
			t.Errorf("cut: %+v", r)
		}
	})
}
