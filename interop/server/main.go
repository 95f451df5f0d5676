// Command server is what the interop tests talk to: one MCP server with the
// features that the conformance suite asks for, behind a real authority, a real
// enforcer and the guard, and the same server without any of them.
//
// For enforcers of their own process it has upstreams that guard nothing, and
// enrols them.
//
// It listens on loopback, writes one line of JSON with its addresses to standard
// output, and ends when its standard input does.
package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/modelcontextprotocol/go-sdk/mcp"

	mcpguard "github.com/interlock-fabric/interlock/adapters/mcp"
	"github.com/interlock-fabric/interlock/pkg/authority"
	"github.com/interlock-fabric/interlock/pkg/credential"
)

const (
	issuer   = "https://interop.example"
	resource = "https://tools.example/mcp"
)

func main() {
	if err := run(context.Background(), os.Stdin, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "interop server:", err)
		os.Exit(1)
	}
}

// addresses is what the runner needs to know.
type addresses struct {
	// Guarded wants a token. Signed adds one by itself, for a suite that cannot.
	// Plain has no guard.
	Guarded string `json:"guarded"`
	Signed  string `json:"signed"`
	Plain   string `json:"plain"`
	Control string `json:"control"`
	// A2A is where the agent's card is found; PlainA2A is the agent without a guard.
	A2A      string `json:"a2a"`
	PlainA2A string `json:"plain_a2a"`
	// Mirror answers with the request that it was sent.
	Mirror string `json:"mirror"`
	// Keys verify the tokens.
	Keys jose.JSONWebKeySet `json:"keys"`
}

func run(ctx context.Context, in io.Reader, out io.Writer) (err error) {
	f, err := openFabric(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.close()) }()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	mint, err := newMint(key)
	if err != nil {
		return err
	}
	keys := jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: key.Public(), KeyID: "k1"}}}
	verifier, err := credential.New(credential.Options{
		Audiences: []string{resource},
		Issuers: []credential.Issuer{{
			URL: issuer, Tenant: tenant,
			Keys: keys,
		}},
	})
	if err != nil {
		return err
	}
	defer verifier.Close()
	guard, err := mcpguard.New(f.enforcer, verifier, &mcpguard.Options{
		Resource: resource, ResourceMetadata: "https://tools.example/.well-known/oauth-protected-resource",
	})
	if err != nil {
		return err
	}
	let := make(chan struct{})
	open := sync.OnceFunc(func() { close(let) })
	defer func() { err = errors.Join(err, guard.Close()) }()
	defer open()

	server := newServer(let)
	guarded := guard.Serve(server, nil)
	unguarded := newServer(let)
	get := func(*http.Request) *mcp.Server { return unguarded }
	plain := mcpguard.Eras(mcp.NewStreamableHTTPHandler(get, nil),
		mcp.NewStreamableHTTPHandler(get, &mcp.StreamableHTTPOptions{Stateless: true, PropagateRequestCancellation: true}))
	token, err := mint.token("conformance", "s-conformance", time.Now().Add(time.Hour))
	if err != nil {
		return err
	}
	signed := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r = r.Clone(r.Context())
		r.Header.Set("Authorization", "Bearer "+token)
		guarded.ServeHTTP(w, r)
	})

	agents, err := newA2A(f.enforcer, verifier, let)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, agents.guard.Close()) }()
	defer open()

	seen := new(mirror)
	at := addresses{Keys: keys}
	var rpc, rest, card string
	var cards http.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h, err := agents.cards(card, rpc, rest) // these are known once all listen
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		h.ServeHTTP(w, r)
	})
	for _, s := range []struct {
		url     *string
		handler http.Handler
	}{
		{&at.Guarded, guarded}, {&at.Signed, signed}, {&at.Plain, plain}, {&at.Control, control(f, mint, seen, open)},
		{&rpc, agents.rpc}, {&rest, http.StripPrefix("/mcp", agents.rest)}, {&card, agents.upstream}, {&at.A2A, cards},
		{&at.PlainA2A, unguardedAgent(let)}, {&at.Mirror, seen},
	} {
		l, err := new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0")
		if err != nil {
			return err
		}
		srv := &http.Server{Handler: s.handler, ReadHeaderTimeout: 10 * time.Second}
		done := make(chan struct{})
		go func() { defer close(done); _ = srv.Serve(l) }() // until Close
		defer func() { _ = srv.Close(); <-done }()
		*s.url = "http://" + l.Addr().String() + "/mcp"
	}
	if err := json.NewEncoder(out).Encode(at); err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, in)
	return err
}

// control is the runner's way to tokens and decisions. It listens on loopback
// and lives for one run.
func control(f *fabric, m *mint, seen *mirror, open func()) http.Handler {
	type request struct {
		User    string `json:"user"`
		Session string `json:"session"`
		// Kind and Value are what a decision names; Name is an enforcer's.
		Kind  string `json:"kind"`
		Value string `json:"value"`
		Name  string `json:"name"`
	}
	handle := func(do func(context.Context, request) (any, error)) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			var req request
			if err := json.NewDecoder(io.LimitReader(r.Body, 1<<16)).Decode(&req); err != nil {
				http.Error(w, err.Error(), http.StatusBadRequest)
				return
			}
			answer, err := do(r.Context(), req)
			if err != nil {
				http.Error(w, err.Error(), http.StatusInternalServerError)
				return
			}
			_ = json.NewEncoder(w).Encode(answer) // the runner may have gone
		}
	}
	mux := http.NewServeMux()
	mux.Handle("POST /mcp/token", handle(func(_ context.Context, r request) (any, error) {
		return m.token(r.User, r.Session, time.Now().Add(time.Hour))
	}))
	mux.Handle("POST /mcp/revoke", handle(func(ctx context.Context, r request) (any, error) {
		return true, f.revoke(ctx, r.Session)
	}))
	for op, path := range map[authority.Operation]string{authority.Suspend: "suspend", authority.Resume: "resume"} {
		mux.Handle("POST /mcp/"+path, handle(func(ctx context.Context, r request) (any, error) {
			return true, f.decide(ctx, op, r.Kind, "", r.Value)
		}))
	}
	mux.Handle("POST /mcp/enroll", handle(func(ctx context.Context, r request) (any, error) {
		return f.enroll(ctx, r.Name)
	}))
	mux.Handle("POST /mcp/mirrored", handle(func(context.Context, request) (any, error) {
		return seen.seen.Load(), nil
	}))
	mux.Handle("POST /mcp/release", handle(func(context.Context, request) (any, error) {
		open()
		return true, nil
	}))
	return mux
}

// mirror answers with the request as it came, and counts.
type mirror struct{ seen atomic.Int64 }

func (m *mirror) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	m.seen.Add(1)
	body, err := io.ReadAll(io.LimitReader(r.Body, 1<<20))
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(map[string]any{ // the client may have gone
		"method": r.Method, "uri": r.RequestURI, "header": r.Header, "body": string(body),
	})
}

// mint is the token issuer.
type mint struct{ signer jose.Signer }

func newMint(key *ecdsa.PrivateKey) (*mint, error) {
	s, err := jose.NewSigner(
		jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: key, KeyID: "k1"}},
		(&jose.SignerOptions{}).WithType("at+jwt"))
	return &mint{s}, err
}

func (m *mint) token(user, sid string, expires time.Time) (string, error) {
	return jwt.Signed(m.signer).Claims(map[string]any{
		"iss": issuer, "aud": resource, "sub": user, "sid": sid, "jti": rand.Text(), "client_id": "interop",
		"iat": time.Now().Unix(), "auth_time": time.Now().Unix(), "exp": expires.Unix(),
	}).Serialize()
}
