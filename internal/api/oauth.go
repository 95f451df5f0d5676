package api

import (
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"net/url"
	"strings"

	"github.com/interlock-fabric/interlock/pkg/authority"
	"github.com/interlock-fabric/interlock/pkg/credential"
)

// oauthPrefix is what the endpoints of OAuth's own protocols are under.
const oauthPrefix = "/v1/oauth/"

// maxForm bounds the body of a revocation or an introspection: a token of the
// greatest length, each of its bytes escaped, and the rest.
const maxForm = 3*credential.MaxTokenLen + 4<<10

// OAuthError is an error of RFC 6749 section 5.2, as RFC 7009 and RFC 7662 want it.
type OAuthError struct {
	Status      int
	Code        string
	Description string
	// RetryAfter is in how many seconds it may succeed as it is; zero says nothing.
	RetryAfter int
}

// Error implements error.
func (e *OAuthError) Error() string { return e.Code + ": " + e.Description }

// Introspection is the answer of RFC 7662 section 2.2. Its members beside Active
// are those of which package credential makes an identity when it finds them in a
// token, under their default names.
type Introspection struct {
	Active      bool              `json:"active"`
	Issuer      string            `json:"iss,omitempty"`
	Subject     string            `json:"sub,omitempty"`
	Audience    []string          `json:"aud,omitempty"`
	ID          string            `json:"jti,omitempty"`
	ClientID    string            `json:"client_id,omitempty"`
	Scope       string            `json:"scope,omitempty"`
	Expires     float64           `json:"exp,omitempty"`
	IssuedAt    float64           `json:"iat,omitempty"`
	AuthTime    float64           `json:"auth_time,omitempty"`
	ACR         string            `json:"acr,omitempty"`
	Transaction string            `json:"txn,omitempty"`
	Session     string            `json:"sid,omitempty"`
	Start       float64           `json:"session_start,omitempty"`
	Ancestors   []SessionAncestor `json:"session_ancestors,omitempty"`
	Actor       *Actor            `json:"act,omitempty"`
	Keys        *Confirmation     `json:"cnf,omitempty"`
	Roles       []string          `json:"roles,omitempty"`
	// Capabilities are in Scope, unless one of them has a space in it.
	Capabilities []string `json:"scp,omitempty"`
	Digests      []string `json:"digests,omitempty"`
	Credentials  []string `json:"credential_ids,omitempty"`
	Blueprint    string   `json:"blueprint,omitempty"`
	Owner        string   `json:"owner,omitempty"`
}

// SessionAncestor is a session that the token's descends from.
type SessionAncestor struct {
	Issuer string  `json:"iss,omitempty"`
	ID     string  `json:"sid"`
	Start  float64 `json:"start,omitempty"`
}

// Actor is a link of the delegation chain (RFC 8693 section 4.1).
type Actor struct {
	Issuer  string `json:"iss,omitempty"`
	Subject string `json:"sub"`
	Before  *Actor `json:"act,omitempty"`
}

// Confirmation is the key that the token is bound to (RFC 7800).
type Confirmation struct {
	JKT string `json:"jkt,omitempty"`
	X5T string `json:"x5t#S256,omitempty"`
}

// SubjectID is a subject identifier (RFC 9493).
type SubjectID struct {
	Format  string `json:"format"`
	Issuer  string `json:"iss,omitempty"`
	Subject string `json:"sub,omitempty"`
	ID      string `json:"id,omitempty"`
	Email   string `json:"email,omitempty"`
}

// revokeToken is RFC 7009.
func (s *Server) revokeToken(w http.ResponseWriter, r *http.Request) error {
	token, err := readToken(w, r)
	if err != nil {
		return err
	}
	if err := s.svc.RevokeToken(r.Context(), token); err != nil {
		return err
	}
	writeJSON(w, http.StatusOK, struct{}{}) // clients ignore it (section 2.2)
	return nil
}

// introspect is RFC 7662.
func (s *Server) introspect(w http.ResponseWriter, r *http.Request) error {
	token, err := readToken(w, r)
	if err != nil {
		return err
	}
	i, err := s.svc.Introspect(r.Context(), token)
	if err != nil {
		return err
	}
	writeJSON(w, http.StatusOK, i)
	return nil
}

// revokeSubject is Global Token Revocation
// (draft-parecki-oauth-global-token-revocation-06).
func (s *Server) revokeSubject(w http.ResponseWriter, r *http.Request) error {
	var in struct {
		SubjectID *SubjectID `json:"sub_id"`
	}
	if err := readJSON(w, r, &in); err != nil {
		return err
	}
	if in.SubjectID == nil {
		return authority.NewProblem(authority.ProblemInvalid, "sub_id is missing", "send a subject identifier of RFC 9493 in it")
	}
	if err := s.svc.RevokeSubject(r.Context(), *in.SubjectID); err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// readToken reads the form that revocation and introspection have in common.
// Parameters that are not known are ignored (RFC 6749 section 3.2), and so is
// token_type_hint: all tokens are looked at alike.
func readToken(w http.ResponseWriter, r *http.Request) (string, error) {
	bad := func(why string) (string, error) {
		return "", &OAuthError{Status: http.StatusBadRequest, Code: "invalid_request", Description: why}
	}
	if ct, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err != nil || ct != "application/x-www-form-urlencoded" {
		return bad("the body is not declared to be a form: send Content-Type: application/x-www-form-urlencoded")
	}
	b, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxForm))
	var tooLong *http.MaxBytesError
	switch {
	case errors.As(err, &tooLong):
		return "", &OAuthError{Status: http.StatusRequestEntityTooLarge, Code: "invalid_request", Description: fmt.Sprintf("the body is longer than %d bytes", maxForm)}
	case err != nil:
		return bad("the body could not be read")
	}
	form, err := url.ParseQuery(string(b))
	if err != nil {
		return bad("the body is not a form")
	}
	for _, values := range form {
		if len(values) > 1 {
			return bad("a parameter is there twice")
		}
	}
	if form.Get("token") == "" {
		return bad("the parameter token is missing")
	}
	return form.Get("token"), nil
}

// fail answers with a problem; where OAuth has a form of its own for that, in that.
func fail(w http.ResponseWriter, r *http.Request, p *authority.Problem) {
	if !strings.HasPrefix(r.URL.Path, oauthPrefix) || strings.HasSuffix(r.URL.Path, "/global-token-revocation") {
		writeProblem(w, p)
		return
	}
	code := "invalid_request"
	switch p.Type {
	case authority.ProblemUnauthorised:
		code = "invalid_client"
	case authority.ProblemForbidden:
		code = "insufficient_scope"
	case authority.ProblemOverloaded, authority.ProblemUnavailable:
		code = "temporarily_unavailable"
	case authority.ProblemQuota, authority.ProblemInternal:
		code = "server_error"
	}
	writeOAuthError(w, &OAuthError{Status: p.Status, Code: code, Description: p.Error(), RetryAfter: p.RetryAfter})
}

func writeOAuthError(w http.ResponseWriter, e *OAuthError) {
	retryAfter(w, e.RetryAfter)
	writeJSON(w, e.Status, map[string]string{"error": e.Code, "error_description": strings.Map(func(c rune) rune {
		// The characters that RFC 6749 section 5.2 permits.
		if c < 0x20 || c > 0x7e || c == '"' || c == '\\' {
			return '\''
		}
		return c
	}, e.Description)})
}
