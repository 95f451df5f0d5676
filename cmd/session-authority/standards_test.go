package main

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// The examples of docs/standards.md, in their order: the token is active, then
// revoked, then its user.
func TestTheStandardsExamplesWork(t *testing.T) {
	doc, err := os.ReadFile("../../docs/standards.md")
	if err != nil {
		t.Fatal(err)
	}
	var commands []string
	for _, part := range strings.Split(string(doc), "```sh\n")[1:] {
		command, _, _ := strings.Cut(part, "```")
		commands = append(commands, command)
	}
	if len(commands) != 3 {
		t.Fatalf("%d examples", len(commands))
	}
	secret := strings.Repeat("c", 32)
	path := filepath.Join(t.TempDir(), "idp.secret")
	if err := os.WriteFile(path, []byte(secret), 0o600); err != nil {
		t.Fatal(err)
	}
	s := startServed(t, "clients: [{id: idp, secret_file: "+path+", role: issuer, tenants: [acme]}]\n")
	run := func(command, token string) (string, error) {
		cmd := exec.Command("sh", "-c", command)
		cmd.Env = append(os.Environ(), "AUTHORITY="+s.url, "SECRET="+secret, "TOKEN="+token, "CURL_CA_BUNDLE="+s.pki.path("ca.pem"))
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	mint := func(id string) string {
		return s.login.token("alice", nil, map[string]any{"iss": idp, "aud": "https://tools.example/mcp", "jti": id, "sid": "s-1", "auth_time": time.Now().Add(-time.Minute).Unix()})
	}
	active := func(token string) bool {
		var out string
		for deadline := time.Now().Add(30 * time.Second); ; {
			var err error
			if out, err = run(commands[0], token); err == nil {
				break
			}
			// Its state may not be fresh yet.
			if !strings.Contains(out, "temporarily_unavailable") || time.Now().After(deadline) {
				t.Fatalf("%v: %s", err, out)
			}
		}
		var answer struct{ Active bool }
		if err := json.Unmarshal([]byte(out), &answer); err != nil {
			t.Fatal(out)
		}
		return answer.Active
	}
	first, second := mint("t-1"), mint("t-2")
	if !active(first) || !active(second) {
		t.Fatal("not active to begin with")
	}
	if out, err := run(commands[1], first); err != nil || active(first) || !active(second) {
		t.Errorf("after the revocation of a token: %v %s", err, out)
	}
	if out, err := run(commands[2], ""); err != nil || active(second) {
		t.Errorf("after the revocation of the user: %v %s", err, out)
	}
	if strings.Contains(s.log.String(), secret) || strings.Contains(s.log.String(), first) {
		t.Error("a secret or a token is in the log")
	}
}
