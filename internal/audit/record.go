// Package audit keeps what was done at the authorities, and by whom, so that
// nobody can change it unseen.
//
// The audit is one chain of records in a JetStream stream. Each record has a
// number and goes on from the hash of the one before; they are stored in batches,
// sealed to the authority's audit key, since they name people, and every batch
// ends in a signed statement of where the chain then is. Any number of
// authorities write it: each appends behind the last batch that it has read, by
// expected sequence, and whoever comes second reads on and chains anew.
//
// What is exported can be verified offline, by Verify, with the pinned root.
// docs/audit.md says what that proves; docs/decisions/0017 why it is so.
package audit

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/interlock-fabric/interlock/pkg/authority"
	"github.com/interlock-fabric/interlock/pkg/session"
)

const (
	// maxRecord bounds an encoded record in bytes. Targets that do not fit are
	// counted instead.
	maxRecord = 256 << 10
	// maxTexts bounds the targets and the callers of a record.
	maxTexts = 1000
)

// ErrTooLong: the record has more than fits one, beside its targets.
var ErrTooLong = errors.New("audit: record too long")

// encode returns the body of a record: JSON in one line, deterministic but for
// its salt. Texts are cut to their bounds.
func encode(r authority.AuditRecord) ([]byte, error) {
	if r.Time.IsZero() {
		r.Time = time.Now()
	}
	r.Time = r.Time.UTC().Truncate(time.Millisecond)
	var salt [16]byte
	_, _ = rand.Read(salt[:]) // crypto/rand never fails
	r.Salt = hex.EncodeToString(salt[:])
	for _, s := range []*string{
		&r.Kind, &r.Action, &r.Outcome, &r.Authority, &r.Principal.Name, &r.Principal.Means, &r.Reason, &r.Incident,
		&r.Error, &r.Detail, &r.TraceID, &r.ParentID, &r.Decision,
	} {
		*s = session.ReportText(*s)
	}
	if n := len(r.Targets) - maxTexts; n > 0 {
		r.Targets, r.Left = r.Targets[:maxTexts], r.Left+n
	}
	targets := make([]string, len(r.Targets))
	for i, s := range r.Targets {
		targets[i] = session.ReportText(s)
	}
	r.Targets = targets
	tenants := make([]string, min(len(r.Tenants), maxTexts))
	for i := range tenants {
		tenants[i] = session.ReportText(r.Tenants[i])
	}
	if len(tenants) < len(r.Tenants) {
		tenants = nil // more than can be said: for those who see all
	}
	r.Tenants = tenants
	callers := make([]authority.AuditCaller, min(len(r.Callers), maxTexts))
	for i, c := range r.Callers[:len(callers)] {
		for _, s := range []*string{&c.Tenant, &c.Agent, &c.User, &c.Client, &c.Session} {
			*s = session.ReportText(*s)
		}
		callers[i] = c
	}
	r.Callers = callers
	for {
		b, err := marshal(&r)
		if err != nil {
			return nil, fmt.Errorf("audit: %w", err)
		}
		if len(b) <= maxRecord {
			return b, nil
		}
		if len(r.Targets) == 0 && len(r.Callers) == 0 {
			return nil, fmt.Errorf("%w: %d bytes", ErrTooLong, len(b))
		}
		half := len(r.Targets) / 2
		r.Left += len(r.Targets) - half
		r.Targets, r.Callers = r.Targets[:half], r.Callers[:min(half, len(r.Callers))]
	}
}

func marshal(v any) ([]byte, error) {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(v); err != nil {
		return nil, err
	}
	return bytes.TrimSuffix(b.Bytes(), []byte("\n")), nil
}

const chainContext = "interlock audit 1\x00"

// link returns the hash of a record: over its number, the hash of the one before
// and the digest of its body, so that a body can be left out of an export.
func link(number uint64, prev, digest session.Hash) session.Hash {
	b := make([]byte, 0, len(chainContext)+8+2*sha256.Size)
	b = append(b, chainContext...)
	b = binary.BigEndian.AppendUint64(b, number)
	b = append(append(b, prev[:]...), digest[:]...)
	return sha256.Sum256(b)
}

// sum is a session.Hash that is hex in JSON, spelled in one way only.
type sum session.Hash

// MarshalText implements encoding.TextMarshaler.
func (s sum) MarshalText() ([]byte, error) { return hex.AppendEncode(nil, s[:]), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (s *sum) UnmarshalText(b []byte) error {
	if len(b) != hex.EncodedLen(len(s)) || bytes.ContainsAny(b, "ABCDEF") {
		return errors.New("not a hash")
	}
	_, err := hex.Decode(s[:], b)
	return err
}

// statement is what an authority signs: where the chain is at the end of a batch
// or of an export. It is JSON in a frame of type session.TypeAudit.
type statement struct {
	// For is one of the purposes below: a statement for one is none for another.
	For string `json:"for"`
	// Number and Hash are of the newest record that it speaks of. First and Prev
	// are those of the first of the batch or export, and of the one before that.
	Number uint64          `json:"number"`
	Hash   sum             `json:"hash"`
	First  uint64          `json:"first"`
	Prev   sum             `json:"prev"`
	Time   session.Instant `json:"time"`
	// Partial is set in an export that was not asked to begin with the oldest.
	Partial bool `json:"partial,omitempty"`
	// Floor is the oldest record that is kept, and Below the hash of the one
	// before it: what is older was removed by the authority itself.
	Floor uint64 `json:"floor"`
	Below sum    `json:"below"`
	// Epoch and Log are the newest decision that the authority knew of, and
	// KeySet the version of its key set.
	Epoch  uint64 `json:"epoch"`
	Log    uint64 `json:"log"`
	KeySet uint64 `json:"keyset"`
	// Reports is up to where the stream of reports has been audited, in a batch.
	Reports uint64 `json:"reports,omitempty"`
	// Walked is before which place of the log of decisions every decision is known
	// to have its record, in a batch.
	Walked Place `json:"walked,omitzero"`
	// Filter is what an export was asked for, and Tenants whose view it is, if not
	// that of everything: the authority says that it has all that match there.
	Filter  string   `json:"filter,omitempty"`
	Tenants []string `json:"tenants,omitempty"`
	// Sum is of the sealed part of a batch, or of all of an export that comes
	// before the statement.
	Sum sum `json:"sum"`
}

// The purposes of statements.
const (
	forBatch    = "batch"
	forExport   = "export"
	forReceipts = "receipts"
)

type traceKey struct{}

// WithTrace returns a context of a request with a W3C trace context.
func WithTrace(ctx context.Context, t session.TraceContext) context.Context {
	return context.WithValue(ctx, traceKey{}, t)
}

// TraceOf returns the trace context of the request of ctx, or zero.
func TraceOf(ctx context.Context) session.TraceContext {
	t, _ := ctx.Value(traceKey{}).(session.TraceContext)
	return t
}
