package credential_test

import (
	"context"
	"errors"
	"fmt"

	"github.com/interlock-fabric/interlock/pkg/credential"
	"github.com/interlock-fabric/interlock/pkg/session"
)

func ExampleNew() {
	v, err := credential.New(credential.Options{
		Audiences: []string{"https://tools.example/mcp"},
		Issuers: []credential.Issuer{{
			URL:    "https://id.example",
			Tenant: "acme",
			JWKS:   "https://id.example/jwks.json",
			Claims: credential.Claims{Roles: "/realm_access/roles"},
		}},
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer v.Close()

	// An unsigned token is refused before anything is fetched.
	_, err = v.Verify(context.Background(), "eyJhbGciOiJub25lIn0.e30.")
	fmt.Println(err, errors.Is(err, session.ErrNoIdentity))
	// Output: token refused: signature algorithm not accepted true
}
