// Package mcpguard puts an enforcer in front of a Model Context Protocol server
// made with the official Go SDK: a caller that may no longer act is refused
// before any work, and the work that it has running is cut, with an error that
// says what, why and which incident.
//
//	guard, err := mcpguard.New(enforcer, verifier, nil)
//	if err != nil {
//		return err
//	}
//	defer guard.Close()
//
//	server := mcp.NewServer(&mcp.Implementation{Name: "tools"}, nil)
//	return http.ListenAndServe(":8080", guard.Serve(server, nil))
//
// Serve answers both eras of the protocol at one endpoint: revision 2026-07-28,
// which is stateless, and the ones before it, which have sessions. Where the
// host makes the SDK's handlers itself, it puts Handler in front of them and
// adds Middleware to every server; one without the other is no guard.
//
// # What a denial looks like
//
// Every denial is a JSON-RPC error whose data is a Denied. At HTTP:
//
//	no credentials                401  Bearer resource_metadata, scope
//	invalid, expired, revoked     401  Bearer error="invalid_token"
//	step-up                       401  Bearer error="insufficient_user_authentication" (RFC 9470)
//	scope missing, reduced rights 403  Bearer error="insufficient_scope"
//	suspended                     403  Retry-After
//	revoked tool or audience      403  (another token would not help)
//	stale, overloaded, closed     503  Retry-After: the enforcer's trouble, not the caller's
//
// A request that is denied later, by tool or in mid-call, has its headers sent
// already: the same error is its JSON-RPC answer, with code -31401, -31403 or
// -31503 after the status above. These lie outside the ranges that JSON-RPC and
// MCP reserve. A legacy GET stream that is cut ends with the same data in a
// notifications/message of level "error".
//
// # Guarantees
//
// The guard decides nothing: what the enforcer allows is allowed, and every
// error from it denies, whatever its type. Without an enforcer there is no
// guard, and without a verified identity there is no call.
//
// A tool that ignores its context does not hold the cut back: its caller has
// the error at once and nothing that the tool does later reaches the caller.
// The tool itself runs on until it returns, since nothing in Go can stop it.
//
// A session belongs to who opened it (tenant, issuer, user, client, session and
// delegation chain): the token of another is refused there, and a renewed token
// of the same caller is not. When its caller is revoked, a legacy session is
// closed, after the errors of what it had running are out.
//
// A tool's context carries its caller: the calls that the tool makes by a
// guard.Transport end with them.
//
// # Limits
//
// Middleware must be the outermost: add it after all others. Lists, pings and
// the like are checked but not cut, since they end by themselves. Server to
// client requests that a tool makes outside its context are beyond reach.
package mcpguard
