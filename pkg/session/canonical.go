package session

import (
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"
)

// MaxValueLen bounds a value in clear, in bytes: an issuer, a subject, a
// session id, a tool name.
const MaxValueLen = 1024

// MaxIncidentLen bounds an incident id, in bytes.
const MaxIncidentLen = 64

// Canonical returns the form of value under which it is keyed, or an error
// wrapping ErrInvalid that says what is wrong with it. Canonical is
// idempotent. The rules per kind:
//
//   - every value is valid UTF-8 without control characters, at most
//     MaxValueLen bytes and not empty. Text is never case-folded or
//     Unicode-normalised: two values that an issuer keeps apart stay apart.
//   - issuer, user, client, session, token, credential, blueprint, owner, role,
//     capability: compared byte for byte (RFC 7519 §4.1.1, OpenID Connect Core
//     §2: "iss" and "sub" are case-sensitive strings). A credential or owner
//     that is a URI follows the rule for URIs.
//   - agent, audience, and other URIs: see below; an agent that is not a URI is
//     compared byte for byte within its issuer.
//   - DID (`did:method:id`): the scheme and method are lower-cased, a path,
//     query or fragment is dropped, since a DID URL names a part of the same
//     subject (DID Core §3.2).
//   - URN (`urn:nid:nss`): scheme and namespace are lower-cased, and the whole
//     of a urn:uuid; r-, q- and f-components are dropped (RFC 8141 §3.1).
//   - SPIFFE id (`spiffe://trust-domain/path`): scheme and trust domain are
//     lower-cased, the path is kept; a trailing slash, port, user info, query,
//     fragment or other character than SPIFFE permits is refused (SPIFFE-ID §2).
//   - other hierarchical URIs: scheme and host are lower-cased (A to Z alone),
//     an empty port and the default port of http and https are dropped, an
//     empty http path becomes "/", a fragment is dropped, user info is refused
//     (RFC 3986 §6.2.2.1, §6.2.3; RFC 8707 §2). Percent-encoding and dot
//     segments stay as they are.
//   - a credential keeps path, query and fragment, whatever its scheme: one
//     document names many credentials by fragment.
//   - key: "jkt:" or "x5t#S256:" and 43 characters of base64url (RFC 9449 §6.1,
//     RFC 8705 §3.1), or "apikey:" and the key's SHA-256 in lower-case hex.
//   - digest: "code:", "model:" or "image:", then "sha256:" and lower-case hex.
//   - tool: byte for byte, at most 256 bytes (MCP and A2A names are
//     case-sensitive).
//   - tenant: 1 to 64 of a-z, 0-9, "-", "_" and ".".
//   - global takes no value.
func Canonical(kind Kind, value string) (string, error) {
	if kind == KindGlobal {
		if value != "" {
			return "", fmt.Errorf("%w: global takes no value", ErrInvalid)
		}
		return "", nil
	}
	if !kind.Valid() {
		return "", fmt.Errorf("%w: %s", ErrInvalid, kind)
	}
	if err := checkText(kind.String(), value, MaxValueLen); err != nil {
		return "", err
	}
	var err error
	switch kind {
	case KindTenant:
		err = checkTenantName(value)
	case KindAgent, KindAudience, KindCredential, KindOwner:
		if isURI(value) {
			return canonicalURI(kind, value)
		}
	case KindKey:
		err = checkKeyValue(value)
	case KindDigest:
		return canonicalDigest(value)
	case KindTool:
		if len(value) > 256 {
			err = fmt.Errorf("%w: tool name is %d bytes, at most 256", ErrInvalid, len(value))
		}
	}
	if err != nil {
		return "", err
	}
	return value, nil
}

func checkText(what, value string, limit int) error {
	switch {
	case value == "":
		return fmt.Errorf("%w: %s is empty", ErrInvalid, what)
	case len(value) > limit:
		return fmt.Errorf("%w: %s is %d bytes, at most %d", ErrInvalid, what, len(value), limit)
	case !utf8.ValidString(value):
		return fmt.Errorf("%w: %s is not valid UTF-8", ErrInvalid, what)
	}
	for _, r := range value {
		if unicode.IsControl(r) {
			return fmt.Errorf("%w: %s has a control character", ErrInvalid, what)
		}
	}
	return nil
}

func checkTenantName(s string) error {
	if s == "" || len(s) > 64 {
		return fmt.Errorf("%w: a tenant name has 1 to 64 characters", ErrInvalid)
	}
	for i := 0; i < len(s); i++ {
		c := s[i]
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' && c != '_' && c != '.' {
			return fmt.Errorf("%w: a tenant name has only a-z, 0-9, \"-\", \"_\" and \".\"", ErrInvalid)
		}
	}
	return nil
}

// isURI reports whether s starts like an absolute URI (RFC 3986 §3.1) of a
// form that is globally unique by itself.
func isURI(s string) bool {
	scheme, rest, ok := strings.Cut(s, ":")
	if !ok || scheme == "" || rest == "" {
		return false
	}
	switch lowerASCII(scheme) {
	case "did", "urn", "tag":
		return true
	}
	for i := 0; i < len(scheme); i++ {
		c := scheme[i] | 0x20
		if (c < 'a' || c > 'z') && (i == 0 || (scheme[i] < '0' || scheme[i] > '9') && scheme[i] != '+' && scheme[i] != '-' && scheme[i] != '.') {
			return false
		}
	}
	return strings.HasPrefix(rest, "//") && len(rest) > 2
}

// lowerASCII folds A to Z alone: Unicode folding would make one value of two
// that differ (a Kelvin sign is not a k).
func lowerASCII(s string) string {
	for i := 0; i < len(s); i++ {
		if 'A' <= s[i] && s[i] <= 'Z' {
			b := []byte(s)
			for ; i < len(b); i++ {
				if 'A' <= b[i] && b[i] <= 'Z' {
					b[i] |= 0x20
				}
			}
			return string(b)
		}
	}
	return s
}

// canonicalURI does not use net/url, which would allocate for an audience that
// is canonical already, on the path of a check.
func canonicalURI(kind Kind, value string) (string, error) {
	bad := func(what string) (string, error) { return "", fmt.Errorf("%w: %s: %s", ErrInvalid, kind, what) }
	scheme, rest, _ := strings.Cut(value, ":")
	scheme = lowerASCII(scheme)
	switch scheme {
	case "did":
		method, id, ok := strings.Cut(rest, ":")
		if !ok || method == "" || id == "" || strings.ContainsAny(id[:1], "/?#") || strings.ContainsAny(method, "/?#") {
			return bad("a DID is did:method:id")
		}
		if i := strings.IndexAny(id, "/?#"); i >= 0 && kind != KindCredential {
			id = id[:i]
		}
		return join(value, "did:", lowerASCII(method), ":", id), nil
	case "urn":
		nid, nss, ok := strings.Cut(rest, ":")
		if i := strings.IndexAny(nss, "?#"); i >= 0 && kind != KindCredential {
			nss = nss[:i]
		}
		if !ok || nid == "" || nss == "" {
			return bad("a URN is urn:namespace:name")
		}
		if nid = lowerASCII(nid); nid == "uuid" {
			nss = lowerASCII(nss)
		}
		return join(value, "urn:", nid, ":", nss), nil
	case "tag":
		return join(value, "tag:", rest), nil
	}
	authority, tail := rest[2:], ""
	if i := strings.IndexAny(authority, "/?#"); i >= 0 {
		authority, tail = authority[:i], authority[i:]
	}
	if strings.Contains(authority, "@") {
		return bad("user info in a URI is refused")
	}
	authority = lowerASCII(authority)
	if scheme == "spiffe" {
		if !validSPIFFE(authority, tail) {
			return bad("a SPIFFE id is spiffe://trust-domain/path, of letters, digits, \".\", \"-\" and \"_\", with no port, user, query, fragment, empty or dot segment")
		}
		return join(value, scheme, "://", authority, tail), nil
	}
	host, port, ok := splitPort(authority)
	if !ok {
		return bad("not a URI with a host")
	}
	if port == "" || scheme == "http" && port == "80" || scheme == "https" && port == "443" {
		authority = host
	}
	if i := strings.IndexByte(tail, '#'); i >= 0 && kind != KindCredential {
		tail = tail[:i]
	}
	if (scheme == "http" || scheme == "https") && (tail == "" || tail[0] != '/') {
		tail = "/" + tail
	}
	out := join(value, scheme, "://", authority, tail)
	if len(out) > MaxValueLen {
		return bad("too long")
	}
	return out, nil
}

// join puts the parts of a URI together, without allocating when they are value
// itself.
func join(value string, parts ...string) string {
	rest, same := value, true
	for i := 0; same && i < len(parts); i++ {
		rest, same = strings.CutPrefix(rest, parts[i])
	}
	if same && rest == "" {
		return value
	}
	return strings.Join(parts, "")
}

// splitPort takes an authority without user info apart. An IP literal keeps its
// brackets.
func splitPort(authority string) (host, port string, ok bool) {
	host, port = authority, ""
	end := 0
	if strings.HasPrefix(authority, "[") {
		end = strings.IndexByte(authority, ']') + 1
		if end < 4 || strings.ContainsAny(authority[1:end-1], "[ \"<>\\^`{|}") {
			return "", "", false
		}
	}
	if i := strings.IndexByte(authority[end:], ':'); i >= 0 {
		host, port = authority[:end+i], authority[end+i+1:]
	}
	if end > 0 && len(host) != end || end == 0 && strings.ContainsAny(host, " \"<>\\^`{|}[]") || host == "" {
		return "", "", false
	}
	for i := 0; i < len(port); i++ {
		if port[i] < '0' || port[i] > '9' {
			return "", "", false
		}
	}
	return host, port, true
}

// validSPIFFE reports whether a lower-case trust domain and a path make a
// SPIFFE id (SPIFFE-ID §2.1, §2.2).
func validSPIFFE(domain, path string) bool {
	label := func(s string, upper bool) bool {
		for i := 0; i < len(s); i++ {
			c := s[i]
			if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '.' && c != '-' && c != '_' && (!upper || c < 'A' || c > 'Z') {
				return false
			}
		}
		return s != ""
	}
	if !label(domain, false) {
		return false
	}
	for path != "" {
		if path[0] != '/' {
			return false
		}
		segment, _, _ := strings.Cut(path[1:], "/")
		if !label(segment, true) || segment == "." || segment == ".." {
			return false
		}
		path = path[1+len(segment):]
	}
	return true
}

func checkKeyValue(s string) error {
	if v, ok := strings.CutPrefix(s, "apikey:"); ok {
		if b, err := hex.DecodeString(v); err == nil && len(b) == 32 && lowerASCII(v) == v {
			return nil
		}
		return fmt.Errorf("%w: key: want apikey: and the SHA-256 in lower-case hex", ErrInvalid)
	}
	for _, prefix := range []string{"jkt:", "x5t#S256:"} {
		if v, ok := strings.CutPrefix(s, prefix); ok {
			if b, err := base64.RawURLEncoding.Strict().DecodeString(v); err == nil && len(b) == 32 {
				return nil
			}
		}
	}
	return fmt.Errorf("%w: key: want jkt: or x5t#S256: and 43 characters of base64url, or apikey: and a hash", ErrInvalid)
}

func canonicalDigest(s string) (string, error) {
	of, hash, ok := strings.Cut(s, ":")
	if ok && (of == "code" || of == "model" || of == "image") {
		if v, ok := strings.CutPrefix(hash, "sha256:"); ok {
			v = lowerASCII(v)
			if b, err := hex.DecodeString(v); err == nil && len(b) == 32 {
				return of + ":sha256:" + v, nil
			}
		}
	}
	return "", fmt.Errorf("%w: digest: want code:, model: or image:, then sha256: and 64 hex digits", ErrInvalid)
}
