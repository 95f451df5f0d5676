package api

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

// What may kill gets a commander's place where all others are taken.
func TestUrgent(t *testing.T) {
	for target, want := range map[string]bool{
		"POST /v1/decisions": true, "POST /v1/proposals/p00-k3vq2a/approve": true, "POST /v1/restores/r-5f0c1a2290d3be71/abort": true,
		"GET /v1/restores": false, "GET /v1/decisions": false, "POST /v1/explain": false,
	} {
		method, path, _ := strings.Cut(target, " ")
		if got := urgent(httptest.NewRequest(method, path, http.NoBody)); got != want {
			t.Errorf("%s: %t", target, got)
		}
	}
}
