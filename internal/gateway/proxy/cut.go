package proxy

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"strings"
	"time"

	"github.com/interlock-fabric/interlock/internal/gateway/config"
	"github.com/interlock-fabric/interlock/internal/gateway/operation"
	"github.com/interlock-fabric/interlock/internal/gateway/route"
	"github.com/interlock-fabric/interlock/pkg/denial"
)

const (
	headerSession = "Mcp-Session-Id"
	headerVersion = "Mcp-Protocol-Version"
)

// answered sees the beginning of an upstream's answer.
func (p *Proxy) answered(res *http.Response) error {
	x := exchangeOf(res.Request.Context())
	if d := route.Denied(x.bound); d != nil {
		return d
	}
	if x.g.Route.Protocol == config.MCP {
		if err := p.opts.Sessions.answered(x, res); err != nil {
			return err
		}
	}
	if x.cards != nil {
		if err := x.rewriteCard(res); err != nil {
			return err
		}
	}
	if res.StatusCode == http.StatusSwitchingProtocols {
		x.upgraded = true
		return nil // both directions end with the context
	}
	b := &body{ReadCloser: res.Body, x: x, res: res}
	mt, _, _ := mime.ParseMediaType(res.Header.Get("Content-Type"))
	switch {
	case mt == "text/event-stream" && res.Header.Get("Content-Encoding") == "":
		b.form = events
	case operation.GRPC(res.Header):
		b.form = grpc
	}
	if x.exec != nil && res.StatusCode == http.StatusOK && res.Header.Get("Content-Encoding") == "" {
		b.find = &finder{form: b.form, rpc: !x.exec.rest, part: x.exec.part}
		if b.form != opaque && x.op.Method == "SendStreamingMessage" {
			b.ReadCloser = x.hear(res.Body, b.find)
		}
	}
	res.Body = b
	return nil
}

// form is how an answer that has begun can be ended in order.
type form uint8

const (
	opaque form = iota // not at all
	events
	grpc
)

// body is an upstream's body until the caller must stop, and then the last words.
type body struct {
	io.ReadCloser
	x    *exchange
	res  *http.Response
	form form
	// tail is what is left of the last words; nil while there are none.
	tail *bytes.Reader
	// last are the last two bytes of an event stream, carriage returns left out.
	last [2]byte
	any  bool
	// find looks for the task that the answer is about; nil when there is no use
	// in it.
	find *finder
}

var errCut = errors.New("cut")

func (b *body) Read(buf []byte) (int, error) {
	if b.tail != nil {
		return b.tail.Read(buf)
	}
	n, err := b.ReadCloser.Read(buf)
	d := route.Denied(b.x.bound)
	if b.x.exec != nil && errors.Is(err, io.EOF) {
		b.res.Trailer = b.x.exec.answer.Trailer
	}
	if b.find != nil {
		id, over := b.find.look(buf[:n])
		if id == "" && d != nil {
			id = b.find.rest()
		}
		if id != "" {
			b.x.learn(id)
		}
		if over && id == "" {
			b.x.exec.mute()
		}
		if over || d != nil {
			b.find = nil
		}
	}
	if d == nil || errors.Is(err, io.EOF) && n == 0 {
		if b.form == events {
			b.follow(buf[:n])
		}
		return n, err
	}
	// Whatever has come since is not the caller's any more.
	b.x.noteCut(d)
	a := b.x.g.Resource.Answer(d)
	switch b.form {
	case events:
		b.tail = bytes.NewReader(b.event(&a))
		return b.tail.Read(buf)
	case grpc:
		b.res.Trailer = http.Header{}
		setGRPC(b.res.Trailer, &a)
		b.tail = bytes.NewReader(nil)
		return 0, io.EOF
	}
	// An answer that looks complete must be complete: the connection ends.
	return 0, errCut
}

// Close ends the answer, with which a message ends that is not one of a stream.
func (b *body) Close() error {
	if b.find != nil && b.x.exec.part != none {
		if id := b.find.rest(); id != "" {
			b.x.learn(id)
		}
		b.find = nil
	}
	return b.ReadCloser.Close()
}

func (b *body) follow(p []byte) {
	for _, c := range p[max(0, len(p)-4):] {
		if c == '\r' {
			continue
		}
		b.last[0], b.last[1], b.any = b.last[1], c, true
	}
}

// event is the last event of a stream: the answer to the call that opened it, or,
// on a stream that answers none, a message that says why.
func (b *body) event(a *denial.Answer) []byte {
	var out []byte
	if b.any && b.last != [2]byte{'\n', '\n'} {
		// In the middle of an event, which thereby becomes one of a type that no
		// client acts on.
		out = append(out, "\nevent: interrupted\n\n"...)
	}
	kind, data := "message", b.x.inWords(a)
	switch {
	case b.x.op.ID != nil:
	case b.x.g.Route.Protocol == config.MCP:
		// A stream that answers no call.
		var err error
		if data, err = json.Marshal(map[string]any{
			"jsonrpc": "2.0", "method": "notifications/message",
			"params": map[string]any{"level": "error", "logger": "interlock", "data": a.Data},
		}); err != nil { // strings and numbers
			return out
		}
	default:
		// A2A's TypeScript client knows an error over REST by the type alone.
		kind = "error"
	}
	return fmt.Appendf(out, "event: %s\ndata: %s\n\n", kind, data)
}

// setGRPC sets the trailers that end a call of gRPC.
func setGRPC(h http.Header, a *denial.Answer) {
	code := map[int]string{http.StatusUnauthorized: "16", http.StatusForbidden: "7"}[a.Status]
	if code == "" {
		code = "14" // UNAVAILABLE
	}
	h.Set("Grpc-Status", code)
	h.Set("Grpc-Message", percent(a.Message))
}

// percent encodes a status message as gRPC over HTTP/2 asks.
func percent(s string) string {
	var b strings.Builder
	for i := range len(s) {
		if c := s[i]; c < ' ' || c > '~' || c == '%' {
			fmt.Fprintf(&b, "%%%02X", c)
		} else {
			b.WriteByte(c)
		}
	}
	return b.String()
}

// denyGRPC answers with trailers alone.
func denyGRPC(w http.ResponseWriter, r *http.Request, a *denial.Answer) {
	if r.ProtoMajor == 1 {
		// What is left of its body is not waited for.
		_ = http.NewResponseController(w).SetReadDeadline(time.Now().Add(refusedReadTime))
	}
	h := w.Header()
	a.Header(h, r.Header.Get("Authorization") != "")
	h.Set("Content-Type", "application/grpc")
	setGRPC(h, a)
	w.WriteHeader(http.StatusOK)
}
