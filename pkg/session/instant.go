package session

import (
	"math"
	"time"
)

// Instant is a moment in milliseconds since the Unix epoch, the wire form of
// every wall-clock time. Zero means absent.
type Instant int64

// InstantOf converts t, rounding down to the millisecond; the zero time gives
// the zero Instant. The first millisecond of 1970 gives -1, so that a time that
// is there ("exp": 0) is never taken for an absent one.
func InstantOf(t time.Time) Instant {
	if t.IsZero() {
		return 0
	}
	if ms := t.UnixMilli(); ms != 0 {
		return Instant(ms)
	}
	return -1
}

// Time converts back, in UTC; zero gives the zero time.
func (i Instant) Time() time.Time {
	if i == 0 {
		return time.Time{}
	}
	return time.UnixMilli(int64(i)).UTC()
}

// Add returns i moved by d, rounded towards zero to the millisecond. It
// saturates: a moment near the end of time must not wrap to one long past.
func (i Instant) Add(d time.Duration) Instant {
	ms := Instant(d.Milliseconds())
	switch sum := i + ms; {
	case ms > 0 && sum < i:
		return math.MaxInt64
	case ms < 0 && sum > i:
		return math.MinInt64
	default:
		return sum
	}
}

// String formats the instant as RFC 3339 with milliseconds, or "-" when absent.
func (i Instant) String() string {
	if i == 0 {
		return "-"
	}
	return i.Time().Format("2006-01-02T15:04:05.000Z")
}
