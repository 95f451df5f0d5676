package broker

import (
	"errors"
	"testing"

	"github.com/interlock-fabric/interlock/pkg/natsfeed"
	"github.com/interlock-fabric/interlock/pkg/session"
	"github.com/nats-io/nats.go/jetstream"
)

func TestStreamsAreAsTheContractSays(t *testing.T) {
	f := newFabric(t, t.TempDir())
	ctx := testContext(t)
	get := func(name string) jetstream.StreamConfig {
		t.Helper()
		s, err := f.js.Stream(ctx, name)
		if err != nil {
			t.Fatal(err)
		}
		return s.CachedInfo().Config
	}
	log, trust, receipts, lease := get(natsfeed.LogStream), get(natsfeed.TrustStream), get(natsfeed.ReceiptStream), get("KV_"+natsfeed.LeaseBucket)
	reports, audit := get(natsfeed.ReportStream), get(natsfeed.AuditStream)
	for what, ok := range map[string]bool{
		"the log refuses when full":      log.Discard == jetstream.DiscardNew && log.MaxMsgs == -1 && log.MaxAge == 0,
		"the log keeps what it has":      log.DenyDelete && !log.DenyPurge && !log.AllowRollup && !log.AllowMsgTTL,
		"the log is read directly":       log.AllowDirect && trust.AllowDirect && !receipts.AllowDirect,
		"the log is on disk, at once":    log.Storage == jetstream.FileStorage && log.PersistMode == jetstream.DefaultPersistMode,
		"frames fit, and little more":    log.MaxMsgSize >= session.MaxFrameLen && log.MaxMsgSize < DefaultMaxPayload,
		"short memory of message ids":    log.Duplicates == duplicates,
		"64 key sets":                    trust.MaxMsgs == MaxKeySets && trust.Discard == jetstream.DiscardOld,
		"receipts are bounded":           receipts.MaxMsgsPerSubject == MaxReceipts && receipts.MaxBytes > 0 && receipts.MaxMsgSize == MaxReceiptLen,
		"reports are bounded":            reports.MaxMsgsPerSubject == MaxReports && reports.MaxBytes > 0 && reports.MaxMsgSize == session.MaxReportLen,
		"reports are not answered":       reports.NoAck && reports.Discard == jetstream.DiscardOld,
		"receipts are not answered":      receipts.NoAck && !log.NoAck && !trust.NoAck,
		"the audit refuses when full":    audit.Discard == jetstream.DiscardNew && audit.MaxMsgs == -1 && audit.MaxAge == 0,
		"the audit keeps what it has":    audit.DenyDelete && !audit.DenyPurge && !audit.AllowRollup && !audit.AllowDirect,
		"the lease has its newest value": lease.MaxMsgsPerSubject == 1 && lease.Storage == jetstream.FileStorage,
	} {
		if !ok {
			t.Errorf("not so: %s", what)
		}
	}
}

func TestEnsureStreamsMendsWhatIsSafe(t *testing.T) {
	f := newFabric(t, t.TempDir())
	ctx := testContext(t)
	if _, err := f.js.Publish(ctx, natsfeed.LogSubject, []byte("batch")); err != nil {
		t.Fatal(err)
	}
	s, err := f.js.Stream(ctx, natsfeed.LogStream)
	if err != nil {
		t.Fatal(err)
	}
	cfg := s.CachedInfo().Config
	cfg.Discard, cfg.MaxMsgs, cfg.AllowDirect, cfg.AllowRollup = jetstream.DiscardOld, 10, false, true
	if _, err := f.js.UpdateStream(ctx, cfg); err != nil {
		t.Fatal(err)
	}
	if err := EnsureStreams(ctx, f.js, 1); err != nil {
		t.Fatal(err)
	}
	info, err := s.Info(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if c := info.Config; c.Discard != jetstream.DiscardNew || c.MaxMsgs != -1 || !c.AllowDirect || c.AllowRollup {
		t.Errorf("not mended: %+v", c)
	}
	if info.State.Msgs != 1 {
		t.Errorf("%d messages left", info.State.Msgs)
	}
}

func TestEnsureStreamsRefusesWhatIsUnsafe(t *testing.T) {
	for name, change := range map[string]func(*jetstream.StreamConfig){
		"storage":      func(c *jetstream.StreamConfig) { c.Storage = jetstream.MemoryStorage },
		"retention":    func(c *jetstream.StreamConfig) { c.Retention = jetstream.InterestPolicy },
		"persist mode": func(c *jetstream.StreamConfig) { c.PersistMode = jetstream.AsyncPersistMode },
		"a subject transform": func(c *jetstream.StreamConfig) {
			c.SubjectTransform = &jetstream.SubjectTransformConfig{Source: ">", Destination: "x.>"}
		},
		"republish":    func(c *jetstream.StreamConfig) { c.RePublish = &jetstream.RePublish{Destination: "copy.>"} },
		"message TTLs": func(c *jetstream.StreamConfig) { c.AllowMsgTTL = true },
		"sources": func(c *jetstream.StreamConfig) {
			c.Sources = []*jetstream.StreamSource{{Name: natsfeed.TrustStream}}
		},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFabric(t, t.TempDir())
			ctx := testContext(t)
			if err := f.js.DeleteStream(ctx, natsfeed.LogStream); err != nil {
				t.Fatal(err)
			}
			cfg := streams(1)[0]
			change(&cfg)
			if _, err := f.js.CreateStream(ctx, cfg); err != nil {
				t.Fatal(err)
			}
			var bad *StreamConfigError
			if err := EnsureStreams(ctx, f.js, 1); !errors.As(err, &bad) || bad.Field != name || bad.Stream != natsfeed.LogStream {
				t.Errorf("error %v", err)
			}
		})
	}
	if err := EnsureStreams(testContext(t), nil, 0); err == nil {
		t.Error("no replicas")
	}
}
