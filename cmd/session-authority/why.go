package main

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/mattn/go-isatty"
	"github.com/spf13/cobra"

	"github.com/interlock-fabric/interlock/internal/cli"
	"github.com/interlock-fabric/interlock/pkg/authority"
)

// maxAsked is how often somebody at a terminal is asked for one thing.
const maxAsked = 3

// askWhy asks whoever sits at the terminal for what the decision must say and does
// not, as the authority told it. Without a terminal, what it told is the error.
func askWhy(cmd *cobra.Command, p *authority.Problem, reason, incident string) (string, string, error) {
	f, ok := cmd.InOrStdin().(*os.File)
	if !ok || !isatty.IsTerminal(f.Fd()) {
		return "", "", p
	}
	in := bufio.NewReader(io.LimitReader(f, 4<<10))
	ask := func(what string, good func(string) bool) (string, error) {
		for range maxAsked {
			if _, err := fmt.Fprintf(cmd.ErrOrStderr(), "%s: ", what); err != nil {
				return "", fmt.Errorf("asking: %w", err)
			}
			line, err := in.ReadString('\n')
			if line = strings.TrimSpace(line); line != "" && good(line) {
				return line, nil
			}
			if err != nil {
				return "", p
			}
		}
		return "", p
	}
	var err error
	if slices.Contains(p.Fields, "reason") {
		reasons := authority.Reasons()
		what := "reason (" + strings.Join(reasons, ", ") + ")"
		if reason, err = ask(what, func(s string) bool { return slices.Contains(reasons, s) }); err != nil {
			return "", "", err
		}
	}
	if slices.Contains(p.Fields, "incident") {
		if incident, err = ask("incident", func(s string) bool { return cli.OneLine(s) == s }); err != nil {
			return "", "", err
		}
	}
	return reason, incident, nil
}
