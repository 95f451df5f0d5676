package access

import (
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/interlock-fabric/interlock/internal/yamlfile"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// ErrInvalid is the parent of every refusal of a configuration. The text names the
// key.
var ErrInvalid = errors.New("access configuration")

// Bounds of a configuration.
const (
	maxIssuers = 16
	maxGrants  = 1024
	maxClients = 256
	maxText    = 512
)

// Config is who may use the API; see docs/access.md.
type Config struct {
	// Audience is what the `aud` of tokens must name: this authority. It is
	// required with Issuers.
	Audience string `yaml:"audience"`
	// Origin is the scheme and authority by which clients know this server, for
	// tokens that are bound to a key; see credential.ProofOptions. Empty is that
	// of Audience, where that is a URL.
	Origin  string         `yaml:"origin"`
	Issuers []IssuerConfig `yaml:"issuers"`
	// ClientCA, in PEM, verifies client certificates.
	ClientCA     string       `yaml:"client_ca"`
	Certificates []CertConfig `yaml:"certificates"`
	// Clients are services that authenticate with a secret, as OAuth clients do.
	Clients []ClientConfig `yaml:"clients"`
	// Local says whether a user of this machine may do everything on the unix
	// socket.
	Local Switch `yaml:"local_operator"`
	// TwoPerson says whether decisions on a whole tenant, or on everything, take
	// two commanders, and ProposalFor how long one of them has to find the other.
	TwoPerson   Switch        `yaml:"two_person"`
	ProposalFor time.Duration `yaml:"proposal_for"`
	// WidePerMinute bounds the decisions of one principal on more than single
	// credentials; those that take two commanders are not counted.
	WidePerMinute int `yaml:"wide_per_minute"`
}

// Digest is a hash of what is configured, but for what is in other files, in hex.
func (c *Config) Digest() string {
	b, err := json.Marshal(c)
	if err != nil {
		return "unknown" // it is made of plain values
	}
	return fmt.Sprintf("%x", sha256.Sum256(b))
}

// Switch is on or off.
type Switch string

// The values of Switch.
const (
	On  Switch = "on"
	Off Switch = "off"
)

// What is not configured.
const (
	DefaultProposalFor   = 15 * time.Minute
	DefaultWidePerMinute = 60
	maxProposalFor       = 24 * time.Hour
)

// IssuerConfig is an issuer of tokens, and what they are worth here.
type IssuerConfig struct {
	URL string `yaml:"url"`
	// JWKS is the URL of the keys, JWKSFile a file with them; Discovery finds the
	// URL in the issuer's OpenID Connect metadata. One of the three.
	JWKS       string        `yaml:"jwks"`
	JWKSFile   string        `yaml:"jwks_file"`
	Discovery  bool          `yaml:"discovery"`
	Algorithms []string      `yaml:"algorithms"`
	Types      []string      `yaml:"types"`
	Skew       time.Duration `yaml:"skew"`
	// RefreshInterval is the least time between two fetches of the keys, and
	// KeysMaxAge how long they are used while they cannot be fetched.
	RefreshInterval time.Duration `yaml:"refresh_interval"`
	KeysMaxAge      time.Duration `yaml:"keys_max_age"`
	// Clients are the OAuth clients (`client_id`, or `azp`) with which people
	// sign in, and those that are services. A token of any other, such as an
	// agent's, holds no role.
	Clients []string      `yaml:"clients"`
	Grants  []ClaimsGrant `yaml:"grants"`
}

// ClaimsGrant grants a role to tokens with a claim of a value.
type ClaimsGrant struct {
	// Claim is a claim's name, or a JSON pointer into the claims.
	Claim string `yaml:"claim"`
	// Value is what the claim, or an element of it where it is an array, must be;
	// of `scope` and `scp`, one of its words.
	Value   string   `yaml:"value"`
	Role    Role     `yaml:"role"`
	Tenants []string `yaml:"tenants"`
}

// CertConfig grants a role to client certificates with a name.
type CertConfig struct {
	// Name is a subject alternative name with its kind: uri:, dns: or email:.
	Name    string   `yaml:"name"`
	Role    Role     `yaml:"role"`
	Tenants []string `yaml:"tenants"`
}

// ClientConfig grants a role to an OAuth client that authenticates with a secret
// (client_secret_basic, RFC 6749 §2.3.1). A secret is a service's, and is sent with
// each request: it holds the role viewer or issuer, and no other.
type ClientConfig struct {
	ID string `yaml:"id"`
	// SecretFile holds the secret, of 32 bytes at least, and is readable by its
	// owner alone.
	SecretFile string   `yaml:"secret_file"`
	Role       Role     `yaml:"role"`
	Tenants    []string `yaml:"tenants"`
}

// Load reads a file. Relative paths in it are taken from its directory. Errors wrap
// ErrInvalid, or are of the file system.
func Load(path string) (*Config, error) {
	b, err := yamlfile.Read(path)
	if err != nil {
		return nil, err
	}
	c, err := Parse(b)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	dir, err := filepath.Abs(filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	paths := []*string{&c.ClientCA}
	for i := range c.Issuers {
		paths = append(paths, &c.Issuers[i].JWKSFile)
	}
	for i := range c.Clients {
		paths = append(paths, &c.Clients[i].SecretFile)
	}
	for _, p := range paths {
		if *p != "" && !filepath.IsAbs(*p) {
			*p = filepath.Join(dir, *p)
		}
	}
	return c, nil
}

// Parse is Load for a file's contents, and leaves relative paths as they are.
func Parse(b []byte) (*Config, error) {
	c := &Config{Local: On, TwoPerson: On, ProposalFor: DefaultProposalFor, WidePerMinute: DefaultWidePerMinute}
	if err := yamlfile.Decode(b, c); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	if err := c.validate(); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	return c, nil
}

// Tenants returns the tenants that the configuration names, sorted.
func (c *Config) Tenants() []string {
	var out []string
	for i := range c.Issuers {
		for _, g := range c.Issuers[i].Grants {
			out = append(out, g.Tenants...)
		}
	}
	for _, g := range c.Certificates {
		out = append(out, g.Tenants...)
	}
	for _, g := range c.Clients {
		out = append(out, g.Tenants...)
	}
	slices.Sort(out)
	return slices.DeleteFunc(slices.Compact(out), func(t string) bool { return t == Everywhere })
}

// Changes says in what another configuration differs: the grants that come and go,
// and the names of the settings that change.
func (c *Config) Changes(next *Config) (out []string) {
	before, after := c.grants(), next.grants()
	for _, g := range slices.Sorted(maps.Keys(after)) {
		if !before[g] {
			out = append(out, "granted: "+g)
		}
	}
	for _, g := range slices.Sorted(maps.Keys(before)) {
		if !after[g] {
			out = append(out, "withdrawn: "+g)
		}
	}
	settings := func(c *Config) Config {
		s := *c
		s.Certificates, s.Clients = nil, nil
		s.Issuers = verified(c).Issuers
		return s
	}
	a, b := reflect.ValueOf(settings(c)), reflect.ValueOf(settings(next))
	for i := range a.NumField() {
		if !reflect.DeepEqual(a.Field(i).Interface(), b.Field(i).Interface()) {
			out = append(out, "changed: "+a.Type().Field(i).Tag.Get("yaml"))
		}
	}
	return out
}

// grants says who holds which role, and by what.
func (c *Config) grants() map[string]bool {
	out := map[string]bool{}
	add := func(role Role, tenants []string, to string) {
		out[fmt.Sprintf("%s in %s to %s", role, strings.Join(tenants, ", "), to)] = true
	}
	for _, i := range c.Issuers {
		for _, g := range i.Grants {
			add(g.Role, g.Tenants, fmt.Sprintf("%s %s at %s", g.Claim, g.Value, i.URL))
		}
		for _, client := range i.Clients {
			out[fmt.Sprintf("people of %s who sign in by %s", i.URL, client)] = true
		}
	}
	for _, g := range c.Certificates {
		add(g.Role, g.Tenants, "certificate "+g.Name)
	}
	for _, g := range c.Clients {
		add(g.Role, g.Tenants, "client "+g.ID)
	}
	return out
}

func (c *Config) origin() string {
	if u, err := url.Parse(c.Audience); c.Origin == "" && err == nil && u.Host != "" && (u.Scheme == "https" || u.Scheme == "http") {
		return u.Scheme + "://" + u.Host
	}
	return c.Origin
}

func (c *Config) validate() error {
	switch {
	case len(c.Issuers) == 0 && c.ClientCA == "" && len(c.Clients) == 0:
		return errors.New("issuers, client_ca and clients: give one of them, or leave the file out")
	case len(c.Issuers) > maxIssuers:
		return fmt.Errorf("issuers: more than %d", maxIssuers)
	case len(c.Issuers) > 0 && c.Audience == "":
		return errors.New("audience: required with issuers, so that tokens for others are refused")
	case len(c.Issuers) == 0 && c.Audience != "":
		return errors.New("audience: goes with issuers")
	case (c.ClientCA == "") != (len(c.Certificates) == 0):
		return errors.New("client_ca and certificates go together")
	case len(c.Certificates) > maxGrants:
		return fmt.Errorf("certificates: more than %d", maxGrants)
	case len(c.Clients) > maxGrants:
		return fmt.Errorf("clients: more than %d", maxGrants)
	case c.Local != On && c.Local != Off:
		return errors.New("local_operator: on or off")
	case c.TwoPerson != On && c.TwoPerson != Off:
		return errors.New("two_person: on or off")
	case c.ProposalFor < time.Second || c.ProposalFor > maxProposalFor:
		return fmt.Errorf("proposal_for: want 1s to %s", maxProposalFor)
	case c.WidePerMinute < 1 || c.WidePerMinute > 1e6:
		return errors.New("wide_per_minute: want 1 to 1000000")
	}
	for i := range c.Issuers {
		if err := c.Issuers[i].validate(); err != nil {
			return fmt.Errorf("issuers[%d]: %w", i, err)
		}
	}
	for i := range c.Certificates {
		g := &c.Certificates[i]
		kind, name, _ := strings.Cut(g.Name, ":")
		if !slices.Contains([]string{"uri", "dns", "email"}, kind) || name == "" || len(name) > maxText {
			return fmt.Errorf("certificates[%d].name %.64q: want uri:, dns: or email: and a name", i, g.Name)
		}
		if err := validGrant(g.Role, g.Tenants); err != nil {
			return fmt.Errorf("certificates[%d].%w", i, err)
		}
	}
	seen := map[string]bool{}
	for i := range c.Clients {
		g := &c.Clients[i]
		switch {
		case g.ID == "" || len(g.ID) > maxText || !printable(g.ID):
			return fmt.Errorf("clients[%d].id: want printable characters", i)
		case seen[g.ID]:
			return fmt.Errorf("clients[%d].id: %s is there twice", i, g.ID)
		case g.SecretFile == "":
			return fmt.Errorf("clients[%d].secret_file is missing", i)
		case g.Role != Viewer && g.Role != Issuer:
			return fmt.Errorf("clients[%d].role %.64q: a secret holds the role %s or %s: use a certificate, or a token of an issuer", i, g.Role, Viewer, Issuer)
		}
		seen[g.ID] = true
		if err := validGrant(g.Role, g.Tenants); err != nil {
			return fmt.Errorf("clients[%d].%w", i, err)
		}
	}
	return nil
}

func (i *IssuerConfig) validate() error {
	sources := 0
	for _, given := range []bool{i.JWKS != "", i.JWKSFile != "", i.Discovery} {
		if given {
			sources++
		}
	}
	u, err := url.Parse(i.URL)
	switch {
	case err != nil || u.Host == "" || len(i.URL) > maxText:
		return errors.New("url: want the issuer's URL")
	case sources != 1:
		return errors.New("jwks, jwks_file and discovery: want one of them")
	case len(i.Clients) == 0 || len(i.Clients) > maxClients:
		return errors.New("clients: name those with which people sign in, and those that are services; agents' clients do not belong here")
	case slices.Contains(i.Clients, ""):
		return errors.New("clients: an empty one")
	case len(i.Grants) == 0 || len(i.Grants) > maxGrants:
		return fmt.Errorf("grants: want 1 to %d", maxGrants)
	}
	for n := range i.Grants {
		g := &i.Grants[n]
		if g.Claim == "" || len(g.Claim) > maxText || g.Value == "" || len(g.Value) > maxText {
			return fmt.Errorf("grants[%d]: want a claim and its value", n)
		}
		if err := validGrant(g.Role, g.Tenants); err != nil {
			return fmt.Errorf("grants[%d].%w", n, err)
		}
	}
	return nil
}

func validGrant(r Role, tenants []string) error {
	if !slices.Contains(Roles(), r) {
		return fmt.Errorf("role %.64q: want one of %v", r, Roles())
	}
	if len(tenants) == 0 || len(tenants) > session.MaxTenants {
		return fmt.Errorf("tenants: name some, or %q for all", Everywhere)
	}
	for _, t := range tenants {
		if t == Everywhere && len(tenants) == 1 {
			continue
		}
		if _, err := session.Canonical(session.KindTenant, t); err != nil || t == Everywhere {
			return fmt.Errorf("tenants: %.64q is not a tenant's name, or %q is not alone", t, Everywhere)
		}
	}
	return nil
}
