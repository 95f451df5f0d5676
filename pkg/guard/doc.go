// Package guard is what the adapters of all protocols have in common: the three
// methods that they ask of an enforcer, the first check of a request, the
// caller's way through a context, what runs and what outlives its requests, and
// the guarded transport of the calls that a host makes itself.
//
// A host of one of the protocols wants its adapter instead, and from here the
// Transport at most. Another puts this in front of its own handler:
//
//	p, known, err := guard.Admit(enforcer, verifier, r, session.Call{Audience: resource}, nil)
//	if err != nil {
//		answer := own.Answer(err) // a denial.Resource
//		answer.Write(w, r, nil)
//		return
//	}
//	next.ServeHTTP(w, r.WithContext(guard.NewContext(r.Context(), p)))
package guard
