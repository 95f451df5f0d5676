package feedtest_test

import (
	"testing"

	"github.com/interlock-fabric/interlock/internal/feedtest"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestMemory(t *testing.T) {
	feedtest.Run(t, func(testing.TB) feedtest.Bus { return feedtest.NewMemory() })
}
