package runbook

import (
	"strings"
	"testing"
)

// What is not run, and could be taken for a command, is refused.
func TestParseRefuses(t *testing.T) {
	const step = "```sh\nls\n```\n"
	for name, text := range map[string]string{
		"a block of no language":         "```\nls\n```\n",
		"another language of the shell":  "```console\n$ ls\n```\n",
		"bash":                           "```bash\nls\n```\n\nOtherwise: x\n",
		"an indented block":              "x\n\n    ls\n",
		"an indented fence":              "- x\n\n  ```sh\n  ls\n  ```\n",
		"a longer fence":                 "````sh\nls\n````\n",
		"tildes":                         "~~~sh\nls\n~~~\n",
		"a block that does not end":      "```sh\nls\n",
		"a comment that does not end":    "<!-- world: ls\n",
		"output of nothing":              "```text\nx\n```\n",
		"output after other words":       step + "x\n\n```text\nx\n```\n\nOtherwise: x\n",
		"output twice":                   step + "```text\nx\n```\n```text\nx\n```\n\nOtherwise: x\n",
		"no exit code":                   "```sh exit=none\nls\n```\n\nOtherwise: x\n",
		"an exit code that is expected":  "```sh exit=0\nls\n```\n\nOtherwise: x\n",
		"neither host nor code":          "```sh Exit\nls\n```\n\nOtherwise: x\n",
		"no way out":                     step,
		"no way out of the first of two": step + "\n" + step + "\nOtherwise: x\n",
	} {
		if _, err := parse(text); err == nil {
			t.Errorf("%s: taken", name)
		} else if !strings.HasPrefix(err.Error(), "line ") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestParse(t *testing.T) {
	p, err := parse("# X\n\n<!-- setup: eu-1 eu-2; dana -->\n<!-- world:\na\nb\n-->\n\n```sh eu-2 exit=5\nls\n```\n```text\nx\n```\n<!-- world: c -->\n\nOtherwise: y\n\n```yaml\nx: 1\n```\n")
	if err != nil {
		t.Fatal(err)
	}
	if len(p.enforcers) != 2 || len(p.commanders) != 1 || len(p.steps) != 3 {
		t.Fatalf("%+v", p)
	}
	if s := p.steps[0]; !s.world || strings.TrimSpace(s.script) != "a\nb" {
		t.Errorf("%+v", s)
	}
	if s := p.steps[1]; s.world || s.host != "eu-2" || s.exit != 5 || s.script != "ls\n" || s.want != "x\n" || s.line != 9 {
		t.Errorf("%+v", s)
	}
	if s := p.steps[2]; !s.world || strings.TrimSpace(s.script) != "c" {
		t.Errorf("%+v", s)
	}
	if got := commands("Run `session-authority status` or `ls`.\n```sh\n`enforcer x`\n```\n"); len(got) != 1 || got[0] != "session-authority status" {
		t.Errorf("%q", got)
	}
}

func TestMatches(t *testing.T) {
	for _, c := range []struct {
		want, got string
		ok        bool
	}{
		{"", "", true},
		{"", "x\n", false},
		{"x\n", "", false},
		{"x\n", "x\n", true},
		{"x\n", "x\ny\n", false},
		{"x\n", "y\nx\n", false},
		{"x\n", "xx\n", false},
		{"a  b\n", "  a b \n", true},
		{"ab\n", "a b\n", false},
		{"seq …; in effect\n", "seq 7; in effect\n", true},
		{"seq …; in effect\n", "seq 7\n; in effect\n", false},
		{"x…\n", "x\n", true},
		{"… x\n", "1 x\n", true},
		{"…\nx\n", "x\n", true},
		{"…\nx\n", "1\n2\nx\n", true},
		{"x\n…\n", "x\n", true},
		{"x\n…\ny\n", "x\n1\nz\n", false},
		{"a.c\n", "abc\n", false},
	} {
		if got := matches(c.want, c.got); got != c.ok {
			t.Errorf("%q against %q: %v", c.want, c.got, got)
		}
	}
}
