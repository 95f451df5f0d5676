package session

import (
	"errors"
	"strings"
	"testing"
	"unicode/utf8"

	"pgregory.net/rapid"
)

const (
	sha256Hex = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
	jkt       = "0ZcOCORZNYy-DWpqq30jZyJGHTN0d2HglBV3uiguA4I"
)

func TestCanonicalForms(t *testing.T) {
	tests := []struct {
		name string
		kind Kind
		in   string
		want string
	}{
		{"a user is case-sensitive", KindUser, "Alice", "Alice"},
		{"a user is not Unicode-normalised", KindUser, "e\u0301", "e\u0301"},
		{"a user that looks like a URI stays as it is", KindUser, "HTTPS://X.example:443", "HTTPS://X.example:443"},
		{"an issuer is compared byte for byte", KindIssuer, "https://IdP.example", "https://IdP.example"},
		{"a session keeps its spaces", KindSession, " s 1 ", " s 1 "},
		{"a tenant", KindTenant, "acme.eu-1_x", "acme.eu-1_x"},
		{"an agent that is a name", KindAgent, "Billing-Bot", "Billing-Bot"},
		{"an agent that only starts like a URI", KindAgent, "bot:Alpha", "bot:Alpha"},
		{"a scheme needs a letter first", KindAgent, "1x://A", "1x://A"},
		{"a DID is lower-cased up to its id", KindAgent, "DID:Web:Example.com", "did:web:Example.com"},
		{"a DID URL names its subject", KindAgent, "did:web:a.example/x?y#key-1", "did:web:a.example"},
		{"a DID with a query alone", KindOwner, "did:key:z6Mk?versionId=1", "did:key:z6Mk"},
		{"a URN's namespace is lower-cased", KindAgent, "URN:Example:Bot", "urn:example:Bot"},
		{"a UUID is lower-cased", KindAgent, "urn:UUID:6E8BC430-9C3A-11D9-9669-0800200C9A66", "urn:uuid:6e8bc430-9c3a-11d9-9669-0800200c9a66"},
		{"a URN's components are dropped", KindAgent, "urn:example:bot?+r?=q#f", "urn:example:bot"},
		{"a tag URI stays", KindAgent, "TAG:a.example,2026:Bot", "tag:a.example,2026:Bot"},
		{"a SPIFFE id", KindAgent, "SPIFFE://Prod.Example/ns/Billing", "spiffe://prod.example/ns/Billing"},
		{"a SPIFFE trust domain", KindAgent, "spiffe://prod.example", "spiffe://prod.example"},
		{"a default https port", KindAudience, "HTTPS://API.Example:443/Mcp", "https://api.example/Mcp"},
		{"a default http port", KindAudience, "http://api.example:80", "http://api.example/"},
		{"an empty port", KindAudience, "https://api.example:/", "https://api.example/"},
		{"another port", KindAudience, "https://api.example:8443/mcp", "https://api.example:8443/mcp"},
		{"http's default is not https's", KindAudience, "https://api.example:80/", "https://api.example:80/"},
		{"an empty path with a query", KindAudience, "https://api.example?a=B", "https://api.example/?a=B"},
		{"a fragment is dropped", KindAudience, "https://api.example/mcp#x", "https://api.example/mcp"},
		{"a fragment without a path", KindAudience, "https://api.example#x", "https://api.example/"},
		{"a trailing slash is another resource", KindAudience, "https://api.example/mcp/", "https://api.example/mcp/"},
		{"percent-encoding stays", KindAudience, "https://api.example/%7ea", "https://api.example/%7ea"},
		{"an IP literal", KindAudience, "https://[2001:DB8::1]:443/", "https://[2001:db8::1]/"},
		{"an IP literal with a port", KindAudience, "https://[::1]:8080", "https://[::1]:8080/"},
		{"another scheme has no default path", KindAgent, "A2A+x://Bots.example", "a2a+x://bots.example"},
		{"only A to Z are folded", KindAgent, "https://\u212aelvin.example/", "https://\u212aelvin.example/"},
		{"A and Z are folded", KindAgent, "AZ+x://AZaz.example", "az+x://azaz.example"},
		{"an audience that is a name", KindAudience, "Payments", "Payments"},
		{"a credential that is a name", KindCredential, "VC-1", "VC-1"},
		{"a credential keeps its fragment", KindCredential, "HTTPS://Issuer.example/status/3#94567", "https://issuer.example/status/3#94567"},
		{"a credential under a DID keeps its fragment", KindCredential, "did:web:a.example#cred-1", "did:web:a.example#cred-1"},
		{"a proof-of-possession key", KindKey, "jkt:" + jkt, "jkt:" + jkt},
		{"a certificate", KindKey, "x5t#S256:" + jkt, "x5t#S256:" + jkt},
		{"an API key's hash", KindKey, "apikey:" + sha256Hex, "apikey:" + sha256Hex},
		{"a digest is lower-cased", KindDigest, "model:sha256:" + strings.ToUpper(sha256Hex), "model:sha256:" + sha256Hex},
		{"a tool is case-sensitive", KindTool, "Files.Delete", "Files.Delete"},
		{"a tool at its longest", KindTool, strings.Repeat("t", 256), strings.Repeat("t", 256)},
		{"a value at its longest", KindRole, strings.Repeat("r", MaxValueLen), strings.Repeat("r", MaxValueLen)},
		{"global has no value", KindGlobal, "", ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := Canonical(tt.kind, tt.in)
			if err != nil || got != tt.want {
				t.Fatalf("Canonical(%s, %q) = %q, %v; want %q", tt.kind, tt.in, got, err, tt.want)
			}
			if again, err := Canonical(tt.kind, got); err != nil || again != got {
				t.Errorf("not idempotent: %q, %v", again, err)
			}
		})
	}
}

func TestCanonicalRefuses(t *testing.T) {
	tests := []struct {
		name string
		kind Kind
		in   string
	}{
		{"an empty value", KindUser, ""},
		{"a value that is too long", KindUser, strings.Repeat("a", MaxValueLen+1)},
		{"a control character", KindUser, "a\nb"},
		{"a C1 control character", KindUser, "a\u0085b"},
		{"invalid UTF-8", KindUser, "a\xff"},
		{"an unknown kind", Kind(99), "a"},
		{"the zero kind", Kind(0), "a"},
		{"a value of global", KindGlobal, "x"},
		{"an upper-case tenant", KindTenant, "Acme"},
		{"a long tenant", KindTenant, strings.Repeat("a", 65)},
		{"a long tool", KindTool, strings.Repeat("t", 257)},
		{"a DID without id", KindAgent, "did:web:"},
		{"a DID without method", KindAgent, "did::x"},
		{"a DID of a path alone", KindAgent, "did:web:/x"},
		{"a URN without name", KindAgent, "urn:example:"},
		{"a URN of a query alone", KindAgent, "urn:example:?+x"},
		{"a SPIFFE id with a port", KindAgent, "spiffe://prod.example:443/a"},
		{"a SPIFFE id with a user", KindAgent, "spiffe://u@prod.example/a"},
		{"a SPIFFE id with a trailing slash", KindAgent, "spiffe://prod.example/a/"},
		{"a SPIFFE id of a slash", KindAgent, "spiffe://prod.example/"},
		{"a SPIFFE id with an empty segment", KindAgent, "spiffe://prod.example//a"},
		{"a SPIFFE id with a dot segment", KindAgent, "spiffe://prod.example/a/../b"},
		{"a SPIFFE id with a query", KindAgent, "spiffe://prod.example/a?b"},
		{"a SPIFFE id with a fragment", KindAgent, "spiffe://prod.example/a#b"},
		{"a SPIFFE id with percent-encoding", KindAgent, "spiffe://prod.example/%61"},
		{"user info", KindAudience, "https://alice@api.example/"},
		{"user info in any scheme", KindAgent, "ws://Alice@api.example/"},
		{"no host", KindAudience, "https:///path"},
		{"a port without a host", KindAudience, "https://:443/"},
		{"two ports", KindAudience, "https://api.example:443:443/"},
		{"a port that is no number", KindAudience, "https://api.example:https/"},
		{"an open IP literal", KindAudience, "https://[::1/"},
		{"text after an IP literal", KindAudience, "https://[::1]x/"},
		{"a space in the host", KindAudience, "https://api example/"},
		{"a backslash in the host", KindAudience, `https://api\.example/`},
		{"a URI that grows too long", KindAudience, "https://h?" + strings.Repeat("q", MaxValueLen-10)},
		{"a key without prefix", KindKey, jkt},
		{"a key with padding", KindKey, "jkt:" + jkt + "="},
		{"a key with stray bits", KindKey, "jkt:" + jkt[:42] + "J"},
		{"an API key's hash in upper case", KindKey, "apikey:" + strings.ToUpper(sha256Hex)},
		{"an API key in clear", KindKey, "apikey:sk-live-123"},
		{"a digest of an unknown thing", KindDigest, "tool:sha256:" + sha256Hex},
		{"a digest by another hash", KindDigest, "code:sha1:" + sha256Hex[:40]},
		{"a short digest", KindDigest, "code:sha256:" + sha256Hex[:62]},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := Canonical(tt.kind, tt.in)
			if !errors.Is(err, ErrInvalid) || got != "" {
				t.Errorf("Canonical(%s, %q) = %q, %v", tt.kind, tt.in, got, err)
			}
			if len(err.Error()) > 300 {
				t.Errorf("the error repeats the input: %d bytes", len(err.Error()))
			}
		})
	}
}

// checkCanonical holds for every input: what is accepted is in bounds, and is
// its own canonical form.
func checkCanonical(t interface{ Fatalf(string, ...any) }, kind Kind, in string) {
	got, err := Canonical(kind, in)
	if err != nil {
		if !errors.Is(err, ErrInvalid) {
			t.Fatalf("Canonical(%s, %q): %v does not wrap ErrInvalid", kind, in, err)
		}
		return
	}
	if len(got) > MaxValueLen || !utf8.ValidString(got) || kind != KindGlobal && got == "" {
		t.Fatalf("Canonical(%s, %q) = %q", kind, in, got)
	}
	if again, err := Canonical(kind, got); err != nil || again != got {
		t.Fatalf("Canonical(%s, %q) = %q, and of that %q, %v", kind, in, got, again, err)
	}
	if kind == KindAgent && isURI(in) != isURI(got) {
		t.Fatalf("%q and its canonical form %q differ in being a URI", in, got)
	}
}

func TestCanonicalIsIdempotent(t *testing.T) {
	part := rapid.StringOfN(rapid.RuneFrom([]rune("aAzZ0:/?#@[]%.-_+\\ \u212aİé")), 0, 12, -1)
	rapid.Check(t, func(t *rapid.T) {
		kind := rapid.SampledFrom(Kinds()).Draw(t, "kind")
		value := rapid.OneOf(
			rapid.String(),
			rapid.Custom(func(t *rapid.T) string {
				return rapid.SampledFrom([]string{
					"", "https://", "HTTP://", "spiffe://", "did:web:", "DID:", "urn:", "urn:uuid:", "tag:", "x-Y://", "jkt:", "model:sha256:",
				}).Draw(t, "prefix") + part.Draw(t, "rest")
			}),
		).Draw(t, "value")
		checkCanonical(t, kind, value)
	})
}

func FuzzCanonical(f *testing.F) {
	for _, s := range []string{
		"alice", "https://API.example:443/x#y", "did:web:a.example#k", "spiffe://A/b", "urn:UUID:AB", "tag:x", "jkt:" + jkt,
		"code:sha256:" + sha256Hex, "https://[::1]:443", "https://h:443:443", "https://:443/",
	} {
		for _, k := range []Kind{KindUser, KindAgent, KindAudience, KindCredential, KindKey, KindDigest} {
			f.Add(uint8(k), s)
		}
	}
	f.Fuzz(func(t *testing.T, kind uint8, value string) { checkCanonical(t, Kind(kind), value) })
}

func TestTargetsAreCanonical(t *testing.T) {
	user := Term{Kind: KindUser, Issuer: testIssuer, Value: "alice"}
	agent := Term{Kind: KindAgent, Issuer: testIssuer, Value: "bot"}
	tool := Term{Kind: KindTool, Value: "delete"}
	tests := []struct {
		name  string
		in    Target
		shape Shape
		fail  string
	}{
		{"global", Target{Terms: []Term{{Kind: KindGlobal}}}, Shape(KindGlobal), ""},
		{"global in a tenant", Target{Tenant: "acme", Terms: []Term{{Kind: KindGlobal}}}, 0, "names no tenant"},
		{"a tenant", Target{Tenant: "acme", Terms: []Term{{Kind: KindTenant}}}, Shape(KindTenant), ""},
		{"a tenant by value", Target{Terms: []Term{{Kind: KindTenant, Value: "acme"}}}, Shape(KindTenant), ""},
		{"two tenants", Target{Tenant: "acme", Terms: []Term{{Kind: KindTenant, Value: "other"}}}, 0, "two tenants"},
		{"a user", Target{Tenant: "acme", Terms: []Term{user}}, Shape(KindUser), ""},
		{"a user without tenant", Target{Terms: []Term{user}}, 0, "tenant name"},
		{"a user without issuer", Target{Tenant: "acme", Terms: []Term{{Kind: KindUser, Value: "alice"}}}, 0, "needs the issuer"},
		{"an agent that is not a URI, without issuer", Target{Tenant: "acme", Terms: []Term{{Kind: KindAgent, Value: "bot"}}}, 0, "needs the issuer"},
		{"an agent that is a URI", Target{Tenant: "acme", Terms: []Term{{Kind: KindAgent, Value: "spiffe://a/bot"}}}, Shape(KindAgent), ""},
		{"user and agent, in any order", Target{Tenant: "acme", Terms: []Term{agent, user}}, ShapeUserAgent, ""},
		{"user, agent and tool", Target{Tenant: "acme", Terms: []Term{tool, agent, user}}, ShapeUserAgentTool, ""},
		{"a conjunction that is not configured", Target{Tenant: "acme", Terms: []Term{tool, {Kind: KindRole, Value: "admin"}}}, 0, "user+agent"},
		{"a user twice", Target{Tenant: "acme", Terms: []Term{user, user}}, 0, "no such conjunction"},
		{"nothing", Target{Tenant: "acme"}, 0, "one to three terms"},
		{"four terms", Target{Tenant: "acme", Terms: []Term{user, agent, tool, tool}}, 0, "one to three terms"},
		{"a kind that does not exist", Target{Tenant: "acme", Terms: []Term{{Kind: 77, Value: "x"}}}, 0, "kind-77"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, shape, err := tt.in.Canonical()
			if tt.fail != "" {
				if !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), tt.fail) || tt.in.Shape() != 0 {
					t.Fatalf("got %v, want an error with %q", err, tt.fail)
				}
				return
			}
			if err != nil || shape != tt.shape || tt.in.Shape() != shape {
				t.Fatalf("shape %s, %v; want %s", shape, err, tt.shape)
			}
			if _, again, err := got.Canonical(); err != nil || again != shape {
				t.Errorf("not idempotent: %s, %v", again, err)
			}
		})
	}
	if got := (Target{Tenant: "acme", Terms: []Term{user, tool}}).String(); got != "user alice and tool delete" {
		t.Errorf("String = %q", got)
	}
}
