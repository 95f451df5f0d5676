package main

import (
	"context"
	"crypto/tls"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/interlock-fabric/interlock/pkg/authority"
)

// hangUp has the program read its files again, and returns how that is logged.
func (s *served) hangUp() string {
	s.Helper()
	lines := func() (out []string) {
		for line := range strings.Lines(s.log.String()) {
			if strings.Contains(line, "the files are") {
				out = append(out, line)
			}
		}
		return out
	}
	before := len(lines())
	s.hup()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(30 * time.Second); ; <-tick.C {
		if now := lines(); len(now) > before {
			return now[len(now)-1]
		}
		if time.Now().After(deadline) {
			s.Fatalf("nothing is said of the signal:\n%s", s.log)
		}
	}
}

// edit changes the access file.
func (s *served) edit(old, with string) {
	s.Helper()
	file := filepath.Join(s.dir, "access.yaml")
	b, err := os.ReadFile(file)
	if err != nil {
		s.Fatal(err)
	}
	if !strings.Contains(string(b), old) {
		s.Fatalf("the file does not have %q", old)
	}
	if err := os.WriteFile(file, []byte(strings.ReplaceAll(string(b), old, with)), 0o600); err != nil {
		s.Fatal(err)
	}
}

// follow watches, and returns a channel that is closed when the stream has ended.
func (s *served) follow(c caller) (ended chan struct{}) {
	s.Helper()
	ctx, cancel := context.WithTimeout(s.Context(), 50*time.Second)
	s.Cleanup(cancel)
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.url+"/v1/watch", nil)
	if err != nil {
		s.Fatal(err)
	}
	if c.token != "" {
		req.Header.Set("Authorization", "Bearer "+c.token)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		s.Fatal(err)
	}
	if resp.StatusCode != 200 {
		s.Fatal(resp.Status)
	}
	ended = make(chan struct{})
	go func() {
		defer close(ended)
		defer resp.Body.Close()
		for b := make([]byte, 1024); ; {
			if _, err := resp.Body.Read(b); err != nil {
				return
			}
		}
	}()
	s.Cleanup(func() { cancel(); <-ended })
	return ended
}

func over(ended chan struct{}) bool {
	select {
	case <-ended:
		return true
	default:
		return false
	}
}

// The file of who may is read again: whoever is taken out is out, with the stream
// that he has open, and nobody else's is; a bad file changes nothing.
func TestWhoMayIsReadAgain(t *testing.T) {
	s := startServed(t, "")
	s.pki.issue("alice", "spiffe://corp/ops/alice")
	alice, ann, bob := caller{http: s.pki.client("alice")}, s.as("ann", "viewer-acme"), s.as("bob", "auditor-acme")
	aliceSees, annSees, bobSees := s.follow(alice), s.follow(ann), s.follow(bob)
	status := func(c caller) int { code, _, _ := s.do(c, "GET", "/v1/status", ""); return code }

	for what, change := range map[string][2]string{
		"an unknown key": {"audience:", "audiance:"},
		"no such CA":     {s.pki.path("ca.pem"), s.pki.path("none.pem")},
	} {
		s.edit(change[0], change[1])
		if said := s.hangUp(); !strings.Contains(said, "still is") {
			t.Errorf("%s: %s", what, said)
		}
		s.edit(change[1], change[0])
		if status(alice) != 200 || status(ann) != 200 || over(aliceSees) || over(annSees) {
			t.Errorf("%s changed something", what)
		}
	}

	// Ann's role is another's now, and alice's certificate nobody's.
	s.edit("{claim: groups, value: viewer-acme,", "{claim: groups, value: lookers-acme,")
	s.edit("uri:spiffe://corp/ops/alice", "uri:spiffe://corp/ops/amy")
	if said := s.hangUp(); !strings.Contains(said, "are in force") {
		t.Fatal(said)
	}
	for _, c := range []caller{alice, ann} {
		if code, _, body := s.do(c, "GET", "/v1/status", ""); code != 403 {
			t.Errorf("%d %s", code, body)
		}
	}
	for _, ended := range []chan struct{}{aliceSees, annSees} {
		select {
		case <-ended:
		case <-time.After(30 * time.Second):
			t.Error("a stream goes on")
		}
	}
	if status(bob) != 200 || over(bobSees) || status(s.as("carl", "lookers-acme")) != 200 {
		t.Error("somebody else is out, or nobody new is in")
	}

	// It is in the audit what changed, and that the bad files did not.
	var done, refused int
	var page *authority.AuditPage
	for deadline := time.Now().Add(30 * time.Second); ; {
		var err error
		if page, err = s.op.Audit(t.Context(), authority.AuditQuery{Kind: authority.AuditAuthority}); err != nil {
			t.Fatal(err)
		}
		done, refused = 0, 0
		for _, r := range page.Records {
			switch all := strings.Join(r.Targets, "\n"); {
			case r.Action != "reload":
			case r.Outcome == authority.OutcomeRefused && r.Error != "":
				refused++
			case strings.Contains(all, "withdrawn: commander in * to certificate uri:spiffe://corp/ops/alice") && strings.Contains(all, "granted: viewer in acme to groups lookers-acme"):
				done++
			}
		}
		// The authority does not wait for its own records to be stored.
		if done >= 1 && refused >= 2 || time.Now().After(deadline) {
			break
		}
	}
	if done != 1 || refused != 2 {
		t.Errorf("%d reloads and %d refused in the audit: %+v", done, refused, page.Records)
	}
}

// The API's certificate, and the CA of the clients', are read again, for
// connections that are open too.
func TestCertificatesAreReadAgain(t *testing.T) {
	s := startServed(t, "")
	s.pki.issue("alice", "spiffe://corp/ops/alice")
	alice := caller{http: s.pki.client("alice")}
	serial := func() string {
		d := tls.Dialer{Config: s.plain.Transport.(*http.Transport).TLSClientConfig.Clone()}
		conn, err := d.DialContext(t.Context(), "tcp", strings.TrimPrefix(s.url, "https://"))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		return conn.(*tls.Conn).ConnectionState().PeerCertificates[0].SerialNumber.String()
	}
	if code, _, _ := s.do(alice, "GET", "/v1/status", ""); code != 200 {
		t.Fatal(code)
	}
	first := serial()
	s.pki.issue("server", "")
	if said := s.hangUp(); !strings.Contains(said, "are in force") || serial() == first {
		t.Errorf("the certificate is still the first one: %s", said)
	}
	second := serial()
	if err := os.WriteFile(s.pki.path("server.pem"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if said := s.hangUp(); !strings.Contains(said, "still is") || serial() != second {
		t.Errorf("a bad certificate: %s", said)
	}
	s.pki.issue("server", "")
	// Her connection is from when her certificate was good.
	other := newPKI(t)
	s.edit(s.pki.path("ca.pem"), other.path("ca.pem"))
	if said := s.hangUp(); !strings.Contains(said, "are in force") {
		t.Fatal(said)
	}
	if code, _, body := s.do(alice, "GET", "/v1/status", ""); code != 401 {
		t.Errorf("%d %s", code, body)
	}
	if code, _, _ := s.do(s.as("v", "viewer-all"), "GET", "/v1/status", ""); code != 200 {
		t.Error("a token is not good any more")
	}
}
