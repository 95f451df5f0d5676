// Package enforceprom shows an Enforcer to Prometheus.
//
//	registry.MustRegister(enforceprom.New(enf))
//
// It reads Enforcer.Status at each scrape, starts nothing and takes no lock that
// a request could wait for. No label carries anything that a caller, a tenant or
// the bus chose: the one label, enforcer, is the name in the enrolment, and
// counters of frames have one of a fixed set of outcomes.
//
// What to alert on: interlock_fresh at 0 (every request is denied, or, where
// interlock_fail_open is 1, nothing newer is enforced), rising
// interlock_rolled_back_total or interlock_diverged_total, and rising
// interlock_frames_refused_total while nobody rotates keys.
package enforceprom
