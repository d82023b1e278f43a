package daemon

import (
	"errors"
	"fmt"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/config"
	"github.com/daxfs/daxfs-snapshotter/internal/slow"
)

// smallDisk returns a directory on a file system of its own with about 30 MB.
func smallDisk(t *testing.T) string {
	t.Helper()
	needRoot(t)
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

// A full disk gives a clear error, and existing containers continue. With room again the same pull
// succeeds. Either the pool is in memory and packs or directories fill the disk, or the pool is a
// sparse file on that disk, larger than the disk.
func TestFullDisk(t *testing.T) {
	slow.Skip(t, "makes and fills disks")
	for _, f := range fewFlavours(2) {
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
				if _, err := m.pull(ctx, stream, []file{small}, []file{big}); err == nil ||
					!strings.Contains(err.Error(), "no space left on device") {
					t.Errorf("a pull with a full disk: %v", err)
				}
				m.compare(running, small)
				m.must(os.Remove(ballast))
				// containerd removes the snapshot of a failed unpack.
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

// A container fills the disk to the last block and inode; its removal frees everything, and the next one starts.
func TestFullDiskGetsFree(t *testing.T) {
	for _, f := range fewFlavours(2) {
		t.Run(f.name, func(t *testing.T) {
			f.need(t)
			disk := smallDisk(t)
			cl, m := inside(t, f, func(c *config.Config) { c.Root, c.Pool.Size = filepath.Join(disk, "root"), 64<<20 })
			ctx := namespaces.WithNamespace(t.Context(), "default")
			a := file{"a", random(1, 1<<20)}
			top, err := m.pull(ctx, true, []file{a})
			m.must(err)
			mounts, err := m.sn.Prepare(ctx, "default/100/hog", top)
			m.must(err)
			m.must(cl.sn.Flush(ctx))
			var before, after unix.Statfs_t
			m.must(unix.Statfs(disk, &before))
			m.must(mount.WithTempMount(ctx, mounts, fill))
			m.must(unix.Statfs(disk, &after))
			if after.Bavail > 1 {
				t.Errorf("%d blocks are free on a disk that was filled", after.Bavail)
			}
			if f.kind == "file" {
				w := httptest.NewRecorder()
				cl.metrics.handler(false).ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
				free := int64(after.Bavail) * after.Bsize
				for kind, n := range map[string]int64{"free": free, "unbacked": cl.pool().Usage().Free - free} {
					want := fmt.Sprintf("daxfs_pool_bytes{kind=%q} %v", kind, float64(n))
					if !strings.Contains(w.Body.String(), want+"\n") {
						t.Errorf("with a full disk the metrics lack %q", want)
					}
				}
			}
			m.must(m.sn.Remove(ctx, "default/100/hog"))
			m.must(cl.sn.Cleanup(ctx))
			m.must(unix.Statfs(disk, &after))
			if lost := int64(before.Bavail) - int64(after.Bavail); lost*after.Bsize > 1<<20 {
				t.Errorf("%d of %d blocks did not come back", lost, before.Bavail)
			}
			next, err := m.sn.Prepare(ctx, "default/101/next", top)
			m.must(err)
			m.compare(next, a)
		})
	}
}

// fill writes below dir until no block and no inode is free.
func fill(dir string) error {
	f, err := os.Create(filepath.Join(dir, "fill"))
	if err != nil {
		return err
	}
	for block := make([]byte, 4096); err == nil; {
		_, err = f.Write(block)
	}
	if !errors.Is(err, unix.ENOSPC) {
		return errors.Join(err, f.Close())
	}
	for i := 0; ; i++ {
		if err := os.Mkdir(filepath.Join(dir, fmt.Sprint("d", i)), 0o700); err != nil {
			break
		}
	}
	return f.Close()
}
