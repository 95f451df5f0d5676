package natsfeed

import "github.com/interlock-fabric/interlock/pkg/session"

// The subjects and streams of the fabric. docs/design/wire.md says who may use
// which.
const (
	// LogStream holds the signed batches, all on LogSubject. Enforcers listen
	// on LogSubject itself and read the stream by batched direct gets.
	LogStream  = "INTERLOCK_LOG"
	LogSubject = "interlock.v1.log"

	// TrustStream holds the root-signed key sets, on TrustSubject.
	TrustStream  = "INTERLOCK_TRUST"
	TrustSubject = "interlock.v1.trust"

	// BeatSubject carries heartbeats and rejections. They are not stored.
	BeatSubject = "interlock.v1.beat"

	// OrderStream holds the emergency orders, those of each key on a subject of its
	// own.
	OrderStream   = "INTERLOCK_ORDERS"
	OrderSubjects = "interlock.v1.order.*"

	// ReceiptStream holds receipts, each enforcer's on a subject of its own.
	ReceiptStream   = "INTERLOCK_RECEIPTS"
	ReceiptSubjects = "interlock.v1.receipt.*"

	// ReportStream holds the sealed reports, each enforcer's on a subject of its
	// own.
	ReportStream   = "INTERLOCK_REPORTS"
	ReportSubjects = "interlock.v1.report.*"

	// AuditStream holds the authorities' audit, on AuditSubject. Both are closed
	// to enforcers.
	AuditStream  = "INTERLOCK_AUDIT"
	AuditSubject = "interlock.v1.audit"

	// ClockSubjects are where the writer answers nonces, each enforcer's on a
	// subject of its own.
	ClockSubjects = "interlock.v1.clock.*"

	// ForwardSubject carries decisions from one authority to the writer. It is
	// closed to enforcers.
	ForwardSubject = "interlock.v1.forward"

	// RegistryStream holds the batches of the registry of agents and sessions, and
	// SnapshotStream its snapshots: their chunks, each snapshot's on a subject of
	// its own, and then its manifest on SnapshotSubject. All are closed to
	// enforcers.
	RegistryStream  = "INTERLOCK_REGISTRY"
	RegistrySubject = "interlock.v1.registry"
	SnapshotStream  = "INTERLOCK_SNAPSHOTS"
	SnapshotSubject = "interlock.v1.registry.snapshot"
	SnapshotChunks  = "interlock.v1.registry.snapshot.*"

	// LeaseBucket is the key-value bucket of the writer's lease.
	LeaseBucket = "INTERLOCK_LEASE"
)

// OrderSubject is where orders of that emergency key are published.
func OrderSubject(key session.KeyID) string { return "interlock.v1.order." + key.String() }

// ReceiptSubject is where the enforcer of that name publishes receipts.
func ReceiptSubject(enforcer string) string { return "interlock.v1.receipt." + enforcer }

// ReportSubject is where the enforcer of that name publishes reports.
func ReportSubject(enforcer string) string { return "interlock.v1.report." + enforcer }

// ClockSubject is where the enforcer of that name asks for the writer's clock.
func ClockSubject(enforcer string) string { return "interlock.v1.clock." + enforcer }

// InboxPrefix is the prefix of the inboxes that the enforcer of that name may
// listen on.
func InboxPrefix(enforcer string) string { return "_INBOX_" + enforcer }
