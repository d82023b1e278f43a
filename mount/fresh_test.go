package mount_test

import (
	"errors"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/mount"
	"github.com/daxfs/daxfs-snapshotter/mount/internal/sys"
)

// keepCached pins the page with the byte at off of a device in the kernel's cache until release.
func keepCached(t *testing.T, device string, off int64) (release func()) {
	t.Helper()
	f, err := os.Open(device)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	m, err := unix.Mmap(int(f.Fd()), off&^4095, 4096, unix.PROT_READ, unix.MAP_SHARED|unix.MAP_POPULATE)
	if err != nil {
		t.Fatal(err)
	}
	return func() {
		if err := unix.Munmap(m); err != nil {
			t.Error(err)
		}
	}
}

// An adopting process compares only publications that its predecessor has not found fresh.
func TestFreshAfterRestart(t *testing.T) {
	b := fileBed(t)
	first := b.add(t, "a", "one")
	tab := b.open(t, mount.Options{})
	mustMount(t, tab, first)
	mustMount(t, tab, b.add(t, "b", "two"))
	m, _, err := sys.Top(liveDir(t, b))
	if err != nil {
		t.Fatal(err)
	}

	// Nothing writes to a range twice. A later difference shows whether the range is read again.
	end := first.Tree[0].End
	release := keepCached(t, m.Source, end-1)
	defer release()
	if _, err := b.File.WriteAt([]byte{1}, end-1); err != nil {
		t.Fatal(err)
	}
	tab = b.open(t, mount.Options{})
	third := b.add(t, "c", "three")
	mustMount(t, tab, third)

	next := third.Tree[0].End
	stale := keepCached(t, m.Source, next)
	fourth := b.add(t, "d", "four")
	if _, err := tab.Mount(t.Context(), fourth); !errors.Is(err, mount.ErrBusy) {
		t.Errorf("an image whose metadata is cached as it was before: %v, expected ErrBusy", err)
	}
	stale()
	if got := read(t, mustMount(t, tab, fourth).Dir); got != "four" {
		t.Errorf("read %q", got)
	}
}
