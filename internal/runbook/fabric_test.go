package runbook

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nkeys"

	service "github.com/interlock-fabric/interlock/internal/authority"
	"github.com/interlock-fabric/interlock/internal/trust"
	"github.com/interlock-fabric/interlock/pkg/authority"
	"github.com/interlock-fabric/interlock/pkg/natsfeed"
	"github.com/interlock-fabric/interlock/pkg/session"
)

const (
	issuer = "https://id.example"
	// patience is for what must happen, however slow the machine; a step may
	// wait for several such things.
	patience    = 30 * time.Second
	stepTimeout = 2 * time.Minute
)

// fabric is what the reader of a runbook has: a deployment that runs, with a
// directory for each thing that a page names by a variable.
type fabric struct {
	t         *testing.T
	dir       string
	env       []string // of every shell and unit
	enforcers []string
	// commanders sign in by certificate, on machines of their own; with them,
	// some decisions take two.
	commanders []string
	apiAddr    string
	busAddr    map[string]string // by the authority's host; there may be a "new" one
	proxyAddr  map[string]string // by the enforcer's host
	upstream   *httptest.Server
	ca         *certAuthority
	ctx        context.Context
	calls      sync.WaitGroup

	mu    sync.Mutex
	units map[string]*unit
}

// unit is a process that the service manager of a host looks after.
type unit struct {
	cmd   *exec.Cmd
	ended chan struct{}
}

func (f *fabric) path(parts ...string) string {
	return filepath.Join(append([]string{f.dir}, parts...)...)
}

// newFabric starts an authority and the enforcers, and returns when these are
// fresh.
func newFabric(t *testing.T, bin string, p *page) *fabric {
	t.Helper()
	dir, err := os.MkdirTemp("", "runbook") // short: a socket's path has 108 bytes
	must(t, err)
	t.Cleanup(func() { must(t, os.RemoveAll(dir)) })
	ctx, cancel := context.WithCancel(t.Context())
	f := &fabric{
		t: t, dir: dir, ctx: ctx, enforcers: p.enforcers, commanders: p.commanders, units: map[string]*unit{}, ca: newCertAuthority(t),
		apiAddr: freeAddr(t), busAddr: map[string]string{"": freeAddr(t), "new": freeAddr(t)}, proxyAddr: map[string]string{},
	}
	for _, kv := range os.Environ() {
		if !strings.HasPrefix(kv, "INTERLOCK_") || strings.HasPrefix(kv, "INTERLOCK_CI_") {
			f.env = append(f.env, kv)
		}
	}
	for _, d := range []string{"home", "bin", "release", "backups", "usb", "tls"} {
		must(t, os.Mkdir(f.path(d), 0o700))
	}
	entries, err := os.ReadDir(bin)
	must(t, err)
	for _, e := range entries {
		must(t, os.Symlink(filepath.Join(bin, e.Name()), f.path("bin", e.Name())))
	}
	for _, name := range []string{"session-authority", "enforcer"} {
		must(t, os.Symlink(filepath.Join(bin, name), f.path("release", name)))
	}
	f.env = append(f.env,
		"PATH="+f.path("bin")+":"+os.Getenv("PATH"), "HOME="+f.path("home"), "RUNBOOK="+f.path("manager.sock"),
		"INTERLOCK_ISSUER="+issuer, "BACKUPS="+f.path("backups"), "BIN="+f.path("bin"), "RELEASE="+f.path("release"),
		"TLS="+f.path("tls"), "API_URL=https://"+f.apiAddr, "BUS_URL=tls://"+f.busAddr[""])
	f.serve()
	t.Cleanup(func() {
		cancel()
		f.calls.Wait()
		f.mu.Lock()
		names := slices.Collect(maps.Keys(f.units)) // nothing starts any more
		f.mu.Unlock()
		var stops sync.WaitGroup
		for _, name := range names {
			stops.Go(func() {
				if err := f.stop(name); err != nil {
					t.Error(err)
				}
			})
		}
		stops.Wait()
		if t.Failed() {
			logs, _ := filepath.Glob(f.path("*.log"))
			for _, l := range logs {
				b, _ := os.ReadFile(l)
				t.Logf("%s:\n%s", filepath.Base(l), b[max(0, len(b)-8<<10):])
			}
		}
	})

	f.ca.write(t, f.path("tls"), "server", &x509.Certificate{IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}})
	if len(f.commanders) > 0 {
		access := fmt.Sprintf("client_ca: %s\ncertificates:\n", f.path("tls", "ca.pem"))
		for _, name := range f.commanders {
			f.ca.write(t, f.path("tls"), name, &x509.Certificate{EmailAddresses: []string{name + "@corp"}})
			access += fmt.Sprintf("- {name: \"email:%s@corp\", role: commander, tenants: [\"*\"]}\n- {name: \"email:%s@corp\", role: viewer, tenants: [\"*\"]}\n", name, name)
		}
		must(t, os.WriteFile(f.path("access.yaml"), []byte(access), 0o600))
	}
	f.upstream = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, "hello\n")
		if r.URL.Path == "/slow" {
			_ = http.NewResponseController(w).Flush()
			<-r.Context().Done()
		}
	}))
	t.Cleanup(f.upstream.Close)

	if code, out := f.shell(&step{script: `session-authority init --root "$ROOT_KEY"`}); code != 0 {
		t.Fatal(out)
	}
	must(t, f.start("session-authority", ""))
	c, err := authority.New(authority.Options{Socket: f.path("authority", service.SocketFile)})
	must(t, err)
	defer c.Close()
	f.eventually("the authority writes", func() bool {
		s, err := c.Status(ctx)
		return err == nil && s.Writer
	})
	tokens := f.tokens()
	for _, name := range f.enforcers {
		must(t, os.MkdirAll(f.path(name, "orders"), 0o700))
		raw, err := c.Enroll(ctx, authority.EnrollRequest{Name: name})
		must(t, err)
		f.proxyAddr[name] = freeAddr(t)
		for file, b := range map[string][]byte{
			"enrollment.json": raw,
			"jwks.json":       tokens,
			"enforcer.yaml": fmt.Appendf(nil, `enrollment: enrollment.json
state_dir: state
orders_dir: orders
admin: {socket: e.sock}
drain_timeout: 1s
trail: {sample: 1, interval: 1s}
issuers: [{url: %s, tenant: default, jwks_file: jwks.json}]
routes:
  - {name: tools, protocol: http, path: /, resource: "https://tools.example/", upstream: {url: %q}}
proxy: {listeners: [{listen: %q}]}
`, issuer, f.upstream.URL, f.proxyAddr[name]),
		} {
			must(t, os.WriteFile(f.path(name, file), b, 0o600))
		}
		must(t, f.start("enforcer", name))
	}
	f.eventually("the enforcers are fresh", func() bool {
		s, err := c.Status(ctx)
		return err == nil && s.Enforcers.Fresh == len(f.enforcers)
	})
	return f
}

// hostEnv is what is set in a shell of a host: an enforcer's, a commander's, or
// that of an authority; "" is the one that runs.
func (f *fabric) hostEnv(host string) []string {
	if slices.Contains(f.commanders, host) {
		return []string{"HOST=" + host, "INTERLOCK_URL=https://" + f.apiAddr, "INTERLOCK_API_CA=" + f.path("tls", "ca.pem"),
			"INTERLOCK_CLIENT_CERT=" + f.path("tls", host+".pem"), "INTERLOCK_CLIENT_KEY=" + f.path("tls", host+".key")}
	}
	if slices.Contains(f.enforcers, host) {
		return []string{"HOST=" + host, "INTERLOCK_CONFIG=" + f.path(host, "enforcer.yaml"), "ENROLLMENT=" + f.path(host, "enrollment.json"), "STATE_DIR=" + f.path(host, "state"), "ORDERS_DIR=" + f.path(host, "orders")}
	}
	prefix := strings.TrimPrefix(host+"-", "-")
	return []string{"HOST=" + host, "INTERLOCK_DATA_DIR=" + f.path(prefix+"authority"), "ROOT_KEY=" + f.path("usb", prefix+"root.key")}
}

// start starts a unit on a host.
func (f *fabric) start(name, host string) error {
	var args []string
	switch {
	case name == "enforcer" && slices.Contains(f.enforcers, host):
		args = []string{"enforcer", "proxy"}
	case name == "session-authority" && f.busAddr[host] != "":
		cert, key := f.path("tls", "server.pem"), f.path("tls", "server.key")
		args = []string{"session-authority", "serve", "--nats-listen", f.busAddr[host], "--nats-tls-cert", cert, "--nats-tls-key", key,
			"--enforcer-ca", f.path("tls", "ca.pem"), "--canary-every", "1s"}
		if host == "" {
			args = append(args, "--api-listen", f.apiAddr, "--api-tls-cert", cert, "--api-tls-key", key)
			if len(f.commanders) > 0 {
				args = append(args, "--access", f.path("access.yaml"))
			}
		}
	default:
		return fmt.Errorf("no unit %s on host %q", name, host)
	}
	name = host + "/" + name
	f.mu.Lock()
	defer f.mu.Unlock()
	if u := f.units[name]; u != nil {
		select {
		case <-u.ended:
		default:
			return nil // it runs
		}
	}
	log, err := os.OpenFile(f.path(strings.ReplaceAll(name, "/", "_")+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	u := &unit{cmd: exec.Command(f.path("bin", args[0]), args[1:]...), ended: make(chan struct{})}
	u.cmd.Env, u.cmd.Dir, u.cmd.Stdout, u.cmd.Stderr = append(slices.Clone(f.env), f.hostEnv(host)...), f.path("home"), log, log
	if err := u.cmd.Start(); err != nil {
		return err
	}
	go func() {
		_ = u.cmd.Wait() // how it ended is in its log
		close(u.ended)
	}()
	f.units[name] = u
	return nil
}

// stop ends a unit in order, or, when that takes too long, at once.
func (f *fabric) stop(name string) error {
	f.mu.Lock()
	u := f.units[name]
	f.mu.Unlock()
	if u == nil {
		return nil
	}
	_ = u.cmd.Process.Signal(syscall.SIGTERM) // it may have ended
	select {
	case <-u.ended:
		return nil
	case <-time.After(patience):
	}
	_ = u.cmd.Process.Kill()
	<-u.ended
	return fmt.Errorf("%s did not stop in time", name)
}

// manage is systemctl of a host: it does what a verb says of a unit.
func (f *fabric) manage(host string, args []string) error {
	if len(args) != 2 {
		return errors.New("usage: systemctl start|stop|restart|reload UNIT")
	}
	name := host + "/" + args[1]
	switch args[0] {
	case "start":
		return f.start(args[1], host)
	case "stop":
		return f.stop(name)
	case "restart":
		if err := f.stop(name); err != nil {
			return err
		}
		return f.start(args[1], host)
	case "reload":
		f.mu.Lock()
		defer f.mu.Unlock()
		if u := f.units[name]; u != nil {
			return u.cmd.Process.Signal(syscall.SIGHUP)
		}
	}
	return fmt.Errorf("systemctl %s: not here", strings.Join(args, " "))
}

// happen makes something happen that no reader does:
//
//	call TOKEN HOST     a caller has a call running through that enforcer
//	get TOKEN HOST      a caller makes a call
//	later-release       a later release writes to the log what this one does not know
//	admitted KEYFILE    fails until the bus lets the holder of that emergency key in
//	steal USER          somebody with the signing key suspends a user, behind the authority's back
//	certificate DIR     the deployment's CA issues another certificate for the authority
//	kill UNIT HOST      a process is killed
func (f *fabric) happen(args []string) error {
	switch strings.Join(args[:1], "") {
	case "call", "get":
		path := map[string]string{"call": "/slow", "get": "/files"}[args[0]]
		req, err := http.NewRequestWithContext(f.ctx, http.MethodGet, "http://"+f.proxyAddr[args[2]]+path, nil)
		if err != nil {
			return err
		}
		token, err := os.ReadFile(f.path("home", args[1]))
		if err != nil {
			return err
		}
		req.Header.Set("Authorization", "Bearer "+strings.TrimSpace(string(token)))
		tr := &http.Transport{DisableKeepAlives: true}
		resp, err := tr.RoundTrip(req)
		if err != nil {
			return err
		}
		if resp.StatusCode != http.StatusOK {
			_ = resp.Body.Close()
			return errors.New(resp.Status)
		}
		f.calls.Go(func() {
			_, _ = io.Copy(io.Discard, resp.Body) // until it ends, or is cut
			_ = resp.Body.Close()
		})
		return nil
	case "later-release":
		return f.laterRelease()
	case "admitted":
		key, err := trust.LoadEmergencyKey(f.path("home", args[1]))
		if err != nil {
			return err
		}
		nc, err := f.dial(key.NATS.NKeySeed)
		if err == nil {
			nc.Close()
		}
		return err
	case "steal":
		return f.steal(args[1])
	case "certificate":
		f.ca.write(f.t, args[1], "server", &x509.Certificate{IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}})
		return nil
	case "kill":
		f.mu.Lock()
		u := f.units[strings.Join(append(args[2:], "", args[1])[:2], "/")]
		f.mu.Unlock()
		if u == nil {
			return fmt.Errorf("no unit %q", args[1:])
		}
		err := u.cmd.Process.Kill()
		<-u.ended
		return err
	}
	return fmt.Errorf("world %q: no such event", args)
}

// laterRelease stores a batch with a critical field that nobody knows today, as
// an authority of a later release would.
func (f *fabric) laterRelease() error {
	return f.write(func(b *session.Batch, _ *trust.Store) ([]byte, error) {
		body, err := b.MarshalBody()
		if err != nil {
			return nil, err
		}
		return append(body[:len(body)-2], 0, 3, 0x90, 0, 0), nil // a field of no length, in place of none
	})
}

// steal decides behind the authority's back, with its key: it suspends a user.
func (f *fabric) steal(user string) error {
	return f.write(func(b *session.Batch, store *trust.Store) ([]byte, error) {
		var id session.DecisionID
		secrets, _ := store.Secrets()
		key, err := secrets[0].Key(session.Target{Tenant: secrets[0].Name(), Terms: []session.Term{{Kind: session.KindUser, Issuer: issuer, Value: user}}})
		if err != nil {
			return nil, err
		}
		if _, err := rand.Read(id[:]); err != nil {
			return nil, err
		}
		b.Decisions = []session.DecisionRef{{ID: id, Count: 1}}
		b.Entries = []session.Entry{{Op: session.OpSet, Effect: session.EffectSuspended, Key: key, Incident: "THIEF"}}
		return b.MarshalBody()
	})
}

// write stores a batch in the log that goes on from its head, signed with the
// authority's key. Somebody else may have been faster, and then it does not count.
func (f *fabric) write(body func(*session.Batch, *trust.Store) ([]byte, error)) error {
	c, err := authority.New(authority.Options{Socket: f.path("authority", service.SocketFile)})
	if err != nil {
		return err
	}
	defer c.Close()
	status, err := c.Status(f.ctx)
	if err != nil {
		return err
	}
	now := session.InstantOf(time.Now())
	b := &session.Batch{Epoch: status.Epoch, Number: status.Number + 1, Time: now, Deadline: now.Add(time.Minute)}
	if _, err := hex.Decode(b.Prev[:], []byte(status.Head)); err != nil {
		return err
	}
	store, err := trust.Open(f.path("authority", service.KeysDir))
	if err != nil {
		return err
	}
	key, err := store.Signer(now)
	if err != nil {
		return err
	}
	raw, err := body(b, store)
	if err != nil {
		return err
	}
	frame, err := session.Seal(session.TypeBatch, raw, key)
	if err != nil {
		return err
	}
	nc, err := f.dial(store.AuthoritySeed())
	if err != nil {
		return err
	}
	defer nc.Close()
	_, err = nc.Request(natsfeed.LogSubject, frame, patience)
	return err
}

// dial connects to the bus as who has a seed.
func (f *fabric) dial(seed string) (*nats.Conn, error) {
	kp, err := nkeys.FromSeed([]byte(seed))
	if err != nil {
		return nil, err
	}
	public, err := kp.PublicKey()
	if err != nil {
		return nil, err
	}
	return nats.Connect("tls://"+f.busAddr[""], nats.Nkey(public, kp.Sign), nats.RootCAs(f.path("tls", "ca.pem")))
}

// message is what systemctl and world ask of the test, which is where the
// processes are.
type message struct {
	Program, Host string
	Args          []string
}

// serve answers them.
func (f *fabric) serve() {
	l, err := new(net.ListenConfig).Listen(f.t.Context(), "unix", f.path("manager.sock"))
	must(f.t, err)
	var all sync.WaitGroup
	all.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			all.Go(func() {
				defer c.Close()
				var m message
				if err := json.NewDecoder(c).Decode(&m); err != nil {
					return
				}
				var err error
				if m.Program == "systemctl" {
					err = f.manage(m.Host, m.Args)
				} else {
					err = f.happen(m.Args)
				}
				if err != nil {
					_, _ = io.WriteString(c, err.Error()+"\n")
				}
			})
		}
	})
	f.t.Cleanup(func() {
		_ = l.Close()
		all.Wait()
	})
}

// ask is what systemctl and world are: it has the test do it, and prints what
// went wrong.
func ask(program string, args []string) int {
	fail := func(err error) int {
		fmt.Fprintf(os.Stderr, "%s: %v\n", program, err)
		return 1
	}
	c, err := new(net.Dialer).DialContext(context.Background(), "unix", os.Getenv("RUNBOOK"))
	if err != nil {
		return fail(err)
	}
	defer c.Close()
	if err := json.NewEncoder(c).Encode(message{program, os.Getenv("HOST"), args}); err != nil {
		return fail(err)
	}
	said, err := io.ReadAll(c)
	if err != nil {
		return fail(err)
	}
	if len(said) > 0 {
		return fail(errors.New(strings.TrimSpace(string(said))))
	}
	return 0
}

func (f *fabric) eventually(what string, ok func() bool) {
	f.t.Helper()
	limit, tick := time.After(patience), time.NewTicker(20*time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-limit:
			f.t.Fatalf("never: %s", what)
		case <-tick.C:
		}
	}
}

// tokens writes alice's and bob's into the home directory, and returns the
// issuer's keys.
func (f *fabric) tokens() (jwks []byte) {
	f.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(f.t, err)
	jwks, err = json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: key.Public(), KeyID: "k1"}}})
	must(f.t, err)
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: key, KeyID: "k1"}}, (&jose.SignerOptions{}).WithType("at+jwt"))
	must(f.t, err)
	now := time.Now()
	for user, sid := range map[string]string{"alice": "s_9f2c", "bob": "s_17aa"} {
		token, err := jwt.Signed(signer).Claims(map[string]any{
			"iss": issuer, "sub": user, "aud": "https://tools.example/", "sid": sid, "jti": rand.Text(),
			"act": map[string]any{"sub": "spiffe://corp/agent/" + user + "s-helper"}, "auth_time": now.Unix(), "exp": now.Add(time.Hour).Unix(),
		}).Serialize()
		must(f.t, err)
		must(f.t, os.WriteFile(f.path("home", user+".jwt"), []byte(token+"\n"), 0o600))
	}
	return jwks
}

// certAuthority issues the authority's certificates.
type certAuthority struct {
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
}

func newCertAuthority(t *testing.T) *certAuthority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	c := &certAuthority{key: key}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "runbook CA"}, NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	must(t, err)
	c.cert, err = x509.ParseCertificate(der)
	must(t, err)
	return c
}

// write writes the CA's certificate, and a new one for name with its key, into a
// directory.
func (c *certAuthority) write(t *testing.T, dir, name string, template *x509.Certificate) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	template.SerialNumber, err = rand.Int(rand.Reader, big.NewInt(1<<62))
	must(t, err)
	template.Subject, template.NotAfter, template.KeyUsage = pkix.Name{CommonName: name}, time.Now().Add(time.Hour), x509.KeyUsageDigitalSignature
	template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	der, err := x509.CreateCertificate(rand.Reader, template, c.cert, key.Public(), c.key)
	must(t, err)
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	must(t, err)
	for file, block := range map[string]*pem.Block{
		"ca.pem": {Type: "CERTIFICATE", Bytes: c.cert.Raw}, name + ".pem": {Type: "CERTIFICATE", Bytes: der}, name + ".key": {Type: "PRIVATE KEY", Bytes: pkcs8},
	} {
		must(t, os.WriteFile(filepath.Join(dir, file), pem.EncodeToMemory(block), 0o600))
	}
}

// freeAddr finds a port that nobody listens on, and that no connection is given
// by itself while a unit that listens there is restarted.
func freeAddr(t *testing.T) string {
	t.Helper()
	for range 100 {
		n, err := rand.Int(rand.Reader, big.NewInt(10_000))
		must(t, err)
		l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", fmt.Sprintf("127.0.0.1:%d", 20_000+n.Int64()))
		if err == nil {
			defer l.Close()
			return l.Addr().String()
		}
	}
	t.Fatal("no free port")
	return ""
}

// group has a command's whole process group killed with its context.
func group(cmd *exec.Cmd) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = time.Second
}
