package broker

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
)

// serverLog hands what nats-server says to slog. nats-server's own logger exits
// the process on Fatalf; this one keeps the reason for Start to return.
type serverLog struct {
	log *slog.Logger

	mu    sync.Mutex
	fatal string
}

func (l *serverLog) say(level slog.Level, format string, a []any) {
	if l.log != nil && l.log.Enabled(context.Background(), level) {
		l.log.Log(context.Background(), level, fmt.Sprintf(format, a...), "component", "nats-server")
	}
}

// Noticef is at debug level: a start says thirty lines that nobody asked for.
func (l *serverLog) Noticef(format string, a ...any) { l.say(slog.LevelDebug, format, a) }
func (l *serverLog) Warnf(format string, a ...any)   { l.say(slog.LevelWarn, format, a) }
func (l *serverLog) Errorf(format string, a ...any)  { l.say(slog.LevelError, format, a) }
func (l *serverLog) Debugf(format string, a ...any)  { l.say(slog.LevelDebug, format, a) }
func (l *serverLog) Tracef(format string, a ...any)  { l.say(slog.LevelDebug, format, a) }

func (l *serverLog) Fatalf(format string, a ...any) {
	l.mu.Lock()
	if l.fatal == "" {
		l.fatal = fmt.Sprintf(format, a...)
	}
	l.mu.Unlock()
	l.say(slog.LevelError, format, a)
}

func (l *serverLog) failure() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.fatal
}
