// Package api is the Session Authority's HTTP API, under /v1: JSON over a unix
// socket that only its owner may open, and, when asked for, over TCP. Who may use
// which endpoint is in package access; the service finds the principal in the
// context of the request.
//
// It reads requests strictly, bounds them in size, time and number, and answers
// failures with problem documents (RFC 9457). What the answers mean is in
// package authority, the client, which has their types.
package api

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	_ "embed" // openapi.yaml
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/interlock-fabric/interlock/internal/access"
	"github.com/interlock-fabric/interlock/internal/audit"
	"github.com/interlock-fabric/interlock/internal/socket"
	"github.com/interlock-fabric/interlock/pkg/authority"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// Bounds of the server.
const (
	headerTimeout = 5 * time.Second
	readTimeout   = 15 * time.Second
	idleTimeout   = 60 * time.Second
	// answerTimeout bounds the handling and writing of what waits for nothing.
	answerTimeout = 30 * time.Second
	closeTimeout  = 3 * time.Second
	maxHeader     = 16 << 10
	// maxWaits and maxWatches bound the requests that stay.
	maxWaits   = 256
	maxWatches = 64
	// maxAtOnce bounds requests of all kinds.
	maxAtOnce = 1024
	// maxReserve are the places that commanders' decisions find when all others
	// are taken.
	maxReserve = 32
	keepAlive  = 10 * time.Second
	// maxPathText bounds a name or an id in a path, in bytes.
	maxPathText = 64
	// tokenLen is what a bootstrap token has at least, maxTokenLen what any token
	// has at most.
	tokenLen    = 32
	maxTokenLen = 12 << 10
)

// ErrNoTLS: the address is not a loopback one and no certificate was given.
var ErrNoTLS = errors.New("api: TLS is required outside loopback: give a certificate, or listen on 127.0.0.1")

// Service is what the API is in front of. Its methods may be called
// concurrently. An error that is a *authority.Problem is answered as it is; any
// other is logged and answered as an internal one, without its text.
type Service interface {
	Decide(ctx context.Context, idempotencyKey string, r authority.Request) (*authority.Decision, error)
	// Decisions lists what is in the log.
	Decisions(ctx context.Context, q authority.DecisionsQuery) (*authority.DecisionsPage, error)
	Coverage(ctx context.Context, epoch, number uint64, wait time.Duration) (*authority.Coverage, error)
	Status(ctx context.Context) (*authority.Status, error)
	Explain(ctx context.Context, r authority.ExplainRequest) (*authority.Explanation, error)
	Enforcers(ctx context.Context) ([]authority.Enforcer, error)
	Enroll(ctx context.Context, r authority.EnrollRequest) (*session.Enrollment, error)
	Retire(ctx context.Context, name string) error
	BusConfig(ctx context.Context) (string, error)
	KeySet(ctx context.Context) ([]byte, error)
	PublishKeySet(ctx context.Context, frame []byte) error
	// Trail and Seen tell what enforcers reported.
	Trail(ctx context.Context, q authority.TrailQuery) (*authority.Trail, error)
	Seen(ctx context.Context, q authority.TrailQuery) (*authority.Sightings, error)
	// Audit tells what was done; ExportAudit writes it, and ExportReceipts what
	// enforcers signed, as lines that can be verified offline.
	Audit(ctx context.Context, q authority.AuditQuery) (*authority.AuditPage, error)
	ExportAudit(ctx context.Context, q authority.AuditQuery, w io.Writer) error
	ExportReceipts(ctx context.Context, incident string, epoch, number uint64, w io.Writer) error
	// RegisterAgent reports whether the agent is new, or changed.
	RegisterAgent(ctx context.Context, r authority.AgentRequest) (a *authority.AgentRecord, changed bool, err error)
	Agents(ctx context.Context, q authority.RegistryQuery) (*authority.AgentsPage, error)
	ChangeAgent(ctx context.Context, r authority.LifecycleRequest) (*authority.LifecycleAnswer, error)
	RegisterSessions(ctx context.Context, r authority.SessionsRequest) (*authority.SessionsAnswer, error)
	Sessions(ctx context.Context, q authority.RegistryQuery) (*authority.SessionsPage, error)
	// Propose keeps a decision until another Approves it, or somebody Withdraws it.
	Propose(ctx context.Context, r authority.Request) (*authority.Proposal, error)
	Proposals(ctx context.Context) ([]authority.Proposal, error)
	Approve(ctx context.Context, id string) (*authority.Decision, error)
	Withdraw(ctx context.Context, id string) (*authority.Proposal, error)
	// Restores are the staged ones; AbortRestore kills again what one has set free.
	Restores(ctx context.Context) ([]authority.StagedRestore, error)
	AbortRestore(ctx context.Context, id string) (*authority.Decision, error)
	// DeclareExemption declares a caller that kills do not touch.
	DeclareExemption(ctx context.Context, r authority.ExemptionRequest) (*authority.Exemption, error)
	Exemptions(ctx context.Context) ([]authority.Exemption, error)
	ApproveExemption(ctx context.Context, id string) (*authority.Exemption, error)
	RemoveExemption(ctx context.Context, id string) error
	// Watch calls began once it watches, and from then on fn with each event, until
	// ctx ends or one of them fails. It returns soon after, and calls nothing
	// concurrently.
	Watch(ctx context.Context, began func() error, fn func(authority.Event) error) error
	// RevokeToken revokes a token that is good and in a tenant of the principal's,
	// and does nothing with any other. Introspect says whether one is good and
	// nothing denies it. RevokeSubject revokes what a user holds. The first two may
	// fail with an *OAuthError.
	RevokeToken(ctx context.Context, token string) error
	Introspect(ctx context.Context, token string) (*Introspection, error)
	RevokeSubject(ctx context.Context, sub SubjectID) error
}

// Options says where to listen. Socket or Listen is required.
type Options struct {
	// Socket is the path of a unix socket, made with mode 0600. Whoever can open
	// it may do everything, unless Access says otherwise. One that a dead process left is replaced; one that
	// is answered is an error.
	Socket string
	// Listen is a host:port for TCP. Empty does not listen on TCP.
	Listen string
	// TLS serves Listen. It is required outside loopback.
	TLS *tls.Config
	// Access is who may use the API; nil is whoever has the token in TokenFile,
	// and users of this machine.
	Access *access.Config
	// TokenFile holds the bearer token that TCP requires where Access is nil. It
	// is made, with mode 0600, if it is absent; one that others can read is
	// refused.
	TokenFile string
	// Refused, if not nil, hears of each request that is refused for who sent it,
	// before anything else is made of it: access.From its context is nil when that
	// is not known. It must not wait.
	Refused func(r *http.Request, err error)
	// Admitted, if not nil, hears of each request whose sender is known, before it
	// is known whether they may send it. It must not wait.
	Admitted func(*access.Principal)
	// Logger hears of failures; nil is silence.
	Logger *slog.Logger
}

// Server is a running API.
type Server struct {
	svc Service
	log *slog.Logger
	// gates guards now, who may come in, and changed, which is closed when that is
	// another.
	gates   sync.RWMutex
	now     *gate
	changed chan struct{}
	servers []*http.Server
	addr    string
	socket  string
	done    sync.WaitGroup
	// ending stops what stays, so that a close need not wait for it.
	ending context.Context
	end    context.CancelFunc
	once   sync.Once
	waits  chan struct{}
	watch  chan struct{}
	all    chan struct{}
	// reserve is for what must get through when all is taken.
	reserve chan struct{}
	// reloading is held by Reload.
	reloading sync.Mutex
	bootstrap string
	// refused is never nil.
	refused  func(*http.Request, error)
	admitted func(*access.Principal)
}

// gate is who may come in, and by what certificates, as one configuration has it.
type gate struct {
	*access.Authenticator
	tls   *tls.Config // nil without
	users sync.WaitGroup
}

// gate returns the one in force. It stays usable until leave is called.
func (s *Server) gate() (g *gate, leave func()) {
	s.gates.RLock()
	defer s.gates.RUnlock()
	g = s.now
	g.users.Add(1)
	return g, g.users.Done
}

// change is closed when the gate is another than now.
func (s *Server) change() <-chan struct{} {
	s.gates.RLock()
	defer s.gates.RUnlock()
	return s.changed
}

// Reload puts another configuration of who may in force, and other certificates of
// the server: for requests that come, and for streams that are open, which end
// where they would not be let in again just as they were. It cannot begin or cease
// to configure principals, or TLS. After an error everything is as it was.
func (s *Server) Reload(config *access.Config, secure *tls.Config) error {
	s.reloading.Lock()
	defer s.reloading.Unlock()
	old := s.now
	if (config != nil) != old.Configured() || (secure != nil) != (old.tls != nil) {
		return errors.New("api: to configure principals, or TLS, for the first time or no more takes a restart")
	}
	a, err := access.New(access.Options{Config: config, Bootstrap: s.bootstrap, Before: old.Authenticator})
	if err != nil {
		return err
	}
	g := &gate{Authenticator: a, tls: serverTLS(secure, a)}
	if a.ClientCAs() != nil && s.addr != "" && secure == nil {
		a.Close()
		return errNoClientTLS
	}
	s.gates.Lock()
	s.now = g
	changed := s.changed
	s.changed = make(chan struct{})
	s.gates.Unlock()
	close(changed)
	old.users.Wait()
	old.Close()
	return nil
}

// Serve listens and returns when it does. Errors wrap ErrNoTLS where that is the
// reason.
func Serve(svc Service, o Options) (*Server, error) {
	s := &Server{
		svc: svc, log: o.Logger,
		waits: make(chan struct{}, maxWaits), watch: make(chan struct{}, maxWatches), all: make(chan struct{}, maxAtOnce), reserve: make(chan struct{}, maxReserve),
	}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	if s.refused = o.Refused; s.refused == nil {
		s.refused = func(*http.Request, error) {}
	}
	s.admitted = o.Admitted
	if o.Socket == "" && o.Listen == "" {
		return nil, errors.New("api: neither a socket nor an address to listen on")
	}
	s.ending, s.end = context.WithCancel(context.Background())
	token, err := bootstrap(&o)
	if err != nil {
		return nil, err
	}
	a, err := access.New(access.Options{Config: o.Access, Bootstrap: token})
	if err != nil {
		return nil, err
	}
	s.bootstrap, s.now, s.changed = token, &gate{Authenticator: a, tls: serverTLS(o.TLS, a)}, make(chan struct{})
	if o.Listen != "" {
		err = s.serveTCP(o)
	}
	if err == nil && o.Socket != "" {
		err = s.serveSocket(o.Socket)
	}
	if err != nil {
		_ = s.Close() // the reason is err
		return nil, err
	}
	return s, nil
}

// Addr returns the TCP address, or "".
func (s *Server) Addr() string { return s.addr }

func (s *Server) serveSocket(path string) error {
	l, err := socket.Listen(path)
	if err != nil {
		return fmt.Errorf("api: %w", err)
	}
	s.socket = path
	s.serve(l, s.routes(func(r *http.Request) (*access.Principal, error) {
		c, _ := r.Context().Value(connKey{}).(net.Conn)
		uid, known := socket.Peer(c)
		g, leave := s.gate()
		defer leave()
		return g.Socket(r, uid, known)
	}))
	return nil
}

// bootstrap returns the token of TokenFile. Where principals are configured it is
// wanted only to say that it is refused, and none is made.
func bootstrap(o *Options) (string, error) {
	switch {
	case o.Access != nil:
		token, _ := ReadToken(o.TokenFile) // whatever it is, it is refused
		return token, nil
	case o.Listen != "":
		return LoadToken(o.TokenFile)
	}
	return "", nil
}

func (s *Server) serveTCP(o Options) error {
	host, _, err := net.SplitHostPort(o.Listen)
	if err != nil || host == "" {
		return fmt.Errorf("api: address %q: want host:port", o.Listen)
	}
	if o.TLS == nil && !loopback(host) {
		return fmt.Errorf("%w (address %s)", ErrNoTLS, o.Listen)
	}
	if o.TLS == nil && s.now.ClientCAs() != nil {
		return errNoClientTLS
	}
	l, err := new(net.ListenConfig).Listen(context.Background(), "tcp", o.Listen)
	if err != nil {
		return fmt.Errorf("api: %w", err)
	}
	s.addr = l.Addr().String()
	if o.TLS != nil {
		l = tls.NewListener(l, &tls.Config{MinVersion: tls.VersionTLS12, GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
			g, leave := s.gate()
			defer leave()
			return g.tls, nil
		}})
	}
	s.serve(l, s.routes(func(r *http.Request) (*access.Principal, error) {
		g, leave := s.gate()
		defer leave()
		return g.Request(r)
	}))
	return nil
}

var errNoClientTLS = errors.New("api: client certificates need TLS: give the API a certificate")

// serverTLS is config with what asks for client certificates; nil where that is.
func serverTLS(config *tls.Config, a *access.Authenticator) *tls.Config {
	config = config.Clone() // of nil, nil
	if cas := a.ClientCAs(); cas != nil && config != nil {
		// Whoever has none is told so by an answer.
		config.ClientCAs, config.ClientAuth = cas, tls.VerifyClientCertIfGiven
	}
	return config
}

func loopback(host string) bool {
	if host == "localhost" {
		return true
	}
	ip, err := netip.ParseAddr(host)
	return err == nil && ip.Unmap().IsLoopback()
}

// connKey is of the connection in the context of its requests.
type connKey struct{}

func (s *Server) serve(l net.Listener, h http.Handler) {
	srv := &http.Server{
		Handler: h, ReadHeaderTimeout: headerTimeout, ReadTimeout: readTimeout,
		WriteTimeout: answerTimeout, IdleTimeout: idleTimeout, MaxHeaderBytes: maxHeader,
		DisableGeneralOptionsHandler: true,
		ErrorLog:                     slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
		ConnContext:                  func(ctx context.Context, c net.Conn) context.Context { return context.WithValue(ctx, connKey{}, c) },
	}
	s.servers = append(s.servers, srv)
	s.done.Go(func() {
		if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			s.log.Error("the API stopped listening", "error", err)
		}
	})
}

// Close ends watches and waits, lets other requests finish for a moment, and
// returns when nothing of the server runs any more. It is idempotent.
func (s *Server) Close() error {
	s.once.Do(func() {
		s.end()
		ctx, cancel := context.WithTimeout(context.Background(), closeTimeout)
		defer cancel()
		for _, srv := range s.servers {
			if srv.Shutdown(ctx) != nil {
				_ = srv.Close() // whatever was slow is cut
			}
		}
		s.done.Wait()
		if s.now != nil {
			s.now.Close()
		}
		if s.socket != "" {
			_ = os.Remove(s.socket) // Shutdown has removed it on most systems
		}
	})
	s.done.Wait()
	return nil
}

// LoadToken reads a bearer token, making it first if the file is absent. A file
// that others can read is refused: its token must be taken for known.
func LoadToken(path string) (string, error) {
	if path == "" {
		return "", errors.New("api: TCP needs a file for its token")
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err == nil {
		// rand.Text has 130 bits; a token has twice that.
		_, err = f.WriteString(rand.Text() + rand.Text() + "\n")
		if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
			_ = os.Remove(path) // half a token is worse than none
			return "", fmt.Errorf("api: token: %w", err)
		}
	} else if !errors.Is(err, fs.ErrExist) {
		return "", fmt.Errorf("api: token: %w", err)
	}
	return ReadToken(path)
}

// ReadToken reads a bearer token from a file that only its owner can read.
func ReadToken(path string) (string, error) {
	info, err := os.Stat(path)
	if err != nil {
		return "", fmt.Errorf("api: token: %w", err)
	}
	if info.Mode().Perm()&0o077 != 0 {
		return "", fmt.Errorf("api: %w: token file %s can be read by others: remove it, and restart the authority to make another", fs.ErrPermission, path)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return "", fmt.Errorf("api: token: %w", err)
	}
	token := string(bytes.TrimSpace(b))
	if len(token) < tokenLen || len(token) > maxTokenLen || strings.ContainsAny(token, " \t\r\n") {
		return "", fmt.Errorf("api: token file %s holds no token: remove it, and restart the authority to make another", path)
	}
	return token, nil
}

// handler is a handler that says what went wrong instead of writing it.
type handler func(w http.ResponseWriter, r *http.Request) error

// endpoint is a handler, and what it reads of a request beside its path: what else
// is sent is refused.
type endpoint struct {
	serve handler
	reads reads
}

type reads int

const (
	nothing reads = iota
	query
	body
)

// check refuses what the endpoint does not read, and names that are too long. The error is a
// *authority.Problem.
func (e endpoint) check(r *http.Request) error {
	for part := range strings.SplitSeq(r.URL.Path, "/") {
		if len(part) > maxPathText {
			return authority.NewProblem(authority.ProblemInvalid, fmt.Sprintf("a name in the path is longer than %d bytes", maxPathText), "use one as it was answered")
		}
	}
	if r.URL.RawQuery != "" {
		if e.reads != query {
			return authority.NewProblem(authority.ProblemInvalid, "there is a query, and none is taken", "leave it out")
		}
		if _, err := url.ParseQuery(r.URL.RawQuery); err != nil {
			return authority.NewProblem(authority.ProblemInvalid, "the query is malformed", "send parameters as name=value, percent-encoded")
		}
	}
	if e.reads != body && r.ContentLength != 0 {
		return authority.NewProblem(authority.ProblemInvalid, "there is a body, and none is taken", "leave it out")
	}
	return nil
}

// endpoints are what is served, by pattern. Who may use each is in package access,
// and what it takes and answers in openapi.yaml, against which tests hold it.
func (s *Server) endpoints() map[string]endpoint {
	return map[string]endpoint{
		"POST /v1/decisions":                          {s.decide, body},
		"GET /v1/decisions":                           {s.decisions, query},
		"GET /v1/decisions/{epoch}/{number}/coverage": {s.coverage, query},
		"GET /v1/status":                              {s.status, nothing},
		"GET /v1/openapi.yaml":                        {s.description, nothing},
		"GET /v1/watch":                               {s.watchEvents, nothing},
		"POST /v1/explain":                            {s.explain, body},
		"GET /v1/enforcers":                           {s.enforcers, nothing},
		"POST /v1/enforcers":                          {s.enroll, body},
		"DELETE /v1/enforcers/{name}":                 {s.retire, nothing},
		"GET /v1/trail":                               {s.trail, query},
		"GET /v1/seen":                                {s.seen, query},
		"GET /v1/audit":                               {s.audit, query},
		"GET /v1/audit/export":                        {s.exportAudit, query},
		"GET /v1/receipts/export":                     {s.exportReceipts, query},
		"GET /v1/agents":                              {s.agents, query},
		"POST /v1/agents":                             {s.registerAgent, body},
		"POST /v1/agents/lifecycle":                   {s.changeAgent, body},
		"GET /v1/sessions":                            {s.sessions, query},
		"POST /v1/sessions":                           {s.registerSessions, body},
		"GET /v1/bus-config":                          {s.busConfig, nothing},
		"GET /v1/keyset":                              {s.keySet, nothing},
		"POST /v1/keyset":                             {s.publishKeySet, body},
		"POST /v1/oauth/revoke":                       {s.revokeToken, body},
		"POST /v1/oauth/introspect":                   {s.introspect, body},
		"POST /v1/oauth/global-token-revocation":      {s.revokeSubject, body},
		"POST /v1/proposals":                          {s.propose, body},
		"GET /v1/proposals":                           {s.proposals, nothing},
		"POST /v1/proposals/{id}/approve":             {s.approve, nothing},
		"POST /v1/proposals/{id}/withdraw":            {s.withdraw, nothing},
		"GET /v1/restores":                            {s.restores, nothing},
		"POST /v1/restores/{id}/abort":                {s.abortRestore, nothing},
		"GET /v1/exemptions":                          {s.exemptions, nothing},
		"POST /v1/exemptions":                         {s.declareExemption, body},
		"POST /v1/exemptions/{id}/approve":            {s.approveExemption, nothing},
		"DELETE /v1/exemptions/{id}":                  {s.removeExemption, nothing},
	}
}

// routes serves the endpoints to whom who finds, and who may use them. Nothing is
// said to anybody else, not even what there is.
func (s *Server) routes(who func(*http.Request) (*access.Principal, error)) http.Handler {
	mux := http.NewServeMux()
	for pattern, e := range s.endpoints() {
		mux.Handle(pattern, s.handle(s.permit(pattern, e)))
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		places := s.all
		select {
		case s.all <- struct{}{}:
		default:
			places = s.reserve
			select {
			case s.reserve <- struct{}{}:
			default:
				fail(w, r, overloaded("too many requests at once"))
				return
			}
		}
		defer func() { <-places }()
		asked, changed := r, s.change()
		p, err := who(asked)
		if err != nil {
			s.refused(r, err)
			s.refuse(w, r, err)
			return
		}
		if places == s.reserve && (!urgent(r) || p.Scope(access.DecideAll).Empty()) {
			fail(w, r, overloaded("too many requests at once"))
			return
		}
		if s.admitted != nil {
			s.admitted(p)
		}
		ctx, cancel := p.Deadline(access.With(r.Context(), p))
		defer cancel()
		if t := session.ParseTraceparent(r.Header.Get("Traceparent")); t.TraceID != [16]byte{} {
			ctx = audit.WithTrace(ctx, t)
		}
		r = r.WithContext(context.WithValue(ctx, standingKey{}, standing{changed, func() bool {
			q, err := who(asked)
			return err == nil && reflect.DeepEqual(p, q)
		}}))
		if _, pattern := mux.Handler(r); pattern == "" || r.Method == http.MethodHead || r.URL.Path != path.Clean(r.URL.Path) {
			// The mux's own answers, 404, 405 and redirects, are text.
			p := authority.NewProblem(authority.ProblemNotFound, "there is nothing at "+clip(r.Method+" "+r.URL.Path), "the API is under /v1")
			writeProblem(w, p)
			return
		}
		mux.ServeHTTP(w, r)
	})
}

// standing is, in the context of a request, whether who sent it would be let in
// again just as they were: to be asked when changed is closed.
type standing struct {
	changed <-chan struct{}
	again   func() bool
}

type standingKey struct{}

// urgent reports whether a request may be a kill, or the approval of one, or the
// abort of a restore, which kills again.
func urgent(r *http.Request) bool {
	return r.Method == http.MethodPost && (r.URL.Path == "/v1/decisions" || strings.HasPrefix(r.URL.Path, "/v1/proposals") || strings.HasPrefix(r.URL.Path, "/v1/restores/"))
}

// permit lets through who may use the endpoint. What they may do there in
// particular, and in which tenants, is the service's to check.
func (s *Server) permit(pattern string, e endpoint) handler {
	op, listed := access.Endpoint(pattern)
	return func(w http.ResponseWriter, r *http.Request) error {
		if !listed {
			return authority.NewProblem(authority.ProblemForbidden, "nobody may use this endpoint", "it has no entry in the table of who may")
		}
		if err := access.From(r.Context()).Check(op); err != nil {
			s.refused(r, err)
			return err
		}
		if err := e.check(r); err != nil {
			return err
		}
		return e.serve(w, r)
	}
}

// refuse answers a request of which it is not known who sent it.
func (s *Server) refuse(w http.ResponseWriter, r *http.Request, err error) {
	var p *authority.Problem
	if !errors.As(err, &p) {
		p = authority.NewProblem(authority.ProblemUnauthorised, "nobody is signed in", "")
	}
	if p.Status == http.StatusUnauthorized {
		g, leave := s.gate()
		defer leave()
		w.Header().Set("WWW-Authenticate", g.Challenge(r))
	}
	fail(w, r, p)
}

func (s *Server) handle(h handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		err := h(w, r)
		if err == nil {
			return
		}
		var o *OAuthError
		if errors.As(err, &o) {
			writeOAuthError(w, o)
			return
		}
		var p *authority.Problem
		if !errors.As(err, &p) {
			switch r.Context().Err() {
			case context.Canceled:
				return // nobody is there to read it
			case context.DeadlineExceeded:
				s.refuse(w, r, authority.NewProblem(authority.ProblemUnauthorised, "the credential has ended", "sign in again"))
				return
			}
			s.log.Error("request failed", "method", r.Method, "path", r.URL.Path, "error", err)
			p = authority.NewProblem(authority.ProblemInternal, "the authority failed", "see its log")
		}
		fail(w, r, p)
	})
}

func overloaded(detail string) *authority.Problem {
	return authority.NewProblem(authority.ProblemOverloaded, detail, "try again in a moment")
}

func (s *Server) decide(w http.ResponseWriter, r *http.Request) error {
	var in authority.Request
	if err := readJSON(w, r, &in); err != nil {
		return err
	}
	key := r.Header.Get("Idempotency-Key")
	if key == "" {
		key = rand.Text()
	}
	if len(key) > authority.MaxIdempotencyKey || len(r.Header.Values("Idempotency-Key")) > 1 || !printable(key) {
		return authority.NewProblem(authority.ProblemInvalid, "the idempotency key is not valid",
			fmt.Sprintf("send one Idempotency-Key of at most %d printable ASCII characters", authority.MaxIdempotencyKey))
	}
	d, err := s.svc.Decide(r.Context(), key, in)
	if err != nil {
		return err
	}
	writeDecision(w, d)
	return nil
}

func (s *Server) decisions(w http.ResponseWriter, r *http.Request) error {
	q, err := authority.ParseDecisionsQuery(r.URL.Query())
	if err != nil {
		return err
	}
	p, err := s.svc.Decisions(r.Context(), q)
	if err != nil {
		return err
	}
	writeJSON(w, http.StatusOK, p)
	return nil
}

func writeDecision(w http.ResponseWriter, d *authority.Decision) {
	status := http.StatusOK
	if d.Committed && !d.Durable {
		status = http.StatusAccepted
	}
	if d.Committed {
		w.Header().Set("Location", fmt.Sprintf("/v1/decisions/%d/%d/coverage", d.Epoch, d.Number))
	}
	writeJSON(w, status, d)
}

func (s *Server) propose(w http.ResponseWriter, r *http.Request) error {
	var in authority.Request
	if err := readJSON(w, r, &in); err != nil {
		return err
	}
	p, err := s.svc.Propose(r.Context(), in)
	if err != nil {
		return err
	}
	writeJSON(w, http.StatusCreated, p)
	return nil
}

func (s *Server) proposals(w http.ResponseWriter, r *http.Request) error {
	list, err := s.svc.Proposals(r.Context())
	if err != nil {
		return err
	}
	writeJSON(w, http.StatusOK, map[string]any{"proposals": list})
	return nil
}

func (s *Server) approve(w http.ResponseWriter, r *http.Request) error {
	d, err := s.svc.Approve(r.Context(), r.PathValue("id"))
	if err != nil {
		return err
	}
	writeDecision(w, d)
	return nil
}

func (s *Server) withdraw(w http.ResponseWriter, r *http.Request) error {
	p, err := s.svc.Withdraw(r.Context(), r.PathValue("id"))
	if err != nil {
		return err
	}
	writeJSON(w, http.StatusOK, p)
	return nil
}

func printable(s string) bool {
	for i := 0; i < len(s); i++ {
		if s[i] < 0x20 || s[i] > 0x7e {
			return false
		}
	}
	return true
}

func (s *Server) coverage(w http.ResponseWriter, r *http.Request) error {
	epoch, err1 := strconv.ParseUint(r.PathValue("epoch"), 10, 64)
	number, err2 := strconv.ParseUint(r.PathValue("number"), 10, 64)
	if err1 != nil || err2 != nil {
		return authority.NewProblem(authority.ProblemInvalid, "the decision's epoch and number are not numbers", "use the ones in the answer to the decision")
	}
	var wait time.Duration
	for name, values := range r.URL.Query() {
		if name != "wait" || len(values) != 1 {
			return authority.NewProblem(authority.ProblemInvalid, "unknown or repeated parameter "+clip(name), "the only parameter is wait, as in ?wait=10s")
		}
		var d authority.Duration
		if err := d.UnmarshalText([]byte(values[0])); err != nil || d < 0 || time.Duration(d) > authority.MaxWait {
			return authority.NewProblem(authority.ProblemInvalid, "wait is not a duration that is allowed", fmt.Sprintf("give one like 10s, at most %s", authority.MaxWait))
		}
		wait = time.Duration(d)
	}
	ctx := r.Context()
	if wait > 0 {
		leave, err := s.stay(s.waits, w, wait+answerTimeout)
		if err != nil {
			return err
		}
		defer leave()
		var cancel context.CancelFunc
		ctx, cancel = s.until(ctx)
		defer cancel()
	}
	c, err := s.svc.Coverage(ctx, epoch, number, wait)
	if err != nil {
		return err
	}
	writeJSON(w, http.StatusOK, c)
	return nil
}

// stay admits a request that stays for longer than others do.
func (s *Server) stay(slots chan struct{}, w http.ResponseWriter, d time.Duration) (leave func(), err error) {
	select {
	case slots <- struct{}{}:
	default:
		return nil, overloaded("too many requests wait already")
	}
	deadline := time.Time{}
	if d > 0 {
		deadline = time.Now().Add(d)
	}
	c := http.NewResponseController(w)
	if err := errors.Join(c.SetWriteDeadline(deadline), c.SetReadDeadline(deadline)); err != nil {
		<-slots
		return nil, err
	}
	return func() { <-slots }, nil
}

// until is ctx, ended also by the server's close.
func (s *Server) until(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(s.ending, cancel)
	return ctx, func() { stop(); cancel() }
}

func (s *Server) status(w http.ResponseWriter, r *http.Request) error {
	st, err := s.svc.Status(r.Context())
	if err != nil {
		return err
	}
	writeJSON(w, http.StatusOK, st)
	return nil
}

// Description is the OpenAPI document of the API.
//
//go:embed openapi.yaml
var Description []byte

// Routes returns the patterns of all endpoints, sorted.
func Routes() []string { return slices.Sorted(maps.Keys((&Server{}).endpoints())) }

func (s *Server) description(w http.ResponseWriter, _ *http.Request) error {
	h := w.Header()
	h.Set("Content-Type", "application/yaml") // RFC 9512
	h.Set("X-Content-Type-Options", "nosniff")
	_, _ = w.Write(Description) // a caller that went away learns nothing anyway
	return nil
}

func (s *Server) explain(w http.ResponseWriter, r *http.Request) error {
	var in authority.ExplainRequest
	if err := readJSON(w, r, &in); err != nil {
		return err
	}
	x, err := s.svc.Explain(r.Context(), in)
	if err != nil {
		return err
	}
	writeJSON(w, http.StatusOK, x)
	return nil
}

func (s *Server) enforcers(w http.ResponseWriter, r *http.Request) error {
	list, err := s.svc.Enforcers(r.Context())
	if err != nil {
		return err
	}
	if list == nil {
		list = []authority.Enforcer{}
	}
	writeJSON(w, http.StatusOK, map[string]any{"enforcers": list})
	return nil
}

func (s *Server) enroll(w http.ResponseWriter, r *http.Request) error {
	var in authority.EnrollRequest
	if err := readJSON(w, r, &in); err != nil {
		return err
	}
	e, err := s.svc.Enroll(r.Context(), in)
	if err != nil {
		return err
	}
	secret, err := e.MarshalSecret()
	if err != nil {
		return fmt.Errorf("enrolment: %w", err)
	}
	writeJSON(w, http.StatusCreated, json.RawMessage(secret))
	return nil
}

func (s *Server) trail(w http.ResponseWriter, r *http.Request) error {
	q, err := authority.ParseTrailQuery(r.URL.Query())
	if err != nil {
		return err
	}
	t, err := s.svc.Trail(r.Context(), q)
	if err != nil {
		return err
	}
	writeJSON(w, http.StatusOK, t)
	return nil
}

func (s *Server) seen(w http.ResponseWriter, r *http.Request) error {
	q, err := authority.ParseTrailQuery(r.URL.Query())
	if err != nil {
		return err
	}
	t, err := s.svc.Seen(r.Context(), q)
	if err != nil {
		return err
	}
	writeJSON(w, http.StatusOK, t)
	return nil
}

func (s *Server) retire(w http.ResponseWriter, r *http.Request) error {
	if err := s.svc.Retire(r.Context(), r.PathValue("name")); err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

func (s *Server) busConfig(w http.ResponseWriter, r *http.Request) error {
	config, err := s.svc.BusConfig(r.Context())
	if err != nil {
		return err
	}
	writeJSON(w, http.StatusOK, map[string]string{"config": config})
	return nil
}

type keySetBody struct {
	Frame []byte `json:"frame"`
}

func (s *Server) keySet(w http.ResponseWriter, r *http.Request) error {
	frame, err := s.svc.KeySet(r.Context())
	if err != nil {
		return err
	}
	writeJSON(w, http.StatusOK, keySetBody{frame})
	return nil
}

func (s *Server) publishKeySet(w http.ResponseWriter, r *http.Request) error {
	var in keySetBody
	if err := readJSON(w, r, &in); err != nil {
		return err
	}
	if err := s.svc.PublishKeySet(r.Context(), in.Frame); err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// watchEvents is a stream of server-sent events, with a comment now and then so
// that a reader can tell a quiet link from a dead one.
func (s *Server) watchEvents(w http.ResponseWriter, r *http.Request) error {
	who := r.Context().Value(standingKey{}).(standing)
	leave, err := s.stay(s.watch, w, 0)
	if err != nil {
		return err
	}
	defer leave()
	ctx, cancel := s.until(r.Context())
	defer cancel()
	c := http.NewResponseController(w)
	h := w.Header()
	h.Set("Content-Type", "text/event-stream")
	h.Set("Cache-Control", "no-store")
	w.WriteHeader(http.StatusOK)

	var mu sync.Mutex
	send := func(b []byte) error {
		mu.Lock()
		defer mu.Unlock()
		// A reader that does not read is cut instead of waited for.
		if err := c.SetWriteDeadline(time.Now().Add(keepAlive)); err != nil {
			return err
		}
		if _, err := w.Write(b); err != nil {
			return err
		}
		return c.Flush()
	}
	var alive sync.WaitGroup
	defer alive.Wait()
	defer cancel()
	alive.Go(func() {
		tick := time.NewTicker(keepAlive)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-who.changed:
				who.changed = s.change()
				if !who.again() {
					cancel()
					return
				}
			case <-tick.C:
				if send([]byte(": alive\n\n")) != nil {
					cancel()
					return
				}
			}
		}
	})
	began := func() error { return send([]byte(": watching\n\n")) }
	err = s.svc.Watch(ctx, began, func(e authority.Event) error {
		b, err := json.Marshal(e)
		if err != nil {
			return err
		}
		return send(fmt.Appendf(nil, "event: %s\ndata: %s\n\n", e.Type, b))
	})
	if err != nil && ctx.Err() == nil {
		s.log.Debug("a watch ended", "error", err)
	}
	return nil
}

// clip bounds a foreign string before it goes into an answer.
func clip(s string) string {
	if len(s) > 64 {
		s = s[:64] + "…"
	}
	return s
}
