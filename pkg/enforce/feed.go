package enforce

import "context"

// Feed is how an Enforcer hears of decisions. It carries opaque bytes: nothing
// that it delivers is believed before its signature is verified, and silence is
// never taken for health. Package natsfeed has the one for NATS.
type Feed interface {
	// Start begins delivery to sink and returns when the subscriptions are in
	// place, or when ctx ends. After an error, which leaves nothing behind, it is
	// called again; after success no more.
	Start(ctx context.Context, sink Sink) error
	// Log reads the stored batches, oldest first, from stream position from
	// (0 is the first stored), and calls fn with each one's position and bytes
	// until the end as the answering server knows it. It returns the position to
	// go on from. An error of fn stops it and is returned.
	Log(ctx context.Context, from uint64, fn func(pos uint64, frame []byte) error) (next uint64, err error)
	// KeySets returns the stored key sets, oldest first.
	KeySets(ctx context.Context) ([][]byte, error)
	// Clock sends a nonce to the writer and returns the frame that it answers.
	Clock(ctx context.Context, nonce [32]byte) ([]byte, error)
	// Receipt publishes a receipt. It does not wait for it to be stored.
	Receipt(ctx context.Context, frame []byte) error
	// Close ends delivery. No method of the sink is called after it returns.
	Close() error
}

// OrderFeed is a Feed that can also read the emergency orders that are stored. With
// one, an enforcer that was away when an order was published has it before it
// allows anybody.
type OrderFeed interface {
	Feed
	// Orders calls fn with the stored orders, as signed frames. An error of fn
	// stops it and is returned.
	Orders(ctx context.Context, fn func(frame []byte) error) error
}

// Sink takes what a Feed delivers. Its methods do not block and may be called
// concurrently. A frame is the sink's to keep.
type Sink interface {
	// Batch takes a frame heard on the log's own subject.
	Batch(frame []byte)
	// Beat takes a heartbeat or a rejection.
	Beat(frame []byte)
	// KeySet takes a root-signed key set.
	KeySet(frame []byte)
	// Order takes an emergency order.
	Order(frame []byte)
	// Connected says that the link went up or down. It is a hint to look for
	// gaps, never a sign of freshness.
	Connected(up bool)
}
