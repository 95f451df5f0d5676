package main

import (
	"slices"
	"time"
)

// quantile is the duration that a share q of them does not exceed, by nearest
// rank; 0 is the least, 1 the greatest.
func quantile(d []time.Duration, q float64) time.Duration {
	s := slices.Sorted(slices.Values(d))
	return s[min(len(s)-1, max(0, int(q*float64(len(s)))))]
}
