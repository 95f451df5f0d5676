// Package credential turns the access token of a request into the
// session.Identity that an enforcer checks: a signed JWT (RFC 7519, RFC 9068),
// verified against keys that the deployment configured for its issuer, or an
// opaque token, by asking its issuer (RFC 7662). A ProofChecker makes sure that
// the caller has the key that a token is bound to (RFC 8705, RFC 9449).
//
//	v, err := credential.New(credential.Options{
//		Audiences: []string{"https://tools.example/mcp"},
//		Issuers: []credential.Issuer{{
//			URL:    "https://id.example",
//			Tenant: "acme",
//			JWKS:   "https://id.example/jwks.json",
//		}},
//	})
//	if err != nil {
//		return err
//	}
//	defer v.Close()
//	caller, err := v.PrepareRequest(r, enforcer)
//
// # Guarantees
//
// The algorithms are pinned per issuer; "none" and the HMAC family are never
// accepted, whatever the configuration. The issuer decides the tenant, and
// nothing in the token can. `iss`, `aud`, `exp`, `nbf`, `iat` and `typ` are
// checked, and a claim that the mapping uses but whose type is wrong makes the
// token refused: to skip it would make its bearer exempt from decisions on that
// value. A token is at most MaxTokenLen bytes, and neither its header nor its
// claims may name a member twice.
//
// Keys from a JWKS, whose URL package credential/discovery can find out, are
// fetched with a bound on size and time, refreshed when a
// token names a key that is not there, at most once per RefreshInterval for all
// callers together, and used no longer than KeysMaxAge after they were fetched:
// an issuer that cannot be reached does not vouch for ever.
//
// A token that has been verified is kept, by its SHA-256, and not verified again
// while the key that signed it is the issuer's and that key may still be used.
// Its times, its audience, and possession of the key that it is bound to are
// checked each time. What is kept is bounded by Options.CacheBytes, an hour, and
// the token's expiry. Refusals are not kept.
//
// # Limits
//
// A token that is bound to a key (`cnf`) is accepted as a bearer token unless
// Options.Possession is set; its key is in the identity either way, so that it
// can be revoked. Opaque tokens are refused unless an issuer has Introspection,
// encrypted ones always.
//
// A request that did not arrive over HTTP, such as Envoy's question about one,
// is verified as the http.Request that it is about: Method, URL, Host, Header
// and TLS are all that is looked at.
//
// How claims become an identity is written down in docs/claims.md and on
// Claims.
package credential
