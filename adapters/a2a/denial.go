package a2aguard

import (
	"encoding/json"
	"errors"
	"net/http"
	"strconv"

	"github.com/a2aproject/a2a-go/v2/a2a"

	"github.com/interlock-fabric/interlock/pkg/denial"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// Denied is what a caller learns of a denial: as the metadata of the ErrorInfo
// that every A2A error carries, on all transports, and as a data part of the
// message of a task that was cut.
type Denied = denial.Data

// DeniedOf returns what a guarded agent said to a Go client, if err is a denial.
// There is nothing to be found in a 401 or 403 over JSON-RPC, of which the SDK's
// client keeps the status alone.
func DeniedOf(err error) (Denied, bool) {
	var e *a2a.Error
	if !errors.As(err, &e) {
		return Denied{}, false
	}
	for _, t := range e.TypedDetails {
		meta, ok := t.Value["metadata"].(map[string]string)
		if ok && t.Value["domain"] == a2a.ProtocolDomain && meta["error"] != "" {
			seq, _ := strconv.ParseUint(meta["seq"], 10, 64)
			return Denied{Error: meta["error"], Reason: meta["reason"], Incident: meta["incident"], Seq: seq}, true
		}
	}
	return Denied{}, false
}

// DeniedIn returns why a task was cut, and the challenge to be met where its
// state is TASK_STATE_AUTH_REQUIRED, if the status is that of a task that was.
func DeniedIn(s a2a.TaskStatus) (d Denied, challenge string, ok bool) {
	if s.Message == nil {
		return Denied{}, "", false
	}
	for _, p := range s.Message.Parts {
		data, isMap := p.Data().(map[string]any)
		if _, is := data["error"].(string); !isMap || !is {
			continue
		}
		raw, err := json.Marshal(data)
		if err != nil || json.Unmarshal(raw, &d) != nil {
			continue
		}
		challenge, _ = data["challenge"].(string)
		return d, challenge, true
	}
	return Denied{}, "", false
}

// protocolError is the answer to err inside the protocol, where the SDK puts it
// into the form of the transport.
func (g *Guard) protocolError(err error) error {
	a := g.resource.Answer(err)
	base := a2a.ErrServerError
	switch a.Status {
	case http.StatusUnauthorized:
		base = a2a.ErrUnauthenticated
	case http.StatusForbidden:
		base = a2a.ErrUnauthorized
	}
	return a2a.NewError(base, a.Message).WithErrorInfoMeta(metadataOf(&a))
}

// metadataOf is the denial as the metadata of an ErrorInfo.
func metadataOf(a *denial.Answer) map[string]string {
	m := map[string]string{"error": a.Data.Error}
	put := func(k, v string) {
		if v != "" {
			m[k] = v
		}
	}
	put("reason", a.Data.Reason)
	put("incident", a.Data.Incident)
	put("challenge", a.Challenge(true))
	if a.Data.Seq != 0 {
		m["seq"] = strconv.FormatUint(a.Data.Seq, 10)
	}
	return m
}

// reason is the ErrorInfo's.
func reason(a *denial.Answer) string {
	switch a.Status {
	case http.StatusUnauthorized:
		return a2a.ErrorReason(a2a.ErrUnauthenticated)
	case http.StatusForbidden:
		return a2a.ErrorReason(a2a.ErrUnauthorized)
	}
	return "UNAVAILABLE"
}

// stateOf says how a task ends that was cut with err. begun is whether the agent
// had been started.
func stateOf(err error, begun bool) a2a.TaskState {
	switch {
	case errors.Is(err, session.ErrStale), errors.Is(err, session.ErrOverloaded), errors.Is(err, session.ErrClosed):
		return a2a.TaskStateFailed // our trouble, not the caller's
	case errors.Is(err, session.ErrStepUp), errors.Is(err, session.ErrExpired):
		// Another login, or another token, and the task goes on.
		return a2a.TaskStateAuthRequired
	case !begun:
		return a2a.TaskStateRejected
	}
	return a2a.TaskStateCanceled
}

// statusOf is the end of a task that was cut.
func (g *Guard) statusOf(info a2a.TaskInfoProvider, err error, begun bool) *a2a.TaskStatusUpdateEvent {
	a := g.resource.Answer(err)
	data := make(map[string]any)
	// By way of JSON, so that it is the same to every store and transport.
	if json.Unmarshal(a.JSON(), &data) == nil {
		if c := a.Challenge(true); c != "" {
			data["challenge"] = c
		}
	}
	return a2a.NewStatusUpdateEvent(info, stateOf(err, begun),
		a2a.NewMessageForTask(a2a.MessageRoleAgent, info, a2a.NewTextPart(a.Message), a2a.NewDataPart(data)))
}
