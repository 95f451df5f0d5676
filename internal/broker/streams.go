package broker

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/interlock-fabric/interlock/pkg/natsfeed"
	"github.com/interlock-fabric/interlock/pkg/session"
	"github.com/nats-io/nats.go/jetstream"
)

// Bounds of the streams.
const (
	// maxHeader is room for headers beside a frame.
	maxHeader = 4 << 10
	// MaxKeySets is how many key sets are kept.
	MaxKeySets = 64
	// MaxReceiptLen and MaxReceipts bound what one enforcer can keep stored;
	// the oldest of its own give way. Only its last one is ever read again.
	// maxReceiptAll is what dozens of hostile ones could fill; the server
	// refuses to start where it finds less room than that.
	MaxReceiptLen = 64 << 10
	MaxReceipts   = 64
	maxReceiptAll = 128 << 20
	// MaxReports bounds the reports of one enforcer that are stored, 8 MiB of
	// them; the oldest of its own give way. Only when 16 enforcers at once fill
	// theirs to the last byte, those of others do: maxReportAll.
	MaxReports   = 256
	maxReportAll = 128 << 20
	// MaxOrdersOfKey bounds the orders of one emergency key that are stored; the
	// oldest of its own give way. It may sign half as many. maxOrdersAll is what a
	// hundred hostile ones could fill; it is taken from the disk at once.
	MaxOrdersOfKey = 2 * session.MaxOrders
	maxOrdersAll   = 16 << 20
	// MaxAuditLen bounds a batch of audit records.
	MaxAuditLen = 640 << 10
	// duplicates is the window in which the server remembers message ids. The
	// fence is the expected-last-sequence, not this: it is short because its
	// memory grows with the rate.
	duplicates = time.Second
)

// StreamConfigError says that a stream exists whose configuration is not safe
// and cannot be changed in place.
type StreamConfigError struct {
	Stream, Field string
	Have, Want    any
}

// Error names the stream, the field and both values.
func (e *StreamConfigError) Error() string {
	return fmt.Sprintf("broker: stream %s exists with %s %v, not %v: move its data away, or use another server",
		e.Stream, e.Field, e.Have, e.Want)
}

// streams are the streams of the fabric but for the lease bucket's.
func streams(replicas int) []jetstream.StreamConfig {
	base := jetstream.StreamConfig{
		Retention: jetstream.LimitsPolicy, Storage: jetstream.FileStorage,
		Replicas: replicas, Duplicates: duplicates,
		MaxConsumers: -1, MaxMsgs: -1, MaxBytes: -1, MaxMsgsPerSubject: -1,
	}
	log, trust, receipts, reports, segments, orders, audit := base, base, base, base, base, base, base

	log.Name, log.Subjects = natsfeed.LogStream, []string{natsfeed.LogSubject}
	log.Description = "signed batches; read by batched direct gets"
	// A full log must refuse, not forget.
	log.Discard = jetstream.DiscardNew
	log.AllowDirect, log.DenyDelete = true, true
	log.MaxMsgSize = session.MaxFrameLen + maxHeader

	trust.Name, trust.Subjects = natsfeed.TrustStream, []string{natsfeed.TrustSubject}
	trust.Description = "root-signed key sets"
	trust.Discard = jetstream.DiscardOld
	trust.AllowDirect, trust.DenyDelete = true, true
	trust.MaxMsgs = MaxKeySets
	trust.MaxMsgSize = session.MaxFrameLen + maxHeader

	receipts.Name, receipts.Subjects = natsfeed.ReceiptStream, []string{natsfeed.ReceiptSubjects}
	receipts.Description = "what enforcers have applied"
	receipts.Discard = jetstream.DiscardOld
	// No acknowledgements: one goes to whatever reply subject the enforcer
	// names, on the server's authority and not its own.
	receipts.NoAck = true
	receipts.MaxMsgsPerSubject = MaxReceipts
	receipts.MaxMsgSize = MaxReceiptLen
	receipts.MaxBytes = maxReceiptAll

	reports.Name, reports.Subjects = natsfeed.ReportStream, []string{natsfeed.ReportSubjects}
	reports.Description = "sealed reports of enforcers; read by sequence"
	reports.Discard = jetstream.DiscardOld
	reports.AllowDirect = true
	reports.NoAck = true // for the receipts' reason
	reports.MaxMsgsPerSubject = MaxReports
	// No header that an honest one sends; what is longer is no report.
	reports.MaxMsgSize = session.MaxReportLen
	reports.MaxBytes = maxReportAll

	segments.Name, segments.Subjects = natsfeed.SegmentStream, []string{natsfeed.SegmentSubject, natsfeed.SegmentChunks}
	segments.Description = "published segments; the writer purges old ones"
	segments.Discard = jetstream.DiscardNew
	segments.AllowDirect, segments.DenyDelete = true, true
	segments.MaxMsgSize = session.MaxFrameLen + maxHeader

	orders.Name, orders.Subjects = natsfeed.OrderStream, []string{natsfeed.OrderSubjects}
	orders.Description = "emergency orders; the authority adopts them"
	orders.Discard = jetstream.DiscardOld
	orders.AllowDirect, orders.DenyDelete = true, true
	orders.MaxMsgsPerSubject = MaxOrdersOfKey
	// An acknowledgement would go to whatever reply subject the holder names.
	orders.NoAck = true
	// No header that an honest one sends; what is longer is no order.
	orders.MaxMsgSize = session.MaxOrderLen
	orders.MaxBytes = maxOrdersAll

	audit.Name, audit.Subjects = natsfeed.AuditStream, []string{natsfeed.AuditSubject}
	audit.Description = "the authorities' audit, sealed and chained; the authority purges what is past its keeping"
	// Reads are by its leader: what a replica does not have yet looks like the end.
	audit.Discard = jetstream.DiscardNew
	audit.DenyDelete = true
	audit.MaxMsgSize = MaxAuditLen + maxHeader

	// Read from the leader alone: what is the end decides who may append.
	registry, snapshots := base, base
	registry.Name, registry.Subjects = natsfeed.RegistryStream, []string{natsfeed.RegistrySubject}
	registry.Description = "batches of the registry, encrypted; trimmed behind its snapshots"
	registry.Discard, registry.DenyDelete = jetstream.DiscardNew, true
	registry.MaxMsgSize = session.MaxFrameLen + maxHeader
	snapshots.Name, snapshots.Subjects = natsfeed.SnapshotStream, []string{natsfeed.SnapshotSubject, natsfeed.SnapshotChunks}
	snapshots.Description = "snapshots of the registry, encrypted; old ones are purged"
	snapshots.Discard, snapshots.DenyDelete = jetstream.DiscardNew, true
	snapshots.MaxMsgSize = session.MaxFrameLen + maxHeader

	agents := base
	agents.Name, agents.Subjects = natsfeed.AgentStream, []string{natsfeed.AgentSubject, natsfeed.AgentPartSubjects}
	agents.Description = "the table of registered agents, for enforcers; read by batched direct gets"
	agents.Discard, agents.DenyDelete = jetstream.DiscardOld, true
	agents.AllowDirect = true
	agents.MaxMsgsPerSubject = natsfeed.AgentKeep
	agents.MaxMsgSize = session.MaxFrameLen + maxHeader
	return []jetstream.StreamConfig{log, trust, receipts, reports, segments, orders, audit, registry, snapshots, agents}
}

// EnsureStreams makes the streams and the lease bucket, with the given number of
// replicas. What exists is brought to the configuration wanted where that is
// safe, and is otherwise a StreamConfigError; replicas are added but never taken
// away. It may run on several authorities at once. A cluster without a leader does
// not answer at all: bound ctx by a few seconds and call again.
func EnsureStreams(ctx context.Context, js jetstream.JetStream, replicas int) error {
	if replicas < 1 || replicas > 5 {
		return fmt.Errorf("broker: %d replicas is out of range", replicas)
	}
	for _, want := range streams(replicas) {
		if err := ensureStream(ctx, js, want); err != nil {
			return err
		}
	}
	lease := jetstream.KeyValueConfig{
		Bucket: natsfeed.LeaseBucket, Description: "who is the writer",
		History: 1, MaxValueSize: 4 << 10, MaxBytes: 1 << 20,
		Storage: jetstream.FileStorage, Replicas: replicas,
	}
	s, err := js.Stream(ctx, "KV_"+natsfeed.LeaseBucket)
	switch {
	case errors.Is(err, jetstream.ErrStreamNotFound):
	case err != nil:
		return fmt.Errorf("broker: lease bucket: %w", err)
	default:
		have := s.CachedInfo().Config
		if have.Storage != jetstream.FileStorage {
			return &StreamConfigError{have.Name, "storage", have.Storage, jetstream.FileStorage}
		}
		lease.Replicas = max(replicas, have.Replicas)
		if have.Replicas == lease.Replicas && have.MaxMsgsPerSubject == 1 {
			return nil
		}
	}
	if _, err := js.CreateOrUpdateKeyValue(ctx, lease); err != nil {
		return fmt.Errorf("broker: lease bucket: %w", err)
	}
	return nil
}

func ensureStream(ctx context.Context, js jetstream.JetStream, want jetstream.StreamConfig) error {
	s, err := js.Stream(ctx, want.Name)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		_, err = js.CreateStream(ctx, want)
		if errors.Is(err, jetstream.ErrStreamNameAlreadyInUse) {
			s, err = js.Stream(ctx, want.Name) // another authority was first
		} else if err == nil {
			return nil
		}
	}
	if err != nil {
		return fmt.Errorf("broker: stream %s: %w", want.Name, err)
	}
	have := s.CachedInfo().Config
	if err := checkStream(have, want); err != nil {
		return err
	}
	next := have
	next.Subjects, next.Description = want.Subjects, want.Description
	next.Replicas = max(have.Replicas, want.Replicas)
	next.Discard, next.AllowDirect, next.NoAck = want.Discard, want.AllowDirect, want.NoAck
	next.DenyDelete = want.DenyDelete
	next.AllowRollup = false
	next.MaxMsgs, next.MaxBytes, next.MaxAge = want.MaxMsgs, want.MaxBytes, 0
	next.MaxMsgSize, next.MaxMsgsPerSubject = want.MaxMsgSize, want.MaxMsgsPerSubject
	next.Duplicates = want.Duplicates
	if sameStream(have, next) {
		return nil
	}
	if _, err := js.UpdateStream(ctx, next); err != nil {
		return fmt.Errorf("broker: stream %s: %w", want.Name, err)
	}
	return nil
}

// checkStream refuses what cannot be changed in place, and what would let others
// write into the stream or take out of it.
func checkStream(have, want jetstream.StreamConfig) error {
	for _, f := range []struct {
		name       string
		have, want any
		ok         bool
	}{
		{"storage", have.Storage, want.Storage, have.Storage == want.Storage},
		{"retention", have.Retention, want.Retention, have.Retention == want.Retention},
		{"persist mode", have.PersistMode, want.PersistMode, have.PersistMode == want.PersistMode},
		{"sealed", have.Sealed, false, !have.Sealed},
		{"a mirror", have.Mirror != nil, false, have.Mirror == nil},
		{"sources", len(have.Sources), 0, len(have.Sources) == 0},
		{"a subject transform", have.SubjectTransform != nil, false, have.SubjectTransform == nil},
		{"republish", have.RePublish != nil, false, have.RePublish == nil},
		{"message TTLs", have.AllowMsgTTL, false, !have.AllowMsgTTL},
		{"deny delete", have.DenyDelete, want.DenyDelete, want.DenyDelete || !have.DenyDelete},
	} {
		if !f.ok {
			return &StreamConfigError{want.Name, f.name, f.have, f.want}
		}
	}
	return nil
}

func sameStream(a, b jetstream.StreamConfig) bool {
	return slices.Equal(a.Subjects, b.Subjects) && a.Description == b.Description &&
		a.Replicas == b.Replicas && a.Discard == b.Discard && a.AllowDirect == b.AllowDirect &&
		a.NoAck == b.NoAck && a.DenyDelete == b.DenyDelete && a.AllowRollup == b.AllowRollup &&
		a.MaxMsgs == b.MaxMsgs && a.MaxBytes == b.MaxBytes && a.MaxAge == b.MaxAge &&
		a.MaxMsgSize == b.MaxMsgSize && a.MaxMsgsPerSubject == b.MaxMsgsPerSubject &&
		a.Duplicates == b.Duplicates
}
