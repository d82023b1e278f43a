package live

import (
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
	"time"
)

// cgroup is a memory control group: memory of its processes can be reclaimed without disturbing
// others. Without one, dir is "", and there is no memory pressure.
type cgroup struct{ dir, reclaim, amount string }

// newCgroup makes a group of version 1 or 2 with a limit in bytes.
func newCgroup(t *testing.T, limit int64) *cgroup {
	t.Helper()
	for _, v := range []struct{ base, limit, reclaim, amount string }{
		{"/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.force_empty", "0"},
		{"/sys/fs/cgroup", "memory.max", "memory.reclaim", "1G"},
	} {
		if _, err := os.Stat(filepath.Join(v.base, "cgroup.procs")); err != nil {
			continue
		}
		dir, err := os.MkdirTemp(v.base, "daxfs-live-")
		if err != nil {
			continue
		}
		err = os.WriteFile(filepath.Join(dir, v.limit), []byte(strconv.FormatInt(limit, 10)), 0)
		if err != nil {
			os.Remove(dir)
			continue
		}
		t.Cleanup(func() {
			for range 3000 { // an ended process leaves it a little later
				if err = os.Remove(dir); !errors.Is(err, syscall.EBUSY) {
					break
				}
				time.Sleep(10 * time.Millisecond)
			}
			if err != nil {
				t.Error(err)
			}
		})
		return &cgroup{dir: dir, reclaim: v.reclaim, amount: v.amount}
	}
	t.Log("no memory cgroup can be made below /sys/fs/cgroup: there is no pressure on memory")
	return &cgroup{}
}

// squeeze reclaims memory of the group: cached pages, names and inodes.
func (g *cgroup) squeeze() {
	if g.dir != "" {
		// It may have less to give than the requested amount.
		_ = os.WriteFile(filepath.Join(g.dir, g.reclaim), []byte(g.amount), 0)
	}
}

// join puts a process into the group of a directory, if there is one.
func join(dir string, pid int) error {
	if dir == "" {
		return nil
	}
	return os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0)
}
