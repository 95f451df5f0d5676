package proxy

import (
	"net/http"
	"sync"
	"time"
)

// watched is the way back to a client, of which none may hold up a write for
// longer than limit: the connection is given up then, or the stream of HTTP/2,
// and with it the exchange and all that it holds. Between writes it may take as
// long as it likes. Its methods are for the goroutine of the request, but for
// deadline.
type watched struct {
	http.ResponseWriter
	rc    *http.ResponseController
	limit time.Duration
	timer *time.Timer // set while something is being written

	mu   sync.Mutex
	over bool // the connection is not ours any more
}

func watch(w http.ResponseWriter, limit time.Duration) *watched {
	s := &watched{ResponseWriter: w, rc: http.NewResponseController(w), limit: limit}
	// Until then, what the server has set for the whole request counts.
	s.deadline(time.Time{})
	return s
}

// Unwrap is for http.ResponseController.
func (s *watched) Unwrap() http.ResponseWriter { return s.ResponseWriter }

func (s *watched) Write(p []byte) (int, error) {
	s.begin()
	defer s.timer.Stop()
	return s.ResponseWriter.Write(p)
}

// FlushError is for http.ResponseController.
func (s *watched) FlushError() error {
	s.begin()
	defer s.timer.Stop()
	return s.rc.Flush()
}

func (s *watched) begin() {
	if s.timer == nil {
		s.timer = time.AfterFunc(s.limit, func() { s.deadline(time.Now().Add(-time.Second)) })
		return
	}
	s.timer.Reset(s.limit)
}

// deadline sets when writing fails, while the exchange lasts; zero is never. It is
// safe for concurrent use. Where it cannot be set, the connection has an end of
// its own.
func (s *watched) deadline(at time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.over {
		_ = s.rc.SetWriteDeadline(at)
	}
}

// end leaves the connection to the server, which may have something to write
// still.
func (s *watched) end() {
	s.deadline(time.Now().Add(s.limit))
	s.mu.Lock()
	defer s.mu.Unlock()
	s.over = true
}
