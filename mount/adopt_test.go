package mount_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/mount"
	"github.com/daxfs/daxfs-snapshotter/mount/erofs"
	"github.com/daxfs/daxfs-snapshotter/mount/internal/sys"
)

func TestAdoptsAfterRestart(t *testing.T) {
	eachDriver(t, func(t *testing.T, b *bed, d mount.Driver) {
		drv := &counting{Driver: d}
		first := b.open(t, mount.Options{}, drv)
		one, two := b.add(t, "a", "one"), b.add(t, "b", "two")
		m := mustMount(t, first, one)
		mustMount(t, first, two)
		dev := devOf(t, m.Dir)

		var w warnings
		second := b.open(t, mount.Options{Warn: w.add}, drv)
		if got := second.List(); len(got) != 2 || got[0].Key != "a" || got[0].Dir != m.Dir ||
			got[0].Driver != d.Name() {
			t.Fatalf("adopted %+v", got)
		}
		mustMount(t, second, one)
		three := mustMount(t, second, b.add(t, "c", "three"))
		if got := read(t, three.Dir); got != "three" || devOf(t, three.Dir) != dev {
			t.Errorf("read %q; device %#x, expected %#x", got, devOf(t, three.Dir), dev)
		}
		if drv.mounts != 1 || len(w.text) != 0 {
			t.Errorf("%d mounts, expected 1; warnings %q", drv.mounts, w.text)
		}
		for _, key := range []string{"a", "b", "c"} {
			if err := second.Unmount(t.Context(), key); err != nil {
				t.Fatal(err)
			}
		}
		if err := second.UnmountPool(t.Context()); err != nil {
			t.Fatal(err)
		}
		gone(t, second)
	})
}

// refusing is a driver that must not be asked to mount.
type refusing struct{ mount.Driver }

func (refusing) Name() string { return "other" }
func (refusing) Mount(context.Context, mount.Source, string) error {
	return errors.New("must not be asked to mount")
}

// Mounts of a driver that is no longer configured stay, and new images join them: a second mount of
// the pool would cache everything again.
func TestAdoptsFromOtherDriver(t *testing.T) {
	eachDriver(t, func(t *testing.T, b *bed, d mount.Driver) {
		mustMount(t, b.open(t, mount.Options{}, d), b.add(t, "a", "one"))
		tab := b.open(t, mount.Options{Adopt: []mount.Driver{d}}, refusing{d})
		m := mustMount(t, tab, b.add(t, "b", "two"))
		if m.Driver != d.Name() || len(tab.List()) != 2 {
			t.Errorf("mounted %+v, list %+v", m, tab.List())
		}
	})
}

// Mounts that differ from their records are not used.
func TestAdoptsNothingElse(t *testing.T) {
	for name, spoil := range map[string]func(t *testing.T, b *bed, m mount.Mounted){
		"unmounted": func(t *testing.T, _ *bed, m mount.Mounted) { sys.Detach(m.Dir) },
		"tmpfs on top": func(t *testing.T, _ *bed, m mount.Mounted) {
			if err := unix.Mount("tmpfs", m.Dir, "tmpfs", 0, ""); err != nil {
				t.Fatal(err)
			}
		},
		"another image": func(t *testing.T, b *bed, m mount.Mounted) {
			other := mustMount(t, b.open(t, mount.Options{}), b.add(t, "x", "evil"))
			sys.Detach(m.Dir)
			if err := unix.Mount(other.Dir, m.Dir, "", unix.MS_BIND, ""); err != nil {
				t.Fatal(err)
			}
			sys.Detach(other.Dir)
		},
		"record cut": func(t *testing.T, _ *bed, m mount.Mounted) {
			if err := os.Truncate(filepath.Join(filepath.Dir(m.Dir), "image.json"), 20); err != nil {
				t.Fatal(err)
			}
		},
		"record of another key": func(t *testing.T, _ *bed, m mount.Mounted) {
			rec := filepath.Join(filepath.Dir(m.Dir), "image.json")
			b, err := os.ReadFile(rec)
			if err != nil {
				t.Fatal(err)
			}
			b = []byte(strings.Replace(string(b), `"key":"a"`, `"key":"b"`, 1))
			if err := os.WriteFile(rec, b, 0o600); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			b := fileBed(t)
			img := b.add(t, "a", "one")
			spoil(t, b, mustMount(t, b.open(t, mount.Options{}), img))
			second := b.open(t, mount.Options{})
			if got := second.List(); len(got) != 0 {
				t.Errorf("adopted %+v", got)
			}
			m := mustMount(t, second, img)
			if got := read(t, m.Dir); got != "one" {
				t.Errorf("read %q", got)
			}
			if _, n, err := sys.Top(m.Dir); n != 1 || err != nil {
				t.Errorf("%d mounts on %s, %v", n, m.Dir, err)
			}
		})
	}
}

// The path of the pool now leads to a copy of its file with the same UUID; the old file is mounted.
func TestPathOfAnotherFile(t *testing.T) {
	b := fileBed(t)
	img := b.add(t, "a", "one")
	m := mustMount(t, b.open(t, mount.Options{}), img)
	dev := devOf(t, m.Dir)
	held, err := os.Open(m.Dir) // keeps its device number from being reused
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	all := make([]byte, 65<<20) // metadata and the contents of one file
	if _, err := b.File.ReadAt(all, 0); err != nil {
		t.Fatal(err)
	}
	next := b.Path + ".new"
	err = errors.Join(os.WriteFile(next, all, 0o600), os.Truncate(next, b.Size), os.Rename(next, b.Path))
	if err != nil {
		t.Fatal(err)
	}
	var w warnings
	tab := b.open(t, mount.Options{Warn: w.add})
	if got := tab.List(); len(got) != 0 || len(w.text) == 0 {
		t.Errorf("adopted %+v, warnings %q", got, w.text)
	}
	if m = mustMount(t, tab, img); devOf(t, m.Dir) == dev {
		t.Error("the old file is still mounted")
	}
}

// A pool that is unmounted while its images are bound comes back as the same file system.
func TestPoolComesBackFromBinds(t *testing.T) {
	eachDriver(t, func(t *testing.T, b *bed, d mount.Driver) {
		drv := &counting{Driver: d}
		var w warnings
		tab := b.open(t, mount.Options{Warn: w.add}, drv)
		m := mustMount(t, tab, b.add(t, "a", "one"))
		dev := devOf(t, m.Dir)
		live := liveDir(t, b)
		for i, restart := range []bool{false, true} {
			if err := unix.Unmount(live, 0); err != nil {
				t.Fatal(err)
			}
			if restart {
				tab = b.open(t, mount.Options{Warn: w.add}, drv)
				if got := tab.List(); len(got) != 2 {
					t.Errorf("adopted %+v", got)
				}
			} else if err := tab.Healthy(t.Context()); err == nil {
				t.Error("healthy without a mounted pool")
			}
			key := []string{"b", "c"}[i]
			if m := mustMount(t, tab, b.add(t, key, key)); read(t, m.Dir) != key || devOf(t, m.Dir) != dev {
				t.Errorf("%s: read %q, device %#x, expected %#x", key, read(t, m.Dir), devOf(t, m.Dir), dev)
			}
		}
		if drv.mounts != 1 {
			t.Errorf("%d mounts, expected one; warnings %q", drv.mounts, w.text)
		}
	})
}

func liveDir(t *testing.T, b *bed) string {
	t.Helper()
	dirs, err := filepath.Glob(filepath.Join(b.root, "live", "*", "mnt"))
	if err != nil || len(dirs) != 1 {
		t.Fatalf("%v, %v", dirs, err)
	}
	return dirs[0]
}

// Directories below images/ that the table did not make stay unchanged.
func TestLeavesForeignDirectories(t *testing.T) {
	b := fileBed(t)
	foreign := filepath.Join(b.root, "images", "foreign", "mnt")
	if err := os.MkdirAll(foreign, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", foreign, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	defer sys.Detach(foreign)
	var w warnings
	tab := b.open(t, mount.Options{Warn: w.add})
	if left, err := tab.RemoveStale(t.Context(), func(string) bool { return false }); err != nil || len(left) != 0 {
		t.Errorf("stale: %+v, %v", left, err)
	}
	if m, _, err := sys.Top(foreign); m == nil || err != nil {
		t.Errorf("the foreign mount is gone: %v", err)
	}
	if len(w.text) != 1 {
		t.Errorf("warnings %q, expected one", w.text)
	}
}

// Images of another epoch or pool, and those of version 1, stay while they are used, then disappear.
func TestStale(t *testing.T) {
	b := fileBed(t)
	old := b.open(t, mount.Options{})
	used, named, unused := mustMount(t, old, b.add(t, "used", "used")), mustMount(t, old, b.add(t, "named", "named")),
		mustMount(t, old, b.add(t, "unused", "unused"))
	over := overlay(t, used.Dir)

	// Version 1 mounted each image separately.
	v1 := filepath.Join(b.root, "images", strings.Repeat("1", 24))
	if err := os.MkdirAll(filepath.Join(v1, "mnt"), 0o755); err != nil {
		t.Fatal(err)
	}
	record := `{"version":1,"driver":"erofs-loop","key":"image/1","kind":"file","path":"/x","off":2097152,"size":4096}`
	if err := os.WriteFile(filepath.Join(v1, "image.json"), []byte(record), 0o600); err != nil {
		t.Fatal(err)
	}
	other := newBed(t, false, true)
	src := mount.Source{Region: other.pool().Region, Size: other.Size}
	if err := (erofs.Loop{}).Mount(t.Context(), src, filepath.Join(v1, "mnt")); err != nil {
		t.Fatal(err)
	}
	overV1 := overlay(t, filepath.Join(v1, "mnt"))

	fresh := newBed(t, false, true)
	fresh.root = b.root
	tab := fresh.open(t, mount.Options{})
	if got := tab.List(); len(got) != 0 {
		t.Fatalf("adopted %+v", got)
	}
	if m := mustMount(t, tab, fresh.add(t, "used", "new")); read(t, m.Dir) != "new" || m.Dir == used.Dir {
		t.Errorf("read %q from %s", read(t, m.Dir), m.Dir)
	}
	stale, err := tab.Stale(t.Context())
	if err != nil || len(stale) != 5 {
		t.Fatalf("stale: %+v, %v; expected three images, one of version 1, and a pool", stale, err)
	}
	keep := func(dir string) bool { return dir == named.Dir }
	left, err := tab.RemoveStale(t.Context(), keep)
	if err != nil || len(left) != 4 {
		t.Fatalf("left: %+v, %v; expected the used and the named image, that of version 1, and their pool", left, err)
	}
	if read(t, over) != "used" || read(t, used.Dir) != "used" || read(t, named.Dir) != "named" {
		t.Error("an image that is used or named is gone")
	}
	if _, err := os.Stat(unused.Dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the unused image is still there: %v", err)
	}
	// Back at the old pool: its mounts are found unchanged.
	if got := b.open(t, mount.Options{}).List(); len(got) != 2 {
		t.Errorf("back at the old pool: %+v", got)
	}
	if err := errors.Join(sys.Detach(over), sys.Detach(overV1)); err != nil {
		t.Fatal(err)
	}
	if left, err := tab.RemoveStale(t.Context(), func(string) bool { return false }); err != nil || len(left) != 0 {
		t.Errorf("left: %+v, %v", left, err)
	}
	gone(t, mustOpen(t, b))
}

func mustOpen(t *testing.T, b *bed) *mount.Table {
	t.Helper()
	tab, err := mount.Open(t.Context(), b.root, []mount.Driver{erofs.Loop{}}, b.pool(), mount.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return tab
}
