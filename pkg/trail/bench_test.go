package trail

import (
	"fmt"
	"testing"

	"github.com/interlock-fabric/interlock/pkg/session"
)

// What a decision costs in the trail: Start and Record together.
func BenchmarkAllowed(b *testing.B) {
	for _, bb := range []struct {
		name  string
		share float64
	}{{"share=0", 0}, {"share=1%", 0.01}, {"share=100%", 1}} {
		b.Run(bb.name, func(b *testing.B) {
			f := newFixture(b, Options{Sample: bb.share})
			benchmark(b, f, nil)
		})
	}
	b.Run("none", func(b *testing.B) {
		f := newFixture(b, Options{})
		rec := f.Recorder
		f.Recorder = nil
		benchmark(b, f, nil)
		f.Recorder = rec
	})
}

func benchmark(b *testing.B, f *fixture, err error) {
	p := f.caller("alice")
	args := []byte(`{"repo":"interlock","path":"README.md"}`)
	b.ReportAllocs()
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			mark := f.Start()
			f.Record(&Event{
				Mark: mark, Caller: p, Method: "tools/call", Call: session.Call{Tool: "read"}, Arguments: args, Err: err,
				Traceparent: "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
			})
		}
	})
}

// A flood of denials: all the same, and all different.
func BenchmarkDenied(b *testing.B) {
	b.Run("same", func(b *testing.B) { benchmark(b, newFixture(b, Options{}), revoked(1)) })
	b.Run("different", func(b *testing.B) {
		f := newFixture(b, Options{})
		p := f.caller("alice")
		tools := make([]string, 4096)
		for i := range tools {
			tools[i] = fmt.Sprint("tool-", i)
		}
		err := revoked(1)
		b.ReportAllocs()
		b.ResetTimer()
		for i := range b.N {
			f.Record(f.event(p, tools[i%len(tools)], err))
		}
	})
}
