package session

import (
	"crypto/ecdh"
	"crypto/ed25519"
	"crypto/hpke"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// Bounds of reports.
const (
	// MaxReportLen bounds a report's frame in bytes.
	MaxReportLen = 32 << 10
	// MaxReportText bounds a text in a report; ReportText cuts longer ones.
	MaxReportText = 256
	// MaxReportItems bounds the records, and the sightings, of one report.
	MaxReportItems = 512
	// MaxReportChain bounds the actors, and the ancestors, that a report names
	// of one caller. The outermost are left out of longer chains.
	MaxReportChain = 8
	// MaxReportItemLen bounds what MarshaledLen says of a record or a sighting:
	// the fixed part and every text at its longest.
	MaxReportItemLen = 12 << 10
)

// ErrSealed: a report could not be opened with this key. It wraps ErrFrame.
var ErrSealed = fmt.Errorf("%w: cannot be unsealed", ErrFrame)

// Report is what an enforcer tells the authority of calls and callers: a sealed
// TrailContent in a frame that the enforcer's receipt key signs. It is the
// content that names people; of the rest nothing does.
type Report struct {
	// Enforcer is the name under which it was enrolled.
	Enforcer string
	// Boot changes with every start of the recorder. Count numbers the reports
	// of a boot from 1, without holes, and Prev is the hash of the one before,
	// zero for the first: what is missing shows.
	Boot  WriterID
	Count uint64
	Prev  Hash
	// Time is the enforcer's clock when it was sealed.
	Time Instant
	// Key names the sealing key; Encapsulated is HPKE's enc and Sealed its
	// ciphertext (RFC 9180).
	Key          KeyID
	Encapsulated [32]byte
	Sealed       []byte
	// Unknown holds fields of a later version.
	Unknown []Field
}

// sealInfo is HPKE's info: what is sealed for reports opens as nothing else.
const sealInfo = "interlock report 1\x00"

func (c *Report) validate() error {
	switch {
	case !ValidEnforcerName(c.Enforcer):
		return fmt.Errorf("%w: report without the name of an enforcer", ErrMalformed)
	case c.Count == 0 || c.Time < 0:
		return fmt.Errorf("%w: report without number or time", ErrMalformed)
	case (c.Count == 1) != (c.Prev == Hash{}):
		return fmt.Errorf("%w: report %d with the wrong kind of predecessor", ErrMalformed, c.Count)
	case len(c.Sealed) > MaxReportLen:
		return fmt.Errorf("%w: %d sealed bytes", ErrMalformed, len(c.Sealed))
	}
	return checkUnknown(c.Unknown)
}

// head is what comes before the sealed part, and what the seal authenticates
// beside it: a sealed content opens under no other enforcer's name, and at no
// other place.
func (c *Report) head() []byte {
	var w writer
	w.text(c.Enforcer)
	w.raw(c.Boot[:])
	w.u64(c.Count)
	w.raw(c.Prev[:])
	w.instant(c.Time)
	w.raw(c.Key[:])
	return w.b
}

// MarshalBody returns the body of the report's frame. It fails for a report that
// UnmarshalReport would refuse.
func (c *Report) MarshalBody() ([]byte, error) {
	if err := c.validate(); err != nil {
		return nil, err
	}
	w := writer{b: c.head()}
	w.raw(c.Encapsulated[:])
	w.u32(uint32(len(c.Sealed)))
	w.raw(c.Sealed)
	w.fields(nil, c.Unknown)
	return w.b, nil
}

// UnmarshalReport parses a body; the sealed part aliases it. Errors wrap
// ErrMalformed or ErrCritical.
func UnmarshalReport(body []byte) (*Report, error) {
	r := reader{b: body}
	c := &Report{Enforcer: r.text("enforcer", 64)}
	copy(c.Boot[:], r.take(len(c.Boot)))
	c.Count = r.u64()
	copy(c.Prev[:], r.take(len(c.Prev)))
	c.Time = r.instant()
	copy(c.Key[:], r.take(len(c.Key)))
	copy(c.Encapsulated[:], r.take(len(c.Encapsulated)))
	c.Sealed = r.take(r.count(int(r.u32()), MaxReportLen, 1))
	c.Unknown = r.fields(refuseAll)
	if err := r.end(); err != nil {
		return nil, err
	}
	if err := c.validate(); err != nil {
		return nil, err
	}
	return c, nil
}

// Seal seals content for an X25519 key and signs the frame with the enforcer's receipt
// key. It sets Key, Encapsulated and Sealed, and returns the frame and its hash,
// which the next report names as its Prev. It fails for a content that does not
// fit MaxReportLen.
func (c *Report) Seal(content *TrailContent, to []byte, receipt ed25519.PrivateKey) ([]byte, Hash, error) {
	plain, err := content.Marshal()
	if err != nil {
		return nil, Hash{}, err
	}
	pub, err := ecdh.X25519().NewPublicKey(to)
	if err != nil {
		return nil, Hash{}, fmt.Errorf("%w: sealing key", ErrInvalid)
	}
	key, err := hpke.NewDHKEMPublicKey(pub)
	if err != nil {
		return nil, Hash{}, fmt.Errorf("%w: sealing key", ErrInvalid)
	}
	c.Key = KeyIDOf(to)
	enc, sender, err := hpke.NewSender(key, hpke.HKDFSHA256(), hpke.AES256GCM(), []byte(sealInfo))
	if err != nil {
		return nil, Hash{}, fmt.Errorf("%w: sealing: %v", ErrInvalid, err)
	}
	copy(c.Encapsulated[:], enc)
	if c.Sealed, err = sender.Seal(c.head(), plain); err != nil {
		return nil, Hash{}, fmt.Errorf("%w: sealing: %v", ErrInvalid, err)
	}
	body, err := c.MarshalBody()
	if err != nil {
		return nil, Hash{}, err
	}
	if n := frameHeader + len(body) + ed25519.SignatureSize; n > MaxReportLen {
		return nil, Hash{}, fmt.Errorf("%w: report of %d bytes, at most %d", ErrMalformed, n, MaxReportLen)
	}
	frame, err := Seal(TypeReport, body, receipt)
	if err != nil {
		return nil, Hash{}, err
	}
	f, err := ParseFrame(frame)
	return frame, f.Hash(), err
}

// Unseal opens the content. Errors wrap ErrSealed when the key is not the one or
// anything of the report was altered, and ErrMalformed or ErrCritical when what
// was sealed is not a content.
func (c *Report) Unseal(key *ecdh.PrivateKey) (*TrailContent, error) {
	priv, err := hpke.NewDHKEMPrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("%w: not a sealing key", ErrInvalid)
	}
	rec, err := hpke.NewRecipient(c.Encapsulated[:], priv, hpke.HKDFSHA256(), hpke.AES256GCM(), []byte(sealInfo))
	if err != nil {
		return nil, ErrSealed
	}
	plain, err := rec.Open(c.head(), c.Sealed)
	if err != nil {
		return nil, ErrSealed
	}
	return UnmarshalTrailContent(plain)
}

// TrailContent is what is sealed in a report.
type TrailContent struct {
	Totals    TrailTotals
	Records   []TrailRecord
	Sightings []Sighting
	// Unknown holds fields of a later version.
	Unknown []Field
}

// TrailTotals are totals since the recorder's start, so that what is missing
// from the reports is known all the same.
type TrailTotals struct {
	// Calls and Denied count every call and every denied or cut one.
	Calls, Denied uint64
	// Sampled counts the allowed calls that were chosen to be recorded, and
	// Dropped those of them that were dropped again for want of room.
	Sampled, Dropped uint64
	// Folded counts the denials of which only their cause was kept.
	Folded uint64
	// Untracked counts sightings that gave way before they were reported.
	Untracked uint64
}

// Decision is what became of a call.
type Decision uint8

// The decisions.
const (
	DecisionAllowed Decision = 1
	DecisionDenied  Decision = 2 // before any work
	DecisionCut     Decision = 3 // while it was running
)

// String returns the decision's name.
func (d Decision) String() string {
	switch d {
	case DecisionAllowed:
		return "allowed"
	case DecisionDenied:
		return "denied"
	case DecisionCut:
		return "cut"
	}
	return fmt.Sprintf("decision-%d", uint8(d))
}

// Cause says which error a denial was. The numbers are the wire form; unknown
// ones are kept.
type Cause uint8

// The causes. CauseOther is an error that this package does not have.
const (
	CauseNone         Cause = 0
	CauseRevoked      Cause = 1
	CauseSuspended    Cause = 2
	CauseStepUp       Cause = 3
	CauseReduced      Cause = 4
	CauseStale        Cause = 5
	CauseNoIdentity   Cause = 6
	CauseExpired      Cause = 7
	CauseOverloaded   Cause = 8
	CauseClosed       Cause = 9
	CauseUnregistered Cause = 10
	CauseDigest       Cause = 11
	CauseOther        Cause = 255
)

// causes are in the order in which an error that is several is taken for one:
// stale first, as an enforcer or verifier that knows nothing recent cannot tell
// the rest.
var causes = []struct {
	cause Cause
	name  string
	err   error
}{
	{CauseStale, "stale", ErrStale}, {CauseRevoked, "revoked", ErrRevoked}, {CauseSuspended, "suspended", ErrSuspended},
	{CauseStepUp, "step_up", ErrStepUp}, {CauseReduced, "reduced", ErrReduced}, {CauseExpired, "expired", ErrExpired},
	{CauseUnregistered, "unregistered", ErrUnregistered}, {CauseDigest, "digest", ErrDigest}, {CauseNoIdentity, "no_identity", ErrNoIdentity},
	{CauseOverloaded, "overloaded", ErrOverloaded}, {CauseClosed, "closed", ErrClosed},
}

// CauseOf finds the cause of an error; CauseNone of nil.
func CauseOf(err error) Cause {
	if err == nil {
		return CauseNone
	}
	for i := range causes {
		if errors.Is(err, causes[i].err) {
			return causes[i].cause
		}
	}
	return CauseOther
}

// String returns the cause's name; empty for CauseNone.
func (c Cause) String() string {
	switch c {
	case CauseNone:
		return ""
	case CauseOther:
		return "denied"
	}
	for i := range causes {
		if causes[i].cause == c {
			return causes[i].name
		}
	}
	return fmt.Sprintf("cause-%d", uint8(c))
}

// Caller is who a report speaks of. Every text is as ReportText gives it; what
// is not known is empty.
type Caller struct {
	Tenant  string
	Issuer  string
	User    string
	Session string
	Client  string
	// Actors is the delegation chain, the current actor first. Actors and
	// Ancestors have an issuer only where it is not Issuer.
	Actors []Actor
	// Ancestors are the sessions that Session descends from, nearest first.
	Ancestors []Actor
}

// CallerOf returns what a report says of an identity.
func CallerOf(id *Identity) Caller {
	c := Caller{
		Tenant: ReportText(id.Tenant), Issuer: ReportText(id.Issuer), User: ReportText(id.User),
		Session: ReportText(id.Session.ID), Client: ReportText(id.Client),
	}
	link := func(chain []Actor, issuer, value string) []Actor {
		if value == "" || len(chain) == MaxReportChain {
			return chain
		}
		if issuer == id.Issuer {
			issuer = ""
		}
		return append(chain, Actor{Issuer: ReportText(issuer), ID: ReportText(value)})
	}
	for _, a := range id.Actors {
		c.Actors = link(c.Actors, a.Issuer, a.ID)
	}
	for _, a := range id.Ancestors {
		c.Ancestors = link(c.Ancestors, a.Issuer, a.ID)
	}
	return c
}

// TraceContext is of a W3C traceparent: zero when there is none.
type TraceContext struct {
	TraceID [16]byte
	Parent  [8]byte
}

// ParseTraceparent reads a W3C traceparent (Trace Context level 1, §3.2.2); zero
// when it is malformed.
func ParseTraceparent(s string) (t TraceContext) {
	if len(s) < 55 || s[2] != '-' || s[35] != '-' || s[52] != '-' || s[:2] == "ff" || s[:2] == "00" && len(s) != 55 || len(s) > 55 && s[55] != '-' {
		return t
	}
	for _, part := range []string{s[:2], s[3:35], s[36:52], s[53:55]} {
		if strings.Trim(part, "0123456789abcdef") != "" {
			return TraceContext{}
		}
	}
	_, _ = hex.Decode(t.TraceID[:], []byte(s[3:35])) // its digits have been seen to be hex
	_, _ = hex.Decode(t.Parent[:], []byte(s[36:52]))
	if t.TraceID == [16]byte{} || t.Parent == [8]byte{} {
		return TraceContext{}
	}
	return t
}

// TrailRecord is one decision, or several of the same on the same call.
type TrailRecord struct {
	Decision Decision
	Cause    Cause
	// Effect and Reason are those of the entry that decided, where one did.
	Effect Effect
	Reason Reason
	// Provisional is set while that entry was not known to be in the log.
	Provisional bool
	// Count is how many there were, from First to Last, and Latency how long
	// the slowest of them took: the decision, or the work that was cut.
	Count       uint64
	First, Last Instant
	Latency     time.Duration
	// Epoch and Checked are the newest batch that was surely in force when the
	// first was decided. Sequence is that of the entry that decided, 0 if none.
	Epoch, Checked, Sequence uint64

	// Below is of the first alone.

	Caller Caller
	// Token is the credential's id, as TokenValue gives it.
	Token string
	// Method is the protocol's operation, Tool what it was asked of, Audience
	// the resource.
	Method   string
	Tool     string
	Audience string
	// Arguments is their TenantSecret.ArgumentDigest; zero when not known.
	Arguments Hash
	Trace     TraceContext
	// Transaction is the token's `txn` (RFC 8417 §2.2).
	Transaction string
	Incident    string
	// Detail says more, in words that are fit for a caller.
	Detail string
	// Unknown holds fields of a later version.
	Unknown []Field
}

// Sighting is a caller that was seen in use. Calls, Denied, First and Last are
// of the time since the enforcer began to track it, so that of two with the same
// First the one with more Calls is the later.
type Sighting struct {
	Caller        Caller
	First, Last   Instant
	Calls, Denied uint64
	// Unknown holds fields of a later version.
	Unknown []Field
}

// Tags of the fields of a record and a sighting. None is critical: a record of
// which a part is not understood is still a record.
const (
	tagTenant uint8 = 1 + iota
	tagIssuer
	tagUser
	tagSession
	tagClient
	tagActors
	tagAncestors
	tagToken
	tagMethod
	tagTool
	tagAudience
	tagArguments
	tagTrace
	tagTransaction
	tagRecordIncident
	tagDetail
)

var (
	callerTags = []uint8{tagTenant, tagIssuer, tagUser, tagSession, tagClient, tagActors, tagAncestors}
	recordTags = append(callerTags[:len(callerTags):len(callerTags)], tagToken, tagMethod, tagTool, tagAudience, tagArguments, tagTrace, tagTransaction, tagRecordIncident, tagDetail)
)

// texts are the fields that are texts, with their tags.
func (c *Caller) texts() []textField {
	return []textField{{tagTenant, &c.Tenant}, {tagIssuer, &c.Issuer}, {tagUser, &c.User}, {tagSession, &c.Session}, {tagClient, &c.Client}}
}

func (t *TrailRecord) texts() []textField {
	return append(t.Caller.texts(), []textField{
		{tagToken, &t.Token}, {tagMethod, &t.Method}, {tagTool, &t.Tool}, {tagAudience, &t.Audience},
		{tagTransaction, &t.Transaction}, {tagRecordIncident, &t.Incident}, {tagDetail, &t.Detail},
	}...)
}

func byTag(a, b Field) int { return int(a.Tag) - int(b.Tag) }

type textField struct {
	tag uint8
	s   *string
}

func (c *Caller) known(texts []textField) ([]Field, error) {
	var out []Field
	for _, f := range texts {
		if *f.s == "" {
			continue
		}
		if err := checkText("text", *f.s, MaxReportText); err != nil {
			return nil, fmt.Errorf("%w: %v", ErrMalformed, err)
		}
		out = append(out, Field{f.tag, []byte(*f.s)})
	}
	for _, l := range []struct {
		tag   uint8
		links []Actor
	}{{tagActors, c.Actors}, {tagAncestors, c.Ancestors}} {
		if len(l.links) == 0 {
			continue
		}
		if len(l.links) > MaxReportChain {
			return nil, fmt.Errorf("%w: chain of %d", ErrMalformed, len(l.links))
		}
		var w writer
		for _, a := range l.links {
			if a.Issuer != "" && checkText("issuer", a.Issuer, MaxReportText) != nil || checkText("link", a.ID, MaxReportText) != nil {
				return nil, fmt.Errorf("%w: link of a chain", ErrMalformed)
			}
			w.text(a.Issuer)
			w.text(a.ID)
		}
		out = append(out, Field{l.tag, w.b})
	}
	return out, nil
}

// take takes a text field, or a chain.
func (c *Caller) take(texts []textField, tag uint8, r *reader) bool {
	for _, f := range texts {
		if f.tag == tag {
			*f.s = string(r.take(len(r.b)))
			if err := checkText("text", *f.s, MaxReportText); r.err == nil && err != nil {
				r.fail("%v", err)
			}
			return true
		}
	}
	links := map[uint8]*[]Actor{tagActors: &c.Actors, tagAncestors: &c.Ancestors}[tag]
	if links == nil {
		return false
	}
	for r.err == nil && (len(r.b) > 0 || len(*links) == 0) {
		if len(*links) == MaxReportChain {
			r.fail("chain too long")
			break
		}
		a := Actor{Issuer: r.text("issuer", MaxReportText), ID: r.text("link", MaxReportText)}
		if a.ID == "" {
			r.fail("link of nothing")
		}
		*links = append(*links, a)
	}
	return true
}

func (t *TrailRecord) marshal(w *writer) error {
	switch {
	case t.Count == 0 || t.First < 0 || t.Last < t.First || t.Latency < 0:
		return fmt.Errorf("%w: record of nothing, or out of time", ErrMalformed)
	case t.Decision < DecisionAllowed || t.Decision > DecisionCut:
		return fmt.Errorf("%w: %s", ErrMalformed, t.Decision)
	}
	if err := checkUnknown(t.Unknown, recordTags...); err != nil {
		return err
	}
	known, err := t.Caller.known(t.texts())
	if err != nil {
		return err
	}
	if t.Arguments != (Hash{}) {
		known = append(known, Field{tagArguments, t.Arguments[:]})
	}
	if t.Trace != (TraceContext{}) {
		known = append(known, Field{tagTrace, append(t.Trace.TraceID[:len(t.Trace.TraceID):len(t.Trace.TraceID)], t.Trace.Parent[:]...)})
	}
	slices.SortFunc(known, byTag)
	w.u8(uint8(t.Decision))
	w.u8(uint8(t.Cause))
	w.u8(uint8(t.Effect))
	w.u8(uint8(t.Reason))
	var flags uint8
	if t.Provisional {
		flags = 1
	}
	w.u8(flags)
	w.u64(t.Count)
	w.instant(t.First)
	w.instant(t.Last)
	w.u64(uint64(t.Latency))
	w.u64(t.Epoch)
	w.u64(t.Checked)
	w.u64(t.Sequence)
	w.fields(known, t.Unknown)
	return nil
}

func (r *reader) record() (t TrailRecord) {
	t.Decision, t.Cause, t.Effect, t.Reason = Decision(r.u8()), Cause(r.u8()), Effect(r.u8()), Reason(r.u8())
	flags := r.u8()
	t.Provisional = flags == 1
	t.Count, t.First, t.Last, t.Latency = r.u64(), r.instant(), r.instant(), r.duration()
	t.Epoch, t.Checked, t.Sequence = r.u64(), r.u64(), r.u64()
	if flags > 1 || t.Count == 0 || t.Last < t.First || t.Decision < DecisionAllowed || t.Decision > DecisionCut {
		r.fail("record")
	}
	texts := t.texts()
	t.Unknown = r.fields(func(tag uint8, v *reader) bool {
		switch tag {
		case tagArguments:
			if copy(t.Arguments[:], v.take(len(t.Arguments))); t.Arguments == (Hash{}) {
				v.fail("digest of nothing")
			}
		case tagTrace:
			copy(t.Trace.TraceID[:], v.take(16))
			copy(t.Trace.Parent[:], v.take(8))
			if t.Trace == (TraceContext{}) {
				v.fail("trace of nothing")
			}
		default:
			return t.Caller.take(texts, tag, v)
		}
		return true
	})
	if err := checkUnknown(t.Unknown, recordTags...); r.err == nil && err != nil {
		r.err = err
	}
	return t
}

func (s *Sighting) marshal(w *writer) error {
	if s.Calls == 0 || s.Denied > s.Calls || s.First < 0 || s.Last < s.First {
		return fmt.Errorf("%w: sighting of nothing, or out of time", ErrMalformed)
	}
	if err := checkUnknown(s.Unknown, callerTags...); err != nil {
		return err
	}
	known, err := s.Caller.known(s.Caller.texts())
	if err != nil {
		return err
	}
	slices.SortFunc(known, byTag)
	w.instant(s.First)
	w.instant(s.Last)
	w.u64(s.Calls)
	w.u64(s.Denied)
	w.fields(known, s.Unknown)
	return nil
}

func (r *reader) sighting() (s Sighting) {
	s.First, s.Last, s.Calls, s.Denied = r.instant(), r.instant(), r.u64(), r.u64()
	if s.Calls == 0 || s.Denied > s.Calls || s.Last < s.First {
		r.fail("sighting")
	}
	texts := s.Caller.texts()
	s.Unknown = r.fields(func(tag uint8, v *reader) bool { return s.Caller.take(texts, tag, v) })
	if err := checkUnknown(s.Unknown, callerTags...); r.err == nil && err != nil {
		r.err = err
	}
	return s
}

// MarshaledLen returns how many bytes of a content the record takes. It fails
// for a record that could not be parsed.
func (t *TrailRecord) MarshaledLen() (int, error) {
	var w writer
	err := t.marshal(&w)
	return len(w.b), err
}

// MarshaledLen returns how many bytes of a content the sighting takes. It fails
// for one that could not be parsed.
func (s *Sighting) MarshaledLen() (int, error) {
	var w writer
	err := s.marshal(&w)
	return len(w.b), err
}

// MaxReportContent is how many bytes the records and sightings of one content
// may take together, so that its report fits MaxReportLen whatever the
// enforcer's name.
const MaxReportContent = MaxReportLen - 512

func (t *TrailTotals) all() []*uint64 {
	return []*uint64{&t.Calls, &t.Denied, &t.Sampled, &t.Dropped, &t.Folded, &t.Untracked}
}

// Marshal returns the content as it is sealed. It fails for one that
// UnmarshalTrailContent would refuse.
func (c *TrailContent) Marshal() ([]byte, error) {
	if len(c.Records) > MaxReportItems || len(c.Sightings) > MaxReportItems {
		return nil, fmt.Errorf("%w: %d records, %d sightings, at most %d", ErrMalformed, len(c.Records), len(c.Sightings), MaxReportItems)
	}
	if err := checkUnknown(c.Unknown); err != nil {
		return nil, err
	}
	var w writer
	for _, p := range c.Totals.all() {
		w.u64(*p)
	}
	w.u16(uint16(len(c.Records)))
	for i := range c.Records {
		if err := c.Records[i].marshal(&w); err != nil {
			return nil, err
		}
	}
	w.u16(uint16(len(c.Sightings)))
	for i := range c.Sightings {
		if err := c.Sightings[i].marshal(&w); err != nil {
			return nil, err
		}
	}
	w.fields(nil, c.Unknown)
	return w.b, nil
}

// The least lengths of a record and a sighting: their fixed parts.
const (
	minRecordLen   = 5 + 7*8 + 2
	minSightingLen = 4*8 + 2
)

// UnmarshalTrailContent parses what was sealed. Errors wrap ErrMalformed or
// ErrCritical.
func UnmarshalTrailContent(b []byte) (*TrailContent, error) {
	r := reader{b: b}
	c := &TrailContent{}
	for _, p := range c.Totals.all() {
		*p = r.u64()
	}
	for n := r.count(int(r.u16()), MaxReportItems, minRecordLen); n > 0 && r.err == nil; n-- {
		c.Records = append(c.Records, r.record())
	}
	for n := r.count(int(r.u16()), MaxReportItems, minSightingLen); n > 0 && r.err == nil; n-- {
		c.Sightings = append(c.Sightings, r.sighting())
	}
	c.Unknown = r.fields(refuseAll)
	if err := r.end(); err != nil {
		return nil, err
	}
	return c, nil
}

// ReportText returns s as a report carries it: what is not UTF-8, and control
// characters, become U+FFFD, and of more than MaxReportText bytes the first 200
// or so remain, with "…" and the base64url SHA-256 of the whole, so that two
// values stay two and whoever knows one can find it.
func ReportText(s string) string {
	if len(s) <= MaxReportText && checkText("", s, MaxReportText) == nil {
		return s
	}
	whole := s
	clean := func(s string) string {
		return strings.Map(func(r rune) rune {
			if unicode.IsControl(r) {
				return utf8.RuneError
			}
			return r
		}, strings.ToValidUTF8(s, string(utf8.RuneError)))
	}
	if len(s) <= MaxReportText {
		if s = clean(s); len(s) <= MaxReportText {
			return s
		}
	}
	const keep = 200
	s = clean(whole[:min(keep, len(whole))])
	for len(s) > keep || !utf8.ValidString(s) {
		_, n := utf8.DecodeLastRuneInString(s)
		s = s[:len(s)-n]
	}
	sum := sha256.Sum256([]byte(whole))
	return s + "…" + base64.RawURLEncoding.EncodeToString(sum[:])
}
