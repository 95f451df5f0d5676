package broker

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/nats-io/nkeys"

	"github.com/interlock-fabric/interlock/pkg/natsfeed"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// Account is the account of the authorities and of the streams. Each enforcer
// has an account of its own beside it.
const Account = "INTERLOCK"

// responseThreshold is how long the server remembers where the answer to an
// enforcer's request goes. It bounds what requests without an answer cost.
const responseThreshold = "10s"

// Permissions are the subjects that a user of the bus may publish and subscribe
// to; nothing else is allowed.
type Permissions struct {
	Publish   []string
	Subscribe []string
}

// EnforcerPermissions returns all that the enforcer of that name may do on the
// bus. They are half of the fence: the server itself sends to whatever reply
// subject a request names, past all permissions, so an enforcer that shared the
// authority's account could have an answer, empty or not, delivered to the log
// or to the API that purges a stream. Hence an account for each, into which
// these very subjects are imported, and out of which no reply subject leads.
func EnforcerPermissions(name string) Permissions {
	return Permissions{
		Publish: []string{
			natsfeed.ReceiptSubject(name),
			natsfeed.ReportSubject(name),
			natsfeed.ClockSubject(name),
			directGet + natsfeed.LogStream,
			directGet + natsfeed.TrustStream,
			directGet + natsfeed.SegmentStream,
			directGet + natsfeed.AgentStream,
			directGet + natsfeed.OrderStream,
		},
		Subscribe: []string{
			natsfeed.LogSubject,
			natsfeed.BeatSubject,
			natsfeed.TrustSubject,
			natsfeed.OrderSubjects,
			natsfeed.InboxPrefix(name) + ".>",
		},
	}
}

// Emergency is who may publish the orders of one emergency key.
type Emergency struct {
	Key session.KeyID
	// PublicNKey is the public half of its NKey ("U…").
	PublicNKey string
}

// EmergencyOf returns whom a key set lets publish orders: the holders of its
// emergency keys, withdrawn ones apart.
func EmergencyOf(ks *session.KeySet) ([]Emergency, error) {
	var out []Emergency
	for _, k := range ks.Keys {
		if k.Bus == nil || k.Withdrawn {
			continue
		}
		pub, err := nkeys.Encode(nkeys.PrefixByteUser, k.Bus)
		if err != nil {
			return nil, fmt.Errorf("broker: emergency key %s: %w", session.KeyIDOf(k.Public), err)
		}
		out = append(out, Emergency{session.KeyIDOf(k.Public), string(pub)})
	}
	return out, nil
}

// EmergencyPermissions returns all that the holder of an emergency key may do on
// the bus: publish its orders. It is in the authority's account, since the server
// passes on to the enforcers' accounts nothing that came out of another account.
// It can ask nothing of the server, and the stream of orders acknowledges nothing,
// so there is no answer that a reply subject could send elsewhere. The inbox is
// there because a list of nothing would permit everything; nobody writes to it.
func EmergencyPermissions(key session.KeyID) Permissions {
	return Permissions{
		Publish:   []string{natsfeed.OrderSubject(key)},
		Subscribe: []string{natsfeed.InboxPrefix(key.String()) + ".>"},
	}
}

// holder is who may connect, beside the authority, and with what.
type holder struct {
	// name is the account's, of those who have one of their own.
	name, inbox, nkey string
	own               bool
	rights            Permissions
}

func holders(list []Enforcer, keys []Emergency) []holder {
	out := make([]holder, 0, len(list)+len(keys))
	for _, e := range list {
		out = append(out, holder{AccountOf(e.Name), natsfeed.InboxPrefix(e.Name) + ".>", e.PublicNKey, true, EnforcerPermissions(e.Name)})
	}
	for _, k := range keys {
		out = append(out, holder{"emergency key " + k.Key.String(), "", k.PublicNKey, false, EmergencyPermissions(k.Key)})
	}
	return out
}

const directGet = "$JS.API.DIRECT.GET."

// AuthorityPermissions returns all that an authority may do on the bus: its own
// subjects, JetStream with its buckets, and answers: to other authorities, and
// under the names that the server gives to what comes out of the enforcers'
// accounts. An allow_responses would name them more closely, but the server
// forgets what it permits when the accounts change, and with it the answers to
// whoever asks at that moment.
func AuthorityPermissions() Permissions {
	own := []string{
		natsfeed.LogSubject, natsfeed.BeatSubject, natsfeed.TrustSubject,
		natsfeed.ForwardSubject, natsfeed.ReceiptSubjects, natsfeed.ReportSubjects, natsfeed.ClockSubjects,
		natsfeed.SegmentSubject, natsfeed.SegmentChunks, natsfeed.AuditSubject, natsfeed.OrderSubjects,
		natsfeed.RegistrySubject, natsfeed.SnapshotSubject, natsfeed.SnapshotChunks, natsfeed.AgentSubject, natsfeed.AgentPartSubjects,
	}
	return Permissions{
		Publish:   append([]string{"$JS.API.>", "$JS.ACK.>", "$JS.FC.>", "$KV.>", "$O.>", "_INBOX.>", "_R_.>"}, own...),
		Subscribe: append([]string{"_INBOX.>", "$KV.>", "$O.>"}, own...),
	}
}

// ServerConfig returns the accounts block of a nats-server configuration that
// gives the authority, the enforcers and the emergency keys their rights, the same as the embedded
// server gives them. The operator of an external cluster puts it on every server,
// with a listener, TLS and `jetstream { sync_interval: always }` of their own,
// and reloads the servers, twice, when it changes: nats-server 2.15 activates
// the service imports of a new account only in the reload after the one that
// brings it. Errors are those of a bad name or key.
func ServerConfig(authority string, list []Enforcer, keys []Emergency) (string, error) {
	if err := validateUsers(authority, list, keys); err != nil {
		return "", err
	}
	return accountsConfig(authority, holders(list, keys)), nil
}

func accountsConfig(authority string, list []holder) string {
	var w strings.Builder
	line := func(format string, a ...any) { fmt.Fprintf(&w, format+"\n", a...) }
	line("accounts {")
	line("  %s {", Account)
	line("    jetstream: enabled")
	users := []string{userConfig(authority, AuthorityPermissions())}
	for _, u := range list {
		if !u.own {
			users = append(users, userConfig(u.nkey, u.rights))
		}
	}
	line("    users: [%s]", strings.Join(users, ", "))
	line("    exports: [")
	for _, s := range []string{natsfeed.LogSubject, natsfeed.BeatSubject, natsfeed.TrustSubject, natsfeed.OrderSubjects} {
		line("      {stream: %q}", s)
	}
	for _, s := range []string{natsfeed.ReceiptSubjects, natsfeed.ReportSubjects, natsfeed.ClockSubjects} {
		line("      {service: %q, response_type: singleton, response_threshold: %q}", s, responseThreshold)
	}
	for _, s := range []string{natsfeed.LogStream, natsfeed.TrustStream, natsfeed.SegmentStream, natsfeed.AgentStream, natsfeed.OrderStream} {
		line("      {service: %q, response_type: stream, response_threshold: %q}", directGet+s, responseThreshold)
	}
	line("    ]")
	line("  }")
	for _, u := range list {
		if !u.own {
			continue
		}
		line("  %q {", u.name)
		line("    users: [%s]", userConfig(u.nkey, u.rights))
		line("    imports: [")
		for _, s := range u.rights.Subscribe {
			if s != u.inbox {
				line("      {stream: {account: %s, subject: %q}}", Account, s)
			}
		}
		for _, s := range u.rights.Publish {
			line("      {service: {account: %s, subject: %q}}", Account, s)
		}
		line("    ]")
		line("  }")
	}
	line("}")
	return w.String()
}

// AccountOf is the account of the enforcer of that name.
func AccountOf(enforcer string) string { return "ENFORCER_" + enforcer }

func userConfig(nkey string, p Permissions) string {
	return fmt.Sprintf("{nkey: %s, permissions: {publish: {allow: %s}, subscribe: {allow: %s}}}",
		nkey, subjectList(p.Publish), subjectList(p.Subscribe))
}

func subjectList(subjects []string) string {
	quoted := make([]string, len(subjects))
	for i, s := range subjects {
		quoted[i] = strconv.Quote(s)
	}
	return "[" + strings.Join(quoted, ", ") + "]"
}
