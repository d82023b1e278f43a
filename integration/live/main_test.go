package live

import (
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/daxfs/daxfs-snapshotter/internal/testns"
	"github.com/daxfs/daxfs-snapshotter/mount/fusefs"
)

const envHelper = "DAXFS_LIVE_HELPER"

// helpers are the roles of this program as another process.
var helpers = map[string]func(args []string) error{"serve": fusefs.ServeArgs, "worker": work, "daemon": serveDaemon}

func TestMain(m *testing.M) {
	if name := os.Getenv(envHelper); name != "" {
		if err := helpers[name](os.Args[1:]); err != nil {
			fmt.Fprintln(os.Stderr, name+":", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(testns.Main(m))
}

// command starts this program as a helper, in the same mount namespace.
func command(helper string, args ...string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), envHelper+"="+helper)
	return cmd
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
}

// times returns a number of repetitions: n, fewer with -short, or more with DAXFS_TEST_STRESS.
func times(t *testing.T, n int) int {
	t.Helper()
	if v := os.Getenv("DAXFS_TEST_STRESS"); v != "" {
		k, err := strconv.Atoi(v)
		if err != nil {
			t.Fatalf("DAXFS_TEST_STRESS: %v", err)
		}
		return n * k
	}
	if testing.Short() {
		return max(n/10, 10)
	}
	return n
}

// newSeed returns and logs the seed of the test's choices.
func newSeed(t *testing.T) uint64 {
	t.Helper()
	seed := uint64(time.Now().UnixNano())
	if v := os.Getenv("DAXFS_TEST_SEED"); v != "" {
		n, err := strconv.ParseUint(v, 10, 64)
		if err != nil {
			t.Fatalf("DAXFS_TEST_SEED: %v", err)
		}
		seed = n
	}
	t.Logf("DAXFS_TEST_SEED=%d", seed)
	return seed
}

// watchKernel fails the test if the kernel reports a bug of its own while the test runs.
func watchKernel(t *testing.T) {
	t.Helper()
	before := kernelWarnings(t)
	t.Cleanup(func() {
		for _, line := range kernelWarnings(t) {
			if !slices.Contains(before, line) { // each line begins with its time
				t.Errorf("the kernel says: %s", line)
			}
		}
	})
}

// kernelWarnings returns the lines in the kernel's log that report a kernel bug.
func kernelWarnings(t *testing.T) (lines []string) {
	t.Helper()
	out, err := exec.Command("dmesg").Output()
	if err != nil {
		t.Logf("the kernel's log is not looked at: %v", err)
		return nil
	}
	for line := range strings.Lines(string(out)) {
		for _, bad := range []string{"WARNING: ", "BUG: ", "protection fault", "Oops", "blocked for more than"} {
			if strings.Contains(line, bad) {
				lines = append(lines, strings.TrimSpace(line))
				break
			}
		}
	}
	return lines
}
