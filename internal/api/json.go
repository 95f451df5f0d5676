package api

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"unicode"
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
	d := json.NewDecoder(bytes.NewReader(body))
	d.DisallowUnknownFields()
	err := d.Decode(v)
	var syntax *json.SyntaxError
	switch {
	case errors.Is(err, io.EOF):
		return errors.New("it is empty")
	case errors.Is(err, io.ErrUnexpectedEOF) || errors.As(err, &syntax):
		return errors.New("it is not JSON")
	case err != nil:
		return errors.New(strings.TrimPrefix(err.Error(), "json: "))
	}
	end := d.InputOffset()
	if len(bytes.Trim(body[end:], " \t\r\n")) > 0 {
		return errors.New("there is more after the value")
	}
	return checkMembers(body[:end])
}

// checkMembers refuses a repeated member, deep nesting, and names that encoding/json
// takes for those that they resemble; only claims, whose names are others', may be
// spelled in any way. The body is one value
// that is known to be JSON. A batch has thousands of members, so it looks at each
// byte once and keeps nothing but where the names are.
func checkMembers(body []byte) error {
	var names [][]byte // of the objects that are open
	var open []int     // where the names of each begin; -1 for an array
	name := false      // the next string is a member's name
	claims := false    // the last member of the outermost object is that
	for i := 0; i < len(body); i++ {
		switch body[i] {
		case '{', '[':
			if len(open) >= maxDepth {
				return fmt.Errorf("it is nested deeper than %d", maxDepth)
			}
			if name = body[i] == '{'; name {
				open = append(open, len(names))
			} else {
				open = append(open, -1)
			}
		case '}':
			own := names[open[len(open)-1]:]
			slices.SortFunc(own, bytes.Compare)
			for k := 1; k < len(own); k++ {
				if bytes.Equal(own[k-1], own[k]) {
					return fmt.Errorf("member %.64q is there twice", own[k])
				}
			}
			names, open = names[:len(names)-len(own)], open[:len(open)-1]
		case ']':
			open = open[:len(open)-1]
		case ',':
			name = open[len(open)-1] >= 0
		case '"':
			from := i
			for i++; body[i] != '"'; i++ {
				if body[i] == '\\' {
					i++
				}
			}
			if name {
				name = false
				folded, exact := fold(body[from : i+1])
				if len(open) == 1 {
					claims = string(folded) == "claims"
				}
				if !exact && (len(open) == 1 || !claims) {
					return fmt.Errorf("unknown field %.64q: names are in small letters", folded)
				}
				names = append(names, folded)
			}
		}
	}
	return nil
}

// fold returns a member's name, given with its quotes, so that those that
// encoding/json takes for the same, regardless of case, are equal; exact is whether
// it is so already.
func fold(quoted []byte) (name []byte, exact bool) {
	plain := quoted[1 : len(quoted)-1]
	if !slices.ContainsFunc(plain, func(c byte) bool { return c == '\\' || c >= utf8.RuneSelf || 'A' <= c && c <= 'Z' }) {
		return plain, true
	}
	var s string
	if json.Unmarshal(quoted, &s) != nil {
		return plain, false // it is known to be a string
	}
	folded := strings.Map(func(r rune) rune {
		// The least of those that fold to each other, as a small letter.
		least := r
		for o := unicode.SimpleFold(r); o != r; o = unicode.SimpleFold(o) {
			least = min(least, o)
		}
		if 'A' <= least && least <= 'Z' {
			least += 'a' - 'A'
		}
		return least
	}, s)
	return []byte(folded), folded == s
}

func writeJSON(w http.ResponseWriter, status int, v any) {
	writeAs(w, status, "application/json", v)
}

func writeProblem(w http.ResponseWriter, p *authority.Problem) {
	retryAfter(w, p.RetryAfter)
	writeAs(w, p.Status, "application/problem+json", p)
}

func retryAfter(w http.ResponseWriter, seconds int) {
	if seconds > 0 {
		w.Header().Set("Retry-After", strconv.Itoa(seconds))
	}
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
