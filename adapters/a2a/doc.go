// Package a2aguard puts an enforcer in front of an Agent2Agent (A2A 1.0) agent
// made with the official Go SDK, on all of its transports: a caller that may no
// longer act is refused before any work, and the agent that works for it is
// stopped, with an end of the task that says what, why and which incident.
//
//	guard, err := a2aguard.New(enforcer, verifier, &a2aguard.Options{Resource: "https://agent.example/a2a"})
//	if err != nil {
//		return err
//	}
//	defer guard.Close()
//
//	handler := guard.NewHandler(agent, a2aguard.HandlerOptions{})
//	http.Handle("/a2a", guard.JSONRPC(a2asrv.NewJSONRPCHandler(handler)))
//	http.Handle("/rest/", guard.REST(http.StripPrefix("/rest", a2asrv.NewRESTHandler(handler))))
//	server := grpc.NewServer(grpc.ChainUnaryInterceptor(guard.UnaryInterceptor), grpc.ChainStreamInterceptor(guard.StreamInterceptor))
//	a2agrpc.NewHandler(handler).RegisterWith(server)
//
// NewHandler takes the place of a2asrv.NewHandler. The front of each transport
// finds out who calls; a handler that is reached without one denies.
//
// # What a denial looks like
//
// Before any work, as a status of the transport, with the challenge in
// WWW-Authenticate, or over gRPC in the trailer of that name:
//
//	no credentials                401  Unauthenticated   Bearer resource_metadata, scope
//	invalid, expired, revoked     401  Unauthenticated   Bearer error="invalid_token"
//	step-up                       401  Unauthenticated   Bearer error="insufficient_user_authentication" (RFC 9470)
//	scope missing, reduced rights 403  PermissionDenied  Bearer error="insufficient_scope"
//	suspended                     403  PermissionDenied  Retry-After, RetryInfo
//	revoked operation or skill    403  PermissionDenied  (another token would not help)
//	stale, overloaded, closed     503  Unavailable       Retry-After, RetryInfo: the enforcer's trouble
//
// Every error carries an ErrorInfo of the domain a2a-protocol.org whose metadata
// is a Denied. Over JSON-RPC, and in streams whose headers are out, a denial by
// operation or skill is the same error inside the protocol, with code -31401 or
// -31403, and -32000 for the enforcer's trouble.
//
// # How a task ends
//
// The SDK runs an agent whatever becomes of the request that began it, so the
// guard binds the execution itself to the caller. When that one must stop, the
// agent's context is cancelled with the denial as its cause, and the task ends at
// once, in a state that is stored before anything else can be:
//
//	revoked, suspended, reduced   TASK_STATE_CANCELED
//	the same, before it began     TASK_STATE_REJECTED
//	step-up, credential expired   TASK_STATE_AUTH_REQUIRED
//	stale, overloaded, closed     TASK_STATE_FAILED
//
// The status has a message of two parts: the reason as text, and a Denied as
// data, with the challenge where one can be met. Streams end with that status; a
// call that waits is answered with it, without what the task holds. Push
// notifications stop: each is checked by itself, and the end of the task is not
// sent either. AUTH_REQUIRED is no end: the execution is over, and a message to
// the same task begins the next one, once the caller has logged in again, has
// been approved, or has renewed its token.
//
// An agent that ignores its context does not hold any of this back, and nothing
// that it says later is stored or sent. It runs on until it returns, since
// nothing in Go can stop it, and is cleaned up after that.
//
// # Whose a task is
//
// The SDK's task store finds a task by its id for anybody who knows it, and its
// push notifications and subscriptions do not ask at all. Under the guard a task
// belongs to who began it: tenant, issuer, user, client and delegation chain. For
// all others it does not exist. Another session of the same caller reaches it. One
// that only listens is cut alone, with an error, and the task goes on.
//
// # Outgoing calls
//
// The context of Execute carries the caller. NewTransport for the SDK's client,
// and guard.Transport for any HTTP client, MCP clients among them, check each
// call of the agent against it, and end what is under way.
//
// # Limits
//
// A context id is the client's to choose, and no secret: an agent that keeps what
// it knows by context must keep it by IdentityOf too. The SDK's cluster mode does
// not carry who called to where the agent runs, so that executions are denied
// there. A call over the SDK's JSON-RPC client shows a 401 or 403 as a status
// without its reason. Limits on the size of requests are the host's:
// http.MaxBytesHandler.
package a2aguard
