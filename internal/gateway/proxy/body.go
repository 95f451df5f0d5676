package proxy

import (
	"bytes"
	"errors"
	"io"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/interlock-fabric/interlock/internal/gateway/config"
	"github.com/interlock-fabric/interlock/internal/gateway/operation"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// Budget bounds what the bodies that are held in memory take together. It is safe
// for concurrent use.
type Budget struct {
	limit int64
	used  atomic.Int64
}

// NewBudget returns a budget of so many bytes.
func NewBudget(limit int64) *Budget { return &Budget{limit: limit} }

// Used returns what is in use.
func (b *Budget) Used() int64 { return b.used.Load() }

func (b *Budget) take(n int) bool {
	if b.used.Add(int64(n)) <= b.limit {
		return true
	}
	b.used.Add(-int64(n))
	return false
}

func (b *Budget) give(n int) { b.used.Add(-int64(n)) }

// read finds out what a request asks for. A body of JSON-RPC is read whole, and
// put back; anything else is left to stream. release lets go of the body, and gives
// back what it takes of the budget, which is done as soon as it has been passed on
// and may be done again. The error is a *operation.Refusal, or a denial.
func (x *exchange) read(w http.ResponseWriter, r *http.Request) (release func(), err error) {
	nothing := func() {}
	proto := x.g.Route.Protocol
	if upgrade(r.Header) {
		switch {
		case !x.g.Route.AllowUpgrade:
			return nil, &operation.Refusal{Status: http.StatusBadRequest, Code: codeInvalid, Why: "upgrades are not accepted"}
		case r.Method != http.MethodGet || r.ContentLength != 0:
			// A server that declines would take it for what it is otherwise, and
			// nobody had read it.
			return nil, &operation.Refusal{Status: http.StatusBadRequest, Code: codeInvalid, Why: "an upgrade is a GET without a body"}
		case plainUpgrade(r.Header):
			// Whatever was said in it would come from us.
			return nil, &operation.Refusal{Status: http.StatusBadRequest, Code: codeInvalid, Why: "no upgrade to another HTTP"}
		}
		x.op = x.g.ByPath(r.Method, r.URL, x.path, r.Header)
		return nothing, nil
	}
	switch proto {
	case config.HTTP:
		x.op = x.g.ByPath(r.Method, r.URL, x.path, r.Header)
		return nothing, nil
	case config.MCP:
		switch r.Method {
		case http.MethodPost:
		case http.MethodGet, http.MethodDelete:
			return nothing, x.op.MatchHeaders(r.Header)
		default:
			return nil, &operation.Refusal{Status: http.StatusMethodNotAllowed, Code: codeInvalid, Why: "the method is not one of MCP"}
		}
	case config.A2A:
		switch {
		case r.Method != http.MethodPost:
			x.op = x.g.ByPath(r.Method, r.URL, x.path, r.Header)
			return nothing, nil
		case operation.GRPC(r.Header):
			if r.ProtoMajor < 2 {
				return nil, &operation.Refusal{Status: http.StatusBadRequest, Code: codeInvalid, Why: "gRPC wants HTTP/2"}
			}
			x.op = x.g.ByPath(r.Method, r.URL, x.path, r.Header)
			r.Body = &framed{ReadCloser: r.Body, x: x}
			return nothing, nil
		case r.ContentLength == 0 && x.rest(r):
			x.op = x.g.ByPath(r.Method, r.URL, x.path, r.Header)
			return nothing, nil
		}
	}
	return x.readJSON(w, r, x.g.Route.MaxBody, x.p.opts.Config.Proxy.BodyTimeout)
}

// framed is the body of a gRPC request, if it is one.
type framed struct {
	io.ReadCloser
	x     *exchange
	begun bool
}

func (f *framed) Read(p []byte) (int, error) {
	n, err := f.ReadCloser.Read(p)
	if n > 0 && !f.begun {
		if f.begun = operation.Framed(p[0]); !f.begun {
			return 0, operation.ErrFrame
		}
	}
	if f.x.exec != nil {
		f.x.exec.asks(p[:n])
	}
	return n, err
}

// readJSON reads a message of at most limit bytes. It has to come within timeout,
// unless that is zero and the reader has a deadline already.
func (x *exchange) readJSON(w http.ResponseWriter, r *http.Request, limit int, timeout time.Duration) (release func(), err error) {
	isJSON, err := operation.JSONBody(r.Header)
	if err != nil {
		return nil, err
	}
	if !isJSON {
		return nil, &operation.Refusal{Status: http.StatusUnsupportedMediaType, Code: codeInvalid, Why: "the body is not declared to be JSON"}
	}
	if r.ContentLength > int64(limit) {
		return nil, tooLong
	}
	rc := http.NewResponseController(w)
	if timeout > 0 {
		if err := rc.SetReadDeadline(time.Now().Add(timeout)); err != nil {
			return nil, err
		}
	}
	body, taken, err := x.p.opts.Budget.readAll(r.Body, limit, r.ContentLength)
	release = sync.OnceFunc(func() {
		x.forget()
		x.p.opts.Budget.give(taken)
	})
	if err == nil && timeout > 0 {
		err = rc.SetReadDeadline(time.Time{})
	}
	if err == nil {
		err = x.parse(r, body)
	}
	if err != nil {
		release()
		return nil, err
	}
	x.op.ID = bytes.Clone(x.op.ID)
	r.Body = &held{rest: body, release: release}
	if r.Trailer == nil {
		r.ContentLength = int64(len(body))
	}
	return release, nil
}

// held is a body that is in memory until all of it has been read, or nobody wants
// more of it.
type held struct {
	mu      sync.Mutex
	rest    []byte
	closed  bool
	release func()
}

func (h *held) Read(p []byte) (int, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case h.closed:
		// Not the end: what the upstream has is not the whole.
		return 0, http.ErrBodyReadAfterClose
	case len(p) == 0:
		return 0, nil
	case len(h.rest) == 0:
		h.release()
		return 0, io.EOF
	}
	n := copy(p, h.rest)
	if h.rest = h.rest[n:]; len(h.rest) == 0 {
		h.rest = nil
		h.release()
	}
	return n, nil
}

func (h *held) Close() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.closed, h.rest = true, nil
	h.release()
	return nil
}

// parse finds out what a message that has been read asks for.
func (x *exchange) parse(r *http.Request, body []byte) (err error) {
	if x.rest(r) {
		x.op = x.g.ByPath(r.Method, r.URL, x.path, r.Header)
		x.op.Arguments = body
		return operation.CheckREST(body)
	}
	if x.op, err = operation.Parse(body, x.g.Route.Protocol); err == nil && x.g.Route.Protocol == config.MCP {
		err = x.op.MatchHeaders(r.Header)
	}
	return err
}

// rest reports whether a request stands for a method of A2A by its path.
func (x *exchange) rest(r *http.Request) bool {
	_, ok := operation.REST(r.Method, x.path)
	return ok && x.g.Route.Protocol == config.A2A
}

var tooLong = &operation.Refusal{Status: http.StatusRequestEntityTooLarge, Code: codeInvalid, Why: "the message is too long"}

// firstRead is what is set aside for a body before anything of it has come.
const firstRead = 4 << 10

// readAll reads a body of at most limit bytes. What it takes of the budget, which
// the caller is to give back, is never more than twice of what has come.
func (b *Budget) readAll(r io.Reader, limit int, length int64) (body []byte, taken int, err error) {
	size := firstRead
	if length >= 0 && length < firstRead {
		size = int(length) + 1 // one more, to see the end
	}
	if !b.take(size) {
		return nil, 0, &session.DeniedError{Err: session.ErrOverloaded, Detail: "too many requests are being read"}
	}
	buf, taken := make([]byte, 0, size), size
	for {
		n, err := r.Read(buf[len(buf):cap(buf)])
		buf = buf[:len(buf)+n]
		switch {
		case len(buf) > limit:
			return nil, taken, tooLong
		case errors.Is(err, io.EOF):
			return buf, taken, nil
		case errors.Is(err, os.ErrDeadlineExceeded):
			return nil, taken, &operation.Refusal{Status: http.StatusRequestTimeout, Code: codeInvalid, Why: "the message did not come in time"}
		case err != nil:
			return nil, taken, &operation.Refusal{Status: http.StatusBadRequest, Code: codeInvalid, Why: "the message broke off"}
		}
		if len(buf) == cap(buf) {
			grow := min(cap(buf), limit+1-cap(buf))
			if !b.take(grow) {
				return nil, taken, &session.DeniedError{Err: session.ErrOverloaded, Detail: "too many requests are being read"}
			}
			taken += grow
			buf = append(make([]byte, 0, cap(buf)+grow), buf...)
		}
	}
}

// plainUpgrade reports whether a request asks for what the upstream would take
// for requests that come from here, such as HTTP/2 without TLS.
func plainUpgrade(h http.Header) bool {
	for _, v := range h.Values("Upgrade") {
		for t := range strings.SplitSeq(v, ",") {
			name, _, _ := strings.Cut(strings.TrimSpace(t), "/")
			if strings.EqualFold(name, "h2c") || strings.EqualFold(name, "http") || strings.EqualFold(name, "tls") {
				return true
			}
		}
	}
	return false
}

// upgrade reports whether a request asks for another protocol.
func upgrade(h http.Header) bool {
	if h.Get("Upgrade") != "" {
		return true
	}
	for _, v := range h.Values("Connection") {
		for t := range strings.SplitSeq(v, ",") {
			if strings.EqualFold(strings.TrimSpace(t), "upgrade") {
				return true
			}
		}
	}
	return false
}
