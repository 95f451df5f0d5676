// Package natsfeed is the feed that an enforcer follows, over NATS. It carries
// frames and believes none of them.
//
//	feed, err := natsfeed.Dial(enrollment, nil)
//	if err != nil {
//		return err
//	}
//	enf, err := enforce.Open(ctx, feed, &enforce.Options{Enrollment: enrollment})
//
// Batches are heard on the log's own subject over core NATS, which needs no
// consumer and goes on while a cluster elects a leader. What was missed is read
// from the stream by batched direct gets, resumed by stream position: an enforcer
// has no consumer rights, and ordered consumers and watches were seen not to
// recover (docs/design/wire.md).
//
// # Limits
//
// What waits for a slow host is bounded, and what overflows is dropped, counted,
// and found again in the log. Reconnecting goes on for ever, after 50 ms at
// first. A dead or frozen server is noticed after 1.5 s.
package natsfeed
