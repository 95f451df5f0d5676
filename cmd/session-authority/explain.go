package main

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/interlock-fabric/interlock/internal/cli"
	"github.com/interlock-fabric/interlock/pkg/authority"
	"github.com/interlock-fabric/interlock/pkg/session"
)

func newExplainCommand(g *globals) *cobra.Command {
	var id authority.Identity
	var tokenFile, tool, audience, authTime, sessionStart string
	var lowRisk bool
	cmd := &cobra.Command{
		Use: "explain", Short: "Say why a caller is denied", Args: cli.NoArgs,
		Long: `Says which entries in force match a caller, by its ids or by a token's claims. The
answer comes from the rules that enforcers run. It is of the state that is stored;
what an enforcer holds only provisionally, or denies for staleness, is not in it.

A token's signature is not verified, and nothing of it is kept.

` + helpExitCodes,
		Example: `  session-authority explain --user alice --agent billing-bot --tool delete_repo
  session-authority explain --token-file t.jwt`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			r := authority.ExplainRequest{Tool: tool, Audience: audience, LowRisk: lowRisk}
			var err error
			if id.AuthTime, err = parseMoment("auth-time", authTime, time.Now()); err != nil {
				return err
			}
			if id.SessionStart, err = parseMoment("session-start", sessionStart, time.Now()); err != nil {
				return err
			}
			if tokenFile != "" {
				for _, name := range identityFlags {
					if cmd.Flags().Changed(name) {
						return cli.Usagef("--token-file and --%s are both given: the caller is one or the other", name)
					}
				}
				if r.Claims, r.SigningInputHash, err = readClaims(cmd.InOrStdin(), tokenFile); err != nil {
					return err
				}
				r.Tenant = id.Tenant
				_, _ = fmt.Fprintln(cmd.ErrOrStderr(), "note: the token's signature was not verified; this holds if it is genuine")
			} else if !slices.ContainsFunc(identityFlags[1:], cmd.Flags().Changed) {
				return cli.Usagef("no caller: name one by its ids, as in --user alice, or give --token-file")
			} else {
				r.Identity = &id
			}
			c, err := g.client()
			if err != nil {
				return err
			}
			defer c.Close()
			x, err := c.Explain(cmd.Context(), r)
			if err != nil {
				return err
			}
			if g.json {
				err = cli.PrintJSON(cmd.OutOrStdout(), x)
			} else {
				_, err = fmt.Fprint(cmd.OutOrStdout(), explainText(x))
			}
			if err == nil && x.Denied {
				return cli.Exit(exitFailed, nil)
			}
			return err
		},
	}
	f := cmd.Flags()
	f.StringVar(&tokenFile, "token-file", "", "a JWT to take the caller from; - reads it from standard input")
	f.StringVar(&id.Tenant, "tenant", cli.Env("INTERLOCK_TENANT", ""), "the tenant, where there is more than one (INTERLOCK_TENANT)")
	f.StringVar(&id.Issuer, "issuer", cli.Env("INTERLOCK_ISSUER", ""), "who minted the ids (INTERLOCK_ISSUER)")
	f.StringVar(&id.User, "user", "", "the user")
	f.StringArrayVar(&id.Actors, "agent", nil, "an agent of the chain, the current one first; may be repeated")
	f.StringVar(&id.Client, "client", "", "the OAuth client")
	f.StringVar(&id.Session, "session", "", "the session")
	f.StringArrayVar(&id.Ancestors, "ancestor", nil, "a session that it descends from; may be repeated")
	f.StringVar(&id.Token, "token", "", "the token's id")
	f.StringArrayVar(&id.Keys, "key", nil, "a key: jkt:, x5t#S256: or apikey:; may be repeated")
	f.StringArrayVar(&id.Credentials, "credential", nil, "a verifiable credential's id; may be repeated")
	f.StringArrayVar(&id.Digests, "digest", nil, "a digest; may be repeated")
	f.StringVar(&id.Blueprint, "blueprint", "", "the blueprint")
	f.StringVar(&id.Owner, "owner", "", "the owner")
	f.StringArrayVar(&id.Roles, "role", nil, "a role; may be repeated")
	f.StringArrayVar(&id.Capabilities, "capability", nil, "a capability or scope; may be repeated")
	f.StringVar(&authTime, "auth-time", "", "when the caller authenticated; forms as for revoke --issued-before")
	f.StringVar(&sessionStart, "session-start", "", "when the session began")
	f.StringVar(&id.ACR, "acr", "", "the authentication context")
	f.StringVar(&tool, "tool", "", "the tool that is called")
	f.StringVar(&audience, "audience", "", "the resource that is called")
	f.BoolVar(&lowRisk, "low-risk", false, "the call is marked low-risk")
	return cmd
}

// identityFlags are what a token says itself; the issuer, first, names nobody.
var identityFlags = []string{"issuer", "user", "agent", "client", "session", "ancestor", "token", "key", "credential",
	"digest", "blueprint", "owner", "role", "capability", "auth-time", "session-start", "acr"}

// readClaims takes a JWT apart without verifying it.
func readClaims(stdin io.Reader, path string) (claims json.RawMessage, hash string, err error) {
	token, err := cli.ReadToken(stdin, path)
	if err != nil {
		return nil, "", err
	}
	// No part of a token goes into an error.
	bad := cli.Usagef("--token-file %s holds no JWT: give three parts of base64url with dots between", path)
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return nil, "", bad
	}
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil || !json.Valid(payload) {
		return nil, "", bad
	}
	return payload, session.TokenValue("", []byte(parts[0]+"."+parts[1])), nil
}

func explainText(x *authority.Explanation) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s\n", cli.OneLine(x.Verdict))
	line := func(m *authority.Match, why string) {
		fmt.Fprintf(&b, "  %s on the %s: %s", m.Effect, strings.ReplaceAll(m.On, "+", " and "), m.Reason)
		if m.Incident != "" {
			fmt.Fprintf(&b, ", %s", cli.OneLine(m.Incident))
		}
		fmt.Fprintf(&b, "; seq %d, since %s", m.Number, m.Since.UTC().Format(time.RFC3339))
		if !m.IssuedBefore.IsZero() {
			fmt.Fprintf(&b, ", for what is from before %s", m.IssuedBefore.UTC().Format(time.RFC3339))
		}
		if !m.Expires.IsZero() {
			fmt.Fprintf(&b, ", until %s", m.Expires.UTC().Format(time.RFC3339))
		}
		if m.ACR != "" {
			fmt.Fprintf(&b, ", requires %s", cli.OneLine(m.ACR))
		}
		switch {
		case m.Exempted:
			b.WriteString(", this caller is exempt")
		case m.Exempt > 0:
			fmt.Fprintf(&b, ", %d exempt", m.Exempt)
		}
		if m.Share > 0 {
			fmt.Fprintf(&b, ", %g%% set free", m.Share)
		}
		if m.Drill {
			b.WriteString(" (drill)")
		}
		b.WriteString(why + "\n")
	}
	for i := range x.Matches {
		line(&x.Matches[i], "")
	}
	for i := range x.Nearby {
		line(&x.Nearby[i], " - does not match this call")
	}
	return b.String()
}
