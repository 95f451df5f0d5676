package session

import (
	"bytes"
	"crypto/ecdh"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"testing/cryptotest"
	"time"
	"unicode/utf8"
)

func fullReport() *Report {
	return &Report{
		Enforcer: "mcp-eu-1", Boot: WriterID{1}, Count: 7, Prev: Hash{9}, Time: 1793610000000, Key: KeyID{3},
		Encapsulated: [32]byte{4}, Sealed: []byte("sealed"), Unknown: []Field{{Tag: 2, Value: []byte{2}}},
	}
}

func fullCaller() Caller {
	return Caller{
		Tenant: "acme", Issuer: "https://id.example", User: "alice", Session: "s_9f2c", Client: "cli",
		Actors:    []Actor{{ID: "spiffe://corp/agent/billing"}, {Issuer: "https://other.example", ID: "planner"}},
		Ancestors: []Actor{{ID: "s_root"}},
	}
}

func fullContent() *TrailContent {
	return &TrailContent{
		Totals: TrailTotals{Calls: 1000, Denied: 20, Sampled: 9, Dropped: 2, Folded: 1, Untracked: 3},
		Records: []TrailRecord{
			{
				Decision: DecisionDenied, Cause: CauseRevoked, Effect: EffectRevoked, Reason: ReasonStolenToken, Provisional: true,
				Count: 12, First: 1793610000000, Last: 1793610009000, Latency: 40 * time.Microsecond, Epoch: 2, Checked: 48213, Sequence: 48213,
				Caller: fullCaller(), Token: "jti-1", Method: "tools/call", Tool: "delete_repo", Audience: "https://tools.example/mcp",
				Arguments: Hash{5}, Trace: TraceContext{[16]byte{6}, [8]byte{7}}, Transaction: "txn-97", Incident: "INC-142",
				Detail: "because", Unknown: []Field{{Tag: 99, Value: []byte("later")}},
			},
			{Decision: DecisionAllowed, Count: 1, First: 1793610000000, Last: 1793610000000},
			{Decision: DecisionCut, Cause: 77, Effect: 9, Reason: 99, Count: 1},
		},
		Sightings: []Sighting{{Caller: fullCaller(), First: 1, Last: 2, Calls: 3, Denied: 1, Unknown: []Field{{Tag: 99, Value: []byte{}}}}},
		Unknown:   []Field{{Tag: 1, Value: []byte("z")}},
	}
}

func sealingKey(t testing.TB, b byte) *ecdh.PrivateKey {
	t.Helper()
	k, err := ecdh.X25519().NewPrivateKey(bytes.Repeat([]byte{b}, 32))
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// TestReportIsSealed: nobody but the holder of the sealing key reads it, and
// nothing of what is around it can be changed. It fails when the seal does not
// authenticate the head, or is none.
func TestReportIsSealed(t *testing.T) {
	key := sealingKey(t, 1)
	r := Report{Enforcer: "eu-1", Boot: WriterID{1}, Count: 2, Prev: Hash{1}, Time: 5}
	frame, hash, err := r.Seal(fullContent(), key.PublicKey().Bytes(), testKey(1))
	if err != nil {
		t.Fatal(err)
	}
	f, err := ParseFrame(frame)
	if err != nil || f.Verify(testPublic(1)) != nil || f.Hash() != hash || f.Type != TypeReport {
		t.Fatalf("frame: %v", err)
	}
	got, err := UnmarshalReport(f.Body)
	if err != nil {
		t.Fatal(err)
	}
	content, err := got.Unseal(key)
	if err != nil || !reflect.DeepEqual(content, fullContent()) {
		t.Fatalf("%+v, %v", content, err)
	}
	for _, secret := range []string{"alice", "s_9f2c", "delete_repo", "billing", "acme", "INC-142", "txn-97", "tools/call"} {
		if bytes.Contains(frame, []byte(secret)) {
			t.Errorf("%q can be read", secret)
		}
	}
	for name, change := range map[string]func(*Report){
		"another enforcer":         func(r *Report) { r.Enforcer = "eu-2" },
		"another boot":             func(r *Report) { r.Boot[0]++ },
		"another number":           func(r *Report) { r.Count++ },
		"another predecessor":      func(r *Report) { r.Prev[0]++ },
		"another time":             func(r *Report) { r.Time++ },
		"another key's name":       func(r *Report) { r.Key[0]++ },
		"another encapsulation":    func(r *Report) { r.Encapsulated[0]++ },
		"an encapsulation of zero": func(r *Report) { r.Encapsulated = [32]byte{} },
		"a bit of the seal":        func(r *Report) { r.Sealed = bytes.Clone(r.Sealed); r.Sealed[9] ^= 1 },
		"a shorter seal":           func(r *Report) { r.Sealed = r.Sealed[:len(r.Sealed)-1] },
		"no seal":                  func(r *Report) { r.Sealed = nil },
	} {
		x := *got
		change(&x)
		if _, err := x.Unseal(key); !errors.Is(err, ErrSealed) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := got.Unseal(sealingKey(t, 2)); !errors.Is(err, ErrSealed) {
		t.Errorf("another's key: %v", err)
	}
	if _, _, err := r.Seal(fullContent(), []byte("short"), testKey(1)); !errors.Is(err, ErrInvalid) {
		t.Errorf("no sealing key: %v", err)
	}
}

// TestReportsAreBounded: what a recorder may put into one fits it, with a name
// of any length, and no more does.
func TestReportsAreBounded(t *testing.T) {
	long := strings.Repeat("x", MaxReportText)
	var chain []Actor
	for range MaxReportChain {
		chain = append(chain, Actor{long, long})
	}
	largest := TrailRecord{
		Decision: DecisionDenied, Cause: CauseOther, Count: 1, First: 1, Last: 1,
		Caller: Caller{Tenant: long, Issuer: long, User: long, Session: long, Client: long, Actors: chain, Ancestors: chain},
		Token:  long, Method: long, Tool: long, Audience: long, Arguments: Hash{1}, Trace: TraceContext{TraceID: [16]byte{1}},
		Transaction: long, Incident: long, Detail: long,
	}
	n, err := largest.MarshaledLen()
	if err != nil || n > MaxReportItemLen {
		t.Fatalf("the largest record has %d bytes, %v", n, err)
	}
	c := &TrailContent{}
	for left := MaxReportContent; left >= n; left -= n {
		c.Records = append(c.Records, largest)
	}
	// What is left is filled up to the last byte.
	rest := MaxReportContent - len(c.Records)*n
	s := Sighting{First: 1, Last: 1, Calls: 1}
	size, err := s.MarshaledLen()
	if err != nil {
		t.Fatal(err)
	}
	for ; rest >= size && len(c.Sightings) < MaxReportItems; rest -= size {
		c.Sightings = append(c.Sightings, s)
	}
	r := Report{Enforcer: strings.Repeat("e", 64), Boot: WriterID{1}, Count: 2, Prev: Hash{1}, Time: 5}
	frame, _, err := r.Seal(c, sealingKey(t, 1).PublicKey().Bytes(), testKey(1))
	if err != nil {
		t.Fatalf("%d bytes left: %v", rest, err)
	}
	t.Logf("%d bytes of %d", len(frame), MaxReportLen)
	c.Records = append(c.Records, largest)
	if _, _, err := r.Seal(c, sealingKey(t, 1).PublicKey().Bytes(), testKey(1)); !errors.Is(err, ErrMalformed) {
		t.Errorf("one more: %v", err)
	}
}

func TestContentsThatAreRefused(t *testing.T) {
	record := func(change func(*TrailRecord)) error {
		c := fullContent()
		change(&c.Records[0])
		return second(c.Marshal())
	}
	sighting := func(change func(*Sighting)) error {
		c := fullContent()
		change(&c.Sightings[0])
		return second(c.Marshal())
	}
	report := func(change func(*Report)) error {
		r := fullReport()
		change(r)
		return second(r.MarshalBody())
	}
	for name, err := range map[string]error{
		"a record of nothing":             record(func(t *TrailRecord) { t.Count = 0 }),
		"a record that ends before it is": record(func(t *TrailRecord) { t.Last = t.First - 1 }),
		"a negative latency":              record(func(t *TrailRecord) { t.Latency = -1 }),
		"no decision":                     record(func(t *TrailRecord) { t.Decision = 0 }),
		"a decision that is none":         record(func(t *TrailRecord) { t.Decision = 4 }),
		"a long text":                     record(func(t *TrailRecord) { t.Tool = strings.Repeat("x", MaxReportText+1) }),
		"a control character":             record(func(t *TrailRecord) { t.Method = "a\nb" }),
		"a long chain":                    record(func(t *TrailRecord) { t.Caller.Actors = make([]Actor, MaxReportChain+1) }),
		"a link of nothing":               record(func(t *TrailRecord) { t.Caller.Ancestors = []Actor{{Issuer: "x"}} }),
		"a known tag for an unknown":      record(func(t *TrailRecord) { t.Unknown = []Field{{Tag: tagDetail}} }),
		"a sighting of nothing":           sighting(func(s *Sighting) { s.Calls = 0 }),
		"more denials than calls":         sighting(func(s *Sighting) { s.Denied = 4 }),
		"a sighting out of time":          sighting(func(s *Sighting) { s.Last = 0 }),
		"a report without name":           report(func(r *Report) { r.Enforcer = "" }),
		"a report without number":         report(func(r *Report) { r.Count = 0 }),
		"a first one with a predecessor":  report(func(r *Report) { r.Count = 1 }),
		"a second one without":            report(func(r *Report) { r.Prev = Hash{} }),
		"a report from before 1970":       report(func(r *Report) { r.Time = -1 }),
		"too much":                        report(func(r *Report) { r.Sealed = make([]byte, MaxReportLen+1) }),
		"too many records":                second((&TrailContent{Records: make([]TrailRecord, MaxReportItems+1)}).Marshal()),
		"too many sightings":              second((&TrailContent{Sightings: make([]Sighting, MaxReportItems+1)}).Marshal()),
	} {
		if !errors.Is(err, ErrMalformed) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestCauseOf(t *testing.T) {
	seen := map[string]bool{}
	for _, c := range causes {
		if got := CauseOf(fmt.Errorf("wrapped: %w", &DeniedError{Err: c.err})); got != c.cause || seen[got.String()] {
			t.Errorf("%v is %v", c.err, got)
		}
		seen[c.cause.String()] = true
	}
	if CauseOf(nil) != CauseNone || CauseNone.String() != "" || CauseOf(errors.New("x")) != CauseOther || CauseOther.String() != "denied" {
		t.Error("none and other")
	}
}

func TestReportText(t *testing.T) {
	long := strings.Repeat("é", 300)
	for _, tt := range []struct{ in, want string }{
		{"", ""}, {"alice", "alice"}, {"a\nb\x00", "a\uFFFDb\uFFFD"}, {"a\xffb", "a\uFFFDb"},
		{strings.Repeat("x", MaxReportText), strings.Repeat("x", MaxReportText)},
	} {
		if got := ReportText(tt.in); got != tt.want {
			t.Errorf("%q: %q", tt.in, got)
		}
	}
	for _, s := range []string{long, strings.Repeat("\xff", 300), strings.Repeat("\x01", 256), strings.Repeat("€", 100) + "\xff", "x" + long} {
		got := ReportText(s)
		if len(got) > MaxReportText || !utf8.ValidString(got) || checkText("", got, MaxReportText) != nil || got != ReportText(s) {
			t.Errorf("%q: %q", s, got)
		}
		if ReportText(got) != got {
			t.Errorf("not stable: %q", got)
		}
		if ReportText(s+"y") == got {
			t.Errorf("%q and another are one", s)
		}
	}
}

func TestArgumentDigest(t *testing.T) {
	s, err := NewTenantSecret(7, "acme", bytes.Repeat([]byte{1}, 32))
	if err != nil {
		t.Fatal(err)
	}
	other, err := NewTenantSecret(7, "acme", bytes.Repeat([]byte{2}, 32))
	if err != nil {
		t.Fatal(err)
	}
	d := s.ArgumentDigest([]byte(`{"amount":5}`))
	if d != s.ArgumentDigest([]byte(`{"amount":5}`)) || d == s.ArgumentDigest([]byte(`{"amount":6}`)) || d == other.ArgumentDigest([]byte(`{"amount":5}`)) {
		t.Error("the digest does not tell what it should")
	}
	if (*TenantSecret)(nil).ArgumentDigest(nil) != (Hash{}) {
		t.Error("a digest without a key")
	}
	mac := hmac.New(sha256.New, bytes.Repeat([]byte{1}, 32))
	mac.Write([]byte(`ia1{"amount":5}`))
	if want := mac.Sum(nil); !bytes.Equal(d[:], want) {
		t.Errorf("%x, want %x", d, want)
	}
}

// TestVectorsReport pins the seal: with this key the frame opens to this content.
func TestVectorsReport(t *testing.T) {
	cryptotest.SetGlobalRandom(t, 1)
	key := sealingKey(t, 1)
	r := Report{Enforcer: "mcp-eu-1", Boot: WriterID{1}, Count: 7, Prev: Hash{9}, Time: 1793610000000}
	frame, _, err := r.Seal(fullContent(), key.PublicKey().Bytes(), testKey(1))
	if err != nil {
		t.Fatal(err)
	}
	type vector struct {
		Secret  string          `json:"sealing_secret"`
		Public  string          `json:"sealing_public"`
		Signer  string          `json:"signer_public"`
		Frame   string          `json:"frame"`
		Content string          `json:"content"`
		Fields  json.RawMessage `json:"fields"`
	}
	fields, err := json.Marshal(plain(reflect.ValueOf(fullContent())))
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "report", vector{
		hex.EncodeToString(key.Bytes()), hex.EncodeToString(key.PublicKey().Bytes()), hex.EncodeToString(testPublic(1)),
		hex.EncodeToString(frame), hex.EncodeToString(must(fullContent().Marshal())), fields,
	})
	// The file alone suffices.
	raw, err := os.ReadFile(filepath.Join("testdata", "vectors", "report.json"))
	if err != nil {
		t.Fatal(err)
	}
	var v vector
	if err := json.Unmarshal(raw, &v); err != nil {
		t.Fatal(err)
	}
	b, err := hex.DecodeString(v.Frame)
	if err != nil {
		t.Fatal(err)
	}
	f, err := ParseFrame(b)
	if err != nil || f.Verify(testPublic(1)) != nil {
		t.Fatal(err)
	}
	got, err := UnmarshalReport(f.Body)
	if err != nil {
		t.Fatal(err)
	}
	content, err := got.Unseal(key)
	if err != nil || hex.EncodeToString(must(content.Marshal())) != v.Content {
		t.Fatal(err)
	}
}

func TestAuditKey(t *testing.T) {
	ks := fullKeySet()
	if _, ok := ks.AuditKey(); ok {
		t.Error("a key for signing is none for sealing")
	}
	for i := range 3 {
		ks.Keys = append(ks.Keys, SigningKey{Public: testPublic(byte(20 + i)), Use: UseAudit, Withdrawn: i == 2})
	}
	if k, ok := ks.AuditKey(); !ok || !bytes.Equal(k, testPublic(21)) {
		t.Errorf("%x, %v: want the newest that is not withdrawn", k, ok)
	}
}
