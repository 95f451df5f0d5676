package a2aguard

import (
	"context"
	"errors"
	"fmt"
	"maps"

	"github.com/a2aproject/a2a-go/v2/a2a"
	"github.com/a2aproject/a2a-go/v2/a2asrv/push"
	"github.com/a2aproject/a2a-go/v2/a2asrv/taskstore"

	"github.com/interlock-fabric/interlock/pkg/guard"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// ownerKey is where the metadata of a stored task says whose it is. Clients
// never see it.
const ownerKey = "interlock.owner"

// TaskStore keeps the tasks of one caller from all others: whoever asks for a
// task that is not theirs is told that there is none. The SDK's own store has
// that for listing alone, and finds any task by its id for anybody.
//
// The owner is kept in the metadata of the task, so next may be any store that
// keeps it, shared between processes and restarts; what it holds already belongs
// to nobody. It should itself list by CallContext.User, as the SDK's does: what
// it lists of others' tasks is left out here, but has been counted.
//
// NewHandler uses it by itself. A host needs it to reach the tasks by another
// way, as a2asrv.ReferencedTasksLoader does.
func (g *Guard) TaskStore(next taskstore.Store) taskstore.Store {
	if s, ok := next.(*store); ok {
		return s
	}
	return &store{next: next}
}

type store struct{ next taskstore.Store }

// owner names the caller of a context.
func owner(ctx context.Context) (string, error) {
	p := guard.FromContext(ctx)
	if !p.Valid() {
		return "", &session.DeniedError{Err: session.ErrNoIdentity}
	}
	return ownerOf(p), nil
}

// stamped returns a task that says whose it is.
func stamped(t *a2a.Task, owner string) *a2a.Task {
	c := *t
	c.Metadata = maps.Clone(t.Metadata)
	c.SetMeta(ownerKey, owner)
	return &c
}

// plain returns the task as its owner knows it, or nil when it is another's.
func plain(t *a2a.Task, owner string) *a2a.Task {
	if got, ok := t.Metadata[ownerKey].(string); !ok || got != owner {
		return nil
	}
	c := *t
	c.Metadata = maps.Clone(t.Metadata)
	delete(c.Metadata, ownerKey)
	if len(c.Metadata) == 0 {
		c.Metadata = nil
	}
	return &c
}

func (s *store) Create(ctx context.Context, t *a2a.Task) (taskstore.TaskVersion, error) {
	if err := executionOf(ctx).ended(); err != nil {
		return taskstore.TaskVersionMissing, err
	}
	who, err := owner(ctx)
	if err != nil {
		return taskstore.TaskVersionMissing, err
	}
	return s.next.Create(ctx, stamped(t, who))
}

// Update refuses what an agent says after it was cut: how the task ends has been
// stored by then.
func (s *store) Update(ctx context.Context, r *taskstore.UpdateRequest) (taskstore.TaskVersion, error) {
	if err := executionOf(ctx).ended(); err != nil {
		return taskstore.TaskVersionMissing, err
	}
	who, err := owner(ctx)
	if err != nil {
		return taskstore.TaskVersionMissing, err
	}
	c := *r
	c.Task = stamped(r.Task, who)
	return s.next.Update(ctx, &c)
}

func (s *store) Get(ctx context.Context, id a2a.TaskID) (*taskstore.StoredTask, error) {
	who, err := owner(ctx)
	if err != nil {
		return nil, err
	}
	t, err := s.next.Get(ctx, id)
	if err != nil {
		return nil, err
	}
	c := *t
	if c.Task = plain(t.Task, who); c.Task == nil {
		return nil, a2a.ErrTaskNotFound
	}
	return &c, nil
}

func (s *store) List(ctx context.Context, r *a2a.ListTasksRequest) (*a2a.ListTasksResponse, error) {
	who, err := owner(ctx)
	if err != nil {
		return nil, err
	}
	resp, err := s.next.List(ctx, r)
	if err != nil {
		return nil, err
	}
	c := *resp
	c.Tasks = make([]*a2a.Task, 0, len(resp.Tasks))
	for _, t := range resp.Tasks {
		if t = plain(t, who); t != nil {
			c.Tasks = append(c.Tasks, t)
		}
	}
	c.TotalSize -= len(resp.Tasks) - len(c.Tasks)
	return &c, nil
}

// maxConflicts bounds how often finish yields to others that write the task.
const maxConflicts = 10

// finish stores how a task ends that was cut. It reports whether it ended so, and
// not in its own way just before.
func (s *store) finish(ctx context.Context, message *a2a.Message, ev *a2a.TaskStatusUpdateEvent) (bool, error) {
	who, err := owner(ctx)
	if err != nil {
		return false, err
	}
	for range maxConflicts {
		stored, err := s.next.Get(ctx, ev.TaskID)
		if errors.Is(err, a2a.ErrTaskNotFound) {
			t := &a2a.Task{ID: ev.TaskID, ContextID: ev.ContextID, Status: ev.Status}
			if message != nil {
				t.History = []*a2a.Message{message}
			}
			_, err = s.next.Create(ctx, stamped(t, who))
			if errors.Is(err, taskstore.ErrTaskAlreadyExists) {
				continue
			}
			return err == nil, err
		}
		if err != nil {
			return false, err
		}
		if stored.Task.Status.State.Terminal() {
			return false, nil
		}
		t := *stored.Task
		if t.Status.Message != nil {
			t.History = append(t.History[:len(t.History):len(t.History)], t.Status.Message)
		}
		t.Status = ev.Status
		_, err = s.next.Update(ctx, &taskstore.UpdateRequest{Task: &t, Event: ev, PrevVersion: stored.Version})
		if !errors.Is(err, taskstore.ErrConcurrentModification) {
			return err == nil, err
		}
	}
	return false, fmt.Errorf("task %s: %w", ev.TaskID, taskstore.ErrConcurrentModification)
}

// sender sends push notifications for as long as their caller may act: what a
// revoked caller had asked to be told goes nowhere.
type sender struct {
	g    *Guard
	next push.Sender
}

func (s *sender) SendPush(ctx context.Context, config *a2a.PushConfig, event a2a.Event) error {
	if s.mayTell(ctx) {
		return s.next.SendPush(ctx, config, event)
	}
	return nil // an error would fail the task, whose end is not ours to say here
}

func (s *sender) mayTell(ctx context.Context) bool {
	return executionOf(ctx).ended() == nil && s.g.work.Err() == nil && s.g.enforcer.Check(guard.FromContext(ctx), s.g.connect()) == nil
}
