package session

import (
	"bytes"
	"crypto/ed25519"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const testSeed = "SUAOFTHESEEDTHATMUSTNOTBESHOWN"

func testEnrollment(t testing.TB) *Enrollment {
	t.Helper()
	e := &Enrollment{
		Enforcer: "mcp-eu-1", Root: testPublic(9), ReceiptKey: testKey(5),
		NATS: NATSAccess{URLs: []string{"tls://bus.example:4222"}, NKeySeed: testSeed, CAs: "-----BEGIN CERTIFICATE-----\n"},
	}
	for id, name := range []string{1: "acme", 2: "globex"} {
		if id == 0 {
			continue
		}
		if err := e.AddTenant(TenantID(id), name, bytes.Repeat([]byte{0xa0 + byte(id)}, secretLen)); err != nil {
			t.Fatal(err)
		}
	}
	return e
}

func TestEnrollmentComesBack(t *testing.T) {
	e := testEnrollment(t)
	b, err := e.MarshalSecret()
	if err != nil {
		t.Fatal(err)
	}
	got, err := ParseEnrollment(b)
	if err != nil {
		t.Fatal(err)
	}
	if got.Enforcer != e.Enforcer || !got.Root.Equal(e.Root) || !got.ReceiptKey.Equal(e.ReceiptKey) ||
		fmt.Sprint(got.NATS.URLs) != fmt.Sprint(e.NATS.URLs) || got.NATS.NKeySeed != testSeed || got.NATS.CAs != e.NATS.CAs {
		t.Errorf("%+v", got)
	}
	term := Term{Kind: KindUser, Issuer: testIssuer, Value: "alice"}
	for i := range e.Tenants {
		if mustKey(t, got.Tenants[i], term) != mustKey(t, e.Tenants[i], term) {
			t.Errorf("tenant %s has another key", e.Tenants[i])
		}
	}
	if again, err := got.MarshalSecret(); err != nil || !bytes.Equal(again, b) {
		t.Errorf("marshals to something else: %v", err)
	}
}

func TestAnEnrollmentShowsNoSecret(t *testing.T) {
	e := testEnrollment(t)
	var logged bytes.Buffer
	for _, h := range []slog.Handler{slog.NewJSONHandler(&logged, nil), slog.NewTextHandler(&logged, nil)} {
		slog.New(h).Info("enrolled", "enrolment", e, "by value", *e, "nats", e.NATS, "tenant", e.Tenants[0])
	}
	js := func(v any) string {
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	type holder struct {
		E Enrollment
		P *Enrollment
		N NATSAccess
	}
	h := holder{*e, e, e.NATS}
	secrets := []string{testSeed}
	for _, b := range [][]byte{e.ReceiptKey.Seed(), bytes.Repeat([]byte{0xa1}, 8), e.Tenants[0].inner[:8]} {
		decimal := fmt.Sprint(b)
		secrets = append(secrets, hex.EncodeToString(b), base64.StdEncoding.EncodeToString(b)[:10], decimal[1:len(decimal)-1], fmt.Sprintf("%#v", b)[7:40])
	}
	for name, out := range map[string]string{
		"print":        fmt.Sprint(e, *e, h),
		"formats":      fmt.Sprintf("%v %+v %#v %s", e, e, e, e),
		"by value":     fmt.Sprintf("%v %+v %#v %s", *e, *e, *e, *e),
		"in a struct":  fmt.Sprintf("%v %+v %#v", h, h, h),
		"its NATS":     fmt.Sprintf("%v %+v %#v", e.NATS, &e.NATS, e.NATS),
		"JSON":         js(e) + js(*e) + js(h) + js(&h) + js(e.NATS) + js(e.Tenants),
		"logs":         logged.String(),
		"parse errors": parseErrors(t, e),
	} {
		for _, secret := range secrets {
			if strings.Contains(out, secret) {
				t.Errorf("%s: %q shows in %s", name, secret, out)
			}
		}
		if name != "parse errors" && !strings.Contains(out, "mcp-eu-1") && name != "its NATS" {
			t.Errorf("%s: the name does not show in %s", name, out)
		}
	}
}

// parseErrors returns the text of every error that a file with one byte
// overwritten leads to.
func parseErrors(t *testing.T, e *Enrollment) string {
	b, err := e.MarshalSecret()
	if err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	for i := range b {
		spoiled := bytes.Clone(b)
		spoiled[i] = '!'
		if _, err := ParseEnrollment(spoiled); err != nil {
			out.WriteString(err.Error())
			out.WriteByte('\n')
		}
	}
	return out.String()
}

func TestParseEnrollmentRefuses(t *testing.T) {
	valid, err := testEnrollment(t).MarshalSecret()
	if err != nil {
		t.Fatal(err)
	}
	with := func(change func(map[string]any)) []byte {
		var m map[string]any
		if err := json.Unmarshal(valid, &m); err != nil {
			t.Fatal(err)
		}
		change(m)
		b, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	tenant := func(m map[string]any, i int) map[string]any { return m["tenants"].([]any)[i].(map[string]any) }
	for name, tt := range map[string]struct {
		in   []byte
		text string
	}{
		"nothing":                  {nil, "enrolment"},
		"not JSON":                 {[]byte("root: x"), "enrolment"},
		"an unknown field":         {with(func(m map[string]any) { m["extra"] = 1 }), "extra"},
		"an unknown field inside":  {with(func(m map[string]any) { tenant(m, 0)["extra"] = 1 }), "extra"},
		"a later version":          {with(func(m map[string]any) { m["version"] = 2 }), "version 2"},
		"no version":               {with(func(m map[string]any) { delete(m, "version") }), "version 0"},
		"no root":                  {with(func(m map[string]any) { delete(m, "root") }), "root"},
		"a short root":             {with(func(m map[string]any) { m["root"] = "AAAA" }), "root"},
		"no receipt key":           {with(func(m map[string]any) { delete(m, "receipt_key") }), "receipt key"},
		"no name":                  {with(func(m map[string]any) { delete(m, "enforcer") }), "name"},
		"a name that is a subject": {with(func(m map[string]any) { m["enforcer"] = "a.>" }), "name"},
		"no tenants":               {with(func(m map[string]any) { m["tenants"] = []any{} }), "0 tenants"},
		"a tenant without key":     {with(func(m map[string]any) { delete(tenant(m, 0), "key") }), "0"},
		"tenant zero":              {with(func(m map[string]any) { tenant(m, 0)["id"] = 0 }), "number 0"},
		"a tenant's number twice":  {with(func(m map[string]any) { tenant(m, 1)["id"] = 1 }), "twice"},
		"a tenant's name twice":    {with(func(m map[string]any) { tenant(m, 1)["name"] = "acme" }), "twice"},
		"two documents":            {append(bytes.Clone(valid), valid...), "follows"},
		"more than a megabyte":     {append(bytes.Clone(valid), bytes.Repeat([]byte{' '}, maxEnrollmentLen)...), "bytes"},
	} {
		if _, err := ParseEnrollment(tt.in); !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), tt.text) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, change := range map[string]func(*Enrollment){
		"no receipt key": func(e *Enrollment) { e.ReceiptKey = nil },
		"no root":        func(e *Enrollment) { e.Root = nil },
		"no tenants":     func(e *Enrollment) { e.Tenants = nil },
		"no name":        func(e *Enrollment) { e.Enforcer = "" },
		"a tenant that was not added": func(e *Enrollment) {
			e.Tenants = append(e.Tenants, testSecret(t, 9, "other"))
		},
	} {
		e := testEnrollment(t)
		change(e)
		if _, err := e.MarshalSecret(); !errors.Is(err, ErrInvalid) {
			t.Errorf("marshalling with %s: %v", name, err)
		}
	}
}

func TestLoadEnrollmentWantsAPrivateFile(t *testing.T) {
	b, err := testEnrollment(t).MarshalSecret()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "enrolment.json")
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	for mode, ok := range map[fs.FileMode]bool{0o600: true, 0o400: true, 0o640: false, 0o604: false, 0o620: false, 0o601: false, 0o644: false} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		e, err := LoadEnrollment(path)
		switch {
		case ok && (err != nil || e.Enforcer != "mcp-eu-1"):
			t.Errorf("mode %o: %v", mode, err)
		case !ok && (!errors.Is(err, fs.ErrPermission) || !strings.Contains(err.Error(), "chmod 600")):
			t.Errorf("mode %o: %v", mode, err)
		}
	}
	if err := os.Chmod(path, 0o600); err != nil {
		t.Fatal(err)
	}
	link := path + ".link"
	if err := os.Symlink(path, link); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadEnrollment(link); err != nil {
		t.Errorf("through a link: %v", err)
	}
	if _, err := LoadEnrollment(path + ".missing"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
	if err := os.Truncate(path, 1<<30); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadEnrollment(path); !errors.Is(err, ErrInvalid) {
		t.Errorf("a gigabyte: %v", err)
	}
}

func TestEnforcerNames(t *testing.T) {
	for name, want := range map[string]bool{
		"a": true, "mcp-eu_1": true, strings.Repeat("a", 64): true,
		"": false, strings.Repeat("a", 65): false, "A": false, "a.b": false, "*": false, ">": false, "a b": false, "é": false,
	} {
		if ValidEnforcerName(name) != want {
			t.Errorf("%q is valid: %t", name, !want)
		}
	}
}

func FuzzParseEnrollment(f *testing.F) {
	b, err := testEnrollment(f).MarshalSecret()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte(`{"version":1}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		e, err := ParseEnrollment(b)
		if err != nil {
			if !errors.Is(err, ErrInvalid) {
				t.Fatalf("%v does not wrap ErrInvalid", err)
			}
			return
		}
		if len(e.Root) != ed25519.PublicKeySize || len(e.Tenants) == 0 {
			t.Fatalf("%s pins no root or serves nobody", e)
		}
		out, err := e.MarshalSecret()
		if err != nil {
			t.Fatal(err)
		}
		if again, err := ParseEnrollment(out); err != nil || again.Enforcer != e.Enforcer || len(again.Tenants) != len(e.Tenants) {
			t.Fatalf("%s comes back as %v, %v", e, again, err)
		}
	})
}
