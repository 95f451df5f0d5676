package denial_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/interlock-fabric/interlock/pkg/denial"
	"github.com/interlock-fabric/interlock/pkg/session"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func entry(e session.Effect, shape session.Kind) error {
	return &session.DeniedError{Err: e.Sentinel(), Denial: session.Denial{
		Effect: e, Reason: session.ReasonStolenToken, Incident: "INC-1", Seq: 7, Shape: session.Shape(shape), ACR: "urn:acr:phr",
	}}
}

func TestAnswer(t *testing.T) {
	r := &denial.Resource{Metadata: "https://r.example/m", Scopes: []string{"a", "b"}}
	const where = `scope="a b", resource_metadata="https://r.example/m"`
	tests := []struct {
		name      string
		err       error
		status    int
		word      string
		challenge string // what begins it; empty for none
		retry     bool
	}{
		{"revoked", entry(session.EffectRevoked, session.KindUser), 401, "revoked", `Bearer error="invalid_token", error_description="denied: revoked: stolen-token (seq 7, INC-1)", ` + where, false},
		{"revoked tool", entry(session.EffectRevoked, session.KindTool), 403, "revoked", "", false},
		{"suspended", entry(session.EffectSuspended, session.KindUser), 403, "suspended", "", true},
		{"step-up", entry(session.EffectStepUp, session.KindUser), 401, "step_up", `Bearer error="insufficient_user_authentication"`, false},
		{"reduced", entry(session.EffectReduced, session.KindUser), 403, "reduced", `Bearer error="insufficient_scope"`, false},
		{"scope", denial.ErrScope, 403, "insufficient_scope", `Bearer error="insufficient_scope"`, false},
		{"expired", session.ErrExpired, 401, "expired", `Bearer error="invalid_token"`, false},
		{"unregistered", session.ErrUnregistered, 401, "unregistered", `Bearer error="invalid_token"`, false},
		{"no identity", session.ErrNoIdentity, 401, "no_identity", `Bearer error="invalid_token"`, false},
		{"stale", session.ErrStale, 503, "stale", "", true},
		{"stale and no identity", errors.Join(session.ErrNoIdentity, session.ErrStale), 503, "stale", "", true},
		{"overloaded", session.ErrOverloaded, 503, "overloaded", "", true},
		{"closed", session.ErrClosed, 503, "closed", "", true},
		{"any other", fmt.Errorf("secret: %w", io.EOF), 503, "denied", "", true},
		{"none at all", nil, 503, "denied", "", true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			a := r.Answer(tt.err)
			if a.Status != tt.status || a.Data.Error != tt.word || a.Code() != -31000-int64(tt.status) || (a.RetryAfter > 0) != tt.retry {
				t.Errorf("%+v", a)
			}
			c := a.Challenge(true)
			if (tt.challenge == "") != (c == "") || !strings.HasPrefix(c, tt.challenge) {
				t.Errorf("challenge %q", c)
			}
			if c := a.Challenge(false); strings.Contains(c, "error") {
				t.Errorf("a request without credentials is told %q", c)
			}
			if out := string(a.Response(json.RawMessage(`7`))); strings.Contains(out, "secret") || !strings.HasPrefix(out, `{"jsonrpc":"2.0","id":7,"error":{"code":`) {
				t.Error(out)
			}
		})
	}
}

func TestSuspensionWithAnEndSaysWhen(t *testing.T) {
	err := &session.DeniedError{Err: session.ErrSuspended, Denial: session.Denial{Effect: session.EffectSuspended, Until: session.InstantOf(time.Now().Add(10 * time.Minute))}}
	a := new(denial.Resource).Answer(err)
	if a.RetryAfter < 9*time.Minute || a.RetryAfter > 10*time.Minute {
		t.Error(a.RetryAfter)
	}
}

func TestAnswerCannotBeInjectedInto(t *testing.T) {
	err := fmt.Errorf("%w: a\"b\\c\r\nX: y", session.ErrNoIdentity)
	a := new(denial.Resource).Answer(err)
	if c := a.Challenge(true); strings.ContainsAny(c, "\r\n\\") || strings.Count(c, `"`) != 4 {
		t.Errorf("%q", c)
	}
	if out := string(a.Response(json.RawMessage("7}"))); !json.Valid([]byte(out)) {
		t.Error(out)
	}
	if err := (&denial.Resource{Metadata: "https://r.example/\"x"}).Validate(); !errors.Is(err, session.ErrInvalid) {
		t.Error(err)
	}
}

func TestWrite(t *testing.T) {
	a := new(denial.Resource).Answer(session.ErrStale)
	w := httptest.NewRecorder()
	a.Write(w, httptest.NewRequest(http.MethodPost, "/", nil), nil)
	if h := w.Header(); w.Code != 503 || h.Get("Retry-After") != "5" || h.Get("Cache-Control") != "no-store" || h.Get("Content-Type") != "application/json" {
		t.Error(w.Code, h)
	}
	if !strings.HasSuffix(w.Body.String(), "}\n") {
		t.Error(w.Body)
	}
}
