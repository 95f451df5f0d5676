package gateway

import (
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"
)

// BenchmarkProxy measures a small tool call with a token that has been seen, to
// the same upstream through Go's plain reverse proxy and through this one, in
// turns, so that both meet the same machine. added-p50-% and added-p99-% are what
// ours takes more.
func BenchmarkProxy(b *testing.B) {
	w := newWorld(b)
	up := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		w.Header().Set("Content-Type", "application/json")
		_, _ = io.WriteString(w, `{"jsonrpc":"2.0","id":7,"result":{"content":[{"type":"text","text":"hello"}]}}`)
	}))
	defer up.Close()
	g := w.start(w.load(routeTo("mcp", "/mcp", up.URL, "")), Proxy)
	target, err := url.Parse(up.URL)
	must(b, err)
	tr := &http.Transport{MaxIdleConnsPerHost: 256}
	defer tr.CloseIdleConnections()
	plain := httptest.NewServer(&httputil.ReverseProxy{Transport: tr, Rewrite: func(r *httputil.ProxyRequest) {
		r.SetURL(target)
		r.SetXForwarded()
	}})
	defer plain.Close()
	token := w.token("ann", "s-ann")
	body := toolCall("echo")
	client := &http.Transport{}
	defer client.CloseIdleConnections()
	call := func(url string) time.Duration {
		req, err := http.NewRequestWithContext(b.Context(), http.MethodPost, url, strings.NewReader(body))
		must(b, err)
		req.Header.Set("Authorization", "Bearer "+token)
		req.Header.Set("Content-Type", "application/json")
		began := time.Now()
		resp, err := client.RoundTrip(req)
		must(b, err)
		_, err = io.Copy(io.Discard, resp.Body)
		must(b, err)
		resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			b.Fatal(resp.Status)
		}
		return time.Since(began)
	}
	urls := []string{plain.URL + "/mcp", g.url() + "/mcp"}
	took := make([][]time.Duration, 2)
	for range 200 {
		call(urls[0])
		call(urls[1])
	}
	for i := 0; b.Loop(); i++ {
		// First the one, then the other first.
		for k := range 2 {
			k ^= i & 1
			took[k] = append(took[k], call(urls[k]))
		}
	}
	at := func(k, percent int) float64 {
		slices.Sort(took[k])
		return float64(took[k][min(len(took[k])-1, len(took[k])*percent/100)].Nanoseconds()) / 1000
	}
	for _, p := range []int{50, 99} {
		name := map[int]string{50: "p50", 99: "p99"}[p]
		b.ReportMetric(at(0, p), "plain-"+name+"-us")
		b.ReportMetric(at(1, p), "enforcer-"+name+"-us")
		b.ReportMetric((at(1, p)/at(0, p)-1)*100, "added-"+name+"-%")
	}
	b.ReportMetric(0, "ns/op")
}
