package issuers

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"

	"github.com/interlock-fabric/interlock/internal/yamlfile"
	"github.com/interlock-fabric/interlock/pkg/credential"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// ErrInvalid is the parent of every refusal of a file of Tokens. The text names the
// key.
var ErrInvalid = errors.New("tokens configuration")

// Tokens says how an authority verifies the tokens of callers that it is asked to
// revoke or introspect; see docs/standards.md.
type Tokens struct {
	// Audiences are all resources that such tokens are for.
	Audiences []string `yaml:"audiences"`
	Issuers   []Issuer `yaml:"issuers"`
	// Revoke is what ends with a token that is revoked.
	Revoke Extent `yaml:"revoke"`
	// EmailIssuer is the URL of the one issuer, among Issuers, whose `sub` is the
	// user's email address; empty is none.
	EmailIssuer string `yaml:"email_issuer"`
}

// Extent is what ends with a token that is revoked.
type Extent string

// The values of Extent.
const (
	// OfToken is the token alone.
	OfToken Extent = "token"
	// OfSession is its session too, and so whatever a refresh token makes of it.
	OfSession Extent = "session"
)

// LoadTokens reads a file. Relative paths in it are taken from its directory.
// Errors wrap ErrInvalid, or are of the file system.
func LoadTokens(path string) (*Tokens, error) {
	b, err := yamlfile.Read(path)
	if err != nil {
		return nil, err
	}
	t := &Tokens{Revoke: OfToken}
	if err := yamlfile.Decode(b, t); err != nil {
		return nil, fmt.Errorf("%s: %w: %w", path, ErrInvalid, err)
	}
	if err := t.validate(); err != nil {
		return nil, fmt.Errorf("%s: %w: %w", path, ErrInvalid, err)
	}
	dir, err := filepath.Abs(filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	for i := range t.Issuers {
		for _, p := range t.Issuers[i].Files() {
			if *p != "" && !filepath.IsAbs(*p) {
				*p = filepath.Join(dir, *p)
			}
		}
	}
	return t, nil
}

func (t *Tokens) validate() error {
	if key, err := Validate(t.Issuers); err != nil {
		return fmt.Errorf("%s: %w", key, err)
	}
	switch {
	case len(t.Audiences) == 0 || len(t.Audiences) > session.MaxProbes:
		return fmt.Errorf("audiences: %d of them: give 1 to %d", len(t.Audiences), session.MaxProbes)
	case t.Revoke != OfToken && t.Revoke != OfSession:
		return fmt.Errorf("revoke: %s or %s", OfToken, OfSession)
	case t.EmailIssuer != "" && !slices.ContainsFunc(t.Issuers, func(i Issuer) bool { return i.URL == t.EmailIssuer }):
		return fmt.Errorf("email_issuer: %.64q is not among the issuers", t.EmailIssuer)
	}
	return nil
}

// Verifier makes what verifies such tokens, with what is in the files, and what o has
// beside issuers and audiences. Close it.
func (t *Tokens) Verifier(o credential.Options) (*credential.Verifier, error) {
	o.Audiences = t.Audiences
	for i := range t.Issuers {
		x, err := t.Issuers[i].Credential()
		if err != nil {
			return nil, err
		}
		o.Issuers = append(o.Issuers, x)
	}
	return credential.New(o)
}
