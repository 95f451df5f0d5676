package natsfeed_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"log/slog"
	"math/big"
	"net"
	"net/url"
	"testing"
	"time"

	"github.com/interlock-fabric/interlock/internal/broker"
	"github.com/interlock-fabric/interlock/internal/feedtest"
	"github.com/interlock-fabric/interlock/pkg/natsfeed"
	"github.com/interlock-fabric/interlock/pkg/session"
)

func selfSigned(t testing.TB) (tls.Certificate, string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	must(t, err)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key},
		string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}

func TestTLS(t *testing.T) {
	cert, ca := selfSigned(t)
	_, otherCA := selfSigned(t)
	_, authority := newUser(t)
	seed, pub := newUser(t)
	start := func(conf *tls.Config) string {
		t.Helper()
		b, err := broker.Start(broker.Options{
			Dir: t.TempDir(), Listen: "127.0.0.1:0", Authority: authority, TLS: conf, RelaxedSync: true,
			Enforcers: []broker.Enforcer{{Name: "a", PublicNKey: pub}},
		})
		must(t, err)
		t.Cleanup(func() { must(t, b.Close()) })
		u, err := url.Parse(b.ClientURL())
		must(t, err)
		return u.Host
	}
	secure := start(&tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS13})
	plain := start(nil)
	for name, tc := range map[string]struct {
		url, ca string
		ok      bool
	}{
		"verified by the enrolment's CA": {"nats://" + secure, ca, true},
		"tls URL":                        {"tls://" + secure, ca, true},
		"another CA":                     {"nats://" + secure, otherCA, false},
		"no CA":                          {"nats://" + secure, "", false},
		"plain on loopback":              {"nats://" + plain, "", true},
		"CA, and a server without TLS":   {"nats://" + plain, ca, false},
		"tls, and a server without TLS":  {"tls://" + plain, "", false},
	} {
		t.Run(name, func(t *testing.T) {
			f, err := natsfeed.Dial(&session.Enrollment{Enforcer: "a",
				NATS: session.NATSAccess{URLs: []string{tc.url}, NKeySeed: seed, CAs: tc.ca}}, &natsfeed.Options{Logger: slog.New(slog.NewTextHandler(t.Output(), nil))})
			must(t, err)
			defer f.Close()
			limit := 10 * time.Second
			if !tc.ok {
				limit = 300 * time.Millisecond
			}
			ctx, cancel := context.WithTimeout(context.Background(), limit)
			defer cancel()
			if err := f.Start(ctx, feedtest.NewRecorder()); (err == nil) != tc.ok {
				t.Errorf("Start: %v", err)
			}
		})
	}
}
