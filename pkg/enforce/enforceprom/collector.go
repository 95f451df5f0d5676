package enforceprom

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/interlock-fabric/interlock/pkg/enforce"
	"github.com/interlock-fabric/interlock/pkg/internal/snapshotprom"
)

// Source is what is shown; *enforce.Enforcer is one. Status must be safe for
// concurrent use.
type Source interface{ Status() enforce.Status }

// New returns a collector of the source's status. The metrics carry the constant
// label "enforcer", with the name at this moment, so that several enforcers of one
// process can be registered with one registry.
func New(s Source) prometheus.Collector {
	c := snapshotprom.New("interlock_", s.Status().Enforcer, s.Status)
	flag := func(name, help string, read func(*enforce.Status) bool) {
		c.Gauge(name, help, func(s *enforce.Status) float64 {
			if read(s) {
				return 1
			}
			return 0
		})
	}

	flag("ready", "Whether a verified, fresh state has been in force once.", func(s *enforce.Status) bool { return s.Ready })
	flag("fresh", "Whether the state is recent enough to allow requests by.", func(s *enforce.Status) bool { return s.Fresh })
	flag("fail_open", "Whether the mode can allow what should be denied (best-effort, shadow).", func(s *enforce.Status) bool { return s.Mode != "strict" })
	c.Gauge("state_age_seconds", "How old the state may be, at worst; 0 before there is one.", func(s *enforce.Status) float64 { return s.Age.Seconds() })
	c.Gauge("max_stale_seconds", "The age beyond which requests are denied.", func(s *enforce.Status) float64 { return s.MaxStale.Seconds() })
	c.Gauge("epoch", "Epoch of the chain that is followed.", func(s *enforce.Status) float64 { return float64(s.Epoch) })
	c.Gauge("applied_batch", "Newest batch in force, provisional ones included.", func(s *enforce.Status) float64 { return float64(s.Applied) })
	c.Gauge("confirmed_batch", "Newest batch known to be in the log.", func(s *enforce.Status) float64 { return float64(s.Confirmed) })
	c.Gauge("key_set_version", "Version of the key set in force.", func(s *enforce.Status) float64 { return float64(s.KeySet) })
	c.Gauge("entries", "Entries in force.", func(s *enforce.Status) float64 { return float64(s.Entries) })
	c.Gauge("inherited_entries", "Entries kept from earlier epochs.", func(s *enforce.Status) float64 { return float64(s.Inherited) })
	c.Gauge("orders", "Emergency orders in force that the authority has not adopted.", func(s *enforce.Status) float64 { return float64(len(s.Orders)) })
	c.Gauge("running", "Running work that is bound.", func(s *enforce.Status) float64 { return float64(s.Running) })

	// The table of registered agents: zeroes where callers are not held against it.
	table := func(read func(*enforce.AgentsStatus) float64) func(*enforce.Status) float64 {
		return func(s *enforce.Status) float64 {
			if s.Agents == nil {
				return 0
			}
			return read(s.Agents)
		}
	}
	c.Gauge("agents_registered", "Registered agents known here.", table(func(a *enforce.AgentsStatus) float64 { return float64(a.Agents) }))
	c.Gauge("agents_version", "Version of the table of registered agents in force.", table(func(a *enforce.AgentsStatus) float64 { return float64(a.Version) }))
	c.Gauge("agents_age_seconds", "How old the table of registered agents may be, at worst; 0 before there is one.", table(func(a *enforce.AgentsStatus) float64 { return a.Age.Seconds() }))
	c.Gauge("agents_max_age_seconds", "The age of the table beyond which callers are denied; 0 where they are not held against it.", table(func(a *enforce.AgentsStatus) float64 { return a.MaxAge.Seconds() }))
	c.Gauge("agents_bytes", "Memory that the table takes.", table(func(a *enforce.AgentsStatus) float64 { return float64(a.Bytes) }))

	c.Total("denied", "Checks denied.", func(s *enforce.Status) uint64 { return s.Denied })
	c.Total("denied_unregistered", "Checks denied because an agent is not registered.", func(s *enforce.Status) uint64 { return s.Unregistered })
	c.Total("denied_altered", "Checks denied because a digest is not registered for the agent.", func(s *enforce.Status) uint64 { return s.Altered })
	c.Total("would_deny", "Checks that shadow mode let pass.", func(s *enforce.Status) uint64 { return s.WouldDeny })
	c.Total("drills", "Checks that a drill would have denied.", func(s *enforce.Status) uint64 { return s.Drills })
	c.Total("exposed", "Checks allowed on stale state, in best-effort mode.", func(s *enforce.Status) uint64 { return s.Exposed })
	c.Total("cut", "Running work ended.", func(s *enforce.Status) uint64 { return s.Cut })
	c.Total("frames_refused", "Frames that were not believed.", func(s *enforce.Status) uint64 { return s.Refused })
	c.Total("orders_refused", "Emergency orders that were not believed.", func(s *enforce.Status) uint64 { return s.OrdersRefused })
	c.Total("frames_replayed", "Frames that came too late or again.", func(s *enforce.Status) uint64 { return s.Replayed })
	c.Total("frames_lost", "Frames that there was no room for; the log has them.", func(s *enforce.Status) uint64 { return s.Lost })
	c.Total("batches_orphaned", "Batches heard that the log never had.", func(s *enforce.Status) uint64 { return s.Orphans })
	c.Total("entries_foreign", "Entries ignored because their signer has no right to the tenant.", func(s *enforce.Status) uint64 { return s.Foreign })
	c.Total("repairs", "Reads of the log.", func(s *enforce.Status) uint64 { return s.Repairs })
	c.Total("diverged", "Times the state differed from the authority's and was rebuilt.", func(s *enforce.Status) uint64 { return s.Diverged })
	c.Total("damaged", "Times that state on disk or in memory was found altered.", func(s *enforce.Status) uint64 { return s.Damaged })
	c.Total("rolled_back", "Signs that the log or the key sets were rolled back.", func(s *enforce.Status) uint64 { return s.RolledBack })
	c.Total("clock_jumps", "Jumps between the host's clocks.", func(s *enforce.Status) uint64 { return s.Jumps })
	return c
}
