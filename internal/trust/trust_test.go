package trust

import (
	"bytes"
	"crypto/ed25519"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/interlock-fabric/interlock/pkg/session"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const t0 = session.Instant(1_790_000_000_000)

func initStore(t *testing.T, tenants ...string) (*Store, *Root) {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "keys")
	s, err := Init(InitOptions{Dir: dir, Tenants: tenants}, t0)
	if err != nil {
		t.Fatal(err)
	}
	r, err := LoadRoot(filepath.Join(dir, RootFile))
	if err != nil {
		t.Fatal(err)
	}
	return s, r
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func sign(t *testing.T, key ed25519.PrivateKey) session.Frame {
	t.Helper()
	b, err := session.Seal(session.TypeBatch, []byte("body"), key)
	must(t, err)
	f, err := session.ParseFrame(b)
	must(t, err)
	return f
}

func TestInitMakesPrivateFilesAndOverwritesNothing(t *testing.T) {
	s, r := initStore(t)
	info, err := os.Stat(s.dir)
	must(t, err)
	if info.Mode().Perm() != 0o700 {
		t.Errorf("directory: %v", info.Mode())
	}
	files, err := os.ReadDir(s.dir)
	must(t, err)
	if len(files) != 8 { // the seven of the doc comment and the lock
		t.Errorf("%d files: %v", len(files), files)
	}
	for _, f := range files {
		info, err := f.Info()
		must(t, err)
		if info.Mode() != 0o600 {
			t.Errorf("%s: %v", f.Name(), info.Mode())
		}
	}
	if _, err := Init(InitOptions{Dir: s.dir}, t0); !errors.Is(err, ErrExists) {
		t.Errorf("second Init: %v", err)
	}
	again, err := LoadRoot(filepath.Join(s.dir, RootFile))
	must(t, err)
	if !again.Public().Equal(r.Public()) {
		t.Error("the root was replaced")
	}
	ks := s.KeySet()
	if ks.Version != 1 || ks.Epoch != 1 || ks.Issued != t0 || ks.NotAfter != t0.Add(DefaultValidity) {
		t.Errorf("key set %+v", ks)
	}
	if len(ks.Tenants) != 1 || ks.Tenants[0] != (session.Tenant{ID: 1, Name: "default"}) {
		t.Errorf("tenants %v", ks.Tenants)
	}
}

func TestInitWithTheRootElsewhere(t *testing.T) {
	dir, away := t.TempDir(), filepath.Join(t.TempDir(), "stick", "root.key")
	s, err := Init(InitOptions{Dir: dir, RootPath: away, Tenants: []string{"acme", "beta"}, Validity: time.Hour}, t0)
	must(t, err)
	if _, err := os.Stat(filepath.Join(dir, RootFile)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the root key is beside the others: %v", err)
	}
	r, err := LoadRoot(away)
	must(t, err)
	must(t, s.Renew(r, 0, t0+1000))
	if ks := s.KeySet(); ks.Version != 2 || ks.NotAfter != (t0+1000).Add(time.Hour) {
		t.Errorf("renewed: %+v", ks)
	}
	// The other files are gone, the root is not: it is not replaced either.
	if _, err := Init(InitOptions{Dir: t.TempDir(), RootPath: away}, t0); !errors.Is(err, ErrExists) {
		t.Errorf("Init over a root: %v", err)
	}
}

func TestInitRefuses(t *testing.T) {
	for name, o := range map[string]InitOptions{
		"no directory":  {},
		"bad tenant":    {Dir: "x", Tenants: []string{"UPPER"}},
		"twice":         {Dir: "x", Tenants: []string{"a", "a"}},
		"negative time": {Dir: "x", Validity: -1},
	} {
		t.Run(name, func(t *testing.T) {
			t.Chdir(t.TempDir())
			if _, err := Init(o, t0); err == nil {
				t.Error("no error")
			}
			if _, err := os.Stat("x"); !errors.Is(err, fs.ErrNotExist) {
				t.Error("something was written")
			}
		})
	}
}

func TestFilesThatOthersCanReadAreRefused(t *testing.T) {
	s, _ := initStore(t)
	key, err := s.Signer(t0)
	must(t, err)
	for _, path := range []string{
		s.path(tenantsFile), s.path(authorityFile), s.signPath(session.KeyIDOf(key.Public().(ed25519.PublicKey))),
	} {
		for _, mode := range []fs.FileMode{0o640, 0o604, 0o660, 0o602} {
			must(t, os.Chmod(path, mode))
			if _, err := Open(s.dir); !errors.Is(err, fs.ErrPermission) || !strings.Contains(err.Error(), "chmod 600") {
				t.Errorf("%s %v: %v", filepath.Base(path), mode, err)
			}
		}
		must(t, os.Chmod(path, 0o600))
	}
	root := filepath.Join(s.dir, RootFile)
	must(t, os.Chmod(root, 0o644))
	if _, err := LoadRoot(root); !errors.Is(err, fs.ErrPermission) {
		t.Errorf("root: %v", err)
	}
	if _, err := Open(s.dir); err != nil {
		t.Errorf("an authority needs no root key: %v", err)
	}
}

// secrets are all forms in which a secret of the store could show.
func secrets(t *testing.T, s *Store, r *Root) []string {
	t.Helper()
	raw := [][]byte{r.key, r.key.Seed()}
	for _, k := range s.keys {
		raw = append(raw, k, k.Seed())
	}
	for _, tn := range s.tenants {
		raw = append(raw, tn.Key)
	}
	out := []string{s.seed}
	for _, b := range raw {
		out = append(out, string(b), hex.EncodeToString(b), base64.StdEncoding.EncodeToString(b), fmt.Sprint(b))
	}
	return out
}

func TestTornAndForeignFilesAreRefusedWithoutShowingThem(t *testing.T) {
	s, r := initStore(t)
	key, err := s.Signer(t0)
	must(t, err)
	hidden := secrets(t, s, r)
	for _, path := range []string{
		s.path(PublicFile), s.path(keySetFile), s.path(tenantsFile), s.path(authorityFile),
		s.signPath(session.KeyIDOf(key.Public().(ed25519.PublicKey))), filepath.Join(s.dir, RootFile),
	} {
		whole, err := os.ReadFile(path)
		must(t, err)
		for name, b := range map[string][]byte{
			"empty": nil, "torn": whole[:len(whole)/2], "one short": whole[:len(whole)-2],
			"foreign": []byte("{}"), "huge": make([]byte, maxFile+1),
			"garbled": append(append([]byte{}, whole[:len(whole)/2]...), append([]byte("*"), whole[len(whole)/2+1:]...)...),
		} {
			must(t, os.WriteFile(path, b, 0o600))
			_, err := Open(s.dir)
			if filepath.Base(path) == RootFile {
				_, err = LoadRoot(path)
			}
			if err == nil {
				t.Errorf("%s, %s: no error", filepath.Base(path), name)
				continue
			}
			for _, h := range append(hidden, string(whole)) {
				if strings.Contains(err.Error(), h) {
					t.Errorf("%s, %s: the error shows a secret", filepath.Base(path), name)
				}
			}
		}
		must(t, os.WriteFile(path, whole, 0o600))
	}
	if _, err := Open(s.dir); err != nil {
		t.Fatal(err)
	}
	e, _, err := s.Enroll("eu-3", nil, []string{"nats://127.0.0.1:4222"}, "")
	must(t, err)
	for _, v := range []any{s, r, s.tenants, s.tenants[0], e} {
		for _, f := range []string{"%v", "%+v", "%#v", "%s"} {
			text := fmt.Sprintf(f, v)
			for _, h := range append(hidden, e.NATS.NKeySeed) {
				if f == "%#v" && fmt.Sprintf("%T", v) != "*trust.Store" && fmt.Sprintf("%T", v) != "*trust.Root" {
					continue
				}
				if strings.Contains(text, h) {
					t.Errorf("%T prints a secret with %s", v, f)
				}
			}
		}
	}
}

func TestRotationAndWithdrawal(t *testing.T) {
	s, r := initStore(t)
	enforcer, err := session.NewTrust(r.Public())
	must(t, err)
	hear := func() {
		t.Helper()
		if taken, err := enforcer.Update(s.Frame(), t0+1); err != nil || !taken {
			t.Fatalf("key set %d: taken %v, %v", s.KeySet().Version, taken, err)
		}
	}
	hear()
	first, err := s.Signer(t0)
	must(t, err)
	firstID := session.KeyIDOf(first.Public().(ed25519.PublicKey))
	f1 := sign(t, first)

	id, err := s.Rotate(r, t0+1)
	must(t, err)
	second, err := s.Signer(t0)
	must(t, err)
	if session.KeyIDOf(second.Public().(ed25519.PublicKey)) != id || id == firstID {
		t.Fatal("the new key is not the current one")
	}
	f2 := sign(t, second)
	if _, err := enforcer.Writer(&f2, 1, true, t0+1); !errors.Is(err, session.ErrUntrusted) {
		t.Errorf("before it heard: %v", err)
	}
	hear()
	for _, f := range []*session.Frame{&f1, &f2} {
		if _, err := enforcer.Writer(f, 1, true, t0+1); err != nil {
			t.Errorf("after rotation both are trusted: %v", err)
		}
	}

	must(t, s.Withdraw(r, firstID, 1, 7, t0+1))
	hear()
	if _, err := enforcer.Writer(&f1, 7, false, t0+1); err != nil {
		t.Errorf("what it signed before: %v", err)
	}
	if _, err := enforcer.Writer(&f1, 8, false, t0+1); !errors.Is(err, session.ErrUntrusted) {
		t.Errorf("beyond its last number: %v", err)
	}
	if _, err := enforcer.Writer(&f1, 7, true, t0+1); !errors.Is(err, session.ErrUntrusted) {
		t.Errorf("a heartbeat of a withdrawn key: %v", err)
	}
	for name, err := range map[string]error{
		"restored":     s.Withdraw(r, firstID, 1, 9, t0+1),
		"unknown":      s.Withdraw(r, session.KeyID{1}, 1, 1, t0+1),
		"later epoch":  s.Withdraw(r, firstID, 2, 1, t0+1),
		"without one":  s.Withdraw(r, firstID, 0, 1, t0+1),
		"foreign root": func() error { x, _ := NewRoot(); return s.Renew(x, 0, t0) }(),
	} {
		if !errors.Is(err, session.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}

	// A restart finds the same.
	again, err := Open(s.dir)
	must(t, err)
	key, err := again.Signer(t0)
	must(t, err)
	if !key.Equal(second) || again.KeySet().Version != 3 {
		t.Errorf("after restart: key set %d", again.KeySet().Version)
	}
	must(t, s.Withdraw(r, id, 1, 0, t0+1))
	if _, err := s.Signer(t0); !errors.Is(err, ErrNoSigner) {
		t.Errorf("all withdrawn: %v", err)
	}
}

func TestEpochTenantAndEnd(t *testing.T) {
	s, r := initStore(t, "acme")
	before := s.KeySet().Origin(r.Public())
	must(t, s.OpenEpoch(r, t0+1))
	if ks := s.KeySet(); ks.Epoch != 2 || ks.Origin(r.Public()) == before {
		t.Errorf("epoch %d", ks.Epoch)
	}
	id, err := s.AddTenant(r, "beta", t0+1)
	must(t, err)
	if id != 2 {
		t.Errorf("tenant %d", id)
	}
	if _, err := s.AddTenant(r, "beta", t0+1); !errors.Is(err, session.ErrInvalid) {
		t.Errorf("twice: %v", err)
	}
	if _, err := s.AddTenant(r, "Bad Name", t0+1); !errors.Is(err, session.ErrInvalid) {
		t.Errorf("bad name: %v", err)
	}
	have, missing := s.Secrets()
	if len(have) != 2 || len(missing) != 0 || have[1].Name() != "beta" {
		t.Errorf("secrets %v, missing %v", have, missing)
	}

	end := s.KeySet().NotAfter
	if _, err := s.Signer(end); !errors.Is(err, ErrNoSigner) {
		t.Errorf("after the end: %v", err)
	}
	late, err := Open(s.dir)
	must(t, err)
	must(t, late.Renew(r, time.Hour, end+1))
	if _, err := late.Signer(end + 1); err != nil {
		t.Errorf("renewed: %v", err)
	}
	// Times never go back with the machine's clock.
	must(t, late.Renew(r, 0, t0))
	if ks := late.KeySet(); ks.Issued < end || ks.NotAfter <= ks.Issued {
		t.Errorf("issued %s, ends %s", ks.Issued, ks.NotAfter)
	}
	// The first store was not told; it finds out, from disk.
	if newer, err := s.Reload(); err != nil || !newer {
		t.Errorf("Reload: %v, %v", newer, err)
	}
	if s.KeySet().Version != late.KeySet().Version {
		t.Error("stores differ")
	}
}

func TestAcceptTakesOnlyNewerOnesOfTheRoot(t *testing.T) {
	s, r := initStore(t)
	old := s.Frame()
	// Another authority of the deployment, with a copy of the directory.
	dir := t.TempDir()
	must(t, os.CopyFS(dir, os.DirFS(s.dir)))
	for _, f := range []string{keySetFile, tenantsFile, authorityFile, PublicFile, RootFile} {
		must(t, os.Chmod(filepath.Join(dir, f), 0o600))
	}
	keys, err := filepath.Glob(filepath.Join(dir, "*-*.key"))
	must(t, err)
	for _, k := range keys {
		must(t, os.Chmod(k, 0o600))
	}
	other, err := Open(dir)
	must(t, err)

	_, err = s.Rotate(r, t0+1)
	must(t, err)
	_, err = s.AddTenant(r, "beta", t0+1)
	must(t, err)
	if taken, err := other.Accept(s.Frame(), t0+2); err != nil || !taken {
		t.Fatalf("newer: %v, %v", taken, err)
	}
	if taken, err := other.Accept(old, t0+2); err != nil || taken {
		t.Errorf("older: %v, %v", taken, err)
	}
	torn := s.Frame()
	torn[len(torn)-1] ^= 1
	if _, err := other.Accept(torn, t0+2); !errors.Is(err, session.ErrFrame) {
		t.Errorf("bad signature: %v", err)
	}
	// It does not hold the new key: the old one goes on, and the new tenant's is
	// reported missing rather than made up.
	key, err := other.Signer(t0 + 2)
	must(t, err)
	if session.KeyIDOf(key.Public().(ed25519.PublicKey)) != session.KeyIDOf(other.KeySet().Keys[0].Public) {
		t.Error("signs with a key that it has not")
	}
	if have, missing := other.Secrets(); len(have) != 1 || len(missing) != 1 || missing[0] != "beta" {
		t.Errorf("secrets %v, missing %v", have, missing)
	}
	if _, _, err := other.Enroll("x", []string{"beta"}, []string{"nats://127.0.0.1:1"}, ""); err == nil {
		t.Error("enrolled for a tenant without a key")
	}
	again, err := Open(dir)
	must(t, err)
	if again.KeySet().Version != s.KeySet().Version {
		t.Error("what was accepted is not on disk")
	}
	// A key set file that was rolled back under a running store.
	must(t, os.WriteFile(other.path(keySetFile), old, 0o600))
	if _, err := other.Reload(); !errors.Is(err, ErrCorrupt) {
		t.Errorf("rolled back: %v", err)
	}
}

func TestChangesOfTwoProcessesExclude(t *testing.T) {
	s, r := initStore(t)
	var wg sync.WaitGroup
	const stores, each = 4, 5
	for range stores {
		o, err := Open(s.dir)
		must(t, err)
		wg.Go(func() {
			for range each {
				if _, err := o.Rotate(r, t0+1); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if _, err := s.Reload(); err != nil {
		t.Fatal(err)
	}
	if ks := s.KeySet(); ks.Version != 1+stores*each || len(ks.Keys) != 2+stores*each {
		t.Errorf("version %d with %d keys: a change was lost", ks.Version, len(ks.Keys))
	}
}

func TestEnroll(t *testing.T) {
	s, r := initStore(t, "acme", "beta")
	e, entry, err := s.Enroll("eu-3", []string{"beta"}, []string{"tls://bus:4222"}, "ca")
	must(t, err)
	if entry.Name != "eu-3" || len(entry.Tenants) != 1 || entry.Tenants[0] != 2 || !strings.HasPrefix(entry.NKey, "U") {
		t.Errorf("entry %+v", entry)
	}
	if !entry.ReceiptKey.Equal(e.ReceiptKey.Public()) || !e.Root.Equal(r.Public()) {
		t.Error("keys do not match")
	}
	path := filepath.Join(t.TempDir(), "eu-3.json")
	must(t, WriteEnrollment(path, e))
	if err := WriteEnrollment(path, e); !errors.Is(err, fs.ErrExist) {
		t.Errorf("overwrote: %v", err)
	}
	back, err := session.LoadEnrollment(path)
	must(t, err)
	have, _ := s.Secrets()
	target := session.Target{Tenant: "beta", Terms: []session.Term{{Kind: session.KindAgent, Issuer: "https://idp.example", Value: "bot"}}}
	want, err := have[1].Key(target)
	must(t, err)
	got, err := back.Tenants[0].Key(target)
	must(t, err)
	if got != want {
		t.Error("the enforcer derives another key than the authority")
	}
	if all, entry, err := s.Enroll("eu-4", nil, []string{"tls://bus:4222"}, ""); err != nil || len(all.Tenants) != 2 || len(entry.Tenants) != 2 {
		t.Errorf("all tenants: %v", err)
	}
	for name, f := range map[string]func() error{
		"bad name":   func() error { _, _, err := s.Enroll("Eu.*", nil, []string{"u"}, ""); return err },
		"no URL":     func() error { _, _, err := s.Enroll("a", nil, nil, ""); return err },
		"no tenant":  func() error { _, _, err := s.Enroll("a", []string{"nobody"}, []string{"u"}, ""); return err },
		"twice":      func() error { _, _, err := s.Enroll("a", []string{"acme", "acme"}, []string{"u"}, ""); return err },
		"long names": func() error { _, _, err := s.Enroll(strings.Repeat("a", 999), nil, []string{"u"}, ""); return err },
	} {
		if err := f(); !errors.Is(err, session.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestSealingKeys: enforcers seal to the newest; what was sealed to the others is
// read as long as their private halves are here.
func TestSealingKeys(t *testing.T) {
	s, r := initStore(t)
	first, ok := s.KeySet().AuditKey()
	if !ok {
		t.Fatal("Init makes none")
	}
	id, err := s.RotateAudit(r, t0+1)
	must(t, err)
	if k, ok := s.KeySet().AuditKey(); !ok || session.KeyIDOf(k) != id || bytes.Equal(k, first) {
		t.Errorf("sealed to %x, want the new one", k)
	}
	if _, err := s.Signer(t0 + 1); err != nil {
		t.Errorf("Signer: %v", err)
	}
	must(t, s.Withdraw(r, session.KeyIDOf(first), 1, 0, t0+1))
	again, err := Open(s.dir)
	must(t, err)
	for _, k := range [][]byte{first, id[:]} {
		want := session.KeyID(k[:8])
		if len(k) > 8 {
			want = session.KeyIDOf(k)
		}
		if key, ok := again.Sealing(want); !ok || session.KeyIDOf(key.PublicKey().Bytes()) != want {
			t.Errorf("the private half of %s is not here", want)
		}
	}
	// A key that signs opens nothing, and the other way round.
	if _, ok := again.Sealing(session.KeyIDOf(again.KeySet().Keys[0].Public)); ok {
		t.Error("a signing key opens reports")
	}
	// One file in the place of another is noticed.
	raw, err := os.ReadFile(s.auditPath(id))
	must(t, err)
	must(t, os.WriteFile(s.auditPath(session.KeyIDOf(first)), raw, 0o600))
	if _, err := Open(s.dir); !errors.Is(err, ErrCorrupt) {
		t.Errorf("another key's file: %v", err)
	}
	raw, err = os.ReadFile(s.signPath(session.KeyIDOf(s.KeySet().Keys[0].Public)))
	must(t, err)
	must(t, os.WriteFile(s.auditPath(session.KeyIDOf(first)), raw, 0o600))
	if _, err := Open(s.dir); !errors.Is(err, ErrCorrupt) {
		t.Errorf("a signing key's file: %v", err)
	}
	// Without it, the reports are another authority's to read.
	must(t, os.Remove(s.auditPath(session.KeyIDOf(first))))
	again, err = Open(s.dir)
	must(t, err)
	if _, ok := again.Sealing(session.KeyIDOf(first)); ok {
		t.Error("a key that is not here")
	}
}
