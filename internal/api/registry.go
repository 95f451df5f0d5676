package api

import (
	"net/http"

	"github.com/interlock-fabric/interlock/pkg/authority"
)

func (s *Server) registerAgent(w http.ResponseWriter, r *http.Request) error {
	var in authority.AgentRequest
	if err := readJSON(w, r, &in); err != nil {
		return err
	}
	a, created, err := s.svc.RegisterAgent(r.Context(), in)
	if err != nil {
		return err
	}
	status := http.StatusOK
	if created {
		status = http.StatusCreated
	}
	writeJSON(w, status, a)
	return nil
}

func (s *Server) agents(w http.ResponseWriter, r *http.Request) error {
	q, err := authority.ParseRegistryQuery(r.URL.Query())
	if err != nil {
		return err
	}
	p, err := s.svc.Agents(r.Context(), q)
	if err != nil {
		return err
	}
	writeJSON(w, http.StatusOK, p)
	return nil
}

func (s *Server) changeAgent(w http.ResponseWriter, r *http.Request) error {
	var in authority.LifecycleRequest
	if err := readJSON(w, r, &in); err != nil {
		return err
	}
	a, err := s.svc.ChangeAgent(r.Context(), in)
	if err != nil {
		return err
	}
	writeJSON(w, http.StatusOK, a)
	return nil
}

func (s *Server) registerSessions(w http.ResponseWriter, r *http.Request) error {
	var in authority.SessionsRequest
	if err := readJSON(w, r, &in); err != nil {
		return err
	}
	a, err := s.svc.RegisterSessions(r.Context(), in)
	if err != nil {
		return err
	}
	status := http.StatusOK
	if a.Registered > 0 {
		status = http.StatusCreated
	}
	writeJSON(w, status, a)
	return nil
}

func (s *Server) sessions(w http.ResponseWriter, r *http.Request) error {
	q, err := authority.ParseRegistryQuery(r.URL.Query())
	if err != nil {
		return err
	}
	p, err := s.svc.Sessions(r.Context(), q)
	if err != nil {
		return err
	}
	writeJSON(w, http.StatusOK, p)
	return nil
}
