package credential_test

import (
	"context"
	"errors"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/interlock-fabric/interlock/pkg/credential"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// told is an issuer that says what it is told to; nothing is no answer at all.
type told struct {
	says  atomic.Value
	asked atomic.Int64
}

func (x *told) RoundTrip(*http.Request) (*http.Response, error) {
	x.asked.Add(1)
	body, _ := x.says.Load().(string)
	if body == "" {
		return nil, errors.New("unreachable")
	}
	return &http.Response{StatusCode: http.StatusOK, Header: http.Header{"Content-Type": {"application/json"}}, Body: io.NopCloser(strings.NewReader(body))}, nil
}

// Work that runs under an opaque token ends when its issuer says that it is not
// active, at the age of its last answer and not before; and when nobody can find
// out, later. The mechanism is the loop of Watch.
func TestRunningWorkIsHeldToItsOpaqueToken(t *testing.T) {
	const active = `{"active":true,"sub":"ann","aud":"` + audience + `"}`
	for name, tt := range map[string]struct {
		says  string
		after time.Duration // the end, after the last good answer; 0 is never
		want  error
	}{
		"active":      {active, 0, nil},
		"inactive":    {`{"active":false}`, 10 * time.Second, credential.ErrTokenInactive},
		"expired":     {strings.Replace(active, "{", `{"exp":1,`, 1), 10 * time.Second, credential.ErrTokenExpired},
		"for another": {strings.Replace(active, audience, "https://other.example", 1), 10 * time.Second, credential.ErrTokenAudience},
		"unreachable": {"", 20 * time.Second, session.ErrStale},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				issuer := &told{}
				issuer.says.Store(active)
				v, err := credential.New(credential.Options{
					Audiences: []string{audience}, HTTP: &http.Client{Transport: issuer},
					Issuers: []credential.Issuer{{URL: issuerURL, Tenant: "acme", Introspection: &credential.Introspection{URL: "https://id.example/i"}}},
				})
				if err != nil {
					t.Fatal(err)
				}
				defer v.Close()
				r, _ := http.NewRequestWithContext(t.Context(), http.MethodGet, "https://tools.example/", nil)
				r.Header.Set("Authorization", "Bearer opaque")
				if _, err := v.VerifyRequest(r); err != nil {
					t.Fatal(err)
				}
				synctest.Wait()
				began := time.Now()
				ctx, release := v.Watch(r.Context(), r)
				defer release()
				time.Sleep(35 * time.Second)
				if err := ctx.Err(); err != nil || issuer.asked.Load() > 5 {
					t.Fatalf("while it is active: %v, asked %d times", context.Cause(ctx), issuer.asked.Load())
				}
				issuer.says.Store(tt.says)
				end := make(chan time.Duration, 1)
				stop := context.AfterFunc(ctx, func() { end <- time.Since(began) })
				defer stop()
				time.Sleep(time.Minute)
				synctest.Wait()
				var d *session.DeniedError
				select {
				case at := <-end:
					// The last good answer was of 30 s after the first, or a moment later.
					if late := at - 30*time.Second - tt.after; tt.after == 0 || late < 0 || late > 2*time.Second {
						t.Errorf("it ended after %v", at)
					}
					if err := context.Cause(ctx); !errors.As(err, &d) || !errors.Is(err, tt.want) {
						t.Errorf("it ended with %v, want %v", err, tt.want)
					}
				default:
					if tt.after != 0 {
						t.Error("it did not end")
					}
				}
			})
		})
	}
}

// Whoever need not be asked about costs nothing, and what is released has ended.
func TestWatchIsReleased(t *testing.T) {
	a, c := newAuthorizationServer(t), newClock(time.Now())
	v := a.verifier(t, c)
	request := func(token string) *http.Request {
		r, _ := http.NewRequestWithContext(t.Context(), http.MethodGet, "https://tools.example/", nil)
		r.Header.Set("Authorization", "Bearer "+token)
		return r
	}
	ctx := t.Context()
	jwt := "eyJhbGciOiJFUzI1NiJ9.e30.x"
	if got, release := v.Watch(ctx, request(jwt)); got != ctx {
		t.Error("a JWT is held")
	} else {
		release()
	}
	a.know(t, "opaque", nil)
	held, release := v.Watch(ctx, request("opaque"))
	release()
	release()
	if err := context.Cause(held); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}
