//go:build race

package faults

// slack is what the race detector costs.
const slack = 5
