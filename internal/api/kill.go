package api

import (
	"net/http"

	"github.com/interlock-fabric/interlock/pkg/authority"
)

func (s *Server) exemptions(w http.ResponseWriter, r *http.Request) error {
	list, err := s.svc.Exemptions(r.Context())
	if err != nil {
		return err
	}
	writeJSON(w, http.StatusOK, map[string]any{"exemptions": list})
	return nil
}

func (s *Server) declareExemption(w http.ResponseWriter, r *http.Request) error {
	var in authority.ExemptionRequest
	if err := readJSON(w, r, &in); err != nil {
		return err
	}
	x, err := s.svc.DeclareExemption(r.Context(), in)
	if err != nil {
		return err
	}
	writeJSON(w, http.StatusCreated, x)
	return nil
}

func (s *Server) approveExemption(w http.ResponseWriter, r *http.Request) error {
	x, err := s.svc.ApproveExemption(r.Context(), r.PathValue("id"))
	if err != nil {
		return err
	}
	writeJSON(w, http.StatusOK, x)
	return nil
}

func (s *Server) removeExemption(w http.ResponseWriter, r *http.Request) error {
	if err := s.svc.RemoveExemption(r.Context(), r.PathValue("id")); err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

func (s *Server) restores(w http.ResponseWriter, r *http.Request) error {
	list, err := s.svc.Restores(r.Context())
	if err != nil {
		return err
	}
	writeJSON(w, http.StatusOK, map[string]any{"restores": list})
	return nil
}

func (s *Server) abortRestore(w http.ResponseWriter, r *http.Request) error {
	d, err := s.svc.AbortRestore(r.Context(), r.PathValue("id"))
	if err != nil {
		return err
	}
	writeDecision(w, d)
	return nil
}
