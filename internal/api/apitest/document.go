// Package apitest holds answers of the Session Authority's API against its OpenAPI
// document, internal/api/openapi.yaml. It is for tests.
package apitest

import (
	"bytes"
	_ "embed" // the schema of OpenAPI documents
	"encoding/json"
	"errors"
	"fmt"
	"mime"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/santhosh-tekuri/jsonschema/v6"
	"go.yaml.in/yaml/v3"

	"github.com/interlock-fabric/interlock/internal/api"
)

// File is where the document is; what is missing belongs there.
const File = "internal/api/openapi.yaml"

// metaSchema is https://spec.openapis.org/oas/3.1/schema/2022-10-07, by the OpenAPI
// Initiative, under the Apache License 2.0.
//
//go:embed oas-3.1.json
var metaSchema []byte

const (
	metaURL = "https://spec.openapis.org/oas/3.1/schema/2022-10-07"
	url     = "https://interlock.example/openapi"
)

// Document is the OpenAPI document, with its schemas compiled. It is safe for
// concurrent use.
type Document struct {
	// Operations are in the order of their paths, then of their methods.
	Operations []*Operation
	// Components are the schemas by name, and Raw the whole document as it is.
	Components map[string]*jsonschema.Schema
	Raw        map[string]any
}

// Operation is what can be done at a path.
type Operation struct {
	Method, Path string // Path has its parameters in braces
	Params       []Param
	// Body is nil where none is taken.
	Body    *jsonschema.Schema
	Samples []Sample // of Body, in the order of the document
	// Answers are by status, then by content type; of one without content it is
	// empty.
	Answers map[int]map[string]Content
	Raw     map[string]any
}

// Param is a parameter.
type Param struct {
	Name, In string // "path", "query" or "header"
	Required bool
	Schema   *jsonschema.Schema
}

// Content is what a body of a content type holds: one value of Schema, or lines,
// or events, that are each one of Parts.
type Content struct {
	Schema, Parts *jsonschema.Schema
	Samples       []Sample
}

// Sample is an example.
type Sample struct {
	Name  string
	Value any
}

// noon is the time at which all examples are set.
var noon = time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)

var moment = regexp.MustCompile(`"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z"`)

// JSON is the example as if it were now that it is noon.
func (s Sample) JSON(now time.Time) []byte {
	b, err := json.Marshal(s.Value)
	if err != nil {
		panic(err) // it came from JSON
	}
	return moment.ReplaceAllFunc(b, func(q []byte) []byte {
		t, err := time.Parse(`"`+time.RFC3339Nano+`"`, string(q))
		if err != nil {
			return q
		}
		return []byte(`"` + now.Add(t.Sub(noon)).UTC().Format(time.RFC3339) + `"`)
	})
}

// Load reads the document. The error says what of OpenAPI 3.1, or of the JSON
// Schema in it, it breaks.
func Load() (*Document, error) {
	d, err := load()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", File, err)
	}
	return d, nil
}

func load() (*Document, error) {
	var node yaml.Node
	var plain any
	if err := errors.Join(yaml.Unmarshal(api.Description, &node), yaml.Unmarshal(api.Description, &plain)); err != nil {
		return nil, err
	}
	b, err := json.Marshal(plain)
	if err != nil {
		return nil, err
	}
	doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(b))
	if err != nil {
		return nil, err
	}
	meta, err := jsonschema.UnmarshalJSON(bytes.NewReader(metaSchema))
	if err != nil {
		return nil, err
	}
	c := jsonschema.NewCompiler()
	c.AssertFormat()
	c.AssertContent()
	if err := errors.Join(c.AddResource(metaURL, meta), c.AddResource(url, doc)); err != nil {
		return nil, err
	}
	m, err := c.Compile(metaURL)
	if err != nil {
		return nil, err
	}
	if err := m.Validate(doc); err != nil {
		return nil, err
	}
	r := &reader{c: c, root: doc.(map[string]any), node: node.Content[0]}
	d := &Document{Raw: r.root, Components: map[string]*jsonschema.Schema{}}
	for name := range r.at("components", "schemas") {
		d.Components[name] = r.schema("components", "schemas", name)
	}
	for path, item := range r.at("paths") {
		for method := range item.(map[string]any) {
			d.Operations = append(d.Operations, r.operation(path, method))
		}
	}
	slices.SortFunc(d.Operations, func(a, b *Operation) int { return strings.Compare(a.Path+" "+a.Method, b.Path+" "+b.Method) })
	return d, r.err
}

// reader reads parts of the document, by their place in it, behind references.
type reader struct {
	c    *jsonschema.Compiler
	root map[string]any
	node *yaml.Node // of the root
	err  error
}

// place follows the references on the way to a place.
func (r *reader) place(at []string) []string {
	var out []string
	v := any(r.root)
	for _, step := range append(at, "") {
		for {
			m, _ := v.(map[string]any)
			ref, ok := m["$ref"].(string)
			if !ok || slices.Contains(out, "schema") || slices.Contains(out, "schemas") { // which the compiler follows
				break
			}
			out = strings.Split(strings.TrimPrefix(ref, "#/"), "/")
			v = any(r.root)
			for _, s := range out {
				v = v.(map[string]any)[s]
			}
		}
		if step == "" {
			break
		}
		out = append(out, step)
		switch x := v.(type) {
		case map[string]any:
			v = x[step]
		case []any:
			i, _ := strconv.Atoi(step) // it is one of those that are there
			v = x[i]
		default:
			v = nil
		}
	}
	return out
}

func (r *reader) get(at ...string) any {
	v := any(r.root)
	for _, step := range r.place(at) {
		switch x := v.(type) {
		case map[string]any:
			v = x[step]
		case []any:
			i, _ := strconv.Atoi(step) // it is one of those that are there
			v = x[i]
		}
	}
	return v
}

func (r *reader) at(at ...string) map[string]any {
	m, _ := r.get(at...).(map[string]any)
	return m
}

func (r *reader) schema(at ...string) *jsonschema.Schema {
	if r.get(at...) == nil {
		return nil
	}
	at = r.place(at)
	for i, s := range at {
		at[i] = strings.NewReplacer("~", "~0", "/", "~1", "{", "%7B", "}", "%7D", "+", "%2B").Replace(s)
	}
	s, err := r.c.Compile(url + "#/" + strings.Join(at, "/"))
	if err != nil {
		r.err = errors.Join(r.err, err)
		return &jsonschema.Schema{}
	}
	return s
}

// keys are the members at a place, in the order of the document.
func (r *reader) keys(at ...string) (out []string) {
	n := r.node
next:
	for _, step := range r.place(at) {
		if n.Kind == yaml.SequenceNode {
			i, _ := strconv.Atoi(step) // it is one of those that are there
			n = n.Content[i]
			continue
		}
		for i := 0; i < len(n.Content); i += 2 {
			if n.Content[i].Value == step {
				n = n.Content[i+1]
				continue next
			}
		}
		return nil
	}
	for i := 0; i < len(n.Content); i += 2 {
		out = append(out, n.Content[i].Value)
	}
	return out
}

func (r *reader) content(at ...string) Content {
	c := Content{Schema: r.schema(append(slices.Clone(at), "schema")...)}
	for _, parts := range []string{"x-event", "x-line"} {
		if s := r.schema(append(slices.Clone(at), parts)...); s != nil {
			c.Parts = s
		}
	}
	at = append(slices.Clone(at), "examples")
	for _, name := range r.keys(at...) {
		c.Samples = append(c.Samples, Sample{name, r.at(append(slices.Clone(at), name)...)["value"]})
	}
	return c
}

func (r *reader) operation(path, method string) *Operation {
	at := func(more ...string) []string { return append([]string{"paths", path, method}, more...) }
	o := &Operation{Method: strings.ToUpper(method), Path: path, Answers: map[int]map[string]Content{}, Raw: r.at(at()...)}
	params, _ := o.Raw["parameters"].([]any)
	for i := range params {
		at := at("parameters", strconv.Itoa(i))
		m := r.at(at...)
		required, _ := m["required"].(bool)
		o.Params = append(o.Params, Param{m["name"].(string), m["in"].(string), required, r.schema(append(at, "schema")...)})
	}
	if r.at(at("requestBody")...) != nil {
		c := r.content(at("requestBody", "content", "application/json")...)
		o.Body, o.Samples = c.Schema, c.Samples
	}
	for status := range r.at(at("responses")...) {
		code, err := strconv.Atoi(status)
		if err != nil {
			r.err = errors.Join(r.err, fmt.Errorf("%s %s: the status %s: give each by its number", o.Method, path, status))
		}
		o.Answers[code] = map[string]Content{}
		for ct := range r.at(at("responses", status, "content")...) {
			o.Answers[code][ct] = r.content(at("responses", status, "content", ct)...)
		}
	}
	return o
}

// Find returns the operation of a request, by its path as it was sent; nil where
// there is none.
func (d *Document) Find(method, path string) *Operation {
	path, _, _ = strings.Cut(path, "?")
	have := strings.Split(path, "/")
	var found *Operation
	for _, o := range d.Operations {
		want := strings.Split(o.Path, "/")
		if o.Method != method || len(want) != len(have) {
			continue
		}
		fits := true
		for i := range want {
			fits = fits && (want[i] == have[i] || strings.HasPrefix(want[i], "{") && have[i] != "")
		}
		// A literal is found before a parameter.
		if fits && (found == nil || strings.Count(o.Path, "{") < strings.Count(found.Path, "{")) {
			found = o
		}
	}
	return found
}

// Check says in what an answer to a request is not as the document has it. What
// is served at no path of it must be a problem document with the status 404, or
// one of what comes before a path is looked at.
func (d *Document) Check(method, path string, status int, h http.Header, body []byte) error {
	fail := func(format string, a ...any) error {
		return fmt.Errorf("%s %.200s: %d: %s\n(%s, which the code must agree with)", method, path, status, fmt.Sprintf(format, a...), File)
	}
	ct, _, err := mime.ParseMediaType(h.Get("Content-Type"))
	if err != nil && status != http.StatusNoContent {
		return fail("content type: %v", err)
	}
	o := d.Find(method, path)
	if o == nil {
		if !slices.Contains([]int{400, 401, 403, 404, 429, 503}, status) || ct != "application/problem+json" {
			return fail("the document has no such operation, and the answer is no problem that says so")
		}
		return d.problem(status, h, body, d.Components["Problem"])
	}
	contents, ok := o.Answers[status]
	switch {
	case !ok:
		return fail("the operation has no such status: add it; the answer: %.500s", body)
	case len(contents) == 0 && len(body) == 0:
		return nil
	}
	c, ok := contents[ct]
	switch {
	case !ok:
		return fail("the operation does not answer %q with that status: add it", ct)
	case status >= 400 && ct == "application/problem+json":
		err = d.problem(status, h, body, c.Schema)
	case ct == "application/json":
		err = Validate(c.Schema, body)
	case ct == "text/event-stream":
		for line := range bytes.Lines(body) {
			if data, ok := bytes.CutPrefix(line, []byte("data: ")); ok {
				err = errors.Join(err, Validate(c.Parts, data))
			}
		}
	case ct == "application/jsonl":
		for line := range bytes.Lines(body) {
			err = errors.Join(err, Validate(c.Parts, line))
		}
	}
	if err != nil {
		return fail("%v\nthe answer: %.2000s", err, body)
	}
	return nil
}

func (d *Document) problem(status int, h http.Header, body []byte, s *jsonschema.Schema) error {
	if err := Validate(s, body); err != nil {
		return err
	}
	var p struct {
		Status     int
		RetryAfter int `json:"retry_after"`
	}
	if err := json.Unmarshal(body, &p); err != nil || p.Status != status {
		return fmt.Errorf("the problem says that its status is %d: %w", p.Status, err)
	}
	if after := h.Get("Retry-After"); p.RetryAfter > 0 && after != strconv.Itoa(p.RetryAfter) || p.RetryAfter == 0 && after != "" {
		return fmt.Errorf("Retry-After %q, and retry_after %d", after, p.RetryAfter)
	}
	if status == http.StatusUnauthorized && h.Get("WWW-Authenticate") == "" {
		return errors.New("no challenge")
	}
	return nil
}

// Validate holds one value of JSON against a schema.
func Validate(s *jsonschema.Schema, body []byte) error {
	v, err := jsonschema.UnmarshalJSON(bytes.NewReader(body))
	if err != nil {
		return err
	}
	return s.Validate(v)
}
