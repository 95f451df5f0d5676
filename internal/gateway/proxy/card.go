package proxy

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"

	a2aguard "github.com/interlock-fabric/interlock/adapters/a2a"
	"github.com/interlock-fabric/interlock/internal/gateway/operation"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// extendedCard is the method that asks an agent for the card which it shows to
// callers that it knows.
const extendedCard = "GetExtendedAgentCard"

// maxCardAnswer bounds an answer with a card, which has a bound of its own.
const maxCardAnswer = 512 << 10

// errNoCard is the refusal to show the card of an agent that may not act.
var errNoCard = &operation.Refusal{Status: http.StatusNotFound, Code: -32007, Why: "there is no extended card"}

// discoverable reports whether the agent's card may be shown.
func (x *exchange) discoverable() error {
	err := x.cards.Discoverable()
	if errors.Is(err, session.ErrRevoked) || errors.Is(err, session.ErrSuspended) || errors.Is(err, session.ErrUnregistered) {
		own := *errNoCard
		own.ID = x.op.ID
		return &own
	}
	return err
}

// rewriteCard puts the gateway's addresses into the card in an answer. What is no
// card is not passed on, unless it is an error.
func (x *exchange) rewriteCard(res *http.Response) error {
	if res.StatusCode >= http.StatusMultipleChoices {
		return nil
	}
	if err := x.discoverable(); err != nil {
		return err
	}
	h := res.Header
	h.Set("Cache-Control", "private, no-cache") // it may be revoked
	for _, name := range [...]string{"Etag", "Last-Modified", "Digest", "Content-Digest", "Repr-Digest", "Content-Length"} {
		delete(h, name)
	}
	res.ContentLength = -1
	if res.Request.Method == http.MethodHead {
		return nil
	}
	if h.Get("Content-Encoding") != "" {
		return fmt.Errorf("%w: it is encoded", a2aguard.ErrCard)
	}
	raw, taken, err := x.p.opts.Budget.readAll(res.Body, maxCardAnswer, res.ContentLength)
	x.taken = taken
	if err != nil {
		var refusal *operation.Refusal
		if errors.As(err, &refusal) {
			return fmt.Errorf("%w: %s", a2aguard.ErrCard, refusal.Why) // the agent's fault, and not its caller's
		}
		return err
	}
	var out []byte
	switch {
	case operation.GRPC(h):
		out, err = x.rewriteFrame(raw)
	case x.op.ID != nil:
		out, err = x.rewriteResult(raw)
	default:
		out, err = x.cards.Rewrite(raw)
	}
	if err != nil {
		return err
	}
	_ = res.Body.Close() // it has been read
	res.Body = io.NopCloser(bytes.NewReader(out))
	return nil
}

// rewriteFrame rewrites a card in a message of gRPC. Where there is none, the
// status tells why.
func (x *exchange) rewriteFrame(raw []byte) ([]byte, error) {
	if len(raw) == 0 {
		return nil, nil
	}
	if len(raw) < frameHeader || raw[0] != 0 || frameLen(raw) != len(raw) {
		return nil, fmt.Errorf("%w: not one message that is not compressed", a2aguard.ErrCard)
	}
	card, err := x.cards.RewriteMessage(raw[frameHeader:])
	if err != nil {
		return nil, err
	}
	out := make([]byte, frameHeader, frameHeader+len(card))
	binary.BigEndian.PutUint32(out[1:], uint32(len(card)))
	return append(out, card...), nil
}

// rewriteResult rewrites a card in an answer of JSON-RPC.
func (x *exchange) rewriteResult(raw []byte) ([]byte, error) {
	var m map[string]json.RawMessage
	if err := json.Unmarshal(raw, &m); err != nil || m == nil {
		return nil, fmt.Errorf("%w: not an answer of JSON-RPC", a2aguard.ErrCard)
	}
	for k := range m {
		if k != "result" && strings.EqualFold(k, "result") {
			delete(m, k) // which some readers take for it
		}
	}
	if m["result"] != nil {
		card, err := x.cards.Rewrite(m["result"])
		if err != nil {
			return nil, err
		}
		m["result"] = card
	}
	return json.Marshal(m)
}
