package session

import "time"

// Instant is a moment in milliseconds since the Unix epoch, the wire form of
// every wall-clock time. Zero means absent.
type Instant int64

// InstantOf converts t, rounding down to the millisecond; the zero time gives
// the zero Instant.
func InstantOf(t time.Time) Instant {
	if t.IsZero() {
		return 0
	}
	return Instant(t.UnixMilli())
}

// Time converts back, in UTC; zero gives the zero time.
func (i Instant) Time() time.Time {
	if i == 0 {
		return time.Time{}
	}
	return time.UnixMilli(int64(i)).UTC()
}

// Add returns i moved by d, rounded towards zero to the millisecond.
func (i Instant) Add(d time.Duration) Instant { return i + Instant(d.Milliseconds()) }

// String formats the instant as RFC 3339 with milliseconds, or "-" when absent.
func (i Instant) String() string {
	if i == 0 {
		return "-"
	}
	return i.Time().Format("2006-01-02T15:04:05.000Z")
}
