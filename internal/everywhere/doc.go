// Package everywhere shows one decision at work in every place at once: it has no
// code but a test.
//
// The test runs the real parts: an authority with its bus, a host with the
// adapters of MCP and A2A in it, a gateway in front of another that guards
// nothing, and the clients of both SDKs.
package everywhere
