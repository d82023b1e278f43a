package mount_test

import (
	"crypto/rand"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/internal/slow"
	"github.com/daxfs/daxfs-snapshotter/mount"
	"github.com/daxfs/daxfs-snapshotter/mount/erofs"
	"github.com/daxfs/daxfs-snapshotter/mount/internal/mounttest"
	"github.com/daxfs/daxfs-snapshotter/mount/internal/sys"
)

// bigFiles returns some large and many small files, and the sum of their sizes in whole pages.
func bigFiles() (files map[string]string, bytes int64) {
	files = map[string]string{}
	put := func(name string, size int64) {
		b := make([]byte, size)
		rand.Read(b)
		files[name] = string(b)
		bytes += (size + 4095) &^ 4095
	}
	for i := range 4 {
		put(fmt.Sprint("large-", i), 8<<20+int64(i)*1000)
	}
	for i := range 500 {
		put(fmt.Sprint("small-", i), int64(i)*40+1)
	}
	return files, bytes
}

// overlay mounts an overlay with its own upper directory.
func overlay(t testing.TB, lower string) (merged string) {
	t.Helper()
	base := t.TempDir()
	merged = filepath.Join(base, "merged")
	for _, d := range []string{"upper", "work", "merged"} {
		if err := os.Mkdir(filepath.Join(base, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	opts := fmt.Sprintf("lowerdir=%s,upperdir=%s/upper,workdir=%s/work", lower, base, base)
	if err := unix.Mount("overlay", merged, "overlay", 0, opts); err != nil {
		t.Fatal("mount overlay: ", err)
	}
	t.Cleanup(func() {
		if err := sys.Detach(merged); err != nil {
			t.Error(err)
		}
	})
	return merged
}

// Twenty containers of four images, which differ in one file, cache their files once. A second mount
// of the pool caches them a second time, which shows that the measurement works.
func TestContainersOfManyImagesCacheOnce(t *testing.T) {
	slow.Skip(t, "reads large files through twenty containers")
	files, size := bigFiles()
	eachDriver(t, func(t *testing.T, b *bed, d mount.Driver) {
		tab := b.open(t, mount.Options{}, d)
		var lowers, dirs []string
		for i := range 4 {
			files["file"] = fmt.Sprint(i)
			lowers = append(lowers, mustMount(t, tab, image(fmt.Sprint(i), b.Publish(t, files))).Dir)
		}
		for i := range 20 {
			dirs = append(dirs, overlay(t, lowers[i%4]))
		}
		group := mounttest.NewCgroup(t)
		least := size * 95 / 100
		once := group.CacheAfter(t, least, dirs[0])
		all := group.CacheAfter(t, least, dirs...)
		t.Logf("%d KiB of files: %d KiB of page cache for one container, %d KiB for twenty", size>>10,
			once>>10, all>>10)
		if min(once, all) < least {
			t.Errorf("%d and %d bytes of cache for %d bytes of files: the measurement misses something",
				once, all, size)
		}
		if limit := size*105/100 + 2<<20; all > limit { // metadata, and the pages of the reading program
			t.Errorf("twenty containers: %d bytes of cache for %d bytes of files, expected at most %d",
				all, size, limit)
		}
		if d.Name() != "erofs-loop" {
			return
		}
		dir := t.TempDir()
		if err := (erofs.Loop{}).Mount(t.Context(), mount.Source{Region: b.pool().Region, Size: b.Size},
			dir); err != nil {
			t.Fatal(err)
		}
		defer sys.Detach(dir)
		twice := group.CacheAfter(t, 2*least, dirs[0], filepath.Join(dir, b.G.SlotName(0)))
		if twice < 2*least {
			t.Errorf("the pool mounted twice: %d bytes of cache for %d bytes of files, expected twice as much", twice,
				size)
		}
	})
}
