package proxy

import (
	"encoding/binary"
	"strings"
	"testing"

	"github.com/a2aproject/a2a-go/v2/a2apb/v1"
	"google.golang.org/protobuf/proto"
)

func frame(t testing.TB, m proto.Message) string {
	t.Helper()
	b, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return string(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(b)))) + string(b)
}

// find looks at an answer in pieces of n bytes.
func find(f finder, answer string, n int) string {
	for len(answer) > 0 {
		n := min(n, len(answer))
		id, over := f.look([]byte(answer[:n]))
		if over {
			return id
		}
		answer = answer[n:]
	}
	return f.rest()
}

func TestTaskIsFound(t *testing.T) {
	long := strings.Repeat("x", 3*maxLook)
	rpc, rest, pb := finder{form: events, rpc: true}, finder{form: events}, finder{form: grpc}
	for name, tt := range map[string]struct {
		in           finder
		answer, want string
	}{
		"task":             {rpc, ": hello\r\n\r\nid: 1\ndata: {\"jsonrpc\":\"2.0\",\"id\":\"7\",\"result\":{\"task\":{\"artifacts\":[{\"id\":\"no\"}],\"id\":\"t1\"}}}\n\n", "t1"},
		"status":           {rpc, "data: {\"result\":{\"statusUpdate\":{\"status\":{\"taskId\":\"no\"},\"taskId\":\"t1\"}},\"id\":1}\n\n", "t1"},
		"of 0.3":           {rpc, "data: {\"id\":1,\"result\":{\"kind\":\"task\",\"metadata\":{\"id\":\"no\"},\"id\":\"t1\"}}\r\n\r\n", "t1"},
		"status of 0.3":    {rpc, "data: {\"id\":1,\"result\":{\"kind\":\"status-update\",\"taskId\":\"t1\"}}\n\n", "t1"},
		"REST":             {rest, "data: {\"artifactUpdate\":{\"artifact\":{},\"taskId\":\"t1\"}}\n\n", "t1"},
		"several lines":    {rest, "data: {\"task\":\ndata: {\"id\":\"t1\"}}\n\n", "t1"},
		"the second event": {rest, "data: {\"message\":{\"messageId\":\"m\"}}\n\ndata: {\"statusUpdate\":{\"taskId\":\"t1\"}}\n\n", "t1"},
		"behind a long one": {rest, "data: {\"message\":{\"messageId\":\"" + long + "\"}}\n\ndata: {\"statusUpdate\":{\"taskId\":\"t1\"}}\n\n",
			"t1"},
		"a long one":        {rest, "data: {\"task\":{\"id\":\"t1\",\"x\":\"" + long + "\"}}\n\n", "t1"},
		"broken off":        {rest, "data: {\"task\":{\"id\":\"t1\",\"x", "t1"},
		"an id broken off":  {rest, "data: {\"task\":{\"id\":\"t1", ""},
		"a call's id":       {rpc, "data: {\"id\":\"no\",\"result\":{\"message\":{\"id\":\"no\"}}}\n\n", ""},
		"an answer":         {finder{rpc: true}, `{"jsonrpc":"2.0","id":1,"result":{"task":{"id":"t1"}}}`, "t1"},
		"not JSON":          {rest, "data: ]}{\n\ndata: \"task\"\n\n", ""},
		"too long an id":    {rest, "data: {\"task\":{\"id\":\"" + strings.Repeat("x", maxTask+1) + "\"}}\n\n", ""},
		"gRPC task":         {pb, frame(t, &a2apb.StreamResponse{Payload: &a2apb.StreamResponse_Task{Task: &a2apb.Task{Id: "t1", ContextId: "c"}}}), "t1"},
		"gRPC message":      {pb, frame(t, &a2apb.SendMessageResponse{Payload: &a2apb.SendMessageResponse_Message{Message: &a2apb.Message{MessageId: "m", TaskId: "t1"}}}), "t1"},
		"gRPC second":       {pb, frame(t, &a2apb.StreamResponse{Payload: &a2apb.StreamResponse_Message{Message: &a2apb.Message{MessageId: long}}}) + frame(t, &a2apb.StreamResponse{Payload: &a2apb.StreamResponse_ArtifactUpdate{ArtifactUpdate: &a2apb.TaskArtifactUpdateEvent{TaskId: "t1"}}}), "t1"},
		"gRPC broken off":   {pb, frame(t, &a2apb.StreamResponse{Payload: &a2apb.StreamResponse_StatusUpdate{StatusUpdate: &a2apb.TaskStatusUpdateEvent{TaskId: "t1", ContextId: "c"}}})[:12], "t1"},
		"gRPC id cut short": {pb, frame(t, &a2apb.StreamResponse{Payload: &a2apb.StreamResponse_StatusUpdate{StatusUpdate: &a2apb.TaskStatusUpdateEvent{TaskId: "t1"}}})[:10], ""},
		"gRPC compressed":   {pb, "\x01\x00\x00\x00\x04\x0a\x02\x0a\x00", ""},
		"MCP":               {finder{form: events, rpc: true, part: begins}, "id: 1\ndata:\n\ndata: {\"method\":\"x\",\"params\":{\"task\":{\"taskId\":\"no\"}}}\n\ndata: {\"id\":1,\"result\":{\"_meta\":{\"taskId\":\"no\"},\"task\":{\"status\":\"working\",\"taskId\":\"t1\"}}}\n\n", "t1"},
		"MCP answer":        {finder{rpc: true, part: begins}, `{"jsonrpc":"2.0","id":1,"result":{"task":{"taskId":"t1"}}}`, "t1"},
		"MCP, no task":      {finder{rpc: true, part: begins}, `{"id":1,"result":{"id":"no","taskId":"no","content":[{"task":{"taskId":"no"}}],"task":"no"}}`, ""},
		"MCP, an error":     {finder{rpc: true, part: begins}, `{"id":1,"error":{"task":{"taskId":"no"}}}`, ""},
		"MCP working":       {finder{rpc: true, part: polls}, `{"id":1,"result":{"taskId":"no","status":"working","statusMessage":"completed"}}`, ""},
		"MCP failed":        {finder{rpc: true, part: polls}, `{"id":1,"result":{"taskId":"no","status":"failed"}}`, "failed"},
		"MCP result":        {finder{rpc: true, part: awaits}, `{"id":1,"result":{"content":[{"type":"text"}]}}`, "text"},
		"MCP result, error": {finder{rpc: true, part: awaits}, `{"id":1,"error":{"code":-32603,"message":"no"}}`, ""},
	} {
		for _, n := range []int{1, 2, 3, 7, 4096, len(tt.answer)} {
			if got := find(tt.in, tt.answer, n); got != tt.want {
				t.Errorf("%s, in pieces of %d: %q, want %q", name, n, got, tt.want)
			}
		}
	}
}

// What is looked at, and what is kept of it, has a bound.
func TestLookingForATaskHasABound(t *testing.T) {
	for _, in := range []finder{{form: events, rpc: true}, {form: events}, {form: grpc}, {}} {
		f, looked := in, 0
		for over := false; !over; {
			b := []byte(strings.Repeat("data: {\"\x01", 1000))
			_, over = f.look(b)
			if looked += len(b); looked > 2*maxAnswer || len(f.line) > maxLook || len(f.data) > maxLook {
				t.Fatalf("%d looked at, %d and %d kept", looked, len(f.line), len(f.data))
			}
		}
	}
}

// What an agent sends harms nobody, and how it is cut into pieces changes nothing.
func FuzzTaskIn(f *testing.F) {
	f.Add([]byte("data: {\"result\":{\"task\":{\"id\":\"t1\"}}}\n\n"), uint8(1), true, uint8(events))
	f.Add([]byte("\x00\x00\x00\x00\x06\x0a\x04\x0a\x02t1"), uint8(3), false, uint8(grpc))
	f.Add([]byte(`{"task":{"id":"t1"}}`), uint8(3), false, uint8(opaque))
	f.Fuzz(func(t *testing.T, b []byte, n uint8, rpc bool, k uint8) {
		in := finder{form: form(k % 3), rpc: rpc}
		whole := find(in, string(b), max(len(b), 1))
		if got := find(in, string(b), int(n)+1); got != whole || len(got) > maxTask {
			t.Fatalf("in pieces of %d: %q, whole %q", int(n)+1, got, whole)
		}
	})
}
