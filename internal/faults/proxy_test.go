package faults

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// proxy is a man in the middle of the bus. It knows enough of the protocol of
// NATS to see, change, hold back and invent what the server sends.
type proxy struct {
	t      *testing.T
	ln     net.Listener
	target string
	done   sync.WaitGroup

	mu     sync.Mutex
	links  map[*link]struct{}
	fault  *fault
	thawed chan struct{} // closed while nothing is frozen
	closed bool
}

// fault is what the proxy does. The zero fault is an honest link.
type fault struct {
	// tamper returns what the client gets instead of a message. It is called by
	// one goroutine for each link.
	tamper func(*link, *message) []*message
	// frozen links stay open, and nothing passes on them.
	frozen bool
	// cut closes every link, and those that are made anew.
	cut bool
	// reset closes every link once, at the beginning.
	reset bool
}

// message is a MSG or HMSG.
type message struct {
	subject, sid, reply string
	header, data        []byte
}

func (m *message) bytes() []byte {
	reply := ""
	if m.reply != "" {
		reply = m.reply + " "
	}
	var b []byte
	if m.header != nil {
		b = fmt.Appendf(b, "HMSG %s %s %s%d %d\r\n", m.subject, m.sid, reply, len(m.header), len(m.header)+len(m.data))
		b = append(b, m.header...)
	} else {
		b = fmt.Appendf(b, "MSG %s %s %s%d\r\n", m.subject, m.sid, reply, len(m.data))
	}
	return append(append(b, m.data...), '\r', '\n')
}

func (m *message) clone() *message {
	c := *m
	c.header, c.data = bytes.Clone(m.header), bytes.Clone(m.data)
	return &c
}

// field returns a header's value, or "".
func (m *message) field(name string) string {
	for line := range strings.SplitSeq(string(m.header), "\r\n") {
		if v, ok := strings.CutPrefix(line, name+": "); ok {
			return v
		}
	}
	return ""
}

// link is one connection through the proxy.
type link struct {
	p              *proxy
	client, server net.Conn

	wmu sync.Mutex // of writes to the client
	// sids are the client's subscriptions by subject.
	sids sync.Map
	// hold is the tamper function's own.
	hold []*message
	late atomic.Int64 // messages that are still held back
}

func newProxy(t *testing.T, target string) *proxy {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	p := &proxy{t: t, ln: ln, target: target, links: map[*link]struct{}{}, fault: &fault{}, thawed: make(chan struct{})}
	close(p.thawed)
	p.done.Go(p.accept)
	t.Cleanup(p.close)
	return p
}

func (p *proxy) addr() string { return p.ln.Addr().String() }

func (p *proxy) close() {
	p.set(fault{cut: true})
	p.mu.Lock()
	p.closed = true
	p.mu.Unlock()
	p.ln.Close()
	p.done.Wait()
}

// set begins a fault and ends the one before.
func (p *proxy) set(f fault) {
	p.mu.Lock()
	defer p.mu.Unlock()
	was := p.fault.frozen
	p.fault = &f
	switch {
	case f.frozen && !was:
		p.thawed = make(chan struct{})
	case !f.frozen && was:
		close(p.thawed)
	}
	if f.cut || f.reset {
		for l := range p.links {
			l.close()
		}
	}
}

func (p *proxy) now() (*fault, chan struct{}) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.fault, p.thawed
}

func (p *proxy) accept() {
	for {
		c, err := p.ln.Accept()
		if err != nil {
			return
		}
		if f, _ := p.now(); f.cut {
			c.Close()
			continue
		}
		s, err := net.Dial("tcp", p.target)
		if err != nil {
			c.Close()
			continue
		}
		l := &link{p: p, client: c, server: s}
		p.mu.Lock()
		p.links[l] = struct{}{}
		if p.closed {
			l.close()
		}
		p.mu.Unlock()
		p.done.Go(func() { defer l.close(); l.up() })
		p.done.Go(func() {
			defer func() {
				p.mu.Lock()
				delete(p.links, l)
				p.mu.Unlock()
			}()
			defer l.close()
			l.down()
		})
	}
}

func (l *link) close() {
	l.client.Close()
	l.server.Close()
}

// up passes on what the client says and notes its subscriptions.
func (l *link) up() {
	r := bufio.NewReaderSize(l.client, 64<<10)
	for {
		line, err := r.ReadBytes('\n')
		if err != nil {
			return
		}
		f := strings.Fields(string(line))
		if len(f) == 0 {
			continue
		}
		var payload []byte
		switch strings.ToUpper(f[0]) {
		case "PUB", "HPUB":
			n, err := strconv.Atoi(f[len(f)-1])
			if err != nil {
				l.p.t.Errorf("proxy: %q", line)
				return
			}
			payload = make([]byte, n+2)
			if _, err := io.ReadFull(r, payload); err != nil {
				return
			}
		case "SUB":
			if len(f) >= 3 {
				l.sids.Store(f[1], f[len(f)-1])
			}
		}
		_, thawed := l.p.now()
		<-thawed
		if _, err := l.server.Write(append(line, payload...)); err != nil {
			return
		}
	}
}

// down passes on what the server says, as the fault permits.
func (l *link) down() {
	r := bufio.NewReaderSize(l.server, 64<<10)
	for {
		line, err := r.ReadBytes('\n')
		if err != nil {
			return
		}
		_, thawed := l.p.now()
		<-thawed
		m, err := readMessage(line, r)
		if err != nil {
			return
		}
		if m == nil {
			if !l.write(line) {
				return
			}
			continue
		}
		out := []*message{m}
		if f, _ := l.p.now(); f.tamper != nil {
			out = f.tamper(l, m)
		}
		for _, m := range out {
			if !l.write(m.bytes()) {
				return
			}
		}
	}
}

func (l *link) write(b []byte) bool {
	l.wmu.Lock()
	defer l.wmu.Unlock()
	_, err := l.client.Write(b)
	return err == nil
}

// later delivers a message after a while, whatever the fault is by then.
func (l *link) later(d time.Duration, m *message) {
	l.late.Add(1)
	l.p.done.Add(1)
	time.AfterFunc(d, func() {
		defer l.p.done.Done()
		l.write(m.bytes())
		l.late.Add(-1)
	})
}

// to addresses data to the client's subscription of a subject.
func (l *link) to(subject string, data []byte) []*message {
	sid, ok := l.sids.Load(subject)
	if !ok {
		return nil
	}
	return []*message{{subject: subject, sid: sid.(string), data: data}}
}

// readMessage returns nil when the line is not a message's.
func readMessage(line []byte, r io.Reader) (*message, error) {
	f := strings.Fields(string(line))
	if len(f) == 0 || f[0] != "MSG" && f[0] != "HMSG" {
		return nil, nil
	}
	with := f[0] == "HMSG"
	lens := 1
	if with {
		lens = 2
	}
	if len(f) < 3+lens {
		return nil, fmt.Errorf("%q", line)
	}
	m := &message{subject: f[1], sid: f[2]}
	if len(f) == 4+lens {
		m.reply = f[3]
	}
	total, err := strconv.Atoi(f[len(f)-1])
	if err != nil {
		return nil, err
	}
	body := make([]byte, total+2)
	if _, err := io.ReadFull(r, body); err != nil {
		return nil, err
	}
	body = body[:total]
	if with {
		n, err := strconv.Atoi(f[len(f)-2])
		if err != nil || n > total {
			return nil, fmt.Errorf("%q", line)
		}
		m.header, body = body[:n:n], body[n:]
	}
	m.data = body
	return m, nil
}
