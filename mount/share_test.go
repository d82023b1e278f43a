package mount_test

import (
	"crypto/rand"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/mount"
	"github.com/daxfs/daxfs-snapshotter/mount/erofs"
	"github.com/daxfs/daxfs-snapshotter/mount/fusefs"
	"github.com/daxfs/daxfs-snapshotter/mount/internal/mounttest"
	"github.com/daxfs/daxfs-snapshotter/mount/internal/sys"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

// testDrivers are all drivers, with this test binary as the FUSE server.
func testDrivers() []mount.Driver {
	cmd := mounttest.Command("serve")
	return []mount.Driver{&erofs.File{}, erofs.Loop{}, fusefs.Driver{Command: []string{cmd.Path}, Env: cmd.Env}}
}

// bigTree makes a tree of some large and many small files, and returns the sum of their sizes in pages.
func bigTree(t testing.TB) (dir string, bytes int64) {
	t.Helper()
	dir = t.TempDir()
	put := func(name string, size int64) {
		b := make([]byte, size)
		rand.Read(b)
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o644); err != nil {
			t.Fatal(err)
		}
		bytes += (size + 4095) &^ 4095
	}
	for i := range 4 {
		put(fmt.Sprint("large-", i), 8<<20+int64(i)*1000)
	}
	for i := range 500 {
		put(fmt.Sprint("small-", i), int64(i)*40+1)
	}
	return dir, bytes
}

// overlays mounts n overlays, each with an upper directory of its own, over the lowers in turn.
func overlays(t testing.TB, n int, lowers ...string) []string {
	t.Helper()
	var dirs []string
	for i := range n {
		base := t.TempDir()
		merged := filepath.Join(base, "merged")
		for _, d := range []string{"upper", "work", "merged"} {
			if err := os.Mkdir(filepath.Join(base, d), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		opts := fmt.Sprintf("lowerdir=%s,upperdir=%s/upper,workdir=%s/work", lowers[i%len(lowers)], base, base)
		if err := unix.Mount("overlay", merged, "overlay", 0, opts); err != nil {
			t.Fatal("mount overlay: ", err)
		}
		t.Cleanup(func() {
			if err := sys.Detach(merged); err != nil {
				t.Error(err)
			}
		})
		dirs = append(dirs, merged)
	}
	return dirs
}

// Twenty containers of one image cache it once. Mounting it for each of them, which the erofs snapshotter of containerd does,
// caches it for each: that shows that the measurement would notice.
func TestTwentyContainersCacheOnce(t *testing.T) {
	mounttest.Root(t)
	tree, size := bigTree(t)
	path := filepath.Join(t.TempDir(), "image")
	mounttest.Mkfs(t, tree, path)
	st, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range testDrivers() {
		t.Run(d.Name(), func(t *testing.T) {
			src := mount.Source{Key: "k", Size: st.Size(), Region: region.Info{Kind: region.KindFile, Path: path, FD: -1}, Checked: "test"}
			if err := d.Probe(t.Context(), src.Region); err != nil {
				t.Skip(err)
			}
			tab := open(t, t.TempDir(), mount.Options{}, d)
			m, err := tab.Mount(t.Context(), src, "h")
			if err != nil {
				t.Fatal(err)
			}
			dirs := overlays(t, 20, m.Dir)
			group := mounttest.NewCgroup(t)
			group.ReadAll(t, dirs[0])
			once := group.Cache(t)
			group.ReadAll(t, dirs...)
			all := group.Cache(t)
			t.Logf("%d KiB of files: %d KiB of page cache for one container, %d KiB for twenty", size>>10, once>>10, all>>10)
			if once < size*95/100 {
				t.Errorf("one container: %d bytes of cache for %d bytes of files: the measurement misses something", once, size)
			}
			if limit := size*105/100 + 2<<20; all > limit { // metadata, and the pages of the reading program
				t.Errorf("twenty containers: %d bytes of cache for %d bytes of files, expected at most %d", all, size, limit)
			}
		})
	}
	t.Run("a mount for each", func(t *testing.T) {
		var lowers []string
		for range 3 {
			dir := t.TempDir()
			src := mount.Source{Key: "k", Size: st.Size(), Region: region.Info{Kind: region.KindFile, Path: path, FD: -1}}
			if err := (erofs.Loop{}).Mount(t.Context(), src, dir); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { sys.Detach(dir) })
			lowers = append(lowers, dir)
		}
		dirs := overlays(t, 3, lowers...)
		group := mounttest.NewCgroup(t)
		group.ReadAll(t, dirs...)
		if all := group.Cache(t); all < 2*size {
			t.Errorf("three mounts: %d bytes of cache for %d bytes of files, expected more than twice as much", all, size)
		}
	})
}

// An overlay keeps its lower alive: unmounting the image, which a mistaken Prune could do, does not break containers.
func TestOverlaySurvivesUnmount(t *testing.T) {
	mounttest.Root(t)
	for _, d := range testDrivers() {
		t.Run(d.Name(), func(t *testing.T) {
			src := image(t, "a", "one")
			if err := d.Probe(t.Context(), src.Region); err != nil {
				t.Skip(err)
			}
			tab := open(t, t.TempDir(), mount.Options{}, d)
			m, err := tab.Mount(t.Context(), src, "h")
			if err != nil {
				t.Fatal(err)
			}
			dir := overlays(t, 1, m.Dir)[0]
			tab.Release("a", "h")
			if err := tab.Prune(t.Context()); err != nil {
				t.Fatal(err)
			}
			if got := read(t, dir); got != "one" {
				t.Errorf("read %q", got)
			}
			// And it can be mounted again beside the one that lives on.
			if m, err = tab.Mount(t.Context(), src, "h"); err != nil {
				t.Fatal(err)
			}
			if got := read(t, m.Dir); got != "one" {
				t.Errorf("read %q", got)
			}
			if _, err := os.Stat(filepath.Join(dir, "nothing")); !os.IsNotExist(err) {
				t.Errorf("stat: %v, expected %v", err, fs.ErrNotExist)
			}
		})
	}
}
