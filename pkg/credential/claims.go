package credential

import (
	"crypto"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"math"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/json"

	"github.com/interlock-fabric/interlock/pkg/session"
)

// Claims names the claims that an identity is taken from. A field that is empty
// keeps its default. A name that begins with "/" is a JSON pointer (RFC 6901)
// into the claims, as in "/realm_access/roles"; any other is a claim's name
// as it stands.
//
// The registered claims are not here because their meaning is not a matter of
// configuration: `iss`, `sub` (the user), `jti` (the token), `aud`, `exp`,
// `nbf`, `iat`, `auth_time`, `acr`, `txn`, `act` (the actors, the current one first),
// and `cnf` (the keys).
type Claims struct {
	// Session is the session id, a string. Default "sid".
	Session string
	// SessionStart is when it began, a NumericDate. Default "session_start".
	SessionStart string
	// Ancestors are the sessions it descends from, nearest first: strings, or
	// objects with "sid" and optionally "iss" and "start". At most MaxAncestors.
	// Default "session_ancestors".
	Ancestors string
	// Client is the OAuth client, a string. Default "client_id", or "azp" where
	// that is absent.
	Client string
	// Capabilities are permissions held: a string of words separated by spaces,
	// or an array of strings. Default "scope", or "scp" where that is absent.
	Capabilities string
	// Roles are roles held, in either form. Default "roles".
	Roles string
	// Digests of code, model and image, an array of strings. Default "digests".
	Digests string
	// Blueprint is what the agent was made from, a string. Default "blueprint".
	Blueprint string
	// Owner is who answers for the agent, a string. Default "owner".
	Owner string
	// Credentials are ids of verifiable credentials presented, an array of
	// strings. Default "credential_ids".
	Credentials string
}

type mapping struct {
	session, start, ancestors, client, capabilities, roles, digests, blueprint, owner, credentials []string
}

// compile turns each name into the alternatives to look for, in order.
func (c Claims) compile() (*mapping, error) {
	var err error
	names := func(name string, defaults ...string) []string {
		if name == "" {
			return defaults
		}
		if len(name) > session.MaxValueLen {
			err = fmt.Errorf("a claim's name is longer than %d bytes", session.MaxValueLen)
		}
		return []string{name}
	}
	m := &mapping{
		session: names(c.Session, "sid"), start: names(c.SessionStart, "session_start"),
		ancestors: names(c.Ancestors, "session_ancestors"), client: names(c.Client, "client_id", "azp"),
		capabilities: names(c.Capabilities, "scope", "scp"), roles: names(c.Roles, "roles"),
		digests: names(c.Digests, "digests"), blueprint: names(c.Blueprint, "blueprint"),
		owner: names(c.Owner, "owner"), credentials: names(c.Credentials, "credential_ids"),
	}
	return m, err
}

// claims are the members of a token's payload.
type claims map[string]any

// parseClaims reads a payload. Two members of one name anywhere in it are
// refused: parsers differ in which they take, and so would the issuer and we.
func parseClaims(payload []byte) (claims, error) {
	if deep(payload) {
		return nil, ErrTokenMalformed.because("the claims are nested too deep")
	}
	var c claims
	d := json.NewDecoder(strings.NewReader(string(payload)))
	if err := d.Decode((*map[string]any)(&c)); err != nil || c == nil {
		return nil, ErrTokenMalformed.because("the claims are not one JSON object with distinct members")
	}
	// More would take a closing bracket for the end.
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return nil, ErrTokenMalformed.because("something follows the claims")
	}
	return c, nil
}

// maxDepth bounds how deep claims may be nested: the chain of actors, and some.
// Strangers' claims are read before anything of them is verified, and each level
// takes stack.
const maxDepth = 32

// deep reports whether a JSON text is nested deeper than that. Of a text that is
// not JSON it may say anything.
func deep(text []byte) bool {
	depth, quoted := 0, false
	for i := 0; i < len(text); i++ {
		switch c := text[i]; {
		case quoted && c == '\\':
			i++
		case c == '"':
			quoted = !quoted
		case quoted:
		case c == '{' || c == '[':
			if depth++; depth > maxDepth {
				return true
			}
		case c == '}' || c == ']':
			depth--
		}
	}
	return false
}

// lookup returns the first alternative that is there, and its name.
func (c claims) lookup(names ...string) (any, string) {
	for _, name := range names {
		if v := c.at(name); v != nil {
			return v, name
		}
	}
	return nil, ""
}

func (c claims) at(name string) any {
	if !strings.HasPrefix(name, "/") {
		return c[name]
	}
	var v any = map[string]any(c)
	for _, part := range strings.Split(name[1:], "/") {
		m, ok := v.(map[string]any)
		if !ok {
			return nil
		}
		v = m[strings.NewReplacer("~1", "/", "~0", "~").Replace(part)]
	}
	return v
}

func wrong(name, want string) error { return ErrTokenClaims.because(name + " is not " + want) }

// text returns a string claim, or "" where it is absent.
func (c claims) text(names ...string) (string, error) {
	v, name := c.lookup(names...)
	if v == nil {
		return "", nil
	}
	s, ok := v.(string)
	if !ok || s == "" || len(s) > session.MaxValueLen {
		return "", wrong(name, "a string of a permitted length")
	}
	return s, nil
}

// list returns a claim that is a string or an array of strings.
func (c claims) list(names ...string) ([]string, error) {
	v, name := c.lookup(names...)
	switch v := v.(type) {
	case nil:
		return nil, nil
	case string:
		return []string{v}, nil
	case []any:
		if len(v) > maxValues {
			return nil, wrong(name, "of a permitted length")
		}
		out := make([]string, 0, len(v))
		for _, item := range v {
			s, ok := item.(string)
			if !ok || s == "" || len(s) > session.MaxValueLen {
				return nil, wrong(name, "an array of strings of a permitted length")
			}
			out = append(out, s)
		}
		return out, nil
	}
	return nil, wrong(name, "a string or an array of strings")
}

// words is list, with a string split at its spaces (RFC 6749 §3.3).
func (c claims) words(names ...string) ([]string, error) {
	v, name := c.lookup(names...)
	if s, ok := v.(string); ok {
		words := strings.Fields(s)
		if len(words) > maxValues {
			return nil, wrong(name, "of a permitted length")
		}
		return words, nil
	}
	return c.list(names...)
}

// time returns a NumericDate (RFC 7519 §2), or the zero time.
func (c claims) time(names ...string) (time.Time, error) {
	v, name := c.lookup(names...)
	if v == nil {
		return time.Time{}, nil
	}
	f, ok := v.(float64)
	// The last second of the year 9999 bounds what the wire can carry.
	if !ok || math.IsNaN(f) || f <= 0 || f > 253402300799 {
		return time.Time{}, wrong(name, "a NumericDate")
	}
	sec, frac := math.Modf(f)
	return time.Unix(int64(sec), int64(frac*1e9)), nil
}

// Unverified reads a token's claims, a JSON object, into the identity that a
// Verifier with these names would make of them, without its tenant and without
// a Token where there is no `jti`. Nobody has verified anything about it: it is
// for saying why a caller is denied, and never a reason to allow one. The error
// wraps ErrToken and is the one with which a Verifier refuses such claims.
func Unverified(payload []byte, names Claims) (session.Identity, error) {
	m, err := names.compile()
	if err != nil {
		return session.Identity{}, ErrTokenClaims.because(err.Error())
	}
	c, err := parseClaims(payload)
	if err != nil {
		return session.Identity{}, err
	}
	return m.identity(c)
}

// identity applies the mapping.
func (m *mapping) identity(c claims) (id session.Identity, err error) {
	var firstErr error
	keep := func(err error) {
		if firstErr == nil {
			firstErr = err
		}
	}
	text := func(names ...string) string { s, err := c.text(names...); keep(err); return s }
	list := func(names []string) []string { l, err := c.list(names...); keep(err); return l }
	words := func(names []string) []string { l, err := c.words(names...); keep(err); return l }
	instant := func(names ...string) time.Time { t, err := c.time(names...); keep(err); return t }

	id = session.Identity{
		Issuer:       text("iss"),
		Token:        text("jti"),
		User:         text("sub"),
		Session:      session.SessionRef{ID: text(m.session...), Start: instant(m.start...)},
		Client:       text(m.client...),
		Digests:      list(m.digests),
		Credentials:  list(m.credentials),
		Blueprint:    text(m.blueprint...),
		Owner:        text(m.owner...),
		Roles:        words(m.roles),
		Capabilities: words(m.capabilities),
		IssuedAt:     instant("iat"),
		AuthTime:     instant("auth_time"),
		Expires:      instant("exp"),
		ACR:          text("acr"),
	}
	id.Transaction, _ = c["txn"].(string) // for the trail; nothing is decided by it
	id.Ancestors, err = ancestors(c, m.ancestors)
	keep(err)
	id.Actors, err = actors(c["act"])
	keep(err)
	id.Keys, err = keys(c["cnf"])
	keep(err)
	if firstErr != nil {
		return session.Identity{}, firstErr
	}
	return id, nil
}

func ancestors(c claims, names []string) ([]session.SessionRef, error) {
	v, name := c.lookup(names...)
	if v == nil {
		return nil, nil
	}
	items, ok := v.([]any)
	if !ok || len(items) > MaxAncestors {
		return nil, wrong(name, fmt.Sprintf("an array of at most %d sessions", MaxAncestors))
	}
	var out []session.SessionRef
	for _, item := range items {
		var ref session.SessionRef
		var err error
		switch item := item.(type) {
		case string:
			ref.ID, err = claims{"sid": item}.text("sid")
		case map[string]any:
			if ref.ID, err = claims(item).text("sid"); err == nil {
				if ref.Issuer, err = claims(item).text("iss"); err == nil {
					ref.Start, err = claims(item).time("start")
				}
			}
		}
		if err != nil || ref.ID == "" {
			return nil, wrong(name, "an array of session ids, or of objects with sid, iss and start")
		}
		out = append(out, ref)
	}
	return out, nil
}

// actors flattens the delegation chain (RFC 8693 §4.1). An actor that cannot be
// named could not be revoked, so the token is refused.
func actors(act any) ([]session.Actor, error) {
	var out []session.Actor
	for act != nil {
		m, ok := act.(map[string]any)
		if !ok {
			return nil, wrong("act", "an object")
		}
		if len(out) == MaxActors {
			return nil, ErrTokenClaims.because(fmt.Sprintf("act is nested more than %d deep", MaxActors))
		}
		id, err := claims(m).text("sub")
		if err != nil || id == "" {
			return nil, ErrTokenClaims.because("act has no sub")
		}
		iss, err := claims(m).text("iss")
		if err != nil {
			return nil, err
		}
		out = append(out, session.Actor{Issuer: iss, ID: id})
		act = m["act"]
	}
	return out, nil
}

// keys reads the confirmation claim (RFC 7800 §3, RFC 9449 §6.1, RFC 8705 §3.1).
func keys(cnf any) ([]string, error) {
	if cnf == nil {
		return nil, nil
	}
	m, ok := cnf.(map[string]any)
	if !ok {
		return nil, wrong("cnf", "an object")
	}
	var out []string
	for _, member := range []string{"jkt", "x5t#S256"} {
		v, err := claims(m).text(member)
		if err != nil {
			return nil, err
		}
		if v == "" {
			continue
		}
		k, err := session.Canonical(session.KindKey, member+":"+v)
		if err != nil {
			return nil, wrong("cnf", "a SHA-256 thumbprint in base64url")
		}
		out = append(out, k)
	}
	if v := m["jwk"]; v != nil {
		raw, err := json.Marshal(v)
		if err != nil {
			return nil, wrong("cnf", "a JWK")
		}
		var k jose.JSONWebKey
		if err := k.UnmarshalJSON(raw); err != nil {
			return nil, wrong("cnf", "a JWK")
		}
		sum, err := k.Thumbprint(crypto.SHA256)
		if err != nil {
			return nil, wrong("cnf", "a JWK")
		}
		out = append(out, "jkt:"+base64.RawURLEncoding.EncodeToString(sum))
	}
	return out, nil
}
