//go:build race

package filter

// raced: the race detector makes pools drop what they are given, at random.
const raced = true
