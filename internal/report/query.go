package report

import (
	"cmp"
	"context"
	"encoding/hex"
	"encoding/json"
	"slices"
	"strings"
	"time"

	"github.com/interlock-fabric/interlock/pkg/authority"
	"github.com/interlock-fabric/interlock/pkg/session"
)

const (
	defaultLimit = 100
	// queryTime bounds a query: what has not been looked at by then is said to
	// be more.
	queryTime = 10 * time.Second
)

// Records returns the newest records that match q, oldest first, of callers of the
// tenants within only; nil is all of them.
func (r *Reader) Records(ctx context.Context, q authority.TrailQuery, within func(tenant string) bool) (*authority.Trail, error) {
	limit := cmp.Or(q.Limit, defaultLimit)
	out := &authority.Trail{Records: []authority.TrailRecord{}}
	w := newWanted(&q, within)
	end := time.Now().Add(queryTime)
	var err error
	out.Enforcers, err = r.contents(ctx, q.Enforcer, q.Since, func(c opened) bool {
		for i := range slices.Backward(c.Records) {
			t := &c.Records[i]
			if !w.record(t) {
				continue
			}
			if len(out.Records) == limit {
				out.More = true
				return false
			}
			out.Records = append(out.Records, recordOf(c.Report, t))
		}
		out.More = time.Now().After(end)
		return !out.More
	})
	slices.Reverse(out.Records)
	return out, err
}

// Seen returns the callers that match q, the last seen first, of the tenants within
// only; nil is all of them.
func (r *Reader) Seen(ctx context.Context, q authority.TrailQuery, within func(tenant string) bool) (*authority.Sightings, error) {
	limit := cmp.Or(q.Limit, defaultLimit)
	out := &authority.Sightings{Seen: []authority.Sighting{}}
	w := newWanted(&q, within)
	end := time.Now().Add(queryTime)
	// The totals of a sighting go on for as long as the enforcer tracks the
	// caller. A later report of the same says all that an earlier one said.
	type span struct {
		enforcer string
		boot     session.WriterID
		first    session.Instant
	}
	type caller struct {
		authority.Sighting
		spans map[span]bool
	}
	all := map[string]*caller{}
	var err error
	out.Enforcers, err = r.contents(ctx, q.Enforcer, q.Since, func(c opened) bool {
		for i := range c.Sightings {
			s := &c.Sightings[i]
			if !w.caller(&s.Caller) || !q.Since.IsZero() && s.Last.Time().Before(q.Since) {
				continue
			}
			who := callerOf(&s.Caller)
			key, err := json.Marshal(who)
			if err != nil {
				continue // texts and lists of them
			}
			x := all[string(key)]
			if x == nil {
				if len(all) == maxCallers {
					out.More = true
					continue
				}
				x = &caller{authority.Sighting{TrailCaller: who, First: s.First.Time(), Last: s.Last.Time()}, map[span]bool{}}
				all[string(key)] = x
			}
			if at := (span{c.Enforcer, c.Boot, s.First}); !x.spans[at] {
				x.spans[at] = true // the newest is first
				x.Calls += s.Calls
				x.Denied += s.Denied
				if t := s.First.Time(); t.Before(x.First) {
					x.First = t
				}
				if t := s.Last.Time(); t.After(x.Last) {
					x.Last = t
				}
				if !slices.Contains(x.Enforcers, c.Enforcer) {
					x.Enforcers = append(x.Enforcers, c.Enforcer)
				}
			}
		}
		if time.Now().After(end) {
			out.More = true
			return false
		}
		return true
	})
	if err != nil {
		return nil, err
	}
	for _, x := range all {
		slices.Sort(x.Enforcers)
		out.Seen = append(out.Seen, x.Sighting)
	}
	slices.SortFunc(out.Seen, func(a, b authority.Sighting) int {
		return cmp.Or(b.Last.Compare(a.Last), cmp.Compare(a.User, b.User), cmp.Compare(a.Session, b.Session))
	})
	if len(out.Seen) > limit {
		out.Seen, out.More = out.Seen[:limit], true
	}
	return out, nil
}

// maxCallers bounds the distinct callers that one query gathers.
const maxCallers = 100_000

// wanted is a query whose values are in the form of the records.
type wanted struct {
	*authority.TrailQuery
	tenant, user, agent, session, client, tool, incident string
	within                                               func(tenant string) bool
}

func newWanted(q *authority.TrailQuery, within func(string) bool) wanted {
	return wanted{
		TrailQuery: q, tenant: session.ReportText(q.Tenant), user: session.ReportText(q.User), agent: session.ReportText(agentOf(q.Agent)),
		session: session.ReportText(q.Session), client: session.ReportText(q.Client), tool: session.ReportText(q.Tool),
		incident: session.ReportText(q.Incident), within: within,
	}
}

// agentOf is the form in which two spellings of one agent are the same.
func agentOf(v string) string {
	if c, err := session.Canonical(session.KindAgent, v); err == nil {
		return c
	}
	return v
}

func (w *wanted) caller(c *session.Caller) bool {
	is := func(want, have string) bool { return want == "" || want == have }
	agent := func(a session.Actor) bool { return a.ID == w.agent || agentOf(a.ID) == w.agent }
	sid := func(a session.Actor) bool { return a.ID == w.session }
	return (w.within == nil || w.within(c.Tenant)) && is(w.tenant, c.Tenant) && is(w.user, c.User) && is(w.client, c.Client) &&
		(w.agent == "" || slices.ContainsFunc(c.Actors, agent)) &&
		(is(w.session, c.Session) || slices.ContainsFunc(c.Ancestors, sid))
}

func (w *wanted) record(t *session.TrailRecord) bool {
	is := func(want, have string) bool { return want == "" || want == have }
	return w.caller(&t.Caller) && is(w.tool, t.Tool) && is(w.incident, t.Incident) && is(w.Decision, t.Decision.String()) &&
		is(strings.ToLower(w.Trace), traceOf(t)) && (w.Since.IsZero() || !t.Last.Time().Before(w.Since))
}

func traceOf(t *session.TrailRecord) string {
	if t.Trace.TraceID == [16]byte{} {
		return ""
	}
	return hex.EncodeToString(t.Trace.TraceID[:])
}

func links(in []session.Actor) (out []authority.TrailLink) {
	for _, a := range in {
		out = append(out, authority.TrailLink{Issuer: a.Issuer, ID: a.ID})
	}
	return out
}

func callerOf(c *session.Caller) authority.TrailCaller {
	return authority.TrailCaller{
		Tenant: c.Tenant, Issuer: c.Issuer, User: c.User, Session: c.Session, Client: c.Client,
		Actors: links(c.Actors), Ancestors: links(c.Ancestors),
	}
}

// Records returns the records of a report's content as the API tells them.
func Records(rep *session.Report, c *session.TrailContent) []authority.TrailRecord {
	out := make([]authority.TrailRecord, len(c.Records))
	for i := range c.Records {
		out[i] = recordOf(rep, &c.Records[i])
	}
	return out
}

func recordOf(rep *session.Report, t *session.TrailRecord) authority.TrailRecord {
	out := authority.TrailRecord{
		Enforcer: rep.Enforcer, Boot: hex.EncodeToString(rep.Boot[:]), Report: rep.Count,
		Decision: t.Decision.String(), Error: t.Cause.String(), Provisional: t.Provisional,
		Count: t.Count, First: t.First.Time(), Last: t.Last.Time(), LatencyMillis: float64(t.Latency) / float64(time.Millisecond),
		Epoch: t.Epoch, Checked: t.Checked, Sequence: t.Sequence, TrailCaller: callerOf(&t.Caller),
		Token: t.Token, Method: t.Method, Tool: t.Tool, Audience: t.Audience, TraceID: traceOf(t),
		Transaction: t.Transaction, Incident: t.Incident, Detail: t.Detail,
	}
	if t.Effect != 0 {
		out.Effect, out.Reason = t.Effect.String(), t.Reason.String()
	}
	if t.Arguments != (session.Hash{}) {
		out.Arguments = "hmac-sha256:" + hex.EncodeToString(t.Arguments[:])
	}
	if t.Trace.Parent != [8]byte{} {
		out.ParentID = hex.EncodeToString(t.Trace.Parent[:])
	}
	return out
}
