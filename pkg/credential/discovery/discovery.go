// Package discovery finds out where an issuer publishes its keys, from its
// OpenID Connect metadata. It is apart from package credential so that whoever
// names the JWKS does not compile an OpenID Connect client.
//
//	credential.Issuer{URL: "https://id.example", Tenant: "acme", Discover: discovery.OpenID}
package discovery

import (
	"context"
	"errors"
	"fmt"
	"net/http"

	"github.com/coreos/go-oidc/v3/oidc"
)

// maxMetadataLen bounds the metadata document.
const maxMetadataLen = 256 << 10

// OpenID is a credential.Issuer's Discover for OpenID Connect providers (OpenID
// Connect Discovery 1.0 §4): it returns the jwks_uri of the document below
// issuer, which must name that issuer.
func OpenID(ctx context.Context, client *http.Client, issuer string) (jwks string, err error) {
	bounded := *client
	bounded.Transport = limited{client.Transport}
	p, err := oidc.NewProvider(oidc.ClientContext(ctx, &bounded), issuer)
	if err != nil {
		return "", fmt.Errorf("discovery: %w", err)
	}
	var metadata struct {
		JWKS string `json:"jwks_uri"`
	}
	if err := p.Claims(&metadata); err != nil {
		return "", fmt.Errorf("discovery: %w", err)
	}
	if metadata.JWKS == "" {
		return "", errors.New("discovery: the metadata has no jwks_uri")
	}
	return metadata.JWKS, nil
}

// limited bounds what is read of answers: the client above reads to the end.
type limited struct{ next http.RoundTripper }

func (l limited) RoundTrip(r *http.Request) (*http.Response, error) {
	next := l.next
	if next == nil {
		next = http.DefaultTransport
	}
	resp, err := next.RoundTrip(r)
	if err != nil {
		return nil, err
	}
	resp.Body = http.MaxBytesReader(nil, resp.Body, maxMetadataLen)
	return resp, nil
}
