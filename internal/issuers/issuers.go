// Package issuers is how the configuration files of both programs name the token
// issuers that they trust.
package issuers

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/interlock-fabric/interlock/pkg/credential"
	"github.com/interlock-fabric/interlock/pkg/credential/discovery"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// Bounds of a configuration.
const (
	maxIssuers = 64
	maxValues  = 64
)

// Issuer is one token issuer; see credential.Issuer.
type Issuer struct {
	URL    string `yaml:"url"`
	Tenant string `yaml:"tenant"`
	// JWKS is the URL of the keys, JWKSFile a file with them; Discovery finds the
	// URL in the issuer's OpenID Connect metadata.
	JWKS            string        `yaml:"jwks"`
	JWKSFile        string        `yaml:"jwks_file"`
	Discovery       bool          `yaml:"discovery"`
	Introspection   Introspection `yaml:"introspection"`
	Algorithms      []string      `yaml:"algorithms"`
	Types           []string      `yaml:"types"`
	Skew            time.Duration `yaml:"skew"`
	FixedIssue      bool          `yaml:"fixed_issue"`
	RefreshInterval time.Duration `yaml:"refresh_interval"`
	KeysMaxAge      time.Duration `yaml:"keys_max_age"`
	Claims          Claims        `yaml:"claims"`
}

// Introspection has opaque tokens verified by asking the issuer (RFC 7662); see
// credential.Introspection. It is off without a URL.
type Introspection struct {
	URL              string        `yaml:"url"`
	ClientID         string        `yaml:"client_id"`
	ClientSecretFile string        `yaml:"client_secret_file"`
	MaxAge           time.Duration `yaml:"max_age"`
	AudienceImplied  bool          `yaml:"audience_implied"`
}

// Claims names claims; see credential.Claims.
type Claims struct {
	Session      string `yaml:"session"`
	SessionStart string `yaml:"session_start"`
	Ancestors    string `yaml:"ancestors"`
	Client       string `yaml:"client"`
	Capabilities string `yaml:"capabilities"`
	Roles        string `yaml:"roles"`
	Digests      string `yaml:"digests"`
	Blueprint    string `yaml:"blueprint"`
	Owner        string `yaml:"owner"`
	Credentials  string `yaml:"credentials"`
}

// Validate checks what can be checked without I/O. The key is the one that is
// wrong, as in issuers[1].url, where the list is of the key issuers.
func Validate(list []Issuer) (key string, err error) {
	if len(list) == 0 || len(list) > maxIssuers {
		return "issuers", fmt.Errorf("%d of them: give 1 to %d", len(list), maxIssuers)
	}
	seen, asked := map[string]bool{}, 0
	for i := range list {
		iss := &list[i]
		key := fmt.Sprintf("issuers[%d]", i)
		sources := 0
		for _, there := range []bool{iss.JWKS != "", iss.JWKSFile != "", iss.Discovery} {
			if there {
				sources++
			}
		}
		if iss.Introspection.URL != "" {
			asked++
		}
		switch {
		case iss.URL == "":
			return key + ".url", errors.New("is missing")
		case seen[iss.URL]:
			return key + ".url", fmt.Errorf("%s is there twice", iss.URL)
		case iss.Tenant == "":
			return key + ".tenant", errors.New("is missing: it comes from here, and never from a token")
		case sources > 1 || sources == 0 && iss.Introspection.URL == "":
			return key, errors.New("want one of jwks, jwks_file and discovery, or introspection")
		case asked > 1:
			return key + ".introspection", errors.New("is there twice: an opaque token does not say whose it is")
		case iss.Introspection.URL == "" && iss.Introspection != (Introspection{}):
			return key + ".introspection.url", errors.New("is missing")
		case len(iss.Algorithms) > maxValues || len(iss.Types) > maxValues:
			return key, errors.New("too many algorithms or types")
		}
		seen[iss.URL] = true
		if _, err := session.Canonical(session.KindIssuer, iss.URL); err != nil {
			return key + ".url", err
		}
		if _, err := session.Canonical(session.KindTenant, iss.Tenant); err != nil {
			return key + ".tenant", err
		}
	}
	return "", nil
}

// Files are the paths in it, each to be resolved, or read again when it may have
// changed.
func (i *Issuer) Files() []*string { return []*string{&i.JWKSFile, &i.Introspection.ClientSecretFile} }

// Credential is the issuer as a Verifier takes it, with what is in its files.
func (i *Issuer) Credential() (credential.Issuer, error) {
	x := credential.Issuer{
		URL: i.URL, Tenant: i.Tenant, JWKS: i.JWKS, Types: i.Types, Skew: i.Skew, FixedIssue: i.FixedIssue,
		RefreshInterval: i.RefreshInterval, KeysMaxAge: i.KeysMaxAge, Claims: credential.Claims(i.Claims),
	}
	for _, a := range i.Algorithms {
		x.Algorithms = append(x.Algorithms, jose.SignatureAlgorithm(a))
	}
	if i.Discovery {
		x.Discover = discovery.OpenID
	}
	if q := i.Introspection; q.URL != "" {
		x.Introspection = &credential.Introspection{URL: q.URL, ClientID: q.ClientID, MaxAge: q.MaxAge, AudienceImplied: q.AudienceImplied}
		if q.ClientSecretFile != "" {
			b, err := Secret(q.ClientSecretFile)
			if err != nil {
				return x, fmt.Errorf("issuer %s: introspection: %w", i.URL, err)
			}
			x.Introspection.ClientSecret = string(b)
		}
	}
	if i.JWKSFile != "" {
		b, err := os.ReadFile(i.JWKSFile)
		if err != nil {
			return x, fmt.Errorf("issuer %s: %w", i.URL, err)
		}
		if err := json.Unmarshal(b, &x.Keys); err != nil {
			return x, fmt.Errorf("issuer %s: %s is no JWKS: %w", i.URL, i.JWKSFile, err)
		}
	}
	return x, nil
}

// ReadsFiles reports whether keys or secrets of one of them are in files.
func ReadsFiles(list []Issuer) bool {
	return slices.ContainsFunc(list, func(i Issuer) bool { return i.JWKSFile+i.Introspection.ClientSecretFile != "" })
}

// Secret reads a file that only its owner can read, without the white space around
// what is in it.
func Secret(path string) ([]byte, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if info.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("%s can be read by others: chmod 600 it", path)
	}
	b, err := os.ReadFile(path)
	return bytes.TrimSpace(b), err
}
