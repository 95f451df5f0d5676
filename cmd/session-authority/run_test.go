package main

import (
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/interlock-fabric/interlock/internal/cli"
	"github.com/interlock-fabric/interlock/internal/clitest"
)

// answering runs the program against an API that answers as it is told to. What
// the real one answers, and when, is tested where it is.
func answering(t *testing.T, h http.HandlerFunc, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewUnstartedServer(h)
	if err := srv.Listener.Close(); err != nil {
		t.Fatal(err)
	}
	srv.Listener = l
	srv.Start()
	defer srv.Close()
	var out, errs strings.Builder
	code = run(append([]string{"--socket", path}, args...), strings.NewReader(""), &out, &errs)
	return code, out.String(), errs.String()
}

func TestNotDurableHasAnExitCode(t *testing.T) {
	for _, durableLater := range []bool{false, true} {
		code, stdout, _ := answering(t, func(w http.ResponseWriter, r *http.Request) {
			if r.Method == http.MethodPost {
				w.WriteHeader(http.StatusAccepted)
				_, _ = fmt.Fprint(w, `{"operation":"revoke","committed":true,"epoch":1,"number":7,"durable":false}`)
				return
			}
			_, _ = fmt.Fprintf(w, `{"epoch":1,"number":7,"durable":%v,"complete":true,"effective":true,"enforcers":2,"in_effect":2,"slowest_millis":1.25}`, durableLater)
		}, "revoke", "session", "s", "--reason", "anomaly", "--issuer", "https://i")
		want, text := exitNotDurable, "revoked at seq 7; in effect on 2 of 2 enforcers, slowest 1.2 ms; not durable yet\n"
		if durableLater {
			want, text = cli.ExitOK, "revoked at seq 7; in effect on 2 of 2 enforcers, slowest 1.2 ms\n"
		}
		if code != want || stdout != text {
			t.Errorf("exit code %d, %q", code, stdout)
		}
	}
}

// A decision whose coverage cannot be asked for has been taken all the same, and
// that is said.
func TestLostAfterDeciding(t *testing.T) {
	code, _, stderr := answering(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPost {
			_, _ = fmt.Fprint(w, `{"operation":"revoke","committed":true,"epoch":1,"number":7,"durable":true}`)
			return
		}
		panic(http.ErrAbortHandler)
	}, "revoke", "session", "s", "--reason", "anomaly", "--issuer", "https://i")
	if code != cli.ExitUnreachable || !strings.Contains(stderr, "revoked at seq 7, but where it is in force is not known") || strings.Count(stderr, "\n") != 1 {
		t.Errorf("exit code %d, %q", code, stderr)
	}
}

// What others wrote must not take over the terminal.
func TestForeignTextIsOneLine(t *testing.T) {
	code, _, stderr := answering(t, func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusBadRequest)
		_, _ = fmt.Fprint(w, `{"type":"urn:interlock:problem:invalid-request","detail":"a\nb\u001b[2J","mend":"c"}`)
	}, "status")
	if code != cli.ExitUsage || strings.Count(stderr, "\n") != 1 || strings.Contains(stderr, "\x1b") {
		t.Errorf("exit code %d, %q", code, stderr)
	}
}

func TestParseMoment(t *testing.T) {
	at := time.Date(2026, 11, 22, 15, 4, 5, 0, time.UTC)
	for in, want := range map[string]string{
		"":                          "0001-01-01T00:00:00Z",
		"now":                       "2026-11-22T15:04:05Z",
		"09:00Z":                    "2026-11-22T09:00:00Z",
		"09:00:30+02:00":            "2026-11-22T07:00:30Z",
		"2026-01-02T03:04:05Z":      "2026-01-02T03:04:05Z",
		"2026-01-02T03:04:05+01:00": "2026-01-02T02:04:05Z",
		"30m":                       "2026-11-22T14:34:05Z",
	} {
		got, err := parseMoment("issued-before", in, at)
		if err != nil || got.UTC().Format(time.RFC3339) != want {
			t.Errorf("%q: %s, %v", in, got, err)
		}
	}
	for _, bad := range []string{"yesterday", "9:00", "09:00", "-30m", "2026-01-02", "1"} {
		if got, err := parseMoment("issued-before", bad, at); err == nil {
			t.Errorf("%q was read as %s", bad, got)
		}
	}
}

func TestParseTarget(t *testing.T) {
	for in, want := range map[string]string{
		"session s_1":                           "t[session i s_1]",
		"user and":                              "t[user i and]",
		"user a and agent b and tool c":         "t[user i a agent i b tool  c]",
		"agent spiffe://x/y and audience https": "t[agent i spiffe://x/y audience  https]",
		"global":                                "[global  ]",
		"tenant acme":                           "[tenant  acme]",
	} {
		got, err := parseTarget(strings.Fields(in), "t", "i")
		var terms []string
		for _, term := range got.Terms {
			terms = append(terms, term.Kind+" "+term.Issuer+" "+term.Value)
		}
		if s := got.Tenant + "[" + strings.Join(terms, " ") + "]"; err != nil || s != want {
			t.Errorf("%s: %s, %v", in, s, err)
		}
	}
	for _, bad := range []string{"", "user", "user a and", "user a b", "user a and user", "usr a", "global x"} {
		if got, err := parseTarget(strings.Fields(bad), "", ""); err == nil {
			t.Errorf("%q was read as %v", bad, got)
		}
	}
}

// A bare --wait waits as long as can be waited; the word behind it is its value
// only where it is a duration.
func TestWaitTakesADurationOrStandsAlone(t *testing.T) {
	for in, want := range map[string]string{
		"revoke user a --wait 5s --commit": "revoke user a --wait=5s --commit",
		"revoke --wait 0 user a":           "revoke --wait=0 user a",
		"revoke --wait user 5s":            "revoke --wait user 5s",
		"revoke user a --wait":             "revoke user a --wait",
		"revoke -- user --wait 5s":         "revoke -- user --wait 5s",
	} {
		if got := strings.Join(joinWait(strings.Fields(in)), " "); got != want {
			t.Errorf("%s: %s", in, got)
		}
	}
}

func TestEveryCommandHelpsItself(t *testing.T) { clitest.Help(t, newRoot(), run) }
