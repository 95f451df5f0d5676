package broker

import (
	"time"

	"github.com/interlock-fabric/interlock/pkg/natsfeed"
	"github.com/nats-io/nats-server/v2/server"
)

// clockReplyTTL bounds how late the writer may answer a clock request.
const clockReplyTTL = 10 * time.Second

// EnforcerPermissions returns all that the enforcer of that name may do on the
// bus.
func EnforcerPermissions(name string) *server.Permissions {
	return &server.Permissions{
		Publish: &server.SubjectPermission{Allow: []string{
			natsfeed.ReceiptSubject(name),
			natsfeed.ClockSubject(name),
			"$JS.API.DIRECT.GET." + natsfeed.LogStream,
			"$JS.API.DIRECT.GET." + natsfeed.TrustStream,
		}},
		Subscribe: &server.SubjectPermission{Allow: []string{
			natsfeed.LogSubject,
			natsfeed.BeatSubject,
			natsfeed.TrustSubject,
			natsfeed.InboxPrefix(name) + ".>",
		}},
	}
}

// AuthorityPermissions returns all that an authority may do on the bus: its own
// subjects, JetStream, the lease, and one answer to each request that it gets.
func AuthorityPermissions() *server.Permissions {
	own := []string{
		natsfeed.LogSubject,
		natsfeed.BeatSubject,
		natsfeed.TrustSubject,
		natsfeed.ForwardSubject,
		natsfeed.ReceiptSubjects,
		natsfeed.ClockSubjects,
	}
	return &server.Permissions{
		Publish: &server.SubjectPermission{Allow: append([]string{
			"$JS.API.>", "$JS.ACK.>", "$JS.FC.>", "$KV." + natsfeed.LeaseBucket + ".>",
		}, own...)},
		Subscribe: &server.SubjectPermission{Allow: append([]string{
			"_INBOX.>", "$KV." + natsfeed.LeaseBucket + ".>",
		}, own...)},
		Response: &server.ResponsePermission{MaxMsgs: 1, Expires: clockReplyTTL},
	}
}

func users(authority string, list []Enforcer) []*server.NkeyUser {
	out := []*server.NkeyUser{{Nkey: authority, Permissions: AuthorityPermissions()}}
	for _, e := range list {
		out = append(out, &server.NkeyUser{Nkey: e.PublicNKey, Permissions: EnforcerPermissions(e.Name)})
	}
	return out
}
