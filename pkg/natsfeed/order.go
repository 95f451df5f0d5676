package natsfeed

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/interlock-fabric/interlock/pkg/session"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nkeys"
)

// CheckAccess reports what Dial and PublishOrder would refuse of the servers of a
// bus and of what verifies them. It wraps session.ErrInvalid.
func CheckAccess(n session.NATSAccess) error {
	_, err := transport(n)
	return err
}

// PublishOrder publishes an emergency order at every server of the bus that it
// reaches, with the NKey of the order's own key, and returns how many have taken
// it. Servers of one cluster pass it on; those that have lost each other do not.
// That it is stored nobody says. It gives up with ctx, and after 5 s at each
// server; the error, when none was reached, says why at each.
func PublishOrder(ctx context.Context, n session.NATSAccess, frame []byte) (reached int, err error) {
	o, err := session.ParseOrder(frame)
	if err != nil {
		return 0, err
	}
	key, err := nkeys.FromSeed([]byte(n.NKeySeed))
	if err != nil {
		return 0, fmt.Errorf("%w: malformed NKey seed", session.ErrInvalid)
	}
	defer key.Wipe()
	pub, err := key.PublicKey()
	if err != nil {
		return 0, fmt.Errorf("%w: malformed NKey seed", session.ErrInvalid)
	}
	secure, err := transport(n)
	if err != nil {
		return 0, err
	}
	ctx, cancel := context.WithTimeout(ctx, orderPatience)
	defer cancel()
	errs := make([]error, len(n.URLs))
	var at sync.WaitGroup
	for i, url := range n.URLs {
		at.Go(func() {
			opts := []nats.Option{
				nats.Name("interlock emergency key " + o.ID.Key.String()), nats.Nkey(pub, key.Sign), nats.NoReconnect(),
				nats.CustomInboxPrefix(InboxPrefix(o.ID.Key.String())), nats.IgnoreDiscoveredServers(), nats.Timeout(orderPatience),
			}
			if secure != nil {
				opts = append(opts, nats.Secure(secure))
			}
			errs[i] = publishOrder(ctx, url, o, opts)
		})
	}
	at.Wait()
	for _, e := range errs {
		if e == nil {
			reached++
		}
	}
	if reached > 0 {
		return reached, nil
	}
	return 0, errors.Join(errs...)
}

// orderPatience is how long a server may take.
const orderPatience = 5 * time.Second

func publishOrder(ctx context.Context, url string, o *session.SignedOrder, opts []nats.Option) error {
	nc, err := nats.Connect(url, opts...)
	if err != nil {
		return fmt.Errorf("natsfeed: %s: %w", url, err)
	}
	defer nc.Close()
	if err := errors.Join(nc.Publish(OrderSubject(o.ID.Key), o.Frame), nc.FlushWithContext(ctx)); err != nil {
		return fmt.Errorf("natsfeed: %s: %w", url, err)
	}
	// The server's refusal comes before its answer to the flush.
	if err := nc.LastError(); err != nil {
		return fmt.Errorf("natsfeed: %s: %w", url, err)
	}
	return nil
}
