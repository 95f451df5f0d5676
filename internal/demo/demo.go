// Package demo shows the fabric at work, with nothing faked: an authority with
// its bus, two MCP servers that embed the enforcer, one of each era of the
// protocol, and real MCP clients that call tools over HTTP while their sessions
// are revoked, suspended, killed, and the bus is cut.
package demo

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"time"

	"github.com/interlock-fabric/interlock/pkg/authority"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// Options configures Run. The zero value is the demo as the README shows it.
type Options struct {
	// Out receives the story, or the result as JSON; nil discards it.
	Out io.Writer
	// JSON prints one object instead of the story.
	JSON bool
	// Dir is where the authority keeps its data; empty is a temporary folder
	// that is removed at the end.
	Dir string
	// Fleet is how many enforcers the fan-out step opens; zero is 100.
	Fleet int
	// Logger hears of what the parts log; nil is silent.
	Logger *slog.Logger
}

// Result is what the demo did.
type Result struct {
	OK    bool   `json:"ok"`
	Steps []Step `json:"steps"`
}

// Step is one expectation, and how long it took to come true.
type Step struct {
	Name   string  `json:"name"`
	OK     bool    `json:"ok"`
	Millis float64 `json:"millis"`
	// Why is set when the expectation did not hold.
	Why string `json:"why,omitempty"`
}

// ErrFailed is returned when an expectation did not hold.
var ErrFailed = errors.New("the demo did not go as it must")

// maxStale is the bound of the demo's enforcers: the shortest there is, so that
// the fail-closed moment comes soon.
const maxStale = 2 * time.Second

// Run plays the demo to its end. The error is ErrFailed when a step failed, and
// another when the demo could not be set up.
func Run(ctx context.Context, o Options) (Result, error) {
	if o.Out == nil {
		o.Out = io.Discard
	}
	if o.Fleet == 0 {
		o.Fleet = 100
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Dir == "" {
		dir, err := os.MkdirTemp("", "interlock-demo-")
		if err != nil {
			return Result{}, err
		}
		defer func() {
			if err := os.RemoveAll(dir); err != nil {
				o.Logger.Warn("remove the demo's folder", "error", err)
			}
		}()
		o.Dir = dir
	}
	s := &story{Options: o, ctx: ctx}
	defer s.close()
	if err := s.play(); err != nil {
		return s.result, err
	}
	s.result.OK = true
	for _, step := range s.result.Steps {
		s.result.OK = s.result.OK && step.OK
	}
	if o.JSON {
		enc := json.NewEncoder(o.Out)
		enc.SetIndent("", "  ")
		if err := enc.Encode(s.result); err != nil {
			return s.result, err
		}
	}
	if !s.result.OK {
		return s.result, ErrFailed
	}
	return s.result, s.broken
}

// story is a demo that is being played.
type story struct {
	Options
	ctx     context.Context
	result  Result
	closers []func()
	broken  error // of the writer

	fabric *fabric
	mint   *mint
	legacy *tools
	modern *tools
}

func (s *story) close() {
	for i := len(s.closers) - 1; i >= 0; i-- {
		s.closers[i]()
	}
	s.closers = nil
}

func (s *story) later(fn func()) { s.closers = append(s.closers, fn) }

// chapter announces what follows.
func (s *story) chapter(format string, a ...any) {
	s.say("\n"+format+"\n", a...)
}

// say writes a line of the story, unless it is told as JSON. The first error of
// the writer is kept for Run.
func (s *story) say(format string, a ...any) {
	if s.JSON || s.broken != nil {
		return
	}
	_, s.broken = fmt.Fprintf(s.Out, format, a...)
}

// step records an expectation, and that it held if err is nil.
func (s *story) step(name string, took time.Duration, err error) {
	step := Step{Name: name, OK: err == nil, Millis: float64(took.Microseconds()) / 1000}
	mark := "ok  "
	if err != nil {
		step.Why, mark = err.Error(), "FAIL"
	}
	s.result.Steps = append(s.result.Steps, step)
	s.say("  %s %-62s %9.2f ms\n", mark, name, step.Millis)
	if err != nil {
		s.say("       %v\n", err)
	}
}

// does records an expectation on what fn does, with the time that it takes.
func (s *story) does(name string, fn func() error) {
	began := time.Now()
	err := fn()
	s.step(name, time.Since(began), err)
}

func (s *story) play() error {
	began := time.Now()
	var err error
	if s.fabric, err = startFabric(s.ctx, s.Dir, s.Logger); err != nil {
		return fmt.Errorf("start the authority: %w", err)
	}
	s.later(s.fabric.close)
	if s.mint, err = newMint(); err != nil {
		return err
	}
	for _, x := range []struct {
		into **tools
		name string
		era  string
	}{{&s.legacy, "tools-2025", "2025-11-25"}, {&s.modern, "tools-2026", "2026-07-28"}} {
		t, err := s.fabric.startTools(s.ctx, x.name, x.era, s.mint, s.Logger)
		if err != nil {
			return fmt.Errorf("start the MCP server %s: %w", x.name, err)
		}
		*x.into = t
		s.later(t.close)
	}
	s.say("A session authority with its bus, and two MCP servers with the enforcer in them.\n")
	s.step("authority and two MCP servers are up", time.Since(began), nil)

	for _, play := range []func() error{s.allow, s.revokeInMidCall, s.suspend, s.cascade, s.kill, s.fanOut, s.cutTheBus} {
		if err := s.ctx.Err(); err != nil {
			return err
		}
		// A step that failed is in the result; the next ones stand on their own.
		if err := play(); err != nil && !errors.Is(err, errStep) {
			return err
		}
	}
	return nil
}

// errStep marks an error that is in the result already.
var errStep = errors.New("a step failed")

// failed records a step that failed, and on which the rest of its chapter
// builds.
func (s *story) failed(name string, took time.Duration, err error) error {
	s.step(name, took, err)
	return errStep
}

func (s *story) eras() []*tools { return []*tools{s.legacy, s.modern} }

func (s *story) allow() error {
	s.chapter("Allow: two agents call tools over MCP.")
	for _, t := range s.eras() {
		c, err := t.dial(s.ctx, s.mint.caller("alice", "s-allow"))
		if err != nil {
			return s.failed(t.era+": an agent calls a tool", 0, err)
		}
		s.does(t.era+": an agent calls a tool", func() error { return c.call(s.ctx, "echo") })
		c.close()
	}
	return nil
}

func (s *story) revokeInMidCall() error {
	s.chapter("Revoke one session while its tool call is running.")
	for i, t := range s.eras() {
		id := fmt.Sprintf("s-revoke-%d", i)
		victim, err := t.dial(s.ctx, s.mint.caller("alice", id))
		if err != nil {
			return s.failed(t.era+": connect", 0, err)
		}
		defer victim.close()
		bystander, err := t.dial(s.ctx, s.mint.caller("alice", id+"-bystander"))
		if err != nil {
			return s.failed(t.era+": connect", 0, err)
		}
		defer bystander.close()
		running, err := victim.start(s.ctx, t, "wait")
		if err != nil {
			return s.failed(t.era+": start a call", 0, err)
		}
		began := time.Now()
		denied := make(chan timed, 1)
		go func() { denied <- victim.untilDenied(s.ctx, began) }()
		d, err := s.fabric.client.Decide(s.ctx, authority.Request{
			Operation: authority.Revoke, Targets: []authority.Target{authority.One("", "session", issuer, id)},
			Reason: "stolen-token", Incident: "INC-142",
		})
		answered := time.Since(began)
		if err == nil && !d.Durable {
			err = errors.New("the decision was not durable")
		}
		s.step(t.era+": decided, signed, durable in the log", answered, err)
		cut := <-running
		s.step(t.era+": the running call is cut, its client reads why", cut.at.Sub(began), expect(cut.err, session.ErrRevoked, "INC-142"))
		first := <-denied
		s.step(t.era+": first request denied", first.at.Sub(began), expect(first.err, session.ErrRevoked, "INC-142"))
		s.does(t.era+": another session of the same user goes on", func() error { return bystander.call(s.ctx, "echo") })
		if d != nil {
			began := time.Now()
			cover, err := s.fabric.client.Coverage(s.ctx, d.Epoch, d.Number, 10*time.Second)
			name := t.era + ": in effect everywhere"
			if err == nil {
				name = fmt.Sprintf("%s: in effect on %d of %d; running work cut: %d", t.era, cover.InEffect, cover.Enforcers, cover.Cut)
				if cover.InEffect != cover.Enforcers || cover.Cut == 0 {
					err = fmt.Errorf("coverage: %+v", *cover)
				}
			}
			s.step(name, time.Since(began), err)
		}
	}
	return nil
}

func (s *story) suspend() error {
	s.chapter("Suspend an agent, and let it go on.")
	t := s.modern
	c, err := t.dial(s.ctx, s.mint.caller("bob", "s-suspend", "spiffe://demo/agent/researcher"))
	if err != nil {
		return s.failed("connect", 0, err)
	}
	defer c.close()
	target := []authority.Target{authority.One("", "agent", "", "spiffe://demo/agent/researcher")}
	began := time.Now()
	_, err = s.fabric.client.Decide(s.ctx, authority.Request{
		Operation: authority.Suspend, Targets: target, Reason: "anomaly", Incident: "INC-143", Commit: true,
	})
	if err != nil {
		return s.failed("suspend", time.Since(began), err)
	}
	first := c.untilDenied(s.ctx, began)
	s.step("suspended agent: first request denied", first.at.Sub(began), expect(first.err, session.ErrSuspended, "INC-143"))
	began = time.Now()
	if _, err = s.fabric.client.Decide(s.ctx, authority.Request{Operation: authority.Resume, Targets: target, Incident: "INC-143", Commit: true}); err != nil {
		return s.failed("resume", time.Since(began), err)
	}
	back, err := c.untilAllowed(s.ctx)
	s.step("resumed agent: first request allowed", back.Sub(began), err)
	return nil
}

func (s *story) cascade() error {
	s.chapter("Cascade: one entry on the user denies every session below, those made later too.")
	t := s.legacy
	parent, err := t.dial(s.ctx, s.mint.caller("carol", "s-parent", "spiffe://demo/agent/planner"))
	if err != nil {
		return s.failed("connect", 0, err)
	}
	defer parent.close()
	began := time.Now()
	d, err := s.fabric.client.Decide(s.ctx, authority.Request{
		Operation: authority.Revoke, Targets: []authority.Target{authority.One("", "user", issuer, "carol")},
		Reason: "compromised", Incident: "INC-144", Commit: true,
	})
	if err != nil {
		return s.failed("revoke the user", time.Since(began), err)
	}
	first := parent.untilDenied(s.ctx, began)
	s.step("the user's agent is denied", first.at.Sub(began), expect(first.err, session.ErrRevoked, "INC-144"))
	// The sub-agent goes to the other server: what has been seen of the first
	// says nothing of that one, its receipt does.
	cover, err := s.fabric.client.Coverage(s.ctx, d.Epoch, d.Number, 10*time.Second)
	if err == nil && !cover.Effective {
		err = fmt.Errorf("coverage: %+v", *cover)
	}
	if err != nil {
		return s.failed("in effect everywhere", time.Since(began), err)
	}
	began = time.Now()
	child := s.mint.child("carol", "s-child", "s-parent", "spiffe://demo/agent/worker", "spiffe://demo/agent/planner")
	_, err = s.modern.dial(s.ctx, child)
	s.step("a sub-agent's session, minted after that, is denied at connect", time.Since(began), expect(err, session.ErrRevoked, "INC-144"))
	return nil
}

func (s *story) kill() error {
	s.chapter("Global kill, and restore.")
	var clients []*client
	for i, t := range s.eras() {
		c, err := t.dial(s.ctx, s.mint.caller("dave", fmt.Sprintf("s-kill-%d", i)))
		if err != nil {
			return s.failed("connect", 0, err)
		}
		defer c.close()
		clients = append(clients, c)
	}
	target := []authority.Target{{Terms: []authority.Term{{Kind: "global"}}}}
	began := time.Now()
	_, err := s.fabric.client.Decide(s.ctx, authority.Request{Operation: authority.Kill, Targets: target, Reason: "compromised", Incident: "INC-145", Commit: true})
	if err != nil {
		return s.failed("kill", time.Since(began), err)
	}
	for i, c := range clients {
		first := c.untilDenied(s.ctx, began)
		s.step(s.eras()[i].era+": everything is denied", first.at.Sub(began), expect(first.err, session.ErrSuspended, "INC-145"))
	}
	began = time.Now()
	if _, err = s.fabric.client.Decide(s.ctx, authority.Request{Operation: authority.Restore, Targets: target, Incident: "INC-145", Commit: true}); err != nil {
		return s.failed("restore", time.Since(began), err)
	}
	for i, c := range clients {
		back, err := c.untilAllowed(s.ctx)
		s.step(s.eras()[i].era+": restored, the same session goes on", back.Sub(began), err)
	}
	return nil
}

func (s *story) fanOut() error {
	s.chapter("Fan-out: %d more enforcers, each with a connection of its own.", s.Fleet)
	began := time.Now()
	fleet, err := s.fabric.fleet(s.ctx, s.Fleet)
	if err != nil {
		return s.failed("open the fleet", time.Since(began), err)
	}
	defer fleet.close()
	s.step(fmt.Sprintf("%d enforcers enrolled and open", s.Fleet), time.Since(began), nil)
	first, last, err := fleet.revoke(s.ctx, s.fabric.client, "s-fleet")
	s.step("decision to the first enforcer that has cut its call and denies", first, err)
	s.step(fmt.Sprintf("decision to the last of the %d", s.Fleet), last, err)
	return nil
}

func (s *story) cutTheBus() error {
	s.chapter("Cut the bus: within %v, enforcers that cannot show fresh state deny.", maxStale)
	t := s.modern
	c, err := t.dial(s.ctx, s.mint.caller("erin", "s-cut"))
	if err != nil {
		return s.failed("connect", 0, err)
	}
	defer c.close()
	running, err := c.start(s.ctx, t, "wait")
	if err != nil {
		return s.failed("start a call", 0, err)
	}
	began := time.Now()
	s.fabric.stop()
	s.does("the bus is cut; requests go on within the bound", func() error { return c.call(s.ctx, "echo") })
	first := c.untilDenied(s.ctx, began)
	err = expect(first.err, session.ErrStale, "")
	if took := first.at.Sub(began); err == nil && took > maxStale+time.Second {
		err = fmt.Errorf("denied only after %v, the bound is %v", took, maxStale)
	}
	s.step("fail closed: first request denied as stale", first.at.Sub(began), err)
	cut := <-running
	s.step("the running call is cut", cut.at.Sub(began), expect(cut.err, session.ErrStale, ""))
	began = time.Now()
	if err := s.fabric.start(s.ctx); err != nil {
		return fmt.Errorf("start the authority again: %w", err)
	}
	back, err := c.untilAllowed(s.ctx)
	s.step("the bus is back: first request allowed", back.Sub(began), err)
	return nil
}
