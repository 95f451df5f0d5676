package main

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/interlock-fabric/interlock/internal/audit"
	service "github.com/interlock-fabric/interlock/internal/authority"
	"github.com/interlock-fabric/interlock/internal/cli"
	"github.com/interlock-fabric/interlock/internal/trust"
	"github.com/interlock-fabric/interlock/pkg/authority"
)

func newAuditCommand(g *globals) *cobra.Command {
	cmd := &cobra.Command{
		Use: "audit", Short: "Show, export and verify what was done, and by whom", RunE: cli.Subcommands,
		Long: `Every decision, refusal, sign-in, enrolment, registration, and change of keys and of
who may, and the calls that enforcers reported, are kept in a chain that the
authority signs. What was exported is verified offline, with the root key that is
pinned here. Whoever may read it in some tenants sees what is about those.`,
	}
	cmd.AddCommand(newAuditListCommand(g), newAuditExportCommand(g), newAuditVerifyCommand(g))
	return cmd
}

// auditFlags are the filters of list and export.
func auditFlags(cmd *cobra.Command, q *authority.AuditQuery, since *string) {
	f := cmd.Flags()
	f.StringVar(&q.Kind, "kind", "", "only decision, proposal, sign-in, access, config, roster, registry, exemption, keys, authority, report, receipts, coverage or retention")
	f.StringVar(&q.Tenant, "tenant", "", "about callers of this tenant")
	f.StringVar(&q.Agent, "agent", "", "about this agent")
	f.StringVar(&q.User, "user", "", "about this user")
	f.StringVar(&q.Client, "client", "", "about this client")
	f.StringVar(&q.Session, "session", "", "about this session")
	f.StringVar(&q.Incident, "incident", "", "of this incident")
	f.StringVar(&q.Trace, "trace", "", "of this W3C trace id")
	f.StringVar(since, "since", "", "not older than this; as in 2h, 09:00Z or 2026-11-22T09:00:00Z")
}

func newAuditListCommand(g *globals) *cobra.Command {
	var q authority.AuditQuery
	var since, until string
	cmd := &cobra.Command{
		Use: "list", Short: "Show the newest records", Args: cli.NoArgs,
		Long: `Prints the newest records, newest first; with --json one a line, whole. A decision
names the agent and the user that it is about; "*" is any.`,
		Example: `  session-authority audit list --incident INC-142
  session-authority audit list --agent billing-bot --since 24h --json | jq .trail`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if q.Limit < 1 {
				return cli.Usagef("--limit %d is out of range: give at least 1", q.Limit)
			}
			now := time.Now()
			var err error
			if q.Since, err = parseMoment("since", since, now); err != nil {
				return err
			}
			if q.Until, err = parseMoment("until", until, now); err != nil {
				return err
			}
			c, err := g.client()
			if err != nil {
				return err
			}
			defer c.Close()
			out := bufio.NewWriter(cmd.OutOrStdout())
			enc := json.NewEncoder(out)
			enc.SetEscapeHTML(false)
			left := q.Limit
			err = eachRecord(cmd.Context(), c, q, func(e *authority.AuditEntry) (bool, error) {
				left--
				if g.json {
					return left > 0, enc.Encode(e)
				}
				_, err := out.WriteString(auditText(e))
				return left > 0, err
			})
			return errors.Join(err, out.Flush())
		},
	}
	auditFlags(cmd, &q, &since)
	cmd.Flags().StringVar(&until, "until", "", "older than this; as --since")
	cmd.Flags().IntVar(&q.Limit, "limit", 100, "at most so many")
	return cmd
}

// eachRecord calls fn with the records that match, newest first, page by page,
// until it returns false or fails.
func eachRecord(ctx context.Context, c *authority.Client, q authority.AuditQuery, fn func(*authority.AuditEntry) (bool, error)) error {
	q.Limit = min(cmp.Or(q.Limit, authority.MaxAuditPage), authority.MaxAuditPage)
	for {
		p, err := c.Audit(ctx, q)
		if err != nil {
			return err
		}
		for i := range p.Records {
			if more, err := fn(&p.Records[i]); err != nil || !more {
				return err
			}
		}
		if q.Before = p.Next; p.Next == "" {
			return nil
		}
	}
}

func auditText(e *authority.AuditEntry) string {
	var b strings.Builder
	who := e.Principal.Means
	if e.Principal.Name != "" {
		who = e.Principal.Name + " (" + who + ")"
	}
	fmt.Fprintf(&b, "%d %s %s %s by %s", e.Number, e.Time.Format(stamp), e.Action, e.Outcome, who)
	targets := e.Targets
	if n := len(targets) + e.Left; n > 3 {
		targets = append(append([]string(nil), targets[:min(3, len(targets))]...), fmt.Sprintf("… %d in all", n))
	}
	if len(targets) > 0 {
		fmt.Fprintf(&b, ": %s", strings.Join(targets, ", "))
	}
	for _, s := range []string{e.Reason, e.Incident, e.Error, e.Detail} {
		if s != "" {
			fmt.Fprintf(&b, "; %s", s)
		}
	}
	if e.Sequence != 0 {
		fmt.Fprintf(&b, "; seq %d", e.Sequence)
	}
	for _, f := range []struct {
		is   bool
		what string
	}{{e.Drill, "drill"}, {e.Duplicate, "already, under the same idempotency key"}, {e.Count > 1, fmt.Sprintf("%d times", e.Count)}} {
		if f.is {
			fmt.Fprintf(&b, "; %s", f.what)
		}
	}
	if r := e.Report; r != nil {
		fmt.Fprintf(&b, ": report %d of %s", r.Number, r.Enforcer)
	}
	if len(e.Receipts) > 0 {
		fmt.Fprintf(&b, ": %s", count(len(e.Receipts), "receipt"))
	}
	if e.Coverage != nil {
		fmt.Fprintf(&b, ": %s", strings.Join(coverageText(e.Coverage, e.Time), "; "))
	}
	lines := []string{cli.OneLine(b.String())}
	for i := range e.Trail {
		lines = append(lines, "    "+cli.OneLine(callText(&e.Trail[i])))
	}
	return strings.Join(lines, "\n") + "\n"
}

func callText(t *authority.TrailRecord) string {
	var agents []string
	for _, a := range t.Actors {
		agents = append(agents, a.ID)
	}
	s := fmt.Sprintf("%s %s %s at %s by agent %s for user %s", t.Last.Format(stamp), t.Decision, cmp.Or(t.Tool, t.Method, "a call"),
		t.Enforcer, cmp.Or(strings.Join(agents, " < "), "-"), cmp.Or(t.User, "-"))
	if t.Session != "" {
		s += ", session " + t.Session
	}
	if t.Count > 1 {
		s += fmt.Sprintf(", %d times", t.Count)
	}
	return s
}

func newAuditExportCommand(g *globals) *cobra.Command {
	var q authority.AuditQuery
	var since, path string
	cmd := &cobra.Command{
		Use: "export", Short: "Write the records as JSON lines that can be verified", Args: cli.NoArgs,
		Long: `Writes the chain, oldest first, as JSON lines: the key set, every record, and a
signed statement of the whole. Of records that the filters leave out it has the
digests, so that what is there can be verified all the same. Whoever may read the
audit in some tenants gets an export of those, with the digests of all else and
without the key set: to verify it takes --keyset. The records name people: the file
is made with mode 0600.`,
		Example: `  session-authority audit export --out audit.jsonl
  session-authority audit export --incident INC-142 --since 24h | jq -c 'select(.body) | .body'`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var err error
			if q.Since, err = parseMoment("since", since, time.Now()); err != nil {
				return err
			}
			c, err := g.client()
			if err != nil {
				return err
			}
			defer c.Close()
			return writeOut(cmd, path, func(w io.Writer) error { return c.ExportAudit(cmd.Context(), q, w) })
		},
	}
	auditFlags(cmd, &q, &since)
	cmd.Flags().StringVar(&path, "out", "", "write to this new file instead of printing")
	return cmd
}

// writeOut writes to a new file of mode 0600, which is there only when it is
// whole, or to the standard output when path is empty.
func writeOut(cmd *cobra.Command, path string, write func(io.Writer) error) error {
	if path == "" {
		out := bufio.NewWriterSize(cmd.OutOrStdout(), 64<<10)
		return errors.Join(write(out), out.Flush())
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return cli.Usagef("--out: %w: give a new file", err)
	}
	out := bufio.NewWriterSize(f, 64<<10)
	err = write(out)
	if err == nil {
		err = errors.Join(out.Flush(), f.Sync())
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return errors.Join(err, os.Remove(path))
	}
	_, err = fmt.Fprintln(cmd.OutOrStdout(), "written:", path)
	return err
}

// pinned are the flags that say by which keys a file is verified.
type pinned struct{ root, keySet string }

func (p *pinned) flags(cmd *cobra.Command) {
	cmd.Flags().StringVar(&p.root, "root", "", "the root's public key; default is keys/root.pub in the data directory")
	cmd.Flags().StringVar(&p.keySet, "keyset", "", "the key set, as keys/keyset in a data directory: for an export of some tenants, or where keys have been withdrawn since")
}

// verify opens the file, "-" for the standard input, and verifies it with fn.
func (p *pinned) verify(cmd *cobra.Command, g *globals, path string, fn func(r io.Reader, root, newer []byte) error) error {
	rootPath := cmp.Or(p.root, filepath.Join(g.dataDir, service.KeysDir, trust.PublicFile))
	root, err := trust.ReadPublic(rootPath)
	if err != nil {
		return cli.Usagef("%w: give --root, the root's public key", err)
	}
	var newer []byte
	if p.keySet != "" {
		if newer, err = os.ReadFile(p.keySet); err != nil {
			return cli.Usagef("--keyset: %w", err)
		}
	}
	in := cmd.InOrStdin()
	if path != "-" {
		f, err := os.Open(path)
		if err != nil {
			return cli.Usagef("%w", err)
		}
		defer func() { _ = f.Close() }() // it was only read
		in = f
	}
	return fn(in, root, newer)
}

func newAuditVerifyCommand(g *globals) *cobra.Command {
	var p pinned
	cmd := &cobra.Command{
		Use: "verify FILE", Short: "Verify an export, offline", Args: cli.OneArg("the export, or - for the standard input"),
		Long: `Verifies what audit export wrote, with nothing but the root's public key: that no
record was changed, left out, moved or cut off since the authority signed it. It
says which, and ends with exit code 1, if one was.

Records from before the first were removed by retention if the signed statement
says so. What else an export proves, and what it does not: docs/audit.md.`,
		Example: "  session-authority audit verify audit.jsonl --root root.pub\n  session-authority audit export | session-authority audit verify -",
		RunE: func(cmd *cobra.Command, args []string) error {
			return p.verify(cmd, g, args[0], func(r io.Reader, root, newer []byte) error {
				rep, err := audit.Verify(r, root, newer)
				if err != nil {
					return err
				}
				if g.json {
					err = cli.PrintJSON(cmd.OutOrStdout(), rep)
				} else {
					_, err = io.WriteString(cmd.OutOrStdout(), verifyText(rep))
				}
				if err == nil && !rep.Sound {
					err = cli.Exit(exitFailed, nil)
				}
				return err
			})
		},
	}
	p.flags(cmd)
	return cmd
}

func faultsText(faults []audit.Fault, more int) string {
	var b strings.Builder
	for _, f := range faults {
		fmt.Fprintf(&b, "%s\n", cli.OneLine(f.String()))
	}
	if more > 0 {
		fmt.Fprintf(&b, "and %d faults more\n", more)
	}
	return b.String()
}

func verifyText(r *audit.Report) string {
	if !r.Sound {
		return "NOT SOUND\n" + faultsText(r.Faults, r.More)
	}
	var b strings.Builder
	fmt.Fprintf(&b, "sound: records %d to %d, as key %s signed them at %s\n", r.First, r.Last, r.Key, r.Signed.Format(time.RFC3339))
	if len(r.Tenants) > 0 {
		fmt.Fprintf(&b, "a view of %s: what is about others as well, or about nobody in particular, is omitted\n", cli.OneLine(strings.Join(r.Tenants, ", ")))
	}
	if r.Filter != "" {
		fmt.Fprintf(&b, "it was asked for %s\n", cli.OneLine(r.Filter))
	}
	if r.Omitted > 0 {
		fmt.Fprintf(&b, "%d of them without their content\n", r.Omitted)
	}
	if r.Floor > 1 {
		fmt.Fprintf(&b, "records before %d were removed by retention\n", r.Floor)
	}
	if r.Partial && r.First > r.Floor {
		fmt.Fprintf(&b, "records %d to %d were not asked for\n", r.Floor, r.First-1)
	}
	if r.Withdrawn > 0 {
		fmt.Fprintf(&b, "%d statements on the way are of keys that have been withdrawn since\n", r.Withdrawn)
	}
	return b.String()
}
