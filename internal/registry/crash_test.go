package registry

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdh"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/nats-io/nkeys"

	"github.com/interlock-fabric/interlock/internal/broker"
	"github.com/interlock-fabric/interlock/pkg/session"
)

const childEnv = "REGISTRY_TEST_CHILD"

// childConfig is what the process that is to be killed reads from its input.
type childConfig struct {
	Dir, Seed string
	Key       []byte
	Step      string
	At        uint64 // how often the step is passed before
	First     int
	Expires   int64
}

// child runs a broker and a registry, registers, says on its output what was
// acknowledged, and kills itself at the step.
func child() {
	fail := func(err error) {
		if err != nil {
			fmt.Fprintln(os.Stderr, "child:", err)
			os.Exit(1)
		}
	}
	var c childConfig
	fail(json.NewDecoder(os.Stdin).Decode(&c))
	kp, err := nkeys.FromSeed([]byte(c.Seed))
	fail(err)
	public, err := kp.PublicKey()
	fail(err)
	b, err := broker.Start(broker.Options{Dir: c.Dir, Authority: public})
	fail(err)
	nc, err := b.Conn(context.Background(), c.Seed)
	fail(err)
	private, err := ecdh.X25519().NewPrivateKey(c.Key)
	fail(err)
	var passed atomic.Uint64
	step := func(name string) {
		if name == c.Step && passed.Add(1) > c.At {
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		}
	}
	r, err := Open(context.Background(), Options{
		NC: nc, Keys: sealingOf(private), SnapshotBatches: 7,
		Hooks: Hooks{
			BeforeAppend: func(uint64) { step("before append") }, AfterAppend: func(uint64) { step("after append") }, Snapshot: step,
		},
	})
	fail(err)
	var out sync.Mutex
	var wg sync.WaitGroup
	say := func(format string, a ...any) {
		out.Lock()
		defer out.Unlock()
		fmt.Printf(format+"\n", a...)
	}
	for g := range 4 {
		wg.Go(func() {
			for i := 0; ; i++ {
				n := c.First + 4*i + g
				s := ses(n)
				s.Expires = session.Instant(c.Expires)
				_, err := r.RegisterSessions(context.Background(), []Session{s})
				fail(err)
				say("s %d", n)
				if i%5 == 0 {
					a := bot(n)
					_, _, err := r.RegisterAgent(context.Background(), a, 0)
					fail(err)
					say("a %d registered", n)
					_, err = r.SetState(context.Background(), a.Tenant, a.Ref, Suspended, nil)
					fail(err)
					say("a %d suspended", n)
				}
			}
		})
	}
	wg.Wait()
}

// TestNothingAcknowledgedIsLost kills the authority at each step, again and again
// on the same directory, and finds everything that was acknowledged.
func TestNothingAcknowledgedIsLost(t *testing.T) {
	w := newWorld(t, false)
	w.nc.Close()
	must(t, w.b.Close())
	acknowledged := map[string]string{}
	for i, step := range []string{"before append", "after append", "begin", "chunks", "manifest", "trimmed", "after append", "manifest"} {
		c := childConfig{Dir: w.dir, Seed: w.seed, Key: w.keys.private.Bytes(), Step: step, At: 1, First: 100_000 * (i + 1), Expires: int64(hour)}
		if strings.HasSuffix(step, "append") {
			c.At = 9
		}
		input, err := json.Marshal(c)
		must(t, err)
		cmd := exec.CommandContext(w.ctx, os.Args[0])
		cmd.Env = append(os.Environ(), childEnv+"=1")
		cmd.Stdin = bytes.NewReader(input)
		var errs bytes.Buffer
		cmd.Stderr = &errs
		pipe, err := cmd.StdoutPipe()
		must(t, err)
		must(t, cmd.Start())
		lines := bufio.NewScanner(io.LimitReader(pipe, 1<<20))
		n := 0
		for lines.Scan() {
			f := strings.Fields(lines.Text())
			state := ""
			if len(f) == 3 {
				state = f[2]
			}
			acknowledged[f[0]+" "+f[1]] = state
			n++
		}
		err = cmd.Wait()
		if exit, ok := err.(*exec.ExitError); !ok || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL { //nolint:errorlint // as os/exec gives it
			t.Fatalf("%s: the child was not killed: %v: %s", step, err, errs.String())
		}
		t.Logf("%s: %d acknowledged", step, n)
		if n == 0 {
			t.Errorf("%s: nothing was acknowledged before", step)
		}
	}
	w.up(false)
	r := w.open(Options{})
	if err := r.Status().Err; err != nil {
		t.Fatal(err)
	}
	for what, state := range acknowledged {
		var kind string
		var n int
		_, err := fmt.Sscan(what, &kind, &n)
		must(t, err)
		if kind == "s" {
			want := ses(n)
			if got, err := r.Session("acme", want.Ref); err != nil || !got.equal(&want) {
				t.Errorf("%s is lost: %+v, %v", what, got, err)
			}
			continue
		}
		got, _, err := r.Agent("acme", bot(n).Ref)
		if err != nil || state == string(Suspended) && got.State != Suspended {
			t.Errorf("%s, %s: %+v, %v", what, state, got, err)
		}
	}
	if st := r.Status(); st.Refused > 0 {
		t.Errorf("%+v", st)
	}
}
