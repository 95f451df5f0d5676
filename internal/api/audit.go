package api

import (
	"bufio"
	"context"
	"io"
	"net/http"
	"strconv"
	"time"

	"github.com/interlock-fabric/interlock/pkg/authority"
)

const (
	// exportTimeout bounds an export as a whole; its reader must take each part
	// of it within the answerTimeout.
	exportTimeout = 30 * time.Minute
	exportBuffer  = 64 << 10
)

func (s *Server) audit(w http.ResponseWriter, r *http.Request) error {
	q, err := authority.ParseAuditQuery(r.URL.Query())
	if err != nil {
		return err
	}
	p, err := s.svc.Audit(r.Context(), q)
	if err != nil {
		return err
	}
	writeJSON(w, http.StatusOK, p)
	return nil
}

func (s *Server) exportAudit(w http.ResponseWriter, r *http.Request) error {
	q, err := authority.ParseAuditQuery(r.URL.Query())
	if err != nil {
		return err
	}
	if !q.Until.IsZero() || q.Before != "" || q.Limit != 0 {
		return authority.NewProblem(authority.ProblemInvalid, "an export goes on to the end", "leave until, before and limit out")
	}
	return s.export(w, r, func(ctx context.Context, w io.Writer) error { return s.svc.ExportAudit(ctx, q, w) })
}

func (s *Server) exportReceipts(w http.ResponseWriter, r *http.Request) error {
	v := r.URL.Query()
	incident := v.Get("incident")
	epoch, err1 := strconv.ParseUint(v.Get("epoch"), 10, 64)
	number, err2 := strconv.ParseUint(v.Get("number"), 10, 64)
	one := incident == "" && len(v) == 2 && err1 == nil && err2 == nil && number > 0
	if !one && (incident == "" || len(v) != 1 || len(v["incident"]) != 1 || len(incident) > 4096) {
		return authority.NewProblem(authority.ProblemInvalid, "which decisions is not clear", "give either incident, or epoch and number")
	}
	return s.export(w, r, func(ctx context.Context, w io.Writer) error {
		return s.svc.ExportReceipts(ctx, incident, epoch, number, w)
	})
}

// export streams lines. What fails before the first of them are sent is answered
// as ever; later, the connection is cut, so that nobody takes it for whole.
func (s *Server) export(w http.ResponseWriter, r *http.Request, write func(context.Context, io.Writer) error) error {
	leave, err := s.stay(s.watch, w, exportTimeout)
	if err != nil {
		return err
	}
	defer leave()
	ctx, cancel := s.until(r.Context())
	defer cancel()
	ctx, stop := context.WithTimeout(ctx, exportTimeout)
	defer stop()
	out := &streamed{w: w, c: http.NewResponseController(w)}
	buf := bufio.NewWriterSize(out, exportBuffer)
	if err = write(ctx, buf); err == nil {
		err = buf.Flush()
	}
	if err != nil && out.begun {
		s.log.Warn("an export was cut off", "path", r.URL.Path, "error", err)
		panic(http.ErrAbortHandler) // what net/http has for this
	}
	return err
}

// streamed is an answer whose reader must keep up.
type streamed struct {
	w     http.ResponseWriter
	c     *http.ResponseController
	begun bool
}

func (s *streamed) Write(b []byte) (int, error) {
	if !s.begun {
		s.begun = true
		h := s.w.Header()
		h.Set("Content-Type", "application/jsonl")
		h.Set("Cache-Control", "no-store")
		h.Set("X-Content-Type-Options", "nosniff")
	}
	if err := s.c.SetWriteDeadline(time.Now().Add(answerTimeout)); err != nil {
		return 0, err
	}
	return s.w.Write(b)
}
