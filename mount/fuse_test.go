package mount_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/mount"
	"github.com/daxfs/daxfs-snapshotter/mount/internal/mounttest"
	"github.com/daxfs/daxfs-snapshotter/mount/internal/sys"
)

func fuseBed(t *testing.T) *bed {
	mounttest.Root(t)
	b := newBed(t, false, false)
	if err := fuseDriver().Probe(t.Context(), b.pool().Region); err != nil {
		t.Skip(err)
	}
	return b
}

// The pool is mounted anew in the place of a dead server, before and after a restart.
func TestServerDies(t *testing.T) {
	b := fuseBed(t)
	var w warnings
	tab := b.open(t, mount.Options{Warn: w.add}, fuseDriver())
	one, two := b.add(t, "a", "one"), b.add(t, "b", "two")
	mustMount(t, tab, one)
	mustMount(t, tab, two)
	if err := tab.Healthy(t.Context()); err != nil {
		t.Fatal(err)
	}
	live := liveDir(t, b)
	for _, restart := range []bool{false, true} {
		if err := unix.Kill(mounttest.Server(t, live), unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		for range 3000 {
			if errors.Is(sys.Alive(t.Context(), live), unix.ENOTCONN) {
				break
			}
			time.Sleep(10 * time.Millisecond)
		}
		if err := tab.Healthy(t.Context()); !errors.Is(err, unix.ENOTCONN) {
			t.Errorf("healthy with a dead server: %v", err)
		}
		if restart {
			tab = b.open(t, mount.Options{Warn: w.add}, fuseDriver())
			if got := tab.List(); len(got) != 0 {
				t.Errorf("adopted a dead mount: %+v", got)
			}
		}
		for img, want := range map[string]string{"a": "one", "b": "two"} {
			m := mustMount(t, tab, map[string]mount.Image{"a": one, "b": two}[img])
			if got := read(t, m.Dir); got != want {
				t.Errorf("read %q", got)
			}
		}
		if err := tab.Healthy(t.Context()); err != nil {
			t.Error(err)
		}
	}
	if len(w.text) == 0 {
		t.Error("nothing was said")
	}
	for _, key := range []string{"a", "b"} {
		if err := tab.Unmount(t.Context(), key); err != nil {
			t.Error(err)
		}
	}
	if err := tab.UnmountPool(t.Context()); err != nil {
		t.Error(err)
	}
	gone(t, tab)
}

// The server ends a moment after its file system. Nothing is left behind when UnmountPool returns; if a
// process uses the file system, UnmountPool does not wait for it.
func TestServerEndsLate(t *testing.T) {
	b := fuseBed(t)
	tab := b.open(t, mount.Options{}, fuseDriverWith("serve and end late"))
	img := b.add(t, "a", "one")
	left := func() int {
		t.Helper()
		if err := errors.Join(tab.Unmount(t.Context(), "a"), tab.UnmountPool(t.Context())); err != nil {
			t.Fatal(err)
		}
		dirs, err := filepath.Glob(filepath.Join(b.root, "live", "*"))
		if err != nil {
			t.Fatal(err)
		}
		return len(dirs)
	}
	mustMount(t, tab, img)
	if n := left(); n != 0 {
		t.Errorf("%d directories are left", n)
	}
	over := overlay(t, mustMount(t, tab, img).Dir)
	f, err := os.Open(filepath.Join(over, "file"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.Unmount(over, unix.MNT_DETACH); err != nil {
		t.Fatal(err)
	}
	if n := left(); n != 1 {
		t.Errorf("%d directories are left, expected the one of the server that is in use", n)
	}
	f.Close()
	gone(t, tab)
}

// A hanging server is noticed, but not replaced: it may be slow.
func TestServerHangs(t *testing.T) {
	b := fuseBed(t)
	tab := b.open(t, mount.Options{}, fuseDriver())
	img := b.add(t, "a", "one")
	mustMount(t, tab, img)
	pid := mounttest.Server(t, liveDir(t, b))
	if err := unix.Kill(pid, unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	for range 500 {
		if stopped(t, pid) {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	err := tab.Healthy(ctx)
	if _, merr := tab.Mount(ctx, img); merr == nil {
		t.Error("mounted through a server that hangs")
	}
	if kerr := unix.Kill(pid, unix.SIGCONT); kerr != nil {
		t.Fatal(kerr)
	}
	if err == nil {
		t.Error("healthy with a server that hangs")
	}
	if err := tab.Healthy(t.Context()); err != nil {
		t.Error(err)
	}
	if mustMount(t, tab, img); mounttest.Server(t, liveDir(t, b)) != pid {
		t.Error("the server was replaced")
	}
}

// stopped tells whether all threads of a process are stopped.
func stopped(t *testing.T, pid int) bool {
	t.Helper()
	all, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range all {
		b, err := os.ReadFile(name)
		if err != nil || !bytes.Contains(b, []byte("State:\tT")) {
			return false
		}
	}
	return true
}

// The root of a pool remembers nothing about unpublished slots; listing it looks up no slot.
func TestServerForgetsNothing(t *testing.T) {
	b := fuseBed(t)
	tab := b.open(t, mount.Options{}, fuseDriver())
	mustMount(t, tab, b.add(t, "a", "one"))
	live := liveDir(t, b)
	next := b.Prepare(t, map[string]string{"file": "next"})
	if _, err := os.Stat(filepath.Join(live, next.Name)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("stat of a slot without an image: %v, expected that it does not exist", err)
	}
	if des, err := os.ReadDir(live); err != nil || len(des) != b.G.Slots {
		t.Errorf("%d names in the root, %v; expected %d", len(des), err, b.G.Slots)
	}
	b.Show(t, next)
	if m := mustMount(t, tab, image("b", next.Slot)); read(t, m.Dir) != "next" {
		t.Errorf("read %q", read(t, m.Dir))
	}
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(tab.Dir("b"), "file"), &st); err != nil || st.Ino != next.Nids["file"] {
		t.Errorf("inode number %d, %v; expected %d", st.Ino, err, next.Nids["file"])
	}
}
