package proxy

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"strings"

	"google.golang.org/protobuf/encoding/protowire"
)

// Bounds of what is looked at for the id of a task: of a message, whose beginning
// has it as a rule, and of an answer.
const (
	maxLook   = 64 << 10
	maxAnswer = 1 << 20
)

// finder looks for the id of a task in an answer that passes, of which it changes
// nothing and keeps at most twice maxLook.
type finder struct {
	form   form
	rpc    bool // JSON-RPC, not REST
	part   part // of MCP
	looked int
	line   []byte // of events: the one under way
	data   []byte // the message under way
	skip   int    // of gRPC: what is left of a message that has been looked at
}

// look returns the id once it is there. over says that there is no use in going
// on.
func (f *finder) look(p []byte) (id string, over bool) {
	f.looked += len(p)
	switch f.form {
	case events:
		id = f.events(p)
	case grpc:
		id = f.frames(p)
	default: // one message, whose end is that of the answer
		f.data = keep(f.data, p)
	}
	return id, id != "" || f.looked > maxAnswer
}

// rest returns the id in what has come of a message that ends here.
func (f *finder) rest() string {
	switch f.form {
	case events:
		return f.taskIn(keep(f.data, dataOf(f.line)))
	case grpc:
		return taskInFrame(f.data)
	}
	return f.taskIn(f.data)
}

func keep(b, p []byte) []byte { return append(b, p[:min(len(p), maxLook-len(b))]...) }

func (f *finder) events(p []byte) string {
	for {
		line, after, ended := bytes.Cut(p, []byte("\n"))
		f.line = keep(f.line, line)
		if !ended {
			return ""
		}
		p = after
		if whole := bytes.TrimSuffix(f.line, []byte("\r")); len(whole) > 0 {
			f.data = keep(f.data, dataOf(whole))
		} else {
			if id := f.taskIn(f.data); id != "" {
				return id
			}
			f.data = f.data[:0]
		}
		f.line = f.line[:0]
	}
}

// dataOf is what a line adds to the data of its event.
func dataOf(line []byte) []byte {
	data, ok := bytes.CutPrefix(line, []byte("data:"))
	if !ok {
		return nil
	}
	return data
}

// taskIn returns the id of the task that an event or an answer is about, of which
// the end may be missing. In A2A 1.0 it stands in an object that says what it is,
// in 0.3 over JSON-RPC directly in the result. Of MCP it may be another string:
// see namesMCP.
func (f *finder) taskIn(b []byte) string {
	var at []string // the members that lead to here; "" in a list
	var key bool    // the next token is the name of a member
	var list []bool
	for d := json.NewDecoder(bytes.NewReader(b)); ; {
		tok, err := d.Token()
		if err != nil {
			return ""
		}
		switch t := tok.(type) {
		case json.Delim:
			if t == '{' || t == '[' {
				at, list = append(at, ""), append(list, t == '[')
				key = t == '{'
				continue
			}
			at, list = at[:len(at)-1], list[:len(list)-1]
		case string:
			if key {
				at[len(at)-1], key = t, false
				continue
			}
			if t != "" && len(t) <= maxTask && f.wants(at, t) {
				return t
			}
		}
		if len(at) == 0 {
			return ""
		}
		key = !list[len(list)-1]
	}
}

func (f *finder) wants(at []string, v string) bool {
	if f.part != none {
		return namesMCP(f.part, at, v)
	}
	return len(at) <= 3 && namesTask(strings.Join(at, "."), f.rpc)
}

func namesTask(path string, rpc bool) bool {
	if rpc {
		var ok bool
		if path, ok = strings.CutPrefix(path, "result."); !ok {
			return false
		}
	}
	switch path {
	case "task.id", "statusUpdate.taskId", "artifactUpdate.taskId", "message.taskId", "taskId":
		return true
	case "id":
		return rpc
	}
	return false
}

// frameHeader is how long what comes before each message of gRPC is: whether it
// is compressed, and its length.
const frameHeader = 5

// frameLen is the length of a frame of which the header is there.
func frameLen(b []byte) int { return frameHeader + int(binary.BigEndian.Uint32(b[1:])) }

func (f *finder) frames(p []byte) string {
	for len(p) > 0 {
		if f.skip > 0 {
			n := min(f.skip, len(p))
			f.skip, p = f.skip-n, p[n:]
			continue
		}
		want := frameHeader
		if len(f.data) >= want {
			want = min(frameLen(f.data), maxLook)
		}
		n := min(want-len(f.data), len(p))
		f.data, p = append(f.data, p[:n]...), p[n:]
		if len(f.data) < want || want == frameHeader && frameLen(f.data) > want {
			continue
		}
		if id := taskInFrame(f.data); id != "" {
			return id
		}
		f.skip = frameLen(f.data) - len(f.data)
		f.data = f.data[:0]
	}
	return ""
}

// taskInFrame is taskIn for a message of gRPC with its header. What is compressed
// names none.
func taskInFrame(b []byte) string {
	if len(b) < frameHeader || b[0] != 0 {
		return ""
	}
	b = b[frameHeader:]
	// Of StreamResponse and SendMessageResponse in A2A 1.0: what it is, and which
	// field of that is the id of the task.
	for i, id := range [...]protowire.Number{1, 3, 1, 1} {
		in, _ := field(b, protowire.Number(i+1))
		if v, whole := field(in, id); whole && len(v) <= maxTask {
			return string(v)
		}
	}
	return ""
}

// field returns what there is of a field of a message of which the end may be
// missing, and whether that is all of it; nil when it is not there.
func field(b []byte, num protowire.Number) (v []byte, whole bool) {
	for len(b) > 0 {
		got, typ, n := protowire.ConsumeTag(b)
		if n < 0 {
			return nil, false
		}
		b = b[n:]
		if typ == protowire.BytesType {
			size, n := protowire.ConsumeVarint(b)
			if n < 0 {
				return nil, false
			}
			b = b[n:]
			v := b[:min(size, uint64(len(b)))]
			if got == num {
				return v, uint64(len(v)) == size
			}
			b = b[len(v):]
			continue
		}
		if n = protowire.ConsumeFieldValue(got, typ, b); n < 0 {
			return nil, false
		}
		b = b[n:]
	}
	return nil, false
}
