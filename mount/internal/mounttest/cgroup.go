package mounttest

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// Cgroup is a memory control group. Page cache is charged to the group of the process that first
// touched it, so it can be measured on a busy machine.
type Cgroup struct{ dir, key string }

// NewCgroup makes a memory cgroup, version 1 or 2, or skips the test.
func NewCgroup(t testing.TB) Cgroup {
	t.Helper()
	for _, c := range []Cgroup{
		{dir: "/sys/fs/cgroup/memory", key: "cache"},
		{dir: "/sys/fs/cgroup", key: "file"},
	} {
		if _, err := os.Stat(filepath.Join(c.dir, "memory.stat")); err != nil {
			continue
		}
		dir, err := os.MkdirTemp(c.dir, "daxfs-test-")
		if err != nil {
			continue
		}
		c.dir = dir
		t.Cleanup(func() {
			if err := os.Remove(dir); err != nil {
				t.Error(err)
			}
		})
		if _, err := os.Stat(filepath.Join(dir, "memory.stat")); err == nil {
			return c
		}
	}
	t.Skip("no memory cgroup can be made below /sys/fs/cgroup")
	return Cgroup{}
}

// Cache returns the bytes of page cache charged to the group.
func (c Cgroup) Cache(t testing.TB) int64 {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(c.dir, "memory.stat"))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(strings.TrimSpace(line), c.key+" "); ok {
			n, err := strconv.ParseInt(v, 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
	}
	t.Fatalf("no %q in %s/memory.stat", c.key, c.dir)
	return 0
}

// ReadAll reads everything below the directories in a process of the group.
func (c Cgroup) ReadAll(t testing.TB, dirs ...string) {
	t.Helper()
	if out, err := Command("readall-in", append([]string{c.dir}, dirs...)...).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
}

// CacheAfter reads everything below the directories and returns the group's page cache in bytes. If
// that is less than least it reads again, a few times: another test may have made the kernel drop its
// caches.
func (c Cgroup) CacheAfter(t testing.TB, least int64, dirs ...string) (n int64) {
	t.Helper()
	for range 10 {
		c.ReadAll(t, dirs...)
		if n = c.Cache(t); n >= least {
			break
		}
	}
	return n
}

// readallIn is the helper behind ReadAll.
func readallIn(args []string) error {
	if err := os.WriteFile(filepath.Join(args[0], "cgroup.procs"), []byte(strconv.Itoa(os.Getpid())), 0); err != nil {
		return fmt.Errorf("join %q: %w", args[0], err)
	}
	return readall(args[1:])
}
