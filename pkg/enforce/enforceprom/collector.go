package enforceprom

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/interlock-fabric/interlock/pkg/enforce"
)

// Source is what is shown; *enforce.Enforcer is one. Status must be safe for
// concurrent use.
type Source interface{ Status() enforce.Status }

// New returns a collector of the source's status. The metrics carry the constant
// label "enforcer", with the name at this moment, so that several enforcers of one
// process can be registered with one registry.
func New(s Source) prometheus.Collector {
	labels := prometheus.Labels{"enforcer": s.Status().Enforcer}
	c := &collector{source: s}
	add := func(kind prometheus.ValueType, name, help string, read func(*enforce.Status) float64) {
		c.metrics = append(c.metrics, metric{prometheus.NewDesc("interlock_"+name, help, nil, labels), kind, read})
	}
	gauge := func(name, help string, read func(*enforce.Status) float64) {
		add(prometheus.GaugeValue, name, help, read)
	}
	total := func(name, help string, read func(*enforce.Status) uint64) {
		add(prometheus.CounterValue, name+"_total", help, func(s *enforce.Status) float64 { return float64(read(s)) })
	}
	flag := func(name, help string, read func(*enforce.Status) bool) {
		gauge(name, help, func(s *enforce.Status) float64 {
			if read(s) {
				return 1
			}
			return 0
		})
	}

	flag("ready", "Whether a verified, fresh state has been in force once.", func(s *enforce.Status) bool { return s.Ready })
	flag("fresh", "Whether the state is recent enough to allow requests by.", func(s *enforce.Status) bool { return s.Fresh })
	flag("fail_open", "Whether the mode can allow what should be denied (best-effort, shadow).", func(s *enforce.Status) bool { return s.Mode != "strict" })
	gauge("state_age_seconds", "How old the state may be, at worst; 0 before there is one.", func(s *enforce.Status) float64 { return s.Age.Seconds() })
	gauge("max_stale_seconds", "The age beyond which requests are denied.", func(s *enforce.Status) float64 { return s.MaxStale.Seconds() })
	gauge("epoch", "Epoch of the chain that is followed.", func(s *enforce.Status) float64 { return float64(s.Epoch) })
	gauge("applied_batch", "Newest batch in force, provisional ones included.", func(s *enforce.Status) float64 { return float64(s.Applied) })
	gauge("confirmed_batch", "Newest batch known to be in the log.", func(s *enforce.Status) float64 { return float64(s.Confirmed) })
	gauge("key_set_version", "Version of the key set in force.", func(s *enforce.Status) float64 { return float64(s.KeySet) })
	gauge("entries", "Entries in force.", func(s *enforce.Status) float64 { return float64(s.Entries) })
	gauge("inherited_entries", "Entries kept from earlier epochs.", func(s *enforce.Status) float64 { return float64(s.Inherited) })
	gauge("running", "Running work that is bound.", func(s *enforce.Status) float64 { return float64(s.Running) })

	total("denied", "Checks denied.", func(s *enforce.Status) uint64 { return s.Denied })
	total("would_deny", "Checks that shadow mode let pass.", func(s *enforce.Status) uint64 { return s.WouldDeny })
	total("drills", "Checks that a drill would have denied.", func(s *enforce.Status) uint64 { return s.Drills })
	total("exposed", "Checks allowed on stale state, in best-effort mode.", func(s *enforce.Status) uint64 { return s.Exposed })
	total("cut", "Running work ended.", func(s *enforce.Status) uint64 { return s.Cut })
	total("frames_refused", "Frames that were not believed.", func(s *enforce.Status) uint64 { return s.Refused })
	total("frames_replayed", "Frames that came too late or again.", func(s *enforce.Status) uint64 { return s.Replayed })
	total("frames_lost", "Frames that there was no room for; the log has them.", func(s *enforce.Status) uint64 { return s.Lost })
	total("batches_orphaned", "Batches heard that the log never had.", func(s *enforce.Status) uint64 { return s.Orphans })
	total("entries_foreign", "Entries ignored because their signer has no right to the tenant.", func(s *enforce.Status) uint64 { return s.Foreign })
	total("repairs", "Reads of the log.", func(s *enforce.Status) uint64 { return s.Repairs })
	total("diverged", "Times the state differed from the authority's and was rebuilt.", func(s *enforce.Status) uint64 { return s.Diverged })
	total("damaged", "Times that state on disk or in memory was found altered.", func(s *enforce.Status) uint64 { return s.Damaged })
	total("rolled_back", "Signs that the log or the key sets were rolled back.", func(s *enforce.Status) uint64 { return s.RolledBack })
	total("clock_jumps", "Jumps between the host's clocks.", func(s *enforce.Status) uint64 { return s.Jumps })
	return c
}

type collector struct {
	source  Source
	metrics []metric
}

type metric struct {
	desc *prometheus.Desc
	kind prometheus.ValueType
	read func(*enforce.Status) float64
}

func (c *collector) Describe(out chan<- *prometheus.Desc) {
	for _, m := range c.metrics {
		out <- m.desc
	}
}

func (c *collector) Collect(out chan<- prometheus.Metric) {
	s := c.source.Status()
	for _, m := range c.metrics {
		out <- prometheus.MustNewConstMetric(m.desc, m.kind, m.read(&s))
	}
}
