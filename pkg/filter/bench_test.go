package filter

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"runtime"
	"testing"

	"github.com/interlock-fabric/interlock/pkg/session"
)

// fill calls fn with batches that put n entries in force, of the kinds that an
// identity of eight keys has.
func fill(n int, seed uint64, fn func(*session.Batch)) {
	kinds := []session.Kind{session.KindToken, session.KindSession, session.KindUser, session.KindAgent, session.KindClient}
	rnd := rand.New(rand.NewPCG(seed, 2))
	for number := uint64(1); n > 0; number++ {
		b := &session.Batch{Epoch: 1, Number: number, Time: 1.7e12 + session.Instant(number)}
		for range min(n, session.MaxBatchEntries) {
			k := session.Key{Tenant: 1, Shape: session.Shape(kinds[rnd.IntN(len(kinds))])}
			binary.LittleEndian.PutUint64(k.Digest[:], rnd.Uint64())
			binary.LittleEndian.PutUint64(k.Digest[8:], rnd.Uint64())
			b.Entries = append(b.Entries, session.Entry{Op: session.OpSet, Effect: session.EffectRevoked, Reason: session.ReasonStolenToken, Incident: "INC-1", Key: k})
		}
		n -= len(b.Entries)
		fn(b)
	}
}

func benchSet(b *testing.B, n int, path string) *Set {
	var s *Set
	fill(n, 1, func(x *session.Batch) { s = s.Apply(x, nil) })
	g, err := s.Seal(path, Mark{})
	if err != nil {
		b.Fatal(err)
	}
	return s.onto(g)
}

func benchCaller(b *testing.B, i int) *session.Prepared {
	secret, err := session.NewTenantSecret(1, "t1", make([]byte, 32))
	if err != nil {
		b.Fatal(err)
	}
	n := fmt.Sprint(i)
	p, err := secret.Prepare(session.Identity{
		Tenant: "t1", Issuer: "https://i", Token: "t" + n, User: "u" + n, Actors: []session.Actor{{ID: "a" + n}, {ID: "b" + n}}, Client: "c" + n, Session: session.SessionRef{Issuer: "https://i", ID: "s" + n},
		Ancestors: []session.SessionRef{{Issuer: "https://i", ID: "p" + n}, {Issuer: "https://i", ID: "q" + n}},
	})
	if err != nil {
		b.Fatal(err)
	}
	return p
}

func BenchmarkDecide(b *testing.B) {
	for _, n := range []int{1_000_000, 10_000_000} {
		s := benchSet(b, n, filepath.Join(b.TempDir(), "segment"))
		ps := make([]*session.Prepared, 4096)
		for i := range ps {
			ps[i] = benchCaller(b, i)
		}
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			b.ReportAllocs()
			call := session.Call{}
			for i := 0; b.Loop(); i++ {
				if m, err := s.Decide(ps[i%len(ps)], &call, session.Moment{}); err != nil || m.Record != nil {
					b.Fatal("denied")
				}
			}
		})
		runtime.KeepAlive(s)
	}
}

func BenchmarkApplyTo(b *testing.B) {
	for _, n := range []int{0, 1_000_000, 10_000_000} {
		base := (*Set)(nil)
		if n > 0 {
			base = benchSet(b, n, filepath.Join(b.TempDir(), "segment"))
		}
		var batches []*session.Batch
		fill(100_000, 7, func(x *session.Batch) { batches = append(batches, x) })
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			b.ReportAllocs()
			s := base
			for i := 0; b.Loop(); i++ {
				if i%len(batches) == 0 {
					s = base
				}
				s = s.Apply(batches[i%len(batches)], nil)
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/1000, "ns/entry")
		})
	}
}

// BenchmarkShed copies what has arrived since a merge began.
func BenchmarkShed(b *testing.B) {
	s := filled(400_000)
	top := &s.layers[len(s.layers)-1]
	for b.Loop() {
		top.t.shed(top)
	}
}
