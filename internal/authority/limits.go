package authority

import (
	"math"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/interlock-fabric/interlock/internal/access"
	"github.com/interlock-fabric/interlock/pkg/authority"
)

// maxLimited bounds the principals whose rates are known; beyond it all others
// share one.
const maxLimited = 4096

// limits bounds the wide decisions of each principal: a script that runs wild, or a
// stolen credential, must not deny half the fleet before anybody looks. Users of
// this machine are not limited, and kills never are. The zero value does not limit.
type limits struct {
	mu        sync.Mutex
	perMinute int
	of        map[string]*rate.Limiter
}

// set changes the rate. Everybody begins anew.
func (l *limits) set(perMinute int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.perMinute != perMinute {
		l.perMinute, l.of = perMinute, nil
	}
}

// admit takes one from p's rate. The error is a *authority.Problem.
func (l *limits) admit(p *access.Principal, now time.Time) error {
	l.mu.Lock()
	if l.perMinute == 0 || p.Local() {
		l.mu.Unlock()
		return nil
	}
	name := p.Name
	if l.of[name] == nil && len(l.of) >= maxLimited {
		name = ""
	}
	lim := l.of[name]
	if lim == nil {
		if l.of == nil {
			l.of = map[string]*rate.Limiter{}
		}
		lim = rate.NewLimiter(rate.Limit(float64(l.perMinute)/60), max(1, l.perMinute/2))
		l.of[name] = lim
	}
	l.mu.Unlock()
	if lim.AllowN(now, 1) {
		return nil
	}
	problem := authority.NewProblem(authority.ProblemOverloaded, "too many wide decisions of yours in a short time",
		"name fewer, wider targets, or wait; a kill is never limited")
	problem.RetryAfter = int(math.Ceil((1 - lim.TokensAt(now)) / float64(lim.Limit())))
	return problem
}
