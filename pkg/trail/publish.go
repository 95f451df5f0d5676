package trail

import (
	"context"
	"time"

	"github.com/interlock-fabric/interlock/pkg/session"
)

// outbox is what the recorder's goroutine alone touches.
type outbox struct {
	boot  session.WriterID
	count uint64
	prev  session.Hash
	// frame is a sealed report that the bus has not taken yet. While there is
	// one, what is recorded waits where it is.
	frame   []byte
	sent    time.Time // when the last report was sealed
	sighted time.Time // when callers were last looked at
	due     []*sighted
	failing bool
}

// run publishes until ctx ends, and then what is left.
func (r *Recorder) run(ctx context.Context) {
	t := time.NewTicker(tick)
	defer t.Stop()
	r.out.sighted = time.Now()
	for {
		select {
		case <-t.C:
			r.publish(ctx, false)
			continue
		case <-ctx.Done():
		}
		break
	}
	ctx, cancel := context.WithTimeout(context.Background(), closeTimeout)
	defer cancel()
	for r.publish(ctx, true) {
	}
	if n := r.samples.len() + r.denials.waiting(time.Now(), true); r.out.frame != nil || n > 0 {
		r.opts.Logger.Warn("trail: the end of the trail could not be sent", "records", n)
	}
}

// publish makes at most one report, of what is due, or of all that waits when
// final is set, and hands it to the bus. It reports whether it did.
func (r *Recorder) publish(ctx context.Context, final bool) bool {
	o := &r.out
	if o.frame == nil {
		r.seal(time.Now(), final)
	}
	if o.frame == nil {
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, publishTimeout)
	defer cancel()
	err := r.opts.Publisher.Report(ctx, o.frame)
	if (err != nil) != o.failing {
		o.failing = err != nil
		if o.failing {
			r.opts.Logger.Warn("trail: reports cannot be sent; they wait", "error", err)
		} else {
			r.opts.Logger.Info("trail: reports are sent again")
		}
	}
	if err != nil {
		r.totals.failures.Add(1)
		return false
	}
	o.frame = nil
	r.totals.reports.Add(1)
	return true
}

// seal makes the next report, if one is due and there is a key to seal it for.
func (r *Recorder) seal(now time.Time, final bool) {
	o := &r.out
	ks := r.opts.Enforcer.KeySet()
	if ks == nil {
		return
	}
	to, ok := ks.AuditKey()
	if !ok {
		return
	}
	if final || r.opts.SightEvery > 0 && now.Sub(o.sighted) >= r.opts.SightEvery {
		o.sighted, o.due = now, r.callers.news()
	}
	samples := r.samples.waiting()
	if !final && now.Sub(o.sent) < r.opts.Interval && len(o.due) == 0 && len(samples)+r.denials.waiting(now, false) < soon {
		return
	}
	var c session.TrailContent
	left := session.MaxReportContent
	fits := func(n int) bool {
		if n > left {
			return false
		}
		left -= n
		return true
	}
	record := func(t *session.TrailRecord) bool {
		n, err := t.MarshaledLen()
		if err != nil { // not one that fill makes; it must not hold up others
			r.opts.Logger.Error("trail: a record that cannot be sent", "error", err)
			return true
		}
		if len(c.Records) == session.MaxReportItems || !fits(n) {
			return false
		}
		c.Records = append(c.Records, *t)
		return true
	}
	r.denials.report(now, final, record)
	for len(o.due) > 0 && len(c.Sightings) < session.MaxReportItems {
		s := o.due[0].sighting()
		if n, err := s.MarshaledLen(); err != nil || !fits(n) {
			break
		}
		o.due[0].reported.Store(s.Calls)
		c.Sightings = append(c.Sightings, s)
		o.due = o.due[1:]
	}
	for _, s := range samples {
		n := len(c.Records)
		if !record(&s.TrailRecord) {
			break
		}
		if !r.samples.take(s) { // it has just given way, and was counted
			c.Records = c.Records[:n]
		}
	}
	if len(c.Records) == 0 && len(c.Sightings) == 0 {
		return
	}
	c.Totals = r.totals.snapshot()
	next := session.Report{Enforcer: r.opts.Enrollment.Enforcer, Boot: o.boot, Count: o.count + 1, Prev: o.prev, Time: session.InstantOf(now)}
	frame, hash, err := next.Seal(&c, to, r.opts.Enrollment.ReceiptKey)
	if err != nil {
		r.opts.Logger.Error("trail: cannot seal a report", "error", err)
		return
	}
	o.frame, o.count, o.prev, o.sent = frame, next.Count, hash, now
}
