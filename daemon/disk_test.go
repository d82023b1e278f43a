package daemon

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/config"
)

// smallDisk returns a directory on a file system of its own with some 30 MB.
func smallDisk(t *testing.T) string {
	t.Helper()
	if _, err := exec.LookPath("mkfs.ext4"); err != nil {
		t.Skip("makes a file system: ", err)
	}
	image, dir := filepath.Join(t.TempDir(), "image"), t.TempDir()
	err := errors.Join(os.WriteFile(image, nil, 0o600), os.Truncate(image, 40<<20))
	if err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"mkfs.ext4", "-q", "-m", "0", image}, {"mount", "-o", "loop", image, dir}} {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%q: %v\n%s", args, err, out)
		}
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// A full disk is an error that says so, and what is there already goes on. With room again the same pull succeeds. The pool is
// in memory, and packs or directories fill the disk; or it is a file on that disk, sparse and larger than what it may grow to.
func TestFullDisk(t *testing.T) {
	for _, f := range flavours[:2] {
		for _, stream := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/stream=%v", f.name, stream), func(t *testing.T) {
				f.need(t)
				disk := smallDisk(t)
				cl, m := inside(t, f, func(c *config.Config) {
					c.Root, c.Pool.Size = filepath.Join(disk, "root"), 256<<20
				})
				ctx := namespaces.WithNamespace(t.Context(), "default")
				small, big := file{"small", random(1, 1<<20)}, file{"big", random(2, 8<<20)}
				first, err := m.pull(ctx, stream, []file{small})
				m.must(err)
				running, err := m.sn.Prepare(ctx, "default/100/c", first)
				m.must(err)
				m.must(cl.sn.Flush(ctx))

				var st unix.Statfs_t
				m.must(unix.Statfs(disk, &st))
				ballast := filepath.Join(disk, "ballast")
				m.must(os.WriteFile(ballast, make([]byte, int64(st.Bavail)*st.Bsize-(4<<20)), 0o600))
				if _, err := m.pull(ctx, stream, []file{small}, []file{big}); err == nil || !strings.Contains(err.Error(), "no space left on device") {
					t.Errorf("a pull with a full disk: %v", err)
				}
				m.compare(running, small)
				m.must(os.Remove(ballast))
				// containerd removes what it could not unpack.
				m.must(m.sn.Remove(ctx, fmt.Sprintf("default/%d/extract-1-x layer", m.names)))
				m.must(cl.sn.Cleanup(ctx))
				top, err := m.pull(ctx, stream, []file{small}, []file{big})
				m.must(err)
				mounts, err := m.sn.Prepare(ctx, "default/101/c", top)
				m.must(err)
				m.compare(mounts, small, big)
			})
		}
	}
}
