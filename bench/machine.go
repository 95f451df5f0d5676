package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// machine is where and of what the figures are.
type machine struct {
	When      time.Time `json:"when"`
	Revision  string    `json:"revision"`
	CPU       string    `json:"cpu"`
	Cores     int       `json:"cores"`
	MemoryMiB int       `json:"memory_mib"`
	Kernel    string    `json:"kernel"`
	Go        string    `json:"go"`
	Load      string    `json:"load_before"`
	LoadAfter string    `json:"load_after"`
	Seconds   float64   `json:"seconds"`
}

func thisMachine() machine {
	return machine{
		When: time.Now().UTC(), Revision: revision(), CPU: field("/proc/cpuinfo", "model name"), Cores: runtime.NumCPU(),
		MemoryMiB: kilobytes(field("/proc/meminfo", "MemTotal")) >> 10, Kernel: firstLine("/proc/sys/kernel/osrelease"),
		Go: runtime.Version() + " " + runtime.GOOS + "/" + runtime.GOARCH, Load: loadAverage(),
	}
}

// revision is the commit that the working directory is at, with a mark when it
// was changed.
func revision() string {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, "git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*").Output()
	if err != nil {
		return "unknown revision"
	}
	return strings.TrimSpace(string(out))
}

func firstLine(path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return "unknown"
	}
	line, _, _ := strings.Cut(string(b), "\n")
	return strings.TrimSpace(line)
}

// field returns the value of the first line "name: value".
func field(path, name string) (value string) {
	f, err := os.Open(path)
	if err != nil {
		return "unknown"
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	for s := bufio.NewScanner(f); s.Scan(); {
		if rest, ok := strings.CutPrefix(s.Text(), name); ok {
			return strings.TrimLeft(rest, "\t: ")
		}
	}
	return "unknown"
}

func kilobytes(s string) int {
	n, _ := strconv.Atoi(strings.TrimSuffix(s, " kB")) // 0 is unknown
	return n
}

// loadAverage is of one, five and fifteen minutes.
func loadAverage() string {
	f := strings.Fields(firstLine("/proc/loadavg"))
	return strings.Join(f[:min(3, len(f))], " ")
}

// cpuTimes are the CPU seconds that everybody, and this process with its ended
// children, have used so far.
type cpuTimes struct{ all, idle, own float64 }

func cpuNow() (c cpuTimes) {
	const perSecond = 100 // USER_HZ
	f := strings.Fields(firstLine("/proc/stat"))
	for i := 1; i < len(f) && i <= 8; i++ { // user nice system idle iowait irq softirq steal
		n, _ := strconv.ParseFloat(f[i], 64) // 0 is unknown
		c.all += n / perSecond
		if i == 4 || i == 5 {
			c.idle += n / perSecond
		}
	}
	for _, who := range []int{syscall.RUSAGE_SELF, syscall.RUSAGE_CHILDREN} {
		var u syscall.Rusage
		if syscall.Getrusage(who, &u) == nil {
			c.own += time.Duration(u.Utime.Nano() + u.Stime.Nano()).Seconds()
		}
	}
	return c
}

// others is the share of the machine, in percent, that others used between two
// looks; what the hypervisor took away is theirs.
func (c cpuTimes) others(later cpuTimes) float64 {
	all := later.all - c.all
	if all <= 0 {
		return 0
	}
	return max(0, 100*(all-(later.idle-c.idle)-(later.own-c.own))/all)
}

// quietPercent is how much of the machine others may use.
const quietPercent = 5

// busy says how others use the machine; empty when they leave it alone.
func busy(ctx context.Context) string {
	before := cpuNow()
	select {
	case <-ctx.Done():
	case <-time.After(2 * time.Second):
	}
	if p := before.others(cpuNow()); p > quietPercent {
		return fmt.Sprintf("others use %.0f %% of it", p)
	}
	load := firstLine("/proc/loadavg")
	one, _, _ := strings.Cut(load, " ")
	if l, err := strconv.ParseFloat(one, 64); err == nil && l > float64(runtime.NumCPU())/2 {
		return "its load average is " + one
	}
	return ""
}

// awaitQuiet waits until the machine is quiet, or says why it is not. The load
// average of the build that came before takes a minute to go down.
func awaitQuiet(ctx context.Context, limit time.Duration, now bool, progress io.Writer) string {
	end := time.Now().Add(limit)
	told := false
	for {
		why := busy(ctx)
		if why == "" || now || ctx.Err() != nil || time.Now().After(end) {
			return why
		}
		if !told {
			told = true
			say(progress, "bench: waiting for up to %v for the machine to be quiet: %s\n", limit, why)
		}
	}
}
