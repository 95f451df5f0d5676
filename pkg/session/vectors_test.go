package session

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"
	"unicode"
)

var update = flag.Bool("update", false, "write the golden vectors instead of comparing with them")

// golden compares a document with its file, or writes it with -update. The
// files are for implementations in other languages: bytes are hex, 64-bit
// integers are decimal strings, names are those of docs/design/wire.md.
func golden(t *testing.T, name string, doc any) {
	t.Helper()
	got, err := json.MarshalIndent(doc, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	got = append(got, '\n')
	path := filepath.Join("testdata", "vectors", name+".json")
	if *update {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s has changed. The wire form is a promise: a new form takes a new version. If the vectors grew, run go test -run %s -update .", path, t.Name())
	}
}

// plain renders a message for a reader in any language.
func plain(v reflect.Value) any {
	switch v.Kind() {
	case reflect.Pointer:
		return plain(v.Elem())
	case reflect.Struct:
		out := map[string]any{}
		for i := range v.NumField() {
			if f := v.Type().Field(i); f.IsExported() {
				out[snake(f.Name)] = plain(v.Field(i))
			}
		}
		return out
	case reflect.Slice, reflect.Array:
		if v.Type().Elem().Kind() == reflect.Uint8 {
			b := make([]byte, v.Len())
			reflect.Copy(reflect.ValueOf(b), v)
			return hex.EncodeToString(b)
		}
		if v.Kind() == reflect.Slice && v.IsNil() {
			return nil
		}
		out := make([]any, v.Len())
		for i := range out {
			out[i] = plain(v.Index(i))
		}
		return out
	case reflect.Int64:
		return fmt.Sprint(v.Int())
	case reflect.Uint64:
		return fmt.Sprint(v.Uint())
	default:
		return v.Interface()
	}
}

// snake turns IssuedBefore into issued_before, and ACR into acr.
func snake(name string) string {
	var b strings.Builder
	lower := false
	for _, r := range name {
		if unicode.IsUpper(r) && lower {
			b.WriteByte('_')
		}
		lower = unicode.IsLower(r)
		b.WriteRune(unicode.ToLower(r))
	}
	return b.String()
}

func TestVectorsCanonical(t *testing.T) {
	type vector struct {
		Kind  string `json:"kind"`
		Input string `json:"input"`
		// Output is the canonical form; nil is refused.
		Output *string `json:"output"`
	}
	var doc []vector
	for _, in := range []struct {
		kind  Kind
		value string
	}{
		{KindUser, "Alice"}, {KindUser, "https://X.example:443"}, {KindUser, "e\u0301"}, {KindUser, ""}, {KindUser, "a\nb"},
		{KindTenant, "acme.eu-1_x"}, {KindTenant, "Acme"},
		{KindAgent, "Billing-Bot"}, {KindAgent, "DID:Web:Example.com#key-1"}, {KindAgent, "did:web:"},
		{KindAgent, "urn:UUID:6E8BC430-9C3A-11D9-9669-0800200C9A66"}, {KindAgent, "urn:Example:Bot?+r#f"},
		{KindAgent, "SPIFFE://Prod.example/ns/Bot"}, {KindAgent, "spiffe://prod.example/ns/"}, {KindAgent, "spiffe://prod.example/a/../b"},
		{KindAudience, "HTTPS://API.example:443/Mcp?q=A#f"}, {KindAudience, "http://api.example"}, {KindAudience, "https://[2001:DB8::1]:8443"},
		{KindAudience, "https://u@api.example/"}, {KindAudience, "https://\u212aelvin.example/"}, {KindAudience, "payments"},
		{KindCredential, "HTTPS://Issuer.example/status/3#94567"}, {KindCredential, "did:web:a.example#cred-1"},
		{KindKey, "jkt:" + jkt}, {KindKey, "x5t#S256:" + jkt}, {KindKey, "apikey:" + sha256Hex}, {KindKey, jkt},
		{KindDigest, "image:sha256:" + strings.ToUpper(sha256Hex)}, {KindDigest, "image:sha512:00"},
		{KindTool, "Files.Delete"}, {KindTool, strings.Repeat("t", 257)},
	} {
		v := vector{Kind: in.kind.String(), Input: in.value}
		if out, err := Canonical(in.kind, in.value); err == nil {
			v.Output = &out
		}
		doc = append(doc, v)
	}
	golden(t, "canonical", doc)
}

type keyJSON struct {
	Shape  string `json:"shape"`
	Number uint8  `json:"number"`
	Wire   string `json:"wire"`
}

func wireKey(k Key) keyJSON {
	var w writer
	w.key(k)
	return keyJSON{k.Shape.String(), uint8(k.Shape), hex.EncodeToString(w.b)}
}

type termJSON struct {
	Kind   string `json:"kind"`
	Issuer string `json:"issuer,omitempty"`
	Value  string `json:"value"`
}

func TestVectorsKeys(t *testing.T) {
	raw, err := hex.DecodeString("000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f")
	if err != nil {
		t.Fatal(err)
	}
	s, err := NewTenantSecret(7, "acme", raw)
	if err != nil {
		t.Fatal(err)
	}
	values := map[Kind]Term{
		KindIssuer: {Value: testIssuer}, KindUser: {Issuer: testIssuer, Value: "alice"}, KindAgent: {Issuer: testIssuer, Value: "billing-bot"},
		KindClient: {Issuer: testIssuer, Value: "app"}, KindSession: {Issuer: testIssuer, Value: "s_9f2c"}, KindToken: {Issuer: testIssuer, Value: "jti-1"},
		KindCredential: {Value: "https://vc.example/1#2"}, KindKey: {Value: "jkt:" + jkt}, KindDigest: {Value: "model:sha256:" + sha256Hex},
		KindBlueprint: {Value: "bp-1"}, KindOwner: {Value: "did:web:owner.example"}, KindRole: {Value: "admin"}, KindCapability: {Value: "files:write"},
		KindTool: {Value: "files.delete"}, KindAudience: {Value: "https://api.example/mcp"}, KindTenant: {Value: "acme"},
	}
	type vector struct {
		Tenant string     `json:"tenant"`
		Terms  []termJSON `json:"terms"`
		Key    keyJSON    `json:"key"`
	}
	doc := struct {
		TenantID  TenantID `json:"tenant_id"`
		Tenant    string   `json:"tenant"`
		TenantKey string   `json:"tenant_key"`
		Targets   []vector `json:"targets"`
	}{7, "acme", hex.EncodeToString(raw), nil}
	add := func(target Target) {
		k, err := s.Key(target)
		if err != nil {
			t.Fatal(err)
		}
		v := vector{Tenant: target.Tenant, Key: wireKey(k)}
		for _, term := range target.Terms {
			v.Terms = append(v.Terms, termJSON{term.Kind.String(), term.Issuer, term.Value})
		}
		doc.Targets = append(doc.Targets, v)
	}
	add(Target{Terms: []Term{{Kind: KindGlobal}}})
	shapes := Conjunctions()
	for _, k := range Kinds()[1:] {
		shapes = append(shapes, Shape(k))
	}
	for _, shape := range shapes {
		target := Target{Tenant: "acme"}
		for _, k := range shape.Kinds() {
			term := values[k]
			term.Kind = k
			target.Terms = append(target.Terms, term)
		}
		add(target)
	}
	add(Target{Tenant: "acme", Terms: []Term{{Kind: KindAgent, Issuer: testIssuer, Value: "SPIFFE://Prod.example/bot"}}})
	add(Target{Tenant: "acme", Terms: []Term{{Kind: KindToken, Issuer: testIssuer, Value: TokenValue("", []byte("eyJhbGciOiJFZERTQSJ9.e30"))}}})
	golden(t, "keys", doc)
}

func TestVectorsIdentity(t *testing.T) {
	s := testSecret(t, 7, "acme")
	id := fullIdentity()
	p := mustPrepare(t, s, id)
	call := &Call{Tool: "files.delete", Audience: "https://API.example/mcp"}
	callKeys, err := p.CallKeys(nil, call, PerCallShapes)
	if err != nil {
		t.Fatal(err)
	}
	render := func(keys []Key) (out []keyJSON) {
		for _, k := range keys {
			out = append(out, wireKey(k))
		}
		return out
	}
	refs := func(list ...SessionRef) (out []termJSON) {
		for _, r := range list {
			out = append(out, termJSON{"session", or(r.Issuer, id.Issuer), r.ID})
		}
		return out
	}
	var actors []termJSON
	for _, a := range id.Actors {
		actors = append(actors, termJSON{"agent", or(a.Issuer, id.Issuer), a.ID})
	}
	golden(t, "identity", map[string]any{
		"tenant_id": 7, "tenant_key": strings.Repeat("07", secretLen),
		"identity": map[string]any{
			"issuer": id.Issuer, "token": id.Token, "user": id.User, "client": id.Client,
			"session": refs(id.Session)[0], "ancestors": refs(id.Ancestors...), "actors": actors,
			"keys": id.Keys, "credentials": id.Credentials, "digests": id.Digests, "blueprint": id.Blueprint,
			"owner": id.Owner, "roles": id.Roles, "capabilities": id.Capabilities,
		},
		"call": map[string]string{"tool": call.Tool, "audience": call.Audience},
		"keys": render(p.Keys()), "call_keys": render(callKeys), "share": p.bucket,
	})
}

type messageJSON struct {
	Name   string          `json:"name"`
	Type   FrameType       `json:"type"`
	Fields json.RawMessage `json:"fields"`
	Body   string          `json:"body"`
	Frame  string          `json:"frame"`
	Hash   string          `json:"hash"`
}

type refusedJSON struct {
	Name  string `json:"name"`
	Frame string `json:"frame"`
	// Error is version, malformed, critical or signature.
	Error string `json:"error"`
}

type messagesJSON struct {
	Seed     string        `json:"seed"`
	Public   string        `json:"public"`
	KeyID    string        `json:"key_id"`
	Messages []messageJSON `json:"messages"`
	Refused  []refusedJSON `json:"refused"`
}

var errorNames = map[string]error{"version": ErrVersion, "malformed": ErrMalformed, "critical": ErrCritical, "signature": ErrSignature}

func TestVectorsMessages(t *testing.T) {
	key := testKey(1)
	doc := messagesJSON{hex.EncodeToString(key.Seed()), hex.EncodeToString(testPublic(1)), KeyIDOf(testPublic(1)).String(), nil, nil}
	samples := []any{fullKeySet(), fullBatch(), fullHeartbeat(), fullClock(), fullRejection(), fullReceipt(), fullReport(), fullOrder(), testIndex()}
	all := codecs()
	add := func(name string, typ FrameType, body []byte, sample any) {
		frame, err := Seal(typ, body, key)
		if err != nil {
			t.Fatal(err)
		}
		f, err := ParseFrame(frame)
		if err != nil {
			t.Fatal(err)
		}
		fields, err := json.Marshal(plain(reflect.ValueOf(sample)))
		if err != nil {
			t.Fatal(err)
		}
		hash := f.Hash()
		doc.Messages = append(doc.Messages, messageJSON{name, typ, fields, hex.EncodeToString(body), hex.EncodeToString(frame), hex.EncodeToString(hash[:])})
	}
	for i, c := range all {
		if c.typ != 0 { // a frame's
			add(c.name, c.typ, c.valid[0], samples[i])
		}
	}
	named := fullHeartbeat()
	named.Agents = AgentsRef{1793610000000, Hash{8}}
	add("heartbeat that names agents", TypeHeartbeat, named.MarshalBody(), named)
	refuse := func(name, why string, typ FrameType, body []byte, spoil func([]byte)) {
		frame, err := Seal(typ, body, key)
		if err != nil {
			t.Fatal(err)
		}
		if spoil != nil {
			spoil(frame)
		}
		doc.Refused = append(doc.Refused, refusedJSON{name, hex.EncodeToString(frame), why})
	}
	batch := all[1].valid[1]
	fields := func(f ...byte) []byte {
		return append(append(bytes.Clone(batch[:len(batch)-2]), 0, byte(len(f))), f...)
	}
	refuse("a later version", "version", TypeBatch, batch, func(b []byte) { b[3] = 2 })
	refuse("another magic", "malformed", TypeBatch, batch, func(b []byte) { b[0] = 'J' })
	refuse("a length that is not the body's", "malformed", TypeBatch, batch, func(b []byte) { b[16]++ })
	refuse("a signature of something else", "signature", TypeBatch, batch, func(b []byte) { b[4] = byte(TypeHeartbeat) })
	refuse("an unknown critical field", "critical", TypeBatch, fields(0x81, 0, 0), nil)
	refuse("fields out of order", "malformed", TypeBatch, fields(2, 0, 0, 1, 0, 0), nil)
	refuse("a byte too many", "malformed", TypeBatch, append(bytes.Clone(batch), 0), nil)
	refuse("a count of entries that are not there", "malformed", TypeBatch, append(bytes.Clone(batch[:74]), 0, 9, 0, 0), nil)
	golden(t, "messages", doc)
}

// The files alone suffice: what they say can be parsed, verified and made again.
func TestVectorsCanBeConsumed(t *testing.T) {
	raw, err := os.ReadFile(filepath.Join("testdata", "vectors", "messages.json"))
	if err != nil {
		t.Fatal(err)
	}
	var doc messagesJSON
	if err := json.Unmarshal(raw, &doc); err != nil {
		t.Fatal(err)
	}
	unhex := func(s string) []byte {
		b, err := hex.DecodeString(s)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	parse := map[FrameType]func([]byte) (any, error){
		TypeKeySet:    func(b []byte) (any, error) { return UnmarshalKeySet(b) },
		TypeBatch:     func(b []byte) (any, error) { return UnmarshalBatch(b) },
		TypeHeartbeat: func(b []byte) (any, error) { return UnmarshalHeartbeat(b) },
		TypeClock:     func(b []byte) (any, error) { return UnmarshalClock(b) },
		TypeRejection: func(b []byte) (any, error) { return UnmarshalRejection(b) },
		TypeReceipt:   func(b []byte) (any, error) { return UnmarshalReceipt(b) },
		TypeReport:    func(b []byte) (any, error) { return UnmarshalReport(b) },
		TypeOrder:     func(b []byte) (any, error) { return UnmarshalOrder(b) },
		TypeAgents:    func(b []byte) (any, error) { return UnmarshalAgentIndex(b) },
	}
	if len(doc.Messages) < len(parse) || len(doc.Refused) == 0 {
		t.Fatalf("%d messages, %d refused", len(doc.Messages), len(doc.Refused))
	}
	open := func(frame []byte) (any, *Frame, error) {
		f, err := ParseFrame(frame)
		if err != nil {
			return nil, nil, err
		}
		if err := f.Verify(unhex(doc.Public)); err != nil {
			return nil, nil, err
		}
		v, err := parse[f.Type](f.Body)
		return v, &f, err
	}
	for _, m := range doc.Messages {
		v, f, err := open(unhex(m.Frame))
		if err != nil {
			t.Errorf("%s: %v", m.Name, err)
			continue
		}
		hash := f.Hash()
		if f.Type != m.Type || f.Key.String() != doc.KeyID || hex.EncodeToString(f.Body) != m.Body || hex.EncodeToString(hash[:]) != m.Hash {
			t.Errorf("%s: the frame is not what the vector says", m.Name)
		}
		var want any
		if err := json.Unmarshal(m.Fields, &want); err != nil {
			t.Fatal(err)
		}
		b, err := json.Marshal(plain(reflect.ValueOf(v)))
		if err != nil {
			t.Fatal(err)
		}
		var got any
		if err := json.Unmarshal(b, &got); err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("%s: fields %s, want %s", m.Name, b, m.Fields)
		}
	}
	for _, r := range doc.Refused {
		if _, _, err := open(unhex(r.Frame)); errorNames[r.Error] == nil || !errors.Is(err, errorNames[r.Error]) {
			t.Errorf("%s: %v, want %s", r.Name, err, r.Error)
		}
	}
}

func TestVectorsState(t *testing.T) {
	type vector struct {
		Key    keyJSON         `json:"key"`
		Record json.RawMessage `json:"record"`
		Sum    string          `json:"sum"`
	}
	var total StateDigest
	doc := map[string]any{}
	var records []vector
	for _, in := range []struct {
		key Key
		r   Record
	}{
		{GlobalKey(), Record{Effect: EffectSuspended, Reason: ReasonKill, Since: 1793610000000, Seq: 1, Incident: "INC-143", Share: 2500, Except: []Key{testKeyOf(Shape(KindUser))}}},
		{testKeyOf(Shape(KindSession)), Record{Effect: EffectRevoked, Reason: ReasonStolenToken, Since: 1793610000000, Seq: 2, Expires: 1793613600000}},
		{testKeyOf(ShapeUserAgent), Record{Effect: EffectStepUp, Since: 1793610000000, Seq: 3, ACR: "mfa", IssuedBefore: 1793609000000, Drill: true}},
	} {
		sum := in.r.Sum(in.key)
		total.Plus(sum)
		fields, err := json.Marshal(plain(reflect.ValueOf(in.r)))
		if err != nil {
			t.Fatal(err)
		}
		records = append(records, vector{wireKey(in.key), fields, hex.EncodeToString(sum[:])})
	}
	ks := fullKeySet()
	origin := ks.Origin(testPublic(9))
	doc["records"], doc["state"] = records, hex.EncodeToString(total[:])
	doc["origin"] = map[string]string{
		"root": hex.EncodeToString(testPublic(9)), "epoch": fmt.Sprint(ks.Epoch), "salt": hex.EncodeToString(ks.Salt[:]), "origin": hex.EncodeToString(origin[:]),
	}
	golden(t, "state", doc)
}

// A duration renders as its nanoseconds, since plain sees an int64.
func TestPlainRendersDurationsAsNanoseconds(t *testing.T) {
	if got := plain(reflect.ValueOf(Clock{Mono: time.Second})).(map[string]any)["mono"]; got != "1000000000" {
		t.Errorf("%v", got)
	}
}
