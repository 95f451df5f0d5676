// Package trail records what an enforcement point decided, and who it saw, for
// the authority: sealed to the authority's key, signed by the enforcer, batched
// off the request path.
//
//	rec, err := trail.New(trail.Options{Enrollment: enrollment, Enforcer: enf, Publisher: feed, Sample: 0.01})
//	if err != nil {
//		return err
//	}
//	defer rec.Close() // before the enforcer, which closes the feed
//
//	mark := rec.Start()
//	err = enf.Check(prepared, call)
//	rec.Record(&trail.Event{Mark: mark, Caller: prepared, Method: "tools/call", Call: call, Err: err})
//
// The adapters do the latter by themselves when they are given a Recorder. A nil
// Recorder records nothing.
//
// # What is recorded
//
// Every denial, every call that was cut, and a share of the allowed calls: who,
// through which chain, what was asked for, a keyed digest of its arguments, what
// was decided and by which entry, how long that took, and where the request
// belongs (W3C traceparent, txn). Never arguments, results, tokens or keys. Of
// every caller it also reports that it was seen, when first and last, and how
// often, so that the authority can find agents that nobody registered.
//
// # Guarantees
//
// Record never waits for the bus. For an allowed call that is not sampled it
// takes no lock, and allocates only when a caller is seen for the first time.
// Memory is bounded: see Options. Identical denials become one record with a
// count. When the bus is slow or away the oldest samples are dropped first; a
// denial is never dropped, but when there are too many different ones, only the
// cause and the count of the rest are kept. Whatever is left out is counted in
// the reports themselves and in Stats.
//
// # Limits
//
// A report that the bus took may still be lost before it is stored; the reports
// of a boot are numbered and chained, so that the gap shows. What was not sent
// when the process is killed is lost, and does not show. In shadow mode the
// enforcer tells nobody what it would have denied, the trail included.
package trail
