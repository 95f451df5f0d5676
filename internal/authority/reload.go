package authority

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"slices"

	"github.com/interlock-fabric/interlock/internal/access"
	"github.com/interlock-fabric/interlock/internal/issuers"
	"github.com/interlock-fabric/interlock/pkg/authority"
)

// Reloaded is what can change in a running authority: the options of these names.
type Reloaded struct {
	Access *access.Config
	Tokens *issuers.Tokens
	APITLS *tls.Config
}

// Reload puts another configuration in force, all of it or nothing, and records
// that. Requests, and streams that are open, are held to it from then on. ctx bounds
// how long it is waited for that introspections can go on without a gap.
func (a *Authority) Reload(ctx context.Context, r Reloaded) error {
	a.reloading.Lock()
	defer a.reloading.Unlock()
	changes, err := a.reload(ctx, r)
	a.noteReload(changes, err)
	return err
}

// ReloadFailed records that there was nothing to reload, since a file cannot be read.
func (a *Authority) ReloadFailed(err error) { a.noteReload(nil, err) }

func (a *Authority) noteReload(changes []string, err error) {
	rec := authority.AuditRecord{Kind: authority.AuditAuthority, Action: "reload", Targets: changes, Outcome: authority.OutcomeDone}
	switch {
	case err != nil:
		rec.Outcome, rec.Error = authority.OutcomeRefused, err.Error()
		rec.Detail = "what was in force still is"
	case len(changes) == 0:
		rec.Detail = "no grant and no setting differs; what is in the files that are named may"
	}
	a.note(rec)
}

func (a *Authority) reload(ctx context.Context, r Reloaded) (changes []string, err error) {
	before := a.access.Load()
	if before != nil && r.Access != nil {
		changes = before.Changes(r.Access)
	}
	if (r.Tokens != nil) != (a.o.Tokens != nil) {
		return nil, errors.New("authority: to verify callers' tokens for the first time, or no more, takes a restart")
	}
	var t *tokenSet
	if r.Tokens != nil {
		if t, err = a.newTokens(r.Tokens); err != nil {
			return nil, err
		}
		if err := t.enforcer.WaitReady(ctx); err != nil {
			a.log.Warn("introspections are answered when the state is known to be fresh", "error", err)
		}
	}
	if err := a.server.Reload(r.Access, r.APITLS); err != nil {
		if t != nil {
			err = errors.Join(err, t.close())
		}
		return nil, err
	}
	a.access.Store(r.Access)
	a.noteAccess("reload")
	if r.Access != nil {
		a.wide.set(r.Access.WidePerMinute)
	}
	a.warnOfTenants(r.Access)
	if t != nil {
		changes = append(changes, tokenChanges(a.o.Tokens, r.Tokens)...)
		a.o.Tokens = r.Tokens
		if err := a.tokens.set(t); err != nil {
			a.log.Warn("what verified tokens until now did not end well", "error", err)
		}
	}
	if old := a.o.APITLS; old != nil && !slices.EqualFunc(old.Certificates, r.APITLS.Certificates, func(x, y tls.Certificate) bool {
		return slices.EqualFunc(x.Certificate, y.Certificate, slices.Equal)
	}) {
		changes = append(changes, "changed: the certificate of the API")
		a.o.APITLS = r.APITLS
	}
	return changes, nil
}

// tokenChanges says which issuers' tokens are verified, and are not any more.
func tokenChanges(before, after *issuers.Tokens) (out []string) {
	list := func(t *issuers.Tokens) (out []string) {
		for _, i := range t.Issuers {
			out = append(out, fmt.Sprintf("tokens of %s in tenant %s", i.URL, i.Tenant))
		}
		return append(out, "tokens are revoked with their "+string(t.Revoke), "emails of "+t.EmailIssuer)
	}
	old, now := list(before), list(after)
	for _, x := range now {
		if !slices.Contains(old, x) {
			out = append(out, "added: "+x)
		}
	}
	for _, x := range old {
		if !slices.Contains(now, x) {
			out = append(out, "removed: "+x)
		}
	}
	return out
}
