// Package session is the vocabulary of the Interlock fabric: who is calling
// (Identity), what a decision names (Target), what it does (Effect), the
// signed messages that carry decisions from a Session Authority to enforcers,
// and the verdict an enforcer answers with.
//
// The package has no dependency outside the standard library, starts no
// goroutine and does no I/O. Everything that another language needs to
// interoperate is written down in docs/design/wire.md and pinned by the golden
// vectors under testdata.
//
// # Bounds
//
// Every value that crosses a boundary is bounded: a value in clear by
// MaxValueLen, a frame by MaxFrameLen, a batch by MaxBatchEntries, and an
// identity by MaxProbes derived keys. Parsing never allocates in proportion to
// a length that the input merely claims.
package session
