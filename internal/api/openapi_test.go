package api_test

import (
	"encoding/json"
	"maps"
	"net/http"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/santhosh-tekuri/jsonschema/v6"

	"github.com/interlock-fabric/interlock/internal/access"
	"github.com/interlock-fabric/interlock/internal/api"
	"github.com/interlock-fabric/interlock/internal/api/apitest"
	"github.com/interlock-fabric/interlock/pkg/authority"
	"github.com/interlock-fabric/interlock/pkg/session"
)

func document(t *testing.T) *apitest.Document {
	t.Helper()
	d, err := apitest.Load()
	if err != nil {
		t.Fatalf("%#v", err)
	}
	return d
}

// What is served is described, and what is described is served.
func TestEveryRouteIsDescribed(t *testing.T) {
	d := document(t)
	var have []string
	for _, o := range d.Operations {
		have = append(have, o.Method+" "+o.Path)
	}
	for _, r := range api.Routes() {
		if !slices.Contains(have, r) {
			t.Errorf("%s is served, and not described: add it to %s, with its parameters, bodies and every status that it answers", r, apitest.File)
		}
	}
	for _, r := range have {
		if !slices.Contains(api.Routes(), r) {
			t.Errorf("%s is described in %s, and not served: take it out there, or add it to endpoints in internal/api/api.go", r, apitest.File)
		}
	}
}

// Each operation says what any of them can answer, under a name and a tag.
func TestOperationsAreWhole(t *testing.T) {
	d := document(t)
	var tags []string
	for _, tag := range d.Raw["tags"].([]any) {
		tags = append(tags, tag.(map[string]any)["name"].(string))
	}
	ids, used := map[string]bool{}, map[string]bool{}
	for _, o := range d.Operations {
		what := o.Method + " " + o.Path
		id, _ := o.Raw["operationId"].(string)
		if id == "" || ids[id] {
			t.Errorf("%s: %s: operationId %q is empty, or there twice", apitest.File, what, id)
		}
		ids[id] = true
		own, _ := o.Raw["tags"].([]any)
		if len(own) != 1 || !slices.Contains(tags, own[0].(string)) {
			t.Errorf("%s: %s: tags %v: want one of %v", apitest.File, what, own, tags)
		}
		if len(own) > 0 {
			used[own[0].(string)] = true
		}
		if s, _ := o.Raw["summary"].(string); s == "" {
			t.Errorf("%s: %s has no summary", apitest.File, what)
		}
		want := []int{400, 401, 403, 429, 500}
		if o.Body != nil {
			want = append(want, 413)
		}
		for _, status := range want {
			if _, ok := o.Answers[status]; !ok {
				t.Errorf("%s: %s: the status %d is missing", apitest.File, what, status)
			}
		}
		for _, name := range regexp.MustCompile(`\{(\w+)\}`).FindAllStringSubmatch(o.Path, -1) {
			if !slices.ContainsFunc(o.Params, func(p apitest.Param) bool { return p.In == "path" && p.Name == name[1] && p.Required }) {
				t.Errorf("%s: %s: parameter %s in the path is not described", apitest.File, what, name[1])
			}
		}
	}
	for _, tag := range tags {
		if !used[tag] {
			t.Errorf("%s: tag %s has no operation", apitest.File, tag)
		}
	}
}

// keywords are those of the schemas. A wrong one would be ignored by whoever reads
// the document.
var keywords = []string{
	"$ref", "additionalProperties", "allOf", "const", "contentEncoding", "default", "description", "enum", "examples", "format", "items", "maxItems",
	"maxLength", "maximum", "minItems", "minLength", "minProperties", "minimum", "pattern", "properties", "required", "type", "unevaluatedProperties",
}

// Objects take no member that is not described, and say so.
func TestSchemasAreClosed(t *testing.T) {
	d := document(t)
	referred := map[string]bool{}
	var walk func(at string, v any, open bool)
	walk = func(at string, v any, open bool) {
		s, ok := v.(map[string]any)
		if !ok {
			t.Errorf("%s: %s is not a schema", apitest.File, at)
			return
		}
		for k := range s {
			if !slices.Contains(keywords, k) {
				t.Errorf("%s: %s: keyword %s", apitest.File, at, k)
			}
		}
		if ref, ok := s["$ref"].(string); ok {
			referred[strings.TrimPrefix(ref, "#/components/schemas/")] = true
		}
		_, additional := s["additionalProperties"].(bool)
		unevaluated, _ := s["unevaluatedProperties"].(bool)
		closed := additional || !unevaluated && s["unevaluatedProperties"] != nil
		if s["type"] == "object" && !closed && !open {
			t.Errorf("%s: %s takes any member: close it with additionalProperties: false", apitest.File, at)
		}
		properties, _ := s["properties"].(map[string]any)
		for name, p := range properties {
			walk(at+"/"+name, p, false)
		}
		if items, ok := s["items"]; ok {
			walk(at+"/items", items, false)
		}
		all, _ := s["allOf"].([]any)
		for _, part := range all {
			walk(at+"/allOf", part, true)
		}
	}
	bases := map[string]bool{} // what others are made of
	schemas := d.Raw["components"].(map[string]any)["schemas"].(map[string]any)
	for _, v := range schemas {
		all, _ := v.(map[string]any)["allOf"].([]any)
		for _, part := range all {
			bases[strings.TrimPrefix(part.(map[string]any)["$ref"].(string), "#/components/schemas/")] = true
		}
	}
	for name, v := range schemas {
		walk(name, v, bases[name])
	}
	var inPaths func(at string, v any)
	inPaths = func(at string, v any) {
		switch v := v.(type) {
		case map[string]any:
			for k, part := range v {
				switch k {
				case "schema", "x-event", "x-line":
					walk(at+"/"+k, part, false)
				case "examples":
				default:
					inPaths(at+"/"+k, part)
				}
			}
		case []any:
			for _, part := range v {
				inPaths(at, part)
			}
		}
	}
	inPaths("paths", d.Raw["paths"])
	for _, part := range []string{"parameters", "headers", "responses"} {
		inPaths(part, d.Raw["components"].(map[string]any)[part])
	}
	for name := range schemas {
		if !referred[name] {
			t.Errorf("%s: schema %s is not used", apitest.File, name)
		}
	}
}

// Every example is one.
func TestExamplesAreValid(t *testing.T) {
	d := document(t)
	n := 0
	hold := func(what string, s *jsonschema.Schema, value any) {
		n++
		if err := s.Validate(value); err != nil {
			t.Errorf("%s: %s: %v", apitest.File, what, err)
		}
	}
	for _, o := range d.Operations {
		what := o.Method + " " + o.Path
		if o.Body != nil {
			for _, s := range o.Samples {
				hold(what+": example "+s.Name, o.Body, s.Value)
			}
		}
		for status, contents := range o.Answers {
			for ct, c := range contents {
				for _, s := range c.Samples {
					hold(what+": example "+s.Name, c.Schema, s.Value)
					text, _ := s.Value.(string)
					if ct == "application/json" || ct == "application/problem+json" {
						text = string(s.JSON(time.Now()))
					}
					h := http.Header{"Content-Type": {ct}}
					h.Set("WWW-Authenticate", "Bearer")
					if err := d.Check(o.Method, o.Path, status, h, []byte(text)); err != nil {
						t.Error(err)
					}
				}
			}
		}
		for _, p := range o.Params {
			for _, v := range sampleOf(p.Schema) {
				hold(what+": parameter "+p.Name, p.Schema, v)
			}
		}
	}
	for name, s := range d.Components {
		for _, v := range s.Examples {
			hold(name, s, v)
		}
	}
	if n < 30 {
		t.Errorf("only %d examples", n)
	}
}

func sampleOf(s *jsonschema.Schema) []any {
	if s.Ref != nil && len(s.Examples) == 0 {
		return sampleOf(s.Ref)
	}
	return s.Examples
}

// The names that the code knows are those that the document has.
func TestNamesAreTheCodes(t *testing.T) {
	d := document(t)
	names := func(component, property string) (out []string) {
		s := d.Components[component]
		if property != "" {
			s = s.Properties[property]
		}
		for _, v := range s.Enum.Values {
			out = append(out, v.(string))
		}
		slices.Sort(out)
		return out
	}
	var operations, kinds []string
	for _, o := range authority.Operations() {
		operations = append(operations, string(o))
	}
	for _, k := range session.Kinds() {
		kinds = append(kinds, k.String())
	}
	for _, c := range []struct {
		component, property string
		want                []string
	}{
		{"Operation", "", operations},
		{"Kind", "", kinds},
		{"Reason", "", authority.Reasons()},
		{"Problem", "type", authority.ProblemTypes()},
		{"AuditPrincipal", "means", []string{
			string(access.MeansSocket), string(access.MeansBootstrap), string(access.MeansToken), string(access.MeansCert),
			string(access.MeansClient), string(access.MeansEmergency), "authority", "enforcer", "unknown",
		}},
	} {
		if got := names(c.component, c.property); !slices.Equal(got, slices.Sorted(slices.Values(c.want))) {
			t.Errorf("%s: %s has %q, and the code %q", apitest.File, c.component, got, c.want)
		}
	}
}

// The schemas are those of the Go types that are read and written: the same
// members, of the same types, and those required that are always there.
func TestSchemasAreOfTheTypes(t *testing.T) {
	d := document(t)
	seen := map[reflect.Type]bool{}
	var visit func(reflect.Type)
	visit = func(typ reflect.Type) {
		switch typ.Kind() {
		case reflect.Pointer, reflect.Slice:
			visit(typ.Elem())
			return
		case reflect.Func:
			for i := range typ.NumIn() {
				visit(typ.In(i))
			}
			return
		case reflect.Struct:
		default:
			return
		}
		if seen[typ] || typ.Name() != "" && !strings.HasSuffix(typ.PkgPath(), "pkg/authority") {
			return
		}
		seen[typ] = true
		for i := range typ.NumField() {
			visit(typ.Field(i).Type)
		}
		if tagged := slices.ContainsFunc(reflect.VisibleFields(typ), func(f reflect.StructField) bool { return f.Tag.Get("json") != "" }); typ.Name() == "" || !tagged {
			return // inside another, or a query
		}
		s, ok := d.Components[typ.Name()]
		if !ok {
			t.Errorf("authority.%s is read or written, and is not among the schemas of %s: add it under that name", typ.Name(), apitest.File)
			return
		}
		same(t, typ.Name(), s, typ)
	}
	service := reflect.TypeFor[api.Service]()
	for i := range service.NumMethod() {
		m := service.Method(i).Type
		for k := range m.NumIn() {
			visit(m.In(k))
		}
		for k := range m.NumOut() {
			visit(m.Out(k))
		}
	}
	visit(reflect.TypeFor[authority.Problem]())
	if len(seen) < 30 {
		t.Errorf("only %d types were found", len(seen))
	}
}

// same compares a schema with the struct that is its values.
func same(t *testing.T, at string, s *jsonschema.Schema, typ reflect.Type) {
	properties, required := members(s)
	names := map[string]bool{}
	for _, f := range reflect.VisibleFields(typ) {
		if f.Anonymous || !f.IsExported() {
			continue
		}
		name, options, _ := strings.Cut(f.Tag.Get("json"), ",")
		if name == "-" {
			continue
		}
		names[name] = true
		p, ok := properties[name]
		if !ok {
			t.Errorf("%s: schema %s lacks the member %s of the Go type", apitest.File, at, name)
			continue
		}
		if always := !strings.Contains(options, "omit"); always != slices.Contains(required, name) {
			t.Errorf("%s: schema %s: the member %s: always there is %v", apitest.File, at, name, always)
		}
		sameType(t, at+"."+name, p, f.Type)
	}
	for name := range properties {
		if !names[name] {
			t.Errorf("%s: schema %s has a member %s that the Go type has not", apitest.File, at, name)
		}
	}
}

// members are an object's properties, and those required, with those of what it
// is made of.
func members(s *jsonschema.Schema) (map[string]*jsonschema.Schema, []string) {
	properties, required := maps.Clone(s.Properties), slices.Clone(s.Required)
	if properties == nil {
		properties = map[string]*jsonschema.Schema{}
	}
	for _, part := range append(slices.Clone(s.AllOf), s.Ref) {
		if part != nil {
			p, r := members(part)
			maps.Copy(properties, p)
			required = append(required, r...)
		}
	}
	return properties, required
}

func sameType(t *testing.T, at string, s *jsonschema.Schema, typ reflect.Type) {
	for s.Ref != nil {
		s = s.Ref
	}
	is := ""
	if s.Types != nil {
		is = strings.Join(s.Types.ToStrings(), " ")
	}
	for typ.Kind() == reflect.Pointer {
		typ = typ.Elem()
	}
	want := map[reflect.Kind]string{
		reflect.String: "string", reflect.Bool: "boolean", reflect.Int: "integer", reflect.Uint32: "integer", reflect.Uint64: "integer",
		reflect.Float64: "number", reflect.Slice: "array", reflect.Struct: "object",
	}[typ.Kind()]
	switch typ {
	case reflect.TypeFor[time.Time](), reflect.TypeFor[authority.Duration](), reflect.TypeFor[[]byte]():
		want = "string"
	case reflect.TypeFor[json.RawMessage]():
		want = "object"
	}
	if is != want {
		t.Errorf("%s: %s is a %q, and in Go a %s", apitest.File, at, is, typ)
		return
	}
	switch {
	case typ == reflect.TypeFor[time.Time]() && (s.Format == nil || s.Format.Name != "date-time"):
		t.Errorf("%s: %s is not of format date-time", apitest.File, at)
	case typ == reflect.TypeFor[[]byte]() && s.ContentEncoding == nil:
		t.Errorf("%s: %s is not of contentEncoding base64", apitest.File, at)
	case want == "array":
		items, ok := s.Items2020, s.Items2020 != nil
		if !ok {
			t.Errorf("%s: %s has no items", apitest.File, at)
			return
		}
		sameType(t, at+"[]", items, typ.Elem())
	case want == "object" && typ.Kind() == reflect.Struct && typ.Name() == "":
		same(t, at, s, typ)
	case want == "object" && typ.Kind() == reflect.Struct && !strings.HasSuffix(s.Location, "/"+typ.Name()):
		t.Errorf("%s: %s is not a %s", apitest.File, at, typ.Name())
	}
}
