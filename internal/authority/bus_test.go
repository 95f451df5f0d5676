package authority

import (
	"errors"
	"log/slog"
	"net"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nkeys"
)

// An authority whose bus refuses it for a while, as a server does that is
// reloaded or started before its accounts are there, comes back.
func TestBusThatRefusesForAWhile(t *testing.T) {
	kp, err := nkeys.CreateUser()
	if err != nil {
		t.Fatal(err)
	}
	seed, err := kp.Seed()
	if err != nil {
		t.Fatal(err)
	}
	pub, err := kp.PublicKey()
	if err != nil {
		t.Fatal(err)
	}
	stranger, err := nkeys.CreateUser()
	if err != nil {
		t.Fatal(err)
	}
	other, err := stranger.PublicKey()
	if err != nil {
		t.Fatal(err)
	}
	run := func(port int, known string) *server.Server {
		t.Helper()
		srv, err := server.NewServer(&server.Options{
			Host: "127.0.0.1", Port: port, NoLog: true, NoSigs: true, Nkeys: []*server.NkeyUser{{Nkey: known}},
		})
		if err != nil {
			t.Fatal(err)
		}
		srv.Start()
		t.Cleanup(func() { srv.Shutdown(); srv.WaitForShutdown() })
		if !srv.ReadyForConnections(30 * time.Second) {
			t.Fatal("the server does not start")
		}
		return srv
	}
	srv := run(-1, pub)
	port := srv.Addr().(*net.TCPAddr).Port
	a := &Authority{o: Options{NATSURL: srv.ClientURL()}, log: slog.New(slog.DiscardHandler)}
	nc, err := a.dial(t.Context(), string(seed), "test")
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	back := make(chan struct{})
	nc.SetReconnectHandler(func(*nats.Conn) { close(back) })
	refused := make(chan struct{}, 16)
	nc.SetErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) {
		if errors.Is(err, nats.ErrAuthorization) {
			select {
			case refused <- struct{}{}:
			default:
			}
		}
	})
	srv.Shutdown()
	srv.WaitForShutdown()
	srv = run(port, other)
	for range 3 {
		select {
		case <-refused:
		case <-time.After(30 * time.Second):
			t.Fatalf("not refused three times; the connection is %v", nc.Status())
		}
	}
	srv.Shutdown()
	srv.WaitForShutdown()
	run(port, pub)
	select {
	case <-back:
	case <-time.After(30 * time.Second):
		t.Fatalf("the connection is %v", nc.Status())
	}
}
