package api

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"strings"
	"unicode/utf8"

	"github.com/interlock-fabric/interlock/pkg/authority"
)

// maxDepth bounds the nesting of a body.
const maxDepth = 16

// readJSON reads a request's body into v. What two parsers could read in two
// ways is refused: unknown and repeated members, data after the value, text
// that is not UTF-8. The error is a *authority.Problem.
func readJSON(w http.ResponseWriter, r *http.Request, v any) error {
	if ct, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err != nil || ct != "application/json" {
		return authority.NewProblem(authority.ProblemInvalid, "the body is not declared to be JSON", "send Content-Type: application/json")
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, authority.MaxBody))
	if err != nil {
		var tooLong *http.MaxBytesError
		if errors.As(err, &tooLong) {
			return authority.NewProblem(authority.ProblemTooLarge, fmt.Sprintf("the body is longer than %d bytes", authority.MaxBody), "send less at once")
		}
		return authority.NewProblem(authority.ProblemInvalid, "the body could not be read", "send it whole, within the time allowed")
	}
	if err := decodeStrict(body, v); err != nil {
		return authority.NewProblem(authority.ProblemInvalid, "the body is not valid: "+err.Error(), "see the API's description")
	}
	return nil
}

func decodeStrict(body []byte, v any) error {
	if !utf8.Valid(body) {
		return errors.New("it is not UTF-8")
	}
	if err := checkMembers(body); err != nil {
		return err
	}
	d := json.NewDecoder(bytes.NewReader(body))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return errors.New(strings.TrimPrefix(err.Error(), "json: "))
	}
	return nil
}

// checkMembers refuses objects with a repeated member, and data after the value.
// encoding/json matches members regardless of case, so this does too.
func checkMembers(body []byte) error {
	d := json.NewDecoder(bytes.NewReader(body))
	d.UseNumber()
	type frame struct {
		members map[string]bool // nil for an array
		value   bool            // a member's value is next
	}
	var stack []frame
	for {
		tok, err := d.Token()
		if err == io.EOF && len(stack) == 0 {
			return errors.New("it is empty")
		}
		if err != nil {
			return errors.New("it is not JSON")
		}
		top := len(stack) - 1
		switch delim, _ := tok.(json.Delim); {
		case delim == '{' || delim == '[':
			if top >= 0 {
				stack[top].value = false
			}
			if len(stack) >= maxDepth {
				return fmt.Errorf("it is nested deeper than %d", maxDepth)
			}
			f := frame{}
			if delim == '{' {
				f.members = map[string]bool{}
			}
			stack = append(stack, f)
		case delim == '}' || delim == ']':
			stack = stack[:top]
		case top >= 0 && stack[top].members != nil && !stack[top].value:
			name := strings.ToLower(tok.(string))
			if stack[top].members[name] {
				return fmt.Errorf("member %.64q is there twice", name)
			}
			stack[top].members[name] = true
			stack[top].value = true
		case top >= 0:
			stack[top].value = false
		}
		if len(stack) == 0 {
			break
		}
	}
	if _, err := d.Token(); err != io.EOF {
		return errors.New("there is more after the value")
	}
	return nil
}

func writeJSON(w http.ResponseWriter, status int, v any) {
	writeAs(w, status, "application/json", v)
}

func writeProblem(w http.ResponseWriter, p *authority.Problem) {
	writeAs(w, p.Status, "application/problem+json", p)
}

func writeAs(w http.ResponseWriter, status int, contentType string, v any) {
	b, err := json.Marshal(v)
	if err != nil {
		status, contentType = http.StatusInternalServerError, "application/problem+json"
		b, _ = json.Marshal(authority.NewProblem(authority.ProblemInternal, "the answer could not be written", "")) // fixed, known to marshal
	}
	h := w.Header()
	h.Set("Content-Type", contentType)
	h.Set("Cache-Control", "no-store")
	h.Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(status)
	_, _ = w.Write(append(b, '\n')) // a caller that went away learns nothing anyway
}
