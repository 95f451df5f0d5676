package enforce

import (
	"bytes"
	"context"
	"crypto/sha256"
	"io"
	"testing"
	"time"

	"github.com/interlock-fabric/interlock/pkg/filter"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// publishing is a feed with published segments.
type publishing struct {
	*busFeed
	frames [][]byte
	chunks map[[32]byte][]byte
	reads  int
}

func (p *publishing) Segments(context.Context) ([][]byte, error) { return p.frames, nil }

func (p *publishing) Segment(_ context.Context, ref session.SegmentRef, w io.Writer) error {
	p.reads++
	b := p.chunks[ref.Sum]
	for len(b) > 0 {
		n := min(len(b), 1000)
		if _, err := w.Write(b[:n]); err != nil {
			return err
		}
		b = b[n:]
	}
	return nil
}

// publishState publishes the state as it is now; mod may change its bytes, or
// the description, before it is signed.
func (p *publishing) publishState(mod func(ref *session.SegmentRef, bytes []byte)) {
	b := p.b
	b.writing.Lock()
	defer b.writing.Unlock()
	g, err := b.state.Seal("", filter.Mark{Epoch: b.epoch, Number: b.number, Head: b.head, Time: b.now()})
	if err != nil {
		b.t.Fatal(err)
	}
	var buf bytes.Buffer
	if _, err := g.WriteTo(&buf); err != nil {
		b.t.Fatal(err)
	}
	ref := session.SegmentRef{
		Epoch: b.epoch, Number: b.number, Head: b.head, State: b.state.Digest(), Time: b.now(),
		Entries: uint64(g.Len()), Size: uint64(g.Size()), Sum: sha256.Sum256(buf.Bytes()),
	}
	if mod != nil {
		mod(&ref, buf.Bytes())
	}
	if p.chunks == nil {
		p.chunks = map[[32]byte][]byte{}
	}
	p.chunks[ref.Sum] = buf.Bytes()
	p.frames = append(p.frames, b.seal(session.TypeSegment, ref.MarshalBody(), b.signer))
}

func (p *publishing) open(t *testing.T, mod func(*Options)) *Enforcer {
	o := &Options{Enrollment: p.b.enrol("e1")}
	if mod != nil {
		mod(o)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	e, err := Open(ctx, p, o)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

// trim takes from the log what is before its newest n batches.
func (b *bus) trim(n int) {
	b.with(func(b *bus) {
		for i := range b.log[:len(b.log)-n] {
			b.log[i] = []byte("trimmed")
		}
	})
}

// TestColdStartFromASegment: with the log trimmed behind a published segment, an
// enforcer starts from that and the rest of the log, with a state directory or
// without.
func TestColdStartFromASegment(t *testing.T) {
	for _, dir := range []string{"", t.TempDir()} {
		within(t, func(t *testing.T, b *bus) {
			p := &publishing{busFeed: b.feed()}
			b.many(3000)
			b.decide(revoke(b.session("s1")))
			p.publishState(nil)
			b.decide(revoke(b.session("s2")))
			b.trim(1)
			e := p.open(t, func(o *Options) { o.StateDir = dir })
			defer e.Close()
			if s := e.Status(); s.Entries != 3002 || s.Applied != b.number {
				t.Fatalf("%+v", s)
			}
			mustDeny(t, e, prepare(t, e, caller("s1")), session.Call{}, session.ErrRevoked)
			mustDeny(t, e, prepare(t, e, caller("s2")), session.Call{}, session.ErrRevoked)
			mustAllow(t, e, prepare(t, e, caller("ok")), session.Call{})
		})
	}
}

// TestGapInTheLogIsMendedByASegment: the log was trimmed while a running enforcer
// was cut off.
func TestGapInTheLogIsMendedByASegment(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		p := &publishing{busFeed: b.feed()}
		b.decide(revoke(b.session("s0")))
		e := p.open(t, nil)
		defer e.Close()
		b.with(func(b *bus) { b.dead = true })
		b.many(5000)
		b.decide(revoke(b.session("s1")))
		p.publishState(nil)
		b.trim(0)
		time.Sleep(time.Minute)
		mustDeny(t, e, prepare(t, e, caller("ok")), session.Call{}, session.ErrStale)
		b.with(func(b *bus) { b.dead = false })
		time.Sleep(30 * time.Second)
		mustAllow(t, e, prepare(t, e, caller("ok")), session.Call{})
		mustDeny(t, e, prepare(t, e, caller("s1")), session.Call{}, session.ErrRevoked)
		mustDeny(t, e, prepare(t, e, caller("s0")), session.Call{}, session.ErrRevoked)
	})
}

// TestSegmentsThatAreNotBelieved: each of these is passed over for the log, which
// is whole.
func TestSegmentsThatAreNotBelieved(t *testing.T) {
	for name, publish := range map[string]func(t *testing.T, p *publishing){
		"altered": func(_ *testing.T, p *publishing) {
			p.publishState(func(_ *session.SegmentRef, b []byte) { b[len(b)/2] ^= 1 })
		},
		"another's signature": func(t *testing.T, p *publishing) {
			p.publishState(nil)
			p.frames[0] = p.b.seal(session.TypeSegment, frameBody(t, p.frames[0]), p.b.keys["b"])
		},
		"too large": func(_ *testing.T, p *publishing) {
			p.publishState(func(r *session.SegmentRef, _ []byte) { r.Size = session.MaxSegmentSize })
		},
		"of another batch than it says": func(_ *testing.T, p *publishing) {
			p.publishState(func(r *session.SegmentRef, _ []byte) { r.Number++ })
		},
		"of a tenant's key": func(_ *testing.T, p *publishing) {
			b := p.b
			b.newKeySet(func(ks *session.KeySet) {
				ks.Keys = append(ks.Keys, session.SigningKey{Public: b.pub("b"), Use: session.UseWriter, Tenants: []session.TenantID{1}})
			})
			b.as(func(b *bus) { b.signer = b.keys["b"] })
			p.publishState(nil)
			b.as(func(b *bus) { b.signer = b.keys["a"] })
		},
		"of a branch that was not stored": func(_ *testing.T, p *publishing) {
			b := p.b
			kept := b.chainNow()
			b.decide(revoke(b.session("ok")))
			p.publishState(nil)
			b.restore(kept)
			b.decide(revoke(b.session("s2")))
			b.decide(revoke(b.session("s3")))
		},
	} {
		t.Run(name, func(t *testing.T) {
			within(t, func(t *testing.T, b *bus) {
				p := &publishing{busFeed: b.feed()}
				b.decide(revoke(b.session("s1")))
				publish(t, p)
				e := p.open(t, func(o *Options) { o.MaxEntries = 1000 })
				defer e.Close()
				mustDeny(t, e, prepare(t, e, caller("s1")), session.Call{}, session.ErrRevoked)
				mustAllow(t, e, prepare(t, e, caller("ok")), session.Call{})
				if e.view.Load().set.Segment() != nil {
					t.Error("the segment was believed")
				}
			})
		})
	}
}

func frameBody(t *testing.T, b []byte) []byte {
	f, err := session.ParseFrame(b)
	if err != nil {
		t.Fatal(err)
	}
	return f.Body
}
