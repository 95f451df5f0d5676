package gateway

import (
	"context"
	"net/http"
	"slices"
	"strings"
	"testing"

	auth "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/interlock-fabric/interlock/pkg/authority"
)

const authzBoth = `
routes:
  - {name: tools, protocol: mcp, path: /mcp, resource: "https://tools.example/mcp", low_risk: [search]}
  - {name: files, protocol: http, path: /files, resource: "https://tools.example/mcp"}
authz:
  grpc: {listen: "127.0.0.1:0"}
  strip_token: true
`

func toolCall(name string) string {
	return `{"jsonrpc":"2.0","id":7,"method":"tools/call","params":{"name":"` + name + `","arguments":{}}}`
}

func TestEnvoyExtAuthz(t *testing.T) {
	w := newWorld(t)
	g := w.start(w.load(authzBoth), Authz)
	conn, err := grpc.NewClient(strings.TrimPrefix(g.url(), "http://"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	must(t, err)
	defer conn.Close()
	client := auth.NewAuthorizationClient(conn)
	check := func(method, path, token, body string, headers ...string) *auth.CheckResponse {
		t.Helper()
		h := map[string]string{":authority": "tools.example", "content-type": "application/json"}
		if token != "" {
			h["authorization"] = "Bearer " + token
		}
		for i := 0; i < len(headers); i += 2 {
			h[headers[i]] = headers[i+1]
		}
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		res, err := client.Check(ctx, &auth.CheckRequest{Attributes: &auth.AttributeContext{Request: &auth.AttributeContext_Request{
			Http: &auth.AttributeContext_HttpRequest{Method: method, Path: path, Host: "tools.example", Scheme: "https", Headers: h, Body: body},
		}}})
		must(t, err)
		return res
	}
	header := func(res *auth.CheckResponse, name string) string {
		for _, o := range append(res.GetOkResponse().GetHeaders(), res.GetDeniedResponse().GetHeaders()...) {
			if strings.EqualFold(o.Header.Key, name) {
				return o.Header.Value
			}
		}
		return ""
	}
	ann := w.token("ann", "s-ann")

	res := check("POST", "/mcp?x=1", ann, toolCall("echo"), "interlock-subject", "root", "interlock_roles", "admin")
	if res.Status.Code != int32(codes.OK) || header(res, "Interlock-Subject") != "ann" || header(res, "Interlock-Session") != "s-ann" {
		t.Fatal(res)
	}
	removed := res.GetOkResponse().HeadersToRemove
	if !slices.Contains(removed, "authorization") || !slices.Contains(removed, "interlock_roles") {
		t.Errorf("removed are %v", removed)
	}
	res = check("POST", "/mcp", "", toolCall("echo"))
	if res.Status.Code != int32(codes.Unauthenticated) || res.GetDeniedResponse().Status.Code != 401 || !strings.HasPrefix(header(res, "WWW-Authenticate"), "Bearer resource_metadata=") {
		t.Error(res)
	}
	for name, body := range map[string]string{"batch": "[" + toolCall("echo") + "]", "twice": strings.Replace(toolCall("a"), `"name":"a"`, `"name":"a","name":"b"`, 1)} {
		if res := check("POST", "/mcp", ann, body); res.GetDeniedResponse().GetStatus().GetCode() != 400 {
			t.Errorf("%s: %v", name, res)
		}
	}
	for path, status := range map[string]int32{"/nowhere": 403, "/files/../mcp": 400, "/files%2f..": 400} {
		if res := check("GET", path, ann, ""); int32(res.GetDeniedResponse().GetStatus().GetCode()) != status {
			t.Errorf("%s: %v", path, res)
		}
	}
	if res := check("POST", "/mcp", ann, toolCall("echo"), "x-envoy-auth-partial-body", "true"); res.Status.Code == int32(codes.OK) {
		t.Error("half a message was allowed")
	}
	// Without the body, the headers that the server holds against it count.
	w.decide(authority.Suspend, "tool", "echo")
	eventually(t, "the tool is denied", func() bool { return check("POST", "/mcp", ann, toolCall("echo")).Status.Code != int32(codes.OK) })
	modernHeaders := []string{"mcp-protocol-version", modern, "mcp-method", "tools/call", "mcp-name"}
	if res := check("POST", "/mcp", ann, "", append(modernHeaders, "echo")...); res.GetDeniedResponse().GetStatus().GetCode() != 403 {
		t.Error(res)
	}
	if res := check("POST", "/mcp", ann, "", append(modernHeaders, "other")...); res.Status.Code != int32(codes.OK) {
		t.Error(res)
	}
	// A caller with reduced rights cannot hide what it asks for.
	w.decide(authority.Reduce, "session", "s-ann")
	eventually(t, "rights are reduced", func() bool { return check("POST", "/mcp", ann, toolCall("delete")).Status.Code != int32(codes.OK) })
	if res := check("POST", "/mcp", ann, toolCall("search")); res.Status.Code != int32(codes.OK) {
		t.Error(res)
	}
	if res := check("POST", "/mcp", ann, ""); res.Status.Code == int32(codes.OK) {
		t.Error("allowed without a body")
	}
	w.decide(authority.Revoke, "session", "s-ann")
	eventually(t, "the caller is denied", func() bool {
		res := check("GET", "/files/a", ann, "")
		return res.GetDeniedResponse().GetStatus().GetCode() == 401 && strings.Contains(header(res, "WWW-Authenticate"), "invalid_token") &&
			strings.Contains(res.GetDeniedResponse().Body, "INC-142")
	})
	if res := check("GET", "/files/a", w.token("bob", "s-bob"), ""); res.Status.Code != int32(codes.OK) {
		t.Error(res)
	}
}

func TestForwardAuth(t *testing.T) {
	w := newWorld(t)
	for dialect, prefix := range map[string]string{"x-forwarded": "X-Forwarded-", "x-original": "X-Original-"} {
		t.Run(dialect, func(t *testing.T) {
			c := w.load(strings.Replace(authzBoth, "  grpc: {listen: \"127.0.0.1:0\"}\n  strip_token: true", "  http: {listen: \"127.0.0.1:0\"}\n  forward_headers: "+dialect, 1))
			g, err := Start(Options{Config: c, Kind: Authz})
			must(t, err)
			defer g.Shutdown(context.Background())
			eventually(t, "ready", func() bool { return g.unready() == "" })
			ask := func(token, uri string, more ...string) *http.Response {
				t.Helper()
				return post(t, g.url()+"/", token, "", func(r *http.Request) {
					r.Method, r.Body = http.MethodGet, nil
					r.Header.Set(prefix+"Method", "GET")
					r.Header.Set(prefix+"Uri", uri)
					r.Header.Set(prefix+"Host", "tools.example")
					for i := 0; i < len(more); i += 2 {
						r.Header.Add(more[i], more[i+1])
					}
				})
			}
			sid := "s-" + dialect
			ann := w.token("ann", sid)
			resp := ask(ann, "/files/a?b=c", "Interlock-Subject", "root")
			if actors, there := resp.Header["Interlock-Actors"]; resp.StatusCode != http.StatusOK || resp.Header.Get("Interlock-Subject") != "ann" || !there || actors[0] != "" {
				t.Fatal(resp.Status, resp.Header)
			}
			if resp := ask("", "/files/a"); resp.StatusCode != 401 || resp.Header.Get("Www-Authenticate") == "" {
				t.Error(resp.Status)
			}
			if resp := ask(ann, "/nowhere"); resp.StatusCode != 403 {
				t.Error(resp.Status)
			}
			// The client's own word on what it asks for does not count.
			other := map[string]string{"X-Forwarded-": "X-Original-", "X-Original-": "X-Forwarded-"}[prefix]
			if resp := ask(ann, "/nowhere", other+"Uri", "/files/a", other+"Method", "GET", other+"Host", "tools.example"); resp.StatusCode != 403 {
				t.Error(resp.Status)
			}
			if resp := ask(ann, "/nowhere", prefix+"Uri", "/files/a"); resp.StatusCode != 403 {
				t.Error(resp.Status)
			}
			if resp := ask(ann, "/files/a", "Interlock_subject", "root"); resp.StatusCode != 403 {
				t.Error(resp.Status)
			}
			for _, uri := range []string{"http:files", "/files/a#/x", "//files/a", "/files/..;/a"} {
				if resp := ask(ann, uri); resp.StatusCode != 403 {
					t.Errorf("%s: %s", uri, resp.Status)
				}
			}
			if resp := ask(ann, "/files/a", "X-Http-Method-Override", "DELETE"); resp.StatusCode != 403 {
				t.Error(resp.Status)
			}
			w.decide(authority.Revoke, "session", sid)
			eventually(t, "denied", func() bool { return ask(ann, "/files/a").StatusCode == 401 })
		})
	}
}
