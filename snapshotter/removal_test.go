package snapshotter_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/snapshotter"
)

// slowLowers blocks in AddDir and Lower until it is released.
type slowLowers struct {
	*fakeLowers
	entered, goOn chan struct{}
}

func (l *slowLowers) AddDir(ctx context.Context, ns, key, dir string) error {
	close(l.entered)
	<-l.goOn
	return l.fakeLowers.AddDir(ctx, ns, key, dir)
}

// A directory is not removed while it is read for an image: the image would lack files, and another
// namespace or the next pull would find it under the same chain ID.
func TestRemovedWhileRead(t *testing.T) {
	needRoot(t)
	ctx := t.Context()
	root := t.TempDir()
	slow := &slowLowers{newFakeLowers(filepath.Join(root, "fake")), make(chan struct{}), make(chan struct{})}
	s, err := snapshotter.New(ctx, root, slow, snapshotter.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	e := &env{Snapshotter: s, t: t, root: root}
	e.layer("default/1/"+chainA, "", "a")
	<-slow.entered
	e.must(s.Remove(ctx, "default/1/"+chainA))
	e.must(s.Cleanup(ctx))
	if found, err := filepath.Glob(filepath.Join(root, "snapshots/*/fs/a")); err != nil || len(found) != 1 {
		t.Errorf("while it is read the directory is %q, %v", found, err)
	}
	close(slow.goOn)
	e.must(s.Flush(ctx))
	e.must(s.Cleanup(ctx))
	if left, err := os.ReadDir(filepath.Join(root, "snapshots")); err != nil || len(left) > 0 {
		t.Errorf("left over: %v, %v", left, err)
	}
	if len(slow.images) > 0 || len(slow.layers) > 0 {
		t.Errorf("left over: images %v, layers %v", slow.images, slow.layers)
	}
}

// A directory that cannot be removed stops neither other removals nor the daemon.
func TestUnremovableDirectory(t *testing.T) {
	e := newEnv(t, snapshotter.Options{})
	e.prepare("a", "")
	e.prepare("b", "")
	busy := filepath.Join(e.root, "snapshots/1/fs")
	e.must(bindMount(busy))
	unmounted := false
	defer func() {
		if !unmounted {
			e.must(unmountTree(filepath.Join(e.root, "snapshots")))
		}
	}()
	e.must(e.Remove(t.Context(), "a"))
	e.must(e.Remove(t.Context(), "b"))
	if err := e.Cleanup(t.Context()); err == nil {
		t.Error("no word of the directory that cannot be removed")
	}
	if _, err := os.Stat(filepath.Join(e.root, "snapshots/2")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the other directory: %v", err)
	}
	e.restart()
	e.prepare("c", "")
	if _, err := e.Stat(t.Context(), "a"); !errdefs.IsNotFound(err) {
		t.Errorf("%v", err)
	}
	e.must(e.Flush(t.Context()))
	e.must(unmountTree(filepath.Join(e.root, "snapshots")))
	unmounted = true
	e.must(e.Cleanup(t.Context()))
}

func bindMount(dir string) error { return unix.Mount(dir, dir, "", unix.MS_BIND, "") }

func unmountTree(dir string) error {
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
	for _, m := range mounts {
		err = errors.Join(err, unix.Unmount(m.Mountpoint, 0))
	}
	return err
}
