package session_test

import (
	"crypto/ed25519"
	"errors"
	"fmt"
	"log"
	"os"
	"path/filepath"
	"time"

	"github.com/interlock-fabric/interlock/pkg/session"
)

// A decision on a user has a key; so has every caller who acts for that user.
func ExampleNewTenantSecret() {
	acme, err := session.NewTenantSecret(7, "acme", make([]byte, 32)) // 32 random bytes, from the enrolment
	if err != nil {
		log.Fatal(err)
	}
	revoked, err := acme.Key(session.Target{Tenant: "acme", Terms: []session.Term{
		{Kind: session.KindUser, Issuer: "https://idp.example", Value: "alice"},
	}})
	if err != nil {
		log.Fatal(err)
	}
	caller, err := acme.Prepare(session.Identity{
		Tenant: "acme", Issuer: "https://idp.example", User: "alice",
		Actors: []session.Actor{{ID: "spiffe://prod.example/billing-bot"}},
	})
	if err != nil {
		log.Fatal(err)
	}
	for _, k := range caller.Keys() {
		fmt.Println(k.Shape, k == revoked)
	}
	// Output:
	// issuer false
	// user true
	// agent false
	// user+agent false
}

// A frame is believed when a key signed it that the root trusts for it.
func ExampleNewTrust() {
	root, writer := ed25519.NewKeyFromSeed(make([]byte, 32)), ed25519.NewKeyFromSeed(append(make([]byte, 31), 1))
	now := session.InstantOf(time.Date(2026, 11, 2, 9, 0, 0, 0, time.UTC))

	set := session.KeySet{
		Version: 1, Epoch: 1, Issued: now, NotAfter: now.Add(90 * 24 * time.Hour),
		Tenants: []session.Tenant{{ID: 7, Name: "acme"}},
		Keys:    []session.SigningKey{{Public: writer.Public().(ed25519.PublicKey), Use: session.UseWriter}},
	}
	body, err := set.MarshalBody()
	if err != nil {
		log.Fatal(err)
	}
	signed, err := session.Seal(session.TypeKeySet, body, root)
	if err != nil {
		log.Fatal(err)
	}

	trust, err := session.NewTrust(root.Public().(ed25519.PublicKey))
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(trust.Update(signed, now))
	_, err = trust.Update(signed[:len(signed)-1], now)
	fmt.Println(errors.Is(err, session.ErrFrame))
	// Output:
	// true <nil>
	// true
}

func ExampleSeal() {
	key := ed25519.NewKeyFromSeed(make([]byte, 32))
	beat := session.Heartbeat{Epoch: 1, Number: 48213, Mono: time.Hour, Proven: 2 * time.Millisecond}
	wire, err := session.Seal(session.TypeHeartbeat, beat.MarshalBody(), key)
	if err != nil {
		log.Fatal(err)
	}

	frame, err := session.ParseFrame(wire)
	if err != nil {
		log.Fatal(err)
	}
	if err := frame.Verify(key.Public().(ed25519.PublicKey)); err != nil { // an enforcer asks Trust.Writer
		log.Fatal(err)
	}
	got, err := session.UnmarshalHeartbeat(frame.Body)
	fmt.Println(got.Number, got.Proven, err)
	// Output: 48213 2ms <nil>
}

// An enrolment is read from a file that nobody else can read, and prints
// without its secrets.
func ExampleLoadEnrollment() {
	enrolment := session.Enrollment{
		Enforcer:   "mcp-eu-1",
		Root:       ed25519.NewKeyFromSeed(make([]byte, 32)).Public().(ed25519.PublicKey),
		ReceiptKey: ed25519.NewKeyFromSeed(make([]byte, 32)),
		NATS:       session.NATSAccess{URLs: []string{"tls://bus.example:4222"}, NKeySeed: "SU…"},
	}
	if err := enrolment.AddTenant(7, "acme", make([]byte, 32)); err != nil {
		log.Fatal(err)
	}
	secret, err := enrolment.MarshalSecret()
	if err != nil {
		log.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "enrolment")
	if err != nil {
		log.Fatal(err)
	}
	defer func() { _ = os.RemoveAll(dir) }()
	path := filepath.Join(dir, "mcp-eu-1.json")

	if err := os.WriteFile(path, secret, 0o600); err != nil {
		log.Fatal(err)
	}
	fmt.Println(session.LoadEnrollment(path))
	if err := os.Chmod(path, 0o644); err != nil {
		log.Fatal(err)
	}
	_, err = session.LoadEnrollment(path)
	fmt.Println(errors.Is(err, os.ErrPermission))
	// Output:
	// enforcer mcp-eu-1 <nil>
	// true
}
