package enforce

import (
	"time"

	"github.com/interlock-fabric/interlock/pkg/session"
)

// reading is one look at the local clocks: mono since an arbitrary base, which
// only runs forward, and wall in nanoseconds since the Unix epoch.
type reading struct {
	mono time.Duration
	wall int64
}

// localClock reads the operating system's clocks.
func localClock() func() reading {
	base := time.Now()
	return func() reading {
		t := time.Now()
		return reading{mono: t.Sub(base), wall: t.UnixNano()}
	}
}

// drift bounds how much faster one host's monotonic clock may run than
// another's: 500 ppm, several times what NTP lets a clock be steered by.
func drift(elapsed time.Duration) time.Duration { return elapsed / 2000 }

// jumpLimit is how far the wall clock may move against the monotonic one before
// it is a jump: a suspended host, or a clock that was set. It is below the least
// MaxStale.
const jumpLimit = time.Second

// jumped reports whether the clocks have moved against each other since they
// were skew apart.
func jumped(now reading, skew int64) bool {
	d := now.wall - int64(now.mono) - skew
	return d > int64(jumpLimit) || d < -int64(jumpLimit)
}

// anchor places a writer's clocks on the local monotonic one: its clocks showed
// mono and wall at some local moment between sent and received.
type anchor struct {
	writer         session.WriterID
	sent, received time.Duration
	mono           time.Duration
	wall           int64 // nanoseconds

	// beat is the newest heartbeat heard of the writer, by its clock. Only the
	// follower looks at it; the rest never changes.
	beat   time.Duration
	beaten bool
}

// earliest is the earliest local moment at which the writer's monotonic clock
// can have shown m: the age of a heartbeat counts from there.
func (a *anchor) earliest(m time.Duration) time.Duration {
	d := m - a.mono
	return a.sent + d - drift(max(d, -d))
}

// middle is the best estimate of the writer's wall clock at now, and bound how
// far it may be off, on either side.
func (a *anchor) middle(now time.Duration) int64 { return (a.lower(now) + a.upper(now)) / 2 }

func (a *anchor) bound(now time.Duration) time.Duration {
	return (a.received-a.sent)/2 + drift(max(now-a.sent, a.sent-now)) + time.Millisecond
}

// lower and upper are the writer's wall clock at the local moment now, at least
// and at most. The wall clock on the wire is cut to milliseconds.
func (a *anchor) lower(now time.Duration) int64 {
	return a.wall + int64(now-a.received) - int64(drift(now-a.sent))
}

func (a *anchor) upper(now time.Duration) int64 {
	return a.wall + int64(now-a.sent) + int64(drift(now-a.sent)) + int64(time.Millisecond)
}
