// Package archtest holds the test that keeps the imports of this module in the
// direction that its rules describe: what a user embeds stays small, and no
// layer reaches around the one below it.
package archtest

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const module = "github.com/interlock-fabric/interlock/"

// rule says what the packages that match a pattern may import directly, beside
// the standard library. An import is permitted by its own path, or by the path
// of a package above it that ends in "/...".
type rule struct {
	pattern string // of path.Match, relative to the module
	allow   []string
	why     string
}

// rules cover every package that users import. The first that matches counts.
var rules = []rule{
	{"pkg/session", nil,
		"the vocabulary and the wire form are what other languages reimplement and every package shares: the standard library alone"},
	{"pkg/filter", []string{module + "pkg/session", "github.com/bits-and-blooms/bloom/v3"},
		"the state is a function of the log; it knows neither the bus nor the enforcer"},
	{"pkg/enforce", []string{module + "pkg/session", module + "pkg/filter"},
		"the enforcer follows a Feed; which bus that is, is not its business"},
	{"pkg/enforce/enforceprom", []string{module + "pkg/enforce", module + "pkg/session", module + "pkg/internal/snapshotprom", "github.com/prometheus/client_golang/..."},
		"whoever does not use Prometheus does not compile it"},
	{"pkg/natsfeed", []string{module + "pkg/session", module + "pkg/enforce", "github.com/nats-io/nats.go", "github.com/nats-io/nats.go/...", "github.com/nats-io/nkeys"},
		"a client of the bus, never a server; it implements the enforcer's Feed"},
	{"pkg/authority", []string{module + "pkg/session"},
		"issuers and responders speak HTTP to the authority; they need neither the bus nor an enforcer"},
	{"pkg/credential", []string{module + "pkg/session", "github.com/go-jose/go-jose/v4", "github.com/go-jose/go-jose/v4/...", "github.com/dgraph-io/ristretto/v2"},
		"it turns a verified credential into an identity, and keeps those that it has verified in a cache that may lose them; enforcing is not its business"},
	{"pkg/credential/discovery", []string{"github.com/coreos/go-oidc/v3/oidc"},
		"whoever names the keys' URL does not compile an OpenID Connect client"},
	{"pkg/denial", []string{module + "pkg/session"},
		"every host words a denial alike, whatever its SDK"},
	{"pkg/trail", []string{module + "pkg/session"},
		"adapters record through it, and so it knows neither the enforcer nor the bus, but what it asks of them"},
	{"pkg/trail/trailprom", []string{module + "pkg/trail", module + "pkg/session", module + "pkg/internal/snapshotprom", "github.com/prometheus/client_golang/..."},
		"whoever does not use Prometheus does not compile it"},
	{"pkg/internal/snapshotprom", []string{"github.com/prometheus/client_golang/..."},
		"what is shown is a number of a snapshot, whoever takes it"},
	{"pkg/guard", []string{module + "pkg/session", module + "pkg/denial", module + "pkg/trail"},
		"what the adapters share: they ask for three methods, never for the enforcer"},
	{"adapters/mcp", []string{module + "pkg/session", module + "pkg/denial", module + "pkg/guard", module + "pkg/trail", module + "pkg/credential", "github.com/modelcontextprotocol/go-sdk/..."},
		"an adapter asks for three methods, never for the enforcer, so that its host can be tested with ten lines"},
	{"adapters/a2a", []string{module + "pkg/session", module + "pkg/denial", module + "pkg/guard", module + "pkg/trail", module + "pkg/credential", "github.com/a2aproject/a2a-go/v2/...",
		"google.golang.org/grpc", "google.golang.org/grpc/...", "google.golang.org/genproto/googleapis/rpc/errdetails", "google.golang.org/protobuf/..."},
		"an adapter asks for three methods, never for the enforcer, so that its host can be tested with ten lines"},
}

// ban says what packages may not reach by any way, except in tests.
type ban struct {
	from []string // prefixes, relative to the module
	to   string   // prefix of an import path
	why  string
}

var bans = []ban{
	{[]string{"pkg/", "adapters/"}, "github.com/nats-io/nats-server/", "no user of a library compiles a message broker"},
	{[]string{"pkg/", "adapters/"}, module + "internal/", "what users import is not built on what may change without notice"},
	{[]string{"pkg/", "adapters/", "internal/"}, module + "cmd/", "commands are wiring, and wiring is not imported"},
	{[]string{"pkg/enforce", "pkg/filter", "pkg/authority", "pkg/credential", "pkg/trail", "adapters/"}, "github.com/nats-io/", "only the feed knows the bus"},
	{[]string{"adapters/"}, module + "pkg/enforce", "an adapter works with any guard"},
	{[]string{"pkg/"}, module + "adapters/", "a host's SDK is for the users of that host"},
	{[]string{"pkg/session", "pkg/filter", "pkg/enforce", "pkg/natsfeed", "pkg/trail"}, "github.com/prometheus/", "metrics are a package of their own"},
	{[]string{"pkg/", "adapters/"}, "github.com/rs/zerolog", "libraries take *slog.Logger; the handler is the binary's choice"},
}

// exempt are the packages for which a ban does not hold, by its target.
var exempt = map[string][]string{
	// It implements the Feed over the bus: that is what it is for.
	"github.com/nats-io/":    {"pkg/natsfeed"},
	"github.com/prometheus/": {"pkg/trail/trailprom", "pkg/enforce/enforceprom"},
}

type pkg struct {
	ImportPath string
	Standard   bool
	Imports    []string
	Deps       []string
}

// violations checks the packages of this module, which are all but the
// standard ones and those of other modules in list.
func violations(list []pkg) (out []string) {
	standard := map[string]bool{"C": true, "unsafe": true}
	for _, p := range list {
		standard[p.ImportPath] = standard[p.ImportPath] || p.Standard
	}
	for _, p := range list {
		rel, ours := strings.CutPrefix(p.ImportPath, module)
		if !ours {
			continue
		}
		if strings.HasPrefix(rel, "pkg/") || strings.HasPrefix(rel, "adapters/") {
			i := slices.IndexFunc(rules, func(r rule) bool { ok, err := path.Match(r.pattern, rel); return ok && err == nil })
			if i < 0 {
				out = append(out, rel+" is covered by no rule: say here what it may import, and why")
				continue
			}
			for _, imp := range p.Imports {
				if !standard[imp] && !permitted(rules[i].allow, imp) {
					out = append(out, rel+" imports "+imp+": "+rules[i].why)
				}
			}
		}
		for _, b := range bans {
			if !slices.ContainsFunc(b.from, func(from string) bool { return strings.HasPrefix(rel, from) }) || slices.Contains(exempt[b.to], rel) {
				continue
			}
			for _, dep := range p.Deps {
				if strings.HasPrefix(dep, b.to) {
					out = append(out, rel+" reaches "+dep+": "+b.why)
				}
			}
		}
	}
	return out
}

func permitted(allow []string, imp string) bool {
	return slices.ContainsFunc(allow, func(a string) bool {
		above, tree := strings.CutSuffix(a, "...")
		return a == imp || tree && strings.HasPrefix(imp, above)
	})
}

// touch looks at every source file, so that go test does not answer from its
// cache when one has changed: it does not see what go list reads.
func touch(t *testing.T) {
	t.Helper()
	err := filepath.WalkDir("../..", func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && (d.Name() == "node_modules" || d.Name() == ".git"):
			return filepath.SkipDir
		case filepath.Ext(path) != ".go" && d.Name() != "go.mod":
			return nil
		}
		_, err = os.Stat(path)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestImportsKeepTheirDirection(t *testing.T) {
	touch(t)
	cmd := exec.CommandContext(t.Context(), "go", "list", "-deps", "-json=ImportPath,Standard,Imports,Deps", "./...")
	cmd.Dir = "../.."
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v\n%s", err, stderr.String())
	}
	var list []pkg
	for d := json.NewDecoder(bytes.NewReader(out)); ; {
		var p pkg
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		list = append(list, p)
	}
	if !slices.ContainsFunc(list, func(p pkg) bool { return p.ImportPath == module+"pkg/session" }) {
		t.Fatal("pkg/session is not among the packages: the test looks at nothing")
	}
	for _, v := range violations(list) {
		t.Error(v)
	}
}

// The test above is worth something only if it can fail.
func TestViolationsAreFound(t *testing.T) {
	const server, client, prom = "github.com/nats-io/nats-server/v2/server", "github.com/nats-io/nats.go", "github.com/prometheus/client_golang/prometheus"
	tests := []struct {
		name string
		pkg  pkg
		want []string // the beginnings of what is reported
	}{
		{"the standard library", pkg{ImportPath: "pkg/session", Imports: []string{"fmt"}}, nil},
		{"anything else in session", pkg{ImportPath: "pkg/session", Imports: []string{"fmt", "golang.org/x/crypto/hkdf"}},
			[]string{"pkg/session imports golang.org/x/crypto/hkdf"}},
		{"up the layers", pkg{ImportPath: "pkg/filter", Imports: []string{module + "pkg/enforce"}}, []string{"pkg/filter imports " + module + "pkg/enforce"}},
		{"the feed's bus", pkg{ImportPath: "pkg/natsfeed", Imports: []string{client, client + "/jetstream"}, Deps: []string{client}}, nil},
		{"the broker, far down", pkg{ImportPath: "pkg/natsfeed", Imports: []string{client}, Deps: []string{client, server}}, []string{"pkg/natsfeed reaches " + server}},
		{"the bus, far down in an adapter", pkg{ImportPath: "adapters/mcp", Deps: []string{client}}, []string{"adapters/mcp reaches " + client}},
		{"the enforcer in an adapter", pkg{ImportPath: "adapters/mcp", Imports: []string{module + "pkg/enforce"}, Deps: []string{module + "pkg/enforce"}},
			[]string{"adapters/mcp imports", "adapters/mcp reaches"}},
		{"an SDK", pkg{ImportPath: "adapters/mcp", Imports: []string{"github.com/modelcontextprotocol/go-sdk/mcp"}}, nil},
		{"another host's SDK", pkg{ImportPath: "adapters/mcp", Imports: []string{"github.com/a2aproject/a2a-go/v2/a2asrv"}}, []string{"adapters/mcp imports"}},
		{"metrics where they belong", pkg{ImportPath: "pkg/enforce/enforceprom", Imports: []string{prom}, Deps: []string{prom}}, nil},
		{"metrics where they do not", pkg{ImportPath: "pkg/enforce", Deps: []string{prom}}, []string{"pkg/enforce reaches " + prom}},
		{"the inside", pkg{ImportPath: "pkg/authority", Imports: []string{module + "internal/api"}, Deps: []string{module + "internal/api"}},
			[]string{"pkg/authority imports", "pkg/authority reaches"}},
		{"a command", pkg{ImportPath: "internal/api", Deps: []string{module + "cmd/enforcer"}}, []string{"internal/api reaches"}},
		{"the broker inside", pkg{ImportPath: "internal/broker", Imports: []string{server}, Deps: []string{server}}, nil},
		{"a package that nobody thought of", pkg{ImportPath: "pkg/common"}, []string{"pkg/common is covered by no rule"}},
		{"a package below one that is covered", pkg{ImportPath: "pkg/session/more"}, []string{"pkg/session/more is covered by no rule"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			tt.pkg.ImportPath = module + tt.pkg.ImportPath
			got := violations([]pkg{{ImportPath: "fmt", Standard: true}, tt.pkg})
			if len(got) != len(tt.want) {
				t.Fatalf("wrong number of violations: %s", cmp.Diff(tt.want, got))
			}
			for i := range got {
				if !strings.HasPrefix(got[i], tt.want[i]) {
					t.Errorf("got %q, want %q…", got[i], tt.want[i])
				}
			}
		})
	}
}
