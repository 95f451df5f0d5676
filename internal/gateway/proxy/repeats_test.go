package proxy

import (
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// lines are written to, one at a time.
type lines chan string

func (l lines) Write(p []byte) (int, error) {
	l <- string(p)
	return len(p), nil
}

// Of any number of the same warnings, the first is written, and then how many there
// were, every ten seconds for each route for as long as they come.
func TestRepeatedWarnings(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		lines := make(lines, 16)
		written := func() string {
			synctest.Wait()
			var out []string
			for len(lines) > 0 {
				out = append(out, strings.TrimSpace(<-lines))
			}
			return strings.Join(out, "\n")
		}
		r := newRepeats(slog.New(slog.NewTextHandler(lines, &slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
			if a.Key == slog.TimeKey || a.Key == slog.LevelKey {
				return slog.Attr{}
			}
			return a
		}})))
		check := func(when, want string) {
			t.Helper()
			if got := written(); got != want {
				t.Errorf("%s:\n%s\nwant\n%s", when, got, want)
			}
		}
		flood := func(n int) {
			for i := range n {
				r.warn("down", "a", fmt.Errorf("e%d", i))
			}
		}
		flood(1 << 16)
		check("at once", `msg=down route=a error=e0`)
		r.warn("down", "b", errors.New("x"))
		check("another route", `msg=down route=b error=x`)
		time.Sleep(summaryEvery - 1)
		check("before ten seconds", "")
		time.Sleep(time.Nanosecond)
		check("after ten seconds", `msg=down route=a error=e65535 times=65535`)
		flood(1)
		check("one more", "")
		time.Sleep(summaryEvery)
		check("after twenty seconds", `msg=down route=a error=e0 times=1`)
		time.Sleep(summaryEvery)
		check("a quiet while", "")
		if len(r.all) != 0 {
			t.Errorf("%d are kept", len(r.all))
		}
		flood(3)
		check("again", `msg=down route=a error=e0`)
		r.close()
		check("at the end", `msg=down route=a error=e2 times=2`)
		r.close()
		flood(1)
		check("after the end", `msg=down route=a error=e0`)
	})
}
