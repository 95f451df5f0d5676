package authority

import (
	"context"
	"time"

	"github.com/interlock-fabric/interlock/internal/broker"
)

// ordersTick is how often emergency orders are looked after.
const ordersTick = 500 * time.Millisecond

// orders is what the authority has to do with emergency orders.
type orders struct {
	// admitted is the version of the key set whose holders the bus lets in.
	admitted uint64
}

// tendOrders looks after emergency orders until ctx ends.
func (a *Authority) tendOrders(ctx context.Context) {
	tick := time.NewTicker(ordersTick)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		a.admitHolders()
	}
}

// admitHolders has the embedded bus let in the holders of the emergency keys of
// the key set in force, whoever published it.
func (a *Authority) admitHolders() {
	ks := a.store.KeySet()
	if a.broker == nil || ks.Version == a.orders.admitted {
		return
	}
	list, err := broker.EmergencyOf(ks)
	if err == nil {
		err = a.broker.SetEmergency(list)
	}
	if err != nil {
		a.log.Error("the holders of the emergency keys cannot be let onto the bus", "error", err)
	}
	a.orders.admitted = ks.Version
}
