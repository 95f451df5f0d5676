package main

import (
	"context"
	"crypto/ecdsa"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"

	"github.com/go-jose/go-jose/v4"

	"github.com/interlock-fabric/interlock/internal/gateway"
	"github.com/interlock-fabric/interlock/internal/gateway/config"
	"github.com/interlock-fabric/interlock/pkg/authority"
)

// newGateway starts a gateway of its own, with the same authority and issuer, and
// returns the address of its one listener.
func newGateway(ctx context.Context, f *fabric, key *ecdsa.PrivateKey, kind gateway.Kind, name, rest string) (addr string, stop func() error, err error) {
	raw, err := f.client.Enroll(ctx, authority.EnrollRequest{Name: name})
	if err != nil {
		return "", nil, err
	}
	jwks, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: key.Public(), KeyID: "k1"}}})
	if err != nil {
		return "", nil, err
	}
	dir, err := os.MkdirTemp("", "interlock-interop-")
	if err != nil {
		return "", nil, err
	}
	text := fmt.Sprintf("enrollment: enrollment.json\ndrain_timeout: 100ms\nissuers: [{url: %q, tenant: %s, jwks_file: jwks.json}]\n%s", issuer, tenant, rest)
	for file, b := range map[string][]byte{"enrollment.json": raw, "jwks.json": jwks, "enforcer.yaml": []byte(text)} {
		if err := os.WriteFile(filepath.Join(dir, file), b, 0o600); err != nil {
			return "", nil, err
		}
	}
	c, err := config.Load(filepath.Join(dir, "enforcer.yaml"), nil, nil)
	if err != nil {
		return "", nil, err
	}
	g, err := gateway.Start(gateway.Options{Config: c, Kind: kind})
	if err != nil {
		return "", nil, err
	}
	f.followers = append(f.followers, func() uint64 { return g.Status().Enforcer.Applied })
	for _, a := range g.Addrs() {
		addr = "http://" + a
	}
	return addr, func() error { g.Shutdown(context.Background()); return os.RemoveAll(dir) }, nil
}

// echo is a host in no protocol: it answers with the headers that it got.
func echo(w http.ResponseWriter, r *http.Request) {
	_ = json.NewEncoder(w).Encode(map[string]any{"path": r.URL.RequestURI(), "headers": r.Header}) // the client may have gone
}
