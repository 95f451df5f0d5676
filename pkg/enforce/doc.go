// Package enforce holds the revocation state of the fabric in memory and answers
// for each request whether its caller may go on.
//
//	enrollment, err := session.LoadEnrollment("enforcer.json")
//	feed, err := natsfeed.Dial(enrollment, nil)
//	enf, err := enforce.Open(ctx, feed, &enforce.Options{Enrollment: enrollment})
//	defer enf.Close()
//
//	caller, err := enf.Prepare(identity)              // once per credential
//	err = enf.Check(caller, session.Call{Tool: name}) // each request
//	ctx, done, err := enf.Bind(ctx, caller, call)     // work that takes time
//
// # Guarantees
//
// Once a batch is applied, no request whose identity matches one of its entries
// is allowed, and work that runs under such an identity is cancelled. An enforcer
// that cannot show that its state is at most MaxStale old denies; so does one
// that has no verified state yet, the zero Enforcer, and a closed one. It acts
// only on what a key that the pinned root vouches for has signed, in the chain.
//
// An emergency order (session.Order), from the bus or as a file in
// Options.OrdersDir, denies in every mode that denies, until the log has adopted it
// or the root withdraws its key; neither silence nor a restart lifts it. With
// Options.Agents callers are held against the authority's registry: agents that are
// not registered, and code other than theirs, are denied.
//
// # Limits
//
// Check answers for revocation, expiry and freshness. Whether the credential is
// authentic, for this audience, and in the hands of its owner is for the caller
// to verify first. Work that Bind covers ends when it listens to its context;
// package mcpguard shows what to do about work that does not.
package enforce
