package runbook

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"
)

// page is a runbook as the test reads it; docs/runbooks/README.md says how one is
// written.
type page struct {
	enforcers, commanders []string // of the fabric that it begins with
	steps                 []*step
}

// step is a fenced block of commands, or what happens in the world meanwhile.
type step struct {
	line   int
	world  bool   // a comment: what the reader does not do
	host   string // where it is run; empty is the authority's machine
	exit   int
	script string
	want   string // what it prints; see matches
	line2  int    // of want
}

var (
	fence   = regexp.MustCompile("^(\\s*)(`{3,}|~{3,})(.*)$")
	comment = regexp.MustCompile(`^<!-- (setup|world):(.*?)(-->)?$`)
	// command is a command in the text: one of the programs with something to do.
	command = regexp.MustCompile("`((?:session-authority|enforcer|systemctl) [^`]+)`")
	host    = regexp.MustCompile(`^[a-z][a-z0-9-]*$`)
)

// parse reads a page. What could be taken for a command and would not be run is
// an error.
func parse(text string) (*page, error) {
	p := &page{enforcers: []string{"eu-1"}}
	var prose []string // since the newest step
	lines := strings.Split(text, "\n")
	fail := func(n int, format string, a ...any) (*page, error) {
		return nil, fmt.Errorf("line %d: %s", n+1, fmt.Sprintf(format, a...))
	}
	// answered says whether the reader was told what to do where the newest
	// commands do not print what they should.
	answered := func() error {
		last := len(p.steps) - 1
		for last >= 0 && p.steps[last].world {
			last--
		}
		if last < 0 || strings.Contains("\n"+strings.Join(prose, "\n"), "\nOtherwise") {
			return nil
		}
		return fmt.Errorf("line %d: no paragraph behind it begins with \"Otherwise\": what is to be done if that is not seen?", p.steps[last].line)
	}
	for n := 0; n < len(lines); n++ {
		start := n
		if m := comment.FindStringSubmatch(lines[n]); m != nil {
			body := m[2]
			for m[3] == "" {
				if n++; n >= len(lines) {
					return fail(start, "the comment does not end")
				}
				before, _, end := strings.Cut(lines[n], "-->")
				if body += "\n" + before; end {
					break
				}
			}
			if m[1] == "setup" {
				enforcers, commanders, _ := strings.Cut(body, ";")
				p.enforcers, p.commanders = strings.Fields(enforcers), strings.Fields(commanders)
			} else {
				p.steps = append(p.steps, &step{line: start + 1, world: true, script: body})
			}
			continue
		}
		m := fence.FindStringSubmatch(lines[n])
		if m == nil {
			if strings.HasPrefix(lines[n], "    ") || strings.HasPrefix(lines[n], "\t") {
				return fail(n, "an indented block is not run: fence it")
			}
			prose = append(prose, lines[n])
			continue
		}
		if m[1] != "" || m[2] != "```" {
			return fail(n, "a fence is three backquotes at the line's start")
		}
		var body strings.Builder
		for n++; ; n++ {
			if n >= len(lines) {
				return fail(start, "the block does not end")
			}
			if lines[n] == "```" {
				break
			}
			body.WriteString(lines[n] + "\n")
		}
		info := strings.Fields(m[3])
		switch {
		case len(info) > 0 && info[0] == "sh":
			if err := answered(); err != nil {
				return nil, err
			}
			prose = nil
			s := &step{line: start + 1, script: body.String()}
			for _, word := range info[1:] {
				code, isCode := strings.CutPrefix(word, "exit=")
				var err error
				switch {
				case isCode:
					if s.exit, err = strconv.Atoi(code); err != nil || s.exit < 1 || s.exit > 255 {
						return fail(start, "%q is no exit code to expect", word)
					}
				case host.MatchString(word):
					s.host = word
				default:
					return fail(start, "%q is neither a host nor exit=CODE", word)
				}
			}
			p.steps = append(p.steps, s)
		case len(info) == 1 && info[0] == "text":
			last := len(p.steps) - 1
			if last < 0 || p.steps[last].world || p.steps[last].line2 != 0 || strings.TrimSpace(strings.Join(prose, "")) != "" {
				return fail(start, "a text block stands right behind the sh block that prints it")
			}
			p.steps[last].want, p.steps[last].line2 = body.String(), start+1
		case len(info) == 1 && (info[0] == "yaml" || info[0] == "ini"):
		default:
			return fail(start, "a block is sh, which is run, or text, which that prints, or yaml or ini; not %q", m[3])
		}
	}
	return p, answered()
}

// commands returns the commands that the text names outside blocks.
func commands(text string) (out []string) {
	inside := false
	for line := range strings.Lines(text) {
		if strings.HasPrefix(line, "```") {
			inside = !inside
		}
		if !inside {
			for _, m := range command.FindAllStringSubmatch(line, -1) {
				out = append(out, m[1])
			}
		}
	}
	return out
}

// matches reports whether commands printed what the page says: the same, where …
// stands for anything within a line, and for any number of lines where it is all
// that a line has. How much space there is between words, or at either end of a
// line, does not count.
func matches(want, got string) bool {
	var b strings.Builder
	for line := range strings.Lines(want) {
		words := strings.Fields(line)
		if len(words) == 1 && words[0] == "…" {
			b.WriteString(`(?:.*\n)*?`)
			continue
		}
		b.WriteString(`[ \t]*`)
		for i, w := range words {
			if i > 0 {
				b.WriteString(`[ \t]+`)
			}
			b.WriteString(strings.ReplaceAll(regexp.QuoteMeta(w), "…", `.*`))
		}
		b.WriteString(`[ \t]*\n`)
	}
	return regexp.MustCompile(`\A` + b.String() + `\z`).MatchString(got)
}
