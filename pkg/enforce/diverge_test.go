package enforce

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/interlock-fabric/interlock/pkg/session"
)

// spoil puts into an enforcer's confirmed state what the log does not say.
func (f *busFeed) spoil(entries ...session.Entry) {
	fw := f.to().(sink).f
	fw.events <- func() {
		c := fw.chain
		c.confirmed.set = c.confirmed.set.Apply(&session.Batch{Number: c.confirmed.number, Entries: entries}, nil)
		c.base = c.confirmed
	}
	settle()
}

// TestDivergenceIsLocated: an enforcer's state comes to differ from the log. By the
// second heartbeat it is seen, everything is denied, and the state is rebuilt; then
// the log line, the status and a receipt say at which batch and in which ranges of
// the keys it was. When it is the authority's digest that is wrong, they say that.
func TestDivergenceIsLocated(t *testing.T) {
	at := func(first byte) session.Entry {
		e := revoke(session.Key{Tenant: 1, Shape: session.Shape(session.KindSession)})
		e.Key.Digest[0] = first
		return e
	}
	for _, x := range []struct {
		name  string
		spoil func(b *bus, f *busFeed) (restore func())
		want  session.Divergence
		says  string
	}{
		{"the enforcer's", func(_ *bus, f *busFeed) func() {
			f.spoil(at(0xc5), at(0xee))
			return func() {}
		}, session.Divergence{Epoch: 1, Number: 6, Compared: true, Ranges: 2, First: 0xc5}, "where the state differed"},
		{"the authority's", func(b *bus, _ *busFeed) func() {
			truth := b.state
			b.as(func(b *bus) {
				b.state = b.state.Apply(&session.Batch{Number: 6, Entries: []session.Entry{at(0xc5)}}, nil)
			})
			return func() { b.as(func(b *bus) { b.state = truth }) }
		}, session.Divergence{Epoch: 1, Number: 6, Compared: true}, "the authority's digest that differs"},
	} {
		t.Run(x.name, func(t *testing.T) {
			within(t, func(t *testing.T, b *bus) {
				var log bytes.Buffer
				e, f := b.open(func(o *Options) { o.Logger = slog.New(slog.NewTextHandler(&log, nil)) })
				defer func() { e.Close() }()
				b.many(5000)
				b.decide(revoke(b.session("s1")))
				settle()
				ok := prepare(t, e, caller("ok"))
				mustAllow(t, e, ok, session.Call{})
				restore := x.spoil(b, f)
				for range 1000 { // two heartbeats
					if e.Status().Diverged > 0 {
						break
					}
					time.Sleep(time.Millisecond)
				}
				if s := e.Status(); s.Diverged != 1 || s.Divergence == nil || s.Divergence.Number != 6 {
					t.Fatalf("%+v", s)
				}
				mustDeny(t, e, ok, session.Call{}, session.ErrStale)
				time.Sleep(5 * time.Second)
				restore()
				time.Sleep(rereadMax)
				mustAllow(t, e, ok, session.Call{})
				mustDeny(t, e, prepare(t, e, caller("s1")), session.Call{}, session.ErrRevoked)
				s := e.Status()
				if s.Divergence == nil || *s.Divergence != x.want {
					t.Fatalf("%+v, want %+v", s.Divergence, x.want)
				}
				said := f.said()
				if r := said[len(said)-1]; r.Divergence == nil || *r.Divergence != x.want || r.Diverged != s.Diverged {
					t.Fatalf("the receipt says %+v", r)
				}
				e.Close()
				if !strings.Contains(log.String(), x.says) {
					t.Fatalf("the log does not say %q:\n%s", x.says, log.String())
				}
			})
		})
	}
}

// TestDivergenceWithATrimmedLog: the rebuild begins with the newest segment that is
// not after the batch at which the states differed, so that they can be compared;
// and not with the segment that the state came from.
func TestDivergenceWithATrimmedLog(t *testing.T) {
	within(t, func(t *testing.T, b *bus) {
		p := &publishing{busFeed: b.feed()}
		b.decide(revoke(b.session("s1")))
		p.publishState(nil) // 1
		b.decide(revoke(b.session("s2")))
		// A segment that is signed and whole, and whose rows are not what it says.
		wrong := b.state.Apply(&session.Batch{Number: 2, Entries: []session.Entry{revoke(b.session("innocent"))}}, nil)
		truth := b.state
		b.as(func(b *bus) { b.state = wrong })
		p.publishState(nil) // 2
		b.as(func(b *bus) { b.state = truth })
		b.trim(1)
		e := p.open(t, nil)
		defer e.Close()
		if s := e.Status(); s.Diverged != 1 {
			t.Fatalf("%+v", s)
		}
		mustAllow(t, e, prepare(t, e, caller("innocent")), session.Call{})
		mustDeny(t, e, prepare(t, e, caller("s1")), session.Call{}, session.ErrRevoked)
		mustDeny(t, e, prepare(t, e, caller("s2")), session.Call{}, session.ErrRevoked)
		time.Sleep(5 * time.Second)
		k := b.session("innocent")
		if d := e.Status().Divergence; d == nil || *d != (session.Divergence{Epoch: 1, Number: 2, Compared: true, Ranges: 1, First: k.Digest[0]}) {
			t.Fatalf("%+v", d)
		}
		b.decide(revoke(b.session("s3")))
		p.publishState(nil) // 3
		b.decide(revoke(b.session("s4")))
		settle()
		p.spoil(revoke(b.session("innocent")))
		p.publishState(nil) // 4, at the divergence itself
		b.decide(revoke(b.session("s5")))
		p.publishState(nil) // 5, after it
		b.trim(1)
		time.Sleep(rereadMax)
		mustAllow(t, e, prepare(t, e, caller("innocent")), session.Call{})
		mustDeny(t, e, prepare(t, e, caller("s5")), session.Call{}, session.ErrRevoked)
		if d := e.Status().Divergence; d == nil || !d.Compared || d.Number < 4 || d.Ranges != 1 {
			t.Fatalf("%+v", d)
		}
	})
}
