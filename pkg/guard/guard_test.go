package guard_test

import (
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/interlock-fabric/interlock/internal/guardtest"
	"github.com/interlock-fabric/interlock/pkg/authority"
	"github.com/interlock-fabric/interlock/pkg/denial"
	"github.com/interlock-fabric/interlock/pkg/guard"
	"github.com/interlock-fabric/interlock/pkg/session"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// upstream counts what reaches it and streams until it is let go.
type upstream struct {
	*httptest.Server
	reached chan string
	let     chan struct{}
}

func newUpstream(t *testing.T) *upstream {
	u := &upstream{reached: make(chan string, 64), let: make(chan struct{})}
	u.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		u.reached <- r.URL.Path
		_, _ = io.WriteString(w, "begun")
		if r.URL.Path == "/stream" {
			w.(http.Flusher).Flush()
			select {
			case <-u.let:
			case <-r.Context().Done():
			}
		}
	}))
	t.Cleanup(func() { close(u.let); u.CloseClientConnections(); u.Close() })
	return u
}

func (u *upstream) client(t *testing.T, tr *guard.Transport) *http.Client {
	base := &http.Transport{}
	t.Cleanup(base.CloseIdleConnections)
	tr.Base = base
	return &http.Client{Transport: tr}
}

func ask(t *testing.T, c *http.Client, url string, caller *session.Prepared) (*http.Response, error) {
	t.Helper()
	req, err := http.NewRequestWithContext(guard.NewContext(t.Context(), caller), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	return c.Do(req)
}

func prepare(t *testing.T, f *guardtest.Fabric, user string) *session.Prepared {
	t.Helper()
	p, err := f.Enforcer.Prepare(f.Identity(t, user, "s-"+user))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// The mechanism is the binding of each request.
func TestOutgoingCallsEndWithTheirCaller(t *testing.T) {
	f := guardtest.Open(t, 0)
	u := newUpstream(t)
	c := u.client(t, &guard.Transport{Enforcer: f.Enforcer})
	ann, bob := prepare(t, f, "ann"), prepare(t, f, "bob")

	read := func(caller *session.Prepared) (first chan struct{}, end chan error) {
		resp, err := ask(t, c, u.URL+"/stream", caller)
		if err != nil {
			t.Fatal(err)
		}
		guardtest.Within(t, "the call arrives", u.reached)
		first, end = make(chan struct{}), make(chan error, 1)
		go func() {
			defer resp.Body.Close()
			if _, err := io.ReadFull(resp.Body, make([]byte, len("begun"))); err != nil {
				end <- err
			}
			close(first)
			_, err := resp.Body.Read(make([]byte, 1))
			end <- err
		}()
		guardtest.Within(t, "the answer begins", first)
		return first, end
	}
	_, cut := read(ann)
	_, goesOn := read(bob)
	f.On(t, authority.Revoke, "session", "s-ann")
	guardtest.DeniedAs(t, guardtest.Within(t, "the answer is cut", cut), session.ErrRevoked)
	if _, err := ask(t, c, u.URL+"/next", ann); !errors.Is(err, session.ErrRevoked) {
		t.Fatalf("sent after the revocation: %v", err)
	}
	resp, err := ask(t, c, u.URL+"/other", bob)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if got := guardtest.Within(t, "the bystander's call arrives", u.reached); got != "/other" {
		t.Fatalf("%s reached the upstream", got)
	}
	select {
	case err := <-goesOn:
		t.Fatalf("the bystander's call ended: %v", err)
	default:
	}
	// Its binding ends with the answer, and the fabric is closed after it.
	u.CloseClientConnections()
	if err := guardtest.Within(t, "the bystander's call ends", goesOn); errors.Is(err, session.ErrDenied) {
		t.Error(err)
	}
}

// A connection that has been upgraded ends, too, in both directions.
func TestUpgradedConnectionsEndWithTheirCaller(t *testing.T) {
	f := guardtest.Open(t, 0)
	gone := make(chan struct{})
	u := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		defer close(gone)
		c, rw, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer c.Close()
		_, _ = io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
		_, _ = io.Copy(c, rw) // until the client hangs up
	}))
	defer u.Close()
	base := &http.Transport{}
	defer base.CloseIdleConnections()
	req, err := http.NewRequestWithContext(guard.NewContext(t.Context(), prepare(t, f, "ann")), http.MethodGet, u.URL, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Connection", "Upgrade")
	req.Header.Set("Upgrade", "echo")
	resp, err := (&guard.Transport{Enforcer: f.Enforcer, Base: base}).RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	both := resp.Body.(io.ReadWriter)
	if _, err := io.WriteString(both, "hello"); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(both, make([]byte, len("hello"))); err != nil {
		t.Fatal(err)
	}
	end := make(chan error, 1)
	go func() {
		_, err := both.Read(make([]byte, 1))
		end <- err
	}()
	f.On(t, authority.Revoke, "session", "s-ann")
	guardtest.DeniedAs(t, guardtest.Within(t, "the reader hears of it", end), session.ErrRevoked)
	guardtest.Within(t, "the connection ends", gone)
	_, err = io.WriteString(both, "more")
	guardtest.DeniedAs(t, err, session.ErrRevoked)
}

// The mechanism is that the host's own identity is checked beside the caller's.
func TestOutgoingCallsEndWithTheHostsOwnSession(t *testing.T) {
	f := guardtest.Open(t, 0)
	u := newUpstream(t)
	c := u.client(t, &guard.Transport{Enforcer: f.Enforcer, Own: prepare(t, f, "agent")})
	ann := prepare(t, f, "ann")
	for _, caller := range []*session.Prepared{nil, ann} {
		resp, err := ask(t, c, u.URL+"/", caller)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
	}
	f.On(t, authority.Suspend, "session", "s-agent")
	for _, caller := range []*session.Prepared{nil, ann} {
		if _, err := ask(t, c, u.URL+"/", caller); !errors.Is(err, session.ErrSuspended) {
			t.Fatal(err)
		}
	}
	f.On(t, authority.Resume, "session", "s-agent")
	f.On(t, authority.Revoke, "session", "s-ann")
	if _, err := ask(t, c, u.URL+"/", ann); !errors.Is(err, session.ErrRevoked) {
		t.Fatal(err)
	}
	resp, err := ask(t, c, u.URL+"/", nil)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
}

func TestRevokedAudienceIsNotCalled(t *testing.T) {
	f := guardtest.Open(t, 0)
	u := newUpstream(t)
	c := u.client(t, &guard.Transport{Enforcer: f.Enforcer})
	ann := prepare(t, f, "ann")
	f.On(t, authority.Revoke, "audience", u.URL+"/mcp")
	if _, err := ask(t, c, u.URL+"/mcp?query=1", ann); !errors.Is(err, session.ErrRevoked) {
		t.Fatal(err)
	}
	resp, err := ask(t, c, u.URL+"/other", ann)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
}

func TestNobodysCallIsNotSent(t *testing.T) {
	f := guardtest.Open(t, 0)
	u := newUpstream(t)
	for want, tr := range map[error]*guard.Transport{
		session.ErrNoIdentity: {Enforcer: f.Enforcer},
		session.ErrClosed:     {},
	} {
		body := &closer{}
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, u.URL, body)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := u.client(t, tr).Do(req); !errors.Is(err, want) {
			t.Errorf("got %v, want %v", err, want)
		}
		if !body.closed {
			t.Error("the body was left open")
		}
	}
	select {
	case got := <-u.reached:
		t.Fatalf("%s reached the upstream", got)
	default:
	}
}

type closer struct{ closed bool }

func (c *closer) Read([]byte) (int, error) { return 0, io.EOF }
func (c *closer) Close() error             { c.closed = true; return nil }

func TestAdmit(t *testing.T) {
	f := guardtest.Open(t, 0)
	request := func(token string) *http.Request {
		r := httptest.NewRequest(http.MethodPost, "/", nil)
		if token != "" {
			r.Header.Set("Authorization", "Bearer "+token)
		}
		return r
	}
	scoped := f.Token(t, "ann", "s-ann", func(c map[string]any) { c["scope"] = "a b" })
	for _, tt := range []struct {
		name   string
		token  string
		scopes []string
		known  bool
		err    error
	}{
		{"good", scoped, []string{"a"}, true, nil},
		{"without credentials", "", nil, false, session.ErrNoIdentity},
		{"garbage", "garbage", nil, false, session.ErrNoIdentity},
		{"scope missing", scoped, []string{"a", "c"}, true, denial.ErrScope},
	} {
		p, known, err := guard.Admit(f.Enforcer, f.Verifier, request(tt.token), session.Call{}, tt.scopes)
		if known != tt.known || !errors.Is(err, tt.err) || (p != nil) != tt.known {
			t.Errorf("%s: %v, %v", tt.name, known, err)
		}
	}
	f.On(t, authority.Revoke, "user", "ann")
	if p, known, err := guard.Admit(f.Enforcer, f.Verifier, request(scoped), session.Call{}, nil); p == nil || !known || !errors.Is(err, session.ErrRevoked) {
		t.Error(err)
	}
	if _, _, err := guard.Admit(nil, f.Verifier, request(scoped), session.Call{}, nil); !errors.Is(err, session.ErrClosed) {
		t.Error(err)
	}
	if _, _, err := guard.Admit(f.Enforcer, nil, request(scoped), session.Call{}, nil); !errors.Is(err, session.ErrNoIdentity) {
		t.Error(err)
	}
}

// A stale state cuts what is under way.
func TestOutgoingCallsEndWithAStaleState(t *testing.T) {
	f := guardtest.Open(t, 2*time.Second)
	u := newUpstream(t)
	c := u.client(t, &guard.Transport{Enforcer: f.Enforcer})
	resp, err := ask(t, c, u.URL+"/stream", prepare(t, f, "ann"))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	f.Stop()
	if _, err := io.ReadAll(resp.Body); !errors.Is(err, session.ErrStale) {
		t.Fatal(err)
	}
}
