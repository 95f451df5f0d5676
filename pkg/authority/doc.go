// Package authority is the client of a Session Authority's HTTP API, for
// issuers that report what became of a session and for responders who decide
// that a caller may no longer act.
//
//	c, err := authority.New(authority.Options{Socket: "/var/lib/interlock/api.sock"})
//	d, err := c.Decide(ctx, authority.Request{
//		Operation: authority.Revoke,
//		Targets:   []authority.Target{authority.One("acme", "session", issuer, "s_9f2c")},
//		Reason:    "stolen-token",
//		Incident:  "INC-142",
//	})
//	cov, err := c.Coverage(ctx, d.Epoch, d.Number, 20*time.Second)
//
// # In effect, and durable
//
// The two are apart. A decision takes effect when enforcers hear it, within
// milliseconds; it is durable when the log has stored it. Decide returns with
// Durable false when the log could not say so in time: enforcers act on the
// decision already, and sending it again with the same idempotency key is safe
// and finds out. Coverage says which enforcers have it in force.
//
// # Wide decisions
//
// A decision that can match more than one session does nothing unless Commit is
// set: Decide then returns a preview, with Committed false.
//
// # Failures
//
// An answer that is not a success is a *Problem (RFC 9457): its Type is stable
// and is what a program decides by, and its Mend says to a person what would
// make the request succeed. A server that cannot be reached is an error that
// wraps ErrUnreachable, or the cause for which the caller cancelled its context;
// in both cases what was asked for may have happened.
package authority
