module github.com/interlock-fabric/interlock/bench

go 1.26.0

require (
	github.com/FastFilter/xorfilter v0.4.2-0.20260120015552-4e5a4d9df65a
	github.com/bits-and-blooms/bloom/v3 v3.7.1
	github.com/interlock-fabric/interlock v0.0.0
)

require github.com/bits-and-blooms/bitset v1.24.2 // indirect

replace github.com/interlock-fabric/interlock => ..
