package faults

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	service "github.com/interlock-fabric/interlock/internal/authority"
	"github.com/interlock-fabric/interlock/internal/broker"
	"github.com/interlock-fabric/interlock/internal/sequencer"
)

const childEnv = "FAULTS_TEST_CHILD"

func TestMain(m *testing.M) {
	if os.Getenv(childEnv) != "" {
		if err := child(); err != nil {
			fmt.Fprintln(os.Stderr, "child:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

// childConfig is what a process that is to be killed reads from its input.
type childConfig struct {
	DataDir, NATSListen, NATSURL string
	Cluster                      *clusterConfig
	EnforcerURLs                 []string
	AckWait                      time.Duration
	// KillAt makes the process kill itself at Step of that many appends.
	KillAt int
	Step   step
	// Tmpfs, when set, is mounted on DataDir with that size, where nobody else
	// sees it; Socket is then elsewhere.
	Tmpfs, Socket string
}

// step is where in an append a process dies.
type step string

const (
	beforeAppend step = "before append"
	beforeAnswer step = "between acknowledgement and answer"
	inFlight     step = "between two appends"
)

// clusterConfig is broker.Cluster without TLS, which does not go through JSON.
type clusterConfig struct {
	Name, ServerName, Listen string
	Routes                   []string
	Secret                   string
}

func (c *clusterConfig) broker() *broker.Cluster {
	if c == nil {
		return nil
	}
	return &broker.Cluster{Name: c.Name, ServerName: c.ServerName, Listen: c.Listen, Routes: c.Routes, Secret: c.Secret}
}

// child runs an authority until its input ends.
func child() error {
	var c childConfig
	in := bufio.NewReader(os.Stdin)
	line, err := in.ReadBytes('\n')
	if err == nil {
		err = json.Unmarshal(line, &c)
	}
	if err != nil {
		return err
	}
	if c.Tmpfs != "" {
		if err := mountTmpfs(c.DataDir, c.Tmpfs); err != nil {
			fmt.Println("ready", noMount)
			return nil
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	asked := make(chan struct{}) // to end
	go func() {
		defer cancel()
		defer close(asked)
		for sc := bufio.NewScanner(in); sc.Scan(); {
			fmt.Println(sc.Text(), c.do(sc.Text()))
		}
	}()
	a, err := service.Open(ctx, service.Options{
		DataDir: c.DataDir, Socket: c.Socket, NATSListen: c.NATSListen, NATSURL: c.NATSURL, Cluster: c.Cluster.broker(),
		EnforcerURLs: c.EnforcerURLs, AckWait: c.AckWait, Hooks: c.hooks(),
	})
	if err != nil {
		return err
	}
	fmt.Println("ready", a.NATSAddr())
	<-asked
	return a.Close()
}

// do does what the test asks for while the authority runs.
func (c *childConfig) do(what string) error {
	ballast := filepath.Join(c.DataDir, "ballast")
	switch what {
	case fillDisk:
		f, err := os.OpenFile(ballast, os.O_CREATE|os.O_WRONLY, 0o600)
		if err != nil {
			return err
		}
		defer f.Close()
		for size := 1 << 20; size > 0; {
			if _, err := f.Write(make([]byte, size)); err != nil {
				size /= 2
			}
		}
		return nil
	case emptyDisk:
		return os.Remove(ballast)
	}
	return errors.ErrUnsupported
}

const (
	fillDisk, emptyDisk = "fill", "empty"
	// noMount is said, in place of an address, where mounting is not permitted.
	noMount = "-"
)

func (c *childConfig) hooks() (h sequencer.Hooks) {
	if c.KillAt == 0 {
		return h
	}
	n := 0 // appends; the hooks run on one goroutine
	die := func() {
		_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
		select {}
	}
	switch c.Step {
	case beforeAppend:
		h.BeforeAppend = func(uint64) {
			if n++; n == c.KillAt {
				die()
			}
		}
	case beforeAnswer:
		h.AfterAck = func(uint64) {
			if n++; n == c.KillAt {
				die()
			}
		}
	case inFlight:
		// The answers of the store are lost, so that several appends are out.
		deaf := make(chan struct{})
		h.BeforeAppend = func(uint64) {
			switch n++; n {
			case c.KillAt - 3:
				close(deaf)
			case c.KillAt:
				die()
			}
		}
		h.DropAcks = func() bool {
			select {
			case <-deaf:
				return true
			default:
				return false
			}
		}
	}
	return h
}

// process is an authority in a process of its own.
type process struct {
	t     *testing.T
	cmd   *exec.Cmd
	in    io.WriteCloser
	addr  string // of the bus
	said  chan string
	ended chan struct{}
	once  sync.Once
}

// ask has the process do something.
func (p *process) ask(what string) {
	p.t.Helper()
	_, err := io.WriteString(p.in, what+"\n")
	must(p.t, err)
	select {
	case got := <-p.said:
		if got != what+" <nil>" {
			p.t.Fatalf("asked for %q: %q", what, got)
		}
	case <-time.After(patience):
		p.t.Fatalf("asked for %q: no answer", what)
	}
}

// spawn starts a process and returns when its API answers.
func spawn(t *testing.T, c childConfig) *process {
	t.Helper()
	p := launch(t, c)
	p.await(t)
	return p.process
}

// launched is a process that has not said yet that it is ready.
type launched struct {
	*process
	ready chan string
}

func launch(t *testing.T, c childConfig) launched {
	t.Helper()
	exe, err := os.Executable()
	must(t, err)
	raw, err := json.Marshal(c)
	must(t, err)
	p := &process{t: t, cmd: exec.Command(exe), said: make(chan string, 1), ended: make(chan struct{})}
	p.cmd.Env = append(os.Environ(), childEnv+"=1")
	p.cmd.Stderr = os.Stderr
	if c.Tmpfs != "" {
		p.cmd.SysProcAttr = privateMounts()
	}
	p.in, err = p.cmd.StdinPipe()
	must(t, err)
	out, err := p.cmd.StdoutPipe()
	must(t, err)
	if err := p.cmd.Start(); err != nil && c.Tmpfs != "" {
		said := make(chan string, 1)
		said <- noMount // not even a namespace for it
		return launched{p, said}
	} else {
		must(t, err)
	}
	ready := make(chan string, 1)
	go func() {
		defer close(p.ended)
		defer close(ready)
		for sc := bufio.NewScanner(out); sc.Scan(); {
			if addr, ok := strings.CutPrefix(sc.Text(), "ready "); ok {
				ready <- addr
			} else {
				p.said <- sc.Text()
			}
		}
		_ = p.cmd.Wait() // how it ended is the test's business
	}()
	t.Cleanup(p.stop)
	_, err = p.in.Write(append(raw, '\n'))
	must(t, err)
	return launched{p, ready}
}

func (l launched) await(t *testing.T) {
	t.Helper()
	select {
	case addr, ok := <-l.ready:
		if !ok {
			t.Fatal("a process ended before it was ready")
		}
		l.addr = addr
	case <-time.After(time.Minute):
		t.Fatal("a process did not become ready")
	}
}

// kill ends the process with signal 9 and waits until it is gone.
func (p *process) kill() {
	p.once.Do(func() {
		_ = p.cmd.Process.Signal(syscall.SIGKILL) // it may be gone already
		<-p.ended
		_ = p.in.Close()
	})
}

// gone waits until a process has killed itself.
func (p *process) gone() {
	p.t.Helper()
	select {
	case <-p.ended:
	case <-time.After(30 * time.Second):
		p.t.Fatal("the process did not reach the step at which it was to die")
	}
	p.once.Do(func() { _ = p.in.Close() })
}

// stop ends the process in order.
func (p *process) stop() {
	p.once.Do(func() {
		_ = p.in.Close()
		select {
		case <-p.ended:
		case <-time.After(20 * time.Second):
			p.t.Error("a process did not end when asked")
			_ = p.cmd.Process.Signal(syscall.SIGKILL)
			<-p.ended
		}
	})
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// eventually polls until ok holds. What is printed when it does not.
func eventually(t testing.TB, within time.Duration, what any, ok func() bool) {
	t.Helper()
	deadline := time.NewTimer(within)
	defer deadline.Stop()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline.C:
			if !ok() {
				t.Fatalf("not within %v: %v", within, what)
			}
			return
		}
	}
}
