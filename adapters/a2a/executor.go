package a2aguard

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"sync"
	"sync/atomic"

	"github.com/a2aproject/a2a-go/v2/a2a"
	"github.com/a2aproject/a2a-go/v2/a2asrv"

	"github.com/interlock-fabric/interlock/pkg/guard"
	"github.com/interlock-fabric/interlock/pkg/session"
	"github.com/interlock-fabric/interlock/pkg/trail"
)

// execution is one run of an agent, known to all who have a part in it: the
// request that began it, the executor, and the SDK's writes to the task store.
// The SDK runs an agent under the values of the request's context, but not under
// its end, and so it travels there.
type execution struct{ cut atomic.Pointer[cutError] }

type executionKey struct{}

func executionOf(ctx context.Context) *execution {
	e, _ := ctx.Value(executionKey{}).(*execution)
	return e
}

// ended returns the end of an execution that was cut, as an error, or nil.
func (e *execution) ended() error {
	if e != nil {
		if c := e.cut.Load(); c != nil {
			return c
		}
	}
	return nil
}

// cutError is the end of an execution that was cut, on its way through the SDK
// to those who wait for it.
type cutError struct {
	why error
	// status is how the task ended, unless it had ended by itself: then it is
	// nil, and why is all that the client learns.
	status *a2a.TaskStatusUpdateEvent
}

func (e *cutError) Error() string { return "a2aguard: execution cut: " + e.why.Error() }
func (e *cutError) Unwrap() error { return e.why }

// executor runs an agent for as long as its caller may act.
type executor struct {
	g     *Guard
	agent a2asrv.AgentExecutor
	store *store

	mu sync.Mutex
	// runs are the executions by their tasks, of which each has one at most, and
	// cleaning what must be waited for before the agent may clean up.
	runs     map[a2a.TaskID]run
	cleaning map[*a2asrv.ExecutorContext]<-chan struct{}
}

// run is an execution that has not ended.
type run struct {
	caller *session.Prepared
	skill  string
}

// item is what a sequence yields, or panics with, or its end.
type item struct {
	event    a2a.Event
	err      error
	panicked any
	end      bool
}

// pump runs a sequence in a goroutine of its own, so that nothing has to wait for
// it: what it yields, and at last its end, comes out of items until stop is
// called. The sequence is broken off then, at its next item. ended, if any, is
// called once it has returned, and late with the panic that it ends with when
// nobody listens any more.
func (g *Guard) pump(seq iter.Seq2[a2a.Event, error], ended func(), late func(any)) (items <-chan item, stop func(), err error) {
	out, gone := make(chan item), make(chan struct{})
	put := func(i item) bool {
		select {
		case out <- i:
			return true
		case <-gone:
			return false
		}
	}
	err = g.work.Go(func() {
		if ended != nil {
			defer ended()
		}
		last := item{end: true, panicked: errGoexit}
		defer func() {
			if r := recover(); r != nil {
				last.panicked = r
			}
			if !put(last) && last.panicked != nil && late != nil {
				late(last.panicked)
			}
		}()
		for ev, err := range seq {
			if !put(item{event: ev, err: err}) {
				break
			}
		}
		last.panicked = nil
	})
	return out, func() { close(gone) }, err
}

// errGoexit is what a sequence ends with that ends its goroutine.
var errGoexit = errors.New("a2aguard: the goroutine has ended")

// Execute implements a2asrv.AgentExecutor.
func (e *executor) Execute(ctx context.Context, ec *a2asrv.ExecutorContext) iter.Seq2[a2a.Event, error] {
	return func(yield func(a2a.Event, error) bool) {
		p := guard.FromContext(ctx)
		if !p.Valid() || executionOf(ctx) == nil {
			// Not by way of our handler, or by way of a work queue, which does
			// not carry who called.
			yield(nil, &session.DeniedError{Err: session.ErrNoIdentity})
			return
		}
		// The binding outlives the SDK's own cancellation: an agent that ignores
		// it goes on, and so must our watch over it.
		cut := trail.Event{Mark: e.g.opts.Trail.Start(), Caller: p, Method: opSend, Traceparent: traceparent(ctx), Cut: true}
		skill := e.g.skill(&a2a.SendMessageRequest{Message: ec.Message, Metadata: ec.Metadata, Tenant: ec.Tenant})
		bound, release, err := e.g.bind(context.WithoutCancel(ctx), p, opSend, skill)
		if err != nil {
			yield(nil, e.end(ctx, ec, err, false))
			return
		}
		work, cancel := context.WithCancelCause(ctx)
		returned := make(chan struct{})
		items, stop, err := e.g.pump(e.agent.Execute(work, ec), func() {
			cancel(nil)
			release()
			close(returned)
		}, func(r any) {
			e.g.logger.Warn("an agent panicked after it was cut", "task", ec.TaskID, "panic", fmt.Sprint(r))
		})
		if err != nil {
			cancel(err)
			release()
			yield(nil, e.end(ctx, ec, err, false))
			return
		}
		defer stop()
		defer e.enter(ec, run{p, skill}, returned)()

		for open := true; ; {
			var next item
			select {
			case <-bound.Done():
			case <-e.g.work.Stopped():
			case next = <-items:
			}
			why := e.g.whyCut(bound)
			if why == nil && !next.end && bound.Err() != nil {
				why = context.Cause(bound) // it is released after the end, and by nobody else
			}
			switch {
			case why != nil:
				// Whatever came meanwhile, an agent that was cut has no more to
				// say.
				cancel(why)
				cut.Err, cut.Call = why, e.g.call(opSend, skill)
				if skill != "" {
					cut.Call.Tool = skill
				}
				e.g.opts.Trail.Record(&cut)
				if err := e.end(ctx, ec, why, true); open {
					yield(nil, err)
				}
				return
			case next.panicked != nil:
				panic(next.panicked) // where the SDK expects it
			case next.end:
				return
			case open:
				// After the SDK has gone, the agent is let run out.
				open = yield(next.event, next.err)
			}
		}
	}
}

// end stores how a task ends that was cut, and returns it.
func (e *executor) end(ctx context.Context, ec *a2asrv.ExecutorContext, why error, begun bool) error {
	ex := executionOf(ctx)
	begun = begun || ec.StoredTask != nil
	cut := &cutError{why: why, status: e.g.statusOf(ec, why, begun)}
	// First, so that nothing which the agent has said is stored after it.
	ex.cut.Store(cut)
	// The context may have ended, and the store must hear of it all the same.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), e.g.opts.FlushTimeout/2)
	defer cancel()
	ended, err := e.store.finish(ctx, ec.Message, cut.status)
	if err != nil {
		e.g.logger.Warn("the end of a task was not stored", "task", ec.TaskID, "error", err)
	}
	if err == nil && !ended {
		cut = &cutError{why: why}
		ex.cut.Store(cut)
	}
	return cut
}

// Cancel implements a2asrv.AgentExecutor. It is checked where the request comes
// in, and not cut: it stops the agent.
func (e *executor) Cancel(ctx context.Context, ec *a2asrv.ExecutorContext) iter.Seq2[a2a.Event, error] {
	return e.agent.Cancel(ctx, ec)
}

// enter remembers a run until it has left, and for the agent's cleanup, where
// it has one, when it has returned.
func (e *executor) enter(ec *a2asrv.ExecutorContext, r run, returned <-chan struct{}) (leave func()) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.runs == nil {
		e.runs = make(map[a2a.TaskID]run)
		e.cleaning = make(map[*a2asrv.ExecutorContext]<-chan struct{})
	}
	e.runs[ec.TaskID] = r
	if _, ok := e.agent.(a2asrv.AgentExecutionCleaner); ok {
		e.cleaning[ec] = returned
	}
	return func() {
		e.mu.Lock()
		defer e.mu.Unlock()
		delete(e.runs, ec.TaskID)
	}
}

// ending reports whether a task's execution has been cut, or is just about to be:
// its end is on its way to all who listen.
func (e *executor) ending(id a2a.TaskID) bool {
	e.mu.Lock()
	r, ok := e.runs[id]
	e.mu.Unlock()
	if !ok || e.g.work.Err() != nil {
		return true
	}
	call := e.g.call(opSend, r.skill)
	if e.g.enforcer.Check(r.caller, call) != nil {
		return true
	}
	call.Tool = r.skill
	return r.skill != "" && e.g.enforcer.Check(r.caller, call) != nil
}

// Cleanup implements a2asrv.AgentExecutionCleaner. The agent's own is called once
// it has returned, which may be long after it was cut.
func (e *executor) Cleanup(ctx context.Context, ec *a2asrv.ExecutorContext, result a2a.SendMessageResult, err error) {
	cleaner, ok := e.agent.(a2asrv.AgentExecutionCleaner)
	if !ok {
		return
	}
	e.mu.Lock()
	returned := e.cleaning[ec]
	delete(e.cleaning, ec)
	e.mu.Unlock()
	if returned != nil {
		select {
		case <-returned:
		default:
			if e.g.work.Go(func() { <-returned; cleaner.Cleanup(ctx, ec, result, err) }) == nil {
				return
			}
		}
	}
	cleaner.Cleanup(ctx, ec, result, err)
}
