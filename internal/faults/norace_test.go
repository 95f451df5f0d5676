//go:build !race

package faults

const slack = 1
