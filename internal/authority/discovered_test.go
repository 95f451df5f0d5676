package authority

import (
	"fmt"
	"slices"
	"testing"

	"github.com/interlock-fabric/interlock/internal/registry"
	"github.com/interlock-fabric/interlock/pkg/session"
)

func sighting(tenant, agent string, at session.Instant) *session.Sighting {
	return &session.Sighting{Caller: session.Caller{Tenant: tenant, Issuer: issuer, Actors: []session.Actor{{ID: agent}}}, First: at, Last: at}
}

// TestDiscoveredAreBounded: a flood of names keeps the newest, and lists page by
// page, each once.
func TestDiscoveredAreBounded(t *testing.T) {
	var d discovered
	for i := range maxStrangers + 500 {
		d.note("e", sighting("acme", fmt.Sprintf("spiffe://a/%06d", i), session.Instant(i+1)))
	}
	d.note("f", sighting("umbrella", "spiffe://a/000000", 1))
	d.note("e", sighting("acme", "bot", 1)) // by its issuer
	n := 0
	for _, of := range d.all {
		n += len(of)
	}
	if n != d.count || n > maxStrangers || n < maxStrangers*8/10 {
		t.Errorf("%d are kept, %d counted", n, d.count)
	}
	if _, ok := d.find("acme", registry.Ref{ID: fmt.Sprintf("spiffe://a/%06d", maxStrangers+499)}); !ok {
		t.Error("the newest is gone")
	}
	if _, ok := d.find("acme", registry.Ref{ID: "spiffe://a/000000"}); ok {
		t.Error("the oldest is kept")
	}
	if x, ok := d.find("acme", registry.Ref{Issuer: issuer, ID: "bot"}); !ok || x.Issuer != issuer {
		t.Errorf("%+v", x)
	}
	var got []string
	for after := ""; ; {
		list, more := d.list("acme", after, 77, func(r registry.Ref) bool { return r.ID != "bot" })
		for _, x := range list {
			got = append(got, x.ID)
			after = strangerKey(registry.Ref{Issuer: x.Issuer, ID: x.ID})
		}
		if !more {
			break
		}
	}
	if !slices.IsSorted(got) || len(slices.Compact(got)) != len(d.all["acme"])-1 {
		t.Errorf("%d of %d", len(got), len(d.all["acme"]))
	}
}
