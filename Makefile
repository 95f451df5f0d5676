# What CI runs, by the same script: `make ci` on your machine is CI.

GO ?= go

.PHONY: all test race vet lint fmt fmt-check tidy-check fuzz interop demo bench microbench vectors ci

all: test lint

test:
	$(GO) test ./...

race:
	$(GO) test -race ./...

vet:
	$(GO) vet ./...

lint:
	.ci/run lint staticcheck

fmt:
	$(GO) fmt ./...

fmt-check:
	.ci/run format

tidy-check:
	.ci/run tidy

# FUZZTIME=1m make fuzz
fuzz:
	.ci/run fuzz

interop:
	.ci/run interop

demo:
	$(GO) run ./cmd/session-authority demo

# All that bench/README.md describes; BENCH="-run check -n 1000000" is a part.
bench:
	cd bench && $(GO) run . -json results/$$(date +%F).json $(BENCH)

# Go's own benchmarks beside the code.
microbench:
	$(GO) test -run '^$$' -bench . -benchmem ./...

# Only when a version of the wire form gains vectors; see docs/design/wire.md.
vectors:
	$(GO) test ./pkg/session -run TestVectors -update

ci:
	.ci/run
