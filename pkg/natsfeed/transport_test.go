package natsfeed

import (
	"testing"

	"github.com/interlock-fabric/interlock/pkg/session"
)

// TestTLSIsDemandedOutsideLoopback: without it an enforcer would give what it
// hears, and hear it from, whoever sits between.
func TestTLSIsDemandedOutsideLoopback(t *testing.T) {
	for _, tc := range []struct {
		urls   []string
		secure bool
	}{
		{[]string{"nats://127.0.0.1:4222"}, false},
		{[]string{"nats://[::1]:4222", "nats://localhost:1"}, false},
		{[]string{"nats://[::ffff:127.0.0.1]:4222"}, false},
		{[]string{"tls://127.0.0.1:4222"}, true},
		{[]string{"nats://10.0.0.1:4222"}, true},
		{[]string{"nats://bus.internal:4222"}, true},
		{[]string{"nats://localhost.evil.example:4222"}, true},
		{[]string{"nats://127.0.0.1.evil.example:4222"}, true},
		{[]string{"nats://0.0.0.0:4222"}, true},
		{[]string{"nats://127.0.0.1:4222", "nats://10.0.0.1:4222"}, true},
	} {
		c, err := transport(session.NATSAccess{URLs: tc.urls})
		if err != nil {
			t.Fatal(err)
		}
		if (c != nil) != tc.secure {
			t.Errorf("%v: TLS %v, want %v", tc.urls, c != nil, tc.secure)
		}
		if c != nil && c.InsecureSkipVerify {
			t.Errorf("%v: not verified", tc.urls)
		}
	}
}
