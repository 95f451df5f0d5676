// Package enrolled opens enforcers for programs that run an authority too, such as
// the demo: they need no enrolment file from anybody.
package enrolled

import (
	"context"

	"github.com/interlock-fabric/interlock/pkg/authority"
	"github.com/interlock-fabric/interlock/pkg/enforce"
	"github.com/interlock-fabric/interlock/pkg/natsfeed"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// Open enrols an enforcer under a name that is new to the authority, and opens it
// with these options and that enrolment, as enforce.Open does.
func Open(ctx context.Context, c *authority.Client, name string, o enforce.Options) (*enforce.Enforcer, error) {
	raw, err := c.Enroll(ctx, authority.EnrollRequest{Name: name})
	if err != nil {
		return nil, err
	}
	if o.Enrollment, err = session.ParseEnrollment(raw); err != nil {
		return nil, err
	}
	feed, err := natsfeed.Dial(o.Enrollment, nil)
	if err != nil {
		return nil, err
	}
	return enforce.Open(ctx, feed, &o)
}
