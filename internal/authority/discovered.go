package authority

import (
	"cmp"
	"context"
	"crypto/ecdh"
	"slices"
	"sync"

	"github.com/interlock-fabric/interlock/internal/registry"
	"github.com/interlock-fabric/interlock/internal/report"
	"github.com/interlock-fabric/interlock/pkg/authority"
	"github.com/interlock-fabric/interlock/pkg/session"
)

const (
	// maxStrangers bounds the agents that are remembered from reports; the tenth
	// of them that was not seen for longest gives way.
	maxStrangers = 10_000
	// maxUnread bounds the reports that wait to be opened.
	maxUnread = 1024
)

// discovered are the agents that enforcers saw, registered or not. The zero value
// is ready; whoever hears runs read as well.
type discovered struct {
	mu     sync.Mutex
	unread []*session.Report
	wake   chan struct{}
	all    map[string]map[string]*stranger // by tenant and strangerKey
	count  int
	missed uint64 // reports that gave way before they were opened
	// foreign counts what enforcers said of callers of tenants for which they are
	// not enrolled.
	foreign map[string]uint64
}

type stranger struct {
	registry.Ref
	first, last session.Instant
	enforcers   []string
}

func strangerKey(r registry.Ref) string { return r.Issuer + "\x00" + r.ID }

// hear takes a report that is believed. It does not wait.
func (d *discovered) hear(r *session.Report) {
	d.mu.Lock()
	if len(d.unread) >= maxUnread {
		d.unread = slices.Delete(d.unread, 0, 1)
		d.missed++
	}
	d.unread = append(d.unread, r)
	if d.wake == nil {
		d.wake = make(chan struct{}, 1)
	}
	wake := d.wake
	d.mu.Unlock()
	select {
	case wake <- struct{}{}:
	default:
	}
}

// read opens what was heard until ctx ends. serves says whether an enforcer may
// speak of a tenant.
func (d *discovered) read(ctx context.Context, sealing func(session.KeyID) (*ecdh.PrivateKey, bool), serves func(enforcer, tenant string) bool) {
	d.mu.Lock()
	if d.wake == nil {
		d.wake = make(chan struct{}, 1)
	}
	wake := d.wake
	d.mu.Unlock()
	for {
		select {
		case <-ctx.Done():
			return
		case <-wake:
		}
		d.mu.Lock()
		unread := d.unread
		d.unread = nil
		d.mu.Unlock()
		for _, r := range unread {
			key, ok := sealing(r.Key)
			if !ok {
				continue
			}
			content, err := r.Unseal(key)
			if err != nil {
				continue // the reader of the trail counts it
			}
			if n := report.Own(r.Enforcer, content, serves); n > 0 {
				d.mu.Lock()
				if d.foreign == nil {
					d.foreign = map[string]uint64{}
				}
				d.foreign[r.Enforcer] += uint64(n)
				d.mu.Unlock()
			}
			for i := range content.Sightings {
				d.note(r.Enforcer, &content.Sightings[i])
			}
			if ctx.Err() != nil {
				return
			}
		}
	}
}

// foreignOf is how much an enforcer said of callers that are none of its own.
func (d *discovered) foreignOf(enforcer string) uint64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.foreign[enforcer]
}

func (d *discovered) note(enforcer string, s *session.Sighting) {
	for _, a := range s.Caller.Actors {
		t, _, err := session.Target{Tenant: s.Caller.Tenant, Terms: []session.Term{{
			Kind: session.KindAgent, Issuer: cmp.Or(a.Issuer, s.Caller.Issuer), Value: a.ID,
		}}}.Canonical()
		if err != nil {
			continue
		}
		ref := registry.Ref{Issuer: t.Terms[0].Issuer, ID: t.Terms[0].Value}
		d.mu.Lock()
		if d.all == nil {
			d.all = map[string]map[string]*stranger{}
		}
		of := d.all[t.Tenant]
		if of == nil {
			of = map[string]*stranger{}
			d.all[t.Tenant] = of
		}
		x := of[strangerKey(ref)]
		if x == nil {
			if d.count >= maxStrangers {
				d.forget(maxStrangers / 10)
			}
			x = &stranger{Ref: ref, first: s.First, last: s.Last}
			of[strangerKey(ref)] = x
			d.count++
		}
		x.first, x.last = min(x.first, s.First), max(x.last, s.Last)
		if !slices.Contains(x.enforcers, enforcer) {
			x.enforcers = append(x.enforcers, enforcer)
			slices.Sort(x.enforcers)
		}
		d.mu.Unlock()
	}
}

// forget lets the n go that were not seen for longest.
func (d *discovered) forget(n int) {
	var seen []session.Instant
	for _, of := range d.all {
		for _, x := range of {
			seen = append(seen, x.last)
		}
	}
	slices.Sort(seen)
	limit := seen[min(n, len(seen))-1]
	for _, of := range d.all {
		for k, x := range of {
			if x.last <= limit && n > 0 {
				delete(of, k)
				d.count--
				n--
			}
		}
	}
}

func (x *stranger) record(tenant string) authority.AgentRecord {
	return authority.AgentRecord{
		Agent:     authority.Agent{Tenant: tenant, Issuer: x.Issuer, ID: x.ID},
		FirstSeen: x.first.Time(), LastSeen: x.last.Time(), Enforcers: slices.Clone(x.enforcers),
	}
}

func (d *discovered) find(tenant string, r registry.Ref) (authority.AgentRecord, bool) {
	t, _, err := session.Target{Tenant: tenant, Terms: []session.Term{{Kind: session.KindAgent, Issuer: r.Issuer, Value: r.ID}}}.Canonical()
	if err != nil {
		return authority.AgentRecord{}, false
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	x := d.all[tenant][strangerKey(registry.Ref{Issuer: t.Terms[0].Issuer, ID: t.Terms[0].Value})]
	if x == nil {
		return authority.AgentRecord{}, false
	}
	return x.record(tenant), true
}

// list returns, in the order of their keys, those behind after of whom wanted
// says so, at most limit, and whether there are more.
func (d *discovered) list(tenant, after string, limit int, wanted func(registry.Ref) bool) (out []authority.AgentRecord, more bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	var keys []string
	for k := range d.all[tenant] {
		if k > after {
			keys = append(keys, k)
		}
	}
	slices.Sort(keys)
	for _, k := range keys {
		x := d.all[tenant][k]
		if !wanted(x.Ref) {
			continue
		}
		if len(out) >= limit {
			return out, true
		}
		out = append(out, x.record(tenant))
	}
	return out, false
}
