package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	service "github.com/interlock-fabric/interlock/internal/authority"
	"github.com/interlock-fabric/interlock/pkg/authority"
)

const issuer = "https://id.example"

// fabric is a real authority with its bus, and an upstream, for the scripts, until
// it is interrupted: it writes an enrolment, keys, tokens and a configuration.
func fabric() {
	if err := runFabric(os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, "fabric:", err)
		os.Exit(1)
	}
}

func runFabric(listen string) error {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	svc, err := service.Open(ctx, service.Options{DataDir: "authority", Socket: "a.sock", NATSListen: "127.0.0.1:0", RelaxedSync: true})
	if err != nil {
		return err
	}
	defer svc.Close()
	c, err := authority.New(authority.Options{Socket: "a.sock"})
	if err != nil {
		return err
	}
	defer c.Close()
	raw, err := c.Enroll(ctx, authority.EnrollRequest{Name: "gateway"})
	if err != nil {
		return err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	jwks, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: key.Public(), KeyID: "k1"}}})
	if err != nil {
		return err
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: key, KeyID: "k1"}}, (&jose.SignerOptions{}).WithType("at+jwt"))
	if err != nil {
		return err
	}
	up := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, "hello "+r.Header.Get("Interlock-Subject")+"\n")
		if r.URL.Path == "/slow" {
			_ = http.NewResponseController(w).Flush()
			<-r.Context().Done()
		}
	}))
	defer up.Close()
	defer up.CloseClientConnections()
	files := map[string][]byte{"enrollment.json": raw, "jwks.json": jwks}
	for _, user := range []string{"alice", "bob"} {
		now := time.Now()
		token, err := jwt.Signed(signer).Claims(map[string]any{
			"iss": issuer, "sub": user, "aud": "https://tools.example/", "sid": "s-" + user, "jti": rand.Text(),
			"auth_time": now.Unix(), "exp": now.Add(time.Hour).Unix(),
		}).Serialize()
		if err != nil {
			return err
		}
		files[user+".jwt"] = []byte(token + "\n")
	}
	files["enforcer.yaml"] = fmt.Appendf(nil, `enrollment: enrollment.json
state_dir: state
admin: {socket: e.sock}
drain_timeout: 300ms
issuers: [{url: %s, tenant: default, jwks_file: jwks.json}]
routes:
  - {name: files, protocol: http, path: /, resource: "https://tools.example/", upstream: {url: %q}}
proxy: {listeners: [{listen: %q}]}
`, issuer, up.URL, listen)
	for name, b := range files {
		if err := os.WriteFile(name, b, 0o600); err != nil {
			return err
		}
	}
	fmt.Println("up")
	<-ctx.Done()
	return nil
}

// revoke revokes a session: revoke SID.
func revoke() {
	c, err := authority.New(authority.Options{Socket: "a.sock"})
	if err == nil {
		_, err = c.Decide(context.Background(), authority.Request{
			Operation: authority.Revoke, Targets: []authority.Target{authority.One("", "session", issuer, os.Args[1])},
			Reason: "stolen-token", Incident: "INC-142",
		})
		c.Close()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "revoke:", err)
		os.Exit(1)
	}
}

// fetch gets a URL with a token: fetch URL TOKEN-FILE. It prints status and body.
func fetch() {
	b, err := os.ReadFile(os.Args[2])
	if err == nil {
		var req *http.Request
		if req, err = http.NewRequestWithContext(context.Background(), http.MethodGet, os.Args[1], nil); err == nil {
			req.Header.Set("Authorization", "Bearer "+string(b[:len(b)-1]))
			var resp *http.Response
			if resp, err = http.DefaultTransport.RoundTrip(req); err == nil {
				fmt.Println(resp.Status)
				_, err = io.Copy(os.Stdout, resp.Body)
			}
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "fetch:", err)
		os.Exit(1)
	}
}
