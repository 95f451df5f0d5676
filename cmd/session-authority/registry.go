package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/interlock-fabric/interlock/internal/cli"
	"github.com/interlock-fabric/interlock/pkg/authority"
)

// placeFlags are the flags that say whose ids are meant.
type placeFlags struct{ tenant, issuer string }

func (p *placeFlags) add(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&p.tenant, "tenant", cli.Env("INTERLOCK_TENANT", ""), "the tenant, where there is more than one (INTERLOCK_TENANT)")
	f.StringVar(&p.issuer, "issuer", cli.Env("INTERLOCK_ISSUER", ""), "who minted the ids (INTERLOCK_ISSUER)")
}

// with runs a function with a client.
func (g *globals) with(fn func(c *authority.Client) error) error {
	c, err := g.client()
	if err != nil {
		return err
	}
	defer c.Close()
	return fn(c)
}

func newAgentCommands(g *globals) []*cobra.Command {
	return []*cobra.Command{
		newRegisterAgentCommand(g), newShowAgentCommand(g), newListAgentsCommand(g),
		newLifecycleCommand(g, authority.SuspendAgent, "Deny an agent until it is activated", "suspended"),
		newLifecycleCommand(g, authority.ActivateAgent, "Let an agent act, and lift what suspends it", "active"),
		newLifecycleCommand(g, authority.DecommissionAgent, "Deny an agent for good; its id is never used again", "decommissioned"),
	}
}

func newRegisterAgentCommand(g *globals) *cobra.Command {
	var r authority.AgentRequest
	var p placeFlags
	cmd := &cobra.Command{
		Use: "register ID", Short: "Register an agent, or change one", Args: cli.OneArg("the agent's id"),
		Long: `Registers an agent. What is registered already with the same content is left as it
is; another content is taken only with the revision in whose place it is put.`,
		Example: `  session-authority agents register spiffe://corp/agent/billing --owner mailto:billing@corp.example \
    --blueprint billing-v2 --environment production --digest code:sha256:HEX`,
		RunE: func(cmd *cobra.Command, args []string) error {
			r.ID, r.Tenant, r.Issuer = args[0], p.tenant, p.issuer
			return g.with(func(c *authority.Client) error {
				a, err := c.RegisterAgent(cmd.Context(), r)
				if err != nil {
					return err
				}
				if g.json {
					return cli.PrintJSON(cmd.OutOrStdout(), a)
				}
				_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s: %s, revision %d\n", cli.OneLine(a.ID), a.State, a.Revision)
				return err
			})
		},
	}
	p.add(cmd)
	f := cmd.Flags()
	f.StringVar(&r.Owner, "owner", "", "who answers for it")
	f.StringVar(&r.Purpose, "purpose", "", "what it is for")
	f.StringVar(&r.Environment, "environment", "", "where it runs, as in production")
	f.StringVar(&r.Blueprint, "blueprint", "", "what it was made from")
	f.StringArrayVar(&r.Capabilities, "capability", nil, "what it may do; may be repeated")
	f.StringArrayVar(&r.Digests, "digest", nil, "of its code, model or image, as in code:sha256:HEX; may be repeated")
	f.Uint64Var(&r.Revision, "revision", 0, "put it in place of this revision")
	return cmd
}

func newShowAgentCommand(g *globals) *cobra.Command {
	var p placeFlags
	cmd := &cobra.Command{
		Use: "show ID", Short: "Show an agent", Args: cli.OneArg("the agent's id"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return g.with(func(c *authority.Client) error {
				page, err := c.Agents(cmd.Context(), authority.RegistryQuery{Tenant: p.tenant, Issuer: p.issuer, ID: args[0]})
				if err != nil {
					return err
				}
				if len(page.Agents) == 0 {
					return cli.Exit(exitFailed, fmt.Errorf("no agent %.64q is registered, nor was one seen", args[0]))
				}
				return cli.PrintJSON(cmd.OutOrStdout(), page.Agents[0])
			})
		},
	}
	p.add(cmd)
	return cmd
}

func newListAgentsCommand(g *globals) *cobra.Command {
	var q authority.RegistryQuery
	var p placeFlags
	var owner, blueprint, capability, digest string
	cmd := &cobra.Command{
		Use: "list", Short: "List agents, registered or seen in use", Args: cli.NoArgs,
		Example: "  session-authority agents list --blueprint billing-v2\n  session-authority agents list --registered false",
		RunE: func(cmd *cobra.Command, _ []string) error {
			q.Tenant, q.Issuer = p.tenant, p.issuer
			for kind, v := range map[string]string{"owner": owner, "blueprint": blueprint, "capability": capability, "digest": digest} {
				if v != "" {
					q.Terms = append(q.Terms, authority.Term{Kind: kind, Value: v})
				}
			}
			return g.with(func(c *authority.Client) error {
				page, err := c.Agents(cmd.Context(), q)
				if err != nil {
					return err
				}
				if g.json {
					return cli.PrintJSON(cmd.OutOrStdout(), page)
				}
				if len(page.Agents) == 0 && page.Next == "" {
					_, err := fmt.Fprintln(cmd.OutOrStdout(), "no agents")
					return err
				}
				w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 8, 2, ' ', 0)
				// Flush says what could not be written.
				_, _ = fmt.Fprintln(w, "AGENT\tSTATE\tOWNER\tBLUEPRINT\tENVIRONMENT\tREVISION")
				for i := range page.Agents {
					a := &page.Agents[i]
					state := a.State
					if !a.Registered {
						state = "UNREGISTERED"
					}
					_, _ = fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%d\n", cli.OneLine(a.ID), state, dash(a.Owner), dash(a.Blueprint), dash(a.Environment), a.Revision)
				}
				return errors.Join(w.Flush(), nextPage(cmd.ErrOrStderr(), page.Next))
			})
		},
	}
	p.add(cmd)
	f := cmd.Flags()
	f.StringVar(&owner, "owner", "", "of this owner")
	f.StringVar(&blueprint, "blueprint", "", "of this blueprint")
	f.StringVar(&capability, "capability", "", "with this capability")
	f.StringVar(&digest, "digest", "", "with this digest")
	f.StringVar(&q.Environment, "environment", "", "in this environment")
	f.StringVar(&q.State, "state", "", "only registered, active, suspended or decommissioned")
	f.StringVar(&q.Registered, "registered", "", "true or false: only those that are, or are not")
	pageFlags(cmd, &q)
	return cmd
}

func newLifecycleCommand(g *globals, op authority.Lifecycle, short, done string) *cobra.Command {
	var r authority.LifecycleRequest
	var p placeFlags
	cmd := &cobra.Command{
		Use: string(op) + " ID", Short: short, Args: cli.OneArg("the agent's id"),
		RunE: func(cmd *cobra.Command, args []string) error {
			r.ID, r.Tenant, r.Issuer, r.Operation = args[0], p.tenant, p.issuer, op
			return g.with(func(c *authority.Client) error {
				a, err := c.ChangeAgent(cmd.Context(), r)
				if err != nil {
					return err
				}
				if g.json {
					return cli.PrintJSON(cmd.OutOrStdout(), a)
				}
				line := cli.OneLine(a.Agent.ID) + ": " + done
				if a.Decision != nil {
					line += fmt.Sprintf(" at seq %d", a.Decision.Number)
				}
				for _, w := range a.Warnings {
					line += "\nwarning: " + cli.OneLine(w)
				}
				_, err = fmt.Fprintln(cmd.OutOrStdout(), line)
				return err
			})
		},
	}
	p.add(cmd)
	f := cmd.Flags()
	f.StringVar(&r.Reason, "reason", "", "the decision's; see session-authority suspend --help")
	f.StringVar(&r.Incident, "incident", "", "incident id; shown in every denial")
	return cmd
}

func newSessionsCommand(g *globals) *cobra.Command {
	cmd := &cobra.Command{
		Use: "sessions", Short: "Register, show and list sessions", Args: func(*cobra.Command, []string) error { return nil },
		RunE: cli.Subcommands,
	}
	cmd.AddCommand(newRegisterSessionsCommand(g), newShowSessionCommand(g), newListSessionsCommand(g))
	return cmd
}

func newRegisterSessionsCommand(g *globals) *cobra.Command {
	var s authority.Session
	var p placeFlags
	var agent, parent, file, until string
	var chain []string
	var forTime time.Duration
	cmd := &cobra.Command{
		Use: "register ID | register --file FILE", Short: "Register a session, or many", Args: cobra.MaximumNArgs(1),
		Long: `Registers a session, or those in a file of JSON, one a line, up to a thousand at once,
all or none. Never give a token: keys are thumbprints or hashes, credentials are ids.`,
		Example: `  session-authority sessions register s_9f2c --user alice --agent spiffe://corp/agent/billing --for 1h
  issuer-export | session-authority sessions register --file -`,
		RunE: func(cmd *cobra.Command, args []string) error {
			var list []authority.Session
			switch {
			case (file == "") == (len(args) == 0):
				return cli.Usagef("give either the session's id or --file")
			case file != "":
				var err error
				if list, err = readSessions(cmd.InOrStdin(), file); err != nil {
					return err
				}
			default:
				s.ID = args[0]
				s.Agent.ID, s.Parent.ID = agent, parent
				for _, id := range chain {
					s.Chain = append(s.Chain, authority.TrailLink{ID: id})
				}
				switch {
				case (until == "") == (forTime == 0):
					return cli.Usagef("give either --until or --for")
				case forTime < 0:
					return cli.Usagef("--for %s is in the past: give a time to come", forTime)
				case until != "":
					var err error
					if s.Expires, err = time.Parse(time.RFC3339Nano, until); err != nil {
						return cli.Usagef("--until %.64q is not a time: give one like 2026-11-22T09:00:00Z, or use --for 30m", until)
					}
				default:
					s.Expires = time.Now().Add(forTime)
				}
				list = []authority.Session{s}
			}
			for i := range list {
				if list[i].Tenant == "" {
					list[i].Tenant = p.tenant
				}
				if list[i].Issuer == "" {
					list[i].Issuer = p.issuer
				}
			}
			return g.with(func(c *authority.Client) error {
				a, err := c.RegisterSessions(cmd.Context(), list)
				if err != nil {
					return err
				}
				if g.json {
					return cli.PrintJSON(cmd.OutOrStdout(), a)
				}
				_, err = fmt.Fprintf(cmd.OutOrStdout(), "registered %s; %d known already\n", count(a.Registered, "session"), a.Known)
				return err
			})
		},
	}
	p.add(cmd)
	f := cmd.Flags()
	f.StringVar(&file, "file", "", "sessions as JSON, one a line; - is standard input")
	f.StringVar(&agent, "agent", "", "the agent that holds it")
	f.StringArrayVar(&chain, "via", nil, "an agent that acts through that one, the nearest first; may be repeated")
	f.StringVar(&s.User, "user", "", "the user on whose behalf it acts")
	f.StringVar(&s.Client, "client", "", "the OAuth client")
	f.StringVar(&parent, "parent", "", "the session from which it descends")
	f.StringArrayVar(&s.Keys, "key", nil, "a thumbprint or hash, as in jkt:THUMBPRINT; may be repeated")
	f.StringArrayVar(&s.Credentials, "credential", nil, "the id of a credential; may be repeated")
	f.StringArrayVar(&s.Digests, "digest", nil, "a digest that the agent presented; may be repeated")
	f.StringVar(&until, "until", "", "when it expires (RFC 3339)")
	f.DurationVar(&forTime, "for", 0, "the same, counted from now, as in 1h")
	return cmd
}

// readSessions reads a file of JSON lines.
func readSessions(stdin io.Reader, file string) ([]authority.Session, error) {
	in := stdin
	if file != "-" {
		f, err := os.Open(file)
		if err != nil {
			return nil, cli.Usagef("--file: %w", err)
		}
		defer func() { _ = f.Close() }() // it was only read
		in = f
	}
	b, err := io.ReadAll(io.LimitReader(in, authority.MaxBody+1))
	if err != nil {
		return nil, cli.Usagef("--file: %w", err)
	}
	if len(b) > authority.MaxBody {
		return nil, cli.Usagef("--file is longer than %d bytes: register fewer at once", authority.MaxBody)
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	var list []authority.Session
	for {
		var s authority.Session
		err := d.Decode(&s)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, cli.Usagef("--file: session %d: %s", len(list)+1, strings.TrimPrefix(err.Error(), "json: "))
		}
		list = append(list, s)
	}
	if n := len(list); n == 0 || n > authority.MaxSessions {
		return nil, cli.Usagef("--file has %s: register 1 to %d at once", count(n, "session"), authority.MaxSessions)
	}
	return list, nil
}

func newShowSessionCommand(g *globals) *cobra.Command {
	var p placeFlags
	cmd := &cobra.Command{
		Use: "show ID", Short: "Show a session", Args: cli.OneArg("the session's id"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return g.with(func(c *authority.Client) error {
				page, err := c.Sessions(cmd.Context(), authority.RegistryQuery{Tenant: p.tenant, Issuer: p.issuer, ID: args[0]})
				if err != nil {
					return err
				}
				if len(page.Sessions) == 0 {
					return cli.Exit(exitFailed, fmt.Errorf("no session %.64q is registered", args[0]))
				}
				return cli.PrintJSON(cmd.OutOrStdout(), page.Sessions[0])
			})
		},
	}
	p.add(cmd)
	return cmd
}

func newListSessionsCommand(g *globals) *cobra.Command {
	var q authority.RegistryQuery
	var p placeFlags
	cmd := &cobra.Command{
		Use: "list [TARGET]", Short: "List the sessions that a target matches, the newest first",
		Args: func(*cobra.Command, []string) error { return nil }, // read below, for a better answer
		Example: `  session-authority sessions list user alice
  session-authority sessions list blueprint billing-v2 and user alice
  session-authority sessions list session s_9f2c      with what descends from it`,
		RunE: func(cmd *cobra.Command, args []string) error {
			q.Tenant, q.Issuer = p.tenant, p.issuer
			if len(args) > 0 {
				t, err := parseTarget(args, p.tenant, p.issuer)
				if err != nil {
					return err
				}
				q.Terms = t.Terms
			}
			return g.with(func(c *authority.Client) error {
				page, err := c.Sessions(cmd.Context(), q)
				if err != nil {
					return err
				}
				if g.json {
					return cli.PrintJSON(cmd.OutOrStdout(), page)
				}
				if len(page.Sessions) == 0 && page.Next == "" {
					_, err := fmt.Fprintln(cmd.OutOrStdout(), "no sessions")
					return err
				}
				w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 8, 2, ' ', 0)
				_, _ = fmt.Fprintln(w, "SESSION\tUSER\tAGENT\tCLIENT\tPARENT\tEXPIRES")
				for i := range page.Sessions {
					s := &page.Sessions[i]
					_, _ = fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\n", cli.OneLine(s.ID), dash(s.User), dash(s.Agent.ID), dash(s.Client), dash(s.Parent.ID), s.Expires.Format(time.RFC3339))
				}
				return errors.Join(w.Flush(), nextPage(cmd.ErrOrStderr(), page.Next))
			})
		},
	}
	p.add(cmd)
	cmd.Flags().BoolVar(&q.Expired, "expired", false, "also those that expired within the last hour")
	pageFlags(cmd, &q)
	return cmd
}

func pageFlags(cmd *cobra.Command, q *authority.RegistryQuery) {
	f := cmd.Flags()
	f.IntVar(&q.Limit, "limit", authority.DefaultPage, fmt.Sprintf("at most so many, at most %d", authority.MaxPage))
	f.StringVar(&q.Page, "page", "", "the page that the one before named")
}

func nextPage(w io.Writer, next string) error {
	if next == "" {
		return nil
	}
	_, err := fmt.Fprintf(w, "note: there are more: --page %s\n", next)
	return err
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return cli.OneLine(s)
}
